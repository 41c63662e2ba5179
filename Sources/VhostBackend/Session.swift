import GuestMemory
import Logging
import Platform

/// One front end's connection to one device: the vhost-user state machine.
///
/// Guarantees, each of which somebody's memory depends on:
/// - Rings and the device run only between a complete set-up and the first message that stops or changes them; both are
///   *joined* before that message is answered (GET_VRING_BASE above all: QEMU lets the guest go on after the answer).
/// - Memory regions stay mapped as long as anything may use them; a table is replaced only while everything stands still.
/// - A message that is malformed ends the connection with one clear line. One that is well-formed but refused is answered
///   with an error if the front end asked for an answer (REPLY_ACK) and could not mistake it for another, and ends the
///   connection otherwise: a front end that cannot hear "no" must not believe "yes".
/// - A file that the front end truncates while it is in use ends the connection. Nothing is answered that touched what
///   was cut off.
public final class Session {
    private let socket: UnixSocket
    /// Goes off when the front end has truncated a file that it had passed.
    private let alarm: TruncationAlarm
    private let device: any VhostUserDevice
    private let logger: Logger
    private let handling: @Sendable (Bool) -> Void
    private let pages: (any GuestPages)?

    private var features: VirtioFeatures = []
    private let offeredProtocolFeatures: ProtocolFeatures
    private var protocolFeatures: ProtocolFeatures = []
    private var isFirstMessage = true
    /// See `noticeMissingHandshake`.
    private var isUnnoticed = false
    private var regions: [MemoryRegion] = []
    private let tracker = DirtyTracker()
    private var rings: [Vring] = []
    private var inflight: InflightRegion?
    /// The nonce of a front end without in-flight tracking: only as good as this connection, and gone at every stop.
    private var ownNonce: UInt64 = 0
    private var backendChannel: UnixSocket?
    private var status: UInt8 = 0
    /// The device may run: a ring was started, and nothing has stopped the device since.
    private var isDeviceStarted = false
    /// Between `deviceStarted` and `deviceStopping`.
    private var isDeviceRunning = false
    /// Rings that ought to run could not be set going again.
    private var isBroken = false

    /// `pages` knows where guest memory is, if not all of it is in the files that the front end passes. `handling` is told
    /// when a message begins and ends to be handled.
    public init(
        socket: consuming UnixSocket, device: any VhostUserDevice, logger: Logger,
        protocolFeatures: ProtocolFeatures = .supported, pages: (any GuestPages)? = nil,
        handling: @escaping @Sendable (Bool) -> Void = { _ in }
    ) throws(QuireError) {
        alarm = try TruncationAlarm(shuttingDown: socket)
        self.pages = pages
        offeredProtocolFeatures = protocolFeatures
        self.handling = handling
        self.socket = socket
        self.device = device
        self.logger = logger
        rings = (0..<device.queueCount).map { Vring(index: $0, enabled: true) }
    }

    private var offeredFeatures: VirtioFeatures {
        device.features.union([.version1, .indirectDescriptors, .eventIndex, .logAll, .protocolFeatures])
    }

    /// Serves the front end until it goes away or breaks the protocol. Nothing of the session runs when this returns.
    public func run() {
        defer {
            halt(rings)
            // The next front end starts without logging; whoever paused for this one must hear that it has ended.
            if tracker.isEnabled { device.lifecycle?.loggingChanged(false) }
            // Whoever keeps the memory keeps a copy of this socket (the alarm's): without this the front end would not see that it
            // is over, and wait for us with the whole VM. Last, for it lets the front end go on.
            socket.shutDown()
        }
        do throws(QuireError) {
            while try serveOne() {}
            if alarm.isRaised { throw truncation }
            logger.info("front end disconnected")
        } catch {
            // Whatever went wrong after that is a consequence.
            logger.error("connection closed: \(alarm.isRaised ? truncation : error)")
        }
    }

    private var truncation: QuireError {
        guard let region = regions.first(where: \.isCutOff) else {
            return QuireError(
                .invalid, "a file that the front end shares has no room where it is used (in-flight region, dirty log "
                    + "or memory): truncated by its owner, or on a full file system")
        }
        return QuireError(
            .invalid, "the file of the memory region at guest address 0x\(String(region.guestAddress, radix: 16)) "
                + "was truncated by its owner")
    }

