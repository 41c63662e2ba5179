import Engines
import Logging
import Platform
import StoreProtocol

/// The disks that several VMs share: each a persistent, shared pool of transcendent memory in a store of its own, whose file
/// is parked before anything is promised of it.
public final class SharedDisks: Sendable {
    public struct Disk: Sendable, Equatable {
        public let name: String
        public let byteCount: UInt64
        /// The share group whose VMs may attach it.
        public let group: String

        public init(name: String, byteCount: UInt64, group: String) {
            self.name = name
            self.byteCount = byteCount
            self.group = group
        }

        public var pages: UInt64 { byteCount / 4096 }
    }

    public static func isDiskName(_ name: String) -> Bool { isStoreName(name) && name.utf8.count <= 32 }

    /// One disk that is served.
    public final class Shared: Sendable {
        public let disk: Disk
        public let store: Tmem
        public let pool: TmemPool
        /// Names the content: a store that begins anew has another one.
        let id: UInt64
        public var content: String { String(id, radix: 16) }

        init(_ disk: Disk, _ store: Tmem) throws(QuireError) {
            self.disk = disk
            self.store = store
            // The pool's name carries the id. A pool is made whole or not at all.
            if let pool = store.pools.first {
                let parts = pool.name.split(separator: " ")
                guard parts.count == 2, parts[0] == disk.name, let id = UInt64(parts[1], radix: 16) else {
                    throw QuireError(.invalid, "the parked store of the shared disk '\(disk.name)' is of something else")
                }
                guard pool.attributes.capacityPages == disk.pages else {
                    throw QuireError(
                        .invalid, "the shared disk '\(disk.name)' has \((pool.attributes.capacityPages ?? 0) * 4096) bytes already: give that size")
                }
                guard pool.attributes.client == disk.group else {
                    throw QuireError(.invalid, "the shared disk '\(disk.name)' is for the group '\(pool.attributes.client)' already: give that group")
                }
                self.pool = pool
                self.id = id
            } else {
                id = UInt64.random(in: 1 ... .max)
                pool = try store.createPool(
                    TmemPool.Attributes(
                        kind: .persistent, scope: .shared, name: "\(disk.name) \(String(id, radix: 16))", client: disk.group,
                        capacityPages: disk.pages))
            }
        }

        /// `scratch`: a page of this thread's own: a client may write to the window while we read it.
        func carryOut(
            _ request: SharedDiskMessage.Request, window: borrowing Mapping, scratch: inout [UInt8]
        ) throws(QuireError) -> SharedDiskMessage.Status {
            let first = UInt32(request.page)
            let size = SharedDiskMessage.pageBytes
            switch request.operation {
            case .put:
                for number in 0..<Int(request.count) {
                    window.copyOut(number * size, count: size, to: &scratch, at: 0)
                    do throws(QuireError) { try pool.putOnDisk(0, first + UInt32(number), unsafe scratch.span.bytes) } catch {
                        guard error.code == .noSpace else { throw error }
                        return .noSpace
                    }
                }
            case .get:
                for number in 0..<Int(request.count) {
                    var span = scratch.mutableSpan
                    var bytes = unsafe span.mutableBytes
                    let isThere: Bool
                    do throws(QuireError) { isThere = try pool.get(0, first + UInt32(number), into: &bytes) } catch {
                        // Damaged, and no other connection would find it better.
                        guard error.code == .invalid else { throw error }
                        return .damaged
                    }
                    window.copyIn(number * size, isThere ? scratch : Self.zeros)
                }
            case .flush: pool.flush(0, pages: first..<first + request.count)
            }
            return .done
        }

        private static let zeros = [UInt8](repeating: 0, count: SharedDiskMessage.pageBytes)
    }

    let disks: [String: Shared]
    private let store: PageStore

    private static func item(_ name: String) -> String { "disk-" + name }

    /// Whether a disk is parked, in use or not.
    package static func isParked(_ name: String, _ keeper: KeeperLink) -> Bool { keeper.parked.contains { $0.name == item(name) } }
    /// Throws why the host would have none of another store.
    package static func checkRoom() throws(QuireError) { _ = try Tmem(Tmem.makeFile(name: "quire-disk-check")) }

