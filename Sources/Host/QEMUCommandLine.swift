import Platform

/// The user's QEMU command line, made Quire's: guest RAM on memory files that the supervisor created, and the control
/// disk by which the guest reaches its backend.
///
/// Everything else is left as it was written, in its order. What cannot work with recycled pages is refused, with one
/// line that says why and what to do; what only QEMU can judge is left to QEMU.
///
/// RAM is what `-machine memory-backend=`, `-numa node,memdev=` and the `memdev=` of a DIMM or a virtio-mem device name;
/// without any of the first two, a single backend of `-m`'s size is added. Other backends (NVDIMMs, ivshmem, SGX) are not RAM that a
/// guest frees, and stay untouched. QEMU merges several -machine options and ignores the order of objects and machine
/// (checked with 7.2), so additions go to the end.
public struct QEMUCommandLine: Sendable, Equatable {
    /// A memory file to create, in the order of the descriptors that `arguments(ramDescriptors:)` takes.
    public struct RAMFile: Sendable, Equatable {
        /// The id of QEMU's memory backend.
        public let id: String
        /// A multiple of the page size.
        public let byteCount: UInt64
        public init(id: String, byteCount: UInt64) {
            self.id = id
            self.byteCount = byteCount
        }
    }

    public struct Version: Sendable, Equatable, Comparable {
        public let major: Int
        public let minor: Int
        public init(_ major: Int, _ minor: Int) {
            self.major = major
            self.minor = minor
        }
        public static func < (a: Version, b: Version) -> Bool { (a.major, a.minor) < (b.major, b.minor) }

        /// From the first line of `qemu-system-x86_64 --version`; nil if that is something else.
        public init?(versionOutput text: String) {
            guard let range = text.firstRange(of: "version ") else { return nil }
            let numbers = text[range.upperBound...].prefix { $0.isASCIIDigit || $0 == "." }.split(separator: ".")
            guard numbers.count >= 2, let major = Int(numbers[0]), let minor = Int(numbers[1]) else { return nil }
            self.init(major, minor)
        }
    }

    /// What the rewriting asks the world, so that tests can answer.
    public struct Environment: Sendable {
        public var isOnHugetlbfs: @Sendable (String) -> Bool
        /// The text of a -readconfig file; nil if it cannot be read.
        public var readFile: @Sendable (String) -> String?
        public init(
            isOnHugetlbfs: @escaping @Sendable (String) -> Bool, readFile: @escaping @Sendable (String) -> String?
        ) {
            self.isOnHugetlbfs = isOnHugetlbfs
            self.readFile = readFile
        }
        public static let host = Environment(
            isOnHugetlbfs: Files.isOnHugetlbfs, readFile: { try? Files.read($0) })
    }

    public let ramFiles: [RAMFile]
    /// The sum of the files.
    public var ramByteCount: UInt64 { ramFiles.reduce(0) { $0 + $1.byteCount } }

    /// QEMU may emulate one CPU at a time: then it makes loads and stores of the guest's atomic operations, which nobody
    /// else in its process could notice (accel/tcg: CF_PARALLEL is set for several threads with several CPUs).
    public let isSingleThreadedTCG: Bool

    /// The guest's memory comes from elsewhere (-incoming, -loadvm): what else belongs to it has to, too.
    public let bringsMemory: Bool

    private static func bringsMemory(_ options: [Option]) -> Bool {
        options.contains { $0.name == "incoming" || $0.name == "loadvm" }
    }

    /// The same of a QEMU that runs with one of our disks; nil: that can't be told of this process.
    static func bringsMemory(process: Int32) -> Bool? {
        // What has no disk of ours on its command line is no QEMU, or not yet or no longer one.
        guard let text = try? Files.read("/proc/\(process)/cmdline", limit: 1 << 22), text.contains("vhost-user-blk") else { return nil }
        return bringsMemory(options(text.split(separator: "\0", omittingEmptySubsequences: false).map(String.init)))
    }

