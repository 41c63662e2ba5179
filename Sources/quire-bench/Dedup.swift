import ArgumentParser
import Bench
import Glibc
import Host
import Platform

struct Dedup: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "The dedup engine, its agent and its store, beside the kernel's own merging (KSM).",
        discussion: """
            Parts: unchanged, untracked, merge, write, guests, growth, equal, index. The bars on metadata come with merge. KSM's settings and \
            vm.max_map_count are changed meanwhile and restored at the end, whatever the end.
            """)

    @OptionGroup var options: PartOptions

    @Option(
        name: .customLong("run"),
        help: ArgumentHelp("In part merge only runs of so many pages; repeatable.", valueName: "pages"))
    var runs: [Int] = []

    static let parts = ["unchanged", "untracked", "merge", "write", "guests", "growth", "equal", "index"]

    func validate() throws {
        for run in runs where !MergeCost.runs.contains(run) {
            throw ValidationError("--run \(run): choose of \(MergeCost.runs)")
        }
        try options.check(Self.parts)
    }

    func run() throws {
        var programs: Programs
        let kernel: KernelMerging
        do {
            programs = try Programs(guests: options.guests)
            programs.runtime = try Recycle.makeRuntimeDirectory()
            kernel = try KernelMerging(programs)
        } catch {
            writeStandardError("quire-bench: \(error)")
            throw ExitCode(1)
        }
        defer {
            kernel.end()
            Files.removeDirectory(programs.runtime)
        }
        ProcessCalls.ignoreBrokenPipes()
        ProcessCalls.raiseFileLimit()
        _ = Cycles.tscPerNanosecond

        var report = Report(
            benchmark: "dedup",
            machine: Machine.describe(qemu: programs.qemuVersion, accelerator: programs.hasKVM ? "KVM" : "TCG"),
            show: Recycle.show)
        func part(_ name: String, bars: [Bar], _ body: (inout Report) throws -> Void) {
            options.run(name, bars: bars, into: &report, body)
        }
        let gibibyte = 1 << 18
        let size = options.quick ? gibibyte / 4 : gibibyte
        part("unchanged", bars: UnchangedMemory.bars) {
            try UnchangedMemory(pageCount: size, rounds: options.quick ? 3 : 7, kernel: kernel, programs: programs).run(into: &$0)
        }
        part("untracked", bars: UntrackedMemory.bars) {
            try UntrackedMemory(pageCount: size / 8, rounds: options.quick ? 3 : 7, kernel: kernel, programs: programs).run(into: &$0)
        }
        part("merge", bars: MergeCost.bars) {
            try MergeCost(runs: runs.isEmpty ? MergeCost.runs : runs, pageCount: size, rounds: options.quick ? 1 : 3, kernel: kernel, programs: programs).run(into: &$0)
        }
        part("write", bars: CopyOnWrite.bars) {
            try CopyOnWrite(pageCount: size / 2, rounds: options.quick ? 3 : 7, kernel: kernel, programs: programs).run(into: &$0)
        }
        part("guests", bars: DebianPair.bars) {
            try DebianPair(mebibytes: 512, kernel: kernel, programs: programs).run(into: &$0)
        }
        part("growth", bars: Growth.bars) {
            try Growth(gibibytes: options.quick ? 4 : 16, kernel: kernel, programs: programs).run(into: &$0)
        }
        part("equal", bars: EqualPages.bars) {
            try EqualPages(pageCount: options.quick ? size : 4 * gibibyte, steps: 4, kernel: kernel, programs: programs).run(into: &$0)
        }
        // A 64th of the entries has to be more than caches hold, or it is those that the rest is compared with.
        part("index", bars: IndexGrowth.bars) { try IndexGrowth(pagesEach: options.quick ? 3200 : 6400).run(into: &$0) }
        report.machine.append(("load_after", .text(Machine.load)))
        Recycle.show(report.conclusion)
        print(report.json.line)
        guard report.holds else { throw ExitCode(1) }
    }
}

extension [Double] {
    /// For a table: the middle one, and between which the others are.
    var spread: String { "\(Table.number(median(self))) (\(Table.number(self.min() ?? .nan)) to \(Table.number(self.max() ?? .nan)))" }
    var json: JSON { .array(map { .number($0) }) }
}
