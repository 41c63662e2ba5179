import CQuireLayout
import Engines
import GuestMemory
import Platform

/// The agent's protocol (quire_layout.h, part 4), the back end's side: messages as values. The one place where their
/// bytes are made and believed.

/// What the agent can do with pages of guest memory.
public enum AgentOperation: UInt32, Sendable, CaseIterable {
    case merge = 1, zero, fold, foldDiverged, reset, recycle, recycleAgain, foldHeld
}

/// The pin gate, as the agent sees it: while it is closed nothing is merged or folded, but for pages that become a ring or a table.
public struct AgentGate: Sendable, Equatable {
    public let isClosed: Bool
    /// A device may write to all of guest RAM, free or not: nothing is recycled either, and a page that is merged stays so.
    public let isAssigned: Bool
    /// Why, in one line.
    public let reason: String
}

enum AgentMessage {
    static let maxBytes = 4096

    struct Hello {
        let version: UInt32
        let capabilities: UInt64
        let mappingLimit: UInt64
    }

    struct Ready {
        let status: quire_agent_status
        let text: String
        let capabilities: UInt64
        let addresses: [UInt64]
    }

    struct Result {
        let id: UInt64
        let mappings: UInt64
        let mappingLimit: UInt64
        let outcomes: [MoveOutcome]
    }

    case hello(Hello)
    case ready(Ready)
    case result(Result)
    case gate(AgentGate)

    /// One packet. Throws `.invalid` for what is not a message from an agent.
    init(_ bytes: [UInt8]) throws(QuireError) {
        let reader = FieldReader(bytes)
        guard bytes.count >= MemoryLayout<quire_agent_head>.size, Int(reader.u32(4)) == bytes.count else {
            throw QuireError(.invalid, "a message of \(bytes.count) bytes that says otherwise")
        }
        func need(_ count: Int) throws(QuireError) {
            guard bytes.count >= count else { throw QuireError(.invalid, "a message is cut short") }
        }
        switch quire_agent_type(reader.u32(0)) {
        case QUIRE_AGENT_HELLO:
            // Of another version's hello no more is known than magic and version.
            try need(20)
            guard Array(bytes[8..<16]) == Array(QUIRE_AGENT_MAGIC.utf8) else {
                throw QuireError(.invalid, "a hello without the magic number")
            }
            let isOurs = reader.u32(16) == QUIRE_AGENT_VERSION
            if isOurs { try need(MemoryLayout<quire_agent_hello>.size) }
            self = .hello(
                Hello(
                    version: reader.u32(16),
                    capabilities: isOurs ? reader.u64(Self.offset(\quire_agent_hello.capabilities)) : 0,
                    mappingLimit: isOurs ? reader.u64(Self.offset(\quire_agent_hello.mapping_limit)) : 0))
        case QUIRE_AGENT_READY:
            let addresses = Self.offset(\quire_agent_ready.addresses)
            try need(MemoryLayout<quire_agent_ready>.size)
            let count = Int(reader.u32(Self.offset(\quire_agent_ready.region_count)))
            guard count <= Int(QUIRE_AGENT_MAX_REGIONS) else { throw QuireError(.invalid, "\(count) regions") }
            self = .ready(
                Ready(
                    status: quire_agent_status(reader.u32(Self.offset(\quire_agent_ready.status))),
                    text: reader.text(Self.offset(\quire_agent_ready.text)),
                    capabilities: reader.u64(Self.offset(\quire_agent_ready.capabilities)),
                    addresses: (0..<count).map { reader.u64(addresses + 8 * $0) }))
        case QUIRE_AGENT_RESULT:
            let outcomes = Self.offset(\quire_agent_result.outcomes)
            try need(outcomes)
            let count = Int(reader.u32(Self.offset(\quire_agent_result.run_count)))
            let stride = MemoryLayout<quire_agent_outcome>.stride
            guard count <= Int(QUIRE_AGENT_MAX_RUNS) else { throw QuireError(.invalid, "a result of \(count) runs") }
            try need(outcomes + count * stride)
            var list: [MoveOutcome] = []
            for index in 0..<count { list.append(try Self.outcome(reader, outcomes + index * stride)) }
            self = .result(
                Result(
                    id: reader.u64(Self.offset(\quire_agent_result.id)),
                    mappings: reader.u64(Self.offset(\quire_agent_result.mappings)),
                    mappingLimit: reader.u64(Self.offset(\quire_agent_result.mapping_limit)), outcomes: list))
        case QUIRE_AGENT_GATE:
            try need(MemoryLayout<quire_agent_gate>.size)
            self = .gate(
                AgentGate(
                    isClosed: reader.u32(Self.offset(\quire_agent_gate.closed)) != 0,
                    isAssigned: reader.u32(Self.offset(\quire_agent_gate.assigned)) != 0,
                    reason: reader.text(Self.offset(\quire_agent_gate.text))))
        default:
            throw QuireError(.invalid, "message \(reader.u32(0)), which no agent sends")
        }
    }

