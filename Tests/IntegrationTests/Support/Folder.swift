import Glibc
import Platform

/// A folder of a test's own; gone with the value. A class, so that guests of one test can share it.
final class Folder {
    let path: String

    init() throws {
        let base = ProcessCalls.environment("TMPDIR") ?? "/tmp"
        var number = UInt32.random(in: 0...999_999)
        while try !Files.makeDirectory("\(base)/quire-it-\(number)", mode: 0o700) { number += 1 }
        path = "\(base)/quire-it-\(number)"
    }

    deinit { Self.remove(path) }

    private static func remove(_ path: String) {
        for name in Files.list(path) ?? [] {
            let inner = path + "/" + name
            if Files.target(ofLink: inner) == nil && Files.isDirectory(inner) { remove(inner) } else { Files.remove(inner) }
        }
        Files.removeDirectory(path)
    }

    func sparseFile(_ name: String, byteCount: UInt64) throws -> String {
        let file = try Descriptor.open(path + "/" + name, O_RDWR | O_CREAT)
        try file.truncate(to: byteCount)
        return path + "/" + name
    }
}

/// Runs a command to its end; its output and stderr together. Throws if it fails.
@discardableResult func host(_ arguments: String...) throws -> String {
    try host(arguments)
}

@discardableResult func host(_ arguments: [String]) throws -> String {
    let (status, text) = try Program.run(arguments)
    guard status == 0 else { throw Trouble("\(arguments.joined(separator: " ")): status \(status): \(text)") }
    return text
}
