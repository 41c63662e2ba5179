import Glibc
import Host
import Platform
import TestSupport
import Testing

/// SIGHUP: where the exporter listens, whom it asks and where it looks follow the configuration, all of it or nothing. (Token, names and
/// history: GateTests.)
@Suite(.serialized) struct ReloadTests {
    private let folder: Folder
    private let exporter: Exporter
    /// Two VMs here, five there.
    private let few: SyntheticVMs, many: SyntheticVMs
    /// Another address of loopback.
    private let second: UInt32 = 0x7F00_0002

    init() throws {
        folder = try Folder()
        few = try SyntheticVMs(2, base: folder.path + "/few")
        many = try SyntheticVMs(5, base: folder.path + "/many")
        let config = folder.path + "/quire.toml"
        try Self.write(config, "127.0.0.1:0", folder.path + "/metrics.sock", few)
        exporter = try Exporter(in: folder, ["--config", config])
    }

    private static func write(
        _ config: String, _ http: String, _ socket: String, _ vms: SyntheticVMs, _ more: String = ""
    ) throws {
        try Descriptor.open(config, O_RDWR | O_CREAT).replaceContent(
            "[exporter]\nhttp = \"\(http)\"\nhttp-socket = \"\(socket)\"\nruntime-directory = [\"\(vms.directory.base)\"]\n"
                + (more.contains("store =") ? "" : "store = \"/nonexistent/store.sock\"\n") + more)
    }

    /// Has it read a new configuration, and waits for a line.
    private func reload(_ line: String, _ http: String, _ socket: String, _ vms: SyntheticVMs, _ more: String = "") throws {
        try Self.write(folder.path + "/quire.toml", http, socket, vms, more)
        let before = exporter.log.count
        exporter.signal(SIGHUP)
        guard eventually(milliseconds: 20_000, { exporter.log.dropFirst(before).contains(line) }) else {
            throw Trouble("no '\(line)' in: \(exporter.log)")
        }
    }

    private func metrics(_ port: UInt16, at host: UInt32, _ headers: [String] = []) throws -> Response {
        let lines = ["GET /metrics HTTP/1.1", "Host: localhost", "Connection: close"] + headers
        let connection = try Exporter.tcp(port, at: host)
        guard let response = Response(try Exporter.exchange(connection, Array((lines.joined(separator: "\r\n") + "\r\n\r\n").utf8))) else {
            throw Trouble("no answer")
        }
        return response
    }

    private func isRefused(_ port: UInt16, at host: UInt32) -> Bool {
        do {
            _ = try Exporter.tcp(port, at: host)
            return false
        } catch { return (error as? QuireError)?.errno == ECONNREFUSED }
    }

    /// The port of the last line that names one.
    private func port(at host: String) throws -> UInt16 {
        let prefix = "quire-exporter: listening on http://\(host):"
        let line = exporter.log.split(separator: "\n").last { $0.hasPrefix(prefix) }
        return try #require(line.flatMap { UInt16($0.dropFirst(prefix.count).dropLast()) })
    }

    @Test func addressesFollow() throws {
        let quired = try Quired()
        let old = exporter.socket, new = folder.path + "/new.sock"
        #expect(samples(try exporter.get("/metrics").body)["quire_vms"] == "2")
        #expect(samples(try exporter.getOverSocket("/metrics").body)["quire_store_up"] == "0")
        // Kept open: on one something was asked and answered.
        let quiet = try exporter.connect(), used = try exporter.connect()
        let request = "GET /nothing HTTP/1.1\r\nHost: localhost\r\n\r\n"
        #expect(unsafe Glibc.send(used.raw, request, request.utf8.count, Int32(MSG_NOSIGNAL)) == request.utf8.count)
        #expect(waitReadable([used.raw], timeoutMilliseconds: 10_000) == [0])

        try reload("exporter.runtime-directory: ", "127.0.0.2:0", new, many, "store = \"\(quired.path)\"\n")
        #expect(exporter.log.contains("quire-exporter: exporter.http: \"127.0.0.1:0\" -> \"127.0.0.2:0\"\n"))
        #expect(exporter.log.contains("quire-exporter: exporter.store: \"/nonexistent/store.sock\" -> \"\(quired.path)\"\n"))
        let moved = try port(at: "127.0.0.2")
        let found = samples(try metrics(moved, at: second).body)
        #expect(found["quire_vms"] == "5" && found["quire_store_up"] == "1")
        #expect(samples(try exporter.getOverSocket("/metrics", at: new).body)["quire_vms"] == "5")
        // Nothing is left of the old ones, and nobody can ask on what he has kept of them.
        #expect(isRefused(exporter.port, at: Exporter.loopback) && !Files.exists(old))
        #expect(try Exporter.exchange(quiet, []) == [])
        #expect(try Response(Exporter.exchange(used, []))?.status == 404)
        // Rights of a socket are not those of whoever started it.
        var rights = stat()
        #expect(unsafe stat(new, &rights) == 0 && rights.st_mode & 0o777 == 0o660)

        // One of them off.
        try reload("exporter.http: ", "off", new, many)
        #expect(isRefused(moved, at: second))
        #expect(try exporter.getOverSocket("/metrics", at: new).status == 200)
        try reload("the configuration is not reloaded: there is nothing to listen on: --http and --http-socket are both off\n", "off", "off", many)
        #expect(try exporter.getOverSocket("/metrics", at: new).status == 200)
        try reload("exporter.http-socket: ", "127.0.0.1:0", "off", many)
        #expect(!Files.exists(new))
        #expect(try metrics(port(at: "127.0.0.1"), at: Exporter.loopback).status == 200)
        #expect(exporter.end() == .exited(0))
    }

