import Engines
import Glibc
import GuestMemory
import Platform
import Synchronization
import TestSupport
import Testing

/// An engine with its page map, ended with the test.
private final class Bench {
    let map: PageMap
    let mapFile: Descriptor
    var engine: RecycleEngine

    init(period: UInt32 = 20, workers: Int = 1) throws {
        mapFile = try PageMap.makeFile(pageCount: 1 << 16)
        map = try PageMap(mapFile.duplicate())
        engine = try RecycleEngine(.init(periodMilliseconds: period, workers: workers), map: map)
    }
    deinit { engine.end() }

    func start(_ guest: ModelGuest, nonce: UInt64 = 1, rings: [Range<UInt64>] = []) {
        engine.start(memory: guest.memory, rings: rings, nonce: nonce)
    }
    func run(_ guest: ModelGuest, nonce: UInt64 = 1) throws {
        start(guest, nonce: nonce)
        try engine.register(headerAddress: guest.headerAddress)
    }
}

@Suite(.serialized) struct RecycleEngineTests {
    // MARK: - A guest at work

    struct Setting: Sendable, CustomTestStringConvertible {
        let period: UInt32, workers: Int, threads: Int
        /// Their number is another one all the time.
        var changes = false
        var testDescription: String { "\(period) ms, \(workers) workers, \(threads) threads" }
    }

    /// A guest that allocates and frees all the time, and checks every byte: nothing is lost, what is taken as RECYCLED
    /// reads as zeros, and what stays free comes back.
    @Test(arguments: [
        Setting(period: 10, workers: 1, threads: 2), Setting(period: 10, workers: 4, threads: 2, changes: true),
        Setting(period: 100, workers: 2, threads: 1),
    ]) func workingGuestLosesNothing(_ setting: Setting) throws {
        let guest = try ModelGuest(pages: 3 * 4096)
        let bench = try Bench(period: setting.period, workers: setting.workers)
        let workload = try Workload(guest, threads: setting.threads, manners: .correct)
        try bench.run(guest)
        let deadline = monotonicNanoseconds() + 2_500_000_000
        // At least as long, and until something has happened: recycling met allocation.
        var changes = 0
        _ = eventually {
            if setting.changes, (try? bench.engine.setWorkers([1, 6, 2, 16, 3][changes % 5])) != nil { changes += 1 }
            return monotonicNanoseconds() > deadline && bench.engine.snapshot.recycledPages > 500
        }
        #expect(!setting.changes || changes > 20)
        #expect(errorCode { try bench.engine.setWorkers(17) } == .invalid)
        let findings = workload.stop()
        #expect(findings.isClean, "\(findings)")
        #expect(findings.allocations > 100 && findings.fromRecycled > 0, "\(findings)")
        #expect(bench.engine.snapshot.phase == .active)

        // Now nothing moves: every page that is free goes, none that is in use does.
        let free = guest.usable.filter { guest.state($0) != ModelGuest.inUse }
        #expect(eventually { free.allSatisfy { guest.state($0) == ModelGuest.recycled } })
        #expect(free.allSatisfy { !guest.isResident($0) })
        #expect(guest.usable.filter { guest.state($0) == ModelGuest.inUse }.allSatisfy { guest.isResident($0) })
        let statistics = bench.engine.snapshot
        #expect(eventually { bench.engine.snapshot.recycledNowPages == free.count })
        #expect(statistics.recycledTotalPages == statistics.recycledPages + statistics.refilledPages)
        #expect(bench.map.openClaims.isEmpty)
    }

    /// Controls: guests that break the protocol lose data, and the same checks see it.
    @Test(arguments: [ModelGuest.Manners.doesNotWait, .storesWithoutExchange])
    func guestWithoutMannersIsFoundCorrupt(_ manners: ModelGuest.Manners) throws {
        let guest = try ModelGuest(pages: 2048)
        let bench = try Bench(period: 10)
        let workload = try Workload(guest, threads: 1, manners: manners)
        try bench.run(guest)
        #expect(eventually(seconds: 30) { !workload.current.isClean })
        _ = workload.stop()
    }

    // MARK: - An agent

    /// Recycles as the agent does, or does not.
    private final class ModelAgent: PageRecycler {
        enum Manners: Sendable { case works, isBusy, goesAway, knowsOtherMemory, cannotPunch }
        struct Seen: Sendable {
            var manners: Manners
            var orders = 0, runs = 0, pages = 0, again = 0
            var connections: Set<Int32> = []
        }
        let guest: ModelGuest
        let map: PageMap
        let seen: Mutex<Seen>

        init(_ guest: ModelGuest, _ map: PageMap, _ manners: Manners) {
            self.guest = guest
            self.map = map
            seen = Mutex(Seen(manners: manners))
        }
        var canRecycle: Bool { true }

