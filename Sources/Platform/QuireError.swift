import CPlatform

/// The one error type of the project: a code a program can switch on, one line a person can act on, and the cause.
public struct QuireError: Error, CustomStringConvertible, Sendable {
    public enum Code: String, Sendable, Codable {
        /// A system call failed; `errno` says how.
        case system
        /// What a peer or a user handed in breaks a rule that is written down.
        case invalid
        /// It may be valid, but this version does not do it.
        case unsupported
        /// Somebody else has it.
        case busy
        /// The peer went away.
        case closed
        /// There is no room for it, or a limit that was set forbids it.
        case noSpace
        /// It cannot be done at this moment, and nothing was done: whoever asked asks again.
        case retry
        /// A guest broke the protocol of its table or its rings.
        case guest
    }

    public let code: Code
    public let message: String
    /// The `errno` of the system call, where there was one.
    public let errno: Int32?
    public let cause: (any Error)?

    public init(_ code: Code, _ message: String, errno: Int32? = nil, cause: (any Error)? = nil) {
        self.code = code
        self.message = message
        self.errno = errno
        self.cause = cause
    }

    /// The error of the system call that has just failed on this thread.
    public static func system(_ what: String, errno: Int32 = cp_errno()) -> QuireError {
        QuireError(.system, what, errno: errno)
    }

    /// The system lacked something that it may have a moment later, or a peer gave up on its own.
    public var isTemporary: Bool {
        switch errno {
        case EMFILE, ENFILE, ENOMEM, ENOBUFS, ECONNABORTED, EINTR: true
        default: false
        }
    }

    public var description: String {
        var text = message
        if let errno { text += ": " + Self.text(of: errno) }
        if let cause { text += ": \(cause)" }
        return text
    }

    /// `strerror`, which is thread-safe in glibc since 2.32.
    public static func text(of errno: Int32) -> String {
        guard let text = unsafe strerror(errno) else { return "error \(errno)" }
        return unsafe String(cString: text)
    }
}
