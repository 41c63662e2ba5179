import Engines
import Glibc
import PageContent
import Platform
import Synchronization
import TestSupport
import Testing

@Suite struct TmemTests {
    private struct Key: Hashable {
        let pool: Int
        let object: UInt64
        let index: UInt32
    }
    private static let kinds: [(TmemPool.Kind, TmemPool.Scope)] = [
        (.ephemeral, .private), (.ephemeral, .shared), (.persistent, .private), (.persistent, .shared),
    ]

    /// All four kinds against a dictionary, without pressure: everything is found, by the next process too.
    @Test(arguments: [Tmem.Compression.lz4, .zstd(level: 1)]) func randomOperationsAgainstADictionary(
        _ compression: Tmem.Compression
    ) throws {
        let fixture = try TmemFixture()
        defer { fixture.close() }
        var random = SplitMix(42)
        var model: [Key: UInt64] = [:]
        var tmem = try fixture.open(.init(compression: compression))
        for (number, (kind, scope)) in Self.kinds.enumerated() {
            _ = try tmem.createPool(.init(kind: kind, scope: scope, name: "pool-\(number)", client: "client-\(number % 2)"))
        }
        var pools = tmem.pools
        for step in 0..<40_000 {
            if step % 5000 == 4999 {
                audit(tmem, model.count)
                // The next process.
                let before = tmem.usage
                pools = []
                tmem = try Self.replace(&tmem, fixture, compression)
                pools = tmem.pools
                #expect(pools.map(\.name) == ["pool-0", "pool-1", "pool-2", "pool-3"])
                #expect(zip(pools, Self.kinds).allSatisfy { $0.attributes.kind == $1.0 && $0.attributes.scope == $1.1 })
                audit(tmem, model.count)
                let after = tmem.usage
                #expect(after.contents == before.contents && after.contentBytes == before.contentBytes)
                #expect(after.sameFilledPages == before.sameFilledPages)
                for (number, pool) in pools.enumerated() {
                    var found: [Key] = []
                    pool.forEachPage { found.append(Key(pool: number, object: $0, index: $1)) }
                    #expect(Set(found) == Set(model.keys.filter { $0.pool == number }))
                    #expect(zip(found, found.dropFirst()).allSatisfy { ($0.object, $0.index) < ($1.object, $1.index) })
                    #expect(pool.statistics.pages == UInt64(found.count))
                }
            }
            let key = Key(pool: Int(random.next() % 4), object: random.next() % 5, index: UInt32(random.next() % 600))
            let pool = pools[key.pool]
            switch random.next() % 16 {
            case 0..<8:
                let seed = random.next() % 100_000
                try pool.put(key.object, key.index, bytes: TmemPages.any(seed))
                model[key] = seed
            case 8..<13:
                #expect(try pool.page(key.object, key.index) == model[key].map(TmemPages.any))
                if key.pool == 0 { model[key] = nil }
            case 13, 14:
                #expect(pool.flush(key.object, key.index) == (model[key] != nil))
                model[key] = nil
            default:
                switch random.next() % 200 {
                case 0:
                    let gone = model.keys.filter { $0.pool == key.pool && $0.object == key.object }
                    #expect(pool.flush(object: key.object) == gone.count)
                    for key in gone { model[key] = nil }
                case 1..<20:
                    let range = key.index..<key.index + UInt32(random.next() % 100)
                    let gone = model.keys.filter {
                        $0.pool == key.pool && $0.object == key.object && range.contains($0.index)
                    }
                    #expect(pool.flush(key.object, pages: range) == gone.count)
                    for key in gone { model[key] = nil }
                case 20: tmem.compact()
                default: break
                }
            }
        }
        for (key, seed) in model {
            #expect(try pools[key.pool].page(key.object, key.index) == TmemPages.any(seed))
        }
        // Nothing leaks: without pages there is nothing left but metadata.
        for pool in pools { pool.flushAll() }
        tmem.compact()
        #expect(tmem.usage.usedBytes == tmem.usage.metadataBytes && tmem.usage.contents == 0 && tmem.unitBytes == 0)
        #expect(fixture.allocatedBytes <= tmem.usage.usedBytes + (1 << 20))
    }

    private static func replace(_ old: inout Tmem, _ fixture: TmemFixture, _ compression: Tmem.Compression) throws -> Tmem {
        // The old one has to go first: it has the file's lock.
        old = try TmemFixture().open()
        return try fixture.open(.init(compression: compression))
    }

    @Test func pagesOfOneWordCostNothingAndEqualPagesAreStoredOnce() throws {
        let fixture = try TmemFixture()
        defer { fixture.close() }
        let tmem = try fixture.open()
        let pools = try (0..<3).map {
            try tmem.createPool(
                .init(kind: $0 == 0 ? .ephemeral : .persistent, scope: .shared, name: "\($0)", client: "c\($0)"))
        }
        for index in 0..<1000 { try pools[index % 3].put(1, UInt32(index), bytes: TmemPages.filled(UInt64(index % 2) * .max)) }
        #expect(tmem.usage.contents == 0 && tmem.usage.sameFilledPages == 1000 && tmem.unitBytes == 0)
        #expect(try pools[1].page(1, 1) == TmemPages.filled(.max))
        // Each names the first content as often as its number says and one more, and one of its own.
        let common = TmemPages.page(1)
        for number in 0..<3 {
            for index in 0...number { try pools[number].put(2, UInt32(index), bytes: common) }
            try pools[number].put(3, 0, bytes: TmemPages.page(UInt64(number + 10)))
        }
        #expect(tmem.usage.contents == 4 && tmem.unitBytes == 4 * 4096)
        // 1/6, 2/6 and 3/6 of 4096, in whole bytes that add up.
        let charged: [UInt64] = pools.map { $0.statistics.storedBytes }
        #expect(charged == [4778, 5462, 6144])
        #expect(pools[2].statistics.putsShared == 3)
        pools[1].destroy()
        #expect(pools[0].statistics.storedBytes == 4096 + 1024 && pools[2].statistics.storedBytes == 4096 + 3072)
        for index in 0..<3 { pools[2].flush(2, UInt32(index)) }
        #expect(pools[0].statistics.storedBytes == 8192 && pools[2].statistics.storedBytes == 4096)
        audit(tmem)
    }

