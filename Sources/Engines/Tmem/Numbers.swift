import Platform
import Synchronization

/// Hands out the numbers of an area of the file: leaves, or contents. Free numbers are kept by the stripes of the table
/// that uses them, chained through the entries, under the stripe's lock; fresh ones come from here, a few at a time.
final class Numbers: Sendable {
    /// What a stripe has.
    struct Free {
        var head: UInt32 = 0
        var fresh: Range<UInt32> = 0..<0
    }
    private static let batch: UInt32 = 16

    private struct State {
        /// Below this, numbers were handed out.
        var next: UInt32
        /// Below this, they have memory.
        var populated: UInt32
    }
    private let state: Mutex<State>
    private let limit: UInt32
    /// Numbers that get memory together, and what that takes.
    private let extent: UInt32
    private let extentBytes: Int
    private let budget: TmemBudget
    private let populate: @Sendable (Range<Int>) throws(QuireError) -> Void
    private let note: @Sendable (UInt32) -> Void

    /// `count`: what is in use already, all below it. `note` writes a new count to the file.
    init(
        count: UInt32, limit: Int, extent: Int, extentBytes: Int, budget: TmemBudget,
        populate: @escaping @Sendable (Range<Int>) throws(QuireError) -> Void, note: @escaping @Sendable (UInt32) -> Void
    ) {
        let extents = (Int(count) - 1 + extent - 1) / extent
        budget.note(extents * extentBytes, isMetadata: true)
        state = Mutex(State(next: count, populated: UInt32(extents * extent)))
        self.limit = UInt32(limit)
        self.extent = UInt32(extent)
        self.extentBytes = extentBytes
        self.budget = budget
        self.populate = populate
        self.note = note
    }

    /// Nil when there is no memory or no number.
    @inline(__always)
    func take(_ free: inout Free, next: (UInt32) -> UInt32) -> UInt32? {
        if free.head != 0 {
            let number = free.head
            free.head = next(number)
            return number
        }
        if free.fresh.isEmpty {
            guard let fresh = takeBatch() else { return nil }
            free.fresh = fresh
        }
        let number = free.fresh.lowerBound
        free.fresh = number + 1..<free.fresh.upperBound
        return number
    }

    private func takeBatch() -> Range<UInt32>? {
        state.withLock { state in
            if state.next >= state.populated {
                guard state.populated <= limit - extent, budget.take(extentBytes, isMetadata: true) else { return nil }
                do { try populate(Int(state.populated)..<Int(state.populated + extent)) } catch {
                    budget.giveBack(extentBytes, isMetadata: true)
                    return nil
                }
                state.populated += extent
            }
            let from = state.next
            let to = min(state.populated, (from / Self.batch + 1) * Self.batch)
            // A number below the count may be anything; one above it must be nothing.
            note(to)
            state.next = to
            return from..<to
        }
    }

    var count: UInt32 { state.withLock { $0.next } }
}
