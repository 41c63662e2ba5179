import Glibc
import Host
import Logging
import Platform
import TestSupport
import Testing

/// What commands that change something print with --json.
struct CommandAnswerTests {
    @Test func everyFieldHasItsName() {
        #expect(jsonText([CommandAnswer]()).filter { !$0.isWhitespace } == "[]")
        var done = CommandAnswer("libvirt enable", "web1")
        done.result = .planned
        done.notes = ["one", "two"]
        done.takesEffect = .powerCycle
        done.difference = "- a\n+ b"
        var failed = CommandAnswer("tmem save", "a/b")
        failed.bytes = .max
        failed.pages = 0
        failed.fail(QuireError(.invalid, "it is \"so\""))
        #expect(
            jsonText([done, failed]) == """
                [
                  {
                    "command" : "libvirt enable",
                    "difference" : "- a\\n+ b",
                    "error" : "",
                    "name" : "web1",
                    "notes" : [
                      "one",
                      "two"
                    ],
                    "result" : "planned",
                    "takes_effect" : "power-cycle"
                  },
                  {
                    "bytes" : 18446744073709551615,
                    "command" : "tmem save",
                    "error" : "it is \\"so\\"",
                    "name" : "a/b",
                    "notes" : [

                    ],
                    "pages" : 0,
                    "result" : "failed"
                  }
                ]
                """)
    }

    private struct Output: Equatable {
        var status: Int32
        var text: String
        var errors: String
    }

    private func quire(_ folder: String, _ arguments: [String]) throws -> Output {
        var output = try Pipe(), errors = try Pipe()
        let writer = output.takeWriter(), errorWriter = errors.takeWriter(), reader = output.takeReader(), errorReader = errors.takeReader()
        var options = ChildProcess.Options()
        options.passing = [.init(from: writer.raw, to: 1), .init(from: errorWriter.raw, to: 2)]
        options.variables = ["QUIRE_RUNTIME_DIR": folder]
        var child = try ChildProcess([products + "quire"] + arguments, options)
        _ = consume writer
        _ = consume errorWriter
        let text = String(decoding: try reader.readAll(limit: 1 << 20), as: UTF8.self)
        let said = String(decoding: try errorReader.readAll(limit: 1 << 20), as: UTF8.self)
        return Output(status: child.wait().shellStatus, text: text, errors: said)
    }

    /// One shape, whoever is asked, and whatever comes of it; and the same exit status and line on stderr as without. Who answers is a
    /// socket that knows what to say: the programs behind it have tests of their own.
    @Test func commandsAnswerInOneShape() throws {
        let folder = try TemporaryFolder()
        let directory = RuntimeDirectory(base: folder.path + "/run")
        let claim = try directory.claim("one")
        let silence = Logger(label: "test") { _ in SwiftLogNoOpLogHandler() }
        let backend = try CommandSocket.Server(path: directory.commandPath("one"), logger: silence) { request throws(QuireError) in
            switch request.text {
            case "tmem flush 1048576": return "8192"
            case "tmem save", "tmem restore": return "17"
            case "tmem cap * 4096": throw QuireError(.noSpace, "too little")
            default: return ""
            }
        }
        let supervisor = try CommandSocket.Server(path: directory.supervisorPath("one"), logger: silence) { _ throws(QuireError) in "a\nb" }
        let file = try folder.write("swapped", "")

        func shape(_ command: String, _ name: String = "one", _ result: String = "done", notes: [String] = [], error: String = "", more: String = "") -> String {
            let lines = notes.isEmpty ? "\n" : notes.map { "\n      \"\($0)\"" }.joined(separator: ",")
            var fields = ["command": "\"\(command)\"", "error": "\"\(error)\"", "name": "\"\(name)\"", "notes": "[\(lines)\n    ]", "result": "\"\(result)\""]
            let pair = more.split(separator: "=").map(String.init)
            if pair.count == 2 { fields[pair[0]] = pair[1] }
            return "[\n  {\n" + fields.sorted { $0.key < $1.key }.map { "    \"\($0.key)\" : \($0.value)" }.joined(separator: ",\n") + "\n  }\n]\n"
        }
        func check(_ arguments: [String], _ expected: String, _ status: Int32 = 0, _ errors: String = "") throws {
            #expect(try quire(directory.base, arguments + ["--json"]) == Output(status: status, text: expected, errors: errors))
        }
        for command in ["unmerge", "merge", "tmem freeze", "tmem thaw"] {
            try check(command.split(separator: " ").map(String.init) + ["one"], shape(command))
        }
        try check(["tmem", "weight", "one", "swap", "50"], shape("tmem weight"))
        try check(["tmem", "cap", "one", "none"], shape("tmem cap"))
        try check(["tmem", "flush", "one", "1M"], shape("tmem flush", more: "bytes=8192"))
        try check(["tmem", "save", "one", file], shape("tmem save", more: "pages=17"))
        try check(["tmem", "restore", "one", file], shape("tmem restore", more: "pages=17"))
        try check(["config", "reload", "one"], shape("config reload", notes: ["a", "b"]))
        try check(["tmem", "cap", "one", "4096"], shape("tmem cap", "one", "failed", error: "one: too little"), 1, "quire: one: too little\n")
        let missing = "no VM 'two' is running: quire status lists those that are"
        for (command, more) in [("unmerge", []), ("tmem cap", ["1G"]), ("config reload", [])] as [(String, [String])] {
            try check(
                command.split(separator: " ").map(String.init) + ["two"] + more, shape(command, "two", "failed", error: missing), 1, "quire: \(missing)\n")
        }
        let running = "the VM 'one' runs: this is for a domain whose saved image is refused"
        try check(["libvirt", "accept-disks", "one"], shape("libvirt accept-disks", "one", "failed", error: running), 1, "quire: \(running)\n")
        try check(
            ["libvirt", "accept-disks", "two"],
            shape("libvirt accept-disks", "two", notes: ["its next start takes the shared disks as they are"], more: "takes_effect=\"next-start\""))
        // Where nothing can be asked, each that was named has failed; and one line says so.
        let nowhere = "qemu+unix:///system?socket=/nowhere"
        let off = try quire(directory.base, ["libvirt", "enable", "-c", nowhere, "--no-merge", "--json", "a", "b"])
        #expect(off.status == 1 && off.errors.split(separator: "\n").count == 1 && off.errors.hasPrefix("quire: "), "\(off)")
        #expect(off.text.ranges(of: "\"result\" : \"failed\"").count == 2 && off.text.contains("\"name\" : \"b\""), "\(off)")
        for (arguments, name) in [(["sweep"], ""), (["disable", "--all"], ""), (["detach", "a"], "a")] {
            let off = try quire(directory.base, ["libvirt"] + arguments + ["-c", nowhere, "--json"])
            #expect(off.status == 1 && off.text.contains("\"name\" : \"\(name)\"") && off.text.contains("\"result\" : \"failed\""), "\(off)")
        }
        // Two things in one stream are nobody's.
        for arguments in [["tmem", "save", "one", "-"], ["libvirt", "enable", "--xml"]] {
            let both = try quire(directory.base, arguments + ["--json"])
            #expect(both.status == 64 && both.text.isEmpty && both.errors.contains("both write to stdout"), "\(both)")
        }
        let check = try quire(directory.base, ["config", "check", "--json", folder.path + "/none"])
        #expect(check.status == 1 && check.text.contains("\"key\" : \"\"") && check.text.contains("cannot read the configuration"), "\(check)")
        backend.end()
        supervisor.end()
        claim.remove()
    }
}
