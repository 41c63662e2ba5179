import GuestMemory
import PageContent
import Platform

/// Pages that could be merged, and are left where they are because each is part of a huge page that is better left whole.
///
/// Where the host gives memory files huge pages (`shmem_enabled`), the first page that is merged costs the guest the whole one:
/// 512 entries of a page table in place of one, for 4 KiB saved. A huge page that the guest writes stays whole by itself, because
/// the kernel tells of a write to all of it. A quiet one is split when enough of its pages can go; until then those wait here.
/// (Pages that the guest has freed go back one by one all the same: it was the guest who broke it up.)
///
/// Known only where the kernel tells what is mapped as one (PAGEMAP_SCAN, Linux 6.7).
package struct HugePages: Sendable {
    package static let pages: UInt64 = 512
    /// Of the 512 pages, how many have to be mergeable: half a mebibyte saved for each that is split.
    package static let worthIt = 128

    private var waiting = GFNSet()

    package init() {}
    /// Whether no page waits.
    package var isEmpty: Bool { waiting.isEmpty }
    package var runs: [Range<GFN>] { waiting.runs }

    /// `candidates` can be merged. Returns which of them have to wait, and which of those that waited are to be looked at again.
    /// - Parameters:
    ///   - stretch: the 512 pages, in the memory file, that a page is one of; nil where they are not all guest memory.
    ///   - isWhole: whether a stretch is mapped as one.
    package mutating func hold(
        _ candidates: [Range<GFN>], stretch: (GFN) -> Range<GFN>?, isWhole: (Range<GFN>) -> Bool
    ) -> (held: GFNSet, again: [Range<GFN>]) {
        var parts: [GFN: (stretch: Range<GFN>, pages: [Range<GFN>])] = [:]
        for range in candidates {
            var first = range.lowerBound
            while first < range.upperBound {
                guard let around = stretch(first) else {
                    // The next border is no farther than this.
                    first = first - first % Self.pages + Self.pages
                    continue
                }
                let part = first..<min(range.upperBound, around.upperBound)
                parts[around.lowerBound, default: (around, [])].pages.append(part)
                first = part.upperBound
            }
        }
        var held = GFNSet()
        var again: [Range<GFN>] = []
        for (stretch, pages) in parts.values {
            guard isWhole(stretch) else {
                again += release(stretch)
                continue
            }
            for part in pages { waiting.insert(part) }
            if count(in: stretch) < Self.worthIt {
                for part in pages { held.insert(part) }
            } else {
                for part in pages { waiting.remove(part) }
                again += release(stretch)
            }
        }
        return (held, again)
    }

    /// These were written: whether they can be merged nobody knows any more.
    package mutating func noteWritten(_ gfns: Range<GFN>) {
        if !waiting.isEmpty { waiting.remove(gfns) }
    }

    private mutating func release(_ stretch: Range<GFN>) -> [Range<GFN>] {
        var pages: [Range<GFN>] = []
        if waiting.isEmpty { return pages }
        waiting.forEachRun(in: stretch) { pages.append($0) }
        if !pages.isEmpty { waiting.remove(stretch) }
        return pages
    }

    private func count(in stretch: Range<GFN>) -> Int {
        var count = 0
        waiting.forEachRun(in: stretch) { count += $0.count }
        return count
    }
}
