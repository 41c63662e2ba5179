import Engines
import Glibc
import Platform
import Testing

/// The page map: what survives a back end.
@Suite struct PageMapTests {
    private final class Opened {
        let map: PageMap
        let file: Descriptor
        init(pages: UInt64 = 8192) throws {
            file = try PageMap.makeFile(pageCount: pages)
            map = try PageMap(file.duplicate())
        }
    }

    /// The table in the type's comment, every edge of it.
    @Test func stateTable() throws {
        let allowed: [(PageState, PageState)] = [
            (.private, .hole), (.hole, .private), (.hole, .hole),
            (.private, .zero), (.private, .shared), (.zero, .private), (.shared, .private),
        ]
        for from in PageState.allCases {
            for to in PageState.allCases {
                #expect(from.mayBecome(to) == allowed.contains { $0 == (from, to) }, "\(from) to \(to)")
            }
        }
        let map = try Opened().map
        #expect(map.pageCount == 8192)
        for gfn in [UInt64(0), 1, 4095, 4096, 8191] {
            #expect(map.state(of: gfn) == .private)
            map.setState(of: gfn, to: .hole)
            #expect(map.state(of: gfn) == .hole)
            map.setState(of: gfn, to: .hole)
            map.setState(of: gfn, to: .private)
            #expect(map.state(of: gfn) == .private)
        }
    }

    @Test func survivesReopening() throws {
        let opened = try Opened()
        let map = opened.map
        #expect(map.registration == nil && map.openClaims.isEmpty && map.recycledTotal == 0)
        map.setState(of: 77, to: .hole)
        map.registration = PageMap.Registration(nonce: 0xfeed, headerAddress: 0x1234_5000)
        map.addRecycled(5)
        map.addRecycled(7)
        map.openClaim(0, 100..<164, now: 11)
        map.openClaim(15, 8190..<8192, now: 12)
        map.openClaim(3, 5..<6, now: 13)
        map.closeClaim(3)

        let again = try PageMap(opened.file.duplicate())
        #expect(again.pageCount == 8192 && again.state(of: 77) == .hole && again.state(of: 78) == .private)
        #expect(again.registration == PageMap.Registration(nonce: 0xfeed, headerAddress: 0x1234_5000))
        #expect(again.recycledTotal == 12)
        let claims = again.openClaims
        #expect(claims.map(\.gfns) == [100..<164, 8190..<8192] && claims.map(\.since) == [11, 12])
        again.clearJournal()
        again.registration = nil
        #expect(map.openClaims.isEmpty && map.registration == nil)
    }

    /// The bytes that the supervisor and the agent read, by the header's layout.
    @Test func layout() throws {
        let opened = try Opened()
        let map = opened.map
        map.registration = PageMap.Registration(nonce: 7, headerAddress: 0x9000)
        map.openClaim(2, 10..<12, now: 99)
        map.setState(of: 3, to: .hole)
        map.addRecycled(2)
        let raw = try Mapping(opened.file, byteCount: Int(PageMap.byteCount(pageCount: 8192)))
        #expect(raw.copyOut(0, count: 8) == Array("QUIREMAP".utf8))
        #expect(raw.load32(8) == 2 && raw.load32(12) == 4096 && raw.load64(16) == 8192)
        #expect(raw.load64(24) == 7 && raw.load64(32) == 0x9000 && raw.load64(40) == 2)
        #expect(raw.load64(1024 + 128) == 10 && raw.load64(1024 + 136) == 2 && raw.load64(1024 + 144) == 99)
        #expect(raw.load64(4096 + 8 * 3) == 1)
        #expect(raw.load64(64) == 4096 + 8 * 8192)
    }

