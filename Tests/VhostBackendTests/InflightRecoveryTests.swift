import Glibc
import Platform
import TestSupport
import Testing
import VhostBackend

private typealias Request = FrontEnd.Request
private typealias Part = DriverRing.Part
private typealias Kind = DriverDisk.Kind

/// What a back end that died left in the in-flight region and in the rings, at every instant that it may have died at,
/// and what the next one makes of it: every request is answered once, in order, and none is lost.
@Suite struct InflightRecoveryTests {
    /// Where in the life of the request the process died.
    enum CrashPoint: CaseIterable, Sendable {
        case beforeBegin, counterStored, begun, willComplete, usedEntryWritten, usedIndexStored, entryCleared, completed
    }

    /// One request was answered before; the second met its fate; a third and a fourth wait in the available ring.
    @Test(arguments: CrashPoint.allCases) func everyCrashPoint(_ point: CrashPoint) throws {
        let storage = MemoryStorage()
        let server = try TestServer(storage)
        let ram = try GuestRAM()
        let ring = try DriverRing(ram, size: 16)
        let disk = DriverDisk(ring)
        var frontEnd = try server.connect()
        try frontEnd.handshake()
        let inflight = try frontEnd.getInflight(size: 16)
        try frontEnd.start(ram, [ring], inflight: inflight)
        #expect(try disk.run(Kind.flush).status == 0)
        #expect(eventually { inflight.usedIndex() == 1 })
        frontEnd.disconnect()
        #expect(eventually { !server.server.isConnected })

        // What the dead process did.
        func write(_ sector: UInt64) -> DriverDisk.Pending {
            disk.submit(Kind.write, sector: sector, input: [Part(address: 0x90000, count: 4096)])
        }
        let second = write(8), third = write(16), fourth = write(24)
        let order = CrashPoint.allCases
        func reached(_ step: CrashPoint) -> Bool { order.firstIndex(of: point)! >= order.firstIndex(of: step)! }
        if reached(.counterStored) { inflight.setInflight(Int(second.head), false, counter: 2) }
        if reached(.begun) { inflight.setInflight(Int(second.head), true, counter: 2) }
        if reached(.willComplete) { inflight.setLastBatchHead(second.head) }
        if reached(.usedEntryWritten) {
            ram.write(second.status, [0])
            ram.write(ring.used + 4 + 8, le(UInt32(second.head)) + le(UInt32(1)))
        }
        if reached(.usedIndexStored) { ring.setUsedIndex(2) }
        if reached(.entryCleared) { inflight.setInflight(Int(second.head), false, counter: 2) }
        if reached(.completed) { inflight.setUsedIndex(2) }
        storage.forgetOperations()
        ring.call.drain()

        frontEnd = try server.connect()
        try frontEnd.handshake()
        // QEMU takes the base from the used index after a lost connection.
        try frontEnd.start(ram, [ring], bases: [ring.usedIndex], inflight: inflight)
        // The guest sleeps until its interrupt, also for what was answered but never announced.
        let entries = try ring.collect(3)
        #expect(entries.map(\.head) == [second, third, fourth].map { UInt32($0.head) })
        let again = !reached(.usedIndexStored)
        #expect(storage.operations == (again ? [8, 16, 24] : [16, 24]).map { .write($0 * 512, 4096) })
        #expect([second, third, fourth].allSatisfy { disk.status($0) == 0 })
        #expect(eventually { inflight.usedIndex() == 4 && !(0..<16).contains { inflight.isInflight($0) } })
        #expect(try disk.proveService())
        #expect(try frontEnd.stop([ring]) == [6])
    }

    /// Answered, and not announced: the guest must hear of it although nothing else happens.
    @Test func lostInterruptIsMadeUpFor() throws {
        let server = try TestServer(MemoryStorage())
        let ram = try GuestRAM()
        let ring = try DriverRing(ram, size: 16)
        let disk = DriverDisk(ring)
        let frontEnd = try server.connect()
        try frontEnd.handshake()
        let inflight = try frontEnd.getInflight(size: 16)
        let request = disk.submit(Kind.flush)
        ram.write(request.status, [0])
        ram.write(ring.used + 4, le(UInt32(request.head)) + le(UInt32(1)))
        ring.setUsedIndex(1)
        inflight.setUsedIndex(1)
        try frontEnd.start(ram, [ring], bases: [1], inflight: inflight)
        #expect(!waitReadable([ring.call.descriptor.raw], timeoutMilliseconds: 20_000).isEmpty)
        try frontEnd.stop([ring])
    }