    /// More names than an entry counts: the side table takes over, and gives back.
    @Test func manyNamesOfOneContent() throws {
        let fixture = try TmemFixture()
        defer { fixture.close() }
        var tmem = try fixture.open()
        var pool = try tmem.createPool(.init(kind: .persistent, scope: .private, name: "p", client: "c"))
        let page = TmemPages.page(5)
        for index in 0..<UInt32(70_000) { try pool.put(0, index, bytes: page) }
        #expect(pool.statistics.storedBytes == 4096 && tmem.usage.contents == 1)
        pool = try TmemFixture().open().createPool(.init(kind: .persistent, scope: .private, name: "p", client: "c"))
        tmem = try Self.replace(&tmem, fixture, .lz4)
        pool = try #require(tmem.pool(named: "p"))
        #expect(pool.statistics.storedBytes == 4096 && pool.statistics.pages == 70_000)
        #expect(pool.flush(0, pages: 1..<70_000) == 69_999)
        #expect(try pool.statistics.storedBytes == 4096 && pool.page(0, 0) == page)
        pool.flush(0, 0)
        #expect(tmem.unitBytes == 0 && tmem.usage.contents == 0)
    }

    /// Fingerprints are no proof. The control: without comparing, a get finds another page.
    @Test(arguments: [true, false]) func collidingFingerprintsAreCompared(_ compares: Bool) throws {
        let fixture = try TmemFixture()
        defer { fixture.close() }
        var seams = TmemSeams()
        seams.hash = PageHash(low: 77, high: 1 << 60)
        seams.compares = compares
        let tmem = try fixture.open(seams: seams)
        let pool = try tmem.createPool(.init(kind: .persistent, scope: .private, name: "p", client: "c"))
        for index in 0..<UInt32(50) { try pool.put(0, index, bytes: TmemPages.page(UInt64(index), randomWords: 300)) }
        let isRight = try (0..<UInt32(50)).allSatisfy { try pool.page(0, $0) == TmemPages.page(UInt64($0), randomWords: 300) }
        #expect(isRight == compares)
    }

    /// Whoever reads a page while compaction moves it has its bytes. The control: where compaction doesn't wait for readers they
    /// find what has come there since.
    @Test(arguments: [true, false]) func readersOutlastCompaction(_ waits: Bool) throws {
        let fixture = try TmemFixture()
        defer { fixture.close() }
        let isCompacted = Monitor(false), reading = Monitor(0)
        var seams = TmemSeams()
        seams.waitsForReaders = waits
        seams.whileReading = {
            reading.update { $0 += 1 }
            // In time, or never: compaction may be waiting for us.
            let patience: UInt64 = waits ? 1_500_000_000 : 30_000_000_000
            _ = isCompacted.wait(until: monotonicNanoseconds() + patience) { $0 ? () : nil }
        }
        let tmem = try fixture.open(seams: seams)
        let pool = try tmem.createPool(.init(kind: .persistent, scope: .private, name: "p", client: "c"))
        // Four slabs of 16 pages that cannot be compressed; one page of each stays, and all four fit into one of them. Fewer
        // are flushed than would begin a compaction.
        for page in 0..<64 as Range<UInt64> { try pool.put(page, 0, bytes: TmemPages.page(page)) }
        let kept: [UInt64] = [3, 19, 35, 51]
        for page in 0..<64 as Range<UInt64> where !kept.contains(page) { pool.flush(page, 0) }
        let before = tmem.usage.usedBytes
        let wrong = Monitor(0)
        var readers: [JoinableThread] = []
        for page in kept {
            readers.append(try JoinableThread("reader") {
                let found = try? pool.page(page, 0)
                if found != TmemPages.page(page) { wrong.update { $0 += 1 } }
            })
        }
        // Two that have the same lock take turns.
        _ = eventually(milliseconds: 500) { reading.read { $0 } == kept.count }
        #expect(reading.read { $0 } >= 2)
        tmem.compact()
        isCompacted.update { $0 = true }
        for reader in readers { reader.join() }
        #expect(tmem.usage.usedBytes < before, "nothing was moved")
        #expect(waits == (wrong.read { $0 } == 0), "\(wrong.read { $0 }) wrong pages")
    }

    /// A slab that compaction has emptied may be another class's before compaction ends. The control: where it still looks like
    /// one to be emptied, two classes have it, and pages lie on top of each other.
    @Test(arguments: [true, false]) func emptiedSlabsBelongToOneClass(_ forgets: Bool) throws {
        let fixture = try TmemFixture()
        defer { fixture.close() }
        let isFirst = Atomic<Bool>(true)
        let target = Monitor<TmemPool?>(nil)
        var seams = TmemSeams()
        seams.forgetsVictims = forgets
        seams.whileReleasing = {
            guard isFirst.exchange(false, ordering: .relaxed), let pool = target.read({ $0 }) else { return }
            // Every slab that was emptied is another class's.
            let thread = try? JoinableThread("putter") { Self.putParts(pool, 0..<8) }
            thread?.join()
        }
        let tmem = try fixture.open(seams: seams)
        let pool = try tmem.createPool(.init(kind: .persistent, scope: .private, name: "p", client: "c"))
        target.update { $0 = pool }
        // As above: three of four slabs run empty.
        for page in 0..<64 as Range<UInt64> { try pool.put(page, 0, bytes: TmemPages.page(page)) }
        let kept: [UInt64] = [3, 19, 35, 51]
        for page in 0..<64 as Range<UInt64> where !kept.contains(page) { pool.flush(page, 0) }
        tmem.compact()
        // Where nobody was called, as it should be, the slabs are used again now.
        if isFirst.exchange(false, ordering: .relaxed) { Self.putParts(pool, 0..<8) }
        for page in 100..<104 as Range<UInt64> { try pool.put(page, 0, bytes: TmemPages.page(page)) }
        Self.putParts(pool, 8..<20)
        var wrong = 0
        for page in kept + Array(100..<104) where (try? pool.page(page, 0)) != TmemPages.page(page) { wrong += 1 }
        for page in 0..<20 as Range<UInt64> {
            for part in Self.parts.indices where (try? pool.page(page, UInt32(part + 1))) != Self.part(page, part) { wrong += 1 }
        }
        #expect((wrong == 0) == forgets, "\(wrong) wrong pages")
    }

    /// Words that cannot be compressed, of pages of three classes.
    private static let parts = [200, 256, 320]
    private static func part(_ page: UInt64, _ part: Int) -> [UInt8] { TmemPages.page(page << 8 | UInt64(part), randomWords: parts[part]) }
    private static func putParts(_ pool: TmemPool, _ pages: Range<UInt64>) {
        for page in pages {
            for part in parts.indices {
                #expect(throws: Never.self) { try pool.put(page, UInt32(part + 1), bytes: Self.part(page, part)) }
            }
        }
    }

