import Platform

/// Knows where the bytes of each guest page are, and can keep them there for a while. Pages that are equal to others
/// are merged: then the front end's mapping leads to the bytes, and our mapping of the memory file to nothing of value.
/// Who merges is nothing to this module.
public protocol GuestPages: AnyObject, Sendable {
    /// Pages that are locked together; a power of two.
    var lockPages: UInt64 { get }

    /// Keeps all of these pages where they are until `endAccess`, which must follow with the same range. May wait for
    /// microseconds. Throws `.busy` if it would be for long: then nothing is kept.
    func beginAccess(_ gfns: Range<GFN>) throws(QuireError)
    func endAccess(_ gfns: Range<GFN>)

    /// How many of these pages, from the first on, are where the first one is: in the memory file, or merged. Between
    /// `beginAccess` and `endAccess` only.
    func alike(_ gfns: Range<GFN>) throws(QuireError) -> (count: Int, isMerged: Bool)

    /// A device has written these.
    func noteWritten(_ gfns: Range<GFN>)

    /// The front end has said where guest memory is: before a ring or a buffer in it is used.
    func use(_ memory: GuestMemory)

    /// The front end's address space, where the bytes of merged pages are.
    func frontEnd() throws(QuireError) -> ProcessMemory

    /// Brings these pages back into the memory file, and keeps them there as long as the result lives: for memory that
    /// is used through the mapping, with atomics.
    func keepPrivate(_ gfns: [Range<GFN>]) throws(QuireError) -> PageHold
}

/// Keeps pages out of merging. Its end is the end of that.
public final class PageHold: Sendable {
    private let release: @Sendable () -> Void
    public init(_ release: @escaping @Sendable () -> Void) { self.release = release }
    deinit { release() }
}

extension GuestMemory {
    /// Before these bytes of guest memory are used through a mapping: from then on, and as long as the result lives,
    /// the mapping has the bytes. Nil where nothing is ever merged.
    public func keepPrivate(_ ranges: [Range<UInt64>]) throws(QuireError) -> PageHold? {
        try pages?.keepPrivate(
            ranges.filter { !$0.isEmpty }.map { $0.lowerBound / pageBytes..<($0.upperBound - 1) / pageBytes + 1 })
    }
}

/// An access to some segments of guest memory: their pages stay where they are as long as it lives.
///
/// Accesses of one thread are never nested; if they were, nothing would break, for whoever moves pages never waits.
struct PageAccess: ~Copyable {
    private let pages: any GuestPages
    /// Whole locks, each once however many segments touch it: a guest may describe the same page thousands of times,
    /// and a lock counts to 65,535.
    private let first: Range<GFN>
    private let rest: [Range<GFN>]

    init(_ segments: ArraySlice<GuestBuffer.Segment>, in pages: any GuestPages) throws(QuireError) {
        // Held first, and noted then: what was begun is ended, and nothing else.
        if segments.count == 1 {
            let range = Self.locks(segments[segments.startIndex].gfns, pages.lockPages)
            try pages.beginAccess(range)
            self.pages = pages
            first = range
            rest = []
        } else {
            let ranges = try Self.hold(segments, in: pages)
            self.pages = pages
            first = 0..<0
            rest = ranges
        }
    }

    @inline(__always) private static func locks(_ gfns: Range<GFN>, _ unit: UInt64) -> Range<GFN> {
        gfns.lowerBound & ~(unit - 1)..<(gfns.upperBound + unit - 1) & ~(unit - 1)
    }

    private static func hold(
        _ segments: ArraySlice<GuestBuffer.Segment>, in pages: any GuestPages
    ) throws(QuireError) -> [Range<GFN>] {
        let unit = pages.lockPages
        var all: [Range<GFN>] = []
        for range in segments.map({ locks($0.gfns, unit) }).sorted(by: { $0.lowerBound < $1.lowerBound }) {
            if let last = all.last, last.upperBound >= range.lowerBound {
                all[all.count - 1] = last.lowerBound..<max(last.upperBound, range.upperBound)
            } else {
                all.append(range)
            }
        }
        for (held, range) in all.enumerated() {
            do throws(QuireError) { try pages.beginAccess(range) } catch {
                for range in all.prefix(held) { pages.endAccess(range) }
                throw error
            }
        }
        return all
    }

    deinit {
        if !first.isEmpty { pages.endAccess(first) }
        for range in rest { pages.endAccess(range) }
    }

    /// Whether all of the segments' bytes are in the memory file.
    borrowing func areInFile(_ segments: ArraySlice<GuestBuffer.Segment>) throws(QuireError) -> Bool {
        for index in segments.indices {
            let gfns = segments[index].gfns
            let (count, isMerged) = try pages.alike(gfns)
            if isMerged || count < gfns.count { return false }
        }
        return true
    }

    /// The segment cut where its bytes move from the memory file to the front end or back. `body` gets the place, the
    /// number of bytes, and where they are: nil for the memory file.
    borrowing func forEachPart(
        _ segment: GuestBuffer.Segment, _ body: (GuestMemory.Place, Int, ProcessMemory?) throws(QuireError) -> Void
    ) throws(QuireError) {
        var done = 0
        while done < segment.count {
            let place = GuestMemory.Place(region: segment.place.region, offset: segment.place.offset + done)
            let gfns = GuestBuffer.Segment(place: place, count: segment.count - done).gfns
            let (count, isMerged) = try pages.alike(gfns)
            let end = (gfns.lowerBound + UInt64(count)) * pageBytes
            let here = min(Int(end - place.guestAddress), segment.count - done)
            try body(place, here, isMerged ? try pages.frontEnd() : nil)
            done += here
        }
    }
}

extension GuestBuffer.Segment {
    var gfns: Range<GFN> {
        let address = place.guestAddress
        return count == 0 ? 0..<0 : address / pageBytes..<(address + UInt64(count) - 1) / pageBytes + 1
    }
}