    /// Several requests in flight (a back end that answers out of order left them): oldest first, by their counters.
    @Test func severalInOrder() throws {
        let storage = MemoryStorage()
        let server = try TestServer(storage, queues: 2)
        let ram = try GuestRAM()
        let rings = try (0..<2).map { try DriverRing(ram, queue: $0, size: 16) }
        let disks = rings.map { DriverDisk($0) }
        let frontEnd = try server.connect()
        try frontEnd.handshake(queues: 2)
        let inflight = try frontEnd.getInflight(queues: 2, size: 16)
        let page = [Part(address: 0x90000, count: 4096)]
        let requests = (0..<5).map { disks[1].submit(Kind.write, sector: UInt64(8 * $0), input: page) }
        // 0 and 3 were answered, in that order; 4 was never taken; 1 and 2 are in flight.
        for (index, counter) in [(1, 70), (2, 30)] {
            inflight.setInflight(Int(requests[index].head), true, counter: UInt64(counter), queue: 1)
        }
        ram.write(rings[1].used + 4, le(UInt32(requests[0].head)) + le(UInt32(1)))
        ram.write(rings[1].used + 12, le(UInt32(requests[3].head)) + le(UInt32(1)))
        rings[1].setUsedIndex(2)
        inflight.setUsedIndex(2, queue: 1)
        try frontEnd.start(ram, rings, bases: [0, 2], inflight: inflight)
        let entries = try rings[1].collect(5)
        #expect(entries.map(\.head) == [0, 3, 2, 1, 4].map { UInt32(requests[$0].head) })
        #expect(storage.operations == [16, 8, 32].map { .write($0 * 512, 4096) })
        #expect(!inflight.isInflight(0))
        try frontEnd.stop(rings)
    }

    /// A region without room for the ring: it serves, and a person is told what that costs. Once a start.
    @Test(arguments: [UInt16(64), 128]) func regionThatIsTooSmall(size: UInt16) throws {
        let complaints = Complaints()
        let server = try TestServer(MemoryStorage(), queues: 2, logger: complaints.logger)
        let ram = try GuestRAM()
        let rings = try (0..<2).map { try DriverRing(ram, queue: $0) }
        let frontEnd = try server.connect()
        try frontEnd.handshake(queues: 2)
        let inflight = try frontEnd.getInflight(queues: 1, size: size)
        try frontEnd.start(ram, rings, inflight: inflight)
        for ring in rings { #expect(try DriverDisk(ring).proveService()) }
        let rest = "has 128 entries, the in-flight region room for 1 of \(size): requests in flight are lost if this "
            + "process dies"
        #expect(complaints.all == (size < 128 ? ["ring 0 \(rest)"] : []) + ["ring 1 \(rest)"])
        try frontEnd.stop(rings)
    }

    /// Heads that no ring has, entries that are no chains: the ring stops, nobody dies.
    @Test func liesInTheRegion() throws {
        let server = try TestServer(MemoryStorage())
        for lie in 0..<3 {
            let ram = try GuestRAM()
            let ring = try DriverRing(ram, size: 16)
            let frontEnd = try server.connect()
            try frontEnd.handshake()
            let inflight = try frontEnd.getInflight(size: 128)
            switch lie {
            case 0:
                for head in 0..<128 { inflight.setInflight(head, true, counter: .max) }
            case 1:
                inflight.setUsedIndex(77)
                inflight.setLastBatchHead(0xffff)
            default:
                ring.setDescriptor(3, .max - 4, 4096, flags: 0)
                inflight.setInflight(3, true, counter: 0)
            }
            try frontEnd.start(ram, [ring], inflight: inflight)
            if lie != 1 { #expect(ring.isBroken()) }
            try frontEnd.stop([ring])
            frontEnd.disconnect()
            #expect(ram.isIntact)
            #expect(try server.servesHonestly())
        }
    }
}
