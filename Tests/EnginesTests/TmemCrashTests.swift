import Engines
import Glibc
import Platform
import Synchronization
import TestSupport
import Testing

/// A process that puts pages and is killed, again and again, in one store (Tests/TmemPutter). For each key it notes which
/// round it begins and which was acknowledged: after its death the key has the page of one of the two, whole.
@Suite(.serialized) struct TmemCrashTests {
    /// Kills putters `kills` times; how many keys had another page than they may have, and why a start failed.
    private func run(kills: Int, arguments: [String], stopsAtFirst: Bool) throws -> (wrong: Int, rounds: UInt64) {
        let fixture = try TmemFixture()
        defer { fixture.close() }
        let file = try Memfd(name: "notes", byteCount: UInt64(putterKeys * 16)).takeDescriptor()
        let notes = try Mapping(file, byteCount: putterKeys * 16)
        var random = SystemRandomNumberGenerator()
        var wrong = 0
        func rounds() -> UInt64 { (0..<putterKeys).reduce(0) { $0 + notes.load64($1 * 16 + 8) } }
        for _ in 0..<kills {
            let before = rounds()
            let child = try ProcessCalls.spawn(
                [products + "tmem-putter"] + arguments, passing: [.init(from: fixture.file, to: 3), .init(from: file.raw, to: 4)],
                inheritOthers: false, ownGroup: false, parentDeathSignal: SIGKILL)
            let works = eventually(milliseconds: 20_000) { rounds() > before + 20 }
            #expect(works)
            usleep(UInt32.random(in: 0..<20_000, using: &random))
            ProcessCalls.signal(child, SIGKILL)
            #expect(ProcessCalls.wait(child, blocking: true) == .signalled(SIGKILL))

            let tmem = try fixture.open()
            let pool = try #require(tmem.pool(named: "swap"))
            var pages: UInt64 = 0
            for key in 0..<putterKeys {
                let found: [UInt8]?
                do { found = try pool.page(7, UInt32(key)) } catch {
                    // There is one, and it is damaged.
                    wrong += 1
                    pages += 1
                    continue
                }
                if found != nil { pages += 1 }
                let began = notes.load64(key * 16), acknowledged = notes.load64(key * 16 + 8)
                if acknowledged == began {
                    if found != putterPage(key, began) { wrong += 1 }
                } else if found != putterPage(key, began), found != putterPage(key, acknowledged) {
                    wrong += 1
                }
                // The next putter goes on from here.
                if found == putterPage(key, began) { notes.store64(key * 16 + 8, began) } else { notes.store64(key * 16, acknowledged) }
            }
            // Nothing leaked: what is charged is what is named.
            #expect(tmem.usage.pages == pages && pool.statistics.storedBytes == UInt64(tmem.unitBytes))
            #expect(tmem.usage.contents <= pages)
            if wrong > 0, stopsAtFirst { break }
        }
        return (wrong, rounds())
    }

    @Test func everyAcknowledgedPutSurvivesKilling() throws {
        let (wrong, rounds) = try run(kills: 60, arguments: [], stopsAtFirst: false)
        #expect(wrong == 0)
        print("tmem: \(rounds) rounds in killed processes, \(wrong) wrong pages")
    }

    /// What there is at every step is what a kill would leave then: a copy of the file, opened. The keys that are being changed
    /// have the old page or the new one, all others theirs. The control: as below.
    @Test(arguments: [false, true]) func everyStepMayBeTheLast(_ namesBeforeWriting: Bool) throws {
        let fixture = try TmemFixture()
        defer { fixture.close() }
        struct State {
            var pages: [UInt32: [UInt8]] = [:]
            var changing: [UInt32: [UInt8]?] = [:]
            var steps = 0
            var wrong = 0
        }
        let state = Mutex(State())
        var seams = TmemSeams()
        seams.namesBeforeWriting = namesBeforeWriting
        seams.step = {
            state.withLock { state in
                state.steps += 1
                guard let copy = try? fixture.copy() else { return state.wrong += 1 }
                defer { copy.close() }
                guard let tmem = try? copy.open(), let pool = tmem.pool(named: "swap") else { return state.wrong += 1 }
                for key in 0..<Self.stepKeys {
                    let found: [UInt8]?
                    do { found = try pool.page(0, key) } catch {
                        state.wrong += 1
                        continue
                    }
                    if found == state.pages[key] { continue }
                    if let new = state.changing[key], new == found { continue }
                    state.wrong += 1
                }
            }
        }
        let tmem = try fixture.open(seams: seams)
        let pool = try tmem.createPool(.init(kind: .persistent, scope: .private, name: "swap", client: "c"))
        func change(_ new: [UInt32: [UInt8]?], _ body: () throws -> Void) rethrows {
            state.withLock { $0.changing = new }
            try body()
            state.withLock { state in
                for (key, page) in new { state.pages[key] = page }
                state.changing = [:]
            }
        }
        func put(_ key: UInt32, _ page: [UInt8]) throws { try change([key: page]) { try pool.put(0, key, bytes: page) } }
        var random = SplitMix(11)
        for step in 0..<60 as Range<UInt64> {
            let key = UInt32(random.next() % UInt64(Self.stepKeys))
            switch random.next() % 8 {
            case 0: change([key: nil]) { pool.flush(0, key) }
            case 1:
                let range = key..<min(key + 5, Self.stepKeys)
                change(Dictionary(uniqueKeysWithValues: range.map { ($0, nil as [UInt8]?) })) { pool.flush(0, pages: range) }
            default: try put(key, TmemPages.any(step))
            }
        }
        // A put that finds no room leaves neither the old page nor the new one.
        try put(1, TmemPages.page(1, randomWords: 20))
        try pool.setCap(pool.statistics.storedBytes)
        change([1: nil]) { #expect(errorCode { try pool.put(0, 1, bytes: TmemPages.page(1 << 40)) } == .noSpace) }
        try pool.setCap(nil)
        // Slabs that run empty, among the pages of a pool that ends.
        let other = try tmem.createPool(.init(kind: .persistent, scope: .private, name: "other", client: "c"))
        for key in 0..<Self.stepKeys {
            try put(key, TmemPages.page(UInt64(key)))
            try other.put(0, key, bytes: TmemPages.page(UInt64(key) + (key % 2 == 0 ? 0 : 1000)))
        }
        for key in 0..<Self.stepKeys where key % 4 != 0 { change([key: nil]) { pool.flush(0, key) } }
        other.destroy()
        tmem.compact()
        let (steps, wrong) = state.withLock { ($0.steps, $0.wrong) }
        print("tmem: \(wrong) wrong pages at \(steps) steps")
        #expect(steps > 500 && (wrong == 0) != namesBeforeWriting)
    }
    private static let stepKeys: UInt32 = 48

    /// The control: a leaf that names a content before its bytes are written is found out.
    @Test func namingBeforeWritingLosesPages() throws {
        #expect(try run(kills: 200, arguments: ["early"], stopsAtFirst: true).wrong > 0)
    }
}
