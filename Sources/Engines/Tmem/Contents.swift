import CCompress
import PageContent
import Platform
import Synchronization

/// The contents of pages, each stored once. Leaves name a content by its number; how many names it has is counted here.
///
/// In the file a content has 16 bytes: where its bytes are (one word, so that compaction moves them by one store), and the
/// fingerprint that it is found by. The fingerprint is 47 bits of the page's hash under a secret of the store; that it
/// fits is a reason to compare all bytes and never a proof. Beside the file, 4 bytes: the count of names and the one pool
/// that they all belong to, as for nearly every content. Where several pools name it (or too often for 16 bits), a side
/// table knows how often each does.
///
/// Two kinds of numbers: those with `fillBit` are pages of one repeated word, which is in the entry in place of the
/// location; they have no bytes in the slabs. The page of zeros doesn't even have an entry.
///
/// Fair accounting: a pool that alone names a content is charged for its units; several are charged in proportion to how
/// often they do, rounded so that the sum is exact. What pools are charged is always what all contents together take.
///
/// Whose turn it is to read bytes: a content that a leaf names is not freed while the leaf's stripe is locked, and one
/// that is found in its bucket not while the bucket's stripe is. Compaction moves bytes under neither, but leaves the old
/// ones in peace until every stripe of both tables has been unlocked once (`TmemStore.grace`).
final class Contents: SplitTableUser, Sendable {
    static let fillBit: UInt32 = 1 << 31
    /// The page of zeros.
    static let zeros = fillBit

    struct Location: Equatable {
        static let bytesLimit = 4096
        /// Where: a number of units.
        let unit: UInt64
        let length: Int
        let codec: cc_codec
        /// The upper bits of the fingerprint.
        let tag: UInt64

        init(unit: UInt64, length: Int, codec: cc_codec, tag: UInt64) {
            (self.unit, self.length, self.codec, self.tag) = (unit, length, codec, tag)
        }
        // 34 bits of unit, 13 of length, 2 of codec, 15 of tag. Never 0, since no length is.
        @inline(__always) init(word: UInt64) {
            unit = word & (1 << 34 - 1)
            length = Int(word >> 34 & (1 << 13 - 1))
            codec = cc_codec(UInt32(word >> 47 & 3))
            tag = word >> 49
        }
        var word: UInt64 { unit | UInt64(length) << 34 | UInt64(codec.rawValue) << 47 | tag << 49 }
        var units: Int { Slabs.slabClass(for: length) }
        var offset: Int { Int(unit) * Slabs.unitBytes }
        var isValid: Bool { (1...Self.bytesLimit).contains(length) && codec.rawValue <= CC_ZSTD.rawValue }
    }

    private struct Sharers {
        /// What one takes, about: it is in a dictionary, and its list on the heap.
        static let bytes = 128
        // By pool.
        var counts: [(pool: UInt16, count: UInt32)]
        var total: UInt64
    }

    private struct State {
        var free = Numbers.Free()
        var shared: [UInt32: Sharers] = [:]
        var contents = 0
        var fills = 0
        /// Bytes as compressed.
        var bytes = 0
    }
    private final class Stripe: Sendable {
        let state = Mutex(State())
    }

    // An owner's word: how many names (16 bits), whose (15 bits), and whether it is a fill.
    private static let countMask: UInt32 = 0xffff
    private static let manyPools: UInt32 = 0x7fff
    private static let ownerFill: UInt32 = 1 << 31

    private let file: TmemFile
    private let slabs: Slabs
    private let budget: TmemBudget
    private let seams: TmemSeams
    private let table: SplitTable
    private let numbers: Numbers
    private let ownerMapping: Mapping
    private let owners: MappedBytes
    private let chargeMapping: Mapping
    private let charges: MappedBytes
    private let stripes: [Stripe]
    private let fillKeys: (UInt64, UInt64)
    /// How what comes is compressed: the codec, and the level in the lower half. Each content says how it is itself.
    private let method = Atomic<UInt64>(0)

