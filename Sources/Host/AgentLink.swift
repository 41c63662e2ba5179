import CQuireLayout
import Engines
import GuestMemory
import Logging
import Platform

/// The back end's end of the link to the agent in QEMU: it listens, greets the agent, tells it where guest memory is,
/// and has pages merged and brought back.
///
/// | phase       | what holds                            | left when                                             |
/// | ----------- | ------------------------------------- | ----------------------------------------------------- |
/// | `absent`    | nobody is connected                   | QEMU's own process connects: `greeting`               |
/// | `greeting`  | connected                             | a hello of our version: `idle`; another: `absent`     |
/// | `idle`      | the agent is not attached, or refused | there is memory to attach, or it is time: `attaching` |
/// | `attaching` | an attach is under way                | its answer: `attached`, or `idle`                     |
/// | `attached`  | commands are carried out              | the regions change: `attaching`                       |
///
/// From every phase the end of the connection, or a message that breaks the protocol, leads to `absent`; the agent
/// comes back by itself, and so it does to a new back end. One thread, the link's, reads everything; commands are sent
/// by whoever gives them, one at a time.
///
/// When the connection ends in the middle of a command nobody here knows how far it came; the page map does. The agent
/// finishes what it was doing, and connects again after that: until then `isUnsettled` stands, and nothing relies on
/// pages staying as they are (`settle`).
public final class AgentLink: PageMerger, PageRecycler {
    /// QEMU, as the kernel names it (SO_PEERCRED).
    public struct Peer: Sendable, Equatable {
        public let pid: Int32
        public let uid: UInt32
        public init(pid: Int32, uid: UInt32) {
            self.pid = pid
            self.uid = uid
        }
    }

    public enum Phase: Sendable, Equatable { case absent, greeting, idle, attaching, attached }

    public struct Status: Sendable, Equatable {
        public let phase: Phase
        /// Nil until the agent has told it.
        public let gate: AgentGate?
        /// QEMU's VMAs, as far as the agent knows, and how many it will make.
        public let mappings: UInt64
        public let mappingLimit: UInt64
        /// Why the agent is not attached, if anything was wrong.
        public let trouble: String
    }

    /// A descriptor with more than one holder.
    private final class Shared: Sendable {
        let descriptor: Descriptor
        init(_ descriptor: consuming Descriptor) { self.descriptor = descriptor }
    }

    private final class Connection: Sendable {
        let socket: UnixSocket
        let peer: Peer
        init(_ socket: consuming UnixSocket, _ peer: Peer) {
            self.socket = socket
            self.peer = peer
        }
    }

    private struct State {
        var phase = Phase.absent
        var connection: Connection?
        /// Of this connection's process; given to `pages` once the agent has said that the page map is its own.
        var processMemory: ProcessMemory?
        var tracker: WriteTracker?
        var pageTables: PageTables?
        /// What the agent can do (`quire_agent_capability`).
        var capabilities: UInt64 = 0
        /// The process whose memory `pages` has.
        var attachedPID: Int32?
        var memory: GuestMemory?
        /// Processes that QEMU passes guest RAM to with our knowledge; this one is known anyway.
        var peers: [Int32] = []
        /// Regions of the attach that is under way.
        var attaching: [MemoryRegion] = []
        var isAttachWanted = false
        /// CLOCK_MONOTONIC; of an attach that was refused for now.
        var attachAgainAt: UInt64?
        var stores: [Shared] = []
        var lastID: UInt64 = 0
        /// A command was sent, and it may still be at work or have yet to begin.
        var isUnsettled = false
        /// The runs of the last command.
        var expectedOutcomes = 0
        /// By the command's number, until whoever gave it has seen it: the next command may be under way by then. A
        /// number is here as long as somebody waits for it.
        var results: [UInt64: AgentMessage.Result?] = [:]
        var gate: AgentGate?
        var mappings: UInt64 = 0
        var mappingLimit: UInt64 = 0
        var trouble = ""
        /// Lines of the log that are not repeated.
        var said: Set<String> = []
        var isEnding = false
    }

    private let path: String
    private let listener: UnixSocket
    private let pages: MergedPages
    private let userfault: Shared?
    private let expectedPeer: @Sendable () -> Peer?
    private let logger: Logger
    private let wakeup: EventDescriptor
    private let monitor = Monitor(State())
    private let thread = Monitor<JoinableThread?>(nil)

