import CQuireLayout
import Engines
import Glibc
import Platform
import Testing

/// What one command does, and what becomes of it when the backend dies in the middle.
@Suite(.serialized, .needsMerging) struct WindowTests {
    /// Pages 0..<64 hold value 5, the rest zeros.
    private func rig() throws -> Rig {
        let rig = try Rig()
        try rig.begin()
        for page in 0..<64 { _ = try rig.tell("fill \(page) 5") }
        return rig
    }

    @Test func mergeWriteFold() throws {
        let rig = try rig()
        #expect(try rig.run(.merge, 0, 64, value: 5) == Outcome(done: 64, reason: .done, detail: 0))
        for page in 0..<64 {
            #expect(!rig.isInFile(page))
            #expect(rig.map.state(of: rig.gfn(page)) == .shared(store: 0, slot: UInt64(5 * 64 + page)))
            #expect(try rig.tell("is \(page) 5") == 1)
        }
        // A guest's write is a copy of its own.
        _ = try rig.tell("fill 7 2")
        #expect(try rig.tell("is 7 2") == 1 && rig.tell("is 6 5") == 1)
        var slot: UInt8 = 0
        pread(rig.store.raw, &slot, 1, (5 * 64 + 7) * Rig.page)
        #expect(slot == 5)
        // Merged pages can't be merged; those that nobody wrote are left alone, and what was written comes back.
        #expect(try rig.run(.merge, 0, 64, value: 5) == Outcome(done: 0, reason: .state, detail: 0))
        #expect(try rig.run(.foldDiverged, 0, 64).reason == .done)
        #expect(rig.map.state(of: rig.gfn(7)) == .private && rig.byte(7) == 2)
        #expect((0..<64).count { rig.map.state(of: rig.gfn($0))?.isMerged == true } == 63)
        #expect(try rig.run(.fold, 0, 64).reason == .done)
        for page in 0..<64 where page != 7 {
            #expect(rig.map.state(of: rig.gfn(page)) == .private && rig.byte(page) == 5)
        }
        #expect(try rig.tell("is 7 2") == 1 && rig.tell("is 63 5") == 1)
    }

    @Test func zeros() throws {
        let rig = try rig()
        #expect(try rig.run(.zero, 62, 4) == Outcome(done: 0, reason: .differs, detail: 0))
        #expect(try rig.run(.zero, 64, 1000) == Outcome(done: 1000, reason: .done, detail: 0))
        #expect(rig.map.state(of: rig.gfn(64)) == .zero && rig.map.state(of: rig.gfn(1063)) == .zero)
        #expect(try rig.tell("is 100 0") == 1)
        // A read isn't a divergence.
        #expect(try rig.run(.foldDiverged, 64, 1000).reason == .done)
        #expect((64..<1064).allSatisfy { rig.map.state(of: rig.gfn($0)) == .zero })
        _ = try rig.tell("fill 500 3")
        #expect(try rig.run(.foldDiverged, 64, 1000).reason == .done)
        #expect(rig.map.state(of: rig.gfn(500)) == .private && rig.byte(500) == 3)
        #expect((64..<1064).count { rig.map.state(of: rig.gfn($0)) == .zero } == 999)
        #expect(try rig.tell("is 500 3") == 1)
    }

    @Test func whatDiffersStays() throws {
        let rig = try rig()
        _ = try rig.tell("fill 40 6")
        #expect(try rig.run(.merge, 0, 64, value: 5) == Outcome(done: 0, reason: .differs, detail: 40))
        #expect(rig.map.state(of: rig.gfn(0)) == .private && rig.isInFile(0))
        #expect(try rig.tell("is 40 6") == 1 && rig.tell("is 39 5") == 1)
        #expect(try rig.run(.merge, 0, 40, value: 5).done == 40)
    }

    @Test func resetForgets() throws {
        let rig = try rig()
        _ = try rig.run(.merge, 0, 64, value: 5)
        _ = try rig.tell("fill 9 1")
        #expect(try rig.run(.reset, 8, 4) == Outcome(done: 4, reason: .done, detail: 0))
        for page in 8..<12 {
            #expect(rig.map.state(of: rig.gfn(page)) == .private)
            #expect(try rig.tell("is \(page) 0") == 1)
        }
        #expect(try rig.tell("is 7 5") == 1 && rig.tell("is 12 5") == 1)
        // Of pages that were never merged nothing is forgotten.
        #expect(try rig.run(.fold, 0, 64).done == 64)
        #expect(try rig.run(.reset, 0, 8).done == 8 && rig.tell("is 7 5") == 1)
    }

