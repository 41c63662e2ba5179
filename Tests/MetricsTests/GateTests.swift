import Glibc
import Host
import Platform
import TestSupport
import Testing

/// Who may read, and what becomes of requests that are none.
@Suite(.serialized) struct GateTests {
    private let folder: Folder
    private let vms: SyntheticVMs

    init() throws {
        folder = try Folder()
        vms = try SyntheticVMs(3, base: folder.path + "/run")
    }

    private func exporter(_ more: [String] = []) throws -> Exporter { try Exporter([vms.directory.base], more) }

    private func expectAlive(_ exporter: Exporter, _ after: String) throws {
        #expect(exporter.isRunning, "after \(after)")
        let response = try exporter.get("/metrics")
        #expect(response.status == 200 && response.body.contains("\nquire_vms 3\n"), "after \(after)")
    }

    @Test func otherHostsAndOtherSites() throws {
        let exporter = try exporter(["--http-host", "Mon.Example.org"])
        let port = exporter.port
        for host in ["127.0.0.1:\(port)", "localhost", "LocalHost:1", "[::1]:9750", "10.1.2.3", "mon.example.org:9750"] {
            #expect(try exporter.get("/metrics", host: host).status == 200, "\(host)")
        }
        for host in ["evil.example:\(port)", "localhost.evil.example", "127.0.0.1.evil.example", "127.0.0.1@evil", "", "[::1", "1.2.3", "localhost:80x"] {
            for path in ["/metrics", "/", "/api/v1/vms"] {
                #expect(try exporter.get(path, host: host).status == 421, "\(host)")
            }
        }
        #expect(try exporter.get("/metrics", ["Host: localhost"]).status == 400)
        #expect(Response(try exporter.raw(Array("GET /metrics HTTP/1.1\r\nConnection: close\r\n\r\n".utf8)))?.status == 400)

        #expect(try exporter.get("/api/v1/vms", ["Sec-Fetch-Site: cross-site"]).status == 403)
        #expect(try exporter.get("/api/v1/vms", ["Sec-Fetch-Site: same-site"]).status == 403)
        #expect(try exporter.get("/api/v1/vms", ["Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate"]).status == 403)
        #expect(try exporter.get("/api/v1/vms", ["Sec-Fetch-Site: same-origin"]).status == 200)
        #expect(try exporter.get("/", ["Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate"]).status == 200)
        #expect(try exporter.get("/api/v1/vms", ["Origin: http://evil.example"]).status == 403)
        #expect(try exporter.get("/api/v1/vms", ["Origin: null"]).status == 403)
        #expect(try exporter.get("/api/v1/vms", ["Origin: http://127.0.0.1:\(port)"]).status == 200)
        try expectAlive(exporter, "refusals")
    }

    @Test func headersKeepOthersOut() throws {
        let exporter = try exporter()
        for path in ["/", "/page.js", "/page.css", "/metrics", "/api/v1/vms", "/api/v1/openapi.json", "/nothing"] {
            let headers = try exporter.get(path).headers
            #expect(headers["content-security-policy"]?.hasPrefix("default-src 'none'; script-src 'self';") == true)
            #expect(headers["cross-origin-resource-policy"] == "same-origin" && headers["x-content-type-options"] == "nosniff")
            #expect(headers["access-control-allow-origin"] == nil && headers["cache-control"] == "no-store")
        }
        // Nothing of the page comes from elsewhere.
        for path in ["/", "/page.js", "/page.css"] {
            let body = try exporter.get(path).body.replacing("http://www.w3.org/2000/svg", with: "")
            #expect(!body.contains("http:") && !body.contains("https:") && !body.contains("//fonts"), "\(path)")
        }
    }

