import GuestMemory
import Platform
import Synchronization

/// Pages that must not be merged: rings, state tables. A page may be held by several.
public final class UnmergeableSet: Sendable {
    private let holders = Mutex<[GFN: Int]>([:])

    public init() {}

    /// Whether any of these pages is in the set. What is decided by the answer must be decided before the next holder
    /// comes: see `MergedPages.keepPrivate`.
    public func overlaps(_ gfns: Range<GFN>) -> Bool {
        holders.withLock { holders in
            if gfns.count > holders.count { return holders.keys.contains { gfns.contains($0) } }
            return gfns.contains { holders[$0] != nil }
        }
    }

    /// Those of these pages that are in the set.
    func pages(in ranges: [Range<GFN>]) -> Set<GFN> {
        holders.withLock { holders in
            var found = Set<GFN>()
            for range in ranges {
                if range.count > holders.count {
                    for gfn in holders.keys where range.contains(gfn) { found.insert(gfn) }
                } else {
                    for gfn in range where holders[gfn] != nil { found.insert(gfn) }
                }
            }
            return found
        }
    }

    func insert(_ ranges: [Range<GFN>]) {
        holders.withLock { holders in
            for gfn in ranges.joined() { holders[gfn, default: 0] += 1 }
        }
    }

    func remove(_ ranges: [Range<GFN>]) {
        holders.withLock { holders in
            for gfn in ranges.joined() {
                guard let count = holders[gfn] else { continue }
                holders[gfn] = count > 1 ? count - 1 : nil
            }
        }
    }
}

/// The page map as the devices see it: where each page is, kept there by the range lock, and QEMU's memory behind it.
public final class MergedPages: GuestPages {
    public let map: PageMap
    public let unmergeable = UnmergeableSet()
    private let link = Monitor(Link())
    /// See `distrustMap`.
    private let isMapWrong = Atomic<Bool>(false)

    private struct Link {
        var memory: ProcessMemory?
        var mover: (any PageMover)?
    }

    public init(map: PageMap) { self.map = map }

    /// The agent is there (again). `memory` is that of the process whose mappings the page map describes.
    public func attach(_ memory: ProcessMemory) {
        isMapWrong.store(false, ordering: .releasing)
        link.update { $0.memory = memory }
    }

    /// Where the front end's pages are is not what our page map says: an access would miss the bytes of those that are merged. Each
    /// fails from now on, until an agent finds the map right.
    public func distrustMap() { isMapWrong.store(true, ordering: .releasing) }

    private func checkMap() throws(QuireError) {
        guard isMapWrong.load(ordering: .relaxed) else { return }
        throw QuireError(.closed, "the page map does not describe this QEMU's memory: start the VM anew, with a page map of its own")
    }

    /// QEMU has ended, or it is another one. What is merged cannot be reached any more. When only the agent's
    /// connection has ended its memory is as good as before.
    public func detachMemory() { link.update { $0.memory = nil } }

    /// Who brings pages back. Nil: nobody.
    public func setMover(_ mover: (any PageMover)?) { link.update { $0.mover = mover } }

    /// Guest memory as the front end describes it: before anything in it is used.
    public func use(_ memory: GuestMemory) { link.read { $0.mover }?.setMemory(memory) }

    // MARK: - Written by devices

    /// What devices of ours wrote through the memory file, where nobody sees it: see `WriteTracker`.
    private let written = Mutex<[Range<GFN>]>([])
    /// More are joined into longer ones, which are read once too often.
    private static let maxWritten = 4096

    public func noteWritten(_ gfns: Range<GFN>) {
        guard !gfns.isEmpty else { return }
        written.withLock { written in
            if let last = written.last, gfns.lowerBound <= last.upperBound, gfns.upperBound >= last.lowerBound {
                written[written.count - 1] =
                    min(last.lowerBound, gfns.lowerBound)..<max(last.upperBound, gfns.upperBound)
            } else {
                written.append(gfns)
            }
            if written.count > Self.maxWritten { written = Self.joined(written) }
        }
    }

