import Engines
import Glibc
import Platform

/// `quire run`: one QEMU, its backend, and what has to outlive a backend: guest RAM, the page map, the socket that
/// QEMU connects to, and the VM's name.
///
/// The backend is watched and replaced whenever it dies or is stuck; QEMU notices no more than a pause of its control
/// disk. A new backend starts only after the old one was waited for, so that no thread of the old one runs any more.
/// If the supervisor itself dies, QEMU and the backend go on: the backend sees that the lifeline has closed.
///
/// One thread, no locks: signals and the ends of children arrive through a signalfd, everything else is
/// looked after a few times a second. A second one answers `quire config reload` (`Tuner`).
public struct Supervisor: ~Copyable {
    public struct Configuration: Sendable {
        /// Nil: QEMU's -name, else qemu-PID.
        public var name: String?
        public var periodMilliseconds: UInt64 = 10_000
        public var workers = 1
        public var backendPath: String
        public var logLevel = "notice"
        /// quired's socket; nil: where it is by default.
        public var store: String?
        /// Merging of equal pages; nil: QEMU runs without the agent.
        public var merging: Merging?

        public struct Merging: Sendable {
            /// libquire-agent.so.
            public var agentPath: String
            public var periodMilliseconds: UInt64 = 10_000
            public var workers = 1
            /// Whether the kernel is asked what the guest writes.
            public var tracksWrites = true
            public var group = ""
            /// False: the agent is there, and nothing is merged.
            public var isOn = true
            public init(agentPath: String) { self.agentPath = agentPath }
        }
        /// The swap disk; nil: none. `awaitsRestore` follows from QEMU's arguments, where they are known.
        public var swap: SwapDisk.Options?
        /// Disks that it shares with others. Their identity and token are found out here.
        public var sharedDisks: [SharedDisk.Options] = []
        /// QEMU's program and arguments.
        public var arguments: [String]
        /// Reads the host's configuration again; nil: there is none for this VM.
        public var reload: (@Sendable () throws(QuireError) -> Reloaded)?
        /// One line for the user.
        public var log: @Sendable (String) -> Void = { writeStandardError("quire: " + $0) }
        public init(backendPath: String, arguments: [String]) {
            self.backendPath = backendPath
            self.arguments = arguments
        }

        /// Of the VM: what was asked for, QEMU's -name, or qemu-PID.
        public var vmName: String { name ?? QEMUCommandLine.vmName(arguments) ?? "qemu-\(ProcessCalls.ownPID)" }

        /// Asks quired what its shared disks are. All backends of this VM say the same of themselves to quired.
        mutating func askForSharedDisks() throws(QuireError) {
            for index in sharedDisks.indices {
                try sharedDisks[index].ask()
                sharedDisks[index].token = UInt64.random(in: 1 ... .max)
            }
        }
    }

    static let readyWithin: UInt64 = 10_000_000_000
    static let endWithin: UInt64 = 2_000_000_000
    static let forwarded: [Int32] = [SIGTERM, SIGINT, SIGHUP, SIGQUIT, SIGUSR1, SIGUSR2]
    /// QEMU's descriptors of ours start here, out of the way of what the user passes down (`fd=3`).
    static let firstQEMUDescriptor: Int32 = 100

    let configuration: Configuration
    private let memorySlots: Bool
    private let singleThreadedTCG: Bool
    let name: String
    private let ram: DescriptorList
    private let pageMap: PageMapFile
    let control: UnixSocket
    private let swap: SwapParts?
    /// Where QEMU connects to the shared disks, in order.
    private let sharedSockets: DescriptorList
    private let status: StatusPage.Supervisor
    private let lifelineReader: Descriptor
    /// Its end of file tells a backend that nobody watches it any more. No child has it.
    private let lifelineWriter: Descriptor
    let signals: SignalDescriptor
    private let statusPath: String
    private let agentSocketPath: String
    private let commandPath: String
    private let tuner: Tuner

    /// What has to outlive a backend: the store's file and the socket.
    private struct SwapParts: ~Copyable {
        let options: SwapDisk.Options
        let store: Descriptor
        let socket: UnixSocket

        static func make(
            _ options: SwapDisk.Options?, name: String, socket path: String
        ) throws(QuireError) -> SwapParts? {
            guard let options else { return nil }
            try options.checkStore()
            let store = try Tmem.makeFile(name: "quire-\(name)-swap")
            let socket = try UnixSocket.listen(at: path)
            return SwapParts(options: options, store: store, socket: socket)
        }
    }

