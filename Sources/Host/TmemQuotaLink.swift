import Engines
import Logging
import Platform
import StoreProtocol
import Synchronization

/// Asks quired what the VM's swap disk may use of the host's memory, of what all may use together (`tmem-cap`).
///
/// A quired that is started again, or stands still, is waited for, as long as that takes: a few seconds. Where there is none the VM
/// takes what it wants, as if there were no limit: a guest's swap is not to fail for a daemon that is not there, and the host's
/// reserve holds all the same. quired is looked for every second, and then counts what is in use by then.
///
/// No call takes longer than a request to a disk may: see `VhostUserDevice`. And a connection is kept, answered or not: one that was
/// never accepted would take its place in quired's queue for as long as quired stands still, and the next one another.
package final class TmemQuotaLink: TmemQuota {
    private struct State: ~Copyable {
        /// Of quired's socket.
        var path: String
        var client: TmemClient?
        /// A question was sent, and not answered yet: how many bytes it was for.
        var asked: UInt64?
        /// There was one, and nobody has given it up.
        var wasThere = false
        /// Since when somebody has been waiting for it.
        var waitingSince: UInt64?
        /// It was given up, until it answers: not to be looked for before. 0: it was not.
        var retryAt: UInt64 = 0
        var trouble = ""

        init(path: String) { self.path = path }
    }

    private let name: String
    private let logger: Logger
    private let state: Mutex<State>
    private let reviewedAt = Atomic<UInt64>(0)

    private static let patienceMilliseconds: Int32 = 60, connectMilliseconds: Int32 = 30
    /// As long as quired may take to be there again, and to hear of what others hold.
    private static let waitNanoseconds: UInt64 = 5_000_000_000
    private static let retryNanoseconds: UInt64 = 1_000_000_000
    private static let reviewNanoseconds: UInt64 = 5_000_000_000

    /// `path`: of quired's socket. `name`: the VM's.
    package init(path: String, name: String, logger: Logger) {
        state = Mutex(State(path: path))
        // Two of one name would count as one.
        self.name = name.isEmpty ? "vm-\(ProcessCalls.ownPID)" : name
        self.logger = logger
    }

    /// Another quired is asked from now on, and hears at the next review what is in use. The old one forgets that, as of any that is gone.
    package func move(to path: String) {
        state.withLock { state in
            if state.path != path { state = State(path: path) }
        }
    }

    package func allow(used: UInt64, held: UInt64, wanted: UInt64) -> UInt64? {
        let use = StoreRequest.TmemUse.limited(name: name, used: used, held: held, wanted: wanted)
        return state.withLock { state in
            guard monotonicNanoseconds() >= state.retryAt else { return wanted }
            do throws(QuireError) {
                while true {
                    if state.client == nil { state.client = try TmemClient(path: state.path, patienceMilliseconds: Self.connectMilliseconds) }
                    if state.asked == nil {
                        try state.client!.ask(use)
                        state.asked = use.wanted
                    }
                    guard let answer = try state.client!.answer(patienceMilliseconds: Self.patienceMilliseconds) else {
                        return wait(&state, wanted)
                    }
                    let asked = state.asked!
                    (state.asked, state.wasThere, state.waitingSince, state.retryAt, state.trouble) = (nil, true, nil, 0, "")
                    if answer.allowed >= wanted { return answer.allowed }
                    // It is to an earlier question, which was for less: no refusal.
                    if asked < use.wanted { continue }
                    // That ends by itself.
                    return answer.isSettling ? nil : answer.allowed
                }
            } catch {
                state.client = nil
                state.asked = nil
                note(error, &state)
                return state.wasThere ? wait(&state, wanted) : giveUp(&state, wanted)
            }
        }
    }

    /// Nil: it is worth while to ask again.
    private func wait(_ state: inout State, _ wanted: UInt64) -> UInt64? {
        let now = monotonicNanoseconds()
        // It stands still yet.
        if state.retryAt != 0 { return giveUp(&state, wanted) }
        if let since = state.waitingSince, now - since > Self.waitNanoseconds { return giveUp(&state, wanted) }
        state.waitingSince = state.waitingSince ?? now
        return nil
    }

    private func giveUp(_ state: inout State, _ wanted: UInt64) -> UInt64 {
        (state.wasThere, state.waitingSince) = (false, nil)
        state.retryAt = monotonicNanoseconds() + Self.retryNanoseconds
        return wanted
    }

    private func note(_ error: QuireError, _ state: inout State) {
        let text = error.errno == 2 || error.errno == 111 ? "no quired listens at \(state.path)" : "\(error)"
        guard text != state.trouble else { return }
        state.trouble = text
        logger.info("what the swap disk may use of the host's memory is not known: \(text)")
    }

    /// Whether the store is to be reviewed (`Tmem.reviewQuota`): what it does not use goes back, and a quired that is new learns of it.
    /// Asked about once a second.
    package var isReviewDue: Bool {
        let now = monotonicNanoseconds()
        let isNews = state.withLock { state -> Bool in
            if state.asked != nil { return true }
            return state.client?.hasNews ?? true
        }
        guard isNews || now - reviewedAt.load(ordering: .relaxed) > Self.reviewNanoseconds else { return false }
        reviewedAt.store(now, ordering: .relaxed)
        return true
    }
}
