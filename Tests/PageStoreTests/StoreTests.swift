import CQuireLayout
import Glibc
import Host
import PageContent
import PageStore
import Platform
import StoreProtocol
import TestSupport
import Testing

struct StoreTests {
    private static func makeStore(
        limit: Int = 1 << 16, seams: StoreSeams = StoreSeams()
    ) throws -> PageStore {
        try PageStore(configuration(limit: limit), parking: NoParking(), parked: [], logger: quietLogger, seams: seams)
    }

    // MARK: - Promotion and runs

    @Test func theSecondSightingGetsASlotAndTheFirstAnOffer() throws {
        let store = try Self.makeStore()
        let a = try Guest(FakeVM("a"), in: store), b = try Guest(FakeVM("b"), in: store)
        for gfn in UInt64(10)..<30 { try a.vm.write(gfn, page(gfn)) }
        for gfn in UInt64(110)..<130 { try b.vm.write(gfn, page(gfn - 100)) }
        #expect(try a.lookUp([10..<30]) == [])
        // The same page again is no second sighting.
        #expect(try a.lookUp([10..<30]) == [])
        let runs = try b.lookUp([110..<130])
        #expect(runs.count == 1 && runs.first?.gfns == 110..<130, "one run of neighbours: \(runs)")
        let slot = try #require(runs.first?.slot)
        #expect(a.machine.waitingOffers == 20)
        #expect(try a.machine.takeOffers(5) == [SlotRun(gfn: 10, slot: slot, pages: 5, store: 0)])
        #expect(try a.machine.takeOffers(1000) == [SlotRun(gfn: 15, slot: slot + 5, pages: 15, store: 0)])
        for offset in UInt32(0)..<20 {
            #expect(a.useCount(slot + offset) == 2)
            #expect(try a.content(of: slot + offset) == page(10 + UInt64(offset)))
        }
        // Look-ahead: a third gets the same run at once.
        let c = try Guest(FakeVM("c"), in: store)
        for gfn in UInt64(0)..<20 { try c.vm.write(gfn, page(gfn + 10)) }
        #expect(try c.lookUp([0..<20]) == [SlotRun(gfn: 0, slot: slot, pages: 20, store: 0)])
        let figures = store.figures(of: a.machine)
        #expect(figures.sharedPages == 20 && figures.heldPages == 60 && figures.histogram[1] == 20)
    }

