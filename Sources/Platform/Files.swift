import CPlatform

extension Descriptor {
    /// A duplicate whose number is at least `lowest`, close-on-exec: out of the way of what a user passes down.
    public borrowing func duplicate(atLeast lowest: Int32) throws(QuireError) -> Descriptor {
        let copy = cp_dup_at_least(raw, lowest)
        guard copy >= 0 else { throw .system("cannot duplicate descriptor \(raw)") }
        return Descriptor(owning: copy)
    }

    /// Takes the file's lock without waiting; false if another open file has it. It is held until the last descriptor
    /// of this open file is closed, those of children included.
    public borrowing func tryLock() throws(QuireError) -> Bool {
        if cp_lock_try(raw) == 0 { return true }
        let code = cp_errno()
        guard code == EAGAIN || code == EACCES else { throw .system("cannot lock a file", errno: code) }
        return false
    }

    /// True if another open file holds the lock. Disturbs nobody.
    public borrowing func isLockedByOther() -> Bool { cp_lock_test(raw) == 1 }

    public borrowing func truncate(to byteCount: UInt64) throws(QuireError) {
        guard ftruncate(raw, off_t(byteCount)) == 0 else { throw .system("cannot size a file to \(byteCount) bytes") }
    }

    /// Replaces the file's whole content.
    public borrowing func replaceContent(_ text: String) throws(QuireError) {
        let bytes = Array(text.utf8)
        guard unsafe pwrite(raw, bytes, bytes.count, 0) == bytes.count, ftruncate(raw, off_t(bytes.count)) == 0 else {
            throw .system("cannot write a file")
        }
    }

    public borrowing func setMode(_ mode: mode_t) throws(QuireError) {
        guard fchmod(raw, mode) == 0 else { throw .system("cannot set the mode of a file") }
    }

    /// The same file, opened anew for reading only. Unlike a duplicate, nobody can make it writable.
    public borrowing func reopenedReadOnly() throws(QuireError) -> Descriptor {
        try Descriptor.open("/proc/self/fd/\(raw)", O_RDONLY)
    }

    /// 32-bit words at a byte offset; what lies beyond the end of the file reads as 0.
    public borrowing func readWords(at offset: UInt64, into words: inout [UInt32]) throws(QuireError) {
        let size = words.count * 4
        var done = 0
        // A read comes short, too, where a page cannot be had: only one of nothing is the end.
        while done < size {
            let n = unsafe words.withUnsafeMutableBytes { unsafe pread(raw, $0.baseAddress! + done, size - done, off_t(offset) + off_t(done)) }
            guard n >= 0 else { throw .system("cannot read a file") }
            if n == 0 { break }
            done += n
        }
        for index in (done / 4)..<words.count { words[index] = 0 }
    }

    /// All of them or an error; then it is unknown which of them were written.
    public borrowing func writeWords(at offset: UInt64, _ words: ArraySlice<UInt32>) throws(QuireError) {
        let size = words.count * 4
        let n = unsafe words.withUnsafeBytes { unsafe pwrite(raw, $0.baseAddress!, size, off_t(offset)) }
        guard n == size else {
            throw n < 0 ? .system("cannot write a file") : QuireError(.system, "cannot write all of a file")
        }
    }

    public borrowing func readBytes(at offset: UInt64, count: Int) throws(QuireError) -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: count)
        let n = unsafe bytes.withUnsafeMutableBytes { unsafe pread(raw, $0.baseAddress!, count, off_t(offset)) }
        guard n >= 0 else { throw .system("cannot read a file") }
        bytes.removeLast(count - n)
        return bytes
    }

    public borrowing func writeBytes(at offset: UInt64, _ bytes: [UInt8]) throws(QuireError) {
        guard unsafe pwrite(raw, bytes, bytes.count, off_t(offset)) == bytes.count else {
            throw .system("cannot write a file")
        }
    }

    /// Reads until the end or `limit` bytes.
    public borrowing func readAll(limit: Int) throws(QuireError) -> [UInt8] {
        var all: [UInt8] = []
        var chunk = [UInt8](repeating: 0, count: 4096)
        while all.count < limit {
            let n = unsafe read(raw, &chunk, min(chunk.count, limit - all.count))
            if n < 0 && cp_errno() == EINTR { continue }
            guard n >= 0 else { throw .system("cannot read a file") }
            if n == 0 { break }
            all += chunk[..<n]
        }
        return all
    }
}

