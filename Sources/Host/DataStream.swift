import Glibc
import Platform

/// A file or a pipe that a user has passed us, to be written in order. Waiting for whoever reads a pipe ends when `cancel`
/// becomes readable.
public final class DataSink: Sendable {
    private let file: Descriptor
    private let isRegularFile: Bool
    private let cancel: Int32

    /// `cancel`: borrowed for the life of this; -1: never.
    public init(_ file: consuming Descriptor, cancel: Int32 = -1) {
        isRegularFile = (try? file.status().isRegularFile) == true
        self.file = file
        self.cancel = cancel
    }

    public func write(_ bytes: [UInt8]) throws(QuireError) {
        var done = 0
        while done < bytes.count {
            try awaitReady(file.raw, POLLOUT, cancel)
            // No more at once than a pipe takes without waiting, or `cancel` is not seen.
            let count = isRegularFile ? bytes.count - done : min(bytes.count - done, 4096)
            let n = unsafe bytes.withUnsafeBytes { unsafe Glibc.write(file.raw, $0.baseAddress! + done, count) }
            if n < 0, errno == EINTR || errno == EAGAIN { continue }
            guard n > 0 else { throw .system("cannot write all of it") }
            done += n
        }
    }
}

/// The same, to be read.
public final class DataSource: Sendable {
    private let file: Descriptor
    private let cancel: Int32

    public init(_ file: consuming Descriptor, cancel: Int32 = -1) {
        self.file = file
        self.cancel = cancel
    }

    /// Up to `count` bytes: fewer only at the end.
    public func read(_ count: Int) throws(QuireError) -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: count)
        var done = 0
        while done < count {
            try awaitReady(file.raw, POLLIN, cancel)
            let n = unsafe bytes.withUnsafeMutableBytes { unsafe Glibc.read(file.raw, $0.baseAddress! + done, count - done) }
            if n < 0, errno == EINTR || errno == EAGAIN { continue }
            guard n >= 0 else { throw .system("cannot read what was saved") }
            if n == 0 { break }
            done += n
        }
        bytes.removeLast(count - done)
        return bytes
    }
}

private func awaitReady(_ raw: Int32, _ events: Int32, _ cancel: Int32) throws(QuireError) {
    var set = [pollfd(fd: raw, events: Int16(events), revents: 0), pollfd(fd: cancel, events: Int16(POLLIN), revents: 0)]
    while unsafe poll(&set, nfds_t(set.count), -1) < 0 && errno == EINTR {}
    if set[1].revents != 0 { throw QuireError(.closed, "the backend is ending") }
}
