import CPlatform
import Glibc
import GuestMemory
import Platform
import TestSupport
import Testing
import VhostBackend

private typealias Request = FrontEnd.Request
private typealias Part = DriverRing.Part
private typealias Kind = DriverDisk.Kind

/// Front ends that lie. Each lie must be answered with an error, or end the connection; the server lives, serves the next
/// front end, and has touched nothing outside of guest RAM.
@Suite struct LyingFrontEndTests {
    /// What a lie may carry with it.
    enum Passed: Sendable { case ram, event, pipe, directory, readOnly, tiny, disk }

    struct Lie: Sendable, CustomTestStringConvertible {
        let name: String
        let request: UInt32
        let payload: [UInt8]
        var passed: [Passed] = []
        /// Sent to a device that runs.
        var isStarted = false
        var testDescription: String { name }

        init(_ name: String, _ request: UInt32, _ payload: [UInt8] = [], _ passed: [Passed] = [], started: Bool = false) {
            (self.name, self.request, self.payload, self.passed, isStarted) = (name, request, payload, passed, started)
        }
    }

    private static func region(
        _ guest: UInt64 = 0, _ bytes: UInt64 = 8192, _ user: UInt64 = 0x1000_0000, _ offset: UInt64 = 0
    ) -> [UInt8] { le(guest) + le(bytes) + le(user) + le(offset) }
    private static func table(_ regions: [[UInt8]], count: UInt32? = nil) -> [UInt8] {
        le(count ?? UInt32(regions.count)) + le(UInt32(0)) + regions.flatMap { $0 }
    }
    private static func single(_ region: [UInt8]) -> [UInt8] { le(UInt64(0)) + region }
    private static func state(_ index: UInt32, _ value: UInt32) -> [UInt8] { le(index) + le(value) }

