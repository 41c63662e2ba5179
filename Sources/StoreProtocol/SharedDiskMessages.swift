import Platform

/// The protocol of shared disks, between a backend and quired: SOCK_SEQPACKET, a socket of its own. All integers are
/// little-endian. Bytes of pages go through a window, a memory file that quired makes for each connection and passes with
/// WELCOME; a request speaks of its first pages.
///
///     HELLO    magic[8] version:u32 0:u32 name[64] group[72] token:u64 vm[64]
///     WELCOME  magic[8] version:u32 0:u32 pages:u64 id:u64              with the window's descriptor
///     REQUEST  op:u32 count:u32 page:u64 number:u64                     one at a time
///     REPLY    status:u32 0:u32 number:u64
///     ERROR    "!" and one line for a person; the connection ends
///
/// Or, in place of all that, one question of an operator's and its answer (`SharedDiskCommand`):
///
///     COMMAND  "?" and words
///     ANSWER   "=" and text, or ERROR
///
/// `id` names the disk's content: another one means that it was lost. `token` names the client, over deaths of it: a new
/// connection with the same one is welcomed when nothing that came on an older one will be done any more. Otherwise a write
/// that was repeated here could be done again, late, over a newer one. `vm` is for people: who has the disk attached. Backends
/// of before it was there leave it out.
public enum SharedDiskMessage {
    public static let magic = Array("QUIREDSK".utf8)
    public static let version: UInt32 = 1
    /// Pages of the window, and so of one PUT or GET.
    public static let windowPages = 64
    public static let pageBytes = 4096
    public static let maxBytes = 512
    public static let nameBytes = 64
    public static let groupBytes = 72

    public enum Operation: UInt32, Sendable {
        case put = 1
        case get = 2
        /// Any number of pages.
        case flush = 3
    }

    public enum Status: UInt32, Sendable {
        case done = 0
        /// Some of the pages of a PUT found no room.
        case noSpace = 1
        /// A page of a GET is not what was put.
        case damaged = 2
    }

    public struct Hello: Sendable, Equatable {
        public var name: String
        /// Empty: the group of the VM's owner.
        public var group: String
        public var token: UInt64
        /// Empty, or a name by the rules of `isStoreName`.
        public var vm: String
        public init(name: String, group: String, token: UInt64, vm: String = "") {
            self.name = name
            self.group = group
            self.token = token
            self.vm = vm
        }

        public func encoded() -> [UInt8] {
            var out = ByteWriter(reserving: 240)
            out.raw(magic)
            out.word32(version)
            out.word32(0)
            out.raw(paddedText(name, capacity: nameBytes))
            out.raw(paddedText(group, capacity: groupBytes))
            out.word64(token)
            out.raw(paddedText(vm, capacity: nameBytes))
            return out.bytes
        }

        public init(_ bytes: [UInt8]) throws(ProtocolViolation) {
            var input = ByteReader(bytes)
            guard try input.bytes(8) == magic else { throw ProtocolViolation("this is no client of shared disks") }
            let theirs = try input.word32()
            guard theirs == version else {
                throw ProtocolViolation(
                    "the backend speaks version \(theirs) of the shared disks' protocol and quired version \(version): install the same release of both")
            }
            _ = try input.word32()
            name = try input.text(nameBytes)
            group = try input.text(groupBytes)
            token = try input.word64()
            vm = input.left == 0 ? "" : try input.text(nameBytes)
            try input.end()
            // It is shown to people, on terminals.
            guard vm.isEmpty || isStoreName(vm) else { throw ProtocolViolation("the name of the VM is none") }
        }
    }

    public struct Welcome: Sendable, Equatable {
        public var pages: UInt64
        public var id: UInt64
        public init(pages: UInt64, id: UInt64) {
            self.pages = pages
            self.id = id
        }

        public func encoded() -> [UInt8] {
            var out = ByteWriter(reserving: 32)
            out.raw(magic)
            out.word32(version)
            out.word32(0)
            out.word64(pages)
            out.word64(id)
            return out.bytes
        }

        public init(_ bytes: [UInt8]) throws(ProtocolViolation) {
            var input = ByteReader(bytes)
            guard try input.bytes(8) == magic, try input.word32() == version else { throw ProtocolViolation("no WELCOME") }
            _ = try input.word32()
            pages = try input.word64()
            id = try input.word64()
            try input.end()
        }
    }

    public struct Request: Sendable, Equatable {
        public var operation: Operation
        public var count: UInt32
        public var page: UInt64
        public var number: UInt64
        public init(_ operation: Operation, page: UInt64, count: UInt32, number: UInt64) {
            self.operation = operation
            self.count = count
            self.page = page
            self.number = number
        }

        public func encoded() -> [UInt8] {
            var out = ByteWriter(reserving: 24)
            out.word32(operation.rawValue)
            out.word32(count)
            out.word64(page)
            out.word64(number)
            return out.bytes
        }

        /// `pages`: of the disk.
        public init(_ bytes: [UInt8], pages: UInt64) throws(ProtocolViolation) {
            var input = ByteReader(bytes)
            let code = try input.word32()
            guard let operation = Operation(rawValue: code) else { throw ProtocolViolation("there is no operation \(code)") }
            self.operation = operation
            count = try input.word32()
            page = try input.word64()
            number = try input.word64()
            try input.end()
            guard count > 0, page < pages, UInt64(count) <= pages - page else {
                throw ProtocolViolation("\(count) pages from \(page) on are beyond the end of the disk")
            }
            guard operation == .flush || count <= windowPages else {
                throw ProtocolViolation("\(count) pages do not fit into the window")
            }
        }
    }

    public struct Reply: Sendable, Equatable {
        public var status: Status
        public var number: UInt64
        public init(_ status: Status, number: UInt64) {
            self.status = status
            self.number = number
        }

        public func encoded() -> [UInt8] {
            var out = ByteWriter(reserving: 16)
            out.word32(status.rawValue)
            out.word32(0)
            out.word64(number)
            return out.bytes
        }

        public init(_ bytes: [UInt8]) throws(ProtocolViolation) {
            var input = ByteReader(bytes)
            guard let status = Status(rawValue: try input.word32()) else { throw ProtocolViolation("no REPLY") }
            self.status = status
            _ = try input.word32()
            number = try input.word64()
            try input.end()
        }
    }

    /// The words of a COMMAND; nil if the message is none.
    public static func command(_ bytes: [UInt8]) -> String? {
        bytes.first == UInt8(ascii: "?") ? String(decoding: bytes.dropFirst(), as: UTF8.self) : nil
    }

    /// The line of an ERROR; nil if the message is none.
    public static func error(_ bytes: [UInt8]) -> String? {
        bytes.first == UInt8(ascii: "!") ? String(decoding: bytes.dropFirst(), as: UTF8.self) : nil
    }
    public static func encodedError(_ text: String) -> [UInt8] { Array(("!" + text).utf8.prefix(maxBytes)) }
}
