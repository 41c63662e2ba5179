import Engines
import Platform
import StoreProtocol
import Synchronization

/// How much of the host's memory all stores of transcendent memory may use together, and which of them is allowed how much of it:
/// swap disks, whose backends ask over the socket, and shared disks, which are here.
///
/// What it must guarantee: what is allowed is never more, all in all, than the cap, but for what was in use before anybody asked.
/// A store takes no memory before it is allowed to, so the cap holds without anybody watching. It is not kept on disk or parked:
/// who has lost us tells us what he holds when he finds us again. Until all had the time to, nobody is allowed more than he holds
/// (`settling`); and what one held whose connection ended is kept for his successor, who finds the pages there.
///
/// It counts, and takes nobody's memory away: pages of these stores are persistent. And it believes what it is told: a backend that
/// lies gets more than its part, or leaves others less; it sees no byte of theirs by that.
public final class TmemLedger: Sendable {
    public struct Holder: Hashable, Sendable {
        let uid: UInt32
        let name: String
    }

    private struct Share {
        var bytes: UInt64
        /// Who asks under this name now: the last who did.
        var owner: UInt64
        var lostAt: UInt64?
    }

    private struct State {
        var cap: UInt64?
        var shares: [Holder: Share] = [:]
        var lastOwner: UInt64 = 0
        var settledAt: UInt64

        var total: UInt64 { shares.values.reduce(0) { $0 + $1.bytes } }

        mutating func forgetLost(_ now: UInt64) {
            for (holder, share) in shares {
                if let lostAt = share.lostAt, now >= lostAt + TmemLedger.lostNanoseconds { shares[holder] = nil }
            }
        }
    }

    private let state: Mutex<State>
    private let clock: @Sendable () -> UInt64

    /// A backend is started again within a second or two, and connects at once.
    static let lostNanoseconds: UInt64 = 10_000_000_000
    /// Backends look after their connection every second.
    static let settlingNanoseconds: UInt64 = 3_000_000_000

    /// More than there are connections; so many are added up at each question.
    private static let maxShares = 8192

    public convenience init(cap: UInt64?) { self.init(cap: cap, clock: monotonicNanoseconds) }

    /// `clock`: in nanoseconds.
    package init(cap: UInt64?, clock: @escaping @Sendable () -> UInt64) {
        self.clock = clock
        state = Mutex(State(cap: cap, settledAt: clock() + Self.settlingNanoseconds))
    }

    /// From now on backends can say what they hold.
    package func settle() { state.withLock { $0.settledAt = clock() + Self.settlingNanoseconds } }

    /// In bytes; nil: no limit. What is allowed already stays, also above it.
    public func setCap(_ bytes: UInt64?) { state.withLock { $0.cap = bytes } }

    /// For one who will ask.
    package func makeOwner() -> UInt64 {
        state.withLock {
            $0.lastOwner += 1
            return $0.lastOwner
        }
    }

    package func allow(_ use: StoreRequest.TmemUse, uid: UInt32, owner: UInt64) -> StoreReply.TmemAllowed {
        let now = clock()
        return state.withLock { state in
            state.forgetLost(now)
            let holder = Holder(uid: uid, name: use.name)
            let others = state.total - (state.shares[holder]?.bytes ?? 0)
            var allowed = use.wanted
            var isSettling = false
            if let cap = state.cap {
                allowed = min(allowed, cap - min(cap, others))
                if now < state.settledAt, allowed > use.held {
                    isSettling = true
                    allowed = use.held
                }
            }
            allowed = max(allowed, use.used)
            // Whom we cannot keep in mind gets no more than he has.
            if state.shares.count >= Self.maxShares, state.shares[holder] == nil { allowed = use.used } else {
                state.shares[holder] = Share(bytes: allowed, owner: owner, lostAt: nil)
            }
            return StoreReply.TmemAllowed(allowed: allowed, total: others + allowed, cap: state.cap, isSettling: isSettling)
        }
    }

    /// How things are.
    package func look() -> StoreReply.TmemAllowed {
        let now = clock()
        return state.withLock { state in
            state.forgetLost(now)
            return StoreReply.TmemAllowed(allowed: 0, total: state.total, cap: state.cap, isSettling: now < state.settledAt)
        }
    }

    /// Its connection has ended.
    package func lose(owner: UInt64) {
        let now = clock()
        state.withLock { state in
            for (holder, share) in state.shares where share.owner == owner {
                if share.bytes == 0 { state.shares[holder] = nil } else { state.shares[holder]!.lostAt = now }
            }
        }
    }
}

extension TmemLedger {
    /// For a store of this process.
    func quota(of name: String) -> any TmemQuota { Local(self, name) }

    private final class Local: TmemQuota {
        private let ledger: TmemLedger
        private let name: String
        private let owner: UInt64

        init(_ ledger: TmemLedger, _ name: String) {
            self.ledger = ledger
            self.name = name
            owner = ledger.makeOwner()
        }

        func allow(used: UInt64, held: UInt64, wanted: UInt64) -> UInt64? {
            let use = StoreRequest.TmemUse.limited(name: name, used: used, held: held, wanted: wanted)
            // Backends that were here before us have the time to say what they hold.
            while true {
                let answer = ledger.allow(use, uid: Observers.owner, owner: owner)
                guard answer.isSettling, answer.allowed < wanted else { return answer.allowed }
                ProcessCalls.sleep(milliseconds: 50)
            }
        }
    }
}
