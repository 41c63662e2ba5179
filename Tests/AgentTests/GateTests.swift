import CQuireLayout
import Engines
import Glibc
import Platform
import Testing

/// The pin gate: closed while anything may pin guest memory that isn't under the agent's eyes, and before it can.
@Suite(.serialized, .needsMerging) struct GateTests {
    private func rig(_ options: [String] = []) throws -> Rig {
        let rig = try Rig(options)
        try rig.begin()
        for page in 0..<8 { _ = try rig.tell("fill \(page) 5") }
        return rig
    }

    private func isClosed(_ rig: Rig) throws -> Bool {
        // Whatever the message says: the next window decides.
        try rig.run(.merge, 0, 1, value: 6).reason == .gateClosed
    }

    @Test func nativeAIOWithDirectIO() throws {
        let rig = try rig()
        let fd = try #require(try rig.tell("direct \(rig.folder)/patterns"))
        #expect(fd >= 0)
        // By itself it leaves the gate open: the calls that may pin are over when they return.
        #expect(try !isClosed(rig))
        _ = try rig.tell("io_submit")
        #expect(try isClosed(rig))
        #expect(try rig.connection.gate(becomes: true)?.text.contains("O_DIRECT and uses native AIO") == true)
        #expect(try rig.tell("close \(fd)") == 0)
        #expect(try rig.connection.gate(becomes: false)?.text == "")
        #expect(try !isClosed(rig))
        // And by every way in which such a descriptor comes.
        let plain = try #require(try rig.tell("open \(rig.folder)/patterns"))
        #expect(try !isClosed(rig))
        #expect(try rig.tell("setfl \(plain) 1") == 0)
        // The message may come after the answer that says so too: what it says next is about what comes next.
        #expect(try isClosed(rig) && rig.connection.gate(becomes: true) != nil)
        #expect(try rig.tell("setfl \(plain) 0") == 0)
        #expect(try rig.connection.gate(becomes: false) != nil && !isClosed(rig))
        let direct = try Descriptor.open(rig.folder + "/patterns", O_RDONLY | 0o40000)
        try rig.passDescriptor(direct.raw)
        #expect(try rig.tell("receive") ?? -1 >= 0)
        #expect(try isClosed(rig))
    }

    @Test func uring() throws {
        let rig = try rig()
        _ = try rig.tell("uring_poll")
        let fd = try #require(try rig.tell("direct \(rig.folder)/patterns"))
        #expect(try fd >= 0 && !isClosed(rig))
        _ = try rig.tell("uring_enter")
        #expect(try isClosed(rig))
        #expect(try rig.connection.gate(becomes: true)?.text.contains("io_uring") == true)
    }

    @Test func fixedBuffersCloseItForGood() throws {
        let rig = try rig(["table=1"])
        #expect(try rig.run(.merge, 0, 8, value: 5).done == 8)
        _ = try rig.tell("fill 20 5")
        rig.setMark(20, 1)
        _ = try rig.tell("uring_buffers")
        #expect(try isClosed(rig))
        #expect(try rig.run(.fold, 0, 8).reason == .gateClosed && rig.run(.zero, 100, 8).reason == .gateClosed)
        // They may be all of guest RAM: then no page gets another place, not even a ring, or what the guest has freed.
        #expect(try rig.run(.foldHeld, 0, 8).reason == .gateClosed && rig.run(.reset, 0, 8).reason == .gateClosed)
        #expect(try rig.recycle(20, 1) == Outcome(done: 0, reason: .busy, detail: 0) && rig.isInFile(20))
        #expect((0..<8).allSatisfy { !rig.isPrivate($0) })
        let gate = try #require(try rig.connection.gate(becomes: true))
        #expect(gate.isAssigned && gate.text.contains("fixed buffers"))
        rig.drop()
        try rig.begin(waitForGate: false)
        #expect(try isClosed(rig))
    }

    @Test func openedBeforeTheAttach() throws {
        let rig = try Rig()
        _ = try rig.tell("direct \(rig.folder)/patterns")
        _ = try rig.tell("io_submit")
        try rig.begin(waitForGate: false)
        #expect(try rig.connection.gate(becomes: true) != nil && isClosed(rig))
    }

