import ArgumentParser
import Host
import Platform

extension Quire {
    struct Unmerge: ParsableCommand {
        static let configuration = CommandConfiguration(
            commandName: "unmerge",
            abstract: "Gives a VM copies of its own of all its pages, and merges nothing of it any more.",
            discussion: """
                The guest runs on. Returns when every page is back; that takes memory, as much as 'quire status' shows as \
                saved. 'quire merge' begins again.
                """)

        @Argument(help: ArgumentHelp("The VM.", valueName: "name"))
        var name: String

        @OptionGroup var answer: AnswerOption

        func run() throws {
            try answer.about(name, "unmerge") { _ throws(QuireError) in
                let directory = try RuntimeDirectory.standard()
                try ProgressBar.whileUnmerging(name, in: directory) { () throws(QuireError) in
                    _ = try CommandSocket.ask("unmerge", of: name, in: directory)
                }
            }
        }
    }

    struct Merge: ParsableCommand {
        static let configuration = CommandConfiguration(commandName: "merge", abstract: "Merges a VM's equal pages again, after 'quire unmerge'.")

        @Argument(help: ArgumentHelp("The VM.", valueName: "name"))
        var name: String

        @OptionGroup var answer: AnswerOption

        func run() throws {
            try answer.about(name, "merge") { _ throws(QuireError) in
                try CommandSocket.ask("merge", of: name, in: RuntimeDirectory.standard())
            }
        }
    }
}
