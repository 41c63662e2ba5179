import CQuireLayout
import Engines
import Glibc
import Platform
import Testing

/// Mappings: what merging spends, when it stops, and that taking it back needs none.
@Suite(.serialized, .needsMerging) struct BudgetTests {
    /// A merged run in the middle of others, QEMU at vm.max_map_count: every page can still be brought back.
    @Test func takingBackAtTheLimit() throws {
        // At its default: a host may have raised it.
        let path = "/proc/sys/vm/max_map_count", limit = 65_530
        let before = try Files.read(path)
        if before.split(separator: "\n") != ["\(limit)"] { try Descriptor.open(path, O_WRONLY).writeBytes(at: 0, Array("\(limit)".utf8)) }
        defer { if before != "\(limit)\n" { try? Descriptor.open(path, O_WRONLY).writeBytes(at: 0, Array(before.utf8)) } }
        let pages = 1 << 17
        let rig = try Rig(pages: pages, ramPages: pages)
        try rig.begin()
        // Runs of eight with a page between, until the budget says no. Holes are zeros.
        for page in 0..<8 { _ = try rig.tell("fill \(page) 5") }
        for page in 8..<16 { _ = try rig.tell("fill \(page) 6") }
        #expect(try rig.run(.merge, 0, 8, value: 5).done == 8 && rig.run(.merge, 8, 8, value: 6).done == 8)
        var page = 16, refused = false
        while !refused, page + 64 * 2 < pages {
            let runs = (0..<64).map { Run(gfn: rig.gfn(page + 2 * $0)) }
            let outcomes = try rig.connection.run(.zero, runs)
            refused = outcomes.contains { $0.reason == .budget }
            #expect(outcomes.allSatisfy { $0.reason == .done || $0.reason == .budget })
            page += 128
        }
        #expect(refused)
        let used = try mappings(of: rig.pid)
        #expect(used <= Int(rig.connection.mappingLimit) && used > Int(rig.connection.mappingLimit) * 9 / 10)
        #expect(Int(rig.connection.mappingLimit) <= limit * 7 / 8 + 1)
        // QEMU takes all that is left, and one more than it should get: every mmap fails now.
        _ = try rig.tell("spend 1")
        #expect(try mappings(of: rig.pid) >= limit)
        _ = try rig.tell("fill 3 1")
        #expect(try rig.run(.foldDiverged, 0, 8) == Outcome(done: 8, reason: .done, detail: 0))
        #expect((0..<8).allSatisfy { rig.map.state(of: rig.gfn($0)) == .private })
        #expect(try rig.tell("is 3 1") == 1 && rig.tell("is 4 5") == 1 && rig.tell("is 0 5") == 1)
        // And what that gave up, too: nothing can be split. The page comes back with all of its run.
        _ = try rig.tell("spend 0")
        _ = try rig.tell("fill 10 2")
        #expect(try rig.run(.fold, 10).done == 1)
        #expect((8..<16).allSatisfy { rig.map.state(of: rig.gfn($0)) == .private })
        #expect(try rig.tell("is 10 2") == 1 && rig.tell("is 11 6") == 1)
        // Each of these joins with its neighbours, and so gives mappings back.
        #expect(try rig.run(.fold, 16, 2).reason == .done)
        #expect(try rig.run(.reset, 18, 1000).reason == .done)
        #expect(try rig.run(.fold, 1018, 20_000).reason == .done)
        #expect(try mappings(of: rig.pid) < limit - 10_000)
        #expect(try rig.tell("is 16 0") == 1 && rig.tell("is 30000 0") == 1)
    }

    /// A million pages: neighbours join, when they are merged and when they come back.
    @Test func neighboursJoin() throws {
        let pages = 1 << 20
        let rig = try Rig(pages: pages, ramPages: pages)
        try rig.begin()
        let before = try mappings(of: rig.pid)
        func all(_ operation: Operation) throws {
            for start in stride(from: 0, to: pages, by: 1 << 18) {
                let runs = (0..<8).map { Run(gfn: rig.gfn(start + $0 << 15), pages: 1 << 15) }
                #expect(try rig.connection.run(operation, runs).allSatisfy { $0.reason == .done })
            }
        }
        try all(.zero)
        #expect(try mappings(of: rig.pid) <= before + 2)
        // Every other one of 2,048 runs comes back, then the rest.
        for start in stride(from: 0, to: pages, by: 1 << 16) {
            let runs = (0..<64).map { Run(gfn: rig.gfn(start + $0 << 10), pages: 512) }
            #expect(try rig.connection.run(.reset, runs).allSatisfy { $0.reason == .done })
        }
        #expect(try mappings(of: rig.pid) <= before + 2 * 1024 + 2)
        try all(.reset)
        #expect(try mappings(of: rig.pid) <= before + 2)
        #expect((0..<pages).allSatisfy { rig.map.state(of: rig.gfn($0)) == .private })
    }
}
