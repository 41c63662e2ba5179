/// Where in a TOML text each key stands: the parser tells lines of what it cannot parse, and none of what it can. For texts that it
/// has taken; of a key in an inline table it knows the table's place.
struct KeyPlaces {
    private var lines: [DottedPath: Int] = [:]
    private let bytes: [UInt8]
    private var position = 0
    private var line = 1

    init(_ text: String) {
        bytes = Array(text.utf8)
        var table: DottedPath = []
        while true {
            skipBlanks(andLines: true)
            guard let byte = peek else { return }
            if byte == UInt8(ascii: "[") {
                while peek == UInt8(ascii: "[") { advance() }
                table = []
                let at = line
                table = DottedPath(readKey(endingAt: UInt8(ascii: "]")))
                note(table, at)
                while peek == UInt8(ascii: "]") { advance() }
            } else {
                let at = line
                note(DottedPath(table.parts + readKey(endingAt: UInt8(ascii: "="))), at)
                advance()
                skipValue()
            }
        }
    }

    /// Of the key, or of the closest that holds it.
    subscript(path: DottedPath) -> Int? {
        var path = path
        while !path.parts.isEmpty {
            if let line = lines[path] { return line }
            path.parts.removeLast()
        }
        return nil
    }

    /// Also of what a dotted key defines on its way.
    private mutating func note(_ path: DottedPath, _ line: Int) {
        for count in path.parts.indices.map({ $0 + 1 }) {
            let part = DottedPath(Array(path.parts.prefix(count)))
            if lines[part] == nil { lines[part] = line }
        }
    }

    private var peek: UInt8? { position < bytes.count ? bytes[position] : nil }

    private mutating func advance() {
        if peek == UInt8(ascii: "\n") { line += 1 }
        if position < bytes.count { position += 1 }
    }

    private mutating func skipBlanks(andLines: Bool) {
        while let byte = peek {
            switch byte {
            case UInt8(ascii: " "), UInt8(ascii: "\t"), UInt8(ascii: "\r"): advance()
            case UInt8(ascii: "\n") where andLines: advance()
            case UInt8(ascii: "#"): while let byte = peek, byte != UInt8(ascii: "\n") { advance() }
            default: return
            }
        }
    }

    /// Dotted keys; stands at `end` afterwards.
    private mutating func readKey(endingAt end: UInt8) -> [String] {
        var parts: [String] = []
        while let byte = peek, byte != end, byte != UInt8(ascii: "\n") {
            switch byte {
            case UInt8(ascii: " "), UInt8(ascii: "\t"), UInt8(ascii: "."): advance()
            case UInt8(ascii: "\""), UInt8(ascii: "'"): parts.append(readString())
            default:
                let start = position
                while let byte = peek, byte != end, !" \t.\n".utf8.contains(byte) { advance() }
                parts.append(String(decoding: bytes[start..<position], as: UTF8.self))
            }
        }
        return parts
    }

    /// Of any of the four kinds. Escapes stay as they are, but for the two that keys of ours could have.
    private mutating func readString() -> String {
        let quote = bytes[position]
        var count = 1
        if bytes[position...].prefix(3).elementsEqual([quote, quote, quote]) { count = 3 }
        for _ in 0..<count { advance() }
        var content: [UInt8] = []
        while let byte = peek {
            if byte == UInt8(ascii: "\\"), quote == UInt8(ascii: "\"") {
                advance()
                if let escaped = peek { content += escaped == quote || escaped == byte ? [escaped] : [byte, escaped] }
                advance()
            } else if byte == quote, bytes[position...].prefix(count).allSatisfy({ $0 == quote }), bytes.count - position >= count {
                for _ in 0..<count { advance() }
                // Quotes that are the last of the content.
                while count == 3, peek == quote { advance() }
                break
            } else {
                content.append(byte)
                advance()
            }
        }
        return String(decoding: content, as: UTF8.self)
    }

    /// To the end of its last line.
    private mutating func skipValue() {
        var depth = 0
        while let byte = peek {
            switch byte {
            case UInt8(ascii: "\""), UInt8(ascii: "'"): _ = readString()
            case UInt8(ascii: "["), UInt8(ascii: "{"):
                depth += 1
                advance()
            case UInt8(ascii: "]"), UInt8(ascii: "}"):
                depth -= 1
                advance()
            case UInt8(ascii: "#"): skipBlanks(andLines: false)
            case UInt8(ascii: "\n") where depth <= 0: return
            default: advance()
            }
        }
    }
}
