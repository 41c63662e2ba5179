import ArgumentParser
import Configuration
import Glibc
import Host
import Libvirt
import Platform

extension Quire {
    struct Libvirt: ParsableCommand {
        static let configuration = CommandConfiguration(
            commandName: "libvirt", abstract: "Gives Quire to libvirt's domains, and takes it away.",
            discussion: """
                'enable' changes a domain's definition: memory that the backend can have, the control disk, the agent. What it \
                does not know stays as it is, and 'disable' gives back the definition that was there. Both take effect when the \
                domain is powered off and started again; a reboot inside the guest is not enough.

                The hook in /etc/libvirt/hooks/qemu.d/quire starts and ends the backends of domains that are enabled.

                Exit status: 0 on success, 1 if something failed or can't work (one line a domain says what), 64 on wrong usage.
                """,
            subcommands: [Enable.self, Disable.self, List.self, Detach.self, AcceptDisks.self, Sweep.self, HookCommand.self, RememberDisks.self])
    }
}

extension Quire.Libvirt {
    struct Connection: ParsableArguments {
        @Option(name: [.short, .long], help: ArgumentHelp("libvirt's URI (default: $LIBVIRT_DEFAULT_URI, then libvirt's own choice).", valueName: "uri"))
        var connect: String?
    }

    /// Which definitions a command changes, and how.
    struct Targets: ParsableArguments {
        @OptionGroup var connection: Connection

        @Argument(help: ArgumentHelp("Domains, by name.", valueName: "domain"))
        var domains: [String] = []

        @Flag(help: "All domains that have a definition.")
        var all = false

        @Flag(help: "Change nothing, show what would change.")
        var dryRun = false

        @Flag(help: "Read a domain's XML from stdin and write the changed one to stdout, without libvirt.")
        var xml = false

        @OptionGroup var answer: AnswerOption

        func validate() throws {
            guard !(xml && answer.json) else { throw ValidationError("--json and --xml both write to stdout: give one") }
            guard [xml, all, !domains.isEmpty].count(where: { $0 }) == 1 else {
                throw ValidationError("name one or more domains, or use --all, or --xml with a domain's XML on stdin")
            }
        }

        /// Does it for each; a domain that fails does not keep others from it.
        func forEach(_ command: String, _ body: (borrowing Hypervisor, inout CommandAnswer) throws(QuireError) -> Void) throws {
            var answers = Answers(command, json: answer.json)
            do throws(QuireError) {
                let hypervisor = try Hypervisor(connection.connect)
                for name in all ? try hypervisor.names(defined: true) : domains {
                    answers.about(name) { answer throws(QuireError) in try body(hypervisor, &answer) }
                }
            } catch { answers.fail(domains, error) }
            try answers.end()
        }

        /// Says what came of one.
        func tell(_ outcome: Hypervisor.Outcome, _ done: String, _ unchanged: String, _ answer: inout CommandAnswer) {
            guard outcome.hasChanged else {
                answer.result = .unchanged
                answer.notes = ["\(unchanged), nothing to do"]
                return
            }
            answer.takesEffect = outcome.effect
            if dryRun {
                let difference = lineDifference(outcome.before.xml.text, outcome.after.xml.text)
                answer.result = .planned
                answer.difference = difference
                if !self.answer.json { print("--- \(answer.name)\n\(difference)") }
            } else {
                answer.notes = ["\(done), \(outcome.when)"]
            }
        }

        /// stdin to stdout.
        func filter(_ body: (Domain) throws(QuireError) -> XMLText) throws {
            try failing { () throws(QuireError) in
                let input = try Descriptor.duplicate(of: 0).readAll(limit: 32 << 20)
                let result = try body(Domain(XMLText(input)))
                if dryRun { print(lineDifference(String(decoding: input, as: UTF8.self), result.text)) } else {
                    try DataSink(Descriptor.duplicate(of: 1)).write(result.bytes)
                }
            }
        }
    }

