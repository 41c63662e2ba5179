import Platform
import Synchronization

/// A store of transcendent memory: pools of pages in one sparse memory file. Thread-safe.
public final class Tmem: Sendable {
    public enum Compression: Sendable, Equatable {
        case lz4
        /// Levels as zstd's own: 1 to 19.
        case zstd(level: Int32)
    }

    public struct Configuration: Sendable, Equatable {
        public var compression = Compression.lz4
        /// What the store may use of the host's memory at most, in bytes; nil: no limit.
        public var cap: UInt64?
        /// What persistent pools may be promised together, in multiples of the cap. With 1 every promise can be kept even
        /// if no page can be compressed.
        public var overcommit = 1.0
        /// What is left to the host, in bytes: while it has less than that available, free swap included, no memory is taken of it.
        /// 0: whatever there is may be taken.
        public var reserve: UInt64
        public init(compression: Compression = .lz4, cap: UInt64? = nil, overcommit: Double = 1, reserve: UInt64 = 0) {
            self.compression = compression
            self.cap = cap
            self.overcommit = overcommit
            self.reserve = reserve
        }
    }

    let store: TmemStore
    /// By number, in step with the store's.
    private let faces: Mutex<[UInt16: TmemPool]>

    /// What a store can hold, in bytes of pages that are all different and cannot be compressed; a little less than its file has
    /// room for, since slabs are of classes and numbers are handed out by the dozen.
    public static let mostBytes: UInt64 = 1023 << 30

    /// A new store's file: a sparse memfd. Whoever must outlive us keeps a duplicate of it (parks it).
    public static func makeFile(name: String) throws(QuireError) -> Descriptor { try TmemFile.make(name: name) }

    /// Opens a store: a new file, or one that an earlier process left at any instant, killed or not. Everything that was put
    /// into it is found again, settings of pools and clients included, and a cap or a freeze that was set by hand: that counts over
    /// the configuration. Only one process may have it open: `.busy`
    /// otherwise (which a process that was killed isn't any more). Takes 100 ns or so for each page that is there.
    /// Throws `.invalid` when the file is none of ours, of another version, or damaged. `quota`: who says how much the store may use
    /// of what all stores may; nil: nobody does. Its owner calls `reviewQuota` now and then.
    public convenience init(
        _ file: consuming Descriptor, _ configuration: Configuration = .init(), quota: (any TmemQuota)? = nil
    ) throws(QuireError) {
        try self.init(file, configuration, quota: quota, seams: TmemSeams())
    }

    package init(
        _ file: consuming Descriptor, _ configuration: Configuration = .init(), quota: (any TmemQuota)? = nil, seams: TmemSeams
    ) throws(QuireError) {
        let store = try TmemStore(TmemFile(file), configuration, quota, seams)
        self.store = store
        faces = Mutex(Dictionary(uniqueKeysWithValues: store.pools.map { ($0.number, TmemPool(store, $0)) }))
    }

    /// Throws `.invalid` (names), `.busy` (a pool of that name is there), `.noSpace` (the promise cannot be kept, the pool
    /// table is full).
    public func createPool(_ attributes: TmemPool.Attributes) throws(QuireError) -> TmemPool {
        let pool = TmemPool(store, try store.createPool(attributes))
        faces.withLock { $0[pool.record.number] = pool }
        return pool
    }

    /// Those that were not destroyed, by name.
    public var pools: [TmemPool] {
        faces.withLock { faces in
            faces = faces.filter { $0.value.record.isLive.load(ordering: .relaxed) }
            return faces.values.sorted { $0.name < $1.name }
        }
    }
    public func pool(named name: String) -> TmemPool? { pools.first { $0.name == name } }

    /// Refuses new pages in ephemeral pools: puts throw `.noSpace`. What is there stays. Holds until `thaw`, whatever process has the
    /// store open.
    public func freeze() { store.isFrozen = true }
    public func thaw() { store.isFrozen = false }
    public var isFrozen: Bool { store.isFrozen }

    /// Gives memory back to the host by evicting ephemeral pages, the least recently used of the client who has most by
    /// weight first: `bytes` of it, or all there is. Returns by how much the store has shrunk.
    @discardableResult public func evict(bytes: UInt64) -> UInt64 { UInt64(store.evict(Int(clamping: bytes))) }

