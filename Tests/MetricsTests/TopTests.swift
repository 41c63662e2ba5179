import Foundation
import Glibc
import Host
import Metrics
import Platform
import TestSupport
import Testing

/// `quire top` in a real terminal: tmux draws what it is told, and says what is there.
@Suite(.serialized) struct TopTests {
    private let folder: Folder
    private let vms: SyntheticVMs

    init() throws {
        folder = try Folder()
        vms = try SyntheticVMs(12, base: folder.path + "/run")
    }

    /// A terminal with a shell in it; gone with the value.
    private final class Terminal {
        private let socket: String

        init(_ folder: Folder, directory: String, columns: Int = 150, rows: Int = 14, locale: String = "C.UTF-8") throws {
            socket = folder.path + "/tmux"
            try tmux(
                "-f", "/dev/null", "new-session", "-d", "-x", "\(columns)", "-y", "\(rows)", "env", "-i", "PATH=/usr/bin:/bin",
                "TERM=screen-256color", "LC_ALL=\(locale)", "PS1=prompt> ", "QUIRE_RUNTIME_DIR=\(directory)", "HOME=/nonexistent",
                "sh")
            guard try eventually(milliseconds: 20_000, { try screen().contains("prompt>") }) else { throw Trouble("no shell") }
        }

        deinit { _ = try? tmux("kill-server") }

        @discardableResult func tmux(_ arguments: String...) throws -> String {
            let (status, text) = try command(["tmux", "-u", "-S", socket] + arguments)
            guard status == 0 else { throw Trouble("tmux \(arguments): \(text)") }
            return text
        }

        func screen() throws -> String { try tmux("capture-pane", "-p") }
        var shown: String { (try? screen()) ?? "nothing" }
        func type(_ keys: String...) throws { for key in keys { try tmux("send-keys", key) } }
        func enter(_ line: String) throws {
            try tmux("send-keys", "-l", line)
            try tmux("send-keys", "Enter")
        }
        var isOnOtherScreen: Bool { (try? tmux("display-message", "-p", "#{alternate_on} #{cursor_flag}"))?.hasPrefix("1") ?? false }
        var hasCursor: Bool { (try? tmux("display-message", "-p", "#{cursor_flag}"))?.hasPrefix("1") ?? false }
        /// The names of the VMs that are shown, in order.
        func names() throws -> [String] {
            try screen().split(separator: "\n").filter { $0.hasPrefix("vm-") }.map { String($0.prefix { $0 != " " }) }
        }
    }

    private func reports() throws -> [StatusReport] {
        try StatusReport.parse(json: command([products + "quire", "status", "--json"], ["QUIRE_RUNTIME_DIR": vms.directory.base]).text)
    }

