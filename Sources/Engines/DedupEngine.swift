import CQuireLayout
import GuestMemory
import PageContent
import Platform
import Synchronization

/// Keeps equal pages once. After KSM, PageONE and Satori; the mechanism is DESIGN's "Dirty tracking" and "Merge".
///
/// # What it must guarantee
///
/// Nothing about bytes: those are safe whatever it asks for, because whoever replaces a page compares all of it first while
/// nobody can write (the agent, window.c), and because the kernel copies what a guest writes afterwards. What is left to
/// this engine:
///
/// 1. *Work follows change.* A period's pass asks the kernel what was written since the last one; a page is read and
///    hashed once, after it has not been written for two periods, and not again before it is written again. On kernels
///    that cannot tell (before Linux 6.7) all of memory is read again and again instead, at a bounded rate (HashedPages).
/// 2. *Nothing is held for nobody.* Every slot that the store named is reported: as merged, or as released. Whatever else
///    brings pages back (a ring that starts, QEMU's balloon, a reset) shows in the page map, which is looked through from
///    time to time (`settleAccounts`).
/// 3. *It gets out of the way.* Whoever changes control waits for one batch, of at most 1024 pages, never for a pass.
/// 4. *The host can always give back what was saved*, or merging has stopped before (`ContentStore.shortage`).
/// 5. *A guest that works against it costs little.* A page that was merged and written again has to be quiet for twice as
///    long. When mappings get scarce, runs that are short are left alone, and at last all of them.
///
/// # Threads
///
/// One coordinator; helpers where hashing is much. Batches are handed out under a lock; each thread reads, hashes, looks up
/// and merges its own, and the agent does one command at a time.
public final class DedupEngine: Sendable {
    public struct Configuration: Sendable, Equatable {
        /// A page is merged when it was not written for two of these.
        public var periodMilliseconds: UInt32
        /// Threads that hash, the coordinator included.
        public var workers: Int

        /// Whether the kernel is asked what was written, where it can tell; otherwise all of memory is read again and again.
        public var tracksWrites: Bool

        public init(
            periodMilliseconds: UInt32 = 10_000, workers: Int = 1, tracksWrites: Bool = true
        ) throws(QuireError) {
            guard (10...86_400_000).contains(periodMilliseconds) else {
                throw QuireError(.invalid, "a merge period of \(periodMilliseconds) ms: choose 10 ms to 24 h")
            }
            guard (1...16).contains(workers) else { throw QuireError(.invalid, "\(workers) workers: choose 1 to 16") }
            self.periodMilliseconds = periodMilliseconds
            self.workers = workers
            self.tracksWrites = tracksWrites
        }
    }

    /// Reasons to leave everything as it is.
    public struct Pause: OptionSet, Sendable {
        public let rawValue: Int
        public init(rawValue: Int) { self.rawValue = rawValue }
        /// The front end reads all of guest memory anyway, and sends what changes.
        public static let dirtyLogging = Pause(rawValue: 1)
        /// Nobody would replace this process.
        public static let unsupervised = Pause(rawValue: 2)
        /// The guest may run guests of its own: the kernel writes its pages then, unseen.
        public static let nested = Pause(rawValue: 4)

        var reason: String {
            if contains(.dirtyLogging) { return "paused: the guest's memory is being logged for migration" }
            if contains(.nested) {
                return "paused: KVM lets the guest run guests of its own, and writes its pages unseen then: to merge, give it a CPU without (vmx=off, on AMD svm=off)"
            }
            return "paused: the supervisor is gone"
        }
    }

    public enum Phase: Sendable, Equatable {
        /// No guest is running, or no agent is there.
        case idle
        case active
        /// Something stands in the way, or somebody wants it so.
        case paused
    }

