import Glibc
import Host
import Platform
import StoreProtocol
import TestSupport
import Testing

/// Where the host's kernel does not let us merge, there is nothing to see.
extension Trait where Self == ConditionTrait {
    static var needsMerging: Self { .enabled(if: whyNothingIsMerged == nil, "\(whyNothingIsMerged ?? "")") }
}

/// Two guests whose equal pages are kept once, and the quired that keeps them. Both run the same program with the same seed,
/// so nearly every page of the one has equals in the other.
final class Pair {
    let store: Store
    let guests: [Guest]
    private let folder: Folder
    private var loads: [Int] = []
    private(set) var longest: [Int] = []

    init(_ store: Store, _ machine: Machine = Machine(), options: [[String]] = [[], []]) throws {
        self.store = store
        let folder = try Folder()
        self.folder = folder
        guests = try zip(["one", "two"], options).map { name, options in
            try Guest(
                machine.with {
                    $0.name = name
                    if $0.configuration == Machine().configuration { $0.options += ["--store", store.path] }
                    $0.options += ["--merge-period", "100ms"] + options
                    $0.boots = false
                }, in: folder)
        }
        for guest in guests { try guest.expectReady() }
    }

    private func arguments(_ command: String, _ guest: Guest) -> [String] {
        ["env", "QUIRE_RUNTIME_DIR=" + folder.path + "/run", Program.quire, command, guest.machine.name]
    }
    func quire(_ command: String, _ guest: Guest) throws { try host(arguments(command, guest)) }
    /// Has them read their configuration again; returns what is said.
    func reload() throws -> String {
        let (status, text) = try Program.run([
            "env", "QUIRE_RUNTIME_DIR=" + folder.path + "/run", Program.quire, "config", "reload", "--store", folder.path + "/none/store.sock",
        ])
        guard status == 0 else { throw Trouble("quire config reload: \(status): \(text)") }
        return text
    }
    /// The same, without waiting for its end.
    func begin(_ command: String, _ guest: Guest) throws -> ChildProcess {
        var options = ChildProcess.Options()
        let null = try Descriptor.open("/dev/null", O_RDWR)
        options.passing = [.init(from: null.raw, to: 1), .init(from: null.raw, to: 2)]
        return try ChildProcess(arguments(command, guest), options)
    }

    /// Both begin to share.
    func start(_ mebibytes: Int = 96, seconds: Int, _ more: String = "--threads 2") throws {
        for guest in guests {
            try guest.watched {
                loads.append(try guest.console.start("quire-load share \(mebibytes) \(seconds) --seed 7 \(more)"))
                try guest.console.expect("sharing, still page at pfn ", within: Guest.patience(for: 20))
            }
        }
    }

    func drain() throws {
        for guest in guests { try guest.watched { try guest.console.drain() } }
    }

    /// Lets the guests run for some time; what they say of wrong bytes ends the test at once.
    func pass(milliseconds: Int) throws {
        let end = monotonicNanoseconds() + UInt64(milliseconds) * 1_000_000
        while monotonicNanoseconds() < end {
            try drain()
            for guest in guests where guest.console.log.contains("WRONG") {
                throw Guest.Failure(error: Trouble("wrong bytes in '\(guest.machine.name)'"), log: guest.report)
            }
            ProcessCalls.sleep(milliseconds: 20)
        }
    }

    func wait(for what: String, within seconds: Double = Effort.patience, _ condition: () throws -> Bool) throws {
        let deadline = monotonicNanoseconds() + UInt64(seconds * 1e9)
        while try !condition() {
            try pass(milliseconds: 20)
            guard monotonicNanoseconds() < deadline else {
                throw Trouble("waited \(Int(seconds)) s for \(what) in vain\n" + guests.map(\.report).joined() + store.errors)
            }
        }
    }

    /// Both end: not one byte was wrong. Notes how long a single page took at worst, in milliseconds.
    func finish(within seconds: Double) throws {
        for (guest, load) in zip(guests, loads) {
            let (text, status) = try guest.watched { try guest.console.finish(load, within: seconds) }
            guard status == 0, let line = text.split(separator: "\n").last, line.hasPrefix("ok ") else {
                throw Guest.Failure(error: Trouble("the load in '\(guest.machine.name)': \(status): \(text)"), log: guest.report)
            }
            print("\(guest.machine.name): \(line)")
            longest.append(Int(line.split(separator: " ").dropLast().last ?? "") ?? .max)
        }
        loads = []
    }

    /// What quired counts is what the page maps say, when nothing moves.
    func expectExactCounts(sourceLocation: SourceLocation = #_sourceLocation) throws {
        let views = try guests.map { try PageEntries($0) }
        var last = ""
        do {
            try wait(for: "quired's figures to be those of the page maps") {
                let merged = try views.map { try $0.merged() }
                let figures = try store.figures()
                let slots = merged.reduce(into: Set<UInt64>()) { $0.formUnion($1.slots) }
                last = "quired: \(figures.sharedPages) shared, \(figures.sharingPages) sharing, \(figures.heldPages) held; page maps: \(slots.count), \(merged.map(\.sharing))"
                return figures.sharingPages == UInt64(merged.reduce(0) { $0 + $1.sharing }) && figures.sharedPages == UInt64(slots.count)
            }
        } catch {
            Issue.record("\(last)\n\(error)", sourceLocation: sourceLocation)
        }
        print(last)
    }
}

