import Glibc
import Host
import Platform
import Testing

extension Integration {
    /// What `quire run` owes its user beyond recycling.
    @Suite(.serialized) struct Supervision {
        /// The supervisor is killed: the guest goes on, the backend recycles no more (nobody would notice if it froze),
        /// keeps the control disk alive, has all that was swapped and takes more, and goes when QEMU has gone. Nothing is left behind but the folder of a dead VM,
        /// which the next one of that name takes over.
        @Test func supervisorKilled() throws {
            let folder = try Folder()
            let guest = try Guest(Machine(options: ["--swap", "64M"]), in: folder)
            try guest.watched {
                try guest.loadModule()
                try guest.waitForActive()
                let disk = try guest.swapDisk()
                func write(at mebibyte: Int) throws {
                    try guest.sh("dd if=/tmp/noise of=\(disk) bs=64k count=64 seek=\(mebibyte * 16) oflag=direct 2>/dev/null")
                }
                func compare(at mebibyte: Int) throws {
                    try guest.sh("dd if=\(disk) bs=64k count=64 skip=\(mebibyte * 16) iflag=direct 2>/dev/null | cmp - /tmp/noise")
                }
                try guest.sh("head -c 4194304 /dev/urandom >/tmp/noise")
                try write(at: 0)
                try guest.startChurn()
                try guest.waitForRecycling()
                let qemu = guest.qemuPID, backend = guest.backendPID
                #expect(qemu > 0 && backend > 0)
                guest.signal(SIGKILL)
                try guest.wait(for: "recycling to stop") { guest.status.state == .paused }
                ProcessCalls.sleep(milliseconds: 1500)
                let total = guest.status.recycledTotalPages
                try guest.expectChurnGoesOn()
                #expect(guest.status.recycledTotalPages == total)
                try compare(at: 0)
                try write(at: 8)
                try compare(at: 8)
                // The control disk is still served: unloading asks it.
                try guest.stopChurn()
                try guest.sh("rmmod quire")
                try guest.expectQuietLog()
                // The name is QEMU's until that ends.
                #expect(throws: (any Error).self) { try Guest(Machine(), in: folder) }

                try guest.qmp.command("quit")
                try guest.wait(for: "QEMU and the backend to end") {
                    !Self.runs(qemu) && !Self.runs(backend)
                }
            }
            // Its folder is a dead owner's.
            let next = try Guest(in: folder)
            try next.watched {
                try next.loadModule()
                try next.waitForActive()
                next.signal(SIGTERM)
                #expect(try next.waitForEnd() == 0)
            }
            #expect(Files.list(folder.path + "/run") == [])
        }

        /// Not a zombie, which nobody in this container may reap.
        private static func runs(_ pid: Int32) -> Bool {
            guard let text = try? Files.read("/proc/\(pid)/stat", limit: 1024), let end = text.lastIndex(of: ")") else { return false }
            return text[end...].dropFirst(2).first != "Z"
        }

        /// Two NUMA nodes, each with memory of its own, and two threads that recycle.
        @Test func nodes() throws {
            let machine = Machine(
                arguments: [
                    "-object", "memory-backend-ram,id=a,size=256M", "-object", "memory-backend-memfd,id=b,size=256M,share=on",
                    "-smp", "2,sockets=2", "-numa", "node,memdev=a,cpus=0", "-numa", "node,memdev=b,cpus=1",
                ], options: ["--workers", "2"])
            let guest = try Guest(machine)
            try guest.watched {
                #expect(guest.view.ram.raw.count == 2)
                try guest.loadModule()
                try guest.waitForActive()
                let before = try guest.settle()
                let load = try guest.console.start("quire-load hold 330")
                try guest.console.expect("peak\n", within: Guest.patience(for: 60))
                for raw in guest.view.ram.raw { #expect(try FileStatus(of: raw).allocatedBytes > 100 << 20) }
                try guest.console.send("")
                #expect(try guest.console.finish(load, within: Effort.patience).status == 0)
                try guest.wait(for: "both nodes' memory to fall") {
                    guest.view.residentBytes <= before + guest.status.ramBytes / 20
                }
                try guest.churn(300)
                try guest.expectQuietLog()
            }
        }

        /// A second VM of the same name, and RAM that cannot be given back: one line each, and no QEMU.
        @Test func misuse() throws {
            let folder = try Folder()
            // Its guest has nothing to do here.
            let guest = try Guest(Machine(arguments: ["-S"], boots: false, name: "taken"), in: folder)
            func refusal(_ name: String, _ arguments: [String]) throws -> String {
                let (status, text) = try Program.run(
                    ["env", "QUIRE_RUNTIME_DIR=\(folder.path)/run", Program.quire, "run", "--config", "/dev/null", "--name", name, "--",
                        "qemu-system-x86_64", "-display", "none"] + arguments)
                #expect(status == 1)
                #expect(text.hasPrefix("quire: ") && text.filter { $0 == "\n" }.count == 1, "\(text)")
                return text
            }
            try guest.watched {
                #expect(try refusal("taken", []).contains("'taken' is taken by process \(guest.pid)"))
                _ = try refusal("a", ["-object", "memory-backend-memfd,id=r,size=256M,share=on,hugetlb=on", "-m", "256M", "-machine", "memory-backend=r"])
                _ = try refusal("b", ["-mem-prealloc"])
                _ = try refusal("c", ["-overcommit", "mem-lock=on"])
                _ = try refusal("d", ["-device", "vfio-pci,host=00:00.0"])
                #expect(guest.isRunning)
                #expect(Files.list(folder.path + "/run") == ["taken"])
            }
        }
    }
}
