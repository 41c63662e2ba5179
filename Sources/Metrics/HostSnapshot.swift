import Host
import Platform
import StoreProtocol

/// A running VM: what it says of itself, and whose it is.
public struct VM: Sendable, Equatable, Identifiable {
    /// Names are unique among one user's VMs.
    public struct ID: Hashable, Sendable {
        public let uid: UInt32
        public let name: String
        public init(uid: UInt32, name: String) {
            self.uid = uid
            self.name = name
        }
    }

    /// Of the user who owns the runtime directory that it was found in.
    public let uid: UInt32
    public let report: StatusReport

    public init(uid: UInt32, report: StatusReport) {
        self.uid = uid
        self.report = report
    }

    public var id: ID { ID(uid: uid, name: report.name) }
    /// Whether a backend has ever reported, so that the numbers mean something.
    public var hasNumbers: Bool { report.pid != 0 }
    /// What the host has back: recycled, and kept once.
    public var savedBytes: UInt64 { report.recycledBytes &+ report.merging.savedBytes }
    /// Bytes a second that are recycled and merged.
    public var savedBytesPerSecond: Double {
        (report.recycledPagesPerSecond + report.merging.mergedPagesPerSecond) * 4096
    }
    public var picture: Picture { Picture(report) }
}

/// Guest RAM in parts that do not overlap, in bytes. Without tmem their sum is the guest's RAM, give or take pages that changed from
/// one part into another while they were counted.
public struct Picture: Sendable, Equatable, Encodable {
    /// The host has memory for it that is this VM's alone.
    public var privateBytes: UInt64 = 0
    /// Mapped to a page of the store. What of it and of the next was written since has a copy, which goes back soon.
    public var sharedBytes: UInt64 = 0
    public var zeroBytes: UInt64 = 0
    public var recycledBytes: UInt64 = 0
    /// The rest: what the guest has never touched.
    public var untouchedBytes: UInt64 = 0
    /// Beside guest RAM: what the host keeps for the guest in transcendent memory, tables included.
    public var tmemBytes: UInt64 = 0

    public init() {}

    public init(_ report: StatusReport) {
        privateBytes = report.residentBytes
        sharedBytes = report.merging.sharingPages &* 4096
        zeroBytes = report.merging.zeroPages &* 4096
        tmemBytes = report.tmem.usedBytes
        let used = privateBytes &+ sharedBytes &+ zeroBytes
        let rest = report.ramBytes > used ? report.ramBytes - used : 0
        // As the last pass over the guest's table has it: what the guest took since then is private already.
        recycledBytes = min(report.recycledBytes, rest)
        untouchedBytes = rest - recycledBytes
    }

    static func + (a: Picture, b: Picture) -> Picture {
        var sum = a
        sum.privateBytes &+= b.privateBytes
        sum.sharedBytes &+= b.sharedBytes
        sum.zeroBytes &+= b.zeroBytes
        sum.recycledBytes &+= b.recycledBytes
        sum.untouchedBytes &+= b.untouchedBytes
        sum.tmemBytes &+= b.tmemBytes
        return sum
    }

    enum CodingKeys: String, CodingKey {
        case privateBytes = "private_bytes"
        case sharedBytes = "shared_bytes"
        case zeroBytes = "zero_bytes"
        case recycledBytes = "recycled_bytes"
        case untouchedBytes = "untouched_bytes"
        case tmemBytes = "tmem_bytes"
    }
}

/// Where VMs are looked for.
public struct RuntimeDirectories: Sendable {
    private let bases: [String]
    /// Also in `quire` of every folder here: XDG_RUNTIME_DIR of all users.
    private let users: String?
    /// Of one folder: a user can make as many as the file system takes. As many of one who is not root as quired takes.
    private static func mostVMs(of uid: UInt32) -> Int { uid == 0 || uid == ProcessCalls.ownUID ? 4096 : 256 }

