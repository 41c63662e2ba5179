import Platform

/// 512 MiB that come and go. The machine needs slots and a larger maxmem.
struct DIMM {
    /// The guest's memory blocks that are not it.
    fileprivate let otherBlocks: Set<String>

    /// Has a guest take what was plugged into use: movable, so that it can be taken away again.
    static let online = "for m in /sys/devices/system/memory/memory*/state; do grep -q offline $m && echo online_movable > $m; done; true"
}

extension Guest {
    private static let blocks = "/sys/devices/system/memory"

    private func memoryBlocks() throws -> Set<String> {
        Set(try sh("cd \(Self.blocks); echo memory[0-9]*").split(whereSeparator: \.isWhitespace).map(String.init))
    }

    /// Plugs one, and has the guest take its memory into use.
    func plugDIMM() throws -> DIMM {
        let before = try memoryBlocks()
        try qmp.command(
            "object-add",
            [
                "qom-type": .string("memory-backend-memfd"), "id": .string("more"), "size": .number(Double(512 << 20)),
                "share": .bool(true),
            ])
        try qmp.command("device_add", ["driver": .string("pc-dimm"), "id": .string("dimm"), "memdev": .string("more")])
        try wait(for: "the guest to see the DIMM") { try memoryBlocks().count == before.count + 4 }
        try sh(DIMM.online)
        return DIMM(otherBlocks: before)
    }

    func takeOffline(_ dimm: DIMM) throws {
        let others = dimm.otherBlocks.joined(separator: " ")
        try wait(for: "the DIMM to go offline", within: Effort.patience * 2) {
            try sh(
                """
                cd \(Self.blocks); for m in memory[0-9]*; do case " \(others) " in *" $m "*) ;; \
                *) grep -q offline $m/state || echo offline > $m/state 2>/dev/null;; esac; done; true
                """, within: Effort.patience * 2)
            return try sh("cat \(Self.blocks)/memory[0-9]*/state | grep -c online").filter(\.isNumber)
                == "\(dimm.otherBlocks.count)"
        }
    }

    /// When it is offline.
    func unplug(_ dimm: DIMM) throws {
        try qmp.command("device_del", ["id": .string("dimm")])
        try wait(for: "the DIMM to be unplugged") { try qmp.command("query-memory-devices") == .array([]) }
        try wait(for: "QEMU to let the memory go") {
            (try? qmp.command("object-del", ["id": .string("more")])) != nil
        }
    }
}
