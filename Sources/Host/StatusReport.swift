import FoundationEssentials
import Platform

/// What `quire status` says about one VM. Encoded as JSON, the names below are the interface; numbers are exact.
public struct StatusReport: Sendable, Equatable, Codable {
    /// `active`: pages are recycled. `paused`: not for now, `reason` says why. `refused`: the guest's table was refused or
    /// dropped. `no-guest`: no guest module has registered. `starting`: no backend has reported yet. `down`: the backend
    /// is dead; if the VM is supervised, another one is on its way. `unknown`: the status page cannot be read.
    public enum State: String, Sendable, Codable {
        case active, paused, refused, starting, down, unknown
        case noGuest = "no-guest"
    }

    public var name: String
    public var state: State
    /// One line for a person; empty if there is nothing to say.
    public var reason: String
    /// Of the backend; 0 if there was none yet.
    public var pid: Int32
    public var ramBytes: UInt64 = 0
    /// Of the RAM, what the host has allocated.
    public var residentBytes: UInt64 = 0
    /// Recycled and not in use again.
    public var recycledPages: UInt64 = 0
    public var recycledBytes: UInt64 = 0
    /// In this VM's life.
    public var recycledTotalPages: UInt64 = 0
    public var recycledTotalBytes: UInt64 = 0
    /// Over the last period.
    public var recycledPagesPerSecond: Double = 0
    /// Marked free by the guest, not yet recycled.
    public var freeMarkedPages: UInt64 = 0
    /// Allocations in the guest that waited for the host, as the guest says.
    public var waits: UInt64 = 0
    /// Recycled pages that somebody else had filled, and that were recycled again.
    public var refilledPages: UInt64 = 0
    /// Of the backend process since its start, in percent of one CPU.
    public var cpuPercent: Double = 0
    public var cpuSeconds: Double = 0
    public var uptimeSeconds: Double = 0
    public var periodMilliseconds: UInt32 = 0
    /// Metadata of the host for this VM.
    public var mapBytes: UInt64 = 0
    /// Backends that had to be replaced.
    public var restarts: UInt64 = 0
    /// Since the backend last wrote these numbers.
    public var ageMilliseconds: UInt64 = 0
    public var merging = Merging()
    public var tmem = Tmem()

    /// Equal pages that are kept once. Encoded as an object of its own; pages have 4096 bytes.
    public struct Merging: Sendable, Equatable, Codable {
        /// `off`: QEMU was started without the agent. `idle`: no guest is running. `active`; `paused`: `reason` says why.
        public enum State: String, Sendable, Codable { case off, idle, active, paused }
        public var state = State.off
        public var reason = ""
        public var periodMilliseconds: UInt32 = 0
        /// Guest pages that are mapped to a page of the store, or diverged from it.
        public var sharingPages: UInt64 = 0
        public var zeroPages: UInt64 = 0
        /// Of both: those that the guest has written since.
        public var divergedPages: UInt64 = 0
        /// Memory that this VM's pages do not take: without the pages of the store, which it shares with others.
        public var savedBytes: UInt64 = 0
        public var hashedTotalPages: UInt64 = 0
        public var mergedTotalPages: UInt64 = 0
        public var foldedTotalPages: UInt64 = 0
        public var mergedPagesPerSecond: Double = 0
        public var foldedPagesPerSecond: Double = 0
        /// VMAs of QEMU.
        public var mappings: UInt64 = 0
        public var mappingLimit: UInt64 = 0
        /// Of the share group: pages of the store, guest pages that use them, and what that saves.
        public var groupSharedPages: UInt64 = 0
        public var groupSharingPages: UInt64 = 0
        public var groupSavedBytes: UInt64 = 0
        /// Pages of the store that are used 2^i ..< 2^(i+1) times; without the zeros at its end.
        public var groupHistogram: [UInt64] = []