    private func serveOne() throws(QuireError) -> Bool {
        if alarm.isRaised { return false }
        var descriptors = UnixSocket.PassedDescriptors()
        let limit = Message.maxTableRegions
        guard
            let head = try socket.receive(
                count: MessageHeader.byteCount, maxDescriptors: limit, into: &descriptors)
        else { return false }
        let header = try MessageHeader(head)
        var payload: [UInt8] = []
        if header.payloadBytes > 0 {
            guard let body = try socket.receive(count: header.payloadBytes, maxDescriptors: limit, into: &descriptors)
            else { throw QuireError(.closed, "the front end closed the connection in the middle of a message") }
            payload = body
        }
        // Not before the message is complete: until then the front end does not wait for us.
        handling(true)
        defer { handling(false) }
        guard let request = FrontendRequest(rawValue: header.request) else {
            throw QuireError(.unsupported, "unknown message \(header.request)")
        }
        if isFirstMessage {
            isFirstMessage = false
            if request == .setFeatures { noticeMissingHandshake() }
        }
        guard request.descriptorCount.contains(descriptors.count) else {
            throw QuireError(
                .invalid, "\(request) came with \(descriptors.count) descriptors, expected "
                    + (request.descriptorCount.count == 1
                        ? "\(request.descriptorCount.lowerBound)"
                        : "\(request.descriptorCount.lowerBound) to \(request.descriptorCount.upperBound)"))
        }
        let wantsAck = header.needsReply && protocolFeatures.contains(.replyAck)
        var answer: Answer?
        do throws(QuireError) {
            answer = try handle(request, payload, &descriptors) ?? (wantsAck ? Answer(littleEndian(UInt64(0))) : nil)
        } catch {
            let named = QuireError(error.code, "\(request)", cause: error)
            guard !isBroken, let refusal = refusal(of: request, wantsAck: wantsAck) else { throw named }
            logger.error("refused: \(named)")
            answer = refusal
        }
        if let answer { try reply(request, answer) }
        return true
    }

    /// How to say "no"; nil if there is no way. GET_CONFIG has one of its own, an answer without payload.
    private func refusal(of request: FrontendRequest, wantsAck: Bool) -> Answer? {
        if request == .getConfig { return Answer([]) }
        return wantsAck && !request.hasOwnAnswer ? Answer(littleEndian(UInt64(1))) : nil
    }

    /// QEMU 7.2 to 9.0 forget to begin anew when their back end ended while the device was stopped, or in the middle of
    /// being stopped (vhost_user_async_close_bh calls nobody if there is no vdev; cured in 9.1). They connect again, say
    /// nothing, and when the guest starts the device they go straight on with what they agreed on with the dead back end:
    /// so that is taken as agreed. Without it QEMU would wait for answers that never come, and the guest with it.
    ///
    /// And such a QEMU looks for the end of a connection no more: if this process ended, too, nobody would start the device
    /// for the next one. The device is told, so that nobody ever has to wait for us.
    private func noticeMissingHandshake() {
        protocolFeatures = offeredProtocolFeatures
        isUnnoticed = true
        logger.warning("the front end goes on without a handshake: QEMU before 9.1 does so when a back end ended while its device was stopped")
    }

    /// The payload of a reply, and a descriptor to pass with it (its owner outlives the reply).
    private struct Answer {
        let payload: [UInt8]
        let descriptor: Int32?
        init(_ payload: [UInt8], passing descriptor: Int32? = nil) {
            self.payload = payload
            self.descriptor = descriptor
        }
    }

    private func reply(_ request: FrontendRequest, _ answer: Answer) throws(QuireError) {
        let passed = answer.descriptor.map { [$0] } ?? []
        try socket.send(Message.reply(to: request.rawValue, answer.payload), passing: passed)
    }

    // MARK: - Messages