    @Test func ioKeepsWindowsOff() throws {
        let rig = try rig()
        try rig.map.beginIO(rig.gfn(3)..<rig.gfn(4))
        #expect(try rig.run(.merge, 0, 64, value: 5) == Outcome(done: 0, reason: .busy, detail: 0))
        rig.map.endIO(rig.gfn(3)..<rig.gfn(4))
        #expect(try rig.run(.merge, 0, 64, value: 5).done == 64)
        try rig.map.beginIO(rig.gfn(3)..<rig.gfn(4))
        #expect(try rig.run(.fold, 0, 64).reason == .busy)
        #expect(try rig.run(.reset, 8, 1).reason == .busy)
        // QEMU waits with a call that discards, and not for ever.
        #expect(try rig.tell("punch \(8 * Rig.page) \(Rig.page)") == Int(-EBUSY) && rig.tell("is 8 5") == 1)
        let map = rig.map, held = rig.gfn(3)..<rig.gfn(4)
        let ending = try JoinableThread("end") {
            ProcessCalls.sleep(milliseconds: 30)
            map.endIO(held)
        }
        #expect(try rig.tell("punch \(8 * Rig.page) \(Rig.page)") == 0 && rig.tell("is 8 0") == 1)
        ending.join()
        #expect(rig.map.state(of: rig.gfn(8)) == .private)
        // Another backend has the map: what the one before asked for is over.
        rig.map.takeOver(pid: 1)
        #expect(try rig.run(.reset, 9, 1).reason == .busy && rig.map.state(of: rig.gfn(9))?.isMerged == true)
        #expect(try rig.tell("punch \(9 * Rig.page) \(Rig.page)") == 0 && rig.tell("is 9 0") == 1)
        #expect(try rig.attach().status == QUIRE_AGENT_OK.rawValue)
        #expect(try rig.run(.fold, 0, 64).done == 64)
    }

    /// A backend without the right to, that was given descriptors.
    @Test func memoryDescriptorReadsMergedPages() throws {
        let rig = try Rig()
        try rig.accept()
        let ready = try rig.attach()
        _ = try rig.tell("fill 0 5")
        _ = try rig.run(.merge, 0, 1, value: 5)
        let memory = try #require(rig.connection.memoryDescriptor)
        var byte: UInt8 = 0
        #expect(pread(memory, &byte, 1, Int(ready.addresses[0])) == 1 && byte == 5)
        byte = 9
        #expect(pwrite(memory, &byte, 1, Int(ready.addresses[0])) == 1)
        #expect(try rig.tell("byte 0") == 9)
        pread(rig.store.raw, &byte, 1, 5 * 64 * Rig.page)
        #expect(byte == 5)
    }

    @Test func nonsenseIsRefused() throws {
        let rig = try rig()
        let last = rig.gfn(rig.pages)
        let runs = [
            Run(gfn: 0), Run(gfn: last), Run(gfn: last - 1, pages: 2), Run(gfn: rig.gfn(0), pages: 0),
            Run(gfn: .max, pages: 2), Run(gfn: rig.gfn(0), store: 1), Run(gfn: rig.gfn(0), slot: 8 * 64),
            Run(gfn: rig.gfn(0), pages: 2, slot: 8 * 64 - 1), Run(gfn: rig.gfn(0), slot: 1 << 40),
            Run(gfn: rig.gfn(0), slot: .max), Run(gfn: rig.gfn(0), pages: .max), Run(gfn: rig.gfn(0), store: .max),
        ]
        #expect(try rig.connection.run(.merge, runs).allSatisfy { $0 == Outcome(done: 0, reason: .invalid, detail: 0) })
        #expect(try rig.run(.merge, 0, 64, value: 5).done == 64)
    }

    /// The balloon punches by itself, in the middle of a merged run.
    @Test func balloon() throws {
        let rig = try rig()
        _ = try rig.run(.merge, 0, 64, value: 5)
        _ = try rig.tell("fill 10 1")
        _ = try rig.tell("fill 20 1")
        // Advice that discards nothing on shared memory must not discard what the guest wrote.
        #expect(try rig.tell("dontneed \(20 * Rig.page) \(Rig.page)") == 0)
        #expect(try rig.tell("is 20 1") == 1)
        #expect(try rig.tell("punch \(8 * Rig.page) \(4 * Rig.page)") == 0)
        #expect(try rig.tell("dontneed \(8 * Rig.page) \(4 * Rig.page)") == 0)
        for page in 8..<12 {
            #expect(rig.map.state(of: rig.gfn(page)) == .private)
            #expect(try rig.tell("is \(page) 0") == 1)
        }
        #expect(try rig.tell("is 7 5") == 1 && rig.tell("is 12 5") == 1)
        #expect(try rig.tell("remove \(30 * Rig.page) \(Rig.page)") == 0)
        #expect(try rig.tell("is 30 0") == 1 && rig.tell("is 31 5") == 1)
        // Part of a page: the rest of it must survive.
        #expect(try rig.tell("punch \(40 * Rig.page) 100") == Int(-EINVAL))
        #expect(try rig.tell("is 40 5") == 1)
        #expect(try rig.run(.fold, 0, 64).reason == .done)
        #expect(try rig.tell("is 20 1") == 1 && rig.tell("is 63 5") == 1 && rig.tell("is 9 0") == 1)
    }