    init(_ file: TmemFile, _ slabs: Slabs, _ compression: Tmem.Compression, _ budget: TmemBudget, _ seams: TmemSeams)
        throws(QuireError)
    {
        self.file = file
        self.slabs = slabs
        self.budget = budget
        self.seams = seams
        table = try SplitTable(limit: TmemFile.contentLimit, budget: budget)
        ownerMapping = try Mapping(anonymousByteCount: TmemFile.contentLimit * 4)
        chargeMapping = try Mapping(anonymousByteCount: TmemFile.poolLimit * 512)
        ownerMapping.excludeFromDumps()
        ownerMapping.refuseHugePages()
        // Sound: this object keeps both mappings.
        unsafe owners = ownerMapping.view(0, count: TmemFile.contentLimit * 4)
        unsafe charges = chargeMapping.view(0, count: TmemFile.poolLimit * 512)
        let extent = TmemFile.extentBytes / 16
        numbers = Numbers(
            count: file.contentCount, limit: TmemFile.contentLimit, extent: extent, extentBytes: extent * 20, budget: budget,
            populate: { (range: Range<Int>) throws(QuireError) in try file.populateContents(range) },
            note: { file.contentCount = $0 })
        stripes = (0..<SplitTable.stripes).map { _ in Stripe() }
        let secret = file.hasher.secret
        func key(_ at: Int) -> UInt64 { secret[at..<at + 8].reduce(0) { $0 << 8 | UInt64($1) } }
        fillKeys = (key(0), key(8))
        setMethod(try Self.method(of: compression))
    }

    /// As a word for `setMethod`. Throws `.invalid` for a level that there is not.
    static func method(of compression: Tmem.Compression) throws(QuireError) -> UInt64 {
        let (codec, level): (cc_codec, Int32)
        switch compression {
        case .lz4: (codec, level) = (CC_LZ4, 1)
        case .zstd(let wanted):
            guard (1...19).contains(wanted) else { throw QuireError(.invalid, "zstd has levels 1 to 19, and no \(wanted)") }
            (codec, level) = (CC_ZSTD, wanted)
        }
        return UInt64(codec.rawValue) << 32 | UInt64(level)
    }
    /// Of what comes from now on.
    func setMethod(_ word: UInt64) { method.store(word, ordering: .relaxed) }
    private var wanted: (codec: cc_codec, level: Int32) {
        let word = method.load(ordering: .relaxed)
        return (cc_codec(UInt32(word >> 32)), Int32(truncatingIfNeeded: word))
    }

    // MARK: - Entries

    @inline(__always) private func location(_ number: UInt32) -> Location { Location(word: file.contents.load64(Int(number) * 16)) }
    @inline(__always) private func fingerprint(_ number: UInt32) -> UInt32 { file.contents.load32(Int(number) * 16 + 8) }
    @inline(__always) func next(_ number: UInt32) -> UInt32 { file.contents.load32(Int(number) * 16 + 12) }
    @inline(__always) func setNext(_ number: UInt32, _ next: UInt32) { file.contents.store32(Int(number) * 16 + 12, next) }
    @inline(__always) private func owner(_ number: UInt32) -> UInt32 { owners.load32(Int(number) * 4) }
    @inline(__always) private func setOwner(_ number: UInt32, _ owner: UInt32) { owners.store32(Int(number) * 4, owner) }

    @inline(__always) private func stripe(_ fingerprint: UInt32) -> Stripe { stripes[Int(fingerprint) % SplitTable.stripes] }

    private func fillHash(_ word: UInt64) -> UInt32 {
        let product = (word ^ fillKeys.0).multipliedFullWidth(by: fillKeys.1 | 1)
        return UInt32(truncatingIfNeeded: (product.high ^ product.low) >> 16)
    }

    // MARK: - Charges

    private func charge(_ pool: UInt16, _ fingerprint: UInt32, _ bytes: Int) {
        charges.add64(Int(pool) * 512 + Int(fingerprint % 8) * 64, UInt64(bitPattern: Int64(bytes)))
    }

    /// What a pool is charged, in bytes. Exact when nobody puts.
    func charged(_ pool: UInt16) -> Int {
        var sum: UInt64 = 0
        for cell in 0..<8 { sum &+= charges.load64(Int(pool) * 512 + cell * 64) }
        return max(0, Int(Int64(bitPattern: sum)))
    }

