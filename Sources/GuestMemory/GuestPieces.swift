import CPlatform
import Platform

/// A buffer in pieces of equal size, for a store that takes and gives whole pages. Segments of the guest's need not be
/// aligned to pieces, nor hold whole ones.
///
/// All pages of the buffer stay where they are until the last piece is done: the store must not wait for anybody.
extension GuestBuffer {
    /// Calls `body` with each piece of `size` bytes, in order; `count` is a multiple of it. Each is a copy, for the guest
    /// may write to its memory while a store looks at the bytes twice: to compare, to hash, to compress.
    public func forEachPiece(
        of size: Int, _ body: (_ index: Int, _ piece: RawSpan) throws(QuireError) -> Void
    ) throws(QuireError) {
        precondition(count % size == 0)
        var piece = [UInt8](repeating: 0, count: size)
        var filled = 0
        var index = 0
        try forEachPart { (place, count, frontEnd) throws(QuireError) in
            var done = 0
            while done < count {
                let here = min(count - done, size - filled)
                if let frontEnd {
                    piece.replaceSubrange(
                        filled..<filled + here, with: try frontEnd.load(place.userAddress + UInt64(done), count: here))
                } else {
                    place.mapping.copyOut(place.offset + done, count: here, to: &piece, at: filled)
                }
                done += here
                filled += here
                guard filled == size else { continue }
                // A span of bytes that `piece` keeps.
                try body(index, unsafe piece.span.bytes)
                filled = 0
                index += 1
            }
        }
    }

    /// Has `body` fill each piece of `size` bytes, in order; `count` is a multiple of it. A piece that lies in one place of
    /// the memory file is filled there, so `body` must not rely on what it has written to it.
    public func fillPieces(
        of size: Int, _ body: (_ index: Int, _ piece: inout MutableRawSpan) throws(QuireError) -> Void
    ) throws(QuireError) {
        precondition(count % size == 0)
        // What fails half-way has written, too.
        defer { markDirty() }
        // Made when the first piece needs it.
        var bounce: [UInt8] = []
        var taken = 0
        var index = 0
        try forEachPart { (place, count, frontEnd) throws(QuireError) in
            var done = 0
            while done < count {
                if taken == 0, frontEnd == nil, count - done >= size {
                    // The segment retains its region, which owns the mapping.
                    let target = unsafe UnsafeMutableRawBufferPointer(
                        start: place.mapping.address(place.offset + done, count: size), count: size)
                    var span = unsafe target.mutableBytes
                    try body(index, &span)
                    done += size
                    index += 1
                    continue
                }
                if taken == 0 {
                    if bounce.isEmpty { bounce = [UInt8](repeating: 0, count: size) }
                    var span = bounce.mutableSpan
                    var bytes = unsafe span.mutableBytes
                    try body(index, &bytes)
                    index += 1
                }
                let here = min(count - done, size - taken)
                let part = bounce[taken..<taken + here]
                if let frontEnd {
                    try frontEnd.store(place.userAddress + UInt64(done), part)
                } else {
                    place.mapping.copyIn(place.offset + done, part)
                }
                done += here
                taken = (taken + here) % size
            }
        }
    }

    /// The segments, cut where their bytes move from the memory file to the front end or back: nil for the memory file.
    private func forEachPart(
        _ body: (GuestMemory.Place, Int, ProcessMemory?) throws(QuireError) -> Void
    ) throws(QuireError) {
        guard let pages else {
            for segment in segments { try body(segment.place, segment.count, nil) }
            return
        }
        let access = try PageAccess(segments[...], in: pages)
        let areInFile = try access.areInFile(segments[...])
        for segment in segments {
            if areInFile { try body(segment.place, segment.count, nil) } else { try access.forEachPart(segment, body) }
        }
    }
}
