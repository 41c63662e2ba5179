import Glibc
import Platform
import TOMLKit

/// What is wrong in a configuration.
public struct Finding: Sendable, Equatable {
    /// Of the key; empty where the file as a whole cannot be read.
    public let key: String
    public let line: Int?
    /// What is wrong, and what is allowed.
    public let text: String
}

/// The configuration of a host: one file, in TOML.
///
///     [quired]      the page store
///     [backend]     defaults of all VMs
///     [vm.NAME]     what differs for one of them
///     [exporter]    metrics
///
/// Every key is looked at when it is read, and everything that is wrong is found, not only the first.
public struct ConfigurationFile: Sendable {
    public let path: String
    public let text: String
    /// By line.
    public private(set) var findings: [Finding] = []

    struct Entry: Sendable, Equatable {
        let raw: RawValue
        let line: Int?
    }
    private(set) var entries: [DottedPath: Entry] = [:]

    // MARK: - Reading

    private static let limit = 1 << 20

    /// $PREFIX/etc/quire/quire.toml of what is installed in $PREFIX/bin; /etc/quire/quire.toml for the host's own prefixes, as `make
    /// install` has it, and for a program that is where it was built.
    public static let standardPath = standardPath(program: Files.target(ofLink: "/proc/self/exe") ?? "")

    package static func standardPath(program: String) -> String {
        let folders = program.split(separator: "/").dropLast()
        let prefix = folders.last == "bin" ? folders.dropLast().map { "/" + $0 }.joined() : ""
        return (["/usr", "/usr/local"].contains(prefix) ? "" : prefix) + "/etc/quire/quire.toml"
    }

    /// Whatever is wrong in it is in `findings`. Throws if it cannot be read or must not be believed.
    /// `reader`: whose word it is; 0 also for a user that root's service has.
    public static func look(at path: String, reader: UInt32 = ProcessCalls.ownUID) throws(QuireError) -> ConfigurationFile {
        let file: Descriptor
        // Of a pipe there would be nothing to read, and long to wait.
        do throws(QuireError) { file = try Descriptor.open(path, O_RDONLY | O_NONBLOCK) } catch {
            throw QuireError(.invalid, "cannot read the configuration \(path)", errno: error.errno)
        }
        let status = try file.status()
        guard status.isRegularFile else { throw QuireError(.invalid, "\(path) is no file: name a configuration with --config") }
        try checkTrust(path, status, reader: reader)
        let bytes = try file.readAll(limit: limit + 1)
        guard bytes.count <= limit else { throw QuireError(.invalid, "\(path) has more than 1 MiB: that is no configuration") }
        guard let text = String(validating: bytes, as: UTF8.self), !bytes.contains(0) else {
            throw QuireError(.invalid, "\(path) is not UTF-8 text: save it as such")
        }
        return ConfigurationFile(path: path, text: text)
    }

    /// Who may write it says what root does.
    package static func checkTrust(_ path: String, _ status: FileStatus, reader: UInt32) throws(QuireError) {
        guard reader == 0 else { return }
        guard status.uid == 0 else {
            throw QuireError(.invalid, "\(path) belongs to user \(status.uid), who could have root do anything: chown root \(path)")
        }
        guard status.mode & 0o022 == 0 else {
            throw QuireError(.invalid, "\(path) can be written by others than root: chmod go-w \(path)")
        }
    }

    /// A file in which all is well. `path`: what was asked for, which has to be there (/dev/null: nothing is configured); nil: where
    /// it is by default, if it is.
    public static func read(_ path: String?, reader: UInt32 = ProcessCalls.ownUID) throws(QuireError) -> ConfigurationFile {
        let name = path ?? standardPath
        if name == "/dev/null" || path == nil && !Files.exists(name) { return ConfigurationFile(path: name, text: "") }
        let file = try look(at: name, reader: reader)
        try file.check()
        return file
    }

    /// Throws the first finding.
    public func check() throws(QuireError) {
        guard let first = findings.first else { return }
        let more = findings.count == 1 ? "" : " (and \(findings.count - 1) more: quire config check \(path))"
        throw QuireError(.invalid, describe(first) + more)
    }

    /// One line.
    public func describe(_ finding: Finding) -> String {
        path + (finding.line.map { ":\($0)" } ?? "") + ": " + (finding.key.isEmpty ? "" : finding.key + ": ") + finding.text
    }

    // MARK: - Parsing

    public init(path: String, text: String) {
        self.path = path
        self.text = text
        guard !text.isEmpty else { return }
        let root: TOMLTable
        do { root = try TOMLTable(string: text) } catch {
            let known = error as? TOMLParseError
            let what = (known?.description ?? "\(error)").replacing("Error while parsing ", with: "").replacing("\n", with: " ")
            findings = [Finding(key: "", line: known?.source.begin.line, text: "no TOML: \(what)")]
            return
        }
        let places = KeyPlaces(text)
        for (name, value) in root {
            let path: DottedPath = [name]
            switch name {
            case "quired": take(value, at: path, .quired, places)
            case "backend": take(value, at: path, .backend, places)
            case "exporter": take(value, at: path, .exporter, places)
            case "vm":
                guard let machines = value.table else {
                    find(path, places, "write [vm.NAME], with what differs for that VM")
                    continue
                }
                for (name, value) in machines {
                    let path = path.appending(name)
                    guard PlainName.isValid(name) else {
                        find(path, places, "no VM has that name: use 1 to 63 of A-Z a-z 0-9 . _ - that do not start with a dot")
                        continue
                    }
                    take(value, at: path, .vm(name), places, "write [\(path)], with what differs for that VM")
                }
            default: find(path, places, "unknown section: there are [quired], [backend], [vm.NAME] and [exporter]")
            }
        }
        findings.sort { ($0.line ?? 0, $0.key) < ($1.line ?? 0, $1.key) }
    }

    private mutating func take(
        _ value: any TOMLValueConvertible, at path: DottedPath, _ scope: Scope, _ places: KeyPlaces, _ advice: String? = nil
    ) {
        guard let table = value.table else { return find(path, places, advice ?? "write [\(path)], and its keys below") }
        for (name, value) in table {
            let path = path.appending(name)
            guard let key = scope.keys.first(where: { $0.name == name }) else {
                let known = scope.keys.map(\.name).sorted().joined(separator: ", ")
                find(path, places, "unknown key: choose one of \(known)")
                continue
            }
            let raw = Self.raw(value)
            guard key.normalized(raw) != nil else {
                find(path, places, "\(raw.written) is not allowed: give \(key.allowed)")
                continue
            }
            entries[path] = Entry(raw: raw, line: places[path])
        }
    }

    private mutating func find(_ path: DottedPath, _ places: KeyPlaces, _ text: String) {
        findings.append(Finding(key: "\(path)", line: places[path], text: text))
    }

    private static func raw(_ value: any TOMLValueConvertible) -> RawValue {
        switch value.type {
        case .string: .text(value.string ?? "")
        case .int: .integer(value.int ?? 0)
        case .double: .real(value.double ?? .nan)
        case .bool: .flag(value.bool ?? false)
        case .array: .list((value.array.map { Array($0) } ?? []).map { raw($0) })
        case .table: .other("a table")
        case .date, .time, .dateTime: .other("a date or time")
        }
    }

    /// VMs that have a section.
    public var machines: [String] {
        Set(entries.keys.filter { $0.parts.first == "vm" }.map { $0.parts[1] }).sorted()
    }
}
