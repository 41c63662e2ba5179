import Bench
import GuestMemory
import Platform

/// What recycling a page costs the host, beside the bare system call that does the work.
///
/// Guest RAM is a memory file that another process has mapped and touched, as QEMU has: every page is there and every page
/// table entry, so that a punch has to take them away. A is a loop of bare FALLOC_FL_PUNCH_HOLE over every second run of
/// the given length; B is the recycle engine itself, which finds the same runs marked in a guest's state table, claims,
/// punches and accounts for them. A and B alternate, all pages are touched again before each, and the bar is the median of
/// the ratios of neighbours. The engine claims at most 64 pages at once, so it punches a run of 512 in 8 pieces; A punches
/// it in one.
///
/// The same where the agent in that process claims and punches, as it does under `quire run`: B is then the CPU time of both, the
/// engine that looks for what is due and the agent that it tells.
///
/// The ratio is of CPU time, which others on a shared machine disturb less than they disturb the clock; that of the clock
/// is in the table, too.
struct HostCost {
    static let lengths = [1, 4, 16, 64, 512]

    let pageCount: Int
    let repetitions: Int
    /// Nil: the engine claims.
    var agentOf: Programs?

    static func bars(agent: Bool) -> [Bar] { lengths.map { bar($0, agent, nil) } }
    private static func bar(_ length: Int, _ agent: Bool, _ value: Double?) -> Bar {
        Bar("host cost of a page recycled \(agent ? "by the agent " : "")in runs of \(length), over the bare punch", value, atMost: 1.2, "times")
    }

    /// Returns what share of guest RAM the page map takes after everything that can be recycled was.
    func run(into report: inout Report) throws -> Double {
        _ = Cycles.counter
        let byAgent = agentOf != nil
        if !byAgent {
            report.machine.append(("cycles", .text(Cycles.name)))
            if !Cycles.isCounted { report.machine.append(("tsc_ghz", .number(Cycles.tscPerNanosecond))) }
        }
        let rig = if let agentOf { try Rig(pageCount: pageCount, agentOf: agentOf) } else { try Rig(memfds: 1, pageCount: pageCount, workers: 1) }
        var table = Table(
            title: "host cost of a page recycled by the \(byAgent ? "agent" : "engine"): \(pageCount / 256) MiB of guest RAM, touched by another process; \(repetitions) pairs",
            columns: ["run", "pages", "punch us", "Quire us", "punch cycles", "Quire cycles", "ratio", "ratios seen", "by the clock"])
        var results: [JSON] = []
        for length in Self.lengths {
            let runs = rig.runs(length)
            let pages = runs.reduce(0) { $0 + $1.count }
            var bare: [Cost] = [], quire: [Cost] = []
            for repetition in 0...repetitions {
                progress("host cost\(byAgent ? ", agent" : ""): runs of \(length), pair \(repetition) of \(repetitions)")
                try rig.touch()
                let a = try rig.punch(runs).each(of: pages)
                try rig.touch()
                let b = try rig.recycle(runs).each(of: pages)
                // The first pair only warms up: the page map's own memory, the engine's code.
                guard repetition > 0 else { continue }
                bare.append(a)
                quire.append(b)
            }
            let ratios = zip(bare, quire).map { $1.cpu / $0.cpu }
            let ratio = median(ratios), clock = median(zip(bare, quire).map { $1.wall / $0.wall })
            let cycles = median(quire.map(\.cycles))
            let aim: Double? = length == 1 ? 6500 : length >= 16 ? 2000 : nil
            table.row(
                "\(length)", "\(pages)", Table.number(median(bare.map(\.cpu)) / 1000),
                Table.number(median(quire.map(\.cpu)) / 1000), Table.number(median(bare.map(\.cycles))), Table.number(cycles),
                Table.number(ratio), "\(Table.number(ratios.min()!)) to \(Table.number(ratios.max()!))", Table.number(clock))
            results.append([
                "run": .integer(length), "pages": .integer(pages), "pairs": .integer(repetitions),
                "punch_cpu_ns": .number(median(bare.map(\.cpu))), "quire_cpu_ns": .number(median(quire.map(\.cpu))),
                "punch_clock_ns": .number(median(bare.map(\.wall))), "quire_clock_ns": .number(median(quire.map(\.wall))),
                "punch_cycles": .number(median(bare.map(\.cycles))), "quire_cycles": .number(cycles),
                "ratio": .number(ratio), "ratio_lowest": .number(ratios.min()!), "ratio_highest": .number(ratios.max()!),
                "clock_ratio": .number(clock), "cycles_aim": aim.map { .number($0) } ?? .null,
                "cycles_aim_reached": aim.map { .bool(cycles <= $0) } ?? .null,
            ])
            report.add(Self.bar(length, byAgent, ratio))
        }
        table.note("us, cycles and ratio: a page, CPU time of the working thread, medians. Cycles are \(Cycles.name).")
        table.note("A run of 512 is 8 punches of Quire's, which claims 64 pages at most, and one of the peer's.")
        table.note("Aims: PPR's 6500 cycles for a single page, under 2000 in runs of 16 and more.")
        report.add(byAgent ? "host_cost_agent" : "host_cost", .array(results), table: table)
        // At its largest the page map has an entry for every page.
        progress("host cost: everything recycled")
        try rig.touch()
        let all = Rig.firstUsable..<pageCount
        _ = try rig.recycle([all])
        return Double(rig.mapBytes) / (Double(all.count) * Double(pageBytes))
    }
}

