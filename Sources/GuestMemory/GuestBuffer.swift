import CPlatform
import Platform

/// A scattered buffer in guest memory: what a descriptor chain describes. All device access to guest memory goes through
/// this type, so that the dirty log and the state of a page are looked after in one place.
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
    private let log: DirtyTracker

    init(log: DirtyTracker) { self.log = log }

    mutating func append(_ segment: Segment) {
        segments.append(segment)
        count += segment.count
    }

    public mutating func append(_ other: GuestBuffer) {
        segments += other.segments
        count += other.count
    }

    public static func empty(log: DirtyTracker) -> GuestBuffer { GuestBuffer(log: log) }

    /// The part from `start` on, at most `length` bytes long.
    public func slice(from start: Int, count length: Int) -> GuestBuffer {
        var result = GuestBuffer(log: log)
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

    /// A copy of all bytes.
    public func copyOut() -> [UInt8] {
        var bytes: [UInt8] = []
        bytes.reserveCapacity(count)
        for segment in segments {
            bytes += segment.place.mapping.copyOut(segment.place.offset, count: segment.count)
        }
        return bytes
    }

    /// Writes `bytes` to the start of the buffer. There must be room.
    public func copyIn(_ bytes: [UInt8]) {
        precondition(bytes.count <= count)
        var done = 0
        for segment in segments where done < bytes.count {
            let here = min(segment.count, bytes.count - done)
            segment.place.mapping.copyIn(segment.place.offset, bytes[done..<done + here])
            log.markDirty(guestAddress: segment.place.guestAddress, byteCount: UInt64(here))
            done += here
        }
    }

    public func clear() {
        for segment in segments { segment.place.mapping.clear(segment.place.offset, count: segment.count) }
        markDirty()
    }

    /// Fills the buffer from a file. What lies beyond the end of the file reads as zeros.
    public func read(from file: borrowing Descriptor, at offset: UInt64) throws(QuireError) {
        let done: Int
        do throws(QuireError) {
            done = try unsafe transfer { vectors, count, position in
                unsafe preadv(file.raw, vectors, count, off_t(offset) + off_t(position))
            }
        } catch {
            // A read that fails half-way has written to guest memory, too.
            markDirty()
            throw error
        }
        if done < count { slice(from: done, count: count - done).clear() }
        markDirty()
    }

    /// Writes the whole buffer to a file.
    public func write(to file: borrowing Descriptor, at offset: UInt64) throws(QuireError) {
        let done = try unsafe transfer { vectors, count, position in
            unsafe pwritev(file.raw, vectors, count, off_t(offset) + off_t(position))
        }
        guard done == count else { throw QuireError(.system, "short write to the file", errno: EIO) }
    }

    private func markDirty() {
        for segment in segments {
            log.markDirty(guestAddress: segment.place.guestAddress, byteCount: UInt64(segment.count))
        }
    }

    /// Runs a vectored transfer until the buffer or the file ends; returns the bytes done. The addresses stay valid: every
    /// segment retains its region, which owns the mapping.
    private func transfer(_ body: (UnsafePointer<iovec>, Int32, Int) -> Int) throws(QuireError) -> Int {
        var done = 0
        while done < count {
            let rest = slice(from: done, count: count - done)
            var vectors = unsafe rest.segments.prefix(1024).map { segment in
                unsafe iovec(
                    iov_base: segment.place.mapping.address(segment.place.offset, count: segment.count),
                    iov_len: segment.count)
            }
            let n = unsafe body(&vectors, Int32(vectors.count), done)
            if n < 0 && cp_errno() == EINTR { continue }
            guard n >= 0 else { throw .system("disk transfer failed") }
            if n == 0 { break }
            done += n
        }
        return done
    }
}
