import Glibc
import Platform

/// The other side of the socket: a front end that sends whatever a test tells it to, byte by byte. It shares no code with
/// the back end's protocol layer, so that a mistake there is not made twice.
final class FrontEnd {
    enum Request {
        static let getFeatures: UInt32 = 1, setFeatures: UInt32 = 2, setOwner: UInt32 = 3, resetOwner: UInt32 = 4
        static let setMemoryTable: UInt32 = 5, setLogBase: UInt32 = 6, setLogDescriptor: UInt32 = 7
        static let setVringNum: UInt32 = 8, setVringAddress: UInt32 = 9, setVringBase: UInt32 = 10
        static let getVringBase: UInt32 = 11, setVringKick: UInt32 = 12, setVringCall: UInt32 = 13
        static let setVringError: UInt32 = 14, getProtocolFeatures: UInt32 = 15, setProtocolFeatures: UInt32 = 16
        static let getQueueCount: UInt32 = 17, setVringEnable: UInt32 = 18, setBackendChannel: UInt32 = 21
        static let getConfig: UInt32 = 24, setConfig: UInt32 = 25, getInflight: UInt32 = 31, setInflight: UInt32 = 32
        static let resetDevice: UInt32 = 34, getMaxMemorySlots: UInt32 = 36, addRegion: UInt32 = 37
        static let removeRegion: UInt32 = 38, setStatus: UInt32 = 39, getStatus: UInt32 = 40
        /// All that the back end is supposed to know.
        static let all: [UInt32] = Array(1...18) + [21, 24, 25, 31, 32, 34, 36, 37, 38, 39, 40]
        /// Those that a front end waits for an answer to in any case.
        static let answered: [UInt32] = [1, 6, 11, 15, 17, 24, 31, 36, 40]
    }

    enum Failure: Error { case closed, timeout, wrongReply(String) }

    static let version: UInt32 = 1, replyFlag: UInt32 = 4, needReply: UInt32 = 8
    static let logAll: UInt64 = 1 << 26, indirect: UInt64 = 1 << 28, eventIndex: UInt64 = 1 << 29
    static let protocolFeatures: UInt64 = 1 << 30, version1: UInt64 = 1 << 32

    let socket: UnixSocket
    /// Set by `handshake`: every message that has no reply of its own is then sent with need_reply and checked, as QEMU
    /// does for those that matter.
    var acknowledges = false
    var offered: UInt64 = 0

    /// Kept alive, and left to end only when this connection has: its end waits for its session.
    private let server: AnyObject

    init(_ socket: consuming UnixSocket, of server: AnyObject) {
        self.socket = socket
        self.server = server
    }

    deinit { socket.shutDown() }

    func message(_ request: UInt32, _ payload: [UInt8], flags: UInt32 = version) -> [UInt8] {
        le(request) + le(flags) + le(UInt32(payload.count)) + payload
    }

    func sendRaw(_ bytes: [UInt8], passing descriptors: [Int32] = []) throws {
        do { try socket.send(bytes, passing: descriptors) } catch { throw Failure.closed }
    }

    func post(_ request: UInt32, _ payload: [UInt8] = [], passing descriptors: [Int32] = [], flags: UInt32 = version)
        throws
    {
        try sendRaw(message(request, payload, flags: flags), passing: descriptors)
    }

    /// The next message from the back end; its first descriptor, if one came.
    struct Reply: ~Copyable {
        let request: UInt32
        let payload: [UInt8]
        var descriptor: Descriptor?
    }

    func receive(timeoutMilliseconds: Int32 = 20_000) throws -> Reply {
        guard !waitReadable([socket.descriptor.raw], timeoutMilliseconds: timeoutMilliseconds).isEmpty else {
            throw Failure.timeout
        }
        var passed = UnixSocket.PassedDescriptors()
        let head: [UInt8]?
        do { head = try socket.receive(count: 12, maxDescriptors: 1, into: &passed) } catch { throw Failure.closed }
        guard let head else { throw Failure.closed }
        let request: UInt32 = number(head, 0), flags: UInt32 = number(head, 4), size: UInt32 = number(head, 8)
        guard flags == Self.version | Self.replyFlag, size <= 4096 else { throw Failure.wrongReply("header \(head)") }
        let payload = size == 0 ? [] : (try socket.receive(count: Int(size), maxDescriptors: 1, into: &passed) ?? [])
        return Reply(request: request, payload: payload, descriptor: passed.next())
    }

    /// Sends a request that has a reply of its own.
    func ask(_ request: UInt32, _ payload: [UInt8] = [], passing descriptors: [Int32] = []) throws -> [UInt8] {
        try post(request, payload, passing: descriptors)
        let reply = try receive()
        guard reply.request == request else { throw Failure.wrongReply("\(reply.request) to \(request)") }
        return reply.payload
    }

    func askNumber(_ request: UInt32, _ payload: [UInt8] = []) throws -> UInt64 {
        let answer = try ask(request, payload)
        guard answer.count == 8 else { throw Failure.wrongReply("\(answer)") }
        return number(answer, 0)
    }

