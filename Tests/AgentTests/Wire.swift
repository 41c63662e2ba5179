import CQuireLayout
import Platform

/// The agent's protocol, on the backend's side: part 4 of `quire_layout.h`.
enum Operation: UInt32 { case merge = 1, zero, fold, foldDiverged, reset, recycle, recycleAgain, foldHeld }

/// What RECYCLE says besides its runs.
struct Order {
    var now: UInt32 = 200
    var dueAge: UInt32 = 1
    var claimPages: UInt32 = 64
}

enum Reason: UInt32 { case done, differs, busy, budget, gateClosed, state, failed, invalid }

struct Run {
    var gfn: UInt64
    var pages: UInt32 = 1
    var slot: UInt64 = 0
    var store: UInt32 = 0
}

struct Outcome: Equatable, CustomStringConvertible {
    var done: UInt32
    var reason: Reason
    var detail: UInt32
    var description: String { "\(done) \(reason) \(detail)" }
}

/// Little-endian fields, one after the other.
struct Fields {
    var bytes: [UInt8] = []
    mutating func add(_ value: some FixedWidthInteger) { withUnsafeBytes(of: value.littleEndian) { bytes += $0 } }
    mutating func add(zeros count: Int) { bytes += [UInt8](repeating: 0, count: count) }
}

extension [UInt8] {
    func u32(_ at: Int) -> UInt32 { (0..<4).reduce(0) { $0 | UInt32(self[at + $1]) << (8 * UInt32($1)) } }
    func u64(_ at: Int) -> UInt64 { (0..<8).reduce(0) { $0 | UInt64(self[at + $1]) << (8 * UInt64($1)) } }
    func text(_ at: Int) -> String { String(decoding: self[at..<at + 256].prefix { $0 != 0 }, as: UTF8.self) }
}

struct Region {
    var gfn: UInt64
    var pages: UInt64
    var file: UInt64 = 0
    var offset: UInt64 = 0
}

struct Ready {
    var status: UInt32
    var text: String
    var capabilities: UInt64
    var addresses: [UInt64]
}

struct Gate: Equatable {
    var closed: Bool
    var isAssigned = false
    var text: String
}

/// A connection that the agent has made. Every wait ends after a minute.
final class Connection {
    let socket: UnixSocket
    /// The hello: its bytes, and the descriptors of pagemap and mem.
    let hello: [UInt8]
    private let pagemap: Descriptor?
    private let memory: Descriptor?
    var memoryDescriptor: Int32? { memory.raw() }
    private(set) var gate: Gate?
    private(set) var mappings: UInt64 = 0
    private(set) var mappingLimit: UInt64 = 0
    private var id: UInt64 = 0

    init(_ listener: borrowing UnixSocket) throws {
        guard !waitReadable([listener.descriptor.raw], timeoutMilliseconds: 60_000).isEmpty else {
            throw QuireError(.closed, "the agent doesn't connect")
        }
        socket = try listener.accept()
        var passed = UnixSocket.PassedDescriptors()
        hello = try Self.packet(socket, &passed) ?? []
        pagemap = passed.next()
        memory = passed.next()
    }

    private static func packet(
        _ socket: borrowing UnixSocket, _ passed: inout UnixSocket.PassedDescriptors
    ) throws -> [UInt8]? {
        guard !waitReadable([socket.descriptor.raw], timeoutMilliseconds: 60_000).isEmpty else {
            throw QuireError(.closed, "the agent doesn't answer")
        }
        return try socket.receiveMessage(limit: 4096, maxDescriptors: 8, into: &passed)
    }

    func send(_ type: UInt32, _ body: [UInt8], passing descriptors: [Int32] = []) throws {
        var fields = Fields()
        fields.add(type)
        fields.add(UInt32(body.count + 8))
        try socket.send(fields.bytes + body, passing: descriptors)
    }

    /// The next message of this type; what the gate says meanwhile is kept. Nil when the connection has ended.
    func receive(_ type: UInt32) throws -> [UInt8]? {
        while true {
            var passed = UnixSocket.PassedDescriptors()
            guard let bytes = try Self.packet(socket, &passed) else { return nil }
            if bytes.u32(0) == QUIRE_AGENT_GATE.rawValue {
                gate = Gate(closed: bytes.u32(8) != 0, isAssigned: bytes.u32(12) != 0, text: bytes.text(16))
            }
            if bytes.u32(0) == type { return bytes }
        }
    }

    func attach(
        version: UInt32 = QUIRE_AGENT_VERSION, regions: [Region], map: Int32, files: [Int32], stores: [Int32],
        userfault: Int32? = nil, peers: [UInt32] = []
    ) throws -> Ready {
        var body = Fields()
        for value in [
            version, userfault == nil ? 0 : 1, UInt32(files.count), UInt32(stores.count), UInt32(regions.count),
            UInt32(peers.count),
        ] { body.add(value) }
        for i in 0..<8 { body.add(i < peers.count ? peers[i] : 0) }
        for region in regions {
            for value in [region.gfn, region.pages, region.file, region.offset] { body.add(value) }
        }
        try send(QUIRE_AGENT_ATTACH.rawValue, body.bytes, passing: [map] + files + stores + (userfault.map { [$0] } ?? []))
        guard let bytes = try receive(QUIRE_AGENT_READY.rawValue) else {
            throw QuireError(.closed, "the agent closed the connection")
        }
        return Ready(
            status: bytes.u32(8), text: bytes.text(16), capabilities: bytes.u64(272),
            addresses: (0..<Int(bytes.u32(12))).map { bytes.u64(280 + 8 * $0) })
    }

    /// Sends a command and doesn't wait.
    func begin(_ operation: Operation, _ runs: [Run], _ order: Order? = nil, passing: [Int32] = []) throws {
        id += 1
        var body = Fields()
        body.add(id)
        body.add(operation.rawValue)
        body.add(UInt32(runs.count))
        for value in [order?.now ?? 0, order?.dueAge ?? 0, order?.claimPages ?? 0, 0] { body.add(value) }
        for run in runs {
            body.add(run.gfn)
            body.add(run.slot)
            body.add(run.pages)
            body.add(run.store)
        }
        try send(QUIRE_AGENT_COMMAND.rawValue, body.bytes, passing: passing)
    }

    /// The result of the last command. Nil: the agent is gone.
    func end() throws -> [Outcome]? {
        guard let bytes = try receive(QUIRE_AGENT_RESULT.rawValue) else { return nil }
        precondition(bytes.u64(8) == id)
        mappings = bytes.u64(16)
        mappingLimit = bytes.u64(24)
        return (0..<Int(bytes.u32(32))).map {
            Outcome(
                done: bytes.u32(40 + 12 * $0), reason: Reason(rawValue: bytes.u32(44 + 12 * $0))!,
                detail: bytes.u32(48 + 12 * $0))
        }
    }

    func run(_ operation: Operation, _ runs: [Run], _ order: Order? = nil) throws -> [Outcome] {
        try begin(operation, runs, order)
        guard let outcomes = try end() else { throw QuireError(.closed, "the agent is gone") }
        return outcomes
    }

    /// Waits until the gate says so.
    func gate(becomes closed: Bool) throws -> Gate? {
        while gate?.closed != closed {
            guard try receive(QUIRE_AGENT_GATE.rawValue) != nil else { return nil }
        }
        return gate
    }
}
