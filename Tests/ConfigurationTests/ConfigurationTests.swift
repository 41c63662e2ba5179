import Configuration
import Glibc
import Host
import Platform
import TestSupport
import Testing

/// A text as if it were the file.
private func file(_ text: String) -> ConfigurationFile { ConfigurationFile(path: "quire.toml", text: text) }
private func findings(_ text: String) -> [String] { file(text).findings.map { file(text).describe($0) } }

/// The one-line message that `body` fails with; nil if it does not fail.
private func message<R>(_ body: () throws -> R) -> String? {
    do {
        _ = try body()
        return nil
    } catch {
        return "\(error)"
    }
}

private let sections: [(title: String, scope: Scope)] = [
    ("quired", .quired), ("backend", .backend), ("vm.web1", .vm("web1")), ("exporter", .exporter),
]

struct SchemaTests {
    /// Of every key: what is allowed at the ends, as TOML writes it, and what is not.
    private static let cases: [String: (good: [String], bad: [String])] = [
        "limit": (["4096", "\"4K\"", "\"1.5G\"", "\"8191G\""], ["4095", "-1", "\"0\"", "\"9T\"", "\"much\"", "true", "[]"]),
        "reserve": (["0", "30", "100000"], ["-1", "100001", "\"30\"", "1.5"]),
        "candidates": (["4096", "\"32M\""], ["1", "\"2T\"", "\"x\""]),
        "quired.group": (
            ["[]", "[\"a=0\"]", "[\"web=1000,1001\", \"b=4294967295\"]"],
            ["\"a=1\"", "[\"a\"]", "[\"a=\"]", "[\"a=x\"]", "[\"a=1,,2\"]", "[\"owner-1=1\"]", "[\".a=1\"]", "[\"a=4294967296\"]", "[1]"]
        ),
        "quired.shared-disk": (
            ["[\"a,size=1M\"]", "[\"a,size=1G,group=lab\"]", "[\"a,size=1023G\"]"],
            ["[\"a\"]", "[\"a,size=1\"]", "[\"a,size=9P\"]", "[\"a,size=1T\"]", "[\"a,size=1M,size=1M\"]", "[\"a,size=1M,x=1\"]", "[\"a b,size=1M\"]", "\"a,size=1M\""]
        ),
        "quired.workers": (["1", "64"], ["0", "65", "\"4\""]),
        "log-level": (["\"trace\"", "\"critical\""], ["\"loud\"", "3"]),
        "period": (["\"100ms\"", "\"10s\"", "10", "\"1h\""], ["\"99ms\"", "\"61m\"", "\"soon\"", "0", "-1", "1.5", "true"]),
        "workers": (["1", "16"], ["0", "17", "\"1\""]),
        "merge": (["true", "false"], ["\"true\"", "1"]),
        "merge-period": (["\"100ms\"", "\"1h\""], ["\"99ms\"", "\"2h\""]),
        "merge-workers": (["1", "16"], ["0", "17"]),
        "write-tracking": (["true", "false"], ["\"no\""]),
        "group": (["\"\"", "\"web\""], ["\"a b\"", "[]", "1"]),
        "store": (["\"/run/quired/store.sock\""], ["\"store.sock\"", "\"\"", "1"]),
        "swap": (["\"1M\"", "\"8T\"", "1048576"], ["\"1K\"", "\"9T\"", "1048577", "true"]),
        "swap-overcommit": (["1", "1.5", "100"], ["0.5", "101", "\"2\"", "nan"]),
        "swap-compression": (["\"lz4\"", "\"zstd\"", "\"zstd:1\"", "\"zstd:19\""], ["\"zstd:0\"", "\"zstd:20\"", "\"gzip\"", "1"]),
        "tmem-cap": (["4096", "\"16G\"", "\"8T\""], ["0", "-1", "\"9T\"", "\"much\"", "true"]),
        "tmem-reserve": (["0", "4096", "\"256M\"", "\"8T\""], ["-1", "\"9T\"", "\"much\"", "true"]),
        "swap-queues": (["1", "16"], ["0", "17"]),
        "shared-disk": (["[]", "[\"a\"]", "[\"a\", \"b,size=1G\"]"], ["[\"a,group=b\"]", "\"a\"", "[\"a,size=x\"]"]),
        "http": (["\"127.0.0.1:9750\"", "\"[::1]:1\"", "\"off\""], ["\"nowhere\"", "9750"]),
        "http-socket": (["\"off\"", "\"/run/x\""], ["\"x\"", "false"]),
        "http-token-file": (["\"/etc/quire/token\""], ["\"token\""]),
        "http-host": (["[]", "[\"a.example\"]"], ["\"a\"", "[\"\"]", "[1]"]),
        "http-timeout": (["\"100ms\"", "\"10m\""], ["\"11m\"", "\"1ms\""]),
        "history-interval": (["\"100ms\"", "\"10m\""], ["\"11m\"", "\"1ms\""]),
        "runtime-directory": (["[\"/run/quire\"]"], ["[\"run\"]", "\"/run/quire\""]),
    ]

