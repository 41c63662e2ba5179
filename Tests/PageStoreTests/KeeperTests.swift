import Glibc
import Host
import PageStore
import Platform
import StoreProtocol
import TestSupport
import Testing

/// A keeper that cannot take what it is sent, or is gone: nobody relies on what is not kept, and the keeper lives on.
@Suite(.serialized) struct KeeperTests {
    // MARK: - The worker's side

    /// A keeper's end and a worker's, and as small a queue between them as there is.
    private static func makeEnds() throws -> MessagePair {
        let pair = try MessagePair()
        var room: Int32 = 1
        let isSmall = unsafe setsockopt(pair.far.raw()!, SOL_SOCKET, SO_SNDBUF, &room, 4) == 0
        #expect(isSmall)
        return pair
    }

    /// Parks one item after the other until it fails; `parked` is told of each.
    private static func fill(_ link: KeeperLink, _ raw: Int32, _ parked: (String) -> Void) -> String {
        var count = 0
        while true {
            do throws(QuireError) { try link.park("item-\(count)", [raw]) } catch { return "\(error)" }
            parked("item-\(count)")
            count += 1
        }
    }

    private static let failure = "quired's keeper is gone, so nothing new can be kept: restart quired: cannot write to the socket: "

    /// What finds no room is an error, and not on the list: who is handed all that was sent, and is to check it, believes it.
    @Test func whatIsNotSentIsNotPromised() throws {
        let file = try Memfd(name: "item", byteCount: 4096).takeDescriptor()
        var parked: [String] = [], items: [ParkedItem] = []
        do {
            var pair = try Self.makeEnds()
            let keeper = UnixSocket(adopting: pair.takeNear()), far = pair.takeFar()
            // Nobody reads: otherwise it would wait for ever.
            try Descriptor.makeNonblocking(far.raw)
            try keeper.sendMessage(Array("E".utf8))
            let link = try KeeperLink(adopting: far)
            let failure = Self.fill(link, file.raw) { parked.append($0) }
            #expect(failure == Self.failure + "Resource temporarily unavailable" && !parked.isEmpty)
            for round in 0..<2 {
                while !waitReadable([keeper.descriptor.raw], timeoutMilliseconds: 0).isEmpty {
                    var descriptors = UnixSocket.PassedDescriptors()
                    guard let message = try keeper.receiveMessage(limit: 256, maxDescriptors: 8, into: &descriptors) else { break }
                    items.append(ParkedItem(name: String(decoding: message, as: UTF8.self), descriptors: descriptors))
                }
                // There is room again, and it goes on.
                if round == 0 {
                    try link.park("later", [file.raw])
                    parked.append("later")
                }
            }
        }
        #expect(items.map(\.name) == (["manifest"] + parked).map { "P" + $0 })
        var pair = try MessagePair()
        let keeper = UnixSocket(adopting: pair.takeNear())
        for item in items {
            var files = DescriptorList()
            while let file = item.descriptors.next() { files.append(file) }
            try keeper.sendMessage(Array(item.name.utf8), passing: files.raw)
        }
        try keeper.sendMessage(Array("C".utf8))
        let next = try KeeperLink(adopting: pair.takeFar())
        #expect(next.loss == nil && next.parked.map(\.name) == parked)
    }

    /// Who waits for room is told when the keeper is gone.
    @Test func aKeeperThatIsGone() throws {
        let file = try Memfd(name: "item", byteCount: 4096).takeDescriptor(), raw = file.raw
        var pair = try Self.makeEnds()
        let keeper = UnixSocket(adopting: pair.takeNear())
        try keeper.sendMessage(Array("E".utf8))
        let link = try KeeperLink(adopting: pair.takeFar())
        let count = Monitor(0), failure = Monitor<String?>(nil)
        let parker = try JoinableThread("parker") {
            let text = Self.fill(link, raw) { _ in count.update { $0 += 1 } }
            failure.update { $0 = text }
        }
        #expect(eventually { count.read { $0 } > 0 })
        #expect(failure.read { $0 } == nil)
        _ = consume keeper
        parker.join()
        #expect(failure.read { $0 }?.hasPrefix(Self.failure) == true)
        #expect(message { try link.park("later", [raw]) }?.hasPrefix(Self.failure) == true)
    }

    // MARK: - The keeper's side

    /// Notes what it is handed. The first one parks an item, is ready, and sends what the keeper cannot take; the next one ends.
    private static let worker = """
        import signal, socket, sys
        signal.alarm(20)
        keeper, handed = socket.socket(fileno=3), ""
        while handed[-2:-1] not in ("E", "C"):
            message, files, _, _ = socket.recv_fds(keeper, 256, 8)
            handed += " " + message.decode() + str(len(files))
        print(handed, file=open(sys.argv[1], "a"))
        if " P" in handed: sys.exit(0)
        end = open(sys.argv[2], "w")
        pipe = end.fileno()
        socket.send_fds(keeper, [b"Pwhole"], [0, 0])
        keeper.send(b"R")
        socket.send_fds(keeper, *eval(sys.argv[3]))
        signal.pause()
        """

