import Glibc
import Host
import Metrics
import Platform
import StoreProtocol
import TestSupport
import Testing

/// The exporter as it is run, over real sockets.
@Suite(.serialized) struct ExporterTests {
    private let folder: Folder
    private let vms: SyntheticVMs

    init() throws {
        folder = try Folder()
        vms = try SyntheticVMs(23, base: folder.path + "/run")
    }

    private func exporter(_ more: [String] = [], store: String = "/nonexistent/store.sock") throws -> Exporter {
        try Exporter([vms.directory.base], store: store, more)
    }

    private func status() throws -> [StatusReport] {
        let (status, text) = try command([products + "quire", "status", "--json"], ["QUIRE_RUNTIME_DIR": vms.directory.base])
        guard status == 0 else { throw Trouble(text) }
        return try StatusReport.parse(json: text)
    }

    @Test func metricsEqualQuireStatus() throws {
        let exporter = try exporter()
        let found = samples(try exporter.get("/metrics").body)
        let reports = try status()
        #expect(reports.count == 23)
        let uid = ProcessCalls.ownUID
        for report in reports {
            let labels = "{vm=\"\(report.name)\",uid=\"\(uid)\"}"
            let merging = report.merging
            let whole: [(String, UInt64)] = [
                ("memory_bytes", report.ramBytes), ("memory_resident_bytes", report.residentBytes),
                ("recycled_bytes", report.recycledBytes), ("recycled_bytes_total", report.recycledTotalBytes),
                ("free_marked_bytes", report.freeMarkedPages * 4096), ("refilled_bytes_total", report.refilledPages * 4096),
                ("allocation_waits_total", report.waits), ("merged_saved_bytes", merging.savedBytes),
                ("pages_sharing", merging.sharingPages), ("pages_zero", merging.zeroPages),
                ("pages_diverged", merging.divergedPages), ("pages_hashed_total", merging.hashedTotalPages),
                ("pages_merged_total", merging.mergedTotalPages), ("pages_folded_total", merging.foldedTotalPages),
                ("mappings", merging.mappings), ("mappings_limit", merging.mappingLimit),
                ("backend_restarts_total", report.restarts), ("metadata_bytes", report.mapBytes),
                ("recycling", report.state == .active ? 1 : 0), ("merging", merging.state == .active ? 1 : 0), ("up", 1),
            ]
            for (name, value) in whole {
                let sample = found["quire_vm_\(name)\(labels)"]
                #expect(sample.flatMap { UInt64($0) } == value, "\(name) of \(report.name)")
            }
            #expect(found["quire_vm_backend_cpu_seconds_total\(labels)"].flatMap { Double($0) } == report.cpuSeconds)
            #expect(found["quire_vm_recycle_period_seconds\(labels)"] == "10.0")
        }
        #expect(found["quire_vms"] == "23" && found["quire_store_up"] == "0")
        #expect(
            found["quire_vm_info{vm=\"vm-009\",uid=\"\(uid)\",state=\"paused\",merging=\"active\"}"] == "1")
    }

    @Test func aVMThatChangesIsSeen() throws {
        let exporter = try exporter()
        let key = "quire_vm_recycled_bytes{vm=\"vm-003\",uid=\"\(ProcessCalls.ownUID)\"}"
        let before = try #require(samples(exporter.get("/metrics").body)[key].flatMap { UInt64($0) })
        try SyntheticVMs.write(3, "vm-003", vms.directory.statusPath("vm-003"), step: 77)
        #expect(try eventually { samples(try exporter.get("/metrics").body)[key] == "\(before + 77 * 4096)" })
    }

    @Test func promtoolFindsNothing() throws {
        let quired = try Quired(["--shared-disk", "scratch,size=64M"])
        let store = try SyntheticStoreVMs(["a", "b"], path: quired.path)
        let exporter = try exporter(store: quired.path)
        let text = try exporter.get("/metrics").body
        let file = try folder.write("metrics", text)
        let (status, output) = try command(["sh", "-c", "\(promtool) check metrics <\(file)"])
        #expect(status == 0 && output == "", "\(output)")
        // The control: a metric that breaks the rules is found.
        let bad = try folder.write("bad", text + "# TYPE quire_wrong counter\nquire_wrong 1\n")
        #expect(try command(["sh", "-c", "\(promtool) check metrics <\(bad)"]).status != 0)
        withExtendedLifetime(store) {}
    }

    @Test func storeAndGroups() throws {
        let uid = ProcessCalls.ownUID
        let quired = try Quired(["--group", "web=\(uid)"])
        let own = try SyntheticStoreVMs(["a", "b", "c"], path: quired.path)
        let web = try SyntheticStoreVMs(["d"], group: "web", path: quired.path)
        let exporter = try exporter(store: quired.path)
        let found = samples(try exporter.get("/metrics").body)
        let figures = try quired.figures()
        #expect(found["quire_store_up"] == "1" && found["quire_store_vms"] == "4")
        #expect(found["quire_store_pages_limit"] == "\(figures.limitPages)" && figures.limitPages == 65_536)
        #expect(found["quire_store_lacking_bytes"] == "0" && figures.lackingBytes == 0)
        #expect(found["quire_store_ledger_bytes"] == "\(figures.ledgerBytes)")
        #expect(found["quire_group_vms{group=\"owner-\(uid)\",node=\"0\"}"] == "3")
        #expect(found["quire_group_vms{group=\"web\",node=\"0\"}"] == "1")
        let groups = try exporter.get("/api/v1/groups").body
        #expect(groups.contains("\"name\":\"web\"") && groups.contains("\"name\":\"owner-\(uid)\""))
        withExtendedLifetime((own, web)) {}
    }

    /// The exporter, its API, `quire status --json` and `quire tmem list --json` say the same of a shared disk.
    @Test func sharedDisks() throws {
        let quired = try Quired(["--shared-disk", "scratch,size=64M"])
        let disk = SharedDiskClient(
            path: SharedDiskClient.path(besideStore: quired.path), SharedDiskMessage.Hello(name: "scratch", group: "", token: 1, vm: "web1"))
        let content = String(try disk.attach(patienceMilliseconds: 10_000).id, radix: 16)
        try disk.put(3, [UInt8](repeating: 7, count: 2 * 4096))
        _ = try disk.get(3, count: 1)
        let exporter = try exporter(store: quired.path)
        let found = samples(try exporter.get("/metrics").body)
        func value(_ name: String) -> String? {
            found["quire_shared_disk_\(name){disk=\"scratch\",group=\"owner-\(ProcessCalls.ownUID)\"}"]
        }
        #expect(value("vms") == "1" && value("size_bytes") == "67108864" && value("bytes") == "8192")
        #expect(value("puts_total") == "2" && value("hits_total") == "1" && value("puts_failed_total") == "0" && value("limit_bytes") == "0")
        #expect(try exporter.get("/api/v1/shared-disks").body
            .contains("\"attached\":[\"web1\"],\"content\":\"\(content)\",\"disk\":\"scratch\""))
        let variables = ["QUIRE_RUNTIME_DIR": vms.directory.base, "QUIRED_DIRECTORY": quired.folder.path]
        let (status, text) = try command([products + "quire", "status", "--json"], variables)
        #expect(status == 0 && text.contains("\"name\" : \"shared:scratch\"") && text.contains("\"web1\""), "\(text.suffix(2000))")
        #expect(try StatusReport.parse(json: text).count == 23)
        withExtendedLifetime(disk) {}
    }

    /// More groups than fit into one message.
    @Test(.enabled(if: ProcessCalls.isRoot)) func manyGroups() throws {
        let names = (0..<300).map { "group-\($0)" }
        let quired = try Quired(names.flatMap { ["--group", "\($0)=1"] })
        var members: [SyntheticStoreVMs] = []
        for name in names { members.append(try SyntheticStoreVMs(["vm"], group: name, path: quired.path)) }
        var observer = StoreObserver(path: quired.path)
        #expect(try observer.groups().map(\.name) == names.sorted { $0 + " 0" < $1 + " 0" })
        #expect(try observer.figures().machines == 300)
        withExtendedLifetime(members) {}
    }

    /// A quired that hangs costs its own figures, and they come back.
    @Test func aStoppedQuiredStopsNobody() throws {
        let quired = try Quired()
        let exporter = try exporter(store: quired.path)
        #expect(samples(try exporter.get("/metrics").body)["quire_store_up"] == "1")
        quired.signal(SIGSTOP)
        for _ in 0..<3 {
            let found = samples(try exporter.get("/metrics").body)
            #expect(found["quire_vms"] == "23")
            if found["quire_store_up"] == "0" { continue }
            // The findings of half a second ago.
            #expect(try eventually(milliseconds: 5000) { samples(try exporter.get("/metrics").body)["quire_store_up"] == "0" })
        }
        let host = try exporter.get("/api/v1/host").body
        #expect(host.contains("\"store\":null") && host.contains("quired did not answer for 2000 ms"))
        quired.signal(SIGCONT)
        #expect(try eventually { samples(try exporter.get("/metrics").body)["quire_store_up"] == "1" })
    }

    @Test func answersConformToOpenAPI() throws {
        let quired = try Quired(["--shared-disk", "scratch,size=64M"])
        let store = try SyntheticStoreVMs(["a"], path: quired.path)
        let token = "correct-horse-battery-staple"
        let exporter = try exporter(["--http-token-file", folder.write("token", token + "\n")], store: quired.path)
        let served = try exporter.get("/api/v1/openapi.json").body
        #expect(served == (try Files.read(top + "/docs/openapi.json")))
        let uid = ProcessCalls.ownUID
        let check = ["/usr/bin/python3", top + "/Tests/MetricsTests/openapi-check", exporter.url, token, "\(uid)", "vm-009"]
        let (status, text) = try command(check)
        #expect(status == 0, "\(text)")
        // The control: it finds what does not conform.
        let spoiled = try command(check + ["--control"])
        #expect(spoiled.status == 1 && spoiled.text.contains("was unexpected") && spoiled.text.contains("documents ['200', '400', '401', '413'"), "\(spoiled)")
        withExtendedLifetime(store) {}
    }

    /// Two users may have VMs of the same name.
    @Test(.enabled(if: ProcessCalls.isRoot)) func VMsOfSeveralUsers() throws {
        let users = folder.path + "/users"
        try Files.makeDirectory(users, mode: 0o755)
        var all: [SyntheticVMs] = []
        for uid in [1000, 1001] as [UInt32] {
            try Files.makeDirectory("\(users)/\(uid)", mode: 0o755)
            all.append(try SyntheticVMs(2, base: "\(users)/\(uid)/quire"))
            #expect(unsafe chown("\(users)/\(uid)/quire", uid, uid) == 0)
        }
        // Somebody leads elsewhere: to root's.
        try Files.makeDirectory("\(users)/1002", mode: 0o755)
        #expect(unsafe symlink(vms.directory.base, "\(users)/1002/quire") == 0)
        let (found, unreadable) = RuntimeDirectories([], users: users).read()
        #expect(
            found.map { "\($0.uid) \($0.report.name)" } == ["1000 vm-000", "1001 vm-000", "1000 vm-001", "1001 vm-001"])
        #expect(unreadable == 1)
        withExtendedLifetime(all) {}
    }

    /// What users put into their own folders neither stops nor ends whoever reads it.
    @Test func hostileFiles() throws {
        let base = folder.path + "/hostile"
        let hostile = try SyntheticVMs(4, base: base)
        let directory = hostile.directory
        func replace(_ name: String, _ make: (String) -> Int32) {
            let path = directory.statusPath(name)
            Files.remove(path)
            #expect(make(path) == 0)
        }
        replace("vm-000") { unsafe mkfifo($0, 0o600) }
        replace("vm-001") { unsafe symlink("/etc/passwd", $0) }
        let short = try Descriptor.open(directory.statusPath("vm-002"), O_RDWR)
        try short.truncate(to: 100)
        let (found, _) = RuntimeDirectories([base]).read()
        #expect(found.map(\.report.state) == [.unknown, .unknown, .unknown, .active])
        // A page that shrinks while it is read, again and again.
        let page = directory.statusPath("vm-003")
        let shrinking = try Running(
            ["sh", "-c", "cp '\(page)' '\(base)/copy'; while :; do truncate -s 0 '\(page)'; cat '\(base)/copy' >'\(page)'; done"],
            log: folder.path + "/shrinking")
        for _ in 0..<2000 { _ = RuntimeDirectories([base]).read() }
        shrinking.end()
        Files.remove(base + "/copy")
    }

    /// Numbers that no backend writes, from a page that anybody may write: nobody who looks at it dies of them.
    @Test func absurdNumbers() throws {
        let base = folder.path + "/absurd"
        let absurd = try SyntheticVMs(1, base: base)
        let writer = try StatusPage.Writer(path: absurd.directory.statusPath("vm-000"), name: "vm-000", pid: ProcessCalls.ownPID)
        for number: UInt64 in [.max, .max / 2, 1 << 54, 1] {
            writer.setRAM(bytes: number, resident: number)
            writer.setRecycled(now: number, total: number, rateMillipages: number)
            writer.setGuest(freeMarkedPages: number, waits: number, refilledPages: number)
            writer.setCosts(cpuNanoseconds: number, mapBytes: number)
            var merging = MergeSnapshot()
            merging.state = .active
            (merging.sharingPages, merging.zeroPages, merging.divergedPages) = (number, number, 1)
            (merging.hashedTotalPages, merging.mergedTotalPages, merging.foldedTotalPages) = (number, number, number)
            (merging.mergedRateMillipages, merging.foldedRateMillipages) = (number, number)
            (merging.mappings, merging.mappingLimit) = (number, number)
            (merging.groupSharedPages, merging.groupSharingPages, merging.groupSavedBytes) = (number, number, number)
            merging.groupHistogram = merging.groupHistogram.map { _ in number }
            writer.setMerging(merging)
            var tmem = TmemSnapshot()
            tmem.isPresent = true
            (tmem.usedBytes, tmem.metadataBytes, tmem.capBytes) = (number, number, number)
            var pool = PoolSnapshot()
            pool.name = "swap"
            (pool.pages, pool.storedBytes, pool.puts, pool.hits) = (number, 1, number, number)
            tmem.pools = [pool]
            writer.setTmem(tmem)
            writer.setUpdated(nanoseconds: number)
            let host = HostSnapshot.read(RuntimeDirectories([base]))
            #expect(host.vms.map(\.report.name) == ["vm-000"])
            #expect(StatusReport.table(host.vms.map(\.report), colours: false).contains("vm-000"))
            #expect(try StatusReport.parse(json: StatusReport.json(host.vms.map(\.report))).map(\.name) == ["vm-000"])
            #expect(Exposition.text(host).contains("vm-000"))
            var screen = TopScreen(intervalMilliseconds: 1000, hasBlocks: true)
            for _ in 0..<2 { screen.show(host) }
            #expect(screen.lines(size: nil, colours: false).contains { $0.contains("vm-000") })
        }
    }

    @Test func oneClearLineForWrongOptions() throws {
        func line(_ options: String...) throws -> String {
            try command([products + "quire-exporter"] + options).text
        }
        let token = try folder.write("token", "short\n")
        #expect(
            try line("--http", "0.0.0.0:0", "--http-socket", "off")
                == "quire-exporter: --http 0.0.0.0:0 is not loopback: give --http-token-file, so that not everybody can read it\n")
        #expect(
            try line("--http", "nowhere") == "quire-exporter: --http nowhere: give ADDRESS:PORT, such as 127.0.0.1:9750, or off\n")
        #expect(
            try line("--http", "example.org:80")
                == "quire-exporter: --http example.org:80: 'example.org' is no address, give one in figures such as 127.0.0.1:9750\n")
        #expect(
            try line("--http", "off", "--http-socket", "off")
                == "quire-exporter: there is nothing to listen on: --http and --http-socket are both off\n")
        #expect(try line("--http-token-file", token).hasPrefix("quire-exporter: \(token) holds no token: "))
        #expect(
            try line("--http-token-file", "/nonexistent") == "quire-exporter: cannot open /nonexistent: No such file or directory\n")
        let exporter = try exporter()
        #expect(
            try line("--http", "127.0.0.1:\(exporter.port)", "--http-socket", "off", "--runtime-directory", folder.path)
                == "quire-exporter: cannot listen on 127.0.0.1:\(exporter.port): Address already in use\n")
        #expect(
            try line("--http", "off", "--http-socket", exporter.socket, "--runtime-directory", folder.path)
                == "quire-exporter: \(exporter.socket) is in use by a running process: stop it or choose another path\n")
        #expect(exporter.end() == .exited(0))
        #expect(Files.identity(of: exporter.socket) == nil)
    }
}
