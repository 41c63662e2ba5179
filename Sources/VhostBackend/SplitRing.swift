import GuestMemory
import Platform

/// A split virtqueue (virtio 1.2, section 2.7) as the device sees it.
///
/// The guest is hostile. Ring memory changes while it is read, so every index, length and flag is read once, checked
/// against the ring's size or against RAM, and used only after that; the ring's three parts were resolved to places in
/// guest RAM when the ring was started, so that no later value can lead outside. What breaks the protocol throws
/// `.guest`, and the caller stops the ring.
public struct SplitRing: Sendable {
    /// Where a ring lies, for those who must keep their hands off it.
    public struct Layout: Sendable {
        public let descriptorTable: Range<UInt64>
        public let availableRing: Range<UInt64>
        public let usedRing: Range<UInt64>
        public var ranges: [Range<UInt64>] { [descriptorTable, availableRing, usedRing] }
    }

    /// Entries; a power of two up to 32,768.
    public let size: UInt16
    public let layout: Layout
    private let memory: GuestMemory
    /// The rings are used through the mapping, with atomics: never merged while there is one of these.
    private let hold: PageHold?
    private let descriptors: GuestMemory.Place
    private let available: GuestMemory.Place
    private let used: GuestMemory.Place
    private let usesEventIndex: Bool
    private let allowsIndirect: Bool
    /// Guest address at which writes to the used ring are logged (VHOST_VRING_F_LOG); nil: they are not.
    private let usedLogAddress: UInt64?

    /// The next entry of the available ring to be looked at. Free-running, as all indices of a ring.
    public internal(set) var nextAvailable: UInt16
    /// The next entry of the used ring to be filled.
    public private(set) var nextUsed: UInt16
    /// `nextUsed` at the last decision about a notification.
    private var signalledUsed: UInt16

    /// Where the three parts are, checked.
    private struct Places {
        let descriptors, available, used: GuestMemory.Place
        let size: Int

        init(size: UInt16, addresses: VringAddresses, memory: GuestMemory) throws(QuireError) {
            guard size > 0, size <= 32768, size & (size - 1) == 0 else {
                throw QuireError(.invalid, "a ring of \(size) entries: the size must be a power of two up to 32768")
            }
            func place(
                _ address: UInt64, _ count: Int, alignment: UInt64, _ what: String
            ) throws(QuireError) -> GuestMemory.Place {
                guard address % alignment == 0 else {
                    throw QuireError(.invalid, "the \(what) is not aligned to \(alignment) bytes")
                }
                guard let place = memory.place(ofUser: address, count: UInt64(count)) else {
                    let text = "0x" + String(address, radix: 16)
                    throw QuireError(.invalid, "the \(what) at \(text) is outside of guest memory")
                }
                return place
            }
            let entries = Int(size)
            self.size = entries
            descriptors = try place(addresses.descriptorTable, 16 * entries, alignment: 16, "descriptor table")
            available = try place(addresses.availableRing, 6 + 2 * entries, alignment: 2, "available ring")
            used = try place(addresses.usedRing, 6 + 8 * entries, alignment: 4, "used ring")
        }

        var layout: Layout {
            func range(_ place: GuestMemory.Place, _ count: Int) -> Range<UInt64> {
                place.guestAddress..<place.guestAddress + UInt64(count)
            }
            return Layout(
                descriptorTable: range(descriptors, 16 * size), availableRing: range(available, 6 + 2 * size),
                usedRing: range(used, 6 + 8 * size))
        }
    }

    /// Throws what is wrong with a ring's size and addresses, above all if not all of it lies in `memory`.
    static func check(size: UInt16, addresses: VringAddresses, memory: GuestMemory) throws(QuireError) {
        _ = try Places(size: size, addresses: addresses, memory: memory)
    }

    init(
        size: UInt16, addresses: VringAddresses, base: UInt16, memory: GuestMemory, features: VirtioFeatures
    ) throws(QuireError) {
        let places = try Places(size: size, addresses: addresses, memory: memory)
        self.size = size
        self.memory = memory
        descriptors = places.descriptors
        available = places.available
        used = places.used
        layout = places.layout
        hold = try memory.keepPrivate(places.layout.ranges)
        usesEventIndex = features.contains(.eventIndex)
        allowsIndirect = features.contains(.indirectDescriptors)
        usedLogAddress = addresses.logsUsedRing ? addresses.logGuestAddress : nil
        nextAvailable = base
        nextUsed = used.mapping.load16(used.offset + 2)
        signalledUsed = nextUsed
    }

    /// True if the guest has made something available that was not taken yet.
    public var hasAvailable: Bool { available.mapping.load16(available.offset + 2) != nextAvailable }

    /// Takes the next chain. Nil when there is none.
    mutating func pop() throws(QuireError) -> DescriptorChain? {
        let index = available.mapping.load16(available.offset + 2)
        let pending = index &- nextAvailable
        if pending == 0 { return nil }
        guard pending <= size else {
            throw QuireError(.guest, "the available index jumped by \(pending) in a ring of \(size)")
        }
        let head = available.mapping.load16(available.offset + 4 + 2 * Int(nextAvailable % size))
        let chain = try chain(head: head)
        nextAvailable &+= 1
        return chain
    }

