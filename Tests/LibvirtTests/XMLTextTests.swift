import Libvirt
import Platform
import Testing

/// The one-line message that `body` fails with; nil if it does not fail.
func message<R>(_ body: () throws -> R) -> String? {
    do {
        _ = try body()
        return nil
    } catch {
        return "\(error)"
    }
}

@Suite struct XMLTextTests {
    @Test func reads() throws {
        let xml = try XMLText(
            """
            <?xml version="1.0" encoding="UTF-8"?>
            <!-- first -->
            <a xmlns:x='urn:x' one = "1 &lt; &#x32;" two='"'>
              text &amp; <![CDATA[<b>]]>
              <x:b/><c><d>deep</d></c><e></e>
            </a><!-- last -->
            """)
        #expect(xml.root.name == "a")
        #expect(xml.root["one"] == "1 < 2")
        #expect(xml.root["two"] == "\"")
        #expect(xml.root.trimmedText == "text & <b>")
        #expect(xml.root.all("b", in: "urn:x").count == 1)
        #expect(xml.root.all("b").isEmpty)
        #expect(xml.root.find("c", "d")?.text == "deep")
        #expect(xml.root.first("e")?.content?.isEmpty == true)
        #expect(xml.root.children[0].content == nil)
        #expect(xml.root.find("c", "d")?.line == 5)
        let range = try #require(xml.root.first("c")?.range)
        #expect(String(decoding: xml.bytes[range], as: UTF8.self) == "<c><d>deep</d></c>")
    }

    /// Each with the line that is wrong.
    @Test(arguments: [
        ("", 1), ("text", 1), ("<a>", 1), ("<a>\n</b>", 2), ("<a b='1' b='2'/>", 1), ("<a\nb=1/>", 2), ("<a b='<'/>", 1), ("<a>&nbsp;</a>", 1),
        ("<a>&lt</a>", 1), ("<a/>\n<b/>", 2), ("<a/>x", 1), ("<!DOCTYPE a [<!ENTITY e 'x'>]>\n<a>&e;</a>", 1), ("<x:a/>", 1),
        ("<a>\n<!-- </a>", 2), ("<a><![CDATA[</a>", 1), ("<a b='1'c='2'/>", 1), ("<1a/>", 1), ("<a", 1), ("<a b", 1), ("<a b='", 1), ("<", 1),
        ("<a>\u{1}</a>", 1), ("<?xml version='1.0' encoding='utf-16'?><a/>", 1), ("<a>&#0;</a>", 1), ("<a>&#xD800;</a>", 1),
        (String(repeating: "<a>", count: 300), 1),
    ])
    func refuses(_ text: String, line: Int) {
        let said = message { try XMLText(text) }
        #expect(said?.hasPrefix("this is no XML: line \(line): ") == true, "\(text): \(said ?? "no error")")
        #expect(said?.contains("\n") != true)
    }

    @Test func refusesOtherBytes() {
        #expect(message { try XMLText([0x3C, 0x61, 0xFF, 0x2F, 0x3E]) } == "the XML is not UTF-8: convert it first")
    }

    /// Every beginning of a document is an error, and never more than that.
    @Test func survivesTruncation() throws {
        let text = "<?xml version='1.0'?><a x='1'><!-- c --><b y=\"&lt;\"/><![CDATA[z]]>&#65;</a>"
        _ = try XMLText(text)
        for count in 0..<text.utf8.count { #expect(throws: QuireError.self) { try XMLText(Array(text.utf8.prefix(count))) } }
    }
}
