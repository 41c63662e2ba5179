import CPlatform
import FoundationEssentials
import Glibc
import Platform
import StoreProtocol

/// What `quire doctor` finds: whether this host can do what Quire asks of it, and what to type where it can't.
public struct HostCheck: Sendable {
    public struct Finding: Sendable, Equatable, Codable {
        /// `ok`; `note`: it works, but less well or in part; `problem`: something does not work.
        public enum Level: String, Sendable, Codable { case ok, note, problem }
        /// A name for programs.
        public var id: String
        public var level: Level
        /// What was found, one line.
        public var text: String
        /// What to type, or to do; empty if nothing.
        public var advice: String
        public init(id: String, level: Level, text: String, advice: String = "") {
            self.id = id
            self.level = level
            self.text = text
            self.advice = advice
        }
    }

    /// Where things are on this host. Tests put a folder in front of every path.
    public struct Places: Sendable {
        public var root = ""
        public var backend: String
        public var agent: String?
        public var store: String
        public init(backend: String, agent: String?, store: String) {
            self.backend = backend
            self.agent = agent
            self.store = store
        }
    }

    private let places: Places
    public init(_ places: Places) { self.places = places }

    public static let mappingLimit = 1_048_576

    public func run() -> [Finding] {
        [userfaultfd(), tracking(), overcommit(), mappings(), kvm(), hugePages(), kernelMerging(), runtime(), backend(), agent(), store(), qemu(), libvirt(), confinement()]
    }

    public static func json(_ findings: [Finding]) -> String { jsonText(findings) }

    private func read(_ path: String) -> String? {
        guard let text = try? Files.read(places.root + path, limit: 65536) else { return nil }
        return String(text.drop(while: \.isWhitespace).reversed().drop(while: \.isWhitespace).reversed())
    }
    private func exists(_ path: String) -> Bool { Files.identity(of: places.root + path) != nil }

    private func finding(_ id: String, _ level: Finding.Level, _ text: String, _ advice: String = "") -> Finding {
        Finding(id: id, level: level, text: text, advice: advice)
    }

    // MARK: The kernel

    /// Of these findings the one that says whether equal pages can be merged for VMs that this process starts.
    public static func merging() -> Finding { HostCheck(Places(backend: "", agent: nil, store: "")).userfaultfd() }

    private func userfaultfd() -> Finding {
        var features: UInt64 = 0
        let error = unsafe cp_userfault_features(&features)
        switch error {
        case 0:
            let wanted = UInt64(CP_UFFD_MINOR_SHMEM) | UInt64(CP_UFFD_WP_SHMEM) | UInt64(CP_UFFD_WP_UNPOPULATED)
            guard features & wanted == wanted else {
                return finding("userfaultfd", .problem, "this kernel's userfaultfd cannot hold writers off shared memory: equal pages are not merged", "use Linux 6.4 or later")
            }
            return finding("userfaultfd", .ok, "userfaultfd can be used")
        case ENOSYS:
            return finding("userfaultfd", .problem, "this kernel has no userfaultfd: equal pages are not merged", "use a kernel with CONFIG_USERFAULTFD=y, Linux 6.4 or later")
        default:
            return finding(
                "userfaultfd", .problem,
                "you may not use userfaultfd (\(QuireError.text(of: error))): equal pages are not merged for VMs that you run",
                "usermod -aG quire YOU, log in again; without the udev rule of the package: chgrp quire /dev/userfaultfd && chmod 660 /dev/userfaultfd")
        }
    }

    private func tracking() -> Finding {
        var features: UInt64 = 0
        let isAsynchronous = unsafe cp_userfault_features(&features) == 0 && features & UInt64(CP_UFFD_WP_ASYNC) != 0
        if isAsynchronous && cp_has_pagemap_scan() { return finding("write-tracking", .ok, "the kernel tells what guests write") }
        return finding(
            "write-tracking", .note, "the kernel (\(read("/proc/sys/kernel/osrelease") ?? "?")) does not tell what guests write: all of their memory is read for it",
            "Linux 6.7 or later makes merging cheap")
    }

    /// What the agent in QEMU finds as well, and closes its gate for.
    private func overcommit() -> Finding {
        guard read("/proc/sys/vm/overcommit_memory") == "2" else { return finding("overcommit", .ok, "vm.overcommit_memory is not 2") }
        return finding(
            "overcommit", .problem, "the host overcommits no memory (vm.overcommit_memory is 2): equal pages are not merged",
            "sysctl -w vm.overcommit_memory=0; echo vm.overcommit_memory=0 > /etc/sysctl.d/90-overcommit.conf keeps it")
    }

