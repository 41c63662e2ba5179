import Engines
import Glibc
import GuestMemory
import Host
import Logging
import Platform
import TestSupport
import Testing
import VhostBackend

private let logger = Logger(label: "test") { _ in SwiftLogNoOpLogHandler() }
private let pageSize = 4096

/// Bytes that LZ4 cannot compress, a different page for every seed.
func noise(_ seed: UInt64) -> [UInt8] {
    var state = seed &* 0x9e37_79b9_7f4a_7c15 | 1
    var bytes: [UInt8] = []
    bytes.reserveCapacity(pageSize)
    while bytes.count < pageSize {
        state ^= state << 13
        state ^= state >> 7
        state ^= state << 17
        for shift in 0..<8 { bytes.append(UInt8(truncatingIfNeeded: state >> UInt64(shift * 8))) }
    }
    return bytes
}

/// 8 MiB of guest RAM in two regions, and the store's file, which outlives every disk on it.
private final class SwapBench {
    let file: Descriptor
    let memory: GuestMemory
    static let ramPages = 2048

    /// Where the second region begins: in the middle of what the odd buffers have as a page.
    static let border = 0x5000

    init() throws {
        file = try Tmem.makeFile(name: "swap-test")
        let byteCount = Self.ramPages * pageSize
        memory = try GuestMemory(
            try [0..<Self.border, Self.border..<byteCount].map { range in
                try MemoryRegion(
                    guestAddress: UInt64(range.lowerBound), byteCount: UInt64(range.count),
                    userAddress: 0x7f00_0000_0000 + UInt64(range.lowerBound) * 16, fileOffset: 0,
                    descriptor: Memfd(name: "swap-test-ram", byteCount: UInt64(range.count)).takeDescriptor(), owner: .us)
            }, log: DirtyTracker())
    }

    func store(_ options: SwapDisk.Options) throws -> Tmem {
        try Tmem(
            file.duplicate(),
            .init(
                cap: options.overcommit.map { UInt64(Double(options.byteCount) / $0) }, overcommit: options.overcommit ?? 1,
                reserve: options.reserve))
    }

    func disk(_ options: SwapDisk.Options = .init(byteCount: 16 << 20)) throws -> SwapDisk {
        try SwapDisk(options, store: store(options), client: "vm", logger: logger)
    }

    /// A buffer in odd pieces: none is a page, most cross the border of one.
    func buffer(pages: Int) throws -> GuestBuffer {
        var buffer = memory.emptyBuffer
        var left = pages * pageSize, address: UInt64 = 4096 + 512
        for size in [512, 3584, 4096, 6144, 1024, 8192 + 512, 100].map(UInt64.init) {
            let here = min(UInt64(left), size)
            buffer.append(try memory.buffer(address, count: here))
            address += here + 1536
            left -= Int(here)
        }
        if left > 0 { buffer.append(try memory.buffer(address, count: UInt64(left))) }
        return buffer
    }

    func write(_ disk: SwapDisk, page: Int, _ bytes: [UInt8]) throws {
        let buffer = try memory.buffer(0x10_0000, count: UInt64(bytes.count))
        try buffer.copyIn(bytes)
        try disk.write(at: UInt64(page * pageSize), from: buffer)
    }

    func read(_ disk: SwapDisk, page: Int, count: Int = 1) throws -> [UInt8] {
        let buffer = try memory.buffer(0x20_0000, count: UInt64(count * pageSize))
        try buffer.copyIn([UInt8](repeating: 0xee, count: count * pageSize))
        try disk.read(at: UInt64(page * pageSize), into: buffer)
        return try buffer.copyOut()
    }

    /// What a guest's start of the device is to the disk.
    func start(
        _ disk: SwapDisk, by frontEnd: Int32? = nil, origin: DeviceStart.Origin = .unknown, settle: @escaping @Sendable () -> Void = {}
    ) {
        disk.deviceStarted(DeviceStart(memory: memory, rings: [], nonce: 1, origin: origin, frontEnd: frontEnd, settle: settle))
    }
}

private let zeros = [UInt8](repeating: 0, count: pageSize)

