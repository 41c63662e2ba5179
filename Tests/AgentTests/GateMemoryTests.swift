import CQuireLayout
import Testing

/// What the pin gate keeps in mind: who has guest RAM and by which connection, and what it has looked at already.
@Suite(.serialized, .needsMerging) struct GateMemoryTests {
    private func rig() throws -> Rig {
        let rig = try Rig()
        try rig.begin()
        for page in 0..<8 { _ = try rig.tell("fill \(page) 5") }
        return rig
    }

    private func isClosed(_ rig: Rig) throws -> Bool {
        // Whatever the message says: the next window decides.
        try rig.run(.merge, 0, 1, value: 6).reason == .gateClosed
    }

    /// The backend attaches and names what is ours besides it. The agent looks at everything, and forgets those of ours that are dead.
    private func attach(_ rig: Rig, peers: [Int] = []) throws {
        let ready = try rig.connection.attach(
            regions: [Region(gfn: Rig.firstGFN, pages: UInt64(rig.pages))], map: rig.mapFile.raw, files: [rig.ram.raw],
            stores: [rig.store.raw], peers: peers.map { UInt32($0) })
        #expect(ready.status == QUIRE_AGENT_OK.rawValue)
    }

    /// The number of what was made there.
    private func make(_ what: String, in rig: Rig) throws -> Int {
        let number = try #require(try rig.tell(what))
        try #require(number > 0)
        return number
    }

    // MARK: - Connections

    /// When guest RAM was passed to the process that has listened.
    enum Passed: CaseIterable, Sendable { case asOurs, beforeItWasKnown, never }

    /// A process of ours has listened and is dead. A connection to it on which guest RAM was passed while it lived stays ours: who
    /// serves it is who did. The control is any other connection: behind it may be anybody, for the dead one's number as well.
    @Test(arguments: Passed.allCases) func ourListenerIsGone(_ passed: Passed) throws {
        let rig = try rig()
        let listener = try make("listen", in: rig), end = try make("connect", in: rig)
        if passed == .beforeItWasKnown { #expect(try rig.tell("pass \(end)") == 1 && isClosed(rig)) }
        try attach(rig, peers: [listener])
        if passed == .asOurs { #expect(try rig.tell("pass \(end)") == 1) }
        #expect(try !isClosed(rig))
        #expect(try rig.run(.merge, 0, 8, value: 5).done == 8)
        #expect(try rig.tell("end \(listener)") == 0)
        try attach(rig)
        #expect(try !isClosed(rig))

        let isOurs = passed != .never
        #expect(try rig.tell("pass \(end)") == 1)
        #expect(try isClosed(rig) != isOurs)
        #expect((0..<8).allSatisfy { rig.isPrivate($0) != isOurs })
        let other = try make("connect", in: rig)
        #expect(try rig.tell("pass \(other)") == 1)
        #expect(try isClosed(rig))
        #expect((0..<8).allSatisfy { rig.isPrivate($0) && rig.byte($0) == 5 })
    }

    /// Of connections to ours the oldest is forgotten where there is no room: a stranger's, when who has listened is dead.
    @Test func theOldestConnectionIsForgotten() throws {
        let rig = try rig()
        let listener = try make("listen", in: rig)
        try attach(rig, peers: [listener])
        let ends = try (0..<65).map { _ in try make("connect", in: rig) }
        for end in ends { #expect(try rig.tell("pass \(end)") == 1) }
        #expect(try rig.tell("end \(listener)") == 0)
        try attach(rig)
        for end in [ends[64], ends[1]] { #expect(try rig.tell("pass \(end)") == 1 && !isClosed(rig)) }
        #expect(try rig.tell("pass \(ends[0])") == 1 && isClosed(rig))
    }

    /// As many strangers as the gate keeps in mind are forgotten when they are gone. One more, and it is closed for good.
    @Test(arguments: [128, 129]) func strangers(_ count: Int) throws {
        let rig = try rig()
        let listener = try make("listen", in: rig)
        let ends = try (0..<count).map { _ in try make("connect", in: rig) }
        for end in ends { #expect(try rig.tell("pass \(end)") == 1) }
        #expect(try isClosed(rig))
        for end in ends { #expect(try rig.tell("close \(end)") == 0) }
        #expect(try rig.tell("end \(listener)") == 0)
        try attach(rig)
        #expect(try isClosed(rig) == (count > 128))
        #expect(try rig.connection.gate(becomes: count > 128)?.text.contains("more processes") == (count > 128))
    }

    // MARK: - O_DIRECT by fcntl

    /// The agent looks between the suspicion and the call that it is about, and forgets it: nothing is open for direct I/O yet. After
    /// the call the descriptor is looked at once more.
    @Test func lookedAtBeforeItIsDirect() throws {
        let rig = try rig()
        _ = try rig.tell("io_submit")
        let fd = try make("open \(rig.folder)/patterns", in: rig)
        #expect(try !isClosed(rig))
        _ = try rig.tell("pause \(Step.suspected.rawValue)")
        #expect(try rig.tell("apart setfl \(fd) 1") == 0 && rig.tell("paused") == 1)
        // What the suspicion has woken the agent for comes before the next command.
        #expect(try !isClosed(rig))
        #expect(try rig.tell("go") == 0 && rig.tell("join") == 0)
        #expect(try isClosed(rig))
        #expect(try rig.connection.gate(becomes: true)?.text.contains("O_DIRECT and uses native AIO") == true)

        // Buffered again, and direct again: as often as it likes.
        for _ in 0..<3 {
            #expect(try rig.tell("setfl \(fd) 0") == 0)
            #expect(try rig.connection.gate(becomes: false) != nil && !isClosed(rig))
            #expect(try rig.tell("setfl \(fd) 1") == 0)
            #expect(try isClosed(rig) && rig.connection.gate(becomes: true) != nil)
        }
    }
}
