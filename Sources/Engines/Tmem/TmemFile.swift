import Glibc
import PageContent
import Platform

/// The memory file of a store, and what lies where in it.
///
/// Everything that must survive us is here and nowhere else, in areas of fixed size. The file is sparse: its size costs
/// nothing, and memory comes with use. Sealed against changes of its size, so that no access of ours can raise SIGBUS.
///
///     0          header                   4096 bytes
///     4096       pool table               1024 pools of 256 bytes; pool 0 is none
///     1 MiB      leaf heads               2^26 of 16 bytes; leaf 0 is none
///     …          leaf slots               2^26 of 64 bytes: 16 content numbers, 0 for no page
///     …          contents                 2^28 of 16 bytes; content 0 is none
///     …          slab classes             2^24 bytes
///     …          slabs                    2^24 of 64 KiB
///
/// What a kill at any instant leaves behind is whole because every change becomes visible by one aligned store, after
/// everything it refers to has been written: a killed process loses no store that it made, and none overtakes another
/// (release stores). Nothing that no leaf names counts; a start finds it and uses it again (`TmemRecovery`).
final class TmemFile: Sendable {
    static let magic: [UInt8] = Array("QUIRETM\n".utf8)
    static let version: UInt32 = 1
    static let poolLimit = 1024, poolBytes = 256
    static let leafLimit = 1 << 26, contentLimit = 1 << 28, slabLimit = 1 << 24
    static let slabBytes = 65536
    /// Metadata grows by so much at a time.
    static let extentBytes = 65536

    // A file of before cap and frozen were there has zeros for them.
    private static let versionAt = 8, leavesAt = 12, contentsAt = 16, slabsAt = 20, storeCapAt = 24, frozenAt = 32, secretAt = 64
    private static let poolsAt = 4096
    private static let headsAt = 1 << 20
    private static let slotsAt = headsAt + leafLimit * 16
    private static let contentAt = slotsAt + leafLimit * 64
    private static let classesAt = contentAt + contentLimit * 16
    private static let dataAt = classesAt + slabLimit
    static let byteCount = dataAt + slabLimit * slabBytes

    private let descriptor: Descriptor
    /// The same file, opened once more for this process alone: its lock ends with the process, whoever keeps duplicates of the
    /// other.
    private let lock: Descriptor
    private let mapping: Mapping
    // Views of the mapping, which this object keeps.
    let heads: MappedBytes
    let slots: MappedBytes
    let contents: MappedBytes
    let classes: MappedBytes
    let data: MappedBytes
    let hasher: PageHasher

    static func make(name: String) throws(QuireError) -> Descriptor {
        let hasher = try PageHasher.random()
        let file = try Memfd(name: name, byteCount: UInt64(byteCount)).takeDescriptor()
        let header = try Mapping(file, byteCount: 4096)
        header.store32(versionAt, version)
        // Number 0 is none.
        for field in [leavesAt, contentsAt, slabsAt] { header.store32(field, 1) }
        header.copyIn(secretAt, hasher.secret)
        header.copyIn(0, magic)
        return file
    }

    init(_ descriptor: consuming Descriptor) throws(QuireError) {
        guard let status = try? descriptor.status(), status.byteCount == UInt64(Self.byteCount) else {
            throw QuireError(.invalid, "this is no store of transcendent memory, or one of another version: its size is wrong")
        }
        lock = try Self.lock(descriptor.raw)
        mapping = try Mapping(descriptor, byteCount: Self.byteCount)
        mapping.excludeFromDumps()
        mapping.refuseHugePages()
        guard mapping.copyOut(0, count: 8) == Self.magic else {
            throw QuireError(.invalid, "this is no store of transcendent memory: its first bytes are wrong")
        }
        let found = mapping.load32(Self.versionAt)
        guard found == Self.version else {
            throw QuireError(
                .invalid, "this store of transcendent memory has version \(found), and this program knows \(Self.version)")
        }
        for (field, limit) in [
            (Self.leavesAt, Self.leafLimit), (Self.contentsAt, Self.contentLimit), (Self.slabsAt, Self.slabLimit),
        ] {
            guard (1...limit).contains(Int(mapping.load32(field))) else {
                throw QuireError(.invalid, "the store of transcendent memory is damaged: its header names impossible sizes")
            }
        }
        hasher = PageHasher(secret: mapping.copyOut(Self.secretAt, count: PageHasher.secretBytes))
        // Sound: this object keeps the mapping, and whoever uses the views keeps this object.
        unsafe heads = mapping.view(Self.headsAt, count: Self.leafLimit * 16)
        unsafe slots = mapping.view(Self.slotsAt, count: Self.leafLimit * 64)
        unsafe contents = mapping.view(Self.contentAt, count: Self.contentLimit * 16)
        unsafe classes = mapping.view(Self.classesAt, count: Self.slabLimit)
        unsafe data = mapping.view(Self.dataAt, count: Self.slabLimit * Self.slabBytes)
        self.descriptor = descriptor
    }

    /// A process that was killed is gone soon: its memory is taken apart first, its descriptors are closed then.
    private static func lock(_ raw: Int32) throws(QuireError) -> Descriptor {
        let own = try Descriptor.open("/proc/self/fd/\(raw)", O_RDWR)
        let deadline = monotonicNanoseconds() + 3_000_000_000
        while flock(own.raw, LOCK_EX | LOCK_NB) != 0 {
            guard monotonicNanoseconds() < deadline else {
                throw QuireError(.busy, "another process has this store of transcendent memory open")
            }
            ProcessCalls.sleep(milliseconds: 2)
        }
        return own
    }

    // MARK: - How far the areas are in use: every number below

