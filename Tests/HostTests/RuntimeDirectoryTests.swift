import Glibc
import Host
import Platform
import TestSupport
import Testing

struct RuntimeDirectoryTests {
    private func standard(_ values: [String: String], root: Bool) throws -> String {
        try RuntimeDirectory.standard(environment: { values[$0] }, isRoot: root).base
    }

    @Test func choosesItsBase() throws {
        #expect(try standard(["QUIRE_RUNTIME_DIR": "/a/b/", "XDG_RUNTIME_DIR": "/x"], root: true) == "/a/b")
        #expect(try standard(["XDG_RUNTIME_DIR": "/run/user/7"], root: true) == "/run/quire")
        #expect(try standard(["XDG_RUNTIME_DIR": "/run/user/7/"], root: false) == "/run/user/7/quire")
        #expect(
            message { try standard([:], root: false) }
                == "there is no runtime directory: set QUIRE_RUNTIME_DIR to a folder that only you can enter")
        #expect(
            message { try standard(["QUIRE_RUNTIME_DIR": "here"], root: false) }
                == "QUIRE_RUNTIME_DIR is here: set it to an absolute path")
    }

    @Test(arguments: ["a", "vm-1.0_x", "A", "9", "-", String(repeating: "x", count: 63)])
    func takesName(_ name: String) { #expect(RuntimeDirectory.isValidName(name)) }

    @Test(arguments: ["", ".", "..", ".a", "a/b", "a b", "ä", "a\n", String(repeating: "x", count: 64)])
    func refusesName(_ name: String) throws {
        let folder = try TemporaryFolder()
        let directory = RuntimeDirectory(base: folder.path)
        #expect(
            message { try directory.claim(name) }
                == "'\(name)' is no name for a VM: use 1 to 63 of A-Z a-z 0-9 . _ - that do not start with a dot")
    }

    @Test func claimsListsAndRemoves() throws {
        let folder = try TemporaryFolder()
        let directory = RuntimeDirectory(base: folder.path + "/quire")
        #expect(directory.running() == [])
        let claim = try directory.claim("one")
        let other = try directory.claim("another")
        #expect(directory.running() == ["another", "one"])
        #expect(directory.owner("one") == ProcessCalls.ownPID)
        #expect(claim.statusPath == folder.path + "/quire/one/status")
        #expect(claim.controlSocketPath == folder.path + "/quire/one/control.sock")
        other.remove()
        #expect(directory.running() == ["one"])
        #expect(Files.list(directory.base) == ["one"])
        claim.remove()
        #expect(directory.running() == [])
        #expect(Files.list(directory.base) == [])
    }

    @Test func saysWhoHasAName() throws {
        let folder = try TemporaryFolder()
        let directory = RuntimeDirectory(base: folder.path)
        let claim = try directory.claim("one")
        let pid = ProcessCalls.ownPID
        #expect(
            message { try directory.claim("one") }
                == "the VM name 'one' is taken by process \(pid): choose another with --name, or end that VM (kill \(pid))")
        // The supervisor is dead, QEMU lives: the lock's text names it too.
        try claim.lock.replaceContent("2147483647\n\(pid)\n")
        #expect(directory.owner("one") == pid)
        try claim.lock.replaceContent("")
        #expect(message { try directory.claim("one") } == "the VM name 'one' is taken: choose another with --name")
        claim.remove()
    }

    @Test func takesOverWhatADeadOwnerLeft() throws {
        let folder = try TemporaryFolder()
        let directory = RuntimeDirectory(base: folder.path)
        try Files.makeDirectory(folder.path + "/one", mode: 0o700)
        _ = try folder.write("one/lock", "2147483647\n")
        _ = try folder.write("one/status", "old")
        _ = try folder.write("one/control.sock", "old")
        #expect(!directory.isRunning("one"))
        let claim = try directory.claim("one")
        #expect(Files.list(folder.path + "/one") == ["lock"])
        claim.remove()
    }

    @Test func removesOnlyWhatItMade() throws {
        let folder = try TemporaryFolder()
        let claim = try RuntimeDirectory(base: folder.path).claim("one")
        _ = try folder.write("one/mine", "x")
        claim.remove()
        #expect(Files.list(folder.path + "/one") == ["mine"])
    }

    @Test func lockSurvivesInAChild() throws {
        let folder = try TemporaryFolder()
        let directory = RuntimeDirectory(base: folder.path)
        var child: ChildProcess
        do {
            let claim = try directory.claim("one")
            var options = ChildProcess.Options()
            options.passing = [.init(from: claim.lock.raw, to: 200)]
            child = try ChildProcess(["sleep", "60"], options)
        }
        #expect(directory.isRunning("one"))
        child.signal(SIGKILL)
        child.wait()
        // Parallel tests fork, and their children hold a copy until they execute.
        #expect(eventually { !directory.isRunning("one") })
    }

    @Test func explainsABaseThatCannotBe() throws {
        let folder = try TemporaryFolder()
        #expect(
            message { try RuntimeDirectory(base: folder.path + "/no/quire").claim("one") }
                == "cannot create \(folder.path)/no/quire: \(folder.path)/no does not exist, create it or set QUIRE_RUNTIME_DIR")
        let file = try folder.write("file", "x")
        #expect(
            message { try RuntimeDirectory(base: file).claim("one") }
                == "\(file) is not a folder: remove it or set QUIRE_RUNTIME_DIR")
        #expect(
            message { try RuntimeDirectory(base: "/proc/quire").claim("one") }
                == "cannot create /proc/quire (No such file or directory): set QUIRE_RUNTIME_DIR to a folder of your own")
    }
}
