import Host

/// Why equal pages cannot be merged here, in one line: the kernel, or no right to what merging needs. Nil: they can.
public let whyNothingIsMerged: String? = {
    let finding = HostCheck.merging()
    return finding.level == .ok ? nil : finding.text
}()
