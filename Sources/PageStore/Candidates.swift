import PageContent
import Platform
import StoreProtocol
import Synchronization

/// Contents that were seen once, and where: "VM m had this at gfn g". A hint and nothing more: whoever believes one
/// looks at that page before anything follows from it.
///
/// So it may forget. It is a table of a fixed size, sets of 25 entries of 5 bytes (128 bytes, two cache lines that are fetched
/// together); a content that comes when its set is full replaces the oldest. Before that, one is replaced that may go: of a content
/// that was seen again and so has a slot now, or that proved to be wrong. Such an entry stays as long as there is room, for those who
/// looked the content up before it had the slot and come here only now, and since two contents may have one tag. What never comes
/// again ages out like that, and a guest whose contents flip can fill it with rubbish, but never make it larger or slower. Threads
/// read and write it without a lock: an entry is two words, and losing or mixing some in a race loses hints; whoever reads one has to
/// bear any bits.
///
/// A page that is quiet is looked up once. So a content that is forgotten too early is not merged before it is written
/// again, and the table has to hold what is seen once on a host that is full of guests: see `byteCount(forHost:)`.
package final class Candidates: Sendable {
    package struct Place: Equatable, Sendable {
        package let machine: Int
        package let gfn: UInt64
        package init(machine: Int, gfn: UInt64) {
            self.machine = machine
            self.gfn = gfn
        }
    }

    /// Of a host with so much memory: 3 bytes a page, entries for 58 % of the pages. Guests that fill a host, and half of whose pages
    /// have one equal each, need room for half: what has a slot needs no entry.
    package static func byteCount(forHost memory: Int) -> Int { memory / 4096 * 3 }

    private static let ways = 25
    private static let setBytes = 128
    // In a set: the low words of its entries, then their high bytes, then the entry that is replaced next.
    private static let highBytes = 4 * ways
    private static let nextByte = 5 * ways

    private let mapping: Mapping
    private let bytes: MappedBytes
    private let sets: UInt64
    private let places: Places

    // Bits of an entry: first the place, plus 1: an entry is never 0; then whether it may go; up to 39 of the hash's high word.
    private let goneBit: UInt64
    private let tagShift: UInt64

    /// At most `byteCount` bytes, which are taken from the host as they fill. Guests' memory has places
    /// up to about twice `hostPages`.
    package init(byteCount: Int, hostPages: Int = ProcessCalls.memoryBytes / 4096) throws(QuireError) {
        let placeBits = UInt64(min(max(Int.bitWidth - hostPages.leadingZeroBitCount + 1, 26), 34))
        goneBit = 1 << placeBits
        tagShift = placeBits + 1
        places = try Places(limit: 1 << Int(placeBits) - 1)
        sets = UInt64(max(1, byteCount / Self.setBytes))
        mapping = try Mapping(anonymousByteCount: Int(sets) * Self.setBytes)
        mapping.excludeFromDumps()
        // It is filled at random: soon each small page would have been taken, too, one fault each.
        mapping.preferHugePages()
        bytes = unsafe mapping.view(0, count: mapping.byteCount)
    }

    package var byteCount: Int { mapping.byteCount }

    private func set(_ hash: PageHash) -> Int { Int(sets.multipliedFullWidth(by: hash.high).high) * Self.setBytes }
    private func tag(_ hash: PageHash) -> UInt64 { hash.high & (1 << (40 - tagShift) - 1) }

    private func entry(_ set: Int, _ way: Int) -> UInt64 {
        UInt64(bytes.load32(set + 4 * way)) | UInt64(bytes.load8(set + Self.highBytes + way)) << 32
    }
    private func setEntry(_ set: Int, _ way: Int, _ entry: UInt64) {
        bytes.store32(set + 4 * way, UInt32(truncatingIfNeeded: entry))
        bytes.store8(set + Self.highBytes + way, UInt8(truncatingIfNeeded: entry >> 32))
    }

    /// A content is seen at `place`. Returns another place where it was seen before, if one is remembered, and notes this one if
    /// not. `wrong`: a place that has proved not to have it: stale, or of another content with the same tag.
    package func sight(_ hash: PageHash, at place: Place, besides wrong: Place? = nil) -> Place? {
        let set = set(hash), tag = tag(hash)
        var second: Place?, isNoted = false
        for way in 0..<Self.ways {
            let found = entry(set, way)
            guard found != 0 else { break }
            // No place at all: somebody has written half of it by now.
            let number = found & (goneBit - 1)
            guard number != 0, found >> tagShift == tag, let seen = places.place(number - 1), seen != wrong else { continue }
            if seen == place {
                isNoted = true
            } else if found & goneBit == 0 {
                return seen
            } else {
                second = second ?? seen
            }
        }
        if second == nil, !isNoted { note(hash, at: place) }
        return second
    }

    /// Notes it, whatever else is remembered.
    package func note(_ hash: PageHash, at place: Place) {
        let number = places.number(of: place)
        let set = set(hash)
        var target: Int?
        for way in 0..<Self.ways {
            let found = entry(set, way)
            if found == 0 {
                target = way
                break
            }
            if target == nil, found & goneBit != 0 { target = way }
        }
        setEntry(set, target ?? takeOldest(set), tag(hash) << tagShift | number + 1)
    }

    /// What is remembered of `place` may go: its content has a slot, or it proved to be wrong.
    package func letGo(_ hash: PageHash, at place: Place) {
        guard let number = places.known(place) else { return }
        let set = set(hash)
        let entry = tag(hash) << tagShift | number + 1
        for way in 0..<Self.ways where self.entry(set, way) == entry { return setEntry(set, way, entry | goneBit) }
    }

    /// A set fills in order, so the one behind the newest is the oldest, or nearly: some have taken the places of those with slots.
    private func takeOldest(_ set: Int) -> Int {
        let way = Int(bytes.load8(set + Self.nextByte)) % Self.ways
        bytes.store8(set + Self.nextByte, UInt8((way + 1) % Self.ways))
        return way
    }

    /// The VM has ended: its places may become others'.
    package func forget(machine: Int) { places.forget(machine) }
}

