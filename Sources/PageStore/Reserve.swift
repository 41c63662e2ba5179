import Platform
import Synchronization

/// What merging has lent has to be there when guests write, or somebody on the host is killed for it. So nothing more is
/// merged while the host has less memory left than its part of what all merged pages together would need, were each of
/// them written at once. What is merged stays so.
final class Reserve: Sendable {
    /// Of 100: 100 is on the safe side; less is for an operator who knows that not all guests write everything at once.
    private let percent: Atomic<Int>
    private let available: @Sendable () -> UInt64?
    private let recent = Mutex<(at: UInt64, lacking: UInt64)>((0, 0))
    /// As old an answer may be: memory does not fill up faster than merging could fill it.
    private static let validNanoseconds: UInt64 = 200_000_000

    init(percent: Int, available: @escaping @Sendable () -> UInt64?) {
        self.percent = Atomic(percent)
        self.available = available
    }

    func setPercent(_ percent: Int) {
        self.percent.store(percent, ordering: .relaxed)
        recent.withLock { $0 = (0, 0) }
    }

    /// Bytes that the host has too few; 0: more may be merged. `lentPages` is asked for the merged pages of all VMs, where an
    /// earlier answer is too old.
    func lackingBytes(lentPages: () -> UInt64) -> UInt64 {
        let now = monotonicNanoseconds()
        let last = recent.withLock { $0 }
        if last.at != 0, now - last.at < Self.validNanoseconds { return last.lacking }
        let needed = lentPages() * UInt64(StoreFile.slotBytes) * UInt64(percent.load(ordering: .relaxed)) / 100
        let left = available() ?? .max
        let lacking = needed > left ? needed - left : 0
        recent.withLock { $0 = (now, lacking) }
        return lacking
    }
}
