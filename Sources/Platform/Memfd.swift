import CPlatform

/// A memory file: created by us and sealed, or taken over from QEMU. Offsets and lengths in bytes.
public struct Memfd: ~Copyable, Sendable {
    public let descriptor: Descriptor

    public init(adopting descriptor: consuming Descriptor) { self.descriptor = descriptor }

    /// Creates one of a fixed size: sealed against shrinking and growing, so that no mapping of it can ever raise SIGBUS.
    public init(name: String, byteCount: UInt64) throws(QuireError) {
        let raw = unsafe cp_memfd_create(name, UInt32(MFD_CLOEXEC) | UInt32(MFD_ALLOW_SEALING))
        guard raw >= 0 else { throw .system("cannot create the memory file \(name)") }
        let owner = Descriptor(owning: raw)
        guard ftruncate(raw, off_t(byteCount)) == 0 else {
            throw .system("cannot size the memory file \(name) to \(byteCount) bytes")
        }
        guard cp_seal_size(raw) == 0 else { throw .system("cannot seal \(name)") }
        descriptor = owner
    }

    public consuming func takeDescriptor() -> Descriptor { descriptor }

    /// Gives the pages of the range back to the host; they read as zeros afterwards.
    @inline(__always)
    public static func punch(_ raw: Int32, offset: UInt64, byteCount: UInt64) throws(QuireError) {
        guard cp_punch_hole(raw, off_t(offset), off_t(byteCount)) == 0 else {
            throw .system("cannot punch \(byteCount) bytes at \(offset)")
        }
    }

    /// Whether the range has any pages. Half the price of `nextData`, which also looks for the end of what it finds.
    public static func hasData(_ raw: Int32, _ range: Range<UInt64>) -> Bool {
        let data = cp_seek_data(raw, off_t(range.lowerBound))
        return data >= 0 && UInt64(data) < range.upperBound
    }

    /// The next range at or after `offset` that has pages, within `end`; nil if there is none.
    public static func nextData(_ raw: Int32, from offset: UInt64, to end: UInt64) -> Range<UInt64>? {
        let data = cp_seek_data(raw, off_t(offset))
        guard data >= 0, UInt64(data) < end else { return nil }
        let hole = cp_seek_hole(raw, data)
        return UInt64(data)..<(hole > data ? min(UInt64(hole), end) : end)
    }

    /// What kind of file backs a region of guest RAM, as far as recycling cares.
    public enum Kind: Sendable, Equatable {
        /// memfd or a file on tmpfs: pages can be given back one by one.
        case shmem
        /// Huge pages of a fixed pool: pages cannot be given back one by one.
        case hugetlb
        /// A file on a disk, a device: not ours to punch.
        case other
    }

    public static func kind(of raw: Int32) throws(QuireError) -> Kind {
        var info = statfs()
        guard unsafe fstatfs(raw, &info) == 0 else { throw .system("cannot examine the memory file") }
        switch info.f_type {
        case Int(TMPFS_MAGIC): return .shmem
        case Int(HUGETLBFS_MAGIC): return .hugetlb
        default: return .other
        }
    }
}