    /// A page that becomes a ring is in no transfer: it comes back under most of what closes the gate, and nothing else does.
    @Test func ringsComeBack() throws {
        let rig = try rig()
        #expect(try rig.run(.merge, 0, 8, value: 5).done == 8)
        _ = try rig.tell("direct \(rig.folder)/patterns")
        _ = try rig.tell("io_submit")
        #expect(try isClosed(rig))
        #expect(try rig.run(.fold, 0, 8).reason == .gateClosed && rig.run(.foldDiverged, 0, 8).reason == .gateClosed)
        #expect(try rig.run(.foldHeld, 2, 2) == Outcome(done: 2, reason: .done, detail: 0))
        #expect((0..<8).allSatisfy { rig.isPrivate($0) == (2..<4).contains($0) })
        #expect(try rig.byte(2) == 5 && rig.tell("is 3 5") == 1)
    }

    // MARK: - Peers

    /// Whether each of these pages is in the memory file, with this byte.
    private func isBack(_ rig: Rig, _ pages: Range<Int>, _ value: UInt8) -> Bool {
        pages.allSatisfy { rig.isPrivate($0) && rig.byte($0) == value }
    }

    /// Guest RAM goes to this test's process, which is the backend and looks each page up; and to one that nobody knows, which finds
    /// every byte in the memory file: when it gets it, and from then on.
    @Test func peers() throws {
        let rig = try rig()
        #expect(try rig.run(.merge, 0, 8, value: 5).done == 8 && rig.run(.zero, 100, 8).done == 8)
        _ = try rig.tell("fill 3 6")
        #expect(try rig.tell("pass") == 1)
        #expect(try !isClosed(rig))
        #expect((0..<8).allSatisfy { !rig.isPrivate($0) && !rig.isInFile($0) })
        #expect(try rig.tell("stranger 7") == 5)
        #expect(isBack(rig, 0..<3, 5) && isBack(rig, 3..<4, 6) && isBack(rig, 4..<8, 5) && isBack(rig, 100..<108, 0))
        _ = try rig.tell("fill 4 7")
        #expect(rig.byte(4) == 7)
        #expect(try isClosed(rig))
        #expect(try rig.connection.gate(becomes: true)?.text.contains("vhost-user") == true)
        // To another one, with nothing left to do.
        #expect(try rig.tell("stranger 4") == 7)
    }

    /// Nothing is merged yet: whoever has guest RAM by then is only looked at. Ours turn out to be ours.
    @Test func peersFromBeforeTheAttach() throws {
        let rig = try Rig()
        #expect(try rig.tell("pass") == 1)
        try rig.begin()
        #expect(try rig.run(.zero, 0, 8).done == 8)
        let other = try Rig()
        #expect(try other.tell("stranger 0") == 0)
        try other.begin(waitForGate: false)
        #expect(try isClosed(other))
    }

    /// The guest's memory map changes while pages are merged; the memory file has those that are in no region now, too.
    @Test func pagesOfRegionsThatAreGoneComeBack() throws {
        let rig = try rig()
        #expect(try rig.run(.merge, 0, 8, value: 5).done == 8)
        #expect(try rig.attach(regions: [Region(gfn: rig.gfn(0), pages: 2)]).status == QUIRE_AGENT_OK.rawValue)
        #expect(!rig.isPrivate(5))
        #expect(try rig.tell("stranger 5") == 5)
        #expect(isBack(rig, 0..<8, 5))
        #expect(try rig.tell("is 1 5") == 1 && rig.tell("is 7 5") == 1)
    }

    /// I/O that is in flight on a merged page is waited for.
    @Test func peerWaitsForIO() throws {
        let rig = try rig()
        #expect(try rig.run(.merge, 0, 8, value: 5).done == 8)
        let map = rig.map, held = rig.gfn(3)..<rig.gfn(4)
        try map.beginIO(held)
        let ending = try JoinableThread("end") {
            ProcessCalls.sleep(milliseconds: 50)
            map.endIO(held)
        }
        #expect(try rig.tell("stranger 0") == 5)
        ending.join()
        #expect(isBack(rig, 0..<8, 5))
    }