    /// Who still has a pool that has ended reaches no page of another one, which may have its number by now.
    @Test(arguments: [TmemPool.Kind.ephemeral, .persistent], [TmemPool.Scope.private, .shared])
    func endedPoolsReachNobodyElse(_ kind: TmemPool.Kind, _ scope: TmemPool.Scope) throws {
        let fixture = try TmemFixture()
        defer { fixture.close() }
        let tmem = try fixture.open()
        let old = try tmem.createPool(.init(kind: kind, scope: scope, name: "p", client: "c"))
        try old.put(1, 1, bytes: TmemPages.page(1))
        old.destroy()
        let new = try tmem.createPool(.init(kind: kind, scope: scope, name: "q", client: "d"))
        try new.put(1, 1, bytes: TmemPages.page(2))
        #expect(try old.page(1, 1) == nil)
        #expect(!old.flush(1, 1) && old.flush(1, pages: 0..<100) == 0 && old.flush(object: 1) == 0 && old.flushAll() == 0)
        #expect(errorCode { try old.put(1, 1, bytes: TmemPages.page(3)) } == .closed)
        old.forEachPage { object, index in Issue.record("page \(index) of object \(object) is another pool's") }
        #expect(old.statistics.storedBytes == 0 && new.statistics.pages == 1)
        #expect(try new.page(1, 1) == TmemPages.page(2))
    }

    /// A put that fails leaves nothing. The control: with the old page left, a get finds it.
    @Test(arguments: [false, true]) func failedPutsLeaveNoOldPage(_ keepsOldPage: Bool) throws {
        let fixture = try TmemFixture()
        defer { fixture.close() }
        var seams = TmemSeams()
        seams.keepsOldPage = keepsOldPage
        let tmem = try fixture.open(seams: seams)
        let cache = try tmem.createPool(.init(kind: .ephemeral, scope: .shared, name: "e", client: "c"))
        try cache.put(0, 1, bytes: TmemPages.page(1))
        tmem.freeze()
        #expect(errorCode { try cache.put(0, 1, bytes: TmemPages.page(2)) } == .noSpace)
        #expect(try (cache.page(0, 1) != nil) == keepsOldPage)
        tmem.thaw()
        try cache.put(0, 1, bytes: TmemPages.page(2))
        let disk = try tmem.createPool(.init(kind: .persistent, scope: .private, name: "p", client: "d"))
        try disk.put(0, 1, bytes: TmemPages.page(3, randomWords: 20))
        try disk.setCap(1024)
        #expect(errorCode { try disk.put(0, 1, bytes: TmemPages.page(4)) } == .noSpace)
        #expect(try (disk.page(0, 1) != nil) == keepsOldPage)
        #expect(disk.statistics.putsFailed == 1 && cache.statistics.putsFailed == 1)
        audit(tmem)
    }

    @Test func badInput() throws {
        let fixture = try TmemFixture()
        defer { fixture.close() }
        let tmem = try fixture.open()
        func attributes(_ name: String, _ client: String = "c", _ pages: UInt64? = nil) -> TmemPool.Attributes {
            .init(kind: .persistent, scope: .private, name: name, client: client, capacityPages: pages)
        }
        let pool = try tmem.createPool(attributes(String(repeating: "n", count: 63), "c", 2))
        for name in ["", String(repeating: "n", count: 64), "a\0b"] {
            #expect(errorCode { _ = try tmem.createPool(attributes(name)) } == .invalid)
            #expect(errorCode { _ = try tmem.createPool(attributes("x", name)) } == .invalid)
        }
        #expect(errorCode { _ = try tmem.createPool(attributes(pool.name)) } == .busy)
        let short: [UInt8] = Array(TmemPages.page(1).dropLast())
        let refusal = errorCode { try pool.put(0, 0, bytes: short) }
        #expect(refusal == .invalid)
        #expect(errorCode { try pool.put(0, .max, bytes: TmemPages.page(1)) } == .invalid)
        #expect(errorCode { _ = try pool.page(0, .max) } == .invalid)
        try pool.put(.max, .max - 1, bytes: TmemPages.page(1))
        #expect(try pool.page(.max, .max - 1) == TmemPages.page(1))
        try pool.put(.max, 0, bytes: TmemPages.page(2))
        // The promise is kept, and not more than that; to replace needs no room in it.
        #expect(errorCode { try pool.put(0, 5, bytes: TmemPages.page(3)) } == .noSpace)
        try pool.put(.max, 0, bytes: TmemPages.page(4))
        #expect(try pool.page(.max, 0) == TmemPages.page(4) && pool.statistics.pages == 2)
        #expect(pool.flush(.max, pages: 0..<UInt32.max) == 2)
        #expect(errorCode { try pool.setWeight(0) } == .invalid)
        #expect(errorCode { _ = try Tmem(Descriptor.duplicate(of: fixture.file)) } == .busy)
        pool.destroy()
        #expect(errorCode { try pool.put(0, 0, bytes: TmemPages.page(1)) } == .closed)
        #expect(try pool.page(0, 0) == nil && tmem.pools.isEmpty)
        for number in 0..<1023 { _ = try tmem.createPool(attributes("\(number)")) }
        #expect(errorCode { _ = try tmem.createPool(attributes("one more")) } == .noSpace)
    }

    /// A file that is none of ours, or was damaged: one line, and no crash.
    @Test func damagedFiles() throws {
        let short = try Memfd(name: "short", byteCount: 8192).takeDescriptor()
        #expect(errorCode { _ = try Tmem(short.duplicate()) } == .invalid)
        func isRefused(_ damage: (borrowing Mapping) -> Void) throws -> Bool {
            let fixture = try TmemFixture()
            defer { fixture.close() }
            do {
                let tmem = try fixture.open()
                let pool = try tmem.createPool(.init(kind: .persistent, scope: .private, name: "p", client: "c"))
                for index in 0..<UInt32(100) { try pool.put(0, index, bytes: TmemPages.any(UInt64(index))) }
            }
            let mapping = try Mapping(Descriptor.duplicate(of: fixture.file), byteCount: 8 << 30)
            damage(mapping)
            return errorCode { _ = try fixture.open() } == .invalid
        }
        #expect(try !isRefused { _ in })
        #expect(try isRefused { $0.store8(3, 1) })
        #expect(try isRefused { $0.store32(8, 2) })
        #expect(try isRefused { $0.store32(12, 0) })
        #expect(try isRefused { $0.store32(16, .max) })
        #expect(try isRefused { $0.store32(4096 + 256, 9) })
        #expect(try isRefused { $0.store8(4096 + 256 + 4, 9) })
        let heads = 1 << 20, slots = heads + (1 << 30), contents = slots + (4 << 30)
        #expect(try isRefused { $0.store32(slots + 64 + 8, 12_345_678) })
        // Two leaves for the same pages: stripes take 16 numbers at a time.
        #expect(try isRefused { $0.copyIn(heads + 256, $0.copyOut(heads + 16, count: 16)) })
        // A content that is longer than its slot.
        let isLongRefused = try isRefused { mapping in
            for at in stride(from: contents + 16, to: contents + 3200, by: 16) {
                let word = mapping.load64(at)
                guard (1..<2000).contains(word >> 34 & 0x1fff) else { continue }
                mapping.store64(at, word & ~(0x1fff << 34) | 4096 << 34)
                break
            }
        }
        #expect(isLongRefused)
        // Rubbish in the contents, in many ways.
        var random = SplitMix(9)
        for _ in 0..<20 {
            let bytes = (0..<4096).map { _ in UInt8(truncatingIfNeeded: random.next()) }
            #expect(try isRefused { $0.copyIn(contents + 16, bytes) })
        }
    }

