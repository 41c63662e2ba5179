import Glibc
import Logging
import Platform
import StoreProtocol
import Synchronization

/// Serves shared disks on a socket, each connection with a thread of its own: a VM waits for each answer.
///
/// Clients are not trusted: every request is checked against the disk, and their window is read once. Who is silent costs a
/// thread that sleeps; there are at most so many of them.
public final class SharedDiskServer: Sendable {
    private struct Attachment: Equatable {
        let uid: UInt32
        let disk: String
        let token: UInt64
        let vm: String
    }

    private final class Client: Sendable {
        let socket: UnixSocket
        let uid: UInt32
        /// Set by HELLO, once.
        let attachment = Mutex<Attachment?>(nil)
        /// A later connection has taken its place: no request of this one is begun any more.
        let isRevoked = Atomic<Bool>(false)
        /// Its thread has done its last request.
        let hasEnded = Monitor(false)
        init(_ socket: consuming UnixSocket, uid: UInt32) {
            self.socket = socket
            self.uid = uid
        }
    }

    private struct State {
        var next: UInt64 = 0
        var clients: [UInt64: Client] = [:]
        var threads: [UInt64: JoinableThread] = [:]
        var finished: [JoinableThread] = []
        var isEnding = false
    }

    /// Carries out an operator's command (`SharedDiskCommand`) for a user; `attached` says which VMs have a disk.
    public typealias Commands =
        @Sendable (_ text: String, _ uid: UInt32, _ attached: (_ disk: String) -> [String]) throws(QuireError) -> String

    private let disks: SharedDisks
    private let commands: Commands
    private let listener: UnixSocket
    private let logger: Logger
    private let stop: EventDescriptor
    private let state = Mutex(State())
    private let acceptor = Monitor<JoinableThread?>(nil)

    private static let maxClients = 512
    /// Of one user who is not root.
    private static let maxClientsPerUser = 64

    public init(
        _ disks: SharedDisks, listener: consuming UnixSocket, logger: Logger, commands: @escaping Commands
    ) throws(QuireError) {
        self.disks = disks
        self.commands = commands
        self.listener = listener
        self.logger = logger
        stop = try EventDescriptor()
        try Descriptor.makeNonblocking(self.listener.descriptor.raw)
        let thread = try JoinableThread("disks") { [self] in acceptClients() }
        acceptor.update { $0 = thread }
    }

    /// Ends every connection and joins the threads. What is on the disks stays.
    public func end() {
        stop.signal()
        acceptor.update { thread in
            thread?.join()
            thread = nil
        }
        let threads = state.withLock { state in
            state.isEnding = true
            for client in state.clients.values { client.socket.shutDown() }
            defer {
                state.threads = [:]
                state.finished = []
            }
            return Array(state.threads.values) + state.finished
        }
        for thread in threads { thread.join() }
    }

    private func acceptClients() {
        while !waitReadable([listener.descriptor.raw, stop.descriptor.raw]).contains(1) {
            for thread in state.withLock({ state in
                defer { state.finished = [] }
                return state.finished
            }) { thread.join() }
            let socket: UnixSocket
            do throws(QuireError) { socket = try listener.accept() } catch {
                if error.errno != EAGAIN { ProcessCalls.sleep(milliseconds: 50) }
                continue
            }
            guard let (_, uid) = try? socket.peer() else { continue }
            let client = Client(socket, uid: uid)
            let number: UInt64? = state.withLock { state in
                guard !state.isEnding, state.clients.count < Self.maxClients,
                    uid == 0 || state.clients.values.count(where: { $0.uid == uid }) < Self.maxClientsPerUser
                else { return nil }
                state.next += 1
                state.clients[state.next] = client
                return state.next
            }
            guard let number else {
                try? client.socket.sendMessage(SharedDiskMessage.encodedError("there are too many connections: try again later"))
                continue
            }
            // The thread takes itself out of the list at its end, so it must be in it before.
            let isListed = Monitor(false)
            let thread = try? JoinableThread("disk-\(number)") { [self] in
                isListed.wait { $0 ? () : nil }
                serve(client)
                client.hasEnded.update { $0 = true }
                state.withLock { state in
                    state.clients[number] = nil
                    if let thread = state.threads.removeValue(forKey: number) { state.finished.append(thread) }
                }
            }
            state.withLock { state in
                if let thread { state.threads[number] = thread } else { state.clients[number] = nil }
            }
            isListed.update { $0 = true }
        }
    }

    private func serve(_ client: Client) {
        do {
            var none = UnixSocket.PassedDescriptors()
            guard
                let bytes = try client.socket.receiveMessage(limit: SharedDiskMessage.maxBytes, maxDescriptors: 0, into: &none)
            else { return }
            if let text = SharedDiskMessage.command(bytes) {
                let answer = try commands(text, client.uid) { disk in attached(to: disk) }
                try client.socket.sendMessage(SharedDiskCommand.answer(answer))
                return
            }
            let hello = try SharedDiskMessage.Hello(bytes)
            let shared = try disks.admit(hello, uid: client.uid)
            attach(client, Attachment(uid: client.uid, disk: hello.name, token: hello.token, vm: hello.vm))
            let size = SharedDiskMessage.windowPages * SharedDiskMessage.pageBytes
            let file = try Memfd(name: "quire-disk-window", byteCount: UInt64(size)).takeDescriptor()
            let window = try Mapping(file, byteCount: size)
            try client.socket.sendMessage(
                SharedDiskMessage.Welcome(pages: shared.disk.pages, id: shared.id).encoded(), passing: [file.raw])
            var scratch = [UInt8](repeating: 0, count: SharedDiskMessage.pageBytes)
            var isDamageSaid = false
            while let bytes = try client.socket.receiveMessage(limit: SharedDiskMessage.maxBytes, maxDescriptors: 0, into: &none) {
                if client.isRevoked.load(ordering: .sequentiallyConsistent) { return }
                let request = try SharedDiskMessage.Request(bytes, pages: shared.disk.pages)
                let status = try shared.carryOut(request, window: window, scratch: &scratch)
                if status == .damaged, !isDamageSaid {
                    isDamageSaid = true
                    logger.error("the shared disk '\(hello.name)' is damaged at or behind page \(request.page): its guests get I/O errors there")
                }
                try client.socket.sendMessage(SharedDiskMessage.Reply(status, number: request.number).encoded())
            }
        } catch {
            logger.info("a client of user \(client.uid) is disconnected: \(error)")
            try? client.socket.sendMessage(SharedDiskMessage.encodedError("\(error)"))
        }
    }

    /// The VMs that have a disk, by name; those that don't say theirs are `?`.
    private func attached(to disk: String) -> [String] {
        let all = state.withLock { state in state.clients.values.compactMap { client in client.attachment.withLock { $0 } } }
        return all.filter { $0.disk == disk }.map { $0.vm.isEmpty ? "?" : $0.vm }.sorted()
    }

    /// Returns when nothing that came on an older connection of the same client will be done any more.
    private func attach(_ client: Client, _ attachment: Attachment) {
        let others = state.withLock { state in
            client.attachment.withLock { $0 = attachment }
            return state.clients.values.filter { other in other !== client && other.attachment.withLock { $0 } == attachment }
        }
        for other in others {
            other.isRevoked.store(true, ordering: .sequentiallyConsistent)
            other.socket.shutDown()
            other.hasEnded.wait { $0 ? () : nil }
        }
    }
}
