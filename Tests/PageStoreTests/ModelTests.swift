import PageContent
import PageStore
import Platform
import StoreProtocol
import TestSupport
import Testing

/// Random operations of several VMs, backends that die and a quired that is killed, against a model that is a few
/// dictionaries. After every few steps the model says how often each slot is used, and what is in it.
struct ModelTests {
    /// What one VM has, as the model knows it.
    private final class Modelled {
        let guest: Guest
        /// What the guest last wrote; 0 is a page of zeros.
        var content: [UInt64: UInt64] = [:]
        var held: [UInt64: UInt32] = [:]
        var mapped: [UInt64: UInt32] = [:]
        init(_ guest: Guest) { self.guest = guest }

        static func bytes(_ content: UInt64) -> [UInt8] { content == 0 ? zeroPage : page(content) }

        /// The page is in the guest's own memory again.
        func fold(_ gfn: UInt64) throws {
            guard mapped[gfn] != nil else { return }
            try guest.vm.write(gfn, Self.bytes(content[gfn] ?? 0))
            try guest.vm.setShared(gfn, nil)
            #expect(try guest.machine.report([.init(.released, gfn..<gfn + 1)]) == 1)
            mapped[gfn] = nil
        }

        /// What the store answered: each page it was about was free of slots, and now has one that holds its content.
        func take(_ runs: [SlotRun], _ random: inout SplitMix, isOffer: Bool) throws {
            for run in runs {
                for (index, gfn) in run.gfns.enumerated() {
                    let slot = run.slot + UInt32(index)
                    #expect(held[gfn] == nil && mapped[gfn] == nil)
                    let isEqual = try guest.content(of: slot) == guest.vm.read(gfn)
                    #expect(isEqual || isOffer)
                    switch Int.random(in: 0..<10, using: &random) {
                    case 0: held[gfn] = slot
                    case 1: #expect(try guest.machine.report([.init(.released, gfn..<gfn + 1)]) == 1)
                    default:
                        let merged = try guest.merge(gfn, slot)
                        #expect(merged == isEqual)
                        if merged { mapped[gfn] = slot }
                    }
                }
            }
        }
    }

    private struct World: ~Copyable {
        let parking = MemoryParking()
        let seams: StoreSeams
        var store: PageStore
        var guests: [Modelled] = []
        var random: SplitMix
        var names = 0
        /// What stores counted that were killed.
        var past = (promotions: UInt64(0), hits: UInt64(0), stale: UInt64(0))
        var counted: (promotions: UInt64, hits: UInt64, stale: UInt64) {
            let now = store.figures(of: nil)
            return (past.promotions + now.promotions, past.hits + now.hits, past.stale + now.stale)
        }

        init(seed: UInt64, seams: StoreSeams = StoreSeams(), limit: Int = 1 << 12) throws {
            self.seams = seams
            random = SplitMix(seed)
            store = try PageStore(
                configuration(limit: limit), parking: parking, parked: [], logger: quietLogger, seams: seams)
        }

        mutating func join(uid: UInt32) throws {
            names += 1
            let vm = try FakeVM("vm\(names)-\(uid)", pages: 96, firstGFN: UInt64(names * 1000))
            guests.append(Modelled(try Guest(vm, in: store, uid: uid)))
        }

        static func uid(of guest: Modelled) -> UInt32 { guest.guest.vm.name.hasSuffix("-1000") ? 1000 : 1001 }

        /// The backend goes and comes: what was given and not mapped is given up.
        mutating func comeBack(_ index: Int) throws {
            let old = guests[index]
            let uid = Self.uid(of: old)
            let again = Modelled(try Guest(old.guest.vm, in: store, uid: uid))
            again.content = old.content
            again.mapped = old.mapped
            #expect(again.guest.machine.waitingOffers == 0)
            guests[index] = again
        }

        mutating func killed() throws {
            past = counted
            store = try PageStore(
                configuration(limit: 1 << 12), parking: parking, parked: parking.handOver(), logger: quietLogger,
                seams: seams)
        }

