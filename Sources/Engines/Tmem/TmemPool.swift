import CCompress
import Platform

/// A pool of pages that the host keeps for guests. A key is the pool, a 64-bit object and a 32-bit index; a value is one
/// page of 4096 bytes, copied in and out. Thread-safe.
///
/// The object keeps its store alive. After `destroy` every operation finds nothing and every put fails.
public final class TmemPool: Sendable {
    public enum Kind: UInt8, Sendable, CaseIterable {
        /// The host may drop any page at any time: a get may find nothing.
        case ephemeral
        /// Whoever put a page finds it until he flushes it, through the death of any process of ours.
        case persistent
    }

    public enum Scope: UInt8, Sendable, CaseIterable {
        /// One client. A get of an ephemeral page takes it away: it is the client's again.
        case `private`
        /// Several clients. A get of an ephemeral page leaves it, as the most recently used.
        case shared
    }

    public struct Attributes: Sendable, Equatable {
        public var kind: Kind
        public var scope: Scope
        /// What it is found by: 1 to 63 bytes of UTF-8, unique in its store.
        public var name: String
        /// Whose memory it is, 1 to 63 bytes of UTF-8: a VM or a group. Weights and caps count by client.
        public var client: String
        /// Persistent pools: the promise. So many pages can be put; nil: as many as there is room for.
        public var capacityPages: UInt64?
        public init(kind: Kind, scope: Scope, name: String, client: String, capacityPages: UInt64? = nil) {
            self.kind = kind
            self.scope = scope
            self.name = name
            self.client = client
            self.capacityPages = capacityPages
        }
    }

    /// Counters since the pool was created or, but for `pages`, `storedBytes` and `sameFilled`, found again by a start.
    public struct Statistics: Sendable, Equatable {
        /// Keys that have a page.
        public var pages: UInt64 = 0
        /// The pool's share of the bytes that contents take: of a content that several keys name, each pays its part.
        public var storedBytes: UInt64 = 0
        /// Keys whose page is one word repeated: they store nothing.
        public var sameFilled: UInt64 = 0
        public var puts: UInt64 = 0
        public var putsFailed: UInt64 = 0
        /// Puts whose content was there already.
        public var putsShared: UInt64 = 0
        public var gets: UInt64 = 0
        public var hits: UInt64 = 0
        public var misses: UInt64 { gets - hits }
        /// Pages that flushes took away.
        public var flushes: UInt64 = 0
        /// Pages that the host took away.
        public var evictions: UInt64 = 0
        public init() {}
    }

    /// Bytes of a page.
    public static let pageBytes = 4096
    /// Indices are below this.
    public static let indexLimit = UInt32.max

    let store: TmemStore
    let record: PoolRecord

    init(_ store: TmemStore, _ record: PoolRecord) {
        self.store = store
        self.record = record
    }

    public var attributes: Attributes { record.attributes }
    public var name: String { record.attributes.name }

    private static func check(_ index: UInt32, _ byteCount: Int) throws(QuireError) {
        guard index < indexLimit else { throw QuireError(.invalid, "index \(index) is beyond the last one, \(indexLimit - 1)") }
        guard byteCount == pageBytes else { throw QuireError(.invalid, "a page has \(pageBytes) bytes, not \(byteCount)") }
    }

    /// Puts a page of 4096 bytes. A page that the key had is replaced, for a crash too: old or new, whole. When this
    /// returns, a persistent page outlives this process.
    /// Throws `.noSpace` when there is no room and `.closed` when the pool was destroyed: the key has no page then, not even
    /// the old one. Throws `.invalid` for what is no key or no page; `.retry` when it is not known yet whether there is room
    /// (`TmemQuota`): nothing was done.
    public func put(_ object: UInt64, _ index: UInt32, _ page: RawSpan) throws(QuireError) {
        try Self.check(index, page.byteCount)
        try store.put(record, object, index, page)
    }

    /// As `put`, by somebody with time: waits until it is known whether there is room.
    public func putPatiently(_ object: UInt64, _ index: UInt32, _ page: RawSpan) throws(QuireError) {
        while true {
            do throws(QuireError) { return try put(object, index, page) } catch { if error.code != .retry { throw error } }
        }
    }

    /// As `put`, for a disk, where a page that is not there reads as zeros: zeros always have room.
    public func putOnDisk(_ object: UInt64, _ index: UInt32, _ page: RawSpan) throws(QuireError) {
        do throws(QuireError) { try put(object, index, page) } catch {
            // Nothing of the old page is left where a put has failed.
            guard error.code == .noSpace, Self.isZeros(page) else { throw error }
        }
    }

