/// What memory the host has left, as the kernel says.
public enum HostMemory {
    /// Bytes that new pages can have without anybody losing any: MemAvailable and SwapFree of proc(5); nil where the kernel
    /// does not tell.
    public static func availableBytes() -> UInt64? {
        (try? Files.read("/proc/meminfo", limit: 1 << 16)).flatMap(availableBytes(in:))
    }

    package static func availableBytes(in meminfo: String) -> UInt64? {
        func field(_ name: String) -> UInt64? {
            meminfo.split(separator: "\n").first { $0.hasPrefix(name + ":") }
                .flatMap { $0.split(separator: " ").dropFirst().first }.flatMap { UInt64($0) }.map { $0 * 1024 }
        }
        return field("MemAvailable").map { $0 + (field("SwapFree") ?? 0) }
    }
}
