import Engines
import Glibc
import GuestMemory
import Logging
import Platform
import StoreProtocol
import Synchronization
import VhostBackend

/// The per-VM process: its devices, its engine, its heartbeat. `quire-backend` is the command line in front of it.
public final class BackendProcess: Sendable {
    /// One device and the socket that it is served on.
    public struct Device: Sendable, Equatable {
        public enum Kind: Sendable, Equatable {
            case control
            case file(path: String, isReadOnly: Bool, queueCount: Int, serial: String, blockBytes: UInt32)
            /// `store`: an inherited descriptor of the store's file; nil: one that ends with this process.
            case swap(SwapDisk.Options, store: Int32?)
            case shared(SharedDisk.Options)
        }
        public enum Endpoint: Sendable, Equatable {
            case path(String)
            /// A descriptor that the process inherited: listening, or connected.
            case descriptor(Int32)
        }
        public let kind: Kind
        public let endpoint: Endpoint

        public init(kind: Kind, endpoint: Endpoint) {
            self.kind = kind
            self.endpoint = endpoint
        }

        /// `TYPE,key=value,…` as `--device` takes it.
        public init(parsing text: String) throws(QuireError) {
            let parts = text.split(separator: ",", omittingEmptySubsequences: false).map(String.init)
            var options: [String: String] = [:]
            for part in parts.dropFirst() {
                guard let equals = part.firstIndex(of: "=") else {
                    throw QuireError(.invalid, "--device \(text): '\(part)' is no key=value")
                }
                guard options.updateValue(String(part[part.index(after: equals)...]), forKey: String(part[..<equals])) == nil
                else { throw QuireError(.invalid, "--device \(text): \(part[..<equals]) is given twice") }
            }
            func take(_ key: String) -> String? { options.removeValue(forKey: key) }
            func number(_ key: String, in range: ClosedRange<Int>, or value: Int) throws(QuireError) -> Int {
                guard let text = take(key) else { return value }
                guard let number = Int(text), range.contains(number) else {
                    throw QuireError(.invalid, "--device: \(key)=\(text): choose \(range.lowerBound) to \(range.upperBound)")
                }
                return number
            }
            switch (take("socket"), take("fd")) {
            case (let path?, nil): endpoint = .path(path)
            case (nil, let number?):
                guard let raw = Int32(number), raw >= 0 else {
                    throw QuireError(.invalid, "--device: fd=\(number) is no descriptor")
                }
                endpoint = .descriptor(raw)
            default: throw QuireError(.invalid, "--device \(text): give one of socket=PATH and fd=N")
            }
            switch parts[0] {
            case "control": kind = .control
            case "file":
                guard let path = take("path") else { throw QuireError(.invalid, "--device \(text): path=FILE is missing") }
                let readOnly = take("read-only") ?? "off"
                guard readOnly == "on" || readOnly == "off" else {
                    throw QuireError(.invalid, "--device: read-only=\(readOnly): choose on or off")
                }
                let block = try number("block", in: 512...4096, or: 4096)
                guard block == 512 || block == 4096 else {
                    throw QuireError(.invalid, "--device: block=\(block): choose 512 or 4096")
                }
                kind = .file(
                    path: path, isReadOnly: readOnly == "on", queueCount: try number("queues", in: 1...64, or: 1),
                    serial: take("serial") ?? "quire-file", blockBytes: UInt32(block))
            case "swap":
                guard let size = take("size") else { throw QuireError(.invalid, "--device \(text): size=SIZE is missing") }
                var swap = SwapDisk.Options(byteCount: try SwapDisk.checkSize(Size.parse(size), "--device: size=\(size)"))
                swap.queueCount = try number("queues", in: 1...64, or: 1)
                if let factor = take("overcommit") {
                    swap.overcommit = try SwapDisk.checkOvercommit(Double(factor), "--device: overcommit=\(factor)")
                }
                if let name = take("compression") { swap.compression = try SwapDisk.compression(name) }
                if let bytes = take("reserve") { swap.reserve = try SwapDisk.checkReserve(Size.parse(bytes), "--device: reserve=\(bytes)") }
                let awaits = take("awaits-restore") ?? "off"
                guard awaits == "on" || awaits == "off" else {
                    throw QuireError(.invalid, "--device: awaits-restore=\(awaits): choose on or off")
                }
                swap.awaitsRestore = awaits == "on"
                let fd = take("tmem-fd")
                let raw = fd.flatMap { Int32($0) }
                guard fd == nil || raw ?? -1 >= 0 else { throw QuireError(.invalid, "--device: tmem-fd=\(fd!) is no descriptor") }
                kind = .swap(swap, store: raw)
            case "shared":
                guard let name = take("name") else { throw QuireError(.invalid, "--device \(text): name=DISK is missing") }
                var shared = SharedDisk.Options(
                    name: name, path: take("quired") ?? SharedDiskClient.path(besideStore: StoreLink.standardPath()))
                shared.group = take("group") ?? ""
                shared.queueCount = try number("queues", in: 1...64, or: 1)
                if let pages = take("pages"), let id = take("id") {
                    guard let pages = UInt64(pages), let id = UInt64(id, radix: 16), pages > 0, pages <= 1 << 31 else {
                        throw QuireError(.invalid, "--device \(text): pages and id are what quire run was told")
                    }
                    shared.identity = SharedDiskMessage.Welcome(pages: pages, id: id)
                }
                if let token = take("token") { shared.token = UInt64(token, radix: 16) ?? 0 }
                if let text = take("known") {
                    guard let known = SharedDisk.Known(text) else { throw QuireError(.invalid, "--device: known=\(text): give the id of a content, or any") }
                    shared.known = known
                }
                kind = .shared(shared)
            default: throw QuireError(.invalid, "--device \(text): unknown type '\(parts[0])', choose control, file, swap or shared")
            }
            if let unknown = options.keys.sorted().first {
                throw QuireError(.invalid, "--device \(text): unknown option '\(unknown)'")
            }
        }
    }

