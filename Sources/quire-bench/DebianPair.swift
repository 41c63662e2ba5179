import Bench
import Glibc
import Host
import Platform

/// Two idle guests of the same kind: how many of their pages are saved. Once both run under `quire run` with quired; once
/// their RAM is private memory, and ksmd looks through it. Each pair is left until nothing more is saved for a while.
///
/// Saved are, with Quire, pages of zeros and pages that share, less those that the guest has a copy of its own of and
/// less the slots of the store; with KSM, `ksm_merging_pages` and
/// `ksm_zero_pages` of both, less the `pages_shared` that are kept once. Private memory is without huge pages
/// here, as memory files are by default: in huge pages KSM also counts as saved what a guest never touched.
struct DebianPair {
    let mebibytes: Int
    let kernel: KernelMerging
    let programs: Programs

    static var bars: [Bar] { [bar(nil), metadata(nil)] }
    private static func bar(_ value: Double?) -> Bar {
        Bar("pages saved of two idle Debian guests, of what KSM saves", value, atLeast: 1, "times")
    }

    private static func metadata(_ value: Double?) -> Bar {
        Bar("metadata of two idle Debian guests over their RAM, without mappings", value, atMost: 0.5, "%")
    }

    func run(into report: inout Report) throws {
        var table = Table(
            title: "two idle Debian guests of \(mebibytes) MiB: pages; one run each",
            columns: ["", "saved", "MiB", "zeros", "sharing", "kept once", "of these for one page", "diverged", "settled after"])
        let ours = try quire()
        table.row(
            "Quire", "\(ours.saved)", "\(ours.saved / 256)", "\(ours.zero)", "\(ours.sharing)", "\(ours.slots)", "\(ours.lonely)",
            "\(ours.diverged)",
            Table.number(ours.seconds) + " s")
        let theirs = try ksm()
        table.row(
            "KSM", "\(theirs.saved)", "\(theirs.saved / 256)", "\(theirs.zero)", "\(theirs.sharing)", "\(theirs.slots)", "", "",
            Table.number(theirs.seconds) + " s")
        let ram = Double(2 * mebibytes) * 1048576
        func percent(_ bytes: Double) -> String { Table.number(bytes / ram * 100) }
        let memory = ours.memory
        table.note(
            "Metadata of Quire's, % of guest RAM: page maps \(percent(memory.map)), bitmaps \(percent(memory.bitmaps)), ledgers "
                + "\(percent(memory.ledger)), index and slots \(percent(memory.index)), candidates \(percent(memory.candidates)).")
        func json(_ pair: Pair) -> JSON {
            [
                "saved_pages": .integer(pair.saved), "zero_pages": .integer(pair.zero), "sharing_pages": .integer(pair.sharing),
                "kept_pages": .integer(pair.slots), "kept_for_one_page": .integer(pair.lonely),
                "diverged_pages": .integer(pair.diverged), "seconds": .number(pair.seconds),
            ]
        }
        report.add("guests", ["mebibytes": .integer(mebibytes), "quire": json(ours), "ksm": json(theirs), "metadata": memory.json], table: table)
        report.add(Self.bar(Double(ours.saved) / Double(theirs.saved)))
        report.add(Self.metadata(memory.all / ram * 100))
    }

    struct Pair {
        var zero = 0, sharing = 0, slots = 0, lonely = 0, diverged = 0
        var saved = 0
        var seconds = 0.0
        var memory = Metadata()
    }

    private func options(_ isQuire: Bool) -> GuestMachine.Options {
        var options = GuestMachine.Options(
            accelerator: programs.hasKVM ? ["-accel", "kvm", "-cpu", "host,vmx=off,svm=off"] : ["-accel", "tcg,thread=multi"])
        options.mebibytes = mebibytes
        if isQuire {
            // Nothing to recycle without the module: pages that the guest freed are merged here as they are there.
            options.period = "10s"
            options.mergePeriod = "1s"
        } else {
            options.isPrivate = true
        }
        return options
    }

    /// Calls `look` every second, until nothing is gained for 15.
    private func settle(_ look: () throws -> Pair) throws -> Pair {
        let began = monotonicNanoseconds()
        var best = try look(), at = began
        while monotonicNanoseconds() - at < 15_000_000_000 {
            guard monotonicNanoseconds() - began < 240_000_000_000 else { break }
            ProcessCalls.sleep(milliseconds: 1000)
            var now = try look()
            now.seconds = Double(monotonicNanoseconds() - began) / 1e9
            // A few pages come and go all the time.
            if now.saved > best.saved + best.saved / 500 {
                best = now
                at = monotonicNanoseconds()
            }
        }
        var last = try look()
        last.seconds = best.seconds
        return last
    }

    private func quire() throws -> Pair {
        let store = try Store(programs)
        _ = unsafe setenv("QUIRED_DIRECTORY", String(store.path.dropLast("/store.sock".count)), 1)
        let first = try GuestMachine("pair-1", options(true), programs)
        let second = try GuestMachine("pair-2", options(true), programs)
        return try settle {
            let reports = try StatusReport.collect([first.name, second.name], in: RuntimeDirectory.standard())
            let figures = try store.figures
            var pair = Pair()
            for report in reports {
                pair.zero += Int(report.merging.zeroPages)
                pair.diverged += Int(report.merging.divergedPages)
                pair.sharing += Int(report.merging.sharingPages)
            }
            pair.slots = Int(figures.sharedPages)
            pair.lonely = Int(figures.histogram[0])
            pair.saved = pair.zero + pair.sharing - pair.diverged - pair.slots
            pair.memory = Metadata(
                figures, mapBytes: reports.reduce(0) { $0 + $1.mapBytes }, pageCount: 2 * mebibytes * 256)
            return pair
        }
    }

    private func ksm() throws -> Pair {
        if KernelMerging.hasSmartScan { try KernelMerging.set("smart_scan", 0) }
        try? KernelMerging.set("use_zero_pages", 1)
        try KernelMerging.refuseHugePages()
        try KernelMerging.set("pages_to_scan", 5_000)
        try KernelMerging.set("sleep_millisecs", 5)
        defer { try? KernelMerging.set("sleep_millisecs", 0) }
        // What ended before is counted until ksmd comes by. The rest is of others on this host.
        try KernelMerging.set("run", 1)
        defer { try? KernelMerging.set("run", 0) }
        ProcessCalls.sleep(milliseconds: 5000)
        let kept = KernelMerging.get("pages_shared")
        let first = try GuestMachine("pair-ksm-1", options(false), programs)
        let second = try GuestMachine("pair-ksm-2", options(false), programs)
        return try settle {
            var pair = Pair()
            for guest in [first, second] {
                pair.zero += KernelMerging.zeroPages(of: guest.pid)
                pair.sharing += KernelMerging.mergedPages(of: guest.pid)
            }
            pair.slots = KernelMerging.get("pages_shared") - kept
            pair.saved = pair.zero + pair.sharing - pair.slots
            return pair
        }
    }
}