    /// A disk that the backend serves besides the control disk.
    public struct Disk: Sendable, Equatable {
        /// Of its chardev; its device's has `-disk` behind it.
        public let id: String
        /// Where the backend listens for it.
        public let socket: String
        public let queueCount: Int
        public init(id: String, socket: String, queueCount: Int = 1) {
            self.id = id
            self.socket = socket
            self.queueCount = queueCount
        }
    }
    public static let maxDisks = 7

    private enum Word: Sendable, Equatable {
        case text(String)
        /// An argument with RAM file `index`'s path in it.
        case ram(String, index: Int)
    }
    private let words: [Word]

    /// The ids of what is added.
    public static let ramID = "quire-ram"
    public static let controlID = "quire-control"
    public static let controlDiskID = "quire-control-disk"
    public static let portID = "quire-port"
    public static let swapID = "quire-swap"
    public static func sharedID(_ number: Int) -> String { "quire-shared-\(number)" }
    private static func isOurs(_ id: String) -> Bool {
        [controlID, controlDiskID, portID].contains(id) || id.hasPrefix(swapID) || id.hasPrefix("quire-shared-")
    }

    /// Stands for a descriptor's number in an argument; no user's argument can have it, since argv ends at zeros.
    private static let mark = "\u{1}quire-fd\u{1}"

    /// QEMU's arguments with the files' descriptors in their places.
    public func arguments(ramDescriptors: [Int32]) -> [String] {
        precondition(ramDescriptors.count == ramFiles.count)
        return words.map { word in
            switch word {
            case .text(let text): text
            case .ram(let text, let index): text.replacing(Self.mark, with: "\(ramDescriptors[index])")
            }
        }
    }

    /// QEMU's options that take no argument, 7.2 to 10; every other one takes one.
    private static let withoutArgument: Set<String> = [
        "h", "help", "version", "audio-help", "snapshot", "usb", "nographic", "portrait", "full-screen", "no-frame",
        "win2k-hack", "no-fd-bootchk", "no-acpi", "no-hpet", "mem-prealloc", "singlestep", "one-insn-per-tb",
        "preconfig", "S", "s", "enable-kvm", "xen-attach", "xen-domid-restrict", "xen-create", "no-reboot",
        "no-shutdown", "daemonize", "only-migratable", "nodefaults", "no-user-config", "nodefconfig",
        "async-teardown", "enable-sync-profile", "enable-fips", "semihosting", "old-param", "no-quit", "alt-grab",
        "ctrl-grab", "curses", "sdl", "perfmap", "jitdump", "virtfs_synth", "no-kvm", "no-kvm-irqchip", "no-kvm-pit",
        "no-kvm-pit-reinjection", "igd-passthru", "prom-env-help",
    ]

    struct Option {
        let name: String
        /// Where its argument stands in argv; nil if it has none.
        let at: Int?
        let value: String
    }

