import CPlatform

/// The owner of a memory mapping, and the one place where mapped memory is touched.
///
/// Every access is checked against the mapping's size first, so a wrong offset from a guest or a peer ends in a trap or
/// an error and never in memory outside. The memory may change under our feet at any time (the guest, QEMU or another
/// process write to it), so single values are read and written atomically, and bytes are copied out before they are
/// looked at: a value is never read twice and believed both times.
///
/// Why the unsafe code in here is sound: `base` is valid for `byteCount` bytes from init to deinit, the type is
/// non-copyable so there is one deinit, and no pointer leaves except in `unsafe`-marked calls whose callers state why.
/// A file that is truncated while it is mapped would raise SIGBUS: memfds of ours are sealed against that, and mappings
/// of what a peer passed are guarded (`FileOwner`).
@safe public struct Mapping: ~Copyable, @unchecked Sendable {
    private let base: UnsafeMutableRawPointer
    /// Bytes.
    public let byteCount: Int
    public let owner: FileOwner

    public enum Access: Sendable { case readOnly, readWrite }

    /// Maps `byteCount` bytes at `offset` of the file, shared. `offset` must be a multiple of the page size.
    /// `owner` is whose the file is: a peer's may be cut off under us.
    public init(
        _ descriptor: borrowing Descriptor, offset: UInt64 = 0, byteCount: Int, access: Access = .readWrite,
        owner: FileOwner = .us
    ) throws(QuireError) {
        try owner.secure(descriptor)
        guard let address = unsafe cp_map_shared(descriptor.raw, off_t(offset), byteCount, access == .readWrite) else {
            throw .system("cannot map \(byteCount) bytes")
        }
        do throws(QuireError) { try unsafe owner.guardMapping(address, byteCount: byteCount) } catch {
            unsafe munmap(address, byteCount)
            throw error
        }
        unsafe base = address
        self.byteCount = byteCount
        self.owner = owner
    }

    /// Zeroed memory of this process alone. What nobody touches costs nothing.
    public init(anonymousByteCount: Int) throws(QuireError) {
        guard let address = unsafe cp_map_anonymous(anonymousByteCount) else {
            throw .system("cannot reserve \(anonymousByteCount) bytes")
        }
        unsafe base = address
        byteCount = anonymousByteCount
        owner = .us
    }

    deinit {
        unsafe owner.unguardMapping(base)
        unsafe munmap(base, byteCount)
    }

    /// Keeps the mapping out of children and of core dumps.
    public borrowing func excludeFromDumps() { _ = unsafe madvise(base, byteCount, MADV_DONTDUMP) }

    private borrowing func at(_ offset: Int, _ count: Int) -> UnsafeMutableRawPointer {
        precondition(offset >= 0 && count >= 0 && offset <= byteCount - count, "access outside of the mapping")
        return unsafe base + offset
    }

    /// The address of `count` bytes at `offset`, for a system call. The caller keeps the mapping alive over the call.
    @unsafe public borrowing func address(_ offset: Int, count: Int) -> UnsafeMutableRawPointer {
        unsafe at(offset, count)
    }

    // Atomic access. Offsets in bytes; they must be aligned to the value's size.
    public borrowing func load8(_ offset: Int) -> UInt8 { unsafe cp_load_u8(at(offset, 1)) }
    public borrowing func load16(_ offset: Int) -> UInt16 { unsafe cp_load_u16(at(offset, 2)) }
    public borrowing func load32(_ offset: Int) -> UInt32 { unsafe cp_load_u32(at(offset, 4)) }
    public borrowing func load64(_ offset: Int) -> UInt64 { unsafe cp_load_u64(at(offset, 8)) }
    public borrowing func store8(_ offset: Int, _ value: UInt8) { unsafe cp_store_u8(at(offset, 1), value) }
    public borrowing func store16(_ offset: Int, _ value: UInt16) { unsafe cp_store_u16(at(offset, 2), value) }
    public borrowing func store32(_ offset: Int, _ value: UInt32) { unsafe cp_store_u32(at(offset, 4), value) }
    public borrowing func store64(_ offset: Int, _ value: UInt64) { unsafe cp_store_u64(at(offset, 8), value) }
    public borrowing func add64(_ offset: Int, _ value: UInt64) { unsafe cp_add_u64(at(offset, 8), value) }
    public borrowing func or8(_ offset: Int, _ bits: UInt8) { unsafe cp_or_u8(at(offset, 1), bits) }
    public borrowing func compareExchange8(_ offset: Int, expected: UInt8, desired: UInt8) -> Bool {
        unsafe cp_cas_u8(at(offset, 1), expected, desired)
    }

