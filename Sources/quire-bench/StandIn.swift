import ArgumentParser
import CBench
import Glibc
import Host
import Platform

/// A process that has guest RAM and does with it what a guest would, beside the real agent: libquire-agent.so is
/// preloaded, and works because the program is called as QEMU is. Or, to compare, one whose RAM is private memory that
/// KSM may merge, and no agent.
///
/// A plan, shared with this side, says of each page what it holds; or names pages to be read and written, one after the
/// other, and takes the times.
final class StandIn {
    /// The plan: a word a page.
    let plan: Mapping
    let pageCount: Int
    /// Guest RAM, where it is a file.
    let file: Descriptor?
    /// Where guest RAM is in that process.
    private(set) var address: UInt64 = 0
    private var child: ChildProcess
    private let input: Descriptor, output: Descriptor
    private let program: String

    var pid: Int32 { child.pid }

    /// With `agent`, a path of a socket, guest RAM is a memory file.
    init(_ pageCount: Int, agent: String? = nil, _ programs: Programs) throws {
        self.pageCount = pageCount
        let planFile = try Memfd(name: "plan", byteCount: UInt64(pageCount * 8)).takeDescriptor()
        plan = try Mapping(planFile, byteCount: pageCount * 8)
        var to = try Pipe(), from = try Pipe()
        var options = ChildProcess.Options()
        options.passing = [
            .init(from: to.reader.raw()!, to: 0), .init(from: from.writer.raw()!, to: 1), .init(from: planFile.raw, to: 4),
        ]
        options.parentDeathSignal = SIGKILL
        // The agent looks at what the program is called, and a link would not do.
        program = programs.runtime + "/qemu-system-standin-\(pageCount)-\(monotonicNanoseconds())"
        var file: Descriptor?
        if let agent {
            let ram = try Memfd(name: "ram", byteCount: UInt64(pageCount * 4096)).takeDescriptor()
            options.passing.append(.init(from: ram.raw, to: 3))
            options.variables = ["LD_PRELOAD": programs.agent, "QUIRE_AGENT_SOCKET": agent]
            file = consume ram
        }
        _ = try ChildProcess.output(of: ["cp", programs.own, program])
        child = try ChildProcess([program, "guest-standin", "\(pageCount)"] + (agent == nil ? [] : ["--file"]), options)
        self.file = file
        to.closeReader()
        from.closeWriter()
        input = to.takeWriter()
        output = from.takeReader()
        address = try answer()
    }

    deinit {
        child.signal(SIGKILL)
        child.wait()
        Files.remove(program)
    }

    private func answer() throws -> UInt64 {
        var word: UInt64 = 0
        guard unsafe Glibc.read(output.raw, &word, 8) == 8 else { throw QuireError(.closed, "the stand-in has ended: \(child.wait())") }
        return word
    }

    private func tell(_ what: Character, _ range: Range<Int>) throws -> UInt64 {
        let words = [UInt64(what.asciiValue!), UInt64(range.lowerBound), UInt64(range.count)]
        guard unsafe Glibc.write(input.raw, words, 24) == 24 else { throw QuireError(.closed, "the stand-in has ended") }
        return try answer()
    }

    func set(_ index: Int, _ value: UInt64) { plan.store64(8 * index, value) }
    /// Writes what the plan says.
    func fill(_ pages: Range<Int>) throws { _ = try tell("f", pages) }
    /// Throws if a page does not hold what the plan says.
    func verify(_ pages: Range<Int>) throws {
        let wrong = try tell("v", pages)
        guard wrong == 0 else { throw QuireError(.system, "\(wrong) of \(pages.count) pages hold WRONG bytes") }
    }
    /// Reads the pages whose numbers stand at these places of the plan.
    func read(_ places: Range<Int>) throws { _ = try tell("r", places) }
    /// Writes to them; the nanoseconds that each write took.
    func write(_ places: Range<Int>) throws -> [Double] {
        _ = try tell("w", places)
        return places.map { Double(plan.load64(8 * $0)) / Cycles.tscPerNanosecond }
    }
}

struct GuestStandIn: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "guest-standin", abstract: "Has guest RAM, and does with it what stdin says.", shouldDisplay: false)

    @Argument var pages: Int
    @Flag var file = false

    func run() throws {
        ProcessCalls.ignoreBrokenPipes()
        let plan = try Mapping(Descriptor(owning: 4), byteCount: pages * 8)
        guard let memory = unsafe cb_map_guest(file ? 3 : -1, UInt64(pages) * 4096, file ? 1 : 0) else {
            throw QuireError(.system, "cannot map \(pages) pages")
        }
        // The plan lives as long as this function, and the other side asks for no place beyond its end.
        let words = unsafe plan.address(0, count: pages * 8).assumingMemoryBound(to: UInt64.self)
        var result = UInt64(UInt(bitPattern: memory))
        var order = [UInt64](repeating: 0, count: 3)
        while unsafe write(1, &result, 8) == 8, unsafe read(0, &order, 24) == 24 {
            result = 0
            switch UnicodeScalar(UInt8(order[0])) {
            case "f": unsafe cb_fill(memory, words, order[1], order[2])
            case "v": result = unsafe cb_wrong_pages(memory, words, order[1], order[2])
            case "r": unsafe cb_read_pages(memory, words, order[1], order[2])
            default: unsafe cb_write_pages(memory, words, order[1], order[2])
            }
        }
    }
}
