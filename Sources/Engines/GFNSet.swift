import GuestMemory

/// A set of guest pages that come in runs: a bit a page, in pieces of 4096 pages that exist where there are any.
package struct GFNSet: Sendable {
    package init() {}

    private static let wordsPerPiece: UInt64 = 64
    private var pieces: [UInt64: [UInt64]] = [:]

    package var isEmpty: Bool { pieces.isEmpty }

    package mutating func insert(_ gfns: Range<GFN>) {
        for (word, bits) in Self.words(of: gfns) {
            pieces[word / Self.wordsPerPiece, default: [UInt64](repeating: 0, count: 64)][Int(word % Self.wordsPerPiece)] |= bits
        }
    }

    package mutating func remove(_ gfns: Range<GFN>) {
        for (word, bits) in Self.words(of: gfns) {
            let piece = word / Self.wordsPerPiece
            pieces[piece]?[Int(word % Self.wordsPerPiece)] &= ~bits
            let isLast = (word + 1) % Self.wordsPerPiece == 0 || (word + 1) * 64 >= gfns.upperBound
            if isLast, pieces[piece]?.allSatisfy({ $0 == 0 }) == true { pieces[piece] = nil }
        }
    }

    package func forEachRun(in gfns: Range<GFN>, _ body: (Range<GFN>) -> Void) {
        var run: Range<GFN>?
        for (word, mask) in Self.words(of: gfns) {
            var bits = (pieces[word / Self.wordsPerPiece]?[Int(word % Self.wordsPerPiece)] ?? 0) & mask
            while bits != 0 {
                let first = bits.trailingZeroBitCount
                let length = min((~(bits >> UInt64(first))).trailingZeroBitCount, 64 - first)
                bits &= length == 64 ? 0 : ~(((1 << UInt64(length)) - 1) << UInt64(first))
                let gfn = word * 64 + UInt64(first)
                if let last = run, last.upperBound == gfn {
                    run = last.lowerBound..<gfn + UInt64(length)
                } else {
                    if let last = run { body(last) }
                    run = gfn..<gfn + UInt64(length)
                }
            }
        }
        if let run { body(run) }
    }

    /// All of it, in order.
    package var runs: [Range<GFN>] {
        var result: [Range<GFN>] = []
        for piece in pieces.keys.sorted() {
            forEachRun(in: piece * 4096..<(piece + 1) * 4096) { run in
                if let last = result.last, last.upperBound == run.lowerBound {
                    result[result.count - 1] = last.lowerBound..<run.upperBound
                } else {
                    result.append(run)
                }
            }
        }
        return result
    }

    private static func words(of gfns: Range<GFN>) -> UnfoldSequence<(word: UInt64, bits: UInt64), GFN> {
        sequence(state: gfns.lowerBound) { gfn in
            guard gfn < gfns.upperBound else { return nil }
            let count = min(64 - gfn % 64, gfns.upperBound - gfn)
            defer { gfn += count }
            return (gfn / 64, (count == 64 ? .max : (1 << count) - 1) << (gfn % 64))
        }
    }
}
