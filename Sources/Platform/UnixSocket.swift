import CPlatform

/// A Unix socket that carries descriptors: connected, or one that listens.
public struct UnixSocket: ~Copyable, Sendable {
    public let descriptor: Descriptor

    public enum Kind: Sendable {
        /// Bytes: `receive` and `send`.
        case stream
        /// Messages, each whole or not at all: `receiveMessage` and `sendMessage`.
        case messages
        /// Messages, without a connection: `sendMessage`.
        case datagrams
        var type: Int32 {
            switch self {
            case .stream: cp_stream()
            case .messages: cp_seqpacket()
            case .datagrams: Int32(SOCK_DGRAM.rawValue)
            }
        }
    }

    public init(adopting descriptor: consuming Descriptor) { self.descriptor = descriptor }

    public consuming func takeDescriptor() -> Descriptor { descriptor }

    /// `patienceMilliseconds`: above 0 how long this, and each send, waits for a peer that accepts or reads nothing.
    public static func connect(to path: String, kind: Kind = .stream, patienceMilliseconds: Int32 = 0) throws(QuireError) -> UnixSocket {
        let raw = unsafe cp_unix_connect(path, kind.type, patienceMilliseconds)
        guard raw >= 0 else { throw .system("cannot connect to \(path)") }
        return UnixSocket(adopting: Descriptor(owning: raw))
    }

    /// Binds and listens. A socket that a dead process left behind is replaced; a live one, or any other kind of file, is
    /// an error.
    public static func listen(
        at path: String, kind: Kind = .stream, backlog: Int32 = 8
    ) throws(QuireError) -> UnixSocket {
        let raw = unsafe cp_unix_listen(path, kind.type, backlog)
        if raw >= 0 { return UnixSocket(adopting: Descriptor(owning: raw)) }
        let code = cp_errno()
        switch code {
        case EADDRINUSE:
            guard unsafe cp_is_socket(path) else {
                throw QuireError(.busy, "\(path) exists and is not a socket: remove it or choose another path")
            }
            let probe = unsafe cp_unix_connect(path, kind.type, 0)
            if probe >= 0 {
                close(probe)
                throw QuireError(.busy, "\(path) is in use by a running process: stop it or choose another path")
            }
            unsafe unlink(path)
            let second = unsafe cp_unix_listen(path, kind.type, backlog)
            guard second >= 0 else { throw .system("cannot listen on \(path)") }
            return UnixSocket(adopting: Descriptor(owning: second))
        case ENOENT:
            throw QuireError(.invalid, "cannot listen on \(path): its directory does not exist, create it first")
        case ENAMETOOLONG:
            throw QuireError(.invalid, "cannot listen on \(path): a socket path has at most 107 bytes, choose a shorter one")
        default:
            throw .system("cannot listen on \(path)", errno: code)
        }
    }

    /// Whether it waits for connections (or else is one).
    public borrowing func isListening() throws(QuireError) -> Bool {
        let answer = cp_is_listening(descriptor.raw)
        guard answer >= 0 else { throw .system("descriptor \(descriptor.raw) is not a socket") }
        return answer == 1
    }

    public borrowing func accept() throws(QuireError) -> UnixSocket {
        while true {
            let raw = cp_accept(descriptor.raw)
            if raw >= 0 { return UnixSocket(adopting: Descriptor(owning: raw)) }
            guard cp_errno() == EINTR else { throw .system("cannot accept a connection") }
        }
    }

    /// Reads exactly `count` bytes; descriptors that come with them are added to `descriptors`, which may hold at most
    /// `maxDescriptors`. Nil at the end of the stream before the first byte.
    public borrowing func receive(
        count: Int, maxDescriptors: Int, into descriptors: inout PassedDescriptors
    ) throws(QuireError) -> [UInt8]? {
        var bytes = [UInt8](repeating: 0, count: count)
        var done = 0
        while done < count {
            var raw = [Int32](repeating: -1, count: 64)
            var got: Int32 = 0
            var truncated = false
            let n = unsafe bytes.withUnsafeMutableBytes { buffer in
                unsafe cp_recv_with_fds(
                    descriptor.raw, buffer.baseAddress! + done, count - done, &raw, Int32(maxDescriptors), &got, &truncated)
            }
            guard n >= 0 else { throw .system("cannot read from the socket") }
            descriptors.append(raw.prefix(Int(got)))
            if truncated || descriptors.count > maxDescriptors {
                throw QuireError(.invalid, "the peer passed more than \(maxDescriptors) descriptors")
            }
            if n == 0 {
                if done == 0 { return nil }
                throw QuireError(.closed, "the peer closed the connection in the middle of a message")
            }
            done += n
        }
        return bytes
    }

