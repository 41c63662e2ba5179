import CQuireLayout
import Logging
import PageContent
import Platform
import StoreProtocol
import Synchronization

/// The host's page store: every share group's pages, and the VMs that use them. No sockets; any number of threads.
///
/// What must outlive this process is parked before it is relied on: a store and its table, a VM's ledger and its life.
/// Everything else (counts, index, candidates) follows from these.
public final class PageStore: Sendable {
    public struct Configuration: Sendable {
        /// Slots that all stores may have together.
        public var limitPages: Int
        /// For contents that were seen once: the most that may become of it.
        public var candidateBytes: Int
        /// What that should be on this host: see `Candidates`.
        public static var usualCandidateBytes: Int { Candidates.byteCount(forHost: ProcessCalls.memoryBytes) }
        /// VMs at once; at most 4095.
        public var maxMachines = 1024
        /// Of one user who is not root.
        public var maxMachinesPerUser = 256
        /// Share groups besides the owners' own, and the users that may put VMs there. Root may always.
        public var groups: [String: Set<UInt32>] = [:]
        /// See `Reserve`.
        public var reservePercent = 100

        public init(limitPages: Int, candidateBytes: Int) throws(QuireError) {
            guard limitPages > 0, limitPages < Int(QUIRE_STORE_SLOT_LIMIT) else {
                throw QuireError(.invalid, "a store limit of \(limitPages) pages: choose 4 KiB to 8 TiB")
            }
            self.limitPages = limitPages
            self.candidateBytes = candidateBytes
        }
    }

    /// Shares by group and node, VMs by number.
    private struct Registry {
        var shares: [String: Share] = [:]
        var machines: [Int: Machine] = [:]
        /// Numbers of VMs whose backend is connected.
        var connected: Set<Int> = []
    }

    private static let machineLimit = 4096
    private let configuration: Configuration
    /// Share groups, and who may be in them.
    private let groups: Mutex<[String: Set<UInt32>]>
    private let parking: any Parking
    private let logger: Logger
    private let seams: StoreSeams
    private let budget: SlotBudget
    private let reserve: Reserve
    private let counters = StoreCounters()
    private let candidates: Candidates
    private let registry = Mutex(Registry())
    /// Held while somebody joins or leaves: so one VM is admitted or ended at a time. Never taken inside of `registry`.
    private let comings = Mutex(())

    public convenience init(
        _ configuration: Configuration, logger: Logger
    ) throws(QuireError) { try self.init(configuration, parking: NoParking(), parked: [], logger: logger) }

    /// With a keeper, from which it takes over what an earlier quired parked.
    public convenience init(
        _ configuration: Configuration, keeper: KeeperLink, logger: Logger
    ) throws(QuireError) { try self.init(configuration, parking: keeper, parked: keeper.parked, logger: logger) }

    /// Takes over what an earlier process parked.
    package init(
        _ configuration: Configuration, parking: any Parking, parked: [ParkedItem], logger: Logger,
        seams: StoreSeams = StoreSeams()
    ) throws(QuireError) {
        self.configuration = configuration
        groups = Mutex(configuration.groups)
        self.parking = parking
        self.logger = logger
        self.seams = seams
        budget = SlotBudget(configuration.limitPages)
        reserve = Reserve(percent: configuration.reservePercent, available: seams.availableBytes)
        candidates = try Candidates(byteCount: configuration.candidateBytes)
        restore(parked)
    }

    // MARK: - While it works

    /// From now on. What is shared stays, also above it.
    public func setLimit(pages: Int) { budget.setLimit(pages) }
    /// See `Reserve`.
    public func setReserve(percent: Int) { reserve.setPercent(percent) }
    /// Who joins from now on has to be in one of these. VMs that are in a group that is gone, or whose user is out of it, stay as long as
    /// their backends do.
    public func setGroups(_ new: [String: Set<UInt32>]) { groups.withLock { $0 = new } }

    // MARK: - After quired was killed

