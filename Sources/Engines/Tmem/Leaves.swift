import Platform
import Synchronization

/// Where pages are found: leaves of 16 neighbouring indices of one object of one pool. A leaf's slots, one cache line, name
/// contents by number; 0 is no page. A page comes, is replaced and goes by one store of four bytes.
///
/// A leaf all of whose slots are 0 is free, whatever its head says. So a head is written while the slots are 0, and a kill
/// before the first page is named leaves a free leaf.
///
/// Locks: one for each of 64 stripes of the hash table that leaves are found by. These are the locks of put and get.
/// Under a stripe's lock are also its parts of the pools' lists of least recently used leaves (ephemeral pools only): each
/// leaf carries the time it was last used, so the oldest of a pool is the oldest of the ends of its 64 lists.
final class Leaves: SplitTableUser, Sendable {
    static let pages = 16
    static let stripes = SplitTable.stripes

    struct Key: Equatable {
        let pool: UInt16
        let object: UInt64
        /// The index of the first page, divided by 16.
        let base: UInt32
    }

    /// What the lock of a stripe protects and isn't in mapped memory.
    struct State {
        var free = Numbers.Free()
        var leaves = 0
    }
    final class Stripe: Sendable {
        let state = Mutex(State())
    }

    // Beside the file, of a leaf: chain, neighbours in the list of use (0: none), when it was used.
    private static let volatileBytes = 24
    private static let chainAt = 0, olderAt = 4, newerAt = 8, usedAt = 16

    private let file: TmemFile
    private let table: SplitTable
    private let numbers: Numbers
    private let mapping: Mapping
    private let volatile: MappedBytes
    private let listMapping: Mapping
    /// A pool, a stripe: the oldest leaf and the newest.
    private let lists: MappedBytes
    private let clock = Atomic<UInt64>(1)
    private let keys: (UInt64, UInt64)
    let stripes: [Stripe]

    private static let perExtent = TmemFile.extentBytes / 64
    /// What an extent of leaves takes, in bytes: more than one of contents.
    static let extentBytes = perExtent * (16 + 64 + volatileBytes)

    init(_ file: TmemFile, _ budget: TmemBudget) throws(QuireError) {
        self.file = file
        table = try SplitTable(limit: TmemFile.leafLimit, budget: budget)
        mapping = try Mapping(anonymousByteCount: TmemFile.leafLimit * Self.volatileBytes)
        mapping.excludeFromDumps()
        mapping.refuseHugePages()
        listMapping = try Mapping(anonymousByteCount: TmemFile.poolLimit * Self.stripes * 8)
        // Sound: this object keeps both mappings.
        unsafe volatile = mapping.view(0, count: TmemFile.leafLimit * Self.volatileBytes)
        unsafe lists = listMapping.view(0, count: TmemFile.poolLimit * Self.stripes * 8)
        let extent = Self.perExtent
        numbers = Numbers(
            count: file.leafCount, limit: TmemFile.leafLimit, extent: extent,
            extentBytes: Self.extentBytes, budget: budget,
            populate: { (range: Range<Int>) throws(QuireError) in try file.populateLeaves(range) },
            note: { file.leafCount = $0 })
        stripes = (0..<Self.stripes).map { _ in Stripe() }
        // Guests choose objects and indices: where they end up must not be theirs to choose.
        keys = (UInt64.random(in: 0 ... .max), UInt64.random(in: 0 ... .max) | 1)
    }

    @inline(__always) func hash(_ key: Key) -> UInt32 {
        let first = (key.object ^ keys.0).multipliedFullWidth(by: keys.1)
        let place = UInt64(key.base) << 16 | UInt64(key.pool)
        let second = ((first.high ^ first.low) &+ place ^ keys.1).multipliedFullWidth(by: keys.0 | 1)
        return UInt32(truncatingIfNeeded: (second.high ^ second.low) >> 8)
    }
    @inline(__always) static func stripe(of hash: UInt32) -> Int { Int(hash) % stripes }

    // MARK: - Entries

