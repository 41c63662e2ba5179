import CQuireLayout
import Engines
import Glibc
import Platform
import Testing

@Suite(.serialized, .needsMerging) struct ProtocolTests {
    @Test func hello() throws {
        let rig = try Rig(pages: 64)
        try rig.accept()
        let hello = rig.connection.hello
        #expect(hello.count == 40 && Array(hello[8..<16]) == Array(QUIRE_AGENT_MAGIC.utf8))
        #expect(hello.u32(16) == QUIRE_AGENT_VERSION && Int32(bitPattern: hello.u32(20)) == rig.pid)
        // What this machine's kernel must have, or nothing here works.
        #expect(hello.u64(24) & 2 != 0 && hello.u64(32) > 1000)
        #expect(rig.connection.memoryDescriptor != nil)
        let ready = try rig.attach()
        #expect(ready.status == QUIRE_AGENT_OK.rawValue && ready.text == "" && ready.addresses.count == 1)
        #expect(ready.capabilities == hello.u64(24))
        let maps = try Files.read("/proc/\(rig.pid)/maps", limit: 1 << 20)
        #expect(maps.contains(String(ready.addresses[0], radix: 16) + "-"))
        #expect(try rig.connection.gate(becomes: false)?.text == "")
    }

    @Test func wrongVersion() throws {
        let rig = try Rig(pages: 64, ["kinds=cf"])
        try rig.accept()
        let ready = try rig.attach(version: QUIRE_AGENT_VERSION + 1)
        #expect(ready.status == QUIRE_AGENT_WRONG_VERSION.rawValue)
        #expect(ready.text.contains("version 1") && ready.text.contains("backend 2"))
        // Nothing was attached, so a command ends the connection; and the agent comes back for a better one.
        try rig.connection.begin(.merge, [Run(gfn: rig.gfn(0))])
        #expect(try rig.connection.end() == nil)
        try rig.begin()
        #expect(try rig.run(.merge, 3, 1, value: 1).reason != .invalid)
        #expect(try rig.finish() == "good")
    }

