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
        _ = try folder.write("sys/kernel/mm/ksm/run", "1\n")
        _ = try folder.write("sys/kernel/mm/transparent_hugepage/shmem_enabled", "always within_size advise [never] deny force\n")
        var found = HostCheck(places).run()
        #expect(level(found, "max-map-count") == .note)
        #expect(level(found, "ksm") == .note)
        #expect(level(found, "huge-pages") == .note)
        #expect(level(found, "kvm") == .note)
        #expect(level(found, "quired") == .note)
        #expect(level(found, "libvirt") == .ok)
        #expect(level(found, "backend") == .ok)
        for finding in found where finding.level != .ok { #expect(!finding.advice.isEmpty, "\(finding)") }

        _ = try folder.write("proc/sys/vm/max_map_count", "2000000\n")
        _ = try folder.write("sys/kernel/mm/ksm/run", "0\n")
        _ = try folder.write("sys/kernel/mm/transparent_hugepage/shmem_enabled", "always within_size [advise] never deny force\n")
        for path in ["/etc/libvirt", "/etc/libvirt/hooks", "/etc/libvirt/hooks/qemu.d"] { try Files.makeDirectory(folder.path + path, mode: 0o700) }
        places.backend = folder.path + "/none"
        places.agent = nil
        found = HostCheck(places).run()
        #expect(level(found, "max-map-count") == .ok)
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
}
