import ArgumentParser
import Configuration
import Host
import Platform

extension Quire {
    struct Serve: ParsableCommand {
        static let configuration = CommandConfiguration(
            commandName: "serve", abstract: "Keeps the backend of a VM running whose QEMU somebody else starts.",
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

        @Option(
            name: .customLong("log-level"), help: ArgumentHelp("What the backend logs to stderr.", valueName: "level"),
            transform: Keys.Backend.logLevel.argument)
        var logLevel: String?

        @OptionGroup var file: ConfigurationOption

        func run() throws {
            try failing { () throws(QuireError) in
                let directory = try RuntimeDirectory.standard()
                let settings = try BackendService.Settings.read(directory.settingsPath(name))
                // What the domain's definition says is for this VM, as a command line is.
                let arguments: [String: RawValue?] = [
                    Keys.Backend.logLevel.name: .argument(logLevel),
                    Keys.Backend.period.name: .argument(settings.periodMilliseconds.map { "\($0)ms" }),
                    Keys.Backend.group.name: .argument(settings.group.isEmpty ? nil : settings.group),
                    Keys.Backend.sharedDisk.name: .arguments(
                        (settings.sharedDisks ?? []).map { disk in disk.name + (disk.byteCount.map { ",size=\($0)b" } ?? "") }),
                ]
                var configuration = Supervisor.Configuration(backendPath: backend ?? Run.backendBesideUs(), arguments: [])
                let source = VMConfiguration(name: name, file: file.config, arguments: arguments.compactMapValues { $0 }, isService: true)
                try source.apply(source.resolve(), agent: settings.merges ? Run.agentBesideUs() : nil, to: &configuration)
                do throws(QuireError) {
                    try BackendService.run(name, settings, configuration, in: directory) {
                        ServiceManager.notify("READY=1")
                        if let raw = readyDescriptor { try? Descriptor.tell(raw, "ready") }
                    }
                } catch {
                    // The hook does not read the journal.
                    if readyDescriptor == nil { directory.noteFailure(name, "\(error)") }
                    throw error
                }
            }
        }
    }
}
