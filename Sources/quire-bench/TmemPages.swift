import Bench
import Engines
import Glibc
import Platform
import Synchronization

/// Put and get of a pool beside write and read of a zram device with the same compressor, of the same pages: CPU time of
/// the thread that does it, everything included (zram: the system call and the block layer; a pool: the mapping of
/// memory). Both begin each round empty, and take turns; the bar is on the median of the ratios of a round.
struct TmemPages {
    let pageCount: Int
    let rounds: Int

    enum Kind: String, CaseIterable {
        case compressible, text = "text-like", filled = "same-filled", random, duplicates = "50 % duplicates"
    }

    private static func putBar(_ kind: Kind, _ value: Double?) -> Bar {
        Bar("put of \(kind.rawValue) pages: CPU, of zram's write", value, atMost: 1.3, "times")
    }
    private static func getBar(_ kind: Kind, _ value: Double?) -> Bar {
        Bar("get of \(kind.rawValue) pages: CPU, of zram's read", value, atMost: 1.0, "times")
    }
    private static func growthBar(_ what: String, _ value: Double?) -> Bar {
        Bar("\(what) with two threads on \(ProcessCalls.processorCount) cores, of one thread's throughput", value, atLeast: 1.3, "times")
    }
    static var bars: [Bar] {
        Kind.allCases.flatMap { [putBar($0, nil), getBar($0, nil)] }
    }
    static var threadBars: [Bar] { [growthBar("put", nil), growthBar("get", nil)] }

    private static let words: [String] = {
        var random = BenchRandom(state: 17)
        return (0..<3000).map { _ in
            String((0..<2 + Int(random.next() % 9)).map { _ in "etaoinshrdlucmfwypvbgkqjxz".randomElement(using: &random)! })
        }
    }()

    private static func page(_ kind: Kind, _ number: Int) -> [UInt8] {
        var random = BenchRandom(state: UInt64(number + 1) << 8 | UInt64(Kind.allCases.firstIndex(of: kind)!))
        var bytes: [UInt8] = []
        bytes.reserveCapacity(4200)
        func add(_ word: UInt64) { for shift in 0..<8 { bytes.append(UInt8(truncatingIfNeeded: word >> (8 * UInt64(shift)))) } }
        switch kind {
        // As a heap may look: small numbers, pointers into one area, empty space.
        case .compressible:
            while bytes.count < 4096 {
                switch random.next() % 4 {
                case 0: add(random.next() % 1000)
                case 1: add(0x7f3a_5c00_0000 | random.next() % (1 << 20) & ~15)
                default: add(0)
                }
            }
        case .text:
            while bytes.count < 4096 {
                // Some words are much more frequent than others.
                let part = Double(random.next() % 10_000) / 10_000
                let rank = Int(2999 * part * part * part * part)
                bytes += Array(words[rank].utf8)
                bytes.append(random.next() % 12 == 0 ? 10 : 32)
            }
        case .filled: let word = number % 8 == 0 ? UInt64(number) : 0; while bytes.count < 4096 { add(word) }
        case .random: while bytes.count < 4096 { add(random.next()) }
        // Every other page is one that was there before.
        case .duplicates: return page(.compressible, number % 2 == 0 ? number : (number / 2 * 7919) % max(1, number) / 2 * 2)
        }
        return Array(bytes.prefix(4096))
    }

