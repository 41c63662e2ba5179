import Glibc
import Host
import Platform
import Testing

/// A guest that verifies all it reads, while this test merges, zeroes, folds and resets its pages as fast as it can.
/// With a delay inside the windows: one of a microsecond hides every mistake.
///
/// The controls leave a step out, or the interposer, and must fail: they show that the test would notice.
@Suite(.serialized, .needsMerging) struct StressTests {
    /// As for the other tests: `make soak` sets it.
    private static let factor = ProcessCalls.environment("QUIRE_TEST_FACTOR").flatMap { Double($0) } ?? 1

    struct Count {
        var merged = 0, zeroed = 0, folded = 0, reset = 0, differed = 0, busy = 0
    }

    /// Until the time is up, or until something went wrong. The stand-in's last word.
    private func stress(
        _ kinds: String, seconds: Double, pages: Int = 4096, delay: Int = 55, _ options: [String] = [], count: inout Count
    ) throws -> String {
        let frees = options.contains("free=1")
        let rig = try Rig(pages: pages, ["kinds=\(kinds)", "delay=\(delay)"] + options)
        try rig.begin()
        var random = SystemRandomNumberGenerator()
        let end = monotonicNanoseconds() + UInt64(seconds * 1e9)
        while monotonicNanoseconds() < end, rig.lost == 0, rig.isRunning {
            let operation: Operation
            switch Int.random(in: 0..<12, using: &random) {
            case 0..<5: operation = .merge
            case 5: operation = .zero
            case 6..<9: operation = .foldDiverged
            case 9: operation = .fold
            default: operation = frees ? .reset : .merge
            }
            var runs: [Run] = []
            for _ in 0..<Int.random(in: 1...8, using: &random) {
                let page = Int.random(in: 0..<pages, using: &random)
                let longest = min(8, pages - page)
                switch operation {
                case .merge, .zero:
                    // A guess, as an index's would be: the guest may write at any time.
                    let value = rig.byte(page)
                    guard value < Rig.values, operation == .merge || value == 0 else { continue }
                    var length = 0
                    while length < longest, rig.isPrivate(page + length), rig.byte(page + length) == value { length += 1 }
                    guard length > 0 else { continue }
                    let slot = operation == .merge ? UInt64(Int(value) * Rig.slotsEach) : 0
                    runs.append(Run(gfn: rig.gfn(page), pages: UInt32(length), slot: slot))
                case .reset:
                    if rig.claim(page) { runs.append(Run(gfn: rig.gfn(page))) }
                default:
                    runs.append(Run(gfn: rig.gfn(page), pages: UInt32(Int.random(in: 1...longest, using: &random))))
                }
            }
            if runs.isEmpty { continue }
            try? rig.connection.begin(operation, runs)
            guard let outcomes = try? rig.connection.end() else { break }
            for (run, outcome) in zip(runs, outcomes) {
                switch operation {
                case .merge: count.merged += Int(outcome.done)
                case .zero: count.zeroed += Int(outcome.done)
                case .fold, .foldDiverged: count.folded += Int(outcome.done)
                case .reset:
                    count.reset += Int(outcome.done)
                    let page = Int(run.gfn - Rig.firstGFN)
                    guard outcome.reason == .done else {
                        rig.release(page)
                        continue
                    }
                    try Memfd.punch(rig.ram.raw, offset: UInt64(page * Rig.page), byteCount: UInt64(Rig.page))
                    rig.recycled(page)
                case .recycle, .recycleAgain, .foldHeld: break
                }
                if outcome.reason == .differs { count.differed += 1 }
                if outcome.reason == .busy { count.busy += 1 }
                #expect([.done, .differs, .busy, .state].contains(outcome.reason), "\(operation): \(outcome)")
            }
        }
        let verdict = try rig.finish()
        print("\(kinds) \(options): \(verdict), \(rig.verified) verified, \(rig.written) written, \(rig.lost) lost, \(count)")
        return verdict
    }

    @Test func noByteIsWrong() throws {
        var count = Count()
        #expect(try stress("cfkrswm", seconds: 6 * Self.factor, ["free=1"], count: &count) == "good")
        #expect(count.merged > 100 && count.folded > 100 && count.reset > 10 && count.zeroed > 0 && count.differed > 0)
    }

    /// Kept off by the range lock that the interposer holds over each call.
    @Test func directIO() throws {
        var count = Count()
        #expect(try stress("ccdddd", seconds: 4 * Self.factor, pages: 2048, delay: 300, count: &count) == "good")
        #expect(count.merged > 50 && count.busy > 0)
    }

    // MARK: - Controls: most fail within a second, and are given time on a busy machine

    private static let patience = 60.0

    @Test func controlWithoutMinor() throws {
        var count = Count()
        #expect(try stress("ccckf", seconds: Self.patience, ["leave=\(Step.registerMinor.rawValue)"], count: &count) == "lost")
    }

    @Test func controlFoldWithoutWriteProtect() throws {
        var count = Count()
        #expect(try stress("ccckf", seconds: Self.patience, ["leave=\(Step.protect.rawValue)"], count: &count) == "lost")
    }

    @Test func controlAbortWithoutUnregister() throws {
        var count = Count()
        #expect(try stress("ccckf", seconds: Self.patience, ["leave=\(Step.unregister.rawValue)", "hang=2"], count: &count) == "hang")
    }

    @Test func controlWithoutWake() throws {
        var count = Count()
        #expect(try stress("ccckf", seconds: Self.patience, ["leave=\(Step.wake.rawValue)", "hang=2"], count: &count) == "hang")
    }

    /// It takes a thread that writes from the page to the memfd while the window is open on it.
    @Test func controlPunchBeforeWake() throws {
        var count = Count()
        let options = ["punch_early=1", "hang=2", "write=1"]
        #expect(try stress("wwwwww", seconds: Self.patience, pages: 64, delay: 300, options, count: &count) == "hang")
    }

    /// What a disk with cache=none would do to a guest without range lock and gate.
    @Test func controlDirectIOPastTheInterposer() throws {
        var count = Count()
        #expect(
            try stress("DDDDDDDD", seconds: Self.patience, pages: 64, delay: 500, ["write=1"], count: &count) == "lost")
    }
}
