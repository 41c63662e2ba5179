import CPlatform
import Glibc

/// What a service tells systemd (sd_notify(3)): a datagram to the socket that $NOTIFY_SOCKET names. Without systemd, nothing.
public enum ServiceManager {
    /// `state`: lines such as READY=1. True if somebody was there to be told.
    @discardableResult public static func notify(_ state: String, passing descriptors: [Int32] = []) -> Bool {
        guard let path = ProcessCalls.environment("NOTIFY_SOCKET"), path.hasPrefix("/") else { return false }
        guard let socket = try? UnixSocket.connect(to: path, kind: .datagrams) else { return false }
        do {
            try socket.sendMessage(Array(state.utf8), passing: descriptors)
            return true
        } catch { return false }
    }

    /// Has systemd hold the descriptors, too, until they are forgotten: when this process fails, the one that is started in its place
    /// gets them (FileDescriptorStoreMax= in systemd.service(5) says how many there may be). Each has a name of its own, for what has one
    /// name comes back in no order.
    public static func store(_ name: String, _ descriptors: [Int32]) {
        for (index, raw) in descriptors.enumerated() {
            // Otherwise it lets go of a pipe whose other end is closed.
            notify("FDSTORE=1\nFDNAME=\(name)/\(index)\nFDPOLL=0", passing: [raw])
        }
    }

    public static func forget(_ name: String, count: Int) {
        for index in 0..<count { notify("FDSTOREREMOVE=1\nFDNAME=\(name)/\(index)") }
    }

    /// What an earlier process had stored (sd_listen_fds_with_names(3)); whoever asks first has it.
    public static func takeStored() -> [String: [Int32]] {
        defer { for name in ["LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"] { unsafe unsetenv(name) } }
        guard ProcessCalls.environment("LISTEN_PID") == "\(ProcessCalls.ownPID)",
            let count = ProcessCalls.environment("LISTEN_FDS").flatMap({ Int32($0) }), count > 0
        else { return [:] }
        let names = (ProcessCalls.environment("LISTEN_FDNAMES") ?? "").split(separator: ":", omittingEmptySubsequences: false)
        var places: [String: [Int: Int32]] = [:]
        for number in 0..<count {
            let raw = 3 + number
            _ = cp_set_cloexec(raw, true)
            guard Int(number) < names.count, case let name = names[Int(number)], let slash = name.lastIndex(of: "/"),
                let index = Int(name[name.index(after: slash)...])
            else {
                close(raw)
                continue
            }
            places[String(name[..<slash]), default: [:]][index] = raw
        }
        return places.mapValues { order in order.sorted { $0.key < $1.key }.map { $0.value } }
    }

    /// Whether systemd runs this host (sd_booted(3)).
    public static var isSystemd: Bool { Files.isDirectory("/run/systemd/system") }
}
