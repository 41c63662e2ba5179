import Glibc
import Host
import Platform
import Testing

extension Integration {
    /// Guests that need more memory than they have, and swap into the host's.
    @Suite(.serialized) struct Tmem {
        private static let small = Machine(memory: "256M", options: ["--swap", "1G", "--no-merge"])
        /// MiB, more than such a guest has.
        private static let much = 330
        private static let seconds = Effort.scaled(20)

        /// Patterns larger than memory are checked and written anew while the backend and quired are killed again and again: not
        /// one byte is wrong, the guest sees no error, and what is freed at the end goes back to the host. It swaps to the VM's own
        /// disk, which its backend has, and where that is full to a shared disk, which quired has.
        @Test(arguments: [QEMU.distribution, .ten])
        func swapsAcrossDeaths(_ qemu: QEMU) throws {
            let store = try Store(["--keep", "--shared-disk", "more,size=512M"])
            let guest = try Guest(Self.small.with {
                $0.qemu = qemu
                $0.options += ["--swap-queues", "2", "--store", store.path, "--shared-disk", "more"]
            })
            try guest.watched {
                let disks = [try guest.swapOn(mebibytes: 64), try guest.swapOn("more")]
                let pools = { [try guest.swapPool(), try store.sharedDisk("more").tmem.pools[0]] }
                // One QEMU for minutes, the other to see that it does, too.
                let times = qemu == .distribution ? 6 : 1
                let load = try guest.console.start("quire-load sweep \(Self.much) \(Self.seconds * times) --threads 2")
                try guest.wait(for: "the guest to swap to both disks") { try pools().allSatisfy { $0.pages > 8000 } }
                let before = try pools()
                for _ in 0..<Effort.kills * times {
                    let backend = guest.backendPID, worker = store.worker
                    try guest.console.drain(Int32.random(in: 300...1200))
                    ProcessCalls.signal(worker, SIGKILL)
                    // Sometimes while quired is away, sometimes long after.
                    try guest.console.drain(Int32.random(in: 0...1200))
                    ProcessCalls.signal(backend, SIGKILL)
                    try guest.wait(for: "another backend and another quired") {
                        ![backend, 0].contains(guest.backendPID) && (try? store.sharedDisk("more").attached) == [guest.machine.name]
                            && store.worker != worker
                    }
                }
                let (text, status) = try guest.console.finish(load, within: Guest.patience(for: Self.seconds * times) * 2)
                #expect(status == 0 && text.contains("ok "), "\(text)\n\(store.errors)")
                let after = try pools()
                print("\(qemu): \(text.filter { $0 != "\n" }); at first \(before.map(\.pages)) pages swapped, \(before.map { $0.storedBytes >> 20 }) MiB; read \(after.map(\.hits)) since the last deaths")
                #expect(after.allSatisfy { $0.hits > 0 })
                for disk in disks { try guest.sh("swapoff \(disk) && swapon -d \(disk)", within: Effort.patience * 2) }
                try guest.wait(for: "discarded pages to be free") { try pools().allSatisfy { $0.pages < 64 } }
                try guest.expectQuietLog()
            }
        }

        /// The control of the above: bytes that change behind the store's back are seen.
        @Test func aByteThatChangesIsSeen() throws {
            let guest = try Guest(Self.small)
            try guest.watched {
                try guest.swapOn()
                let load = try guest.console.start("quire-load hold \(Self.much) --full")
                try guest.console.expect("peak\n", within: Effort.patience * 2)
                try guest.wait(for: "the guest to swap") { try guest.swapPool().pages > 10_000 }
                let file = try guest.swapFile()
                let end = try file.status().byteCount
                var at: UInt64 = 0, flipped = 0
                // A bit of every hundredth page of the store, wherever its bytes are.
                while let data = Memfd.nextData(file.raw, from: at, to: end) {
                    var place = max(at, data.lowerBound)
                    while place < data.upperBound {
                        var byte: UInt8 = 0
                        if unsafe pread(file.raw, &byte, 1, off_t(place + 777)) == 1, byte != 0 {
                            byte ^= 4
                            _ = unsafe pwrite(file.raw, &byte, 1, off_t(place + 777))
                            flipped += 1
                        }
                        place += 4096 * 100
                    }
                    at = place
                }
                #expect(flipped > 10)
                try guest.console.send("")
                // Wrong bytes, or an I/O error where the store itself has noticed: SIGBUS.
                let (text, status) = try guest.console.finish(load, within: Effort.patience * 2)
                #expect(status != 0, "\(flipped) flipped bits were not seen: \(text)")
            }
        }

