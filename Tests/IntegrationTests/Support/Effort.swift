import Glibc
import Platform

/// How long tests try. Everything that takes a choice of time is here: `make test` on two idle cores under TCG has to end
/// in minutes, and a soak ($QUIRE_TEST_FACTOR=20) is the same tests for longer.
enum Effort {
    static let factor = max(ProcessCalls.environment("QUIRE_TEST_FACTOR").flatMap(Double.init) ?? 1, 0.1)

    /// Seconds of load, or repetitions.
    static func scaled(_ count: Int) -> Int { max(1, Int(Double(count) * factor)) }

    /// A churn that verifies what it wrote: long enough for several periods, so that marks grow old under it.
    static let churnSeconds = scaled(4)
    /// Backends killed in the middle of a claim, in one guest.
    static let kills = scaled(4)
    static let reloads = scaled(8)
    /// Times that memory is plugged, used and unplugged.
    static let dimms = scaled(1)
    static let cpuCycles = scaled(5)
    /// Rounds of the comparison with the free lists: those that must be clean, and those within which a control must fail.
    static let checkRounds = scaled(40)
    static let controlRounds = 5000

    /// How long to wait for something that has no speed to be measured: the machine may be busy with anything.
    static let patience = 90.0
    static let bootPatience = 240.0
}

/// What a test or its harness found; one line, with the guest's log behind it where there is one.
struct Trouble: Error, CustomStringConvertible {
    let description: String
    init(_ description: String) { self.description = description }
}

/// Polls until `condition` holds. Throws `what`, with what `state` says then.
func waitUntil(
    _ what: String, within seconds: Double = Effort.patience, state: () -> String = { "" },
    _ condition: () throws -> Bool
) throws {
    let deadline = monotonicNanoseconds() + UInt64(seconds * 1e9)
    while true {
        if try condition() { return }
        if monotonicNanoseconds() > deadline { break }
        ProcessCalls.sleep(milliseconds: 20)
    }
    throw Trouble("waited \(Int(seconds)) s for \(what) in vain. \(state())")
}

/// Changes a setting of the host for as long as `body` runs. Where one of several is chosen, the kernel shows it in brackets.
func withSetting(_ path: String, _ value: String, _ body: () throws -> Void) throws {
    let words = try Files.read(path).split(whereSeparator: \.isWhitespace)
    let before = String(words.first { $0.hasPrefix("[") }?.dropFirst().dropLast() ?? words[0])
    func set(_ value: String) throws { try Descriptor.open(path, O_WRONLY).writeBytes(at: 0, Array(value.utf8)) }
    if before != value { try set(value) }
    defer { if before != value { try? set(before) } }
    try body()
}