    private static func outcome(_ reader: FieldReader, _ at: Int) throws(QuireError) -> MoveOutcome {
        let detail = reader.u32(at + 8)
        let reason: MoveOutcome.Reason
        switch quire_agent_reason(reader.u32(at + 4)) {
        case QUIRE_AGENT_DONE: reason = .done
        case QUIRE_AGENT_DIFFERS: reason = .differs(page: Int(detail))
        case QUIRE_AGENT_BUSY: reason = .busy
        case QUIRE_AGENT_BUDGET: reason = .budget
        case QUIRE_AGENT_GATE_CLOSED: reason = .gateClosed
        case QUIRE_AGENT_STATE: reason = .state(page: Int(detail))
        case QUIRE_AGENT_FAILED: reason = .failed(errno: Int32(bitPattern: detail))
        case QUIRE_AGENT_INVALID: reason = .invalid
        default: throw QuireError(.invalid, "a result without a known reason")
        }
        return MoveOutcome(done: Int(reader.u32(at)), reason: reason)
    }

    private static func offset<S, T>(_ field: KeyPath<S, T>) -> Int { MemoryLayout<S>.offset(of: field)! }

    // MARK: - To the agent

    private static func encode(_ type: quire_agent_type, _ body: [UInt8]) -> [UInt8] {
        let bytes = UInt32(MemoryLayout<quire_agent_head>.size + body.count)
        return littleEndian(type.rawValue) + littleEndian(bytes) + body
    }

    struct Region {
        let gfns: Range<GFN>
        let file: Int
        /// Bytes.
        let fileOffset: UInt64
    }

    /// `peers`: processes that QEMU may pass guest RAM to, at most `maxPeers`.
    static func attach(
        _ regions: [Region], files: Int, stores: Int, peers: [Int32], hasUserfault: Bool
    ) -> [UInt8] {
        var body: [UInt8] = []
        let flags = hasUserfault ? QUIRE_AGENT_HAS_USERFAULTFD.rawValue : 0
        for value in [UInt32(QUIRE_AGENT_VERSION), flags, UInt32(files), UInt32(stores), UInt32(regions.count), UInt32(peers.count)] {
            body += littleEndian(value)
        }
        for peer in peers { body += littleEndian(UInt32(bitPattern: peer)) }
        body += [UInt8](repeating: 0, count: 4 * (maxPeers - peers.count))
        for region in regions {
            for value in [region.gfns.lowerBound, UInt64(region.gfns.count), UInt64(region.file), region.fileOffset] {
                body += littleEndian(value)
            }
        }
        return encode(QUIRE_AGENT_ATTACH, body)
    }

    /// At most `maxRuns`; each of 1 to `PageRun.maxPages` pages.
    static func command(_ id: UInt64, _ operation: AgentOperation, _ runs: [PageRun]) -> [UInt8] {
        let isMerge = operation == .merge
        return command(
            id, operation, [0, 0, 0, 0],
            runs.map { (gfn: $0.gfn, slot: isMerge ? $0.slot : 0, pages: $0.pages, store: isMerge ? $0.store : 0) })
    }

    static func command(_ id: UInt64, _ order: RecycleOrder, _ runs: [RecycleRun]) -> [UInt8] {
        let (operation, age): (AgentOperation, Int) =
            switch order.kind {
            case .due(let age): (.recycle, age)
            case .again: (.recycleAgain, 0)
            }
        return command(
            id, operation, [UInt32(order.now), UInt32(clamping: age), UInt32(clamping: order.claimPages), 0],
            runs.map { (gfn: $0.gfns.lowerBound, slot: $0.states, pages: $0.gfns.count, store: 0) })
    }

    private static func command(
        _ id: UInt64, _ operation: AgentOperation, _ order: [UInt32],
        _ runs: [(gfn: GFN, slot: UInt64, pages: Int, store: UInt8)]
    ) -> [UInt8] {
        precondition(runs.count <= PageRun.maxRuns)
        var body = littleEndian(id) + littleEndian(operation.rawValue) + littleEndian(UInt32(runs.count))
        body.reserveCapacity(AgentMessage.maxBytes)
        for value in order { body.append(littleEndian: value) }
        for run in runs {
            body.append(littleEndian: run.gfn)
            body.append(littleEndian: run.slot)
            body.append(littleEndian: UInt32(clamping: run.pages))
            body.append(littleEndian: UInt32(run.store))
        }
        return encode(QUIRE_AGENT_COMMAND, body)
    }

    static let maxPeers = Int(QUIRE_AGENT_MAX_PEERS)
}

/// Little-endian fields of a message whose length was checked.
private struct FieldReader {
    let bytes: [UInt8]
    init(_ bytes: [UInt8]) { self.bytes = bytes }
    func u32(_ at: Int) -> UInt32 { fromLittleEndian(bytes[at..<at + 4]) }
    func u64(_ at: Int) -> UInt64 { fromLittleEndian(bytes[at..<at + 8]) }
    /// Of 256 bytes, without what would upset a terminal.
    func text(_ at: Int) -> String {
        String(decoding: bytes[at..<at + 256].prefix { $0 != 0 }.map { $0 < 32 || $0 == 127 ? 63 : $0 }, as: UTF8.self)
    }
}
