/// What a service tells systemd (sd_notify(3)): a datagram to the socket that $NOTIFY_SOCKET names. Without systemd, nothing.
public enum ServiceManager {
    /// `state`: lines such as READY=1. True if somebody was there to be told.
    @discardableResult public static func notify(_ state: String) -> Bool {
        guard let path = ProcessCalls.environment("NOTIFY_SOCKET"), path.hasPrefix("/") else { return false }
        guard let socket = try? UnixSocket.connect(to: path, kind: .datagrams) else { return false }
        do {
            try socket.sendMessage(Array(state.utf8))
            return true
        } catch { return false }
    }

    /// Whether systemd runs this host (sd_booted(3)).
    public static var isSystemd: Bool { Files.isDirectory("/run/systemd/system") }
}
