import CQuireLayout
import Engines
import GuestMemory
import Logging
import Platform
import VhostBackend

/// The control disk: the channel by which a guest registers its state table (quire_layout.h, part 1), and the place where
/// the life of the virtio device becomes the life of the recycle engine.
///
/// A tiny virtio-blk disk, because that driver is in every guest kernel, because stock QEMU has no generic vhost-user
/// device a user can create, and because a registration then lives exactly as long as the device is started.
public final class ControlDisk: BlockStorage, DeviceLifecycle {
    private let engine: RecycleEngine
    private let dedup: DedupEngine?
    private let map: PageMap
    private let logger: Logger
    private let state = Monitor(State())

    private struct State {
        var nonce: UInt64 = 0
        var memory: GuestMemory?
        var frontEnd: Int32?
        /// The last request was refused, for this reason.
        var refusal: String?
    }

    public static let version = "quire-backend 0.1"
    public static let blockBytes = Int(QUIRE_PAGE_BYTES)

    public let byteCount = UInt64(QUIRE_CTL_BLOCKS) * UInt64(QUIRE_PAGE_BYTES)
    public let logicalBlockBytes = UInt32(QUIRE_PAGE_BYTES)
    public let isReadOnly = false
    public let serial = QUIRE_CTL_SERIAL

    /// `dedup`: nil where nothing is ever merged.
    public init(engine: RecycleEngine, dedup: DedupEngine? = nil, map: PageMap, logger: Logger) {
        self.engine = engine
        self.dedup = dedup
        self.map = map
        self.logger = logger
    }

    /// Guest RAM as of now; nil while no device runs.
    public var memory: GuestMemory? { state.read { $0.memory } }

    // MARK: - The device's life

    /// Whether QEMU holds so much in place that it can only be the guest's memory: all of it, or what a device needs of it that is only
    /// being plugged. QEMU itself has next to nothing locked.
    static func isLocked(_ memory: GuestMemory, by frontEnd: Int32?) -> Bool {
        frontEnd.map { ProcessCalls.lockedBytes(of: $0) >= min(memory.byteCount / 16, 16 << 20) } ?? false
    }

    /// The reasons against a pass over guest memory that come without being told. An agent knows; without one the kernel's count of
    /// pages says it, a moment late.
    func look(_ memory: GuestMemory, _ link: AgentLink?) -> RecycleEngine.Pause {
        if link?.isAssigned == true { return .assigned }
        return Self.isLocked(memory, by: state.read { $0.frontEnd }) ? .locked : []
    }

    public func deviceStarted(_ start: DeviceStart) {
        state.update {
            $0.memory = start.memory
            $0.nonce = start.nonce
            $0.frontEnd = start.frontEnd
            $0.refusal = nil
        }
        engine.setPaused(.unnoticed, start.isUnnoticed)
        // Before each pass the engine looks for itself (`look`): it may end.
        let isLocked = Self.isLocked(start.memory, by: start.frontEnd)
        dedup?.setPaused(.nested, start.frontEnd.map { NestedGuests.mayRun(process: $0) } ?? false)
        let rings = start.rings.flatMap(\.ranges)
        engine.start(memory: start.memory, rings: rings, nonce: start.nonce, connection: start.connection)
        // The agent refuses memory that is locked, and its gate closes for a device that pins.
        dedup?.setMemory(start.memory)
        let resumed = engine.snapshot.phase == .idle ? "" : ", the guest's table is registered already"
        let size = "\(start.memory.byteCount >> 20) MiB of guest RAM in \(start.memory.regions.count) regions"
        logger.info("device started: \(size)\(resumed)")
        if isLocked { logger.error("QEMU has its memory locked or pinned: nothing of it is recycled, start it without mem-lock=on and VFIO devices") }
        for region in start.memory.regions where region.kind != .shmem {
            let address = "0x" + String(region.guestAddress, radix: 16)
            logger.warning("memory region at \(address) is not a memory file: nothing of it is recycled")
        }
    }

    public func deviceStopping() {
        engine.stop()
        dedup?.setMemory(nil)
        state.update { $0.memory = nil }
    }

    public func loggingChanged(_ enabled: Bool) {
        engine.setPaused(.dirtyLogging, enabled)
        dedup?.setPaused(.dirtyLogging, enabled)
        logger.info("dirty logging \(enabled ? "on: recycling pauses" : "off")")
    }

    // MARK: - The disk

    public func read(at offset: UInt64, into buffer: GuestBuffer) throws(QuireError) {
        var disk = [UInt8](repeating: 0, count: Int(byteCount))
        func place(_ bytes: [UInt8], inBlock block: quire_ctl_block) {
            let start = Int(block.rawValue) * Self.blockBytes
            disk.replaceSubrange(start..<start + bytes.count, with: bytes)
        }
        place(identity, inBlock: QUIRE_CTL_IDENTITY_BLOCK)
        place(status, inBlock: QUIRE_CTL_STATUS_BLOCK)
        try buffer.copyIn(Array(disk[Int(offset)..<Int(offset) + buffer.count]))
    }

    /// struct quire_ctl_identity.
    private var identity: [UInt8] {
        bytes(MemoryLayout<quire_ctl_identity>.size) { field in
            field(MemoryLayout<quire_ctl_identity>.offset(of: \.magic)!, Array(QUIRE_CTL_MAGIC.utf8))
            field(MemoryLayout<quire_ctl_identity>.offset(of: \.version)!, encode(UInt32(QUIRE_CTL_VERSION)))
            field(MemoryLayout<quire_ctl_identity>.offset(of: \.block_bytes)!, encode(UInt32(QUIRE_PAGE_BYTES)))
            field(
                MemoryLayout<quire_ctl_identity>.offset(of: \.period_ms)!, encode(engine.configuration.periodMilliseconds))
            field(MemoryLayout<quire_ctl_identity>.offset(of: \.nonce)!, encode(state.read { $0.nonce }))
            field(MemoryLayout<quire_ctl_identity>.offset(of: \.max_pages)!, encode(map.pageCount))
            field(MemoryLayout<quire_ctl_identity>.offset(of: \.backend)!, paddedText(Self.version, capacity: 64))
        }
    }