        /// No room in the pool, by the VM's own limit or by that of all: I/O errors, and the guest lives. What it was told is written
        /// stays.
        @Test(arguments: [["--swap-overcommit", "16"], []]) func aFullPool(_ limit: [String]) throws {
            let store = try Store(["--keep", "--tmem-cap", "64M"])
            let guest = try Guest(Self.small.with {
                $0.options = ["--swap", "1G", "--no-merge", "--store", limit.isEmpty ? store.path : store.path + ".none"] + limit
            })
            try guest.watched {
                let disk = try guest.swapOn()
                // What it writes cannot be compressed, and 64 MiB do not hold it: the kernel ends it, or it waits. In a cgroup:
                // of a whole guest that finds no memory the kernel, which doesn't know that its swap is full, may let the
                // shell wait as well, for minutes on a slow machine.
                try guest.sh("mkdir -p /tmp/cg && mount -t cgroup2 none /tmp/cg && echo +memory >/tmp/cg/cgroup.subtree_control")
                try guest.sh("mkdir /tmp/cg/load && echo 96M >/tmp/cg/load/memory.max")
                try guest.sh(
                    """
                    (sh -c 'echo $$ >/tmp/cg/load/cgroup.procs; exec quire-load hold \(Self.much) --full' </dev/null >/tmp/hold 2>&1 & \
                    echo $! >/tmp/holder; wait $!; echo $? >/tmp/held) & true
                    """)
                try guest.wait(for: "a write that finds no room", within: Effort.patience * 2) { try guest.swapPool().putsFailed > 0 }
                try guest.wait(for: "the load's end", within: Effort.patience * 2) {
                    try guest.run("[ -s /tmp/held ] || kill -9 $(cat /tmp/holder); [ -s /tmp/held ]").status == 0
                }
                #expect(guest.isRunning)
                #expect(try guest.sh("cat /tmp/hold; true").contains("WRONG") == false)
                // The status page says what was up to a period ago.
                try guest.wait(for: "the status to say why") { guest.status.tmem.reason.contains("no room") }
                #expect(guest.status.tmem.reason.contains("tmem-cap of quired") == limit.isEmpty)
                #expect(guest.status.tmem.usedBytes < 66 << 20)
                #expect(guest.stderr.contains("the swap disk has no room"))
                // And it goes on swapping when there is room again.
                try guest.sh("swapoff \(disk); swapon -d \(disk)", within: Effort.patience * 2)
                let text = try guest.sh("quire-load sweep 230 3", within: Guest.patience(for: 20))
                #expect(text.contains("ok "), "\(text)")
                try guest.sh("! dmesg | grep -E 'BUG|WARNING|Oops|stall|blocked for'")
            }
        }

