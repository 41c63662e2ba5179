import Engines
import GuestMemory
import Logging
import Platform
import Synchronization
import VhostBackend

/// The swap disk: a block device whose blocks are the pages of a private, persistent pool of transcendent memory. A write
/// is a put, a read a get (zeros where there is no page), discard and write-zeroes are flushes.
///
/// What it must guarantee: a page that the guest was told is written is read back, whichever of our processes dies. The
/// store's file outlives this process in the supervisor; a put is durable when it returns, and before that the guest is told
/// nothing; requests that a dead process had taken are run again, and putting the same page twice changes nothing. A put
/// for which there is no room, under the limit or on the host, is an I/O error: Linux then keeps the page in memory.
///
/// And no byte of another life of the guest's: memory and swap belong together. A guest that arrives (`-incoming`,
/// `-loadvm`, `loadvm`) finds no content here that is its own until `quire tmem restore` has brought it; until then every
/// request is an I/O error. Whether it arrives is on the command line of the QEMU that connects, whatever we were told
/// before: who tells may expect a guest that then does not come. And it is in the rings, which a guest that arrives has used
/// before (`DeviceStart.Origin`): that says it of a snapshot that is loaded while QEMU runs, too. What was restored is for the
/// guest that runs with it first, and not for one that arrives after that. While the guest runs, content is neither replaced
/// nor saved, and what is not the guest's is not saved at all.
///
/// The content is replaced as a whole. It is in the pool `swap.N`; a restore fills `swap.N+1`, and the last thing it puts
/// there is a page that no disk has, a mark. So at a start the pool with the highest number that has this mark is the
/// disk (the first one needs none), and every other is what a death has left of a restore. Another mark says that no guest has
/// run with the content yet.
public final class SwapDisk: BlockStorage, DeviceLifecycle, TmemOwner {
    public struct Options: Sendable, Equatable {
        /// Of the disk.
        public var byteCount: UInt64
        public var queueCount = 1
        /// How much is promised for what the store may use of the host's memory: with 2 that is half the disk's size. Nil: no
        /// limit but the disk's size.
        public var overcommit: Double?
        public var compression = Tmem.Compression.lz4
        /// What the host is to have left: below that the guest gets I/O errors. In bytes; 0: nothing.
        public var reserve = HostReserve.usualBytes
        /// The guest comes from somewhere else: see above. What the QEMU that connects says of itself counts more.
        public var awaitsRestore = false
        public init(byteCount: UInt64) { self.byteCount = byteCount }

        /// As `quire-backend --device` takes it. `endpoint`: `fd=N` or `socket=PATH`.
        func device(_ endpoint: String, store: Int32) -> String {
            var text = "swap,\(endpoint),size=\(byteCount)b,tmem-fd=\(store),queues=\(queueCount)"
            if let overcommit { text += ",overcommit=\(overcommit)" }
            if compression != .lz4 { text += ",compression=\(Self.name(of: compression))" }
            if reserve != HostReserve.usualBytes { text += ",reserve=\(reserve)b" }
            if awaitsRestore { text += ",awaits-restore=on" }
            return text
        }

        static func name(of compression: Tmem.Compression) -> String {
            switch compression {
            case .lz4: "lz4"
            case .zstd(let level): "zstd:\(level)"
            }
        }

        var store: Tmem.Configuration {
            // With 1 the disk's own size is the limit: what is promised is kept, however badly pages compress.
            guard let overcommit, overcommit > 1 else { return Tmem.Configuration(compression: compression, reserve: reserve) }
            return Tmem.Configuration(
                compression: compression, cap: UInt64(Double(byteCount) / overcommit), overcommit: overcommit, reserve: reserve)
        }

        /// A new disk must fit into a store, as large as its factor makes it.
        func checkStore() throws(QuireError) {
            guard Double(byteCount) / (overcommit ?? 1) > Double(Tmem.mostBytes) else { return }
            let factor = (byteCount + Tmem.mostBytes - 1) / Tmem.mostBytes
            throw QuireError(
                .invalid, "a swap disk of \(Size.exact(byteCount)) is more than a store of \(Size.exact(Tmem.mostBytes)) is sure to hold: make it smaller, or give an over-commit factor of \(factor)")
        }
    }

