import Bench
import Glibc
import GuestMemory
import Host
import Platform

/// One guest with fragmented free memory: how much of what is free comes back to the host, and when.
///
/// `quire-load fragment` fills nearly all memory of the guest, then frees runs of 1 to 8 pages and keeps as many between
/// them. The clock starts when it says that the last one is freed. Two guests go through this one after the other: one
/// under `quire run` with the module, one with virtio-balloon's free page reporting at its defaults.
///
/// *Free* is every page that the guest's allocator could hand out: on the buddy lists or on the per-CPU lists, found page
/// by page in a stopped guest (quire_free.ko), not a counter. *Back* is a free page for which the guest's memory file has
/// no page. The host looks first and the guest's picture is taken right after, so a page that is freed in between counts
/// as free and not back. Free pages that were never touched, or had come back before, count as free and back: there are
/// few, the load had touched nearly all; `back at once` says how many.
struct Fragmented {
    let mebibytes: Int
    let periodMilliseconds: UInt64
    let accelerator: [String]
    let programs: Programs

    static var bars: [Bar] { [bar(nil)] }
    private static func bar(_ value: Double?) -> Bar {
        Bar("free pages of a fragmented guest that are back one period plus two seconds after the last free", value, atLeast: 99, "%")
    }

    struct Outcome {
        var freePages = 0, smallBlocks = 0, perCPU = 0
        var atOnce = 0.0, atDeadline = 0.0, later = 0.0
        /// Seconds after the last free at which so much was back; nil: not by the last look.
        var half: Double?, nearly: Double?, all: Double?
        var freed = 0
        var verified = ""
        /// What the module says at the deadline: pages marked and not yet recycled, and pages recycled.
        var marked: Int?, recycled: Int?
        /// Free pages that are not back at the deadline, by 16 MiB of guest RAM, where there are many.
        var missing: [(String, JSON)] = []
    }
    struct Metadata {
        var guestShare = 0.0, hostShare = 0.0
    }

    private var deadline: Double { Double(periodMilliseconds) / 1000 + 2 }

    func run(into report: inout Report) throws -> Metadata {
        var table = Table(
            title: "fragmented free memory: a guest of \(mebibytes) MiB, half of it freed in runs of 1 to 8 pages; one run each",
            columns: ["", "free pages", "in blocks < 2 MiB", "back at once", "50 % after", "90 % after", "99 % after",
                "back after \(Table.number(deadline)) s", "after \(Table.number(2 * deadline)) s"])
        var results: [(String, JSON)] = [("guest_mib", .integer(mebibytes)), ("period_ms", .integer(Int(periodMilliseconds)))]
        var metadata = Metadata()
        for isQuire in [true, false] {
            var options = GuestMachine.Options(accelerator: accelerator)
            options.mebibytes = mebibytes
            if isQuire { options.period = "\(periodMilliseconds)ms" } else {
                options.devices = ["-device", "virtio-balloon-pci,free-page-reporting=on"]
            }
            let guest = try GuestMachine(isQuire ? "fragmented-quire" : "fragmented-balloon", options, programs)
            try guest.run("insmod /lib/quire/quire_free.ko")
            try guest.run(isQuire ? "insmod /lib/quire/quire.ko" : "modprobe virtio_balloon")
            let outcome = try measure(guest, isQuire: isQuire)
            func seconds(_ value: Double?) -> String { value.map { Table.number($0) + " s" } ?? "never" }
            table.row(
                isQuire ? "Quire" : "free page reporting", "\(outcome.freePages)",
                Table.percent(Double(outcome.smallBlocks) / Double(outcome.freePages)), Table.percent(outcome.atOnce),
                seconds(outcome.half), seconds(outcome.nearly), seconds(outcome.all), Table.percent(outcome.atDeadline),
                Table.percent(outcome.later))
            results.append((isQuire ? "quire" : "free_page_reporting", [
                "freed_by_load_pages": .integer(outcome.freed), "free_pages": .integer(outcome.freePages),
                "free_pages_in_blocks_below_2_mib": .integer(outcome.smallBlocks),
                "free_pages_on_per_cpu_lists": .integer(outcome.perCPU), "back_at_once_percent": .number(outcome.atOnce * 100),
                "seconds_to_50_percent": outcome.half.map { .number($0) } ?? .null,
                "seconds_to_90_percent": outcome.nearly.map { .number($0) } ?? .null,
                "seconds_to_99_percent": outcome.all.map { .number($0) } ?? .null,
                "deadline_seconds": .number(deadline), "back_at_deadline_percent": .number(outcome.atDeadline * 100),
                "back_at_twice_the_deadline_percent": .number(outcome.later * 100), "module_marked_pages": outcome.marked.map { .integer($0) } ?? .null,
                "module_recycled_pages": outcome.recycled.map { .integer($0) } ?? .null,
                "not_back_by_16_mib": isQuire ? .object(outcome.missing) : .null, "guest_verified": .text(outcome.verified),
            ]))
            guard isQuire else { continue }
            report.add(Self.bar(outcome.atDeadline * 100))
            let state = try guest.figures("/sys/kernel/debug/quire/state")
            let status = try StatusReport.collect([guest.name], in: RuntimeDirectory.standard())[0]
            let ram = Double(mebibytes) * 1048576
            metadata = Metadata(
                guestShare: Double(state["metadata_bytes"] ?? 0) / ram, hostShare: Double(status.mapBytes) / ram)
        }
        table.note("Period \(periodMilliseconds) ms; free page reporting at its defaults (2 s, blocks of 2 MiB and more).")
        report.add("fragmented", .object(results), table: table)
        return metadata
    }

