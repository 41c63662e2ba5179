import CPlatform

/// Another process's memory, by the descriptor of `/proc/self/mem` that it passed: no right over the process is needed.
/// The kernel resolves faults there as the process would (a write to a private mapping copies the page), and pins
/// nothing: what process_vm_writev does, and why it is not used.
public final class ProcessMemory: Sendable {
    private let descriptor: Descriptor

    /// `descriptor`: of `/proc/PID/mem`, readable and writable.
    public init(_ descriptor: consuming Descriptor) { self.descriptor = descriptor }

    /// How long a page that cannot be had is tried again: inside a window of the agent it is EIO for some microseconds.
    private static let patience: UInt64 = 500_000_000

    /// `count` bytes at `address` of that process.
    public func load(_ address: UInt64, count: Int) throws(QuireError) -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: count)
        try complete(count) { done in
            unsafe bytes.withUnsafeMutableBytes { buffer in
                unsafe pread(
                    descriptor.raw, buffer.baseAddress! + done, count - done,
                    off_t(truncatingIfNeeded: address &+ UInt64(done)))
            }
        }
        return bytes
    }

    public func store(_ address: UInt64, _ bytes: ArraySlice<UInt8>) throws(QuireError) {
        try complete(bytes.count) { done in
            unsafe bytes.withUnsafeBytes { buffer in
                unsafe pwrite(
                    descriptor.raw, buffer.baseAddress! + done, bytes.count - done,
                    off_t(truncatingIfNeeded: address &+ UInt64(done)))
            }
        }
    }

    private func complete(_ count: Int, _ transfer: (Int) -> Int) throws(QuireError) {
        var done = 0
        var deadline: UInt64 = 0
        while done < count {
            let n = transfer(done)
            if n > 0 {
                done += n
                continue
            }
            let code = cp_errno()
            // Zero: the process has ended, and its memory with it.
            guard n < 0 else { throw QuireError(.closed, "QEMU has ended") }
            if code == EINTR { continue }
            guard code == EIO else { throw .system("cannot access QEMU's memory", errno: code) }
            if deadline == 0 { deadline = monotonicNanoseconds() + Self.patience }
            guard monotonicNanoseconds() < deadline else { throw .system("cannot access QEMU's memory", errno: code) }
            ProcessCalls.sleep(microseconds: 100)
        }
    }
}