        func recycle(_ runs: [RecycleRun], _ order: RecycleOrder) throws(QuireError) -> [MoveOutcome] {
            let manners = seen.withLock {
                $0.orders += 1
                $0.runs += runs.count
                $0.connections.insert(order.connection)
                return $0.manners
            }
            switch manners {
            case .works: break
            case .isBusy: throw QuireError(.busy, "later")
            case .goesAway: throw QuireError(.closed, "gone")
            case .knowsOtherMemory: return runs.map { _ in MoveOutcome(done: 0, reason: .invalid) }
            case .cannotPunch: return runs.map { _ in MoveOutcome(done: 0, reason: .failed(errno: 5)) }
            }
            return try runs.map { (run) throws(QuireError) in
                let page = Int(run.gfns.lowerBound) / 4096
                #expect(run.states == UInt64(guest.tableGFN(page)) * 4096 + run.gfns.lowerBound % 4096)
                #expect(Int(run.gfns.upperBound - 1) / 4096 == page)
                var done = 0
                for gfn in run.gfns {
                    let state = guest.state(Int(gfn))
                    let isWanted: Bool =
                        switch order.kind {
                        case .again: state == ModelGuest.recycled
                        case .due(let age):
                            (1...253).contains(state) && (Int(order.now) - Int(state) + 253) % 253 >= age
                        }
                    guard isWanted, guest.exchange(Int(gfn), from: state, to: ModelGuest.claimed) else { continue }
                    try Memfd.punch(guest.file.raw, offset: gfn * 4096, byteCount: 4096)
                    map.move(gfn, from: .private, to: .hole)
                    guest.setState(Int(gfn), ModelGuest.recycled)
                    done += 1
                    if order.kind == .again { seen.withLock { $0.again += 1 } }
                }
                seen.withLock { [done] in $0.pages += done }
                return MoveOutcome(done: done, reason: .done)
            }
        }
    }

    @Test(arguments: [1, 3]) func agentRecycles(workers: Int) throws {
        let guest = try ModelGuest(pages: 5 * 4096)
        let bench = try Bench(period: 20, workers: workers)
        let agent = ModelAgent(guest, bench.map, .works)
        bench.engine.setRecycler(agent)
        // Without a connection to hold no agent is asked.
        try bench.run(guest)
        guest.freeLongAgo(100)
        #expect(eventually { guest.state(100) == ModelGuest.recycled })
        #expect(agent.seen.withLock { $0.orders } == 0)

        bench.engine.stop()
        guest.setState(100, ModelGuest.inUse)
        bench.engine.start(memory: guest.memory, rings: [], nonce: 1, connection: 77)
        let workload = try Workload(guest, threads: 2, manners: .correct)
        let deadline = monotonicNanoseconds() + 1_500_000_000
        _ = eventually { monotonicNanoseconds() > deadline && bench.engine.snapshot.recycledPages > 500 }
        let findings = workload.stop()
        #expect(findings.isClean && findings.fromRecycled > 0, "\(findings)")
        let free = guest.usable.filter { guest.state($0) != ModelGuest.inUse }
        #expect(eventually { free.allSatisfy { guest.state($0) == ModelGuest.recycled && !guest.isResident($0) } })
        #expect(eventually { bench.engine.snapshot.recycledNowPages == free.count })
        // The device's start looked for pages that were filled, and found none that it had not made.
        let seen = agent.seen.withLock { $0 }
        #expect(seen.connections == [77] && seen.runs >= seen.orders)
        #expect(bench.map.recycledTotal == UInt64(seen.pages) + 1)
        #expect(bench.engine.snapshot.refilledPages == UInt64(seen.again))
        // Several table pages in one order.
        bench.engine.stop()
        for gfn in stride(from: 200, to: 5 * 4096, by: 2000) where guest.usable.contains(gfn) {
            if guest.state(gfn) == ModelGuest.inUse { guest.freeLongAgo(gfn) }
        }
        // And those that were filled behind our back.
        for gfn in free.prefix(3) { guest.fill(gfn) }
        bench.engine.start(memory: guest.memory, rings: [], nonce: 1, connection: 77)
        #expect(eventually { free.prefix(3).allSatisfy { !guest.isResident($0) } })
        #expect(eventually { guest.usable.allSatisfy { [ModelGuest.inUse, ModelGuest.recycled].contains(guest.state($0)) } })
        #expect(agent.seen.withLock { $0.again } == seen.again + 3)
        bench.engine.stop()
    }

    /// An agent that is busy is asked again; one that is not there, or knows other memory, is replaced by the engine itself;
    /// one that cannot punch ends the registration.
    @Test func agentDoesNot() throws {
        let guest = try ModelGuest(pages: 2048)
        let bench = try Bench(period: 20)
        let agent = ModelAgent(guest, bench.map, .isBusy)
        bench.engine.setRecycler(agent)
        bench.engine.start(memory: guest.memory, rings: [], nonce: 1, connection: 77)
        try bench.engine.register(headerAddress: guest.headerAddress)
        guest.freeLongAgo(100)
        #expect(eventually { agent.seen.withLock { $0.orders } > 3 })
        #expect(guest.state(100) != ModelGuest.recycled)
        for (number, manners) in [ModelAgent.Manners.goesAway, .knowsOtherMemory, .works].enumerated() {
            agent.seen.withLock { $0.manners = manners }
            for gfn in 200..<300 { guest.freeLongAgo(gfn + 100 * number) }
            #expect(eventually { (200..<300).allSatisfy { guest.state($0 + 100 * number) == ModelGuest.recycled } })
        }
        #expect(eventually { bench.engine.snapshot.recycledNowPages == 301 })
        agent.seen.withLock { $0.manners = .cannotPunch }
        guest.freeLongAgo(1000)
        #expect(eventually { bench.engine.snapshot.phase == .refused })
        #expect(bench.engine.snapshot.reason.contains("the agent in QEMU"))
    }

    // MARK: - Merged pages

