import Glibc
import Host
import Platform

extension Hypervisor {
    /// Takes everything of Quire's away from a running domain, so that it can be migrated to a host without Quire: equal pages
    /// get copies again, the control disk is unplugged, the backend ends. Shared memfd memory stays, and so does the agent in
    /// QEMU, which does nothing without a backend; the definition is not touched.
    public borrowing func detach(
        _ name: String, in directory: RuntimeDirectory, patience: UInt64 = 30_000_000_000
    ) throws(QuireError) {
        let handle = try domain(name)
        guard handle.isActive else {
            throw QuireError(.invalid, "domain '\(name)' does not run: quire libvirt disable \(name) is what takes Quire away from it")
        }
        let live = try Domain(handle.live())
        guard let mark = live.mark else {
            throw QuireError(.invalid, "domain '\(name)' runs without Quire: there is nothing to detach")
        }
        if let stays = mark.whatStays(name) {
            throw QuireError(.unsupported, "domain '\(name)' has a \(stays.what), and its guest would lose what is on it: \(stays.advice)")
        }
        guard let pid = directory.owner(mark.name), directory.isRunning(mark.name) else {
            throw QuireError(.busy, "the backend of '\(name)' is not supervised any more: power-cycle the domain")
        }
        // Somebody may have un-merged it by hand.
        let merges = mark.agent != nil && (try? BackendProcess.isUnmerged(mark.name, in: directory)) != true
        do throws(QuireError) {
            if mark.agent != nil { try CommandSocket.ask("unmerge", of: mark.name, in: directory) }
            try unplug(live, mark, handle, patience)
        } catch {
            // It stays as it was.
            if merges, !Self.mergeAgain(mark.name, in: directory) {
                throw QuireError(error.code, "\(error); and it merges nothing until you type: quire merge \(mark.name)")
            }
            throw error
        }
        try Hook.end(mark.name, pid, in: directory)
        try handle.forgetLiveMetadata(Mark.namespace)
    }

    /// Also where its backend has just died: another one is on its way.
    private static func mergeAgain(_ name: String, in directory: RuntimeDirectory) -> Bool {
        let deadline = monotonicNanoseconds() + 10_000_000_000
        while true {
            do throws(QuireError) {
                try CommandSocket.ask("merge", of: name, in: directory)
                return true
            } catch {
                guard error.code == .retry || error.code == .closed, monotonicNanoseconds() < deadline else { return false }
                ProcessCalls.sleep(milliseconds: 100)
            }
        }
    }

    /// Returns when the guest has let go of our disks.
    private borrowing func unplug(
        _ live: Domain, _ mark: Mark, _ handle: borrowing Handle, _ patience: UInt64
    ) throws(QuireError) {
        let ours = live.xml.root.first("devices")?.all("disk").filter(mark.owns) ?? []
        for disk in ours {
            try handle.detachLive(String(decoding: live.xml.bytes[disk.range], as: UTF8.self))
        }
        let deadline = monotonicNanoseconds() + patience
        while try Domain(handle.live()).xml.root.first("devices")?.all("disk").contains(where: mark.owns) == true {
            guard monotonicNanoseconds() < deadline else {
                throw QuireError(
                    .busy,
                    "the guest of '\(handle.name)' has not let the control disk go: unload its quire module, or wait until it has booted, and try again")
            }
            ProcessCalls.sleep(milliseconds: 100)
        }
    }
}