    /// Guest RAM that this side owns (DESIGN, "Guest RAM").
    public enum RAM: Sendable, Equatable {
        /// A memory file that whoever started us made; QEMU inherits it, too.
        case descriptor(Int32)
        /// One that we make; QEMU opens it through a link.
        case create(byteCount: UInt64, link: String)

        /// `fd=N` or `size=SIZE,link=PATH`.
        public init(parsing text: String) throws(QuireError) {
            var options: [String: String] = [:]
            for part in text.split(separator: ",") {
                let pair = part.split(separator: "=", maxSplits: 1).map(String.init)
                guard pair.count == 2 else { throw QuireError(.invalid, "--ram \(text): '\(part)' is no key=value") }
                options[pair[0]] = pair[1]
            }
            if options.count == 1, let number = options["fd"], let raw = Int32(number), raw >= 0 {
                self = .descriptor(raw)
            } else if options.count == 2, let size = options["size"], let link = options["link"] {
                guard let bytes = Size.parse(size), bytes > 0, bytes % pageBytes == 0 else {
                    throw QuireError(.invalid, "--ram \(text): size=\(size) is no size in whole pages of 4 KiB")
                }
                self = .create(byteCount: bytes, link: link)
            } else {
                throw QuireError(.invalid, "--ram \(text): give fd=N, or size=SIZE,link=PATH")
            }
        }
    }

    public struct Options: Sendable {
        public var name = ""
        public var devices: [Device] = []
        public var ram: [RAM] = []
        public var pageMap: Int32?
        public var statusPath: String?
        /// Where `quire` reaches us.
        public var commandPath: String?
        /// Where quired listens.
        public var store = StoreLink.standardPath()
        /// The read end of a pipe whose other end only the supervisor holds.
        public var supervisor: Int32?
        /// For QEMU 9.1 and later: more than 8 regions of memory.
        public var offersMemorySlots = false
        /// See `RecycleEngine.Pause.notAtomic`.
        public var guestIsNotAtomic = false
        /// The host's configuration wants nothing merged; the agent is there, for when it does again.
        public var startsUnmerged = false
        public var engine: RecycleEngine.Configuration
        /// Merging; nil: there is no agent in QEMU.
        public var merging: Merging?
        public init(engine: RecycleEngine.Configuration) { self.engine = engine }
    }

    /// What merging needs besides the guest's memory.
    public struct Merging: Sendable {
        /// Where the agent in QEMU connects to.
        public var agentSocket: String
        /// The share group; empty: that of the VM's owner.
        public var group = ""
        public var engine: DedupEngine.Configuration
        public init(agentSocket: String, engine: DedupEngine.Configuration) {
            self.agentSocket = agentSocket
            self.engine = engine
        }
    }