    func run(into report: inout Report) throws {
        let zram = try ZRAM(byteCount: pageCount * 4096, algorithm: "lz4")
        var table = Table(
            title: "4 KiB pages: CPU nanoseconds a page; \(pageCount) pages, \(rounds) rounds in turn",
            columns: ["", "put", "zram write", "ratio", "get", "zram read", "ratio", "bytes a page", "zram"])
        var results: [JSON] = []
        let back = try PageSet(pageCount)
        for kind in Kind.allCases {
            progress("pages: \(kind.rawValue)")
            let set = try PageSet(pageCount)
            for page in 0..<pageCount { set.fill(page, Self.page(kind, page)) }
            var puts: [Double] = [], gets: [Double] = [], writes: [Double] = [], reads: [Double] = []
            let tmem = try Tmem(Tmem.makeFile(name: "bench"))
            let pool = try tmem.createPool(.init(kind: .persistent, scope: .private, name: "bench", client: "bench"))
            var random = BenchRandom(state: 4)
            let order = Array(0..<pageCount).shuffled(using: &random)
            func each(_ body: (Int) throws -> Void) rethrows -> Double {
                let began = threadCPUNanoseconds()
                for page in order { try body(page) }
                return Double(threadCPUNanoseconds() - began) / Double(pageCount)
            }
            var sizes = (0.0, 0.0)
            // A round before those that count.
            for round in 0...rounds {
                pool.flushAll()
                tmem.compact()
                let put = try each { try set.put($0, to: pool, $0) }
                let get = try each { guard try back.get($0, from: pool, $0) else { throw QuireError(.invalid, "a page is gone") } }
                for page in 0..<pageCount where !set.equals(page, back, page) { throw QuireError(.invalid, "a wrong page") }
                try zram.discard()
                let write = try each { guard set.write($0, to: zram.raw, at: $0) else { throw QuireError.system("cannot write to zram") } }
                let read = try each { guard back.read($0, from: zram.raw, at: $0) else { throw QuireError.system("cannot read from zram") } }
                for page in 0..<pageCount where !set.equals(page, back, page) { throw QuireError(.invalid, "zram: a wrong page") }
                sizes = (Double(tmem.usage.usedBytes) / Double(pageCount), Double(zram.usedBytes) / Double(pageCount))
                guard round > 0 else { continue }
                puts.append(put); gets.append(get); writes.append(write); reads.append(read)
            }
            let putRatios = zip(puts, writes).map { $0 / $1 }, getRatios = zip(gets, reads).map { $0 / $1 }
            table.row(
                kind.rawValue, puts.spread, writes.spread, Table.number(median(putRatios)), gets.spread, reads.spread,
                Table.number(median(getRatios)), Table.number(sizes.0), Table.number(sizes.1))
            results.append([
                "pages": .text(kind.rawValue), "put_ns": puts.json, "zram_write_ns": writes.json, "put_ratios": putRatios.json,
                "get_ns": gets.json, "zram_read_ns": reads.json, "get_ratios": getRatios.json,
                "bytes_a_page": .number(sizes.0), "zram_bytes_a_page": .number(sizes.1),
            ])
            report.add(Self.putBar(kind, median(putRatios)))
            report.add(Self.getBar(kind, median(getRatios)))
        }
        table.note("In random order of pages, one thread; zram with lz4, by O_DIRECT. Bytes a page: everything that is used, at the end.")
        report.add("pages", .array(results), table: table)
    }

    /// Neighbouring pages that one thread takes: as many swap slots as Linux hands to a CPU at once (SWAP_SLOTS_CACHE_SIZE).
    private static let run = 64

