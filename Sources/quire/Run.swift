import ArgumentParser
import Host
import Platform
import StoreProtocol

extension Quire {
    struct Run: ParsableCommand {
        static let configuration = CommandConfiguration(
            abstract: "Runs a QEMU virtual machine whose freed memory goes back to the host.",
            discussion: """
                Puts guest RAM on memory files that quire owns, adds the control disk by which the guest's module \
                reaches its backend, starts the backend, and then QEMU with your terminal. Everything else on QEMU's \
                command line stays as you wrote it. A backend that dies or hangs is replaced while the guest runs on.

                Signals that quire gets are passed on to QEMU. Exits as QEMU does; 128 and the signal's number when a \
                signal killed QEMU; 1 if it could not be started.

                Example: quire run --period 10s -- qemu-system-x86_64 -m 2G -enable-kvm disk.qcow2
                """)

        @Option(help: ArgumentHelp("The VM's name in 'quire status' (default: QEMU's -name, else qemu-PID).", valueName: "name"))
        var name: String?

        @Option(
            help: ArgumentHelp("How long a page has to be free before the host takes it: 500ms, 10s, 2m.", valueName: "time"),
            transform: Self.milliseconds)
        var period: UInt64 = 10_000

        @Option(help: ArgumentHelp("Threads of the backend that recycle, 1 to 16.", valueName: "n"))
        var workers = 1

        @Option(help: ArgumentHelp("The backend's program (default: quire-backend beside quire).", valueName: "path"))
        var backend: String?

        @Option(
            help: ArgumentHelp("A page is merged with its equals when it was not written for two of these.", valueName: "time"),
            transform: Self.milliseconds)
        var mergePeriod: UInt64 = 10_000

        @Option(help: ArgumentHelp("Threads of the backend that look for equal pages, 1 to 16.", valueName: "n"))
        var mergeWorkers = 1

        @Option(help: ArgumentHelp("Share equal pages with VMs of this group (default: those of the same user).", valueName: "name"))
        var group = ""

        @Option(help: ArgumentHelp("quired's socket (default: /run/quired/store.sock, or in $XDG_RUNTIME_DIR).", valueName: "path"))
        var store: String?

        @Option(help: ArgumentHelp("The agent for QEMU (default: libquire-agent.so beside quire, or in ../lib/quire).", valueName: "path"))
        var agent: String?

        @Flag(help: "Read all of memory to find what the guest writes, as on a host kernel before Linux 6.7.")
        var noWriteTracking = false

        @Option(
            help: ArgumentHelp("Give the guest a disk of this size to swap to: mkswap and swapon it; the host keeps its pages compressed.", valueName: "size"))
        var swap: String?

        @Option(
            help: ArgumentHelp("The host's memory for the swap disk is its size divided by this; when that is full, the guest gets I/O errors.", valueName: "factor"))
        var swapOvercommit: String?

        @Option(help: ArgumentHelp("How swapped pages are compressed: lz4, zstd or zstd:LEVEL.", valueName: "method"))
        var swapCompression = "lz4"

        @Option(help: ArgumentHelp("Queues of the swap disk, 1 to 16.", valueName: "n"))
        var swapQueues = 1

        @Option(
            name: .customLong("shared-disk"),
            help: ArgumentHelp("Attach a disk that VMs of the group share (quired --shared-disk); its serial number is its name. Repeatable.", valueName: "name[,size=SIZE]"))
        var sharedDisk: [String] = []

        @Flag(help: "Load no agent into QEMU: equal pages are not merged.")
        var noMerge = false

        @Option(help: ArgumentHelp("What the backend logs to stderr: trace, debug, info, notice, warning, error, critical.", valueName: "level"))
        var logLevel = LogLevel.notice

        @Argument(
            parsing: .postTerminator,
            help: ArgumentHelp("QEMU and its arguments, behind --.", valueName: "qemu-command"))
        var command: [String] = []

        enum LogLevel: String, ExpressibleByArgument, CaseIterable {
            case trace, debug, info, notice, warning, error, critical
        }

        static func milliseconds(_ text: String) throws -> UInt64 {
            guard let value = Size.milliseconds(text), (100...3_600_000).contains(value) else {
                throw ValidationError("'\(text)' is no period: use 100ms to 1h, such as 500ms, 10s or 2m")
            }
            return value
        }

        func validate() throws {
            guard (1...16).contains(mergeWorkers) else { throw ValidationError("--merge-workers is \(mergeWorkers): use 1 to 16") }
            guard (1...16).contains(swapQueues) else { throw ValidationError("--swap-queues is \(swapQueues): use 1 to 16") }
            guard (1...16).contains(workers) else { throw ValidationError("--workers is \(workers): use 1 to 16") }
            guard !command.isEmpty else {
                throw ValidationError("no QEMU command: put it behind --, as in: quire run -- qemu-system-x86_64 -m 2G …")
            }
        }

        func run() throws {
            let status = try failing { () throws(QuireError) -> Int32 in
                var configuration = Supervisor.Configuration(
                    backendPath: backend ?? Self.backendBesideUs(), arguments: command)
                configuration.name = name
                configuration.periodMilliseconds = period
                configuration.workers = workers
                configuration.logLevel = logLevel.rawValue
                if let swap {
                    var options = SwapDisk.Options(byteCount: try SwapDisk.checkSize(Size.parse(swap), "--swap \(swap)"))
                    options.queueCount = swapQueues
                    options.compression = try SwapDisk.compression(swapCompression)
                    if let factor = swapOvercommit {
                        options.overcommit = try SwapDisk.checkOvercommit(Double(factor), "--swap-overcommit \(factor)")
                    }
                    configuration.swap = options
                } else if swapOvercommit != nil {
                    throw QuireError(.invalid, "--swap-overcommit is for --swap: give its size")
                }
                for text in sharedDisk {
                    let parts = text.split(separator: ",", omittingEmptySubsequences: false).map(String.init)
                    var disk = SharedDisk.Options(
                        name: parts[0], path: SharedDiskClient.path(besideStore: store ?? StoreLink.standardPath()))
                    disk.group = group
                    if parts.count > 1 {
                        guard parts.count == 2, parts[1].hasPrefix("size="), let size = Size.parse(parts[1].dropFirst(5)) else {
                            throw QuireError(.invalid, "--shared-disk \(text): give NAME or NAME,size=SIZE")
                        }
                        disk.expectedBytes = size
                    }
                    guard !configuration.sharedDisks.contains(where: { $0.name == disk.name }) else {
                        throw QuireError(.invalid, "--shared-disk \(disk.name) is given twice")
                    }
                    configuration.sharedDisks.append(disk)
                }
                if !noMerge, let path = agent ?? Self.agentBesideUs() {
                    var merging = Supervisor.Configuration.Merging(agentPath: path)
                    merging.periodMilliseconds = mergePeriod
                    merging.workers = mergeWorkers
                    merging.group = group
                    merging.tracksWrites = !noWriteTracking
                    merging.store = store
                    configuration.merging = merging
                } else if !noMerge {
                    configuration.log("equal pages are not merged: libquire-agent.so is not beside quire, name it with --agent")
                }
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
