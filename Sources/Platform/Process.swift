import CPlatform

/// How a process ended.
public enum ProcessEnd: Sendable, Equatable, CustomStringConvertible {
    case exited(Int32)
    case signalled(Int32)

    /// What a shell would report: the exit status, or 128 and the signal's number.
    public var shellStatus: Int32 {
        switch self {
        case .exited(let status): status
        case .signalled(let signal): 128 + signal
        }
    }

    public var description: String {
        switch self {
        case .exited(let status): "exited with status \(status)"
        case .signalled(let signal): "was killed by signal \(signal)"
        }
    }
}

/// The system calls around processes, thinly. `Host.ChildProcess` is the owner to use.
public enum ProcessCalls {
    /// A descriptor of ours and its number in the child.
    public struct Passed: Sendable, Equatable {
        public let from: Int32
        public let to: Int32
        public init(from: Int32, to: Int32) {
            self.from = from
            self.to = to
        }
    }

    /// Starts `arguments[0]`, looked up in PATH, with an empty signal mask. Besides 0, 1 and 2 the child has exactly
    /// `passing` (at most 64), and with `inheritOthers` also everything that is not close-on-exec here. `variables` are
    /// set in its environment, besides ours.
    /// Throws when the program cannot be executed: there is no child then.
    public static func spawn(
        _ arguments: [String], passing: [Passed], inheritOthers: Bool, ownGroup: Bool, parentDeathSignal: Int32?,
        variables: [String: String] = [:]
    ) throws(QuireError) -> pid_t {
        precondition(!arguments.isEmpty)
        // A copy in C's terms; freed below, when the child has executed or failed.
        let words = unsafe arguments.map { unsafe strdup($0) }
        defer { for unsafe word in unsafe words { unsafe free(word) } }
        let argv = unsafe words + [nil]
        let settings = unsafe environment(with: variables).map { unsafe strdup($0) }
        defer { for unsafe setting in unsafe settings { unsafe free(setting) } }
        let envp = unsafe settings + [nil]
        let from = passing.map(\.from), to = passing.map(\.to)
        var pid: pid_t = -1
        // The pointers live in this scope, which outlasts the call; the child has copies of everything.
        let code = unsafe argv.withUnsafeBufferPointer { argv in
            unsafe envp.withUnsafeBufferPointer { envp in
                unsafe from.withUnsafeBufferPointer { from in
                    unsafe to.withUnsafeBufferPointer { to in
                        var what = unsafe cp_spawn_request(
                            argv: argv.baseAddress, environment: envp.baseAddress, from: from.baseAddress,
                            to: to.baseAddress, count: Int32(from.count), close_others: !inheritOthers,
                            own_group: ownGroup, parent_death_signal: parentDeathSignal ?? 0)
                        return unsafe cp_spawn(&what, &pid)
                    }
                }
            }
        }
        guard code == 0 else { throw .system("cannot start \(arguments[0])", errno: code) }
        return pid
    }

    /// Nil while the process runs (never with `blocking`). The process must be a child that was not waited for yet.
    public static func wait(_ pid: pid_t, blocking: Bool) -> ProcessEnd? {
        var status: Int32 = 0
        guard unsafe cp_reap(pid, blocking, &status) == 1 else { return nil }
        let signal = cp_wait_signal(status)
        return signal != 0 ? .signalled(signal) : .exited(cp_wait_exit_status(status))
    }

    /// Sends a signal; false if there is no such process (or it is not ours).
    @discardableResult public static func signal(_ pid: pid_t, _ signal: Int32) -> Bool { kill(pid, signal) == 0 }

    /// Whether there is such a process, whoever may signal it.
    public static func isAlive(_ pid: pid_t) -> Bool { pid > 0 && (kill(pid, 0) == 0 || cp_errno() != ESRCH) }

    /// What a process has locked in memory, in bytes (mlock, VFIO), and what is pinned for it (iommufd, vDPA); 0 if that cannot be seen.
    public static func lockedBytes(of pid: pid_t) -> UInt64 {
        let lines = (try? Files.read("/proc/\(pid)/status", limit: 16384))?.split(separator: "\n") ?? []
        return lines.filter { $0.hasPrefix("VmLck:") || $0.hasPrefix("VmPin:") }.reduce(0) { sum, line in
            sum + 1024 * (line.split(whereSeparator: \.isWhitespace).dropFirst().first.flatMap { UInt64($0) } ?? 0)
        }
    }

    /// Whether a process has mapped `file` at `address` for itself alone (MAP_PRIVATE), so that what it writes there is in
    /// no file. False if that cannot be seen: proc(5) shows a process's mappings to its own user and to root.
    public static func maps(_ file: FileStatus.Identity, privatelyAt address: UInt64, in pid: pid_t) -> Bool {
        for line in (try? Files.read("/proc/\(pid)/maps", limit: 1 << 25))?.split(separator: "\n") ?? [] {
            // start-end perms offset device inode path
            let words = line.split(separator: " ", maxSplits: 5, omittingEmptySubsequences: true)
            let ends = words.first?.split(separator: "-").compactMap { UInt64($0, radix: 16) } ?? []
            guard words.count >= 5, ends.count == 2, (ends[0]..<ends[1]).contains(address) else { continue }
            return words[1].hasSuffix("p") && UInt64(words[4]) == file.inode
        }
        return false
    }

    /// A descriptor of a process: readable once it has ended, whoever has its number then.
    public static func descriptor(of pid: pid_t) throws(QuireError) -> Descriptor {
        let raw = cp_pidfd(pid)
        guard raw >= 0 else { throw .system("cannot open process \(pid)") }
        return Descriptor(owning: raw)
    }