    private static let sharePrefix = "share-", machinePrefix = "vm-"
    private static func shareItem(_ id: UInt64) -> String { sharePrefix + String(id, radix: 16) }
    private static func machineItem(_ number: Int) -> String { machinePrefix + String(number) }
    private static func key(_ group: String, _ node: Int) -> String { "\(group) \(node)" }

    private func restore(_ parked: [ParkedItem]) {
        var byID: [UInt64: Share] = [:]
        for item in parked where item.name.hasPrefix(Self.sharePrefix) {
            do throws(QuireError) {
                guard let store = item.descriptors.next(), let table = item.descriptors.next() else {
                    throw QuireError(.invalid, "a store was parked without its table")
                }
                let share = try Share(store: store, table: table, budget: budget, counters: counters)
                byID[share.table.storeID] = share
            } catch {
                logger.error("a store is lost, its VMs go on with what they map: \(error)")
                parking.unpark(item.name)
            }
        }
        var machines: [Int: Machine] = [:]
        for item in parked where item.name.hasPrefix(Self.machinePrefix) {
            do throws(QuireError) {
                guard let descriptor = item.descriptors.next(), let life = item.descriptors.next() else {
                    throw QuireError(.invalid, "a ledger was parked without its VM's life")
                }
                let ledger = try Ledger(descriptor)
                guard !ledger.hasEnded else {
                    parking.unpark(item.name)
                    continue
                }
                guard let share = byID[ledger.identity.storeID] else {
                    logger.error("a VM is forgotten, it goes on with what it maps: the store of '\(ledger.identity.name)' was not parked")
                    parking.unpark(item.name)
                    continue
                }
                let machine = Machine(ledger: ledger, life: life, share: share, seams: seams)
                try machine.recount()
                machines[machine.number] = machine
            } catch {
                // What it maps is unknown, and slots that nobody is known to map would be given away: so no store is gone on with.
                logger.error("a VM's ledger cannot be read: beginning anew, VMs go on with what they map: \(error)")
                for item in parked where item.name.hasPrefix(Self.sharePrefix) || item.name.hasPrefix(Self.machinePrefix) {
                    parking.unpark(item.name)
                }
                return
            }
        }
        for share in byID.values { share.finishRecount() }
        registry.withLock { registry in
            for share in byID.values { registry.shares[Self.key(seams.shareKey(share.group), share.node)] = share }
            registry.machines = machines
        }
        for share in byID.values { forgetIfUnused(share) }
        if !byID.isEmpty { logger.notice("took over \(byID.count) stores and \(machines.count) VMs") }
    }

    // MARK: - VMs come

    /// A backend says which VM it works for. The same page map as before: the same VM, which comes back.
    package func admit(
        _ hello: StoreRequest.Hello, uid: UInt32, map: consuming Descriptor, life: consuming Descriptor
    ) throws(QuireError) -> (machine: Machine, welcome: StoreReply.Welcome) {
        try Self.checkVersion(hello)
        guard isStoreName(hello.name) else {
            throw QuireError(.invalid, "a VM's name has 1 to 63 of A-Z a-z 0-9 . _ - and no dot in front")
        }
        let group = try self.group(hello.group, uid: uid)
        guard Int(hello.node) < Nodes.count else {
            throw QuireError(.invalid, "there is no NUMA node \(hello.node) here: choose 0...\(Nodes.count - 1)")
        }
        try Self.checkLife(life.raw)
        let map = try ForeignPageMap(map)
        let machine = try enter(hello.name, group, Int(hello.node), uid, map, life)
        do throws(QuireError) {
            let (kept, dropped, unknown) = try machine.reconcile(map)
            var welcome = StoreReply.Welcome()
            welcome.store = UInt32(machine.share.node)
            welcome.storeID = machine.share.table.storeID
            welcome.slots = UInt64(machine.share.table.slotLimit)
            welcome.keptPages = kept
            welcome.droppedPages = dropped
            welcome.unknownPages = unknown
            welcome.secret = machine.share.hasher.secret
            return (machine, welcome)
        } catch {
            disconnect(machine)
            throw error
        }
    }

