import FoundationEssentials
import Host
import StoreProtocol

/// What `/api/v1` answers, as JSON. Web/openapi.json says the same to programs; a test holds the two together.
enum API {
    static func json(_ value: some Encodable) -> [UInt8] {
        let encoder = JSONEncoder()
        encoder.outputFormatting = [.sortedKeys, .withoutEscapingSlashes]
        // Numbers and text always encode.
        return Array((try? encoder.encode(value)) ?? Data()) + [0x0A]
    }

    struct HostAnswer: Encodable {
        let host: HostSnapshot

        enum CodingKeys: String, CodingKey {
            case version, vms, picture, store
            case unixMilliseconds = "time_unix_ms"
            case memoryBytes = "memory_bytes"
            case availableBytes = "memory_available_bytes"
            case savedBytes = "saved_bytes"
            case unreadableDirectories = "unreadable_directories"
            case storeTrouble = "store_trouble"
        }

        func encode(to encoder: any Encoder) throws {
            var out = encoder.container(keyedBy: CodingKeys.self)
            try out.encode(quireVersion, forKey: .version)
            try out.encode(host.unixMilliseconds, forKey: .unixMilliseconds)
            try out.encode(host.vms.count, forKey: .vms)
            try out.encode(host.memoryBytes, forKey: .memoryBytes)
            try out.encode(host.availableBytes, forKey: .availableBytes)
            try out.encode(host.vms.reduce(0) { $0 &+ $1.savedBytes }, forKey: .savedBytes)
            try out.encode(host.picture, forKey: .picture)
            try out.encode(host.unreadableDirectories, forKey: .unreadableDirectories)
            try out.encode(host.store.map(StoreAnswer.init), forKey: .store)
            try out.encode(host.storeTrouble, forKey: .storeTrouble)
        }
    }

    /// What `quire top --json` prints.
    struct TopAnswer: Encodable {
        let host: HostSnapshot

        enum CodingKeys: String, CodingKey {
            case vms
            case unixMilliseconds = "time_unix_ms"
            case savedBytes = "saved_bytes"
        }

        func encode(to encoder: any Encoder) throws {
            var out = encoder.container(keyedBy: CodingKeys.self)
            try out.encode(host.unixMilliseconds, forKey: .unixMilliseconds)
            try out.encode(host.vms.reduce(0) { $0 &+ $1.savedBytes }, forKey: .savedBytes)
            try out.encode(host.vms, forKey: .vms)
        }
    }

    struct StoreAnswer: Encodable {
        let figures: StoreFigures

        enum CodingKeys: String, CodingKey {
            case vms, promotions, hits, stale, full, histogram
            case sharedPages = "shared_pages"
            case sharingPages = "sharing_pages"
            case heldPages = "held_pages"
            case limitPages = "limit_pages"
            case savedBytes = "saved_bytes"
            case storeBytes = "store_bytes"
            case indexBytes = "index_bytes"
            case candidateBytes = "candidate_bytes"
            case ledgerBytes = "ledger_bytes"
            case lackingBytes = "lacking_bytes"
        }

        func encode(to encoder: any Encoder) throws {
            var out = encoder.container(keyedBy: CodingKeys.self)
            try out.encode(figures.machines, forKey: .vms)
            try out.encode(figures.sharedPages, forKey: .sharedPages)
            try out.encode(figures.sharingPages, forKey: .sharingPages)
            try out.encode(figures.heldPages, forKey: .heldPages)
            try out.encode(figures.limitPages, forKey: .limitPages)
            try out.encode(figures.savedBytes, forKey: .savedBytes)
            try out.encode(figures.storeBytes, forKey: .storeBytes)
            try out.encode(figures.indexBytes, forKey: .indexBytes)
            try out.encode(figures.candidateBytes, forKey: .candidateBytes)
            try out.encode(figures.ledgerBytes, forKey: .ledgerBytes)
            try out.encode(figures.lackingBytes, forKey: .lackingBytes)
            try out.encode(figures.promotions, forKey: .promotions)
            try out.encode(figures.hits, forKey: .hits)
            try out.encode(figures.stale, forKey: .stale)
            try out.encode(figures.full, forKey: .full)
            try out.encode(figures.uses, forKey: .histogram)
        }
    }

    struct GroupAnswer: Encodable {
        let group: GroupFigures

        enum CodingKeys: String, CodingKey {
            case name, node, vms, histogram
            case sharedPages = "shared_pages"
            case sharingPages = "sharing_pages"
            case savedBytes = "saved_bytes"
            case storeBytes = "store_bytes"
        }

        func encode(to encoder: any Encoder) throws {
            var out = encoder.container(keyedBy: CodingKeys.self)
            try out.encode(group.name, forKey: .name)
            try out.encode(group.node, forKey: .node)
            try out.encode(group.figures.machines, forKey: .vms)
            try out.encode(group.figures.sharedPages, forKey: .sharedPages)
            try out.encode(group.figures.sharingPages, forKey: .sharingPages)
            try out.encode(group.figures.savedBytes, forKey: .savedBytes)
            try out.encode(group.figures.storeBytes, forKey: .storeBytes)
            try out.encode(group.figures.uses, forKey: .histogram)
        }
    }
}

extension StoreFigures {
    /// The histogram without the zeros at its end.
    var uses: [UInt64] { Array(histogram.prefix((histogram.lastIndex { $0 != 0 } ?? -1) + 1)) }
}

extension VM: Encodable {
    enum CodingKeys: String, CodingKey {
        case uid, picture
        case savedBytes = "saved_bytes"
    }

    /// The fields of `quire status --json`, and these.
    public func encode(to encoder: any Encoder) throws {
        try report.encode(to: encoder)
        var out = encoder.container(keyedBy: CodingKeys.self)
        try out.encode(uid, forKey: .uid)
        try out.encode(savedBytes, forKey: .savedBytes)
        try out.encode(picture, forKey: .picture)
    }
}
