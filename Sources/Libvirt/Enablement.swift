import Host
import Platform

/// Enabling and disabling, from one XML to the next. What is added:
///
///     <metadata>                                    the mark (Mark.swift)
///     <memoryBacking> source memfd, access shared   guest RAM that another process can have
///     <disk type='vhostuser'>                       the control disk, the swap disk, shared disks
///     <qemu:commandline> qemu:env                   the agent
extension Domain {
    public struct Request: Sendable {
        /// Where the host's VMs have their folders.
        public var directory: RuntimeDirectory
        /// libquire-agent.so; nil: nothing is merged.
        public var agent: String?
        public var swapBytes: UInt64?
        public var group = ""
        public var period: UInt64?
        /// Of quired; each once.
        public var sharedDisks: [BackendService.Settings.Disk] = []
        public init(directory: RuntimeDirectory) { self.directory = directory }
    }

    /// What an operator names. The rest stays as the domain has it; one that has nothing yet merges, and has no disks.
    public struct Changes: Sendable {
        public enum Change<Value: Sendable>: Sendable {
            case keep, drop, set(Value)

            func applied(to value: Value?) -> Value? {
                switch self {
                case .keep: value
                case .drop: nil
                case .set(let new): new
                }
            }
        }

        public var directory: RuntimeDirectory
        /// Nil: as it is. With an agent that is named it merges, too.
        public var merges: Bool?
        /// libquire-agent.so, where it is not to be the one that the domain has.
        public var agent: String?
        /// For a domain without one.
        public var usualAgent: String?
        /// The domain is one of this host: an agent that is not here any more is none.
        public var isHere = true
        public var swap = Change<UInt64>.keep
        public var group = Change<String>.keep
        /// Milliseconds.
        public var period = Change<UInt64>.keep
        /// Attached, or with another size; each once.
        public var sharedDisks: [BackendService.Settings.Disk] = []
        /// By name.
        public var droppedDisks: Set<String> = []
        public init(directory: RuntimeDirectory) { self.directory = directory }
    }

    /// What the domain asks for with `changes`.
    public func request(_ changes: Changes) throws(QuireError) -> Request {
        var request = Request(directory: changes.directory)
        if changes.merges ?? (mark == nil || mark?.agent != nil || changes.agent != nil) {
            let own = mark?.agent.flatMap { !changes.isHere || Files.identity(of: $0) != nil ? $0 : nil }
            guard let agent = changes.agent ?? own ?? changes.usualAgent else {
                throw QuireError(.invalid, "\(name): libquire-agent.so is not beside quire: name it with --agent, or merge nothing with --no-merge")
            }
            request.agent = agent
        }
        request.swapBytes = changes.swap.applied(to: mark?.swapBytes)
        request.group = changes.group.applied(to: mark?.group) ?? ""
        request.period = changes.period.applied(to: mark?.period)
        var disks = (mark?.sharedDisks ?? []).filter { !changes.droppedDisks.contains($0.name) }
        for index in disks.indices { disks[index].content = nil }
        for disk in changes.sharedDisks {
            if let index = disks.firstIndex(where: { $0.name == disk.name }) { disks[index] = disk } else { disks.append(disk) }
        }
        let most = QEMUCommandLine.maxDisks - 1
        guard disks.count <= most else {
            throw QuireError(.invalid, "\(name): a domain has at most \(most) shared disks, and this would be \(disks.count): drop some with --no-disk")
        }
        request.sharedDisks = disks
        return request
    }

    public func mark(for request: Request) -> Mark {
        var mark = Mark(name: vmName, sockets: request.directory.qemuFolder(vmName))
        mark.uuid = uuid
        mark.agent = request.agent
        mark.swapBytes = request.swapBytes
        mark.group = request.group
        mark.period = request.period
        mark.sharedDisks = request.sharedDisks
        return mark
    }

    /// The XML with Quire. Itself, if it asks for the same already. Throws the first of the `obstacles`.
    public func enabled(_ request: Request) throws(QuireError) -> XMLText {
        guard RuntimeDirectory.isValidName(vmName) else {
            throw QuireError(.invalid, "\(name): its name is no name for a VM, and it has no <uuid>: define it first")
        }
        let wanted = mark(for: request)
        if let mark {
            if mark.asksForTheSame(as: wanted) { return xml }
            // What the note alone says changes nothing else, as libvirt has completed it meanwhile.
            if mark.agent == wanted.agent, mark.diskSockets == wanted.diskSockets, obstacles.isEmpty {
                return try replacingNote(by: wanted.withAdditions(of: mark))
            }
            return try Domain(disabled()).enabled(request)
        }
        if let obstacle = obstacles.first { throw QuireError(.unsupported, "\(name): \(obstacle)") }
        if request.agent != nil, let agentObstacle { throw QuireError(.unsupported, "\(name): \(agentObstacle)") }
        return try added(wanted)
    }

