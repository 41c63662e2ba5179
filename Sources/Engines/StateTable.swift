import CQuireLayout
import GuestMemory
import Platform

/// The state byte of a guest page (quire_layout.h, part 2), as values of its own so that no code spells the numbers.
public enum PageMark {
    public static let inUse = UInt8(QUIRE_STATE_IN_USE.rawValue)
    public static let firstEpoch = UInt8(QUIRE_STATE_EPOCH_FIRST.rawValue)
    public static let lastEpoch = UInt8(QUIRE_STATE_EPOCH_LAST.rawValue)
    public static let claimed = UInt8(QUIRE_STATE_CLAIMED.rawValue)
    public static let recycled = UInt8(QUIRE_STATE_RECYCLED.rawValue)
    static let epochs = Int(lastEpoch - firstEpoch) + 1

    /// Epoch value of a tick that counts from 0 and never wraps.
    static func epoch(ofTick tick: UInt64) -> UInt8 { firstEpoch + UInt8(tick % UInt64(epochs)) }
}

/// A guest's registered table: where its header and the pages of state bytes lie.
///
/// The guest is hostile. Everything it says (header, directory) is read once, checked against RAM, against the rings and
/// against itself, and kept here as places; after `init` nothing that the guest writes can lead an access elsewhere.
/// The bytes themselves are a guest's word about its own pages only.
struct StateTable: Sendable {
    static let statesPerPage = 4096

    let memory: GuestMemory
    let header: GuestMemory.Place
    let headerAddress: UInt64
    /// Places of the table's pages: `pages[i]` holds the states of gfns 4096 i ..< 4096 (i + 1); nil where the guest has no
    /// memory.
    let pages: [GuestMemory.Place?]
    /// Header and pages are never merged while there is a table.
    private let holds: [PageHold?]
    /// The bytes of the same pages. `memory` keeps their mappings alive as long as there is a table.
    private let views: [MappedBytes?]

    private typealias Header = quire_table_header
    private static func offset<T>(_ field: KeyPath<Header, T>) -> Int { MemoryLayout<Header>.offset(of: field)! }

    /// Throws `.guest` with a line that says what is wrong with the guest's registration.
    init(memory: GuestMemory, headerAddress: UInt64, rings: [Range<UInt64>], maxPages: UInt64) throws(QuireError) {
        func refuse(_ text: String) -> QuireError { QuireError(.guest, "the guest's table is refused: \(text)") }
        func hex(_ value: UInt64) -> String { "0x" + String(value, radix: 16) }
        func page(_ address: UInt64, _ what: String) throws(QuireError) -> GuestMemory.Place {
            guard address % pageBytes == 0 else { throw refuse("\(what) at \(hex(address)) is not page-aligned") }
            guard let place = memory.place(ofGuest: address, count: pageBytes) else {
                throw refuse("\(what) at \(hex(address)) is outside of guest RAM")
            }
            return place
        }
        var taken = Set<UInt64>()
        for ring in rings where !ring.isEmpty {
            for gfn in ring.lowerBound / pageBytes...(ring.upperBound - 1) / pageBytes { taken.insert(gfn) }
        }
        func claim(_ address: UInt64, _ what: String) throws(QuireError) {
            guard taken.insert(address / pageBytes).inserted else {
                throw refuse("\(what) at \(hex(address)) overlaps a ring or another part of the table")
            }
        }

        // Guest and host use header and states with atomics, so they are kept private before the first look.
        func hold(_ addresses: [UInt64]) throws(QuireError) -> PageHold? {
            try memory.keepPrivate(addresses.map { $0..<$0 + pageBytes })
        }

        let header = try page(headerAddress, "the header")
        try claim(headerAddress, "the header")
        let headerHold = try hold([headerAddress])
        let copy = header.mapping.copyOut(header.offset, count: 128)
        func field<T: FixedWidthInteger>(_ offset: Int, _: T.Type) -> T {
            (0..<T.bitWidth / 8).reduce(0) { $0 | T(copy[offset + $1]) << T($1 * 8) }
        }
        guard Array(copy[0..<8]) == Array(QUIRE_TABLE_MAGIC.utf8) else { throw refuse("its header has no magic number") }
        let version = field(Self.offset(\.version), UInt32.self)
        guard version == UInt32(QUIRE_TABLE_VERSION) else {
            throw refuse("it has version \(version), this backend speaks \(QUIRE_TABLE_VERSION): update the older of the two")
        }
        let pageCount = field(Self.offset(\.page_count), UInt64.self)
        guard pageCount > 0, pageCount % UInt64(Self.statesPerPage) == 0, pageCount <= maxPages else {
            throw refuse("\(pageCount) states; a multiple of \(Self.statesPerPage) up to \(maxPages) is needed")
        }
        let tablePages = pageCount / UInt64(Self.statesPerPage)
        let directory = field(Self.offset(\.directory_gpa), UInt64.self)
        guard directory % pageBytes == 0 else { throw refuse("its directory at \(hex(directory)) is not page-aligned") }
        guard let entries = try? memory.buffer(directory, count: tablePages * 8) else {
            throw refuse("its directory at \(hex(directory)) is outside of guest RAM")
        }
        for offset in stride(from: 0, to: tablePages * 8, by: Int(pageBytes)) { try claim(directory + offset, "the directory") }
        let bytes = try entries.copyOut()
        var pages: [GuestMemory.Place?] = []
        pages.reserveCapacity(Int(tablePages))
        for index in 0..<Int(tablePages) {
            let address = (0..<8).reduce(UInt64(0)) { $0 | UInt64(bytes[index * 8 + $1]) << UInt64($1 * 8) }
            guard address != UInt64(QUIRE_NO_STATES) else {
                pages.append(nil)
                continue
            }
            pages.append(try page(address, "page \(index)"))
            try claim(address, "page \(index)")
        }
        holds = [headerHold, try hold(pages.compactMap { $0?.guestAddress })]
        self.memory = memory
        self.header = header
        self.headerAddress = headerAddress
        self.pages = pages
        views = pages.map { place in place.map { unsafe $0.mapping.view($0.offset, count: Self.statesPerPage) } }
    }

