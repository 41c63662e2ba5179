import Platform

/// XML as text: where each element stands, byte by byte.
///
/// A domain's XML belongs to its operator. What Quire changes in it must be all that changes, and taking it back must
/// give the very bytes that were there: comments, quotes, order, elements that no version of ours has heard of. An XML
/// library gives a tree and writes another text, so this reads the text, remembers ranges of bytes, and edits only
/// replace ranges (`XMLEdit`).
///
/// It reads XML 1.0 with namespaces in UTF-8, and refuses what a domain never has and what is dangerous to read: document
/// types (and with them entities), other encodings, more than 200 levels. Text that isn't well-formed is an error with its line.
public struct XMLText: Sendable {
    public let bytes: [UInt8]
    public let root: Element

    public struct Attribute: Sendable, Equatable {
        /// As written, with its prefix.
        public let name: String
        public let value: String
        /// Of the value as written, between the quotes.
        public let range: Range<Int>
    }

    public struct Element: Sendable {
        /// As written, with its prefix.
        public let name: String
        /// Without it.
        public let localName: String
        /// The namespace's URI; empty without one.
        public let namespace: String
        public let attributes: [Attribute]
        public let children: [Element]
        /// Its own character data, entities resolved.
        public let text: String
        /// From `<` to the last `>`.
        public let range: Range<Int>
        /// Between the tags; nil for `<name/>`.
        public let content: Range<Int>?
        public let line: Int

        public subscript(_ attribute: String) -> String? { attributes.first { $0.name == attribute }?.value }

        /// Its children of that name and of no namespace.
        public func all(_ name: String) -> [Element] { children.filter { $0.name == name && $0.namespace.isEmpty } }
        public func first(_ name: String) -> Element? { children.first { $0.name == name && $0.namespace.isEmpty } }
        public func all(_ name: String, in namespace: String) -> [Element] {
            children.filter { $0.localName == name && $0.namespace == namespace }
        }
        /// By a path of names.
        public func find(_ path: String...) -> Element? {
            var element = self
            for name in path {
                guard let next = element.first(name) else { return nil }
                element = next
            }
            return element
        }
        public var trimmedText: String {
            String(text.drop(while: \.isWhitespace).reversed().drop(while: \.isWhitespace).reversed())
        }
    }

    public init(_ text: String) throws(QuireError) { try self.init(Array(text.utf8)) }

    public init(_ bytes: [UInt8]) throws(QuireError) {
        guard bytes.count <= Self.limit else { throw QuireError(.invalid, "the XML has more than \(Self.limit >> 20) MiB") }
        guard String(validating: bytes, as: UTF8.self) != nil else {
            throw QuireError(.invalid, "the XML is not UTF-8: convert it first")
        }
        var reader = Reader(bytes)
        root = try reader.document()
        self.bytes = bytes
    }

    public var text: String { String(decoding: bytes, as: UTF8.self) }

    private static let limit = 16 << 20
}

/// Reads one document; every error has its line.
private struct Reader {
    private let bytes: [UInt8]
    private var at = 0
    private static let deepest = 200

    init(_ bytes: [UInt8]) { self.bytes = bytes }

    private func line(_ position: Int) -> Int { 1 + bytes[..<min(position, bytes.count)].count { $0 == UInt8(ascii: "\n") } }

    private func broken(_ what: String, at position: Int? = nil) -> QuireError {
        QuireError(.invalid, "this is no XML: line \(line(position ?? at)): \(what)")
    }

    private var byte: UInt8? { at < bytes.count ? bytes[at] : nil }

    private func starts(_ text: StaticString) -> Bool {
        text.withUTF8Buffer { expected in
            guard bytes.count - at >= expected.count else { return false }
            for index in expected.indices where unsafe bytes[at + index] != expected[index] { return false }
            return true
        }
    }

    private mutating func skip(past text: StaticString, _ what: String) throws(QuireError) {
        let start = at
        while at < bytes.count {
            if starts(text) {
                at += text.utf8CodeUnitCount
                return
            }
            at += 1
        }
        throw broken("\(what) has no end", at: start)
    }

    private static func isSpace(_ byte: UInt8) -> Bool { byte == 32 || byte == 9 || byte == 10 || byte == 13 }
    private mutating func skipSpace() { while let byte, Self.isSpace(byte) { at += 1 } }

