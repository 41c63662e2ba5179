import Engines
import GuestMemory
import Platform
import StoreProtocol
import Synchronization
import VhostBackend

/// A disk in the host's memory that several VMs attach: its pages are quired's (`quired --shared-disk`). What is written is
/// there for the others when the write is answered, and outlives this process and quired's.
///
/// While quired is away requests wait; they were not answered, and doing them twice does no harm.
///
/// A guest that arrives with memory of its own (`-incoming`, `-loadvm`, `loadvm`) knows the disk as it was: what it has mounted or
/// cached goes with that content and no other. So it gets I/O errors unless it is said that this content is still here. Whether it
/// arrives is on the command line of the QEMU that connects, and in the rings, as for the swap disk. The rings tell it once, and what
/// the guest has cached outlasts its sleep, a start that looks like a new guest's, and this process: so the page map keeps it, for all
/// disks of the VM until that ends. A disk has no store of its own that could.
public final class SharedDisk: BlockStorage, DeviceLifecycle {
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
        public var known = Known.nothing
        /// What to type to take the disk as it is.
        public var acceptance = "give content=any"
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
            if known != .nothing { text += ",known=\(known)" }
            return text
        }

        var hello: SharedDiskMessage.Hello {
            SharedDiskMessage.Hello(name: name, group: group, token: token == 0 ? UInt64.random(in: 1 ... .max) : token, vm: vm)
        }

        /// Asks quired what the disk is, and whether this VM may have it.
        public mutating func ask() throws(QuireError) {
            let found = try SharedDiskClient(path: path, hello).attach(patienceMilliseconds: Self.patienceMilliseconds)
            if case .content(let id) = known, id != found.id {
                throw QuireError(.invalid, "the shared disk '\(name)' has lost what this guest knows of it: \(Self.advice(acceptance))")
            }
            if let expectedBytes, expectedBytes != found.pages * pageBytes {
                throw QuireError(
                    .invalid, "the shared disk '\(name)' has \(Size.exact(found.pages * pageBytes)), not \(Size.exact(expectedBytes)): give its size, or none")
            }
            identity = found
        }

        /// A guest is to come from elsewhere.
        func checkArrival() throws(QuireError) {
            guard known == .nothing else { return }
            throw QuireError(.invalid, Self.isUnknown(name, acceptance))
        }

        public static func isUnknown(_ name: String, _ acceptance: String) -> String {
            "nobody says whether the shared disk '\(name)' still has what this guest knows of it: \(advice(acceptance))"
        }

        private static func advice(_ acceptance: String) -> String {
            "if the guest has nothing of it mounted or open, \(acceptance), and start it again"
        }
        private static let patienceMilliseconds: UInt64 = 3000
    }

    /// Of a guest that comes from elsewhere: what it knows as the disk's content.
    public enum Known: Sendable, Equatable, CustomStringConvertible {
        /// Nobody says; or it does not come from elsewhere.
        case nothing
        /// The one of this id (`SharedDiskMessage`).
        case content(UInt64)
        /// It has nothing mounted, an operator says.
        case anything

        /// An id in hexadecimal digits, or `any`.
        public init?(_ text: String) {
            if text == "any" { self = .anything } else if let id = UInt64(text, radix: 16) { self = .content(id) } else { return nil }
        }

        public var description: String {
            switch self {
            case .nothing: ""
            case .content(let id): String(id, radix: 16)
            case .anything: "any"
            }
        }
    }

    public let byteCount: UInt64
    public let logicalBlockBytes = UInt32(pageBytes)
    public let isReadOnly = false
    public let serial: String
    private let client: SharedDiskClient
    private let name: String
    private let map: PageMap
    private let notice: @Sendable (String) -> Void
    /// It is what a guest that comes from elsewhere knows.
    private let isKnown: Bool
    /// The guest comes from elsewhere, as QEMU's command line says.
    private let arrives = Atomic<Bool>(false)

    /// `map`: the VM's. `notice`: a line for the log, when quired goes away and comes back.
    public init(_ options: Options, map: PageMap, notice: @escaping @Sendable (String) -> Void) throws(QuireError) {
        var options = options
        if options.identity == nil { try options.ask() }
        serial = String(options.name.prefix(20))
        byteCount = options.identity!.pages * pageBytes
        client = SharedDiskClient(path: options.path, options.hello, expected: options.identity, notice: notice)
        name = options.name
        self.map = map
        self.notice = notice
        isKnown = options.known == .anything || options.known == .content(options.identity!.id)
    }

    public func deviceStarted(_ start: DeviceStart) {
        // Where it can't be told, what was found before holds.
        if let says = start.frontEnd.flatMap({ QEMUCommandLine.bringsMemory(process: $0) }) {
            arrives.store(says, ordering: .sequentiallyConsistent)
        }
        // Also where this disk is the one that the guest knows: another of the VM's may not be, and show nothing in its rings.
        if start.origin == .elsewhere { map.noteArrival() }
        if isForeign {
            notice("the guest came from elsewhere (a snapshot, a migration) and may know the shared disk '\(name)' with another content: every request is an I/O error until the VM ends")
        }
    }
    public func deviceStopping() {}
    public func loggingChanged(_ enabled: Bool) {}

    /// The guest knows another disk, or may.
    private var isForeign: Bool { !isKnown && (arrives.load(ordering: .sequentiallyConsistent) || map.hasArrived) }

    private func check() throws(QuireError) {
        guard !isForeign else {
            throw QuireError(.busy, "the shared disk '\(name)' is not the one that the guest knows")
        }
    }

    /// Parts of a buffer that go at once, and the page that each begins with.
    private func forEachPart(
        _ offset: UInt64, _ buffer: GuestBuffer, _ body: (UInt64, GuestBuffer) throws(QuireError) -> Void
    ) throws(QuireError) {
        try check()
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
        try check()
        try client.flush(offset / pageBytes, count: count / pageBytes)
    }

    public func writeZeroes(at offset: UInt64, count: UInt64, mayUnmap: Bool) throws(QuireError) {
        try discard(at: offset, count: count)
    }
}
