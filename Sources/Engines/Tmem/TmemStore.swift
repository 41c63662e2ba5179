import CCompress
import PageContent
import Platform
import Synchronization

/// What pools and the store's owner share: the store itself.
///
/// It must guarantee: a get finds what the last put of its key put, or nothing where that is allowed; a put that fails
/// leaves nothing; and for persistent pages the same after a kill at any instant. Why it does:
///
/// - A put first gets its content stored and named for itself (`Contents.acquire`), and then replaces the content that its
///   slot names by one store of four bytes under the lock of the leaf's stripe. What the slot named is released after. So
///   at every instant the slot names a whole content that cannot be freed: the old or the new.
/// - Counts of names are not in the file. A kill between these steps leaves contents that nobody names, or more slots in
///   use than named: a start counts anew.
/// - What an operator sets (caps, weights, frozen) is one store each. A kill before it leaves the old value, and what the new one
///   asks for (pages above a cap) is done again by the start.
/// - A pool that is being destroyed is marked first. Whoever puts, gets or takes away looks at that under the lock of its stripe,
///   and destroying takes every stripe's lock after marking: what a late put stored is found and taken away, and from then
///   on nobody who still has the pool reaches pages by its number, which may be another pool's by then.
///
/// Locks, in this order: changes of pools, making room, compaction, a table's growth, a leaf's stripe, a content's stripe, numbers, a class
/// of slabs, their supply. Put and get take the two stripes' only, of 64 each, and the class's for a few instructions.
final class TmemStore: Sendable {
    let file: TmemFile
    let budget: TmemBudget
    let slabs: Slabs
    let contents: Contents
    let leaves: Leaves
    let seams: TmemSeams
    /// Changes under `changes`, with the cap.
    private let overcommitFactor: Mutex<Double>
    private var overcommit: Double { overcommitFactor.withLock { $0 } }
    var isFrozen: Bool {
        get { file.isFrozen }
        set { file.isFrozen = newValue }
    }
    /// When a put last failed for lack of the host's memory, and what there was none of.
    private let shortage = Mutex<(at: UInt64, what: String)?>(nil)
    /// What persistent pools without a promise may use together.
    let unpromisedLimit = Atomic<Int>(.max)
    /// Held, for as long as it takes, by whoever makes, ends or changes a pool or a cap.
    let changes = Mutex<Void>(())
    /// The pools there are. Locked for a look or a store only, under any other lock.
    private let list = Mutex<[PoolRecord]>([])
    var pools: [PoolRecord] { list.withLock { $0 } }
    func setPools(_ pools: [PoolRecord]) { list.withLock { $0 = pools } }
    let room = Mutex<Void>(())
    let compaction = Mutex<Compaction?>(nil)

    init(_ file: TmemFile, _ configuration: Tmem.Configuration, _ quota: (any TmemQuota)?, _ seams: TmemSeams) throws(QuireError) {
        guard configuration.overcommit >= 1, configuration.overcommit.isFinite else {
            throw QuireError(.invalid, "an over-commit factor is at least 1")
        }
        self.file = file
        self.seams = seams
        overcommitFactor = Mutex(configuration.overcommit)
        budget = TmemBudget(available: seams.availableBytes, quota: quota)
        slabs = try Slabs(file, budget, seams)
        contents = try Contents(file, slabs, configuration.compression, budget, seams)
        leaves = try Leaves(file, budget)
        try recover()
        budget.setCap(Int(clamping: file.cap ?? configuration.cap ?? .max))
        budget.setReserve(configuration.reserve)
        updateUnpromisedLimit()
        shrinkToCap()
    }

    static func noSpace(_ why: String) -> QuireError { QuireError(.noSpace, why) }

    /// Of a put for which there is neither a slot nor memory.
    private func full() -> QuireError {
        guard let what = hostShortage else { return Self.noSpace("the store of transcendent memory is full") }
        shortage.withLock { $0 = (monotonicNanoseconds(), what) }
        return Self.noSpace(what)
    }