extension Guest {
    /// But for a few pages, which a guest's kernel writes now and then.
    fileprivate func waitUntilMergingStandsStill(butFor few: UInt64 = 0) throws {
        try wait(for: "merging to stand still") {
            let before = status.merging.mergedTotalPages
            ProcessCalls.sleep(milliseconds: 1500)
            return status.merging.mergedTotalPages <= before + few
        }
    }

    /// The stores of which QEMU has pages mapped, by their files.
    fileprivate var mappedStores: Set<Substring> {
        get throws {
            let maps = try Files.read("/proc/\(qemuPID)/maps", limit: 1 << 26).split(separator: "\n")
            return Set(maps.filter { $0.contains("/memfd:quire-store") }.map { $0.split(separator: " ")[4] })
        }
    }

    /// What QEMU has mapped of memory files in huge pages.
    fileprivate var hugeBytes: UInt64 {
        get throws {
            let lines = try Files.read("/proc/\(qemuPID)/smaps", limit: 1 << 26).split(separator: "\n")
            return lines.filter { $0.hasPrefix("ShmemPmdMapped:") }.reduce(0) { $0 + (UInt64($1.filter(\.isNumber)) ?? 0) << 10 }
        }
    }
}

extension Integration {
    /// Equal pages of real guests are kept once, and no guest ever reads anything but what it wrote: whatever merges, folds and
    /// un-merges meanwhile, and whoever dies.
    @Suite(.serialized, .needsMerging) struct Merge {
        /// Two guests go through both, one after the other: neither ends a guest, so one boot of the two is enough.
        @Test func nothingIsWrongWhoeverDies() throws {
            let pair = try Pair(Store())
            try mergeAndUnmerge(pair)
            try endBackendsAndQuired(pair)
        }

        /// The guests rewrite and check their pages, in user space and in the kernel, while merging and folding go on as fast
        /// as they can, and all is un-merged and merged again, now and then.
        private func mergeAndUnmerge(_ pair: Pair) throws {
            let seconds = Effort.scaled(18)
            try pair.start(seconds: seconds)
            let views = try pair.guests.map { try PageEntries($0) }
            let end = monotonicNanoseconds() + UInt64(seconds) * 1_000_000_000
            var unmerged: [Int] = []
            while monotonicNanoseconds() < end {
                try pair.pass(milliseconds: 4000)
                let number = unmerged.count % 2
                let before = try views[number].merged()
                try pair.quire("unmerge", pair.guests[number])
                let after = try views[number].merged()
                #expect(after.sharing == 0 && after.zero == 0)
                unmerged.append(before.sharing + before.zero)
                try pair.pass(milliseconds: 200)
                try pair.quire("merge", pair.guests[number])
            }
            try pair.finish(within: Guest.patience(for: seconds))
            for guest in pair.guests {
                let merging = guest.status.merging
                print("\(guest.machine.name): merged \(merging.mergedTotalPages), folded \(merging.foldedTotalPages), hashed \(merging.hashedTotalPages), mappings \(merging.mappings)")
                #expect(merging.mergedTotalPages > 5000, "\(guest.report)")
                #expect(merging.foldedTotalPages > 2000, "\(guest.report)")
                #expect(guest.status.restarts == 0, "\(guest.stderr)")
                try guest.expectQuietLog()
            }
            print("un-merged: \(unmerged)")
            #expect(unmerged.reduce(0, +) > 5000)
            try pair.expectExactCounts()
        }

        /// The control: a merged page that somebody else writes is seen.
        @Test func aWrongByteIsSeen() throws {
            let store = try Store()
            let guest = try Guest(Machine(options: ["--store", store.path, "--merge-period", "100ms"]))
            try guest.watched {
                let load = try guest.console.start("quire-load share 32 60")
                try guest.console.expect("sharing, still page at pfn 0x", within: Guest.patience(for: 20))
                let text = try guest.console.expect("\n", within: 10)
                guard let pfn = UInt64(text, radix: 16) else { throw Trouble("no page: \(text)") }
                let pages = try PageEntries(guest)
                try guest.wait(for: "the page to be merged") {
                    if case .shared = try pages.kinds()[Int(pfn)] { true } else { false }
                }
                let byte = try pages.read(pfn, count: 1)
                try pages.write(pfn, at: 0, [byte[0] ^ 1])
                let (said, status) = try guest.console.finish(load, within: Guest.patience(for: 60))
                #expect(status == 1)
                #expect(said.contains("WRONG page") && said.contains("offset 0 got"), "\(said)")
            }
        }

