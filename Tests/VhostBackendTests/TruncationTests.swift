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

/// A memory file that nobody can seal, as an old or a careless front end makes it.
private func unsealableFile(_ byteCount: UInt64) throws -> Descriptor {
    let file = Descriptor(owning: unsafe cp_memfd_create("test-unsealable", UInt32(MFD_CLOEXEC)))
    try file.truncate(to: byteCount)
    return file
}

/// Both ends of a connection, and the alarm of one of them.
private final class Connection {
    let ours: UnixSocket
    let theirs: UnixSocket
    let alarm: TruncationAlarm
    init() throws {
        var ends: [Int32] = [-1, -1]
        _ = unsafe socketpair(AF_UNIX, Int32(SOCK_STREAM.rawValue), 0, &ends)
        ours = UnixSocket(adopting: Descriptor(owning: ends[0]))
        theirs = UnixSocket(adopting: Descriptor(owning: ends[1]))
        alarm = try TruncationAlarm(shuttingDown: ours)
    }
    var isShutDown: Bool { !waitReadable([theirs.descriptor.raw], timeoutMilliseconds: 0).isEmpty }
}

/// Files that their owner truncates while we use them: an access ends neither the process nor in anybody's memory, and
/// nobody answers for what it did.
@Suite struct TruncationTests {
    /// What is truncated: the RAM that holds the ring, the RAM of a request's data, and what else a front end shares.
    enum Victim: CaseIterable, Sendable { case ring, data, inflight, log }

