import ArgumentParser
import Bench

/// What every benchmark of several parts is told.
struct PartOptions: ParsableArguments {
    @Flag(help: "Fewer repetitions and less memory: for a look, not for figures to quote.")
    var quick = false

    @Option(help: ArgumentHelp("What scripts/guest-build made.", valueName: "folder"))
    var guests = "build/guest"

    @Option(help: ArgumentHelp("Only this part; repeatable.", valueName: "part"))
    var only: [String] = []

    func check(_ parts: [String]) throws {
        for name in only where !parts.contains(name) {
            throw ValidationError("'\(name)' is no part: choose of \(parts.joined(separator: ", "))")
        }
    }

    /// Runs a part if it is wanted. One that fails has missed those of its bars that it did not come to.
    func run(_ name: String, bars: [Bar], into report: inout Report, _ body: (inout Report) throws -> Void) {
        guard only.isEmpty || only.contains(name) else { return }
        progress("\(name) begins")
        do { try body(&report) } catch {
            progress("\(name): \(error)")
            let known = Set(report.bars.map(\.name))
            report.fail(name, "\(error)", bars: bars.filter { !known.contains($0.name) })
        }
    }
}