    private var backend: ChildProcess?
    var watch = BackendWatch(startedAt: 0)
    private var backendStarted: UInt64 = 0
    private var backoff = RestartBackoff()
    /// Why the last backend had to go, to be said when the next one starts.
    private var lossReason = ""
    private var restartAt: UInt64 = 0

    /// Runs QEMU to its end. Returns the status to exit with: QEMU's own, or 128 and the number of the signal that killed
    /// it. Throws if it could not be started.
    public static func run(
        _ configuration: Configuration, directory: RuntimeDirectory
    ) throws(QuireError) -> Int32 {
        ProcessCalls.ignoreBrokenPipes()
        let signals = try SignalDescriptor(forwarded + [SIGCHLD])

        guard let program = configuration.arguments.first else {
            throw QuireError(.invalid, "no QEMU command: put it behind --, as in: quire run -- qemu-system-x86_64 -m 2G …")
        }
        if let agent = configuration.merging?.agentPath, (try? Descriptor.open(agent, O_RDONLY)) == nil {
            throw QuireError(.invalid, "cannot read the agent \(agent): name it with --agent, or merge nothing with --no-merge")
        }
        guard Files.isExecutable(configuration.backendPath) else {
            throw QuireError(
                .invalid, "there is no program \(configuration.backendPath): install quire-backend beside quire, or name it with --backend")
        }
        let version = QEMUCommandLine.Version(
            versionOutput: try ChildProcess.output(of: [program, "--version"]))
        let name = configuration.vmName
        try RuntimeDirectory.checkName(name)
        let command = try QEMUCommandLine(
            configuration.arguments, controlSocket: directory.folder(name) + "/control.sock",
            disks: (configuration.swap.map { [.init(id: QEMUCommandLine.swapID, socket: directory.folder(name) + "/swap.sock", queueCount: $0.queueCount)] } ?? [])
                + configuration.sharedDisks.enumerated().map {
                    .init(id: QEMUCommandLine.sharedID($0), socket: directory.sharedSocketPath(name, $0), queueCount: $1.queueCount)
                },
            version: version)
        var configuration = configuration
        if command.bringsMemory {
            configuration.swap?.awaitsRestore = true
            for disk in configuration.sharedDisks { try disk.checkArrival() }
        }
        try configuration.askForSharedDisks()

        let claim = try directory.claim(name)
        let result: Int32
        do {
            // Older ones may lose track of a backend that is replaced; memory slots would then be fatal.
            let offersSlots = version.map { $0 >= QEMUCommandLine.Version(9, 1) } == true
            var supervisor = try Supervisor(configuration, claim, command.ramFiles, signals, memorySlots: offersSlots, singleThreadedTCG: command.isSingleThreadedTCG)
            result = try supervisor.run(command, lock: claim.lock)
        } catch {
            claim.remove()
            throw error
        }
        claim.remove()
        return result
    }

    /// `sockets`: the folder of those that QEMU connects to, if it is not the VM's own.
    init(
        _ configuration: Configuration, _ claim: borrowing RuntimeDirectory.Claim, _ files: [QEMUCommandLine.RAMFile],
        _ signals: consuming SignalDescriptor, memorySlots: Bool, singleThreadedTCG: Bool, sockets: String? = nil
    ) throws(QuireError) {
        self.configuration = configuration
        self.memorySlots = memorySlots
        self.singleThreadedTCG = singleThreadedTCG
        name = claim.name
        statusPath = claim.statusPath
        agentSocketPath = sockets.map { $0 + "/agent.sock" } ?? claim.agentSocketPath
        commandPath = claim.directory.commandPath(claim.name)
        var list = DescriptorList()
        for file in files {
            let memfd = try Memfd(name: "quire-\(claim.name)-\(file.id)", byteCount: file.byteCount)
            list.append(try memfd.descriptor.duplicate(atLeast: Self.firstQEMUDescriptor))
        }
        let map = try PageMapFile(name: "quire-\(claim.name)-map")
        let socket = try UnixSocket.listen(at: sockets.map { $0 + "/control.sock" } ?? claim.controlSocketPath)
        let swapParts = try SwapParts.make(
            configuration.swap, name: claim.name, socket: sockets.map { $0 + "/swap.sock" } ?? claim.swapSocketPath)
        var sharedSockets = DescriptorList()
        for number in configuration.sharedDisks.indices {
            let path = sockets.map { RuntimeDirectory.sharedSocket(number, in: $0) } ?? claim.sharedSocketPath(number)
            sharedSockets.append(try UnixSocket.listen(at: path).takeDescriptor())
        }
        let page = try StatusPage.Supervisor(path: claim.statusPath)
        let tuner = try Tuner(configuration, claim.name, in: claim.directory)
        var pipe = try Pipe()
        ram = list
        pageMap = map
        control = socket
        swap = swapParts
        self.sharedSockets = sharedSockets
        status = page
        self.tuner = tuner
        lifelineReader = pipe.takeReader()
        lifelineWriter = pipe.takeWriter()
        self.signals = signals
    }

