import ArgumentParser
import Host
import Platform

extension Quire {
    struct Status: ParsableCommand {
        static let configuration = CommandConfiguration(
            commandName: "status", abstract: "Shows the running VMs and what was recycled.",
            discussion: """
                RESIDENT is what the host has allocated of the guest's RAM; RECYCLED what the guest has freed and the \
                host holds no page for, TOTAL all that was ever recycled, RATE that of the last period; MERGING whether \
                equal pages are merged, SAVED what that saves; CPU the \
                backend's share of one CPU since it was started. Sizes are in binary units.

                Below, what is merged: SHARING is mapped to pages that are kept once, ZERO to zeros, DIVERGED what of \
                both the guest has written since (it goes back soon); HASHED what was read to find equal pages; MERGED and \
                FOLDED what is merged and brought back a second; MAPPINGS what QEMU has of them, and the number above \
                which nothing is merged (from vm.max_map_count).

                Then the pools of transcendent memory: PAGES and BYTES are what the guest has there, STORED what that takes \
                on the host (a page that several share is counted in parts), FAILED pages that found no room. Rows called \
                shared:DISK are disks of quired's that VMs share ('quire tmem list' says which have them); they are shown where no VM \
                is named.

                With --json: an array of objects with name, state, reason, pid, ram_bytes, resident_bytes, \
                recycled_pages, recycled_bytes, recycled_total_pages, recycled_total_bytes, \
                recycled_pages_per_second, free_marked_pages, waits, refilled_pages, cpu_percent, cpu_seconds, \
                uptime_seconds, period_ms, map_bytes, restarts, age_ms, and the object merging: state, reason, period_ms, \
                sharing_pages, zero_pages, diverged_pages, saved_bytes, hashed_total_pages, merged_total_pages, \
                folded_total_pages, merged_pages_per_second, folded_pages_per_second, mappings, mapping_limit, \
                group_shared_pages, group_sharing_pages, group_saved_bytes, group_histogram; and the object tmem: state \
                (off, active, frozen), reason, used_bytes, metadata_bytes, cap_bytes (0: no limit), and the array pools: \
                name, kind, scope, pages, bytes, capacity_bytes, stored_bytes, ratio, puts, puts_failed, hits, misses, \
                flushes, evictions. A page has 4096 bytes. Behind the VMs, where none is named, an object for each shared disk: \
                name (shared:DISK), group, attached (the VMs that have it), content (names what is on it), tmem.

                States: active; paused (for now); refused (the guest's table); no-guest (no guest module has \
                registered); starting; down (the backend is dead); unknown (its status cannot be read).

                Exit status: 0, also when no VM runs; 1 if a named VM does not run.
                """)

        @Flag(help: "Prints JSON with exact numbers.")
        var json = false

        @Argument(help: ArgumentHelp("Only these VMs.", valueName: "name"))
        var names: [String] = []

        func run() throws {
            let directory = try failing { () throws(QuireError) -> RuntimeDirectory in try RuntimeDirectory.standard() }
            var disks: [SharedDiskReport] = []
            if names.isEmpty {
                // A quired that stands still keeps nobody from seeing his VMs.
                do { disks = try SharedDiskReport.collect() } catch { writeStandardError("quire: \(error)") }
            }
            if json {
                return print(try failing { () throws(QuireError) -> String in try StatusReport.json(names, in: directory, disks) })
            }
            let reports = try failing { () throws(QuireError) -> [StatusReport] in try StatusReport.collect(names, in: directory) }
            let colours = ProcessCalls.isTerminal(1) && ProcessCalls.environment("NO_COLOR") == nil
            if reports.isEmpty {
                print("No VM is running. Start one with: quire run -- qemu-system-x86_64 -m 2G …")
                let pools = StatusReport.poolTable([], disks, colours: colours)
                if !pools.isEmpty { print("\n" + pools.joined(separator: "\n")) }
            } else {
                print(StatusReport.table(reports, disks, colours: colours))
            }
        }
    }
}