/// The swap disk without QEMU: what a driver asks is asked by hand.
@Suite struct SwapDiskTests {
    @Test func readsWhatWasWrittenThroughScatteredBuffers() throws {
        let bench = try SwapBench()
        let disk = try bench.disk()
        let bytes = (0..<9).flatMap { noise(UInt64($0)) }
        let source = try bench.buffer(pages: 9)
        try source.copyIn(bytes)
        try disk.write(at: 5 * 4096, from: source)
        #expect(try bench.read(disk, page: 4, count: 11) == zeros + bytes + zeros)
        let target = try bench.buffer(pages: 9)
        try target.copyIn([UInt8](repeating: 0x55, count: 9 * pageSize))
        try disk.read(at: 6 * 4096, into: target)
        #expect(try target.copyOut() == Array(bytes[pageSize...]) + zeros)
        // A page that begins in one region of memory and ends in the other.
        let across = try bench.memory.buffer(UInt64(SwapBench.border - 1000), count: UInt64(pageSize))
        try across.copyIn(noise(50))
        try disk.write(at: 50 * 4096, from: across)
        #expect(try bench.read(disk, page: 50) == noise(50))
        try across.copyIn(zeros)
        try disk.read(at: 50 * 4096, into: across)
        #expect(try across.copyOut() == noise(50))
        // To the very end of the disk.
        try bench.write(disk, page: 4095, noise(99))
        #expect(try bench.read(disk, page: 4094, count: 2) == zeros + noise(99))
    }

    @Test func discardAndWriteZeroesFree() throws {
        let bench = try SwapBench()
        let disk = try bench.disk()
        for page in 0..<64 { try bench.write(disk, page: page, noise(UInt64(page))) }
        #expect(disk.snapshot.pools.first?.pages == 64)
        try disk.discard(at: 8 * 4096, count: 16 * 4096)
        try disk.writeZeroes(at: 40 * 4096, count: 4096, mayUnmap: false)
        #expect(disk.snapshot.pools.first?.pages == 47)
        for page in 0..<64 {
            let isGone = (8..<24).contains(page) || page == 40
            #expect(try bench.read(disk, page: page) == (isGone ? zeros : noise(UInt64(page))))
        }
        // The whole disk, as `swapon -d` does.
        try disk.discard(at: 0, count: disk.byteCount)
        #expect(disk.snapshot.pools.first?.pages == 0)
    }

