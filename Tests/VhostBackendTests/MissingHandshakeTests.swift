import Platform
import TestSupport
import Testing
import VhostBackend

private typealias Request = FrontEnd.Request

/// QEMU 7.2 to 9.0 after its back end died while the device was stopped: it connects again, says nothing, and goes
/// straight on with SET_FEATURES when the guest starts the device, with all that it had agreed on with the dead back end.
@Suite struct MissingHandshakeTests {
    @Test func isTakenAsAgreed() throws {
        let lifecycle = RecordingLifecycle()
        let complaints = Complaints()
        let server = try TestServer(MemoryStorage(), lifecycle: lifecycle, logger: complaints.logger)
        let ram = try GuestRAM()
        let ring = try DriverRing(ram)
        let disk = DriverDisk(ring)
        var frontEnd = try server.connect()
        try frontEnd.handshake(.qemu7)
        let inflight = try frontEnd.getInflight()
        try frontEnd.start(ram, [ring], inflight: inflight)
        #expect(try disk.proveService())
        try frontEnd.stop([ring])
        let agreed = frontEnd
        frontEnd.disconnect()

        frontEnd = try server.connect()
        frontEnd.goOn(as: agreed)
        // Every message waits for its answer.
        try frontEnd.start(ram, [ring], bases: [2], inflight: inflight)
        #expect(try disk.proveService(seed: 2))
        #expect(try frontEnd.askNumber(Request.getQueueCount) == 1)
        #expect(try frontEnd.stop([ring]) == [4])
        // The same guest, and the device knows that nobody would notice if we died now; it stays that way.
        ring.reset()
        try frontEnd.start(ram, [ring], memory: false, inflight: inflight)
        #expect(lifecycle.starts.map(\.isUnnoticed) == [false, true, true])
        #expect(Set(lifecycle.nonces).count == 1)
        #expect(complaints.all.count == 1 && complaints.all[0].contains("without a handshake"))
        frontEnd.disconnect()

        // The next one that begins at the beginning is a front end as any other.
        frontEnd = try server.connect()
        try frontEnd.handshake(.qemu7)
        ring.reset()
        try frontEnd.start(ram, [ring])
        #expect(lifecycle.starts.last?.isUnnoticed == false)
    }

    /// A front end that says nothing is told from one that has.
    @Test func silenceIsNoticed() throws {
        let server = try TestServer(MemoryStorage())
        #expect(!server.server.isSilent)
        let frontEnd = try server.connect()
        #expect(eventually { server.server.isSilent })
        try frontEnd.handshake(.qemu7)
        #expect(!server.server.isSilent)
        frontEnd.disconnect()
        #expect(eventually { !server.server.isConnected } && !server.server.isSilent)
    }

    /// A refusal is heard as well: nothing that was not offered is taken as agreed.
    @Test func refusalsAreAnswered() throws {
        let server = try TestServer(MemoryStorage())
        var frontEnd = try server.connect()
        try frontEnd.handshake(.qemu7)
        let agreed = frontEnd
        frontEnd = try server.connect()
        agreed.disconnect()
        frontEnd.goOn(as: agreed)
        #expect(try frontEnd.acknowledged(Request.setFeatures, le(UInt64(1) << 63)) == 1)
        #expect(try frontEnd.acknowledged(Request.setFeatures, le(frontEnd.defaultFeatures)) == 0)
    }

    /// Control: any other first message begins a new connection, in which nobody has asked for answers yet.
    @Test func otherFirstMessagesAgreeOnNothing() throws {
        let lifecycle = RecordingLifecycle()
        let server = try TestServer(MemoryStorage(), lifecycle: lifecycle)
        let frontEnd = try server.connect()
        try frontEnd.post(Request.setOwner, flags: FrontEnd.version | FrontEnd.needReply)
        let features = try frontEnd.askNumber(Request.getFeatures) & ~FrontEnd.logAll & ~FrontEnd.eventIndex
        try frontEnd.post(Request.setFeatures, le(features), flags: FrontEnd.version | FrontEnd.needReply)
        // Nothing came in between.
        #expect(try frontEnd.askNumber(Request.getQueueCount) == 1)
        let ram = try GuestRAM()
        let ring = try DriverRing(ram)
        try frontEnd.start(ram, [ring], features: features)
        #expect(try DriverDisk(ring).proveService())
        #expect(lifecycle.starts.map(\.isUnnoticed) == [false])
    }
}
