import Bench
import Synchronization
import Testing

@Suite struct ReportTests {
    @Test func `a bar holds up to its limit and not without a figure`() {
        #expect(Bar("a", 1.2, atMost: 1.2).holds)
        #expect(!Bar("a", 1.21, atMost: 1.2).holds)
        #expect(Bar("a", 0.99, atLeast: 0.99).holds)
        #expect(!Bar("a", 0.98, atLeast: 0.99).holds)
        #expect(!Bar("a", nil, atMost: 1).holds)
        #expect(!Bar("a", .nan, atMost: 1).holds)
    }

    @Test func `the JSON is one line with the four members and every bar's name, value, limit and holds`() {
        var report = Report(benchmark: "x", machine: [("cpu", "a \"b\"\n")]) { _ in }
        #expect(!report.holds)
        report.add("cost", ["pages": 3, "ratio": 1.125], table: Table(title: "t"))
        report.add(Bar("ratio", 1.125, atMost: 1.2))
        #expect(report.holds)
        report.fail("idle", "no guest", bars: [Bar("cpu", nil, atMost: 0.1, "%")])
        #expect(!report.holds)
        let line = report.json.line
        #expect(!line.contains("\n"))
        #expect(line == #"{"benchmark":"x","machine":{"cpu":"a \"b\"\n"},"results":{"cost":{"pages":3,"ratio":1.125},"#
            + #""idle":{"failed":"no guest"}},"bars":[{"name":"ratio","value":1.125,"limit":1.2,"sense":"at most","unit":"","#
            + #""holds":true},{"name":"cpu","value":null,"limit":0.1,"sense":"at most","unit":"%","holds":false}]}"#)
    }

    @Test func `a missed bar stays in the table`() {
        var report = Report(benchmark: "x", machine: []) { _ in }
        report.add(Bar("slow", 2, atMost: 1.2, "times"))
        #expect(report.conclusion.contains("slow") && report.conclusion.contains("MISSED"))
    }

    @Test func `a table is shown as soon as it is there`() {
        let shown = Mutex<[String]>([])
        var report = Report(benchmark: "x", machine: []) { text in shown.withLock { $0.append(text) } }
        report.add("cost", 3, table: Table(title: "the cost"))
        #expect(shown.withLock { $0 } == ["the cost\n"])
        report.fail("idle", "no guest", bars: [])
        #expect(shown.withLock { $0 }.last == "idle: not measured: no guest\n")
    }

    @Test(arguments: [(1234.5, "1235"), (12.345, "12.3"), (1.0, "1.00"), (0.05, "0.0500"), (-0.5, "-0.500"), (0, "0")])
    func `numbers for people have three digits`(_ value: Double, _ text: String) {
        #expect(Table.number(value) == text)
    }

    @Test func `the median`() {
        #expect(median([3, 1, 2]) == 2)
        #expect(median([4, 1, 2, 3]) == 2.5)
        #expect(median([]).isNaN)
    }
}
