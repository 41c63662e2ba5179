import CQuireLayout
import Engines
import Glibc
import Host
import Platform
import Testing

/// libquire-agent.so, as it is shipped, in a real QEMU: that it starts there and nowhere else, finds guest RAM, and
/// sees the calls of QEMU through the symbols that QEMU is linked to. No guest runs; what one would see is the
/// stand-in's matter.
@Suite(.serialized, .needsMerging) struct QEMUTests {
    private static let agent: String = {
        var path = Substring(#filePath)
        for _ in 0..<3 { path = path[..<(path.lastIndex(of: "/") ?? path.startIndex)] }
        return path + "/build/agent/libquire-agent.so"
    }()

    private final class Machine {
        static let pages: UInt64 = 16384
        let folder: String
        let ram: Descriptor
        let mapFile: Descriptor
        let map: PageMap
        let connection: Connection
        private let monitor: Descriptor
        private var child: ChildProcess

        init(disk options: String) throws {
            ProcessCalls.ignoreBrokenPipes()
            folder = "/var/tmp/quire-agent-\(UInt32.random(in: 0 ... .max))"
            try Files.makeDirectory(folder, mode: 0o755)
            let disk = try Descriptor.open(folder + "/disk", O_RDWR | O_CREAT)
            try disk.truncate(to: 1 << 20)
            ram = try Memfd(name: "ram", byteCount: Self.pages * 4096).takeDescriptor()
            mapFile = try PageMap.makeFile(pageCount: Self.pages)
            map = try PageMap(mapFile.duplicate())
            let listener = try UnixSocket.listen(at: folder + "/agent", kind: .messages)
            var pipe = try Pipe()
            let input = pipe.takeReader()
            monitor = pipe.takeWriter()
            let nothing = try Descriptor.open("/dev/null", O_WRONLY)
            var passing = ChildProcess.Options()
            passing.parentDeathSignal = SIGKILL
            passing.passing = [
                .init(from: input.raw, to: 0), .init(from: nothing.raw, to: 1), .init(from: ram.raw, to: 3),
            ]
            child = try ChildProcess(
                [
                    "env", "LD_PRELOAD=\(QEMUTests.agent)", "QUIRE_AGENT_SOCKET=\(folder)/agent", "qemu-system-x86_64", "-S",
                    "-machine", "q35,memory-backend=ram", "-m", "64M", "-nodefaults", "-display", "none", "-monitor", "stdio",
                    "-object", "memory-backend-file,id=ram,size=64M,mem-path=/proc/self/fd/3,share=on",
                    "-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
                    "-drive", "file=\(folder)/disk,format=raw,if=virtio,\(options)",
                ], passing)
            connection = try Connection(listener)
        }

        deinit {
            child.signal(SIGKILL)
            child.wait()
            for name in Files.list(folder) ?? [] { Files.remove(folder + "/" + name) }
            Files.removeDirectory(folder)
        }

        /// QEMU maps its RAM after the agent has connected.
        func attach() throws -> Ready {
            for _ in 0..<3000 {
                let ready = try connection.attach(
                    regions: [Region(gfn: 0, pages: Self.pages)], map: mapFile.raw, files: [ram.raw], stores: [])
                if ready.status != QUIRE_AGENT_NOT_MAPPED.rawValue { return ready }
                ProcessCalls.sleep(milliseconds: 20)
            }
            throw QuireError(.invalid, "QEMU doesn't map its RAM")
        }

        func readDisk() throws { try monitor.writeAll("qemu-io virtio0 \"read 0 4k\"\n") }
    }

    @Test(arguments: [
        ("cache=none,aio=native", "native AIO"), ("cache=none,aio=io_uring", "io_uring"), ("cache=none,aio=threads", nil),
        ("cache=writeback,aio=io_uring", nil),
    ] as [(String, String?)])
    func mergesUnlessDiskPins(_ options: String, _ reason: String?) throws {
        let machine = try Machine(disk: options)
        let ready = try machine.attach()
        #expect(ready.status == QUIRE_AGENT_OK.rawValue && ready.addresses.count == 1, "\(ready.text)")
        let whole = [Run(gfn: 4096, pages: 8192)]
        #expect(try machine.connection.run(.zero, whole)[0].reason == .done)
        #expect(machine.map.state(of: 4096) == .zero && machine.map.state(of: 12287) == .zero)
        #expect(try machine.connection.run(.fold, [Run(gfn: 5000, pages: 100)])[0].reason == .done)
        #expect(try machine.connection.run(.reset, whole)[0].reason == .done)
        try machine.readDisk()
        if let reason {
            #expect(try machine.connection.gate(becomes: true)?.text.contains("O_DIRECT and uses \(reason)") == true)
            #expect(try machine.connection.run(.zero, whole)[0].reason == .gateClosed)
        } else {
            ProcessCalls.sleep(milliseconds: 200)
            #expect(try machine.connection.run(.zero, whole)[0].reason == .done)
        }
    }

    @Test func elsewhereItDoesNothing() throws {
        let folder = "/var/tmp/quire-agent-\(UInt32.random(in: 0 ... .max))"
        try Files.makeDirectory(folder, mode: 0o755)
        defer {
            Files.remove(folder + "/agent")
            Files.removeDirectory(folder)
        }
        let listener = try UnixSocket.listen(at: folder + "/agent", kind: .messages)
        let output = try ChildProcess.output(of: [
            "env", "LD_PRELOAD=\(Self.agent)", "QUIRE_AGENT_SOCKET=\(folder)/agent",
            "sh", "-c", "echo fine; ls / | sort | head -1",
        ])
        #expect(output == "fine\nbin\n")
        #expect(waitReadable([listener.descriptor.raw], timeoutMilliseconds: 100).isEmpty)
    }
}