        enum CodingKeys: String, CodingKey {
            case state, reason, mappings
            case periodMilliseconds = "period_ms"
            case sharingPages = "sharing_pages"
            case zeroPages = "zero_pages"
            case divergedPages = "diverged_pages"
            case savedBytes = "saved_bytes"
            case hashedTotalPages = "hashed_total_pages"
            case mergedTotalPages = "merged_total_pages"
            case foldedTotalPages = "folded_total_pages"
            case mergedPagesPerSecond = "merged_pages_per_second"
            case foldedPagesPerSecond = "folded_pages_per_second"
            case mappingLimit = "mapping_limit"
            case groupSharedPages = "group_shared_pages"
            case groupSharingPages = "group_sharing_pages"
            case groupSavedBytes = "group_saved_bytes"
            case groupHistogram = "group_histogram"
        }

        init() {}

        init(_ page: MergeSnapshot) {
            state = switch page.state {
            case .off: .off
            case .idle: .idle
            case .active: .active
            case .paused: .paused
            }
            reason = page.reason
            periodMilliseconds = page.periodMilliseconds
            sharingPages = page.sharingPages
            zeroPages = page.zeroPages
            divergedPages = page.divergedPages
            // Another user may have written the page.
            let (sum, isTooMuch) = sharingPages.addingReportingOverflow(zeroPages)
            let merged = isTooMuch ? .max : sum
            savedBytes = (merged - min(merged, divergedPages)) &* 4096
            hashedTotalPages = page.hashedTotalPages
            mergedTotalPages = page.mergedTotalPages
            foldedTotalPages = page.foldedTotalPages
            mergedPagesPerSecond = Double(page.mergedRateMillipages) / 1000
            foldedPagesPerSecond = Double(page.foldedRateMillipages) / 1000
            mappings = page.mappings
            mappingLimit = page.mappingLimit
            groupSharedPages = page.groupSharedPages
            groupSharingPages = page.groupSharingPages
            groupSavedBytes = page.groupSavedBytes
            groupHistogram = Array(page.groupHistogram.prefix((page.groupHistogram.lastIndex { $0 != 0 } ?? -1) + 1))
        }
    }

    enum CodingKeys: String, CodingKey {
        case name, state, reason, pid, waits, restarts, merging, tmem
        case ramBytes = "ram_bytes"
        case residentBytes = "resident_bytes"
        case recycledPages = "recycled_pages"
        case recycledBytes = "recycled_bytes"
        case recycledTotalPages = "recycled_total_pages"
        case recycledTotalBytes = "recycled_total_bytes"
        case recycledPagesPerSecond = "recycled_pages_per_second"
        case freeMarkedPages = "free_marked_pages"
        case refilledPages = "refilled_pages"
        case cpuPercent = "cpu_percent"
        case cpuSeconds = "cpu_seconds"
        case uptimeSeconds = "uptime_seconds"
        case periodMilliseconds = "period_ms"
        case mapBytes = "map_bytes"
        case ageMilliseconds = "age_ms"
    }

    init(name: String, state: State, reason: String) {
        self.name = name
        self.state = state
        self.reason = reason
        pid = 0
    }

    /// - Parameters:
    ///   - started: when the backend was started; nil if it is dead.
    ///   - now: both of CLOCK_MONOTONIC in nanoseconds.
    public init(name: String, page: StatusSnapshot, started: UInt64?, now: UInt64) {
        self.name = name
        reason = page.reason
        pid = page.pid
        switch page.state {
        case .active: state = .active
        case .paused: state = .paused
        case .refused: state = .refused
        case .noGuest: state = .noGuest
        }
        ramBytes = page.ramBytes
        residentBytes = page.residentBytes
        recycledPages = page.recycledNowPages
        recycledBytes = page.recycledNowPages &* 4096
        recycledTotalPages = page.recycledTotalPages
        recycledTotalBytes = page.recycledTotalPages &* 4096
        recycledPagesPerSecond = Double(page.recycledRateMillipages) / 1000
        freeMarkedPages = page.freeMarkedPages
        waits = page.waits
        refilledPages = page.refilledPages
        cpuSeconds = Double(page.cpuNanoseconds) / 1e9
        periodMilliseconds = page.periodMilliseconds
        mapBytes = page.mapBytes
        restarts = page.restarts
        merging = Merging(page.merging)
        tmem = Tmem(page.tmem)
        ageMilliseconds = now > page.updatedNanoseconds ? (now - page.updatedNanoseconds) / 1_000_000 : 0
        if pid == 0 {
            state = .starting
        } else if let started {
            uptimeSeconds = now > started ? Double(now - started) / 1e9 : 0
            // The start is known to a clock tick only: no share of less than a tenth of a second.
            if uptimeSeconds >= 0.1 { cpuPercent = cpuSeconds / uptimeSeconds * 100 }
        } else {
            state = .down
            reason = "the backend, process \(pid), is dead"
            recycledPagesPerSecond = 0
            merging.mergedPagesPerSecond = 0
            merging.foldedPagesPerSecond = 0
        }
    }

