import Bench
import Glibc
import Host
import Platform

/// Where the programs and the guests are.
struct Programs: Sendable {
    let own: String
    let quire: String
    let quired: String
    /// The agent that QEMU loads.
    let agent: String
    /// For whatever a benchmark needs in files.
    var runtime = "/tmp"
    /// What scripts/guest-build made.
    let guests: String
    /// What scripts/guest-assets prepared.
    let cache: String
    let qemu = "qemu-system-x86_64"

    init(guests: String) throws(QuireError) {
        guard let own = Files.target(ofLink: "/proc/self/exe"), let slash = own.lastIndex(of: "/") else {
            throw QuireError(.system, "/proc is not mounted")
        }
        self.own = own
        quire = own[..<slash] + "/quire"
        quired = own[..<slash] + "/quired"
        agent = own[..<slash] + "/libquire-agent.so"
        self.guests = guests
        let base = ProcessCalls.environment("XDG_CACHE_HOME") ?? (ProcessCalls.environment("HOME") ?? "/root") + "/.cache"
        cache = base + "/quire"
        for path in [quire, quired, agent] where Files.identity(of: path) == nil {
            throw QuireError(.invalid, "there is no \(path): run make build")
        }
    }

    /// Whether guests run on this host's CPU: scripts/accelerator has tried.
    var hasKVM: Bool { (try? Files.read(guests + "/accelerator"))?.hasPrefix("kvm") ?? false }

    var qemuVersion: String {
        let text = (try? ChildProcess.output(of: [qemu, "--version"])) ?? ""
        return text.split(separator: "\n").first.map { String($0).replacing("QEMU emulator version ", with: "") } ?? "unknown"
    }
}

/// One QEMU with a test guest in it, driven over its serial console (Tests/guest/init says how that behaves).
final class GuestMachine {
    struct Options {
        /// The kernel's line, 6.1 or 6.12.
        var line = "6.1"
        var mebibytes = 1024
        var accelerator: [String]
        /// Under `quire run` with this period, or bare.
        var period: String?
        var devices: [String] = []
        /// Under `quire run`: merging with this period.
        var mergePeriod: String?
        /// Further options of `quire run`.
        var run: [String] = []
        /// Bare: RAM that KSM may merge, instead of a memory file. Without huge pages, as files have none.
        var isPrivate = false
    }

    let name: String
    /// QEMU's process, where it runs bare.
    var pid: Int32 { child.pid }
    private let options: Options
    private var child: ChildProcess
    private let input: Descriptor
    private let output: Descriptor
    private var text = ""
    private var marks = 0

    init(_ name: String, _ options: Options, _ programs: Programs) throws {
        self.name = name
        self.options = options
        let kernel = "\(programs.cache)/guest/\(options.line)/vmlinuz"
        let initramfs = "\(programs.guests)/\(options.line)/initramfs"
        for path in [kernel, initramfs] where Files.identity(of: path) == nil {
            throw QuireError(.invalid, "there is no \(path): run make guest")
        }
        var command: [String] = []
        if let period = options.period {
            command += [programs.quire, "run", "--config", "/dev/null", "--name", name, "--period", period]
            command += options.mergePeriod.map { ["--merge-period", $0] } ?? ["--no-merge"]
            command += options.run + ["--"]
        }
        command += [
            programs.qemu, "-name", name, "-m", "\(options.mebibytes)M", "-nodefaults", "-no-user-config", "-display", "none",
            "-serial", "stdio", "-monitor", "none", "-no-reboot", "-kernel", kernel, "-initrd", initramfs,
            "-append", "console=ttyS0 panic=-1",
        ]
        command += options.accelerator
        if options.isPrivate {
            command += ["-machine", "q35,mem-merge=on"]
        } else if options.period == nil {
            command += ["-object", "memory-backend-memfd,id=ram0,size=\(options.mebibytes)M,share=on"]
            command += ["-machine", "q35,memory-backend=ram0"]
        } else {
            command += ["-machine", "q35"]
        }
        command += options.devices
        var to = try Pipe(), from = try Pipe()
        var child = ChildProcess.Options()
        child.passing = [
            ProcessCalls.Passed(from: to.reader.raw()!, to: 0), ProcessCalls.Passed(from: from.writer.raw()!, to: 1),
        ]
        child.parentDeathSignal = SIGTERM
        // Ctrl-C is for the benchmark, which ends its guests.
        child.ownGroup = true
        self.child = try ChildProcess(command, child)
        to.closeReader()
        from.closeWriter()
        input = to.takeWriter()
        output = from.takeReader()
        progress("\(name): booting \(options.line), \(options.mebibytes) MiB")
        _ = try read(until: "quire-guest: ready\n", seconds: 300)
    }