    public struct Statistics: Sendable, Equatable {
        public var phase = Phase.idle
        /// Why it is not active, or what is left out while it is.
        public var reason = ""
        /// Guest pages that are mapped to a slot, or diverged from one.
        public var sharingPages: UInt64 = 0
        public var zeroPages: UInt64 = 0
        /// Of both: those that have a copy of their own, as of the last pass.
        public var divergedPages: UInt64 = 0
        /// What the guest writes is found by reading all of its memory.
        public var readsEverything = false
        // Since this process was started.
        public var hashedPages: UInt64 = 0
        public var mergedPages: UInt64 = 0
        public var foldedPages: UInt64 = 0
        /// Runs that were merged, each of which costs QEMU two mappings.
        public var mergedRuns: UInt64 = 0
        public var passes: UInt64 = 0
        public var mappings: UInt64 = 0
        public var mappingLimit: UInt64 = 0
    }

    private struct Control {
        var configuration: Configuration
        var memory: GuestMemory?
        var pause: Pause = []
        var isUnmerged = false
        /// The coordinator is inside a pass.
        var isBusy = false
        var isEnding = false
        /// There is something to look at before the period is over.
        var isFresh = false
        /// Counts unmerges that were carried out.
        var unmerges = 0
        var unmergeFailure: QuireError?
    }

    public var configuration: Configuration { control.read { $0.configuration } }
    private let pages: MergedPages
    private var map: PageMap { pages.map }
    private let merger: any PageMerger
    private let store: any ContentStore
    private let control: Monitor<Control>
    private let interruptions = Atomic<Int>(0)
    private var isInterrupted: Bool { interruptions.load(ordering: .acquiring) > 0 }
    private let statistics = Mutex(Statistics())
    private let crew: Crew
    private let coordinator = Mutex<JoinableThread?>(nil)

    public init(
        _ configuration: Configuration, pages: MergedPages, merger: any PageMerger, store: any ContentStore
    ) throws(QuireError) {
        self.pages = pages
        self.merger = merger
        self.store = store
        control = Monitor(Control(configuration: configuration, isUnmerged: pages.map.isUnmerged))
        crew = try Crew("dedup", helpers: configuration.workers - 1)
        let thread = try JoinableThread("dedup") { [self] in coordinate() }
        coordinator.withLock { $0 = thread }
    }

    /// Ends the engine and joins its threads. What is merged stays merged.
    public func end() {
        exchange { $0.isEnding = true }
        coordinator.withLock {
            $0?.join()
            $0 = nil
        }
        crew.end()
    }

    // MARK: - Control

    /// The guest runs on this memory; nil: it does not run.
    public func setMemory(_ memory: GuestMemory?) {
        exchange {
            $0.memory = memory
            $0.isFresh = true
        }
    }

    public func setPaused(_ reason: Pause, _ paused: Bool) {
        exchange { if paused { $0.pause.insert(reason) } else { $0.pause.remove(reason) } }
    }

    /// A page is merged when it was not written for two of these, from now on; the period that runs ends at once.
    public func setPeriod(milliseconds: UInt32) throws(QuireError) {
        let old = configuration
        let new = try Configuration(periodMilliseconds: milliseconds, workers: old.workers, tracksWrites: old.tracksWrites)
        exchange {
            $0.configuration = new
            $0.isFresh = true
        }
    }

    /// Threads that hash, from now on.
    public func setWorkers(_ count: Int) throws(QuireError) {
        let old = configuration
        let new = try Configuration(periodMilliseconds: old.periodMilliseconds, workers: count, tracksWrites: old.tracksWrites)
        // Outside of a pass, which could take longer than the asker waits.
        try exchange { (control) throws(QuireError) in
            try crew.setHelpers(count - 1)
            control.configuration = new
        }
    }

    /// Whether the kernel is asked what was written, from now on. What is known of pages by then was found the other way, and a write
    /// between the two looks would be in neither: so nothing is known of them any more, and all of memory is hashed once again.
    ///
    /// Nothing has to be told to the agent. It registers guest RAM for write-protect wherever the kernel can do that, asked or not; what
    /// is protected at this moment the kernel lets the guest write by itself, and a page that it protects is one that it has reported.
    public func setTracksWrites(_ tracks: Bool) throws(QuireError) {
        let old = configuration
        guard old.tracksWrites != tracks else { return }
        let new = try Configuration(periodMilliseconds: old.periodMilliseconds, workers: old.workers, tracksWrites: tracks)
        exchange {
            $0.configuration = new
            $0.isFresh = true
        }
    }

