import Glibc
import Host
import Platform

extension Guest {
    /// The swap disk's path in the guest: found by its serial number, as an operator's udev rule would.
    func swapDisk() throws -> String {
        let path = try sh("for d in /sys/block/vd*; do [ \"$(cat $d/serial)\" = quire-swap ] && echo /dev/${d##*/}; done; true")
            .filter { !$0.isWhitespace }
        guard path.hasPrefix("/dev/vd") else { throw Trouble("the guest has no swap disk: '\(path)'") }
        return path
    }

    /// Makes it the guest's swap space; freed pages are discarded.
    @discardableResult func swapOn() throws -> String {
        let disk = try swapDisk()
        try sh("mkswap \(disk) >/dev/null && swapon -d \(disk)")
        return disk
    }

    /// What the guest has swapped out, in KiB.
    func swappedKiB() throws -> Int {
        let text = try sh("awk '/SwapTotal|SwapFree/ {print $2}' /proc/meminfo").split(whereSeparator: \.isWhitespace).compactMap { Int($0) }
        guard text.count == 2 else { throw Trouble("/proc/meminfo says \(text)") }
        return text[0] - text[1]
    }

    /// `quire tmem …` for this guest.
    func tmem(_ command: String, _ more: [String] = []) throws -> (status: Int32, text: String) {
        try Program.run(["env", "QUIRE_RUNTIME_DIR=" + runtime.base, Program.quire, "tmem", command, machine.name] + more)
    }

    /// The swap pool as of now.
    func swapPool() throws -> StatusReport.Tmem.Pool {
        let report = try TmemCommand.report(CommandSocket.ask(TmemCommand.list.request, of: machine.name, in: runtime))
        guard let pool = report.pools.first else { throw Trouble("there is no pool") }
        return pool
    }

    /// The file of what the guest has swapped, as `quire run` holds it.
    func swapFile() throws -> Descriptor {
        for name in Files.list("/proc/\(pid)/fd") ?? [] {
            let path = "/proc/\(pid)/fd/\(name)"
            if let target = Files.target(ofLink: path), target.hasPrefix("/memfd:"), target.contains("-swap") {
                return try Descriptor.open(path, O_RDWR)
            }
        }
        throw Trouble("quire run holds no file of swapped pages")
    }
}