    /// Carries out one request. Returns its own answer where the request has one.
    private func handle(
        _ request: FrontendRequest, _ payload: [UInt8], _ descriptors: inout UnixSocket.PassedDescriptors
    ) throws(QuireError) -> Answer? {
        var reader = PayloadReader(payload)
        switch request {
        case .getFeatures:
            try reader.end()
            return Answer(littleEndian(offeredFeatures.rawValue))
        case .setFeatures:
            try setFeatures(VirtioFeatures(rawValue: try single(&reader)))
        case .getProtocolFeatures:
            try reader.end()
            return Answer(littleEndian(offeredProtocolFeatures.rawValue))
        case .setProtocolFeatures:
            let wanted = ProtocolFeatures(rawValue: try single(&reader))
            guard wanted.isSubset(of: offeredProtocolFeatures) else {
                throw QuireError(.invalid, "protocol features that were not offered")
            }
            protocolFeatures = wanted
        case .setOwner:
            try reader.end()
        case .resetOwner, .resetDevice:
            try reader.end()
            halt(rings)
            for ring in rings { ring.isEnabled = ringsBeginEnabled }
        case .getQueueCount:
            try reader.end()
            return Answer(littleEndian(UInt64(device.queueCount)))
        case .getMaxMemorySlots:
            try reader.end()
            return Answer(littleEndian(UInt64(Message.maxMemorySlots)))
        case .setMemoryTable:
            try setMemoryTable(&reader, &descriptors)
        case .addMemoryRegion:
            try addRegion(&reader, &descriptors)
        case .removeMemoryRegion:
            try removeRegion(&reader)
        case .setLogBase:
            return try setLogBase(&reader, &descriptors)
        case .setLogDescriptor:
            // An eventfd to announce new dirty pages; QEMU never waits on it. Taken and closed.
            _ = descriptors.next()
        case .setVringNum:
            let (ring, value) = try vringState(&reader)
            guard value > 0, value <= 32768, value & (value - 1) == 0 else {
                throw QuireError(.invalid, "a ring of \(value) entries: the size must be a power of two up to 32768")
            }
            try stop(ring)
            ring.size = UInt16(value)
        case .setVringBase:
            let (ring, value) = try vringState(&reader)
            guard value <= UInt16.max else { throw QuireError(.invalid, "ring base \(value) exceeds 16 bits") }
            try stop(ring)
            ring.base = UInt16(value)
        case .setVringAddress:
            let addresses = try VringAddresses(&reader)
            try reader.end()
            let ring = try vring(addresses.index)
            // While logging starts and stops the front end sends the addresses again with another flag.
            if ring.isStarted { try ring.check(addresses, in: guestMemory()) }
            try reconfigure(ring) { ring.addresses = addresses }
        case .getVringBase:
            let (ring, _) = try vringState(&reader)
            halt([ring])
            // The specification: a ring is stopped until the next kick descriptor comes.
            ring.kick = nil
            return Answer(littleEndian(UInt32(ring.index)) + littleEndian(UInt32(ring.base)))
        case .setVringEnable:
            let (ring, value) = try vringState(&reader)
            if value == 0 {
                try stop(ring)
                ring.isEnabled = false
            } else {
                ring.isEnabled = true
                try start(ring)
            }
        case .setVringKick:
            let ring = try vringOfDescriptor(&reader, descriptors.count)
            try stop(ring)
            ring.kick = descriptors.next()
            try start(ring)
        case .setVringCall:
            let ring = try vringOfDescriptor(&reader, descriptors.count)
            // The front end exchanges it while the ring runs (masking of interrupts): restart the thread with the new one.
            try exchange(ring) { ring.call = descriptors.next() }
        case .setVringError:
            let ring = try vringOfDescriptor(&reader, descriptors.count)
            try exchange(ring) { ring.error = descriptors.next() }
        case .setBackendRequestDescriptor:
            try reader.end()
            if let descriptor = descriptors.next() { backendChannel = UnixSocket(adopting: descriptor) }
        case .getConfig:
            return try getConfiguration(&reader)
        case .setConfig:
            let offset = Int(try reader.u32())
            let count = Int(try reader.u32())
            _ = try reader.u32()
            let bytes = reader.rest()
            guard bytes.count == count, offset + count <= device.configuration.count else {
                throw QuireError(.invalid, "\(count) bytes at \(offset) exceed the configuration space")
            }
            try device.writeConfiguration(offset: offset, bytes)
        case .getInflightDescriptor:
            let wanted = try InflightDescription(&reader)
            guard wanted.queueCount > 0, wanted.queueCount <= device.queueCount, wanted.queueSize > 0,
                wanted.queueSize <= 32768
            else { throw QuireError(.invalid, "\(wanted.queueCount) queues of \(wanted.queueSize) entries") }
            halt(rings)
            let region = try InflightRegion(queueCount: wanted.queueCount, queueSize: wanted.queueSize)
            // The driver begins anew, and its guest perhaps not: it may have slept.
            if inflight?.origin == .elsewhere { region.note(.elsewhere) }
            inflight = region
            return Answer(region.description.encoded, passing: region.file.raw())
        case .setInflightDescriptor:
            let described = try InflightDescription(&reader)
            halt(rings)
            guard let descriptor = descriptors.next() else { throw QuireError(.invalid, "no descriptor") }
            inflight = try InflightRegion(described, descriptor: descriptor, alarm: alarm)
        case .setStatus:
            let value = try single(&reader)
            guard value <= 255 else { throw QuireError(.invalid, "status \(value) exceeds 8 bits") }
            // Zero is a stop, not a proof of a reset: QEMU sends it for a pause, too.
            if value == 0 { halt(rings) }
            status = UInt8(value)
        case .getStatus:
            try reader.end()
            return Answer(littleEndian(UInt64(status)))
        }
        return nil
    }

