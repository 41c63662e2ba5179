import CQuireLayout
import Platform
import StoreProtocol

/// What one VM has of its store: for each gfn nothing, or a slot, and whether the VM has said that it maps it.
///
/// The ledgers are the truth about who uses a slot. A slot is noted before the VM is told of it, and struck out only
/// when the VM gives it up or has ended; so at any instant, also right after quired was killed, everything that a VM
/// may be mapping stands here. And since no VM can write a ledger, none can give up, or add to, what another one holds.
///
/// A memory file (quire_layout.h, part 5b), read and written by system calls alone: no memory for a page is an error
/// then, where a mapping would raise a signal, and reading what was never written costs no memory.
struct Ledger: ~Copyable, Sendable {
    struct Entry: Equatable, Sendable {
        /// 0: nothing.
        var raw: UInt32
        static let none = Entry(raw: 0)
        static func held(_ slot: UInt32) -> Entry { Entry(raw: slot | QUIRE_LEDGER_HELD) }
        var isNone: Bool { raw == 0 }
        var isHeld: Bool { raw & QUIRE_LEDGER_HELD != 0 }
        var slot: UInt32 { raw & ~QUIRE_LEDGER_HELD }
        var merged: Entry { Entry(raw: slot) }
    }

    struct Identity: Equatable, Sendable {
        var name: String
        var machine: Int
        var uid: UInt32
        var storeID: UInt64
        /// Of the VM's page map, by which a backend that comes back is known.
        var map: FileStatus.Identity
    }

    private typealias Header = quire_ledger_header
    private static let headerBytes = UInt64(MemoryLayout<Header>.size)
    private static let byteCount = headerBytes + StoreRequest.gfnLimit * 4
    private static func offset<T>(_ field: KeyPath<Header, T>) -> Int { MemoryLayout<Header>.offset(of: field)! }
    /// Gfns in a piece at most.
    static let pieceGFNs: UInt64 = 16384

    let descriptor: Descriptor
    let identity: Identity
    let hasEnded: Bool

    static func makeFile(_ identity: Identity) throws(QuireError) -> Descriptor {
        let file = try Memfd(name: "quire-ledger", byteCount: byteCount).takeDescriptor()
        try file.setMode(0o400)
        let header = try Mapping(file, byteCount: Int(headerBytes))
        header.store32(offset(\.version), UInt32(QUIRE_PARKED_VERSION))
        header.store64(offset(\.store_id), identity.storeID)
        header.store64(offset(\.map_device), identity.map.device)
        header.store64(offset(\.map_inode), identity.map.inode)
        header.store32(offset(\.machine), UInt32(identity.machine))
        header.store32(offset(\.uid), identity.uid)
        header.storeText(offset(\.name), capacity: 72, identity.name)
        header.copyIn(0, Array(QUIRE_LEDGER_MAGIC.utf8))
        return file
    }

    init(_ descriptor: consuming Descriptor) throws(QuireError) {
        // What is cut off would count as nothing, and a header that is would end this process.
        guard try descriptor.status().byteCount == Self.byteCount else {
            throw QuireError(.invalid, "a ledger does not have the size that ledgers have")
        }
        let header = try Mapping(descriptor, byteCount: Int(Self.headerBytes))
        guard header.copyOut(0, count: 8) == Array(QUIRE_LEDGER_MAGIC.utf8),
            header.load32(Self.offset(\.version)) == UInt32(QUIRE_PARKED_VERSION)
        else { throw QuireError(.invalid, "a ledger was written by another version") }
        identity = Identity(
            name: header.loadText(Self.offset(\.name), capacity: 72),
            machine: Int(header.load32(Self.offset(\.machine))), uid: header.load32(Self.offset(\.uid)),
            storeID: header.load64(Self.offset(\.store_id)),
            map: FileStatus.Identity(
                device: header.load64(Self.offset(\.map_device)), inode: header.load64(Self.offset(\.map_inode))))
        hasEnded = header.load32(Self.offset(\.ended)) != 0
        self.descriptor = descriptor
    }

    private static func position(_ gfn: UInt64) -> UInt64 { headerBytes + 4 * gfn }

    func read(_ gfns: Range<UInt64>) throws(QuireError) -> [Entry] {
        var words = [UInt32](repeating: 0, count: gfns.count)
        try descriptor.readWords(at: Self.position(gfns.lowerBound), into: &words)
        return words.map { Entry(raw: $0) }
    }