    /// A later process finds what an earlier one has left.
    @Test func outlivesItsProcess() throws {
        let bench = try SwapBench()
        do {
            let disk = try bench.disk()
            for page in 0..<32 { try bench.write(disk, page: page * 100, noise(UInt64(page))) }
            try bench.write(disk, page: 100, noise(77))
        }
        let disk = try bench.disk()
        #expect(try bench.read(disk, page: 100) == noise(77))
        for page in 2..<32 { #expect(try bench.read(disk, page: page * 100) == noise(UInt64(page))) }
        #expect(disk.snapshot.pools.first?.pages == 32)
    }

    /// No room: an error, everything that was told to be written stays, and there is room again when pages are freed.
    @Test func aFullPoolLosesNothing() throws {
        let bench = try SwapBench()
        var options = SwapDisk.Options(byteCount: 64 << 20)
        options.overcommit = 16
        let disk = try bench.disk(options)
        var written = 0
        var refusal: QuireError?
        while refusal == nil, written < 16_384 {
            do { try bench.write(disk, page: written, noise(UInt64(written))) } catch let error as QuireError {
                refusal = error
                break
            }
            written += 1
        }
        #expect(refusal?.code == .noSpace)
        #expect(written > 256 && written < 2048, "4 MiB held \(written) pages")
        #expect(disk.snapshot.pools.first?.putsFailed == 1 && disk.snapshot.reason.contains("no room"))
        // Over a page that is there: it failed, and so did the write of it. Nothing else is touched.
        for page in 0..<written { #expect(try bench.read(disk, page: page) == noise(UInt64(page))) }
        try disk.discard(at: 0, count: 128 * 4096)
        try bench.write(disk, page: written, noise(1))
        #expect(try bench.read(disk, page: written) == noise(1))
        for page in 128..<written { #expect(try bench.read(disk, page: page) == noise(UInt64(page))) }
    }

    /// Where the host has less left than it is to have: errors that say so, nothing is lost, and there is room again with a lower reserve.
    @Test func theHostKeepsItsReserve() throws {
        let bench = try SwapBench()
        var options = SwapDisk.Options(byteCount: 16 << 20)
        options.reserve = 0
        do {
            // The control: nothing is left to the host.
            let disk = try bench.disk(options)
            for page in 0..<16 { try bench.write(disk, page: page, noise(UInt64(page))) }
            #expect(disk.snapshot.reason.isEmpty)
        }
        // More than any host has.
        options.reserve = 1 << 43
        let disk = try bench.disk(options)
        let said = "the host has less than 8T of memory left (tmem-reserve)"
        #expect(message { try bench.write(disk, page: 20, noise(20)) } == said)
        #expect(disk.snapshot.reason == "a page found no room: " + said && disk.snapshot.pools.first?.putsFailed == 1)
        for page in 0..<16 { #expect(try bench.read(disk, page: page) == noise(UInt64(page))) }
        // What is there already may be used again.
        try disk.discard(at: 0, count: 4096)
        try bench.write(disk, page: 20, noise(20))
        #expect(message { try bench.write(disk, page: 21, noise(21)) } == said)
        try disk.tune(.init(compression: .lz4, overcommit: nil, reserve: 4096))
        #expect(disk.snapshot.reason.isEmpty)
        try bench.write(disk, page: 21, noise(21))
        #expect(try bench.read(disk, page: 20, count: 2) == noise(20) + noise(21))
    }

    /// An operator's limit and freeze are there for the next backend, whatever its command line says; another over-commit factor ends
    /// the limit.
    @Test func limitsOutliveTheProcess() throws {
        let bench = try SwapBench()
        var options = SwapDisk.Options(byteCount: 16 << 20)
        options.overcommit = 2
        do {
            let disk = try bench.disk(options)
            #expect(disk.snapshot.capBytes == 8 << 20)
            try disk.setCap(12 << 20)
            disk.store.freeze()
        }
        do {
            let disk = try bench.disk(options)
            #expect(disk.snapshot.capBytes == 12 << 20 && disk.snapshot.isFrozen)
            try disk.tune(.init(compression: .lz4, overcommit: nil))
            #expect(disk.snapshot.capBytes == 12 << 20)
            try disk.tune(.init(compression: .lz4, overcommit: 4))
            #expect(disk.snapshot.capBytes == 4 << 20)
        }
        options.overcommit = 3
        #expect(try bench.disk(options).snapshot.capBytes == UInt64(Double(16 << 20) / 3))
    }

    /// A store holds less than the largest disk: a new one has to fit, and one that is there goes on.
    @Test func mustFitIntoAStore() throws {
        let bench = try SwapBench()
        var options = SwapDisk.Options(byteCount: 2 << 40)
        let said = "a swap disk of 2T is more than a store of 1023G is sure to hold: make it smaller, or give an over-commit factor of 3"
        #expect(message { try bench.disk(options) } == said)
        options.overcommit = 3
        do {
            let disk = try bench.disk(options)
            try bench.write(disk, page: 5, noise(5))
            #expect(message { try disk.tune(.init(compression: .lz4, overcommit: 1)) } == said)
            #expect(disk.snapshot.capBytes == UInt64(Double(2 << 40) / 3))
        }
        options.overcommit = 1
        #expect(try bench.read(bench.disk(options), page: 5) == noise(5))
    }

    @Test func refusesWhatIsNoSwapDisk() throws {
        let bench = try SwapBench()
        do { try bench.write(bench.disk(), page: 4000, noise(1)) }
        #expect(message { try bench.disk(.init(byteCount: 8 << 20)) } == "the store is of a larger swap disk than 8M: give its size")
        #expect(try bench.read(bench.disk(.init(byteCount: 32 << 20)), page: 4000) == noise(1))
        let other = try SwapBench()
        let store = try other.store(.init(byteCount: 1 << 20))
        _ = try store.createPool(.init(kind: .persistent, scope: .private, name: "mine", client: "vm"))
        #expect(
            message { try SwapDisk(.init(byteCount: 1 << 20), store: store, client: "vm", logger: logger) }
                == "the store has a pool 'mine': it is no swap disk's")
    }

    @Test(arguments: [
        ("swap,fd=3", "--device swap,fd=3: size=SIZE is missing"),
        ("swap,fd=3,size=5000", "--device: size=5000 is no size for a swap disk: give 1M to 8T in whole pages of 4 KiB, such as 4G"),
        ("swap,fd=3,size=9T", "--device: size=9T is no size for a swap disk: give 1M to 8T in whole pages of 4 KiB, such as 4G"),
        ("swap,fd=3,size=0", "--device: size=0 is no size for a swap disk: give 1M to 8T in whole pages of 4 KiB, such as 4G"),
        ("swap,fd=3,size=1G,overcommit=0.5", "--device: overcommit=0.5 is no over-commit factor: give 1 to 100, such as 1.5"),
        ("swap,fd=3,size=1G,overcommit=nan", "--device: overcommit=nan is no over-commit factor: give 1 to 100, such as 1.5"),
        ("swap,fd=3,size=1G,compression=gzip", "'gzip' is no compression: choose lz4, zstd or zstd:LEVEL with a level of 1 to 19"),
        ("swap,fd=3,size=1G,compression=zstd:99", "'zstd:99' is no compression: choose lz4, zstd or zstd:LEVEL with a level of 1 to 19"),
        ("swap,fd=3,size=1G,reserve=9T", "--device: reserve=9T is no reserve: give a size up to 8T, such as 256M, or 0"),
        ("swap,fd=3,size=1G,reserve=much", "--device: reserve=much is no reserve: give a size up to 8T, such as 256M, or 0"),
        ("swap,fd=3,size=1G,tmem-fd=x", "--device: tmem-fd=x is no descriptor"),
        ("swap,fd=3,size=1G,awaits-restore=1", "--device: awaits-restore=1: choose on or off"),
        ("swap,fd=3,size=1G,depth=3", "--device swap,fd=3,size=1G,depth=3: unknown option 'depth'"),
    ])
    func badDevicesAreRefused(_ text: String, _ refusal: String) {
        #expect(message { try BackendProcess.Device(parsing: text) } == refusal)
    }

    @Test func parsesDevices() throws {
        var options = SwapDisk.Options(byteCount: 4 << 30)
        options.queueCount = 2
        options.overcommit = 1.5
        options.compression = .zstd(level: 5)
        options.reserve = 1 << 30
        options.awaitsRestore = true
        #expect(
            try BackendProcess.Device(parsing: "swap,fd=7,size=4G,tmem-fd=8,queues=2,overcommit=1.5,compression=zstd:5,reserve=1G,awaits-restore=on")
                == .init(kind: .swap(options, store: 8), endpoint: .descriptor(7)))
        #expect(
            try BackendProcess.Device(parsing: "swap,socket=/s,size=1M")
                == .init(kind: .swap(.init(byteCount: 1 << 20), store: nil), endpoint: .path("/s")))
    }

    @Test func tuningIsTheSameBothWays() throws {
        var tuning = Tuning(periodMilliseconds: 500, mergePeriodMilliseconds: 100, merges: nil)
        func parsed(_ text: String) throws(QuireError) -> Tuning { try Tuning(parsing: text.dropFirst(4)) }
        // As an older release says it, too.
        #expect(tuning.request == "tune 500 100")
        #expect(try parsed("tune 500 100") == tuning)
        tuning.merges = false
        #expect(try parsed("tune 500 100 unmerge") == tuning)
        #expect(tuning.request == "tune 500 100 unmerge")
        (tuning.workers, tuning.mergeWorkers, tuning.tracksWrites, tuning.logLevel) = (2, 16, false, "debug")
        tuning.swap = .init(compression: .zstd(level: 7), overcommit: 1.5)
        #expect(
            tuning.request
                == "tune 500 100 unmerge workers=2 merge-workers=16 write-tracking=false log-level=debug compression=zstd:7 overcommit=1.5")
        #expect(try parsed(tuning.request) == tuning)
        tuning.swap = .init(compression: .lz4, overcommit: nil, reserve: 0)
        #expect(tuning.request.hasSuffix(" compression=lz4 reserve=0"))
        #expect(try parsed(tuning.request) == tuning)
        for (store, group) in [("/run/q/store.sock", ""), ("/a  b store=c/s", "lab")] {
            tuning.setPlace(store: store, group: group)
            #expect(tuning.request.hasSuffix(" reserve=0 group=\(group) store=\(store)"))
            #expect(try parsed(tuning.request) == tuning)
        }
        for text in ["", "tune", "tune 1", "tune 1 x", "tune 1 2 maybe", "tune 1 2 workers=x", "tune 1 2 log-level=loud", "tune 1 2 overcommit=2", "tune 1 2 reserve=2", "tune 1 2 workers", "tune 1 2 write-tracking=no", "tune 1 2 group=lab", "tune 1 2 store=/a"] {
            #expect(message { try parsed(text) }?.contains("is no tuning") == true, "\(text)")
        }
        #expect(message { try parsed("tune 1 2 compression=fast") }?.contains("is no compression") == true)
    }

