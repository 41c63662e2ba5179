/// A number's bytes, the lowest first: as it stands in every message and file of ours, on every machine.
package func littleEndian<T: FixedWidthInteger>(_ value: T) -> [UInt8] {
    (0..<T.bitWidth / 8).map { UInt8(truncatingIfNeeded: value >> T($0 * 8)) }
}

/// The number that these bytes are; as many as it has.
package func fromLittleEndian<T: FixedWidthInteger>(_ bytes: some Collection<UInt8>, as: T.Type = T.self) -> T {
    bytes.reversed().reduce(0) { $0 << 8 | T($1) }
}
