import Host
import Testing

extension Integration {
    /// The module's promise, held against the kernel's own lists: no page in use is ever marked. quire_check.ko stops the
    /// machine every round, builds the exact set of free pages and compares; its load takes memory by every path that the
    /// allocator has, and it discards what is marked, as a host would, so that a wrong mark has consequences.
    @Suite(.serialized) struct FreeSet {
        /// Compaction, again and again, of memory that programs churn.
        private static func movement(_ churn: String, every seconds: Double = 1) -> String {
            """
            (while [ ! -e /tmp/stop ]; do echo 1 > /proc/sys/vm/compact_memory; sleep \(seconds); done) & \
            (while [ ! -e /tmp/stop ]; do quire-load churn \(churn) --threads 2 >> /tmp/churn 2>&1 || break; done) &
            """
        }

        /// File caches that are reclaimed, memory taken until nothing is left, and the OOM killer.
        private static let pressure = """
            mkdir -p /tmp/m; modprobe ext4; mkfs.ext4 -q -F /dev/vda && mount /dev/vda /mnt; \
            (while [ ! -e /tmp/stop ]; do cat /mnt/big > /dev/null 2>&1 || \
            dd if=/dev/urandom of=/mnt/big bs=1M count=300 2> /dev/null; done) & \
            (while [ ! -e /tmp/stop ]; do echo 1000 > /proc/self/oom_score_adj; sh -c 'echo 1000 > /proc/self/oom_score_adj; \
            exec quire-load hold 1024 0' > /dev/null 2>&1; sleep 2; done) 2> /dev/null &
            """

        /// What grows while there is pressure of every kind. The kernel's, in this order: the OOM killer has killed; file caches were
        /// reclaimed; compaction has looked for room; pages were moved. (`compact_success` is of allocations that wait for compaction
        /// alone, not of compaction that somebody asks for.) The checker's: loads that got memory, and pages discarded as a host would,
        /// in the stopped machine and at any time. Both kernels count all of it.
        private static let kernelCounts = ["oom_kill", "pgsteal_file", "compact_free_scanned", "pgmigrate_success"]
        private static let checkerCounts = ["vmalloc", "bulk", "orders", "zapped", "discarded"]

        private func expectNoViolation(_ machine: Machine, rounds: Int) throws {
            let folder = try Folder()
            var machine = machine
            machine.memory = "384M,slots=1,maxmem=2G"
            machine.arguments += ["-drive", "file=\(try folder.sparseFile("disk", byteCount: 512 << 20)),format=raw,if=virtio"]
            let guest = try Guest(machine, in: folder)
            try guest.watched {
                try guest.loadModule()
                try guest.waitForActive()
                try guest.sh(Self.pressure, within: Guest.patience(for: 30))
                try guest.sh(Self.movement("120 3 --file /mnt"))
                // It goes on until it was seen enough.
                try guest.sh("insmod /lib/quire/quire_check.ko rounds=1000000 gap_ms=100")
                let before = try Self.counts(guest)
                try guest.wait(for: "\(rounds) rounds, and every kind of pressure in them", within: Guest.patience(for: rounds * 3)) {
                    let now = try Self.counts(guest)
                    return Self.number("rounds", in: now) >= rounds
                        && (Self.kernelCounts + Self.checkerCounts).allSatisfy { Self.number($0, in: now) > Self.number($0, in: before) }
                }
                let needed = try Self.hotplug(guest) + rounds / 4
                var text = ""
                // Nobody can rely on alloc_contig_range() finding a block to empty while memory is short: that it ever did is asked for
                // here, where half of the DIMM is free.
                try guest.wait(for: "\(rounds / 4) rounds more", within: Guest.patience(for: rounds * 3)) {
                    text = try Self.counts(guest)
                    return Self.number("rounds", in: text) >= needed && Self.number("contig", in: text) > 0
                }
                print(text)
                // Already ended, all of it, or about to.
                try guest.sh("touch /tmp/stop; wait", within: Effort.patience * 2)
                let wrong = try guest.run("grep -v '^ok ' /tmp/churn")
                #expect(wrong.status == 1, "\(wrong.text)")
                #expect(try guest.run("grep -q '^ok ' /tmp/churn").status == 0, "the churn did nothing")
                #expect(guest.status.recycledTotalPages > 0)
                #expect(Self.number("violations", in: text) == 0 && Self.number("corruptions", in: text) == 0, "\(text)")
            }
        }

