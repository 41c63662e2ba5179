import Engines
import Glibc
import Host
import Logging
import PageStore
import Platform
import StoreProtocol
import Synchronization
import Testing
import TestSupport

/// What swap disks and shared disks of one host may use together.
@Suite struct TmemLedgerTests {
    private final class Clock: Sendable {
        private let now = Atomic<UInt64>(1_000_000_000_000)
        func read() -> UInt64 { now.load(ordering: .relaxed) }
        func go(seconds: UInt64) { now.wrappingAdd(seconds * 1_000_000_000, ordering: .relaxed) }
    }

    private func ledger(_ cap: UInt64?) -> (TmemLedger, Clock) {
        let clock = Clock()
        return (TmemLedger(cap: cap) { clock.read() }, clock)
    }

    @Test func allTogetherGetTheCap() {
        let (ledger, clock) = ledger(100)
        clock.go(seconds: 60)
        let a = ledger.makeOwner(), b = ledger.makeOwner()
        func ask(_ name: String, _ owner: UInt64, used: UInt64 = 0, wanted: UInt64, uid: UInt32 = 1) -> UInt64 {
            ledger.allow(.init(name: name, used: used, held: 0, wanted: wanted), uid: uid, owner: owner).allowed
        }
        #expect(ask("a", a, wanted: 60) == 60)
        #expect(ask("b", b, wanted: 60) == 40)
        #expect(ask("b", b, used: 40, wanted: 60) == 40)
        #expect(ask("a", a, used: 10, wanted: 20) == 20)
        #expect(ask("b", b, used: 40, wanted: 90) == 80)
        // What is in use is in use.
        #expect(ask("a", a, used: 50, wanted: 60) == 50)
        #expect(ledger.look().total == 130)
        // Names are each user's own.
        #expect(ask("a", ledger.makeOwner(), wanted: 1, uid: 2) == 0)
        ledger.setCap(nil)
        #expect(ask("a", a, used: 50, wanted: 1000) == 1000)
        ledger.setCap(10)
        #expect(ask("a", a, used: 50, wanted: 1000) == 50)
    }

    /// A backend that dies keeps what it had for the next one, for some seconds; and the end of its connection is none of the next
    /// one's, whenever it is seen.
    @Test func whatADeadOneHad() {
        let (ledger, clock) = ledger(100)
        clock.go(seconds: 60)
        let a = ledger.makeOwner(), next = ledger.makeOwner(), b = ledger.makeOwner()
        func ask(_ name: String, _ owner: UInt64, used: UInt64 = 0, wanted: UInt64) -> UInt64 {
            ledger.allow(.init(name: name, used: used, held: 0, wanted: wanted), uid: 1, owner: owner).allowed
        }
        #expect(ask("a", a, used: 60, wanted: 60) == 60)
        ledger.lose(owner: a)
        clock.go(seconds: 9)
        #expect(ask("b", b, wanted: 100) == 40)
        #expect(ask("a", next, used: 60, wanted: 60) == 60)
        ledger.lose(owner: a)
        clock.go(seconds: 60)
        #expect(ask("b", b, wanted: 100) == 40)
        ledger.lose(owner: next)
        clock.go(seconds: 11)
        #expect(ask("b", b, wanted: 100) == 100)
    }

    /// One that has just begun gives nobody more than he holds, until all could say what that is.
    @Test func oneThatHasJustBegun() {
        let (ledger, clock) = ledger(100)
        let a = ledger.makeOwner(), b = ledger.makeOwner()
        let early = ledger.allow(.init(name: "a", used: 10, held: 30, wanted: 90), uid: 1, owner: a)
        #expect(early.isSettling && early.allowed == 30)
        clock.go(seconds: 1)
        #expect(ledger.allow(.init(name: "b", used: 50, held: 60, wanted: 60), uid: 1, owner: b).allowed == 60)
        clock.go(seconds: 3)
        let late = ledger.allow(.init(name: "a", used: 10, held: 30, wanted: 90), uid: 1, owner: a)
        #expect(!late.isSettling && late.allowed == 40)
    }