    struct Enable: ParsableCommand {
        static let configuration = CommandConfiguration(
            commandName: "enable", abstract: "Gives Quire to domains, from their next start on.",
            discussion: """
                Refuses domains whose memory can't be given back: huge pages, locked, encrypted, allocated at once, pinned by \
                VFIO devices, scheduled in real time. Says what will work in part.

                Enabling a domain again changes what options name, and keeps the rest; without options it changes nothing. \
                --no-swap, --no-disk, --no-group and --no-period take away what is there.
                """)

        @OptionGroup var targets: Targets

        @Option(help: ArgumentHelp("Add a swap disk of this size, kept in the host's memory.", valueName: "size"), transform: Self.size)
        var swap: UInt64?

        @Flag(help: "Take its swap disk away.")
        var noSwap = false

        @Option(
            name: [.customLong("disk"), .customLong("shared-disk")],
            help: ArgumentHelp(
                "Attach a disk in the host's memory that domains of the group share (quired --shared-disk); its serial number is its name. Repeatable.",
                valueName: "name[,size=SIZE]"),
            transform: Self.disk)
        var disk: [BackendService.Settings.Disk] = []

        @Option(
            name: [.customLong("no-disk"), .customLong("no-shared-disk")],
            help: ArgumentHelp("Take a shared disk away. Repeatable.", valueName: "name"), transform: Self.diskName)
        var noDisk: [String] = []

        @Option(
            help: ArgumentHelp("Share equal pages and disks with domains of this group (default: all of this host's).", valueName: "name"),
            transform: Keys.Backend.group.argument)
        var group: String?

        @Flag(help: "Share with all of this host's again.")
        var noGroup = false

        @Option(
            help: ArgumentHelp("How long a page has to be free before the host takes it.", valueName: "time"),
            transform: Keys.Backend.period.argument)
        var period: String?

        @Flag(help: "Have the host's configuration say how long.")
        var noPeriod = false

        @Flag(inversion: .prefixedNo, exclusivity: .exclusive, help: "Whether equal pages are merged (default: they are). With --no-merge there is no agent in QEMU.")
        var merge: Bool?

        @Option(
            help: ArgumentHelp(
                "The agent for QEMU (default: the one that the domain has; libquire-agent.so beside quire, or in ../lib/quire).", valueName: "path"))
        var agent: String?

        static func size(_ text: String) throws -> UInt64 {
            guard let bytes = Size.parse(text), bytes >= 1 << 20, bytes % 4096 == 0 else {
                throw ValidationError("'\(text)' is no size for a swap disk: use whole pages, 1M or more, such as 4G")
            }
            return bytes
        }

        static func diskName(_ text: String) throws -> String {
            guard PlainName.isValid(text) else { throw ValidationError("'\(text)' is no shared disk's name") }
            return text
        }

        static func disk(_ text: String) throws -> BackendService.Settings.Disk {
            guard let disk = DiskSetting(attached: text) else {
                throw ValidationError("'\(text)' is no shared disk: give NAME or NAME,size=SIZE, as quired --shared-disk has it")
            }
            return .init(name: disk.name, byteCount: disk.byteCount)
        }

        func validate() throws {
            for (number, one) in disk.enumerated() where disk[..<number].contains(where: { $0.name == one.name }) {
                throw ValidationError("--disk \(one.name) is given twice")
            }
            let most = QEMUCommandLine.maxDisks - 1
            guard disk.count <= most else { throw ValidationError("a domain has at most \(most) shared disks") }
            let both = [("swap", swap != nil, noSwap), ("group", group != nil, noGroup), ("period", period != nil, noPeriod)].first { $0.1 && $0.2 }
            if let both { throw ValidationError("--\(both.0) and --no-\(both.0) exclude each other: give one") }
            if let both = disk.first(where: { noDisk.contains($0.name) }) {
                throw ValidationError("--disk \(both.name) and --no-disk \(both.name) exclude each other: give one")
            }
            guard agent == nil || merge != false else { throw ValidationError("--agent is for merging: leave it or --no-merge out") }
        }

