import ArgumentParser
import Bench
import Glibc
import Host
import Platform
import StoreProtocol
import TestSupport

/// What it takes to look at many VMs, and what they cost while nobody looks. The VMs are synthetic: status pages that
/// nobody writes, members of the page store that ask for nothing.
struct StatusCost: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "status", abstract: "quire status, /metrics and idle cost with 500 VMs; the start of a domain of libvirt.")

    @Flag(help: "Fewer repetitions, a shorter window: for a look, not for figures to quote.")
    var quick = false

    static let count = 500
    private static let answerLimit = 50.0, idleLimit = 0.2

    func run() throws {
        do { try measure() } catch let error as QuireError {
            writeStandardError("quire-bench: \(error)")
            throw ExitCode(1)
        }
    }

    private func measure() throws {
        guard let own = Files.target(ofLink: "/proc/self/exe"), let slash = own.lastIndex(of: "/") else {
            throw QuireError(.system, "/proc is not mounted")
        }
        let folder = own[..<slash] + "/"
        for name in ["quire", "quired", "quire-exporter"] where Files.identity(of: folder + name) == nil {
            throw QuireError(.invalid, "there is no \(folder)\(name): run make build")
        }
        ProcessCalls.ignoreBrokenPipes()
        ProcessCalls.raiseFileLimit()
        let runtime = try Recycle.makeRuntimeDirectory()
        defer { Files.removeDirectory(runtime) }
        let store = runtime + "/store", sockets = store + "/metrics.sock"
        var report = Report(benchmark: "status", machine: Machine.describe(qemu: "none", accelerator: "none"), show: Recycle.show)

        progress("\(Self.count) VMs")
        let vms = try SyntheticVMs(Self.count, base: runtime + "/vms")
        let quired = try Child([folder + "quired", "--directory", store, "--limit", "256M", "--log-level", "error"])
        guard ProcessCalls.isRoot else { throw QuireError(.invalid, "quired takes so many VMs of root's only: run this as root") }
        let path = store + "/store.sock"
        guard eventually(milliseconds: 20_000, { (try? StoreClient.figures(path: path)) != nil }) else {
            throw QuireError(.system, "quired does not serve")
        }
        let members = try SyntheticStoreVMs(vms.names, path: path)
        let exporter = try Child([
            folder + "quire-exporter", "--http", "off", "--http-socket", sockets, "--store", path, "--runtime-directory",
            vms.directory.base,
        ])
        guard eventually(milliseconds: 20_000, { (try? Self.fetch(sockets)) != nil }) else {
            throw QuireError(.system, "quire-exporter does not serve")
        }

        let rounds = quick ? 5 : 21
        unsafe setenv("QUIRE_RUNTIME_DIR", vms.directory.base, 1)
        var table = Table(title: "\(Self.count) VMs: milliseconds to an answer, median of \(rounds)", columns: ["", "ms", "bytes"])
        var results: [(String, JSON)] = []
        func measure(_ name: String, _ bar: String, pause: UInt32, _ body: () throws -> Int) throws {
            var bytes = 0
            var times: [Double] = []
            for _ in 0..<rounds {
                ProcessCalls.sleep(milliseconds: pause)
                let started = monotonicNanoseconds()
                bytes = try body()
                times.append(Double(monotonicNanoseconds() - started) / 1e6)
            }
            table.row(name, times.spread, "\(bytes)")
            results.append((name, ["ms": times.json, "bytes": .integer(bytes)]))
            report.add(Bar(bar, median(times), atMost: Self.answerLimit, "ms"))
        }
        for (name, options) in [("quire status", []), ("quire status --json", ["--json"])] as [(String, [String])] {
            try measure(name, "\(name), \(Self.count) VMs", pause: 10) { try Self.output([folder + "quire", "status"] + options) }
        }
        // Findings are reused for half a second: every request here has to read anew.
        try measure("/metrics", "/metrics, \(Self.count) VMs", pause: 600) { try Self.fetch(sockets) }
        table.note("quire status with the start of its process; /metrics over the Unix socket, each time read anew.")
        report.add("answers", .object(results), table: table)

        let seconds = quick ? 20 : 60
        progress("idle for \(seconds) s")
        ProcessCalls.sleep(milliseconds: 2000)
        func sample() -> (at: UInt64, quired: UInt64, exporter: UInt64) {
            (monotonicNanoseconds(), cpuNanoseconds(of: quired.pid), cpuNanoseconds(of: exporter.pid))
        }
        let before = sample()
        ProcessCalls.sleep(milliseconds: UInt32(seconds) * 1000)
        let after = sample()
        func share(_ used: UInt64) -> Double { Double(used) / Double(after.at - before.at) * 100 }
        let store2 = share(after.quired - before.quired), rest = share(after.exporter - before.exporter)
        var idle = Table(title: "idle with \(Self.count) VMs: % of one CPU over \(seconds) s", columns: ["", "%"])
        idle.row("quired", Table.number(store2))
        idle.row("quire-exporter", Table.number(rest))
        idle.note("The exporter takes a picture for its history every 15 s.")
        report.add("idle", ["quired_percent": .number(store2), "exporter_percent": .number(rest), "seconds": .integer(seconds)], table: idle)
        report.add(Bar("idle CPU of quired and exporter, \(Self.count) VMs", store2 + rest, atMost: Self.idleLimit, "% of one CPU"))
        withExtendedLifetime((vms, members)) {}

        let starts = quick ? 5 : 21
        progress("\(starts) starts of two domains")
        do throws(QuireError) { try StartTime(rounds: starts, programs: String(folder)).run(into: &report) } catch {
            report.fail("start", error.description, bars: StartTime.bars)
        }

        report.machine.append(("load_after", .text(Machine.load)))
        Recycle.show(report.conclusion)
        print(report.json.line)
        exporter.end()
        quired.end()
        Files.removeDirectory(store)
        guard report.holds else { throw ExitCode(1) }
    }

    /// How many bytes a command writes.
    private static func output(_ arguments: [String]) throws(QuireError) -> Int {
        var pipe = try Pipe()
        let writer = pipe.takeWriter(), reader = pipe.takeReader()
        var options = ChildProcess.Options()
        options.passing = [.init(from: writer.raw, to: 1)]
        var child = try ChildProcess(arguments, options)
        _ = consume writer
        let count = try reader.readAll(limit: 1 << 24).count
        guard child.wait() == .exited(0) else { throw QuireError(.system, "\(arguments[0]) failed") }
        return count
    }

    /// The size of an answer to GET /metrics.
    private static func fetch(_ path: String) throws(QuireError) -> Int {
        let socket = try UnixSocket.connect(to: path)
        try socket.send(Array("GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".utf8))
        let bytes = try socket.descriptor.readAll(limit: 1 << 24)
        guard bytes.starts(with: "HTTP/1.1 200 ".utf8) else { throw QuireError(.system, "/metrics: no answer") }
        return bytes.count
    }

    /// Ended with the value, if not before.
    private final class Child {
        private var process: ChildProcess
        init(_ arguments: [String]) throws(QuireError) {
            var options = ChildProcess.Options()
            options.parentDeathSignal = SIGTERM
            process = try ChildProcess(arguments, options)
        }
        var pid: Int32 { process.pid }
        func end() {
            if process.poll() == nil { process.signal(SIGTERM) }
            process.wait()
        }
        deinit { end() }
    }
}