/// Recycled pages a second with one and two threads, on one memory file and on two. The kernel serializes the punches of a
/// file by its inode's lock, so a second thread can only overlap what lies between them. No bar.
struct Threads {
    let pageCount: Int
    let repetitions: Int

    private struct Arrangement {
        let key: String
        let memfds: Int, workers: Int, engines: Int
    }

    func run(into report: inout Report) throws {
        let arrangements = [
            Arrangement(key: "1_thread_1_file", memfds: 1, workers: 1, engines: 1),
            Arrangement(key: "2_threads_1_file", memfds: 1, workers: 2, engines: 1),
            Arrangement(key: "2_threads_2_files", memfds: 2, workers: 2, engines: 1),
            Arrangement(key: "2_engines_2_files", memfds: 1, workers: 1, engines: 2),
        ]
        var table = Table(
            title: "thousand recycled pages a second, by the clock: medians of \(repetitions)",
            columns: ["run"] + arrangements.map { $0.key.replacing("_", with: " ") })
        var results: [JSON] = []
        for length in [1, 16] {
            var cells = ["\(length)"]
            var values: [(String, JSON)] = [("run", .integer(length))]
            for what in arrangements {
                progress("threads: runs of \(length), \(what.key.replacing("_", with: " "))")
                var rigs: [Rig] = []
                for _ in 0..<what.engines {
                    rigs.append(try Rig(memfds: what.memfds, pageCount: pageCount / what.engines, workers: what.workers))
                }
                let runs = rigs[0].runs(length)
                let pages = rigs.count * runs.reduce(0) { $0 + $1.count }
                var rates: [Double] = []
                for repetition in 0...repetitions {
                    for rig in rigs {
                        try rig.touch()
                        try rig.mark(runs)
                    }
                    let started = monotonicNanoseconds()
                    for rig in rigs { try rig.begin() }
                    for rig in rigs { rig.awaitPass() }
                    let took = Double(monotonicNanoseconds() - started)
                    for rig in rigs { try rig.finish() }
                    if repetition > 0 { rates.append(Double(pages) / took * 1e9) }
                }
                cells.append(Table.number(median(rates) / 1000))
                values.append((what.key + "_pages_per_s", .number(median(rates))))
            }
            table.row(cells)
            results.append(.object(values))
        }
        table.note("Two files of one engine are two NUMA nodes of one guest, two engines are two guests.")
        table.note("No bar: punches of one file wait for each other, and others use this machine's CPUs.")
        report.add("threads", .array(results), table: table)
    }
}
