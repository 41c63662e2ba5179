import Glibc
import GuestMemory
import Platform
import Synchronization
import TestSupport

/// A guest in a memory file: RAM with a state table in it, seen through a mapping of its own, and threads that allocate,
/// use and free its pages by the protocol of quire_layout.h, part 2. Written from the header's text, not from the engine.
final class ModelGuest: Sendable {
    static let inUse: UInt8 = 0, firstEpoch: UInt8 = 1, lastEpoch: UInt8 = 0xfd, claimed: UInt8 = 0xfe, recycled: UInt8 = 0xff

    /// What the guest does with its pages; the wrong ways are the controls of the tests.
    enum Manners: Sendable, CaseIterable {
        case correct
        /// Takes a page although it is CLAIMED.
        case doesNotWait
        /// Looks whether a page is free, uses it, and then says so by a plain store.
        case storesWithoutExchange
    }

    let file: Descriptor
    private let ram: Mapping
    let memory: GuestMemory
    let pageCount: Int
    let headerGFN = 1
    let directoryGFN = 2
    private let firstTableGFN = 3
    private let tablePages: Int
    /// Pages that tests may use: behind everything else.
    let usable: Range<Int>

    static func hex(_ value: UInt64) -> String { String(value, radix: 16) }

    /// `pages` of RAM at guest address 0. The table has room for the next multiple of 4096 pages.
    init(pages: Int, log: DirtyTracker = DirtyTracker()) throws {
        pageCount = pages
        tablePages = (pages + 4095) / 4096
        usable = (firstTableGFN + tablePages + 8)..<pages
        file = try Memfd(name: "model-guest", byteCount: UInt64(pages) * 4096).takeDescriptor()
        ram = try Mapping(file, byteCount: pages * 4096)
        memory = try GuestMemory(
            [
                try MemoryRegion(
                    guestAddress: 0, byteCount: UInt64(pages) * 4096, userAddress: 0x7f00_0000_0000, fileOffset: 0,
                    descriptor: file.duplicate(), owner: .us)
            ], log: log)
        writeTable()
    }

    var headerAddress: UInt64 { UInt64(headerGFN) * 4096 }

    /// Header, directory, and all pages in use.
    func writeTable() {
        ram.copyIn(headerGFN * 4096, [UInt8](repeating: 0, count: 4096))
        ram.copyIn(headerGFN * 4096, Array("QUIRETBL".utf8))
        ram.store32(headerGFN * 4096 + 8, 1)
        ram.store64(headerGFN * 4096 + 16, UInt64(tablePages * 4096))
        ram.store64(headerGFN * 4096 + 24, UInt64(directoryGFN * 4096))
        for page in 0..<tablePages {
            // In reverse, so that nothing works by accident of a contiguous table.
            ram.store64(directoryGFN * 4096 + 8 * page, UInt64(tableGFN(page) * 4096))
            ram.copyIn(tableGFN(page) * 4096, [UInt8](repeating: 0, count: 4096))
        }
    }
    func tableGFN(_ page: Int) -> Int { firstTableGFN + tablePages - 1 - page }

    func setHeader32(_ offset: Int, _ value: UInt32) { ram.store32(headerGFN * 4096 + offset, value) }
    func setHeader64(_ offset: Int, _ value: UInt64) { ram.store64(headerGFN * 4096 + offset, value) }
    func setDirectory(_ index: Int, _ value: UInt64) { ram.store64(directoryGFN * 4096 + 8 * index, value) }
    var epoch: UInt8 { ram.load8(headerGFN * 4096 + 128) }
    func setEpoch(_ value: UInt8) { ram.store8(headerGFN * 4096 + 128, value) }
    var ticks: UInt64 { ram.load64(headerGFN * 4096 + 136) }
    var publishedPeriod: UInt32 { ram.load32(headerGFN * 4096 + 132) }

