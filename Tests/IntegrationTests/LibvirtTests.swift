import Glibc
import Host
import Libvirt
import Platform
import Testing

extension Integration {
    /// Domains of a real libvirtd, which runs QEMU as a user without rights.
    @Suite(.serialized, .enabled(if: ProcessCalls.isRoot, "libvirtd's system mode and its namespace need root"))
    struct Libvirt {
        private static let agent = "/run/programs/bin/libquire-agent.so"

        private static func isAlive(_ pid: Int32) -> Bool {
            guard let text = try? Files.read("/proc/\(pid)/stat", limit: 1024), let end = text.lastIndex(of: ")") else { return false }
            return text[end...].dropFirst(2).first != "Z"
        }

        /// Of libvirt's defaults none is off: a user without rights, seccomp's filters, a /dev of its own. Quire works behind them.
        private func isConfined(_ host: LibvirtHost, _ name: String) throws {
            func number(_ field: String, of pid: Int32) throws -> Int {
                let line = try Files.read("/proc/\(pid)/status").split(separator: "\n").first { $0.hasPrefix(field + ":") } ?? ""
                let value = line.split { $0.isWhitespace }.dropFirst().first.flatMap { Int($0) }
                return try #require(value, "\(field) of \(pid)")
            }
            func mounts(of pid: Int32) throws -> String { try #require(Files.target(ofLink: "/proc/\(pid)/ns/mnt")) }
            let qemu = try host.pid("libvirt/qemu/\(name)"), libvirtd = try host.pid("libvirtd")
            #expect(try number("Uid", of: qemu) != 0)
            #expect(try number("Seccomp", of: qemu) == 2)
            // Not only those that a container has put on all of us.
            #expect(try number("Seccomp_filters", of: qemu) > number("Seccomp_filters", of: libvirtd))
            #expect(try mounts(of: qemu) != mounts(of: libvirtd))
            // The control: another process that began in there.
            #expect(try mounts(of: host.pid("virtlogd")) == mounts(of: libvirtd))
        }

        private func recycles(_ host: LibvirtHost, _ name: String, _ console: Console) throws {
            try host.wait(for: "an active guest", console) { host.status(name).state == .active }
            try console.sh("quire-load hold 100 0 >/dev/null")
            try host.wait(for: "recycling", console) { host.status(name).recycledPages > 100 * 256 }
            try console.sh("quire-load churn 150 2 --threads 2")
        }

        /// Define, enable, start, plug memory, suspend, resume, reboot, managed save, restore, detach, stop, reset, disable: the guest
        /// never reads a wrong byte, memory of both NUMA nodes and of memory devices goes back in every life of it, nothing is left
        /// behind, and the definition is what it was.
        @Test func life() throws {
            let host = try LibvirtHost()
            try host.define("web1", nodes: true)
            let before = try host.definition("web1")
            #expect(try host.quire("enable", "--dry-run", "--period", "500ms", "web1").contains("+   <memoryBacking>"))
            #expect(try host.definition("web1") == before)
            #expect(try host.quire("enable", "--period", "500ms", "web1").contains("web1: enabled, from its next start on"))
            let enabled = try host.definition("web1")
            #expect(enabled != before)
            #expect(try host.quire("enable", "--period", "500ms", "web1").contains("nothing to do"))
            #expect(try host.definition("web1") == enabled)

            var console = try host.boot("web1")
            try isConfined(host, "web1")
            try console.sh("insmod /lib/quire/quire.ko")
            try recycles(host, "web1", console)
            let backend = host.status("web1").pid
            #expect(try host.quire("enable", "--period", "1s", "web1").contains("powered off and started again"))
            try host.quire("enable", "--period", "500ms", "web1")

            #expect(try console.sh("ls -d /sys/devices/system/node/node[01] | wc -l") == "2\n")
            // More than one node has, with the memory device.
            try console.sh("\(DIMM.online); quire-load hold 450 0 >/dev/null")
            try host.wait(for: "recycling of all nodes", console) { host.status("web1").recycledBytes > 400 << 20 }
            #expect(host.status("web1").ramBytes == 640 << 20)
            // And more than there was beside the kernel.
            try host.virsh("attach-device", "web1", host.write("device.xml", LibvirtHost.memoryDevice), "--live")
            try host.wait(for: "the memory device", console) {
                let seen = try console.sh("\(DIMM.online); awk '/MemTotal/ { print $2 }' /proc/meminfo").filter(\.isNumber)
                return host.status("web1").ramBytes == 768 << 20 && host.status("web1").state == .active && Int(seen)! > 660 << 10
            }
            try console.sh("quire-load hold 600 0 >/dev/null")
            try host.wait(for: "recycling of the memory device", console) { host.status("web1").recycledBytes > 590 << 20 }

            let load = try console.start("quire-load churn 300 8 --threads 2")
            for _ in 0..<2 {
                try host.virsh("suspend", "web1")
                try host.wait(for: "the device to stop", console) { host.status("web1").state == .noGuest }
                let total = host.status("web1").recycledTotalPages
                try host.virsh("resume", "web1")
                try host.wait(for: "recycling to go on", console) {
                    host.status("web1").state == .active && host.status("web1").recycledTotalPages > total
                }
            }
            let (text, status) = try console.finish(load, within: Guest.patience(for: 8))
            #expect(status == 0 && text.contains("ok "), "\(text)")

            // What the guest does when its power button is pressed: libvirt has it start again, in the same QEMU.
            try host.virsh("reboot", "web1")
            _ = try console.start("poweroff -f")
            try console.expectReady()
            try host.wait(for: "the old table to be forgotten", console) { host.status("web1").state == .noGuest }
            try console.sh("insmod /lib/quire/quire.ko")
            try recycles(host, "web1", console)
            #expect(host.status("web1").pid == backend)

            try console.sh("echo kept >/tmp/kept")
            try host.virsh("managedsave", "web1")
            #expect(!Self.isAlive(backend))
            #expect(Files.list(host.runtime.base) == [])
            try host.virsh("start", "web1")
            console = try host.console("web1")
            #expect(try console.sh("cat /tmp/kept") == "kept\n")
            try recycles(host, "web1", console)

            try host.quire("detach", "web1")
            #expect(Files.list(host.runtime.base) == [])
            try console.sh("quire-load churn 150 2 --threads 2")
            #expect(try host.refusal(["/run/programs/quire", "libvirt", "detach", "web1"]).contains("nothing to detach"))
            try host.virsh("destroy", "web1")

            // And once more from the definition.
            console = try host.start("web1")
            try host.virsh("reset", "web1")
            try host.expectReady("web1", console)
            #expect(host.runtime.isRunning("web1"))
            try host.virsh("destroy", "web1")
            try host.wait(for: "the backend to be gone") { Files.list(host.runtime.base) == [] }
            try host.quire("disable", "web1")
            #expect(try host.definition("web1") == before)
        }

        /// Equal pages of two domains are kept once; backend and service are killed meanwhile.
        @Test func sharing() throws {
            let host = try LibvirtHost()
            try host.startStore()
            var consoles: [Console] = []
            let names = ["web1", "web2"]
            for name in names {
                try host.define(name, memory: 256)
                try host.quire("enable", "--period", "500ms", name)
                consoles.append(try host.start(name))
            }
            for (name, console) in zip(names, consoles) {
                try host.expectReady(name, console)
                try console.sh("insmod /lib/quire/quire.ko")
            }
            let loads = try consoles.map { try $0.start("quire-load share 32 25") }
            try host.wait(for: "both to share", consoles[0]) {
                try consoles[1].drain()
                return names.allSatisfy { host.status($0).merging.sharingPages > 1000 }
            }
            let backend = host.status("web1").pid
            ProcessCalls.signal(backend, SIGKILL)
            try host.wait(for: "another backend", consoles[0]) {
                host.status("web1").pid != backend && host.status("web1").state == .active
            }
            #expect(host.status("web1").restarts == 1)
            // The host's configuration reaches it while it runs; what the domain's definition says, stays.
            #expect(
                try host.configure("[backend]\nperiod = \"2s\"\nmerge-period = \"250ms\"\n", reload: "web1")
                    == "web1: backend.merge-period: \"10s\" -> \"250ms\"\n")
            try host.wait(for: "the new period", consoles[0]) { host.status("web1").merging.periodMilliseconds == 250 }
            #expect(host.status("web1").periodMilliseconds == 500)
            // The service of the other: nothing is recycled any more, and the guest goes on.
            let service = try #require(host.runtime.owner("web2")), orphan = host.status("web2").pid
            ProcessCalls.signal(service, SIGKILL)
            for (console, load) in zip(consoles, loads) {
                let (text, status) = try console.finish(load, within: Guest.patience(for: 25))
                #expect(status == 0 && text.contains("ok "), "\(text)")
            }
            try host.wait(for: "recycling to pause") { host.status("web2").state == .paused }
            #expect(try host.refusal(["/run/programs/quire", "libvirt", "detach", "web2"])
                .contains("the backend of 'web2' is not supervised any more: power-cycle the domain"))
            // Its backend goes with QEMU, and the domain starts again as if nothing had been.
            try host.virsh("destroy", "web2")
            let console = try host.boot("web2")
            #expect(host.runtime.isRunning("web2"))
            try host.wait(for: "the orphan to go", console) { !Self.isAlive(orphan) }
            try console.sh("insmod /lib/quire/quire.ko")
            try host.wait(for: "an active guest", console) { host.status("web2").state == .active }
        }