    /// What the host has none of for another slab, where it isn't the store's own cap that is reached.
    private var hostShortage: String? {
        if budget.isQuotaShort(of: TmemFile.slabBytes) {
            return "the host's limit for transcendent memory is reached (tmem-cap of quired)"
        }
        guard budget.used <= budget.cap - TmemFile.slabBytes, budget.isHostShort(of: TmemFile.slabBytes) else { return nil }
        return "the host has less than \(Size.exact(budget.reserve)) of memory left (tmem-reserve)"
    }

    /// Why puts of the last minute failed, if it was for lack of the host's memory.
    var recentHostShortage: String? {
        shortage.withLock { shortage in
            guard let shortage, monotonicNanoseconds() < shortage.at + Self.shortageSaidFor else { return nil }
            return "a page found no room: \(shortage.what)"
        }
    }
    private static let shortageSaidFor: UInt64 = 60_000_000_000

    func setReserve(_ bytes: UInt64) {
        budget.setReserve(bytes)
        shortage.withLock { $0 = nil }
    }

    @inline(__always) private func place(_ pool: PoolRecord, _ object: UInt64, _ index: UInt32) -> (Leaves.Key, UInt32, Int) {
        let key = Leaves.Key(pool: pool.number, object: object, base: index / UInt32(Leaves.pages))
        let hash = leaves.hash(key)
        return (key, hash, Leaves.stripe(of: hash))
    }

    // MARK: - Put

    func put(_ pool: PoolRecord, _ object: UInt64, _ index: UInt32, _ page: RawSpan) throws(QuireError) {
        let (key, hash, stripe) = place(pool, object, index)
        let slot = Int(index) % Leaves.pages
        pool.count(.puts, stripe)
        do throws(QuireError) {
            guard pool.isLive.load(ordering: .relaxed) else { throw QuireError(.closed, "the pool was destroyed") }
            if pool.isEphemeral, isFrozen { throw Self.noSpace("ephemeral pools are frozen") }
            // The pointer is used within the span's life.
            let acquired = try unsafe page.withUnsafeBytes { (bytes) throws(QuireError) -> Contents.Acquired in
                try unsafe acquire(bytes.baseAddress!, page, pool)
            }
            seams.step?()
            let old: UInt32
            do throws(QuireError) {
                old = try commit(acquired.number, pool, key, hash, stripe, slot)
            } catch {
                contents.release(acquired.number, pool.number)
                throw error
            }
            seams.step?()
            if acquired.isShared { pool.count(.putsShared, stripe) }
            if old != 0 { contents.release(old, pool.number) }
            seams.step?()
            if seams.namesBeforeWriting, !acquired.isShared, acquired.number & Contents.fillBit == 0 {
                ProcessCalls.sleep(microseconds: 200)
                unsafe page.withUnsafeBytes { unsafe contents.writeLate(acquired.number, $0.baseAddress!) }
            }
        } catch {
            // Nothing was done, and whoever asked will ask again: with no lock held, and not at once.
            if error.code == .retry {
                ProcessCalls.sleep(milliseconds: 10)
                throw error
            }
            pool.count(.putsFailed, stripe)
            if !seams.keepsOldPage { take(pool, key, hash, 1 << slot) }
            throw error
        }
        tidy()
    }

    private func acquire(_ page: UnsafeRawPointer, _ span: RawSpan, _ pool: PoolRecord) throws(QuireError) -> Contents.Acquired {
        var word: UInt64 = 0
        if unsafe cc_same_filled(page, &word) {
            while true {
                if let number = contents.acquire(fill: word, pool.number) {
                    return Contents.Acquired(number: number, isShared: false)
                }
                guard try makeRoom(Leaves.extentBytes) else { throw full() }
            }
        }
        let hash = file.hasher.hash(span)
        var anywhere = false
        while true {
            if let acquired = unsafe contents.acquire(page, hash, pool.number, anywhere: anywhere) { return acquired }
            if anywhere { throw full() }
            anywhere = try !makeRoom()
        }
    }

