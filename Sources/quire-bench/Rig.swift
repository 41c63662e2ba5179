import Bench
import Engines
import Glibc
import GuestMemory
import Host
import Logging
import Platform

/// A guest for the engine, without a guest: memory files, a process that has them mapped as QEMU has, a state table, and
/// the engine itself. The engine claims and punches; or that process has the agent, which does, as under `quire run`.
final class Rig {
    /// Pages below this hold the table and are never marked.
    static let firstUsable = GuestTable.statesPerPage

    let pageCount: Int
    private let memory: GuestMemory
    private let table: GuestTable
    private let engine: RecycleEngine
    private let map: PageMap
    private let toucher: Toucher?
    private let agent: Agent?
    private var passes: UInt64 = 0
    private var marked: [Range<Int>] = []

    init(memfds: Int, pageCount: Int, workers: Int) throws {
        self.pageCount = pageCount
        var regions: [MemoryRegion] = []
        let each = UInt64(pageCount / memfds) * pageBytes
        for index in 0..<memfds {
            let at = UInt64(index) * each
            regions.append(
                try MemoryRegion(
                    guestAddress: at, byteCount: each, userAddress: 0x7f00_0000_0000 + at, fileOffset: 0,
                    descriptor: try Memfd(name: "quire-bench", byteCount: each).takeDescriptor(), owner: .us))
        }
        memory = try GuestMemory(regions, log: DirtyTracker())
        table = GuestTable(in: memory, pageCount: pageCount)
        map = try PageMap(PageMap.makeFile(pageCount: UInt64(pageCount)))
        engine = try RecycleEngine(RecycleEngine.Configuration(periodMilliseconds: 10_000, workers: workers), map: map)
        engine.start(memory: memory, rings: [], nonce: 1)
        toucher = try Toucher(memory.regions.map { $0.descriptor.raw })
        agent = nil
    }

    private final class Agent {
        let standIn: StandIn
        let link: AgentLink
        /// In place of the control disk's connection.
        let connection: Descriptor

        init(_ pageCount: Int, _ pages: MergedPages, _ programs: Programs) throws {
            let socket = programs.runtime + "/agent-\(monotonicNanoseconds())"
            var logger = Logger(label: "bench") { StreamLogHandler.standardError(label: $0) }
            logger.logLevel = .warning
            let standIn = try StandIn(pageCount, agent: socket, programs)
            self.standIn = standIn
            let pid = standIn.pid
            link = try AgentLink(path: socket, pages: pages, logger: logger) { AgentLink.Peer(pid: pid, uid: geteuid()) }
            var pipe = try Pipe()
            connection = pipe.takeReader()
        }
        deinit { link.end() }
    }

    init(pageCount: Int, agentOf programs: Programs) throws {
        self.pageCount = pageCount
        map = try PageMap(PageMap.makeFile(pageCount: UInt64(pageCount)))
        map.takeOver(pid: getpid())
        let pages = MergedPages(map: map)
        let agent = try Agent(pageCount, pages, programs)
        memory = try GuestMemory(
            [
                MemoryRegion(
                    guestAddress: 0, byteCount: UInt64(pageCount) * pageBytes, userAddress: agent.standIn.address, fileOffset: 0,
                    descriptor: agent.standIn.file!.duplicate(), owner: .us)
            ], log: DirtyTracker(), pages: pages)
        table = GuestTable(in: memory, pageCount: pageCount)
        engine = try RecycleEngine(RecycleEngine.Configuration(periodMilliseconds: 10_000, workers: 1), map: map)
        engine.setRecycler(agent.link)
        self.agent = agent
        toucher = nil
        try agent.link.attach(memory)
        engine.start(memory: memory, rings: [], nonce: 1, connection: agent.connection.raw)
    }

    deinit { engine.end() }

    /// What the page map takes of the host's memory, in bytes.
    var mapBytes: UInt64 { map.allocatedBytes }

    /// Every second run of `length` pages, in ascending order.
    func runs(_ length: Int) -> [Range<Int>] {
        stride(from: Self.firstUsable, to: pageCount - length + 1, by: 2 * length).map { $0..<$0 + length }
    }

