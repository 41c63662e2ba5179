import Platform

/// Guest RAM at one moment: an immutable set of regions. When the front end changes its memory table, a new value is
/// made; whoever still holds the old one keeps its mappings alive.
public struct GuestMemory: Sendable {
    /// Sorted by guest address, disjoint.
    public let regions: [MemoryRegion]
    public let log: DirtyTracker
    /// Who knows where the bytes are; nil: in the regions' files, all of them, always.
    public let pages: (any GuestPages)?

    public init(
        _ regions: [MemoryRegion] = [], log: DirtyTracker, pages: (any GuestPages)? = nil
    ) throws(QuireError) {
        let sorted = regions.sorted { $0.guestAddress < $1.guestAddress }
        for (lower, upper) in zip(sorted, sorted.dropFirst())
        where lower.guestAddress + lower.byteCount > upper.guestAddress {
            throw QuireError(
                .invalid, "memory regions at guest addresses 0x\(String(lower.guestAddress, radix: 16)) and "
                    + "0x\(String(upper.guestAddress, radix: 16)) overlap")
        }
        let byUser = regions.sorted { $0.userAddress < $1.userAddress }
        for (lower, upper) in zip(byUser, byUser.dropFirst())
        where lower.userAddress + lower.byteCount > upper.userAddress {
            throw QuireError(
                .invalid, "memory regions at front-end addresses 0x\(String(lower.userAddress, radix: 16)) and "
                    + "0x\(String(upper.userAddress, radix: 16)) overlap")
        }
        self.regions = sorted
        self.log = log
        self.pages = pages
    }

    /// Bytes of RAM in all regions.
    public var byteCount: UInt64 { regions.reduce(0) { $0 + $1.byteCount } }

    /// A place inside one region.
    public struct Place: Sendable {
        public let region: MemoryRegion
        /// Bytes from the region's start.
        public let offset: Int
        public var guestAddress: UInt64 { region.guestAddress + UInt64(offset) }
        /// The same byte's address in the front end.
        public var userAddress: UInt64 { region.userAddress + UInt64(offset) }
        /// Ours, of the memory file: has the bytes of pages that are kept private (`GuestMemory.keepPrivate`). For all
        /// others use a `GuestBuffer`.
        public var mapping: Mapping { _read { yield region.mapping } }
    }

    /// The region that holds all of `count` bytes at guest address `address`; nil if none does.
    public func place(ofGuest address: UInt64, count: UInt64) -> Place? {
        for region in regions {
            if let offset = region.offset(ofGuest: address, count: count) { return Place(region: region, offset: offset) }
        }
        return nil
    }

    /// The same for an address of the front end.
    public func place(ofUser address: UInt64, count: UInt64) -> Place? {
        for region in regions {
            if let offset = region.offset(ofUser: address, count: count) { return Place(region: region, offset: offset) }
        }
        return nil
    }

    /// The region that holds a page; nil where the guest has no RAM.
    public func region(of gfn: GFN) -> MemoryRegion? {
        var low = 0
        var high = regions.count
        while low < high {
            let middle = (low + high) / 2
            let range = regions[middle].gfns
            if gfn < range.lowerBound { high = middle } else if gfn >= range.upperBound { low = middle + 1 } else { return regions[middle] }
        }
        return nil
    }

    /// The memory files of regions, each once (raw descriptors), and for each region which of them is its own: how
    /// somebody is told of them who is passed the files.
    public static func files(of regions: [MemoryRegion]) -> (files: [Int32], indices: [Int]) {
        var files: [(identity: FileStatus.Identity, raw: Int32)] = []
        let indices = regions.map { region in
            let index = files.firstIndex { $0.identity == region.file } ?? files.count
            if index == files.count { files.append((region.file, region.descriptor.raw)) }
            return index
        }
        return (files.map(\.raw), indices)
    }

    /// A buffer of no bytes, to be added to.
    public var emptyBuffer: GuestBuffer { GuestBuffer(log: log, pages: pages) }

    /// A buffer of the guest's, which may span neighbouring regions. Throws `.guest` if any byte is outside of RAM.
    public func buffer(_ address: UInt64, count: UInt64) throws(QuireError) -> GuestBuffer {
        var buffer = GuestBuffer(log: log, pages: pages)
        var address = address
        var left = count
        while left > 0 {
            guard let region = regions.first(where: { $0.offset(ofGuest: address, count: 1) != nil }) else {
                throw QuireError(.guest, "guest address 0x\(String(address, radix: 16)) is outside of RAM")
            }
            let offset = region.offset(ofGuest: address, count: 1)!
            let here = min(left, region.byteCount - UInt64(offset))
            buffer.append(GuestBuffer.Segment(place: Place(region: region, offset: offset), count: Int(here)))
            left -= here
            guard left > 0 else { break }
            let (next, overflow) = address.addingReportingOverflow(here)
            guard !overflow else { throw QuireError(.guest, "a buffer wraps around the end of the address space") }
            address = next
        }
        return buffer
    }
}
