import Host
import Platform
import Testing

@Suite struct HostCheckTests {
    private func level(_ findings: [HostCheck.Finding], _ id: String) -> HostCheck.Finding.Level? { findings.first { $0.id == id }?.level }

    /// A host of files: each finding follows from what is in them, and everything that is wrong says what to do.
    @Test func findings() throws {
        let folder = try TemporaryFolder()
        for path in ["/proc", "/proc/sys", "/proc/sys/vm", "/sys", "/sys/kernel", "/sys/kernel/mm", "/sys/kernel/mm/ksm", "/sys/kernel/mm/transparent_hugepage", "/dev", "/etc", "/run", "/run/libvirt"] {
            try Files.makeDirectory(folder.path + path, mode: 0o700)
        }
        var places = HostCheck.Places(backend: "/bin/sh", agent: "/bin/sh", store: folder.path + "/none")
        places.root = folder.path
        _ = try folder.write("proc/sys/vm/max_map_count", "65530\n")
        _ = try folder.write("proc/sys/vm/overcommit_memory", "2\n")
        _ = try folder.write("sys/kernel/mm/ksm/run", "1\n")
        _ = try folder.write("sys/kernel/mm/transparent_hugepage/shmem_enabled", "always within_size advise [never] deny force\n")
        var found = HostCheck(places).run()
        #expect(level(found, "max-map-count") == .note)
        #expect(level(found, "overcommit") == .problem)
        #expect(found.first { $0.id == "overcommit" }?.advice.hasPrefix("sysctl -w vm.overcommit_memory=0; ") == true)
        #expect(level(found, "ksm") == .note)
        #expect(level(found, "huge-pages") == .note)
        #expect(level(found, "kvm") == .note)
        #expect(level(found, "quired") == .note)
        #expect(level(found, "libvirt") == .ok)
        #expect(level(found, "confinement") == .ok)
        #expect(level(found, "backend") == .ok)
        for finding in found where finding.level != .ok { #expect(!finding.advice.isEmpty, "\(finding)") }

        _ = try folder.write("proc/sys/vm/max_map_count", "2000000\n")
        _ = try folder.write("proc/sys/vm/overcommit_memory", "1\n")
        _ = try folder.write("sys/kernel/mm/ksm/run", "0\n")
        _ = try folder.write("sys/kernel/mm/transparent_hugepage/shmem_enabled", "always within_size [advise] never deny force\n")
        for path in ["/etc/libvirt", "/etc/libvirt/hooks", "/etc/libvirt/hooks/qemu.d"] { try Files.makeDirectory(folder.path + path, mode: 0o700) }
        places.backend = folder.path + "/none"
        places.agent = nil
        found = HostCheck(places).run()
        #expect(level(found, "max-map-count") == .ok)
        #expect(level(found, "overcommit") == .ok)
        #expect(level(found, "ksm") == .ok)
        #expect(level(found, "huge-pages") == .ok)
        #expect(level(found, "backend") == .problem)
        #expect(level(found, "agent") == .problem)
        #expect(level(found, "libvirt") == .problem)

        _ = try folder.write("etc/libvirt/hooks/qemu.d/quire", "#!/bin/sh\nexec /nowhere/quire libvirt hook \"$@\"\n", mode: 0o700)
        #expect(level(HostCheck(places).run(), "libvirt") == .problem)
        _ = try folder.write("etc/libvirt/hooks/qemu.d/quire", "#!/bin/sh\nexec /bin/sh libvirt hook \"$@\"\n", mode: 0o700)
        #expect(level(HostCheck(places).run(), "libvirt") == .note)
        _ = try folder.write("run/libvirt/libvirt-sock", "")
        #expect(level(HostCheck(places).run(), "libvirt") == .ok)
    }

    /// Where AppArmor confines libvirt, its profiles have to know Quire, in the files that are the host's own: each that does not has its line.
    @Test func confinement() throws {
        let folder = try TemporaryFolder()
        for path in [
            "/sys", "/sys/module", "/sys/module/apparmor", "/sys/module/apparmor/parameters", "/sys/kernel", "/sys/kernel/security",
            "/sys/kernel/security/apparmor", "/etc", "/etc/apparmor.d", "/etc/apparmor.d/abstractions", "/etc/apparmor.d/local",
            "/etc/apparmor.d/local/abstractions",
        ] { try Files.makeDirectory(folder.path + path, mode: 0o700) }
        var places = HostCheck.Places(backend: "/usr/bin/quire-backend", agent: nil, store: folder.path + "/none")
        places.root = folder.path
        func found() throws -> HostCheck.Finding { try #require(HostCheck(places).run().first { $0.id == "confinement" }) }

        _ = try folder.write("sys/module/apparmor/parameters/enabled", "Y\n")
        #expect(try found().level == .ok)
        for profile in ["usr.sbin.libvirtd", "abstractions/libvirt-qemu"] {
            _ = try folder.write("etc/apparmor.d/" + profile, "")
            _ = try folder.write("etc/apparmor.d/local/" + profile, "")
        }
        let qemu = "cat /usr/share/doc/quire/examples/apparmor-libvirt-qemu >> /etc/apparmor.d/local/abstractions/libvirt-qemu"
        let daemon = "cat /usr/share/doc/quire/examples/apparmor-libvirtd >> /etc/apparmor.d/local/usr.sbin.libvirtd; "
            + "apparmor_parser -r /etc/apparmor.d/usr.sbin.libvirtd"
        #expect(try found().level == .problem)
        #expect(try found().advice == daemon + "; " + qemu)

        // What is loaded has the say; and without AppArmor nothing has.
        _ = try folder.write("sys/kernel/security/apparmor/profiles", "/usr/bin/man (enforce)\n")
        #expect(try found().level == .ok)
        _ = try folder.write("sys/kernel/security/apparmor/profiles", "/usr/bin/man (enforce)\nlibvirtd (enforce)\n")
        #expect(try found().level == .problem)
        _ = try folder.write("sys/module/apparmor/parameters/enabled", "N\n")
        #expect(try found().level == .ok)
        _ = try folder.write("sys/module/apparmor/parameters/enabled", "Y\n")

        _ = try folder.write("etc/apparmor.d/local/usr.sbin.libvirtd", "/usr/bin/quire PUx,\n")
        #expect(try found().advice == qemu)
        _ = try folder.write("etc/apparmor.d/local/abstractions/libvirt-qemu", "/run/quire/*/qemu/*.sock rw,\n")
        #expect(try found().level == .ok)
    }

    /// Where SELinux is enforced nobody but root can tell whether the module is loaded: a note says how to look, and what to type then.
    @Test func enforcedSELinux() throws {
        let folder = try TemporaryFolder()
        for path in ["/sys", "/sys/fs", "/sys/fs/selinux", "/etc"] { try Files.makeDirectory(folder.path + path, mode: 0o700) }
        var places = HostCheck.Places(backend: "/usr/bin/quire-backend", agent: nil, store: folder.path + "/none")
        places.root = folder.path
        func found() throws -> HostCheck.Finding { try #require(HostCheck(places).run().first { $0.id == "confinement" }) }

        // Without libvirt it confines no QEMU.
        _ = try folder.write("sys/fs/selinux/enforce", "1")
        #expect(try found().level == .ok)
        try Files.makeDirectory(folder.path + "/etc/libvirt", mode: 0o700)
        #expect(try found().level == .note)
        #expect(try found().text.hasPrefix("SELinux is enforced: "))
        for words in [
            "semodule -l", "checkmodule -M -m -o quire.mod /usr/share/doc/quire/examples/quire.te; ", " -f /usr/share/doc/quire/examples/quire.fc; ",
            "semodule -i quire.pp; ", "restorecon -RF /usr/bin/quire* /run/quire",
        ] { #expect(try found().advice.contains(words), "\(words)") }
        places.backend = "/home/me/quire/.build/release/quire-backend"
        #expect(try found().advice.contains(" packaging/selinux/quire.te; "))

        // Permissive.
        _ = try folder.write("sys/fs/selinux/enforce", "0")
        #expect(try found().level == .ok)
    }
}