    package static func checkVersion(_ hello: StoreRequest.Hello) throws(QuireError) {
        guard hello.version == QUIRE_STORE_VERSION else {
            throw QuireError(
                .unsupported, "the backend speaks version \(hello.version) of the page store's protocol and quired "
                    + "version \(QUIRE_STORE_VERSION): install the same release of both")
        }
    }

    /// Whether VMs can be of this group.
    package func knows(group name: String) -> Bool { groups.withLock { Self.knows(group: name, among: $0) } }
    package static func knows(group name: String, among groups: [String: Set<UInt32>]) -> Bool {
        groups[name] != nil || name.hasPrefix("owner-") && UInt32(name.dropFirst(6)) != nil
    }

    /// The group that a user's VM is of, which it has named or not.
    package func group(_ name: String, uid: UInt32) throws(QuireError) -> String {
        if name.isEmpty || name == Self.ownGroup(uid) { return Self.ownGroup(uid) }
        guard isStoreName(name), let users = groups.withLock({ $0[name] }) else {
            throw QuireError(
                .invalid, "there is no share group '\(name.prefix(64))': name it to quired with --group, or leave it out")
        }
        guard uid == 0 || users.contains(uid) else {
            throw QuireError(
                .invalid, "user \(uid) is not in share group '\(name)': add it to quired's --group, or leave the group out")
        }
        return name
    }

    /// Names of groups that may be configured: not those that users have of themselves.
    public static func isGroupName(_ name: String) -> Bool { isStoreName(name) && !name.hasPrefix("owner-") }

    /// The group of everything that one user owns.
    package static func ownGroup(_ uid: UInt32) -> String { "owner-\(uid)" }

    /// A pidfd or a pipe: what ends by itself, and cannot keep anyone waiting.
    private static func checkLife(_ raw: Int32) throws(QuireError) {
        if let info = try? Files.read("/proc/self/fdinfo/\(raw)", limit: 4096), info.contains("\nPid:\t") { return }
        if let target = Files.target(ofLink: "/proc/self/fd/\(raw)"), target.hasPrefix("pipe:") { return }
        throw QuireError(.invalid, "the VM's life is neither a pidfd nor a pipe")
    }

    private func enter(
        _ name: String, _ group: String, _ node: Int, _ uid: UInt32, _ pageMap: borrowing ForeignPageMap,
        _ life: consuming Descriptor
    ) throws(QuireError) -> Machine {
        let owned = life
        let map = try pageMap.identity
        return try comings.withLock { (_) throws(QuireError) -> Machine in
            try leaveOthers(than: group, uid, pageMap)
            let same = registry.withLock { registry in
                registry.machines.values.first { $0.name == name && $0.share.group == group }
            }
            if let same {
                if same.isOver {
                    try leave(same)
                } else {
                    guard same.mapIdentity == map, same.uid == uid else {
                        throw QuireError(
                            .busy, "the VM '\(name)' is running already in share group '\(group)': choose another name")
                    }
                    guard registry.withLock({ $0.connected.insert(same.number).inserted }) else {
                        throw QuireError(.busy, "another backend is connected for the VM '\(name)'")
                    }
                    return same
                }
            }
            let number = try registry.withLock { (registry) throws(QuireError) -> Int in
                let own = registry.machines.values.count { $0.uid == uid }
                guard uid == 0 || own < configuration.maxMachinesPerUser else {
                    throw QuireError(.busy, "user \(uid) has \(own) VMs already, as many as may be")
                }
                let most = min(configuration.maxMachines, Self.machineLimit - 1)
                guard registry.machines.count < most,
                    let number = (1..<Self.machineLimit).first(where: { registry.machines[$0] == nil })
                else { throw QuireError(.busy, "there are \(registry.machines.count) VMs already, as many as may be") }
                return number
            }
            let share = try self.share(group, node)
            do throws(QuireError) {
                let ledger = try Ledger(
                    Ledger.makeFile(
                        Ledger.Identity(
                            name: name, machine: number, uid: uid, storeID: share.table.storeID, map: map)))
                let life = try owned.duplicate()
                try parking.park(Self.machineItem(number), [ledger.descriptor.raw, life.raw])
                let machine = Machine(ledger: ledger, life: life, share: share, seams: seams)
                registry.withLock { registry in
                    registry.machines[number] = machine
                    registry.connected.insert(number)
                }
                logger.info("VM '\(name)' joins share group '\(group)'")
                return machine
            } catch {
                forgetIfUnused(share)
                throw error
            }
        }
    }

