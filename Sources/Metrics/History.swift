/// The pictures of the last minutes, at even distances.
public struct History: Sendable {
    struct Sample: Sendable {
        let unixMilliseconds: Int64
        let availableBytes: UInt64
        let host: Picture
        let vms: [VM.ID: Picture]
    }

    public let intervalMilliseconds: UInt64
    /// The most samples that are kept.
    public let capacity: Int
    private(set) var samples: [Sample] = []

    public init(intervalMilliseconds: UInt64 = 15_000, capacity: Int = 60) {
        self.intervalMilliseconds = intervalMilliseconds
        self.capacity = capacity
    }

    public mutating func add(_ host: HostSnapshot) {
        if samples.count >= capacity { samples.removeFirst(samples.count - capacity + 1) }
        var vms: [VM.ID: Picture] = [:]
        for vm in host.vms where vm.hasNumbers { vms[vm.id] = vm.picture }
        samples.append(
            Sample(
                unixMilliseconds: host.unixMilliseconds, availableBytes: host.availableBytes, host: host.picture, vms: vms))
    }
}

extension History: Encodable {
    /// Columns: one number a sample.
    struct Columns: Encodable {
        let pictures: [Picture?]

        enum CodingKeys: String, CodingKey {
            case privateBytes = "private_bytes"
            case sharedBytes = "shared_bytes"
            case zeroBytes = "zero_bytes"
            case recycledBytes = "recycled_bytes"
            case untouchedBytes = "untouched_bytes"
            case tmemBytes = "tmem_bytes"
        }

        func encode(to encoder: any Encoder) throws {
            var out = encoder.container(keyedBy: CodingKeys.self)
            try out.encode(pictures.map { $0?.privateBytes }, forKey: .privateBytes)
            try out.encode(pictures.map { $0?.sharedBytes }, forKey: .sharedBytes)
            try out.encode(pictures.map { $0?.zeroBytes }, forKey: .zeroBytes)
            try out.encode(pictures.map { $0?.recycledBytes }, forKey: .recycledBytes)
            try out.encode(pictures.map { $0?.untouchedBytes }, forKey: .untouchedBytes)
            try out.encode(pictures.map { $0?.tmemBytes }, forKey: .tmemBytes)
        }
    }

    struct Line: Encodable {
        let id: VM.ID
        let columns: Columns
        enum CodingKeys: String, CodingKey { case uid, name }

        func encode(to encoder: any Encoder) throws {
            var out = encoder.container(keyedBy: CodingKeys.self)
            try out.encode(id.uid, forKey: .uid)
            try out.encode(id.name, forKey: .name)
            try columns.encode(to: encoder)
        }
    }

    enum CodingKeys: String, CodingKey {
        case host, vms
        case intervalMilliseconds = "interval_ms"
        case times = "times_unix_ms"
        case available = "available_bytes"
    }

    /// VMs of the last sample; a number is null where a VM was not there yet.
    public func encode(to encoder: any Encoder) throws {
        var out = encoder.container(keyedBy: CodingKeys.self)
        try out.encode(intervalMilliseconds, forKey: .intervalMilliseconds)
        try out.encode(samples.map(\.unixMilliseconds), forKey: .times)
        try out.encode(samples.map(\.availableBytes), forKey: .available)
        try out.encode(Columns(pictures: samples.map(\.host)), forKey: .host)
        let ids = (samples.last?.vms.keys.map { $0 } ?? []).sorted { ($0.name, $0.uid) < ($1.name, $1.uid) }
        try out.encode(
            ids.map { id in Line(id: id, columns: Columns(pictures: samples.map { $0.vms[id] })) }, forKey: .vms)
    }
}