    // MARK: - Memory

    /// The overhead of a stored page and the waste of the allocator after long churn, at the density of a disk that is
    /// two thirds full.
    @Test func overheadAndWasteAfterChurn() throws {
        let fixture = try TmemFixture()
        defer { fixture.close() }
        let tmem = try fixture.open()
        let pool = try tmem.createPool(.init(kind: .persistent, scope: .private, name: "p", client: "c"))
        var random = SplitMix(3)
        // Tables grow by 64 to 110 KiB, or a byte and more for each of these pages: far from where one of them is about to, or
        // chance would decide.
        let span: UInt64 = 100_000
        for step in 0..<500_000 {
            let index = UInt32(random.next() % span)
            if random.next() % 3 == 0 {
                pool.flush(0, index)
            } else {
                // Sizes change over time: what was right for the slabs is not any more.
                let words = Int(random.next() % 200) + step / 2000
                try pool.put(0, index, bytes: TmemPages.page(random.next(), randomWords: words))
            }
        }
        let usage = tmem.usage
        let overhead = Double(usage.metadataBytes) / Double(usage.pages)
        let waste = Double(usage.wasteBytes) / Double(usage.usedBytes)
        print("tmem: \(usage.pages) pages, \(Int(overhead * 10)) / 10 bytes a page, \(Int(waste * 1000)) per mille waste")
        #expect(overhead <= 40 && waste < 0.1)
        #expect(fixture.allocatedBytes <= usage.usedBytes + (1 << 20))
        audit(tmem)
    }

