import Platform
import Synchronization

/// A backend's side of one shared disk. Thread-safe; one request at a time.
///
/// quired may be away at any moment: whoever calls then gets `.retry` within a tenth of a second and calls again. All
/// operations may be repeated: putting a page twice, or reading or flushing it, changes nothing.
public final class SharedDiskClient: Sendable {
    private final class Connection: Sendable {
        let socket: UnixSocket
        init(_ socket: consuming UnixSocket) { self.socket = socket }
    }

    private final class Window: Sendable {
        let mapping: Mapping
        init(_ mapping: consuming Mapping) { self.mapping = mapping }
    }

    private enum Link {
        case none
        /// HELLO was sent.
        case waiting(Connection)
        case ready(Connection, Window)
    }

    private struct State {
        var link = Link.none
        var number: UInt64 = 0
        /// Asked, not answered yet; and since when.
        var outstanding: (SharedDiskMessage.Request, UInt64)?
        var identity: SharedDiskMessage.Welcome?
        /// For ever: what the disk had is gone, or quired does not let us in.
        var refusal: QuireError?
        var isAway = false
    }

    private let path: String
    private let hello: SharedDiskMessage.Hello
    private let notice: @Sendable (String) -> Void
    private let state: Mutex<State>

    private static let sliceMilliseconds: Int32 = 40
    /// A quired that stands still for so long is left, and asked again on another connection.
    private static let patience: UInt64 = 2_000_000_000

    /// `expected`: what an earlier connection was told of the disk. `notice`: one line, when quired goes away and comes back.
    public init(
        path: String, _ hello: SharedDiskMessage.Hello, expected: SharedDiskMessage.Welcome? = nil,
        notice: @escaping @Sendable (String) -> Void = { _ in }
    ) {
        self.path = path
        self.hello = hello
        self.notice = notice
        var first = State()
        first.identity = expected
        state = Mutex(first)
    }

    /// Where quired serves shared disks, by the path of its store's socket.
    public static func path(besideStore store: String) -> String {
        (store.lastIndex(of: "/").map { String(store[...$0]) } ?? "") + "disks.sock"
    }

    /// Connects, for at most so long, and says what the disk is.
    public func attach(patienceMilliseconds: UInt64) throws(QuireError) -> SharedDiskMessage.Welcome {
        let deadline = monotonicNanoseconds() + patienceMilliseconds * 1_000_000
        while true {
            do throws(QuireError) {
                return try state.withLock { (state) throws(QuireError) in
                    try connect(&state)
                    return state.identity!
                }
            } catch {
                guard error.code == .retry else { throw error }
                guard monotonicNanoseconds() < deadline else {
                    throw QuireError(.closed, "no quired serves shared disks at \(path): start it with --shared-disk \(hello.name),size=SIZE", cause: error.cause)
                }
            }
        }
    }

    /// At most `SharedDiskMessage.windowPages` pages. Throws `.noSpace` when some found no room.
    public func put(_ page: UInt64, _ bytes: [UInt8]) throws(QuireError) {
        let count = bytes.count / SharedDiskMessage.pageBytes
        try request(
            .put, page, count, before: { $0.copyIn(0, bytes) }, isSame: { $0.copyOut(0, count: bytes.count) == bytes },
            after: { _ in })
    }

    /// The same; pages that are not there are zeros.
    public func get(_ page: UInt64, count: Int) throws(QuireError) -> [UInt8] {
        // What was read for somebody who has given up may be old by now.
        try request(.get, page, count, before: { _ in }, isSame: { _ in false }) { $0.copyOut(0, count: count * SharedDiskMessage.pageBytes) }
    }

    public func flush(_ page: UInt64, count: UInt64) throws(QuireError) {
        var page = page, left = count
        while left > 0 {
            let here = min(left, UInt64(UInt32.max))
            try request(.flush, page, Int(here), before: { _ in }, isSame: { _ in true }, after: { _ in })
            page += here
            left -= here
        }
    }

    /// `isSame`: whether an answer to the same request of a moment ago is one to this.
    private func request<R: Sendable>(
        _ operation: SharedDiskMessage.Operation, _ page: UInt64, _ count: Int, before: (borrowing Mapping) -> Void,
        isSame: (borrowing Mapping) -> Bool, after: (borrowing Mapping) -> R
    ) throws(QuireError) -> R {
        try state.withLock { (state) throws(QuireError) in
            try connect(&state)
            let window: Window, status: SharedDiskMessage.Status
            do throws(QuireError) {
                guard case .ready(let connection, let ours) = state.link else { throw Self.away(nil) }
                window = ours
                var answer: SharedDiskMessage.Status?
                var wanted = SharedDiskMessage.Request(operation, page: page, count: UInt32(count), number: state.number)
                // Somebody gave up waiting, in all likelihood the same caller: what it asked for is answered.
                if let (earlier, since) = state.outstanding {
                    guard let reply = try Self.receive(connection.socket, number: earlier.number) else {
                        guard monotonicNanoseconds() - since < Self.patience else {
                            throw QuireError(.closed, "quired does not answer")
                        }
                        throw Self.away(nil)
                    }
                    state.outstanding = nil
                    wanted.number = earlier.number
                    answer = wanted == earlier && isSame(window.mapping) ? reply : nil
                }
                if answer == nil {
                    state.number += 1
                    wanted.number = state.number
                    before(window.mapping)
                    try connection.socket.sendMessage(wanted.encoded())
                    answer = try Self.receive(connection.socket, number: wanted.number)
                    if answer == nil { state.outstanding = (wanted, monotonicNanoseconds()) }
                }
                guard let answer else { throw Self.away(nil) }
                status = answer
            } catch {
                if error.code == .retry { throw error }
                state.link = .none
                state.outstanding = nil
                note(away: error, &state)
                throw Self.away(error)
            }
            return try finish(status, page, window, after)
        }
    }

