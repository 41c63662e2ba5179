import CQuireLayout
import PageContent
import Platform

/// The messages between a backend and quired, as quire_layout.h (part 5a) lays them out. Decoding checks everything
/// that the message alone can say: sizes, counts, ranges of gfns and slots. What they mean is for the store to judge.
public enum StoreRequest: Equatable, Sendable {
    case hello(Hello)
    case memory([Region])
    case lookup(Lookup)
    /// At most so many pages.
    case offers(Int)
    case report([Report])
    /// How many pages of zeros the VM has merged, which quired hears of in no other way.
    case status(zeroPages: UInt32)
    /// Of all share groups but the first so many.
    case groups(passingOver: Int)
    /// What a store of transcendent memory may use.
    case tmem(TmemUse)

    public struct Hello: Equatable, Sendable {
        public var version = UInt32(QUIRE_STORE_VERSION)
        public var node: UInt32 = 0
        public var name: String
        /// Empty: the group of the VM's owner.
        public var group = ""
        public init(name: String, group: String = "", node: UInt32 = 0) {
            self.name = name
            self.group = group
            self.node = node
        }
    }

    /// Where guest pages are: `pages` from `gfn` on, at `offset` bytes in the `file`-th file of the message.
    public struct Region: Equatable, Sendable {
        public let gfn: UInt64
        public let pages: UInt64
        public let offset: UInt64
        public let file: Int
        public init(gfn: UInt64, pages: UInt64, offset: UInt64, file: Int) {
            self.gfn = gfn
            self.pages = pages
            self.offset = offset
            self.file = file
        }
        public var gfns: Range<UInt64> { gfn..<gfn + pages }
    }

    public struct Lookup: Equatable, Sendable {
        /// Gfns of consecutive pages.
        public private(set) var runs: [Range<UInt64>] = []
        /// Of all their pages, in order.
        public private(set) var hashes: [PageHash] = []
        public init() {}
        public mutating func append(_ gfn: UInt64, _ more: [PageHash]) {
            runs.append(gfn..<gfn + UInt64(more.count))
            hashes += more
        }
        init(runs: [Range<UInt64>], hashes: [PageHash]) {
            self.runs = runs
            self.hashes = hashes
        }
    }

    public struct Report: Equatable, Sendable {
        public enum What: UInt32, Sendable { case merged = 1, released = 2 }
        public let what: What
        public let gfns: Range<UInt64>
        public init(_ what: What, _ gfns: Range<UInt64>) {
            self.what = what
            self.gfns = gfns
        }
    }

    /// In bytes.
    public struct TmemUse: Equatable, Sendable {
        /// Of the VM; empty: nothing is asked for but how things are.
        public var name = ""
        public var used: UInt64 = 0
        public var held: UInt64 = 0
        public var wanted: UInt64 = 0
        public init(name: String = "", used: UInt64 = 0, held: UInt64 = 0, wanted: UInt64 = 0) {
            (self.name, self.used, self.held, self.wanted) = (name, used, held, wanted)
        }

        /// What no limit is set to may be more than a message can say.
        public static func limited(name: String, used: UInt64, held: UInt64, wanted: UInt64) -> TmemUse {
            func limited(_ bytes: UInt64) -> UInt64 { min(bytes, StoreRequest.maxTmemBytes) }
            return TmemUse(name: name, used: limited(used), held: limited(held), wanted: limited(wanted))
        }
    }

    public static let maxPages = Int(QUIRE_STORE_MAX_PAGES)
    public static let maxReportPages = Int(QUIRE_STORE_MAX_REPORT)
    public static let maxRuns = Int(QUIRE_STORE_MAX_RUNS)
    public static let maxFiles = Int(QUIRE_STORE_MAX_FILES)
    public static let maxBytes = Int(QUIRE_STORE_MESSAGE_MAX)
    public static let gfnLimit = UInt64(QUIRE_STORE_GFN_LIMIT)

    private static let nameBytes = 72
    /// No sum of these is too large for a word.
    public static let maxTmemBytes: UInt64 = 1 << 50

    // MARK: - Encoding

