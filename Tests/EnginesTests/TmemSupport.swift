import Engines
import Glibc
import Platform
import TestSupport
import Testing

/// Pages to put: what they hold follows from a number, so that a test can say what must come back.
enum TmemPages {
    /// `random` words at the front, and a counter behind: compresses to about 8 bytes for each word.
    static func page(_ seed: UInt64, randomWords: Int = 512) -> [UInt8] {
        var random = SplitMix(seed)
        return unsafe [UInt8](unsafeUninitializedCapacity: 4096) { bytes, count in
            for index in 0..<512 {
                let word = index < randomWords ? random.next() : seed &+ UInt64(index / 64)
                unsafe UnsafeMutableRawBufferPointer(bytes).storeBytes(of: word, toByteOffset: index * 8, as: UInt64.self)
            }
            count = 4096
        }
    }
    static func filled(_ word: UInt64) -> [UInt8] {
        unsafe [UInt8](unsafeUninitializedCapacity: 4096) { bytes, count in
            for index in 0..<512 {
                unsafe UnsafeMutableRawBufferPointer(bytes).storeBytes(of: word, toByteOffset: index * 8, as: UInt64.self)
            }
            count = 4096
        }
    }
    /// Any kind: one word, few different ones, incompressible, compressible to any size.
    static func any(_ seed: UInt64) -> [UInt8] {
        var random = SplitMix(seed ^ 0x5eed)
        switch random.next() % 8 {
        case 0: return filled(random.next() % 3)
        case 1: return page(random.next() % 50, randomWords: 100)
        case 2: return page(random.next() % 50)
        case 3: return page(seed)
        default: return page(seed, randomWords: Int(random.next() % 500))
        }
    }
}

extension TmemPool {
    func put(_ object: UInt64, _ index: UInt32, bytes: [UInt8]) throws { try put(object, index, unsafe bytes.span.bytes) }

    func page(_ object: UInt64, _ index: UInt32) throws -> [UInt8]? {
        var page = [UInt8](repeating: 0xaa, count: 4096)
        var isThere = false
        do {
            var span = page.mutableSpan
            var bytes = unsafe span.mutableBytes
            isThere = try get(object, index, into: &bytes)
        }
        if !isThere, page != [UInt8](repeating: 0xaa, count: 4096) { throw QuireError(.invalid, "a miss changed the page") }
        return isThere ? page : nil
    }
}

/// A store whose file outlives it.
struct TmemFixture {
    let file: Int32

    init() throws { file = try Tmem.makeFile(name: "test-tmem").release() }

    func open(_ configuration: Tmem.Configuration = .init(), seams: TmemSeams = .init()) throws -> Tmem {
        try Tmem(Descriptor.duplicate(of: file), configuration, seams: seams)
    }
    func close() { Glibc.close(file) }

    private init(file: Int32) { self.file = file }

    /// As it is now: what a process would leave that was killed at this moment.
    func copy() throws -> TmemFixture {
        let source = try Descriptor.duplicate(of: file), target = try Tmem.makeFile(name: "test-tmem-copy")
        let end = try source.status().byteCount
        var at: UInt64 = 0
        while let data = Memfd.nextData(source.raw, from: at, to: end) {
            try target.writeBytes(at: data.lowerBound, source.readBytes(at: data.lowerBound, count: Int(data.upperBound - data.lowerBound)))
            at = data.upperBound
        }
        return TmemFixture(file: target.release())
    }
    /// What the kernel says that the file takes.
    var allocatedBytes: UInt64 { (try? FileStatus(of: file).allocatedBytes) ?? 0 }
}

/// What every pool is charged adds up to what contents take, and pages to keys.
func audit(_ tmem: Tmem, _ pages: Int? = nil) {
    let charged = tmem.pools.reduce(0) { $0 + Int($1.statistics.storedBytes) }
    #expect(charged == tmem.unitBytes)
    let usage = tmem.usage
    if let pages { #expect(usage.pages == UInt64(pages)) }
    #expect(usage.contentBytes <= UInt64(tmem.unitBytes) && usage.usedBytes >= usage.metadataBytes + usage.wasteBytes)
}
