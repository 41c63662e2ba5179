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

        /// A backend does nothing that its service may not (packaging/systemd): with no capability it recycles, merges, brings pages
        /// back and has a guest swap; it makes no system call but those of the unit's filter, and has no memory that can be written
        /// and executed. The control: a filter that lacks one of its calls.
        @Test func needsNoMoreThanItsService() throws {
            let folder = try Folder(), store = try Store()
            let trace = folder.path + "/trace", wrapper = folder.path + "/quire-backend"
            // The tracer is not the backend's parent: its process is the one that was started.
            try Descriptor.open(wrapper, O_RDWR | O_CREAT, mode: 0o755).replaceContent(
                """
                #!/bin/sh
                exec setpriv --no-new-privs --bounding-set=-all --inh-caps=-all --ambient-caps=-all \
                    strace -D -f -qq -e signal=none -o \(trace) -- \(Program.backend) "$@"
                """)
            let guest = try Guest(
                Machine(options: ["--swap", "64M", "--store", store.path, "--merge-period", "100ms", "--backend", wrapper]), in: folder)
            try guest.watched {
                #expect(try Files.read("/proc/\(guest.backendPID)/status").contains("CapEff:\t0000000000000000"))
                try guest.loadModule()
                try guest.waitForActive()
                try guest.wait(for: "recycling") { guest.status.recycledTotalPages >= 256 }
                let disk = try guest.swapDisk()
                try guest.sh("dd if=/bin/busybox of=\(disk) bs=64k count=8 oflag=direct 2>/dev/null")
                try guest.sh("dd if=\(disk) bs=64k count=8 iflag=direct 2>/dev/null | cmp -n 524288 - /bin/busybox")
                try guest.wait(for: "merged pages") {
                    let merging = guest.status.merging
                    return merging.sharingPages + merging.zeroPages > 100
                }
                try CommandSocket.ask("unmerge", of: guest.machine.name, in: guest.runtime)
                try guest.expectQuietLog()
            }
            let lines = try Files.read(trace, limit: 1 << 28).split(separator: "\n")
            let made = Set(
                lines.compactMap { line -> String? in
                    let call = line.drop { $0.isNumber }.drop { $0 == " " }
                    let name = (call.hasPrefix("<... ") ? call.dropFirst(5) : call).prefix { $0.isLowercase || $0.isNumber || $0 == "_" }
                    return name.isEmpty ? nil : String(name)
                })
            let unit = try Files.read(Program.top + "/packaging/systemd/quire-backend@.service").split(separator: "\n")
            let filter = try #require(unit.first { $0.hasPrefix("SystemCallFilter=") }).dropFirst("SystemCallFilter=".count)
            // A group's calls are a line each; some are groups.
            func calls(_ names: [Substring]) throws -> Set<String> {
                var all: Set<String> = []
                for name in names {
                    guard name.hasPrefix("@") else {
                        all.insert(String(name))
                        continue
                    }
                    let group = try host("systemd-analyze", "syscall-filter", String(name)).split(separator: "\n").dropFirst()
                    all.formUnion(try calls(group.map { $0.drop { $0 == " " } }.filter { !$0.hasPrefix("#") }))
                }
                return all
            }
            let allowed = try calls(filter.split(separator: " "))
            #expect(made.count > 30 && made.isSuperset(of: ["ioctl", "memfd_create", "pidfd_open", "sendmsg"]), "\(made.sorted())")
            #expect(made.subtracting(allowed) == [])
            #expect(made.subtracting(allowed.subtracting(["pidfd_open"])) == ["pidfd_open"])
            #expect(!lines.contains { $0.contains("PROT_WRITE|PROT_EXEC") })
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
