import Bench
import Glibc
import Platform

/// What it costs to find that nothing has changed where the kernel does not tell (before Linux 6.7, `--no-write-tracking`):
/// ours, everything that the backend does over the pages that it reads, with what it causes elsewhere; ksmd's over the
/// pages that it looks at, with `smart_scan` off. They take turns; the bar is on the median of the ratios of neighbours.
struct UntrackedMemory {
    let pageCount: Int
    let rounds: Int
    let kernel: KernelMerging
    let programs: Programs

    static var bars: [Bar] { [bar(nil)] }
    private static func bar(_ value: Double?) -> Bar {
        Bar("CPU of a page that is read to find whether it was written, of ksmd's", value, atMost: 1, "times")
    }

    func run(into report: inout Report) throws {
        let other = try StandIn(pageCount, programs)
        let rig = try MergeRig(pageCount, periodMilliseconds: 200, tracksWrites: false, programs)
        for page in 0..<pageCount {
            other.set(page, UInt64(page + 1))
            rig.standIn.set(page, UInt64(page + 1))
        }
        try other.fill(0..<pageCount)
        try rig.standIn.fill(0..<pageCount)
        rig.begin()
        // Three rounds through all of it, and every page was looked up once.
        _ = try rig.work { $0.hashedPages >= 5 * pageCount }
        rig.pause(true)
        if KernelMerging.hasSmartScan { try KernelMerging.set("smart_scan", 0) }
        try KernelMerging.set("pages_to_scan", 20_000)
        let first = KernelMerging.get("full_scans")
        _ = try kernel.work { KernelMerging.get("full_scans") >= first + 3 }

        var ours: [Double] = [], theirs: [Double] = []
        for round in 1...rounds {
            progress("untracked: round \(round) of \(rounds)")
            rig.pause(false)
            let from = rig.engine.snapshot.hashedPages
            let work = try rig.work { $0.hashedPages >= from + UInt64(pageCount) }
            rig.pause(true)
            ours.append(work.cpu.all / Double(work.statistics.hashedPages - from) / 1000)
            let scanned = KernelMerging.get("pages_scanned")
            let scan = try kernel.work { KernelMerging.get("pages_scanned") >= scanned + pageCount }
            theirs.append(scan.cpu / Double(scan.scanned) / 1000)
        }
        guard rig.engine.snapshot.sharingPages == 0 else { throw QuireError(.system, "pages were merged that have no equal") }
        try rig.standIn.verify(0..<pageCount)
        let ratios = zip(ours, theirs).map { $0 / $1 }
        var table = Table(
            title: "reading \(pageCount / 256) MiB that do not change, untracked: microseconds of CPU a page; \(rounds) rounds, ours and ksmd's in turn",
            columns: ["", "CPU us"])
        table.row("Quire, all its processes", ours.spread)
        table.row("ksmd, every page", theirs.spread)
        report.add("untracked", [
            "pages": .integer(pageCount), "rounds": .integer(rounds), "quire_cpu_us": ours.json, "ksmd_cpu_us": theirs.json,
            "ratios": ratios.json,
        ], table: table)
        report.add(Self.bar(median(ratios)))
    }
}
