import CLibvirt
import Host
import Platform

/// A connection to libvirtd, and what Quire asks of it. Every error is libvirt's own line behind what was tried.
@safe public struct Hypervisor: ~Copyable {
    private let connection: OpaquePointer

    /// `uri`: nil for libvirt's own choice ($LIBVIRT_DEFAULT_URI, qemu:///system for root).
    public init(_ uri: String? = nil) throws(QuireError) {
        guard clv_load() else {
            throw QuireError(.unsupported, "there is no libvirt on this host (\(Self.error)): install libvirt0, or use --xml")
        }
        let opened = if let uri { unsafe clv_open(uri) } else { unsafe clv_open(nil) }
        guard let opened = unsafe opened else { throw QuireError(.closed, "cannot reach libvirt: \(Self.error)") }
        unsafe connection = opened
    }

    /// One for `awaitChange`.
    public static func following(_ uri: String? = nil) throws(QuireError) -> Hypervisor {
        // The loop that events come through has to be there before the connection.
        if clv_load(), clv_use_events() != 0 { throw QuireError(.system, "cannot follow libvirt's events: \(error)") }
        let hypervisor = try Hypervisor(uri)
        guard unsafe clv_follow(hypervisor.connection) == 0 else { throw QuireError(.system, "cannot follow libvirt's events: \(error)") }
        return hypervisor
    }

    /// Waits until a domain has stopped or is undefined, at most so long. Throws when libvirtd has gone.
    public borrowing func awaitChange(milliseconds: Int32) throws(QuireError) {
        guard unsafe clv_await(connection, milliseconds) >= 0 else { throw QuireError(.closed, "libvirtd has gone: waiting for it") }
    }

    deinit { unsafe clv_close(connection) }

    /// One line.
    private static var error: String {
        guard let text = unsafe clv_error() else { return "no reason given" }
        return unsafe String(cString: text).split(separator: "\n").joined(separator: " ")
    }

    /// Takes over a text that C has allocated.
    private static func take(_ text: UnsafeMutablePointer<CChar>) -> String {
        defer { unsafe clv_free_text(text) }
        return unsafe String(cString: text)
    }

    /// The names of all domains, running and defined, sorted; or only of those that have a definition.
    public borrowing func names(defined: Bool = false) throws(QuireError) -> [String] {
        var list: UnsafeMutablePointer<UnsafeMutablePointer<CChar>?>?
        let count = unsafe clv_names(connection, defined, &list)
        return unsafe try Self.take(list, count).sorted()
    }

    /// The UUIDs of all domains that run, or are just started.
    public borrowing func activeUUIDs() throws(QuireError) -> Set<String> {
        var list: UnsafeMutablePointer<UnsafeMutablePointer<CChar>?>?
        let count = unsafe clv_active_uuids(connection, &list)
        return unsafe Set(try Self.take(list, count))
    }

    private static func take(_ list: UnsafeMutablePointer<UnsafeMutablePointer<CChar>?>?, _ count: Int32) throws(QuireError) -> [String] {
        guard count >= 0, let list = unsafe list else { throw QuireError(.closed, "cannot list domains: \(Self.error)") }
        defer { unsafe clv_free_text(list) }
        var texts: [String] = []
        for index in 0..<Int(count) {
            if let text = unsafe list[index] { texts.append(unsafe take(text)) }
        }
        return texts
    }

    /// One domain, as libvirt knows it.
    @safe public struct Handle: ~Copyable {
        fileprivate let domain: OpaquePointer
        public let name: String

        fileprivate init(_ domain: OpaquePointer, _ name: String) {
            unsafe self.domain = domain
            self.name = name
        }
        deinit { unsafe clv_domain_free(domain) }

        public var isActive: Bool { unsafe clv_is_active(domain) == 1 }
        public var isPersistent: Bool { unsafe clv_is_persistent(domain) == 1 }
        public var hasSavedImage: Bool { unsafe clv_has_saved_image(domain) == 1 }

        /// Its definition, passwords included: what is defined again must have all of it.
        public borrowing func definition() throws(QuireError) -> String {
            try xml(UInt32(VIR_DOMAIN_XML_INACTIVE.rawValue | VIR_DOMAIN_XML_SECURE.rawValue))
        }

        /// As it runs.
        public borrowing func live() throws(QuireError) -> String { try xml(0) }

        private borrowing func xml(_ flags: UInt32) throws(QuireError) -> String {
            guard let text = unsafe clv_xml(domain, flags) else {
                throw QuireError(.closed, "cannot read the XML of '\(name)': \(Hypervisor.error)")
            }
            return unsafe Hypervisor.take(text)
        }

        /// Takes a device away from the running domain; the guest has to let it go, so it may be there for a while yet.
        public borrowing func detachLive(_ device: String) throws(QuireError) {
            guard unsafe clv_detach(domain, device, UInt32(VIR_DOMAIN_AFFECT_LIVE.rawValue)) == 0 else {
                throw QuireError(.system, "cannot detach a disk of '\(name)': \(Hypervisor.error)")
            }
        }