    /// The same checks for `quire run` and `quire-backend`.
    public static func checkSize(_ bytes: UInt64?, _ text: String) throws(QuireError) -> UInt64 {
        guard let bytes, bytes % pageBytes == 0, (minBytes...maxBytes).contains(bytes) else {
            throw QuireError(.invalid, "\(text) is no size for a swap disk: give 1M to 8T in whole pages of 4 KiB, such as 4G")
        }
        return bytes
    }
    public static func checkOvercommit(_ factor: Double?, _ text: String) throws(QuireError) -> Double {
        guard let factor, (1...100).contains(factor) else {
            throw QuireError(.invalid, "\(text) is no over-commit factor: give 1 to 100, such as 1.5")
        }
        return factor
    }
    public static func checkReserve(_ bytes: UInt64?, _ text: String) throws(QuireError) -> UInt64 {
        guard let bytes, bytes <= maxBytes else { throw QuireError(.invalid, "\(text) is no reserve: give a size up to 8T, such as 256M, or 0") }
        return bytes
    }
    /// `lz4`, `zstd` or `zstd:LEVEL`.
    public static func compression(_ text: String) throws(QuireError) -> Tmem.Compression {
        if text == "lz4" { return .lz4 }
        if text == "zstd" { return .zstd(level: 3) }
        if text.hasPrefix("zstd:"), let level = Int32(text.dropFirst(5)), (1...19).contains(level) { return .zstd(level: level) }
        throw QuireError(.invalid, "'\(text)' is no compression: choose lz4, zstd or zstd:LEVEL with a level of 1 to 19")
    }
    private static let minBytes: UInt64 = 1 << 20
    private static let maxBytes: UInt64 = 1 << 43

    static let poolPrefix = "swap."
    /// The object that disk pages are in; the index is the page's number.
    static let object: UInt64 = 0
    /// The marks: pages of zeros, which cost nothing.
    static let markObject = UInt64.max
    /// The content was restored, all of it; no guest has run with it since; and a guest from elsewhere has, so that nobody may read it
    /// any more: what a guest does later (sleep, a reset) makes it none from here. Only the second is ever taken away.
    private static let wholeMark: UInt32 = 0, unclaimedMark: UInt32 = 1, foreignMark: UInt32 = 2

    private struct State {
        var pool: TmemPool
        var generation: UInt32
        /// What was restored waits for the guest that it is for.
        var isUnclaimed: Bool
        /// The guest comes from somewhere else, as QEMU's command line says.
        var arrives: Bool
        /// It has come from somewhere else, as its rings say, and found nothing that was for it. Until a restore.
        var isForeign: Bool
        /// Of which the store knows.
        var isMarkedForeign: Bool
        /// The guest uses the device.
        var isRunning = false
        /// How often it was.
        var starts: UInt64 = 0
        /// A save or a restore is going on.
        var isBusy = false
        /// When a page last found no room.
        var failedAt: UInt64?

        /// Pages that are not the guest's.
        var marks: UInt64 { (generation == 1 ? 0 : isUnclaimed ? 2 : 1) + (isMarkedForeign ? 1 : 0) }
    }

    public let byteCount: UInt64
    public let logicalBlockBytes = UInt32(pageBytes)
    public let isReadOnly = false
    public let serial = "quire-swap"

    public let store: Tmem
    private let client: String
    private let logger: Logger
    private let state: Mutex<State>

    private static let failureSaidFor: UInt64 = 60_000_000_000

