import Host
import Platform

/// What `quire libvirt enable` notes in a domain's <metadata>: how its VM is to run, and everything that it has added, so that
/// `disable` removes that and nothing else. libvirt keeps metadata as it is.
///
///     <quire:vm xmlns:quire="urn:quire:libvirt:1" name="web1" uuid="…" sockets="/run/quire/web1/qemu" …/>
public struct Mark: Sendable, Equatable {
    public static let namespace = "urn:quire:libvirt:1"

    /// In `quire status`.
    public var name: String
    /// Of the domain when it was enabled: a copy of its XML under another UUID is seen by it. Empty if it had none.
    public var uuid = ""
    /// The folder with the sockets that QEMU connects to.
    public var sockets: String
    /// Nil: no agent, nothing is merged.
    public var agent: String?
    /// Bytes of the swap disk; nil without one.
    public var swapBytes: UInt64?
    /// The share group; empty: that of the backend's user.
    public var group = ""
    /// Milliseconds; nil: what the host's configuration says.
    public var period: UInt64?
    /// Disks of quired's that it shares with others. In a domain that runs, and so in its saved image, with the contents they had when
    /// it started: in a definition without.
    public var sharedDisks: [BackendService.Settings.Disk] = []

    /// Elements that were made to hold ours: metadata, memoryBacking, commandline.
    var created: Set<String> = []
    /// Those that were there as <name/>.
    var opened: Set<String> = []
    /// Of <memoryBacking>: source and access, where they are ours altogether.
    var added: Set<String> = []
    /// What their values were, where only those are ours: of `former` each.
    var was: [String: String] = [:]
    /// All that there is besides ours and what is refused.
    static let former = ["source": "anonymous", "access": "private"]
    /// PCI controllers that libvirt made for our disks, by index.
    var controllers: [Int] = []

    public init(name: String, sockets: String) {
        self.name = name
        self.sockets = sockets
    }

    public var controlSocket: String { sockets + "/control.sock" }
    public var agentSocket: String { sockets + "/agent.sock" }
    /// Of its disks, in their order.
    var diskSockets: [String] {
        [controlSocket] + (swapBytes == nil ? [] : [sockets + "/swap.sock"])
            + sharedDisks.indices.map { RuntimeDirectory.sharedSocket($0, in: sockets) }
    }

    /// Whether a <disk> is one of ours.
    package func owns(_ disk: XMLText.Element) -> Bool {
        disk["type"] == "vhostuser" && disk.first("source")?["path"].map(diskSockets.contains) == true
    }

    /// What of the guest's is in this host's memory and nowhere else, and how to do without it; nil: nothing.
    func whatStays(_ domain: String) -> (what: String, advice: String)? {
        let options = (swapBytes == nil ? [] : ["--no-swap"]) + sharedDisks.map { "--no-disk \($0.name)" }
        let again = "quire libvirt enable \(options.joined(separator: " ")) \(domain), and power-cycle it"
        if swapBytes != nil { return ("swap disk", "swapoff in the guest, \(again)") }
        if let first = sharedDisks.first { return ("shared disk '\(first.name)'", "umount it in the guest, \(again)") }
        return nil
    }

    // MARK: As XML

    static let prefix = "quire"

    var element: String { "<\(Self.prefix):vm xmlns:\(Self.prefix)=\"\(Self.namespace)\"\(attributes)/>" }
    /// As libvirt takes it where it gives it the namespace by itself.
    var plainElement: String { "<vm\(attributes)/>" }

