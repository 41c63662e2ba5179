import Glibc
import Platform
import TestSupport
import Testing
import VhostBackend

private typealias Request = FrontEnd.Request
private typealias Part = DriverRing.Part
private typealias Kind = DriverDisk.Kind

/// Front ends that keep to the protocol, in the message sequences of QEMU 7.2 to 10.
@Suite struct HonestFrontEndTests {
    static let dialects: [FrontEnd.Dialect] = [.old, .qemu7, .qemu10]

    @Test(arguments: dialects) func connectStartStop(_ dialect: FrontEnd.Dialect) throws {
        let server = try TestServer(MemoryStorage())
        for _ in 0..<3 { #expect(try server.servesHonestly(dialect: dialect)) }
    }

    @Test func offersWhatItImplements() throws {
        let server = try TestServer(MemoryStorage(), queues: 3)
        let frontEnd = try server.connect()
        let features = try frontEnd.askNumber(Request.getFeatures)
        for bit in [9, 13, 14, 26, 28, 29, 30, 32] { #expect(features & 1 << UInt64(bit) != 0, "feature \(bit)") }
        #expect(features & 1 << 5 == 0)
        let bits = try frontEnd.askNumber(Request.getProtocolFeatures)
        for bit in [0, 1, 3, 5, 9, 12, 13, 15, 16] { #expect(bits & 1 << UInt64(bit) != 0, "protocol feature \(bit)") }
        #expect(try frontEnd.askNumber(Request.getQueueCount) == 3)
        #expect(try frontEnd.askNumber(Request.getMaxMemorySlots) >= 32)

        let readOnly = try TestServer(MemoryStorage(isReadOnly: true)).connect()
        #expect(try readOnly.askNumber(Request.getFeatures) & 1 << 5 != 0)
    }

    @Test func configurationSpace() throws {
        let server = try TestServer(MemoryStorage(byteCount: 1 << 20), queues: 2)
        let frontEnd = try server.connect()
        try frontEnd.handshake()
        func config(_ offset: Int, _ count: Int) throws -> [UInt8] {
            let ask = le(UInt32(offset)) + le(UInt32(count)) + le(UInt32(0)) + [UInt8](repeating: 0xff, count: count)
            let answer = try frontEnd.ask(Request.getConfig, ask)
            #expect(Array(answer.prefix(12)) == Array(ask.prefix(12)))
            return Array(answer.dropFirst(12))
        }
        let all = try config(0, 57)
        #expect(all.count == 57)
        #expect(number(all, 0) as UInt64 == 2048)  // capacity in sectors
        #expect(number(all, 20) as UInt32 == 4096)  // blk_size
        #expect(number(all, 34) as UInt16 == 2)  // num_queues
        #expect(try config(20, 4) == le(UInt32(4096)))
        // Past the end: zeros. A read-only space: writes are refused, and the session goes on.
        #expect(try config(60, 100) == [UInt8](repeating: 0, count: 100))
        let write = le(UInt32(32)) + le(UInt32(1)) + le(UInt32(0)) + [1]
        #expect(try frontEnd.acknowledged(Request.setConfig, write) == 1)
        #expect(try config(0, 57) == all)
    }

    /// Driver reset by SeaBIOS, then Linux; QMP stop and cont; all on one connection.
    @Test(arguments: dialects) func startsAgainOnOneConnection(_ dialect: FrontEnd.Dialect) throws {
        let lifecycle = RecordingLifecycle()
        let server = try TestServer(MemoryStorage(), lifecycle: lifecycle)
        let ram = try GuestRAM()
        let ring = try DriverRing(ram)
        let disk = DriverDisk(ring)
        let frontEnd = try server.connect()
        try frontEnd.handshake(dialect)
        let sendsEachTime = !dialect.usesSlots
        try frontEnd.start(ram, [ring], features: frontEnd.defaultFeatures & ~FrontEnd.indirect)
        #expect(try disk.proveService())
        #expect(try frontEnd.stop([ring]) == [2])

        ring.reset()
        try frontEnd.start(ram, [ring], memory: sendsEachTime)
        #expect(try disk.proveService(seed: 3))
        #expect(try frontEnd.stop([ring]) == [2])

        // stop, cont: the ring goes on where it was; what the guest offered meanwhile is served.
        let waiting = disk.submit(Kind.flush)
        try frontEnd.start(ram, [ring], memory: sendsEachTime, bases: [2])
        #expect(try ring.collect(1)[0].head == UInt32(waiting.head))
        #expect(try disk.proveService(seed: 4))
        #expect(try frontEnd.stop([ring]) == [5])
        #expect(!lifecycle.isDeviceRunning)
        frontEnd.disconnect()
        #expect(ram.isIntact)
    }

    /// The nonce: the same over a pause and a reconnect, another after a virtio reset.
    @Test func nonceNamesTheGuestsUseOfTheDevice() throws {
        let lifecycle = RecordingLifecycle()
        let server = try TestServer(MemoryStorage(), lifecycle: lifecycle)
        let ram = try GuestRAM()
        let ring = try DriverRing(ram)
        let disk = DriverDisk(ring)
        var frontEnd = try server.connect()
        try frontEnd.handshake()
        let inflight = try frontEnd.getInflight()
        try frontEnd.start(ram, [ring], inflight: inflight)
        #expect(try disk.proveService())
        try frontEnd.stop([ring])
        try frontEnd.start(ram, [ring], memory: false, bases: [2], inflight: inflight)
        #expect(try disk.proveService())
        frontEnd.disconnect()

        frontEnd = try server.connect()
        try frontEnd.handshake()
        try frontEnd.start(ram, [ring], bases: [ring.usedIndex], inflight: inflight)
        #expect(try disk.proveService())
        try frontEnd.stop([ring])
        ring.reset()
        let second = try frontEnd.getInflight()
        try frontEnd.start(ram, [ring], memory: false, inflight: second)
        #expect(try disk.proveService())
        try frontEnd.stop([ring])

        let nonces = lifecycle.nonces
        #expect(nonces.count == 4 && !nonces.contains(0))
        #expect(Set(nonces.prefix(3)).count == 1 && nonces.last != nonces.first)
    }

    /// Without an in-flight region nothing tells a pause from a reset: every start must look like a new guest.
    @Test func withoutInflightRegionEveryStartIsNew() throws {
        let lifecycle = RecordingLifecycle()
        let server = try TestServer(MemoryStorage(), lifecycle: lifecycle)
        let ram = try GuestRAM()
        let ring = try DriverRing(ram)
        let frontEnd = try server.connect()
        try frontEnd.handshake(.old)
        for base in [UInt16(0), 2] {
            try frontEnd.start(ram, [ring], bases: [base])
            #expect(try DriverDisk(ring).proveService())
            try frontEnd.stop([ring])
        }
        #expect(Set(lifecycle.nonces).count == 2)
    }

    @Test func severalQueues() throws {
        let lifecycle = RecordingLifecycle()
        let storage = MemoryStorage()
        let server = try TestServer(storage, queues: 4, lifecycle: lifecycle)
        let ram = try GuestRAM()
        let rings = try (0..<4).map { try DriverRing(ram, queue: $0, size: 16 << $0) }
        let frontEnd = try server.connect()
        try frontEnd.handshake(queues: 4)
        try frontEnd.start(ram, rings)
        for round in 0..<4 {
            for (index, ring) in rings.enumerated() {
                #expect(try DriverDisk(ring).proveService(sector: UInt64(8 * index), seed: UInt8(round)))
            }
        }
        #expect(lifecycle.starts.last?.rings == rings.map(\.base))
        #expect(try frontEnd.stop(rings) == [8, 8, 8, 8])
        #expect(!lifecycle.isDeviceRunning)
    }

    /// How one ring of several is stopped while the others go on.
    enum Stop: CaseIterable, Sendable {
        case disable, number, base
        func send(_ frontEnd: FrontEnd, _ ring: DriverRing) throws {
            let queue = le(UInt32(ring.queue))
            switch self {
            case .disable: try frontEnd.tell(Request.setVringEnable, queue + le(UInt32(0)))
            case .number: try frontEnd.tell(Request.setVringNum, queue + le(UInt32(ring.size)))
            case .base: try frontEnd.tell(Request.setVringBase, queue + le(UInt32(ring.usedIndex)))
            }
        }
    }

    /// The device goes on with the rings that are left, for the same guest, and with the one that comes back.
    @Test(arguments: Stop.allCases) func oneRingOfSeveralStops(_ stop: Stop) throws {
        let lifecycle = RecordingLifecycle()
        let server = try TestServer(MemoryStorage(), queues: 3, lifecycle: lifecycle)
        let ram = try GuestRAM()
        let rings = try (0..<3).map { try DriverRing(ram, queue: $0) }
        let disks = rings.map { DriverDisk($0) }
        let frontEnd = try server.connect()
        try frontEnd.handshake(queues: 3)
        try frontEnd.start(ram, rings)
        for disk in disks { #expect(try disk.proveService()) }
        #expect(lifecycle.isDeviceRunning && lifecycle.starts.last?.rings == rings.map(\.base))

        try stop.send(frontEnd, rings[1])
        #expect(lifecycle.isDeviceRunning && lifecycle.starts.last?.rings == [rings[0].base, rings[2].base])
        let waiting = disks[1].submit(Kind.flush)
        rings[1].kick.signal()
        #expect(try disks[0].proveService(seed: 1) && disks[2].proveService(seed: 2))
        #expect(rings[1].usedIndex == 2)
        try frontEnd.tell(Request.setVringEnable, le(UInt32(1)) + le(UInt32(1)))
        #expect(try rings[1].collect(1)[0].head == UInt32(waiting.head))
        #expect(lifecycle.starts.last?.rings == rings.map(\.base) && Set(lifecycle.nonces).count == 1)

        // One after the other: the device stops with the last.
        for ring in rings {
            #expect(lifecycle.isDeviceRunning)
            try stop.send(frontEnd, ring)
        }
        #expect(!lifecycle.isDeviceRunning)
    }

    /// GET_VRING_BASE of any ring stops the device, whatever comes behind it, until a ring is started again.
    @Test func baseOfOneRingStopsTheDevice() throws {
        let lifecycle = RecordingLifecycle()
        let server = try TestServer(MemoryStorage(), queues: 3, lifecycle: lifecycle)
        let ram = try GuestRAM()
        let rings = try (0..<3).map { try DriverRing(ram, queue: $0) }
        let frontEnd = try server.connect()
        try frontEnd.handshake(queues: 3)
        try frontEnd.start(ram, rings)
        #expect(try frontEnd.vringBase(0) == 0)
        #expect(!lifecycle.isDeviceRunning)
        let starts = lifecycle.starts.count
        try frontEnd.tell(Request.setVringEnable, le(UInt32(1)) + le(UInt32(0)))
        try frontEnd.tell(Request.setVringAddress, rings[2].wireAddresses())
        try frontEnd.tell(Request.removeRegion, ram.regions[2].single)
        try frontEnd.tell(Request.addRegion, ram.regions[2].single, passing: [ram.regions[2].file.raw])
        try frontEnd.tell(Request.setVringCall, le(UInt64(2)), passing: [rings[2].call.descriptor.raw])
        #expect(lifecycle.starts.count == starts && !lifecycle.isDeviceRunning)
        #expect(try DriverDisk(rings[2]).proveService(), "the other rings were not stopped")
        try frontEnd.tell(Request.setVringKick, le(UInt64(0)), passing: [rings[0].kick.descriptor.raw])
        #expect(lifecycle.isDeviceRunning && lifecycle.starts.last?.rings == [rings[0].base, rings[2].base])
        try frontEnd.stop(rings)
        #expect(!lifecycle.isDeviceRunning)
    }

    /// A message starts the ring that it names. The other one still has the addresses of before the reset, and would
    /// take what lies there now for requests.
    @Test(arguments: [Request.resetDevice, Request.setStatus, Request.getInflight]) func onlyTheNamedRingStarts(
        _ reset: UInt32
    ) throws {
        let storage = MemoryStorage()
        let server = try TestServer(storage, queues: 2)
        let ram = try GuestRAM()
        let rings = try (0..<2).map { try DriverRing(ram, queue: $0) }
        let frontEnd = try server.connect()
        try frontEnd.handshake(queues: 2)
        try frontEnd.start(ram, rings)
        for ring in rings { #expect(try DriverDisk(ring).proveService()) }
        switch reset {
        case Request.getInflight: _ = try frontEnd.getInflight(queues: 2)
        case Request.setStatus: try frontEnd.tell(reset, le(UInt64(0)))
        default: try frontEnd.tell(reset)
        }
        storage.forgetOperations()
        DriverDisk(rings[1]).submit(Kind.flush)
        rings[1].kick.signal()
        rings[0].reset()
        try frontEnd.start(ram, [rings[0]], memory: false)
        #expect(try DriverDisk(rings[0]).proveService())
        #expect(!storage.operations.contains(.flush))
        try frontEnd.tell(Request.setVringEnable, le(UInt32(1)) + le(UInt32(1)))
        #expect(eventually { storage.operations.contains(.flush) })
    }

    /// A reset disables the rings of a front end that can enable them: a kick descriptor alone starts none.
    @Test(arguments: [true, false]) func resetDisables(protocolFeatures: Bool) throws {
        let lifecycle = RecordingLifecycle()
        let server = try TestServer(MemoryStorage(), lifecycle: lifecycle)
        let ram = try GuestRAM()
        let ring = try DriverRing(ram)
        let frontEnd = try server.connect()
        try frontEnd.handshake()
        let features = frontEnd.defaultFeatures & ~(protocolFeatures ? 0 : FrontEnd.protocolFeatures)
        try frontEnd.start(ram, [ring], features: features)
        #expect(try DriverDisk(ring).proveService())
        try frontEnd.tell(Request.resetDevice)
        #expect(!lifecycle.isDeviceRunning)
        try frontEnd.tell(Request.setVringKick, le(UInt64(0)), passing: [ring.kick.descriptor.raw])
        #expect(lifecycle.isDeviceRunning == !protocolFeatures)
        try frontEnd.tell(Request.setVringEnable, le(UInt32(0)) + le(UInt32(1)))
        #expect(try DriverDisk(ring).proveService(seed: 2))
    }

    @Test(arguments: [false, true]) func everyRequestType(indirect: Bool) throws {
        let storage = MemoryStorage()
        let server = try TestServer(storage)
        let ram = try GuestRAM()
        let ring = try DriverRing(ram)
        let disk = DriverDisk(ring)
        let frontEnd = try server.connect()
        try frontEnd.handshake()
        try frontEnd.start(ram, [ring])
        let table: UInt64? = indirect ? GuestRAM.high + 0x100 : nil

        // A write scattered over all regions, one piece straddling two of them, odd sizes; read back in other pieces.
        let seam = GuestRAM.high + GuestRAM.highBytes
        let scattered = [
            Part(address: 0x90003, count: 1001), Part(address: seam - 100, count: 300),
            Part(address: GuestRAM.high + 0x9000, count: 8192 - 1001 - 300),
        ]
        let content = (0..<8192).map { UInt8(truncatingIfNeeded: $0 * $0 >> 3) }
        ram.write(scattered[0].address, Array(content[..<1001]))
        ram.write(scattered[1].address, Array(content[1001..<1301]))
        ram.write(scattered[2].address, Array(content[1301...]))
        #expect(try disk.run(Kind.write, sector: 16, input: scattered, indirectTable: table) == (0, 1))
        #expect(Array(storage.bytes[8192..<16384]) == content)
        let target = [Part(address: seam - 4000, count: 8000), Part(address: 0xa0000, count: 192)]
        #expect(try disk.run(Kind.read, sector: 16, output: target, indirectTable: table) == (0, 8193))
        #expect(ram.read(seam - 4000, 8000) + ram.read(0xa0000, 192) == content)

        #expect(try disk.run(Kind.flush, indirectTable: table) == (0, 1))
        #expect(try disk.run(Kind.getID, output: [Part(address: 0xb0000, count: 20)], indirectTable: table) == (0, 21))
        #expect(ram.read(0xb0000, 20) == Array("unit-test-disk".utf8) + [0, 0, 0, 0, 0, 0])
        func range(_ sector: UInt64, _ sectors: UInt32, _ flags: UInt32) -> [UInt8] { le(sector) + le(sectors) + le(flags) }
        ram.write(0xc0000, range(16, 8, 0) + range(32, 16, 0))
        let ranges = [Part(address: 0xc0000, count: 32)]
        storage.forgetOperations()
        #expect(try disk.run(Kind.discard, input: ranges, indirectTable: table) == (0, 1))
        #expect(storage.operations == [.discard(8192, 4096), .discard(16384, 8192)])
        ram.write(0xc0000, range(16, 8, 1) + range(32, 16, 0))
        #expect(try disk.run(Kind.writeZeroes, input: ranges, indirectTable: table) == (0, 1))
        #expect(storage.operations.suffix(2) == [.zero(8192, 4096, true), .zero(16384, 8192, false)])
        #expect(storage.bytes[8192..<12288].allSatisfy { $0 == 0 } && Array(storage.bytes[12288..<16384]) == Array(content[4096...]))
        try frontEnd.stop([ring])
        #expect(ram.isIntact)
    }

    /// A driver that has not accepted FLUSH has nothing to flush with: every write is durable when it is answered. Those
    /// of one that has are not slowed down.
    @Test(arguments: [false, true]) func writesWithoutFlush(accepted: Bool) throws {
        let storage = MemoryStorage()
        let server = try TestServer(storage)
        let ram = try GuestRAM()
        let ring = try DriverRing(ram)
        let disk = DriverDisk(ring)
        let frontEnd = try server.connect()
        try frontEnd.handshake()
        let flush: UInt64 = 1 << 9
        #expect(frontEnd.defaultFeatures & flush != 0)
        try frontEnd.start(ram, [ring], features: frontEnd.defaultFeatures & ~(accepted ? 0 : flush))
        let page = [Part(address: 0x90000, count: 4096)]
        #expect(try disk.run(Kind.write, sector: 8, input: page).status == 0)
        #expect(try disk.run(Kind.read, sector: 8, output: page).status == 0)
        ram.write(0x90000, le(UInt64(16)) + le(UInt32(8)) + le(UInt32(0)))
        #expect(try disk.run(Kind.writeZeroes, input: [Part(address: 0x90000, count: 16)]).status == 0)
        let durable: [MemoryStorage.Operation] = accepted ? [] : [.flush]
        #expect(
            storage.operations
                == [.write(4096, 4096)] + durable + [.read(4096, 4096), .zero(8192, 4096, false)] + durable)
        try frontEnd.stop([ring])
    }

    /// An image that became shorter reads as zeros behind its end: they replace what the guest's buffer held.
    @Test func truncatedImageReadsAsZeros() throws {
        let path = "/tmp/quire-unit-\(getpid())-short"
        defer { Files.remove(path) }
        let file = try Descriptor.open(path, O_RDWR | O_CREAT | O_TRUNC)
        try file.replaceContent(String(repeating: "x", count: 1 << 16))
        let storage = try FileStorage(path: path, isReadOnly: false, serial: "short")
        let server = try TestServer(VirtioBlock(storage: storage, logger: TestServer.quiet))
        try file.truncate(to: 6000)
        let ram = try GuestRAM()
        let ring = try DriverRing(ram)
        let frontEnd = try server.connect()
        try frontEnd.handshake()
        try frontEnd.start(ram, [ring])
        ram.write(0x90000, [UInt8](repeating: 0xcc, count: 16384))
        let output = [Part(address: 0x90000, count: 5000), Part(address: 0x92000, count: 7288)]
        #expect(try DriverDisk(ring).run(Kind.read, output: output) == (0, 12289))
        let all = ram.read(0x90000, 5000) + ram.read(0x92000, 7288)
        #expect(all == [UInt8](repeating: UInt8(ascii: "x"), count: 6000) + [UInt8](repeating: 0, count: 6288))
        #expect(ram.read(0x92000 + 7288, 100).allSatisfy { $0 == 0xcc })
        try frontEnd.stop([ring])
    }

    @Test func fileStorageKeepsWhatWasWritten() throws {
        let path = "/tmp/quire-unit-\(getpid())-image"
        defer { Files.remove(path) }
        do {
            let file = try Descriptor.open(path, O_RDWR | O_CREAT | O_TRUNC)
            try file.truncate(to: 1 << 20)
        }
        for isReadOnly in [false, true] {
            let storage = try FileStorage(path: path, isReadOnly: isReadOnly, serial: "image")
            let server = try TestServer(VirtioBlock(storage: storage, logger: TestServer.quiet))
            let ram = try GuestRAM()
            let ring = try DriverRing(ram)
            let disk = DriverDisk(ring)
            let frontEnd = try server.connect()
            try frontEnd.handshake()
            try frontEnd.start(ram, [ring])
            let page = Part(address: 0x90000, count: 4096)
            if !isReadOnly {
                #expect(try disk.proveService(sector: 2040, seed: 9))
                ram.write(0xc0000, le(UInt64(0)) + le(UInt32(8)) + le(UInt32(1)))
                for kind in [Kind.discard, Kind.writeZeroes] {
                    ram.write(0xc000c, le(UInt32(kind == Kind.writeZeroes ? 1 : 0)))
                    #expect(try disk.run(kind, input: [Part(address: 0xc0000, count: 16)]).status == 0)
                }
                #expect(try disk.run(Kind.flush).status == 0)
            } else {
                for kind in [Kind.write, Kind.discard, Kind.writeZeroes] {
                    #expect(try disk.run(kind, input: [page]).status == 1)
                }
                #expect(try disk.run(Kind.read, sector: 2040, output: [page]).status == 0)
                #expect(ram.read(0x90000, 4096) == (0..<4096).map { UInt8(truncatingIfNeeded: $0 &* 31 &+ 9) })
            }
            try frontEnd.stop([ring])
        }
    }

    /// With event index the device notifies only when the driver has asked for it, and kicks are asked for by index.
    @Test(arguments: [false, true]) func notifications(eventIndex: Bool) throws {
        let server = try TestServer(MemoryStorage())
        let ram = try GuestRAM()
        let ring = try DriverRing(ram, size: 16)
        let disk = DriverDisk(ring)
        let frontEnd = try server.connect()
        try frontEnd.handshake()
        let features = frontEnd.defaultFeatures | (eventIndex ? FrontEnd.eventIndex : 0)
        try frontEnd.start(ram, [ring], features: features)
        #expect(try disk.run(Kind.flush).status == 0)
        // No interrupts wanted: until 5 more are done, or not at all.
        if eventIndex { ram.store16(ring.available + 4 + 2 * 16, 5) } else { ram.store16(ring.available, 1) }
        for count in 2...5 {
            disk.submit(Kind.flush)
            ring.kick.signal()
            #expect(eventually { Int(ring.usedIndex) == count })
            // The driver may see a request done before the device notifies of it. It has by the time the next one is done.
            if count == 2 { ring.call.drain() }
        }
        #expect(waitReadable([ring.call.descriptor.raw], timeoutMilliseconds: 50).isEmpty)
        if !eventIndex { ram.store16(ring.available, 0) }
        disk.submit(Kind.flush)
        ring.kick.signal()
        #expect(!waitReadable([ring.call.descriptor.raw], timeoutMilliseconds: 20_000).isEmpty)
        if eventIndex {
            // Where the device wants its next kick: at the next request.
            #expect(eventually { ram.load16(ring.used + 4 + 8 * 16) == 6 })
        } else {
            #expect(eventually { ram.load16(ring.used) == 0 })
        }
        try frontEnd.stop([ring])
    }

    /// Many requests at once, more than the ring holds in total, both index words wrapping around 16 bits.
    @Test func indicesWrap() throws {
        let storage = MemoryStorage()
        let server = try TestServer(storage)
        let ram = try GuestRAM()
        let ring = try DriverRing(ram, size: 16)
        let disk = DriverDisk(ring)
        let start = UInt16.max - 20
        ring.setAvailableIndex(start)
        ring.setUsedIndex(start)
        let frontEnd = try server.connect()
        try frontEnd.handshake()
        try frontEnd.start(ram, [ring], bases: [start])
        var seen = start
        for _ in 0..<20 {
            for _ in 0..<7 { disk.submit(Kind.flush) }
            ring.kick.signal()
            #expect(eventually { ring.usedIndex == seen &+ 7 })
            seen &+= 7
        }
        #expect(storage.operations.count == 140)
        #expect(try frontEnd.stop([ring]) == [seen])
    }

    /// Memory that comes and goes while rings run (hot plug, and the regions QEMU sends one by one).
    @Test func memoryChangesWhileRunning() throws {
        let lifecycle = RecordingLifecycle()
        let server = try TestServer(MemoryStorage(), lifecycle: lifecycle)
        let ram = try GuestRAM()
        let ring = try DriverRing(ram)
        let disk = DriverDisk(ring)
        let frontEnd = try server.connect()
        try frontEnd.handshake()
        try frontEnd.start(ram, [ring])
        #expect(try disk.proveService())
        let last = ram.regions[2]
        let page = Part(address: last.guestAddress + 0x4000, count: 4096)
        #expect(try disk.run(Kind.write, input: [page]).status == 0)
        try frontEnd.tell(Request.removeRegion, last.single)
        #expect(try disk.proveService(seed: 1))
        #expect(lifecycle.isDeviceRunning)
        try frontEnd.tell(Request.addRegion, last.single, passing: [last.file.raw])
        #expect(try disk.run(Kind.write, input: [page]).status == 0)
        #expect(try disk.proveService(seed: 2))
        // A whole new table, with one region less.
        try frontEnd.tell(
            Request.setMemoryTable, le(UInt32(2)) + le(UInt32(0)) + ram.regions.prefix(2).flatMap(\.wire),
            passing: ram.regions.prefix(2).map { $0.file.raw })
        #expect(try disk.proveService(seed: 3))
        #expect(lifecycle.starts.map { $0.ram >> 20 } == [4, 3, 4, 3])
        // All for the same guest.
        #expect(Set(lifecycle.nonces).count == 1)
        try frontEnd.stop([ring])
    }

    /// The region that holds the ring itself goes and comes back: QEMU replaces a region by removing and adding it. The
    /// ring rests in between, and nothing is refused.
    @Test func ringsOwnRegionIsReplacedWhileRunning() throws {
        let lifecycle = RecordingLifecycle()
        let server = try TestServer(MemoryStorage(), lifecycle: lifecycle)
        let ram = try GuestRAM()
        let ring = try DriverRing(ram)
        let disk = DriverDisk(ring)
        let frontEnd = try server.connect()
        try frontEnd.handshake()
        try frontEnd.start(ram, [ring])
        #expect(try disk.proveService())
        let low = ram.regions[0]
        try frontEnd.tell(Request.removeRegion, low.single)
        #expect(!lifecycle.isDeviceRunning)
        disk.submit(Kind.flush)
        ring.kick.signal()
        try frontEnd.tell(Request.addRegion, low.single, passing: [low.file.raw])
        #expect(try ring.collect(1).count == 1)
        #expect(lifecycle.isDeviceRunning)
        #expect(try disk.proveService(seed: 3))
        #expect(try frontEnd.stop([ring]) == [5])
    }

    /// Interrupt masking: QEMU exchanges the call descriptor while the ring runs.
    @Test func callDescriptorChangesWhileRunning() throws {
        let lifecycle = RecordingLifecycle()
        let server = try TestServer(MemoryStorage(), lifecycle: lifecycle)
        let ram = try GuestRAM()
        let ring = try DriverRing(ram)
        let disk = DriverDisk(ring)
        let frontEnd = try server.connect()
        try frontEnd.handshake()
        try frontEnd.start(ram, [ring])
        for seed in 0..<20 {
            ring.call = try EventDescriptor()
            try frontEnd.tell(Request.setVringCall, le(UInt64(0)), passing: [ring.call.descriptor.raw])
            #expect(try disk.proveService(seed: UInt8(seed)))
        }
        #expect(lifecycle.nonces.count == 1, "the device need not notice")
        #expect(try frontEnd.stop([ring]) == [40])
    }

    /// A session that ends while the guest is being migrated leaves no trace in the next one.
    @Test func loggingEndsWithItsSession() throws {
        let lifecycle = RecordingLifecycle()
        let server = try TestServer(MemoryStorage(), lifecycle: lifecycle)
        let ram = try GuestRAM()
        let ring = try DriverRing(ram)
        var frontEnd = try server.connect()
        try frontEnd.handshake()
        try frontEnd.start(ram, [ring])
        try frontEnd.tell(Request.setFeatures, le(frontEnd.defaultFeatures | FrontEnd.logAll))
        #expect(lifecycle.waits { $0 == .logging(true) })
        frontEnd.disconnect()
        frontEnd = try server.connect()
        try frontEnd.handshake()
        try frontEnd.start(ram, [ring])
        #expect(lifecycle.events.last { if case .logging = $0 { true } else { false } } == .logging(false))
    }

    @Test func statusAndChannelAreKept() throws {
        let server = try TestServer(MemoryStorage())
        let frontEnd = try server.connect()
        try frontEnd.handshake()
        try frontEnd.tell(Request.setStatus, le(UInt64(0x0b)))
        #expect(try frontEnd.askNumber(Request.getStatus) == 0x0b)
        let channel = try server.connect()
        try frontEnd.tell(Request.setBackendChannel, [], passing: [channel.socket.descriptor.raw])
        let event = try EventDescriptor()
        try frontEnd.tell(Request.setLogDescriptor, [], passing: [event.descriptor.raw])
        try frontEnd.tell(Request.resetOwner)
        try frontEnd.tell(Request.resetDevice)
        #expect(try frontEnd.askNumber(Request.getStatus) == 0x0b)
    }
}

/// Dirty logging: exactly the pages that were written, no fewer (or a migrated guest is corrupt) and no more.
@Suite struct DirtyLogTests {
    final class Log {
        let file: Descriptor
        let mapping: Mapping
        let byteCount: Int
        init(byteCount: Int) throws {
            self.byteCount = byteCount
            file = try Memfd(name: "test-log", byteCount: UInt64(byteCount) + 4096).takeDescriptor()
            mapping = try Mapping(file, byteCount: byteCount + 4096)
            mapping.copyIn(byteCount, [UInt8](repeating: 0xa5, count: 4096))
        }
        /// Dirty gfns; clears them, as the front end does when it has sent the pages.
        func take() -> Set<UInt64> {
            var gfns = Set<UInt64>()
            for (index, byte) in mapping.copyOut(0, count: byteCount).enumerated() where byte != 0 {
                for bit in 0..<8 where byte & 1 << UInt8(bit) != 0 { gfns.insert(UInt64(index * 8 + bit)) }
            }
            mapping.copyIn(0, [UInt8](repeating: 0, count: byteCount))
            return gfns
        }
        var isIntact: Bool { mapping.copyOut(byteCount, count: 4096).allSatisfy { $0 == 0xa5 } }
    }

    @Test(arguments: [false, true]) func exactlyTheWrittenPages(eventIndex: Bool) throws {
        let lifecycle = RecordingLifecycle()
        let server = try TestServer(MemoryStorage(), lifecycle: lifecycle)
        let ram = try GuestRAM()
        let ring = try DriverRing(ram)
        let disk = DriverDisk(ring)
        let frontEnd = try server.connect()
        try frontEnd.handshake()
        let features = frontEnd.defaultFeatures | (eventIndex ? FrontEnd.eventIndex : 0)
        ring.usesEventIndex = eventIndex
        try frontEnd.start(ram, [ring], features: features)
        #expect(try disk.proveService())

        let pages = Int(GuestRAM.high + 2 * GuestRAM.highBytes) / 4096
        let log = try Log(byteCount: (pages + 7) / 8)
        // As QEMU: the log first, then the features, then the addresses with the flag.
        func setLog() throws {
            try frontEnd.post(
                Request.setLogBase, le(UInt64(log.byteCount)) + le(UInt64(0)), passing: [log.file.raw])
            let reply = try frontEnd.receive()
            #expect(reply.request == Request.setLogBase)
        }
        try setLog()
        #expect(log.take().isEmpty)
        try frontEnd.tell(Request.setFeatures, le(features | FrontEnd.logAll))
        #expect(lifecycle.events.last == .logging(true))
        try frontEnd.tell(Request.setVringAddress, ring.wireAddresses(logFlag: true))
        _ = eventually(milliseconds: 1000) { false || !log.take().isEmpty }  // the ring's own flags at its start

        /// Runs one request; the gfns that it dirtied. `settle`: the ring writes its flags after the interrupt.
        func dirtied(_ run: () throws -> Void) throws -> Set<UInt64> {
            try run()
            ProcessCalls.sleep(milliseconds: 30)
            return log.take()
        }
        let usedPage = ring.used / 4096
        let seam = GuestRAM.high + GuestRAM.highBytes
        // A write request: only its status and the used ring.
        var pending: DriverDisk.Pending?
        func finish(_ submitted: DriverDisk.Pending) throws {
            pending = submitted
            ring.kick.signal()
            _ = try ring.collect(1)
            #expect(disk.status(submitted) == 0)
        }
        let write = try dirtied {
            try finish(disk.submit(Kind.write, sector: 8, input: [Part(address: 0x90000, count: 8192)]))
        }
        #expect(write == [usedPage, pending!.status / 4096])
        // A read, scattered over regions and over page borders.
        let output = [
            Part(address: 0x90ffc, count: 8), Part(address: seam - 4096, count: 8192), Part(address: 0xa0000, count: 4088),
        ]
        let read = try dirtied { try finish(disk.submit(Kind.read, sector: 8, output: output)) }
        #expect(
            read == [
                usedPage, pending!.status / 4096, 0x90, 0x91, seam / 4096 - 1, seam / 4096, 0xa0,
            ])
        let id = try dirtied { try finish(disk.submit(Kind.getID, output: [Part(address: 0xb0000, count: 8000)])) }
        #expect(id.isSubset(of: [usedPage, pending!.status / 4096, 0xb0, 0xb1]) && id.contains(0xb0))

        // Logged elsewhere if the front end says so, and not at all without the ring's flag.
        ring.logAddress = 0x1ff000
        try frontEnd.tell(Request.setVringAddress, ring.wireAddresses(logFlag: true))
        _ = log.take()
        let elsewhere = try dirtied { try finish(disk.submit(Kind.flush)) }
        #expect(elsewhere == [0x1ff, pending!.status / 4096])
        ring.logAddress = nil
        try frontEnd.tell(Request.setVringAddress, ring.wireAddresses(logFlag: false))
        // What the ring had logged until then.
        _ = log.take()
        #expect(try dirtied { try finish(disk.submit(Kind.flush)) } == [pending!.status / 4096])

        // Off again: nothing more.
        try frontEnd.tell(Request.setFeatures, le(features))
        #expect(lifecycle.events.last == .logging(false))
        let after = try dirtied { _ = try disk.proveService() }
        #expect(after.isEmpty)
        #expect(log.isIntact)
        try frontEnd.stop([ring])
    }

    /// A log that is too short for the RAM, and log addresses at the end of the address space: pages beyond are passed
    /// over, and not a byte behind the log is touched.
    @Test(arguments: [UInt64(0), 0xffff_ffff_ffff_fffc, 0xffff_ffff_ffff_f000, 1 << 62]) func shortLog(_ logAddress: UInt64) throws {
        let server = try TestServer(MemoryStorage())
        let ram = try GuestRAM()
        let ring = try DriverRing(ram)
        let disk = DriverDisk(ring)
        let frontEnd = try server.connect()
        try frontEnd.handshake()
        try frontEnd.tell(Request.setFeatures, le(frontEnd.defaultFeatures | FrontEnd.logAll))
        let log = try Log(byteCount: 32)
        try frontEnd.post(Request.setLogBase, le(UInt64(32)) + le(UInt64(0)), passing: [log.file.raw])
        _ = try frontEnd.receive()
        ring.logAddress = logAddress
        try frontEnd.sendMemory(ram)
        try frontEnd.setUp(ring, logFlag: true)
        try frontEnd.tell(Request.setVringEnable, le(UInt32(0)) + le(UInt32(1)))
        #expect(try disk.proveService())
        #expect(try disk.run(Kind.read, sector: 8, output: [Part(address: 0xff000, count: 8192)]).status == 0)
        #expect(log.take().isSubset(of: [0, 0xff]))
        #expect(log.isIntact)
        try frontEnd.stop([ring])
        frontEnd.disconnect()
        #expect(try server.servesHonestly())
    }

    /// A read that fails half-way has written half of its buffer: those pages are dirty all the same.
    @Test func failedReadIsLogged() throws {
        let path = "/tmp/quire-unit-\(getpid())-half"
        defer { Files.remove(path) }
        do {
            let file = try Descriptor.open(path, O_RDWR | O_CREAT | O_TRUNC)
            try file.replaceContent(String(repeating: "x", count: 1 << 16))
        }
        let storage = try FileStorage(path: path, isReadOnly: true, serial: "half")
        let server = try TestServer(VirtioBlock(storage: storage, logger: TestServer.quiet))
        let ram = try GuestRAM()
        let ring = try DriverRing(ram)
        let disk = DriverDisk(ring)
        let frontEnd = try server.connect()
        try frontEnd.handshake()
        try frontEnd.tell(Request.setFeatures, le(frontEnd.defaultFeatures | FrontEnd.logAll))
        let log = try Log(byteCount: 1 << 18)
        try frontEnd.post(Request.setLogBase, le(UInt64(log.byteCount)) + le(UInt64(0)), passing: [log.file.raw])
        _ = try frontEnd.receive()
        try frontEnd.sendMemory(ram)
        // A region whose file has lost its pages: the kernel cannot write there.
        let brokenAddress: UInt64 = 1 << 33
        let broken = try Descriptor.open(path + ".ram", O_RDWR | O_CREAT | O_TRUNC)
        defer { Files.remove(path + ".ram") }
        try broken.truncate(to: 8192)
        try frontEnd.tell(
            Request.addRegion, le(UInt64(0)) + le(brokenAddress) + le(UInt64(8192)) + le(UInt64(0x7f30_0000_0000)) + le(UInt64(0)),
            passing: [broken.raw])
        try broken.truncate(to: 0)
        try frontEnd.setUp(ring)
        try frontEnd.tell(Request.setVringEnable, le(UInt32(0)) + le(UInt32(1)))
        let output = [Part(address: 0x90000, count: 8192), Part(address: brokenAddress, count: 8192)]
        #expect(try disk.run(Kind.read, sector: 0, output: output).status == 1)
        #expect(ram.read(0x90000, 8192).allSatisfy { $0 == UInt8(ascii: "x") })
        #expect(log.take().isSuperset(of: [0x90, 0x91]))
        try frontEnd.stop([ring])
    }
}
