/// What `--dry-run` shows: the lines that change, with three lines around them, as diff(1) -u does.
public func lineDifference(_ old: String, _ new: String) -> String {
    let before = old.split(separator: "\n", omittingEmptySubsequences: false)
    let after = new.split(separator: "\n", omittingEmptySubsequences: false)
    var removed: Set<Int> = [], inserted: Set<Int> = []
    for change in after.difference(from: before) {
        switch change {
        case .remove(let offset, _, _): removed.insert(offset)
        case .insert(let offset, _, _): inserted.insert(offset)
        }
    }
    // Every line once, in order: what goes comes before what comes.
    var lines: [(mark: Character, text: Substring)] = []
    var i = 0, j = 0
    while i < before.count || j < after.count {
        if i < before.count, removed.contains(i) {
            lines.append(("-", before[i]))
            i += 1
        } else if j < after.count, inserted.contains(j) {
            lines.append(("+", after[j]))
            j += 1
        } else {
            lines.append((" ", before[i]))
            i += 1
            j += 1
        }
    }
    let changed = lines.indices.filter { lines[$0].mark != " " }
    var result: [String] = []
    var last = -1
    for index in lines.indices where changed.contains(where: { abs($0 - index) <= 3 }) {
        if last >= 0, index > last + 1 { result.append("  …") }
        result.append("\(lines[index].mark) \(lines[index].text)")
        last = index
    }
    return result.joined(separator: "\n")
}