    // MARK: - With quired

    private static func config() -> String { "/tmp/quired-\(ProcessCalls.ownPID)-\(UInt32.random(in: 0 ... .max)).toml" }
    private static func write(_ path: String, _ text: String) throws {
        try Descriptor.open(path, O_RDWR | O_CREAT, mode: 0o600).replaceContent(text)
    }

    @Test func overTheSocket() throws {
        let config = Self.config()
        defer { Files.remove(config) }
        try Self.write(config, "[quired]\ntmem-cap = \"16M\"\n")
        let store = try RunningStore(["--keep"], config: config)
        let a = try TmemClient(path: store.path, patienceMilliseconds: 1000), b = try TmemClient(path: store.path, patienceMilliseconds: 1000)
        func ask(_ client: borrowing TmemClient, _ name: String, used: UInt64 = 0, held: UInt64 = 0, wanted: UInt64) throws -> StoreReply.TmemAllowed {
            try client.ask(.init(name: name, used: used, held: held, wanted: wanted))
            let answer = try client.answer(patienceMilliseconds: 5000)
            return try #require(answer)
        }
        #expect(try ask(a, "a", wanted: 1 << 20).isSettling)
        #expect(try eventually { try !ask(a, "a", wanted: 10 << 20).isSettling })
        #expect(try ask(b, "b", wanted: 10 << 20).allowed == 6 << 20)
        var observer = StoreObserver(path: store.path)
        #expect(try observer.tmem().total == 16 << 20)
        // Another limit, at once.
        try Self.write(config, "[quired]\ntmem-cap = \"20M\"\n")
        #expect(try store.reload() == "quired.tmem-cap: \"16M\" -> \"20M\"")
        #expect(try ask(b, "b", held: 6 << 20, wanted: 12 << 20).allowed == 10 << 20)
        // Nonsense.
        #expect(errorCode { _ = try ask(TmemClient(path: store.path, patienceMilliseconds: 1000), "../a", wanted: 1) } == .invalid)
        #expect(errorCode { _ = try ask(TmemClient(path: store.path, patienceMilliseconds: 1000), "c", used: .max, wanted: 1) } == .invalid)
        #expect(errorCode { _ = try ask(b, "a", wanted: 1) } == .invalid)
        // The next quired hears of both before it gives away anything.
        store.kill()
        #expect(eventually { a.hasNews })
        let c = try TmemClient(path: store.path, patienceMilliseconds: 1000), d = try TmemClient(path: store.path, patienceMilliseconds: 1000)
        let early = try ask(c, "c", wanted: 20 << 20)
        #expect(early.isSettling && early.allowed == 0)
        #expect(try ask(d, "a", used: 1 << 20, held: 10 << 20, wanted: 10 << 20).allowed == 10 << 20)
        #expect(try eventually { try !ask(c, "c", wanted: 20 << 20).isSettling })
        #expect(try ask(c, "c", wanted: 20 << 20).allowed == 10 << 20)
    }

    /// An answer that comes late is to what was asked then, and no refusal of what is asked now; and one to nobody.
    @Test func lateAnswers() throws {
        let store = try RunningStore(["--keep", "--tmem-cap", "64M"])
        let link = TmemQuotaLink(path: store.path, name: "a", logger: Logger(label: "test") { _ in SwiftLogNoOpLogHandler() })
        #expect(eventually { link.allow(used: 0, held: 0, wanted: 1 << 20) == 1 << 20 })
        let worker = store.worker
        ProcessCalls.signal(worker, SIGSTOP)
        #expect(eventually { link.allow(used: 0, held: 1 << 20, wanted: 1 << 20) == nil })
        #expect(link.isReviewDue)
        ProcessCalls.signal(worker, SIGCONT)
        ProcessCalls.sleep(milliseconds: 300)
        #expect(link.allow(used: 1 << 20, held: 1 << 20, wanted: 5 << 20) == 5 << 20)
        // One that stands still for too long is done without, and counts again when it goes on.
        ProcessCalls.signal(worker, SIGSTOP)
        #expect(eventually { link.allow(used: 5 << 20, held: 5 << 20, wanted: 100 << 20) == 100 << 20 })
        #expect(link.allow(used: 5 << 20, held: 100 << 20, wanted: 200 << 20) == 200 << 20)
        ProcessCalls.signal(worker, SIGCONT)
        #expect(eventually { link.allow(used: 5 << 20, held: 200 << 20, wanted: 200 << 20) == 64 << 20 })
    }

