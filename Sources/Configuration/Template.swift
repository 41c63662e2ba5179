/// The file with everything in it, commented out: what is installed.
public enum Template {
    public static let text: String = {
        var lines: [String] = []
        comment(
            "The configuration of Quire (operator's guide, \"Configure\"). Everything that can be said is below, commented out, with its "
                + "default or, where that depends on the host, an example. Keys are named like the options of the programs. What a "
                + "command line says beats [vm.NAME], which beats [backend], which beats the default.")
        lines += [
            "#", "#   quire config check      what is wrong in here", "#   quire config show       what holds, and why",
            "#   quire config reload     applies at once what is marked with *; the rest waits for the next start",
        ]
        func comment(_ text: String) {
            var line = "#"
            for word in text.split(separator: " ") {
                if line.count + word.count >= width {
                    lines.append(line)
                    line = "#"
                }
                line += " " + word
            }
            lines.append(line)
        }
        func section(_ title: String, _ about: String, _ scope: Scope) {
            lines.append("")
            comment(about)
            lines.append("[\(title)]")
            for key in scope.keys {
                lines.append("")
                comment((key.isLive ? "* " : "") + key.summary + (key.hasBuiltIn ? "" : " Default: \(key.otherwiseText)."))
                lines.append("#\(key.name) = \(key.exampleText)")
            }
        }
        section("quired", "The page store, which keeps equal pages once. candidates, shared-disk and workers apply at once with quired --keep, as the service has it.", .quired)
        section("backend", "Every VM.", .backend)
        lines.append("")
        comment("One VM: everything that [backend] knows. The name is that in quire status.")
        lines += ["#[vm.web1]", "#period = \"2s\"", "#merge = false"]
        section("exporter", "Metrics, API and page: systemctl reload quire-exporter applies it.", .exporter)
        return lines.joined(separator: "\n") + "\n"
    }()

    private static let width = 110
}
