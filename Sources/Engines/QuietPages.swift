import GuestMemory

/// How long each page of a stretch of guest memory has not been written: what is due to be looked at by the engine that
/// merges. Three bits a page (0.01 % of it), and a step costs a few instructions for 64 pages.
///
/// | set     | the page                                                                  |
/// | ------- | ------------------------------------------------------------------------- |
/// | `young` | was written in the period that has just ended, or nobody knows            |
/// | `old`   | was not written for one period                                            |
/// | `ripe`  | was not written for two periods, and was not looked at since              |
/// | none    | is quiet, and was looked at                                               |
///
/// A page is in one set at most. `fickle` is beside them: such a page was merged and written again; it has to be quiet for
/// twice as long.
package struct QuietPages: Sendable {
    package let gfns: Range<GFN>
    private var young: [UInt64]
    private var old: [UInt64]
    private var ripe: [UInt64]
    private var fickle: [UInt64]

    package init(_ gfns: Range<GFN>) {
        self.gfns = gfns
        let words = [UInt64](repeating: 0, count: (gfns.count + 63) / 64)
        young = words
        old = words
        ripe = words
        fickle = words
    }

    /// A period has ended in which no page was written but those that `noteWritten` is told of from now on.
    package mutating func endPeriod() {
        for index in young.indices {
            if young[index] | old[index] == 0 { continue }
            let due = old[index]
            ripe[index] |= due & ~fickle[index]
            old[index] = young[index]
            young[index] = due & fickle[index]
            fickle[index] &= ~due
        }
    }

    /// These were written, or nobody knows.
    package mutating func noteWritten(_ pages: Range<GFN>) {
        for (index, bits) in words(of: pages) {
            young[index] |= bits
            old[index] &= ~bits
            ripe[index] &= ~bits
        }
    }

    /// These were merged, and have been written since.
    package mutating func noteFickle(_ pages: Range<GFN>) {
        noteWritten(pages)
        for (index, bits) in words(of: pages) { fickle[index] |= bits }
    }

    /// These were taken and could not be dealt with yet.
    package mutating func noteRipe(_ pages: Range<GFN>) {
        for (index, bits) in words(of: pages) { ripe[index] |= bits & ~(young[index] | old[index]) }
    }

    /// Takes ripe pages, the first ones at or behind `start`: at most `limit`, in runs. `start` is moved behind them; at the
    /// end nothing is left behind it.
    package mutating func takeRipe(_ limit: Int, from start: inout GFN) -> [Range<GFN>] {
        var runs: [Range<GFN>] = []
        var left = limit
        var index = Int(max(start, gfns.lowerBound) - gfns.lowerBound) / 64
        while left > 0, index < ripe.count {
            while ripe[index] != 0, left > 0 {
                let first = ripe[index].trailingZeroBitCount
                let length = min((~(ripe[index] >> UInt64(first))).trailingZeroBitCount, 64 - first, left)
                ripe[index] &= ~(Self.mask(length) << UInt64(first))
                let gfn = gfns.lowerBound + UInt64(index * 64 + first)
                if let last = runs.last, last.upperBound == gfn {
                    runs[runs.count - 1] = last.lowerBound..<gfn + UInt64(length)
                } else {
                    runs.append(gfn..<gfn + UInt64(length))
                }
                left -= length
            }
            if ripe[index] == 0 { index += 1 }
        }
        start = gfns.lowerBound + UInt64(min(index * 64, gfns.count))
        return runs
    }

    package var ripeCount: Int { ripe.reduce(0) { $0 + $1.nonzeroBitCount } }

    /// Whether there is anything that time will change.
    package var isWaiting: Bool { young.contains { $0 != 0 } || old.contains { $0 != 0 } || ripe.contains { $0 != 0 } }

    private static func mask(_ count: Int) -> UInt64 { count >= 64 ? .max : (1 << UInt64(count)) - 1 }

    /// The part of `pages` that is ours: words, and bits of them.
    private func words(of pages: Range<GFN>) -> UnfoldSequence<(index: Int, bits: UInt64), Int> {
        let part = pages.clamped(to: gfns)
        let first = gfns.lowerBound
        let end = part.isEmpty ? 0 : Int(part.upperBound - first)
        return sequence(state: part.isEmpty ? 0 : Int(part.lowerBound - first)) { bit in
            guard bit < end else { return nil }
            let count = min(64 - bit % 64, end - bit)
            defer { bit += count }
            return (bit / 64, Self.mask(count) << UInt64(bit % 64))
        }
    }
}