    /// A VM is in one group. It goes to another when it maps nothing of the first one, so that no slot number of the one is ever read as
    /// one of the other. Inside of `comings`.
    private func leaveOthers(than group: String, _ uid: UInt32, _ map: borrowing ForeignPageMap) throws(QuireError) {
        let identity = try map.identity
        for machine in machines where machine.mapIdentity == identity && machine.share.group != group {
            if !machine.isOver {
                // What lasts is no reason to ask again at once.
                guard machine.uid == uid else { throw QuireError(.invalid, "this page map is of a VM of user \(machine.uid)") }
                guard registry.withLock({ !$0.connected.contains(machine.number) }) else {
                    throw QuireError(.busy, "another backend is connected for the VM, in share group '\(machine.share.group)'")
                }
                guard try machine.reconcile(map).kept == 0 else {
                    throw QuireError(
                        .invalid, "it still shares pages in share group '\(machine.share.group)': quire unmerge \(machine.name), then quire merge \(machine.name)")
                }
            }
            try leave(machine)
        }
    }

    /// Inside of `comings`.
    private func share(_ group: String, _ node: Int) throws(QuireError) -> Share {
        let key = Self.key(seams.shareKey(group), node)
        if let share = registry.withLock({ $0.shares[key] }) { return share }
        // All files are sparse, and the budget says how much of them may be used: there is room for a limit that is raised, up to
        // the host's memory.
        let slots = min(max(budget.limit, ProcessCalls.memoryBytes / StoreFile.slotBytes) + 1, Int(QUIRE_STORE_SLOT_LIMIT))
        let store = try StoreFile.makeFile(slots: slots)
        let table = try SlotTable.makeFile(group: group, node: node, slots: slots)
        let raw = [store.raw, table.raw]
        let share = try Share(store: store, table: table, budget: budget, counters: counters)
        try parking.park(Self.shareItem(share.table.storeID), raw)
        registry.withLock { $0.shares[key] = share }
        return share
    }

    // MARK: - VMs go

    /// The backend is gone. The VM may go on, and keeps what it has.
    package func disconnect(_ machine: Machine) {
        // Nor is its memory looked at for others any more: the next connection says where it is.
        machine.setMemory(nil)
        registry.withLock { registry in
            if registry.machines[machine.number] === machine { registry.connected.remove(machine.number) }
        }
    }

    /// The VM's life is over.
    package func end(_ machine: Machine) throws(QuireError) {
        try comings.withLock { (_) throws(QuireError) in
            guard registry.withLock({ $0.machines[machine.number] === machine }) else { return }
            try leave(machine)
        }
    }

    /// Inside of `comings`.
    private func leave(_ machine: Machine) throws(QuireError) {
        try machine.end()
        candidates.forget(machine: machine.number)
        parking.unpark(Self.machineItem(machine.number))
        registry.withLock { registry in
            registry.machines[machine.number] = nil
            registry.connected.remove(machine.number)
        }
        logger.info("VM '\(machine.name)' has left share group '\(machine.share.group)'")
        forgetIfUnused(machine.share)
    }