    /// Another quired's limit holds from then on, and the old one counts it no more.
    @Test func anotherQuired() throws {
        let one = try RunningStore(["--keep", "--tmem-cap", "64M"]), other = try RunningStore(["--keep", "--tmem-cap", "16M"])
        let link = TmemQuotaLink(path: one.path, name: "a", logger: Logger(label: "test") { _ in SwiftLogNoOpLogHandler() })
        #expect(eventually { link.allow(used: 5 << 20, held: 5 << 20, wanted: 100 << 20) == 64 << 20 })
        link.move(to: other.path)
        #expect(link.isReviewDue)
        #expect(eventually { link.allow(used: 5 << 20, held: 64 << 20, wanted: 100 << 20) == 16 << 20 })
        #expect(!link.isReviewDue)
        link.move(to: other.path)
        #expect(!link.isReviewDue)
        var observer = StoreObserver(path: one.path)
        #expect(eventually { (try? observer.tmem().total) == 0 })
    }

    /// Whoever comes to a quired that accepts nobody is told so, and not kept.
    @Test func aQueueThatIsFull() throws {
        let store = try RunningStore(["--keep"])
        ProcessCalls.signal(store.worker, SIGSTOP)
        defer { ProcessCalls.signal(store.worker, SIGCONT) }
        var waiting: [Int32] = []
        defer { for raw in waiting { close(raw) } }
        var refused: Int32?
        while waiting.count < 1000, refused == nil {
            do throws(QuireError) {
                let socket = try UnixSocket.connect(to: store.path, kind: .messages, patienceMilliseconds: 30)
                waiting.append(socket.takeDescriptor().release())
            } catch { refused = error.errno }
        }
        #expect(refused == EAGAIN && waiting.count > 100)
        let link = TmemQuotaLink(path: store.path, name: "a", logger: Logger(label: "test") { _ in SwiftLogNoOpLogHandler() })
        #expect(link.allow(used: 0, held: 0, wanted: 1 << 20) == 1 << 20)
    }

    /// While there is room nobody is refused, however many want more at the same moment.
    @Test func manyAtOnce() throws {
        let store = try RunningStore(["--keep", "--tmem-cap", "1G"])
        let link = TmemQuotaLink(path: store.path, name: "a", logger: Logger(label: "test") { _ in SwiftLogNoOpLogHandler() })
        let tmem = try Tmem(Tmem.makeFile(name: "test-quota"), quota: link)
        let pool = try tmem.createPool(.init(kind: .persistent, scope: .private, name: "d", client: "a"))
        let refusals = Mutex<[String]>([])
        let threads = try (0..<4).map { number in
            try JoinableThread("writer") {
                var page = [UInt8](repeating: 0, count: 4096)
                var random = SplitMix(UInt64(number))
                for index in 0..<UInt32(3000) {
                    // Incompressible, or a word that needs a leaf and nothing else.
                    for at in 0..<4096 where index % 2 == 0 || at < 8 { page[at] = UInt8(truncatingIfNeeded: random.next()) }
                    do throws(QuireError) { try pool.putPatiently(UInt64(number), index * 16, unsafe page.span.bytes) } catch {
                        refusals.withLock { $0.append(error.message) }
                    }
                }
            }
        }
        for thread in threads { thread.join() }
        #expect(refusals.withLock { $0 } == [] && pool.statistics.pages == 12_000)
    }