    private static func isZeros(_ page: RawSpan) -> Bool {
        var word: UInt64 = 1
        // The pointer is used within the call; a page has the length that is looked at.
        return unsafe page.withUnsafeBytes { unsafe cc_same_filled($0.baseAddress!, &word) } && word == 0
    }

    /// Copies the page of a key to `page`, of 4096 bytes; false and `page` unchanged when there is none.
    public func get(_ object: UInt64, _ index: UInt32, into page: inout MutableRawSpan) throws(QuireError) -> Bool {
        try Self.check(index, page.byteCount)
        // The pointer is used within the call.
        return try unsafe page.withUnsafeMutableBytes { (bytes) throws(QuireError) -> Bool in
            try unsafe store.get(record, object, index, bytes.baseAddress!)
        }
    }

    /// True if there was a page.
    @discardableResult public func flush(_ object: UInt64, _ index: UInt32) -> Bool { store.flush(record, object, index) }
    /// Flushes a range of an object's pages; how many there were. However long the range is, it costs no more than a look at
    /// all leaves of the store.
    @discardableResult public func flush(_ object: UInt64, pages: Range<UInt32>) -> Int {
        store.flush(record, object, pages: pages)
    }
    /// Flushes all pages of an object; how many there were. Looks at all leaves of the store: 16 bytes to 16 pages.
    @discardableResult public func flush(object: UInt64) -> Int { store.flush(record, object: object) }
    /// Flushes everything; how many pages there were.
    @discardableResult public func flushAll() -> Int { store.flush(record, object: nil) }

    /// Ends the pool: nothing of it is left when this returns, whoever puts meanwhile.
    public func destroy() { store.destroy(record) }

    public var statistics: Statistics {
        var statistics = Statistics()
        statistics.pages = UInt64(max(0, record.pages.load(ordering: .relaxed)))
        if record.isLive.load(ordering: .relaxed) { statistics.storedBytes = UInt64(store.contents.charged(record.number)) }
        statistics.sameFilled = record.total(.sameFilled)
        statistics.puts = record.total(.puts)
        statistics.putsFailed = record.total(.putsFailed)
        statistics.putsShared = record.total(.putsShared)
        // Read in this order, there are no more hits than gets.
        statistics.hits = record.total(.hits)
        statistics.gets = record.total(.gets)
        statistics.flushes = record.total(.flushes)
        statistics.evictions = record.total(.evictions)
        return statistics
    }

    /// Calls `body` with each key that has a page, in order of object and index. What is put or flushed meanwhile may be
    /// among them or not. Expensive: sorts the pool's leaves, one to 16 neighbouring pages.
    public func forEachPage<E: Error>(_ body: (_ object: UInt64, _ index: UInt32) throws(E) -> Void) throws(E) {
        let leaves = store.leaves
        var found = leaves.leaves(of: record.number, object: nil).map { (key: leaves.key($0), leaf: $0) }
        found.sort { ($0.key.object, $0.key.base) < ($1.key.object, $1.key.base) }
        for (key, leaf) in found {
            // Another pool's by now, or an object's that comes later.
            guard key.pool == record.number, leaves.key(leaf) == key, record.isLive.load(ordering: .relaxed) else { continue }
            for slot in 0..<Leaves.pages where leaves.content(leaf, slot) != 0 {
                try body(key.object, key.base * UInt32(Leaves.pages) + UInt32(slot))
            }
        }
    }

    /// The client's weight, from 1; 100 unless set. Memory of ephemeral pages is taken from the client who has most of it
    /// by weight. It is the client's: all its pools have the same.
    public var weight: UInt32 { record.client.weight.load(ordering: .relaxed) }
    public func setWeight(_ weight: UInt32) throws(QuireError) { try store.setWeight(record.client, weight) }

    /// What the client may use at most, in bytes of `storedBytes` over all its pools; nil: no limit.
    public var cap: UInt64? {
        let cap = record.client.cap.load(ordering: .relaxed)
        return cap == .max ? nil : UInt64(cap)
    }
    /// Evicts the client's ephemeral pages as far as needed. Throws `.busy`, and changes nothing, when its persistent pages
    /// alone use more.
    public func setCap(_ bytes: UInt64?) throws(QuireError) { try store.setCap(record.client, bytes) }
}
