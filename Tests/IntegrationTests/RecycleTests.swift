import Host
import Testing

extension Integration {
    /// The main path, as a user meets it: memory that the guest frees goes back to the host, and nothing else does.
    @Suite(.serialized) struct Recycle {
        /// What a program held is resident while it does, and the host's again when it has ended: resident memory is what
        /// it was before, within 5 % of RAM. `quire status --json` says the same as the memory files themselves. The module
        /// unloads and loads again, with the same result.
        static func mainPath(_ machine: Machine, hold: Int, rounds: Int) throws {
            let guest = try Guest(machine)
            try guest.watched {
                #expect(guest.status.state == .noGuest)
                for round in 1...rounds {
                    try guest.loadModule()
                    try guest.waitForActive()
                    let before = try guest.settle()

                    let load = try guest.console.start("quire-load hold \(hold)")
                    try guest.console.expect("peak\n", within: Guest.patience(for: 60))
                    let peak = guest.view.residentBytes
                    #expect(peak >= before + UInt64(hold - 16) << 20)
                    try guest.console.send("")
                    let (text, status) = try guest.console.finish(load, within: Effort.patience)
                    #expect(status == 0 && text.contains("ok \(hold * 256) pages"))

                    let ram = guest.status.ramBytes
                    try guest.wait(for: "memory to fall to what it was, \(before >> 20) MiB") {
                        guest.view.residentBytes <= before + ram / 20
                    }
                    let report = try guest.statusCommand()
                    #expect(report.state == .active)
                    #expect(report.restarts == 0)
                    #expect(report.recycledTotalBytes >= UInt64(hold - 16) << 20)
                    try guest.wait(for: "the status to agree with the files") {
                        let said = Int64(try guest.statusCommand().residentBytes), seen = Int64(guest.view.residentBytes)
                        return abs(said - seen) < 8 << 20
                    }

                    // Zero wrong bytes under load; what was recycled reads as zeros; huge pages, too.
                    if round == rounds {
                        try guest.churn(hold)
                        try guest.sh("quire-load verify-zero \(hold)", within: Guest.patience(for: 30))
                        try guest.sh("quire-load fragment \(hold) 2", within: Guest.patience(for: 30))
                        try guest.churn(hold, seconds: Effort.churnSeconds / 2 + 1, "--threads 2 --thp --full --seed 7")
                        try guest.waitForRecycling()
                    }

                    try guest.sh("rmmod quire")
                    try guest.wait(for: "the registration to end") { guest.status.state == .noGuest }
                    #expect(guest.view.registeredTable == nil)
                }
                try guest.expectQuietLog()
            }
        }

        @Test func givesBackWhatTheGuestFreed() throws { try Self.mainPath(Machine(), hold: 300, rounds: 2) }

        @Test func newKernelAndNewQEMU() throws {
            try Self.mainPath(Machine(kernel: .v6_12, qemu: .ten), hold: 250, rounds: 1)
        }
    }
}