        /// The disk as a disk: written at random through two queues, read back and compared, over deaths of the backend.
        @Test func verifiesAsADisk() throws {
            let guest = try Guest(Machine(qemu: .ten, options: ["--swap", "256M", "--swap-queues", "2", "--no-merge", "--swap-compression", "zstd"]))
            try guest.watched {
                let disk = try guest.swapDisk()
                #expect(try guest.sh("ls /sys/block/\(disk.dropFirst(5))/mq | wc -l").hasPrefix("2"))
                #expect(try guest.sh("cat /sys/block/\(disk.dropFirst(5))/queue/discard_granularity").hasPrefix("4096"))
                for number in 1...2 {
                    let load = try guest.console.start(
                        """
                        fio --name=v --filename=\(disk) --direct=1 --rw=randwrite --bsrange=4k-64k --size=12M --offset_increment=32M \
                        --numjobs=4 --thread --ioengine=psync --verify=crc32c --verify_fatal=1 --randseed=\(number) \
                        --group_reporting --minimal > /tmp/fio 2>&1 || { cat /tmp/fio; false; }
                        """)
                    let pid = guest.backendPID
                    try guest.console.drain(Int32.random(in: 500...1500))
                    ProcessCalls.signal(pid, SIGKILL)
                    let (text, status) = try guest.console.finish(load, within: Guest.patience(for: 120))
                    #expect(status == 0, "\(text)")
                }
                let pages = try guest.swapPool().pages
                #expect(pages > 1000)
                try guest.sh("blkdiscard \(disk)")
                try guest.wait(for: "the discard") { try guest.swapPool().pages == 0 }
                #expect(try guest.sh("cmp -n 1048576 \(disk) /dev/zero && echo same").contains("same"))
                try guest.expectQuietLog()
            }
        }

        /// What an operator does, and what it is answered.
        @Test func commands() throws {
            let guest = try Guest(Self.small)
            try guest.watched {
                try guest.swapOn()
                let file = guest.folder.path + "/saved"
                // A guest that runs is neither saved nor replaced.
                var (status, text) = try guest.tmem("save", [file])
                #expect(status == 1 && text.contains("pause it first") && text.filter { $0 == "\n" }.count == 1, "\(text)")
                #expect(Files.identity(of: file) == nil && Files.identity(of: file + ".partial") == nil)
                // What somebody has put where it is written first gets nothing of it.
                let bait = guest.folder.path + "/bait"
                try host("sh", "-c", "umask 0; echo old >\(bait); ln -s \(bait) \(file).partial")
                let load = try guest.console.start("quire-load hold \(Self.much)")
                try guest.console.expect("peak\n", within: Effort.patience * 2)
                try guest.qmp.command("stop")
                try guest.wait(for: "the device to stop") { try guest.tmem("save", [file]).status == 0 }
                let mode = try Descriptor.open(file, O_RDONLY | O_NOFOLLOW).status().mode
                #expect(try Files.read(bait) == "old\n" && mode == 0o600)
                let pages = try guest.swapPool().pages
                (status, text) = try guest.tmem("restore", [file])
                #expect(status == 0 && text == "quire: \(pages) pages restored\n", "\(text)")
                let damaged = guest.folder.path + "/damaged"
                try host("cp", file, damaged)
                try host("truncate", "-s", "-1", damaged)
                (status, text) = try guest.tmem("restore", [damaged])
                #expect(status == 1 && text.contains("ends too early"), "\(text)")
                try guest.qmp.command("cont")
                try guest.console.send("")
                #expect(try guest.console.finish(load, within: Effort.patience * 2).status == 0)
                for (command, more) in [("freeze", []), ("thaw", []), ("flush", ["1M"]), ("weight", ["swap", "50"]), ("cap", ["2G"]), ("cap", ["none"])] as [(String, [String])] {
                    (status, text) = try guest.tmem(command, more + ["--json"])
                    #expect(status == 0 && text.contains("\"result\" : \"done\""), "\(command): \(text)")
                }
                (status, text) = try guest.tmem("cap", ["64K"])
                #expect(status == 1 && text.filter { $0 == "\n" }.count == 1, "\(text)")
                (status, text) = try guest.tmem("weight", ["other", "50"])
                #expect(status == 1 && text.contains("there is no pool 'other'"), "\(text)")
                let list = try host("env", "QUIRE_RUNTIME_DIR=" + guest.runtime.base, Program.quire, "tmem", "list")
                #expect(list.contains("swap  persistent"), "\(list)")
                try guest.wait(for: "the status to show the pool") { guest.status.tmem.pools.first?.pages ?? 0 > 1000 }
                #expect(try guest.statusCommand().tmem.pools.first?.capacityBytes == 1 << 30)
                try guest.expectQuietLog()
            }
        }

