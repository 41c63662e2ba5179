import CPlatform
import GuestMemory
import Platform

/// What a block device stores its blocks in. Offsets and counts in bytes; the device has checked that they are inside the
/// capacity and multiples of the logical block. Called on several ring threads at once when the device has several queues.
public protocol BlockStorage: Sendable {
    /// Capacity in bytes, a multiple of `logicalBlockBytes`.
    var byteCount: UInt64 { get }
    var logicalBlockBytes: UInt32 { get }
    var isReadOnly: Bool { get }
    /// The serial number, up to 20 bytes of text.
    var serial: String { get }

    func read(at offset: UInt64, into buffer: GuestBuffer) throws(QuireError)
    func write(at offset: UInt64, from buffer: GuestBuffer) throws(QuireError)
    /// Returns when everything that was written is durable.
    func flush() throws(QuireError)
    /// The range's content is not needed any more; it may read as anything that was ever stored there, or zeros.
    func discard(at offset: UInt64, count: UInt64) throws(QuireError)
    /// The range reads as zeros afterwards. `mayUnmap`: its space may be given back.
    func writeZeroes(at offset: UInt64, count: UInt64, mayUnmap: Bool) throws(QuireError)
}

/// A raw image file (or block device).
public final class FileStorage: BlockStorage {
    private let file: Descriptor
    public let byteCount: UInt64
    public let logicalBlockBytes: UInt32
    public let isReadOnly: Bool
    public let serial: String

    public init(
        path: String, isReadOnly: Bool, serial: String, logicalBlockBytes: UInt32 = 4096
    ) throws(QuireError) {
        let file = try Descriptor.open(path, isReadOnly ? O_RDONLY : O_RDWR)
        let end = lseek(file.raw, 0, SEEK_END)
        guard end > 0 else { throw QuireError(.invalid, "\(path) is empty: create it with its size first (truncate -s)") }
        guard UInt64(end) % UInt64(logicalBlockBytes) == 0 else {
            throw QuireError(.invalid, "\(path) has \(end) bytes, not a multiple of its block size of \(logicalBlockBytes)")
        }
        guard flock(file.raw, (isReadOnly ? LOCK_SH : LOCK_EX) | LOCK_NB) == 0 else {
            throw QuireError(.busy, "\(path) is in use by another process: stop that one first")
        }
        byteCount = UInt64(end)
        self.file = file
        self.isReadOnly = isReadOnly
        self.serial = serial
        self.logicalBlockBytes = logicalBlockBytes
    }

    public func read(at offset: UInt64, into buffer: GuestBuffer) throws(QuireError) {
        try buffer.read(from: file, at: offset)
    }
    public func write(at offset: UInt64, from buffer: GuestBuffer) throws(QuireError) {
        try buffer.write(to: file, at: offset)
    }
    public func flush() throws(QuireError) {
        guard fdatasync(file.raw) == 0 else { throw .system("cannot flush the image") }
    }
    public func discard(at offset: UInt64, count: UInt64) throws(QuireError) {
        // A hint: where the file system cannot, nothing is lost.
        _ = cp_punch_hole(file.raw, off_t(offset), off_t(count))
    }
    public func writeZeroes(at offset: UInt64, count: UInt64, mayUnmap: Bool) throws(QuireError) {
        if cp_zero_range(file.raw, off_t(offset), off_t(count), mayUnmap) == 0 { return }
        let chunk = [UInt8](repeating: 0, count: Int(min(count, 1 << 20)))
        var done: UInt64 = 0
        while done < count {
            let n = unsafe pwrite(file.raw, chunk, Int(min(UInt64(chunk.count), count - done)), off_t(offset + done))
            guard n > 0 else { throw .system("cannot write zeros to the image") }
            done += UInt64(n)
        }
    }
}
