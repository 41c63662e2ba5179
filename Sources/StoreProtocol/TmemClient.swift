import Platform

/// A connection to quired by which a store of transcendent memory asks what it may use of what all may use together. What it is
/// allowed holds as long as the connection. After any error that is of no more use.
public struct TmemClient: ~Copyable, Sendable {
    private let socket: UnixSocket

    /// `patienceMilliseconds`: how long it waits for a quired that accepts nobody.
    public init(path: String, patienceMilliseconds: Int32) throws(QuireError) {
        socket = try UnixSocket.connect(to: path, kind: .messages, patienceMilliseconds: patienceMilliseconds)
    }

    public borrowing func ask(_ use: StoreRequest.TmemUse) throws(QuireError) { try socket.sendMessage(StoreRequest.tmem(use).encoded()) }

    /// The answer to what was asked, once; nil: there is none yet.
    public borrowing func answer(patienceMilliseconds: Int32) throws(QuireError) -> StoreReply.TmemAllowed? {
        guard !waitReadable([socket.descriptor.raw], timeoutMilliseconds: patienceMilliseconds).isEmpty else { return nil }
        var none = UnixSocket.PassedDescriptors()
        guard case .allowed(let answer) = try StoreClient.receive(socket, 0, &none) else { throw StoreClient.unexpected }
        return answer
    }

    /// Whether there is something to read: between question and answer that is its end.
    public var hasNews: Bool { !waitReadable([socket.descriptor.raw], timeoutMilliseconds: 0).isEmpty }
}
