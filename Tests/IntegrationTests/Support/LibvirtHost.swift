import Glibc
import Host
import Platform
import TestSupport

/// A real libvirtd in a mount namespace of its own, with the hook installed. Its end ends every domain and every process that
/// the test started, by number.
final class LibvirtHost {
    let folder: Folder
    private var process: ChildProcess
    private let errors: String
    /// quired, where a test wants it; and who follows libvirt's events.
    private var store: ChildProcess?
    private var follower: ChildProcess?

    /// `uuid`: of the host, where there are two.
    init(uuid: String = "") throws {
        ProcessCalls.ignoreBrokenPipes()
        folder = try Folder()
        errors = folder.path + "/errors"
        var options = ChildProcess.Options()
        let log = try Descriptor.open(errors, O_RDWR | O_CREAT | O_APPEND)
        let null = try Descriptor.open("/dev/null", O_RDONLY)
        options.passing = [.init(from: null.raw, to: 0), .init(from: log.raw, to: 1), .init(from: log.raw, to: 2)]
        options.ownGroup = true
        options.parentDeathSignal = SIGTERM
        options.variables = ["HOST_UUID": uuid]
        process = try ChildProcess(
            [
                "unshare", "--mount", "--propagation", "private", Program.top + "/Tests/libvirt/private-libvirtd", products,
                Program.top + "/build/guest/6.1",
            ], options)
        do {
            try waitUntil("libvirtd to serve", state: { self.log }) {
                guard process.poll() == nil else { throw Trouble("libvirtd ended: \(self.log)") }
                return try Files.identity(of: root + "/run/libvirt/libvirt-sock") != nil && Program.run(inside + ["virsh", "uri"]).status == 0
            }
        } catch {
            end()
            throw error
        }
    }

    deinit { end() }

    var log: String { (try? Files.read(errors)) ?? "" }
    /// Its files, seen from outside.
    var root: String { "/proc/\(process.pid)/root" }
    var runtime: RuntimeDirectory { RuntimeDirectory(base: root + "/run/quire") }
    private var inside: [String] { ["nsenter", "-t", "\(process.pid)", "--mount"] }

    func end() {
        guard process.poll() == nil else { return }
        for name in (try? virsh("list", "--name"))?.split(separator: "\n") ?? [] { _ = try? virsh("destroy", String(name)) }
        for name in runtime.running() { if let pid = runtime.owner(name) { ProcessCalls.signal(pid, SIGTERM) } }
        if let text = try? Files.read(root + "/run/virtlogd.pid"), let pid = Int32(text.filter(\.isNumber)) { ProcessCalls.signal(pid, SIGTERM) }
        store?.signal(SIGTERM)
        store?.wait()
        follower?.signal(SIGTERM)
        follower?.wait()
        process.signal(SIGTERM)
        let deadline = monotonicNanoseconds() + 10_000_000_000
        while process.poll() == nil && monotonicNanoseconds() < deadline { ProcessCalls.sleep(milliseconds: 20) }
        if process.poll() == nil {
            process.signal(SIGKILL)
            process.wait()
        }
    }

    @discardableResult func virsh(_ arguments: String...) throws -> String { try virsh(arguments) }
    @discardableResult func virsh(_ arguments: [String]) throws -> String { try host(inside + ["virsh", "-q"] + arguments) }

    /// Writes the host's configuration.
    func configure(_ text: String) throws {
        try Descriptor.open(root + "/run/programs/etc/quire/quire.toml", O_RDWR | O_CREAT, mode: 0o600).replaceContent(text)
    }

    /// The same, and has a running VM read it.
    func configure(_ text: String, reload name: String) throws -> String {
        try configure(text)
        return try host(inside + ["/run/programs/quire", "config", "reload", name])
    }

    /// `quire libvirt …`, as root in libvirtd's namespace.
    @discardableResult func quire(_ arguments: String...) throws -> String { try host(inside + ["/run/programs/quire", "libvirt"] + arguments) }

