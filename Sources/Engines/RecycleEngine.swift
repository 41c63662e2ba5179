import CQuireLayout
import GuestMemory
import Platform
import Synchronization

/// Gives back what the guest freed. After PPR (Dynamic VM, 2017); state protocol in quire_layout.h, part 2.
///
/// # What it must guarantee
///
/// 1. *A page in use is never discarded.* A page is punched only between a compare-exchange of its state byte from a mark
///    to CLAIMED, which fails if the guest has taken the page, and the store of RECYCLED; a guest that wants a claimed page
///    waits. So no alias of the page (QEMU's, vhost's, a disk's DMA) can be in use: nobody was given it.
/// 2. *A stale mark is never acted on.* The table is believed only while the device that it was registered with has not
///    been reset: `stop` joins every worker before the front end is answered, and a registration that was stored in the
///    page map comes back to life only under the same nonce (see `DeviceStart.nonce`).
/// 3. *A claim never outlives its owner unnoticed.* It is in the journal before the first byte changes. A new process
///    finishes the claims of a dead one, and only under the same nonce; under another it forgets them, because the memory
///    belongs to a new kernel.
/// 4. *A waiting guest waits microseconds.* At most 64 pages are claimed at once, fewer when the guest has met a claim or
///    when punching is slow.
/// 5. *What is merged is recycled by the agent only.* A merged page's bytes are not in the memory file, so punching there
///    gives nothing back, and RECYCLED would promise zeros: QEMU's mapping must change, too. Without an agent it is left
///    alone; it costs no memory of its own while it is equal. From before a claim of ours until the page map says `hole` the
///    range lock is held, so that nothing is merged in between.
/// 6. *Nothing costs when nothing changes.* A pass learns how old the oldest mark is, and the next pass waits until that
///    one is due; with no marks at all, a whole period.
///
/// # Who claims
///
/// The agent in QEMU, where there is one (`PageRecycler`): it is told which parts of the table hold marks that are due, and
/// does the rest. A guest that waits for it waits for a thread of its own QEMU. Otherwise this process claims, and whoever
/// started it watches that it does not freeze. There is one rule for both: a pass is not over while a claim may be open, and
/// the front end is not answered before the pass is over. If this process dies, its own claims are in the journal; the
/// agent's are finished by the agent, and QEMU does not see that we are dead before they are.
///
/// # Time
///
/// The epoch ticks every min(period / 8, 1 s). A mark of epoch e was stored somewhere within tick e, so it is a period old
/// for certain once `now - e` exceeds the ticks of a period. Epochs wrap after 253 ticks; a wrap only misjudges age.
///
/// # Threads
///
/// One coordinator ticks, scans, and recycles. When a pass turns out to be long it lends the rest of the table, page by
/// page, to helpers. Every table page is looked at by one thread at a time. Control (`register`, `start`, `stop`, …) comes
/// from the device's threads and goes through the monitor; `stop` returns when no thread is inside a pass.
public final class RecycleEngine: Sendable {
    public struct Configuration: Sendable, Equatable {
        /// How long a page must have been free, in milliseconds.
        public var periodMilliseconds: UInt32
        /// Threads that recycle, the coordinator included.
        public var workers: Int

        public init(periodMilliseconds: UInt32 = 10_000, workers: Int = 1) throws(QuireError) {
            guard (10...86_400_000).contains(periodMilliseconds) else {
                throw QuireError(.invalid, "a period of \(periodMilliseconds) ms: choose 10 ms to 24 h")
            }
            guard (1...PageMap.workerCount).contains(workers) else {
                throw QuireError(.invalid, "\(workers) workers: choose 1 to \(PageMap.workerCount)")
            }
            self.periodMilliseconds = periodMilliseconds
            self.workers = workers
        }

        /// Nanoseconds between two epochs. Long periods tick slower, so that a period fits into the 253 epochs.
        var tickNanoseconds: UInt64 {
            let period = UInt64(periodMilliseconds) * 1_000_000
            return max(min(period / 8, 1_000_000_000), period / 240)
        }

