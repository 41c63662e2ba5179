import Host
import StoreProtocol

/// The text format of Prometheus (exposition format 0.0.4). Names follow node_exporter's ksmd collector (pages) and
/// libvirt_exporter (one label a VM, base units); docs/metrics.md says what each one means.
public enum Exposition {
    /// A number, as exact as it is known.
    enum Figure: Sendable {
        case whole(UInt64)
        case real(Double)
        case flag(Bool)

        var text: String {
            switch self {
            case .whole(let value): "\(value)"
            case .real(let value): "\(value)"
            case .flag(let value): value ? "1" : "0"
            }
        }
    }

    /// One metric: its name, what it means, and its value for one thing of a kind; nil where there is none.
    struct Family<Thing>: Sendable {
        enum Kind: String { case gauge, counter }
        let name: String
        let kind: Kind
        let help: String
        let value: @Sendable (Thing) -> Figure?

        init(_ kind: Kind, _ name: String, _ help: String, _ value: @escaping @Sendable (Thing) -> Figure?) {
            self.name = name
            self.kind = kind
            self.help = help
            self.value = value
        }
    }

    public static func text(_ host: HostSnapshot) -> String {
        var out = ""
        // 500 VMs have about a megabyte to say.
        out.reserveCapacity(8192 + host.vms.count * 2560)
        write([host], ofHost, to: &out) { _ in "" }
        info(host, to: &out)
        write(host.vms, ofVM, to: &out) { labels([("vm", $0.report.name), ("uid", "\($0.uid)")]) }
        write(host.vms.flatMap { vm in vm.report.tmem.pools.map { Pool(vm: vm, pool: $0) } }, ofPool, to: &out) {
            labels([("vm", $0.vm.report.name), ("uid", "\($0.vm.uid)"), ("pool", $0.pool.name), ("kind", $0.pool.kind)])
        }
        write(host.sharedDisks, ofSharedDisk, to: &out) { labels([("disk", $0.disk), ("group", $0.group)]) }
        write(host.store.map { [$0] } ?? [], ofStore, to: &out) { _ in "" }
        write(host.groups, ofGroup, to: &out) { labels([("group", $0.name), ("node", "\($0.node)")]) }
        return out
    }

    private static func write<Thing>(
        _ things: [Thing], _ families: [Family<Thing>], to out: inout String, labels: (Thing) -> String
    ) {
        guard !things.isEmpty else { return }
        let names = things.map(labels)
        for family in families {
            out += "# HELP \(family.name) \(family.help)\n# TYPE \(family.name) \(family.kind.rawValue)\n"
            for (index, thing) in things.enumerated() {
                guard let value = family.value(thing) else { continue }
                out += family.name
                out += names[index]
                out += " "
                out += value.text
                out += "\n"
            }
        }
    }

    /// Texts are labels of a metric that is always 1.
    private static func info(_ host: HostSnapshot, to out: inout String) {
        func write(_ name: String, _ help: String, _ values: [[(String, String)]]) {
            guard !values.isEmpty else { return }
            out += "# HELP \(name) \(help)\n# TYPE \(name) gauge\n"
            for value in values { out += "\(name)\(labels(value)) 1\n" }
        }
        write("quire_build_info", "The version of the exporter.", [[("version", quireVersion)]])
        write(
            "quire_vm_info", "A running VM, the state of its recycling and that of its merging.",
            host.vms.map {
                [
                    ("vm", $0.report.name), ("uid", "\($0.uid)"), ("state", $0.report.state.rawValue),
                    ("merging", $0.report.merging.state.rawValue),
                ]
            })
    }

    static func labels(_ pairs: [(String, String)]) -> String {
        "{" + pairs.map { "\($0)=\"\(escaped($1))\"" }.joined(separator: ",") + "}"
    }

    /// Of a label's value.
    static func escaped(_ text: String) -> String {
        guard text.utf8.contains(where: { $0 == 0x5C || $0 == 0x22 || $0 == 0x0A }) else { return text }
        var result = ""
        for scalar in text.unicodeScalars {
            switch scalar {
            case "\\": result += "\\\\"
            case "\"": result += "\\\""
            case "\n": result += "\\n"
            default: result.unicodeScalars.append(scalar)
            }
        }
        return result
    }

    // MARK: - What there is

    private static let ofHost: [Family<HostSnapshot>] = [
        Family(.gauge, "quire_vms", "Running VMs that the exporter can see.") { .whole(UInt64($0.vms.count)) },
        Family(.gauge, "quire_unreadable_directories", "Runtime directories that the exporter may not read.") {
            .whole(UInt64($0.unreadableDirectories))
        },
        Family(.gauge, "quire_store_up", "Whether quired tells its figures.") { .flag($0.store != nil) },
        Family(.gauge, "quire_tmem_allowed_bytes", "Memory that swap disks and shared disks are allowed: what they use, and a little more.") {
            $0.tmem.map { .whole($0.total) }
        },
        Family(.gauge, "quire_tmem_limit_bytes", "The most memory that they may use together (tmem-cap of quired).") {
            $0.tmem?.cap.map { .whole($0) }
        },
        Family(.gauge, "quire_collect_duration_seconds", "How long it took to read all of this.") { .real($0.seconds) },
    ]

