import Bench
import Glibc
import Platform

/// What a guest's first write to a page that is shared costs it: the kernel copies the page, here as there. One program
/// writes a byte to merged pages in random order and takes each time by itself; ours and KSM's take turns, nothing else of
/// either works meanwhile. Once pages were read before, and so are mapped when they are written; once they were not, which
/// for KSM makes no difference: it leaves them mapped.
struct CopyOnWrite {
    let pageCount: Int
    let rounds: Int
    let kernel: KernelMerging
    let programs: Programs

    private static let kinds = [(1, true), (1, false), (64, true), (64, false)]
    private static func name(_ run: Int, _ isRead: Bool) -> String {
        (run == 1 ? "alone" : "in runs of \(run)") + (isRead ? ", read before" : ", not read before")
    }
    static var bars: [Bar] { kinds.flatMap { [middle($0, $1, nil), tail($0, $1, nil)] } }
    private static func middle(_ run: Int, _ isRead: Bool, _ value: Double?) -> Bar {
        Bar("median of a write to a merged page (\(name(run, isRead))), of KSM's", value, atMost: 1.5, "times")
    }
    private static func tail(_ run: Int, _ isRead: Bool, _ value: Double?) -> Bar {
        Bar("99th percentile of the same (\(name(run, isRead)))", value, atMost: 3, "times")
    }

    func run(into report: inout Report) throws {
        try KernelMerging.allowMappings(4 * pageCount)
        if KernelMerging.hasSmartScan { try KernelMerging.set("smart_scan", 1) }
        try KernelMerging.set("pages_to_scan", 20_000)
        var table = Table(
            title: "a write to a merged page: microseconds; \(2 * rounds) rounds of ours and KSM's in turn",
            columns: ["", "writes", "KSM median", "Quire", "ratio", "KSM p99", "Quire", "ratio"])
        var results: [JSON] = []
        for run in [1, 64] {
            progress("write: \(Self.name(run, true))")
            let other = try StandIn(pageCount, programs)
            let rig = try MergeRig(pageCount, programs)
            var contents = [UInt64](repeating: 0, count: pageCount)
            let pages = Layout.pairs(pageCount, run: run) { contents[$0] = $1 }
            for standIn in [other, rig.standIn] {
                for page in 0..<pageCount { standIn.set(page, contents[page]) }
                try standIn.fill(0..<pageCount)
            }
            rig.begin()
            _ = try rig.work { $0.sharingPages >= UInt64(Double(pages) * 0.999) }
            rig.pause(true)
            _ = try kernel.work { KernelMerging.mergedPages(of: other.pid) >= Int(Double(pages) * 0.999) }
            try rig.standIn.verify(0..<pageCount)

            // The second of each pair, so that its content stays shared... by whom does not matter to the copy.
            var merged = (pageCount / 2..<pageCount).filter { contents[$0] != UInt64($0 + 1) }
            var noise = Noise(11)
            merged.shuffle(using: &noise)
            let each = merged.count / (2 * rounds)
            for (place, page) in merged.enumerated() {
                other.set(place, UInt64(page))
                rig.standIn.set(place, UInt64(page))
            }
            for isRead in [true, false] {
                var ours: [[Double]] = [], theirs: [[Double]] = []
                for round in 0..<rounds {
                    let first = (round + (isRead ? 0 : rounds)) * each
                    let places = first..<first + each
                    if isRead {
                        try rig.standIn.read(places)
                        try other.read(places)
                    }
                    ours.append(try rig.standIn.write(places).sorted())
                    theirs.append(try other.write(places).sorted())
                }
                func at(_ share: Double, _ samples: [[Double]]) -> [Double] {
                    samples.map { $0[min($0.count - 1, Int(Double($0.count) * share))] / 1000 }
                }
                let middles = zip(at(0.5, ours), at(0.5, theirs)).map { $0 / $1 }
                let tails = zip(at(0.99, ours), at(0.99, theirs)).map { $0 / $1 }
                table.row(
                    Self.name(run, isRead), "\(each * rounds)", at(0.5, theirs).spread, at(0.5, ours).spread, middles.spread,
                    at(0.99, theirs).spread, at(0.99, ours).spread, tails.spread)
                results.append([
                    "run": .integer(run), "read_before": .bool(isRead), "writes": .integer(each * rounds),
                    "ksm_median_us": at(0.5, theirs).json, "quire_median_us": at(0.5, ours).json, "median_ratios": middles.json,
                    "ksm_p99_us": at(0.99, theirs).json, "quire_p99_us": at(0.99, ours).json, "p99_ratios": tails.json,
                ])
                report.add(Self.middle(run, isRead, median(middles)))
                report.add(Self.tail(run, isRead, median(tails)))
            }
        }
        report.add("write", .array(results), table: table)
    }
}
