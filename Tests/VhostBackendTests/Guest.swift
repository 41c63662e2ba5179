import Glibc
import Platform

/// Guest RAM as a front end shares it: a few files, each with a canary before and behind the part that is RAM.
final class GuestRAM {
    final class Region {
        let guestAddress: UInt64, byteCount: UInt64, userAddress: UInt64, fileOffset: UInt64
        let file: Descriptor
        /// Of the whole file, canaries included.
        let mapping: Mapping

        static let canaryBytes: UInt64 = 16384
        static let canary: UInt8 = 0xa5

        init(
            guestAddress: UInt64, byteCount: UInt64, userAddress: UInt64, makeFile: (UInt64) throws -> Descriptor
        ) throws {
            (self.guestAddress, self.byteCount, self.userAddress) = (guestAddress, byteCount, userAddress)
            fileOffset = Self.canaryBytes
            let total = byteCount + 2 * Self.canaryBytes
            file = try makeFile(total)
            mapping = try Mapping(file, byteCount: Int(total))
            let wall = [UInt8](repeating: Self.canary, count: Int(Self.canaryBytes))
            mapping.copyIn(0, wall)
            mapping.copyIn(Int(Self.canaryBytes + byteCount), wall)
        }

        var isIntact: Bool {
            let wall = [UInt8](repeating: Self.canary, count: Int(Self.canaryBytes))
            return mapping.copyOut(0, count: wall.count) == wall
                && mapping.copyOut(Int(Self.canaryBytes + byteCount), count: wall.count) == wall
        }

        /// VhostUserMemoryRegion.
        var wire: [UInt8] { le(guestAddress) + le(byteCount) + le(userAddress) + le(fileOffset) }
        /// With the padding of ADD_MEM_REG and REM_MEM_REG.
        var single: [UInt8] { le(UInt64(0)) + wire }
    }

    var regions: [Region]

    static let high: UInt64 = 1 << 32
    static let lowBytes: UInt64 = 2 << 20, highBytes: UInt64 = 1 << 20
    static let lowUser: UInt64 = 0x7f00_0000_0000

    static func sealedFile(_ byteCount: UInt64) throws -> Descriptor {
        try Memfd(name: "test-ram", byteCount: byteCount).takeDescriptor()
    }

    /// 2 MiB at 0; two neighbouring regions of 1 MiB, of different files, from 4 GiB on.
    init(makeFile: (UInt64) throws -> Descriptor = sealedFile) throws {
        func region(_ guestAddress: UInt64, _ byteCount: UInt64, _ userAddress: UInt64) throws -> Region {
            try Region(guestAddress: guestAddress, byteCount: byteCount, userAddress: userAddress, makeFile: makeFile)
        }
        regions = [
            try region(0, Self.lowBytes, Self.lowUser), try region(Self.high, Self.highBytes, 0x7f10_0000_0000),
            try region(Self.high + Self.highBytes, Self.highBytes, 0x7f20_0000_0000),
        ]
    }

    private func place(_ address: UInt64) -> (Region, Int, Int) {
        let region = regions.first { $0.guestAddress <= address && address < $0.guestAddress + $0.byteCount }!
        let offset = address - region.guestAddress
        return (region, Int(region.fileOffset + offset), Int(region.byteCount - offset))
    }

    func write(_ address: UInt64, _ bytes: [UInt8]) {
        var address = address
        var rest = bytes[...]
        while !rest.isEmpty {
            let (region, offset, room) = place(address)
            let part = rest.prefix(room)
            region.mapping.copyIn(offset, part)
            rest = rest.dropFirst(part.count)
            address += UInt64(part.count)
        }
    }

    func read(_ address: UInt64, _ count: Int) -> [UInt8] {
        var bytes: [UInt8] = []
        while bytes.count < count {
            let (region, offset, room) = place(address + UInt64(bytes.count))
            bytes += region.mapping.copyOut(offset, count: min(room, count - bytes.count))
        }
        return bytes
    }

    func load16(_ address: UInt64) -> UInt16 {
        let (region, offset, _) = place(address)
        return region.mapping.load16(offset)
    }
    func store16(_ address: UInt64, _ value: UInt16) {
        let (region, offset, _) = place(address)
        region.mapping.store16(offset, value)
    }

    func user(ofGuest address: UInt64) -> UInt64 {
        let (region, _, _) = place(address)
        return region.userAddress + (address - region.guestAddress)
    }

    var isIntact: Bool { regions.allSatisfy(\.isIntact) }
}

