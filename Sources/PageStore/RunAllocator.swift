/// Which slots of a store are free, and where the next run of them is.
///
/// One bit a slot, and above the words of 64 bits a binary tree in which every node knows the free run at its start, at
/// its end, and the longest anywhere in it, as the page allocator of Go's runtime has it (mpagealloc.go). Finding the
/// lowest run of n slots and freeing one both walk one path: O(log n), however the slots are scattered. Neighbours join
/// by themselves, since nothing but the bits says what is free.
///
/// It starts small and doubles when it needs room, up to `limit`, so a large limit costs nothing; and once everything
/// is free again it is small again. Slot 0 is never handed out.
package struct RunAllocator {
    private struct Room {
        var prefix: UInt32 = 0
        var suffix: UInt32 = 0
        var best: UInt32 = 0
    }

    /// Slots are 1 ..< limit.
    package let limit: Int
    /// Slots that are not free.
    package private(set) var used = 0
    /// Nodes of the tree that were looked at or changed: what its work is measured by.
    package private(set) var steps = 0

    /// Bit i of word w: slot 64 w + i is free.
    private var words: [UInt64] = []
    /// Node 1 is the root, 2 i and 2 i + 1 are the halves of i; the last `words.count` are the words.
    private var tree: [Room] = []

    private static let firstWords = 16

    package init(limit: Int) {
        precondition(limit > 1 && limit <= 1 << 31)
        self.limit = limit
        reset(wordCount: Self.firstWords)
    }

    private var capacity: Int { words.count * 64 }
    /// No slot at or above this is in use.
    package var bound: Int { min(capacity, limit) }

    /// Bytes of bookkeeping.
    package var byteCount: Int { words.count * 8 + tree.count * MemoryLayout<Room>.stride }

    private mutating func reset(wordCount: Int) {
        words = []
        grow(to: wordCount)
    }

    private mutating func grow(to count: Int) {
        for word in words.count..<count { words.append(Self.free(in: word, limit: limit)) }
        tree = [Room](repeating: Room(), count: 2 * count)
        for word in 0..<count { tree[count + word] = Self.room(of: words[word]) }
        for node in stride(from: count - 1, to: 0, by: -1) { join(node, half: Self.half(node, words: count)) }
        steps += 2 * count
    }

    /// All slots of a word that exist, but slot 0.
    private static func free(in word: Int, limit: Int) -> UInt64 {
        let exist = max(0, min(64, limit - 64 * word))
        let bits = exist == 64 ? UInt64.max : (1 << UInt64(exist)) - 1
        return word == 0 ? bits & ~1 : bits
    }

    private static func room(of word: UInt64) -> Room {
        var best: UInt32 = 0
        var left = word
        while left != 0 {
            left &= left << 1
            best += 1
        }
        return Room(
            prefix: UInt32((~word).trailingZeroBitCount), suffix: UInt32((~word).leadingZeroBitCount), best: best)
    }

    /// Slots in one half of an inner node.
    private static func half(_ node: Int, words: Int) -> UInt32 {
        let depth = Int.bitWidth - 1 - node.leadingZeroBitCount
        return UInt32((words >> depth) * 32)
    }

    private mutating func join(_ node: Int, half: UInt32) {
        let low = tree[2 * node], high = tree[2 * node + 1]
        tree[node] = Room(
            prefix: low.prefix == half ? half + high.prefix : low.prefix,
            suffix: high.suffix == half ? half + low.suffix : high.suffix,
            best: max(low.best, high.best, low.suffix + high.prefix))
    }

    // MARK: - Taking and giving

    /// The lowest run of `count` free slots, which are not free from now on. Where there is none of that length, the
    /// longest there is. Nil if nothing is free.
    package mutating func allocate(_ count: Int) -> Range<Int>? {
        precondition(count > 0)
        while tree[1].best < count && capacity < limit { grow(to: words.count * 2) }
        let length = min(count, Int(tree[1].best))
        guard length > 0 else { return nil }
        let start = find(length)
        mark(start..<start + length, free: false)
        return start..<start + length
    }

    /// Takes one slot that must be free: how a store that was there before is learned. False if it is not free.
    package mutating func take(_ slot: Int) -> Bool {
        guard slot > 0 && slot < limit else { return false }
        while slot >= capacity { grow(to: words.count * 2) }
        guard isFree(slot) else { return false }
        mark(slot..<slot + 1, free: false)
        return true
    }

    /// Gives back slots, none of which is free.
    package mutating func free(_ slots: Range<Int>) {
        mark(slots, free: true)
        if used == 0 && words.count > Self.firstWords { reset(wordCount: Self.firstWords) }
    }

    package func isFree(_ slot: Int) -> Bool { slot >= capacity || words[slot / 64] & 1 << UInt64(slot % 64) != 0 }

    /// The next run of used slots at or after `start`.
    package func nextUsed(from start: Int) -> Range<Int>? {
        var first = max(start, 1)
        while first < capacity && first < limit && isFree(first) {
            first = words[first / 64] == Self.free(in: first / 64, limit: limit) ? (first / 64 + 1) * 64 : first + 1
        }
        guard first < min(capacity, limit) else { return nil }
        var end = first + 1
        while end < min(capacity, limit) && !isFree(end) { end += 1 }
        return first..<end
    }

    private mutating func find(_ length: Int) -> Int {
        var node = 1, start = 0
        while node < words.count {
            steps += 1
            let half = Int(Self.half(node, words: words.count))
            let low = tree[2 * node], high = tree[2 * node + 1]
            if low.best >= length {
                node = 2 * node
            } else if Int(low.suffix) + Int(high.prefix) >= length {
                return start + half - Int(low.suffix)
            } else {
                node = 2 * node + 1
                start += half
            }
        }
        // Bit i of `runs` stays while slots i ..< i + covered are all free.
        var runs = words[node - words.count]
        var covered = 1
        while covered < length {
            let step = min(covered, length - covered)
            runs &= runs >> UInt64(step)
            covered += step
        }
        return start + runs.trailingZeroBitCount
    }

    private mutating func mark(_ slots: Range<Int>, free: Bool) {
        precondition(slots.lowerBound > 0 && slots.upperBound <= min(capacity, limit) && !slots.isEmpty)
        let first = slots.lowerBound / 64, last = (slots.upperBound - 1) / 64
        for word in first...last {
            let low = max(slots.lowerBound, word * 64) - word * 64
            let high = min(slots.upperBound, word * 64 + 64) - word * 64
            let bits = (high == 64 ? UInt64.max : (1 << UInt64(high)) - 1) & ~((1 << UInt64(low)) - 1)
            precondition(words[word] & bits == (free ? 0 : bits), "a slot is taken or freed twice")
            words[word] ^= bits
            tree[words.count + word] = Self.room(of: words[word])
        }
        used += free ? -slots.count : slots.count
        var low = (words.count + first) / 2, high = (words.count + last) / 2
        while low >= 1 {
            let half = Self.half(low, words: words.count)
            for node in low...high { join(node, half: half) }
            steps += high - low + 1
            low /= 2
            high /= 2
        }
    }
}