    /// What may be pinned can't be brought back; so nobody gets the memory. Where nothing is merged everybody does.
    @Test func peerIsRefusedWherePagesArePinned() throws {
        let rig = try rig()
        _ = try rig.tell("direct \(rig.folder)/patterns")
        _ = try rig.tell("io_submit")
        #expect(try isClosed(rig) && rig.tell("stranger 0") == 5)

        let other = try self.rig()
        #expect(try other.run(.merge, 0, 8, value: 5).done == 8)
        let fd = try #require(try other.tell("direct \(other.folder)/patterns"))
        _ = try other.tell("io_submit")
        #expect(try isClosed(other) && other.tell("stranger 0") == Int(-EBUSY))
        #expect((0..<8).allSatisfy { !other.isPrivate($0) })
        #expect(try other.tell("is 0 5") == 1)
        // When the agent has looked (`isClosed`), and only the one who wanted it keeps the gate closed.
        #expect(try other.tell("close \(fd)") == 0 && isClosed(other))
        #expect(try other.tell("stranger 0") == 5 && isBack(other, 0..<8, 5))
    }

    /// A peer is who serves, and not who has listened: it is there as long as its connection is.
    @Test func peerWhoseListenerIsGone() throws {
        let rig = try rig()
        #expect(try rig.tell("orphan") == 1)
        for _ in 0..<2 {
            // The agent looks at everything.
            #expect(try rig.attach().status == QUIRE_AGENT_OK.rawValue)
            #expect(try isClosed(rig))
        }
        #expect(try rig.tell("hang_up") == 0)
        #expect(try rig.attach().status == QUIRE_AGENT_OK.rawValue)
        #expect(try !isClosed(rig))
    }

    // MARK: - What the agent looks at

    /// No descriptor is to be had: what was known stays known.
    @Test func looksThatFail() throws {
        let rig = try rig()
        let fd = try #require(try rig.tell("direct \(rig.folder)/patterns"))
        _ = try rig.tell("io_submit")
        #expect(try isClosed(rig))
        // For the list of them, and not for what is in it; and not even for that.
        for room in [1, 0] {
            #expect(try rig.tell("limit \(room)") == 0)
            // Whatever is closed: the agent looks, and before the next command.
            _ = try rig.tell("close 9999")
            #expect(try isClosed(rig))
        }
        #expect(try rig.tell("limit -1") == 0)
        #expect(try rig.tell("close \(fd)") == 0)
        #expect(try rig.connection.gate(becomes: true) != nil)
        #expect(try rig.connection.gate(becomes: false) != nil && !isClosed(rig))
    }

    @Test func duplicates() throws {
        let rig = try rig()
        let fd = try #require(try rig.tell("direct \(rig.folder)/patterns"))
        _ = try rig.tell("io_submit")
        let copy = try #require(try rig.tell("dup \(fd)"))
        #expect(try copy >= 0 && rig.tell("close \(fd)") == 0 && isClosed(rig))
        #expect(try rig.connection.gate(becomes: true) != nil && rig.tell("close \(copy)") == 0)
        #expect(try rig.connection.gate(becomes: false) != nil)
    }

    /// A server of files may have the page cache left out, and no flag of the descriptor says so.
    @Test(.enabled(if: ProcessCalls.isRoot && Files.isWritable("/dev/fuse"), "a file system of FUSE is mounted")) func fuse() throws {
        let rig = try Rig(prefix: ["unshare", "--mount"])
        try rig.begin()
        _ = try rig.tell("uring_enter")
        #expect(try !isClosed(rig))
        let fd = try #require(try rig.tell("fuse \(rig.folder)/fuse"))
        #expect(try fd >= 0 && isClosed(rig))
        #expect(try rig.connection.gate(becomes: true)?.text.contains("FUSE") == true)
        // Looking again finds the same.
        #expect(try rig.attach().status == QUIRE_AGENT_OK.rawValue)
        #expect(try isClosed(rig))
        #expect(try rig.tell("close \(fd)") == 0)
        #expect(try rig.connection.gate(becomes: false) != nil && !isClosed(rig))
    }