    private func finish<R: Sendable>(
        _ status: SharedDiskMessage.Status, _ page: UInt64, _ window: Window, _ after: (borrowing Mapping) -> R
    ) throws(QuireError) -> R {
        switch status {
        case .done: return after(window.mapping)
        case .noSpace: throw QuireError(.noSpace, "the shared disk '\(hello.name)' has no room")
        case .damaged: throw QuireError(.invalid, "the shared disk '\(hello.name)' is damaged at or behind page \(page)")
        }
    }

    private static func away(_ cause: QuireError?) -> QuireError { QuireError(.retry, "quired is away", cause: cause) }

    /// What became of a request; nil when nothing came for a while.
    private static func receive(
        _ socket: borrowing UnixSocket, number: UInt64
    ) throws(QuireError) -> SharedDiskMessage.Status? {
        guard !waitReadable([socket.descriptor.raw], timeoutMilliseconds: sliceMilliseconds).isEmpty else { return nil }
        var none = UnixSocket.PassedDescriptors()
        guard let bytes = try socket.receiveMessage(limit: SharedDiskMessage.maxBytes, maxDescriptors: 1, into: &none) else {
            throw QuireError(.closed, "quired has closed the connection")
        }
        if let text = SharedDiskMessage.error(bytes) { throw QuireError(.invalid, text) }
        let reply: SharedDiskMessage.Reply
        do throws(ProtocolViolation) { reply = try SharedDiskMessage.Reply(bytes) } catch {
            throw QuireError(.invalid, "quired answered nonsense: \(error)")
        }
        guard reply.number == number else { throw QuireError(.invalid, "quired answered another request") }
        return reply.status
    }

    private func note(away error: QuireError, _ state: inout State) {
        if !state.isAway { notice("the shared disk '\(hello.name)' waits for quired: \(error)") }
        state.isAway = true
    }

    /// Gets as far as `.ready`, or throws: `.retry` when it takes longer.
    private func connect(_ state: inout State) throws(QuireError) {
        if let refusal = state.refusal { throw refusal }
        if case .ready = state.link { return }
        if case .none = state.link {
            do throws(QuireError) {
                let socket = try UnixSocket.connect(to: path, kind: .messages)
                try socket.sendMessage(hello.encoded())
                state.link = .waiting(Connection(socket))
            } catch {
                note(away: error, &state)
                ProcessCalls.sleep(milliseconds: UInt32(Self.sliceMilliseconds))
                throw Self.away(error)
            }
        }
        guard case .waiting(let connection) = state.link else { throw Self.away(nil) }
        guard !waitReadable([connection.socket.descriptor.raw], timeoutMilliseconds: Self.sliceMilliseconds).isEmpty else {
            throw Self.away(nil)
        }
        state.link = .none
        var descriptors = UnixSocket.PassedDescriptors()
        let bytes: [UInt8]
        do throws(QuireError) {
            guard
                let got = try connection.socket.receiveMessage(limit: SharedDiskMessage.maxBytes, maxDescriptors: 1, into: &descriptors)
            else { throw QuireError(.closed, "quired has closed the connection") }
            bytes = got
        } catch {
            note(away: error, &state)
            ProcessCalls.sleep(milliseconds: UInt32(Self.sliceMilliseconds))
            throw Self.away(error)
        }
        func refuse(_ text: String) -> QuireError {
            let error = QuireError(.invalid, text)
            state.refusal = error
            notice(text)
            return error
        }
        if let text = SharedDiskMessage.error(bytes) { throw refuse("quired: \(text)") }
        let welcome: SharedDiskMessage.Welcome
        do throws(ProtocolViolation) { welcome = try SharedDiskMessage.Welcome(bytes) } catch {
            throw refuse("quired answered nonsense: \(error)")
        }
        if let known = state.identity, known != welcome {
            throw refuse("quired has lost what was on the shared disk '\(hello.name)': every request is an I/O error from now on")
        }
        guard let file = descriptors.next() else { throw refuse("quired passed no window") }
        let size = SharedDiskMessage.windowPages * SharedDiskMessage.pageBytes
        guard try file.status().byteCount >= UInt64(size) else { throw refuse("quired passed a window that is too small") }
        state.link = .ready(connection, Window(try Mapping(file, byteCount: size)))
        state.identity = welcome
        if state.isAway { notice("the shared disk '\(hello.name)' goes on") }
        state.isAway = false
    }
}
