import Glibc
import Logging
import Platform
import StoreProtocol
import Synchronization

/// Serves a page store on a socket, with several threads. A connection, and the life of a VM, has one thread at a time:
/// a request is read, done and answered, and only then is the next one looked for.
///
/// Nobody is waited for: a client that does not read its answers, sends nonsense or comes too often is disconnected.
public final class StoreServer: Sendable {
    private final class Connection: Sendable {
        let socket: UnixSocket
        let uid: UInt32
        /// Set by HELLO, once.
        let machine = Mutex<Machine?>(nil)
        /// Of a store of transcendent memory that asks what it may use: set by the first TMEM.
        let tmem = Mutex<(name: String, owner: UInt64)?>(nil)
        init(_ socket: consuming UnixSocket, uid: UInt32) {
            self.socket = socket
            self.uid = uid
        }
    }

    /// What a poller's token says: two bits of kind, and which one.
    private enum Source {
        case listener
        case stop
        case connection(UInt64)
        case life(Int)

        init(_ token: UInt64) {
            switch token & 3 {
            case 0: self = .listener
            case 1: self = .stop
            case 2: self = .connection(token >> 2)
            default: self = .life(Int(token >> 2))
            }
        }

        var token: UInt64 {
            switch self {
            case .listener: 0
            case .stop: 1
            case .connection(let number): number << 2 | 2
            case .life(let number): UInt64(number) << 2 | 3
            }
        }
    }

    private struct State {
        var next: UInt64 = 0
        var connections: [UInt64: Connection] = [:]
    }

    private let store: PageStore
    private let tmem: TmemLedger
    private let listener: UnixSocket
    private let logger: Logger
    private let poller: Poller
    private let stop: EventDescriptor
    private let state = Mutex(State())
    private let workers: [JoinableThread]

    private static let maxConnections = 4096
    /// Of one user who is not root.
    private static let maxConnectionsPerUser = 512

    /// Starts serving.
    public init(
        _ store: PageStore, tmem: TmemLedger, listener: consuming UnixSocket, workers count: Int, logger: Logger
    ) throws(QuireError) {
        self.store = store
        self.tmem = tmem
        self.listener = listener
        self.logger = logger
        poller = try Poller()
        stop = try EventDescriptor()
        // Threads begin to work once everything they need is here.
        let start = Monitor<StoreServer?>(nil)
        var workers: [JoinableThread] = []
        for number in 0..<max(1, count) {
            workers.append(
                try JoinableThread("store-\(number)") {
                    guard let server = start.wait({ $0 }) else { return }
                    server.work()
                })
        }
        self.workers = workers
        try Descriptor.makeNonblocking(self.listener.descriptor.raw)
        try poller.add(stop.descriptor.raw, token: Source.stop.token)
        for machine in store.machines { watch(machine) }
        try poller.add(self.listener.descriptor.raw, token: Source.listener.token)
        tmem.settle()
        start.update { $0 = self }
    }

    /// Ends every connection and joins the threads. VMs keep what they have.
    public func end() {
        stop.signal()
        for worker in workers { worker.join() }
    }

    private func work() {
        guard let scratch = try? PageStore.makeScratch() else { return }
        while let token = poller.next() {
            switch Source(token) {
            case .stop:
                // The next thread has to see it too.
                poller.arm(stop.descriptor.raw, token: token)
                return
            case .listener:
                accept()
                poller.arm(listener.descriptor.raw, token: token)
            case .connection(let number):
                guard let connection = state.withLock({ $0.connections[number] }) else { continue }
                if serve(connection, scratch) {
                    poller.arm(connection.socket.descriptor.raw, token: token)
                } else {
                    drop(number, connection)
                }
            case .life(let number): lifeStirred(number)
            }
        }
    }

    // MARK: - Lives

    private func watch(_ machine: Machine) {
        // One that comes back is watched already.
        try? poller.add(machine.life.raw, token: Source.life(machine.number).token)
    }

    private func lifeStirred(_ number: Int) {
        guard let machine = store.machines.first(where: { $0.number == number }) else { return }
        // The number may have been another VM's when the poller was told.
        guard machine.isOver else {
            poller.arm(machine.life.raw, token: Source.life(number).token)
            return
        }
        poller.remove(machine.life.raw)
        do throws(QuireError) { try store.end(machine) } catch {
            logger.error("cannot let go of VM '\(machine.name)': \(error)")
        }
        for connection in state.withLock({ Array($0.connections.values) })
        where connection.machine.withLock({ $0 === machine }) {
            connection.socket.shutDown()
        }
    }

    // MARK: - Connections

    private func accept() {
        let socket: UnixSocket
        do throws(QuireError) { socket = try listener.accept() } catch {
            // Out of descriptors: it would be told again at once.
            if error.errno != EAGAIN { ProcessCalls.sleep(milliseconds: 50) }
            return
        }
        guard let (_, uid) = try? socket.peer(), (try? Descriptor.makeNonblocking(socket.descriptor.raw)) != nil
        else { return }
        let isWelcome = state.withLock { state in
            state.connections.count < Self.maxConnections
                && (uid == 0 || state.connections.values.count { $0.uid == uid } < Self.maxConnectionsPerUser)
        }
        guard isWelcome else {
            try? socket.sendMessage(StoreReply.error("there are too many connections: try again later").encoded())
            return
        }
        let raw = socket.descriptor.raw
        let connection = Connection(socket, uid: uid)
        let number = state.withLock { state in
            state.next += 1
            state.connections[state.next] = connection
            return state.next
        }
        if (try? poller.add(raw, token: Source.connection(number).token)) == nil { drop(number, connection) }
    }