    @Test func everyKeyTakesWhatIsAllowedAndNothingElse() {
        for (title, scope) in sections {
            for key in scope.keys {
                guard let (good, bad) = Self.cases["\(title).\(key.name)"] ?? Self.cases[key.name] else {
                    Issue.record("no case for \(title).\(key.name)")
                    continue
                }
                for value in good {
                    #expect(findings("[\(title)]\n\(key.name) = \(value)\n") == [], "\(title).\(key.name) = \(value)")
                }
                for value in bad {
                    let said = findings("# first\n[\(title)]\n\n\(key.name) = \(value)\n")
                    #expect(
                        said.count == 1 && said[0].hasPrefix("quire.toml:4: \(title).\(key.name): ")
                            && said[0].hasSuffix(" is not allowed: give \(key.allowed)"), "\(value): \(said)")
                }
            }
        }
    }

    /// What the file says and what a command line says is read alike.
    @Test func valuesAreWhatTheyMean() throws {
        let quired = try file(
            """
            [quired]
            limit = "1.5G"
            group = ["web=1000,1001"]
            shared-disk = ["scratch,size=1G,group=web"]
            """
        ).resolve(.quired, [Keys.Quired.reserve.name: .argument("30")])
        #expect(quired[Keys.Quired.limit] == 3 << 29)
        #expect(quired[Keys.Quired.group]?.map(\.name) == ["web"] && quired[Keys.Quired.group]?.first?.users == [1000, 1001])
        #expect(quired[Keys.Quired.sharedDisk]?.first?.byteCount == 1 << 30 && quired[Keys.Quired.sharedDisk]?.first?.group == "web")
        #expect(quired.value(Keys.Quired.reserve) == 30)
        #expect(quired[Keys.Quired.candidates] == nil && quired[Keys.Quired.workers] == nil)
        let vm = try file("[backend]\nperiod = 2\nswap-overcommit = 2\nmerge = false").resolve(.vm("a"), [Keys.Backend.mergePeriod.name: .argument("250ms")])
        #expect(vm.value(Keys.Backend.period) == 2000 && vm.value(Keys.Backend.mergePeriod) == 250)
        #expect(vm[Keys.Backend.swapOvercommit] == 2 && vm.value(Keys.Backend.merge) == false && vm.value(Keys.Backend.writeTracking))
    }

    @Test func badOptionsSayWhatIsAllowed() throws {
        #expect(
            message { try file("").resolve(.backend, ["period": .argument("soon")]) }
                == "--period soon: give a time from 100ms to 1h, such as \"10s\"")
        #expect(message { try file("").resolve(.quired, ["group": .list([.argument("a=1"), .argument("b")])]) }?.hasPrefix("--group a=1 b: give ") == true)
        #expect(message { try Keys.Backend.workers.argument("0") } == "give a whole number from 1 to 16")
    }
}