    /// Begins to bring every merged page back, and merges nothing any more until `resume`: also after a restart of this process.
    /// What cannot be done is tried again at every period. Returns how many times all was back before.
    @discardableResult public func beginUnmerge() -> Int {
        map.isUnmerged = true
        return control.update { control in
            control.isUnmerged = true
            control.isFresh = true
            control.unmergeFailure = nil
            return control.unmerges
        }
    }

    /// How long a device may take to start again, which belongs to a new process or a QEMU that has just been told to go on.
    private static let startNanoseconds: UInt64 = 5_000_000_000

    /// The same, and returns when it is done. Throws why it cannot be done.
    public func unmerge(until deadline: UInt64) throws(QuireError) {
        let count = beginUnmerge()
        func done(_ control: Control) -> Result<Void, QuireError>? {
            if let failure = control.unmergeFailure { return .failure(failure) }
            return control.unmerges > count || control.memory == nil && !control.isBusy && !map.hasMergedPages ? .success(()) : nil
        }
        let soon = min(deadline, monotonicNanoseconds() + Self.startNanoseconds)
        if let result = control.wait(until: soon, { done($0) }) { return try result.get() }
        try control.read { (control) throws(QuireError) in
            guard control.memory == nil else { return }
            throw QuireError(.busy, "the guest does not run, or is just starting: its pages come back when it runs")
        }
        guard let result = control.wait(until: deadline, { done($0) }) else { throw QuireError(.busy, "pages are still being brought back: ask again") }
        try result.get()
    }

    /// Merges again.
    public func resume() {
        map.isUnmerged = false
        exchange {
            $0.isUnmerged = false
            $0.isFresh = true
        }
    }

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

    public var snapshot: Statistics {
        let (phase, reason) = control.read { control -> (Phase, String) in
            if control.isUnmerged { return (.paused, "paused: un-merged on demand (quire merge NAME begins again)") }
            if !control.pause.isEmpty { return (.paused, control.pause.reason) }
            return control.memory == nil ? (.idle, "no guest is running") : (.active, "")
        }
        var result = statistics.withLock { $0 }
        let recycled = map.recycledMergedPages
        result.zeroPages -= min(result.zeroPages, UInt64(recycled.zero))
        result.sharingPages -= min(result.sharingPages, UInt64(recycled.shared))
        if phase != .active {
            result.phase = phase
            result.reason = reason
        } else if let obstacle = merger.obstacle {
            result.phase = .paused
            result.reason = obstacle
        }
        (result.mappings, result.mappingLimit) = merger.mappings
        return result
    }

    // MARK: - The coordinator

    /// What is kept from one pass to the next.
    struct PassState {
        /// Whether what is known of the regions was asked of the kernel, or read; nil: there was no pass yet.
        private var tracksWrites: Bool?
        var regions: [QuietPages] = []
        /// Pages that the store thinks we map, or did not hear the contrary of.
        var held = GFNSet()
        /// Some pages are merged with slots that the store does not know.
        var hasUnknown = false
        /// Of the store in which quiet pages were looked up.
        var secret: [UInt8]?
        /// Quiet pages that were not looked up, while there was none.
        var missed = GFNSet()
        var accountedAt: UInt64 = 0
        /// Passes in which nothing happened.
        var calmPasses = 0
        /// Runs shorter than this are not worth their mappings.
        var shortestRun = 1
        /// Where the kernel cannot tell what was written: a `HashedPages` for each region, and how far this round has come.
        var hashed: [HashedPages] = []
        var hashedRegion = 0
        var hashedPosition: GFN = 0
        /// Equal pages in shorter ones, for the time when it is.
        var short = GFNSet()
        var huge = HugePages()

        /// Forgets what was found the other way.
        mutating func begin(tracksWrites: Bool) {
            if let old = self.tracksWrites, old != tracksWrites { (regions, hashed, huge) = ([], [], HugePages()) }
            self.tracksWrites = tracksWrites
        }