    /// What goes first is what was used least recently: no page that is left is older than one that is gone.
    @Test(arguments: [TmemPool.Scope.private, .shared]) func evictsTheLeastRecentlyUsed(_ scope: TmemPool.Scope) throws {
        let fixture = try TmemFixture()
        defer { fixture.close() }
        let tmem = try fixture.open()
        let pool = try tmem.createPool(.init(kind: .ephemeral, scope: scope, name: "e", client: "c"))
        var order: [UInt32] = []
        for index in 0..<UInt32(2000) {
            try pool.put(0, index * 16, bytes: TmemPages.page(UInt64(index)))
            order.append(index)
        }
        var random = SplitMix(1)
        for _ in 0..<500 {
            let index = UInt32(random.next() % 2000)
            if scope == .shared {
                #expect(try pool.page(0, index * 16) != nil)
            } else {
                try pool.put(0, index * 16, bytes: TmemPages.page(UInt64(index)))
            }
            order.removeAll { $0 == index }
            order.append(index)
        }
        let used = tmem.usage.usedBytes
        let given = tmem.evict(bytes: 3 << 20)
        #expect(given >= 3 << 20 && used - tmem.usage.usedBytes == given && given < 4 << 20)
        var left = Set<UInt32>()
        pool.forEachPage { left.insert($1 / 16) }
        #expect(left == Set(order.suffix(left.count)) && pool.statistics.evictions == UInt64(2000 - left.count))
        for index in left { #expect(try pool.page(0, index * 16) == TmemPages.page(UInt64(index))) }
        tmem.evict(bytes: .max)
        #expect(tmem.usage.pages == 0 && tmem.usage.usedBytes == tmem.usage.metadataBytes)
    }

    @Test func weightsDivideMemory() throws {
        let fixture = try TmemFixture()
        defer { fixture.close() }
        let tmem = try fixture.open(.init(cap: 24 << 20))
        let pools = try ["a", "b", "c"].map {
            try tmem.createPool(.init(kind: .ephemeral, scope: .shared, name: $0, client: $0))
        }
        let disk = try tmem.createPool(.init(kind: .persistent, scope: .private, name: "d", client: "a"))
        try pools[1].setWeight(300)
        for index in 0..<UInt32(200) { try disk.put(0, index, bytes: TmemPages.page(1 << 40 | UInt64(index))) }
        for index in 0..<UInt32(8000) {
            // c wants little, and keeps it.
            if index < 300 { try pools[2].put(0, index, bytes: TmemPages.page(1 << 41 | UInt64(index))) }
            try pools[0].put(0, index, bytes: TmemPages.page(UInt64(index)))
            try pools[1].put(0, index, bytes: TmemPages.page(1 << 32 | UInt64(index)))
            if index % 100 == 0 { #expect(tmem.usage.usedBytes <= 24 << 20) }
        }
        let bytes = pools.map { Double($0.statistics.storedBytes) }
        #expect(bytes[1] / bytes[0] > 2.7 && bytes[1] / bytes[0] < 3.3, "\(bytes)")
        #expect(pools[2].statistics.pages == 300 && disk.statistics.pages == 200)
        audit(tmem)
    }

    @Test func capsOfClients() throws {
        let fixture = try TmemFixture()
        defer { fixture.close() }
        let tmem = try fixture.open()
        let cache = try tmem.createPool(.init(kind: .ephemeral, scope: .shared, name: "cache", client: "vm"))
        let disk = try tmem.createPool(.init(kind: .persistent, scope: .private, name: "disk", client: "vm"))
        let other = try tmem.createPool(.init(kind: .ephemeral, scope: .shared, name: "other", client: "other"))
        for index in 0..<UInt32(100) { try other.put(0, index, bytes: TmemPages.page(UInt64(index))) }
        try cache.setCap(1 << 20)
        #expect(disk.cap == 1 << 20 && other.cap == nil)
        func used() -> UInt64 { cache.statistics.storedBytes + disk.statistics.storedBytes }
        for index in 0..<UInt32(1000) {
            try cache.put(0, index * 16, bytes: TmemPages.page(1 << 32 | UInt64(index)))
            #expect(used() <= 1 << 20)
        }
        #expect(used() > (1 << 20) - 3 * 4096)
        var kept = 0
        for index in 0..<UInt32(1000) {
            do {
                try disk.put(0, index, bytes: TmemPages.page(1 << 33 | UInt64(index)))
                kept += 1
            } catch { #expect(error is QuireError) }
            #expect(used() <= 1 << 20)
        }
        // Persistent pages drive out ephemeral ones, and end at the cap.
        #expect(kept == 256 && cache.statistics.pages == 0 && other.statistics.pages == 100)
        try disk.put(0, 7, bytes: TmemPages.page(99))
        #expect(try disk.page(0, 7) == TmemPages.page(99) && disk.statistics.pages == 256)
        #expect(errorCode { try disk.setCap(1 << 19) } == .busy)
        #expect(disk.cap == 1 << 20 && disk.statistics.pages == 256)
        try disk.setWeight(250)
        audit(tmem)
    }

    @Test func settingsOutliveTheProcess() throws {
        let fixture = try TmemFixture()
        defer { fixture.close() }
        do {
            let tmem = try fixture.open()
            for name in ["one", "two"] {
                _ = try tmem.createPool(.init(kind: .persistent, scope: .shared, name: name, client: "é", capacityPages: 9))
            }
            let pool = try tmem.createPool(.init(kind: .ephemeral, scope: .private, name: "gone", client: "x"))
            try pool.put(1, 1, bytes: TmemPages.page(1))
            try tmem.pools[1].setWeight(77)
            try tmem.pools[2].setCap(1 << 30)
            pool.destroy()
        }
        let tmem = try fixture.open()
        #expect(tmem.pools.map(\.name) == ["one", "two"])
        for pool in tmem.pools {
            #expect(pool.weight == 77 && pool.cap == 1 << 30)
            #expect(pool.attributes.client == "é" && pool.attributes.capacityPages == 9 && pool.attributes.scope == .shared)
        }
        #expect(tmem.usage.promisedPages == 18 && tmem.usage.pages == 0)
    }

    /// What an operator sets for the whole store holds for who opens it next, over his configuration, until there is another one.
    @Test func capAndFreezeOutliveTheProcess() throws {
        let fixture = try TmemFixture()
        defer { fixture.close() }
        let tmem = try fixture.open(.init(cap: 16 << 20))
        let cache = try tmem.createPool(.init(kind: .ephemeral, scope: .shared, name: "e", client: "b"))
        for index in 0..<UInt32(2500) { try cache.put(0, index, bytes: TmemPages.page(UInt64(index))) }
        /// What a process finds that comes after a kill at this moment.
        func expect(_ cap: UInt64?, frozen: Bool, with configured: UInt64? = 16 << 20) throws {
            let copy = try fixture.copy()
            defer { copy.close() }
            let next = try copy.open(.init(cap: configured))
            #expect(next.cap == cap && next.isFrozen == frozen && next.usage.usedBytes <= (cap ?? UInt64.max))
            let refusal = errorCode { try #require(next.pool(named: "e")).put(1, 1, bytes: TmemPages.filled(7)) }
            #expect(refusal == (frozen ? QuireError.Code.noSpace : nil))
        }
        // The control: nobody has set anything.
        try expect(16 << 20, frozen: false)
        try expect(4 << 20, frozen: false, with: 4 << 20)
        try tmem.setCap(8 << 20)
        tmem.freeze()
        try expect(8 << 20, frozen: true)
        try expect(8 << 20, frozen: true, with: nil)
        // One that is refused is none.
        let disk = try tmem.createPool(.init(kind: .persistent, scope: .private, name: "d", client: "a"))
        for index in 0..<UInt32(500) { try disk.put(0, index, bytes: TmemPages.page(1 << 32 | UInt64(index))) }
        #expect(errorCode { try tmem.setCap(1 << 20) } == .busy)
        try expect(8 << 20, frozen: true)
        try tmem.setCap(nil)
        tmem.thaw()
        try expect(nil, frozen: false)
        // Another configuration, and not the same one read again, has the say.
        try tmem.change(to: .init(cap: 12 << 20))
        try expect(6 << 20, frozen: false, with: 6 << 20)
    }

    /// The cap of the store: it holds, and one that cannot hold is refused with everything as it was.
    @Test func capOfTheStore() throws {
        let fixture = try TmemFixture()
        defer { fixture.close() }
        let tmem = try fixture.open(.init(cap: 16 << 20))
        let disk = try tmem.createPool(.init(kind: .persistent, scope: .private, name: "d", client: "a"))
        let cache = try tmem.createPool(.init(kind: .ephemeral, scope: .shared, name: "e", client: "b"))
        for index in 0..<UInt32(1000) { try disk.put(0, index, bytes: TmemPages.page(UInt64(index))) }
        for index in 0..<UInt32(6000) {
            try cache.put(0, index, bytes: TmemPages.page(1 << 32 | UInt64(index), randomWords: Int(index % 500)))
            if index % 50 == 0 { #expect(tmem.usage.usedBytes <= 16 << 20 && fixture.allocatedBytes <= 17 << 20) }
        }
        let before = (tmem.usage, cache.statistics)
        #expect(errorCode { try tmem.setCap(4 << 20) } == .busy)
        #expect(tmem.cap == 16 << 20 && tmem.usage == before.0 && cache.statistics == before.1)
        try tmem.setCap(8 << 20)
        #expect(tmem.usage.usedBytes <= 8 << 20 && disk.statistics.pages == 1000)
        // Persistent pages take everything that is ephemeral, and then there is no room: an error, and nothing lost.
        var kept = Set(0..<UInt32(1000))
        for index in 1000..<UInt32(4000) {
            if errorCode({ try disk.put(0, index, bytes: TmemPages.page(UInt64(index))) }) == nil { kept.insert(index) }
            #expect(tmem.usage.usedBytes <= 8 << 20)
        }
        #expect(cache.statistics.pages == 0 && kept.count > 1700)
        for index in 0..<UInt32(4000) {
            #expect(try disk.page(0, index) == (kept.contains(index) ? TmemPages.page(UInt64(index)) : nil))
        }
        try tmem.setCap(nil)
        try disk.put(0, 9999, bytes: TmemPages.page(1 << 50))
        audit(tmem)
    }

    /// Empty slabs that are kept at hand are no reason to be full: who needs memory to find pages by has theirs.
    @Test func memoryAtHandIsRoom() throws {
        let fixture = try TmemFixture()
        defer { fixture.close() }
        let tmem = try fixture.open(.init(cap: 8 << 20))
        let disk = try tmem.createPool(.init(kind: .persistent, scope: .private, name: "d", client: "a"))
        var pages: UInt32 = 0
        while errorCode({ try disk.put(0, pages, bytes: TmemPages.page(UInt64(pages))) }) == nil { pages += 1 }
        #expect(pages > 1500)
        // So many slabs run empty as are kept.
        #expect(disk.flush(0, pages: 0..<256) == 256)
        #expect(tmem.usage.usedBytes > (8 << 20) - 65536)
        // Each in a leaf of its own, for which there is no memory yet; they store nothing.
        for index in 0..<UInt32(3000) { try disk.put(1, index * 16, bytes: TmemPages.filled(0)) }
        #expect(tmem.usage.usedBytes <= 8 << 20 && disk.statistics.pages == UInt64(pages) - 256 + 3000)
        for index in 256..<pages { #expect(try disk.page(0, index) == TmemPages.page(UInt64(index))) }
        audit(tmem)
    }

    /// The last bytes under a cap, enough for a slab or for the tables that a page in it needs, and not for both: a put there fails, and
    /// does not try for ever.
    @Test func theLastBytesAreNoRoom() throws {
        let fixture = try TmemFixture()
        defer { fixture.close() }
        var seams = TmemSeams()
        // All of them in one stripe, so that it is known when the tables have to grow: with the 4096th.
        seams.hash = PageHash(low: 77, high: 1 << 60)
        let tmem = try fixture.open(seams: seams)
        let disk = try tmem.createPool(.init(kind: .persistent, scope: .private, name: "d", client: "a"))
        // What does not compress fills its slabs of 16 to the last slot.
        for index in 0..<UInt32(15) { try disk.put(0, index, bytes: TmemPages.page(UInt64(index), randomWords: 100)) }
        for index in 15..<UInt32(4095) { try disk.put(0, index, bytes: TmemPages.page(UInt64(index))) }
        let code = Monitor<QuireError.Code??>(nil)
        let used = tmem.usage.usedBytes
        try tmem.setCap(used + 100_000)
        let thread = try JoinableThread("putter") {
            let found = errorCode { try disk.put(0, 4095, bytes: TmemPages.page(4095)) }
            code.update { $0 = .some(found) }
        }
        let answer = code.wait(until: monotonicNanoseconds() + 20_000_000_000) { $0 }
        #expect(answer == .some(.noSpace))
        if answer == nil { try tmem.setCap(nil) }
        thread.join()
        #expect(tmem.usage.usedBytes <= used + 100_000 || answer == nil)
        audit(tmem)
    }

    /// Who brings memory for a slab keeps nobody from slots that come free meanwhile, and takes one of these himself then.
    @Test func slabsComeWithoutALock() throws {
        let fixture = try TmemFixture()
        defer { fixture.close() }
        let isArmed = Atomic<Bool>(false), isFree = Atomic<Bool>(false)
        let target = Monitor<TmemPool?>(nil), other = Monitor<JoinableThread?>(nil), isDone = Monitor(false)
        var seams = TmemSeams()
        seams.whilePopulating = {
            guard isArmed.exchange(false, ordering: .relaxed), let pool = target.read({ $0 }) else { return }
            let thread = try? JoinableThread("other") {
                pool.flush(0, pages: 0..<2)
                #expect(throws: Never.self) { try pool.put(0, 2000, bytes: TmemPages.page(2000)) }
                isDone.update { $0 = true }
            }
            other.update { $0 = thread }
            // In vain where we have the lock of the class.
            let came: Void? = isDone.wait(until: monotonicNanoseconds() + 5_000_000_000) { $0 ? () : nil }
            isFree.store(came != nil, ordering: .relaxed)
        }
        let tmem = try fixture.open(seams: seams)
        let pool = try tmem.createPool(.init(kind: .persistent, scope: .private, name: "p", client: "c"))
        target.update { $0 = pool }
        // A whole slab of pages that cannot be compressed.
        for index in 0..<UInt32(16) { try pool.put(0, index, bytes: TmemPages.page(UInt64(index))) }
        isArmed.store(true, ordering: .relaxed)
        try pool.put(0, 16, bytes: TmemPages.page(16))
        other.read { $0 }?.join()
        let wasFree = isFree.load(ordering: .relaxed)
        #expect(wasFree)
        for index in [UInt32](2..<17) + [2000] { #expect(try pool.page(0, index) == TmemPages.page(UInt64(index))) }
        // The slab that came too late is kept at hand, and the next who needs one has it.
        #expect(tmem.usage.pages == 16 && tmem.usage.wasteBytes == 65536)
        try pool.put(0, 17, bytes: TmemPages.page(17))
        #expect(tmem.usage.pages == 17 && tmem.usage.wasteBytes == 65536 - 4096)
        audit(tmem)
    }

    /// As long as somebody brings a slab with more slots than he needs, the store is not full for others.
    @Test func aSlabThatComesIsRoom() throws {
        let fixture = try TmemFixture()
        defer { fixture.close() }
        let isArmed = Atomic<Bool>(false)
        let target = Monitor<TmemPool?>(nil), other = Monitor<JoinableThread?>(nil), isTaken = Monitor<Bool?>(nil)
        var seams = TmemSeams()
        seams.whilePopulating = {
            guard isArmed.exchange(false, ordering: .relaxed), let pool = target.read({ $0 }) else { return }
            let thread = try? JoinableThread("other") {
                let code = errorCode { try pool.put(1, 1, bytes: TmemPages.page(1 << 41)) }
                isTaken.update { $0 = code == nil }
            }
            other.update { $0 = thread }
            // It waits for us; or it has found the store to be full by then.
            _ = isTaken.wait(until: monotonicNanoseconds() + 50_000_000) { $0 }
        }
        let tmem = try fixture.open(.init(cap: 4 << 20), seams: seams)
        let pool = try tmem.createPool(.init(kind: .persistent, scope: .private, name: "p", client: "c"))
        target.update { $0 = pool }
        var pages: UInt32 = 0
        while errorCode({ try pool.put(0, pages, bytes: TmemPages.page(UInt64(pages))) }) == nil { pages += 1 }
        // Room for one slab, which has no memory.
        #expect(pool.flush(0, pages: 0..<16) == 16)
        tmem.compact()
        isArmed.store(true, ordering: .relaxed)
        try pool.put(1, 0, bytes: TmemPages.page(1 << 40))
        other.read { $0 }?.join()
        #expect(isTaken.read { $0 } == true)
        #expect(try pool.page(1, 0) == TmemPages.page(1 << 40) && pool.page(1, 1) == TmemPages.page(1 << 41))
        for index in 16..<pages { #expect(try pool.page(0, index) == TmemPages.page(UInt64(index))) }
        audit(tmem)
    }

    /// What the host has is not taken to the last: below the reserve ephemeral pages make room, and then a put fails that
    /// needs memory, says why, and nothing is lost. The control: without a reserve all of it is taken.
    @Test(arguments: [true, false]) func theHostKeepsItsReserve(_ isKept: Bool) throws {
        let fixture = try TmemFixture()
        defer { fixture.close() }
        var seams = TmemSeams()
        let all: UInt64 = 24 << 20
        seams.availableBytes = { all - min(all, fixture.allocatedBytes) }
        let tmem = try fixture.open(.init(reserve: isKept ? 8 << 20 : 0), seams: seams)
        let cache = try tmem.createPool(.init(kind: .ephemeral, scope: .shared, name: "e", client: "b"))
        let disk = try tmem.createPool(.init(kind: .persistent, scope: .private, name: "d", client: "a"))
        for index in 0..<UInt32(1000) { try cache.put(0, index, bytes: TmemPages.page(1 << 32 | UInt64(index))) }
        var kept: [UInt32] = [], refusal: QuireError?
        for index in 0..<UInt32(6000) {
            do {
                try disk.put(0, index, bytes: TmemPages.page(UInt64(index)))
                kept.append(index)
            } catch { refusal = error as? QuireError }
        }
        for index in kept { #expect(try disk.page(0, index) == TmemPages.page(UInt64(index))) }
        audit(tmem)
        guard isKept else {
            #expect(kept.count == 6000 && cache.statistics.pages == 1000 && fixture.allocatedBytes > all && tmem.hostShortage == nil)
            return
        }
        let said = "the host has less than 8M of memory left (tmem-reserve)"
        #expect(refusal?.code == .noSpace && refusal?.message == said && tmem.hostShortage == "a page found no room: " + said)
        #expect(kept.count > 3500 && cache.statistics.pages == 0 && fixture.allocatedBytes <= 17 << 20)
        // What the store has already needs nothing of the host.
        disk.flush(0, kept[0])
        try disk.put(1, 0, bytes: TmemPages.page(1 << 40))
        // And with a lower one there is room at once.
        tmem.setReserve(4 << 20)
        #expect(tmem.hostShortage == nil && tmem.reserve == 4 << 20)
        for index in 1..<UInt32(256) { try disk.put(1, index, bytes: TmemPages.page(1 << 40 | UInt64(index))) }
        audit(tmem)
    }

    /// With a factor of 1 every promise is kept, whatever the pages are and whoever else wants memory.
    @Test func promisesAreKept() throws {
        let fixture = try TmemFixture()
        defer { fixture.close() }
        let tmem = try fixture.open(.init(cap: 32 << 20))
        func make(_ name: String, _ pages: UInt64?, _ kind: TmemPool.Kind = .persistent) throws -> TmemPool {
            try tmem.createPool(.init(kind: kind, scope: .private, name: name, client: name, capacityPages: pages))
        }
        #expect(errorCode { _ = try make("too much", 8192) } == .noSpace)
        let greedy = try make("greedy", nil)
        let disk = try make("disk", 5000)
        #expect(errorCode { _ = try make("also too much", 2000) } == .noSpace)
        let cache = try make("cache", nil, .ephemeral)
        #expect(errorCode { try tmem.setCap(24 << 20) } == .busy)
        var random = SplitMix(5)
        // Somebody without a promise takes what he can get.
        var refused = 0
        for index in 0..<UInt32(5000) {
            try cache.put(0, index, bytes: TmemPages.page(random.next(), randomWords: Int(random.next() % 513)))
            if errorCode({ try greedy.put(0, index, bytes: TmemPages.page(random.next())) }) != nil { refused += 1 }
        }
        #expect(refused > 3000 && refused < 5000)
        var model: [UInt32: [UInt8]] = [:]
        for round in 0..<4 {
            for step in 0..<5000 {
                // Full of what cannot be compressed at first; then of anything, full all the time.
                let index = round == 0 ? UInt32(step) : UInt32(random.next() % 5000)
                let page = round % 2 == 0 ? TmemPages.page(random.next()) : TmemPages.any(random.next())
                try disk.put(0, index, bytes: page)
                model[index] = page
                if step % 10 == 0 { try? cache.put(1, index, bytes: TmemPages.page(random.next(), randomWords: step % 513)) }
            }
        }
        for (index, page) in model { #expect(try disk.page(0, index) == page) }
        #expect(disk.statistics.pages == 5000 && disk.statistics.putsFailed == 0)
        #expect(tmem.usage.usedBytes <= 32 << 20)
        audit(tmem)
    }

    /// Compression, cap and over-commit change while there are pages, and every page is read as it was written.
    @Test func configurationChangesWhileItWorks() throws {
        let fixture = try TmemFixture()
        defer { fixture.close() }
        let tmem = try fixture.open()
        let disk = try tmem.createPool(.init(kind: .persistent, scope: .private, name: "d", client: "a", capacityPages: 5000))
        // Bytes of 16 kinds: zstd needs half of them, and lz4 finds nothing.
        func page(_ seed: UInt32) -> [UInt8] {
            var random = SplitMix(UInt64(seed))
            return (0..<4096).map { _ in UInt8(truncatingIfNeeded: random.next() % 16) }
        }
        func put(_ indices: Range<UInt32>) throws -> UInt64 {
            let before = disk.statistics.storedBytes
            for index in indices { try disk.put(0, index, bytes: page(index)) }
            return disk.statistics.storedBytes - before
        }
        let lz4 = try put(0..<100)
        try tmem.setCompression(.zstd(level: 3))
        #expect(try put(100..<200) < lz4 * 3 / 4)
        // Equal ones are found, however they were compressed.
        let stored = disk.statistics.storedBytes
        for index in UInt32(0)..<100 { try disk.put(1, index, bytes: page(index)) }
        #expect(disk.statistics.storedBytes == stored)
        try tmem.setCompression(.lz4)
        #expect(try put(200..<300) > lz4 * 3 / 4)
        #expect(errorCode { try tmem.setCompression(.zstd(level: 20)) } == .invalid)

        // 20 MiB are promised.
        #expect(errorCode { try tmem.change(to: .init(cap: 16 << 20)) } == .busy && tmem.cap == nil)
        // What is refused changes nothing, whichever part of it is wrong.
        #expect(errorCode { try tmem.change(to: .init(compression: .zstd(level: 3), cap: 16 << 20)) } == .busy)
        #expect(try put(300..<400) > lz4 * 3 / 4)
        #expect(errorCode { try tmem.change(to: .init(compression: .zstd(level: 20), cap: 64 << 20)) } == .invalid && tmem.cap == nil)
        try tmem.change(to: .init(compression: .zstd(level: 1), cap: 16 << 20, overcommit: 2))
        #expect(tmem.cap == 16 << 20)
        // The factor of a change that was refused is no factor: with 3 this would do.
        #expect(errorCode { try tmem.change(to: .init(cap: 6 << 20, overcommit: 3)) } == .busy && tmem.cap == 16 << 20)
        #expect(errorCode { try tmem.setCap(8 << 20) } == .busy)
        try tmem.change(to: .init())
        #expect(tmem.cap == nil)
        for index in UInt32(0)..<300 { #expect(try disk.page(0, index) == page(index)) }
        for index in UInt32(0)..<100 { #expect(try disk.page(1, index) == page(index)) }
        audit(tmem)
    }

    @Test func frozenPoolsTakeNothing() throws {
        let fixture = try TmemFixture()
        defer { fixture.close() }
        let tmem = try fixture.open()
        let cache = try tmem.createPool(.init(kind: .ephemeral, scope: .shared, name: "e", client: "b"))
        let disk = try tmem.createPool(.init(kind: .persistent, scope: .private, name: "d", client: "a"))
        for index in 0..<UInt32(3000) { try cache.put(0, index, bytes: TmemPages.page(UInt64(index))) }
        tmem.freeze()
        #expect(tmem.isFrozen && errorCode { try cache.put(1, 1, bytes: TmemPages.page(1)) } == .noSpace)
        try disk.put(0, 0, bytes: TmemPages.page(1))
        #expect(try cache.page(0, 5) == TmemPages.page(5))
        #expect(tmem.evict(bytes: 4 << 20) >= 4 << 20)
        #expect(cache.statistics.pages < 2000 && cache.statistics.pages > 1700)
        tmem.thaw()
        try cache.put(1, 1, bytes: TmemPages.page(1))
    }

    // MARK: - Threads

    /// Threads that put, get and flush in all kinds of pools, each its own keys but the same contents now and then, under a
    /// cap that evicts all the time, with freezing, compaction, clients' caps and discards of everything between: whatever is found
    /// is what was put last, and persistent pages are found.
    @Test func threadsAgainstTheirOwnModels() throws {
        let fixture = try TmemFixture()
        defer { fixture.close() }
        let tmem = try fixture.open(.init(cap: 40 << 20))
        var pools: [TmemPool] = []
        for (number, (kind, scope)) in Self.kinds.enumerated() {
            pools.append(try tmem.createPool(.init(kind: kind, scope: scope, name: "\(number)", client: "\(number % 2)")))
        }
        let all = pools
        let wrong = Atomic<Int>(0), lost = Atomic<Int>(0), ended = Atomic<Int>(0)
        let deadline = monotonicNanoseconds() + 4_000_000_000
        try withThreads(4, until: { ended.load(ordering: .relaxed) == 3 }) { thread in
            var random = SplitMix(UInt64(thread))
            if thread == 3 {
                while ended.load(ordering: .relaxed) < 3 {
                    switch random.next() % 6 {
                    case 0: tmem.evict(bytes: random.next() % (8 << 20))
                    case 1: tmem.compact()
                    case 2:
                        tmem.freeze()
                        ProcessCalls.sleep(milliseconds: 1)
                        tmem.thaw()
                    case 3: all[Int(random.next() % 2)].flush(random.next() % 3, pages: 0..<UInt32.max)
                    case 4:
                        // Of a client; refused where he has more persistent pages than that.
                        try? all[Int(random.next() % 4)].setCap(random.next() % 2 == 0 ? nil : random.next() % (16 << 20))
                    default: _ = tmem.usage
                    }
                    ProcessCalls.sleep(milliseconds: 1)
                }
                return
            }
            var model: [Key: UInt64] = [:]
            while monotonicNanoseconds() < deadline {
                let key = Key(
                    pool: Int(random.next() % 4), object: UInt64(thread), index: UInt32(random.next() % 2000) * 3 + UInt32(thread))
                let pool = all[key.pool]
                switch random.next() % 8 {
                case 0..<4:
                    let seed = random.next() % 20_000
                    do {
                        try pool.put(key.object, key.index, bytes: TmemPages.any(seed))
                        model[key] = seed
                    } catch { model[key] = nil }
                case 4..<7:
                    let found = try? pool.page(key.object, key.index)
                    if let found, found != model[key].map(TmemPages.any) { wrong.add(1, ordering: .relaxed) }
                    if found == nil, model[key] != nil, key.pool >= 2 { lost.add(1, ordering: .relaxed) }
                    if key.pool == 0 { model[key] = nil }
                default:
                    pool.flush(key.object, key.index)
                    model[key] = nil
                }
            }
            for (key, seed) in model where key.pool >= 2 {
                if (try? all[key.pool].page(key.object, key.index)) != TmemPages.any(seed) { lost.add(1, ordering: .relaxed) }
            }
            ended.add(1, ordering: .relaxed)
        }
        #expect(wrong.load(ordering: .relaxed) == 0 && lost.load(ordering: .relaxed) == 0)
        #expect(all[0].statistics.evictions > 0 && tmem.usage.usedBytes <= 41 << 20)
        audit(tmem)
        tmem.compact()
        audit(tmem)
    }

    /// A pool that ends, and one of which everything is discarded, while threads put into them: nothing stays.
    @Test func destroyAndDiscardWhilePutsRun() throws {
        let fixture = try TmemFixture()
        defer { fixture.close() }
        let tmem = try fixture.open()
        for round in 0..<20 {
            let pool = try tmem.createPool(
                .init(kind: round % 2 == 0 ? .persistent : .ephemeral, scope: .shared, name: "p", client: "c"))
            let puts = Atomic<Int>(0), ended = Atomic<Int>(0)
            try withThreads(3, until: { ended.load(ordering: .relaxed) == 2 }) { thread in
                var random = SplitMix(UInt64(thread + round * 3))
                if thread == 2 {
                    while puts.load(ordering: .relaxed) < 2000 {
                        pool.flush(0, pages: 0..<UInt32.max)
                        ProcessCalls.sleep(microseconds: 300)
                    }
                    pool.destroy()
                    return
                }
                while errorCode({ try pool.put(0, UInt32(random.next() % 5000), bytes: TmemPages.any(random.next())) }) == nil {
                    puts.add(1, ordering: .relaxed)
                }
                ended.add(1, ordering: .relaxed)
            }
            #expect(tmem.usage.pages == 0 && tmem.usage.contents == 0 && tmem.unitBytes == 0)
        }
    }

    private func withThreads(
        _ count: Int, until isDone: () -> Bool, _ body: @escaping @Sendable (Int) -> Void
    ) throws {
        var threads: [JoinableThread] = []
        for thread in 0..<count { threads.append(try JoinableThread("tmem-test-\(thread)") { body(thread) }) }
        for thread in threads { thread.join() }
        #expect(isDone())
    }
}
