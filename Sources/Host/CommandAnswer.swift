import Platform

/// What a command did to one VM, domain or program. With --json every command that changes something prints an array of these; the
/// names below are the interface.
public struct CommandAnswer: Sendable, Equatable, Encodable {
    /// `unchanged`: it was as it should be. `planned`: --dry-run, it would be done. `failed`: `error` says why.
    public enum Result: String, Sendable, Encodable { case done, unchanged, planned, failed }
    /// When a change of a domain's definition holds. `savedImage`: not before its saved image, which starts it as it was, is gone.
    public enum Effect: String, Sendable, Encodable {
        case nextStart = "next-start"
        case powerCycle = "power-cycle"
        case savedImage = "saved-image"
    }

    /// As the command names it. Empty: it failed before there was one.
    public var name: String
    /// The words behind `quire`.
    public var command: String
    public var result = Result.done
    /// For people, a line each.
    public var notes: [String] = []
    /// The line on stderr; empty if there is none.
    public var error = ""

    // Where there is something to say.
    public var takesEffect: Effect?
    /// --dry-run: of the definition.
    public var difference: String?
    /// Given back to the host.
    public var bytes: UInt64?
    /// Saved or restored.
    public var pages: UInt64?

    enum CodingKeys: String, CodingKey {
        case name, command, result, notes, error, difference, bytes, pages
        case takesEffect = "takes_effect"
    }

    public init(_ command: String, _ name: String) {
        self.command = command
        self.name = name
    }

    public mutating func fail(_ error: QuireError) {
        result = .failed
        self.error = "\(error)"
    }
}