    static var lies: [Lie] {
        let top: UInt64 = 0xffff_ffff_ffff_f000
        var lies: [Lie] = []
        // Regions that cannot be, by both messages that carry them.
        let regions: [(String, [UInt8], Passed)] = [
            ("empty", region(0, 0), .ram), ("unaligned guest address", region(0x800), .ram),
            ("unaligned size", region(0, 8191), .ram), ("unaligned user address", region(0, 8192, 0x1000_0800), .ram),
            ("unaligned offset", region(0, 8192, 0x1000_0000, 512), .ram),
            ("wrapping guest address", region(top, 8192), .ram), ("wrapping user address", region(0, 8192, top), .ram),
            ("wrapping offset", region(0, 8192, 0x1000_0000, top), .ram),
            ("beyond the file", region(0, 1 << 30), .ram), ("huge", region(0, top), .ram),
            ("offset beyond the file", region(0, 8192, 0x1000_0000, 1 << 30), .ram), ("file too small", region(), .tiny),
            ("an eventfd", region(), .event), ("a pipe", region(), .pipe), ("a directory", region(), .directory),
            ("a read-only file", region(), .readOnly),
        ]
        for (name, bytes, file) in regions {
            lies.append(Lie("table: region: \(name)", Request.setMemoryTable, table([bytes]), [file]))
            lies.append(Lie("added region: \(name)", Request.addRegion, single(bytes), [file]))
            lies.append(Lie("region while running: \(name)", Request.addRegion, single(bytes), [file], started: true))
        }
        lies += [
            Lie("table: overlapping", Request.setMemoryTable, table([region(0, 8192, 0x1000_0000), region(4096, 8192, 0x2000_0000)]), [.ram, .ram]),
            Lie("table: overlapping for the front end", Request.setMemoryTable, table([region(0), region(1 << 20)]), [.ram, .ram]),
            Lie("table: twice the same", Request.setMemoryTable, table([region(), region()]), [.ram, .ram]),
            Lie("table: no region", Request.setMemoryTable, table([]), [.ram]),
            Lie("table: fewer descriptors", Request.setMemoryTable, table([region(), region(1 << 20, 8192, 1 << 32)]), [.ram]),
            Lie("table: more descriptors", Request.setMemoryTable, table([region()]), [.ram, .ram]),
            Lie("table: count exceeds payload", Request.setMemoryTable, table([region()], count: 2), [.ram, .ram]),
            Lie("table: huge count", Request.setMemoryTable, table([region()], count: .max), [.ram]),
            Lie("table: trailing bytes", Request.setMemoryTable, table([region()]) + [0], [.ram]),
            Lie("added region overlaps", Request.addRegion, single(region(4096, 8192, 1 << 40)), [.ram], started: true),
            Lie("removed region unknown", Request.removeRegion, single(region(1 << 50)), started: true),
            Lie("removed region of another size", Request.removeRegion, single(region(0, 4096, GuestRAM.lowUser, 16384)), started: true),
            Lie("features not offered", Request.setFeatures, le(UInt64(1) << 63)),
            Lie("features not offered, running", Request.setFeatures, le(UInt64(1) << 5), started: true),
            Lie("protocol features not offered", Request.setProtocolFeatures, le(UInt64(1) << 14)),
            Lie("status of 9 bits", Request.setStatus, le(UInt64(256))),
            Lie("config write", Request.setConfig, le(UInt32(0)) + le(UInt32(1)) + le(UInt32(0)) + [1]),
            Lie("config write beyond", Request.setConfig, le(UInt32.max) + le(UInt32(4)) + le(UInt32(0)) + [1, 2, 3, 4]),
            Lie("config write, wrong size", Request.setConfig, le(UInt32(0)) + le(UInt32.max) + le(UInt32(0)) + [1]),
            Lie("config read beyond", Request.getConfig, le(UInt32(61)) + le(UInt32(1)) + le(UInt32(0)) + [1]),
            Lie("config read of the end of the world", Request.getConfig, le(UInt32.max) + le(UInt32(1)) + le(UInt32(0)) + [1]),
            Lie("config read, no room", Request.getConfig, le(UInt32(0)) + le(UInt32.max) + le(UInt32(0))),
            Lie("config read of 257 bytes", Request.getConfig, le(UInt32(0)) + le(UInt32(257)) + le(UInt32(0)) + [UInt8](repeating: 0, count: 257)),
            Lie("log of 0 bytes", Request.setLogBase, le(UInt64(0)) + le(UInt64(0)), [.ram]),
            Lie("log larger than its file", Request.setLogBase, le(UInt64(1) << 40) + le(UInt64(0)), [.ram]),
            Lie("log wraps", Request.setLogBase, le(UInt64.max) + le(UInt64(4096)), [.ram]),
            Lie("log at an odd offset", Request.setLogBase, le(UInt64(64)) + le(UInt64(64)), [.ram]),
            Lie("log in an eventfd", Request.setLogBase, le(UInt64(4096)) + le(UInt64(0)), [.event]),
            Lie("log in a read-only file", Request.setLogBase, le(UInt64(4096)) + le(UInt64(0)), [.readOnly]),
            Lie("in-flight: 0 queues", Request.getInflight, InflightFile.wire(0, 0, 0, 128)),
            Lie("in-flight: too many queues", Request.getInflight, InflightFile.wire(0, 0, 3, 128)),
            Lie("in-flight: 0 entries", Request.getInflight, InflightFile.wire(0, 0, 1, 0)),
            Lie("in-flight: 65535 entries", Request.getInflight, InflightFile.wire(0, 0, 1, 65535)),
            Lie("in-flight: wrong payload", Request.getInflight, [UInt8](repeating: 0, count: 22)),
            Lie("in-flight: larger than its file", Request.setInflight, InflightFile.wire(1 << 30, 0, 1, 128), [.ram]),
            Lie("in-flight: offset beyond", Request.setInflight, InflightFile.wire(8192, 1 << 30, 1, 128), [.ram]),
            Lie("in-flight: wraps", Request.setInflight, InflightFile.wire(8192, .max - 4095, 1, 128), [.ram]),
            Lie("in-flight: odd offset", Request.setInflight, InflightFile.wire(8192, 8, 1, 128), [.ram]),
            Lie("in-flight: smaller than its queues", Request.setInflight, InflightFile.wire(4096, 0, 64, 32768), [.ram]),
            Lie("in-flight: 65535 queues", Request.setInflight, InflightFile.wire(4096, 0, .max, .max), [.ram]),
            Lie("in-flight: no queues", Request.setInflight, InflightFile.wire(4096, 0, 0, 0), [.ram]),
            Lie("in-flight: empty", Request.setInflight, InflightFile.wire(0, 0, 1, 128), [.ram]),
            Lie("in-flight: a pipe", Request.setInflight, InflightFile.wire(8192, 0, 1, 128), [.pipe]),
            Lie("no backend channel", Request.setBackendChannel), Lie("no log descriptor", Request.setLogDescriptor),
        ]
        for size in [UInt32(0), 3, 65536, .max] { lies.append(Lie("ring of \(size)", Request.setVringNum, state(0, size))) }
        lies.append(Lie("base of 17 bits", Request.setVringBase, state(0, 65536)))
        for request in [Request.setVringNum, Request.setVringBase, Request.getVringBase, Request.setVringEnable] {
            for index in [UInt32(2), 256, .max] {
                lies.append(Lie("request \(request) for ring \(index)", request, state(index, 1), started: true))
            }
            lies.append(Lie("request \(request), short", request, [0, 0, 0, 0]))
        }
        for request in [Request.setVringKick, Request.setVringCall, Request.setVringError] {
            lies.append(Lie("request \(request) for ring 2", request, le(UInt64(2)), [.event], started: true))
            lies.append(Lie("request \(request) without descriptor", request, le(UInt64(0)), [], started: true))
            lies.append(Lie("request \(request) with an unwanted one", request, le(UInt64(0x100)), [.event]))
            lies.append(Lie("request \(request) with two", request, le(UInt64(0)), [.event, .event]))
        }
        lies.append(Lie("addresses of ring 2", Request.setVringAddress, le(UInt32(2)) + [UInt8](repeating: 0, count: 36)))
        for (name, descriptors, used, available) in [
            ("outside", UInt64(0x10), UInt64(0x1000), UInt64(0x2000)), ("at the end of the world", top, top, top),
            ("misaligned descriptors", GuestRAM.lowUser + 8, GuestRAM.lowUser + 0x3000, GuestRAM.lowUser + 0x2000),
            ("misaligned used", GuestRAM.lowUser, GuestRAM.lowUser + 0x3002, GuestRAM.lowUser + 0x2000),
            ("misaligned available", GuestRAM.lowUser, GuestRAM.lowUser + 0x3000, GuestRAM.lowUser + 0x2001),
            ("ends behind its region", GuestRAM.lowUser, GuestRAM.lowUser + GuestRAM.lowBytes - 64, GuestRAM.lowUser + 0x2000),
            ("straddles two regions", 0x7f10_0000_0000 + GuestRAM.highBytes - 64, GuestRAM.lowUser, GuestRAM.lowUser + 0x2000),
        ] {
            lies.append(
                Lie(
                    "ring addresses: \(name)", Request.setVringAddress,
                    le(UInt32(0)) + le(UInt32(0)) + le(descriptors) + le(used) + le(available) + le(UInt64(0)), started: true))
        }
        // Every message: bytes too many, bytes too few, descriptors that do not belong.
        for request in Request.all {
            let takes = [Request.setMemoryTable, 6, 7, 12, 13, 14, 21, 32, 37, 38].contains(request)
            if !takes { lies.append(Lie("request \(request) with a descriptor", request, le(UInt64(0)), [.event])) }
            lies.append(Lie("request \(request) with nine descriptors", request, le(UInt64(0)), [Passed](repeating: .event, count: 9)))
            lies.append(Lie("request \(request) with 3 bytes", request, [1, 2, 3], [1, 3].contains(request) ? [] : takes ? [.event] : []))
            lies.append(Lie("request \(request) with 4096 bytes", request, [UInt8](repeating: 0xff, count: 4096), takes ? [.event] : []))
        }
        for request in [UInt32(0), 19, 20, 26, 33, 41, 1000, .max] { lies.append(Lie("unknown request \(request)", request)) }
        // What takes and closes its descriptor whatever the payload: no lie.
        return lies.filter { !($0.request == Request.setLogDescriptor && $0.passed == [.event]) }
    }