        /// Ticks after which a mark is a period old: one more than the period holds, for a mark from the end of its tick.
        var dueAge: Int {
            let period = UInt64(periodMilliseconds) * 1_000_000
            return Int((period + tickNanoseconds - 1) / tickNanoseconds) + 1
        }
    }

    /// Reasons to leave guest memory alone although a table is registered.
    public struct Pause: OptionSet, Sendable {
        public let rawValue: Int
        public init(rawValue: Int) { self.rawValue = rawValue }
        /// The front end logs dirty pages: a punch changes a page behind its back, and so would an epoch.
        public static let dirtyLogging = Pause(rawValue: 1)
        /// Nobody would notice if this process froze while a guest waits for it.
        public static let unsupervised = Pause(rawValue: 2)
        /// Nobody would start the device for our successor: a guest that waits for a claim would wait for ever.
        public static let unnoticed = Pause(rawValue: 4)
        /// Whoever locked the memory wants it resident.
        public static let locked = Pause(rawValue: 8)
        /// QEMU emulates one CPU at a time, and then the guest's compare-exchange is a load and a store: a claim that falls
        /// in between is overlooked.
        public static let notAtomic = Pause(rawValue: 16)
        /// A device was told where all of guest RAM is, and writes to the pages that were there then.
        public static let assigned = Pause(rawValue: 32)

        var reason: String {
            if contains(.dirtyLogging) { return "paused: the guest's memory is being logged for migration" }
            if contains(.notAtomic) {
                return "paused: QEMU emulates one CPU at a time, so the guest's atomic operations are none for the host: use "
                    + "KVM, or -accel tcg,thread=multi with at least -smp 2"
            }
            if contains(.locked) { return "paused: QEMU has its memory locked or pinned, start it without mem-lock=on and VFIO devices" }
            if contains(.assigned) { return "paused: a device that may write to all of the guest's memory is in use (VFIO, vDPA, RDMA, libblkio)" }
            if contains(.unsupervised) { return "paused: the supervisor is gone" }
            return "paused: QEMU has lost track of its control disk (cured in QEMU 9.1), start the VM anew to recycle again"
        }
    }

    public enum Phase: Sendable, Equatable {
        /// No table: no guest, or a guest without the module.
        case idle
        case active
        case paused
        /// The guest's table was refused, or dropped because it broke the protocol.
        case refused
    }

    public struct Statistics: Sendable {
        public var phase = Phase.idle
        public var reason = ""
        /// Guest physical address of the registered table's header; 0 without one.
        public var headerAddress: UInt64 = 0
        public var recycledNowPages = 0
        public var recycledTotalPages: UInt64 = 0
        /// Since this registration.
        public var recycledPages: UInt64 = 0
        /// Marked free at the last pass, and not due then.
        public var markedPages = 0
        public var refilledPages: UInt64 = 0
        public var waits: UInt64 = 0
        public var passes: UInt64 = 0
    }

    /// What the device has told us, and what the coordinator is doing. Guarded by the monitor.
    private struct Control {
        var configuration: Configuration
        var start: (memory: GuestMemory, rings: [Range<UInt64>], nonce: UInt64, connection: Int32?)?
        /// Who claims for us.
        var recycler: (any PageRecycler)?
        var table: StateTable?
        var pause: Pause = []
        var refusal: String?
        /// The coordinator is inside a pass; `table` must stay.
        var isBusy = false
        var isEnding = false
        /// What may have come about since: asked before each pass.
        var look: (@Sendable (GuestMemory) -> Pause)?
        /// What it said last.
        var found: Pause = []
        /// A registration or resumption that the coordinator has not seen yet.
        var isFresh = false
        var headerAddress: UInt64 = 0
    }

