import CQuireLayout
import Glibc
import Host
import Platform
import Testing

struct StatusPageTests {
    @Test func carriesEveryField() throws {
        let folder = try TemporaryFolder()
        let path = folder.path + "/status"
        let pid = ProcessCalls.ownPID
        let writer = try StatusPage.Writer(path: path, name: "vm", pid: pid)
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
        var tmem = TmemSnapshot()
        tmem.isPresent = true
        tmem.isFrozen = true
        tmem.usedBytes = 16
        tmem.metadataBytes = 17
        tmem.capBytes = 18
        tmem.reason = "voll"
        for number in 0..<UInt64(StatusPage.maxPools) {
            var pool = PoolSnapshot()
            pool.name = number == 0 ? String(repeating: "n", count: 63) : "pool\(number)"
            pool.isPersistent = number % 2 == 0
            pool.isShared = number % 3 == 0
            pool.pages = 1000 * number + 1
            pool.capacityPages = 1000 * number + 2
            pool.storedBytes = 1000 * number + 3
            pool.puts = 1000 * number + 4
            pool.putsFailed = 1000 * number + 5
            pool.hits = 1000 * number + 6
            pool.misses = 1000 * number + 7
            pool.flushes = 1000 * number + 8
            pool.evictions = 1000 * number + 9
            tmem.pools.append(pool)
        }
        writer.setTmem(tmem)
        writer.beat()
        writer.beat()
        var expected = StatusSnapshot()
        expected.merging = merging
        expected.tmem = tmem
        expected.pid = pid
        expected.startedNanoseconds = try #require(ProcessCalls.startTime(of: pid))
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
        #expect(raw.load32(8) == 3 && raw.load32(12) == UInt32(pid) && raw.load64(16) == 2)
        #expect(raw.load64(56) == 5 && raw.load32(96) == 3 && raw.load64(112) == 12)
        #expect(raw.load32(1136) == 3 && raw.load32(1140) == 16 && raw.load64(1160) == 18 && raw.load64(1168 + 144 + 72) == 1001)
        #expect(raw.loadText(1168 + 144, capacity: 64) == "pool1" && raw.loadText(3472, capacity: 256) == "voll")
        #expect(raw.load64(3728) == expected.startedNanoseconds && raw.load64(3728) > 0)
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
        let newer = try folder.write("newer", "QUIREVMS\u{4}\0\0\0" + String(repeating: "\0", count: 4084))
        #expect(
            message { try StatusPage.Reader(path: newer) }
                == "\(newer) has version 4, this quire reads version 3: use the quire that started the VM")
        #expect(message { try StatusPage.Reader(path: folder.path + "/none") } == "cannot open \(folder.path)/none: No such file or directory")
    }
}
