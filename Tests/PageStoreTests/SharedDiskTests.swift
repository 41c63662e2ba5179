import FoundationEssentials
import Glibc
import Host
import Platform
import StoreProtocol
import TestSupport
import Testing

/// Shared disks, by their real quired.
@Suite struct SharedDiskTests {
    private static let options = ["--keep", "--shared-disk", "scratch,size=16M", "--group", "lab=12345", "--shared-disk", "other,size=1M,group=lab"]

    private static func client(
        _ store: RunningStore, _ name: String = "scratch", group: String = "", token: UInt64 = 1, vm: String = "",
        expected: SharedDiskMessage.Welcome? = nil
    ) -> SharedDiskClient {
        SharedDiskClient(
            path: SharedDiskClient.path(besideStore: store.path), .init(name: name, group: group, token: token, vm: vm),
            expected: expected)
    }

    /// Asks again as long as quired is away.
    private static func persist<R>(_ body: () throws(QuireError) -> R) throws -> R {
        let deadline = monotonicNanoseconds() + 30_000_000_000
        while true {
            do throws(QuireError) { return try body() } catch {
                guard error.code == .retry, monotonicNanoseconds() < deadline else { throw error }
            }
        }
    }

    private static func stands(_ pid: Int32) -> Bool {
        (Files.list("/proc/\(pid)/task") ?? []).allSatisfy { thread in
            guard let text = try? Files.read("/proc/\(pid)/task/\(thread)/stat", limit: 1024), let end = text.lastIndex(of: ")")
            else { return false }
            return text[end...].dropFirst(2).first == "T"
        }
    }

    private static func pages(_ seed: UInt64, _ count: Int) -> [UInt8] {
        var state = seed | 1
        return (0..<count * 4096).map { _ in
            state = state &* 6_364_136_223_846_793_005 &+ 1_442_695_040_888_963_407
            return UInt8(truncatingIfNeeded: state >> 33)
        }
    }

    @Test func whatOneWritesAnotherReads() throws {
        let store = try RunningStore(Self.options)
        let one = Self.client(store, token: 1), two = Self.client(store, token: 2)
        let welcome = try one.attach(patienceMilliseconds: 5000)
        #expect(welcome.pages == 4096 && welcome.id != 0)
        #expect(try two.attach(patienceMilliseconds: 5000) == welcome)
        let bytes = Self.pages(7, 64)
        try one.put(4032, bytes)
        #expect(try two.get(4032, count: 64) == bytes)
        try two.flush(4033, count: 2)
        #expect(try one.get(4032, count: 4) == bytes[..<4096] + [UInt8](repeating: 0, count: 8192) + bytes[3 * 4096..<4 * 4096])
        try two.flush(0, count: 4096)
        #expect(try one.get(4032, count: 64).allSatisfy { $0 == 0 })
    }

    /// One line each; root is in every group, but a VM is in one.
    @Test func othersAreRefused() throws {
        let store = try RunningStore(Self.options)
        func refusal(_ name: String, _ group: String) -> String? {
            do throws(QuireError) {
                _ = try Self.client(store, name, group: group).attach(patienceMilliseconds: 5000)
                return nil
            } catch { return "\(error)" }
        }
        let own = "owner-\(ProcessCalls.ownUID)"
        #expect(refusal("other", "") == "quired: there is no shared disk 'other' for the group '\(own)': quired --shared-disk says which there are")
        #expect(refusal("scratch", "lab")?.contains("no shared disk 'scratch' for the group 'lab'") == true)
        #expect(refusal("nothing", "")?.contains("no shared disk 'nothing'") == true)
        #expect(refusal("scratch", "nobody")?.contains("there is no share group 'nobody'") == true)
        #expect(refusal("other", "lab") == nil)
        #expect(refusal("scratch", "") == nil)
    }

    /// quired is killed, again and again, while pages are written: each is there, and the disk is the same one.
    @Test func outlivesQuired() throws {
        let store = try RunningStore(Self.options)
        let client = Self.client(store)
        let welcome = try client.attach(patienceMilliseconds: 5000)
        for round in 0..<8 {
            if round % 2 == 1 { store.kill(andWait: round == 3) }
            for part in 0..<8 {
                try Self.persist { () throws(QuireError) in
                    try client.put(UInt64(round * 256 + part * 32), Self.pages(UInt64(round * 8 + part), 32))
                }
            }
        }
        let later = Self.client(store, token: 9, expected: welcome)
        for number in 0..<64 {
            let found = try Self.persist { () throws(QuireError) in try later.get(UInt64(number / 8 * 256 + number % 8 * 32), count: 32) }
            #expect(found == Self.pages(UInt64(number), 32), "\(number)")
        }
    }