    @Test func methodsPathsAndBodies() throws {
        let exporter = try exporter()
        for method in ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH", "BREW"] {
            let response = try exporter.get("/metrics", method: method)
            #expect(response.status == 405 || (method == "BREW" && response.status == 400), "\(method)")
        }
        let head = try exporter.get("/metrics", method: "HEAD")
        #expect(head.status == 200 && head.body == "" && head.headers["content-length"] != "0")
        for path in [
            "/nothing", "/api/v1/vms/", "/api/v1/vms/x/vm-000", "/api/v1/vms/0/..", "/../etc/passwd", "/api/v1/vms/0/%2e%2e",
            "/page.js/", "//metrics", "/api/v1/vms/99999999999/vm-000", "/api/v1/vms/0/nobody", "*",
        ] {
            #expect(try exporter.get(path).status == 404, "\(path)")
        }
        #expect(try exporter.get("/metrics?x=1").status == 200)
        #expect(try exporter.get("/api/v1/vms/\(ProcessCalls.ownUID)/vm-001").body.contains("\"name\":\"vm-001\""))
        #expect(try exporter.get("/metrics", ["Content-Length: 5", "", "12345"]).status == 413)
        #expect(try exporter.get("/metrics", ["Transfer-Encoding: chunked", "", "5", "12345", "0"]).status == 413)
        // Two requests on one connection, sent at once.
        let one = "GET /api/v1/host HTTP/1.1\r\nHost: localhost\r\n"
        let both = String(decoding: try exporter.raw(Array((one + "\r\n" + one + "Connection: close\r\n\r\n").utf8)), as: UTF8.self)
        #expect(both.ranges(of: "HTTP/1.1 200 OK").count == 2)
        try expectAlive(exporter, "odd requests")
    }

    @Test func tokens() throws {
        let token = "correct-horse-battery-staple"
        let exporter = try exporter(["--http-token-file", folder.write("token", token + "\n")])
        func status(_ headers: String...) throws -> Int { try exporter.get("/metrics", headers).status }
        #expect(try status() == 401)
        #expect(try status("Authorization: Bearer \(token)") == 200)
        #expect(try status("Authorization: bearer \(token)") == 200)
        for wrong in [
            "Bearer ", "Bearer x", "Bearer \(token)x", "Bearer \(token.dropLast())", "Bearer \(token.uppercased())",
            "Basic \(token)", token, "Bearer correct-horse-battery-stapl\u{0}",
        ] {
            #expect([400, 401].contains(try status("Authorization: \(wrong)")), "\(wrong)")
        }
        #expect(try status("Authorization: Bearer \(token)", "Authorization: Bearer \(token)") == 401)
        let refused = try exporter.get("/api/v1/vms", ["Authorization: Bearer wrong-wrong-wrong"])
        #expect(refused.status == 401 && refused.body == "the token is wrong\n" && refused.headers["www-authenticate"] != nil)
        // The page holds nothing that is worth a token; it asks for one.
        #expect(try exporter.get("/").status == 200)
        // The socket's rights decide who may use it.
        #expect(try exporter.getOverSocket("/metrics").status == 200)
        var rights = stat()
        #expect(unsafe stat(exporter.socket, &rights) == 0 && rights.st_mode & 0o777 == 0o660)
        #expect(try exporter.get("/metrics", ["Authorization: Bearer \(token)"]).body.contains("\nquire_vms 3\n"))
        #expect(!exporter.log.contains(token))
    }

    /// SIGHUP: another token and other names hold at once, on a connection that is open, too. What is wrong changes nothing.
    @Test func reload() throws {
        let tokens = ["correct-horse-battery-staple", "another-horse-another-staple"]
        let token = try folder.write("token", tokens[0] + "\n")
        func configuration(_ more: String) throws -> String {
            try folder.write("quire.toml", "[exporter]\nhttp-token-file = \"\(token)\"\n\(more)")
        }
        let exporter = try exporter(["--config", configuration("http-host = [\"one.example\"]\n")])
        func status(_ token: String, _ host: String) throws -> Int { try exporter.get("/metrics", ["Authorization: Bearer \(token)"], host: host).status }
        func reload(_ line: String, _ count: Int = 1) throws {
            exporter.signal(SIGHUP)
            guard eventually({ exporter.log.ranges(of: line).count >= count }) else { throw Trouble("no '\(line)' in: \(exporter.log)") }
        }
        let open = try exporter.connect()
        func ask(_ token: String) throws -> String {
            let request = "GET /metrics HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer \(token)\r\n\r\n"
            _ = unsafe request.utf8.withContiguousStorageIfAvailable { unsafe Glibc.send(open.raw, $0.baseAddress, $0.count, Int32(MSG_NOSIGNAL)) }
            var text = ""
            while !text.contains("\r\n\r\n"), !waitReadable([open.raw], timeoutMilliseconds: 10_000).isEmpty {
                var chunk = [UInt8](repeating: 0, count: 1 << 20)
                let n = unsafe Glibc.recv(open.raw, &chunk, chunk.count, 0)
                guard n > 0 else { break }
                text += String(decoding: chunk.prefix(n), as: UTF8.self)
            }
            return String(text.prefix(12))
        }
        #expect(try status(tokens[0], "one.example") == 200 && status(tokens[0], "two.example") == 421 && status(tokens[1], "one.example") == 401)
        #expect(try ask(tokens[1]) == "HTTP/1.1 401")

        _ = try folder.write("token", tokens[1] + "\n")
        _ = try configuration("http-host = [\"two.example\"]\nhistory-interval = \"1s\"\nhttp-socket = \"off\"\n")
        try reload("quire-exporter: exporter.history-interval: \"15s\" -> \"1s\"\n")
        #expect(exporter.log.contains("quire-exporter: exporter.http-host: [\"one.example\"] -> [\"two.example\"]\n"))
        // What an option says stays, and is no change.
        #expect(!exporter.log.contains("exporter.http-socket"))
        #expect(try status(tokens[1], "two.example") == 200 && status(tokens[1], "one.example") == 421 && status(tokens[0], "two.example") == 401)
        #expect(try ask(tokens[1]) == "HTTP/1.1 200")
        #expect(try exporter.get("/api/v1/history", ["Authorization: Bearer \(tokens[1])"]).body.contains("\"interval_ms\":1000"))
        #expect(try exporter.getOverSocket("/metrics").status == 200)

        // A token that is none, and a file that is broken: all stays as it is.
        _ = try folder.write("token", "short\n")
        try reload("the configuration is not reloaded: \(token) holds no token: ")
        _ = try folder.write("token", tokens[0] + "\n")
        _ = try configuration("http-host = 1\n")
        try reload("the configuration is not reloaded: ", 2)
        #expect(try status(tokens[1], "two.example") == 200 && status(tokens[0], "two.example") == 401)
        #expect(!exporter.log.contains(tokens[0]) && !exporter.log.contains(tokens[1]))
        #expect(exporter.end() == .exited(0))
    }

    @Test func malformedRequests() throws {
        let exporter = try exporter()
        let good = "GET /metrics HTTP/1.1\r\nHost: localhost\r\n"
        let cases: [(String, [Int])] = [
            ("garbage\r\n\r\n", [400]), ("GET\r\n\r\n", [400]), ("GET /metrics HTTP/9.9\r\n\r\n", [400, 505]),
            ("\u{16}\u{3}\u{1}\u{2}\u{0}\u{1}\u{0}", [400]), ("GET /metrics HTTP/1.1\r\nHost localhost\r\n\r\n", [400]),
            (good + "X: a\u{0}b\r\n\r\n", [400]), (good + "X : 1\r\n\r\n", [400]),
            (good + "Content-Length: -1\r\n\r\n", [400]), (good + "Content-Length: 1\r\nContent-Length: 2\r\n\r\n", [400]),
            (good + "Content-Length: 99999999999999999999999\r\n\r\n", [400]),
            (good + "Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n", [400]),
            (good + "X: " + String(repeating: "a", count: 20_000) + "\r\n\r\n", [431]),
            (good + (0..<300).map { "X-\($0): 1\r\n" }.joined() + "\r\n", [431]),
            (good + (0..<50).map { "X-\($0): " + String(repeating: "b", count: 4000) + "\r\n" }.joined() + "\r\n", [431]),
            ("GET /" + String(repeating: "a", count: 100_000) + " HTTP/1.1\r\nHost: localhost\r\n\r\n", [400, 431]),
            (String(repeating: "a", count: 1_000_000), [400, 431]), ("\r\n\r\n\r\n GET", [400]),
        ]
        for (text, expected) in cases {
            let bytes = try exporter.raw(Array(text.utf8), thenClose: false)
            let shown = text.prefix(40)
            // A client that sends on after the answer may find its connection reset, and the answer gone with it.
            guard text.utf8.count < 60_000 || !bytes.isEmpty else { continue }
            let response = try #require(Response(bytes), "\(shown): \(bytes.count) bytes")
            #expect(expected.contains(response.status), "\(shown): \(response.status)")
            // One line, once.
            #expect(response.body.hasSuffix("\n") && response.body.split(separator: "\n").count == 1, "\(response.body)")
            #expect(!response.body.contains("HTTP/1.1 4"), "\(shown)")
        }
        try expectAlive(exporter, "malformed requests")
        // A client that goes away in the middle.
        for text in ["", "GET", "GET /metrics HTTP/1.1\r\nHos", good] {
            _ = try exporter.raw(Array(text.utf8), thenClose: true)
        }
        try expectAlive(exporter, "clients that went away")
    }

    /// Requests with bytes changed at random: whatever comes back, the server lives on.
    @Test func randomRequests() throws {
        let exporter = try exporter(["--http-timeout", "1s"])
        var random = SplitMix(20_26)
        let good = Array("GET /api/v1/vms HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nAccept: */*\r\n\r\n".utf8)
        for round in 0..<400 {
            var bytes = good
            for _ in 0..<Int.random(in: 1...6, using: &random) {
                switch Int.random(in: 0..<3, using: &random) {
                case 0: bytes[Int.random(in: 0..<bytes.count, using: &random)] = UInt8.random(in: 0...255, using: &random)
                case 1: bytes.remove(at: Int.random(in: 0..<bytes.count, using: &random))
                default: bytes.insert(UInt8.random(in: 0...255, using: &random), at: Int.random(in: 0..<bytes.count, using: &random))
                }
            }
            let answer = try exporter.raw(bytes, thenClose: true)
            if !answer.isEmpty { #expect(Response(answer) != nil, "round \(round)") }
        }
        try expectAlive(exporter, "random requests")
    }

    /// A request that does not get done is given up; one that takes its time within bounds is not.
    @Test func slowClients() throws {
        let exporter = try exporter(["--http-timeout", "1s"])
        let connection = try exporter.connect()
        let started = monotonicNanoseconds()
        // A byte now and then keeps no connection open.
        for byte in Array("GET /metrics HTTP/1.1".utf8) {
            var byte = byte
            guard unsafe Glibc.send(connection.raw, &byte, 1, Int32(MSG_NOSIGNAL)) == 1 else { break }
            if !waitReadable([connection.raw], timeoutMilliseconds: 200).isEmpty { break }
        }
        #expect(try Exporter.exchange(connection, []) == [])
        let seconds = Double(monotonicNanoseconds() - started) / 1e9
        #expect((0.9...4).contains(seconds), "\(seconds)")
        // The control: with more patience the same client is served.
        let patient = try self.exporter(["--http-timeout", "20s"])
        let slow = try patient.connect()
        for part in ["GET /metrics HT", "TP/1.1\r\nHost: loc", "alhost\r\nConnection: close\r\n"] {
            _ = unsafe Glibc.send(slow.raw, part, part.utf8.count, Int32(MSG_NOSIGNAL))
            #expect(waitReadable([slow.raw], timeoutMilliseconds: 700).isEmpty)
        }
        #expect(Response(try Exporter.exchange(slow, Array("\r\n".utf8)))?.status == 200)
        try expectAlive(exporter, "a slow client")
    }

    @Test func manyClients() throws {
        let exporter = try exporter()
        final class Box { let value: Descriptor; init(_ value: consuming Descriptor) { self.value = value } }
        var held: [Box] = []
        for _ in 0..<256 { held.append(Box(try exporter.connect())) }
        // One too many: told so, and let go. The server may not have taken all of the others yet.
        #expect(try eventually(milliseconds: 10_000) {
            held.append(Box(try exporter.connect()))
            guard !waitReadable([held[held.count - 1].value.raw], timeoutMilliseconds: 500).isEmpty else { return false }
            return Response(try Exporter.exchange(held[held.count - 1].value, []))?.status == 503
        })
        // A connection that it has serves on.
        let request = Array("GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".utf8)
        #expect(Response(try Exporter.exchange(held[0].value, request))?.status == 200)
        held = []
        #expect(try eventually { try exporter.get("/metrics").status == 200 })
    }
}
