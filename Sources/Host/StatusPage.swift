import CQuireLayout
import Engines
import Glibc
import Platform

/// Why a VM's pages are recycled or not. `enum quire_recycle_state`.
public enum RecycleState: UInt32, Sendable, Codable {
    case noGuest = 0
    case active = 1
    case paused = 2
    case refused = 3

    public init(_ raw: UInt32) { self = RecycleState(rawValue: raw) ?? .noGuest }
}

/// Whether a VM's pages are merged. `enum quire_merge_state`.
public enum MergeState: UInt32, Sendable, Codable {
    case off = 0
    case idle = 1
    case active = 2
    case paused = 3

    public init(_ raw: UInt32) { self = MergeState(rawValue: raw) ?? .off }
}

/// What a status page says of merging.
public struct MergeSnapshot: Sendable, Equatable {
    public var state = MergeState.off
    public var reason = ""
    public var periodMilliseconds: UInt32 = 0
    /// Guest pages that are mapped to a slot, or diverged from one.
    public var sharingPages: UInt64 = 0
    public var zeroPages: UInt64 = 0
    /// Of both: those with a copy of their own.
    public var divergedPages: UInt64 = 0
    public var hashedTotalPages: UInt64 = 0
    public var mergedTotalPages: UInt64 = 0
    public var foldedTotalPages: UInt64 = 0
    /// Pages a second, times 1000.
    public var mergedRateMillipages: UInt64 = 0
    public var foldedRateMillipages: UInt64 = 0
    /// VMAs of QEMU, and above how many nothing is merged.
    public var mappings: UInt64 = 0
    public var mappingLimit: UInt64 = 0
    /// Of the share group.
    public var groupSharedPages: UInt64 = 0
    public var groupSharingPages: UInt64 = 0
    public var groupSavedBytes: UInt64 = 0
    /// Slots that are used 2^i ..< 2^(i+1) times.
    public var groupHistogram = [UInt64](repeating: 0, count: 32)
    public init() {}

    /// The numbers of 64 bits, in the order of the layout, from `sharing_pages` on.
    static var order: [WritableKeyPath<MergeSnapshot, UInt64>] {
        [
            \.sharingPages, \.zeroPages, \.divergedPages, \.hashedTotalPages, \.mergedTotalPages, \.foldedTotalPages,
            \.mergedRateMillipages, \.foldedRateMillipages, \.mappings, \.mappingLimit, \.groupSharedPages,
            \.groupSharingPages, \.groupSavedBytes,
        ]
    }
}

/// A pool of transcendent memory, as a status page has it. `struct quire_status_pool`.
public struct PoolSnapshot: Sendable, Equatable {
    /// Up to 63 bytes.
    public var name = ""
    public var isPersistent = false
    public var isShared = false
    public var pages: UInt64 = 0
    /// 0: no limit.
    public var capacityPages: UInt64 = 0
    /// Its share of what contents take.
    public var storedBytes: UInt64 = 0
    public var puts: UInt64 = 0
    public var putsFailed: UInt64 = 0
    public var hits: UInt64 = 0
    public var misses: UInt64 = 0
    public var flushes: UInt64 = 0
    public var evictions: UInt64 = 0
    public init() {}

    public init(of pool: TmemPool) {
        let statistics = pool.statistics
        name = pool.name
        isPersistent = pool.attributes.kind == .persistent
        isShared = pool.attributes.scope == .shared
        pages = statistics.pages
        capacityPages = pool.attributes.capacityPages ?? 0
        storedBytes = statistics.storedBytes
        puts = statistics.puts
        putsFailed = statistics.putsFailed
        hits = statistics.hits
        misses = statistics.misses
        flushes = statistics.flushes
        evictions = statistics.evictions
    }

    /// The numbers of 64 bits, in the order of the layout, from `pages` on.
    static var order: [WritableKeyPath<PoolSnapshot, UInt64>] {
        [\.pages, \.capacityPages, \.storedBytes, \.puts, \.putsFailed, \.hits, \.misses, \.flushes, \.evictions]
    }
}