    /// Packs contents as well as can be and gives the host what that frees. Puts and flushes do as much as is needed to keep
    /// waste small; this is for an owner with time, after a lot was flushed. Milliseconds for each GiB.
    public func compact() {
        _ = store.compactAll()
        store.slabs.chillAll()
    }

    /// For tests: bytes of all contents' units, which is what all pools together are charged.
    package var unitBytes: Int { store.contents.unitBytes() }

    public var usage: TmemUsage {
        var usage = TmemUsage()
        let pools = store.pools
        let contents = store.contents.figures
        let slabs = store.slabs.bytes.slabs + store.slabs.warmBytes
        usage.metadataBytes = UInt64(max(0, store.budget.metadataBytes))
        usage.usedBytes = UInt64(max(0, store.budget.used))
        usage.contentBytes = UInt64(contents.bytes)
        usage.wasteBytes = UInt64(max(0, slabs - contents.bytes))
        usage.contents = UInt64(contents.contents)
        for pool in pools {
            let pages = UInt64(max(0, pool.pages.load(ordering: .relaxed)))
            usage.pages += pages
            if pool.isEphemeral { usage.ephemeralPages += pages }
            usage.sameFilledPages += pool.total(.sameFilled)
        }
        usage.promisedPages = UInt64(store.promised())
        return usage
    }

    /// Bytes of host memory; nil: no limit.
    public var cap: UInt64? { store.budget.cap == .max ? nil : UInt64(store.budget.cap) }
    /// Evicts ephemeral pages as far as needed. Holds, over what a configuration says, until it is set again or `change` has another
    /// one, also in processes that open the store later. Throws `.busy`, and changes nothing, when persistent pages use more, or when
    /// promises would not be covered.
    public func setCap(_ bytes: UInt64?) throws(QuireError) { try store.setCap(bytes) }

    /// As another configuration has it: the cap and what may be promised of it, as `setCap` does; how pages are compressed that come
    /// from now on; the reserve. Throws as `setCap` and `setCompression` do, and changes nothing then.
    public func change(to configuration: Configuration) throws(QuireError) {
        let method = try Contents.method(of: configuration.compression)
        try store.setCap(configuration.cap, overcommit: configuration.overcommit)
        store.contents.setMethod(method)
        store.setReserve(configuration.reserve)
    }
    /// Of pages that come from now on.
    public func setCompression(_ compression: Compression) throws(QuireError) { store.contents.setMethod(try Contents.method(of: compression)) }

    /// What is left to the host, in bytes.
    public var reserve: UInt64 { store.budget.reserve }
    public func setReserve(_ bytes: UInt64) { store.setReserve(bytes) }
    /// Gives back what the quota allows and is not used, and tells what is used to who has forgotten it. Waits for the quota's answer.
    public func reviewQuota() { store.budget.reviewQuota() }
    /// Why puts of the last minute found no room, where it was the host that had none: one line. What is to be done is no matter of
    /// this store then.
    public var hostShortage: String? { store.recentHostShortage }
}

/// What a store uses. Bytes, where a name doesn't say otherwise.
public struct TmemUsage: Sendable, Equatable {
    /// Host memory of the store: what its file has allocated and the tables beside it.
    public var usedBytes: UInt64 = 0
    /// Of that, what is not contents of pages: leaves, content entries, hash tables, lists.
    public var metadataBytes: UInt64 = 0
    /// Of `usedBytes`, memory of slabs that holds no content.
    public var wasteBytes: UInt64 = 0
    /// Contents as they are stored, compressed.
    public var contentBytes: UInt64 = 0
    /// Keys that have a page.
    public var pages: UInt64 = 0
    /// Keys of ephemeral pools that have one.
    public var ephemeralPages: UInt64 = 0
    /// Different contents stored, without same-filled ones.
    public var contents: UInt64 = 0
    /// Keys whose page is one word repeated.
    public var sameFilledPages: UInt64 = 0
    /// Pages promised to persistent pools.
    public var promisedPages: UInt64 = 0
    public init() {}
    /// Apparent over used size; nil for an empty store.
    public var ratio: Double? { usedBytes == 0 ? nil : Double(pages * 4096) / Double(usedBytes) }
}