        public borrowing func forgetLiveMetadata(_ namespace: String) throws(QuireError) {
            try check(unsafe clv_set_metadata(domain, nil, nil, namespace, UInt32(VIR_DOMAIN_AFFECT_LIVE.rawValue)))
        }

        /// Of the running domain alone. `element`: without a prefix; libvirt gives it this one.
        public borrowing func setLiveMetadata(_ element: String, prefix: String, _ namespace: String) throws(QuireError) {
            try check(unsafe clv_set_metadata(domain, element, prefix, namespace, UInt32(VIR_DOMAIN_AFFECT_LIVE.rawValue)))
        }

        private borrowing func check(_ status: Int32) throws(QuireError) {
            guard status == 0 else { throw QuireError(.system, "cannot change the metadata of '\(name)': \(Hypervisor.error)") }
        }
    }

    public borrowing func domain(_ name: String) throws(QuireError) -> Handle {
        guard let found = unsafe clv_domain(connection, name) else {
            throw QuireError(.invalid, "there is no domain '\(name)' (\(Self.error)): virsh list --all shows them")
        }
        return unsafe Handle(found, name)
    }

    public borrowing func define(_ xml: XMLText) throws(QuireError) {
        guard unsafe clv_define(connection, xml.text) == 0 else {
            throw QuireError(.system, "libvirt does not take the changed domain: \(Self.error)")
        }
    }
}

extension Hypervisor {
    /// What came of a change.
    public struct Outcome: Sendable {
        /// Of the definition, before and after.
        public let before: Domain
        public let after: Domain
        public var hasChanged: Bool { before.xml.bytes != after.xml.bytes }
        /// It runs, or has a saved image, with what was there before.
        public let isActive: Bool
        public let hasSavedImage: Bool
    }

    private borrowing func definition(of handle: borrowing Handle) throws(QuireError) -> Domain {
        guard handle.isPersistent else {
            throw QuireError(
                .unsupported, "domain '\(handle.name)' is transient, it has no definition that could be changed: use --xml where it is made")
        }
        return try Domain(handle.definition())
    }

    /// Enables a domain's definition, or changes what it asks for. With `dryRun` nothing is changed.
    public borrowing func enable(
        _ name: String, _ changes: Domain.Changes, dryRun: Bool = false
    ) throws(QuireError) -> Outcome {
        let handle = try domain(name)
        let before = try definition(of: handle)
        let wanted = try Domain(before.enabled(before.request(changes)))
        var after = wanted
        if wanted.xml.bytes != before.xml.bytes, !dryRun {
            try define(wanted.xml)
            do throws(QuireError) {
                after = try definition(of: handle)
                // What our disks made libvirt add is ours as well.
                let made = after.pciControllers.subtracting(before.pciControllers).union(before.mark?.controllers ?? [])
                if let noted = try after.noting(controllers: made.sorted()) {
                    try define(noted)
                    after = try definition(of: handle)
                }
            } catch {
                do throws(QuireError) { try define(before.xml) } catch let again {
                    throw QuireError(.system, "\(error); and its definition could not be put back (\(again.description)): quire libvirt disable \(name)")
                }
                throw error
            }
        }
        return Outcome(before: before, after: after, isActive: handle.isActive, hasSavedImage: handle.hasSavedImage)
    }

    /// Notes in a domain that has just started what its shared disks have: that goes into every saved image of it. An id never comes back,
    /// so the note can say too little, never too much. The definition stays as it is.
    public borrowing func rememberDisks(of name: String, in directory: RuntimeDirectory, tries: Int = 30) throws(QuireError) {
        let handle = try domain(name)
        for left in (0..<tries).reversed() where handle.isActive {
            do throws(QuireError) {
                let live = try Domain(handle.live())
                guard var mark = live.mark, let settings = try? BackendService.Settings.read(directory.settingsPath(mark.name)),
                    settings.owner == live.uuid, let disks = settings.sharedDisks, mark.sharedDisks != disks
                else { return }
                mark.sharedDisks = disks
                return try handle.setLiveMetadata(mark.plainElement, prefix: Mark.prefix, Mark.namespace)
            } catch {
                // Its start, or somebody else's change, may not be over yet.
                guard left > 0 else { throw error }
                ProcessCalls.sleep(milliseconds: 1000)
            }
        }
    }

    public borrowing func disable(_ name: String, dryRun: Bool = false) throws(QuireError) -> Outcome {
        let handle = try domain(name)
        let before = try definition(of: handle)
        let after = try Domain(before.disabled())
        if before.xml.bytes != after.xml.bytes, !dryRun { try define(after.xml) }
        return Outcome(before: before, after: after, isActive: handle.isActive, hasSavedImage: handle.hasSavedImage)
    }
}
