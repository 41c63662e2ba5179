import CBench
import Engines
import Glibc
import GuestMemory
import Host
import Logging
import Platform
import StoreProtocol

/// The page store of a benchmark: quired, started in a folder of its own.
final class Store {
    private var child: ChildProcess
    private let folder: String
    var path: String { folder + "/store.sock" }
    var pid: Int32 { child.pid }

    init(_ programs: Programs, limit: String? = nil) throws {
        folder = programs.runtime + "/store-\(monotonicNanoseconds())"
        var options = ChildProcess.Options()
        options.parentDeathSignal = SIGKILL
        child = try ChildProcess(
            [programs.quired, "--directory", folder, "--log-level", "warning"] + (limit.map { ["--limit", $0] } ?? []), options)
        let deadline = monotonicNanoseconds() + 20_000_000_000
        while Files.identity(of: path) == nil {
            guard child.poll() == nil, monotonicNanoseconds() < deadline else { throw QuireError(.system, "quired does not start") }
            ProcessCalls.sleep(milliseconds: 5)
        }
    }

    deinit {
        child.signal(SIGTERM)
        child.wait()
        Files.remove(path)
        Files.removeDirectory(folder)
    }

    var figures: StoreFigures { get throws { try StoreClient.figures(path: path) } }
}

extension AgentLink {
    /// Returns when the agent is attached and nothing is in its way.
    func attach(_ memory: GuestMemory) throws {
        setMemory(memory)
        let deadline = monotonicNanoseconds() + 20_000_000_000
        guard waitUntilAttached(deadline) else { throw QuireError(.system, "the agent does not attach: \(status.trouble)") }
        while let obstacle {
            guard monotonicNanoseconds() < deadline else { throw QuireError(.busy, "the agent can do nothing: \(obstacle)") }
            usleep(1000)
        }
    }
}

/// Everything of ours that merges, at work on the RAM of a stand-in: the engine and its links in this process, as they
/// are in a backend, quired, and the agent in the stand-in.
final class MergeRig {
    let standIn: StandIn
    let store: Store
    let engine: DedupEngine
    let map: PageMap
    private let link: AgentLink
    private let storeLink: StoreLink
    private let memory: GuestMemory

    private final class Who: Sendable {
        let pid: Int32
        init(_ pid: Int32) { self.pid = pid }
    }

    init(_ pageCount: Int, periodMilliseconds: UInt32 = 200, tracksWrites: Bool = true, limit: String? = nil, _ programs: Programs) throws {
        store = try Store(programs, limit: limit)
        let socket = programs.runtime + "/agent-\(monotonicNanoseconds())"
        map = try PageMap(PageMap.makeFile(pageCount: UInt64(pageCount)))
        map.takeOver(pid: getpid())
        let pages = MergedPages(map: map)
        var logger = Logger(label: "bench") { StreamLogHandler.standardError(label: $0) }
        logger.logLevel = .warning
        standIn = try StandIn(pageCount, agent: socket, programs)
        let pid = standIn.pid
        link = try AgentLink(path: socket, pages: pages, logger: logger) { AgentLink.Peer(pid: pid, uid: geteuid()) }
        memory = try GuestMemory(
            [
                MemoryRegion(
                    guestAddress: 0, byteCount: UInt64(pageCount) * pageBytes, userAddress: standIn.address, fileOffset: 0,
                    descriptor: standIn.file!.duplicate(), owner: .us)
            ], log: DirtyTracker(), pages: pages)
        storeLink = StoreLink(path: store.path, name: "bench", group: "", map: map, link: link, logger: logger)
        engine = try DedupEngine(
            DedupEngine.Configuration(periodMilliseconds: periodMilliseconds, tracksWrites: tracksWrites), pages: pages,
            merger: link, store: storeLink)
        try link.attach(memory)
    }

    deinit {
        engine.end()
        link.end()
    }

    /// The engine begins, as when a guest starts.
    func begin() { engine.setMemory(memory) }
    /// It leaves everything as it is.
    func pause(_ isPaused: Bool) { engine.setPaused(.unsupervised, isPaused) }

    /// CPU time of every process of ours, in nanoseconds: this one without the calling thread, which only waits; quired;
    /// and the stand-in, where nobody but the agent works meanwhile.
    struct CPU {
        var backend = 0.0, store = 0.0, agent = 0.0
        var all: Double { backend + store + agent }
        static func - (a: CPU, b: CPU) -> CPU {
            CPU(backend: a.backend - b.backend, store: a.store - b.store, agent: a.agent - b.agent)
        }
    }
    var cpu: CPU {
        CPU(
            backend: Double(processCPUNanoseconds()) - Double(threadCPUNanoseconds()),
            store: Double(cpuNanoseconds(of: store.pid)), agent: Double(cpuNanoseconds(of: standIn.pid)))
    }

    struct Work {
        let cpu: CPU
        let wall: Double
        let statistics: DedupEngine.Statistics
    }

    /// Waits for `isDone`; what that took.
    func work(seconds: Int = 300, until isDone: (DedupEngine.Statistics) -> Bool) throws -> Work {
        let before = cpu, wall = monotonicNanoseconds()
        return try work(since: before, wall, seconds: seconds, until: isDone)
    }
    func work(
        since before: CPU, _ wall: UInt64, seconds: Int = 300, until isDone: (DedupEngine.Statistics) -> Bool
    ) throws -> Work {
        let deadline = monotonicNanoseconds() + UInt64(seconds) * 1_000_000_000
        while true {
            let statistics = engine.snapshot
            if isDone(statistics) {
                return Work(cpu: cpu - before, wall: Double(monotonicNanoseconds() - wall), statistics: statistics)
            }
            guard monotonicNanoseconds() < deadline else {
                throw QuireError(.busy, "the engine is not done after \(seconds) s: \(statistics)")
            }
            usleep(2000)
        }
    }
}

/// A generator of numbers that is the same every time.
struct Noise: RandomNumberGenerator {
    private var state: UInt64
    init(_ seed: UInt64) { state = seed &* 0x9e37_79b9_7f4a_7c15 | 1 }
    mutating func next() -> UInt64 {
        state ^= state << 13
        state ^= state >> 7
        state ^= state << 17
        return state &* 0x2545_f491_4f6c_dd1d
    }
}

/// Contents of memory: what is equal to what.
enum Layout {
    /// The first half is all different. The second one goes in runs of `run` pages: every other one equals a run of the
    /// first half, at a random place; the rest are different again. Returns how many pages have an equal.
    static func pairs(_ pageCount: Int, run: Int, set: (Int, UInt64) -> Void) -> Int {
        var noise = Noise(7)
        let half = pageCount / 2
        for page in 0..<pageCount { set(page, UInt64(page + 1)) }
        var sources = Array(0..<half / run)
        sources.shuffle(using: &noise)
        var equal = 0
        for (number, unit) in stride(from: 0, to: half / run - 1, by: 2).enumerated() {
            for page in 0..<run { set(half + unit * run + page, UInt64(sources[number] * run + page + 1)) }
            equal += run
        }
        return 2 * equal
    }
}
