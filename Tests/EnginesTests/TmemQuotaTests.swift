import Engines
import Platform
import Synchronization
import Testing
import TestSupport

/// What stores of one host may use together.
@Suite struct TmemQuotaTests {
    /// So much for all who ask; nil: as much as they want.
    private final class Pot: Sendable {
        private let cap: UInt64?
        private let shares = Mutex<[Int: UInt64]>([:])
        init(_ cap: UInt64?) { self.cap = cap }

        var total: UInt64 { shares.withLock { $0.values.reduce(0, +) } }
        func quota(_ number: Int) -> any TmemQuota { One(pot: self, number: number) }

        private struct One: TmemQuota {
            let pot: Pot
            let number: Int
            func allow(used: UInt64, held: UInt64, wanted: UInt64) -> UInt64? {
                pot.shares.withLock { shares in
                    let others = shares.filter { $0.key != number }.values.reduce(0, +)
                    let allowed = max(used, pot.cap.map { min(wanted, $0 - min($0, others)) } ?? wanted)
                    shares[number] = allowed
                    return allowed
                }
            }
        }
    }

    /// What a store's file has besides what is counted: its head, and first pages of tables.
    private static let fixedBytes: UInt64 = 256 << 10
    private static let said = "the host's limit for transcendent memory is reached (tmem-cap of quired)"

    private func fill(_ pool: TmemPool, _ seed: UInt64, _ pages: Int) -> (kept: [UInt32], refusal: QuireError?) {
        var kept: [UInt32] = [], refusal: QuireError?
        for index in 0..<UInt32(pages) {
            do {
                try pool.put(0, index, bytes: TmemPages.page(seed << 32 | UInt64(index)))
                kept.append(index)
            } catch { refusal = error as? QuireError }
        }
        return (kept, refusal)
    }