/// The driver's side of a split virtqueue (virtio 1.2, section 2.7), which may break every rule of it.
final class DriverRing {
    struct Part {
        var address: UInt64
        var count: UInt32
        var isWritable = false
    }

    static let next: UInt16 = 1, write: UInt16 = 2, indirect: UInt16 = 4

    let ram: GuestRAM
    let queue: Int
    let size: Int
    /// Guest addresses: descriptors at `base`, available ring a page behind them, used ring a page behind that.
    let base: UInt64
    var descriptorTable: UInt64 { base }
    var available: UInt64 { base + 0x2000 }
    var used: UInt64 { base + 0x3000 }
    /// Used ring's guest address for the log; nil: the true one.
    var logAddress: UInt64?

    /// With event index negotiated the driver says which used entry is to wake it.
    var usesEventIndex = false

    var kick: EventDescriptor
    var call: EventDescriptor
    var error: EventDescriptor

    private(set) var nextAvailable: UInt16 = 0
    private(set) var seenUsed: UInt16 = 0
    private var freeDescriptor = 0

    init(_ ram: GuestRAM, queue: Int = 0, size: Int = 128, base: UInt64? = nil) throws {
        self.ram = ram
        self.queue = queue
        self.size = size
        self.base = base ?? 0x10000 + 0x8000 * UInt64(queue)
        kick = try EventDescriptor()
        call = try EventDescriptor()
        error = try EventDescriptor()
        reset()
    }

    /// What a driver does after a reset of the device: empty rings.
    func reset() {
        ram.write(base, [UInt8](repeating: 0, count: 0x5000))
        nextAvailable = 0
        seenUsed = 0
        freeDescriptor = 0
    }

    func wireAddresses(logFlag: Bool = false) -> [UInt8] {
        le(UInt32(queue)) + le(UInt32(logFlag ? 1 : 0)) + le(ram.user(ofGuest: descriptorTable))
            + le(ram.user(ofGuest: used)) + le(ram.user(ofGuest: available)) + le(logAddress ?? used)
    }

    func setDescriptor(_ index: Int, _ address: UInt64, _ count: UInt32, flags: UInt16, next: UInt16 = 0) {
        ram.write(descriptorTable + 16 * UInt64(index), le(address) + le(count) + le(flags) + le(next))
    }

    /// Writes a chain into consecutive descriptors; returns its head. Descriptors are used round-robin and never waited
    /// for: a test has fewer requests in flight than the ring has room for.
    func chain(_ parts: [Part]) -> UInt16 {
        let head = freeDescriptor
        for (position, part) in parts.enumerated() {
            let index = (head + position) % size
            let isLast = position == parts.count - 1
            setDescriptor(
                index, part.address, part.count,
                flags: (part.isWritable ? Self.write : 0) | (isLast ? 0 : Self.next), next: UInt16((index + 1) % size))
        }
        freeDescriptor = (head + parts.count) % size
        return UInt16(head)
    }

    /// The same chain as an indirect table at `table`.
    func indirectChain(_ parts: [Part], table: UInt64) -> UInt16 {
        for (position, part) in parts.enumerated() {
            let isLast = position == parts.count - 1
            let flags = (part.isWritable ? Self.write : 0) | (isLast ? 0 : Self.next)
            ram.write(
                table + 16 * UInt64(position), le(part.address) + le(part.count) + le(flags) + le(UInt16(position + 1)))
        }
        let head = freeDescriptor
        setDescriptor(head, table, UInt32(16 * parts.count), flags: Self.indirect)
        freeDescriptor = (head + 1) % size
        return UInt16(head)
    }

    /// Puts a head into the available ring; visible when the index is stored.
    func offer(_ head: UInt16) {
        ram.store16(available + 4 + 2 * UInt64(Int(nextAvailable) % size), head)
        nextAvailable &+= 1
        ram.store16(available + 2, nextAvailable)
    }

    func setAvailableIndex(_ value: UInt16) {
        nextAvailable = value
        ram.store16(available + 2, value)
    }

    var usedIndex: UInt16 { ram.load16(used + 2) }
    func setUsedIndex(_ value: UInt16) { ram.store16(used + 2, value) }
    func usedEntry(_ index: UInt16) -> (head: UInt32, written: UInt32) {
        let bytes = ram.read(used + 4 + 8 * UInt64(Int(index) % size), 8)
        return (number(bytes, 0), number(bytes, 4))
    }

