import GuestMemory
import Platform
import Synchronization
import Testing
import VhostBackend

private typealias Request = FrontEnd.Request
private typealias Part = DriverRing.Part
private typealias Kind = DriverDisk.Kind
private typealias Log = DirtyLogTests.Log

/// A front end exchanges the log while it migrates, as QEMU does when memory is plugged (vhost_dev_log_resize): it reads the old one
/// for the last time when SET_LOG_BASE is answered. What is marked stands in the old one by then, or in the new one.
@Suite struct LogExchangeTests {
    private static func dirtyLog(_ log: Log) throws -> DirtyLog {
        try DirtyLog(log.file, offset: 0, byteCount: UInt64(log.byteCount), owner: .us)
    }

    // MARK: - Who marks

    /// Exchanges the log in the middle of one long mark. Whether all of it stands in the log that it began in by then.
    private func isWhole(_ mark: @escaping @Sendable (UInt64) -> Void, setLog: (DirtyLog) -> Void) throws -> Bool {
        let byteCount = 1 << 16
        let first = try Log(byteCount: byteCount), second = try Log(byteCount: byteCount)
        setLog(try Self.dirtyLog(first))
        let next = try Self.dirtyLog(second)
        let marker = try JoinableThread("marker") { mark(UInt64(byteCount) * 8 * 4096) }
        let deadline = monotonicNanoseconds() + 20_000_000_000
        while first.mapping.load8(0) == 0, monotonicNanoseconds() < deadline {}
        setLog(next)
        let marked = first.mapping.copyOut(0, count: byteCount)
        marker.join()
        #expect(second.take().isEmpty && first.isIntact && second.isIntact)
        return marked.allSatisfy { $0 == 0xff }
    }

    @Test func exchangingWaitsForWhoMarks() throws {
        let tracker = DirtyTracker()
        tracker.setEnabled(true)
        for _ in 0..<3 {
            let whole = try isWhole({ tracker.markDirty(guestAddress: 0, byteCount: $0) }, setLog: { tracker.setLog($0) })
            #expect(whole)
        }
    }

    /// A tracker that does not wait: it marks in the log that it has found.
    private final class CarelessTracker: Sendable {
        private let log = Mutex<DirtyLog?>(nil)
        func setLog(_ new: DirtyLog) { log.withLock { $0 = new } }
        func mark(_ byteCount: UInt64) { log.withLock { $0 }?.markDirty(guestAddress: 0, byteCount: byteCount) }
    }

    /// The control: it is found in the old log when nobody reads that any more.
    @Test func carelessTrackerIsFound() throws {
        let tracker = CarelessTracker()
        var isFound = false
        // The marker may have been faster.
        for _ in 0..<20 where !isFound { isFound = try !isWhole({ tracker.mark($0) }, setLog: { tracker.setLog($0) }) }
        #expect(isFound)
    }

    // MARK: - At the wire

    /// A front end with a log of the first 2 MiB of guest memory, which is all that is used.
    private final class Migration {
        let server: TestServer
        let ram: GuestRAM
        let ring: DriverRing
        let disk: DriverDisk
        let frontEnd: FrontEnd
        private(set) var log: Log
        private(set) var old: [Log] = []
        /// All that was found.
        private(set) var seen = Set<UInt64>()

        init(_ storage: any BlockStorage) throws {
            server = try TestServer(VirtioBlock(storage: storage, logger: TestServer.quiet))
            ram = try GuestRAM()
            ring = try DriverRing(ram)
            disk = DriverDisk(ring)
            frontEnd = try server.connect()
            log = try Log(byteCount: Int(GuestRAM.lowBytes / 4096 / 8))
            try frontEnd.handshake()
            try frontEnd.start(ram, [ring])
            try setLog(log)
            try frontEnd.tell(Request.setFeatures, le(frontEnd.defaultFeatures | FrontEnd.logAll))
            try frontEnd.tell(Request.setVringAddress, ring.wireAddresses(logFlag: true))
        }

