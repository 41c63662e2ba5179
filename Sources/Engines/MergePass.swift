import CQuireLayout
import GuestMemory
import PageContent
import Platform
import Synchronization

/// The part of a pass that reads: pages that are quiet are hashed, looked up, and merged. Shared by the threads that work
/// on it; batches are handed out one by one.
final class MergePass: CrewWork {
    struct Result {
        var regions: [QuietPages]
        /// Of the region that batches are taken from now.
        var region = 0
        var position: GFN = 0
        var hashed = 0
        /// Pages.
        var merged = 0
        var zeroed = 0
        var runs = 0
        /// Pages that the store counts as ours.
        var held: [Range<GFN>] = []
        /// Left alone because mappings are scarce.
        var short: [Range<GFN>] = []
        /// Not looked up, for want of a store.
        var missed: [Range<GFN>] = []
        var huge: HugePages
        /// Why merging came to an end before the pages did.
        var stopped: String?
        var failure: QuireError?
    }

    /// Pages of a batch: what one look-up takes.
    private static let batchPages = 1024
    /// Of these a batch reads at once: few enough that they are still in the cache when they are hashed.
    private static let readPages = 16

    private let memory: GuestMemory
    private let tracker: WriteTracker?
    private let pages: MergedPages
    private let merger: any PageMerger
    private let store: any ContentStore
    /// Whether the store can be asked for equals; otherwise nothing but zeros is merged.
    private let looksUp: Bool
    private let hasher: PageHasher
    private let shortestRun: Int
    private let cancelled: @Sendable () -> Bool
    private let shared: Mutex<Result>

    init(
        _ regions: [QuietPages], _ huge: HugePages, memory: GuestMemory, tracker: WriteTracker?, pages: MergedPages, merger: any PageMerger,
        store: any ContentStore, hasher: PageHasher?, shortestRun: Int, cancelled: @escaping @Sendable () -> Bool
    ) {
        self.memory = memory
        self.tracker = tracker
        self.pages = pages
        self.merger = merger
        self.store = store
        looksUp = hasher != nil
        self.hasher = hasher ?? DedupEngine.zerosHasher
        self.shortestRun = shortestRun
        self.cancelled = cancelled
        shared = Mutex(Result(regions: regions, position: regions.first?.gfns.lowerBound ?? 0, huge: huge))
    }

    var result: Result { shared.withLock { $0 } }

    func work(as worker: Int, helpWanted: () -> Void) {
        guard let buffer = try? Mapping(anonymousByteCount: Self.readPages * Int(pageBytes)) else { return }
        var batches = 0
        while !cancelled(), let batch = takeBatch() {
            batches += 1
            if batches == 2 { helpWanted() }
            if let shortage = store.shortage(zeroPages: nil) {
                shared.withLock {
                    $0.stopped = shortage
                    for gfns in batch { $0.noteRipe(gfns) }
                }
                return
            }
            do throws(QuireError) { try deal(with: batch, hasher, buffer) } catch {
                shared.withLock {
                    if $0.failure == nil { $0.failure = error }
                    for gfns in batch { $0.noteRipe(gfns) }
                }
            }
        }
    }

    private func takeBatch() -> [Range<GFN>]? {
        shared.withLock { state in
            guard state.failure == nil, state.stopped == nil else { return nil }
            while state.region < state.regions.count {
                let runs = state.regions[state.region].takeRipe(Self.batchPages, from: &state.position)
                if !runs.isEmpty { return runs }
                state.region += 1
                if state.region < state.regions.count {
                    state.position = state.regions[state.region].gfns.lowerBound
                }
            }
            return nil
        }
    }

