import Platform

/// A guest page frame number: guest physical address / 4096.
public typealias GFN = UInt64

public let pageBytes: UInt64 = 4096

/// One region of guest RAM, as the front end describes it: where it lies for the guest, for the front end, and in its
/// file; and our mapping of it. Addresses, offsets and sizes are in bytes and page-aligned.
public final class MemoryRegion: Sendable {
    /// Guest physical address of the first byte.
    public let guestAddress: UInt64
    public let byteCount: UInt64
    /// The front end's virtual address of the first byte; ring addresses are given in these.
    public let userAddress: UInt64
    /// Where the region starts in its file.
    public let fileOffset: UInt64
    public let file: FileStatus.Identity
    public let kind: Memfd.Kind
    public let descriptor: Descriptor
    public let mapping: Mapping

    /// Checks everything that a lying front end could get wrong, then maps.
    public init(
        guestAddress: UInt64, byteCount: UInt64, userAddress: UInt64, fileOffset: UInt64,
        descriptor: consuming Descriptor, owner: FileOwner
    ) throws(QuireError) {
        let name = "memory region at guest address 0x\(String(guestAddress, radix: 16))"
        guard byteCount > 0 else { throw QuireError(.invalid, "\(name) is empty") }
        for value in [guestAddress, byteCount, fileOffset, userAddress] where value % pageBytes != 0 {
            throw QuireError(.invalid, "\(name) is not aligned to pages of 4 KiB")
        }
        guard !guestAddress.addingReportingOverflow(byteCount).overflow,
            !userAddress.addingReportingOverflow(byteCount).overflow,
            byteCount <= UInt64(Int.max)
        else { throw QuireError(.invalid, "\(name) wraps around the end of the address space") }
        let status = try descriptor.status()
        guard fileOffset <= status.byteCount, byteCount <= status.byteCount - fileOffset else {
            throw QuireError(
                .invalid, "\(name) needs \(byteCount) bytes at offset \(fileOffset) of a file of \(status.byteCount)")
        }
        let kind = try Memfd.kind(of: descriptor.raw)
        guard kind != .hugetlb else {
            throw QuireError(
                .unsupported, "\(name) is backed by huge pages, which cannot be given back one by one: use a memory "
                    + "backend without hugetlb=on or /dev/hugepages")
        }
        self.mapping = try Mapping(descriptor, offset: fileOffset, byteCount: Int(byteCount), owner: owner)
        mapping.excludeFromDumps()
        self.guestAddress = guestAddress
        self.byteCount = byteCount
        self.userAddress = userAddress
        self.fileOffset = fileOffset
        self.file = status.identity
        self.kind = kind
        self.descriptor = descriptor
    }

    /// Whether the file is too short for the region by now: its owner has truncated it.
    public var isCutOff: Bool {
        guard let status = try? descriptor.status() else { return false }
        return status.byteCount < fileOffset + byteCount
    }

    /// The front end's addresses of all of it.
    public var userAddresses: Range<UInt64> { userAddress..<userAddress + byteCount }

    /// The pages that these addresses of the front end's touch; all of them are to be in the region.
    public func gfns(ofUser addresses: Range<UInt64>) -> Range<GFN> {
        let first = gfns.lowerBound
        return first + (addresses.lowerBound - userAddress) / pageBytes
            ..< first + (addresses.upperBound - userAddress + pageBytes - 1) / pageBytes
    }

    /// Where a page of the region is in its file, bytes.
    public func fileOffset(of gfn: GFN) -> UInt64 { fileOffset + (gfn * pageBytes - guestAddress) }

    /// Whether the file has a page of its own there.
    public func hasData(_ gfn: GFN) -> Bool {
        let start = fileOffset(of: gfn)
        return Memfd.hasData(descriptor.raw, start..<start + pageBytes)
    }

    /// Calls `body` with every run of pages that the file has.
    public func forEachData(_ body: (Range<GFN>) -> Void) {
        let end = fileOffset + byteCount
        var position = fileOffset
        while let data = Memfd.nextData(descriptor.raw, from: position, to: end) {
            let first = gfns.lowerBound
            body(
                first + (data.lowerBound - fileOffset) / pageBytes
                    ..< first + (data.upperBound - fileOffset + pageBytes - 1) / pageBytes)
            position = data.upperBound
        }
    }

    public var gfns: Range<GFN> { guestAddress / pageBytes..<(guestAddress + byteCount) / pageBytes }

    /// Byte offset in the region of `count` bytes at a guest address, if all of them are inside.
    public func offset(ofGuest address: UInt64, count: UInt64) -> Int? {
        Self.offset(of: address, count: count, from: guestAddress, byteCount: byteCount)
    }

    /// The same for an address of the front end.
    public func offset(ofUser address: UInt64, count: UInt64) -> Int? {
        Self.offset(of: address, count: count, from: userAddress, byteCount: byteCount)
    }

    private static func offset(of address: UInt64, count: UInt64, from base: UInt64, byteCount: UInt64) -> Int? {
        guard address >= base, address - base <= byteCount, count <= byteCount - (address - base) else { return nil }
        return Int(address - base)
    }
}