    /// Descriptors that came with a message, in order. What nobody takes is closed.
    public struct PassedDescriptors: ~Copyable {
        private var raw: [Int32] = []
        public init() {}
        deinit { for fd in raw { close(fd) } }
        public var count: Int { raw.count }
        package mutating func append(_ more: some Sequence<Int32>) { raw += more }
        package borrowing func identities() throws(QuireError) -> [FileStatus.Identity] {
            var all: [FileStatus.Identity] = []
            for fd in raw { all.append(try FileStatus(of: fd).identity) }
            return all
        }
        /// Takes the next one over.
        public mutating func next() -> Descriptor? { raw.isEmpty ? nil : Descriptor(owning: raw.removeFirst()) }
    }

    public borrowing func send(_ bytes: [UInt8], passing descriptors: [Int32] = []) throws(QuireError) {
        var done = 0
        while done < bytes.count {
            let n = unsafe bytes.withUnsafeBytes { buffer in
                unsafe cp_send_with_fds(
                    descriptor.raw, buffer.baseAddress! + done, bytes.count - done,
                    descriptors, done == 0 ? Int32(descriptors.count) : 0)
            }
            guard n > 0 else { throw .system("cannot write to the socket") }
            done += n
        }
    }

    /// The next message, at most `limit` bytes of it, with its descriptors. Nil when the peer has closed.
    public borrowing func receiveMessage(
        limit: Int, maxDescriptors: Int, into descriptors: inout PassedDescriptors
    ) throws(QuireError) -> [UInt8]? {
        // One byte more, to see a message that is too long.
        var bytes = [UInt8](repeating: 0, count: limit + 1)
        var raw = [Int32](repeating: -1, count: 64)
        var got: Int32 = 0
        var truncated = false
        var n = -1
        repeat {
            n = unsafe bytes.withUnsafeMutableBytes { buffer in
                unsafe cp_recv_with_fds(
                    descriptor.raw, buffer.baseAddress!, limit + 1, &raw, Int32(maxDescriptors), &got, &truncated)
            }
            // A peer that closed before it had read everything: told once, and what it had sent comes after.
        } while n < 0 && cp_errno() == ECONNRESET
        guard n >= 0 else { throw .system("cannot read from the socket") }
        descriptors.append(raw.prefix(Int(got)))
        if truncated { throw QuireError(.invalid, "the peer passed more than \(maxDescriptors) descriptors") }
        if n > limit { throw QuireError(.invalid, "the peer sent a message of more than \(limit) bytes") }
        if n == 0 { return nil }
        bytes.removeLast(bytes.count - n)
        return bytes
    }

    public borrowing func sendMessage(_ bytes: [UInt8], passing descriptors: [Int32] = []) throws(QuireError) {
        let n = unsafe bytes.withUnsafeBytes { buffer in
            unsafe cp_send_with_fds(
                descriptor.raw, buffer.baseAddress!, bytes.count, descriptors, Int32(descriptors.count))
        }
        guard n == bytes.count else { throw .system("cannot write to the socket") }
    }

    /// The process that connected, as the kernel says.
    public borrowing func peer() throws(QuireError) -> (pid: Int32, uid: UInt32) {
        var pid: pid_t = 0
        var uid: uid_t = 0
        guard unsafe cp_peer(descriptor.raw, &pid, &uid) == 0 else { throw .system("cannot tell who connected") }
        return (pid, uid)
    }

    /// Ends the connection in both directions: a thread that reads from it sees the end of the stream.
    public borrowing func shutDown() { shutdown(descriptor.raw, Int32(SHUT_RDWR)) }
}

/// Both ends of a connection that carries messages, close-on-exec.
public struct MessagePair: ~Copyable {
    public var near: Descriptor?
    public var far: Descriptor?

    public init() throws(QuireError) {
        var ends: [Int32] = [-1, -1]
        guard unsafe cp_socket_pair(&ends) == 0 else { throw .system("cannot create a pair of sockets") }
        near = Descriptor(owning: ends[0])
        far = Descriptor(owning: ends[1])
    }

    public mutating func takeNear() -> Descriptor { near.take()! }
    public mutating func takeFar() -> Descriptor { far.take()! }
}
