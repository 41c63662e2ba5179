import PageContent
import PageStore
import Platform
import Synchronization
import TestSupport
import Testing

struct CandidatesTests {
    private static func hash(_ number: Int) -> PageHash {
        var random = SplitMix(UInt64(number))
        return PageHash(low: random.next(), high: random.next())
    }

    /// A host that is full of guests, half of whose pages have one equal each: nearly all pairs are found, in whatever order
    /// their pages come.
    @Test func aFullHostFindsItsPairs() throws {
        let (found, wrong) = try Self.pairs(Candidates.byteCount(forHost: Self.hostPages * 4096))
        #expect(found > 0.97)
        #expect(wrong < 0.01)
    }

    /// The control: in a quarter of the room most of them are forgotten.
    @Test func controlTooLittleRoom() throws {
        #expect(try Self.pairs(Candidates.byteCount(forHost: Self.hostPages * 4096) / 4).found < 0.7)
    }

    private static let hostPages = 1 << 18

    /// The part of pairs that are found, and the hints that are wrong for a page.
    private static func pairs(_ byteCount: Int) throws -> (found: Double, wrong: Double) {
        let candidates = try Candidates(byteCount: byteCount, hostPages: hostPages)
        let pairs = hostPages / 4
        var contents = (0..<hostPages).map { $0 < 2 * pairs ? $0 / 2 : $0 }
        var random = SplitMix(7)
        contents.shuffle(using: &random)
        var found = 0, wrong = 0
        for (page, content) in contents.enumerated() {
            let place = Candidates.Place(machine: 1 + page % 8, gfn: UInt64(page / 8))
            guard let seen = candidates.sight(hash(content), at: place) else { continue }
            if contents[Int(seen.gfn) * 8 + seen.machine - 1] == content {
                found += 1
                candidates.letGo(hash(content), at: seen)
            } else {
                wrong += 1
                candidates.letGo(hash(content), at: seen)
                candidates.note(hash(content), at: place)
            }
        }
        return (Double(found) / Double(pairs), Double(wrong) / Double(hostPages))
    }

    /// What may go is still a hint, until the room is needed.
    @Test func whatMayGoIsRememberedWhileThereIsRoom() throws {
        let candidates = try Candidates(byteCount: 128, hostPages: Self.hostPages)
        let first = Candidates.Place(machine: 1, gfn: 5), second = Candidates.Place(machine: 2, gfn: 1 << 29)
        #expect(candidates.sight(Self.hash(0), at: first) == nil)
        #expect(candidates.sight(Self.hash(0), at: first) == nil, "the same page again is no second sighting")
        #expect(candidates.sight(Self.hash(0), at: second) == first)
        candidates.letGo(Self.hash(0), at: first)
        for other in 1..<25 { #expect(candidates.sight(Self.hash(other), at: first) == nil) }
        #expect(candidates.sight(Self.hash(0), at: second) == first)
        // The set is full now, and the next one comes in its place.
        #expect(candidates.sight(Self.hash(25), at: first) == nil)
        for other in 1..<26 { #expect(candidates.sight(Self.hash(other), at: second) == first) }
        #expect(candidates.sight(Self.hash(0), at: first) == nil)
    }

    /// A place that has proved to be wrong does not hide another one, nor is what is seen then forgotten.
    @Test func aWrongPlaceDoesNotHideOthers() throws {
        let candidates = try Candidates(byteCount: 128, hostPages: Self.hostPages)
        let places = (0..<4).map { Candidates.Place(machine: 1, gfn: UInt64($0)) }
        #expect(candidates.sight(Self.hash(0), at: places[0]) == nil)
        #expect(candidates.sight(Self.hash(0), at: places[1]) == places[0])
        candidates.letGo(Self.hash(0), at: places[0])
        #expect(candidates.sight(Self.hash(0), at: places[1], besides: places[0]) == nil)
        #expect(candidates.sight(Self.hash(0), at: places[2]) == places[1])
        candidates.letGo(Self.hash(0), at: places[1])
        #expect(candidates.sight(Self.hash(0), at: places[2], besides: places[1]) == places[0])
        candidates.note(Self.hash(0), at: places[2])
        #expect(candidates.sight(Self.hash(0), at: places[3]) == places[2])
    }

    @Test func placesOfAVMThatEndedBecomeOthers() throws {
        let candidates = try Candidates(byteCount: 1 << 12, hostPages: Self.hostPages)
        let old = Candidates.Place(machine: 1, gfn: 5), new = Candidates.Place(machine: 2, gfn: 7)
        #expect(candidates.sight(Self.hash(0), at: old) == nil)
        candidates.forget(machine: 1)
        // Its numbers may name pages of another by now: hints like others, that nobody believes. None leads to who has ended.
        #expect(candidates.sight(Self.hash(0), at: new)?.machine != 1)
        // One that has more places than there is room for takes others', and cannot keep them: who comes then is remembered.
        for block in UInt64(0)..<5000 { candidates.note(Self.hash(1), at: .init(machine: 3, gfn: block << 14)) }
        #expect(candidates.sight(Self.hash(2), at: .init(machine: 4, gfn: 0)) == nil)
        #expect(candidates.sight(Self.hash(2), at: new) == .init(machine: 4, gfn: 0))
        // What is let go books nothing.
        candidates.letGo(Self.hash(3), at: .init(machine: 5, gfn: 0))
        #expect(candidates.sight(Self.hash(2), at: new) == .init(machine: 4, gfn: 0))
    }

    /// Threads meet in one set, so that one reads what another has written half of: what it makes of it is a place that is known, or
    /// none.
    @Test(arguments: 0..<6) func halfAnEntryIsBorne(_: Int) throws {
        let sets = 1 << 16
        let candidates = try Candidates(byteCount: 128 * sets, hostPages: Self.hostPages)
        let now = Atomic(0)
        // All that an entry has of such a hash is in its high byte: what is read of one before the other word is written is the right
        // content, at no place.
        @Sendable func hash(_ set: Int, _ number: Int) -> PageHash {
            PageHash(low: 0, high: UInt64(set) << 48 | UInt64(number + 1) << 5)
        }
        // The writer goes ahead, the reader follows it from set to set.
        let writer = try JoinableThread("writer") {
            for set in 0..<sets {
                now.store(set, ordering: .releasing)
                for number in 0..<25 { candidates.note(hash(set, number), at: .init(machine: 1, gfn: 1 << 20)) }
            }
        }
        for set in 0..<sets {
            while now.load(ordering: .acquiring) < set {}
            for number in 0..<25 {
                guard let seen = candidates.sight(hash(set, number), at: .init(machine: 2, gfn: 1 << 20)) else { continue }
                guard (1...2).contains(seen.machine), seen.gfn == 1 << 20 else {
                    Issue.record("\(seen)")
                    break
                }
            }
        }
        writer.join()
    }
}
