import ArgumentParser
import Host
import Platform

/// Commands name themselves: making a name of a type's, as the parser would, takes milliseconds for all of them.
@main
struct Quire: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "quire",
        abstract: "Gives memory that QEMU guests have freed back to the host.",
        discussion: """
            Exit status: 0 on success, 1 on a failure (one line on stderr says why and what to do), 64 on wrong usage. \
            'quire run' exits as QEMU does, or with 128 and the signal's number when a signal killed QEMU.

            Running VMs have a folder each under $QUIRE_RUNTIME_DIR; without that under /run/quire (root) or \
            $XDG_RUNTIME_DIR/quire.
            """,
        version: "quire \(quireVersion)",
        subcommands: [
            Run.self, Status.self, Top.self, Unmerge.self, Merge.self, Tmem.self, Libvirt.self, Config.self, Doctor.self, Serve.self,
        ])
}

/// A failure of ours: one line on stderr, status 1.
@discardableResult func failing<R>(_ body: () throws(QuireError) -> R) throws -> R {
    do { return try body() } catch {
        writeStandardError("quire: \(error)")
        throw ExitCode(1)
    }
}
