import Platform

/// Changes to an XML text, all at once. What no change covers stays as it is, byte by byte.
///
/// An insertion begins a line of its own, indented like its neighbour, where that stands on one; a removal takes that line break
/// and indentation with it. So a removal of what was inserted gives back the text that was there before.
public struct XMLEdit {
    private let xml: XMLText
    private var changes: [(range: Range<Int>, text: [UInt8])] = []

    public init(_ xml: XMLText) { self.xml = xml }

    /// The text with all changes made.
    public func apply() -> [UInt8] {
        var result: [UInt8] = []
        var at = 0
        // Changes at one place stay in the order in which they were asked for.
        let ordered = changes.enumerated().sorted {
            ($0.element.range.lowerBound, $0.offset) < ($1.element.range.lowerBound, $1.offset)
        }
        for (_, change) in ordered {
            precondition(change.range.lowerBound >= at, "changes overlap")
            result += xml.bytes[at..<change.range.lowerBound]
            result += change.text
            at = change.range.upperBound
        }
        return result + xml.bytes[at...]
    }

    private mutating func replace(_ range: Range<Int>, _ text: String) { changes.append((range, Array(text.utf8))) }

    /// The space in front of `position` up to the line's beginning; nil if something else stands there.
    private func indentation(at position: Int) -> String? {
        var start = position
        while start > 0, xml.bytes[start - 1] == 32 || xml.bytes[start - 1] == 9 { start -= 1 }
        guard start > 0, xml.bytes[start - 1] == 10 else { return nil }
        return String(decoding: xml.bytes[start..<position], as: UTF8.self)
    }

    /// `lines`, each with its indentation relative to the first.
    private func block(_ lines: [String], _ indentation: String?) -> String {
        guard let indentation else { return lines.map { String($0.drop { $0 == " " }) }.joined() }
        return lines.map { "\n" + indentation + $0 }.joined()
    }

    public mutating func insert(_ lines: [String], after sibling: XMLText.Element) {
        replace(sibling.range.upperBound..<sibling.range.upperBound, block(lines, indentation(at: sibling.range.lowerBound)))
    }

    /// As the last of its child elements.
    public mutating func append(_ lines: [String], to parent: XMLText.Element) {
        if let last = parent.children.last { return insert(lines, after: last) }
        let outer = indentation(at: parent.range.lowerBound)
        let inner = block(lines, outer.map { $0 + "  " })
        if let content = parent.content {
            replace(content.lowerBound..<content.lowerBound, inner)
        } else {
            // <name/> becomes <name>…</name>.
            let end = parent.range.upperBound
            replace((end - 2)..<end, ">" + inner + (outer.map { "\n" + $0 } ?? "") + "</\(parent.name)>")
        }
    }

    public mutating func setValue(of attribute: XMLText.Attribute, _ value: String) {
        replace(attribute.range, XMLText.escaped(value))
    }

    /// Removes elements, and the line that each one began.
    public mutating func remove(_ element: XMLText.Element) {
        var start = element.range.lowerBound
        if let indentation = indentation(at: start) { start -= indentation.utf8.count + 1 }
        if start > 0, xml.bytes[start] == 10, xml.bytes[start - 1] == 13 { start -= 1 }
        replace(start..<element.range.upperBound, "")
    }

    /// Makes `<name>…</name>` `<name/>` again: all that it holds goes.
    public mutating func close(_ element: XMLText.Element) {
        guard let content = element.content else { return }
        replace((content.lowerBound - 1)..<element.range.upperBound, "/>")
    }

    /// Whether nothing but space is left in an element when these of its children go.
    public func isEmpty(_ element: XMLText.Element, without gone: [XMLText.Element]) -> Bool {
        guard let content = element.content else { return true }
        return !content.contains { position in
            let byte = xml.bytes[position]
            return !(byte == 32 || (9...13).contains(byte)) && !gone.contains { $0.range.contains(position) }
        }
    }
}
