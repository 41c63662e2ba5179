import GuestMemory
import Platform
import Synchronization
import TestSupport
import Testing
import VhostBackend

private typealias Request = FrontEnd.Request
private typealias Kind = DriverDisk.Kind

/// A device whose requests take their time, and which notes who is inside what.
private final class SlowDevice: VhostUserDevice {
    let features: VirtioFeatures = []
    let queueCount = 2
    let configuration = [UInt8](repeating: 0, count: 60)
    let recorder: RecordingLifecycle
    var lifecycle: (any DeviceLifecycle)? { recorder }

    /// Control: the device answers a request and goes on working on it, on a thread that nobody joins.
    private let worksOnAfterwards: Bool
    private let milliseconds: UInt32
    let inside = Atomic<Int>(0)
    let entered = Atomic<Int>(0)
    /// Requests that met a device that did not run.
    let early = Atomic<Int>(0)

    init(milliseconds: UInt32, worksOnAfterwards: Bool = false, recorder: RecordingLifecycle) {
        self.milliseconds = milliseconds
        self.worksOnAfterwards = worksOnAfterwards
        self.recorder = recorder
    }

    func process(_ chain: DescriptorChain, queue: Int, features: VirtioFeatures) throws(QuireError) -> UInt32 {
        if !recorder.isDeviceRunning { early.add(1, ordering: .relaxed) }
        inside.add(1, ordering: .acquiringAndReleasing)
        entered.add(1, ordering: .acquiringAndReleasing)
        if worksOnAfterwards {
            _ = try JoinableThread("careless") { [self] in
                ProcessCalls.sleep(milliseconds: milliseconds)
                inside.subtract(1, ordering: .acquiringAndReleasing)
            }
        } else {
            ProcessCalls.sleep(milliseconds: milliseconds)
            inside.subtract(1, ordering: .acquiringAndReleasing)
        }
        return 0
    }
}

/// QEMU lets the guest go on after the answer to GET_VRING_BASE. So when it arrives nobody may be inside the device.
@Suite struct JoinedBeforeAnsweredTests {
    /// What stops a device, as seen by the front end: its answer has arrived.
    enum Stop: CaseIterable, Sendable { case getVringBase, disable, resetDevice, statusZero, getInflight, memoryTable }

    /// Stops the device in the middle of a request; false if the answer came while something still ran.
    private func isQuietWhenAnswered(_ device: SlowDevice, by stop: Stop) throws -> Bool {
        let server = try TestServer(device)
        let ram = try GuestRAM()
        let rings = try (0..<2).map { try DriverRing(ram, queue: $0) }
        let frontEnd = try server.connect()
        try frontEnd.handshake(queues: 2)
        try frontEnd.start(ram, rings)
        for ring in rings {
            for _ in 0..<3 { DriverDisk(ring).submit(Kind.flush) }
            ring.kick.signal()
        }
        let enough = eventually { device.entered.load(ordering: .acquiring) >= 2 }
        guard enough else { return false }
        let queue = le(UInt32(0)) + le(UInt32(0))
        switch stop {
        case .getVringBase:
            for ring in rings.reversed() { _ = try frontEnd.vringBase(ring.queue) }
        case .disable:
            try frontEnd.tell(Request.setVringEnable, queue)
            try frontEnd.tell(Request.setVringEnable, le(UInt32(1)) + le(UInt32(0)))
        case .resetDevice: try frontEnd.tell(Request.resetDevice)
        case .statusZero: try frontEnd.tell(Request.setStatus, le(UInt64(0)))
        case .getInflight: _ = try frontEnd.getInflight(queues: 2)
        case .memoryTable:
            // The rings rest: their memory is gone.
            try frontEnd.tell(Request.removeRegion, ram.regions[0].single)
        }
        let inside = device.inside.load(ordering: .acquiring)
        let entered = device.entered.load(ordering: .acquiring)
        let running = device.recorder.isDeviceRunning
        // Nothing begins later, either.
        ProcessCalls.sleep(milliseconds: 60)
        return inside == 0 && !running && device.entered.load(ordering: .acquiring) == entered
    }

    @Test(arguments: Stop.allCases) func nothingRunsAfterTheAnswer(_ stop: Stop) throws {
        let recorder = RecordingLifecycle(stopMilliseconds: 40)
        let device = SlowDevice(milliseconds: 30, recorder: recorder)
        #expect(try isQuietWhenAnswered(device, by: stop))
        #expect(device.early.load(ordering: .relaxed) == 0)
    }

    /// Control of the test above: a device that is deliberately wrong, because it works on after it has answered. The
    /// same check must find it.
    @Test func carelessDeviceIsFound() throws {
        let recorder = RecordingLifecycle()
        let device = SlowDevice(milliseconds: 300, worksOnAfterwards: true, recorder: recorder)
        #expect(try !isQuietWhenAnswered(device, by: .getVringBase))
        #expect(eventually { device.inside.load(ordering: .acquiring) == 0 })
    }

    /// A request that waits in the ring when the device starts finds a device that runs, however long its start takes,
    /// and also when a second ring makes it start again.
    @Test func deviceStartsBeforeItsRings() throws {
        let recorder = RecordingLifecycle(startMilliseconds: 40)
        let device = SlowDevice(milliseconds: 1, recorder: recorder)
        let server = try TestServer(device)
        let ram = try GuestRAM()
        let rings = try (0..<2).map { try DriverRing(ram, queue: $0) }
        let frontEnd = try server.connect()
        try frontEnd.handshake(queues: 2)
        for ring in rings { for _ in 0..<8 { DriverDisk(ring).submit(Kind.flush) } }
        try frontEnd.start(ram, rings)
        for ring in rings { #expect(try ring.collect(8).count == 8) }
        #expect(device.early.load(ordering: .relaxed) == 0)
        try frontEnd.stop(rings)
        #expect(recorder.events.count >= 3 && recorder.events.last == .stopping)
    }
}
