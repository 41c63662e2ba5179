import Glibc
import Host
import Platform
import Testing

/// What a test boots.
struct Machine {
    var kernel = Kernel.v6_1
    var qemu = QEMU.distribution
    /// For -m: the size, and what may follow it.
    var memory = "512M"
    /// Further arguments of QEMU.
    var arguments: [String] = []
    /// Of `quire run`.
    var options: [String] = []
    /// The host's configuration: none, whatever this machine has.
    var configuration = "/dev/null"
    /// Nil: what the configuration says.
    var period: String? = Guest.period
    /// What runs `quire run`, with it as arguments; empty: nobody.
    var wrapper: [String] = []
    var commandLine = "panic=1 quiet"
    /// The kernel is started as a boot loader would. A kernel that was started by its PVH entry does not wake from suspend.
    var startsPacked = false
    /// See `QEMU.acceleration`.
    var patchesCodeUnderLoad = false
    /// The guest starts by itself; not with -incoming.
    var boots = true
    var name = "guest"

    func with(_ change: (inout Machine) -> Void) -> Machine {
        var copy = self
        change(&copy)
        return copy
    }
}

/// A guest under `quire run`, with everything that a test sees of it: its console, QEMU's monitor, the status, and the
/// host's memory. Its end ends every process that it started, by number.
final class Guest {
    let machine: Machine
    let folder: Folder
    let console: Console
    let qmp: QMP
    let view: HostView
    private var process: ChildProcess
    private let directory: RuntimeDirectory
    /// Where `quire` finds it.
    var runtime: RuntimeDirectory { directory }
    private let errors: String

    /// Short, so that a test sees many of them; what takes a period on a host takes this here.
    static let period = "500ms"

    static func kernelArguments(_ machine: Machine) -> [String] {
        [
            "-kernel", machine.startsPacked ? machine.kernel.image : machine.kernel.unpacked, "-initrd", machine.kernel.initramfs,
            // The kernel's tests of its own ciphers are half a second of every emulated boot.
            "-append", "console=ttyS0 cryptomgr.notests " + machine.commandLine,
        ]
    }

    /// Starts `machine`; returns when its shell is ready. `folder` holds the runtime directory and the sockets.
    init(_ machine: Machine = Machine(), in folder: Folder? = nil) throws {
        ProcessCalls.ignoreBrokenPipes()
        let folder = try folder ?? Folder()
        var toGuest = try Pipe(), fromGuest = try Pipe()
        let monitor = "\(folder.path)/qmp-\(UInt32.random(in: 0 ... .max))"
        let errors = "\(folder.path)/errors-\(UInt32.random(in: 0 ... .max))"
        let base = folder.path + "/run"
        var options = ChildProcess.Options()
        let stdin = toGuest.takeReader(), stdout = fromGuest.takeWriter()
        let log = try Descriptor.open(errors, O_RDWR | O_CREAT | O_APPEND)
        options.passing = [
            .init(from: stdin.raw, to: 0), .init(from: stdout.raw, to: 1), .init(from: log.raw, to: 2),
        ]
        // If the tests are killed, SIGTERM ends quire run, and that its children.
        options.parentDeathSignal = SIGTERM
        var process = try ChildProcess(
            ["env", "QUIRE_RUNTIME_DIR=" + base] + machine.wrapper + [Program.quire, "run", "--name", machine.name, "--config", machine.configuration]
                + (machine.period.map { ["--period", $0] } ?? []) + machine.options + ["--", machine.qemu.program] + machine.qemu.acceleration(for: machine.kernel, patchingCode: machine.patchesCodeUnderLoad)
                + ["-m", machine.memory, "-smp", "2", "-display", "none", "-monitor", "none", "-serial", "stdio"]
                // Their firmware takes its time at every boot, and no guest here looks at them.
                + ["-nic", "none", "-vga", "none"]
                + ["-qmp", "unix:\(monitor),server=on,wait=off", "-device", "virtio-rng-pci"]
                + Self.kernelArguments(machine) + machine.arguments, options)
        self.machine = machine
        self.folder = folder
        self.errors = errors
        directory = RuntimeDirectory(base: base)
        console = Console(input: toGuest.takeWriter(), output: fromGuest.takeReader())
        do {
            qmp = try QMP(path: monitor) { process.poll() == nil }
            view = try HostView(holder: process.pid)
            self.process = process
        } catch {
            process.signal(SIGTERM)
            process.wait()
            throw Trouble("\(error)\n--- stderr ---\n\((try? Files.read(errors)) ?? "")")
        }
        if machine.boots { try expectReady() }
    }