    /// Listens at `path` and waits for the agent. `peer` says who may connect: QEMU's process, as its vhost-user
    /// connection has shown; nil while that is unknown. `userfault`: /dev/userfaultfd, for a QEMU that may not open it.
    public init(
        path: String, pages: MergedPages, userfault: consuming Descriptor? = nil, logger: Logger,
        peer: @escaping @Sendable () -> Peer?
    ) throws(QuireError) {
        self.path = path
        self.pages = pages
        self.logger = logger
        expectedPeer = peer
        if let userfault { self.userfault = Shared(userfault) } else { self.userfault = nil }
        listener = try UnixSocket.listen(at: path, kind: .messages)
        try Descriptor.makeNonblocking(listener.descriptor.raw)
        wakeup = try EventDescriptor()
        let started = try JoinableThread("agent-link") { [self] in serve() }
        thread.update { $0 = started }
        pages.setMover(self)
    }

    /// Ends the link, which lives until then; the agent waits for another. Its thread is joined when this returns.
    public func end() {
        monitor.update { $0.isEnding = true }
        wakeup.signal()
        let started = thread.update { started in
            defer { started = nil }
            return started
        }
        guard let started else { return }
        started.join()
        pages.setMover(nil)
        Files.remove(path)
    }

    public var status: Status {
        monitor.read {
            Status(
                phase: $0.phase, gate: $0.gate, mappings: $0.mappings, mappingLimit: $0.mappingLimit,
                trouble: $0.trouble)
        }
    }

    private static let trackingCapabilities =
        UInt64(QUIRE_AGENT_CAN_WP_ASYNC.rawValue | QUIRE_AGENT_CAN_PAGEMAP_SCAN.rawValue)

    public var writeTracker: WriteTracker? {
        monitor.read { state in
            let needed = Self.trackingCapabilities
            return state.phase == .attached && state.capabilities & needed == needed ? state.tracker : nil
        }
    }

    /// QEMU's process, as long as the agent in it is attached.
    public var frontEndPID: Int32? {
        monitor.read { $0.phase == .attached || $0.phase == .attaching ? $0.connection?.peer.pid : nil }
    }

    public var pageTables: PageTables? { monitor.read { $0.phase == .attached ? $0.pageTables : nil } }

    public var obstacle: String? {
        monitor.read { state in
            guard state.phase == .attached || state.phase == .attaching else {
                return state.trouble.isEmpty ? "the agent in QEMU is not attached" : state.trouble
            }
            guard let gate = state.gate else { return "the agent in QEMU has not told of its pin gate yet" }
            return gate.isClosed ? gate.reason : nil
        }
    }

    /// Whether a device may write to all of guest RAM; nil if no agent says.
    public var isAssigned: Bool? {
        monitor.read { $0.phase == .attached || $0.phase == .attaching ? $0.gate?.isAssigned : nil }
    }

    public var mappings: (used: UInt64, limit: UInt64) { monitor.read { ($0.mappings, $0.mappingLimit) } }

    /// Waits until the agent is attached; false if it is not by `deadline`.
    public func waitUntilAttached(_ deadline: UInt64) -> Bool {
        monitor.wait(until: deadline) { $0.phase == .attached && !$0.isAttachWanted ? () : nil } != nil
    }

    /// Where guest memory is, from now on. The agent leaves alone what is no longer in it.
    public func setMemory(_ memory: GuestMemory) {
        monitor.update {
            $0.memory = memory
            $0.isAttachWanted = true
        }
        wakeup.signal()
    }

    /// Who made the sockets of our devices: what QEMU sees at their other end. At most 8 are told.
    public func setPeers(_ peers: Set<Int32>) {
        monitor.update { $0.peers = Array(peers.sorted().prefix(AgentMessage.maxPeers)) }
    }

    /// The store, sealed against shrinking, that page-map entries and `PageRun.store` call `number`, in place of all that
    /// there were. It is passed on with the next attach: no command that was given before maps another store's slots.
    public func setStore(_ store: consuming Descriptor, number: UInt8) throws(QuireError) {
        guard number < QUIRE_AGENT_MAX_STORES else { throw QuireError(.unsupported, "a store with the number \(number)") }
        let shared = Shared(store)
        monitor.update {
            // Those below are never named.
            $0.stores = [Shared](repeating: shared, count: Int(number) + 1)
            $0.isAttachWanted = true
        }
        wakeup.signal()
    }

