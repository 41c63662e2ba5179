import Platform
import Synchronization

/// Taking memory from ephemeral pages: the least recently used leaf (16 neighbouring pages) of the client that has most of
/// it by weight, again and again until there is enough. So it goes by the leaf: a page that nobody has used stays as long as one
/// of its neighbours is in use, and goes with them.
///
/// No livelock: every round takes pages away or is the last, and whoever waits for room is told when there was nothing
/// left to take. Xen's eviction could run for ever over pages whose slots fitted nobody; here compaction turns free slots
/// into free slabs, which fit anybody.
extension TmemStore {
    /// Evicts until about so many bytes are free, of one client or of whoever is next. A content that others name, too, gives
    /// less than it is large, or nothing.
    @discardableResult
    func evictSome(_ bytes: Int, of only: ClientRecord? = nil) -> (pages: Int, bytes: Int) {
        var pages = 0, freed = 0
        let all = only.map { $0.pools.withLock { $0 } } ?? self.pools
        var clients: [(client: ClientRecord, pools: [PoolRecord])] = []
        for pool in all where pool.isEphemeral {
            if let index = clients.firstIndex(where: { $0.client === pool.client }) {
                clients[index].pools.append(pool)
            } else {
                clients.append((pool.client, [pool]))
            }
        }
        while freed < bytes {
            var best: (index: Int, pools: [PoolRecord], load: Double)?
            for (index, (client, all)) in clients.enumerated() {
                // The number of one that has ended may be another's, from which nothing is to be had here.
                let pools = all.filter { $0.isLive.load(ordering: .relaxed) }
                let charged = pools.reduce(0) { $0 + contents.charged($1.number) }
                guard charged > 0 else { continue }
                let load = Double(charged) / Double(client.weight.load(ordering: .relaxed))
                if best == nil || load > best!.load { best = (index, pools, load) }
            }
            guard let best else { break }
            guard let oldest = leaves.oldest(of: best.pools.map(\.number)) else {
                // What it is charged for is not found yet: others are putting it.
                clients.remove(at: best.index)
                continue
            }
            let leaf = leaves.stripes[oldest.stripe].state.withLock { _ in
                let leaf = leaves.oldest(oldest.pool, stripe: oldest.stripe)
                return leaf == 0 ? nil : leaves.key(leaf)
            }
            // Nil: somebody else was faster.
            guard let key = leaf, let pool = best.pools.first(where: { $0.number == key.pool }) else { continue }
            let hash = leaves.hash(key)
            let count = take(pool, key, hash, 0xffff) { freed += $0 }
            pool.count(.evictions, oldest.stripe, count)
            pages += count
        }
        return (pages, freed)
    }

    /// Room for another slab or extent under the cap, and under what the host has. False: there is nothing to take it from. `lacking`: bytes
    /// that would do, where nothing else is lacking. Throws `.retry` where it is not known yet what the store may use.
    func makeRoom(_ lacking: Int = TmemFile.slabBytes + Leaves.extentBytes) throws(QuireError) -> Bool {
        let before = budget.used, allowed = budget.allowed
        return try room.withLock { (_) throws(QuireError) -> Bool in
            // Somebody made some while we waited.
            if budget.used < before || budget.allowed > allowed { return true }
            // Before anything is taken from anybody.
            if try budget.extend(by: lacking) { return true }
            // Whoever wants a slab has these; here is somebody who wants to find more pages, for which they must go back first.
            if slabs.warmBytes > 0 {
                slabs.chillAll()
                // Only where that is enough for a slab and an extent: else the same slab would be taken again, and the extent fail again.
                if budget.hasRoom(lacking) { return true }
            }
            let cap = budget.cap
            let slabCount = budget.used / TmemFile.slabBytes
            if slabs.surplus > max(2, slabCount / 64), compactAll() { return true }
            // Without a cap it is the host that has no memory.
            let batch = min(max((cap == .max ? budget.used : cap) / 64, 4 * TmemFile.slabBytes), 16 << 20)
            let evicted = evictSome(batch).pages
            let gained = slabs.surplus > 0 && compactAll()
            return evicted > 0 || gained
        }
    }

    /// Before a put of a client's: evicts its own pages as far as its cap asks for.
    func keepUnderCap(_ pool: PoolRecord) throws(QuireError) {
        let cap = pool.client.cap.load(ordering: .relaxed)
        guard cap != .max else { return }
        while true {
            let over = charged(pool.client) - cap
            guard over > 0, evictSome(over, of: pool.client).pages > 0 else { return }
        }
    }

    /// Evicts until the host has so many bytes back; how many it got.
    func evict(_ bytes: Int) -> Int {
        let before = budget.used
        room.withLock { _ in
            slabs.chillAll()
            while before - budget.used < bytes {
                let evicted = evictSome(max(bytes - (before - budget.used), TmemFile.slabBytes)).pages
                _ = compactAll()
                slabs.chillAll()
                if evicted == 0 { break }
            }
        }
        return max(0, before - budget.used)
    }

    func shrinkToCap() {
        let over = budget.used - budget.cap
        if over > 0 { _ = evict(over) }
    }
}
