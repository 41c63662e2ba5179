import CQuireLayout
import Glibc
import PageStore
import Platform
import StoreProtocol
import Testing

/// Of a ledger that cannot be read nobody knows which slots its VM maps. So no store is gone on with: all begin anew, in files of
/// their own, and what guests map stays as it is.
@Suite struct LedgerDamageTests {
    /// What is wrong with what is handed over as a ledger.
    enum Damage: CaseIterable, Sendable {
        case empty, headerAlone, shorter, longer, magic, version, readOnly, writeOnly, noFile, strangeSlot
    }

    private static let headerBytes = UInt64(MemoryLayout<quire_ledger_header>.size)

    /// Three VMs of two owners, each with a slot that nobody else uses, and what is kept of them while quired is away.
    private struct World {
        let parking = MemoryParking()
        let guests: [Guest]
        let slots: [UInt32]
        static let uids: [UInt32] = [1000, 1000, 1001]
        static func content(_ index: Int) -> [UInt8] { page(100 + UInt64(index)) }

        init() throws {
            let store = try PageStore(configuration(), parking: parking, parked: [], logger: quietLogger)
            var guests: [Guest] = [], slots: [UInt32] = []
            for (index, uid) in Self.uids.enumerated() {
                let guest = try Guest(FakeVM("vm\(index)"), in: store, uid: uid)
                for gfn in UInt64(0)..<2 { try guest.vm.write(gfn, Self.content(index)) }
                _ = try guest.lookUp(0)
                let slot = try #require(try guest.lookUp(1))
                #expect(try guest.merge(1, slot))
                guests.append(guest)
                slots.append(slot)
            }
            self.guests = guests
            self.slots = slots
        }

        /// With another file in the place of one VM's ledger.
        func handOver(_ name: String, _ replaced: (borrowing Descriptor) throws -> Descriptor) throws -> [ParkedItem] {
            try parking.handOver().map { item in
                guard item.name == name, let ledger = item.descriptors.next(), let life = item.descriptors.next() else { return item }
                let other = try replaced(ledger)
                var list = UnixSocket.PassedDescriptors()
                list.append([other.release(), life.release()])
                return ParkedItem(name: name, descriptors: list)
            }
        }

        /// The next quired.
        func restart(_ parked: [ParkedItem]) throws -> PageStore {
            try PageStore(configuration(), parking: parking, parked: parked, logger: quietLogger)
        }

        /// The backends come back; what each hears.
        func comeBack(to store: PageStore) throws -> [StoreReply.Welcome] {
            try zip(guests, Self.uids).map { try $0.vm.admit(to: store, uid: $1).welcome }
        }

        /// The VMs whose pages are not what they were, in what they map.
        var changed: [Int] {
            get throws { try guests.indices.filter { try guests[$0].content(of: slots[$0]) != Self.content($0) } }
        }

        var shares: Set<String> { Set(parking.names.filter { $0.hasPrefix("share-") }) }
    }

    /// A file of so many bytes that begins like the ledger, with all that stands in it.
    private static func copy(_ ledger: borrowing Descriptor, _ byteCount: UInt64) throws -> Descriptor {
        let file = try Memfd(name: "ledger", byteCount: byteCount).takeDescriptor()
        try file.writeBytes(at: 0, ledger.readBytes(at: 0, count: Int(min(byteCount, headerBytes + 4096))))
        return file
    }

    private static func damaged(_ ledger: borrowing Descriptor, _ damage: Damage) throws -> Descriptor {
        let byteCount = try ledger.status().byteCount
        switch damage {
        case .empty: return try copy(ledger, 0)
        case .headerAlone: return try copy(ledger, headerBytes)
        case .shorter: return try copy(ledger, byteCount - 4)
        case .longer: return try copy(ledger, byteCount + 4)
        case .magic: try ledger.writeBytes(at: 7, [UInt8(ascii: "d")])
        case .version: try ledger.writeWords(at: 8, [UInt32(QUIRE_PARKED_VERSION) + 1])
        case .readOnly: return try ledger.reopenedReadOnly()
        case .writeOnly:
            try ledger.setMode(0o600)
            return try Descriptor.open("/proc/self/fd/\(ledger.raw)", O_WRONLY)
        case .noFile:
            var pipe = try Pipe()
            return pipe.takeReader()
        case .strangeSlot: try ledger.writeWords(at: headerBytes + 4 * 2, [UInt32(QUIRE_STORE_SLOT_LIMIT) - 1])
        }
        return try ledger.duplicate()
    }

    /// The first VM's ledger and the last one's, of another owner's store. Numbers of slots are given again, of new stores.
    @Test(arguments: Damage.allCases, ["vm-1", "vm-3"]) func allBeginsAnew(_ damage: Damage, _ item: String) throws {
        let world = try World()
        let before = world.shares
        #expect(before.count == 2)
        let store = try world.restart(world.handOver(item) { try Self.damaged($0, damage) })
        #expect(world.parking.names == [] && store.machines.isEmpty && store.figures(of: nil).sharedPages == 0)
        for welcome in try world.comeBack(to: store) {
            #expect(welcome.keptPages == 0 && welcome.droppedPages == 0 && welcome.unknownPages == 1)
        }
        #expect(world.shares.count == 2 && world.shares.isDisjoint(with: before))
        for uid in Set(World.uids) {
            let other = try Guest(FakeVM("other"), in: store, uid: uid)
            for gfn in UInt64(0)..<32 { try other.vm.write(gfn, page(gfn % 16)) }
            _ = try other.lookUp([0..<16])
            let runs = try other.lookUp([16..<32])
            #expect(runs.reduce(0) { $0 + $1.pages } == 16)
            #expect(runs.contains { run in world.slots.contains { run.slot <= $0 && $0 < run.slot + run.pages } })
        }
        #expect(try world.changed == [])
    }

    /// The controls: a ledger that is whole is believed, whichever file it is in; and if one that cannot be read counted as nothing,
    /// what its VM maps would be somebody else's.
    @Test func controls() throws {
        let whole = try World()
        let before = whole.shares
        let store = try whole.restart(whole.handOver("vm-1") { try Self.copy($0, $0.status().byteCount) })
        #expect(whole.shares == before)
        for welcome in try whole.comeBack(to: store) { #expect(welcome.keptPages == 1 && welcome.unknownPages == 0) }
        #expect(try whole.changed == [])

        let lost = try World()
        _ = try lost.restart(lost.parking.handOver().filter { $0.name != "vm-1" })
        #expect(try lost.changed == [0])
    }
}