        /// The backend of one guest, quired, or both: killed, or frozen for a while, at any moment. Nobody sees a wrong
        /// byte, nobody waits for long, and quired counts what is there.
        private func endBackendsAndQuired(_ pair: Pair) throws {
            let seconds = Effort.scaled(24)
            let before = pair.guests.map { $0.status.merging.mergedTotalPages }
            try pair.start(seconds: seconds)
            try pair.wait(for: "merged pages") {
                zip(pair.guests, before).allSatisfy { $0.status.merging.mergedTotalPages > $1 + 1000 }
            }
            let end = monotonicNanoseconds() + UInt64(seconds - 4) * 1_000_000_000
            var round = 0
            while monotonicNanoseconds() < end {
                let guest = pair.guests[round / 2 % 2]
                let backend = guest.backendPID, quired = pair.store.worker
                if round % 5 == 4 {
                    // In the middle of an un-merge.
                    var command = try pair.begin("unmerge", guest)
                    ProcessCalls.sleep(milliseconds: UInt32.random(in: 0...400))
                    ProcessCalls.signal(backend, SIGKILL)
                    command.wait()
                    try guest.wait(for: "another backend") { guest.backendPID != backend && guest.backendPID != 0 }
                    try pair.wait(for: "the agent to come back") { (try? pair.quire("merge", guest)) != nil }
                } else {
                    let signal = round % 2 == 0 ? SIGKILL : SIGSTOP
                    let victims = [[backend], [quired], [backend, quired]][round % 3]
                    for pid in victims { ProcessCalls.signal(pid, signal) }
                    try pair.pass(milliseconds: Int.random(in: 50...1500))
                    for pid in victims where signal == SIGSTOP { ProcessCalls.signal(pid, SIGCONT) }
                    try pair.pass(milliseconds: Int.random(in: 500...2500))
                }
                round += 1
            }
            try pair.finish(within: Guest.patience(for: seconds))
            print("\(round) rounds, restarts \(pair.guests.map(\.status.restarts)), longest \(pair.longest) ms")
            for guest in pair.guests { try guest.expectQuietLog() }
            try pair.store.waitForService()
            try pair.wait(for: "merging to go on") { pair.guests.allSatisfy { $0.status.state != .down && $0.status.merging.state == .active } }
            try pair.expectExactCounts()
            for guest in pair.guests { try pair.quire("unmerge", guest) }
            try pair.expectExactCounts()
            #expect(try pair.store.figures().sharedPages == 0)
        }

        // MARK: Pins

        /// A disk with cache=none and aio=threads leaves the gate open: its transfers hold the range lock. What is read by DMA
        /// into pages that are merged before and after is right. So it is with a disk that QEMU buffers. With native AIO the
        /// gate closes before the first transfer, and opens when no file is left that is open with O_DIRECT.
        @Test func pinnedPages() throws {
            let store = try Store()
            let folder = try Folder()
            let images = try ["direct", "buffered", "native"].map { try Self.patternedImage(folder, $0) }
            let guest = try Guest(
                Machine(
                    arguments: [
                        "-drive", "file=\(images[0]),if=none,id=d,format=raw,cache=none,aio=threads,file.locking=off",
                        "-device", "virtio-blk-pci,drive=d,id=dd,serial=direct",
                        "-drive", "file=\(images[1]),if=none,id=b,format=raw,cache=writeback,file.locking=off",
                        "-device", "virtio-blk-pci,drive=b,serial=buffered",
                    ], options: ["--store", store.path, "--merge-period", "100ms"]), in: folder)
            try guest.watched {
                try guest.wait(for: "an open gate") { guest.status.merging.state == .active }
                try guest.sh("quire-load share 64 \(Effort.scaled(20)) --seed 7 --threads 2 >/tmp/share 2>&1 &")
                for name in ["direct", "buffered"] {
                    let text = try guest.sh(Self.readAgain(name, like: images[0], seconds: Effort.scaled(8)), within: Guest.patience(for: 40))
                    print("\(name): \(text.filter { !$0.isNewline })")
                }
                let merging = guest.status.merging
                print("merged \(merging.mergedTotalPages), folded \(merging.foldedTotalPages): \(merging.state) \(merging.reason)")
                #expect(merging.state == .active, "\(merging.reason)")
                #expect(merging.mergedTotalPages > 5000)

                try guest.qmp.command(
                    "blockdev-add",
                    [
                        "driver": .string("raw"), "node-name": .string("n"),
                        "file": .object([
                            "driver": .string("file"), "filename": .string(images[2]), "aio": .string("native"),
                            "cache": .object(["direct": .bool(true)]),
                        ]),
                    ])
                try guest.qmp.command(
                    "device_add",
                    ["driver": .string("virtio-blk-pci"), "drive": .string("n"), "id": .string("nd"), "serial": .string("native")])
                _ = try guest.sh(Self.readAgain("native", like: images[2], seconds: 3), within: Guest.patience(for: 20))
                try guest.wait(for: "a closed gate") { guest.status.merging.reason.contains("native AIO") }
                #expect(guest.status.merging.state == .paused)
                let merged = guest.status.merging.mergedTotalPages
                ProcessCalls.sleep(milliseconds: 1000)
                #expect(guest.status.merging.mergedTotalPages == merged)

                try guest.qmp.command("device_del", ["id": .string("nd")])
                try guest.wait(for: "QEMU to let the disk go") { (try? guest.qmp.command("blockdev-del", ["node-name": .string("n")])) != nil }
                // Native AIO may come back as long as there is a file for it.
                try guest.qmp.command("device_del", ["id": .string("dd")])
                try guest.wait(for: "the gate to open") { guest.status.merging.state == .active }
                let text = try guest.sh("wait; cat /tmp/share", within: Guest.patience(for: 40))
                #expect(text.contains("\nok "), "\(text)")
                try guest.expectQuietLog()
            }
        }

        // MARK: Memory that comes and goes

        /// Half of a DIMM is merged when it is unplugged: what the page map said of it is forgotten, un-merging works, and the
        /// DIMM that comes in its place is merged like the first.
        @Test func memoryThatIsUnplugged() throws {
            let store = try Store()
            let guest = try Guest(
                Machine(memory: "512M,slots=2,maxmem=2G", options: ["--store", store.path, "--merge-period", "100ms"]))
            let gfns = 0x100000..<0x120000
            try guest.watched {
                for _ in 0..<2 {
                    let dimm = try guest.plugDIMM()
                    let load = try guest.console.start("quire-load share 500 \(Effort.scaled(8)) --seed 7 --threads 2")
                    try guest.wait(for: "merged pages in the DIMM") { try PageEntries(guest).mergedCount(gfns) > 5000 }
                    let (text, status) = try guest.console.finish(load, within: Guest.patience(for: 60))
                    #expect(status == 0, "\(text)")
                    try guest.takeOffline(dimm)
                    #expect(try PageEntries(guest).mergedCount(gfns) > 1000)
                    try guest.unplug(dimm)
                    try guest.wait(for: "the page map to forget the DIMM") { try PageEntries(guest).mergedCount(gfns) == 0 }
                    try guest.wait(for: "quire unmerge") {
                        (try? CommandSocket.ask("unmerge", of: guest.machine.name, in: guest.runtime)) != nil
                    }
                    #expect(try store.figures().sharingPages == 0)
                    try CommandSocket.ask("merge", of: guest.machine.name, in: guest.runtime)
                }
                try guest.expectQuietLog()
            }
        }

