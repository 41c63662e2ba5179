import Platform
import Testing
import VhostBackend

/// A back end, one of several that serve the same guest.
private final class BackEnd {
    private let lifecycle: RecordingLifecycle
    private let server: TestServer

    init(queues: Int = 1, settles: Bool = false) throws {
        lifecycle = RecordingLifecycle(settles: settles)
        server = try TestServer(MemoryStorage(), queues: queues, lifecycle: lifecycle)
    }

    func connect(queues: Int = 1) throws -> FrontEnd {
        let frontEnd = try server.connect()
        try frontEnd.handshake(queues: queues)
        return frontEnd
    }

    var origins: [DeviceStart.Origin] { lifecycle.origins }
}

/// Whether a guest runs with memory of another time or place than what its device has: told by rings that were used before, under an
/// in-flight region that is new, and never of a guest that was only paused, reset or left alone.
@Suite struct OriginTests {
    /// The index says it, or, where it has come round to 0, the used ring does.
    enum Trace: CaseIterable, Sendable {
        case index, usedRing

        /// What a snapshot of a guest that has used the ring leaves in its memory; the base that QEMU sends then.
        func leave(in ring: DriverRing) -> UInt16 {
            let base: UInt16 = self == .index ? 2 : 0
            ring.setAvailableIndex(base)
            ring.setUsedIndex(base)
            if self == .usedRing {
                // Head 0 and a status byte: what a request leaves there.
                for entry in 0..<ring.size { ring.ram.write(ring.used + 4 + 8 * UInt64(entry), le(UInt32(0)) + le(UInt32(1))) }
            }
            return base
        }
    }

    /// From the first boot on: pauses, memory that is plugged and unplugged, a lost connection, another back end, a reboot.
    @Test func aGuestThatBeginsHere() throws {
        let one = try BackEnd(), two = try BackEnd()
        let ram = try GuestRAM()
        let ring = try DriverRing(ram)
        let disk = DriverDisk(ring)
        var frontEnd = try one.connect()
        let inflight = try frontEnd.getInflight()
        try frontEnd.start(ram, [ring], inflight: inflight)
        #expect(try disk.proveService())
        try frontEnd.stop([ring])
        try frontEnd.start(ram, [ring], memory: false, bases: [2], inflight: inflight)
        #expect(try disk.proveService())
        let last = ram.regions[2]
        try frontEnd.tell(FrontEnd.Request.removeRegion, last.single)
        try frontEnd.tell(FrontEnd.Request.addRegion, last.single, passing: [last.file.raw])
        #expect(try disk.proveService())
        frontEnd.disconnect()
        frontEnd = try one.connect()
        try frontEnd.start(ram, [ring], bases: [ring.usedIndex], inflight: inflight)
        #expect(try disk.proveService())
        frontEnd.disconnect()

        frontEnd = try two.connect()
        try frontEnd.start(ram, [ring], bases: [ring.usedIndex], inflight: inflight)
        #expect(try disk.proveService())
        try frontEnd.stop([ring])
        ring.reset()
        try frontEnd.start(ram, [ring], memory: false, inflight: frontEnd.getInflight())
        #expect(try disk.proveService())
        try frontEnd.stop([ring])
        #expect(one.origins.count == 5 && two.origins.count == 2)
        #expect((one.origins + two.origins).allSatisfy { $0 == .here })
    }