struct ConfigurationFileTests {
    @Test func everythingThatIsWrongIsFoundWithItsLine() {
        #expect(
            findings(
                """
                [backend]
                perod = "1s"
                workers = 99
                note = '''
                [backend]
                period = "x"
                '''

                [vm.web1]
                merge = "no" # yes?
                [vm."a b"]
                [vm]
                web2.period = "1ms"
                web3 = 5
                [demon]
                """).map { $0.prefix { $0 != "(" } }.map(String.init) == [
                    "quire.toml:2: backend.perod: unknown key: choose one of group, log-level, merge, merge-period, merge-workers, period, shared-disk, store, swap, swap-compression, swap-overcommit, swap-queues, tmem-reserve, workers, write-tracking",
                    "quire.toml:3: backend.workers: 99 is not allowed: give a whole number from 1 to 16",
                    "quire.toml:4: backend.note: unknown key: choose one of group, log-level, merge, merge-period, merge-workers, period, shared-disk, store, swap, swap-compression, swap-overcommit, swap-queues, tmem-reserve, workers, write-tracking",
                    "quire.toml:10: vm.web1.merge: \"no\" is not allowed: give true or false",
                    "quire.toml:11: vm.\"a b\": no VM has that name: use 1 to 63 of A-Z a-z 0-9 . _ - that do not start with a dot",
                    "quire.toml:13: vm.web2.period: \"1ms\" is not allowed: give a time from 100ms to 1h, such as \"10s\"",
                    "quire.toml:14: vm.web3: write [vm.web3], with what differs for that VM",
                    "quire.toml:15: demon: unknown section: there are [quired], [backend], [vm.NAME] and [exporter]",
                ])
        #expect(findings("x = { period = 1 }") == ["quire.toml:1: x: unknown section: there are [quired], [backend], [vm.NAME] and [exporter]"])
        #expect(findings("backend = 1\nvm = 2").count == 2)
        // In an inline table: the line of what holds it.
        #expect(findings("\n[vm]\nweb1 = { period = \"1ms\" }").first?.hasPrefix("quire.toml:3: vm.web1.period: ") == true)
        // What would make a mess of a terminal; and a key that is written in another way than it reads, which has its section's line.
        #expect(findings("[backend]\n\"a\\u001Bb\" = \"\"").first?.hasPrefix("quire.toml:1: backend.\"a\\u001Bb\": unknown key") == true)
    }

    @Test func whatIsNoTOMLIsSaidWithItsLine() {
        for (text, line) in [("[backend]\nperiod = \n", 2), ("a", 1), ("[backend]\nworkers = 1\nworkers = 2", 3), ("[x\n", 1)] {
            let said = findings(text)
            #expect(said.count == 1 && said[0].hasPrefix("quire.toml:\(line): no TOML: ") && !said[0].contains("\n"), "\(text): \(said)")
        }
        #expect(findings("") == [] && findings("# nothing\n") == [])
    }

    @Test func theMoreSpecificHasTheSay() throws {
        let file = file("[backend]\nperiod = \"5s\"\nworkers = 2\n[vm.web1]\nperiod = \"2s\"\n[vm.\"a.b\"]\nworkers = 3\n")
        let web1 = try file.resolve(.vm("web1"), ["merge-workers": .argument("4")])
        func origin(_ resolution: Resolution, _ name: String) -> String { "\(resolution.items.first { $0.key.name == name }!.origin)" }
        #expect(web1.value(Keys.Backend.period) == 2000 && origin(web1, "period") == "vm.web1.period (quire.toml:5)")
        #expect(web1.value(Keys.Backend.workers) == 2 && origin(web1, "workers") == "backend.workers (quire.toml:3)")
        #expect(web1.value(Keys.Backend.mergeWorkers) == 4 && origin(web1, "merge-workers") == "command line")
        #expect(web1.value(Keys.Backend.mergePeriod) == 10_000 && origin(web1, "merge-period") == "default")
        let other = try file.resolve(.vm("other"), ["period": .argument("1s")])
        #expect(other.value(Keys.Backend.period) == 1000 && other.value(Keys.Backend.workers) == 2)
        #expect(try origin(file.resolve(.vm("a.b")), "workers") == "vm.\"a.b\".workers (quire.toml:7)")
        #expect(file.machines == ["a.b", "web1"])
    }

    @Test func changesAreTold() throws {
        let old = try file("[backend]\nperiod = \"5s\"\nworkers = 2\n").resolve(.vm("a"))
        // The same in other words is no change.
        #expect(try file("[vm.a]\nperiod = 5\n[backend]\nworkers=2").resolve(.vm("a")).changes(since: old).isEmpty)
        let new = try file("[backend]\nperiod = \"1m\"\nworkers = 3\nswap-queues = 2\n[vm.a]\nmerge = false\n").resolve(.vm("a"))
        #expect(
            new.changes(since: old).map(\.line) == [
                "backend.period: \"5s\" -> \"1m\"", "vm.a.merge: true -> false", "backend.workers: 2 -> 3", "backend.swap-queues: 1 -> 2, from the next start on",
            ])
        // Where what could apply cannot.
        #expect(new.changes(since: old).first?.line(waits: true) == "backend.period: \"5s\" -> \"1m\", from the next start on")
        // Gone: it is the old place that says where.
        #expect(try file("").resolve(.vm("a")).changes(since: old).map(\.path) == ["backend.period", "backend.workers"])
        // What the command line says hides the file's.
        let argument: [String: RawValue] = ["period": .argument("1s")]
        let hidden = try file("[backend]\nperiod = \"5s\"").resolve(.vm("a"), argument)
        #expect(try file("[backend]\nperiod = \"6s\"").resolve(.vm("a"), argument).changes(since: hidden).isEmpty)
    }

    /// As the operator's guide has it: of a VM, what QEMU was started with.
    @Test func whatWaitsForTheNextStart() {
        func waiting(_ scope: Scope) -> [String] { scope.keys.filter { !$0.isLive }.map(\.name).sorted() }
        #expect(waiting(.quired) == [] && waiting(.exporter) == [])
        #expect(waiting(.backend) == ["shared-disk", "swap", "swap-queues"])
    }

    @Test func placesFollowThePrefix() {
        #expect(ConfigurationFile.standardPath(program: "/usr/bin/quire") == "/etc/quire/quire.toml")
        #expect(ConfigurationFile.standardPath(program: "/usr/local/bin/quired") == "/etc/quire/quire.toml")
        #expect(ConfigurationFile.standardPath(program: "/opt/q/bin/quired") == "/opt/q/etc/quire/quire.toml")
        #expect(ConfigurationFile.standardPath(program: "/home/a/.build/release/quire") == "/etc/quire/quire.toml")
    }
}

