import GuestMemory
import Platform
import TestSupport
import Testing
import VhostBackend

/// The example of docs/vhost-backend.md: a whole device, virtio-rng, in a dozen lines.
final class EntropyDevice: VhostUserDevice {
    let features: VirtioFeatures = []
    let queueCount = 1
    let configuration: [UInt8] = []

    func process(_ chain: DescriptorChain, queue: Int, features: VirtioFeatures) throws(QuireError) -> UInt32 {
        guard chain.readable.count == 0 else { throw QuireError(.guest, "an entropy request has nothing to say") }
        let count = min(chain.writable.count, 4096)
        try chain.writable.slice(from: 0, count: count).copyIn((0..<count).map { _ in UInt8.random(in: 0...255) })
        return UInt32(count)
    }
}

/// The library serves other devices than disks.
@Suite struct EntropyDeviceTests {
    @Test func servesADeviceOfSomebodyElse() throws {
        let server = try TestServer(EntropyDevice())
        let ram = try GuestRAM()
        let ring = try DriverRing(ram)
        let frontEnd = try server.connect()
        try frontEnd.handshake()
        try frontEnd.start(ram, [ring])
        let address = DriverDisk.buffer
        ram.write(address, [UInt8](repeating: 0, count: 64))
        ring.offer(ring.chain([.init(address: address, count: 64, isWritable: true)]))
        ring.kick.signal()
        let used = try ring.collect(1)
        #expect(used[0].written == 64)
        #expect(Set(ram.read(address, 64)).count > 8)
        // A request that the device calls broken stops the ring, and nothing else.
        ring.offer(ring.chain([.init(address: address, count: 64, isWritable: false)]))
        ring.kick.signal()
        #expect(eventually { ring.isBroken() })
        _ = try frontEnd.stop([ring])
        frontEnd.disconnect()
        #expect(try server.connect().askNumber(FrontEnd.Request.getQueueCount) == 1)
    }
}
