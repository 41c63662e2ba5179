import PageContent
import Platform
import StoreProtocol
import Synchronization

/// Slots that all stores may have together.
final class SlotBudget: Sendable {
    private let most: Atomic<Int>
    /// Below zero while more is in use than there may be.
    private let left: Atomic<Int>

    init(_ limit: Int) {
        most = Atomic(limit)
        left = Atomic(limit)
    }

    var limit: Int { most.load(ordering: .relaxed) }

    /// Takes nothing from anybody.
    func setLimit(_ limit: Int) {
        let before = most.exchange(limit, ordering: .relaxed)
        left.add(limit - before, ordering: .relaxed)
    }

    /// Takes up to `count`; returns how many.
    func take(_ count: Int) -> Int {
        var now = left.load(ordering: .relaxed)
        while true {
            let taken = min(count, max(now, 0))
            if taken == 0 { return 0 }
            let (exchanged, original) = left.weakCompareExchange(
                expected: now, desired: now - taken, ordering: .relaxed)
            if exchanged { return taken }
            now = original
        }
    }

    /// Takes what is in use already, even where that is more than there may be.
    func takeAnyway(_ count: Int) { left.subtract(count, ordering: .relaxed) }

    func give(_ count: Int) { left.add(count, ordering: .relaxed) }
}

/// What counts, for `quire status`.
final class StoreCounters: Sendable {
    let promotions = Atomic<UInt64>(0)
    let hits = Atomic<UInt64>(0)
    let stale = Atomic<UInt64>(0)
    let full = Atomic<UInt64>(0)
}

/// One share group's pages on one NUMA node: store, counts and index, all its own. No page crosses from one share into
/// another, because nothing here knows of another.
///
/// A slot's life, and what each step may rely on:
///
///     free       count 0, not in the index, no memory
///     filled     allocated to one thread, which copies a page into it and writes its hash
///     indexed    in the index, count still 0: readers find it and cannot use it
///     used       count = how many ledger entries name it. Content and hash do not change
///     dying      count 0 again, for good: `reference` never raises a 0. Out of the index, then all readers out of it
///     free       punched
///
/// A count goes from 0 to 1 once (by the thread that filled the slot) and from 1 to 0 once (by the thread that then
/// retires it). Everything between is a compare-exchange, so looking up needs no lock; `allocator` has the only one,
/// held for one walk of its tree.
final class Share: Sendable {
    let store: StoreFile
    let table: SlotTable
    private let index: ContentIndex
    private let counts: Mapping
    private let allocator: Mutex<RunAllocator>
    private let budget: SlotBudget
    private let counters: StoreCounters

    var group: String { table.group }
    var node: Int { table.node }
    var hasher: PageHasher { table.hasher }

    init(
        store: consuming Descriptor, table: consuming Descriptor, budget: SlotBudget, counters: StoreCounters
    ) throws(QuireError) {
        let table = try SlotTable(table)
        self.table = table
        self.store = try StoreFile(store, slots: table.slotLimit, node: table.node)
        counts = try Mapping(anonymousByteCount: 4 * table.slotLimit)
        counts.excludeFromDumps()
        index = try ContentIndex(table)
        allocator = Mutex(RunAllocator(limit: table.slotLimit))
        self.budget = budget
        self.counters = counters
    }

    func count(of slot: UInt32) -> UInt32 { counts.load32(4 * Int(slot)) }

    // MARK: - Finding

    /// One more reference to a slot that has at least one.
    func reference(_ slot: UInt32) -> Bool {
        while true {
            let now = count(of: slot)
            guard now > 0, now < .max else { return false }
            if counts.compareExchange32(4 * Int(slot), expected: now, desired: now + 1) { return true }
        }
    }

    /// The slot that holds this content, with a reference for the caller.
    func reference(_ hash: PageHash) -> UInt32? {
        ContentIndex.reading {
            guard let slot = index.find(hash), reference(slot) else { return nil }
            return slot
        }
    }

