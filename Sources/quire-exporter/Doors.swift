import Glibc
import NIOCore
import Platform

/// Where the exporter listens: on a TCP port, on a Unix socket, or on both.
///
/// Each has rules of its own from its first connection on, so that a port which a reload opens to the network never answers by those
/// of the port on loopback before it.
struct Doors {
    struct Wanted: Sendable {
        /// As it was given, and what that is; nil: no port.
        var tcp: (name: String, address: SocketAddress)?
        var socketPath: String?
        /// On the port, and on the socket.
        var tcpRules: WebServer.Rules.Values
        var socketRules: WebServer.Rules.Values
    }

    private struct Door {
        /// The address as it was given, or the path.
        let name: String
        let rules: WebServer.Rules
        let listener: WebServer.Listener
    }

    private let server: WebServer
    private var tcp: Door?
    private var socket: Door?

    init(_ server: WebServer) { self.server = server }

    /// Listens where it is wanted, and then no more where it is not. Throws if it cannot; then all is as it was.
    mutating func open(_ wanted: Wanted) throws(QuireError) {
        // What this opened, should the other one fail.
        var newSocket: Door?
        if let path = wanted.socketPath, path != socket?.name { newSocket = try listen(atSocket: path, wanted.socketRules) }
        var newTCP: Door?
        if let (name, address) = wanted.tcp, name != tcp?.name {
            do throws(QuireError) { newTCP = try moveTCP(name, address, wanted.tcpRules) } catch {
                if let newSocket { Self.closeSocket(newSocket) }
                throw error
            }
        }
        if wanted.socketPath == socket?.name { socket?.rules.current = wanted.socketRules } else {
            if let socket { Self.closeSocket(socket) }
            socket = newSocket
        }
        if wanted.tcp?.name == tcp?.name { tcp?.rules.current = wanted.tcpRules } else {
            tcp?.listener.close()
            tcp = newTCP
        }
        if let newTCP { Self.say("http://\(Self.text(newTCP.listener.address))/") }
        if let newSocket { Self.say(newSocket.name) }
    }

    mutating func close() {
        tcp?.listener.close()
        if let socket { Self.closeSocket(socket) }
        (tcp, socket) = (nil, nil)
    }

    /// Two cannot listen on one port, whatever their addresses: where the new one has to be there first, the old one goes, and comes back
    /// if that was in vain.
    private mutating func moveTCP(
        _ name: String, _ address: SocketAddress, _ rules: WebServer.Rules.Values
    ) throws(QuireError) -> Door {
        do throws(QuireError) { return try listen(at: address, name, WebServer.Rules(rules)) } catch {
            guard error.errno == EADDRINUSE, let old = tcp, let bound = old.listener.address, bound.port == address.port else { throw error }
            old.listener.close()
            do throws(QuireError) { return try listen(at: address, name, WebServer.Rules(rules)) } catch {
                do throws(QuireError) { tcp = try listen(at: bound, old.name, old.rules) } catch let second {
                    tcp = nil
                    throw QuireError(.system, "\(error), and no more on \(old.name)", cause: second)
                }
                throw error
            }
        }
    }

    private func listen(at address: SocketAddress, _ name: String, _ rules: WebServer.Rules) throws(QuireError) -> Door {
        do { return Door(name: name, rules: rules, listener: try server.listen(on: .tcp(address), rules)) } catch {
            throw QuireError(.system, "cannot listen on \(name)", errno: (error as? IOError)?.errnoCode)
        }
    }

    private func listen(atSocket path: String, _ values: WebServer.Rules.Values) throws(QuireError) -> Door {
        let socket = try UnixSocket.listen(at: path, backlog: 128)
        do throws(QuireError) {
            // Who may open the socket may read: its group, beside its owner.
            try Files.setAccess(path, mode: 0o660)
            // SwiftNIO closes what it is given.
            let raw = try socket.descriptor.duplicate().release()
            let rules = WebServer.Rules(values)
            do { return Door(name: path, rules: rules, listener: try server.listen(on: .unix(raw), rules)) } catch {
                throw QuireError(.system, "cannot listen on \(path)", errno: (error as? IOError)?.errnoCode)
            }
        } catch {
            Files.remove(path)
            throw error
        }
    }

    private static func closeSocket(_ door: Door) {
        door.listener.close()
        Files.remove(door.name)
    }

    private static func say(_ place: String) { writeStandardError("quire-exporter: listening on \(place)") }

    private static func text(_ address: SocketAddress?) -> String {
        let ip = address?.ipAddress ?? "?"
        return (ip.contains(":") ? "[\(ip)]" : ip) + ":\(address?.port ?? 0)"
    }
}