    mutating func document() throws(QuireError) -> XMLText.Element {
        if starts("\u{FEFF}") { at += 3 }
        if starts("<?xml") {
            let start = at
            try skip(past: "?>", "the XML declaration")
            let declaration = String(decoding: bytes[start..<at], as: UTF8.self).lowercased()
            if let encoding = declaration.firstRange(of: "encoding") {
                let value = declaration[encoding.upperBound...].drop { !"\"'".contains($0) }.dropFirst().prefix { !"\"'".contains($0) }
                guard ["utf-8", "utf8", "us-ascii", "ascii"].contains(String(value)) else {
                    throw broken("its encoding is \(value), convert it to UTF-8", at: start)
                }
            }
        }
        try misc()
        guard byte == UInt8(ascii: "<") else { throw broken(at == bytes.count ? "there is no element" : "text outside of the element") }
        let root = try element([:], depth: 0)
        try misc()
        guard at == bytes.count else { throw broken("something comes after the end of <\(root.name)>") }
        return root
    }

    /// Comments, processing instructions and space around the root element.
    private mutating func misc() throws(QuireError) {
        while true {
            skipSpace()
            if starts("<!--") { try comment() } else if starts("<?") { try skip(past: "?>", "a processing instruction") } else if starts("<!") {
                throw broken("it has a document type, which no domain has: remove it")
            } else { return }
        }
    }

    private mutating func comment() throws(QuireError) {
        at += 4
        try skip(past: "-->", "a comment")
    }

    private mutating func name() throws(QuireError) -> String {
        let start = at
        while let byte {
            switch byte {
            case UInt8(ascii: "a")...UInt8(ascii: "z"), UInt8(ascii: "A")...UInt8(ascii: "Z"), UInt8(ascii: "_"), UInt8(ascii: ":"), 0x80...: break
            case UInt8(ascii: "0")...UInt8(ascii: "9"), UInt8(ascii: "-"), UInt8(ascii: "."):
                if at == start { throw broken("a name starts with '\(Character(Unicode.Scalar(byte)))'") }
            default:
                guard at > start else { throw broken("a name is missing") }
                return String(decoding: bytes[start..<at], as: UTF8.self)
            }
            at += 1
        }
        throw broken("it ends in the middle")
    }

    private mutating func element(_ outer: [String: String], depth: Int) throws(QuireError) -> XMLText.Element {
        guard depth < Self.deepest else { throw broken("elements are nested more than \(Self.deepest) levels deep") }
        let start = at
        at += 1
        let name = try name()
        var attributes: [XMLText.Attribute] = []
        var spaces = outer
        var isEmpty = false
        while true {
            let before = at
            skipSpace()
            if starts("/>") {
                at += 2
                isEmpty = true
                break
            }
            if byte == UInt8(ascii: ">") {
                at += 1
                break
            }
            guard at > before else { throw broken("<\(name)> is not closed", at: start) }
            let attribute = try attribute(in: name)
            guard !attributes.contains(where: { $0.name == attribute.name }) else {
                throw broken("<\(name)> has \(attribute.name) twice", at: start)
            }
            attributes.append(attribute)
            if attribute.name == "xmlns" { spaces[""] = attribute.value }
            if attribute.name.hasPrefix("xmlns:") { spaces[String(attribute.name.dropFirst(6))] = attribute.value }
        }
        let (namespace, localName) = try resolve(name, spaces, start)
        var children: [XMLText.Element] = []
        var text: [UInt8] = []
        var content: Range<Int>?
        if !isEmpty {
            let contentStart = at
            while true {
                guard let byte else { throw broken("<\(name)> has no end", at: start) }
                if byte != UInt8(ascii: "<") {
                    try characters(into: &text, name, until: UInt8(ascii: "<"))
                } else if starts("</") {
                    content = contentStart..<at
                    at += 2
                    let end = try self.name()
                    guard end == name else { throw broken("</\(end)> ends <\(name)> of line \(line(start))") }
                    skipSpace()
                    guard self.byte == UInt8(ascii: ">") else { throw broken("</\(end)> is not closed") }
                    at += 1
                    break
                } else if starts("<!--") {
                    try comment()
                } else if starts("<![CDATA[") {
                    at += 9
                    let from = at
                    try skip(past: "]]>", "a CDATA section")
                    text += bytes[from..<(at - 3)]
                } else if starts("<?") {
                    try skip(past: "?>", "a processing instruction")
                } else if starts("<!") {
                    throw broken("a declaration inside of <\(name)>")
                } else {
                    children.append(try element(spaces, depth: depth + 1))
                }
            }
        }
        return XMLText.Element(
            name: name, localName: localName, namespace: namespace, attributes: attributes, children: children,
            text: String(decoding: text, as: UTF8.self), range: start..<at, content: content, line: line(start))
    }

