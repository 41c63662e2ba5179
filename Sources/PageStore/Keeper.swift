import Glibc
import Platform
import StoreProtocol
import Synchronization

/// The process above quired that holds its descriptors and starts it again when it dies. It knows nothing of what they
/// mean, so there is little in it that could go wrong. Where systemd runs it, systemd has all of them, too (its descriptor store), and
/// gives them to the keeper that it starts in the place of one that was killed.
///
/// Messages on one connection, in both directions: `P` and a name with descriptors: park these; `U` and a name: forget
/// them; `R`: I am at work now; to the worker, `E`: that was all, or `C`: that was all that there is, and it came from the service
/// manager: check it. What the worker has sent is kept from that moment: the kernel holds it, even if the worker dies before the
/// keeper has read it.
public struct Keeper {
    static let nameBytes = 128
    static let maxDescriptors = 8
    /// The status of a worker that ends so that another one begins, with a configuration that it cannot take over itself (EX_TEMPFAIL). To
    /// a keeper of an older release it is one more that has died.
    public static let replacement: Int32 = 75

    private var parked: [String: [Int32]] = [:]
    /// The worker of now has come as far as doing its work.
    private var isReady = false
    /// A worker has once come so far, of this keeper or of an earlier one: what guests have may be parked.
    private var hasWorked: Bool
    /// What is parked came from the service manager, and no worker has looked at it yet.
    private var isUnchecked: Bool

    /// `inherited`: what the service manager kept of a keeper that was killed; it is owned from now on.
    public init(inheriting inherited: [String: [Int32]] = [:]) {
        parked = inherited
        hasWorked = !inherited.isEmpty
        isUnchecked = !inherited.isEmpty
    }

    /// Runs `command` with `--keeper-fd 3` until it ends by itself with status 0, or SIGTERM or SIGINT comes; SIGHUP is passed
    /// on to it. With any other status it is started again. Returns the status to exit with. As long as anything is parked it goes on,
    /// whatever fails: what it holds is lost with it.
    public mutating func run(_ command: [String], log: (String) -> Void) throws(QuireError) -> Int32 {
        let signals = try SignalDescriptor([SIGTERM, SIGINT, SIGHUP, SIGCHLD])
        var pause: UInt32 = 0
        while true {
            isReady = false
            do throws(QuireError) {
                let (end, isStopping) = try runOnce(command, signals)
                if isStopping || end == .exited(0) { return stopped() }
                // It could not even start, and has said why.
                if case .exited(let status) = end, !hasWorked { return stopped(status) }
                let why = end == .exited(Self.replacement) ? "has a new configuration" : "\(end)"
                log("quired \(why), starting it again with \(parked.count) parked items")
            } catch {
                // The program is being replaced, or there is no memory for another process.
                guard !parked.isEmpty else { throw error }
                log("\(error): trying again")
            }
            // One that cannot start must not keep the machine busy.
            pause = isReady ? 10 : min(5000, max(10, pause * 2))
            let deadline = monotonicNanoseconds() + UInt64(pause) * 1_000_000
            while case let now = monotonicNanoseconds(), now < deadline {
                // Ends of children are signals too, and no reason to hurry.
                let left = Int32((deadline - now) / 1_000_000 + 1)
                // Who is started next reads its configuration anyway.
                if !waitReadable([signals.descriptor.raw], timeoutMilliseconds: left).isEmpty, Self.read(signals).stop {
                    return stopped()
                }
            }
        }
    }

    /// Who is started after this is to begin anew.
    private func stopped(_ status: Int32 = 0) -> Int32 {
        for (name, descriptors) in parked { ServiceManager.forget(name, count: descriptors.count) }
        return status
    }

    private mutating func runOnce(
        _ command: [String], _ signals: borrowing SignalDescriptor
    ) throws(QuireError) -> (ProcessEnd, isStopping: Bool) {
        var pair = try MessagePair()
        let near = UnixSocket(adopting: pair.takeNear())
        let far = pair.takeFar()
        let pid = try ProcessCalls.spawn(
            command + ["--keeper-fd", "3"], passing: [.init(from: far.raw, to: 3)], inheritOthers: false, ownGroup: true,
            parentDeathSignal: nil)
        _ = consume far
        // One that dies before it has read all of this is started again.
        try? handOver(near)
        let isStopping = attend(near, signals, pid)
        return (ProcessCalls.wait(pid, blocking: true) ?? .exited(127), isStopping)
    }

    private func handOver(_ socket: borrowing UnixSocket) throws(QuireError) {
        for (name, descriptors) in parked.sorted(by: { $0.key < $1.key }) {
            try socket.sendMessage(Array("P\(name)".utf8), passing: descriptors)
        }
        try socket.sendMessage(Array((isUnchecked ? "C" : "E").utf8))
    }