    /// Lets the slot name `number`; what it named before, 0: nothing.
    private func commit(
        _ number: UInt32, _ pool: PoolRecord, _ key: Leaves.Key, _ hash: UInt32, _ stripe: Int, _ slot: Int
    ) throws(QuireError) -> UInt32 {
        try keepUnderCap(pool)
        while true {
            var grows = false, isFull = false
            let old = try leaves.stripes[stripe].state.withLock { (state: inout Leaves.State) throws(QuireError) -> UInt32 in
                guard pool.isLive.load(ordering: .relaxed) else { throw QuireError(.closed, "the pool was destroyed") }
                var leaf = leaves.find(key, hash)
                let old = leaf == 0 ? 0 : leaves.content(leaf, slot)
                try checkLimits(pool, old)
                if old == 0 {
                    guard pool.pages.wrappingAdd(1, ordering: .relaxed).newValue <= pool.capacity else {
                        pool.pages.wrappingSubtract(1, ordering: .relaxed)
                        throw Self.noSpace("the pool \(pool.attributes.name) has all the \(pool.capacity) pages it was promised")
                    }
                    if leaf == 0 {
                        leaf = leaves.make(key, hash, listed: pool.isEphemeral, &state, grows: &grows)
                        if leaf == 0 {
                            pool.pages.wrappingSubtract(1, ordering: .relaxed)
                            isFull = true
                            return 0
                        }
                    }
                } else if old & Contents.fillBit != 0 {
                    pool.count(.sameFilled, stripe, -1)
                }
                if number & Contents.fillBit != 0 { pool.count(.sameFilled, stripe) }
                leaves.setContent(leaf, slot, number)
                if pool.isEphemeral { leaves.use(leaf, key.pool, hash) }
                return old
            }
            if grows { leaves.grow() }
            if !isFull { return old }
            guard try makeRoom(Leaves.extentBytes) else { throw full() }
        }
    }

    /// What a client, and pools without a promise together, may use: the new content counts already, the old one soon not.
    private func checkLimits(_ pool: PoolRecord, _ old: UInt32) throws(QuireError) {
        let cap = pool.client.cap.load(ordering: .relaxed)
        if cap != .max {
            let charged = charged(pool.client)
            if charged > cap, charged - (old == 0 ? 0 : contents.share(old, pool.number)) > cap {
                throw Self.noSpace("\(pool.client.name) has used its cap of \(cap) bytes")
            }
        }
        guard pool.isUnpromised else { return }
        let limit = unpromisedLimit.load(ordering: .relaxed)
        if limit != .max {
            let used = unpromisedBytes()
            if used > limit, used - (old == 0 ? 0 : contents.share(old, pool.number)) > limit {
                throw Self.noSpace("what is left of the store of transcendent memory is promised to other pools")
            }
        }
    }

    // MARK: - Get

    /// False, and the page as it was: there is none.
    func get(_ pool: PoolRecord, _ object: UInt64, _ index: UInt32, _ page: UnsafeMutableRawPointer) throws(QuireError) -> Bool {
        let (key, hash, stripe) = place(pool, object, index)
        let slot = Int(index) % Leaves.pages
        pool.count(.gets, stripe)
        var isWhole = true
        let number = leaves.stripes[stripe].state.withLock { state -> UInt32 in
            let leaf = leaves.find(key, hash)
            guard leaf != 0, pool.isLive.load(ordering: .relaxed) else { return 0 }
            let number = leaves.content(leaf, slot)
            guard number != 0 else { return 0 }
            isWhole = unsafe contents.read(number, into: page)
            if pool.removesOnGet {
                clear(leaf, slot, number, pool, stripe)
                if leaves.isEmpty(leaf) { leaves.remove(leaf, key, hash, listed: true, &state) }
            } else if pool.isEphemeral {
                leaves.use(leaf, key.pool, hash)
            }
            return number
        }
        guard number != 0 else { return false }
        pool.count(.hits, stripe)
        if pool.removesOnGet {
            contents.release(number, pool.number)
            tidy()
        }
        guard isWhole else {
            throw QuireError(.invalid, "page \(index) of object \(object) of the pool \(pool.attributes.name) is damaged")
        }
        return true
    }