    /// References a slot, if its content still has this tag.
    func reference(_ slot: UInt32, tag: UInt32) -> Bool {
        guard reference(slot) else { return false }
        // Now that it is referenced its content does not change.
        if table.tag(of: slot) == tag { return true }
        release([slot])
        return false
    }

    /// The same where the content is expected in a certain slot: neighbours of equal pages tend to be equal.
    func reference(_ hash: PageHash, in slot: UInt32, after previous: UInt32) -> Bool {
        // Without memory for its hash it never had one.
        guard Int(slot) < table.slotLimit, SlotTable.areNeighbours(previous, slot), table.has(hash, for: slot),
            reference(slot)
        else { return false }
        // It may have been another slot's life when the hash was read. Now that it is referenced it does not change.
        if table.has(hash, for: slot) { return true }
        release([slot])
        return false
    }

    // MARK: - Giving back

    /// Takes one reference of each (a slot may come several times), and frees those that have none any more.
    func release(_ slots: [UInt32]) {
        var dying: [UInt32] = []
        for slot in slots where drop(slot) { dying.append(slot) }
        retire(dying)
    }

    private func drop(_ slot: UInt32) -> Bool {
        while true {
            let now = count(of: slot)
            precondition(now > 0, "a slot is released that nobody uses")
            if counts.compareExchange32(4 * Int(slot), expected: now, desired: now - 1) { return now == 1 }
        }
    }

    private func retire(_ slots: [UInt32]) {
        guard !slots.isEmpty else { return }
        for slot in slots { index.remove(slot) }
        ContentIndex.waitForReaders()
        discard(slots.map(Int.init))
    }

    /// Frees slots that are in no index.
    private func discard(_ slots: [Int]) {
        for run in Self.runs(slots.sorted()) {
            store.punch(run)
            allocator.withLock { $0.free(run) }
        }
        budget.give(slots.count)
    }

    /// Sorted numbers as ranges.
    static func runs(_ sorted: [Int]) -> [Range<Int>] {
        var runs: [Range<Int>] = []
        for number in sorted {
            if let last = runs.last, last.upperBound == number {
                runs[runs.count - 1] = last.lowerBound..<number + 1
            } else {
                runs.append(number..<number + 1)
            }
        }
        return runs
    }

    // MARK: - Promotion

    /// Pages that are copied at once, half of what a thread has to read into: few enough to stay in the cache.
    static let promotedAtOnce = 16

    /// Gives slots to pages, whose hashes the VM says are `hashes`, in runs as long as there is room for. Nothing that the VM
    /// says is believed: a page is copied, the copy is hashed again, and `areSeenAgain` compares it with the page where the
    /// same content was seen first.
    ///
    /// The copies are made in `scratch`, from its begin on, and written to the store by a system call: filling a slot
    /// through the mapping takes a page fault each, and costs twice as much.
    ///
    /// Returns a slot for each page, with a reference for the caller, or nil.
    func promote(
        _ gfns: [UInt64], _ hashes: [PageHash], from ram: GuestRAM, scratch: borrowing Mapping,
        copyHash: StoreSeams.CopyHash, areSeenAgain: (_ pages: Range<Int>) -> [Bool]
    ) -> [UInt32?] {
        var result: [UInt32?] = []
        var spare: [Int] = []
        while result.count < gfns.count {
            let wanted = budget.take(gfns.count - result.count)
            guard wanted > 0, let run = allocator.withLock({ $0.allocate(wanted) }) else {
                budget.give(wanted)
                counters.full.add(UInt64(gfns.count - result.count), ordering: .relaxed)
                break
            }
            budget.give(wanted - run.count)
            for first in stride(from: run.lowerBound, to: run.upperBound, by: Self.promotedAtOnce) {
                let slots = first..<min(first + Self.promotedAtOnce, run.upperBound)
                let pages = result.count..<result.count + slots.count
                let copied = fill(slots, gfns[pages], hashes[pages], from: ram, scratch: scratch)
                let again = areSeenAgain(pages.prefix(copied))
                for (offset, slot) in slots.enumerated() {
                    let claimed = hashes[pages.lowerBound + offset]
                    guard offset < copied, again[offset],
                        copyHash(claimed, { hasher.hash(scratch, at: StoreFile.offset(offset)) }) == claimed
                    else {
                        counters.stale.add(1, ordering: .relaxed)
                        spare.append(slot)
                        result.append(nil)
                        continue
                    }
                    result.append(publish(UInt32(slot), spare: &spare))
                }
            }
        }
        discard(spare)
        while result.count < gfns.count { result.append(nil) }
        return result
    }

