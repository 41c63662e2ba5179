import Glibc
import Host
import Platform
import Testing

extension Integration {
    /// What an operator writes into the configuration reaches VMs that run.
    @Suite(.serialized) struct Configuration {
        /// Periods change, for one VM alone where the file says so; merging ends and begins; a broken file changes nothing; and a
        /// backend that is replaced has what holds now. Meanwhile the guest works, and reads what it wrote.
        @Test func reload() throws {
            let folder = try Folder(), store = try Store()
            let path = folder.path + "/quire.toml"
            func write(_ text: String) throws { try Descriptor.open(path, O_RDWR | O_CREAT, mode: 0o600).replaceContent(text) }
            try write("[backend]\nperiod = \"1h\"\nmerge-period = \"1h\"\nstore = \"\(store.path)\"\n")
            var machine = Machine(configuration: path, name: "one")
            machine.period = nil
            let one = try Guest(machine, in: folder)
            // Its guest has nothing to do here.
            let two = try Guest(
                machine.with {
                    $0.name = "two"
                    $0.arguments = ["-S"]
                    $0.boots = false
                    $0.options = ["--merge-period", "2s", "--swap", "64M"]
                }, in: folder)
            func reload(_ expected: Int32 = 0) throws -> String {
                let (status, text) = try Program.run([
                    "env", "QUIRE_RUNTIME_DIR=\(folder.path)/run", Program.quire, "config", "reload", "--store", folder.path + "/none/store.sock",
                ])
                #expect(status == expected, "\(text)")
                return text
            }
            try one.watched {
                #expect(one.status.periodMilliseconds == 3_600_000 && one.status.merging.periodMilliseconds == 3_600_000)
                try two.wait(for: "the other's status") { two.status.merging.periodMilliseconds == 2000 }
                try one.loadModule()
                try one.waitForActive()
                // The control: with this period nothing is recycled before the test is over.
                try one.sh("quire-load hold 100 0 >/dev/null")
                #expect(one.status.recycledTotalPages == 0)
                #expect(try reload() == "one: nothing changed\ntwo: nothing changed\n")

                try write("[backend]\nperiod = \"1h\"\nmerge-period = \"1h\"\nworkers = 3\nmerge-workers = 2\nswap-overcommit = 2\nswap-compression = \"zstd\"\nswap-queues = 2\nlog-level = \"info\"\nstore = \"\(store.path)\"\n[vm.one]\nperiod = \"500ms\"\nmerge-period = \"100ms\"\n")
                #expect(
                    try reload() == """
                        one: vm.one.period: "1h" -> "500ms"
                        one: vm.one.merge-period: "1h" -> "100ms"
                        one: backend.workers: 1 -> 3
                        one: backend.merge-workers: 1 -> 2
                        one: backend.swap-overcommit: the disk's own size is the limit -> 2.0
                        one: backend.swap-compression: "lz4" -> "zstd"
                        one: backend.swap-queues: 1 -> 2, from the next start on
                        one: backend.log-level: "notice" -> "info"
                        two: backend.workers: 1 -> 3
                        two: backend.merge-workers: 1 -> 2
                        two: backend.swap-overcommit: the disk's own size is the limit -> 2.0
                        two: backend.swap-compression: "lz4" -> "zstd"
                        two: backend.swap-queues: 1 -> 2, from the next start on
                        two: backend.log-level: "notice" -> "info"

                        """)
                func threads() -> [String] {
                    let pid = one.backendPID
                    return (Files.list("/proc/\(pid)/task") ?? []).compactMap { try? Files.read("/proc/\(pid)/task/\($0)/comm").filter { $0 != "\n" } }
                }
                try one.wait(for: "threads that help") { ["recycle-1", "recycle-2", "dedup-1"].allSatisfy(threads().contains) }
                // The level holds for what was at work before: that it was told is logged at this one.
                try one.wait(for: "the new log level") { one.stderr.contains("command tune 500 100") }
                try one.wait(for: "what the guest has freed to be recycled") { one.status.recycledTotalPages >= 12800 }
                try one.wait(for: "the new periods in the status") {
                    one.status.periodMilliseconds == 500 && one.status.merging.periodMilliseconds == 100
                }
                try one.wait(for: "pages of zeros, at least, to be merged") { one.status.merging.mergedTotalPages > 0 }
                try two.wait(for: "the limit of its swap disk") { two.status.tmem.capBytes == 32 << 20 }
                try CommandSocket.ask(TmemCommand.cap(pool: nil, 48 << 20).request, of: "two", in: two.runtime)
                #expect(two.status.periodMilliseconds == 3_600_000)
                // What its command line says stays.
                #expect(two.status.merging.periodMilliseconds == 2000)

                // Broken: one line a VM, and everything goes on.
                try write("[backend]\nperiod = \"soon\"\n")
                let text = try reload(1)
                let line = "\(path):2: backend.period: \"soon\" is not allowed: give a time from 100ms to 1h, such as \"10s\""
                #expect(text == "quire: one: \(line)\nquire: two: \(line)\n", "\(text)")
                #expect(one.stderr.contains("one: the configuration is not reloaded: \(line)"))
                try one.expectRecycling(mebibytes: 50)

                // Merging ends; the successor of a backend knows that, and the new period; and begins again.
                try write("[backend]\nperiod = \"1s\"\nmerge-period = \"100ms\"\nmerge = false\nworkers = 2\nswap-overcommit = 2\nswap-queues = 2\nstore = \"\(store.path)\"\n")
                let off = try reload()
                #expect(off.contains("one: backend.merge: true -> false\n") && off.contains("one: backend.workers: 3 -> 2\n"), "\(off)")
                // What somebody has set by hand stays as long as the file says what it said.
                #expect(off.contains("two: backend.swap-compression: \"zstd\" -> \"lz4\"\n"), "\(off)")
                try two.wait(for: "the limit set by hand") { two.status.tmem.capBytes == 48 << 20 }
                #expect(threads().filter { $0.hasPrefix("recycle-") || $0.hasPrefix("dedup-") } == ["recycle-1"])
                try one.wait(for: "all pages to be its own") {
                    one.status.merging.state == .paused && one.status.merging.sharingPages + one.status.merging.zeroPages == 0
                }
                let backend = one.backendPID
                ProcessCalls.signal(backend, SIGKILL)
                try one.waitForSuccessor(of: backend)
                try one.wait(for: "the successor's status") { one.status.periodMilliseconds == 1000 && one.status.merging.state == .paused }
                try write("[backend]\nperiod = \"1s\"\nmerge-period = \"100ms\"\nworkers = 2\nswap-overcommit = 2\nswap-queues = 2\nstore = \"\(store.path)\"\n")
                #expect(try reload().contains("one: backend.merge: false -> true\n"))
                try one.wait(for: "merging to go on") { one.status.merging.mergedTotalPages > 0 && one.status.merging.state == .active }
                // What the guest writes is found by reading, and then by the kernel again, which begins with all of it.
                for tracks in [false, true] {
                    try write("[backend]\nperiod = \"1s\"\nmerge-period = \"100ms\"\nworkers = 2\nswap-overcommit = 2\nswap-queues = 2\nstore = \"\(store.path)\"\nwrite-tracking = \(tracks)\n")
                    #expect(try reload().contains("one: backend.write-tracking: \(!tracks) -> \(tracks)\n"))
                    try one.wait(for: "another way to look") { one.status.merging.reason.contains("--no-write-tracking") != tracks }
                    let before = one.status.merging.hashedTotalPages
                    try one.wait(for: "pages to be hashed anew") { one.status.merging.hashedTotalPages > before + 1000 }
                }
                try one.churn(100, seconds: 2)
                try one.expectQuietLog()
            }
        }
    }
}