    /// Keeps what the worker sends until it is gone. True if it was told to go.
    private mutating func attend(
        _ socket: borrowing UnixSocket, _ signals: borrowing SignalDescriptor, _ pid: Int32
    ) -> Bool {
        var isStopping = false
        while true {
            let ready = waitReadable([socket.descriptor.raw, signals.descriptor.raw])
            if ready.contains(1) {
                let asked = Self.read(signals)
                if asked.stop {
                    isStopping = true
                    ProcessCalls.signal(pid, SIGTERM)
                }
                // One that does not know the signal yet dies of it, and the next one reads what is new all the same.
                if asked.reload { ProcessCalls.signal(pid, SIGHUP) }
            }
            guard ready.contains(0) else { continue }
            var descriptors = UnixSocket.PassedDescriptors()
            let received: [UInt8]?
            do {
                received = try socket.receiveMessage(
                    limit: Self.nameBytes + 1, maxDescriptors: Self.maxDescriptors, into: &descriptors)
            } catch {
                // Something was to be kept and is not (no room for its descriptors): another worker begins, and asks its list whether
                // all is there.
                isUnchecked = true
                ProcessCalls.signal(pid, SIGKILL)
                return isStopping
            }
            guard let message = received else { return isStopping }
            if message.first == UInt8(ascii: "R") {
                isReady = true
                hasWorked = true
                isUnchecked = false
                continue
            }
            let name = String(decoding: message.dropFirst(), as: UTF8.self)
            if let old = parked.removeValue(forKey: name) {
                ServiceManager.forget(name, count: old.count)
                for raw in old { close(raw) }
            }
            guard message.first == UInt8(ascii: "P") else { continue }
            var list: [Int32] = []
            while let descriptor = descriptors.next() { list.append(descriptor.release()) }
            parked[name] = list
            ServiceManager.store(name, list)
        }
    }

    /// Reads what signals there are, and what they ask for.
    private static func read(_ signals: borrowing SignalDescriptor) -> (stop: Bool, reload: Bool) {
        var stop = false, reload = false
        while let event = signals.next() {
            switch event.number {
            case SIGTERM, SIGINT: stop = true
            case SIGHUP: reload = true
            default: break
            }
        }
        return (stop, reload)
    }
}

/// The worker's side of a keeper.
public final class KeeperLink: Parking {
    private let socket: UnixSocket
    /// What an earlier worker had parked; taken once.
    package let parked: [ParkedItem]
    private let manifest: Mutex<Manifest>
    /// Why nothing is left of what was parked, if so.
    public let loss: String?

    /// Takes over everything that is parked.
    public init(adopting descriptor: consuming Descriptor) throws(QuireError) {
        let socket = UnixSocket(adopting: descriptor)
        var items: [ParkedItem] = []
        var found: Manifest.Entries = [:]
        var file: Descriptor?
        var isChecked = true
        while true {
            var descriptors = UnixSocket.PassedDescriptors()
            guard
                let message = try socket.receiveMessage(
                    limit: Keeper.nameBytes + 1, maxDescriptors: Keeper.maxDescriptors, into: &descriptors)
            else { throw QuireError(.closed, "the keeper is gone") }
            guard message.first == UInt8(ascii: "P") else {
                isChecked = message.first != UInt8(ascii: "C")
                break
            }
            let name = String(decoding: message.dropFirst(), as: UTF8.self)
            if name == Manifest.item {
                file = descriptors.next()
            } else {
                found[name] = try descriptors.identities()
                items.append(ParkedItem(name: name, descriptors: descriptors))
            }
        }
        let isListed = file.raw() != nil
        var manifest = try Manifest(file.take())
        // Not listed, though it is here: nobody relied on it yet, or nobody does any more.
        let listed = isChecked ? found : try manifest.read()
        let isComplete = listed?.allSatisfy { found[$0.key] == $0.value } == true
        loss = isComplete ? nil : "the service manager has not kept all that was parked: beginning anew, VMs go on with what they map"
        let valid = isComplete ? listed ?? [:] : [:]
        for item in items where valid[item.name] == nil { try socket.sendMessage(Array("U\(item.name)".utf8)) }
        try manifest.write(valid)
        if !isListed { try socket.sendMessage(Array("P\(Manifest.item)".utf8), passing: [manifest.file.raw]) }
        parked = items.filter { valid[$0.name] != nil }
        self.manifest = Mutex(manifest)
        self.socket = socket
    }

    /// The descriptor of an item that has one.
    public func takeParked(_ name: String) -> Descriptor? {
        parked.first { $0.name == name }?.descriptors.next()
    }

    public func park(_ name: String, _ descriptors: [Int32]) throws(QuireError) {
        precondition(name.utf8.count <= Keeper.nameBytes && descriptors.count <= Keeper.maxDescriptors)
        var files: [FileStatus.Identity] = []
        for raw in descriptors { files.append(try FileStatus(of: raw).identity) }
        try manifest.withLock { (manifest) throws(QuireError) in
            // On the list only once it was sent.
            try manifest.set(name, nil)
            do throws(QuireError) { try socket.sendMessage(Array("P\(name)".utf8), passing: descriptors) } catch {
                throw QuireError(.closed, "quired's keeper is gone, so nothing new can be kept: restart quired", cause: error)
            }
            try manifest.set(name, files)
        }
    }

    /// This process does its work: when it dies, it is started again at once.
    public func ready() { try? socket.sendMessage(Array("R".utf8)) }

    public func unpark(_ name: String) {
        manifest.withLock { manifest in
            // A list that says too much is one that nothing is taken over by.
            try? manifest.set(name, nil)
            try? socket.sendMessage(Array("U\(name)".utf8))
        }
    }
}