    // MARK: - Commands

    public func merge(_ runs: [PageRun], until deadline: UInt64? = nil) throws(QuireError) -> [MoveOutcome] {
        try run(.merge, runs, until: deadline)
    }

    public func zero(_ gfns: [Range<GFN>], until deadline: UInt64? = nil) throws(QuireError) -> [MoveOutcome] {
        try run(.zero, gfns.map(Self.run), until: deadline)
    }

    public func fold(
        _ gfns: [Range<GFN>], onlyDiverged: Bool = false, until deadline: UInt64? = nil
    ) throws(QuireError) -> [MoveOutcome] {
        try run(onlyDiverged ? .foldDiverged : .fold, gfns.map(Self.run), until: deadline)
    }

    /// Forgets what merged pages hold. Only for pages that nobody can be using until the result is there, or, if this
    /// throws, until `settle` has returned.
    public func reset(_ gfns: [Range<GFN>], until deadline: UInt64? = nil) throws(QuireError) -> [MoveOutcome] {
        try run(.reset, gfns.map(Self.run), until: deadline)
    }

    private static func run(_ gfns: Range<GFN>) -> PageRun { PageRun(gfn: gfns.lowerBound, pages: gfns.count) }

    /// Throws `.closed` when the agent is not attached or goes away (then the page map says how far it came), `.busy`
    /// at the deadline. Any number of runs.
    private func run(
        _ operation: AgentOperation, _ runs: [PageRun], until deadline: UInt64?
    ) throws(QuireError) -> [MoveOutcome] {
        var outcomes: [MoveOutcome] = []
        for start in stride(from: 0, to: runs.count, by: PageRun.maxRuns) {
            let some = runs[start..<min(start + PageRun.maxRuns, runs.count)]
            outcomes += try runSome(operation, Array(some), deadline)
        }
        return outcomes
    }

    private struct Ticket {
        let connection: Connection
        let id: UInt64
        /// For each run whether the agent is asked.
        let isAsked: [Bool]
    }

    private func runSome(
        _ operation: AgentOperation, _ runs: [PageRun], _ deadline: UInt64?
    ) throws(QuireError) -> [MoveOutcome] {
        let makesShared = operation == .merge || operation == .zero
        let ticket = try takeTurn(until: deadline) {
            runs.map { !makesShared || !self.pages.unmergeable.overlaps($0.gfns) }
        }
        let asked = zip(runs, ticket.isAsked).filter(\.1).map(\.0)
        var rest: [MoveOutcome] = []
        if !asked.isEmpty {
            rest = try answer(ticket, to: AgentMessage.command(ticket.id, operation, asked), until: deadline)
        }
        return ticket.isAsked.map { $0 ? rest.removeFirst() : MoveOutcome(done: 0, reason: .unmergeable) }
    }

    private static let gone = QuireError(.closed, "the agent in QEMU is not attached")
    private static let late = QuireError(.busy, "the agent in QEMU has not answered in time")

    /// Waits until a command may be given. `isAsked` says for each of its runs whether the agent is to be asked at all.
    private func takeTurn(until deadline: UInt64?, isAsked: () -> [Bool]) throws(QuireError) -> Ticket {
        let taken = monitor.wait(until: deadline) { state -> Ticket?? in
            guard let connection = state.connection, state.phase == .attached || state.phase == .attaching else {
                return .some(nil)
            }
            guard state.phase == .attached, !state.isAttachWanted, !state.isUnsettled else { return nil }
            // In one step with `isUnsettled`: see `MergedPages.keepPrivate`.
            let isAsked = isAsked()
            state.lastID += 1
            state.expectedOutcomes = isAsked.count { $0 }
            state.isUnsettled = state.expectedOutcomes > 0
            if state.isUnsettled { state.results[state.lastID] = .some(nil) }
            return Ticket(connection: connection, id: state.lastID, isAsked: isAsked)
        }
        guard let taken else { throw Self.late }
        guard let ticket = taken else { throw Self.gone }
        return ticket
    }

