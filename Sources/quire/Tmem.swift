import ArgumentParser
import Glibc
import Host
import Platform
import StoreProtocol

extension Quire {
    /// What the host keeps for guests: the swap disks of `quire run --swap`, the shared disks of quired.
    struct Tmem: ParsableCommand {
        static let configuration = CommandConfiguration(
            commandName: "tmem",
            abstract: "Shows and governs the memory that the host keeps for guests (quire run --swap, quired --shared-disk).",
            discussion: """
                NAME is a VM, or shared:DISK for a disk of quired's that VMs share. Who may attach a shared disk sees it; to change \
                something is for root and the user that quired runs as.
                """,
            subcommands: [List.self, Freeze.self, Thaw.self, Flush.self, Weight.self, Cap.self, Save.self, Restore.self])

        /// The disk, where a name is a shared disk's.
        fileprivate static func sharedDisk(_ name: String) -> String? {
            name.hasPrefix(SharedDiskReport.prefix) ? String(name.dropFirst(SharedDiskReport.prefix.count)) : nil
        }

        /// Has a VM's backend, or quired, do something; returns its answer.
        @discardableResult fileprivate static func ask(
            _ command: TmemCommand, of name: String, passing: [Int32] = [], patienceMilliseconds: Int32 = 60_000
        ) throws(QuireError) -> String {
            if let disk = sharedDisk(name) {
                return try SharedDiskReport.ask(command, of: disk, patienceMilliseconds: patienceMilliseconds)
            }
            return try CommandSocket.ask(
                command.request, of: name, in: RuntimeDirectory.standard(), passing: passing,
                patienceMilliseconds: patienceMilliseconds)
        }

        /// Bytes that a VM has on its swap disk.
        fileprivate static func swapped(_ name: String) -> Double {
            guard let directory = try? RuntimeDirectory.standard() else { return 0 }
            return StatusReport.read(name, in: directory).tmem.pools.reduce(0) { $0 + Double($1.bytes) }
        }

        fileprivate static func bytes(_ text: String) throws -> UInt64 {
            guard let bytes = Size.parse(text) else { throw ValidationError("'\(text)' is no size: give one such as 512M") }
            return bytes
        }

        struct List: ParsableCommand {
            static let configuration = CommandConfiguration(
                commandName: "list", abstract: "Shows pools: what guests have there, and what it takes on the host.",
                discussion: """
                    Columns as in 'quire status'. With --json: an array of objects with name (of the VM) and tmem, as in \
                    'quire status --json', as of this moment; for a shared disk name is shared:DISK, group the share group \
                    whose VMs may attach it, attached the names of those that have it, and content an id of what is on it.
                    """)

            @Flag(help: "Prints JSON with exact numbers.")
            var json = false

            @Argument(help: ArgumentHelp("Only these VMs and shared disks.", valueName: "name"))
            var names: [String] = []

            func run() throws {
                let (reports, disks) = try failing { () throws(QuireError) in (try readVMs(), try readDisks()) }
                if json {
                    print(StatusReport.tmemJSON(reports, disks))
                } else if reports.isEmpty, disks.isEmpty {
                    print("No running VM has transcendent memory. Give one a swap disk with: quire run --swap 4G -- …")
                } else {
                    let colours = ProcessCalls.isTerminal(1) && ProcessCalls.environment("NO_COLOR") == nil
                    print(StatusReport.poolTable(reports, disks, colours: colours).joined(separator: "\n"))
                    for report in reports { print(Self.line(report.name, report.tmem)) }
                    for disk in disks {
                        let attached = disk.attached.isEmpty ? "attached by no VM" : "attached by " + disk.attached.joined(separator: ", ")
                        print(Self.line(disk.name, disk.tmem) + "; group \(disk.group); \(attached)")
                    }
                    // For those who may ask; and where there is a limit.
                    var quired = StoreObserver(path: StoreLink.standardPath(), patienceMilliseconds: 1000)
                    if names.isEmpty, let all = try? quired.tmem(), let cap = all.cap {
                        print("host: \(Size.text(all.total)) of at most \(Size.text(cap)) for all of these (quired --tmem-cap)")
                    }
                }
            }

            private func readVMs() throws(QuireError) -> [StatusReport] {
                let wanted = names.filter { Tmem.sharedDisk($0) == nil }
                if wanted.isEmpty, !names.isEmpty { return [] }
                var reports = try StatusReport.collect(wanted, in: RuntimeDirectory.standard())
                for index in reports.indices where reports[index].tmem.state != .off || !wanted.isEmpty {
                    reports[index].tmem = try TmemCommand.report(Tmem.ask(.list, of: reports[index].name))
                }
                return reports.filter { $0.tmem.state != .off }
            }