    /// Two VMs' stores, which ask as backends do, write at once, across the death of quired: all in all never more than the cap. The
    /// control: where there is no quired there is no limit.
    @Test(arguments: [true, false]) func stores(_ isThere: Bool) throws {
        let cap: UInt64 = 32 << 20
        let store = try RunningStore(["--keep", "--tmem-cap", "32M"])
        let path = isThere ? store.path : store.path + ".none"
        let files = try (0..<2).map { _ in try Tmem.makeFile(name: "test-quota").release() }
        defer { for file in files { close(file) } }
        let logger = Logger(label: "test") { _ in SwiftLogNoOpLogHandler() }
        let refusals = Mutex<[String]>([])
        let isDone = Atomic<Int>(0)
        var threads: [JoinableThread] = []
        let links = ["a", "b"].map { TmemQuotaLink(path: path, name: $0, logger: logger) }
        let stores = try zip(files, links).map { try Tmem(Descriptor.duplicate(of: $0), quota: $1) }
        for (number, tmem) in stores.enumerated() {
            let pool = try tmem.createPool(.init(kind: .persistent, scope: .private, name: "d", client: "a"))
            threads.append(
                try JoinableThread("writer") {
                    var page = [UInt8](repeating: 0, count: 4096)
                    var random = SplitMix(UInt64(number))
                    for index in 0..<UInt32(6000) {
                        for at in 0..<4096 { page[at] = UInt8(truncatingIfNeeded: random.next()) }
                        // As a ring does with a request that has to wait.
                        var isWaiting = true
                        while isWaiting {
                            isWaiting = false
                            do throws(QuireError) { try pool.put(0, index, unsafe page.span.bytes) } catch {
                                isWaiting = error.code == .retry
                                if !isWaiting { refusals.withLock { $0.append(error.message) } }
                            }
                        }
                    }
                    isDone.wrappingAdd(1, ordering: .relaxed)
                })
        }
        var most: UInt64 = 0, isKilled = false
        while isDone.load(ordering: .relaxed) < 2 {
            for (tmem, link) in zip(stores, links) where link.isReviewDue { tmem.reviewQuota() }
            let used = files.reduce(0) { $0 + ((try? FileStatus(of: $1).allocatedBytes) ?? 0) }
            most = max(most, used)
            if isThere, !isKilled, used > 12 << 20 {
                store.kill(andWait: false)
                isKilled = true
            }
            ProcessCalls.sleep(milliseconds: 2)
        }
        for thread in threads { thread.join() }
        guard isThere else {
            #expect(most > cap && refusals.withLock { $0.isEmpty })
            return
        }
        // Files have a head and first pages of tables besides what is counted.
        #expect(isKilled && most <= cap + (512 << 10) && most > cap * 3 / 4, "\(most)")
        #expect(refusals.withLock { Set($0) } == ["the host's limit for transcendent memory is reached (tmem-cap of quired)"])
    }

    /// quired's own disks count, too.
    @Test func aSharedDisk() throws {
        let store = try RunningStore(["--keep", "--tmem-cap", "8M", "--shared-disk", "scratch,size=16M"])
        let client = SharedDiskClient(
            path: SharedDiskClient.path(besideStore: store.path), .init(name: "scratch", group: "", token: 1), expected: nil)
        _ = try client.attach(patienceMilliseconds: 5000)
        var random = SplitMix(7)
        var kept = 0, refusal: QuireError?
        for page in 0..<UInt64(3000) {
            var bytes: [UInt8] = []
            for _ in 0..<512 { unsafe withUnsafeBytes(of: random.next()) { unsafe bytes += $0 } }
            do throws(QuireError) {
                try client.put(page, bytes)
                kept += 1
            } catch { refusal = error }
        }
        #expect(kept > 1000 && kept < 2048 && refusal?.code == .noSpace)
        let report = try #require(SharedDiskReport.collect(at: SharedDiskClient.path(besideStore: store.path)).first)
        #expect(report.tmem.reason == "a page found no room: the host's limit for transcendent memory is reached (tmem-cap of quired)")
        #expect(report.tmem.usedBytes <= 8 << 20)
    }
}
