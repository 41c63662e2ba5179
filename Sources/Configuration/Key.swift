import Platform

/// One thing that can be configured. Its name is that of the option on the command line.
public struct Key<Value: Sendable>: Sendable {
    public let name: String
    public let form: Form<Value>
    /// What holds without a word anywhere; nil: nothing, or what `otherwise` says.
    public let builtIn: Value?
    let otherwise: String
    /// For the file's template, where there is no default to show.
    private let example: Value
    /// One line: what for.
    public let summary: String
    /// A reload changes it; otherwise it waits for the next start of what it is for.
    public let isLive: Bool

    init(_ name: String, _ form: Form<Value>, _ builtIn: Value, isLive: Bool = false, _ summary: String) {
        self.name = name
        self.form = form
        self.builtIn = builtIn
        otherwise = form.write(builtIn)
        example = builtIn
        self.summary = summary
        self.isLive = isLive
    }

    init(_ name: String, _ form: Form<Value>, otherwise: String, example: Value, isLive: Bool = false, _ summary: String) {
        self.name = name
        self.form = form
        builtIn = nil
        self.otherwise = otherwise
        self.example = example
        self.summary = summary
        self.isLive = isLive
    }

    /// For an option's `transform`, which says by itself what was given: the same text, if it is allowed.
    public func argument(_ text: String) throws(QuireError) -> String {
        guard form.read(.argument(text)) != nil else { throw QuireError(.invalid, "give \(form.allowed)") }
        return text
    }
}

/// A key of any type, for those who go through all of them.
public protocol AnyKey: Sendable {
    var name: String { get }
    var summary: String { get }
    var isLive: Bool { get }
    var allowed: String { get }
    /// The default as TOML, or in words.
    var otherwiseText: String { get }
    var hasBuiltIn: Bool { get }
    /// As TOML: the default, or an example.
    var exampleText: String { get }
    /// A value as TOML, in one way however it was written; nil if it is not allowed.
    func normalized(_ raw: RawValue) -> String?
}

extension Key: AnyKey {
    public var allowed: String { form.allowed }
    public var otherwiseText: String { otherwise }
    public var hasBuiltIn: Bool { builtIn != nil }
    public var exampleText: String { form.write(example) }
    public func normalized(_ raw: RawValue) -> String? { form.read(raw).map(form.write) }
}

/// Everything that can be configured.
public enum Keys {
    public enum Quired {
        public static let limit = Key(
            "limit", .size(4096...(1 << 43) - (1 << 30)), otherwise: "half of the host's memory", example: 16 << 30, isLive: true,
            "The most memory that shared pages may take. What is shared already stays, also above it.")
        public static let reserve = Key("reserve", .number(0...100_000), 100, isLive: true,
            "Merge nothing more while the host has less memory left than so many percent of what merged pages would need if all guests wrote them at once.")
        public static let tmemReserve = Key("tmem-reserve", .size(0...1 << 43), HostReserve.usualBytes, isLive: true,
            "Put nothing more on shared disks while the host has less memory left than this, free swap included: writes are I/O errors then. 0: never.")
        public static let tmemCap = Key(
            "tmem-cap", .size(4096...1 << 43), otherwise: "no limit", example: 16 << 30, isLive: true,
            "The most memory that swap disks of VMs and shared disks may use together. Writes above it are I/O errors; what is there stays.")
        public static let candidates = Key(
            "candidates", .size(4096...1 << 40), otherwise: "3/4096 of the host's memory", example: 32 << 20, isLive: true,
            "Memory for contents that were seen once.")
        public static let group = Key("group", ShareGroup.form.repeated("a list of \"NAME=UID,UID\""), otherwise: "[]",
            example: [ShareGroup(name: "lab", users: [1000, 1001])], isLive: true,
            "Share groups besides the one that each user has, and the users whose VMs may be in them.")
        public static let sharedDisk = Key(
            "shared-disk", DiskSetting.made.repeated("a list of \"NAME,size=SIZE\" or \"NAME,size=SIZE,group=GROUP\", with sizes from 1M to 1023G"),
            otherwise: "[]", example: [DiskSetting("scratch,size=1G,group=lab", keys: ["size", "group"])!], isLive: true,
            "Disks in memory that VMs of a share group attach; of quired's user's VMs without a group. What is there stays as it is.")
        public static let workers = Key(
            "workers", .number(1...64), otherwise: "one a processor, at most 4", example: 4, isLive: true, "Threads that answer.")
        public static let logLevel = Key("log-level", .logLevel, "notice", isLive: true, "How much is logged.")
        public static let all: [any AnyKey] = [limit, reserve, tmemReserve, tmemCap, candidates, group, sharedDisk, workers, logLevel]
    }

