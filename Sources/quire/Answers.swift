import ArgumentParser
import Host
import Platform

/// For commands that change something.
struct AnswerOption: ParsableArguments {
    @Flag(help: "Prints JSON: what was done, as 'quire --help' says.")
    var json = false

    /// Of a command about one VM.
    func about(_ name: String, _ command: String, _ body: (inout CommandAnswer) throws(QuireError) -> Void) throws {
        var answers = Answers(command, json: json)
        answers.about(name, body)
        try answers.end()
    }
}

/// What a command did to each of its VMs, domains or programs: said in lines as it happens, or at the end as JSON.
struct Answers {
    private let command: String
    private let json: Bool
    private(set) var all: [CommandAnswer] = []

    init(_ command: String, json: Bool) {
        self.command = command
        self.json = json
    }

    /// One that fails does not keep others from it.
    mutating func about(_ name: String, _ body: (inout CommandAnswer) throws(QuireError) -> Void) {
        var answer = CommandAnswer(command, name)
        do throws(QuireError) {
            try body(&answer)
            if !json { for note in answer.notes { print("\(name): \(note)") } }
        } catch {
            writeStandardError("quire: \(error)")
            answer.fail(error)
        }
        all.append(answer)
    }

    /// Before it came to any of them, or to all of these.
    mutating func fail(_ names: [String], _ error: QuireError) {
        writeStandardError("quire: \(error)")
        for name in names.isEmpty ? [""] : names {
            var answer = CommandAnswer(command, name)
            answer.fail(error)
            all.append(answer)
        }
    }

    func show() { if json { print(jsonText(all)) } }

    func end() throws {
        show()
        if all.contains(where: { $0.result == .failed }) { throw ExitCode(1) }
    }
}
