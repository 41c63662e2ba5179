import Engines
import Glibc
import Platform
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

    /// The control: a leaf that names a content before its bytes are written is found out.
    @Test func namingBeforeWritingLosesPages() throws {
        #expect(try run(kills: 200, arguments: ["early"], stopsAtFirst: true).wrong > 0)
    }
}
