import Glibc
import Platform

/// What is there to read; empty at the end of the stream.
func readSome(_ raw: Int32) throws -> [UInt8] {
    var buffer = [UInt8](repeating: 0, count: 65536)
    let n = unsafe read(raw, &buffer, buffer.count)
    guard n >= 0 || errno == ECONNRESET else { throw QuireError.system("cannot read") }
    return Array(buffer.prefix(max(0, n)))
}

/// A guest's serial console: QEMU's stdin and stdout. Nothing is lost, whoever reads when; the end of QEMU is its end.
///
/// The shell in the guest neither echoes nor prompts (Tests/guest/init), so what comes is what commands say, and a marker
/// on the command's own line tells where it ends.
final class Console {
    private let input: Descriptor
    private let output: Descriptor
    /// All that ever came.
    private(set) var log = ""
    /// What was not asked for yet.
    private var unread = ""
    private(set) var hasEnded = false
    private var marker = Int.random(in: 1000...9999) * 1000
    /// A panic is part of the test.
    var mayPanic = false

    init(input: consuming Descriptor, output: consuming Descriptor) {
        self.input = input
        self.output = output
    }

    /// Takes what is there, after waiting for it for up to `milliseconds`.
    func drain(_ milliseconds: Int32 = 0) throws {
        if !hasEnded, !waitReadable([output.raw], timeoutMilliseconds: milliseconds).isEmpty {
            let bytes = try readSome(output.raw)
            guard !bytes.isEmpty else {
                hasEnded = true
                return
            }
            let text = String(decoding: bytes, as: UTF8.self)
            // What is looked for may have come in two parts.
            let recent = log.suffix(32) + text
            log += text
            unread += text
            // A bug in the guest's kernel is never what a test wants, whatever else it finds.
            for bad in ["Kernel panic", "BUG:", "Oops:", "WARNING: CPU", "soft lockup", "rcu: INFO", "Bad page state", "quire-guest: shell ended"]
            where !mayPanic && recent.contains(bad) {
                ProcessCalls.sleep(milliseconds: 1500)
                if !waitReadable([output.raw], timeoutMilliseconds: 0).isEmpty {
                    log += String(decoding: try readSome(output.raw), as: UTF8.self)
                }
                throw Trouble("the guest says '\(bad)'")
            }
        }
    }

    /// Waits for a text, and returns what came before it.
    @discardableResult func expect(_ text: String, within seconds: Double) throws -> String {
        let deadline = monotonicNanoseconds() + UInt64(seconds * 1e9)
        while true {
            if let range = unread.firstRange(of: text) {
                let before = String(unread[..<range.lowerBound])
                unread = String(unread[range.upperBound...])
                return before
            }
            guard !hasEnded else { throw Trouble("QEMU ended while the test waited for '\(text)'") }
            guard monotonicNanoseconds() < deadline else {
                throw Trouble("the guest did not say '\(text)' within \(Int(seconds)) s")
            }
            try drain(100)
        }
    }

    func send(_ line: String) throws {
        var bytes = Array((line + "\n").utf8)
        while !bytes.isEmpty {
            let n = unsafe write(input.raw, bytes, bytes.count)
            guard n > 0 else { throw Trouble("cannot write to the guest's console") }
            bytes.removeFirst(n)
        }
    }

    /// Starts a command; `finish` waits for it.
    func start(_ command: String) throws -> Int {
        marker += 1
        // A command that ends in & takes no semicolon.
        try send("\(command)\(command.hasSuffix("&") ? "" : ";") echo \"@@\(marker) $?@\"")
        return marker
    }

    func finish(_ marker: Int, within seconds: Double) throws -> (text: String, status: Int) {
        let text = try expect("@@\(marker) ", within: seconds)
        let status = try expect("@\n", within: seconds)
        return (text, Int(status) ?? -1)
    }

    /// Waits for the ready line of a boot.
    ///
    /// Multi-threaded emulation loses a guest now and then that patches its kernel (`QEMU.acceleration`), and every guest does that
    /// while it boots. So one that says nothing at all gets a second try: `reset` has it begin anew, and returns what it found.
    func expectReady(orElse reset: (() throws -> String)? = nil) throws {
        if let reset, !QEMU.hasKVM, try isSilent(for: Effort.bootPatience / 3) {
            print("a guest has said nothing since it was started: reset once\n\(try reset())")
        }
        try expect("quire-guest: ready\n", within: Effort.bootPatience)
    }

    private func isSilent(for seconds: Double) throws -> Bool {
        let deadline = monotonicNanoseconds() + UInt64(seconds * 1e9)
        while unread.isEmpty, !hasEnded, monotonicNanoseconds() < deadline { try drain(100) }
        return unread.isEmpty && !hasEnded
    }

    /// Boots that were seen so far.
    var boots: Int { log.ranges(of: "quire-guest: ready\n").count }
}