    /// Gives the command whose turn it is, and waits for its result.
    private func answer(
        _ ticket: Ticket, to command: [UInt8], passing descriptors: [Int32] = [], until deadline: UInt64?
    ) throws(QuireError) -> [MoveOutcome] {
        defer { monitor.update { _ = $0.results.removeValue(forKey: ticket.id) } }
        do throws(QuireError) {
            try ticket.connection.socket.send(command, passing: descriptors)
        } catch {
            // The link's thread sees the end of the connection, too. What was not sent may still have been: unsettled.
            throw QuireError(.closed, "the agent in QEMU has gone", cause: error)
        }
        let answered = monitor.wait(until: deadline) { state -> AgentMessage.Result?? in
            if let result = state.results[ticket.id] ?? nil { return result }
            return state.connection === ticket.connection ? nil : .some(nil)
        }
        guard let answered else { throw Self.late }
        guard let result = answered else { throw Self.gone }
        return result.outcomes
    }

    // MARK: - As the recycler

    public var canRecycle: Bool { monitor.read { $0.phase == .attached || $0.phase == .attaching } }

    /// Whoever waits for the end of a pass must not wait for long before it has even begun.
    private static let turnNanoseconds: UInt64 = 50_000_000

    public func recycle(_ runs: [RecycleRun], _ order: RecycleOrder) throws(QuireError) -> [MoveOutcome] {
        var outcomes: [MoveOutcome] = []
        for start in stride(from: 0, to: runs.count, by: PageRun.maxRuns) {
            outcomes += try recycleSome(Array(runs[start..<min(start + PageRun.maxRuns, runs.count)]), order)
        }
        return outcomes
    }

    private func recycleSome(_ runs: [RecycleRun], _ order: RecycleOrder) throws(QuireError) -> [MoveOutcome] {
        var pipe = try Pipe()
        let reader = pipe.takeReader()
        do throws(QuireError) {
            // Nobody else has it when it is closed here, unless the command was sent.
            let writer = pipe.takeWriter()
            let ticket = try takeTurn(until: monotonicNanoseconds() + Self.turnNanoseconds) { runs.map { _ in true } }
            return try answer(
                ticket, to: AgentMessage.command(ticket.id, order, runs), passing: [order.connection, writer.raw], until: nil)
        } catch {
            // Without a result: until the agent has the command no more, or there is no agent, and no guest.
            while waitReadable([reader.raw], timeoutMilliseconds: -1).isEmpty {}
            throw error
        }
    }

    // MARK: - As the mover of pages

    public func settle(until deadline: UInt64) throws(QuireError) {
        guard monitor.wait(until: deadline, { $0.isUnsettled ? nil : () }) != nil else {
            throw QuireError(.busy, "the agent in QEMU is still at work on what it was asked for")
        }
    }

    public func bringBack(_ gfns: [Range<GFN>], until deadline: UInt64) throws(QuireError) {
        var left = gfns
        var operation = AgentOperation.foldHeld
        while true {
            guard monitor.wait(until: deadline, { $0.phase == .attached ? () : nil }) != nil else {
                throw QuireError(.closed, "pages of the guest are merged, and the agent in QEMU is not attached")
            }
            let outcomes = try run(operation, left.map(Self.run), until: deadline)
            // An agent that QEMU has loaded long ago knows no better than to ask its gate.
            if operation == .foldHeld, outcomes.contains(where: { $0.reason == .invalid }) {
                operation = .fold
                continue
            }
            var next: [Range<GFN>] = []
            for (range, outcome) in zip(left, outcomes) {
                switch outcome.reason {
                case .done: break
                case .busy: next.append(range.lowerBound + UInt64(outcome.done)..<range.upperBound)
                case .gateClosed:
                    let reason = status.gate?.reason ?? "the pin gate is closed"
                    throw QuireError(.busy, "pages of the guest are merged and cannot be brought back: \(reason)")
                default: throw QuireError(.system, "the agent cannot bring pages back: \(outcome.reason)")
                }
            }
            if next.isEmpty { return }
            guard monotonicNanoseconds() < deadline else { throw QuireError(.busy, "pages of the guest stay in use") }
            left = next
            ProcessCalls.sleep(microseconds: 200)
        }
    }

    // MARK: - The link's thread

    private static let retryNanoseconds: UInt64 = 1_000_000_000

