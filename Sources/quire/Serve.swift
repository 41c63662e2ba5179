import ArgumentParser
import Host
import Platform

extension Quire {
    struct Serve: ParsableCommand {
        static let configuration = CommandConfiguration(
            abstract: "Keeps the backend of a VM running whose QEMU somebody else starts.",
            discussion: """
                libvirt's hook starts it (quire libvirt hook), through quire-backend@.service where systemd runs the host. It \
                reads what the VM asks for from its folder, and ends on SIGTERM.

                Exit status: 0 after SIGTERM, 1 if the backend could not be started.
                """)

        @Argument(help: ArgumentHelp("The VM's name.", valueName: "name"))
        var name: String

        @Option(name: .customLong("ready-fd"), help: ArgumentHelp("A pipe that is told 'ready'.", valueName: "n"))
        var readyDescriptor: Int32?

        @Option(help: ArgumentHelp("The backend's program (default: quire-backend beside quire).", valueName: "path"))
        var backend: String?

        @Option(name: .customLong("log-level"), help: ArgumentHelp("What the backend logs to stderr.", valueName: "level"))
        var logLevel = Run.LogLevel.notice

        func run() throws {
            try failing { () throws(QuireError) in
                var configuration = Supervisor.Configuration(backendPath: backend ?? Run.backendBesideUs(), arguments: [])
                configuration.logLevel = logLevel.rawValue
                if let agent = Run.agentBesideUs() { configuration.merging = .init(agentPath: agent) }
                try BackendService.run(name, configuration, in: RuntimeDirectory.standard()) {
                    ServiceManager.notify("READY=1")
                    if let raw = readyDescriptor { try? Descriptor.tell(raw, "ready") }
                }
            }
        }
    }
}
