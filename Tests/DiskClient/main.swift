import Glibc
import Platform
import StoreProtocol

// A VM's side of a shared disk without the VM, for a Debian in which quired runs as a service (scripts/test-services):
// disk-client SOCKET DISK. Each line of stdin is done and answered by one line, across all that happens to quired meanwhile:
//
//   put N      writes content N to its place on the disk
//   check N    says "same", or WRONG if it reads anything else
//
// An error that lasts is an answer too. Nothing of Foundation: it is linked with the Swift runtime inside, for a machine without one.

enum Load { static let pages = 32 }

func content(_ seed: UInt64) -> [UInt8] {
    var state = seed &* 2 &+ 1
    return (0..<Load.pages * SharedDiskMessage.pageBytes).map { _ in
        state = state &* 6_364_136_223_846_793_005 &+ 1_442_695_040_888_963_407
        return UInt8(truncatingIfNeeded: state >> 33)
    }
}

/// Asks again as long as quired is away.
func persist<R>(_ body: () throws(QuireError) -> R) throws(QuireError) -> R {
    let deadline = monotonicNanoseconds() + 120_000_000_000
    while true {
        do throws(QuireError) { return try body() } catch {
            guard error.code == .retry, monotonicNanoseconds() < deadline else { throw error }
        }
    }
}

let arguments = CommandLine.arguments
guard arguments.count == 3 else {
    writeStandardError("usage: disk-client SOCKET DISK")
    exit(2)
}
let client = SharedDiskClient(path: arguments[1], .init(name: arguments[2], group: "", token: UInt64(ProcessCalls.ownPID), vm: ""))

while let line = readLine() {
    let words = line.split(separator: " ")
    guard words.count == 2, let seed = UInt64(words[1]) else {
        writeStandardError("disk-client: what is '\(line)'?")
        exit(2)
    }
    let place = seed * UInt64(Load.pages)
    var answer = "put"
    do throws(QuireError) {
        if words[0] == "put" {
            try persist { () throws(QuireError) in try client.put(place, content(seed)) }
        } else {
            let found = try persist { () throws(QuireError) in try client.get(place, count: Load.pages) }
            answer = found == content(seed) ? "same" : "WRONG"
        }
    } catch { answer = "error: \(error)" }
    do throws(QuireError) { try Descriptor.tell(1, answer + "\n") } catch { exit(1) }
}
