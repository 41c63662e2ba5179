import PageContent
import Platform
import StoreProtocol

/// Somebody who keeps descriptors while quired is away: its keeper, or nobody.
public protocol Parking: Sendable {
    /// From the moment this returns, the descriptors outlive this process. An item of the same name is replaced.
    func park(_ name: String, _ descriptors: [Int32]) throws(QuireError)
    func unpark(_ name: String)
}

/// Nobody: what this process has ends with it.
package struct NoParking: Parking {
    package init() {}
    package func park(_ name: String, _ descriptors: [Int32]) {}
    package func unpark(_ name: String) {}
}

/// Descriptors that an earlier quired parked under a name, in order.
package final class ParkedItem: @unchecked Sendable {
    // Made and taken apart by one thread, at start.
    package let name: String
    package var descriptors: UnixSocket.PassedDescriptors

    package init(name: String, descriptors: consuming UnixSocket.PassedDescriptors) {
        self.name = name
        self.descriptors = descriptors
    }
}

/// Where a test may break what makes the store safe, to see that it is this that makes it safe.
package struct StoreSeams: Sendable {
    package typealias CopyHash = @Sendable (_ claimed: PageHash, _ ofCopy: () -> PageHash) -> PageHash
    /// What the hash of a copied page is taken to be.
    package var copyHash: CopyHash = { (_, ofCopy) in ofCopy() }
    /// What the host has left.
    package var availableBytes: @Sendable () -> UInt64? = { HostMemory()?.leftBytes }
    /// Whether a slot is noted in the ledger before the VM is told of it.
    package var notesInLedger = true
    /// Which share a group's pages go to.
    package var shareKey: @Sendable (String) -> String = { $0 }
    package init() {}
}
