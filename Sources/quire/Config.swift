import ArgumentParser
import Configuration
import Host
import Platform

extension Quire {
    struct Config: ParsableCommand {
        static let configuration = CommandConfiguration(
            commandName: "config", abstract: "Checks, shows and applies the host's configuration.",
            discussion: """
                One file, /etc/quire/quire.toml, in TOML: [quired], [backend] for all VMs, [vm.NAME] for one of them, [exporter]. \
                Keys are named like the options of the programs, which beat them; [vm.NAME] beats [backend]. Without the file the \
                defaults hold.
                """,
            subcommands: [Check.self, Show.self, Reload.self, TemplateCommand.self])
    }
}

extension Quire.Config {
    struct Check: ParsableCommand {
        static let configuration = CommandConfiguration(
            commandName: "check", abstract: "Says what is wrong in a configuration: all of it.",
            discussion: """
                With --json: an array of objects with file, line (0 where there is none), key (empty where the file can't be read), \
                text.

                Exit status: 0 if nothing is wrong, 1 otherwise.
                """)

        @Argument(help: ArgumentHelp("The file (default: /etc/quire/quire.toml, or in etc of where quire is installed).", valueName: "file"))
        var file: String?

        @Flag(help: "Prints JSON.")
        var json = false

        private struct Row: Encodable {
            let file: String
            let line: Int
            let key: String
            let text: String
        }

        func run() throws {
            let path = file ?? ConfigurationFile.standardPath
            let checked = try failing { () throws(QuireError) -> ConfigurationFile in
                do throws(QuireError) {
                    return file == nil && !Files.exists(path) ? ConfigurationFile(path: path, text: "") : try ConfigurationFile.look(at: path)
                } catch {
                    if json { print(jsonText([Row(file: path, line: 0, key: "", text: "\(error)")])) }
                    throw error
                }
            }
            if json {
                print(jsonText(checked.findings.map { Row(file: path, line: $0.line ?? 0, key: $0.key, text: $0.text) }))
            } else if checked.findings.isEmpty {
                print(Files.exists(path) ? "\(path): ok" : "\(path): there is none, the defaults hold")
            } else {
                for finding in checked.findings { writeStandardError("quire: " + checked.describe(finding)) }
            }
            if !checked.findings.isEmpty { throw ExitCode(1) }
        }
    }

    struct Show: ParsableCommand {
        static let configuration = CommandConfiguration(
            commandName: "show", abstract: "Shows what holds, and where each value comes from.",
            discussion: """
                Options of programs that run, and what a domain's definition says, are not known here; they beat what is shown.

                With --json: an array of objects with key, value (as TOML), from, line (0 where there is none), live (whether a reload \
                changes it).
                """)

        @OptionGroup var file: ConfigurationOption

        @Option(help: ArgumentHelp("Of this VM alone.", valueName: "name"))
        var vm: String?

        @Flag(help: "Prints JSON.")
        var json = false

        private struct Row: Encodable {
            let key: String
            let value: String
            let from: String
            let line: Int
            let live: Bool
        }

        func run() throws {
            let rows = try failing { () throws(QuireError) -> [Row] in
                if let vm { try RuntimeDirectory.checkName(vm) }
                let configuration = try ConfigurationFile.read(file.config)
                let scopes: [(String, Scope)] =
                    if let vm { [("vm.\(vm)", .vm(vm))] } else { [("quired", .quired), ("backend", .backend), ("exporter", .exporter)] }
                var rows: [Row] = []
                for (title, scope) in scopes {
                    for item in try configuration.resolve(scope).items {
                        let line: Int? = if case .file(_, _, let line) = item.origin { line } else { nil }
                        rows.append(
                            Row(
                                key: "\(title).\(item.key.name)", value: item.text, from: "\(item.origin)", line: line ?? 0,
                                live: item.key.isLive))
                    }
                }
                return rows
            }
            if json { return print(jsonText(rows)) }
            let width = rows.map(\.key.count).max() ?? 0, second = min(40, rows.map(\.value.count).max() ?? 0)
            for row in rows { print(Self.padded(row.key, width), Self.padded(row.value, second), row.from, separator: "  ") }
        }

