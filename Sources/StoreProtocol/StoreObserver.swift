import Platform

/// Asks quired for figures, again and again, over one connection.
///
/// A quired that is stopped must not stop whoever watches it. So no question waits longer than its patience, and while a
/// reply is owed no further connection is made: connecting to a socket whose backlog is full would wait for ever.
public struct StoreObserver: ~Copyable, Sendable {
    private final class Connection: Sendable {
        let socket: UnixSocket
        init(_ path: String) throws(QuireError) { socket = try UnixSocket.connect(to: path, kind: .messages) }
    }

    public let path: String
    private let patience: Int32
    private var connection: Connection?
    /// Replies to questions that were given up.
    private var owed = 0

    public init(path: String, patienceMilliseconds: Int32 = 2_000) {
        self.path = path
        patience = patienceMilliseconds
    }

    /// Of the whole host.
    public mutating func figures() throws(QuireError) -> StoreFigures {
        guard case .figures(let figures) = try exchange(.status(zeroPages: 0)) else { throw StoreClient.unexpected }
        return figures
    }

    /// Of every share group.
    public mutating func groups() throws(QuireError) -> [GroupFigures] {
        var all: [GroupFigures] = []
        while true {
            guard case .groups(let more) = try exchange(.groups(passingOver: all.count)) else { throw StoreClient.unexpected }
            all += more
            if more.count < StoreReply.maxGroups { return all }
        }
    }

    /// What all stores of transcendent memory may use together, and are allowed.
    public mutating func tmem() throws(QuireError) -> StoreReply.TmemAllowed {
        guard case .allowed(let tmem) = try exchange(.tmem(StoreRequest.TmemUse())) else { throw StoreClient.unexpected }
        return tmem
    }

    private mutating func exchange(_ request: StoreRequest) throws(QuireError) -> StoreReply {
        let deadline = monotonicNanoseconds() + UInt64(patience) * 1_000_000
        let connection: Connection
        if let known = self.connection { connection = known } else {
            connection = try Connection(path)
            self.connection = connection
            owed = 0
        }
        do throws(QuireError) {
            while owed > 0 {
                guard try reply(connection, deadline) != nil else { throw silence }
                owed -= 1
            }
            try connection.socket.sendMessage(request.encoded())
            owed = 1
            guard let reply = try reply(connection, deadline) else { throw silence }
            owed = 0
            return reply
        } catch {
            // Only a silent quired keeps its connection.
            if owed == 0 || error.code != .busy { self.connection = nil }
            throw error
        }
    }

    private var silence: QuireError { QuireError(.busy, "quired did not answer for \(patience) ms") }

    /// Nil if none came in time.
    private func reply(_ connection: Connection, _ deadline: UInt64) throws(QuireError) -> StoreReply? {
        let now = monotonicNanoseconds()
        let left = now < deadline ? Int32((deadline - now) / 1_000_000) : 0
        guard !waitReadable([connection.socket.descriptor.raw], timeoutMilliseconds: left).isEmpty else { return nil }
        var none = UnixSocket.PassedDescriptors()
        return try StoreClient.receive(connection.socket, patience, &none)
    }
}
