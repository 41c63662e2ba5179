import Glibc
import Host
import Platform
import Testing

extension Integration {
    /// A disk in the host's memory that two guests have.
    @Suite(.serialized) struct SharedDisks {
        /// Written and verified by one guest while quired is killed again and again, and its backend, too; read by the other.
        @Test func verifiesAcrossDeaths() throws {
            let store = try Store(["--keep", "--shared-disk", "scratch,size=64M"])
            let machine = Machine(qemu: .ten, memory: "256M", options: ["--store", store.path, "--shared-disk", "scratch,size=64M", "--no-merge"])
            let one = try Guest(machine.with { $0.name = "one" })
            let two = try Guest(machine.with { $0.name = "two" })
            try one.watched {
                try two.watched {
                    let mine = try one.disk("scratch"), theirs = try two.disk("scratch")
                    #expect(try store.sharedDisk("scratch").attached == ["one", "two"])
                    let load = try one.console.start(
                        """
                        fio --name=v --filename=\(mine) --direct=1 --rw=randwrite --bsrange=4k-64k --size=6M --offset_increment=8M \
                        --numjobs=2 --thread --ioengine=psync --verify=crc32c --verify_fatal=1 --group_reporting --minimal \
                        > /tmp/fio 2>&1 || { cat /tmp/fio; false; }
                        """)
                    for kill in 0..<Effort.scaled(4) {
                        try one.console.drain(Int32.random(in: 200...800))
                        if kill % 2 == 0 {
                            ProcessCalls.signal(store.worker, SIGKILL)
                        } else {
                            let pid = one.backendPID
                            ProcessCalls.signal(pid, SIGKILL)
                            try one.wait(for: "another backend") { one.backendPID != pid && one.backendPID != 0 }
                        }
                    }
                    let (text, status) = try one.console.finish(load, within: Guest.patience(for: 120))
                    #expect(status == 0, "\(text)\n\(store.errors)")
                    let sum = "dd if=DISK bs=1M count=16 iflag=direct 2>/dev/null | md5sum"
                    #expect(
                        try one.sh(sum.replacing("DISK", with: mine)) == two.sh(sum.replacing("DISK", with: theirs)), "\(store.errors)")
                    try two.sh("echo hello | dd of=\(theirs) bs=4k conv=sync oflag=direct 2>/dev/null")
                    #expect(try one.sh("dd if=\(mine) bs=4k count=1 iflag=direct 2>/dev/null | head -n 1").hasPrefix("hello"))
                    try one.expectQuietLog()
                    try two.expectQuietLog()
                }
            }
        }

        /// While quired stands still a guest can be paused, reset and ended: nothing waits for quired but its requests.
        @Test func aGuestIsNotHeldUp() throws {
            let store = try Store(["--keep", "--shared-disk", "scratch,size=64M"])
            let guest = try Guest(
                Machine(qemu: .ten, memory: "256M", options: ["--store", store.path, "--shared-disk", "scratch", "--no-merge"]))
            try guest.watched {
                let disk = try guest.disk("scratch")
                let backend = guest.backendPID, worker = store.worker
                ProcessCalls.signal(worker, SIGSTOP)
                defer { ProcessCalls.signal(worker, SIGCONT) }
                try guest.sh("(dd if=/dev/urandom of=\(disk) bs=64k count=16 oflag=direct 2>/dev/null; echo written $? > /tmp/done) & sleep 1")
                for _ in 0..<3 {
                    try guest.qmp.command("stop", within: 20)
                    try guest.qmp.command("cont", within: 20)
                }
                #expect(try guest.sh("cat /tmp/done 2>/dev/null; true").isEmpty)
                #expect(guest.backendPID == backend, "the backend was replaced: \(guest.stderr)")
                try guest.wait(for: "a line in the log") { guest.stderr.contains("waits for quired") }
                ProcessCalls.signal(worker, SIGCONT)
                try guest.wait(for: "the write to be done") { try guest.sh("cat /tmp/done 2>/dev/null; true").contains("written 0") }
                ProcessCalls.signal(worker, SIGSTOP)
                try guest.sh("(dd if=/dev/urandom of=\(disk) bs=64k count=16 oflag=direct 2>/dev/null) & sleep 1")
                try guest.qmp.command("system_reset", within: 20)
                // Partitions are looked for at boot, so it needs the disk.
                ProcessCalls.sleep(milliseconds: 500)
                ProcessCalls.signal(worker, SIGCONT)
                try guest.expectReady()
                #expect(guest.backendPID == backend, "the backend was replaced: \(guest.stderr)")
                try guest.expectQuietLog()
            }
        }

        /// Of another group, of another size, or unknown: one line, and no QEMU.
        @Test func refusals() throws {
            let store = try Store(["--keep", "--group", "lab=12345", "--shared-disk", "scratch,size=64M,group=lab"])
            let folder = try Folder()
            func refusal(_ options: [String]) throws -> String {
                let (status, text) = try Program.run(
                    ["env", "QUIRE_RUNTIME_DIR=\(folder.path)/run", Program.quire, "run", "--config", "/dev/null", "--store", store.path] + options
                        + ["--", "qemu-system-x86_64", "-display", "none", "-S"])
                #expect(status == 1 && text.hasPrefix("quire: ") && text.filter { $0 == "\n" }.count == 1, "\(text)")
                return text
            }
            #expect(try refusal(["--shared-disk", "scratch"]).contains("no shared disk 'scratch' for the group 'owner-"))
            #expect(try refusal(["--shared-disk", "none", "--group", "lab"]).contains("no shared disk 'none'"))
            #expect(try refusal(["--shared-disk", "scratch,size=1G", "--group", "lab"]).contains("has 64M, not 1G"))
            #expect(try refusal(["--shared-disk", "scratch", "--shared-disk", "scratch", "--group", "lab"]).contains("given twice"))
            #expect(try refusal(["--swap", "1000"]).contains("--swap 1000: give a size from 1M to 8T in whole pages"))
            #expect(try refusal(["--swap", "2T"]).contains("a swap disk of 2T is more than a store of 1023G is sure to hold"))
            #expect(Files.list(folder.path + "/run") ?? [] == [])
        }
    }
}
