import GuestMemory
import Platform
import Synchronization

/// One pass over a state table, shared by the threads that work on it. Table pages are handed out one by one; whoever took
/// a page is the only one that claims in it. Where an agent claims, what is due is gathered over several table pages, for an
/// order to it costs as much as some claims.
final class Pass: CrewWork {
    /// Who claims for us, and what the front end sees the end of if we die.
    struct Agent: Sendable {
        let recycler: any PageRecycler
        let connection: Int32

        /// Nil if we claim ourselves.
        init?(_ recycler: (any PageRecycler)?, connection: Int32?) {
            guard let recycler, let connection, recycler.canRecycle else { return nil }
            self.recycler = recycler
            self.connection = connection
        }
    }

    /// What the agent is to be asked for: runs that hold something to recycle, and the table pages that they are of.
    private struct Gathered {
        var pages: [Int] = []
        var due: [RecycleRun] = []
        var again: [RecycleRun] = []
        /// Pages that are due. While the agent is at work on them nobody can interrupt the pass.
        var dueCount = 0
        func isFull(_ batch: Batch) -> Bool { dueCount >= batch.orderPages || due.count + again.count >= PageRun.maxRuns }
    }

    struct Result: Sendable {
        /// Per table page: pages that are recycled now.
        var holes: [Int]
        var recycled = 0
        var refilled = 0
        /// Marked, and not due yet.
        var marked = 0
        /// Age in ticks of the oldest mark that is not due.
        var oldestAge = 0
        var batch: Batch
        var failure: QuireError?
    }

    private let table: StateTable
    private let map: PageMap
    private let now: UInt8
    private let dueAge: Int
    private let findRefilled: Bool
    private let cancelled: @Sendable () -> Bool
    private let next = Atomic<Int>(0)
    private let stopped = Atomic<Bool>(false)
    private let agent: Agent?
    /// The agent has gone in the middle of the pass.
    private let isAgentGone = Atomic<Bool>(false)
    private let shared: Mutex<Result>

    init(
        table: StateTable, map: PageMap, now: UInt8, dueAge: Int, holes: [Int], findRefilled: Bool, batch: Batch,
        agent: Agent? = nil, cancelled: @escaping @Sendable () -> Bool
    ) {
        self.agent = agent
        self.table = table
        self.map = map
        self.now = now
        self.dueAge = dueAge
        self.findRefilled = findRefilled
        self.cancelled = cancelled
        shared = Mutex(Result(holes: holes, batch: batch))
    }

    var result: Result { shared.withLock { $0 } }
    var isCancelled: Bool { stopped.load(ordering: .acquiring) || cancelled() }
    var isFinished: Bool { next.load(ordering: .acquiring) >= table.pages.count }

    /// Works on table pages until none is left or the pass is cancelled. `helpWanted` is called once, when there is so much
    /// to recycle that another thread would help.
    func work(as worker: Int, helpWanted: () -> Void) {
        var asked = false
        var found = Result(holes: [], batch: shared.withLock { $0.batch })
        var gathered = Gathered()
        do throws(QuireError) {
            while !isCancelled {
                let page = next.wrappingAdd(1, ordering: .acquiringAndReleasing).oldValue
                guard page < table.pages.count else { break }
                if let agent, !isAgentGone.load(ordering: .acquiring) {
                    try gather(page, &gathered, &found)
                    if gathered.isFull(found.batch) { try order(&gathered, agent, worker, &found) }
                    continue
                }
                let holes = try look(at: page, worker, &found)
                shared.withLock { $0.holes[page] = holes }
                // Below a few thousand pages waking somebody costs more than it saves.
                if !asked, found.recycled > 2048, !isFinished {
                    asked = true
                    helpWanted()
                }
            }
            if let agent, !gathered.pages.isEmpty, !isCancelled { try order(&gathered, agent, worker, &found) }
        } catch {
            stopped.store(true, ordering: .releasing)
            shared.withLock { if $0.failure == nil { $0.failure = error } }
        }
        let mine = found
        shared.withLock {
            $0.recycled += mine.recycled
            $0.refilled += mine.refilled
            $0.marked += mine.marked
            $0.oldestAge = max($0.oldestAge, mine.oldestAge)
            $0.batch = mine.batch
        }
    }