    /// A shell's command, there as well.
    @discardableResult func sh(_ command: String) throws -> String { try host(inside + ["sh", "-c", command]) }

    /// What it says when it has to fail: one line, status 1.
    func refusal(_ arguments: [String]) throws -> String {
        let (status, text) = try Program.run(inside + arguments)
        guard status == 1, text.hasSuffix("\n"), text.dropLast().contains("\n") == false else {
            throw Trouble("\(arguments.joined(separator: " ")): status \(status): \(text)")
        }
        return String(text.dropLast())
    }

    /// For another host's libvirt, to migrate a domain to this one.
    var uri: String { "qemu+unix:///system?socket=\(root)/run/libvirt/libvirt-sock" }

    /// What `virsh` says when it fails.
    func failure(_ arguments: String...) throws -> String { try failure(arguments) }
    func failure(_ arguments: [String]) throws -> String {
        let (status, text) = try Program.run(inside + ["virsh", "-q"] + arguments)
        guard status != 0 else { throw Trouble("virsh \(arguments.joined(separator: " ")) did not fail: \(text)") }
        return text
    }

    /// kill -9, and another one, as a service manager does it. What runs there goes on; whoever enters meanwhile needs somebody inside.
    func restartLibvirtd() throws {
        var holder = try ChildProcess(inside + ["sleep", "600"])
        defer {
            holder.signal(SIGKILL)
            holder.wait()
        }
        try waitUntil("somebody inside") { Files.identity(of: "/proc/\(holder.pid)/root/run/libvirtd.pid") != nil }
        process.signal(SIGKILL)
        process.wait()
        var options = ChildProcess.Options()
        let log = try Descriptor.open(errors, O_RDWR | O_CREAT | O_APPEND)
        let null = try Descriptor.open("/dev/null", O_RDONLY)
        options.passing = [.init(from: null.raw, to: 0), .init(from: log.raw, to: 1), .init(from: log.raw, to: 2)]
        options.ownGroup = true
        options.parentDeathSignal = SIGTERM
        process = try ChildProcess(["nsenter", "-t", "\(holder.pid)", "--mount", "/usr/sbin/libvirtd", "-p", "/run/libvirtd.pid"], options)
        try waitUntil("libvirtd to serve again", state: { self.log }) { try Program.run(inside + ["virsh", "uri"]).status == 0 }
    }

    /// quired; another one in place of the one that runs.
    func startStore(_ more: [String] = []) throws {
        store?.signal(SIGTERM)
        store?.wait()
        var options = ChildProcess.Options()
        let log = try Descriptor.open(errors, O_RDWR | O_CREAT | O_APPEND)
        options.passing = [.init(from: log.raw, to: 1), .init(from: log.raw, to: 2)]
        options.parentDeathSignal = SIGTERM
        store = try ChildProcess(inside + ["/run/programs/quired", "--limit", "1G", "--candidates", "4M"] + more, options)
        try waitUntil("quired to listen", state: { self.log }) { Files.identity(of: root + "/run/quired/store.sock") != nil }
    }

    /// `quire libvirt sweep --follow`, until the end.
    func follow() throws {
        var options = ChildProcess.Options()
        let log = try Descriptor.open(errors, O_RDWR | O_CREAT | O_APPEND)
        options.passing = [.init(from: log.raw, to: 1), .init(from: log.raw, to: 2)]
        options.parentDeathSignal = SIGTERM
        follower = try ChildProcess(inside + ["/run/programs/quire", "libvirt", "sweep", "--follow"], options)
    }

    func write(_ name: String, _ text: String) throws -> String {
        let file = try Descriptor.open(folder.path + "/" + name, O_RDWR | O_CREAT | O_TRUNC)
        try file.replaceContent(text)
        return folder.path + "/" + name
    }

