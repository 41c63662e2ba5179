import CQuireLayout
import Engines
import Glibc
import GuestMemory
import Host
import Logging
import Platform
import Synchronization
import TestSupport
import Testing

/// The back end's end of the link, against the agent itself.
@Suite(.serialized, .needsMerging) struct AgentLinkTests {
    /// A stand-in for QEMU that connects to a link; guest RAM as a device sees it.
    final class Linked {
        let rig: Rig
        let pages: MergedPages
        let memory: GuestMemory
        let userAddress: UInt64
        let link: AgentLink

        struct Handler: LogHandler {
            let sink: @Sendable (String) -> Void
            var metadata = Logger.Metadata()
            var logLevel = Logger.Level.info
            subscript(metadataKey key: String) -> Logger.Metadata.Value? { get { nil } set {} }
            func log(event: LogEvent) { sink("\(event.message)") }
        }

        init(
            pages count: Int = 4096, shift: UInt64 = 0, peer given: AgentLink.Peer?? = nil, _ options: [String] = []
        ) throws {
            rig = try Rig(pages: count, ["start=0"] + options)
            pages = MergedPages(map: rig.map)
            _ = try rig.tell("byte 0")
            userAddress = try Linked.address(rig.pid)
            memory = try Linked.memory(rig, userAddress + shift, pages)
            let who = given ?? AgentLink.Peer(pid: rig.pid, uid: geteuid())
            let box = Box(who)
            boxed = box
            let said = Said()
            self.said = said
            link = try AgentLink(
                path: rig.folder + "/link", pages: pages,
                logger: Logger(label: "link") { _ in Handler(sink: { line in said.lines.withLock { $0.append(line) } }) }
            ) { box.peer.withLock { $0 } }
            try link.setStore(rig.store.duplicate(), number: 0)
            link.setMemory(memory)
            #expect(try rig.tell("start \(rig.folder)/link") == 0)
        }
        deinit { link.end() }

        final class Box: Sendable {
            let peer: Mutex<AgentLink.Peer?>
            init(_ peer: AgentLink.Peer?) { self.peer = Mutex(peer) }
        }
        final class Said: Sendable { let lines = Mutex<[String]>([]) }
        let boxed: Box
        let said: Said
        var log: [String] { said.lines.withLock { $0 } }

        var isAttached: Bool { link.waitUntilAttached(monotonicNanoseconds() + 10_000_000_000) }

        static func address(_ pid: Int32) throws -> UInt64 {
            let maps = try Files.read("/proc/\(pid)/maps", limit: 1 << 20)
            let line = maps.split(separator: "\n").first { $0.contains("memfd:ram") }
            return try #require(line.flatMap { UInt64($0.prefix { $0 != "-" }, radix: 16) })
        }
        static func memory(_ rig: Rig, _ user: UInt64, _ pages: (any GuestPages)?) throws -> GuestMemory {
            try GuestMemory(
                [
                    MemoryRegion(
                        guestAddress: Rig.firstGFN * 4096, byteCount: UInt64(rig.pages * 4096), userAddress: user,
                        fileOffset: 0, descriptor: rig.ram.duplicate(), owner: .us)
                ], log: DirtyTracker(), pages: pages)
        }

        func buffer(_ page: Int, _ count: Int = 4096) throws -> GuestBuffer {
            try memory.buffer(rig.gfn(page) * 4096, count: UInt64(count))
        }
        func gfns(_ page: Int, _ count: Int = 1) -> Range<GFN> { rig.gfn(page)..<rig.gfn(page + count) }
        func merge(_ page: Int, _ count: Int, value: Int) throws -> MoveOutcome {
            try link.merge([PageRun(gfn: rig.gfn(page), pages: count, slot: UInt64(value * Rig.slotsEach))])[0]
        }
    }

