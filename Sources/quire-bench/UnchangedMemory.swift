import Bench
import Glibc
import Platform

/// What a pass costs over memory in which nothing changes and nothing is equal: ours, everything that the backend does
/// from one pass to the next with what it causes elsewhere; ksmd's, a scan of as many pages. They take turns; the bar is on
/// the median of the ratios of neighbours.
///
/// ksmd's scan is one that looks at every page (`smart_scan` off). With it on, ksmd leaves out pages that it found nothing
/// for the last times, up to eight scans in a row; that is shown, too.
struct UnchangedMemory {
    let pageCount: Int
    let rounds: Int
    let kernel: KernelMerging
    let programs: Programs
    private static let passes: UInt64 = 10

    static var bars: [Bar] { [bar(nil)] }
    private static func bar(_ value: Double?) -> Bar {
        Bar("CPU of a pass over memory that does not change, of ksmd's over the same", value, atMost: 1.0 / 200, "times")
    }

    func run(into report: inout Report) throws {
        let other = try StandIn(pageCount, programs)
        let rig = try MergeRig(pageCount, periodMilliseconds: 50, programs)
        for page in 0..<pageCount {
            other.set(page, UInt64(page + 1))
            rig.standIn.set(page, UInt64(page + 1))
        }
        try other.fill(0..<pageCount)
        try rig.standIn.fill(0..<pageCount)
        rig.begin()
        var settled: UInt64?
        _ = try rig.work {
            if $0.hashedPages >= pageCount, settled == nil { settled = $0.passes }
            guard let settled else { return false }
            return $0.passes > settled + 20
        }
        rig.pause(true)
        let hashed = rig.engine.snapshot.hashedPages
        if KernelMerging.hasSmartScan { try KernelMerging.set("smart_scan", 0) }
        try KernelMerging.set("pages_to_scan", 20_000)
        let first = KernelMerging.get("full_scans")
        _ = try kernel.work { KernelMerging.get("full_scans") >= first + 3 }

        var ours: [Double] = [], theirs: [Double] = []
        for _ in 0..<rounds {
            rig.pause(false)
            let from = rig.engine.snapshot.passes
            let work = try rig.work { $0.passes >= from + Self.passes }
            rig.pause(true)
            ours.append(work.cpu.all / Double(work.statistics.passes - from) / 1e6)
            let scanned = KernelMerging.get("pages_scanned")
            let scan = try kernel.work { KernelMerging.get("pages_scanned") >= scanned + pageCount }
            theirs.append(scan.cpu / Double(scan.scanned) * Double(pageCount) / 1e6)
        }
        guard rig.engine.snapshot.hashedPages == hashed else { throw QuireError(.system, "pages were hashed that did not change") }
        try rig.standIn.verify(0..<pageCount)
        var lazy: Double?
        if KernelMerging.hasSmartScan {
            try KernelMerging.set("smart_scan", 1)
            // They age first.
            let young = KernelMerging.get("full_scans")
            _ = try kernel.work { KernelMerging.get("full_scans") >= young + 10 }
            let scans = KernelMerging.get("full_scans")
            let work = try kernel.work { KernelMerging.get("full_scans") >= scans + 18 }
            lazy = work.cpu / Double(work.scans) / 1e6
        }
        let ratios = zip(ours, theirs).map { $0 / $1 }
        var table = Table(
            title: "a pass over \(pageCount / 256) MiB that do not change: milliseconds of CPU; \(rounds) rounds, ours and ksmd's in turn",
            columns: ["", "CPU ms", "over ours"])
        table.row("Quire, all its processes", ours.spread)
        table.row("ksmd, every page", theirs.spread, Table.number(1 / median(ratios)))
        if let lazy { table.row("ksmd, smart_scan on, mean of 18 scans", Table.number(lazy), Table.number(lazy / median(ours))) }
        table.note("A round of ours is \(Self.passes) passes. Where nothing changes they come a period apart at first, later four.")
        report.add("unchanged", [
            "pages": .integer(pageCount), "rounds": .integer(rounds), "quire_cpu_ms": ours.json, "ksmd_cpu_ms": theirs.json,
            "ksmd_smart_scan_cpu_ms": lazy.map { .number($0) } ?? .null, "ratios": ratios.json,
        ], table: table)
        report.add(Self.bar(median(ratios)))
    }
}
