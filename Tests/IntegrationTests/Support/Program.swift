import Glibc
import Host
import Platform
import TestSupport

/// Where things are: the programs that were built with this test, what `make guest` prepared, and the QEMUs.
enum Program {
    /// The package, by the place of this file.
    static let top: String = {
        var path = Substring(#filePath)
        for _ in 0..<4 { path = path[..<(path.lastIndex(of: "/") ?? path.startIndex)] }
        return String(path)
    }()

    static let quire = products + "quire"
    static let backend = products + "quire-backend"

    static let cache =
        (ProcessCalls.environment("XDG_CACHE_HOME") ?? (ProcessCalls.environment("HOME") ?? "/root") + "/.cache") + "/quire"

    /// Runs a command to its end, with stdout and stderr in one text.
    static func run(_ arguments: [String]) throws -> (status: Int32, text: String) {
        var pipe = try Pipe()
        let writer = pipe.takeWriter(), reader = pipe.takeReader()
        var options = ChildProcess.Options()
        options.passing = [.init(from: writer.raw, to: 1), .init(from: writer.raw, to: 2)]
        var child = try ChildProcess(arguments, options)
        _ = consume writer
        let text = String(decoding: try reader.readAll(limit: 1 << 22), as: UTF8.self)
        return (child.wait().shellStatus, text)
    }
}

/// A guest kernel and what `make guest` made for it.
enum Kernel: String, CustomStringConvertible {
    case v6_1 = "6.1", v6_12 = "6.12"
    /// What a boot loader loads.
    var image: String { "\(Program.cache)/guest/\(rawValue)/vmlinuz" }
    /// The same kernel, unpacked: what QEMU loads.
    var unpacked: String { "\(Program.top)/build/guest/\(rawValue)/vmlinux" }
    var initramfs: String { "\(Program.top)/build/guest/\(rawValue)/initramfs" }
    var description: String { rawValue }
}

enum QEMU: CustomStringConvertible {
    /// Debian 12's, 7.2.
    case distribution
    /// That of bookworm-backports, 10.
    case ten

    var program: String {
        switch self {
        case .distribution: "qemu-system-x86_64"
        case .ten: Program.cache + "/qemu-10/bin/qemu-system-x86_64"
        }
    }
    var description: String { self == .distribution ? "QEMU 7.2" : "QEMU 10" }

    /// Whether guests run on this host's CPU (scripts/accelerator has tried); on an emulated one otherwise.
    static let hasKVM = (try? Files.read(Program.top + "/build/guest/accelerator"))?.hasPrefix("kvm") ?? false

    /// `patchingCode`: the guest patches its kernel under load. Multi-threaded emulation then loses it now and then: a CPU
    /// goes on with the breakpoint that stood at a tracepoint's branch while it was patched, and takes it again and again, in
    /// `__alloc_pages`. Switching the tracepoint in a guest that never saw quire.ko does the same (QEMU 7.2).
    func acceleration(for kernel: Kernel, patchingCode: Bool = false) -> [String] {
        if Self.hasKVM { return ["-accel", "kvm", "-cpu", "host,vmx=off,svm=off"] }
        if patchingCode { return ["-accel", "tcg,thread=single", "-cpu", "qemu64,-cx16"] }
        // 6.12 crashes in the emulated cmpxchg16b of 7.2, and is unstable on its multi-threaded emulation (GUEST.md).
        if kernel == .v6_12 && self == .distribution { return ["-accel", "tcg,thread=single", "-cpu", "qemu64,-cx16"] }
        return ["-accel", "tcg,thread=multi"]
    }
}