    private func serve() {
        while true {
            var watched = [wakeup.descriptor.raw, listener.descriptor.raw]
            let connection = monitor.read { $0.connection }
            if let connection { watched.append(connection.socket.descriptor.raw) }
            let again = monitor.read { $0.attachAgainAt }
            let ready = waitReadable(watched, timeoutMilliseconds: again == nil ? -1 : 200)
            if ready.contains(0) { wakeup.drain() }
            if monitor.read({ $0.isEnding }) { break }
            // The connection before the listener: an agent that has come back has dropped the old one first.
            if ready.contains(2), let connection { receive(connection) }
            if ready.contains(1) { accept() }
            sendWhatIsDue()
        }
        drop("", of: nil)
    }

    private func accept() {
        guard let socket = try? listener.accept() else { return }
        guard let who = try? socket.peer() else { return }
        let peer = Peer(pid: who.pid, uid: who.uid)
        guard let expected = expectedPeer() else {
            return say("process \(peer.pid) wants to be the agent, and QEMU is not known yet: it may try again", .info)
        }
        guard peer == expected else {
            return say(
                "process \(peer.pid) of user \(peer.uid) is refused as the agent: QEMU is \(expected.pid) of user "
                    + "\(expected.uid)")
        }
        let connection = Connection(socket, peer)
        let isFree = monitor.update { state in
            guard state.connection == nil else { return false }
            state.connection = connection
            state.phase = .greeting
            state.gate = nil
            // The agent has one connection at a time: what came over the last one is over.
            state.isUnsettled = false
            // Another QEMU's memory is not what the page map describes.
            if state.attachedPID != peer.pid {
                state.attachedPID = nil
                self.pages.detachMemory()
            }
            return true
        }
        if !isFree { say("QEMU's process \(peer.pid) connects a second agent: refused") }
    }

    private func receive(_ connection: Connection) {
        do throws(QuireError) {
            var passed = UnixSocket.PassedDescriptors()
            guard
                let bytes = try connection.socket.receiveMessage(
                    limit: AgentMessage.maxBytes, maxDescriptors: 2, into: &passed)
            else { return drop("", of: connection) }
            switch try AgentMessage(bytes) {
            case .hello(let hello): try greet(hello, &passed)
            case .ready(let ready): try attached(ready, connection)
            case .result(let result): try finish(result)
            case .gate(let gate):
                let isNew = monitor.update { state in
                    defer { state.gate = gate }
                    return state.gate != gate
                }
                if isNew { logger.info("\(gate.isClosed ? "pin gate closed: \(gate.reason)" : "pin gate open")") }
            }
        } catch {
            drop("the connection to the agent is closed: \(error)", of: connection)
        }
    }

    private func greet(
        _ hello: AgentMessage.Hello, _ passed: inout UnixSocket.PassedDescriptors
    ) throws(QuireError) {
        guard monitor.read({ $0.phase }) == .greeting else { throw QuireError(.invalid, "a second hello") }
        guard hello.version == QUIRE_AGENT_VERSION else {
            throw QuireError(
                .unsupported, "the agent in QEMU speaks version \(hello.version), this backend \(QUIRE_AGENT_VERSION): "
                    + "restart the VM with this version's agent")
        }
        guard passed.count == 2, let pagemap = passed.next(), let memory = passed.next() else {
            throw QuireError(.invalid, "QEMU could not open its own /proc/self/pagemap and /proc/self/mem")
        }
        let processMemory = ProcessMemory(memory)
        let pageTables = PageTables(pagemap: pagemap)
        let tracker = WriteTracker(pageTables)
        monitor.update {
            $0.phase = .idle
            $0.tracker = tracker
            $0.pageTables = pageTables
            $0.capabilities = hello.capabilities
            $0.processMemory = processMemory
            $0.mappingLimit = hello.mappingLimit
            $0.isAttachWanted = true
        }
    }

