/// The host's memory in bytes, as the kernel says in /proc/meminfo (proc(5)).
public struct HostMemory: Sendable, Equatable {
    public let totalBytes: UInt64
    /// What programs can have without anybody losing any.
    public let availableBytes: UInt64
    public let freeSwapBytes: UInt64
    /// What can be taken before somebody is killed for it.
    public var leftBytes: UInt64 { availableBytes + freeSwapBytes }

    /// Nil where the kernel does not tell.
    public init?() {
        guard let meminfo = try? Files.read("/proc/meminfo", limit: 1 << 16) else { return nil }
        self.init(meminfo)
    }

    package init?(_ meminfo: String) {
        let lines = meminfo.split(separator: "\n")
        func field(_ name: String) -> UInt64? {
            lines.first { $0.hasPrefix(name) }.flatMap { $0.split(separator: " ").dropFirst().first }.flatMap { UInt64($0) }
                .map { $0 * 1024 }
        }
        guard let total = field("MemTotal:"), let available = field("MemAvailable:") else { return nil }
        totalBytes = total
        availableBytes = available
        freeSwapBytes = field("SwapFree:") ?? 0
    }
}