/// What a status page says of transcendent memory.
public struct TmemSnapshot: Sendable, Equatable {
    /// There is a store.
    public var isPresent = false
    public var isFrozen = false
    public var usedBytes: UInt64 = 0
    public var metadataBytes: UInt64 = 0
    /// 0: no limit.
    public var capBytes: UInt64 = 0
    /// At most `StatusPage.maxPools` are shown.
    public var pools: [PoolSnapshot] = []
    public var reason = ""
    public init() {}

    /// All but the pools.
    public init(of store: Tmem) {
        let usage = store.usage
        isPresent = true
        isFrozen = store.isFrozen
        usedBytes = usage.usedBytes
        metadataBytes = usage.metadataBytes
        capBytes = store.cap ?? 0
        reason = store.hostShortage ?? ""
    }
}

/// A copy of a status page: `struct quire_status`, by value.
public struct StatusSnapshot: Sendable, Equatable {
    /// Of the backend; 0 while none has ever written the page.
    public var pid: Int32 = 0
    public var heartbeat: UInt64 = 0
    public var ramBytes: UInt64 = 0
    public var residentBytes: UInt64 = 0
    public var recycledNowPages: UInt64 = 0
    public var recycledTotalPages: UInt64 = 0
    /// Pages a second, times 1000.
    public var recycledRateMillipages: UInt64 = 0
    public var cpuNanoseconds: UInt64 = 0
    public var freeMarkedPages: UInt64 = 0
    public var waits: UInt64 = 0
    public var refilledPages: UInt64 = 0
    public var state: RecycleState = .noGuest
    public var periodMilliseconds: UInt32 = 0
    public var mapBytes: UInt64 = 0
    /// CLOCK_MONOTONIC.
    public var updatedNanoseconds: UInt64 = 0
    /// When the backend was started, by the same clock; 0 where it does not say.
    public var startedNanoseconds: UInt64 = 0
    public var restarts: UInt64 = 0
    public var reason = ""
    public var name = ""
    public var merging = MergeSnapshot()
    public var tmem = TmemSnapshot()

    public init() {}
}

/// The page in which a backend tells its supervisor and `quire status` how it is: a file of one page in the VM's folder.
///
/// Each process has the role that is its own: the backend a `Writer`, its supervisor a `Supervisor`, anybody else a
/// `Reader`. Fields are single aligned words, so a reader sees each one whole, though not all of the same instant.
public enum StatusPage {
    public static let byteCount = Int(QUIRE_PAGE_BYTES)
    static let magic = Array(QUIRE_STATUS_MAGIC.utf8)
    static let reasonBytes = 256
    static let nameBytes = 128

    /// The offset of a field in the C struct, which is where the layout stands.
    static func offset<T>(_ field: KeyPath<quire_status, T>) -> Int {
        MemoryLayout<quire_status>.offset(of: field)!
    }

    static let magicAt = offset(\.magic)
    static let versionAt = offset(\.version)
    static let pidAt = offset(\.pid)
    static let heartbeatAt = offset(\.heartbeat)
    static let ramBytesAt = offset(\.ram_bytes)
    static let residentBytesAt = offset(\.resident_bytes)
    static let recycledNowAt = offset(\.recycled_now_pages)
    static let recycledTotalAt = offset(\.recycled_total_pages)
    static let recycledRateAt = offset(\.recycled_rate_millipages)
    static let cpuAt = offset(\.cpu_ns)
    static let freeMarkedAt = offset(\.free_marked_pages)
    static let waitsAt = offset(\.waits)
    static let refilledAt = offset(\.refilled_pages)
    static let stateAt = offset(\.recycle_state)
    static let periodAt = offset(\.period_ms)
    static let mapBytesAt = offset(\.map_bytes)
    static let updatedAt = offset(\.updated_ns)
    static let restartsAt = offset(\.restarts)
    static let reasonAt = offset(\.reason)
    static let nameAt = offset(\.name)
    static let mergeStateAt = offset(\.merge_state)
    static let mergePeriodAt = offset(\.merge_period_ms)
    static let mergeNumbersAt = offset(\.sharing_pages)
    static let histogramAt = offset(\.group_histogram)
    static let mergeReasonAt = offset(\.merge_reason)
    static let tmemFlagsAt = offset(\.tmem_flags)
    static let tmemPoolCountAt = offset(\.tmem_pool_count)
    static let tmemUsedAt = offset(\.tmem_used_bytes)
    static let tmemMetadataAt = offset(\.tmem_metadata_bytes)
    static let tmemCapAt = offset(\.tmem_cap_bytes)
    static let tmemPoolsAt = offset(\.tmem_pools)
    static let tmemReasonAt = offset(\.tmem_reason)
    static let startedAt = offset(\.started_ns)
    public static let maxPools = Int(QUIRE_STATUS_POOLS)
    static let poolNameBytes = 64
    static let poolFlagsAt = MemoryLayout<quire_status_pool>.offset(of: \.flags)!
    static let poolNumbersAt = MemoryLayout<quire_status_pool>.offset(of: \.pages)!