    /// A guest of the tests as a domain of libvirt. With `nodes` its memory is that of two NUMA nodes and of a memory device, which is
    /// on top of it, and there is room for another one.
    func define(_ name: String, memory: Int = 512, disk: String = "", nodes: Bool = false) throws {
        let half = "memory='\(memory / 2)' unit='MiB'"
        let cells = "<cpu><numa><cell id='0' cpus='0' \(half)/><cell id='1' cpus='1' \(half)/></numa></cpu>"
        let xml = """
            <domain type='\(QEMU.hasKVM ? "kvm" : "qemu")'>
              <name>\(name)</name>
              <description>made &amp; kept by "hand"</description>
              <metadata>
                <x:thing xmlns:x='urn:x'><x:a/> text </x:thing>
              </metadata>
              \(nodes ? "<maxMemory slots='2' unit='MiB'>2048</maxMemory>" : "")
              <memory unit='MiB'>\(nodes ? memory + Self.deviceMebibytes : memory)</memory>
              <vcpu>2</vcpu>
              \(nodes ? cells : "")
              <os><type arch='x86_64' machine='q35'>hvm</type>\(Self.boot)</os>
              <features><acpi/><apic/></features>
              <devices>
                \(disk)\(nodes ? Self.memoryDevice : "")\(Self.console(name))
                <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
                <memballoon model='none'/>
              </devices>
            </domain>
            """
        try virsh("define", write("\(name).xml", xml))
    }

    /// What Linux takes at once on x86.
    static let deviceMebibytes = 128
    static let memoryDevice = "<memory model='dimm'><target><size unit='MiB'>\(deviceMebibytes)</size><node>1</node></target></memory>"
    static let boot =
        "<kernel>/run/guest/vmlinux</kernel><initrd>/run/guest/initramfs</initrd><cmdline>console=ttyS0 cryptomgr.notests panic=1 quiet</cmdline>"
    static func console(_ name: String) -> String {
        "<serial type='unix'><source mode='bind' path='/run/libvirt/\(name).console'/><target port='0'/></serial>"
    }

    func definition(_ name: String) throws -> String { try virsh("dumpxml", "--inactive", name) }

    /// The process that a file below /run tells of: `libvirtd`, `libvirt/qemu/DOMAIN`.
    func pid(_ file: String) throws -> Int32 {
        let text = try Files.read("\(root)/run/\(file).pid", limit: 32)
        guard let pid = Int32(text.filter(\.isNumber)) else { throw Trouble("no process in \(file).pid: \(text)") }
        return pid
    }

    func status(_ name: String) -> StatusReport { StatusReport.read(name, in: runtime) }

    func wait(for what: String, _ console: Console? = nil, _ condition: () throws -> Bool) throws {
        try waitUntil(what, state: { "\(self.log)\n\(console?.log.suffix(2000) ?? "")" }) {
            try console?.drain()
            return try condition()
        }
    }

    /// Its serial console, from now on.
    func console(_ name: String) throws -> Console {
        var connected: UnixSocket?
        try waitUntil("the console of \(name)") {
            connected = try? UnixSocket.connect(to: root + "/run/libvirt/\(name).console")
            return connected != nil
        }
        let socket = connected.take()!
        return Console(input: try socket.descriptor.duplicate(), output: try socket.descriptor.duplicate())
    }

    /// Starts it, and listens at once: what a guest says to nobody is lost.
    func start(_ name: String) throws -> Console {
        try virsh("start", name)
        return try console(name)
    }

    /// Starts it; returns when its shell is ready.
    func boot(_ name: String) throws -> Console {
        let console = try start(name)
        try expectReady(name, console)
        return console
    }

    /// Waits until it has booted for the first time.
    func expectReady(_ name: String, _ console: Console) throws {
        try console.expectReady { [self] in
            let registers = try virsh("qemu-monitor-command", name, "--hmp", "info registers -a")
            try virsh("reset", name)
            return registers
        }
    }
}

extension Console {
    @discardableResult func sh(_ command: String, within seconds: Double = Effort.patience) throws -> String {
        let (text, status) = try finish(start(command), within: seconds)
        guard status == 0 else { throw Trouble("in the guest: \(command): status \(status): \(text)") }
        return text
    }
}

extension String {
    /// How often a text occurs.
    func occurrences(of text: String) -> Int { ranges(of: text).count }
}
