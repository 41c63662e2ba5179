import CPlatform
import Engines
import Platform

// A process that puts pages until it is killed. Descriptor 3 is the store's file, 4 the notes: for each key the round that
// it began and the round that was acknowledged, 8 bytes each. The argument "early" breaks the order of writing and naming.
// The test that starts it finds out whether what was acknowledged is there (TmemCrashTests).

enum Load {
    static let keys = 512, threads = 2
}

/// The same as in the test: what a key holds after a round; nil: nothing.
func page(_ key: Int, _ round: UInt64) -> [UInt8]? {
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

do {
    let notes = try Mapping(Descriptor(owning: 4), byteCount: Load.keys * 16)
    var seams = TmemSeams()
    seams.namesBeforeWriting = CommandLine.arguments.contains("early")
    let tmem = try Tmem(Descriptor(owning: 3), .init(), seams: seams)
    let pool = try tmem.pool(named: "swap") ?? tmem.createPool(
        .init(kind: .persistent, scope: .private, name: "swap", client: "vm"))
    let shared = Shared(notes)
    var all: [JoinableThread] = []
    for thread in 0..<Load.threads {
        all.append(try JoinableThread("putter") {
            var order = UInt64(thread + 1)
            while true {
                order = order &* 6_364_136_223_846_793_005 &+ 1_442_695_040_888_963_407
                let key = Int(order >> 33) % (Load.keys / Load.threads) * Load.threads + thread
                let round = shared.notes.load64(key * 16) + 1
                let bytes = page(key, round)
                shared.notes.store64(key * 16, round)
                if let bytes {
                    do { try pool.put(7, UInt32(key), bytes.span.bytes) } catch {
                        writeStandardError("putter: \(error)")
                        exit(2)
                    }
                } else {
                    pool.flush(7, UInt32(key))
                }
                shared.notes.store64(key * 16 + 8, round)
            }
        })
    }
    for thread in all { thread.join() }
} catch {
    writeStandardError("putter: \(error)")
    exit(1)
}

final class Shared: Sendable {
    let notes: Mapping
    init(_ notes: consuming Mapping) { self.notes = notes }
}
