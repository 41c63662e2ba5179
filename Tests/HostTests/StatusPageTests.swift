import CQuireLayout
import Glibc
import Host
import Platform
import Testing

struct StatusPageTests {
    @Test func carriesEveryField() throws {
        let folder = try TemporaryFolder()
        let path = folder.path + "/status"
        let writer = try StatusPage.Writer(path: path, name: "vm", pid: 77)
        writer.setRAM(bytes: 1, resident: 2)
        writer.setRecycled(now: 3, total: 4, rateMillipages: 5)
        writer.setGuest(freeMarkedPages: 6, waits: 7, refilledPages: 8)
        writer.setState(.refused, reason: "grund")
        writer.setPeriod(milliseconds: 9)
        writer.setCosts(cpuNanoseconds: 10, mapBytes: 11)
        writer.setUpdated(nanoseconds: 12)
        var merging = MergeSnapshot()
        merging.state = .paused
        merging.reason = "tor"
        merging.periodMilliseconds = 13
        merging.sharingPages = 14
        merging.groupSavedBytes = 15
        merging.groupHistogram = (0..<32).map { 100 + $0 }
        writer.setMerging(merging)
        writer.beat()
        writer.beat()
        var expected = StatusSnapshot()
        expected.merging = merging
        expected.pid = 77
        expected.heartbeat = 2
        expected.ramBytes = 1
        expected.residentBytes = 2
        expected.recycledNowPages = 3
        expected.recycledTotalPages = 4
        expected.recycledRateMillipages = 5
        expected.freeMarkedPages = 6
        expected.waits = 7
        expected.refilledPages = 8
        expected.state = .refused
        expected.reason = "grund"
        expected.periodMilliseconds = 9
        expected.cpuNanoseconds = 10
        expected.mapBytes = 11
        expected.updatedNanoseconds = 12
        expected.name = "vm"
        #expect(try StatusPage.Reader(path: path).snapshot() == expected)
        // Against the header's documented offsets, not our own constants.
        let raw = try Mapping(Descriptor.open(path, O_RDONLY), byteCount: 4096, access: .readOnly)
        #expect(raw.copyOut(0, count: 8) == Array("QUIREVMS".utf8))
        #expect(raw.load32(8) == 2 && raw.load32(12) == 77 && raw.load64(16) == 2)
        #expect(raw.load64(56) == 5 && raw.load32(96) == 3 && raw.load64(112) == 12)
        #expect(raw.loadText(128, capacity: 256) == "grund" && raw.loadText(384, capacity: 128) == "vm")
    }

    @Test func aNewBackendStartsAtZeroButRestartsStay() throws {
        let folder = try TemporaryFolder()
        let path = folder.path + "/status"
        let supervisor = try StatusPage.Supervisor(path: path)
        let first = try StatusPage.Writer(path: path, name: "vm", pid: 1)
        first.beat()
        first.setRecycled(now: 1, total: 1, rateMillipages: 1)
        let reader = try StatusPage.Reader(path: path)
        #expect(reader.snapshot().pid == 1 && reader.snapshot().heartbeat == 1)
        supervisor.countRestart()
        let second = try StatusPage.Writer(path: path, name: "vm", pid: 2)
        #expect(reader.snapshot().pid == 2 && reader.snapshot().heartbeat == 0)
        second.beat()
        #expect(reader.snapshot().heartbeat == 1 && reader.snapshot().recycledTotalPages == 0)
        #expect(supervisor.restarts == 1)
    }

    @Test func refusesWhatIsNoPage() throws {
        let folder = try TemporaryFolder()
        let short = try folder.write("short", "x")
        #expect(message { try StatusPage.Reader(path: short) } == "\(short) is no status page: it has less than 4096 bytes")
        let empty = folder.path + "/empty"
        _ = try StatusPage.Supervisor(path: empty)
        #expect(message { try StatusPage.Reader(path: empty) } == "\(empty): no backend has written its status yet")
        let wrong = try folder.write("wrong", String(repeating: "x", count: 4096))
        #expect(message { try StatusPage.Reader(path: wrong) } == "\(wrong) is no status page: wrong magic")
        let newer = try folder.write("newer", "QUIREVMS\u{3}\0\0\0" + String(repeating: "\0", count: 4084))
        #expect(
            message { try StatusPage.Reader(path: newer) }
                == "\(newer) has version 3, this quire reads version 2: use the quire that started the VM")
        #expect(message { try StatusPage.Reader(path: folder.path + "/none") } == "cannot open \(folder.path)/none: No such file or directory")
    }
}