    public var configuration: Configuration { control.read { $0.configuration } }
    private let map: PageMap
    private let control: Monitor<Control>
    /// Who wants the coordinator out of its pass: a count, because one of them may be served while another still waits.
    private let interruptions = Atomic<Int>(0)
    private var isInterrupted: Bool { interruptions.load(ordering: .acquiring) > 0 }
    private let statistics = Mutex(Statistics())
    private let crew: Crew
    private let coordinator = Mutex<JoinableThread?>(nil)

    public init(_ configuration: Configuration, map: PageMap) throws(QuireError) {
        control = Monitor(Control(configuration: configuration))
        self.map = map
        crew = try Crew("recycle", helpers: configuration.workers - 1)
        let thread = try JoinableThread("recycle") { [self] in coordinate() }
        coordinator.withLock { $0 = thread }
    }

    /// Ends the engine: stops, then joins its threads.
    public func end() {
        stop()
        control.update { $0.isEnding = true }
        coordinator.withLock {
            $0?.join()
            $0 = nil
        }
        // It may know us.
        control.update { $0.look = nil }
        crew.end()
    }

    // MARK: - Control

    /// The device runs. If the page map holds a registration under the same nonce, the same guest goes on: claims that a
    /// dead process left are finished, and recycling resumes. Under another nonce whatever was registered is forgotten.
    /// `connection` is what the front end sees the end of when this process dies, open until `stop` has returned; without
    /// it no agent is asked to recycle.
    public func start(memory: GuestMemory, rings: [Range<UInt64>], nonce: UInt64, connection: Int32? = nil) {
        control.update { control in
            control.start = (memory, rings, nonce, connection)
            control.refusal = nil
            guard let registration = map.registration else { return }
            guard registration.nonce == nonce else {
                // Another kernel, or none: the table is gone with the memory that held it.
                map.registration = nil
                map.clearJournal()
                return
            }
            do throws(QuireError) {
                let table = try StateTable(
                    memory: memory, headerAddress: registration.headerAddress, rings: rings, maxPages: map.pageCount)
                finishClaims(in: table)
                activate(table, &control)
            } catch {
                refuse("\(error)", &control)
            }
        }
    }

    /// The device stops. When this returns no thread of the engine touches guest memory, until the next `start`.
    public func stop() {
        interruptions.add(1, ordering: .acquiringAndReleasing)
        _ = control.wait { control -> Void? in
            if control.isBusy { return nil }
            control.start = nil
            control.table = nil
            control.refusal = nil
            return ()
        }
        interruptions.subtract(1, ordering: .acquiringAndReleasing)
        control.update { _ in }
    }

    /// The guest registers its table. Throws `.guest` with the reason if it is refused.
    public func register(headerAddress: UInt64) throws(QuireError) {
        try exchange { (control) throws(QuireError) in
            guard let start = control.start else { throw QuireError(.busy, "the device is being stopped") }
            map.registration = nil
            map.clearJournal()
            do throws(QuireError) {
                let table = try StateTable(
                    memory: start.memory, headerAddress: headerAddress, rings: start.rings, maxPages: map.pageCount)
                map.registration = PageMap.Registration(nonce: start.nonce, headerAddress: headerAddress)
                activate(table, &control)
                statistics.withLock { $0.recycledPages = 0 }
            } catch {
                refuse("\(error)", &control)
                throw error
            }
        }
    }

    /// The guest takes its table back. When this returns the engine does not touch the table any more.
    public func unregister() {
        exchange { control in
            map.registration = nil
            control.table = nil
            control.refusal = nil
        }
    }

    /// Who claims from now on, where he can. Nil: this process.
    public func setRecycler(_ recycler: (any PageRecycler)?) { control.update { $0.recycler = recycler } }

    /// `look` finds reasons that nobody tells. It is called before each pass, by the engine's own thread.
    public func setLook(_ look: @escaping @Sendable (GuestMemory) -> Pause) { control.update { $0.look = look } }