    // MARK: - By the agent

    /// Looks for what is due in one page of the table.
    private func gather(_ page: Int, _ gathered: inout Gathered, _ found: inout Result) throws(QuireError) {
        guard let states = table.states(page), let place = table.pages[page] else { return }
        let summary = table.summarize(page)
        var due = 0, first = 0, last = 0
        var blocks = summary.marked
        while blocks != 0 {
            let block = blocks.trailingZeroBitCount * 64
            blocks &= blocks - 1
            for index in block..<block + 64 {
                let state = states.load8(index)
                if state == PageMark.claimed { throw strayClaim(page, index) }
                guard state != PageMark.inUse, state != PageMark.recycled else { continue }
                let age = age(state)
                if age < dueAge {
                    found.marked += 1
                    found.oldestAge = max(found.oldestAge, age)
                } else {
                    if due == 0 { first = index }
                    last = index
                    due += 1
                }
            }
        }
        let all = GFN(page * StateTable.statesPerPage)
        func run(_ gfns: Range<GFN>) -> RecycleRun {
            RecycleRun(gfns: gfns, states: place.guestAddress + (gfns.lowerBound - all))
        }
        let before = gathered.due.count + gathered.again.count
        if due > 0 {
            let gfns = all + GFN(first)..<all + GFN(last) + 1
            for region in table.memory.regions where region.kind == .shmem && region.gfns.overlaps(gfns) {
                gathered.due.append(run(region.gfns.clamped(to: gfns)))
            }
            gathered.dueCount += due
        }
        if findRefilled, summary.recycled > 0 {
            forEachFilled(page) { gfns in
                if gfns.contains(where: { states.load8(Int($0 - all)) == PageMark.recycled }) {
                    gathered.again.append(run(gfns))
                }
                return !isCancelled
            }
        }
        if gathered.due.count + gathered.again.count > before || summary.recycled != shared.withLock({ $0.holes[page] }) {
            gathered.pages.append(page)
        }
    }

    /// Has the agent recycle what was gathered, and brings the page map in line.
    private func order(_ gathered: inout Gathered, _ agent: Agent, _ worker: Int, _ found: inout Result) throws(QuireError) {
        defer { gathered = Gathered() }
        var isOurs = false
        func ask(_ runs: [RecycleRun], _ kind: RecycleOrder.Kind) throws(QuireError) -> Int {
            guard !runs.isEmpty, !isOurs else { return 0 }
            let order = RecycleOrder(kind, now: now, claimPages: found.batch.pages, connection: agent.connection)
            let merged = runs.map { map.mergedCounts($0.gfns) }
            let started = monotonicNanoseconds()
            let outcomes: [MoveOutcome]
            do throws(QuireError) { outcomes = try agent.recycler.recycle(runs, order) } catch {
                if error.code == .busy { found.oldestAge = dueAge } else { isOurs = true }
                return 0
            }
            let done = outcomes.reduce(0) { $0 + $1.done }
            found.batch.adaptOrder(nanoseconds: monotonicNanoseconds() - started, full: done >= found.batch.orderPages)
            map.addRecycled(done)
            for (run, before) in zip(runs, merged) where before != MergedCount() {
                map.noteRecycledMerged(before - map.mergedCounts(run.gfns))
            }
            found.batch.adapt(nanoseconds: 0, full: true, waits: table.waits)
            for outcome in outcomes {
                if case .failed(let errno) = outcome.reason {
                    throw QuireError(.system, "the agent in QEMU cannot give pages back: error \(errno)")
                }
                // It knows other memory than we do.
                if outcome.reason == .invalid { isOurs = true }
            }
            return done
        }
        // In this order: what is recycled now lies among what had memory when it was looked for.
        found.refilled += try ask(gathered.again, .again)
        found.recycled += try ask(gathered.due, .due(age: dueAge))
        if isOurs { isAgentGone.store(true, ordering: .releasing) }
        for page in gathered.pages {
            guard let states = table.states(page) else { continue }
            let holes = isOurs ? try look(at: page, worker, &found) : synchronizeMap(page, states)
            shared.withLock { $0.holes[page] = holes }
        }
    }

