/// Virtio feature bits (virtio 1.2, sections 5.2.3 and 6) and the two that vhost adds.
public struct VirtioFeatures: OptionSet, Sendable {
    public let rawValue: UInt64
    public init(rawValue: UInt64) { self.rawValue = rawValue }
    init(bit: Int) { rawValue = 1 << UInt64(bit) }

    public static let blockSegMax = VirtioFeatures(bit: 2)
    public static let blockReadOnly = VirtioFeatures(bit: 5)
    public static let blockSize = VirtioFeatures(bit: 6)
    public static let blockFlush = VirtioFeatures(bit: 9)
    public static let blockTopology = VirtioFeatures(bit: 10)
    public static let blockMultiQueue = VirtioFeatures(bit: 12)
    public static let blockDiscard = VirtioFeatures(bit: 13)
    public static let blockWriteZeroes = VirtioFeatures(bit: 14)
    /// VHOST_F_LOG_ALL: note every write to guest memory in the dirty log.
    public static let logAll = VirtioFeatures(bit: 26)
    public static let indirectDescriptors = VirtioFeatures(bit: 28)
    public static let eventIndex = VirtioFeatures(bit: 29)
    /// VHOST_USER_F_PROTOCOL_FEATURES; rings then start disabled.
    public static let protocolFeatures = VirtioFeatures(bit: 30)
    public static let version1 = VirtioFeatures(bit: 32)
}

/// Protocol features of vhost-user (QEMU docs/interop/vhost-user.rst, "Protocol features").
public struct ProtocolFeatures: OptionSet, Sendable {
    public let rawValue: UInt64
    public init(rawValue: UInt64) { self.rawValue = rawValue }
    init(bit: Int) { rawValue = 1 << UInt64(bit) }

    public static let multiQueue = ProtocolFeatures(bit: 0)
    public static let logSharedMemory = ProtocolFeatures(bit: 1)
    public static let replyAck = ProtocolFeatures(bit: 3)
    public static let backendRequests = ProtocolFeatures(bit: 5)
    public static let config = ProtocolFeatures(bit: 9)
    public static let inflightSharedMemory = ProtocolFeatures(bit: 12)
    public static let resetDevice = ProtocolFeatures(bit: 13)
    public static let configureMemorySlots = ProtocolFeatures(bit: 15)
    public static let status = ProtocolFeatures(bit: 16)

    /// All that this library implements. Left out on purpose: postcopy (PAGEFAULT), in-band notifications, and what
    /// belongs to other devices (RARP, MTU, crypto).
    public static let supported: ProtocolFeatures = [
        .multiQueue, .logSharedMemory, .replyAck, .backendRequests, .config, .inflightSharedMemory, .resetDevice,
        .configureMemorySlots, .status,
    ]

    /// With memory slots QEMU tells a connection about each region once. Before 9.1 it may lose track of connections (see
    /// `Session.noticeMissingHandshake`), and then never tells the next back end of any memory: the guest's boot hangs.
    /// Without, it sends the whole table at every start. The price: 8 regions, which is about five hot-plugged DIMMs.
    public static let supportedWithoutMemorySlots = supported.subtracting(.configureMemorySlots)
}
