import CQuireLayout
import Engines
import Glibc
import GuestMemory
import Host
import Logging
import Platform
import TestSupport
import Testing
import VhostBackend

/// The control disk as a guest sees it: bytes at the offsets of quire_layout.h, part 1, spelled out here once more.
@Suite struct ControlDiskTests {
    /// The disk, its engine, and 8 MiB of guest RAM with a table in pages 1 to 3 and the driver's buffers from page 16 on.
    private final class Bench {
        let map: PageMap
        let engine: RecycleEngine
        let disk: ControlDisk
        let memory: GuestMemory
        let ram: Mapping
        static let pages = 2048
        static let buffer: UInt64 = 16 * 4096

        init(period: UInt32 = 10) throws {
            map = try PageMap(PageMap.makeFile(pageCount: 1 << 16))
            engine = try RecycleEngine(.init(periodMilliseconds: period), map: map)
            disk = ControlDisk(engine: engine, map: map, logger: Logger(label: "test") { _ in SwiftLogNoOpLogHandler() })
            let file = try Memfd(name: "control-test", byteCount: UInt64(Self.pages) * 4096).takeDescriptor()
            ram = try Mapping(file, byteCount: Self.pages * 4096)
            memory = try GuestMemory(
                [
                    try MemoryRegion(
                        guestAddress: 0, byteCount: UInt64(Self.pages) * 4096, userAddress: 0x7f00_0000_0000,
                        fileOffset: 0, descriptor: file, owner: .us)
                ], log: DirtyTracker())
            ram.copyIn(4096, Array("QUIRETBL".utf8))
            ram.store32(4096 + 8, 1)
            ram.store64(4096 + 16, 4096)
            ram.store64(4096 + 24, 2 * 4096)
            ram.store64(2 * 4096, 3 * 4096)
        }

        deinit { engine.end() }

        func start(nonce: UInt64 = 0x1122_3344_5566_7788) {
            disk.deviceStarted(DeviceStart(memory: memory, rings: [], nonce: nonce))
        }

        func read(_ block: Int, count: Int = 4096) throws -> [UInt8] {
            let buffer = try memory.buffer(Self.buffer, count: UInt64(count))
            try disk.read(at: UInt64(block) * 4096, into: buffer)
            return try buffer.copyOut()
        }

        func write(_ bytes: [UInt8], at offset: UInt64 = 4096) throws {
            let buffer = try memory.buffer(Self.buffer, count: UInt64(bytes.count))
            try buffer.copyIn(bytes)
            try disk.write(at: offset, from: buffer)
        }

        /// The state and the text of block 2.
        func status() throws -> (state: UInt32, header: UInt64, recycled: UInt64, text: String) {
            let block = try read(2)
            #expect(Array(block[0..<8]) == Array("QUIRESTA".utf8) && ControlDiskTests.number(block, 8, 4) == 1)
            #expect(block[288...].allSatisfy { $0 == 0 } && block[287] == 0)
            let text = String(decoding: block[32..<288].prefix { $0 != 0 }, as: UTF8.self)
            return (
                UInt32(ControlDiskTests.number(block, 12, 4)), ControlDiskTests.number(block, 16, 8),
                ControlDiskTests.number(block, 24, 8), text)
        }
    }

    fileprivate static func number(_ bytes: [UInt8], _ offset: Int, _ count: Int) -> UInt64 {
        (0..<count).reduce(0) { $0 | UInt64(bytes[offset + $1]) << UInt64($1 * 8) }
    }

    private static func request(
        magic: String = "QUIREREQ", version: UInt32 = 1, operation: UInt32 = 1, header: UInt64 = 4096
    ) -> [UInt8] {
        var block = [UInt8](repeating: 0, count: 4096)
        func put(_ offset: Int, _ value: UInt64, _ count: Int) {
            for byte in 0..<count { block[offset + byte] = UInt8(truncatingIfNeeded: value >> UInt64(byte * 8)) }
        }
        block.replaceSubrange(0..<8, with: Array(magic.utf8))
        put(8, UInt64(version), 4)
        put(12, UInt64(operation), 4)
        put(16, header, 8)
        block.replaceSubrange(24..<34, with: Array("quire 0.1\u{1b}".utf8))
        return block
    }

    @Test func geometry() throws {
        let disk = try Bench().disk
        #expect(disk.byteCount == 65536 && disk.logicalBlockBytes == 4096 && !disk.isReadOnly)
        #expect(disk.serial == "quire-control")
    }

    @Test func identityBlock() throws {
        let bench = try Bench(period: 1234)
        bench.start()
        let block = try bench.read(0)
        #expect(Array(block[0..<8]) == Array("QUIRECTL".utf8))
        #expect(Self.number(block, 8, 4) == 1 && Self.number(block, 12, 4) == 4096)
        #expect(Self.number(block, 16, 4) == 1234 && Self.number(block, 20, 4) == 0)
        #expect(Self.number(block, 24, 8) == 0x1122_3344_5566_7788)
        #expect(Self.number(block, 32, 8) == 1 << 16)
        #expect(String(decoding: block[40..<104].prefix { $0 != 0 }, as: UTF8.self) == ControlDisk.version)
        #expect(block[103] == 0 && block[104...].allSatisfy { $0 == 0 })
        // Another start, another nonce.
        bench.disk.deviceStopping()
        bench.start(nonce: 5)
        #expect(try Self.number(bench.read(0), 24, 8) == 5)
    }

