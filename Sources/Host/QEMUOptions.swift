import FoundationEssentials
import Platform

/// One `key=value,…` argument of QEMU, or its JSON form, taken apart and put together again.
///
/// After QEMU's `qemu_opts_parse` and `keyval_parse`: a comma in a value is doubled; the first item may omit its key;
/// an item without `=` is a switch, `x` for `x=on` and `nox` for `x=off`; of equal keys the last one counts. What nobody
/// asked to change is put back as it was written.
struct QEMUOptions: Sendable, Equatable {
    struct Item: Sendable, Equatable {
        var key: String
        var value: String
        /// As it was written, commas doubled.
        var text: String
    }

    private(set) var items: [Item] = []
    private var json: [String: JSONValue]?

    /// `implied` is the key of a first item without one.
    init(_ text: String, implied: String?) throws(QuireError) {
        if text.hasPrefix("{") {
            guard let object = try? JSONDecoder().decode([String: JSONValue].self, from: Data(text.utf8)) else {
                throw QuireError(.invalid, "cannot read the JSON of \(text.prefix(40)): check it with a JSON tool")
            }
            json = object
            return
        }
        for (index, piece) in Self.split(text).enumerated() where !piece.isEmpty {
            if let equals = piece.firstIndex(of: "=") {
                let value = String(piece[piece.index(after: equals)...].replacing(",,", with: ","))
                items.append(Item(key: String(piece[..<equals]), value: value, text: piece))
            } else if index == 0, let implied {
                items.append(Item(key: implied, value: piece.replacing(",,", with: ","), text: piece))
            } else if piece.hasPrefix("no") {
                items.append(Item(key: String(piece.dropFirst(2)), value: "off", text: piece))
            } else {
                items.append(Item(key: piece, value: "on", text: piece))
            }
        }
    }

    /// At single commas; doubled ones stay in the pieces.
    static func split(_ text: String) -> [String] {
        var pieces: [String] = []
        var piece = ""
        var rest = Substring(text)
        while let character = rest.popFirst() {
            if character != "," {
                piece.append(character)
            } else if rest.first == "," {
                rest.removeFirst()
                piece += ",,"
            } else {
                pieces.append(piece)
                piece = ""
            }
        }
        return pieces + [piece]
    }

    static func escape(_ value: String) -> String { value.replacing(",", with: ",,") }

    var isJSON: Bool { json != nil }

    /// The value that counts, as text; a JSON boolean is `on` or `off`.
    subscript(key: String) -> String? {
        if let json { return json[key]?.optionText }
        return items.last { $0.key == key }?.value
    }

    func isOn(_ key: String) -> Bool { ["on", "yes", "true", "y"].contains(self[key]) }
    func isOff(_ key: String) -> Bool { ["off", "no", "false", "n"].contains(self[key]) }

    mutating func remove(_ key: String) {
        json?[key] = nil
        items.removeAll { $0.key == key }
    }

    /// Puts the value where the key first stood, or at the end. `boolean` matters to JSON only.
    mutating func set(_ key: String, _ value: String, boolean: Bool = false) {
        if json != nil {
            json![key] = boolean ? .bool(value == "on") : .string(value)
            return
        }
        let item = Item(key: key, value: value, text: "\(key)=\(Self.escape(value))")
        if let first = items.firstIndex(where: { $0.key == key }) {
            items[first] = item
            var kept = items.startIndex
            items.removeAll { other in
                defer { kept += 1 }
                return other.key == key && kept != first
            }
        } else {
            items.append(item)
        }
    }

    /// Replaces the implied first item's value: `memory-backend-ram` by `memory-backend-file`.
    mutating func setImplied(_ key: String, _ value: String) {
        if json == nil, let first = items.first, first.key == key, !first.text.hasPrefix(key + "=") {
            items[0] = Item(key: key, value: value, text: Self.escape(value))
            items = [items[0]] + items.dropFirst().filter { $0.key != key }
        } else {
            set(key, value)
        }
    }

    var text: String {
        guard let json else { return items.map(\.text).joined(separator: ",") }
        let encoder = JSONEncoder()
        encoder.outputFormatting = [.sortedKeys, .withoutEscapingSlashes]
        // A dictionary of plain JSON values always encodes.
        return String(decoding: (try? encoder.encode(json)) ?? Data(), as: UTF8.self)
    }
}

/// JSON of any shape; integers stay exact.
enum JSONValue: Sendable, Equatable, Codable {
    case null, bool(Bool), integer(Int64), unsigned(UInt64), number(Double), string(String)
    case array([JSONValue]), object([String: JSONValue])

    init(from decoder: any Decoder) throws {
        let value = try decoder.singleValueContainer()
        if value.decodeNil() {
            self = .null
        } else if let x = try? value.decode(Bool.self) {
            self = .bool(x)
        } else if let x = try? value.decode(Int64.self) {
            self = .integer(x)
        } else if let x = try? value.decode(UInt64.self) {
            self = .unsigned(x)
        } else if let x = try? value.decode(Double.self) {
            self = .number(x)
        } else if let x = try? value.decode(String.self) {
            self = .string(x)
        } else if let x = try? value.decode([JSONValue].self) {
            self = .array(x)
        } else {
            self = .object(try value.decode([String: JSONValue].self))
        }
    }

    func encode(to encoder: any Encoder) throws {
        var value = encoder.singleValueContainer()
        switch self {
        case .null: try value.encodeNil()
        case .bool(let x): try value.encode(x)
        case .integer(let x): try value.encode(x)
        case .unsigned(let x): try value.encode(x)
        case .number(let x): try value.encode(x)
        case .string(let x): try value.encode(x)
        case .array(let x): try value.encode(x)
        case .object(let x): try value.encode(x)
        }
    }

    var optionText: String? {
        switch self {
        case .bool(let x): x ? "on" : "off"
        case .integer(let x): "\(x)"
        case .unsigned(let x): "\(x)"
        case .string(let x): x
        default: nil
        }
    }
}