    @Test func commandsAreTheSameBothWays() throws {
        for command in [
            .list, .freeze, .thaw, .flush(4096), .weight(pool: "swap", 7), .cap(pool: nil, 1 << 30), .cap(pool: "swap", nil), .save, .restore,
        ] as [TmemCommand] {
            #expect(try TmemCommand(parsing: command.request.split(separator: " ").dropFirst().map(String.init)) == command)
        }
        for text in ["", "frob", "flush", "flush x", "cap swap 1 2", "weight swap -1", "cap * much"] {
            #expect(
                message { try TmemCommand(parsing: text.split(separator: " ").map(String.init)) }
                    == "this backend does not know the command 'tmem \(text)'")
        }
    }
}

/// Save files: what comes back is what was saved, or nothing changes.
@Suite struct TmemArchiveTests {
    /// Pages of every kind: text, noise, filled, far apart.
    private static let content: [Int: [UInt8]] = {
        var content: [Int: [UInt8]] = [:]
        for page in 0..<40 { content[page * 3] = noise(UInt64(page)) }
        for page in 200..<220 { content[page] = Array(repeatElement(Array("ein Satz. \(page) ".utf8), count: 400).joined().prefix(pageSize)) }
        content[300] = [UInt8](repeating: 0x7f, count: pageSize)
        content[301] = zeros
        content[4095] = noise(4095)
        return content
    }()