    func takeWritten() -> [Range<GFN>] {
        written.withLock { written in
            defer { written = [] }
            return written
        }
    }

    /// Half as many, at most: neighbours become one.
    private static func joined(_ ranges: [Range<GFN>]) -> [Range<GFN>] {
        let sorted = ranges.sorted { $0.lowerBound < $1.lowerBound }
        return stride(from: 0, to: sorted.count, by: 2).map { index in
            let next = sorted[min(index + 1, sorted.count - 1)]
            return sorted[index].lowerBound..<max(sorted[index].upperBound, next.upperBound)
        }
    }

    // MARK: - Access

    public var lockPages: UInt64 { PageMap.lockPages }
    public func beginAccess(_ gfns: Range<GFN>) throws(QuireError) {
        try checkMap()
        try map.beginIO(gfns)
    }
    public func endAccess(_ gfns: Range<GFN>) { map.endIO(gfns) }
    public func alike(_ gfns: Range<GFN>) throws(QuireError) -> (count: Int, isMerged: Bool) { try map.alike(gfns) }

    /// After a start of ours the agent connects again soon. Whoever stops a ring waits for this, and a supervisor for
    /// him: so less than `BackendWatch.stuckWithoutClaims`.
    private static let patience: UInt64 = 1_500_000_000

    public func frontEnd() throws(QuireError) -> ProcessMemory {
        if let memory = link.read({ $0.memory }) { return memory }
        if let memory = link.wait(until: monotonicNanoseconds() + Self.patience, { $0.memory }) { return memory }
        // It comes back, late on a busy host: whoever serves a request asks again.
        throw QuireError(.retry, "the bytes of a merged page are in QEMU, and the agent there is not connected")
    }

    // MARK: - Pages that stay private

    /// The front end waits for us meanwhile, and a supervisor looks after that.
    private static let holdNanoseconds: UInt64 = 1_000_000_000

    /// Why no page of these is merged afterwards, and none becomes so:
    ///
    /// 1. They are in the set. Whoever asks the agent to merge looks there, in one step with noting that something is
    ///    asked for (`AgentLink`), so whatever did not see them there was noted before.
    /// 2. What was noted before is over when `settle` returns. What a dead back end had asked for is over when it was
    ///    taken over from (`PageMap.takeOver`); a window that was open then is waited for by 3.
    /// 3. With the range lock held none is merged; if one is, the agent brings it back, and all are looked at again.
    public func keepPrivate(_ gfns: [Range<GFN>]) throws(QuireError) -> PageHold {
        try checkMap()
        let deadline = monotonicNanoseconds() + Self.holdNanoseconds
        unmergeable.insert(gfns)
        let hold = PageHold { [unmergeable] in unmergeable.remove(gfns) }
        let mover = link.read { $0.mover }
        try mover?.settle(until: deadline)
        while true {
            let merged = try mergedRanges(gfns)
            if merged.isEmpty { return hold }
            guard let mover else {
                throw QuireError(
                    .busy, "a ring or a state table lies in merged pages, and there is no agent to bring them back")
            }
            try mover.bringBack(merged, until: deadline)
            guard monotonicNanoseconds() < deadline else {
                throw QuireError(
                    .busy, "a ring or a state table lies in merged pages that could not be brought back in time")
            }
        }
    }

    private func mergedRanges(_ ranges: [Range<GFN>]) throws(QuireError) -> [Range<GFN>] {
        var merged: [Range<GFN>] = []
        for range in ranges {
            try map.beginIO(range)
            defer { map.endIO(range) }
            var rest = range
            while !rest.isEmpty {
                let (count, isMerged) = try map.alike(rest)
                if isMerged { merged.append(rest.lowerBound..<rest.lowerBound + UInt64(count)) }
                rest = rest.lowerBound + UInt64(count)..<rest.upperBound
            }
        }
        return merged
    }
}
