import CPlatform
import Platform

/// A scattered buffer in guest memory: what a descriptor chain describes. All device access to guest memory goes
/// through this type, so that the dirty log and the state of a page are looked after in one place: the bytes are where
/// `GuestPages` says, and stay there over the access. An access that fails may have been done in part; it never reads
/// or changes other bytes.
///
/// The bytes may change while they are read (the guest is hostile): copy out what will be judged, judge the copy.
public struct GuestBuffer: Sendable {
    public struct Segment: Sendable {
        public let place: GuestMemory.Place
        public let count: Int
    }

    public private(set) var segments: [Segment] = []
    /// Bytes in all segments.
    public private(set) var count = 0
    let log: DirtyTracker
    let pages: (any GuestPages)?

    init(log: DirtyTracker, pages: (any GuestPages)?) {
        self.log = log
        self.pages = pages
    }

    mutating func append(_ segment: Segment) {
        segments.append(segment)
        count += segment.count
    }

    public mutating func append(_ other: GuestBuffer) {
        segments += other.segments
        count += other.count
    }

    /// The part from `start` on, at most `length` bytes long.
    public func slice(from start: Int, count length: Int) -> GuestBuffer {
        var result = GuestBuffer(log: log, pages: pages)
        var skip = start
        var left = length
        for segment in segments where left > 0 {
            if skip >= segment.count {
                skip -= segment.count
                continue
            }
            let here = min(segment.count - skip, left)
            let place = GuestMemory.Place(region: segment.place.region, offset: segment.place.offset + skip)
            result.append(Segment(place: place, count: here))
            skip = 0
            left -= here
        }
        return result
    }

    // MARK: - Bytes

    /// A copy of all bytes.
    public func copyOut() throws(QuireError) -> [UInt8] {
        guard let pages else { return copyOutOfFile() }
        let access = try PageAccess(segments[...], in: pages)
        if try access.areInFile(segments[...]) { return copyOutOfFile() }
        return try copyOut(access)
    }

    private func copyOutOfFile() -> [UInt8] {
        if segments.count == 1 { return segments[0].place.mapping.copyOut(segments[0].place.offset, count: count) }
        var bytes: [UInt8] = []
        bytes.reserveCapacity(count)
        for segment in segments {
            bytes += segment.place.mapping.copyOut(segment.place.offset, count: segment.count)
        }
        return bytes
    }

    private func copyOut(_ access: borrowing PageAccess) throws(QuireError) -> [UInt8] {
        var bytes: [UInt8] = []
        bytes.reserveCapacity(count)
        for segment in segments {
            try access.forEachPart(segment) { (place, count, frontEnd) throws(QuireError) in
                if let frontEnd {
                    bytes += try frontEnd.load(place.userAddress, count: count)
                } else {
                    bytes += place.mapping.copyOut(place.offset, count: count)
                }
            }
        }
        return bytes
    }

    /// Writes `bytes` to the start of the buffer. There must be room.
    public func copyIn(_ bytes: [UInt8]) throws(QuireError) {
        precondition(bytes.count <= count)
        guard bytes.count == count else { return try slice(from: 0, count: bytes.count).copyIn(bytes) }
        // What fails half-way has written, too.
        defer { markDirty() }
        guard let pages else { return copyIntoFile(bytes) }
        let access = try PageAccess(segments[...], in: pages)
        if try access.areInFile(segments[...]) { copyIntoFile(bytes) } else { try copyIn(bytes, access) }
    }

    private func copyIntoFile(_ bytes: [UInt8]) {
        var done = 0
        for segment in segments {
            segment.place.mapping.copyIn(segment.place.offset, bytes[done..<done + segment.count])
            done += segment.count
        }
    }

    private func copyIn(_ bytes: [UInt8], _ access: borrowing PageAccess) throws(QuireError) {
        var done = 0
        for segment in segments {
            try access.forEachPart(segment) { (place, count, frontEnd) throws(QuireError) in
                let part = bytes[done..<done + count]
                if let frontEnd {
                    try frontEnd.store(place.userAddress, part)
                } else {
                    place.mapping.copyIn(place.offset, part)
                }
                done += count
            }
        }
    }

