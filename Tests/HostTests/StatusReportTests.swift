import Glibc
import Host
import Platform
import TestSupport
import Testing

struct StatusReportTests {
    private func page(_ name: String = "demo") -> StatusSnapshot {
        var page = StatusSnapshot()
        page.pid = 4242
        page.name = name
        page.state = .active
        page.ramBytes = 2 << 30
        page.residentBytes = 300 << 20
        page.recycledNowPages = 400_000
        page.recycledTotalPages = 1_000_000
        page.recycledRateMillipages = 2_560_500
        page.cpuNanoseconds = 500_000_000
        page.periodMilliseconds = 10_000
        page.updatedNanoseconds = 99_900_000_000
        page.restarts = 2
        page.merging.state = .active
        page.merging.reason = "only pages of zeros are merged"
        page.merging.sharingPages = 25_600
        page.merging.zeroPages = 12_800
        page.merging.divergedPages = 256
        page.merging.periodMilliseconds = 2000
        page.merging.mappings = 700
        page.merging.mappingLimit = 57_339
        page.merging.groupSharedPages = 10_240
        page.merging.groupSharingPages = 25_600
        page.merging.groupHistogram[0] = 3
        page.merging.groupHistogram[1] = 7
        return page
    }

    @Test func tableIsAligned() {
        let seconds: UInt64 = 1_000_000_000
        let demo = StatusReport(name: "demo", page: page(), started: 0, now: 100 * seconds)
        var sleeping = page()
        sleeping.state = .paused
        sleeping.reason = "migration is running"
        let paused = StatusReport(name: "a-longer-name", page: sleeping, started: 0, now: 100 * seconds)
        let dead = StatusReport(name: "gone", page: page(), started: nil, now: 100 * seconds)
        let fresh = StatusReport(name: "new", page: StatusSnapshot(), started: nil, now: 100 * seconds)
        #expect(
            StatusReport.table([demo, paused, dead, fresh], colours: false) == """
                NAME           STATE      RAM  RESIDENT  RECYCLED  TOTAL   RATE  MERGING  SAVED   CPU  PERIOD   PID
                demo           active    2.0G      300M      1.5G   3.8G  10M/s  active    149M  0.5%     10s  4242
                a-longer-name  paused    2.0G      300M      1.5G   3.8G  10M/s  active    149M  0.5%     10s  4242
                gone           down      2.0G      300M      1.5G   3.8G    0/s  active    149M  0.0%     10s  4242
                new            starting     -         -         -      -      -  -            -     -       -     -

                NAME           SHARING  ZERO  DIVERGED  HASHED  MERGED  FOLDED   MAPPINGS  PERIOD
                demo              100M   50M      1.0M       0     0/s     0/s  700/57339      2s
                a-longer-name     100M   50M      1.0M       0     0/s     0/s  700/57339      2s
                gone              100M   50M      1.0M       0     0/s     0/s  700/57339      2s

                a-longer-name: migration is running
                gone: the backend, process 4242, is dead
                demo: merging: only pages of zeros are merged
                a-longer-name: merging: only pages of zeros are merged
                gone: merging: only pages of zeros are merged
                store: 40M for 100M of guest memory; pages used once 3, 2 to 3 times 7
                """)
        #expect(StatusReport.table([demo], colours: true).contains("\u{1B}[32mactive\u{1B}[0m  2.0G"))
    }

    @Test func poolsAreATableOfTheirOwn() throws {
        var page = page()
        page.merging = MergeSnapshot()
        page.tmem.isPresent = true
        page.tmem.usedBytes = 300_000
        page.tmem.reason = "no room"
        var pool = PoolSnapshot()
        pool.name = "swap"
        pool.isPersistent = true
        pool.pages = 1000
        pool.capacityPages = 262_144
        pool.storedBytes = 1_024_000
        pool.hits = 12
        pool.misses = 3
        pool.putsFailed = 1
        page.tmem.pools = [pool]
        let report = StatusReport(name: "demo", page: page, started: 0, now: 100_000_000_000)
        #expect(
            StatusReport.table([report], colours: false).split(separator: "\n", omittingEmptySubsequences: false).dropFirst(2).joined(separator: "\n") == """

                NAME  POOL  KIND        PAGES  BYTES  LIMIT  STORED  RATIO  HITS  MISSES  EVICTED  FAILED
                demo  swap  persistent   1000   3.9M   1.0G   1000K    4.0    12       3        0       1

                demo: tmem: no room
                """)
        let text = StatusReport.json([report])
        #expect(try StatusReport.parse(json: text) == [report])
        for line in [
            "\"used_bytes\" : 300000", "\"capacity_bytes\" : 1073741824", "\"ratio\" : 4", "\"puts_failed\" : 1",
            "\"kind\" : \"persistent\"", "\"scope\" : \"private\"", "\"cap_bytes\" : 0", "\"reason\" : \"no room\"",
        ] { #expect(text.contains(line), "\(line)") }
    }

    @Test func jsonHasExactNumbersUnderDocumentedNames() throws {
        let report = StatusReport(name: "demo", page: page(), started: 0, now: 100_000_000_000)
        let text = StatusReport.json([report])
        #expect(try StatusReport.parse(json: text) == [report])
        for line in [
            "\"name\" : \"demo\"", "\"state\" : \"active\"", "\"ram_bytes\" : 2147483648", "\"resident_bytes\" : 314572800",
            "\"recycled_pages\" : 400000", "\"recycled_bytes\" : 1638400000", "\"recycled_total_pages\" : 1000000",
            "\"recycled_total_bytes\" : 4096000000", "\"recycled_pages_per_second\" : 2560.5", "\"cpu_percent\" : 0.5",
            "\"cpu_seconds\" : 0.5", "\"uptime_seconds\" : 100", "\"period_ms\" : 10000", "\"pid\" : 4242",
            "\"restarts\" : 2", "\"age_ms\" : 100", "\"free_marked_pages\" : 0", "\"waits\" : 0", "\"refilled_pages\" : 0",
            "\"map_bytes\" : 0", "\"reason\" : \"\"", "\"sharing_pages\" : 25600", "\"zero_pages\" : 12800",
            "\"diverged_pages\" : 256", "\"saved_bytes\" : 156237824", "\"mapping_limit\" : 57339",
        ] { #expect(text.contains(line), "\(line)") }
        #expect(StatusReport.json([]) == jsonText([StatusReport]()))
    }

    @Test func collectsRunningVMs() throws {
        let folder = try TemporaryFolder()
        let directory = RuntimeDirectory(base: folder.path)
        let one = try directory.claim("one")
        let two = try directory.claim("two")
        let writer = try StatusPage.Writer(path: one.statusPath, name: "one", pid: ProcessCalls.ownPID)
        writer.setState(.active, reason: "")
        _ = try StatusPage.Writer(path: two.statusPath, name: "two", pid: 2_147_483_647)
        let three = try directory.claim("three")
        let reports = try StatusReport.collect([], in: directory)
        #expect(reports.map(\.name) == ["one", "three", "two"])
        #expect(reports.map(\.state) == [.active, .starting, .down])
        #expect(reports[0].uptimeSeconds > 0)
        #expect(try StatusReport.collect(["two"], in: directory).map(\.name) == ["two"])
        #expect(
            message { try StatusReport.collect(["four"], in: directory) }
                == "no VM 'four' is running: quire status lists those that are")
        _ = try folder.write("three/status", "?")
        let broken = try StatusReport.collect(["three"], in: directory)
        #expect(broken.map(\.state) == [.unknown])
        #expect(broken[0].reason == "\(folder.path)/three/status is no status page: it has less than 4096 bytes")
        one.remove()
        two.remove()
        three.remove()
    }

    /// The backend's page says since when it runs, and an older backend's does not. Whether it runs, no page says.
    @Test func uptimeIsThePagesWhereItSaysSo() throws {
        let folder = try TemporaryFolder()
        let directory = RuntimeDirectory(base: folder.path)
        let claim = try directory.claim("one")
        var backend = try ChildProcess(["sleep", "60"])
        let writer = try StatusPage.Writer(path: claim.statusPath, name: "one", pid: backend.pid)
        writer.setState(.active, reason: "")
        let page = try Mapping(Descriptor.open(claim.statusPath, O_RDWR), byteCount: StatusPage.byteCount)
        let started = try #require(ProcessCalls.startTime(of: backend.pid))
        func runs(since started: UInt64) -> Bool {
            let before = monotonicNanoseconds()
            let report = StatusReport.read("one", in: directory)
            let after = monotonicNanoseconds()
            return report.state == .active
                && (Double(before - started) / 1e9...Double(after - started) / 1e9).contains(report.uptimeSeconds)
        }
        #expect(runs(since: started))
        page.store64(3728, 1)
        #expect(runs(since: 1) && !runs(since: started))
        page.store64(3728, 0)
        #expect(runs(since: started))
        backend.signal(SIGKILL)
        backend.wait()
        for value in [0, started] {
            page.store64(3728, value)
            #expect(StatusReport.read("one", in: directory).state == .down)
        }
        claim.remove()
    }

    /// So many that every CPU takes parts: nothing is lost at the seams, and what is wrong with some stays with them.
    @Test func collectsManyVMs() throws {
        let folder = try TemporaryFolder()
        // What dead owners have left behind, more than a part of it.
        for number in 0..<20 { try Files.makeDirectory(folder.path + "/left-\(number)", mode: 0o700) }
        #expect(try StatusReport.json([], in: RuntimeDirectory(base: folder.path)) == jsonText([StatusReport]()))
        let vms = try SyntheticVMs(131, base: folder.path)
        for name in ["vm-001", "vm-090"] { _ = try folder.write(name + "/status", "?") }
        let reports = try StatusReport.collect([], in: vms.directory)
        #expect(reports.map(\.name) == vms.names)
        #expect(reports.filter { $0.state == .unknown }.map(\.name) == ["vm-001", "vm-090"])
        for (index, report) in reports.enumerated() where report.state != .unknown {
            #expect(report.recycledPages == 10_000 + UInt64(index + 1) * 3 && report.tmem.pools.count == reports[0].tmem.pools.count)
        }
        for count in [0, 1, 15, 16, 17, 32, 131] {
            let names = Array(vms.names.prefix(count))
            let text = try StatusReport.json(names, in: vms.directory)
            let parsed = try StatusReport.parse(json: text)
            // None named: all of them.
            #expect(parsed.map(\.name) == (count == 0 ? vms.names : names))
            #expect(jsonText(parsed) == text)
        }
        #expect(
            message { try StatusReport.json(["vm-000", "none"], in: vms.directory) }
                == "no VM 'none' is running: quire status lists those that are")
    }
}
