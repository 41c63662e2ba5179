import CPlatform

/// The owner of a file descriptor. A leak or a double close does not compile.
public struct Descriptor: ~Copyable, Sendable {
    /// Borrow it for a call; the owner closes it.
    public let raw: Int32

    /// Takes over `raw`, which must be open.
    public init(owning raw: Int32) {
        precondition(raw >= 0)
        self.raw = raw
    }

    deinit { close(raw) }

    /// Gives the descriptor up to somebody who will close it.
    public consuming func release() -> Int32 {
        let value = raw
        discard self
        return value
    }

    /// Writes a short text to a descriptor that somebody else owns, as to a pipe.
    public static func tell(_ raw: Int32, _ text: String) throws(QuireError) {
        let bytes = Array(text.utf8)
        guard unsafe write(raw, bytes, bytes.count) == bytes.count else { throw .system("cannot write to descriptor \(raw)") }
    }

    /// A second descriptor of the same open file, close-on-exec.
    public borrowing func duplicate() throws(QuireError) -> Descriptor { try Self.duplicate(of: raw) }

    public static func duplicate(of raw: Int32) throws(QuireError) -> Descriptor {
        let copy = cp_dup_cloexec(raw)
        guard copy >= 0 else { throw .system("cannot duplicate descriptor \(raw)") }
        return Descriptor(owning: copy)
    }

    public static func open(_ path: String, _ flags: Int32, mode: mode_t = 0o600) throws(QuireError) -> Descriptor {
        let raw = unsafe cp_open(path, flags | O_CLOEXEC, mode)
        guard raw >= 0 else { throw .system("cannot open \(path)") }
        return Descriptor(owning: raw)
    }

    public static func makeNonblocking(_ raw: Int32) throws(QuireError) {
        guard cp_set_nonblocking(raw, true) >= 0 else { throw .system("cannot use descriptor \(raw)") }
    }

    public borrowing func status() throws(QuireError) -> FileStatus { try FileStatus(of: raw) }
}

extension Optional where Wrapped: ~Copyable {
    /// The raw descriptor of an optional owner, borrowed.
    public borrowing func raw() -> Int32? where Wrapped == Descriptor {
        switch self {
        case .some(let descriptor): descriptor.raw
        case .none: nil
        }
    }
}

/// What `fstat` says, as far as Quire asks.
public struct FileStatus: Sendable, Equatable {
    /// Device and inode: two descriptors with the same identity are the same file.
    public struct Identity: Hashable, Sendable {
        public let device: UInt64
        public let inode: UInt64
        public init(device: UInt64, inode: UInt64) {
            self.device = device
            self.inode = inode
        }
    }
    public let identity: Identity
    public let byteCount: UInt64
    /// What the file system has allocated, in bytes.
    public let allocatedBytes: UInt64
    public let isRegularFile: Bool
    public let uid: UInt32
    /// Its permissions.
    public let mode: mode_t

    public init(of raw: Int32) throws(QuireError) {
        var status = stat()
        guard unsafe fstat(raw, &status) == 0 else { throw .system("cannot stat descriptor \(raw)") }
        identity = Identity(device: UInt64(status.st_dev), inode: UInt64(status.st_ino))
        byteCount = UInt64(status.st_size)
        allocatedBytes = UInt64(status.st_blocks) * 512
        uid = status.st_uid
        mode = status.st_mode & 0o7777
        isRegularFile = (status.st_mode & mode_t(S_IFMT)) == mode_t(S_IFREG)
    }
}

/// An eventfd: a wake-up that crosses threads, processes and KVM.
public struct EventDescriptor: ~Copyable, Sendable {
    public let descriptor: Descriptor

    public init() throws(QuireError) {
        let raw = cp_eventfd()
        guard raw >= 0 else { throw .system("cannot create an eventfd") }
        descriptor = Descriptor(owning: raw)
    }

    /// One of a peer's making. Set non-blocking: a peer may pass anything.
    public init(adopting descriptor: consuming Descriptor) throws(QuireError) {
        try Descriptor.makeNonblocking(descriptor.raw)
        self.descriptor = descriptor
    }

    public borrowing func signal() { Self.signal(descriptor.raw) }

    /// Signals an eventfd that somebody else owns.
    public static func signal(_ raw: Int32) {
        var one: UInt64 = 1
        _ = unsafe write(raw, &one, 8)
    }

    /// Resets the counter; true if it was signalled.
    @discardableResult public borrowing func drain() -> Bool {
        var count: UInt64 = 0
        return unsafe read(descriptor.raw, &count, 8) == 8 && count > 0
    }
}

/// Waits until one of the descriptors is readable (or hung up), or `timeoutMilliseconds` have passed (-1: for ever).
/// Returns the indices that are ready.
public func waitReadable(_ descriptors: [Int32], timeoutMilliseconds: Int32 = -1) -> [Int] {
    var set = descriptors.map { pollfd(fd: $0, events: Int16(POLLIN), revents: 0) }
    let ready = unsafe poll(&set, nfds_t(set.count), timeoutMilliseconds)
    guard ready > 0 else { return [] }
    return set.indices.filter { set[$0].revents != 0 }
}
