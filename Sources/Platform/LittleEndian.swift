// Inlinable: without knowing the type each byte would cost several calls of the runtime's, and messages have thousands.

/// A number's bytes, the lowest first: as it stands in every message and file of ours, on every machine.
@inlinable package func littleEndian<T: FixedWidthInteger>(_ value: T) -> [UInt8] {
    var bytes: [UInt8] = []
    bytes.append(littleEndian: value)
    return bytes
}

extension [UInt8] {
    /// The same, behind what is there.
    @inlinable package mutating func append<T: FixedWidthInteger>(littleEndian value: T) {
        for shift in stride(from: 0, to: T.bitWidth, by: 8) { append(UInt8(truncatingIfNeeded: value >> T(shift))) }
    }
}

/// The number that these bytes are; as many as it has.
@inlinable package func fromLittleEndian<T: FixedWidthInteger>(_ bytes: some Collection<UInt8>, as: T.Type = T.self) -> T {
    var value: T = 0, shift = 0
    for byte in bytes {
        value |= T(truncatingIfNeeded: byte) << shift
        shift += 8
    }
    return value
}
