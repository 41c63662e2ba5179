import Engines
import GuestMemory
import TestSupport
import Testing

@Suite struct QuietPagesTests {
    private func ripe(_ pages: inout QuietPages, limit: Int = .max) -> [Range<GFN>] {
        var position = pages.gfns.lowerBound
        return pages.takeRipe(limit, from: &position)
    }

    @Test func twoPeriodsWithoutAWriteMakeAPageRipe() {
        var pages = QuietPages(1000..<1200)
        pages.noteWritten(1010..<1020)
        pages.endPeriod()
        #expect(ripe(&pages).isEmpty)
        pages.noteWritten(1012..<1013)
        pages.endPeriod()
        #expect(ripe(&pages) == [1010..<1012, 1013..<1020])
        pages.endPeriod()
        #expect(ripe(&pages) == [1012..<1013])
        pages.endPeriod()
        #expect(!pages.isWaiting)
    }

    @Test func aFicklePageHasToBeQuietForTwiceAsLong() {
        var pages = QuietPages(0..<64)
        pages.noteFickle(3..<5)
        pages.noteWritten(6..<7)
        for period in 1...4 {
            pages.endPeriod()
            #expect(ripe(&pages) == [2: [6..<7], 4: [3..<5]][period, default: []], "period \(period)")
        }
    }

    /// Against an array of ages, with all borders of words.
    @Test func agreesWithAnArray() {
        var random = SplitMix(4)
        let gfns: Range<GFN> = 100..<421
        var pages = QuietPages(gfns)
        var age = [GFN: Int](), due = Set<GFN>()
        for _ in 0..<400 {
            for _ in 0..<Int.random(in: 0...3, using: &random) {
                let start = GFN.random(in: 90..<430, using: &random)
                let range = start..<start + GFN.random(in: 1...90, using: &random)
                pages.noteWritten(range)
                for gfn in range.clamped(to: gfns) { (age[gfn], _) = (0, due.remove(gfn)) }
            }
            pages.endPeriod()
            for (gfn, periods) in age {
                age[gfn] = periods == 1 ? nil : periods + 1
                if periods == 1 { due.insert(gfn) }
            }
            if Bool.random(using: &random) {
                let limit = Int.random(in: 1...200, using: &random)
                let taken = ripe(&pages, limit: limit)
                #expect(taken.flatMap(Array.init) == Array(due.sorted().prefix(limit)))
                // Neighbours come together.
                #expect(zip(taken, taken.dropFirst()).allSatisfy { $0.upperBound < $1.lowerBound })
                for gfn in taken.joined() { due.remove(gfn) }
            }
            #expect(pages.ripeCount == due.count)
        }
    }
}

@Suite struct GFNSetTests {
    @Test func agreesWithASet() {
        var random = SplitMix(9)
        var set = GFNSet()
        var model = Set<GFN>()
        for _ in 0..<600 {
            let start = GFN.random(in: 0..<20_000, using: &random)
            let range = start..<start + GFN.random(in: 1...6000, using: &random)
            if Bool.random(using: &random) {
                set.insert(range)
                model.formUnion(range)
            } else {
                set.remove(range)
                model.subtract(range)
            }
            let looked = GFN.random(in: 0..<20_000, using: &random)..<26_000
            var found: [Range<GFN>] = []
            set.forEachRun(in: looked) { found.append($0) }
            #expect(found.flatMap(Array.init) == model.filter(looked.contains).sorted())
            #expect(zip(found, found.dropFirst()).allSatisfy { $0.upperBound < $1.lowerBound })
        }
        #expect(set.runs.flatMap(Array.init) == model.sorted())
        set.remove(0..<30_000)
        #expect(set.runs.isEmpty)
    }
}