    /// - Parameters:
    ///   - arguments: argv, with QEMU's program in front.
    ///   - controlSocket: where the backend listens.
    ///   - disks: at most `maxDisks`.
    ///   - version: of that QEMU; nil counts as an old one.
    public init(
        _ arguments: [String], controlSocket: String, disks: [Disk] = [], version: Version?, environment: Environment = .host
    ) throws(QuireError) {
        guard let program = arguments.first else {
            throw QuireError(.invalid, "no QEMU command: put it behind --, as in: quire run -- qemu-system-x86_64 -m 2G …")
        }
        let file = String(program.split(separator: "/").last ?? "")
        if file.hasPrefix("qemu-system-"), !file.hasPrefix("qemu-system-x86_64"), !file.hasPrefix("qemu-system-i386") {
            throw QuireError(.unsupported, "\(file) is not for x86-64 guests, which are all that Quire knows: use qemu-system-x86_64")
        }

        let options = Self.options(arguments)
        try Self.refuseWhatCannotWork(options, environment)

        // The machine: all -machine and -M options together, the last value of each key.
        var machine = QEMUMachine()
        for option in options where option.name == "machine" || option.name == "M" {
            machine.merge(try QEMUOptions(option.value, implied: "type"))
        }
        for key in ["memory-encryption", "confidential-guest-support"] where machine[key] != nil {
            throw QuireError(
                .unsupported, "-machine \(key)= encrypts guest RAM, so that the host cannot take pages back: remove it or run QEMU without quire")
        }
        bringsMemory = Self.bringsMemory(options)
        isSingleThreadedTCG = try Self.isSingleThreadedTCG(options, machine["accel"])
        let layout = try Self.memory(options, machine)
        var words = arguments.map(Word.text)
        var files: [RAMFile] = []

        // Backends that the user named: onto our files.
        for (id, user) in layout.named {
            guard let backend = layout.backends[id] else {
                throw QuireError(.invalid, "\(user) names the memory backend '\(id)', but there is no -object with that id: add it or remove the name")
            }
            let size = try Self.check(backend.options, id: id, environment)
            words[backend.at] = .ram(Self.onFile(backend.options), index: files.count)
            files.append(RAMFile(id: id, byteCount: Self.roundUp(size, to: 4096)))
        }
        try layout.checkSum(sizes: Dictionary(files.map { ($0.id, $0.byteCount) }, uniquingKeysWith: { a, _ in a }))

        if !layout.hasMainMemory {
            guard layout.backends[Self.ramID] == nil else {
                throw QuireError(.invalid, "the id \(Self.ramID) is Quire's own: give your -object another id")
            }
            // Aligned for transparent huge pages, which a host may allow shared memory: QEMU aligns only private memory by itself.
            let object = "memory-backend-file,id=\(Self.ramID),size=\(layout.ramBytes),mem-path=/proc/self/fd/\(Self.mark),share=on,align=2M"
            words += [.text("-object"), .ram(object, index: files.count)]
            words += [.text("-machine"), .text("memory-backend=\(Self.ramID)")]
            files.append(RAMFile(id: Self.ramID, byteCount: Self.roundUp(layout.ramBytes, to: 4096)))
        }

        let reconnect = version.map { $0 >= Version(9, 2) } == true ? "reconnect-ms=100" : "reconnect=1"
        let path = QEMUOptions.escape(controlSocket)
        words += [.text("-chardev"), .text("socket,id=\(Self.controlID),path=\(path),\(reconnect)")]
        for disk in disks {
            let path = QEMUOptions.escape(disk.socket)
            words += [.text("-chardev"), .text("socket,id=\(disk.id),path=\(path),\(reconnect)")]
        }
        words += try Self.ownDisks(machine: machine.type, disks, options).map(Word.text)

        self.words = words
        ramFiles = files
    }

    /// `-name`'s guest name, if there is one.
    public static func guestName(_ arguments: [String]) -> String? {
        var name: String?
        for option in options(arguments) where option.name == "name" {
            name = (try? QEMUOptions(option.value, implied: "guest"))?["guest"] ?? name
        }
        return name
    }

    private static func roundUp(_ value: UInt64, to unit: UInt64) -> UInt64 { (value + unit - 1) / unit * unit }

    /// Options and their arguments. What does not start with `-` is a disk image, as for QEMU.
    static func options(_ arguments: [String]) -> [Option] {
        var options: [Option] = []
        var index = 1
        while index < arguments.count {
            let word = arguments[index]
            index += 1
            guard word.hasPrefix("-"), word.count > 1 else { continue }
            let name = String(word.hasPrefix("--") ? word.dropFirst(2) : word.dropFirst())
            if withoutArgument.contains(name) || index == arguments.count {
                options.append(Option(name: name, at: nil, value: ""))
            } else {
                options.append(Option(name: name, at: index, value: arguments[index]))
                index += 1
            }
        }
        return options
    }