struct ConfigurationOnDiskTests {
    private func withFile<R>(_ content: [UInt8], mode: mode_t = 0o644, _ body: (String) throws -> R) throws -> R {
        let path = "\(ProcessCalls.environment("TMPDIR") ?? "/tmp")/quire-toml-\(UInt32.random(in: 0 ... .max))"
        let file = try Descriptor.open(path, O_RDWR | O_CREAT | O_EXCL)
        defer { Files.remove(path) }
        try file.writeBytes(at: 0, content)
        try file.setMode(mode)
        return try body(path)
    }

    @Test func whoMayWriteItIsRoot() throws {
        for (mode, advice) in [(0o644, nil), (0o600, nil), (0o664, "chmod go-w"), (0o646, "chmod go-w")] as [(mode_t, String?)] {
            try withFile([], mode: mode) { (path) throws in
                let status = try Descriptor.open(path, O_RDONLY).status()
                let said = message { try ConfigurationFile.checkTrust(path, status, reader: 0) }
                if status.uid == 0 {
                    #expect(said == nil && advice == nil || advice.map { said?.contains("\($0) \(path)") == true } == true, "\(mode): \(said ?? "")")
                } else {
                    #expect(said?.contains("chown root \(path)") == true)
                }
                // Whoever is not root hurts himself alone.
                #expect(message { try ConfigurationFile.checkTrust(path, status, reader: 1000) } == nil)
            }
        }
        guard ProcessCalls.isRoot else { return }
        try withFile(Array("[backend]\n".utf8)) { (path) throws in
            #expect(try ConfigurationFile.read(path).findings == [])
            #expect(unsafe chown(path, 12345, 0) == 0)
            #expect(message { try ConfigurationFile.read(path) } == "\(path) belongs to user 12345, who could have root do anything: chown root \(path)")
        }
    }