    /// A freed page that is merged is not claimed; nor is one where the agent has a window open. Both are as soon as that is over.
    @Test func mergedPagesAreLeftAlone() throws {
        let guest = try ModelGuest(pages: 2048)
        let bench = try Bench(period: 20)
        let raw = try Mapping(bench.mapFile, byteCount: Int(PageMap.byteCount(pageCount: 1 << 16)))
        func lock(_ gfn: Int, _ field: Int) -> Int { 4096 + 8 * (1 << 16) + 8 * (gfn / 512) + field }
        for gfn in [600, 601, 603, 1100] { guest.fill(gfn) }
        raw.store8(lock(600, 5), 1)
        #expect(bench.map.move(601, from: .private, to: .zero, by: .agent))
        raw.store8(lock(1100, 4), 1)
        try bench.run(guest)
        for gfn in [600, 601, 602, 603, 1100] { guest.freeLongAgo(gfn) }
        #expect(eventually { [600, 602, 603].allSatisfy { guest.state($0) == ModelGuest.recycled } })
        let passes = bench.engine.snapshot.passes
        #expect(eventually { bench.engine.snapshot.passes > passes + 2 })
        for gfn in [601, 1100] {
            #expect(guest.isResident(gfn) && ![ModelGuest.claimed, ModelGuest.recycled].contains(guest.state(gfn)))
        }
        #expect(bench.map.state(of: 601) == .zero && bench.map.state(of: 1100) == .private)
        #expect(bench.map.move(601, from: .zero, to: .private, by: .agent))
        raw.store8(lock(1100, 4), 0)
        #expect(eventually { [601, 1100].allSatisfy { guest.state($0) == ModelGuest.recycled && !guest.isResident($0) } })
        #expect(raw.load16(lock(600, 0)) == 0 && raw.load16(lock(1100, 0)) == 0)
    }

    /// A claim of a dead back end on a page that is merged by now: given up, not punched.
    @Test func claimsOnMergedPagesAreGivenUp() throws {
        let guest = try ModelGuest(pages: 2048)
        let bench = try Bench(period: 50_000)
        let raw = try Mapping(bench.mapFile, byteCount: Int(PageMap.byteCount(pageCount: 1 << 16)))
        for gfn in 700..<702 {
            guest.fill(gfn)
            guest.setState(gfn, ModelGuest.claimed)
        }
        raw.store8(4096 + 8 * (1 << 16) + 8 + 5, 1)
        #expect(bench.map.move(701, from: .private, to: .shared(store: 0, slot: 1), by: .agent))
        bench.map.registration = PageMap.Registration(nonce: 9, headerAddress: guest.headerAddress)
        bench.map.openClaim(0, 700..<702, now: 1)
        bench.start(guest, nonce: 9)
        #expect(guest.state(700) == ModelGuest.recycled && !guest.isResident(700) && bench.map.state(of: 700) == .hole)
        #expect(guest.state(701) == ModelGuest.firstEpoch && guest.isResident(701))
        #expect(bench.map.state(of: 701)?.isMerged == true && bench.map.openClaims.isEmpty)
    }

    // MARK: - Stopping

    /// When `stop` has returned not a byte of guest memory changes, though the guest would have much to recycle.
    @Test(arguments: [1, 3]) func stopMeansStopped(workers: Int) throws {
        let guest = try ModelGuest(pages: 2 * 4096)
        let bench = try Bench(period: 10, workers: workers)
        for round in 0..<6 {
            guest.writeTable()
            for gfn in guest.usable { guest.fill(gfn, UInt8(round + 1)) }
            bench.start(guest, nonce: 7)
            try bench.engine.register(headerAddress: guest.headerAddress)
            for gfn in guest.usable { guest.freeLongAgo(gfn) }
            // Somewhere in the middle of the work.
            if round > 0 { usleep(UInt32(round) * 2000) }
            bench.engine.stop()
            let before = guest.snapshot(), resident = guest.residentPages
            usleep(60_000)
            #expect(guest.snapshot() == before && guest.residentPages == resident)
            #expect(!guest.usable.contains { guest.state($0) == ModelGuest.claimed })
            #expect(bench.map.openClaims.isEmpty)
            // The registration is kept for a device that was only paused, and the same guest goes on.
            #expect(bench.map.registration == .init(nonce: 7, headerAddress: guest.headerAddress))
            bench.start(guest, nonce: 7)
            #expect(bench.engine.snapshot.phase == .active)
            #expect(eventually { guest.usable.allSatisfy { guest.state($0) == ModelGuest.recycled } })
            bench.engine.stop()
        }
    }

    @Test func stoppedEngineRefusesRegistration() throws {
        let guest = try ModelGuest(pages: 2048)
        let bench = try Bench()
        #expect(throws: QuireError.self) { try bench.engine.register(headerAddress: guest.headerAddress) }
        try bench.run(guest)
        bench.engine.stop()
        bench.engine.stop()
        #expect(throws: QuireError.self) { try bench.engine.register(headerAddress: guest.headerAddress) }
        #expect(bench.engine.snapshot.phase == .idle)
    }

    @Test func unregisteredTableIsLeftAlone() throws {
        let guest = try ModelGuest(pages: 2048)
        let bench = try Bench(period: 10)
        try bench.run(guest)
        guest.free(100)
        #expect(eventually { guest.state(100) == ModelGuest.recycled })
        bench.engine.unregister()
        for gfn in guest.usable { guest.fill(gfn); guest.freeLongAgo(gfn) }
        let before = guest.snapshot()
        usleep(100_000)
        #expect(guest.snapshot() == before)
        #expect(bench.engine.snapshot.phase == .idle && bench.map.registration == nil)
    }

