import Glibc
import PageContent
import PageStore
import Platform
import TestSupport
import Testing

/// The list of what is parked: it is whole, or nothing of what it is about is used.
@Suite struct ManifestTests {
    private static let size = 1 << 20
    private static let some: Manifest.Entries = [
        "store-owner-0-0": [.init(device: 1, inode: 0xfedc_ba98_7654_3210)],
        "vm-a": [.init(device: 0x10, inode: 7), .init(device: 0x10, inode: .max)], "empty": [],
    ]

    /// A manifest's file, as another process would have it.
    private static func make(_ entries: Manifest.Entries) throws -> Descriptor {
        var manifest = try Manifest(nil)
        try manifest.write(entries)
        return try manifest.file.duplicate()
    }

    /// What somebody finds in the file.
    private static func found(_ file: borrowing Descriptor) throws -> Manifest.Entries? { try Manifest(file.duplicate()).read() }

    /// With a sum that is right.
    private static func text(_ body: String, seed: UInt64 = 0x7175_6972_6564) -> [UInt8] {
        Array("\(String(checksum(body.utf8, seed: seed), radix: 16))\n\(body)\0".utf8)
    }

    @Test func roundTrip() throws {
        let file = try Self.make(Self.some)
        #expect(try Self.found(file) == Self.some)
        let none = try Self.make([:])
        #expect(try Self.found(none) == [:])
        // A shorter one over a longer one, and one entry after another.
        var manifest = try Manifest(file.duplicate())
        try manifest.write(["b": Self.some["vm-a"]!])
        #expect(try manifest.read() == ["b": Self.some["vm-a"]!])
        try manifest.set("a", [])
        try manifest.set("b", nil)
        #expect(try manifest.read() == ["a": []])
    }

    /// Cut off anywhere, and with any bit of it flipped: refused, or what was written (a digit of the sum in the other case).
    @Test func damage() throws {
        let file = try Self.make(Self.some)
        let whole = Array(try file.readBytes(at: 0, count: Self.size).prefix { $0 != 0 }), used = whole.count
        for count in 0..<used {
            try file.writeBytes(at: UInt64(count), [UInt8](repeating: 0, count: used - count))
            #expect(try Self.found(file) == nil, "cut off behind \(count) bytes")
            try file.writeBytes(at: 0, whole)
        }
        var same = 0
        for (place, byte) in (whole + [0]).enumerated() {
            for bit in 0..<8 {
                try file.writeBytes(at: UInt64(place), [byte ^ 1 << UInt8(bit)])
                let found = try Self.found(file)
                #expect(found == nil || found == Self.some, "bit \(bit) of byte \(place)")
                if found != nil { same += 1 }
            }
            try file.writeBytes(at: UInt64(place), [byte])
        }
        #expect(same <= 16, "the sum's own digits")
        #expect(try Self.found(file) == Self.some)
        // Nothing, and a file that ends early.
        try file.writeBytes(at: 0, [UInt8](repeating: 0, count: used))
        #expect(try Self.found(file) == nil)
        #expect(try Self.found(Memfd(name: "short", byteCount: 4096).takeDescriptor()) == nil)
    }

    /// Of a writer that counts, orders or names otherwise: its sum is right, and it is refused all the same.
    @Test(arguments: ["a\t1\n", "a\t1\t2\t3\n", "a\t1\tx\n", "a\t1\t-2\n", "\t1\t2\n", "a\t1\t10000000000000000\n", "2\nversion\t2\n"])
    func whatItDoesNotMean(_ body: String) throws {
        let file = try Self.make([:])
        try file.writeBytes(at: 0, Self.text(body))
        #expect(try Self.found(file) == nil)
        // Which is not for its sum.
        try file.writeBytes(at: 0, Self.text("a\t1\t2\n"))
        #expect(try Self.found(file) == ["a": [.init(device: 1, inode: 2)]])
        try file.writeBytes(at: 0, Self.text("a\t1\t2\n", seed: 1))
        #expect(try Self.found(file) == nil)
    }

    @Test func thereIsNoRoomForever() throws {
        var manifest = try Manifest(nil)
        try manifest.write(["a": []])
        let many = Dictionary(uniqueKeysWithValues: (0..<12_000).map { ("\($0)" + String(repeating: "x", count: 100), [FileStatus.Identity]()) })
        #expect(message { try manifest.write(many) } == "more is parked than there is room to list")
        #expect(try manifest.read() == ["a": []])
    }