    /// Of one running VM, as its page says now.
    public static func read(_ name: String, in directory: RuntimeDirectory) -> StatusReport { read([name], in: directory)[0] }

    /// The same of several.
    public static func read(_ names: some Sequence<String>, in directory: RuntimeDirectory) -> [StatusReport] {
        do {
            let copier = try StatusPage.Copier()
            return names.map { read($0, in: directory, copier) }
        } catch {
            return names.map { StatusReport(name: $0, state: .unknown, reason: error.description) }
        }
    }

    private static func read(_ name: String, in directory: RuntimeDirectory, _ copier: borrowing StatusPage.Copier) -> StatusReport {
        do {
            let page = try copier.snapshot(directory.statusPath(name))
            return StatusReport(name: name, page: page, started: started(page), now: monotonicNanoseconds())
        } catch {
            // Created, but no backend has taken it over yet.
            if error.code == .closed || error.errno == 2 {
                return StatusReport(name: name, state: .starting, reason: "")
            }
            return StatusReport(name: name, state: .unknown, reason: error.description)
        }
    }

    /// When the backend was started; nil if it is dead. The page says so, as a file in /proc takes nearly as long to read as all else
    /// that there is of a VM; but the page of an older backend does not.
    private static func started(_ page: StatusSnapshot) -> UInt64? {
        if page.startedNanoseconds == 0 { return ProcessCalls.startTime(of: page.pid) }
        return ProcessCalls.isAlive(page.pid) ? page.startedNanoseconds : nil
    }

    /// All running VMs, or those of `names`; throws for a name that is not running.
    public static func collect(_ names: [String], in directory: RuntimeDirectory) throws(QuireError) -> [StatusReport] {
        try collect(names, in: directory) { $0 }
    }

    /// What `body` makes of them, some at a time and on all CPUs, in their order.
    private static func collect<Made: Sendable>(
        _ names: [String], in directory: RuntimeDirectory, _ body: @escaping @Sendable ([StatusReport]) -> [Made]
    ) throws(QuireError) -> [Made] {
        if names.isEmpty {
            return inParts(directory.names, few: 16) { body(read($0.filter(directory.isRunning), in: directory)) }
        }
        for name in names where !directory.isRunning(name) {
            throw QuireError(.invalid, "no VM '\(name)' is running: quire status lists those that are")
        }
        return inParts(names, few: 16) { body(read($0, in: directory)) }
    }

    /// What is said of transcendent memory alone, of a VM or of a shared disk.
    private struct TmemEntry: Encodable {
        let name: String
        var group: String? = nil
        var attached: [String]? = nil
        var content: String? = nil
        let tmem: Tmem

        init(_ report: StatusReport) { (name, tmem) = (report.name, report.tmem) }
        init(_ disk: SharedDiskReport) { (name, group, attached, content, tmem) = (disk.name, disk.group, disk.attached, disk.content, disk.tmem) }
    }

    /// The elements of an array, as one text; no text for none.
    private static func elements(_ entries: [some Encodable]) -> [String] {
        // An array has a bracket on a line of its own at both ends.
        entries.isEmpty ? [] : [String(jsonText(entries).dropFirst(2).dropLast(2))]
    }

    /// An array of all these elements, as `jsonText` has it.
    private static func array(_ parts: [String]) -> String {
        var text = "[\n"
        // Room for all of it at once: it may be a megabyte.
        text.reserveCapacity(parts.reduce(4) { $0 + $1.utf8.count + 2 })
        for (index, part) in parts.enumerated() {
            if index > 0 { text += ",\n" }
            text += part
        }
        text += "\n]"
        return text
    }

    /// The VMs, then the shared disks.
    public static func json(_ reports: [StatusReport], _ disks: [SharedDiskReport] = []) -> String {
        array(elements(reports) + elements(disks.map(TmemEntry.init)))
    }