    /// Throughput of one thread and of two, which put and get different pages of the same pool. It needs both cores: the
    /// CPU time a page says what else was going on (as much with two as with one: the threads don't hinder each other).
    /// Each takes runs of pages, as CPUs of a guest do: pages by turns would be of one leaf, and the two threads after the
    /// same lock all the time.
    func threads(into report: inout Report) throws {
        let set = try PageSet(pageCount), back = try PageSet(pageCount)
        for page in 0..<pageCount { set.fill(page, Self.page(page % 2 == 0 ? .compressible : .text, page)) }
        let tmem = try Tmem(Tmem.makeFile(name: "bench"))
        let pool = try tmem.createPool(.init(kind: .persistent, scope: .private, name: "bench", client: "bench"))
        let failed = Atomic<Int>(0)
        let pageCount = pageCount
        func rate(
            _ threads: Int, times: Int, _ body: @escaping @Sendable (Int) throws -> Void
        ) throws -> (pages: Double, cpu: Double) {
            let began = monotonicNanoseconds(), cpu = processCPUNanoseconds()
            var all: [JoinableThread] = []
            for thread in 0..<threads {
                all.append(try JoinableThread("bench-\(thread)") {
                    for _ in 0..<times {
                        for first in stride(from: thread * Self.run, to: pageCount, by: threads * Self.run) {
                            for page in first..<min(first + Self.run, pageCount) {
                                do { try body(page) } catch { failed.add(1, ordering: .relaxed) }
                            }
                        }
                    }
                })
            }
            for thread in all { thread.join() }
            let pages = Double(pageCount * times)
            return (pages / Double(monotonicNanoseconds() - began) * 1e9, Double(processCPUNanoseconds() - cpu) / pages)
        }
        var table = Table(title: "pages a second, \(rounds) rounds in turn", columns: ["", "1 thread", "2 threads", "ratio", "CPU ns a page", "with two"])
        var putCPU: [[Double]] = [[], []], getCPU: [[Double]] = [[], []]
        var puts: [[Double]] = [[], []], gets: [[Double]] = [[], []]
        for round in 0...rounds {
            for threads in 1...2 {
                pool.flushAll()
                tmem.compact()
                let put = try rate(threads, times: 1) { try set.put($0, to: pool, $0) }
                // A get is so quick that starting threads would count.
                let get = try rate(threads, times: 8) { _ = try back.get($0, from: pool, $0) }
                guard round > 0 else { continue }
                puts[threads - 1].append(put.pages)
                gets[threads - 1].append(get.pages)
                putCPU[threads - 1].append(put.cpu)
                getCPU[threads - 1].append(get.cpu)
            }
        }
        guard failed.load(ordering: .relaxed) == 0 else { throw QuireError(.system, "a put or get failed") }
        for (what, rates, cpu) in [("put", puts, putCPU), ("get", gets, getCPU)] {
            let ratio = median(zip(rates[1], rates[0]).map { $0 / $1 })
            table.row(what, rates[0].spread, rates[1].spread, Table.number(ratio), cpu[0].spread, cpu[1].spread)
            report.add(Self.growthBar(what, ratio))
        }
        report.add("threads", [
            "put_1": puts[0].json, "put_2": puts[1].json, "get_1": gets[0].json, "get_2": gets[1].json,
            "put_cpu_ns_1": putCPU[0].json, "put_cpu_ns_2": putCPU[1].json, "get_cpu_ns_1": getCPU[0].json, "get_cpu_ns_2": getCPU[1].json,
        ], table: table)
    }
}

/// A zram device of our own, removed at the end.
final class ZRAM {
    private let number: Int
    /// O_DIRECT, which Swift does not import: its value on x86-64.
    private static let direct: Int32 = 0o40000
    private var file: Descriptor?
    let raw: Int32
    private let byteCount: Int

    init(byteCount: Int, algorithm: String) throws(QuireError) {
        self.byteCount = byteCount
        guard let number = Int(try Files.read("/sys/class/zram-control/hot_add").filter(\.isNumber)) else {
            throw QuireError(.unsupported, "the kernel makes no zram device")
        }
        self.number = number
        do throws(QuireError) {
            try Self.set(number, "comp_algorithm", algorithm)
            try Self.set(number, "disksize", "\(byteCount)")
            let opened = try Descriptor.open("/dev/zram\(number)", O_RDWR | Self.direct)
            raw = opened.raw
            file = consume opened
        } catch {
            Self.remove(number)
            throw error
        }
    }

    deinit {
        // It can go when nobody has it open.
        file = nil
        Self.remove(number)
    }

    private static func set(_ number: Int, _ name: String, _ value: String) throws(QuireError) {
        let path = "/sys/block/zram\(number)/\(name)"
        try Descriptor.open(path, O_WRONLY).writeBytes(at: 0, Array(value.utf8))
    }
    private static func remove(_ number: Int) {
        try? Descriptor.open("/sys/class/zram-control/hot_remove", O_WRONLY).writeBytes(at: 0, Array("\(number)".utf8))
    }

    func discard() throws(QuireError) { try Memfd.punch(raw, offset: 0, byteCount: UInt64(byteCount)) }

    /// All memory that the device takes.
    var usedBytes: Int {
        let words = (try? Files.read("/sys/block/zram\(number)/mm_stat"))?.split(whereSeparator: \.isWhitespace) ?? []
        return words.count > 2 ? Int(words[2]) ?? 0 : 0
    }
}
