import Configuration
import Glibc
import Host
import Logging
import PageStore
import Platform
import Synchronization

/// What quired is to do, from its configuration and its command line.
struct Settings: Sendable {
    let resolution: Resolution
    private let file: ConfigurationFile
    /// Why the file does not hold but what an earlier quired had read.
    private(set) var trouble: QuireError?

    private init(_ file: ConfigurationFile, _ arguments: [String: RawValue]) throws(QuireError) {
        try file.check()
        resolution = try file.resolve(.quired, arguments)
        self.file = file
    }

    /// What file and command line say now.
    static func read(_ config: String?, _ arguments: [String: RawValue]) throws(QuireError) -> Settings {
        try Settings(ConfigurationFile.read(config, reader: Observers.owner), arguments)
    }

    /// For a quired that starts. With a keeper, a file that is broken, or that asks for what cannot be, does not keep it from taking the
    /// place of one that died: guests have its memory mapped, and what held before is parked.
    static func begin(_ config: String?, _ arguments: [String: RawValue], keeper: KeeperLink?) throws(QuireError) -> Settings {
        let earlier = keeper.flatMap { parked($0, config, arguments) }
        do throws(QuireError) {
            let new = try read(config, arguments)
            try new.check(after: earlier) { name in keeper.map { SharedDisks.isParked(name, $0) } ?? true }
            // Kept or not, quired works; without it only a broken file after a death would matter.
            try? new.park(keeper)
            return new
        } catch {
            guard var earlier else { throw error }
            earlier.trouble = error
            return earlier
        }
    }

    private static let item = "configuration"

    private static func parked(_ keeper: KeeperLink, _ config: String?, _ arguments: [String: RawValue]) -> Settings? {
        guard let memory = keeper.takeParked(item), let bytes = try? memory.readBytes(at: 0, count: Int(memory.status().byteCount))
        else { return nil }
        let file = ConfigurationFile(path: config ?? ConfigurationFile.standardPath, text: String(decoding: bytes, as: UTF8.self))
        return try? Settings(file, arguments)
    }

    /// Throws why no quired could work with these. `earlier`: what one has worked with whose disks are kept. `isMade`: whether there is
    /// one of these already: it may have been asked for, and not been had.
    func check(after earlier: Settings?, isMade: (String) -> Bool = { _ in true }) throws(QuireError) {
        let made = (earlier?.disks ?? []).filter { isMade($0.name) }
        try SharedDisks.check(disks, earlier: made) { PageStore.knows(group: $0, among: groups) }
        if earlier != nil, disks.contains(where: { disk in !made.contains { $0.name == disk.name } }) { try SharedDisks.checkRoom() }
        // Nothing is taken yet. What is out of all proportion the host may refuse.
        if candidateBytes != earlier?.candidateBytes { _ = try Candidates(byteCount: candidateBytes) }
    }

    /// What a quired that works cannot take over from `earlier` ones, and another one in its place can.
    func needsReplacement(after earlier: Settings) -> Bool {
        candidateBytes != earlier.candidateBytes || workers != earlier.workers || disks != earlier.disks
    }
    static let replacing: Set<String> = [Keys.Quired.candidates.name, Keys.Quired.workers.name, Keys.Quired.sharedDisk.name]

    /// For a successor.
    func park(_ keeper: KeeperLink?) throws(QuireError) {
        guard let keeper else { return }
        // A file of nothing, or none, is one to fall back to as well.
        let bytes = Array((file.text.isEmpty ? "\n" : file.text).utf8)
        let memory = try Memfd(name: "quired-configuration", byteCount: UInt64(bytes.count))
        try memory.descriptor.writeBytes(at: 0, bytes)
        try keeper.park(Self.item, [memory.descriptor.raw])
    }

    var limitPages: Int { Int(resolution[Keys.Quired.limit] ?? UInt64(ProcessCalls.memoryBytes / 2)) / 4096 }
    var reservePercent: Int { resolution.value(Keys.Quired.reserve) }
    var tmemReserve: UInt64 { resolution.value(Keys.Quired.tmemReserve) }
    /// Nil: no limit.
    var tmemCap: UInt64? { resolution[Keys.Quired.tmemCap] }
    var workers: Int { resolution[Keys.Quired.workers] ?? min(4, ProcessCalls.processorCount) }
    var candidateBytes: Int { resolution[Keys.Quired.candidates].map { Int($0) } ?? PageStore.Configuration.usualCandidateBytes }
    var logLevel: Logger.Level { Logger.Level(rawValue: resolution.value(Keys.Quired.logLevel)) ?? .notice }

    func store() throws(QuireError) -> PageStore.Configuration {
        var configuration = try PageStore.Configuration(limitPages: limitPages, candidateBytes: candidateBytes)
        configuration.reservePercent = reservePercent
        configuration.groups = groups
        return configuration
    }

    var groups: [String: Set<UInt32>] {
        Dictionary((resolution[Keys.Quired.group] ?? []).map { ($0.name, Set($0.users)) }) { _, last in last }
    }

    var disks: [SharedDisks.Disk] {
        (resolution[Keys.Quired.sharedDisk] ?? []).map { disk in
            SharedDisks.Disk(
                name: disk.name, byteCount: disk.byteCount ?? 0,
                group: disk.group.isEmpty ? PageStore.ownGroup(Observers.owner) : disk.group)
        }
    }
}

/// Reads the configuration again while quired works, and applies it: what it cannot take over itself, another process in its place does,
/// where there is a keeper.
final class Reloading: Sendable {
    /// Readable once this process is to give way to another one.
    let replacement: EventDescriptor
    private let current: Mutex<Settings>
    private let config: String?
    private let arguments: [String: RawValue]
    private let store: PageStore
    private let disks: SharedDisks
    private let tmem: TmemLedger
    private let keeper: KeeperLink?
    private let logger: Logger

    init(
        _ settings: Settings, _ config: String?, _ arguments: [String: RawValue], store: PageStore, disks: SharedDisks, tmem: TmemLedger,
        keeper: KeeperLink?, logger: Logger
    ) throws(QuireError) {
        replacement = try EventDescriptor()
        current = Mutex(settings)
        self.config = config
        self.arguments = arguments
        self.store = store
        self.disks = disks
        self.tmem = tmem
        self.keeper = keeper
        self.logger = logger
    }

    /// What changed, a line each; the log has them, too. If the file is broken, or the next quired could not work with it, all stays as it
    /// was.
    func reload() throws(QuireError) -> [String] {
        try current.withLock { (current) throws(QuireError) -> [String] in
            let isKept = keeper != nil
            let new: Settings
            do throws(QuireError) {
                new = try Settings.read(config, arguments)
                try new.check(after: isKept ? current : nil)
                try new.park(keeper)
            } catch {
                logger.error("the configuration is not reloaded: \(error)")
                throw error
            }
            let lines = new.resolution.changes(since: current.resolution).map { change in
                change.line(waits: !change.key.isLive || !isKept && Settings.replacing.contains(change.key.name))
            }
            if new.limitPages != current.limitPages { store.setLimit(pages: new.limitPages) }
            if new.reservePercent != current.reservePercent { store.setReserve(percent: new.reservePercent) }
            if new.tmemReserve != current.tmemReserve { disks.setReserve(new.tmemReserve) }
            if new.tmemCap != current.tmemCap { tmem.setCap(new.tmemCap) }
            store.setGroups(new.groups)
            var shared = logger
            shared.logLevel = new.logLevel
            if isKept, new.needsReplacement(after: current) { replacement.signal() }
            current = new
            for line in lines { logger.notice("\(line)") }
            return lines
        }
    }
}
