import Host
import Platform
import Testing

extension Integration {
    /// The guest sleeps, and wakes in memory that the host knew nothing of meanwhile: the module has taken its table back
    /// before, and registers it again after.
    @Suite(.serialized) struct Sleep {
        /// Suspend to RAM under churn, and wake: memory is as it was, nothing was recycled in between, and recycling goes on.
        @Test func suspend() throws {
            let guest = try Guest(Machine(startsPacked: true))
            try guest.watched {
                try guest.loadModule()
                try guest.waitForActive()
                try guest.startChurn()
                for _ in 0..<2 {
                    try guest.waitForRecycling()
                    let command = try guest.console.start("echo mem > /sys/power/state")
                    try guest.wait(for: "the guest to sleep") {
                        try guest.qmp.command("query-status")["status"]?.text == "suspended"
                    }
                    #expect(guest.view.registeredTable == nil)
                    // The status tells of what was, up to a period ago.
                    ProcessCalls.sleep(milliseconds: 1000)
                    let total = guest.status.recycledTotalPages
                    ProcessCalls.sleep(milliseconds: 2000)
                    #expect(guest.status.recycledTotalPages == total)
                    try guest.qmp.command("system_wakeup")
                    #expect(try guest.console.finish(command, within: Effort.patience * 2).status == 0)
                    try guest.waitForActive()
                    try guest.expectChurnGoesOn()
                }
                try guest.waitForRecycling()
                try guest.stopChurn()
                try guest.expectRecycling()
                try guest.expectQuietLog()
            }
        }

        /// Hibernation: the image is written to a swap disk, and another QEMU under another `quire run` reads it back. The
        /// kernel that wakes is the old one, in memory files that never saw its table.
        @Test func hibernation() throws {
            let folder = try Folder()
            let machine = Machine(
                arguments: ["-drive", "file=\(try folder.sparseFile("swap", byteCount: 1 << 30)),format=raw,if=virtio"],
                commandLine: "panic=1 quiet hibernate=nocompress")
            do {
                let guest = try Guest(machine, in: folder)
                try guest.watched {
                    try guest.sh("mkswap /dev/vda && swapon /dev/vda && cat /sys/block/vda/dev > /sys/power/resume || true")
                    try guest.loadModule()
                    try guest.waitForActive()
                    try guest.startChurn(150, grabbing: 50)
                    try guest.waitForRecycling()
                    try guest.sh("echo shutdown > /sys/power/disk")
                    try guest.console.send("echo disk > /sys/power/state; echo awake")
                    #expect(try guest.waitForEnd(within: Effort.patience * 2) == 0)
                }
            }
            let guest = try Guest(machine, in: folder)
            try guest.watched {
                // Init has loaded the disk's driver; from here on the old kernel runs, and its shell goes on.
                try guest.console.send("cat /sys/block/vda/dev > /sys/power/resume; echo no image")
                try guest.console.expect("awake\n", within: Effort.patience * 2)
                try guest.waitForActive()
                try guest.waitForRecycling()
                try guest.expectChurnGoesOn()
                try guest.stopChurn()
                try guest.expectRecycling()
                try guest.expectQuietLog()
            }
        }
    }
}
