import Metrics
import NIOCore
import NIOHTTP1
import NIOPosix
import Platform
import Synchronization

/// HTTP/1.1 on sockets, for reading only: SwiftNIO parses, `Web` answers.
///
/// Anybody who can connect may send anything, so everything has a bound: connections, the size of a request, the time
/// that a request may take to arrive and an answer to be taken. A request that breaks one gets one clear line, and its
/// connection ends; the others go on.
final class WebServer {
    enum Address {
        case tcp(SocketAddress)
        /// A descriptor of a socket that listens; it is closed at the end.
        case unix(Int32)
    }

    /// An address that is listened on, and the connections that were made there.
    final class Listener: Sendable {
        fileprivate final class Connections: Sendable {
            private let channels = Mutex<[ObjectIdentifier: any Channel]>([:])
            func enter(_ channel: any Channel) { channels.withLock { $0[ObjectIdentifier(channel)] = channel } }
            func leave(_ channel: any Channel) { channels.withLock { $0[ObjectIdentifier(channel)] = nil } }
            func takeAll() -> [any Channel] {
                channels.withLock { channels in
                    defer { channels = [:] }
                    return Array(channels.values)
                }
            }
        }

        private let channel: any Channel
        private let connections: Connections

        fileprivate init(_ channel: any Channel, _ connections: Connections) {
            self.channel = channel
            self.connections = connections
        }

        /// Where it listens.
        var address: SocketAddress? { channel.localAddress }

        /// Nobody connects here any more. Connections that wait for a request end at once, others with the answer that they wait for: who
        /// may not connect any more may not ask on one that he has kept, either.
        func close() {
            try? channel.close().wait()
            // The thread that closed it makes the connections, too, so all of them are known by now.
            for connection in connections.takeAll() { connection.pipeline.fireUserInboundEventTriggered(ChannelShouldQuiesceEvent()) }
        }
    }

    /// How many connections there are at one address.
    final class Count: Sendable {
        private let value = Mutex(0)
        func enter() -> Bool { value.withLock { if $0 < Bounds.connections { $0 += 1; return true } else { return false } } }
        func leave() { value.withLock { $0 -= 1 } }
    }

    /// What holds at one address. It may change at any time: the next request is the first that it holds for, on open connections, too.
    final class Rules: Sendable {
        struct Values: Sendable {
            var gate: Gate
            /// For a request to be complete, from the connection or the last answer on; and again for its answer to be made and taken.
            var patience: TimeAmount
        }
        private let values: Mutex<Values>
        init(_ values: Values) { self.values = Mutex(values) }
        var current: Values {
            get { values.withLock { $0 } }
            set { values.withLock { $0 = newValue } }
        }
    }

    enum Bounds {
        static let connections = 256
        /// Of one header, its name and value, or of the target.
        static let fieldBytes = 8192
        static let headerBytes = 32_768
        static let headers = 64
    }

    /// One thread: what takes time is done on the collector's.
    private let group = MultiThreadedEventLoopGroup(numberOfThreads: 1)
    private let web: Web

    init(_ web: Web) { self.web = web }

    /// Listens until it is closed, or all of this is ended.
    func listen(on address: Address, _ rules: Rules) throws -> Listener {
        // Of this address alone: who keeps all connections of one busy keeps nobody from the other.
        let web = self.web, count = Count(), connections = Listener.Connections()
        let bootstrap = ServerBootstrap(group: group)
            .serverChannelOption(.backlog, value: 128)
            .serverChannelOption(.socketOption(.so_reuseaddr), value: 1)
            .childChannelInitializer { channel in
                channel.eventLoop.makeCompletedFuture {
                    guard count.enter() else {
                        try channel.pipeline.syncOperations.addHandler(Refusal())
                        return
                    }
                    connections.enter(channel)
                    channel.closeFuture.whenComplete { _ in
                        count.leave()
                        connections.leave(channel)
                    }
                    var limits = NIOHTTPDecoderLimitConfiguration()
                    limits.maxHeaderFieldSize = Bounds.fieldBytes
                    limits.maxHeaderListSize = Bounds.headerBytes
                    limits.maxHeaderFieldCount = Bounds.headers
                    try channel.pipeline.syncOperations.configureHTTPServerPipeline(
                        withErrorHandling: false, withEncoderConfiguration: .init(), withDecoderLimitConfiguration: limits)
                    try channel.pipeline.syncOperations.addHandler(Conversation(web, rules))
                }
            }
        let channel =
            switch address {
            case .tcp(let address): try bootstrap.bind(to: address).wait()
            case .unix(let raw): try bootstrap.withBoundSocket(raw).wait()
            }
        return Listener(channel, connections)
    }

