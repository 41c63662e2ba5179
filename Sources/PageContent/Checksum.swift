import CHash

/// XXH3-64 with a seed: whether bytes are the ones that were written. No protection from somebody who means harm.
public func checksum(_ bytes: some Sequence<UInt8>, seed: UInt64) -> UInt64 {
    if let sum = bytes.withContiguousStorageIfAvailable({ unsafe ch_hash64($0.baseAddress, $0.count, seed) }) { return sum }
    return checksum(Array(bytes), seed: seed)
}