    // MARK: - Flush

    /// Under the lock of the stripe.
    private func clear(_ leaf: UInt32, _ slot: Int, _ number: UInt32, _ pool: PoolRecord, _ stripe: Int) {
        leaves.setContent(leaf, slot, 0)
        pool.pages.wrappingSubtract(1, ordering: .relaxed)
        if number & Contents.fillBit != 0 { pool.count(.sameFilled, stripe, -1) }
    }

    /// Takes away those pages of a leaf whose bits are set; how many there were. `ending`: it is the pool's end. `willFree` gets
    /// bytes that come free.
    @discardableResult
    func take(
        _ pool: PoolRecord, _ key: Leaves.Key, _ hash: UInt32, _ mask: Int, ending: Bool = false, willFree: ((Int) -> Void)? = nil
    ) -> Int {
        let stripe = Leaves.stripe(of: hash)
        var numbers = InlineArray<16, UInt32>(repeating: 0)
        var count = 0
        leaves.stripes[stripe].state.withLock { state in
            let leaf = leaves.find(key, hash)
            guard leaf != 0, ending || pool.isLive.load(ordering: .relaxed) else { return }
            for slot in 0..<Leaves.pages where mask & 1 << slot != 0 {
                let number = leaves.content(leaf, slot)
                guard number != 0 else { continue }
                clear(leaf, slot, number, pool, stripe)
                numbers[count] = number
                count += 1
                seams.step?()
            }
            if leaves.isEmpty(leaf) { leaves.remove(leaf, key, hash, listed: pool.isEphemeral, &state) }
        }
        for index in 0..<count {
            willFree?(contents.share(numbers[index], pool.number))
            contents.release(numbers[index], pool.number)
            seams.step?()
        }
        return count
    }

    func flush(_ pool: PoolRecord, _ object: UInt64, _ index: UInt32) -> Bool {
        let (key, hash, stripe) = place(pool, object, index)
        let count = take(pool, key, hash, 1 << (Int(index) % Leaves.pages))
        pool.count(.flushes, stripe, count)
        tidy()
        return count > 0
    }

    private static func mask(_ base: UInt32, _ pages: Range<UInt32>) -> Int {
        let first = UInt64(base) * UInt64(Leaves.pages)
        let low = max(first, UInt64(pages.lowerBound)) - first, high = min(first + 16, UInt64(pages.upperBound)) - first
        return (1 << Int(high)) - (1 << Int(low))
    }

    func flush(_ pool: PoolRecord, _ object: UInt64, pages: Range<UInt32>) -> Int {
        guard !pages.isEmpty else { return 0 }
        let bases = pages.lowerBound / 16...(pages.upperBound - 1) / 16
        var total = 0
        if bases.count <= 64 || bases.count / 8 < Int(file.leafCount) {
            for base in bases {
                let key = Leaves.Key(pool: pool.number, object: object, base: base)
                total += flush(pool, key, Self.mask(base, pages))
            }
        } else {
            for leaf in leaves.leaves(of: pool.number, object: object) {
                let key = leaves.key(leaf)
                guard key.pool == pool.number, key.object == object, bases.contains(key.base) else { continue }
                total += flush(pool, key, Self.mask(key.base, pages))
            }
        }
        return total
    }

    private func flush(_ pool: PoolRecord, _ key: Leaves.Key, _ mask: Int, ending: Bool = false) -> Int {
        let hash = leaves.hash(key)
        let count = take(pool, key, hash, mask, ending: ending)
        if count > 0 {
            pool.count(.flushes, Leaves.stripe(of: hash), count)
            tidy()
        }
        return count
    }

