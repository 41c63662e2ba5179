import Bench
import Engines
import Platform

/// What a store takes beside the contents after long churn: puts of pages whose sizes change over time, at random places
/// of a disk that is two thirds full, and flushes.
struct TmemChurn {
    let pageCount: Int
    let steps: Int

    private static func overheadBar(_ value: Double?) -> Bar {
        Bar("metadata of a stored page after churn", value, atMost: 40, "bytes")
    }
    private static func wasteBar(_ value: Double?) -> Bar {
        Bar("waste of the allocator after churn, of all memory used", value, atMost: 10, "%")
    }
    static var bars: [Bar] { [overheadBar(nil), wasteBar(nil)] }

    func run(into report: inout Report) throws {
        let tmem = try Tmem(Tmem.makeFile(name: "bench"))
        let pool = try tmem.createPool(.init(kind: .persistent, scope: .private, name: "bench", client: "bench"))
        let page = try PageSet(1)
        var random = BenchRandom(state: 11)
        var table = Table(
            title: "a disk of \(pageCount) pages, put and flushed at random, sizes changing",
            columns: ["steps", "pages", "MiB used", "metadata a page", "waste %", "us CPU a step"])
        var results: [JSON] = []
        var worst = (overhead: 0.0, waste: 0.0)
        var began = threadCPUNanoseconds()
        // The first part fills it.
        for step in 1...steps {
            let index = Int(random.next() % UInt64(pageCount))
            if random.next() % 3 == 0 {
                pool.flush(0, UInt32(index))
            } else {
                // What compresses to a tenth at first doesn't compress to a half in the end.
                let words = Int(random.next() % 150) + step * 250 / steps
                var bytes: [UInt8] = []
                bytes.reserveCapacity(4096)
                for _ in 0..<words { unsafe withUnsafeBytes(of: random.next()) { unsafe bytes.append(contentsOf: $0) } }
                bytes += [UInt8](repeating: 0, count: 4096 - bytes.count)
                page.fill(0, bytes)
                try page.put(0, to: pool, index)
            }
            guard step % (steps / 8) == 0 else { continue }
            let usage = tmem.usage
            let overhead = Double(usage.metadataBytes) / Double(usage.pages)
            let waste = Double(usage.wasteBytes) / Double(usage.usedBytes) * 100
            let cpu = Double(threadCPUNanoseconds() - began) / Double(steps / 8) / 1000
            table.row(
                "\(step)", "\(usage.pages)", "\(usage.usedBytes >> 20)", Table.number(overhead), Table.number(waste), Table.number(cpu))
            results.append([
                "steps": .integer(step), "pages": .integer(Int(usage.pages)), "used_bytes": .integer(Int(usage.usedBytes)),
                "metadata_bytes_a_page": .number(overhead), "waste_percent": .number(waste), "cpu_us_a_step": .number(cpu),
            ])
            if step > steps / 2 { worst = (max(worst.overhead, overhead), max(worst.waste, waste)) }
            began = threadCPUNanoseconds()
        }
        table.note("The bars are on the worst of the second half. Making the pages is part of a step's CPU.")
        report.add("churn", .array(results), table: table)
        report.add(Self.overheadBar(worst.overhead))
        report.add(Self.wasteBar(worst.waste))
    }
}

/// How long a start takes: guest I/O waits for it.
struct TmemRestart {
    let gibibytes: Int

    static var bars: [Bar] { [bar(nil)] }
    private static func bar(_ value: Double?) -> Bar { Bar("start with a store of 4 GiB of pages, by size", value, atMost: 1, "s") }

    func run(into report: inout Report) throws {
        let pages = gibibytes << 18
        let file = try Tmem.makeFile(name: "bench")
        let set = try PageSet(1)
        do {
            let tmem = try Tmem(file.duplicate())
            let pool = try tmem.createPool(.init(kind: .persistent, scope: .private, name: "bench", client: "bench"))
            var random = BenchRandom(state: 23)
            for index in 0..<pages {
                var bytes: [UInt8] = []
                bytes.reserveCapacity(4096)
                for _ in 0..<120 { unsafe withUnsafeBytes(of: random.next()) { unsafe bytes.append(contentsOf: $0) } }
                set.fill(0, bytes + [UInt8](repeating: 0, count: 4096 - bytes.count))
                try set.put(0, to: pool, index)
            }
        }
        var seconds: [Double] = []
        for _ in 0..<3 {
            let began = monotonicNanoseconds()
            let tmem = try Tmem(file.duplicate())
            seconds.append(Double(monotonicNanoseconds() - began) / 1e9)
            guard tmem.usage.pages == UInt64(pages) else { throw QuireError(.invalid, "pages were lost") }
        }
        var table = Table(title: "start with a store that has \(gibibytes) GiB of pages", columns: ["", "seconds"])
        table.row("three starts", seconds.spread)
        report.add("restart", ["pages": .integer(pages), "seconds": seconds.json], table: table)
        report.add(Self.bar(median(seconds) * 4 / Double(gibibytes)))
    }
}