    /// The same of all running VMs, or of those of `names`; throws for a name that is not running. Each thread encodes what it has
    /// read: that takes longer than the reading.
    public static func json(
        _ names: [String], in directory: RuntimeDirectory, _ disks: [SharedDiskReport] = []
    ) throws(QuireError) -> String {
        let parts = try collect(names, in: directory) { elements($0) }
        return array(parts + elements(disks.map(TmemEntry.init)))
    }

    /// Only names and what is said of transcendent memory; then the shared disks.
    public static func tmemJSON(_ reports: [StatusReport], _ disks: [SharedDiskReport]) -> String {
        array(elements(reports.map(TmemEntry.init)) + elements(disks.map(TmemEntry.init)))
    }

    /// The reports of VMs that `json` wrote.
    public static func parse(json text: String) throws(QuireError) -> [StatusReport] {
        struct Entry: Decodable {
            /// Nil: a shared disk.
            let report: StatusReport?
            enum CodingKeys: CodingKey { case name }
            init(from decoder: any Decoder) throws {
                let name = try decoder.container(keyedBy: CodingKeys.self).decode(String.self, forKey: .name)
                report = name.hasPrefix(SharedDiskReport.prefix) ? nil : try StatusReport(from: decoder)
            }
        }
        do { return try JSONDecoder().decode([Entry].self, from: Data(text.utf8)).compactMap(\.report) } catch {
            throw QuireError(.invalid, "this is not what quire status --json prints", cause: error)
        }
    }

    private typealias Columns = [(title: String, isNumber: Bool)]

    private static let columns: Columns = [
        ("NAME", false), ("STATE", false), ("RAM", true), ("RESIDENT", true), ("RECYCLED", true), ("TOTAL", true),
        ("RATE", true), ("MERGING", false), ("SAVED", true), ("CPU", true), ("PERIOD", true), ("PID", true),
    ]

    private var cells: [String] {
        guard pid != 0 else { return [name, state.rawValue] + Array(repeating: "-", count: Self.columns.count - 2) }
        return [
            name, state.rawValue, Size.text(ramBytes), Size.text(residentBytes), Size.text(recycledBytes),
            Size.text(recycledTotalBytes), Self.rate(recycledPagesPerSecond), merging.state.rawValue,
            Size.text(merging.savedBytes), Size.decimal(cpuPercent, digits: 1) + "%",
            Size.duration(milliseconds: UInt64(periodMilliseconds)), "\(pid)",
        ]
    }

    private static let mergeColumns: Columns = [
        ("NAME", false), ("SHARING", true), ("ZERO", true), ("DIVERGED", true), ("HASHED", true), ("MERGED", true),
        ("FOLDED", true), ("MAPPINGS", true), ("PERIOD", true),
    ]

    private var mergeCells: [String] {
        [
            name, Size.text(merging.sharingPages &* 4096), Size.text(merging.zeroPages &* 4096),
            Size.text(merging.divergedPages &* 4096), Size.text(merging.hashedTotalPages &* 4096),
            Self.rate(merging.mergedPagesPerSecond), Self.rate(merging.foldedPagesPerSecond),
            "\(merging.mappings)/\(merging.mappingLimit)",
            Size.duration(milliseconds: UInt64(merging.periodMilliseconds)),
        ]
    }

    private static let poolColumns: Columns = [
        ("NAME", false), ("POOL", false), ("KIND", false), ("PAGES", true), ("BYTES", true), ("LIMIT", true), ("STORED", true),
        ("RATIO", true), ("HITS", true), ("MISSES", true), ("EVICTED", true), ("FAILED", true),
    ]

    private static func cells(_ name: String, _ pool: Tmem.Pool) -> [String] {
        [
            name, pool.name, pool.kind + (pool.scope == "shared" ? ", shared" : ""), "\(pool.pages)", Size.text(pool.bytes),
            pool.capacityBytes == 0 ? "-" : Size.text(pool.capacityBytes), Size.text(pool.storedBytes),
            pool.ratio.map { Size.decimal($0, digits: 1) } ?? "-", "\(pool.hits)", "\(pool.misses)", "\(pool.evictions)",
            "\(pool.putsFailed)",
        ]
    }