    /// Waits until it has booted for the first time.
    func expectReady() throws {
        try watched {
            try console.expectReady { [self] in
                let registers = try qmp.command("human-monitor-command", ["command-line": .string("info registers -a")]).text ?? ""
                try qmp.command("system_reset")
                return registers
            }
        }
    }

    deinit { end() }

    // MARK: Processes

    var pid: Int32 { process.pid }
    /// QEMU's: the second in the lock file.
    var qemuPID: Int32 {
        let text = (try? Files.read(directory.folder(machine.name) + "/lock")) ?? ""
        let words = text.split(whereSeparator: \.isWhitespace)
        return words.count > 1 ? Int32(words[1]) ?? 0 : 0
    }
    var backendPID: Int32 { status.pid }
    var isRunning: Bool { process.poll() == nil }

    /// Ends it as a user would, and if that does not help, by force.
    func end() {
        guard process.poll() == nil else { return }
        let qemu = qemuPID, backend = backendPID
        process.signal(SIGCONT)
        process.signal(SIGTERM)
        let deadline = monotonicNanoseconds() + 15_000_000_000
        while process.poll() == nil && monotonicNanoseconds() < deadline {
            try? console.drain(20)
        }
        if process.poll() == nil {
            for pid in [process.pid, qemu, backend] where pid > 0 { ProcessCalls.signal(pid, SIGKILL) }
            process.wait()
        }
    }

    /// Waits for QEMU to end by itself.
    func waitForEnd(within seconds: Double = Effort.patience) throws -> Int32 {
        try waitUntil("the end of quire run", within: seconds) {
            try console.drain(20)
            return process.poll() != nil
        }
        return process.wait().shellStatus
    }

    func signal(_ number: Int32) { process.signal(number) }
    /// How often QEMU could not start the control disk.
    var failedStarts: Int { stderr.ranges(of: "vhost start failed").count }
    var stderr: String { (try? Files.read(errors)) ?? "" }

    // MARK: Failures with their context

    /// Runs a part of a test; if it fails, the guest's log and ours are printed.
    func watched<R>(_ body: () throws -> R) throws -> R {
        do { return try body() } catch let error as Failure {
            throw error
        } catch {
            throw Failure(error: error, log: report)
        }
    }

    /// An error with everything around it.
    struct Failure: Error, CustomStringConvertible {
        let error: any Error
        let log: String
        var description: String { "\(error)\n\(log)" }
    }

    var report: String {
        """
        --- status: \(status.state) \(status.reason), backend \(status.pid), restarts \(status.restarts), \
        recycled \(status.recycledTotalPages), resident \(view.residentBytes >> 20) MiB
        --- stderr of quire run, its backends and QEMU ---
        \(stderr)
        --- console ---
        \(console.log.suffix(6000))
        --- end ---
        """
    }

    // MARK: The guest

    /// Runs a command in the guest's shell.
    func run(_ command: String, within seconds: Double = Effort.patience) throws -> (text: String, status: Int) {
        try watched { try console.finish(console.start(command), within: seconds) }
    }

    /// Runs a command that has to succeed; returns what it says.
    @discardableResult func sh(_ command: String, within seconds: Double = Effort.patience) throws -> String {
        try watched {
            let (text, status) = try console.finish(console.start(command), within: seconds)
            guard status == 0 else { throw Trouble("in the guest: \(command): status \(status): \(text)\(dmesg)") }
            return text
        }
    }