    /// Sends a request with need_reply set; what the back end says: 0 is yes.
    func acknowledged(_ request: UInt32, _ payload: [UInt8] = [], passing descriptors: [Int32] = []) throws -> UInt64 {
        try post(request, payload, passing: descriptors, flags: Self.version | Self.needReply)
        let reply = try receive()
        guard reply.request == request, reply.payload.count == 8 else { throw Failure.wrongReply("to \(request)") }
        return number(reply.payload, 0)
    }

    /// Sends a request that has no reply, and hears "yes" where that was negotiated.
    func tell(_ request: UInt32, _ payload: [UInt8] = [], passing descriptors: [Int32] = []) throws {
        guard acknowledges else { return try post(request, payload, passing: descriptors) }
        guard try acknowledged(request, payload, passing: descriptors) == 0 else {
            throw Failure.wrongReply("request \(request) was refused")
        }
    }

    /// True if the back end closes the connection; whatever it says before is passed over.
    func isClosed(withinMilliseconds milliseconds: Int32 = 20_000) -> Bool {
        while !waitReadable([socket.descriptor.raw], timeoutMilliseconds: milliseconds).isEmpty {
            var passed = UnixSocket.PassedDescriptors()
            guard let byte = try? socket.receive(count: 1, maxDescriptors: 8, into: &passed), !byte.isEmpty else {
                return true
            }
        }
        return false
    }

    func disconnect() { socket.shutDown() }

    // MARK: - What QEMU sends (QEMU.md)

    struct Dialect: Sendable, CustomStringConvertible {
        let name: String
        /// Protocol feature bits that this front end knows.
        let protocolBits: UInt64
        var usesStatus: Bool { protocolBits & 1 << 16 != 0 }
        var usesSlots: Bool { protocolBits & 1 << 15 != 0 }
        var description: String { name }

        static let qemu7 = Dialect(name: "QEMU 7.2", protocolBits: 0xffff)
        static let qemu10 = Dialect(name: "QEMU 10", protocolBits: 0x1ffff)
        /// No memory slots, no in-flight region, no answers: what the oldest front ends do.
        static let old = Dialect(name: "old", protocolBits: 1 << 0 | 1 << 1 | 1 << 9)
    }

    private(set) var dialect = Dialect.old
    private(set) var protocolBits: UInt64 = 0

    /// From connect to GET_CONFIG.
    func handshake(_ dialect: Dialect = .qemu10, queues: Int = 1) throws {
        self.dialect = dialect
        offered = try askNumber(Request.getFeatures)
        protocolBits = try askNumber(Request.getProtocolFeatures) & dialect.protocolBits
        try post(Request.setProtocolFeatures, le(protocolBits))
        acknowledges = protocolBits & 1 << 3 != 0
        guard try askNumber(Request.getQueueCount) >= UInt64(queues) else { throw Failure.wrongReply("queues") }
        if dialect.usesSlots { _ = try askNumber(Request.getMaxMemorySlots) }
        try post(Request.setOwner)
        offered = try askNumber(Request.getFeatures)
        _ = try ask(Request.getConfig, le(UInt32(0)) + le(UInt32(57)) + le(UInt32(0)) + [UInt8](repeating: 0, count: 57))
    }

    /// Says nothing, and believes what was agreed on in an earlier connection.
    func goOn(as earlier: FrontEnd) {
        (dialect, protocolBits, acknowledges) = (earlier.dialect, earlier.protocolBits, earlier.acknowledges)
        offered = earlier.offered
    }

    var defaultFeatures: UInt64 { offered & ~Self.logAll & ~Self.eventIndex | Self.protocolFeatures }

    func vringBase(_ queue: Int) throws -> UInt16 {
        let answer = try ask(Request.getVringBase, le(UInt32(queue)) + le(UInt32(0)))
        guard answer.count == 8, number(answer, 0) as UInt32 == UInt32(queue) else { throw Failure.wrongReply("base") }
        return UInt16(number(answer, 4) as UInt32)
    }

    func sendMemory(_ ram: GuestRAM) throws {
        if dialect.usesSlots {
            for region in ram.regions { try tell(Request.addRegion, region.single, passing: [region.file.raw]) }
        } else {
            try tell(
                Request.setMemoryTable,
                le(UInt32(ram.regions.count)) + le(UInt32(0)) + ram.regions.flatMap(\.wire),
                passing: ram.regions.map { $0.file.raw })
        }
    }

    func setUp(_ ring: DriverRing, base: UInt16 = 0, logFlag: Bool = false) throws {
        let queue = UInt32(ring.queue)
        try tell(Request.setVringNum, le(queue) + le(UInt32(ring.size)))
        try tell(Request.setVringBase, le(queue) + le(UInt32(base)))
        try tell(Request.setVringAddress, ring.wireAddresses(logFlag: logFlag))
        try tell(Request.setVringError, le(UInt64(queue)), passing: [ring.error.descriptor.raw])
        try tell(Request.setVringCall, le(UInt64(queue)), passing: [ring.call.descriptor.raw])
        try tell(Request.setVringKick, le(UInt64(queue)), passing: [ring.kick.descriptor.raw])
    }