    func key(_ leaf: UInt32) -> Key {
        let at = Int(leaf) * 16
        return Key(pool: file.heads.load16(at + 12), object: file.heads.load64(at), base: file.heads.load32(at + 8))
    }
    @inline(__always) private func isAt(_ leaf: UInt32, _ key: Key) -> Bool {
        let at = Int(leaf) * 16
        return file.heads.load64(at) == key.object && file.heads.load32(at + 8) == key.base
            && file.heads.load16(at + 12) == key.pool
    }
    /// The content that a slot names.
    @inline(__always) func content(_ leaf: UInt32, _ slot: Int) -> UInt32 { file.slots.load32(Int(leaf) * 64 + slot * 4) }
    @inline(__always) func setContent(_ leaf: UInt32, _ slot: Int, _ number: UInt32) {
        file.slots.store32(Int(leaf) * 64 + slot * 4, number)
    }
    @inline(__always) func isEmpty(_ leaf: UInt32) -> Bool {
        var all: UInt64 = 0
        for word in 0..<8 { all |= file.slots.load64(Int(leaf) * 64 + word * 8) }
        return all == 0
    }
    @inline(__always) private func field(_ leaf: UInt32, _ at: Int) -> UInt32 { volatile.load32(Int(leaf) * Self.volatileBytes + at) }
    @inline(__always) private func setField(_ leaf: UInt32, _ at: Int, _ value: UInt32) {
        volatile.store32(Int(leaf) * Self.volatileBytes + at, value)
    }

    // MARK: - Under the lock of the hash's stripe

    /// 0: none.
    @inline(__always) func find(_ key: Key, _ hash: UInt32) -> UInt32 {
        var leaf = table.head(table.bucket(hash))
        while leaf != 0, !isAt(leaf, key) { leaf = field(leaf, Self.chainAt) }
        return leaf
    }

    /// Makes a leaf of a key that has none; 0: no memory. `grows`: whether `grow` should be called when the lock is free.
    func make(_ key: Key, _ hash: UInt32, listed: Bool, _ state: inout State, grows: inout Bool) -> UInt32 {
        guard let leaf = numbers.take(&state.free, next: { field($0, Self.chainAt) }) else { return 0 }
        let at = Int(leaf) * 16
        file.heads.store64(at, key.object)
        file.heads.store32(at + 8, key.base)
        file.heads.store16(at + 12, key.pool)
        grows = insert(leaf, hash)
        state.leaves += 1
        if listed { use(leaf, key.pool, hash, isNew: true) }
        return leaf
    }

    private func insert(_ leaf: UInt32, _ hash: UInt32) -> Bool {
        let bucket = table.bucket(hash)
        setField(leaf, Self.chainAt, table.head(bucket))
        table.setHead(bucket, leaf)
        return table.added()
    }

    /// Takes away a leaf that has no page any more.
    func remove(_ leaf: UInt32, _ key: Key, _ hash: UInt32, listed: Bool, _ state: inout State) {
        let bucket = table.bucket(hash)
        var before: UInt32 = 0, entry = table.head(bucket)
        while entry != leaf {
            before = entry
            entry = field(entry, Self.chainAt)
        }
        let next = field(leaf, Self.chainAt)
        if before == 0 { table.setHead(bucket, next) } else { setField(before, Self.chainAt, next) }
        table.removed()
        if listed { unlist(leaf, key.pool, hash) }
        file.heads.store16(Int(leaf) * 16 + 12, 0)
        setField(leaf, Self.chainAt, state.free.head)
        state.free.head = leaf
        state.leaves -= 1
    }

    /// No stripe's lock may be held.
    func grow() { table.grow(self) }
    func hash(of leaf: UInt32) -> UInt32 { hash(key(leaf)) }
    func next(_ leaf: UInt32) -> UInt32 { field(leaf, Self.chainAt) }
    func setNext(_ leaf: UInt32, _ next: UInt32) { setField(leaf, Self.chainAt, next) }
    func lock(_ stripe: Int, _ body: () -> Void) { stripes[stripe].state.withLock { _ in body() } }

    // MARK: - Lists of use

    private func list(_ pool: UInt16, _ stripe: Int) -> Int { (Int(pool) * Self.stripes + stripe) * 8 }