    /// Bytes that a content takes.
    private func size(_ number: UInt32, _ owner: UInt32) -> Int {
        owner & Self.ownerFill != 0 ? 0 : location(number).units * Slabs.unitBytes
    }

    /// Calls `body` with each pool's part of `size` bytes: the parts add up to it.
    private func split(_ sharers: Sharers, _ size: Int, _ body: (UInt16, Int) -> Void) {
        var count: UInt64 = 0, done: UInt64 = 0
        for sharer in sharers.counts {
            count += UInt64(sharer.count)
            let upTo = UInt64(size) * count / sharers.total
            body(sharer.pool, Int(upTo - done))
            done = upTo
        }
    }

    // MARK: - Names

    /// One more name of a pool. `chargesNow` is off during a start, which charges at its end.
    private func addName(_ number: UInt32, _ pool: UInt16, _ state: inout State, chargesNow: Bool = true) {
        let owner = owner(number), whose = owner >> 16 & 0x7fff, count = owner & Self.countMask
        if whose == UInt32(pool), count < Self.countMask {
            setOwner(number, owner + 1)
            return
        }
        let print = fingerprint(number), size = chargesNow ? size(number, owner) : 0
        var sharers: Sharers
        if whose == Self.manyPools {
            sharers = state.shared[number]!
            split(sharers, size) { charge($0, print, -$1) }
        } else {
            sharers = Sharers(counts: [(UInt16(whose), count)], total: UInt64(count))
            budget.note(Sharers.bytes, isMetadata: true)
            charge(UInt16(whose), print, -size)
        }
        if let index = sharers.counts.firstIndex(where: { $0.pool >= pool }) {
            if sharers.counts[index].pool == pool {
                sharers.counts[index].count += 1
            } else {
                sharers.counts.insert((pool, 1), at: index)
            }
        } else {
            sharers.counts.append((pool, 1))
        }
        sharers.total += 1
        split(sharers, size) { charge($0, print, $1) }
        state.shared[number] = sharers
        setOwner(number, owner & Self.ownerFill | Self.manyPools << 16 | 1)
    }

    /// One name less; true when it was the last.
    private func removeName(_ number: UInt32, _ pool: UInt16, _ state: inout State) -> Bool {
        let owner = owner(number)
        let print = fingerprint(number), size = size(number, owner)
        guard owner >> 16 & 0x7fff == Self.manyPools else {
            if owner & Self.countMask > 1 {
                setOwner(number, owner - 1)
                return false
            }
            charge(pool, print, -size)
            setOwner(number, 0)
            return true
        }
        var sharers = state.shared[number]!
        split(sharers, size) { charge($0, print, -$1) }
        let index = sharers.counts.firstIndex { $0.pool == pool }!
        sharers.counts[index].count -= 1
        sharers.total -= 1
        if sharers.counts[index].count == 0 { sharers.counts.remove(at: index) }
        if sharers.counts.count == 1, sharers.total < UInt64(Self.countMask) {
            let last = sharers.counts[0]
            charge(last.pool, print, size)
            state.shared[number] = nil
            budget.giveBack(Sharers.bytes, isMetadata: true)
            setOwner(number, owner & Self.ownerFill | UInt32(last.pool) << 16 | last.count)
        } else {
            split(sharers, size) { charge($0, print, $1) }
            state.shared[number] = sharers
        }
        return false
    }

    /// What a pool is charged less when one of its names of this content goes: whole bytes, for caps.
    func share(_ number: UInt32, _ pool: UInt16) -> Int {
        let index = number & ~Self.fillBit
        guard number & Self.fillBit == 0 else { return 0 }
        return stripe(fingerprint(index)).state.withLock { state in
            let owner = owner(index)
            if owner >> 16 & 0x7fff != Self.manyPools { return owner & Self.countMask == 1 ? size(index, owner) : 0 }
            guard let sharers = state.shared[index], sharers.total > 0 else { return 0 }
            return size(index, owner) / Int(sharers.total)
        }
    }

    // MARK: - Put

    struct Acquired {
        let number: UInt32
        /// It was there already.
        let isShared: Bool
    }

