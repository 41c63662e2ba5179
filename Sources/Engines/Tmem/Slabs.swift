import Platform
import Synchronization

/// Where the bytes of contents are: slabs of 64 KiB, each of slots of one class. Class c has slots of c units, a unit is
/// 64 bytes. A location is the number of a unit.
///
/// What is kept of a slab is volatile (16 bytes; its free slots are chained through themselves) and found again at a start
/// from the contents. Only the class is in the file: it is written before the slab's first slot is handed out.
///
/// Locks: one a class, never over a system call: who finds no free slot brings a slab, and so does everybody else who finds none
/// meanwhile; those that come too late go to the supply. There are slabs that ran empty, too; all classes share it, and a few keep
/// their memory there, so that a slab that comes and goes costs no system call.
final class Slabs: Sendable {
    static let unitBytes = 64
    static let unitsPerSlab = TmemFile.slabBytes / unitBytes
    static let classes = 64
    static let infoBytes = 16
    static func slots(of slabClass: Int) -> Int { unitsPerSlab / slabClass }
    /// The class for so many bytes.
    static func slabClass(for bytes: Int) -> Int { (bytes + unitBytes - 1) / unitBytes }

    // What is kept of a slab.
    private static let usedAt = 0, freeAt = 2, freshAt = 4, flagsAt = 6, nextAt = 8, previousAt = 12
    private static let noSlot: UInt16 = .max
    private static let isListed: UInt8 = 1, isVictim: UInt8 = 2

    private final class Class: Sendable {
        /// The first slab with free slots.
        let head = Mutex<UInt32>(0)
        // Written under the lock, read by anybody.
        let slabs = Atomic<Int>(0)
        let used = Atomic<Int>(0)
    }

    private struct Supply {
        /// Empty slabs that still have their memory, and are counted as used.
        var warm: [UInt32] = []
        /// Without memory.
        var cold: [UInt32] = []
    }
    private static let warmLimit = 16

    private let file: TmemFile
    private let budget: TmemBudget
    private let mapping: Mapping
    private let info: MappedBytes
    private let all: [Class]
    private let supply = Mutex(Supply())
    private let frees = Atomic<Int>(0)
    /// Threads that bring a slab just now.
    private let growing = Atomic<Int>(0)
    private let seams: TmemSeams

    init(_ file: TmemFile, _ budget: TmemBudget, _ seams: TmemSeams) throws(QuireError) {
        self.file = file
        self.budget = budget
        self.seams = seams
        mapping = try Mapping(anonymousByteCount: TmemFile.slabLimit * Self.infoBytes)
        mapping.excludeFromDumps()
        mapping.refuseHugePages()
        // Sound: this object keeps the mapping.
        unsafe info = mapping.view(0, count: TmemFile.slabLimit * Self.infoBytes)
        // Index 0 is no class.
        all = (0...Self.classes).map { _ in Class() }
    }

    // MARK: - Slots

    /// A slot of a class; nil when there is none and no memory for another slab.
    func allocate(_ slabClass: Int) -> UInt64? {
        if let unit = takeFree(slabClass) { return unit }
        growing.wrappingAdd(1, ordering: .acquiringAndReleasing)
        defer { growing.wrappingSubtract(1, ordering: .acquiringAndReleasing) }
        // Somebody else may have brought the last one.
        guard let slab = takeSlab() else { return takeFree(slabClass) }
        let its = all[slabClass]
        var isSpare = false
        let unit = its.head.withLock { head -> UInt64 in
            if head == 0 {
                // Before anything can be in it.
                file.classes.store8(Int(slab), UInt8(slabClass))
                seams.step?()
                let at = Int(slab) * Self.infoBytes
                info.store64(at, UInt64(Self.noSlot) << 16)
                its.slabs.wrappingAdd(1, ordering: .relaxed)
                list(slab, &head)
            } else {
                isSpare = true
            }
            return take(head, slabClass, its, &head)
        }
        if isSpare { giveBack(slab) }
        return unit
    }

    /// A free slot of this or a bigger class, without another slab: when there is no memory for one. Where others bring one at this
    /// moment, which has more slots than they need, it waits for them: the store is not full as long as they do.
    func allocateAnywhere(_ slabClass: Int) -> UInt64? {
        let deadline = monotonicNanoseconds() + Self.growthNanoseconds
        while true {
            let isGrowing = growing.load(ordering: .acquiring) > 0
            if warmBytes > 0, let unit = allocate(slabClass) { return unit }
            for candidate in slabClass...Self.classes {
                if let unit = takeFree(candidate) { return unit }
            }
            guard isGrowing, monotonicNanoseconds() < deadline else { return nil }
            ProcessCalls.sleep(microseconds: 50)
        }
    }
    private static let growthNanoseconds: UInt64 = 1_000_000_000