    private let options: Options
    private let logger: Logger
    private let map: PageMap
    private let pages: MergedPages
    private let link: AgentLink?
    private let store: StoreLink?
    private let dedup: DedupEngine?
    private let engine: RecycleEngine
    private let disk: ControlDisk
    private let swap: SwapDisk?
    private let swapQuota: TmemQuotaLink?
    private let servers: [Server]
    private let links: [String]
    /// Keeps owned RAM alive and its descriptors open.
    private let ram: RAMFiles
    private let isEnding = Monitor(false)
    private let started = monotonicNanoseconds()

    private struct RAMFiles: ~Copyable, Sendable { var files: [OwnedFile] }
    private final class OwnedFile: Sendable {
        let descriptor: Descriptor
        init(_ descriptor: consuming Descriptor) { self.descriptor = descriptor }
    }

    /// Opens everything; the sockets listen when this returns. Every error says what to do.
    public init(_ options: Options, logger: Logger) throws(QuireError) {
        guard options.devices.count(where: { $0.kind == .control }) <= 1 else {
            throw QuireError(.invalid, "a VM has one control disk: give --device control once")
        }
        guard options.devices.count(where: { if case .swap = $0.kind { true } else { false } }) <= 1 else {
            throw QuireError(.invalid, "a VM has one swap disk: give --device swap once")
        }
        var files: [OwnedFile] = []
        var links: [String] = []
        for entry in options.ram {
            switch entry {
            case .descriptor(let raw):
                let descriptor = try Self.inherit(raw, "--ram fd=\(raw)")
                guard try Memfd.kind(of: descriptor.raw) == .shmem else {
                    throw QuireError(.invalid, "--ram fd=\(raw) is not a memory file without huge pages")
                }
                files.append(OwnedFile(descriptor))
            case .create(let bytes, let link):
                let file = OwnedFile(try Memfd(name: "quire-ram", byteCount: bytes).takeDescriptor())
                let target = "/proc/\(getpid())/fd/\(file.descriptor.raw)"
                if let old = Files.target(ofLink: link), old.hasPrefix("/proc/") { Files.remove(link) }
                guard unsafe symlink(target, link) == 0 else { throw .system("cannot create the link \(link)") }
                links.append(link)
                files.append(file)
            }
        }
        if let raw = options.pageMap {
            map = try PageMap(Self.inherit(raw, "--page-map-fd \(raw)"))
        } else {
            map = try PageMap(PageMap.makeFile())
        }
        map.takeOver(pid: getpid())
        pages = MergedPages(map: map)
        // Where nobody merges and nobody has merged the bytes are in the memory files, and looking for them costs nothing.
        let lookedUp = options.merging != nil || map.mayHaveMerged ? pages : nil
        engine = try RecycleEngine(options.engine, map: map)
        engine.setPaused(.notAtomic, options.guestIsNotAtomic)
        let frontEnds = FrontEnds()
        if let merging = options.merging {
            link = try AgentLink(
                path: merging.agentSocket, pages: pages, userfault: try? Descriptor.open("/dev/userfaultfd", O_RDWR),
                logger: logger, peer: { frontEnds.peer })
            store = StoreLink(
                path: options.store, name: options.name, group: merging.group, map: map, link: link!, logger: logger)
            if options.startsUnmerged { map.isUnmerged = true }
            dedup = try DedupEngine(merging.engine, pages: pages, merger: link!, store: store!)
            engine.setRecycler(link)
        } else {
            link = nil
            store = nil
            dedup = nil
        }
        disk = ControlDisk(engine: engine, dedup: dedup, map: map, logger: logger)
        engine.setLook { [disk, link] in disk.look($0, link) }
        var swap: SwapDisk?
        var swapQuota: TmemQuotaLink?
        var servers: [Server] = []
        for device in options.devices {
            var logger = logger
            let block: VirtioBlock
            switch device.kind {
            case .control:
                logger[metadataKey: "device"] = "control"
                block = VirtioBlock(storage: disk, queueCount: 1, lifecycle: disk, logger: logger)
            case .file(let path, let isReadOnly, let queueCount, let serial, let blockBytes):
                logger[metadataKey: "device"] = "\(serial)"
                let storage = try FileStorage(
                    path: path, isReadOnly: isReadOnly, serial: serial, logicalBlockBytes: blockBytes)
                block = VirtioBlock(storage: storage, queueCount: queueCount, logger: logger)
            case .swap(let chosen, let raw):
                logger[metadataKey: "device"] = "swap"
                let file: Descriptor
                if let raw { file = try Self.inherit(raw, "tmem-fd=\(raw)") } else {
                    file = try Tmem.makeFile(name: "quire-swap")
                    logger.warning("what the guest swaps dies with this process, and the guest's memory with it: pass tmem-fd=N, as quire run does")
                }
                let quota = TmemQuotaLink(path: options.store, name: options.name, logger: logger)
                let storage = try SwapDisk(chosen, store: Tmem(file, chosen.store, quota: quota), client: options.name, logger: logger)
                swapQuota = quota
                block = VirtioBlock(storage: storage, queueCount: chosen.queueCount, lifecycle: storage, logger: logger)
                swap = storage
            case .shared(var chosen):
                chosen.vm = options.name
                logger[metadataKey: "device"] = "\(chosen.name)"
                let log = logger
                let storage = try SharedDisk(chosen, map: map) { log.warning("\($0)") }
                block = VirtioBlock(storage: storage, queueCount: chosen.queueCount, lifecycle: storage, logger: logger)
            }
            let socket: UnixSocket
            switch device.endpoint {
            case .path(let path): socket = try UnixSocket.listen(at: path)
            case .descriptor(let raw): socket = UnixSocket(adopting: try Self.inherit(raw, "descriptor \(raw)"))
            }
            servers.append(
                try Server(
                    socket: socket, device: block, logger: logger,
                    features: options.offersMemorySlots ? .supported : .supportedWithoutMemorySlots, pages: lookedUp))
        }
        self.servers = servers
        self.swap = swap
        self.swapQuota = swapQuota
        frontEnds.set(servers)
        link?.setPeers(Set(servers.compactMap(\.owner)))
        self.links = links
        self.ram = RAMFiles(files: files)
        self.options = options
        self.logger = logger
    }

