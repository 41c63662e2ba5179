import Engines
import FoundationEssentials
import Platform

/// What commands are about: the store of a swap disk, or of a shared disk.
public protocol TmemOwner {
    var store: Tmem { get }
    var snapshot: TmemSnapshot { get }
    /// By the name that people know it by.
    func pool(named name: String) throws(QuireError) -> TmemPool
    /// Of the whole store.
    func setCap(_ bytes: UInt64?) throws(QuireError)
}

extension TmemOwner {
    public static func noPool(_ name: String) -> QuireError {
        QuireError(.invalid, "there is no pool '\(name)': quire tmem list shows those there are")
    }
}

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

    /// Returns the answer's text: JSON for `list`, a number for `flush`. Nil: it is `save` or `restore`, which come with a file.
    public func carryOut(on owner: some TmemOwner) throws(QuireError) -> String? {
        switch self {
        case .list: return Self.encode(StatusReport.Tmem(owner.snapshot))
        case .freeze: owner.store.freeze()
        case .thaw: owner.store.thaw()
        case .flush(let bytes): return "\(owner.store.evict(bytes: bytes))"
        case .weight(let name, let weight): try owner.pool(named: name).setWeight(weight)
        case .cap(let name?, let bytes): try owner.pool(named: name).setCap(bytes)
        case .cap(nil, let bytes): try owner.setCap(bytes)
        case .save, .restore: return nil
        }
        return ""
    }

    /// The same with files; how many pages were saved or restored.
    func carryOut(on disk: SwapDisk, _ request: inout CommandSocket.Request) throws(QuireError) -> String {
        if let answer = try carryOut(on: disk) { return answer }
        let file = try request.takeFile()
        return self == .save
            ? "\(try disk.save(to: DataSink(file, cancel: request.cancel)))"
            : "\(try disk.restore(from: DataSource(file, cancel: request.cancel)))"
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
