import CQuireLayout
import Glibc
import Host
import Platform
import Testing

extension Integration {
    /// Stale marks are the danger: a table dies with the kernel that made it, and whoever acts on it afterwards discards
    /// pages of the next kernel.
    @Suite(.serialized) struct Reset {
        enum Way: String, CaseIterable {
            case reboot, systemReset, kexec, panic
        }

        /// A disk with what kexec boots.
        static func kexecDisk(_ kernel: Kernel, in folder: Folder) throws -> [String] {
            let files = folder.path + "/files", image = folder.path + "/kexec.img"
            try Files.makeDirectory(files, mode: 0o700)
            try host("cp", kernel.image, files + "/vmlinuz")
            try host("cp", kernel.initramfs, files + "/initramfs")
            try host("truncate", "-s", "64M", image)
            try host("env", "PATH=/usr/sbin:/sbin:/usr/bin:/bin", "mke2fs", "-q", "-t", "ext4", "-d", files, image)
            return ["-drive", "file=\(image),format=raw,if=virtio,readonly=on"]
        }

        /// However a guest is reset, while marks exist and while memory is churned: the next kernel boots, the backend has
        /// let go of the table before that kernel runs, and not one byte of it is wrong: before the module is loaded again,
        /// for longer than a period, and after.
        @Test func theNextKernelIsUnharmed() throws {
            let folder = try Folder()
            let disk = try Self.kexecDisk(.v6_1, in: folder)
            let guest = try Guest(Machine(arguments: disk), in: folder)
            try guest.watched {
                for way in Way.allCases {
                    try guest.loadModule()
                    try guest.waitForActive()
                    // Marks that are not old enough yet, and some that are.
                    try guest.sh("quire-load hold 250 0", within: Guest.patience(for: 20))
                    if way == .systemReset || way == .kexec {
                        try guest.startChurn()
                        try guest.waitForRecycling()
                    }
                    let marked = try guest.view.states().count { $0 != 0 }
                    #expect(marked > 10_000, "\(way)")

                    switch way {
                    case .reboot: try guest.console.send("reboot -f")
                    case .systemReset: try guest.qmp.command("system_reset")
                    case .kexec:
                        try guest.sh(
                            """
                            modprobe ext4; for d in /dev/vd?; do mount -t ext4 -o ro $d /mnt 2>/dev/null && break; done; \
                            kexec -l /mnt/vmlinuz --initrd=/mnt/initramfs --reuse-cmdline && umount /mnt
                            """, within: Effort.patience * 2)
                        try guest.console.send("kexec -e")
                    case .panic:
                        guest.console.mayPanic = true
                        try guest.console.send("echo c > /proc/sysrq-trigger")
                    }
                    try guest.expectReady()
                    guest.console.mayPanic = false

                    #expect(guest.status.state == .noGuest, "\(way): the backend still has a table")
                    #expect(guest.view.registeredTable == nil, "\(way)")
                    #expect(guest.view.openClaims.isEmpty, "\(way)")
                    // The old kernel's marks would be due by now.
                    try guest.churn(250, seconds: 2)
                    #expect(guest.status.state == .noGuest, "\(way)")
                    try guest.loadModule()
                    try guest.waitForActive()
                    try guest.churn(250, seconds: 2)
                    try guest.expectRecycling()
                    try guest.expectQuietLog()
                    try guest.sh("rmmod quire")
                }
                #expect(guest.status.restarts == 0)
            }
        }

        /// The control for the test above: had somebody acted on the table of the kernel before, it would have been seen.
        /// Here the test does it: it discards what that table called free and a program now holds, which verifies it.
        @Test func actingOnAStaleTableWouldBeSeen() throws {
            let guest = try Guest()
            try guest.watched {
                try guest.loadModule()
                try guest.waitForActive()
                try guest.settle()
                try guest.sh("quire-load hold 300 0", within: Guest.patience(for: 20))
                let old = try guest.view.states()
                let stale = old.indices.filter { old[$0] != 0 && old[$0] < UInt8(QUIRE_STATE_CLAIMED.rawValue) }
                #expect(stale.count > 10_000)
                try guest.qmp.command("system_reset")
                try guest.expectReady()
                let load = try guest.console.start("quire-load hold 300")
                try guest.console.expect("peak\n", within: Guest.patience(for: 60))
                // The program's pages only: without its own, the kernel would not live to say what became of them.
                let held = try stale.filter { try guest.view.isOfLoad(gfn: $0) }
                #expect(held.count > 10_000)
                for gfn in held { try guest.view.punch(gfn: gfn) }
                try guest.console.send("")
                let (text, status) = try guest.console.finish(load, within: Effort.patience)
                #expect(status == 1 && text.contains("WRONG"), "\(text)")
            }
        }
    }
}