        private func changes() throws(QuireError) -> Domain.Changes {
            var changes = Domain.Changes(directory: try RuntimeDirectory.standard())
            changes.isHere = !targets.xml
            changes.merges = merge
            changes.swap = noSwap ? .drop : swap.map { .set($0) } ?? .keep
            changes.group = noGroup ? .drop : group.map { .set($0) } ?? .keep
            changes.period = noPeriod ? .drop : period.flatMap { Size.milliseconds($0) }.map { .set($0) } ?? .keep
            changes.sharedDisks = disk
            changes.droppedDisks = Set(noDisk)
            if let agent {
                guard agent.hasPrefix("/") else { throw QuireError(.invalid, "--agent \(agent): give an absolute path, QEMU runs elsewhere") }
                guard Files.identity(of: agent) != nil else { throw QuireError(.invalid, "--agent \(agent): there is no such file") }
                changes.agent = Files.normalized(agent)
            }
            changes.usualAgent = Quire.Run.agentBesideUs().map { Files.normalized($0) }
            return changes
        }

        func run() throws {
            let changes = try failing { () throws(QuireError) in try self.changes() }
            if targets.xml {
                try targets.filter { domain throws(QuireError) in
                    for limit in domain.limits { writeStandardError("quire: \(domain.name): \(limit)") }
                    return try domain.enabled(domain.request(changes))
                }
                return
            }
            try targets.forEach("libvirt enable") { hypervisor, answer throws(QuireError) in
                let outcome = try hypervisor.enable(answer.name, changes, dryRun: targets.dryRun)
                targets.tell(outcome, "enabled", "enabled already", &answer)
                answer.notes += outcome.after.limits
            }
        }
    }

    struct Disable: ParsableCommand {
        static let configuration = CommandConfiguration(
            commandName: "disable", abstract: "Takes Quire away from domains, from their next start on.",
            discussion: "Removes what 'enable' added and nothing else.")

        @OptionGroup var targets: Targets

        func run() throws {
            if targets.xml { return try targets.filter { domain throws(QuireError) in try domain.disabled() } }
            try targets.forEach("libvirt disable") { hypervisor, answer throws(QuireError) in
                targets.tell(try hypervisor.disable(answer.name, dryRun: targets.dryRun), "disabled", "not enabled", &answer)
            }
        }
    }

    struct List: ParsableCommand {
        static let configuration = CommandConfiguration(
            commandName: "list", abstract: "Shows which domains have Quire.",
            discussion: """
                DEFINED says whether a domain's definition has Quire, RUNS whether it runs, and with Quire or without: where they \
                differ it needs a power cycle. VM is its name in 'quire status'.

                With --json: an array of objects with name, enabled, running, running_with_quire, vm, merging, swap_bytes, \
                shared_disks (names), group, leftover (the domain does not run, and its backend does: 'quire libvirt sweep' ends it). \
                A backend that is left over from a domain that libvirt does not know has an object with an empty name.
                """)

        @OptionGroup var connection: Connection

        @Flag(help: "Prints JSON.")
        var json = false

        struct Row: Encodable {
            var name: String
            var enabled = false
            var running = false
            var runningWithQuire = false
            var vm = ""
            var merging = false
            var swapBytes: UInt64 = 0
            var sharedDisks: [String] = []
            var group = ""
            var leftover = false
            enum CodingKeys: String, CodingKey {
                case name, enabled, running, vm, merging, group, leftover
                case runningWithQuire = "running_with_quire"
                case swapBytes = "swap_bytes"
                case sharedDisks = "shared_disks"
            }
        }

