import Platform

/// A process that we started and are the one to wait for. Dropping it leaves the process running.
///
/// Once its end has been seen no signal is sent any more: its number may be somebody else's by then.
public struct ChildProcess: ~Copyable, Sendable {
    public let pid: Int32
    public private(set) var end: ProcessEnd?

    public struct Options: Sendable {
        /// Descriptors of ours and their numbers in the child. 0, 1 and 2 are ours unless given.
        public var passing: [ProcessCalls.Passed] = []
        /// Also passes what is not close-on-exec here: what the user of this process passed down. Nothing of ours is.
        public var inheritOthers = false
        /// A process group of its own: the terminal's Ctrl-C does not reach it.
        public var ownGroup = false
        /// The signal that it gets when this process dies.
        public var parentDeathSignal: Int32?
        /// Set in its environment, besides ours.
        public var variables: [String: String] = [:]
        public init() {}
    }

    /// Starts `arguments[0]`, looked up in PATH. Throws if it cannot be executed.
    public init(_ arguments: [String], _ options: Options = Options()) throws(QuireError) {
        pid = try ProcessCalls.spawn(
            arguments, passing: options.passing, inheritOthers: options.inheritOthers, ownGroup: options.ownGroup,
            parentDeathSignal: options.parentDeathSignal, variables: options.variables)
    }

    /// How it ended; nil while it runs.
    public mutating func poll() -> ProcessEnd? {
        if end == nil { end = ProcessCalls.wait(pid, blocking: false) }
        return end
    }

    /// Waits for its end.
    @discardableResult public mutating func wait() -> ProcessEnd {
        if end == nil { end = ProcessCalls.wait(pid, blocking: true) }
        return end ?? .exited(127)
    }

    public borrowing func signal(_ number: Int32) {
        if end == nil { ProcessCalls.signal(pid, number) }
    }

    /// What a command writes to stdout, at most 64 KiB; its stderr is ours.
    public static func output(of arguments: [String]) throws(QuireError) -> String {
        var pipe = try Pipe()
        let writer = pipe.takeWriter()
        let reader = pipe.takeReader()
        var options = Options()
        options.passing = [ProcessCalls.Passed(from: writer.raw, to: 1)]
        var child = try ChildProcess(arguments, options)
        _ = consume writer
        let bytes = try reader.readAll(limit: 1 << 16)
        // A command that writes on and on meets a closed pipe.
        _ = consume reader
        child.wait()
        return String(decoding: bytes, as: UTF8.self)
    }
}
