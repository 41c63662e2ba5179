import Host
import Libvirt
import Platform
import Testing

@Suite struct DomainTests {
    static let request: Domain.Request = {
        var request = Domain.Request(directory: RuntimeDirectory(base: "/run/quire"))
        request.agent = "/usr/lib/quire/libquire-agent.so"
        return request
    }()

    /// A domain, with what a test is about.
    static func domain(_ more: String = "", devices: String = "", type: String = "kvm") -> String {
        """
        <domain type='\(type)'>
          <name>web1</name>
          <uuid>c4193e6b-7172-4466-b17c-554d14946c89</uuid>
          <memory unit='KiB'>524288</memory>
          <vcpu>2</vcpu>
          <os><type arch='x86_64'>hvm</type></os>
          \(more)
          <devices>
            <emulator>/usr/bin/qemu-system-x86_64</emulator>
            \(devices)
          </devices>
        </domain>
        """
    }

    /// In every shape that an operator may have written them.
    static let shapes: [String] = [
        domain(),
        domain("<memoryBacking/>"), domain("<memoryBacking />"), domain("<memoryBacking></memoryBacking>"),
        domain("<memoryBacking>\n    <discard/>\n  </memoryBacking>"),
        domain("<memoryBacking><source type='anonymous'/><access mode=\"private\"/></memoryBacking>"),
        domain("<memoryBacking>\n    <!-- ours -->\n    <access mode='shared'/>\n  </memoryBacking>"),
        domain("<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>"),
        domain("<metadata/>"), domain("<metadata>\n  </metadata>"),
        domain("<metadata><x:y xmlns:x='urn:x'> <x:z/></x:y><!-- end --></metadata>"),
        domain(devices: "<disk type='file' device='disk'><source file='/a'/><target dev='vda' bus='virtio'/></disk>\n    <future nobody='knows'/>"),
        domain(devices: "<disk type='file'><target dev='vdz'/></disk><disk type='file'><target dev='sda'/></disk>"),
        domain("<description>a &lt; b &amp; \"c\"</description><unknown xmlns='urn:u'><memoryBacking/></unknown>"),
        domain().replacing("\n", with: "\r\n"),
        "<domain type='kvm'><name>web1</name><memory>1</memory><devices/></domain>",
        "<?xml version='1.0'?>\n<!-- made by hand -->\n<domain type='qemu'>\n\t<name>web1</name>\n\t<memory>1</memory>\n\t<devices>\n\t</devices>\n</domain>\n<!-- end -->\n",
        domain("<q:commandline xmlns:q='http://libvirt.org/schemas/domain/qemu/1.0'><q:arg value='-s'/></q:commandline>"),
        domain("<q:commandline xmlns:q='http://libvirt.org/schemas/domain/qemu/1.0'/>"),
    ]

