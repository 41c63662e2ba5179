import PageContent
import Platform
import StoreProtocol

/// Contents that were seen once, and where: "VM m had this at gfn g". A hint and nothing more: whoever believes one
/// looks at that page before anything follows from it.
///
/// So it may forget. It is a table of a fixed size, sets of 8 entries of 8 bytes (one cache line); a content that comes
/// when its set is full replaces one of them, chosen by the newcomer's hash. What never comes again ages out like that,
/// and a guest whose contents flip can fill it with rubbish, but never make it larger or slower. Threads read and write
/// it without a lock: an entry is one word, and losing one to a race loses a hint.
final class Candidates: Sendable {
    struct Place: Equatable, Sendable {
        let machine: Int
        let gfn: UInt64
    }

    // Bits of an entry: 0..29 gfn, 30..41 machine, 42..63 of the hash's high word. Machines are numbered from 1: an
    // entry is never 0.
    private static let machineShift: UInt64 = 30
    private static let tagShift: UInt64 = 42
    static let machineLimit = 1 << 12

    private static let ways = 8
    private let mapping: Mapping
    private let bytes: MappedBytes
    private let setMask: UInt64

    /// At most `byteCount` bytes (a power of two is used), which are taken from the host as they fill.
    init(byteCount: Int) throws(QuireError) {
        let sets = max(1, byteCount / (8 * Self.ways))
        let size = 1 << (Int.bitWidth - 1 - sets.leadingZeroBitCount)
        mapping = try Mapping(anonymousByteCount: size * 8 * Self.ways)
        mapping.excludeFromDumps()
        bytes = unsafe mapping.view(0, count: mapping.byteCount)
        setMask = UInt64(size - 1)
    }

    var byteCount: Int { mapping.byteCount }

    /// Notes that a content was seen at `place`. Returns another place where it was seen before, if one is remembered.
    func sight(_ hash: PageHash, at place: Place) -> Place? {
        let set = Int(hash.high & setMask) * 8 * Self.ways
        let tag = hash.high >> Self.tagShift
        let entry = tag << Self.tagShift | UInt64(place.machine) << Self.machineShift | place.gfn
        var target: Int?
        for way in 0..<Self.ways {
            let at = set + 8 * way
            let found = bytes.load64(at)
            if found == 0 {
                target = target ?? at
            } else if found >> Self.tagShift == tag {
                let seen = Place(
                    machine: Int(found >> Self.machineShift) & (Self.machineLimit - 1),
                    gfn: found & (1 << Self.machineShift - 1))
                bytes.store64(at, entry)
                return seen == place ? nil : seen
            }
        }
        bytes.store64(target ?? set + 8 * Int(hash.low % UInt64(Self.ways)), entry)
        return nil
    }
}