    /// Copies pages into slots, neighbours at once; returns how many, the first ones. What could not be read is not written:
    /// `scratch` may hold another group's pages.
    private func fill(
        _ slots: Range<Int>, _ gfns: ArraySlice<UInt64>, _ hashes: ArraySlice<PageHash>, from ram: GuestRAM, scratch: borrowing Mapping
    ) -> Int {
        var read = 0
        for run in Self.runs(gfns.map(Int.init)) {
            let pages = ram.read(UInt64(run.lowerBound), count: run.count, into: scratch, at: StoreFile.offset(read))
            read += pages
            if pages < run.count { break }
        }
        guard read > 0, (try? table.setHashes(slots.lowerBound, hashes)) != nil else { return 0 }
        let written = scratch.write(
            store.descriptor.raw, at: UInt64(StoreFile.offset(slots.lowerBound)), from: 0, count: StoreFile.offset(read))
        return max(0, written) / StoreFile.slotBytes
    }

    /// Makes a filled slot known; or, where another thread was faster, takes that one's.
    private func publish(_ slot: UInt32, spare: inout [Int]) -> UInt32? {
        ContentIndex.reading {
            let winner = index.add(slot)
            if winner == slot {
                counts.store32(4 * Int(slot), 1)
                counters.promotions.add(1, ordering: .relaxed)
                return slot
            }
            spare.append(Int(slot))
            return reference(winner) ? winner : nil
        }
    }

    // MARK: - After quired was killed

    /// Counts one reference that a ledger has. Before anything else is asked of this object.
    func recount(_ slot: UInt32) -> Bool {
        guard slot > 0, Int(slot) < table.slotLimit else { return false }
        let now = count(of: slot)
        if now == 0 { guard allocator.withLock({ $0.take(Int(slot)) }) else { return false } }
        counts.store32(4 * Int(slot), now + 1)
        return true
    }

    /// Once every ledger is counted: fills the index, and frees what was on its way when quired was killed.
    func finishRecount() {
        var free = 1
        let slots = allocator.withLock { allocator in
            var used: [Range<Int>] = []
            while let run = allocator.nextUsed(from: used.last?.upperBound ?? 1) { used.append(run) }
            return used
        }
        for run in slots {
            if run.lowerBound > free { store.punch(free..<run.lowerBound) }
            for slot in run { _ = index.add(UInt32(slot)) }
            budget.takeAnyway(run.count)
            free = run.upperBound
        }
        if free < table.slotLimit { store.punch(free..<table.slotLimit) }
    }

    // MARK: - Figures

    func note(hits: UInt64) { if hits > 0 { counters.hits.add(hits, ordering: .relaxed) } }

    /// Slots in use.
    var usedSlots: Int { allocator.withLock { $0.used } }
    /// Work of the allocator, in nodes of its tree.
    var allocatorSteps: Int { allocator.withLock { $0.steps } }

    /// Calls `body` with the count of each slot that is used, while others go on counting.
    func forEachCount(_ body: (UInt32) -> Void) {
        for slot in 1..<UInt32(allocator.withLock { $0.bound }) {
            let now = count(of: slot)
            if now > 0 { body(now) }
        }
    }

    /// What slots cost besides their pages: index, count and table, and which of them are free.
    var indexBytes: UInt64 {
        allocator.withLock { UInt64($0.used) * (ContentIndex.bytesPerSlot + 4 + 8) + UInt64($0.byteCount) }
    }
}