        /// Reset while merged, now and then with the backend dead at that moment: the next kernel finds its memory, registers
        /// for recycling, and pages are recycled and merged side by side.
        @Test func resetAndRecycling() throws {
            let store = try Store()
            let guest = try Guest(Machine(options: ["--store", store.path, "--merge-period", "100ms"]))
            try guest.watched {
                for round in 0..<Effort.scaled(2) {
                    try guest.loadModule()
                    try guest.wait(for: "the registration") { guest.status.state == .active || guest.status.state == .paused }
                    if round == 0 { try recycleZeros(guest) }
                    try guest.startChurn(100, grabbing: 50)
                    try guest.sh("quire-load share 64 \(Effort.scaled(6)) --seed 7 --threads 2", within: Guest.patience(for: 30))
                    try guest.expectChurnGoesOn()
                    try guest.stopChurn()
                    #expect(guest.status.merging.mergedTotalPages > 1000)
                    print("recycled \(guest.status.recycledTotalPages), \(guest.status.state) \(guest.status.reason)")
                    let backend = guest.backendPID
                    if round % 2 == 0 { ProcessCalls.signal(backend, SIGKILL) }
                    try guest.qmp.command("system_reset")
                    try guest.expectReady()
                }
                try guest.sh("quire-load share 64 4 --seed 7 --threads 2", within: Guest.patience(for: 20))
                // Without the module, what was recycled before the reset is merged like anything else.
                #expect(guest.status.state == .noGuest)
                let load = try holdZeros(guest)
                try guest.console.send("")
                #expect(try guest.console.finish(load, within: Guest.patience(for: 30)).status == 0)
                try guest.expectQuietLog()
            }
        }

        /// A program that holds 100 MiB of zeros until it is sent a line; most of them are merged when this returns.
        private func holdZeros(_ guest: Guest) throws -> Int {
            let load = try guest.console.start("quire-load hold 100 --zeros 1")
            try guest.console.expect("peak\n", within: Guest.patience(for: 10))
            try guest.wait(for: "zeros to be merged") { guest.status.merging.zeroPages > 20_000 }
            return load
        }

        /// Pages that were merged when the guest freed them are recycled, and from then on stand in that figure alone.
        private func recycleZeros(_ guest: Guest) throws {
            let load = try holdZeros(guest)
            let before = guest.status.recycledTotalPages
            try guest.console.send("")
            let (text, status) = try guest.console.finish(load, within: Guest.patience(for: 30))
            #expect(status == 0, "\(text)")
            try guest.wait(for: "them to be recycled") { guest.status.recycledTotalPages > before + 20_000 }
            let now = guest.status
            let merged = now.merging.zeroPages + now.merging.sharingPages - now.merging.divergedPages
            #expect(now.residentBytes + now.recycledBytes + merged * 4096 < now.ramBytes + 32 << 20, "\(now)")
        }

        /// Saved and loaded in place, then saved to a file and restored by another QEMU, all of it merged: right bytes.
        @Test func savedAndRestored() throws {
            let store = try Store()
            let folder = try Folder()
            let file = folder.path + "/saved"
            // Emulation loses writes in 7.2 while a guest migrates that writes (Pause/migratesWhileItWrites).
            var machine = Machine(
                qemu: .ten, arguments: try Pause.disk(in: folder), options: ["--store", store.path, "--merge-period", "100ms"])
            let seconds = Effort.scaled(25)
            var load = 0
            do {
                let guest = try Guest(machine, in: folder)
                try guest.watched {
                    load = try guest.console.start("quire-load share 64 \(seconds) --seed 7 --threads 2")
                    func waitForMerging() throws {
                        let before = guest.status.merging.mergedTotalPages
                        try guest.wait(for: "pages to be merged") { guest.status.merging.mergedTotalPages > before + 2000 }
                    }
                    try waitForMerging()
                    try guest.qmp.human("savevm one", within: Guest.patience(for: 60))
                    try waitForMerging()
                    try guest.qmp.human("loadvm one", within: Guest.patience(for: 60))
                    // All of memory was written: zeros come first.
                    try guest.wait(for: "pages to be shared") { guest.status.merging.sharingPages > 1000 }
                    try guest.qmp.command("migrate-set-parameters", ["max-bandwidth": .number(Double(1 << 30)), "downtime-limit": .number(5000)])
                    try guest.qmp.command("migrate", ["uri": .string("exec:cat > \(file)")])
                    try guest.wait(for: "the guest to be saved", within: Guest.patience(for: 60)) {
                        try guest.qmp.command("query-migrate")["status"]?.text == "completed"
                    }
                    let merging = guest.status.merging
                    #expect(merging.sharingPages > 500, "\(merging)")
                    try guest.qmp.command("quit")
                    #expect(try guest.waitForEnd() == 0)
                }
            }
            machine.boots = false
            machine.arguments += ["-incoming", "exec:cat \(file)"]
            let guest = try Guest(machine, in: folder)
            try guest.watched {
                let (text, status) = try guest.console.finish(load, within: Guest.patience(for: seconds))
                #expect(status == 0 && text.contains("ok "), "\(text)")
                #expect(guest.status.merging.mergedTotalPages > 1000)
                try guest.expectQuietLog()
            }
        }

