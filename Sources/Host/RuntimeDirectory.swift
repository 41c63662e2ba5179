import Glibc
import Platform

/// Where running VMs are found: one folder for each under a common base.
///
///     BASE/NAME/lock          held locked for the VM's life; its text says who holds it
///     BASE/NAME/status        the status page
///     BASE/NAME/control.sock  where QEMU reaches the backend
///     BASE/NAME/swap.sock     the same for its swap disk, if it has one
///     BASE/NAME/shared-N.sock the same for its shared disks
///     BASE/NAME/agent.sock    where the agent in QEMU does
///     BASE/NAME/command.sock  where `quire` reaches the backend
///     BASE/NAME/supervisor.sock  where it reaches who started the backend
///
/// A VM runs as long as its lock is held. QEMU inherits the lock, so the name stays taken if the supervisor dies first;
/// and a folder whose lock nobody holds is a dead owner's, and free to take.
public struct RuntimeDirectory: Sendable, Equatable {
    public let base: String

    public init(base: String) { self.base = base }

    /// $QUIRE_RUNTIME_DIR, else /run/quire for root, else $XDG_RUNTIME_DIR/quire.
    public static func standard(
        environment: (String) -> String? = ProcessCalls.environment, isRoot: Bool = ProcessCalls.isRoot
    ) throws(QuireError) -> RuntimeDirectory {
        if let chosen = environment("QUIRE_RUNTIME_DIR") {
            guard chosen.hasPrefix("/") else {
                throw QuireError(.invalid, "QUIRE_RUNTIME_DIR is \(chosen): set it to an absolute path")
            }
            return RuntimeDirectory(base: trimmed(chosen))
        }
        if isRoot { return RuntimeDirectory(base: "/run/quire") }
        guard let user = environment("XDG_RUNTIME_DIR"), user.hasPrefix("/") else {
            throw QuireError(
                .invalid, "there is no runtime directory: set QUIRE_RUNTIME_DIR to a folder that only you can enter")
        }
        return RuntimeDirectory(base: trimmed(user) + "/quire")
    }

    private static func trimmed(_ path: String) -> String {
        var path = path
        while path.count > 1 && path.hasSuffix("/") { path.removeLast() }
        return path
    }

    /// 1 to 63 of A-Z a-z 0-9 . _ - and no dot in front.
    public static func isValidName(_ name: String) -> Bool { PlainName.isValid(name) }

    public static func checkName(_ name: String) throws(QuireError) {
        guard isValidName(name) else {
            throw QuireError(
                .invalid, "'\(name)' is no name for a VM: use 1 to 63 of A-Z a-z 0-9 . _ - that do not start with a dot")
        }
    }

    public func folder(_ name: String) -> String { base + "/" + name }
    public func commandPath(_ name: String) -> String { folder(name) + "/command.sock" }
    public func supervisorPath(_ name: String) -> String { folder(name) + "/supervisor.sock" }
    public func statusPath(_ name: String) -> String { folder(name) + "/status" }
    func sharedSocketPath(_ name: String, _ number: Int) -> String { Self.sharedSocket(number, in: folder(name)) }
    /// Where QEMU reaches one of a VM's shared disks, in the folder with its sockets.
    package static func sharedSocket(_ number: Int, in folder: String) -> String { folder + "/shared-\(number).sock" }
    func lockPath(_ name: String) -> String { folder(name) + "/lock" }

    /// Makes the base if it is missing.
    func prepare() throws(QuireError) {
        if Files.isDirectory(base) {
            guard Files.isWritable(base) else {
                throw QuireError(.system, "cannot write to \(base): set QUIRE_RUNTIME_DIR to a folder of your own")
            }
            return
        }
        let slash = base.lastIndex(of: "/") ?? base.startIndex
        let parent = slash == base.startIndex ? "/" : String(base[..<slash])
        guard Files.isDirectory(parent) else {
            throw QuireError(
                .invalid, "cannot create \(base): \(parent) does not exist, create it or set QUIRE_RUNTIME_DIR")
        }
        do { try Files.makeDirectory(base, mode: 0o700) } catch {
            throw QuireError(
                .system, "cannot create \(base) (\(error.errno.map(QuireError.text(of:)) ?? "failed")): set QUIRE_RUNTIME_DIR to a folder of your own")
        }
        guard Files.isDirectory(base) else {
            throw QuireError(.invalid, "\(base) is not a folder: remove it or set QUIRE_RUNTIME_DIR")
        }
    }

