import CQuireLayout
import PageContent
import Platform

/// A backend's connection to quired. One request at a time; every call waits for the reply, at most `patience`.
///
/// After any error the connection is of no more use: connect again, once no command that maps or unmaps slots is on its
/// way in QEMU (the rule of HELLO in quire_layout.h). What the VM has is not lost by that.
public struct StoreClient: ~Copyable, Sendable {
    private let socket: UnixSocket
    private let patience: Int32
    public let welcome: StoreReply.Welcome
    /// The store, read-only. The same one as before if `welcome.storeID` is.
    public let store: Descriptor
    /// For the hashes of this VM's pages.
    public let hasher: PageHasher
    /// Pages that were looked up in vain and have a slot now: ask for `offers`.
    public private(set) var waitingOffers: UInt64 = 0
    /// Memory that the host is short of, as of the last answer to a look-up or for figures: while there is any, nothing
    /// more is to be merged.
    public private(set) var lackingBytes: UInt64 = 0

    private init(
        _ socket: consuming UnixSocket, _ patience: Int32, _ welcome: StoreReply.Welcome, _ store: consuming Descriptor
    ) {
        self.socket = socket
        self.patience = patience
        self.welcome = welcome
        self.store = store
        hasher = PageHasher(secret: welcome.secret)
    }

    /// `life` is a pidfd of QEMU (or a pipe that ends with it). The descriptors are borrowed.
    public static func connect(
        to path: String, _ hello: StoreRequest.Hello, pageMap: Int32, life: Int32, patienceMilliseconds: Int32 = 30_000
    ) throws(QuireError) -> StoreClient {
        // quired may not have seen yet that an earlier backend is gone.
        for _ in 0..<busyTries {
            do throws(QuireError) {
                return try connectOnce(to: path, hello, pageMap: pageMap, life: life, patience: patienceMilliseconds)
            } catch {
                guard error.code == .busy else { throw error }
                ProcessCalls.sleep(milliseconds: 20)
            }
        }
        return try connectOnce(to: path, hello, pageMap: pageMap, life: life, patience: patienceMilliseconds)
    }
    private static let busyTries = 50

    private static func connectOnce(
        to path: String, _ hello: StoreRequest.Hello, pageMap: Int32, life: Int32, patience: Int32
    ) throws(QuireError) -> StoreClient {
        let socket = try UnixSocket.connect(to: path, kind: .messages)
        try socket.sendMessage(StoreRequest.hello(hello).encoded(), passing: [pageMap, life])
        var descriptors = UnixSocket.PassedDescriptors()
        guard case .welcome(let welcome) = try receive(socket, patience, &descriptors) else { throw unexpected }
        guard let store = descriptors.next() else { throw unexpected }
        return StoreClient(socket, patience, welcome, store)
    }

    /// Ends the connection, so that another one can be made for this VM. It keeps what it has.
    public func close() { socket.shutDown() }

    /// Where the VM's pages are. `files` are borrowed.
    public mutating func setMemory(_ regions: [StoreRequest.Region], files: [Int32]) throws(QuireError) {
        guard regions.count <= Int(QUIRE_STORE_MAX_REGIONS), files.count <= StoreRequest.maxFiles else {
            throw QuireError(.unsupported, "guest RAM in \(regions.count) regions of \(files.count) files is more than quired takes")
        }
        _ = try done(.memory(regions), passing: files)
    }

    /// Slots for pages that are quiet, whose hashes are these. They are this VM's from now on, until reported as
    /// released.
    public mutating func lookUp(_ lookup: StoreRequest.Lookup) throws(QuireError) -> [SlotRun] {
        try slots(.lookup(lookup))
    }

    public mutating func offers(atMost pages: Int = StoreRequest.maxPages) throws(QuireError) -> [SlotRun] {
        try slots(.offers(min(pages, StoreRequest.maxPages)))
    }

    /// What became of slots; as many messages as it takes. Returns for how many pages it was true.
    @discardableResult public mutating func report(_ reports: [StoreRequest.Report]) throws(QuireError) -> UInt64 {
        var total: UInt64 = 0, pages = 0
        var batch: [StoreRequest.Report] = []
        for report in reports {
            for start in stride(from: report.gfns.lowerBound, to: report.gfns.upperBound, by: StoreRequest.maxReportPages) {
                let part = start..<min(report.gfns.upperBound, start + UInt64(StoreRequest.maxReportPages))
                if batch.count == StoreRequest.maxRuns || pages + part.count > StoreRequest.maxReportPages {
                    total += try done(.report(batch))
                    batch = []
                    pages = 0
                }
                batch.append(StoreRequest.Report(report.what, part))
                pages += part.count
            }
        }
        if !batch.isEmpty { total += try done(.report(batch)) }
        return total
    }

    /// Figures of this VM's share group. `zeroPages`: how many pages of zeros the VM has merged.
    public mutating func figures(zeroPages: UInt64 = 0) throws(QuireError) -> StoreFigures {
        guard case .figures(let figures) = try exchange(.status(zeroPages: UInt32(clamping: zeroPages))) else { throw Self.unexpected }
        lackingBytes = figures.lackingBytes
        return figures
    }

    /// Figures of the host, for root and the user of quired.
    public static func figures(path: String, patienceMilliseconds: Int32 = 30_000) throws(QuireError) -> StoreFigures {
        let socket = try UnixSocket.connect(to: path, kind: .messages)
        try socket.sendMessage(StoreRequest.status(zeroPages: 0).encoded())
        var none = UnixSocket.PassedDescriptors()
        guard case .figures(let figures) = try receive(socket, patienceMilliseconds, &none) else { throw unexpected }
        return figures
    }

    // MARK: - One request and its reply

    static var unexpected: QuireError { QuireError(.invalid, "quired answered something else than was asked") }

    private func done(_ request: StoreRequest, passing: [Int32] = []) throws(QuireError) -> UInt64 {
        guard case .done(let pages) = try exchange(request, passing: passing) else { throw Self.unexpected }
        return pages
    }

    private mutating func slots(_ request: StoreRequest) throws(QuireError) -> [SlotRun] {
        guard case .slots(let runs, let offers, let lacking) = try exchange(request) else { throw Self.unexpected }
        waitingOffers = offers
        lackingBytes = lacking
        return runs
    }

    private func exchange(_ request: StoreRequest, passing: [Int32] = []) throws(QuireError) -> StoreReply {
        try socket.sendMessage(request.encoded(), passing: passing)
        var none = UnixSocket.PassedDescriptors()
        return try Self.receive(socket, patience, &none)
    }

    static func receive(
        _ socket: borrowing UnixSocket, _ patience: Int32, _ descriptors: inout UnixSocket.PassedDescriptors
    ) throws(QuireError) -> StoreReply {
        guard !waitReadable([socket.descriptor.raw], timeoutMilliseconds: patience).isEmpty else {
            throw QuireError(.closed, "quired did not answer for \(patience) ms")
        }
        guard let bytes = try socket.receiveMessage(limit: StoreRequest.maxBytes, maxDescriptors: 1, into: &descriptors)
        else { throw QuireError(.closed, "quired has closed the connection") }
        let reply: StoreReply
        do throws(ProtocolViolation) { reply = try StoreReply(bytes) } catch {
            throw QuireError(.invalid, "quired answered nonsense: \(error)")
        }
        if case .error(let text, let isBusy) = reply { throw QuireError(isBusy ? .busy : .invalid, text) }
        return reply
    }
}