    /// The pools of all of them, VMs' and shared disks'; no lines where there are none.
    public static func poolTable(_ reports: [StatusReport], _ disks: [SharedDiskReport], colours: Bool) -> [String] {
        let owners = reports.map { ($0.name, $0.tmem) } + disks.map { ($0.name, $0.tmem) }
        let rows = owners.flatMap { name, tmem in tmem.pools.map { cells(name, $0) } }
        return rows.isEmpty ? [] : aligned(poolColumns, rows, colours: colours) { _, _, cell in cell }
    }

    private static func rate(_ pagesPerSecond: Double) -> String {
        Size.rate(pagesPerSecond * 4096)
    }

    /// The VMs, then what is merged of them, then their pools of transcendent memory and the shared disks, each as lines of aligned
    /// columns; then what each has to say about itself, and how often pages of the store are used.
    public static func table(_ reports: [StatusReport], _ disks: [SharedDiskReport] = [], colours: Bool) -> String {
        var lines = aligned(columns, reports.map(\.cells), colours: colours) { row, column, cell in
            column == 1 ? "\u{1B}[\(reports[row].state.colour)m\(cell)\u{1B}[0m" : cell
        }
        let merged = reports.filter { $0.pid != 0 && $0.merging.state != .off }
        if !merged.isEmpty {
            lines.append("")
            lines += aligned(mergeColumns, merged.map(\.mergeCells), colours: colours) { _, _, cell in cell }
        }
        let pools = poolTable(reports.filter { $0.pid != 0 }, disks, colours: colours)
        if !pools.isEmpty { lines += [""] + pools }
        var notes: [String] = []
        for report in reports where !report.reason.isEmpty && report.state != .active {
            notes.append("\(report.name): \(report.reason)")
        }
        for report in merged where !report.merging.reason.isEmpty && report.merging.state != .idle {
            notes.append("\(report.name): merging: \(report.merging.reason)")
        }
        for report in reports where !report.tmem.reason.isEmpty {
            notes.append("\(report.name): tmem: \(report.tmem.reason)")
        }
        for disk in disks where !disk.tmem.reason.isEmpty { notes.append("\(disk.name): \(disk.tmem.reason)") }
        // VMs of one group say the same, give or take the moment at which each has asked.
        if let group = merged.map(\.merging).max(by: { $0.groupSharingPages < $1.groupSharingPages }),
            group.groupSharedPages > 0
        {
            notes.append(group.uses)
        }
        if !(merged.isEmpty && pools.isEmpty), !notes.isEmpty { lines.append("") }
        return (lines + notes).joined(separator: "\n")
    }

    private static func aligned(
        _ columns: Columns, _ cells: [[String]], colours: Bool, _ colour: (Int, Int, String) -> String
    ) -> [String] {
        let rows = [columns.map(\.title)] + cells
        let widths = columns.indices.map { column in rows.map { $0[column].count }.max() ?? 0 }
        return rows.enumerated().map { index, row in
            var line = ""
            for (column, cell) in row.enumerated() {
                let padding = String(repeating: " ", count: widths[column] - cell.count)
                var text = cell
                if colours { text = index == 0 ? "\u{1B}[1m\(cell)\u{1B}[0m" : colour(index - 1, column, cell) }
                if column > 0 { line += "  " }
                line += columns[column].isNumber ? padding + text : text + padding
            }
            return line
        }
    }
}

extension StatusReport.Merging {
    /// How often pages of the store are used.
    var uses: String {
        let counts = groupHistogram.enumerated().filter { $0.element > 0 }.map { power, count in
            let low = 1 << power
            return (power == 0 ? "once" : "\(low) to \(2 * low - 1) times") + " \(count)"
        }
        return "store: \(Size.text(groupSharedPages &* 4096)) for \(Size.text(groupSharingPages &* 4096)) of guest memory; "
            + "pages used " + counts.joined(separator: ", ")
    }
}

extension StatusReport.State {
    /// An ANSI colour.
    package var colour: Int {
        switch self {
        case .active: 32
        case .paused, .starting: 33
        case .refused, .down, .unknown: 31
        case .noGuest: 2
        }
    }
}