    private static func fill(_ bench: SwapBench, _ disk: SwapDisk) throws {
        for (page, bytes) in content { try bench.write(disk, page: page, bytes) }
    }

    private static func holds(_ content: [Int: [UInt8]], _ bench: SwapBench, _ disk: SwapDisk) throws -> Bool {
        for page in 0..<4096 where try bench.read(disk, page: page) != content[page] ?? zeros { return false }
        return true
    }

    /// A file without a name.
    private static func scratchFile() throws -> Descriptor {
        let path = "/tmp/quire-archive-\(ProcessCalls.ownPID)-\(UInt32.random(in: 0 ... .max))"
        let file = try Descriptor.open(path, O_RDWR | O_CREAT)
        Files.remove(path)
        return file
    }

    private static func saved(_ disk: SwapDisk) throws -> [UInt8] {
        let file = try scratchFile()
        _ = try disk.save(to: DataSink(file.duplicate()))
        return try Descriptor.open("/proc/self/fd/\(file.raw)", O_RDONLY).readAll(limit: 1 << 24)
    }

    private static func restore(_ disk: SwapDisk, _ bytes: [UInt8]) throws -> UInt64 {
        let file = try scratchFile()
        try DataSink(file.duplicate()).write(bytes)
        return try disk.restore(from: DataSource(Descriptor.open("/proc/self/fd/\(file.raw)", O_RDONLY)))
    }

    @Test func comesBackAsItWas() throws {
        let one = try SwapBench(), two = try SwapBench()
        let source = try one.disk(), target = try two.disk()
        try Self.fill(one, source)
        try two.write(target, page: 7, noise(1))
        let file = try Self.saved(source)
        #expect(try Self.restore(target, file) == UInt64(Self.content.count))
        #expect(try Self.holds(Self.content, two, target))
        #expect(target.store.pools.count == 1 && target.snapshot.pools.first?.name == "swap")
        // The mark is none of them.
        #expect(target.snapshot.pools.first?.pages == UInt64(Self.content.count))
        // A saved copy of the copy is the same but for its checksums' seed; and restoring again works.
        let again = try Self.saved(target)
        #expect(again.count == file.count)
        #expect(try Self.restore(target, again) == UInt64(Self.content.count))
        #expect(try Self.holds(Self.content, two, target))
    }

    @Test func anEmptyDiskHasAFile() throws {
        let bench = try SwapBench()
        let disk = try bench.disk()
        let file = try Self.saved(disk)
        #expect(file.count == 64 + (16 + 144 + 8) + (16 + 24 + 8))
        try Self.fill(bench, disk)
        #expect(try Self.restore(disk, file) == 0)
        #expect(try Self.holds([:], bench, disk))
    }