    private static func pages(_ count: UInt64) -> Figure { .whole(count &* 4096) }
    private static func seconds(_ milliseconds: some BinaryInteger) -> Figure { .real(Double(milliseconds) / 1000) }

    private static func vm(
        _ kind: Family<VM>.Kind, _ name: String, _ help: String, _ value: @escaping @Sendable (StatusReport) -> Figure
    ) -> Family<VM> {
        Family(kind, "quire_vm_" + name, help) { $0.hasNumbers ? value($0.report) : nil }
    }

    private static let ofVM: [Family<VM>] = [
        Family(.gauge, "quire_vm_up", "Whether the VM's backend lives.") {
            switch $0.report.state {
            case .down, .starting, .unknown: .flag(false)
            case .active, .paused, .refused, .noGuest: .flag(true)
            }
        },
        vm(.gauge, "recycling", "Whether pages that the guest frees are recycled.") { .flag($0.state == .active) },
        vm(.gauge, "merging", "Whether equal pages are merged.") { .flag($0.merging.state == .active) },
        vm(.gauge, "memory_bytes", "Guest RAM.") { .whole($0.ramBytes) },
        vm(.gauge, "memory_resident_bytes", "Guest RAM that the host has memory for that is this VM's alone.") {
            .whole($0.residentBytes)
        },
        vm(.gauge, "recycled_bytes", "Guest RAM that is recycled and not in use again.") { .whole($0.recycledBytes) },
        vm(.counter, "recycled_bytes_total", "Guest RAM that was ever recycled in this VM's life.") {
            .whole($0.recycledTotalBytes)
        },
        vm(.gauge, "free_marked_bytes", "Guest RAM that the guest has marked free and that is not recycled yet.") {
            pages($0.freeMarkedPages)
        },
        vm(.counter, "refilled_bytes_total", "Recycled RAM that somebody else had filled and that was recycled again.") {
            pages($0.refilledPages)
        },
        vm(.counter, "allocation_waits_total", "Allocations in the guest that waited for the host.") { .whole($0.waits) },
        vm(.gauge, "recycle_period_seconds", "How long a page is free before it is recycled.") { seconds($0.periodMilliseconds) },
        vm(.gauge, "merged_saved_bytes", "Memory that pages of this VM do not take because they are merged.") {
            .whole($0.merging.savedBytes)
        },
        vm(.gauge, "pages_sharing", "Guest pages that are mapped to a page of the store, or diverged from it.") {
            .whole($0.merging.sharingPages)
        },
        vm(.gauge, "pages_zero", "Guest pages that are mapped to zeros, or diverged from them.") { .whole($0.merging.zeroPages) },
        vm(.gauge, "pages_diverged", "Merged guest pages that were written since and have a copy.") {
            .whole($0.merging.divergedPages)
        },
        vm(.counter, "pages_hashed_total", "Guest pages that were read to find equal ones.") { .whole($0.merging.hashedTotalPages) },
        vm(.counter, "pages_merged_total", "Guest pages that were merged.") { .whole($0.merging.mergedTotalPages) },
        vm(.counter, "pages_folded_total", "Diverged guest pages that were brought back.") { .whole($0.merging.foldedTotalPages) },
        vm(.gauge, "merge_period_seconds", "A page is merged when it was not written for two of these.") {
            seconds($0.merging.periodMilliseconds)
        },
        vm(.gauge, "tmem_bytes", "Memory of the host for the VM's transcendent memory, tables included.") {
            .whole($0.tmem.usedBytes)
        },
        vm(.gauge, "mappings", "Memory mappings of QEMU.") { .whole($0.merging.mappings) },
        vm(.gauge, "mappings_limit", "Mappings of QEMU above which nothing is merged.") { .whole($0.merging.mappingLimit) },
        vm(.counter, "backend_cpu_seconds_total", "CPU time of the VM's backend process.") { .real($0.cpuSeconds) },
        vm(.counter, "backend_restarts_total", "Backends that had to be replaced.") { .whole($0.restarts) },
        vm(.gauge, "metadata_bytes", "Memory of the host for bookkeeping about this VM.") { .whole($0.mapBytes) },
        vm(.gauge, "status_age_seconds", "Time since the backend wrote these numbers.") { seconds($0.ageMilliseconds) },
    ]

    /// A pool of transcendent memory, and whose it is.
    struct Pool: Sendable {
        let vm: VM
        let pool: StatusReport.Tmem.Pool
    }

