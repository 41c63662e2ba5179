import Bench
import Engines
import Glibc
import Platform

/// How the cost of a merged page grows with the size of the guest: a guest's memory is filled a gibibyte at a time, with
/// the content of its first one in another order (runs of 64 pages), so that there is no more of it than the host has, and
/// what is merged, mapped and kept account of grows all the same. ksmd goes the same way as far as its time allows: each
/// step has it look through everything again.
struct Growth {
    let gibibytes: Int
    let kernel: KernelMerging
    let programs: Programs
    private static let step = 1 << 18
    private static let run = 64

    static var bars: [Bar] { [bar(nil)] }
    private static func bar(_ value: Double?) -> Bar {
        Bar("CPU of a merged page, the last quarter of the gibibytes over the first", value, atMost: 1.5, "times")
    }

    func run(into report: inout Report) throws {
        try KernelMerging.allowMappings(1 << 20)
        let rig = try MergeRig(gibibytes * Self.step, limit: "2G", programs)
        rig.begin()
        let ours = try Steps(count: gibibytes, pages: Self.step).ours(rig) { Self.content($0, $1) }
        let theirCount = min(gibibytes, 4)
        let other = try StandIn(theirCount * Self.step, programs)
        let theirs = try Steps(count: theirCount, pages: Self.step).theirs(other, kernel) { Self.content($0, $1) }
        var table = Table(
            title: "a guest that grows to \(gibibytes) GiB, each like the first in runs of \(Self.run): microseconds of CPU a merged page; one run",
            columns: ["GiB", "Quire", "backend", "quired", "agent", "ksmd"])
        for (number, cost) in ours.enumerated() {
            table.row(
                "\(number + 2)", Table.number(cost.all), Table.number(cost.backend), Table.number(cost.store),
                Table.number(cost.agent), number < theirs.count ? Table.number(theirs[number]) : "")
        }
        table.note("The second one merges the first, too, and is counted over both.")
        let quarter = max(1, ours.count / 4)
        let ratio = median(ours.suffix(quarter).map(\.all)) / median(ours.prefix(quarter).map(\.all))
        report.add("growth", [
            "gibibytes": .integer(gibibytes), "quire_cpu_us": ours.map(\.all).json, "backend_cpu_us": ours.map(\.backend).json,
            "quired_cpu_us": ours.map(\.store).json, "agent_cpu_us": ours.map(\.agent).json, "ksmd_cpu_us": theirs.json,
        ], table: table)
        report.add(Self.bar(ratio))
    }

    /// Of page `page` of gibibyte `number`.
    private static func content(_ number: Int, _ page: Int) -> UInt64 {
        let units = step / run
        // An odd factor permutes the units.
        let unit = number == 0 ? page / run : (page / run) &* (2 &* number + 1) % units
        return UInt64(unit * run + page % run + 1)
    }
}

/// A million pages that are all the same: one slot that everything shares, each page a mapping of its own. And whether
/// anybody waits long for anything meanwhile.
struct EqualPages {
    let pageCount: Int
    let steps: Int
    let kernel: KernelMerging
    let programs: Programs

    static var bars: [Bar] { [growth(nil), wait(nil)] }
    private static func growth(_ value: Double?) -> Bar {
        Bar("CPU of a merged page, the last quarter of a million equal pages over the first", value, atMost: 1.5, "times")
    }
    private static func wait(_ value: Double?) -> Bar {
        Bar("longest wait for control of the engine, or for an answer of quired, meanwhile", value, atMost: 500, "ms")
    }

