import Glibc
import Host
import Platform

/// What libvirt's hook for QEMU does (https://libvirt.org/hooks.html). libvirtd waits for it, and a hook must never call
/// libvirt: it reads the domain's XML, and that is all that it knows.
///
/// | operation     | what happens                                                                                    |
/// | ------------- | ----------------------------------------------------------------------------------------------- |
/// | prepare begin | the VM's backend is started; it listens when the hook returns. A failure here stops the start   |
/// | restore begin | before *prepare*: a guest shall come from a saved image. Its swap disk waits for what was on it; its shared disks have to be those it knows |
/// | migrate begin | before *prepare*, on the host that the guest comes to: refused with a swap or shared disk, which would stay behind |
/// | start begin   | QEMU's user is known now: its group may connect. So is what networks have handed out: no VFIO device |
/// | started begin | what its shared disks have is noted in the domain, by another process (`Hypervisor.rememberDisks`) |
/// | release end   | QEMU has gone: the backend is ended                                                               |
///
/// A reset runs no hook, a restore from a saved image the same ones as a start. Domains without our mark are none of ours.
public struct Hook: Sendable {
    public let directory: RuntimeDirectory
    /// `quire`, for the service that it starts where systemd does not.
    public let program: String
    /// Systemd runs this host: it starts the service.
    public var usesSystemd = ServiceManager.isSystemd

    public init(directory: RuntimeDirectory, program: String) {
        self.directory = directory
        self.program = program
    }

    /// Most domains are not ours, and every hook of theirs has to be quick: one look at the text.
    public static func concerns(_ xml: String) -> Bool { xml.contains(Mark.namespace) }

    public func run(_ operation: String, _ subOperation: String, xml: String) throws(QuireError) {
        guard Self.concerns(xml) else { return }
        let domain = try Domain(xml)
        guard let mark = domain.mark else { return }
        switch (operation, subOperation) {
        case ("restore", "begin"):
            if let disk = mark.sharedDisks.first(where: { $0.content == nil }), !directory.isAccepting(mark.name) {
                throw QuireError(.invalid, "\(domain.name): \(SharedDisk.Options.isUnknown(disk.name, BackendService.acceptance(mark.name)))")
            }
            if mark.swapBytes != nil || !mark.sharedDisks.isEmpty { try directory.noteArrival(mark.name) }
        case ("migrate", "begin"):
            if let stays = mark.whatStays(domain.name) {
                throw QuireError(.unsupported, "\(domain.name): its \(stays.what) would not come with it: \(stays.advice)")
            }
        case ("prepare", "begin"): try start(domain, mark)
        case ("start", "begin"):
            if let obstacle = domain.obstacles.first { throw QuireError(.unsupported, "\(domain.name): \(obstacle)") }
            guard let group = domain.qemuGroup, ProcessCalls.isRoot else { return }
            try directory.admit(group: group, to: mark.name)
        // A start does not fail for want of that: a restore would.
        case ("started", "begin"): if !mark.sharedDisks.isEmpty { try? rememberDisks(domain, mark) }
        case ("release", "end"): try end(domain, mark)
        default: break
        }
    }

    private func start(_ domain: Domain, _ mark: Mark) throws(QuireError) {
        let again = "quire libvirt enable \(domain.name)"
        guard mark.uuid.isEmpty || mark.uuid == domain.uuid else {
            throw QuireError(.invalid, "\(domain.name): what Quire noted in it is a copy of another domain's: \(again)")
        }
        guard mark.sockets == directory.qemuFolder(mark.name) else {
            throw QuireError(
                .invalid, "\(domain.name): its sockets are in \(mark.sockets), but VMs of this host are in \(directory.base): \(again)")
        }
        if let obstacle = domain.obstacles.first { throw QuireError(.unsupported, "\(domain.name): \(obstacle)") }
        let arrives = directory.takeArrival(mark.name), accepts = directory.takeAcceptance(mark.name)
        if directory.isRunning(mark.name) {
            // Of an earlier life, and left over: or a VM that is none of ours.
            guard let settings = try? BackendService.Settings.read(directory.settingsPath(mark.name)), settings.owner == domain.uuid
            else {
                throw QuireError(.busy, "\(domain.name): another VM is called '\(mark.name)', process \(directory.owner(mark.name) ?? 0): end it first")
            }
            try end(domain, mark)
        }
        var settings = BackendService.Settings(owner: domain.uuid)
        settings.merges = mark.agent != nil
        settings.swapBytes = mark.swapBytes
        settings.awaitsSwap = arrives
        settings.acceptsDisks = accepts
        settings.group = mark.group
        settings.periodMilliseconds = mark.period
        // A definition that somebody has made of a running domain's XML says nothing about a guest that begins.
        settings.sharedDisks = mark.sharedDisks.map { .init(name: $0.name, byteCount: $0.byteCount, content: arrives ? $0.content : nil) }
        settings.isSingleThreadedTCG = domain.isEmulated && domain.processorCount == 1
        try directory.prepareService(mark.name)
        try settings.write(to: directory.settingsPath(mark.name))
        do throws(QuireError) {
            if usesSystemd { try startUnit(mark.name) } else { try startProcess(mark.name) }
        } catch {
            directory.removeFailedService(mark.name)
            throw QuireError(error.code, "\(domain.name): \(error.description)")
        }
    }