    deinit {
        child.signal(SIGTERM)
        let deadline = monotonicNanoseconds() + 10_000_000_000
        while child.poll() == nil, monotonicNanoseconds() < deadline { ProcessCalls.sleep(milliseconds: 20) }
        child.signal(SIGKILL)
        child.wait()
    }

    /// What the console says up to `marker`.
    func read(until marker: String, seconds: Int) throws -> String {
        let deadline = monotonicNanoseconds() + UInt64(seconds) * 1_000_000_000
        while true {
            if let found = text.firstRange(of: marker) {
                let before = String(text[..<found.lowerBound])
                text = String(text[found.upperBound...])
                return before
            }
            guard monotonicNanoseconds() < deadline else {
                throw QuireError(.system, "\(name): no '\(marker.prefix(40))' within \(seconds) s, but: \(text.suffix(300))")
            }
            guard !waitReadable([output.raw], timeoutMilliseconds: 200).isEmpty else { continue }
            var buffer = [UInt8](repeating: 0, count: 65536)
            let count = unsafe Glibc.read(output.raw, &buffer, buffer.count)
            guard count > 0 else {
                throw QuireError(.closed, "\(name): QEMU ended (\(child.wait())): \(text.suffix(300))")
            }
            text += String(decoding: buffer[..<count], as: UTF8.self)
        }
    }

    func send(_ line: String) throws {
        let bytes = Array((line + "\n").utf8)
        guard unsafe write(input.raw, bytes, bytes.count) == bytes.count else {
            throw QuireError(.closed, "\(name): QEMU does not read its console")
        }
    }

    /// Runs a command; what it says. Throws if it fails.
    @discardableResult func run(_ command: String, seconds: Int = 120) throws -> String {
        marks += 1
        try send("\(command); echo \"done-\(marks)\"=$?")
        let said = try read(until: "done-\(marks)=", seconds: seconds)
        let status = try read(until: "\n", seconds: 10)
        guard status == "0" else { throw QuireError(.system, "\(name): '\(command)' failed with \(status): \(said.suffix(300))") }
        return said
    }

    /// `key value` lines of a file in the guest.
    func figures(_ path: String) throws -> [String: Int] {
        var result: [String: Int] = [:]
        for line in try run("cat \(path)").split(separator: "\n") {
            let words = line.split(whereSeparator: { $0 == " " || $0 == ":" })
            if words.count >= 2, let value = Int(words[1]) { result[String(words[0])] = value }
        }
        return result
    }

    /// The memory file of guest RAM, opened anew: as QEMU has it.
    func memoryFile() throws -> Descriptor {
        let pid: Int32
        if options.period == nil {
            pid = child.pid
        } else {
            let lock = try Files.read(RuntimeDirectory.standard().folder(name) + "/lock")
            guard let number = lock.split(separator: "\n").last.flatMap({ Int32($0) }) else {
                throw QuireError(.system, "\(name): quire run has not noted QEMU's process")
            }
            pid = number
        }
        let folder = "/proc/\(pid)/fd"
        for number in Files.list(folder) ?? [] {
            guard Files.target(ofLink: "\(folder)/\(number)")?.hasPrefix("/memfd:") == true,
                let file = try? Descriptor.open("\(folder)/\(number)", O_RDWR),
                let status = try? file.status(), status.byteCount == UInt64(options.mebibytes) << 20
            else { continue }
            return file
        }
        throw QuireError(.system, "\(name): QEMU has no memory file of \(options.mebibytes) MiB")
    }
}
