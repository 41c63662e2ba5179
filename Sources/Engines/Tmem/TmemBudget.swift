import Platform
import Synchronization

/// What a store uses of the host's memory, in bytes, and the cap on it. Memory is taken by slabs and by extents of
/// metadata, so this is touched rarely and may be one word for all threads.
final class TmemBudget: Sendable {
    private let usedBytes = Atomic<Int>(0)
    private let limit = Atomic<Int>(.max)
    private let metadata = Atomic<Int>(0)

    var used: Int { usedBytes.load(ordering: .relaxed) }
    var cap: Int { limit.load(ordering: .relaxed) }
    var metadataBytes: Int { metadata.load(ordering: .relaxed) }

    func setCap(_ cap: Int) { limit.store(cap, ordering: .relaxed) }

    /// False, and nothing taken, when the cap forbids it.
    func take(_ bytes: Int, isMetadata: Bool) -> Bool {
        let now = usedBytes.wrappingAdd(bytes, ordering: .relaxed).newValue
        if now > cap {
            usedBytes.wrappingSubtract(bytes, ordering: .relaxed)
            return false
        }
        if isMetadata { metadata.wrappingAdd(bytes, ordering: .relaxed) }
        return true
    }

    /// What is in use anyway, at a start: a cap that was set lower meanwhile cannot undo it.
    func note(_ bytes: Int, isMetadata: Bool) {
        usedBytes.wrappingAdd(bytes, ordering: .relaxed)
        if isMetadata { metadata.wrappingAdd(bytes, ordering: .relaxed) }
    }

    func giveBack(_ bytes: Int, isMetadata: Bool) {
        usedBytes.wrappingSubtract(bytes, ordering: .relaxed)
        if isMetadata { metadata.wrappingSubtract(bytes, ordering: .relaxed) }
    }
}
