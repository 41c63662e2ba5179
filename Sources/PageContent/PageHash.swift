import CHash
import CQuireLayout
import Platform

/// XXH3-128 of a page under a share group's secret. Equal hashes are a reason to compare pages, never a proof.
public struct PageHash: Hashable, Sendable {
    public let low: UInt64
    public let high: UInt64
    public init(low: UInt64, high: UInt64) {
        self.low = low
        self.high = high
    }
}

/// Hashes pages with the secret of a share group, so that a guest, which does not know it, cannot aim at collisions,
/// and hashes of two groups have nothing to do with each other.
public struct PageHasher: Sendable {
    public let secret: [UInt8]
    /// The hash of a page of zeros: such pages need no slot.
    public let zero: PageHash

    public static let secretBytes = Int(QUIRE_STORE_SECRET_BYTES)
    public static let pageBytes = Int(QUIRE_PAGE_BYTES)

    public init(secret: [UInt8]) {
        precondition(secret.count == Self.secretBytes)
        self.secret = secret
        let zeros = [UInt8](repeating: 0, count: Self.pageBytes)
        // A span of bytes that `zeros` keeps.
        zero = Self.hash(unsafe zeros.span.bytes, secret)
    }

    public static func random() throws(QuireError) -> PageHasher {
        var secret = [UInt8](repeating: 0, count: secretBytes)
        guard unsafe ch_random(&secret, secretBytes) == 0 else { throw .system("cannot get random bytes") }
        return PageHasher(secret: secret)
    }

    public func hash(_ page: RawSpan) -> PageHash { Self.hash(page, secret) }

    private static func hash(_ page: RawSpan, _ secret: [UInt8]) -> PageHash {
        // Both pointers are valid for the call, which keeps neither.
        let hash = unsafe page.withUnsafeBytes { page in
            unsafe ch_hash(page.baseAddress, page.count, secret, secret.count)
        }
        return PageHash(low: hash.low, high: hash.high)
    }

    /// A page in a mapping. It must not change meanwhile, or the hash is of neither content.
    public func hash(_ mapping: borrowing Mapping, at offset: Int) -> PageHash {
        let hash = unsafe ch_hash(mapping.address(offset, count: Self.pageBytes), Self.pageBytes, secret, secret.count)
        return PageHash(low: hash.low, high: hash.high)
    }
}