        func run() throws {
            let (rows, leftovers) = try failing { () throws(QuireError) in
                let hypervisor = try Hypervisor(connection.connect)
                var rows: [Row] = [], places: [String: Int] = [:]
                for name in try hypervisor.names() {
                    // It may have been undefined meanwhile.
                    guard let handle = try? hypervisor.domain(name) else { continue }
                    var row = Row(name: name)
                    row.running = handle.isActive
                    let defined = handle.isPersistent ? try Domain(handle.definition()) : nil
                    let live = row.running ? try Domain(handle.live()) : nil
                    row.enabled = defined?.mark != nil
                    row.runningWithQuire = live?.mark != nil
                    if let uuid = (live ?? defined)?.uuid { places[uuid] = rows.count }
                    if let mark = live?.mark ?? defined?.mark {
                        row.vm = mark.name
                        row.merging = mark.agent != nil
                        row.swapBytes = mark.swapBytes ?? 0
                        row.sharedDisks = mark.sharedDisks.map(\.name)
                        row.group = mark.group
                    }
                    rows.append(row)
                }
                let leftovers = try hypervisor.leftovers(in: RuntimeDirectory.standard())
                guard json else { return (rows, leftovers) }
                for leftover in leftovers {
                    var row = places[leftover.owner].map { rows[$0] } ?? Row(name: "")
                    row.vm = leftover.vm
                    row.leftover = true
                    if let place = places[leftover.owner] { rows[place] = row } else { rows.append(row) }
                }
                return (rows, leftovers)
            }
            if json { return print(jsonText(rows)) }
            let cells = [["DOMAIN", "DEFINED", "RUNS", "VM", "SWAP", "DISKS", "GROUP"]] + rows.map { row in
                [
                    row.name, row.enabled ? "with Quire" : "without",
                    row.running ? row.runningWithQuire ? "with Quire" : "without" : "no", row.vm.isEmpty ? "-" : row.vm,
                    row.swapBytes == 0 ? "-" : Size.exact(row.swapBytes),
                    row.sharedDisks.isEmpty ? "-" : row.sharedDisks.joined(separator: " "), row.group.isEmpty ? "-" : row.group,
                ]
            }
            let widths = cells[0].indices.map { column in cells.map { $0[column].count }.max() ?? 0 }
            for row in cells {
                let line = zip(row, widths).map { $0 + String(repeating: " ", count: $1 - $0.count) }.joined(separator: "  ")
                print(String(line.reversed().drop { $0 == " " }.reversed()))
            }
            for leftover in leftovers { print("\(leftover.vm): its domain does not run, and its backend does: quire libvirt sweep") }
        }
    }

    struct Detach: ParsableCommand {
        static let configuration = CommandConfiguration(
            commandName: "detach", abstract: "Takes Quire away from a running domain, for a migration to a host without it.",
            discussion: """
                Every page gets its own copy again, the control disk is unplugged, the backend ends; the guest runs on. The \
                definition stays: the domain has Quire again at its next start. Returns when it is done, or says why it can't be.
                """)

        @OptionGroup var connection: Connection

        @Argument(help: ArgumentHelp("The domain.", valueName: "domain"))
        var domain: String

        @OptionGroup var answer: AnswerOption

        func run() throws {
            try answer.about(domain, "libvirt detach") { answer throws(QuireError) in
                let directory = try RuntimeDirectory.standard(), hypervisor = try Hypervisor(connection.connect)
                let vm = try Domain(hypervisor.domain(domain).live()).mark?.name ?? domain
                try ProgressBar.whileUnmerging(vm, in: directory) { () throws(QuireError) in try hypervisor.detach(domain, in: directory) }
                answer.notes = ["detached"]
            }
        }
    }

    struct Sweep: ParsableCommand {
        static let configuration = CommandConfiguration(
            commandName: "sweep", abstract: "Ends backends whose domain has gone.",
            discussion: """
                libvirt's hook ends a domain's backend with the domain, also where QEMU crashed. One is left over if the hook was away, \
                or failed; it holds memory until its domain starts again. 'quire libvirt list' shows those. A backend that a QEMU is \
                connected to is left alone.

                With --json and --follow: an array whenever something was ended.
                """)

        @OptionGroup var connection: Connection

        @Flag(help: "Stay, and look again whenever a domain has stopped or is undefined, and when libvirtd comes back (quire-sweep.service does).")
        var follow = false

        @OptionGroup var answer: AnswerOption

        private static let lookAgain: Int32 = 60_000

        /// What it has ended.
        private func sweep(_ hypervisor: borrowing Hypervisor, _ directory: RuntimeDirectory) throws(QuireError) -> Answers {
            var answers = Answers("libvirt sweep", json: answer.json)
            for vm in try hypervisor.sweep(in: directory) {
                answers.about(vm) { answer in answer.notes = ["its domain does not run: ended its backend"] }
            }
            return answers
        }

        private func sweepOnce() throws {
            var answers = Answers("libvirt sweep", json: answer.json)
            do throws(QuireError) { answers = try sweep(Hypervisor(connection.connect), RuntimeDirectory.standard()) } catch { answers.fail([], error) }
            try answers.end()
        }

