import CQuireLayout
import Engines
import GuestMemory
import Platform

/// A state table as quire.ko lays one out, written into guest memory by the benchmark: a header page, the directory, and
/// one page of states for 4096 guest pages.
struct GuestTable {
    static let statesPerPage = 4096
    /// The epoch that the guest marks with now; marks that are due are far behind it.
    static let epoch: UInt8 = 100
    static let dueMark: UInt8 = 40

    let memory: GuestMemory
    let headerAddress: UInt64
    let tablePages: Int
    /// The first guest address after the table.
    let end: UInt64
    private let statesAt: UInt64

    init(in memory: GuestMemory, pageCount: Int, at address: UInt64 = pageBytes) {
        self.memory = memory
        headerAddress = address
        tablePages = (pageCount + Self.statesPerPage - 1) / Self.statesPerPage
        let directory = address + pageBytes
        statesAt = directory + (UInt64(tablePages) * 8 + pageBytes - 1) / pageBytes * pageBytes
        end = statesAt + UInt64(tablePages) * pageBytes
        let header = memory.place(ofGuest: address, count: pageBytes)!
        func at<T>(_ field: KeyPath<quire_table_header, T>) -> Int {
            header.offset + MemoryLayout<quire_table_header>.offset(of: field)!
        }
        header.mapping.copyIn(at(\.magic), Array(QUIRE_TABLE_MAGIC.utf8))
        header.mapping.store32(at(\.version), UInt32(QUIRE_TABLE_VERSION))
        header.mapping.store64(at(\.page_count), UInt64(tablePages * Self.statesPerPage))
        header.mapping.store64(at(\.directory_gpa), directory)
        for page in 0..<tablePages {
            let place = memory.place(ofGuest: directory + UInt64(page) * 8, count: 8)!
            place.mapping.store64(place.offset, statesAt + UInt64(page) * pageBytes)
        }
        resetEpoch()
    }

    /// Sets the states of a whole table page.
    func setStates(_ page: Int, _ states: some Collection<UInt8>) {
        precondition(states.count == Self.statesPerPage)
        let place = memory.place(ofGuest: statesAt + UInt64(page) * pageBytes, count: pageBytes)!
        place.mapping.copyIn(place.offset, states)
    }

    /// Puts the epoch back to where it was when the table was made.
    func resetEpoch() {
        let header = memory.place(ofGuest: headerAddress, count: pageBytes)!
        header.mapping.store8(header.offset + MemoryLayout<quire_table_header>.offset(of: \.epoch)!, Self.epoch)
    }

    /// How often the host has ticked.
    var ticks: UInt64 {
        let header = memory.place(ofGuest: headerAddress, count: pageBytes)!
        return header.mapping.load64(header.offset + MemoryLayout<quire_table_header>.offset(of: \.ticks)!)
    }
}
