import CQuireLayout
import Glibc
import Host
import Platform
import StoreProtocol

/// Running VMs without guests: folders in a runtime directory of their own, with locks that are held and status pages that
/// were written once. Numbers follow from a VM's place, so they are the same in every run. Gone with the value.
public final class SyntheticVMs {
    private final class Holder {
        var claim: RuntimeDirectory.Claim?
        init(_ claim: consuming RuntimeDirectory.Claim) { self.claim = consume claim }
    }

    public let directory: RuntimeDirectory
    public let names: [String]
    private var holders: [Holder] = []

    /// A reason that would be markup where it is not escaped.
    public static let hostileReason = "<img src=x onerror=\"document.title='owned'\">\u{1B}[2J"

    /// Every tenth VM is paused, with a hostile reason.
    public init(_ count: Int, base: String) throws(QuireError) {
        directory = RuntimeDirectory(base: base)
        names = (0..<count).map { "vm-\(String(repeating: "0", count: 3 - min(3, "\($0)".count)))\($0)" }
        for (index, name) in names.enumerated() {
            let claim = try directory.claim(name)
            try Self.write(index, name, claim.statusPath)
            holders.append(Holder(claim))
        }
    }

    /// What a VM's page says; with `step` other numbers.
    public static func write(_ index: Int, _ name: String, _ path: String, step: UInt64 = 0) throws(QuireError) {
        let number = UInt64(index) + 1
        let writer = try StatusPage.Writer(path: path, name: name, pid: ProcessCalls.ownPID)
        writer.beat()
        writer.setRAM(bytes: (1 + number % 4) << 30, resident: (100 << 20) + number * 4096)
        writer.setRecycled(
            now: 10_000 + number * 3 + step, total: 1_000_000 + number * 7 + step, rateMillipages: number * 1500)
        writer.setGuest(freeMarkedPages: number * 5, waits: number * 2, refilledPages: number)
        writer.setPeriod(milliseconds: 10_000)
        writer.setCosts(cpuNanoseconds: number * 1_000_000, mapBytes: 500_000 + number * 4096)
        var merging = MergeSnapshot()
        merging.state = .active
        merging.periodMilliseconds = 10_000
        merging.sharingPages = 20_000 + (number * 389) % 1000
        merging.zeroPages = 5_000 + number
        merging.divergedPages = number % 100
        merging.hashedTotalPages = number * 100_000
        merging.mergedTotalPages = 30_000 + number
        merging.foldedTotalPages = number * 11
        merging.mergedRateMillipages = number * 250
        merging.mappings = 1000 + number
        merging.mappingLimit = 57_339
        writer.setMerging(merging)
        var tmem = TmemSnapshot()
        tmem.isPresent = true
        tmem.usedBytes = (8 << 20) + number * 4096
        tmem.metadataBytes = number * 512
        var pool = PoolSnapshot()
        pool.name = "swap"
        pool.isPersistent = true
        pool.pages = 4000 + number
        pool.storedBytes = (7 << 20) + number
        pool.puts = number * 13
        pool.hits = number * 5
        tmem.pools = [pool]
        writer.setTmem(tmem)
        writer.setUpdated(nanoseconds: monotonicNanoseconds())
        if index % 10 == 9 {
            writer.setState(.paused, reason: hostileReason)
        } else {
            writer.setState(.active, reason: "")
        }
    }

    deinit {
        for holder in holders {
            if let claim = holder.claim.take() { claim.remove() }
        }
        Files.removeDirectory(directory.base)
    }
}

/// VMs that quired knows, without backends that do anything. Gone with the value.
public final class SyntheticStoreVMs {
    private final class Member {
        let map: Descriptor
        var life: Pipe
        let client: StoreClient

        init(_ name: String, group: String, path: String) throws(QuireError) {
            map = try Memfd(name: "map", byteCount: 4096 + 8 * 262_144).takeDescriptor()
            try map.writeBytes(at: 0, Array(QUIRE_MAP_MAGIC.utf8) + [1, 0, 0, 0])
            life = try Pipe()
            client = try StoreClient.connect(
                to: path, .init(name: name, group: group), pageMap: map.raw, life: life.reader.raw()!)
        }
    }

    private var members: [Member] = []

    public init(_ names: [String], group: String = "", path: String) throws(QuireError) {
        for name in names { members.append(try Member(name, group: group, path: path)) }
    }
}
