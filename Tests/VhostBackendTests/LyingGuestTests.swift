import Glibc
import Platform
import TestSupport
import Testing
import VhostBackend

private typealias Request = FrontEnd.Request
private typealias Part = DriverRing.Part
private typealias Kind = DriverDisk.Kind

/// Guests that lie in their rings and in their requests, behind an honest front end.
@Suite struct LyingGuestTests {
    private static let write = DriverRing.write, next = DriverRing.next, indirect = DriverRing.indirect
    private static let page: UInt64 = 0x90000

    /// A lie: sets up descriptors and the available ring; true if the ring must stop.
    private struct Lie {
        let name: String
        var features: UInt64 = ~0
        let tell: (DriverRing) -> Void
    }

    private static var lies: [Lie] {
        func head(_ ring: DriverRing, _ value: UInt16 = 0) { ring.offer(value) }
        func tableLie(_ name: String, _ entries: [(UInt64, UInt32, UInt16, UInt16)], count: UInt32? = nil, at table: UInt64 = 0xa0000)
            -> Lie
        {
            Lie(name: "indirect: " + name) { ring in
                for (index, entry) in entries.enumerated() {
                    ring.ram.write(table + 16 * UInt64(index), le(entry.0) + le(entry.1) + le(entry.2) + le(entry.3))
                }
                ring.setDescriptor(0, table, count ?? UInt32(16 * entries.count), flags: indirect)
                head(ring)
            }
        }
        let end = GuestRAM.high + 2 * GuestRAM.highBytes
        return [
            Lie(name: "available index jumps") { $0.setAvailableIndex(200) },
            Lie(name: "available index goes back") { $0.setAvailableIndex(0xffff) },
            Lie(name: "head = size") { head($0, 16) }, Lie(name: "head huge") { head($0, 0xffff) },
            Lie(name: "loop of one") { $0.setDescriptor(0, page, 16, flags: next, next: 0); head($0) },
            Lie(name: "loop of two") {
                $0.setDescriptor(0, page, 16, flags: next, next: 1)
                $0.setDescriptor(1, page, 16, flags: next, next: 0)
                head($0)
            },
            Lie(name: "next outside") { $0.setDescriptor(0, page, 16, flags: next, next: 16); head($0) },
            Lie(name: "outside of RAM") { $0.setDescriptor(0, 1 << 40, 16, flags: 0); head($0) },
            Lie(name: "in the hole below 4 GiB") { $0.setDescriptor(0, 0xfee0_0000, 16, flags: write); head($0) },
            Lie(name: "begins in RAM, ends outside") { $0.setDescriptor(0, end - 8, 16, flags: write); head($0) },
            Lie(name: "longer than RAM") { $0.setDescriptor(0, 0, .max, flags: write); head($0) },
            Lie(name: "at the end of the address space") { $0.setDescriptor(0, .max - 7, 16, flags: 0); head($0) },
            Lie(name: "readable behind writable") {
                $0.setDescriptor(0, page, 16, flags: write | next, next: 1)
                $0.setDescriptor(1, page, 16, flags: 0)
                head($0)
            },
            Lie(name: "no status byte") { $0.setDescriptor(0, page, 16, flags: 0); head($0) },
            Lie(name: "no header") { $0.setDescriptor(0, page, 16, flags: write); head($0) },
            Lie(name: "short header") {
                $0.setDescriptor(0, page, 15, flags: next, next: 1)
                $0.setDescriptor(1, page, 1, flags: write)
                head($0)
            },
            Lie(name: "empty chain") { $0.setDescriptor(0, page, 0, flags: 0); head($0) },
            Lie(name: "indirect, not negotiated", features: ~FrontEnd.indirect) { $0.setDescriptor(0, page, 32, flags: indirect); head($0) },
            Lie(name: "indirect with successor") { $0.setDescriptor(0, page, 32, flags: indirect | next, next: 1); head($0) },
            tableLie("empty", [], count: 0), tableLie("17 bytes", [(page, 16, 0, 0)], count: 17),
            tableLie("huge", [(page, 16, 0, 0)], count: 0xffff_fff0), tableLie("32769 entries", [(page, 16, 0, 0)], count: 16 * 32769),
            tableLie("nested", [(0xa0000, 16, indirect, 0)]),
            tableLie("loop", [(page, 16, next, 1), (page, 16, next, 0)]),
            tableLie("next outside", [(page, 16, next, 1)]),
            tableLie("entry outside of RAM", [(1 << 50, 16, 0, 0)]),
            Lie(name: "table outside of RAM") { $0.setDescriptor(0, 1 << 50, 32, flags: indirect); head($0) },
            Lie(name: "table ends outside of RAM") { $0.setDescriptor(0, end - 16, 32, flags: indirect); head($0) },
        ]
    }