    /// Nothing more is merged while the host accounts for every mapping; what must come back does.
    @Test(.enabled(if: ProcessCalls.isRoot, "a file is mounted over the kernel's")) func hostThatOvercommitsNothing() throws {
        let path = "/var/tmp/quire-overcommit-\(UInt32.random(in: 0 ... .max))"
        let file = try Descriptor.open(path, O_RDWR | O_CREAT)
        defer { Files.remove(path) }
        func set(_ mode: Character) {
            var digit = mode.asciiValue!
            #expect(pwrite(file.raw, &digit, 1, 0) == 1)
        }
        set("0")
        let rig = try Rig(prefix: [
            "unshare", "--mount", "sh", "-c", "mount --bind \(path) /proc/sys/vm/overcommit_memory && exec \"$@\"", "sh",
        ])
        try rig.begin()
        for page in 0..<8 { _ = try rig.tell("fill \(page) 5") }
        #expect(try rig.run(.merge, 0, 8, value: 5).done == 8)
        set("2")
        #expect(try rig.attach().status == QUIRE_AGENT_OK.rawValue)
        #expect(try isClosed(rig))
        #expect(try rig.connection.gate(becomes: true)?.text.contains("vm.overcommit_memory") == true)
        #expect(try rig.run(.foldHeld, 0, 1).done == 1)
        set("1")
        #expect(try rig.attach().status == QUIRE_AGENT_OK.rawValue)
        #expect(try !isClosed(rig))
        set("2")
        #expect(try rig.attach().status == QUIRE_AGENT_OK.rawValue)
        #expect(try isClosed(rig) && rig.tell("stranger 1") == 5 && isBack(rig, 0..<8, 5))
    }

    // MARK: - Devices

    /// None of these devices is here: what the agent goes by is their name, so another one gets it, /dev/null. One that was told
    /// where all of guest RAM is keeps what the guest frees from going, too; any other does not.
    @Test(.enabled(if: ProcessCalls.isRoot, "device files are made"), arguments: [
        ("/dev/vfio/quire-test", true), ("/dev/vhost-vdpa-quire-test", true), ("/dev/iommu-quire-test", true),
        ("/dev/udmabuf-quire-test", false), ("/dev/sg-quire-test", false),
    ]) func devices(_ path: String, isAssigned: Bool) throws {
        let hadFolder = Files.isDirectory("/dev/vfio")
        if path.hasPrefix("/dev/vfio/"), !hadFolder { try Files.makeDirectory("/dev/vfio", mode: 0o755) }
        Files.remove(path)
        try #require(mknod(path, S_IFCHR | 0o666, 1 << 8 | 3) == 0)
        defer {
            Files.remove(path)
            if path.hasPrefix("/dev/vfio/"), !hadFolder { Files.removeDirectory("/dev/vfio") }
        }
        let rig = try Rig(["table=1"])
        try rig.begin()
        func free(_ pages: Range<Int>) throws {
            for page in pages {
                _ = try rig.tell("fill \(page) 5")
                rig.setMark(page, 1)
            }
        }
        try free(0..<8)
        #expect(try rig.recycle(0, 8).done == 8)
        let fd = try #require(try rig.tell("open \(path)"))
        try free(8..<16)
        // As the device does when it takes all of memory.
        _ = try rig.tell("fill 0 1")
        #expect(try isClosed(rig))
        #expect(try rig.recycle(0, 16) == Outcome(done: isAssigned ? 0 : 8, reason: isAssigned ? .busy : .done, detail: 0))
        #expect(try rig.recycle(0, 1, again: true).done == (isAssigned ? 0 : 1) && rig.isInFile(0) == isAssigned)
        let gate = try #require(try rig.connection.gate(becomes: true))
        #expect(gate.isAssigned == isAssigned && gate.text.contains("a device that pins memory"))
        _ = try rig.tell("close \(fd)")
        #expect(try rig.connection.gate(becomes: false)?.isAssigned == false && !isClosed(rig))
        #expect(try rig.recycle(0, 16).reason == .done && (8..<16).allSatisfy { rig.mark($0) == 0xff && !rig.isInFile($0) })
        #expect(try rig.recycle(0, 1, again: true).reason == .done && !rig.isInFile(0))
    }
}