        /// Live, from one host to another: what is merged and recycled here is right over there, byte for byte, also when it was merged
        /// and recycled anew. A domain with something that would stay behind does not even begin.
        ///
        /// An emulated guest is quiet meanwhile: Debian 12's QEMU 7.2 loses writes of a busy one, without quire.ko, too. One that
        /// writes meanwhile migrates in `Pause/migratesWhileItWrites`, with QEMU 10.
        @Test func migration() throws {
            let hosts = try [1, 2].map { try LibvirtHost(uuid: "00000000-0000-4000-8000-00000000000\($0)") }
            let source = hosts[0], target = hosts[1]
            for host in hosts {
                try host.configure("[backend]\nmerge-period = \"250ms\"\n")
                try host.startStore()
            }
            try source.define("web1", memory: 256)
            let before = try source.definition("web1")
            try source.quire("enable", "--period", "500ms", "web1")
            var console = try source.boot("web1")
            try console.sh("insmod /lib/quire/quire.ko")
            try console.sh("quire-load hold 60 0 >/dev/null")
            // The same twice, and zeros: in memory, as everything of this guest's.
            try console.sh("dd if=/dev/urandom of=/tmp/a bs=1M count=20 2>/dev/null; cp /tmp/a /tmp/b; dd if=/dev/zero of=/tmp/z bs=1M count=20 2>/dev/null")
            let sums = try console.sh("md5sum /tmp/a /tmp/b /tmp/z")
            func isMerged(_ host: LibvirtHost) -> Bool {
                let merging = host.status("web1").merging
                return merging.sharingPages > 8000 && merging.zeroPages > 4000
            }
            try source.wait(for: "merged and recycled pages", console) { isMerged(source) && source.status("web1").recycledPages > 5000 }
            let busy = QEMU.hasKVM ? try console.start("quire-load share 32 20") : nil

            let here = ["--live", "--persistent", "--undefinesource", "web1"], over = ["--migrateuri", "tcp://127.0.0.1"]
            try source.virsh(["migrate"] + here + [target.uri] + over)
            #expect(Files.list(source.runtime.base) == [] && target.runtime.running() == ["web1"])
            console = try target.console("web1")
            if let busy {
                let (text, status) = try console.finish(busy, within: Guest.patience(for: 20))
                #expect(status == 0 && text.contains("ok "), "\(text)")
            }
            try target.wait(for: "pages to be merged anew", console) { isMerged(target) }
            #expect(try console.sh("md5sum /tmp/a /tmp/b /tmp/z") == sums)
            try recycles(target, "web1", console)

            // Back, where Quire is not installed: after `detach` and `disable` it is a domain like any other.
            try source.sh("mkdir /run/away && mv /etc/libvirt/hooks/qemu.d/quire /run/programs /run/away/")
            try target.quire("detach", "web1")
            try target.quire("disable", "web1")
            #expect(try target.definition("web1") == before)
            try target.virsh(["migrate"] + here + [source.uri] + over)
            console = try source.console("web1")
            #expect(try console.sh("md5sum /tmp/a /tmp/b /tmp/z") == sums)
            try console.sh("quire-load churn 60 2 --threads 2")
            #expect(Files.list(target.runtime.base) == [] && Files.list(source.runtime.base) == [])
            #expect(try source.definition("web1") == before)
            try source.virsh("destroy", "web1")
            try source.sh("mv /run/away/quire /etc/libvirt/hooks/qemu.d/ && mv /run/away/programs /run/")

            for (option, value, said) in [("--swap", "64M", "its swap disk would not come with it"), ("--disk", "scratch", "its shared disk 'scratch' would")] {
                try source.startStore(["--shared-disk", "scratch,size=1M"])
                try source.quire("enable", option, value, "web1")
                try source.virsh("start", "--paused", "web1")
                let refusal = try source.failure(["migrate"] + here + [target.uri] + over)
                #expect(refusal.contains(said), "\(refusal)")
                #expect(try source.virsh("domstate", "web1").hasPrefix("paused"))
                #expect(Files.list(target.runtime.base) == [])
                #expect(try target.virsh("list", "--all", "--name").allSatisfy(\.isWhitespace))
                try source.virsh("destroy", "web1")
                try source.quire("enable", "--no-swap", "web1")
            }
            try source.quire("disable", "web1")
            #expect(try source.definition("web1") == before)
        }

