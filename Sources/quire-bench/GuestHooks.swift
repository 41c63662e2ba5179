import Bench
import Platform

/// What quire.ko adds to the guest's page allocator, in instructions: QEMU with `-icount shift=0` gives every instruction a
/// nanosecond, and the guest's time stamp counter counts them. quire_bench.ko runs before and after quire.ko is loaded, in
/// the same boot; each of its figures is the best of 40 batches, and the median of three runs of it is taken.
struct GuestHooks {
    let lines: [String]
    let programs: Programs
    private static let kinds = ["pair0", "pair1", "pair3", "pair9", "bulk64", "vmalloc16", "vmalloc256"]
    private static let names = [
        "page, allocated and freed", "2 pages", "8 pages", "512 pages", "64 pages in bulk", "vmalloc of 16 pages",
        "vmalloc of 256 pages",
    ]

    static func bars(_ lines: [String]) -> [Bar] { lines.flatMap { bars($0, nil, nil) } }
    private static func bars(_ line: String, _ pair: Double?, _ vmalloc: Double?) -> [Bar] {
        [
            Bar("guest hooks on \(line): more for a page allocated and freed", pair, atMost: 80, "instructions"),
            Bar("guest hooks on \(line): vmalloc-heavy allocation, over without the module", vmalloc, atMost: 1.3, "times"),
        ]
    }

    /// Returns the module's memory over guest RAM, by kernel.
    func run(into report: inout Report) throws -> [(line: String, share: Double)] {
        var shares: [(String, Double)] = []
        for line in lines {
            do {
                shares.append((line, try run(line, into: &report)))
            } catch {
                report.fail("guest_hooks_\(line)", "\(error)", bars: Self.bars(line, nil, nil))
            }
        }
        return shares
    }

    private func run(_ line: String, into report: inout Report) throws -> Double {
        let mebibytes = 512
        var options = GuestMachine.Options(accelerator: ["-accel", "tcg", "-icount", "shift=0", "-cpu", "qemu64,-cx16"])
        options.line = line
        options.mebibytes = mebibytes
        options.period = "10s"
        let guest = try GuestMachine("hooks-\(line)", options, programs)
        progress("\(guest.name): counting instructions without quire.ko")
        let bare = try count(guest, "bare")
        try guest.run("insmod /lib/quire/quire.ko", seconds: 300)
        progress("\(guest.name): counting instructions with quire.ko")
        let quire = try count(guest, "quire")
        let state = try guest.figures("/sys/kernel/debug/quire/state")
        guard state["registered"] == 1, state["marking"] == 1 else { throw QuireError(.guest, "the module does not mark") }

        var table = Table(
            title: "guest hooks on Linux \(line): instructions, QEMU -icount shift=0; medians of 3",
            columns: ["", "without", "with quire.ko", "more", "ratio"])
        var results: [(String, JSON)] = []
        for (kind, name) in zip(Self.kinds, Self.names) {
            guard let a = bare[kind], let b = quire[kind] else { throw QuireError(.system, "quire_bench.ko says no \(kind)") }
            table.row(name, Table.number(a), Table.number(b), Table.number(b - a), Table.number(b / a))
            results.append((kind, ["without": .number(a), "with": .number(b), "more": .number(b - a), "ratio": .number(b / a)]))
        }
        report.add("guest_hooks_\(line)", .object(results), table: table)
        let vmalloc = ["vmalloc16", "vmalloc256"].map { quire[$0]! / bare[$0]! }.max()!
        for bar in Self.bars(line, quire["pair0"]! - bare["pair0"]!, vmalloc) { report.add(bar) }
        return Double(state["metadata_bytes"] ?? 0) / (Double(mebibytes) * 1048576)
    }

    private func count(_ guest: GuestMachine, _ label: String) throws -> [String: Double] {
        var seen: [String: [Double]] = [:]
        for number in 1...3 {
            // The module measures while it loads, and then refuses to stay.
            try guest.run("insmod /lib/quire/quire_bench.ko label=\(label)\(number) 2>/dev/null; true", seconds: 600)
            for word in try guest.run("dmesg | grep 'quire_bench: \(label)\(number) '").split(whereSeparator: \.isWhitespace) {
                let pair = word.split(separator: "=")
                if pair.count == 2, let value = Double(pair[1]) { seen[String(pair[0]), default: []].append(value) }
            }
        }
        return seen.mapValues(median)
    }
}
