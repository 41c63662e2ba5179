import CPlatform
import CQuireLayout
import Engines
import Glibc
import Host
import Platform
import TestSupport
import Testing

/// Nothing here works where the kernel does not let us merge.
extension Trait where Self == ConditionTrait {
    static var needsMerging: Self { .enabled(if: whyNothingIsMerged == nil, "\(whyNothingIsMerged ?? "")") }
}

/// The steps of a window, and one of the gate. As `enum quire_agent_step`, which this test doesn't link.
enum Step: Int, CaseIterable {
    case registerMinor, zapped, compared, mapped, wake, punch, unregister
    case protect, protected, copied, folded, foldWake
    case reset
    case exchange, eight, claimed, recyclePunch, punched
    case suspected

    static let ofMerge: [Step] = [.zapped, .compared, .mapped, .wake, .punch]
    static let ofFold: [Step] = [.protect, .protected, .copied, .folded, .foldWake]
}

/// A stand-in for QEMU with guest RAM, a page map, a store, and this test as its backend.
///
/// Every page of guest RAM holds one byte value, 0 to 7, all over; slot 64 v + i of the store holds value v.
final class Rig {
    static let page = 4096
    static let values = 8
    static let slotsEach = 64
    static let firstGFN: UInt64 = 1024

    let pages: Int
    let folder: String
    let ram: Descriptor
    let shared: Mapping
    let map: PageMap
    let mapFile: Descriptor
    let store: Descriptor
    private let listener: UnixSocket
    private let peer: UnixSocket
    private var child: ChildProcess
    private let input: Descriptor
    private let output: Descriptor
    var connection: Connection!

    static let program = products + "agent-standin"

    init(pages: Int = 4096, ramPages: Int? = nil, prefix: [String] = [], _ options: [String] = []) throws {
        ProcessCalls.ignoreBrokenPipes()
        self.pages = pages
        // On a disk: O_DIRECT means nothing elsewhere.
        folder = "/var/tmp/quire-agent-\(UInt32.random(in: 0 ... .max))"
        try Files.makeDirectory(folder, mode: 0o755)
        chmod(folder, 0o777)
        // Some pages more, for guests that write from a page into the file.
        ram = try Memfd(name: "ram", byteCount: UInt64((ramPages ?? pages + 64) * Self.page)).takeDescriptor()
        let sharedFile = try Memfd(name: "shared", byteCount: 1 << 18).takeDescriptor()
        shared = try Mapping(sharedFile, byteCount: 1 << 18)
        mapFile = try PageMap.makeFile(pageCount: Self.firstGFN + UInt64(pages))
        map = try PageMap(mapFile.duplicate())
        store = try Memfd(name: "store", byteCount: UInt64(Self.values * Self.slotsEach * Self.page)).takeDescriptor()
        for value in 0..<Self.values {
            let bytes = [UInt8](repeating: UInt8(value), count: Self.slotsEach * Self.page)
            precondition(pwrite(store.raw, bytes, bytes.count, value * bytes.count) == bytes.count)
        }
        listener = try UnixSocket.listen(at: folder + "/agent", kind: .messages)
        chmod(folder + "/agent", 0o666)
        var ends: [Int32] = [-1, -1]
        precondition(socketpair(AF_UNIX, Int32(SOCK_STREAM.rawValue), 0, &ends) == 0)
        peer = UnixSocket(adopting: Descriptor(owning: ends[0]))
        let other = Descriptor(owning: ends[1])
        var toChild = try Pipe(), fromChild = try Pipe()
        let childInput = toChild.takeReader(), childOutput = fromChild.takeWriter()
        input = toChild.takeWriter()
        output = fromChild.takeReader()
        var passing = ChildProcess.Options()
        passing.parentDeathSignal = SIGKILL
        passing.passing = [
            .init(from: childInput.raw, to: 0), .init(from: childOutput.raw, to: 1), .init(from: ram.raw, to: 3),
            .init(from: sharedFile.raw, to: 4), .init(from: other.raw, to: 5),
        ]
        // Another user may be kept out of where it was built.
        if !prefix.isEmpty { _ = try ChildProcess.output(of: ["cp", Self.program, folder + "/standin"]) }
        child = try ChildProcess(
            prefix + [prefix.isEmpty ? Self.program : folder + "/standin", folder + "/agent"]
                + ["pages=\(pages)", "file=\(folder)/patterns"] + options, passing)
    }

    deinit {
        child.signal(SIGKILL)
        child.wait()
        for name in Files.list(folder) ?? [] { Files.remove(folder + "/" + name) }
        Files.removeDirectory(folder)
    }

    var pid: Int32 { child.pid }
    var isRunning: Bool { child.poll() == nil }

    // MARK: - The backend

    func accept() throws { connection = try Connection(listener) }

