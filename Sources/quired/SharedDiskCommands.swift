import Engines
import Host
import PageStore
import Platform
import StoreProtocol

/// What `quire tmem` and `quire status` ask about shared disks. Everybody sees the disks that his VMs may attach; to change
/// something is for root and for our own user.
struct SharedDiskCommands: Sendable {
    let disks: SharedDisks

    /// What commands work on.
    private struct Owner: TmemOwner {
        let shared: SharedDisks.Shared
        var store: Tmem { shared.store }
        var snapshot: TmemSnapshot {
            var snapshot = TmemSnapshot(of: shared.store)
            var pool = PoolSnapshot(of: shared.pool)
            pool.name = shared.disk.name
            snapshot.capBytes = shared.pool.cap ?? 0
            snapshot.pools = [pool]
            return snapshot
        }
        func pool(named name: String) throws(QuireError) -> TmemPool {
            guard name == shared.disk.name else { throw Self.noPool(name) }
            return shared.pool
        }
        // The pool's own limit: it is in the store's file, and quired's next life has it, too.
        func setCap(_ bytes: UInt64?) throws(QuireError) { try shared.pool.setCap(bytes) }
    }

    func carryOut(_ text: String, _ uid: UInt32, _ attached: (String) -> [String]) throws(QuireError) -> String {
        let words = text.split(separator: " ").map(String.init)
        let visible = disks.visible(to: uid)
        if words == ["list"] {
            return SharedDiskReport.encode(
                visible.map { shared in
                    SharedDiskReport(
                        disk: shared.disk.name, group: shared.disk.group, attached: attached(shared.disk.name), content: shared.content,
                        tmem: StatusReport.Tmem(Owner(shared: shared).snapshot))
                })
        }
        guard let name = words.first, words.dropFirst().first == "tmem" else {
            throw QuireError(.unsupported, "this quired does not know the command '\(text)'")
        }
        guard let shared = visible.first(where: { $0.disk.name == name }) else { throw SharedDiskReport.unknown(name) }
        guard uid == 0 || uid == ProcessCalls.ownUID else {
            throw QuireError(.invalid, "only root and quired's own user may change shared disks")
        }
        guard let answer = try TmemCommand(parsing: words.dropFirst(2)).carryOut(on: Owner(shared: shared)) else {
            throw QuireError(.unsupported, "a shared disk is neither saved nor restored: copy it in a VM that has it")
        }
        return answer
    }
}
