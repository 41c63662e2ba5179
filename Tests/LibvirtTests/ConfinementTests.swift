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

    /// As it stands in one of libvirt's profiles.
    private func appArmor(_ file: String, _ change: String) throws -> (end: ProcessEnd, said: String) {
        try run(
            """
            (echo 'include <tunables/global>'; echo 'profile quire {'; sed '\(change)' \(Self.packaging)/\(file); echo '}') >profile
            PATH=$PATH:/usr/sbin:/sbin apparmor_parser --skip-kernel-load --skip-cache profile
            """)
    }

    @Test(arguments: [("apparmor-libvirt-qemu", "s/ rw,/ rwz,/"), ("apparmor-libvirtd", "s/unsafe/unsave/")])
    func appArmor(file: String, mistake: String) throws {
        let good = try appArmor(file, "")
        #expect(good.end == .exited(0), "\(good.said)")
        #expect(try appArmor(file, mistake).end != .exited(0))
    }

    /// In libvirt's own profiles, of libvirtd and of a QEMU, which take up what is in the host's own files.
    private func profiles(_ change: String) throws -> (end: ProcessEnd, said: String) {
        try run(
            """
            mkdir -p local/abstractions && PATH=$PATH:/usr/sbin:/sbin
            sed '\(change)' \(Self.packaging)/apparmor-libvirtd >local/usr.sbin.libvirtd
            sed '\(change)' \(Self.packaging)/apparmor-libvirt-qemu >local/abstractions/libvirt-qemu
            for profile in usr.sbin.libvirtd libvirt/TEMPLATE.qemu; do
                apparmor_parser --skip-kernel-load --skip-cache -I $work -I /etc/apparmor.d /etc/apparmor.d/$profile || exit 1
            done
            """)
    }

    @Test(.enabled(if: Files.exists("/etc/apparmor.d/usr.sbin.libvirtd"), "libvirt's profiles are not here")) func libvirtsProfiles() throws {
        let good = try profiles("")
        #expect(good.end == .exited(0), "\(good.said)")
        for mistake in ["s/unsafe/unsave/", "s/ rw,/ rwz,/"] { #expect(try profiles(mistake).end != .exited(0), "\(mistake)") }
    }
}
