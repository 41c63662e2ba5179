import Glibc
import Host
import Platform
import Testing

extension Integration {
    /// A backend that is started by hand, for a QEMU that owns its RAM, and a disk that the backend serves.
    @Suite(.serialized) struct Disk {
        /// A plain QEMU and its backend. Its end ends both, by number.
        final class Adopted {
            let folder: Folder
            let console: Console
            private var qemu: ChildProcess
            private var backend: ChildProcess
            private let backendArguments: [String]

            init(_ qemu: QEMU, _ kernel: Kernel) throws {
                ProcessCalls.ignoreBrokenPipes()
                folder = try Folder()
                let control = folder.path + "/control.sock", file = folder.path + "/file.sock"
                let image = try folder.sparseFile("image", byteCount: 128 << 20)
                backendArguments = [
                    Program.backend, "--device", "control,socket=\(control)",
                    "--device", "file,socket=\(file),path=\(image),queues=2,serial=data", "--period", Guest.period,
                    "--status", folder.path + "/status",
                ]
                backend = try Self.start(backendArguments, folder)
                let reconnect = qemu == .ten ? "reconnect-ms=100" : "reconnect=1"
                var toGuest = try Pipe(), fromGuest = try Pipe()
                let stdin = toGuest.takeReader(), stdout = fromGuest.takeWriter()
                let log = try Descriptor.open(folder.path + "/errors", O_RDWR | O_CREAT | O_APPEND)
                var options = ChildProcess.Options()
                options.passing = [
                    .init(from: stdin.raw, to: 0), .init(from: stdout.raw, to: 1), .init(from: log.raw, to: 2),
                ]
                options.parentDeathSignal = SIGTERM
                self.qemu = try ChildProcess(
                    [qemu.program] + qemu.acceleration(for: kernel)
                        + ["-m", "512M", "-smp", "2", "-display", "none", "-monitor", "none", "-serial", "stdio"]
                        + ["-object", "memory-backend-memfd,id=ram,size=512M,share=on", "-machine", "memory-backend=ram"]
                        + ["-chardev", "socket,id=c,path=\(control),\(reconnect)"]
                        + ["-device", "vhost-user-blk-pci,chardev=c,num-queues=1"]
                        + ["-chardev", "socket,id=f,path=\(file),\(reconnect)"]
                        + ["-device", "vhost-user-blk-pci,chardev=f,num-queues=2,id=data"]
                        + Guest.kernelArguments(Machine(kernel: kernel)), options)
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
                    let log = (try? Files.read(folder.path + "/errors")) ?? ""
                    throw Trouble("\(error)\n--- stderr ---\n\(log)\n--- console ---\n\(console.log.suffix(6000))")
                }
            }
        }

        /// Written at random through two queues, then read back and compared, while freed memory is recycled: no error.
        /// And again while the backend is killed and started anew: requests in flight are found in QEMU's in-flight
        /// region and run again, and the guest sees no more than a pause.
        @Test(arguments: [QEMU.distribution, .ten])
        func verifiesAcrossDeaths(_ qemu: QEMU) throws {
            let guest = try Adopted(qemu, .v6_1)
            try guest.watched {
                try guest.console.expectReady()
                let disk = try guest.sh(
                    "for d in /sys/block/vd*; do [ \"$(cat $d/serial)\" = data ] && echo /dev/${d##*/}; done; true"
                ).filter { !$0.isWhitespace }
                #expect(try guest.sh("ls /sys/block/\(disk.dropFirst(5))/mq | wc -l").hasPrefix("2"))
                _ = try guest.sh("insmod /lib/quire/quire.ko")
                func fio(_ number: Int) -> String {
                    """
                    fio --name=v --filename=\(disk) --direct=1 --rw=randwrite --bsrange=4k-64k --size=24M --offset_increment=32M \
                    --numjobs=4 --thread --ioengine=psync --verify=crc32c --verify_fatal=1 --randseed=\(number) \
                    --group_reporting --minimal > /tmp/fio 2>&1 || { cat /tmp/fio; false; }
                    """
                }
                _ = try guest.sh(fio(1), within: Guest.patience(for: 60))
                _ = try guest.sh("quire-load hold 200 0", within: Guest.patience(for: 20))
                try waitUntil("adopted memory to be recycled") { (guest.status?.recycledTotalPages ?? 0) > 20_000 }
                for number in 2...3 {
                    let load = try guest.console.start(fio(number))
                    for _ in 0..<Effort.scaled(3) {
                        try guest.console.drain(Int32.random(in: 500...2500))
                        try guest.killAndRestartBackend()
                    }
                    let (text, status) = try guest.console.finish(load, within: Guest.patience(for: 120))
                    #expect(status == 0, "\(text)")
                }
                // A module whose backend has lost everything registers again.
                try waitUntil("the new backend to hear of the table") { guest.status?.state == .active }
                _ = try guest.sh("rmmod quire; ! dmesg | grep -E 'I/O error|BUG|WARNING|stall|blocked for'")
            }
        }
    }
}