    /// Takes over a descriptor that the command line names.
    private static func inherit(_ raw: Int32, _ what: String) throws(QuireError) -> Descriptor {
        guard fcntl(raw, F_GETFD) >= 0 else { throw QuireError(.invalid, "\(what): no such descriptor was passed") }
        _ = cloexec(raw)
        return Descriptor(owning: raw)
    }
    private static func cloexec(_ raw: Int32) -> Int32 { fcntl(raw, F_SETFD, FD_CLOEXEC) }

    /// Serves until a signal asks to end, until every connected (not listening) socket has lost its front end, or until
    /// the supervisor and the front end are both gone. Guest memory is left alone when this returns.
    public func run() throws(QuireError) {
        let signals = try SignalDescriptor([SIGTERM, SIGINT, SIGHUP])
        ProcessCalls.ignoreBrokenPipes()
        let finished = try EventDescriptor()
        let finishedRaw = finished.descriptor.raw
        let counter = Counter(servers.count)
        for (number, server) in servers.enumerated() {
            _ = try JoinableThread("device-\(number)") {
                server.run()
                if counter.decrement() == 0 { EventDescriptor.signal(finishedRaw) }
            }
        }
        let commands: CommandSocket.Server? =
            if let path = options.commandPath {
                try CommandSocket.Server(path: path, logger: logger) { [self] request throws(QuireError) in
                    try carryOut(&request)
                }
            } else { nil }
        let heart = try JoinableThread("heartbeat") { [self] in beat() }
        let reporter = try JoinableThread("status") { [self] in report() }
        var watched = [signals.descriptor.raw, finishedRaw]
        if let supervisor = options.supervisor { watched.append(supervisor) }
        var isOrphaned = false
        var idleSince = monotonicNanoseconds()
        loop: while true {
            if servers.contains(where: \.isConnected) { idleSince = monotonicNanoseconds() }
            if isOrphaned, monotonicNanoseconds() - idleSince > 5_000_000_000 { break }
            for index in waitReadable(watched, timeoutMilliseconds: isOrphaned ? 1000 : -1) {
                switch index {
                case 0:
                    if let event = signals.next() {
                        logger.info("signal \(event.number): ending")
                        break loop
                    }
                case 1: break loop
                default:
                    // Nobody would rescue a guest that waits for us: claim nothing any more, and go when QEMU has gone.
                    logger.error("the supervisor is gone: recycling stops")
                    engine.setPaused(.unsupervised, true)
                    dedup?.setPaused(.unsupervised, true)
                    watched.removeLast()
                    isOrphaned = true
                }
            }
        }
        commands?.end()
        engine.end()
        dedup?.end()
        link?.end()
        isEnding.update { $0 = true }
        heart.join()
        reporter.join()
        for link in links { Files.remove(link) }
    }

