import Logging
import Platform
import Synchronization

/// What can change while a VM runs.
public struct Tuning: Sendable, Equatable {
    public var periodMilliseconds: UInt32
    public var mergePeriodMilliseconds: UInt32
    /// Nil, of a request: leave it as it is, for somebody may have un-merged this VM by hand.
    public var merges: Bool?

    public init(periodMilliseconds: UInt64, mergePeriodMilliseconds: UInt64, merges: Bool?) {
        self.periodMilliseconds = UInt32(clamping: periodMilliseconds)
        self.mergePeriodMilliseconds = UInt32(clamping: mergePeriodMilliseconds)
        self.merges = merges
    }

    // MARK: As a request to a backend

    static let command = "tune"

    var request: String {
        "\(Self.command) \(periodMilliseconds) \(mergePeriodMilliseconds)" + (merges.map { $0 ? " merge" : " unmerge" } ?? "")
    }

    init(parsing words: ArraySlice<String>) throws(QuireError) {
        let words = Array(words)
        guard (2...3).contains(words.count), let period = UInt32(words[0]), let mergePeriod = UInt32(words[1]),
            words.count == 2 || words[2] == "merge" || words[2] == "unmerge"
        else {
            throw QuireError(.invalid, "'\(words.joined(separator: " "))' is no tuning: install the same release of quire and quire-backend")
        }
        periodMilliseconds = period
        mergePeriodMilliseconds = mergePeriod
        merges = words.count == 3 ? words[2] == "merge" : nil
    }
}

/// What a new look at the configuration says.
public struct Reloaded: Sendable {
    public var tuning: Tuning
    /// For people: what is different, a line each.
    public var lines: [String]
    public init(tuning: Tuning, lines: [String]) {
        self.tuning = tuning
        self.lines = lines
    }
}

/// The supervisor's second thread: takes `quire config reload`, has the configuration read again, tells the backend what changed, and
/// knows it for backends that are started later.
final class Tuner: Sendable {
    /// How long a backend may take to come, that was killed at this moment.
    private static let patienceNanoseconds: UInt64 = 10_000_000_000

    private struct State {
        /// What holds for a backend that is started now.
        var wanted: Tuning
        /// What the last one was told that answered.
        var merges: Bool?
        var server: CommandSocket.Server?
    }
    private let state: Mutex<State>
    private let isEnding = Monitor(false)
    private let name: String
    private let directory: RuntimeDirectory
    private let reload: (@Sendable () throws(QuireError) -> Reloaded)?
    private let log: @Sendable (String) -> Void

    /// What startBackend reads.
    var tuning: Tuning { state.withLock { $0.wanted } }

    init(_ configuration: Supervisor.Configuration, _ name: String, in directory: RuntimeDirectory) throws(QuireError) {
        let tuning = Tuning(
            periodMilliseconds: configuration.periodMilliseconds,
            mergePeriodMilliseconds: configuration.merging?.periodMilliseconds ?? configuration.periodMilliseconds,
            merges: configuration.merging?.isOn)
        state = Mutex(State(wanted: tuning, merges: tuning.merges))
        self.name = name
        self.directory = directory
        reload = configuration.reload
        log = configuration.log
        guard reload != nil else { return }
        // What there is to say, it says itself.
        let silence = Logger(label: "quire") { _ in SwiftLogNoOpLogHandler() }
        let server = try CommandSocket.Server(path: directory.supervisorPath(name), logger: silence) {
            [self] request throws(QuireError) in
            guard request.text == "reload" else {
                throw QuireError(.unsupported, "this supervisor does not know the command '\(request.text)'")
            }
            return try carryOut().joined(separator: "\n")
        }
        state.withLock { $0.server = server }
    }

    /// Has the thread wait for nobody any more.
    func stop() { isEnding.update { $0 = true } }

    /// Ends the thread, when the backend has ended.
    func end() {
        stop()
        state.withLock { $0.server.take() }?.end()
    }

    private func carryOut() throws(QuireError) -> [String] {
        guard let reload else { return [] }
        let result: Reloaded
        do throws(QuireError) { result = try reload() } catch {
            log("\(name): the configuration is not reloaded: \(error)")
            throw error
        }
        // First for whoever is started from now on, then for who runs: so none is left out.
        var request = result.tuning
        state.withLock { state in
            state.wanted = result.tuning
            if state.merges == result.tuning.merges { request.merges = nil }
        }
        for line in result.lines { log("\(name): \(line)") }
        let deadline = monotonicNanoseconds() + Self.patienceNanoseconds
        while true {
            do throws(QuireError) {
                try CommandSocket.ask(request.request, of: name, in: directory)
                state.withLock { $0.merges = result.tuning.merges }
                return result.lines
            } catch {
                guard error.code == .retry || error.code == .closed, monotonicNanoseconds() < deadline, !isEnding.read({ $0 }) else {
                    log("\(name): its backend was not told: \(error)")
                    throw error
                }
                _ = isEnding.wait(until: monotonicNanoseconds() + 100_000_000) { $0 ? () : nil }
            }
        }
    }
}