        /// What the checker and the kernel have counted, each as `name=number`.
        private static func counts(_ guest: Guest) throws -> String {
            try guest.sh(
                "cat /sys/kernel/debug/quire_check/result; grep -E '^(\(kernelCounts.joined(separator: "|"))) ' /proc/vmstat | tr ' ' =")
        }

        /// CPUs go and come, and memory comes, while rounds are run; then as much of it goes as can, with the checker's own
        /// load on it (the pressure ends before, or nothing could be moved out). Returns the rounds so far.
        private static func hotplug(_ guest: Guest) throws -> Int {
            for _ in 0..<2 { try guest.sh("cd /sys/devices/system/cpu/cpu1; echo 0 > online; sleep 1; echo 1 > online") }
            _ = try guest.plugDIMM()
            try guest.wait(for: "a larger table") {
                try guest.figure("page_count") * 4096 > 1 << 30 && guest.figure("marking") == 1
            }
            try guest.sh("sleep 2; touch /tmp/stop; sleep 1")
            // Half of the DIMM: the kernel tries each block for up to a quarter of a minute, and is not to be stopped.
            try guest.sh(
                "for m in /sys/devices/system/memory/memory3[23]/state; do timeout 3 sh -c \"echo offline > $m\"; done 2>/dev/null; true",
                within: Guest.patience(for: 30))
            return number("rounds", in: try counts(guest))
        }

        private static func number(_ name: String, in text: String) -> Int {
            for word in text.split(whereSeparator: \.isWhitespace) where word.hasPrefix(name + "=") {
                return Int(word.dropFirst(name.count + 1).prefix(while: \.isNumber)) ?? -1
            }
            return -1
        }

        static let oldest = Machine(kernel: .v6_1, qemu: .distribution)
        static let newest = Machine(kernel: .v6_12, qemu: .ten)

        @Test func noPageInUseIsMarkedOn61() throws { try expectNoViolation(Self.oldest, rounds: Effort.checkRounds) }

        @Test func noPageInUseIsMarkedOn612() throws { try expectNoViolation(Self.newest, rounds: Effort.checkRounds) }

        /// The checker finds what it looks for: each hook that is left out is noticed.
        @Test func aMissingHookIsNoticed() throws { try expectNotice(Self.oldest, "quire_nobulk", "quire_noisolate") }

        /// Only 6.12 has that hook. It is called where a page could not be moved after all, which is rare.
        @Test func aMissingCompactionHookIsNoticed() throws { try expectNotice(Self.newest, "quire_nocompaction") }

        /// What counts is the checker's own line on the console, and nothing else. So that the guest lives to say it, nobody
        /// acts on a wrong mark: the backend's period is longer than the test, and the checker discards nothing. So one guest is enough
        /// for several modules: what the one before has marked is gone with its table.
        private func expectNotice(_ machine: Machine, _ modules: String...) throws {
            var machine = machine
            machine.memory = "384M"
            machine.options = ["--period", "1h"]
            let guest = try Guest(machine)
            try guest.watched {
                for module in modules {
                    try guest.sh("insmod /lib/quire/\(module).ko")
                    try guest.sh("rm -f /tmp/stop; " + Self.movement("150 3", every: 0.1))
                    try guest.console.send(
                        "dmesg -n 7; insmod /lib/quire/quire_check.ko rounds=\(Effort.controlRounds) gap_ms=20 zap=0 claim=0")
                    var line = ""
                    repeat {
                        try guest.console.expect("quire_check: ", within: Guest.patience(for: 60))
                        line = try guest.console.expect("first_bad=", within: Effort.patience)
                    } while Self.number("violations", in: line) == 0 && !line.hasPrefix("FINAL")
                    #expect(Self.number("violations", in: line) > 0, "\(module): \(line)")
                    #expect(guest.status.recycledTotalPages == 0)
                    guard module != modules.last else { break }
                    // From here on the console says nothing of this one, which would be taken for the next one's. Without load, because
                    // the kernel is patched (`QEMU.acceleration`).
                    try guest.sh("dmesg -n 1; touch /tmp/stop; wait; rmmod quire_check && rmmod \(module)", within: Effort.patience * 2)
                }
            }
        }
    }
}