        /// What the store cannot do; empty if it can.
        var remark = ""
        /// One line; stands until the next pass has come to its end.
        var whatIsLeftOut: String {
            if !remark.isEmpty { return remark }
            if shortestRun > 1, !short.isEmpty {
                return "mappings of QEMU get scarce (vm.max_map_count): equal pages are merged in runs of \(shortestRun) or more only"
            }
            return huge.isEmpty ? "" : "huge pages of which fewer than \(HugePages.worthIt) of 512 pages have equals are left whole"
        }
    }

    private func coordinate() {
        var state = PassState()
        var nextPass: UInt64 = 0
        while true {
            let work = control.wait(until: nextPass == 0 ? nil : nextPass) { control -> (GuestMemory, isUnmerged: Bool)?? in
                if control.isEnding { return .some(nil) }
                guard let memory = control.memory, control.pause.isEmpty, !self.isInterrupted,
                    control.isFresh || monotonicNanoseconds() >= nextPass
                else { return nil }
                control.isBusy = true
                control.isFresh = false
                return (memory, control.isUnmerged)
            }
            guard let work else {
                // The period is over, and there is nothing to do: wait for a change.
                if nextPass != 0, monotonicNanoseconds() >= nextPass { nextPass = 0 }
                continue
            }
            guard let (memory, isUnmerged) = work else { return }
            var failure: QuireError?
            if merger.obstacle == nil {
                do throws(QuireError) {
                    if isUnmerged { try unmergeAll(memory, &state) } else { try pass(memory, &state) }
                } catch {
                    failure = error
                }
            } else if isUnmerged, map.hasMerged {
                failure = QuireError(.busy, merger.obstacle ?? "the agent has just come")
            }
            note(failure)
            // Where nothing changes, looking comes seldom: up to four periods apart.
            let calm = UInt64(min(state.calmPasses / 4, 3))
            let period = UInt64(configuration.periodMilliseconds) * 1_000_000
            // Of what passes by itself whoever asks for an unmerge hears nothing: he waits for that.
            let passes = isUnmerged && failure?.code == .retry
            nextPass = monotonicNanoseconds() + (passes ? min(period, Self.retryNanoseconds) : period * (isUnmerged ? 1 : 1 + calm))
            control.update { control in
                control.isBusy = false
                if isUnmerged {
                    control.unmergeFailure = passes ? nil : failure
                    if failure == nil { control.unmerges += 1 }
                }
            }
        }
    }

    private static let retryNanoseconds: UInt64 = 200_000_000

    private func note(_ failure: QuireError?) {
        statistics.withLock {
            $0.phase = .active
            // A connection that ended in the middle tells its own story.
            if let failure, ![.closed, .retry].contains(failure.code) { $0.reason = "\(failure)" }
        }
    }

    // MARK: - One pass