    private func measure(_ guest: GuestMachine, isQuire: Bool) throws -> Outcome {
        let file = try guest.memoryFile()
        guard let free = try guest.figures("/proc/meminfo")["MemFree"] else { throw QuireError(.system, "no MemFree") }
        // The rest is for page tables and for the guest's shell.
        let load = free / 1024 - 48
        progress("\(guest.name): filling \(load) MiB")
        var outcome = Outcome()
        try guest.send("quire-load fragment \(load) \(Int(2 * deadline) + 20) --keep 50 &")
        _ = try guest.read(until: "fragmented ", seconds: 600)
        let started = monotonicNanoseconds()
        let first = try Residency(file)
        outcome.freed = Int(try guest.read(until: " ", seconds: 10)) ?? 0
        progress("\(guest.name): \(outcome.freed) pages freed, watching for \(Table.number(2 * deadline)) s")

        var course: [(seconds: Double, holes: Int)] = []
        func watch(until seconds: Double) throws {
            while true {
                let now = Double(monotonicNanoseconds() - started) / 1e9
                if now >= seconds { return }
                let status = try file.status()
                course.append((now, Int((status.byteCount - status.allocatedBytes) / pageBytes)))
                ProcessCalls.sleep(milliseconds: 100)
            }
        }
        /// The host's picture, then the guest's.
        func look() throws -> (Residency, [UInt8]) {
            let residency = try Residency(file)
            // No new process for it: the shell itself writes.
            try guest.run("echo 1 >/sys/kernel/debug/quire_free/take")
            let picture = try guest.run("base64 /sys/kernel/debug/quire_free/bitmap")
            return (residency, decodeBase64(picture))
        }
        try watch(until: deadline)
        let (residency, picture) = try look()
        let counts = try guest.figures("/sys/kernel/debug/quire_free/counts")
        outcome.freePages = residency.count(of: picture) { _ in true }
        outcome.smallBlocks = (counts["in_small_blocks"] ?? 0) + (counts["on_per_cpu_lists"] ?? 0)
        outcome.perCPU = counts["on_per_cpu_lists"] ?? 0
        guard outcome.freePages > outcome.freed / 2 else { throw QuireError(.system, "\(guest.name): the guest has no free pages") }
        let back = residency.count(of: picture) { !$0 }
        outcome.atDeadline = Double(back) / Double(outcome.freePages)
        if isQuire {
            let state = try guest.figures("/sys/kernel/debug/quire/state")
            (outcome.marked, outcome.recycled) = (state["marked_pages"], state["recycled_pages"])
        }
        outcome.missing = residency.missing(picture)
        outcome.atOnce = Double(first.count(of: picture) { !$0 }) / Double(outcome.freePages)
        try watch(until: 2 * deadline)
        let (last, lastPicture) = try look()
        outcome.later = Double(last.count(of: lastPicture) { !$0 }) / Double(max(1, last.count(of: lastPicture) { _ in true }))

        // Holes that are no free pages: RAM that the guest uses and has never touched. Their number does not change here.
        let others = residency.holes - back
        func time(_ share: Double) -> Double? {
            course.first { Double($0.holes - others) >= share * Double(outcome.freePages) }?.seconds
        }
        (outcome.half, outcome.nearly, outcome.all) = (time(0.5), time(0.9), time(0.99))
        _ = try guest.read(until: "ok ", seconds: 300)
        outcome.verified = "ok " + (try guest.read(until: "\n", seconds: 10))
        return outcome
    }
}

