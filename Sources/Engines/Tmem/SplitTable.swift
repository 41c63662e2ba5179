import Platform
import Synchronization

/// Whose entries are in a `SplitTable`: their hashes, their chains and their locks.
protocol SplitTableUser: AnyObject {
    func hash(of entry: UInt32) -> UInt32
    func next(_ entry: UInt32) -> UInt32
    func setNext(_ entry: UInt32, _ next: UInt32)
    func lock(_ stripe: Int, _ body: () -> Void)
}

/// Buckets of a hash table that grows by one bucket at a time (linear hashing; Litwin, VLDB 1980): no pause to rehash, and
/// memory always fits what is in it. A bucket is the number of its first entry, 0 for none; entries chain by themselves.
///
/// Locks are not here but the user's: `stripes` of them, the lowest bits of the hash say which. A bucket and the one that
/// is split from it belong to the same stripe, so whoever holds a stripe's lock sees its buckets as they are: how many
/// buckets there are may change meanwhile, but no bucket of this stripe moves.
final class SplitTable: Sendable {
    static let stripes = 64
    private static let first = 1024
    /// Buckets in an extent of memory.
    private static let step = TmemFile.extentBytes / 4

    private let mapping: Mapping
    private let buckets: MappedBytes
    private let limit: Int
    private let count = Atomic<Int>(first)
    private let entries = Atomic<Int>(0)
    private let growth = Mutex<Int>(0)
    private let budget: TmemBudget

    /// At most `limit` buckets, a power of two.
    init(limit: Int, budget: TmemBudget) throws(QuireError) {
        mapping = try Mapping(anonymousByteCount: limit * 4)
        mapping.excludeFromDumps()
        mapping.refuseHugePages()
        // Sound: this object keeps the mapping.
        unsafe buckets = mapping.view(0, count: limit * 4)
        self.limit = limit
        self.budget = budget
        budget.note(Self.first * 4, isMetadata: true)
    }

    /// Bytes of a bucket's number in front of everything: see `chain`.
    @inline(__always) private func index(_ hash: UInt32, _ count: Int) -> Int {
        // The power of two that covers `count`.
        let mask = Int(bitPattern: ~UInt(0) >> UInt((count - 1).leadingZeroBitCount))
        let bucket = Int(hash) & mask
        return bucket < count ? bucket : bucket & (mask >> 1)
    }

    /// Where the bucket of a hash is. Good as long as the lock of its stripe is held.
    @inline(__always) func bucket(_ hash: UInt32) -> Int { 4 * index(hash, count.load(ordering: .acquiring)) }
    @inline(__always) func head(_ bucket: Int) -> UInt32 { buckets.load32(bucket) }
    @inline(__always) func setHead(_ bucket: Int, _ entry: UInt32) { buckets.store32(bucket, entry) }

    /// True when the table should `grow`.
    @inline(__always) func added() -> Bool {
        let entries = entries.wrappingAdd(1, ordering: .relaxed).newValue
        return entries > count.load(ordering: .relaxed)
    }
    @inline(__always) func removed() { entries.wrappingSubtract(1, ordering: .relaxed) }

    /// Splits a bucket. No stripe's lock may be held.
    func grow(_ user: some SplitTableUser) {
        // Somebody else is at it, or there is no memory: chains are longer then.
        _ = growth.withLockIfAvailable { reserved in
            let now = count.load(ordering: .relaxed)
            guard now < limit else { return }
            if now >= reserved {
                guard budget.take(Self.step * 4, isMetadata: true) else { return }
                reserved = max(reserved, now) + Self.step
            }
            let top = Int(bitPattern: ~UInt(0) >> UInt(now.leadingZeroBitCount)) >> 1
            let old = now & top
            user.lock(old % Self.stripes) {
                var entry = buckets.load32(4 * old)
                var stay: UInt32 = 0, move: UInt32 = 0
                while entry != 0 {
                    let following = user.next(entry)
                    if index(user.hash(of: entry), now + 1) == now {
                        user.setNext(entry, move)
                        move = entry
                    } else {
                        user.setNext(entry, stay)
                        stay = entry
                    }
                    entry = following
                }
                buckets.store32(4 * old, stay)
                buckets.store32(4 * now, move)
                count.store(now + 1, ordering: .releasing)
            }
        }
    }

    /// Room for so many entries, in an empty table that no other thread uses yet.
    func prepare(entries: Int) {
        growth.withLock { reserved in
            let wanted = min(limit, max(Self.first, entries))
            guard wanted > Self.first else { return }
            let extents = (wanted + Self.step - 1) / Self.step
            budget.note(extents * Self.step * 4, isMetadata: true)
            reserved = extents * Self.step
            count.store(wanted, ordering: .relaxed)
        }
    }
}
