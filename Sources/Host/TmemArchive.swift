import Engines
import PageContent
import Platform

/// The file that `quire tmem save` writes (docs/tmem.md has it byte by byte): a head, then chunks, each with a number and a
/// checksum; the last one says how much there was. It is written and read in order, so it may be a pipe.
///
/// A reader believes nothing: a chunk is looked at when its checksum is right, keys must rise, and what was read counts for
/// nothing until the end chunk has come and agrees. The checksums' seed differs from file to file, so chunks of two files
/// cannot be mixed either.
public enum TmemArchive {
    public struct Pool: Sendable, Equatable {
        public var isPersistent: Bool
        public var isShared: Bool
        /// `UInt64.max`: no limit.
        public var capacityPages: UInt64
        public var name: String
        public var client: String
        public init(isPersistent: Bool, isShared: Bool, capacityPages: UInt64, name: String, client: String) {
            self.isPersistent = isPersistent
            self.isShared = isShared
            self.capacityPages = capacityPages
            self.name = name
            self.client = client
        }
    }

    public static let version: UInt32 = 1
    static let magic = Array("QUIRETMS".utf8)
    static let headBytes = 64
    static let chunkHeadBytes = 16
    static let sumBytes = 8
    static let nameBytes = 64
    static let maxPayloadBytes = 1 << 21
    /// Pages are collected into chunks of about so much.
    static let chunkGoalBytes = 1 << 20

    enum Kind: UInt32 {
        case pool = 1
        case pages = 2
        case end = 3
    }
}

/// Writes one save file.
public struct TmemArchiveWriter: ~Copyable {
    private let sink: DataSink
    private let seed = UInt64.random(in: 1 ... .max)
    private var number: UInt64 = 0
    private var pools: UInt64 = 0
    public private(set) var pages: UInt64 = 0
    private var pending: [UInt8] = []
    private var pendingPages: UInt32 = 0

    public init(to sink: DataSink) throws(QuireError) {
        self.sink = sink
        var head = TmemArchive.magic + littleEndian(TmemArchive.version) + littleEndian(UInt32(TmemPool.pageBytes)) + littleEndian(seed)
        head += [UInt8](repeating: 0, count: TmemArchive.headBytes - TmemArchive.sumBytes - head.count)
        try sink.write(head + littleEndian(checksum(head, seed: 0)))
    }

    /// The pages that follow are this pool's.
    public mutating func begin(_ pool: TmemArchive.Pool) throws(QuireError) {
        try flush()
        let payload =
            littleEndian(UInt32(pool.isPersistent ? 1 : 0)) + littleEndian(UInt32(pool.isShared ? 1 : 0)) + littleEndian(pool.capacityPages)
            + paddedText(pool.name, capacity: TmemArchive.nameBytes) + paddedText(pool.client, capacity: TmemArchive.nameBytes)
        try write(.pool, payload)
        pools += 1
    }

    /// In order of object and index.
    public mutating func append(_ object: UInt64, _ index: UInt32, _ page: [UInt8]) throws(QuireError) {
        precondition(page.count == TmemPool.pageBytes)
        // One word again and again, as zeros are, is one word here.
        let data = page.dropFirst(8).elementsEqual(page.dropLast(8)) ? page[..<8] : page[...]
        pending += littleEndian(object) + littleEndian(index) + littleEndian(UInt32(data.count))
        pending += data
        pendingPages += 1
        if pending.count >= TmemArchive.chunkGoalBytes { try flush() }
    }

    /// Ends the file; returns how many pages it has.
    public mutating func finish() throws(QuireError) -> UInt64 {
        try flush()
        try write(.end, littleEndian(pools) + littleEndian(pages) + littleEndian(number))
        return pages
    }

    private mutating func flush() throws(QuireError) {
        guard pendingPages > 0 else { return }
        try write(.pages, littleEndian(pendingPages) + littleEndian(UInt32(0)) + pending)
        pages += UInt64(pendingPages)
        pending = []
        pendingPages = 0
    }

    private mutating func write(_ kind: TmemArchive.Kind, _ payload: [UInt8]) throws(QuireError) {
        let chunk = littleEndian(kind.rawValue) + littleEndian(UInt32(payload.count)) + littleEndian(number) + payload
        try sink.write(chunk + littleEndian(checksum(chunk, seed: seed)))
        number += 1
    }
}

/// Reads one. Every error says what is wrong with the file; none of what was read before it counts then.
public struct TmemArchiveReader: ~Copyable {
    public enum Item {
        case pool(TmemArchive.Pool)
        /// Of the last pool; 4096 bytes.
        case page(object: UInt64, index: UInt32, page: [UInt8])
    }

