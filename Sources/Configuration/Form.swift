import Platform

/// A value as it stands in the file or on a command line.
public enum RawValue: Sendable, Equatable {
    /// Of a command line: what it is, the key decides.
    case argument(String)
    case text(String)
    case integer(Int)
    case real(Double)
    case flag(Bool)
    case list([RawValue])
    /// What no key takes: a table, a date, a time.
    case other(String)

    /// As TOML writes it.
    var written: String {
        switch self {
        case .argument(let text): "'\(text)'"
        case .text(let text): Self.quoted(text)
        case .integer(let number): "\(number)"
        case .real(let number): "\(number)"
        case .flag(let flag): "\(flag)"
        case .list(let values): "[" + values.map(\.written).joined(separator: ", ") + "]"
        case .other(let what): what
        }
    }

    /// In one line, whatever is in it: it may come to a terminal.
    static func quoted(_ text: String) -> String {
        var result = "\""
        for scalar in text.unicodeScalars {
            switch scalar {
            case "\"": result += "\\\""
            case "\\": result += "\\\\"
            case _ where scalar.value < 0x20 || scalar.value == 0x7F || (0x80..<0xA0).contains(scalar.value):
                let hex = String(scalar.value, radix: 16, uppercase: true)
                result += "\\u" + String(repeating: "0", count: 4 - hex.count) + hex
            default: result.unicodeScalars.append(scalar)
            }
        }
        return result + "\""
    }
}

/// What a key may hold: how it is read, what is allowed, how it is written. The same for the file and for command lines.
public struct Form<Value: Sendable>: Sendable {
    /// Goes on from "give": `a time from 100ms to 1h, such as "10s"`.
    let allowed: String
    let read: @Sendable (RawValue) -> Value?
    /// As TOML.
    let write: @Sendable (Value) -> String

    fileprivate init(_ allowed: String, read: @escaping @Sendable (RawValue) -> Value?, write: @escaping @Sendable (Value) -> String) {
        self.allowed = allowed
        self.read = read
        self.write = write
    }

    /// Of what is written as a string.
    static func string(
        _ allowed: String, _ read: @escaping @Sendable (String) -> Value?, write: @escaping @Sendable (Value) -> String
    ) -> Form {
        Form(
            allowed,
            read: { raw in
                switch raw {
                case .text(let text), .argument(let text): read(text)
                default: nil
                }
            }, write: write)
    }

    /// Any number of them.
    func repeated(_ allowed: String) -> Form<[Value]> {
        Form<[Value]>(allowed) { raw in
            guard case .list(let elements) = raw else { return nil }
            let values = elements.compactMap(read)
            return values.count == elements.count ? values : nil
        } write: { values in
            "[" + values.map(write).joined(separator: ", ") + "]"
        }
    }
}

extension Form where Value == UInt64 {
    /// Milliseconds. A number without a unit is seconds, as on command lines.
    static func time(_ range: ClosedRange<UInt64>) -> Form {
        @Sendable func text(_ milliseconds: UInt64) -> String {
            for (letter, unit) in [("h", 3_600_000), ("m", 60_000)] as [(String, UInt64)]
            where milliseconds >= unit && milliseconds % unit == 0 { return "\(milliseconds / unit)\(letter)" }
            return milliseconds % 1000 == 0 ? "\(milliseconds / 1000)s" : "\(milliseconds)ms"
        }
        return Form("a time from \(text(range.lowerBound)) to \(text(range.upperBound)), such as \"10s\"") { raw in
            let milliseconds: UInt64? =
                switch raw {
                case .text(let text), .argument(let text): Size.milliseconds(text)
                case .integer(let seconds): seconds < 0 ? nil : Size.milliseconds("\(seconds)")
                default: nil
                }
            return milliseconds.flatMap { range.contains($0) ? $0 : nil }
        } write: { "\"\(text($0))\"" }
    }

    /// Bytes.
    static func size(_ range: ClosedRange<UInt64>, multipleOf unit: UInt64 = 1) -> Form {
        let whole = unit == 1 ? "" : " in whole pages of 4 KiB"
        return Form("a size from \(Size.exact(range.lowerBound)) to \(Size.exact(range.upperBound))\(whole), such as \"4G\"") { raw in
            let bytes: UInt64? =
                switch raw {
                case .text(let text), .argument(let text): Size.parse(text)
                case .integer(let bytes): UInt64(exactly: bytes)
                default: nil
                }
            return bytes.flatMap { range.contains($0) && $0 % unit == 0 ? $0 : nil }
        } write: { bytes in
            let text = Size.exact(bytes)
            return text.hasSuffix("bytes") ? "\(bytes)" : "\"\(text)\""
        }
    }
}

extension Form where Value == Int {
    static func number(_ range: ClosedRange<Int>) -> Form {
        Form("a whole number from \(range.lowerBound) to \(range.upperBound)") { raw in
            let number: Int? =
                switch raw {
                case .argument(let text): Int(text)
                case .integer(let number): number
                default: nil
                }
            return number.flatMap { range.contains($0) ? $0 : nil }
        } write: { "\($0)" }
    }
}