    /// `store`: of this disk alone. `client`: the VM's name. Throws `.invalid` if the store holds something else than a
    /// disk.
    public init(_ options: Options, store: Tmem, client: String, logger: Logger) throws(QuireError) {
        self.store = store
        self.client = client
        self.logger = logger
        byteCount = options.byteCount
        var current: (pool: TmemPool, generation: UInt32)?
        var others: [TmemPool] = []
        for pool in store.pools {
            guard let generation = Self.generation(of: pool) else {
                throw QuireError(.invalid, "the store has a pool '\(pool.name)': it is no swap disk's")
            }
            let hasMark = try Self.has(Self.wholeMark, pool)
            let isWhole = generation == 1 || hasMark
            if isWhole, generation > current?.generation ?? 0 {
                if let old = current?.pool { others.append(old) }
                current = (pool, generation)
            } else {
                others.append(pool)
            }
        }
        for pool in others { pool.destroy() }
        // A disk that is there is gone on with, whatever its factor has become.
        if current == nil { try options.checkStore() }
        let (pool, generation) = if let current { current } else { (try Self.makePool(1, in: store, client), 1 as UInt32) }
        let isUnclaimed = try Self.has(Self.unclaimedMark, pool), isForeign = try Self.has(Self.foreignMark, pool)
        state = Mutex(
            State(
                pool: pool, generation: generation, isUnclaimed: isUnclaimed, arrives: options.awaitsRestore, isForeign: isForeign,
                isMarkedForeign: isForeign))
        // A disk that has shrunk would have pages beyond its end.
        if try Self.hasPages(pool, from: byteCount / pageBytes) {
            throw QuireError(.invalid, "the store is of a larger swap disk than \(Size.exact(byteCount)): give its size")
        }
    }

    private static func generation(of pool: TmemPool) -> UInt32? {
        guard pool.name.hasPrefix(poolPrefix), pool.attributes.kind == .persistent else { return nil }
        return UInt32(pool.name.dropFirst(poolPrefix.count))
    }

    private static func makePool(_ generation: UInt32, in store: Tmem, _ client: String) throws(QuireError) -> TmemPool {
        // What it promises follows from the disk's size: no page has a number beyond it. For a moment there are two of them.
        try store.createPool(
            TmemPool.Attributes(
                kind: .persistent, scope: .private, name: "\(poolPrefix)\(generation)", client: client.isEmpty ? "vm" : client))
    }

    private static let zeros = [UInt8](repeating: 0, count: TmemPool.pageBytes)

    private static func has(_ mark: UInt32, _ pool: TmemPool) throws(QuireError) -> Bool {
        var page = [UInt8](repeating: 0, count: TmemPool.pageBytes)
        var span = page.mutableSpan
        var bytes = unsafe span.mutableBytes
        return try pool.get(markObject, mark, into: &bytes)
    }

    private static func hasPages(_ pool: TmemPool, from page: UInt64) throws(QuireError) -> Bool {
        struct Found: Error {}
        do {
            try pool.forEachPage { (object: UInt64, index: UInt32) throws(Found) in
                if object == Self.object, UInt64(index) >= page { throw Found() }
            }
            return false
        } catch { return true }
    }

    // MARK: - The device's life

    public func deviceStarted(_ start: DeviceStart) {
        let arrives = start.frontEnd.flatMap { QEMUCommandLine.bringsMemory(process: $0) }
        let awaits = state.withLock { state in
            state.isRunning = true
            state.starts += 1
            if let arrives { state.arrives = arrives }
            if start.origin == .elsewhere, !state.isUnclaimed, !state.isForeign {
                state.isForeign = true
                markForeign(&state)
            }
            if state.isUnclaimed {
                // In this order: a death between the two leaves it to the same guest.
                start.settle()
                state.pool.flush(Self.markObject, Self.unclaimedMark)
                state.isUnclaimed = false
            }
            return isAwaiting(state)
        }
        if awaits {
            logger.error(
                "the guest came from elsewhere (a snapshot, a migration) and its swap disk did not: every request is an I/O error (quire tmem restore, while the guest is paused)")
        }
    }
    /// Without room for the mark, this process is all that knows.
    private func markForeign(_ state: inout State) {
        state.isMarkedForeign = (try? state.pool.put(Self.markObject, Self.foreignMark, unsafe Self.zeros.span.bytes)) != nil
    }

    /// Now and then: what the quota allows and is not used goes back; and what could not be noted in the store is tried again.
    func review() {
        store.reviewQuota()
        state.withLock { if $0.isForeign, !$0.isMarkedForeign { markForeign(&$0) } }
    }

    public func deviceStopping() { state.withLock { $0.isRunning = false } }
    public func loggingChanged(_ enabled: Bool) {}

    private func isAwaiting(_ state: borrowing State) -> Bool { state.isForeign || state.arrives && state.generation == 1 }

    // MARK: - The disk