    private func single(_ reader: inout PayloadReader) throws(QuireError) -> UInt64 {
        let value = try reader.u64()
        try reader.end()
        return value
    }

    private func vring(_ index: Int) throws(QuireError) -> Vring {
        guard index < rings.count else { throw QuireError(.invalid, "ring \(index) of a device with \(rings.count)") }
        return rings[index]
    }

    private func vringState(_ reader: inout PayloadReader) throws(QuireError) -> (Vring, UInt32) {
        let index = Int(try reader.u32())
        let value = try reader.u32()
        try reader.end()
        return (try vring(index), value)
    }

    /// SET_VRING_KICK, CALL, ERR: bits 0-7 the ring, bit 8 "no descriptor: poll".
    private func vringOfDescriptor(_ reader: inout PayloadReader, _ count: Int) throws(QuireError) -> Vring {
        let value = try single(&reader)
        let ring = try vring(Int(value & 0xff))
        let expectsOne = value & 0x100 == 0
        guard (count == 1) == expectsOne else {
            throw QuireError(.invalid, "the descriptor does not match the message's flag")
        }
        return ring
    }

    /// Without protocol features there is no message that enables a ring.
    private var ringsBeginEnabled: Bool { !features.contains(.protocolFeatures) }

    private func setFeatures(_ wanted: VirtioFeatures) throws(QuireError) {
        guard wanted.isSubset(of: offeredFeatures) else {
            throw QuireError(
                .invalid, "features 0x\(String(wanted.subtracting(offeredFeatures).rawValue, radix: 16)) were not offered")
        }
        let logging = wanted.contains(.logAll)
        // Only logging is switched on and off while rings run.
        if features.union(.logAll) != wanted.union(.logAll) {
            halt(rings)
            features = wanted
            for ring in rings where ring.addresses == nil { ring.isEnabled = ringsBeginEnabled }
        }
        features = wanted
        if logging != tracker.isEnabled {
            tracker.setEnabled(logging)
            device.lifecycle?.loggingChanged(logging)
        }
    }

    private func setMemoryTable(
        _ reader: inout PayloadReader, _ descriptors: inout UnixSocket.PassedDescriptors
    ) throws(QuireError) {
        let count = Int(try reader.u32())
        _ = try reader.u32()
        guard count >= 1, count <= Message.maxTableRegions, count == descriptors.count else {
            throw QuireError(.invalid, "a table of \(count) regions with \(descriptors.count) descriptors")
        }
        var described: [RegionDescription] = []
        for _ in 0..<count { described.append(try RegionDescription(&reader)) }
        try reader.end()
        var table: [MemoryRegion] = []
        for region in described { table.append(try makeRegion(region, &descriptors)) }
        try exchangeRegions(for: table)
    }

    private func makeRegion(
        _ region: RegionDescription, _ descriptors: inout UnixSocket.PassedDescriptors
    ) throws(QuireError) -> MemoryRegion {
        guard let descriptor = descriptors.next() else {
            throw QuireError(
                .invalid, "a memory region without a descriptor: guest RAM must be shared (share=on, "
                    + "<access mode='shared'/>)")
        }
        let file = try descriptor.status().identity
        if let peer = try? socket.peer(), ProcessCalls.maps(file, privatelyAt: region.userAddress, in: peer.pid) {
            throw QuireError(
                .invalid, "guest RAM is private to QEMU (share=off), so nobody else sees what the guest writes: use share=on "
                    + "(libvirt: <access mode='shared'/>)")
        }
        return try MemoryRegion(
            guestAddress: region.guestAddress, byteCount: region.byteCount, userAddress: region.userAddress,
            fileOffset: region.fileOffset, descriptor: descriptor, owner: .peer(alarm))
    }

