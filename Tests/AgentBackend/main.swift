import Engines
import Glibc
import GuestMemory
import Host
import Logging
import Platform
import Synchronization

// A back end for tests that kill it: two threads do I/O on the guest's pages through `GuestBuffer` and check every
// byte, while a third has the agent merge and fold the same pages as fast as it can. It goes on where a dead one
// stopped.
//
//     agent-backend SOCKET USERADDRESS PAGES FIRSTGFN PID UID FOLDER [nolock] [nomap]
//     fds: 3 guest RAM, 4 page map, 5 the test's memory (below), 6 a store: slot 64 v + i holds value v
//
// The test's memory: at 0 accesses verified, 8 written, 16 lost, 24 merged, 32 folded, 40 stop; from 4096 on a byte a
// page: the value that all of it has, or 0x80 while it is being written. Ends by being killed, or when stop isn't 0.
//
// Controls: `nolock` leaves out the range lock, `nomap` the page map.

enum Given {
    private static let words = CommandLine.arguments
    private static func number(_ index: Int) -> UInt64 { UInt64(words[index])! }
    static let socket = words[1]
    static let userAddress = number(2)
    static let pages = Int(number(3))
    static let firstGFN = number(4)
    static let peer = AgentLink.Peer(pid: Int32(number(5)), uid: UInt32(number(6)))
    static let folder = words[7]
    static func has(_ flag: String) -> Bool { words.dropFirst(8).contains(flag) }
}

/// The page map without its lock: what the test must find wrong.
final class Unlocked: GuestPages {
    let real: MergedPages
    init(_ real: MergedPages) { self.real = real }
    var lockPages: UInt64 { real.lockPages }
    func beginAccess(_ gfns: Range<GFN>) {}
    func endAccess(_ gfns: Range<GFN>) {}
    func alike(_ gfns: Range<GFN>) throws(QuireError) -> (count: Int, isMerged: Bool) { try real.alike(gfns) }
    func noteWritten(_ gfns: Range<GFN>) {}
    func use(_ memory: GuestMemory) {}
    func frontEnd() throws(QuireError) -> ProcessMemory { try real.frontEnd() }
    func keepPrivate(_ gfns: [Range<GFN>]) throws(QuireError) -> PageHold { try real.keepPrivate(gfns) }
}

final class Backend: Sendable {
    let shared: Mapping
    let memory: GuestMemory
    let pages: MergedPages
    let link: AgentLink
    let patterns: Descriptor

    init() throws {
        let sharedFile = Descriptor(owning: 5)
        shared = try Mapping(sharedFile, byteCount: 4096 + 65536)
        let map = try PageMap(Descriptor(owning: 4))
        map.takeOver(pid: getpid())
        pages = MergedPages(map: map)
        let view: (any GuestPages)? =
            Given.has("nomap") ? nil : Given.has("nolock") ? Unlocked(pages) as any GuestPages : pages
        memory = try GuestMemory(
            [
                MemoryRegion(
                    guestAddress: Given.firstGFN * 4096, byteCount: UInt64(Given.pages * 4096),
                    userAddress: Given.userAddress, fileOffset: 0, descriptor: Descriptor(owning: 3), owner: .us)
            ], log: DirtyTracker(), pages: view)
        patterns = try Descriptor.open(Given.folder + "/patterns", O_RDWR)
        link = try AgentLink(
            path: Given.socket, pages: pages,
            logger: Logger(label: "backend") { StreamLogHandler.standardError(label: $0) }
        ) { Given.peer }
        try link.setStore(Descriptor(owning: 6), number: 0)
        link.setMemory(memory)
    }

    var isStopped: Bool { shared.load64(40) != 0 }

    func value(_ page: Int) -> UInt8 { shared.load8(4096 + page) }

    func buffer(_ page: Int, _ count: Int = 4096, at offset: Int = 0) throws -> GuestBuffer {
        try memory.buffer((Given.firstGFN + UInt64(page)) * 4096 + UInt64(offset), count: UInt64(count))
    }