    func attach(
        version: UInt32 = QUIRE_AGENT_VERSION, userfault: Int32? = nil, regions: [Region]? = nil, stores: Int = 1
    ) throws -> Ready {
        try connection.attach(
            version: version, regions: regions ?? [Region(gfn: Self.firstGFN, pages: UInt64(pages))], map: mapFile.raw,
            files: [ram.raw], stores: Array(repeating: store.raw, count: stores), userfault: userfault)
    }

    /// Connects and attaches; an error if the agent refuses. The gate stays closed until calls that began before are
    /// over.
    func begin(waitForGate: Bool = true) throws {
        try accept()
        let ready = try attach()
        guard ready.status == QUIRE_AGENT_OK.rawValue else { throw QuireError(.invalid, ready.text) }
        if waitForGate { _ = try connection.gate(becomes: false) }
    }

    /// Drops the connection, as a backend that dies does.
    func drop() { connection = nil }

    func gfn(_ page: Int) -> UInt64 { Self.firstGFN + UInt64(page) }

    func run(_ operation: Operation, _ page: Int, _ count: Int = 1, value: Int = 0) throws -> Outcome {
        try connection.run(
            operation,
            [Run(gfn: gfn(page), pages: UInt32(count), slot: operation == .merge ? UInt64(value * Self.slotsEach) : 0)])[0]
    }

    /// The first byte of a page in the memory file.
    func byte(_ page: Int) -> UInt8 {
        var byte: UInt8 = 0xff
        pread(ram.raw, &byte, 1, page * Self.page)
        return byte
    }

    func isPrivate(_ page: Int) -> Bool { map.state(of: gfn(page)) == .private }

    func isInFile(_ page: Int) -> Bool {
        Memfd.nextData(ram.raw, from: UInt64(page * Self.page), to: UInt64((page + 1) * Self.page)) != nil
    }

    func passDescriptor(_ raw: Int32) throws { try peer.send([1], passing: [raw]) }

    // MARK: - The stand-in

    /// Tells the stand-in something, and returns its answer; nil when it is gone.
    func tell(_ line: String) throws -> Int? {
        try input.writeAll(line + "\n")
        return readLine().flatMap { Int($0) }
    }

    private func readLine() -> String? {
        var line: [UInt8] = []
        var byte: UInt8 = 0
        while !waitReadable([output.raw], timeoutMilliseconds: 60_000).isEmpty, read(output.raw, &byte, 1) == 1 {
            if byte == 10 { return String(decoding: line, as: UTF8.self) }
            line.append(byte)
        }
        return nil
    }

    /// Ends the guest: "good", "lost" or "hang".
    func finish() throws -> String {
        try? input.writeAll("stop\n")
        while let line = readLine() {
            if ["good", "lost", "hang"].contains(line) { return line }
        }
        return "gone"
    }

    var verified: UInt64 { shared.load64(0) }
    var written: UInt64 { shared.load64(8) }
    var lost: UInt64 { shared.load64(16) }

    private static let valueOffset = 64 + 8 * 32
    private static let stateOffset = valueOffset + 65536

    /// Claims a page that the guest has freed, as the recycle engine does.
    func claim(_ page: Int) -> Bool { shared.compareExchange8(Self.stateOffset + page, expected: 1, desired: 0xfe) }
    func recycled(_ page: Int) { shared.store8(Self.stateOffset + page, 0xff) }
    func release(_ page: Int) { shared.store8(Self.stateOffset + page, 1) }
}

/// With `table=1`: the states of all pages are in the last one.
extension Rig {
    func mark(_ page: Int) -> UInt8 {
        var byte: UInt8 = 0
        pread(ram.raw, &byte, 1, (pages - 1) * Self.page + page)
        return byte
    }
    func setMark(_ page: Int, _ value: UInt8) {
        var byte = value
        pwrite(ram.raw, &byte, 1, (pages - 1) * Self.page + page)
    }
    /// Runs for the states of `pages`.
    func states(_ page: Int, _ count: Int) -> Run {
        Run(gfn: gfn(page), pages: UInt32(count), slot: gfn(pages - 1) * 4096 + UInt64(page))
    }
    func recycle(_ page: Int, _ count: Int, _ order: Order = Order(), again: Bool = false) throws -> Outcome {
        try connection.run(again ? .recycleAgain : .recycle, [states(page, count)], order)[0]
    }
}

extension Descriptor {
    borrowing func writeAll(_ text: String) throws {
        let bytes = Array(text.utf8)
        guard write(raw, bytes, bytes.count) == bytes.count else { throw QuireError(.closed, "the stand-in is gone") }
    }
}

func mappings(of pid: Int32) throws -> Int { try Files.read("/proc/\(pid)/maps", limit: 1 << 24).utf8.count { $0 == 10 } }
