import Host
import Platform

/// The pages of the server and what is behind them: a request in, an answer out, no sockets.
public struct Web: Sendable {
    public struct Request: Sendable {
        public var method: String
        /// The path and what follows it, as it came.
        public var target: String
        public var headers: [(name: String, value: String)]

        public init(method: String, target: String, headers: [(name: String, value: String)]) {
            self.method = method
            self.target = target
            self.headers = headers
        }

        /// Without the query, which nothing here has.
        var path: Substring { target.prefix { $0 != "?" } }

        /// Of a header, whose name is given in lower case.
        func values(_ name: String) -> [String] {
            headers.filter { $0.name.lowercased() == name }.map { $0.value.trimmed }
        }
    }

    public struct Answer: Sendable {
        public var status: Int
        public var headers: [(name: String, value: String)]
        public var body: [UInt8]

        init(_ status: Int, _ type: String, _ body: [UInt8], _ more: [(name: String, value: String)] = []) {
            self.status = status
            self.body = body
            headers = [("Content-Type", type), ("Content-Length", "\(body.count)")] + Self.always + more
        }

        /// One line that says what is wrong.
        public static func problem(_ status: Int, _ line: String, _ more: [(name: String, value: String)] = []) -> Answer {
            Answer(status, "text/plain; charset=utf-8", Array((line + "\n").utf8), more)
        }

        /// Nothing from elsewhere, nothing inline, no frames, no guessing of types, no copies.
        private static let always: [(name: String, value: String)] = [
            (
                "Content-Security-Policy",
                "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
                    + "form-action 'none'; frame-ancestors 'none'"
            ),
            ("Cross-Origin-Resource-Policy", "same-origin"), ("Cross-Origin-Opener-Policy", "same-origin"),
            ("X-Content-Type-Options", "nosniff"), ("Referrer-Policy", "no-referrer"), ("Cache-Control", "no-store"),
        ]
    }

    private let collector: Collector

    public init(_ collector: Collector) { self.collector = collector }

    private static let pages: [String: (type: String, bytes: [UInt8])] = [
        "/": ("text/html; charset=utf-8", PackageResources.index_html),
        "/page.css": ("text/css; charset=utf-8", PackageResources.page_css),
        "/page.js": ("text/javascript; charset=utf-8", PackageResources.page_js),
        "/api/v1/openapi.json": ("application/json", PackageResources.openapi_json),
    ]

    /// Calls `done` once, on this thread or on the collector's.
    public func answer(_ request: Request, at gate: Gate, _ done: @escaping @Sendable (Answer) -> Void) {
        if let refusal = gate.refusal(of: request) { return done(refusal) }
        if let page = Self.pages[String(request.path)] { return done(Answer(200, page.type, page.bytes)) }
        guard let data = Self.data(String(request.path)) else {
            return done(.problem(404, "there is nothing here: see /, /metrics and /api/v1/openapi.json"))
        }
        if let refusal = gate.refusalOfData(request) { return done(refusal) }
        collector.ask { done(data($0)) }
    }

    private static func json(_ value: some Encodable) -> Answer { Answer(200, "application/json", API.json(value)) }

    /// What makes the answer; nil if there is nothing at this path.
    private static func data(_ path: String) -> (@Sendable (Collector.Findings) -> Answer)? {
        switch path {
        case "/metrics":
            return { Answer(200, "text/plain; version=0.0.4; charset=utf-8", Array(Exposition.text($0.host).utf8)) }
        case "/api/v1/host": return { json(API.HostAnswer(host: $0.host)) }
        case "/api/v1/vms": return { json($0.host.vms) }
        case "/api/v1/groups": return { json($0.host.groups.map(API.GroupAnswer.init)) }
        case "/api/v1/shared-disks": return { json($0.host.sharedDisks) }
        case "/api/v1/history": return { json($0.history) }
        default:
            // /api/v1/vms/UID/NAME
            let parts = path.split(separator: "/", omittingEmptySubsequences: false)
            guard parts.count == 6, path.hasPrefix("/api/v1/vms/"), let uid = UInt32(parts[4]),
                RuntimeDirectory.isValidName(String(parts[5]))
            else { return nil }
            let id = VM.ID(uid: uid, name: String(parts[5]))
            return { found in
                guard let vm = found.host.vms.first(where: { $0.id == id }) else {
                    return .problem(404, "user \(uid) runs no VM of that name: /api/v1/vms lists those that run")
                }
                return json(vm)
            }
        }
    }
}

extension String {
    /// Without blanks at either end.
    var trimmed: String {
        var text = Substring(self)
        while let first = text.first, first == " " || first == "\t" { text.removeFirst() }
        while let last = text.last, last == " " || last == "\t" { text.removeLast() }
        return String(text)
    }
}
