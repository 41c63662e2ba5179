import Glibc
import Host
import Platform
import Testing

extension Integration.Libvirt {
    /// What commands say in JSON, of a real libvirtd.
    @Test func answers() throws {
        let host = try LibvirtHost()
        for name in ["web1", "web2"] { try host.define(name, memory: 64) }
        func quire(_ arguments: String...) throws -> String { try host.sh((["/run/programs/quire", "libvirt"] + arguments + ["--json"]).joined(separator: " ")) }
        func expect(_ text: String, _ parts: String..., sourceLocation: SourceLocation = #_sourceLocation) {
            for part in parts { #expect(text.contains(part), "\(text)", sourceLocation: sourceLocation) }
        }
        let planned = try quire("enable", "--dry-run", "web1")
        expect(planned, "\"result\" : \"planned\"", "\"difference\" : \"", "+   <memoryBacking>", "\"takes_effect\" : \"next-start\"")
        // For people each has its name over it.
        let both = try host.quire("enable", "--all", "--dry-run")
        #expect(both.hasPrefix("--- web1\n") && both.contains("\n--- web2\n") && both.occurrences(of: "+   <memoryBacking>") == 2, "\(both)")
        let enabled = try quire("enable", "--all")
        expect(enabled, "\"command\" : \"libvirt enable\"", "\"name\" : \"web1\"", "\"name\" : \"web2\"", "enabled, from its next start on")
        #expect(enabled.occurrences(of: "\"result\" : \"done\"") == 2)
        expect(try quire("enable", "web1"), "\"result\" : \"unchanged\"", "\"enabled already, nothing to do\"")

        // One fails, the other is done all the same.
        let (status, text) = try Program.run(["nsenter", "-t", host.root.split(separator: "/")[1].description, "--mount", "/run/programs/quire", "libvirt", "disable", "nobody", "web2", "--json"])
        #expect(status == 1)
        expect(text, "quire: there is no domain 'nobody'", "\"error\" : \"there is no domain 'nobody'", "\"result\" : \"failed\"", "\"result\" : \"done\"")
        #expect(try !host.definition("web2").contains("quire"))

        #expect(try quire("sweep").filter { !$0.isWhitespace } == "[]")
        let hook = "/etc/libvirt/hooks/qemu.d/quire"
        try host.virsh("start", "--paused", "web1")
        expect(try quire("disable", "web1"), "\"takes_effect\" : \"power-cycle\"")
        // The control: as long as it runs, nothing is left over.
        #expect(try !quire("list").contains("\"leftover\" : true"))
        try host.sh("mv \(hook) /run/hook")
        try host.virsh("destroy", "web1")
        try host.wait(for: "the backend to see that QEMU has gone") { try quire("list").contains("\"leftover\" : true") }
        let list = try quire("list")
        #expect(list.occurrences(of: "\"leftover\" : false") == 1 && list.occurrences(of: "\"vm\" : \"web1\"") == 1 && !list.contains("\"name\" : \"\""), "\(list)")
        try host.virsh("undefine", "web1")
        expect(try quire("list"), "\"name\" : \"\"", "\"vm\" : \"web1\"")
        expect(try quire("sweep"), "\"command\" : \"libvirt sweep\"", "\"name\" : \"web1\"", "\"its domain does not run: ended its backend\"")
        #expect(try !quire("list").contains("web1"))
    }

    /// Enabling again changes what is named, in libvirt's own hands, too, where definitions are completed and put in order; and all of
    /// it goes away without a trace.
    @Test func changes() throws {
        let host = try LibvirtHost()
        try host.define("web1", memory: 64)
        let before = try host.definition("web1")
        try host.quire("enable", "--swap", "64M", "--disk", "scratch", "--group", "lab", "web1")
        let enabled = try host.definition("web1")
        #expect(try host.quire("enable", "web1") == "web1: enabled already, nothing to do\n")
        #expect(try host.definition("web1") == enabled)
        // The note's line, and no other, under the domain's name.
        let shown = try host.quire("enable", "--dry-run", "--period", "1s", "web1").split(separator: "\n")
        let difference = shown.dropFirst().filter { !$0.hasPrefix(" ") }
        #expect(shown.first == "--- web1", "\(shown)")
        #expect(difference.count == 2 && difference.allSatisfy { $0.contains("<quire:vm ") } && difference[1].contains("period-ms=\"1000\""), "\(difference)")
        try host.quire("enable", "--period", "1s", "web1")
        try host.quire("enable", "--no-swap", "web1")
        let list = try host.quire("list", "--json")
        #expect(list.contains("\"swap_bytes\" : 0") && list.contains("\"scratch\"") && list.contains("\"group\" : \"lab\""), "\(list)")
        try host.quire("enable", "--no-disk", "scratch", "--no-group", "--no-merge", "web1")
        let last = try host.definition("web1")
        #expect(last.contains("period-ms=") && !last.contains("scratch") && !last.contains("lab") && !last.contains("LD_PRELOAD"), "\(last)")
        // What somebody has forged is not put back, and everything stays.
        let forged = last.replacing(#/ (added=)/#) { " was-access=\"private\" \($0.output.1)" }
        try host.virsh("define", host.write("forged.xml", forged))
        let defined = try host.definition("web1")
        #expect(try host.refusal(["/run/programs/quire", "libvirt", "disable", "web1"]).contains("its was-access is nothing that enable replaces"))
        #expect(try host.definition("web1") == defined)
        try host.virsh("define", host.write("honest.xml", last))
        try host.quire("disable", "web1")
        #expect(try host.definition("web1") == before)
        for options in [["--swap", "1G", "--no-swap"], ["--group", "a", "--no-group"], ["--disk", "a", "--no-disk", "a"], ["--no-merge", "--agent", "/a"], ["--merge", "--no-merge"]] {
            #expect(try Program.run([Program.quire, "libvirt", "enable", "web1"] + options).status == 64)
        }
    }

    /// Whatever libvirt has made of a domain, after `disable` it is what it was, byte for byte: other machines, disks of its own, root ports
    /// that are all taken, boot orders, a command line, a memory backing and a password that were there.
    @Test func shapes() throws {
        struct Shape { var name: String, machine = "q35", boot = "", backing = "", devices = "", commandLine = "" }
        func disk(_ target: String, _ bus: String, device: String = "disk", _ more: String = "") -> String {
            "<disk type='file' device='\(device)'>\(more)<source file='/var/lib/libvirt/images/\(target)'/><target dev='\(target)' bus='\(bus)'/></disk>"
        }
        let ports = (1...3).map { number in
            "<controller type='pci' index='\(number)' model='pcie-root-port'/><rng model='virtio'><backend model='random'>/dev/urandom</backend>"
                + "<address type='pci' domain='0' bus='\(number)' slot='0' function='0'/></rng>"
        }.joined()
        let arguments = "<qemu:arg value='-global'/><qemu:arg value='ICH9-LPC.disable_s3=1'/><qemu:env name='SHAPE' value='1'/>"
        let direct = "<driver name='qemu' type='raw' cache='none' io='native'/>"
        let password = "secret1"
        let shapes = [
            Shape(name: "pc", machine: "pc", devices: disk("hda", "ide") + disk("vda", "virtio")),
            Shape(
                name: "disks",
                devices: disk("vda", "virtio", direct) + disk("sda", "sata") + "<controller type='scsi' model='virtio-scsi'/>" + disk("sdb", "scsi")
                    + disk("sdc", "sata", device: "cdrom")),
            Shape(name: "ports", devices: ports),
            Shape(name: "boot", boot: "<boot dev='cdrom'/><boot dev='hd'/>", devices: disk("vda", "virtio") + disk("sda", "sata", device: "cdrom")),
            Shape(name: "order", devices: disk("vda", "virtio", "<boot order='2'/>") + disk("sda", "sata", device: "cdrom", "<boot order='1'/>")),
            Shape(name: "arguments", commandLine: "<qemu:commandline>\(arguments)</qemu:commandline>"),
            Shape(name: "anonymous", backing: "<memoryBacking><source type='anonymous'/></memoryBacking>"),
            Shape(name: "password", devices: "<graphics type='vnc' passwd='\(password)'/>"),
        ]
        let host = try LibvirtHost()
        // With what libvirt shows nobody who does not ask for it: it must not get lost, either.
        func definition(_ name: String) throws -> String { try host.virsh("dumpxml", "--inactive", "--security-info", name) }
        for shape in shapes {
            let xml = """
                <domain type='\(QEMU.hasKVM ? "kvm" : "qemu")' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
                  <name>\(shape.name)</name><memory unit='MiB'>64</memory>\(shape.backing)<vcpu>2</vcpu>
                  <os><type arch='x86_64' machine='\(shape.machine)'>hvm</type>\(shape.boot)</os><features><acpi/></features>
                  <devices>\(shape.devices)</devices>\(shape.commandLine)
                </domain>
                """
            try host.virsh("define", host.write("shape.xml", xml))
            // In libvirt's own order: what it adds itself it puts elsewhere when it reads it again.
            try host.virsh("define", host.write("shape.xml", definition(shape.name)))
            let before = try definition(shape.name)
            try host.quire("enable", "--swap", "64M", "--disk", "scratch", shape.name)
            let enabled = try definition(shape.name)
            #expect(enabled.occurrences(of: "<disk type='vhostuser'") == 3, "\(enabled)")
            // Of a domain that is enabled already it says, too, what works in part.
            let again = try host.quire("enable", shape.name)
            #expect(again.contains("\(shape.name): enabled already, nothing to do\n"), "\(again)")
            #expect(again.contains("disk vda has io='native'") == (shape.name == "disks"), "\(again)")
            if shape.name == "ports" {
                let port = "model='pcie-root-port'"
                #expect(enabled.occurrences(of: port) > before.occurrences(of: port), "\(enabled)")
            }
            #expect([before, enabled].allSatisfy { $0.contains("passwd='\(password)'") } == (shape.name == "password"), "\(enabled)")
            #expect(try !host.definition(shape.name).contains(password))
            try host.quire("disable", shape.name)
            let after = try definition(shape.name)
            let changes = after.split(separator: "\n").difference(from: before.split(separator: "\n"))
            #expect(after == before, "\(shape.name): \(changes.map { "\($0)" }.joined(separator: "\n"))")
        }
    }

    /// The backend dies in the middle of a detach, or the guest is suspended: the domain is as it was before, and merges again. Once
    /// more, and it is done.
    @Test func detachThatFails() throws {
        let host = try LibvirtHost()
        try host.configure("[backend]\nmerge-period = \"250ms\"\n")
        try host.startStore()
        try host.define("web1", memory: 256)
        try host.quire("enable", "web1")
        let console = try host.boot("web1")
        try console.sh("dd if=/dev/urandom of=/tmp/a bs=1M count=20 2>/dev/null; cp /tmp/a /tmp/b")
        let sums = try console.sh("md5sum /tmp/a /tmp/b")
        func merges() -> Bool { host.status("web1").merging.state == .active && host.status("web1").merging.sharingPages > 8000 }
        try host.wait(for: "equal pages to be merged", console) { merges() }

        // With QEMU stopped no page comes back, so it is in the middle for as long as this takes.
        let qemu = try host.pid("libvirt/qemu/web1"), backend = host.status("web1").pid
        ProcessCalls.signal(qemu, SIGSTOP)
        defer { ProcessCalls.signal(qemu, SIGCONT) }
        try host.sh("(/run/programs/quire libvirt detach --json web1; echo status $?) >/run/detach.log 2>&1 &")
        try host.wait(for: "the detach to have begun") { host.status("web1").merging.reason.contains("un-merged on demand") }
        ProcessCalls.signal(backend, SIGKILL)
        ProcessCalls.signal(qemu, SIGCONT)
        try host.wait(for: "the detach to fail") { try host.sh("cat /run/detach.log").contains("status ") }
        let said = try host.sh("cat /run/detach.log")
        #expect(said.contains("status 1") && said.contains("\"result\" : \"failed\"") && !said.contains("quire merge"), "\(said)")
        try host.wait(for: "it to merge again", console) { merges() && host.status("web1").pid != backend }
        func hasControlDisk() throws -> Bool { try host.virsh("dumpxml", "web1").contains("/run/quire/web1/qemu/control.sock") }
        #expect(try hasControlDisk())

        let detach = ["/run/programs/quire", "libvirt", "detach", "web1"]
        try host.virsh("suspend", "web1")
        let suspended = try host.refusal(detach)
        #expect(suspended.contains("the guest does not run, or is just starting: its pages come back when it runs"), "\(suspended)")
        try host.virsh("resume", "web1")
        try host.wait(for: "it to merge after it was suspended", console) { merges() }
        // With nothing to bring back it is the guest alone that does not let go. What somebody has un-merged by hand stays that way.
        try host.sh("/run/programs/quire unmerge web1")
        try host.virsh("suspend", "web1")
        let held = try host.refusal(detach)
        #expect(held.contains("has not let the control disk go: unload its quire module, or wait until it has booted"), "\(held)")
        #expect(try hasControlDisk() && host.status("web1").pid != 0)
        try host.virsh("resume", "web1")
        #expect(host.status("web1").merging.reason.contains("un-merged on demand"))

        try host.wait(for: "the detach to succeed", console) { (try? host.quire("detach", "web1")) != nil }
        #expect(try !hasControlDisk())
        #expect(Files.list(host.runtime.base) == [])
        #expect(try console.sh("md5sum /tmp/a /tmp/b") == sums)
    }
}