    private func stateOffset(_ gfn: Int) -> Int { tableGFN(gfn / 4096) * 4096 + gfn % 4096 }
    func state(_ gfn: Int) -> UInt8 { ram.load8(stateOffset(gfn)) }
    func setState(_ gfn: Int, _ value: UInt8) { ram.store8(stateOffset(gfn), value) }
    func exchange(_ gfn: Int, from old: UInt8, to new: UInt8) -> Bool {
        ram.compareExchange8(stateOffset(gfn), expected: old, desired: new)
    }

    func page(_ gfn: Int) -> [UInt8] { ram.copyOut(gfn * 4096, count: 4096) }
    func write(_ gfn: Int, _ bytes: [UInt8]) { ram.copyIn(gfn * 4096, bytes) }
    func fill(_ gfn: Int, _ value: UInt8 = 0x5a) { write(gfn, [UInt8](repeating: value, count: 4096)) }

    /// Frees by the protocol: the current epoch.
    func free(_ gfn: Int) { setState(gfn, max(epoch, Self.firstEpoch)) }
    /// Frees as if it had been long ago: due at once, once an engine looks.
    func freeLongAgo(_ gfn: Int, ticks: Int = 120) {
        setState(gfn, UInt8((Int(max(epoch, 1)) - 1 - ticks + 506) % 253 + 1))
    }

    /// Allocates by the protocol; nil if it is in use. Waits while it is CLAIMED, until `deadline`.
    func allocate(_ gfn: Int, deadline: UInt64 = .max) -> (was: UInt8, waited: Bool)? {
        var waited = false
        while true {
            let state = state(gfn)
            switch state {
            case Self.inUse: return nil
            case Self.claimed:
                waited = true
                if monotonicNanoseconds() > deadline { return nil }
                sched_yield()
            default:
                if exchange(gfn, from: state, to: Self.inUse) { return (state, waited) }
            }
        }
    }

    /// Host memory behind a page?
    func isResident(_ gfn: Int) -> Bool { Memfd.hasData(file.raw, UInt64(gfn) * 4096..<UInt64(gfn + 1) * 4096) }
    var residentPages: Int { Int((try? file.status().allocatedBytes) ?? 0) / 4096 }

    /// All of guest RAM, read past the mapping so that holes stay holes.
    func snapshot() -> [UInt8] {
        var bytes: [UInt8] = []
        let end = UInt64(pageCount) * 4096
        bytes.reserveCapacity(Int(end))
        while let data = Memfd.nextData(file.raw, from: UInt64(bytes.count), to: end) {
            bytes += repeatElement(0, count: Int(data.lowerBound) - bytes.count)
            bytes += ram.copyOut(Int(data.lowerBound), count: data.count)
        }
        return bytes + repeatElement(0, count: Int(end) - bytes.count)
    }

    static func pattern(_ gfn: Int, _ generation: UInt64) -> [UInt8] {
        var random = UInt64(gfn) &* 0x9e37_79b9_7f4a_7c15 ^ generation &* 0xbf58_476d_1ce4_e5b9 | 1
        return unsafe [UInt8](unsafeUninitializedCapacity: 4096) { buffer, count in
            for word in 0..<512 {
                random = random &* 6_364_136_223_846_793_005 &+ 1_442_695_040_888_963_407
                for byte in 0..<8 { unsafe buffer[word * 8 + byte] = UInt8(truncatingIfNeeded: random >> UInt64(byte * 8)) }
            }
            count = 4096
        }
    }
}

/// Threads that use a guest's pages and check every byte of what they own.
final class Workload: Sendable {
    struct Findings: Sendable, Equatable {
        /// Owned pages whose content changed.
        var lost = 0
        /// Owned pages whose state somebody changed.
        var stolen = 0
        /// Pages taken as RECYCLED that did not read as zeros.
        var notZero = 0
        var allocations = 0
        var fromRecycled = 0
        var waits = 0
        var isClean: Bool { lost == 0 && stolen == 0 && notZero == 0 }
    }

    private let guest: ModelGuest
    private let manners: ModelGuest.Manners
    private let stopping = Atomic<Bool>(false)
    private let findings = Mutex(Findings())
    private let threads = Mutex<[JoinableThread]>([])