    func expect(_ bytes: [UInt8], _ value: UInt8, _ page: Int, _ how: String) {
        shared.add64(0, 1)
        guard let wrong = bytes.firstIndex(where: { $0 != value }) else { return }
        if shared.load64(16) < 3 {
            writeStandardError("page \(page): \(bytes[wrong]) at \(wrong) for \(value), by \(how)")
        }
        shared.add64(16, 1)
    }

    /// Pages whose number is `mine` modulo 2.
    func useGuestMemory(_ mine: Int) throws {
        var random = SystemRandomNumberGenerator()
        let scratch = try Descriptor.open(Given.folder + "/scratch-\(mine)", O_RDWR | O_CREAT)
        for page in stride(from: mine, to: Given.pages, by: 2) where value(page) == 0x80 { try write(page, 0, &random) }
        while !isStopped {
            let page = Int.random(in: 0..<Given.pages / 2, using: &random) * 2 + mine
            let old = value(page)
            switch Int.random(in: 0..<4, using: &random) {
            case 0:
                try buffer(page).write(to: scratch, at: 0)
                var bytes = [UInt8](repeating: 0xff, count: 4096)
                _ = unsafe pread(scratch.raw, &bytes, 4096, 0)
                expect(bytes, old, page, "a write to disk")
            case 1: expect(try buffer(page, 1000, at: 3000).copyOut(), old, page, "a copy of a part")
            default: expect(try buffer(page).copyOut(), old, page, "a copy")
            }
            guard Int.random(in: 0..<4, using: &random) == 0 else { continue }
            try write(page, UInt8.random(in: 0..<8, using: &random), &random)
        }
    }

    func write(_ page: Int, _ next: UInt8, _ random: inout SystemRandomNumberGenerator) throws {
        shared.store8(4096 + page, 0x80)
        let target = try buffer(page)
        switch Int.random(in: 0..<3, using: &random) {
        case 0: try target.read(from: patterns, at: UInt64(next) * 4096)
        case 1:
            for half in 0..<2 { try buffer(page, 2048, at: 2048 * half).copyIn([UInt8](repeating: next, count: 2048)) }
        default: try target.copyIn([UInt8](repeating: next, count: 4096))
        }
        shared.store8(4096 + page, next)
        shared.add64(8, 1)
    }

    func movePages() throws {
        var random = SystemRandomNumberGenerator()
        while !isStopped {
            guard link.waitUntilAttached(monotonicNanoseconds() + 100_000_000) else { continue }
            var ranges: [Range<GFN>] = []
            var runs: [PageRun] = []
            for _ in 0..<8 {
                let page = Int.random(in: 0..<Given.pages, using: &random)
                let value = value(page), gfn = Given.firstGFN + UInt64(page)
                // A guess, as an index's would be.
                if value < 8 { runs.append(PageRun(gfn: gfn, pages: 1, store: 0, slot: UInt64(value) * 64)) }
                ranges.append(gfn..<min(gfn + 8, Given.firstGFN + UInt64(Given.pages)))
            }
            do throws(QuireError) {
                switch Int.random(in: 0..<8, using: &random) {
                case 0..<4: count(try link.merge(runs), 24)
                case 4: count(try link.zero(runs.filter { $0.slot == 0 }.map(\.gfns)), 24)
                case 5: count(try link.fold(ranges), 32)
                default: count(try link.fold(ranges, onlyDiverged: true), 32)
                }
            } catch { if error.code != .closed { throw error } }
        }
    }

    func count(_ outcomes: [MoveOutcome], _ at: Int) { shared.add64(at, UInt64(outcomes.reduce(0) { $0 + $1.done })) }
}

let backend = try Backend()
@Sendable func orExit(_ body: () throws -> Void) {
    do { try body() } catch {
        writeStandardError("agent-backend: \(error)")
        exit(3)
    }
}
let threads = try (0..<2).map { number in
    try JoinableThread("io-\(number)") { orExit { try backend.useGuestMemory(number) } }
}
orExit { try backend.movePages() }
for thread in threads { thread.join() }
