import PageStore
import TestSupport
import Testing

struct RunAllocatorTests {
    /// Random operations against an array of booleans: always the lowest run that is long enough, else the longest.
    @Test(arguments: [2, 3, 64, 65, 1000, 4096, 20_000]) func agreesWithAnArray(limit: Int) {
        var random = SplitMix(UInt64(limit))
        var allocator = RunAllocator(limit: limit)
        var used = [Bool](repeating: false, count: limit)
        used[0] = true
        var taken: [Range<Int>] = []
        for _ in 0..<3000 {
            if Int.random(in: 0..<100, using: &random) < 55 || taken.isEmpty {
                let count = Int.random(in: 1...(Bool.random(using: &random) ? 8 : 300), using: &random)
                let free = Self.freeRuns(used)
                let got = allocator.allocate(count)
                if let best = free.first(where: { $0.count >= count }) {
                    #expect(got == best.lowerBound..<best.lowerBound + count)
                } else if let longest = free.map(\.count).max() {
                    let first = free.first { $0.count == longest }!
                    #expect(got == first)
                } else {
                    #expect(got == nil)
                }
                guard let got else { continue }
                for slot in got { used[slot] = true }
                taken.append(got)
            } else {
                // A part of something that was taken.
                let index = Int.random(in: taken.indices, using: &random)
                let run = taken.remove(at: index)
                let cut = Int.random(in: run.lowerBound...run.upperBound, using: &random)
                var (gone, rest) = (run.lowerBound..<cut, cut..<run.upperBound)
                if Bool.random(using: &random) { swap(&gone, &rest) }
                if !rest.isEmpty { taken.append(rest) }
                guard !gone.isEmpty else { continue }
                allocator.free(gone)
                for slot in gone { used[slot] = false }
            }
        }
        #expect(allocator.used == used.count { $0 } - 1)
        #expect((1..<limit).allSatisfy { allocator.isFree($0) == !used[$0] })
        var seen: [Range<Int>] = []
        while let run = allocator.nextUsed(from: seen.last?.upperBound ?? 1) { seen.append(run) }
        #expect(seen.flatMap { $0 } == (1..<limit).filter { used[$0] })
        for run in taken { allocator.free(run) }
        #expect(allocator.used == 0 && allocator.byteCount < 1 << 10)
        let first = allocator.allocate(1)
        #expect(first == 1..<2)
    }

    private static func freeRuns(_ used: [Bool]) -> [Range<Int>] {
        var runs: [Range<Int>] = []
        var start: Int?
        for slot in 0...used.count {
            let free = slot < used.count && !used[slot]
            if free, start == nil { start = slot }
            if !free, let first = start {
                runs.append(first..<slot)
                start = nil
            }
        }
        return runs
    }

    /// A million slots taken one by one, freed in the worst order, taken again in runs: the steps a slot grow with the
    /// logarithm at most.
    @Test func aMillionSlotsTakeNoQuadraticStep() {
        func work(_ count: Int) -> Int {
            var allocator = RunAllocator(limit: count + 1)
            for _ in 0..<count { _ = allocator.allocate(1) }
            for slot in stride(from: 1, through: count, by: 2) { allocator.free(slot..<slot + 1) }
            for slot in stride(from: 2, through: count, by: 2) { allocator.free(slot..<slot + 1) }
            for _ in 0..<count / 64 { _ = allocator.allocate(64) }
            #expect(allocator.used == count / 64 * 64)
            return allocator.steps
        }
        let quarter = work(1 << 18), whole = work(1 << 20)
        #expect(Double(whole) < 4 * 1.3 * Double(quarter), "\(quarter) to \(whole)")
    }

    @Test func takesWhatWasThereBefore() {
        var allocator = RunAllocator(limit: 5000)
        #expect([1, 4999, 2048, 64, 63].map { allocator.take($0) } == Array(repeating: true, count: 5))
        #expect([1, 4999, 0, 5000, -1].map { allocator.take($0) } == Array(repeating: false, count: 5))
        #expect(allocator.used == 5)
        #expect([61, 2].map { allocator.allocate($0) } == [2..<63, 65..<67])
    }
}
