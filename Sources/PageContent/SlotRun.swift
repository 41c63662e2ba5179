/// Guest pages and their slots: `gfn` + i has `slot` + i.
public struct SlotRun: Equatable, Sendable {
    public let gfn: UInt64
    public let slot: UInt32
    public let pages: UInt32
    public let store: UInt32
    public init(gfn: UInt64, slot: UInt32, pages: UInt32, store: UInt32) {
        self.gfn = gfn
        self.slot = slot
        self.pages = pages
        self.store = store
    }
    public var gfns: Range<UInt64> { gfn..<gfn + UInt64(pages) }
}

extension [SlotRun] {
    /// Adds a page, to the last run where it continues it.
    public mutating func append(gfn: UInt64, slot: UInt32, store: UInt32) {
        if let last, last.store == store, last.gfn + UInt64(last.pages) == gfn, last.slot + last.pages == slot {
            self[count - 1] = SlotRun(gfn: last.gfn, slot: last.slot, pages: last.pages + 1, store: store)
        } else {
            append(SlotRun(gfn: gfn, slot: slot, pages: 1, store: store))
        }
    }
}
