import Logging
import Synchronization

extension Logger {
    /// One on stderr. All copies of it have one level: set in one of them, it holds for all that is at work.
    public static func adjustable(_ label: String, _ level: Level) -> Logger {
        Logger(label: label) { AdjustableHandler(inner: StreamLogHandler.standardError(label: $0), shared: .init(level)) }
    }
}

private struct AdjustableHandler: LogHandler {
    final class Shared: Sendable {
        let level: Mutex<Logger.Level>
        init(_ level: Logger.Level) { self.level = Mutex(level) }
    }

    /// It takes what it gets: its own level decides nothing.
    var inner: StreamLogHandler
    let shared: Shared

    var logLevel: Logger.Level {
        get { shared.level.withLock { $0 } }
        set { shared.level.withLock { $0 = newValue } }
    }
    var metadata: Logger.Metadata {
        get { inner.metadata }
        set { inner.metadata = newValue }
    }
    subscript(metadataKey key: String) -> Logger.Metadata.Value? {
        get { inner[metadataKey: key] }
        set { inner[metadataKey: key] = newValue }
    }
    func log(event: LogEvent) { inner.log(event: event) }
}
