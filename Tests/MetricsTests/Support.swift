import Glibc
import Host
import Platform
import StoreProtocol
import TestSupport

/// The package, by the place of this file.
let top: String = {
    var path = Substring(#filePath)
    for _ in 0..<3 { path = path[..<(path.lastIndex(of: "/") ?? path.startIndex)] }
    return String(path)
}()

/// Installed, or what scripts/prerequisites got.
let promtool: String = {
    let cache = ProcessCalls.environment("XDG_CACHE_HOME") ?? (ProcessCalls.environment("HOME") ?? "/root") + "/.cache"
    let own = cache + "/quire/bin/promtool"
    return Files.isExecutable(own) ? own : "promtool"
}()

struct Trouble: Error, CustomStringConvertible {
    let description: String
    init(_ description: String) { self.description = description }
}

/// A folder of a test's own; gone with the value.
final class Folder {
    let path: String
    init() throws {
        path = "/tmp/quire-metrics-\(ProcessCalls.ownPID)-\(UInt32.random(in: 0 ... .max))"
        try Files.makeDirectory(path, mode: 0o700)
    }
    deinit { Self.remove(path) }

    static func remove(_ path: String) {
        for name in Files.list(path) ?? [] {
            let inner = path + "/" + name
            if Files.target(ofLink: inner) == nil && Files.isDirectory(inner) { remove(inner) } else { Files.remove(inner) }
        }
        Files.removeDirectory(path)
    }

    func write(_ name: String, _ text: String) throws -> String {
        let file = try Descriptor.open(path + "/" + name, O_RDWR | O_CREAT | O_TRUNC)
        try file.replaceContent(text)
        return path + "/" + name
    }
}

/// Runs a command to its end: its status, and stdout and stderr in one text.
func command(_ arguments: [String], _ variables: [String: String] = [:], limit: Int = 1 << 24) throws -> (status: Int32, text: String) {
    var pipe = try Pipe()
    let writer = pipe.takeWriter(), reader = pipe.takeReader()
    var options = ChildProcess.Options()
    options.passing = [.init(from: writer.raw, to: 1), .init(from: writer.raw, to: 2)]
    options.variables = variables
    var child = try ChildProcess(arguments, options)
    _ = consume writer
    let text = String(decoding: try reader.readAll(limit: limit), as: UTF8.self)
    return (child.wait().shellStatus, text)
}

struct Response {
    let status: Int
    let headers: [String: String]
    let body: String

    /// Of everything that a server sent until it closed the connection.
    init?(_ bytes: [UInt8]) {
        let text = String(decoding: bytes, as: UTF8.self)
        guard let end = text.firstRange(of: "\r\n\r\n") else { return nil }
        let lines = text[..<end.lowerBound].split(separator: "\r\n")
        let words = lines.first?.split(separator: " ") ?? []
        guard words.count >= 2, words[0] == "HTTP/1.1", let status = Int(words[1]) else { return nil }
        self.status = status
        var headers: [String: String] = [:]
        for line in lines.dropFirst() {
            guard let colon = line.firstIndex(of: ":") else { return nil }
            headers[line[..<colon].lowercased()] = line[line.index(after: colon)...].drop { $0 == " " }.description
        }
        self.headers = headers
        body = String(text[end.upperBound...])
    }
}

/// A program that a test started, its stdout and stderr in a file; ended with the value.
final class Running {
    private var process: ChildProcess
    let log: String

    init(_ arguments: [String], log: String) throws {
        self.log = log
        let file = try Descriptor.open(log, O_RDWR | O_CREAT | O_APPEND)
        var options = ChildProcess.Options()
        options.parentDeathSignal = SIGTERM
        options.passing = [.init(from: file.raw, to: 1), .init(from: file.raw, to: 2)]
        process = try ChildProcess(arguments, options)
    }

    var pid: Int32 { process.pid }
    var text: String { (try? Files.read(log)) ?? "" }
    var isRunning: Bool { process.poll() == nil }
    func signal(_ number: Int32) { process.signal(number) }
    @discardableResult func end() -> ProcessEnd {
        if process.poll() == nil { process.signal(SIGTERM) }
        return process.wait()
    }
    deinit { end() }
}

/// quired in a folder of its own.
final class Quired {
    let folder: Folder
    private let process: Running
    var path: String { folder.path + "/store.sock" }

    init(_ more: [String] = []) throws {
        folder = try Folder()
        process = try Running(
            [products + "quired", "--directory", folder.path, "--config", "/dev/null", "--limit", "256M", "--candidates", "1M"] + more,
            log: folder.path + "/log")
        guard eventually(milliseconds: 20_000, { (try? figures()) != nil }) else { throw Trouble("quired: \(process.text)") }
    }

    func figures() throws -> StoreFigures { try StoreClient.figures(path: path) }
    func signal(_ number: Int32) { process.signal(number) }
}

/// quire-exporter on a port of the kernel's choice and on a Unix socket.
final class Exporter {
    let folder: Folder
    let port: UInt16
    private let process: Running
    var socket: String { folder.path + "/metrics.sock" }
    var url: String { "http://127.0.0.1:\(port)/" }

    convenience init(_ directories: [String], store: String = "/nonexistent/store.sock", _ more: [String] = []) throws {
        let folder = try Folder()
        try self.init(
            in: folder,
            ["--config", "/dev/null", "--http", "127.0.0.1:0", "--http-socket", folder.path + "/metrics.sock", "--store", store]
                + directories.flatMap { ["--runtime-directory", $0] } + more)
    }

    /// With options that have it listen there, too, or name a configuration that does.
    init(in folder: Folder, _ options: [String]) throws {
        self.folder = folder
        process = try Running([products + "quire-exporter"] + options, log: folder.path + "/log")
        let prefix = "quire-exporter: listening on http://127.0.0.1:"
        var found: UInt16?
        let process = self.process, socketLine = "listening on \(folder.path)/metrics.sock"
        _ = eventually(milliseconds: 20_000) {
            let text = process.text
            guard text.contains(socketLine), let line = text.split(separator: "\n").first(where: { $0.hasPrefix(prefix) }) else {
                return !process.isRunning
            }
            found = UInt16(line.dropFirst(prefix.count).dropLast())
            return true
        }
        guard let found else { throw Trouble("quire-exporter: \(process.text)") }
        port = found
    }

    var pid: Int32 { process.pid }
    var log: String { process.text }
    var isRunning: Bool { process.isRunning }
    func signal(_ number: Int32) { process.signal(number) }
    func end() -> ProcessEnd { process.end() }

    /// A connection to the port.
    func connect() throws -> Descriptor { try Self.tcp(port, at: Self.loopback) }

    static let loopback: UInt32 = 0x7F00_0001

    /// A connection; or a socket that listens.
    static func tcp(_ port: UInt16, at host: UInt32, listens: Bool = false) throws -> Descriptor {
        let raw = Glibc.socket(AF_INET, Int32(SOCK_STREAM.rawValue) | Int32(SOCK_CLOEXEC.rawValue), 0)
        guard raw >= 0 else { throw QuireError.system("no socket") }
        let descriptor = Descriptor(owning: raw)
        var address = sockaddr_in()
        address.sin_family = sa_family_t(AF_INET)
        address.sin_port = port.bigEndian
        address.sin_addr.s_addr = host.bigEndian
        let size = socklen_t(MemoryLayout<sockaddr_in>.size)
        let code = unsafe withUnsafePointer(to: &address) { pointer in
            unsafe pointer.withMemoryRebound(to: sockaddr.self, capacity: 1) { place in
                unsafe listens ? Glibc.bind(raw, place, size) : Glibc.connect(raw, place, size)
            }
        }
        guard code == 0, !listens || Glibc.listen(raw, 8) == 0 else { throw QuireError.system("cannot use port \(port)") }
        return descriptor
    }

    /// Sends bytes as they are and reads until the server closes the connection, at most ten seconds.
    func raw(_ bytes: [UInt8], thenClose: Bool = false) throws -> [UInt8] {
        let connection = try connect()
        return try Self.exchange(connection, bytes, thenClose: thenClose)
    }

    static func exchange(_ connection: borrowing Descriptor, _ bytes: [UInt8], thenClose: Bool = false) throws -> [UInt8] {
        // The server may have had enough before we have sent everything.
        _ = unsafe bytes.withUnsafeBytes { unsafe Glibc.send(connection.raw, $0.baseAddress, $0.count, Int32(MSG_NOSIGNAL)) }
        if thenClose { shutdown(connection.raw, Int32(SHUT_WR)) }
        var all: [UInt8] = []
        let deadline = monotonicNanoseconds() + 10_000_000_000
        while monotonicNanoseconds() < deadline {
            guard !waitReadable([connection.raw], timeoutMilliseconds: 10_000).isEmpty else { break }
            var chunk = [UInt8](repeating: 0, count: 65536)
            let n = unsafe Glibc.recv(connection.raw, &chunk, chunk.count, 0)
            if n <= 0 { return all }
            all += chunk.prefix(n)
        }
        throw Trouble("the server did not close the connection; it sent \(String(decoding: all.prefix(200), as: UTF8.self))")
    }

    func get(_ path: String, _ headers: [String] = [], method: String = "GET", host: String? = nil) throws -> Response {
        let lines = ["\(method) \(path) HTTP/1.1", "Host: \(host ?? "127.0.0.1:\(port)")", "Connection: close"] + headers
        let bytes = try raw(Array((lines.joined(separator: "\r\n") + "\r\n\r\n").utf8))
        guard let response = Response(bytes) else { throw Trouble("no answer to \(path): \(bytes.count) bytes") }
        return response
    }

    func getOverSocket(_ path: String, at socketPath: String? = nil) throws -> Response {
        let socket = try UnixSocket.connect(to: socketPath ?? self.socket)
        let request = "GET \(path) HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        guard let response = Response(try Self.exchange(socket.descriptor, Array(request.utf8))) else { throw Trouble("no answer") }
        return response
    }
}

/// The samples of a text exposition: name and labels as written, and the value.
func samples(_ text: String) -> [String: String] {
    var found: [String: String] = [:]
    for line in text.split(separator: "\n") where !line.hasPrefix("#") {
        guard let blank = line.lastIndex(of: " ") else { continue }
        found[String(line[..<blank])] = String(line[line.index(after: blank)...])
    }
    return found
}
