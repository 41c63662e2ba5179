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

    /// With a keeper, a file that is broken does not keep quired from starting again in the place of one that died: guests have it
    /// mapped, and what held before is parked.
    init(_ config: String?, _ arguments: [String: RawValue], keeper: KeeperLink? = nil) throws(QuireError) {
        do throws(QuireError) { file = try ConfigurationFile.read(config) } catch {
            guard let parked = keeper?.takeParked(Self.item),
                let bytes = try? parked.readBytes(at: 0, count: Int(parked.status().byteCount))
            else { throw error }
            file = ConfigurationFile(path: config ?? ConfigurationFile.standardPath, text: String(decoding: bytes, as: UTF8.self))
            trouble = error
        }
        try file.check()
        resolution = try file.resolve(.quired, arguments)
        // Kept or not, quired works; without it only a broken file after a death would matter.
        if trouble == nil { try? park(keeper) }
    }

    private static let item = "configuration"

    /// For a successor.
    func park(_ keeper: KeeperLink?) throws(QuireError) {
        guard let keeper else { return }
        let bytes = Array(file.text.utf8)
        guard !bytes.isEmpty else { return keeper.unpark(Self.item) }
        let memory = try Memfd(name: "quired-configuration", byteCount: UInt64(bytes.count))
        try memory.descriptor.writeBytes(at: 0, bytes)
        try keeper.park(Self.item, [memory.descriptor.raw])
    }

    var limitPages: Int { Int(resolution[Keys.Quired.limit] ?? UInt64(ProcessCalls.memoryBytes / 2)) / 4096 }
    var reservePercent: Int { resolution.value(Keys.Quired.reserve) }
    var workers: Int { resolution[Keys.Quired.workers] ?? min(4, ProcessCalls.processorCount) }
    var logLevel: Logger.Level { Logger.Level(rawValue: resolution.value(Keys.Quired.logLevel)) ?? .notice }

    func store() throws(QuireError) -> PageStore.Configuration {
        var configuration = try PageStore.Configuration(
            limitPages: limitPages, candidateBytes: resolution[Keys.Quired.candidates].map { Int($0) } ?? PageStore.Configuration.usualCandidateBytes)
        configuration.reservePercent = reservePercent
        configuration.groups = groups
        return configuration
    }

    var groups: [String: Set<UInt32>] {
        Dictionary((resolution[Keys.Quired.group] ?? []).map { ($0.name, Set($0.users)) }) { _, last in last }
    }

    func disks() throws(QuireError) -> [SharedDisks.Disk] {
        (resolution[Keys.Quired.sharedDisk] ?? []).map { disk in
            SharedDisks.Disk(
                name: disk.name, byteCount: disk.byteCount ?? 0,
                group: disk.group.isEmpty ? PageStore.ownGroup(ProcessCalls.ownUID) : disk.group)
        }
    }
}

/// Reads the configuration again while quired works, and applies what can change.
final class Reloading: Sendable {
    private let current: Mutex<Settings>
    private let config: String?
    private let arguments: [String: RawValue]
    private let store: PageStore
    private let keeper: KeeperLink?
    private let logger: Logger

    init(
        _ settings: Settings, _ config: String?, _ arguments: [String: RawValue], store: PageStore, keeper: KeeperLink?, logger: Logger
    ) {
        current = Mutex(settings)
        self.config = config
        self.arguments = arguments
        self.store = store
        self.keeper = keeper
        self.logger = logger
    }

    /// What changed, a line each; the log has them, too. If the file is broken all stays as it was.
    func reload() throws(QuireError) -> [String] {
        try current.withLock { (current) throws(QuireError) -> [String] in
            let new: Settings
            do throws(QuireError) {
                new = try Settings(config, arguments)
                try new.park(keeper)
            } catch {
                logger.error("the configuration is not reloaded: \(error)")
                throw error
            }
            let lines = new.resolution.changes(since: current.resolution).map(\.line)
            if new.limitPages != current.limitPages { store.setLimit(pages: new.limitPages) }
            if new.reservePercent != current.reservePercent { store.setReserve(percent: new.reservePercent) }
            store.setGroups(new.groups)
            var shared = logger
            shared.logLevel = new.logLevel
            current = new
            for line in lines { logger.notice("\(line)") }
            return lines
        }
    }
}