    func end() { try? group.syncShutdownGracefully() }
}

/// Of a connection too many.
private final class Refusal: ChannelInboundHandler {
    typealias InboundIn = ByteBuffer
    typealias OutboundOut = ByteBuffer

    func channelActive(context: ChannelHandlerContext) {
        let line = "there are too many connections: try again later\n"
        let text =
            "HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nRetry-After: 10\r\nContent-Type: text/plain; charset=utf-8\r\n"
            + "Content-Length: \(line.utf8.count)\r\n\r\n" + line
        let bound = NIOLoopBound(context, eventLoop: context.eventLoop)
        context.writeAndFlush(Self.wrapOutboundOut(context.channel.allocator.buffer(string: text)))
            .whenComplete { _ in bound.value.close(promise: nil) }
    }

    func channelRead(context: ChannelHandlerContext, data: NIOAny) {}
}

/// One connection: requests one after the other, each with a deadline.
private final class Conversation: ChannelInboundHandler {
    typealias InboundIn = HTTPServerRequestPart
    typealias OutboundOut = HTTPServerResponsePart

    private let web: Web
    private let rules: WebServer.Rules
    private var head: HTTPRequestHead?
    private var isEnding = false
    private var deadline: Scheduled<Void>?

    init(_ web: Web, _ rules: WebServer.Rules) {
        self.web = web
        self.rules = rules
    }

    func channelActive(context: ChannelHandlerContext) {
        beginWaiting(context)
        context.fireChannelActive()
    }

    func channelInactive(context: ChannelHandlerContext) {
        isEnding = true
        deadline?.cancel()
        context.fireChannelInactive()
    }

    /// Whatever is to come next has as long as our patience.
    private func beginWaiting(_ context: ChannelHandlerContext) {
        deadline?.cancel()
        let channel = context.channel
        deadline = context.eventLoop.scheduleTask(in: rules.current.patience) { channel.close(promise: nil) }
    }

    func channelRead(context: ChannelHandlerContext, data: NIOAny) {
        guard !isEnding else { return }
        switch Self.unwrapInboundIn(data) {
        case .head(let head): self.head = head
        case .body:
            guard head != nil else { return }
            head = nil
            say(.problem(413, "a request has no body here"), isHead: false, keepAlive: false, context)
        case .end:
            guard let head = head.take() else { return }
            beginWaiting(context)
            answer(head, context)
        }
    }

    private func answer(_ head: HTTPRequestHead, _ context: ChannelHandlerContext) {
        let request = Web.Request(
            method: head.method.rawValue, target: head.uri, headers: head.headers.map { ($0.name, $0.value) })
        let loop = context.eventLoop
        let bound = NIOLoopBound((self, context), eventLoop: loop)
        let isHead = head.method == .HEAD, keepAlive = head.isKeepAlive
        web.answer(request, at: rules.current.gate) { answer in
            loop.execute {
                let (conversation, context) = bound.value
                guard !conversation.isEnding else { return }
                conversation.say(answer, isHead: isHead, keepAlive: keepAlive, context)
            }
        }
    }

    private func say(_ answer: Web.Answer, isHead: Bool, keepAlive: Bool, _ context: ChannelHandlerContext) {
        var head = HTTPResponseHead(
            version: .http1_1, status: HTTPResponseStatus(statusCode: answer.status),
            headers: HTTPHeaders(answer.headers.map { ($0.name, $0.value) }))
        if !keepAlive {
            head.headers.add(name: "Connection", value: "close")
            isEnding = true
        }
        context.write(Self.wrapOutboundOut(.head(head)), promise: nil)
        if !isHead {
            context.write(
                Self.wrapOutboundOut(.body(.byteBuffer(context.channel.allocator.buffer(bytes: answer.body)))), promise: nil)
        }
        let bound = NIOLoopBound((self, context), eventLoop: context.eventLoop)
        context.writeAndFlush(Self.wrapOutboundOut(.end(nil))).whenComplete { _ in
            let (conversation, context) = bound.value
            if keepAlive { conversation.beginWaiting(context) } else { context.close(promise: nil) }
        }
    }

    func errorCaught(context: ChannelHandlerContext, error: any Error) {
        guard !isEnding else { return }
        if let error = error as? HTTPParserError {
            let isLong = error == .headerOverflow
            say(
                .problem(isLong ? 431 : 400, isLong ? "the request's head is too long" : "this is no HTTP/1.1 request: \(error)"),
                isHead: false, keepAlive: false, context)
        } else {
            isEnding = true
            context.close(promise: nil)
        }
    }
}