        /// A snapshot is loaded while QEMU runs: the guest's memory is of then, the swap disk of now, where the same pages have other
        /// bytes. The guest gets I/O errors and none of them, from a backend that is started meanwhile, too; and all is right with
        /// what was saved along with the snapshot. The control: what is restored though it is of now is seen as wrong.
        @Test func loadsASnapshot() throws {
            let folder = try Folder()
            let arguments = try Pause.disk(in: folder)
            let guest = try Guest(Self.small.with { $0.arguments = arguments }, in: folder)
            let then = folder.path + "/then", now = folder.path + "/now"
            try guest.watched {
                let disk = try guest.swapOn()
                // Nothing else is to swap: the shell has to live.
                try guest.sh("mkdir -p /tmp/cg && mount -t cgroup2 none /tmp/cg && echo +memory >/tmp/cg/cgroup.subtree_control")
                try guest.sh("mkdir /tmp/cg/load && echo 16M >/tmp/cg/load/memory.max")
                func hold(seed: Int) throws -> Int {
                    let load = try guest.console.start(
                        "sh -c 'echo $$ >/tmp/cg/load/cgroup.procs; exec quire-load hold 40 --seed \(seed)'")
                    try guest.console.expect("peak\n", within: Effort.patience * 2)
                    try guest.wait(for: "the load to swap") { try guest.swapPool().pages > 4000 }
                    return load
                }
                func check(_ load: Int) throws -> (text: String, status: Int) {
                    try guest.console.send("")
                    return try guest.console.finish(load, within: Effort.patience * 2)
                }
                func save(_ file: String) throws {
                    try guest.qmp.command("stop")
                    try guest.wait(for: "the device to stop") { try guest.tmem("save", [file]).status == 0 }
                }
                /// The guest as it was then, with what is in the file on its swap disk.
                func load(_ file: String?) throws {
                    try guest.qmp.command("stop")
                    try guest.qmp.human("loadvm one", within: Guest.patience(for: 60))
                    if let file {
                        let (status, text) = try guest.tmem("restore", [file])
                        #expect(status == 0, "\(text)")
                    }
                    try guest.qmp.command("cont")
                }

                let one = try hold(seed: 1)
                try save(then)
                try guest.qmp.human("savevm one", within: Guest.patience(for: 60))
                try guest.qmp.command("cont")
                var (text, status) = try check(one)
                #expect(status == 0 && text.contains("ok "), "\(text)")
                // All that was there is discarded, and the same places are filled from the beginning.
                try guest.sh("swapoff \(disk) && swapon -d \(disk)", within: Effort.patience * 2)
                _ = try hold(seed: 2)
                try save(now)

                try load(nil)
                try guest.wait(for: "the warning") { guest.stderr.contains("its swap disk did not: every request is an I/O error") }
                (text, status) = try check(one)
                #expect(status != 0 && !text.contains("WRONG") && !text.contains("ok "), "\(status): \(text)")
                let backend = guest.backendPID
                ProcessCalls.signal(backend, SIGKILL)
                try guest.wait(for: "another backend") { ![backend, 0].contains(guest.backendPID) }
                #expect(try guest.run("dd if=\(disk) of=/dev/null bs=4k count=1 iflag=direct 2>/dev/null").status != 0)
                try guest.wait(for: "the status to say why") { guest.status.tmem.reason.contains("waits for its content") }
                try guest.qmp.command("stop")
                let (refused, why) = try guest.tmem("save", [folder.path + "/foreign"])
                #expect(refused == 1 && why.contains("waits for its content"), "\(why)")

                try load(now)
                (text, status) = try check(one)
                // It may crash before it can say so, if what it says it with was swapped, too; of no SIGBUS, though.
                #expect(text.contains("WRONG") || status > 128 && status != 128 + Int(SIGBUS), "\(status): \(text)")
                try load(then)
                (text, status) = try check(one)
                #expect(status == 0 && text.contains("ok "), "\(status): \(text)")
                try guest.expectQuietLog()
            }
        }

