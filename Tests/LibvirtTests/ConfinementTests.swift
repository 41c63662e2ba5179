import Host
import Platform
import Testing

/// What confines QEMU on other hosts. Nothing here enforces it; the compilers say whether it is a policy at all.
@Suite struct ConfinementTests {
    private static let packaging: String = {
        var path = Substring(#filePath)
        for _ in 0..<3 { path = path[..<(path.lastIndex(of: "/") ?? path.startIndex)] }
        return path + "/packaging"
    }()

    /// In a folder that goes with the shell; what it writes is what is said of a failure.
    private func run(_ command: String) throws -> (end: ProcessEnd, said: String) {
        let file = "/tmp/quire-confinement-\(ProcessCalls.ownPID)-\(UInt32.random(in: 0 ... .max))"
        defer { Files.remove(file) }
        var child = try ChildProcess([
            "sh", "-c", "exec >\(file) 2>&1; work=$(mktemp -d) && trap 'rm -r $work' EXIT && cd $work && \(command)",
        ])
        return (child.wait(), (try? Files.read(file)) ?? "")
    }

    private func selinux(_ change: String) throws -> (end: ProcessEnd, said: String) {
        try run(
            """
            sed '\(change)' \(Self.packaging)/selinux/quire.te >quire.te && PATH=$PATH:/usr/sbin:/sbin
            checkmodule -M -m -o quire.mod quire.te && semodule_package -o quire.pp -m quire.mod -f \(Self.packaging)/selinux/quire.fc
            """)
    }

    @Test func selinux() throws {
        let good = try selinux("")
        #expect(good.end == .exited(0), "\(good.said)")
        // A type that nobody declared.
        #expect(try selinux("s/type quire_memory_t, file_type;//").end != .exited(0))
    }

    /// As it stands in libvirt's profile of a QEMU.
    private func appArmor(_ change: String) throws -> (end: ProcessEnd, said: String) {
        try run(
            """
            (echo 'include <tunables/global>'; echo 'profile quire {'; sed '\(change)' \(Self.packaging)/apparmor-libvirt-qemu; echo '}') >profile
            PATH=$PATH:/usr/sbin:/sbin apparmor_parser --skip-kernel-load --skip-cache profile
            """)
    }

    @Test func appArmor() throws {
        let good = try appArmor("")
        #expect(good.end == .exited(0), "\(good.said)")
        #expect(try appArmor("s/ rw,/ rwz,/").end != .exited(0))
    }
}
