import Glibc
import Host
import Platform
import Testing

extension Integration {
    /// Memory and CPUs come and go, the module comes and goes, all of it under load.
    @Suite(.serialized) struct Hotplug {
        private static let blocks = "/sys/devices/system/memory"

        /// A DIMM is plugged and onlined under churn: the module makes a larger table, and what is freed in the DIMM goes
        /// back to the host like any other memory. It is offlined and unplugged again, and everything goes on.
        @Test func memory() throws {
            let guest = try Guest(Machine(memory: "512M,slots=4,maxmem=2G"))
            try guest.watched {
                try guest.loadModule()
                try guest.waitForActive()
                let pages = try guest.figure("page_count")
                for round in 1...2 {
                    try guest.startChurn()
                    let blocks = Set(try guest.sh("cd \(Self.blocks); echo memory[0-9]*").split(whereSeparator: \.isWhitespace))
                    try guest.qmp.command(
                        "object-add",
                        [
                            "qom-type": .string("memory-backend-memfd"), "id": .string("more"),
                            "size": .number(Double(512 << 20)), "share": .bool(true),
                        ])
                    try guest.qmp.command(
                        "device_add",
                        ["driver": .string("pc-dimm"), "id": .string("dimm"), "memdev": .string("more")])
                    try guest.wait(for: "the guest to see the DIMM") {
                        let now = try guest.sh("cd \(Self.blocks); echo memory[0-9]*").split(whereSeparator: \.isWhitespace)
                        return now.count == blocks.count + 4
                    }
                    // Movable, so that it can be taken away again.
                    try guest.sh("cd \(Self.blocks); for m in memory*/state; do grep -q offline $m && echo online_movable > $m; done; true")
                    try guest.wait(for: "a larger table") {
                        try guest.figure("page_count") > pages && guest.figure("marking") == 1 && guest.figure("registered") == 1
                    }
                    try guest.waitForActive()
                    try guest.wait(for: "the status to count the DIMM") { guest.status.ramBytes > 1000 << 20 }
                    try guest.expectChurnGoesOn()
                    try guest.stopChurn()

                    // More than the first 512 MiB hold.
                    let load = try guest.console.start("quire-load hold 600")
                    try guest.console.expect("peak\n", within: Guest.patience(for: 60))
                    try guest.wait(for: "the load to be resident") { guest.status.residentBytes > 600 << 20 }
                    try guest.console.send("")
                    #expect(try guest.console.finish(load, within: Effort.patience).status == 0)
                    try guest.wait(for: "the DIMM's memory to be the host's again") { guest.status.residentBytes < 300 << 20 }

                    try guest.startChurn(150, grabbing: 50)
                    try guest.wait(for: "the DIMM to go offline") {
                        try guest.sh(
                            """
                            cd \(Self.blocks); for m in memory*; do case " \(blocks.joined(separator: " ")) " in *" $m "*) ;; \
                            *) grep -q offline $m/state || echo offline > $m/state 2>/dev/null;; esac; done; true
                            """)
                        return try guest.sh("cat \(Self.blocks)/memory*/state | grep -c online").filter(\.isNumber)
                            == "\(blocks.count)"
                    }
                    try guest.expectChurnGoesOn()
                    try guest.qmp.command("device_del", ["id": .string("dimm")])
                    try guest.wait(for: "the DIMM to be unplugged") {
                        try guest.qmp.command("query-memory-devices") == .array([])
                    }
                    try guest.wait(for: "QEMU to let the memory go") {
                        (try? guest.qmp.command("object-del", ["id": .string("more")])) != nil
                    }
                    try guest.waitForActive()
                    try guest.waitForRecycling()
                    try guest.expectChurnGoesOn()
                    try guest.stopChurn()
                    #expect(guest.status.restarts == 0, "round \(round)")
                }
                try guest.expectQuietLog()
                try guest.sh("rmmod quire")
            }
        }

        /// The module unloads and loads under churn, again and again; and a CPU goes and comes under churn.
        @Test func moduleAndCPUs() throws {
            let guest = try Guest(Machine(patchesCodeUnderLoad: true))
            try guest.watched {
                try guest.startChurn()
                try guest.sh(
                    """
                    i=0; while [ $i -lt \(Effort.reloads) ]; do insmod /lib/quire/quire.ko || break; usleep $((i % 5 * 300000)); \
                    rmmod quire || break; i=$((i+1)); done; [ $i = \(Effort.reloads) ]
                    """, within: Guest.patience(for: Effort.reloads * 4))
                #expect(try guest.sh("lsmod | grep -c '^quire ' || true").hasPrefix("0"))
                try guest.expectChurnGoesOn()

                try guest.loadModule()
                try guest.waitForActive()
                for _ in 0..<Effort.cpuCycles {
                    try guest.sh("echo 0 > /sys/devices/system/cpu/cpu1/online", within: Effort.patience)
                    try guest.sh("sleep 1; echo 1 > /sys/devices/system/cpu/cpu1/online", within: Effort.patience)
                }
                #expect(try guest.sh("grep off_because /sys/kernel/debug/quire/state") == "off_because -\n")
                try guest.waitForRecycling()
                try guest.expectChurnGoesOn()
                try guest.stopChurn()
                try guest.expectRecycling()
                try guest.expectQuietLog()
                try guest.sh("rmmod quire")
            }
        }
    }
}
