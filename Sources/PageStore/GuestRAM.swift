import Glibc
import Platform
import StoreProtocol

/// Where a VM says its pages are: files that the VM's side owns and may change, truncate or fill with lies at any
/// moment. They are only ever read, by `pread`, which such a file cannot turn into a signal.
package final class GuestRAM: Sendable {
    /// Sorted by gfn, disjoint.
    private let regions: [StoreRequest.Region]
    private let files: DescriptorList

    package init(_ regions: [StoreRequest.Region], files: consuming DescriptorList) throws(QuireError) {
        for raw in files.raw { try Self.checkIsSharedMemory(raw, "a file of guest RAM") }
        for region in regions {
            guard region.file < files.raw.count else {
                throw QuireError(.invalid, "a region is in file \(region.file), and only \(files.raw.count) were passed")
            }
            guard region.offset % 4096 == 0, region.offset <= UInt64(Int64.max) - region.pages * 4096 else {
                throw QuireError(.invalid, "a region at offset \(region.offset) is not aligned to pages of 4 KiB")
            }
            // As long as its file, now: what it is said to have is counted with.
            guard region.offset + region.pages * 4096 <= (try FileStatus(of: files.raw[region.file]).byteCount) else {
                throw QuireError(.invalid, "a region of \(region.pages) pages at offset \(region.offset) is more than its file has")
            }
        }
        let sorted = regions.sorted { $0.gfn < $1.gfn }
        for (lower, upper) in zip(sorted, sorted.dropFirst()) where lower.gfns.upperBound > upper.gfn {
            throw QuireError(.invalid, "regions at gfns \(lower.gfn) and \(upper.gfn) overlap")
        }
        self.regions = sorted
        self.files = files
    }

    /// Files whose reads could wait for a disk, a network or a FUSE server are not taken.
    static func checkIsSharedMemory(_ raw: Int32, _ what: String) throws(QuireError) {
        guard try FileStatus(of: raw).isRegularFile else { throw QuireError(.invalid, "\(what) is no file") }
        guard try Memfd.kind(of: raw) == .shmem else {
            throw QuireError(.unsupported, "\(what) is not in shared memory with small pages (a memfd)")
        }
    }

    private func region(of gfn: UInt64) -> StoreRequest.Region? {
        var low = 0, high = regions.count
        while low < high {
            let middle = (low + high) / 2
            let gfns = regions[middle].gfns
            if gfn < gfns.lowerBound {
                high = middle
            } else if gfn >= gfns.upperBound {
                low = middle + 1
            } else {
                return regions[middle]
            }
        }
        return nil
    }

    /// Pages of all regions.
    var pageCount: Int { regions.reduce(0) { $0 + Int($1.pages) } }

    /// Whether all of these are RAM.
    func contains(_ gfns: Range<UInt64>) -> Bool {
        var gfn = gfns.lowerBound
        while gfn < gfns.upperBound {
            guard let region = region(of: gfn) else { return false }
            gfn = region.gfns.upperBound
        }
        return true
    }

    /// Reads up to `count` pages from `gfn` on to `offset` of a mapping. Returns how many came whole: fewer where RAM
    /// or its file ends.
    func read(_ gfn: UInt64, count: Int, into mapping: borrowing Mapping, at offset: Int) -> Int {
        var done = 0
        while done < count, let region = region(of: gfn + UInt64(done)) {
            let first = gfn + UInt64(done)
            let pages = min(count - done, Int(region.gfns.upperBound - first))
            let n = mapping.read(
                files.raw[region.file], at: region.offset + (first - region.gfn) * 4096, to: offset + done * 4096,
                count: pages * 4096)
            done += max(0, n) / 4096
            if n < pages * 4096 { break }
        }
        return done
    }
}
