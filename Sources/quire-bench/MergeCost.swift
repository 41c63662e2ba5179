import Bench
import Engines
import Glibc
import PageContent
import Platform
import StoreProtocol

/// What it costs to merge memory that was just filled, from the first look at it until all that is equal is merged: CPU of
/// every process of ours, or of ksmd, over merged pages. Pages that are equal come in pairs, which is the dearest case for
/// both: nothing is saved but one page of two. Half of all pages are equal to none, and are looked at, too.
///
/// Merged is every page that is not kept on its own any more: for KSM ksm_merging_pages.
struct MergeCost {
    var runs = Self.runs
    let pageCount: Int
    let rounds: Int
    let kernel: KernelMerging
    let programs: Programs

    static let runs = [1, 16, 64, 512]
    static var bars: [Bar] { runs.map { bar($0, nil) } + [metadata(nil)] }
    private static func bar(_ run: Int, _ value: Double?) -> Bar {
        Bar(
            run == 1 ? "CPU of a merged page that stands alone, of ksmd's" : "CPU of a merged page in runs of \(run), of ksmd's",
            value, atMost: run == 1 ? 1.0 / 3 : 0.1, "times")
    }
    private static func metadata(_ value: Double?) -> Bar {
        Bar("metadata over guest RAM, less 500 bytes a merged run", value, atMost: 0.5, "%")
    }

    private struct Outcome {
        var ours: [MergeRig.Work] = [], theirs: [KernelMerging.Work] = []
        var memory = Metadata()
        var pages = 0
        var ratios: [Double] { zip(ours, theirs).map { $0.cpu.all / $1.cpu } }
        func each(_ time: Double) -> Double { time / Double(pages) / 1000 }
    }

    func run(into report: inout Report) throws {
        // An isolated page takes two mappings.
        try KernelMerging.allowMappings(4 * pageCount)
        if KernelMerging.hasSmartScan { try KernelMerging.set("smart_scan", 1) }
        try KernelMerging.set("pages_to_scan", 20_000)
        var costs = Table(
            title: "merging \(pageCount / 256) MiB of which half the pages are equal, in pairs: microseconds of CPU a merged page; "
                + "\(rounds) rounds, ours and ksmd's in turn",
            columns: ["runs of", "ksmd", "Quire", "ratio", "floor", "backend", "quired", "agent", "pages/s and core: ksmd", "Quire", "pages/s: ksmd", "Quire"])
        var sizes = Table(
            title: "metadata after that: bytes a page of guest RAM",
            columns: ["runs of", "merged runs", "page map", "bitmaps", "ledger", "index and slots", "candidates", "mappings", "sum", "less 500 a run"])
        var results: [JSON] = []
        var worst = 0.0
        for run in runs {
            var outcome = Outcome()
            for round in 1...rounds {
                progress("merge: runs of \(run), round \(round) of \(rounds)")
                try merge(run, &outcome)
                try scan(run, &outcome)
            }
            let ours = outcome.ours.map { outcome.each($0.cpu.all) }, theirs = outcome.theirs.map { outcome.each($0.cpu) }
            progress("merge: runs of \(run), what nobody can do without")
            let floor = try MergeFloor(pageCount, run)
            func part(_ path: KeyPath<MergeRig.CPU, Double>) -> String {
                Table.number(median(outcome.ours.map { outcome.each($0.cpu[keyPath: path]) }))
            }
            let speed = median(outcome.ours.map { Double(outcome.pages) / $0.wall * 1e9 })
            let theirSpeed = median(outcome.theirs.map { Double(outcome.pages) / $0.wall * 1e9 })
            costs.row(
                "\(run)", theirs.spread, ours.spread, outcome.ratios.spread, Table.number(floor.microseconds / median(theirs)), part(\.backend), part(\.store), part(\.agent),
                Table.number(1e6 / median(theirs)), Table.number(1e6 / median(ours)), Table.number(theirSpeed), Table.number(speed))
            let memory = outcome.memory
            let share = memory.excess / Double(pageCount) / 4096 * 100
            worst = max(worst, share)
            func each(_ bytes: Double) -> String { Table.number(bytes / Double(pageCount)) }
            sizes.row(
                "\(run)", "\(memory.runs)", each(memory.map), each(memory.bitmaps), each(memory.ledger), each(memory.index),
                each(memory.candidates), each(memory.mappings), each(memory.all), Table.number(share) + " %")
            results.append([
                "run": .integer(run), "pages": .integer(pageCount), "merged_pages": .integer(outcome.pages),
                "ksmd_cpu_us": theirs.json, "quire_cpu_us": ours.json,
                "quire_backend_cpu_us": outcome.ours.map { outcome.each($0.cpu.backend) }.json,
                "quired_cpu_us": outcome.ours.map { outcome.each($0.cpu.store) }.json,
                "agent_cpu_us": outcome.ours.map { outcome.each($0.cpu.agent) }.json, "ratios": outcome.ratios.json,
                "hash_cpu_us": .number(floor.hash), "punch_cpu_us": .number(floor.punch),
                "floor_ratio": .number(floor.microseconds / median(theirs)),
                "quire_pages_per_s": .number(speed), "ksmd_pages_per_s": .number(theirSpeed), "metadata": memory.json,
            ])
            report.add(Self.bar(run, median(outcome.ratios)))
        }
        costs.note("Idle passes and waiting for pages to be quiet are in it. vm.max_map_count is raised for as long as this runs.")
        costs.note(MergeFloor.note)
        costs.note("ksmd: pages_to_scan 20000, sleep_millisecs 0, smart_scan on.")
        report.add("merge", .array(results), table: costs)
        sizes.note("Mappings: vm_area_struct and maple_node in /proc/slabinfo, before and after; others on the host disturb it.")
        sizes.note("Bitmaps by their sizes. Candidates: of the table of the whole host what falls to so many of its pages.")
        report.add("metadata_note", ["worst_percent_less_500_bytes_a_run": .number(worst)], table: sizes)
        report.add(Self.metadata(worst))
    }

