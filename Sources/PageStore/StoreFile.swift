import CQuireLayout
import Glibc
import PageContent
import Platform
import StoreProtocol

/// The pages of a share group's store on one NUMA node: a sparse memory file of slots of 4 KiB.
///
/// Only quired writes it. Everyone else gets a descriptor that was opened for reading; and the file's mode keeps every
/// other user from opening it anew through /proc. (Somebody with quired's own user or root's rights could, but could
/// trace quired just as well. A write seal would bind those too, and quired as well: it could not punch holes any more,
/// nor write after a restart.)
final class StoreFile: Sendable {
    static let slotBytes = 4096

    let descriptor: Descriptor
    let mapping: Mapping

    static func makeFile(slots: Int) throws(QuireError) -> Descriptor {
        let file = try Memfd(name: "quire-store", byteCount: UInt64(slots * slotBytes)).takeDescriptor()
        try file.setMode(0o400)
        return file
    }

    init(_ descriptor: consuming Descriptor, slots: Int, node: Int) throws(QuireError) {
        guard try descriptor.status().byteCount == UInt64(slots * Self.slotBytes) else {
            throw QuireError(.invalid, "a store's file does not have the size that its table says")
        }
        mapping = try Mapping(descriptor, byteCount: slots * Self.slotBytes)
        mapping.excludeFromDumps()
        mapping.refuseHugePages()
        Nodes.prefer(mapping, node: node)
        self.descriptor = descriptor
    }

    static func offset(_ slot: Int) -> Int { slot * slotBytes }

    /// Gives the memory of slots back to the host.
    func punch(_ slots: Range<Int>) {
        // It fails only when the kernel has no memory for the bookkeeping. Then the memory stays until the slot is used
        // and freed again: nobody reads a slot that was not written anew.
        try? Memfd.punch(
            descriptor.raw, offset: UInt64(Self.offset(slots.lowerBound)), byteCount: UInt64(Self.offset(slots.count)))
    }

    var allocatedBytes: UInt64 { (try? descriptor.status().allocatedBytes) ?? 0 }
}

extension PageHash {
    /// What is kept of it for a slot: as much as finding needs. Promotion compares all of it.
    var kept: UInt64 { low }
}

/// What must be known of a store after quired died: its group and secret, and half of the hash of each slot's content. A
/// memory file beside the store's, which nobody but quired ever sees.
@safe package final class SlotTable: Sendable {
    private typealias Header = quire_slot_table_header
    private static let headerBytes = MemoryLayout<Header>.size
    private static let entryBytes = 8
    private static func offset<T>(_ field: KeyPath<Header, T>) -> Int { MemoryLayout<Header>.offset(of: field)! }

    let descriptor: Descriptor
    private let mapping: Mapping
    let group: String
    let node: Int
    let storeID: UInt64
    /// Slots are 1 ..< slotLimit.
    let slotLimit: Int
    let hasher: PageHasher

    package static func makeFile(group: String, node: Int, slots: Int) throws(QuireError) -> Descriptor {
        let hasher = try PageHasher.random()
        let file = try Memfd(name: "quire-slots", byteCount: UInt64(headerBytes + slots * entryBytes)).takeDescriptor()
        try file.setMode(0o400)
        let mapping = try Mapping(file, byteCount: headerBytes)
        mapping.store32(offset(\.version), UInt32(QUIRE_PARKED_VERSION))
        mapping.store32(offset(\.node), UInt32(node))
        mapping.store64(offset(\.store_id), UInt64.random(in: 1 ... .max))
        mapping.store64(offset(\.slots), UInt64(slots))
        mapping.storeText(offset(\.group), capacity: 72, group)
        mapping.copyIn(offset(\.secret), hasher.secret)
        mapping.copyIn(0, Array(QUIRE_TABLE_FILE_MAGIC.utf8))
        return file
    }

    package init(_ descriptor: consuming Descriptor) throws(QuireError) {
        let size = Int(try descriptor.status().byteCount)
        guard size > Self.headerBytes else { throw QuireError(.invalid, "a store's table is too short") }
        mapping = try Mapping(descriptor, byteCount: size)
        mapping.excludeFromDumps()
        guard mapping.copyOut(0, count: 8) == Array(QUIRE_TABLE_FILE_MAGIC.utf8),
            mapping.load32(Self.offset(\.version)) == UInt32(QUIRE_PARKED_VERSION)
        else { throw QuireError(.invalid, "a store's table was written by another version") }
        slotLimit = Int(mapping.load64(Self.offset(\.slots)))
        guard slotLimit > 1, slotLimit <= Int(QUIRE_STORE_SLOT_LIMIT),
            size == Self.headerBytes + slotLimit * Self.entryBytes
        else { throw QuireError(.invalid, "a store's table does not have the size that it says") }
        group = mapping.loadText(Self.offset(\.group), capacity: 72)
        node = Int(mapping.load32(Self.offset(\.node)))
        storeID = mapping.load64(Self.offset(\.store_id))
        hasher = PageHasher(secret: mapping.copyOut(Self.offset(\.secret), count: PageHasher.secretBytes))
        self.descriptor = descriptor
    }

    /// The hashes, for the index. They live as long as this object.
    @unsafe var hashWords: UnsafePointer<UInt64> {
        unsafe UnsafePointer(
            mapping.address(Self.headerBytes, count: slotLimit * Self.entryBytes).assumingMemoryBound(to: UInt64.self))
    }

    private static func entry(_ slot: Int) -> Int { headerBytes + slot * entryBytes }

    /// Whether these slots' hashes are in one page of the file: if one of them was ever written, asking for the other
    /// does not cost memory.
    static func areNeighbours(_ one: UInt32, _ other: UInt32) -> Bool {
        entry(Int(one)) >> 12 == entry(Int(other)) >> 12
    }

    package func has(_ hash: PageHash, for slot: UInt32) -> Bool { mapping.load64(Self.entry(Int(slot))) == hash.kept }

    /// A part of a slot's hash, and of any, for those who cannot keep all of it.
    func tag(of slot: UInt32) -> UInt32 { UInt32(mapping.load64(Self.entry(Int(slot))) >> 32) }
    static func tag(of hash: PageHash) -> UInt32 { UInt32(hash.kept >> 32) }

    /// Hashes of slots from `first` on. Written by a system call: where there is no memory it fails, and raises no
    /// signal.
    package func setHashes(_ first: Int, _ hashes: ArraySlice<PageHash>) throws(QuireError) {
        var words: [UInt32] = []
        words.reserveCapacity(2 * hashes.count)
        for hash in hashes {
            words.append(UInt32(truncatingIfNeeded: hash.kept))
            words.append(UInt32(hash.kept >> 32))
        }
        try descriptor.writeWords(at: UInt64(Self.entry(first)), words[...])
    }
}