    private func mappings() -> Finding {
        let limit = read("/proc/sys/vm/max_map_count").flatMap { Int($0) } ?? 0
        guard limit < Self.mappingLimit else { return finding("max-map-count", .ok, "vm.max_map_count is \(limit)") }
        return finding(
            "max-map-count", .note, "vm.max_map_count is \(limit): scattered equal pages of large guests are not all merged",
            "sysctl -w vm.max_map_count=\(Self.mappingLimit)")
    }

    private func kvm() -> Finding {
        guard exists("/dev/kvm") else {
            return finding("kvm", .note, "there is no /dev/kvm: guests are emulated", "modprobe kvm_intel or kvm_amd; in a VM, allow nested virtualization")
        }
        guard unsafe access(places.root + "/dev/kvm", R_OK | W_OK) == 0 else {
            return finding("kvm", .note, "you may not use /dev/kvm: guests that you run are emulated", "usermod -aG kvm YOU, and log in again")
        }
        return finding("kvm", .ok, "/dev/kvm can be used")
    }

    private func hugePages() -> Finding {
        let path = "/sys/kernel/mm/transparent_hugepage/shmem_enabled"
        guard let text = read(path) else { return finding("huge-pages", .note, "the kernel has no transparent huge pages for shared memory") }
        guard text.contains("[never]") || text.contains("[deny]") else {
            return finding("huge-pages", .ok, "guest RAM may have transparent huge pages")
        }
        return finding(
            "huge-pages", .note, "guest RAM has no transparent huge pages, as it is shared memory: guests that use much of it are slower",
            "echo advise > \(path)")
    }

    private func kernelMerging() -> Finding {
        guard read("/sys/kernel/mm/ksm/run") == "1" else { return finding("ksm", .ok, "the kernel's own merging (KSM) is off") }
        return finding("ksm", .note, "KSM runs as well, and spends CPU time on pages that Quire looks after", "systemctl disable --now ksmtuned; echo 2 > /sys/kernel/mm/ksm/run")
    }

    // MARK: Ours

    private func runtime() -> Finding {
        do throws(QuireError) {
            let base = try RuntimeDirectory.standard().base
            guard Files.isDirectory(base) else {
                let parent = base.lastIndex(of: "/").map { String(base[..<$0]) } ?? "/"
                guard Files.isWritable(parent.isEmpty ? "/" : parent) else { throw QuireError(.invalid, "\(base) cannot be made") }
                return finding("runtime-directory", .ok, "VMs will have their folders in \(base)")
            }
            guard Files.isWritable(base) else { throw QuireError(.invalid, "\(base) is not yours") }
            return finding("runtime-directory", .ok, "VMs have their folders in \(base)")
        } catch {
            return finding("runtime-directory", .problem, "no VM can be started: \(error)", "export QUIRE_RUNTIME_DIR=$XDG_RUNTIME_DIR/quire, or be root")
        }
    }

    private func backend() -> Finding {
        guard Files.isExecutable(places.backend) else {
            return finding("backend", .problem, "there is no program \(places.backend)", "install quire-backend beside quire")
        }
        return finding("backend", .ok, "the backend is \(places.backend)")
    }

    private func agent() -> Finding {
        guard let agent = places.agent else {
            return finding("agent", .problem, "libquire-agent.so is not beside quire, nor in ../lib/quire: equal pages are not merged", "install it there")
        }
        return finding("agent", .ok, "the agent is \(Files.normalized(agent))")
    }

    private func store() -> Finding {
        do throws(QuireError) {
            let figures = try StoreClient.figures(path: places.store, patienceMilliseconds: 2000)
            return finding("quired", .ok, "quired serves at \(places.store): \(Size.text(figures.sharedPages * 4096)) of at most \(Size.text(figures.limitPages * 4096))")
        } catch {
            return finding("quired", .note, "quired does not answer at \(places.store) (\(error)): only pages of zeros are merged", "systemd-sysusers && systemctl enable --now quired, or by hand: quired --keep &")
        }
    }

    // MARK: Others

    private func qemu() -> Finding {
        let program = "qemu-system-x86_64"
        guard let text = try? ChildProcess.output(of: [program, "--version"]), let version = QEMUCommandLine.Version(versionOutput: text) else {
            return finding("qemu", .note, "there is no \(program) in the path", "apt-get install qemu-system-x86")
        }
        let name = "QEMU \(version.major).\(version.minor)"
        if version < QEMUCommandLine.Version(7, 2) { return finding("qemu", .problem, "\(name) was never tried with Quire", "use QEMU 7.2 or later") }
        if version < QEMUCommandLine.Version(9, 2) {
            return finding("qemu", .ok, "\(name); a guest waits up to a second for a backend that is replaced (0.1 s from QEMU 9.2 on)")
        }
        return finding("qemu", .ok, name)
    }

