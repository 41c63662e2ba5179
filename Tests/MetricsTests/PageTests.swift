import Foundation
import Glibc
import Host
import Platform
import TestSupport
import Testing

/// The page in a real browser: what it shows is what the API says.
@Suite(.serialized) struct PageTests {
    private let folder: Folder

    init() throws { folder = try Folder() }

    /// The document as it is once the page has drawn.
    private func draw(_ url: String, _ more: [String] = []) throws -> String {
        let (status, text) = try command(
            [
                "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
                "--user-data-dir=\(folder.path)/browser", "--virtual-time-budget=4000", "--timeout=60000",
            ] + more + [url])
        guard status == 0 else { throw Trouble("chromium: status \(status): \(text.suffix(2000))") }
        return text
    }

    private struct Picture: Decodable {
        let private_bytes: UInt64, shared_bytes: UInt64, zero_bytes: UInt64, recycled_bytes: UInt64
        let tmem_bytes: UInt64
    }
    private struct VM: Decodable {
        let name: String, uid: UInt32, ram_bytes: UInt64, saved_bytes: UInt64, picture: Picture, state: String
    }
    private struct HostAnswer: Decodable { let saved_bytes: UInt64, picture: Picture }

    /// The number behind what stands in a cell.
    private func value(_ row: Substring, _ key: String, by attribute: String = "data-part") -> UInt64? {
        guard let at = row.firstRange(of: "\(attribute)=\"\(key)\""),
            let start = row[at.upperBound...].firstRange(of: "<data value=\"")
        else { return nil }
        return UInt64(row[start.upperBound...].prefix { $0 != "\"" })
    }

    @Test func numbersEqualTheAPIs() throws {
        let vms = try SyntheticVMs(24, base: folder.path + "/run")
        let exporter = try Exporter([vms.directory.base])
        let page = try draw(exporter.url, ["--dump-dom"])
        let listed = try JSONDecoder().decode([VM].self, from: Data(exporter.get("/api/v1/vms").body.utf8))
        #expect(listed.count == 24)
        let rows = page.split(separator: "<tr ").filter { $0.hasPrefix("data-uid=") }
        #expect(rows.count == 24, "\(page.prefix(3000))")
        for vm in listed {
            let row = try #require(rows.first { $0.contains("data-name=\"\(vm.name)\"") }, "\(vm.name)")
            #expect(value(row, "ram") == vm.ram_bytes && value(row, "saved") == vm.saved_bytes, "\(vm.name)")
            #expect(value(row, "private") == vm.picture.private_bytes && value(row, "shared") == vm.picture.shared_bytes)
            #expect(value(row, "zero") == vm.picture.zero_bytes && value(row, "recycled") == vm.picture.recycled_bytes)
            #expect(value(row, "tmem") == vm.picture.tmem_bytes && vm.picture.tmem_bytes > 0)
            #expect(row.contains(">\(vm.state)</td>"))
            // A part is drawn for each number that is not zero.
            for part in ["private", "shared", "zero", "recycled"] { #expect(row.contains("<rect class=\"\(part)\""), "\(part)") }
        }
        let host = try JSONDecoder().decode(HostAnswer.self, from: Data(exporter.get("/api/v1/host").body.utf8))
        #expect(value(page[...], "total-saved", by: "id") == host.saved_bytes)
        #expect(value(page[...], "total-private", by: "id") == host.picture.private_bytes)
        #expect(value(page[...], "total-recycled", by: "id") == host.picture.recycled_bytes)

        // Markup in a reason stays text, and nothing of it ran.
        #expect(!page.contains("<img") && page.contains("&lt;img src=x onerror=") && !page.contains("<title>owned"))
    }

    @Test func picturesOfThePage() throws {
        let vms = try SyntheticVMs(12, base: folder.path + "/run")
        let exporter = try Exporter([vms.directory.base], ["--history-interval", "200ms"])
        // Something happens meanwhile.
        for step in 0..<15 {
            for (index, name) in vms.names.enumerated() {
                try SyntheticVMs.write(index, name, vms.directory.statusPath(name), step: UInt64(step * 3000 * (index % 3 + 1)))
            }
            ProcessCalls.sleep(milliseconds: 250)
        }
        let page = try draw(exporter.url, ["--dump-dom"])
        #expect(page.contains("<polygon class=\"recycled\""))
        _ = try? Files.makeDirectory(top + "/build", mode: 0o755)
        for (name, more) in [
            ("light", ["--blink-settings=preferredColorScheme=1"]), ("dark", ["--blink-settings=preferredColorScheme=0"]),
            ("narrow", ["--window-size=420,900"]),
        ] as [(String, [String])] {
            let file = top + "/build/metrics-page-\(name).png"
            Files.remove(file)
            _ = try draw(exporter.url, ["--screenshot=\(file)", "--window-size=1400,1000"] + more)
            let picture = try Descriptor.open(file, O_RDONLY).status()
            // A page that is blank makes a picture of a few thousand bytes.
            #expect(picture.byteCount > 20_000, "\(name)")
        }
    }

    @Test func withoutVMsAndWithAToken() throws {
        let empty = try Exporter([folder.path + "/none"])
        let page = try draw(empty.url, ["--dump-dom"])
        #expect(page.contains("No VM is running.") && page.contains(">0 VMs, "))
        #expect(!page.contains("id=\"none\" hidden"))
        let guarded = try Exporter(
            [folder.path + "/none"], ["--http-token-file", folder.write("token", "0123456789abcdef0123\n")])
        let asked = try draw(guarded.url, ["--dump-dom"])
        #expect(asked.contains("A token is needed.") && asked.contains("<form id=\"login\">"))
    }
}