    private func addRegion(
        _ reader: inout PayloadReader, _ descriptors: inout UnixSocket.PassedDescriptors
    ) throws(QuireError) {
        _ = try reader.u64()
        let described = try RegionDescription(&reader)
        try reader.end()
        guard regions.count < Message.maxMemorySlots else {
            throw QuireError(.invalid, "more than \(Message.maxMemorySlots) memory regions")
        }
        let table = regions + [try makeRegion(described, &descriptors)]
        try exchangeRegions(for: table)
    }

    /// A region that is gone must be told of, too: whoever keeps pages apart from us would ask for it for ever.
    private func exchangeRegions(for table: [MemoryRegion]) throws(QuireError) {
        let memory = try GuestMemory(table, log: tracker, pages: pages)
        pages?.use(memory)
        try reconfigure { regions = table }
    }

    private func removeRegion(_ reader: inout PayloadReader) throws(QuireError) {
        _ = try reader.u64()
        let described = try RegionDescription(&reader)
        try reader.end()
        guard
            let index = regions.firstIndex(where: {
                $0.guestAddress == described.guestAddress && $0.byteCount == described.byteCount
                    && $0.userAddress == described.userAddress
            })
        else { throw QuireError(.invalid, "no such memory region") }
        var table = regions
        table.remove(at: index)
        try exchangeRegions(for: table)
    }

    private func setLogBase(
        _ reader: inout PayloadReader, _ descriptors: inout UnixSocket.PassedDescriptors
    ) throws(QuireError) -> Answer? {
        let byteCount = try reader.u64()
        let offset = try reader.u64()
        try reader.end()
        guard let descriptor = descriptors.next() else { throw QuireError(.invalid, "no descriptor") }
        tracker.setLog(try DirtyLog(descriptor, offset: offset, byteCount: byteCount, owner: .peer(alarm)))
        // With shared memory the front end waits for an answer, whatever its flags say.
        return protocolFeatures.contains(.logSharedMemory) ? Answer(littleEndian(UInt64(0))) : nil
    }

    private func getConfiguration(_ reader: inout PayloadReader) throws(QuireError) -> Answer {
        let offset = try reader.u32()
        let count = try reader.u32()
        let flags = try reader.u32()
        // The front end sends as many bytes as it wants back; what they hold does not matter.
        guard reader.rest().count == Int(count) else { throw QuireError(.invalid, "wrong size of the configuration") }
        let all = device.configuration
        guard offset <= all.count, count <= 256 else {
            throw QuireError(.invalid, "\(count) bytes at \(offset) exceed the configuration space of \(all.count)")
        }
        // Reading past the end gives zeros: front ends ask for the size of their own structure.
        var bytes = Array(all[Int(offset)...].prefix(Int(count)))
        bytes += [UInt8](repeating: 0, count: Int(count) - bytes.count)
        return Answer(littleEndian(offset) + littleEndian(count) + littleEndian(flags) + bytes)
    }

    /// Tells the front end that the configuration space has changed (VHOST_USER_BACKEND_CONFIG_CHANGE_MSG).
    public func announceConfigurationChange() throws(QuireError) {
        guard backendChannel != nil else { return }
        try backendChannel!.send(Message.encode(2, []))
    }

    // MARK: - Starting and stopping

    private func guestMemory() throws(QuireError) -> GuestMemory { try GuestMemory(regions, log: tracker, pages: pages) }

    /// A kick descriptor or an "enable" has come: the ring starts if it is complete. Only this one: another may be
    /// complete with what was true before a reset.
    private func start(_ ring: Vring) throws(QuireError) {
        guard let addresses = ring.addresses, ring.isComplete, !ring.isStarted, !regions.isEmpty else { return }
        // What cannot be started leaves what runs alone.
        let memory = try guestMemory()
        try ring.check(addresses, in: memory)
        // Before anything is answered: who serves the guest after us reads it in the region.
        if let inflight, inflight.origin == nil { inflight.note(try areInUse(in: memory) ? .elsewhere : .here) }
        if let inflight, inflight.queue(ring.index, size: ring.size) == nil {
            let room = "\(inflight.description.queueCount) of \(inflight.description.queueSize)"
            let cost = "requests in flight are lost if this process dies"
            logger.warning("ring \(ring.index) has \(ring.size) entries, the in-flight region room for \(room): \(cost)")
        }
        try reconfigure(ring) {
            ring.isStarted = true
            isDeviceStarted = true
        }
    }

