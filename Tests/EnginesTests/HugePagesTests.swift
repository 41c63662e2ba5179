import Engines
import GuestMemory
import Testing

@Suite struct HugePagesTests {
    private static let first: GFN = 3 * 512 + 100

    /// Stretches begin 100 pages behind multiples of 512.
    private func stretch(_ gfn: GFN) -> Range<GFN>? {
        guard gfn >= Self.first else { return nil }
        let start = gfn - (gfn - Self.first) % 512
        return start..<start + 512
    }

    private func hold(
        _ pages: inout HugePages, _ gfns: [Range<GFN>], isWhole: Bool = true
    ) -> (held: [Range<GFN>], again: [Range<GFN>]) {
        let (held, again) = pages.hold(gfns, stretch: stretch) { _ in isWhole }
        return (held.runs, again)
    }

    @Test func aFewPagesWaitAndEnoughGo() {
        var pages = HugePages()
        let few = Self.first + 5..<Self.first + 5 + GFN(HugePages.worthIt) - 1
        let (held, again) = hold(&pages, [few])
        #expect(held == [few] && again.isEmpty && !pages.isEmpty)
        // The same ones once more are no more.
        #expect(hold(&pages, [few]).held == [few])
        // One more is enough: it goes at once, and those that waited are looked at again.
        let last = Self.first + 500..<Self.first + 501
        let (none, all) = hold(&pages, [last])
        #expect(none.isEmpty && all == [few] && pages.isEmpty)
    }

    @Test func eachHugePageForItself() {
        var pages = HugePages()
        // 100 pages on either side of a border, and enough in a third.
        let border = Self.first + 512
        let enough = border + 600..<border + 600 + GFN(HugePages.worthIt)
        let (held, again) = hold(&pages, [border - 100..<border + 100, enough])
        #expect(held == [border - 100..<border + 100] && again.isEmpty)
    }

    @Test func whatIsWrittenDoesNotCount() {
        var pages = HugePages()
        _ = hold(&pages, [Self.first..<Self.first + 127])
        pages.noteWritten(0..<Self.first + 512)
        #expect(pages.isEmpty)
        #expect(hold(&pages, [Self.first + 200..<Self.first + 201]).held == [Self.first + 200..<Self.first + 201])
    }

    @Test func whatIsBrokenUpGoes() {
        var pages = HugePages()
        _ = hold(&pages, [Self.first..<Self.first + 10])
        let (held, again) = hold(&pages, pages.runs, isWhole: false)
        #expect(held.isEmpty && again == [Self.first..<Self.first + 10] && pages.isEmpty)
        // Where there is no whole stretch of guest memory there is no huge page.
        #expect(hold(&pages, [0..<Self.first]).held.isEmpty && pages.isEmpty)
    }
}