    @Test func otherBlocksAreZeros() throws {
        let bench = try Bench()
        bench.start()
        for block in [1] + Array(3..<16) { #expect(try bench.read(block).allSatisfy { $0 == 0 }) }
        // All at once: the same bytes.
        let all = try bench.read(0, count: 65536)
        #expect(try Array(all[..<4096]) == bench.read(0) && Array(all[8192..<12288]) == bench.read(2))
        #expect(all[4096..<8192].allSatisfy { $0 == 0 } && all[12288...].allSatisfy { $0 == 0 })
    }

    @Test func registrationFromBeginToEnd() throws {
        let bench = try Bench()
        bench.start()
        #expect(try bench.status() == (0, 0, 0, "no guest module has registered"))
        try bench.write(Self.request())
        #expect(try bench.status() == (1, 4096, 0, ""))
        #expect(bench.map.registration == .init(nonce: 0x1122_3344_5566_7788, headerAddress: 4096))
        for gfn in 100..<200 { bench.ram.store8(3 * 4096 + gfn, 1) }
        #expect(eventually { (try? bench.status().recycled) == 100 })
        bench.disk.loggingChanged(true)
        let paused = try bench.status()
        #expect(paused.state == 4 && paused.header == 4096 && paused.text.contains("migration"))
        bench.disk.loggingChanged(false)
        #expect(try bench.status().state == 1)
        try bench.write(Self.request(operation: 2, header: 0))
        #expect(try bench.status().state == 0 && bench.status().header == 0)
        #expect(bench.map.registration == nil)
        bench.disk.deviceStopping()
        #expect(bench.disk.memory == nil)
    }

    /// A table that breaks the protocol: dropped, with the reason.
    @Test func droppedTable() throws {
        let bench = try Bench()
        bench.start()
        try bench.write(Self.request())
        bench.ram.store8(3 * 4096 + 777, 0xfe)
        #expect(eventually { (try? bench.status().state) == 3 })
        let status = try bench.status()
        #expect(status.header == 0 && status.text.contains("777"))
    }

    @Test func refusedRequests() throws {
        let bench = try Bench()
        bench.start()
        let bad: [([UInt8], String)] = [
            (Self.request(magic: "QUIREREP"), "magic"), (Self.request(version: 2), "version"),
            (Self.request(version: 0), "version"), (Self.request(operation: 0), "operation"),
            (Self.request(operation: 3), "operation"), (Self.request(operation: .max), "operation"),
            (Self.request(header: 4097), "aligned"), (Self.request(header: 1 << 40), "outside"),
            (Self.request(header: 5 * 4096), "magic"), ([UInt8](repeating: 0xff, count: 4096), "magic"),
        ]
        for (block, reason) in bad {
            // A registration that was there has ended: the guest can't believe in two things at once (quire_layout.h).
            try bench.write(Self.request())
            #expect(try bench.status().state == 1)
            #expect(message { try bench.write(block) }?.contains(reason) == true, "\(reason)")
            let status = try bench.status()
            #expect(status.state == 2 && status.header == 0 && status.text.contains(reason), "\(status)")
            #expect(bench.map.registration == nil)
        }
        // The reason goes with the next start of the device.
        bench.disk.deviceStopping()
        bench.start()
        #expect(try bench.status().state == 0)
    }

    /// Anything but one whole request block: an error, and nothing has changed.
    @Test func otherWritesAreRefused() throws {
        let bench = try Bench()
        bench.start()
        try bench.write(Self.request())
        let request = Self.request(operation: 2)
        for block in [UInt64(0)] + (2..<16) { #expect(throws: QuireError.self) { try bench.write(request, at: block * 4096) } }
        #expect(throws: QuireError.self) { try bench.write(request + request) }
        #expect(throws: QuireError.self) { try bench.write(Array(request[..<512])) }
        #expect(throws: QuireError.self) { try bench.write([]) }
        #expect(throws: QuireError.self) { try bench.disk.discard(at: 4096, count: 4096) }
        #expect(throws: QuireError.self) { try bench.disk.writeZeroes(at: 4096, count: 4096, mayUnmap: false) }
        try bench.disk.flush()
        #expect(try bench.status() .state == 1 && bench.map.registration != nil)
    }

    /// A pause keeps the registration, a reset ends it.
    @Test func lifeOfTheDevice() throws {
        let bench = try Bench()
        #expect(message { try bench.disk.write(at: 4096, from: bench.memory.buffer(Bench.buffer, count: 4096)) } != nil)
        bench.start(nonce: 9)
        try bench.write(Self.request())
        bench.disk.deviceStopping()
        bench.start(nonce: 9)
        #expect(try bench.status().state == 1)
        bench.disk.deviceStopping()
        bench.start(nonce: 10)
        #expect(try bench.status().state == 0 && bench.map.registration == nil)
    }
}
