import CPlatform
import CQuireLayout
import Glibc
import Host
import PageContent
import Platform
import StoreProtocol
import TestSupport
import Testing

@Suite(.serialized) struct QuiredTests {
    @Test func twoVMsOverTheSocket() throws {
        let quired = try RunningStore()
        var a = try Backend(FakeVM("a"), path: quired.path), b = try Backend(FakeVM("b"), path: quired.path)
        for gfn in UInt64(0)..<64 {
            try a.vm.write(gfn, page(gfn))
            try b.vm.write(gfn + 100, page(gfn))
        }
        #expect(try a.lookUp(0..<64) == [])
        let runs = try b.lookUp(100..<164)
        #expect(runs.map(\.gfns) == [100..<164])
        for run in runs {
            let (merged, refused) = try b.merge(run)
            #expect(merged.count == 64 && refused == [])
        }
        #expect(try b.client.report([.init(.merged, 100..<164)]) == 64)
        // A has been told, with its next answer, that there is something for it.
        #expect(try a.lookUp(200..<201) == [])
        #expect(a.client.waitingOffers == 64)
        for run in try a.client.offers() { _ = try a.merge(run) }
        #expect(try a.client.report([.init(.merged, 0..<64)]) == 64)
        let figures = try quired.figures()
        #expect(figures.machines == 2 && figures.sharedPages == 64 && figures.sharingPages == 128)
        #expect(figures.savedBytes == 64 * 4096 && figures.storeBytes == 64 * 4096 && figures.histogram[1] == 64)
        #expect(try a.client.figures().sharingPages == 128)

        // A's QEMU ends: what it had goes, without a word from its backend.
        a.vm.end()
        #expect(try eventually { try quired.figures().sharingPages == 64 })
        #expect(eventually { message { try a.client.figures() } != nil })
        b.vm.end()
        #expect(try eventually { try quired.figures().machines == 0 })
        #expect(try quired.figures().storeBytes == 0)
        #expect(quired.stop() == .exited(0))
        #expect(Files.list(quired.folder) == [])
    }

    /// Pages far apart, with nothing in the ledger between them, are counted once by whoever connects next.
    @Test func pagesFarApartAreCountedOnce() throws {
        let quired = try RunningStore()
        var a = try Backend(FakeVM("a", pages: 8192), path: quired.path)
        let places: [UInt64] = [0, 3000, 6000]
        for gfn in places {
            try a.vm.write(gfn, page(7))
            for run in try a.lookUp(gfn..<gfn + 1) { _ = try a.merge(run) }
        }
        for run in try a.client.offers() { _ = try a.merge(run) }
        #expect(try a.client.report(places.map { .init(.merged, $0..<$0 + 1) }) == 3)
        try a.reconnect(quired.path)
        #expect(a.client.welcome.keptPages == 3 && a.client.welcome.unknownPages == 0)
        #expect(try quired.figures().sharingPages == 3)
        // Pages that nobody knows are not taken for those that were counted twice.
        try a.vm.setShared(100, 4000)
        try a.reconnect(quired.path)
        #expect(a.client.welcome.keptPages == 3 && a.client.welcome.unknownPages == 1)
        a.vm.end()
    }