    private func attached(_ ready: AgentMessage.Ready, _ connection: Connection) throws(QuireError) {
        let regions = monitor.read { $0.phase == .attaching ? $0.attaching : nil }
        guard let regions else { throw QuireError(.invalid, "an answer to no attach") }
        guard ready.status == QUIRE_AGENT_OK else {
            if ready.status == QUIRE_AGENT_OTHER_MAP { pages.distrustMap() }
            // Guest RAM may not be mapped yet, or not any more.
            let isPassing = ready.status == QUIRE_AGENT_NOT_MAPPED
            monitor.update {
                $0.phase = .idle
                $0.attachAgainAt = isPassing ? monotonicNanoseconds() + Self.retryNanoseconds : nil
            }
            return say("the agent in QEMU refuses: \(ready.text)", isPassing ? .info : .error)
        }
        // What we call a user address must be what it is in that process: merged pages are reached by it.
        guard ready.addresses == regions.map(\.userAddress) else {
            throw QuireError(.invalid, "the agent finds guest RAM elsewhere than QEMU says: is it another process?")
        }
        let memory = monitor.update { state in
            state.phase = .attached
            state.capabilities = ready.capabilities
            state.attachedPID = connection.peer.pid
            state.trouble = ""
            state.said = []
            return state.processMemory
        }
        if let memory { pages.attach(memory) }
        logger.info("agent attached: \(regions.count) regions in QEMU's process \(connection.peer.pid)")
        if ready.capabilities & Self.trackingCapabilities != Self.trackingCapabilities {
            logger.notice("this kernel does not tell what a guest writes (Linux 6.7 does): all of its memory is read to find it")
        }
    }

    private func finish(_ result: AgentMessage.Result) throws(QuireError) {
        try monitor.update { state throws(QuireError) in
            guard state.isUnsettled, result.id == state.lastID, result.outcomes.count == state.expectedOutcomes else {
                throw QuireError(.invalid, "a result that nobody waits for")
            }
            if state.results[result.id] != nil { state.results[result.id] = result }
            state.isUnsettled = false
            state.mappings = result.mappings
            state.mappingLimit = result.mappingLimit
        }
    }

    /// Attaches, when there is reason to and no command is at work.
    private func sendWhatIsDue() {
        let now = monotonicNanoseconds()
        let connection = monitor.read { $0.connection }
        guard let connection else { return }
        do throws(QuireError) {
            let memory = monitor.update { state -> GuestMemory? in
                let isDue = state.isAttachWanted || state.attachAgainAt.map { now >= $0 } == true
                guard isDue, state.phase == .idle || state.phase == .attached, !state.isUnsettled,
                    let memory = state.memory, !memory.regions.isEmpty
                else { return nil }
                state.phase = .attaching
                state.isAttachWanted = false
                state.attachAgainAt = nil
                state.attaching = memory.regions
                return memory
            }
            if let memory { try attach(memory, connection) }
        } catch {
            drop("the agent cannot be told: \(error)", of: connection)
        }
    }

    /// What one packet can carry, less the map, the stores and /dev/userfaultfd.
    private static let maxFiles = 64 - 2 - Int(QUIRE_AGENT_MAX_STORES)

    private func attach(_ memory: GuestMemory, _ connection: Connection) throws(QuireError) {
        let (files, indices) = GuestMemory.files(of: memory.regions)
        let regions = zip(memory.regions, indices).map { region, file in
            AgentMessage.Region(gfns: region.gfns, file: file, fileOffset: region.fileOffset)
        }
        guard regions.count <= Int(QUIRE_AGENT_MAX_REGIONS), files.count <= Self.maxFiles else {
            monitor.update { $0.phase = .idle }
            return say(
                "\(regions.count) regions of guest RAM in \(files.count) files are more than the agent takes: "
                    + "nothing is merged")
        }
        let stores = monitor.read { $0.stores }
        try connection.socket.send(
            AgentMessage.attach(regions, files: files.count, stores: stores.count,
                peers: monitor.read { $0.peers }, hasUserfault: userfault != nil),
            passing: [pages.map.descriptor.raw] + files + stores.map { $0.descriptor.raw }
                + (userfault.map { [$0.descriptor.raw] } ?? []))
    }

    /// The connection is over. `isUnsettled` stays as it is.
    private func drop(_ reason: String, of connection: Connection?) {
        let old = monitor.update { state in
            defer {
                state.connection = nil
                state.phase = .absent
                state.processMemory = nil
                state.tracker = nil
                state.pageTables = nil
                state.attachAgainAt = nil
                state.gate = nil
            }
            return state.connection
        }
        if !reason.isEmpty { say(reason) } else if old != nil { logger.info("the agent has gone") }
        old?.socket.shutDown()
    }

    /// One line, once until the agent is attached: it tries again every second, and would be told the same.
    private func say(_ text: String, _ level: Logger.Level = .error) {
        let isNew = monitor.update { state in
            state.trouble = text
            // As many as anybody would read; what a peer may choose is in none of them more than a number.
            return state.said.count < 100 && state.said.insert(text).inserted
        }
        if isNew { logger.log(level: level, "\(text)") }
    }
}
