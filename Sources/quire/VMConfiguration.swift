import ArgumentParser
import Configuration
import Host
import Platform
import StoreProtocol
import Synchronization

struct ConfigurationOption: ParsableArguments {
    @Option(help: ArgumentHelp("The configuration (default: /etc/quire/quire.toml, or in etc of where quire is installed).", valueName: "file"))
    var config: String?
}

/// What a VM is to run with: its command line, its section of the configuration, that of all VMs.
struct VMConfiguration: Sendable {
    let name: String
    /// Nil: where it is by default.
    let file: String?
    let arguments: [String: RawValue]
    /// libvirt starts its QEMU: what that is made of stands in the domain's definition.
    var isService = false

    func resolve() throws(QuireError) -> Resolution { try ConfigurationFile.read(file).resolve(.vm(name), arguments) }

    /// `agent`: nil, and nothing is merged as long as QEMU runs.
    func apply(_ settings: Resolution, agent: String?, to configuration: inout Supervisor.Configuration) throws(QuireError) {
        configuration.periodMilliseconds = settings.value(Keys.Backend.period)
        configuration.workers = settings.value(Keys.Backend.workers)
        configuration.logLevel = settings.value(Keys.Backend.logLevel)
        configuration.store = settings[Keys.Backend.store]
        if let bytes = settings[Keys.Backend.swap] ?? (isService ? 0 : nil) {
            var swap = SwapDisk.Options(byteCount: bytes)
            // Queues of a domain's disk are in its definition.
            swap.queueCount = isService ? 1 : settings.value(Keys.Backend.swapQueues)
            swap.compression = try SwapDisk.compression(settings.value(Keys.Backend.swapCompression))
            swap.overcommit = settings[Keys.Backend.swapOvercommit]
            swap.reserve = settings.value(Keys.Backend.tmemReserve)
            configuration.swap = swap
        }
        // A domain has those that its definition names.
        if !isService || arguments[Keys.Backend.sharedDisk.name] != nil { configuration.sharedDisks = try sharedDisks(settings) }
        if let agent {
            var merging = Supervisor.Configuration.Merging(agentPath: agent)
            merging.periodMilliseconds = settings.value(Keys.Backend.mergePeriod)
            merging.workers = settings.value(Keys.Backend.mergeWorkers)
            merging.group = settings.value(Keys.Backend.group)
            merging.tracksWrites = settings.value(Keys.Backend.writeTracking)
            merging.isOn = settings.value(Keys.Backend.merge)
            configuration.merging = merging
        }
        let current = Mutex(settings)
        let hasAgent = agent != nil
        configuration.reload = { () throws(QuireError) -> Reloaded in
            try current.withLock { (current) throws(QuireError) -> Reloaded in
                let new = try resolve()
                let lines = new.changes(since: current).map { change in
                    switch change.key.name {
                    case Keys.Backend.group.name, Keys.Backend.store.name:
                        change.line(from: hasAgent ? "as soon as it shares nothing where it is (\(StoreLink.waysToMove(name)))" : nil)
                    case Keys.Backend.merge.name where !hasAgent: change.line(waits: true)
                    default: change.line
                    }
                }
                current = new
                var tuning = Tuning(
                    periodMilliseconds: new.value(Keys.Backend.period), mergePeriodMilliseconds: new.value(Keys.Backend.mergePeriod),
                    merges: hasAgent ? new.value(Keys.Backend.merge) : nil)
                tuning.workers = new.value(Keys.Backend.workers)
                tuning.mergeWorkers = new.value(Keys.Backend.mergeWorkers)
                tuning.tracksWrites = new.value(Keys.Backend.writeTracking)
                tuning.logLevel = new.value(Keys.Backend.logLevel)
                tuning.setPlace(store: new[Keys.Backend.store], group: new.value(Keys.Backend.group))
                tuning.swap = Tuning.Swap(
                    compression: try SwapDisk.compression(new.value(Keys.Backend.swapCompression)), overcommit: new[Keys.Backend.swapOvercommit] ?? 1,
                    reserve: new.value(Keys.Backend.tmemReserve))
                return Reloaded(tuning: tuning, lines: lines)
            }
        }
    }

    private func sharedDisks(_ settings: Resolution) throws(QuireError) -> [SharedDisk.Options] {
        var disks: [SharedDisk.Options] = []
        for disk in settings[Keys.Backend.sharedDisk] ?? [] {
            guard !disks.contains(where: { $0.name == disk.name }) else {
                throw QuireError(.invalid, "--shared-disk \(disk.name) is given twice")
            }
            var options = SharedDisk.Options(
                name: disk.name, path: SharedDiskClient.path(besideStore: settings[Keys.Backend.store] ?? StoreLink.standardPath()))
            options.group = settings.value(Keys.Backend.group)
            options.expectedBytes = disk.byteCount
            options.known = disk.content.flatMap { SharedDisk.Known($0) } ?? .nothing
            disks.append(options)
        }
        return disks
    }
}