    private static let ofPool: [Family<Pool>] = [
        Family(.gauge, "quire_tmem_pool_bytes", "Pages of the pool, as the guest sees them.") { .whole($0.pool.bytes) },
        Family(.gauge, "quire_tmem_pool_stored_bytes", "Memory that their contents take.") { .whole($0.pool.storedBytes) },
        Family(.counter, "quire_tmem_pool_puts_total", "Pages that the guest put.") { .whole($0.pool.puts) },
        Family(.counter, "quire_tmem_pool_puts_failed_total", "Pages that were not taken.") { .whole($0.pool.putsFailed) },
        Family(.counter, "quire_tmem_pool_hits_total", "Pages that the guest got back.") { .whole($0.pool.hits) },
        Family(.counter, "quire_tmem_pool_misses_total", "Pages that the guest asked for in vain.") { .whole($0.pool.misses) },
        Family(.counter, "quire_tmem_pool_flushes_total", "Pages that the guest gave up.") { .whole($0.pool.flushes) },
        Family(.counter, "quire_tmem_pool_evictions_total", "Ephemeral pages that the host gave up.") { .whole($0.pool.evictions) },
    ]

    private static func disk(
        _ kind: Family<SharedDiskReport>.Kind, _ name: String, _ help: String,
        _ value: @escaping @Sendable (StatusReport.Tmem.Pool) -> UInt64
    ) -> Family<SharedDiskReport> {
        Family(kind, "quire_shared_disk_" + name, help) { $0.tmem.pools.first.map { .whole(value($0)) } }
    }

    /// Of quired. Each is one pool.
    private static let ofSharedDisk: [Family<SharedDiskReport>] = [
        Family(.gauge, "quire_shared_disk_vms", "VMs that have the shared disk attached.") { .whole(UInt64($0.attached.count)) },
        disk(.gauge, "size_bytes", "Size of the disk.") { $0.capacityBytes },
        disk(.gauge, "bytes", "Pages on the disk, as guests see them.") { $0.bytes },
        disk(.gauge, "stored_bytes", "Memory that their contents take.") { $0.storedBytes },
        Family(.gauge, "quire_shared_disk_limit_bytes", "Memory that their contents may take; 0: no limit.") { .whole($0.tmem.capBytes) },
        disk(.counter, "puts_total", "Pages that guests wrote.") { $0.puts },
        disk(.counter, "puts_failed_total", "Pages that were not taken.") { $0.putsFailed },
        disk(.counter, "hits_total", "Pages that guests read.") { $0.hits },
        disk(.counter, "misses_total", "Pages that guests read where there was nothing: zeros.") { $0.misses },
        disk(.counter, "flushes_total", "Pages that guests discarded.") { $0.flushes },
    ]

    private static let ofStore: [Family<StoreFigures>] = [
        Family(.gauge, "quire_store_vms", "VMs that use the page store.") { .whole($0.machines) },
        Family(.gauge, "quire_store_pages_shared", "Pages of the store that are in use.") { .whole($0.sharedPages) },
        Family(.gauge, "quire_store_pages_sharing", "Guest pages that are merged with one of them.") { .whole($0.sharingPages) },
        Family(.gauge, "quire_store_pages_held", "Guest pages that were offered a page of the store and do not use it yet.") {
            .whole($0.heldPages)
        },
        Family(.gauge, "quire_store_pages_limit", "Pages that the store may have.") { .whole($0.limitPages) },
        Family(.gauge, "quire_store_saved_bytes", "Memory saved: guest pages that share, less the pages that they share.") {
            .whole($0.savedBytes)
        },
        Family(.gauge, "quire_store_memory_bytes", "Memory of the store's pages.") { .whole($0.storeBytes) },
        Family(.gauge, "quire_store_index_bytes", "Memory for index, counts and tables, an estimate.") { .whole($0.indexBytes) },
        Family(.gauge, "quire_store_candidates_limit_bytes", "The most memory for contents that were seen once.") {
            .whole($0.candidateBytes)
        },
        Family(.gauge, "quire_store_ledger_bytes", "Memory for the notes of who uses which page.") { .whole($0.ledgerBytes) },
        Family(.gauge, "quire_store_lacking_bytes", "Memory that the host has too little of for anything more to be merged (the reserve).") {
            .whole($0.lackingBytes)
        },
        Family(.counter, "quire_store_promotions_total", "Contents that got a page of the store.") { .whole($0.promotions) },
        Family(.counter, "quire_store_hits_total", "Guest pages that found their content in the store.") { .whole($0.hits) },
        Family(.counter, "quire_store_stale_total", "Contents given up because a page had changed meanwhile.") { .whole($0.stale) },
        Family(.counter, "quire_store_full_total", "Guest pages that found no room because the limit was reached.") { .whole($0.full) },
    ]

    private static let ofGroup: [Family<GroupFigures>] = [
        Family(.gauge, "quire_group_vms", "VMs of the share group.") { .whole($0.figures.machines) },
        Family(.gauge, "quire_group_pages_shared", "Pages of the group's store that are in use.") { .whole($0.figures.sharedPages) },
        Family(.gauge, "quire_group_pages_sharing", "Guest pages that are merged with one of them.") { .whole($0.figures.sharingPages) },
        Family(.gauge, "quire_group_saved_bytes", "Memory saved within the group.") { .whole($0.figures.savedBytes) },
        Family(.gauge, "quire_group_memory_bytes", "Memory of the pages of the group's store.") { .whole($0.figures.storeBytes) },
    ]
}
