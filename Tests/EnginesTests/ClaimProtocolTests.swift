import Testing

/// The claim protocol by exhaustive enumeration: every interleaving of a guest that allocates and frees two pages with a
/// host that claims, punches and releases them, and with a death of the host before every one of its steps.
///
/// Invariants: a page that the guest uses is never punched; a page that the guest takes as RECYCLED holds zeros; whatever
/// happened, a host that is left alone for a while (restarted if it is dead) leaves no page CLAIMED, so nobody waits for
/// ever. The variants with a mistake built in show that each invariant can fail.
@Suite struct ClaimProtocolTests {
    enum Byte: UInt8, Hashable { case inUse, free, claimed, recycled }

    /// A mistake to build in.
    enum Mistake: CaseIterable {
        case none
        /// The journal is written after the first claim instead of before.
        case journalAfterClaim
        /// The journal is cleared before the pages are released.
        case journalClearedEarly
        /// No journal: nobody knows of a dead process's claims.
        case noJournal
        /// The host stores CLAIMED instead of exchanging it.
        case hostStores
        /// The guest stores IN_USE instead of exchanging it.
        case guestStores
        /// The guest does not wait while a page is CLAIMED.
        case guestDoesNotWait
        /// Released before it is punched.
        case releasedBeforePunch
        /// The new process releases a dead one's claims by the journal alone, without looking at the state.
        case recoveryTrustsJournal
    }

    enum HostStep: Hashable {
        case idle, journalled, claimedFirst, claimedAll, punched, releasedFirst, releasedAll
        case dead, recoverFirst, recoverFirstPunched, recoverSecond, recoverSecondPunched, recoveredAll
    }

    struct World: Hashable {
        var bytes: [Byte] = [.inUse, .inUse]
        /// The guest has a page in use and believes in its content.
        var used = [true, true]
        /// The page's content is what its user wrote (in use), or zeros (otherwise "true" means punched).
        var zero = [false, false]
        /// What the guest saw when it looked at a page that it wants; nil: it wants none.
        var wanted: [Byte?] = [nil, nil]
        var journal = false
        /// Which pages the living claimer holds.
        var held = [false, false]
        /// For the host that looks first and stores then.
        var looked: [Byte?] = [nil, nil]
        var host = HostStep.idle
        var deaths = 0
    }

    enum Violation: Hashable { case punchedInUse, notZero, waitsForEver, stateOfUsedPageChanged }

    let mistake: Mistake
    init() { mistake = .none }
    private init(_ mistake: Mistake) { self.mistake = mistake }

    // MARK: - Steps

    private func guestSteps(_ world: World, _ found: inout Set<Violation>) -> [World] {
        var next: [World] = []
        for page in 0..<2 {
            if world.used[page] {
                // Free: a plain store, by the owner.
                var after = world
                after.used[page] = false
                after.bytes[page] = .free
                after.zero[page] = false
                next.append(after)
            } else if let seen = world.wanted[page] {
                var after = world
                after.wanted[page] = nil
                if mistake == .guestStores || world.bytes[page] == seen {
                    after.bytes[page] = .inUse
                    after.used[page] = true
                    if seen == .recycled && !world.zero[page] { found.insert(.notZero) }
                    after.zero[page] = false
                }
                next.append(after)
            } else if world.bytes[page] != .inUse, world.bytes[page] != .claimed || mistake == .guestDoesNotWait {
                // Look; the exchange is a step of its own. With CLAIMED it looks again: no step.
                var after = world
                after.wanted[page] = world.bytes[page]
                next.append(after)
            }
        }
        return next
    }

    private func punch(_ page: Int, _ world: inout World, _ found: inout Set<Violation>) {
        if world.used[page] { found.insert(.punchedInUse) }
        world.zero[page] = true
    }

    private func release(_ page: Int, _ world: inout World, _ found: inout Set<Violation>) {
        if world.used[page] { found.insert(.stateOfUsedPageChanged) }
        world.bytes[page] = .recycled
    }

    private func claim(_ page: Int, _ world: inout World, _ found: inout Set<Violation>) {
        if mistake == .hostStores {
            guard world.looked[page] == .free else { return }
            if world.used[page] { found.insert(.stateOfUsedPageChanged) }
            world.bytes[page] = .claimed
            world.held[page] = true
        } else if world.bytes[page] == .free {
            world.bytes[page] = .claimed
            world.held[page] = true
        }
    }

