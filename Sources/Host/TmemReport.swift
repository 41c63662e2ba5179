import FoundationEssentials
import Platform
import StoreProtocol

extension StatusReport {
    /// The transcendent memory that a VM's backend keeps. Encoded as an object of its own; pages have 4096 bytes. Counters
    /// count since the backend's start.
    public struct Tmem: Sendable, Equatable, Codable {
        /// `off`: there is none. `frozen`: new ephemeral pages are refused.
        public enum State: String, Sendable, Codable { case off, active, frozen }
        public var state = State.off
        public var reason = ""
        /// Of the host's memory, tables included.
        public var usedBytes: UInt64 = 0
        public var metadataBytes: UInt64 = 0
        /// 0: no limit.
        public var capBytes: UInt64 = 0
        public var pools: [Pool] = []

        public struct Pool: Sendable, Equatable, Codable {
            public var name: String
            /// `ephemeral` or `persistent`.
            public var kind: String
            /// `private` or `shared`.
            public var scope: String
            public var pages: UInt64
            /// The pages as the guest sees them.
            public var bytes: UInt64
            /// 0: no limit.
            public var capacityBytes: UInt64
            /// The pool's share of what their contents take.
            public var storedBytes: UInt64
            /// The former over the latter; null while nothing is stored.
            public var ratio: Double?
            public var puts: UInt64
            public var putsFailed: UInt64
            public var hits: UInt64
            public var misses: UInt64
            public var flushes: UInt64
            public var evictions: UInt64

            enum CodingKeys: String, CodingKey {
                case name, kind, scope, pages, bytes, ratio, puts, hits, misses, flushes, evictions
                case capacityBytes = "capacity_bytes"
                case storedBytes = "stored_bytes"
                case putsFailed = "puts_failed"
            }

            init(_ pool: PoolSnapshot) {
                name = pool.name
                kind = pool.isPersistent ? "persistent" : "ephemeral"
                scope = pool.isShared ? "shared" : "private"
                pages = pool.pages
                bytes = pool.pages &* 4096
                capacityBytes = pool.capacityPages &* 4096
                storedBytes = pool.storedBytes
                ratio = pool.storedBytes == 0 ? nil : Double(pool.pages &* 4096) / Double(pool.storedBytes)
                puts = pool.puts
                putsFailed = pool.putsFailed
                hits = pool.hits
                misses = pool.misses
                flushes = pool.flushes
                evictions = pool.evictions
            }
        }

        enum CodingKeys: String, CodingKey {
            case state, reason, pools
            case usedBytes = "used_bytes"
            case metadataBytes = "metadata_bytes"
            case capBytes = "cap_bytes"
        }

        init() {}

        public init(_ page: TmemSnapshot) {
            state = !page.isPresent ? .off : page.isFrozen ? .frozen : .active
            reason = page.reason
            usedBytes = page.usedBytes
            metadataBytes = page.metadataBytes
            capBytes = page.capBytes
            pools = page.pools.map(Pool.init)
        }
    }
}

/// What quired says of a disk that VMs share.
public struct SharedDiskReport: Sendable, Equatable, Codable {
    public var disk: String
    /// The share group whose VMs may attach it.
    public var group: String
    /// The VMs that have it, by name, as their backends say.
    public var attached: [String]
    /// Names what is on it, in hexadecimal digits: a disk that has lost that has another one. Nil where quired does not say.
    public var content: String?
    public var tmem: StatusReport.Tmem

    public init(disk: String, group: String, attached: [String], content: String? = nil, tmem: StatusReport.Tmem) {
        self.content = content
        self.disk = disk
        self.group = group
        self.attached = attached
        self.tmem = tmem
    }

    /// What `quire tmem` calls it: no VM can have such a name.
    public static let prefix = "shared:"
    public var name: String { Self.prefix + disk }

    public static func unknown(_ disk: String) -> QuireError {
        QuireError(.invalid, "there is no shared disk '\(disk.prefix(64))': quire tmem list shows those there are")
    }

    public static func encode(_ reports: [SharedDiskReport]) -> String {
        // Numbers and text always encode.
        String(decoding: (try? JSONEncoder().encode(reports)) ?? Data(), as: UTF8.self)
    }

    private static let patienceMilliseconds: Int32 = 2_000

    /// Of all that our user's VMs may attach; none without a quired that has some.
    public static func collect(at path: String = SharedDiskReport.path) throws(QuireError) -> [SharedDiskReport] {
        guard let answer = try SharedDiskCommand.ask("list", at: path, patienceMilliseconds: patienceMilliseconds) else { return [] }
        do { return try JSONDecoder().decode([SharedDiskReport].self, from: Data(answer.utf8)) } catch {
            throw QuireError(.invalid, "quired's answer is not understood: it is of another version", cause: error)
        }
    }

    /// Has quired carry out a command on one of them; returns its answer.
    public static func ask(_ command: TmemCommand, of disk: String, patienceMilliseconds: Int32) throws(QuireError) -> String {
        guard let answer = try SharedDiskCommand.ask("\(disk) \(command.request)", at: path, patienceMilliseconds: patienceMilliseconds)
        else { throw unknown(disk) }
        return answer
    }

    /// Where quired of this user serves them.
    public static var path: String { SharedDiskClient.path(besideStore: StoreLink.standardPath()) }
}
