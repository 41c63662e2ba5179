import PageContent
import Platform

/// Where a test may break what makes the engine safe, to see that it is this that makes it safe.
package struct TmemSeams: Sendable {
    /// What the hash of every page is taken to be.
    package var hash: PageHash?
    /// Whether pages of equal fingerprints are compared.
    package var compares = true
    /// Whether a leaf names a content, for a while, before its bytes are written.
    package var namesBeforeWriting = false
    /// Whether a put that fails leaves the old page.
    package var keepsOldPage = false
    /// Called by who reads, after he has found where the bytes are.
    package var whileReading: (@Sendable () -> Void)?
    /// Whether compaction lets readers finish before it gives away where bytes were.
    package var waitsForReaders = true
    /// Whether a slab that was to run empty, and did, is like any other.
    package var forgetsVictims = true
    /// Called where compaction lets a slab take part again that was to run empty.
    package var whileReleasing: (@Sendable () -> Void)?
    /// Called between two changes of the file: a kill may come at any of these places, with locks held or not.
    package var step: (@Sendable () -> Void)?
    /// Called before a slab that had none is given memory.
    package var whilePopulating: (@Sendable () -> Void)?
    /// What the host has left.
    package var availableBytes: @Sendable () -> UInt64? = { HostMemory()?.leftBytes }
    package init() {}
}