    private func added(_ request: Mark) throws(QuireError) -> XMLText {
        var mark = request
        var edit = XMLEdit(xml)
        let root = xml.root

        // Memory.
        let places = ["memory", "currentMemory", "maxMemory", "memtune", "memoryBacking"]
        guard let memory = root.children.last(where: { places.contains($0.name) }) else {
            throw QuireError(.invalid, "\(name): it has no <memory>")
        }
        var wanted: [String] = []
        for (element, attribute, value) in [("source", "type", "memfd"), ("access", "mode", "shared")] {
            let present = root.find("memoryBacking", element)
            guard let present, let old = present.attributes.first(where: { $0.name == attribute }) else {
                guard present == nil else {
                    throw QuireError(.invalid, "\(name): <\(element)> of <memoryBacking> has no \(attribute)")
                }
                wanted.append("<\(element) \(attribute)='\(value)'/>")
                mark.added.insert(element)
                continue
            }
            if old.value != value {
                guard old.value == Mark.former[element] else {
                    throw QuireError(.invalid, "\(name): <\(element)> of <memoryBacking> has the \(attribute) '\(old.value)', which libvirt does not know: correct it")
                }
                mark.was[element] = old.value
                edit.setValue(of: old, value)
            }
        }
        if !wanted.isEmpty {
            if let backing = root.first("memoryBacking") {
                if backing.content == nil { mark.opened.insert("memoryBacking") }
                edit.append(wanted, to: backing)
            } else {
                mark.created.insert("memoryBacking")
                edit.insert(["<memoryBacking>"] + wanted.map { "  " + $0 } + ["</memoryBacking>"], after: memory)
            }
        }

        // Disks.
        guard let devices = root.first("devices") else { throw QuireError(.invalid, "\(name): it has no <devices>") }
        var taken = Set(devices.all("disk").compactMap { $0.first("target")?["dev"] })
        var disks: [String] = []
        for socket in mark.diskSockets {
            // Behind all others: a guest that counts its disks finds them under the names they had.
            let target = try Self.diskName(behind: taken)
            taken.insert(target)
            disks += [
                "<disk type='vhostuser' device='disk'>",
                // QEMU wants as many queues as CPUs otherwise, and the backend has one.
                "  <driver name='qemu' type='raw' queues='1'/>",
                "  <source type='unix' path='\(XMLText.escaped(socket))'>",
                "    <reconnect enabled='yes' timeout='1'/>",
                "  </source>",
                "  <target dev='\(target)' bus='virtio'/>",
                "</disk>",
            ]
        }
        if let last = devices.all("disk").last ?? devices.first("emulator") {
            edit.insert(disks, after: last)
        } else {
            if devices.content == nil { mark.opened.insert("devices") }
            edit.append(disks, to: devices)
        }

        // The agent.
        if let agent = mark.agent {
            let prefix = commandLine.map { String($0.name.dropLast("commandline".count)) } ?? "qemu:"
            let variables = [
                "<\(prefix)env name='LD_PRELOAD' value='\(XMLText.escaped(agent))'/>",
                "<\(prefix)env name='QUIRE_AGENT_SOCKET' value='\(XMLText.escaped(mark.agentSocket))'/>",
            ]
            if let commandLine {
                if commandLine.content == nil { mark.opened.insert("commandline") }
                edit.append(variables, to: commandLine)
            } else {
                mark.created.insert("commandline")
                edit.append(
                    ["<qemu:commandline xmlns:qemu='\(XMLText.escaped(Self.qemuSchema))'>"] + variables.map { "  " + $0 }
                        + ["</qemu:commandline>"], to: root)
            }
        }

        // The mark, last: it says what the others did.
        if let metadata = root.first("metadata") {
            if metadata.content == nil { mark.opened.insert("metadata") }
            edit.append([mark.element], to: metadata)
        } else {
            mark.created.insert("metadata")
            let head = ["name", "uuid", "genid", "title", "description"]
            guard let place = root.children.last(where: { head.contains($0.name) }) else {
                throw QuireError(.invalid, "\(name): it has no <name>")
            }
            edit.insert(["<metadata>", "  " + mark.element, "</metadata>"], after: place)
        }
        return try XMLText(edit.apply())
    }

    private static let qemuSchema = "http://libvirt.org/schemas/domain/qemu/1.0"

