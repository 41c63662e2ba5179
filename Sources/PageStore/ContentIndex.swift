import CIndex
import PageContent
import Platform
import StoreProtocol

/// From the hash of a page to the slot that holds it; read by any number of threads without a lock (`cindex.c` says why that
/// works). It knows slots only as long as somebody uses them: contents that were seen once are `Candidates`.
///
/// It knows the half of a hash that the table keeps: of two contents that are equal in it (one of 2^64 pairs) the second is not
/// merged, since whoever maps a slot compares all bytes first.
///
/// The one thing that its user has to know is when a slot may mean something else: not while a reader that found it is
/// inside `reading`. So a slot is removed, then `waitForReaders`, then it may be given another content.
@safe package final class ContentIndex: @unchecked Sendable {
    // The C object is used by many threads, as it is made for. It holds a pointer to the hashes, which `table` keeps.
    private let index: OpaquePointer
    private let table: SlotTable

    /// `looksAgain`: false for a test's control.
    package init(_ table: SlotTable, looksAgain: Bool = true) throws(QuireError) {
        self.table = table
        guard let made = unsafe ci_new(table.hashWords, UInt64(table.slotLimit)) else {
            throw .system("cannot make a content index")
        }
        unsafe index = made
        if !looksAgain { unsafe ci_never_look_again(made) }
    }

    deinit { unsafe ci_free(index) }

    /// What `find` and `add` returned keeps its meaning until `body` has returned.
    package static func reading<R>(_ body: () -> R) -> R {
        ci_read_lock()
        defer { ci_read_unlock() }
        return body()
    }

    /// Inside of `reading`.
    package func find(_ hash: PageHash) -> UInt32? {
        let slot = unsafe ci_find(index, hash.kept)
        return slot == 0 ? nil : UInt32(slot)
    }

    /// Adds a slot under the hash that the table has for it. Another slot that has this hash already is returned
    /// instead.
    package func add(_ slot: UInt32) -> UInt32 { UInt32(unsafe ci_add(index, UInt64(slot))) }

    package func remove(_ slot: UInt32) { _ = unsafe ci_remove(index, UInt64(slot)) }

    package static func waitForReaders() { ci_wait() }

    /// Four bytes for the slot that follows in its chain, and four for each chain of two.
    static let bytesPerSlot: UInt64 = 6
}

/// NUMA, as far as there is any.
enum Nodes {
    static let count = Int(ci_node_count())

    /// The memory behind a mapping comes from `node` where it can.
    static func prefer(_ mapping: borrowing Mapping, node: Int) {
        // Only the addresses are used, and the mapping lives over the call.
        unsafe ci_prefer_node(mapping.address(0, count: mapping.byteCount), mapping.byteCount, Int32(node))
    }
}
