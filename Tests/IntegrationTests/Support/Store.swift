import Glibc
import Host
import Platform
import StoreProtocol
import TestSupport

/// quired in a folder of its own, with a keeper unless told otherwise. Its end ends all of it, by number.
final class Store {
    let folder: Folder
    private var process: ChildProcess

    init(_ options: [String] = ["--keep"]) throws {
        folder = try Folder()
        var child = ChildProcess.Options()
        child.parentDeathSignal = SIGTERM
        let log = try Descriptor.open(folder.path + "/errors", O_RDWR | O_CREAT | O_APPEND)
        child.passing = [.init(from: log.raw, to: 1), .init(from: log.raw, to: 2)]
        process = try ChildProcess(
            [products + "quired", "--directory", folder.path + "/store", "--config", "/dev/null", "--limit", "1G", "--candidates", "4M"]
                + options, child)
        do { try waitForService() } catch {
            end()
            throw Trouble("\(error)\n\(errors)")
        }
    }

    deinit { end() }

    var path: String { folder.path + "/store/store.sock" }
    var errors: String { (try? Files.read(folder.path + "/errors")) ?? "" }

    /// Of all groups together.
    func figures() throws -> StoreFigures { try StoreClient.figures(path: path) }

    /// What `quire tmem list` says of a shared disk.
    func sharedDisk(_ name: String) throws -> SharedDiskReport {
        let answer = try SharedDiskCommand.ask("list", at: SharedDiskClient.path(besideStore: path), patienceMilliseconds: 10_000)
        let all: [SharedDiskReport] = try decodeJSON(answer ?? "[]")
        guard let report = all.first(where: { $0.disk == name }) else { throw Trouble("there is no shared disk '\(name)': \(errors)") }
        return report
    }

    func waitForService() throws { try waitUntil("quired to serve", state: { self.errors }) { (try? figures()) != nil } }

    /// The process that does the work: the keeper's child, or the only one there is.
    var worker: Int32 {
        let pid = process.pid
        let children = try? Files.read("/proc/\(pid)/task/\(pid)/children")
        return children?.split(separator: " ").first.flatMap { Int32($0) } ?? pid
    }

    func end() {
        guard process.poll() == nil else { return }
        ProcessCalls.signal(worker, SIGCONT)
        process.signal(SIGTERM)
        let deadline = monotonicNanoseconds() + 10_000_000_000
        while process.poll() == nil && monotonicNanoseconds() < deadline { ProcessCalls.sleep(milliseconds: 20) }
        if process.poll() == nil {
            ProcessCalls.signal(worker, SIGKILL)
            process.signal(SIGKILL)
            process.wait()
        }
    }
}