    private var dmesg: String {
        guard let marker = try? console.start("dmesg | tail -n 30"),
            let (text, _) = try? console.finish(marker, within: 20)
        else { return "" }
        return "\n--- dmesg ---\n" + text
    }

    /// Seconds of load take longer than seconds, on a busy machine under emulation.
    static func patience(for seconds: Int) -> Double { Double(seconds) * 4 + Effort.patience }

    /// Writes, frees, takes and checks memory for so long: zero wrong bytes, or an error.
    func churn(_ mebibytes: Int = 200, seconds: Int = Effort.churnSeconds, _ more: String = "--threads 2") throws {
        let text = try sh("quire-load churn \(mebibytes) \(seconds) \(more)", within: Self.patience(for: seconds))
        guard text.contains("ok ") else { throw Trouble("churn: \(text)") }
    }

    func loadModule() throws { try sh("insmod /lib/quire/quire.ko") }

    /// One number of /sys/kernel/debug/quire/{state,counters}.
    func figure(_ name: String) throws -> Int {
        let text = try sh("cat /sys/kernel/debug/quire/state /sys/kernel/debug/quire/counters | grep '^\(name) '")
        return Int(text.split(whereSeparator: \.isWhitespace).last ?? "") ?? -1
    }

    /// No lockup, no stall, no complaint in the kernel's log.
    func expectQuietLog() throws {
        let (text, status) = try run(
            "dmesg | grep -E 'BUG|WARNING|Oops|soft lockup|hard LOCKUP|rcu.*stall|hung task|blocked for more|I/O error|Bad page|quire: (the host|no table)'")
        guard status != 0 else { throw Failure(error: Trouble("the guest's log: \(text)"), log: report) }
    }

    // MARK: The host

    /// What the backend says of itself.
    var status: StatusReport { StatusReport.read(machine.name, in: directory) }

    /// The same as a user sees it.
    func statusCommand() throws -> StatusReport {
        let text = try host("env", "QUIRE_RUNTIME_DIR=" + directory.base, Program.quire, "status", "--json", machine.name)
        let reports: [StatusReport] = try decodeJSON(text)
        guard reports.count == 1 else { throw Trouble("quire status --json: \(text)") }
        return reports[0]
    }

    func wait(
        for what: String, within seconds: Double = Effort.patience, _ condition: () throws -> Bool
    ) throws {
        try watched {
            try waitUntil(what, within: seconds) {
                try console.drain()
                return try condition()
            }
        }
    }

    func waitForActive() throws { try wait(for: "an active guest") { status.state == .active } }

    /// Another backend serves the guest than the one that was ended.
    func waitForSuccessor(of pid: Int32) throws {
        try wait(for: "a successor of backend \(pid)") { backendPID != pid && status.state == .active }
    }

    /// Waits until so many more pages were recycled.
    func waitForRecycling(pages: UInt64 = 256) throws {
        let before = status.recycledTotalPages
        try wait(for: "\(pages) recycled pages after \(before)") { status.recycledTotalPages >= before + pages }
    }

    /// Waits until nothing is left to recycle; returns what is resident then.
    @discardableResult func settle() throws -> UInt64 {
        var last = view.residentBytes, since = monotonicNanoseconds()
        try wait(for: "recycling to settle") {
            let now = view.residentBytes
            if now + (1 << 20) < last || now > last + (4 << 20) {
                last = now
                since = monotonicNanoseconds()
            }
            let figures = status
            return figures.state == .active && figures.freeMarkedPages < 2048 && figures.ageMilliseconds < 3000
                && monotonicNanoseconds() - since > 2_000_000_000
        }
        return view.residentBytes
    }

    /// Recycling works: what a load freed goes back to the host.
    func expectRecycling(mebibytes: Int = 100) throws {
        try sh("quire-load hold \(mebibytes) 0 >/dev/null", within: Self.patience(for: 10))
        try waitForRecycling(pages: UInt64(mebibytes) * 256 / 2)
    }
}