    // MARK: - What a dead process left

    /// Claims of a dead process, as they may be found: finished where the byte is still CLAIMED, untouched elsewhere.
    @Test func claimsAreFinishedForTheSameGuest() throws {
        let guest = try ModelGuest(pages: 2 * 4096)
        let bench = try Bench(period: 10_000)
        for gfn in guest.usable { guest.fill(gfn, UInt8(gfn % 251 + 1)) }
        guest.setEpoch(9)
        bench.map.registration = .init(nonce: 0xabc, headerAddress: guest.headerAddress)
        // Worker 0 died between claiming and punching, worker 5 in the middle of claiming, worker 15 while it released,
        // across a page of the table.
        bench.map.openClaim(0, 100..<164, now: 1)
        for gfn in 100..<164 { guest.setState(gfn, ModelGuest.claimed) }
        bench.map.openClaim(5, 300..<364, now: 1)
        for gfn in 300..<310 { guest.setState(gfn, ModelGuest.claimed) }
        guest.setState(310, ModelGuest.inUse)
        guest.setState(311, 5)
        guest.setState(312, ModelGuest.recycled)
        bench.map.openClaim(15, 4090..<4154, now: 1)
        for gfn in 4100..<4154 { guest.setState(gfn, ModelGuest.claimed) }
        // A byte that is CLAIMED and in no journal is nobody's: not touched by the recovery.
        guest.setState(500, ModelGuest.claimed)
        let untouched = [310, 311, 312, 313, 363, 4090, 4099, 500, 99, 164]
        let states = untouched.map { guest.state($0) }

        bench.start(guest, nonce: 0xabc)
        for gfn in Array(100..<164) + Array(300..<310) + Array(4100..<4154) {
            #expect(guest.state(gfn) == ModelGuest.recycled && !guest.isResident(gfn), "\(gfn)")
            #expect(bench.map.state(of: UInt64(gfn)) == .hole)
        }
        for (gfn, state) in zip(untouched, states) {
            #expect(guest.state(gfn) == state && guest.page(gfn) == [UInt8](repeating: UInt8(gfn % 251 + 1), count: 4096))
        }
        #expect(bench.map.openClaims.isEmpty && bench.map.recycledTotal == 128)
    }

    /// Another nonce: another kernel may run in that memory. Not one byte is written, and all is forgotten.
    @Test func anotherGuestsMemoryIsNotTouched() throws {
        let guest = try ModelGuest(pages: 2 * 4096)
        let bench = try Bench(period: 10)
        for gfn in guest.usable { guest.fill(gfn) }
        bench.map.registration = .init(nonce: 0xabc, headerAddress: guest.headerAddress)
        bench.map.openClaim(0, 100..<164, now: 1)
        for gfn in 100..<164 { guest.setState(gfn, ModelGuest.claimed) }
        for gfn in 200..<2000 { guest.freeLongAgo(gfn) }
        let before = guest.snapshot(), resident = guest.residentPages
        bench.start(guest, nonce: 0xabd)
        usleep(100_000)
        #expect(guest.snapshot() == before && guest.residentPages == resident)
        #expect(bench.map.registration == nil && bench.map.openClaims.isEmpty)
        #expect(bench.engine.snapshot.phase == .idle)
        // Also when the old nonce should come back.
        bench.engine.stop()
        bench.start(guest, nonce: 0xabc)
        usleep(50_000)
        #expect(guest.snapshot() == before)
    }

    /// The same nonce, but the table has gone bad meanwhile: refused with a reason, memory untouched.
    @Test func badTableOfTheSameGuestIsRefused() throws {
        let guest = try ModelGuest(pages: 2048)
        let bench = try Bench(period: 10)
        bench.map.registration = .init(nonce: 3, headerAddress: guest.headerAddress)
        guest.setHeader64(0, 0)
        for gfn in guest.usable { guest.freeLongAgo(gfn) }
        let before = guest.snapshot()
        bench.start(guest, nonce: 3)
        usleep(50_000)
        #expect(bench.engine.snapshot.phase == .refused && bench.engine.snapshot.reason.contains("magic"))
        #expect(guest.snapshot() == before && bench.map.registration == nil)
    }

    /// Claims of a dead process that are finished while the guest migrates: page and state byte are in the dirty log.
    @Test func finishedClaimsAreLogged() throws {
        let log = DirtyTracker()
        let guest = try ModelGuest(pages: 2048, log: log)
        let bench = try Bench(period: 10_000)
        let file = try Memfd(name: "log", byteCount: 4096).takeDescriptor()
        let bits = try Mapping(file, byteCount: 4096)
        log.setLog(try DirtyLog(file, offset: 0, byteCount: 4096, owner: .us))
        log.setEnabled(true)
        bench.engine.setPaused(.dirtyLogging, true)
        bench.map.registration = .init(nonce: 3, headerAddress: guest.headerAddress)
        bench.map.openClaim(0, 800..<802, now: 1)
        for gfn in 800..<802 { guest.setState(gfn, ModelGuest.claimed) }
        bench.start(guest, nonce: 3)
        usleep(30_000)
        var dirty = Set<Int>()
        for (index, byte) in bits.copyOut(0, count: 4096).enumerated() {
            for bit in 0..<8 where byte & 1 << UInt8(bit) != 0 { dirty.insert(index * 8 + bit) }
        }
        #expect(dirty == [800, 801, guest.tableGFN(0)])
        #expect(guest.state(800) == ModelGuest.recycled && guest.state(801) == ModelGuest.recycled)
    }

