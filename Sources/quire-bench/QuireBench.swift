import ArgumentParser
import Bench
import Glibc
import Host
import Platform

@main
struct QuireBench: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "quire-bench",
        abstract: "Measures Quire against its bars.",
        discussion: """
            Progress goes to stderr. On stdout: a table for people as each part ends, then all bars, and as the last line one \
            JSON object with benchmark, machine, results and bars. Exit status: 0 only if every bar holds.
            """,
        version: quireVersion,
        subcommands: [
            Recycle.self, Dedup.self, TmemBench.self, StatusCost.self, TouchMemory.self, FakeQEMU.self, KeepSettings.self,
            GuestStandIn.self,
        ])
}

struct Recycle: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "The recycle engine and the guest module.",
        discussion: "Parts: host, agent, threads, idle, fragmented, hooks. The bars on metadata come with host, fragmented and hooks.")

    @OptionGroup var options: PartOptions

    static let parts = ["host", "agent", "threads", "idle", "fragmented", "hooks"]

    func validate() throws {
        try options.check(Self.parts)
    }

    func run() throws {
        let programs: Programs
        let runtime: String
        do {
            programs = try Programs(guests: options.guests)
            runtime = try Self.makeRuntimeDirectory()
        } catch {
            writeStandardError("quire-bench: \(error)")
            throw ExitCode(1)
        }
        defer { Files.removeDirectory(runtime) }
        ProcessCalls.ignoreBrokenPipes()
        var agentPrograms = programs
        agentPrograms.runtime = runtime

        let accelerator = programs.hasKVM ? ["-accel", "kvm", "-cpu", "host,vmx=off,svm=off", "-smp", "2"] : ["-accel", "tcg,thread=multi", "-smp", "2"]
        var report = Report(
            benchmark: "recycle",
            machine: Machine.describe(qemu: programs.qemuVersion, accelerator: programs.hasKVM ? "KVM; TCG for instructions" : "TCG"),
            show: Self.show)
        func part(_ name: String, bars: [Bar], _ body: (inout Report) throws -> Void) {
            options.run(name, bars: bars, into: &report, body)
        }

        var guestShares: [(String, Double)] = []
        var hostShares: [(String, Double)] = []
        let pages = (options.quick ? 512 : 1024) * 256
        part("host", bars: HostCost.bars(agent: false)) {
            hostShares.append(("all recycled, without a guest", try HostCost(pageCount: pages, repetitions: options.quick ? 3 : 7).run(into: &$0)))
        }
        part("agent", bars: HostCost.bars(agent: true)) {
            let cost = HostCost(pageCount: pages / 2, repetitions: options.quick ? 3 : 21, agentOf: agentPrograms)
            hostShares.append(("all recycled by the agent", try cost.run(into: &$0)))
        }
        part("threads", bars: []) { try Threads(pageCount: pages, repetitions: options.quick ? 2 : 3).run(into: &$0) }
        part("idle", bars: IdleCPU.bars) { try IdleCPU(windows: options.quick ? 1 : 4, programs: programs).run(into: &$0) }
        part("fragmented", bars: Fragmented.bars) {
            let found = try Fragmented(
                mebibytes: options.quick ? 512 : 1024, periodMilliseconds: 10_000, accelerator: accelerator, programs: programs
            ).run(into: &$0)
            guestShares.append(("6.1, fragmented guest", found.guestShare))
            hostShares.append(("fragmented guest", found.hostShare))
        }
        let lines = options.quick ? ["6.1"] : ["6.1", "6.12"]
        part("hooks", bars: GuestHooks.bars(lines)) {
            for (line, share) in try GuestHooks(lines: lines, programs: programs).run(into: &$0) {
                guestShares.append(("\(line), 512 MiB", share))
            }
        }
        metadata(guestShares, hostShares, &report)
        report.machine.append(("load_after", .text(Machine.load)))

        Self.show(report.conclusion)
        print(report.json.line)
        guard report.holds else { throw ExitCode(1) }
    }

    /// At once, also where stdout is a pipe or a file.
    @Sendable static func show(_ text: String) {
        print(text)
        fflush(nil)
    }

    private func metadata(_ guest: [(String, Double)], _ host: [(String, Double)], _ report: inout Report) {
        guard options.only.isEmpty || !guest.isEmpty || !host.isEmpty else { return }
        var table = Table(title: "metadata over guest RAM", columns: ["", "of guest RAM"])
        for (name, share) in guest { table.row("in the guest (\(name))", Table.percent(share)) }
        for (name, share) in host { table.row("on the host (\(name))", Table.percent(share)) }
        table.note("Guest: state table, directory and what goes with them, as the module counts. Host: memory of the page map.")
        func list(_ shares: [(String, Double)]) -> JSON { .object(shares.map { ($0.0, .number($0.1 * 100)) }) }
        report.add("metadata_percent", ["guest": list(guest), "host": list(host)], table: table)
        if options.only.isEmpty || !guest.isEmpty {
            report.add(Bar("metadata in the guest", guest.map(\.1).max().map { $0 * 100 }, atMost: 0.05, "% of guest RAM"))
        }
        if options.only.isEmpty || !host.isEmpty {
            report.add(Bar("metadata on the host", host.map(\.1).max().map { $0 * 100 }, atMost: 0.25, "% of guest RAM"))
        }
    }

    /// The VMs of a benchmark are not among the user's.
    static func makeRuntimeDirectory() throws(QuireError) -> String {
        let base = (ProcessCalls.environment("TMPDIR") ?? "/tmp") + "/quire-bench-\(ProcessCalls.ownPID)"
        try Files.makeDirectory(base, mode: 0o700)
        unsafe setenv("QUIRE_RUNTIME_DIR", base, 1)
        return base
    }
}