    /// Of a VM.
    public enum Backend {
        private static let times: ClosedRange<UInt64> = 100...3_600_000
        public static let period = Key("period", .time(times), 10_000, isLive: true,
            "How long a page has to be free before the host takes it. Less: memory goes back sooner, more CPU.")
        public static let workers = Key(
            "workers", .number(1...16), 1, isLive: true, "Threads that recycle: more for guests of hundreds of GiB.")
        public static let merge = Key("merge", .flag, true, isLive: true,
            "Whether equal pages are kept once. False gives a running VM copies of all its pages, which takes memory.")
        public static let mergePeriod = Key("merge-period", .time(times), 10_000, isLive: true,
            "A page is merged with its equals when it was not written for two of these. Less: more is found, more CPU.")
        public static let mergeWorkers = Key("merge-workers", .number(1...16), 1, isLive: true, "Threads that look for equal pages.")
        public static let writeTracking = Key("write-tracking", .flag, true, isLive: true,
            "Ask the kernel what the guest writes. False reads all of memory instead, as on a kernel before Linux 6.7.")
        public static let group = Key(
            "group", .group, "", isLive: true,
            "Share equal pages with VMs of this group; without one, with those of the same user. A VM that shares pages goes there when it is un-merged.")
        public static let store = Key(
            "store", .path, otherwise: "/run/quired/store.sock, or in $XDG_RUNTIME_DIR", example: "/run/quired/store.sock",
            isLive: true, "quired's socket. A VM that shares pages goes there when it is un-merged.")
        public static let swap = Key(
            "swap", .size(1 << 20...1 << 43, multipleOf: 4096), otherwise: "no swap disk", example: 4 << 30,
            "Size of a disk to swap to, kept in the host's memory. For quire run: libvirt's domains have it in their definition.")
        public static let swapOvercommit = Key(
            "swap-overcommit", .factor(1...100), otherwise: "the disk's own size is the limit", example: 1.5, isLive: true,
            "The host's memory for the swap disk is its size divided by this; when that is full, the guest gets I/O errors.")
        public static let swapCompression = Key("swap-compression", .compression, "lz4", isLive: true,
            "How swapped pages are compressed; what is there already stays as it is.")
        public static let tmemReserve = Key("tmem-reserve", .size(0...1 << 43), HostReserve.usualBytes, isLive: true,
            "Put nothing more on the swap disk while the host has less memory left than this, free swap included: writes are I/O errors then. 0: never.")
        public static let swapQueues = Key("swap-queues", .number(1...16), 1, "Queues of the swap disk. For quire run.")
        public static let sharedDisk = Key(
            "shared-disk", DiskSetting.attached.repeated("a list of \"NAME\" or \"NAME,size=SIZE\""), otherwise: "[]",
            example: [DiskSetting("scratch", keys: [])!], "Disks to attach that VMs of the group share. For quire run.")
        public static let logLevel = Key("log-level", .logLevel, "notice", isLive: true, "How much the backend logs.")
        public static let all: [any AnyKey] = [
            period, merge, mergePeriod, workers, mergeWorkers, writeTracking, group, store, swap, swapOvercommit, swapCompression,
            tmemReserve, swapQueues, sharedDisk, logLevel,
        ]
    }

    public enum Exporter {
        private static let times: ClosedRange<UInt64> = 100...600_000
        public static let http = Key(
            "http", .text("ADDRESS:PORT, such as 127.0.0.1:9750, or off") { $0 == "off" || $0.contains(":") },
            "127.0.0.1:9750", isLive: true, "Address and port to listen on. Any other than loopback needs a token.")
        public static let httpSocket = Key(
            "http-socket", .text("a path that begins with /, or off") { $0 == "off" || $0.hasPrefix("/") },
            otherwise: "metrics.sock in the service's directory", example: "off", isLive: true, "Unix socket to listen on as well.")
        public static let httpTokenFile = Key("http-token-file", .path, otherwise: "no token", example: "/etc/quire/token", isLive: true,
            "A file with a token of 16 bytes or more, which everybody on the TCP port has to send.")
        public static let httpHost = Key(
            "http-host", Form<String>.text("a host's name") { !$0.isEmpty }.repeated("a list of hosts' names"),
            otherwise: "[]", example: ["metrics.example.net"], isLive: true, "Names by which browsers and programs reach the server.")
        public static let httpTimeout = Key(
            "http-timeout", .time(times), 30_000, isLive: true, "How long a request may take to arrive, and its answer to be taken.")
        public static let historyInterval = Key("history-interval", .time(times), 15_000, isLive: true,
            "Time between the pictures that are kept, 60 of them; each costs what a scrape does.")
        public static let store = Key(
            "store", .path, otherwise: "/run/quired/store.sock, or in $XDG_RUNTIME_DIR", example: "/run/quired/store.sock", isLive: true,
            "quired's socket.")
        public static let runtimeDirectory = Key(
            "runtime-directory", Form<String>.path.repeated("a list of paths that begin with /"),
            otherwise: "those of all users for root, one's own otherwise", example: ["/run/quire"], isLive: true,
            "Look for VMs in these only.")
        public static let all: [any AnyKey] = [
            http, httpSocket, httpTokenFile, httpHost, httpTimeout, historyInterval, store, runtimeDirectory,
        ]
    }
}

/// What a set of keys is for, and where in the file its values come from.
public enum Scope: Sendable, Equatable {
    case quired, exporter
    /// Defaults of all VMs.
    case backend
    case vm(String)

    public var keys: [any AnyKey] {
        switch self {
        case .quired: Keys.Quired.all
        case .exporter: Keys.Exporter.all
        case .backend, .vm: Keys.Backend.all
        }
    }

    /// Sections of the file; the first that has a key has the say.
    var sections: [DottedPath] {
        switch self {
        case .quired: [["quired"]]
        case .exporter: [["exporter"]]
        case .backend: [["backend"]]
        case .vm(let name): [["vm", name], ["backend"]]
        }
    }
}

/// A key's way from the root of the file.
struct DottedPath: Hashable, Sendable, ExpressibleByArrayLiteral, CustomStringConvertible {
    var parts: [String]
    init(_ parts: [String]) { self.parts = parts }
    init(arrayLiteral parts: String...) { self.parts = parts }

    func appending(_ part: String) -> DottedPath { DottedPath(parts + [part]) }

    /// As it would be written: `vm.web1.period`, `vm."a.b".period`.
    var description: String {
        parts.map { part in
            let isBare =
                !part.isEmpty && part.utf8.allSatisfy { PlainName.isValid("x\(UnicodeScalar($0))") && $0 != UInt8(ascii: ".") }
            return isBare ? part : RawValue.quoted(part)
        }.joined(separator: ".")
    }
}