    /// How often an allocation met a claimed page, as the guest counts. Advice only.
    var waits: UInt64 { header.mapping.load64(header.offset + Self.waitsOffset) }
    private static let waitsOffset = offset(\.waits)
    private static let epochOffset = offset(\.epoch)
    private static let ticksOffset = offset(\.ticks)
    private static let periodOffset = offset(\.period_ms)

    /// The epoch that the header holds now, if it is one.
    var publishedEpoch: UInt8? {
        let value = header.mapping.load8(header.offset + Self.epochOffset)
        return value >= PageMark.firstEpoch && value <= PageMark.lastEpoch ? value : nil
    }

    func publish(epoch: UInt8, ticks: UInt64, periodMilliseconds: UInt32) {
        header.mapping.store32(header.offset + Self.periodOffset, periodMilliseconds)
        header.mapping.store8(header.offset + Self.epochOffset, epoch)
        header.mapping.store64(header.offset + Self.ticksOffset, ticks)
    }

    /// The state bytes of one page of the table, valid as long as the table is; nil where the guest has no memory.
    @inline(__always) func states(_ page: Int) -> MappedBytes? { views[page] }

    // One state byte; `index` 0 ..< 4096 within the page.
    @inline(__always) func load(_ page: Int, _ index: Int) -> UInt8 { views[page]?.load8(index) ?? PageMark.inUse }
    @inline(__always) func store(_ page: Int, _ index: Int, _ value: UInt8) { views[page]?.store8(index, value) }

    /// What one look at a page of the table finds.
    struct Summary: Sendable {
        var recycled = 0
        /// Blocks of 64 states (bit i: states 64 i ..< 64 (i + 1)) that hold anything but in-use and recycled pages.
        var marked: UInt64 = 0
    }

    /// Looks at all 4096 states. A snapshot without order: decisions are made by compare-exchange.
    func summarize(_ page: Int) -> Summary {
        // In use is 0 and recycled 0xff (quire_layout.h): what a census counts.
        guard let (ones, others) = views[page]?.census() else { return Summary() }
        return Summary(recycled: ones, marked: others)
    }
}