    private func drop(_ number: UInt64, _ connection: Connection) {
        if let machine = connection.machine.withLock({ $0.take() }) { store.disconnect(machine) }
        if let (_, owner) = connection.tmem.withLock({ $0.take() }) { tmem.lose(owner: owner) }
        // Nobody else has this descriptor, so closing it removes it from the poller.
        state.withLock { $0.connections[number] = nil }
    }

    /// Reads one request and answers it. False: the connection ends.
    private func serve(_ connection: Connection, _ scratch: borrowing Mapping) -> Bool {
        var descriptors = UnixSocket.PassedDescriptors()
        do {
            guard
                let bytes = try connection.socket.receiveMessage(
                    limit: StoreRequest.maxBytes, maxDescriptors: StoreRequest.maxFiles, into: &descriptors)
            else { return false }
            let request = try StoreRequest(bytes)
            try answer(request, connection, &descriptors, scratch)
            return true
        } catch let error as QuireError where error.errno == EAGAIN {
            // Nothing to read after all, or a client that does not read its answers: the latter is found out here too.
            return false
        } catch {
            logger.info("a client of user \(connection.uid) is disconnected: \(error)")
            let isBusy = (error as? QuireError)?.code == .busy
            try? connection.socket.sendMessage(StoreReply.error("\(error)", isBusy: isBusy).encoded())
            return false
        }
    }

    private func answer(
        _ request: StoreRequest, _ connection: Connection, _ descriptors: inout UnixSocket.PassedDescriptors,
        _ scratch: borrowing Mapping
    ) throws {
        switch request {
        case .hello, .memory: break
        default:
            guard descriptors.count == 0 else {
                throw ProtocolViolation("descriptors came with a request that takes none")
            }
        }
        let known = connection.machine.withLock { $0 }
        switch (request, known) {
        case (.hello(let hello), nil):
            guard !Observers.isExporter(connection.uid) else { throw QuireError(.unsupported, "quire-exporter has no VMs") }
            // Before descriptors are asked for: another version may pass others.
            try PageStore.checkVersion(hello)
            guard descriptors.count == 2, let map = descriptors.next(), let life = descriptors.next() else {
                throw ProtocolViolation("HELLO comes with two descriptors: the page map and the VM's life")
            }
            let (machine, welcome) = try store.admit(hello, uid: connection.uid, map: map, life: life)
            connection.machine.withLock { $0 = machine }
            watch(machine)
            let slots = try PageStore.readOnlyStore(of: machine)
            try connection.socket.sendMessage(StoreReply.welcome(welcome).encoded(), passing: [slots.raw])
        case (.status(_), nil):
            try Self.checkMayObserve(connection)
            try reply(connection, .figures(store.figures(of: nil)))
        case (.groups(let first), nil):
            try Self.checkMayObserve(connection)
            try reply(connection, .groups(Array(store.groupFigures().dropFirst(first).prefix(StoreReply.maxGroups))))
        case (.tmem(let use), nil):
            try reply(connection, .allowed(try allow(use, connection)))
        case (_, nil): throw ProtocolViolation("the first request must be HELLO")
        case (.hello, _?): throw ProtocolViolation("HELLO came twice")
        case (.memory(let regions), let machine?):
            var files = DescriptorList()
            while let file = descriptors.next() { files.append(file) }
            machine.setMemory(try GuestRAM(regions, files: files))
            try reply(connection, .done(pages: regions.reduce(0) { $0 + $1.pages }))
        case (.lookup(let lookup), let machine?):
            let runs = try store.lookUp(machine, lookup, scratch: scratch)
            try reply(connection, .slots(runs, offers: UInt64(machine.waitingOffers), lacking: store.lackingBytes))
        case (.offers(let most), let machine?):
            let runs = try machine.takeOffers(most)
            try reply(connection, .slots(runs, offers: UInt64(machine.waitingOffers), lacking: store.lackingBytes))
        case (.report(let reports), let machine?):
            try reply(connection, .done(pages: try machine.report(reports)))
        case (.status(let zeroPages), let machine?):
            machine.noteZeroPages(zeroPages)
            try reply(connection, .figures(store.figures(of: machine)))
        case (.groups, _?): throw ProtocolViolation("GROUPS came after HELLO")
        case (.tmem, _?): throw ProtocolViolation("TMEM came after HELLO")
        }
    }

    private func allow(_ use: StoreRequest.TmemUse, _ connection: Connection) throws -> StoreReply.TmemAllowed {
        if use.name.isEmpty {
            try Self.checkMayObserve(connection)
            return tmem.look()
        }
        guard !Observers.isExporter(connection.uid) else { throw QuireError(.unsupported, "quire-exporter has no VMs") }
        guard isStoreName(use.name) else { throw ProtocolViolation("'\(use.name)' is no VM's name") }
        let (name, owner) = connection.tmem.withLock { tmem in
            if tmem == nil { tmem = (use.name, self.tmem.makeOwner()) }
            return tmem!
        }
        guard name == use.name else { throw ProtocolViolation("one connection asks for two VMs") }
        return tmem.allow(use, uid: connection.uid, owner: owner)
    }

    private static func checkMayObserve(_ connection: Connection) throws(QuireError) {
        guard Observers.include(connection.uid) else {
            throw QuireError(.invalid, "figures of the whole host are for root, quired's own user and quire-exporter's")
        }
    }

    private func reply(_ connection: Connection, _ reply: StoreReply) throws(QuireError) {
        try connection.socket.sendMessage(reply.encoded())
    }
}