// MARK: - Load that goes on while a test does something to the host

extension Guest {
    /// Churn in the background, again and again; beside it somebody who takes much memory at once, so that what was free
    /// for long is taken, too, and claims are met.
    func startChurn(_ mebibytes: Int = 200, grabbing grab: Int = 100, file: String? = nil) throws {
        let directory = file.map { " --file \($0)" } ?? ""
        try sh(
            """
            rm -f /tmp/stop /tmp/churn /tmp/grab; \
            (n=1; while [ ! -e /tmp/stop ]; do n=$((n+1)); quire-load churn \(mebibytes) 1 --threads 2 --seed $n\(directory) \
            >>/tmp/churn 2>&1 || break; done) & \
            (while [ ! -e /tmp/stop ]; do quire-load verify-zero \(grab) >>/tmp/grab 2>&1 || break; sleep 1; done) &
            """)
    }

    /// Lines that the background load has written: it is alive as long as they grow.
    func churnProgress() throws -> Int { Int(try sh("cat /tmp/churn /tmp/grab 2>/dev/null | wc -l").filter(\.isNumber)) ?? 0 }

    /// The load goes on, and nothing was wrong so far.
    func expectChurnGoesOn() throws {
        let before = try churnProgress()
        try wait(for: "the guest's load to go on", within: Effort.patience * 2) { try churnProgress() >= before + 2 }
        try checkChurn()
    }

    private func checkChurn() throws {
        let text = try sh("cat /tmp/churn /tmp/grab 2>/dev/null; true")
        for line in text.split(separator: "\n") where !line.hasPrefix("ok ") {
            throw Failure(error: Trouble("the guest's load says: \(line)"), log: report)
        }
    }

    /// Ends the background load: not one byte was wrong.
    func stopChurn() throws {
        try sh("touch /tmp/stop; wait", within: Effort.patience * 2)
        try checkChurn()
        guard try churnProgress() > 0 else { throw Failure(error: Trouble("the load did nothing"), log: report) }
    }
}

// MARK: - Catching the backend at a bad moment

extension Guest {
    /// Stops a process, and waits until every thread of it stands.
    static func freeze(_ pid: Int32) -> Bool {
        guard pid > 0, ProcessCalls.signal(pid, SIGSTOP) else { return false }
        let deadline = monotonicNanoseconds() + 200_000_000
        while monotonicNanoseconds() < deadline {
            let threads = Files.list("/proc/\(pid)/task") ?? []
            let standing = threads.allSatisfy { thread in
                guard let text = try? Files.read("/proc/\(pid)/task/\(thread)/stat", limit: 1024),
                    let end = text.lastIndex(of: ")")
                else { return false }
                return text[end...].dropFirst(2).first == "T"
            }
            if standing && !threads.isEmpty { return true }
        }
        return false
    }

    /// Freezes the backend while a claim is open, and returns its number. Whoever calls this must kill it or let it go on.
    func freezeInClaim(within seconds: Double = Effort.patience) throws -> Int32 {
        let deadline = monotonicNanoseconds() + UInt64(seconds * 1e9)
        var tries = 0
        while monotonicNanoseconds() < deadline {
            try watched { try console.drain() }
            let pid = backendPID
            guard status.state == .active else {
                ProcessCalls.sleep(milliseconds: 20)
                continue
            }
            // Aimed: a claim is open for microseconds, most of them inside one system call, which is finished first.
            let aim = monotonicNanoseconds() + 20_000_000
            while view.openClaims.isEmpty && monotonicNanoseconds() < aim {}
            guard !view.openClaims.isEmpty else { continue }
            tries += 1
            if Self.freeze(pid), !view.openClaims.isEmpty { return pid }
            ProcessCalls.signal(pid, SIGCONT)
        }
        throw Failure(error: Trouble("no claim was caught in \(tries) tries"), log: report)
    }
}
