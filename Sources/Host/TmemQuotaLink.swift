import Engines
import Logging
import Platform
import StoreProtocol
import Synchronization

/// Asks quired what the VM's swap disk may use of the host's memory, of what all may use together (`tmem-cap`).
///
/// A quired that is started again, or stands still, is waited for, as long as that takes: a few seconds. Where there is none the VM
/// takes what it wants, as if there were no limit: a guest's swap is not to fail for a daemon that is not there, and the host's
/// reserve holds all the same. quired is asked again later, and then counts what is in use by then.
///
/// No call takes longer than a request to a disk may: see `VhostUserDevice`.
package final class TmemQuotaLink: TmemQuota {
    private struct State: ~Copyable {
        var client: TmemClient?
        /// A question was sent, and not answered yet. Any answer is to the last question there was.
        var isAsked = false
        /// There was one, and nobody has given it up.
        var wasThere = false
        /// Since when somebody has been waiting for it.
        var waitingSince: UInt64?
        /// There is none: not to be looked for before.
        var retryAt: UInt64 = 0
        var trouble = ""
    }

    private let path: String
    private let name: String
    private let logger: Logger
    private let state = Mutex(State())
    private let reviewedAt = Atomic<UInt64>(0)

    private static let patienceMilliseconds: Int32 = 80
    /// As long as quired may take to be there again, and to hear of what others hold.
    private static let waitNanoseconds: UInt64 = 5_000_000_000
    private static let retryNanoseconds: UInt64 = 10_000_000_000
    private static let reviewNanoseconds: UInt64 = 5_000_000_000

    /// `path`: of quired's socket. `name`: the VM's.
    package init(path: String, name: String, logger: Logger) {
        self.path = path
        // Two of one name would count as one.
        self.name = name.isEmpty ? "vm-\(ProcessCalls.ownPID)" : name
        self.logger = logger
    }

    package func allow(used: UInt64, held: UInt64, wanted: UInt64) -> UInt64? {
        let most = StoreRequest.maxTmemBytes
        let use = StoreRequest.TmemUse(name: name, used: min(used, most), held: min(held, most), wanted: min(wanted, most))
        return state.withLock { state in
            guard state.client != nil || monotonicNanoseconds() >= state.retryAt else { return wanted }
            do throws(QuireError) {
                if state.client == nil { state.client = try TmemClient(path: path) }
                if !state.isAsked {
                    try state.client!.ask(use)
                    state.isAsked = true
                }
                guard let answer = try state.client!.answer(patienceMilliseconds: Self.patienceMilliseconds) else {
                    return wait(&state, wanted)
                }
                (state.isAsked, state.wasThere, state.trouble) = (false, true, "")
                if answer.isSettling, answer.allowed < wanted { return wait(&state, wanted) }
                state.waitingSince = nil
                return answer.allowed
            } catch {
                state.client = nil
                state.isAsked = false
                note(error, &state)
                return state.wasThere ? wait(&state, wanted) : giveUp(&state, wanted)
            }
        }
    }

    /// Nil: it is worth while to ask again.
    private func wait(_ state: inout State, _ wanted: UInt64) -> UInt64? {
        let now = monotonicNanoseconds()
        if let since = state.waitingSince, now - since > Self.waitNanoseconds { return giveUp(&state, wanted) }
        state.waitingSince = state.waitingSince ?? now
        ProcessCalls.sleep(milliseconds: 10)
        return nil
    }

    private func giveUp(_ state: inout State, _ wanted: UInt64) -> UInt64 {
        state.client = nil
        (state.isAsked, state.wasThere, state.waitingSince) = (false, false, nil)
        state.retryAt = monotonicNanoseconds() + Self.retryNanoseconds
        return wanted
    }

    private func note(_ error: QuireError, _ state: inout State) {
        let text = error.errno == 2 || error.errno == 111 ? "no quired listens at \(path)" : "\(error)"
        guard text != state.trouble else { return }
        state.trouble = text
        logger.info("what the swap disk may use of the host's memory is not known: \(text)")
    }

    /// Whether the store is to be reviewed (`Tmem.reviewQuota`): what it does not use goes back, and a quired that is new learns of it.
    /// Asked about once a second.
    package var isReviewDue: Bool {
        let now = monotonicNanoseconds()
        let isNews = state.withLock { state -> Bool in
            if state.isAsked { return true }
            return state.client?.hasNews ?? state.wasThere
        }
        guard isNews || now - reviewedAt.load(ordering: .relaxed) > Self.reviewNanoseconds else { return false }
        reviewedAt.store(now, ordering: .relaxed)
        return true
    }
}