    /// docs/tmem.md, spelled out once more.
    @Test func isLaidOutAsDocumented() throws {
        let bench = try SwapBench()
        let disk = try bench.disk()
        try bench.write(disk, page: 5, [UInt8](repeating: 9, count: pageSize))
        try bench.write(disk, page: 6, noise(6))
        let file = try Self.saved(disk)
        func number(_ at: Int, _ count: Int) -> UInt64 { (0..<count).reduce(0) { $0 | UInt64(file[at + $1]) << UInt64($1 * 8) } }
        #expect(Array(file[..<8]) == Array("QUIRETMS".utf8) && number(8, 4) == 1 && number(12, 4) == 4096)
        #expect(number(16, 8) != 0 && file[24..<56].allSatisfy { $0 == 0 })
        let pool = 64
        #expect(number(pool, 4) == 1 && number(pool + 4, 4) == 144 && number(pool + 8, 8) == 0)
        #expect(number(pool + 16, 4) == 1 && number(pool + 20, 4) == 0 && number(pool + 24, 8) == 4096)
        #expect(Array(file[pool + 32..<pool + 37]) == Array("swap\0".utf8) && Array(file[pool + 96..<pool + 99]) == Array("vm\0".utf8))
        let pages = pool + 16 + 144 + 8
        #expect(number(pages, 4) == 2 && number(pages + 8, 8) == 1 && number(pages + 16, 4) == 2 && number(pages + 20, 4) == 0)
        let first = pages + 24
        #expect(number(first, 8) == 0 && number(first + 8, 4) == 5 && number(first + 12, 4) == 8 && number(first + 16, 8) == 0x0909_0909_0909_0909)
        let second = first + 24
        #expect(number(second + 8, 4) == 6 && number(second + 12, 4) == 4096 && Array(file[second + 16..<second + 16 + 4096]) == noise(6))
        let end = second + 16 + 4096 + 8
        #expect(number(end, 4) == 3 && number(end + 4, 4) == 24 && number(end + 8, 8) == 2)
        #expect(number(end + 16, 8) == 1 && number(end + 24, 8) == 2 && number(end + 32, 8) == 2)
        #expect(file.count == end + 16 + 24 + 8)
    }

    /// One bit anywhere, an end anywhere, something behind the end: refused in one line, and the disk is as it was.
    @Test func whatIsDamagedChangesNothing() throws {
        let one = try SwapBench(), two = try SwapBench()
        let source = try one.disk(), target = try two.disk()
        try Self.fill(one, source)
        let file = try Self.saved(source)
        let before = [7: noise(1), 300: noise(2), 4095: noise(3)]
        for (page, bytes) in before { try two.write(target, page: page, bytes) }
        func isRefused(_ bytes: [UInt8], _ what: String) throws {
            let text = message { try Self.restore(target, bytes) }
            #expect(text != nil && text?.contains("\n") == false, "\(what): \(text ?? "restored")")
            #expect(target.store.pools.count == 1, "\(what)")
            for (page, bytes) in before { #expect(try two.read(target, page: page) == bytes, "\(what)") }
            #expect(target.snapshot.pools.first?.pages == 3, "\(what)")
        }
        // Every byte of the heads and of what is behind the last page, and places between.
        var places = Array(0..<64 + 168 + 64) + Array(file.count - 64..<file.count)
        places += stride(from: 64 + 168 + 64, to: file.count - 64, by: 997)
        for place in places {
            var bytes = file
            bytes[place] ^= 1 << UInt8(place % 8)
            try isRefused(bytes, "bit flipped at \(place)")
        }
        for count in Array(0..<20) + Array(stride(from: 20, to: file.count, by: 4999)) + [file.count - 1, file.count - 48] {
            try isRefused(Array(file[..<count]), "cut to \(count)")
        }
        try isRefused(file + [0], "longer")
        // Chunks of another file of the same disk.
        let other = try Self.saved(source)
        try isRefused(Array(file[..<232]) + Array(other[232...]), "spliced")
        #expect(try Self.holds(before, two, target))
        // Not for lack of trying.
        #expect(try Self.restore(target, file) == UInt64(Self.content.count))
        #expect(try Self.holds(Self.content, two, target))
    }

    @Test func anotherSizeIsRefused() throws {
        let one = try SwapBench(), two = try SwapBench()
        let file = try Self.saved(one.disk())
        #expect(
            message { try Self.restore(two.disk(.init(byteCount: 32 << 20)), file) }
                == "the file is of a swap disk of 16M, this one has 32M: they must be of one size")
    }