    /// Names the content of a page for a pool. Nil: no room. `anywhere`: in a slot that is too large rather than not at all.
    func acquire(_ page: UnsafeRawPointer, _ hash: PageHash, _ pool: UInt16, anywhere: Bool) -> Acquired? {
        let hash = seams.hash ?? hash
        let print = UInt32(truncatingIfNeeded: hash.low), tag = hash.high >> 49
        let stripe = stripe(print)
        let found = stripe.state.withLock { state in unsafe find(page, print, tag, pool, &state) }
        if let found { return Acquired(number: found, isShared: true) }

        var bytes: UnsafeRawPointer? = nil
        let (chosen, level) = wanted
        var codec = chosen
        var length = unsafe Int(cc_compress(codec, level, page, UInt32(4096 - Slabs.unitBytes), &bytes))
        if length == 0 { (codec, length) = (CC_RAW, 4096) }
        let source = unsafe codec == CC_RAW ? page : bytes!
        let slabClass = Slabs.slabClass(for: length)
        guard let unit = anywhere ? slabs.allocate(slabClass) ?? slabs.allocateAnywhere(slabClass) : slabs.allocate(slabClass)
        else { return nil }
        let location = Location(unit: unit, length: length, codec: codec, tag: tag)
        // The slot is ours alone.
        if !seams.namesBeforeWriting { unsafe write(location, source) }
        seams.step?()

        var isFull = false, wantsGrowth = false
        let acquired = stripe.state.withLock { state -> Acquired? in
            // Somebody may have put the same meanwhile.
            if let found = unsafe find(page, print, tag, pool, &state) { return Acquired(number: found, isShared: true) }
            guard let number = numbers.take(&state.free, next: next) else {
                isFull = true
                return nil
            }
            file.contents.store32(Int(number) * 16 + 8, print)
            seams.step?()
            file.contents.store64(Int(number) * 16, location.word)
            setOwner(number, UInt32(pool) << 16 | 1)
            let bucket = table.bucket(print)
            setNext(number, table.head(bucket))
            table.setHead(bucket, number)
            wantsGrowth = table.added()
            state.contents += 1
            state.bytes += length
            charge(pool, print, location.units * Slabs.unitBytes)
            return Acquired(number: number, isShared: false)
        }
        if isFull || acquired?.isShared == true { slabs.free(unit) }
        if wantsGrowth { grow() }
        return acquired
    }

    /// For the seam that names contents before they are written.
    func writeLate(_ number: UInt32, _ page: UnsafeRawPointer) {
        var bytes: UnsafeRawPointer? = nil
        let location = location(number), (codec, level) = wanted
        _ = unsafe cc_compress(codec, level, page, UInt32(4096 - Slabs.unitBytes), &bytes)
        unsafe write(location, location.codec == CC_RAW ? page : bytes!)
    }

    private func write(_ location: Location, _ source: UnsafeRawPointer) {
        unsafe file.data.address(location.offset, count: location.length).copyMemory(from: source, byteCount: location.length)
    }

    /// Under the lock of its stripe: a content with these bytes, named once more.
    @inline(__always)
    private func find(_ page: UnsafeRawPointer, _ print: UInt32, _ tag: UInt64, _ pool: UInt16, _ state: inout State) -> UInt32? {
        var number = table.head(table.bucket(print))
        while number != 0 {
            if fingerprint(number) == print, owner(number) & Self.ownerFill == 0 {
                let location = location(number)
                if location.tag == tag, unsafe holds(location, page) {
                    addName(number, pool, &state)
                    return number
                }
            }
            number = next(number)
        }
        return nil
    }

    private func holds(_ location: Location, _ page: UnsafeRawPointer) -> Bool {
        if !seams.compares { return true }
        return unsafe cc_equals(
            location.codec, file.data.address(location.offset, count: location.length), UInt32(location.length), page)
    }