    public func setPaused(_ reason: Pause, _ paused: Bool) {
        exchange { control in
            if paused { control.pause.insert(reason) } else { control.pause.remove(reason) }
        }
    }

    /// How long a page must have been free, from now on. Marks keep their age in ticks, so what is free already goes a little sooner
    /// or later than either period says.
    public func setPeriod(milliseconds: UInt32) throws(QuireError) {
        try exchange { (control) throws(QuireError) in
            control.configuration = try Configuration(periodMilliseconds: milliseconds, workers: control.configuration.workers)
            control.isFresh = true
        }
    }

    /// Threads that recycle, from now on.
    public func setWorkers(_ count: Int) throws(QuireError) {
        let new = try Configuration(periodMilliseconds: configuration.periodMilliseconds, workers: count)
        // Outside of a pass, which could take longer than the asker waits.
        try exchange { (control) throws(QuireError) in
            try crew.setHelpers(count - 1)
            control.configuration = new
        }
    }

    /// Changes control while the coordinator is not inside a pass.
    private func exchange<E: Error>(_ body: (inout Control) throws(E) -> Void) throws(E) {
        interruptions.add(1, ordering: .acquiringAndReleasing)
        defer {
            interruptions.subtract(1, ordering: .acquiringAndReleasing)
            control.update { _ in }
        }
        var result: Result<Void, E> = .success(())
        _ = control.wait { control -> Void? in
            if control.isBusy { return nil }
            do throws(E) { try body(&control) } catch { result = .failure(error) }
            return ()
        }
        try result.get()
    }

    private func activate(_ table: StateTable, _ control: inout Control) {
        control.table = table
        control.refusal = nil
        control.isFresh = true
    }

    private func refuse(_ reason: String, _ control: inout Control) {
        map.registration = nil
        control.table = nil
        control.refusal = reason
    }

    public var snapshot: Statistics {
        let (phase, reason, header, waits) = control.read { control -> (Phase, String, UInt64, UInt64?) in
            if let refusal = control.refusal { return (.refused, refusal, 0, nil) }
            guard let table = control.table else {
                return (.idle, control.start == nil ? "no guest is running" : "no guest module has registered", 0, nil)
            }
            let pause = control.pause.union(control.found)
            if !pause.isEmpty { return (.paused, pause.reason, table.headerAddress, table.waits) }
            return (.active, "", table.headerAddress, table.waits)
        }
        var result = statistics.withLock { $0 }
        result.phase = phase
        result.reason = reason
        result.headerAddress = header
        if header == 0 {
            result.recycledNowPages = 0
            result.markedPages = 0
        }
        if let waits { result.waits = waits }
        result.recycledTotalPages = map.recycledTotal
        return result
    }

    /// Claims of a process that died. Its threads are gone (the front end has connected anew), the guest is the same (the
    /// nonce), and a page that is still CLAIMED is still nobody's: so finish what was begun.
    private func finishClaims(in table: StateTable) {
        for claim in map.openClaims {
            for gfn in claim.gfns {
                let page = Int(gfn) / StateTable.statesPerPage
                let index = Int(gfn) % StateTable.statesPerPage
                guard page < table.pages.count, table.load(page, index) == PageMark.claimed else { continue }
                if (try? punchClaimed(gfn, table.memory)) == true {
                    map.addRecycled(1)
                    table.store(page, index, PageMark.recycled)
                } else {
                    table.store(page, index, PageMark.firstEpoch)
                }
                // Logged, as every write to guest memory: a guest may wait for this claim in the middle of a migration.
                // Afterwards: a bit that is taken before the write sends the old bytes.
                table.memory.log.markDirty(guestAddress: gfn * pageBytes, byteCount: pageBytes)
                if let place = table.pages[page] {
                    table.memory.log.markDirty(guestAddress: place.guestAddress + UInt64(index), byteCount: 1)
                }
            }
        }
        map.clearJournal()
    }