    private static func isSingleThreadedTCG(_ options: [Option], _ machine: String?) throws(QuireError) -> Bool {
        // In the order in which QEMU tries them; without any it emulates.
        var accelerators = machine?.split(separator: ":").map(String.init) ?? []
        var isSingle = false
        var processors: UInt64 = 1
        for option in options {
            switch option.name {
            case "enable-kvm": accelerators.append("kvm")
            case "accel":
                let parsed = try QEMUOptions(option.value, implied: "accel")
                accelerators.append(parsed["accel"] ?? "")
                if parsed["thread"] == "single" { isSingle = true }
            case "icount": isSingle = true
            case "smp":
                let parsed = try QEMUOptions(option.value, implied: "cpus")
                let product = ["sockets", "dies", "clusters", "cores", "threads"].reduce(UInt64(1)) {
                    $0 * max(1, parsed[$1].flatMap { UInt64($0) } ?? 1)
                }
                processors = (parsed["maxcpus"] ?? parsed["cpus"]).flatMap { UInt64($0) } ?? product
            default: break
            }
        }
        let mayEmulate = accelerators.isEmpty || accelerators.contains { $0.hasPrefix("tcg") }
        return mayEmulate && (isSingle || processors < 2)
    }

    // MARK: What is refused

    private static func refuseWhatCannotWork(_ options: [Option], _ environment: Environment) throws(QuireError) {
        for option in options {
            switch option.name {
            case "mem-path":
                throw QuireError(
                    .unsupported, "-mem-path takes guest RAM away from Quire (and huge pages cannot be given back one by one): remove it")
            case "mem-prealloc":
                throw QuireError(
                    .unsupported, "-mem-prealloc fills all guest RAM at once, which Quire would only have to free again: remove it")
            case "overcommit":
                if try QEMUOptions(option.value, implied: nil).isOn("mem-lock") {
                    throw QuireError(
                        .unsupported, "-overcommit mem-lock=on locks guest RAM, so that no page can be given back: remove mem-lock=on")
                }
            case "realtime":
                if try !QEMUOptions(option.value, implied: nil).isOff("mlock") {
                    throw QuireError(
                        .unsupported, "-realtime mlock=on locks guest RAM, so that no page can be given back: remove it")
                }
            case "daemonize":
                throw QuireError(
                    .unsupported, "-daemonize takes QEMU away from its supervisor: remove it and run quire itself in the background")
            case "device":
                let device = try QEMUOptions(option.value, implied: "driver")
                guard let driver = device["driver"] else { continue }
                if driver.hasPrefix("vfio-") || driver.hasPrefix("vhost-vdpa-") {
                    throw QuireError(
                        .unsupported, "-device \(driver) pins guest RAM for DMA, so that recycled pages would be lost to the device: remove it or run QEMU without quire")
                }
                if let id = device["id"], isOurs(id) {
                    throw QuireError(.invalid, "the id \(id) is Quire's own: give your -device another id")
                }
            case "netdev", "nic":
                let net = try QEMUOptions(option.value, implied: "type")
                if net["type"] == "vhost-vdpa" {
                    throw QuireError(
                        .unsupported, "-\(option.name) vhost-vdpa pins guest RAM for DMA, so that recycled pages would be lost to the device: use another network or run QEMU without quire")
                }
            case "chardev":
                if let id = try QEMUOptions(option.value, implied: "backend")["id"], isOurs(id) {
                    throw QuireError(.invalid, "the id \(id) is Quire's own: give your -chardev another id")
                }
            case "readconfig":
                guard let text = environment.readFile(option.value) else { continue }
                if let section = configuredMemory(text) {
                    throw QuireError(
                        .unsupported, "-readconfig \(option.value) has \(section), which quire does not read: move that to the command line")
                }
            default: continue
            }
        }
    }