    private final class Props {
        let ram: GuestRAM
        let event: EventDescriptor
        var pipe: Pipe
        let directory: Descriptor
        let readOnly: Descriptor
        let tiny: Descriptor
        init() throws {
            ram = try GuestRAM()
            event = try EventDescriptor()
            pipe = try Pipe()
            directory = try Descriptor.open("/tmp", O_RDONLY)
            let file = try Memfd(name: "read-only", byteCount: 1 << 16).takeDescriptor()
            readOnly = try Descriptor.open("/proc/self/fd/\(file.raw)", O_RDONLY)
            tiny = try Memfd(name: "tiny", byteCount: 4096).takeDescriptor()
        }
        func raw(_ passed: Passed) -> Int32 {
            switch passed {
            case .ram, .disk: ram.regions[0].file.raw
            case .event: event.descriptor.raw
            case .pipe: pipe.reader.raw()!
            case .directory: directory.raw
            case .readOnly: readOnly.raw
            case .tiny: tiny.raw
            }
        }
    }

    /// Both ways of hearing "no". One server for all lies: whatever one of them broke, the next would see.
    @Test(arguments: [true, false]) func everyLieIsRefused(acknowledged: Bool) throws {
        let storage = MemoryStorage()
        let server = try TestServer(storage, queues: 2)
        for lie in Self.lies {
            let props = try Props()
            let ring = try DriverRing(props.ram)
            let frontEnd = try server.connect()
            try frontEnd.handshake()
            if lie.isStarted { try frontEnd.start(props.ram, [ring]) }
            let passed = lie.passed.map { props.raw($0) }
            try? frontEnd.post(
                lie.request, lie.payload, passing: passed,
                flags: FrontEnd.version | (acknowledged ? FrontEnd.needReply : 0))
            // A malformed message ends the connection; one that is refused is answered where there is an answer that means
            // "no". A "yes", or what a front end could take for the answer that it hoped for, is wrong.
            if let reply = try? frontEnd.receive() {
                #expect(reply.request == lie.request, "\(lie.name)")
                if lie.request == Request.getConfig {
                    #expect(reply.payload.isEmpty, "\(lie.name)")
                } else {
                    #expect(acknowledged && !Request.answered.contains(lie.request), "\(lie.name)")
                    #expect(reply.payload == le(UInt64(1)), "\(lie.name)")
                }
                // The session goes on, in order.
                #expect((try? frontEnd.askNumber(Request.getQueueCount)) == 2, "\(lie.name)")
            } else {
                #expect(frontEnd.isClosed(), "\(lie.name)")
            }
            frontEnd.disconnect()
            #expect(props.ram.isIntact, "\(lie.name)")
        }
        #expect(try server.servesHonestly())
    }