    // MARK: - What is parked, by it

    /// What a worker makes of what its keeper hands over; and what it then asks the keeper to forget.
    private struct Handed {
        var parked: [String: Int] = [:]
        var loss: String?
        var forgotten: Set<String> = []
        /// What was handed over, but for the list.
        var given: Set<String> = []
    }

    /// `isChecked`: it comes from a keeper that lives. `change`: between the list and what is handed over.
    private static func handOver(
        isChecked: Bool = false, _ change: (inout [(name: String, files: [Int32])], Int32) throws -> Void
    ) throws -> Handed {
        var files: [Int32] = []
        for number in 0..<4 { files.append(try Memfd(name: "item-\(number)", byteCount: 4096).takeDescriptor().release()) }
        defer { for raw in files { close(raw) } }
        var items = [(name: "a", files: [files[0]]), (name: "b", files: [files[1], files[2]])]
        var entries: Manifest.Entries = [:]
        for item in items { entries[item.name] = try item.files.map { try FileStatus(of: $0).identity } }
        let list = try make(entries)
        try change(&items, list.raw)
        var pair = try MessagePair()
        let keeper = UnixSocket(adopting: pair.takeNear())
        for item in items { try keeper.sendMessage(Array("P\(item.name)".utf8), passing: item.files) }
        try keeper.sendMessage(Array((isChecked ? "E" : "C").utf8))
        var handed = Handed()
        handed.given = Set(items.map(\.name)).subtracting(["manifest"])
        do {
            let link = try KeeperLink(adopting: pair.takeFar())
            handed.loss = link.loss
            for item in link.parked {
                var count = 0
                while let descriptor = item.descriptors.next() {
                    count += 1
                    _ = consume descriptor
                }
                handed.parked[item.name] = count
            }
        }
        var passed = UnixSocket.PassedDescriptors()
        while let message = try keeper.receiveMessage(limit: 256, maxDescriptors: 8, into: &passed) {
            if message.first == UInt8(ascii: "U") { handed.forgotten.insert(String(decoding: message.dropFirst(), as: UTF8.self)) }
        }
        return handed
    }

    /// The whole list is here: all of it is used. One more that is not on the list is nobody's any more.
    @Test func completeIsUsed() throws {
        let whole = try Self.handOver { items, list in items.append(("manifest", [list])) }
        #expect(whole.loss == nil && whole.parked == ["a": 1, "b": 2] && whole.forgotten == [])
        let more = try Self.handOver { items, list in
            items.append(("manifest", [list]))
            items.append(("c", [items[0].files[0]]))
        }
        #expect(more.loss == nil && more.parked == ["a": 1, "b": 2] && more.forgotten == ["c"])
    }

    static let damages: [(String, @Sendable (inout [(name: String, files: [Int32])], Int32) throws -> Void)] = [
        ("no list", { items, list in }),
        ("an item is missing", { items, list in items = [items[0], ("manifest", [list])] }),
        ("a descriptor is missing", { items, list in items = [items[0], ("b", [items[1].files[0]]), ("manifest", [list])] }),
        ("a descriptor too many", { items, list in items = [("a", items[0].files + items[1].files), items[1], ("manifest", [list])] }),
        ("in another order", { items, list in items = [items[0], ("b", items[1].files.reversed()), ("manifest", [list])] }),
        ("another's file", { items, list in items = [("a", [items[1].files[0]]), items[1], ("manifest", [list])] }),
        ("the list is damaged", { items, list in
            let file = try Descriptor.duplicate(of: list)
            try file.writeBytes(at: 20, [0])
            items.append(("manifest", [list]))
        }),
    ]

    /// Nothing of it is used, one line says so, and the keeper is to forget all of it.
    @Test(arguments: damages.indices) func nothingIsHalfUsed(_ index: Int) throws {
        let (name, change) = Self.damages[index]
        let handed = try Self.handOver(change)
        #expect(handed.parked == [:] && handed.forgotten == handed.given, "\(name)")
        #expect(handed.loss == "the service manager has not kept all that was parked: beginning anew, VMs go on with what they map", "\(name)")
        // The control: believed, as a keeper that lives is, half of it would be used.
        let believed = try Self.handOver(isChecked: true, change)
        #expect(believed.loss == nil && !believed.parked.isEmpty, "\(name)")
    }
}
