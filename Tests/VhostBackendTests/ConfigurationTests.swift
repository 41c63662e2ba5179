import GuestMemory
import Glibc
import Logging
import Platform
import Testing
import VhostBackend

/// A device whose configuration changes when the driver writes to it.
private final class ChangingDevice: VhostUserDevice {
    let features: VirtioFeatures = []
    let queueCount = 1
    let configuration: [UInt8] = [1, 2, 3, 4]
    /// Set and used on the session's thread.
    nonisolated(unsafe) weak var session: Session?

    func writeConfiguration(offset: Int, _ bytes: [UInt8]) throws(QuireError) {
        try unsafe session?.announceConfigurationChange()
    }
    func process(_ chain: DescriptorChain, queue: Int, features: VirtioFeatures) throws(QuireError) -> UInt32 { 0 }
}

/// What BACKEND_REQ is for: the back end speaks first, on a channel of its own.
@Suite struct ConfigurationTests {
    @Test func changesAreAnnounced() throws {
        let path = "/tmp/quire-unit-\(getpid())-\(UInt32.random(in: 0 ... .max)).sock"
        let listener = try UnixSocket.listen(at: path)
        defer { Files.remove(path) }
        func pair() throws -> (near: Int32, far: Int32) {
            let near = try UnixSocket.connect(to: path), far = try listener.accept()
            return (dup(near.descriptor.raw), dup(far.descriptor.raw))
        }
        let device = ChangingDevice()
        let (near, far) = try pair()
        let thread = try JoinableThread("test-session") {
            guard let session = try? Session(
                socket: UnixSocket(adopting: Descriptor(owning: far)), device: device, logger: TestServer.quiet)
            else { return }
            unsafe device.session = session
            session.run()
        }
        defer { thread.join() }
        let frontEnd = FrontEnd(UnixSocket(adopting: Descriptor(owning: near)), of: device)
        defer { frontEnd.disconnect() }
        try frontEnd.handshake()
        let write = le(UInt32(0)) + le(UInt32(4)) + le(UInt32(0)) + [9, 9, 9, 9]

        // Without a channel there is nobody to tell, which is no error.
        try frontEnd.tell(FrontEnd.Request.setConfig, write)
        let (ours, theirs) = try pair()
        let channel = Descriptor(owning: ours)
        do {
            let passed = Descriptor(owning: theirs)
            try frontEnd.tell(FrontEnd.Request.setBackendChannel, [], passing: [passed.raw])
        }
        #expect(waitReadable([channel.raw], timeoutMilliseconds: 0).isEmpty)
        try frontEnd.tell(FrontEnd.Request.setConfig, write)
        // VHOST_USER_BACKEND_CONFIG_CHANGE_MSG, version 1, no payload.
        #expect(!waitReadable([channel.raw], timeoutMilliseconds: 20_000).isEmpty)
        var bytes = [UInt8](repeating: 0, count: 64)
        let count = unsafe read(channel.raw, &bytes, bytes.count)
        #expect(Array(bytes.prefix(max(0, count))) == le(UInt32(2)) + le(UInt32(1)) + le(UInt32(0)))
    }
}
