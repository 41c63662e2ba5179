import FoundationEssentials
import Glibc
import Platform

/// The backend of a VM whose QEMU somebody else starts (libvirt): `quire serve` keeps it running, watches it and replaces it,
/// exactly as `quire run` does. It starts before QEMU and is told to end, by SIGTERM, when QEMU has gone.
///
///     BASE/NAME/settings       what libvirt's hook asks for (`Settings`); its text also says whose the VM is
///     BASE/NAME/log            what service and backend say, where no journal takes it
///     BASE/NAME/qemu/          the sockets that QEMU connects to, for QEMU's group alone
///
/// Guest RAM is QEMU's, and the backend takes it from the memory table. The page map is here, and dies with this process: then
/// the backend sees its lifeline end, touches nothing any more, and serves the disk for as long as QEMU is there.
public enum BackendService {
    /// What the VM asks for. JSON.
    public struct Settings: Codable, Sendable, Equatable {
        /// Of the domain; the name is its own for as long as it runs.
        public var owner: String
        public var merges = true
        public var swapBytes: UInt64?
        /// The guest's memory comes from elsewhere, it seems, and what it had swapped does not.
        public var awaitsSwap = false
        /// Such a guest takes the shared disks as they are: it has nothing mounted, an operator says.
        public var acceptsDisks: Bool?
        public var group = ""
        public var periodMilliseconds: UInt64?
        public var isSingleThreadedTCG = false
        /// Disks of quired's that it shares with other VMs. Nil: none; also where a hook of before they were there has written this.
        public var sharedDisks: [Disk]?

        public struct Disk: Codable, Sendable, Equatable {
            public var name: String
            /// What the operator takes it for.
            public var byteCount: UInt64?
            /// Names its content (`SharedDiskMessage`). From the hook: what a guest that comes from elsewhere knows; once the service
            /// is ready: what the guest has.
            public var content: UInt64?
            public init(name: String, byteCount: UInt64? = nil, content: UInt64? = nil) {
                self.name = name
                self.byteCount = byteCount
                self.content = content
            }
        }

        public init(owner: String) { self.owner = owner }

        public func write(to path: String) throws(QuireError) {
            let file = try Descriptor.open(path, O_RDWR | O_CREAT | O_NOFOLLOW)
            guard let data = try? JSONEncoder().encode(self) else { throw QuireError(.invalid, "cannot write settings") }
            try file.replaceContent(String(decoding: data, as: UTF8.self) + "\n")
        }

        public static func read(_ path: String) throws(QuireError) -> Settings {
            let text = try Files.read(path)
            do { return try JSONDecoder().decode(Settings.self, from: Data(text.utf8)) } catch {
                throw QuireError(.invalid, "\(path) is damaged: end the VM and start it again", cause: error)
            }
        }
    }

    /// What to type where a guest from a saved image is refused because of a shared disk.
    public static func acceptance(_ name: String) -> String { "type quire libvirt accept-disks \(name)" }

    /// Serves until SIGTERM or SIGINT. `settings`: of the VM; period, group and shared disks of them are in `base` already, with what
    /// else has a say there. `isReady` is called when QEMU may be started.
    public static func run(
        _ name: String, _ settings: Settings, _ base: Supervisor.Configuration, in directory: RuntimeDirectory, isReady: () -> Void
    ) throws(QuireError) {
        ProcessCalls.ignoreBrokenPipes()
        let signals = try SignalDescriptor(Supervisor.forwarded + [SIGCHLD])
        guard Files.isExecutable(base.backendPath) else {
            throw QuireError(.invalid, "there is no program \(base.backendPath): install quire-backend beside quire, or name it with --backend")
        }
        var configuration = base
        configuration.name = name
        if !settings.merges { configuration.merging = nil }
        // How its pages are kept is the host's matter.
        if let bytes = settings.swapBytes {
            configuration.swap = base.swap ?? SwapDisk.Options(byteCount: bytes)
            configuration.swap?.byteCount = bytes
            configuration.swap?.awaitsRestore = settings.awaitsSwap
        } else {
            configuration.swap = nil
        }
        var settings = settings
        var disks = settings.sharedDisks ?? []
        for (index, disk) in configuration.sharedDisks.enumerated() {
            let content = disks.first { $0.name == disk.name }?.content
            configuration.sharedDisks[index].known = settings.acceptsDisks == true ? .anything : content.map { .content($0) } ?? .nothing
            configuration.sharedDisks[index].acceptance = Self.acceptance(name)
        }
        try configuration.askForSharedDisks()
        if !disks.isEmpty {
            for index in disks.indices {
                disks[index].content = configuration.sharedDisks.first { $0.name == disks[index].name }?.identity?.id
            }
            settings.sharedDisks = disks
            try settings.write(to: directory.settingsPath(name))
        }
        // Sockets are made for QEMU's group as well, and so are those of a backend that has to be started again. The folder
        // decides who gets to them.
        ProcessCalls.setFileCreationMask(0o007)
        let claim = try directory.claim(name)
        var failure: QuireError?
        do {
            try directory.makeQEMUFolder(name)
            var supervisor = try Supervisor(
                configuration, claim, [], signals, memorySlots: false, singleThreadedTCG: settings.isSingleThreadedTCG,
                sockets: directory.qemuFolder(name))
            try supervisor.serve(isReady: isReady)
        } catch { failure = error }
        // What went wrong may stand in the log alone: whoever started us reads it.
        directory.removeServiceFiles(name, log: failure == nil)
        claim.remove()
        if let failure { throw failure }
    }
}