    // MARK: The backend

    mutating func startBackend(now: UInt64) throws(QuireError) {
        var options = ChildProcess.Options()
        // Nothing to read; and stdout is QEMU's, which may carry a guest's console.
        let null = try Descriptor.open("/dev/null", O_RDWR)
        options.passing = [
            .init(from: null.raw, to: 0), .init(from: 2, to: 1),
            .init(from: control.descriptor.raw, to: 3), .init(from: pageMap.file.descriptor.raw, to: 4),
            .init(from: lifelineReader.raw, to: 5),
        ]
        options.ownGroup = true
        let tuning = tuner.tuning
        var arguments = [configuration.backendPath, "--name", name, "--device", "control,fd=3"]
        for (index, raw) in ram.raw.enumerated() {
            options.passing.append(.init(from: raw, to: Int32(6 + index)))
            arguments += ["--ram", "fd=\(6 + index)"]
        }
        switch swap {
        case .some(let swap):
            let first = Int32(6 + ram.raw.count)
            options.passing += [.init(from: swap.socket.descriptor.raw, to: first), .init(from: swap.store.raw, to: first + 1)]
            var disk = swap.options
            if let tuned = tuning.swap {
                (disk.compression, disk.overcommit, disk.reserve) = (tuned.compression, tuned.overcommit, tuned.reserve ?? disk.reserve)
            }
            arguments += ["--device", disk.device("fd=\(first)", store: first + 1)]
        case .none: break
        }
        let firstShared = Int32(8 + ram.raw.count)
        for (index, shared) in configuration.sharedDisks.enumerated() {
            options.passing.append(.init(from: sharedSockets.raw[index], to: firstShared + Int32(index)))
            arguments += ["--device", shared.device("fd=\(firstShared + Int32(index))")]
        }
        arguments += [
            "--page-map-fd", "4", "--status", statusPath, "--supervisor-fd", "5",
            "--period", "\(tuning.periodMilliseconds)ms", "--workers", "\(tuning.workers ?? configuration.workers)",
            "--log-level", tuning.logLevel ?? configuration.logLevel,
        ]
        arguments += ["--command-socket", commandPath]
        if let place = tuning.place, place.path != StoreLink.standardPath() { arguments += ["--store", place.path] }
        if let merging = configuration.merging {
            arguments += [
                "--agent-socket", agentSocketPath, "--merge-period", "\(tuning.mergePeriodMilliseconds)ms",
                "--merge-workers", "\(tuning.mergeWorkers ?? merging.workers)",
            ]
            if !(tuning.tracksWrites ?? merging.tracksWrites) { arguments.append("--no-write-tracking") }
            if let group = tuning.place?.group, !group.isEmpty { arguments += ["--group", group] }
            if tuning.merges == false { arguments.append("--unmerged") }
        }
        if memorySlots { arguments.append("--memory-slots") }
        if singleThreadedTCG { arguments.append("--single-threaded-tcg") }
        backend = try ChildProcess(arguments, options)
        backendStarted = now
        // It finds its pages again before it serves: a second a GiB is ample.
        let more = (configuration.swap?.byteCount ?? 0) >> 30 * 1_000_000_000
        watch = BackendWatch(startedAt: now, startTime: BackendWatch.startTime + more)
    }

    /// Looks after the backend once.
    mutating func tend(now: UInt64) {
        if let pid = backend?.pid {
            if let end = backend?.poll() {
                let reason = lossReason.isEmpty ? "\(end)" : lossReason
                lossReason = "backend \(pid) \(reason)"
                backend = nil
                restartAt = now + backoff.delay(afterLifetime: now - backendStarted)
            } else if let trouble = watch.check(
                now: now, heartbeat: pageMap.heartbeat(of: pid), claims: pageMap.openClaims()), lossReason.isEmpty
            {
                // SIGKILL also ends a stopped or frozen-and-thawed process. We go on when it has been waited for.
                lossReason = trouble
                backend?.signal(SIGKILL)
            }
        }
        if backend == nil && now >= restartAt {
            status.countRestart()
            do {
                try startBackend(now: now)
                configuration.log("\(name): \(lossReason): started another (restart \(status.restarts))")
                lossReason = ""
            } catch {
                configuration.log("\(name): \(lossReason): \(error), trying again")
                restartAt = now + backoff.delay(afterLifetime: 0)
            }
        }
    }

