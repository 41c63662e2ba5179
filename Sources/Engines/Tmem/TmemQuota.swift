import Platform
import Synchronization

/// Who says how much of the host's memory a store may use, of what all stores of the host may use together. May be asked by any
/// thread, one at a time for one store.
public protocol TmemQuota: Sendable {
    /// The store uses so many bytes, may use `held`, and would like to be allowed `wanted`; how many it is allowed from now on. Less
    /// than `used` is as good as `used`: what is there stays. Nil: the answer takes longer, ask again.
    func allow(used: UInt64, held: UInt64, wanted: UInt64) -> UInt64?
}

/// What a store is allowed. It asks for more by the step, so that asking costs little, and gives back what it has not used.
final class TmemAllowance: Sendable {
    private let quota: (any TmemQuota)?
    private let allowed: Atomic<Int>
    /// Held by whoever asks.
    private let asking = Mutex(Asking())
    private struct Asking {
        /// It is of no use before: there was nothing to be had.
        var refusedUntil: UInt64 = 0
        /// Nor before this: there was no answer, and whoever comes next is not to wait as long.
        var silentUntil: UInt64 = 0
    }

    private static let refusedNanoseconds: UInt64 = 100_000_000
    private static let silentNanoseconds: UInt64 = 50_000_000

    init(_ quota: (any TmemQuota)?) {
        self.quota = quota
        allowed = Atomic(quota == nil ? .max : 0)
    }

    var bytes: Int { allowed.load(ordering: .relaxed) }

    /// Many small stores are not to hold much that they don't use; a large one is not to ask all the time.
    private static func step(_ used: Int) -> Int { min(32 << 20, max(4 << 20, used / 16)) }

    /// False: there is no more. `used`: now, in bytes; `lacking`: what it takes. Throws `.retry` where the answer takes longer.
    func extend(used: Int, lacking: Int, cap: Int) throws(QuireError) -> Bool {
        guard let quota, used + lacking > bytes, used + lacking <= cap else { return false }
        return try asking.withLock { (asking) throws(QuireError) -> Bool in
            // A review has brought it meanwhile.
            if used + lacking <= bytes { return true }
            let now = monotonicNanoseconds()
            guard now >= asking.refusedUntil else { return false }
            guard now >= asking.silentUntil, ask(quota, used, wanted: min(cap, used + max(lacking, Self.step(used)))) else {
                if now >= asking.silentUntil { asking.silentUntil = monotonicNanoseconds() + Self.silentNanoseconds }
                throw QuireError(.retry, "quired has not said yet whether the host has room for another page")
            }
            if used + lacking <= bytes { return true }
            asking.refusedUntil = monotonicNanoseconds() + Self.refusedNanoseconds
            return false
        }
    }

    /// Gives back what is allowed and not used, but for a step; and says what is, to whoever does not know it yet.
    func review(used: () -> Int) {
        guard let quota else { return }
        asking.withLock { asking in
            let most = used() + 2 * Self.step(used())
            // First: what is taken from here on is within it.
            if bytes > most { allowed.store(most - Self.step(used()), ordering: .sequentiallyConsistent) }
            let now = used()
            if ask(quota, now, wanted: max(now, bytes)) { asking = Asking() }
        }
    }

    /// False: there is no answer yet.
    private func ask(_ quota: any TmemQuota, _ used: Int, wanted: Int) -> Bool {
        guard let answer = quota.allow(used: UInt64(max(0, used)), held: UInt64(max(0, bytes)), wanted: UInt64(max(0, wanted))) else {
            return false
        }
        allowed.store(Int(clamping: answer), ordering: .sequentiallyConsistent)
        return true
    }
}