    /// The other process writes to every page.
    func touch() throws {
        try toucher?.touch()
        guard let agent else { return }
        // Not the table, which it would overwrite.
        let first = Int(table.end / pageBytes)
        for page in 0..<first { memory.regions[0].mapping.add64(page * Int(pageBytes) + 2048, 0) }
        try agent.standIn.fill(first..<pageCount)
    }

    /// What the agent has used of the CPU: nobody else is at work in its process meanwhile.
    private var agentNanoseconds: UInt64 { agent.map { cpuNanoseconds(of: $0.standIn.pid) } ?? 0 }

    /// A: the bare system call.
    func punch(_ runs: [Range<Int>]) throws -> Cost {
        let places = runs.map { run in
            let place = memory.place(ofGuest: UInt64(run.lowerBound) * pageBytes, count: UInt64(run.count) * pageBytes)!
            return (place.region.descriptor.raw, place.region.fileOffset + UInt64(place.offset), UInt64(run.count) * pageBytes)
        }
        let cycles = Cycles.isCounted ? Cycles.count() : 0
        let wall = monotonicNanoseconds(), cpu = threadCPUNanoseconds()
        for (file, offset, count) in places { try Memfd.punch(file, offset: offset, byteCount: count) }
        let spent = threadCPUNanoseconds() - cpu
        let cost = Cost(
            wall: Double(monotonicNanoseconds() - wall), cpu: Double(spent),
            cycles: Cycles.isCounted ? Double(Cycles.count() - cycles) : Double(spent) * Cycles.tscPerNanosecond)
        try checkHoles(runs)
        return cost
    }

    /// B: the engine. It looks at once at a table that is new to it, so the clock runs from the registration to the end of
    /// the pass. What this thread does meanwhile, registering and waiting, is not the engine's cost.
    func recycle(_ runs: [Range<Int>]) throws -> Cost {
        try mark(runs)
        let cycles = Cycles.isCounted ? Cycles.count() : 0
        let wall = monotonicNanoseconds(), cpu = processCPUNanoseconds(), own = threadCPUNanoseconds(), others = agentNanoseconds
        try begin()
        awaitPass()
        let ownSpent = threadCPUNanoseconds() - own
        let spent = processCPUNanoseconds() - cpu - ownSpent + (agentNanoseconds - others)
        let cost = Cost(
            wall: Double(monotonicNanoseconds() - wall), cpu: Double(spent),
            // The counters are this process's.
            cycles: Cycles.isCounted && agent == nil
                ? Double(Cycles.count() - cycles) - Double(ownSpent) * Cycles.tscPerNanosecond
                : Double(spent) * Cycles.tscPerNanosecond)
        try finish()
        return cost
    }

    func mark(_ runs: [Range<Int>]) throws {
        var states = [UInt8](repeating: PageMark.inUse, count: table.tablePages * GuestTable.statesPerPage)
        for run in runs { for page in run { states[page] = GuestTable.dueMark } }
        for page in 0..<table.tablePages {
            let first = page * GuestTable.statesPerPage
            table.setStates(page, states[first..<first + GuestTable.statesPerPage])
        }
        table.resetEpoch()
        marked = runs
        passes = engine.snapshot.passes
    }

    func begin() throws { try engine.register(headerAddress: table.headerAddress) }

    func awaitPass() {
        while engine.snapshot.passes == passes, engine.snapshot.phase == .active { usleep(200) }
    }

    /// Takes the table back and checks that the engine did exactly what it was asked to.
    func finish() throws {
        let statistics = engine.snapshot
        engine.unregister()
        let wanted = marked.reduce(0) { $0 + $1.count }
        guard statistics.recycledNowPages == wanted else {
            throw QuireError(.system, "the engine recycled \(statistics.recycledNowPages) of \(wanted) pages: \(statistics.reason)")
        }
        try checkHoles(marked)
    }

    private func checkHoles(_ runs: [Range<Int>]) throws {
        let wanted = pageCount - runs.reduce(0) { $0 + $1.count }
        let resident = Int(RecycleEngine.residentPages(memory))
        guard resident == wanted else {
            throw QuireError(.system, "\(resident) of \(pageCount) pages are resident, expected \(wanted): is memory short?")
        }
    }
}