    /// The leaf is the most recently used of its pool.
    func use(_ leaf: UInt32, _ pool: UInt16, _ hash: UInt32, isNew: Bool = false) {
        let list = list(pool, Self.stripe(of: hash))
        let newest = lists.load32(list + 4)
        volatile.store64(
            Int(leaf) * Self.volatileBytes + Self.usedAt, clock.wrappingAdd(1, ordering: .relaxed).newValue)
        if newest == leaf { return }
        if !isNew { unlist(leaf, pool, hash) }
        let last = lists.load32(list + 4)
        setField(leaf, Self.olderAt, last)
        setField(leaf, Self.newerAt, 0)
        if last != 0 { setField(last, Self.newerAt, leaf) } else { lists.store32(list, leaf) }
        lists.store32(list + 4, leaf)
    }

    private func unlist(_ leaf: UInt32, _ pool: UInt16, _ hash: UInt32) {
        let list = list(pool, Self.stripe(of: hash))
        let older = field(leaf, Self.olderAt), newer = field(leaf, Self.newerAt)
        if older != 0 { setField(older, Self.newerAt, newer) } else { lists.store32(list, newer) }
        if newer != 0 { setField(newer, Self.olderAt, older) } else { lists.store32(list + 4, older) }
    }

    /// The oldest leaf of a pool in a stripe, 0: none.
    func oldest(_ pool: UInt16, stripe: Int) -> UInt32 { lists.load32(list(pool, stripe)) }

    /// The stripe with the oldest leaf of all of these pools, and whose it is. Looks without locks: nearly right while others
    /// use leaves.
    func oldest(of pools: [UInt16]) -> (pool: UInt16, stripe: Int, used: UInt64)? {
        var best: (pool: UInt16, stripe: Int, used: UInt64)?
        for pool in pools {
            for stripe in 0..<Self.stripes {
                let leaf = oldest(pool, stripe: stripe)
                guard leaf != 0 else { continue }
                let used = volatile.load64(Int(leaf) * Self.volatileBytes + Self.usedAt)
                if best == nil || used < best!.used { best = (pool, stripe, used) }
            }
        }
        return best
    }

    // MARK: - All of them

    /// Leaves that belong to a pool now, of one object or of all. Reads all heads in a row, 16 bytes to 16 pages, without
    /// locks: whoever uses a leaf locks its stripe and looks again.
    func leaves(of pool: UInt16, object: UInt64?) -> [UInt32] {
        var found: [UInt32] = []
        for leaf in 1..<max(1, numbers.count) {
            let at = Int(leaf) * 16
            if file.heads.load16(at + 12) == pool, object == nil || file.heads.load64(at) == object { found.append(leaf) }
        }
        return found
    }

    var count: Int { stripes.reduce(0) { $0 + $1.state.withLock { $0.leaves } } }

    func grace() { for stripe in stripes { stripe.state.withLock { _ in } } }

    // MARK: - Start

    /// Finds the leaves again that an earlier process left. `keeps` says whether a pool is alive, and whether its leaves are
    /// listed; `body` gets every content that is named.
    func recover(
        keeps: (UInt16) -> (isLive: Bool, isListed: Bool), body: (UInt32, UInt16) throws(QuireError) -> Void
    ) throws(QuireError) {
        let count = numbers.count
        var alive = 0
        for leaf in 1..<max(1, count) where !isEmpty(leaf) { alive += 1 }
        table.prepare(entries: alive)
        for leaf in 1..<max(1, count) {
            let key = key(leaf)
            let pool = keeps(key.pool)
            if !isEmpty(leaf), pool.isLive {
                let hash = hash(key)
                guard find(key, hash) == 0 else { throw TmemRecovery.damaged("two leaves are for the same pages") }
                for slot in 0..<Self.pages {
                    let number = content(leaf, slot)
                    if number != 0 { try body(number, key.pool) }
                }
                _ = insert(leaf, hash)
                if pool.isListed { use(leaf, key.pool, hash, isNew: true) }
                stripes[Self.stripe(of: hash)].state.withLock { $0.leaves += 1 }
            } else {
                // The slots first: a head must not become another's while there are pages.
                for word in 0..<8 { file.slots.store64(Int(leaf) * 64 + word * 8, 0) }
                file.heads.store16(Int(leaf) * 16 + 12, 0)
                stripes[Int(leaf) % Self.stripes].state.withLock {
                    setField(leaf, Self.chainAt, $0.free.head)
                    $0.free.head = leaf
                }
            }
        }
    }
}
