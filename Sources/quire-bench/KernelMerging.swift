import ArgumentParser
import Bench
import Glibc
import Host
import Platform

/// The kernel's own merging (KSM), switched on for what is compared with it. A process of its own remembers how the host
/// was set, and sets it so again when this one has ended, however it ended.
final class KernelMerging {
    private static let folder = "/sys/kernel/mm/ksm/"
    private static let mappingLimit = "/proc/sys/vm/max_map_count"

    /// `run` first and last: nothing is scanned while the rest changes.
    static let settings =
        ["sleep_millisecs", "advisor_mode", "pages_to_scan", "smart_scan", "use_zero_pages", "run"].map { folder + $0 }
        + [mappingLimit, hugePages]
    private static let hugePages = "/sys/kernel/mm/transparent_hugepage/enabled"

    private var keeper: ChildProcess
    private var hold: Descriptor?
    private let daemon: Int32

    init(_ programs: Programs) throws {
        guard Files.isWritable(Self.folder + "run") else {
            throw QuireError(.unsupported, "KSM cannot be switched on here: run as root on a kernel that has it")
        }
        guard let daemon = Self.findDaemon() else { throw QuireError(.unsupported, "ksmd is not to be seen here") }
        self.daemon = daemon
        var to = try Pipe(), from = try Pipe()
        var options = ChildProcess.Options()
        options.passing = [.init(from: to.reader.raw()!, to: 0), .init(from: from.writer.raw()!, to: 1)]
        options.ownGroup = true
        keeper = try ChildProcess([programs.own, "keep-settings"], options)
        to.closeReader()
        from.closeWriter()
        hold = to.takeWriter()
        let ready = from.takeReader()
        guard (try? ready.readAll(limit: 1))?.count == 1 else { throw QuireError(.busy, "another benchmark has changed KSM's settings") }
        guard Self.get("run") == 0 else {
            throw QuireError(.busy, "KSM is at work for others on this host: that cannot be told from what is measured")
        }
        try Self.set("run", 0)
        if Self.text(Self.folder + "advisor_mode") != nil { try Self.write(Self.folder + "advisor_mode", "none") }
        // As fast as it gets: what is compared is the cost of a page.
        try Self.set("pages_to_scan", 100_000)
        try Self.set("sleep_millisecs", 0)
    }

    /// Waits until everything is as it was.
    func end() {
        hold = nil
        keeper.wait()
    }
    deinit { if hold != nil { end() } }

    private static func findDaemon() -> Int32? {
        for name in Files.list("/proc") ?? [] {
            if let pid = Int32(name), (try? Files.read("/proc/\(pid)/comm")) == "ksmd\n" { return pid }
        }
        return nil
    }

    // MARK: - Settings and figures

    static func text(_ path: String) -> String? {
        guard let line = (try? Files.read(path))?.split(separator: "\n").first.map(String.init) else { return nil }
        // Of several words the one in brackets is chosen.
        guard let open = line.firstIndex(of: "["), let close = line.firstIndex(of: "]") else { return line }
        return String(line[line.index(after: open)..<close])
    }

    static func write(_ path: String, _ value: String) throws {
        let file = try Descriptor.open(path, O_WRONLY)
        let bytes = Array(value.utf8)
        guard unsafe Glibc.write(file.raw, bytes, bytes.count) == bytes.count else {
            throw QuireError(.system, "cannot set \(path) to \(value)")
        }
    }

    static func set(_ name: String, _ value: Int) throws { try write(folder + name, "\(value)") }
    /// 0 where this kernel has no such figure.
    static func get(_ name: String) -> Int { text(folder + name).flatMap { Int($0) } ?? 0 }

    static func allowMappings(_ count: Int) throws {
        if let now = text(mappingLimit).flatMap({ Int($0) }), now < count { try write(mappingLimit, "\(count)") }
    }
    /// For private memory.
    static func refuseHugePages() throws {
        if Files.isWritable(hugePages) { try write(hugePages, "never") }
    }
    static var hasSmartScan: Bool { text(folder + "smart_scan") != nil }

    /// CPU time of ksmd, in nanoseconds: by its scheduler statistics, else in ticks of 10 ms.
    var cpu: UInt64 {
        if let line = Self.text("/proc/\(daemon)/schedstat"), let value = UInt64(line.split(separator: " ")[0]) { return value }
        return cpuNanoseconds(of: daemon)
    }

    struct Work {
        var cpu = 0.0, wall = 0.0
        var scans = 0, scanned = 0
    }

    /// Lets ksmd work until `isDone`, and no longer than a time; what that took. It does nothing any more afterwards, and
    /// what is merged stays so.
    func work(seconds: Int = 300, until isDone: () -> Bool) throws -> Work {
        let cpu = self.cpu, wall = monotonicNanoseconds()
        let scans = Self.get("full_scans"), scanned = Self.get("pages_scanned")
        try Self.set("run", 1)
        let deadline = wall + UInt64(seconds) * 1_000_000_000
        while !isDone(), monotonicNanoseconds() < deadline { usleep(2000) }
        let end = monotonicNanoseconds()
        try Self.set("run", 0)
        guard end < deadline else { throw QuireError(.busy, "ksmd is not done after \(seconds) s") }
        return Work(
            cpu: Double(self.cpu - cpu), wall: Double(end - wall), scans: Self.get("full_scans") - scans,
            scanned: Self.get("pages_scanned") - scanned)
    }

    /// Pages of a process that are merged: those that are kept, and those that share them.
    static func mergedPages(of pid: Int32) -> Int { text("/proc/\(pid)/ksm_merging_pages").flatMap { Int($0) } ?? 0 }
    /// And those that were replaced by the zero page.
    static func zeroPages(of pid: Int32) -> Int {
        let text = (try? Files.read("/proc/\(pid)/ksm_stat")) ?? ""
        let line = text.split(separator: "\n").first { $0.hasPrefix("ksm_zero_pages ") }
        return line?.split(separator: " ").last.flatMap { Int($0) } ?? 0
    }
}

struct KeepSettings: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "keep-settings", abstract: "Notes KSM's settings, and restores them when stdin ends.", shouldDisplay: false)

    func run() throws {
        for number in [SIGINT, SIGTERM, SIGHUP, SIGPIPE] { _ = signal(number, SIG_IGN) }
        // Only one at a time: a second one would take the first one's settings for the host's.
        let lock = try Descriptor.open(KernelMerging.settings[0], O_RDONLY)
        guard flock(lock.raw, LOCK_EX | LOCK_NB) == 0 else { return }
        defer { withExtendedLifetime(lock.raw) {} }
        let before = KernelMerging.settings.map { ($0, KernelMerging.text($0)) }
        var byte: UInt8 = 1
        guard unsafe write(1, &byte, 1) == 1 else { return }
        _ = close(1)
        while unsafe read(0, &byte, 1) > 0 {}
        for (path, value) in before { if let value { try? KernelMerging.write(path, value) } }
    }
}