        /// A guest migrates while it swaps, from one QEMU to another, and its swapped pages with it: while the source waits
        /// with its guest stopped, they go through a pipe. Not one byte is wrong there. Without that the destination gives
        /// I/O errors instead of another guest's bytes.
        @Test(arguments: [true, false])
        func migrates(_ withSwap: Bool) throws {
            let folder = try Folder()
            // Emulation loses writes in 7.2 while a guest migrates that writes (Pause/migratesWhileItWrites).
            let machine = Self.small.with { $0.qemu = .ten }
            let source = try Guest(machine.with { $0.name = "source" }, in: folder)
            let socket = folder.path + "/migration"
            let target = try Guest(
                machine.with {
                    $0.name = "target"
                    $0.arguments = ["-incoming", "unix:\(socket)"]
                    $0.boots = false
                }, in: folder)
            try source.watched {
                try target.watched {
                    try source.swapOn()
                    let load = try source.console.start("quire-load sweep \(Self.much) \(Self.seconds * 2) --threads 2")
                    try source.wait(for: "the guest to swap") { try source.swapPool().pages > 20_000 }
                    #expect(target.status.tmem.reason.contains("quire tmem restore") || target.status.ageMilliseconds > 0)
                    try source.qmp.command("migrate-set-capabilities", [
                        "capabilities": .array([.object(["capability": .string("pause-before-switchover"), "state": .bool(true)])])
                    ])
                    try source.qmp.command("migrate-set-parameters", ["max-bandwidth": .number(4e9), "downtime-limit": .number(5000)])
                    try source.qmp.command("migrate", ["uri": .string("unix:\(socket)")])
                    func state(_ wanted: String) throws {
                        try source.wait(for: "the migration to be \(wanted)", within: Effort.patience * 2) {
                            try target.console.drain()
                            let status = try source.qmp.command("query-migrate")["status"]?.text
                            guard status != "failed" else { throw Trouble("the migration failed") }
                            return status == wanted
                        }
                    }
                    try state("pre-switchover")
                    var pages: UInt64 = 0
                    if withSwap {
                        try source.wait(for: "the source's device to stop") {
                            (try? host("sh", "-c", "QUIRE_RUNTIME_DIR=\(folder.path)/run; export QUIRE_RUNTIME_DIR; "
                                + "\(Program.quire) tmem save source \(folder.path)/swapped")) != nil
                        }
                        try host("sh", "-c", "set -e; QUIRE_RUNTIME_DIR=\(folder.path)/run; export QUIRE_RUNTIME_DIR; "
                            + "{ \(Program.quire) tmem save source -; } | \(Program.quire) tmem restore target -")
                        pages = try source.swapPool().pages
                        #expect(try target.swapPool().pages == pages)
                    }
                    try source.qmp.command("migrate-continue", ["state": .string("pre-switchover")])
                    try state("completed")
                    if withSwap {
                        let (text, status) = try target.console.finish(load, within: Guest.patience(for: Self.seconds) * 3)
                        #expect(status == 0 && text.contains("ok "), "\(text)")
                        print("migrated with \(pages) swapped pages: \(text.filter { $0 != "\n" })")
                        try target.expectQuietLog()
                    } else {
                        // Pages are missed, the shell's own perhaps, and no other bytes are taken for them.
                        target.console.mayPanic = true
                        try target.wait(for: "the warning") { target.stderr.contains("quire tmem restore") }
                        // Who dies of it says so if it can: a shell whose own pages are missed says nothing.
                        let end = monotonicNanoseconds() + UInt64(Self.seconds * 2 + 10) * 1_000_000_000
                        while monotonicNanoseconds() < end,
                            !["Bus error", "@@\(load) ", "shell ended", "Kernel panic"].contains(where: { target.console.log.contains($0) })
                        {
                            try target.console.drain()
                            ProcessCalls.sleep(milliseconds: 50)
                        }
                        #expect(!target.console.log.contains("WRONG") && !target.console.log.contains("ok "), "\(target.console.log)")
                    }
                }
            }
        }
    }
}
