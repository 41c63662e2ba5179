import Glibc
import Host
import Platform
import Testing

/// A folder of a test's own; gone with the value.
struct TemporaryFolder: ~Copyable {
    let path: String

    init() throws {
        let base = ProcessCalls.environment("TMPDIR") ?? "/tmp"
        var number = UInt32.random(in: 0 ... .max)
        while try !Files.makeDirectory("\(base)/quire-test-\(number)", mode: 0o700) { number &+= 1 }
        path = "\(base)/quire-test-\(number)"
    }

    deinit { Self.remove(path) }

    static func remove(_ path: String) {
        for name in Files.list(path) ?? [] {
            let inner = path + "/" + name
            if Files.target(ofLink: inner) == nil && Files.isDirectory(inner) { remove(inner) } else { Files.remove(inner) }
        }
        Files.removeDirectory(path)
    }

    func write(_ name: String, _ text: String, mode: mode_t = 0o600) throws -> String {
        let file = try Descriptor.open(path + "/" + name, O_RDWR | O_CREAT | O_TRUNC, mode: mode)
        try file.replaceContent(text)
        return path + "/" + name
    }
}

/// The one-line message that `body` fails with; nil if it does not fail.
func message<R: ~Copyable>(_ body: () throws -> R) -> String? {
    do {
        _ = try body()
        return nil
    } catch {
        return "\(error)"
    }
}
