import FoundationEssentials
import Glibc
import Host
import Platform
import TestSupport
import Testing

/// quire-backend as a program that somebody starts by hand: what it takes, and how it says no.
@Suite struct BackendProgramTests {
    /// What the program writes to a descriptor of its own, and how it ends.
    private func run(_ arguments: [String], writingTo number: Int32) throws -> (text: String, end: ProcessEnd) {
        var pipe = try Pipe()
        let writer = pipe.takeWriter(), reader = pipe.takeReader()
        var options = ChildProcess.Options()
        options.passing = [.init(from: writer.raw, to: number)]
        var child = try ChildProcess([products + "quire-backend"] + arguments, options)
        _ = consume writer
        let text = String(decoding: try reader.readAll(limit: 1 << 16), as: UTF8.self)
        return (text, child.wait())
    }

    /// GET_FEATURES, with which QEMU begins: its number, the protocol's version, no payload. The answer is 8 bytes of features; of
    /// those a vhost-user back end has bit 30, that it speaks of protocol features.
    private func expectFeatures(_ frontEnd: borrowing UnixSocket) throws {
        try frontEnd.send([1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0])
        let isAnswered = !waitReadable([frontEnd.descriptor.raw], timeoutMilliseconds: 20_000).isEmpty
        #expect(isAnswered)
        var passed = UnixSocket.PassedDescriptors()
        let answer = try isAnswered ? frontEnd.receive(count: 20, maxDescriptors: 1, into: &passed) ?? [] : []
        #expect(answer.prefix(12) == [1, 0, 0, 0, 5, 0, 0, 0, 8, 0, 0, 0])
        #expect(answer.count == 20 && answer[15] & 0x40 != 0)
    }

    /// A socket that is connected already is the only front end there will be: it is answered, and the program ends when it has gone.
    @Test func servesAConnectedSocketToItsEnd() throws {
        var ends: [Int32] = [-1, -1]
        let isMade = unsafe socketpair(AF_UNIX, Int32(SOCK_STREAM.rawValue), 0, &ends) == 0
        try #require(isMade)
        let near = UnixSocket(adopting: Descriptor(owning: ends[0])), far = Descriptor(owning: ends[1])
        var options = ChildProcess.Options()
        options.passing = [.init(from: far.raw, to: 3)]
        options.parentDeathSignal = SIGKILL
        var child = try ChildProcess([products + "quire-backend", "--fd", "3"], options)
        _ = consume far

        try expectFeatures(near)

        near.shutDown()
        let hasEnded = eventually(milliseconds: 20_000) { child.poll() != nil }
        #expect(hasEnded)
        child.signal(SIGKILL)
        #expect(child.wait() == .exited(0))
    }

    /// SIGTERM ends one that listens, whether or not a front end is connected; once is enough.
    @Test(arguments: [true, false]) func endsOnSIGTERM(isConnected: Bool) throws {
        let folder = try TemporaryFolder()
        let path = folder.path + "/control.sock"
        var options = ChildProcess.Options()
        options.parentDeathSignal = SIGKILL
        var child = try ChildProcess([products + "quire-backend", "--socket-path", path], options)
        let isListening = eventually(milliseconds: 20_000) { message { try UnixSocket.connect(to: path) } == nil }
        #expect(isListening)
        if isListening {
            // Its answer says that it has come as far as waiting for signals.
            let frontEnd = try UnixSocket.connect(to: path)
            try expectFeatures(frontEnd)
            if !isConnected { frontEnd.shutDown() }
            child.signal(SIGTERM)
            let hasEnded = eventually(milliseconds: 20_000) { child.poll() != nil }
            #expect(hasEnded)
            frontEnd.shutDown()
        }
        child.signal(SIGKILL)
        #expect(child.wait() == .exited(0))
    }

    /// What whoever looks for back ends reads, as QEMU's docs/interop/vhost-user.json has it: the type that the file beside
    /// it (qemu-config/50-quire.json) names, and features of that type.
    @Test func printsItsCapabilities() throws {
        struct Capabilities: Decodable {
            var type: String
            var features: [String]
        }
        let (text, end) = try run(["--print-capabilities"], writingTo: 1)
        #expect(end == .exited(0))
        let found = try JSONDecoder().decode(Capabilities.self, from: Data(text.utf8))
        #expect(found.type == "block" && found.features == ["read-only", "blk-file"])
    }

    /// One line on stderr, and a status that is not 0: what QEMU's conventions ask of a back end that cannot start.
    @Test func saysNoInOneLine() throws {
        let folder = try TemporaryFolder()
        func refuses(_ arguments: [String], _ expected: String) throws {
            let (text, end) = try run(arguments, writingTo: 2)
            #expect(end == .exited(1), "\(arguments)")
            #expect(text == "quire-backend: \(expected)\n")
        }
        let path = folder.path + "/none/control.sock"
        try refuses(["--socket-path", path], "cannot listen on \(path): its directory does not exist, create it first")
        try refuses(["--fd", "77"], "descriptor 77: no such descriptor was passed")
        try refuses(["--fd", "3", "--socket-path", path], "--socket-path and --fd exclude each other: give one")
        try refuses([], "no device: give --socket-path PATH, --fd N or --device control,socket=PATH")
        try refuses(
            ["--fd", "3", "--agent-socket", path],
            "--agent-socket needs --page-map-fd N, a page map that outlives this process: quire run has one")
    }
}