        // MARK: Groups, and what is wrong

        /// Two guests that hold the same, in two groups: no page of the store is in both.
        @Test func groupsShareNothing() throws {
            let pair = try Pair(
                Store(["--keep", "--group", "red=0", "--group", "blue=0"]), options: [["--group", "red"], ["--group", "blue"]])
            try pair.start(48, seconds: 8, "--alternate")
            try pair.finish(within: Guest.patience(for: 20))
            try pair.wait(for: "merged pages") { pair.guests.allSatisfy { $0.status.merging.sharingPages > 500 } }
            try pair.pass(milliseconds: 1500)
            var stores: [Set<Substring>] = []
            var slots = 0
            for guest in pair.guests {
                stores.append(try guest.mappedStores)
                let merged = try PageEntries(guest).merged()
                slots += merged.slots.count
                try guest.wait(for: "the group's figures to be its guest's alone") {
                    let now = try PageEntries(guest).merged(), merging = guest.status.merging
                    return merging.groupSharingPages == UInt64(now.sharing) && merging.groupSharedPages == UInt64(now.slots.count)
                }
            }
            #expect(stores.allSatisfy { $0.count == 1 } && stores[0].isDisjoint(with: stores[1]), "\(stores)")
            // Some pages share a slot.
            #expect(slots > 200)
        }

        /// The configuration gives a VM that runs another group, and two VMs another quired. They go there when they share nothing any
        /// more where they are, and not before, also if a backend dies meanwhile; and their guests read what they wrote.
        @Test func anotherGroupAndAnotherStore() throws {
            let groups = ["--keep", "--group", "red=0", "--group", "blue=0"]
            let folder = try Folder(), path = folder.path + "/quire.toml", other = try Store(groups), store = try Store(groups)
            func write(_ store: Store, _ group: String) throws {
                let text = "[backend]\nstore = \"\(store.path)\"\ngroup = \"blue\"\n[vm.one]\ngroup = \"\(group)\"\n"
                try Descriptor.open(path, O_RDWR | O_CREAT, mode: 0o600).replaceContent(text)
            }
            try write(store, "red")
            let pair = try Pair(store, Machine(configuration: path)), one = pair.guests[0]
            func stores() throws -> [Set<Substring>] { try pair.guests.map { try $0.mappedStores } }
            func anew(_ guest: Guest) throws {
                try pair.quire("unmerge", guest)
                #expect(try PageEntries(guest).merged().sharing == 0)
                try pair.quire("merge", guest)
            }
            // One of two threads of each writes all the time.
            try pair.start(64, seconds: 40)
            try pair.wait(for: "pages of two groups") { pair.guests.allSatisfy { $0.status.merging.sharingPages > 500 } }
            let before = try stores()
            #expect(before.allSatisfy { $0.count == 1 } && before[0].isDisjoint(with: before[1]), "\(before)")

            let when = ", as soon as it shares nothing where it is (quire unmerge"
            try write(store, "blue")
            let text = try pair.reload()
            #expect(text == "one: vm.one.group: \"red\" -> \"blue\"\(when) one, then quire merge one)\ntwo: nothing changed\n")
            try pair.wait(for: "the line that it waits") {
                one.status.merging.reason == "only pages of zeros are merged: it moves to share group 'blue' as soon as it shares nothing where it is: quire unmerge one, then quire merge one"
            }
            try pair.pass(milliseconds: 1500)
            #expect(try stores() == before)
            #expect(one.status.merging.sharingPages > 0)
            let backend = one.backendPID
            ProcessCalls.signal(backend, SIGKILL)
            try pair.wait(for: "the successor to wait as well") {
                one.backendPID != backend
                    && one.status.merging.reason.hasSuffix("it still shares pages in share group 'red': quire unmerge one, then quire merge one")
            }
            #expect(try stores() == before)
            try anew(one)
            try pair.wait(for: "pages of one group") {
                try stores() == [before[1], before[1]] && one.status.merging.sharingPages > 500
                    && !one.status.merging.reason.contains("share group")
            }
            // Nothing is left in the group that it was in.
            var observer = StoreObserver(path: store.path)
            #expect(try observer.groups().map(\.name) == ["blue"])

            try write(other, "blue")
            let moved = try pair.reload()
            #expect(moved.contains("one: backend.store: ") && moved.contains("two: backend.store: ") && moved.contains(when), "\(moved)")
            try pair.wait(for: "the line that both wait") {
                pair.guests.allSatisfy { $0.status.merging.reason.contains("it moves to quired at \(other.path) as soon as") }
            }
            // Where they are they stay connected, whatever becomes of that quired: nothing comes back unasked.
            let worker = pair.store.worker
            ProcessCalls.signal(worker, SIGKILL)
            try store.waitForService()
            try pair.pass(milliseconds: 5000)
            #expect(try store.worker != worker && stores() == [before[1], before[1]])
            #expect(pair.guests.allSatisfy { $0.status.merging.sharingPages > 500 && $0.status.merging.reason.contains("it moves to quired") })
            for guest in pair.guests { try anew(guest) }
            try pair.wait(for: "pages of the other quired") {
                let stores = try stores()
                return stores[0] == stores[1] && stores[0].count == 1 && stores[0] != before[1]
                    && pair.guests.allSatisfy { $0.status.merging.sharingPages > 500 }
            }
            try pair.finish(within: Guest.patience(for: 60))
            #expect(try store.figures().sharingPages == 0 && store.figures().storeBytes == 0)
            for guest in pair.guests { try guest.expectQuietLog() }
        }

