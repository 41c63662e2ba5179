import Host
import Platform
import StoreProtocol

/// Reads what there is to read, on a thread of its own: when somebody asks, and at even distances for the history.
///
/// Whoever asks gets an answer that is at most `maxAge` old. So however many ask, the VMs' pages are read twice a second
/// at most.
public final class Collector: Sendable {
    /// What there is to tell.
    public struct Findings: Sendable {
        public var host = HostSnapshot()
        public var history: History
    }

    public typealias Answer = @Sendable (Findings) -> Void

    private struct State {
        var waiting: [Answer] = []
        var news = News()
        var isEnded = false
    }

    /// What is to be in place of what there is.
    private struct News {
        var history: History?
        var directories: RuntimeDirectories?
        var storePath: String?
        var isNone: Bool { history == nil && directories == nil && storePath == nil }
    }

    private let state: Monitor<State>
    private let thread: JoinableThread
    private static let maxAge: UInt64 = 500_000_000

    public init(
        _ directories: RuntimeDirectories, storePath: String, history: History = History()
    ) throws(QuireError) {
        let state = Monitor(State())
        self.state = state
        thread = try JoinableThread("collector") {
            Self.work(directories, StoreObserver(path: storePath), history, state)
        }
    }

    /// Calls `answer` once, on the collector's thread; not at all once it has ended.
    public func ask(_ answer: @escaping Answer) { state.update { $0.waiting.append(answer) } }

    /// Begins anew with the pictures, at other distances.
    public func setHistory(_ history: History) { state.update { $0.news.history = history } }

    /// Looks for VMs there from now on.
    public func setDirectories(_ directories: RuntimeDirectories) { state.update { $0.news.directories = directories } }

    /// Asks the quired at this socket from now on.
    public func setStore(path: String) { state.update { $0.news.storePath = path } }

    /// Call it once.
    public func end() {
        state.update { $0.isEnded = true }
        thread.join()
    }

    private static func work(
        _ first: RuntimeDirectories, _ observer: consuming StoreObserver, _ history: History, _ state: Monitor<State>
    ) {
        var directories = first
        var store = observer
        var found = Findings(history: history)
        var readAt: UInt64 = 0
        var nextSample = monotonicNanoseconds()
        while true {
            // Nil: it is time for a sample.
            let asked = state.wait(until: nextSample) { state -> (answers: [Answer], news: News, isEnd: Bool)? in
                guard state.isEnded || !state.waiting.isEmpty || !state.news.isNone else { return nil }
                defer { (state.waiting, state.news) = ([], News()) }
                return (state.waiting, state.news, state.isEnded)
            }
            if asked?.isEnd == true { return }
            if let history = asked?.news.history {
                found.history = history
                nextSample = monotonicNanoseconds()
            }
            // What was read elsewhere is no answer any more.
            if let new = asked?.news.directories { (directories, readAt) = (new, 0) }
            if let path = asked?.news.storePath {
                store = StoreObserver(path: path)
                readAt = 0
            }
            let now = monotonicNanoseconds()
            if asked == nil || readAt == 0 || now - readAt > maxAge {
                found.host = HostSnapshot.read(directories, store: &store)
                readAt = monotonicNanoseconds()
            }
            if now >= nextSample {
                found.history.add(found.host)
                nextSample = max(nextSample + found.history.intervalMilliseconds * 1_000_000, now)
            }
            for answer in asked?.answers ?? [] { answer(found) }
        }
    }
}