    /// All of an object, or of the pool.
    func flush(_ pool: PoolRecord, object: UInt64?, ending: Bool = false) -> Int {
        var total = 0
        for leaf in leaves.leaves(of: pool.number, object: object) {
            let key = leaves.key(leaf)
            guard key.pool == pool.number, object == nil || key.object == object else { continue }
            total += flush(pool, key, 0xffff, ending: ending)
        }
        return total
    }

    // MARK: - Pools

    func charged(_ client: ClientRecord) -> Int { client.pools.withLock { $0.reduce(0) { $0 + contents.charged($1.number) } } }

    /// Host memory that a promised page may take, at most: raw, with its leaf and its content.
    static let promisedPageBytes = 4096 + 64
    /// What a store takes besides: a slab that isn't full for each class, and the first of all tables.
    static let fixedBytes = 5 << 20

    private func unpromisedBytes() -> Int {
        pools.reduce(0) { $0 + ($1.isUnpromised ? contents.charged($1.number) + $1.pages.load(ordering: .relaxed) * 64 : 0) }
    }

    /// Pages that pools were promised.
    func promised() -> Int {
        pools.reduce(0) {
            let sum = $0.addingReportingOverflow($1.attributes.kind == .persistent && $1.capacity != .max ? $1.capacity : 0)
            return sum.overflow ? .max : sum.partialValue
        }
    }

    /// Bytes of the store to be kept for promises, as the over-commit factor has it.
    private func reserved(_ pages: Int) -> Double { Double(pages) * Double(Self.promisedPageBytes) / overcommit }

    private func updateUnpromisedLimit() {
        let pages = promised()
        unpromisedLimit.store(
            budget.cap == .max || pages == 0
                ? .max : Int(max(0, Double(budget.cap) - Double(Self.fixedBytes) - reserved(pages))), ordering: .relaxed)
    }

    /// Why promises of so many pages cannot be kept under a cap; nil: they can.
    private func objection(_ pages: Int, _ cap: Int) -> String? {
        guard cap != .max, pages > 0 else { return nil }
        let covered = Double(cap) - Double(Self.fixedBytes) - Double(unpromisedBytes())
        guard reserved(pages) > max(0, covered) else { return nil }
        let possible = Int(max(0, covered) * overcommit / Double(Self.promisedPageBytes))
        return "a cap of \(cap) bytes covers promises of \(possible) pages, not \(pages): raise the cap or the over-commit factor"
    }

    func createPool(_ attributes: TmemPool.Attributes) throws(QuireError) -> PoolRecord {
        for (what, text) in [("pool", attributes.name), ("client", attributes.client)] {
            guard (1...63).contains(text.utf8.count), !text.utf8.contains(0) else {
                throw QuireError(.invalid, "the name of a \(what) has 1 to 63 bytes, and '\(text.prefix(80))' has \(text.utf8.count)")
            }
        }
        guard attributes.capacityPages == nil || attributes.kind == .persistent else {
            throw QuireError(.invalid, "pool \(attributes.name): only persistent pools have a capacity")
        }
        return try changes.withLock { (_: inout Void) throws(QuireError) -> PoolRecord in
            let pools = pools
            guard !pools.contains(where: { $0.attributes.name == attributes.name }) else {
                throw QuireError(.busy, "there is a pool \(attributes.name) already")
            }
            let used = Set(pools.map(\.number))
            guard let number = (1..<UInt16(TmemFile.poolLimit)).first(where: { !used.contains($0) }) else {
                throw Self.noSpace("there are \(TmemFile.poolLimit - 1) pools already, and that is as many as there can be")
            }
            if let capacity = attributes.capacityPages {
                let pages = promised().addingReportingOverflow(Int(clamping: capacity))
                if let objection = objection(pages.overflow ? .max : pages.partialValue, budget.cap) {
                    throw Self.noSpace("pool \(attributes.name): \(objection)")
                }
            }
            let client =
                pools.first { $0.client.name == attributes.client }?.client
                ?? ClientRecord(name: attributes.client, weight: ClientRecord.defaultWeight, cap: nil)
            let record = try PoolRecord(number: number, attributes: attributes, client: client)
            let cap = client.cap.load(ordering: .relaxed)
            file.makePool(
                number,
                TmemFile.PoolEntry(
                    attributes: attributes, weight: client.weight.load(ordering: .relaxed), cap: cap == .max ? nil : UInt64(cap)))
            budget.note(PoolRecord.metadataBytes, isMetadata: true)
            client.pools.withLock { $0.append(record) }
            setPools(pools + [record])
            updateUnpromisedLimit()
            return record
        }
    }