    /// The one next step of the host.
    private func hostStep(_ world: World, _ found: inout Set<Violation>) -> World {
        var w = world
        switch world.host {
        case .idle:
            guard world.bytes.contains(.free) else { return w }
            w.looked = world.bytes.map { $0 }
            if mistake != .journalAfterClaim && mistake != .noJournal { w.journal = true }
            w.host = .journalled
        case .journalled:
            claim(0, &w, &found)
            w.host = .claimedFirst
        case .claimedFirst:
            if mistake == .journalAfterClaim { w.journal = true }
            claim(1, &w, &found)
            w.host = .claimedAll
        case .claimedAll:
            if mistake == .releasedBeforePunch {
                for page in 0..<2 where w.held[page] { release(page, &w, &found) }
            } else {
                for page in 0..<2 where w.held[page] { punch(page, &w, &found) }
            }
            if mistake == .journalClearedEarly { w.journal = false }
            w.host = .punched
        case .punched:
            if mistake == .releasedBeforePunch {
                for page in 0..<2 where w.held[page] { punch(page, &w, &found) }
            } else if w.held[0] {
                release(0, &w, &found)
            }
            w.held[0] = false
            w.host = .releasedFirst
        case .releasedFirst:
            if mistake != .releasedBeforePunch, w.held[1] { release(1, &w, &found) }
            w.held[1] = false
            w.host = .releasedAll
        case .releasedAll:
            w.journal = false
            w.looked = [nil, nil]
            w.host = .idle
        case .dead:
            // A new process, under the same nonce.
            w.held = [false, false]
            w.looked = [nil, nil]
            w.host = w.journal ? .recoverFirst : .idle
        case .recoverFirst, .recoverSecond:
            let page = world.host == .recoverFirst ? 0 : 1
            if w.bytes[page] == .claimed || (mistake == .recoveryTrustsJournal) {
                punch(page, &w, &found)
                w.host = page == 0 ? .recoverFirstPunched : .recoverSecondPunched
            } else {
                w.host = page == 0 ? .recoverSecond : .recoveredAll
            }
        case .recoverFirstPunched:
            release(0, &w, &found)
            w.host = .recoverSecond
        case .recoverSecondPunched:
            release(1, &w, &found)
            w.host = .recoveredAll
        case .recoveredAll:
            w.journal = false
            w.host = .idle
        }
        return w
    }

    /// A host that is left alone: does it end with no page CLAIMED?
    private func strandsAWaiter(_ world: World) -> Bool {
        var world = world
        var ignored = Set<Violation>()
        if world.host == .idle && world.bytes.contains(.claimed) { return true }
        for _ in 0..<40 { world = hostStep(world, &ignored) }
        return world.bytes.contains(.claimed)
    }

    private func explore() -> (violations: Set<Violation>, states: Int) {
        var seen: Set<World> = [World()]
        var open = [World()]
        var found = Set<Violation>()
        while let world = open.popLast() {
            var next = guestSteps(world, &found)
            next.append(hostStep(world, &found))
            if world.host != .dead && world.deaths < 2 {
                var dead = world
                dead.host = .dead
                dead.deaths += 1
                next.append(dead)
            }
            if strandsAWaiter(world) { found.insert(.waitsForEver) }
            for state in next where seen.insert(state).inserted { open.append(state) }
        }
        return (found, seen.count)
    }

    // MARK: - Tests

    @Test func everyInterleavingKeepsItsPromises() {
        let (violations, states) = ClaimProtocolTests(.none).explore()
        #expect(violations.isEmpty, "\(violations)")
        #expect(states > 1000)
    }

    /// Controls: each mistake breaks a promise, and the enumeration finds it.
    @Test(arguments: [
        (Mistake.journalAfterClaim, Violation.waitsForEver), (.journalClearedEarly, .waitsForEver),
        (.noJournal, .waitsForEver), (.hostStores, .punchedInUse), (.guestStores, .punchedInUse),
        (.guestDoesNotWait, .punchedInUse), (.releasedBeforePunch, .punchedInUse), (.recoveryTrustsJournal, .punchedInUse),
    ]) func everyMistakeIsFound(_ mistake: Mistake, _ violation: Violation) {
        let violations = ClaimProtocolTests(mistake).explore().violations
        #expect(violations.contains(violation), "\(mistake): \(violations)")
    }
}
