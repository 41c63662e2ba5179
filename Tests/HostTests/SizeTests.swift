import Platform
import Testing

struct SizeTests {
    @Test(arguments: [
        ("0", 0), ("512", 512), ("1b", 1), ("1k", 1024), ("1K", 1024), ("2G", 2 << 30), ("2g", 2 << 30),
        ("1.5G", 3 << 29), ("0.5M", 1 << 19), ("1T", 1 << 40), ("1P", 1 << 50), ("15E", 15 << 60), ("0x1000", 4096),
        ("1.", 1), ("1.0", 1),
    ] as [(String, UInt64)])
    func reads(_ text: String, _ bytes: UInt64) { #expect(Size.parse(text) == bytes) }

    @Test(arguments: ["", "M", "x", "1x", "-1", "+1", "1.5", "0.3b", ".5G", "16E", "1 G", "1GB", "1..5G", "0xz", "99999999999999999999"])
    func refuses(_ text: String) { #expect(Size.parse(text) == nil) }

    @Test(arguments: [
        (0, "0"), (1, "1B"), (1023, "1023B"), (1024, "1.0K"), (1536, "1.5K"), (10 << 10, "10K"), (1023 << 10, "1023K"),
        (1 << 20, "1.0M"), ((1 << 20) - 1, "1.0M"), (128 << 20, "128M"), (3 << 29, "1.5G"), (1 << 40, "1.0T"),
        (UInt64.max, "16E"),
    ] as [(UInt64, String)])
    func writes(_ bytes: UInt64, _ text: String) { #expect(Size.text(bytes) == text) }

    @Test(arguments: [(2 << 30, "2G"), (3 << 29, "1536M"), (4097, "4097 bytes"), (1024, "1K"), (0, "0 bytes")] as [(UInt64, String)])
    func writesExactly(_ bytes: UInt64, _ text: String) { #expect(Size.exact(bytes) == text) }

    @Test(arguments: [("10s", 10_000), ("10", 10_000), ("250ms", 250), ("1.5s", 1500), ("2m", 120_000), ("1h", 3_600_000)] as [(String, UInt64)])
    func readsDurations(_ text: String, _ milliseconds: UInt64) { #expect(Size.milliseconds(text) == milliseconds) }

    @Test(arguments: ["", "s", "x", "-1s", "1d", "1e3", "1..2s", ".5s", "1 s"])
    func refusesDurations(_ text: String) { #expect(Size.milliseconds(text) == nil) }

    @Test(arguments: [(0, "0ms"), (250, "250ms"), (10_000, "10s"), (1500, "1.5s"), (90_000, "90s")] as [(UInt64, String)])
    func writesDurations(_ milliseconds: UInt64, _ text: String) { #expect(Size.duration(milliseconds: milliseconds) == text) }
}