    public func encoded() -> [UInt8] {
        var out = ByteWriter(reserving: 256)
        func header(_ kind: quire_store_kind, _ count: Int) {
            out.word32(kind.rawValue)
            out.word32(UInt32(count))
        }
        switch self {
        case .hello(let hello):
            header(QUIRE_STORE_HELLO, 0)
            out.raw(QUIRE_STORE_MAGIC.utf8)
            out.word32(hello.version)
            out.word32(hello.node)
            out.raw(paddedText(hello.name, capacity: Self.nameBytes))
            out.raw(paddedText(hello.group, capacity: Self.nameBytes))
        case .memory(let regions):
            header(QUIRE_STORE_MEMORY, regions.count)
            for region in regions {
                out.word64(region.gfn)
                out.word64(region.pages)
                out.word64(region.offset)
                out.word32(UInt32(region.file))
                out.word32(0)
            }
        case .lookup(let lookup):
            header(QUIRE_STORE_LOOKUP, lookup.runs.count)
            for run in lookup.runs {
                out.word64(run.lowerBound)
                out.word32(UInt32(run.count))
                out.word32(0)
            }
            for hash in lookup.hashes {
                out.word64(hash.low)
                out.word64(hash.high)
            }
        case .offers(let most): header(QUIRE_STORE_OFFERS, most)
        case .report(let reports):
            header(QUIRE_STORE_REPORT, reports.count)
            for report in reports {
                out.word64(report.gfns.lowerBound)
                out.word32(UInt32(report.gfns.count))
                out.word32(report.what.rawValue)
            }
        case .status(let zeroPages): header(QUIRE_STORE_STATUS, Int(zeroPages))
        case .groups(let first): header(QUIRE_STORE_GROUPS, first)
        case .tmem(let use):
            header(QUIRE_STORE_TMEM, 0)
            out.raw(paddedText(use.name, capacity: Self.nameBytes))
            out.word64(use.used)
            out.word64(use.held)
            out.word64(use.wanted)
        }
        return out.bytes
    }

    // MARK: - Decoding

    public init(_ bytes: [UInt8]) throws(ProtocolViolation) {
        var input = ByteReader(bytes)
        let kind = try input.word32()
        let count = Int(try input.word32())
        func requireCount(_ most: Int) throws(ProtocolViolation) {
            guard (1...most).contains(count) else { throw ProtocolViolation("a count of \(count) is not in 1...\(most)") }
        }
        switch quire_store_kind(rawValue: kind) {
        case QUIRE_STORE_HELLO:
            guard try input.bytes(8) == Array(QUIRE_STORE_MAGIC.utf8) else {
                throw ProtocolViolation("this is no page store client")
            }
            // Of another version only this much is known; whoever judges the version has the rest to ignore.
            let version = try input.word32()
            var hello = Hello(name: "")
            hello.version = version
            if version == QUIRE_STORE_VERSION {
                hello.node = try input.word32()
                hello.name = try input.text(Self.nameBytes)
                hello.group = try input.text(Self.nameBytes)
                try input.end()
            }
            self = .hello(hello)
        case QUIRE_STORE_MEMORY:
            guard count <= Int(QUIRE_STORE_MAX_REGIONS) else { throw ProtocolViolation("\(count) regions are too many") }
            var regions: [Region] = []
            for _ in 0..<count {
                let gfn = try input.word64(), pages = try input.word64(), offset = try input.word64()
                let file = Int(try input.word32())
                _ = try input.word32()
                guard gfn < Self.gfnLimit, pages > 0, pages <= Self.gfnLimit - gfn else {
                    throw ProtocolViolation("a region of \(pages) pages at gfn \(gfn) is not in 0..<\(Self.gfnLimit)")
                }
                regions.append(Region(gfn: gfn, pages: pages, offset: offset, file: file))
            }
            try input.end()
            self = .memory(regions)
        case QUIRE_STORE_LOOKUP:
            try requireCount(Self.maxRuns)
            var runs: [Range<UInt64>] = []
            var total = 0
            for _ in 0..<count {
                let run = try Self.pages(&input)
                guard run.what == 0 else { throw ProtocolViolation("a lookup says what happened") }
                total += run.gfns.count
                guard total <= Self.maxPages else { throw ProtocolViolation("a lookup of more than \(Self.maxPages) pages") }
                runs.append(run.gfns)
            }
            var hashes: [PageHash] = []
            hashes.reserveCapacity(total)
            for _ in 0..<total { hashes.append(PageHash(low: try input.word64(), high: try input.word64())) }
            try input.end()
            self = .lookup(Lookup(runs: runs, hashes: hashes))
        case QUIRE_STORE_OFFERS:
            try requireCount(Self.maxPages)
            try input.end()
            self = .offers(count)
        case QUIRE_STORE_REPORT:
            try requireCount(Self.maxRuns)
            var reports: [Report] = []
            var total = 0
            for _ in 0..<count {
                let run = try Self.pages(&input)
                guard let what = Report.What(rawValue: run.what) else {
                    throw ProtocolViolation("a report of something unknown (\(run.what))")
                }
                total += run.gfns.count
                guard total <= Self.maxReportPages else {
                    throw ProtocolViolation("a report of more than \(Self.maxReportPages) pages")
                }
                reports.append(Report(what, run.gfns))
            }
            try input.end()
            self = .report(reports)
        case QUIRE_STORE_STATUS:
            try input.end()
            self = .status(zeroPages: UInt32(count))
        case QUIRE_STORE_GROUPS:
            try input.end()
            self = .groups(passingOver: count)
        case QUIRE_STORE_TMEM:
            let name = try input.text(Self.nameBytes)
            let used = try input.word64(), held = try input.word64(), wanted = try input.word64()
            try input.end()
            guard max(used, held, wanted) <= Self.maxTmemBytes else { throw ProtocolViolation("more memory than there can be") }
            self = .tmem(TmemUse(name: name, used: used, held: held, wanted: wanted))
        default: throw ProtocolViolation("there is no request \(kind)")
        }
    }