    private func strayClaim(_ page: Int, _ index: Int) -> QuireError {
        QuireError(
            .guest, "the guest's table has a claim that nobody made, at page \(page * StateTable.statesPerPage + index)")
    }

    // MARK: - By ourselves

    /// Age in ticks of a mark, 0 for one of this tick.
    @inline(__always) private func age(_ mark: UInt8) -> Int {
        let difference = Int(now) - Int(mark)
        return difference >= 0 ? difference : difference + PageMark.epochs
    }

    /// Recycles what is due in one page of the table; returns how many of its pages are recycled now.
    private func look(at page: Int, _ worker: Int, _ found: inout Result) throws(QuireError) -> Int {
        guard let states = table.states(page) else { return 0 }
        let summary = table.summarize(page)
        let before = shared.withLock { $0.holes[page] }
        var recycledHere = 0
        var blocks = summary.marked
        while blocks != 0 {
            if isCancelled { break }
            let first = blocks.trailingZeroBitCount * 64
            blocks &= blocks - 1
            var index = first
            while index < first + 64 {
                let state = states.load8(index)
                switch state {
                case PageMark.inUse, PageMark.recycled:
                    index += 1
                case PageMark.claimed: throw strayClaim(page, index)
                default:
                    let age = age(state)
                    if age < dueAge {
                        found.marked += 1
                        found.oldestAge = max(found.oldestAge, age)
                        index += 1
                    } else {
                        // A run may go on into the next blocks; they find it RECYCLED.
                        let done = try recycleRun(page, states, from: index, to: StateTable.statesPerPage, worker, &found.batch) {
                            mark in
                            mark >= PageMark.firstEpoch && mark <= PageMark.lastEpoch && self.age(mark) >= self.dueAge
                        }
                        recycledHere += done
                        found.recycled += done
                        // Zero: the guest took it, or it is merged, or there is no RAM of ours there.
                        index += max(done, 1)
                    }
                }
            }
        }
        if findRefilled, summary.recycled > 0 { try punchRefilled(page, states, worker, &found) }
        if recycledHere == 0, summary.recycled == before { return before }
        return synchronizeMap(page, states)
    }