        func run() throws {
            guard follow else { return try sweepOnce() }
            let directory = try failing { () throws(QuireError) in try RuntimeDirectory.standard() }
            var said = ""
            // libvirtd may come any time later: that is no failure of ours.
            ServiceManager.notify("READY=1\nSTATUS=Waiting for libvirtd")
            while true {
                do throws(QuireError) {
                    let hypervisor = try Hypervisor.following(connection.connect)
                    said = ""
                    ServiceManager.notify("STATUS=Following libvirt's events")
                    while true {
                        let answers = try sweep(hypervisor, directory)
                        if !answers.all.isEmpty { answers.show() }
                        // At once, also into a file.
                        fflush(nil)
                        try hypervisor.awaitChange(milliseconds: Self.lookAgain)
                    }
                } catch {
                    if error.description != said {
                        writeStandardError("quire: \(error)")
                        ServiceManager.notify("STATUS=\(error)")
                    }
                    said = error.description
                    ProcessCalls.sleep(milliseconds: 1000)
                }
            }
        }
    }

    struct AcceptDisks: ParsableCommand {
        static let configuration = CommandConfiguration(
            commandName: "accept-disks", abstract: "Lets a saved image come back where a shared disk has lost what was on it.",
            discussion: """
                A guest from a saved image is refused where a shared disk (--disk) is not the one that it knows: what it has mounted, or \
                in its caches, goes with bytes that are gone, and it would read others. If it had nothing of the disk mounted or open, \
                this lets its next start take the disks as they are. Once; virsh start or virsh restore follows.
                """)

        @Argument(help: ArgumentHelp("The VM, as the refusal calls it.", valueName: "vm"))
        var vm: String

        @OptionGroup var answer: AnswerOption

        func run() throws {
            try answer.about(vm, "libvirt accept-disks") { answer throws(QuireError) in
                let directory = try RuntimeDirectory.standard()
                guard !directory.isRunning(vm) else {
                    throw QuireError(.busy, "the VM '\(vm)' runs: this is for a domain whose saved image is refused")
                }
                try directory.noteAcceptance(vm)
                answer.notes = ["its next start takes the shared disks as they are"]
                answer.takesEffect = .nextStart
            }
        }
    }

    struct RememberDisks: ParsableCommand {
        static let configuration = CommandConfiguration(
            commandName: "remember-disks", abstract: "Notes in a running domain what its shared disks have: libvirt's hook starts it.", shouldDisplay: false)

        @Argument var domain: String

        func run() throws {
            try failing { () throws(QuireError) in try Hypervisor().rememberDisks(of: domain, in: RuntimeDirectory.standard()) }
        }
    }

    struct HookCommand: ParsableCommand {
        static let configuration = CommandConfiguration(
            commandName: "hook",
            abstract: "What libvirtd runs: the script in /etc/libvirt/hooks/qemu.d/quire calls it.",
            discussion: "The domain's XML comes on stdin. Domains that are not enabled are let through at once.")

        @Argument var object: String
        @Argument var operation: String
        @Argument var subOperation: String
        @Argument var extra: [String] = []

        func run() throws {
            try failing { () throws(QuireError) in
                // libvirtd waits until all of it is read.
                let xml = String(decoding: try Descriptor.duplicate(of: 0).readAll(limit: 32 << 20), as: UTF8.self)
                guard Hook.concerns(xml) else { return }
                let own = Files.target(ofLink: "/proc/self/exe") ?? "quire"
                try Hook(directory: RuntimeDirectory.standard(), program: own).run(operation, subOperation, xml: xml)
            }
        }
    }
}

extension Hypervisor.Outcome {
    var effect: CommandAnswer.Effect { isActive ? .powerCycle : hasSavedImage ? .savedImage : .nextStart }

    /// When the change takes effect.
    var when: String {
        switch effect {
        case .powerCycle: "when it is powered off and started again (a reboot is not enough)"
        case .savedImage: "but its saved image starts it as it was: start it and power it off once, or virsh managedsave-remove"
        case .nextStart: "from its next start on"
        }
    }
}
