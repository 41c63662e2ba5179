import ArgumentParser
import Configuration
import Glibc
import Host
import Metrics
import NIOCore
import Platform

/// A program of its own beside quired: HTTP is parsed where neither a guest's page nor the page store can be reached, and a
/// fault in here costs a scrape and no more.
@main
struct QuireExporter: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "quire-exporter",
        abstract: "Tells Prometheus, programs and people what Quire does on this host.",
        discussion: """
            Serves /metrics (Prometheus), /api/v1 (JSON; described in /api/v1/openapi.json) and a page at /. Only reads: the \
            status of running VMs, as far as its user may, and quired's figures.

            Any other address than loopback needs a token, which is sent as 'Authorization: Bearer TOKEN'. There is no TLS: \
            put a proxy in front where the network is not trusted.

            SIGHUP reads the configuration and the token's file again and applies them. Where it listens elsewhere then, connections \
            to the old address end. If something is wrong, one line says so, and all stays.

            Example: curl http://127.0.0.1:9750/metrics

            Exit status: 0 after SIGTERM or SIGINT, 1 on a failure (one line on stderr says why), 64 on wrong usage.
            """,
        version: "quire-exporter \(quireVersion)")

    @Option(help: ArgumentHelp("The configuration (default: /etc/quire/quire.toml, or in etc of where quire-exporter is installed); options beat it.", valueName: "file"))
    var config: String?

    @Option(help: ArgumentHelp("Address and port to listen on, such as 127.0.0.1:9750 or [::1]:9750; or 'off' (default: 127.0.0.1:9750).", valueName: "address:port"))
    var http: String?

    @Option(help: ArgumentHelp("Unix socket to listen on as well, or 'off' (default: metrics.sock in $RUNTIME_DIRECTORY, which a service has, or in quired's directory).", valueName: "path"))
    var httpSocket: String?

    @Option(help: ArgumentHelp("A file with a token of 16 bytes or more, which everybody on the TCP port has to send.", valueName: "path"))
    var httpTokenFile: String?

    @Option(help: ArgumentHelp("A name by which browsers and programs reach this server. Repeatable.", valueName: "name"))
    var httpHost: [String] = []

    @Option(
        help: ArgumentHelp("How long a request may take to arrive, and its answer to be taken (default: 30s).", valueName: "time"),
        transform: Keys.Exporter.httpTimeout.argument)
    var httpTimeout: String?

    @Option(
        help: ArgumentHelp("Time between the pictures that are kept, 60 of them; each costs what a scrape does (default: 15s).", valueName: "time"),
        transform: Keys.Exporter.historyInterval.argument)
    var historyInterval: String?

    @Option(help: ArgumentHelp("quired's socket (default: as for quire run).", valueName: "path"))
    var store: String?

    @Option(help: ArgumentHelp("Look for VMs in this runtime directory only. Repeatable (default: those of all users for root and the service, your own otherwise).", valueName: "path"))
    var runtimeDirectory: [String] = []

    /// What file and command line say together.
    private struct Wanted {
        let settings: Resolution
        let doors: Doors.Wanted
        let storePath: String
        let folders: [String]
        let directories: RuntimeDirectories
        var history: History { History(intervalMilliseconds: settings.value(Keys.Exporter.historyInterval)) }
    }

    private func wanted() throws(QuireError) -> Wanted {
        let arguments: [String: RawValue?] = [
            Keys.Exporter.http.name: .argument(http), Keys.Exporter.httpHost.name: .arguments(httpHost),
            Keys.Exporter.httpTimeout.name: .argument(httpTimeout), Keys.Exporter.historyInterval.name: .argument(historyInterval),
        ]
        let settings = try ConfigurationFile.read(config).resolve(.exporter, arguments.compactMapValues { $0 })
        let rules = try values(settings)
        let name = settings.value(Keys.Exporter.http)
        // A port that everybody reaches has its token.
        let address = try tcpAddress(name, rules.gate.token)
        let socketPath = try unixPath(httpSocket ?? settings[Keys.Exporter.httpSocket])
        let doors = Doors.Wanted(
            tcp: address.map { (name: name, address: $0) }, socketPath: socketPath, tcpRules: rules, socketRules: onSocket(rules))
        guard doors.tcp != nil || doors.socketPath != nil else {
            throw QuireError(.invalid, "there is nothing to listen on: --http and --http-socket are both off")
        }
        let folders = runtimeDirectory.isEmpty ? settings[Keys.Exporter.runtimeDirectory] ?? [] : runtimeDirectory
        let directories = folders.isEmpty ? try RuntimeDirectories.standard() : RuntimeDirectories(folders)
        return Wanted(
            settings: settings, doors: doors, storePath: store ?? settings[Keys.Exporter.store] ?? StoreLink.standardPath(),
            folders: folders, directories: directories)
    }

    /// Keys whose options are not among the arguments above: their paths may be relative, which the file's are not.
    private var keysGivenAsPaths: Set<String> {
        let given: [String: Bool] = [
            Keys.Exporter.httpSocket.name: httpSocket != nil, Keys.Exporter.httpTokenFile.name: httpTokenFile != nil,
            Keys.Exporter.store.name: store != nil, Keys.Exporter.runtimeDirectory.name: !runtimeDirectory.isEmpty,
        ]
        return Set(given.filter { $0.value }.keys)
    }

    func run() throws {
        do { try serve() } catch let error as QuireError {
            writeStandardError("quire-exporter: \(error)")
            throw ExitCode(1)
        }
    }

    private func serve() throws {
        ProcessCalls.ignoreBrokenPipes()
        ProcessCalls.raiseFileLimit()
        // Before any thread.
        let signals = try SignalDescriptor([SIGTERM, SIGINT, SIGHUP])
        var wanted = try wanted()
        let collector = try Collector(wanted.directories, storePath: wanted.storePath, history: wanted.history)
        let server = WebServer(Web(collector))
        var doors = Doors(server)
        try doors.open(wanted.doors)
        serving: while true {
            _ = waitReadable([signals.descriptor.raw])
            while let event = signals.next() {
                guard event.number == SIGHUP else { break serving }
                do throws(QuireError) {
                    let new = try self.wanted()
                    try doors.open(new.doors)
                    // What remains cannot fail.
                    if new.folders != wanted.folders { collector.setDirectories(new.directories) }
                    if new.storePath != wanted.storePath { collector.setStore(path: new.storePath) }
                    if new.history.intervalMilliseconds != wanted.history.intervalMilliseconds { collector.setHistory(new.history) }
                    let hidden = keysGivenAsPaths
                    for change in new.settings.changes(since: wanted.settings) where !hidden.contains(change.key.name) {
                        writeStandardError("quire-exporter: \(change.line)")
                    }
                    wanted = new
                } catch { writeStandardError("quire-exporter: the configuration is not reloaded: \(error)") }
            }
        }
        doors.close()
        server.end()
        collector.end()
    }

    /// For the TCP port.
    private func values(_ settings: Resolution) throws(QuireError) -> WebServer.Rules.Values {
        let hosts = Set((settings[Keys.Exporter.httpHost] ?? []).map { $0.lowercased() })
        return WebServer.Rules.Values(
            gate: Gate(hosts: hosts, token: try readToken(httpTokenFile ?? settings[Keys.Exporter.httpTokenFile])),
            patience: .milliseconds(Int64(settings.value(Keys.Exporter.httpTimeout))))
    }

    private func onSocket(_ values: WebServer.Rules.Values) -> WebServer.Rules.Values {
        WebServer.Rules.Values(gate: Gate(hosts: values.gate.hosts.union(["localhost"])), patience: values.patience)
    }

    private func readToken(_ path: String?) throws(QuireError) -> [UInt8]? {
        guard let path else { return nil }
        let token = try Array(Files.read(path, limit: 4096).utf8.prefix { $0 != 0x0A })
        guard token.count >= 16, token.allSatisfy({ (0x21...0x7E).contains($0) }) else {
            throw QuireError(
                .invalid, "\(path) holds no token: write one line of at least 16 printable characters without blanks, such as 'openssl rand -hex 24' prints")
        }
        return token
    }

    private func tcpAddress(_ http: String, _ token: [UInt8]?) throws(QuireError) -> SocketAddress? {
        guard http != "off" else { return nil }
        guard let colon = http.lastIndex(of: ":"), let port = UInt16(http[http.index(after: colon)...]) else {
            throw QuireError(.invalid, "--http \(http): give ADDRESS:PORT, such as 127.0.0.1:9750, or off")
        }
        var host = String(http[..<colon])
        if host.hasPrefix("["), host.hasSuffix("]") { host = String(host.dropFirst().dropLast()) }
        if host == "localhost" { host = "127.0.0.1" }
        guard let address = try? SocketAddress(ipAddress: host, port: Int(port)) else {
            throw QuireError(.invalid, "--http \(http): '\(host)' is no address, give one in figures such as 127.0.0.1:9750")
        }
        let isLoopback = host.hasPrefix("127.") || host == "::1"
        guard isLoopback || token != nil else {
            throw QuireError(.invalid, "--http \(http) is not loopback: give --http-token-file, so that not everybody can read it")
        }
        return address
    }

    /// Unless told otherwise in the folder that systemd has made for the service, and without one beside quired's socket.
    private func unixPath(_ path: String?) throws(QuireError) -> String? {
        if path == "off" { return nil }
        if let path { return path }
        if let own = ProcessCalls.environment("RUNTIME_DIRECTORY"), own.hasPrefix("/") { return own + "/metrics.sock" }
        let store = StoreLink.standardPath()
        guard let slash = store.lastIndex(of: "/") else { return nil }
        let folder = String(store[..<slash])
        try Files.makeDirectory(folder, mode: 0o750)
        return folder + "/metrics.sock"
    }
}