    /// GET_CONFIG is the one request with an answer of its own that can be refused by it; asked twice, with and without
    /// need_reply, because that changes nothing.
    @Test func refusalsThatAreAnswers() throws {
        let server = try TestServer(MemoryStorage())
        let beyond = le(UInt32(61)) + le(UInt32(1)) + le(UInt32(0)) + [1]
        let frontEnd = try server.connect()
        try frontEnd.handshake()
        for flags in [0, FrontEnd.needReply] {
            try frontEnd.post(Request.getConfig, beyond, flags: FrontEnd.version | flags)
            #expect(try frontEnd.receive().payload.isEmpty)
        }
        // No ring 7: whatever came back would be its base.
        try frontEnd.post(
            Request.getVringBase, Self.state(7, 0), flags: FrontEnd.version | FrontEnd.needReply)
        #expect(throws: FrontEnd.Failure.self) { _ = try frontEnd.receive() }
        #expect(frontEnd.isClosed())
        #expect(try server.servesHonestly())
    }

    /// Headers that are no headers, and ends in the middle.
    @Test func brokenFraming() throws {
        let server = try TestServer(MemoryStorage())
        func header(_ request: UInt32, _ flags: UInt32, _ size: UInt32) -> [UInt8] { le(request) + le(flags) + le(size) }
        let closing: [[UInt8]] = [
            header(1, 0, 0), header(1, 2, 0), header(1, 3, 0), header(1, 0xffff_ffff, 0),
            header(1, 1 | 4, 0), header(1, 1, 4097), header(1, 1, .max), header(.max, .max, .max),
            header(Request.setMemoryTable, 1, 0), [UInt8](repeating: 0, count: 12), [UInt8](repeating: 0xff, count: 64),
        ]
        for bytes in closing {
            let frontEnd = try server.connect()
            try frontEnd.sendRaw(bytes)
            #expect(frontEnd.isClosed(), "\(bytes)")
        }
        // Disconnected in the middle of a header, of a payload, and with descriptors that nobody takes.
        let event = try EventDescriptor()
        for bytes in [[1], Array(header(2, 1, 8).prefix(11)), header(2, 1, 8), header(2, 1, 8) + [1, 2, 3]] {
            for passed in [[], [event.descriptor.raw]] {
                let frontEnd = try server.connect()
                try frontEnd.sendRaw(bytes, passing: passed)
                frontEnd.disconnect()
            }
        }
        #expect(try server.servesHonestly())
    }

