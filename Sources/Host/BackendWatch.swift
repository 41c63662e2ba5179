import CQuireLayout
import Platform

/// Decides whether a backend is stuck. A guest that wants a claimed page spins until the claim is over, so a backend
/// that stops in the middle of one stops the guest: it must be seen soon, and killed.
///
/// But never for our own fault: when the supervisor itself was not scheduled in time, nobody knows for how long the
/// backend was not either, and all measuring begins again.
public struct BackendWatch: Sendable {
    /// All in nanoseconds of CLOCK_MONOTONIC.
    /// While a claim is open a guest may wait for it, with interrupts off.
    public static let stuckAfter: UInt64 = 500_000_000
    /// Without one nobody is hurt by a pause, but much by a needless kill: QEMU 7.2 gives a device up whose backend dies
    /// in the middle of its start.
    public static let stuckWithoutClaims: UInt64 = 2_000_000_000
    /// Time between two looks; the longer one while all `isCalm`, for waking up is nearly all that a supervisor costs.
    public static let tick: UInt64 = 100_000_000
    public static let calmTick: UInt64 = 400_000_000
    /// A look that comes so much later than it should.
    public static let lateBy: UInt64 = 150_000_000
    /// For a backend that has not beaten yet, unless it has much to read first.
    public static let startTime: UInt64 = 5_000_000_000

    private let startTime: UInt64
    private let started: UInt64
    private var lastTick: UInt64
    /// Nothing from before counts.
    private var floor: UInt64
    private var lastHeartbeat: UInt64 = 0
    private var changed: UInt64

    public init(startedAt now: UInt64, startTime: UInt64 = Self.startTime) {
        self.startTime = startTime
        started = now
        lastTick = now
        floor = now
        changed = now
    }

    /// The last look found a beating heart and no claim. The next one may then come later: what is wrong by that time has
    /// its full time to pass from there on, watched closely.
    public private(set) var isCalm = false

    /// How long from a look to the next one.
    public var nextLook: UInt64 { isCalm ? Self.calmTick : Self.tick }

    public var isReady: Bool { lastHeartbeat > 0 }

    /// One look, a `tick` after the last one; while it `isCalm`, a `calmTick`. `heartbeat`: nil until this backend has taken the
    /// page map over. `claims`: since when the open claims of the journal are open.
    ///
    /// Claims from before this backend's start are its predecessor's: it has to ask QEMU about the guest before it may
    /// release them, and killing it would only make the guest wait longer.
    ///
    /// Returns what is wrong, to be put behind "it", or nil.
    public mutating func check(now: UInt64, heartbeat: UInt64?, claims: [UInt64]) -> String? {
        if now - lastTick > nextLook + Self.lateBy {
            floor = now
            changed = now
        }
        lastTick = now
        let beat = heartbeat ?? 0
        isCalm = beat != lastHeartbeat && claims.isEmpty
        if beat != lastHeartbeat {
            lastHeartbeat = beat
            changed = now
        }
        if beat == 0 {
            let waited = now - max(started, floor)
            return waited >= startTime ? "was not ready after \(waited / 1_000_000) ms" : nil
        }
        if now - changed >= (claims.isEmpty ? Self.stuckWithoutClaims : Self.stuckAfter) { return "stood still for \((now - changed) / 1_000_000) ms" }
        if let oldest = claims.filter({ $0 >= started && $0 <= now }).min(), now - max(oldest, floor) >= Self.stuckAfter {
            return "held a claim for \((now - oldest) / 1_000_000) ms"
        }
        return nil
    }
}

/// How long to wait before a dead backend is started again: not at all, but 100 ms doubling to 5 s when it keeps dying
/// within 5 s of its start.
public struct RestartBackoff: Sendable {
    public static let quickDeath: UInt64 = 5_000_000_000
    private var quickDeaths = 0
    public init() {}

    /// Nanoseconds to wait, after a backend that ran for `lifetime` nanoseconds.
    public mutating func delay(afterLifetime lifetime: UInt64) -> UInt64 {
        guard lifetime < Self.quickDeath else {
            quickDeaths = 0
            return 0
        }
        quickDeaths += 1
        if quickDeaths == 1 { return 0 }
        return min(5_000_000_000, 100_000_000 << UInt64(min(quickDeaths - 2, 10)))
    }
}

/// The page map's memory file, which outlives backends, and the supervisor's look at its journal of claims.
public struct PageMapFile: ~Copyable, Sendable {
    /// Guest-physical space that the map can cover: 4 TiB, at 8 bytes a page. The file is sparse.
    public static let maxPages: UInt64 = 1 << 30
    public static let byteCount = UInt64(QUIRE_PAGE_BYTES) + 8 * maxPages

    public let file: Memfd
    private let header: Mapping

    public init(name: String) throws(QuireError) {
        let memfd = try Memfd(name: name, byteCount: Self.byteCount)
        header = try Mapping(memfd.descriptor, byteCount: Int(QUIRE_PAGE_BYTES), access: .readOnly)
        file = memfd
    }

    private static let heartbeatAt = MemoryLayout<quire_map_header>.offset(of: \.heartbeat)!
    private static let pidAt = MemoryLayout<quire_map_header>.offset(of: \.backend_pid)!

    /// The heartbeat of the backend `pid`: nil until that very process has taken the map over.
    public borrowing func heartbeat(of pid: Int32) -> UInt64? {
        header.load32(Self.pidAt) == UInt32(bitPattern: pid) ? header.load64(Self.heartbeatAt) : nil
    }

    private static let journalAt = MemoryLayout<quire_map_header>.offset(of: \.journal)!
    private static let pageCountAt = MemoryLayout<quire_claim>.offset(of: \.page_count)!
    private static let sinceAt = MemoryLayout<quire_claim>.offset(of: \.since_ns)!

    /// Since when the open claims are open, nanoseconds of CLOCK_MONOTONIC.
    public borrowing func openClaims() -> [UInt64] {
        var open: [UInt64] = []
        for worker in 0..<Int(QUIRE_MAP_WORKERS) {
            let claim = Self.journalAt + worker * MemoryLayout<quire_claim>.stride
            // The time first: if it is an old claim's and a new one was opened since, the second look shows the change.
            let since = header.load64(claim + Self.sinceAt)
            if header.load64(claim + Self.pageCountAt) != 0, header.load64(claim + Self.sinceAt) == since {
                open.append(since)
            }
        }
        return open
    }
}