    private static let useQuestion = "in-use"

    /// Whether a QEMU is connected to a VM's backend.
    package static func isInUse(_ name: String, in directory: RuntimeDirectory) throws(QuireError) -> Bool {
        try CommandSocket.ask(useQuestion, of: name, in: directory, patienceMilliseconds: 5000) != "no"
    }

    private static let unmergedQuestion = "is-unmerged"

    /// Whether somebody wants nothing of a VM merged.
    package static func isUnmerged(_ name: String, in directory: RuntimeDirectory) throws(QuireError) -> Bool {
        try CommandSocket.ask(unmergedQuestion, of: name, in: directory, patienceMilliseconds: 5000) == "yes"
    }

    /// What `quire unmerge` waits for.
    private static let unmergeNanoseconds: UInt64 = 55_000_000_000

    private func carryOut(_ request: inout CommandSocket.Request) throws(QuireError) -> String {
        let words = request.text.split(separator: " ").map(String.init)
        switch words.first {
        case "unmerge", "merge":
            guard let dedup else { throw QuireError(.unsupported, "nothing is merged: QEMU was started without the agent") }
            if words[0] == "merge" { dedup.resume() } else {
                try dedup.unmerge(until: monotonicNanoseconds() + Self.unmergeNanoseconds)
            }
            return ""
        case Self.useQuestion: return servers.contains(where: \.isConnected) ? "yes" : "no"
        case Self.unmergedQuestion: return map.isUnmerged ? "yes" : "no"
        case "tmem":
            guard let swap else { throw QuireError(.unsupported, "it has no transcendent memory: start it with quire run --swap SIZE") }
            return try TmemCommand(parsing: words.dropFirst()).carryOut(on: swap, &request)
        case Tuning.command:
            try tune(Tuning(parsing: request.text.dropFirst(Tuning.command.count)))
            return ""
        default: throw QuireError(.unsupported, "this backend does not know the command '\(request.text)'")
        }
    }

    private func tune(_ tuning: Tuning) throws(QuireError) {
        if let level = tuning.logLevel.flatMap({ Logger.Level(rawValue: $0) }) {
            // All copies of this logger have one level (`Logger.adjustable`).
            var logger = logger
            logger.logLevel = level
        }
        if let place = tuning.place {
            store?.move(to: place)
            swapQuota?.move(to: place.path)
        }
        try engine.setPeriod(milliseconds: tuning.periodMilliseconds)
        if let workers = tuning.workers { try engine.setWorkers(workers) }
        if let dedup {
            try dedup.setPeriod(milliseconds: tuning.mergePeriodMilliseconds)
            if let workers = tuning.mergeWorkers { try dedup.setWorkers(workers) }
            if let tracks = tuning.tracksWrites { try dedup.setTracksWrites(tracks) }
            // Pages come back at their own pace: it is no more than what un-merging a VM takes.
            if let merges = tuning.merges { if merges { dedup.resume() } else { dedup.beginUnmerge() } }
        }
        // Last: a limit below what is there already is refused.
        if let swap, let wanted = tuning.swap { try swap.tune(wanted) }
    }

    /// The processes that our devices' front ends are.
    private final class FrontEnds: Sendable {
        private let servers = Mutex<[Server]>([])
        func set(_ servers: [Server]) { self.servers.withLock { $0 = servers } }
        var peer: AgentLink.Peer? {
            servers.withLock { $0.lazy.compactMap(\.peer).first.map { AgentLink.Peer(pid: $0.pid, uid: $0.uid) } }
        }
    }

    private final class Counter: Sendable {
        private let value: Atomic<Int>
        init(_ value: Int) { self.value = Atomic(value) }
        func decrement() -> Int { value.subtract(1, ordering: .acquiringAndReleasing).newValue }
    }

