import Platform

/// The wire format of vhost-user (QEMU docs/interop/vhost-user.rst): a header of three 32-bit words (request, flags,
/// payload size) and a payload, little-endian here because front end and back end share a machine.
///
/// This file turns bytes into values and refuses what is malformed; it decides nothing.
enum FrontendRequest: UInt32, Sendable {
    case getFeatures = 1
    case setFeatures = 2
    case setOwner = 3
    case resetOwner = 4
    case setMemoryTable = 5
    case setLogBase = 6
    case setLogDescriptor = 7
    case setVringNum = 8
    case setVringAddress = 9
    case setVringBase = 10
    case getVringBase = 11
    case setVringKick = 12
    case setVringCall = 13
    case setVringError = 14
    case getProtocolFeatures = 15
    case setProtocolFeatures = 16
    case getQueueCount = 17
    case setVringEnable = 18
    case setBackendRequestDescriptor = 21
    case getConfig = 24
    case setConfig = 25
    case getInflightDescriptor = 31
    case setInflightDescriptor = 32
    case resetDevice = 34
    case getMaxMemorySlots = 36
    case addMemoryRegion = 37
    case removeMemoryRegion = 38
    case setStatus = 39
    case getStatus = 40

    /// How many descriptors come with it. Vring descriptors and the memory table depend on the payload, too.
    var descriptorCount: ClosedRange<Int> {
        switch self {
        case .setMemoryTable: 1...Message.maxTableRegions
        case .setLogBase, .setLogDescriptor, .setBackendRequestDescriptor, .setInflightDescriptor, .addMemoryRegion: 1...1
        case .setVringKick, .setVringCall, .setVringError: 0...1
        // "For historical reasons" a front end may pass one here (vhost-user.rst, VHOST_USER_REM_MEM_REG).
        case .removeMemoryRegion: 0...1
        default: 0...0
        }
    }
}

extension FrontendRequest {
    /// Whether an answer of its own belongs to it. A front end would take any other answer for that.
    var hasOwnAnswer: Bool {
        switch self {
        case .getFeatures, .getProtocolFeatures, .getVringBase, .getQueueCount, .getConfig, .getInflightDescriptor,
            .getMaxMemorySlots, .getStatus, .setLogBase:
            true
        default: false
        }
    }
}

struct MessageHeader: Sendable {
    static let byteCount = 12
    static let version: UInt32 = 1
    static let replyFlag: UInt32 = 1 << 2
    static let needReplyFlag: UInt32 = 1 << 3

    let request: UInt32
    let flags: UInt32
    let payloadBytes: Int

    init(_ bytes: [UInt8]) throws(QuireError) {
        var reader = PayloadReader(bytes)
        request = try reader.u32()
        flags = try reader.u32()
        let size = try reader.u32()
        guard flags & 3 == Self.version else {
            throw QuireError(.invalid, "message \(request) has protocol version \(flags & 3), expected \(Self.version)")
        }
        guard flags & Self.replyFlag == 0 else { throw QuireError(.invalid, "message \(request) is a reply nobody asked for") }
        guard size <= Message.maxPayloadBytes else {
            throw QuireError(.invalid, "message \(request) claims a payload of \(size) bytes, at most \(Message.maxPayloadBytes)")
        }
        payloadBytes = Int(size)
    }

    var needsReply: Bool { flags & Self.needReplyFlag != 0 }
}

enum Message {
    static let maxPayloadBytes = 4096
    /// VHOST_MEMORY_BASELINE_NREGIONS: the most regions that one SET_MEM_TABLE carries.
    static let maxTableRegions = 8
    /// Slots for regions that are added one by one: as many as QEMU takes (VHOST_USER_MAX_RAM_SLOTS).
    static let maxMemorySlots = 512

    static func reply(to request: UInt32, _ payload: [UInt8]) -> [UInt8] {
        encode(request, flags: MessageHeader.version | MessageHeader.replyFlag, payload)
    }

    static func encode(_ request: UInt32, flags: UInt32 = MessageHeader.version, _ payload: [UInt8]) -> [UInt8] {
        littleEndian(request) + littleEndian(flags) + littleEndian(UInt32(payload.count)) + payload
    }
}

/// Reads a payload field by field; throws at its end, and when bytes are left over.
struct PayloadReader {
    private let bytes: [UInt8]
    private var position = 0

    init(_ bytes: [UInt8]) { self.bytes = bytes }

    private mutating func take<T: FixedWidthInteger>(_: T.Type) throws(QuireError) -> T {
        let count = T.bitWidth / 8
        guard position + count <= bytes.count else {
            throw QuireError(.invalid, "the payload of \(bytes.count) bytes is too short")
        }
        defer { position += count }
        return fromLittleEndian(bytes[position..<position + count])
    }
    mutating func u8() throws(QuireError) -> UInt8 { try take(UInt8.self) }
    mutating func u16() throws(QuireError) -> UInt16 { try take(UInt16.self) }
    mutating func u32() throws(QuireError) -> UInt32 { try take(UInt32.self) }
    mutating func u64() throws(QuireError) -> UInt64 { try take(UInt64.self) }
    mutating func rest() -> [UInt8] {
        defer { position = bytes.count }
        return Array(bytes[position...])
    }
    func end() throws(QuireError) {
        guard position == bytes.count else {
            throw QuireError(.invalid, "the payload has \(bytes.count) bytes, expected \(position)")
        }
    }
}

/// VhostUserMemoryRegion.
struct RegionDescription: Sendable {
    let guestAddress: UInt64
    let byteCount: UInt64
    let userAddress: UInt64
    let fileOffset: UInt64

    init(_ reader: inout PayloadReader) throws(QuireError) {
        guestAddress = try reader.u64()
        byteCount = try reader.u64()
        userAddress = try reader.u64()
        fileOffset = try reader.u64()
    }
}

/// VhostUserInflight.
struct InflightDescription: Sendable {
    let byteCount: UInt64
    let offset: UInt64
    let queueCount: UInt16
    let queueSize: UInt16

    init(byteCount: UInt64, offset: UInt64, queueCount: UInt16, queueSize: UInt16) {
        self.byteCount = byteCount
        self.offset = offset
        self.queueCount = queueCount
        self.queueSize = queueSize
    }

    /// 24 bytes on the wire: QEMU sends its C struct with the padding at the end.
    init(_ reader: inout PayloadReader) throws(QuireError) {
        byteCount = try reader.u64()
        offset = try reader.u64()
        queueCount = try reader.u16()
        queueSize = try reader.u16()
        let padding = reader.rest().count
        guard padding == 0 || padding == 4 else { throw QuireError(.invalid, "the in-flight description has a wrong size") }
    }

    var encoded: [UInt8] {
        littleEndian(byteCount) + littleEndian(offset) + littleEndian(queueCount) + littleEndian(queueSize)
            + [0, 0, 0, 0]
    }
}

/// vhost_vring_addr: addresses are the front end's, the log address is the guest's.
struct VringAddresses: Sendable, Equatable {
    let index: Int
    let logsUsedRing: Bool
    let descriptorTable: UInt64
    let usedRing: UInt64
    let availableRing: UInt64
    let logGuestAddress: UInt64

    init(_ reader: inout PayloadReader) throws(QuireError) {
        index = Int(try reader.u32())
        logsUsedRing = try reader.u32() & 1 != 0
        descriptorTable = try reader.u64()
        usedRing = try reader.u64()
        availableRing = try reader.u64()
        logGuestAddress = try reader.u64()
    }
}