    private let source: DataSource
    private let seed: UInt64
    private var number: UInt64 = 0
    private var pools: UInt64 = 0
    /// Read so far.
    public private(set) var pages: UInt64 = 0
    private var payload: [UInt8] = []
    private var position = 0
    private var left: UInt32 = 0
    private var last: (object: UInt64, index: UInt32)?

    public init(from source: DataSource) throws(QuireError) {
        self.source = source
        let head = try source.read(TmemArchive.headBytes)
        guard head.count >= 8, Array(head[..<8]) == TmemArchive.magic else {
            throw QuireError(.invalid, "this is no file that quire tmem save has written")
        }
        guard head.count == TmemArchive.headBytes else { throw Self.truncated }
        // Another version may have its checksum elsewhere.
        let version: UInt32 = word(head, 8)
        guard version == TmemArchive.version else {
            throw QuireError(
                .unsupported, "the file has version \(version), this quire reads version \(TmemArchive.version): use the quire that wrote it (or the file is damaged)")
        }
        let sum: UInt64 = word(head, TmemArchive.headBytes - TmemArchive.sumBytes)
        guard checksum(head.dropLast(TmemArchive.sumBytes), seed: 0) == sum else { throw Self.damaged("its head") }
        guard word(head, 12) == UInt32(TmemPool.pageBytes) else {
            throw QuireError(.unsupported, "the file has pages of another size than 4096 bytes")
        }
        seed = word(head, 16)
    }

    private static var truncated: QuireError { QuireError(.invalid, "the file ends too early: it was not written to its end") }
    private static func damaged(_ what: String) -> QuireError { QuireError(.invalid, "the file is damaged: \(what) is not as it was written") }

    /// The next one; nil when everything has been read and is right.
    public mutating func next() throws(QuireError) -> Item? {
        if left > 0 { return try page() }
        let head = try source.read(TmemArchive.chunkHeadBytes)
        guard head.count == TmemArchive.chunkHeadBytes else { throw Self.truncated }
        let what = "chunk \(number)"
        let count = Int(word(head, 4) as UInt32)
        guard let kind = TmemArchive.Kind(rawValue: word(head, 0)), count <= TmemArchive.maxPayloadBytes, word(head, 8) == number
        else { throw Self.damaged(what) }
        let rest = try source.read(count + TmemArchive.sumBytes)
        guard rest.count == count + TmemArchive.sumBytes else { throw Self.truncated }
        let sum: UInt64 = word(rest, count)
        payload = Array(rest[..<count])
        guard checksum(head + payload, seed: seed) == sum else { throw Self.damaged(what) }
        number += 1
        // From here on what is wrong was written so.
        switch kind {
        case .pool:
            guard count == 16 + 2 * TmemArchive.nameBytes, payload[0] <= 1, payload[4] <= 1 else { throw Self.damaged(what) }
            pools += 1
            last = nil
            func text(_ at: Int) -> String {
                String(decoding: payload[at..<at + TmemArchive.nameBytes].prefix { $0 != 0 }, as: UTF8.self)
            }
            return .pool(
                TmemArchive.Pool(
                    isPersistent: payload[0] == 1, isShared: payload[4] == 1, capacityPages: word(payload, 8), name: text(16),
                    client: text(16 + TmemArchive.nameBytes)))
        case .pages:
            guard pools > 0, count >= 8 else { throw Self.damaged(what) }
            left = word(payload, 0)
            position = 8
            guard left > 0 else { throw Self.damaged(what) }
            return try page()
        case .end:
            guard count == 24, word(payload, 0) == pools, word(payload, 8) == pages, word(payload, 16) == number - 1 else {
                throw Self.damaged("the number of its pages")
            }
            guard try source.read(1).isEmpty else { throw QuireError(.invalid, "the file goes on behind its end") }
            return nil
        }
    }

    private mutating func page() throws(QuireError) -> Item {
        let damaged = Self.damaged("chunk \(number - 1)")
        guard payload.count - position >= 16 else { throw damaged }
        let object: UInt64 = word(payload, position)
        let index: UInt32 = word(payload, position + 8)
        let count = Int(word(payload, position + 12) as UInt32)
        position += 16
        guard count == 8 || count == TmemPool.pageBytes, payload.count - position >= count else { throw damaged }
        if let last, (object, index) <= last { throw damaged }
        last = (object, index)
        var page = Array(payload[position..<position + count])
        if count == 8 { page = Array(repeatElement(page, count: TmemPool.pageBytes / 8).joined()) }
        position += count
        left -= 1
        if left == 0, position != payload.count { throw damaged }
        pages += 1
        return .page(object: object, index: index, page: page)
    }
}

private func word<T: FixedWidthInteger>(_ bytes: [UInt8], _ offset: Int) -> T {
    fromLittleEndian(bytes[offset..<offset + T.bitWidth / 8])
}
