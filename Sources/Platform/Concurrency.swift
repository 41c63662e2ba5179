import CPlatform

/// Engines and rings run on threads of their own and block in system calls, which Swift's cooperative pool forbids; and
/// "stopped" must mean joined (DESIGN, Recycle: detach before answering). So: threads that can be joined, and a monitor.

/// A thread that its owner joins.
@safe public final class JoinableThread: Sendable {
    private let handle: pthread_t

    private final class Body: Sendable {
        let name: String
        let run: @Sendable () -> Void
        init(name: String, run: @escaping @Sendable () -> Void) {
            self.name = name
            self.run = run
        }
    }

    /// Starts the thread. `name` shows in `top -H`, up to 15 bytes. All signals are blocked in it but SIGBUS,
    /// which is no event but an access that failed: blocked, it could only kill (`TruncationAlarm`).
    public init(_ name: String, _ run: @escaping @Sendable () -> Void) throws(QuireError) {
        let body = unsafe Unmanaged.passRetained(Body(name: String(name.prefix(15)), run: run))
        var all = sigset_t(), old = sigset_t()
        unsafe sigfillset(&all)
        unsafe sigdelset(&all, SIGBUS)
        unsafe pthread_sigmask(SIG_SETMASK, &all, &old)
        var thread = pthread_t()
        // The retained body crosses to the new thread as an opaque pointer and is released there, once.
        let code = unsafe pthread_create(&thread, nil, { argument in
            let body = unsafe Unmanaged<Body>.fromOpaque(argument!).takeRetainedValue()
            unsafe cp_name_thread(body.name)
            body.run()
            return nil
        }, body.toOpaque())
        unsafe pthread_sigmask(SIG_SETMASK, &old, nil)
        guard code == 0 else {
            unsafe body.release()
            throw .system("cannot start thread \(name)", errno: code)
        }
        handle = thread
    }

    /// Waits until the thread has returned. Call it exactly once.
    public func join() { pthread_join(handle, nil) }
}

/// What `body` makes of `items`, in their order: of `few` of them at a time, on all CPUs where there are twice as many and more.
/// Each thread takes the next few when it is done with some: one that comes late, or has to share its CPU, keeps nobody waiting. And
/// what a few need of memory, the next few have again, which costs less than new memory does.
public func inParts<Item: Sendable, Made: Sendable>(
    _ items: [Item], few: Int, _ body: @escaping @Sendable (ArraySlice<Item>) -> [Made]
) -> [Made] {
    let parts = stride(from: 0, to: items.count, by: few).map { items[$0..<min($0 + few, items.count)] }
    let state = Monitor((next: 0, made: [[Made]](repeating: [], count: parts.count)))
    @Sendable func work() {
        while true {
            let index = state.read { state in
                defer { state.next += 1 }
                return state.next
            }
            guard index < parts.count else { return }
            let some = body(parts[index])
            state.read { $0.made[index] = some }
        }
    }
    // Where there is no thread to be had, this one does it all.
    let count = min(ProcessCalls.processorCount, 8, items.count / few)
    let threads = (1..<max(1, count)).compactMap { try? JoinableThread("part-\($0)", work) }
    work()
    for thread in threads { thread.join() }
    return state.read { $0.made }.flatMap { $0 }
}

/// A mutex with the state that it protects, and a condition to wait for a change of it.
@safe public final class Monitor<State>: @unchecked Sendable {
    // Both are initialized before `self` escapes, never moved (they live on the heap) and destroyed in deinit.
    private let mutex = UnsafeMutablePointer<pthread_mutex_t>.allocate(capacity: 1)
    private let changed = UnsafeMutablePointer<pthread_cond_t>.allocate(capacity: 1)
    private var state: State

    public init(_ state: sending State) {
        self.state = state
        var attributes = pthread_condattr_t()
        unsafe pthread_condattr_init(&attributes)
        unsafe pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC)
        unsafe pthread_cond_init(changed, &attributes)
        unsafe pthread_condattr_destroy(&attributes)
        unsafe pthread_mutex_init(mutex, nil)
    }

    deinit {
        unsafe pthread_cond_destroy(changed)
        unsafe pthread_mutex_destroy(mutex)
        unsafe changed.deallocate()
        unsafe mutex.deallocate()
    }

    /// Runs `body` under the lock and wakes every waiter afterwards.
    public func update<R, E: Error>(_ body: (inout State) throws(E) -> R) throws(E) -> R {
        unsafe pthread_mutex_lock(mutex)
        defer {
            // The lock first: who wakes wants it.
            unsafe pthread_mutex_unlock(mutex)
            unsafe pthread_cond_broadcast(changed)
        }
        return try body(&state)
    }

    /// Runs `body` under the lock; nobody is woken.
    public func read<R, E: Error>(_ body: (inout State) throws(E) -> R) throws(E) -> R {
        unsafe pthread_mutex_lock(mutex)
        defer { unsafe pthread_mutex_unlock(mutex) }
        return try body(&state)
    }

    /// Waits until `body` returns a value, at most until `deadline` (CLOCK_MONOTONIC, nanoseconds; nil: for ever).
    /// `body` runs under the lock, first at once, then after every change. Nil when the deadline has passed.
    public func wait<R>(until deadline: UInt64? = nil, _ body: (inout State) -> R?) -> R? {
        unsafe pthread_mutex_lock(mutex)
        defer { unsafe pthread_mutex_unlock(mutex) }
        while true {
            if let result = body(&state) { return result }
            if let deadline {
                var time = timespec(tv_sec: Int(deadline / 1_000_000_000), tv_nsec: Int(deadline % 1_000_000_000))
                if unsafe pthread_cond_timedwait(changed, mutex, &time) == ETIMEDOUT { return body(&state) }
            } else {
                unsafe pthread_cond_wait(changed, mutex)
            }
        }
    }
}

/// CLOCK_MONOTONIC in nanoseconds.
public func monotonicNanoseconds() -> UInt64 { cp_clock_ns(CLOCK_MONOTONIC) }

/// CPU time that this process has used, all threads, in nanoseconds.
public func processCPUNanoseconds() -> UInt64 { cp_clock_ns(CLOCK_PROCESS_CPUTIME_ID) }

/// CPU time that this thread has used, in nanoseconds.
public func threadCPUNanoseconds() -> UInt64 { cp_clock_ns(CLOCK_THREAD_CPUTIME_ID) }

/// A full memory barrier: orders our stores before our loads, as the notification rules of a virtqueue require.
@inline(__always) public func memoryFence() { cp_fence() }