    @Test(arguments: Victim.allCases) func frontEndTruncates(_ victim: Victim) throws {
        let complaints = Complaints()
        let lifecycle = RecordingLifecycle()
        let server = try TestServer(MemoryStorage(), lifecycle: lifecycle, logger: complaints.logger)
        let ram = try GuestRAM(makeFile: unsealableFile)
        let ring = try DriverRing(ram)
        let disk = DriverDisk(ring)
        let frontEnd = try server.connect()
        try frontEnd.handshake()
        let inflightFile = try unsealableFile(8192)
        let inflight = InflightFile(
            file: try inflightFile.duplicate(), byteCount: 8192, offset: 0, queueCount: 1, queueSize: 128)
        let log = try unsealableFile(1 << 18)
        try frontEnd.post(Request.setLogBase, le(UInt64(1) << 18) + le(UInt64(0)), passing: [log.raw])
        _ = try frontEnd.receive()
        let features = frontEnd.defaultFeatures | FrontEnd.logAll
        try frontEnd.start(ram, [ring], features: features, inflight: inflight)
        #expect(try disk.proveService())
        #expect(ring.usedIndex == 2 && complaints.all.isEmpty)

        // The service looks once more after its last answer, without a kick: what is offered before the truncation may be
        // served before it. Only the ring's own file must still be there for an offer; any later look finds that gone.
        let offer = { _ = disk.submit(Kind.write, sector: 16, input: [Part(address: DriverDisk.buffer, count: 4096)]) }
        if victim == .ring { offer() }
        switch victim {
        case .ring: try ram.regions[0].file.truncate(to: 0)
        case .data: try ram.regions[1].file.truncate(to: 0)
        case .inflight: try inflightFile.truncate(to: 0)
        case .log: try log.truncate(to: 0)
        }
        if victim != .ring { offer() }
        ring.kick.signal()
        #expect(frontEnd.isClosed())
        #expect(eventually { !server.server.isConnected } && !lifecycle.isDeviceRunning)
        // Not answered: a write of what was not in guest memory any more, or one that nobody could log.
        if victim != .ring { #expect(ring.usedIndex == 2) }
        let reason =
            switch victim {
            case .ring: "the file of the memory region at guest address 0x0 was truncated by its owner"
            case .data: "the file of the memory region at guest address 0x100000000 was truncated by its owner"
            case .inflight, .log:
                "a file that the front end shares has no room where it is used (in-flight region, dirty log or "
                    + "memory): truncated by its owner, or on a full file system"
            }
        #expect(complaints.all == ["connection closed: " + reason])
        frontEnd.disconnect()
        #expect(try server.servesHonestly())
    }

    /// Where the file can be sealed, taking it seals it: the front end cannot truncate it any more. It can until then.
    @Test func takingSeals() throws {
        let server = try TestServer(MemoryStorage())
        let ram = try GuestRAM { byteCount in
            let flags = UInt32(MFD_CLOEXEC) | UInt32(MFD_ALLOW_SEALING)
            let file = Descriptor(owning: unsafe cp_memfd_create("test-sealable", flags))
            try file.truncate(to: byteCount + 4096)
            try file.truncate(to: byteCount)
            return file
        }
        let ring = try DriverRing(ram)
        let frontEnd = try server.connect()
        try frontEnd.handshake()
        try frontEnd.start(ram, [ring])
        for region in ram.regions { #expect(throws: QuireError.self) { try region.file.truncate(to: 0) } }
        #expect(try DriverDisk(ring).proveService())
        #expect(ram.isIntact)
    }

    /// What an access finds: zeros that belong to nobody, in the cut-off page only; and a peer that was hung up on.
    @Test func accessGoesOn() throws {
        let connection = try Connection()
        let file = try unsealableFile(4 * 4096)
        let mapping = try Mapping(file, byteCount: 4 * 4096, owner: .peer(connection.alarm))
        for page in 0..<4 { mapping.store64(page * 4096, UInt64(page) + 1) }
        try file.truncate(to: 2 * 4096)
        #expect(mapping.load64(0) == 1 && mapping.load64(4096) == 2)
        #expect(!connection.alarm.isRaised && !connection.isShutDown)
        #expect(mapping.load64(3 * 4096) == 0)
        #expect(connection.alarm.isRaised && connection.isShutDown)
        mapping.store64(2 * 4096, 5)
        mapping.copyIn(3 * 4096 + 8, [1, 2, 3])
        #expect(mapping.load64(2 * 4096) == 5 && mapping.copyOut(3 * 4096, count: 11).suffix(3) == [1, 2, 3])
        mapping.store64(0, 7)
        #expect(try file.status().byteCount == 2 * 4096)
        try file.truncate(to: 4 * 4096)
        let again = try Mapping(file, byteCount: 4 * 4096)
        #expect((0..<4).map { again.load64($0 * 4096) } == [7, 2, 0, 0])
        // Another peer has nothing to do with it.
        #expect(try !Connection().alarm.isRaised)
    }

    /// Several threads, several mappings, all cut off under them.
    @Test func manyThreads() throws {
        let connections = try (0..<4).map { _ in try Connection() }
        let threads = try connections.map { connection in
            let alarm = connection.alarm
            return try JoinableThread("truncation") {
                for _ in 0..<50 {
                    guard let file = try? unsealableFile(16 * 4096),
                        let mapping = try? Mapping(file, byteCount: 16 * 4096, owner: .peer(alarm))
                    else { return }
                    try? file.truncate(to: 4096)
                    for page in 0..<16 { mapping.store64(page * 4096, 1) }
                }
            }
        }
        for thread in threads { thread.join() }
        #expect(connections.allSatisfy { $0.alarm.isRaised })
    }

    /// A guest whose buffers lie on every second page makes two mappings of each: more than a process may have.
    @Test func moreCutOffPagesThanMappings() async {
        await #expect(processExitsWith: .success) {
            let limit = Int(try Files.read("/proc/sys/vm/max_map_count").split(separator: "\n")[0])!
            let connection = try Connection()
            let pages = 2 * min(limit, 1 << 17)
            let file = try unsealableFile(UInt64(pages) * 4096)
            let mapping = try Mapping(file, byteCount: pages * 4096, owner: .peer(connection.alarm))
            try file.truncate(to: 0)
            for page in stride(from: 0, to: pages, by: 2) where mapping.load64(page * 4096) != 0 { exit(1) }
        }
    }

    /// Controls: what is not a peer's file, or not a fault at all, ends the process as ever.
    @Test func otherBusErrorsAreFatal() async {
        await #expect(processExitsWith: .signal(SIGBUS)) {
            let connection = try Connection()
            let file = try unsealableFile(8192)
            let guarded = try Mapping(file, byteCount: 4096, owner: .peer(connection.alarm))
            let ours = try Mapping(file, byteCount: 8192)
            try file.truncate(to: 0)
            guard guarded.load8(0) == 0, connection.alarm.isRaised else { exit(1) }
            _ = ours.load8(4096)
        }
        await #expect(processExitsWith: .signal(SIGBUS)) {
            let connection = try Connection()
            let file = try unsealableFile(4096)
            _ = try Mapping(file, byteCount: 4096, owner: .peer(connection.alarm))
            kill(getpid(), SIGBUS)
            sleep(10)
        }
    }
}
