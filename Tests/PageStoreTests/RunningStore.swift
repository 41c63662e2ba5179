import CPlatform
import Glibc
import Host
import PageContent
import Platform
import StoreProtocol
import TestSupport

/// quired, started by a test in a folder of its own; gone with the value.
final class RunningStore {
    let folder: String
    private var process: ChildProcess
    private let arguments: [String]

    static let program = products + "quired"

    /// `limit`: nil: what the configuration says, of candidates and workers, too. `config`: nothing is configured unless a test names a file.
    init(
        _ more: [String] = ["--keep"], limit: String? = "256M", config: String = "/dev/null", program: String = RunningStore.program
    ) throws {
        folder = "/tmp/quired-test-\(ProcessCalls.ownPID)-\(UInt32.random(in: 0 ... .max))"
        arguments = [program, "--directory", folder, "--config", config, "--log-level", "error"]
            + (limit.map { ["--limit", $0, "--candidates", "1M", "--workers", "3"] } ?? []) + more
        process = try Self.start(arguments)
        guard waitUntilItServes() else { throw QuireError(.closed, "quired does not serve") }
    }

    private static func start(_ arguments: [String]) throws(QuireError) -> ChildProcess {
        var options = ChildProcess.Options()
        options.parentDeathSignal = SIGTERM
        return try ChildProcess(arguments, options)
    }

    var path: String { folder + "/store.sock" }
    func waitUntilItServes() -> Bool { eventually { (try? figures()) != nil } }
    func figures() throws -> StoreFigures { try StoreClient.figures(path: path) }

    /// What `quire config reload` does: it asks again where one worker has gone and the next is not there yet.
    func reload() throws -> String {
        let deadline = monotonicNanoseconds() + 20_000_000_000
        while true {
            do throws(QuireError) {
                return try CommandSocket.ask("reload", at: StoreLink.commandPath(besideStore: path), "quired", "quired", patienceMilliseconds: 60_000)
            } catch {
                guard error.code == .retry || error.code == .closed, monotonicNanoseconds() < deadline else { throw error }
                ProcessCalls.sleep(milliseconds: 10)
            }
        }
    }
    /// The keeper's, or that of the only process.
    func signal(_ number: Int32) { process.signal(number) }

    /// The process that does the work: the keeper's child, or the only one there is.
    var worker: Int32 {
        let pid = process.pid
        return (try? Files.read("/proc/\(pid)/task/\(pid)/children"))?.split(separator: " ").first.flatMap { Int32($0) } ?? pid
    }

    /// kill -9 of the worker; returns once another one has taken its place (with a keeper), or it is gone.
    func kill(andWait: Bool = true) {
        let old = worker
        ProcessCalls.signal(old, SIGKILL)
        if old == process.pid {
            process.wait()
        } else if andWait {
            _ = eventually { worker != old && worker != process.pid }
        }
    }

    func startAgain() throws {
        process = try Self.start(arguments)
        guard waitUntilItServes() else { throw QuireError(.closed, "quired does not serve") }
    }

    /// SIGTERM, as a service manager does it.
    func stop() -> ProcessEnd {
        process.signal(SIGTERM)
        return process.wait()
    }

    deinit {
        if process.poll() == nil { _ = stop() }
        Files.remove(path)
        Files.remove(StoreLink.commandPath(besideStore: path))
        Files.removeDirectory(folder)
    }
}

/// A VM's backend and agent over the real socket.
struct Backend: ~Copyable {
    let vm: FakeVM
    var client: StoreClient
    /// What QEMU maps.
    var mapped: [UInt64: UInt32] = [:]

    init(_ vm: FakeVM, path: String) throws {
        self.vm = vm
        client = try Self.connect(vm, path)
    }

    static func connect(_ vm: FakeVM, _ path: String) throws(QuireError) -> StoreClient {
        var client = try StoreClient.connect(
            to: path, .init(name: vm.name, group: vm.group), pageMap: vm.map.raw, life: vm.lifeRaw)
        try client.setMemory([vm.region], files: [vm.ram.raw])
        return client
    }

    /// The backend was restarted, or quired was.
    mutating func reconnect(_ path: String) throws {
        client.close()
        client = try Self.connect(vm, path)
    }

    func hash(_ bytes: [UInt8]) -> PageHash { client.hasher.hash(unsafe bytes.span.bytes) }

    mutating func lookUp(_ gfns: Range<UInt64>) throws -> [SlotRun] {
        var lookup = StoreRequest.Lookup()
        lookup.append(gfns.lowerBound, try gfns.map { hash(try vm.read($0)) })
        return try client.lookUp(lookup)
    }

    func content(of slot: UInt32) throws -> [UInt8] { try client.store.readBytes(at: UInt64(slot) * 4096, count: 4096) }

    /// What the agent does with a command to merge. It does it whole, whoever dies.
    mutating func merge(_ run: SlotRun) throws -> (merged: [UInt64], refused: [UInt64]) {
        var merged: [UInt64] = [], refused: [UInt64] = []
        for (index, gfn) in run.gfns.enumerated() {
            let slot = run.slot + UInt32(index)
            try vm.setShared(gfn, slot, store: run.store)
            if try content(of: slot) == vm.read(gfn) {
                try Memfd.punch(vm.ram.raw, offset: (gfn - vm.firstGFN) * 4096, byteCount: 4096)
                mapped[gfn] = slot
                merged.append(gfn)
            } else {
                try vm.setShared(gfn, nil)
                refused.append(gfn)
            }
        }
        return (merged, refused)
    }

    /// What the agent does with a command to fold.
    mutating func fold(_ gfn: UInt64) throws {
        guard let slot = mapped[gfn] else { return }
        try vm.write(gfn, content(of: slot))
        try vm.setShared(gfn, nil)
        mapped[gfn] = nil
    }
}