    static func snapshot(_ page: borrowing Mapping) -> StatusSnapshot {
        var s = StatusSnapshot()
        s.pid = Int32(truncatingIfNeeded: page.load32(pidAt))
        s.heartbeat = page.load64(heartbeatAt)
        s.ramBytes = page.load64(ramBytesAt)
        s.residentBytes = page.load64(residentBytesAt)
        s.recycledNowPages = page.load64(recycledNowAt)
        s.recycledTotalPages = page.load64(recycledTotalAt)
        s.recycledRateMillipages = page.load64(recycledRateAt)
        s.cpuNanoseconds = page.load64(cpuAt)
        s.freeMarkedPages = page.load64(freeMarkedAt)
        s.waits = page.load64(waitsAt)
        s.refilledPages = page.load64(refilledAt)
        s.state = RecycleState(page.load32(stateAt))
        s.periodMilliseconds = page.load32(periodAt)
        s.mapBytes = page.load64(mapBytesAt)
        s.updatedNanoseconds = page.load64(updatedAt)
        s.startedNanoseconds = page.load64(startedAt)
        s.restarts = page.load64(restartsAt)
        s.reason = page.loadText(reasonAt, capacity: reasonBytes)
        s.name = page.loadText(nameAt, capacity: nameBytes)
        s.merging.state = MergeState(page.load32(mergeStateAt))
        s.merging.periodMilliseconds = page.load32(mergePeriodAt)
        for (index, field) in MergeSnapshot.order.enumerated() {
            s.merging[keyPath: field] = page.load64(mergeNumbersAt + 8 * index)
        }
        for index in s.merging.groupHistogram.indices {
            s.merging.groupHistogram[index] = page.load64(histogramAt + 8 * index)
        }
        s.merging.reason = page.loadText(mergeReasonAt, capacity: reasonBytes)
        let flags = page.load32(tmemFlagsAt)
        s.tmem.isPresent = flags & 1 != 0
        s.tmem.isFrozen = flags & 2 != 0
        s.tmem.usedBytes = page.load64(tmemUsedAt)
        s.tmem.metadataBytes = page.load64(tmemMetadataAt)
        s.tmem.capBytes = page.load64(tmemCapAt)
        s.tmem.reason = page.loadText(tmemReasonAt, capacity: reasonBytes)
        for index in 0..<min(maxPools, Int(page.load32(tmemPoolCountAt))) {
            let at = tmemPoolsAt + index * MemoryLayout<quire_status_pool>.stride
            var pool = PoolSnapshot()
            pool.name = page.loadText(at, capacity: poolNameBytes)
            let flags = page.load32(at + poolFlagsAt)
            pool.isPersistent = flags & 1 != 0
            pool.isShared = flags & 2 != 0
            for (number, field) in PoolSnapshot.order.enumerated() {
                pool[keyPath: field] = page.load64(at + poolNumbersAt + 8 * number)
            }
            s.tmem.pools.append(pool)
        }
        return s
    }

    /// Opens a page of the full size, created if it is missing, with what it holds left as it is.
    static func map(_ path: String) throws(QuireError) -> Mapping {
        let file = try Descriptor.open(path, O_RDWR | O_CREAT | O_NOFOLLOW)
        return try map(file)
    }