    public func clear() throws(QuireError) {
        for start in stride(from: 0, to: count, by: Self.bounceBytes) {
            let part = slice(from: start, count: Self.bounceBytes)
            try part.copyIn([UInt8](repeating: 0, count: part.count))
        }
    }

    // MARK: - Files

    /// Fills the buffer from a file. What lies beyond the end of the file reads as zeros.
    public func read(from file: borrowing Descriptor, at offset: UInt64) throws(QuireError) {
        // A read that fails half-way has written to guest memory, too.
        defer { markDirty() }
        let done = try transfer(file.raw, at: offset, intoGuest: true)
        if done < count { try slice(from: done, count: count - done).clear() }
    }

    /// Writes the whole buffer to a file.
    public func write(to file: borrowing Descriptor, at offset: UInt64) throws(QuireError) {
        let done = try transfer(file.raw, at: offset, intoGuest: false)
        guard done == count else { throw QuireError(.system, "short write to the file", errno: EIO) }
    }

    func markDirty() {
        for segment in segments {
            log.markDirty(guestAddress: segment.place.guestAddress, byteCount: UInt64(segment.count))
            pages?.noteWritten(segment.gfns)
        }
    }

    /// The kernel takes so many pieces at once.
    private static let maxVectors = 1024
    /// Bytes that go through a buffer of ours at once, where they cannot go directly.
    private static let bounceBytes = 1 << 18

    /// Transfers until the buffer or the file ends; returns the bytes done.
    private func transfer(_ file: Int32, at offset: UInt64, intoGuest: Bool) throws(QuireError) -> Int {
        var done = 0
        while done < count {
            let rest = slice(from: done, count: count - done)
            let n = try rest.transferSome(file, at: offset + UInt64(done), intoGuest)
            if n == 0 { break }
            done += n
        }
        return done
    }

    /// One step of a transfer, from the buffer's start on; 0 at the end of the file. The pages stay where they are over
    /// the system call: what it writes into a page that is moved meanwhile would be lost.
    private func transferSome(_ file: Int32, at offset: UInt64, _ intoGuest: Bool) throws(QuireError) -> Int {
        let some = segments.prefix(Self.maxVectors)
        guard let pages else { return try Self.transferDirectly(some, file, offset, intoGuest) }
        let access = try PageAccess(some, in: pages)
        if try access.areInFile(some) { return try Self.transferDirectly(some, file, offset, intoGuest) }
        let part = slice(from: 0, count: min(some.reduce(0) { $0 + $1.count }, Self.bounceBytes))
        guard intoGuest else { return try Self.write(try part.copyOut(access), file, offset) }
        let bytes = try Self.read(part.count, file, offset)
        try part.slice(from: 0, count: bytes.count).copyIn(bytes, access)
        return bytes.count
    }

    /// The addresses stay valid over the call: every segment retains its region, which owns the mapping.
    private static func transferDirectly(
        _ segments: ArraySlice<Segment>, _ file: Int32, _ offset: UInt64, _ intoGuest: Bool
    ) throws(QuireError) -> Int {
        let vectors = unsafe segments.map { segment in
            unsafe iovec(
                iov_base: segment.place.mapping.address(segment.place.offset, count: segment.count),
                iov_len: segment.count)
        }
        return try repeating {
            unsafe intoGuest
                ? preadv(file, vectors, Int32(vectors.count), off_t(offset))
                : pwritev(file, vectors, Int32(vectors.count), off_t(offset))
        }
    }

    private static func read(_ count: Int, _ file: Int32, _ offset: UInt64) throws(QuireError) -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: count)
        let n = try repeating { unsafe pread(file, &bytes, count, off_t(offset)) }
        return Array(bytes.prefix(n))
    }

    private static func write(_ bytes: [UInt8], _ file: Int32, _ offset: UInt64) throws(QuireError) -> Int {
        try repeating { unsafe pwrite(file, bytes, bytes.count, off_t(offset)) }
    }

    private static func repeating(_ call: () -> Int) throws(QuireError) -> Int {
        while true {
            let n = call()
            if n >= 0 { return n }
            guard cp_errno() == EINTR else { throw .system("disk transfer failed") }
        }
    }
}