    /// As many descriptors as may be.
    public static func raiseFileLimit() { cp_raise_file_limit() }

    /// Ours, as `NAME=value`, with these in place of what they name.
    private static func environment(with variables: [String: String]) -> [String] {
        var result: [String] = []
        var index = 0
        guard let settings = unsafe cp_environment() else { return result }
        while let setting = unsafe settings[index] {
            let text = unsafe String(cString: setting)
            if variables[String(text.prefix { $0 != "=" })] == nil { result.append(text) }
            index += 1
        }
        return result + variables.map { "\($0)=\($1)" }
    }

    /// What this process makes from now on has none of these rights.
    public static func setFileCreationMask(_ mask: mode_t) { umask(mask) }

    public static var ownPID: pid_t { getpid() }
    public static var ownUID: UInt32 { geteuid() }
    public static var processorCount: Int { max(1, sysconf(Int32(_SC_NPROCESSORS_ONLN))) }
    public static var memoryBytes: Int { max(0, sysconf(Int32(_SC_PHYS_PAGES))) * max(1, sysconf(Int32(_SC_PAGESIZE))) }
    public static var isRoot: Bool { geteuid() == 0 }
    /// Root, or a service that may read as root does and no more (CAP_DAC_READ_SEARCH): no user's folders are closed to it.
    public static var readsEverything: Bool {
        guard !isRoot else { return true }
        let line = (try? Files.read("/proc/self/status"))?.split(separator: "\n").first { $0.hasPrefix("CapEff:") }
        return line?.split(separator: "\t").last.flatMap { UInt64($0, radix: 16) }.map { $0 & 1 << 2 != 0 } ?? false
    }
    public static func isTerminal(_ raw: Int32) -> Bool { isatty(raw) == 1 }
    /// A write to a pipe or socket that nobody reads then fails with EPIPE instead of ending this process.
    public static func ignoreBrokenPipes() { cp_ignore_sigpipe() }
    public static func environment(_ name: String) -> String? {
        guard let value = unsafe getenv(name) else { return nil }
        let text = unsafe String(cString: value)
        return text.isEmpty ? nil : text
    }
    public static func sleep(milliseconds: UInt32) { usleep(milliseconds * 1000) }
    public static func sleep(microseconds: UInt32) { usleep(microseconds) }

    /// When the process was started, in nanoseconds of the monotonic clock; nil if it is gone. proc(5), field 22.
    public static func startTime(of pid: pid_t) -> UInt64? {
        // One read, and bytes: it may be asked for each of many VMs.
        guard let file = try? Descriptor.open("/proc/\(pid)/stat", O_RDONLY),
            let bytes = try? file.readBytes(at: 0, count: 1024), let paren = bytes.lastIndex(of: UInt8(ascii: ")"))
        else { return nil }
        var field = 2
        var ticks: UInt64 = 0
        for byte in bytes[(paren + 1)...] {
            if byte == UInt8(ascii: " ") {
                // Ticks since boot, where CLOCK_MONOTONIC starts too (suspended time apart, which ages nothing here).
                if field == 22 { return ticks &* (1_000_000_000 / UInt64(max(1, sysconf(Int32(_SC_CLK_TCK))))) }
                field += 1
            } else if field == 22 {
                guard (UInt8(ascii: "0")...UInt8(ascii: "9")).contains(byte) else { return nil }
                ticks = ticks &* 10 &+ UInt64(byte - UInt8(ascii: "0"))
            }
        }
        return nil
    }
}

/// Writes one line to stderr. Errors are ignored: there is nobody to tell.
public func writeStandardError(_ line: String) {
    let bytes = Array((line + "\n").utf8)
    _ = unsafe write(2, bytes, bytes.count)
}

/// Signals as readable events. They are blocked in the calling thread from then on, so create it before any thread.
public struct SignalDescriptor: ~Copyable {
    public let descriptor: Descriptor

    public struct Event: Sendable, Equatable {
        public let number: Int32
        /// The terminal sent it (Ctrl-C), so every process of the foreground group has got it.
        public let fromKernel: Bool
    }

    public init(_ signals: [Int32]) throws(QuireError) {
        let raw = unsafe cp_signalfd(signals, Int32(signals.count))
        guard raw >= 0 else { throw .system("cannot create a signalfd") }
        descriptor = Descriptor(owning: raw)
    }

    public borrowing func next() -> Event? {
        var fromKernel = false
        let number = unsafe cp_next_signal(descriptor.raw, &fromKernel)
        return number == 0 ? nil : Event(number: number, fromKernel: fromKernel)
    }
}

/// Both ends of a pipe, close-on-exec.
public struct Pipe: ~Copyable {
    public var reader: Descriptor?
    public var writer: Descriptor?

    public init() throws(QuireError) {
        var ends: (Int32, Int32) = (-1, -1)
        let code = unsafe withUnsafeMutableBytes(of: &ends) { bytes in
            unsafe cp_pipe(bytes.baseAddress!.assumingMemoryBound(to: Int32.self))
        }
        guard code == 0 else { throw .system("cannot create a pipe") }
        reader = Descriptor(owning: ends.0)
        writer = Descriptor(owning: ends.1)
    }

    public mutating func closeWriter() { writer = nil }
    public mutating func closeReader() { reader = nil }
    public mutating func takeReader() -> Descriptor { reader.take()! }
    public mutating func takeWriter() -> Descriptor { writer.take()! }
}
