import Glibc
import PageContent
import Platform
import StoreProtocol
import Synchronization

/// One VM, from its first HELLO until its life ends, whatever happens to its backend and to quired meanwhile.
///
/// One request at a time: everything that reads or writes the ledger holds `state`. Two things of a machine are used by
/// threads that work for another one, each behind a lock of its own that is held for a moment: where its memory is, and
/// what it is offered.
package final class Machine: Sendable {
    /// A slot that has the content which was seen at `gfn` before. No reference: it may be gone when it is asked for, or
    /// have another content. Whoever merges compares.
    private struct Offer {
        let gfn: UInt32
        let slot: UInt32
    }

    /// In the order in which they came.
    private struct Offers {
        private var entries: [Offer] = []
        private var taken = 0
        var count: Int { entries.count - taken }

        mutating func append(_ offer: Offer) { entries.append(offer) }

        mutating func take(_ most: Int) -> [Offer] {
            let end = min(entries.count, taken + most)
            defer {
                taken = end
                if taken == entries.count { self = Offers() }
            }
            return Array(entries[taken..<end])
        }
    }

    private struct State: ~Copyable {
        let ledger: Ledger
        /// Entries of the ledger.
        var held = 0
        var merged = 0
        var hasEnded = false
    }

    let number: Int
    package let name: String
    let uid: UInt32
    let mapIdentity: FileStatus.Identity
    let share: Share
    /// Readable, or hung up, when the VM has ended.
    let life: Descriptor
    private let state: Mutex<State>
    private let ram = Mutex<GuestRAM?>(nil)
    private let offers = Mutex(Offers())
    private let seams: StoreSeams

    /// Offers that may wait for a VM, at least. A page that is offered is quiet and will not be looked up again, so what is
    /// forgotten is not merged until it is written: there is room for one a page, eight bytes for a while.
    private static let minOffers = 4096
    /// Pages that a VM may have been given slots for without having said what became of them.
    private static let maxHeld = 1 << 16

    init(ledger: consuming Ledger, life: consuming Descriptor, share: Share, seams: StoreSeams) {
        number = ledger.identity.machine
        name = ledger.identity.name
        uid = ledger.identity.uid
        mapIdentity = ledger.identity.map
        self.share = share
        self.life = life
        self.seams = seams
        state = Mutex(State(ledger: ledger))
    }

    package func setMemory(_ memory: GuestRAM) { ram.withLock { $0 = memory } }
    private var memory: GuestRAM? { ram.withLock { $0 } }

    package var isOver: Bool { !waitReadable([life.raw], timeoutMilliseconds: 0).isEmpty }

    var figures: (held: Int, merged: Int, ledgerBytes: UInt64) {
        state.withLock { ($0.held, $0.merged, $0.ledger.allocatedBytes) }
    }

    package var waitingOffers: Int { offers.withLock { $0.count } }

    // MARK: - Looking up

    /// Finds or makes slots for quiet pages. What is found is the VM's from now on, whether it hears of it or not.
    func lookUp(
        _ lookup: StoreRequest.Lookup, machines: (Int) -> Machine?, candidates: Candidates, scratch: borrowing Mapping
    ) throws(QuireError) -> [SlotRun] {
        guard let memory else { throw QuireError(.invalid, "a lookup before MEMORY said where the pages are") }
        for run in lookup.runs where !memory.contains(run) {
            throw QuireError(.invalid, "gfns \(run) of a lookup are not all in guest RAM")
        }
        return try state.withLock { (state) throws(QuireError) -> [SlotRun] in
            var found: [SlotRun] = []
            var first = 0
            for run in lookup.runs {
                let hashes = lookup.hashes[first..<first + run.count]
                first += run.count
                try lookUp(
                    run.lowerBound, hashes, memory, &state, into: &found, machines: machines, candidates: candidates,
                    scratch: scratch)
            }
            return found
        }
    }

    private func lookUp(
        _ gfn: UInt64, _ hashes: ArraySlice<PageHash>, _ memory: GuestRAM, _ state: inout State,
        into found: inout [SlotRun], machines: (Int) -> Machine?, candidates: Candidates, scratch: borrowing Mapping
    ) throws(QuireError) {
        guard !state.hasEnded, state.held + hashes.count <= Self.maxHeld else { return }
        let pages = Array(hashes)
        let before = try state.ledger.read(gfn..<gfn + UInt64(pages.count))
        var slots = [UInt32](repeating: 0, count: pages.count)
        var seen: [(index: Int, place: Candidates.Place)] = []
        var hits: UInt64 = 0
        for (index, hash) in pages.enumerated() where before[index].isNone && hash != share.hasher.zero {
            if index > 0, slots[index - 1] != 0,
                share.reference(hash, in: slots[index - 1] + 1, after: slots[index - 1])
            {
                slots[index] = slots[index - 1] + 1
                hits += 1
            } else if let slot = share.reference(hash) {
                slots[index] = slot
                hits += 1
            } else if let place = candidates.sight(
                hash, at: Candidates.Place(machine: number, gfn: gfn + UInt64(index)))
            {
                seen.append((index, place))
            }
        }
        share.note(hits: hits)
        promote(seen, gfn, pages, memory, &slots, machines: machines, scratch: scratch)

        // The ledger first, then the answer.
        var after = before
        for index in slots.indices where slots[index] != 0 { after[index] = .held(slots[index]) }
        guard after != before else { return }
        do throws(QuireError) { if seams.notesInLedger { try state.ledger.write(gfn, after[...]) } } catch {
            // Some may have been written: as far as that can be undone it is, and if it cannot, nothing is freed.
            try state.ledger.write(gfn, before[...])
            share.release(slots.filter { $0 != 0 })
            throw error
        }
        for index in slots.indices where slots[index] != 0 {
            state.held += 1
            found.append(gfn: gfn + UInt64(index), slot: slots[index], store: UInt32(share.node))
        }
    }

    /// Pages that were seen before elsewhere get slots, neighbours together, if what was seen is still there.
    private func promote(
        _ seen: [(index: Int, place: Candidates.Place)], _ gfn: UInt64, _ pages: [PageHash], _ memory: GuestRAM,
        _ slots: inout [UInt32], machines: (Int) -> Machine?, scratch: borrowing Mapping
    ) {
        for run in Share.runs(seen.map(\.index)) {
            let places = seen.filter { run.contains($0.index) }.map(\.place)
            let promoted = share.promote(
                gfn + UInt64(run.lowerBound), pages[run], from: memory, copyHash: seams.copyHash
            ) { (offset, slotOffset) in
                guard let other = machines(places[offset].machine), other.share === share,
                    let memory = other.memory, memory.read(places[offset].gfn, count: 1, into: scratch, at: 0) == 1
                else { return false }
                return share.store.mapping.equals(slotOffset, scratch, 0, count: StoreFile.slotBytes)
            }
            for (offset, slot) in promoted.enumerated() {
                guard let slot else { continue }
                slots[run.lowerBound + offset] = slot
                machines(places[offset].machine)?.offer(
                    Offer(gfn: UInt32(places[offset].gfn), slot: slot))
            }
        }
    }

    private func offer(_ offer: Offer) {
        let most = max(Self.minOffers, memory?.pageCount ?? 0)
        offers.withLock { if $0.count < most { $0.append(offer) } }
    }

    /// Slots for pages that were looked up in vain, and whose content came a second time since. At most `most` pages.
    package func takeOffers(_ most: Int) throws(QuireError) -> [SlotRun] {
        let memory = memory
        return try state.withLock { (state) throws(QuireError) -> [SlotRun] in
            let taken = offers.withLock { $0.take(most) }
            var found: [SlotRun] = []
            guard !state.hasEnded, let memory else { return found }
            for offer in taken.sorted(by: { $0.gfn < $1.gfn }) where state.held < Self.maxHeld {
                let gfn = UInt64(offer.gfn)
                guard memory.contains(gfn..<gfn + 1), try state.ledger.read(gfn..<gfn + 1)[0].isNone,
                    share.reference(offer.slot)
                else { continue }
                do throws(QuireError) { try state.ledger.write(gfn, [.held(offer.slot)]) } catch {
                    share.release([offer.slot])
                    throw error
                }
                state.held += 1
                found.append(gfn: gfn, slot: offer.slot, store: UInt32(share.node))
            }
            return found
        }
    }

    // MARK: - Reports

    /// What became of slots. Pages that the VM has no slot for are passed over. Returns for how many it was true.
    package func report(_ reports: [StoreRequest.Report]) throws(QuireError) -> UInt64 {
        try state.withLock { (state) throws(QuireError) -> UInt64 in
            guard !state.hasEnded else { return 0 }
            var count: UInt64 = 0
            for report in reports {
                let before = try state.ledger.read(report.gfns)
                switch report.what {
                case .merged:
                    let held = before.count { $0.isHeld }
                    guard held > 0 else { continue }
                    try state.ledger.write(report.gfns.lowerBound, before.map(\.merged)[...])
                    state.held -= held
                    state.merged += held
                    count += UInt64(held)
                case .released:
                    count += try release(report.gfns.lowerBound, before, &state, where: { !$0.isNone })
                }
            }
            return count
        }
    }

    /// Strikes entries out, then drops their references: killed between the two, quired will count what the ledger has.
    private func release(
        _ gfn: UInt64, _ entries: [Ledger.Entry], _ state: inout State, where isGone: (Ledger.Entry) -> Bool
    ) throws(QuireError) -> UInt64 {
        let gone = entries.filter(isGone)
        guard !gone.isEmpty else { return 0 }
        try state.ledger.write(gfn, entries.map { isGone($0) ? .none : $0 }[...])
        let held = gone.count { $0.isHeld }
        state.held -= held
        state.merged -= gone.count - held
        share.release(gone.map(\.slot))
        return UInt64(gone.count)
    }

    // MARK: - Coming and going

    /// After quired was killed: counts every reference that the ledger has. Before anything else.
    func recount() {
        state.withLock { state in
            var held = 0, merged = 0
            state.ledger.forEachPiece { (_, entries) in
                for entry in entries where !entry.isNone {
                    // Our own notes name slots that exist.
                    precondition(share.recount(entry.slot), "a ledger names a slot outside of its store")
                    if entry.isHeld { held += 1 } else { merged += 1 }
                }
            }
            state.held = held
            state.merged = merged
        }
    }

    /// A backend has come, and nothing that maps or unmaps is on its way: what the VM does not map is given up, what it
    /// does map counts as merged. The page map can take from what the ledger has, never add to it.
    func reconcile(
        _ map: borrowing ForeignPageMap
    ) throws(QuireError) -> (kept: UInt64, dropped: UInt64, unknown: UInt64) {
        offers.withLock { $0 = Offers() }
        var kept: UInt64 = 0, dropped: UInt64 = 0
        try state.withLock { (state) throws(QuireError) in
            // Then the ledger says nothing any more, and its references are gone.
            guard !state.hasEnded else { throw QuireError(.busy, "the VM '\(name)' has just ended") }
            // The pieces first: they are written while they are looked at.
            var pieces: [UInt64] = []
            state.ledger.forEachPiece { (gfn, entries) in
                if entries.contains(where: { !$0.isNone }) { pieces.append(gfn) }
            }
            for first in pieces {
                let gfns = first..<min(first + Ledger.pieceGFNs, StoreRequest.gfnLimit)
                let entries = try state.ledger.read(gfns)
                let mapped = try map.slots(gfns, store: share.node)
                var after = entries
                var gone: [UInt32] = []
                for (index, entry) in entries.enumerated() where !entry.isNone {
                    if entry.slot == mapped[index] {
                        after[index] = entry.merged
                        kept += 1
                    } else {
                        after[index] = .none
                        gone.append(entry.slot)
                    }
                }
                guard after != entries else { continue }
                try state.ledger.write(first, after[...])
                share.release(gone)
                dropped += UInt64(gone.count)
            }
            state.held = 0
            state.merged = Int(kept)
        }
        let shared = try map.sharedPages()
        return (kept, dropped, shared > kept ? shared - kept : 0)
    }

    /// The VM has ended: nobody maps anything for it any more.
    func end() throws(QuireError) {
        try state.withLock { (state) throws(QuireError) in
            guard !state.hasEnded else { return }
            try state.ledger.end()
            state.hasEnded = true
            state.ledger.forEachPiece { (_, entries) in
                share.release(entries.filter { !$0.isNone }.map(\.slot))
            }
            state.held = 0
            state.merged = 0
        }
        offers.withLock { $0 = Offers() }
        ram.withLock { $0 = nil }
    }

    /// Calls `body` with each slot of the ledger: for counts made independently.
    package func forEachReference(_ body: (UInt64, UInt32) -> Void) {
        state.withLock { state in
            state.ledger.forEachPiece { (gfn, entries) in
                for (index, entry) in entries.enumerated() where !entry.isNone { body(gfn + UInt64(index), entry.slot) }
            }
        }
    }
}
