import Host
import Platform

/// What a domain's XML says, as far as it concerns Quire: whether its memory can be given back and merged, and if not, why.
/// https://libvirt.org/formatdomain.html
public struct Domain: Sendable {
    public let xml: XMLText
    public let name: String
    /// Empty in an XML that libvirt has not seen yet.
    public let uuid: String
    /// What `enable` has noted; nil if it never was.
    public let mark: Mark?

    public init(_ text: String) throws(QuireError) { try self.init(XMLText(text)) }

    public init(_ xml: XMLText) throws(QuireError) {
        guard xml.root.name == "domain", xml.root.namespace.isEmpty else {
            throw QuireError(.invalid, "this is no libvirt domain: its XML begins with <\(xml.root.name)>")
        }
        guard let name = xml.root.first("name")?.trimmedText, !name.isEmpty else {
            throw QuireError(.invalid, "this is no libvirt domain: it has no <name>")
        }
        self.xml = xml
        self.name = name
        uuid = xml.root.first("uuid")?.trimmedText ?? ""
        mark = try Mark.read(xml)
    }

    private var root: XMLText.Element { xml.root }
    private var devices: [XMLText.Element] { root.first("devices")?.children ?? [] }
    private func devices(_ name: String) -> [XMLText.Element] { root.first("devices")?.all(name) ?? [] }

    /// The name of its VM in `quire status`: its own where that can be a folder's, else its UUID.
    public var vmName: String { RuntimeDirectory.isValidName(name) ? name : uuid }

    public var isEmulated: Bool { root["type"] == "qemu" }
    public var processorCount: Int { Int(root.first("vcpu")?.trimmedText ?? "") ?? 1 }

    /// The group that QEMU runs as, in the XML of a domain that is being started: of `<label>+64055:+108</label>`.
    public var qemuGroup: UInt32? {
        for label in root.all("seclabel") where label["model"] == "dac" {
            let parts = (label.first("label")?.trimmedText ?? "").split(separator: ":")
            if parts.count == 2 { return UInt32(parts[1].drop { $0 == "+" }) }
        }
        return nil
    }

    // MARK: What can't work

    /// Why Quire can do nothing for this domain, one line each; empty if it can.
    public var obstacles: [String] {
        var found: [String] = []
        func refuse(_ condition: Bool, _ line: String) { if condition { found.append(line) } }

        refuse(
            !["kvm", "qemu"].contains(root["type"] ?? ""),
            "its type is \(root["type"] ?? "missing"): Quire works with QEMU (kvm, qemu)")
        let architecture = root.find("os", "type")?["arch"] ?? "x86_64"
        refuse(architecture != "x86_64", "its guest is \(architecture): Quire works with x86_64 guests")
        refuse(vmName.isEmpty, "its name '\(name)' is no name for a VM, and it has no <uuid>: define it first")

        let backing = root.first("memoryBacking")
        refuse(backing?.first("hugepages") != nil, "its memory is huge pages, which can't be given back one by one: remove <hugepages>")
        refuse(backing?.first("locked") != nil, "its memory is locked: remove <locked/>")
        refuse(backing?.first("nosharepages") != nil, "its pages are not to be shared: remove <nosharepages/>")
        refuse(
            backing?.first("allocation")?["mode"] == "immediate",
            "all of its memory is allocated at its start: remove <allocation mode='immediate'/>")
        let source = backing?.first("source")?["type"] ?? ""
        refuse(!["", "memfd", "anonymous"].contains(source), "its memory is of source type '\(source)': remove <source> of <memoryBacking>")
        for cell in root.find("cpu", "numa")?.all("cell") ?? [] where cell["memAccess"] == "private" {
            found.append("NUMA cell \(cell["id"] ?? "") has private memory: remove memAccess='private'")
        }
        for memory in devices("memory") {
            let model = memory["model"] ?? ""
            refuse(!["dimm", "virtio-mem"].contains(model), "it has a memory device of model \(model): Quire works with dimm and virtio-mem")
            refuse(memory.find("source", "pagesize") != nil, "a memory device of it is huge pages: remove its <pagesize>")
            refuse(memory["access"] == "private", "a memory device of it is private: remove access='private'")
        }
        refuse(root.first("launchSecurity") != nil, "its memory is encrypted (<launchSecurity>): nobody else can read it")
        for schedule in root.first("cputune")?.children ?? []
        where schedule.name.hasSuffix("sched") && ["fifo", "rr"].contains(schedule["scheduler"] ?? "") {
            found.append("it is scheduled in real time (<\(schedule.name)>): its threads must never wait for the host's memory")
        }

        let pinned = "which pins all guest memory (VFIO): detach it"
        for device in devices {
            let type = device["type"] ?? ""
            switch device.name {
            case "hostdev": refuse(!["usb", "scsi", "scsi_host"].contains(type), "it has a host device (\(type)), \(pinned)")
            case "interface": refuse(["hostdev", "vdpa"].contains(type), "it has an interface of type \(type), \(pinned)")
            case "disk": refuse(["nvme", "vhostvdpa"].contains(type), "it has a disk of type \(type), \(pinned)")
            default: break
            }
        }
        for argument in ownArguments {
            let words = ["memory-backend", "mem-path", "mem-prealloc", "mem-lock", "vfio"]
            if let word = words.first(where: { argument.contains($0) }) {
                found.append("its <qemu:commandline> has '\(argument)': Quire can't tell what \(word) means for it, remove it")
            }
        }
        return found
    }

