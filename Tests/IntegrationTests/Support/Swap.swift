import Glibc
import Host
import Platform

extension Guest {
    /// A disk's path in the guest: found by its serial number, as an operator's udev rule would.
    func disk(_ serial: String) throws -> String {
        let path = try sh("for d in /sys/block/vd*; do [ \"$(cat $d/serial)\" = \(serial) ] && echo /dev/${d##*/}; done; true")
            .filter { !$0.isWhitespace }
        guard path.hasPrefix("/dev/vd") else { throw Trouble("the guest has no disk \(serial): '\(path)'") }
        return path
    }
    func swapDisk() throws -> String { try disk("quire-swap") }

    /// Makes it swap space of the guest's, all of it or so much; freed pages are discarded. The guest fills one before the next.
    @discardableResult func swapOn(_ serial: String = "quire-swap", mebibytes: Int? = nil) throws -> String {
        let disk = try disk(serial)
        try sh("mkswap \(disk) \(mebibytes.map { "\($0 * 1024)" } ?? "") >/dev/null && swapon -d \(disk)")
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