    /// Where libvirt looks for hooks.
    static let hook = "/etc/libvirt/hooks/qemu.d/quire"

    private func libvirt() -> Finding {
        guard exists("/etc/libvirt") else { return finding("libvirt", .ok, "libvirt is not installed: quire run is what starts VMs") }
        let hook = places.root + Self.hook
        guard Files.isExecutable(hook), let text = try? Files.read(hook) else {
            return finding("libvirt", .problem, "libvirt has no hook \(Self.hook): domains that are enabled will not start", "install the package quire again, or make install; then systemctl reload libvirtd")
        }
        let program = text.split(separator: "\n").last { $0.contains("libvirt hook") }?
            .split(separator: " ").first { $0.hasPrefix("/") }.map(String.init)
        guard let program, Files.isExecutable(program) else {
            return finding("libvirt", .problem, "libvirt's hook \(Self.hook) runs \(program ?? "nothing"), which is not there", "install the package quire again, or correct the path in it")
        }
        guard ["libvirt-sock", "virtqemud-sock"].contains(where: { exists("/run/libvirt/" + $0) }) else {
            return finding("libvirt", .note, "libvirt is installed and its hook is in place, but libvirtd does not run", "systemctl start libvirtd")
        }
        return finding("libvirt", .ok, "libvirt runs, with its hook in place")
    }

    /// AppArmor's files: of each of libvirt's profiles that this host has, the part that is the host's own has to name Quire. What modules
    /// SELinux has loaded only `semodule -l` knows: there it is a note, whatever is loaded.
    private func confinement() -> Finding {
        if read("/sys/fs/selinux/enforce") == "1", exists("/etc/libvirt") {
            let folder = examples == "packaging" ? "packaging/selinux" : examples
            return finding(
                "confinement", .note, "SELinux is enforced: without Quire's module, domains that are enabled do not start, or are not merged",
                "if semodule -l does not list quire: checkmodule -M -m -o quire.mod \(folder)/quire.te; "
                    + "semodule_package -o quire.pp -m quire.mod -f \(folder)/quire.fc; semodule -i quire.pp; "
                    + "restorecon -RF /usr/bin/quire* /run/quire")
        }
        guard read("/sys/module/apparmor/parameters/enabled") == "Y" else { return finding("confinement", .ok, "neither AppArmor nor SELinux confines libvirt") }
        // Who may not read what is loaded goes by the files. One line a profile, and each domain that runs has one.
        let loaded = try? Files.read(places.root + "/sys/kernel/security/apparmor/profiles", limit: 1 << 22)
        if let loaded, !loaded.contains("libvirtd "), !loaded.contains("virtqemud ") {
            return finding("confinement", .ok, "AppArmor does not confine libvirt")
        }
        let folder = "/etc/apparmor.d"
        let profiles = ["usr.sbin.libvirtd", "usr.sbin.virtqemud", "abstractions/libvirt-qemu"].filter { exists(folder + "/" + $0) }
        let missing = profiles.filter { !(read(folder + "/local/" + $0) ?? "").contains("quire") }
        guard !missing.isEmpty else {
            return finding("confinement", .ok, profiles.isEmpty ? "AppArmor has no profile of libvirt" : "AppArmor's profiles of libvirt name Quire")
        }
        let lines = missing.map { profile in
            let own = "\(folder)/local/\(profile)"
            // What libvirt makes of the abstraction is loaded with each domain's start.
            guard profile.hasPrefix("usr.sbin.") else { return "cat \(examples)/apparmor-libvirt-qemu >> \(own)" }
            return "cat \(examples)/apparmor-libvirtd >> \(own); apparmor_parser -r \(folder)/\(profile)"
        }
        return finding(
            "confinement", .problem, "AppArmor confines libvirt, and does not know Quire: domains that are enabled do not start, or are not merged",
            lines.joined(separator: "; "))
    }

    /// Where `make install` and the package put them; in a clone they are in packaging.
    private var examples: String {
        let folders = places.backend.split(separator: "/").dropLast()
        guard folders.last == "bin" else { return "packaging" }
        return folders.dropLast().map { "/" + $0 }.joined() + "/share/doc/quire/examples"
    }
}
