import ArgumentParser
import CQuireLayout
import Engines
import Glibc
import GuestMemory
import Platform

/// Stands where QEMU stands: started by `quire run`, it maps the guest RAM that it is given, connects to the control disk,
/// and registers a state table of a guest that has nothing to recycle: half of its pages are in use, half recycled. Then
/// it does nothing. So the real supervisor and the real backend serve 16 GiB on a machine that has less, and no guest
/// disturbs them.
struct FakeQEMU: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "fake-qemu", abstract: "Registers a table with nothing to recycle, behind quire run.", shouldDisplay: false)

    @Argument(parsing: .captureForPassthrough) var arguments: [String] = []

    func run() throws {
        func value(_ key: String, in prefix: String) throws -> String {
            for argument in arguments where argument.hasPrefix(prefix) {
                for part in argument.split(separator: ",") where part.hasPrefix(key) { return String(part.dropFirst(key.count)) }
            }
            throw QuireError(.invalid, "no \(key) in \(prefix)")
        }
        guard let raw = Int32(try value("mem-path=/proc/self/fd/", in: "memory-backend-file")) else {
            throw QuireError(.invalid, "no memory file")
        }
        let file = try Descriptor.duplicate(of: raw)
        let byteCount = try file.status().byteCount
        let userAddress: UInt64 = 0x7f00_0000_0000
        let region = try MemoryRegion(
            guestAddress: 0, byteCount: byteCount, userAddress: userAddress, fileOffset: 0,
            descriptor: try file.duplicate(), owner: .us)
        let memory = try GuestMemory([region], log: DirtyTracker())
        let table = GuestTable(in: memory, pageCount: Int(byteCount / pageBytes))
        let states = (0..<GuestTable.statesPerPage).map { $0 % 2 == 0 ? PageMark.inUse : PageMark.recycled }
        for page in 0..<table.tablePages { table.setStates(page, states) }

        let end = try FrontEnd(UnixSocket.connect(to: value("path=", in: "socket")))
        try end.start(file: file.raw, byteCount: byteCount, userAddress: userAddress, ringAt: table.end, in: memory)
        var request = Array(QUIRE_CTL_REQUEST_MAGIC.utf8) + littleEndian(UInt32(QUIRE_CTL_VERSION))
        request += littleEndian(UInt32(QUIRE_CTL_REGISTER.rawValue)) + littleEndian(table.headerAddress)
        request += paddedText("quire-bench", capacity: 64)
        try end.write(request, toBlock: Int(QUIRE_CTL_REQUEST_BLOCK.rawValue), in: memory)
        while true { pause() }
    }
}

/// The least front end that a vhost-user-blk device serves: one queue of eight entries, one request at a time.
private final class FrontEnd {
    private static let entries = 8
    private let socket: UnixSocket
    private let kick: EventDescriptor, call: EventDescriptor
    /// Descriptor table, available ring and used ring in one page; requests in the two pages after it.
    private var ringAt: UInt64 = 0
    private var index: UInt16 = 0

    init(_ socket: consuming UnixSocket) throws {
        self.socket = socket
        kick = try EventDescriptor()
        call = try EventDescriptor()
    }

    private func tell(_ request: UInt32, _ payload: [UInt8] = [], passing descriptors: [Int32] = []) throws {
        try socket.send(littleEndian(request) + littleEndian(UInt32(1)) + littleEndian(UInt32(payload.count)) + payload, passing: descriptors)
    }

    private func ask(_ request: UInt32) throws -> UInt64 {
        try tell(request)
        var passed = UnixSocket.PassedDescriptors()
        guard let answer = try socket.receive(count: 20, maxDescriptors: 0, into: &passed) else {
            throw QuireError(.closed, "the backend closed the connection")
        }
        return (12..<20).reversed().reduce(0) { $0 << 8 | UInt64(answer[$1]) }
    }

    func start(file: Int32, byteCount: UInt64, userAddress: UInt64, ringAt: UInt64, in memory: GuestMemory) throws {
        self.ringAt = ringAt
        let protocolFeatures: UInt64 = 1 << 30, version1: UInt64 = 1 << 32
        let offered = try ask(1)  // GET_FEATURES
        guard offered & protocolFeatures != 0, offered & version1 != 0 else {
            throw QuireError(.unsupported, "the backend lacks features")
        }
        let known = try ask(15)  // GET_PROTOCOL_FEATURES
        try tell(16, littleEndian(known & (1 << 0 | 1 << 9)))  // SET_PROTOCOL_FEATURES: several queues, configuration
        try tell(3)  // SET_OWNER
        try tell(2, littleEndian(protocolFeatures | version1))  // SET_FEATURES
        try tell(
            5, littleEndian(UInt32(1)) + littleEndian(UInt32(0)) + littleEndian(UInt64(0)) + littleEndian(byteCount) + littleEndian(userAddress)
                + littleEndian(UInt64(0)), passing: [file])  // SET_MEM_TABLE
        try tell(8, littleEndian(UInt32(0)) + littleEndian(UInt32(Self.entries)))  // SET_VRING_NUM
        try tell(10, littleEndian(UInt32(0)) + littleEndian(UInt32(0)))  // SET_VRING_BASE
        let user = userAddress + ringAt
        try tell(
            9, littleEndian(UInt32(0)) + littleEndian(UInt32(0)) + littleEndian(user) + littleEndian(user + 2048) + littleEndian(user + 1024)
                + littleEndian(UInt64(0)))  // SET_VRING_ADDR: descriptors, used, available
        try tell(13, littleEndian(UInt64(0)), passing: [call.descriptor.raw])  // SET_VRING_CALL
        try tell(12, littleEndian(UInt64(0)), passing: [kick.descriptor.raw])  // SET_VRING_KICK
        try tell(18, littleEndian(UInt32(0)) + littleEndian(UInt32(1)))  // SET_VRING_ENABLE
        // Answered after all of the above has been done.
        _ = try ask(1)
    }

    /// Writes one block of 4 KiB, the rest of it zeros.
    func write(_ bytes: [UInt8], toBlock block: Int, in memory: GuestMemory) throws {
        let page = memory.place(ofGuest: ringAt, count: 3 * pageBytes)!
        let ring = page.offset, head = ring + 4096, data = ring + 8192, status = head + 64
        page.mapping.copyIn(head, littleEndian(UInt32(1)) + littleEndian(UInt32(0)) + littleEndian(UInt64(block) * 8))
        page.mapping.copyIn(data, bytes + [UInt8](repeating: 0, count: 4096 - bytes.count))
        page.mapping.store8(status, 0xff)
        func describe(_ number: Int, _ offset: Int, _ count: UInt32, flags: UInt16, next: UInt16) {
            page.mapping.copyIn(
                ring + number * 16, littleEndian(ringAt + UInt64(offset - ring)) + littleEndian(count) + littleEndian(flags) + littleEndian(next))
        }
        describe(0, head, 16, flags: 1, next: 1)
        describe(1, data, 4096, flags: 1, next: 2)
        describe(2, status, 1, flags: 2, next: 0)
        page.mapping.store16(ring + 1024 + 4 + 2 * Int(index % UInt16(Self.entries)), 0)
        index += 1
        page.mapping.store16(ring + 1024 + 2, index)
        kick.signal()
        let deadline = monotonicNanoseconds() + 20_000_000_000
        while page.mapping.load16(ring + 2048 + 2) != index {
            guard monotonicNanoseconds() < deadline else { throw QuireError(.closed, "the control disk does not answer") }
            usleep(1000)
        }
        guard page.mapping.load8(status) == 0 else { throw QuireError(.guest, "the table was refused") }
    }
}