    func destroy(_ pool: PoolRecord) {
        // One at a time; the number is not another pool's before everything is gone.
        changes.withLock { _ in
            guard pool.isLive.exchange(false, ordering: .sequentiallyConsistent) else { return }
            file.setPoolState(pool.number, .dying)
            seams.step?()
            // Whoever saw it alive is done when its stripe could be locked.
            leaves.grace()
            _ = flush(pool, object: nil, ending: true)
            file.setPoolState(pool.number, .free)
            seams.step?()
            pool.client.pools.withLock { $0.removeAll { $0 === pool } }
            setPools(pools.filter { $0 !== pool })
            budget.giveBack(PoolRecord.metadataBytes, isMetadata: true)
            updateUnpromisedLimit()
        }
        tidy()
    }

    // MARK: - Limits

    func setWeight(_ client: ClientRecord, _ weight: UInt32) throws(QuireError) {
        guard weight > 0 else { throw QuireError(.invalid, "a weight is at least 1") }
        changes.withLock { _ in
            client.weight.store(weight, ordering: .relaxed)
            client.pools.withLock { for pool in $0 { file.setWeight(pool.number, weight) } }
        }
    }

    func setCap(_ client: ClientRecord, _ bytes: UInt64?) throws(QuireError) {
        let cap = bytes.map { Int(clamping: $0) } ?? .max
        try changes.withLock { (_: inout Void) throws(QuireError) in
            let persistent = client.pools.withLock { $0.filter { !$0.isEphemeral }.reduce(0) { $0 + contents.charged($1.number) } }
            guard persistent <= cap else {
                throw QuireError(.busy, "\(client.name) has \(persistent) bytes of persistent pages: its cap cannot be \(cap)")
            }
            client.cap.store(cap, ordering: .relaxed)
            client.pools.withLock { for pool in $0 { file.setCap(pool.number, bytes) } }
        }
        while charged(client) > cap {
            if evictSome(charged(client) - cap, of: client).pages == 0 { break }
        }
        tidy()
    }

    /// `overcommit`: with one it is the configuration that has the say. Nil: an operator has, and over whatever the configuration
    /// says when the next process opens the store.
    func setCap(_ bytes: UInt64?, overcommit: Double? = nil) throws(QuireError) {
        let cap = bytes.map { Int(clamping: $0) } ?? .max
        try changes.withLock { (_: inout Void) throws(QuireError) in
            let persistent = Set(pools.filter { !$0.isEphemeral }.map(\.number))
            let needed = contents.slabsNeeded(by: persistent) * TmemFile.slabBytes + budget.metadataBytes
            guard needed <= cap else {
                throw QuireError(
                    .busy, "persistent pages and what finds them take \(needed) bytes: the store's cap cannot be \(cap)")
            }
            let before = self.overcommit
            if let overcommit { overcommitFactor.withLock { $0 = overcommit } }
            if let objection = objection(promised(), cap) {
                overcommitFactor.withLock { $0 = before }
                throw QuireError(.busy, objection)
            }
            budget.setCap(cap)
            file.cap = overcommit == nil ? bytes ?? UInt64.max : nil
            updateUnpromisedLimit()
        }
        shrinkToCap()
    }
}