        /// What was quiet while there was no quired is merged when there is one, though nobody writes it any more.
        @Test func aStoreThatComesLate() throws {
            let folder = try Folder(), path = folder.path + "/quire.toml", store = try Store()
            func write(_ store: String) throws {
                let text = "[backend]\nstore = \"\(store)\"\nmerge-period = \"100ms\"\n"
                try Descriptor.open(path, O_RDWR | O_CREAT, mode: 0o600).replaceContent(text)
            }
            try write(folder.path + "/none.sock")
            let guest = try Guest(Machine(configuration: path), in: folder)
            try guest.watched {
                try guest.sh("dd if=/dev/urandom of=/tmp/a bs=1M count=20 2>/dev/null; cp /tmp/a /tmp/b")
                let sums = try guest.sh("md5sum /tmp/a /tmp/b")
                try guest.wait(for: "the line that there is none") { guest.status.merging.reason.contains("no quired listens at ") }
                try guest.wait(for: "all that is quiet to be looked at") {
                    let before = guest.status.merging.hashedTotalPages
                    ProcessCalls.sleep(milliseconds: 1500)
                    return before > 10_000 && guest.status.merging.hashedTotalPages < before + 1000
                }
                #expect(guest.status.merging.sharingPages == 0)
                try write(store.path)
                try host(["env", "QUIRE_RUNTIME_DIR=\(folder.path)/run", Program.quire, "config", "reload", guest.machine.name])
                try guest.wait(for: "equal pages to be merged") { guest.status.merging.sharingPages > 8000 }
                #expect(try guest.sh("md5sum /tmp/a /tmp/b") == sums)
                try guest.expectQuietLog()
            }
        }

        /// Each has one line that says so, and the VM runs on: no quired; a group that quired does not know.
        @Test func whatIsWrongIsSaid() throws {
            let store = try Store()
            for (options, said) in [
                (["--store", "/nonexistent/store.sock"], "no quired listens at /nonexistent/store.sock"),
                (["--store", store.path, "--group", "nosuch"], "there is no share group 'nosuch'"),
            ] {
                let guest = try Guest(Machine(options: options + ["--merge-period", "100ms"]))
                try guest.watched {
                    try guest.sh("quire-load share 64 5 --seed 7 --threads 2", within: Guest.patience(for: 20))
                    try guest.wait(for: "merging") { guest.status.merging.zeroPages > 500 }
                    try guest.wait(for: "the line '\(said)'") { guest.status.merging.reason.contains(said) }
                    let merging = guest.status.merging
                    #expect(merging.state == .active, "\(merging)")
                    #expect(merging.sharingPages == 0)
                    try CommandSocket.ask("unmerge", of: guest.machine.name, in: guest.runtime)
                    #expect(try PageEntries(guest).merged().zero == 0)
                }
            }
        }

        /// Where the agent cannot work at all one line says why, and the VM runs on with its freed memory given back: one of
        /// another version; a host that lets nobody have a userfaultfd.
        @Test func withoutAnAgentThatCanMerge() throws {
            let store = try Store()
            let folder = try Folder()
            let other = Machine(options: ["--agent", try Self.otherAgent(folder)])
            let forbidden = Machine(
                wrapper: [
                    "unshare", "-m", "sh", "-c",
                    "mount --bind /dev/null /dev/userfaultfd && exec setpriv --bounding-set=-sys_ptrace \"$@\"", "sh",
                ])
            for (machine, said) in [
                (other, "the agent in QEMU speaks version 99"), (forbidden, "QEMU may not open a userfaultfd"),
            ] {
                let guest = try Guest(machine.with { $0.options += ["--store", store.path, "--merge-period", "100ms"] })
                try guest.watched {
                    try guest.sh("quire-load share 64 3 --seed 7 --threads 2", within: Guest.patience(for: 20))
                    try guest.wait(for: "the line '\(said)'") { guest.status.merging.reason.contains(said) }
                    #expect(guest.status.merging.state == .paused && guest.status.merging.mergedTotalPages == 0)
                    try guest.loadModule()
                    try guest.expectRecycling()
                }
            }
        }

        /// The agent as another version would be.
        private static func otherAgent(_ folder: Folder) throws -> String {
            let sources = Program.top + "/Sources", own = "#define QUIRE_AGENT_VERSION     1u"
            let header = try Files.read(sources + "/CQuireLayout/include/quire_layout.h", limit: 1 << 20)
            guard header.contains(own) else { throw Trouble("quire_layout.h has no line '\(own)'") }
            try Descriptor.open(folder.path + "/quire_layout.h", O_RDWR | O_CREAT).writeBytes(
                at: 0, Array(header.replacing(own, with: "#define QUIRE_AGENT_VERSION     99u").utf8))
            let files = (Files.list(sources + "/QuireAgent") ?? []).filter { $0.hasSuffix(".c") }.map { "\(sources)/QuireAgent/\($0)" }
            let path = folder.path + "/libquire-agent.so"
            try host(
                ["cc", "-O1", "-fPIC", "-fvisibility=hidden", "-shared", "-Wl,-z,now", "-o", path, "-I\(folder.path)"]
                    + ["QuireAgent", "CQuireLayout", "CPlatform"].map { "-I\(sources)/\($0)/include" } + files + ["-lpthread", "-ldl"])
            return path
        }