    /// Throws what is wrong in a list of disks. `earlier`: those that there are already. VMs that have one would lose it if it went or
    /// became another group's, and no disk changes its size.
    package static func check(_ wanted: [Disk], earlier: [Disk] = [], knows: (_ group: String) -> Bool) throws(QuireError) {
        for (index, disk) in wanted.enumerated() {
            guard !wanted[..<index].contains(where: { $0.name == disk.name }) else {
                throw QuireError(.invalid, "the shared disk '\(disk.name)' is given twice")
            }
            guard knows(disk.group) else {
                throw QuireError(.invalid, "the shared disk '\(disk.name)' is for the group '\(disk.group)', which there is not: name it with --group")
            }
        }
        for old in earlier {
            guard let new = wanted.first(where: { $0.name == old.name }) else {
                throw QuireError(.invalid, "the shared disk '\(old.name)' is there as long as quired's keeper is: name it again")
            }
            guard new.byteCount == old.byteCount else {
                throw QuireError(.invalid, "the shared disk '\(old.name)' has \(old.byteCount) bytes already: give that size")
            }
            guard new.group == old.group else {
                throw QuireError(.invalid, "the shared disk '\(old.name)' is for the group '\(old.group)' already: give that group")
            }
        }
    }

    /// Takes over what an earlier process parked, and makes what is not there yet. `store`: knows the groups. `reserve`: bytes that the
    /// host is to have left, whatever is written. `ledger`: of what all stores of the host may use.
    public init(
        _ wanted: [Disk], reserve: UInt64 = HostReserve.usualBytes, ledger: TmemLedger? = nil, store: PageStore, keeper: KeeperLink?,
        logger: Logger
    ) throws(QuireError) {
        try Self.check(wanted) { store.knows(group: $0) }
        var disks: [String: Shared] = [:]
        for disk in wanted {
            let item = Self.item(disk.name)
            func open(_ file: consuming Descriptor) throws(QuireError) -> Tmem {
                // No VM has a name like this.
                try Tmem(file, .init(reserve: reserve), quota: ledger?.quota(of: "shared:" + disk.name))
            }
            if let parked = keeper?.takeParked(item) {
                let store = try open(parked)
                // One of an earlier list, which nobody served since, may be another. It is kept, and the others are served. Whatever else
                // is wrong may pass: guests wait, and the keeper tries again.
                do throws(QuireError) { disks[disk.name] = try Shared(disk, store) } catch {
                    guard error.code == .invalid else { throw error }
                    logger.error("the shared disk '\(disk.name)' is not served: \(error)")
                }
                continue
            }
            let file = try Tmem.makeFile(name: "quire-disk-\(disk.name)")
            let parked = try file.duplicate()
            // Not parked before it is known that it can be had.
            let store = try open(file)
            try keeper?.park(item, [parked.raw])
            if keeper == nil {
                logger.warning("what is on the shared disk '\(disk.name)' dies with this process: start quired with --keep")
            }
            disks[disk.name] = try Shared(disk, store)
            logger.notice("shared disk '\(disk.name)': \(disk.byteCount >> 20) MiB for group '\(disk.group)'")
        }
        self.disks = disks
        self.store = store
        // Before anybody is given what they use.
        reviewQuota()
    }

    public var isEmpty: Bool { disks.isEmpty }

    /// From now on.
    public func setReserve(_ bytes: UInt64) { for shared in disks.values { shared.store.setReserve(bytes) } }

    /// Now and then: what the ledger allows them, and they don't use, goes back.
    public func reviewQuota() { for shared in disks.values { shared.store.reviewQuota() } }

    /// Those that a user may see, by name: what his VMs may attach, or all.
    public func visible(to uid: UInt32) -> [Shared] {
        let seesAll = Observers.include(uid)
        return disks.values.filter { shared in seesAll || (try? store.group(shared.disk.group, uid: uid)) != nil }
            .sorted { $0.disk.name < $1.disk.name }
    }

    /// The disk that a client may attach.
    func admit(_ hello: SharedDiskMessage.Hello, uid: UInt32) throws(QuireError) -> Shared {
        let group = try store.group(hello.group, uid: uid)
        // Who is not let in learns no names.
        guard let shared = disks[hello.name], shared.disk.group == group else {
            throw QuireError(.invalid, "there is no shared disk '\(hello.name.prefix(64))' for the group '\(group)': quired --shared-disk says which there are")
        }
        return shared
    }
}