    private func deal(with batch: [Range<GFN>], _ hasher: PageHasher, _ buffer: borrowing Mapping) throws(QuireError) {
        var zeros: [Range<GFN>] = []
        var runs: [Range<GFN>] = []
        var hashes: [PageHash] = []
        var hashed = 0
        // Recycled, and in use again already: they become `private` when the recycle engine sees it, and nobody writes them
        // only to be seen by us.
        let isRecycling = pages.map.registration != nil
        var early: [Range<GFN>] = []
        let kept = pages.unmergeable.pages(in: batch)
        for range in batch {
            guard let region = memory.region(of: range.lowerBound) else { continue }
            for start in stride(from: range.lowerBound, to: range.upperBound, by: Self.readPages) {
                let part = start..<min(range.upperBound, start + UInt64(Self.readPages))
                // By read: through a mapping, what is not there would be made. Less comes where the file was cut off.
                let bytes = buffer.read(
                    region.descriptor.raw, at: region.fileOffset(of: part.lowerBound), to: 0,
                    count: part.count * Int(pageBytes))
                guard bytes == part.count * Int(pageBytes) else { continue }
                for (index, gfn) in part.enumerated() where !kept.contains(gfn) {
                    switch pages.map.state(of: gfn) {
                    case .private: break
                    case .hole where region.hasData(gfn):
                        if isRecycling { early.append(page: gfn) }
                        // Recycled before its module left: nobody else will see that it is in use again. (And if one registers just
                        // now and it is recycled anew: `private` is true of a page without data, too.)
                        guard !isRecycling, pages.map.move(gfn, from: .hole, to: .private) else { continue }
                    default: continue
                    }
                    let hash = hasher.hash(buffer, at: index * Int(pageBytes))
                    hashed += 1
                    if hash == hasher.zero {
                        // What is not there costs nothing already, and its mapping would.
                        if region.hasData(gfn) { zeros.append(page: gfn) }
                    } else {
                        runs.append(page: gfn)
                        hashes.append(hash)
                    }
                }
            }
        }
        shared.withLock { state in
            state.hashed += hashed
            if !looksUp { state.missed += runs }
            for gfns in early { state.noteRipe(gfns) }
        }
        var slots: [SlotRun] = []
        var failure: QuireError?
        if looksUp, !runs.isEmpty {
            // Zeros need no store.
            do throws(QuireError) { slots = try store.lookUp(runs, hashes) } catch { failure = error }
        }
        let held = leaveWhole(zeros + slots.map(\.gfns))
        // Whatever happens here, the store has to hear what became of its slots.
        do throws(QuireError) { try mergeZeros(zeros.without(held)) } catch { failure = failure ?? error }
        if !slots.isEmpty { try mergeEqual(slots, except: held, store) }
        if let failure { throw failure }
    }

    private func mergeEqual(_ slots: [SlotRun], except held: GFNSet, _ store: any ContentStore) throws(QuireError) {
        let merged = try Merging.merge(
            slots, except: held, merger: merger, store: store, shortestRun: shortestRun, cancelled: cancelled)
        shared.withLock { state in
            state.merged += merged.pages
            state.runs += merged.merged.count
            state.held += merged.merged
            state.short += merged.short
            state.stopped = state.stopped ?? merged.stopped
            for gfns in merged.again { state.noteRipe(gfns) }
            for gfns in merged.changed { state.noteWritten(gfns) }
        }
    }

    /// Which of these are left where they are, for the huge pages' sake.
    private func leaveWhole(_ candidates: [Range<GFN>]) -> GFNSet {
        guard let tracker, !candidates.isEmpty else { return GFNSet() }
        return shared.withLock { state in
            let (held, again) = state.huge.hold(candidates, memory, tracker, pages.map)
            for gfns in again { state.noteRipe(gfns) }
            return held
        }
    }

    private func mergeZeros(_ zeros: [Range<GFN>]) throws(QuireError) {
        let worthIt = zeros.filter { $0.count >= shortestRun }
        var merged = Merging.Result()
        merged.short = zeros.filter { $0.count < shortestRun }
        try merged.inParts(worthIt, { $0 }, cancelled) { (some) throws(QuireError) in
            try merger.zero(some, until: Merging.deadline)
        }
        shared.withLock { state in
            state.zeroed += merged.pages
            state.short += merged.short
            state.runs += merged.merged.count
            state.stopped = state.stopped ?? merged.stopped
            for gfns in merged.again { state.noteRipe(gfns) }
            for gfns in merged.changed { state.noteWritten(gfns) }
        }
    }
}

extension MergePass.Result {
    mutating func noteRipe(_ gfns: Range<GFN>) { for index in regions.indices { regions[index].noteRipe(gfns) } }
    mutating func noteWritten(_ gfns: Range<GFN>) {
        for index in regions.indices { regions[index].noteWritten(gfns) }
        huge.noteWritten(gfns)
    }
}

extension HugePages {
    /// The same for the pages of a guest.
    mutating func hold(
        _ candidates: [Range<GFN>], _ memory: GuestMemory, _ tracker: WriteTracker, _ map: PageMap
    ) -> (held: GFNSet, again: [Range<GFN>]) {
        hold(candidates) { gfn in
            guard let region = memory.region(of: gfn) else { return nil }
            let first = Int64(gfn) - Int64(region.fileOffset(of: gfn) / pageBytes % Self.pages)
            guard first >= Int64(region.gfns.lowerBound), UInt64(first) + Self.pages <= region.gfns.upperBound else { return nil }
            return UInt64(first)..<UInt64(first) + Self.pages
        } isWhole: { stretch in
            guard let region = memory.region(of: stretch.lowerBound) else { return false }
            // A page that is merged has a mapping of its own, so what is around it is no huge page any more. The kernel would look at
            // each of those mappings to say the same.
            if let first = try? map.alike(stretch), first.isMerged || first.count < stretch.count { return false }
            let address = region.userAddress + (stretch.lowerBound - region.gfns.lowerBound) * pageBytes
            return tracker.hasHugePage(address..<address + Self.pages * pageBytes)
        }
    }
}

