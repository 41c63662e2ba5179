import GuestMemory
import Platform

/// A virtio device behind vhost-user. The library speaks the protocol, validates everything that comes over the socket
/// and out of the rings, and runs one thread a ring; the device says what it is and answers requests.
///
/// `process` is called on ring threads, one call at a time a queue; the other members on the session's thread.
public protocol VhostUserDevice: AnyObject, Sendable {
    /// The features of the device class. The library adds those of rings and of vhost.
    var features: VirtioFeatures { get }
    var queueCount: Int { get }
    /// The device's configuration space, as the guest reads it.
    var configuration: [UInt8] { get }

    /// The driver wrote to the configuration space. Throw to refuse.
    func writeConfiguration(offset: Int, _ bytes: [UInt8]) throws(QuireError)

    /// Answers one request; returns how many bytes it stored in the chain's writable part. Throw `.guest` where the
    /// request breaks the protocol: the ring is stopped; `.retry`, within 100 ms, where it has to wait for somebody: it is
    /// called again, unless the ring shall stop. `features` are those that the driver has accepted.
    func process(_ chain: DescriptorChain, queue: Int, features: VirtioFeatures) throws(QuireError) -> UInt32

    /// Who else works on guest memory while the device runs.
    var lifecycle: (any DeviceLifecycle)? { get }
}

extension VhostUserDevice {
    public func writeConfiguration(offset: Int, _ bytes: [UInt8]) throws(QuireError) {
        throw QuireError(.unsupported, "this device's configuration cannot be written")
    }
    public var lifecycle: (any DeviceLifecycle)? { nil }
}

/// For a device that works on guest memory outside of its rings. Called on the session's thread.
public protocol DeviceLifecycle: AnyObject, Sendable {
    /// The device runs: the guest's driver has set it up, or a pause is over. Called again after every `deviceStopping`.
    func deviceStarted(_ start: DeviceStart)

    /// The device must stop, and the front end waits. When this returns, nothing of the device's own making (threads,
    /// engines) touches guest memory any more. Rings are stopped right after. May be called when already stopped.
    func deviceStopping()

    /// Dirty logging was switched on or off. When on, every write to guest memory from now on must be logged: through
    /// `GuestBuffer` or `GuestMemory.log`. The front end waits for this, too.
    func loggingChanged(_ enabled: Bool)
}

/// What a device learns when it is started.
public struct DeviceStart: Sendable {
    public let memory: GuestMemory
    /// The rings that run, for those who must keep off them.
    public let rings: [SplitRing.Layout]
    /// Names the guest's use of the device from one reset to the next: the same value after a pause, a reconnect or a
    /// restart of the back end means that the same guest still runs, with the device never reset in between. Never 0.
    public let nonce: UInt64
    /// How the guest came to the device: the same over pauses, reconnects and restarts of the back end, as the nonce.
    public let origin: Origin
    /// The front end would not notice the end of this process (a bug of QEMU before 9.1): nobody would finish what we began.
    /// Nothing may be begun that the guest has to wait for.
    public let isUnnoticed: Bool
    /// The process of the front end; nil where the kernel cannot tell.
    public let frontEnd: Int32?
    /// The raw descriptor of the connection to it, open until `deviceStopping` has returned; nil where there is none. The
    /// front end goes on without us only when it sees the end of this connection: so a process that must not be overtaken
    /// by that may be given it, too.
    public let connection: Int32?
    /// To be called when a guest that came from elsewhere has found what belongs to its memory: its origin is `here` from then
    /// on, for back ends to come, too. Changes nothing for any other.
    public let settle: @Sendable () -> Void

    /// Where a guest's memory is from, told by how its driver finds the device.
    public enum Origin: Sendable {
        /// Nobody can tell: the front end keeps no in-flight region, or one that an earlier release has made.
        case unknown
        /// Its driver has begun with the device here.
        case here
        /// Its driver was in the middle of using the device at the first start here: the guest has migrated, or a snapshot was
        /// loaded, and what the device has is of another time than the guest's memory. A driver that begins anew changes nothing
        /// about that as long as the front end is connected: it does so in a guest that wakes from suspend to RAM, too.
        case elsewhere
    }

    public init(
        memory: GuestMemory, rings: [SplitRing.Layout], nonce: UInt64, origin: Origin = .unknown, isUnnoticed: Bool = false,
        frontEnd: Int32? = nil, connection: Int32? = nil, settle: @escaping @Sendable () -> Void = {}
    ) {
        self.memory = memory
        self.rings = rings
        self.nonce = nonce
        self.origin = origin
        self.isUnnoticed = isUnnoticed
        self.frontEnd = frontEnd
        self.connection = connection
        self.settle = settle
    }
}
