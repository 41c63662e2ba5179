import ArgumentParser
import Configuration
import Host
import Platform

extension Quire {
    struct Run: ParsableCommand {
        static let configuration = CommandConfiguration(
            commandName: "run", abstract: "Runs a QEMU virtual machine whose freed memory goes back to the host.",
            discussion: """
                Puts guest RAM on memory files that quire owns, adds the control disk by which the guest's module \
                reaches its backend, starts the backend, and then QEMU with your terminal. Everything else on QEMU's \
                command line stays as you wrote it. A backend that dies or hangs is replaced while the guest runs on.

                What no option says, the configuration does: its section [vm.NAME], then [backend] (quire config --help).

                Signals that quire gets are passed on to QEMU. Exits as QEMU does; 128 and the signal's number when a \
                signal killed QEMU; 1 if it could not be started.

                Example: quire run --period 10s -- qemu-system-x86_64 -m 2G -enable-kvm disk.qcow2
                """)

        @Option(help: ArgumentHelp("The VM's name in 'quire status' (default: QEMU's -name, else qemu-PID).", valueName: "name"))
        var name: String?

        @OptionGroup var file: ConfigurationOption

        @Option(
            help: ArgumentHelp("How long a page has to be free before the host takes it: 500ms, 10s, 2m (default: 10s).", valueName: "time"),
            transform: Keys.Backend.period.argument)
        var period: String?

        @Option(help: ArgumentHelp("Threads of the backend that recycle, 1 to 16 (default: 1).", valueName: "n"), transform: Keys.Backend.workers.argument)
        var workers: String?

        @Option(help: ArgumentHelp("The backend's program (default: quire-backend beside quire).", valueName: "path"))
        var backend: String?

        @Option(
            help: ArgumentHelp("A page is merged with its equals when it was not written for two of these (default: 10s).", valueName: "time"),
            transform: Keys.Backend.mergePeriod.argument)
        var mergePeriod: String?

        @Option(
            help: ArgumentHelp("Threads of the backend that look for equal pages, 1 to 16 (default: 1).", valueName: "n"),
            transform: Keys.Backend.mergeWorkers.argument)
        var mergeWorkers: String?

        @Option(help: ArgumentHelp("Share equal pages with VMs of this group (default: those of the same user).", valueName: "name"))
        var group: String?

        @Option(help: ArgumentHelp("quired's socket (default: /run/quired/store.sock, or in $XDG_RUNTIME_DIR).", valueName: "path"))
        var store: String?

        @Option(help: ArgumentHelp("The agent for QEMU (default: libquire-agent.so beside quire, or in ../lib/quire).", valueName: "path"))
        var agent: String?

        @Flag(inversion: .prefixedNo, help: "Ask the kernel what the guest writes; or read all of memory to find out, as on a host kernel before Linux 6.7 (default: ask).")
        var writeTracking: Bool?

        @Option(
            help: ArgumentHelp("Give the guest a disk of this size to swap to: mkswap and swapon it; the host keeps its pages compressed.", valueName: "size"))
        var swap: String?

        @Option(
            help: ArgumentHelp("The host's memory for the swap disk is its size divided by this; when that is full, the guest gets I/O errors.", valueName: "factor"))
        var swapOvercommit: String?

        @Option(help: ArgumentHelp("How swapped pages are compressed: lz4, zstd or zstd:LEVEL (default: lz4).", valueName: "method"))
        var swapCompression: String?

        @Option(
            help: ArgumentHelp("While the host has less memory left than this, free swap included, writes to the swap disk are I/O errors (default: 256M; 0: never).", valueName: "size"),
            transform: Keys.Backend.tmemReserve.argument)
        var tmemReserve: String?

        @Option(help: ArgumentHelp("Queues of the swap disk, 1 to 16 (default: 1).", valueName: "n"), transform: Keys.Backend.swapQueues.argument)
        var swapQueues: String?

        @Option(
            name: .customLong("shared-disk"),
            help: ArgumentHelp("Attach a disk that VMs of the group share (quired --shared-disk); its serial number is its name. With -incoming or -loadvm also content=ID, what the guest knows of it ('quire tmem list --json' on the host it comes from), or content=any if it has nothing of it mounted. Repeatable.", valueName: "name[,size=SIZE]"))
        var sharedDisk: [String] = []

        @Flag(inversion: .prefixedNo, help: "Merge equal pages, for which an agent is loaded into QEMU, or load none (default: merge).")
        var merge: Bool?

        @Option(
            help: ArgumentHelp("What the backend logs to stderr: trace, debug, info, notice, warning, error, critical (default: notice).", valueName: "level"),
            transform: Keys.Backend.logLevel.argument)
        var logLevel: String?

        @Argument(
            parsing: .postTerminator,
            help: ArgumentHelp("QEMU and its arguments, behind --.", valueName: "qemu-command"))
        var command: [String] = []

        func validate() throws {
            guard !command.isEmpty else {
                throw ValidationError("no QEMU command: put it behind --, as in: quire run -- qemu-system-x86_64 -m 2G …")
            }
        }

        private var arguments: [String: RawValue] {
            [
                Keys.Backend.period.name: .argument(period), Keys.Backend.workers.name: .argument(workers),
                Keys.Backend.merge.name: .argument(merge), Keys.Backend.mergePeriod.name: .argument(mergePeriod),
                Keys.Backend.mergeWorkers.name: .argument(mergeWorkers), Keys.Backend.group.name: .argument(group),
                Keys.Backend.store.name: .argument(store), Keys.Backend.writeTracking.name: .argument(writeTracking),
                Keys.Backend.swap.name: .argument(swap), Keys.Backend.swapOvercommit.name: .argument(swapOvercommit),
                Keys.Backend.swapCompression.name: .argument(swapCompression), Keys.Backend.swapQueues.name: .argument(swapQueues),
                Keys.Backend.tmemReserve.name: .argument(tmemReserve),
                Keys.Backend.sharedDisk.name: .arguments(sharedDisk), Keys.Backend.logLevel.name: .argument(logLevel),
            ].compactMapValues { $0 }
        }

        func run() throws {
            let status = try failing { () throws(QuireError) -> Int32 in
                var configuration = Supervisor.Configuration(
                    backendPath: backend ?? Self.backendBesideUs(), arguments: command)
                configuration.name = name
                let source = VMConfiguration(name: configuration.vmName, file: file.config, arguments: arguments)
                let settings = try source.resolve()
                if settings[Keys.Backend.swap] == nil, swapOvercommit != nil {
                    throw QuireError(.invalid, "--swap-overcommit is for --swap: give its size")
                }
                let path = settings.value(Keys.Backend.merge) ? agent ?? Self.agentBesideUs() : nil
                if path == nil, settings.value(Keys.Backend.merge) {
                    configuration.log("equal pages are not merged: libquire-agent.so is not beside quire, name it with --agent")
                }
                try source.apply(settings, agent: path, to: &configuration)
                return try Supervisor.run(configuration, directory: RuntimeDirectory.standard())
            }
            throw ExitCode(status)
        }

        static func agentBesideUs() -> String? {
            guard let own = Files.target(ofLink: "/proc/self/exe"), let slash = own.lastIndex(of: "/") else { return nil }
            return ["/libquire-agent.so", "/../lib/quire/libquire-agent.so"].map { own[..<slash] + $0 }
                .first { Files.identity(of: $0) != nil }
        }

        static func backendBesideUs() -> String {
            guard let own = Files.target(ofLink: "/proc/self/exe"), let slash = own.lastIndex(of: "/") else {
                return "quire-backend"
            }
            return own[..<slash] + "/quire-backend"
        }
    }
}
