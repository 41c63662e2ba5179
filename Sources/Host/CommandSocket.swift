import Logging
import Platform

/// Where `quire` asks the back end of a VM for something: a socket in the VM's folder, which its owner alone can enter. One
/// message a request, a word; one a reply: nothing if it is done, or one line that says why not.
public enum CommandSocket {
    private static let limit = 4096

    /// Serves requests until it is ended.
    public final class Server: Sendable {
        private let path: String
        private let listener: UnixSocket
        private let stop: EventDescriptor
        private let thread = Monitor<JoinableThread?>(nil)

        public init(
            path: String, logger: Logger, _ handle: @escaping @Sendable (String) throws(QuireError) -> Void
        ) throws(QuireError) {
            self.path = path
            listener = try UnixSocket.listen(at: path, kind: .messages)
            try Descriptor.makeNonblocking(listener.descriptor.raw)
            stop = try EventDescriptor()
            let started = try JoinableThread("command") { [self] in
                while !waitReadable([listener.descriptor.raw, stop.descriptor.raw]).contains(1) {
                    guard let connection = try? listener.accept() else { continue }
                    serve(connection, logger, handle)
                }
            }
            thread.update { $0 = started }
        }

        private func serve(
            _ connection: borrowing UnixSocket, _ logger: Logger, _ handle: (String) throws(QuireError) -> Void
        ) {
            // Who says nothing holds up others for a second only.
            guard !waitReadable([connection.descriptor.raw], timeoutMilliseconds: 1000).isEmpty else { return }
            var none = UnixSocket.PassedDescriptors()
            guard let bytes = try? connection.receiveMessage(limit: CommandSocket.limit, maxDescriptors: 0, into: &none)
            else { return }
            let request = String(decoding: bytes, as: UTF8.self)
            var answer = ""
            do throws(QuireError) {
                try handle(request)
                logger.info("command \(request): done")
            } catch {
                answer = "\(error)"
                logger.info("command \(request): \(error)")
            }
            // A message of no bytes would look like the end of the connection.
            try? connection.sendMessage(Array("=\(answer)".utf8))
        }

        public func end() {
            stop.signal()
            thread.update { started in
                started?.join()
                started = nil
            }
            Files.remove(path)
        }
    }

    /// Has a running VM's back end carry out a request; throws what it says.
    public static func ask(
        _ request: String, of name: String, in directory: RuntimeDirectory, patienceMilliseconds: Int32 = 60_000
    ) throws(QuireError) {
        guard directory.isRunning(name) else {
            throw QuireError(.invalid, "no VM '\(name)' is running: quire status lists those that are")
        }
        let socket: UnixSocket
        do throws(QuireError) { socket = try UnixSocket.connect(to: directory.commandPath(name), kind: .messages) } catch {
            throw QuireError(.busy, "the backend of '\(name)' cannot be reached: try again in a moment", cause: error)
        }
        try socket.sendMessage(Array(request.utf8))
        guard !waitReadable([socket.descriptor.raw], timeoutMilliseconds: patienceMilliseconds).isEmpty else {
            throw QuireError(.busy, "the backend of '\(name)' has not answered within \(patienceMilliseconds / 1000) s")
        }
        var none = UnixSocket.PassedDescriptors()
        guard let bytes = try socket.receiveMessage(limit: limit, maxDescriptors: 0, into: &none), bytes.first == 61 else {
            throw QuireError(.closed, "the backend of '\(name)' went away: try again")
        }
        guard bytes.count == 1 else { throw QuireError(.busy, "\(name): " + String(decoding: bytes.dropFirst(), as: UTF8.self)) }
    }
}
