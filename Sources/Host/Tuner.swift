import Engines
import Logging
import Platform
import Synchronization

/// What can change while a VM runs.
public struct Tuning: Sendable, Equatable {
    public var periodMilliseconds: UInt32
    public var mergePeriodMilliseconds: UInt32
    // Nil, of a request: as it is. A supervisor of an older release says less.
    /// Somebody may have un-merged this VM by hand.
    public var merges: Bool?
    public var workers: Int?
    public var mergeWorkers: Int?
    public var tracksWrites: Bool?
    public var logLevel: String?
    /// Nil: there is no swap disk.
    public var swap: Swap?
    /// Whom it shares pages with, and who counts what its swap disk takes.
    var place: StoreLink.Place?

    public struct Swap: Sendable, Equatable {
        public var compression = Tmem.Compression.lz4
        /// 1: none. Nil, of a request: somebody may have set the limit by hand.
        public var overcommit: Double?
        /// Bytes that are left to the host. Nil, of a request: as it is.
        public var reserve: UInt64?
        public init(compression: Tmem.Compression, overcommit: Double?, reserve: UInt64? = nil) {
            self.compression = compression
            self.overcommit = overcommit
            self.reserve = reserve
        }
    }

    public init(periodMilliseconds: UInt64, mergePeriodMilliseconds: UInt64, merges: Bool?) {
        self.periodMilliseconds = UInt32(clamping: periodMilliseconds)
        self.mergePeriodMilliseconds = UInt32(clamping: mergePeriodMilliseconds)
        self.merges = merges
    }

    /// `store`: of quired's socket; nil: where it is by default. `group`: the share group; empty: that of the VM's owner.
    public mutating func setPlace(store: String?, group: String) {
        place = StoreLink.Place(path: store ?? StoreLink.standardPath(), group: group)
    }

    // MARK: As a request to a backend

    static let command = "tune"

    package var request: String {
        var words = [Self.command, "\(periodMilliseconds)", "\(mergePeriodMilliseconds)"]
        if let merges { words.append(merges ? "merge" : "unmerge") }
        if let workers { words.append("workers=\(workers)") }
        if let mergeWorkers { words.append("merge-workers=\(mergeWorkers)") }
        if let tracksWrites { words.append("write-tracking=\(tracksWrites)") }
        if let logLevel { words.append("log-level=\(logLevel)") }
        if let swap {
            words.append("compression=\(SwapDisk.Options.name(of: swap.compression))")
            if let overcommit = swap.overcommit { words.append("overcommit=\(overcommit)") }
            if let reserve = swap.reserve { words.append("reserve=\(reserve)") }
        }
        if let place {
            words.append("group=\(place.group)")
            // Last: a path may have anything in it.
            words.append(Self.pathKey + place.path)
        }
        return words.joined(separator: " ")
    }

    private static let pathKey = "store="

    /// `text`: what follows the command.
    package init(parsing text: Substring) throws(QuireError) {
        func nonsense() -> QuireError {
            QuireError(.invalid, "'\(text.drop { $0 == " " })' is no tuning: install the same release of quire and quire-backend")
        }
        var head = text, group: String?, path: String?
        if let key = text.firstRange(of: " " + Self.pathKey) {
            (head, path) = (text[..<key.lowerBound], String(text[key.upperBound...]))
        }
        let words = head.split(separator: " ").map(String.init)
        guard words.count >= 2, let period = UInt32(words[0]), let mergePeriod = UInt32(words[1]) else { throw nonsense() }
        periodMilliseconds = period
        mergePeriodMilliseconds = mergePeriod
        for word in words.dropFirst(2) {
            let pair = word.split(separator: "=", maxSplits: 1, omittingEmptySubsequences: false).map(String.init), value = pair.last ?? ""
            switch (pair.first, pair.count) {
            case ("merge", 1): merges = true
            case ("unmerge", 1): merges = false
            case ("workers", 2): workers = Int(value)
            case ("merge-workers", 2): mergeWorkers = Int(value)
            case ("write-tracking", 2): tracksWrites = Bool(value)
            case ("log-level", 2): logLevel = Logger.Level(rawValue: value)?.rawValue
            case ("compression", 2): swap = Swap(compression: try SwapDisk.compression(value), overcommit: nil)
            case ("overcommit", 2): swap?.overcommit = try SwapDisk.checkOvercommit(Double(value), "overcommit=\(value)")
            case ("reserve", 2): swap?.reserve = try SwapDisk.checkReserve(UInt64(value), "reserve=\(value)")
            case ("group", 2): group = value
            default: throw nonsense()
            }
        }
        // What is no number is missing now.
        guard request.split(separator: " ").count + (group == nil ? 0 : 1) == words.count + 1, (group == nil) == (path == nil) else { throw nonsense() }
        if let group, let path { place = StoreLink.Place(path: path, group: group) }
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
        var told: Tuning
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
        var tuning = Tuning(
            periodMilliseconds: configuration.periodMilliseconds,
            mergePeriodMilliseconds: configuration.merging?.periodMilliseconds ?? configuration.periodMilliseconds,
            merges: configuration.merging?.isOn)
        tuning.workers = configuration.workers
        tuning.mergeWorkers = configuration.merging?.workers
        tuning.tracksWrites = configuration.merging?.tracksWrites
        tuning.logLevel = configuration.logLevel
        tuning.setPlace(store: configuration.store, group: configuration.merging?.group ?? "")
        tuning.swap = configuration.swap.map { Tuning.Swap(compression: $0.compression, overcommit: $0.overcommit ?? 1, reserve: $0.reserve) }
        state = Mutex(State(wanted: tuning, told: tuning))
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
            // A VM without a swap disk gets none of it.
            if state.wanted.swap == nil { request.swap = nil }
            state.wanted = request
            if state.told.merges == request.merges { request.merges = nil }
            if state.told.swap?.overcommit == request.swap?.overcommit { request.swap?.overcommit = nil }
        }
        for line in result.lines { log("\(name): \(line)") }
        let deadline = monotonicNanoseconds() + Self.patienceNanoseconds
        while true {
            do throws(QuireError) {
                try CommandSocket.ask(request.request, of: name, in: directory)
                state.withLock { $0.told = $0.wanted }
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