    /// `loadvm`, or a migration: it stays so over a pause, for another back end, and where the guest sleeps. What settles it does so
    /// for every back end, until the next snapshot is loaded.
    @Test(arguments: Trace.allCases) func aGuestFromElsewhere(_ trace: Trace) throws {
        let one = try BackEnd(), two = try BackEnd(), settling = try BackEnd(settles: true)
        let ram = try GuestRAM()
        let ring = try DriverRing(ram)
        var frontEnd = try one.connect()
        try frontEnd.start(ram, [ring], inflight: frontEnd.getInflight())
        try frontEnd.stop([ring])
        #expect(one.origins == [.here])

        let base = trace.leave(in: ring)
        var inflight = try frontEnd.getInflight()
        for _ in 0..<2 {
            try frontEnd.start(ram, [ring], memory: false, bases: [base], inflight: inflight)
            try frontEnd.stop([ring])
        }
        // Suspend to RAM: the driver begins, and the memory around it is what it was.
        ring.reset()
        inflight = try frontEnd.getInflight()
        try frontEnd.start(ram, [ring], memory: false, inflight: inflight)
        #expect(try DriverDisk(ring).proveService())
        try frontEnd.stop([ring])
        frontEnd.disconnect()
        #expect(one.origins == [.here, .elsewhere, .elsewhere, .elsewhere])

        frontEnd = try two.connect()
        try frontEnd.start(ram, [ring], bases: [2], inflight: inflight)
        try frontEnd.stop([ring])
        frontEnd.disconnect()
        #expect(two.origins == [.elsewhere])
        frontEnd = try settling.connect()
        for _ in 0..<2 {
            try frontEnd.start(ram, [ring], memory: settling.origins.isEmpty, bases: [2], inflight: inflight)
            try frontEnd.stop([ring])
        }
        frontEnd.disconnect()
        #expect(settling.origins == [.elsewhere, .here])
        frontEnd = try two.connect()
        try frontEnd.start(ram, [ring], bases: [2], inflight: inflight)
        try frontEnd.stop([ring])
        let next = trace.leave(in: ring)
        try frontEnd.start(ram, [ring], memory: false, bases: [next], inflight: frontEnd.getInflight())
        #expect(two.origins == [.elsewhere, .here, .elsewhere])
    }

    /// A back end that died between the region and the first start has told nobody. The next one sees the same, in either guest.
    @Test func aDeathBeforeTheFirstStart() throws {
        for isLoaded in [false, true] {
            let one = try BackEnd(), two = try BackEnd()
            let ram = try GuestRAM()
            let ring = try DriverRing(ram)
            let base = isLoaded ? Trace.index.leave(in: ring) : 0
            var frontEnd = try one.connect()
            let inflight = try frontEnd.getInflight()
            frontEnd.disconnect()
            frontEnd = try two.connect()
            try frontEnd.start(ram, [ring], bases: [base], inflight: inflight)
            #expect(one.origins.isEmpty && two.origins == [isLoaded ? .elsewhere : .here])
        }
    }

    /// One ring of two was used: no start says otherwise, not even that of the ring which comes first. And a ring that is left over
    /// from before a reset says nothing of a guest that uses the other one.
    @Test func oneRingOfTwo() throws {
        let backEnd = try BackEnd(queues: 2)
        let ram = try GuestRAM()
        let rings = try (0..<2).map { try DriverRing(ram, queue: $0) }
        let frontEnd = try backEnd.connect(queues: 2)
        try frontEnd.start(ram, rings, inflight: frontEnd.getInflight(queues: 2))
        for ring in rings { #expect(try DriverDisk(ring).proveService()) }
        try frontEnd.stop(rings)
        rings[0].reset()
        try frontEnd.start(ram, [rings[0]], memory: false, inflight: frontEnd.getInflight(queues: 2))
        try frontEnd.stop([rings[0]])
        let before = backEnd.origins
        #expect(before.count >= 3 && before.allSatisfy { $0 == .here })

        rings[0].reset()
        let base = Trace.index.leave(in: rings[1])
        try frontEnd.start(ram, rings, memory: false, bases: [0, base], inflight: frontEnd.getInflight(queues: 2))
        let since = backEnd.origins.dropFirst(before.count)
        #expect(since.count >= 2 && since.allSatisfy { $0 == .elsewhere })
    }

    /// Nothing is told where nothing can be: without a region, with an earlier release's, with one that is not ours, with a lie in it.
    @Test func whatNobodyKnows() throws {
        let backEnd = try BackEnd()
        let ram = try GuestRAM()
        let ring = try DriverRing(ram)
        let base = Trace.index.leave(in: ring)
        let frontEnd = try backEnd.connect()
        try frontEnd.start(ram, [ring], bases: [base])
        try frontEnd.stop([ring])
        for word in [UInt64(0), 77, .max] {
            let inflight = try frontEnd.getInflight()
            // Behind magic and nonce.
            inflight.mapping.store64(Int(inflight.byteCount) - 64 + 16, word)
            try frontEnd.start(ram, [ring], memory: false, bases: [base], inflight: inflight)
            try frontEnd.stop([ring])
        }
        try frontEnd.start(
            ram, [ring], memory: false, bases: [base], inflight: InflightFile(lying: 1 << 16, queueCount: 1, queueSize: 128))
        try frontEnd.stop([ring])
        #expect(backEnd.origins.count == 5 && backEnd.origins.allSatisfy { $0 == .unknown })
    }
}
