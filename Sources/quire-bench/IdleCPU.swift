import Bench
import Glibc
import Host
import Platform

/// What Quire uses of the CPU while a guest has nothing to recycle: the supervisor and the backend of `quire run`, all
/// their threads, as the kernel accounts for them. The guest is a stand-in (FakeQEMU), so that its size is not limited by
/// this machine and nothing of it wakes anybody up.
struct IdleCPU {
    static let limit = 0.1
    /// Several windows, each of whole periods, one after the other.
    let windows: Int
    static let windowSeconds = 20
    let programs: Programs

    static var bars: [Bar] { [bar(nil)] }
    private static func bar(_ value: Double?) -> Bar {
        Bar("CPU with nothing to recycle, 16 GiB of guest RAM, period 10 s", value, atMost: limit, "% of one CPU")
    }

    func run(into report: inout Report) throws {
        var table = Table(
            title: "CPU with nothing to recycle, period 10 s: % of one CPU, medians of \(windows) windows of \(Self.windowSeconds) s",
            columns: ["guest RAM", "backend", "supervisor", "together", "windows seen"])
        var results: [JSON] = []
        // The guests are idle, so they are measured at the same time.
        var guests: [Guest] = []
        for gibibytes in [1, 16] { guests.append(try Guest(gibibytes, programs)) }
        for guest in guests { try guest.awaitRegistration() }
        progress("idle CPU: settling for 12 s")
        ProcessCalls.sleep(milliseconds: 12_000)
        var samples = guests.map { [$0.sample] }
        for window in 1...windows {
            progress("idle CPU: window \(window) of \(windows), \(Self.windowSeconds) s")
            ProcessCalls.sleep(milliseconds: UInt32(Self.windowSeconds) * 1000)
            for (index, guest) in guests.enumerated() { samples[index].append(guest.sample) }
        }
        for (guest, seen) in zip(guests, samples) {
            guard try guest.report().state == .active else { throw QuireError(.system, "the guest is not registered any more") }
            func shares(_ what: (Guest.Sample) -> UInt64) -> [Double] {
                zip(seen, seen.dropFirst()).map { Double(what($1) - what($0)) / Double($1.at - $0.at) * 100 }
            }
            let backend = median(shares(\.backend)), supervisor = median(shares(\.supervisor))
            let together = shares { $0.backend + $0.supervisor }
            table.row(
                "\(guest.gibibytes) GiB", Table.number(backend), Table.number(supervisor), Table.number(median(together)),
                "\(Table.number(together.min()!)) to \(Table.number(together.max()!))")
            results.append([
                "guest_gib": .integer(guest.gibibytes), "period_ms": 10_000,
                "seconds": .number(Double(seen.last!.at - seen.first!.at) / 1e9), "backend_percent": .number(backend),
                "supervisor_percent": .number(supervisor), "percent": .number(median(together)),
                "window_percents": .array(together.map { .number($0) }),
            ])
            if guest.gibibytes == 16 { report.add(Self.bar(median(together))) }
        }
        table.note("Both processes of 'quire run'; the bar is on their sum. PPR's daemon: 5 %.")
        report.add("idle_cpu", .array(results), table: table)
    }

    private final class Guest {
        let gibibytes: Int
        private let name: String
        private var run: ChildProcess
        private var backend: Int32 = 0
        private let directory: RuntimeDirectory

        struct Sample {
            let at: UInt64, backend: UInt64, supervisor: UInt64
        }

        init(_ gibibytes: Int, _ programs: Programs) throws {
            self.gibibytes = gibibytes
            name = "idle-\(gibibytes)g"
            directory = try RuntimeDirectory.standard()
            var options = ChildProcess.Options()
            options.parentDeathSignal = SIGTERM
            run = try ChildProcess(
                [programs.quire, "run", "--config", "/dev/null", "--name", name, "--period", "10s", "--", programs.own, "fake-qemu", "-enable-kvm", "-m", "\(gibibytes)G"],
                options)
        }

        deinit {
            run.signal(SIGTERM)
            run.wait()
        }

        func report() throws -> StatusReport {
            guard let found = try StatusReport.collect([name], in: directory).first else {
                throw QuireError(.system, "\(name) is not running")
            }
            return found
        }

        func awaitRegistration() throws {
            let deadline = monotonicNanoseconds() + 30_000_000_000
            while true {
                if let status = try? report(), status.state == .active {
                    backend = status.pid
                    return
                }
                guard run.poll() == nil, monotonicNanoseconds() < deadline else {
                    throw QuireError(.system, "the stand-in for QEMU could not register its table")
                }
                ProcessCalls.sleep(milliseconds: 100)
            }
        }

        var sample: Sample {
            Sample(
                at: monotonicNanoseconds(), backend: cpuNanoseconds(of: backend), supervisor: cpuNanoseconds(of: run.pid))
        }
    }
}
