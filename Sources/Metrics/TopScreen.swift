import Host
import Platform

/// What `quire top` shows: the VMs of the last snapshot, and what a minute of them was like. No terminal: lines of text.
public struct TopScreen: Sendable {
    public enum Order: String, CaseIterable, Sendable {
        case saved, rate, vm
    }

    public var order = Order.saved
    public var isPaused = false
    /// Milliseconds between snapshots.
    public var interval: UInt64
    /// Of the list of VMs, the first that is shown.
    public private(set) var first = 0
    private let hasBlocks: Bool
    private var snapshot = HostSnapshot()
    /// Bytes saved at the snapshots of the last minute, oldest first.
    private var minutes: [VM.ID: [UInt64]] = [:]
    private var minute: [UInt64] = []
    /// Of one CPU, of each backend since the snapshot before.
    private var cpu: [VM.ID: Double] = [:]

    /// `hasBlocks`: whether the terminal can show ▁▂▃.
    public init(intervalMilliseconds: UInt64, hasBlocks: Bool) {
        interval = intervalMilliseconds
        self.hasBlocks = hasBlocks
    }

    public mutating func show(_ next: HostSnapshot) {
        let before = Dictionary(snapshot.vms.map { ($0.id, $0.report) }) { first, _ in first }
        let seconds = Double(next.unixMilliseconds - snapshot.unixMilliseconds) / 1000
        let kept = max(1, Int(60_000 / max(1, interval)))
        func added(_ value: UInt64, to list: [UInt64]) -> [UInt64] { (list + [value]).suffix(kept) }
        var minutes: [VM.ID: [UInt64]] = [:]
        cpu = [:]
        for vm in next.vms {
            minutes[vm.id] = added(vm.savedBytes, to: self.minutes[vm.id] ?? [])
            if let earlier = before[vm.id], earlier.pid == vm.report.pid, seconds > 0 {
                cpu[vm.id] = max(0, vm.report.cpuSeconds - earlier.cpuSeconds) / seconds * 100
            }
        }
        self.minutes = minutes
        minute = added(next.vms.reduce(0) { $0 &+ $1.savedBytes }, to: minute)
        snapshot = next
        scroll(by: 0)
    }

    public mutating func scroll(by lines: Int) { first = max(0, min(first + lines, snapshot.vms.count - 1)) }

    /// Largest first, or by name.
    var sorted: [VM] {
        switch order {
        case .saved: snapshot.vms.sorted { ($0.savedBytes, $1.report.name, $0.uid) > ($1.savedBytes, $0.report.name, $1.uid) }
        case .rate:
            snapshot.vms.sorted {
                ($0.savedBytesPerSecond, $1.report.name, $0.uid) > ($1.savedBytesPerSecond, $0.report.name, $1.uid)
            }
        case .vm: snapshot.vms
        }
    }

    private struct Column {
        let title: String
        let isNumber: Bool
        let cell: (VM) -> String
        init(_ title: String, isNumber: Bool = true, _ cell: @escaping (VM) -> String) {
            self.title = title
            self.isNumber = isNumber
            self.cell = cell
        }
    }

    private static let nameWidth = 24
    private static let sparkWidth = 20

    private var columns: [Column] {
        func size(_ value: @escaping (VM) -> UInt64) -> (VM) -> String { { $0.hasNumbers ? Size.text(value($0)) : "-" } }
        var all = [
            Column("VM", isNumber: false) { vm in
                let name = vm.report.name
                return name.count <= Self.nameWidth ? name : String(name.prefix(Self.nameWidth - 1)) + (hasBlocks ? "…" : "~")
            },
            Column("STATE", isNumber: false) { $0.report.state.rawValue },
            Column("MERGING", isNumber: false) { $0.hasNumbers ? $0.report.merging.state.rawValue : "-" },
            Column("RAM", size(\.report.ramBytes)), Column("RESIDENT", size(\.report.residentBytes)),
            Column("RECYCLED", size(\.report.recycledBytes)), Column("MERGED", size(\.report.merging.savedBytes)),
            Column("SAVED", size(\.savedBytes)),
            Column("RATE") { $0.hasNumbers ? Size.rate($0.savedBytesPerSecond) : "-" },
            Column("CPU") { Size.decimal(cpu[$0.id] ?? $0.report.cpuPercent, digits: 1) + "%" },
            Column("SAVED, LAST MINUTE", isNumber: false) { spark(minutes[$0.id] ?? []) },
        ]
        // Only where there is somebody to tell apart.
        if Set(snapshot.vms.map(\.uid)).count > 1 { all.insert(Column("USER") { "\($0.uid)" }, at: 1) }
        return all
    }

