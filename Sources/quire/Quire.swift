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

            With --json a command that changes something prints an array of objects, one for each VM, domain or program: name (empty \
            if it failed before there was one), command, result (done; unchanged: it was so before; planned: --dry-run; failed), error \
            (why it failed, as on stderr, or empty), notes (lines for people), and where there is something to say takes_effect \
            (next-start; power-cycle: after it was powered off and started again; saved-image: when that is gone, too), difference \
            (--dry-run), bytes (given back), pages (saved or restored). The exit status is the same as without.

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
