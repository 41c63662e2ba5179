import CQuireLayout
import GuestMemory
import Platform
import Synchronization

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
    /// The map's file, for the agent.
    public let descriptor: Descriptor
    /// Entries: gfns 0 ..< pageCount.
    public let pageCount: UInt64
    private let recycledMerged = Mutex(MergedCount())

    private typealias Header = quire_map_header
    private static let entryBytes = 8
    private static let headerBytes = MemoryLayout<Header>.size
    private static func offset<T>(_ field: KeyPath<Header, T>) -> Int { MemoryLayout<Header>.offset(of: field)! }

    /// 4 TiB of guest-physical address space. The file is sparse: entries that nobody wrote cost nothing.
    public static let defaultPageCount: UInt64 = 1 << 30

    /// Pages under one range lock.
    public static let lockPages = UInt64(QUIRE_LOCK_PAGES)
    private static let lockBytes = MemoryLayout<quire_lock>.stride
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

    /// Nil if the entry says something that this version does not know: the bytes may be anywhere then.
    @inline(__always) public func state(of gfn: GFN) -> PageState? { PageState(entry: bytes.load64(entry(gfn))) }

    /// Moves a page to another state, if it is in the state `old` until that very moment; false if it is not. For the
    /// back end's moves the caller holds the page: the range lock and a claim, or the only thread that looks at its
    /// table page.
    @discardableResult public func move(
        _ gfn: GFN, from old: PageState, to next: PageState, by mover: PageState.Mover = .backend
    ) -> Bool {
        precondition(old.mover(to: next) == mover, "no such move of a page")
        return bytes.compareExchange64(entry(gfn), expected: old.entry, desired: next.entry)
    }

    /// Whether the file has memory for any of these entries: false is certain, true is not.
    func hasEntries(_ gfns: Range<GFN>) -> Bool {
        Memfd.hasData(descriptor.raw, UInt64(entry(gfns.lowerBound))..<UInt64(entry(gfns.upperBound)))
    }

    /// How many of `gfns`, from the first on, are where the first one is: in the memory file, or merged. The caller
    /// holds the range lock on them, or it is history when it returns. Pages behind the end of the map are never
    /// merged.
    ///
    /// Where nothing was ever merged this looks at one byte for 512 pages, and at no entry: reading one would give it
    /// memory.
    @inline(__always) public func alike(_ gfns: Range<GFN>) throws(QuireError) -> (count: Int, isMerged: Bool) {
        let end = min(gfns.upperBound, pageCount)
        var gfn = gfns.lowerBound
        while gfn < end, bytes.load8(lock(gfn) + Self.mergedOffset) == 0 {
            gfn = (gfn / Self.lockPages + 1) * Self.lockPages
        }
        if gfn >= end { return (gfns.count, false) }
        return try alikeByEntries(gfns, from: max(gfn, gfns.lowerBound), to: end)
    }

    private func alikeByEntries(
        _ gfns: Range<GFN>, from first: GFN, to end: GFN
    ) throws(QuireError) -> (count: Int, isMerged: Bool) {
        // Before `first` all are in the file.
        var isMerged = false
        for gfn in first..<end {
            guard let state = state(of: gfn) else {
                throw QuireError(.invalid, "the page map's entry of page 0x\(String(gfn, radix: 16)) is not one")
            }
            if gfn == gfns.lowerBound { isMerged = state.isMerged }
            if state.isMerged != isMerged { return (Int(gfn - gfns.lowerBound), isMerged) }
        }
        return (isMerged ? Int(end - gfns.lowerBound) : gfns.count, isMerged)
    }

    // MARK: - Merged pages

    /// Calls `body` with every run of merged pages of one kind, whatever slots they have. A look, not a promise: the agent
    /// moves pages meanwhile.
    public func forEachMerged(_ body: (Range<GFN>, PageState) -> Void) {
        var run: (gfns: Range<GFN>, kind: PageState)?
        func end() {
            if let run { body(run.gfns, run.kind) }
            run = nil
        }
        forEachUsedLock { lock in
            guard bytes.load8(lock + Self.mergedOffset) != 0 else { return }
            let first = UInt64((lock - self.lock(0)) / Self.lockBytes) * Self.lockPages
            for gfn in first..<first + Self.lockPages {
                guard let state = state(of: gfn), state.isMerged else { continue }
                if let last = run, last.gfns.upperBound == gfn, last.kind.isSameKind(as: state) {
                    run!.gfns = last.gfns.lowerBound..<gfn + 1
                } else {
                    end()
                    run = (gfn..<gfn + 1, state)
                }
            }
        }
        end()
    }

    /// How many of these are merged, of each kind. Where nothing was ever merged it looks at no entry.
    public func mergedCounts(_ gfns: Range<GFN>) -> MergedCount {
        var result = MergedCount()
        var gfn = gfns.lowerBound
        let end = min(gfns.upperBound, pageCount)
        while gfn < end {
            let next = min((gfn / Self.lockPages + 1) * Self.lockPages, end)
            if bytes.load8(lock(gfn) + Self.mergedOffset) != 0 {
                for gfn in gfn..<next {
                    switch state(of: gfn) {
                    case .zero: result.zero += 1
                    case .shared: result.shared += 1
                    default: break
                    }
                }
            }
            gfn = next
        }
        return result
    }

    /// Merged pages that were recycled since somebody last counted all that are merged (`settle`): whoever keeps count of
    /// merged pages learns of these late, and a page must not stand in two figures meanwhile.
    var recycledMergedPages: MergedCount { recycledMerged.withLock { $0 } }
    func noteRecycledMerged(_ count: MergedCount) { recycledMerged.withLock { $0 += count } }
    /// All were counted after `noted` was read.
    func settleRecycledMerged(_ noted: MergedCount) { recycledMerged.withLock { $0 -= noted } }

    /// Calls `body` with the runs of these pages that are in a wanted state; nil is a state that nobody knows.
    func forEachRun(in gfns: Range<GFN>, where isWanted: (PageState?) -> Bool, _ body: (Range<GFN>) -> Void) {
        var start = gfns.lowerBound
        while start < gfns.upperBound {
            guard isWanted(state(of: start)) else {
                start += 1
                continue
            }
            var end = start + 1
            while end < gfns.upperBound, isWanted(state(of: end)) { end += 1 }
            body(start..<end)
            start = end
        }
    }

    /// Whether a page was ever merged. No is certain.
    public var hasMerged: Bool {
        var found = false
        forEachUsedLock { lock in found = found || bytes.load8(lock + Self.mergedOffset) != 0 }
        return found
    }

    /// Whether a page is merged now, or is just being merged. Costs a look at pages around those that ever were.
    public var hasMergedPages: Bool {
        var found = false
        forEachUsedLock { lock in
            if found || bytes.loadSequential8(lock + Self.busyOffset) != 0 { return found = true }
            guard bytes.load8(lock + Self.mergedOffset) != 0 else { return }
            let first = UInt64((lock - self.lock(0)) / Self.lockBytes) * Self.lockPages
            found = (first..<first + Self.lockPages).contains { state(of: $0)?.isMerged == true }
        }
        return found
    }

    /// Somebody wants nothing merged: kept here, so that a back end that comes back knows it.
    public var isUnmerged: Bool {
        get { has(QUIRE_MAP_UNMERGED) }
        set { set(QUIRE_MAP_UNMERGED, newValue) }
    }

    // MARK: - Flags

    /// The guest came with memory from elsewhere. So it is for the VM's life, whatever the guest does after and whichever back
    /// end serves it then.
    public var hasArrived: Bool { has(QUIRE_MAP_ARRIVED) }
    public func noteArrival() { set(QUIRE_MAP_ARRIVED, true) }

    private func has(_ flag: quire_map_flag) -> Bool { mapping.load32(Self.offset(\.flags)) & UInt32(flag.rawValue) != 0 }

    /// The other flags stay, whoever changes one at the same time.
    private func set(_ flag: quire_map_flag, _ isOn: Bool) {
        let position = Self.offset(\.flags), bit = UInt32(flag.rawValue)
        var flags: UInt32
        repeat { flags = mapping.load32(position) } while !mapping.compareExchange32(
            position, expected: flags, desired: isOn ? flags | bit : flags & ~bit)
    }

    // MARK: - Range locks

    // What `quire_layout.h` says of the range lock, the back end's side. I/O counts itself in and then looks whether a
    // window is open; the agent says that a window is open and then looks whether I/O was counted. Both orders are
    // sequentially consistent, so one of the two sees the other, and it is always the I/O that waits: for some system
    // calls of QEMU's.
    //
    // Deaths. The back end's: its counts stay, and keep windows off, until the next one takes over (`takeOver`).
    // QEMU's, in a window: `busy` stays, and there is no guest any more; so nobody waits longer than he says.

    @inline(__always) private func lock(_ gfn: GFN) -> Int {
        Self.headerBytes + Int(pageCount) * Self.entryBytes + Int(gfn / Self.lockPages) * Self.lockBytes
    }
    private static func offset<T>(lock field: KeyPath<quire_lock, T>) -> Int {
        MemoryLayout<quire_lock>.offset(of: field)!
    }
    private static let ioOffset = offset(lock: \.backend_io)
    private static let busyOffset = offset(lock: \.busy)
    private static let mergedOffset = offset(lock: \.merged)

    /// A window is some system calls long: one that is still open after this will not close.
    public static let windowNanoseconds: UInt64 = 10_000_000_000

    /// Keeps the agent's windows off `gfns` until `endIO`; waits while one is open there. Throws `.busy` if it stays
    /// open; then nothing is held.
    @inline(__always)
    public func beginIO(_ gfns: Range<GFN>, patience: UInt64 = PageMap.windowNanoseconds) throws(QuireError) {
        let end = min(gfns.upperBound, pageCount)
        var gfn = gfns.lowerBound / Self.lockPages * Self.lockPages
        while gfn < end {
            let lock = lock(gfn)
            _ = bytes.fetchAdd16(lock + Self.ioOffset, 1)
            if bytes.loadSequential8(lock + Self.busyOffset) != 0 {
                do throws(QuireError) { try waitForWindow(lock, patience) } catch {
                    if gfn > gfns.lowerBound { endIO(gfns.lowerBound..<gfn) }
                    throw error
                }
            }
            gfn += Self.lockPages
        }
    }

    /// With a count taken, and a window open: gives the count back, waits, and takes it again. Holds none if it throws.
    private func waitForWindow(_ lock: Int, _ patience: UInt64) throws(QuireError) {
        let deadline = monotonicNanoseconds() + patience
        repeat {
            _ = bytes.fetchAdd16(lock + Self.ioOffset, .max)
            guard monotonicNanoseconds() < deadline else {
                throw QuireError(.busy, "QEMU has been moving a page of the guest for too long")
            }
            ProcessCalls.sleep(microseconds: 20)
            _ = bytes.fetchAdd16(lock + Self.ioOffset, 1)
        } while bytes.loadSequential8(lock + Self.busyOffset) != 0
    }

    @inline(__always) public func endIO(_ gfns: Range<GFN>) {
        let end = min(gfns.upperBound, pageCount)
        var gfn = gfns.lowerBound / Self.lockPages * Self.lockPages
        while gfn < end {
            _ = bytes.fetchAdd16(lock(gfn) + Self.ioOffset, .max)
            gfn += Self.lockPages
        }
    }

    /// The counts of a back end that is dead.
    private func forgetIO() { forEachUsedLock { lock in bytes.store16(lock + Self.ioOffset, 0) } }

    /// Whether a page may be merged already. After `takeOver` the answer no stays true until this process has an agent merge:
    /// a window that was open by then shows in `busy`, and no other opens.
    public var mayHaveMerged: Bool {
        var found = false
        forEachUsedLock { lock in
            if bytes.loadSequential8(lock + Self.busyOffset) != 0 || bytes.load8(lock + Self.mergedOffset) != 0 {
                found = true
            }
        }
        return found
    }

    private func forEachUsedLock(_ body: (Int) -> Void) {
        let first = UInt64(lock(0))
        let end = first + (pageCount / Self.lockPages) * UInt64(Self.lockBytes)
        var position = first
        // Locks that the file has no memory for are 0; looking at them would give them some.
        while let data = Memfd.nextData(descriptor.raw, from: position, to: end) {
            var lock = Int(first + (max(data.lowerBound, first) - first) / 8 * 8)
            while lock < Int(data.upperBound) {
                body(lock)
                lock += Self.lockBytes
            }
            position = data.upperBound
        }
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

    /// This process takes the VM over: its heart has not beaten yet. No thread of the one before may be running any
    /// more, and this one has not begun to work on guest memory.
    ///
    /// From now on the agent opens no window for what the dead one asked of it: it looks at the generation inside the
    /// range lock, as it looks at the counts.
    public func takeOver(pid: Int32) {
        mapping.store64(Self.offset(\.heartbeat), 0)
        mapping.store32(Self.offset(\.backend_pid), UInt32(bitPattern: pid))
        forgetIO()
        mapping.store32(Self.offset(\.generation), mapping.load32(Self.offset(\.generation)) &+ 1)
        memoryFence()
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

/// Pages that are merged, by kind.
public struct MergedCount: Sendable, Equatable {
    public var zero = 0, shared = 0
    public init(zero: Int = 0, shared: Int = 0) { (self.zero, self.shared) = (zero, shared) }

    /// Nothing is below zero: counts are made at different moments.
    public static func - (a: MergedCount, b: MergedCount) -> MergedCount {
        MergedCount(zero: max(0, a.zero - b.zero), shared: max(0, a.shared - b.shared))
    }
    public static func += (a: inout MergedCount, b: MergedCount) { a = MergedCount(zero: a.zero + b.zero, shared: a.shared + b.shared) }
    public static func -= (a: inout MergedCount, b: MergedCount) { a = a - b }
}