    private func pool() throws(QuireError) -> TmemPool {
        let (pool, awaits) = state.withLock { ($0.pool, isAwaiting($0)) }
        guard !awaits else { throw QuireError(.busy, "the swap disk waits for its content: quire tmem restore") }
        return pool
    }

    public func read(at offset: UInt64, into buffer: GuestBuffer) throws(QuireError) {
        let pool = try pool()
        let first = UInt32(offset / pageBytes)
        try buffer.fillPieces(of: TmemPool.pageBytes) { (number, page) throws(QuireError) in
            guard try !pool.get(Self.object, first + UInt32(number), into: &page) else { return }
            // The span is of a piece of the buffer, which outlasts this.
            _ = unsafe page.withUnsafeMutableBytes { unsafe $0.initializeMemory(as: UInt8.self, repeating: 0) }
        }
    }

    public func write(at offset: UInt64, from buffer: GuestBuffer) throws(QuireError) {
        let pool = try pool()
        let first = UInt32(offset / pageBytes)
        do throws(QuireError) {
            try buffer.forEachPiece(of: TmemPool.pageBytes) { (number, page) throws(QuireError) in
                try pool.putOnDisk(Self.object, first + UInt32(number), page)
            }
        } catch {
            if error.code == .noSpace { noteFull(error) }
            throw error
        }
    }

    /// What was written is durable already.
    public func flush() throws(QuireError) {}

    public func discard(at offset: UInt64, count: UInt64) throws(QuireError) {
        try pool().flush(Self.object, pages: UInt32(offset / pageBytes)..<UInt32((offset + count) / pageBytes))
    }

    public func writeZeroes(at offset: UInt64, count: UInt64, mayUnmap: Bool) throws(QuireError) {
        try discard(at: offset, count: count)
    }

    private func noteFull(_ error: QuireError) {
        let now = monotonicNanoseconds()
        let isNews = state.withLock { state in
            defer { state.failedAt = now }
            // Another thread may have been here since.
            return state.failedAt.map { now > $0 + Self.failureSaidFor } ?? true
        }
        if isNews { logger.error("the swap disk has no room, the guest gets I/O errors: \(error)") }
    }

    // MARK: - Insight

    /// The pool as people know it; what it has of other lives is not among it.
    public var snapshot: TmemSnapshot {
        var snapshot = TmemSnapshot(of: store)
        let (pool, marks, awaits, failedAt) = state.withLock { ($0.pool, $0.marks, isAwaiting($0), $0.failedAt) }
        var entry = PoolSnapshot(of: pool)
        entry.name = "swap"
        entry.pages -= min(marks, entry.pages)
        entry.capacityPages = byteCount / pageBytes
        snapshot.pools = [entry]
        if awaits {
            snapshot.reason = "the swap disk waits for its content (quire tmem restore)"
        } else if snapshot.reason.isEmpty, let failedAt, monotonicNanoseconds() - failedAt < Self.failureSaidFor {
            snapshot.reason = "the swap disk had no room for a page: raise its limit (quire tmem cap), or swap less"
        }
        return snapshot
    }

    public func pool(named name: String) throws(QuireError) -> TmemPool {
        guard name == "swap" else { throw Self.noPool(name) }
        return state.withLock { $0.pool }
    }
    public func setCap(_ bytes: UInt64?) throws(QuireError) { try store.setCap(bytes) }

    /// Pages that come are compressed like this; so much is left to the host; and with an over-commit factor it has the limit that
    /// follows from that.
    package func tune(_ tuning: Tuning.Swap) throws(QuireError) {
        if let reserve = tuning.reserve, reserve != store.reserve {
            store.setReserve(reserve)
            // What found no room before may find some now.
            state.withLock { $0.failedAt = nil }
        }
        guard let overcommit = tuning.overcommit else { return try store.setCompression(tuning.compression) }
        var options = Options(byteCount: byteCount)
        (options.compression, options.overcommit, options.reserve) = (tuning.compression, overcommit, store.reserve)
        try options.checkStore()
        try store.change(to: options.store)
    }

    // MARK: - Save and restore