    static func map(_ file: borrowing Descriptor) throws(QuireError) -> Mapping {
        if try file.status().byteCount != UInt64(byteCount) { try file.truncate(to: UInt64(byteCount)) }
        return try Mapping(file, byteCount: byteCount)
    }

    static func isValid(_ page: borrowing Mapping) -> Bool { page.copyOut(magicAt, count: magic.count) == magic }

    /// The backend's role: it writes everything but `restarts`.
    public struct Writer: ~Copyable, Sendable {
        private let page: Mapping

        /// Takes the page over: all fields zero, then name, pid and start of this process, then magic and version. What the
        /// supervisor has written stays. The heartbeat starts at 0: `beat()` says that the backend is ready.
        public init(path: String, name: String, pid: Int32) throws(QuireError) {
            self.init(taking: try StatusPage.map(path), name: name, pid: pid)
        }

        public init(_ file: borrowing Descriptor, name: String, pid: Int32) throws(QuireError) {
            self.init(taking: try StatusPage.map(file), name: name, pid: pid)
        }

        private init(taking mapping: consuming Mapping, name: String, pid: Int32) {
            page = mapping
            let restarts = StatusPage.isValid(page) ? page.load64(restartsAt) : 0
            // The pid goes first and comes last: a reader never takes numbers of the old backend for the new one's.
            page.store32(pidAt, 0)
            page.store64(heartbeatAt, 0)
            page.copyIn(ramBytesAt, [UInt8](repeating: 0, count: restartsAt - ramBytesAt))
            page.store64(restartsAt, restarts)
            page.storeText(reasonAt, capacity: reasonBytes, "")
            setMerging(MergeSnapshot())
            setTmem(TmemSnapshot())
            page.storeText(nameAt, capacity: nameBytes, name)
            page.store64(startedAt, ProcessCalls.startTime(of: pid) ?? 0)
            page.store32(versionAt, UInt32(QUIRE_STATUS_VERSION))
            page.copyIn(magicAt, magic)
            page.store32(pidAt, UInt32(bitPattern: pid))
        }

        /// Counts the heartbeat up.
        public borrowing func beat() { page.add64(heartbeatAt, 1) }
        public borrowing func setRAM(bytes: UInt64, resident: UInt64) {
            page.store64(ramBytesAt, bytes)
            page.store64(residentBytesAt, resident)
        }
        public borrowing func setRecycled(now: UInt64, total: UInt64, rateMillipages: UInt64) {
            page.store64(recycledNowAt, now)
            page.store64(recycledTotalAt, total)
            page.store64(recycledRateAt, rateMillipages)
        }
        public borrowing func setGuest(freeMarkedPages: UInt64, waits: UInt64, refilledPages: UInt64) {
            page.store64(freeMarkedAt, freeMarkedPages)
            page.store64(waitsAt, waits)
            page.store64(refilledAt, refilledPages)
        }
        /// `reason` is one line for a person: why nothing is recycled.
        public borrowing func setState(_ state: RecycleState, reason: String) {
            page.storeText(reasonAt, capacity: reasonBytes, reason)
            page.store32(stateAt, state.rawValue)
        }
        public borrowing func setPeriod(milliseconds: UInt32) { page.store32(periodAt, milliseconds) }
        public borrowing func setCosts(cpuNanoseconds: UInt64, mapBytes: UInt64) {
            page.store64(cpuAt, cpuNanoseconds)
            page.store64(mapBytesAt, mapBytes)
        }
        public borrowing func setMerging(_ merging: MergeSnapshot) {
            page.storeText(mergeReasonAt, capacity: reasonBytes, merging.reason)
            page.store32(mergePeriodAt, merging.periodMilliseconds)
            for (index, field) in MergeSnapshot.order.enumerated() {
                page.store64(mergeNumbersAt + 8 * index, merging[keyPath: field])
            }
            for (index, value) in merging.groupHistogram.enumerated() { page.store64(histogramAt + 8 * index, value) }
            page.store32(mergeStateAt, merging.state.rawValue)
        }
        public borrowing func setTmem(_ tmem: TmemSnapshot) {
            let pools = tmem.pools.prefix(maxPools)
            for (index, pool) in pools.enumerated() {
                let at = tmemPoolsAt + index * MemoryLayout<quire_status_pool>.stride
                page.storeText(at, capacity: poolNameBytes, pool.name)
                page.store32(at + poolFlagsAt, (pool.isPersistent ? 1 : 0) | (pool.isShared ? 2 : 0))
                for (number, field) in PoolSnapshot.order.enumerated() {
                    page.store64(at + poolNumbersAt + 8 * number, pool[keyPath: field])
                }
            }
            page.store64(tmemUsedAt, tmem.usedBytes)
            page.store64(tmemMetadataAt, tmem.metadataBytes)
            page.store64(tmemCapAt, tmem.capBytes)
            page.storeText(tmemReasonAt, capacity: reasonBytes, tmem.reason)
            page.store32(tmemPoolCountAt, UInt32(pools.count))
            page.store32(tmemFlagsAt, (tmem.isPresent ? 1 : 0) | (tmem.isFrozen ? 2 : 0))
        }
        public borrowing func setUpdated(nanoseconds: UInt64) { page.store64(updatedAt, nanoseconds) }
    }