        private static func padded(_ text: String, _ width: Int) -> String {
            text + String(repeating: " ", count: max(0, width - text.count))
        }
    }

    struct Reload: ParsableCommand {
        static let configuration = CommandConfiguration(
            commandName: "reload", abstract: "Has quired and the running VMs read the configuration again.",
            discussion: """
                Says for each what changed. Of a VM swap, swap-queues and shared-disk wait for its next start, and of a quired without \
                --keep candidates, workers and shared-disk; that is said. A VM goes to another group or store when it shares nothing \
                where it is: quire unmerge NAME, then quire merge NAME. Everything else applies at once: with --keep \
                another process takes the place of the one that works, where it has to, and nothing that VMs share is lost. If the \
                file is broken, nothing changes anywhere.

                Reaches the VMs of the user who asks: root those of libvirt, you those of your 'quire run'. quire-exporter does it at \
                SIGHUP (systemctl reload quire-exporter).

                Exit status: 0 if everybody who runs has done it, 1 otherwise.
                """)

        @Argument(help: ArgumentHelp("Only these VMs, and not quired.", valueName: "name"))
        var names: [String] = []

        @Option(help: ArgumentHelp("quired's socket (default: as for quire run).", valueName: "path"))
        var store: String?

        @OptionGroup var answer: AnswerOption

        /// Long enough for a backend that is just being replaced.
        private static let patienceMilliseconds: Int32 = 90_000
        /// For a quired that is just being replaced.
        private static let quiredNanoseconds: UInt64 = 5_000_000_000

        /// Asks again until the deadline where nobody is there.
        private static func ask(_ name: String, _ path: String, _ who: String, until deadline: UInt64) throws(QuireError) -> String {
            while true {
                do throws(QuireError) {
                    return try CommandSocket.ask("reload", at: path, name, who, patienceMilliseconds: patienceMilliseconds)
                } catch {
                    guard error.code == .retry || error.code == .closed, monotonicNanoseconds() < deadline else { throw error }
                    ProcessCalls.sleep(milliseconds: 50)
                }
            }
        }

        func run() throws {
            var answers = Answers("config reload", json: answer.json)
            let directory: RuntimeDirectory
            do throws(QuireError) { directory = try RuntimeDirectory.standard() } catch {
                answers.fail(names, error)
                return try answers.end()
            }
            func ask(_ name: String, _ path: String, _ who: String, within nanoseconds: UInt64 = 0) {
                let deadline = monotonicNanoseconds() + nanoseconds
                answers.about(name) { answer throws(QuireError) in
                    let said = try Self.ask(name, path, who, until: deadline)
                    answer.result = said.isEmpty ? .unchanged : .done
                    answer.notes = said.isEmpty ? ["nothing changed"] : said.split(separator: "\n").map(String.init)
                }
            }
            if names.isEmpty {
                let path = StoreLink.commandPath(besideStore: store ?? StoreLink.standardPath())
                // Whoever runs without it has nothing to reload there.
                if Files.exists(path) { ask("quired", path, "quired", within: Self.quiredNanoseconds) }
            }
            for name in names.isEmpty ? directory.running() : names {
                guard directory.isRunning(name) else {
                    answers.fail([name], QuireError(.invalid, "no VM '\(name)' is running: quire status lists those that are"))
                    continue
                }
                ask(name, directory.supervisorPath(name), "the supervisor of '\(name)'")
            }
            try answers.end()
        }
    }

    struct TemplateCommand: ParsableCommand {
        static let configuration = CommandConfiguration(
            commandName: "template", abstract: "Prints a configuration with every key in it, commented out.")

        func run() throws { print(Template.text, terminator: "") }
    }
}