    /// Device start: features, in-flight region, memory, rings, enable. `memory`: false where it was sent already.
    func start(
        _ ram: GuestRAM, _ rings: [DriverRing], features: UInt64? = nil, memory: Bool = true, bases: [UInt16]? = nil,
        inflight: InflightFile? = nil
    ) throws {
        try tell(Request.setFeatures, le(features ?? defaultFeatures))
        if let inflight {
            try tell(Request.setInflight, inflight.wire, passing: [inflight.file.raw])
        }
        if memory { try sendMemory(ram) }
        for (index, ring) in rings.enumerated() { try setUp(ring, base: bases?[index] ?? 0) }
        if dialect.usesStatus { try tell(Request.setStatus, le(UInt64(15))) }
        for ring in rings { try tell(Request.setVringEnable, le(UInt32(ring.queue)) + le(UInt32(1))) }
        // QEMU kicks once, for what the guest has put there before.
        for ring in rings { ring.kick.signal() }
    }

    /// A device start after a virtio reset: with a new in-flight region, whose file is returned.
    func getInflight(queues: Int = 1, size: UInt16 = 128) throws -> InflightFile {
        try post(Request.getInflight, InflightFile.wire(0, 0, UInt16(queues), size))
        var reply = try receive()
        guard reply.request == Request.getInflight, reply.payload.count == 24, let file = reply.descriptor.take() else {
            throw Failure.wrongReply("in-flight")
        }
        return InflightFile(
            file: file, byteCount: number(reply.payload, 0), offset: number(reply.payload, 8),
            queueCount: number(reply.payload, 16), queueSize: number(reply.payload, 18))
    }

    /// Driver reset, reboot, QMP stop: what they look like on the wire. Returns the rings' positions.
    @discardableResult func stop(_ rings: [DriverRing]) throws -> [UInt16] {
        for ring in rings { try tell(Request.setVringEnable, le(UInt32(ring.queue)) + le(UInt32(0))) }
        let bases = try rings.map { try vringBase($0.queue) }
        if dialect.usesStatus { try tell(Request.setStatus, le(UInt64(0))) }
        return bases
    }
}

/// The file behind an in-flight region, as the front end keeps it over a crash of the back end.
final class InflightFile {
    let file: Descriptor
    var byteCount: UInt64, offset: UInt64
    var queueCount: UInt16, queueSize: UInt16
    let mapping: Mapping

    init(file: consuming Descriptor, byteCount: UInt64, offset: UInt64, queueCount: UInt16, queueSize: UInt16) {
        mapping = try! Mapping(file, offset: offset, byteCount: Int(byteCount))
        self.file = file
        (self.byteCount, self.offset, self.queueCount, self.queueSize) = (byteCount, offset, queueCount, queueSize)
    }

    /// A region of any content, for lies.
    convenience init(lying byteCount: UInt64, queueCount: UInt16, queueSize: UInt16) {
        self.init(
            file: try! Memfd(name: "test-inflight", byteCount: byteCount).takeDescriptor(), byteCount: byteCount,
            offset: 0, queueCount: queueCount, queueSize: queueSize)
    }

    static func wire(_ bytes: UInt64, _ offset: UInt64, _ queues: UInt16, _ size: UInt16) -> [UInt8] {
        le(bytes) + le(offset) + le(queues) + le(size) + [0, 0, 0, 0]
    }
    var wire: [UInt8] { Self.wire(byteCount, offset, queueCount, queueSize) }

    // The layout of a split queue, from the specification (vhost-user.rst, "Inflight I/O tracking").
    private func base(_ queue: Int) -> Int { queue * ((16 + 16 * Int(queueSize) + 63) / 64 * 64) }
    func isInflight(_ head: Int, queue: Int = 0) -> Bool { mapping.load8(base(queue) + 16 + 16 * head) == 1 }
    func setInflight(_ head: Int, _ value: Bool, counter: UInt64, queue: Int = 0) {
        mapping.store64(base(queue) + 16 + 16 * head + 8, counter)
        mapping.store8(base(queue) + 16 + 16 * head, value ? 1 : 0)
    }
    func lastBatchHead(queue: Int = 0) -> UInt16 { mapping.load16(base(queue) + 12) }
    func setLastBatchHead(_ head: UInt16, queue: Int = 0) { mapping.store16(base(queue) + 12, head) }
    func usedIndex(queue: Int = 0) -> UInt16 { mapping.load16(base(queue) + 14) }
    func setUsedIndex(_ value: UInt16, queue: Int = 0) { mapping.store16(base(queue) + 14, value) }
}

func le<T: FixedWidthInteger>(_ value: T) -> [UInt8] {
    (0..<T.bitWidth / 8).map { UInt8(truncatingIfNeeded: value >> T($0 * 8)) }
}

func number<T: FixedWidthInteger>(_ bytes: [UInt8], _ offset: Int) -> T {
    (0..<T.bitWidth / 8).reduce(0) { $0 | T(bytes[offset + $1]) << T($1 * 8) }
}
