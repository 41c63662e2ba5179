import GuestMemory
import PageContent
import Platform

/// Finds what a guest has written where the kernel cannot tell (before Linux 6.7): by reading every page again and again, and
/// comparing 32 bits of its hash with those of the last time. A change that leaves them alike is found later or never; then
/// pages are looked up that are not quiet, and nothing worse.
///
/// Costs 4 bytes a page of guest memory, and reading all of it: a budget of pages keeps that at a bearable rate, so a round
/// through all of memory may take several passes.
final class HashedPages: Sendable {
    let gfns: Range<GFN>
    private let prints: Mapping
    private let buffer: Mapping
    private static let readPages = 64

    init(_ gfns: Range<GFN>) throws(QuireError) {
        self.gfns = gfns
        prints = try Mapping(anonymousByteCount: gfns.count * 4)
        buffer = try Mapping(anonymousByteCount: Self.readPages * Int(pageBytes))
    }

    /// Reads the pages from `position` on that are in the file and private, at most `budget` of them; moves `position`, and
    /// adds to `read` how many were hashed. `changed` is called with those that are not what they were.
    func look(
        _ region: MemoryRegion, _ map: PageMap, from position: inout GFN, budget: inout Int, _ hasher: PageHasher,
        read: inout Int, changed: (GFN) -> Void
    ) {
        let end = region.fileOffset + region.byteCount
        while budget > 0, position < gfns.upperBound,
            let data = Memfd.nextData(region.descriptor.raw, from: region.fileOffset(of: position), to: end)
        {
            let first = gfns.lowerBound + (data.lowerBound - region.fileOffset) / pageBytes
            let last = gfns.lowerBound + (data.upperBound - region.fileOffset) / pageBytes
            position = max(position, first)
            while budget > 0, position < last {
                let count = min(Self.readPages, Int(last - position), budget)
                let bytes = buffer.read(
                    region.descriptor.raw, at: region.fileOffset(of: position), to: 0, count: count * Int(pageBytes))
                guard bytes == count * Int(pageBytes) else {
                    position = gfns.upperBound
                    return
                }
                for index in 0..<count where map.state(of: position + UInt64(index)) == .private {
                    let gfn = position + UInt64(index)
                    read += 1
                    let print = UInt32(truncatingIfNeeded: hasher.hash(buffer, at: index * Int(pageBytes)).low)
                    let place = Int(gfn - gfns.lowerBound) * 4
                    if prints.load32(place) != print {
                        prints.store32(place, print)
                        changed(gfn)
                    }
                }
                position += UInt64(count)
                budget -= count
            }
        }
        // Nothing in the file any more.
        if budget > 0 { position = gfns.upperBound }
    }
}