    // MARK: - Heartbeat and status

    /// A claim or a message that takes longer than this stops the heart: the supervisor then ends the process.
    private static let stuckNanoseconds: UInt64 = 400_000_000

    private var isStuck: Bool {
        let now = monotonicNanoseconds()
        // Claims from before our time are a dead process's: they wait for QEMU to say which guest runs.
        return map.openClaims.contains { $0.since >= started && now > $0.since && now - $0.since > Self.stuckNanoseconds }
            || servers.contains { $0.handlingNanoseconds > Self.stuckNanoseconds }
    }

    /// The heart beats in memory, and its thread does nothing else: the status page may lie on a disk that is slow.
    private func beat() {
        while !isEnding.read({ $0 }) {
            if !isStuck { map.beat() }
            // Waking up is nearly all that an idle back end costs, and without a claim nobody looks so closely.
            ProcessCalls.sleep(milliseconds: map.openClaims.isEmpty ? 250 : 100)
        }
    }

    private func report() {
        guard let path = options.statusPath else { return reviewUntilTheEnd() }
        do throws(QuireError) {
            let page = try StatusPage.Writer(path: path, name: options.name, pid: getpid())
            var rate = RateWindow()
            var merging = MergeReport()
            while !isEnding.read({ $0 }) {
                let milliseconds = engine.configuration.periodMilliseconds
                page.setPeriod(milliseconds: milliseconds)
                let period = max(UInt64(milliseconds) * 1_000_000, 1_000_000_000)
                rate.nanoseconds = period
                merging.setRate(nanoseconds: period)
                // Every second; with a shorter period, every period.
                let interval = UInt64(min(1000, max(100, milliseconds))) * 1_000_000
                update(page, &rate)
                reviewQuota()
                if let swap { page.setTmem(swap.snapshot) }
                if dedup != nil { updateMerging(page, &merging) }
                page.beat()
                _ = isEnding.wait(until: monotonicNanoseconds() + interval) { $0 ? () : nil }
            }
        } catch {
            logger.error("no status page: \(error)")
        }
    }

    /// What a report does besides, where there is nobody to report to.
    private func reviewUntilTheEnd() {
        while isEnding.wait(until: monotonicNanoseconds() + 1_000_000_000, { $0 ? () : nil }) == nil { reviewQuota() }
    }
    private func reviewQuota() {
        if let swap, let swapQuota, swapQuota.isReviewDue { swap.review() }
    }

    private static let silence = "no guest is running; if one is, QEMU has lost track of its control disk (cured in QEMU 9.1): start the VM anew"
    private var isControlSilent: Bool {
        zip(options.devices, servers).contains { device, server in
            if case .control = device.kind { return server.isSilent }
            return false
        }
    }

    private func update(_ page: borrowing StatusPage.Writer, _ rate: inout RateWindow) {
        let statistics = engine.snapshot
        let now = monotonicNanoseconds()
        if let memory = disk.memory {
            page.setRAM(bytes: memory.byteCount, resident: RecycleEngine.residentPages(memory) * pageBytes)
        } else {
            let files = ram.files.compactMap { try? $0.descriptor.status() }
            page.setRAM(
                bytes: files.reduce(0) { $0 + $1.byteCount }, resident: files.reduce(0) { $0 + $1.allocatedBytes })
        }
        page.setRecycled(
            now: UInt64(statistics.recycledNowPages), total: statistics.recycledTotalPages,
            rateMillipages: rate.add(statistics.recycledTotalPages, at: now))
        page.setGuest(
            freeMarkedPages: UInt64(statistics.markedPages), waits: statistics.waits,
            refilledPages: statistics.refilledPages)
        let state: RecycleState =
            switch statistics.phase {
            case .idle: .noGuest
            case .active: .active
            case .paused: .paused
            case .refused: .refused
            }
        page.setState(state, reason: state == .noGuest && isControlSilent ? Self.silence : statistics.reason)
        page.setCosts(cpuNanoseconds: processCPUNanoseconds(), mapBytes: map.allocatedBytes)
        page.setUpdated(nanoseconds: now)
    }
}