    /// The screen. `size`: nil for as much as there is, without the line of keys.
    public func lines(size: (columns: Int, rows: Int)?, colours: Bool) -> [String] {
        let picture = snapshot.picture
        let merged = snapshot.vms.reduce(0) { $0 &+ $1.report.merging.savedBytes }
        let saved = minute.last ?? 0
        var head = [
            "\(snapshot.vms.count) \(snapshot.vms.count == 1 ? "VM" : "VMs")  RAM "
                + "\(Size.text(snapshot.vms.reduce(0) { $0 &+ $1.report.ramBytes }))  resident \(Size.text(picture.privateBytes))  "
                + "recycled \(Size.text(picture.recycledBytes))  merged \(Size.text(merged))  saved \(Size.text(saved))  "
                + "host available \(Size.text(snapshot.availableBytes)) of \(Size.text(snapshot.memoryBytes))"
        ]
        if size != nil {
            head.append(
                "saved \(spark(minute))  by \(order.rawValue), every \(Size.duration(milliseconds: interval))"
                    + (isPaused ? ", paused" : ""))
        }
        if snapshot.unreadableDirectories > 0 { head.append("\(snapshot.unreadableDirectories) runtime directories cannot be read") }
        head.append("")

        let columns = self.columns
        var vms = sorted
        // Below: keys.
        if let size { vms = Array(vms.dropFirst(first).prefix(max(1, size.rows - head.count - 2))) }
        let cells = [columns.map(\.title)] + vms.map { vm in columns.map { $0.cell(vm) } }
        let widths = columns.indices.map { column in cells.map { $0[column].count }.max() ?? 0 }
        let stateAt = columns.firstIndex { $0.title == "STATE" } ?? 1
        let before = widths[..<stateAt].reduce(0, +) + 2 * stateAt
        let width = size?.columns ?? .max
        var lines = head.map { String($0.prefix(width)) }
        for (index, row) in cells.enumerated() {
            var text = ""
            for (column, cell) in row.enumerated() {
                let padding = String(repeating: " ", count: widths[column] - cell.count)
                text += (column > 0 ? "  " : "") + (columns[column].isNumber ? padding + cell : cell + padding)
            }
            while text.last == " " { text.removeLast() }
            text = String(text.prefix(width))
            if colours {
                if index == 0 { text = "\u{1B}[1m\(text)\u{1B}[0m" } else {
                    text = Self.coloured(text, from: before, count: row[stateAt].count, vms[index - 1].report.state.colour)
                }
            }
            lines.append(text)
        }
        guard let size else { return lines }
        if vms.isEmpty { lines.append("No VM is running.") }
        lines = Array(lines.prefix(size.rows - 1))
        while lines.count < size.rows - 1 { lines.append("") }
        lines.append(String("q quit  s saved  r rate  v VM  j/k scroll  space pause  + - interval".prefix(width)))
        return Array(lines.suffix(size.rows))
    }

    private static func coloured(_ text: String, from start: Int, count: Int, _ colour: Int) -> String {
        guard text.count >= start + count else { return text }
        let from = text.index(text.startIndex, offsetBy: start), to = text.index(from, offsetBy: count)
        return text[..<from] + "\u{1B}[\(colour)m" + text[from..<to] + "\u{1B}[0m" + text[to...]
    }

    /// A bar for each part of a minute, the newest on the right; its height is a share of the largest.
    func spark(_ values: [UInt64]) -> String {
        let levels = Array(hasBlocks ? "▁▂▃▄▅▆▇█" : "_.-~=+*#")
        let perBar = max(1, (60_000 / max(1, Int(interval)) + Self.sparkWidth - 1) / Self.sparkWidth)
        let top = values.max() ?? 0
        var text = ""
        var end = values.count
        while end > 0, text.count < Self.sparkWidth {
            let start = max(0, end - perBar)
            let value = values[start..<end].max() ?? 0
            let level = top == 0 ? 0 : Int(Double(value) / Double(top) * Double(levels.count - 1) + 0.5)
            text = String(levels[min(level, levels.count - 1)]) + text
            end = start
        }
        return text
    }

    /// The snapshot as one line of JSON.
    public var json: String { String(decoding: API.json(API.TopAnswer(host: snapshot)), as: UTF8.self) }
}