    /// A message that does not come whole: the worker that has sent it counts on it, so it ends, and the next one is to check what
    /// there is. Of the message nothing stays.
    @Test(arguments: ["[b'P' + b'x' * 129], [pipe]", "[b'Pcut'], [pipe] * 9"]) func messagesThatAreCut(_ message: String) throws {
        let path = "/tmp/quired-keeper-\(ProcessCalls.ownPID)-\(UInt32.random(in: 0 ... .max))"
        let pipe = path + ".pipe"
        defer { for path in [path, pipe] { Files.remove(path) } }
        let isMade = unsafe mkfifo(pipe, 0o600) == 0
        #expect(isMade)
        let reader = try Descriptor.open(pipe, O_RDONLY | O_NONBLOCK)
        let said = Monitor<[String]>([]), end = Monitor<String>("")
        let thread = try JoinableThread("keeper") {
            var keeper = Keeper()
            do throws(QuireError) {
                let command = ["/usr/bin/python3", "-c", Self.worker, path, pipe, message]
                let status = try keeper.run(command) { line in said.update { $0.append(line) } }
                end.update { $0 = "\(status)" }
            } catch { end.update { $0 = "\(error)" } }
        }
        thread.join()
        #expect(end.read { $0 } == "0")
        #expect(said.read { $0 } == ["quired was killed by signal 9, starting it again with 1 parked items"])
        #expect(try Files.read(path) == " E0\n Pwhole2 C0\n")
        // Its descriptors are closed everywhere.
        #expect(try reader.readAll(limit: 1) == [])
    }

    /// The keeper has no descriptors left for what it is sent, and the VM was told already that it is in: the next worker begins anew,
    /// and what VMs map stays as it is. The control: with descriptors nothing is lost, though the worker was killed before the keeper
    /// had read it.
    @Test(arguments: [false, true]) func noDescriptorsAreLeft(_ isControl: Bool) throws {
        let quired = try RunningStore()
        let worker = quired.worker
        let keeper = try Self.parent(of: worker)
        var a = try Backend(FakeVM("a"), path: quired.path)
        var slots = [try Self.merge(&a, 1)]
        let old = try a.client.store.duplicate(), id = a.client.welcome.storeID

        quired.signal(SIGSTOP)
        defer { quired.signal(SIGCONT) }
        #expect(eventually { Self.isStopped(keeper) })
        var b = try Backend(FakeVM("b"), path: quired.path)
        slots.append(try Self.merge(&b, 2))
        if isControl { ProcessCalls.signal(worker, SIGKILL) } else { try Self.limitDescriptors(of: keeper, to: 3) }
        quired.signal(SIGCONT)
        #expect(eventually { quired.worker != worker })
        if !isControl {
            // Not even for another worker: it tries again.
            #expect(ProcessCalls.isAlive(keeper) && quired.worker == keeper)
            try Self.limitDescriptors(of: keeper, to: 256)
        }
        #expect(quired.waitUntilItServes())
        #expect(try quired.worker != worker && Self.parent(of: quired.worker) == keeper)

        let kept: UInt64 = isControl ? 1 : 0
        try a.reconnect(quired.path)
        try b.reconnect(quired.path)
        for welcome in [a.client.welcome, b.client.welcome] {
            #expect((welcome.storeID == id) == isControl && welcome.keptPages == kept && welcome.unknownPages == 1 - kept)
        }
        // Who comes now gets a slot of the same number, where the store is another one.
        var c = try Backend(FakeVM("c"), path: quired.path)
        let slot = try Self.merge(&c, 3)
        #expect(slots.contains(slot) == !isControl)
        for (index, slot) in slots.enumerated() {
            #expect(try old.readBytes(at: UInt64(slot) * 4096, count: 4096) == page(1 + UInt64(index)))
        }
    }

    /// Two equal pages, of which the second is merged. Returns its slot.
    private static func merge(_ backend: inout Backend, _ content: UInt64) throws -> UInt32 {
        for gfn in UInt64(0)..<2 { try backend.vm.write(gfn, page(content)) }
        _ = try backend.lookUp(0..<1)
        for run in try backend.lookUp(1..<2) { _ = try backend.merge(run) }
        try backend.client.report([.init(.merged, 1..<2)])
        return try #require(backend.mapped[1])
    }

    private static func parent(of pid: Int32) throws -> Int32 {
        let line = try Files.read("/proc/\(pid)/status").split(separator: "\n").first { $0.hasPrefix("PPid:") }
        return try #require(line?.split(separator: "\t").last.flatMap { Int32($0) })
    }

    private static func isStopped(_ pid: Int32) -> Bool {
        (try? Files.read("/proc/\(pid)/status"))?.contains("\nState:\tT") == true
    }

    /// Those that are open stay.
    private static func limitDescriptors(of pid: Int32, to count: Int) throws {
        _ = try ChildProcess.output(of: ["prlimit", "--pid", "\(pid)", "--nofile=\(count):"])
    }
}