    @Test func commandsAndAccess() throws {
        let linked = try Linked()
        #expect(linked.isAttached)
        let rig = linked.rig
        for page in 0..<8 { _ = try rig.tell("fill \(page) 5") }
        #expect(try linked.merge(0, 8, value: 5) == MoveOutcome(done: 8, reason: .done))
        #expect(rig.map.state(of: rig.gfn(7)) == .shared(store: 0, slot: 5 * 64 + 7) && !rig.isInFile(3))
        // What a device reads and writes is what the guest does, though the memory file has nothing.
        #expect(try linked.buffer(2).copyOut() == [UInt8](repeating: 5, count: 4096))
        try linked.buffer(3).copyIn([UInt8](repeating: 7, count: 4096))
        #expect(try rig.tell("is 3 7") == 1 && !rig.isInFile(3))
        // Over the end of what is merged.
        _ = try rig.tell("fill 8 1")
        let fives = [UInt8](repeating: 5, count: 4096)
        #expect(try linked.buffer(7, 8192).copyOut() == fives + [UInt8](repeating: 1, count: 4096))
        let file = try Descriptor.open(rig.folder + "/patterns", O_RDWR)
        try linked.buffer(7, 8192).read(from: file, at: 2 * 4096)
        #expect(try rig.tell("is 7 2") == 1 && rig.tell("is 8 3") == 1)
        let copy = try Descriptor.open(rig.folder + "/copy", O_RDWR | O_CREAT)
        try linked.buffer(2, 7 * 4096).write(to: copy, at: 0)
        let copied = [5, 7, 5, 5, 5, 2, 3].flatMap { [UInt8](repeating: $0, count: 4096) }
        #expect(try copy.readAll(limit: 1 << 20) == copied)
        // The control: the same without the page map reads what the file has, which is nothing.
        let blind = try Linked.memory(rig, linked.userAddress, nil)
        #expect(try blind.buffer(rig.gfn(2) * 4096, count: 4096).copyOut() != [UInt8](repeating: 5, count: 4096))
        try Memfd.punch(rig.ram.raw, offset: 2 * 4096, byteCount: 4096)

        #expect(try linked.link.merge([PageRun(gfn: rig.gfn(9), pages: 1, slot: 64)])[0].reason == .differs(page: 0))
        #expect(try linked.merge(0, 1, value: 5).reason == .state(page: 0))
        #expect(try linked.link.fold([linked.gfns(0, 9)], onlyDiverged: true)[0].reason == .done)
        #expect(rig.map.state(of: rig.gfn(3)) == .private && rig.byte(3) == 7)
        #expect(rig.map.state(of: rig.gfn(2))?.isMerged == true)
        #expect(try linked.link.zero([linked.gfns(100, 50), linked.gfns(0)]).map(\.reason) == [.done, .state(page: 0)])
        #expect(try linked.buffer(120).copyOut() == [UInt8](repeating: 0, count: 4096))
        #expect(try linked.link.reset([linked.gfns(100, 50)])[0] == MoveOutcome(done: 50, reason: .done))
        #expect(try linked.link.fold([linked.gfns(0, 4096)])[0].reason == .done)
        #expect((0..<4096).allSatisfy { rig.map.state(of: rig.gfn($0)) == .private })
        #expect(linked.link.status.gate?.isClosed == false && linked.link.status.gate?.reason == "")
    }

