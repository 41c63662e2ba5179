import Glibc

/// Milliseconds since 1970.
func currentUnixMilliseconds() -> Int64 {
    var time = timespec()
    _ = unsafe clock_gettime(CLOCK_REALTIME, &time)
    return Int64(time.tv_sec) * 1000 + Int64(time.tv_nsec) / 1_000_000
}

extension RuntimeDirectories {
    /// Not a link: what users put into their own folder must not lead elsewhere.
    static let folderFlags = O_RDONLY | O_DIRECTORY | O_NOFOLLOW
    static let missing = ENOENT
}