    @Test func zeroPagesNeedNothing() throws {
        let store = try Self.makeStore()
        let a = try Guest(FakeVM("a"), in: store), b = try Guest(FakeVM("b"), in: store)
        for guest in [a, b, a, b] { #expect(try guest.lookUp([0..<200]) == []) }
        #expect(store.figures(of: nil).sharedPages == 0 && a.machine.waitingOffers == 0)
    }

    /// Every merged page of every VM has to be backed by what the host has left.
    @Test func theReserveCountsAllThatIsLent() throws {
        let left = Monitor<UInt64>(100 * 4096)
        var seams = StoreSeams()
        seams.availableBytes = { left.read { $0 } }
        let store = try Self.makeStore(seams: seams)
        let a = try Guest(FakeVM("a"), in: store), b = try Guest(FakeVM("b"), in: store)
        for gfn in UInt64(10)..<70 {
            try a.vm.write(gfn, page(gfn))
            try b.vm.write(gfn, page(gfn))
        }
        _ = try a.lookUp([10..<70])
        for (guest, runs) in [(b, try b.lookUp([10..<70])), (a, try a.machine.takeOffers(1000))] {
            for run in runs {
                for offset in 0..<run.pages { #expect(try guest.merge(run.gfn + UInt64(offset), run.slot + offset)) }
            }
        }
        func lacking() -> UInt64 {
            // An answer is good for a while.
            ProcessCalls.sleep(milliseconds: 250)
            return store.figures(of: a.machine).lackingBytes
        }
        #expect(lacking() == 20 * 4096)
        a.machine.noteZeroPages(30)
        #expect(lacking() == 50 * 4096)
        left.update { $0 = 150 * 4096 }
        #expect(lacking() == 0)
        let memory = try #require(HostMemory("MemTotal: 90 kB\nMemAvailable:     12 kB\nSwapFree: 3 kB\n"))
        #expect(memory.totalBytes == 90 * 1024 && memory.availableBytes == 12 * 1024 && memory.freeSwapBytes == 3 * 1024)
        #expect(HostMemory("MemTotal: 9 kB\n") == nil && StoreSeams().availableBytes() != nil)
    }

    /// A content that changes all the time is seen twice again and again, and gets nothing: what was seen is gone.
    @Test func flippingContentsGetNoSlot() throws {
        let store = try Self.makeStore()
        let a = try Guest(FakeVM("a"), in: store)
        for round in UInt64(0)..<500 {
            // Two pages that hold the same two contents, never at the same time.
            try a.vm.write(1, page(round % 2))
            try a.vm.write(2, page(1 - round % 2))
            #expect(try a.lookUp(1 + round % 2) == nil)
        }
        #expect(store.figures(of: nil).sharedPages == 0 && store.figures(of: nil).stale > 0)
    }

    /// What a guest says of its pages is not believed, and costs nothing that stays.
    @Test func aLieAboutAHashGetsNoSlot() throws {
        #expect(try Self.contentAfterALie(StoreSeams()) == nil)
    }

    /// The control: whoever believes hashes keeps a content under a wrong one.
    @Test func controlBelievingHashes() throws {
        var seams = StoreSeams()
        seams.copyHash = { (claimed, _) in claimed }
        #expect(try Self.contentAfterALie(seams) == page(2))
    }

    /// What an honest VM is offered for page(1) after two liars said that their page(2) is one.
    private static func contentAfterALie(_ seams: StoreSeams) throws -> [UInt8]? {
        let store = try makeStore(seams: seams)
        let liar = try Guest(FakeVM("liar"), in: store), victim = try Guest(FakeVM("victim"), in: store)
        for gfn in UInt64(0)..<2 {
            try liar.vm.write(gfn, page(2))
            var lookup = StoreRequest.Lookup()
            lookup.append(gfn, [liar.hash(page(1))])
            _ = try store.lookUp(liar.machine, lookup, scratch: liar.scratch.mapping)
        }
        try victim.vm.write(5, page(1))
        guard let slot = try victim.lookUp(5) else {
            #expect(store.figures(of: nil).sharedPages == 0 && store.figures(of: nil).storeBytes == 0)
            return nil
        }
        return try victim.content(of: slot)
    }

    // MARK: - Groups

    @Test func groupsNeverShare() throws { #expect(try Self.slotsAcrossGroups(StoreSeams()) == [nil, nil]) }

    /// The control: one share for all, and the second group finds what the first one wrote.
    @Test func controlOneShareForAll() throws {
        var seams = StoreSeams()
        seams.shareKey = { _ in "all" }
        #expect(try Self.slotsAcrossGroups(seams).contains { $0 != nil })
    }

    private static func slotsAcrossGroups(_ seams: StoreSeams) throws -> [UInt32?] {
        let store = try makeStore(seams: seams)
        let a = try Guest(FakeVM("a"), in: store, uid: 1000), b = try Guest(FakeVM("b"), in: store, uid: 1001)
        // The groups' secrets differ; an index that did not know of groups would still have to keep them apart.
        for gfn in UInt64(0)..<2 { try a.vm.write(gfn, page(3)) }
        try b.vm.write(0, page(3))
        _ = try a.lookUp(0)
        let own = try #require(try a.lookUp(1))
        var lookup = StoreRequest.Lookup()
        lookup.append(0, [a.hash(page(3))])
        let stolen = try store.lookUp(b.machine, lookup, scratch: b.scratch.mapping).first?.slot
        let honest = try b.lookUp(0)
        if stolen == nil && honest == nil {
            // Not even the file is the same one.
            let one = try a.slots.status().identity, other = try b.slots.status().identity
            #expect(one != other)
            #expect(try b.content(of: own) == zeroPage || b.content(of: own) == [])
        }
        return [stolen, honest]
    }

    /// Inside a group every content that occurs twice has one slot, and every page that has it uses that one.
    @Test func sharingIsExactInsideAGroup() throws {
        let store = try Self.makeStore()
        var random = SplitMix(5)
        let guests = try (0..<4).map { try Guest(FakeVM("vm\($0)", pages: 400), in: store) }
        var places: [UInt64: [(Guest, UInt64)]] = [:]
        for guest in guests {
            for gfn in guest.vm.gfns {
                let content = UInt64.random(in: 0..<900, using: &random)
                try guest.vm.write(gfn, page(content))
                places[content, default: []].append((guest, gfn))
            }
        }
        var slots: [String: UInt32] = [:]
        for guest in guests {
            for start in stride(from: UInt64(0), to: 400, by: 50) {
                for run in try guest.lookUp([start..<start + 50]) {
                    for (index, gfn) in run.gfns.enumerated() { slots["\(guest.vm.name) \(gfn)"] = run.slot + UInt32(index) }
                }
            }
        }
        for guest in guests {
            for run in try guest.machine.takeOffers(1024) {
                for (index, gfn) in run.gfns.enumerated() { slots["\(guest.vm.name) \(gfn)"] = run.slot + UInt32(index) }
            }
        }
        var used: Set<UInt32> = []
        for (content, places) in places {
            let mine = Set(places.map { slots["\($0.0.vm.name) \($0.1)"] })
            if places.count == 1 {
                #expect(mine == [nil])
            } else {
                #expect(mine.count == 1 && mine.first! != nil, "content \(content): \(mine)")
                guard let slot = mine.first ?? nil else { continue }
                #expect(used.insert(slot).inserted)
                #expect(guests[0].useCount(slot) == places.count)
                #expect(try guests[0].content(of: slot) == page(content))
            }
        }
        #expect(store.figures(of: nil).sharedPages == UInt64(used.count))
    }

    @Test func groupNames() throws {
        var configuration = try configuration()
        configuration.groups = ["web": [1000]]
        let store = try PageStore(configuration, logger: quietLogger)
        func join(_ name: String, _ group: String, _ uid: UInt32) -> String? {
            message { try FakeVM(name, group: group).admit(to: store, uid: uid) }
        }
        #expect(join("a", "web", 1000) == nil)
        #expect(join("b", "web", 0) == nil)
        #expect(join("c", "owner-1000", 1000) == nil)
        #expect(join("d", "web", 1001)
            == "user 1001 is not in share group 'web': add it to quired's --group, or leave the group out")
        #expect(join("d", "nope", 1001)
            == "there is no share group 'nope': name it to quired with --group, or leave it out")
        #expect(join("d", "owner-1000", 1001)?.hasPrefix("there is no share group 'owner-1000'") == true)
        #expect(join("../x", "", 1001) == "a VM's name has 1 to 63 of A-Z a-z 0-9 . _ - and no dot in front")
    }

    /// A VM goes to another group when it maps nothing of the first one: until then its slots are what the first one says they are.
    @Test func oneGroupAtATime() throws {
        var configuration = try configuration()
        configuration.groups = ["red": [1000], "blue": [1000, 1001]]
        let store = try PageStore(configuration, logger: quietLogger)
        let a = try Guest(FakeVM("a", group: "red"), in: store)
        for gfn in UInt64(0)..<4 { try a.vm.write(gfn, page(gfn / 2)) }
        _ = try a.lookUp(0)
        _ = try a.lookUp(2)
        let slot = try #require(try a.lookUp(1)), another = try #require(try a.lookUp(3))
        #expect(try a.merge(1, slot) && a.merge(3, another))
        func move(uid: UInt32 = 1000) throws -> (machine: Machine, welcome: StoreReply.Welcome) {
            try store.admit(.init(name: "a", group: "blue"), uid: uid, map: a.vm.map.duplicate(), life: Descriptor.duplicate(of: a.vm.lifeRaw))
        }
        #expect(message { _ = try move() } == "another backend is connected for the VM, in share group 'red'")
        store.disconnect(a.machine)
        #expect(message { _ = try move(uid: 1001) } == "this page map is of a VM of user 1000")
        let stays = "it still shares pages in share group 'red': quire unmerge a, then quire merge a"
        for _ in 0..<2 { #expect(message { _ = try move() } == stays) }
        #expect(a.useCount(slot) == 1)
        // Where it is it may come back.
        let old = try a.vm.admit(to: store).welcome
        #expect(old.keptPages == 2)
        store.disconnect(a.machine)
        // Un-merged while nobody was connected: it leaves nothing behind.
        for gfn in [UInt64(1), 3] { try a.vm.setShared(gfn, nil) }
        let (machine, welcome) = try move()
        #expect(welcome.keptPages == 0 && welcome.unknownPages == 0 && welcome.storeID != old.storeID)
        #expect(store.machines.count == 1 && store.machines.first === machine)
        #expect(store.figures(of: nil).sharedPages == 0 && store.figures(of: nil).storeBytes == 0)
        #expect(store.groupFigures().map(\.name) == ["blue"])
        // One that has ended meanwhile is in nobody's way.
        store.disconnect(machine)
        a.vm.end()
        let next = try FakeVM("a", group: "red")
        _ = try store.admit(.init(name: "a", group: "red"), uid: 1000, map: a.vm.map.duplicate(), life: Descriptor.duplicate(of: next.lifeRaw))
        #expect(store.machines.count == 1)
    }

    // MARK: - Limits and hostile VMs

    @Test func aFullStoreSaysSoAndGoesOn() throws {
        let store = try Self.makeStore(limit: 8)
        let a = try Guest(FakeVM("a"), in: store), b = try Guest(FakeVM("b"), in: store)
        for gfn in UInt64(0)..<20 {
            try a.vm.write(gfn, page(gfn))
            try b.vm.write(gfn, page(gfn))
        }
        _ = try a.lookUp([0..<20])
        let runs = try b.lookUp([0..<20])
        #expect(runs.reduce(0) { $0 + $1.pages } == 8)
        #expect(store.figures(of: nil).full == 12)
        #expect(try b.machine.report(runs.map { .init(.released, $0.gfns) }) == 8)
        #expect(store.figures(of: nil).storeBytes == 0)
        // The slots are free again, whoever comes.
        let c = try Guest(FakeVM("c"), in: store, uid: 1001)
        for gfn in UInt64(0)..<2 { try c.vm.write(gfn, page(1)) }
        _ = try c.lookUp(0)
        #expect(try c.lookUp(1) != nil)
    }

    @Test func nobodyGivesUpWhatAnotherHas() throws {
        let store = try Self.makeStore()
        let a = try Guest(FakeVM("a"), in: store), evil = try Guest(FakeVM("evil"), in: store)
        for gfn in UInt64(0)..<2 { try a.vm.write(gfn, page(1)) }
        _ = try a.lookUp(0)
        let slot = try #require(try a.lookUp(1))
        #expect(try a.merge(1, slot))
        for _ in 0..<3 {
            #expect(try evil.machine.report([.init(.released, 0..<65536), .init(.merged, 0..<65536)]) == 0)
        }
        // It says in its page map what it does not have, ends, and comes back.
        for gfn in UInt64(0)..<200 { try evil.vm.setShared(gfn, slot) }
        store.disconnect(evil.machine)
        let (machine, welcome) = try evil.vm.admit(to: store)
        #expect(welcome.keptPages == 0 && welcome.unknownPages == 200)
        #expect(a.useCount(slot) == 1)
        try store.end(machine)
        #expect(a.useCount(slot) == 1)
        #expect(try a.content(of: slot) == page(1))
        // Twice the same release is one.
        #expect(try a.machine.report([.init(.released, 1..<2), .init(.released, 0..<100)]) == 1)
        #expect(store.figures(of: nil).sharedPages == 0)
    }

    @Test func lookupsOutsideOfRAMAreRefused() throws {
        let store = try Self.makeStore()
        let a = try Guest(FakeVM("a", pages: 64, firstGFN: 1000), in: store)
        func look(_ gfns: Range<UInt64>) -> String? {
            message {
                var lookup = StoreRequest.Lookup()
                lookup.append(gfns.lowerBound, gfns.map { _ in PageHash(low: 1, high: 2) })
                return try store.lookUp(a.machine, lookup, scratch: a.scratch.mapping)
            }
        }
        #expect(look(1000..<1064) == nil)
        for gfns in [UInt64(999)..<1001, 1063..<1065, 0..<1, 5000..<5001] {
            #expect(look(gfns) == "gfns \(gfns) of a lookup are not all in guest RAM")
        }
        let other = try FakeVM("b")
        let (machine, _) = try store.admit(
            .init(name: "b"), uid: 0, map: other.map.duplicate(), life: Descriptor.duplicate(of: other.lifeRaw))
        var lookup = StoreRequest.Lookup()
        lookup.append(0, [PageHash(low: 1, high: 2)])
        #expect(message { try store.lookUp(machine, lookup, scratch: a.scratch.mapping) }
            == "a lookup before MEMORY said where the pages are")
    }

    /// Files that are no memory, that shrink, that are closed for reading.
    @Test func strangeFiles() throws {
        let store = try Self.makeStore()
        let vm = try FakeVM("a")
        func ram(_ file: borrowing Descriptor, offset: UInt64 = 0) -> String? {
            let raw = file.raw
            return message {
                var files = DescriptorList()
                files.append(try Descriptor.duplicate(of: raw))
                return try GuestRAM([.init(gfn: 0, pages: 16, offset: offset, file: 0)], files: files)
            }
        }
        #expect(ram(try Descriptor.open("/dev/zero", O_RDONLY)) == "a file of guest RAM is no file")
        #expect(ram(try Descriptor.open("/proc/self/mem", O_RDONLY))
            == "a file of guest RAM is not in shared memory with small pages (a memfd)")
        #expect(ram(vm.ram, offset: 5) != nil)
        #expect(ram(vm.ram, offset: 1 << 63 - 4096) != nil)
        let end = try vm.ram.status().byteCount
        #expect(ram(vm.ram, offset: end - 15 * 4096) == "a region of 16 pages at offset \(end - 15 * 4096) is more than its file has")
        #expect(ram(vm.ram, offset: end - 16 * 4096) == nil)
        func join(_ map: borrowing Descriptor, _ life: borrowing Descriptor) -> String? {
            let map = map.raw, life = life.raw
            return message {
                try store.admit(
                    .init(name: "x"), uid: 5, map: Descriptor.duplicate(of: map), life: Descriptor.duplicate(of: life)
                ).welcome
            }
        }
        #expect(join(try Descriptor.open("/dev/null", O_RDONLY), try Descriptor.duplicate(of: vm.lifeRaw)) == "the page map is no file")
        #expect(join(vm.map, try Descriptor.open("/dev/null", O_RDONLY)) == "the VM's life is neither a pidfd nor a pipe")
        // RAM that is cut off under our hands.
        let raw = cutable()
        let guest = try Guest(vm, in: store)
        var files = DescriptorList()
        files.append(try raw.duplicate())
        guest.machine.setMemory(try GuestRAM([.init(gfn: 0, pages: 16, offset: 0, file: 0)], files: files))
        for gfn in UInt64(0)..<16 { try vm.write(gfn, page(gfn / 2)) }
        try raw.truncate(to: 3 * 4096 + 5)
        for _ in 0..<3 { #expect(try guest.lookUp([0..<16]) == []) }
        #expect(store.figures(of: nil).storeBytes == 0)
    }

    private func cutable() -> Descriptor {
        let path = "/dev/shm/quire-test-\(ProcessCalls.ownPID)-\(UInt32.random(in: 0 ... .max))"
        let file = try! Descriptor.open(path, O_RDWR | O_CREAT | O_EXCL)
        Files.remove(path)
        try! file.truncate(to: 16 * 4096)
        return file
    }

    @Test func theStoreIsReadOnlyForOthers() throws {
        let store = try Self.makeStore()
        let a = try Guest(FakeVM("a"), in: store)
        #expect(message { try a.slots.writeBytes(at: 0, [1]) } == "cannot write a file: Bad file descriptor")
        #expect(throws: QuireError.self) { _ = try Mapping(a.slots, byteCount: 4096) }
        // Not even another user who has root's rights to nothing else: the mode says so.
        var status = stat()
        #expect(unsafe fstat(a.slots.raw, &status) == 0 && status.st_mode & 0o777 == 0o400)
    }

    /// QEMU's pidfd is a life: what the VM had goes with it, and not with its backend.
    @Test func aVMEndsWithItsProcess() throws {
        let store = try Self.makeStore()
        let vm = try FakeVM("a")
        var qemu = try ChildProcess(["sleep", "60"])
        let (machine, _) = try store.admit(
            .init(name: "a"), uid: 1000, map: vm.map.duplicate(), life: ProcessCalls.descriptor(of: qemu.pid))
        store.disconnect(machine)
        #expect(!machine.isOver)
        // The name stays taken, by another page map at least.
        #expect(message { try FakeVM("a").admit(to: store) } == "the VM 'a' is running already in share group 'owner-1000': choose another name")
        qemu.signal(SIGKILL)
        qemu.wait()
        #expect(machine.isOver)
        #expect(message { try FakeVM("a").admit(to: store) } == nil)
        #expect(message { try machine.report([.init(.released, 0..<10)]) } == nil)
    }

    @Test func oneUserDoesNotTakeAllThereIs() throws {
        var configuration = try configuration()
        configuration.maxMachinesPerUser = 3
        configuration.maxMachines = 5
        let store = try PageStore(configuration, logger: quietLogger)
        let vms = try (0..<8).map { try FakeVM("vm\($0)") }
        let errors = vms.enumerated().map { index, vm in message { try vm.admit(to: store, uid: index < 4 ? 7 : 0) } }
        #expect(errors[3] == "user 7 has 3 VMs already, as many as may be")
        #expect(errors[6] == "there are 5 VMs already, as many as may be")
        #expect(errors.count { $0 == nil } == 5)
    }

    // MARK: - Several threads

    /// Threads that look up, get and give back the same few contents, so that slots are born and die all the time. What
    /// anyone is given has the right bytes for as long as it is his; at the end nothing is left.
    @Test func slotsComeAndGoUnderManyThreads() throws {
        let store = try Self.makeStore()
        let guests = try (0..<4).map { try Guest(FakeVM("vm\($0)", pages: 64), in: store) }
        let failures = Monitor<[String]>([])
        let deadline = monotonicNanoseconds() + 2_500_000_000
        let threads = try guests.enumerated().map { number, guest in
            nonisolated(unsafe) let guest = guest
            return try JoinableThread("guest") {
                do {
                    let guest = unsafe guest
                    var random = SplitMix(UInt64(number))
                    // Contents 1...23, in stretches: neighbours are equal in all of them.
                    for gfn in guest.vm.gfns { try guest.vm.write(gfn, page(gfn % 23 + 1)) }
                    while monotonicNanoseconds() < deadline {
                        let gfn = UInt64.random(in: 0..<50, using: &random)
                        var runs = try guest.lookUp([gfn..<gfn + UInt64.random(in: 1...14, using: &random)])
                        if Bool.random(using: &random) { runs += try guest.machine.takeOffers(8) }
                        for run in runs {
                            for (index, gfn) in run.gfns.enumerated()
                            where try guest.content(of: run.slot + UInt32(index)) != page(gfn % 23 + 1) {
                                throw QuireError(.invalid, "wrong bytes in \(run)")
                            }
                        }
                        let given = try guest.machine.report(runs.map { .init(.released, $0.gfns) })
                        if given != runs.reduce(0, { $0 + UInt64($1.pages) }) { throw QuireError(.invalid, "\(given) of \(runs)") }
                    }
                } catch { failures.update { $0.append("\(error)") } }
            }
        }
        for thread in threads { thread.join() }
        #expect(failures.read { $0 } == [])
        let figures = store.figures(of: nil)
        #expect(figures.promotions > 1000 && figures.hits > 1000, "\(figures)")
        #expect(figures.sharedPages == 0 && figures.heldPages == 0 && figures.storeBytes == 0 && figures.histogram.allSatisfy { $0 == 0 })
    }

    // MARK: - Growth

    /// The work for `pages` pages: steps of the allocator's trees, and CPU time, of which only a ratio is ever looked
    /// at.
    private struct Work {
        var steps = 0
        var cpu: UInt64 = 0
        var slots: UInt64 = 0
        var found = 0
    }

    private static func expectLinear(_ n: Work, _ fourN: Work) {
        #expect(fourN.steps <= 5 * n.steps + 10_000, "\(n) to \(fourN)")
        #expect(Double(fourN.cpu) < 4 * 3 * Double(n.cpu), "\(n) to \(fourN)")
    }

    /// A VM of `pages` pages: 64 distinct pages of memory behind many regions. Every block of 1024 pages is looked up,
    /// and reported as merged, with the hashes that `hashes` has for it.
    private static func lookUpBlocks(_ pages: Int, _ hashes: (PageHasher, UInt64) -> [PageHash]) throws -> Work {
        let store = try PageStore(
            configuration(limit: 1 << 20, candidates: 1 << 24), parking: NoParking(), parked: [], logger: quietLogger)
        let vm = try FakeVM("a", pages: 64)
        let (machine, welcome) = try vm.admit(to: store)
        let hasher = PageHasher(secret: welcome.secret)
        for gfn in UInt64(0)..<64 { try vm.write(gfn, page(1)) }
        let scratch = try PageStore.makeScratch()
        var work = Work()
        for block in UInt64(0)..<UInt64(pages / 1024) {
            var files = DescriptorList()
            files.append(try vm.ram.duplicate())
            machine.setMemory(try GuestRAM((0..<16).map {
                .init(gfn: block * 1024 + $0 * 64, pages: 64, offset: 0, file: 0)
            }, files: files))
            var lookup = StoreRequest.Lookup()
            lookup.append(block * 1024, hashes(hasher, block))
            let start = threadCPUNanoseconds()
            let runs = try store.lookUp(machine, lookup, scratch: scratch)
            work.found += runs.reduce(0) { $0 + Int($1.pages) }
            _ = try machine.report([.init(.merged, block * 1024..<(block + 1) * 1024)])
            work.cpu += threadCPUNanoseconds() - start
        }
        work.steps = store.allocatorSteps(of: machine)
        work.slots = store.figures(of: nil).sharedPages
        return work
    }

    @Test func aMillionEqualPages() throws {
        func equal(_ pages: Int) throws -> Work {
            try Self.lookUpBlocks(pages) { (hasher, _) in
                Array(repeating: hasher.hash(unsafe page(1).span.bytes), count: 1024)
            }
        }
        let quarter = try equal(1 << 18), whole = try equal(1 << 20)
        // All but the very first sighting.
        #expect(whole.slots == 1 && whole.found == 1 << 20 - 1)
        Self.expectLinear(quarter, whole)
    }

    @Test func aMillionDifferentPages() throws {
        func different(_ pages: Int) throws -> Work {
            var random = SplitMix(9)
            return try Self.lookUpBlocks(pages) { (_, _) in
                (0..<1024).map { _ in PageHash(low: random.next(), high: random.next()) }
            }
        }
        let quarter = try different(1 << 18), whole = try different(1 << 20)
        #expect(whole.slots == 0 && whole.found == 0)
        Self.expectLinear(quarter, whole)
    }

    /// Contents of which each has a slot of its own: taken, and freed again in an order that leaves holes everywhere.
    @Test func manySlots() throws {
        func slots(_ pages: Int) throws -> Work {
            let store = try PageStore(
                configuration(limit: 1 << 20, candidates: 1 << 22), parking: NoParking(), parked: [], logger: quietLogger)
            let a = try Guest(FakeVM("a", pages: pages), in: store), b = try Guest(FakeVM("b", pages: pages), in: store)
            for gfn in a.vm.gfns {
                let bytes = page(gfn)
                try a.vm.write(gfn, bytes)
                try b.vm.write(gfn, bytes)
            }
            var work = Work()
            let start = threadCPUNanoseconds()
            for guest in [a, b] {
                for block in stride(from: UInt64(0), to: UInt64(pages), by: 512) {
                    for run in try guest.lookUp([block..<block + 512]) { work.found += Int(run.pages) }
                }
            }
            work.slots = store.figures(of: nil).sharedPages
            for first in UInt64(0)..<16 {
                for gfn in stride(from: first, to: UInt64(pages), by: 16 * 64) {
                    let gone = (0..<UInt64(64)).map { gfn + $0 * 16 }.filter { $0 < pages }
                    _ = try b.machine.report(gone.map { .init(.released, $0..<$0 + 1) })
                }
            }
            work.cpu = threadCPUNanoseconds() - start
            work.steps = store.allocatorSteps(of: a.machine)
            #expect(store.figures(of: nil).sharedPages == 0 && store.figures(of: nil).storeBytes == 0)
            return work
        }
        let quarter = try slots(1 << 12), whole = try slots(1 << 14)
        #expect(whole.slots == 1 << 14 && whole.found == 1 << 14)
        Self.expectLinear(quarter, whole)
    }
}