    private static func pages(
        _ input: inout ByteReader
    ) throws(ProtocolViolation) -> (gfns: Range<UInt64>, what: UInt32) {
        let gfn = try input.word64(), pages = UInt64(try input.word32()), what = try input.word32()
        guard gfn < gfnLimit, pages > 0, pages <= gfnLimit - gfn else {
            throw ProtocolViolation("a run of \(pages) pages at gfn \(gfn) is not in 0..<\(gfnLimit)")
        }
        return (gfn..<gfn + pages, what)
    }
}

public enum StoreReply: Equatable, Sendable {
    case welcome(Welcome)
    case done(pages: UInt64)
    /// `lacking`: as `StoreFigures.lackingBytes`.
    case slots([SlotRun], offers: UInt64, lacking: UInt64)
    case figures(StoreFigures)
    /// At most `maxGroups`.
    case groups([GroupFigures])
    case allowed(TmemAllowed)
    /// One line for a person; and whether the same request may do better in a moment.
    case error(String, isBusy: Bool = false)

    public struct Welcome: Equatable, Sendable {
        public var version = UInt32(QUIRE_STORE_VERSION)
        /// The store's number in page-map entries.
        public var store: UInt32 = 0
        public var storeID: UInt64 = 0
        /// Pages.
        public var slots: UInt64 = 0
        public var keptPages: UInt64 = 0
        public var droppedPages: UInt64 = 0
        public var unknownPages: UInt64 = 0
        public var secret: [UInt8] = []
        public init() {}
    }

    /// In bytes.
    public struct TmemAllowed: Equatable, Sendable {
        public var allowed: UInt64
        /// What all are allowed together.
        public var total: UInt64
        /// Nil: there is no limit.
        public var cap: UInt64?
        /// quired does not know yet what others have.
        public var isSettling: Bool
        public init(allowed: UInt64, total: UInt64, cap: UInt64?, isSettling: Bool) {
            (self.allowed, self.total, self.cap, self.isSettling) = (allowed, total, cap, isSettling)
        }
    }

    public static let maxGroups = Int(QUIRE_STORE_MAX_GROUPS)
    private static let groupNameBytes = 72
    private static let textBytes = MemoryLayout<quire_store_error>.size - MemoryLayout<quire_store_header>.size

    public func encoded() -> [UInt8] {
        var out = ByteWriter(reserving: 512)
        func header(_ kind: quire_store_kind, _ count: Int) {
            out.word32(kind.rawValue)
            out.word32(UInt32(count))
        }
        switch self {
        case .welcome(let welcome):
            header(QUIRE_STORE_WELCOME, 0)
            out.word32(welcome.version)
            out.word32(welcome.store)
            out.word64(welcome.storeID)
            out.word64(welcome.slots)
            out.word64(welcome.keptPages)
            out.word64(welcome.droppedPages)
            out.word64(welcome.unknownPages)
            out.raw(welcome.secret)
        case .done(let pages):
            header(QUIRE_STORE_DONE, 0)
            out.word64(pages)
        case .slots(let runs, let offers, let lacking):
            header(QUIRE_STORE_SLOTS, runs.count)
            out.word64(offers)
            out.word64(lacking)
            for run in runs {
                out.word64(run.gfn)
                out.word64(UInt64(run.slot))
                out.word32(run.pages)
                out.word32(run.store)
            }
        case .figures(let figures):
            header(QUIRE_STORE_FIGURES, 0)
            figures.write(to: &out)
        case .groups(let groups):
            out = ByteWriter(reserving: 8 + groups.count * MemoryLayout<quire_store_group>.size)
            header(QUIRE_STORE_GROUP_LIST, groups.count)
            for group in groups {
                out.raw(paddedText(group.name, capacity: Self.groupNameBytes))
                out.word32(group.node)
                out.word32(0)
                group.figures.write(to: &out)
            }
        case .allowed(let tmem):
            header(QUIRE_STORE_ALLOWED, tmem.isSettling ? 1 : 0)
            out.word64(tmem.allowed)
            out.word64(tmem.total)
            out.word64(tmem.cap ?? .max)
        case .error(let text, let isBusy):
            header(QUIRE_STORE_ERROR, isBusy ? 1 : 0)
            out.raw(paddedText(text, capacity: Self.textBytes))
        }
        return out.bytes
    }

