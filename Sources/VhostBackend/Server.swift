import CPlatform
import GuestMemory
import Logging
import Platform
import Synchronization

/// Accepts front ends for one device, one after the other.
public final class Server: Sendable {
    /// When the message that is being handled arrived; 0 between messages. A front end waits meanwhile, and with it the
    /// whole VM, so a supervisor wants to know.
    private let handlingSince = Atomic<UInt64>(0)

    /// How long the current message has been in the making, in nanoseconds.
    public var handlingNanoseconds: UInt64 {
        let since = handlingSince.load(ordering: .relaxed)
        return since == 0 ? 0 : monotonicNanoseconds() &- since
    }

    /// What the front end sees at our end: the process that made the listening socket, which may be another one.
    public var owner: Int32? { isListening ? (try? socket.peer())?.pid : nil }

    private let connected = Atomic<Bool>(false)
    /// The process at the other end, or that was there last, as the kernel names it; nil before the first.
    public var peer: (pid: Int32, uid: UInt32)? { peerNow.withLock { $0 } }
    private let peerNow = Mutex<(pid: Int32, uid: UInt32)?>(nil)

    /// Whether a front end is connected now.
    public var isConnected: Bool { connected.load(ordering: .relaxed) }

    /// Since when a front end is connected that has not said anything; 0 if there is none.
    private let silentSince = Atomic<UInt64>(0)
    /// A front end is connected and has said nothing for so long that it will not, until its guest starts the device, if ever: QEMU
    /// before 9.1 forgets a device whose back end died at certain moments.
    public var isSilent: Bool {
        let since = silentSince.load(ordering: .relaxed)
        return since != 0 && monotonicNanoseconds() &- since > Self.silenceNanoseconds
    }
    private static let silenceNanoseconds: UInt64 = 2_000_000_000

    private let socket: UnixSocket
    private let isListening: Bool
    private let device: any VhostUserDevice
    private let logger: Logger
    private let features: ProtocolFeatures
    private let pages: (any GuestPages)?

    /// `socket` listens, or is already connected to the one front end that will ever be served.
    public init(
        socket: consuming UnixSocket, device: any VhostUserDevice, logger: Logger,
        features: ProtocolFeatures = .supported, pages: (any GuestPages)? = nil
    ) throws(QuireError) {
        self.features = features
        self.pages = pages
        isListening = try socket.isListening()
        self.socket = socket
        self.device = device
        self.logger = logger
    }

    private static let pauseMilliseconds: UInt32 = 100

    /// Serves until the socket is shut down (listening), or until its front end has gone (connected).
    public func run() {
        guard isListening else {
            do throws(QuireError) {
                try serve(UnixSocket(adopting: socket.descriptor.duplicate()))
            } catch {
                logger.error("\(error)")
            }
            return
        }
        // A state that may last is logged once, not at every attempt.
        var isFailing = false
        while true {
            do throws(QuireError) {
                let connection = try socket.accept()
                logger.info("front end connected")
                try serve(connection)
                isFailing = false
            } catch where error.isTemporary {
                if !isFailing { logger.error("\(error): trying again") }
                isFailing = true
                ProcessCalls.sleep(milliseconds: Self.pauseMilliseconds)
            } catch {
                // What accept says of a socket that was shut down.
                if error.errno != EINVAL { logger.error("\(error)") }
                return
            }
        }
    }

    private func serve(_ connection: consuming UnixSocket) throws(QuireError) {
        let peer = try? connection.peer()
        peerNow.withLock { $0 = peer.map { ($0.pid, $0.uid) } }
        connected.store(true, ordering: .relaxed)
        silentSince.store(monotonicNanoseconds(), ordering: .relaxed)
        defer {
            connected.store(false, ordering: .relaxed)
            silentSince.store(0, ordering: .relaxed)
        }
        let session = try Session(
            socket: connection, device: device, logger: logger, protocolFeatures: features, pages: pages
        ) { [self] isHandling in
            if isHandling { silentSince.store(0, ordering: .relaxed) }
            handlingSince.store(isHandling ? monotonicNanoseconds() : 0, ordering: .relaxed)
        }
        session.run()
    }
}