    /// Whether the guest's driver has used the rings before that it lets us serve now. It begins with indices of 0 and a used
    /// ring of zeros (virtio 1.2, section 4.1.5.1.3), and after 65,536 requests the indices are 0 again.
    private func areInUse(in memory: GuestMemory) throws(QuireError) -> Bool {
        // QEMU sets up all that the driver has before it enables the first; the others are left over from before.
        for ring in rings where ring.kick != nil {
            if ring.base != 0 { return true }
            guard ring.fits(memory), let addresses = ring.addresses else { continue }
            let lastEntry = addresses.usedRing + UInt64(4 + 8 * (Int(ring.size) - 1))
            guard let place = memory.place(ofUser: lastEntry, count: 8) else { continue }
            let bytes = try memory.buffer(place.guestAddress, count: 8).copyOut()
            if bytes.contains(where: { $0 != 0 }) { return true }
        }
        return false
    }

    /// Stops one ring. The others go on, and the device with them.
    private func stop(_ ring: Vring) throws(QuireError) {
        if ring.isStarted { try reconfigure(ring) { ring.isStarted = false } }
    }

    /// Stops rings, and the device until the next start. The rings first: a request that is being answered is answered
    /// by a device that still runs.
    private func halt(_ rings: [Vring]) {
        for ring in rings { ring.beginStop() }
        for ring in rings {
            ring.stop()
            ring.isStarted = false
        }
        suspendDevice()
        isDeviceStarted = false
        ownNonce = 0
    }

    /// Exchanges a ring's descriptor; the device need not notice.
    private func exchange(_ ring: Vring, _ change: () -> Void) throws(QuireError) {
        ring.stop()
        change()
        try prepare([ring], guestMemory())
        ring.release()
    }

    /// Runs `change` while rings and device stand still; then they go on with what has changed. Where the device does
    /// nothing outside of its rings, it is enough that the one stands still that is named.
    private func reconfigure(_ ring: Vring? = nil, _ change: () -> Void) throws(QuireError) {
        let still = if let ring, device.lifecycle == nil { [ring] } else { rings }
        for ring in still { ring.beginStop() }
        for ring in still { ring.stop() }
        suspendDevice()
        change()
        guard rings.contains(where: \.isStarted) else { return halt([]) }
        let memory = try guestMemory()
        try prepare(still, memory)
        resumeDevice(memory)
        for ring in still { ring.release() }
    }

    /// Makes the started ones of `rings` ready to serve. One whose memory is gone rests until it is back: QEMU replaces
    /// a region by removing and adding it.
    private func prepare(_ rings: [Vring], _ memory: GuestMemory) throws(QuireError) {
        do throws(QuireError) {
            for ring in rings where ring.isStarted && ring.fits(memory) {
                try ring.start(
                    device: device, memory: memory, features: features, inflight: inflight, alarm: alarm,
                    logger: logger)
            }
        } catch {
            // "No" would not tell the front end that rings have stopped which it did not even name.
            isBroken = true
            throw error
        }
    }

    private func suspendDevice() {
        if isDeviceRunning { device.lifecycle?.deviceStopping() }
        isDeviceRunning = false
    }

    /// Lets the device run with the rings that are ready, if any is. Before those: a ring that runs finds it running.
    private func resumeDevice(_ memory: GuestMemory) {
        guard isDeviceStarted, rings.contains(where: \.isRunning) else { return }
        isDeviceRunning = true
        let region = inflight
        device.lifecycle?.deviceStarted(
            DeviceStart(
                memory: memory, rings: rings.compactMap(\.layout), nonce: nonce, origin: region?.origin ?? .unknown,
                isUnnoticed: isUnnoticed, frontEnd: (try? socket.peer())?.pid, connection: socket.descriptor.raw,
                settle: { region?.settle() }))
    }

    private var nonce: UInt64 {
        if let inflight, inflight.nonce != 0 { return inflight.nonce }
        if ownNonce == 0 { ownNonce = UInt64.random(in: 1...UInt64.max) }
        return ownNonce
    }
}
