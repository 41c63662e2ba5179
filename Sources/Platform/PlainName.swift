/// Names that are safe wherever they are used: in paths, on command lines, in messages. Of VMs, share groups, disks.
public enum PlainName {
    /// 1 to 63 of A-Z a-z 0-9 . _ - and no dot in front: with the zero behind it a name fits into every field of 64 bytes.
    public static func isValid(_ name: String) -> Bool {
        (1...63).contains(name.utf8.count) && name.first != "."
            && name.utf8.allSatisfy { byte in
                switch byte {
                case UInt8(ascii: "a")...UInt8(ascii: "z"), UInt8(ascii: "A")...UInt8(ascii: "Z"),
                    UInt8(ascii: "0")...UInt8(ascii: "9"), UInt8(ascii: "."), UInt8(ascii: "_"), UInt8(ascii: "-"):
                    true
                default: false
                }
            }
    }
}
