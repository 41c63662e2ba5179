import GuestMemory
import PageContent
import Platform

/// Where equal pages are kept once, as the engine that merges sees it: quired at the end of a connection.
///
/// A slot that it names is the VM's until it is reported as released. That report comes after the page map says that the
/// slot is not mapped any more; one that is forgotten costs memory until the next `prepare`, never a byte.
public protocol ContentStore: AnyObject, Sendable {
    /// Before each pass, while nothing that maps or unmaps slots is under way for the engine: gets the store ready.
    func prepare(_ memory: GuestMemory) -> ContentStoreState

    /// Why nothing more is to be merged now, with zeros neither, though it could be: the host would not have the memory if
    /// guests wrote what is merged. Nil: go on. `zeroPages`: pages of zeros that the VM has merged; nil: as far as is known
    /// without asking anybody.
    func shortage(zeroPages: UInt64?) -> String?

    /// Slots for pages that are quiet: runs, and the hashes of all their pages in order. Pages that are in none of the
    /// answer's runs have no slot yet.
    func lookUp(_ runs: [Range<GFN>], _ hashes: [PageHash]) throws(QuireError) -> [SlotRun]

    /// Slots for pages that were looked up in vain and have an equal now.
    func takeOffers() throws(QuireError) -> [SlotRun]

    /// Nobody knows what became of some slots: the next `prepare` connects anew, and what is mapped is counted again.
    func lose()

    /// What became of slots.
    func report(merged: [Range<GFN>], released: [Range<GFN>]) throws(QuireError)
}

public enum ContentStoreState: Sendable {
    /// Nothing can be looked up, for this reason; pages of zeros can be merged all the same.
    case absent(String)
    /// As at the last call.
    case ready(PageHasher)
    /// Connected anew. `held`: pages that were merged just before, and that the store may count as ours. `unknownPages` of
    /// them have slots that are nobody's any more: bring them back.
    case connected(PageHasher, held: [Range<GFN>], unknownPages: UInt64)
}
