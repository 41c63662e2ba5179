import CQuireLayout
import Glibc
import Platform

/// A view of one VM's memory files from outside: through /proc/PID/fd of the process that holds them.
///
/// It looks past the backend on purpose. What the backend says of itself is compared with this.
final class HostView {
    struct Claim: Equatable {
        let gfns: Range<UInt64>
        let since: UInt64
    }

    /// The files of guest RAM, in the order of their descriptors.
    let ram: DescriptorList
    private let map: Mapping

    init(holder pid: Int32) throws {
        var list = DescriptorList()
        var seen: Set<FileStatus.Identity> = []
        var header: Mapping?
        for name in (Files.list("/proc/\(pid)/fd") ?? []).sorted(by: { (Int($0) ?? 0) < (Int($1) ?? 0) }) {
            let path = "/proc/\(pid)/fd/\(name)"
            guard let target = Files.target(ofLink: path), target.hasPrefix("/memfd:quire-") else { continue }
            // What the guest has swapped is no guest RAM.
            guard !target.contains("-swap") else { continue }
            let file = try Descriptor.open(path, O_RDWR)
            guard seen.insert(try file.status().identity).inserted else { continue }
            if target.hasPrefix("/memfd:quire-") && target.contains("-map") {
                header = try Mapping(file, byteCount: Int(QUIRE_PAGE_BYTES), access: .readOnly)
            } else {
                list.append(file)
            }
        }
        guard let found = header.take(), !list.raw.isEmpty else {
            throw Trouble("process \(pid) holds no page map or no guest RAM")
        }
        map = found
        ram = list
    }

    /// What the host has allocated for guest RAM.
    var residentBytes: UInt64 {
        ram.raw.reduce(0) { $0 + ((try? FileStatus(of: $1))?.allocatedBytes ?? 0) }
    }

    // MARK: The page map's header

    private static func offset<T>(_ field: KeyPath<quire_map_header, T>) -> Int {
        MemoryLayout<quire_map_header>.offset(of: field)!
    }

    /// Where the registered table's header is; nil without a registration.
    var registeredTable: UInt64? {
        map.load64(Self.offset(\.nonce)) == 0 ? nil : map.load64(Self.offset(\.header_gpa))
    }

    var openClaims: [Claim] {
        (0..<Int(QUIRE_MAP_WORKERS)).compactMap { worker in
            let base = Self.offset(\.journal) + worker * MemoryLayout<quire_claim>.stride
            let count = map.load64(base + 8)
            let first = map.load64(base)
            return count == 0 ? nil : Claim(gfns: first..<first + count, since: map.load64(base + 16))
        }
    }

    // MARK: The guest's table, where guest-physical addresses below 3 GiB are the first file's offsets

    private func read(_ address: UInt64, _ count: Int) throws -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: count)
        guard unsafe pread(ram.raw[0], &bytes, count, off_t(address)) == count else { throw Trouble("cannot read guest RAM") }
        return bytes
    }

    private func word(_ bytes: [UInt8], _ offset: Int) -> UInt64 {
        (0..<8).reduce(UInt64(0)) { $0 | UInt64(bytes[offset + $1]) << UInt64(8 * $1) }
    }

    /// Every guest page's state byte, as the table has it now.
    func states() throws -> [UInt8] {
        guard let address = registeredTable else { throw Trouble("no table is registered") }
        let header = try read(address, 4096)
        let pages = Int(word(header, 16)) / 4096
        let directory = try read(word(header, 24), pages * 8)
        return try (0..<pages).flatMap { try read(word(directory, $0 * 8), 4096) }
    }

    /// How many of the claimed pages still say CLAIMED.
    func claimedPages() throws -> Int { try states().count { $0 == UInt8(QUIRE_STATE_CLAIMED.rawValue) } }

    /// Whether quire-load has written this page: its pattern grows by the same from word to word (Tests/guest/load.c).
    func isOfLoad(gfn: Int) throws -> Bool {
        let line = try read(UInt64(gfn) * 4096, 24)
        return (1...2).allSatisfy { word(line, 8 * $0) &- word(line, 8 * $0 - 8) == 0x9e37_79b9_7f4a_7c15 }
    }

    func punch(gfn: Int) throws { try Memfd.punch(ram.raw[0], offset: UInt64(gfn) * 4096, byteCount: 4096) }
}
