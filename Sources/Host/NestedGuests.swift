import Platform

/// Whether a guest may run guests of its own, by KVM in both.
///
/// While it does, KVM in the host's kernel and the processor itself write pages of the outer guest (virtual APICs of the inner one, what it
/// is interrupted by) at addresses that were looked up when the inner one was entered. User space sees neither those references
/// nor those writes: write tracking does not, the pin gate does not, and no window stops them. So nothing of such a guest is merged. Whether
/// it really runs some cannot be seen from here; that it may is enough.
///
/// What the guest has freed can still go back: no kernel frees a page that its own guest is just using like that.
public struct NestedGuests: Sendable {
    /// By which feature of the processor the host's kernel lets guests do that: a parameter of its modules.
    public var vmx: Bool, svm: Bool
    public init(vmx: Bool, svm: Bool) { (self.vmx, self.svm) = (vmx, svm) }

    public static var host: NestedGuests {
        func isOn(_ module: String) -> Bool {
            (try? Files.read("/sys/module/\(module)/parameters/nested")).map { "Yy1".contains($0.prefix(1)) && !$0.isEmpty } ?? false
        }
        return NestedGuests(vmx: isOn("kvm_intel"), svm: isOn("kvm_amd"))
    }

    /// - Parameters:
    ///   - isHostCPU: the guest has what the host's processor has. Other models have these features only where they are named.
    ///   - features: those of its processor that are named, and whether it has them.
    public func mayRun(isHostCPU: Bool, features: [String: Bool]) -> Bool {
        vmx && features["vmx"] ?? isHostCPU || svm && features["svm"] ?? isHostCPU
    }

    /// In a guest of this QEMU.
    package func mayRun(arguments: [String]) -> Bool {
        guard vmx || svm else { return false }
        // As a program that is called kvm or qemu-kvm it needs no option.
        var isKVM = arguments.first?.hasSuffix("kvm") ?? false, isHostCPU = false
        var features: [String: Bool] = [:]
        for option in QEMUCommandLine.options(arguments) {
            switch option.name {
            case "enable-kvm": isKVM = true
            case "accel", "machine", "M": isKVM = isKVM || option.value.contains("kvm")
            case "cpu":
                let words = option.value.split(separator: ",").map(String.init)
                isHostCPU = ["host", "max"].contains(words.first)
                for word in words.dropFirst() { Self.note(word, &features) }
            case "global": if let dot = option.value.lastIndex(of: ".") { Self.note(String(option.value[option.value.index(after: dot)...]), &features) }
            default: break
            }
        }
        return isKVM && mayRun(isHostCPU: isHostCPU, features: features)
    }

    /// `vmx`, `+vmx`, `-vmx`, `vmx=on`. Said twice it counts as on: QEMU has an order of its own for these.
    private static func note(_ word: String, _ features: inout [String: Bool]) {
        let pair = word.split(separator: "=", maxSplits: 1).map(String.init)
        guard let first = pair.first else { return }
        let sign = first.first == "+" || first.first == "-" ? first.first : nil
        let name = sign == nil ? first : String(first.dropFirst())
        guard name == "vmx" || name == "svm" else { return }
        let isOn = sign.map { $0 == "+" } ?? !(pair.count == 2 && ["off", "no", "false", "n"].contains(pair[1]))
        features[name] = isOn || features[name] ?? false
    }

    /// In the guest of a QEMU that runs. One whose command line cannot be read may run anything.
    package static func mayRun(process: Int32, host: NestedGuests = .host) -> Bool {
        guard host.vmx || host.svm else { return false }
        guard let text = try? Files.read("/proc/\(process)/cmdline", limit: 1 << 22) else { return true }
        return host.mayRun(arguments: text.split(separator: "\0", omittingEmptySubsequences: false).map(String.init))
    }
}
