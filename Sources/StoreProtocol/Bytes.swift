/// Little-endian fields of a message. Reading outside of it is an error of the peer's and throws; nothing is read
/// twice.
struct ByteReader {
    private let bytes: [UInt8]
    private(set) var position = 0

    init(_ bytes: [UInt8]) { self.bytes = bytes }

    var left: Int { bytes.count - position }

    private mutating func advance(_ count: Int) throws(ProtocolViolation) -> Int {
        guard count >= 0, left >= count else { throw ProtocolViolation("the message is too short") }
        defer { position += count }
        return position
    }

    mutating func word32() throws(ProtocolViolation) -> UInt32 {
        let at = try advance(4)
        return unsafe bytes.withUnsafeBytes { unsafe $0.loadUnaligned(fromByteOffset: at, as: UInt32.self) }
    }

    mutating func word64() throws(ProtocolViolation) -> UInt64 {
        let at = try advance(8)
        return unsafe bytes.withUnsafeBytes { unsafe $0.loadUnaligned(fromByteOffset: at, as: UInt64.self) }
    }

    mutating func bytes(_ count: Int) throws(ProtocolViolation) -> [UInt8] {
        let at = try advance(count)
        return Array(bytes[at..<at + count])
    }

    /// Text in a field of `capacity` bytes, zero-padded.
    mutating func text(_ capacity: Int) throws(ProtocolViolation) -> String {
        String(decoding: try bytes(capacity).prefix { $0 != 0 }, as: UTF8.self)
    }

    func end() throws(ProtocolViolation) {
        guard left == 0 else { throw ProtocolViolation("the message is too long") }
    }
}

struct ByteWriter {
    private(set) var bytes: [UInt8] = []

    init(reserving count: Int = 64) { bytes.reserveCapacity(count) }

    mutating func word32(_ value: UInt32) {
        unsafe withUnsafeBytes(of: value.littleEndian) { unsafe bytes.append(contentsOf: $0) }
    }
    mutating func word64(_ value: UInt64) {
        unsafe withUnsafeBytes(of: value.littleEndian) { unsafe bytes.append(contentsOf: $0) }
    }
    mutating func raw(_ more: some Sequence<UInt8>) { bytes.append(contentsOf: more) }
}

/// The peer broke a rule of the protocol: one line that says which.
public struct ProtocolViolation: Error, CustomStringConvertible, Sendable {
    public let description: String
    public init(_ description: String) { self.description = description }
}