    @Test func ringsStayPrivate() throws {
        let linked = try Linked()
        #expect(linked.isAttached)
        let rig = linked.rig
        for page in 0..<8 { _ = try rig.tell("fill \(page) 5") }
        #expect(try linked.merge(0, 8, value: 5).done == 8)
        let address = rig.gfn(2) * 4096
        let far = address + 4 * 4096
        var hold = try linked.memory.keepPrivate([address + 100..<address + 5000, far..<far + 2])
        #expect(hold != nil)
        for page in [2, 3, 6] { #expect(rig.map.state(of: rig.gfn(page)) == .private && rig.byte(page) == 5) }
        for page in [1, 4, 5, 7] { #expect(rig.map.state(of: rig.gfn(page))?.isMerged == true) }
        #expect(try linked.merge(2, 1, value: 5) == MoveOutcome(done: 0, reason: .unmergeable))
        #expect(try linked.link.zero([linked.gfns(3, 9), linked.gfns(20)]).map(\.reason) == [.unmergeable, .done])
        hold = nil
        #expect(try linked.merge(2, 2, value: 5).done == 2)
    }

    /// The gate has closed over merged pages, and the next kernel of the guest puts a ring there: its page is in no transfer. Unless
    /// all of guest RAM is.
    @Test(arguments: [false, true]) func ringsStartUnderAClosedGate(_ isAllInUse: Bool) throws {
        let linked = try Linked()
        #expect(linked.isAttached)
        let rig = linked.rig
        for page in 0..<8 { _ = try rig.tell("fill \(page) 5") }
        #expect(try linked.merge(0, 8, value: 5).done == 8)
        if isAllInUse { _ = try rig.tell("uring_buffers") } else {
            #expect(try rig.tell("direct \(rig.folder)/patterns") ?? -1 >= 0)
            _ = try rig.tell("io_submit")
        }
        #expect(try linked.link.fold([linked.gfns(0, 8)])[0] == MoveOutcome(done: 0, reason: .gateClosed))
        let address = rig.gfn(2) * 4096
        if isAllInUse {
            #expect(throws: QuireError.self) { _ = try linked.memory.keepPrivate([address..<address + 4096]) }
            #expect(rig.map.state(of: rig.gfn(2))?.isMerged == true)
        } else {
            let hold = try linked.memory.keepPrivate([address..<address + 4096])
            #expect(hold != nil && rig.map.state(of: rig.gfn(2)) == .private && rig.byte(2) == 5)
            for page in [1, 3] { #expect(rig.map.state(of: rig.gfn(page))?.isMerged == true) }
        }
        #expect(try rig.tell("is 2 5") == 1)
    }

    /// A back end whose page map does not say what is merged: it reads nothing rather than what is wrong. Where nothing is merged the
    /// bytes are where its map says.
    @Test(arguments: [true, false]) func anotherPageMap(_ isMerged: Bool) throws {
        let linked = try Linked()
        #expect(linked.isAttached)
        let rig = linked.rig
        for page in 0..<8 { _ = try rig.tell("fill \(page) 5") }
        if isMerged { #expect(try linked.merge(0, 8, value: 5).done == 8) }
        linked.link.end()

        let pages = MergedPages(map: try PageMap(PageMap.makeFile(pageCount: Rig.firstGFN + UInt64(rig.pages))))
        let said = Linked.Said()
        let peer = AgentLink.Peer(pid: rig.pid, uid: geteuid())
        let link = try AgentLink(
            path: rig.folder + "/link", pages: pages,
            logger: Logger(label: "link") { _ in Linked.Handler(sink: { line in said.lines.withLock { $0.append(line) } }) }
        ) { peer }
        defer { link.end() }
        let memory = try Linked.memory(rig, linked.userAddress, pages)
        link.setMemory(memory)
        #expect(eventually { said.lines.withLock { $0.contains { $0.contains("not the page map") } } })
        let address = rig.gfn(2) * 4096
        let buffer = try memory.buffer(address, count: 4096)
        if isMerged {
            let failure = #expect(throws: QuireError.self) { try buffer.copyOut() }
            #expect(failure?.code == .closed)
            #expect(throws: QuireError.self) { _ = try memory.keepPrivate([address..<address + 4096]) }
        } else {
            #expect(try buffer.copyOut() == [UInt8](repeating: 5, count: 4096))
            #expect(try memory.keepPrivate([address..<address + 4096]) != nil)
        }
        #expect(try rig.tell("is 2 5") == 1)
    }

    /// A ring starts while a merge of its pages is under way: it waits, and then has them for itself.
    @Test func ringsStayPrivateInAWindow() throws {
        let linked = try Linked(["delay=1"])
        #expect(linked.isAttached)
        let rig = linked.rig
        for page in 0..<8 { _ = try rig.tell("fill \(page) 5") }
        _ = try rig.tell("pause \(Step.compared.rawValue)")
        let link = linked.link, memory = linked.memory, first = rig.gfn(0)
        let merging = try JoinableThread("merge") { _ = try? link.merge([PageRun(gfn: first, pages: 8, slot: 5 * 64)]) }
        #expect(try rig.tell("paused") == 1)
        let held = Mutex<PageHold?>(nil)
        let holding = try JoinableThread("hold") {
            let hold = try? memory.keepPrivate([(first + 2) * 4096..<(first + 3) * 4096])
            held.withLock { $0 = hold }
        }
        ProcessCalls.sleep(milliseconds: 50)
        #expect(held.withLock { $0 } == nil)
        _ = try rig.tell("go")
        merging.join()
        holding.join()
        #expect(held.withLock { $0 } != nil)
        #expect(rig.map.state(of: rig.gfn(2)) == .private && rig.map.state(of: rig.gfn(1))?.isMerged == true)
    }

    @Test func strangersAreRefused() throws {
        let linked = try Linked(peer: .some(nil))
        #expect(!linked.link.waitUntilAttached(monotonicNanoseconds() + 500_000_000))
        #expect(linked.log.filter { $0.contains("not known yet") }.count == 1, "\(linked.log)")
        linked.boxed.peer.withLock { $0 = AgentLink.Peer(pid: 1, uid: geteuid()) }
        #expect(!linked.link.waitUntilAttached(monotonicNanoseconds() + 3_000_000_000))
        #expect(linked.log.filter { $0.contains("is refused as the agent") }.count == 1, "\(linked.log)")
        linked.boxed.peer.withLock { $0 = AgentLink.Peer(pid: linked.rig.pid, uid: geteuid()) }
        #expect(linked.isAttached)
        // A second one beside it, and then one that is no agent at all.
        let raw = try #require(connectPackets(linked.rig.folder + "/link"))
        defer { close(raw) }
        #expect(eventually { linked.log.contains { $0.contains("is refused as the agent") } })
        #expect(linked.link.status.phase == .attached)
    }

    /// The front end says one address, the process has another: then merged pages would be looked for in the wrong
    /// place.
    @Test func otherAddressesAreRefused() throws {
        let linked = try Linked(shift: 4096)
        #expect(!linked.link.waitUntilAttached(monotonicNanoseconds() + 1_000_000_000))
        #expect(linked.log.contains { $0.contains("elsewhere") }, "\(linked.log)")
        #expect(throws: QuireError.self) { try linked.merge(0, 1, value: 5) }
    }

    /// Peers of the right process that speak another version, or nonsense.
    @Test func brokenAgents() throws {
        let linked = try Linked(peer: AgentLink.Peer(pid: getpid(), uid: geteuid()))
        func say(_ bytes: [UInt8]) throws -> Bool {
            let raw = try #require(connectPackets(linked.rig.folder + "/link"))
            let socket = UnixSocket(adopting: Descriptor(owning: raw))
            try socket.send(bytes)
            var passed = UnixSocket.PassedDescriptors()
            guard !waitReadable([raw], timeoutMilliseconds: 5000).isEmpty else { return false }
            return (try? socket.receiveMessage(limit: 64, maxDescriptors: 1, into: &passed)).flatMap { $0 } == nil
        }
        func hello(_ version: UInt32) -> [UInt8] {
            var fields = Fields()
            fields.add(UInt32(1))
            fields.add(UInt32(40))
            fields.bytes += Array(QUIRE_AGENT_MAGIC.utf8)
            fields.add(version)
            fields.add(zeros: 20)
            return fields.bytes
        }
        #expect(try say(hello(9)))
        #expect(linked.log.contains { $0.contains("speaks version 9") && $0.contains("restart the VM") }, "\(linked.log)")
        #expect(try say(hello(9)))
        #expect(linked.log.filter { $0.contains("speaks version 9") }.count == 1)
        for bytes in [
            hello(1), [1], [UInt8](repeating: 0, count: 8), [6, 0, 0, 0, 40, 0, 0, 0] + [UInt8](repeating: 0, count: 32),
            [3, 0, 0, 0, 8, 0, 0, 0], [99, 0, 0, 0, 8, 0, 0, 0], [UInt8](repeating: 1, count: 9000),
        ] as [[UInt8]] { #expect(try say(bytes), "\(bytes.prefix(12))") }
        #expect(linked.link.status.phase == .absent)
    }

    /// QEMU is killed in the middle of a command: whoever waits hears of it, and nobody reads anything wrong.
    @Test func frontEndIsKilled() throws {
        let linked = try Linked(["delay=1"])
        #expect(linked.isAttached)
        let rig = linked.rig
        for page in 0..<8 { _ = try rig.tell("fill \(page) 5") }
        _ = try rig.tell("fill 1000 5")
        #expect(try linked.merge(1000, 1, value: 5).done == 1)
        _ = try rig.tell("pause \(Step.compared.rawValue)")
        let failure = Mutex<QuireError?>(nil)
        let link = linked.link, first = rig.gfn(0)
        let merging = try JoinableThread("merge") {
            do throws(QuireError) { _ = try link.merge([PageRun(gfn: first, pages: 8, slot: 5 * 64)]) } catch {
                let caught = error
                failure.withLock { $0 = caught }
            }
        }
        #expect(try rig.tell("paused") == 1)
        kill(rig.pid, SIGKILL)
        merging.join()
        #expect(failure.withLock { $0?.code } == .closed)
        #expect(eventually { linked.link.status.phase == .absent })
        let merged = #expect(throws: QuireError.self) { try linked.buffer(1000).copyOut() }
        #expect(merged?.code == .closed)
        // The window that it died in never closes.
        let began = monotonicNanoseconds()
        let busy = #expect(throws: QuireError.self) { try linked.buffer(0).copyOut() }
        #expect(busy?.code == .busy && monotonicNanoseconds() - began < 15_000_000_000)
        #expect(throws: QuireError.self) { try linked.link.settle(until: monotonicNanoseconds() + 10_000_000) }
    }

    // MARK: - Back ends that are killed

    /// Starts a back end, has it killed and started again, and looks at what it found.
    private func stress(kills: Int, seconds: Double, _ flags: [String] = []) throws -> (lost: UInt64, log: String) {
        let pages = 2048
        let rig = try Rig(pages: pages, ["start=0", "delay=200"])
        _ = try rig.tell("byte 0")
        let user = try Linked.address(rig.pid)
        let sharedFile = try Memfd(name: "model", byteCount: 4096 + 65536).takeDescriptor()
        let shared = try Mapping(sharedFile, byteCount: 4096 + 65536)
        let program = products + "agent-backend"
        func start() throws -> ChildProcess {
            var passing = ChildProcess.Options()
            passing.parentDeathSignal = SIGKILL
            passing.passing = [
                .init(from: rig.ram.raw, to: 3), .init(from: rig.mapFile.raw, to: 4), .init(from: sharedFile.raw, to: 5),
                .init(from: rig.store.raw, to: 6),
            ]
            return try ChildProcess(
                [
                    program, rig.folder + "/link", "\(user)", "\(pages)", "\(Rig.firstGFN)", "\(rig.pid)", "\(geteuid())",
                    rig.folder,
                ] + flags, passing)
        }
        var child = try start()
        #expect(try rig.tell("start \(rig.folder)/link") == 0)
        #expect(eventually { shared.load64(24) > 20 || child.poll() != nil })
        let end = monotonicNanoseconds() + UInt64(seconds * 1e9)
        var killed = 0
        while monotonicNanoseconds() < end, shared.load64(16) == 0, child.poll() == nil {
            ProcessCalls.sleep(milliseconds: UInt32.random(in: 20...300))
            guard killed < kills else { continue }
            killed += 1
            child.signal(SIGKILL)
            child.wait()
            child = try start()
            let verified = shared.load64(0), merged = shared.load64(24)
            let goesOn = eventually { shared.load64(0) > verified + 100 && shared.load64(24) > merged }
            #expect(goesOn, "after \(killed) deaths nothing moves")
            if !goesOn { break }
        }
        let isAlive = child.poll() == nil
        shared.store64(40, 1)
        let ending = child.wait()
        let counts = (0..<5).map { shared.load64(8 * $0) }
        print("\(flags) \(killed) kills: verified, written, lost, merged, folded \(counts), \(ending)")
        if flags.isEmpty {
            #expect(isAlive && counts[4] > 0)
            // And the guest sees the same.
            for page in 0..<pages {
                let value = shared.load8(4096 + page)
                #expect(try value == 0x80 || rig.tell("is \(page) \(value)") == 1, "page \(page)")
            }
        }
        return (shared.load64(16), "\(counts)")
    }

    private static let factor = ProcessCalls.environment("QUIRE_TEST_FACTOR").flatMap { Double($0) } ?? 1

    @Test func ioMeetsWindows() throws { #expect(try stress(kills: 0, seconds: 5 * Self.factor).lost == 0) }

    @Test func backendsAreKilled() throws {
        #expect(try stress(kills: Int(10 * Self.factor), seconds: 12 * Self.factor).lost == 0)
    }

    @Test func controlWithoutTheRangeLock() throws { #expect(try stress(kills: 0, seconds: 20, ["nolock"]).lost > 0) }

    @Test func controlWithoutThePageMap() throws { #expect(try stress(kills: 0, seconds: 10, ["nomap"]).lost > 0) }
}

private func connectPackets(_ path: String) -> Int32? {
    let raw = socket(AF_UNIX, Int32(SOCK_SEQPACKET.rawValue), 0)
    var address = sockaddr_un()
    address.sun_family = sa_family_t(AF_UNIX)
    withUnsafeMutableBytes(of: &address.sun_path) { $0.copyBytes(from: Array(path.utf8)) }
    let code = withUnsafePointer(to: &address) {
        $0.withMemoryRebound(to: sockaddr.self, capacity: 1) { connect(raw, $0, socklen_t(MemoryLayout<sockaddr_un>.size)) }
    }
    if code == 0 { return raw }
    close(raw)
    return nil
}

private func eventually(seconds: UInt64 = 20, _ condition: () -> Bool) -> Bool {
    let deadline = monotonicNanoseconds() + seconds * 1_000_000_000
    while monotonicNanoseconds() < deadline {
        if condition() { return true }
        ProcessCalls.sleep(milliseconds: 5)
    }
    return condition()
}