    @Test(arguments: shapes, [nil, UInt64(1) << 30])
    func disablingGivesBackEveryByte(_ text: String, swap: UInt64?) throws {
        var request = Self.request
        request.swapBytes = swap
        if swap != nil { request.sharedDisks = [.init(name: "scratch"), .init(name: "big.1", byteCount: 1 << 30)] }
        let domain = try Domain(text)
        let enabled = try Domain(domain.enabled(request))
        #expect(enabled.xml.bytes != domain.xml.bytes)
        let mark = try #require(enabled.mark)
        #expect(mark.name == "web1" && mark.swapBytes == swap && mark.agent == request.agent && mark.sharedDisks == request.sharedDisks)
        #expect(enabled.xml.root.find("memoryBacking", "source")?["type"] == "memfd")
        #expect(enabled.xml.root.find("memoryBacking", "access")?["mode"] == "shared")
        let disks = try #require(enabled.xml.root.first("devices")).all("disk").filter(mark.owns)
        #expect(disks.count == (swap == nil ? 1 : 4))
        if swap != nil { #expect(disks.last?.first("source")?["path"] == "/run/quire/web1/qemu/shared-1.sock") }
        #expect(enabled.variables.count == 2)
        #expect(try enabled.disabled().text == text)
    }

    /// Doing it again changes nothing; asking for something else changes that, and it still goes away without a trace.
    @Test(arguments: shapes) func enablingIsIdempotent(_ text: String) throws {
        let once = try Domain(Domain(text).enabled(Self.request))
        #expect(try once.enabled(Self.request).bytes == once.xml.bytes)
        var other = Self.request
        other.agent = nil
        other.group = "a & b"
        other.sharedDisks = [.init(name: "scratch")]
        let changed = try Domain(once.enabled(other))
        #expect(changed.mark?.group == "a & b" && changed.mark?.agent == nil && changed.variables.isEmpty)
        #expect(try changed.enabled(other).bytes == changed.xml.bytes)
        #expect(try Domain(changed.enabled(Self.request)).mark?.sharedDisks == [])
        #expect(try changed.disabled().text == text)
        #expect(try Domain(text).disabled().text == text)
    }

    /// Again, with what an operator names: that changes, and nothing else.
    @Test(arguments: shapes) func enablingAgainKeepsTheRest(_ text: String) throws {
        var changes = Domain.Changes(directory: RuntimeDirectory(base: "/run/quire"))
        changes.usualAgent = "/usr/lib/quire/libquire-agent.so"
        changes.isHere = false
        func again(_ domain: Domain, _ change: (inout Domain.Changes) -> Void = { _ in }) throws -> Domain {
            var changes = changes
            change(&changes)
            return try Domain(domain.enabled(domain.request(changes)))
        }
        func lines(_ domain: Domain) -> [Substring] { domain.xml.text.split(separator: "\n").filter { !$0.contains("<quire:vm ") } }
        let plain = try Domain(text)
        #expect(try again(plain).xml.bytes == plain.enabled(Self.request).bytes)

        let first = try again(plain) {
            $0.agent = "/opt/agent.so"
            $0.swap = .set(1 << 30)
            $0.group = .set("lab")
            $0.period = .set(500)
            $0.sharedDisks = [.init(name: "scratch"), .init(name: "big.1", byteCount: 1 << 30)]
        }
        let mark = try #require(first.mark)
        #expect(try again(first).xml.bytes == first.xml.bytes)
        // What stands in the note alone changes there alone.
        let slower = try again(first) { $0.period = .set(1000) }
        #expect(slower.mark?.period == 1000 && slower.mark?.swapBytes == 1 << 30 && lines(slower) == lines(first))
        #expect(try again(slower) { $0.period = .set(500) }.xml.bytes == first.xml.bytes)
        let bare = try again(first) { ($0.period, $0.group) = (.drop, .drop) }
        #expect(bare.mark?.period == nil && bare.mark?.group == "" && bare.mark?.sharedDisks == mark.sharedDisks && lines(bare) == lines(first))

        // And the rest, one by one.
        let one = try again(first) { ($0.swap, $0.droppedDisks) = (.drop, ["scratch", "unknown"]) }
        #expect(one.mark?.swapBytes == nil && one.mark?.sharedDisks == [.init(name: "big.1", byteCount: 1 << 30)])
        #expect(one.mark?.agent == "/opt/agent.so" && one.mark?.group == "lab" && one.mark?.period == 500)
        let two = try again(one) { $0.sharedDisks = [.init(name: "big.1", byteCount: 2 << 30), .init(name: "scratch")] }
        #expect(two.mark?.sharedDisks == [.init(name: "big.1", byteCount: 2 << 30), .init(name: "scratch")])
        let quiet = try again(two) { $0.merges = false }
        #expect(quiet.mark?.agent == nil && quiet.variables.isEmpty && quiet.mark?.sharedDisks == two.mark?.sharedDisks)
        #expect(try again(quiet).xml.bytes == quiet.xml.bytes)
        #expect(try again(quiet) { $0.merges = true }.mark?.agent == changes.usualAgent)
        #expect(try again(quiet) { $0.agent = "/opt/other.so" }.mark?.agent == "/opt/other.so")
        // One that is not on this host any more is replaced by the one that is.
        #expect(try again(first) { $0.isHere = true }.mark?.agent == changes.usualAgent)
        for domain in [first, slower, bare, one, two, quiet] { #expect(try domain.disabled().text == text) }

        #expect(message { try plain.request(Domain.Changes(directory: changes.directory)) }?.hasPrefix("web1: libquire-agent.so is not beside quire") == true)
        let many = (0..<40).map { BackendService.Settings.Disk(name: "more\($0)") }
        #expect(message { try again(first) { $0.sharedDisks = many } }?.contains("drop some with --no-disk") == true)
    }

    /// A note that somebody has written puts nothing into a definition that `enable` has not taken out of it; and what somebody has
    /// changed since is his.
    @Test(arguments: ["source", "access"]) func refusesAForgedNote(_ element: String) throws {
        let text = Self.domain("<memoryBacking><source type='anonymous'/><access mode='private'/></memoryBacking>")
        let former = element == "source" ? "anonymous" : "private"
        let enabled = try Domain(text).enabled(Self.request).text
        var other = Self.request
        other.swapBytes = 1 << 30
        #expect(enabled.contains(" was-\(element)=\"\(former)\""))
        for value in ["", "file", "shared", "memfd", "x&#10;y", "x'/&gt;&lt;locked/&gt;"] {
            let forged = try Domain(enabled.replacing(" was-\(element)=\"\(former)\"", with: " was-\(element)=\"\(value)\""))
            for said in [message { try forged.disabled() }, message { try forged.enabled(other) }] {
                #expect(said?.hasPrefix("web1: Quire's note in <metadata> is damaged: its was-\(element) is nothing") == true, "\(said ?? "no error")")
                #expect(said?.contains("\n") != true)
            }
        }
        // Both ours altogether and somebody's before: one of them is a lie.
        let both = try Domain(enabled.replacing(" was-\(element)=", with: " added=\"\(element)\" was-\(element)="))
        #expect(message { try both.disabled() }?.contains("damaged") == true)
        // The control: as it was noted it goes back; and not over what is there now.
        #expect(try Domain(enabled).disabled().text == text)
        let changed = enabled.replacing("type='memfd'", with: "type='file'").replacing("mode='shared'", with: "mode='other'")
        let left = try Domain(changed).disabled().text
        #expect(left.contains("type='file'") && left.contains("mode='other'"))
    }

    @Test func refusesWhatLibvirtDoesNotKnow() throws {
        let domain = try Domain(Self.domain("<memoryBacking><access mode='odd'/></memoryBacking>"))
        #expect(message { try domain.enabled(Self.request) } == "web1: <access> of <memoryBacking> has the mode 'odd', which libvirt does not know: correct it")
    }

    /// What somebody has changed meanwhile stays.
    @Test func keepsWhatOthersAdded() throws {
        let enabled = try Domain(Self.domain()).enabled(Self.request).text
        let edited = enabled
            .replacing("<memoryBacking>", with: "<memoryBacking>\n    <discard/>")
            .replacing("<metadata>", with: "<metadata>\n    <x:y xmlns:x='urn:x'/>")
            .replacing("</qemu:commandline>", with: "<qemu:arg value='-s'/></qemu:commandline>")
            .replacing("</devices>", with: "  <disk type='file'><target dev='vdc'/></disk>\n  </devices>")
        let disabled = try Domain(edited).disabled()
        for kept in ["<discard/>", "<x:y xmlns:x='urn:x'/>", "<qemu:arg value='-s'/>", "vdc"] { #expect(disabled.text.contains(kept)) }
        for gone in ["memfd", "quire", "vhostuser", "LD_PRELOAD"] { #expect(!disabled.text.contains(gone), "\(disabled.text)") }
    }

    /// A disk keeps its name: ours come behind.
    @Test func diskNames() throws {
        func name(_ disks: String...) throws -> String? {
            let text = Self.domain(devices: disks.map { "<disk type='file'><target dev='\($0)'/></disk>" }.joined())
            let enabled = try Domain(Domain(text).enabled(Self.request))
            return enabled.xml.root.first("devices")?.all("disk").last?.first("target")?["dev"]
        }
        #expect(try name() == "vda")
        #expect(try name("sda", "hdb") == "vda")
        #expect(try name("vda", "vdc") == "vdd")
        #expect(try name("vdz") == "vdaa")
        #expect(try name("vdaz") == "vdba")
    }

    /// Controllers that came for our disks go with them, unless somebody else has come to use them.
    @Test func controllers() throws {
        func port(_ index: Int) -> String { "<controller type='pci' index='\(index)' model='pcie-root-port'/>\n    " }
        let with = Self.domain(devices: port(4) + port(5) + port(6) + "<rng><address type='pci' bus='0x06'/></rng>")
        let enabled = try Domain(Domain(with).enabled(Self.request))
        let changed = try enabled.noting(controllers: [5, 6])
        let noted = try Domain(#require(changed))
        let text = try noted.disabled().text
        #expect(text.contains("index='4'") && !text.contains("index='5'") && text.contains("index='6'"))
    }

    static let obstacles: [(String, String, String)] = [
        ("<memoryBacking><hugepages/></memoryBacking>", "", "huge pages"),
        ("<memoryBacking><locked/></memoryBacking>", "", "<locked/>"),
        ("<memoryBacking><nosharepages/></memoryBacking>", "", "<nosharepages/>"),
        ("<memoryBacking><allocation mode='immediate'/></memoryBacking>", "", "immediate"),
        ("<memoryBacking><source type='file'/></memoryBacking>", "", "source type 'file'"),
        ("<launchSecurity type='sev'/>", "", "encrypted"),
        ("<cputune><vcpusched vcpus='0' scheduler='fifo' priority='1'/></cputune>", "", "real time (<vcpusched>)"),
        ("<cputune><emulatorsched scheduler='rr' priority='1'/></cputune>", "", "real time (<emulatorsched>)"),
        ("<cputune><iothreadsched iothreads='1' scheduler='fifo' priority='1'/></cputune>", "", "real time (<iothreadsched>)"),
        ("<cpu><numa><cell id='0' memory='1' memAccess='private'/></numa></cpu>", "", "NUMA cell 0"),
        ("", "<hostdev mode='subsystem' type='pci'/>", "VFIO"),
        ("", "<hostdev mode='subsystem' type='mdev'/>", "VFIO"),
        ("", "<hostdev mode='capabilities' type='storage'/>", "a host device (storage)"),
        ("", "<interface type='hostdev'/>", "VFIO"),
        ("", "<interface type='vdpa'><source dev='/dev/vhost-vdpa-0'/></interface>", "an interface of type vdpa, which pins"),
        ("", "<disk type='nvme'><target dev='vda'/></disk>", "VFIO"),
        ("", "<disk type='vhostvdpa'><source dev='/dev/vhost-vdpa-0'/><target dev='vda'/></disk>", "a disk of type vhostvdpa, which pins"),
        ("", "<memory model='nvdimm'/>", "nvdimm"),
        ("", "<memory model='dimm'><source><pagesize>2048</pagesize></source></memory>", "pagesize"),
        ("", "<memory model='dimm' access='private'/>", "remove access='private'"),
        (
            "<qemu:commandline xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'><qemu:arg value='memory-backend-file,id=x'/></qemu:commandline>",
            "", "memory-backend"
        ),
        (
            "<qemu:commandline xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'><qemu:env name='LD_PRELOAD' value='/x.so'/></qemu:commandline>",
            "", "LD_PRELOAD"
        ),
    ]

    @Test(arguments: obstacles) func refuses(_ obstacle: (String, String, String)) throws {
        let domain = try Domain(Self.domain(obstacle.0, devices: obstacle.1))
        let said = message { try domain.enabled(Self.request) }
        #expect(said?.hasPrefix("web1: ") == true && said?.contains(obstacle.2) == true, "\(said ?? "no error")")
        #expect(said?.contains("\n") != true)
    }

    @Test func refusesOtherMachines() throws {
        let text = Self.domain().replacing("arch='x86_64'", with: "arch='aarch64'")
        #expect(message { try Domain(text).enabled(Self.request) } == "web1: its guest is aarch64: Quire works with x86_64 guests")
        // Batch is no real time.
        let batch = "<cputune><emulatorsched scheduler='batch'/></cputune>"
        #expect(try Domain(Self.domain(batch)).obstacles.isEmpty)
    }

    @Test func refusesOtherHypervisors() throws {
        #expect(message { try Domain(Self.domain(type: "xen")).enabled(Self.request) }?.contains("its type is xen") == true)
        #expect(message { try Domain("<network/>") } == "this is no libvirt domain: its XML begins with <network>")
        #expect(message { try Domain("<domain type='kvm'/>") }?.contains("no <name>") == true)
        #expect(message { try Domain("<domain><name>a b/c</name></domain>").enabled(Self.request) }?.contains("no <uuid>") == true)
        #expect(message { try Domain(Self.domain("<metadata><q:vm xmlns:q='urn:quire:libvirt:1'/></metadata>")) }?.contains("damaged") == true)
        for disks in ["a/b", "a:", "a:x", "a:1:2", ":1"] {
            let note = "<metadata><q:vm xmlns:q='urn:quire:libvirt:1' name='a' sockets='/s' disks='\(disks)'/></metadata>"
            #expect(message { try Domain(Self.domain(note)) }?.contains("damaged (disks '\(disks)')") == true)
        }
        for contents in ["a", "a:", "a:x", "b:1", "a:1:2"] {
            let note = "<metadata><q:vm xmlns:q='urn:quire:libvirt:1' name='a' sockets='/s' disks='a' contents='\(contents)'/></metadata>"
            #expect(message { try Domain(Self.domain(note)) }?.contains("damaged (contents '\(contents)')") == true)
        }
    }

    /// What a running domain's disks have is noted beside what was asked for, and asks for nothing by itself.
    @Test func contentsOfDisks() throws {
        var request = Self.request
        request.sharedDisks = [.init(name: "scratch"), .init(name: "big.1", byteCount: 1 << 30)]
        let enabled = try Domain(Domain(Self.domain()).enabled(request)).xml.text
        let noted = try Domain(enabled.replacing(" created=", with: " contents=\"big.1:fedcba9876543210 scratch:1\" created="))
        #expect(noted.mark?.sharedDisks == [.init(name: "scratch", content: 1), .init(name: "big.1", byteCount: 1 << 30, content: 0xfedc_ba98_7654_3210)])
        #expect(try noted.enabled(request).bytes == noted.xml.bytes)
        #expect(try noted.disabled().text == Self.domain())
    }

    @Test func limits() throws {
        func limits(_ devices: String) throws -> [String] { try Domain(Self.domain(devices: devices)).limits }
        #expect(try limits("").isEmpty)
        #expect(try limits("<disk><driver cache='writeback'/></disk>").isEmpty)
        #expect(try limits("<disk><driver cache='none'/></disk><disk><driver cache='none' io='threads'/></disk>").isEmpty)
        #expect(try limits("<disk><driver io='io_uring'/></disk>").isEmpty)
        #expect(try limits("<disk><driver cache='none' io='native'/><target dev='vda'/></disk>")[0].hasPrefix("disk vda has io='native', and it bypasses"))
        #expect(try limits("<disk><driver cache='none'/></disk><disk><driver io='io_uring'/></disk>")[0].contains("another disk bypasses"))
        #expect(try limits("<interface type='vhostuser'/>").count == 1)
        #expect(try limits("<filesystem><driver type='virtiofs'/></filesystem>").count == 1)
        // These pin pages while they are there, and no more: nothing of that keeps a domain from having Quire.
        for (device, said) in [
            ("<hostdev mode='subsystem' type='scsi_host'><source protocol='vhost' wwpn='naa.1'/></hostdev>", "a vhost-scsi device"),
            ("<hostdev mode='subsystem' type='scsi'><source><adapter name='scsi_host0'/></source></hostdev>", "a SCSI host device"),
            ("<disk type='block' device='lun'><source dev='/dev/sda'/><target dev='sda'/></disk>", "disk sda is a LUN"),
            ("<video><model type='virtio' heads='1' blob='on'/></video>", "its virtio GPU has blob='on'"),
            ("<video><driver name='vhostuser'/><model type='virtio'/></video>", "a vhost-user GPU"),
        ] {
            let found = try limits(device)
            #expect(found.count == 1 && found[0].contains(said) && found[0].contains("equal pages are not merged"), "\(found)")
            #expect(try Domain(Self.domain(devices: device)).obstacles.isEmpty)
        }
        for device in [
            "<hostdev mode='subsystem' type='scsi'><source protocol='iscsi' name='iqn'/></hostdev>", "<hostdev mode='subsystem' type='usb'/>",
            "<disk type='block' device='disk'><target dev='sda'/></disk>", "<video><model type='virtio' blob='off'/></video>", "<video><model type='qxl'/></video>",
        ] { #expect(try limits(device).isEmpty) }
        // Our own are no limit.
        #expect(try Domain(Domain(Self.domain()).enabled(Self.request)).limits.isEmpty)
    }

    /// One that may run guests of its own: only where this host's KVM lets it.
    @Test func guestsOfGuests() throws {
        func limits(_ cpu: String, _ host: NestedGuests = NestedGuests(vmx: true, svm: false), type: String = "kvm") throws -> [String] {
            try Domain(Self.domain("<cpu \(cpu)</cpu>", type: type)).limits(host).filter { $0.contains("guests of its own") }
        }
        for cpu in [
            "mode='host-passthrough'>", "mode='host-model'>", "mode='maximum'><feature policy='disable' name='svm'/>",
            "mode='custom'><model>Broadwell</model><feature policy='require' name='vmx'/>",
        ] { #expect(try limits(cpu).count == 1, "\(cpu)") }
        #expect(try limits("mode='host-passthrough'>")[0].contains("<feature policy='disable' name='vmx'/>"))
        for cpu in ["mode='host-passthrough'><feature policy='disable' name='vmx'/>", "mode='custom'><model>Broadwell</model>"] {
            #expect(try limits(cpu).isEmpty, "\(cpu)")
        }
        #expect(try limits("mode='host-passthrough'>", NestedGuests(vmx: false, svm: false)).isEmpty)
        #expect(try limits("mode='maximum'>", type: "qemu").isEmpty)
    }

    @Test func differences() {
        #expect(lineDifference("a\nb\nc", "a\nx\nc") == "  a\n- b\n+ x\n  c")
        #expect(lineDifference("a\nb", "a\nb") == "")
        let long = (0..<20).map { "\($0)" }.joined(separator: "\n")
        #expect(lineDifference(long, "new\n" + long + "\nend") == "+ new\n  0\n  1\n  2\n  …\n  17\n  18\n  19\n+ end")
    }
}