/// Paths: the few calls that Quire makes, with errors that carry errno.
public enum Files {
    public static func read(_ path: String, limit: Int = 1 << 20) throws(QuireError) -> String {
        let file = try Descriptor.open(path, O_RDONLY)
        return String(decoding: try file.readAll(limit: limit), as: UTF8.self)
    }

    /// False if it existed already.
    @discardableResult public static func makeDirectory(_ path: String, mode: mode_t) throws(QuireError) -> Bool {
        if unsafe mkdir(path, mode) == 0 { return true }
        let code = cp_errno()
        if code == EEXIST { return false }
        throw .system("cannot create \(path)", errno: code)
    }

    /// True if something was removed.
    @discardableResult public static func remove(_ path: String) -> Bool { unsafe unlink(path) == 0 }
    @discardableResult public static func removeDirectory(_ path: String) -> Bool { unsafe rmdir(path) == 0 }

    public static func isDirectory(_ path: String) -> Bool {
        var status = stat()
        return unsafe stat(path, &status) == 0 && (status.st_mode & mode_t(S_IFMT)) == mode_t(S_IFDIR)
    }

    /// Whether anything is at `path`, or may be: who is not allowed to look does not know.
    public static func exists(_ path: String) -> Bool {
        var status = stat()
        if unsafe stat(path, &status) == 0 { return true }
        let code = cp_errno()
        return code != ENOENT && code != ENOTDIR
    }

    /// The identity of what is at `path` now, links not followed; nil if there is nothing.
    public static func identity(of path: String) -> FileStatus.Identity? {
        var status = stat()
        guard unsafe lstat(path, &status) == 0 else { return nil }
        return FileStatus.Identity(device: UInt64(status.st_dev), inode: UInt64(status.st_ino))
    }

    public static func isExecutable(_ path: String) -> Bool { unsafe access(path, X_OK) == 0 && !isDirectory(path) }
    public static func isWritable(_ path: String) -> Bool { unsafe access(path, W_OK) == 0 }

    /// Names in a folder, sorted, without `.` and `..`; nil if it cannot be read.
    public static func list(_ path: String) -> [String]? {
        guard let folder = unsafe opendir(path) else { return nil }
        defer { unsafe closedir(folder) }
        var names: [String] = []
        while let entry = unsafe readdir(folder) {
            let name = unsafe String(cString: cp_entry_name(entry))
            if name != "." && name != ".." { names.append(name) }
        }
        return names.sorted()
    }

    /// Sets mode and group of what is at `path`, links not followed.
    public static func setAccess(_ path: String, mode: mode_t, group: UInt32? = nil) throws(QuireError) {
        if let group {
            guard unsafe lchown(path, uid_t.max, group) == 0 else { throw .system("cannot change the group of \(path)") }
        }
        guard unsafe fchmodat(AT_FDCWD, path, mode, 0) == 0 else { throw .system("cannot change the mode of \(path)") }
    }

    /// An absolute path without `.` and `..`, by its text alone.
    public static func normalized(_ path: String) -> String {
        var parts: [Substring] = []
        for part in path.split(separator: "/") where part != "." {
            if part == ".." { _ = parts.popLast() } else { parts.append(part) }
        }
        return "/" + parts.joined(separator: "/")
    }

    /// What a symbolic link points to.
    public static func target(ofLink path: String) -> String? {
        var buffer = [UInt8](repeating: 0, count: 4096)
        let n = unsafe buffer.withUnsafeMutableBytes { bytes in
            unsafe readlink(path, bytes.baseAddress!.assumingMemoryBound(to: CChar.self), bytes.count)
        }
        return n > 0 ? String(decoding: buffer[..<n], as: UTF8.self) : nil
    }

    /// True if `path`, or the folder that would hold it, is on hugetlbfs.
    public static func isOnHugetlbfs(_ path: String) -> Bool {
        var info = statfs()
        var probe = path
        while unsafe statfs(probe, &info) != 0 {
            guard let slash = probe.lastIndex(of: "/"), slash != probe.startIndex else { return false }
            probe = String(probe[..<slash])
        }
        return info.f_type == Int(HUGETLBFS_MAGIC)
    }
}

/// The owner of any number of descriptors, in order.
public struct DescriptorList: ~Copyable, Sendable {
    public private(set) var raw: [Int32] = []
    public init() {}
    deinit { for fd in raw { close(fd) } }
    public mutating func append(_ descriptor: consuming Descriptor) { raw.append(descriptor.release()) }
}