    func run(into report: inout Report) throws {
        try KernelMerging.allowMappings(3 * pageCount)
        let each = pageCount / steps
        let rig = try MergeRig(pageCount, programs)
        rig.begin()
        // The first page of all has no equal to be merged with until it was seen twice.
        let ours = try Steps(count: steps, pages: each).ours(rig, first: 0) { _, _ in 1 }
        let waits = try longestWait(rig, each)
        let other = try StandIn(pageCount, programs)
        let theirs = try Steps(count: steps, pages: each).theirs(other, kernel, first: 0) { _, _ in 1 }
        var table = Table(
            title: "\(pageCount) equal pages, in \(steps) parts: microseconds of CPU a merged page; one run",
            columns: ["pages so far", "Quire", "backend", "quired", "agent", "ksmd"])
        for (number, (cost, their)) in zip(ours, theirs).enumerated() {
            table.row(
                "\((number + 1) * each)", Table.number(cost.all), Table.number(cost.backend), Table.number(cost.store),
                Table.number(cost.agent), Table.number(their))
        }
        table.note("Longest waits while \(each) of them are written and merged anew: control of the engine \(Table.number(waits.control)) ms, an answer of quired \(Table.number(waits.answer)) ms.")
        report.add("equal", [
            "pages": .integer(pageCount), "quire_cpu_us": ours.map(\.all).json, "ksmd_cpu_us": theirs.json,
            "longest_control_wait_ms": .number(waits.control), "longest_answer_ms": .number(waits.answer),
        ], table: table)
        report.add(Self.growth(ours.last!.all / ours.first!.all))
        report.add(Self.wait(max(waits.control, waits.answer)))
    }

    /// Pages are written again, so that they diverge, are folded, and merged once more.
    private func longestWait(_ rig: MergeRig, _ pages: Int) throws -> (control: Double, answer: Double) {
        progress("equal: waiting for control")
        try rig.standIn.fill(0..<pages)
        var control: UInt64 = 0, answer: UInt64 = 0
        let end = monotonicNanoseconds() + 10_000_000_000
        while monotonicNanoseconds() < end {
            let first = monotonicNanoseconds()
            rig.pause(true)
            let second = monotonicNanoseconds()
            rig.pause(false)
            let third = monotonicNanoseconds()
            _ = try rig.store.figures
            control = max(control, second - first)
            answer = max(answer, monotonicNanoseconds() - third)
            usleep(100_000)
        }
        return (Double(control) / 1e6, Double(answer) / 1e6)
    }
}

/// Memory that is filled and merged part by part.
private struct Steps {
    let count: Int
    let pages: Int

    /// Microseconds a merged page of each part from `first` on: parts before it are filled with it.
    func ours(_ rig: MergeRig, first: Int = 1, _ content: (Int, Int) -> UInt64) throws -> [MergeRig.CPU] {
        var result: [MergeRig.CPU] = []
        for number in 0..<count {
            try fill(rig.standIn, number, content)
            guard number >= first else { continue }
            let from = rig.engine.snapshot.sharingPages, wanted = UInt64(Double((number + 1) * pages) * 0.999)
            progress("part \(number + 1) of \(count)")
            let work = try rig.work { $0.sharingPages >= wanted }
            try rig.standIn.verify(number * pages..<(number + 1) * pages)
            let merged = Double(work.statistics.sharingPages - from) * 1000
            result.append(
                MergeRig.CPU(backend: work.cpu.backend / merged, store: work.cpu.store / merged, agent: work.cpu.agent / merged))
        }
        return result
    }

    func theirs(
        _ standIn: StandIn, _ kernel: KernelMerging, first: Int = 1, _ content: (Int, Int) -> UInt64
    ) throws -> [Double] {
        var result: [Double] = []
        for number in 0..<count {
            try fill(standIn, number, content)
            guard number >= first else { continue }
            let from = KernelMerging.mergedPages(of: standIn.pid), wanted = Int(Double((number + 1) * pages) * 0.999)
            progress("ksmd: part \(number + 1) of \(count)")
            let work = try kernel.work { KernelMerging.mergedPages(of: standIn.pid) >= wanted }
            result.append(work.cpu / Double(KernelMerging.mergedPages(of: standIn.pid) - from) / 1000)
        }
        return result
    }

    private func fill(_ standIn: StandIn, _ number: Int, _ content: (Int, Int) -> UInt64) throws {
        for page in 0..<pages { standIn.set(number * pages + page, content(number, page)) }
        try standIn.fill(number * pages..<(number + 1) * pages)
    }
}
