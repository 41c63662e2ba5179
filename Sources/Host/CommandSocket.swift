import Logging
import Platform

/// Where `quire` asks the back end of a VM for something, or its supervisor, or quired: a socket in a folder that its owner alone can
/// enter. One message a request: words, and descriptors with some. One a reply: `=` and the answer, mostly none, or `!` and one line
/// that says why not.
public enum CommandSocket {
    private static let limit = 4096
    private static let answerLimit = 1 << 17
    private static let maxDescriptors = 1

    /// What was asked, for the thread that serves it.
    public struct Request: ~Copyable {
        public let text: String
        fileprivate var descriptors = UnixSocket.PassedDescriptors()
        /// Becomes readable when the server shall end: what takes long gives up then.
        public let cancel: Int32

        /// The file that came with it.
        public mutating func takeFile() throws(QuireError) -> Descriptor {
            guard let file = descriptors.next() else { throw QuireError(.invalid, "'\(text)' comes with a file") }
            return file
        }
    }

    /// Serves requests until it is ended.
    public final class Server: Sendable {
        private let path: String
        private let listener: UnixSocket
        private let stop: EventDescriptor
        private let thread = Monitor<JoinableThread?>(nil)

        /// `mode`: of the socket, where others may enter the folder.
        public init(
            path: String, mode: UInt32? = nil, logger: Logger, _ handle: @escaping @Sendable (inout Request) throws(QuireError) -> String
        ) throws(QuireError) {
            self.path = path
            listener = try UnixSocket.listen(at: path, kind: .messages)
            if let mode { try Files.setAccess(path, mode: mode) }
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
            _ connection: borrowing UnixSocket, _ logger: Logger, _ handle: (inout Request) throws(QuireError) -> String
        ) {
            // Who says nothing holds up others for a second only.
            guard !waitReadable([connection.descriptor.raw], timeoutMilliseconds: 1000).isEmpty else { return }
            var descriptors = UnixSocket.PassedDescriptors()
            guard
                let bytes = try? connection.receiveMessage(
                    limit: CommandSocket.limit, maxDescriptors: CommandSocket.maxDescriptors, into: &descriptors)
            else { return }
            var request = Request(
                text: String(decoding: bytes, as: UTF8.self), descriptors: descriptors, cancel: stop.descriptor.raw)
            var answer: String
            do throws(QuireError) {
                answer = "=" + (try handle(&request))
                logger.info("command \(request.text): done")
            } catch {
                answer = "!\(error)"
                logger.info("command \(request.text): \(error)")
            }
            try? connection.sendMessage(Array(answer.utf8))
        }

        /// Whoever was asked something by then has answered. `keepsPath`: another process is about to listen there; until it does, whoever
        /// asks is told to try again.
        public func end(keepsPath: Bool = false) {
            stop.signal()
            thread.update { started in
                started?.join()
                started = nil
            }
            if !keepsPath { Files.remove(path) }
        }
    }

    /// Has a running VM's back end carry out a request; returns its answer, throws what it says. `passing`: a file for it,
    /// borrowed. `patienceMilliseconds`: -1 is for as long as it takes.
    @discardableResult public static func ask(
        _ request: String, of name: String, in directory: RuntimeDirectory, passing: [Int32] = [],
        patienceMilliseconds: Int32 = 60_000
    ) throws(QuireError) -> String {
        guard directory.isRunning(name) else {
            throw QuireError(.invalid, "no VM '\(name)' is running: quire status lists those that are")
        }
        return try ask(
            request, at: directory.commandPath(name), name, "the backend of '\(name)'", passing: passing,
            patienceMilliseconds: patienceMilliseconds)
    }

    /// The same of whoever listens at `path`, which may be nobody for a moment (`.retry`). `name` and `who`: for messages.
    @discardableResult public static func ask(
        _ request: String, at path: String, _ name: String, _ who: String, passing: [Int32] = [], patienceMilliseconds: Int32
    ) throws(QuireError) -> String {
        let socket: UnixSocket
        do throws(QuireError) { socket = try UnixSocket.connect(to: path, kind: .messages) } catch {
            throw QuireError(.retry, "\(who) cannot be reached: try again in a moment", cause: error)
        }
        try socket.sendMessage(Array(request.utf8), passing: passing)
        guard !waitReadable([socket.descriptor.raw], timeoutMilliseconds: patienceMilliseconds).isEmpty else {
            throw QuireError(.busy, "\(who) has not answered within \(patienceMilliseconds / 1000) s")
        }
        var none = UnixSocket.PassedDescriptors()
        guard let bytes = try socket.receiveMessage(limit: answerLimit, maxDescriptors: 0, into: &none), let mark = bytes.first else {
            throw QuireError(.closed, "\(who) went away: try again")
        }
        let text = String(decoding: bytes.dropFirst(), as: UTF8.self)
        guard mark == UInt8(ascii: "=") else { throw QuireError(.busy, "\(name): \(text)") }
        return text
    }
}