/// Which pages of a memory file the host has. Guest RAM below the hole for PCI starts at the file's start.
struct Residency {
    private var resident: [Bool]

    init(_ file: borrowing Descriptor) throws {
        let byteCount = try file.status().byteCount
        resident = [Bool](repeating: false, count: Int(byteCount / pageBytes))
        var position: UInt64 = 0
        while let data = Memfd.nextData(file.raw, from: position, to: byteCount) {
            for page in data.lowerBound / pageBytes..<(data.upperBound + pageBytes - 1) / pageBytes { resident[Int(page)] = true }
            position = data.upperBound
        }
    }

    var holes: Int { resident.count { !$0 } }

    /// Pages of a bitmap that the host has, by 16 MiB, where they are more than 64.
    func missing(_ bitmap: [UInt8]) -> [(String, JSON)] {
        var counts: [Int: Int] = [:]
        for page in 0..<min(resident.count, bitmap.count * 8)
        where bitmap[page / 8] >> UInt8(page % 8) & 1 != 0 && resident[page] { counts[page / 4096, default: 0] += 1 }
        return counts.filter { $0.value > 64 }.sorted { $0.key < $1.key }.map { ("\($0.key)", .integer($0.value)) }
    }

    /// Pages of a bitmap, lowest bit first, whose residency is as asked.
    func count(of bitmap: [UInt8], where wanted: (Bool) -> Bool) -> Int {
        var count = 0
        for page in 0..<min(resident.count, bitmap.count * 8)
        where bitmap[page / 8] >> UInt8(page % 8) & 1 != 0 && wanted(resident[page]) { count += 1 }
        return count
    }
}

/// Anything that is no digit of base64, line breaks for one, is passed over.
func decodeBase64(_ text: String) -> [UInt8] {
    var bytes: [UInt8] = []
    var bits: UInt32 = 0, held = 0
    for character in text.utf8 {
        let digit: UInt8
        switch character {
        case UInt8(ascii: "A")...UInt8(ascii: "Z"): digit = character - UInt8(ascii: "A")
        case UInt8(ascii: "a")...UInt8(ascii: "z"): digit = character - UInt8(ascii: "a") + 26
        case UInt8(ascii: "0")...UInt8(ascii: "9"): digit = character - UInt8(ascii: "0") + 52
        case UInt8(ascii: "+"): digit = 62
        case UInt8(ascii: "/"): digit = 63
        default: continue
        }
        bits = bits << 6 | UInt32(digit)
        held += 6
        if held >= 8 {
            held -= 8
            bytes.append(UInt8(truncatingIfNeeded: bits >> UInt32(held)))
        }
    }
    return bytes
}
