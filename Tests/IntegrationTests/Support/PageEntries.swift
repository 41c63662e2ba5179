import CQuireLayout
import Glibc
import Platform

/// Where the bytes of a guest's pages are, as the page map says, and the bytes that the guest sees, through QEMU's memory.
/// It looks past the backend on purpose, for guests with less than 3 GiB: page N is page N of the RAM's file.
final class PageEntries {
    private let map: Descriptor
    private let memory: Descriptor
    /// Of page 0, in QEMU.
    private let base: UInt64
    let pages: Int

    enum Kind { case `private`, hole, zero, shared(slot: UInt64) }

    init(_ guest: Guest) throws {
        var mapNumber: String?, ramNumber: String?
        for name in Files.list("/proc/\(guest.pid)/fd") ?? [] {
            guard let target = Files.target(ofLink: "/proc/\(guest.pid)/fd/\(name)"), target.hasPrefix("/memfd:quire-")
            else { continue }
            if target.contains("-map") { mapNumber = name } else { ramNumber = name }
        }
        guard let mapNumber, let ramNumber else { throw Trouble("no page map, or no guest RAM") }
        map = try Descriptor.open("/proc/\(guest.pid)/fd/\(mapNumber)", O_RDWR)
        let ram = try Descriptor.open("/proc/\(guest.pid)/fd/\(ramNumber)", O_RDWR).status()
        memory = try Descriptor.open("/proc/\(guest.qemuPID)/mem", O_RDWR)
        pages = Int(ram.byteCount / 4096)
        var base: UInt64?
        for line in try Files.read("/proc/\(guest.qemuPID)/maps", limit: 1 << 26).split(separator: "\n") {
            let words = line.split(separator: " ", omittingEmptySubsequences: true)
            guard words.count > 5, UInt64(words[4]) == ram.identity.inode, words[5].hasPrefix("/memfd:quire-"),
                let begin = UInt64(words[0].split(separator: "-")[0], radix: 16), let offset = UInt64(words[2], radix: 16)
            else { continue }
            base = begin - offset
            break
        }
        guard let base else { throw Trouble("QEMU maps no guest RAM") }
        self.base = base
    }

    /// Entries of `gfns` that say merged.
    func mergedCount(_ gfns: Range<Int>) throws -> Int {
        var entries = [UInt64](repeating: 0, count: gfns.count)
        let got = unsafe entries.withUnsafeMutableBytes {
            unsafe pread(map.raw, $0.baseAddress!, $0.count, off_t(4096 + gfns.lowerBound * 8))
        }
        guard got == gfns.count * 8 else { throw Trouble("cannot read the page map") }
        return entries.count { [QUIRE_MAP_ZERO.rawValue, QUIRE_MAP_SHARED.rawValue].contains(UInt32($0 & 0xff)) }
    }

    func kinds() throws -> [Kind] {
        var entries = [UInt64](repeating: 0, count: pages)
        let got = unsafe entries.withUnsafeMutableBytes { unsafe pread(map.raw, $0.baseAddress!, $0.count, 4096) }
        guard got == pages * 8 else { throw Trouble("cannot read the page map") }
        return try entries.map { entry in
            switch UInt32(entry & 0xff) {
            case QUIRE_MAP_PRIVATE.rawValue: return .private
            case QUIRE_MAP_HOLE.rawValue: return .hole
            case QUIRE_MAP_ZERO.rawValue: return .zero
            case QUIRE_MAP_SHARED.rawValue: return .shared(slot: entry >> UInt64(QUIRE_MAP_SLOT_SHIFT))
            default: throw Trouble("an entry that is none: \(entry)")
            }
        }
    }

    /// Guest pages mapped to slots (or diverged from them), to zeros, and the slots.
    func merged() throws -> (sharing: Int, zero: Int, slots: Set<UInt64>) {
        var sharing = 0, zero = 0, slots: Set<UInt64> = []
        for kind in try kinds() {
            switch kind {
            case .shared(let slot):
                sharing += 1
                slots.insert(slot)
            case .zero: zero += 1
            case .private, .hole: break
            }
        }
        return (sharing, zero, slots)
    }

    /// A page as the guest sees it.
    func read(_ gfn: UInt64, count: Int = 4096) throws -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: count)
        guard unsafe pread(memory.raw, &bytes, count, off_t(base + gfn * 4096)) == count else {
            throw Trouble("cannot read page \(gfn) in QEMU")
        }
        return bytes
    }

    /// Changes what the guest sees, behind its back.
    func write(_ gfn: UInt64, at offset: Int, _ bytes: [UInt8]) throws {
        guard unsafe pwrite(memory.raw, bytes, bytes.count, off_t(base + gfn * 4096) + off_t(offset)) == bytes.count else {
            throw Trouble("cannot write page \(gfn) in QEMU")
        }
    }
}
