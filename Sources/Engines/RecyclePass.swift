import GuestMemory
import Platform
import Synchronization

/// One pass over a state table, shared by the threads that work on it. Table pages are handed out one by one; whoever took
/// a page is the only one that claims in it.
final class Pass: CrewWork {
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
    private let shared: Mutex<Result>

    init(
        table: StateTable, map: PageMap, now: UInt8, dueAge: Int, holes: [Int], findRefilled: Bool, batch: Batch,
        cancelled: @escaping @Sendable () -> Bool
    ) {
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
        var batch = shared.withLock { $0.batch }
        var recycledByMe = 0
        while !isCancelled {
            let page = next.wrappingAdd(1, ordering: .acquiringAndReleasing).oldValue
            guard page < table.pages.count else { break }
            var found = Result(holes: [], batch: batch)
            do throws(QuireError) {
                let holes = try look(at: page, worker, &found)
                shared.withLock {
                    $0.holes[page] = holes
                    $0.recycled += found.recycled
                    $0.refilled += found.refilled
                    $0.marked += found.marked
                    $0.oldestAge = max($0.oldestAge, found.oldestAge)
                }
            } catch {
                stopped.store(true, ordering: .releasing)
                shared.withLock { if $0.failure == nil { $0.failure = error } }
            }
            batch = found.batch
            recycledByMe += found.recycled
            // Below a few thousand pages waking somebody costs more than it saves.
            if !asked, recycledByMe > 2048, !isFinished {
                asked = true
                helpWanted()
            }
        }
        let final = batch
        shared.withLock { $0.batch = final }
    }

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
                case PageMark.claimed:
                    throw QuireError(
                        .guest, "the guest's table has a claim that nobody made, at page "
                            + "\(page * StateTable.statesPerPage + index)")
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
        let all = first..<first + GFN(StateTable.statesPerPage)
        for region in table.memory.regions where region.kind == .shmem && region.gfns.overlaps(all) {
            let gfns = region.gfns.clamped(to: all)
            func offset(_ gfn: GFN) -> UInt64 { region.fileOffset + (gfn * pageBytes - region.guestAddress) }
            let end = offset(gfns.upperBound)
            var position = offset(gfns.lowerBound)
            while !isCancelled, let data = Memfd.nextData(region.descriptor.raw, from: position, to: end) {
                let low = (data.lowerBound - region.fileOffset + region.guestAddress) / pageBytes
                let high = (data.upperBound - region.fileOffset + region.guestAddress + pageBytes - 1) / pageBytes
                var gfn = low
                while gfn < high {
                    if isCancelled { return }
                    let index = Int(gfn - first)
                    guard states.load8(index) == PageMark.recycled else {
                        gfn += 1
                        continue
                    }
                    // No further than the data: its neighbours are holes already, and a claim makes a guest wait.
                    let done = try recycleRun(page, states, from: index, to: Int(high - first), worker, &found.batch) {
                        $0 == PageMark.recycled
                    }
                    found.refilled += done
                    gfn += GFN(max(done, 1))
                }
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