    /// What the agent writes is read as it means it, and I/O waits while a window of the agent is open there only.
    @Test func mergedPagesAndRangeLocks() async throws {
        let opened = try Opened()
        let map = opened.map
        let raw = try Mapping(opened.file, byteCount: Int(PageMap.byteCount(pageCount: 8192)))
        raw.store64(4096 + 8 * 9, 3 | 0x12_3456_789a << 8 | 5 << 48)
        raw.store64(4096 + 8 * 10, 2)
        #expect(map.state(of: 9) == .shared && map.state(of: 10) == .zero && map.slot(of: 10) == nil)
        let slot = try #require(map.slot(of: 9))
        #expect(slot.store == 5 && slot.slot == 0x12_3456_789a)

        let locks = 4096 + 8 * 8192
        map.beginIO(500..<1025)
        #expect((0..<4).map { raw.load16(locks + 8 * $0) } == [1, 1, 1, 0])
        map.beginIO(512..<513)
        #expect(raw.load16(locks + 8) == 2)
        map.endIO(500..<1025)
        map.endIO(512..<513)
        #expect((0..<4).allSatisfy { raw.load64(locks + 8 * $0) == 0 })

        raw.store8(locks + 4, 1)
        map.beginIO(512..<513)
        map.endIO(512..<513)
        async let waited: Void = { map.beginIO(511..<512) }()
        try await Task.sleep(for: .milliseconds(20))
        raw.store8(locks + 4, 0)
        await waited
        #expect(raw.load16(locks) == 1)
    }

    /// A journal that says nonsense (a bug, a bad disk, another version) claims nothing.
    @Test func nonsenseInTheJournalIsIgnored() throws {
        let opened = try Opened()
        let map = opened.map
        let raw = try Mapping(opened.file, byteCount: 4096)
        for (worker, (first, count)) in [
            (UInt64(0), UInt64(65)), (8192, 1), (.max, 64), (0, .max), (8190, 64),
        ].enumerated() {
            raw.store64(1024 + 64 * worker, first)
            raw.store64(1024 + 64 * worker + 8, count)
        }
        #expect(map.openClaims.map(\.gfns) == [8190..<8192])
    }

    /// Data and holes of a file, as the page map asks for them when it opens.
    @Test func dataIsFound() throws {
        let file = try Memfd(name: "holes", byteCount: 8 * 4096).takeDescriptor()
        let mapping = try Mapping(file, byteCount: 8 * 4096)
        mapping.store8(3 * 4096 + 5, 1)
        func hasData(_ pages: Range<UInt64>) -> Bool {
            let range = pages.lowerBound * 4096..<pages.upperBound * 4096
            let isThere = Memfd.hasData(file.raw, range)
            #expect(isThere == (Memfd.nextData(file.raw, from: range.lowerBound, to: range.upperBound) != nil))
            return isThere
        }
        #expect(hasData(3..<4) && hasData(0..<8) && hasData(0..<4) && hasData(3..<8))
        #expect(!hasData(0..<3) && !hasData(4..<8) && !hasData(7..<9))
        try Memfd.punch(file.raw, offset: 3 * 4096, byteCount: 4096)
        #expect(!hasData(0..<8))
    }

    @Test func foreignFilesAreRefused() throws {
        func refuses(_ size: UInt64, _ change: (borrowing Mapping) -> Void) throws -> Bool {
            let file = try PageMap.makeFile(pageCount: 512)
            _ = try PageMap(file.duplicate())
            let raw = try Mapping(file, byteCount: 4096)
            change(raw)
            return (try? PageMap(file.duplicate())) == nil
        }
        #expect(try !refuses(0) { _ in })
        #expect(try refuses(0) { $0.store8(0, 0) })
        #expect(try refuses(0) { $0.store32(8, 1) })
        #expect(try refuses(0) { $0.store64(16, 513) })
        for size in [UInt64(0), 8, 4095] {
            let file = try Memfd(name: "short", byteCount: size).takeDescriptor()
            #expect(throws: QuireError.self) { try PageMap(file.duplicate()) }
        }
        let pipe = try Pipe()
        #expect(throws: QuireError.self) { try PageMap(Descriptor.duplicate(of: pipe.reader.raw()!)) }
    }
}