        /// What a kernel before Linux 6.7 gets: all of memory is read to find what the guests write. Slower, and as right: they
        /// rewrite and check their pages meanwhile.
        @Test func withoutWriteTracking() throws {
            let pair = try Pair(Store(), options: [["--no-write-tracking"], ["--no-write-tracking"]])
            let views = try pair.guests.map { try PageEntries($0) }
            try pair.start(48, seconds: Effort.scaled(22))
            try pair.wait(for: "the line that says so") {
                pair.guests.allSatisfy { $0.status.merging.reason.contains("--no-write-tracking") }
            }
            try pair.wait(for: "pages to be merged") { try views.allSatisfy { try $0.merged().sharing > 1000 } }
            try pair.finish(within: Guest.patience(for: Effort.scaled(22)))
            for guest in pair.guests {
                let merging = guest.status.merging
                print("\(guest.machine.name): merged \(merging.mergedTotalPages), folded \(merging.foldedTotalPages), hashed \(merging.hashedTotalPages)")
                #expect(merging.mergedTotalPages > 1000 && merging.foldedTotalPages > 0, "\(merging)")
                try guest.expectQuietLog()
            }
            try pair.expectExactCounts()
        }

        /// A guest that waits until its pages are merged and writes all of them at once, again and again: it sees its own bytes,
        /// its pages have to be quiet for longer each time, and others are merged meanwhile.
        @Test func aGuestThatWritesWhateverIsMerged() throws {
            let pair = try Pair(Store())
            let seconds = Effort.scaled(15)
            let storm = try pair.guests[0].console.start("quire-load share 48 \(seconds) --seed 7 --threads 2 --storm")
            let calm = try pair.guests[1].console.start("quire-load share 48 \(seconds) --seed 7 --threads 2")
            for (guest, load) in zip(pair.guests, [storm, calm]) {
                let (text, status) = try guest.watched { try guest.console.finish(load, within: Guest.patience(for: seconds)) }
                #expect(status == 0 && text.contains("ok "), "\(text)")
                let merging = guest.status.merging
                print("\(guest.machine.name): merged \(merging.mergedTotalPages), folded \(merging.foldedTotalPages), hashed \(merging.hashedTotalPages)")
                #expect(merging.mergedTotalPages > 2000, "\(merging)")
            }
            #expect(pair.guests[0].status.merging.foldedTotalPages > 1000)
            try pair.quire("unmerge", pair.guests[0])
            try pair.expectExactCounts()
        }

        /// Nodes of NUMA in the guest: pages of each are merged, wherever its memory is.
        @Test func nodesInTheGuest() throws {
            let store = try Store()
            let half = 256 << 20, nodes = ["a", "b"]
            let guest = try Guest(
                Machine(
                    arguments: nodes.flatMap { ["-object", "memory-backend-ram,id=\($0),size=\(half)"] }
                        + nodes.enumerated().flatMap { ["-numa", "node,memdev=\($1),cpus=\($0)"] },
                    options: ["--store", store.path, "--merge-period", "100ms"]))
            try guest.watched {
                let load = try guest.console.start("quire-load share 320 \(Effort.scaled(15)) --seed 7 --threads 2")
                let map = try PageEntries(guest), pages = half / 4096
                try guest.wait(for: "merged pages in both nodes") {
                    try map.mergedCount(0..<pages) > 1000 && map.mergedCount(pages..<2 * pages) > 1000
                }
                let (text, status) = try guest.console.finish(load, within: Guest.patience(for: 60))
                #expect(status == 0 && text.contains("ok "), "\(text)")
                try CommandSocket.ask("unmerge", of: guest.machine.name, in: guest.runtime)
                #expect(try map.mergedCount(0..<2 * pages) == 0)
            }
        }

        /// A store without room shares what it has, and says that there is no more.
        @Test func aFullStoreIsSaid() throws {
            let store = try Store(["--keep", "--limit", "256K"])
            let guest = try Guest(Machine(options: ["--store", store.path, "--merge-period", "100ms"]))
            try guest.watched {
                let load = try guest.console.start("quire-load share 64 \(Effort.scaled(20)) --seed 7 --threads 2")
                try guest.wait(for: "the line of a full store, and pages that were refused") {
                    let merging = guest.status.merging
                    return try merging.reason.contains("the page store is full") && merging.sharingPages > 500 && store.figures().full > 0
                }
                #expect(try guest.status.merging.state == .active && store.figures().sharedPages <= 64)
                let (text, status) = try guest.console.finish(load, within: Guest.patience(for: 60))
                #expect(status == 0 && text.contains("ok "), "\(text)")
            }
        }

        /// What merging lent has to be there when guests write: it stops before that is not so any more, and says why. Here each
        /// merged page is to be backed by a thousand.
        @Test func theHostKeepsAReserve() throws {
            let store = try Store(["--keep", "--reserve", "100000"])
            let guest = try Guest(Machine(options: ["--store", store.path, "--merge-period", "100ms"]))
            try guest.watched {
                let load = try guest.console.start("quire-load share 64 \(Effort.scaled(20)) --seed 7 --threads 2")
                try guest.wait(for: "the line of the reserve") { guest.status.merging.reason.contains("(quired --reserve)") }
                try guest.waitUntilMergingStandsStill()
                let merging = guest.status.merging
                let lent = (merging.sharingPages + merging.zeroPages) * 4096
                let all = UInt64(ProcessCalls.memoryBytes)
                #expect(lent > 0 && lent < all / 1000 + 16 << 20, "\(merging)")
                let (text, status) = try guest.console.finish(load, within: Guest.patience(for: 60))
                #expect(status == 0 && text.contains("ok "), "\(text)")
            }
        }

