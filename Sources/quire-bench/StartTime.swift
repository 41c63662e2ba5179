import Bench
import Glibc
import Host
import Platform
import TestSupport

/// What an enabled domain's start takes more than another's: two domains of a real libvirtd that differ in Quire alone, started one
/// after the other, again and again. Their guests have nothing to boot: libvirt says that a domain is started when its CPUs run.
struct StartTime {
    let rounds: Int
    /// Of the programs, with a slash behind it.
    let programs: String

    private static let limit = 300.0
    static var bars: [Bar] { [bar(nil)] }
    private static func bar(_ value: Double?) -> Bar {
        Bar("what enabling a domain adds to its start, median of pairs", value, atMost: limit, "ms")
    }

    func run(into report: inout Report) throws(QuireError) {
        let libvirt = try Libvirt(programs)
        try libvirt.virsh("define", libvirt.domain("plain"))
        try libvirt.virsh("define", libvirt.domain("enabled"))
        _ = try libvirt.command(["/run/programs/quire", "libvirt", "enable", "enabled"])

        func start(_ name: String) throws(QuireError) -> Double {
            let before = monotonicNanoseconds()
            try libvirt.virsh("start", name)
            let time = Double(monotonicNanoseconds() - before) / 1e6
            try libvirt.virsh("destroy", name)
            return time
        }
        // The first one has libvirt ask QEMU what it can do.
        for name in ["plain", "enabled"] { _ = try start(name) }
        var plain: [Double] = [], enabled: [Double] = []
        for round in 0..<rounds {
            // Who comes first has it neither easier nor harder.
            for name in round % 2 == 0 ? ["plain", "enabled"] : ["enabled", "plain"] {
                let time = try start(name)
                if name == "plain" { plain.append(time) } else { enabled.append(time) }
            }
        }
        let more = zip(enabled, plain).map { $0 - $1 }
        var table = Table(title: "virsh start, until it returns: milliseconds, median of \(rounds)", columns: ["domain", "ms"])
        table.row("without Quire", plain.spread)
        table.row("enabled", enabled.spread)
        table.row("difference of pairs", more.spread)
        table.note("256 MiB, emulated, a libvirtd of its own; with the start of virsh. No systemd is here: the hook starts quire serve itself.")
        table.note("What systemd and a service's sandbox take besides, `make test` prints for a booted Debian (build/test-services.log).")
        report.add("start", ["plain_ms": plain.json, "enabled_ms": enabled.json, "difference_ms": more.json], table: table)
        report.add(Self.bar(median(more)))
    }

    /// libvirtd and quired in a mount namespace of their own; they end with the value.
    private final class Libvirt {
        private var process: ChildProcess
        private var quired: ChildProcess
        private let folder: String

        init(_ programs: String) throws(QuireError) {
            guard ProcessCalls.isRoot else { throw QuireError(.invalid, "libvirtd's system mode needs root") }
            let folder = (ProcessCalls.environment("TMPDIR") ?? "/tmp") + "/quire-bench-libvirt-\(ProcessCalls.ownPID)"
            try Files.makeDirectory(folder, mode: 0o755)
            var options = ChildProcess.Options()
            options.parentDeathSignal = SIGTERM
            options.ownGroup = true
            let log = try Descriptor.open(folder + "/log", O_RDWR | O_CREAT | O_APPEND)
            options.passing = [.init(from: log.raw, to: 1), .init(from: log.raw, to: 2)]
            var process = try ChildProcess(
                ["unshare", "--mount", "--propagation", "private", Self.script, String(programs.dropLast())], options)
            let pid = process.pid
            guard eventually(milliseconds: 30_000, { (try? Self.output(pid, ["virsh", "uri"])) != nil }) else {
                process.signal(SIGTERM)
                process.wait()
                throw QuireError(.system, "libvirtd does not serve: \((try? Files.read(folder + "/log")) ?? "")")
            }
            quired = try ChildProcess(
                Self.inside(pid) + ["/run/programs/quired", "--config", "/dev/null", "--limit", "256M", "--log-level", "error"], options)
            self.process = process
            self.folder = folder
        }

        private static var script: String {
            var path = Substring(#filePath)
            for _ in 0..<3 { path = path[..<(path.lastIndex(of: "/") ?? path.startIndex)] }
            return path + "/Tests/libvirt/private-libvirtd"
        }

        /// Other parts of the benchmark have a runtime directory of their own.
        private static func inside(_ pid: Int32) -> [String] {
            ["env", "-u", "QUIRE_RUNTIME_DIR", "nsenter", "-t", "\(pid)", "--mount"]
        }

        /// What a command says, both ways.
        private static func output(_ pid: Int32, _ arguments: [String]) throws(QuireError) -> String {
            var pipe = try Pipe()
            let writer = pipe.takeWriter(), reader = pipe.takeReader()
            var options = ChildProcess.Options()
            options.passing = [.init(from: writer.raw, to: 1), .init(from: writer.raw, to: 2)]
            var child = try ChildProcess(inside(pid) + arguments, options)
            _ = consume writer
            let text = String(decoding: try reader.readAll(limit: 1 << 20), as: UTF8.self)
            guard child.wait() == .exited(0) else { throw QuireError(.system, "\(arguments.joined(separator: " ")): \(text)") }
            return text
        }

        func command(_ arguments: [String]) throws(QuireError) -> String { try Self.output(process.pid, arguments) }
        func virsh(_ arguments: String...) throws(QuireError) { _ = try command(["virsh", "-q"] + arguments) }

        /// A file with a domain's definition.
        func domain(_ name: String) throws(QuireError) -> String {
            let path = "\(folder)/\(name).xml"
            try Descriptor.open(path, O_RDWR | O_CREAT).replaceContent(
                """
                <domain type='qemu'>
                  <name>\(name)</name><memory unit='MiB'>256</memory><vcpu>2</vcpu>
                  <os><type arch='x86_64' machine='q35'>hvm</type></os>
                  <devices><memballoon model='none'/></devices>
                </domain>
                """)
            return path
        }

        deinit {
            for name in ["plain", "enabled"] { try? virsh("destroy", name) }
            if let text = try? Files.read("/proc/\(process.pid)/root/run/virtlogd.pid"), let pid = Int32(text.filter(\.isNumber)) {
                ProcessCalls.signal(pid, SIGTERM)
            }
            for name in ["log", "plain.xml", "enabled.xml"] { Files.remove(folder + "/" + name) }
            Files.removeDirectory(folder)
            quired.signal(SIGTERM)
            quired.wait()
            process.signal(SIGTERM)
            process.wait()
        }
    }
}
