import ArgumentParser
import Configuration
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

            SIGHUP reads the configuration again and applies it; nothing that VMs share is lost. For candidates, workers and further \
            shared disks another process takes this one's place, which takes --keep: without it they wait for the next start. If \
            something is wrong, one line says so, and all stays.

            Exit status: 0 after SIGTERM or SIGINT, 1 on a failure (one line on stderr says why), 64 on wrong usage.
            """,
        version: "quired \(quireVersion)")

    @Option(help: ArgumentHelp("Where the socket is; made if it is missing.", valueName: "path"))
    var directory: String?

    @Option(help: ArgumentHelp("The configuration (default: /etc/quire/quire.toml, or in etc of where quired is installed); options beat it.", valueName: "file"))
    var config: String?

    @Option(help: "The most memory that shared pages may take: 4G (default: half of the host's).")
    var limit: String?

    @Option(name: .customLong("candidates"), help: "Memory for contents seen once: 32M (default: 3/4096 of the host's).")
    var candidates: String?

    @Option(help: ArgumentHelp("A share group, and the users whose VMs may be in it. Repeatable.", valueName: "name=uid,…"))
    var group: [String] = []

    @Option(
        help: ArgumentHelp(
            "Merge nothing more while the host has less memory left than so many percent of what merged pages would need if all guests wrote them at once (default: 100).",
            valueName: "percent"))
    var reserve: String?

    @Option(
        name: .customLong("tmem-reserve"),
        help: ArgumentHelp("Put nothing more on shared disks while the host has less memory left than this, free swap included: writes are I/O errors then (default: 256M; 0: never).", valueName: "size"))
    var tmemReserve: String?

    @Option(
        name: .customLong("tmem-cap"),
        help: ArgumentHelp(
            "The most memory that swap disks of VMs and shared disks may use together: 16G (default: no limit). Writes above it are I/O errors.",
            valueName: "size"))
    var tmemCap: String?

    @Option(
        name: .customLong("shared-disk"),
        help: ArgumentHelp(
            "A disk in memory that VMs of a share group attach (quire run --shared-disk NAME); of this user's VMs without a group. Repeatable.",
            valueName: "name,size=SIZE[,group=G]"))
    var sharedDisk: [String] = []

    @Option(help: "Threads that answer (default: one a processor, at most 4).")
    var workers: String?

    @Flag(help: "Stay above the program that does the work, keep its memory, and start it again when it dies.")
    var keep = false

    @Option(name: .customLong("keeper-fd"), help: .hidden)
    var keeper: Int32?

    @Option(name: .customLong("log-level"), help: "trace, debug, info, notice, warning, error or critical (default: notice).")
    var logLevel: String?

    func run() throws {
        let status: Int32
        do throws(QuireError) {
            if keep && keeper == nil {
                status = try keepRunning()
            } else {
                status = try serve()
            }
        } catch {
            writeStandardError("quired: \(error)")
            throw ExitCode(1)
        }
        if status != 0 { throw ExitCode(status) }
    }

    private var arguments: [String: RawValue] {
        [
            Keys.Quired.limit.name: .argument(limit), Keys.Quired.candidates.name: .argument(candidates),
            Keys.Quired.group.name: .arguments(group), Keys.Quired.reserve.name: .argument(reserve),
            Keys.Quired.tmemReserve.name: .argument(tmemReserve), Keys.Quired.tmemCap.name: .argument(tmemCap),
            Keys.Quired.sharedDisk.name: .arguments(sharedDisk), Keys.Quired.workers.name: .argument(workers),
            Keys.Quired.logLevel.name: .argument(logLevel),
        ].compactMapValues { $0 }
    }

    private func keepRunning() throws(QuireError) -> Int32 {
        ProcessCalls.raiseFileLimit()
        let inherited = ServiceManager.takeStored()
        // What is wrong is said before there is anything to keep.
        if inherited.isEmpty { _ = try Settings.begin(config, arguments, keeper: nil) }
        var keeper = Keeper(inheriting: inherited)
        let own = Files.target(ofLink: "/proc/self/exe") ?? CommandLine.arguments[0]
        return try keeper.run([own] + CommandLine.arguments.dropFirst()) { writeStandardError("quired: \($0)") }
    }

    private func serve() throws(QuireError) -> Int32 {
        ProcessCalls.raiseFileLimit()
        ProcessCalls.ignoreBrokenPipes()
        let signals = try SignalDescriptor([SIGTERM, SIGINT, SIGHUP])
        let link = if let keeper { try KeeperLink(adopting: Descriptor(owning: keeper)) } else { nil as KeeperLink? }
        let settings = try Settings.begin(config, arguments, keeper: link)
        let logger = Logger.adjustable("quired", settings.logLevel)
        if let loss = link?.loss { logger.error("\(loss)") }
        if let trouble = settings.trouble { logger.error("\(trouble): going on with what held before") }
        let configuration = try settings.store()
        let store =
            if let link { try PageStore(configuration, keeper: link, logger: logger) } else {
                try PageStore(configuration, logger: logger)
            }
        let path = try socketPath()
        let diskPath = SharedDiskClient.path(besideStore: path)
        let tmem = TmemLedger(cap: settings.tmemCap)
        let disks = try SharedDisks(
            settings.disks, reserve: settings.tmemReserve, ledger: tmem, store: store, keeper: link, logger: logger)
        let diskServer: SharedDiskServer? =
            disks.isEmpty
            ? nil
            : try SharedDiskServer(
                disks, listener: listener(diskPath, link, Self.diskListenerItem), logger: logger,
                commands: SharedDiskCommands(disks: disks).carryOut)
        let server = try StoreServer(
            store, tmem: tmem, listener: listener(path, link, Self.listenerItem), workers: settings.workers, logger: logger)
        let reloading = try Reloading(settings, config, arguments, store: store, disks: disks, tmem: tmem, keeper: link, logger: logger)
        let commands = try CommandSocket.Server(path: StoreLink.commandPath(besideStore: path), mode: 0o600, logger: logger) {
            request throws(QuireError) in
            guard request.text == "reload" else { throw QuireError(.unsupported, "this quired does not know the command '\(request.text)'") }
            return try reloading.reload().joined(separator: "\n")
        }
        logger.notice("listening on \(path), at most \(Size.exact(UInt64(configuration.limitPages) * 4096)) for shared pages")
        link?.ready()
        // Also by the one that a keeper has started: the service is the keeper's.
        ServiceManager.notify("READY=1")
        var isReplaced = false
        serving: while !isReplaced {
            isReplaced = waitReadable(
                [signals.descriptor.raw, reloading.replacement.descriptor.raw],
                timeoutMilliseconds: disks.isEmpty ? -1 : Self.reviewMilliseconds
            ).contains(1)
            disks.reviewQuota()
            while let event = signals.next() {
                guard event.number == SIGHUP else {
                    isReplaced = false
                    break serving
                }
                // What it says, the log says.
                _ = try? reloading.reload()
            }
        }
        // First, so that whoever asked for it hears what changed.
        commands.end(keepsPath: isReplaced)
        server.end()
        diskServer?.end()
        // The next one goes on with the sockets that are parked.
        if isReplaced { return Keeper.replacement }
        Files.remove(path)
        if diskServer != nil { Files.remove(diskPath) }
        return 0
    }

    /// With a keeper the socket listens on while this program is started again: who connects then waits, and is served.
    private func listener(_ path: String, _ link: KeeperLink?, _ item: String) throws(QuireError) -> UnixSocket {
        let listener: UnixSocket
        if let parked = link?.takeParked(item) { listener = UnixSocket(adopting: parked) } else {
            listener = try UnixSocket.listen(at: path, kind: .messages, backlog: 128)
            try link?.park(item, [listener.descriptor.raw])
        }
        // Of root's it is the folder that decides who gets here: beside root quire-exporter, who may look into every folder, and is in
        // no group that could do more. Everybody is known by his user then.
        if Observers.areTheHosts { try? Files.setAccess(path, mode: 0o666) }
        return listener
    }
    private static let reviewMilliseconds: Int32 = 5000
    private static let listenerItem = "listener", diskListenerItem = "disk listener"

    private func socketPath() throws(QuireError) -> String {
        let directory = self.directory ?? (Observers.areTheHosts ? "/run/quired" : nil)
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
}
