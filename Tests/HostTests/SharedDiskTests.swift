import Engines
import Glibc
import GuestMemory
import Host
import Platform
import StoreProtocol
import TestSupport
import Testing
import VhostBackend

/// A shared disk without quired: whom it would ask for at all. The disk with quired is in PageStoreTests and IntegrationTests.
@Suite struct SharedDiskTests {
    private static let here = SharedDiskMessage.Welcome(pages: 256, id: 0xdead_beef_dead_beef)

    /// `map`: nil for that of a VM of its own.
    private static func disk(
        _ known: String?, map: PageMap? = nil, notice: @escaping @Sendable (String) -> Void = { _ in }
    ) throws -> SharedDisk {
        let device = try BackendProcess.Device(
            parsing: "shared,fd=3,name=scratch,quired=/nowhere,pages=256,id=\(String(here.id, radix: 16))" + (known.map { ",known=\($0)" } ?? ""))
        guard case .shared(let options) = device.kind else { throw QuireError(.invalid, "no shared disk") }
        return try SharedDisk(options, map: map ?? PageMap(PageMap.makeFile(pageCount: 512)), notice: notice)
    }

    private static func memory() throws -> GuestMemory {
        let region = try MemoryRegion(
            guestAddress: 0, byteCount: 8192, userAddress: 0x7f00_0000_0000, fileOffset: 0,
            descriptor: Memfd(name: "shared-test-ram", byteCount: 8192).takeDescriptor(), owner: .us)
        return try GuestMemory([region], log: DirtyTracker())
    }

    /// A process whose command line is that of a QEMU with such a disk.
    private static func withQEMU(_ arguments: [String], _ body: (Int32) throws -> Void) throws {
        var pipe = try Pipe()
        let input = pipe.takeReader()
        var options = ChildProcess.Options()
        options.passing = [.init(from: input.raw, to: 0)]
        options.parentDeathSignal = SIGKILL
        var qemu = try ChildProcess(
            ["sh", "-c", "read line; true", "qemu-system-x86_64", "-device", "vhost-user-blk-pci,chardev=c"] + arguments, options)
        // The kernel shows its command line a moment after it has begun.
        #expect(eventually { ((try? Files.read("/proc/\(qemu.pid)/cmdline")) ?? "").contains(arguments.last ?? "chardev=c") })
        try body(qemu.pid)
        pipe.closeWriter()
        qemu.wait()
    }

    /// Whether requests go to quired, which is away here, so that they wait; every other one is an error.
    private static func isServed(_ disk: SharedDisk, _ memory: GuestMemory) throws -> Bool {
        let buffer = try memory.buffer(0, count: 4096)
        let requests: [() throws -> Void] = [
            { try disk.read(at: 0, into: buffer) }, { try disk.write(at: 0, from: buffer) }, { try disk.discard(at: 0, count: 4096) },
        ]
        var waits: [Bool] = []
        for request in requests {
            do {
                try request()
                Issue.record("answered without quired")
            } catch {
                let code = (error as? QuireError)?.code
                #expect(code == .retry || code == .busy, "\(error)")
                waits.append(code == .retry)
            }
        }
        #expect(Set(waits).count == 1)
        return waits.first == true
    }

    private static let foreign = "may know the shared disk 'scratch' with another content"

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
        let memory = try Self.memory()
        try Self.withQEMU(arguments) { qemu in
            disk.deviceStarted(DeviceStart(memory: memory, rings: [], nonce: 1, origin: origin, frontEnd: qemu))
            let isNow = try Self.isServed(disk, memory)
            #expect(isNow == isServed)
        }
        #expect(said.read { $0 }.contains { $0.contains(Self.foreign) } == !isServed)
    }

    /// A guest that came from elsewhere while QEMU ran stays one until its VM ends: when it sleeps or begins anew, for the backend after
    /// this one, and for every disk that lacks the word. The disks that it knows are served all the while.
    @Test func staysForeignUntilTheVMEnds() throws {
        let memory = try Self.memory()
        let file = try PageMap.makeFile(pageCount: 512)
        let map = try PageMap(file.duplicate())
        try Self.withQEMU([]) { qemu in
            func start(_ disk: SharedDisk, _ origin: DeviceStart.Origin) throws -> Bool {
                disk.deviceStarted(DeviceStart(memory: memory, rings: [], nonce: 1, origin: origin, frontEnd: qemu))
                let isServed = try Self.isServed(disk, memory)
                disk.deviceStopping()
                return isServed
            }
            let disk = try Self.disk(nil, map: map)
            #expect(try start(disk, .here))
            #expect(try !start(disk, .elsewhere))
            #expect(try !start(disk, .here))
            // Nor is it forgotten when merging begins again.
            map.isUnmerged = true
            map.isUnmerged = false

            // This backend dies.
            let said = Monitor<[String]>([])
            let next = try PageMap(file.duplicate())
            next.takeOver(pid: 4711)
            let later = try Self.disk(nil, map: next) { line in said.update { $0.append(line) } }
            #expect(try !start(later, .here))
            #expect(said.read { $0 }.contains { $0.contains(Self.foreign) })
            #expect(try !start(later, .unknown))
            let accepted = try Self.disk("any", map: next), known = try Self.disk("deadbeefdeadbeef", map: next)
            #expect(try start(accepted, .elsewhere))
            #expect(try start(known, .here))

            // Another VM: the disk that it knows is the one that shows where it is from.
            let other = try PageMap(PageMap.makeFile(pageCount: 512))
            let first = try Self.disk("any", map: other), second = try Self.disk(nil, map: other)
            #expect(try start(second, .here))
            #expect(try start(first, .elsewhere))
            #expect(try !Self.isServed(second, memory))

            // The control: without the flag a guest that has slept would get a disk that it may know with another content.
            let raw = try Mapping(file, byteCount: 4096)
            raw.store32(72, 0)
            #expect(try start(later, .here))
        }
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