            private func readDisks() throws(QuireError) -> [SharedDiskReport] {
                let wanted = names.compactMap(Tmem.sharedDisk)
                if wanted.isEmpty, !names.isEmpty { return [] }
                let all = try SharedDiskReport.collect()
                for disk in wanted where !all.contains(where: { $0.disk == disk }) { throw SharedDiskReport.unknown(disk) }
                return wanted.isEmpty ? all : all.filter { wanted.contains($0.disk) }
            }

            private static func line(_ name: String, _ tmem: StatusReport.Tmem) -> String {
                let limit = tmem.capBytes == 0 ? "" : " of at most \(Size.text(tmem.capBytes))"
                return "\(name): \(Size.text(tmem.usedBytes))\(limit) of the host's memory, \(Size.text(tmem.metadataBytes)) of it for finding pages"
                    + (tmem.state == .frozen ? "; frozen" : "") + (tmem.reason.isEmpty ? "" : "; \(tmem.reason)")
            }
        }

        struct Freeze: ParsableCommand {
            static let configuration = CommandConfiguration(
                commandName: "freeze", abstract: "Takes no new pages into a VM's ephemeral pools, until thaw.",
                discussion: "What is there stays. Swap disks and shared disks are persistent, and go on as before.")
            @Argument(help: ArgumentHelp("The VM, or shared:DISK.", valueName: "name")) var name: String
            @OptionGroup var answer: AnswerOption
            func run() throws { try answer.about(name, "tmem freeze") { _ throws(QuireError) in try Tmem.ask(.freeze, of: name) } }
        }

        struct Thaw: ParsableCommand {
            static let configuration = CommandConfiguration(commandName: "thaw", abstract: "Takes new pages again, after freeze.")
            @Argument(help: ArgumentHelp("The VM, or shared:DISK.", valueName: "name")) var name: String
            @OptionGroup var answer: AnswerOption
            func run() throws { try answer.about(name, "tmem thaw") { _ throws(QuireError) in try Tmem.ask(.thaw, of: name) } }
        }

        struct Flush: ParsableCommand {
            static let configuration = CommandConfiguration(
                commandName: "flush", abstract: "Gives memory of ephemeral pools back to the host at once.",
                discussion: "Says how much it was: less where there is no more. Persistent pages, swapped ones and those of shared disks, stay.")
            @Argument(help: ArgumentHelp("The VM, or shared:DISK.", valueName: "name")) var name: String
            @Argument(help: ArgumentHelp("How much: 512M.", valueName: "size"), transform: Tmem.bytes) var size: UInt64
            @OptionGroup var answer: AnswerOption
            func run() throws {
                try answer.about(name, "tmem flush") { said throws(QuireError) in
                    let bytes = UInt64(try Tmem.ask(.flush(size), of: name)) ?? 0
                    said.bytes = bytes
                    if !answer.json { print("\(Size.text(bytes)) given back") }
                }
            }
        }

        struct Weight: ParsableCommand {
            static let configuration = CommandConfiguration(
                commandName: "weight",
                abstract: "Sets how much of the ephemeral memory is a pool's, relative to others (100 unless set).")
            @Argument(help: ArgumentHelp("The VM, or shared:DISK.", valueName: "name")) var name: String
            @Argument(help: ArgumentHelp("The pool, as in 'quire tmem list'.", valueName: "pool")) var pool: String
            @Argument(help: ArgumentHelp("From 1.", valueName: "n")) var weight: UInt32
            @OptionGroup var answer: AnswerOption
            func run() throws { try answer.about(name, "tmem weight") { _ throws(QuireError) in try Tmem.ask(.weight(pool: pool, weight), of: name) } }
        }

        struct Cap: ParsableCommand {
            static let configuration = CommandConfiguration(
                commandName: "cap", abstract: "Sets how much of the host's memory pools may use.",
                discussion: """
                    Without --pool: of the VM's whole store. Below what persistent pages use already it is refused, and \
                    nothing changes. Limits are kept when a backend or quired is replaced; a store's holds until the configuration gives \
                    swap-overcommit another value. A shared disk has one limit; VMs that write more get I/O errors.
                    """)
            @Argument(help: ArgumentHelp("The VM, or shared:DISK.", valueName: "name")) var name: String
            @Argument(help: ArgumentHelp("512M, or none.", valueName: "size"), transform: { $0 == "none" ? nil : try Tmem.bytes($0) })
            var size: UInt64?
            @Option(help: ArgumentHelp("One pool, as in 'quire tmem list'.", valueName: "pool")) var pool: String?
            @OptionGroup var answer: AnswerOption
            func run() throws { try answer.about(name, "tmem cap") { _ throws(QuireError) in try Tmem.ask(.cap(pool: pool, size), of: name) } }
        }