    /// Entries from `gfn` on.
    func write(_ gfn: UInt64, _ entries: ArraySlice<Entry>) throws(QuireError) {
        try descriptor.writeWords(at: Self.position(gfn), entries.map(\.raw)[...])
    }

    /// From now on nothing that stands here holds.
    func end() throws(QuireError) { try descriptor.writeWords(at: UInt64(Self.offset(\.ended)), [1]) }

    /// All gfns that may have entries, in pieces. Costs what is there, not what could be. Throws where one cannot be read (a memory
    /// error): what it holds must not count as nothing.
    func forEachPiece(_ body: (UInt64, [Entry]) throws(QuireError) -> Void) throws(QuireError) {
        let end = Self.position(StoreRequest.gfnLimit)
        var position = Self.headerBytes
        while let data = Memfd.nextData(descriptor.raw, from: position, to: end) {
            let first = (data.lowerBound - Self.headerBytes) / 4
            let last = min(StoreRequest.gfnLimit, (data.upperBound - Self.headerBytes + 3) / 4)
            for start in stride(from: first, to: last, by: Int(Self.pieceGFNs)) {
                let gfns = start..<min(start + Self.pieceGFNs, last)
                try body(start, read(gfns))
            }
            position = data.upperBound
        }
    }

    var allocatedBytes: UInt64 { (try? descriptor.status().allocatedBytes) ?? 0 }
}

/// A VM's page map, read by somebody who does not trust it: by `pread`, since it may be truncated while it is read, and
/// only to learn what the VM does not map any more.
struct ForeignPageMap: ~Copyable {
    private let descriptor: Descriptor
    /// Behind them are other things (range locks). A lie harms who tells it: what it maps beyond is given up.
    private let pageCount: UInt64
    private static let headerBytes = UInt64(MemoryLayout<quire_map_header>.size)
    private static let chunk = 8192

    init(_ descriptor: consuming Descriptor) throws(QuireError) {
        try GuestRAM.checkIsSharedMemory(descriptor.raw, "the page map")
        let head = try descriptor.readBytes(at: 0, count: 24)
        // A map that nobody has written yet is all zeros.
        let blank = head.allSatisfy { $0 == 0 }
        guard head.count == 24, blank || Array(head[..<8]) == Array(QUIRE_MAP_MAGIC.utf8) else {
            throw QuireError(.invalid, "the page map is none")
        }
        let told = head[16..<24].reversed().reduce(UInt64(0)) { $0 << 8 | UInt64($1) }
        pageCount = told == 0 ? StoreRequest.gfnLimit : min(told, StoreRequest.gfnLimit)
        self.descriptor = descriptor
    }

    var identity: FileStatus.Identity {
        get throws(QuireError) { try descriptor.status().identity }
    }

    /// The slots of `store` that the map has for these gfns; 0 where it has none.
    func slots(_ gfns: Range<UInt64>, store: Int) throws(QuireError) -> [UInt32] {
        var words = [UInt32](repeating: 0, count: 2 * gfns.count)
        try descriptor.readWords(at: Self.headerBytes + 8 * gfns.lowerBound, into: &words)
        return (0..<gfns.count).map { index in
            let entry = UInt64(words[2 * index]) | UInt64(words[2 * index + 1]) << 32
            guard UInt8(truncatingIfNeeded: entry) == UInt8(QUIRE_MAP_SHARED.rawValue),
                entry >> UInt64(QUIRE_MAP_STORE_SHIFT) == UInt64(store)
            else { return 0 }
            let slot = entry >> UInt64(QUIRE_MAP_SLOT_SHIFT) & (1 << UInt64(QUIRE_MAP_SLOT_BITS) - 1)
            return slot < UInt64(QUIRE_STORE_SLOT_LIMIT) ? UInt32(slot) : 0
        }
    }

    /// Pages that the map calls shared, with whatever slot of whatever store. Costs what is there.
    func sharedPages() throws(QuireError) -> UInt64 {
        var count: UInt64 = 0
        let end = Self.headerBytes + 8 * pageCount
        var position = Self.headerBytes
        var words = [UInt32](repeating: 0, count: 2 * Self.chunk)
        while let data = Memfd.nextData(descriptor.raw, from: position, to: end) {
            for start in stride(from: data.lowerBound & ~7, to: data.upperBound, by: 8 * Self.chunk) {
                try descriptor.readWords(at: start, into: &words)
                let entries = min(Self.chunk, Int((data.upperBound - start) / 8))
                for index in 0..<entries where words[2 * index] & 0xFF == QUIRE_MAP_SHARED.rawValue { count += 1 }
            }
            position = data.upperBound
        }
        return count
    }
}
