import Glibc
import PageContent
import Platform

/// The list of what is parked, by name, with the files that it is: in a memory file that is parked like them.
///
/// A keeper that lives has everything that was ever sent to it. One that was killed may not have read the last of it, and the
/// service manager, which gives the next keeper what this one had, takes no more than the unit allows. Half of it would be worse than
/// nothing: the slots of a VM whose ledger is missing would count as free, and another's bytes would come where it maps them. So
/// what comes from there counts only if everything that is on the list has come.
///
/// Whoever works on what is parked has the list's lock: a second quired must not, whoever has started it.
package struct Manifest: ~Copyable, Sendable {
    package typealias Entries = [String: [FileStatus.Identity]]

    static let item = "manifest"
    /// A thousand VMs take 50 KiB of it.
    private static let byteCount = 1 << 20
    private static let seed: UInt64 = 0x7175_6972_6564

    package let file: Descriptor
    private let lock: Descriptor
    private var entries: Entries = [:]

    /// Nil: a new one.
    package init(_ parked: consuming Descriptor?) throws(QuireError) {
        let file = try Self.file(parked)
        let lock = try Descriptor.open("/proc/self/fd/\(file.raw)", O_RDWR)
        // A process that was killed is gone soon.
        let deadline = monotonicNanoseconds() + 3_000_000_000
        while try !lock.tryLock() {
            guard monotonicNanoseconds() < deadline else {
                throw QuireError(.busy, "another quired is still at work on what is kept: end it")
            }
            ProcessCalls.sleep(milliseconds: 5)
        }
        self.file = file
        self.lock = lock
    }

    private static func file(_ parked: consuming Descriptor?) throws(QuireError) -> Descriptor {
        if let parked { return parked }
        return try Memfd(name: "quired-manifest", byteCount: UInt64(byteCount)).takeDescriptor()
    }

    /// Nil where its writer was killed before it was done.
    package func read() throws(QuireError) -> Entries? {
        let text = String(decoding: try file.readBytes(at: 0, count: Self.byteCount), as: UTF8.self)
        let lines = text.prefix { $0 != "\0" }.split(separator: "\n", omittingEmptySubsequences: false)
        guard lines.count >= 2, let sum = UInt64(lines[0], radix: 16) else { return nil }
        let body = lines.dropFirst().joined(separator: "\n")
        guard checksum(body.utf8, seed: Self.seed) == sum else { return nil }
        var entries: Entries = [:]
        for line in lines.dropFirst() where !line.isEmpty {
            let parts = line.split(separator: "\t")
            let numbers = parts.dropFirst().compactMap { UInt64($0, radix: 16) }
            guard let name = parts.first, numbers.count == parts.count - 1, numbers.count % 2 == 0 else { return nil }
            entries[String(name)] = stride(from: 0, to: numbers.count, by: 2).map {
                FileStatus.Identity(device: numbers[$0], inode: numbers[$0 + 1])
            }
        }
        return entries
    }

    package mutating func write(_ entries: Entries) throws(QuireError) {
        var body = ""
        for (name, files) in entries.sorted(by: { $0.key < $1.key }) {
            body += name
            for file in files { body += "\t\(String(file.device, radix: 16))\t\(String(file.inode, radix: 16))" }
            body += "\n"
        }
        let bytes = Array("\(String(checksum(body.utf8, seed: Self.seed), radix: 16))\n\(body)\0".utf8)
        guard bytes.count <= Self.byteCount else { throw QuireError(.noSpace, "more is parked than there is room to list") }
        try file.writeBytes(at: 0, bytes)
        self.entries = entries
    }

    package mutating func set(_ name: String, _ files: [FileStatus.Identity]?) throws(QuireError) {
        guard entries[name] != files else { return }
        var entries = entries
        entries[name] = files
        try write(entries)
    }
}
