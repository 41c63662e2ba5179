import GuestMemory
import Platform

/// Pages whose states may be looked at: all in one page of the state table, all in one region.
public struct RecycleRun: Sendable, Equatable {
    public let gfns: Range<GFN>
    /// Guest physical address of the first one's state byte.
    public let states: UInt64

    public init(gfns: Range<GFN>, states: UInt64) {
        self.gfns = gfns
        self.states = states
    }
}

/// What is to be recycled of them.
public struct RecycleOrder: Sendable {
    public enum Kind: Sendable, Equatable {
        /// What has been marked for so many epochs.
        case due(age: Int)
        /// What is RECYCLED: somebody has filled it again.
        case again
    }
    public let kind: Kind
    /// The epoch.
    public let now: UInt8
    /// Pages that are claimed at a time, at most.
    public let claimPages: Int
    /// The raw descriptor of the connection whose end tells the front end that we are dead. See `PageRecycler`.
    public let connection: Int32

    public init(_ kind: Kind, now: UInt8, claimPages: Int, connection: Int32) {
        self.kind = kind
        self.now = now
        self.claimPages = claimPages
        self.connection = connection
    }
}

/// Who recycles in the front end: the agent in QEMU. A guest that waits for a claim then waits for a thread of the very
/// process that runs it, and whatever freezes the one freezes the other.
///
/// The guest must not be reset while pages are claimed. The front end resets it when we have answered that the device is
/// stopped, or when it sees the end of our connection. So `recycle` returns, or throws, only when nothing of it is at work
/// any more, however long that takes; and for the case that this process dies meanwhile, whoever is at work holds our end
/// of the connection open.
public protocol PageRecycler: AnyObject, Sendable {
    /// Whether anybody is there.
    var canRecycle: Bool { get }

    /// One outcome for each run: `done` pages of it were recycled. Throws `.closed` when nobody is there, or he has gone
    /// away meanwhile (some of it may be done then), and `.busy` when he is at work on something else.
    func recycle(_ runs: [RecycleRun], _ order: RecycleOrder) throws(QuireError) -> [MoveOutcome]
}
