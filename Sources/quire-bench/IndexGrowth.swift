import Bench
import PageContent
import PageStore
import Platform
import Synchronization

/// The content index of 10,000 VMs: what an entry and a look-up cost while it grows, and whether anybody waits for it. Each
/// VM brings pages that nobody had before it; what it shares with those before it needs no entry. (Two idle Debian guests
/// bring less than these 25 MiB each.)
///
/// Each two entries that are added split one chain of the index, while everyone else goes on. So another thread looks up without
/// a pause meanwhile, and the longest that it took is what a VM could have waited.
struct IndexGrowth {
    static let machines = 10_000
    let pagesEach: Int
    private static let steps = 7
    private static let samples = 1 << 20

    static var bars: [Bar] { [adding(nil), finding(nil), wait(nil)] }
    private static func adding(_ value: Double?) -> Bar {
        Bar("CPU of an entry of the index, the last half of \(machines) VMs over the first 64th", value, atMost: 4, "times")
    }
    private static func finding(_ value: Double?) -> Bar {
        Bar("CPU of a look-up in the index of \(machines) VMs, over a 64th of them", value, atMost: 4, "times")
    }
    private static func wait(_ value: Double?) -> Bar {
        Bar("longest look-up while the index grows", value, atMost: 500, "ms")
    }

    private struct Step {
        var entries: Int
        var add = 0.0, hit = 0.0, miss = 0.0, longest = 0.0
    }

    func run(into report: inout Report) throws {
        let all = Self.machines * pagesEach
        let table = try SlotTable(SlotTable.makeFile(group: "bench", node: 0, slots: all + 1))
        let index = try ContentIndex(table)
        var steps: [Step] = []
        var done = 0
        for number in (0..<Self.steps).reversed() {
            var step = Step(entries: all >> number)
            progress("index: \(step.entries) entries")
            let added = done..<step.entries
            try fill(table, added)
            let reader = try Reader(index, known: max(done, 1))
            let before = processCPUNanoseconds()
            for entry in added where index.add(UInt32(entry + 1)) != UInt32(entry + 1) {
                throw QuireError(.system, "the index says that a new content is known")
            }
            let (longest, readerCPU) = reader.end()
            step.add = Double(processCPUNanoseconds() - before - readerCPU) / Double(added.count)
            step.longest = Double(longest) / 1e6
            done = step.entries
            step.hit = try look(index, done) { Self.hash($0 % done) }
            step.miss = try look(index, 0) { Self.hash(all + $0) }
            steps.append(step)
        }
        var table2 = Table(
            title: "the content index of up to \(Self.machines) VMs that bring \(pagesEach) pages each: nanoseconds of CPU; one run",
            columns: ["entries", "VMs", "an entry", "found", "not found", "longest look-up meanwhile, ms"])
        for step in steps {
            table2.row(
                "\(step.entries)", "\(step.entries / pagesEach)", Table.number(step.add), Table.number(step.hit), Table.number(step.miss),
                Table.number(step.longest))
        }
        table2.note("Found and not found: \(Self.samples) contents in random order. An entry: with the chains that are split for it.")
        table2.note("The longest look-up by the clock: what else ran on these CPUs is in it.")
        report.add("index", .array(steps.map {
            [
                "entries": .integer($0.entries), "add_cpu_ns": .number($0.add), "hit_cpu_ns": .number($0.hit),
                "miss_cpu_ns": .number($0.miss), "longest_lookup_ms": .number($0.longest),
            ]
        }), table: table2)
        report.add(Self.adding(steps.last!.add / steps.first!.add))
        report.add(Self.finding(max(steps.last!.hit / steps.first!.hit, steps.last!.miss / steps.first!.miss)))
        report.add(Self.wait(steps.map(\.longest).max()!))
    }

    /// Of entry `number`, whose slot is one more.
    private static func hash(_ number: Int) -> PageHash {
        var noise = Noise(UInt64(number + 1))
        _ = noise.next()
        return PageHash(low: noise.next(), high: noise.next())
    }

    private func fill(_ table: SlotTable, _ entries: Range<Int>) throws {
        for first in stride(from: entries.lowerBound, to: entries.upperBound, by: 4096) {
            let hashes = (first..<min(first + 4096, entries.upperBound)).map(Self.hash)
            try table.setHashes(first + 1, hashes[...])
        }
    }

    /// Nanoseconds of CPU a look-up, of which `found` names how many entries there are to be found, or none.
    private func look(_ index: ContentIndex, _ found: Int, _ hash: (Int) -> PageHash) throws -> Double {
        var noise = Noise(3)
        let hashes = (0..<Self.samples).map { _ in hash(Int(noise.next() >> 24)) }
        let started = threadCPUNanoseconds()
        var known = 0
        for one in hashes where ContentIndex.reading({ index.find(one) }) != nil { known += 1 }
        let cost = Double(threadCPUNanoseconds() - started) / Double(Self.samples)
        guard known == (found > 0 ? Self.samples : 0) else {
            throw QuireError(.system, "the index finds \(known) of \(Self.samples) contents")
        }
        return cost
    }

    /// Looks up what is known until it is told to end.
    private final class Reader: Sendable {
        private let ended = Atomic(false)
        private let longest = Atomic<UInt64>(0)
        private let cpu = Atomic<UInt64>(0)
        private let thread = Mutex<JoinableThread?>(nil)

        init(_ index: ContentIndex, known: Int) throws(QuireError) {
            let made = try JoinableThread("reader") { [self] in
                let started = threadCPUNanoseconds()
                var noise = Noise(5), most: UInt64 = 0
                while !ended.load(ordering: .relaxed) {
                    let one = IndexGrowth.hash(Int(noise.next() >> 24) % known)
                    let from = monotonicNanoseconds()
                    _ = ContentIndex.reading { index.find(one) }
                    most = max(most, monotonicNanoseconds() - from)
                }
                longest.store(most, ordering: .relaxed)
                cpu.store(threadCPUNanoseconds() - started, ordering: .relaxed)
            }
            thread.withLock { $0 = made }
        }

        func end() -> (longest: UInt64, cpu: UInt64) {
            ended.store(true, ordering: .relaxed)
            thread.withLock { $0 }?.join()
            return (longest.load(ordering: .relaxed), cpu.load(ordering: .relaxed))
        }
    }
}
