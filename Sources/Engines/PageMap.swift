import CQuireLayout
import GuestMemory
import Platform

/// What the host knows of one guest page. The state byte of an entry of the page map.
///
/// | from \ to | `private`                                | `hole`                               | `zero`, `shared` |
/// | --------- | ---------------------------------------- | ------------------------------------ | ---------------- |
/// | `private` | -                                        | recycled: its claim was punched      | merged (agent)   |
/// | `hole`    | the guest took it back, or it was filled | punched again: it was free once more | -                |
/// | `zero`    | folded or reset (agent)                  | -                                    | -                |
/// | `shared`  | folded or reset (agent)                  | -                                    | -                |
///
/// The agent makes its moves by itself; the back end only reads them.
public enum PageState: UInt8, Sendable, CaseIterable {
    /// The memory file's page, if it has one.
    case `private` = 0
    /// Recycled, and not seen in use since.
    case hole = 1
    /// QEMU maps zeros here, or its own copy if the guest has written since. The memory file says nothing.
    case zero = 2
    /// QEMU maps a slot of a store, or its own copy if the guest has written since. The memory file says nothing.
    case shared = 3

    /// Every edge of the table above.
    public func mayBecome(_ next: PageState) -> Bool {
        switch (self, next) {
        case (.private, .hole), (.hole, .private), (.hole, .hole): true
        case (.private, .zero), (.private, .shared), (.zero, .private), (.shared, .private): true
        default: false
        }
    }
}

/// The page map: one 64-bit entry a guest page, in a memory file that outlives the back end, behind a header that holds
/// what a new back end must know of the dead one: which table was registered, and which claims were open.
///
/// Crash safety. A claim is written to the journal before the first state byte is touched, and cleared after the last;
/// a registration is cleared by writing nonce 0 first and set by writing the nonce last. Whatever instant the process
/// dies at, the journal covers every byte that may be CLAIMED, and a nonce stands only beside its own table address.
public final class PageMap: Sendable {
    private let mapping: Mapping
    /// All of `mapping`, which lives as long as this object: for the accesses that are made for every page.
    private let bytes: MappedBytes
    private let descriptor: Descriptor
    /// Entries: gfns 0 ..< pageCount.
    public let pageCount: UInt64

    private typealias Header = quire_map_header
    private static let entryBytes = 8
    private static let headerBytes = MemoryLayout<Header>.size
    private static func offset<T>(_ field: KeyPath<Header, T>) -> Int { MemoryLayout<Header>.offset(of: field)! }

    /// 4 TiB of guest-physical address space. The file is sparse: entries that nobody wrote cost nothing.
    public static let defaultPageCount: UInt64 = 1 << 30

    /// Pages under one range lock.
    public static let lockPages = UInt64(QUIRE_LOCK_PAGES)
    private static let lockBytes = MemoryLayout<quire_lock>.size
    /// Entries and their range lock.
    private static let groupBytes = lockPages * UInt64(entryBytes) + UInt64(lockBytes)

    public static func byteCount(pageCount: UInt64) -> UInt64 {
        UInt64(headerBytes) + (pageCount + lockPages - 1) / lockPages * groupBytes
    }

    /// A new, empty file, with room for at least `pageCount` pages.
    public static func makeFile(pageCount: UInt64 = defaultPageCount) throws(QuireError) -> Descriptor {
        try Memfd(name: "quire-page-map", byteCount: byteCount(pageCount: pageCount)).takeDescriptor()
    }

