import ArgumentParser
import Configuration
import Host
import Platform

extension Quire {
    struct Doctor: ParsableCommand {
        static let configuration = CommandConfiguration(
            commandName: "doctor", abstract: "Checks this host, and says what to type for what it finds.",
            discussion: """
                Looks as the user who runs it: as root for VMs of libvirt, as yourself for 'quire run'.

                With --json: an array of objects with id, level (ok, note, problem), text, advice.

                Exit status: 0 if everything works, notes included; 1 if something does not.
                """)

        @Flag(help: "Prints JSON.")
        var json = false

        @OptionGroup var file: ConfigurationOption

        /// The configuration, as whatever starts next will find it.
        private var configuration: HostCheck.Finding {
            let path = file.config ?? ConfigurationFile.standardPath
            func problem(_ text: String, _ advice: String) -> HostCheck.Finding {
                .init(id: "configuration", level: .problem, text: "with the configuration nothing of Quire's starts: \(text)", advice: advice)
            }
            guard file.config != nil || Files.exists(path) else {
                return .init(id: "configuration", level: .ok, text: "there is no configuration \(path): the defaults hold")
            }
            do throws(QuireError) {
                let found = try ConfigurationFile.look(at: path)
                guard let first = found.findings.first else {
                    return .init(id: "configuration", level: .ok, text: "the configuration \(path) is in order")
                }
                let more = found.findings.count == 1 ? "" : " (and \(found.findings.count - 1) more)"
                return problem(found.describe(first) + more, "correct it; quire config check \(path) shows all that is wrong, quire config reload applies it")
            } catch {
                return problem(error.description, "quire config check \(path) says the same until it is right")
            }
        }

        func run() throws {
            let places = HostCheck.Places(backend: Run.backendBesideUs(), agent: Run.agentBesideUs(), store: StoreLink.standardPath())
            let findings = HostCheck(places).run() + [configuration]
            if json {
                print(HostCheck.json(findings))
            } else {
                let colours = ProcessCalls.isTerminal(1) && ProcessCalls.environment("NO_COLOR") == nil
                for finding in findings {
                    let (colour, mark) =
                        switch finding.level {
                        case .ok: (32, "ok     ")
                        case .note: (33, "note   ")
                        case .problem: (31, "problem")
                        }
                    print((colours ? "\u{1B}[\(colour)m\(mark)\u{1B}[0m" : mark) + "  " + finding.text)
                    if !finding.advice.isEmpty { print("         " + finding.advice) }
                }
            }
            if findings.contains(where: { $0.level == .problem }) { throw ExitCode(1) }
        }
    }
}
