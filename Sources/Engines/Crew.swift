import Platform
import Synchronization

/// Work that several threads can share: each takes a part of it as long as there is some.
protocol CrewWork: AnyObject, Sendable {
    /// Works until nothing is left or it is cancelled. `helpWanted` is to be called, once at most, when there is so much
    /// to do that other threads would help.
    func work(as worker: Int, helpWanted: () -> Void)
}

/// The threads of an engine. The caller of `run` works, too, and asks for the others when there is much to do.
final class Crew: Sendable {
    private struct State {
        var work: (any CrewWork)?
        /// Counts works that were opened to the helpers; each helper joins a work once.
        var generation = 0
        var inside = 0
        /// Threads with a higher number end when they are inside no work.
        var helpers: Int
    }
    private let name: String
    private let monitor = Monitor(State(helpers: 0))
    /// In the order of their numbers, which begin with 1.
    private let threads = Mutex<[JoinableThread]>([])

    init(_ name: String, helpers: Int) throws(QuireError) {
        self.name = name
        try setHelpers(helpers)
    }

    /// So many from now on. Returns when those that are too many have ended, which they do when they are inside no work.
    func setHelpers(_ count: Int) throws(QuireError) {
        try threads.withLock { (threads) throws(QuireError) in
            monitor.update { $0.helpers = count }
            while threads.count > count { threads.removeLast().join() }
            while threads.count < count {
                let number = threads.count + 1
                threads.append(try JoinableThread("\(name)-\(number)") { [self] in help(as: number) })
            }
        }
    }

    private func help(as worker: Int) {
        var seen = 0
        while true {
            let next = monitor.wait { state -> (any CrewWork)?? in
                if worker > state.helpers { return .some(nil) }
                guard let work = state.work, state.generation != seen else { return nil }
                seen = state.generation
                state.inside += 1
                return work
            }
            guard let work = next ?? nil else { return }
            work.work(as: worker, helpWanted: {})
            monitor.update { $0.inside -= 1 }
        }
    }

    /// Runs a work to its end; no thread is inside it when this returns.
    func run(_ work: any CrewWork) {
        work.work(as: 0) {
            monitor.update {
                $0.work = work
                $0.generation += 1
            }
        }
        _ = monitor.wait { state -> Void? in
            state.work = nil
            return state.inside == 0 ? () : nil
        }
    }

    func end() {
        threads.withLock { threads in
            monitor.update { $0.helpers = 0 }
            for thread in threads { thread.join() }
            threads = []
        }
    }
}
