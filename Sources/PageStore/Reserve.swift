import Platform
import Synchronization

/// What merging has lent has to be there when guests write, or somebody on the host is killed for it. So nothing more is
/// merged while the host has less memory left than its part of what all merged pages together would need, were each of
/// them written at once. What is merged stays so.
final class Reserve: Sendable {
    /// Of 100: 100 is on the safe side; less is for an operator who knows that not all guests write everything at once.
    private let percent: Atomic<Int>
    private let host: HostReserve

    init(percent: Int, available: @escaping @Sendable () -> UInt64?) {
        self.percent = Atomic(percent)
        host = HostReserve(available: available)
    }

    func setPercent(_ percent: Int) {
        self.percent.store(percent, ordering: .relaxed)
        host.forget()
    }

    /// Bytes that the host has too few; 0: more may be merged. `lentPages` is asked for the merged pages of all VMs, where an
    /// earlier answer is too old.
    func lackingBytes(lentPages: () -> UInt64) -> UInt64 {
        host.lackingBytes {
            // Both may be absurd: what VMs say that they have, and what somebody wrote into the configuration.
            let (bytes, isTooMuch) = lentPages().multipliedReportingOverflow(by: UInt64(StoreFile.slotBytes) * UInt64(percent.load(ordering: .relaxed)))
            return isTooMuch ? .max : bytes / 100
        }
    }
}