    @Test func folderAndSocketAreForTheOwnerAlone() throws {
        let quired = try RunningStore()
        var status = stat()
        #expect(unsafe stat(quired.folder, &status) == 0 && status.st_mode & 0o777 == 0o750)
        // Beside root those who may enter every folder.
        if ProcessCalls.isRoot { #expect(unsafe stat(quired.path, &status) == 0 && status.st_mode & 0o777 == 0o666) }
        let second = try ChildProcess.output(of: [
            "sh", "-c", "\(RunningStore.program) --directory \(quired.folder) 2>&1; \(RunningStore.program) --keep --directory \(quired.folder) 2>&1; true",
        ])
        let line = "quired: \(quired.path) is in use by a running process: stop it or choose another path\n"
        #expect(second == line + line)
        // Also where it has parked its configuration by then: there is nothing to go on for.
        let config = "/tmp/quired-\(ProcessCalls.ownPID)-\(UInt32.random(in: 0 ... .max)).toml"
        defer { Files.remove(config) }
        try Descriptor.open(config, O_RDWR | O_CREAT, mode: 0o600).replaceContent("[quired]\nlimit = \"64M\"\n")
        let third = try ChildProcess.output(of: [
            "sh", "-c", "timeout 30 \(RunningStore.program) --keep --config \(config) --directory \(quired.folder) 2>&1; true",
        ])
        #expect(third == line)
    }

    @Test func oneClearLineForWhatIsWrong() throws {
        let quired = try RunningStore(["--keep", "--group", "web=1,2"])
        let vm = try FakeVM("a")
        func hello(_ hello: StoreRequest.Hello) -> String? {
            message { _ = try StoreClient.connect(to: quired.path, hello, pageMap: vm.map.raw, life: vm.lifeRaw) }
        }
        #expect(hello(.init(name: "a", group: "db"))
            == "there is no share group 'db': name it to quired with --group, or leave it out")
        var other = StoreRequest.Hello(name: "a")
        other.version = 7
        #expect(hello(other)
            == "the backend speaks version 7 of the page store's protocol and quired version 1: install the same release of both")
        #expect(hello(.init(name: "a", node: 99))?.hasPrefix("there is no NUMA node 99 here") == true)
        #expect(hello(.init(name: "a", group: "web")) == nil)
        func option(_ words: String) throws -> String {
            try ChildProcess.output(of: ["sh", "-c", "\(RunningStore.program) \(words) 2>&1; true"])
        }
        #expect(try option("--limit 3x") == "quired: --limit 3x: give a size from 4K to 8191G, such as \"4G\"\n")
        #expect(try option("--group web") == "quired: --group web: give a list of \"NAME=UID,UID\"\n")
        #expect(try option("--keep --directory relative")
            == "quired: there is no runtime directory: give --directory and an absolute path\n")
    }

    /// One backend a VM; the next one is taken once the first is gone, and the page map says which VM it is.
    @Test func whoIsWho() throws {
        let quired = try RunningStore()
        let vm = try FakeVM("a"), impostor = try FakeVM("a")
        var first = Optional(try Backend(vm, path: quired.path))
        #expect(message { _ = try Backend(vm, path: quired.path) } == "another backend is connected for the VM 'a'")
        first = nil
        #expect(message { _ = try Backend(impostor, path: quired.path) }?.hasPrefix("the VM 'a' is running already") == true)
        first = try Backend(vm, path: quired.path)
        _ = first
        vm.end()
        #expect(message { _ = try Backend(impostor, path: quired.path) } == nil)
    }

    // MARK: - kill -9

    /// Backends at work while quired is killed again and again. At the end, and after each kill, every VM still maps
    /// what it mapped, with the bytes that it had; and the counts are what the VMs' own page maps add up to.
    @Test func killedInTheMiddle() throws {
        let quired = try RunningStore()
        let path = quired.path
        let stop = Monitor(false), failures = Monitor<[String]>([]), results = Monitor<[[UInt64: UInt32]]>([])
        let vms = try (0..<4).map { try FakeVM("vm\($0)", pages: 512, firstGFN: UInt64($0) * 7000) }
        let rounds = Monitor(0)
        let threads = try vms.enumerated().map { number, vm in
            nonisolated(unsafe) let vm = vm
            return try JoinableThread("backend") {
                do {
                    var contents: [UInt64: UInt64] = [:]
                    var random = SplitMix(UInt64(number))
                    var backend = try unsafe Backend(vm, path: path)
                    while !stop.read({ $0 }) {
                        do {
                            try Self.work(&backend, &contents, &random)
                            rounds.update { $0 += 1 }
                        } catch let error as QuireError where error.code == .closed || error.code == .system {
                            // No command is on its way in this QEMU: it is this thread that carries them out.
                            guard eventually({ (try? backend.reconnect(path)) != nil }) else {
                                throw QuireError(.closed, "cannot come back")
                            }
                            if backend.client.welcome.keptPages != UInt64(backend.mapped.count)
                                || backend.client.welcome.unknownPages != 0 {
                                throw QuireError(.invalid, "\(backend.client.welcome), mapped are \(backend.mapped.count)")
                            }
                        }
                        for (gfn, slot) in backend.mapped where try backend.content(of: slot) != page(contents[gfn]!) {
                            throw QuireError(.invalid, "wrong bytes at \(gfn)")
                        }
                    }
                    // Whatever was on its way is settled by coming back.
                    let settled = eventually { (try? backend.reconnect(path)) != nil }
                    if !settled { throw QuireError(.closed, "cannot settle") }
                    let mapped = backend.mapped
                    results.update { $0.append(mapped) }
                } catch { failures.update { $0.append("\(error)") } }
            }
        }
        var random = SplitMix(3)
        for _ in 0..<25 {
            usleep(UInt32.random(in: 20_000..<180_000, using: &random))
            quired.kill()
        }
        stop.update { $0 = true }
        for thread in threads { thread.join() }
        #expect(failures.read { $0 } == [])
        #expect(rounds.read { $0 } > 100)
        // Settled with the last worker, and again from nothing but what was parked.
        for _ in 0..<2 {
            #expect(quired.waitUntilItServes())
            let mapped = results.read { $0 }
            var counts: [UInt32: Int] = [:]
            for slot in mapped.flatMap({ $0.values }) { counts[slot, default: 0] += 1 }
            let figures = try quired.figures()
            #expect(figures.machines == 4 && counts.count > 10)
            #expect(figures.sharedPages == UInt64(counts.count) && figures.storeBytes == UInt64(counts.count) * 4096)
            #expect(figures.sharingPages == UInt64(counts.values.reduce(0, +)) && figures.heldPages == 0)
            var histogram = [UInt64](repeating: 0, count: 32)
            for count in counts.values { histogram[Int.bitWidth - 1 - count.leadingZeroBitCount] += 1 }
            #expect(figures.histogram == histogram)
            quired.kill()
        }
        // Their lives end with these.
        withExtendedLifetime(vms) {}
    }

    private static func work(
        _ backend: inout Backend, _ contents: inout [UInt64: UInt64], _ random: inout SplitMix
    ) throws {
        let gfns = backend.vm.gfns
        let gfn = UInt64.random(in: gfns, using: &random)
        let end = min(gfns.upperBound, gfn + UInt64.random(in: 1...64, using: &random))
        switch Int.random(in: 0..<10, using: &random) {
        case 0..<3:
            let content = UInt64.random(in: 0..<40, using: &random)
            var folded: [UInt64] = []
            for (index, gfn) in (gfn..<end).enumerated() {
                if backend.mapped[gfn] != nil { folded.append(gfn) }
                try backend.fold(gfn)
                contents[gfn] = content + UInt64(index)
                try backend.vm.write(gfn, page(content + UInt64(index)))
            }
            try backend.client.report(folded.map { .init(.released, $0..<$0 + 1) })
        case 3..<9:
            // Pages that were never written are zeros, and pages that are mapped are holes: both hash as zeros.
            let runs = try Bool.random(using: &random) ? backend.lookUp(gfn..<end) : backend.client.offers(atMost: 64)
            for run in runs {
                let (merged, refused) = try backend.merge(run)
                try backend.client.report(
                    merged.map { .init(.merged, $0..<$0 + 1) } + refused.map { .init(.released, $0..<$0 + 1) })
            }
        default:
            let folded = (gfn..<end).filter { backend.mapped[$0] != nil }
            for gfn in folded { try backend.fold(gfn) }
            try backend.client.report(folded.map { .init(.released, $0..<$0 + 1) })
        }
    }

    /// The control: without a keeper a new quired knows nothing of what VMs map.
    @Test func controlWithoutKeeper() throws {
        let quired = try RunningStore([])
        var a = try Backend(FakeVM("a"), path: quired.path)
        for gfn in UInt64(0)..<2 { try a.vm.write(gfn, page(4)) }
        _ = try a.lookUp(0..<1)
        for run in try a.lookUp(1..<2) { _ = try a.merge(run) }
        try a.client.report([.init(.merged, 1..<2)])
        let before = a.client.welcome.storeID
        quired.kill()
        try quired.startAgain()
        try a.reconnect(quired.path)
        #expect(a.client.welcome.keptPages == 0 && a.client.welcome.unknownPages == 1)
        #expect(a.client.welcome.storeID != before)
    }

    /// The program is gone for a while, as during an upgrade: the keeper goes on, and so does what it keeps.
    @Test func keeperOutlivesAProgramThatCannotStart() throws {
        let folder = "/tmp/quired-copy-\(ProcessCalls.ownPID)"
        try Files.makeDirectory(folder, mode: 0o700)
        let copy = folder + "/quired"
        // Next to it are the libraries that it looks for there, if any.
        _ = try ChildProcess.output(of: ["cp", RunningStore.program, copy])
        let quired = try RunningStore(["--keep"], program: copy)
        var a = try Backend(FakeVM("a"), path: quired.path)
        for gfn in UInt64(0)..<2 { try a.vm.write(gfn, page(4)) }
        _ = try a.lookUp(0..<1)
        for run in try a.lookUp(1..<2) { _ = try a.merge(run) }
        try a.client.report([.init(.merged, 1..<2)])
        _ = try ChildProcess.output(of: ["mv", copy, copy + ".old"])
        quired.kill(andWait: false)
        ProcessCalls.sleep(milliseconds: 300)
        _ = try ChildProcess.output(of: ["mv", copy + ".old", copy])
        #expect(quired.waitUntilItServes())
        try a.reconnect(quired.path)
        #expect(a.client.welcome.keptPages == 1 && a.client.welcome.unknownPages == 0)
        #expect(quired.stop() == .exited(0))
        Files.remove(copy)
        Files.removeDirectory(folder)
    }

    // MARK: - The configuration

    /// Limit and reserve follow the file while VMs have pages in the store; a broken file changes nothing, and does not keep a quired
    /// from taking the place of one that died.
    @Test func reloadKeepsTheStore() throws {
        let config = "/tmp/quired-\(ProcessCalls.ownPID)-\(UInt32.random(in: 0 ... .max)).toml"
        defer { Files.remove(config) }
        func write(_ text: String) throws { try Descriptor.open(config, O_RDWR | O_CREAT, mode: 0o600).replaceContent(text) }
        try write("[quired]\nlimit = \"32K\"\n")
        let quired = try RunningStore(limit: nil, config: config)
        let worker = quired.worker
        var a = try Backend(FakeVM("a"), path: quired.path), b = try Backend(FakeVM("b"), path: quired.path)
        for gfn in UInt64(0)..<64 {
            try a.vm.write(gfn, page(gfn))
            try b.vm.write(gfn, page(gfn))
        }
        /// Merges what there is room for.
        func mergeAll() throws -> UInt64 {
            _ = try a.lookUp(0..<64)
            for run in try b.lookUp(0..<64) {
                let (merged, refused) = try b.merge(run)
                #expect(refused == [])
                try b.client.report(merged.map { .init(.merged, $0..<$0 + 1) })
            }
            return try quired.figures().sharedPages
        }
        // The control: no more than the limit, however often it is asked.
        #expect(try mergeAll() == 8)
        #expect(try mergeAll() == 8)
        #expect(try quired.figures().limitPages == 8)
        #expect(try quired.reload() == "", "nothing has changed")
        func join() throws { _ = try Backend(FakeVM("c", group: "lab"), path: quired.path) }
        #expect(message { try join() }?.contains("there is no share group 'lab'") == true)

        try write("[quired]\nlimit = \"64M\"\nreserve = 50\ngroup = [\"lab=1000\"]\n")
        #expect(
            try quired.reload() == """
                quired.limit: "32K" -> "64M"
                quired.reserve: 100 -> 50
                quired.group: [] -> ["lab=1000"]
                """)
        // Root may always.
        if ProcessCalls.isRoot { try join() } else { #expect(message { try join() }?.contains("is not in share group 'lab'") == true) }
        #expect(try eventually { try quired.figures().machines == 2 })
        let figures = try quired.figures()
        #expect(figures.limitPages == 16384 && figures.sharedPages == 8 && figures.machines == 2)
        #expect(try eventually { try mergeAll() == 64 })
        for (gfn, slot) in b.mapped { #expect(try b.content(of: slot) == page(gfn)) }

        // Broken: one line, and everything stays.
        try write("[quired]\nlimit = \"1M\"\nreserve = -1\n")
        #expect(message { try quired.reload() }?.contains("\(config):3: quired.reserve: -1 is not allowed: give ") == true)
        #expect(try quired.figures().limitPages == 16384)
        // Also where the one that works dies: what held before holds.
        quired.kill()
        #expect(quired.waitUntilItServes())
        try b.reconnect(quired.path)
        #expect(b.client.welcome.keptPages == UInt64(b.mapped.count) && b.client.welcome.unknownPages == 0)
        #expect(try quired.figures().limitPages == 16384)

        // SIGHUP to the keeper does the same, and takes nothing from anybody: a lower limit is above what is used.
        let second = quired.worker
        try write("[quired]\nlimit = \"16K\"\n")
        quired.signal(SIGHUP)
        #expect(try eventually { try quired.figures().limitPages == 4 })
        #expect(quired.worker == second && second != worker)
        #expect(try quired.figures().sharedPages == UInt64(b.mapped.count))
        for (gfn, slot) in b.mapped { #expect(try b.content(of: slot) == page(gfn)) }
        #expect(quired.stop() == .exited(0))
        #expect(Files.list(quired.folder) == [])
    }

    /// What a quired that works cannot take over, another one in its place does: nothing is lost that VMs share or have on a disk. What no
    /// quired could work with is refused, and keeps none from taking the place of one that dies.
    @Test func reloadReplacesTheWorker() throws {
        let config = "/tmp/quired-\(ProcessCalls.ownPID)-\(UInt32.random(in: 0 ... .max)).toml"
        defer { Files.remove(config) }
        func write(_ text: String) throws { try Descriptor.open(config, O_RDWR | O_CREAT, mode: 0o600).replaceContent("[quired]\n" + text) }
        func disk(_ name: String, of store: RunningStore) -> SharedDiskClient {
            SharedDiskClient(path: SharedDiskClient.path(besideStore: store.path), .init(name: name, group: "", token: 1))
        }
        func threads(of store: RunningStore) -> Int {
            let task = "/proc/\(store.worker)/task"
            return (Files.list(task) ?? []).count { (try? Files.read("\(task)/\($0)/comm"))?.hasPrefix("store-") == true }
        }
        // Each has its name when it begins.
        func has(_ count: Int, _ store: RunningStore) -> Bool { eventually { threads(of: store) == count } }
        try write("candidates = \"1M\"\nworkers = 2\nshared-disk = [\"scratch,size=16M\"]\n")
        let quired = try RunningStore(limit: nil, config: config)
        let first = quired.worker
        #expect(has(2, quired))
        var a = try Backend(FakeVM("a"), path: quired.path), b = try Backend(FakeVM("b"), path: quired.path)
        for gfn in UInt64(0)..<64 {
            try a.vm.write(gfn, page(gfn))
            try b.vm.write(gfn, page(gfn))
        }
        _ = try a.lookUp(0..<64)
        for run in try b.lookUp(0..<64) {
            let (merged, refused) = try b.merge(run)
            #expect(refused == [])
            try b.client.report(merged.map { .init(.merged, $0..<$0 + 1) })
        }
        #expect(b.mapped.count == 64)
        let scratch = disk("scratch", of: quired), bytes = page(1) + page(2)
        _ = try scratch.attach(patienceMilliseconds: 5000)
        try scratch.put(7, bytes)

        try write("candidates = \"2M\"\nworkers = 5\nshared-disk = [\"scratch,size=16M\", \"more,size=1M\"]\n")
        // Whoever has it reloaded is answered.
        #expect(
            try quired.reload() == """
                quired.candidates: "1M" -> "2M"
                quired.shared-disk: ["scratch,size=16M"] -> ["scratch,size=16M", "more,size=1M"]
                quired.workers: 2 -> 5
                """)
        func hasCandidates(_ bytes: UInt64) -> Bool { eventually { (try? quired.figures())?.candidateBytes == bytes } }
        #expect(hasCandidates(2 << 20))
        let second = quired.worker
        #expect(second != first && has(5, quired))
        try b.reconnect(quired.path)
        #expect(b.client.welcome.keptPages == 64 && b.client.welcome.unknownPages == 0)
        for (gfn, slot) in b.mapped { #expect(try b.content(of: slot) == page(gfn)) }
        #expect(eventually { (try? scratch.get(7, count: 2)) == bytes })
        #expect(try disk("more", of: quired).attach(patienceMilliseconds: 5000).pages == 256)

        let both = "\"scratch,size=16M\", \"more,size=1M\""
        for (text, line) in [
            ("[\"scratch,size=32M\", \"more,size=1M\"]", "the shared disk 'scratch' has 16777216 bytes already: give that size"),
            ("[\"scratch,size=16M\"]", "the shared disk 'more' is there as long as quired's keeper is: name it again"),
            (
                "[\"scratch,size=16M\", \"more,size=1M,group=lab\"]\ngroup = [\"lab=1000\"]",
                "the shared disk 'more' is for the group 'owner-\(ProcessCalls.ownUID)' already: give that group"
            ),
            ("[\(both), \"third,size=1M,group=lab\"]", "the shared disk 'third' is for the group 'lab', which there is not: name it with --group"),
            ("[\(both), \"more,size=1M\"]", "the shared disk 'more' is given twice"),
        ] as [(String, String)] {
            try write("limit = \"1M\"\ncandidates = \"3M\"\nworkers = 1\nshared-disk = \(text)\n")
            #expect(message { try quired.reload() } == "quired: \(line)")
        }
        // Nothing of it holds; also not where the one that works dies meanwhile.
        #expect(quired.worker == second && threads(of: quired) == 5)
        quired.kill()
        #expect(hasCandidates(2 << 20))
        #expect(try has(5, quired) && quired.figures().limitPages != 256)
        #expect(eventually { (try? scratch.get(7, count: 2)) == bytes })

        // SIGHUP to the keeper does the same.
        try write("workers = 1\nshared-disk = [\(both)]\ncandidates = \"4M\"\n")
        quired.signal(SIGHUP)
        #expect(hasCandidates(4 << 20))
        #expect(has(1, quired))
        #expect(eventually { (try? scratch.get(7, count: 2)) == bytes })
        try b.reconnect(quired.path)
        #expect(b.client.welcome.keptPages == 64 && b.client.welcome.unknownPages == 0)

        // The control: without a keeper nothing would be left, so it has to wait.
        let alone = try RunningStore([], limit: nil, config: config)
        let worker = alone.worker
        let lost = disk("scratch", of: alone)
        _ = try lost.attach(patienceMilliseconds: 5000)
        try lost.put(7, bytes)
        try write("workers = 2\nreserve = 50\n")
        let waits = ", from the next start on"
        #expect(
            try alone.reload() == """
                quired.reserve: 100 -> 50
                quired.candidates: "4M" -> 3/4096 of the host's memory\(waits)
                quired.shared-disk: ["scratch,size=16M", "more,size=1M"] -> []\(waits)
                quired.workers: 1 -> 2\(waits)
                """)
        #expect(try lost.get(7, count: 2) == bytes)
        #expect(alone.worker == worker && threads(of: alone) == 1)
        #expect(alone.stop() == .exited(0))
        #expect(quired.stop() == .exited(0))
        #expect(Files.list(quired.folder) == [])
    }

    // MARK: - Hostile clients

    /// Nonsense of every kind from many connections, beside an honest VM that notices nothing.
    @Test func nonsenseHurtsNobody() throws {
        let quired = try RunningStore()
        let worker = quired.worker
        var honest = try Backend(FakeVM("honest"), path: quired.path)
        for gfn in UInt64(0)..<2 { try honest.vm.write(gfn, page(1)) }
        _ = try honest.lookUp(0..<1)
        for run in try honest.lookUp(1..<2) { _ = try honest.merge(run) }
        try honest.client.report([.init(.merged, 1..<2)])
        let slot = try #require(honest.mapped[1])

        var random = SplitMix(11)
        let vm = try FakeVM("evil")
        for round in 0..<400 {
            let socket = try UnixSocket.connect(to: quired.path, kind: .messages)
            if round % 4 != 0 {
                try socket.sendMessage(StoreRequest.hello(.init(name: "evil\(round % 7)")).encoded(), passing: [vm.map.raw, vm.lifeRaw])
                _ = waitReadable([socket.descriptor.raw], timeoutMilliseconds: 5000)
                if round % 2 == 0 { try? socket.sendMessage(StoreRequest.memory([vm.region]).encoded(), passing: [vm.ram.raw]) }
            }
            for _ in 0..<4 {
                let raw = Bool.random(using: &random) ? [Int32](repeating: vm.ram.raw, count: Int.random(in: 0...62, using: &random)) : []
                if (try? socket.sendMessage(Self.nonsense(&random), passing: raw)) == nil { break }
            }
            // Some leave without reading, some wait for what comes.
            if round % 3 == 0 { _ = waitReadable([socket.descriptor.raw], timeoutMilliseconds: 50) }
        }
        #expect(quired.worker == worker, "it was never started again")
        #expect(try honest.content(of: slot) == page(1))
        #expect(try honest.client.report([.init(.released, 1..<2)]) == 1)
        vm.end()
        #expect(try eventually { try quired.figures().machines == 1 })
        #expect(try quired.figures().sharedPages == 0)
    }

    /// Requests with something wrong in them, and plain noise.
    private static func nonsense(_ random: inout SplitMix) -> [UInt8] {
        var bytes: [UInt8]
        switch Int.random(in: 0..<7, using: &random) {
        case 0:
            bytes = (0..<Int.random(in: 1...300, using: &random)).map { _ in UInt8.random(in: 0 ... .max, using: &random) }
        case 1:
            var lookup = StoreRequest.Lookup()
            for _ in 0..<Int.random(in: 1...20, using: &random) {
                lookup.append(UInt64.random(in: 0..<300, using: &random), [PageHash(low: 1, high: 2), PageHash(low: 3, high: 4)])
            }
            bytes = StoreRequest.lookup(lookup).encoded()
        case 2:
            bytes = StoreRequest.report((0..<20).map { _ in
                .init(Bool.random(using: &random) ? .merged : .released, 0..<UInt64.random(in: 1...3000, using: &random))
            }).encoded()
        case 3: bytes = StoreRequest.offers(Int.random(in: 0...2000, using: &random)).encoded()
        case 4:
            bytes = StoreRequest.memory((0..<Int.random(in: 0...64, using: &random)).map { _ in
                .init(gfn: UInt64.random(in: 0..<1 << 31, using: &random), pages: UInt64.random(in: 0..<1 << 31, using: &random),
                    offset: UInt64.random(in: 0 ... .max, using: &random), file: Int.random(in: 0..<70, using: &random))
            }).encoded()
        case 5: bytes = StoreRequest.hello(.init(name: "x", group: "../..", node: .random(in: 0...9, using: &random))).encoded()
        default: bytes = StoreRequest.status(zeroPages: 0).encoded() + [UInt8](repeating: 0, count: Int.random(in: 0...70_000, using: &random))
        }
        // A few bits turned over, or the end cut off.
        for _ in 0..<Int.random(in: 0...3, using: &random) where !bytes.isEmpty {
            bytes[Int.random(in: bytes.indices, using: &random)] ^= 1 << UInt8.random(in: 0..<8, using: &random)
        }
        if Int.random(in: 0..<4, using: &random) == 0 { bytes.removeLast(Int.random(in: 0..<bytes.count, using: &random)) }
        return bytes
    }

    /// Every request and reply survives the wire, and no prefix of one does.
    @Test func messagesRoundTrip() throws {
        var lookup = StoreRequest.Lookup()
        lookup.append(5, [PageHash(low: 1, high: 2), PageHash(low: .max, high: 0)])
        lookup.append(1 << 29, [PageHash(low: 3, high: 4)])
        let requests: [StoreRequest] = [
            .hello(.init(name: "a", group: "b", node: 3)), .memory([.init(gfn: 1, pages: 2, offset: 4096, file: 7)]),
            .memory([]), .lookup(lookup), .offers(12), .report([.init(.merged, 3..<9), .init(.released, 0..<1)]), .status(zeroPages: 7),
        ]
        for request in requests {
            let bytes = request.encoded()
            #expect(try StoreRequest(bytes) == request)
            for count in 0..<bytes.count {
                #expect(throws: ProtocolViolation.self) { try StoreRequest(Array(bytes[..<count])) }
            }
        }
        #expect(StoreRequest.hello(.init(name: "a")).encoded().count == MemoryLayout<quire_store_hello>.size)
        var welcome = StoreReply.Welcome()
        welcome.secret = [UInt8](repeating: 9, count: 192)
        welcome.storeID = 77
        var figures = StoreFigures()
        figures.full = 5
        figures.machines = 9
        figures.histogram[31] = 4
        let replies: [StoreReply] = [
            .welcome(welcome), .done(pages: 5), .slots([SlotRun(gfn: 1, slot: 2, pages: 3, store: 0)], offers: 8, lacking: 9),
            .figures(figures), .error("no"), .error("later", isBusy: true),
        ]
        for reply in replies { #expect(try StoreReply(reply.encoded()) == reply) }
        #expect(StoreReply.welcome(welcome).encoded().count == MemoryLayout<quire_store_welcome>.size)
        #expect(StoreReply.figures(figures).encoded().count == MemoryLayout<quire_store_figures>.size)
        #expect(StoreReply.error("no").encoded().count == MemoryLayout<quire_store_error>.size)
    }
}