    private static let qemuNamespace = "http://libvirt.org/schemas/domain/qemu/1.0"
    var commandLine: XMLText.Element? { root.all("commandline", in: Self.qemuNamespace).first }
    private var ownArguments: [String] { (commandLine?.all("arg", in: Self.qemuNamespace) ?? []).compactMap { $0["value"] } }
    package var variables: [XMLText.Element] { commandLine?.all("env", in: Self.qemuNamespace) ?? [] }

    /// What stands in the way of the agent.
    var agentObstacle: String? {
        let preload = variables.first { $0["name"] == "LD_PRELOAD" }
        return preload.map { "its <qemu:commandline> sets LD_PRELOAD to '\($0["value"] ?? "")': remove it, or use --no-merge" }
    }

    // MARK: What works in part

    /// What closes the pin gate, so that equal pages are not merged while it is there; pages that the guest has freed still go
    /// back. One line each, with what to do.
    public var limits: [String] { limits(.host) }

    package func limits(_ nested: NestedGuests) -> [String] {
        var found: [String] = []
        func limit(_ what: String, _ advice: String) {
            found.append("\(what): equal pages are not merged, freed pages still go back; \(advice)")
        }
        func isDirect(_ disk: XMLText.Element) -> Bool { ["none", "directsync"].contains(disk.first("driver")?["cache"] ?? "") }
        // Transfers of these go on when the call that began them has returned; with direct I/O, in the guest's own pages. Direct
        // I/O by threads is over when its call is, which the agent sees.
        let hasDirect = devices("disk").contains(where: isDirect)
        for disk in devices("disk") {
            let target = disk.first("target")?["dev"] ?? "?", io = disk.first("driver")?["io"] ?? ""
            if hasDirect, io == "io_uring" || io == "native" {
                limit("disk \(target) has io='\(io)', and \(isDirect(disk) ? "it" : "another disk") bypasses the page cache", "to merge them: io='threads'")
            }
            // QEMU hands such a guest's commands to the kernel as they are (SG_IO), with the guest's own pages.
            if disk["device"] == "lun" { limit("disk \(target) is a LUN, whose SCSI commands go to the kernel", "to merge them: device='disk'") }
            if disk["type"] == "vhostuser", !(mark?.owns(disk) ?? false) {
                limit("disk \(target) is served by another vhost-user back end", "that back end has guest memory mapped")
            }
        }
        for interface in devices("interface") where interface["type"] == "vhostuser" {
            limit("it has a vhost-user interface", "that back end has guest memory mapped")
        }
        for interface in devices("interface") where interface["type"] == "network" {
            if let network = interface.first("source")?["network"], interface["managed"] != nil || interface.first("virtualport") != nil {
                found.append("interface on network '\(network)': if that network hands out VFIO devices, the domain will not start with Quire")
            }
        }
        for filesystem in devices("filesystem") where filesystem.first("driver")?["type"] == "virtiofs" {
            limit("it has a virtiofs file system", "virtiofsd has guest memory mapped")
        }
        for device in devices("hostdev") {
            switch device["type"] {
            case "scsi_host": limit("it has a vhost-scsi device", "the kernel pins guest memory for it")
            // One of iSCSI is QEMU's own client.
            case "scsi" where device.first("source")?["protocol"] == nil:
                limit("it has a SCSI host device", "the kernel pins guest memory for its commands; to merge them: <disk device='disk'>")
            default: break
            }
        }
        for video in devices("video") {
            if video.first("driver")?["name"] == "vhostuser" { limit("it has a vhost-user GPU", "that back end has guest memory mapped") }
            if video.first("model")?["blob"] == "on" { limit("its virtio GPU has blob='on'", "the kernel pins what it shows (udmabuf); to merge them: blob='off'") }
        }
        if root["type"] == "kvm", let cpu = root.first("cpu") {
            var features: [String: Bool] = [:]
            for feature in cpu.all("feature") { features[feature["name"] ?? ""] = !["disable", "forbid"].contains(feature["policy"] ?? "") }
            // What libvirt makes of host-model has what the host has, too.
            if nested.mayRun(isHostCPU: ["host-passthrough", "host-model", "maximum"].contains(cpu["mode"] ?? ""), features: features) {
                limit("KVM lets it run guests of its own, and writes its pages unseen then", "to merge them: <feature policy='disable' name='\(nested.vmx ? "vmx" : "svm")'/> in <cpu>")
            }
        }
        if isEmulated && processorCount == 1 {
            found.append("it is emulated with one CPU: nothing is recycled, because its atomic operations are none for other processes")
        }
        if root.first("maxMemory") != nil {
            found.append("it may get more memory while it runs: at most 8 regions of memory, as no QEMU before 9.1 does more")
        }
        return found
    }
}