    /// Takes the name for this process. What a dead owner left in its folder is removed.
    public func claim(_ name: String) throws(QuireError) -> Claim {
        try Self.checkName(name)
        try prepare()
        // Somebody may remove the folder between our steps, as its last owner does: then begin again.
        for _ in 0..<100 {
            try Files.makeDirectory(folder(name), mode: 0o700)
            let lock: Descriptor
            do { lock = try Descriptor.open(lockPath(name), O_RDWR | O_CREAT | O_NOFOLLOW) } catch {
                if error.errno == ENOENT { continue }
                throw error
            }
            guard try lock.tryLock() else {
                guard let pid = owner(name) else {
                    throw QuireError(.busy, "the VM name '\(name)' is taken: choose another with --name")
                }
                throw QuireError(
                    .busy,
                    "the VM name '\(name)' is taken by process \(pid): choose another with --name, or end that VM (kill \(pid))")
            }
            // The file that we locked must still be the one at the path.
            guard try Files.identity(of: lockPath(name)) == lock.status().identity else { continue }
            Files.remove(folder(name) + "/status")
            Files.remove(folder(name) + "/control.sock")
            Files.remove(folder(name) + "/swap.sock")
            for number in 0..<QEMUCommandLine.maxDisks { Files.remove(sharedSocketPath(name, number)) }
            Files.remove(folder(name) + "/agent.sock")
            Files.remove(folder(name) + "/command.sock")
            Files.remove(supervisorPath(name))
            try lock.replaceContent("\(ProcessCalls.ownPID)\n")
            return Claim(directory: self, name: name, lock: lock)
        }
        throw QuireError(.busy, "\(folder(name)) comes and goes: somebody else starts a VM of that name, choose another")
    }

    /// The first living process that the lock file names.
    public func owner(_ name: String) -> Int32? {
        guard let text = try? Files.read(lockPath(name), limit: 256) else { return nil }
        return text.split(whereSeparator: \.isWhitespace).compactMap { Int32($0) }.first(where: ProcessCalls.isAlive)
    }

    public func isRunning(_ name: String) -> Bool {
        // Whoever may only read can ask; and what another user has put there must not keep us waiting.
        guard Self.isValidName(name),
            let lock = try? Descriptor.open(lockPath(name), O_RDONLY | O_NOFOLLOW | O_NONBLOCK)
        else { return false }
        return lock.isLockedByOther()
    }

    /// The names of all running VMs, sorted.
    public func running() -> [String] { names.filter(isRunning) }

    /// The same, and of those that may have been left behind.
    var names: [String] { Files.list(base) ?? [] }

    /// A name that this process owns.
    public struct Claim: ~Copyable, Sendable {
        public let directory: RuntimeDirectory
        public let name: String
        /// Give it to QEMU as well, and the name stays taken for as long as QEMU lives.
        public let lock: Descriptor

        init(directory: RuntimeDirectory, name: String, lock: consuming Descriptor) {
            self.directory = directory
            self.name = name
            self.lock = lock
        }

        public var statusPath: String { directory.statusPath(name) }
        public var controlSocketPath: String { directory.folder(name) + "/control.sock" }
        public func sharedSocketPath(_ number: Int) -> String { directory.sharedSocketPath(name, number) }
        public var swapSocketPath: String { directory.folder(name) + "/swap.sock" }
        public var agentSocketPath: String { directory.folder(name) + "/agent.sock" }

        /// Notes a further process that keeps the VM running.
        public borrowing func note(pid: Int32) throws(QuireError) {
            try lock.replaceContent("\(ProcessCalls.ownPID)\n\(pid)\n")
        }

        /// Removes what we made: the files, and the folder if nobody put anything else there.
        public consuming func remove() {
            Files.remove(statusPath)
            Files.remove(controlSocketPath)
            Files.remove(swapSocketPath)
            for number in 0..<QEMUCommandLine.maxDisks { Files.remove(sharedSocketPath(number)) }
            Files.remove(agentSocketPath)
            Files.remove(directory.commandPath(name))
            Files.remove(directory.supervisorPath(name))
            // The lock's file goes last, while it is still locked: whoever opened it meanwhile sees that it is gone.
            Files.remove(directory.lockPath(name))
            Files.removeDirectory(directory.folder(name))
        }
    }
}
