import CBench
import Glibc
import Platform

/// Cycles, where the machine counts them; else CPU time in cycles of the time stamp counter, which ticks at a constant rate.
enum Cycles {
    /// The counter follows threads that this one starts: open it before the engine.
    static let counter: Int32 = cb_open_cycles()
    static var isCounted: Bool { counter >= 0 }
    static var name: String { isCounted ? "cycles" : "TSC cycles of CPU time" }

    static func count() -> UInt64 {
        var value: UInt64 = 0
        _ = unsafe read(counter, &value, 8)
        return value
    }

    /// Ticks of the time stamp counter in a nanosecond.
    static let tscPerNanosecond: Double = {
        let started = monotonicNanoseconds(), first = cb_tsc()
        ProcessCalls.sleep(milliseconds: 100)
        return Double(cb_tsc() - first) / Double(monotonicNanoseconds() - started)
    }()
}

/// What one piece of work took. Times in nanoseconds.
struct Cost: Sendable {
    var wall: Double = 0
    var cpu: Double = 0
    var cycles: Double = 0

    func each(of count: Int) -> Cost {
        Cost(wall: wall / Double(count), cpu: cpu / Double(count), cycles: cycles / Double(count))
    }
}

/// CPU time that another process has used, all its threads, in nanoseconds; 0 if it is gone.
func cpuNanoseconds(of pid: Int32) -> UInt64 {
    let clock = cb_cpu_clock(pid)
    var time = timespec()
    guard clock != -1, unsafe clock_gettime(clock, &time) == 0 else { return 0 }
    return UInt64(time.tv_sec) * 1_000_000_000 + UInt64(time.tv_nsec)
}
