import CQuireLayout
import Glibc
import Platform
import Testing

/// The pin gate: closed while anything may pin guest memory that isn't under the agent's eyes, and before it can.
@Suite(.serialized, .enabled(if: Rig.mayUseUserfaultfd)) struct GateTests {
    private func rig(_ options: [String] = []) throws -> Rig {
        let rig = try Rig(options)
        try rig.begin()
        for page in 0..<8 { _ = try rig.tell("fill \(page) 5") }
        return rig
    }

    private func isClosed(_ rig: Rig) throws -> Bool {
        // Whatever the message says: the next window decides.
        try rig.run(.merge, 0, 1, value: 6).reason == .gateClosed
    }

    @Test func nativeAIOWithDirectIO() throws {
        let rig = try rig()
        let fd = try #require(try rig.tell("direct \(rig.folder)/patterns"))
        #expect(fd >= 0)
        // By itself it leaves the gate open: the calls that may pin are over when they return.
        #expect(try !isClosed(rig))
        _ = try rig.tell("io_submit")
        #expect(try isClosed(rig))
        #expect(try rig.connection.gate(becomes: true)?.text.contains("O_DIRECT and uses native AIO") == true)
        #expect(try rig.tell("close \(fd)") == 0)
        #expect(try rig.connection.gate(becomes: false)?.text == "")
        #expect(try !isClosed(rig))
        // And by every way in which such a descriptor comes.
        let plain = try #require(try rig.tell("open \(rig.folder)/patterns"))
        #expect(try !isClosed(rig))
        #expect(try rig.tell("setfl \(plain) 1") == 0)
        // The message may come after the answer that says so too: what it says next is about what comes next.
        #expect(try isClosed(rig) && rig.connection.gate(becomes: true) != nil)
        #expect(try rig.tell("setfl \(plain) 0") == 0)
        #expect(try rig.connection.gate(becomes: false) != nil && !isClosed(rig))
        let direct = try Descriptor.open(rig.folder + "/patterns", O_RDONLY | 0o40000)
        try rig.passDescriptor(direct.raw)
        #expect(try rig.tell("receive") ?? -1 >= 0)
        #expect(try isClosed(rig))
    }

    @Test func uring() throws {
        let rig = try rig()
        _ = try rig.tell("uring_poll")
        let fd = try #require(try rig.tell("direct \(rig.folder)/patterns"))
        #expect(try fd >= 0 && !isClosed(rig))
        _ = try rig.tell("uring_enter")
        #expect(try isClosed(rig))
        #expect(try rig.connection.gate(becomes: true)?.text.contains("io_uring") == true)
    }

    @Test func fixedBuffersCloseItForGood() throws {
        let rig = try rig()
        #expect(try rig.run(.merge, 0, 8, value: 5).done == 8)
        _ = try rig.tell("uring_buffers")
        #expect(try isClosed(rig))
        #expect(try rig.run(.fold, 0, 8).reason == .gateClosed && rig.run(.zero, 100, 8).reason == .gateClosed)
        // What the guest has freed may always go.
        #expect(try rig.run(.reset, 0, 8).done == 8)
        #expect(try rig.connection.gate(becomes: true)?.text.contains("fixed buffers") == true)
        rig.drop()
        try rig.begin(waitForGate: false)
        #expect(try isClosed(rig))
    }

    @Test func openedBeforeTheAttach() throws {
        let rig = try Rig()
        _ = try rig.tell("direct \(rig.folder)/patterns")
        _ = try rig.tell("io_submit")
        try rig.begin(waitForGate: false)
        #expect(try rig.connection.gate(becomes: true) != nil && isClosed(rig))
    }

    /// Guest RAM goes to this test's process, which is the backend; and to one that nobody knows.
    @Test func peers() throws {
        let rig = try rig()
        #expect(try rig.tell("pass") == 1)
        #expect(try !isClosed(rig))
        #expect(try rig.tell("pass_away") == 1)
        #expect(try isClosed(rig))
        #expect(try rig.connection.gate(becomes: true)?.text.contains("vhost-user") == true)
    }

    @Test func devices() throws {
        let rig = try rig()
        // There is no VFIO here; what counts is the name, and that of udmabuf is as bad.
        guard Files.isWritable("/dev/udmabuf") else { return }
        let fd = try #require(try rig.tell("open /dev/udmabuf"))
        #expect(try isClosed(rig) && rig.connection.gate(becomes: true) != nil)
        _ = try rig.tell("close \(fd)")
        #expect(try rig.connection.gate(becomes: false) != nil && !isClosed(rig))
    }
}