    /// Two stores never take more than there is for both, say why a put fails, and lose nothing; what one gives back the other may
    /// have. The control: with nobody to ask they take what they want.
    @Test(arguments: [true, false]) func storesShareALimit(_ isLimited: Bool) throws {
        let cap: UInt64 = 24 << 20
        let pot = Pot(isLimited ? cap : nil)
        let fixtures = [try TmemFixture(), try TmemFixture()]
        defer { for fixture in fixtures { fixture.close() } }
        let stores = try fixtures.enumerated().map { number, fixture in
            try Tmem(Descriptor.duplicate(of: fixture.file), quota: pot.quota(number), seams: TmemSeams())
        }
        let pools = try stores.map { try $0.createPool(.init(kind: .persistent, scope: .private, name: "d", client: "a")) }
        var used: UInt64 { fixtures.reduce(0) { $0 + $1.allocatedBytes } }
        let first = fill(pools[0], 1, 2000)
        #expect(first.kept.count == 2000 && stores[0].hostShortage == nil)
        let second = fill(pools[1], 2, 6000)
        for index in first.kept { #expect(try pools[0].page(0, index) == TmemPages.page(1 << 32 | UInt64(index))) }
        for index in second.kept { #expect(try pools[1].page(0, index) == TmemPages.page(2 << 32 | UInt64(index))) }
        guard isLimited else {
            #expect(second.kept.count == 6000 && used > cap)
            return
        }
        #expect(used <= cap + 2 * Self.fixedBytes && pot.total <= cap && second.kept.count > 2500)
        #expect(second.refusal?.code == .noSpace && second.refusal?.message == Self.said)
        #expect(stores[1].hostShortage == "a page found no room: " + Self.said)
        // What is there already may be used again.
        pools[1].flush(0, second.kept[0])
        try pools[1].put(1, 0, bytes: TmemPages.page(1 << 50))
        // Not before the first has given it back.
        #expect(pools[0].flush(0, pages: 0..<2000) == 2000)
        stores[0].compact()
        ProcessCalls.sleep(milliseconds: 120)
        #expect(!fill(pools[1], 3, 1).kept.isEmpty || pot.total <= cap)
        stores[0].reviewQuota()
        ProcessCalls.sleep(milliseconds: 120)
        let more = fill(pools[1], 4, 4000)
        #expect(more.kept.count == 4000, "\(more.refusal?.message ?? "")")
        #expect(used <= cap + 2 * Self.fixedBytes && pot.total <= cap)
        for store in stores { audit(store) }
    }

    /// Ephemeral pages make room before a put of a guest's only copy fails.
    @Test func ephemeralPagesMakeRoom() throws {
        let pot = Pot(16 << 20)
        let fixture = try TmemFixture()
        defer { fixture.close() }
        let tmem = try Tmem(Descriptor.duplicate(of: fixture.file), quota: pot.quota(0), seams: TmemSeams())
        let cache = try tmem.createPool(.init(kind: .ephemeral, scope: .shared, name: "e", client: "b"))
        let disk = try tmem.createPool(.init(kind: .persistent, scope: .private, name: "d", client: "a"))
        #expect(fill(cache, 1, 3000).kept.count == 3000)
        #expect(fill(disk, 2, 3000).kept.count == 3000)
        #expect(fixture.allocatedBytes <= (16 << 20) + Self.fixedBytes && cache.statistics.evictions > 2000)
        audit(tmem)
    }

    /// As long as nobody says how much there is, a put waits, and does nothing: not even away with the old page.
    @Test func whoWaitsHasDoneNothing() throws {
        final class Silent: TmemQuota {
            let answers = Atomic<Bool>(true)
            func allow(used: UInt64, held: UInt64, wanted: UInt64) -> UInt64? {
                answers.load(ordering: .relaxed) ? max(used, min(wanted, held + 1 << 20)) : nil
            }
        }
        let fixture = try TmemFixture()
        defer { fixture.close() }
        let quota = Silent()
        let tmem = try Tmem(Descriptor.duplicate(of: fixture.file), quota: quota, seams: TmemSeams())
        let disk = try tmem.createPool(.init(kind: .persistent, scope: .private, name: "d", client: "a"))
        #expect(fill(disk, 1, 100).kept.count == 100)
        quota.answers.store(false, ordering: .relaxed)
        let first = fill(disk, 2, 500)
        #expect(first.refusal?.code == .retry && disk.statistics.putsFailed == 0 && tmem.hostShortage == nil)
        // Each has the page of before or, where there was room yet, the new one.
        var old = 0
        for index in 0..<UInt32(100) {
            let page = try disk.page(0, index)
            let isNew = first.kept.contains(index)
            #expect(page == TmemPages.page((isNew ? 2 : 1) << 32 | UInt64(index)))
            if !isNew { old += 1 }
        }
        #expect(old < 100 && first.kept.count < 500)
        let late = UInt32(50)
        while errorCode({ try disk.put(0, late, bytes: TmemPages.page(UInt64.random(in: 0 ... .max))) }) == nil {}
        let before = try disk.page(0, late)
        #expect(errorCode { try disk.put(0, late, bytes: TmemPages.page(77)) } == .retry)
        #expect(try disk.page(0, late) == before)
        quota.answers.store(true, ordering: .relaxed)
        try disk.putPatiently(0, late, unsafe TmemPages.page(77).span.bytes)
        #expect(try disk.page(0, late) == TmemPages.page(77))
        audit(tmem)
    }

    /// A store that is opened again has what it had, whatever is left for others, and asks before it takes more.
    @Test func whatIsThereStays() throws {
        let fixture = try TmemFixture()
        defer { fixture.close() }
        do {
            let tmem = try fixture.open()
            let disk = try tmem.createPool(.init(kind: .persistent, scope: .private, name: "d", client: "a"))
            #expect(fill(disk, 1, 2000).kept.count == 2000)
        }
        let pot = Pot(4 << 20)
        let tmem = try Tmem(Descriptor.duplicate(of: fixture.file), quota: pot.quota(0), seams: TmemSeams())
        tmem.reviewQuota()
        #expect(pot.total == tmem.usage.usedBytes && pot.total > 8 << 20)
        let disk = try #require(tmem.pool(named: "d"))
        for index in 0..<UInt32(2000) { #expect(try disk.page(0, index) == TmemPages.page(1 << 32 | UInt64(index))) }
        var refused = 0
        for index in 2000..<UInt32(2100) where errorCode({ try disk.put(0, index, bytes: TmemPages.page(UInt64(index))) }) == .noSpace { refused += 1 }
        #expect(refused > 50)
        audit(tmem)
    }
}