    /// False, with nothing done, for a page that is merged or that has no memory of ours.
    private func punchClaimed(_ gfn: GFN, _ memory: GuestMemory) throws(QuireError) -> Bool {
        guard let region = memory.region(of: gfn) else { return false }
        try map.beginIO(gfn..<gfn + 1)
        defer { map.endIO(gfn..<gfn + 1) }
        guard let state = map.state(of: gfn), !state.isMerged else { return false }
        try Self.punch(gfn..<gfn + 1, in: region)
        return map.move(gfn, from: state, to: .hole)
    }

    @inline(__always)
    private static func punch(_ gfns: Range<GFN>, in region: MemoryRegion) throws(QuireError) {
        let offset = region.fileOffset + (gfns.lowerBound * pageBytes - region.guestAddress)
        try Memfd.punch(region.descriptor.raw, offset: offset, byteCount: UInt64(gfns.count) * pageBytes)
    }

    // MARK: - The coordinator

    private func coordinate() {
        var configuration = self.configuration
        var tick = configuration.tickNanoseconds
        var ticks: UInt64 = 0
        var nextTick = monotonicNanoseconds() + tick
        var nextPass: UInt64 = 0
        var state = PassState(dueAge: configuration.dueAge)

        while true {
            // Take the table, or wait for one. While `isBusy` nobody else changes it.
            let work = control.wait { control -> (table: StateTable, changed: Configuration?, agent: Pass.Agent?)?? in
                if control.isEnding { return .some(nil) }
                guard let table = control.table, control.pause.isEmpty, !self.isInterrupted
                else { return nil }
                control.isBusy = true
                defer { control.isFresh = false }
                return (table, control.isFresh ? control.configuration : nil, Pass.Agent(control.recycler, connection: control.start?.connection))
            }
            guard let (table, changed, agent) = work ?? nil else { return }

            let now = monotonicNanoseconds()
            var failure: QuireError?
            if let changed {
                configuration = changed
                tick = changed.tickNanoseconds
                // Go on from the guest's own epoch: marks that it has made meanwhile keep their age.
                let epoch = table.publishedEpoch ?? PageMark.firstEpoch
                ticks += (UInt64(epoch) &- UInt64(PageMark.epoch(ofTick: ticks)) &+ UInt64(PageMark.epochs))
                    % UInt64(PageMark.epochs)
                state = PassState(dueAge: configuration.dueAge)
                state.loadHoles(table: table, map: map)
                nextTick = now
                nextPass = ticks
            }
            if now >= nextTick {
                ticks += 1
                // After a pause of the process the missed ticks are skipped: marks look younger than they are.
                nextTick = max(nextTick + tick, now + tick / 2)
                table.publish(
                    epoch: PageMark.epoch(ofTick: ticks), ticks: ticks, periodMilliseconds: configuration.periodMilliseconds)
                let found = ticks >= nextPass ? look(table.memory) : []
                if ticks >= nextPass, found.isEmpty {
                    do throws(QuireError) {
                        let oldest = try pass(table, agent, ticks: ticks, &state)
                        nextPass = ticks + UInt64(max(1, configuration.dueAge - oldest))
                    } catch {
                        failure = error
                    }
                }
            }
            control.update { control in
                control.isBusy = false
                if let failure { refuse("dropped: \(failure)", &control) }
            }
            _ = control.wait(until: nextTick) { control -> Void? in
                control.isEnding || control.isFresh || control.table == nil || !control.pause.isEmpty ? () : nil
            }
        }
    }

    private func look(_ memory: GuestMemory) -> Pause {
        let found = control.read { $0.look }?(memory) ?? []
        control.update { $0.found = found }
        return found
    }

    /// What is kept from one pass to the next, for one table.
    struct PassState: Sendable {
        let dueAge: Int
        /// Per table page: entries of the page map that say `hole`.
        var holes: [Int] = []
        var passes: UInt64 = 0
        var batch = Batch()

        init(dueAge: Int) { self.dueAge = dueAge }

