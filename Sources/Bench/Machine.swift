import Glibc
import Platform

/// What a benchmark ran on, for the report.
public enum Machine {
    public static func describe(qemu: String, accelerator: String) -> [(String, JSON)] {
        [
            ("cpu", .text(cpuModel)), ("cores", .integer(sysconf(Int32(_SC_NPROCESSORS_ONLN)))),
            ("memory_mib", .integer(Int(sysconf(Int32(_SC_PHYS_PAGES))) / 256)),
            ("kernel", .text(line("/proc/sys/kernel/osrelease"))), ("qemu", .text(qemu)),
            ("accelerator", .text(accelerator)), ("load_before", .text(load)),
        ]
    }

    /// The three load averages: who else was at work.
    public static var load: String { line("/proc/loadavg").split(separator: " ").prefix(3).joined(separator: " ") }

    private static var cpuModel: String {
        let text = (try? Files.read("/proc/cpuinfo")) ?? ""
        let model = text.split(separator: "\n").first { $0.hasPrefix("model name") }
        return model?.split(separator: ":").last.map { String($0.drop { $0 == " " }) } ?? "unknown"
    }

    private static func line(_ path: String) -> String {
        String((try? Files.read(path))?.split(separator: "\n").first ?? "unknown")
    }
}

/// One line of progress, on stderr.
public func progress(_ text: String) { writeStandardError("bench: \(text)") }
