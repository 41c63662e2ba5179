import Platform
import Synchronization

/// Whose memory it is: what weights and caps count by.
final class ClientRecord: Sendable {
    static let defaultWeight: UInt32 = 100

    let name: String
    let weight: Atomic<UInt32>
    /// Bytes; `.max`: no limit.
    let cap: Atomic<Int>
    let pools = Mutex<[PoolRecord]>([])

    init(name: String, weight: UInt32, cap: UInt64?) {
        self.name = name
        self.weight = Atomic(weight)
        self.cap = Atomic(cap.map { Int(clamping: $0) } ?? .max)
    }
}

/// A pool, as the store keeps it. Counters are spread over eight cache lines, by the stripe that a thread works in, so that
/// threads don't meet there.
final class PoolRecord: Sendable {
    enum Counter: Int {
        case sameFilled, puts, putsFailed, putsShared, gets, hits, flushes, evictions
    }

    let number: UInt16
    let attributes: TmemPool.Attributes
    let client: ClientRecord
    let isLive = Atomic<Bool>(true)
    /// Keys that have a page: exact, since a promise is kept by it.
    let pages = Atomic<Int>(0)
    let capacity: Int
    private let mapping: Mapping
    private let counters: MappedBytes

    var isEphemeral: Bool { attributes.kind == .ephemeral }
    /// Persistent, without a promise.
    var isUnpromised: Bool { attributes.kind == .persistent && attributes.capacityPages == nil }
    var removesOnGet: Bool { attributes.kind == .ephemeral && attributes.scope == .private }

    init(number: UInt16, attributes: TmemPool.Attributes, client: ClientRecord) throws(QuireError) {
        self.number = number
        self.attributes = attributes
        self.client = client
        capacity = attributes.capacityPages.map { Int(clamping: $0) } ?? .max
        mapping = try Mapping(anonymousByteCount: 4096)
        // Sound: this object keeps the mapping.
        unsafe counters = mapping.view(0, count: 512)
    }

    /// Bytes of metadata that a pool takes: its counters, its charges, its lists.
    static let metadataBytes = 4096 + 512 + 512

    @inline(__always) func count(_ counter: Counter, _ stripe: Int, _ by: Int = 1) {
        counters.add64(stripe % 8 * 64 + counter.rawValue * 8, UInt64(bitPattern: Int64(by)))
    }
    func total(_ counter: Counter) -> UInt64 {
        var sum: UInt64 = 0
        for cell in 0..<8 { sum &+= counters.load64(cell * 64 + counter.rawValue * 8) }
        return UInt64(max(0, Int64(bitPattern: sum)))
    }
}
