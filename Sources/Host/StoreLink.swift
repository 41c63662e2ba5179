import Engines
import GuestMemory
import Logging
import PageContent
import Platform
import StoreProtocol
import Synchronization

/// The back end's connection to quired: made when a pass begins and none is there, given up at the first error, made anew
/// at a later pass. What the VM maps is not touched by any of that.
public final class StoreLink: ContentStore {
    private struct State {
        /// Taken out while it is used: one request at a time.
        var client: ClientBox?
        var figures: StoreFigures?
        var regions: [Range<GFN>] = []
        /// As of the last answer.
        var lackingBytes: UInt64 = 0
        var trouble = ""
        var retryAt: UInt64 = 0
    }

    private final class ClientBox: Sendable {
        let client: Mutex<StoreClient>
        init(_ client: consuming StoreClient) { self.client = Mutex(client) }
    }

    private let path: String
    private let name: String
    private let group: String
    private let map: PageMap
    private let link: AgentLink
    private let logger: Logger
    private let state = Mutex(State())

    private static let retryNanoseconds: UInt64 = 2_000_000_000
    /// quired answers in milliseconds; a guest may wait for whoever waits for us.
    private static let patienceMilliseconds: Int32 = 1_000

    /// `path`: of quired's socket. `group`: the share group; empty: that of the VM's owner.
    public init(path: String, name: String, group: String, map: PageMap, link: AgentLink, logger: Logger) {
        self.path = path
        self.name = name
        self.group = group
        self.map = map
        self.link = link
        self.logger = logger
    }

    /// Where quired listens unless told otherwise.
    public static func standardPath(
        environment: (String) -> String? = ProcessCalls.environment, isRoot: Bool = ProcessCalls.isRoot
    ) -> String {
        let folder = environment("QUIRED_DIRECTORY") ?? (isRoot ? nil : environment("XDG_RUNTIME_DIR").map { $0 + "/quired" })
        return (folder ?? "/run/quired") + "/store.sock"
    }

    /// Where quired takes commands, for its own user alone.
    public static func commandPath(besideStore store: String) -> String {
        (store.lastIndex(of: "/").map { String(store[...$0]) } ?? "") + "command.sock"
    }

    public func prepare(_ memory: GuestMemory) -> ContentStoreState {
        if let box = state.withLock({ $0.client }) {
            do throws(QuireError) {
                try tellMemory(memory, box)
                return .ready(box.client.withLock { $0.hasher })
            } catch { fail(error, box) }
        }
        let now = monotonicNanoseconds()
        let (retryAt, trouble) = state.withLock { ($0.retryAt, $0.trouble) }
        guard now >= retryAt else { return .absent(trouble) }
        do throws(QuireError) { return try connect(memory) } catch {
            fail(error)
            return .absent(state.withLock { $0.trouble })
        }
    }

    private func connect(_ memory: GuestMemory) throws(QuireError) -> ContentStoreState {
        guard let qemu = link.frontEndPID else { throw QuireError(.closed, "the agent in QEMU is not attached") }
        // Nothing that maps or unmaps may be on its way (quire_layout.h, HELLO).
        try link.settle(until: monotonicNanoseconds() + 100_000_000)
        let life = try ProcessCalls.descriptor(of: qemu)
        // Before quired counts them: what QEMU brings back by itself from here on has to be released.
        var held: [Range<GFN>] = []
        map.forEachMerged { gfns, kind in if case .shared = kind { held.append(gfns) } }
        let client = try StoreClient.connect(
            to: path, StoreRequest.Hello(name: name, group: group), pageMap: map.descriptor.raw, life: life.raw,
            patienceMilliseconds: Self.patienceMilliseconds)
        let welcome = client.welcome
        guard welcome.store < 8 else { throw QuireError(.unsupported, "quired names a store \(welcome.store)") }
        try link.setStore(client.store.duplicate(), number: UInt8(welcome.store))
        let hasher = client.hasher
        let box = ClientBox(client)
        state.withLock {
            $0.regions = []
            $0.client = box
            $0.trouble = ""
        }
        try tellMemory(memory, box)
        logger.info("connected to quired at \(path): \(welcome.keptPages) pages are merged, \(welcome.unknownPages) of unknown slots")
        return .connected(hasher, held: held, unknownPages: welcome.unknownPages)
    }