    public borrowing func compareExchange32(_ offset: Int, expected: UInt32, desired: UInt32) -> Bool {
        unsafe cp_cas_u32(at(offset, 4), expected, desired)
    }

    /// Reads up to `count` bytes of a file to `offset`; returns how many came, or -1 with errno. No memory for a page of
    /// this mapping is an error here and not a signal, since it is the kernel that writes.
    public borrowing func read(_ raw: Int32, at position: UInt64, to offset: Int, count: Int) -> Int {
        unsafe pread(raw, at(offset, count), count, off_t(position))
    }

    /// Writes `count` bytes at `offset` to a file; returns how many went, or -1 with errno.
    public borrowing func write(_ raw: Int32, at position: UInt64, from offset: Int, count: Int) -> Int {
        unsafe pwrite(raw, at(offset, count), count, off_t(position))
    }

    /// Whether two ranges hold the same bytes.
    public borrowing func equals(_ offset: Int, _ other: borrowing Mapping, _ otherOffset: Int, count: Int) -> Bool {
        unsafe memcmp(at(offset, count), other.at(otherOffset, count), count) == 0
    }

    /// Never huge pages here: they would bring memory that nobody asked for.
    public borrowing func refuseHugePages() { _ = unsafe madvise(base, byteCount, MADV_NOHUGEPAGE) }
    /// For tables that are read and written at random: fewer faults and fewer misses of the TLB. A kernel without them goes on
    /// without.
    public borrowing func preferHugePages() { _ = unsafe madvise(base, byteCount, MADV_HUGEPAGE) }

    /// Brings the memory of a range into being now, writable, whole pages: no access to it can fail later for lack of memory,
    /// and one call costs less than a fault a page. Linux before 5.14 does nothing.
    public borrowing func populate(_ offset: Int, count: Int) throws(QuireError) {
        let address = unsafe at(offset, count)
        while unsafe madvise(address, count, 23 /* MADV_POPULATE_WRITE */) != 0 {
            let code = cp_errno()
            if code == EINTR || code == EAGAIN { continue }
            if code == EINVAL { return }
            throw QuireError(.noSpace, "the host has no memory for \(count) bytes more", errno: code)
        }
    }

    /// Copies `count` bytes out.
    public borrowing func copyOut(_ offset: Int, count: Int) -> [UInt8] {
        let source = unsafe at(offset, count)
        return unsafe [UInt8](unsafeUninitializedCapacity: count) { buffer, initialized in
            if count > 0 { unsafe memcpy(buffer.baseAddress!, source, count) }
            initialized = count
        }
    }

    /// The same, into bytes that are there.
    public borrowing func copyOut(_ offset: Int, count: Int, to bytes: inout [UInt8], at position: Int) {
        precondition(position >= 0 && count <= bytes.count - position)
        let source = unsafe at(offset, count)
        unsafe bytes.withUnsafeMutableBytes { target in
            if count > 0 { unsafe memcpy(target.baseAddress! + position, source, count) }
        }
    }

    public borrowing func copyIn(_ offset: Int, _ bytes: some Collection<UInt8>) {
        let target = unsafe UnsafeMutableRawBufferPointer(start: at(offset, bytes.count), count: bytes.count)
        unsafe target.copyBytes(from: bytes)
    }

    /// Text in a fixed-size field, zero-padded, cut at a character boundary where it is too long.
    public borrowing func storeText(_ offset: Int, capacity: Int, _ text: String) {
        copyIn(offset, paddedText(text, capacity: capacity))
    }

    public borrowing func loadText(_ offset: Int, capacity: Int) -> String {
        let bytes = copyOut(offset, count: capacity)
        return String(decoding: bytes.prefix { $0 != 0 }, as: UTF8.self)
    }

    /// A view of `count` bytes at `offset` that costs nothing to pass around and nothing to use. It does not keep the
    /// mapping alive: whoever makes one says what does.
    @unsafe public borrowing func view(_ offset: Int, count: Int) -> MappedBytes {
        unsafe MappedBytes(base: at(offset, count), count: count)
    }
}

