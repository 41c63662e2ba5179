import Platform
import Synchronization

/// The bitmap in which a back end notes what it wrote while the front end migrates: one bit a page of 4 KiB, in memory
/// shared with the front end (vhost-user specification, "Migration"; VHOST_F_LOG_ALL).
public final class DirtyLog: Sendable {
    private let mapping: Mapping

    /// `byteCount` bytes of log at `offset` (page-aligned) of the file.
    public init(
        _ descriptor: borrowing Descriptor, offset: UInt64, byteCount: UInt64, owner: FileOwner
    ) throws(QuireError) {
        let size = try descriptor.status().byteCount
        guard byteCount > 0, offset % pageBytes == 0, offset <= size, byteCount <= size - offset else {
            throw QuireError(.invalid, "the dirty log of \(byteCount) bytes at \(offset) exceeds its file of \(size)")
        }
        mapping = try Mapping(descriptor, offset: offset, byteCount: Int(byteCount), owner: owner)
    }

    /// Pages that the log is too short for are passed over: the front end sized it.
    public func markDirty(guestAddress: UInt64, byteCount: UInt64) {
        // The address of a used ring's log is the front end's word: it may lie anywhere, the end of the address space
        // included.
        let pages = UInt64(mapping.byteCount) * 8
        guard byteCount > 0, guestAddress / pageBytes < pages else { return }
        let (end, overflow) = guestAddress.addingReportingOverflow(byteCount - 1)
        for page in guestAddress / pageBytes...min(overflow ? .max : end / pageBytes, pages - 1) {
            mapping.or8(Int(page / 8), 1 << UInt8(page % 8))
        }
    }
}

/// Where writers ask whether to log. Separate from the log itself because logging starts and stops while rings run.
public final class DirtyTracker: Sendable {
    private let state = Mutex<(log: DirtyLog?, enabled: Bool)>((nil, false))
    private let active = Atomic<Bool>(false)

    public init() {}

    /// True while writes must be logged.
    public var isEnabled: Bool { active.load(ordering: .acquiring) }

    public func setLog(_ log: DirtyLog?) { update { $0.log = log } }
    public func setEnabled(_ enabled: Bool) { update { $0.enabled = enabled } }

    private func update(_ body: (inout (log: DirtyLog?, enabled: Bool)) -> Void) {
        state.withLock {
            body(&$0)
            active.store($0.enabled, ordering: .releasing)
        }
    }

    @inline(__always)
    public func markDirty(guestAddress: UInt64, byteCount: UInt64) {
        guard active.load(ordering: .acquiring) else { return }
        // Under the lock: a log that was exchanged meanwhile is read by nobody any more.
        state.withLock { $0.log?.markDirty(guestAddress: guestAddress, byteCount: byteCount) }
    }
}
