import Platform
import Synchronization

/// A compaction under way: slabs that are to run empty, and how far the contents were looked through for theirs.
struct Compaction {
    let victims: [UInt32]
    var next: UInt32 = 1
    let end: UInt32
    var moved: [UInt64] = []
}

/// Slabs with few slots in use are emptied into others of their class. The contents are looked through in a row, which
/// needs no memory to say whose a slot is; done by whoever frees slots, a little at a time, or at once by who needs room.
extension TmemStore {
    private static let graceAfter = 256

    /// After anything that may have freed slots; no lock held. Costs nothing as long as there is little to gain.
    @inline(__always) func tidy() {
        if slabs.isWasteful(every: 64) { tidySome() }
    }

    private func tidySome() {
        _ = compaction.withLockIfAvailable { compaction in
            if compaction == nil {
                compaction = begin()
                if compaction == nil { return }
            }
            step(&compaction, looking: 8192, moving: 64)
        }
    }

    private func begin() -> Compaction? {
        let victims = slabs.chooseVictims()
        return victims.isEmpty ? nil : Compaction(victims: victims, end: contents.limit)
    }

    private func step(_ compaction: inout Compaction?, looking: Int, moving: Int) {
        var looked = 0, moved = 0
        while compaction!.next < compaction!.end, looked < looking, moved < moving {
            if let unit = contents.move(compaction!.next) {
                compaction!.moved.append(unit)
                moved += 1
            }
            compaction!.next += 1
            looked += 1
        }
        let isDone = compaction!.next >= compaction!.end
        if isDone || compaction!.moved.count >= Self.graceAfter {
            if seams.waitsForReaders { grace() }
            for unit in compaction!.moved { slabs.free(unit) }
            compaction!.moved = []
        }
        if isDone {
            slabs.release(victims: compaction!.victims)
            compaction = nil
        }
    }

    /// Waits until nobody reads bytes where he found them before: whoever does holds the lock of a stripe.
    private func grace() {
        leaves.grace()
        contents.grace()
    }

    /// Packs everything as well as can be; whether slabs came free.
    func compactAll() -> Bool {
        compaction.withLock { compaction in
            let before = slabs.bytes.slabs
            while compaction != nil { step(&compaction, looking: .max, moving: Self.graceAfter) }
            if slabs.surplus > 0 {
                compaction = begin()
                while compaction != nil { step(&compaction, looking: .max, moving: Self.graceAfter) }
            }
            return slabs.bytes.slabs < before
        }
    }
}
