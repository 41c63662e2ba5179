import ArgumentParser
import Bench
import Engines
import Glibc
import Host
import Platform

struct TmemBench: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "tmem",
        abstract: "The transcendent memory engine, beside the host's zram.",
        discussion: "Parts: pages (as root: makes a zram device and removes it), threads, churn, restart, capacity and guest (boot guests).")

    @OptionGroup var options: PartOptions

    static let parts = ["pages", "threads", "churn", "restart", "capacity", "guest"]

    func validate() throws {
        try options.check(Self.parts)
    }

    func run() throws {
        ProcessCalls.ignoreBrokenPipes()
        let programs = try? Programs(guests: options.guests)
        var report = Report(
            benchmark: "tmem",
            machine: Machine.describe(
                qemu: programs?.qemuVersion ?? "none", accelerator: programs?.hasKVM == true ? "KVM" : "TCG"),
            show: Recycle.show)
        func part(_ name: String, bars: [Bar], _ body: (inout Report) throws -> Void) {
            options.run(name, bars: bars, into: &report, body)
        }
        part("pages", bars: TmemPages.bars) {
            try TmemPages(pageCount: options.quick ? 8192 : 32768, rounds: options.quick ? 3 : 7).run(into: &$0)
        }
        part("threads", bars: TmemPages.threadBars) {
            try TmemPages(pageCount: options.quick ? 8192 : 32768, rounds: options.quick ? 3 : 7).threads(into: &$0)
        }
        part("churn", bars: TmemChurn.bars) {
            try TmemChurn(pageCount: options.quick ? 60_000 : 400_000, steps: options.quick ? 400_000 : 6_000_000).run(into: &$0)
        }
        part("restart", bars: TmemRestart.bars) { try TmemRestart(gibibytes: options.quick ? 1 : 4).run(into: &$0) }
        part("capacity", bars: TmemCapacity.bars) {
            guard let programs else { throw QuireError(.invalid, "there are no programs and guests: run make build guest") }
            try TmemCapacity(mebibytes: 512, programs: programs).run(into: &$0)
        }
        part("guest", bars: []) {
            guard let programs else { throw QuireError(.invalid, "there are no programs and guests: run make build guest") }
            try TmemGuest(programs: programs).run(into: &$0)
        }
        report.machine.append(("load_after", .text(Machine.load)))
        Recycle.show(report.conclusion)
        print(report.json.line)
        guard report.holds else { throw ExitCode(1) }
    }
}

/// Pages in a row in memory, aligned as O_DIRECT asks for.
final class PageSet: Sendable {
    let count: Int
    private let mapping: Mapping

    init(_ count: Int) throws(QuireError) {
        self.count = count
        mapping = try Mapping(anonymousByteCount: count * 4096)
        for page in 0..<count { mapping.store64(page * 4096, 0) }
    }

    func fill(_ page: Int, _ bytes: [UInt8]) { mapping.copyIn(page * 4096, bytes) }
    func bytes(_ page: Int) -> [UInt8] { mapping.copyOut(page * 4096, count: 4096) }
    func equals(_ page: Int, _ other: PageSet, _ otherPage: Int) -> Bool {
        mapping.equals(page * 4096, other.mapping, otherPage * 4096, count: 4096)
    }
    func read(_ page: Int, from raw: Int32, at position: Int) -> Bool {
        mapping.read(raw, at: UInt64(position * 4096), to: page * 4096, count: 4096) == 4096
    }
    func write(_ page: Int, to raw: Int32, at position: Int) -> Bool {
        mapping.write(raw, at: UInt64(position * 4096), from: page * 4096, count: 4096) == 4096
    }
    func put(_ page: Int, to pool: TmemPool, _ index: Int) throws(QuireError) {
        // A span of bytes that this object keeps.
        let bytes = unsafe UnsafeRawBufferPointer(start: mapping.address(page * 4096, count: 4096), count: 4096)
        try pool.put(0, UInt32(index), unsafe bytes.bytes)
    }
    func get(_ page: Int, from pool: TmemPool, _ index: Int) throws(QuireError) -> Bool {
        // As above.
        let bytes = unsafe UnsafeMutableRawBufferPointer(start: mapping.address(page * 4096, count: 4096), count: 4096)
        var span = unsafe bytes.mutableBytes
        return try pool.get(0, UInt32(index), into: &span)
    }
}

/// A repeatable source of numbers (SplitMix64).
struct BenchRandom: RandomNumberGenerator {
    var state: UInt64
    mutating func next() -> UInt64 {
        state &+= 0x9e37_79b9_7f4a_7c15
        var z = state
        z = (z ^ (z >> 30)) &* 0xbf58_476d_1ce4_e5b9
        z = (z ^ (z >> 27)) &* 0x94d0_49bb_1331_11eb
        return z ^ (z >> 31)
    }
}
