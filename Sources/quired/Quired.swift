import ArgumentParser
import Glibc
import Host
import Logging
import PageStore
import Platform
import StoreProtocol

@main
struct Quired: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "quired",
        abstract: "Keep the equal pages of this host's VMs once.",
        discussion: """
            Owns the store that equal pages are kept in and the index that finds them. Backends of VMs connect to \
            DIRECTORY/store.sock. With --keep, what VMs use survives the death of this program, which is started again.
            """,
        version: "quired \(quireVersion)")

    @Option(help: ArgumentHelp("Where the socket is; made if it is missing.", valueName: "path"))
    var directory: String?

    @Option(help: "The most memory that shared pages may take: 4G. Half of the host's without it.")
    var limit: String?

    @Option(name: .customLong("candidates"), help: "Memory for contents seen once: 32M. 1/2048 of the host's without it.")
    var candidates: String?

    @Option(help: ArgumentHelp("A share group, and the users whose VMs may be in it. Repeatable.", valueName: "name=uid,…"))
    var group: [String] = []

    @Option(
        help: ArgumentHelp(
            "Merge nothing more while the host has less memory left than so many percent of what merged pages would need if all guests wrote them at once.",
            valueName: "percent"))
    var reserve = 100

    @Option(
        name: .customLong("shared-disk"),
        help: ArgumentHelp(
            "A disk in memory that VMs of a share group attach (quire run --shared-disk NAME); of this user's VMs without a group. Repeatable.",
            valueName: "name,size=SIZE[,group=G]"))
    var sharedDisk: [String] = []

    @Option(help: "Threads that answer.")
    var workers: Int?

    @Flag(help: "Stay above the program that does the work, keep its memory, and start it again when it dies.")
    var keep = false

    @Option(name: .customLong("keeper-fd"), help: .hidden)
    var keeper: Int32?

    @Option(name: .customLong("log-level"), help: "trace, debug, info, notice, warning, error or critical.")
    var logLevel = "notice"

    func run() throws {
        let status: Int32
        do throws(QuireError) {
            let configuration = try store()
            status = try keep && keeper == nil ? keepRunning() : serve(configuration)
        } catch {
            writeStandardError("quired: \(error)")
            throw ExitCode(1)
        }
        if status != 0 { throw ExitCode(status) }
    }

    private func keepRunning() throws(QuireError) -> Int32 {
        ProcessCalls.raiseFileLimit()
        var keeper = Keeper()
        let own = Files.target(ofLink: "/proc/self/exe") ?? CommandLine.arguments[0]
        return try keeper.run([own] + CommandLine.arguments.dropFirst()) { writeStandardError("quired: \($0)") }
    }

    private func serve(_ configuration: PageStore.Configuration) throws(QuireError) -> Int32 {
        guard let level = Logger.Level(rawValue: logLevel) else {
            throw QuireError(.invalid, "--log-level \(logLevel): choose trace, debug, info, notice, warning, error or critical")
        }
        var logger = Logger(label: "quired") { StreamLogHandler.standardError(label: $0) }
        logger.logLevel = level
        ProcessCalls.raiseFileLimit()
        ProcessCalls.ignoreBrokenPipes()
        let signals = try SignalDescriptor([SIGTERM, SIGINT])
        let link = if let keeper { try KeeperLink(adopting: Descriptor(owning: keeper)) } else { nil as KeeperLink? }
        let store =
            if let link { try PageStore(configuration, keeper: link, logger: logger) } else {
                try PageStore(configuration, logger: logger)
            }
        let path = try socketPath()
        let diskPath = SharedDiskClient.path(besideStore: path)
        let wanted = try sharedDisk.map { text throws(QuireError) in
            try SharedDisks.Disk(parsing: text, ownGroup: PageStore.ownGroup(ProcessCalls.ownUID), size: Size.parse)
        }
        let disks = try SharedDisks(wanted, store: store, keeper: link, logger: logger)
        let diskServer: SharedDiskServer? =
            disks.isEmpty
            ? nil
            : try SharedDiskServer(
                disks, listener: listener(diskPath, link, Self.diskListenerItem), logger: logger,
                commands: SharedDiskCommands(disks: disks).carryOut)
        let server = try StoreServer(
            store, listener: listener(path, link, Self.listenerItem),
            workers: workers ?? min(4, ProcessCalls.processorCount), logger: logger)
        logger.notice("listening on \(path), at most \(Size.exact(UInt64(configuration.limitPages) * 4096)) for shared pages")
        link?.ready()
        // Also by the one that a keeper has started: the service is the keeper's.
        ServiceManager.notify("READY=1")
        _ = waitReadable([signals.descriptor.raw])
        server.end()
        diskServer?.end()
        Files.remove(path)
        if diskServer != nil { Files.remove(diskPath) }
        return 0
    }

    /// With a keeper the socket listens on while this program is started again: who connects then waits, and is served.
    private func listener(_ path: String, _ link: KeeperLink?, _ item: String) throws(QuireError) -> UnixSocket {
        if let parked = link?.takeParked(item) { return UnixSocket(adopting: parked) }
        let listener = try UnixSocket.listen(at: path, kind: .messages, backlog: 128)
        try link?.park(item, [listener.descriptor.raw])
        return listener
    }
    private static let listenerItem = "listener", diskListenerItem = "disk listener"

    private func socketPath() throws(QuireError) -> String {
        let directory = self.directory ?? (ProcessCalls.isRoot ? "/run/quired" : nil)
            ?? ProcessCalls.environment("XDG_RUNTIME_DIR").map { $0 + "/quired" }
        guard let directory, directory.hasPrefix("/") else {
            throw QuireError(.invalid, "there is no runtime directory: give --directory and an absolute path")
        }
        try Files.makeDirectory(directory, mode: 0o750)
        // An older one may have been made with other rights. It must be ours: who owns it can replace the socket.
        let folder = try Descriptor.open(directory, O_RDONLY | O_DIRECTORY | O_NOFOLLOW)
        guard try folder.status().uid == ProcessCalls.ownUID else {
            throw QuireError(.invalid, "\(directory) belongs to another user: give --directory")
        }
        try folder.setMode(0o750)
        return directory + "/store.sock"
    }

    private func store() throws(QuireError) -> PageStore.Configuration {
        func bytes(_ text: String?, _ option: String, _ otherwise: Int) throws(QuireError) -> Int {
            guard let text else { return otherwise }
            guard let value = Size.parse(text).flatMap({ Int(exactly: $0) }), value >= 4096 else {
                throw QuireError(.invalid, "--\(option) \(text): give a size such as 512M")
            }
            return value
        }
        var configuration = try PageStore.Configuration(
            limitPages: bytes(limit, "limit", ProcessCalls.memoryBytes / 2) / 4096,
            candidateBytes: bytes(candidates, "candidates", ProcessCalls.memoryBytes / 2048))
        guard (0...100_000).contains(reserve) else { throw QuireError(.invalid, "--reserve \(reserve): give a percentage, such as 50") }
        configuration.reservePercent = reserve
        for text in group {
            let parts = text.split(separator: "=", omittingEmptySubsequences: false)
            let users = parts.count == 2 ? parts[1].split(separator: ",").map { UInt32($0) } : []
            guard !users.isEmpty, !users.contains(nil), PageStore.isGroupName(String(parts[0])) else {
                throw QuireError(.invalid, "--group \(text): give NAME=UID or NAME=UID,UID; NAME does not begin with owner-")
            }
            configuration.groups[String(parts[0])] = Set(users.compactMap { $0 })
        }
        return configuration
    }
}