    /// The supervisor's role: it reads, and counts the restarts. The page need not have been written yet.
    public struct Supervisor: ~Copyable, Sendable {
        private let page: Mapping

        public init(path: String) throws(QuireError) { page = try StatusPage.map(path) }

        public borrowing func countRestart() { page.add64(restartsAt, 1) }
        public var restarts: UInt64 { page.load64(restartsAt) }
    }

    private static func open(_ path: String) throws(QuireError) -> Descriptor {
        // Not to wait for what is no file.
        let file = try Descriptor.open(path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK)
        let status = try file.status()
        // Beyond the end of a file its mapping raises SIGBUS.
        guard status.isRegularFile, status.byteCount >= UInt64(byteCount) else {
            throw QuireError(.invalid, "\(path) is no status page: it has less than \(byteCount) bytes")
        }
        return file
    }

    /// That it is a page of this version which a backend has written.
    private static func check(_ page: borrowing Mapping, _ path: String) throws(QuireError) {
        let found = page.copyOut(magicAt, count: magic.count)
        if found.allSatisfy({ $0 == 0 }) {
            throw QuireError(.closed, "\(path): no backend has written its status yet")
        }
        guard found == magic else { throw QuireError(.invalid, "\(path) is no status page: wrong magic") }
        let version = page.load32(versionAt)
        guard version == UInt32(QUIRE_STATUS_VERSION) else {
            throw QuireError(
                .unsupported,
                "\(path) has version \(version), this quire reads version \(QUIRE_STATUS_VERSION): use the quire that started the VM")
        }
    }

    /// Anybody's role.
    public struct Reader: ~Copyable, Sendable {
        private let page: Mapping

        /// Throws `.invalid` if the file is no status page, `.unsupported` if it is one of another version, `.closed`
        /// if no backend has written it yet.
        public init(path: String) throws(QuireError) {
            let mapped = try Mapping(StatusPage.open(path), byteCount: byteCount, access: .readOnly)
            try check(mapped, path)
            page = mapped
        }

        public borrowing func snapshot() -> StatusSnapshot { StatusPage.snapshot(page) }
    }

    /// Anybody's role, for pages of other users, who can cut their file off at any time, which would end whoever has it
    /// mapped: a page is copied first. Any number of them, one after the other.
    struct Copier: ~Copyable {
        private let page: Mapping

        init() throws(QuireError) { page = try Mapping(anonymousByteCount: byteCount) }

        /// Throws as `Reader.init` does.
        borrowing func snapshot(_ path: String) throws(QuireError) -> StatusSnapshot {
            let file = try StatusPage.open(path)
            guard page.read(file.raw, at: 0, to: 0, count: byteCount) == byteCount else {
                throw QuireError(.invalid, "\(path) is no status page: it has less than \(byteCount) bytes")
            }
            try check(page, path)
            return StatusPage.snapshot(page)
        }
    }
}