        private func setLog(_ new: Log) throws {
            _ = try frontEnd.ask(Request.setLogBase, le(UInt64(new.byteCount)) + le(UInt64(0)), passing: [new.file.raw])
        }

        /// The old log is read when there is an answer, and then nobody reads it any more.
        func exchange() throws {
            let new = try Log(byteCount: log.byteCount)
            try setLog(new)
            seen.formUnion(log.take())
            old.append(log)
            log = new
        }

        /// All rings have stopped: what the log has now is the rest.
        func end() throws {
            try frontEnd.stop([ring])
            seen.formUnion(log.take())
            #expect(old.allSatisfy { $0.take().isEmpty }, "marked in a log that nobody reads any more")
            let areIntact = (old + [log]).allSatisfy { $0.isIntact }
            #expect(areIntact)
        }
    }

    /// Requests are answered all the while, each into pages that nobody else writes.
    @Test func allThatIsAnsweredIsFound() throws {
        let migration = try Migration(MemoryStorage())
        var expected: Set<UInt64> = [migration.ring.used / 4096]
        for round in UInt64(0)..<12 {
            for number in 0..<UInt64(16) {
                let gfn = 0x20 + 16 * round + number
                let pending = migration.disk.submit(Kind.read, output: [Part(address: gfn * 4096, count: 4096)])
                expected.formUnion([gfn, pending.status / 4096])
            }
            migration.ring.kick.signal()
            try migration.exchange()
            #expect(try migration.ring.collect(16).count == 16)
        }
        try migration.end()
        #expect(migration.seen == expected)
    }

    /// A storage that stops in the middle of a read until it is told to go on.
    private final class HalfWay: BlockStorage {
        let byteCount: UInt64 = 1 << 20
        let logicalBlockBytes: UInt32 = 4096
        let isReadOnly = true
        let serial = "half-way"
        private enum Step { case before, half, on }
        private let step = Monitor(Step.before)

        private var deadline: UInt64 { monotonicNanoseconds() + 20_000_000_000 }
        func waitForHalf() -> Bool { step.wait(until: deadline) { $0 == .half ? true : nil } == true }
        func goOn() { step.update { $0 = .on } }

        func read(at offset: UInt64, into buffer: GuestBuffer) throws(QuireError) {
            try buffer.copyIn([UInt8](repeating: 1, count: 4096))
            step.update { $0 = .half }
            guard step.wait(until: deadline, { $0 == .on ? true : nil }) == true else { throw QuireError(.system, "nobody went on") }
            try buffer.slice(from: 4096, count: 4096).copyIn([UInt8](repeating: 2, count: 4096))
        }
        func write(at offset: UInt64, from buffer: GuestBuffer) throws(QuireError) {}
        func flush() throws(QuireError) {}
        func discard(at offset: UInt64, count: UInt64) throws(QuireError) {}
        func writeZeroes(at offset: UInt64, count: UInt64, mayUnmap: Bool) throws(QuireError) {}
    }

    /// One request, half of which was written before the exchange: the exchange does not wait for it, and no half is in the wrong log.
    @Test func exchangedInTheMiddleOfARequest() throws {
        let storage = HalfWay()
        let migration = try Migration(storage)
        let pending = migration.disk.submit(Kind.read, output: [Part(address: 0x90000, count: 8192)])
        migration.ring.kick.signal()
        try #require(storage.waitForHalf())
        try migration.exchange()
        #expect(migration.seen.contains(0x90) && migration.seen.isDisjoint(with: [0x91, pending.status / 4096]))
        storage.goOn()
        #expect(try migration.ring.collect(1).first?.head == UInt32(pending.head))
        #expect(migration.disk.status(pending) == 0)
        let later = migration.log.take()
        #expect(later.isSuperset(of: [0x91, pending.status / 4096]) && !later.contains(0x90))
        try migration.end()
    }
}