    /// Where it cannot listen all stays: the other address, and what else was new.
    @Test func whatCannotBeChangesNothing() throws {
        let old = exporter.socket, new = folder.path + "/new.sock", taken = folder.path + "/taken.sock"
        let listener = try UnixSocket.listen(at: taken)
        let open = try exporter.connect()
        func check(_ what: String) throws {
            #expect(samples(try exporter.get("/metrics").body)["quire_vms"] == "2", "\(what)")
            #expect(samples(try exporter.getOverSocket("/metrics").body)["quire_vms"] == "2", "\(what)")
            #expect(exporter.log.ranges(of: "listening on ").count == 2 && !Files.exists(new), "\(what): \(exporter.log)")
        }
        let no = "quire-exporter: the configuration is not reloaded: "
        try reload("\(no)\(taken) is in use by a running process", "127.0.0.2:0", taken, many)
        try check("a socket that is taken")
        try reload("\(no)cannot listen on \(folder.path)/none/x: its directory does not exist", "127.0.0.2:0", folder.path + "/none/x", many)
        try check("a socket that is nowhere")
        let other = try Exporter([few.directory.base])
        try reload("\(no)cannot listen on 127.0.0.1:\(other.port): Address already in use\n", "127.0.0.1:\(other.port)", new, many)
        try check("a port that is taken")
        // 192.0.2.0/24 is nobody's.
        let token = try folder.write("token", "correct-horse-battery-staple\n")
        try reload(
            "\(no)cannot listen on 192.0.2.7:9750: Cannot assign requested address\n", "192.0.2.7:9750", new, many, "http-token-file = \"\(token)\"\n")
        try check("an address that is not ours")
        // The connection of before is served on.
        let request = "GET /nothing HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        #expect(try Response(Exporter.exchange(open, Array(request.utf8)))?.status == 404)
        #expect(exporter.end() == .exited(0))
        #expect(!Files.exists(old) && Files.exists(taken))
        _ = consume listener
    }

    /// One port, and another address: the old one has to go first. Opened to the network it asks for the token from the first request on.
    @Test func thePortStays() throws {
        let port = exporter.port, socket = exporter.socket
        let same = "127.0.0.1:\(port)", all = "0.0.0.0:\(port)"
        // Another name for the same.
        try reload("exporter.http: \"127.0.0.1:0\" -> ", same, socket, few)
        #expect(try exporter.get("/metrics").status == 200)
        try reload("--http \(all) is not loopback: give --http-token-file", all, socket, few)
        #expect(try exporter.get("/metrics").status == 200)

        let token = try folder.write("token", "correct-horse-battery-staple\n")
        let more = "http-token-file = \"\(token)\"\n"
        // Somebody else has a part of it: then it is as it was, without the token, too.
        do {
            let other = try Exporter.tcp(port, at: second, listens: true)
            try reload("the configuration is not reloaded: cannot listen on \(all): Address already in use\n", all, socket, many, more)
            #expect(samples(try exporter.get("/metrics").body)["quire_vms"] == "2")
            _ = consume other
        }
        let open = try exporter.connect()
        try reload("exporter.runtime-directory: ", all, socket, many, more)
        #expect(try Exporter.exchange(open, []) == [])
        for host in [Exporter.loopback, second] {
            #expect(try metrics(port, at: host).status == 401)
            #expect(try metrics(port, at: host, ["Authorization: Bearer correct-horse-battery-staple"]).status == 200)
        }
        #expect(try exporter.getOverSocket("/metrics").status == 200)
        // And back, where nobody needs one: who has connected from elsewhere does not become one of those.
        let kept = try Exporter.tcp(port, at: second)
        try reload("exporter.http: ", same, socket, many)
        #expect(try Exporter.exchange(kept, []) == [])
        #expect(isRefused(port, at: second))
        #expect(try exporter.get("/metrics").status == 200)
        #expect(exporter.end() == .exited(0))
    }
}
