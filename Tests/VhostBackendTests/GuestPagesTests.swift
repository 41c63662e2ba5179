import GuestMemory
import Platform
import Testing
import VhostBackend

/// Notes which memory it is told of; all of it is in the files.
private final class NotingPages: GuestPages {
    private let tables = Monitor<[[Range<GFN>]]>([])
    /// As the link to an agent keeps it.
    private let kept = Monitor<GuestMemory?>(nil)
    var told: [[Range<GFN>]] { tables.read { $0 } }

    let lockPages: UInt64 = 512
    func use(_ memory: GuestMemory) {
        tables.update { $0.append(memory.regions.map(\.gfns)) }
        kept.update { $0 = memory }
    }
    func beginAccess(_ gfns: Range<GFN>) {}
    func endAccess(_ gfns: Range<GFN>) {}
    func alike(_ gfns: Range<GFN>) -> (count: Int, isMerged: Bool) { (gfns.count, false) }
    func noteWritten(_ gfns: Range<GFN>) {}
    func frontEnd() throws(QuireError) -> ProcessMemory { throw QuireError(.closed, "there is none") }
    func keepPrivate(_ gfns: [Range<GFN>]) -> PageHold { PageHold {} }
}

/// Who knows where pages are has to know where guest memory is.
@Suite struct GuestPagesTests {
    @Test(arguments: [FrontEnd.Dialect.qemu10, .qemu7]) func everyChangeOfMemoryIsTold(_ dialect: FrontEnd.Dialect) throws {
        let pages = NotingPages()
        let server = try TestServer(
            VirtioBlock(storage: MemoryStorage(), queueCount: 1, logger: TestServer.quiet), pages: pages)
        let frontEnd = try server.connect()
        defer { frontEnd.disconnect() }
        try frontEnd.handshake(dialect)
        let ram = try GuestRAM()
        try frontEnd.sendMemory(ram)
        let all = try #require(pages.told.last)
        #expect(all.count == ram.regions.count)
        guard dialect.usesSlots else { return }
        try frontEnd.tell(FrontEnd.Request.removeRegion, try #require(ram.regions.last).single)
        #expect(pages.told.last == Array(all.dropLast()))
    }

    /// A connection that we end is over for the front end, too, whoever goes on with its memory: it would wait for an answer.
    @Test func whoKeepsTheMemoryKeepsNoConnection() throws {
        let pages = NotingPages()
        let server = try TestServer(
            VirtioBlock(storage: MemoryStorage(), queueCount: 1, logger: TestServer.quiet), pages: pages)
        let frontEnd = try server.connect()
        defer { frontEnd.disconnect() }
        try frontEnd.handshake(.qemu7)
        try frontEnd.sendMemory(try GuestRAM())
        #expect(!pages.told.isEmpty && !frontEnd.isClosed(withinMilliseconds: 50))
        try frontEnd.sendRaw([UInt8](repeating: 0xff, count: 64))
        #expect(frontEnd.isClosed())
    }
}