    /// Messages that are fine one by one and make no sense in a row: nothing runs, nothing breaks.
    @Test func sillyOrders() throws {
        let lifecycle = RecordingLifecycle()
        let storage = MemoryStorage()
        let server = try TestServer(storage, lifecycle: lifecycle)
        let queue0 = le(UInt32(0)), on = le(UInt32(1)), off = le(UInt32(0))
        func session(_ body: (FrontEnd, GuestRAM, DriverRing) throws -> Void) throws {
            let ram = try GuestRAM()
            let ring = try DriverRing(ram)
            let frontEnd = try server.connect()
            try frontEnd.handshake()
            try body(frontEnd, ram, ring)
            frontEnd.disconnect()
            #expect(ram.isIntact)
            #expect(eventually { !lifecycle.isDeviceRunning })
        }
        // A ring before there is memory: it begins when a later message finds all in place.
        try session { frontEnd, ram, ring in
            try frontEnd.tell(Request.setFeatures, le(frontEnd.defaultFeatures))
            try frontEnd.setUp(ring)
            try frontEnd.tell(Request.setVringEnable, queue0 + on)
            #expect(!lifecycle.isDeviceRunning)
            try frontEnd.sendMemory(ram)
            try frontEnd.tell(Request.setVringEnable, queue0 + on)
            #expect(try DriverDisk(ring).proveService())
        }
        // Enabled without addresses, without a size, without a kick.
        try session { frontEnd, ram, ring in
            try frontEnd.sendMemory(ram)
            try frontEnd.tell(Request.setVringEnable, queue0 + on)
            try frontEnd.tell(Request.setVringKick, le(UInt64(0)), passing: [ring.kick.descriptor.raw])
            try frontEnd.tell(Request.setVringAddress, ring.wireAddresses())
            #expect(!lifecycle.isDeviceRunning)
            try frontEnd.tell(Request.setVringKick, le(UInt64(0x100)))
            try frontEnd.tell(Request.setVringNum, queue0 + le(UInt32(128)))
            try frontEnd.tell(Request.setVringEnable, queue0 + on)
            #expect(!lifecycle.isDeviceRunning)
            #expect(try frontEnd.vringBase(0) == 0 && frontEnd.vringBase(0) == 0)
        }
        // Stopped twice, enabled after the stop: only a new kick descriptor starts a ring again.
        try session { frontEnd, ram, ring in
            try frontEnd.start(ram, [ring])
            #expect(try DriverDisk(ring).proveService())
            #expect(try frontEnd.vringBase(0) == 2 && frontEnd.vringBase(0) == 2)
            try frontEnd.tell(Request.setVringEnable, queue0 + off)
            try frontEnd.tell(Request.setVringEnable, queue0 + on)
            #expect(!lifecycle.isDeviceRunning)
            try frontEnd.tell(Request.setVringKick, le(UInt64(0)), passing: [ring.kick.descriptor.raw])
            #expect(lifecycle.isDeviceRunning)
            #expect(try DriverDisk(ring).proveService(seed: 2))
        }
        // Features, base and size changed under a running ring.
        try session { frontEnd, ram, ring in
            try frontEnd.start(ram, [ring])
            #expect(try DriverDisk(ring).proveService())
            try frontEnd.tell(Request.setFeatures, le(frontEnd.defaultFeatures | FrontEnd.eventIndex))
            #expect(!lifecycle.isDeviceRunning)
            try frontEnd.tell(Request.setFeatures, le(frontEnd.defaultFeatures))
            try frontEnd.tell(Request.setVringEnable, queue0 + on)
            #expect(try DriverDisk(ring).proveService(seed: 5))
            try frontEnd.tell(Request.setVringBase, queue0 + le(UInt32(9)))
            try frontEnd.tell(Request.setVringNum, queue0 + le(UInt32(2)))
            #expect(!lifecycle.isDeviceRunning)
        }
        // All memory taken away; set again by another message.
        try session { frontEnd, ram, ring in
            try frontEnd.start(ram, [ring])
            #expect(try DriverDisk(ring).proveService())
            for region in ram.regions { try frontEnd.tell(Request.removeRegion, region.single) }
            #expect(!lifecycle.isDeviceRunning)
            try frontEnd.tell(
                Request.setMemoryTable, le(UInt32(3)) + le(UInt32(0)) + ram.regions.flatMap(\.wire),
                passing: ram.regions.map { $0.file.raw })
            #expect(lifecycle.isDeviceRunning)
            #expect(try DriverDisk(ring).proveService(seed: 7))
        }
        #expect(try server.servesHonestly())
    }