        /// Every second page is like no other, so every page that is shared costs QEMU two mappings: merging stays below the
        /// limit, says why it leaves pages alone, and un-merging works.
        @Test func mappingsGetScarce() throws {
            let setting = "/proc/sys/vm/max_map_count", usual = 65530
            try withSetting(setting, "\(min(usual, Int(Files.read(setting).filter(\.isNumber)) ?? usual))") {
                let store = try Store()
                let guest = try Guest(Machine(memory: "640M", options: ["--store", store.path, "--merge-period", "100ms"]))
                try guest.watched {
                    let load = try guest.console.start("quire-load share 400 \(Effort.scaled(20)) --alternate --threads 2")
                    try guest.wait(for: "scarce mappings") { guest.status.merging.reason.contains("vm.max_map_count") }
                    let merging = guest.status.merging
                    print("\(merging.sharingPages) sharing, \(merging.mappings) of \(merging.mappingLimit): \(merging.reason)")
                    #expect(merging.sharingPages > 5000)
                    try CommandSocket.ask("unmerge", of: guest.machine.name, in: guest.runtime)
                    let merged = try PageEntries(guest).merged()
                    #expect(merged.sharing == 0 && merged.zero == 0)
                    try CommandSocket.ask("merge", of: guest.machine.name, in: guest.runtime)
                    let (text, status) = try guest.console.finish(load, within: Guest.patience(for: 60))
                    #expect(status == 0, "\(text)")
                }
            }
        }

        /// Where the host gives memory files huge pages, one of which little is equal is left whole, and one of which much is
        /// equal is split: 32 and 256 of 512 pages.
        @Test func hugePages() throws {
            try withSetting("/sys/kernel/mm/transparent_hugepage/shmem_enabled", "advise") {
                let store = try Store()
                let guest = try Guest(Machine(options: ["--store", store.path, "--merge-period", "100ms"]))
                try guest.watched {
                    let zeros = { guest.status.merging.zeroPages }
                    let much: UInt64 = 96 << 8, most: UInt64 = 64 << 20
                    try guest.sh("mkfifo /tmp/go; (quire-load hold 96 --full --thp --zeros 16 <>/tmp/go >/tmp/held 2>&1; echo $? >>/tmp/held) & true")
                    try guest.wait(for: "memory to be written") { try guest.sh("cat /tmp/held; true").contains("peak") }
                    try guest.wait(for: "huge pages to be left whole") { guest.status.merging.reason.contains("huge pages") }
                    try guest.waitUntilMergingStandsStill(butFor: 100)
                    let before = zeros(), whole = try guest.hugeBytes
                    print("\(before) pages of zeros merged, \(whole >> 20) MiB in huge pages")
                    #expect(whole >= most, "\(guest.report)")

                    let load = try guest.console.start("quire-load hold 96 --full --thp --zeros 2 --seed 3")
                    try guest.console.expect("peak\n", within: Guest.patience(for: 20))
                    try guest.wait(for: "huge pages to be split") { zeros() > before + much / 2 * 3 / 4 }
                    #expect(try guest.hugeBytes >= most, "\(guest.report)")
                    try guest.console.send("")
                    let (text, status) = try guest.console.finish(load, within: Guest.patience(for: 20))
                    #expect(status == 0 && text.contains("ok "), "\(text)")
                    try guest.sh("echo >/tmp/go")
                    try guest.wait(for: "the first load's end") { try guest.sh("cat /tmp/held").hasSuffix("\n0\n") }
                }
            }
        }

        /// 16 MiB: blocks that are equal to others of it, and zeros; and some that are like no other.
        static func patternedImage(_ folder: Folder, _ name: String) throws -> String {
            let path = folder.path + "/" + name
            let file = try Descriptor.open(path, O_RDWR | O_CREAT)
            for block in 0..<4096 {
                let value: UInt8 = block % 8 == 7 ? 0 : UInt8(1 + block / 8 % 16)
                var bytes = [UInt8](repeating: value, count: 4096)
                if block % 8 == 5 { bytes.replaceSubrange(0..<8, with: (0..<8).map { UInt8(truncatingIfNeeded: block >> ($0 * 4)) }) }
                guard unsafe pwrite(file.raw, bytes, 4096, off_t(block * 4096)) == 4096 else { throw Trouble("cannot write \(path)") }
            }
            return path
        }

        /// Reads a disk again and again, past the guest's cache: always the file's bytes.
        static func readAgain(_ serial: String, like image: String, seconds: Int) throws -> String {
            let sum = try host("md5sum", image).split(separator: " ")[0]
            return """
                d=; for n in 1 2 3 4 5 6 7 8 9 10; do \
                for s in /sys/block/vd*; do [ "$(cat $s/serial)" = \(serial) ] && d=/dev/${s##*/}; done; \
                [ -n "$d" ] && break; sleep 1; done; rounds=0; end=$(($(date +%s) + \(seconds))); \
                while [ $(date +%s) -lt $end ]; do echo 1 >/proc/sys/vm/drop_caches; \
                now=$(md5sum <$d); [ "${now%% *}" = \(sum) ] || { echo WRONG $now; break; }; \
                rounds=$((rounds+1)); sleep 0.3; done; echo $rounds rounds; [ "${now%% *}" = \(sum) ]
                """
        }
    }
}
