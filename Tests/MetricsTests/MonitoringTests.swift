import Host
import Platform
import TestSupport
import Testing

/// What qemu-config/ has for Prometheus and Grafana: it speaks of metrics that there are.
@Suite(.serialized) struct MonitoringTests {
    static let rules = top + "/qemu-config/prometheus-alerts.yml"
    static let dashboard = top + "/qemu-config/grafana-dashboard.json"

    @Test func rulesAreRules() throws {
        let (status, text) = try command([promtool, "check", "rules", Self.rules])
        #expect(status == 0, "\(text)")
        // What they fire on, and on what not.
        let (tested, output) = try command([promtool, "test", "rules", top + "/Tests/MetricsTests/alerts-test.yml"])
        #expect(tested == 0, "\(output)")
    }

    /// For each there is a line of what to do, and a test in which it fires.
    @Test func everyAlertIsExplained() throws {
        let head = "  - alert: "
        let alerts = try Files.read(Self.rules).split(separator: "\n").filter { $0.hasPrefix(head) }.map { String($0.dropFirst(head.count)) }
        #expect(alerts.count >= 12)
        let rows = try Files.read(top + "/docs/metrics.md").split(separator: "\n").filter { $0.hasPrefix("| Quire") }
        let explained = rows.flatMap { row in row.split(separator: "|")[0].split { ", ".contains($0) }.map(String.init) }
        #expect(explained.sorted() == alerts.sorted())
        let tests = try Files.read(top + "/Tests/MetricsTests/alerts-test.yml")
        for alert in alerts { #expect(tests.contains("    alertname: \(alert)\n    exp_alerts:\n    - "), "nothing fires \(alert)") }
    }

    @Test func everyMetricExists() throws {
        let folder = try Folder()
        let vms = try SyntheticVMs(2, base: folder.path + "/run")
        let quired = try Quired(["--shared-disk", "scratch,size=64M", "--tmem-cap", "1G"])
        let store = try SyntheticStoreVMs(["a"], path: quired.path)
        let exporter = try Exporter([vms.directory.base], store: quired.path)
        let text = try exporter.get("/metrics").body
        let offered = Set(text.split(separator: "\n").filter { $0.hasPrefix("# TYPE ") }.map { String($0.split(separator: " ")[2]) })
        // Each has a sample, and docs/metrics.md tells of it.
        let explained = try Files.read(top + "/docs/metrics.md")
        let sampled = Set(samples(text).keys.map { String($0.prefix { $0 != "{" }) })
        for name in offered {
            #expect(sampled.contains(name), "\(name) has no sample")
            #expect(explained.contains("`\(name)`"), "\(name) is not in docs/metrics.md")
        }
        for file in [Self.rules, Self.dashboard, top + "/docs/metrics.md"] {
            let used = Self.metrics(try Files.read(file))
            #expect(used.count >= 5, "\(file)")
            #expect(used.subtracting(offered) == [], "\(file)")
        }
        #expect(Self.metrics("rate(quire_vm_nonsense_total[5m]) > quire_vms").subtracting(offered) == ["quire_vm_nonsense_total"])
        withExtendedLifetime(store) {}
    }

    /// Words that begin as our metrics do.
    private static func metrics(_ text: String) -> Set<String> {
        Set(
            text.split { !($0.isASCII && ($0.isLetter || $0.isNumber || $0 == "_")) }.map(String.init)
                .filter { $0.hasPrefix("quire_") && !$0.hasSuffix("_") })
    }

    @Test func dashboardIsOne() throws {
        let check = """
            import json, sys
            board = json.load(open(sys.argv[1]))
            panels = [p for p in board["panels"] if p["type"] != "row"]
            assert board["title"] and board["uid"] and len(panels) >= 6
            assert len({p["id"] for p in board["panels"]}) == len(board["panels"])
            for panel in panels:
                assert panel["title"] and panel["targets"] and panel["datasource"]["uid"] == "${datasource}", panel["title"]
                for target in panel["targets"]:
                    print(target["expr"].replace("$vm", "vm-000").replace("$__rate_interval", "5m"))
            """
        let (status, text) = try command(["/usr/bin/python3", "-c", check, Self.dashboard])
        #expect(status == 0, "\(text)")
        // Prometheus itself reads every expression.
        let folder = try Folder()
        var rules = "groups:\n- name: dashboard\n  rules:\n"
        for (index, expression) in text.split(separator: "\n").enumerated() {
            rules += "  - record: panel:\(index)\n    expr: '\(expression.replacing("'", with: "''"))'\n"
        }
        let checked = try command([promtool, "check", "rules", folder.write("rules.yml", rules)])
        #expect(checked.status == 0, "\(checked.text)")
    }
}