    public init(_ bases: [String], users: String? = nil) {
        self.bases = bases
        self.users = users
    }

    /// Those of everybody for root and who reads as it does, one's own for others; $QUIRE_RUNTIME_DIR alone where that is set.
    public static func standard() throws(QuireError) -> RuntimeDirectories {
        let readsEverything = ProcessCalls.readsEverything
        let own = try RuntimeDirectory.standard(isRoot: readsEverything).base
        let isEverybody = readsEverything && ProcessCalls.environment("QUIRE_RUNTIME_DIR") == nil
        return RuntimeDirectories([own], users: isEverybody ? "/run/user" : nil)
    }

    /// The running VMs by name, and how many directories are there but cannot be read.
    public func read() -> (vms: [VM], unreadable: Int) {
        var found: [VM.ID: VM] = [:]
        var unreadable = 0
        let perUser = users.map { users in (Files.list(users) ?? []).map { "\(users)/\($0)/quire" } } ?? []
        for base in bases + perUser {
            let folder: Descriptor
            do throws(QuireError) { folder = try Descriptor.open(base, Self.folderFlags) } catch {
                if error.errno != Self.missing { unreadable += 1 }
                continue
            }
            guard let uid = (try? folder.status())?.uid, Files.list(base) != nil else {
                unreadable += 1
                continue
            }
            let directory = RuntimeDirectory(base: base)
            let names = directory.running().prefix(Self.mostVMs(of: uid)).filter { found[VM.ID(uid: uid, name: $0)] == nil }
            for report in StatusReport.read(names, in: directory) {
                found[VM.ID(uid: uid, name: report.name)] = VM(uid: uid, report: report)
            }
        }
        return (found.values.sorted { ($0.report.name, $0.uid) < ($1.report.name, $1.uid) }, unreadable)
    }
}

/// What the host's VMs and its page store say at one moment.
public struct HostSnapshot: Sendable {
    /// Since 1970.
    public var unixMilliseconds: Int64 = 0
    public var vms: [VM] = []
    public var unreadableDirectories = 0
    /// Of the host, from /proc/meminfo.
    public var memoryBytes: UInt64 = 0
    public var availableBytes: UInt64 = 0
    /// Nil where quired does not say; then `storeTrouble` is why.
    public var store: StoreFigures?
    public var groups: [GroupFigures] = []
    /// Of all stores of transcendent memory; nil where quired does not say.
    public var tmem: StoreReply.TmemAllowed?
    /// quired's disks that VMs share.
    public var sharedDisks: [SharedDiskReport] = []
    public var storeTrouble = ""
    /// How long all this took to read.
    public var seconds: Double = 0

    public init() {}

    public var picture: Picture { vms.reduce(Picture()) { $0 + $1.picture } }

    /// The VMs alone.
    public static func read(_ directories: RuntimeDirectories) -> HostSnapshot {
        var snapshot = HostSnapshot()
        snapshot.unixMilliseconds = currentUnixMilliseconds()
        (snapshot.vms, snapshot.unreadableDirectories) = directories.read()
        if let memory = HostMemory() { (snapshot.memoryBytes, snapshot.availableBytes) = (memory.totalBytes, memory.availableBytes) }
        return snapshot
    }

    /// The VMs, and what quired says.
    public static func read(_ directories: RuntimeDirectories, store: inout StoreObserver) -> HostSnapshot {
        let started = monotonicNanoseconds()
        var snapshot = read(directories)
        do throws(QuireError) {
            snapshot.store = try store.figures()
            snapshot.groups = try store.groups()
            snapshot.sharedDisks = try SharedDiskReport.collect(at: SharedDiskClient.path(besideStore: store.path))
            // An older quired knows nothing of it.
            snapshot.tmem = try? store.tmem()
        } catch { snapshot.storeTrouble = error.description }
        snapshot.seconds = Double(monotonicNanoseconds() - started) / 1e9
        return snapshot
    }
}