        struct Save: ParsableCommand {
            static let configuration = CommandConfiguration(
                commandName: "save", abstract: "Writes what a paused VM has swapped to a file.",
                discussion: """
                    Only while the guest does not run: pause it first (QMP 'stop', or a migration with \
                    pause-before-switchover). FILE appears when it is complete; - is stdout. The file is not compressed.

                    Around a migration, with the source in the state pre-switchover: \
                    quire tmem save web1 - | ssh there quire tmem restore web1 -
                    """)
            @Argument(help: ArgumentHelp("The VM.", valueName: "name")) var name: String
            @Argument(help: ArgumentHelp("The file, or -.", valueName: "file")) var file: String

            @OptionGroup var answer: AnswerOption

            func validate() throws {
                guard !answer.json || file != "-" else { throw ValidationError("--json and FILE - both write to stdout: name a file") }
            }

            func run() throws {
                try answer.about(name, "tmem save") { said throws(QuireError) in
                    let pages = try save()
                    said.pages = UInt64(pages)
                    if !answer.json { writeStandardError("quire: \(pages) pages saved") }
                }
            }

            /// Returns how many pages, as the backend says.
            private func save() throws(QuireError) -> String {
                guard file != "-" else { return try Tmem.ask(.save, of: name, passing: [1], patienceMilliseconds: -1) }
                // A device or a pipe is written as it is.
                let isOther = (try? Descriptor.open(file, O_RDONLY | O_NONBLOCK).status().isRegularFile) == false
                let path = isOther ? file : file + ".partial"
                do throws(QuireError) {
                    // Guest memory goes into a file of ours and no other's: not through a link, nor to whoever has made one there.
                    if !isOther { Files.remove(path) }
                    let target = try Descriptor.open(path, O_WRONLY | (isOther ? 0 : O_CREAT | O_EXCL | O_NOFOLLOW), mode: 0o600)
                    let raw = target.raw, all = Tmem.swapped(name)
                    let pages = try ProgressBar.during("\(name): saving", { all > 0 && !isOther ? Double(lseek(raw, 0, SEEK_CUR)) / all : nil }) {
                        () throws(QuireError) in try Tmem.ask(.save, of: name, passing: [raw], patienceMilliseconds: -1)
                    }
                    if !isOther {
                        guard fsync(target.raw) == 0 else { throw .system("cannot write \(path)") }
                        guard unsafe rename(path, file) == 0 else { throw .system("cannot rename \(path) to \(file)") }
                    }
                    return pages
                } catch {
                    if !isOther { Files.remove(path) }
                    throw error
                }
            }
        }

        struct Restore: ParsableCommand {
            static let configuration = CommandConfiguration(
                commandName: "restore", abstract: "Replaces what a VM has swapped by what was saved.",
                discussion: """
                    Only while the guest does not run: before it boots, or waiting for a migration, or paused. The file is \
                    read and checked to its end first; if anything is wrong with it, nothing changes.
                    """)
            @Argument(help: ArgumentHelp("The VM.", valueName: "name")) var name: String
            @Argument(help: ArgumentHelp("The file, or - for stdin.", valueName: "file")) var file: String

            @OptionGroup var answer: AnswerOption

            func run() throws {
                try answer.about(name, "tmem restore") { said throws(QuireError) in
                    let pages = try restore()
                    said.pages = UInt64(pages)
                    if !answer.json { writeStandardError("quire: \(pages) pages restored") }
                }
            }

            private func restore() throws(QuireError) -> String {
                guard file != "-" else { return try Tmem.ask(.restore, of: name, passing: [0], patienceMilliseconds: -1) }
                let source = try Descriptor.open(file, O_RDONLY)
                let raw = source.raw, all = Double(try source.status().byteCount)
                // The backend reads on from where our descriptor stands.
                return try ProgressBar.during("\(name): restoring", { all > 0 ? Double(lseek(raw, 0, SEEK_CUR)) / all : nil }) {
                    () throws(QuireError) in try Tmem.ask(.restore, of: name, passing: [raw], patienceMilliseconds: -1)
                }
            }
        }
    }
}