    private var attributes: String {
        var text = ""
        func attribute(_ name: String, _ value: String) {
            if !value.isEmpty { text += " \(name)=\"\(XMLText.escaped(value))\"" }
        }
        attribute("name", name)
        attribute("uuid", uuid)
        attribute("sockets", sockets)
        attribute("agent", agent ?? "")
        attribute("swap", swapBytes.map { "\($0)" } ?? "")
        attribute("group", group)
        attribute("period-ms", period.map { "\($0)" } ?? "")
        attribute("disks", sharedDisks.map { disk in disk.name + (disk.byteCount.map { ":\($0)" } ?? "") }.joined(separator: " "))
        attribute("contents", sharedDisks.compactMap { disk in disk.content.map { "\(disk.name):\(String($0, radix: 16))" } }.joined(separator: " "))
        attribute("created", created.sorted().joined(separator: " "))
        attribute("opened", opened.sorted().joined(separator: " "))
        attribute("added", added.sorted().joined(separator: " "))
        attribute("was-source", was["source"] ?? "")
        attribute("was-access", was["access"] ?? "")
        attribute("controllers", controllers.map { "\($0)" }.joined(separator: " "))
        return text
    }

    static func find(_ xml: XMLText) -> XMLText.Element? {
        xml.root.first("metadata")?.all("vm", in: namespace).first
    }

    static func read(_ xml: XMLText) throws(QuireError) -> Mark? {
        guard let element = find(xml) else { return nil }
        func words(_ name: String) -> [String] { (element[name] ?? "").split(separator: " ").map(String.init) }
        guard let name = element["name"], RuntimeDirectory.isValidName(name), let sockets = element["sockets"], sockets.hasPrefix("/")
        else { throw QuireError(.invalid, "Quire's note in <metadata> is damaged (line \(element.line)): remove it and enable the domain again") }
        var mark = Mark(name: name, sockets: sockets)
        mark.uuid = element["uuid"] ?? ""
        mark.agent = element["agent"]
        if let text = element["swap"] {
            guard let bytes = UInt64(text), bytes > 0 else {
                throw QuireError(.invalid, "Quire's note in <metadata> is damaged (swap '\(text)'): remove it and enable the domain again")
            }
            mark.swapBytes = bytes
        }
        mark.group = element["group"] ?? ""
        mark.period = element["period-ms"].flatMap { UInt64($0) }
        for word in words("disks") {
            let parts = word.split(separator: ":", omittingEmptySubsequences: false).map(String.init)
            let bytes = parts.count == 2 ? UInt64(parts[1]) : nil
            guard PlainName.isValid(parts[0]), parts.count == 1 || bytes != nil else {
                throw QuireError(.invalid, "Quire's note in <metadata> is damaged (disks '\(word)'): remove it and enable the domain again")
            }
            mark.sharedDisks.append(.init(name: parts[0], byteCount: bytes))
        }
        for word in words("contents") {
            let parts = word.split(separator: ":").map(String.init)
            guard parts.count == 2, let id = UInt64(parts[1], radix: 16), let index = mark.sharedDisks.firstIndex(where: { $0.name == parts[0] })
            else { throw QuireError(.invalid, "Quire's note in <metadata> is damaged (contents '\(word)'): remove it and enable the domain again") }
            mark.sharedDisks[index].content = id
        }
        mark.created = Set(words("created"))
        mark.opened = Set(words("opened"))
        mark.added = Set(words("added"))
        if let value = element["was-source"] { mark.was["source"] = value }
        if let value = element["was-access"] { mark.was["access"] = value }
        mark.controllers = words("controllers").compactMap { Int($0) }
        return mark
    }

    /// It, with what was added for another one.
    func withAdditions(of other: Mark) -> Mark {
        var copy = self
        (copy.created, copy.opened, copy.added, copy.was, copy.controllers) = (other.created, other.opened, other.added, other.was, other.controllers)
        return copy
    }

    /// Whether both ask for the same, whatever was added for it.
    func asksForTheSame(as other: Mark) -> Bool {
        var copy = withAdditions(of: other), other = other
        for index in copy.sharedDisks.indices { copy.sharedDisks[index].content = nil }
        for index in other.sharedDisks.indices { other.sharedDisks[index].content = nil }
        return copy == other
    }
}