    var current: Findings { findings.withLock { $0 } }

    init(_ guest: ModelGuest, threads count: Int, manners: ModelGuest.Manners, seed: UInt64 = 1) throws {
        self.guest = guest
        self.manners = manners
        let share = guest.usable.count / count
        for number in 0..<count {
            let range = guest.usable.lowerBound + number * share..<guest.usable.lowerBound + (number + 1) * share
            let thread = try JoinableThread("guest-\(number)") { [self] in use(range, seed &+ UInt64(number)) }
            threads.withLock { $0.append(thread) }
        }
    }

    func stop() -> Findings {
        stopping.store(true, ordering: .releasing)
        threads.withLock {
            for thread in $0 { thread.join() }
            $0 = []
        }
        return current
    }

    private func use(_ range: Range<Int>, _ seed: UInt64) {
        var random = SplitMix(seed)
        var generation: UInt64 = 0
        /// What each page of ours must hold; nil: not ours.
        var owned = [Int: UInt64]()
        func take(_ gfn: Int) {
            generation += 1
            owned[gfn] = generation
            guest.write(gfn, ModelGuest.pattern(gfn, generation))
        }
        func check(_ gfn: Int, _ generation: UInt64) {
            let isStolen = guest.state(gfn) != ModelGuest.inUse
            let isLost = guest.page(gfn) != ModelGuest.pattern(gfn, generation)
            guard isStolen || isLost else { return }
            findings.withLock {
                if isStolen { $0.stolen += 1 }
                if isLost { $0.lost += 1 }
            }
            owned[gfn] = nil
        }
        for gfn in range { take(gfn) }
        var allocations = 0, fromRecycled = 0, waits = 0
        while !stopping.load(ordering: .acquiring) {
            let gfn = range.lowerBound + Int(random.next() % UInt64(range.count))
            if let expected = owned[gfn] {
                check(gfn, expected)
                if owned[gfn] != nil, random.next() % 3 == 0 {
                    owned[gfn] = nil
                    guest.free(gfn)
                }
            } else if random.next() % 16 == 0 {
                switch manners {
                case .correct:
                    guard let (was, waited) = guest.allocate(gfn) else { continue }
                    allocations += 1
                    waits += waited ? 1 : 0
                    if was == ModelGuest.recycled {
                        fromRecycled += 1
                        if guest.page(gfn).contains(where: { $0 != 0 }) { findings.withLock { $0.notZero += 1 } }
                    }
                    take(gfn)
                case .doesNotWait:
                    // On the look-out for a claim of its own pages, so that the test needs no luck.
                    let deadline = monotonicNanoseconds() + 20_000_000
                    var found: Int?
                    while found == nil, monotonicNanoseconds() < deadline {
                        found = range.first { owned[$0] == nil && guest.state($0) == ModelGuest.claimed }
                    }
                    let victim = found ?? gfn
                    guest.setState(victim, ModelGuest.inUse)
                    take(victim)
                    // Long enough for the claimer to come to the end of its batch.
                    usleep(500)
                    check(victim, owned[victim]!)
                case .storesWithoutExchange:
                    guard guest.state(gfn) != ModelGuest.inUse, guest.state(gfn) != ModelGuest.claimed else { continue }
                    take(gfn)
                    // Between the look and the store: time enough for the page to fall due.
                    usleep(20_000)
                    guest.setState(gfn, ModelGuest.inUse)
                    check(gfn, owned[gfn]!)
                }
            }
        }
        for (gfn, expected) in owned { check(gfn, expected) }
        findings.withLock {
            $0.allocations += allocations
            $0.fromRecycled += fromRecycled
            $0.waits += waits
        }
    }
}

/// Polls until it holds; generous, because the machine is shared.
func eventually(seconds: UInt64 = 20, _ condition: () -> Bool) -> Bool {
    let deadline = monotonicNanoseconds() + seconds * 1_000_000_000
    while monotonicNanoseconds() < deadline {
        if condition() { return true }
        ProcessCalls.sleep(milliseconds: 2)
    }
    return condition()
}