extension Form where Value == Double {
    static func factor(_ range: ClosedRange<Double>) -> Form {
        Form("a number from \(Int(range.lowerBound)) to \(Int(range.upperBound)), such as 1.5") { raw in
            let number: Double? =
                switch raw {
                case .argument(let text): Double(text)
                case .integer(let number): Double(number)
                case .real(let number): number
                default: nil
                }
            return number.flatMap { range.contains($0) ? $0 : nil }
        } write: { "\($0)" }
    }
}

extension Form where Value == Bool {
    static var flag: Form {
        Form("true or false") { raw in
            switch raw {
            case .flag(let flag): flag
            case .argument("true"): true
            case .argument("false"): false
            default: nil
            }
        } write: { "\($0)" }
    }
}

extension Form where Value == String {
    static func choice(_ words: [String]) -> Form {
        text("one of " + words.map { "\"\($0)\"" }.joined(separator: ", ")) { words.contains($0) }
    }

    static func text(_ allowed: String, where isAllowed: @escaping @Sendable (String) -> Bool) -> Form {
        string(allowed, { isAllowed($0) ? $0 : nil }, write: { RawValue.quoted($0) })
    }

    static var path: Form { text("a path that begins with /") { $0.hasPrefix("/") && !$0.contains("\0") } }

    /// A share group; the empty one is that of the VM's owner.
    static var group: Form { text("the name of a share group, or \"\"") { $0.isEmpty || PlainName.isValid($0) } }

    static var logLevel: Form { choice(["trace", "debug", "info", "notice", "warning", "error", "critical"]) }

    static var compression: Form {
        text("\"lz4\", \"zstd\" or \"zstd:LEVEL\" with a level of 1 to 19") { text in
            text == "lz4" || text == "zstd" || text.hasPrefix("zstd:") && Int(text.dropFirst(5)).map { (1...19).contains($0) } ?? false
        }
    }
}

/// A share group, and the users whose VMs may be in it.
public struct ShareGroup: Sendable, Equatable {
    public var name: String
    public var users: [UInt32]

    static let form = Form<ShareGroup>.string("\"NAME=UID,UID\"") { text in
        let parts = text.split(separator: "=", omittingEmptySubsequences: false).map(String.init)
        let users = parts.count == 2 ? parts[1].split(separator: ",", omittingEmptySubsequences: false).map { UInt32($0) } : []
        // Groups of that name are every user's own.
        guard !users.isEmpty, !users.contains(nil), PlainName.isValid(parts[0]), !parts[0].hasPrefix("owner-") else { return nil }
        return ShareGroup(name: parts[0], users: users.compactMap { $0 })
    } write: { RawValue.quoted("\($0.name)=" + $0.users.map { "\($0)" }.joined(separator: ",")) }
}

/// A shared disk: as quired makes it (with its size), or as a VM attaches it.
public struct DiskSetting: Sendable, Equatable {
    public var name: String
    public var byteCount: UInt64?
    /// Empty: that of quired's user.
    public var group = ""
    /// Of a guest that comes from elsewhere: the id of the content that it knows, in hexadecimal digits, or `any`.
    public var content: String?

    /// As a domain attaches it: NAME or NAME,size=SIZE.
    public init?(attached text: String) { self.init(text, keys: ["size"]) }

    init?(_ text: String, keys: Set<String>) {
        let parts = text.split(separator: ",", omittingEmptySubsequences: false).map(String.init)
        guard let name = parts.first, PlainName.isValid(name), name.utf8.count <= 32 else { return nil }
        self.name = name
        var seen: Set<String> = []
        for part in parts.dropFirst() {
            let pair = part.split(separator: "=", maxSplits: 1).map(String.init)
            guard pair.count == 2, keys.contains(pair[0]), seen.insert(pair[0]).inserted else { return nil }
            if pair[0] == "group" {
                guard PlainName.isValid(pair[1]) else { return nil }
                group = pair[1]
            } else if pair[0] == "content" {
                guard pair[1] == "any" || UInt64(pair[1], radix: 16) != nil else { return nil }
                content = pair[1]
            } else {
                guard let bytes = Size.parse(pair[1]), bytes % 4096 == 0, (1 << 20...Self.mostBytes).contains(bytes) else { return nil }
                byteCount = bytes
            }
        }
    }

    /// What a store is sure to hold (`Tmem.mostBytes`).
    private static let mostBytes: UInt64 = 1023 << 30

    var written: String {
        RawValue.quoted(name + (byteCount.map { ",size=" + Self.text($0) } ?? "") + (group.isEmpty ? "" : ",group=\(group)")
                + (content.map { ",content=" + $0 } ?? ""))
    }
    private static func text(_ bytes: UInt64) -> String {
        let text = Size.exact(bytes)
        return text.hasSuffix("bytes") ? "\(bytes)" : text
    }

    static let made = Form<DiskSetting>.string("\"NAME,size=SIZE\" or \"NAME,size=SIZE,group=GROUP\"") { text in
        DiskSetting(text, keys: ["size", "group"]).flatMap { $0.byteCount == nil ? nil : $0 }
    } write: { $0.written }
    static let attached = Form<DiskSetting>.string("\"NAME\" or \"NAME,size=SIZE\"") {
        DiskSetting($0, keys: ["size", "content"])
    } write: { $0.written }
}