extension [Range<GFN>] {
    func without(_ pages: GFNSet) -> [Range<GFN>] {
        if pages.isEmpty { return self }
        var result: [Range<GFN>] = []
        for range in self {
            var first = range.lowerBound
            pages.forEachRun(in: range) { hole in
                if first < hole.lowerBound { result.append(first..<hole.lowerBound) }
                first = hole.upperBound
            }
            if first < range.upperBound { result.append(first..<range.upperBound) }
        }
        return result
    }
}

extension [SlotRun] {
    func without(_ pages: GFNSet) -> [SlotRun] {
        if pages.isEmpty { return self }
        return flatMap { run in
            [run.gfns].without(pages).map {
                SlotRun(gfn: $0.lowerBound, slot: run.slot + UInt32($0.lowerBound - run.gfn), pages: UInt32($0.count), store: run.store)
            }
        }
    }
}

/// Has pages merged that the store has named slots for, and tells the store what became of them.
enum Merging {
    /// When an agent that does not answer is waited for no longer: QEMU may have been stopped, and who ends us would have
    /// to wait, too.
    static var deadline: UInt64 { monotonicNanoseconds() + 1_500_000_000 }

    /// What the agent takes in one command.
    private static let runsAtOnce = Int(QUIRE_AGENT_MAX_RUNS)

    struct Result {
        /// Of all `merged`.
        var pages = 0
        var merged: [Range<GFN>] = []
        /// Not now: worth another try.
        var again: [Range<GFN>] = []
        /// Not what the store has: written meanwhile.
        var changed: [Range<GFN>] = []
        /// Too short to be worth their mappings now.
        var short: [Range<GFN>] = []
        /// Everything that was not merged.
        var left: [Range<GFN>] = []
        /// Why no more can be merged now.
        var stopped: String?

        /// Has runs dealt with, few at a time, so that whoever wants control soon has it; the rest is left for later then.
        mutating func inParts<Run>(
            _ runs: [Run], _ gfns: (Run) -> Range<GFN>, _ cancelled: () -> Bool,
            _ deal: ([Run]) throws(QuireError) -> [MoveOutcome]
        ) throws(QuireError) {
            for start in stride(from: 0, to: runs.count, by: Merging.runsAtOnce) {
                if cancelled() {
                    left += runs[start...].map(gfns)
                    again += runs[start...].map(gfns)
                    return
                }
                let some = Array(runs[start..<min(start + Merging.runsAtOnce, runs.count)])
                for (run, outcome) in zip(some, try deal(some)) { note(gfns(run), outcome) }
            }
        }

        mutating func note(_ range: Range<GFN>, _ outcome: MoveOutcome) {
            let end = range.lowerBound + UInt64(outcome.done)
            if outcome.done > 0 {
                merged.append(range.lowerBound..<end)
                pages += outcome.done
            }
            guard end < range.upperBound else { return }
            left.append(end..<range.upperBound)
            switch outcome.reason {
            case .done, .invalid, .unmergeable, .failed: break
            case .busy: again.append(end..<range.upperBound)
            case .differs(let page), .state(let page):
                let bad = min(range.lowerBound + UInt64(page), range.upperBound - 1)
                if bad > end { again.append(end..<bad) }
                if case .differs = outcome.reason { changed.append(bad..<bad + 1) }
                if bad + 1 < range.upperBound { again.append(bad + 1..<range.upperBound) }
            case .budget:
                again.append(end..<range.upperBound)
                stopped = "QEMU has no mappings to spare (vm.max_map_count)"
            case .gateClosed:
                again.append(end..<range.upperBound)
                stopped = "the pin gate is closed"
            }
        }
    }

    /// `held`: pages that are not to be merged now.
    static func merge(
        _ slots: [SlotRun], except held: GFNSet, merger: any PageMerger, store: any ContentStore, shortestRun: Int,
        cancelled: () -> Bool
    ) throws(QuireError) -> Result {
        var result = Result()
        // Long ones first: they give most for the mappings that they cost.
        let wanted = slots.without(held)
        let worthIt = wanted.filter { Int($0.pages) >= shortestRun }.sorted { $0.pages > $1.pages }
        result.short = wanted.filter { Int($0.pages) < shortestRun }.map(\.gfns)
        result.left = result.short
        for run in slots { held.forEachRun(in: run.gfns) { result.left.append($0) } }
        let runs = worthIt.map { PageRun(gfn: $0.gfn, pages: Int($0.pages), store: UInt8($0.store), slot: UInt64($0.slot)) }
        do throws(QuireError) {
            try result.inParts(runs, \.gfns, cancelled) { (some) throws(QuireError) in
                try merger.merge(some, until: deadline)
            }
        } catch {
            // How far it came only the page map knows.
            store.lose()
            throw error
        }
        if !result.merged.isEmpty || !result.left.isEmpty {
            try store.report(merged: result.merged, released: result.left)
        }
        return result
    }
}

extension [Range<GFN>] {
    /// Adds a page to the last range, or as a new one.
    mutating func append(page gfn: GFN) {
        if let last, last.upperBound == gfn { self[count - 1] = last.lowerBound..<gfn + 1 } else { append(gfn..<gfn + 1) }
    }
}
