import CQuireLayout

/// Where the bytes of one guest page are: what an entry of the page map says.
///
/// | from \ to | `private`                              | `hole`                           | `zero`, `shared` |
/// | --------- | -------------------------------------- | -------------------------------- | ---------------- |
/// | `private` | -                                      | back end: its claim was punched  | agent: merged    |
/// | `hole`    | back end: taken by the guest or filled | back end: it was free once more  | -                |
/// | `zero`    | agent: folded or reset                 | -                                | -                |
/// | `shared`  | agent: folded or reset                 | -                                | -                |
///
/// Where the agent claims for the back end (`PageRecycler`) it is the agent that moves pages to `hole`, too.
///
/// A merged page (`zero`, `shared`) that the guest has written since is *diverged*: QEMU holds a copy of its own. The
/// map does not say so, because nobody is told; for whoever accesses the page it makes no difference.
public enum PageState: Sendable, Equatable {
    /// The memory file's page, if it has one.
    case `private`
    /// Recycled, and not seen in use since. To be read and written like `private`.
    case hole
    /// QEMU maps zeros here, or its own copy if the guest has written since. The memory file says nothing.
    case zero
    /// QEMU maps a slot of a store, or its own copy if the guest has written since. The memory file says nothing.
    case shared(store: UInt8, slot: UInt64)

    /// The bytes are where QEMU's mapping leads, and only there.
    public var isMerged: Bool {
        switch self {
        case .private, .hole: false
        case .zero, .shared: true
        }
    }

    /// Whether both are alike but for the slot.
    func isSameKind(as other: PageState) -> Bool {
        switch (self, other) {
        case (.private, .private), (.hole, .hole), (.zero, .zero), (.shared, .shared): true
        default: false
        }
    }

    /// Who changes entries.
    public enum Mover: Sendable { case backend, agent }

    /// Who may move a page from this state to `next`: every edge of the table above. Nil: nobody.
    public func mover(to next: PageState) -> Mover? {
        switch (self, next) {
        case (.private, .hole), (.hole, .private), (.hole, .hole): .backend
        case (.private, .zero), (.private, .shared), (.zero, .private), (.shared, .private): .agent
        default: nil
        }
    }

    // MARK: - As an entry (quire_layout.h, part 3a)

    private static let slotMask = UInt64(1) << UInt64(QUIRE_MAP_SLOT_BITS) - 1

    /// Nil for an entry that this version does not know: then nobody knows where the bytes are.
    @inlinable @inline(__always) public init?(entry: UInt64) {
        if entry == 0 { self = .private } else if let other = Self.decode(entry) { self = other } else { return nil }
    }

    @usableFromInline static func decode(_ entry: UInt64) -> PageState? {
        let place = entry >> UInt64(QUIRE_MAP_SLOT_SHIFT)
        switch UInt32(entry & 0xff) {
        case QUIRE_MAP_PRIVATE.rawValue where place == 0: return .private
        case QUIRE_MAP_HOLE.rawValue where place == 0: return .hole
        case QUIRE_MAP_ZERO.rawValue where place == 0: return .zero
        case QUIRE_MAP_SHARED.rawValue:
            guard let store = UInt8(exactly: entry >> UInt64(QUIRE_MAP_STORE_SHIFT)) else { return nil }
            return .shared(store: store, slot: place & slotMask)
        default: return nil
        }
    }

    /// Slots have 40 bits.
    public var entry: UInt64 {
        switch self {
        case .private: return UInt64(QUIRE_MAP_PRIVATE.rawValue)
        case .hole: return UInt64(QUIRE_MAP_HOLE.rawValue)
        case .zero: return UInt64(QUIRE_MAP_ZERO.rawValue)
        case .shared(let store, let slot):
            precondition(slot <= Self.slotMask)
            return UInt64(QUIRE_MAP_SHARED.rawValue) | slot << UInt64(QUIRE_MAP_SLOT_SHIFT)
                | UInt64(store) << UInt64(QUIRE_MAP_STORE_SHIFT)
        }
    }
}
