import CPlatform

/// What another process's page tables say, by a descriptor of its `/proc/self/pagemap`. Addresses are that process's, in
/// bytes.
public final class PageTables: Sendable {
    private let pagemap: Descriptor

    public init(pagemap: consuming Descriptor) { self.pagemap = pagemap }

    fileprivate var raw: Int32 { pagemap.raw }

    /// Calls `body` with every range of pages that are there, or swapped out, and belong to no file: in a private mapping
    /// of a file, copies of the process's own; in an anonymous one, copies or the zero page. On any kernel.
    public func forEachAnonymous(_ addresses: Range<UInt64>, _ body: (Range<UInt64>) -> Void) throws(QuireError) {
        let pageBytes: UInt64 = 4096
        let isFile: UInt64 = 1 << 61, isSomewhere: UInt64 = 3 << 62
        var entries = [UInt64](repeating: 0, count: 1024)
        var run: Range<UInt64>?
        var address = addresses.lowerBound
        while address < addresses.upperBound {
            let wanted = min(entries.count, Int((addresses.upperBound - address + pageBytes - 1) / pageBytes))
            let count = unsafe cp_pagemap_read(pagemap.raw, address, &entries, wanted)
            guard count > 0 else { throw .system("cannot read QEMU's page tables") }
            for entry in entries.prefix(count) {
                if entry & isFile == 0, entry & isSomewhere != 0 {
                    if let last = run { run = last.lowerBound..<address + pageBytes } else { run = address..<address + pageBytes }
                } else if let last = run {
                    body(last)
                    run = nil
                }
                address += pageBytes
            }
        }
        if let run { body(run) }
    }
}

/// Which pages another process has written since they were last looked at: by asynchronous write-protect, which that
/// process has registered its memory for, and PAGEMAP_SCAN through a descriptor of its `/proc/self/pagemap` (both
/// Linux 6.7; Documentation/admin-guide/mm/pagemap.rst). What a look costs follows from the page tables, not from what is
/// in the pages: milliseconds a GiB.
public final class WriteTracker: Sendable {
    private let pagemap: PageTables

    public init(_ pageTables: PageTables) { pagemap = pageTables }

    private static let written = UInt64(PAGE_IS_WRITTEN)
    private static let present = UInt64(PAGE_IS_PRESENT)

    /// Calls `body` with every range of pages that are there and were written since the last call, and protects them again,
    /// so that the next write shows. Memory that is not registered is passed over. A page is reported once too often
    /// rather than once too few; but what another process wrote to the same memory is not seen.
    public func takeWritten(_ addresses: Range<UInt64>, _ body: (Range<UInt64>) -> Void) throws(QuireError) {
        // Pages that are not there were never written; protecting them would give them page tables.
        try scan(addresses, protecting: true, inverted: 0, all: Self.written | Self.present, any: 0, body)
    }

    /// Calls `body` with every range of pages that a private mapping has copies of its own of. Memory that is registered
    /// for write-protect, and so is shared, is passed over.
    public func forEachDiverged(_ addresses: Range<UInt64>, _ body: (Range<UInt64>) -> Void) throws(QuireError) {
        let never = UInt64(PAGE_IS_WPALLOWED | PAGE_IS_FILE | PAGE_IS_PFNZERO)
        let somewhere = UInt64(PAGE_IS_PRESENT | PAGE_IS_SWAPPED)
        try scan(addresses, protecting: false, inverted: never, all: never, any: somewhere, body)
    }

    /// Whether there is a huge page among these, mapped as one. No where that can't be seen.
    public func hasHugePage(_ addresses: Range<UInt64>) -> Bool {
        let huge = UInt64(PAGE_IS_HUGE | PAGE_IS_PRESENT)
        var found = false
        try? scan(addresses, protecting: false, inverted: 0, all: huge, any: 0) { _ in found = true }
        return found
    }

    private func scan(
        _ addresses: Range<UInt64>, protecting: Bool, inverted: UInt64, all: UInt64, any: UInt64,
        _ body: (Range<UInt64>) -> Void
    ) throws(QuireError) {
        var found = [cp_page_range](repeating: cp_page_range(), count: 512)
        var position = addresses.lowerBound
        while position < addresses.upperBound {
            var walked = position
            let count = unsafe cp_pagemap_scan(
                pagemap.raw, position, addresses.upperBound, protecting, inverted, all, any, &found, found.count, &walked)
            guard count >= 0 else { throw .system("cannot scan QEMU's page tables") }
            for range in found.prefix(count) { body(range.start..<range.end) }
            // It always gets on; a kernel that did not would hold us for ever.
            guard walked > position else { return }
            position = walked
        }
    }
}