/// Numbers for the pages of all guests, in blocks of 64 MiB as they are asked for: a few bits less than VM and gfn have. Where there is
/// none left another block's becomes it, one after the other: nobody can keep them all.
private final class Places: Sendable {
    private static let blockBits: UInt64 = 14
    private static let gfnMask: UInt64 = (1 << blockBits) - 1

    private struct Blocks {
        var numbers: [UInt64: UInt64] = [:]
        var free: [UInt64] = []
        var next: UInt64 = 0
        /// Counts those that were taken from another block.
        var taken: UInt64 = 0
    }
    private let blocks = Mutex(Blocks())
    private let limit: UInt64
    /// What a block's number stands for: VM, gfn block; 0: nothing.
    private let owners: Mapping

    private static let machineShift: UInt64 = 40

    init(limit: Int) throws(QuireError) {
        self.limit = UInt64(limit) >> Self.blockBits
        owners = try Mapping(anonymousByteCount: (8 * Int(self.limit) + 4095) & ~4095)
    }

    private static func owner(_ place: Candidates.Place) -> UInt64 {
        UInt64(place.machine) << machineShift | place.gfn >> blockBits
    }

    private static func number(_ block: UInt64, _ place: Candidates.Place) -> UInt64 { block << blockBits | place.gfn & gfnMask }

    /// Nil where it has none.
    func known(_ place: Candidates.Place) -> UInt64? {
        blocks.withLock { $0.numbers[Self.owner(place)] }.map { Self.number($0, place) }
    }

    func number(of place: Candidates.Place) -> UInt64 {
        let owner = Self.owner(place)
        let block = blocks.withLock { blocks -> UInt64 in
            if let known = blocks.numbers[owner] { return known }
            let new: UInt64
            if let free = blocks.free.popLast() {
                new = free
            } else if blocks.next < limit {
                new = blocks.next
                blocks.next += 1
            } else {
                new = blocks.taken % limit
                blocks.taken += 1
                blocks.numbers[owners.load64(8 * Int(new))] = nil
            }
            blocks.numbers[owner] = new
            owners.store64(8 * Int(new), owner)
            return new
        }
        return Self.number(block, place)
    }

    func place(_ number: UInt64) -> Candidates.Place? {
        guard number >> Self.blockBits < limit else { return nil }
        let owner = owners.load64(8 * Int(number >> Self.blockBits))
        guard owner != 0 else { return nil }
        return Candidates.Place(
            machine: Int(owner >> Self.machineShift),
            gfn: (owner & (1 << Self.machineShift - 1)) << Self.blockBits | number & Self.gfnMask)
    }

    func forget(_ machine: Int) {
        blocks.withLock { blocks in
            for (owner, number) in blocks.numbers where owner >> Self.machineShift == UInt64(machine) {
                blocks.numbers[owner] = nil
                blocks.free.append(number)
                owners.store64(8 * Int(number), 0)
            }
        }
    }
}