    private func pass(_ memory: GuestMemory, _ state: inout PassState) throws(QuireError) {
        guard let tables = merger.pageTables else { return }
        let tracksWrites = configuration.tracksWrites
        let tracker = tracksWrites ? merger.writeTracker : nil
        state.begin(tracksWrites: tracksWrites)
        adopt(memory, &state)
        let hasher = try prepareStore(memory, &state)
        let written =
            if let tracker { try askKernel(memory, tracker, &state) } else {
                try readEverything(memory, hasher ?? Self.zerosHasher, &state)
            }
        statistics.withLock { $0.readsEverything = tracker == nil }
        for gfns in pages.takeWritten() { state.noteWritten(gfns) }
        let diverged = try foldDiverged(memory, tracker, tables, &state)
        adaptToMappings(&state)

        let zeroPages = statistics.withLock { $0.zeroPages }
        // Asked once a pass, and only if there is anything to merge; what the answer was holds for its batches.
        if state.regions.contains(where: \.isWaiting) { _ = store.shortage(zeroPages: zeroPages) }
        let merging = MergePass(
            state.regions, state.huge, memory: memory, tracker: tracker, pages: pages, merger: merger,
            store: store, hasher: hasher, shortestRun: state.shortestRun, cancelled: { self.isInterrupted })
        crew.run(merging)
        let result = merging.result
        state.regions = result.regions
        state.huge = result.huge
        for gfns in result.held { state.held.insert(gfns) }
        for gfns in result.short { state.short.insert(gfns) }
        for gfns in result.missed { state.missed.insert(gfns) }
        statistics.withLock {
            $0.passes += 1
            $0.hashedPages += UInt64(result.hashed)
            $0.mergedPages += UInt64(result.merged + result.zeroed)
            $0.mergedRuns += UInt64(result.runs)
            $0.sharingPages += UInt64(result.merged)
            $0.zeroPages += UInt64(result.zeroed)
            $0.divergedPages = UInt64(diverged)
            $0.reason = result.stopped ?? state.whatIsLeftOut
        }
        if hasher != nil, result.failure == nil, result.stopped == nil, !isInterrupted { try takeOffers(memory, tracker, &state) }
        // What others brought back: looked for now and then, since it costs a look at every merged page's entry; sooner where
        // slots may have become free.
        let now = monotonicNanoseconds()
        let hasRecycled = map.recycledMergedPages.shared > 0
        if now - state.accountedAt > (hasRecycled ? Self.soonNanoseconds : Self.accountingNanoseconds) {
            settleAccounts(&state)
            if let tracker, !state.huge.isEmpty {
                // Those that others have broken up meanwhile.
                for gfns in state.huge.hold(state.huge.runs, memory, tracker, map).again { state.noteRipe(gfns) }
            }
            state.accountedAt = now
        }
        let isCalm = written < 64 && result.hashed == 0 && diverged == 0
        state.calmPasses = isCalm ? state.calmPasses + 1 : 0
        if let failure = result.failure { throw failure }
    }

    /// For pages of zeros, which are the same under any secret.
    static let zerosHasher = PageHasher(secret: [UInt8](repeating: 1, count: PageHasher.secretBytes))

    /// Returns how many pages were written since the last pass.
    private func askKernel(
        _ memory: GuestMemory, _ tracker: WriteTracker, _ state: inout PassState
    ) throws(QuireError) -> Int {
        for index in state.regions.indices { state.regions[index].endPeriod() }
        var written = 0
        for region in memory.regions where region.kind == .shmem {
            try tracker.takeWritten(region.userAddresses) { addresses in
                written += addresses.count / Int(pageBytes)
                state.noteWritten(region.gfns(ofUser: addresses))
            }
        }
        return written
    }

    /// Pages a second that are read where the kernel cannot tell what was written: twice what ksmd does without being told
    /// otherwise, at half its cost a page.
    static let readPagesPerSecond = 10_000

    /// The same by reading as much as a period allows for. A round through all of memory counts as the period.
    private func readEverything(
        _ memory: GuestMemory, _ hasher: PageHasher, _ state: inout PassState
    ) throws(QuireError) -> Int {
        let regions = memory.regions.filter { $0.kind == .shmem }
        if state.hashed.map(\.gfns) != regions.map(\.gfns) {
            state.hashed = []
            for region in regions { state.hashed.append(try HashedPages(region.gfns)) }
            state.hashedRegion = 0
            state.hashedPosition = regions.first?.gfns.lowerBound ?? 0
        }
        var budget = max(Self.readPagesPerSecond * Int(configuration.periodMilliseconds) / 1000, 1024)
        var changed = 0, read = 0
        defer { statistics.withLock { $0.hashedPages += UInt64(read) } }
        while budget > 0, !isInterrupted, state.hashedRegion < regions.count {
            if state.hashedRegion == 0, state.hashedPosition == regions[0].gfns.lowerBound {
                for index in state.regions.indices { state.regions[index].endPeriod() }
            }
            let region = regions[state.hashedRegion]
            state.hashed[state.hashedRegion].look(
                region, map, from: &state.hashedPosition, budget: &budget, hasher, read: &read
            ) { gfn in
                changed += 1
                state.regions[state.hashedRegion].noteWritten(gfn..<gfn + 1)
            }
            guard state.hashedPosition >= region.gfns.upperBound else { break }
            state.hashedRegion += 1
            if state.hashedRegion < regions.count {
                state.hashedPosition = regions[state.hashedRegion].gfns.lowerBound
            } else {
                state.hashedRegion = 0
                state.hashedPosition = regions[0].gfns.lowerBound
                break
            }
        }
        return changed
    }

