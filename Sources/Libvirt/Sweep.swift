import Host
import Platform

extension Hypervisor {
    /// The service of a VM that libvirt's hook has started and nobody has ended: libvirtd was killed in the middle, the hook was away,
    /// or it failed.
    public struct Leftover: Sendable, Equatable {
        /// In `quire status`.
        public let vm: String
        /// The domain's UUID.
        public let owner: String
        let pid: Int32
    }

    /// Those whose domain does not run and that no QEMU is connected to. The latter counts as well: another libvirtd may have the
    /// domain, and who does not answer may be in use.
    public borrowing func leftovers(in directory: RuntimeDirectory) throws(QuireError) -> [Leftover] {
        let services = directory.running().compactMap { vm -> Leftover? in
            guard let settings = try? BackendService.Settings.read(directory.settingsPath(vm)), let pid = directory.owner(vm) else { return nil }
            return Leftover(vm: vm, owner: settings.owner, pid: pid)
        }
        guard !services.isEmpty else { return [] }
        // Asked afterwards: a domain runs before its backend does.
        let active = try activeUUIDs()
        return services.filter { !active.contains($0.owner) && (try? BackendProcess.isInUse($0.vm, in: directory)) == false }
    }

    /// Ends those that are left over; returns their names. A hook that is at it gets time to do it.
    public borrowing func sweep(in directory: RuntimeDirectory, graceMilliseconds: UInt32 = 2000) throws(QuireError) -> [String] {
        let seen = try leftovers(in: directory)
        guard !seen.isEmpty else { return [] }
        ProcessCalls.sleep(milliseconds: graceMilliseconds)
        var ended: [String] = []
        for leftover in try leftovers(in: directory) where seen.contains(leftover) {
            try Hook.end(leftover.vm, leftover.pid, in: directory)
            ended.append(leftover.vm)
        }
        return ended
    }
}