    public init(_ bytes: [UInt8]) throws(ProtocolViolation) {
        var input = ByteReader(bytes)
        let kind = try input.word32()
        let count = Int(try input.word32())
        switch quire_store_kind(rawValue: kind) {
        case QUIRE_STORE_WELCOME:
            var welcome = Welcome()
            welcome.version = try input.word32()
            welcome.store = try input.word32()
            welcome.storeID = try input.word64()
            welcome.slots = try input.word64()
            welcome.keptPages = try input.word64()
            welcome.droppedPages = try input.word64()
            welcome.unknownPages = try input.word64()
            welcome.secret = try input.bytes(PageHasher.secretBytes)
            self = .welcome(welcome)
        case QUIRE_STORE_DONE: self = .done(pages: try input.word64())
        case QUIRE_STORE_SLOTS:
            let offers = try input.word64(), lacking = try input.word64()
            var runs: [SlotRun] = []
            for _ in 0..<count {
                let gfn = try input.word64(), slot = try input.word64(), pages = try input.word32()
                let store = try input.word32()
                guard slot > 0, slot < UInt64(QUIRE_STORE_SLOT_LIMIT) else { throw ProtocolViolation("a slot \(slot)") }
                runs.append(SlotRun(gfn: gfn, slot: UInt32(slot), pages: pages, store: store))
            }
            self = .slots(runs, offers: offers, lacking: lacking)
        case QUIRE_STORE_FIGURES:
            self = .figures(try StoreFigures(&input))
        case QUIRE_STORE_GROUP_LIST:
            guard count <= Self.maxGroups else { throw ProtocolViolation("\(count) groups are too many") }
            var groups: [GroupFigures] = []
            for _ in 0..<count {
                let name = try input.text(Self.groupNameBytes)
                let node = try input.word32()
                _ = try input.word32()
                groups.append(GroupFigures(name: name, node: node, figures: try StoreFigures(&input)))
            }
            self = .groups(groups)
        case QUIRE_STORE_ALLOWED:
            let allowed = try input.word64(), total = try input.word64(), cap = try input.word64()
            self = .allowed(TmemAllowed(allowed: allowed, total: total, cap: cap == .max ? nil : cap, isSettling: count == 1))
        case QUIRE_STORE_ERROR: self = .error(try input.text(Self.textBytes), isBusy: count == 1)
        default: throw ProtocolViolation("there is no reply \(kind)")
        }
        try input.end()
    }
}

/// What `quire_store_figures` says.
public struct StoreFigures: Equatable, Sendable {
    public var machines: UInt64 = 0
    /// Slots in use.
    public var sharedPages: UInt64 = 0
    /// Guest pages that are merged with one.
    public var sharingPages: UInt64 = 0
    /// Guest pages that were given a slot and are not reported as merged yet.
    public var heldPages: UInt64 = 0
    public var savedBytes: UInt64 = 0
    public var storeBytes: UInt64 = 0
    public var indexBytes: UInt64 = 0
    public var candidateBytes: UInt64 = 0
    public var ledgerBytes: UInt64 = 0
    public var limitPages: UInt64 = 0
    public var promotions: UInt64 = 0
    public var hits: UInt64 = 0
    public var stale: UInt64 = 0
    public var full: UInt64 = 0
    /// Memory that the host is short of to give every merged page of all VMs its own; 0: more may be merged.
    public var lackingBytes: UInt64 = 0
    /// Slots that are used 2^i ..< 2^(i+1) times.
    public var histogram = [UInt64](repeating: 0, count: 32)
    public init() {}

    /// In the order of the layout.
    static var order: [WritableKeyPath<StoreFigures, UInt64>] {
        [
            \.machines, \.sharedPages, \.sharingPages, \.heldPages, \.savedBytes, \.storeBytes, \.indexBytes,
            \.candidateBytes, \.ledgerBytes, \.limitPages, \.promotions, \.hits, \.stale, \.full, \.lackingBytes,
        ]
    }

    func write(to out: inout ByteWriter) {
        for field in Self.order { out.word64(self[keyPath: field]) }
        for value in histogram { out.word64(value) }
    }

    init(_ input: inout ByteReader) throws(ProtocolViolation) {
        for field in Self.order { self[keyPath: field] = try input.word64() }
        for index in histogram.indices { histogram[index] = try input.word64() }
    }
}

/// Figures of one share group on one NUMA node; what is counted for the whole host only is 0.
public struct GroupFigures: Equatable, Sendable {
    public let name: String
    public let node: UInt32
    public let figures: StoreFigures
    public init(name: String, node: UInt32, figures: StoreFigures) {
        self.name = name
        self.node = node
        self.figures = figures
    }
}

/// 1 to 63 of A-Z a-z 0-9 . _ - and no dot in front: names of VMs and of share groups.
public func isStoreName(_ name: String) -> Bool { PlainName.isValid(name) }