    /// Opens a page map: a new file (all zeros) is given its header, one that was parked is checked.
    public init(_ descriptor: consuming Descriptor) throws(QuireError) {
        let size = try descriptor.status().byteCount
        guard size >= UInt64(Self.headerBytes), size <= UInt64(Int.max) else {
            throw QuireError(.invalid, "the page map has \(size) bytes: not a page map")
        }
        let mapping = try Mapping(descriptor, byteCount: Int(size))
        mapping.excludeFromDumps()
        let capacity = (size - UInt64(Self.headerBytes)) / Self.groupBytes * Self.lockPages
        let locksOffset = UInt64(Self.headerBytes) + capacity * UInt64(Self.entryBytes)
        let magic = Array(QUIRE_MAP_MAGIC.utf8)
        if mapping.copyOut(0, count: 8).allSatisfy({ $0 == 0 }) {
            mapping.store32(Self.offset(\.version), UInt32(QUIRE_MAP_VERSION))
            mapping.store32(Self.offset(\.header_bytes), UInt32(Self.headerBytes))
            mapping.store64(Self.offset(\.page_count), capacity)
            mapping.store64(Self.offset(\.locks_offset), locksOffset)
            mapping.copyIn(0, magic)
        }
        guard mapping.copyOut(0, count: 8) == magic, mapping.load32(Self.offset(\.version)) == UInt32(QUIRE_MAP_VERSION),
            mapping.load64(Self.offset(\.page_count)) == capacity,
            mapping.load64(Self.offset(\.locks_offset)) == locksOffset
        else { throw QuireError(.invalid, "the page map was written by another version: start the VM anew") }
        bytes = unsafe mapping.view(0, count: Int(size))
        self.mapping = mapping
        self.descriptor = descriptor
        pageCount = capacity
    }

    /// What the map costs the host, in bytes.
    public var allocatedBytes: UInt64 { (try? descriptor.status().allocatedBytes) ?? 0 }

    // MARK: - Entries

    private func entry(_ gfn: GFN) -> Int { Self.headerBytes + Int(gfn) * Self.entryBytes }

    public func state(of gfn: GFN) -> PageState {
        PageState(rawValue: UInt8(truncatingIfNeeded: bytes.load64(entry(gfn)))) ?? .private
    }

    /// Where a merged page was mapped from: nil unless it is `shared`.
    public func slot(of gfn: GFN) -> (store: Int, slot: UInt64)? {
        let value = bytes.load64(entry(gfn))
        guard PageState(rawValue: UInt8(truncatingIfNeeded: value)) == .shared else { return nil }
        let slot = value >> UInt64(QUIRE_MAP_SLOT_SHIFT) & (1 << UInt64(QUIRE_MAP_SLOT_BITS) - 1)
        return (Int(UInt8(truncatingIfNeeded: value >> UInt64(QUIRE_MAP_STORE_SHIFT))), slot)
    }

    /// Moves a page to another state that has no slot. The caller holds the page: a claim, or the only thread that looks at
    /// its table page.
    public func setState(of gfn: GFN, to next: PageState) {
        assert(next != .shared && state(of: gfn).mayBecome(next))
        bytes.store64(entry(gfn), UInt64(next.rawValue))
    }

    /// Whether the file has memory for any of these entries: false is certain, true is not.
    func hasEntries(_ gfns: Range<GFN>) -> Bool {
        Memfd.hasData(descriptor.raw, UInt64(entry(gfns.lowerBound))..<UInt64(entry(gfns.upperBound)))
    }

    // MARK: - Range locks

    private func lock(_ gfn: GFN) -> Int {
        Self.headerBytes + Int(pageCount) * Self.entryBytes + Int(gfn / Self.lockPages) * Self.lockBytes
    }
    private static func offset<T>(lock field: KeyPath<quire_lock, T>) -> Int {
        MemoryLayout<quire_lock>.offset(of: field)!
    }

    /// Keeps the agent's windows off `gfns` until `endIO`; waits while one is open there, which takes microseconds. What
    /// `quire_layout.h` says of the range lock, on the back end's side.
    public func beginIO(_ gfns: Range<GFN>) {
        for gfn in lockedGroups(gfns) {
            let lock = lock(gfn)
            while true {
                _ = bytes.fetchAdd16(lock + Self.offset(lock: \.backend_io), 1)
                if bytes.load8(lock + Self.offset(lock: \.busy)) == 0 { break }
                _ = bytes.fetchAdd16(lock + Self.offset(lock: \.backend_io), .max)
                ProcessCalls.sleep(microseconds: 20)
            }
        }
    }

