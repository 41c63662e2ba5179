import CPlatform
import Glibc
import Platform

/// Who may read.
///
/// The server tells the names and figures of all VMs. On a Unix socket the file's rights decide. On a TCP port anybody who
/// can connect may read, so without a token it listens on loopback only. A browser can connect as well, on behalf of any
/// site that its user looks at, and three rules keep such sites out:
///
/// - *The name in Host* must be one that only we have: an address, `localhost`, or one that the operator names. A site that
///   has its own name resolve to our address (DNS rebinding) is of the same origin as we are to the browser, but cannot
///   keep its name out of Host.
/// - *Requests that another site causes* are refused where the browser says so (Sec-Fetch-Site, Origin).
/// - *No answer may be embedded or read by another origin*: no CORS headers, Cross-Origin-Resource-Policy, no frames.
public struct Gate: Sendable {
    /// Names besides addresses and `localhost`, in lower case.
    public var hosts: Set<String>
    /// What data costs on this address; nil: nothing.
    public var token: [UInt8]?

    public init(hosts: Set<String> = [], token: [UInt8]? = nil) {
        self.hosts = hosts
        self.token = token
    }

    /// Nil: it may pass.
    func refusal(of request: Web.Request) -> Web.Answer? {
        guard request.method == "GET" || request.method == "HEAD" else {
            return .problem(405, "this is for reading: use GET or HEAD", [("Allow", "GET, HEAD")])
        }
        let named = request.values("host")
        guard named.count == 1 else { return .problem(400, "a request has one Host header, this one has \(named.count)") }
        guard isOurs(named[0]) else {
            return .problem(421, "this is not the host that Host names: use an address, or name it with --http-host")
        }
        // A link from elsewhere to the page itself does no harm.
        let isVisit = request.path == "/" && request.values("sec-fetch-mode") == ["navigate"]
        for site in request.values("sec-fetch-site") where site != "same-origin" && site != "none" && !isVisit {
            return .problem(403, "another site asked for this")
        }
        for origin in request.values("origin") where origin.lowercased() != "http://" + named[0].lowercased() {
            return .problem(403, "another site asked for this")
        }
        return nil
    }

    /// The same for data.
    func refusalOfData(_ request: Web.Request) -> Web.Answer? {
        guard let token else { return nil }
        let prefix = "bearer "
        let given = request.values("authorization")
        guard given.count == 1, given[0].lowercased().hasPrefix(prefix) else {
            return .problem(401, "a token is needed: send 'Authorization: Bearer TOKEN'", [("WWW-Authenticate", "Bearer")])
        }
        guard Self.isEqual(Array(given[0].utf8.dropFirst(prefix.utf8.count)), token) else {
            return .problem(401, "the token is wrong", [("WWW-Authenticate", "Bearer error=\"invalid_token\"")])
        }
        return nil
    }

    private func isOurs(_ named: String) -> Bool {
        guard let host = Self.host(of: named.lowercased()) else { return false }
        return host == "localhost" || Self.isAddress(host) || hosts.contains(host)
    }

    /// Without the port; nil if it is malformed.
    static func host(of text: String) -> String? {
        let end: String.Index
        if text.hasPrefix("[") {
            guard let close = text.firstIndex(of: "]") else { return nil }
            end = text.index(after: close)
        } else {
            end = text.firstIndex(of: ":") ?? text.endIndex
        }
        let rest = text[end...]
        guard rest.isEmpty || (rest.first == ":" && rest.dropFirst().utf8.allSatisfy { (0x30...0x39).contains($0) }) else {
            return nil
        }
        return String(text[..<end])
    }

    /// An IPv4 address, or one of IPv6 in brackets.
    static func isAddress(_ host: String) -> Bool {
        if host.hasPrefix("["), host.hasSuffix("]") { return isIPv6(String(host.dropFirst().dropLast())) }
        return isIPv4(host)
    }

    private static func isIPv4(_ text: String) -> Bool {
        var bytes = in_addr()
        return unsafe inet_pton(AF_INET, text, &bytes) == 1
    }
    private static func isIPv6(_ text: String) -> Bool {
        var bytes = in6_addr()
        return unsafe inet_pton(AF_INET6, text, &bytes) == 1
    }

    /// Takes as long whatever the bytes are, as long as there are as many of them.
    static func isEqual(_ a: [UInt8], _ b: [UInt8]) -> Bool {
        guard a.count == b.count else { return false }
        return unsafe cp_equal_secret(a, b, a.count)
    }
}
