import Glibc
import Host
import Platform
import TestSupport
import Testing

/// `quire run` as a user runs it, with shell scripts for QEMU and the backend: what is tested is who starts, watches,
/// signals and cleans up. Real QEMU under the real backend is the integration tests' matter.
@Suite(.serialized)
struct SupervisorTests {
    /// Writes the status page and the map's heartbeat as a backend does. The file `mode` says: beat, freeze, die, refuse.
    static let backend = #"""
        #!/bin/bash
        echo "$@" >> "$TEST_FOLDER/backends"
        while [ $# -gt 0 ]; do case "$1" in --status) status=$2;; esac; shift; done
        trap 'echo ended >> "$TEST_FOLDER/ended"; exit 0' TERM
        map=/proc/$$/fd/4
        put() { # file offset bytes value
            local text="" value=$4 i
            for ((i = 0; i < $3; i++)); do text+=$(printf '\\x%02x' $((value & 255))); value=$((value >> 8)); done
            printf "$text" | dd of="$1" bs=1 seek=$2 conv=notrunc status=none
        }
        mode() { cat "$TEST_FOLDER/mode" 2>/dev/null || echo beat; }
        [ "$(mode)" = refuse ] && { echo "no reason" >&2; exit 5; }
        put "$map" 48 8 0; put "$map" 56 4 $$
        put "$status" 16 8 0; printf QUIREVMS | dd of="$status" bs=1 conv=notrunc status=none
        put "$status" 8 4 3; put "$status" 12 4 $$
        n=0
        while :; do
            case "$(mode)" in
                die) rm "$TEST_FOLDER/mode"; exit 9;;
                freeze) rm "$TEST_FOLDER/mode"; while :; do sleep 0.05; done;;
            esac
            n=$((n + 1)); put "$map" 48 8 $n; put "$status" 16 8 $n; sleep 0.05
        done
        """#

    static let qemu = #"""
        #!/bin/bash
        [ "$1" = --version ] && { echo "QEMU emulator version 10.0.0"; exit; }
        printf '%s\n' "$@" > "$TEST_FOLDER/arguments"
        ls -l /proc/$$/fd > "$TEST_FOLDER/descriptors"
        trap 'echo TERM >> "$TEST_FOLDER/signals"; exit 3' TERM
        trap 'echo USR1 >> "$TEST_FOLDER/signals"' USR1
        touch "$TEST_FOLDER/running"
        while [ ! -e "$TEST_FOLDER/stop" ]; do sleep 0.05; done
        [ "$(cat "$TEST_FOLDER/stop")" = crash ] && kill -KILL $$
        exit 42
        """#

    /// A run in a folder of its own.
    struct Stage: ~Copyable {
        let folder: TemporaryFolder
        let directory: RuntimeDirectory
        let options: [String]

        init() throws {
            let folder = try TemporaryFolder()
            _ = try folder.write("backend", SupervisorTests.backend, mode: 0o700)
            _ = try folder.write("qemu", SupervisorTests.qemu, mode: 0o700)
            directory = RuntimeDirectory(base: folder.path + "/run")
            options = [
                "env", "TEST_FOLDER=" + folder.path, "QUIRE_RUNTIME_DIR=" + folder.path + "/run", products + "quire", "run",
                "--backend", folder.path + "/backend",
                // Whatever this machine has.
                "--config", "/dev/null",
            ]
            self.folder = folder
        }

        func path(_ name: String) -> String { folder.path + "/" + name }
        func text(_ name: String) -> String { (try? Files.read(path(name))) ?? "" }

        func start(_ more: [String] = [], qemu: [String] = ["-m", "64"]) throws -> ChildProcess {
            let log = try Descriptor.open(path("log"), O_RDWR | O_CREAT | O_APPEND)
            var child = ChildProcess.Options()
            child.passing = [.init(from: log.raw, to: 2)]
            return try ChildProcess(options + more + ["--", path("qemu")] + qemu, child)
        }

        var isQEMURunning: Bool { !text("arguments").isEmpty && Files.identity(of: path("running")) != nil }
        func stop(_ how: String = "") throws { _ = try folder.write("stop", how) }
        /// Of the living backend; 0 until it beats.
        func heartbeat(_ name: String) -> UInt64 {
            guard let page = try? StatusPage.Reader(path: directory.statusPath(name)).snapshot(),
                ProcessCalls.isAlive(page.pid)
            else { return 0 }
            return page.heartbeat
        }
        var backends: Int { text("backends").split(separator: "\n").count }
    }

    @Test func runsQEMUToItsEndAndCleansUp() throws {
        let stage = try Stage()
        var run = try stage.start(["--name", "vm", "--period", "250ms", "--workers", "3", "--log-level", "debug"])
        #expect(eventually { stage.isQEMURunning })
        #expect(stage.directory.running() == ["vm"])
        #expect(stage.directory.owner("vm") == run.pid)
        #expect(
            stage.text("arguments") == """
                -m
                64
                -object
                memory-backend-file,id=quire-ram,size=67108864,mem-path=/proc/self/fd/100,share=on,align=2M
                -machine
                memory-backend=quire-ram
                -chardev
                socket,id=quire-control,path=\(stage.folder.path)/run/vm/control.sock,reconnect-ms=100
                -device
                vhost-user-blk-pci,chardev=quire-control,num-queues=1,id=quire-control-disk,bus=pci.0,addr=1f

                """)
        #expect(
            stage.text("backends")
                == "--name vm --device control,fd=3 --ram fd=6 --page-map-fd 4 --status \(stage.folder.path)/run/vm/status --supervisor-fd 5 --period 250ms --workers 3 --log-level debug --command-socket \(stage.folder.path)/run/vm/command.sock --agent-socket \(stage.folder.path)/run/vm/agent.sock --merge-period 10000ms --merge-workers 1 --memory-slots --single-threaded-tcg\n")
        let descriptors = stage.text("descriptors")
        #expect(descriptors.contains("100 -> /memfd:quire-vm-quire-ram"))
        #expect(descriptors.contains("101 -> \(stage.folder.path)/run/vm/lock"))
        #expect(!descriptors.contains("quire-vm-map") && !descriptors.contains("control.sock"))
        try stage.stop()
        #expect(run.wait() == .exited(42))
        #expect(stage.text("ended") == "ended\n")
        #expect(Files.list(stage.directory.base) == [])
        #expect(stage.text("log") == "")
    }

    @Test func reportsTheSignalThatKilledQEMU() throws {
        let stage = try Stage()
        var run = try stage.start()
        #expect(eventually { stage.isQEMURunning })
        #expect(stage.directory.running() == ["qemu-\(run.pid)"])
        try stage.stop("crash")
        #expect(run.wait() == .exited(137))
        #expect(Files.list(stage.directory.base) == [])
    }

    @Test func passesSignalsOn() throws {
        let stage = try Stage()
        var run = try stage.start([], qemu: ["-name", "my vm"])
        #expect(eventually { stage.isQEMURunning })
        #expect(stage.directory.running() == ["my-vm"])
        run.signal(SIGUSR1)
        #expect(eventually { stage.text("signals") == "USR1\n" })
        run.signal(SIGTERM)
        #expect(run.wait() == .exited(3))
        #expect(stage.text("signals") == "USR1\nTERM\n")
    }

    @Test func replacesADeadBackendAndAFrozenOne() throws {
        let stage = try Stage()
        var run = try stage.start(["--name", "vm"])
        #expect(eventually { stage.isQEMURunning })
        for (mode, count) in [("die", 2), ("freeze", 3)] {
            #expect(eventually { stage.heartbeat("vm") > 2 })
            _ = try stage.folder.write("mode", mode)
            #expect(eventually { stage.backends == count })
            #expect(eventually { stage.heartbeat("vm") > 2 })
        }
        try stage.stop()
        #expect(run.wait() == .exited(42))
        let lines = stage.text("log").split(separator: "\n")
        #expect(lines.count == 2)
        #expect(lines.first?.hasPrefix("quire: vm: backend ") == true)
        #expect(lines.first?.hasSuffix(" exited with status 9: started another (restart 1)") == true)
        #expect(lines.last?.contains(" stood still for ") == true)
        #expect(lines.last?.hasSuffix(" ms: started another (restart 2)") == true)
    }

    @Test func theVMOutlivesItsSupervisor() throws {
        let stage = try Stage()
        var run = try stage.start(["--name", "vm"])
        #expect(eventually { stage.isQEMURunning && stage.text("run/vm/lock").split(separator: "\n").count == 2 })
        run.signal(SIGKILL)
        run.wait()
        #expect(stage.directory.isRunning("vm"))
        let qemu = try #require(stage.directory.owner("vm"))
        #expect(ProcessCalls.isAlive(qemu) && qemu != run.pid)
        // The stand-in does not look at its lifeline: end it here, by the number in its status page.
        let backend = try StatusPage.Reader(path: stage.directory.statusPath("vm")).snapshot().pid
        ProcessCalls.signal(backend, SIGKILL)
        try stage.stop()
        #expect(eventually { !stage.directory.isRunning("vm") })
        // The folder is left behind, and the next one takes it over.
        let claim = try stage.directory.claim("vm")
        claim.remove()
    }

    @Test func failsWithOneLine() throws {
        let stage = try Stage()
        func fails(_ command: [String], _ expected: String) throws {
            Files.remove(stage.path("log"))
            let log = try Descriptor.open(stage.path("log"), O_RDWR | O_CREAT)
            var child = ChildProcess.Options()
            child.passing = [.init(from: log.raw, to: 2)]
            var run = try ChildProcess(stage.options + command, child)
            #expect(run.wait() == .exited(1))
            #expect(stage.text("log") == expected + "\n")
            #expect(stage.directory.running() == [])
        }
        let qemu = stage.path("qemu")
        try fails(["--", qemu, "-mem-prealloc"], "quire: -mem-prealloc fills all guest RAM at once, which Quire would only have to free again: remove it")
        try fails(["--name", "a/b", "--", qemu], "quire: 'a/b' is no name for a VM: use 1 to 63 of A-Z a-z 0-9 . _ - that do not start with a dot")
        try fails(["--", "/no/qemu"], "quire: cannot start /no/qemu: No such file or directory")
        try fails(["--backend", "/no/backend", "--", qemu], "quire: there is no program /no/backend: install quire-backend beside quire, or name it with --backend")
        _ = try stage.folder.write("mode", "refuse")
        try fails(["--", qemu], "no reason\nquire: the backend exited with status 5 before it was ready: see its message above")
        #expect(Files.list(stage.directory.base) == [])
    }
}