    // MARK: - Pausing, epochs, periods

    @Test(arguments: [RecycleEngine.Pause.dirtyLogging, .unsupervised]) func pausedEngineWritesNothing(_ pause: RecycleEngine.Pause) throws {
        let guest = try ModelGuest(pages: 2048)
        let bench = try Bench(period: 10)
        try bench.run(guest)
        guest.free(200)
        #expect(eventually { guest.state(200) == ModelGuest.recycled })
        bench.engine.setPaused(pause, true)
        for gfn in guest.usable { guest.fill(gfn); guest.freeLongAgo(gfn) }
        let before = guest.snapshot(), epoch = guest.epoch
        usleep(100_000)
        #expect(guest.snapshot() == before && guest.epoch == epoch)
        #expect(bench.engine.snapshot.phase == .paused && bench.engine.snapshot.reason.hasPrefix("paused"))
        // Both reasons: one that ends does not end the other.
        bench.engine.setPaused([.dirtyLogging, .unsupervised], true)
        bench.engine.setPaused(pause, false)
        usleep(50_000)
        #expect(guest.snapshot() == before)
        bench.engine.setPaused([.dirtyLogging, .unsupervised], false)
        #expect(eventually { guest.usable.allSatisfy { guest.state($0) == ModelGuest.recycled } })
        #expect(bench.engine.snapshot.phase == .active && guest.epoch != epoch)
    }

    /// What nobody tells is looked for before each pass: a device that takes all of memory is plugged, and goes.
    @Test func whatIsFoundPauses() throws {
        let guest = try ModelGuest(pages: 2048)
        let bench = try Bench(period: 10)
        let found = Mutex(RecycleEngine.Pause())
        bench.engine.setLook { _ in found.withLock { $0 } }
        try bench.run(guest)
        guest.free(200)
        #expect(eventually { guest.state(200) == ModelGuest.recycled })
        found.withLock { $0 = .assigned }
        #expect(eventually { bench.engine.snapshot.phase == .paused })
        #expect(bench.engine.snapshot.reason.contains("VFIO"))
        for gfn in guest.usable { guest.fill(gfn); guest.freeLongAgo(gfn) }
        usleep(100_000)
        #expect(guest.usable.allSatisfy { guest.state($0) != ModelGuest.recycled && guest.page($0)[0] == 0x5a })
        found.withLock { $0 = [] }
        #expect(eventually { guest.usable.allSatisfy { guest.state($0) == ModelGuest.recycled } })
        #expect(bench.engine.snapshot.phase == .active && bench.engine.snapshot.reason.isEmpty)
    }