    /// The first name of a virtio disk behind all of these: vda, vdb, … vdz, vdaa, …
    private static func diskName(behind taken: Set<String>) throws(QuireError) -> String {
        func number(_ name: String) -> Int? {
            guard name.hasPrefix("vd"), name.utf8.count <= 5 else { return nil }
            var result = 0
            for byte in name.utf8.dropFirst(2) {
                guard (UInt8(ascii: "a")...UInt8(ascii: "z")).contains(byte) else { return nil }
                result = result * 26 + Int(byte - UInt8(ascii: "a")) + 1
            }
            return result
        }
        var next = (taken.compactMap(number).max() ?? 0) + 1
        var letters = ""
        while next > 0 {
            letters = String(UnicodeScalar(UInt8(ascii: "a") + UInt8((next - 1) % 26))) + letters
            next = (next - 1) / 26
        }
        guard letters.count <= 3 else { throw QuireError(.unsupported, "there is no free name for another virtio disk") }
        return "vd" + letters
    }

    // MARK: Away again

    /// The XML without what `enabled` added. Itself, if it never was. Throws where the note, which is anybody's who may edit the domain,
    /// has it put back what `enabled` never replaces.
    public func disabled() throws(QuireError) -> XMLText {
        guard let mark else { return xml }
        for (element, old) in mark.was.sorted(by: { $0.key < $1.key }) where old != Mark.former[element] || mark.added.contains(element) {
            throw QuireError(
                .invalid,
                "\(name): Quire's note in <metadata> is damaged: its was-\(element) is nothing that enable replaces; take was-\(element) out of it (virsh edit), and try again")
        }
        var edit = XMLEdit(xml)
        let root = xml.root

        func leave(_ container: XMLText.Element, _ key: String, _ ours: [XMLText.Element], _ edit: inout XMLEdit) {
            if edit.isEmpty(container, without: ours), mark.created.contains(key) {
                edit.remove(container)
            } else if edit.isEmpty(container, without: ours), mark.opened.contains(key) {
                edit.close(container)
            } else {
                for element in ours { edit.remove(element) }
            }
        }

        if let backing = root.first("memoryBacking") {
            let ours = [("source", "type", "memfd"), ("access", "mode", "shared")].compactMap { name, attribute, value in
                mark.added.contains(name) ? backing.first(name).flatMap { $0[attribute] == value ? $0 : nil } : nil
            }
            leave(backing, "memoryBacking", ours, &edit)
            for (name, attribute, value) in [("source", "type", "memfd"), ("access", "mode", "shared")] {
                let present = backing.first(name)?.attributes.first { $0.name == attribute }
                if let old = mark.was[name], let present, present.value == value { edit.setValue(of: present, old) }
            }
        }
        if let devices = root.first("devices") {
            let disks = devices.all("disk").filter(mark.owns)
            leave(devices, "devices", disks + idleControllers(mark, without: disks), &edit)
        }
        if let commandLine {
            let ours = variables.filter { variable in
                variable["name"] == "QUIRE_AGENT_SOCKET" && variable["value"] == mark.agentSocket
                    || variable["name"] == "LD_PRELOAD" && variable["value"] == mark.agent
            }
            leave(commandLine, "commandline", ours, &edit)
        }
        if let metadata = root.first("metadata"), let element = Mark.find(xml) { leave(metadata, "metadata", [element], &edit) }
        return try XMLText(edit.apply())
    }

    /// The PCI controllers that libvirt made for our disks and that nobody else has come to use.
    private func idleControllers(_ mark: Mark, without gone: [XMLText.Element]) -> [XMLText.Element] {
        guard let devices = xml.root.first("devices"), !mark.controllers.isEmpty else { return [] }
        let ranges = gone.map(\.range.lowerBound)
        let used = Set(
            devices.children.filter { !ranges.contains($0.range.lowerBound) }.compactMap { device -> Int? in
                guard let address = device.first("address"), address["type"] == "pci", let bus = address["bus"] else { return nil }
                return bus.hasPrefix("0x") ? Int(bus.dropFirst(2), radix: 16) : Int(bus)
            })
        return devices.all("controller").filter { controller in
            guard controller["type"] == "pci", let index = controller["index"].flatMap({ Int($0) }) else { return false }
            return mark.controllers.contains(index) && !used.contains(index)
        }
    }

    /// Indices of its PCI controllers.
    var pciControllers: Set<Int> {
        Set((xml.root.first("devices")?.all("controller") ?? []).filter { $0["type"] == "pci" }.compactMap { $0["index"].flatMap { Int($0) } })
    }

    /// The XML with the PCI controllers noted that libvirt has made for our disks; nil if there are none.
    package func noting(controllers: [Int]) throws(QuireError) -> XMLText? {
        guard var mark, !controllers.isEmpty else { return nil }
        mark.controllers = controllers
        return try replacingNote(by: mark)
    }

    private func replacingNote(by mark: Mark) throws(QuireError) -> XMLText {
        guard let element = Mark.find(xml) else { return xml }
        var bytes = xml.bytes
        bytes.replaceSubrange(element.range, with: Array(mark.element.utf8))
        return try XMLText(bytes)
    }
}