    /// The part of a -readconfig file that decides about RAM, if there is one.
    private static func configuredMemory(_ text: String) -> String? {
        for line in text.split(whereSeparator: \.isNewline) {
            let line = line.drop(while: \.isWhitespace)
            if line.hasPrefix("#") { continue }
            for section in ["[memory]", "[numa]", "[numa ", "[realtime]", "[overcommit]"] where line.hasPrefix(section) {
                return "a section \(section.hasSuffix(" ") ? section.dropLast() + "]" : section)"
            }
            for word in ["memory-backend", "memory-encryption", "confidential-guest", "\"vfio-"] where line.contains(word) {
                return "'\(line)'"
            }
        }
        return nil
    }

    // MARK: Memory

    /// -machine, merged.
    private struct QEMUMachine {
        private var values: [String: String] = [:]
        mutating func merge(_ options: QEMUOptions) {
            for item in options.items { values[item.key] = item.value }
        }
        subscript(key: String) -> String? { values[key] }
        var type: String { values["type"] ?? "pc" }
    }

    private struct Layout {
        struct Backend {
            let at: Int
            let options: QEMUOptions
        }
        var backends: [String: Backend] = [:]
        /// Backends that are RAM, in order, and the option that says so.
        var named: [(id: String, user: String)] = []
        var machineBackend: String?
        var nodeBackends: [String] = []
        /// Of -m, rounded as QEMU does; QEMU's default without -m.
        var ramBytes: UInt64 = 128 << 20
        /// As the user wrote it, if he did.
        var ramText: String?

        var hasMainMemory: Bool { machineBackend != nil || !nodeBackends.isEmpty }

        func checkSum(sizes: [String: UInt64]) throws(QuireError) {
            let said = ramText ?? "QEMU's default of 128M"
            if let id = machineBackend {
                // Without -m QEMU takes the size of the backend.
                guard let size = sizes[id], ramText != nil, size != ramBytes else { return }
                throw QuireError(
                    .invalid, "\(said) and the memory backend '\(id)' of \(Size.exact(size)) differ: give both the same size")
            } else if !nodeBackends.isEmpty {
                let sum = nodeBackends.reduce(UInt64(0)) { $0 + (sizes[$1] ?? 0) }
                guard sum != ramBytes else { return }
                throw QuireError(
                    .invalid, "\(said) and the sum of the NUMA nodes' memory, \(Size.exact(sum)), differ: use -m \(sum % 1024 == 0 ? Size.exact(sum) : "\(sum)b")")
            }
        }
    }

    /// Devices whose backend is RAM.
    private static let memoryDevices: Set<String> = ["pc-dimm", "virtio-mem-pci", "virtio-mem"]

    private static func memory(_ options: [Option], _ machine: QEMUMachine) throws(QuireError) -> Layout {
        var layout = Layout()
        if let id = machine["memory-backend"] {
            layout.machineBackend = id
            layout.named.append((id, "-machine memory-backend="))
        }
        if let text = machine["memory.size"] {
            guard let bytes = Size.parse(text) else { throw badSize("-machine memory.size=\(text)") }
            layout.ramBytes = roundUp(bytes, to: 8192)
            layout.ramText = "-machine memory.size=\(text)"
        }
        func name(_ id: String, _ user: String) throws(QuireError) {
            if let other = layout.named.first(where: { $0.id == id }) {
                throw QuireError(
                    .invalid, "the memory backend '\(id)' is used twice, by \(other.user) and \(user): give each its own")
            }
            layout.named.append((id, user))
        }
        for option in options {
            switch option.name {
            case "m":
                guard let text = try QEMUOptions(option.value, implied: "size")["size"] else { continue }
                // QEMU reads it as bytes first, which refuses a fraction without a unit, then takes it for MiB.
                guard !text.isEmpty, Size.parse(text) != nil,
                    let bytes = Size.parse(text.last!.isASCIIDigit ? text + "M" : text), bytes < 1 << 52
                else { throw badSize("-m \(text)") }
                layout.ramBytes = bytes == 0 ? 128 << 20 : roundUp(bytes, to: 8192)
                layout.ramText = "-m \(text)"
            case "object":
                guard let at = option.at else { continue }
                let object = try QEMUOptions(option.value, implied: "qom-type")
                guard let type = object["qom-type"], type.hasPrefix("memory-backend-"), let id = object["id"] else { continue }
                layout.backends[id] = Layout.Backend(at: at, options: object)
            case "numa":
                let numa = try QEMUOptions(option.value, implied: "type")
                guard numa["type"] == "node", let id = numa["memdev"] else { continue }
                try name(id, "-numa node,memdev=")
                layout.nodeBackends.append(id)
            case "device":
                let device = try QEMUOptions(option.value, implied: "driver")
                guard let driver = device["driver"], memoryDevices.contains(driver), let id = device["memdev"] else { continue }
                try name(id, "-device \(driver),memdev=")
            default: continue
            }
        }
        return layout
    }

    private static func badSize(_ text: String) -> QuireError {
        QuireError(.invalid, "\(text) is no size that QEMU takes: write a number and one of K M G T, as in -m 2G")
    }

    /// Refuses a backend that cannot be put on our file; returns its size in bytes.
    private static func check(_ object: QEMUOptions, id: String, _ environment: Environment) throws(QuireError) -> UInt64 {
        let type = object["qom-type"] ?? ""
        func refuse(_ why: String) -> QuireError { QuireError(.unsupported, "the memory backend '\(id)' \(why)") }
        guard ["memory-backend-ram", "memory-backend-memfd", "memory-backend-file", "memory-backend-shm"].contains(type) else {
            throw refuse("is a \(type), which quire cannot replace: use memory-backend-memfd")
        }
        if object.isOn("hugetlb") || object["hugetlbsize"] != nil {
            throw refuse("uses huge pages, which cannot be given back one by one: remove hugetlb and hugetlbsize")
        }
        if let path = object["mem-path"], environment.isOnHugetlbfs(path) {
            throw refuse("is on hugetlbfs (\(path)), whose huge pages cannot be given back one by one: use memory-backend-memfd")
        }
        if object.isOn("prealloc") {
            throw refuse("has prealloc=on, which fills all guest RAM at once, only for Quire to free it again: remove it")
        }
        if object.isOff("share") {
            throw refuse("has share=off, but Quire needs guest RAM that QEMU shares with its backend: remove share=off")
        }
        for key in ["pmem", "readonly", "rom"] where object.isOn(key) {
            throw refuse("has \(key)=on, which is not for RAM that is given back: remove it")
        }
        guard let text = object["size"] else { throw refuse("has no size: add size=") }
        guard let size = Size.parse(text), size > 0, size < 1 << 52 else {
            throw refuse("has size=\(text), which is no size that QEMU takes: write a number and one of K M G T")
        }
        return size
    }

    /// The same backend as a memory-backend-file on our descriptor.
    private static func onFile(_ object: QEMUOptions) -> String {
        var object = object
        // What other types know and a file does not, or what speaks of the user's own file.
        for key in ["hugetlb", "hugetlbsize", "seal", "pmem", "readonly", "rom", "discard-data", "offset"] {
            object.remove(key)
        }
        object.setImplied("qom-type", "memory-backend-file")
        object.remove("mem-path")
        object.set("mem-path", "/proc/self/fd/" + mark)
        object.set("share", "on", boolean: true)
        // JSON writes the mark's control characters escaped.
        return object.text.replacing("\\u0001quire-fd\\u0001", with: mark)
    }

    // MARK: Disks of ours

    /// The control disk, and the others right behind it, where they come after every disk of the user's: guests name disks in the order in which they
    /// find them, and firmware must not meet it first (its 4 KiB blocks are none that SeaBIOS boots from anyway).
    ///
    /// pc and q35: guests look at the slots of the first bus in order, and QEMU fills free slots from below (`-drive
    /// if=virtio` too, which it creates after every -device), so the highest free slot. Buses behind bridges come after
    /// the whole first bus, in the order of the bridges: with bridges, a bridge of our own in that slot.
    /// The others are further functions of the same slot.
    /// microvm: transports are found from the highest down, which is also how QEMU fills them: so the lowest.
    private static func ownDisks(machine: String, _ disks: [Disk], _ options: [Option]) throws(QuireError) -> [String] {
        var devices: [QEMUOptions] = []
        for option in options where option.name == "device" {
            devices.append(try QEMUOptions(option.value, implied: "driver"))
        }
        let tail = "chardev=\(controlID),num-queues=1,id=\(controlDiskID)"
        let others = disks.map { "chardev=\($0.id),num-queues=\($0.queueCount),id=\($0.id)-disk" }
        guard others.count <= maxDisks else {
            throw QuireError(.invalid, "there is room for \(maxDisks) disks of Quire's: give fewer --shared-disk")
        }
        // `place`: of a PCI device, without its function.
        func together(_ place: String) -> [String] {
            if others.isEmpty { return ["-device", "vhost-user-blk-pci,\(tail),\(place)"] }
            return ["-device", "vhost-user-blk-pci,\(tail),\(place).0,multifunction=on"]
                + others.enumerated().flatMap { ["-device", "vhost-user-blk-pci,\($1),\(place).\($0 + 1)"] }
        }
        switch machine {
        case "isapc", "none":
            throw QuireError(
                .unsupported, "-machine \(machine) has no bus for Quire's control disk: use pc, q35 or microvm")
        case "microvm":
            let taken = Set(devices.compactMap { $0["bus"] })
            // 8 transports, or 24 with a second I/O APIC.
            let free = (0..<8).map { "virtio-mmio-bus.\($0)" }.filter { !taken.contains($0) }
            guard free.count > others.count else {
                let count = others.isEmpty ? "one" : "\(others.count + 1)"
                throw QuireError(
                    .invalid, "there is no virtio-mmio bus left for Quire's disks: leave \(count) of virtio-mmio-bus.0 to .7 free")
            }
            return zip([tail] + others, free[...others.count].reversed()).flatMap { ["-device", "vhost-user-blk,\($0),bus=\($1)"] }
        default:
            break
        }
        let isQ35 = machine.contains("q35")
        // q35's own: 1f is the LPC bridge, 1d and 1a are USB (-usb), 1b is sound.
        let allowed = isQ35 ? [0x1e, 0x1c, 0x19, 0x18, 0x17] : [0x1f, 0x1e, 0x1d, 0x1c, 0x1b]
        var taken: Set<Int> = []
        for option in options where ["device", "nic", "net"].contains(option.name) {
            guard let addr = try QEMUOptions(option.value, implied: "driver")["addr"] else { continue }
            if let slot = Int(addr.prefix { $0 != "." }.replacing("0x", with: ""), radix: 16) { taken.insert(slot) }
        }
        guard let slot = allowed.first(where: { !taken.contains($0) }) else {
            let list = allowed.map { String($0, radix: 16) }.joined(separator: " ")
            throw QuireError(.invalid, "there is no PCI slot left for Quire's control disk: leave one of \(list) free")
        }
        let addr = String(slot, radix: 16)
        let bridges = ["pcie-root-port", "ioh3420", "pci-bridge", "pcie-pci-bridge", "i82801b11-bridge", "x3130-upstream"]
        let hasBridge = devices.contains { bridges.contains($0["driver"] ?? "") }
        guard isQ35 || machine.hasPrefix("pc") else {
            // A machine that we do not know: QEMU finds its PCI bus, or says that it has none.
            return together("addr=\(addr)")
        }
        let root = isQ35 ? "pcie.0" : "pci.0"
        guard hasBridge else { return together("bus=\(root),addr=\(addr)") }
        let bridge = isQ35
            ? "pcie-root-port,id=\(portID),bus=\(root),addr=\(addr),chassis=250,slot=250,hotplug=off"
            : "pci-bridge,id=\(portID),bus=\(root),addr=\(addr),chassis_nr=250,shpc=off"
        // With hotplug off, slot 0 of a pci-bridge without SHPC is usable as well; 1 is always.
        return ["-device", bridge] + together("bus=\(portID),addr=\(isQ35 ? "0" : "1")")
    }
}