    @Test func epochsWrapAndGoOnWhereTheyWere() throws {
        let guest = try ModelGuest(pages: 2048)
        let bench = try Bench(period: 10)
        try bench.run(guest)
        #expect(guest.publishedPeriod == 10 || eventually { guest.publishedPeriod == 10 })
        var seen = Set<UInt8>()
        #expect(
            eventually {
                for _ in 0..<20 {
                    seen.insert(guest.epoch)
                    usleep(500)
                }
                return guest.ticks > 600
            })
        #expect(seen.allSatisfy { $0 >= ModelGuest.firstEpoch && $0 <= ModelGuest.lastEpoch })
        #expect(seen.count > 100)
        guest.free(300)
        #expect(eventually { guest.state(300) == ModelGuest.recycled })
        // A new back end begins at the guest's epoch: a mark that was made meanwhile keeps its age.
        bench.engine.stop()
        guest.setEpoch(77)
        let slow = try Bench(period: 10_000)
        try slow.run(guest)
        #expect(eventually { guest.epoch == 78 })
    }

    /// A page is not recycled before its period, whatever the epoch.
    @Test func youngPagesStay() throws {
        let guest = try ModelGuest(pages: 2048)
        let bench = try Bench(period: 2000)
        try bench.run(guest)
        #expect(eventually { guest.ticks > 0 })
        let freed = monotonicNanoseconds()
        for gfn in 500..<600 { guest.free(gfn) }
        var early = 0
        #expect(
            eventually {
                let now = monotonicNanoseconds()
                let gone = (500..<600).count { guest.state($0) == ModelGuest.recycled }
                if gone > 0 && now - freed < 1_990_000_000 { early += 1 }
                return gone == 100
            })
        #expect(early == 0)
        // Counted at the end of the pass.
        #expect(eventually { bench.engine.snapshot.recycledPages == 100 })
    }

    @Test func periodAndWorkersAreChecked() throws {
        for period in [UInt32(0), 9, 86_400_001, .max] {
            #expect(throws: QuireError.self) { try RecycleEngine.Configuration(periodMilliseconds: period) }
        }
        for workers in [0, 17, -1] {
            #expect(throws: QuireError.self) { try RecycleEngine.Configuration(workers: workers) }
        }
        // The longest period ends, too.
        let bench = try Bench(period: 86_400_000, workers: 16)
        let guest = try ModelGuest(pages: 2048)
        try bench.run(guest)
        bench.engine.stop()
    }

    // MARK: - Memory that others touch

    /// Recycled pages that something other than the guest's allocator filled are found and punched again, and only they.
    @Test func refilledPagesArePunchedAgain() throws {
        let guest = try ModelGuest(pages: 2048)
        let bench = try Bench(period: 10)
        try bench.run(guest)
        for gfn in 100..<600 { guest.fill(gfn); guest.free(gfn) }
        #expect(eventually { (100..<600).allSatisfy { guest.state($0) == ModelGuest.recycled } })
        let holes = guest.residentPages
        for gfn in [100, 233, 599] { guest.fill(gfn) }
        #expect(guest.residentPages == holes + 3)
        #expect(eventually { guest.residentPages == holes })
        #expect(eventually { bench.engine.snapshot.refilledPages > 0 })
        #expect(bench.engine.snapshot.refilledPages == 3)
        #expect((100..<600).allSatisfy { guest.state($0) == ModelGuest.recycled })
        // Taken back and used: not refilled, in use.
        _ = guest.allocate(233)
        guest.fill(233)
        for gfn in [101, 400] { guest.fill(gfn) }
        #expect(eventually { guest.residentPages == holes + 1 })
        #expect(guest.page(233).allSatisfy { $0 == 0x5a })
        #expect(eventually { bench.engine.snapshot.recycledNowPages == 499 })
        #expect(bench.map.state(of: 233) == .private && bench.map.state(of: 234) == .hole)
    }

    @Test func foreignClaimDropsTheTable() throws {
        let guest = try ModelGuest(pages: 2 * 4096)
        let bench = try Bench(period: 10)
        try bench.run(guest)
        guest.setState(5000, ModelGuest.claimed)
        #expect(eventually { bench.engine.snapshot.phase == .refused })
        #expect(bench.engine.snapshot.reason.contains("5000") && bench.engine.snapshot.reason.contains("dropped"))
        for gfn in guest.usable where gfn != 5000 { guest.fill(gfn); guest.freeLongAgo(gfn) }
        let before = guest.snapshot()
        usleep(60_000)
        #expect(guest.snapshot() == before && bench.map.registration == nil)
        // The guest may register anew.
        guest.setState(5000, ModelGuest.inUse)
        try bench.engine.register(headerAddress: guest.headerAddress)
        #expect(eventually { guest.state(100) == ModelGuest.recycled })
    }

    /// The table reaches behind RAM, and the guest marks pages that are not there.
    @Test func marksOutsideOfRAMAreIgnored() throws {
        let guest = try ModelGuest(pages: 4096 + 100)
        let bench = try Bench(period: 10)
        try bench.run(guest)
        for gfn in 4096..<8192 { guest.freeLongAgo(gfn) }
        #expect(eventually { (4096..<4196).allSatisfy { guest.state($0) == ModelGuest.recycled } })
        usleep(50_000)
        #expect((4196..<8192).allSatisfy { guest.state($0) != ModelGuest.recycled && guest.state($0) != ModelGuest.claimed })
        #expect(bench.engine.snapshot.phase == .active && bench.engine.snapshot.recycledNowPages == 100)
    }

    /// RAM in a file on a disk is not ours to punch.
    @Test func onlyMemoryFilesArePunched() throws {
        let path = "/tmp/quire-unit-\(getpid())-ram"
        let file = try Descriptor.open(path, O_RDWR | O_CREAT | O_TRUNC)
        defer { Files.remove(path) }
        guard try Memfd.kind(of: file.raw) == .other else { return }
        try file.truncate(to: 1 << 20)
        let high = UInt64(2048) * 4096
        let guest = try ModelGuest(pages: 2048)
        let mapping = try Mapping(file, byteCount: 1 << 20)
        mapping.copyIn(0, [UInt8](repeating: 0x77, count: 1 << 20))
        let memory = try GuestMemory(
            guest.memory.regions + [
                try MemoryRegion(
                    guestAddress: high, byteCount: 1 << 20, userAddress: 0x7f80_0000_0000, fileOffset: 0,
                    descriptor: file.duplicate(), owner: .us)
            ], log: guest.memory.log)
        let bench = try Bench(period: 10)
        bench.engine.start(memory: memory, rings: [], nonce: 1)
        try bench.engine.register(headerAddress: guest.headerAddress)
        for gfn in 2000..<2304 { guest.freeLongAgo(gfn) }
        #expect(eventually { (2000..<2048).allSatisfy { guest.state($0) == ModelGuest.recycled } })
        usleep(50_000)
        #expect((2048..<2304).allSatisfy { guest.state($0) < ModelGuest.claimed && guest.state($0) > 0 })
        #expect(mapping.copyOut(0, count: 1 << 20).allSatisfy { $0 == 0x77 })
    }

    /// Several regions in one file, at offsets, above a hole: each page goes where it lies in the file.
    @Test func regionsAtOffsets() throws {
        let guest = try ModelGuest(pages: 2048)
        let file = try Memfd(name: "parts", byteCount: 512 * 4096).takeDescriptor()
        let mapping = try Mapping(file, byteCount: 512 * 4096)
        for page in 0..<512 { mapping.copyIn(page * 4096, [UInt8](repeating: UInt8(page % 251 + 1), count: 4096)) }
        func part(_ gfn: UInt64, _ offset: UInt64, _ pages: UInt64) throws -> MemoryRegion {
            try MemoryRegion(
                guestAddress: gfn * 4096, byteCount: pages * 4096, userAddress: 0x7f90_0000_0000 + gfn * 4096,
                fileOffset: offset * 4096, descriptor: file.duplicate(), owner: .us)
        }
        // gfns 2048..2147 are file pages 300..399; gfns 3000..3099 are file pages 10..109.
        let memory = try GuestMemory(
            guest.memory.regions + [part(2048, 300, 100), part(3000, 10, 100)], log: guest.memory.log)
        let bench = try Bench(period: 10)
        bench.engine.start(memory: memory, rings: [], nonce: 1)
        try bench.engine.register(headerAddress: guest.headerAddress)
        for gfn in 2040..<3200 { guest.freeLongAgo(gfn) }
        #expect(eventually { guest.state(2147) == ModelGuest.recycled && guest.state(3099) == ModelGuest.recycled })
        #expect(eventually { bench.engine.snapshot.recycledNowPages == 208 })
        for page in 0..<512 {
            let isHole = !Memfd.hasData(file.raw, UInt64(page) * 4096..<UInt64(page + 1) * 4096)
            #expect(isHole == ((300..<400).contains(page) || (10..<110).contains(page)), "\(page)")
        }
    }

    @Test func statisticsAndMapFollowTheGuest() throws {
        let guest = try ModelGuest(pages: 2048)
        let bench = try Bench(period: 200)
        #expect(bench.engine.snapshot.phase == .idle)
        try bench.run(guest)
        for gfn in 100..<400 { guest.fill(gfn); guest.free(gfn) }
        #expect(eventually { bench.engine.snapshot.markedPages == 300 || bench.engine.snapshot.recycledPages == 300 })
        #expect(eventually { bench.engine.snapshot.recycledNowPages == 300 })
        for gfn in 100..<200 { #expect(guest.allocate(gfn)?.was == ModelGuest.recycled) }
        #expect(eventually { bench.engine.snapshot.recycledNowPages == 200 })
        guest.setHeader64(256, 41)
        let statistics = bench.engine.snapshot
        #expect(statistics.waits == 41 && statistics.headerAddress == guest.headerAddress && statistics.passes > 0)
        #expect(statistics.recycledPages == 300 && statistics.recycledTotalPages == 300 && statistics.refilledPages == 0)
        #expect((100..<200).allSatisfy { bench.map.state(of: UInt64($0)) == .private })
        #expect((200..<400).allSatisfy { bench.map.state(of: UInt64($0)) == .hole })
        // A new registration counts anew; the VM's total goes on.
        try bench.engine.register(headerAddress: guest.headerAddress)
        #expect(bench.engine.snapshot.recycledPages == 0 && bench.engine.snapshot.recycledTotalPages == 300)
        #expect(eventually { bench.engine.snapshot.recycledNowPages == 200 })
    }

    /// Control from several threads at once ends, and ends in order.
    @Test func controlFromManyThreads() throws {
        let guest = try ModelGuest(pages: 2 * 4096)
        let bench = try Bench(period: 10, workers: 3)
        let engine = bench.engine
        bench.start(guest)
        var threads: [JoinableThread] = []
        for number in 0..<3 {
            threads.append(
                try JoinableThread("control-\(number)") {
                    for _ in 0..<200 {
                        switch number {
                        case 0: try? engine.register(headerAddress: guest.headerAddress)
                        case 1: engine.setPaused(.dirtyLogging, true); engine.setPaused(.dirtyLogging, false)
                        default: engine.unregister()
                        }
                        _ = engine.snapshot
                    }
                })
        }
        for _ in 0..<20 {
            for gfn in 100..<2000 where guest.state(gfn) == ModelGuest.recycled { _ = guest.allocate(gfn) }
            for gfn in 100..<2000 where guest.state(gfn) == ModelGuest.inUse { guest.freeLongAgo(gfn) }
            usleep(5000)
        }
        for thread in threads { thread.join() }
        bench.engine.stop()
        #expect(!(0..<8192).contains { guest.state($0) == ModelGuest.claimed })
        #expect(bench.map.openClaims.isEmpty)
    }
}

