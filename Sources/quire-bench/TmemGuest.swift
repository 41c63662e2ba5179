import Bench
import Glibc
import Host
import Platform

/// A guest that needs more memory than it has, swapping to three places, one after the other in the same boot: the swap disk
/// of `quire run`, a file-backed disk of QEMU's, and zram in the guest's own memory.
///
/// What is measured is what a program in the guest waits for: the time of a read that is a major fault, page by page in
/// random order (no read-ahead), and how fast all pages come back in order (read-ahead of 8). Half of each page can be compressed.
struct TmemGuest {
    let programs: Programs

    private static let mebibytes = 256
    /// As much as all three can hold: what zram compresses to a half stays in the guest's own memory.
    private static let needed = 300

    private struct Figures {
        let outMebibytes: Double
        let median: Double
        let p99: Double
        let inMebibytes: Double
        let faults: Double
    }

    func run(into report: inout Report) throws {
        let image = programs.runtime + "/quire-bench-swap-\(ProcessCalls.ownPID)"
        let file = try Descriptor.open(image, O_RDWR | O_CREAT)
        defer { Files.remove(image) }
        try file.truncate(to: 1 << 30)
        let runtime = try Recycle.makeRuntimeDirectory()
        defer { Files.removeDirectory(runtime) }
        let accelerator = programs.hasKVM ? ["-accel", "kvm", "-cpu", "host,vmx=off,svm=off"] : ["-accel", "tcg,thread=multi"]
        var options = GuestMachine.Options(accelerator: accelerator + ["-smp", "2"])
        options.mebibytes = Self.mebibytes
        options.period = "10s"
        // As many queues as QEMU gives its own disk.
        options.run = ["--swap", "1G", "--swap-queues", "2"]
        options.devices = ["-drive", "file=\(image),format=raw,if=none,id=file,cache=none", "-device", "virtio-blk-pci,drive=file,serial=file"]
        let guest = try GuestMachine("swapping", options, programs)
        func disk(_ serial: String) throws -> String {
            try guest.run("for d in /sys/block/vd*; do [ \"$(cat $d/serial)\" = \(serial) ] && echo /dev/${d##*/}; done; true")
                .filter { !$0.isWhitespace }
        }
        let places = [
            ("swap disk of quire", try disk("quire-swap")), ("file-backed disk", try disk("file")), ("zram in the guest", "/dev/zram0"),
        ]
        try guest.run("modprobe zram && echo lz4 > /sys/block/zram0/comp_algorithm; echo 1G > /sys/block/zram0/disksize")
        var table = Table(
            title: "a guest of \(Self.mebibytes) MiB that needs \(Self.needed) MiB (\(programs.hasKVM ? "KVM" : "no KVM here: emulated, the CPU's part is many times a real guest's"))",
            columns: ["swaps to", "a page back, median us", "99 % us", "in order MiB/s", "written MiB/s"])
        var results: [(String, JSON)] = []
        for (name, device) in places {
            progress("swapping: \(name)")
            do {
                let figures = try measure(guest, device)
                table.row(name, Table.number(figures.median), Table.number(figures.p99), Table.number(figures.inMebibytes), Table.number(figures.outMebibytes))
                results.append((name, [
                    "median_us": .number(figures.median), "p99_us": .number(figures.p99), "in_order_mib_s": .number(figures.inMebibytes),
                    "written_mib_s": .number(figures.outMebibytes), "faults_in_order": .number(figures.faults),
                ]))
            } catch {
                // What was measured of the others counts.
                table.row(name, "-", "-", "-", "-")
                table.note("\(name): \("\(error)".filter { $0 != "\n" })")
                results.append((name, ["failed": .text("\(error)")]))
                try guest.run("swapoff \(device) || ! grep -q \(device) /proc/swaps", seconds: 300)
            }
        }
        table.note("zram takes its room from the guest's own memory. Written: all \(Self.needed) MiB, some of them swapped out meanwhile.")
        results.append(("kvm", .bool(programs.hasKVM)))
        report.add("swap_in_guest", .object(results), table: table)
    }

    private func measure(_ guest: GuestMachine, _ device: String) throws -> Figures {
        try guest.run("mkswap \(device) >/dev/null && swapon \(device) && echo 0 > /proc/sys/vm/page-cluster", seconds: 300)
        let random = try load(guest)
        try guest.run("echo 3 > /proc/sys/vm/page-cluster")
        let ordered = try load(guest)
        try guest.run("swapoff \(device)", seconds: 300)
        return Figures(
            outMebibytes: Double(Self.needed) / random[1], median: random[3], p99: random[4], inMebibytes: Double(Self.needed) / ordered[5],
            faults: ordered[6])
    }

    /// The numbers that quire-load says: pages, seconds to write them, samples, median, 99 %, seconds in order, faults.
    private func load(_ guest: GuestMachine) throws -> [Double] {
        let said = try guest.run("quire-load swapin \(Self.needed)", seconds: 900)
        guard let line = said.split(separator: "\n").last(where: { $0.hasPrefix("ok ") }) else {
            throw QuireError(.guest, "quire-load says \(said.suffix(200))")
        }
        let numbers = line.split(whereSeparator: { $0 == " " || $0 == "," }).compactMap { Double($0) }
        guard numbers.count == 7 else { throw QuireError(.guest, "quire-load says \(line)") }
        return numbers
    }
}
