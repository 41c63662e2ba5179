import PageContent
import PageStore
import Platform
import StoreProtocol
import Synchronization
import TestSupport
import Testing

struct ContentIndexTests {
    private static let slots = 8192
    /// These are in the index all along.
    private static let residents = 1..<65

    private static func hash(_ number: UInt64) -> PageHash {
        var random = SplitMix(number)
        return PageHash(low: random.next(), high: random.next())
    }

    private static func table() throws -> SlotTable {
        let table = try SlotTable(SlotTable.makeFile(group: "test", node: 0, slots: slots))
        try table.setHashes(1, (1..<slots).map { hash(UInt64($0)) }[...])
        return table
    }

    @Test func findsWhatIsInAndNothingElse() throws {
        let table = try Self.table(), index = try ContentIndex(table)
        func find(_ slot: Int) -> UInt32? { ContentIndex.reading { index.find(Self.hash(UInt64(slot))) } }
        for slot in 1..<Self.slots {
            #expect(find(slot) == nil)
            #expect(index.add(UInt32(slot)) == UInt32(slot))
        }
        for slot in 1..<Self.slots { #expect(find(slot) == UInt32(slot)) }
        for slot in stride(from: 1, to: Self.slots, by: 3) { index.remove(UInt32(slot)) }
        ContentIndex.waitForReaders()
        for slot in 1..<Self.slots { #expect(find(slot) == (slot % 3 == 1 ? nil : UInt32(slot))) }
        // One that is not in goes without harm, and the second of a content does not come in.
        index.remove(1)
        try table.setHashes(4, [Self.hash(2)])
        #expect(index.add(4) == 2 && find(2) == 2)
        index.remove(4)
        #expect(find(2) == 2)
    }

    /// Two threads grow indexes, and take out again what they have put in, while two others look up. What is in all along is never
    /// missed, and what is found has the content that was looked for.
    @Test func nobodyMissesWhatIsIn() throws {
        let outcome = try Self.stress(looksAgain: true, untilMissed: 0, seconds: 2)
        #expect(outcome.missed == 0 && outcome.wrong == 0, "\(outcome)")
        // It was under way: each index has grown while others looked.
        #expect(outcome.looks > 10_000 && outcome.rounds > 2, "\(outcome)")
    }

    /// The control: who is disturbed by a chain that is split, and does not look again, misses what is there.
    @Test func controlWhoDoesNotLookAgainMisses() throws {
        let outcome = try Self.stress(looksAgain: false, untilMissed: 1, seconds: 60)
        #expect(outcome.missed > 0, "\(outcome)")
    }

    private struct Outcome {
        var missed = 0, wrong = 0, looks = 0, rounds = 0
    }

    private final class Round: Sendable {
        let table: SlotTable
        let index: ContentIndex
        init(_ looksAgain: Bool) throws {
            table = try ContentIndexTests.table()
            index = try ContentIndex(table, looksAgain: looksAgain)
            for slot in ContentIndexTests.residents { _ = index.add(UInt32(slot)) }
        }
    }

    /// Ends after `seconds`, or as soon as so much was missed, if that is not 0.
    private static func stress(looksAgain: Bool, untilMissed: Int, seconds: UInt64) throws -> Outcome {
        let current = Mutex(try Round(looksAgain))
        let missed = Atomic(0), wrong = Atomic(0), looks = Atomic(0), isOver = Atomic(false)
        let deadline = monotonicNanoseconds() + seconds * 1_000_000_000
        let readers = try (0..<2).map { number in
            try JoinableThread("reader") {
                var random = SplitMix(UInt64(number))
                while !isOver.load(ordering: .relaxed) {
                    let round = current.withLock { $0 }
                    for _ in 0..<500 {
                        let slot = Int.random(in: residents, using: &random)
                        let found = ContentIndex.reading { round.index.find(hash(UInt64(slot))) }
                        if found != UInt32(slot) { missed.add(1, ordering: .relaxed) }
                        // Some other's: in or not, under the content that it has in this life or in another one.
                        let other = Int.random(in: residents.upperBound..<slots, using: &random)
                        let content = hash(UInt64(other + slots * Int.random(in: 0..<2, using: &random)))
                        let isRight = ContentIndex.reading {
                            round.index.find(content).map { $0 == UInt32(other) && round.table.has(content, for: $0) } ?? true
                        }
                        if !isRight { wrong.add(1, ordering: .relaxed) }
                    }
                    looks.add(1000, ordering: .relaxed)
                }
            }
        }
        var outcome = Outcome()
        while monotonicNanoseconds() < deadline, untilMissed == 0 || missed.load(ordering: .relaxed) < untilMissed {
            let round = try Round(looksAgain)
            current.withLock { $0 = round }
            let writers = try (0..<2).map { number in
                try JoinableThread("writer") {
                    let mine = stride(from: residents.upperBound + number, to: slots, by: 2)
                    for slot in mine { if round.index.add(UInt32(slot)) != UInt32(slot) { wrong.add(1, ordering: .relaxed) } }
                    // Another life for some.
                    let some = mine.filter { $0 % 16 < 2 }
                    for slot in some { round.index.remove(UInt32(slot)) }
                    ContentIndex.waitForReaders()
                    for slot in some {
                        guard (try? round.table.setHashes(slot, [hash(UInt64(slot + slots))])) != nil,
                            round.index.add(UInt32(slot)) == UInt32(slot)
                        else {
                            wrong.add(1, ordering: .relaxed)
                            continue
                        }
                    }
                }
            }
            for writer in writers { writer.join() }
            outcome.rounds += 1
        }
        isOver.store(true, ordering: .relaxed)
        for reader in readers { reader.join() }
        outcome.missed = missed.load(ordering: .relaxed)
        outcome.wrong = wrong.load(ordering: .relaxed)
        outcome.looks = looks.load(ordering: .relaxed)
        return outcome
    }
}