    /// The used entries since the last call, once there are `count` of them. Sleeps on the call descriptor, as a guest
    /// that waits for its interrupt: a lost notification is a failure.
    func collect(_ count: Int, timeoutMilliseconds: UInt64 = 20_000) throws -> [(head: UInt32, written: UInt32)] {
        let deadline = monotonicNanoseconds() + timeoutMilliseconds * 1_000_000
        if usesEventIndex { ram.store16(available + 4 + 2 * UInt64(size), seenUsed &+ UInt16(count - 1)) }
        memoryFence()
        while Int(usedIndex &- seenUsed) < count {
            guard monotonicNanoseconds() < deadline else { throw FrontEnd.Failure.timeout }
            _ = waitReadable([call.descriptor.raw], timeoutMilliseconds: Int32(timeoutMilliseconds))
            call.drain()
        }
        return (0..<count).map { _ in
            defer { seenUsed &+= 1 }
            return usedEntry(seenUsed)
        }
    }

    /// True if the back end says that the ring is broken.
    func isBroken() -> Bool {
        let ready = waitReadable([error.descriptor.raw], timeoutMilliseconds: 20_000)
        return !ready.isEmpty && error.drain()
    }
}

/// Requests of a virtio block driver, and the memory that they use.
final class DriverDisk {
    enum Kind { static let read: UInt32 = 0, write: UInt32 = 1, flush: UInt32 = 4, getID: UInt32 = 8, discard: UInt32 = 11, writeZeroes: UInt32 = 13 }

    let ring: DriverRing
    private var slot: UInt64 = 0
    init(_ ring: DriverRing) { self.ring = ring }

    struct Pending {
        let head: UInt16
        let status: UInt64
    }

    /// Headers and status bytes, a page apart so that the dirty log can tell them from each other.
    private func nextSlot() -> (header: UInt64, status: UInt64) {
        defer { slot = (slot + 1) % 32 }
        let base = 0x100000 + 0x40000 * UInt64(ring.queue) + 0x2000 * slot
        return (base, base + 0x1000)
    }

    /// Offers one request. `input` and `output` are places in guest memory.
    @discardableResult func submit(
        _ kind: UInt32, sector: UInt64 = 0, input: [DriverRing.Part] = [], output: [DriverRing.Part] = [],
        indirectTable: UInt64? = nil
    ) -> Pending {
        let (header, status) = nextSlot()
        ring.ram.write(header, le(kind) + le(UInt32(0)) + le(sector))
        ring.ram.write(status, [0xee])
        let parts =
            [DriverRing.Part(address: header, count: 16)] + input
            + output.map { DriverRing.Part(address: $0.address, count: $0.count, isWritable: true) }
            + [DriverRing.Part(address: status, count: 1, isWritable: true)]
        let head = indirectTable.map { ring.indirectChain(parts, table: $0) } ?? ring.chain(parts)
        ring.offer(head)
        return Pending(head: head, status: status)
    }

    func status(_ pending: Pending) -> UInt8 { ring.ram.read(pending.status, 1)[0] }

    /// One request from offer to status. Returns the status byte and the used entry's length.
    func run(
        _ kind: UInt32, sector: UInt64 = 0, input: [DriverRing.Part] = [], output: [DriverRing.Part] = [],
        indirectTable: UInt64? = nil
    ) throws -> (status: UInt8, written: UInt32) {
        let pending = submit(kind, sector: sector, input: input, output: output, indirectTable: indirectTable)
        ring.kick.signal()
        let entry = try ring.collect(1)[0]
        guard entry.head == UInt32(pending.head) else { throw FrontEnd.Failure.wrongReply("head \(entry.head)") }
        return (status(pending), entry.written)
    }

    static let buffer: UInt64 = GuestRAM.high + 0x8000

    /// Writes a page and reads it back: proof that a session serves. `seed` makes the content.
    func proveService(sector: UInt64 = 8, seed: UInt8 = 7) throws -> Bool {
        let content = (0..<4096).map { UInt8(truncatingIfNeeded: $0 &* 31 &+ Int(seed)) }
        ring.ram.write(Self.buffer, content)
        let page = DriverRing.Part(address: Self.buffer, count: 4096)
        guard try run(Kind.write, sector: sector, input: [page]).status == 0 else { return false }
        ring.ram.write(Self.buffer, [UInt8](repeating: 0, count: 4096))
        let (status, written) = try run(Kind.read, sector: sector, output: [page])
        return status == 0 && written == 4097 && ring.ram.read(Self.buffer, 4096) == content
    }
}