/// A guest's registration, lie by lie.
@Suite struct StateTableTests {
    private struct Lie: Sendable {
        let name: String
        let says: String
        var header: UInt64?
        var rings: [Range<UInt64>] = []
        var tell: @Sendable (ModelGuest) -> Void = { _ in }
    }

    private static let lies: [Lie] = [
        Lie(name: "header outside of RAM", says: "outside", header: 1 << 40),
        Lie(name: "header at the end of the world", says: "outside", header: .max - 4095),
        Lie(name: "header not aligned", says: "aligned", header: 4096 + 8),
        Lie(name: "no magic", says: "magic", header: 0),
        Lie(name: "wrong version", says: "version") { $0.setHeader32(8, 2) },
        Lie(name: "no pages", says: "states") { $0.setHeader64(16, 0) },
        Lie(name: "odd pages", says: "states") { $0.setHeader64(16, 4097) },
        Lie(name: "more than the map", says: "states") { $0.setHeader64(16, 1 << 17) },
        Lie(name: "huge", says: "states") { $0.setHeader64(16, .max - 4095) },
        Lie(name: "directory not aligned", says: "aligned") { $0.setHeader64(24, 2 * 4096 + 8) },
        Lie(name: "directory outside", says: "outside") { $0.setHeader64(24, 1 << 40) },
        Lie(name: "directory at the end of the world", says: "outside") { $0.setHeader64(24, .max - 4095) },
        Lie(name: "directory is the header", says: "overlaps") { $0.setHeader64(24, 4096) },
        Lie(name: "page outside", says: "outside") { $0.setDirectory(1, 1 << 40) },
        Lie(name: "page not aligned", says: "aligned") { $0.setDirectory(1, 5 * 4096 + 1) },
        Lie(name: "page twice", says: "overlaps") { $0.setDirectory(1, UInt64($0.tableGFN(0)) * 4096) },
        Lie(name: "page is the header", says: "overlaps") { $0.setDirectory(1, 4096) },
        Lie(name: "page is the directory", says: "overlaps") { $0.setDirectory(0, 2 * 4096) },
        Lie(name: "page is a ring", says: "overlaps", rings: [3 * 4096 + 64..<3 * 4096 + 128]),
        Lie(name: "a ring that ends in a page", says: "overlaps", rings: [100 * 4096..<101 * 4096, 0..<3 * 4096 + 1]),
        Lie(name: "directory is a ring", says: "overlaps", rings: [2 * 4096..<2 * 4096 + 16]),
        Lie(name: "header is a ring", says: "overlaps", rings: [4096..<8192]),
    ]