    private func startUnit(_ name: String) throws(QuireError) {
        let unit = "quire-backend@\(name).service"
        var child = try ChildProcess(["systemctl", "start", unit])
        guard child.wait() == .exited(0) else {
            throw QuireError(.system, "its backend did not start: \(lastWords(name) ?? "journalctl -u \(unit) says why")")
        }
    }

    /// libvirtd waits for the hook, so somebody else asks it to change the domain, when we are gone.
    private func rememberDisks(_ domain: Domain, _ mark: Mark) throws(QuireError) {
        let null = try Descriptor.open("/dev/null", O_RDONLY)
        let log = try Descriptor.open(directory.logPath(mark.name), O_WRONLY | O_CREAT | O_APPEND | O_NOFOLLOW)
        var options = ChildProcess.Options()
        options.ownGroup = true
        options.passing = [.init(from: null.raw, to: 0), .init(from: log.raw, to: 1), .init(from: log.raw, to: 2)]
        options.variables = ["QUIRE_RUNTIME_DIR": directory.base]
        _ = try ChildProcess([program, "libvirt", "remember-disks", "--", domain.name], options)
    }

    private static let readyWithin: Int32 = 15_000

    /// The service stays when we and libvirtd are gone; its pipe says how its start went.
    private func startProcess(_ name: String) throws(QuireError) {
        var pipe = try Pipe()
        let writer = pipe.takeWriter(), reader = pipe.takeReader()
        let null = try Descriptor.open("/dev/null", O_RDONLY)
        let log = try Descriptor.open(directory.logPath(name), O_WRONLY | O_CREAT | O_APPEND | O_NOFOLLOW)
        var options = ChildProcess.Options()
        options.ownGroup = true
        options.passing = [
            .init(from: null.raw, to: 0), .init(from: log.raw, to: 1), .init(from: log.raw, to: 2), .init(from: writer.raw, to: 3),
        ]
        options.variables = ["QUIRE_RUNTIME_DIR": directory.base]
        let child = try ChildProcess([program, "serve", name, "--ready-fd", "3"], options)
        _ = consume writer
        let isAnswered = !waitReadable([reader.raw], timeoutMilliseconds: Self.readyWithin).isEmpty
        let answer = isAnswered ? try reader.readAll(limit: 5) : []
        guard answer == Array("ready".utf8) else {
            child.signal(SIGTERM)
            throw QuireError(.system, "its backend did not start: \(lastWords(name) ?? "no answer in \(Self.readyWithin / 1000) s")")
        }
    }

    /// What the service, or the backend that it started, has said.
    private func lastWords(_ name: String) -> String? {
        let lines = ((try? Files.read(directory.logPath(name))) ?? "").split(separator: "\n")
        let told = lines.filter { !$0.contains("see its message above") }
        return told.last.map { line in
            var text = String(line)
            for prefix in ["quire: ", "quire-backend: "] where text.hasPrefix(prefix) { text.removeFirst(prefix.utf8.count) }
            return text
        }
    }

    private static let endWithin: UInt64 = 5_000_000_000

    private func end(_ domain: Domain, _ mark: Mark) throws(QuireError) {
        guard directory.isRunning(mark.name) else { return directory.removeFailedService(mark.name) }
        guard let settings = try? BackendService.Settings.read(directory.settingsPath(mark.name)), settings.owner == domain.uuid,
            let pid = directory.owner(mark.name)
        else { return }
        try Self.end(mark.name, pid, in: directory)
    }

    /// Ends the service of a VM whose QEMU has gone, or has let go of it.
    static func end(_ name: String, _ pid: Int32, in directory: RuntimeDirectory) throws(QuireError) {
        let backend = StatusReport.read(name, in: directory).pid
        ProcessCalls.signal(pid, SIGTERM)
        // A stopped process takes no SIGTERM.
        ProcessCalls.signal(pid, SIGCONT)
        let deadline = monotonicNanoseconds() + endWithin
        while directory.isRunning(name) {
            if monotonicNanoseconds() > deadline {
                ProcessCalls.signal(pid, SIGKILL)
                if backend > 0, StatusReport.read(name, in: directory).pid == backend { ProcessCalls.signal(backend, SIGKILL) }
                return
            }
            ProcessCalls.sleep(milliseconds: 5)
        }
    }
}