extension Supervisor {
    /// Keeps the backend running until a signal comes.
    fileprivate mutating func serve(isReady: () -> Void) throws(QuireError) {
        let started = monotonicNanoseconds()
        do { try startBackend(now: started) } catch {
            throw QuireError(.system, "cannot start the backend \(configuration.backendPath)", errno: error.errno)
        }
        if try awaitBackend(since: started) != nil { return endBackend() }
        isReady()
        while true {
            _ = waitReadable([signals.descriptor.raw], timeoutMilliseconds: Int32(watch.nextLook / 1_000_000))
            while let event = signals.next() {
                if event.number == SIGTERM || event.number == SIGINT { return endBackend() }
            }
            tend(now: monotonicNanoseconds())
        }
    }
}

extension RuntimeDirectory {
    public func settingsPath(_ name: String) -> String { folder(name) + "/settings" }
    public func logPath(_ name: String) -> String { folder(name) + "/log" }
    public func qemuFolder(_ name: String) -> String { folder(name) + "/qemu" }

    /// The VM's folder, for its settings to be put there. Others may go through it to the sockets that they may use.
    public func prepareService(_ name: String) throws(QuireError) {
        try Self.checkName(name)
        try prepare()
        try Files.makeDirectory(folder(name), mode: 0o700)
        for path in [base, folder(name)] { try Files.setAccess(path, mode: 0o711) }
    }

    /// The guest that is started next is to come from a saved image. A start that fails early leaves this note behind, for a
    /// guest that does not; so it counts only until QEMU connects, and where QEMU's command line cannot be read.
    public func noteArrival(_ name: String) throws(QuireError) {
        try prepareService(name)
        _ = try Descriptor.open(arrivalPath(name), O_RDWR | O_CREAT | O_NOFOLLOW)
    }
    /// Whether it does; asked once.
    public func takeArrival(_ name: String) -> Bool {
        defer { Files.remove(arrivalPath(name)) }
        return Files.identity(of: arrivalPath(name)) != nil
    }
    private func arrivalPath(_ name: String) -> String { folder(name) + "/arrives" }

    /// The guest that is started next takes its shared disks as they are, whatever it knows of them.
    public func noteAcceptance(_ name: String) throws(QuireError) {
        try prepareService(name)
        _ = try Descriptor.open(acceptancePath(name), O_RDWR | O_CREAT | O_NOFOLLOW)
    }
    public func isAccepting(_ name: String) -> Bool { Files.identity(of: acceptancePath(name)) != nil }
    /// Whether it does; asked once.
    public func takeAcceptance(_ name: String) -> Bool {
        defer { Files.remove(acceptancePath(name)) }
        return isAccepting(name)
    }
    private func acceptancePath(_ name: String) -> String { folder(name) + "/accepts" }

    /// The line that a service ends with, for whoever started it.
    public func noteFailure(_ name: String, _ line: String) {
        guard let file = try? Descriptor.open(logPath(name), O_RDWR | O_CREAT | O_NOFOLLOW) else { return }
        try? file.replaceContent(line + "\n")
    }

    func makeQEMUFolder(_ name: String) throws(QuireError) {
        removeSockets(name)
        try Files.makeDirectory(qemuFolder(name), mode: 0o700)
    }

    /// Lets QEMU, which runs as a member of `group`, connect to what is in its folder now and later (setgid).
    public func admit(group: UInt32, to name: String) throws(QuireError) {
        try Files.setAccess(qemuFolder(name), mode: 0o2710, group: group)
        for socket in Files.list(qemuFolder(name)) ?? [] {
            try Files.setAccess(qemuFolder(name) + "/" + socket, mode: 0o660, group: group)
        }
    }

    private func removeSockets(_ name: String) {
        for socket in Files.list(qemuFolder(name)) ?? [] { Files.remove(qemuFolder(name) + "/" + socket) }
        Files.removeDirectory(qemuFolder(name))
    }

    func removeServiceFiles(_ name: String, log: Bool) {
        removeSockets(name)
        Files.remove(settingsPath(name))
        Files.remove(arrivalPath(name))
        if log { Files.remove(logPath(name)) }
    }

    /// Removes what a service has left that could not start.
    public func removeFailedService(_ name: String) {
        guard !isRunning(name) else { return }
        removeServiceFiles(name, log: true)
        Files.removeDirectory(folder(name))
    }
}
