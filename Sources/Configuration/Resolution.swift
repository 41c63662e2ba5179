import Platform

/// What holds: of each key the value that has the say, and where it comes from.
public struct Resolution: Sendable {
    public enum Origin: Sendable, Equatable, CustomStringConvertible {
        case commandLine
        case file(key: String, path: String, line: Int?)
        case builtIn

        public var description: String {
            switch self {
            case .commandLine: "command line"
            case .file(let key, let path, let line): key + " (\(path)" + (line.map { ":\($0)" } ?? "") + ")"
            case .builtIn: "default"
            }
        }
    }

    public struct Item: Sendable {
        public let key: any AnyKey
        /// As TOML; where there is neither a value nor a default that could be written, in words.
        public let text: String
        public let origin: Origin
        fileprivate let raw: RawValue?
    }

    public let items: [Item]
    private let scope: Scope

    /// Nil: nothing says so, and there is no default.
    public subscript<Value>(key: Key<Value>) -> Value? {
        items.first { $0.key.name == key.name }?.raw.flatMap(key.form.read) ?? key.builtIn
    }

    /// Of a key with a default.
    public func value<Value>(_ key: Key<Value>) -> Value { self[key]! }

    /// Whether file or command line say something.
    public func isSet<Value>(_ key: Key<Value>) -> Bool { items.first { $0.key.name == key.name }?.raw != nil }

    fileprivate init(_ scope: Scope, _ file: ConfigurationFile, _ arguments: [String: RawValue]) throws(QuireError) {
        self.scope = scope
        var items: [Item] = []
        for key in scope.keys {
            if let raw = arguments[key.name] {
                guard let text = key.normalized(raw) else {
                    throw QuireError(.invalid, "--\(key.name) \(raw.words): give \(key.allowed)")
                }
                items.append(Item(key: key, text: text, origin: .commandLine, raw: raw))
                continue
            }
            let found = scope.sections.lazy.map { $0.appending(key.name) }.compactMap { path in file.entries[path].map { (path, $0) } }.first
            if let (path, entry) = found {
                let origin = Origin.file(key: "\(path)", path: file.path, line: entry.line)
                items.append(Item(key: key, text: key.normalized(entry.raw) ?? entry.raw.written, origin: origin, raw: entry.raw))
            } else {
                items.append(Item(key: key, text: key.otherwiseText, origin: .builtIn, raw: nil))
            }
        }
        self.items = items
    }

    /// A key that says something else than before.
    public struct Change: Sendable {
        public let key: any AnyKey
        /// Where it stands, or would.
        public let path: String
        public let before: String
        public let after: String

        /// For the log, and for whoever asked for the reload.
        public var line: String { line(waits: !key.isLive) }
        /// `waits`: it holds from the next start on, and not before.
        public func line(waits: Bool) -> String { line(from: waits ? "from the next start on" : nil) }
        /// `from`: when it holds; nil: from now on.
        public func line(from: String?) -> String { "\(path): \(before) -> \(after)" + (from.map { ", \($0)" } ?? "") }
    }

    public func changes(since old: Resolution) -> [Change] {
        zip(items, old.items).compactMap { new, old in
            guard new.text != old.text else { return nil }
            let path: String =
                if case .file(let key, _, _) = new.origin { key } else if case .file(let key, _, _) = old.origin { key } else {
                    "\(scope.sections[0].appending(new.key.name))"
                }
            return Change(key: new.key, path: path, before: old.text, after: new.text)
        }
    }
}

extension ConfigurationFile {
    /// `arguments`: what a command line says, by option; it beats the file, and the VM's section beats [backend].
    public func resolve(_ scope: Scope, _ arguments: [String: RawValue] = [:]) throws(QuireError) -> Resolution {
        try Resolution(scope, self, arguments)
    }
}

extension RawValue {
    /// As it was typed.
    fileprivate var words: String {
        switch self {
        case .argument(let text): text
        case .list(let values): values.map(\.words).joined(separator: " ")
        default: written
        }
    }

    /// Options of a command line: nil where it does not say anything.
    public static func argument(_ text: String?) -> RawValue? { text.map { .argument($0) } }
    public static func argument(_ flag: Bool?) -> RawValue? { flag.map { .flag($0) } }
    public static func arguments(_ list: [String]) -> RawValue? { list.isEmpty ? nil : .list(list.map { .argument($0) }) }
}
