import CQuireLayout
import Engines
import Glibc
import GuestMemory
import Host
import Logging
import Platform
import Synchronization
import Testing

/// Claim, punch and release inside the front end.
@Suite(.serialized, .needsMerging) struct RecycleTests {
    private static let factor = ProcessCalls.environment("QUIRE_TEST_FACTOR").flatMap { Double($0) } ?? 1

    private func rig(_ options: [String] = []) throws -> Rig {
        let rig = try Rig(["table=1"] + options)
        try rig.begin()
        return rig
    }

    // MARK: - One order

    @Test func onlyWhatIsDue() throws {
        let rig = try rig()
        for page in 0..<80 { _ = try rig.tell("fill \(page) 5") }
        // At epoch 10: ages 3, 2, 1, 0; before the wrap, 10 and 253 - 1; and what is no mark at all.
        let marks: [UInt8] = [7, 8, 9, 10, 0xfd, 11, 0, 0xff, 0xfe]
        for (page, mark) in marks.enumerated() { rig.setMark(page, mark) }
        let order = Order(now: 10, dueAge: 2, claimPages: 64)
        #expect(try rig.recycle(0, marks.count, order) == Outcome(done: 4, reason: .done, detail: 0))
        for page in [0, 1, 4, 5] {
            #expect(rig.mark(page) == 0xff && !rig.isInFile(page) && rig.map.state(of: rig.gfn(page)) == .hole)
        }
        for page in [2, 3, 6, 7, 8] {
            #expect(rig.mark(page) == marks[page] && rig.isInFile(page) && rig.isPrivate(page))
        }
        // Those that were filled: only what is RECYCLED.
        _ = try rig.tell("fill 0 1")
        #expect(try rig.recycle(0, 7, order, again: true).done == 4 && rig.mark(0) == 0xff && !rig.isInFile(0))
        #expect(rig.mark(7) == 0xff && rig.isInFile(7))
        // Long runs, in claims of few pages.
        for page in 10..<80 { rig.setMark(page, 1) }
        #expect(try rig.recycle(0, 4095, Order(now: 10, dueAge: 2, claimPages: 3)).done == 70)
        #expect((10..<80).allSatisfy { rig.mark($0) == 0xff && !rig.isInFile($0) })
    }

    @Test func mergedPages() throws {
        let rig = try rig()
        for page in 0..<64 { _ = try rig.tell("fill \(page) 5") }
        #expect(try rig.run(.merge, 0, 64, value: 5).done == 64 && rig.run(.zero, 64, 64).done == 64)
        _ = try rig.tell("fill 9 1")
        _ = try rig.tell("fill 70 1")
        let freed = Array(8..<12) + Array(62..<71) + [200]
        for page in freed { rig.setMark(page, 1) }
        // I/O in the neighbourhood keeps only those off whose mapping has to change.
        try rig.map.beginIO(rig.gfn(300)..<rig.gfn(301))
        #expect(try rig.recycle(0, 300) == Outcome(done: 1, reason: .busy, detail: 0))
        #expect(rig.mark(8) == 1 && rig.mark(62) == 1 && rig.mark(200) == 0xff)
        rig.map.endIO(rig.gfn(300)..<rig.gfn(301))
        #expect(try rig.recycle(0, 300) == Outcome(done: 13, reason: .done, detail: 0))
        for page in freed {
            #expect(rig.mark(page) == 0xff && !rig.isInFile(page) && rig.map.state(of: rig.gfn(page)) == .hole)
            #expect(try rig.tell("is \(page) 0") == 1)
        }
        #expect(try rig.tell("is 7 5") == 1 && rig.tell("is 12 5") == 1 && rig.tell("is 71 0") == 1)
        #expect(rig.map.state(of: rig.gfn(12)) == .shared(store: 0, slot: 5 * 64 + 12))
    }

