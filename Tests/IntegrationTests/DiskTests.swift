import Glibc
import Host
import Platform
import Testing

extension Integration {
    /// A backend that is started by hand, as qemu-config/README.md shows it, and a disk that the backend serves.
    @Suite(.serialized) struct Disk {
        /// Commands that stand in qemu-config/README.md below a heading, in words: without the program, and without `&` or `…`.
        private struct Recipe {
            let backend: [String]
            let qemu: [String]

            init(_ heading: String) throws {
                let text = try Self.text()
                guard let begin = text.firstRange(of: "\n## \(heading)\n") else { throw Trouble("qemu-config/README.md has no '\(heading)'") }
                let section = text[begin.upperBound...].prefix(upTo: text[begin.upperBound...].firstRange(of: "\n## ")?.lowerBound ?? text.endIndex)
                let commands = section.split(separator: "\n").filter { $0.hasPrefix("    ") }.joined(separator: "\n").replacing("\\\n", with: " ")
                    .split(separator: "\n").map { $0.split(separator: " ").map(String.init).filter { !["&", "…"].contains($0) } }
                backend = Array(commands.first { $0.first == "quire-backend" }?.dropFirst() ?? [])
                qemu = Array(commands.first { $0.first == "qemu-system-x86_64" }?.dropFirst() ?? [])
                guard !backend.isEmpty else { throw Trouble("qemu-config/README.md starts no backend below '\(heading)'") }
            }

            private static func text() throws -> String { try Files.read(Program.top + "/qemu-config/README.md") }

            /// What newer QEMUs have for `reconnect=1`.
            static func newerReconnect() throws -> (old: String, new: String) {
                guard let match = try text().firstMatch(of: #/later take `(\S+)` instead of `(\S+)`/#) else { throw Trouble("nothing about reconnect") }
                return (String(match.2), String(match.1))
            }
        }

        /// A plain QEMU and its backend, as the recipes have them. Its end ends both, by number.
        final class ByHand {
            let folder: Folder
            let console: Console
            private var qemu: ChildProcess
            private var backend: ChildProcess
            private let backendArguments: [String]

            /// Whose RAM it is: QEMU's, which the backend adopts, or the backend's, which QEMU opens through a link; or
            /// QEMU's alone.
            enum RAM { case adopted, owned, unshared }

            init(_ qemu: QEMU, _ kernel: Kernel, _ ram: RAM, _ more: [String] = []) throws {
                ProcessCalls.ignoreBrokenPipes()
                folder = try Folder()
                let file = folder.path + "/data.sock", place = folder.path
                let image = try folder.sparseFile("image", byteCount: 128 << 20)
                let (old, new) = try Recipe.newerReconnect()
                /// In this test's folder, in less memory, for this QEMU.
                func here(_ words: [String]) -> [String] {
                    words.map {
                        $0.replacing("/run/web1", with: place).replacing("/srv/data.img", with: image).replacing("1G", with: "512M")
                            .replacing(old, with: qemu == .ten ? new : old).replacing("share=on", with: ram == .unshared ? "share=off" : "share=on")
                    }
                }
                let recipe = try Recipe(ram == .owned ? "Owned RAM" : "Adopted RAM"), further = try Recipe("Further devices").backend
                // A disk beside the control disk: all of that recipe, or the disk of it.
                backendArguments = [Program.backend] + here(ram == .unshared ? further : recipe.backend + further.suffix(2))
                    + ["--period", Guest.period, "--status", folder.path + "/status"]
                backend = try Self.start(backendArguments, folder)
                try waitUntil("the backend to listen") { Files.identity(of: file) != nil }
                var toGuest = try Pipe(), fromGuest = try Pipe()
                let stdin = toGuest.takeReader(), stdout = fromGuest.takeWriter()
                let log = try Descriptor.open(folder.path + "/errors", O_RDWR | O_CREAT | O_APPEND)
                var options = ChildProcess.Options()
                options.passing = [
                    .init(from: stdin.raw, to: 0), .init(from: stdout.raw, to: 1), .init(from: log.raw, to: 2),
                ]
                options.parentDeathSignal = SIGTERM
                self.qemu = try ChildProcess(
                    [qemu.program] + qemu.acceleration(for: kernel) + here(recipe.qemu)
                        + ["-smp", "2", "-display", "none", "-monitor", "none", "-serial", "stdio"]
                        + here(["-chardev", "socket,id=f,path=\(file),\(old)"])
                        + ["-device", "vhost-user-blk-pci,chardev=f,num-queues=2,id=data"]
                        + Guest.kernelArguments(Machine(kernel: kernel)) + more, options)
                console = Console(input: toGuest.takeWriter(), output: fromGuest.takeReader())
            }

            private static func start(_ arguments: [String], _ folder: Folder) throws -> ChildProcess {
                let log = try Descriptor.open(folder.path + "/errors", O_RDWR | O_CREAT | O_APPEND)
                var options = ChildProcess.Options()
                options.passing = [.init(from: log.raw, to: 1), .init(from: log.raw, to: 2)]
                options.parentDeathSignal = SIGTERM
                return try ChildProcess(arguments, options)
            }