    private static let accountingNanoseconds: UInt64 = 30_000_000_000
    private static let soonNanoseconds: UInt64 = 5_000_000_000

    /// Keeps what is known of regions that are still there; of new ones nothing is known.
    private func adopt(_ memory: GuestMemory, _ state: inout PassState) {
        let regions = memory.regions.filter { $0.kind == .shmem }
        guard regions.map(\.gfns) != state.regions.map(\.gfns) else { return }
        state.regions = regions.map { region in
            if let known = state.regions.first(where: { $0.gfns == region.gfns }) { return known }
            var fresh = QuietPages(region.gfns)
            region.forEachData { fresh.noteWritten($0) }
            return fresh
        }
    }

    /// Nil: nothing but zeros can be merged.
    private func prepareStore(_ memory: GuestMemory, _ state: inout PassState) throws(QuireError) -> PageHasher? {
        switch store.prepare(memory) {
        case .absent(let reason):
            state.remark = "only pages of zeros are merged: \(reason)"
            return nil
        case .ready(let hasher):
            state.remark = ""
            try dropUnknown(memory, &state)
            return hasher
        case .connected(let hasher, let held, let unknown):
            state.remark = ""
            state.held = GFNSet()
            for gfns in held { state.held.insert(gfns) }
            state.hasUnknown = unknown > 0
            try dropUnknown(memory, &state)
            settleAccounts(&state)
            lookUpAnew(hasher, memory, &state)
            // Whether it may be asked is another question: a VM that is to go elsewhere only keeps accounts with it.
            return try prepareStore(memory, &state)
        }
    }

    /// What was quiet while there was no store is looked up now; in another store than before, all is.
    private func lookUpAnew(_ hasher: PageHasher, _ memory: GuestMemory, _ state: inout PassState) {
        if let secret = state.secret, secret != hasher.secret {
            (state.regions, state.hashed, state.huge) = ([], [], HugePages())
            adopt(memory, &state)
        }
        for gfns in state.missed.runs { state.noteRipe(gfns) }
        state.missed = GFNSet()
        state.secret = hasher.secret
    }

    /// Pages of slots that the store does not know are brought back, and as nobody can tell which ones those are, all of
    /// them. What interrupts that does not end it.
    private func dropUnknown(_ memory: GuestMemory, _ state: inout PassState) throws(QuireError) {
        guard state.hasUnknown else { return }
        try bringBack(memory, &state) { if case .shared = $0 { true } else { false } }
        state.hasUnknown = false
    }

    /// Runs cost QEMU two mappings each, however long they are: when those get scarce only longer ones are worth it.
    private func adaptToMappings(_ state: inout PassState) {
        let (used, limit) = merger.mappings
        guard limit > 0 else { return }
        let before = state.shortestRun
        state.shortestRun = switch Double(used) / Double(limit) {
        case ..<0.5: 1
        case ..<0.75: 4
        case ..<0.9: 16
        default: 64
        }
        if state.shortestRun < before {
            for gfns in state.short.runs { state.noteRipe(gfns) }
            state.short = GFNSet()
        }
    }

    // MARK: - Bringing pages back

    /// Pages that are brought back at once: some hundredths of a second, ten times that on a busy host.
    private static let foldPages = 512

    /// Merged pages that the guest has written since go back to the memory file, where the guest can write them for
    /// nothing. Returns how many there were.
    private func foldDiverged(
        _ memory: GuestMemory, _ tracker: WriteTracker?, _ tables: PageTables, _ state: inout PassState
    ) throws(QuireError) -> Int {
        guard map.hasMerged else { return 0 }
        var found: [Range<GFN>] = []
        if let tracker {
            for region in memory.regions where region.kind == .shmem {
                try tracker.forEachDiverged(region.userAddresses) { found.append(region.gfns(ofUser: $0)) }
            }
        } else {
            found = try findDiverged(memory, tables)
        }
        let count = found.reduce(0) { $0 + $1.count }
        try fold(found, &state)
        return count
    }

