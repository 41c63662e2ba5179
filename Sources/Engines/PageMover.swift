import CQuireLayout
import GuestMemory
import Platform

/// Pages `gfn ..< gfn + pages`; with `merge` equal to as many slots of a store, from `slot` on.
public struct PageRun: Sendable, Equatable {
    public var gfn: GFN
    public var pages: Int
    public var store: UInt8
    public var slot: UInt64

    public static let maxPages = Int(QUIRE_AGENT_MAX_PAGES)
    /// In one command.
    public static let maxRuns = Int(QUIRE_AGENT_MAX_RUNS)

    public init(gfn: GFN, pages: Int, store: UInt8 = 0, slot: UInt64 = 0) {
        self.gfn = gfn
        self.pages = pages
        self.store = store
        self.slot = slot
    }

    public var gfns: Range<GFN> { gfn..<gfn + UInt64(max(0, pages)) }
}

/// What became of one run: it was done from its first page on, until `reason`.
public struct MoveOutcome: Sendable, Equatable {
    public enum Reason: Sendable, Equatable {
        /// All of it.
        case done
        /// The page, counted from the run's first, is not what the command says.
        case differs(page: Int)
        /// I/O in flight there: try again.
        case busy
        /// QEMU has no mappings left to spend.
        case budget
        /// The pin gate is closed.
        case gateClosed
        /// The page, counted from the run's first, is merged or recycled.
        case state(page: Int)
        case failed(errno: Int32)
        /// No such pages, store, slot or operation.
        case invalid
        /// A page of it must stay private (`UnmergeableSet`); the agent was not asked.
        case unmergeable
    }
    /// Pages.
    public let done: Int
    public let reason: Reason
    public init(done: Int, reason: Reason) {
        self.done = done
        self.reason = reason
    }
}

/// Who moves pages in the front end: the agent in QEMU, at the end of a link. What it is asked for it does whole or not at
/// all, window by window, and the bytes that the guest sees stay the same whatever becomes of it.
public protocol PageMover: AnyObject, Sendable {
    /// Where guest memory is from now on.
    func setMemory(_ memory: GuestMemory)

    /// Returns when nothing that was asked for before this call is still at work, or will be. Throws if that is not
    /// certain by `deadline` (CLOCK_MONOTONIC, nanoseconds).
    func settle(until deadline: UInt64) throws(QuireError)

    /// Brings every merged page of these back into the memory file; throws if that is not done by `deadline`. For pages that the
    /// guest uses as a ring or a table, and so has no device transfer to.
    func bringBack(_ gfns: [Range<GFN>], until deadline: UInt64) throws(QuireError)
}

/// The same, for the engine that merges.
///
/// Each call throws `.closed` when nobody is there, or goes away meanwhile (the page map says how far it came then), and
/// `.busy` at the deadline (nil: none). One outcome for each run. Keep a call short, a tenth of a second or so: a ring
/// that starts waits for what is under way, and gives up after a second.
public protocol PageMerger: PageMover {
    /// Has pages replaced by slots that hold the same bytes: they are compared, and a run stays as it is from the page on
    /// that differs.
    func merge(_ runs: [PageRun], until deadline: UInt64?) throws(QuireError) -> [MoveOutcome]

    /// Has pages of zeros replaced by the host's zero page.
    func zero(_ gfns: [Range<GFN>], until deadline: UInt64?) throws(QuireError) -> [MoveOutcome]

    /// Brings merged pages back into the memory file; with `onlyDiverged` those that the guest has written since.
    func fold(_ gfns: [Range<GFN>], onlyDiverged: Bool, until deadline: UInt64?) throws(QuireError) -> [MoveOutcome]

    /// Which pages the guest has written, as the kernel that QEMU runs on can tell; nil if nobody is attached, or it can't.
    var writeTracker: WriteTracker? { get }

    /// What QEMU's page tables say; nil if nobody is attached.
    var pageTables: PageTables? { get }

    /// Why nothing can be merged now; nil if it can.
    var obstacle: String? { get }

    /// QEMU's mappings (VMAs), and above how many it makes no more.
    var mappings: (used: UInt64, limit: UInt64) { get }
}