            func killAndRestartBackend() throws {
                backend.signal(SIGKILL)
                backend.wait()
                backend = try Self.start(backendArguments, folder)
            }

            var errors: String { (try? Files.read(folder.path + "/errors")) ?? "" }
            var status: StatusSnapshot? { try? StatusPage.Reader(path: folder.path + "/status").snapshot() }

            deinit {
                qemu.signal(SIGTERM)
                backend.signal(SIGTERM)
                qemu.wait()
                backend.wait()
            }

            func sh(_ command: String, within seconds: Double = Effort.patience) throws -> String {
                let (text, status) = try console.finish(console.start(command), within: seconds)
                guard status == 0 else { throw Trouble("in the guest: \(command): status \(status): \(text)") }
                return text
            }

            func watched(_ body: () throws -> Void) throws {
                do { try body() } catch {
                    throw Trouble("\(error)\n--- stderr ---\n\(errors)\n--- console ---\n\(console.log.suffix(6000))")
                }
            }
        }

        /// What QEMU has locked cannot be given back: the status says so, the guest works, and nothing is recycled. And a
        /// second backend for the same VM is refused with one line.
        @Test func lockedMemoryAndASecondBackend() throws {
            let guest = try ByHand(.distribution, .v6_1, .adopted, ["-overcommit", "mem-lock=on"])
            try guest.watched {
                try guest.console.expectReady()
                _ = try guest.sh("insmod /lib/quire/quire.ko")
                try waitUntil("recycling to be off") { guest.status?.state == .paused }
                #expect(guest.status?.reason.contains("locked") == true)
                _ = try guest.sh("quire-load hold 100 0", within: Guest.patience(for: 20))
                ProcessCalls.sleep(milliseconds: 1500)
                #expect(guest.status?.recycledTotalPages == 0)

                let second = try Program.run([Program.backend, "--socket-path", guest.folder.path + "/control.sock"])
                #expect(second.status == 1)
                #expect(second.text.contains("is in use by a running process"), "\(second.text)")
                #expect(second.text.filter { $0 == "\n" }.count == 1, "\(second.text)")
                _ = try guest.sh("rmmod quire; ! dmesg | grep -E 'I/O error|BUG|WARNING|stall|blocked for'")
            }
        }

        /// RAM that QEMU keeps to itself: said in one line, and the backend lives.
        @Test func privateMemoryIsRefused() throws {
            let guest = try ByHand(.distribution, .v6_1, .unshared)
            try guest.watched {
                try waitUntil("the refusal") { guest.errors.contains("guest RAM is private to QEMU (share=off)") }
                #expect(guest.status != nil)
            }
        }

        /// Written at random through two queues, then read back and compared, while freed memory is recycled: no error.
        /// And again while the backend is killed and started anew: requests in flight are found in QEMU's in-flight
        /// region and run again, and the guest sees no more than a pause.
        @Test(arguments: [QEMU.distribution, .ten])
        func verifiesAcrossDeaths(_ qemu: QEMU) throws {
            let guest = try ByHand(qemu, .v6_1, qemu == .distribution ? .adopted : .owned)
            try guest.watched {
                try guest.console.expectReady()
                let disk = try guest.sh(
                    "for d in /sys/block/vd*; do [ \"$(cat $d/serial)\" = data ] && echo /dev/${d##*/}; done; true"
                ).filter { !$0.isWhitespace }
                #expect(try guest.sh("ls /sys/block/\(disk.dropFirst(5))/mq | wc -l").hasPrefix("2"))
                _ = try guest.sh("insmod /lib/quire/quire.ko")
                func fio(_ number: Int) -> String {
                    """
                    fio --name=v --filename=\(disk) --direct=1 --rw=randwrite --bsrange=4k-64k --size=16M --offset_increment=32M \
                    --numjobs=4 --thread --ioengine=psync --verify=crc32c --verify_fatal=1 --randseed=\(number) \
                    --group_reporting --minimal > /tmp/fio 2>&1 || { cat /tmp/fio; false; }
                    """
                }
                _ = try guest.sh(fio(1), within: Guest.patience(for: 60))
                _ = try guest.sh("quire-load hold 200 0", within: Guest.patience(for: 20))
                try waitUntil("memory to be recycled") { (guest.status?.recycledTotalPages ?? 0) > 20_000 }
                for number in 2...3 {
                    let load = try guest.console.start(fio(number))
                    for _ in 0..<Effort.scaled(2) {
                        try guest.console.drain(Int32.random(in: 500...2500))
                        try guest.killAndRestartBackend()
                    }
                    let (text, status) = try guest.console.finish(load, within: Guest.patience(for: 120))
                    #expect(status == 0, "\(text)")
                }
                // A module whose backend has lost everything registers again.
                func told() -> String {
                    let module = try? guest.sh("cat /sys/kernel/debug/quire/state; dmesg | tail -n 5")
                    return "\(guest.status.map { "\($0.state) \($0.reason)" } ?? "no status"); the module: \(module ?? "says nothing")"
                }
                try waitUntil("the new backend to hear of the table", state: told) { guest.status?.state == .active }
                _ = try guest.sh("rmmod quire; ! dmesg | grep -E 'I/O error|BUG|WARNING|stall|blocked for'")
            }
        }
    }
}