    var leafCount: UInt32 {
        get { mapping.load32(Self.leavesAt) }
        set { mapping.store32(Self.leavesAt, newValue) }
    }
    var contentCount: UInt32 {
        get { mapping.load32(Self.contentsAt) }
        set { mapping.store32(Self.contentsAt, newValue) }
    }
    var slabCount: UInt32 {
        get { mapping.load32(Self.slabsAt) }
        set { mapping.store32(Self.slabsAt, newValue) }
    }

    // MARK: - What an operator has set for the whole store

    /// The cap in bytes, `.max` for none; nil: nobody has set one, and the configuration has the say.
    var cap: UInt64? {
        get {
            let word = mapping.load64(Self.storeCapAt)
            return word == 0 ? nil : word
        }
        set { mapping.store64(Self.storeCapAt, newValue ?? 0) }
    }
    var isFrozen: Bool {
        get { mapping.load32(Self.frozenAt) != 0 }
        set { mapping.store32(Self.frozenAt, newValue ? 1 : 0) }
    }

    // MARK: - Memory

    func populateLeaves(_ leaves: Range<Int>) throws(QuireError) {
        try mapping.populate(Self.headsAt + leaves.lowerBound * 16, count: leaves.count * 16)
        try mapping.populate(Self.slotsAt + leaves.lowerBound * 64, count: leaves.count * 64)
    }
    func populateContents(_ contents: Range<Int>) throws(QuireError) {
        try mapping.populate(Self.contentAt + contents.lowerBound * 16, count: contents.count * 16)
    }
    func populateSlab(_ slab: UInt32) throws(QuireError) {
        try mapping.populate(Self.dataAt + Int(slab) * Self.slabBytes, count: Self.slabBytes)
    }

    /// Gives the memory of slabs back to the host.
    func punch(slabs: Range<UInt32>) {
        // It fails only when the kernel has no memory for the bookkeeping. Then the memory stays until the slab is used again.
        try? Memfd.punch(
            descriptor.raw, offset: UInt64(Self.dataAt + Int(slabs.lowerBound) * Self.slabBytes),
            byteCount: UInt64(slabs.count * Self.slabBytes))
    }

    /// The next slabs at or after this one that have memory.
    func slabsWithMemory(from slab: UInt32, to end: UInt32) -> Range<UInt32>? {
        let base = UInt64(Self.dataAt), bytes = UInt64(Self.slabBytes)
        guard
            let found = Memfd.nextData(
                descriptor.raw, from: base + UInt64(slab) * bytes, to: base + UInt64(end) * bytes)
        else { return nil }
        return UInt32((found.lowerBound - base) / bytes)..<UInt32((found.upperBound - base + bytes - 1) / bytes)
    }

    /// What the file takes of the host's memory, as the kernel says.
    var allocatedBytes: UInt64 { (try? descriptor.status().allocatedBytes) ?? 0 }

    // MARK: - Pool table

    enum PoolState: UInt32 {
        case free = 0
        case live = 1
        /// Its pages are being taken away; what is left of them no longer counts.
        case dying = 2
    }

    struct PoolEntry: Equatable {
        var attributes: TmemPool.Attributes
        var weight: UInt32
        var cap: UInt64?
    }

    // In an entry: state, kind, scope, weight, capacity, cap (all ones: none), name, client.
    private static let stateAt = 0, kindAt = 4, scopeAt = 5, weightAt = 8, capacityAt = 16, capAt = 24, nameAt = 64, clientAt = 128
    private static func at(_ pool: UInt16) -> Int { poolsAt + Int(pool) * poolBytes }

    func poolState(_ pool: UInt16) -> PoolState? { PoolState(rawValue: mapping.load32(Self.at(pool) + Self.stateAt)) }
    func setPoolState(_ pool: UInt16, _ state: PoolState) { mapping.store32(Self.at(pool) + Self.stateAt, state.rawValue) }

    /// A pool is there from the moment its state says so: everything else is written before.
    func makePool(_ pool: UInt16, _ entry: PoolEntry) {
        let at = Self.at(pool)
        mapping.store8(at + Self.kindAt, entry.attributes.kind.rawValue)
        mapping.store8(at + Self.scopeAt, entry.attributes.scope.rawValue)
        mapping.store64(at + Self.capacityAt, entry.attributes.capacityPages ?? .max)
        mapping.storeText(at + Self.nameAt, capacity: 64, entry.attributes.name)
        mapping.storeText(at + Self.clientAt, capacity: 64, entry.attributes.client)
        setWeight(pool, entry.weight)
        setCap(pool, entry.cap)
        setPoolState(pool, .live)
    }

    func setWeight(_ pool: UInt16, _ weight: UInt32) { mapping.store32(Self.at(pool) + Self.weightAt, weight) }
    func setCap(_ pool: UInt16, _ cap: UInt64?) { mapping.store64(Self.at(pool) + Self.capAt, cap ?? .max) }

    func poolEntry(_ pool: UInt16) -> PoolEntry? {
        let at = Self.at(pool)
        let name = mapping.loadText(at + Self.nameAt, capacity: 64)
        let client = mapping.loadText(at + Self.clientAt, capacity: 64)
        let capacity = mapping.load64(at + Self.capacityAt), cap = mapping.load64(at + Self.capAt)
        let weight = mapping.load32(at + Self.weightAt)
        guard let kind = TmemPool.Kind(rawValue: mapping.load8(at + Self.kindAt)),
            let scope = TmemPool.Scope(rawValue: mapping.load8(at + Self.scopeAt)),
            !name.isEmpty, !client.isEmpty, weight > 0
        else { return nil }
        return PoolEntry(
            attributes: TmemPool.Attributes(
                kind: kind, scope: scope, name: name, client: client, capacityPages: capacity == .max ? nil : capacity),
            weight: weight, cap: cap == .max ? nil : cap)
    }
}
