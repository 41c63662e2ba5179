import Synchronization

/// Memory that the host is to have left, whatever is done for guests: where it has none, somebody is killed. The kernel is asked how
/// much that is, but not each time: an answer is good for a while, and for an eighth of what could be taken when it was given, since
/// others ask and take as well.
public final class HostReserve: Sendable {
    /// What transcendent memory leaves the host where nobody says otherwise, in bytes.
    public static let usualBytes: UInt64 = 256 << 20

    private struct Answer {
        let at: UInt64
        /// Bytes that there were too few.
        let lacking: UInt64
        /// Bytes that may be taken on it.
        var granted: UInt64
    }
    private let available: @Sendable () -> UInt64?
    private let recent = Mutex<Answer?>(nil)
    private static let validNanoseconds: UInt64 = 200_000_000

    /// `available`: bytes that the host has left; nil, and it has enough.
    public init(available: @escaping @Sendable () -> UInt64?) { self.available = available }

    /// Bytes that the host has too few for `needed` to be left when `bytes` are taken; 0: they may be taken. `needed` is asked where an
    /// earlier answer is good no more.
    public func lackingBytes(taking bytes: UInt64 = 0, needed: () -> UInt64) -> UInt64 {
        let now = monotonicNanoseconds()
        let known = recent.withLock { answer -> UInt64? in
            guard let last = answer, now < last.at + Self.validNanoseconds else { return nil }
            if last.lacking > 0 { return last.lacking }
            guard bytes <= last.granted else { return nil }
            answer!.granted -= bytes
            return 0
        }
        if let known { return known }
        let needed = needed(), left = available() ?? .max
        let spare = left > needed ? left - needed : 0
        let lacking = needed > left ? needed - left : bytes > spare ? bytes - spare : 0
        let granted = max(bytes, spare / 8) - bytes
        recent.withLock { $0 = Answer(at: now, lacking: lacking, granted: granted) }
        return lacking
    }

    /// The next one asks the kernel: another reserve holds.
    public func forget() { recent.withLock { $0 = nil } }
    /// The same, if there was too little: some was given back.
    public func forgetLack() {
        recent.withLock { answer in
            if let last = answer, last.lacking > 0 { answer = nil }
        }
    }
}