    /// Says where the VM's pages are, where that has changed.
    private func tellMemory(_ memory: GuestMemory, _ box: ClientBox) throws(QuireError) {
        let regions = memory.regions.filter { $0.kind == .shmem }
        guard state.withLock({ $0.regions }) != regions.map(\.gfns) else { return }
        let (files, indices) = GuestMemory.files(of: regions)
        let described = zip(regions, indices).map { region, file in
            StoreRequest.Region(
                gfn: region.gfns.lowerBound, pages: UInt64(region.gfns.count), offset: region.fileOffset, file: file)
        }
        try box.client.withLock { client throws(QuireError) in try client.setMemory(described, files: files) }
        state.withLock { $0.regions = regions.map(\.gfns) }
    }

    // MARK: - Requests

    public func shortage(zeroPages: UInt64?) -> String? {
        if let zeroPages { askForFigures(zeroPages: zeroPages) }
        let lacking = state.withLock { $0.client == nil ? 0 : $0.lackingBytes }
        guard lacking > 0 else { return nil }
        return "the host is \(Size.text(lacking)) short of what merged pages would need if guests wrote them all: nothing more "
            + "is merged (quired --reserve)"
    }

    public func lookUp(_ runs: [Range<GFN>], _ hashes: [PageHash]) throws(QuireError) -> [SlotRun] {
        var lookup = StoreRequest.Lookup()
        var start = 0
        for run in runs {
            lookup.append(run.lowerBound, Array(hashes[start..<start + run.count]))
            start += run.count
        }
        return try request { client throws(QuireError) in try client.lookUp(lookup) }
    }

    public func takeOffers() throws(QuireError) -> [SlotRun] {
        try request { client throws(QuireError) in try client.offers() }
    }

    public func report(merged: [Range<GFN>], released: [Range<GFN>]) throws(QuireError) {
        // Without a connection there is nobody to tell; the next one begins with a count of what is mapped.
        guard state.withLock({ $0.client }) != nil else { return }
        let reports = merged.map { StoreRequest.Report(.merged, $0) } + released.map { StoreRequest.Report(.released, $0) }
        _ = try request { client throws(QuireError) in try client.report(reports) }
    }

    public func lose() { fail(QuireError(.closed, "the agent in QEMU went away in the middle of a merge")) }

    /// Figures of the share group, as of the last time that quired was asked for them.
    public var figures: StoreFigures? { state.withLock { $0.figures } }

    /// Asks quired for them, if there is one. `zeroPages`: how many pages of zeros the VM has merged.
    public func askForFigures(zeroPages: UInt64) {
        guard state.withLock({ $0.client }) != nil else { return }
        guard let figures = try? request({ client throws(QuireError) in try client.figures(zeroPages: zeroPages) }) else { return }
        state.withLock { $0.figures = figures }
    }

    private func request<R>(_ body: (inout StoreClient) throws(QuireError) -> R) throws(QuireError) -> R {
        guard let box = state.withLock({ $0.client }) else { throw QuireError(.closed, "quired is not connected") }
        do throws(QuireError) {
            return try box.client.withLock { client throws(QuireError) in
                do throws(QuireError) {
                    let result = try body(&client)
                    let lacking = client.lackingBytes
                    state.withLock { $0.lackingBytes = lacking }
                    return result
                } catch {
                    // Before another thread takes a reply that comes late for its own.
                    client.close()
                    throw error
                }
            }
        } catch {
            fail(error, box)
            throw QuireError(.closed, "quired", cause: error)
        }
    }

    /// A connection, of those there were, is of no more use; nil: whatever there is.
    private func fail(_ error: QuireError, _ box: ClientBox? = nil) {
        let text = error.errno == 2 || error.errno == 111 ? "no quired listens at \(path)" : "\(error)"
        let (old, isNew) = state.withLock { state -> (ClientBox?, Bool) in
            // Another thread was told first, and there may be a new one already.
            if let box, state.client !== box { return (nil, false) }
            defer {
                state.client = nil
                state.trouble = text
                state.retryAt = monotonicNanoseconds() + Self.retryNanoseconds
            }
            return (state.client, state.trouble != text)
        }
        old?.client.withLock { $0.close() }
        if isNew { logger.notice("only pages of zeros are merged: \(text)") }
    }
}
