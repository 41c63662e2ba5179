/// Sizes and durations as people write and read them.
public enum Size {
    /// Reads a size as QEMU's `qemu_strtosz` does: decimal with an optional fraction, or hexadecimal, then one of
    /// b k M G T P E in either case (binary units); without a suffix, bytes. Nil if it is none, or 2^64 and more.
    public static func parse(_ text: some StringProtocol) -> UInt64? {
        var rest = Substring(text)
        if rest.hasPrefix("0x") || rest.hasPrefix("0X") { return UInt64(rest.dropFirst(2), radix: 16) }
        var shift: UInt64 = 0
        var hasSuffix = false
        if let last = rest.last, let index = "bkmgtpe".firstIndex(of: Character(last.lowercased())) {
            shift = 10 * UInt64("bkmgtpe".distance(from: "bkmgtpe".startIndex, to: index))
            hasSuffix = true
            rest = rest.dropLast()
        }
        let parts = rest.split(separator: ".", maxSplits: 1, omittingEmptySubsequences: false)
        guard let first = parts.first, !first.isEmpty, first.allSatisfy(\.isASCIIDigit), let whole = UInt64(first),
            whole <= UInt64.max >> shift
        else { return nil }
        var bytes = whole << shift
        if parts.count == 2, !parts[1].isEmpty {
            guard parts[1].allSatisfy(\.isASCIIDigit), let fraction = Double("0." + parts[1]) else { return nil }
            // QEMU: a fraction of a byte is an error.
            if fraction != 0 && (!hasSuffix || shift == 0) { return nil }
            let (sum, overflow) = bytes.addingReportingOverflow(UInt64(fraction * Double(UInt64(1) << shift)))
            if overflow { return nil }
            bytes = sum
        }
        return bytes
    }

    /// For a person: `0`, `512B`, `4.0K`, `1.5G`, `128M`: three significant digits at most, binary units.
    public static func text(_ bytes: UInt64) -> String {
        if bytes == 0 { return "0" }
        if bytes < 1024 { return "\(bytes)B" }
        var unit = 0
        var value = Double(bytes)
        while value >= 1023.5 && unit < 6 {
            value /= 1024
            unit += 1
        }
        let letter = ["B", "K", "M", "G", "T", "P", "E"][unit]
        if value < 9.95 { return decimal(value, digits: 1) + letter }
        return decimal(value, digits: 0) + letter
    }

    /// The same, a second. Any number: what comes from elsewhere may be none that a rate can be.
    public static func rate(_ bytesPerSecond: Double) -> String { text(UInt64(min(max(0, bytesPerSecond), 0x1p60))) + "/s" }

    /// For a message: exact, in the largest unit that divides it.
    public static func exact(_ bytes: UInt64) -> String {
        for (letter, shift) in [("T", 40), ("G", 30), ("M", 20), ("K", 10)] as [(String, UInt64)]
        where bytes != 0 && bytes % (1 << shift) == 0 { return "\(bytes >> shift)\(letter)" }
        return "\(bytes) bytes"
    }

    /// `value` with `digits` digits after the point (0 to 3), rounded; what is too large for a figure is as large as one can be.
    public static func decimal(_ value: Double, digits: Int) -> String {
        let scale = [1.0, 10, 100, 1000][digits]
        let scaled = UInt64(min(max(0, value) * scale, 0x1p63).rounded())
        if digits == 0 { return "\(scaled)" }
        let fraction = String(scaled % UInt64(scale))
        return "\(scaled / UInt64(scale))." + String(repeating: "0", count: digits - fraction.count) + fraction
    }

    /// A duration in milliseconds: `250ms`, `10s`, `1.5s`, `2m`, `1h`; a plain number is seconds. Nil if it is none.
    public static func milliseconds(_ text: String) -> UInt64? {
        let units: [(String, Double)] = [("ms", 1), ("s", 1000), ("m", 60_000), ("h", 3_600_000), ("", 1000)]
        for (suffix, factor) in units where text.hasSuffix(suffix) {
            let number = text.dropLast(suffix.count)
            guard let first = number.first, first.isASCIIDigit, number.allSatisfy({ $0.isASCIIDigit || $0 == "." }),
                let value = Double(number)
            else { return nil }
            let result = (value * factor).rounded()
            return result < 1e15 ? UInt64(result) : nil
        }
        return nil
    }

    /// For a person: `250ms`, `10s`, `90s`, `1.5s`.
    public static func duration(milliseconds: UInt64) -> String {
        if milliseconds < 1000 { return "\(milliseconds)ms" }
        if milliseconds % 1000 == 0 { return "\(milliseconds / 1000)s" }
        return decimal(Double(milliseconds) / 1000, digits: 1) + "s"
    }
}

extension Character {
    package var isASCIIDigit: Bool { self >= "0" && self <= "9" }
}