    /// A guest's memory and its swap belong together: nothing is replaced or saved while it runs.
    @Test(arguments: [false, true]) func notWhileTheGuestRuns(andIsPausedAgain: Bool) throws {
        let bench = try SwapBench()
        let disk = try bench.disk()
        try Self.fill(bench, disk)
        let file = try Self.saved(disk)
        bench.start(disk)
        try bench.write(disk, page: 0, noise(5000))
        #expect(message { try Self.saved(disk) } == "the guest uses its swap disk: pause it first (QMP stop), then save")
        #expect(message { try Self.restore(disk, file) } == "the guest uses its swap disk: pause it first (QMP stop), then restore")
        #expect(try bench.read(disk, page: 0) == noise(5000))
        disk.deviceStopping()
        // Started in the middle: the file is right, but comes too late.
        var pipe = try Pipe()
        let writer = pipe.takeWriter(), source = DataSource(pipe.takeReader())
        let result = Monitor<String??>(nil)
        let thread = try JoinableThread("restore") {
            let text = message { try disk.restore(from: source) }
            result.update { $0 = text }
        }
        let sink = DataSink(writer)
        // More than a pipe holds: when it is written, the restore is under way.
        try sink.write(Array(file[..<120_000]))
        #expect(message { try Self.saved(disk) } == "the swap disk is being saved or restored: wait for that")
        bench.start(disk)
        if andIsPausedAgain { disk.deviceStopping() }
        try sink.write(Array(file[120_000...]))
        _ = consume sink
        thread.join()
        #expect(result.read { $0 } == "the guest was started meanwhile: it keeps the content that it had")
        #expect(try bench.read(disk, page: 0) == noise(5000) && disk.store.pools.count == 1)
    }

    /// A guest that came from elsewhere gets no byte of what is not its own.
    @Test func awaitsWhatBelongsToTheGuest() throws {
        let bench = try SwapBench(), other = try SwapBench()
        let source = try other.disk()
        try Self.fill(other, source)
        let file = try Self.saved(source)
        var options = SwapDisk.Options(byteCount: 16 << 20)
        options.awaitsRestore = true
        do {
            let disk = try bench.disk(options)
            #expect(throws: QuireError.self) { try bench.read(disk, page: 0) }
            #expect(throws: QuireError.self) { try bench.write(disk, page: 0, noise(1)) }
            #expect(throws: QuireError.self) { try disk.discard(at: 0, count: 4096) }
            #expect(disk.snapshot.reason.contains("quire tmem restore"))
            _ = try Self.restore(disk, file)
            #expect(try Self.holds(Self.content, bench, disk))
        }
        // Nor does a later backend ask again.
        let disk = try bench.disk(options)
        #expect(disk.snapshot.reason.isEmpty)
        #expect(try Self.holds(Self.content, bench, disk))
    }

    /// A snapshot that is loaded while QEMU runs brings a guest that has no use for what was written since: it gets no byte of that, and
    /// nobody saves it as its own. What is restored is for one arrival, also where a backend dies before the guest is there.
    @Test func aRestoreIsForOneArrival() throws {
        let bench = try SwapBench()
        let settled = Monitor(0)
        func arrive(_ disk: SwapDisk) { bench.start(disk, origin: .elsewhere) { settled.update { $0 += 1 } } }
        func isRefused(_ disk: SwapDisk) -> Bool {
            let reads = message { try bench.read(disk, page: 0) }, writes = message { try bench.write(disk, page: 0, noise(1)) }
            return reads != nil && writes != nil && disk.snapshot.reason.contains("quire tmem restore")
        }
        let then: [UInt8]
        do {
            let disk = try bench.disk()
            try Self.fill(bench, disk)
            then = try Self.saved(disk)
            bench.start(disk, origin: .here)
            try bench.write(disk, page: 0, noise(5000))
            disk.deviceStopping()
            arrive(disk)
            #expect(isRefused(disk))
            disk.deviceStopping()
            #expect(message { try Self.saved(disk) } == "the swap disk waits for its content: quire tmem restore")
            // Nor does a guest that sleeps, or begins anew, become the one before.
            bench.start(disk, origin: .here)
            #expect(isRefused(disk) && disk.snapshot.pools.first?.pages == UInt64(Self.content.count))
            disk.deviceStopping()
            // The control: what a guest that is taken for the one before would read, and the snapshot's does not expect.
            disk.store.pools[0].flush(.max, 2)
        }
        do {
            let disk = try bench.disk()
            bench.start(disk, origin: .here)
            #expect(try bench.read(disk, page: 0) == noise(5000) && noise(5000) != Self.content[0])
            disk.deviceStopping()
            arrive(disk)
            disk.deviceStopping()
        }
        do {
            // A backend that died since knows it, too.
            let disk = try bench.disk()
            bench.start(disk, origin: .here)
            #expect(isRefused(disk))
            disk.deviceStopping()
            #expect(try Self.restore(disk, then) == UInt64(Self.content.count))
            #expect(disk.snapshot.pools.first?.pages == UInt64(Self.content.count))
        }
        do {
            let disk = try bench.disk()
            arrive(disk)
            disk.deviceStopping()
            bench.start(disk, origin: .here)
            #expect(settled.read { $0 } == 1)
            #expect(try Self.holds(Self.content, bench, disk))
            #expect(disk.snapshot.pools.first?.pages == UInt64(Self.content.count))
            disk.deviceStopping()
            arrive(disk)
            #expect(isRefused(disk))
        }
        let disk = try bench.disk()
        arrive(disk)
        #expect(isRefused(disk))
        disk.deviceStopping()
        _ = try Self.restore(disk, then)
        // The guest that was there has run with it: it is of use for no other.
        bench.start(disk)
        disk.deviceStopping()
        arrive(disk)
        #expect(isRefused(disk) && settled.read { $0 } == 1)
    }

