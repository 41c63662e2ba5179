import Engines
import Glibc
import GuestMemory
import Platform
import Synchronization
import TestSupport
import Testing

/// Guest memory of which a part is merged. QEMU's view of it is a second memory file, mapped in this very process,
/// which is its own front end. Used by one thread at a time.
private final class TwoViews: @unchecked Sendable {
    static let pageCount = 1100
    static let firstGFN: GFN = 500
    let map: PageMap
    let raw: Mapping
    let pages: MergedPages
    let memory: GuestMemory
    let file: Descriptor
    let view: Mapping
    /// What the guest sees.
    var model: [UInt8]

    init(_ mover: (any PageMover)? = nil) throws {
        let mapFile = try PageMap.makeFile(pageCount: 8192)
        map = try PageMap(mapFile.duplicate())
        raw = try Mapping(mapFile, byteCount: Int(PageMap.byteCount(pageCount: 8192)))
        pages = MergedPages(map: map)
        pages.setMover(mover)
        let bytes = Self.pageCount * 4096
        file = try Memfd(name: "guest", byteCount: UInt64(bytes)).takeDescriptor()
        let other = try Memfd(name: "front-end", byteCount: UInt64(bytes)).takeDescriptor()
        view = try Mapping(other, byteCount: bytes)
        // The mapping lives as long as this object.
        let user = unsafe UInt64(UInt(bitPattern: view.address(0, count: bytes)))
        memory = try GuestMemory(
            [
                // Two regions, so that buffers go over their border, too.
                MemoryRegion(
                    guestAddress: Self.firstGFN * 4096, byteCount: 600 * 4096, userAddress: user, fileOffset: 0,
                    descriptor: file.duplicate(), owner: .us),
                MemoryRegion(
                    guestAddress: (Self.firstGFN + 600) * 4096, byteCount: 500 * 4096, userAddress: user + 600 * 4096,
                    fileOffset: 600 * 4096, descriptor: file.duplicate(), owner: .us),
            ], log: DirtyTracker(), pages: pages)
        pages.attach(ProcessMemory(try Descriptor.open("/proc/self/mem", O_RDWR)))
        model = [UInt8](repeating: 0, count: bytes)
    }

    /// Merges a page or brings it back, as the agent does: the view that does not count gets rubbish.
    func move(_ page: Int, _ state: PageState) throws {
        let gfn = Self.firstGFN + UInt64(page)
        let now = try #require(map.state(of: gfn))
        guard now.mover(to: state) == .agent else { return }
        raw.store8(4096 + 8 * 8192 + 8 * Int(gfn / 512) + 5, 1)
        let bytes = Array(model[page * 4096..<page * 4096 + 4096])
        let rubbish = [UInt8](repeating: 0xee, count: 4096)
        view.copyIn(page * 4096, state.isMerged ? bytes : rubbish)
        #expect(unsafe pwrite(file.raw, state.isMerged ? rubbish : bytes, 4096, page * 4096) == 4096)
        #expect(map.move(gfn, from: now, to: state, by: .agent))
    }

    func buffer(_ offset: Int, _ count: Int) throws -> GuestBuffer {
        try memory.buffer(Self.firstGFN * 4096 + UInt64(offset), count: UInt64(count))
    }

    var locks: [UInt16] { (0..<16).map { raw.load16(4096 + 8 * 8192 + 8 * $0) } }
}

/// Notes what it is asked for, and brings pages back.
private final class FakeMover: PageMover {
    let asked = Mutex<[[Range<GFN>]]>([])
    let settled = Atomic<Int>(0)
    let bring = Mutex<(@Sendable (Range<GFN>) -> Void)?>(nil)
    func setMemory(_ memory: GuestMemory) {}
    func settle(until deadline: UInt64) throws(QuireError) { settled.add(1, ordering: .relaxed) }
    func bringBack(_ gfns: [Range<GFN>], until deadline: UInt64) throws(QuireError) {
        asked.withLock { $0.append(gfns) }
        let bring = bring.withLock { $0 }
        for range in gfns { bring?(range) }
    }
}

@Suite struct MergedPagesTests {
    /// Random accesses of every kind while pages move between the two views, against a model of bytes.
    @Test func everyStateIsAccessedRightly() throws {
        let two = try TwoViews()
        let total = TwoViews.pageCount * 4096
        let disk = try Memfd(name: "disk", byteCount: UInt64(total)).takeDescriptor()
        let content = (0..<total).map { UInt8(truncatingIfNeeded: $0 / 7 &* 31) }
        #expect(unsafe pwrite(disk.raw, content, total, 0) == total)
        let scratch = try Memfd(name: "scratch", byteCount: UInt64(total)).takeDescriptor()
        var random = SplitMix(77)
        for round in 0..<3000 {
            for _ in 0..<3 {
                let page = Int.random(in: 0..<TwoViews.pageCount, using: &random)
                let state: PageState = [.private, .zero, .shared(store: 1, slot: 7)].randomElement(using: &random)!
                try two.move(page, state)
            }
            // A few pieces, of which some meet the same page.
            var buffer = two.memory.emptyBuffer
            var places: [Range<Int>] = []
            for _ in 0..<Int.random(in: 1...4, using: &random) {
                let offset = Int.random(in: 0..<total - 1, using: &random)
                let longest = round % 100 == 0 ? 1 << 20 : 20_000
                let count = min(Int.random(in: 1...longest, using: &random), total - offset)
                guard !places.contains(where: { $0.overlaps(offset..<offset + count) }) else { continue }
                places.append(offset..<offset + count)
                buffer.append(try two.buffer(offset, count))
            }
            let expected = places.flatMap { two.model[$0] }
            func put(_ bytes: [UInt8]) {
                var done = 0
                for place in places {
                    two.model.replaceSubrange(place, with: bytes[done..<done + place.count])
                    done += place.count
                }
            }
            switch round % 4 {
            case 0: #expect(try buffer.copyOut() == expected, "round \(round)")
            case 1:
                let bytes = expected.map { _ in UInt8.random(in: 0...255, using: &random) }
                try buffer.copyIn(bytes)
                put(bytes)
            case 2:
                try buffer.write(to: scratch, at: 0)
                var bytes = [UInt8](repeating: 0, count: expected.count)
                #expect(unsafe pread(scratch.raw, &bytes, bytes.count, 0) == bytes.count)
                #expect(bytes == expected, "round \(round)")
            default:
                // Sometimes over the end of the disk, which reads as zeros.
                let at = Int.random(in: 0..<total, using: &random)
                try buffer.read(from: disk, at: UInt64(at))
                let found = Array(content[at..<min(total, at + expected.count)])
                put(found + [UInt8](repeating: 0, count: expected.count - found.count))
            }
        }
        for page in 0..<TwoViews.pageCount {
            #expect(try two.buffer(page * 4096, 4096).copyOut() == Array(two.model[page * 4096..<page * 4096 + 4096]))
        }
        #expect(two.locks.allSatisfy { $0 == 0 })
    }

