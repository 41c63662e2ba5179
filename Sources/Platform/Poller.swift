import CPlatform

/// Waits for many descriptors with several threads. What became readable (or hung up) is told to one thread, and not
/// again until it is armed anew: so each descriptor has one thread at a time.
public struct Poller: ~Copyable, Sendable {
    private let descriptor: Descriptor

    public init() throws(QuireError) {
        let raw = cp_epoll()
        guard raw >= 0 else { throw .system("cannot create an epoll descriptor") }
        descriptor = Descriptor(owning: raw)
    }

    /// Armed from the start. It is forgotten when its last descriptor is closed, in whatever process: so a descriptor
    /// that somebody else may have as well is to be removed.
    public borrowing func add(_ raw: Int32, token: UInt64) throws(QuireError) {
        guard cp_epoll_add(descriptor.raw, raw, token) == 0 else { throw .system("cannot wait for descriptor \(raw)") }
    }

    public borrowing func remove(_ raw: Int32) { _ = cp_epoll_remove(descriptor.raw, raw) }

    public borrowing func arm(_ raw: Int32, token: UInt64) {
        _ = cp_epoll_arm(descriptor.raw, raw, token)
    }

    /// The token of a descriptor that is ready; nil when the time is over.
    public borrowing func next(timeoutMilliseconds: Int32 = -1) -> UInt64? {
        var token: UInt64 = 0
        return unsafe cp_epoll_wait(descriptor.raw, timeoutMilliseconds, &token) == 1 ? token : nil
    }
}
