import FoundationEssentials
import Platform

func decodeJSON<T: Decodable>(_ text: String) throws -> T { try JSONDecoder().decode(T.self, from: Data(text.utf8)) }

/// Any JSON value.
enum JSON: Codable, Equatable {
    case null, bool(Bool), number(Double), string(String), array([JSON]), object([String: JSON])

    init(from decoder: any Decoder) throws {
        let value = try decoder.singleValueContainer()
        if value.decodeNil() { self = .null }
        else if let x = try? value.decode(Bool.self) { self = .bool(x) }
        else if let x = try? value.decode(Double.self) { self = .number(x) }
        else if let x = try? value.decode(String.self) { self = .string(x) }
        else if let x = try? value.decode([JSON].self) { self = .array(x) }
        else { self = .object(try value.decode([String: JSON].self)) }
    }

    func encode(to encoder: any Encoder) throws {
        var value = encoder.singleValueContainer()
        switch self {
        case .null: try value.encodeNil()
        case .bool(let x): try value.encode(x)
        case .number(let x): if let whole = Int64(exactly: x) { try value.encode(whole) } else { try value.encode(x) }
        case .string(let x): try value.encode(x)
        case .array(let x): try value.encode(x)
        case .object(let x): try value.encode(x)
        }
    }

    subscript(key: String) -> JSON? {
        if case .object(let values) = self { return values[key] }
        return nil
    }
    var text: String? {
        if case .string(let x) = self { return x }
        return nil
    }
}

/// QEMU's monitor, over a Unix socket. Events are skipped: tests look at the state that they announce.
final class QMP {
    private let socket: UnixSocket
    private var buffer: [UInt8] = []

    /// Waits for QEMU to listen, as long as `isAlive`.
    init(path: String, isAlive: () -> Bool) throws {
        var connection: UnixSocket?
        let deadline = monotonicNanoseconds() + UInt64(Effort.patience * 1e9)
        while true {
            do {
                connection = try UnixSocket.connect(to: path)
                break
            } catch {
                if monotonicNanoseconds() > deadline || !isAlive() { throw error }
                ProcessCalls.sleep(milliseconds: 20)
            }
        }
        socket = connection.take()!
        _ = try receive(within: Effort.patience)
        try command("qmp_capabilities")
    }

    private func receive(within seconds: Double) throws -> JSON {
        let deadline = monotonicNanoseconds() + UInt64(seconds * 1e9)
        while true {
            if let end = buffer.firstIndex(of: UInt8(ascii: "\n")) {
                let line = Data(buffer[..<end])
                buffer.removeSubrange(...end)
                return try JSONDecoder().decode(JSON.self, from: line)
            }
            guard monotonicNanoseconds() < deadline else { throw Trouble("QMP does not answer") }
            guard !waitReadable([socket.descriptor.raw], timeoutMilliseconds: 200).isEmpty else { continue }
            let chunk = try readSome(socket.descriptor.raw)
            guard !chunk.isEmpty else { throw Trouble("QMP's connection has ended") }
            buffer += chunk
        }
    }

    /// Executes a command; throws QEMU's words if it refuses.
    @discardableResult
    func command(_ name: String, _ arguments: [String: JSON] = [:], within seconds: Double = Effort.patience) throws -> JSON {
        var message: [String: JSON] = ["execute": .string(name)]
        if !arguments.isEmpty { message["arguments"] = .object(arguments) }
        try socket.send(Array(try JSONEncoder().encode(JSON.object(message))) + [UInt8(ascii: "\n")])
        while true {
            let answer = try receive(within: seconds)
            if let value = answer["return"] { return value }
            if let error = answer["error"] { throw Trouble("QMP \(name): \(error["desc"]?.text ?? "\(error)")") }
        }
    }

    /// A command of the human monitor; what it says is its error.
    func human(_ line: String, within seconds: Double = Effort.patience) throws {
        let answer = try command("human-monitor-command", ["command-line": .string(line)], within: seconds).text ?? ""
        guard answer.allSatisfy(\.isWhitespace) else { throw Trouble("\(line): \(answer)") }
    }
}
