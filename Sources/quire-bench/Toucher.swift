import ArgumentParser
import Glibc
import Host
import Platform

/// Another process that has guest RAM mapped, and writes to all of it when it is told to: what QEMU is to a backend.
final class Toucher {
    private var child: ChildProcess
    private let command: Descriptor
    private let answer: Descriptor

    init(_ files: [Int32]) throws {
        var input = try Pipe(), output = try Pipe()
        var options = ChildProcess.Options()
        options.passing = [
            ProcessCalls.Passed(from: input.reader.raw()!, to: 0), ProcessCalls.Passed(from: output.writer.raw()!, to: 1),
        ]
        for (index, raw) in files.enumerated() { options.passing.append(.init(from: raw, to: Int32(3 + index))) }
        options.parentDeathSignal = SIGKILL
        child = try ChildProcess(["/proc/self/exe", "touch-memory", "\(files.count)"], options)
        input.closeReader()
        output.closeWriter()
        command = input.takeWriter()
        answer = output.takeReader()
    }

    deinit {
        child.signal(SIGKILL)
        child.wait()
    }

    /// Returns when every page has been written to.
    func touch() throws {
        var byte: UInt8 = 1
        guard unsafe write(command.raw, &byte, 1) == 1, unsafe read(answer.raw, &byte, 1) == 1 else {
            throw QuireError(.closed, "the process that touches memory has ended")
        }
    }
}

struct TouchMemory: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "touch-memory", abstract: "Maps the files 3 and up, and writes to every page for each byte on stdin.",
        shouldDisplay: false)

    @Argument var count: Int

    private final class Shared {
        let mapping: Mapping
        init(_ raw: Int32) throws {
            let file = Descriptor(owning: raw)
            mapping = try Mapping(file, byteCount: Int(file.status().byteCount))
        }
    }

    func run() throws {
        var files: [Shared] = []
        for index in 0..<count { files.append(try Shared(Int32(3 + index))) }
        var byte: UInt8 = 0
        while unsafe read(0, &byte, 1) == 1 {
            for file in files {
                // Adds nothing: the state table is in there, too. It is a write all the same.
                for offset in stride(from: 2048, to: file.mapping.byteCount, by: 4096) { file.mapping.add64(offset, 0) }
            }
            guard unsafe write(1, &byte, 1) == 1 else { return }
        }
    }
}
