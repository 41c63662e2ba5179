import Engines
import FoundationEssentials
import Platform

/// What `quire tmem` asks of a backend: the words of a request, both ways.
public enum TmemCommand: Sendable, Equatable {
    case list
    case freeze
    case thaw
    /// Bytes of the host's memory to give back.
    case flush(UInt64)
    case weight(pool: String, UInt32)
    /// Of one pool's client, or of the whole store; nil bytes: no limit.
    case cap(pool: String?, UInt64?)
    /// Both come with a file.
    case save
    case restore

    public var request: String {
        switch self {
        case .list: "tmem list"
        case .freeze: "tmem freeze"
        case .thaw: "tmem thaw"
        case .flush(let bytes): "tmem flush \(bytes)"
        case .weight(let pool, let weight): "tmem weight \(pool) \(weight)"
        case .cap(let pool, let bytes): "tmem cap \(pool ?? "*") \(bytes.map { "\($0)" } ?? "none")"
        case .save: "tmem save"
        case .restore: "tmem restore"
        }
    }

    /// The words behind `tmem`.
    public init(parsing words: some Collection<String>) throws(QuireError) {
        let words = Array(words)
        let rest = Array(words.dropFirst())
        switch (words.first ?? "", rest.count) {
        case ("list", 0): self = .list
        case ("freeze", 0): self = .freeze
        case ("thaw", 0): self = .thaw
        case ("save", 0): self = .save
        case ("restore", 0): self = .restore
        case ("flush", 1):
            guard let bytes = UInt64(rest[0]) else { throw Self.unknown(words) }
            self = .flush(bytes)
        case ("weight", 2):
            guard let weight = UInt32(rest[1]) else { throw Self.unknown(words) }
            self = .weight(pool: rest[0], weight)
        case ("cap", 2):
            let bytes = UInt64(rest[1])
            guard bytes != nil || rest[1] == "none" else { throw Self.unknown(words) }
            self = .cap(pool: rest[0] == "*" ? nil : rest[0], bytes)
        default: throw Self.unknown(words)
        }
    }

    private static func unknown(_ words: [String]) -> QuireError {
        QuireError(.unsupported, "this backend does not know the command 'tmem \(words.joined(separator: " "))'")
    }

    /// Returns the answer's text: JSON for `list`, a number for `flush`, `save` and `restore`.
    func carryOut(on disk: SwapDisk, _ request: inout CommandSocket.Request) throws(QuireError) -> String {
        switch self {
        case .list: return Self.encode(StatusReport.Tmem(disk.snapshot))
        case .freeze: disk.store.freeze()
        case .thaw: disk.store.thaw()
        case .flush(let bytes): return "\(disk.store.evict(bytes: bytes))"
        case .weight(let name, let weight): try disk.pool(named: name).setWeight(weight)
        case .cap(let name?, let bytes): try disk.pool(named: name).setCap(bytes)
        case .cap(nil, let bytes): try disk.store.setCap(bytes)
        case .save: return "\(try disk.save(to: DataSink(try request.takeFile(), cancel: request.cancel)))"
        case .restore: return "\(try disk.restore(from: DataSource(try request.takeFile(), cancel: request.cancel)))"
        }
        return ""
    }

    private static func encode(_ report: StatusReport.Tmem) -> String {
        // Numbers and text always encode.
        String(decoding: (try? JSONEncoder().encode(report)) ?? Data(), as: UTF8.self)
    }

    /// What `list` was answered.
    public static func report(_ answer: String) throws(QuireError) -> StatusReport.Tmem {
        do { return try JSONDecoder().decode(StatusReport.Tmem.self, from: Data(answer.utf8)) } catch {
            throw QuireError(.invalid, "the backend's answer is not understood: it is of another version", cause: error)
        }
    }
}