    @Test func everyLieIsRefusedWithItsReason() throws {
        let map = try PageMap(PageMap.makeFile(pageCount: 1 << 16))
        let engine = try RecycleEngine(.init(periodMilliseconds: 10), map: map)
        defer { engine.end() }
        for lie in Self.lies {
            let guest = try ModelGuest(pages: 2 * 4096)
            lie.tell(guest)
            for gfn in guest.usable { guest.freeLongAgo(gfn) }
            let before = guest.snapshot()
            engine.start(memory: guest.memory, rings: lie.rings, nonce: 1)
            let error = #expect(throws: QuireError.self, "\(lie.name)") {
                try engine.register(headerAddress: lie.header ?? guest.headerAddress)
            }
            #expect(error?.code == .guest && error?.message.contains(lie.says) == true, "\(lie.name): \(String(describing: error))")
            #expect(engine.snapshot.phase == .refused && engine.snapshot.reason.contains(lie.says), "\(lie.name)")
            #expect(map.registration == nil && guest.snapshot() == before, "\(lie.name)")
            // An honest guest is served right after.
            let honest = try ModelGuest(pages: 2048)
            engine.stop()
            engine.start(memory: honest.memory, rings: [0..<4096], nonce: 2)
            try engine.register(headerAddress: honest.headerAddress)
            #expect(engine.snapshot.phase == .active)
            engine.stop()
        }
    }

    /// An entry of 0 says that the guest has no memory there: legal, and nothing of that block is looked at.
    @Test func directoryMayHaveHoles() throws {
        let map = try PageMap(PageMap.makeFile(pageCount: 1 << 16))
        let engine = try RecycleEngine(.init(periodMilliseconds: 10), map: map)
        defer { engine.end() }
        let guest = try ModelGuest(pages: 3 * 4096)
        let absent = guest.tableGFN(1)
        guest.setDirectory(1, 0)
        for gfn in guest.usable { guest.fill(gfn); guest.freeLongAgo(gfn) }
        let before = guest.page(absent)
        engine.start(memory: guest.memory, rings: [], nonce: 1)
        try engine.register(headerAddress: guest.headerAddress)
        #expect(eventually { guest.state(100) == ModelGuest.recycled && guest.state(3 * 4096 - 1) == ModelGuest.recycled })
        #expect(guest.page(absent) == before && (4096..<8192).allSatisfy { guest.isResident($0) })
        #expect(engine.snapshot.phase == .active)
    }

    /// A table that was fine is replaced by one that is not: the first has ended, too.
    @Test func refusalEndsAnEarlierRegistration() throws {
        let map = try PageMap(PageMap.makeFile(pageCount: 1 << 16))
        let engine = try RecycleEngine(.init(periodMilliseconds: 10), map: map)
        defer { engine.end() }
        let guest = try ModelGuest(pages: 2048)
        engine.start(memory: guest.memory, rings: [], nonce: 1)
        try engine.register(headerAddress: guest.headerAddress)
        #expect(throws: QuireError.self) { try engine.register(headerAddress: 1 << 40) }
        for gfn in guest.usable { guest.freeLongAgo(gfn) }
        let before = guest.snapshot()
        usleep(60_000)
        #expect(guest.snapshot() == before && map.registration == nil)
    }

    /// The guest changes header and directory after it has registered: the host looks at them once.
    @Test func laterChangesOfTheDirectoryLeadNowhere() throws {
        let map = try PageMap(PageMap.makeFile(pageCount: 1 << 16))
        let engine = try RecycleEngine(.init(periodMilliseconds: 10), map: map)
        defer { engine.end() }
        let guest = try ModelGuest(pages: 2 * 4096)
        engine.start(memory: guest.memory, rings: [], nonce: 1)
        try engine.register(headerAddress: guest.headerAddress)
        guest.setDirectory(0, .max - 4095)
        guest.setDirectory(1, 0)
        guest.setHeader64(16, .max)
        for gfn in 100..<200 { guest.freeLongAgo(gfn) }
        #expect(eventually { (100..<200).allSatisfy { guest.state($0) == ModelGuest.recycled } })
        #expect(engine.snapshot.phase == .active)
    }
}