    private func merge(_ run: Int, _ outcome: inout Outcome) throws {
        let rig = try MergeRig(pageCount, programs)
        let pages = Layout.pairs(pageCount, run: run) { rig.standIn.set($0, $1) }
        try rig.standIn.fill(0..<pageCount)
        let kernelBefore = Metadata.kernelBytes, started = rig.cpu, wall = monotonicNanoseconds()
        rig.begin()
        let work = try rig.work(since: started, wall) { $0.sharingPages >= UInt64(Double(pages) * 0.999) }
        outcome.pages = pages
        outcome.ours.append(work)
        outcome.memory = try Metadata(rig, work.statistics, pageCount, mappings: Metadata.kernelBytes - kernelBefore)
        rig.pause(true)
        try rig.standIn.verify(0..<pageCount)
    }

    private func scan(_ run: Int, _ outcome: inout Outcome) throws {
        let other = try StandIn(pageCount, programs)
        let pages = Layout.pairs(pageCount, run: run) { other.set($0, $1) }
        try other.fill(0..<pageCount)
        outcome.theirs.append(try kernel.work { KernelMerging.mergedPages(of: other.pid) >= Int(Double(pages) * 0.999) })
    }
}

/// What nothing can do without that merges pages of memory files: each page is read once, which is two for each merged
/// one here, and the merged one's memory goes back to the host. By XXH3 and the bare system call, in microseconds of CPU a
/// page; nothing is compared, copied, mapped or asked.
struct MergeFloor {
    let hash, punch: Double
    var microseconds: Double { 2 * hash + punch }
    static let note = "Floor: two pages hashed and one punched by a bare system call in the same runs, of ksmd's: what no merging of memory files goes below."

    init(_ pageCount: Int, _ run: Int) throws {
        let hasher = try PageHasher.random()
        let memory = try Mapping(anonymousByteCount: pageCount * 4096)
        for page in 0..<pageCount { memory.store64(page * 4096, UInt64(page + 1)) }
        let started = threadCPUNanoseconds()
        var sum: UInt64 = 0
        for page in 0..<pageCount { sum ^= hasher.hash(memory, at: page * 4096).low }
        hash = Double(threadCPUNanoseconds() - started) / Double(pageCount) / 1000
        guard sum != 0 else { throw QuireError(.system, "hashes of different pages that are all equal") }
        let rig = try Rig(memfds: 1, pageCount: pageCount, workers: 1)
        try rig.touch()
        let runs = rig.runs(run)
        punch = try rig.punch(runs).each(of: runs.reduce(0) { $0 + $1.count }).cpu / 1000
    }
}

/// Memory that merging costs, in bytes.
struct Metadata {
    var map = 0.0, bitmaps = 0.0, ledger = 0.0, index = 0.0, candidates = 0.0, mappings = 0.0
    var runs: UInt64 = 0
    var all: Double { map + bitmaps + ledger + index + candidates + mappings }
    /// More than what a merged run may cost.
    var excess: Double { max(0, all - 500 * Double(runs)) }

    init() {}
    init(_ rig: MergeRig, _ statistics: DedupEngine.Statistics, _ pageCount: Int, mappings: Double) throws {
        self.init(try rig.store.figures, mapBytes: rig.map.allocatedBytes, pageCount: pageCount)
        runs = statistics.mergedRuns
        self.mappings = mappings
    }

    /// Without what the kernel needs for mappings.
    init(_ figures: StoreFigures, mapBytes: UInt64, pageCount: Int) {
        map = Double(mapBytes)
        // QuietPages: four bits a page; what is held: one.
        bitmaps = Double(pageCount) * 5 / 8
        ledger = Double(figures.ledgerBytes)
        index = Double(figures.indexBytes)
        // The table is for all guests of a host, however many of its pages are theirs.
        candidates = Double(figures.candidateBytes) * Double(pageCount) * 4096 / Double(ProcessCalls.memoryBytes)
    }

    var json: JSON {
        [
            "merged_runs": .integer(Int(runs)), "page_map_bytes": .number(map), "bitmap_bytes": .number(bitmaps),
            "ledger_bytes": .number(ledger), "index_bytes": .number(index), "candidate_bytes": .number(candidates),
            "mapping_bytes": .number(mappings), "bytes": .number(all), "bytes_less_500_a_run": .number(excess),
        ]
    }

    /// What the kernel has in use for mappings; 0 where it does not tell.
    static var kernelBytes: Double {
        guard let text = try? Files.read("/proc/slabinfo") else { return 0 }
        var bytes = 0.0
        for line in text.split(separator: "\n") where line.hasPrefix("vm_area_struct ") || line.hasPrefix("maple_node ") {
            let words = line.split(separator: " ")
            if words.count > 3, let count = Double(words[1]), let size = Double(words[3]) { bytes += count * size }
        }
        return bytes
    }
}