    /// struct quire_ctl_status.
    private var status: [UInt8] {
        let snapshot = engine.snapshot
        let refusal = state.read { $0.refusal }
        let code: quire_ctl_state =
            switch snapshot.phase {
            case .idle: refusal == nil ? QUIRE_CTL_NONE : QUIRE_CTL_REFUSED
            case .active: QUIRE_CTL_ACTIVE
            case .paused: QUIRE_CTL_PAUSED
            case .refused: refusal == nil ? QUIRE_CTL_DROPPED : QUIRE_CTL_REFUSED
            }
        return bytes(MemoryLayout<quire_ctl_status>.size) { field in
            field(MemoryLayout<quire_ctl_status>.offset(of: \.magic)!, Array(QUIRE_CTL_STATUS_MAGIC.utf8))
            field(MemoryLayout<quire_ctl_status>.offset(of: \.version)!, encode(UInt32(QUIRE_CTL_VERSION)))
            field(MemoryLayout<quire_ctl_status>.offset(of: \.state)!, encode(code.rawValue))
            field(MemoryLayout<quire_ctl_status>.offset(of: \.header_gpa)!, encode(snapshot.headerAddress))
            field(MemoryLayout<quire_ctl_status>.offset(of: \.recycled_pages)!, encode(snapshot.recycledPages))
            field(MemoryLayout<quire_ctl_status>.offset(of: \.text)!, paddedText(refusal ?? snapshot.reason, capacity: 256))
        }
    }

    public func write(at offset: UInt64, from buffer: GuestBuffer) throws(QuireError) {
        guard offset == UInt64(QUIRE_CTL_REQUEST_BLOCK.rawValue) * UInt64(Self.blockBytes), buffer.count == Self.blockBytes
        else { throw QuireError(.invalid, "only the request block of the control disk can be written, as a whole") }
        let request = try buffer.slice(from: 0, count: MemoryLayout<quire_ctl_request>.size).copyOut()
        do throws(QuireError) {
            try carryOut(request)
            state.update { $0.refusal = nil }
        } catch {
            let text = "\(error)"
            // A guest that asks again and again is told every time; the log need not be.
            let isNew = state.update { state in
                defer { state.refusal = text }
                return state.refusal != text
            }
            if isNew { logger.error("\(text)") }
            throw error
        }
    }

    private func carryOut(_ request: [UInt8]) throws(QuireError) {
        // A refusal ends an earlier registration, whatever the reason (quire_layout.h, QUIRE_CTL_REFUSED).
        func refuse(_ text: String) -> QuireError {
            engine.unregister()
            return QuireError(.guest, text)
        }
        guard Array(request[0..<8]) == Array(QUIRE_CTL_REQUEST_MAGIC.utf8) else {
            throw refuse("a request without the magic number")
        }
        let version: UInt32 = decode(request, MemoryLayout<quire_ctl_request>.offset(of: \.version)!)
        guard version == UInt32(QUIRE_CTL_VERSION) else {
            throw refuse(
                "the guest module speaks version \(version), this backend \(QUIRE_CTL_VERSION): update the older of the two")
        }
        let operation: UInt32 = decode(request, MemoryLayout<quire_ctl_request>.offset(of: \.operation)!)
        let header: UInt64 = decode(request, MemoryLayout<quire_ctl_request>.offset(of: \.header_gpa)!)
        let start = MemoryLayout<quire_ctl_request>.offset(of: \.module)!
        let module = String(decoding: request[start..<start + 64].prefix { $0 >= 32 && $0 < 127 }, as: UTF8.self)
        switch quire_ctl_operation(operation) {
        case QUIRE_CTL_REGISTER:
            try engine.register(headerAddress: header)
            logger.info("registered: table at 0x\(String(header, radix: 16)), \(module)")
        case QUIRE_CTL_UNREGISTER:
            engine.unregister()
            logger.info("unregistered: \(module)")
        default:
            throw refuse("unknown operation \(operation)")
        }
    }

    public func flush() throws(QuireError) {}
    public func discard(at offset: UInt64, count: UInt64) throws(QuireError) {
        throw QuireError(.unsupported, "the control disk has nothing to discard")
    }
    public func writeZeroes(at offset: UInt64, count: UInt64, mayUnmap: Bool) throws(QuireError) {
        throw QuireError(.unsupported, "the control disk has nothing to clear")
    }
}

private func encode<T: FixedWidthInteger>(_ value: T) -> [UInt8] {
    (0..<T.bitWidth / 8).map { UInt8(truncatingIfNeeded: value >> T($0 * 8)) }
}

private func decode<T: FixedWidthInteger>(_ bytes: [UInt8], _ offset: Int) -> T {
    (0..<T.bitWidth / 8).reduce(0) { $0 | T(bytes[offset + $1]) << T($1 * 8) }
}

/// `count` zero bytes with fields put in.
private func bytes(_ count: Int, _ fill: ((Int, [UInt8]) -> Void) -> Void) -> [UInt8] {
    var result = [UInt8](repeating: 0, count: count)
    fill { offset, value in result.replaceSubrange(offset..<offset + value.count, with: value) }
    return result
}
