import Engines
import Glibc
import GuestMemory
import Platform
import TestSupport
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

    /// One of each, and those at the ends of what an entry holds.
    private static let states: [PageState] = [
        .private, .hole, .zero, .shared(store: 0, slot: 0), .shared(store: 255, slot: 1 << 40 - 1),
        .shared(store: 5, slot: 0x12_3456_789a),
    ]

    /// The table in the type's comment, every edge of it, for both who may move pages.
    @Test func stateTable() throws {
        for from in Self.states {
            for to in Self.states {
                let expected: PageState.Mover? =
                    switch (from.isMerged, to.isMerged) {
                    case (true, true): nil
                    case (true, false): to == .private ? .agent : nil
                    case (false, true): from == .private ? .agent : nil
                    case (false, false): from == .private && to == .private ? nil : .backend
                    }
                #expect(from.mover(to: to) == expected, "\(from) to \(to)")
            }
            #expect(PageState(entry: from.entry) == from)
        }
        // What is not an entry is no state: nobody then knows where the bytes are.
        for entry: UInt64 in [4, 0xff, 0x100, 0x101, 0x102, 1 << 48 | 2, 1 << 56 | 3, .max] {
            #expect(PageState(entry: entry) == nil)
        }
    }

    /// Random moves by both, against a dictionary. A move from a state that the page is not in changes nothing.
    @Test func randomMovesAgainstAModel() throws {
        let opened = try Opened()
        let map = opened.map
        let raw = try Mapping(opened.file, byteCount: Int(PageMap.byteCount(pageCount: 8192)))
        let locks = 4096 + 8 * 8192
        var model: [GFN: PageState] = [:]
        var random = SplitMix(20_240_607)
        // Pages on both sides of a lock's end, so that runs go over it.
        let gfns = Array(GFN(500)..<GFN(530)) + [0, 8191]
        var moved = 0
        for round in 0..<20_000 {
            let gfn = gfns[Int(random.next() % UInt64(gfns.count))]
            let from = random.next() % 4 == 0 ? Self.states.randomElement(using: &random)! : model[gfn] ?? .private
            let to = Self.states.randomElement(using: &random)!
            if let mover = from.mover(to: to) {
                let isThere = (model[gfn] ?? .private) == from
                if to.isMerged { raw.store8(locks + 8 * Int(gfn / 512) + 5, 1) }
                #expect(map.move(gfn, from: from, to: to, by: mover) == isThere)
                if isThere {
                    model[gfn] = to
                    moved += 1
                }
            }
            #expect(map.state(of: gfn) == model[gfn] ?? .private)
            guard round % 10 == 0 else { continue }
            let low = 495 + random.next() % 40, high = low + 1 + random.next() % 40
            let isMerged = (model[low] ?? .private).isMerged
            let count = (low..<high).prefix { (model[$0] ?? .private).isMerged == isMerged }.count
            let (found, merged) = try map.alike(low..<high)
            #expect(found == count && merged == isMerged)
        }
        #expect(moved > 4000)
        let again = try PageMap(opened.file.duplicate())
        for gfn in gfns { #expect(again.state(of: gfn) == model[gfn] ?? .private) }
    }

    /// Where nothing was ever merged no entry is looked at: the map costs no memory for it. And what is behind the map's
    /// end is never merged.
    @Test func lookingCostsNothing() throws {
        let opened = try Opened(pages: 1 << 20)
        let before = opened.map.allocatedBytes
        #expect(try opened.map.alike(0..<1 << 20) == (1 << 20, false))
        #expect(try opened.map.alike(1 << 20 - 1..<1 << 20 + 5) == (6, false))
        #expect(try opened.map.alike(1 << 40..<1 << 40 + 5) == (5, false))
        try opened.map.beginIO(1 << 40..<1 << 40 + 5)
        opened.map.endIO(1 << 40..<1 << 40 + 5)
        #expect(opened.map.allocatedBytes <= before + 8 * (1 << 20) / 512 + 8192)
    }

    @Test func survivesReopening() throws {
        let opened = try Opened()
        let map = opened.map
        #expect(map.registration == nil && map.openClaims.isEmpty && map.recycledTotal == 0)
        map.move(77, from: .private, to: .hole)
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
        map.move(3, from: .private, to: .hole)
        map.addRecycled(2)
        let raw = try Mapping(opened.file, byteCount: Int(PageMap.byteCount(pageCount: 8192)))
        #expect(raw.copyOut(0, count: 8) == Array("QUIREMAP".utf8))
        #expect(raw.load32(8) == 2 && raw.load32(12) == 4096 && raw.load64(16) == 8192)
        #expect(raw.load64(24) == 7 && raw.load64(32) == 0x9000 && raw.load64(40) == 2)
        #expect(raw.load64(1024 + 128) == 10 && raw.load64(1024 + 136) == 2 && raw.load64(1024 + 144) == 99)
        #expect(raw.load64(4096 + 8 * 3) == 1)
        #expect(raw.load64(64) == 4096 + 8 * 8192)
    }

    /// A flag is set while another comes and goes, and what a later version keeps beside them stays.
    @Test func flagsStayApart() throws {
        let opened = try Opened()
        let map = opened.map
        let raw = try Mapping(opened.file, byteCount: 4096)
        #expect(!map.isUnmerged && !map.hasArrived && raw.load32(72) == 0)
        map.noteArrival()
        #expect(map.hasArrived && !map.isUnmerged && raw.load32(72) == 2)
        let later: UInt32 = 1 << 31
        raw.store32(72, later | 2)
        map.isUnmerged = true
        #expect(map.hasArrived && map.isUnmerged && raw.load32(72) == later | 3)
        map.isUnmerged = false
        map.noteArrival()
        #expect(map.hasArrived && !map.isUnmerged && raw.load32(72) == later | 2)
        let again = try PageMap(opened.file.duplicate())
        #expect(again.hasArrived && !again.isUnmerged)

        let isDone = Monitor(false)
        let other = try JoinableThread("flags") {
            while !isDone.read({ $0 }) {
                for _ in 0..<100 { map.isUnmerged.toggle() }
            }
        }
        var lost = 0
        for _ in 0..<20_000 {
            map.noteArrival()
            for _ in 0..<20 where !map.hasArrived { lost += 1 }
            var flags: UInt32
            repeat { flags = raw.load32(72) } while !raw.compareExchange32(72, expected: flags, desired: flags & ~2)
        }
        isDone.update { $0 = true }
        other.join()
        #expect(lost == 0)
    }

    /// What the agent writes is read as it means it, and I/O waits while a window of the agent is open there only.
    @Test func mergedPagesAndRangeLocks() async throws {
        let opened = try Opened()
        let map = opened.map
        let raw = try Mapping(opened.file, byteCount: Int(PageMap.byteCount(pageCount: 8192)))
        raw.store64(4096 + 8 * 9, 3 | 0x12_3456_789a << 8 | 5 << 48)
        raw.store64(4096 + 8 * 10, 2)
        raw.store64(4096 + 8 * 11, 77)
        #expect(map.state(of: 9) == .shared(store: 5, slot: 0x12_3456_789a) && map.state(of: 10) == .zero)
        #expect(map.state(of: 11) == nil)

        let locks = 4096 + 8 * 8192
        raw.store8(locks + 5, 1)
        #expect(throws: QuireError.self) { try map.alike(9..<12) }
        #expect(try map.alike(8..<12) == (1, false))

        try map.beginIO(500..<1025)
        #expect((0..<4).map { raw.load16(locks + 8 * $0) } == [1, 1, 1, 0])
        try map.beginIO(512..<513)
        #expect(raw.load16(locks + 8) == 2)
        map.endIO(500..<1025)
        map.endIO(512..<513)
        #expect((0..<4).allSatisfy { raw.load16(locks + 8 * $0) == 0 })

        raw.store8(locks + 4, 1)
        try map.beginIO(512..<513)
        map.endIO(512..<513)
        async let waited: Void = { try map.beginIO(511..<512) }()
        try await Task.sleep(for: .milliseconds(20))
        raw.store8(locks + 4, 0)
        try await waited
        #expect(raw.load16(locks) == 1)
    }

    /// A window that does not close: QEMU died in it. Nobody waits for ever, and nothing is held after.
    @Test func aWindowThatStaysOpen() throws {
        let opened = try Opened()
        let raw = try Mapping(opened.file, byteCount: Int(PageMap.byteCount(pageCount: 8192)))
        let locks = 4096 + 8 * 8192
        raw.store8(locks + 8 * 2 + 4, 1)
        let error = #expect(throws: QuireError.self) { try opened.map.beginIO(0..<2048, patience: 10_000_000) }
        #expect(error?.code == .busy)
        #expect((0..<4).allSatisfy { raw.load16(locks + 8 * $0) == 0 })
    }

    /// The counts of a back end that died in the middle of I/O go with its successor's start; what is the agent's stays.
    @Test func takingOver() throws {
        let opened = try Opened()
        let raw = try Mapping(opened.file, byteCount: Int(PageMap.byteCount(pageCount: 8192)))
        let locks = 4096 + 8 * 8192
        try opened.map.beginIO(0..<8192)
        raw.store16(locks + 8 * 3 + 2, 7)
        raw.store8(locks + 8 * 3 + 4, 1)
        raw.store8(locks + 8 * 3 + 5, 1)
        let generation = raw.load32(60)
        let next = try PageMap(opened.file.duplicate())
        next.takeOver(pid: 4711)
        #expect((0..<16).allSatisfy { raw.load16(locks + 8 * $0) == 0 })
        #expect(raw.load16(locks + 8 * 3 + 2) == 7 && raw.load16(locks + 8 * 3 + 4) == 0x101)
        #expect(raw.load32(60) == generation + 1 && raw.load32(56) == 4711)
        // A window that is open may be about to merge; and a page that was merged may be still.
        #expect(next.mayHaveMerged)
        raw.store8(locks + 8 * 3 + 5, 0)
        #expect(next.mayHaveMerged)
        raw.store8(locks + 8 * 3 + 4, 0)
        #expect(!next.mayHaveMerged)
        raw.store8(locks + 8 * 15 + 5, 1)
        #expect(next.mayHaveMerged)
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
