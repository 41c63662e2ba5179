import CPlatform

/// Goes off when a mapping of a peer's file is touched where the file has no memory: the peer has truncated it, or its
/// file system is full. What is read there from then on is zeros, and what is written is lost, so whoever works on such
/// files looks at the alarm before it answers for what it did. The connection that the files came by is shut down: a
/// thread that waits for the next message wakes up and finds out.
@safe public final class TruncationAlarm: @unchecked Sendable {
    // On the heap, because a signal handler writes to it; every mapping that leads to it keeps this object alive.
    fileprivate let state = UnsafeMutablePointer<cp_alarm>.allocate(capacity: 1)
    private let connection: Descriptor

    public init(shuttingDown socket: borrowing UnixSocket) throws(QuireError) {
        connection = try socket.descriptor.duplicate()
        unsafe state.initialize(to: cp_alarm(socket: connection.raw, raised: 0))
    }

    deinit { unsafe state.deallocate() }

    @inline(__always) public var isRaised: Bool { unsafe cp_alarm_is_raised(state) }
}

/// Who can truncate a file while it is mapped.
public enum FileOwner: Sendable {
    /// Nobody but us: a memory file that we sealed, or a file of ours.
    case us
    /// A peer, which passed us a descriptor of it.
    case peer(TruncationAlarm)

    /// Has a peer's file sealed against shrinking where that is possible: nothing can go wrong then. Refuses what is no
    /// file of ordinary pages, because the guard puts such pages in their place.
    func secure(_ descriptor: borrowing Descriptor) throws(QuireError) {
        guard case .peer = self else { return }
        guard try descriptor.status().isRegularFile else { throw QuireError(.invalid, "what was passed is no regular file") }
        guard try Memfd.kind(of: descriptor.raw) != .hugetlb else {
            throw QuireError(.unsupported, "what was passed is a file of huge pages")
        }
        _ = cp_seal_shrink(descriptor.raw)
    }

    /// Takes responsibility for a new mapping.
    func guardMapping(_ base: UnsafeMutableRawPointer, byteCount: Int) throws(QuireError) {
        guard case .peer(let alarm) = self else { return }
        guard unsafe cp_guard(base, byteCount, alarm.state) == 0 else { throw .system("cannot guard a mapping") }
    }

    func unguardMapping(_ base: UnsafeMutableRawPointer) {
        if case .peer = self { unsafe cp_unguard(base) }
    }
}
