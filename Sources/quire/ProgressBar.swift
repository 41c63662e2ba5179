import Glibc
import Host
import Platform

/// How far something long has come, on stderr: where that is a terminal, and not for what takes less than a second.
enum ProgressBar {
    /// `part`: of the whole, from 0 to 1, as far as anybody knows.
    static func during<R>(
        _ what: String, _ part: @escaping @Sendable () -> Double?, _ body: () throws(QuireError) -> R
    ) throws(QuireError) -> R {
        guard ProcessCalls.isTerminal(2), let file = try? Descriptor.duplicate(of: 2) else { return try body() }
        let terminal = DataSink(file)
        let isOver = Monitor(false)
        let thread = try? JoinableThread("progress") {
            var isShown = false
            while isOver.wait(until: monotonicNanoseconds() + 500_000_000, { $0 ? () : nil }) == nil {
                guard let part = part(), isShown || part < 0.9 else { continue }
                try? terminal.write(Array(("\r" + line(what, part) + "\u{1B}[K").utf8))
                isShown = true
            }
            if isShown { try? terminal.write(Array("\r\u{1B}[K".utf8)) }
        }
        defer {
            isOver.update { $0 = true }
            thread?.join()
        }
        return try body()
    }

    private static func line(_ what: String, _ part: Double) -> String {
        let width = 30, part = part.isFinite ? min(1, max(0, part)) : 0
        let filled = Int(part * Double(width))
        return "\(what) [\(String(repeating: "#", count: filled))\(String(repeating: ".", count: width - filled))] \(Int(part * 100)) %"
    }

    /// While a VM's merged pages get copies of their own.
    static func whileUnmerging<R>(_ vm: String, in directory: RuntimeDirectory, _ body: () throws(QuireError) -> R) throws(QuireError) -> R {
        @Sendable func merged() -> Double {
            let merging = StatusReport.read(vm, in: directory).merging
            return Double(merging.sharingPages + merging.zeroPages)
        }
        let all = merged()
        return try during("\(vm): unmerging", { all > 0 ? 1 - merged() / all : nil }, body)
    }
}