    /// Says who may not: `what` is a verb. Returns how often the guest was started by now: one that was started and paused again
    /// meanwhile has used its disk as well.
    private func begin(_ what: String) throws(QuireError) -> UInt64 {
        let (starts, trouble) = state.withLock { state -> (UInt64, String?) in
            if state.isRunning { return (0, "the guest uses its swap disk: pause it first (QMP stop), then \(what)") }
            if state.isBusy { return (0, "the swap disk is being saved or restored: wait for that") }
            state.isBusy = true
            return (state.starts, nil)
        }
        if let trouble { throw QuireError(.busy, trouble) }
        return starts
    }

    private func end() { state.withLock { $0.isBusy = false } }

    /// Writes the disk's content as a save file; returns how many pages it has. Not while the guest uses the disk.
    public func save(to sink: DataSink) throws(QuireError) -> UInt64 {
        let starts = try begin("save")
        defer { end() }
        func checkIsPaused() throws(QuireError) {
            guard state.withLock({ $0.starts }) == starts else {
                throw QuireError(.busy, "the guest was started meanwhile: what was saved is of no use, pause it and save again")
            }
        }
        // A file of what is not the guest's would be taken for the guest's.
        let pool = try pool()
        var writer = try TmemArchiveWriter(to: sink)
        try writer.begin(
            TmemArchive.Pool(isPersistent: true, isShared: false, capacityPages: byteCount / pageBytes, name: "swap", client: client))
        var page = [UInt8](repeating: 0, count: TmemPool.pageBytes)
        try pool.forEachPage { (object: UInt64, index: UInt32) throws(QuireError) in
            guard object == Self.object else { return }
            try checkIsPaused()
            var span = page.mutableSpan
            var bytes = unsafe span.mutableBytes
            guard try pool.get(object, index, into: &bytes) else { return }
            try writer.append(object, index, page)
        }
        let pages = try writer.finish()
        // Between the last page and now it may have been started and written.
        try checkIsPaused()
        return pages
    }

    /// Replaces the disk's content by that of a save file, as a whole or, whatever is wrong with it, not at all; returns how
    /// many pages it has. Not while the guest uses the disk.
    public func restore(from source: DataSource) throws(QuireError) -> UInt64 {
        let starts = try begin("restore")
        defer { end() }
        let (old, generation) = state.withLock { ($0.pool, $0.generation + 1) }
        let new = try Self.makePool(generation, in: store, client)
        do throws(QuireError) {
            let pages = try fill(new, from: source)
            // Beside it the other mark takes no more memory: under the lock nobody is waited for.
            try new.putPatiently(Self.markObject, Self.unclaimedMark, unsafe Self.zeros.span.bytes)
            try state.withLock { state throws(QuireError) in
                guard state.starts == starts else {
                    throw QuireError(.busy, "the guest was started meanwhile: it keeps the content that it had")
                }
                // From here on it is the disk, after a death, too.
                try new.put(Self.markObject, Self.wholeMark, unsafe Self.zeros.span.bytes)
                state.pool = new
                state.generation = generation
                state.isUnclaimed = true
                (state.isForeign, state.isMarkedForeign) = (false, false)
            }
            old.destroy()
            return pages
        } catch {
            new.destroy()
            throw error
        }
    }

    private func fill(_ pool: TmemPool, from source: DataSource) throws(QuireError) -> UInt64 {
        var reader = try TmemArchiveReader(from: source)
        var hasPool = false
        let diskPages = byteCount / pageBytes
        while let item = try reader.next() {
            switch item {
            case .pool(let saved):
                guard !hasPool, saved.isPersistent, !saved.isShared else {
                    throw QuireError(.invalid, "the file is not of a swap disk")
                }
                guard saved.capacityPages == diskPages else {
                    throw QuireError(
                        .invalid, "the file is of a swap disk of \(Size.exact(saved.capacityPages &* pageBytes)), this one has \(Size.exact(byteCount)): they must be of one size")
                }
                hasPool = true
            case .page(let object, let index, let page):
                guard object == Self.object, UInt64(index) < diskPages else {
                    throw QuireError(.invalid, "the file has a page beyond the end of the disk")
                }
                try pool.putPatiently(object, index, unsafe page.span.bytes)
            }
        }
        guard hasPool else { throw QuireError(.invalid, "the file is not of a swap disk: there is no pool in it") }
        return reader.pages
    }
}