    /// Whether the guest comes from elsewhere is what its QEMU was started with. Where that can't be read, or is of something
    /// else than QEMU, what was expected counts.
    @Test(arguments: [true, false]) func believesQEMU(_ expected: Bool) throws {
        var options = SwapDisk.Options(byteCount: 16 << 20)
        options.awaitsRestore = expected
        func awaits(_ arguments: [String], isKnown: Bool = true) throws -> Bool {
            let bench = try SwapBench()
            let disk = try bench.disk(options)
            #expect(disk.snapshot.reason.isEmpty != expected)
            var pipe = try Pipe()
            let input = pipe.takeReader()
            var child = ChildProcess.Options()
            child.passing = [.init(from: input.raw, to: 0)]
            child.parentDeathSignal = SIGKILL
            var qemu = try ChildProcess(["sh", "-c", "read line; true"] + arguments, child)
            // The kernel shows its command line a moment after it has begun.
            #expect(eventually { ((try? Files.read("/proc/\(qemu.pid)/cmdline")) ?? "").contains(arguments.last!) })
            bench.start(disk, by: isKnown ? qemu.pid : nil)
            pipe.closeWriter()
            qemu.wait()
            let isRefused = message { try bench.read(disk, page: 0) } != nil
            #expect(disk.snapshot.reason.isEmpty != isRefused)
            return isRefused
        }
        let disk = ["-chardev", "socket,id=quire-swap,path=/x", "-device", #"{"driver":"vhost-user-blk-pci","chardev":"quire-swap"}"#]
        #expect(try awaits(["qemu-system-x86_64", "-S"] + disk) == false)
        #expect(try awaits(["qemu-system-x86_64"] + disk + ["-incoming", "defer"]) == true)
        #expect(try awaits(["qemu-system-x86_64", "-loadvm", "one"] + disk) == true)
        // An argument that only looks like it.
        #expect(try awaits(["qemu-system-x86_64", "-name", "-incoming"] + disk) == false)
        #expect(try awaits(["libvirtd", "-incoming", "defer"]) == expected)
        #expect(try awaits(["qemu-system-x86_64"] + disk + ["-incoming", "defer"], isKnown: false) == expected)
    }

    /// A death in the middle of a restore leaves the old content, one behind its last step the new.
    @Test(arguments: [false, true]) func aDeathInARestore(_ isComplete: Bool) throws {
        let bench = try SwapBench()
        do {
            let disk = try bench.disk()
            try bench.write(disk, page: 1, noise(1))
            let new = try disk.store.createPool(.init(kind: .persistent, scope: .private, name: "swap.2", client: "vm"))
            try new.put(0, 2, unsafe noise(2).span.bytes)
            if isComplete { try new.put(.max, 0, unsafe zeros.span.bytes) }
        }
        let disk = try bench.disk()
        #expect(disk.store.pools.map(\.name) == [isComplete ? "swap.2" : "swap.1"])
        #expect(try bench.read(disk, page: 1, count: 2) == (isComplete ? zeros + noise(2) : noise(1) + zeros))
    }
}
