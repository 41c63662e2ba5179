import Glibc
import GuestMemory
import Host
import Platform
import StoreProtocol
import Testing
import VhostBackend

/// A shared disk without quired: whom it would ask for at all. The disk with quired is in PageStoreTests and IntegrationTests.
@Suite struct SharedDiskTests {
    private static let here = SharedDiskMessage.Welcome(pages: 256, id: 0xdead_beef_dead_beef)

    private static func disk(_ known: String?, notice: @escaping @Sendable (String) -> Void = { _ in }) throws -> SharedDisk {
        let device = try BackendProcess.Device(
            parsing: "shared,fd=3,name=scratch,quired=/nowhere,pages=256,id=\(String(here.id, radix: 16))" + (known.map { ",known=\($0)" } ?? ""))
        guard case .shared(let options) = device.kind else { throw QuireError(.invalid, "no shared disk") }
        return try SharedDisk(options, notice: notice)
    }

    /// A guest that comes from elsewhere, as QEMU's command line says or the rings do, reads, writes and discards nothing on a disk that
    /// may not be the one it knows. Every other guest's requests go to quired, which is away here: they wait.
    @Test(arguments: [
        ([], .unknown, nil, true), (["-incoming", "defer"], .unknown, nil, false), (["-loadvm", "one"], .here, nil, false),
        (["-incoming", "defer"], .elsewhere, "any", true), (["-incoming", "defer"], .unknown, "deadbeefdeadbeef", true),
        (["-incoming", "defer"], .unknown, "deadbeefdeadbeee", false), ([], .here, "1", true), ([], .elsewhere, nil, false),
        ([], .elsewhere, "1", false), ([], .elsewhere, "deadbeefdeadbeef", true),
    ] as [([String], DeviceStart.Origin, String?, Bool)])
    func isTheOneThatTheGuestKnows(_ arguments: [String], _ origin: DeviceStart.Origin, _ known: String?, _ isServed: Bool) throws {
        let said = Monitor<[String]>([])
        let disk = try Self.disk(known) { line in said.update { $0.append(line) } }
        let region = try MemoryRegion(
            guestAddress: 0, byteCount: 8192, userAddress: 0x7f00_0000_0000, fileOffset: 0,
            descriptor: Memfd(name: "shared-test-ram", byteCount: 8192).takeDescriptor(), owner: .us)
        let memory = try GuestMemory([region], log: DirtyTracker())
        var pipe = try Pipe()
        let input = pipe.takeReader()
        var options = ChildProcess.Options()
        options.passing = [.init(from: input.raw, to: 0)]
        options.parentDeathSignal = SIGKILL
        var qemu = try ChildProcess(
            ["sh", "-c", "read line; true", "qemu-system-x86_64", "-device", "vhost-user-blk-pci,chardev=c"] + arguments, options)
        disk.deviceStarted(DeviceStart(memory: memory, rings: [], nonce: 1, origin: origin, frontEnd: qemu.pid))
        let buffer = try memory.buffer(0, count: 4096)
        let requests: [() throws -> Void] = [
            { try disk.read(at: 0, into: buffer) }, { try disk.write(at: 0, from: buffer) }, { try disk.discard(at: 0, count: 4096) },
        ]
        for request in requests {
            do {
                try request()
                Issue.record("answered without quired")
            } catch { #expect((error as? QuireError)?.code == (isServed ? .retry : .busy), "\(error)") }
        }
        pipe.closeWriter()
        qemu.wait()
        #expect(said.read { $0 }.contains { $0.contains("may know the shared disk 'scratch' with another content") } == !isServed)
    }

    @Test func whatIsKnownIsCheckedOnce() throws {
        #expect(message { try Self.disk("nonsense") } == "--device: known=nonsense: give the id of a content, or any")
        for text in ["any", "1", "ffffffffffffffff"] { #expect(SharedDisk.Known(text)?.description == text) }
        var settings = BackendService.Settings(owner: "x")
        settings.sharedDisks = [.init(name: "scratch", content: .max - 1)]
        let path = "/tmp/quire-settings-\(ProcessCalls.ownPID)"
        defer { Files.remove(path) }
        try settings.write(to: path)
        #expect(try BackendService.Settings.read(path) == settings)
    }
}
