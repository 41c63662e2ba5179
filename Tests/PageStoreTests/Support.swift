import CQuireLayout
import Glibc
import Logging
import PageContent
import PageStore
import Platform
import StoreProtocol

/// A keeper in this process: what is parked outlives a store that is dropped as if it had been killed.
final class MemoryParking: Parking {
    private let items = Monitor<[String: [Int32]]>([:])

    func park(_ name: String, _ descriptors: [Int32]) throws(QuireError) {
        var copies: [Int32] = []
        for raw in descriptors { copies.append(try Descriptor.duplicate(of: raw).release()) }
        unpark(name)
        items.update { $0[name] = copies }
    }

    func unpark(_ name: String) {
        for raw in items.update({ $0.removeValue(forKey: name) }) ?? [] { close(raw) }
    }

    var names: [String] { items.read { $0.keys.sorted() } }

    func handOver() throws -> [ParkedItem] {
        try items.read { $0 }.sorted { $0.key < $1.key }.map { name, raw in
            var list = UnixSocket.PassedDescriptors()
            list.append(try raw.map { try Descriptor.duplicate(of: $0).release() })
            return ParkedItem(name: name, descriptors: list)
        }
    }

    deinit { for name in names { unpark(name) } }
}

let quietLogger = Logger(label: "test") { _ in SwiftLogNoOpLogHandler() }

func configuration(limit: Int = 1 << 16, candidates: Int = 1 << 20) throws -> PageStore.Configuration {
    try PageStore.Configuration(limitPages: limit, candidateBytes: candidates)
}

/// A page whose content is a number: every word depends on it, and 0 is not a page of zeros.
func page(_ content: UInt64) -> [UInt8] {
    var words: [UInt64] = []
    words.reserveCapacity(512)
    for index in 0..<UInt64(512) { words.append((content &+ 1) &* 0x9E37_79B9_7F4A_7C15 ^ index) }
    return unsafe words.withUnsafeBytes { unsafe Array($0) }
}

let zeroPage = [UInt8](repeating: 0, count: 4096)

/// The memory files of one VM, as its backend and its QEMU have them: RAM, page map, and a life.
final class FakeVM {
    let name: String
    let group: String
    let firstGFN: UInt64
    let pages: Int
    let ram: Descriptor
    let map: Descriptor
    private var life: Pipe

    init(_ name: String, group: String = "", pages: Int = 256, firstGFN: UInt64 = 0) throws {
        self.name = name
        self.group = group
        self.pages = pages
        self.firstGFN = firstGFN
        ram = try Memfd(name: "ram", byteCount: UInt64(pages) * 4096).takeDescriptor()
        map = try Memfd(name: "map", byteCount: 4096 + 8 * (firstGFN + UInt64(pages))).takeDescriptor()
        try map.writeBytes(at: 0, Array(QUIRE_MAP_MAGIC.utf8) + [1, 0, 0, 0])
        life = try Pipe()
    }

    var gfns: Range<UInt64> { firstGFN..<firstGFN + UInt64(pages) }
    var lifeRaw: Int32 { life.reader.raw()! }
    func end() { life.closeWriter() }

    func write(_ gfn: UInt64, _ content: [UInt8]) throws { try ram.writeBytes(at: (gfn - firstGFN) * 4096, content) }
    func read(_ gfn: UInt64) throws -> [UInt8] { try ram.readBytes(at: (gfn - firstGFN) * 4096, count: 4096) }

    /// The page-map entry of a page that QEMU maps from a store, or does not any more.
    func setShared(_ gfn: UInt64, _ slot: UInt32?, store: UInt32 = 0) throws {
        let entry: UInt64 =
            if let slot { UInt64(QUIRE_MAP_SHARED.rawValue) | UInt64(slot) << 8 | UInt64(store) << 48 } else { 0 }
        try map.writeWords(at: 4096 + 8 * gfn, [UInt32(truncatingIfNeeded: entry), UInt32(entry >> 32)][...])
    }

    var region: StoreRequest.Region { .init(gfn: firstGFN, pages: UInt64(pages), offset: 0, file: 0) }

    func memory() throws -> GuestRAM {
        var files = DescriptorList()
        files.append(try ram.duplicate())
        return try GuestRAM([region], files: files)
    }

    func admit(to store: PageStore, uid: UInt32 = 1000) throws -> (machine: Machine, welcome: StoreReply.Welcome) {
        let (machine, welcome) = try store.admit(
            .init(name: name, group: group), uid: uid, map: map.duplicate(), life: Descriptor.duplicate(of: lifeRaw))
        machine.setMemory(try memory())
        return (machine, welcome)
    }
}

/// A VM that has joined a store, and does what a backend would.
final class Guest {
    let vm: FakeVM
    let store: PageStore
    let machine: Machine
    let hasher: PageHasher
    let slots: Descriptor
    let scratch: ScratchPage

    final class ScratchPage {
        let mapping: Mapping
        init() throws { mapping = try PageStore.makeScratch() }
    }

    init(_ vm: FakeVM, in store: PageStore, uid: UInt32 = 1000) throws {
        self.vm = vm
        self.store = store
        let (machine, welcome) = try vm.admit(to: store, uid: uid)
        self.machine = machine
        hasher = PageHasher(secret: welcome.secret)
        slots = try PageStore.readOnlyStore(of: machine)
        scratch = try ScratchPage()
    }

    func hash(_ bytes: [UInt8]) -> PageHash { hasher.hash(unsafe bytes.span.bytes) }

    /// Looks the pages up with the hashes that they have now.
    func lookUp(_ runs: [Range<UInt64>]) throws -> [SlotRun] {
        var lookup = StoreRequest.Lookup()
        for run in runs { lookup.append(run.lowerBound, try run.map { hash(try vm.read($0)) }) }
        return try store.lookUp(machine, lookup, scratch: scratch.mapping)
    }

    func lookUp(_ gfn: UInt64) throws -> UInt32? { try lookUp([gfn..<gfn + 1]).first?.slot }

    func content(of slot: UInt32) throws -> [UInt8] { try slots.readBytes(at: UInt64(slot) * 4096, count: 4096) }
    func useCount(_ slot: UInt32) -> Int { store.useCount(of: slot, in: machine) }

    /// What the agent does: compares, maps, and gives the page's memory back.
    func merge(_ gfn: UInt64, _ slot: UInt32) throws -> Bool {
        try vm.setShared(gfn, slot)
        guard try content(of: slot) == vm.read(gfn) else {
            try vm.setShared(gfn, nil)
            _ = try machine.report([.init(.released, gfn..<gfn + 1)])
            return false
        }
        try Memfd.punch(vm.ram.raw, offset: (gfn - vm.firstGFN) * 4096, byteCount: 4096)
        _ = try machine.report([.init(.merged, gfn..<gfn + 1)])
        return true
    }
}

/// The one-line message that `body` fails with; nil if it does not fail.
func message<R: ~Copyable>(_ body: () throws -> R) -> String? {
    do {
        _ = try body()
        return nil
    } catch {
        return "\(error)"
    }
}
