import Glibc
import Host
import Platform
import Testing

struct ChildProcessTests {
    @Test func reportsHowItEnded() throws {
        var child = try ChildProcess(["sh", "-c", "exit 7"])
        #expect(child.wait() == .exited(7))
        #expect(child.poll() == .exited(7))
        #expect(child.end?.shellStatus == 7)
        var killed = try ChildProcess(["sleep", "60"])
        #expect(killed.poll() == nil)
        killed.signal(SIGTERM)
        #expect(killed.wait() == .signalled(SIGTERM))
        #expect(killed.end?.shellStatus == 143)
        #expect("\(ProcessEnd.exited(7)), \(ProcessEnd.signalled(9))" == "exited with status 7, was killed by signal 9")
    }

    @Test func saysWhatCannotBeStarted() throws {
        #expect(message { try ChildProcess(["/no/such/program"]) } == "cannot start /no/such/program: No such file or directory")
        #expect(message { try ChildProcess(["/"]) } == "cannot start /: Permission denied")
    }

    /// Numbers that overlap in both directions, and nothing else open.
    @Test func passesExactlyTheDescriptors() throws {
        let folder = try TemporaryFolder()
        let a = try Descriptor.open(folder.write("a", "A"), O_RDONLY)
        let b = try Descriptor.open(folder.write("b", "B"), O_RDONLY)
        let out = try Descriptor.open(folder.path + "/out", O_RDWR | O_CREAT)
        var options = ChildProcess.Options()
        options.passing = [
            .init(from: a.raw, to: b.raw), .init(from: b.raw, to: a.raw), .init(from: out.raw, to: 1),
            .init(from: a.raw, to: 250),
        ]
        let list = "cat /proc/self/fd/\(a.raw) /proc/self/fd/\(b.raw) /proc/self/fd/250; echo; for f in /proc/$$/fd/*; do echo ${f##*/}; done"
        var child = try ChildProcess(["bash", "-c", list], options)
        child.wait()
        let lines = try Files.read(folder.path + "/out").split(separator: "\n").map(String.init)
        #expect(lines.first == "BAA")
        // bash's own descriptor for scripts is 255 at times; it reads the folder's listing itself, by the first free one.
        let listing = (3...).first { $0 != a.raw && $0 != b.raw }!
        let numbers = Set(lines.dropFirst().compactMap { Int32($0) }.filter { $0 != 255 })
        #expect(numbers.isSubset(of: [0, 1, 2, listing, a.raw, b.raw, 250]))
        #expect(numbers.isSuperset(of: [0, 1, 2, a.raw, b.raw, 250]))
    }

    @Test func hasAnEmptySignalMaskAndAGroupOfItsOwn() throws {
        var options = ChildProcess.Options()
        options.ownGroup = true
        options.parentDeathSignal = SIGKILL
        let folder = try TemporaryFolder()
        let out = try Descriptor.open(folder.path + "/out", O_RDWR | O_CREAT)
        options.passing = [.init(from: out.raw, to: 1)]
        var child = try ChildProcess(["grep", "SigBlk", "/proc/self/status"], options)
        child.wait()
        child = try ChildProcess(["cut", "-d ", "-f1,5", "/proc/self/stat"], options)
        child.wait()
        #expect(try Files.read(folder.path + "/out") == "SigBlk:\t0000000000000000\n\(child.pid) \(child.pid)\n")
    }

    @Test func readsACommandsOutput() throws {
        #expect(try ChildProcess.output(of: ["echo", "hello"]) == "hello\n")
    }
}
