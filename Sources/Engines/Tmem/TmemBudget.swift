import Platform
import Synchronization

/// What a store uses of the host's memory, in bytes, the cap on it, what it is allowed of what all stores may use together, and what
/// the host has left in any case: where it has none, one more slab of ours ends with a process that is killed, and not with a put
/// that fails. Memory is taken by slabs and by extents of metadata, so this is touched rarely and may be one word for all threads.
final class TmemBudget: Sendable {
    private let usedBytes = Atomic<Int>(0)
    private let limit = Atomic<Int>(.max)
    private let metadata = Atomic<Int>(0)
    private let reserved = Atomic<UInt64>(0)
    private let host: HostReserve
    private let allowance: TmemAllowance

    init(available: @escaping @Sendable () -> UInt64?, quota: (any TmemQuota)?) {
        host = HostReserve(available: available)
        allowance = TmemAllowance(quota)
    }

    var used: Int { usedBytes.load(ordering: .relaxed) }
    var cap: Int { limit.load(ordering: .relaxed) }
    var metadataBytes: Int { metadata.load(ordering: .relaxed) }
    /// 0: the host is not asked.
    var reserve: UInt64 { reserved.load(ordering: .relaxed) }

    func setCap(_ cap: Int) { limit.store(cap, ordering: .relaxed) }
    func setReserve(_ bytes: UInt64) {
        reserved.store(bytes, ordering: .relaxed)
        host.forget()
    }

    /// Whether the host would have less left than its reserve.
    func isHostShort(of bytes: Int) -> Bool {
        let reserve = reserve
        guard reserve > 0 else { return false }
        return host.lackingBytes(taking: UInt64(bytes), needed: { reserve }) > 0
    }

    /// Whether more would be above what the store is allowed, while it is below its own cap.
    func isQuotaShort(of bytes: Int) -> Bool { used > allowance.bytes - bytes && used <= cap - bytes }

    /// What the store is allowed now, of what all may use.
    var allowed: Int { allowance.bytes }
    /// Asks to be allowed more, where that is what is lacking; false: there is no more. Throws `.retry` where nobody has answered yet.
    func extend(by lacking: Int) throws(QuireError) -> Bool { try allowance.extend(used: used, lacking: lacking, cap: cap) }
    func reviewQuota() { allowance.review { used } }

    /// Whether `take` would give so many, as far as can be said.
    func hasRoom(_ bytes: Int) -> Bool { used <= min(cap, allowance.bytes) - bytes && !isHostShort(of: bytes) }

    /// False, and nothing taken, when the cap, the quota or the reserve forbids it.
    func take(_ bytes: Int, isMetadata: Bool) -> Bool {
        let now = usedBytes.wrappingAdd(bytes, ordering: .relaxed).newValue
        if now > min(cap, allowance.bytes) || isHostShort(of: bytes) {
            usedBytes.wrappingSubtract(bytes, ordering: .relaxed)
            return false
        }
        if isMetadata { metadata.wrappingAdd(bytes, ordering: .relaxed) }
        return true
    }

    /// What is in use anyway, at a start: a cap that was set lower meanwhile cannot undo it.
    func note(_ bytes: Int, isMetadata: Bool) {
        usedBytes.wrappingAdd(bytes, ordering: .relaxed)
        if isMetadata { metadata.wrappingAdd(bytes, ordering: .relaxed) }
    }

    func giveBack(_ bytes: Int, isMetadata: Bool) {
        usedBytes.wrappingSubtract(bytes, ordering: .relaxed)
        if isMetadata { metadata.wrappingSubtract(bytes, ordering: .relaxed) }
        host.forgetLack()
    }
}
