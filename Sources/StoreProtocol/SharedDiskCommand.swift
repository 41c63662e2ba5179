import Glibc
import Platform

/// An operator's question to quired about its shared disks: words, and the answer's text. `list`: all that the asking user's VMs
/// may attach. `NAME tmem …`: what `quire tmem` does to a disk; for root and quired's own user.
public enum SharedDiskCommand {
    static let answerLimit = 1 << 17

    /// Nil: no quired that we may ask serves shared disks at `path`. Throws what it says.
    public static func ask(_ text: String, at path: String, patienceMilliseconds: Int32) throws(QuireError) -> String? {
        let socket: UnixSocket
        do throws(QuireError) { socket = try UnixSocket.connect(to: path, kind: .messages) } catch {
            if [ENOENT, ENOTDIR, ECONNREFUSED, EACCES].contains(error.errno) { return nil }
            throw error
        }
        let silence = QuireError(.busy, "quired has not answered for its shared disks within \(patienceMilliseconds / 1000) s: try again")
        try socket.sendMessage(Array(("?" + text).utf8))
        guard !waitReadable([socket.descriptor.raw], timeoutMilliseconds: patienceMilliseconds).isEmpty else { throw silence }
        var none = UnixSocket.PassedDescriptors()
        guard let bytes = try socket.receiveMessage(limit: answerLimit, maxDescriptors: 0, into: &none) else {
            throw QuireError(.closed, "quired went away: try again")
        }
        if let error = SharedDiskMessage.error(bytes) { throw QuireError(.busy, error) }
        guard bytes.first == UInt8(ascii: "=") else { throw QuireError(.invalid, "quired answered nonsense: it is of another version") }
        return String(decoding: bytes.dropFirst(), as: UTF8.self)
    }

    /// The message that answers with `text`.
    public static func answer(_ text: String) throws(QuireError) -> [UInt8] {
        let bytes = Array(("=" + text).utf8)
        guard bytes.count <= answerLimit else { throw QuireError(.unsupported, "there are too many shared disks to list") }
        return bytes
    }
}
