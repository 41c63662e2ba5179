import GuestMemory
import Platform
import StoreProtocol
import VhostBackend

/// A disk in the host's memory that several VMs attach: its pages are quired's (`quired --shared-disk`). What is written is
/// there for the others when the write is answered, and outlives this process and quired's.
///
/// While quired is away requests wait; they were not answered, and doing them twice does no harm.
public final class SharedDisk: BlockStorage {
    public struct Options: Sendable, Equatable {
        public var name: String
        /// The share group; empty: that of the VM's owner.
        public var group = ""
        /// Where quired serves shared disks.
        public var path: String
        public var queueCount = 1
        /// What `quire run` was told of the disk. Nil: ask.
        public var identity: SharedDiskMessage.Welcome?
        /// The same for every backend of one VM: see `SharedDiskMessage`. 0: one of this process.
        public var token: UInt64 = 0
        /// The VM's name, for people.
        public var vm = ""
        /// What the user takes it for; checked when quired is asked.
        public var expectedBytes: UInt64?
        public init(name: String, path: String) {
            self.name = name
            self.path = path
        }

        /// As `quire-backend --device` takes it.
        func device(_ endpoint: String) -> String {
            var text = "shared,\(endpoint),name=\(name),quired=\(path),queues=\(queueCount)"
            if !group.isEmpty { text += ",group=\(group)" }
            if let identity { text += ",pages=\(identity.pages),id=\(String(identity.id, radix: 16))" }
            if token != 0 { text += ",token=\(String(token, radix: 16))" }
            return text
        }

        var hello: SharedDiskMessage.Hello {
            SharedDiskMessage.Hello(name: name, group: group, token: token == 0 ? UInt64.random(in: 1 ... .max) : token, vm: vm)
        }

        /// Asks quired what the disk is, and whether this VM may have it.
        public mutating func ask() throws(QuireError) {
            let found = try SharedDiskClient(path: path, hello).attach(patienceMilliseconds: Self.patienceMilliseconds)
            if let expectedBytes, expectedBytes != found.pages * pageBytes {
                throw QuireError(
                    .invalid, "the shared disk '\(name)' has \(Size.exact(found.pages * pageBytes)), not \(Size.exact(expectedBytes)): give its size, or none")
            }
            identity = found
        }
        private static let patienceMilliseconds: UInt64 = 3000
    }

    public let byteCount: UInt64
    public let logicalBlockBytes = UInt32(pageBytes)
    public let isReadOnly = false
    public let serial: String
    private let client: SharedDiskClient

    /// `notice`: a line for the log, when quired goes away and comes back.
    public init(_ options: Options, notice: @escaping @Sendable (String) -> Void) throws(QuireError) {
        var options = options
        if options.identity == nil { try options.ask() }
        serial = String(options.name.prefix(20))
        byteCount = options.identity!.pages * pageBytes
        client = SharedDiskClient(path: options.path, options.hello, expected: options.identity, notice: notice)
    }

    /// Parts of a buffer that go at once, and the page that each begins with.
    private func forEachPart(
        _ offset: UInt64, _ buffer: GuestBuffer, _ body: (UInt64, GuestBuffer) throws(QuireError) -> Void
    ) throws(QuireError) {
        let size = SharedDiskMessage.windowPages * SharedDiskMessage.pageBytes
        for start in stride(from: 0, to: buffer.count, by: size) {
            try body((offset + UInt64(start)) / pageBytes, buffer.slice(from: start, count: size))
        }
    }

    public func read(at offset: UInt64, into buffer: GuestBuffer) throws(QuireError) {
        try forEachPart(offset, buffer) { (page, part) throws(QuireError) in
            try part.copyIn(try client.get(page, count: part.count / SharedDiskMessage.pageBytes))
        }
    }

    public func write(at offset: UInt64, from buffer: GuestBuffer) throws(QuireError) {
        try forEachPart(offset, buffer) { (page, part) throws(QuireError) in try client.put(page, try part.copyOut()) }
    }

    /// What was answered is in a file that outlives us all.
    public func flush() throws(QuireError) {}

    public func discard(at offset: UInt64, count: UInt64) throws(QuireError) {
        try client.flush(offset / pageBytes, count: count / pageBytes)
    }

    public func writeZeroes(at offset: UInt64, count: UInt64, mayUnmap: Bool) throws(QuireError) {
        try discard(at: offset, count: count)
    }
}
