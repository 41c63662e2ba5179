import Glibc
import Platform
import TestSupport
import Testing
import VhostBackend

private typealias Request = FrontEnd.Request

private func setDescriptorLimit(_ limit: rlim_t) {
    var limits = rlimit(rlim_cur: limit, rlim_max: 1024)
    _ = unsafe setrlimit(__rlimit_resource_t(RLIMIT_NOFILE.rawValue), &limits)
}

/// The life of a server between its front ends.
@Suite struct ServerTests {
    /// No descriptors left: the front end that knocks meanwhile waits, and is served when there are some again. In a
    /// process of its own, because the limit is the process's.
    @Test func outlivesALackOfDescriptors() async {
        await #expect(processExitsWith: .success) {
            let complaints = Complaints()
            let server = try TestServer(MemoryStorage(), logger: complaints.logger)
            let first = try server.connect(), second = try server.connect()
            try first.handshake()
            // Open are at least 0, 1 and 2: no other number is allowed.
            setDescriptorLimit(3)
            first.disconnect()
            guard eventually({ !complaints.all.isEmpty }) else { exit(1) }
            ProcessCalls.sleep(milliseconds: 500)
            guard complaints.all == ["cannot accept a connection: Too many open files: trying again"] else { exit(2) }
            setDescriptorLimit(1024)
            try second.handshake()
            second.disconnect()
            guard try server.servesHonestly(), complaints.all.count == 1 else { exit(3) }
        }
    }

    /// A socket that was shut down ends the server; that is no complaint.
    @Test func endsWithItsSocket() throws {
        let complaints = Complaints()
        let path = "/tmp/quire-unit-\(getpid())-end.sock"
        defer { Files.remove(path) }
        let socket = try UnixSocket.listen(at: path)
        let descriptor = try socket.descriptor.duplicate()
        let device = VirtioBlock(storage: MemoryStorage(), logger: complaints.logger)
        let server = try Server(socket: socket, device: device, logger: complaints.logger)
        let thread = try JoinableThread("test-server") { server.run() }
        shutdown(descriptor.raw, Int32(SHUT_RDWR))
        thread.join()
        #expect(complaints.all.isEmpty)
    }

    /// Half a message is nothing that a front end waits for: the server must not look stuck.
    @Test func halfAMessageIsNotBeingHandled() throws {
        let server = try TestServer(MemoryStorage())
        let frontEnd = try server.connect()
        try frontEnd.handshake()
        // An answer is sent before its handling ends.
        #expect(eventually { server.server.handlingNanoseconds == 0 })
        try frontEnd.sendRaw(Array(frontEnd.message(Request.setStatus, le(UInt64(1))).dropLast(3)))
        #expect(!eventually(milliseconds: 100) { server.server.handlingNanoseconds > 50_000_000 })
        try frontEnd.sendRaw([0, 0, 0])
        #expect(try frontEnd.askNumber(Request.getStatus) == 1)
    }
}
