import FoundationEssentials
import Platform

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

        init(_ page: TmemSnapshot) {
            state = !page.isPresent ? .off : page.isFrozen ? .frozen : .active
            reason = page.reason
            usedBytes = page.usedBytes
            metadataBytes = page.metadataBytes
            capBytes = page.capBytes
            pools = page.pools.map(Pool.init)
        }
    }
}