    /// A share without a VM has no page either.
    private func forgetIfUnused(_ share: Share) {
        let isUnused = registry.withLock { registry in
            guard !registry.machines.values.contains(where: { $0.share === share }) else { return false }
            registry.shares[Self.key(seams.shareKey(share.group), share.node)] = nil
            return true
        }
        if isUnused { parking.unpark(Self.shareItem(share.table.storeID)) }
    }

    /// All VMs, connected or not.
    package var machines: [Machine] { registry.withLock { Array($0.machines.values) } }

    // MARK: - Work

    package func lookUp(_ machine: Machine, _ lookup: StoreRequest.Lookup, scratch: borrowing Mapping)
        throws(QuireError) -> [SlotRun]
    {
        try machine.lookUp(
            lookup, machines: { number in self.registry.withLock { $0.machines[number] } }, candidates: candidates,
            scratch: scratch)
    }

    /// To read into while looking up, one a thread: copies of pages, and what they are compared with.
    package static func makeScratch() throws(QuireError) -> Mapping {
        try Mapping(anonymousByteCount: 2 * StoreFile.offset(Share.promotedAtOnce))
    }

    /// The store, for the VM's side: read-only, and its own open file.
    package static func readOnlyStore(of machine: Machine) throws(QuireError) -> Descriptor {
        try machine.share.store.descriptor.reopenedReadOnly()
    }

    /// See `Reserve`.
    package var lackingBytes: UInt64 {
        reserve.lackingBytes {
            registry.withLock { Array($0.machines.values) }.reduce(0) { $0 + $1.lentPages }
        }
    }

    // MARK: - Figures

    /// How many ledger entries of all VMs in the machine's share have a slot.
    package func useCount(of slot: UInt32, in machine: Machine) -> Int { Int(machine.share.count(of: slot)) }
    package func allocatorSteps(of machine: Machine) -> Int { machine.share.allocatorSteps }

    /// Of the share that a machine is in, or of the host.
    package func figures(of machine: Machine?) -> StoreFigures {
        let (shares, machines) = registry.withLock { registry in
            (
                machine.map { [$0.share] } ?? Array(registry.shares.values),
                registry.machines.values.filter { machine == nil || $0.share === machine!.share }
            )
        }
        var figures = self.figures(shares, machines)
        figures.full = counters.full.load(ordering: .relaxed)
        figures.lackingBytes = lackingBytes
        guard machine == nil else { return figures }
        figures.candidateBytes = UInt64(candidates.byteCount)
        figures.promotions = counters.promotions.load(ordering: .relaxed)
        figures.hits = counters.hits.load(ordering: .relaxed)
        figures.stale = counters.stale.load(ordering: .relaxed)
        return figures
    }

    /// Of each share, by the names of their groups.
    package func groupFigures() -> [GroupFigures] {
        let (shares, machines) = registry.withLock { ($0.shares.sorted { $0.key < $1.key }.map(\.value), Array($0.machines.values)) }
        return shares.map { share in
            GroupFigures(
                name: share.group, node: UInt32(share.node),
                figures: figures([share], machines.filter { $0.share === share }))
        }
    }

    private func figures(_ shares: [Share], _ machines: [Machine]) -> StoreFigures {
        var figures = StoreFigures()
        figures.machines = UInt64(machines.count)
        for machine in machines {
            let own = machine.figures
            figures.heldPages += UInt64(own.held)
            figures.sharingPages += UInt64(own.merged)
            figures.ledgerBytes += own.ledgerBytes
        }
        for share in shares {
            let used = UInt64(share.usedSlots)
            figures.sharedPages += used
            figures.storeBytes += share.store.allocatedBytes
            figures.indexBytes += share.indexBytes
            share.forEachCount { figures.histogram[31 - $0.leadingZeroBitCount] += 1 }
        }
        let saved = figures.sharingPages > figures.sharedPages ? figures.sharingPages - figures.sharedPages : 0
        figures.savedBytes = saved * UInt64(StoreFile.slotBytes)
        figures.limitPages = UInt64(budget.limit)
        return figures
    }
}