    @Test func sortsScrollsResizesAndGoes() throws {
        let terminal = try Terminal(folder, directory: vms.directory.base)
        try terminal.enter("stty -g >\(folder.path)/before; \(products)quire top --interval 300ms; echo status $?; stty -g >\(folder.path)/after")
        let all = try reports()
        func by(_ value: (StatusReport) -> Double) -> [String] {
            all.sorted { (value($0), $1.name) > (value($1), $0.name) }.map(\.name)
        }
        let bySaved = by { Double($0.recycledBytes + $0.merging.savedBytes) }
        let byRate = by { $0.recycledPagesPerSecond + $0.merging.mergedPagesPerSecond }
        let byName = all.map(\.name)
        #expect(bySaved != byName && byRate != byName && bySaved != byRate)
        // Fourteen lines: two of head, one blank, titles, keys.
        #expect(try eventually { try terminal.names() == Array(bySaved.prefix(9)) }, "\(terminal.shown)")
        #expect(terminal.isOnOtherScreen && !terminal.hasCursor)
        let first = try terminal.screen()
        #expect(first.hasPrefix("12 VMs  RAM ") && first.contains("by saved, every 300ms") && first.contains("q quit"))
        #expect(!first.contains("prompt>"))
        try terminal.type("v")
        #expect(try eventually { try terminal.names() == Array(byName.prefix(9)) })
        try terminal.type("r")
        #expect(try eventually { try terminal.names() == Array(byRate.prefix(9)) })
        try terminal.type("j", "Down", "k", "j")
        #expect(try eventually { try terminal.names() == Array(byRate[2..<11]) })
        // A bar a sample; the newest says what there is.
        #expect(try eventually { try terminal.screen().contains("██") })
        try terminal.type("Space")
        #expect(try eventually { try terminal.screen().contains(", paused") })
        try terminal.tmux("resize-window", "-x", "60", "-y", "20")
        #expect(try eventually {
            let lines = try terminal.screen().split(separator: "\n", omittingEmptySubsequences: false)
            return try terminal.names().count == 10 && lines.allSatisfy { $0.count <= 60 }
        }, "\(terminal.shown)")
        try terminal.type("q")
        #expect(try eventually { try terminal.screen().contains("status 0") })
        #expect(!terminal.isOnOtherScreen && terminal.hasCursor)
        #expect(try eventually { try (try? Files.read(folder.path + "/after")) == Files.read(folder.path + "/before") })
    }

    /// The end of whatever kind: the shell has its terminal back. SIGSEGV stands for a fault of ours.
    @Test(arguments: ["INT", "TERM", "HUP", "QUIT", "SEGV", "ABRT", "ILL"]) func restoresTheTerminal(_ signal: String) throws {
        let terminal = try Terminal(folder, directory: vms.directory.base)
        try terminal.enter("stty -g >\(folder.path)/before; sh -c 'echo $$ >\(folder.path)/pid; exec \(products)quire top'; echo ended $?; stty -g >\(folder.path)/after")
        #expect(try eventually { try terminal.screen().contains("12 VMs") })
        let pid = try #require(Int32(Files.read(folder.path + "/pid").filter(\.isNumber)))
        ProcessCalls.signal(pid, try #require(["INT": SIGINT, "TERM": SIGTERM, "HUP": SIGHUP, "QUIT": SIGQUIT, "SEGV": SIGSEGV, "ABRT": SIGABRT, "ILL": SIGILL][signal]))
        #expect(try eventually { try terminal.screen().contains("ended 1") }, "\(terminal.shown)")
        #expect(!terminal.isOnOtherScreen && terminal.hasCursor)
        #expect(try eventually { try (try? Files.read(folder.path + "/after")) == Files.read(folder.path + "/before") })
    }

    @Test func stopsAndGoesOn() throws {
        let terminal = try Terminal(folder, directory: vms.directory.base)
        try terminal.enter("set -m; \(products)quire top --interval 200ms")
        #expect(try eventually { try terminal.screen().contains("12 VMs") })
        try terminal.type("C-z")
        #expect(try eventually { try !terminal.isOnOtherScreen && terminal.screen().contains("Stopped") }, "\(terminal.shown)")
        try terminal.enter("fg")
        #expect(try eventually { try terminal.isOnOtherScreen && terminal.screen().contains("12 VMs") })
        try terminal.type("C-c")
        #expect(try eventually { try !terminal.isOnOtherScreen && terminal.screen().contains("prompt>") })
    }

    /// What takes long has a bar, where there is a terminal: it grows, and nothing is left of it in the end. Who answers here is a socket
    /// that takes its time: no guest is needed for that.
    @Test func progressBar() throws {
        let terminal = try Terminal(folder, directory: vms.directory.base)
        let file = try folder.write("swapped", String(repeating: "-", count: 8192))
        let listener = try UnixSocket.listen(at: vms.directory.commandPath("vm-000"), kind: .messages)
        try terminal.enter("\(products)quire tmem restore vm-000 \(file); echo status $?")
        guard !waitReadable([listener.descriptor.raw], timeoutMilliseconds: 20_000).isEmpty else { throw Trouble(terminal.shown) }
        let connection = try listener.accept()
        var passed = UnixSocket.PassedDescriptors()
        let request = try connection.receiveMessage(limit: 4096, maxDescriptors: 1, into: &passed)
        #expect(request == Array("tmem restore".utf8))
        guard let swapped = passed.next() else { throw Trouble("no file was passed") }
        // How far it has been read is how far it is.
        for (bytes, bar) in [(4096, "[###############...............] 50 %"), (2048, "[######################........] 75 %")] {
            _ = try swapped.readAll(limit: bytes)
            #expect(try eventually { try terminal.screen().contains("vm-000: restoring \(bar)") }, "\(terminal.shown)")
        }
        try connection.sendMessage(Array("=17".utf8))
        #expect(try eventually { try terminal.screen().contains("status 0") }, "\(terminal.shown)")
        let end = terminal.shown
        #expect(end.contains("quire: 17 pages restored\n") && !end.contains("restoring ["), "\(end)")
    }

    @Test func withoutUTF8() throws {
        let terminal = try Terminal(folder, directory: vms.directory.base, locale: "C")
        try terminal.enter("\(products)quire top --interval 200ms")
        #expect(try eventually { try terminal.screen().contains("##") })
        #expect(try terminal.screen().utf8.allSatisfy { $0 < 0x80 })
        try terminal.type("q")
    }

    @Test func forScripts() throws {
        let variables = ["QUIRE_RUNTIME_DIR": vms.directory.base]
        let once = try command([products + "quire", "top", "--once", "--sort", "vm"], variables)
        #expect(once.status == 0 && !once.text.contains("\u{1B}"))
        let rows = once.text.split(separator: "\n")
        #expect(rows.count == 2 + 12 && rows[1].hasPrefix("VM      STATE"), "\(once.text)")

        struct Line: Decodable {
            struct VM: Decodable { let name: String, uid: UInt32, recycled_bytes: UInt64, saved_bytes: UInt64 }
            let vms: [VM], saved_bytes: UInt64, time_unix_ms: Int64
        }
        let json = try command([products + "quire", "top", "--once", "--json"], variables)
        let line = try JSONDecoder().decode(Line.self, from: Data(json.text.utf8))
        let all = try reports()
        #expect(line.vms.map(\.name) == all.map(\.name) && line.vms.map(\.recycled_bytes) == all.map(\.recycledBytes))
        #expect(line.saved_bytes == all.reduce(0) { $0 + $1.recycledBytes + $1.merging.savedBytes })
        let three = try command(
            ["sh", "-c", "\(products)quire top --json --interval 200ms | head -n 3 | wc -l"], variables)
        #expect(three.text.filter(\.isNumber) == "3")

        let piped = try command(["sh", "-c", "\(products)quire top </dev/null"], variables)
        #expect(piped.status == 1 && piped.text == "quire: quire top draws on a terminal, and this is none: use --once or --json\n")
        #expect(try command([products + "quire", "top", "--interval", "1ms"], variables).status == 64)
    }

    @Test func linesFitAnyTerminal() throws {
        var screen = TopScreen(intervalMilliseconds: 1000, hasBlocks: true)
        for rows in [1, 2, 3, 5, 40] {
            for columns in [1, 10, 79, 300] {
                screen.show(HostSnapshot.read(RuntimeDirectories([vms.directory.base])))
                let plain = screen.lines(size: (columns, rows), colours: false)
                #expect(plain.count == rows && plain.allSatisfy { $0.count <= columns }, "\(columns) x \(rows)")
            }
        }
    }
}
