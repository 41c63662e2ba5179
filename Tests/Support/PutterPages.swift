/// Keys that `tmem-putter` puts.
public let putterKeys = 512

/// What a key of its holds after a round: any kind of page; nil: nothing. The test that kills it asks for the same.
public func putterPage(_ key: Int, _ round: UInt64) -> [UInt8]? {
    var state = UInt64(key) &* 0x9e37_79b9_7f4a_7c15 ^ round &* 0xbf58_476d_1ce4_e5b9
    func next() -> UInt64 {
        state = state &* 6_364_136_223_846_793_005 &+ 1_442_695_040_888_963_407
        return state ^ state >> 29
    }
    var words = [UInt64](repeating: 0, count: 512)
    switch round % 5 {
    case 0: return nil
    case 1: words = [UInt64](repeating: next() % 3, count: 512)
    case 2: for index in 0..<512 { words[index] = next() }
    case 3: for index in 0..<Int(next() % 400) { words[index] = next() }
    // The same for many keys.
    default: for index in 0..<256 { words[index] = round / 5 % 7 &* 0x1234_5678_9abc_def1 &+ UInt64(index) }
    }
    return words.flatMap { word in (0..<8).map { UInt8(truncatingIfNeeded: word >> (8 * $0)) } }
}
