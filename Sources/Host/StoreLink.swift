import Engines
import GuestMemory
import Logging
import PageContent
import Platform
import StoreProtocol
import Synchronization

/// The back end's connection to quired: made when a pass begins and none is there, given up at the first error, made anew
/// at a later pass. What the VM maps is not touched by any of that.
///
/// It may be told to go to another group or another quired. Pages that the VM shares by then are the old group's: those stay, and go
/// when somebody un-merges the VM; nothing more is shared until then. So no page of one group is ever looked up in another, and no
/// host needs memory that nobody has asked it for.
public final class StoreLink: ContentStore {
    /// Whom a VM shares pages with.
    struct Place: Sendable, Equatable {
        /// Of quired's socket.
        var path: String
        /// The share group; empty: that of the VM's owner.
        var group: String
    }

    private struct State {
        /// Where the VM is to be.
        var place: Place
        /// Where it is, as far as this process knows: where it was connected last.
        var joined: Place?
        /// Since when nobody answers there.
        var unreachableSince: UInt64?
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
        let place: Place
        let client: Mutex<StoreClient>
        init(_ client: consuming StoreClient, _ place: Place) {
            self.place = place
            self.client = Mutex(client)
        }
    }

    private let name: String
    private let map: PageMap
    private let link: AgentLink
    private let logger: Logger
    private let state: Mutex<State>

    private static let retryNanoseconds: UInt64 = 2_000_000_000
    /// quired answers in milliseconds; a guest may wait for whoever waits for us.
    private static let patienceMilliseconds: Int32 = 1_000

    /// `path`: of quired's socket. `group`: the share group; empty: that of the VM's owner.
    public init(path: String, name: String, group: String, map: PageMap, link: AgentLink, logger: Logger) {
        state = Mutex(State(place: Place(path: path, group: group)))
        self.name = name
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

    /// The VM is to be there, once it shares nothing any more where it is.
    func move(to place: Place) {
        state.withLock { state in
            if state.place != place { state.retryAt = 0 }
            state.place = place
        }
    }

    /// For people: how a VM comes to share nothing where it is, and to share where it is to be.
    public static func waysToMove(_ name: String) -> String { "quire unmerge \(name), then quire merge \(name)" }

    private var sharesPages: Bool {
        var shares = false
        map.forEachMerged { _, kind in if case .shared = kind { shares = true } }
        return shares
    }

    public func prepare(_ memory: GuestMemory) -> ContentStoreState {
        let (client, place, joined) = state.withLock { ($0.client, $0.place, $0.joined) }
        if let joined, joined != place {
            // For what is released, and for the accounts of what is not.
            if client == nil, let anew = try? connectAgain(memory, joined) { return anew }
            guard !sharesPages, client != nil || isGivenUp else {
                let what = joined.group == place.group ? "quired at \(place.path)" : place.group.isEmpty ? "its owner's share group" : "share group '\(place.group)'"
                return .absent("it moves to \(what) as soon as it shares nothing where it is: \(Self.waysToMove(name))")
            }
            leave(client, memory)
        } else if let box = client {
            do throws(QuireError) {
                try tellMemory(memory, box)
                return .ready(box.client.withLock { $0.hasher })
            } catch { fail(error, box) }
        }
        let now = monotonicNanoseconds()
        let (retryAt, trouble) = state.withLock { ($0.retryAt, $0.trouble) }
        guard now >= retryAt else { return .absent(trouble) }
        do throws(QuireError) { return try connect(memory, place) } catch {
            fail(error)
            return .absent(state.withLock { $0.trouble })
        }
    }

    /// To where it is, though it is to go: throws where that has to wait, or does not work.
    private func connectAgain(_ memory: GuestMemory, _ joined: Place) throws(QuireError) -> ContentStoreState {
        guard monotonicNanoseconds() >= state.withLock({ $0.retryAt }) else { throw QuireError(.retry, "it was tried just now") }
        do throws(QuireError) { return try connect(memory, joined) } catch {
            fail(error)
            state.withLock { $0.unreachableSince = $0.unreachableSince ?? monotonicNanoseconds() }
            throw error
        }
    }

    /// Whoever does not answer for so long hears of it when QEMU ends.
    private static let patienceNanoseconds: UInt64 = 30_000_000_000
    private var isGivenUp: Bool {
        guard let since = state.withLock({ $0.unreachableSince }) else { return false }
        return monotonicNanoseconds() - since > Self.patienceNanoseconds
    }

    /// It maps nothing of this store any more. A quired that it does not come back to must not count on it until QEMU ends.
    private func leave(_ box: ClientBox?, _ memory: GuestMemory) {
        // First, so that whoever asks for figures just now takes its end for no failure.
        state.withLock { ($0.client, $0.joined, $0.unreachableSince, $0.figures, $0.lackingBytes, $0.retryAt) = (nil, nil, nil, nil, 0, 0) }
        box?.client.withLock { client in
            do throws(QuireError) {
                try client.report(memory.regions.filter { $0.kind == .shmem }.map { StoreRequest.Report(.released, $0.gfns) })
                _ = try client.figures(zeroPages: 0)
            } catch {
                logger.info("quired does not hear that the VM has left: \(error)")
            }
            client.close()
        }
    }

    private func connect(_ memory: GuestMemory, _ place: Place) throws(QuireError) -> ContentStoreState {
        guard let qemu = link.frontEndPID else { throw QuireError(.closed, "the agent in QEMU is not attached") }
        // Nothing that maps or unmaps may be on its way (quire_layout.h, HELLO).
        try link.settle(until: monotonicNanoseconds() + 100_000_000)
        let life = try ProcessCalls.descriptor(of: qemu)
        // Before quired counts them: what QEMU brings back by itself from here on has to be released.
        var held: [Range<GFN>] = []
        map.forEachMerged { gfns, kind in if case .shared = kind { held.append(gfns) } }
        let client = try StoreClient.connect(
            to: place.path, StoreRequest.Hello(name: name, group: place.group), pageMap: map.descriptor.raw, life: life.raw,
            patienceMilliseconds: Self.patienceMilliseconds)
        let welcome = client.welcome
        guard welcome.store < 8 else { throw QuireError(.unsupported, "quired names a store \(welcome.store)") }
        try link.setStore(client.store.duplicate(), number: UInt8(welcome.store))
        let hasher = client.hasher
        let box = ClientBox(client, place)
        state.withLock {
            $0.regions = []
            $0.client = box
            $0.joined = place
            $0.unreachableSince = nil
            $0.trouble = ""
        }
        try tellMemory(memory, box)
        logger.info("connected to quired at \(place.path): \(welcome.keptPages) pages are merged, \(welcome.unknownPages) of unknown slots")
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
        let (old, isNew, text) = state.withLock { state -> (ClientBox?, Bool, String) in
            // Another thread was told first, and there may be a new one already.
            if let box, state.client !== box { return (nil, false, "") }
            let path = (box?.place ?? state.joined ?? state.place).path
            let text = error.errno == 2 || error.errno == 111 ? "no quired listens at \(path)" : "\(error)"
            defer {
                state.client = nil
                state.trouble = text
                state.retryAt = monotonicNanoseconds() + Self.retryNanoseconds
            }
            return (state.client, state.trouble != text, text)
        }
        old?.client.withLock { $0.close() }
        if isNew { logger.notice("only pages of zeros are merged: \(text)") }
    }
}