    public func endIO(_ gfns: Range<GFN>) {
        for gfn in lockedGroups(gfns) { _ = bytes.fetchAdd16(lock(gfn) + Self.offset(lock: \.backend_io), .max) }
    }

    private func lockedGroups(_ gfns: Range<GFN>) -> StrideTo<GFN> {
        stride(from: gfns.lowerBound / Self.lockPages * Self.lockPages, to: gfns.upperBound, by: Int(Self.lockPages))
    }

    // MARK: - Registration

    /// A table that was registered, and the nonce of the device start under which it was.
    public struct Registration: Sendable, Equatable {
        public let nonce: UInt64
        public let headerAddress: UInt64
        public init(nonce: UInt64, headerAddress: UInt64) {
            self.nonce = nonce
            self.headerAddress = headerAddress
        }
    }

    public var registration: Registration? {
        get {
            let nonce = mapping.load64(Self.offset(\.nonce))
            return nonce == 0 ? nil : Registration(nonce: nonce, headerAddress: mapping.load64(Self.offset(\.header_gpa)))
        }
        set {
            mapping.store64(Self.offset(\.nonce), 0)
            if let newValue {
                mapping.store64(Self.offset(\.header_gpa), newValue.headerAddress)
                mapping.store64(Self.offset(\.nonce), newValue.nonce)
            }
        }
    }

    /// Pages recycled in this VM's life.
    public var recycledTotal: UInt64 { mapping.load64(Self.offset(\.recycled_total)) }
    public func addRecycled(_ pages: Int) { bytes.add64(Self.offset(\.recycled_total), UInt64(pages)) }

    // MARK: - Heartbeat

    /// This process takes the VM over: its heart has not beaten yet.
    public func takeOver(pid: Int32) {
        mapping.store64(Self.offset(\.heartbeat), 0)
        mapping.store32(Self.offset(\.backend_pid), UInt32(bitPattern: pid))
    }
    public func beat() { mapping.add64(Self.offset(\.heartbeat), 1) }

    // MARK: - Journal of claims

    public static let workerCount = Int(QUIRE_MAP_WORKERS)
    public static let maxClaimPages = Int(QUIRE_CLAIM_MAX_PAGES)

    private func claim(_ worker: Int) -> Int {
        precondition(worker < Self.workerCount)
        return Self.offset(\.journal) + worker * MemoryLayout<quire_claim>.stride
    }
    private static func offset<T>(claim field: KeyPath<quire_claim, T>) -> Int {
        MemoryLayout<quire_claim>.offset(of: field)!
    }

    /// Before the first byte of `gfns` is claimed. `now` in nanoseconds of CLOCK_MONOTONIC.
    @inline(__always)
    public func openClaim(_ worker: Int, _ gfns: Range<GFN>, now: UInt64) {
        let base = claim(worker)
        bytes.store64(base, gfns.lowerBound)
        bytes.store64(base + 16, now)
        bytes.store64(base + 8, UInt64(gfns.count))
    }

    /// After the last byte is no longer CLAIMED.
    @inline(__always)
    public func closeClaim(_ worker: Int) { bytes.store64(claim(worker) + 8, 0) }

    /// Claims that are open now: a dead process's, or (for a supervisor) those of a process that may be stuck.
    public var openClaims: [(gfns: Range<GFN>, since: UInt64)] {
        (0..<Self.workerCount).compactMap { worker in
            let base = claim(worker)
            let count = mapping.load64(base + Self.offset(claim: \.page_count))
            let first = mapping.load64(base + Self.offset(claim: \.first_gfn))
            guard count > 0, count <= UInt64(Self.maxClaimPages), first < pageCount else { return nil }
            return (first..<min(first + count, pageCount), mapping.load64(base + Self.offset(claim: \.since_ns)))
        }
    }

    public func clearJournal() { for worker in 0..<Self.workerCount { closeClaim(worker) } }
}
