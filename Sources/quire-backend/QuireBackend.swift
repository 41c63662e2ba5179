import ArgumentParser
import Engines
import Host
import Logging
import Platform

/// The back end of one VM. Follows QEMU's conventions for back-end programs (docs/interop/vhost-user.rst): stays in the
/// foreground, ends quickly on SIGTERM, exits with a non-zero status when it cannot start.
@main
struct QuireBackend: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "quire-backend",
        abstract: "Own a guest's RAM and give back to the host what the guest has freed.",
        discussion: """
            Serves a vhost-user-blk control disk, through which the guest module registers, and any number of further \
            devices. `quire run` starts it for you; start it yourself for a plain QEMU or from libvirt's hooks.

            Exit status: 0 after SIGTERM, SIGINT or SIGHUP, and when the QEMU that it was started for has gone; 1 on a failure (one \
            line on stderr says why); 64 on wrong usage.
            """,
        version: ControlDisk.version)

    @Option(name: .customLong("socket-path"), help: ArgumentHelp("Listen here for the first device.", valueName: "path"))
    var socketPath: String?

    @Option(help: ArgumentHelp("Serve the first device on this inherited socket.", valueName: "n"))
    var fd: Int32?

    @Option(
        name: .customLong("blk-file"),
        help: ArgumentHelp("Make the first device a disk with this raw image instead of the control disk.", valueName: "path"))
    var blockFile: String?

    @Flag(name: .customLong("read-only"), help: "With --blk-file: refuse writes.")
    var readOnly = false

    @Option(
        name: .customLong("device"),
        help: ArgumentHelp(
            """
            A device: control,socket=PATH or file,socket=PATH,path=IMAGE[,read-only=on][,queues=N][,serial=S]\
            [,block=512|4096] or swap,socket=PATH,size=SIZE[,tmem-fd=N][,queues=N][,overcommit=FACTOR]\
            [,compression=lz4|zstd|zstd:LEVEL][,reserve=SIZE][,awaits-restore=on]. fd=N instead of socket=PATH takes an inherited socket. Repeatable.
            """, valueName: "type,…"))
    var devices: [String] = []

    @Option(
        help: ArgumentHelp(
            """
            Guest RAM that this side owns: fd=N, an inherited memory file, or size=SIZE,link=PATH, which makes one for \
            QEMU to open as mem-path=PATH (same user). Repeatable. Without it RAM is adopted from the memory table.
            """, valueName: "…"))
    var ram: [String] = []

    @Option(name: .customLong("page-map-fd"), help: ArgumentHelp("The parked page map of this VM.", valueName: "n"))
    var pageMap: Int32?

    @Option(help: ArgumentHelp("File in which to keep the status page.", valueName: "path"))
    var status: String?

    @Option(
        name: .customLong("supervisor-fd"),
        help: ArgumentHelp("A pipe that ends when the supervisor does; recycling then stops.", valueName: "n"))
    var supervisor: Int32?

    @Flag(
        name: .customLong("memory-slots"),
        help: "Take more than 8 regions of guest memory (many DIMMs). Not for QEMU before 9.1, which then loses memory over a restart of this program.")
    var memorySlots = false

    @Flag(
        name: .customLong("single-threaded-tcg"),
        help: "QEMU emulates one CPU at a time (-accel tcg with thread=single, -icount or -smp 1): recycle nothing, because its atomic operations are none for this program.")
    var singleThreadedTCG = false

    @Option(
        name: .customLong("agent-socket"),
        help: ArgumentHelp("Listen here for libquire-agent.so in QEMU, and merge equal pages. Needs --page-map-fd.", valueName: "path"))
    var agentSocket: String?

    @Option(
        name: .customLong("merge-period"), help: "A page is merged when it was not written for two of these: 10s, 500ms.")
    var mergePeriod = "10s"

    @Option(name: .customLong("merge-workers"), help: "Threads that look for equal pages.")
    var mergeWorkers = 1

    @Flag(
        name: .customLong("no-write-tracking"),
        help: "Read all of memory to find what the guest writes, as on a kernel before Linux 6.7.")
    var noWriteTracking = false

    @Flag(help: "Merge nothing until 'quire merge', or until the host's configuration says so.")
    var unmerged = false

    @Option(help: ArgumentHelp("quired's socket (default: /run/quired/store.sock, or in $XDG_RUNTIME_DIR).", valueName: "path"))
    var store: String?

    @Option(help: "The share group (default: that of the VM's owner).")
    var group = ""

    @Option(name: .customLong("command-socket"), help: ArgumentHelp("Listen here for quire's commands.", valueName: "path"))
    var commandSocket: String?

    @Option(help: "The VM's name.")
    var name = ""

    @Option(help: "How long a page must have been free: 10s, 500ms.")
    var period = "10s"

    @Option(help: "Threads that recycle.")
    var workers = 1

    @Option(name: .customLong("log-level"), help: "trace, debug, info, notice, warning, error or critical.")
    var logLevel = "notice"

    @Flag(name: .customLong("print-capabilities"), help: "Print what this back end can do, as JSON, and exit.")
    var printCapabilities = false

    func run() throws {
        if printCapabilities {
            print(#"{ "type": "block", "features": [ "read-only", "blk-file" ] }"#)
            return
        }
        do throws(QuireError) {
            try serve()
        } catch {
            writeStandardError("quire-backend: \(error)")
            throw ExitCode(1)
        }
    }

    private func serve() throws(QuireError) {
        guard let milliseconds = Size.milliseconds(period), let value = UInt32(exactly: milliseconds) else {
            throw QuireError(.invalid, "--period \(period): give a time such as 10s or 500ms")
        }
        guard let level = Logger.Level(rawValue: logLevel) else {
            throw QuireError(.invalid, "--log-level \(logLevel): choose trace, debug, info, notice, warning, error or critical")
        }
        var options = BackendProcess.Options(
            engine: try RecycleEngine.Configuration(periodMilliseconds: value, workers: workers))
        options.name = name
        if let endpoint = try firstEndpoint() {
            let kind: BackendProcess.Device.Kind =
                if let blockFile {
                    .file(path: blockFile, isReadOnly: readOnly, queueCount: 1, serial: "quire-file", blockBytes: 512)
                } else { .control }
            options.devices.append(BackendProcess.Device(kind: kind, endpoint: endpoint))
        }
        for text in devices { options.devices.append(try BackendProcess.Device(parsing: text)) }
        guard !options.devices.isEmpty else {
            throw QuireError(.invalid, "no device: give --socket-path PATH, --fd N or --device control,socket=PATH")
        }
        for text in ram { options.ram.append(try BackendProcess.RAM(parsing: text)) }
        options.pageMap = pageMap
        options.statusPath = status
        options.supervisor = supervisor
        options.offersMemorySlots = memorySlots
        options.guestIsNotAtomic = singleThreadedTCG
        options.commandPath = commandSocket
        if let store { options.store = store }
        options.startsUnmerged = unmerged
        if let agentSocket {
            // What is merged is described there alone: without it the next backend would not find a guest's bytes.
            guard pageMap != nil else {
                throw QuireError(.invalid, "--agent-socket needs --page-map-fd N, a page map that outlives this process: quire run has one")
            }
            guard let milliseconds = Size.milliseconds(mergePeriod), let value = UInt32(exactly: milliseconds) else {
                throw QuireError(.invalid, "--merge-period \(mergePeriod): give a time such as 10s or 500ms")
            }
            var merging = BackendProcess.Merging(
                agentSocket: agentSocket,
                engine: try DedupEngine.Configuration(periodMilliseconds: value, workers: mergeWorkers, tracksWrites: !noWriteTracking))
            merging.group = group
            options.merging = merging
        }
        let prefix = name
        let logger = Logger.adjustable(prefix.isEmpty ? "quire-backend" : "quire-backend[\(prefix)]", level)
        try BackendProcess(options, logger: logger).run()
    }

    private func firstEndpoint() throws(QuireError) -> BackendProcess.Device.Endpoint? {
        switch (socketPath, fd) {
        case (nil, nil): return nil
        case (let path?, nil): return .path(path)
        case (nil, let raw?): return .descriptor(raw)
        default: throw QuireError(.invalid, "--socket-path and --fd exclude each other: give one")
        }
    }
}
