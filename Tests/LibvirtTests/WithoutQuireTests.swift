import Host
import Libvirt
import Platform
import TestSupport
import Testing

/// What must go wrong in one clear line and no other way: a hook without its program, an output that is full.
@Suite struct WithoutQuireTests {
    private static let configurations: String = {
        var path = Substring(#filePath)
        for _ in 0..<3 { path = path[..<(path.lastIndex(of: "/") ?? path.startIndex)] }
        return path + "/qemu-config"
    }()

    private func sh(_ command: String) throws -> (status: ProcessEnd, said: String) {
        let file = "/tmp/quire-without-\(ProcessCalls.ownPID)-\(UInt32.random(in: 0 ... .max))"
        defer { Files.remove(file) }
        var child = try ChildProcess(["sh", "-c", "exec >\(file) 2>&1; " + command])
        return (child.wait(), try Files.read(file))
    }

    /// The package was removed, which leaves the hook: only domains that are enabled can't start.
    @Test func hookOfARemovedPackage() throws {
        func hook(_ operation: String, _ xml: String) throws -> (status: ProcessEnd, said: String) {
            try sh("sed 's,@PREFIX@,/nowhere,g' \(Self.configurations)/libvirt-hook | sh -c 'script=$(cat); exec sh -c \"$script\" hook web1 \(operation) - <\(xml)'")
        }
        let enabled = Self.configurations + "/domain.xml"
        for operation in ["prepare begin", "start begin", "release end"] {
            let other = try hook(operation, "/dev/null")
            #expect(other.status == .exited(0) && other.said.isEmpty, "\(operation): \(other)")
        }
        #expect(try hook("release end", enabled).status == .exited(0))
        let refused = try hook("prepare begin", enabled)
        #expect(refused.status == .exited(1))
        #expect(refused.said == "web1: it is enabled for Quire, and there is no /nowhere/bin/quire: install it, or take out with virsh edit what it added\n")
    }

    /// A network hands out VFIO devices when the domain starts: *prepare* cannot see it, *start* can. The control: another interface.
    @Test func interfacesThatTurnOutToBeDevices() throws {
        func start(_ interface: String) throws -> (status: ProcessEnd, said: String) {
            try sh("sed 's,</devices>,<interface type=\"\(interface)\"/>&,' \(Self.configurations)/domain.xml | \(products)quire libvirt hook web1 start begin -")
        }
        let refused = try start("hostdev")
        #expect(refused.status == .exited(1), "\(refused)")
        #expect(refused.said.contains("it has an interface of type hostdev, which pins all guest memory (VFIO): detach it"), "\(refused)")
        let taken = try start("bridge")
        #expect(taken.status == .exited(0) && taken.said.isEmpty, "\(taken)")
    }

    /// Half of a domain's XML is no success.
    @Test func fullDisk() throws {
        let disable = "\(products)quire libvirt disable --xml <\(Self.configurations)/domain.xml"
        #expect(try sh(disable + " >/dev/null").status == .exited(0))
        let full = try sh(disable + " >/dev/full")
        #expect(full.status == .exited(1) && full.said == "quire: cannot write all of it: No space left on device\n", "\(full)")
    }

    @Test func groupsThatNoBackendTakes() throws {
        let refused = try sh("\(products)quire libvirt enable --no-merge --group 'a b' --xml <\(Self.configurations)/domain.xml")
        #expect(refused.status == .exited(64) && refused.said.contains("--group"), "\(refused)")
    }
}