    /// The ring stops, and only the ring; a reset of the device makes it work again.
    @Test func brokenRingsStop() throws {
        let server = try TestServer(MemoryStorage())
        let frontEnd = try server.connect()
        try frontEnd.handshake()
        for (number, lie) in Self.lies.enumerated() {
            let ram = try GuestRAM()
            let ring = try DriverRing(ram, size: 16)
            if number > 0 {
                try frontEnd.tell(
                    Request.setMemoryTable, le(UInt32(3)) + le(UInt32(0)) + ram.regions.flatMap(\.wire),
                    passing: ram.regions.map { $0.file.raw })
            }
            try frontEnd.start(ram, [ring], features: frontEnd.defaultFeatures & lie.features, memory: number == 0)
            lie.tell(ring)
            ring.kick.signal()
            #expect(ring.isBroken(), "\(lie.name)")
            #expect(ring.usedIndex == 0, "\(lie.name)")
            try frontEnd.stop([ring])
            #expect(ram.isIntact, "\(lie.name)")
            ring.reset()
            try frontEnd.start(ram, [ring], memory: false)
            #expect(try DriverDisk(ring).proveService(), "\(lie.name)")
            try frontEnd.stop([ring])
        }
    }

    /// Requests that are merely wrong are answered with an error, change nothing, and the ring goes on.
    @Test func wrongRequestsAreAnswered() throws {
        let storage = MemoryStorage()
        let server = try TestServer(storage)
        let ram = try GuestRAM()
        let ring = try DriverRing(ram)
        let disk = DriverDisk(ring)
        let frontEnd = try server.connect()
        try frontEnd.handshake()
        try frontEnd.start(ram, [ring])
        let before = storage.bytes
        func data(_ count: UInt32) -> [Part] { [Part(address: Self.page, count: count)] }
        func ranges(_ list: [(UInt64, UInt32, UInt32)]) -> [Part] {
            let bytes = list.flatMap { le($0.0) + le($0.1) + le($0.2) }
            ram.write(Self.page, bytes)
            return data(UInt32(bytes.count))
        }
        ram.write(Self.page, [UInt8](repeating: 0xcc, count: 8192))
        let beyond: [UInt64] = [2048, 2047, 2041, 1 << 60, .max, .max / 512 + 1]
        for sector in beyond {
            #expect(try disk.run(Kind.read, sector: sector, output: data(4096)) == (1, 1), "read \(sector)")
            #expect(try disk.run(Kind.write, sector: sector, input: data(4096)) == (1, 1), "write \(sector)")
        }
        let unaligned: [(UInt64, UInt32)] = [(1, 4096), (8, 512), (8, 4095), (7, 4608)]
        for (sector, count) in unaligned {
            #expect(try disk.run(Kind.read, sector: sector, output: data(count)).status == 1)
            #expect(try disk.run(Kind.write, sector: sector, input: data(count)).status == 1)
        }
        for type in [UInt32(2), 3, 5, 14, .max] { #expect(try disk.run(type, output: data(512)).status == 2) }
        #expect(try disk.run(Kind.getID, output: data(19)).status == 1)
        for kind in [Kind.discard, Kind.writeZeroes] {
            let bads: [[(UInt64, UInt32, UInt32)]] = [
                [(2048, 8, 0)], [(.max, 8, 0)], [(0, .max, 0)], [(1, 8, 0)], [(0, 7, 0)], [(0, 8, 0), (2040, 16, 0)],
                Array(repeating: (0, 8, 0), count: 65),
            ]
            for bad in bads {
                #expect(try disk.run(kind, input: ranges(bad)).status == 1, "\(bad)")
            }
            #expect(try disk.run(kind, input: ranges([(0, 8, 2)])).status == 2)
            #expect(try disk.run(kind, input: data(15)).status == 1)
            #expect(try disk.run(kind).status == 1)
        }
        #expect(try disk.run(Kind.discard, input: ranges([(0, 8, 1)])).status == 2)
        #expect(storage.bytes == before && storage.operations.isEmpty)
        // A chain with descriptors of no length, and a read of nothing.
        #expect(try disk.run(Kind.read, sector: 0, output: [Part(address: 0, count: 0)]) == (0, 1))
        #expect(try disk.proveService())
        #expect(ram.isIntact)
        try frontEnd.stop([ring])
    }

    /// A guest that changes its descriptors and its ring while they are read: judged once, never believed twice. Many
    /// rounds; what counts is that nothing outside of RAM changes and that the process lives.
    @Test func guestThatChangesItsMind() throws {
        let server = try TestServer(MemoryStorage())
        let ram = try GuestRAM()
        let ring = try DriverRing(ram, size: 16)
        let frontEnd = try server.connect()
        try frontEnd.handshake()
        var random = SplitMix(42)
        for round in 0..<60 {
            ring.reset()
            try frontEnd.start(ram, [ring], memory: round == 0)
            for _ in 0..<100 {
                let index = Int(random.next() % 16)
                let addresses: [UInt64] = [Self.page, 0, GuestRAM.lowBytes - 8, GuestRAM.high - 8, GuestRAM.high + 0x100, .max - 15, 0x10000]
                let flags = UInt16(random.next() % 8)
                ring.setDescriptor(
                    index, addresses[Int(random.next() % 7)], UInt32(random.next() % 3 == 0 ? random.next() % (1 << 32) : random.next() % 64),
                    flags: flags, next: UInt16(random.next() % 17))
                ring.offer(UInt16(random.next() % 16))
                ring.kick.signal()
            }
            try frontEnd.stop([ring])
            #expect(ram.isIntact)
        }
        ring.reset()
        frontEnd.disconnect()
        #expect(try server.servesHonestly())
    }
}