    private func takeFree(_ slabClass: Int) -> UInt64? {
        let its = all[slabClass]
        return its.head.withLock { head in head == 0 ? nil : take(head, slabClass, its, &head) }
    }

    private func take(_ slab: UInt32, _ slabClass: Int, _ its: Class, _ head: inout UInt32) -> UInt64 {
        let at = Int(slab) * Self.infoBytes
        let base = UInt64(slab) * UInt64(Self.unitsPerSlab)
        let slot = info.load16(at + Self.freeAt)
        let unit: UInt64
        if slot == Self.noSlot {
            let fresh = info.load16(at + Self.freshAt)
            info.store16(at + Self.freshAt, fresh + 1)
            unit = base + UInt64(fresh) * UInt64(slabClass)
        } else {
            unit = base + UInt64(slot) * UInt64(slabClass)
            info.store16(at + Self.freeAt, file.data.load16(Int(unit) * Self.unitBytes))
        }
        let used = info.load16(at + Self.usedAt) + 1
        info.store16(at + Self.usedAt, used)
        its.used.wrappingAdd(1, ordering: .relaxed)
        if Int(used) == Self.slots(of: slabClass) { unlist(slab, &head) }
        return unit
    }

    /// The slot's bytes may be used for something else from now on: nobody may read them any more.
    func free(_ unit: UInt64) {
        let slab = UInt32(unit / UInt64(Self.unitsPerSlab))
        let slabClass = Int(file.classes.load8(Int(slab)))
        let its = all[slabClass]
        let isEmpty = its.head.withLock { head -> Bool in
            let at = Int(slab) * Self.infoBytes
            let used = info.load16(at + Self.usedAt) - 1
            info.store16(at + Self.usedAt, used)
            its.used.wrappingSubtract(1, ordering: .relaxed)
            let flags = info.load8(at + Self.flagsAt)
            if used == 0 {
                if flags & Self.isListed != 0 { unlist(slab, &head) }
                // Another class may have it next, whose lock `release` does not hold: it must not look like a victim then.
                if seams.forgetsVictims { info.store8(at + Self.flagsAt, 0) }
                its.slabs.wrappingSubtract(1, ordering: .relaxed)
                return true
            }
            let slot = UInt16(unit % UInt64(Self.unitsPerSlab)) / UInt16(slabClass)
            file.data.store16(Int(unit) * Self.unitBytes, info.load16(at + Self.freeAt))
            seams.step?()
            info.store16(at + Self.freeAt, slot)
            if flags & (Self.isListed | Self.isVictim) == 0 { list(slab, &head) }
            return false
        }
        if isEmpty { giveBack(slab) }
        frees.wrappingAdd(1, ordering: .relaxed)
    }

    private func list(_ slab: UInt32, _ head: inout UInt32) {
        let at = Int(slab) * Self.infoBytes
        info.store32(at + Self.nextAt, head)
        info.store32(at + Self.previousAt, 0)
        if head != 0 { info.store32(Int(head) * Self.infoBytes + Self.previousAt, slab) }
        info.store8(at + Self.flagsAt, info.load8(at + Self.flagsAt) | Self.isListed)
        head = slab
    }

    private func unlist(_ slab: UInt32, _ head: inout UInt32) {
        let at = Int(slab) * Self.infoBytes
        let next = info.load32(at + Self.nextAt), previous = info.load32(at + Self.previousAt)
        if next != 0 { info.store32(Int(next) * Self.infoBytes + Self.previousAt, previous) }
        if previous != 0 { info.store32(Int(previous) * Self.infoBytes + Self.nextAt, next) } else { head = next }
        info.store8(at + Self.flagsAt, info.load8(at + Self.flagsAt) & ~Self.isListed)
    }

    // MARK: - Slabs