    /// The same where the kernel cannot scan: it does not tell the zero page from a copy, so what is in there has to.
    private func findDiverged(_ memory: GuestMemory, _ tables: PageTables) throws(QuireError) -> [Range<GFN>] {
        var merged: [(gfns: Range<GFN>, isZero: Bool)] = []
        map.forEachMerged { gfns, kind in merged.append((gfns, kind == .zero)) }
        var found: [Range<GFN>] = []
        for (gfns, isZero) in merged {
            guard let region = memory.region(of: gfns.lowerBound), gfns.upperBound <= region.gfns.upperBound else { continue }
            var copies: [Range<GFN>] = []
            let start = region.userAddress + (gfns.lowerBound - region.gfns.lowerBound) * pageBytes
            try tables.forEachAnonymous(start..<start + UInt64(gfns.count) * pageBytes) {
                copies.append(region.gfns(ofUser: $0))
            }
            guard isZero else {
                found += copies
                continue
            }
            let frontEnd = try pages.frontEnd()
            for gfn in copies.joined() {
                let address = region.userAddress + (gfn - region.gfns.lowerBound) * pageBytes
                // A page that is written just now is found at the next pass.
                if try frontEnd.load(address, count: Int(pageBytes)).contains(where: { $0 != 0 }) { found.append(page: gfn) }
            }
        }
        return found
    }

    /// Stops early, without an error, where somebody wants control.
    private func fold(_ ranges: [Range<GFN>], _ state: inout PassState) throws(QuireError) {
        var batch: [Range<GFN>] = []
        var pages = 0
        for range in ranges {
            for start in stride(from: range.lowerBound, to: range.upperBound, by: Self.foldPages) {
                let part = start..<min(range.upperBound, start + UInt64(Self.foldPages))
                if pages + part.count > Self.foldPages {
                    if isInterrupted { return }
                    try foldBatch(batch, &state)
                    batch = []
                    pages = 0
                }
                batch.append(part)
                pages += part.count
            }
        }
        if !isInterrupted { try foldBatch(batch, &state) }
    }

    private func foldBatch(_ ranges: [Range<GFN>], _ state: inout PassState) throws(QuireError) {
        guard !ranges.isEmpty else { return }
        let kinds = ranges.map { map.mergedCounts($0) }
        let outcomes: [MoveOutcome]
        do throws(QuireError) { outcomes = try merger.fold(ranges, onlyDiverged: false, until: Merging.deadline) } catch {
            // The deadline is there so that others are not kept waiting, and says nothing about the pages.
            throw error.code == .busy ? QuireError(.retry, error.message, cause: error) : error
        }
        var closed = false
        for (index, (range, outcome)) in zip(ranges, outcomes).enumerated() {
            let done = range.lowerBound..<range.lowerBound + UInt64(outcome.done)
            state.noteFickle(done)
            let left = map.mergedCounts(range)
            statistics.withLock {
                let gone = kinds[index] - left
                $0.foldedPages += UInt64(gone.zero + gone.shared)
                $0.zeroPages -= min($0.zeroPages, UInt64(gone.zero))
                $0.sharingPages -= min($0.sharingPages, UInt64(gone.shared))
            }
            if case .gateClosed = outcome.reason { closed = true }
        }
        release(ranges, &state)
        if closed { throw QuireError(.busy, merger.obstacle ?? "the pin gate is closed") }
    }