    @Test func nonsenseIsRefused() throws {
        let rig = try rig()
        for page in 0..<10 { rig.setMark(page, 1) }
        for order in [
            Order(now: 0), Order(now: 254), Order(now: .max), Order(claimPages: 0), Order(claimPages: 65),
        ] { #expect(try rig.recycle(0, 10, order).reason == .invalid) }
        let states = rig.gfn(rig.pages - 1) * 4096
        for run in [
            Run(gfn: 0, pages: 1, slot: states), Run(gfn: rig.gfn(0), pages: 0, slot: states),
            Run(gfn: rig.gfn(0), pages: 10, slot: states + 4087), Run(gfn: rig.gfn(0), pages: 10, slot: 4096),
            Run(gfn: rig.gfn(0), pages: .max, slot: states), Run(gfn: rig.gfn(0), pages: 10, slot: .max),
        ] { #expect(try rig.connection.run(.recycle, [run], Order())[0].reason == .invalid) }
        // Their bytes are somewhere else.
        #expect(try rig.run(.zero, 100, 1).done == 1)
        let run = Run(gfn: rig.gfn(0), pages: 10, slot: rig.gfn(100) * 4096)
        #expect(try rig.connection.run(.recycle, [run], Order())[0].reason == .invalid)
        // Of a backend that was replaced.
        rig.map.takeOver(pid: 1)
        #expect(try rig.recycle(0, 10).reason == .busy)
        #expect((0..<10).allSatisfy { rig.mark($0) == 1 })
        #expect(try rig.attach().status == QUIRE_AGENT_OK.rawValue)
        #expect(try rig.recycle(0, 10).done == 10)
    }

    // MARK: - A guest that frees and takes

    /// Merges, zeroes, folds and recycles as fast as it can, while the guest verifies; its last word.
    private func stress(_ seconds: Double, _ options: [String] = [], recycled: inout Int, merged: inout Int) throws -> String {
        let rig = try rig(["kinds=cfkrs", "free=1", "delay=55"] + options)
        var random = SystemRandomNumberGenerator()
        let end = monotonicNanoseconds() + UInt64(seconds * 1e9)
        while monotonicNanoseconds() < end, rig.lost == 0, rig.isRunning {
            let page = Int.random(in: 0..<rig.pages - 65, using: &random)
            let length = Int.random(in: 1...64, using: &random)
            let value = rig.byte(page)
            var operation = Operation.recycle
            var run = rig.states(page, length)
            switch Int.random(in: 0..<8, using: &random) {
            case 0..<3 where value < Rig.values:
                operation = .merge
                run = Run(gfn: rig.gfn(page), slot: UInt64(Int(value) * Rig.slotsEach))
            case 3 where value == 0:
                operation = .zero
                run = Run(gfn: rig.gfn(page))
            case 4: operation = .foldDiverged
            case 5: operation = .recycleAgain
            default: break
            }
            try? rig.connection.begin(operation, [run], operation.rawValue >= Operation.recycle.rawValue ? Order() : nil)
            guard let outcome = try? rig.connection.end()?[0] else { break }
            switch operation {
            case .recycle: recycled += Int(outcome.done)
            case .merge, .zero: merged += Int(outcome.done)
            default: break
            }
            #expect([.done, .differs, .busy, .state].contains(outcome.reason), "\(operation): \(outcome)")
        }
        let verdict = try rig.finish()
        print("\(options): \(verdict), \(rig.verified) verified, \(rig.lost) lost, \(recycled) recycled, \(merged) merged")
        return verdict
    }

    @Test func noPageInUseIsPunched() throws {
        var recycled = 0, merged = 0
        #expect(try stress(6 * Self.factor, recycled: &recycled, merged: &merged) == "good")
        #expect(recycled > 100 && merged > 50)
    }

    /// Controls. A claim by a plain store takes pages that the guest has just taken; without the punch what is RECYCLED
    /// holds what was there before.
    @Test(arguments: [Step.exchange, .recyclePunch]) func control(_ step: Step) throws {
        var recycled = 0, merged = 0
        // The loss is a matter of a microsecond: it comes after some twenty seconds, and ends the run.
        let verdict = try stress(400, ["leave=\(step.rawValue)", "hang=5"], recycled: &recycled, merged: &merged)
        #expect(verdict == "lost" || (step == .exchange && verdict == "hang"))
    }

    /// Eight pages are claimed by one exchange, and the guest takes one of them between the look and that: it keeps the page, and the
    /// others go. The control: by a plain store it would lose it.
    @Test(arguments: [true, false]) func oneOfEightIsTaken(_ isExchanged: Bool) throws {
        let rig = try rig(isExchanged ? [] : ["leave=\(Step.eight.rawValue)"])
        for page in 0..<16 {
            _ = try rig.tell("fill \(page) 5")
            rig.setMark(page, 1)
        }
        _ = try rig.tell("pause \(Step.eight.rawValue)")
        try rig.connection.begin(.recycle, [rig.states(0, 16)], Order())
        #expect(try rig.tell("paused") == 1)
        rig.setMark(3, 0)
        _ = try rig.tell("go")
        let outcome = try #require(rig.connection.end()?[0])
        #expect((0..<16).allSatisfy { page in page == 3 || rig.mark(page) == 0xff && !rig.isInFile(page) })
        let isKept = rig.mark(3) == 0 && rig.isInFile(3) && rig.byte(3) == 5
        #expect(isKept == isExchanged && outcome.done == (isExchanged ? 15 : 16), "\(outcome)")
    }

    // MARK: - A backend that dies

    /// What tells the front end that the backend is dead is told when the agent is done with what it was asked for.
    @Test(arguments: [true, false]) func connectionLastsAsLongAsTheOrder(_ begun: Bool) throws {
        let rig = try rig()
        for page in 0..<64 {
            _ = try rig.tell("fill \(page) 5")
            rig.setMark(page, 1)
        }
        var pair = try MessagePair()
        let frontEnd = pair.takeNear()
        do {
            let backend = pair.takeFar()
            _ = try rig.tell("pause \((begun ? Step.claimed : .zapped).rawValue)")
            // Or the order waits behind another one when the backend dies.
            if !begun { try rig.connection.begin(.merge, [Run(gfn: rig.gfn(100), slot: 0)]) }
            if begun { try rig.connection.begin(.recycle, [rig.states(0, 64)], Order(), passing: [backend.raw]) }
            #expect(try rig.tell("paused") == 1)
            if !begun { try rig.connection.begin(.recycle, [rig.states(0, 64)], Order(), passing: [backend.raw]) }
        }
        rig.drop()
        #expect(waitReadable([frontEnd.raw], timeoutMilliseconds: 200).isEmpty)
        #expect((0..<64).allSatisfy { rig.mark($0) == (begun ? 0xfe : 1) })
        _ = try rig.tell("go")
        #expect(!waitReadable([frontEnd.raw], timeoutMilliseconds: 10_000).isEmpty)
        // What was begun is done; what was not is not begun any more.
        #expect((0..<64).allSatisfy { rig.mark($0) == (begun ? 0xff : 1) && rig.isInFile($0) == !begun })
        try rig.begin()
        #expect(try rig.run(.merge, 100, 1, value: 0).reason != .invalid)
    }

    // MARK: - The engine, a link and the agent

    /// A guest's table in the RAM of a stand-in, and an engine that has the agent recycle.
    private final class Whole {
        let linked: AgentLinkTests.Linked
        let engine: RecycleEngine
        let header: UInt64
        var pair: MessagePair
        let backendEnd: Descriptor
        var rig: Rig { linked.rig }

        init(_ options: [String] = []) throws {
            linked = try AgentLinkTests.Linked(pages: 8192 - Int(Rig.firstGFN), options)
            let rig = linked.rig
            let ram = try Mapping(rig.ram, byteCount: rig.pages * Rig.page)
            // The last pages: header, directory, and the states of gfns 0 ..< 8192.
            let first = rig.pages - 4
            header = rig.gfn(first) * 4096
            ram.copyIn(first * Rig.page, Array(QUIRE_TABLE_MAGIC.utf8))
            ram.store32(first * Rig.page + 8, QUIRE_TABLE_VERSION)
            ram.store64(first * Rig.page + 16, 8192)
            ram.store64(first * Rig.page + 24, rig.gfn(first + 1) * 4096)
            for index in 0..<2 { ram.store64((first + 1) * Rig.page + 8 * index, rig.gfn(first + 2 + index) * 4096) }
            self.ram = ram
            engine = try RecycleEngine(.init(periodMilliseconds: 20), map: rig.map)
            engine.setRecycler(linked.link)
            pair = try MessagePair()
            backendEnd = pair.takeFar()
        }
        deinit { engine.end() }
        let ram: Mapping

        func start() throws {
            engine.start(memory: linked.memory, rings: [], nonce: 1, connection: backendEnd.raw)
            try engine.register(headerAddress: header)
        }
        private func place(_ page: Int) -> Int { (rig.pages - 2) * Rig.page + Int(rig.gfn(page)) }
        func mark(_ page: Int) -> UInt8 { ram.load8(place(page)) }
        /// As long ago as it takes.
        func free(_ page: Int) {
            let epoch = Int(max(1, ram.load8((rig.pages - 4) * Rig.page + 128)))
            ram.store8(place(page), UInt8((epoch - 1 - 120 + 506) % 253 + 1))
        }
    }

    @Test func engineHasTheAgentRecycle() throws {
        let whole = try Whole()
        #expect(whole.linked.isAttached)
        let rig = whole.rig
        for page in 0..<32 { _ = try rig.tell("fill \(page) 5") }
        #expect(try whole.linked.merge(0, 16, value: 5).done == 16)
        try whole.start()
        // On both sides of the end of a table page, and merged ones among them.
        let freed = Array(4..<24) + Array(3060..<3090)
        for page in freed { whole.free(page) }
        #expect(eventually { freed.allSatisfy { whole.mark($0) == 0xff } })
        #expect(freed.allSatisfy { !rig.isInFile($0) && rig.map.state(of: rig.gfn($0)) == .hole })
        #expect(eventually { whole.engine.snapshot.recycledNowPages == freed.count })
        #expect(whole.engine.snapshot.recycledPages == UInt64(freed.count) && rig.map.recycledTotal == UInt64(freed.count))
        #expect(try rig.tell("is 3 5") == 1 && rig.tell("is 4 0") == 1 && rig.tell("is 24 5") == 1)
        // Filled again (page 4, by the read above; more of it): found when the device starts.
        for page in 10..<20 { _ = try rig.tell("fill \(page) 7") }
        whole.engine.stop()
        try whole.start()
        #expect(eventually { (4..<24).allSatisfy { !rig.isInFile($0) } })
        // Counted when the agent has answered.
        #expect(eventually { whole.engine.snapshot.refilledPages >= 11 })
        #expect((4..<24).allSatisfy { whole.mark($0) == 0xff })
        // Without the agent it does the same by itself, but for what is merged.
        whole.linked.link.end()
        for page in [0, 30] { whole.free(page) }
        #expect(eventually { whole.mark(30) == 0xff })
        #expect(whole.mark(0) != 0xff && !rig.isInFile(30))
    }

    /// The pass is over, and the engine stopped, only when the agent is done: also when the link has gone.
    @Test(arguments: [false, true]) func stopWaitsForTheAgent(_ linkEnds: Bool) throws {
        let whole = try Whole()
        #expect(whole.linked.isAttached)
        let rig = whole.rig
        for page in 0..<32 { _ = try rig.tell("fill \(page) 5") }
        _ = try rig.tell("pause \(Step.claimed.rawValue)")
        try whole.start()
        for page in 0..<32 { whole.free(page) }
        #expect(try rig.tell("paused") == 1)
        let claimed = (0..<32).filter { whole.mark($0) == 0xfe }
        // It is the agent's claim: in no journal of ours.
        #expect(!claimed.isEmpty && rig.map.openClaims.isEmpty)
        if linkEnds { whole.linked.link.end() }
        let stopped = Mutex(false)
        let engine = whole.engine
        let stopping = try JoinableThread("stop") {
            engine.stop()
            stopped.withLock { $0 = true }
        }
        ProcessCalls.sleep(milliseconds: 200)
        #expect(!stopped.withLock { $0 } && claimed.allSatisfy { whole.mark($0) == 0xfe })
        _ = try rig.tell("go")
        stopping.join()
        #expect(claimed.allSatisfy { whole.mark($0) == 0xff && !rig.isInFile($0) })
        #expect(!(0..<32).contains { whole.mark($0) == 0xfe })
    }
}

private func eventually(seconds: UInt64 = 20, _ condition: () -> Bool) -> Bool {
    let deadline = monotonicNanoseconds() + seconds * 1_000_000_000
    while monotonicNanoseconds() < deadline {
        if condition() { return true }
        ProcessCalls.sleep(milliseconds: 5)
    }
    return condition()
}