    /// A guest may describe the same page in every one of thousands of descriptors: the lock counts it once.
    @Test func aLockIsTakenOncePerAccess() throws {
        let two = try TwoViews()
        var buffer = two.memory.emptyBuffer
        for index in 0..<70_000 { buffer.append(try two.buffer(index % 5, 1)) }
        buffer.append(try two.buffer(600 * 4096, 1))
        #expect(try buffer.copyOut().count == 70_001)
        #expect(two.locks.allSatisfy { $0 == 0 })
    }

    /// Without the agent, and after QEMU's end: an error, and never other bytes.
    @Test func unreachableBytesAreAnError() throws {
        let two = try TwoViews()
        try two.move(3, .zero)
        two.pages.detachMemory()
        #expect(throws: QuireError.self) { try two.buffer(3 * 4096, 4096).copyOut() }
        #expect(throws: QuireError.self) { try two.buffer(3 * 4096, 4096).copyIn([1]) }
        #expect(try two.buffer(4 * 4096, 4096).copyOut() == [UInt8](repeating: 0, count: 4096))
        // An entry that is none.
        two.raw.store64(4096 + 8 * Int(TwoViews.firstGFN + 5), 99)
        #expect(throws: QuireError.self) { try two.buffer(5 * 4096, 1).copyOut() }
        #expect(two.locks.allSatisfy { $0 == 0 })
    }

    @Test func keptPrivate() throws {
        let mover = FakeMover()
        let two = try TwoViews(mover)
        mover.bring.withLock {
            $0 = { range in for gfn in range { try? two.move(Int(gfn - TwoViews.firstGFN), .private) } }
        }
        let base = TwoViews.firstGFN * 4096
        for page in 10..<14 { try two.move(page, .shared(store: 0, slot: UInt64(page))) }
        var first: PageHold? = try two.memory.keepPrivate([base + 11 * 4096 + 5..<base + 13 * 4096 + 1, base..<base + 1])
        #expect(mover.asked.withLock { $0 } == [[511..<514]] && mover.settled.load(ordering: .relaxed) == 1)
        #expect(two.map.state(of: 510)?.isMerged == true && two.map.state(of: 512) == .private)
        var second: PageHold? = try two.memory.keepPrivate([base + 12 * 4096..<base + 12 * 4096 + 1])
        let set = two.pages.unmergeable
        #expect(set.overlaps(500..<501) && set.overlaps(505..<512) && !set.overlaps(501..<511) && set.overlaps(0..<8000))
        first = nil
        #expect(!set.overlaps(500..<512) && set.overlaps(512..<513))
        second = nil
        #expect(!set.overlaps(0..<8192) && first == nil && second == nil)
        // Nobody can: no ring then.
        two.pages.setMover(nil)
        #expect(throws: QuireError.self) { try two.memory.keepPrivate([base + 10 * 4096..<base + 11 * 4096]) }
        #expect(!set.overlaps(0..<8192) && two.locks.allSatisfy { $0 == 0 })
        #expect(try two.memory.keepPrivate([base..<base + 4096]) != nil)
    }

    /// What the page map costs an access where nothing is merged: printed, and bounded generously.
    @Test func costWithoutMerging() throws {
        let two = try TwoViews()
        let bare = try GuestMemory(two.memory.regions, log: DirtyTracker())
        let disk = try Memfd(name: "disk", byteCount: 1 << 20).takeDescriptor()
        try two.memory.buffer(TwoViews.firstGFN * 4096, count: 1 << 20).read(from: disk, at: 0)
        func nanoseconds(_ memory: GuestMemory, _ count: Int) throws -> Double {
            let began = threadCPUNanoseconds()
            for index in 0..<500 {
                let buffer = try memory.buffer((TwoViews.firstGFN + UInt64(index % 200)) * 4096, count: UInt64(count))
                try buffer.read(from: disk, at: 0)
            }
            return Double(threadCPUNanoseconds() - began) / 500
        }
        for count in [512, 4096, 65536] {
            var without = Double.infinity, with = Double.infinity
            for _ in 0..<40 {
                without = min(without, try nanoseconds(bare, count))
                with = min(with, try nanoseconds(two.memory, count))
            }
            print("disk read of \(count) bytes: \(Int(without)) ns without a page map, \(Int(with)) ns with")
            #expect(with < without * 1.5 + 500)
        }
    }
}