        /// The model's own count for every slot, and that the store has exactly these.
        func differences() throws -> [String] {
            var found: [String] = []
            for uid in [UInt32(1000), 1001] {
                let members = guests.filter { Self.uid(of: $0) == uid }
                guard let first = members.first else { continue }
                var counts: [UInt32: Int] = [:]
                for member in members {
                    for slot in [UInt32](member.held.values) + [UInt32](member.mapped.values) { counts[slot, default: 0] += 1 }
                }
                for (slot, count) in counts where store.useCount(of: slot, in: current(first)) != count {
                    found.append("slot \(slot) counts \(store.useCount(of: slot, in: current(first))), not \(count)")
                }
                let figures = store.figures(of: current(first))
                if figures.sharedPages != UInt64(counts.count) { found.append("\(figures.sharedPages) slots, not \(counts.count)") }
                if figures.storeBytes != UInt64(counts.count) * 4096 { found.append("\(figures.storeBytes) bytes for \(counts.count)") }
                if figures.histogram.reduce(0, +) != UInt64(counts.count) { found.append("histogram \(figures.histogram)") }
                for member in members {
                    for (gfn, slot) in member.mapped
                    where try member.guest.content(of: slot) != Modelled.bytes(member.content[gfn] ?? 0) {
                        found.append("\(member.guest.vm.name) reads wrong bytes at \(gfn)")
                    }
                }
            }
            return found
        }

        /// The machine of a guest in the store of now: right after a kill its backend has not come back.
        func current(_ member: Modelled) -> Machine {
            store.machines.first { $0.name == member.guest.vm.name } ?? member.guest.machine
        }

        mutating func step() throws {
            let index = Int.random(in: guests.indices, using: &random)
            let member = guests[index]
            let vm = member.guest.vm
            let gfn = UInt64.random(in: vm.gfns, using: &random)
            switch Int.random(in: 0..<100, using: &random) {
            case 0..<35:
                // A stretch that equals a stretch elsewhere, or one page.
                let content = UInt64.random(in: 0..<30, using: &random)
                for offset in 0..<UInt64.random(in: 1...8, using: &random) where gfn + offset < vm.gfns.upperBound {
                    try member.fold(gfn + offset)
                    member.content[gfn + offset] = content + offset
                    try vm.write(gfn + offset, Modelled.bytes(content + offset))
                }
            case 35..<80:
                let end = min(vm.gfns.upperBound, gfn + UInt64.random(in: 1...40, using: &random))
                // Pages that the VM has slots for already are passed over, whatever their memory holds.
                try member.take(member.guest.lookUp([gfn..<end]), &random, isOffer: false)
            case 80..<88: try member.take(member.guest.machine.takeOffers(16), &random, isOffer: true)
            case 88..<95: try member.fold(gfn)
            case 95..<97:
                store.disconnect(member.guest.machine)
                try comeBack(index)
            case 97:
                try killed()
                #expect(try differences() == [], "right after the restart")
                for index in guests.indices { try comeBack(index) }
            default:
                vm.end()
                if Bool.random(using: &random) { try store.end(member.guest.machine) }
                let uid = Self.uid(of: member)
                guests.remove(at: index)
                // Somebody else of the same owner, before or after the end was noticed.
                try join(uid: uid)
                for machine in store.machines where machine.name == vm.name { try store.end(machine) }
            }
        }
    }

    @Test(arguments: 1...4) func randomOperations(seed: UInt64) throws {
        var world = try World(seed: seed)
        for uid in [UInt32(1000), 1000, 1000, 1001, 1001] { try world.join(uid: uid) }
        for step in 0..<700 {
            try world.step()
            if step % 5 == 0 {
                let found = try world.differences()
                #expect(found == [], "step \(step)")
                if !found.isEmpty { return }
            }
        }
        let counted = world.counted
        #expect(counted.promotions > 0 && counted.hits > 0 && counted.stale > 0, "\(counted)")
        for member in world.guests { member.guest.vm.end() }
        for machine in world.store.machines { try world.store.end(machine) }
        #expect(world.parking.names == [])
        #expect(world.store.figures(of: nil).sharedPages == 0)
    }

    /// The control of the kills above: without notes in the ledger the counts after a restart are wrong.
    @Test func controlWithoutLedger() throws {
        var seams = StoreSeams()
        seams.notesInLedger = false
        var world = try World(seed: 1, seams: seams)
        try world.join(uid: 1000)
        let member = world.guests[0]
        for gfn in member.guest.vm.gfns.prefix(2) { try member.guest.vm.write(gfn, page(7)) }
        for gfn in member.guest.vm.gfns.prefix(2) {
            if let slot = try member.guest.lookUp(gfn) { member.mapped[gfn] = slot }
        }
        #expect(member.mapped.count == 1)
        try world.killed()
        #expect(try !world.differences().isEmpty)
    }
}