    /// Walks the chain that starts at `head`. Also for requests that were in flight when a back end died.
    func chain(head: UInt16) throws(QuireError) -> DescriptorChain {
        guard head < size else { throw QuireError(.guest, "descriptor \(head) in a ring of \(size)") }
        var chain = DescriptorChain(head: head, empty: memory.emptyBuffer)
        try walk(into: &chain, from: head, count: size, indirect: false) { index in
            self.descriptors.mapping.copyOut(self.descriptors.offset + 16 * Int(index), count: 16)
        }
        return chain
    }

    private static let flagNext: UInt16 = 1
    private static let flagWrite: UInt16 = 2
    private static let flagIndirect: UInt16 = 4

    private func walk(
        into chain: inout DescriptorChain, from first: UInt16, count: UInt16, indirect: Bool,
        _ descriptor: (UInt16) -> [UInt8]
    ) throws(QuireError) {
        var index = first
        var steps: UInt32 = 0
        while true {
            steps += 1
            guard steps <= UInt32(count) else { throw QuireError(.guest, "a descriptor chain is a loop") }
            let bytes = descriptor(index)
            let address: UInt64 = fromLittleEndian(bytes[0..<8])
            let length: UInt32 = fromLittleEndian(bytes[8..<12])
            let flags: UInt16 = fromLittleEndian(bytes[12..<14])
            let next: UInt16 = fromLittleEndian(bytes[14..<16])

            if flags & Self.flagIndirect != 0 {
                guard allowsIndirect else { throw QuireError(.guest, "an indirect descriptor that was not negotiated") }
                guard !indirect else { throw QuireError(.guest, "an indirect descriptor inside an indirect table") }
                guard flags & Self.flagNext == 0 else { throw QuireError(.guest, "an indirect descriptor with a successor") }
                guard length > 0, length % 16 == 0, length / 16 <= 32768 else {
                    throw QuireError(.guest, "an indirect table of \(length) bytes")
                }
                // Copied as a whole: what is checked is what is used.
                let table = try memory.buffer(address, count: UInt64(length)).copyOut()
                try walk(into: &chain, from: 0, count: UInt16(length / 16), indirect: true) { index in
                    Array(table[16 * Int(index)..<16 * Int(index) + 16])
                }
                return
            }
            let buffer = try memory.buffer(address, count: UInt64(length))
            if flags & Self.flagWrite != 0 {
                chain.writable.append(buffer)
            } else {
                guard chain.writable.count == 0 else {
                    throw QuireError(.guest, "a readable descriptor behind a writable one")
                }
                chain.readable.append(buffer)
            }
            guard chain.writable.count + chain.readable.count <= Int(UInt32.max) else {
                throw QuireError(.guest, "a descriptor chain of more than 4 GiB")
            }
            guard flags & Self.flagNext != 0 else { return }
            guard next < count else { throw QuireError(.guest, "descriptor \(next) in a table of \(count)") }
            index = next
        }
    }

    /// Gives a chain back: `written` bytes were stored in its writable part.
    mutating func push(head: UInt16, written: UInt32) {
        let entry = 4 + 8 * Int(nextUsed % size)
        used.mapping.store32(used.offset + entry, UInt32(head))
        used.mapping.store32(used.offset + entry + 4, written)
        logUsed(entry, 8)
        nextUsed &+= 1
        used.mapping.store16(used.offset + 2, nextUsed)
        logUsed(2, 2)
    }

    private func logUsed(_ offset: Int, _ count: Int) {
        guard let usedLogAddress else { return }
        memory.log.markDirty(guestAddress: usedLogAddress &+ UInt64(offset), byteCount: UInt64(count))
    }

    /// Whether the guest wants to hear of what was pushed since the last call (virtio 1.2, 2.7.7 and 2.7.10).
    mutating func needsNotification() -> Bool {
        memoryFence()
        let old = signalledUsed
        signalledUsed = nextUsed
        if nextUsed == old { return false }
        if usesEventIndex {
            let event = available.mapping.load16(available.offset + 4 + 2 * Int(size))
            return nextUsed &- event &- 1 < nextUsed &- old
        }
        return available.mapping.load16(available.offset) & 1 == 0
    }

    /// Asks the guest to kick (or not to). After asking, look at the ring once more before sleeping.
    mutating func setNotifications(_ enabled: Bool) {
        if usesEventIndex {
            // While disabled the old event index stays: the guest kicks at most once too often.
            guard enabled else { return }
            used.mapping.store16(used.offset + 4 + 8 * Int(size), nextAvailable)
            logUsed(4 + 8 * Int(size), 2)
        } else {
            used.mapping.store16(used.offset, enabled ? 0 : 1)
            logUsed(0, 2)
        }
        memoryFence()
    }
}

/// One request: what the guest wrote for the device, and room for what the device answers.
public struct DescriptorChain: Sendable {
    public let head: UInt16
    public internal(set) var readable: GuestBuffer
    public internal(set) var writable: GuestBuffer

    init(head: UInt16, empty: GuestBuffer) {
        self.head = head
        readable = empty
        writable = empty
    }
}
