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
    /// have another content, which its tag shows.
    private struct Offer {
        let gfn: UInt32
        let slot: UInt32
        /// Of the content's hash.
        let tag: UInt32
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
    private let zeroPages = Atomic<UInt32>(0)

    /// Offers that may wait for a VM, at least. A page that is offered is quiet and will not be looked up again, so what is
    /// forgotten is not merged until it is written: there is room for one a page, twelve bytes for a while.
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

    package func setMemory(_ memory: GuestRAM?) { ram.withLock { $0 = memory } }
    private var memory: GuestRAM? { ram.withLock { $0 } }

    package var isOver: Bool { !waitReadable([life.raw], timeoutMilliseconds: 0).isEmpty }

    var figures: (held: Int, merged: Int, ledgerBytes: UInt64) {
        state.withLock { ($0.held, $0.merged, $0.ledger.allocatedBytes) }
    }

    /// As the VM says; what it says counts for the host's reserve only.
    /// It has no more of them than it has pages.
    package func noteZeroPages(_ count: UInt32) {
        let most = UInt32(clamping: ram.withLock { $0?.pageCount ?? 0 })
        zeroPages.store(min(count, most), ordering: .relaxed)
    }
    /// Pages that would need memory of their own if the guest wrote them all.
    var lentPages: UInt64 { UInt64(zeroPages.load(ordering: .relaxed)) + UInt64(figures.merged) }

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
        var again: [(index: Int, place: Candidates.Place)] = []
        for (index, place) in seen {
            candidates.letGo(pages[index], at: place)
            if slots[index] == 0,
                let other = candidates.sight(
                    pages[index], at: Candidates.Place(machine: number, gfn: gfn + UInt64(index)), besides: place)
            { again.append((index, other)) }
        }
        promote(again, gfn, pages, memory, &slots, machines: machines, scratch: scratch)
        for (index, place) in again {
            candidates.letGo(pages[index], at: place)
            if slots[index] == 0 {
                candidates.note(pages[index], at: Candidates.Place(machine: number, gfn: gfn + UInt64(index)))
            }
        }

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
        for group in Self.promotions(seen.map(\.index)) {
            let members = seen[group]
            let promoted = share.promote(
                members.map { gfn + UInt64($0.index) }, members.map { pages[$0.index] }, from: memory, scratch: scratch,
                copyHash: seams.copyHash
            ) { part in areAsSeen(members.dropFirst(part.lowerBound).prefix(part.count).map(\.place), machines, scratch) }
            for (member, slot) in zip(members, promoted) {
                guard let slot else { continue }
                slots[member.index] = slot
                // Its number may be another VM's meanwhile, of another group.
                guard let other = machines(member.place.machine), other.share === share else { continue }
                other.offer(Offer(gfn: UInt32(member.place.gfn), slot: slot, tag: SlotTable.tag(of: pages[member.index])))
            }
        }
    }

    /// Which of these ascending numbers get their slots at once: a run of neighbours, or several that are short.
    private static func promotions(_ sorted: [Int]) -> [Range<Int>] {
        var groups: [Range<Int>] = []
        var first = 0
        for run in Share.runs(sorted) {
            if let last = groups.last, last.count + run.count <= Share.promotedAtOnce {
                groups[groups.count - 1] = last.lowerBound..<first + run.count
            } else {
                groups.append(first..<first + run.count)
            }
            first += run.count
        }
        return groups
    }

    /// Whether pages at the begin of `scratch` are what is at these places: neighbours there are read at once.
    private func areAsSeen(
        _ places: [Candidates.Place], _ machines: (Int) -> Machine?, _ scratch: borrowing Mapping
    ) -> [Bool] {
        let second = StoreFile.offset(Share.promotedAtOnce)
        var result: [Bool] = []
        var first = places.startIndex
        while first < places.endIndex {
            let place = places[first]
            var end = first + 1
            while end < places.endIndex, places[end].machine == place.machine,
                places[end].gfn == place.gfn + UInt64(end - first)
            { end += 1 }
            var read = 0
            if let other = machines(place.machine), other.share === share, let memory = other.memory {
                read = memory.read(place.gfn, count: end - first, into: scratch, at: second)
            }
            for index in 0..<end - first {
                result.append(
                    index < read
                        && scratch.equals(
                            StoreFile.offset(result.count), scratch, second + StoreFile.offset(index),
                            count: StoreFile.slotBytes))
            }
            first = end
        }
        return result
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
            let offered = taken.sorted { $0.gfn < $1.gfn }
            for group in Self.ledgerGroups(offered.map { UInt64($0.gfn)..<UInt64($0.gfn) + 1 }) {
                guard state.held + group.count <= Self.maxHeld else { break }
                let first = UInt64(offered[group.lowerBound].gfn)
                let before = try state.ledger.read(first..<UInt64(offered[group.upperBound - 1].gfn) + 1)
                var after = before
                var given: [Offer] = []
                for offer in offered[group] {
                    let gfn = UInt64(offer.gfn), index = Int(gfn - first)
                    guard memory.contains(gfn..<gfn + 1), after[index].isNone, share.reference(offer.slot, tag: offer.tag)
                    else { continue }
                    after[index] = .held(offer.slot)
                    given.append(offer)
                }
                guard !given.isEmpty else { continue }
                do throws(QuireError) { try state.ledger.write(first, after[...]) } catch {
                    // As in `lookUp`.
                    try state.ledger.write(first, before[...])
                    share.release(given.map(\.slot))
                    throw error
                }
                state.held += given.count
                for offer in given { found.append(gfn: UInt64(offer.gfn), slot: offer.slot, store: UInt32(share.node)) }
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
            for group in Self.ledgerGroups(reports.map(\.gfns), where: { reports[$0].what == .merged }) {
                let gfns = reports[group.lowerBound].gfns.lowerBound..<reports[group.upperBound - 1].gfns.upperBound
                let before = try state.ledger.read(gfns)
                switch reports[group.lowerBound].what {
                case .merged:
                    var after = before
                    var held = 0
                    for gfn in reports[group].lazy.map(\.gfns).joined() {
                        let index = Int(gfn - gfns.lowerBound)
                        guard before[index].isHeld else { continue }
                        after[index] = before[index].merged
                        held += 1
                    }
                    guard held > 0 else { continue }
                    try state.ledger.write(gfns.lowerBound, after[...])
                    state.held -= held
                    state.merged += held
                    count += UInt64(held)
                case .released:
                    count += try release(gfns.lowerBound, before, &state, where: { !$0.isNone })
                }
            }
            return count
        }
    }

    /// Splits ranges, in the order in which they come, into groups that one read and one write of the ledger deal with:
    /// ranges that follow each other closely, in ascending order. `isJoinable`: by its index whether a range may share a
    /// group.
    private static func ledgerGroups(
        _ ranges: [Range<UInt64>], where isJoinable: (Int) -> Bool = { _ in true }
    ) -> [Range<Int>] {
        var groups: [Range<Int>] = []
        for (index, range) in ranges.enumerated() {
            if let last = groups.last, isJoinable(index), isJoinable(index - 1),
                range.lowerBound >= ranges[index - 1].upperBound,
                // In one page of the file: what is between them costs no memory that is not there already.
                (range.upperBound - 1) / 1024 == ranges[last.lowerBound].lowerBound / 1024
            {
                groups[groups.count - 1] = last.lowerBound..<index + 1
            } else {
                groups.append(index..<index + 1)
            }
        }
        return groups
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
    func recount() throws(QuireError) {
        try state.withLock { (state) throws(QuireError) in
            var held = 0, merged = 0
            try state.ledger.forEachPiece { (_, entries) throws(QuireError) in
                for entry in entries where !entry.isNone {
                    // Our own notes name slots that exist. To end here where they do not would be to end at each start.
                    guard share.recount(entry.slot) else { throw QuireError(.invalid, "a ledger names a slot outside of its store") }
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
            var pieces: [Range<UInt64>] = []
            try state.ledger.forEachPiece { (gfn, entries) in
                if entries.contains(where: { !$0.isNone }) { pieces.append(gfn..<gfn + UInt64(entries.count)) }
            }
            for gfns in pieces {
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
                try state.ledger.write(gfns.lowerBound, after[...])
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
            // What can't be read stays counted, and is lost until quired counts anew.
            try? state.ledger.forEachPiece { (_, entries) in
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
            try? state.ledger.forEachPiece { (gfn, entries) in
                for (index, entry) in entries.enumerated() where !entry.isNone { body(gfn + UInt64(index), entry.slot) }
            }
        }
    }
}