    /// Names a page of one repeated word.
    func acquire(fill word: UInt64, _ pool: UInt16) -> UInt32? {
        if word == 0 { return Self.zeros }
        let print = fillHash(word)
        var wantsGrowth = false
        let number = stripe(print).state.withLock { state -> UInt32? in
            let bucket = table.bucket(print)
            var number = table.head(bucket)
            while number != 0 {
                if fingerprint(number) == print, owner(number) & Self.ownerFill != 0, file.contents.load64(Int(number) * 16) == word {
                    addName(number, pool, &state)
                    return number | Self.fillBit
                }
                number = next(number)
            }
            guard let fresh = numbers.take(&state.free, next: next) else { return nil }
            file.contents.store32(Int(fresh) * 16 + 8, print)
            seams.step?()
            file.contents.store64(Int(fresh) * 16, word)
            setOwner(fresh, Self.ownerFill | UInt32(pool) << 16 | 1)
            setNext(fresh, table.head(bucket))
            table.setHead(bucket, fresh)
            wantsGrowth = table.added()
            state.fills += 1
            return fresh | Self.fillBit
        }
        if wantsGrowth { grow() }
        return number
    }

    private func grow() { table.grow(self) }
    func hash(of number: UInt32) -> UInt32 { fingerprint(number) }
    func lock(_ stripe: Int, _ body: () -> Void) { stripes[stripe].state.withLock { _ in body() } }

    /// Takes a name back. The last one frees the content.
    func release(_ number: UInt32, _ pool: UInt16) {
        guard number != Self.zeros else { return }
        let index = number & ~Self.fillBit
        let print = fingerprint(index)
        let unit = stripe(print).state.withLock { state -> UInt64? in
            guard removeName(index, pool, &state) else { return nil }
            let bucket = table.bucket(print)
            var before: UInt32 = 0, entry = table.head(bucket)
            while entry != index {
                before = entry
                entry = next(entry)
            }
            if before == 0 { table.setHead(bucket, next(index)) } else { setNext(before, next(index)) }
            table.removed()
            let location = location(index)
            file.contents.store64(Int(index) * 16, 0)
            seams.step?()
            setNext(index, state.free.head)
            state.free.head = index
            if number & Self.fillBit != 0 {
                state.fills -= 1
                return nil
            }
            state.contents -= 1
            state.bytes -= location.length
            return location.unit
        }
        if let unit { slabs.free(unit) }
    }

    // MARK: - Get

    /// The bytes of a content that the caller keeps named: he holds the lock of the stripe of a leaf that names it. False:
    /// they are damaged.
    func read(_ number: UInt32, into page: UnsafeMutableRawPointer) -> Bool {
        if number & Self.fillBit != 0 {
            let index = number & ~Self.fillBit
            unsafe cc_fill(page, index == 0 ? 0 : file.contents.load64(Int(index) * 16))
            return true
        }
        let location = location(number)
        seams.whileReading?()
        return unsafe cc_decompress(
            location.codec, file.data.address(location.offset, count: location.length), UInt32(location.length), page)
    }

    // MARK: - Compaction

    /// Moves the bytes of a content out of a slab that is to run empty; where they were, which must not be used again before
    /// the next grace. Nil if there was nothing to move or nowhere to move it to.
    func move(_ number: UInt32) -> UInt64? {
        let old = owner(number)
        guard old != 0, old & Self.ownerFill == 0, slabs.isVictim(location(number).unit) else { return nil }
        let print = fingerprint(number)
        return stripe(print).state.withLock { _ -> UInt64? in
            // It may be another one by now.
            let owner = owner(number)
            guard owner != 0, owner & Self.ownerFill == 0, fingerprint(number) % 64 == print % 64 else { return nil }
            let from = location(number)
            guard slabs.isVictim(from.unit), let unit = slabs.allocateForMove(from: from.unit) else { return nil }
            let to = Location(unit: unit, length: from.length, codec: from.codec, tag: from.tag)
            unsafe write(to, UnsafeRawPointer(file.data.address(from.offset, count: from.length)))
            seams.step?()
            file.contents.store64(Int(number) * 16, to.word)
            seams.step?()
            return from.unit
        }
    }

    /// Numbers are below this.
    var limit: UInt32 { numbers.count }

    /// Waits until nobody reads bytes that he found in a bucket before.
    func grace() { for stripe in stripes { stripe.state.withLock { _ in } } }

    // MARK: - Figures