    /// Brings back all merged pages that are wanted; throws `.retry` where somebody wants control in the middle, or QEMU takes its time.
    /// Only pages that are the guest's now: what was unplugged is merged until QEMU unmaps it.
    private func bringBack(
        _ memory: GuestMemory, _ state: inout PassState, _ isWanted: (PageState) -> Bool
    ) throws(QuireError) {
        // A page with I/O in flight is busy for a moment: some rounds, with time in between.
        for round in 0..<50 {
            var ranges: [Range<GFN>] = []
            map.forEachMerged { gfns, kind in
                guard isWanted(kind) else { return }
                for region in memory.regions where region.gfns.overlaps(gfns) {
                    ranges.append(gfns.clamped(to: region.gfns))
                }
            }
            if ranges.isEmpty { return }
            if round > 0 { ProcessCalls.sleep(milliseconds: UInt32(round)) }
            try fold(ranges, &state)
            if isInterrupted { throw QuireError(.retry, "interrupted") }
        }
        throw QuireError(.busy, "some merged pages stay in use by I/O")
    }

    private func unmergeAll(_ memory: GuestMemory, _ state: inout PassState) throws(QuireError) {
        guard map.hasMerged else { return }
        adopt(memory, &state)
        // Also for a store that an earlier process had merged with, or that has come back: it has to hear of all this.
        _ = try prepareStore(memory, &state)
        try bringBack(memory, &state) { _ in true }
        settleAccounts(&state)
        statistics.withLock { $0.divergedPages = 0 }
    }

    // MARK: - Accounts with the store

    /// Tells the store of pages of these that it thinks we map and that we do not (any more).
    /// One that cannot be told now is connected anew, and counts what is mapped: no reason to keep a page merged.
    private func release(_ ranges: [Range<GFN>], _ state: inout PassState) {
        var gone: [Range<GFN>] = []
        for range in ranges {
            state.held.forEachRun(in: range) { run in
                map.forEachRun(in: run, where: { if case .shared = $0 { false } else { true } }) { gone.append($0) }
            }
        }
        guard !gone.isEmpty else { return }
        for gfns in gone { state.held.remove(gfns) }
        try? store.report(merged: [], released: gone)
    }

    /// Looks through everything that is merged or was: what others brought back is released, and the figures are right.
    private func settleAccounts(_ state: inout PassState) {
        let recycled = map.recycledMergedPages
        release(state.held.runs, &state)
        var zeros = 0, shared = 0
        map.forEachMerged { gfns, kind in
            if case .zero = kind { zeros += gfns.count } else { shared += gfns.count }
        }
        statistics.withLock {
            $0.zeroPages = UInt64(zeros)
            $0.sharingPages = UInt64(shared)
        }
        map.settleRecycledMerged(recycled)
    }

    /// Pages that were the first of their content, and have an equal now.
    private func takeOffers(_ memory: GuestMemory, _ tracker: WriteTracker?, _ state: inout PassState) throws(QuireError) {
        while !isInterrupted {
            let slots = try store.takeOffers()
            guard !slots.isEmpty else { return }
            var held = GFNSet()
            if let tracker {
                let (left, again) = state.huge.hold(slots.map(\.gfns), memory, tracker, map)
                for gfns in again { state.noteRipe(gfns) }
                held = left
            }
            let result = try Merging.merge(
                slots, except: held, merger: merger, store: store, shortestRun: state.shortestRun, cancelled: { self.isInterrupted })
            for gfns in result.merged { state.held.insert(gfns) }
            for gfns in result.again { state.noteRipe(gfns) }
            for gfns in result.short { state.short.insert(gfns) }
            for gfns in result.changed { state.noteWritten(gfns) }
            statistics.withLock {
                $0.mergedPages += UInt64(result.pages)
                $0.sharingPages += UInt64(result.pages)
                $0.mergedRuns += UInt64(result.merged.count)
            }
            if result.stopped != nil { return }
        }
    }
}

extension DedupEngine.PassState {
    mutating func noteWritten(_ gfns: Range<GFN>) {
        for index in regions.indices { regions[index].noteWritten(gfns) }
        huge.noteWritten(gfns)
    }
    mutating func noteRipe(_ gfns: Range<GFN>) {
        for index in regions.indices { regions[index].noteRipe(gfns) }
    }
    mutating func noteFickle(_ gfns: Range<GFN>) {
        for index in regions.indices { regions[index].noteFickle(gfns) }
        huge.noteWritten(gfns)
    }
}
