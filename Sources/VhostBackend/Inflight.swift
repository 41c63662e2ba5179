import Platform

/// The in-flight region (vhost-user.rst, "Inflight I/O tracking", split virtqueue): memory that the front end keeps for
/// us over a crash of ours. Three things live in it:
///
/// - per queue, which requests were taken and not given back, so that a new back end runs them again;
/// - a *nonce*. QEMU frees the region only when the virtio device is reset, so a region that comes back by
///   SET_INFLIGHT_FD proves that the guest that started the device still runs (DESIGN, "Recycle"). A start that asks for
///   a new region (GET_INFLIGHT_FD) proves the opposite: whatever was known of the guest is void;
/// - the guest's *origin* (`DeviceStart.Origin`), which shows at the first start under the region and at no later one.
///
/// Layout of a queue, as the specification gives it: features u64, version u16, desc_num u16, last_batch_head u16,
/// used_idx u16; then desc_num entries of 16 bytes: inflight u8, padding 5, next u16, counter u64. Queues are aligned to
/// 64 bytes. Behind the last one, ours: magic u64, nonce u64, origin u64.
final class InflightRegion: Sendable {
    private static let magic: UInt64 = 0x5445_4c46_4e49_5551  // "QUINFLET", little-endian
    private static let version: UInt16 = 1
    private static let headBytes = 16
    private static let entryBytes = 16
    private static let lastBatchHeadOffset = 12
    private static let usedIndexOffset = 14
    private static let tailBytes = 64

    /// What the origin's word says; anything else, an earlier release's zero above all, is an unknown one.
    private enum Word { static let untold: UInt64 = 1, here: UInt64 = 2, elsewhere: UInt64 = 3 }

    let mapping: Mapping
    let description: InflightDescription
    let nonce: UInt64
    /// Where ours is.
    private let tail: Int
    /// The file of a region that we made, to be handed to the front end.
    let file: Descriptor?

    private static func queueBytes(_ size: UInt16) -> Int {
        (headBytes + entryBytes * Int(size) + 63) / 64 * 64
    }

    private static func byteCount(queues: UInt16, size: UInt16) -> Int { Int(queues) * queueBytes(size) + tailBytes }

    /// A new region with a new nonce.
    init(queueCount: UInt16, queueSize: UInt16) throws(QuireError) {
        let bytes = Self.byteCount(queues: queueCount, size: queueSize)
        let file = try Memfd(name: "quire-inflight", byteCount: UInt64(bytes)).takeDescriptor()
        let mapping = try Mapping(file, byteCount: bytes)
        for queue in 0..<Int(queueCount) {
            let base = queue * Self.queueBytes(queueSize)
            mapping.store16(base + 8, Self.version)
            mapping.store16(base + 10, queueSize)
        }
        let nonce = UInt64.random(in: 1...UInt64.max)
        tail = bytes - Self.tailBytes
        mapping.store64(tail, Self.magic)
        mapping.store64(tail + 8, nonce)
        mapping.store64(tail + 16, Word.untold)
        description = InflightDescription(
            byteCount: UInt64(bytes), offset: 0, queueCount: queueCount, queueSize: queueSize)
        self.mapping = mapping
        self.nonce = nonce
        self.file = consume file
    }

    /// A region that the front end kept. It may be anything: checked before use; its nonce is 0 if it is not ours.
    init(
        _ description: InflightDescription, descriptor: borrowing Descriptor, alarm: TruncationAlarm
    ) throws(QuireError) {
        let size = try descriptor.status().byteCount
        let (end, overflow) = description.offset.addingReportingOverflow(description.byteCount)
        guard !overflow, end <= size, description.offset % 4096 == 0, description.queueSize > 0,
            description.queueCount > 0,
            description.byteCount >= UInt64(Self.byteCount(queues: description.queueCount, size: description.queueSize))
        else {
            throw QuireError(
                .invalid, "the in-flight region of \(description.byteCount) bytes at \(description.offset) does not fit "
                    + "its file of \(size) bytes or its \(description.queueCount) queues")
        }
        mapping = try Mapping(
            descriptor, offset: description.offset, byteCount: Int(description.byteCount), owner: .peer(alarm))
        self.description = description
        file = nil
        tail = Self.byteCount(queues: description.queueCount, size: description.queueSize) - Self.tailBytes
        nonce = mapping.load64(tail) == Self.magic ? mapping.load64(tail + 8) : 0
    }

    /// Nil until it is noted, before the first start under the region.
    var origin: DeviceStart.Origin? {
        guard nonce != 0 else { return .unknown }
        return switch mapping.load64(tail + 16) {
        case Word.untold: nil
        case Word.here: .here
        case Word.elsewhere: .elsewhere
        default: .unknown
        }
    }

    func note(_ origin: DeviceStart.Origin) {
        mapping.store64(tail + 16, origin == .elsewhere ? Word.elsewhere : Word.here)
    }

    /// See `DeviceStart.settle`.
    func settle() { if origin == .elsewhere { note(.here) } }

    /// The part of one queue; nil if the region has no room for it.
    func queue(_ index: Int, size: UInt16) -> InflightQueue? {
        guard index < Int(description.queueCount), size <= description.queueSize else { return nil }
        return InflightQueue(region: self, base: index * Self.queueBytes(description.queueSize))
    }

    /// The log of one queue. Writes happen in the order of the specification, so that a crash between any two of them is
    /// understood by the next back end.
    struct InflightQueue: Sendable {
        let region: InflightRegion
        let base: Int

        private func entry(_ head: UInt16) -> Int { base + headBytes + entryBytes * Int(head) }

        /// Heads that were in flight, oldest first; call once, before the ring runs. `usedIndex` is the ring's.
        func recover(size: UInt16, usedIndex: UInt16) -> [UInt16] {
            let mapping = region.mapping.load16(base + usedIndexOffset)
            if mapping != usedIndex {
                // Died between storing the used index and clearing the entry: the request is done.
                let head = region.mapping.load16(base + lastBatchHeadOffset)
                if head < size { region.mapping.store8(entry(head), 0) }
                region.mapping.store16(base + usedIndexOffset, usedIndex)
            }
            return (0..<size).filter { region.mapping.load8(entry($0)) == 1 }
                .sorted { region.mapping.load64(entry($0) + 8) < region.mapping.load64(entry($1) + 8) }
        }

        func begin(_ head: UInt16, counter: UInt64) {
            region.mapping.store64(entry(head) + 8, counter)
            region.mapping.store8(entry(head), 1)
        }

        /// It was not answered, and is to be taken from the ring again.
        func giveBack(_ head: UInt16) { region.mapping.store8(entry(head), 0) }

        /// Before the used index is stored.
        func willComplete(_ head: UInt16) { region.mapping.store16(base + lastBatchHeadOffset, head) }

        /// After it.
        func didComplete(_ head: UInt16, usedIndex: UInt16) {
            region.mapping.store8(entry(head), 0)
            region.mapping.store16(base + usedIndexOffset, usedIndex)
        }
    }
}