/// The memory of booted guests in a pool: how much larger it was than what holds it.
struct TmemCapacity {
    let mebibytes: Int
    let programs: Programs

    static var bars: [Bar] { [bar(nil)] }
    private static func bar(_ value: Double?) -> Bar {
        Bar("memory of booted guests, apparent over used", value, atLeast: 3.8, "times")
    }

    func run(into report: inout Report) throws {
        var options = GuestMachine.Options(
            accelerator: programs.hasKVM ? ["-accel", "kvm", "-cpu", "host,vmx=off,svm=off"] : ["-accel", "tcg,thread=multi"])
        options.mebibytes = mebibytes
        let tmem = try Tmem(Tmem.makeFile(name: "bench"))
        let pool = try tmem.createPool(.init(kind: .persistent, scope: .shared, name: "guests", client: "bench"))
        // One page at a time: what it takes by itself.
        let single = try Tmem(Tmem.makeFile(name: "bench-single"))
        let alone = try single.createPool(.init(kind: .persistent, scope: .private, name: "one", client: "bench"))
        let page = try PageSet(1)
        let guests = [try GuestMachine("tmem-1", options, programs), try GuestMachine("tmem-2", options, programs)]
        var pages = 0, compressed = 0, filled = 0
        for (number, guest) in guests.enumerated() {
            let file = try guest.memoryFile()
            let end = UInt64(mebibytes) << 20
            var offset: UInt64 = 0
            while let data = Memfd.nextData(file.raw, from: offset, to: end) {
                for at in stride(from: data.lowerBound, to: data.upperBound, by: 4096) {
                    guard page.read(0, from: file.raw, at: Int(at / 4096)) else { throw QuireError.system("cannot read a guest's memory") }
                    try page.put(0, to: pool, number << 20 | Int(at / 4096))
                    try page.put(0, to: alone, 0)
                    let statistics = alone.statistics
                    compressed += Int(statistics.storedBytes)
                    filled += Int(statistics.sameFilled)
                    pages += 1
                }
                offset = data.upperBound
            }
        }
        tmem.compact()
        let usage = tmem.usage
        let ratio = Double(pages) * 4096 / Double(usage.usedBytes)
        let metadata = Double(usage.metadataBytes)
        let dedup = Double(pages) * 4096 / (Double(usage.contents) * 4096 + metadata)
        let compression = Double(pages) * 4096 / (Double(compressed) + metadata)
        let fillOnly = Double(pages) * 4096 / (Double(pages - filled) * 4096 + metadata)
        var table = Table(
            title: "all memory that two booted Debian guests of \(mebibytes) MiB have touched, in one pool: \(pages) pages",
            columns: ["", "apparent over used"])
        table.row("deduplication and compression", Table.number(ratio))
        table.row("deduplication alone", Table.number(dedup))
        table.row("compression alone", Table.number(compression))
        table.row("neither, but same-filled pages for nothing", Table.number(fillOnly))
        table.note(
            "\(filled) pages are one word repeated, which counts as nothing in all four; \(usage.contents) contents are different.")
        table.note("The last three are computed, without waste, from the same pages; the first is measured, everything included.")
        report.add("capacity", [
            "mebibytes": .integer(mebibytes), "guests": .integer(guests.count), "pages": .integer(pages), "same_filled": .integer(filled),
            "contents": .integer(Int(usage.contents)), "used_bytes": .integer(Int(usage.usedBytes)), "ratio": .number(ratio),
            "dedup_alone": .number(dedup), "compression_alone": .number(compression), "same_filled_alone": .number(fillOnly),
        ], table: table)
        report.add(Self.bar(ratio))
    }
}