    mutating func endBackend() {
        // Whoever asks the backend for something just now is answered by its end.
        tuner.stop()
        defer { tuner.end() }
        guard backend != nil else { return }
        backend!.signal(SIGTERM)
        // A stopped process takes no SIGTERM.
        backend!.signal(SIGCONT)
        let deadline = monotonicNanoseconds() + Self.endWithin
        while backend!.poll() == nil && monotonicNanoseconds() < deadline {
            _ = waitReadable([signals.descriptor.raw], timeoutMilliseconds: 20)
            while signals.next() != nil {}
        }
        if backend!.poll() == nil {
            backend!.signal(SIGKILL)
            backend!.wait()
        }
        backend = nil
    }

    // MARK: QEMU

    private mutating func run(_ command: QEMUCommandLine, lock: borrowing Descriptor) throws(QuireError) -> Int32 {
        let started = monotonicNanoseconds()
        do {
            try startBackend(now: started)
        } catch {
            throw QuireError(.system, "cannot start the backend \(configuration.backendPath)", errno: error.errno)
        }
        if let interrupted = try awaitBackend(since: started) {
            endBackend()
            return interrupted
        }

        var options = ChildProcess.Options()
        // The RAM at the numbers that the command line names; the lock, so that the name stays taken while QEMU lives.
        options.passing = ram.raw.map { .init(from: $0, to: $0) } + [.init(from: lock.raw, to: Self.lockDescriptor(ram.raw))]
        options.inheritOthers = true
        if let merging = configuration.merging {
            let others = ProcessCalls.environment("LD_PRELOAD").map { ":" + $0 } ?? ""
            options.variables = ["LD_PRELOAD": merging.agentPath + others, "QUIRE_AGENT_SOCKET": agentSocketPath]
        }
        var qemu: ChildProcess
        do {
            qemu = try ChildProcess(command.arguments(ramDescriptors: ram.raw), options)
        } catch {
            endBackend()
            throw error
        }
        // Whatever fails from here on, QEMU runs; a name that is noted badly is no reason to end it.
        do { try lockNote(lock, qemu.pid) } catch { configuration.log("\(name): \(error)") }

        while true {
            _ = waitReadable([signals.descriptor.raw], timeoutMilliseconds: Int32(watch.nextLook / 1_000_000))
            while let event = signals.next() {
                guard event.number != SIGCHLD else { continue }
                // What the terminal sends, it sends to the whole foreground group, QEMU included.
                if !event.fromKernel { qemu.signal(event.number) }
            }
            if let end = qemu.poll() {
                endBackend()
                return end.shellStatus
            }
            tend(now: monotonicNanoseconds())
        }
    }

    private func lockNote(_ lock: borrowing Descriptor, _ pid: Int32) throws(QuireError) {
        try lock.replaceContent("\(ProcessCalls.ownPID)\n\(pid)\n")
    }

    private static func lockDescriptor(_ taken: [Int32]) -> Int32 { (taken.max() ?? firstQEMUDescriptor) + 1 }

    /// Waits until the backend has beaten once. Returns a status to exit with if a signal came instead.
    mutating func awaitBackend(since started: UInt64) throws(QuireError) -> Int32? {
        while true {
            let pid = backend?.pid ?? 0
            if (pageMap.heartbeat(of: pid) ?? 0) > 0 { return nil }
            if let end = backend!.poll() {
                throw QuireError(.closed, "the backend \(end) before it was ready: see its message above")
            }
            if monotonicNanoseconds() - started > Self.readyWithin {
                endBackend()
                throw QuireError(.closed, "the backend was not ready within \(Self.readyWithin / 1_000_000_000) s: try --log-level debug")
            }
            _ = waitReadable([signals.descriptor.raw], timeoutMilliseconds: 5)
            while let event = signals.next() {
                if event.number != SIGCHLD { return 128 + event.number }
            }
        }
    }
}

extension QEMUCommandLine {
    /// QEMU's `-name`, made a valid VM name; nil without one.
    public static func vmName(_ arguments: [String]) -> String? {
        guard let guest = guestName(arguments), !guest.isEmpty else { return nil }
        var name = String(guest.unicodeScalars.map { scalar in
            let character = Character(scalar)
            return RuntimeDirectory.isValidName("x" + String(character)) ? character : "-"
        }.prefix(64))
        if name.hasPrefix(".") { name = "-" + name.dropFirst() }
        return name
    }
}
