import CPlatform
import Engines
import Platform
import TestSupport

// A process that puts pages until it is killed. Descriptor 3 is the store's file, 4 the notes: for each key the round that
// it began and the round that was acknowledged, 8 bytes each. The argument "early" breaks the order of writing and naming.
// The test that starts it finds out whether what was acknowledged is there (TmemCrashTests).

enum Load { static let threads = 2 }

do {
    let notes = try Mapping(Descriptor(owning: 4), byteCount: putterKeys * 16)
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
                let key = Int(order >> 33) % (putterKeys / Load.threads) * Load.threads + thread
                let round = shared.notes.load64(key * 16) + 1
                let bytes = putterPage(key, round)
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