    /// Claims a run of pages whose state `isWanted`, from `index` on and before `end`, within one batch and one region;
    /// punches it.
    /// Returns the pages recycled; 0 if the first one could not be claimed, or is merged.
    private func recycleRun(
        _ page: Int, _ states: MappedBytes, from index: Int, to end: Int, _ worker: Int, _ batch: inout Batch,
        _ isWanted: (UInt8) -> Bool
    ) throws(QuireError) -> Int {
        let first = GFN(page * StateTable.statesPerPage + index)
        guard let region = table.memory.region(of: first), region.kind == .shmem else { return 0 }
        var room = min(batch.pages, end - index, Int(region.gfns.upperBound - first))
        // Before the claim, for a guest waits while there is one. A page that the agent is moving now is for the next pass.
        let wanted = first..<first + UInt64(room)
        do throws(QuireError) { try map.beginIO(wanted, patience: 5_000_000) } catch { return 0 }
        defer { map.endIO(wanted) }
        let (alike, isMerged) = try map.alike(wanted)
        if isMerged { return 0 }
        room = min(room, alike)
        let started = monotonicNanoseconds()
        map.openClaim(worker, first..<first + UInt64(room), now: started)
        var count = 0
        while count < room {
            let state = states.load8(index + count)
            guard isWanted(state), states.compareExchange8(index + count, expected: state, desired: PageMark.claimed)
            else { break }
            count += 1
        }
        guard count > 0 else {
            map.closeClaim(worker)
            return 0
        }
        let gfns = first..<first + UInt64(count)
        do throws(QuireError) {
            try Memfd.punch(
                region.descriptor.raw, offset: region.fileOffset + (first * pageBytes - region.guestAddress),
                byteCount: UInt64(count) * pageBytes)
        } catch {
            // Not discarded, so not RECYCLED: free, as before.
            for offset in 0..<count { states.store8(index + offset, now) }
            map.closeClaim(worker)
            throw error
        }
        for gfn in gfns where !map.move(gfn, from: .private, to: .hole) { map.move(gfn, from: .hole, to: .hole) }
        for offset in 0..<count { states.store8(index + offset, PageMark.recycled) }
        map.closeClaim(worker)
        map.addRecycled(count)
        batch.adapt(nanoseconds: monotonicNanoseconds() - started, full: count == room, waits: table.waits)
        return count
    }

    /// Recycled pages of one table page that have memory again, though the guest did not take them: punched once more.
    private func punchRefilled(_ page: Int, _ states: MappedBytes, _ worker: Int, _ found: inout Result) throws(QuireError) {
        let first = GFN(page * StateTable.statesPerPage)
        try forEachFilled(page) { (gfns) throws(QuireError) in
            var gfn = gfns.lowerBound
            while gfn < gfns.upperBound {
                if isCancelled { return false }
                let index = Int(gfn - first)
                guard states.load8(index) == PageMark.recycled else {
                    gfn += 1
                    continue
                }
                // No further than the data: its neighbours are holes already, and a claim makes a guest wait.
                let done = try recycleRun(
                    page, states, from: index, to: Int(gfns.upperBound - first), worker, &found.batch
                ) { $0 == PageMark.recycled }
                found.refilled += done
                gfn += GFN(max(done, 1))
            }
            return !isCancelled
        }
    }

    /// Calls `body` with the pages of one table page that have memory, in runs, until it says that this is enough.
    private func forEachFilled<E: Error>(_ page: Int, _ body: (Range<GFN>) throws(E) -> Bool) throws(E) {
        let first = GFN(page * StateTable.statesPerPage)
        let all = first..<first + GFN(StateTable.statesPerPage)
        for region in table.memory.regions where region.kind == .shmem && region.gfns.overlaps(all) {
            let gfns = region.gfns.clamped(to: all)
            func offset(_ gfn: GFN) -> UInt64 { region.fileOffset + (gfn * pageBytes - region.guestAddress) }
            let end = offset(gfns.upperBound)
            var position = offset(gfns.lowerBound)
            while let data = Memfd.nextData(region.descriptor.raw, from: position, to: end) {
                let low = (data.lowerBound - region.fileOffset + region.guestAddress) / pageBytes
                let high = (data.upperBound - region.fileOffset + region.guestAddress + pageBytes - 1) / pageBytes
                guard try body(low..<high) else { return }
                position = data.upperBound
            }
        }
    }

    /// Brings the page map's entries of one table page in line with the states; returns how many are holes.
    private func synchronizeMap(_ page: Int, _ states: MappedBytes) -> Int {
        var holes = 0
        let first = GFN(page * StateTable.statesPerPage)
        for index in 0..<StateTable.statesPerPage {
            if states.load8(index) == PageMark.recycled {
                // A RECYCLED that we did not store is the guest's own word; the map records only what we did.
                holes += 1
            } else if map.state(of: first + GFN(index)) == .hole {
                map.move(first + GFN(index), from: .hole, to: .private)
            }
        }
        return holes
    }
}
