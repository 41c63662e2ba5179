import ArgumentParser
import Host
import Platform

extension Quire {
    struct Doctor: ParsableCommand {
        static let configuration = CommandConfiguration(
            abstract: "Checks this host, and says what to type for what it finds.",
            discussion: """
                Looks as the user who runs it: as root for VMs of libvirt, as yourself for 'quire run'.

                With --json: an array of objects with id, level (ok, note, problem), text, advice.

                Exit status: 0 if everything works, notes included; 1 if something does not.
                """)

        @Flag(help: "Prints JSON.")
        var json = false

        func run() throws {
            let findings = HostCheck(.init(backend: Run.backendBesideUs(), agent: Run.agentBesideUs(), store: StoreLink.standardPath())).run()
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