    /// Without a keeper the content dies with quired. Then there are errors, and no zeros in place of what was there.
    @Test func lostContentIsNoEmptyDisk() throws {
        let store = try RunningStore(["--shared-disk", "scratch,size=16M"])
        let client = Self.client(store)
        _ = try client.attach(patienceMilliseconds: 5000)
        try client.put(0, Self.pages(1, 1))
        store.kill()
        do throws(QuireError) { try client.put(1, Self.pages(1, 1)) } catch { #expect(error.code == .retry) }
        try store.startAgain()
        #expect(throws: QuireError.self) { try Self.persist { () throws(QuireError) in try client.get(0, count: 1) } }
        do throws(QuireError) { _ = try client.get(0, count: 1) } catch {
            #expect(error.code == .invalid && error.description.contains("has lost what was on the shared disk"))
        }
    }

    /// A page that is not what was put is an error, at once and whoever asks; the others are as they were.
    @Test func aDamagedPageIsAnError() throws {
        let store = try RunningStore(Self.options)
        let client = Self.client(store)
        _ = try client.attach(patienceMilliseconds: 5000)
        // Compressed it begins with what it begins with.
        let mark = Array("not to be found elsewhere".utf8)
        let bytes = mark + [UInt8](repeating: 1, count: 2048) + [UInt8](repeating: 2, count: 2048 - mark.count)
        try client.put(5, bytes)
        try client.put(6, Self.pages(1, 1))
        var damaged = 0
        for name in Files.list("/proc/\(store.worker)/fd") ?? [] {
            let path = "/proc/\(store.worker)/fd/\(name)"
            guard Files.target(ofLink: path)?.hasPrefix("/memfd:") == true, let file = try? Descriptor.open(path, O_RDWR) else { continue }
            var at: UInt64 = 0
            let end = try file.status().byteCount
            while let data = Memfd.nextData(file.raw, from: at, to: end) {
                for page in stride(from: data.lowerBound, to: data.upperBound, by: 4096) {
                    let found = try file.readBytes(at: page, count: 4096)
                    guard let place = found.firstRange(of: mark)?.lowerBound else { continue }
                    // The window has it uncompressed.
                    guard found != bytes else { continue }
                    try file.writeBytes(at: page + UInt64(place), [UInt8](repeating: 0xff, count: 64))
                    damaged += 1
                }
                at = data.upperBound
            }
        }
        #expect(damaged == 1)
        for asker in [client, Self.client(store, token: 2)] {
            _ = try asker.attach(patienceMilliseconds: 5000)
            do {
                _ = try Self.persist { () throws(QuireError) in try asker.get(4, count: 3) }
                Issue.record("damaged bytes were read")
            } catch { #expect((error as? QuireError)?.code == .invalid && "\(error)".contains("damaged"), "\(error)") }
            #expect(try asker.get(6, count: 1) == Self.pages(1, 1))
        }
        // What is written anew is whole.
        try client.put(5, bytes)
        #expect(try client.get(5, count: 1) == bytes)
    }

    /// A quired that stands still keeps nobody: a tenth of a second or so, then the caller may do something else. And what it
    /// had not done then it does not do later, over what the same VM has written since.
    @Test func standingStill() throws {
        let store = try RunningStore(Self.options)
        let client = Self.client(store)
        _ = try client.attach(patienceMilliseconds: 5000)
        try client.put(5, Self.pages(1, 1))
        let worker = store.worker
        ProcessCalls.signal(worker, SIGSTOP)
        // It stands when all of its threads do.
        #expect(eventually { Self.stands(worker) })
        let began = monotonicNanoseconds()
        do throws(QuireError) {
            try client.put(5, Self.pages(2, 1))
            Issue.record("a stopped quired has answered")
        } catch { #expect(error.code == .retry) }
        #expect(monotonicNanoseconds() - began < 400_000_000)
        // Longer than the client's patience: then it is left with the request, and asked on another connection.
        while monotonicNanoseconds() - began < 3_000_000_000 {
            let asked = monotonicNanoseconds()
            do throws(QuireError) { try client.put(5, Self.pages(2, 1)) } catch { #expect(error.code == .retry) }
            #expect(monotonicNanoseconds() - asked < 400_000_000)
        }
        ProcessCalls.signal(worker, SIGCONT)
        try Self.persist { () throws(QuireError) in try client.put(5, Self.pages(3, 1)) }
        for _ in 0..<20 {
            #expect(try client.get(5, count: 1) == Self.pages(3, 1))
            ProcessCalls.sleep(milliseconds: 5)
        }
    }

    /// A later connection of the same client ends the earlier one; those of others go on.
    @Test func oneConnectionAClient() throws {
        let store = try RunningStore(Self.options)
        let path = SharedDiskClient.path(besideStore: store.path)
        func connect(_ token: UInt64) throws -> UnixSocket {
            let socket = try UnixSocket.connect(to: path, kind: .messages)
            try socket.sendMessage(SharedDiskMessage.Hello(name: "scratch", group: "", token: token).encoded())
            var descriptors = UnixSocket.PassedDescriptors()
            let bytes = try socket.receiveMessage(limit: 512, maxDescriptors: 1, into: &descriptors)
            _ = try SharedDiskMessage.Welcome(bytes ?? [])
            return socket
        }
        var none = UnixSocket.PassedDescriptors()
        func works(_ socket: borrowing UnixSocket) -> Bool {
            do {
                try socket.sendMessage(SharedDiskMessage.Request(.get, page: 0, count: 1, number: 1).encoded())
                return try socket.receiveMessage(limit: 512, maxDescriptors: 0, into: &none) != nil
            } catch { return false }
        }
        let one = try connect(1), other = try connect(2)
        #expect(works(one) && works(other))
        let next = try connect(1)
        #expect(!works(one) && works(other) && works(next))
    }

    /// What `quire tmem` and `quire status` say of shared disks, and do to them: no page that a VM has stored goes.
    @Test func operators() throws {
        let store = try RunningStore(Self.options)
        func quire(_ words: String, by user: [String] = []) throws -> (isDone: Bool, text: String) {
            var pipe = try Pipe()
            let writer = pipe.takeWriter(), reader = pipe.takeReader()
            var options = ChildProcess.Options()
            options.passing = [.init(from: writer.raw, to: 1), .init(from: writer.raw, to: 2)]
            options.variables = ["QUIRED_DIRECTORY": store.folder, "QUIRE_RUNTIME_DIR": store.folder + "/vms"]
            var child = try ChildProcess(user + [products + "quire"] + words.split(separator: " ").map(String.init), options)
            _ = consume writer
            let text = String(decoding: try reader.readAll(limit: 1 << 16), as: UTF8.self)
            let isDone = child.wait() == .exited(0)
            #expect(isDone || text.hasPrefix("quire: ") && text.filter { $0 == "\n" }.count == 1, "\(text)")
            return (isDone, text)
        }
        struct Entry: Decodable {
            let name: String
            let group: String?
            let attached: [String]?
            let content: String?
            let tmem: StatusReport.Tmem
        }
        func listed() throws -> Entry {
            let all = try JSONDecoder().decode([Entry].self, from: Data(quire("tmem list --json").text.utf8))
            #expect(all.map(\.name) == ["shared:other", "shared:scratch"])
            return try #require(all.last)
        }
        let one = Self.client(store, token: 1, vm: "one")
        let content = String(try one.attach(patienceMilliseconds: 5000).id, radix: 16)
        let bytes = Self.pages(3, 64)
        try one.put(10, bytes)
        #expect(try one.get(9, count: 3) == [UInt8](repeating: 0, count: 4096) + bytes[..<8192])
        let found = try listed()
        let pool = try #require(found.tmem.pools.first)
        #expect(found.group == "owner-\(ProcessCalls.ownUID)" && found.attached == ["one"] && found.content == content)
        #expect(pool.name == "scratch" && pool.scope == "shared" && pool.pages == 64 && pool.capacityBytes == 16 << 20)
        #expect(pool.storedBytes == 64 * 4096 && pool.ratio == 1 && pool.hits == 2 && pool.misses == 1 && pool.putsFailed == 0)
        #expect(try quire("status").text.contains("shared:scratch  scratch  persistent, shared"))
        #expect(try quire("tmem list shared:scratch").text.contains("attached by one"))
        #expect(try !quire("tmem list shared:scratch").text.contains("shared:other"))

        // A guest that comes from elsewhere gets the disk that it knows.
        func arrive(_ disk: String) throws -> String {
            try quire("run --config /dev/null --no-merge --shared-disk \(disk) -- qemu-system-x86_64 -m 64M -display none -incoming defer").text
        }
        let advice = "if the guest has nothing of it mounted or open, give content=any, and start it again\n"
        #expect(try arrive("scratch") == "quire: nobody says whether the shared disk 'scratch' still has what this guest knows of it: \(advice)")
        #expect(try arrive("scratch,content=1") == "quire: the shared disk 'scratch' has lost what this guest knows of it: \(advice)")
        // Which is not what keeps this one away.
        #expect(try arrive("scratch,content=\(content),size=1M").contains("has 16M, not 1M"))

        // Persistent pages: nothing of this takes one away.
        #expect(try quire("tmem flush shared:scratch 1G").isDone)
        #expect(try quire("tmem freeze shared:scratch").isDone && listed().tmem.state == .frozen)
        try one.put(500, Self.pages(4, 1))
        #expect(try quire("tmem thaw shared:scratch").isDone && quire("tmem weight shared:scratch scratch 50").isDone)
        #expect(try quire("tmem cap shared:scratch 64K").text.contains("its cap cannot be 65536"))
        #expect(try quire("tmem cap shared:scratch 1M").isDone)
        // The limit holds, in quired's next life, too; what failed left nothing, what was there stays.
        store.kill()
        #expect(try listed().tmem.capBytes == 1 << 20)
        #expect(throws: QuireError.self) {
            for part in 0..<8 as Range<UInt64> { try Self.persist { () throws(QuireError) in try one.put(1000 + part * 64, Self.pages(100 + part, 64)) } }
        }
        #expect(try listed().tmem.pools.first.map { $0.putsFailed > 0 && $0.storedBytes <= 1 << 20 } == true)
        #expect(try one.get(10, count: 64) == bytes && one.get(500, count: 1) == Self.pages(4, 1))
        #expect(try quire("tmem cap shared:scratch none").isDone && listed().tmem.capBytes == 0)
        try one.put(2000, Self.pages(5, 64))

        for (words, said) in [
            ("weight shared:scratch swap 50", "there is no pool 'swap'"), ("freeze shared:none", "there is no shared disk 'none'"),
            ("list shared:none", "there is no shared disk 'none'"), ("save shared:scratch /dev/null", "neither saved nor restored"),
        ] {
            let (isDone, text) = try quire("tmem " + words)
            #expect(!isDone && text.contains(said), "\(text)")
        }
        // Who is of another group sees his own, and changes nothing.
        guard ProcessCalls.isRoot else { return }
        let path = SharedDiskClient.path(besideStore: store.path)
        try Files.setAccess(store.folder, mode: 0o755)
        try Files.setAccess(path, mode: 0o777)
        let user = ["setpriv", "--reuid", "12345", "--regid", "12345", "--clear-groups"]
        let theirs = try quire("tmem list", by: user)
        #expect(theirs.text.contains("shared:other") && !theirs.text.contains("scratch"), "\(theirs.text)")
        #expect(try quire("tmem cap shared:scratch none", by: user).text.contains("there is no shared disk 'scratch'"))
        #expect(try quire("tmem cap shared:other none", by: user).text.contains("only root and quired's own user"))
    }

    /// While the host has less left than it is to have, a write is an error, and who looks is told why; a reload changes it.
    @Test func theHostKeepsItsReserve() throws {
        let config = "/tmp/quired-\(ProcessCalls.ownPID)-\(UInt32.random(in: 0 ... .max)).toml"
        defer { Files.remove(config) }
        func write(_ text: String) throws { try Descriptor.open(config, O_RDWR | O_CREAT, mode: 0o600).replaceContent(text) }
        // More than any host has.
        try write("[quired]\ntmem-reserve = \"8T\"\n")
        let store = try RunningStore(["--shared-disk", "scratch,size=16M"], config: config)
        let client = Self.client(store)
        _ = try client.attach(patienceMilliseconds: 5000)
        func reason() throws -> String? {
            try SharedDiskReport.collect(at: SharedDiskClient.path(besideStore: store.path)).first?.tmem.reason
        }
        #expect(try reason() == "")
        do throws(QuireError) {
            try client.put(7, Self.pages(1, 1))
            Issue.record("there was room")
        } catch { #expect(error.code == .noSpace) }
        #expect(try reason() == "a page found no room: the host has less than 8T of memory left (tmem-reserve)")
        try write("[quired]\ntmem-reserve = 0\n")
        #expect(try store.reload() == "quired.tmem-reserve: \"8T\" -> 0")
        try client.put(7, Self.pages(1, 1))
        #expect(try client.get(7, count: 1) == Self.pages(1, 1))
        #expect(try reason() == "")
    }

    /// A backend of before VMs said their names is served.
    @Test func anOlderBackendIsServed() throws {
        let store = try RunningStore(Self.options)
        let socket = try UnixSocket.connect(to: SharedDiskClient.path(besideStore: store.path), kind: .messages)
        try socket.sendMessage(Array(SharedDiskMessage.Hello(name: "scratch", group: "", token: 1).encoded().dropLast(64)))
        var descriptors = UnixSocket.PassedDescriptors()
        #expect(try SharedDiskMessage.Welcome(socket.receiveMessage(limit: 512, maxDescriptors: 1, into: &descriptors) ?? []).pages == 4096)
    }

    /// Whatever comes, nobody but its sender is hurt.
    @Test func nonsenseEndsTheConnection() throws {
        let store = try RunningStore(Self.options)
        let path = SharedDiskClient.path(besideStore: store.path)
        func answers(_ hello: [UInt8], _ request: [UInt8]?) throws -> [UInt8] {
            let socket = try UnixSocket.connect(to: path, kind: .messages)
            var descriptors = UnixSocket.PassedDescriptors()
            try socket.sendMessage(hello)
            var bytes = try socket.receiveMessage(limit: 512, maxDescriptors: 1, into: &descriptors)
            if let request {
                try socket.sendMessage(request)
                bytes = try socket.receiveMessage(limit: 512, maxDescriptors: 1, into: &descriptors)
            }
            let end = try socket.receiveMessage(limit: 512, maxDescriptors: 1, into: &descriptors)
            #expect(end == nil)
            return bytes ?? []
        }
        let hello = SharedDiskMessage.Hello(name: "scratch", group: "", token: 3).encoded()
        var newer = hello
        newer[8] = 2
        // A name that would do something to a terminal.
        let loud = SharedDiskMessage.Hello(name: "scratch", group: "", token: 3, vm: "\u{1B}[2J").encoded()
        for bad in [newer, Array(hello.dropLast()), [1], hello + [0], loud, Array("GET / HTTP/1.1\r\n\r\n".utf8), Array("?".utf8), Array("?scratch".utf8)] {
            #expect(SharedDiskMessage.error(try answers(bad, nil)) != nil)
        }
        for request in [
            SharedDiskMessage.Request(.get, page: 4096, count: 1, number: 1), .init(.put, page: 4095, count: 2, number: 1),
            .init(.get, page: 0, count: 65, number: 1), .init(.get, page: 0, count: 0, number: 1),
            .init(.flush, page: .max, count: .max, number: 1), .init(.put, page: UInt64.max - 1, count: 3, number: 1),
        ] {
            #expect(SharedDiskMessage.error(try answers(hello, request.encoded())) != nil, "\(request)")
        }
        #expect(SharedDiskMessage.error(try answers(hello, [9, 0, 0, 0] + [UInt8](repeating: 0, count: 20))) != nil)
        let client = Self.client(store, token: 4)
        try Self.persist { () throws(QuireError) in try client.put(0, Self.pages(1, 1)) }
        #expect(try client.get(0, count: 1) == Self.pages(1, 1))
    }

    @Test(arguments: [
        ["--shared-disk", "a"], ["--shared-disk", "a,size=5"], ["--shared-disk", ".a,size=1M"], ["--shared-disk", "a,size=1M,x=1"],
        ["--shared-disk", "a,size=1M,group=nobody"], ["--shared-disk", "a,size=1M", "--shared-disk", "a,size=1M"],
        ["--shared-disk", "a,size=9T"], ["--shared-disk", "a,size=1T"], ["--tmem-reserve", "9T"],
    ])
    func badOptionsAreOneLine(_ options: [String]) throws {
        var pipe = try Pipe()
        let writer = pipe.takeWriter(), reader = pipe.takeReader()
        let folder = "/tmp/quired-bad-\(ProcessCalls.ownPID)-\(UInt32.random(in: 0 ... .max))"
        let pid = try ProcessCalls.spawn(
            [RunningStore.program, "--directory", folder] + options, passing: [.init(from: writer.raw, to: 2)], inheritOthers: false,
            ownGroup: false, parentDeathSignal: SIGTERM)
        _ = consume writer
        let text = String(decoding: try reader.readAll(limit: 4096), as: UTF8.self)
        #expect(ProcessCalls.wait(pid, blocking: true) == .exited(1))
        #expect(text.hasPrefix("quired: ") && text.filter { $0 == "\n" }.count == 1, "\(text)")
        for name in Files.list(folder) ?? [] { Files.remove(folder + "/" + name) }
        Files.removeDirectory(folder)
    }
}