    /// Addresses that are refused change nothing: the ring goes on with those that it has, and so does the device.
    @Test func refusedAddressesLeaveTheRingAlone() throws {
        let lifecycle = RecordingLifecycle()
        let server = try TestServer(MemoryStorage(), queues: 2, lifecycle: lifecycle)
        let ram = try GuestRAM()
        let rings = try (0..<2).map { try DriverRing(ram, queue: $0) }
        let frontEnd = try server.connect()
        try frontEnd.handshake(queues: 2)
        try frontEnd.start(ram, rings)
        let outside = le(UInt32(0)) + le(UInt32(0)) + [UInt8](repeating: 0xf0, count: 32)
        #expect(try frontEnd.acknowledged(Request.setVringAddress, outside) == 1)
        #expect(lifecycle.isDeviceRunning)
        for ring in rings { #expect(try DriverDisk(ring).proveService()) }
        try frontEnd.stop(rings)
    }

    /// A ring that ran and cannot be set going again ends the connection, although the front end would hear a "no": it
    /// would wait for requests that nobody answers.
    @Test func ringThatCannotGoOnEndsTheConnection() throws {
        let server = try TestServer(MemoryStorage())
        let ram = try GuestRAM()
        let ring = try DriverRing(ram)
        let frontEnd = try server.connect()
        try frontEnd.handshake()
        try frontEnd.start(ram, [ring])
        #expect(try DriverDisk(ring).proveService())
        let unusable = try Descriptor.open("/tmp", 0o10000000)  // O_PATH
        try frontEnd.post(
            Request.setVringCall, le(UInt64(0)), passing: [unusable.raw], flags: FrontEnd.version | FrontEnd.needReply)
        #expect(throws: FrontEnd.Failure.self) { _ = try frontEnd.receive() }
        #expect(frontEnd.isClosed())
        #expect(try server.servesHonestly())
    }

    /// More regions than there are slots; a front end that goes away with all of them.
    @Test func slotsRunOut() throws {
        let server = try TestServer(MemoryStorage())
        let file = try Memfd(name: "slots", byteCount: 4096).takeDescriptor()
        let frontEnd = try server.connect()
        try frontEnd.handshake()
        let slots = Int(try frontEnd.askNumber(Request.getMaxMemorySlots))
        for slot in 0..<slots {
            let region = Self.region(UInt64(slot) << 20, 4096, UInt64(slot + 1) << 30)
            try frontEnd.tell(Request.addRegion, Self.single(region), passing: [file.raw])
        }
        let region = Self.region(1 << 50, 4096, 1 << 51)
        #expect(try frontEnd.acknowledged(Request.addRegion, Self.single(region), passing: [file.raw]) == 1)
        frontEnd.disconnect()
        #expect(try server.servesHonestly())
    }

    /// A file of huge pages. It needs no pool of such pages, because nobody touches it.
    private static func hugePages() throws -> Descriptor {
        let raw = unsafe cp_memfd_create("test-huge", UInt32(MFD_CLOEXEC) | UInt32(MFD_HUGETLB))
        guard raw >= 0 else { throw QuireError.system("no huge pages") }
        let file = Descriptor(owning: raw)
        try file.truncate(to: 2 << 20)
        return file
    }
    private static var hasHugePages: Bool { (try? hugePages().status()) != nil }

    /// Huge pages cannot be given back one by one: refused as RAM, with a line that says what to do instead. And in
    /// whatever else a front end shares, because no page of ours can take the place of a part of one. Skipped where the
    /// kernel has none.
    @Test(.enabled(if: hasHugePages, "this kernel has no huge pages")) func hugePagesAreRefused() throws {
        let file = try Self.hugePages()
        let line = "memory region at guest address 0x40000000 is backed by huge pages, which cannot be given back one by "
            + "one: use a memory backend without hugetlb=on or /dev/hugepages"
        let peer = try TestServer(MemoryStorage()).connect()
        for owner in [FileOwner.us, .peer(try TruncationAlarm(shuttingDown: peer.socket))] {
            let error = #expect(throws: QuireError.self) {
                try MemoryRegion(
                    guestAddress: 1 << 30, byteCount: 2 << 20, userAddress: 1 << 40, fileOffset: 0,
                    descriptor: file.duplicate(), owner: owner)
            }
            #expect(error?.code == .unsupported && error?.description == line)
        }

        let complaints = Complaints()
        let server = try TestServer(MemoryStorage(), logger: complaints.logger)
        let frontEnd = try server.connect()
        try frontEnd.handshake()
        let region = Self.region(1 << 30, 2 << 20)
        #expect(try frontEnd.acknowledged(Request.addRegion, Self.single(region), passing: [file.raw]) == 1)
        #expect(try frontEnd.acknowledged(Request.setMemoryTable, Self.table([region]), passing: [file.raw]) == 1)
        let inflight = InflightFile.wire(8192, 0, 1, 128)
        #expect(try frontEnd.acknowledged(Request.setInflight, inflight, passing: [file.raw]) == 1)
        try frontEnd.post(Request.setLogBase, le(UInt64(4096)) + le(UInt64(0)), passing: [file.raw])
        #expect(frontEnd.isClosed())
        #expect(try server.servesHonestly())
        #expect(
            complaints.all == [
                "refused: addMemoryRegion: \(line)", "refused: setMemoryTable: \(line)",
                "refused: setInflightDescriptor: what was passed is a file of huge pages",
                "connection closed: setLogBase: what was passed is a file of huge pages",
            ])
    }

    /// Random bytes, and random damage to valid sequences. The seed is in the failure's text.
    @Test(arguments: [UInt64(1), 2, UInt64.random(in: 3...UInt64.max)]) func fuzz(seed: UInt64) throws {
        var random = SplitMix(seed)
        let server = try TestServer(MemoryStorage(), queues: 2)
        for _ in 0..<150 {
            let props = try Props()
            let ring = try DriverRing(props.ram)
            let all: [Passed] = [.ram, .event, .pipe, .readOnly, .tiny]
            DriverDisk(ring).submit(Kind.flush)
            DriverDisk(ring).submit(Kind.read, output: [Part(address: 0x90000, count: 4096)])
            var messages: [(bytes: [UInt8], passed: [Int32])] = []
            let frontEnd = try server.connect()
            func add(_ request: UInt32, _ payload: [UInt8] = [], _ passed: [Int32] = []) {
                messages.append((frontEnd.message(request, payload), passed))
            }
            let ram = props.ram
            add(Request.getFeatures)
            add(Request.setProtocolFeatures, le(UInt64(0x1922b & ~(random.next() % 2 == 0 ? 8 : 0))))
            add(Request.setOwner)
            add(Request.setFeatures, le(FrontEnd.protocolFeatures | FrontEnd.indirect | FrontEnd.version1))
            add(Request.getInflight, InflightFile.wire(0, 0, 1, 128))
            add(
                Request.setMemoryTable, le(UInt32(3)) + le(UInt32(0)) + ram.regions.flatMap(\.wire),
                ram.regions.map { $0.file.raw })
            add(Request.setVringNum, Self.state(0, 128))
            add(Request.setVringBase, Self.state(0, 0))
            add(Request.setVringAddress, ring.wireAddresses())
            add(Request.setVringCall, le(UInt64(0)), [ring.call.descriptor.raw])
            add(Request.setVringKick, le(UInt64(0)), [ring.kick.descriptor.raw])
            add(Request.setVringEnable, Self.state(0, 1))
            add(Request.getConfig, le(UInt32(0)) + le(UInt32(8)) + le(UInt32(0)) + [UInt8](repeating: 0, count: 8))
            add(Request.setLogBase, le(UInt64(4096)) + le(UInt64(0)), [props.tiny.raw])
            add(Request.getVringBase, Self.state(0, 0))
            for _ in 0..<random.next() % 4 + 1 {
                let victim = Int(random.next() % UInt64(messages.count))
                switch random.next() % 7 {
                case 0: messages.remove(at: victim)
                case 1: messages.insert(messages[victim], at: Int(random.next() % UInt64(messages.count)))
                case 2: messages.swapAt(victim, Int(random.next() % UInt64(messages.count)))
                case 3: messages[victim].passed.append(props.raw(all[Int(random.next() % UInt64(all.count))]))
                case 4: messages[victim].passed = []
                case 5: messages[victim].bytes = (0..<random.next() % 64).map { _ in UInt8(truncatingIfNeeded: random.next()) }
                default:
                    guard !messages[victim].bytes.isEmpty else { break }
                    for _ in 0..<random.next() % 3 + 1 {
                        let at = Int(random.next() % UInt64(messages[victim].bytes.count))
                        messages[victim].bytes[at] ^= 1 << UInt8(random.next() % 8)
                    }
                }
                if messages.isEmpty { break }
            }
            for message in messages where !message.bytes.isEmpty {
                guard (try? frontEnd.sendRaw(message.bytes, passing: message.passed)) != nil else { break }
                if random.next() % 4 == 0 { ring.kick.signal() }
            }
            frontEnd.disconnect()
        }
        #expect(try server.servesHonestly(), "seed \(seed)")
    }
}