/// Whether the page store has no room: that is said for a minute after the last page that found none, since people look
/// seldom.
struct StoreFullness: Sendable {
    private static let saidFor: UInt64 = 60_000_000_000
    private var refused: UInt64?
    private var lastAt: UInt64?

    mutating func isFull(_ figures: StoreFigures, _ now: UInt64) -> Bool {
        // Those from before our time are nobody's news.
        if figures.sharedPages >= figures.limitPages || figures.full > refused ?? figures.full { lastAt = now }
        refused = figures.full
        return lastAt.map { now - $0 < Self.saidFor } ?? false
    }
}

/// What is kept from one report of merging to the next.
struct MergeReport: Sendable {
    var merged = RateWindow()
    var folded = RateWindow()
    var fullness = StoreFullness()
    private var askedAt: UInt64 = 0
    private var movedPages: UInt64 = 0

    mutating func setRate(nanoseconds: UInt64) {
        merged.nanoseconds = nanoseconds
        folded.nanoseconds = nanoseconds
    }

    /// Whether quired is to be asked for the group's figures: at once where pages came or went here, and otherwise so seldom
    /// that hundreds of quiet VMs cost it nothing.
    mutating func isFiguresDue(_ statistics: DedupEngine.Statistics, _ now: UInt64) -> Bool {
        let moved = statistics.mergedPages + statistics.foldedPages
        guard moved != movedPages || now - askedAt > Self.quietNanoseconds else { return false }
        (movedPages, askedAt) = (moved, now)
        return true
    }
    private static let quietNanoseconds: UInt64 = 10_000_000_000
}

extension BackendProcess {
    private func updateMerging(_ page: borrowing StatusPage.Writer, _ report: inout MergeReport) {
        guard let dedup else { return }
        let statistics = dedup.snapshot
        let now = monotonicNanoseconds()
        var snapshot = MergeSnapshot()
        snapshot.state =
            switch statistics.phase {
            case .idle: .idle
            case .active: .active
            case .paused: .paused
            }
        snapshot.reason = statistics.reason
        snapshot.periodMilliseconds = dedup.configuration.periodMilliseconds
        snapshot.sharingPages = statistics.sharingPages
        snapshot.zeroPages = statistics.zeroPages
        snapshot.divergedPages = statistics.divergedPages
        snapshot.hashedTotalPages = statistics.hashedPages
        snapshot.mergedTotalPages = statistics.mergedPages
        snapshot.foldedTotalPages = statistics.foldedPages
        snapshot.mergedRateMillipages = report.merged.add(statistics.mergedPages, at: now)
        snapshot.foldedRateMillipages = report.folded.add(statistics.foldedPages, at: now)
        snapshot.mappings = statistics.mappings
        snapshot.mappingLimit = statistics.mappingLimit
        if report.isFiguresDue(statistics, now) { store?.askForFigures(zeroPages: statistics.zeroPages) }
        if statistics.sharingPages > 0, let figures = store?.figures {
            snapshot.groupSharedPages = figures.sharedPages
            snapshot.groupSharingPages = figures.sharingPages
            snapshot.groupSavedBytes = figures.savedBytes
            snapshot.groupHistogram = figures.histogram
            if snapshot.reason.isEmpty, report.fullness.isFull(figures, now) {
                snapshot.reason = "the page store is full (quired --limit): no content is shared that it does not have"
            }
        }
        if snapshot.state == .active, snapshot.reason.isEmpty, statistics.readsEverything {
            snapshot.reason = dedup.configuration.tracksWrites
                ? "all of memory is read to find what the guest writes: this kernel does not tell it (Linux 6.7 does)"
                : "all of memory is read to find what the guest writes (--no-write-tracking)"
        }
        page.setMerging(snapshot)
    }
}

/// Turns a counter into a rate over a sliding window.
struct RateWindow: Sendable {
    var nanoseconds: UInt64 = 1_000_000_000
    private var samples: [(time: UInt64, count: UInt64)] = []

    /// Notes a sample; returns the rate over the window, in thousandths a second.
    mutating func add(_ count: UInt64, at time: UInt64) -> UInt64 {
        samples.append((time, count))
        while samples.count > 2, time - samples[1].time >= nanoseconds { samples.removeFirst() }
        guard let first = samples.first, time > first.time, count >= first.count else { return 0 }
        return UInt64(Double(count - first.count) * 1e12 / Double(time - first.time))
    }
}