        /// What a guest has swapped is not in a saved image. So its disk answers with errors after a restore, never with other
        /// bytes, until `quire tmem restore` has brought it; and a guest that would leave it behind may not come.
        @Test func swap() throws {
            let host = try LibvirtHost()
            try host.define("web1")
            try host.quire("enable", "--swap", "64M", "web1")
            var console = try host.boot("web1")
            let find = "d=$(for s in /sys/block/vd*; do [ $(cat $s/serial) = quire-swap ] && echo /dev/${s##*/}; done)"
            try console.sh("\(find); dd if=/lib/quire/quire.ko of=$d bs=4096 oflag=direct conv=sync 2>/dev/null")
            let sum = try console.sh("\(find); dd if=$d bs=4096 count=8 iflag=direct 2>/dev/null | md5sum")

            func tmem(_ command: String) throws -> (status: Int32, text: String) {
                try Program.run([
                    "env", "QUIRE_RUNTIME_DIR=" + host.runtime.base, Program.quire, "tmem", command, "web1", host.folder.path + "/swapped",
                ])
            }
            try host.virsh("suspend", "web1")
            // Where there is no room for it: one line, and nothing is left there.
            try host.sh("mkdir /run/small && mount -t tmpfs -o size=16k tmpfs /run/small")
            #expect(try host.refusal(["/run/programs/quire", "tmem", "save", "web1", "/run/small/swapped"]).contains("No space left on device"))
            #expect(try host.sh("ls -A /run/small").isEmpty)
            let saved = try tmem("save")
            #expect(saved.status == 0, "\(saved.text)")
            try host.virsh("managedsave", "web1")
            // As it was saved: paused.
            try host.virsh("start", "web1")
            console = try host.console("web1")
            try host.virsh("resume", "web1")
            #expect(host.status("web1").tmem.reason.contains("waits for its content"), "\(host.status("web1").tmem)")
            #expect(try console.sh("\(find); dd if=$d bs=4096 count=8 iflag=direct >/dev/null 2>&1 && echo read || echo error") == "error\n")
            try host.virsh("suspend", "web1")
            let restored = try tmem("restore")
            #expect(restored.status == 0, "\(restored.text)")
            try host.virsh("resume", "web1")
            #expect(try console.sh("\(find); dd if=$d bs=4096 count=8 iflag=direct 2>/dev/null | md5sum") == sum)
            try host.virsh("destroy", "web1")

            let definition = try host.write("web1.xml", host.definition("web1"))
            #expect(try host.refusal(["sh", "-c", "/run/programs/quire libvirt hook web1 migrate begin - < \(definition)"])
                .contains("its swap disk would not come with it"))
            // The control: without the note of it nobody knows what would stay behind.
            try host.sh("sed 's/ swap=[^ ]*//' \(definition) | /run/programs/quire libvirt hook web1 migrate begin -")
            // A restore that fails before anything is prepared leaves its note behind. The next start is a fresh one all the same.
            try host.sh("/run/programs/quire libvirt hook web1 restore begin - < \(definition)")
            #expect(Files.identity(of: host.runtime.base + "/web1/arrives") != nil)
            console = try host.boot("web1")
            try host.wait(for: "the swap disk to wait for nothing", console) { host.status("web1").tmem.reason.isEmpty }
            try console.sh("\(find); dd if=$d bs=4096 count=8 iflag=direct 2>/dev/null | cmp -n 32768 - /dev/zero")
        }

        /// A disk of quired's that two domains have: what one writes the other reads, also over the death of a backend. It stays on its
        /// host, and so do they, and it goes away without a trace.
        @Test func sharedDisks() throws {
            let host = try LibvirtHost()
            try host.startStore(["--shared-disk", "scratch,size=64M"])
            let names = ["web1", "web2"]
            var before = ""
            for name in names {
                try host.define(name, memory: 256)
                if name == "web1" { before = try host.definition(name) }
                try host.quire("enable", "--no-merge", "--disk", "scratch,size=64M", name)
            }
            #expect(try host.quire("enable", "--no-merge", "--disk", "scratch,size=64M", "web1").contains("nothing to do"))
            let consoles = try names.map { try host.start($0) }
            for (name, console) in zip(names, consoles) { try host.expectReady(name, console) }
            let find = "d=$(for s in /sys/block/vd*; do [ \"$(cat $s/serial)\" = scratch ] && echo /dev/${s##*/}; done)"
            try consoles[0].sh("\(find); dd if=/dev/urandom of=$d bs=64k count=64 oflag=direct 2>/dev/null")
            let backend = host.status("web1").pid
            ProcessCalls.signal(backend, SIGKILL)
            try host.wait(for: "another backend", consoles[0]) { ![0, backend].contains(host.status("web1").pid) }
            let sum = "\(find); dd if=$d bs=64k count=64 iflag=direct 2>/dev/null | md5sum"
            #expect(try consoles[0].sh(sum) == consoles[1].sh(sum))
            try consoles[1].sh("\(find); echo hello | dd of=$d bs=4k conv=sync oflag=direct 2>/dev/null")
            #expect(try consoles[0].sh("\(find); dd if=$d bs=4k count=1 iflag=direct 2>/dev/null | head -n 1").hasPrefix("hello"))
            #expect(try host.sh("/run/programs/quire status --json").contains("shared:scratch"))
            #expect(try host.quire("list").contains("scratch"))

            #expect(try host.refusal(["/run/programs/quire", "libvirt", "detach", "web1"]).contains("has a shared disk 'scratch'"))
            let definition = try host.write("web1.xml", host.definition("web1"))
            #expect(try host.refusal(["sh", "-c", "/run/programs/quire libvirt hook web1 migrate begin - < \(definition)"])
                .contains("its shared disk 'scratch' would not come with it: umount it in the guest"))
            // The control: without the note of it nobody knows what would stay behind.
            try host.sh("sed 's/ disks=[^ ]*//' \(definition) | /run/programs/quire libvirt hook web1 migrate begin -")
            try host.virsh("destroy", "web2")
            try savedWithDisk(host, consoles[0].sh(sum), sum)
            try host.virsh("destroy", "web1")

            // Of another size, or unknown: no QEMU.
            for (disk, said) in [("scratch,size=1G", "has 64M, not 1G"), ("none", "there is no shared disk 'none'")] {
                try host.quire("enable", "--disk", disk, "web1")
                #expect(try host.failure("start", "web1").contains(said))
                #expect(Files.list(host.runtime.base) == [])
                try host.quire("enable", "--no-disk", "scratch", "web1")
            }
            try host.quire("disable", "web1")
            #expect(try host.definition("web1") == before)
        }

        /// Web1 comes back from a saved image as long as its disk has what its guest knows of it, and not without an operator's word where
        /// that was lost, or where nobody knows.
        private func savedWithDisk(_ host: LibvirtHost, _ known: String, _ sum: String) throws {
            try host.wait(for: "the note of what is on the disk") { try host.virsh("dumpxml", "web1").contains("contents=") }
            #expect(try !host.definition("web1").contains("contents="))
            try host.virsh("managedsave", "web1")
            try host.virsh("start", "web1")
            #expect(try host.console("web1").sh(sum) == known)
            try host.virsh("managedsave", "web1")
            try host.startStore(["--shared-disk", "scratch,size=64M"])
            let advice = "if the guest has nothing of it mounted or open, type quire libvirt accept-disks web1, and start it again"
            var refusal = try host.failure("start", "web1")
            #expect(refusal.contains("web1: its backend did not start: the shared disk 'scratch' has lost what this guest knows of it: \(advice)"), "\(refusal)")
            let image = "/run/web1.image.xml"
            try host.sh("virsh managedsave-dumpxml web1 | sed 's/ contents=[^ ]*//' > \(image) && virsh -q managedsave-define web1 \(image)")
            refusal = try host.failure("start", "web1")
            #expect(refusal.contains("web1: nobody says whether the shared disk 'scratch' still has what this guest knows of it: \(advice)"), "\(refusal)")
            #expect(Files.list(host.runtime.base) == [])
            // And the control: somebody says so, and the guest reads other bytes.
            #expect(try host.quire("accept-disks", "web1") == "web1: its next start takes the shared disks as they are\n")
            try host.virsh("start", "web1")
            #expect(try host.console("web1").sh(sum) != known)
            #expect(try host.refusal(["/run/programs/quire", "libvirt", "accept-disks", "web1"]).contains("the VM 'web1' runs"))
        }

        /// libvirt takes no snapshot with memory inside of a disk's file of a domain that has a disk of ours, and says so; after `detach`
        /// it does. One in a file of its own works, and the guest that is restored from it goes on; so does one of disks alone.
        @Test func snapshots() throws {
            let host = try LibvirtHost()
            let image = "/var/lib/libvirt/images/web1"
            try host.sh("qemu-img create -q -f qcow2 \(image).qcow2 64M")
            try host.define(
                "web1", memory: 256,
                disk: "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='\(image).qcow2'/><target dev='vda' bus='virtio'/></disk>")
            try host.quire("enable", "--period", "500ms", "web1")
            var console = try host.boot("web1")
            try console.sh("insmod /lib/quire/quire.ko")
            try console.sh("quire-load hold 100 0 >/dev/null")
            try host.wait(for: "recycling", console) { host.status("web1").recycledPages > 50 * 256 }
            let load = try console.start("quire-load churn 100 8 --threads 2")
            #expect(try host.failure("snapshot-create-as", "web1", "inside").contains("require all disks to be selected for snapshot"))
            try host.virsh("snapshot-create-as", "web1", "disks", "--disk-only")
            #expect(try host.virsh("domblklist", "web1").contains("\(image).disks"))
            try host.virsh("snapshot-create-as", "web1", "outside", "--memspec", "file=\(image).mem", "--diskspec", "vda,snapshot=no")
            #expect(try console.finish(load, within: Guest.patience(for: 8)).status == 0)
            try host.virsh("destroy", "web1")

            try host.virsh("restore", "\(image).mem")
            console = try host.console("web1")
            let (text, status) = try console.finish(load, within: Guest.patience(for: 8))
            #expect(status == 0 && text.contains("ok "), "\(text)")
            try host.wait(for: "recycling of what it freed", console) {
                host.status("web1").state == .active && host.status("web1").recycledPages > 50 * 256
            }

            // Detached it can be inside, and what comes back from there is without Quire, until the definition is started.
            try host.quire("detach", "web1")
            try console.sh("echo before > /tmp/kept")
            try host.virsh("snapshot-create-as", "web1", "inside")
            try console.sh("echo after > /tmp/kept")
            try host.virsh("snapshot-revert", "web1", "inside")
            console = try host.console("web1")
            #expect(try console.sh("cat /tmp/kept; quire-load churn 50 2 --threads 2 >/dev/null") == "before\n")
            #expect(Files.list(host.runtime.base) == [])
            #expect(try host.definition("web1").contains("urn:quire:libvirt:1"))
        }

        /// A backend whose domain went without the hook is seen and ended. One that a QEMU is connected to is not, whatever libvirt says.
        @Test func leftovers() throws {
            let host = try LibvirtHost()
            for name in ["web1", "web2", "web3"] {
                try host.define(name, memory: 64)
                try host.quire("enable", name)
                try host.virsh("start", "--paused", name)
            }
            // This libvirt knows none of them.
            #expect(try host.quire("sweep", "-c", "test:///default").isEmpty)
            #expect(try host.quire("sweep").isEmpty)
            #expect(host.runtime.running() == ["web1", "web2", "web3"])

            let hook = "/etc/libvirt/hooks/qemu.d/quire"
            try host.sh("mv \(hook) /run/hook")
            try host.virsh("destroy", "web1")
            #expect(host.runtime.running() == ["web1", "web2", "web3"])
            let line = "web1: its domain does not run, and its backend does: quire libvirt sweep\n"
            try host.wait(for: "the backend to see that QEMU has gone") { try host.quire("list").hasSuffix(line) }
            #expect(try host.quire("sweep") == "web1: its domain does not run: ended its backend\n")
            #expect(Files.list(host.runtime.base)?.sorted() == ["web2", "web3"])

            // And by itself: at first, and when libvirt says that a domain has stopped. Without that it would look once a minute.
            try host.virsh("destroy", "web2")
            try host.follow()
            try host.wait(for: "the first look") { Files.list(host.runtime.base) == ["web3"] }
            try host.virsh("destroy", "web3")
            try waitUntil("the backend to be ended", within: 45, state: { host.log }) { Files.list(host.runtime.base) == [] }
            // An enabled domain starts as ever.
            try host.sh("mv /run/hook \(hook)")
            try host.virsh("start", "--paused", "web1")
            #expect(host.runtime.isRunning("web1"))

            // libvirtd is killed: who follows waits for the next one, says so once, and goes on as before.
            try host.sh("mv \(hook) /run/hook")
            try host.restartLibvirtd()
            try host.wait(for: "the line") { host.log.contains("quire: libvirtd has gone: waiting for it\n") }
            #expect(host.runtime.running() == ["web1"])
            try host.virsh("destroy", "web1")
            try waitUntil("the backend to be ended", within: 45, state: { host.log }) { Files.list(host.runtime.base) == [] }
            #expect(host.log.occurrences(of: "libvirtd has gone") == 1 && host.log.occurrences(of: "cannot reach libvirt") <= 1, "\(host.log)")
        }

        /// One line each, and everything as it was.
        @Test func misuse() throws {
            let host = try LibvirtHost()
            try host.define("web1")
            func refused(_ arguments: String...) throws -> String { try host.refusal(["/run/programs/quire", "libvirt"] + arguments) }
            func shell(_ command: String) throws -> String { try host.refusal(["sh", "-c", command]) }
            #expect(try refused("enable", "nobody").contains("there is no domain 'nobody'"))
            #expect(try refused("enable", "-c", "qemu+unix:///system?socket=/nowhere", "web1").hasPrefix("quire: cannot reach libvirt: "))
            #expect(try refused("detach", "web1").contains("does not run"))
            #expect(try shell("echo '<domain><name>x</domain>' | /run/programs/quire libvirt enable --xml") == "quire: this is no XML: line 1: </domain> ends <name> of line 1")

            let before = try host.definition("web1")
            for (find, replace, said) in [
                ("</currentMemory>", "</currentMemory><memoryBacking><hugepages/></memoryBacking>", "huge pages"),
                ("</currentMemory>", "</currentMemory><memoryBacking><locked/></memoryBacking>", "locked"),
                ("</currentMemory>", "</currentMemory><memoryBacking><nosharepages/></memoryBacking>", "not to be shared"),
                ("</currentMemory>", "</currentMemory><memoryBacking><allocation mode='immediate'/></memoryBacking>", "at its start"),
                ("</currentMemory>", "</currentMemory><memoryBacking><source type='file'/></memoryBacking>", "of source type 'file'"),
                ("</vcpu>", "</vcpu><cputune><vcpusched vcpus='0' scheduler='fifo' priority='1'/></cputune>", "real time (<vcpusched>)"),
                ("</devices>", "</devices><qemu:commandline xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'><qemu:arg value='-object'/><qemu:arg value='memory-backend-memfd,id=own,size=1M'/></qemu:commandline>", "memory-backend"),
                ("</devices>", "<hostdev mode='subsystem' type='pci' managed='yes'><source><address domain='0' bus='0' slot='9' function='0'/></source></hostdev></devices>", "VFIO"),
            ] {
                try host.virsh("define", host.write("other.xml", before.replacing(find, with: replace)))
                let defined = try host.definition("web1")
                #expect(try refused("enable", "web1").contains(said))
                #expect(try host.definition("web1") == defined)
            }
            try host.virsh("define", host.write("other.xml", before))
            // Encrypted memory: QEMU's driver takes it only where the processor has it, so it is the XML of libvirt's test driver.
            let encrypted = try host.write("encrypted.xml", before
                .replacing("</devices>", with: "</devices><launchSecurity type='sev'><cbitpos>47</cbitpos><reducedPhysBits>1</reducedPhysBits><policy>0x3</policy></launchSecurity>")
                .replacing(#/<domain type='[a-z]*'/#, with: "<domain type='test'").replacing("arch='x86_64'", with: "arch='i686'"))
            let normalized = try host.sh("virsh -q -c test:///default 'define \(encrypted); dumpxml web1' | sed -n '/<domain/,$p' | sed \"s/type='test'/type='qemu'/; s/i686/x86_64/\"")
            #expect(normalized.contains("launchSecurity"))
            #expect(try shell("/run/programs/quire libvirt enable --xml < \(host.write("normalized.xml", normalized))").contains("(<launchSecurity>)"))

            // A disk that is not there when QEMU starts holds it up for ever: so the hook says no instead.
            try host.quire("enable", "web1")
            let enabled = try host.definition("web1")
            let programs = host.root + "/run/programs/bin/"
            #expect(unsafe rename(programs + "quire-backend", programs + "away") == 0)
            #expect(try Program.run(["nsenter", "-t", host.root.split(separator: "/")[1].description, "--mount", "virsh", "start", "web1"]).text
                .contains("web1: its backend did not start: there is no program /run/programs/bin/quire-backend"))
            #expect(Files.list(host.runtime.base) == [])
            #expect(unsafe rename(programs + "away", programs + "quire-backend") == 0)

            try endsWithoutDomain(host)

            // A copy under another name and UUID is not taken for the domain.
            let copy = enabled.replacing("<name>web1</name>", with: "<name>copy</name>")
                .replacing(#/<uuid>.*<\/uuid>/#, with: "<uuid>00000000-1111-2222-3333-444444444444</uuid>")
            try host.virsh("define", host.write("copy.xml", copy))
            #expect(throws: Trouble.self) { try host.virsh("start", "copy") }
            #expect(try host.quire("disable", "copy").contains("copy: disabled"))

            // A transient domain has nothing that could be changed.
            try host.virsh("create", "--paused", host.write("transient.xml", before.replacing("<name>web1</name>", with: "<name>brief</name>")
                .replacing(#/<uuid>.*<\/uuid>/#, with: "").replacing("web1.console", with: "brief.console")))
            #expect(try refused("enable", "brief").contains("is transient"))
            #expect(try refused("detach", "brief").contains("runs without Quire"))
            try host.virsh("destroy", "brief")

            try host.quire("disable", "--all")
            #expect(try host.definition("web1") == before)

            // No room for another definition: this one stays, in libvirt's memory and on its disk. With room again it is changed.
            let file = try host.sh("cat /etc/libvirt/qemu/web1.xml")
            try host.sh("mount -o remount,size=4m /etc/libvirt && ! cat /dev/zero >/etc/libvirt/full 2>/dev/null")
            #expect(try refused("enable", "web1").hasPrefix("quire: libvirt does not take the changed domain: "))
            #expect(try host.definition("web1") == before)
            #expect(try host.sh("ls /etc/libvirt/qemu/*.new 2>/dev/null || cat /etc/libvirt/qemu/web1.xml") == file)
            try host.sh("rm /etc/libvirt/full")
            #expect(try host.quire("enable", "web1").contains("web1: enabled"))
            try host.quire("disable", "web1")
            #expect(try host.definition("web1") == before)

            // The control: it forgets one thing of what it has added, and the definition is another one.
            try host.virsh("define", host.write("other.xml", enabled.replacing("added=\"access source\"", with: "added=\"access\"")))
            try host.quire("disable", "web1")
            #expect(try host.definition("web1") != before)
        }

        /// A start that fails after *prepare*, and a QEMU that is killed: *release* ends the backend of either. (Without the hook nothing
        /// does: `leftovers`.)
        private func endsWithoutDomain(_ host: LibvirtHost) throws {
            let file = "/var/lib/libvirt/images/lost", prepared = "/run/prepared"
            try host.define(
                "web2", memory: 64, disk: "<disk type='file' device='disk'><source file='\(file)'/><target dev='vda' bus='virtio'/></disk>")
            try host.quire("enable", "web2")
            // After our hook, by its name: who runs then.
            let witness = "/etc/libvirt/hooks/qemu.d/witness"
            try host.sh(
                """
                printf '#!/bin/sh\\n[ "$2" != prepare ] || ls /run/quire >\(prepared)\\ncat >/dev/null\\n' >\(witness)
                chmod 755 \(witness)
                """)
            #expect(try host.failure("start", "--paused", "web2").contains(file))
            #expect(try host.sh("cat \(prepared)") == "web2\n")
            try host.wait(for: "the backend to be ended") { Files.list(host.runtime.base) == [] }
            try host.sh("rm \(witness) \(prepared)")

            // The control: it was for want of that file.
            try host.sh("truncate -s 1M \(file)")
            try host.virsh("start", "--paused", "web2")
            #expect(host.runtime.running() == ["web2"])
            ProcessCalls.signal(try host.pid("libvirt/qemu/web2"), SIGKILL)
            try host.wait(for: "the backend to be ended, too") { Files.list(host.runtime.base) == [] }
            try host.wait(for: "libvirt to know") { try host.virsh("domstate", "web2").hasPrefix("shut off") }
            try host.virsh("undefine", "web2")
        }

        /// The example of qemu-config is what `enable` makes, and it boots, as a transient domain.
        @Test func example() throws {
            let host = try LibvirtHost()
            let text = try Files.read(Program.top + "/qemu-config/domain.xml")
            let domain = try Domain(text)
            let plain = try domain.disabled().text
            var request = Domain.Request(directory: RuntimeDirectory(base: "/run/quire"))
            request.agent = "/usr/lib/quire/libquire-agent.so"
            #expect(try Domain(plain).enabled(request).text == text)

            _ = try Program.run(["qemu-img", "create", "-q", "-f", "qcow2", host.root + "/var/lib/libvirt/images/web1.qcow2", "64M"])
            // Where this test has the agent, a kernel to boot, and a console to read.
            let here = text.replacing("/usr/lib/quire/libquire-agent.so", with: Self.agent)
                .replacing("</type>\n", with: "</type>\(LibvirtHost.boot)\n")
                .replacing("<serial type='pty'/>", with: LibvirtHost.console("web1"))
                .replacing("type='kvm'", with: QEMU.hasKVM ? "type='kvm'" : "type='qemu'")
            // As an orchestrator does it: nothing is ever defined.
            let without = try host.write("without.xml", Domain(here).disabled().text), made = host.folder.path + "/made.xml"
            try host.sh("/run/programs/quire libvirt enable --xml <\(without) >\(made)")
            #expect(try Files.read(made) == here)
            try host.virsh("create", made)
            let console = try host.console("web1")
            try host.expectReady("web1", console)
            try console.sh("insmod /lib/quire/quire.ko")
            try host.wait(for: "an active guest that is merged", console) {
                host.status("web1").state == .active && host.status("web1").merging.state == .active
            }
            try recycles(host, "web1", console)
            try host.virsh("destroy", "web1")
            try host.wait(for: "the backend to be gone") { Files.list(host.runtime.base) == [] }
            #expect(try host.virsh("list", "--all", "--name").allSatisfy(\.isWhitespace))
        }
    }
}
