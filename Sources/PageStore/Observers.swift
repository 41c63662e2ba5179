import Platform

/// Who may see the figures of the whole host and all of its shared disks: root, our own user and, where we are root's, the user of
/// quire-exporter's service. That one is nobody otherwise, so that whoever breaks into its HTTP has root's say nowhere.
package enum Observers {
    /// From the file and not by glibc's lookup, which would load whatever modules this host has for it.
    private static func user(_ name: String) -> UInt32? {
        guard let users = try? Files.read("/etc/passwd") else { return nil }
        let fields = users.split(separator: "\n").lazy.map { $0.split(separator: ":", omittingEmptySubsequences: false) }
            .first { $0.count > 2 && $0[0] == name }
        return fields.flatMap { UInt32($0[2]) }
    }

    /// Whether this process is the host's: root's, or that of the user which quired's service has for itself.
    package static let areTheHosts = ProcessCalls.isRoot || user("quired") == ProcessCalls.ownUID
    /// Whose a disk is that names no group.
    package static var owner: UInt32 { areTheHosts ? 0 : ProcessCalls.ownUID }

    private static let exporter: UInt32? = areTheHosts ? user("quire-exporter") : nil

    /// He looks, and has no VMs.
    static func isExporter(_ uid: UInt32) -> Bool { uid != 0 && uid == exporter }

    static func include(_ uid: UInt32) -> Bool { uid == 0 || uid == ProcessCalls.ownUID || uid == exporter }
}
