import GuestMemory
import Glibc
import InMemoryLogging
import Logging
import Platform
import Synchronization
import VhostBackend

/// A block storage in memory that notes what it is asked for.
final class MemoryStorage: BlockStorage {
    enum Operation: Equatable, Sendable {
        case read(UInt64, Int), write(UInt64, Int), flush, discard(UInt64, UInt64), zero(UInt64, UInt64, Bool)
    }

    let byteCount: UInt64
    let logicalBlockBytes: UInt32 = 4096
    let isReadOnly: Bool
    let serial = "unit-test-disk"
    private let state: Monitor<(bytes: [UInt8], operations: [Operation])>

    init(byteCount: UInt64 = 1 << 20, isReadOnly: Bool = false) {
        self.byteCount = byteCount
        self.isReadOnly = isReadOnly
        state = Monitor(([UInt8](repeating: 0, count: Int(byteCount)), []))
    }

    var operations: [Operation] { state.read { $0.operations } }
    var bytes: [UInt8] { state.read { $0.bytes } }
    func forgetOperations() { state.update { $0.operations = [] } }

    func read(at offset: UInt64, into buffer: GuestBuffer) throws(QuireError) {
        let part = state.update { state in
            state.operations.append(.read(offset, buffer.count))
            return Array(state.bytes[Int(offset)..<Int(offset) + buffer.count])
        }
        try buffer.copyIn(part)
    }
    func write(at offset: UInt64, from buffer: GuestBuffer) throws(QuireError) {
        let part = try buffer.copyOut()
        state.update { state in
            state.operations.append(.write(offset, part.count))
            state.bytes.replaceSubrange(Int(offset)..<Int(offset) + part.count, with: part)
        }
    }
    func flush() throws(QuireError) { state.update { $0.operations.append(.flush) } }
    func discard(at offset: UInt64, count: UInt64) throws(QuireError) {
        state.update { $0.operations.append(.discard(offset, count)) }
    }
    func writeZeroes(at offset: UInt64, count: UInt64, mayUnmap: Bool) throws(QuireError) {
        state.update { state in
            state.operations.append(.zero(offset, count, mayUnmap))
            for index in Int(offset)..<Int(offset + count) { state.bytes[index] = 0 }
        }
    }
}

/// Notes what a device is told of its life; takes its time when asked to.
final class RecordingLifecycle: DeviceLifecycle {
    /// `rings` by the addresses of their descriptor tables.
    struct Start: Equatable, Sendable {
        let nonce: UInt64, origin: DeviceStart.Origin, rings: [UInt64], ram: UInt64, isUnnoticed: Bool
    }
    enum Event: Equatable, Sendable { case started(Start), stopping, logging(Bool) }

    private let log = Monitor<[Event]>([])
    private let isRunning = Atomic<Bool>(false)
    private let startMilliseconds: UInt32
    private let stopMilliseconds: UInt32
    private let settles: Bool

    /// `settles`: it has what belongs to every guest.
    init(startMilliseconds: UInt32 = 0, stopMilliseconds: UInt32 = 0, settles: Bool = false) {
        self.startMilliseconds = startMilliseconds
        self.stopMilliseconds = stopMilliseconds
        self.settles = settles
    }

    var events: [Event] { log.read { $0 } }
    /// Between `deviceStarted` and the return of `deviceStopping`.
    var isDeviceRunning: Bool { isRunning.load(ordering: .acquiring) }
    var starts: [Start] { events.compactMap { if case .started(let start) = $0 { start } else { nil } } }
    var nonces: [UInt64] { starts.map(\.nonce) }
    var origins: [DeviceStart.Origin] { starts.map(\.origin) }

    func deviceStarted(_ start: DeviceStart) {
        if startMilliseconds > 0 { ProcessCalls.sleep(milliseconds: startMilliseconds) }
        if settles { start.settle() }
        let event = Start(
            nonce: start.nonce, origin: start.origin, rings: start.rings.map(\.descriptorTable.lowerBound),
            ram: start.memory.byteCount, isUnnoticed: start.isUnnoticed)
        log.update { $0.append(.started(event)) }
        isRunning.store(true, ordering: .releasing)
    }
    func deviceStopping() {
        if stopMilliseconds > 0 { ProcessCalls.sleep(milliseconds: stopMilliseconds) }
        isRunning.store(false, ordering: .releasing)
        log.update { $0.append(.stopping) }
    }
    func loggingChanged(_ enabled: Bool) { log.update { $0.append(.logging(enabled)) } }

    /// Waits until an event fits.
    func waits(for isWanted: (Event) -> Bool) -> Bool {
        log.wait(until: monotonicNanoseconds() + 20_000_000_000) { $0.contains(where: isWanted) ? () : nil } != nil
    }
}

/// The warnings and errors that were logged: what a person would read.
struct Complaints: Sendable {
    private let handler = InMemoryLogHandler()
    var logger: Logger { Logger(label: "test") { _ in handler } }
    var all: [String] { handler.entries.filter { $0.level >= .warning }.map { "\($0.message)" } }
}

/// A server with a device on a thread of its own, at a socket of its own.
final class TestServer {
    let path: String
    let server: Server
    private let listener: Descriptor
    private let thread: JoinableThread
    private static let counter = Atomic<Int>(0)

    init(
        _ device: any VhostUserDevice, logger: Logger = TestServer.quiet, pages: (any GuestPages)? = nil
    ) throws {
        let number = Self.counter.add(1, ordering: .relaxed).newValue
        path = "/tmp/quire-unit-\(getpid())-\(number).sock"
        let socket = try UnixSocket.listen(at: path)
        listener = try socket.descriptor.duplicate()
        let server = try Server(socket: socket, device: device, logger: logger, pages: pages)
        self.server = server
        thread = try JoinableThread("test-server") { server.run() }
    }

    static let quiet = Logger(label: "test") { _ in SwiftLogNoOpLogHandler() }

    convenience init(
        _ storage: MemoryStorage, queues: Int = 1, lifecycle: RecordingLifecycle? = nil, logger: Logger = quiet
    ) throws {
        try self.init(
            VirtioBlock(storage: storage, queueCount: queues, lifecycle: lifecycle, logger: Self.quiet), logger: logger)
    }

    func connect() throws -> FrontEnd { FrontEnd(try UnixSocket.connect(to: path), of: self) }

    /// A whole honest session, from connect to disconnect: the server is alive and in order.
    func servesHonestly(dialect: FrontEnd.Dialect = .qemu10) throws -> Bool {
        let ram = try GuestRAM()
        let ring = try DriverRing(ram)
        let frontEnd = try connect()
        try frontEnd.handshake(dialect)
        try frontEnd.start(ram, [ring])
        let serves = try DriverDisk(ring).proveService()
        let bases = try frontEnd.stop([ring])
        frontEnd.disconnect()
        return serves && bases == [2] && ram.isIntact
    }

    deinit {
        _ = shutdown(listener.raw, Int32(SHUT_RDWR))
        thread.join()
        Files.remove(path)
    }
}