    private func takeSlab() -> UInt32? {
        let warm = supply.withLock { $0.warm.popLast() }
        if let warm { return warm }
        guard budget.take(TmemFile.slabBytes, isMetadata: false) else { return nil }
        let slab = supply.withLock { supply -> UInt32? in
            if let cold = supply.cold.popLast() { return cold }
            let next = file.slabCount
            guard next < TmemFile.slabLimit else { return nil }
            // 16 bytes each of ours, by pages of 256 slabs.
            if next % 256 == 0 || next == 1 { budget.note(4096, isMetadata: true) }
            file.slabCount = next + 1
            return next
        }
        guard let slab else {
            budget.giveBack(TmemFile.slabBytes, isMetadata: false)
            return nil
        }
        seams.whilePopulating?()
        do { try file.populateSlab(slab) } catch {
            // What came of it goes back.
            file.punch(slabs: slab..<slab + 1)
            budget.giveBack(TmemFile.slabBytes, isMetadata: false)
            supply.withLock { $0.cold.append(slab) }
            return nil
        }
        return slab
    }

    private func giveBack(_ slab: UInt32) {
        let isWarm = supply.withLock { supply in
            guard supply.warm.count < Self.warmLimit else { return false }
            supply.warm.append(slab)
            return true
        }
        if !isWarm { chill([slab]) }
    }

    private func chill(_ slabs: [UInt32]) {
        for slab in slabs { file.punch(slabs: slab..<slab + 1) }
        budget.giveBack(slabs.count * TmemFile.slabBytes, isMetadata: false)
        supply.withLock { $0.cold += slabs }
    }

    /// Gives the host what is kept at hand.
    func chillAll() {
        let warm = supply.withLock { supply in
            defer { supply.warm = [] }
            return supply.warm
        }
        chill(warm)
    }

    // MARK: - Waste

    /// Bytes of slabs with contents in them, and of slots in use.
    var bytes: (slabs: Int, slots: Int) {
        var slabs = 0, slots = 0
        for slabClass in 1...Self.classes {
            slabs += all[slabClass].slabs.load(ordering: .relaxed)
            slots += all[slabClass].used.load(ordering: .relaxed) * slabClass
        }
        return (slabs * TmemFile.slabBytes, slots * Self.unitBytes)
    }

    var warmBytes: Int { supply.withLock { $0.warm.count } * TmemFile.slabBytes }

    /// How many slabs a compaction would free.
    var surplus: Int {
        (1...Self.classes).reduce(0) { sum, slabClass in
            let slots = Self.slots(of: slabClass)
            let needed = (all[slabClass].used.load(ordering: .relaxed) + slots - 1) / slots
            return sum + max(0, all[slabClass].slabs.load(ordering: .relaxed) - needed)
        }
    }

    /// Whether compaction is worth it: looked at now and then, where something was freed.
    func isWasteful(every period: Int) -> Bool {
        guard frees.load(ordering: .relaxed) >= period else { return false }
        frees.store(0, ordering: .relaxed)
        let slabs = all.reduce(0) { $0 + $1.slabs.load(ordering: .relaxed) }
        return surplus > max(4, slabs / 32)
    }

    /// Chooses slabs whose contents fit into the free slots of the others of their class, the emptiest ones. Nothing is
    /// allocated in them any more. In order of their numbers.
    func chooseVictims() -> [UInt32] {
        var victims: [UInt32] = []
        for slabClass in 1...Self.classes {
            let its = all[slabClass], slots = Self.slots(of: slabClass)
            guard its.slabs.load(ordering: .relaxed) > (its.used.load(ordering: .relaxed) + slots - 1) / slots else { continue }
            its.head.withLock { head in
                var partial: [(slab: UInt32, used: Int)] = []
                var slab = head
                while slab != 0 {
                    partial.append((slab, Int(info.load16(Int(slab) * Self.infoBytes + Self.usedAt))))
                    slab = info.load32(Int(slab) * Self.infoBytes + Self.nextAt)
                }
                partial.sort { $0.used < $1.used }
                var free = partial.reduce(0) { $0 + slots - $1.used }
                for (slab, used) in partial {
                    // Its own free slots are not to be had.
                    free -= slots - used
                    guard used <= free else { break }
                    free -= used
                    unlist(slab, &head)
                    let at = Int(slab) * Self.infoBytes + Self.flagsAt
                    info.store8(at, info.load8(at) | Self.isVictim)
                    victims.append(slab)
                }
            }
        }
        return victims.sorted()
    }

    func isVictim(_ unit: UInt64) -> Bool {
        info.load8(Int(unit / UInt64(Self.unitsPerSlab)) * Self.infoBytes + Self.flagsAt) & Self.isVictim != 0
    }