    @Test func whatCannotBeReadIsSaidInOneLine() throws {
        #expect(message { try ConfigurationFile.read("/nonexistent/quire.toml") } == "cannot read the configuration /nonexistent/quire.toml: No such file or directory")
        #expect(message { try ConfigurationFile.read("/tmp") }?.contains("is no file") == true)
        #expect(try ConfigurationFile.read("/dev/null").findings == [])
        try withFile([0xFF, 0xFE, 0x0A]) { (path) throws in #expect(message { try ConfigurationFile.read(path) }?.contains("is not UTF-8") == true) }
        try withFile([0x23, 0, 0x0A]) { (path) throws in #expect(message { try ConfigurationFile.read(path) }?.contains("is not UTF-8") == true) }
        try withFile([UInt8](repeating: 0x23, count: 1 << 20 + 1)) { (path) throws in #expect(message { try ConfigurationFile.read(path) }?.contains("more than 1 MiB") == true) }
        try withFile(Array("a = 1\nb = 2\n".utf8)) { (path) throws in
            let said = message { try ConfigurationFile.read(path) }
            #expect(said?.hasPrefix("\(path):1: a: unknown section: ") == true && said?.hasSuffix("(and 1 more: quire config check \(path))") == true)
        }
    }

    // MARK: - The commands

    private struct Output: Equatable {
        var status: Int32
        var text: String
    }

    private func quire(_ arguments: String...) throws -> Output {
        var pipe = try Pipe()
        let writer = pipe.takeWriter(), reader = pipe.takeReader()
        var options = ChildProcess.Options()
        options.passing = [.init(from: writer.raw, to: 1), .init(from: writer.raw, to: 2)]
        var child = try ChildProcess([products + "quire"] + arguments, options)
        _ = consume writer
        let text = String(decoding: try reader.readAll(limit: 1 << 20), as: UTF8.self)
        return Output(status: child.wait().shellStatus, text: text)
    }

    @Test func commands() throws {
        try withFile(Array("[backend]\nperiod = \"5s\"\nx = 1\n[vm.a]\nworkers = 0\n".utf8)) { (path) throws in
            let said = try quire("config", "check", path)
            #expect(said.status == 1 && said.text.hasPrefix("quire: \(path):3: backend.x: unknown key: ") && said.text.contains("\nquire: \(path):5: vm.a.workers: 0 is not allowed: "))
            let json = try quire("config", "check", "--json", path)
            #expect(json.status == 1 && json.text.contains("\"key\" : \"vm.a.workers\"") && json.text.contains("\"line\" : 5"))
            #expect(try quire("config", "show", "--config", path).status == 1)
            #expect(try quire("run", "--config", path, "--", "true").text.hasPrefix("quire: \(path):3: "))
            let doctor = try quire("doctor", "--config", path)
            #expect(doctor.status == 1 && doctor.text.contains("problem  with the configuration nothing of Quire's starts: \(path):3: backend.x: unknown key: "))
            #expect(doctor.text.contains("(and 1 more)\n         correct it; quire config check \(path) shows all that is wrong"), "\(doctor.text)")
        }
        try withFile(Array("[backend]\nperiod = \"5s\"\n[vm.a]\nworkers = 2\n".utf8)) { (path) throws in
            #expect(try quire("config", "check", path) == Output(status: 0, text: "\(path): ok\n"))
            #expect(try quire("doctor", "--config", path).text.contains("ok       the configuration \(path) is in order\n"))
            let shown = try quire("config", "show", "--vm", "a", "--config", path)
            let lines = shown.text.split(separator: "\n").map { $0.split(separator: " ", omittingEmptySubsequences: true).joined(separator: " ") }
            #expect(shown.status == 0 && lines.contains("vm.a.period \"5s\" backend.period (\(path):2)") && lines.contains("vm.a.workers 2 vm.a.workers (\(path):4)"))
            #expect(lines.contains("vm.a.merge true default"))
            let json = try quire("config", "show", "--json", "--config", path).text
            #expect(json.contains("\"key\" : \"quired.limit\"") && json.contains("\"key\" : \"exporter.http\""))
        }
        #expect(try quire("config", "template") == Output(status: 0, text: Template.text))
    }
}

struct TemplateTests {
    /// As installed it says nothing; with every comment taken away it is right, complete, and says the defaults.
    @Test func templateHasEveryKeyWithItsDefault() throws {
        #expect(findings(Template.text) == [])
        for (_, scope) in sections {
            #expect(try file(Template.text).resolve(scope).items.allSatisfy { $0.origin == .builtIn })
        }
        let lines = Template.text.split(separator: "\n", omittingEmptySubsequences: false)
        let all = lines.map { $0.hasPrefix("#") && !$0.hasPrefix("# ") && $0 != "#" ? $0.dropFirst() : $0 }.joined(separator: "\n")
        #expect(findings(all) == [])
        for (_, scope) in sections where scope != .vm("web1") {
            for item in try file(all).resolve(scope).items {
                #expect(item.origin != .builtIn, "\(item.key.name) is missing")
                if item.key.hasBuiltIn { #expect(item.text == item.key.otherwiseText) }
                #expect(Template.text.replacing("\n# ", with: " ").contains(item.key.summary))
            }
        }
        #expect(file(all).machines == ["web1"])
        for (line, number) in zip(lines, 1...) { #expect(line.count <= 112, "line \(number) is too long") }
    }
}
