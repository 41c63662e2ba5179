import ArgumentParser
import Glibc
import Host
import Metrics
import Platform

extension Quire {
    struct Top: ParsableCommand {
        static let configuration = CommandConfiguration(
            commandName: "top", abstract: "Shows the running VMs and what they save, live.",
            discussion: """
                Root sees the VMs of all users. RESIDENT, RECYCLED and the states are those of 'quire status'; MERGED is its \
                SAVED, what merging saves. SAVED here is RECYCLED and MERGED together, RATE how fast both grow before anything \
                is taken back, CPU the backend's share of one CPU since the last picture, and the bars the last minute of SAVED.

                Keys: q quit; s, r, v sort by saved, rate or VM; j and k or the arrows scroll; space pauses; + and - change \
                the interval.

                With --json: one line a picture, an object with time_unix_ms, saved_bytes and vms, each with the fields of \
                'quire status --json', uid, saved_bytes and picture.

                Exit status: 0; 128 and the signal's number when a signal ended it.
                """)

        @Option(help: ArgumentHelp("Sort by this.", valueName: "saved|rate|vm"))
        var sort = SortOrder.saved

        @Option(help: ArgumentHelp("Time between pictures: 500ms, 1s, 10s.", valueName: "time"), transform: Self.milliseconds)
        var interval: UInt64 = 1000

        @Flag(help: "Prints one picture and exits.")
        var once = false

        @Flag(help: "Prints JSON, one object a line, with exact numbers.")
        var json = false

        enum SortOrder: String, ExpressibleByArgument, CaseIterable { case saved, rate, vm }

        static let intervals: ClosedRange<UInt64> = 200...60_000

        static func milliseconds(_ text: String) throws -> UInt64 {
            guard let value = Size.milliseconds(text), intervals.contains(value) else {
                throw ValidationError("'\(text)' is no interval: use 200ms to 1m")
            }
            return value
        }

        func run() throws {
            let signal = try failing { () throws(QuireError) -> Int32 in
                let directories = try RuntimeDirectories.standard()
                var screen = TopScreen(intervalMilliseconds: interval, hasBlocks: Self.isUTF8)
                screen.order = TopScreen.Order(rawValue: sort.rawValue) ?? .saved
                if once || json { return printPictures(&screen, directories) }
                guard ProcessCalls.isTerminal(0), ProcessCalls.isTerminal(1) else {
                    throw QuireError(.invalid, "quire top draws on a terminal, and this is none: use --once or --json")
                }
                return try live(&screen, directories)
            }
            if signal != 0 { throw ExitCode(128 + signal) }
        }

        private func printPictures(_ screen: inout TopScreen, _ directories: RuntimeDirectories) -> Int32 {
            let colours = Self.hasColours
            while true {
                screen.show(HostSnapshot.read(directories))
                if json { print(screen.json, terminator: "") } else {
                    print(screen.lines(size: nil, colours: colours).joined(separator: "\n"))
                }
                // A pipe gets each line at once.
                fflush(nil)
                if once { return 0 }
                ProcessCalls.sleep(milliseconds: UInt32(interval))
            }
        }

        /// Returns the signal that ended it, or 0.
        private func live(_ screen: inout TopScreen, _ directories: RuntimeDirectories) throws(QuireError) -> Int32 {
            let signals = try SignalDescriptor([SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGTSTP, SIGWINCH])
            let terminal = try Terminal()
            let colours = Self.hasColours
            var next = monotonicNanoseconds()
            while true {
                let now = monotonicNanoseconds()
                if !screen.isPaused, now >= next {
                    screen.show(HostSnapshot.read(directories))
                    next = max(next + screen.interval * 1_000_000, now)
                }
                terminal.draw(screen.lines(size: Terminal.size() ?? (80, 24), colours: colours))
                let wait = screen.isPaused ? -1 : Int32((next - min(next, monotonicNanoseconds())) / 1_000_000 + 1)
                for ready in waitReadable([signals.descriptor.raw, 0], timeoutMilliseconds: wait) {
                    if ready == 1 {
                        guard let keys = terminal.keys() else { return 0 }
                        if !Self.apply(keys, to: &screen, rows: Terminal.size()?.rows ?? 24) { return 0 }
                        // A shorter interval takes effect at once.
                        next = min(next, monotonicNanoseconds() + screen.interval * 1_000_000)
                    } else if let event = signals.next() {
                        switch event.number {
                        case SIGWINCH: break
                        case SIGTSTP: try terminal.suspend()
                        default: return event.number
                        }
                    }
                }
            }
        }

        /// False: quit.
        private static func apply(_ keys: [UInt8], to screen: inout TopScreen, rows: Int) -> Bool {
            var rest = keys[...]
            while let key = rest.popFirst() {
                // Arrows and page keys: ESC [ and a letter, or a number and ~.
                if key == 0x1B, rest.first == UInt8(ascii: "[") {
                    rest.removeFirst()
                    switch rest.popFirst() {
                    case UInt8(ascii: "A"): screen.scroll(by: -1)
                    case UInt8(ascii: "B"): screen.scroll(by: 1)
                    case UInt8(ascii: "5"):
                        screen.scroll(by: -(rows / 2))
                        _ = rest.popFirst()
                    case UInt8(ascii: "6"):
                        screen.scroll(by: rows / 2)
                        _ = rest.popFirst()
                    default: break
                    }
                    continue
                }
                switch Character(UnicodeScalar(key)) {
                case "q", "Q": return false
                case "s": screen.order = .saved
                case "r": screen.order = .rate
                case "v", "n": screen.order = .vm
                case "j": screen.scroll(by: 1)
                case "k": screen.scroll(by: -1)
                case " ": screen.isPaused.toggle()
                case "+": screen.interval = min(screen.interval * 2, intervals.upperBound)
                case "-": screen.interval = max(screen.interval / 2, intervals.lowerBound)
                default: break
                }
            }
            return true
        }

        private static var hasColours: Bool { ProcessCalls.isTerminal(1) && ProcessCalls.environment("NO_COLOR") == nil }

        private static var isUTF8: Bool {
            let locale = ["LC_ALL", "LC_CTYPE", "LANG"].lazy.compactMap { ProcessCalls.environment($0) }.first ?? ""
            return locale.lowercased().contains("utf-8") || locale.lowercased().contains("utf8")
        }
    }
}
