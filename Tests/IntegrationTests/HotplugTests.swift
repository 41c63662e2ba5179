import Glibc
import Host
import Platform
import Testing

extension Integration {
    /// Memory and CPUs come and go, the module comes and goes, all of it under load.
    @Suite(.serialized) struct Hotplug {
        /// A DIMM is plugged and onlined under churn: the module makes a larger table, and what is freed in the DIMM goes
        /// back to the host like any other memory. It is offlined and unplugged again, and everything goes on. QEMU 7.2 sends the whole
        /// memory table each time, QEMU 10 the one region that comes or goes.
        @Test(arguments: [QEMU.distribution, .ten])
        func memory(_ qemu: QEMU) throws {
            let guest = try Guest(Machine(qemu: qemu, memory: "512M,slots=4,maxmem=2G"))
            try guest.watched {
                try guest.loadModule()
                try guest.waitForActive()
                let pages = try guest.figure("page_count")
                for round in 1...Effort.dimms {
                    try guest.startChurn()
                    let dimm = try guest.plugDIMM()
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
                    try guest.takeOffline(dimm)
                    try guest.expectChurnGoesOn()
                    try guest.unplug(dimm)
                    try guest.wait(for: "the status to forget the DIMM") { guest.status.ramBytes < 600 << 20 }
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

        /// The module unloads and loads under churn, again and again. Such a guest's emulator runs one CPU at a time, so the
        /// host only watches; what is tested here is the guest.
        ///
        /// Before that: without ftrace it would not see every page that leaves the allocator. So it does not load, and says why; and
        /// once it is there, nobody can switch ftrace off.
        @Test func moduleComesAndGoes() throws {
            let guest = try Guest(Machine(patchesCodeUnderLoad: true))
            try guest.watched {
                let ftrace = "/proc/sys/kernel/ftrace_enabled"
                try guest.sh("echo 0 > \(ftrace)")
                #expect(try guest.run("insmod /lib/quire/quire.ko").status != 0)
                let said = try guest.sh("dmesg | grep 'quire: refused: '; true")
                #expect(said.contains("can't hook") && said.contains("ftrace is off (sysctl kernel.ftrace_enabled)"), "\(said)")
                #expect(try guest.sh("lsmod | grep -c '^quire ' || true").hasPrefix("0"))
                try guest.sh("echo 1 > \(ftrace)")
                try guest.loadModule()
                #expect(try guest.run("echo 0 > \(ftrace)").status != 0)
                #expect(try guest.sh("cat \(ftrace)") == "1\n")
                try guest.sh("rmmod quire")

                try guest.startChurn()
                try guest.sh(
                    """
                    i=0; while [ $i -lt \(Effort.reloads) ]; do insmod /lib/quire/quire.ko || break; usleep $((i % 5 * 300000)); \
                    rmmod quire || break; i=$((i+1)); done; [ $i = \(Effort.reloads) ]
                    """, within: Guest.patience(for: Effort.reloads * 4))
                #expect(try guest.sh("lsmod | grep -c '^quire ' || true").hasPrefix("0"))
                try guest.expectChurnGoesOn()
                try guest.stopChurn()
                try guest.loadModule()
                if !QEMU.hasKVM {
                    try guest.wait(for: "recycling to be off") {
                        guest.status.state == .paused && guest.status.reason.contains("one CPU at a time")
                    }
                    try guest.sh("quire-load hold 100 0 >/dev/null", within: Guest.patience(for: 10))
                    ProcessCalls.sleep(milliseconds: 1500)
                    #expect(guest.status.recycledTotalPages == 0)
                }
                try guest.expectQuietLog()
                try guest.sh("rmmod quire")
            }
        }

        /// A CPU goes and comes under churn.
        @Test func processors() throws {
            let guest = try Guest()
            try guest.watched {
                try guest.loadModule()
                try guest.waitForActive()
                try guest.startChurn()
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