    private func resolve(
        _ name: String, _ spaces: [String: String], _ start: Int
    ) throws(QuireError) -> (namespace: String, localName: String) {
        guard let colon = name.firstIndex(of: ":") else { return (spaces[""] ?? "", name) }
        let prefix = String(name[..<colon]), local = String(name[name.index(after: colon)...])
        guard let namespace = spaces[prefix], !prefix.isEmpty, !local.isEmpty, !local.contains(":") else {
            throw broken("<\(name)> has a prefix that no xmlns:\(prefix) explains", at: start)
        }
        return (namespace, local)
    }

    private mutating func attribute(in element: String) throws(QuireError) -> XMLText.Attribute {
        let name = try name()
        skipSpace()
        guard byte == UInt8(ascii: "=") else { throw broken("\(name) of <\(element)> has no value") }
        at += 1
        skipSpace()
        guard let quote = byte, quote == UInt8(ascii: "\"") || quote == UInt8(ascii: "'") else {
            throw broken("the value of \(name) of <\(element)> has no quotes")
        }
        at += 1
        let start = at
        var value: [UInt8] = []
        try characters(into: &value, element, until: quote)
        guard byte == quote else { throw broken("the value of \(name) of <\(element)> has no end", at: start) }
        let range = start..<at
        at += 1
        return XMLText.Attribute(name: name, value: String(decoding: value, as: UTF8.self), range: range)
    }

    /// Character data with its entities, up to `end`, which is not taken.
    private mutating func characters(into text: inout [UInt8], _ element: String, until end: UInt8) throws(QuireError) {
        while let byte, byte != end {
            if byte == UInt8(ascii: "<") { throw broken("a '<' inside of a value in <\(element)>") }
            guard byte >= 32 || Self.isSpace(byte) else { throw broken("a control character in <\(element)>") }
            at += 1
            guard byte == UInt8(ascii: "&") else {
                text.append(byte)
                continue
            }
            let start = at
            while let next = self.byte, next != UInt8(ascii: ";"), at - start < 12 { at += 1 }
            guard self.byte == UInt8(ascii: ";") else { throw broken("a '&' that begins no entity; write &amp;", at: start) }
            let entity = String(decoding: bytes[start..<at], as: UTF8.self)
            at += 1
            switch entity {
            case "lt": text.append(UInt8(ascii: "<"))
            case "gt": text.append(UInt8(ascii: ">"))
            case "amp": text.append(UInt8(ascii: "&"))
            case "quot": text.append(UInt8(ascii: "\""))
            case "apos": text.append(UInt8(ascii: "'"))
            default:
                let isHexadecimal = entity.hasPrefix("#x")
                guard entity.hasPrefix("#"),
                    let number = UInt32(entity.dropFirst(isHexadecimal ? 2 : 1), radix: isHexadecimal ? 16 : 10), number > 0,
                    let scalar = Unicode.Scalar(number)
                else { throw broken("the entity &\(entity); is not known", at: start) }
                text += Array(String(Character(scalar)).utf8)
            }
        }
    }
}

extension XMLText {
    /// As it has to stand in an attribute.
    public static func escaped(_ value: String) -> String {
        var result = ""
        for scalar in value.unicodeScalars {
            switch scalar {
            case "&": result += "&amp;"
            case "<": result += "&lt;"
            case ">": result += "&gt;"
            case "\"": result += "&quot;"
            case "'": result += "&apos;"
            default: result.unicodeScalars.append(scalar)
            }
        }
        return result
    }
}