    /// Unprivileged, as libvirt runs QEMU: without help it's told so, with a descriptor of /dev/userfaultfd it works.
    @Test func withoutUserfaultfd() throws {
        try #require(geteuid() == 0)
        let rig = try Rig(
            pages: 64, prefix: ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all"])
        try rig.accept()
        // What the kernel can do is known when there is a userfaultfd.
        #expect(rig.connection.hello.u64(24) & 7 == 0)
        let refused = try rig.attach()
        #expect(refused.status == QUIRE_AGENT_NO_USERFAULTFD.rawValue && refused.text.contains("/dev/userfaultfd"))
        let device = try Descriptor.open("/dev/userfaultfd", O_RDWR)
        let ready = try rig.attach(userfault: device.raw)
        #expect(ready.status == QUIRE_AGENT_OK.rawValue && ready.capabilities & 7 == 6)
        _ = try rig.tell("fill 0 5")
        #expect(try rig.run(.merge, 0, 1, value: 5).reason == .done)
        #expect(try rig.tell("is 0 5") == 1)
    }

    @Test func foreignRegionsAndMaps() throws {
        let rig = try Rig(pages: 64, ramPages: 64)
        try rig.accept()
        for region in [
            Region(gfn: rig.gfn(0), pages: 65), Region(gfn: rig.gfn(0), pages: 1, offset: 64 * 4096),
            Region(gfn: rig.gfn(0), pages: 1, offset: 1), Region(gfn: rig.gfn(0), pages: 1, offset: .max - 4095),
        ] {
            #expect(try rig.attach(regions: [region]).status == QUIRE_AGENT_NOT_MAPPED.rawValue)
        }
        for region in [
            Region(gfn: rig.gfn(0), pages: 1, file: 1), Region(gfn: 1 << 40, pages: 1), Region(gfn: rig.gfn(0), pages: 0),
        ] {
            #expect(try rig.attach(regions: [region]).status == QUIRE_AGENT_REFUSED.rawValue)
        }
        for pair in [
            [Region(gfn: rig.gfn(0), pages: 2), Region(gfn: rig.gfn(1), pages: 2, offset: 4 * 4096)],
            [Region(gfn: rig.gfn(0), pages: 2), Region(gfn: rig.gfn(9), pages: 2, offset: 4096)],
        ] {
            #expect(try rig.attach(regions: pair).status == QUIRE_AGENT_REFUSED.rawValue)
        }
        let unmapped = try Memfd(name: "other", byteCount: 1 << 20).takeDescriptor()
        let regions = [Region(gfn: rig.gfn(0), pages: 64)]
        let connection = rig.connection!
        #expect(
            try connection.attach(regions: regions, map: rig.mapFile.raw, files: [unmapped.raw], stores: []).status
                == QUIRE_AGENT_NOT_MAPPED.rawValue)
        // It could shrink under QEMU's mappings.
        let unsealed = try Descriptor.open(rig.folder + "/store", O_RDWR | O_CREAT)
        #expect(
            try connection.attach(regions: regions, map: rig.mapFile.raw, files: [rig.ram.raw], stores: [unsealed.raw])
                .status == QUIRE_AGENT_REFUSED.rawValue)
        #expect(try rig.attach().status == QUIRE_AGENT_OK.rawValue)
        let other = try PageMap.makeFile(pageCount: 4096)
        _ = try PageMap(other.duplicate())
        func attachOther() throws -> UInt32 {
            try connection.attach(regions: regions, map: other.raw, files: [rig.ram.raw], stores: []).status
        }
        // Nothing is merged: the bytes are where any map says. Then some are elsewhere.
        #expect(try attachOther() == QUIRE_AGENT_REFUSED.rawValue)
        #expect(try rig.attach().status == QUIRE_AGENT_OK.rawValue)
        #expect(try connection.gate(becomes: false) != nil)
        #expect(try rig.run(.zero, 0, 1).done == 1)
        #expect(try attachOther() == QUIRE_AGENT_OTHER_MAP.rawValue)
        #expect(try rig.attach().status == QUIRE_AGENT_OK.rawValue)
    }

    /// A page map that speaks of merges which this QEMU never made.
    @Test func mapOfAnotherLife() throws {
        let rig = try Rig(pages: 64)
        rig.map.move(rig.gfn(5), from: .private, to: .zero, by: .agent)
        try rig.accept()
        #expect(try rig.attach().status == QUIRE_AGENT_OTHER_MAP.rawValue)
    }

    /// Regions come and go as the guest's memory map changes; merged pages stay what they are.
    @Test func regionsChange() throws {
        let rig = try Rig(pages: 1024)
        try rig.begin()
        _ = try rig.tell("fill 600 5")
        #expect(try rig.run(.merge, 600, 1, value: 5).done == 1)
        let low = Region(gfn: rig.gfn(0), pages: 100)
        let high = Region(gfn: rig.gfn(200), pages: 824, offset: 200 * 4096)
        #expect(try rig.attach(regions: [low, high]).status == QUIRE_AGENT_OK.rawValue)
        #expect(try rig.run(.fold, 150).reason == .invalid && rig.run(.fold, 99, 2).reason == .invalid)
        #expect(try rig.tell("is 600 5") == 1)
        // A merged page that has moved is no longer the one that the map means.
        let moved = Region(gfn: rig.gfn(0), pages: 824, offset: 200 * 4096)
        #expect(try rig.attach(regions: [moved]).status == QUIRE_AGENT_OTHER_MAP.rawValue)
        #expect(try rig.attach(regions: [low, high]).status == QUIRE_AGENT_OK.rawValue)
        #expect(try rig.run(.fold, 600).done == 1 && rig.tell("is 600 5") == 1)
        #expect(try rig.attach(regions: [moved]).status == QUIRE_AGENT_OK.rawValue)
    }

    /// A guest goes to and fro between two memory maps, as with the shadow RAM of its firmware: what QEMU keeps of them grows once.
    @Test func regionsGoToAndFro() throws {
        let rig = try Rig(pages: 1024)
        try rig.begin()
        func alternate(_ times: Int) throws {
            for time in 0..<times {
                let regions = [Region(gfn: rig.gfn(0), pages: time % 2 == 0 ? 100 : 200)]
                #expect(try rig.attach(regions: regions).status == QUIRE_AGENT_OK.rawValue)
            }
        }
        /// In KiB: all that is private and writable.
        func memory() throws -> Int {
            let lines = try Files.read("/proc/\(rig.pid)/status", limit: 1 << 16).split(separator: "\n")
            let words = try #require(lines.first { $0.hasPrefix("VmData:") }).split { $0 == " " || $0 == "\t" }
            return try #require(Int(words[1]))
        }
        try alternate(20)
        let before = try memory()
        try alternate(600)
        // Each table has more than 2.5 KiB.
        #expect(try memory() - before < 600)
    }

    @Test func anotherAttachBringsStores() throws {
        let rig = try Rig(pages: 64)
        try rig.begin()
        _ = try rig.tell("fill 0 5")
        let run = Run(gfn: rig.gfn(0), slot: 5 * 64, store: 1)
        #expect(try rig.connection.run(.merge, [run])[0].reason == .invalid)
        #expect(try rig.attach(stores: 2).status == QUIRE_AGENT_OK.rawValue)
        #expect(try rig.connection.run(.merge, [run])[0].reason == .done)
        #expect(rig.map.state(of: rig.gfn(0)) == .shared(store: 1, slot: 5 * 64))
    }

    /// Each of these ends the connection, and does nothing else.
    @Test func brokenMessages() throws {
        let rig = try Rig(pages: 1024, ["kinds=cf"])
        var attach = Fields()
        for value: UInt32 in [1, 0, 1, 1, 65, 0] { attach.add(value) }
        attach.add(zeros: 32 + 65 * 32)
        var command = Fields()
        command.add(UInt64(1))
        command.add(UInt32(1))
        command.add(UInt32(3))
        command.add(zeros: 16 + 24)
        for (type, body) in [
            (UInt32(0), []), (99, [1, 2, 3]), (QUIRE_AGENT_ATTACH.rawValue, []), (QUIRE_AGENT_ATTACH.rawValue, attach.bytes),
            (QUIRE_AGENT_COMMAND.rawValue, []), (QUIRE_AGENT_COMMAND.rawValue, command.bytes),
            (QUIRE_AGENT_HELLO.rawValue, command.bytes),
        ] as [(UInt32, [UInt8])] {
            try rig.begin()
            try rig.connection.send(type, body)
            #expect(try rig.connection.receive(QUIRE_AGENT_RESULT.rawValue) == nil)
        }
        try rig.begin()
        try rig.connection.socket.send([1, 2, 3])
        #expect(try rig.connection.receive(QUIRE_AGENT_RESULT.rawValue) == nil)
        try rig.begin()
        try rig.connection.socket.send([UInt8](repeating: 7, count: 20_000))
        #expect(try rig.connection.receive(QUIRE_AGENT_RESULT.rawValue) == nil)
        try rig.begin()
        #expect(try rig.finish() == "good")
    }
}