    /// Contents with bytes in the slabs, those with a word, bytes as compressed.
    var figures: (contents: Int, fills: Int, bytes: Int) {
        stripes.reduce(into: (0, 0, 0)) { sum, stripe in
            stripe.state.withLock {
                sum.0 += $0.contents
                sum.1 += $0.fills
                sum.2 += $0.bytes
            }
        }
    }

    /// Bytes of all contents' units, counted one by one.
    func unitBytes() -> Int {
        (1..<max(1, numbers.count)).reduce(0) { $0 + (owner($1) == 0 ? 0 : size($1, owner($1))) }
    }

    /// Slabs that the contents need which any of these pools names, if they were packed as well as can be. Looks at all.
    func slabsNeeded(by pools: Set<UInt16>) -> Int {
        var counts = [Int](repeating: 0, count: Slabs.classes + 1)
        for number in 1..<max(1, numbers.count) {
            let owner = owner(number)
            guard owner != 0, owner & Self.ownerFill == 0 else { continue }
            let whose = owner >> 16 & 0x7fff
            if whose == Self.manyPools {
                let isNamed = stripe(fingerprint(number)).state.withLock { state in
                    state.shared[number]?.counts.contains { pools.contains($0.pool) } ?? false
                }
                guard isNamed else { continue }
            } else if !pools.contains(UInt16(whose)) {
                continue
            }
            let units = location(number).units
            if (1...Slabs.classes).contains(units) { counts[units] += 1 }
        }
        return (1...Slabs.classes).reduce(0) { $0 + (counts[$1] + Slabs.slots(of: $1) - 1) / Slabs.slots(of: $1) }
    }

    // MARK: - Start

    /// A leaf that was found names this. Charges nothing yet.
    func recoverName(_ number: UInt32, _ pool: UInt16) throws(QuireError) {
        guard number != Self.zeros else { return }
        let index = number & ~Self.fillBit, isFill = number & Self.fillBit != 0
        guard index > 0, index < numbers.count else { throw TmemRecovery.damaged("a page names a content that isn't there") }
        let owner = owner(index)
        if owner == 0 {
            guard isFill || location(index).isValid else {
                throw TmemRecovery.damaged("a page names a content that was never written")
            }
            setOwner(index, (isFill ? Self.ownerFill : 0) | UInt32(pool) << 16 | 1)
            return
        }
        guard (owner & Self.ownerFill != 0) == isFill else { throw TmemRecovery.damaged("a content is of two kinds") }
        if owner >> 16 & 0x7fff == UInt32(pool), owner & Self.countMask < Self.countMask {
            setOwner(index, owner + 1)
        } else {
            stripe(fingerprint(index)).state.withLock { addName(index, pool, &$0, chargesNow: false) }
        }
    }

    /// After all names: finds the contents again, charges them, and frees what nobody names.
    func recover() throws(QuireError) {
        let count = numbers.count
        var named = 0
        for number in 1..<max(1, count) where owner(number) != 0 { named += 1 }
        table.prepare(entries: named)
        try slabs.recover { (body: (UInt64, Int) throws(QuireError) -> Void) throws(QuireError) in
            for number in 1..<max(1, count) {
                let owner = owner(number), print = fingerprint(number)
                try stripe(print).state.withLock { (state: inout State) throws(QuireError) in
                    guard owner != 0 else {
                        file.contents.store64(Int(number) * 16, 0)
                        setNext(number, state.free.head)
                        state.free.head = number
                        return
                    }
                    let bucket = table.bucket(print)
                    setNext(number, table.head(bucket))
                    table.setHead(bucket, number)
                    _ = table.added()
                    if owner & Self.ownerFill != 0 {
                        state.fills += 1
                        return
                    }
                    let location = location(number)
                    try body(location.unit, location.units)
                    state.contents += 1
                    state.bytes += location.length
                    let size = location.units * Slabs.unitBytes
                    if owner >> 16 & 0x7fff == Self.manyPools {
                        split(state.shared[number]!, size) { charge($0, print, $1) }
                    } else {
                        charge(UInt16(owner >> 16 & 0x7fff), print, size)
                    }
                }
            }
        }
    }
}
