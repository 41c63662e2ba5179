/// What every benchmark of this project says: a table for people and, as the last line, one JSON object with `benchmark`,
/// `machine`, `results` and `bars`.
public struct Report: Sendable {
    public let benchmark: String
    public var machine: [(String, JSON)]
    public private(set) var results: [(String, JSON)] = []
    public private(set) var bars: [Bar] = []
    private let show: @Sendable (String) -> Void

    /// `show` gets each table as soon as it is there: a benchmark takes minutes.
    public init(benchmark: String, machine: [(String, JSON)], show: @escaping @Sendable (String) -> Void) {
        self.benchmark = benchmark
        self.machine = machine
        self.show = show
    }

    public mutating func add(_ name: String, _ result: JSON, table: Table) {
        results.append((name, result))
        show(table.text)
    }

    public mutating func add(_ bar: Bar) { bars.append(bar) }

    /// A part that could not be measured: its bars are missed.
    public mutating func fail(_ name: String, _ reason: String, bars: [Bar]) {
        results.append((name, .object([("failed", .text(reason))])))
        show("\(name): not measured: \(reason)\n")
        self.bars += bars
    }

    /// Nothing measured is nothing held.
    public var holds: Bool { !bars.isEmpty && bars.allSatisfy(\.holds) }

    /// What stands below the tables: the machine, known completely only now, and all bars.
    public var conclusion: String {
        var head = Table(title: "\(benchmark), measured on")
        for (name, value) in machine {
            if case .text(let text) = value { head.row(name, text) } else { head.row(name, value.line) }
        }
        var summary = Table(title: "bars", columns: ["bar", "measured", "limit", ""])
        for bar in bars {
            summary.row(bar.name, bar.value.map { Table.number($0) } ?? "nothing",
                (bar.isUpper ? "at most " : "at least ") + Table.number(bar.limit) + (bar.unit.isEmpty ? "" : " " + bar.unit),
                bar.holds ? "holds" : "MISSED")
        }
        return head.text + "\n" + summary.text
    }

    public var json: JSON {
        .object([
            ("benchmark", .text(benchmark)), ("machine", .object(machine)), ("results", .object(results)),
            ("bars", .array(bars.map(\.json))),
        ])
    }
}

/// A limit that a figure has to keep.
public struct Bar: Sendable, Equatable {
    public let name: String
    /// Nil: it could not be measured.
    public let value: Double?
    public let limit: Double
    public let unit: String
    /// At most `limit`; otherwise at least.
    public let isUpper: Bool

    public init(_ name: String, _ value: Double?, atMost limit: Double, _ unit: String = "") {
        (self.name, self.value, self.limit, self.unit, isUpper) = (name, value, limit, unit, true)
    }
    public init(_ name: String, _ value: Double?, atLeast limit: Double, _ unit: String = "") {
        (self.name, self.value, self.limit, self.unit, isUpper) = (name, value, limit, unit, false)
    }

    public var holds: Bool {
        guard let value, value.isFinite else { return false }
        return isUpper ? value <= limit : value >= limit
    }

    var json: JSON {
        .object([
            ("name", .text(name)), ("value", value.map { .number($0) } ?? .null), ("limit", .number(limit)),
            ("sense", .text(isUpper ? "at most" : "at least")), ("unit", .text(unit)), ("holds", .bool(holds)),
        ])
    }
}

/// Columns for people: the first one to the left, the others to the right when they are numbers.
public struct Table: Sendable {
    private let title: String
    private var rows: [[String]] = []
    private let hasHeader: Bool
    private var notes: [String] = []

    public init(title: String, columns: [String] = []) {
        self.title = title
        hasHeader = !columns.isEmpty
        if hasHeader { rows.append(columns) }
    }

    public mutating func row(_ cells: String...) { rows.append(cells) }
    public mutating func row(_ cells: [String]) { rows.append(cells) }
    /// A line under the table: what the figures mean.
    public mutating func note(_ text: String) { notes.append(text) }

    public var text: String {
        let count = rows.map(\.count).max() ?? 0
        let widths = (0..<count).map { column in rows.map { column < $0.count ? $0[column].count : 0 }.max() ?? 0 }
        var lines = [title]
        for (number, row) in rows.enumerated() {
            let cells = row.enumerated().map { column, cell in
                let space = String(repeating: " ", count: widths[column] - cell.count)
                let isNumber = cell.first.map { $0.isNumber || $0 == "-" || $0 == "+" } ?? false
                let isHead = hasHeader && number == 0
                return column > 0 && (isNumber || isHead) ? space + cell : cell + space
            }
            var line = "  " + cells.joined(separator: "  ")
            while line.last == " " { line.removeLast() }
            lines.append(line)
        }
        return (lines + notes.map { "  " + $0 }).joined(separator: "\n") + "\n"
    }

    /// Three significant digits, or all of them before the point.
    public static func number(_ value: Double) -> String {
        guard value.isFinite else { return "-" }
        let size = abs(value)
        let digits = size >= 100 || value == 0 ? 0 : size >= 10 ? 1 : size >= 1 ? 2 : size >= 0.1 ? 3 : 4
        let scale = (0..<digits).reduce(1.0) { result, _ in result * 10 }
        let scaled = Int((size * scale).rounded())
        var text = "\(scaled)"
        if digits > 0 {
            text = String(repeating: "0", count: max(0, digits + 1 - text.count)) + text
            text.insert(".", at: text.index(text.endIndex, offsetBy: -digits))
        }
        return (value < 0 ? "-" : "") + text
    }
    public static func percent(_ share: Double) -> String { number(share * 100) + " %" }
}

/// The middle value; of an even number the mean of the two in the middle. NaN of none.
public func median(_ values: [Double]) -> Double {
    guard !values.isEmpty else { return .nan }
    let sorted = values.sorted()
    let middle = sorted.count / 2
    return sorted.count % 2 == 1 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2
}