/// Bytes of a mapping that somebody else keeps alive, for loops over many single values: the same checked, atomic access
/// as a `Mapping` gives, without a reference to count and without a call.
@safe public struct MappedBytes: @unchecked Sendable {
    @usableFromInline let base: UnsafeMutableRawPointer
    public let count: Int

    init(base: UnsafeMutableRawPointer, count: Int) {
        unsafe self.base = base
        self.count = count
    }

    /// The address of `size` bytes at `offset`, for a call that keeps it no longer than the bytes live.
    @unsafe @inlinable @inline(__always) public func address(_ offset: Int, count size: Int) -> UnsafeMutableRawPointer {
        unsafe at(offset, size)
    }

    @inlinable @inline(__always) func at(_ offset: Int, _ size: Int) -> UnsafeMutableRawPointer {
        precondition(offset >= 0 && offset <= count &- size)
        return unsafe base + offset
    }

    @inlinable @inline(__always) public func load8(_ offset: Int) -> UInt8 { unsafe cp_load_u8(at(offset, 1)) }
    @inlinable @inline(__always) public func load16(_ offset: Int) -> UInt16 { unsafe cp_load_u16(at(offset, 2)) }
    @inlinable @inline(__always) public func load32(_ offset: Int) -> UInt32 { unsafe cp_load_u32(at(offset, 4)) }
    @inlinable @inline(__always) public func load64(_ offset: Int) -> UInt64 { unsafe cp_load_u64(at(offset, 8)) }
    @inlinable @inline(__always) public func store32(_ offset: Int, _ value: UInt32) { unsafe cp_store_u32(at(offset, 4), value) }
    @inlinable @inline(__always) public func store8(_ offset: Int, _ value: UInt8) { unsafe cp_store_u8(at(offset, 1), value) }
    @inlinable @inline(__always) public func store64(_ offset: Int, _ value: UInt64) { unsafe cp_store_u64(at(offset, 8), value) }
    @inlinable @inline(__always) public func add64(_ offset: Int, _ value: UInt64) { unsafe cp_add_u64(at(offset, 8), value) }
    @inlinable @inline(__always) public func compareExchange8(_ offset: Int, expected: UInt8, desired: UInt8) -> Bool {
        unsafe cp_cas_u8(at(offset, 1), expected, desired)
    }

    @inlinable @inline(__always) public func store16(_ offset: Int, _ value: UInt16) {
        unsafe cp_store_u16(at(offset, 2), value)
    }
    @inlinable @inline(__always)
    public func compareExchange64(_ offset: Int, expected: UInt64, desired: UInt64) -> Bool {
        unsafe cp_cas_u64(at(offset, 8), expected, desired)
    }

    /// A load that no earlier sequentially consistent operation of this thread is moved behind.
    @inlinable @inline(__always) public func loadSequential8(_ offset: Int) -> UInt8 {
        unsafe cp_load_sequential_u8(at(offset, 1))
    }

    /// Adds, wrapping around, and returns what was there; sequentially consistent.
    @inlinable @inline(__always) public func fetchAdd16(_ offset: Int, _ value: UInt16) -> UInt16 {
        unsafe cp_fetch_add_u16(at(offset, 2), value)
    }

    /// How many of the bytes, at most 4096 and a multiple of 64, are 0xff; and which blocks of 64 (bit i: bytes 64 i and
    /// up) hold a byte that is neither 0 nor 0xff. A snapshot without any order: good for finding what deserves an atomic
    /// look, never for a decision.
    public func census() -> (ones: Int, others: UInt64) {
        precondition(count <= 4096 && count % 64 == 0)
        var others: UInt64 = 0
        let ones = unsafe cp_census(base.assumingMemoryBound(to: UInt8.self), UInt32(count / 64), &others)
        return (Int(ones), others)
    }
}

/// `text` as exactly `capacity` bytes of UTF-8: cut between characters, padded with zeros, never without a terminator.
public func paddedText(_ text: String, capacity: Int) -> [UInt8] {
    var bytes: [UInt8] = []
    for character in text {
        let next = Array(String(character).utf8)
        if bytes.count + next.count >= capacity { break }
        bytes += next
    }
    return bytes + [UInt8](repeating: 0, count: capacity - bytes.count)
}