    /// A slot for what is moved: of a slab that has some already, of the same class.
    func allocateForMove(from unit: UInt64) -> UInt64? {
        takeFree(Int(file.classes.load8(Int(unit / UInt64(Self.unitsPerSlab)))))
    }

    /// Those that are not empty yet take part again.
    func release(victims: [UInt32]) {
        for slab in victims {
            let slabClass = Int(file.classes.load8(Int(slab)))
            all[slabClass].head.withLock { head in
                let at = Int(slab) * Self.infoBytes
                // One that has run empty is no victim any more. It may be in use already, for this class or another.
                let flags = info.load8(at + Self.flagsAt)
                guard Int(file.classes.load8(Int(slab))) == slabClass, flags & Self.isVictim != 0 else { return }
                seams.whileReleasing?()
                info.store8(at + Self.flagsAt, flags & ~Self.isVictim)
                let used = Int(info.load16(at + Self.usedAt))
                if used > 0, used < Self.slots(of: slabClass), flags & Self.isListed == 0 { list(slab, &head) }
            }
        }
    }

    // MARK: - Start

    /// Takes over what an earlier process left: `locations` says which units contents begin at, and how many they have. Every slab
    /// that has none gives its memory back. Throws when contents overlap or lie outside of slots.
    func recover(_ locations: (_ body: (UInt64, Int) throws(QuireError) -> Void) throws(QuireError) -> Void) throws(QuireError) {
        let count = file.slabCount
        let words = Self.unitsPerSlab / 64
        var used = [UInt64](repeating: 0, count: Int(count) * words)
        try locations { (unit: UInt64, units: Int) throws(QuireError) in
            let slab = Int(unit / UInt64(Self.unitsPerSlab)), offset = Int(unit % UInt64(Self.unitsPerSlab))
            let slabClass = slab < Int(count) ? Int(file.classes.load8(slab)) : 0
            guard slab > 0, (1...Self.classes).contains(slabClass), offset % slabClass == 0,
                offset / slabClass < Self.slots(of: slabClass), units <= slabClass
            else { throw TmemRecovery.damaged("a content lies outside of every slot") }
            let slot = offset / slabClass
            guard used[slab * words + slot / 64] & 1 << UInt64(slot % 64) == 0 else {
                throw TmemRecovery.damaged("two contents are in one slot")
            }
            used[slab * words + slot / 64] |= 1 << UInt64(slot % 64)
        }
        var cold: [UInt32] = []
        for slab in 1..<max(1, count) {
            let bits = used[Int(slab) * words..<Int(slab + 1) * words]
            let total = bits.reduce(0) { $0 + $1.nonzeroBitCount }
            guard total > 0 else {
                cold.append(slab)
                continue
            }
            let slabClass = Int(file.classes.load8(Int(slab)))
            let its = all[slabClass], at = Int(slab) * Self.infoBytes
            let last = bits.lastIndex { $0 != 0 }!
            let fresh = (last - bits.startIndex) * 64 + 64 - bits[last].leadingZeroBitCount
            var free = Self.noSlot
            for slot in stride(from: fresh - 1, through: 0, by: -1)
            where bits[bits.startIndex + slot / 64] & 1 << UInt64(slot % 64) == 0 {
                let unit = Int(slab) * Self.unitsPerSlab + slot * slabClass
                file.data.store16(unit * Self.unitBytes, free)
                free = UInt16(slot)
            }
            info.store16(at + Self.usedAt, UInt16(total))
            info.store16(at + Self.freeAt, free)
            info.store16(at + Self.freshAt, UInt16(fresh))
            its.slabs.wrappingAdd(1, ordering: .relaxed)
            its.used.wrappingAdd(total, ordering: .relaxed)
            if total < Self.slots(of: slabClass) { its.head.withLock { list(slab, &$0) } }
            budget.note(TmemFile.slabBytes, isMetadata: false)
        }
        budget.note((Int(count) / 256 + 1) * 4096, isMetadata: true)
        // What was free or only taken when the earlier process died, but has memory.
        var next: UInt32 = 1
        while let found = file.slabsWithMemory(from: next, to: count) {
            for slab in found where slab < count && used[Int(slab) * words..<Int(slab + 1) * words].allSatisfy({ $0 == 0 }) {
                file.punch(slabs: slab..<slab + 1)
            }
            next = found.upperBound
            guard next < count else { break }
        }
        supply.withLock { $0.cold = cold.reversed() }
    }
}