        mutating func loadHoles(table: StateTable, map: PageMap) {
            holes = (0..<table.pages.count).map { page in
                let first = UInt64(page * StateTable.statesPerPage)
                guard map.hasEntries(first..<first + UInt64(StateTable.statesPerPage)) else { return 0 }
                return (first..<first + UInt64(StateTable.statesPerPage)).count { map.state(of: $0) == .hole }
            }
        }
    }

    /// One pass over the table. Returns the age, in ticks, of the oldest mark that is not due yet; 0 if there is none.
    private func pass(
        _ table: StateTable, _ agent: Pass.Agent?, ticks: UInt64, _ state: inout PassState
    ) throws(QuireError) -> Int {
        state.passes += 1
        // Recycled pages that somebody filled (a save, a core dump, khugepaged): when a device starts, now and then, and
        // whenever the files hold more than the holes allow for.
        let accounted = Self.residentPages(table.memory) + UInt64(state.holes.reduce(0, +))
        // The files are a little larger than the regions: firmware shadows belong to the file but not to the table.
        let slack: UInt64 = 1024
        let findRefilled =
            state.passes == 1 || state.passes % 64 == 0 || accounted > table.memory.byteCount / pageBytes + slack
        let pass = Pass(
            table: table, map: map, now: PageMark.epoch(ofTick: ticks), dueAge: state.dueAge, holes: state.holes,
            findRefilled: findRefilled, batch: state.batch, agent: agent, cancelled: { self.isInterrupted })
        crew.run(pass)
        let result = pass.result
        state.holes = result.holes
        state.batch = result.batch
        if let failure = result.failure { throw failure }
        let recycledNow = state.holes.reduce(0, +)
        statistics.withLock {
            $0.passes += 1
            $0.recycledPages += UInt64(result.recycled)
            $0.refilledPages += UInt64(result.refilled)
            $0.recycledNowPages = recycledNow
            $0.markedPages = result.marked
        }
        // A pass that was cut short looks again at the next tick.
        return pass.isCancelled ? state.dueAge : result.oldestAge
    }

    /// Pages of the memory's files that the host has allocated.
    public static func residentPages(_ memory: GuestMemory) -> UInt64 {
        var files: [FileStatus.Identity: UInt64] = [:]
        for region in memory.regions where files[region.file] == nil {
            files[region.file] = (try? region.descriptor.status().allocatedBytes) ?? 0
        }
        return files.values.reduce(0, +) / pageBytes
    }
}

/// How many pages are claimed at once. Shrinks when a guest has waited, or when a batch took long; grows back. And how many
/// an agent is asked for at once: a pass cannot be interrupted meanwhile, and asking costs as much as recycling some dozens.
struct Batch: Sendable {
    static let maxPages = PageMap.maxClaimPages
    private static let minPages = 4
    /// A batch that takes longer is halved.
    private static let maxNanoseconds: UInt64 = 150_000

    private static let orderPagesRange = 512...8192
    private static let orderNanoseconds: ClosedRange<UInt64> = 10_000_000...30_000_000

    private(set) var pages = maxPages
    private(set) var orderPages = 4096
    private var waits: UInt64 = 0

    mutating func adapt(nanoseconds: UInt64, full: Bool, waits now: UInt64) {
        if now != waits || nanoseconds > Self.maxNanoseconds {
            pages = max(Self.minPages, pages / 2)
        } else if full {
            pages = min(Self.maxPages, pages * 2)
        }
        waits = now
    }

    mutating func adaptOrder(nanoseconds: UInt64, full: Bool) {
        if nanoseconds > Self.orderNanoseconds.upperBound {
            orderPages = max(Self.orderPagesRange.lowerBound, orderPages / 2)
        } else if full, nanoseconds < Self.orderNanoseconds.lowerBound {
            orderPages = min(Self.orderPagesRange.upperBound, orderPages * 2)
        }
    }
}