    @Test func unmappedMemoryIsNotTouched() throws {
        let rig = try rig()
        #expect(try rig.tell("munmap 0 \(rig.pages * Rig.page)") == 0)
        #expect(try rig.run(.merge, 0, 1, value: 5).reason == .invalid)
        #expect(try rig.run(.reset, 0, 1).reason == .invalid)
    }

    /// Memory is unplugged while pages of it are merged, and other memory plugged in its place.
    @Test(arguments: [true, false]) func memoryIsReplaced(_ backendKnows: Bool) throws {
        let rig = try rig()
        #expect(try rig.run(.merge, 0, 64, value: 5).done == 64)
        #expect(try rig.run(.zero, 100, 8).done == 8)
        let other = try Memfd(name: "other", byteCount: UInt64(rig.pages * Rig.page)).takeDescriptor()
        try rig.passDescriptor(other.raw)
        let fd = try #require(try rig.tell("receive"))
        let region = Region(gfn: rig.gfn(0), pages: UInt64(rig.pages))
        func plug() throws -> Ready {
            try rig.connection.attach(regions: [region], map: rig.mapFile.raw, files: [other.raw], stores: [rig.store.raw])
        }
        #expect(try rig.tell("map \(fd)") == 0)
        // The regions go first, as in QEMU; then there is a time in which both are mapped.
        if backendKnows {
            #expect(try rig.attach(regions: [region].filter { _ in false }).status == QUIRE_AGENT_OK.rawValue)
            #expect(try plug().status == QUIRE_AGENT_NOT_MAPPED.rawValue)
        }
        #expect(try rig.tell("munmap 0 \(rig.pages * Rig.page)") == 0)
        #expect((0..<rig.pages).allSatisfy { rig.isPrivate($0) })
        #expect(try plug().status == QUIRE_AGENT_OK.rawValue)
        _ = try rig.tell("use \(fd)")
        _ = try rig.tell("fill 3 5")
        #expect(try rig.run(.merge, 3, 1, value: 5).done == 1 && rig.tell("is 3 5") == 1)
        // Nobody else has the memory any more.
        let folder = "/proc/\(rig.pid)/fd/"
        let files = (Files.list(folder) ?? []).compactMap { Files.target(ofLink: folder + $0) }
        #expect(files.count { $0.contains("memfd:ram") } == 1)
    }

    // MARK: - Deaths

    /// The backend dies while the agent is at `step` of `operation`. The guest goes on, the agent comes back, and what
    /// the page map says is true.
    @Test(arguments: Step.ofMerge.map { (Operation.merge, $0) } + Step.ofFold.map { (Operation.fold, $0) }
        + [(.merge, .unregister), (.reset, .reset)])
    func backendDies(_ operation: Operation, _ step: Step) throws {
        let rig = try Rig(["kinds=cf", "write=1000000"])
        try rig.begin()
        // Pages 0..<3 hold value 0, the next three 1, and so on.
        if operation != .merge { #expect(try rig.run(.merge, 3, 3, value: 1).done == 3) }
        _ = try rig.tell("pause \(step.rawValue)")
        try rig.map.beginIO(rig.gfn(2000)..<rig.gfn(2001))
        let slot = UInt64((step == .unregister ? 2 : 1) * Rig.slotsEach)
        // Pages 24..<27 are zeros, so a guest that hasn't freed them doesn't notice a reset either.
        if operation == .reset { #expect(try rig.run(.zero, 24, 3).done == 3) }
        let page = operation == .reset ? 24 : 3
        try rig.connection.begin(
            operation, [Run(gfn: rig.gfn(page), pages: 3, slot: operation == .merge ? slot : 0)])
        #expect(try rig.tell("paused") == 1)
        rig.drop()
        let before = rig.verified
        ProcessCalls.sleep(milliseconds: 20)
        _ = try rig.tell("go")
        try rig.accept()
        #expect(try rig.attach().status == QUIRE_AGENT_OK.rawValue)
        #expect(try rig.connection.gate(becomes: false) != nil)
        let merged = operation == .merge && step != .unregister
        for page in 3..<6 where operation != .reset {
            let state: PageState = merged ? .shared(store: 0, slot: slot + UInt64(page - 3)) : .private
            #expect(rig.map.state(of: rig.gfn(page)) == state)
            #expect(rig.isInFile(page) == !merged)
        }
        // What the dead backend had in flight is nobody's any more, once there is another.
        #expect(try rig.run(.merge, 2001, 1, value: 2001 / 3 % 8).reason == .busy)
        rig.map.takeOver(pid: 1)
        #expect(try rig.run(.merge, 2001, 1, value: 2001 / 3 % 8).reason == .busy)
        #expect(try rig.attach().status == QUIRE_AGENT_OK.rawValue)
        #expect(try rig.run(.merge, 2001, 1, value: 2001 / 3 % 8).reason == .done)
        #expect(try rig.run(.fold, 0, 3000).reason == .done)
        ProcessCalls.sleep(milliseconds: 20)
        #expect(rig.verified > before)
        #expect(try rig.finish() == "good")
    }
}
