import CPlatform

/// The terminal of this process, while something is drawn on it: no echo, keys at once, a screen of its own. It is as it
/// was again when the value is gone, and also after exit(3) and a fault.
public struct Terminal: ~Copyable {
    /// stdin and stdout must be the terminal.
    public init() throws(QuireError) { try Self.enter() }
    deinit { cp_terminal_leave() }

    private static func enter() throws(QuireError) {
        guard cp_terminal_enter(1) == 0 else { throw .system("cannot draw on the terminal") }
    }

    /// Nil if stdout is no terminal.
    public static func size() -> (columns: Int, rows: Int)? {
        var columns: Int32 = 0, rows: Int32 = 0
        guard unsafe cp_terminal_size(1, &columns, &rows) == 0, columns > 0, rows > 0 else { return nil }
        return (Int(columns), Int(rows))
    }

    /// Replaces what is on the screen.
    public borrowing func draw(_ lines: [String]) {
        let bytes = Array(("\u{1B}[H" + lines.map { $0 + "\u{1B}[K" }.joined(separator: "\r\n") + "\u{1B}[J").utf8)
        var done = 0
        while done < bytes.count {
            let n = unsafe bytes.withUnsafeBytes { unsafe write(1, $0.baseAddress! + done, bytes.count - done) }
            if n < 0 && cp_errno() == EINTR { continue }
            guard n > 0 else { return }
            done += n
        }
    }

    /// What was typed, once something was. Nil: the terminal is gone.
    public borrowing func keys() -> [UInt8]? {
        var bytes = [UInt8](repeating: 0, count: 64)
        let n = unsafe read(0, &bytes, bytes.count)
        return n > 0 ? Array(bytes.prefix(n)) : nil
    }

    /// Gives the terminal back and stops this process, as Ctrl-Z does; returns when it is continued.
    public borrowing func suspend() throws(QuireError) {
        cp_terminal_leave()
        kill(getpid(), SIGSTOP)
        try Self.enter()
    }
}
