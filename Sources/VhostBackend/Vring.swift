import GuestMemory
import Logging
import Platform
import Synchronization

/// One virtqueue of a session: what the front end has set up so far, and the thread that serves it while it runs.
///
/// Not thread-safe: the session's thread owns it. The ring itself belongs to the ring's thread from `start` to `stop`.
final class Vring {
    let index: Int
    var size: UInt16 = 0
    var base: UInt16 = 0
    var addresses: VringAddresses?
    var kick: Descriptor?
    var call: Descriptor?
    var error: Descriptor?
    var isEnabled: Bool
    /// The front end has started it and not stopped it since: it runs, or rests until the memory under it is back.
    var isStarted = false
    private var runner: RingRunner?

    init(index: Int, enabled: Bool) {
        self.index = index
        isEnabled = enabled
    }

    var isRunning: Bool { runner != nil }
    var isComplete: Bool { isEnabled && addresses != nil && size > 0 && kick != nil }
    var layout: SplitRing.Layout? { runner?.layout }

    /// Throws what is wrong with `addresses`, above all if not all of the ring lies in `memory`.
    func check(_ addresses: VringAddresses, in memory: GuestMemory) throws(QuireError) {
        try SplitRing.check(size: size, addresses: addresses, memory: memory)
    }

    func fits(_ memory: GuestMemory) -> Bool {
        guard let addresses else { return false }
        return (try? check(addresses, in: memory)) != nil
    }

    /// Gets ready to serve, from `release` on. `inflight`: requests that a dead back end left behind are run again first.
    func start(
        device: any VhostUserDevice, memory: GuestMemory, features: VirtioFeatures, inflight: InflightRegion?,
        alarm: TruncationAlarm, logger: Logger
    ) throws(QuireError) {
        guard runner == nil, let addresses, let kickRaw = kick.raw() else { return }
        var ring = try SplitRing(size: size, addresses: addresses, base: base, memory: memory, features: features)
        let log = inflight?.queue(index, size: size)
        let leftOver = log?.recover(size: size, usedIndex: ring.nextUsed) ?? []
        if !leftOver.isEmpty {
            logger.info("ring \(index): running \(leftOver.count) requests again")
            // They were taken from the available ring by the back end that died; don't take them a second time.
            ring.nextAvailable = ring.nextUsed &+ UInt16(leftOver.count)
        }
        let callCopy: Descriptor? = if let raw = call.raw() { try Descriptor.duplicate(of: raw) } else { nil }
        let errorCopy: Descriptor? = if let raw = error.raw() { try Descriptor.duplicate(of: raw) } else { nil }
        let kickCopy = try Descriptor.duplicate(of: kickRaw)
        ring.setNotifications(true)
        runner = try RingRunner(
            ring: ring, index: index, device: device, features: features, inflight: log, leftOver: leftOver,
            wires: try RingWires(kick: kickCopy, call: callCopy, error: errorCopy), alarm: alarm,
            logger: logger)
    }

    /// Serves from now on: the device runs.
    func release() { runner?.release() }

    /// Has it end what it is at, so that several rings do at the same time.
    func beginStop() { runner?.beginStop() }

    /// Stops serving and joins the thread: no request is being answered any more. Keeps the position in `base`.
    func stop() {
        guard let runner else { return }
        base = runner.stop()
        self.runner = nil
    }
}

/// The descriptors by which guest and ring wake each other.
struct RingWires: ~Copyable, Sendable {
    let kick: EventDescriptor
    let call: Descriptor?
    let error: Descriptor?

    /// What a peer passed may be anything: nothing that we read from or write to may block a ring's thread.
    init(kick: consuming Descriptor, call: consuming Descriptor?, error: consuming Descriptor?) throws(QuireError) {
        if let raw = call.raw() { try Descriptor.makeNonblocking(raw) }
        if let raw = error.raw() { try Descriptor.makeNonblocking(raw) }
        self.kick = try EventDescriptor(adopting: kick)
        self.call = call
        self.error = error
    }

    func signalCall() { if let raw = call.raw() { EventDescriptor.signal(raw) } }
    func signalError() { if let raw = error.raw() { EventDescriptor.signal(raw) } }
}

/// The thread of a running ring.
private final class RingRunner: Sendable {
    private let wires: RingWires
    private let alarm: TruncationAlarm
    private let features: VirtioFeatures
    private let logger: Logger
    private let stopEvent: EventDescriptor
    private let stopping = Atomic<Bool>(false)
    private let position: Mutex<UInt16>
    private let thread = Mutex<JoinableThread?>(nil)
    /// Opens when the device runs, or when the thread shall end.
    private let gate = Monitor(false)
    let layout: SplitRing.Layout

    init(
        ring: SplitRing, index: Int, device: any VhostUserDevice, features: VirtioFeatures,
        inflight: InflightRegion.InflightQueue?, leftOver: [UInt16], wires: consuming RingWires,
        alarm: TruncationAlarm, logger: Logger
    ) throws(QuireError) {
        self.wires = wires
        self.alarm = alarm
        self.features = features
        self.logger = logger
        stopEvent = try EventDescriptor()
        position = Mutex(ring.nextAvailable)
        layout = ring.layout
        let started = try JoinableThread("ring-\(index)") { [self] in
            gate.wait { $0 ? () : nil }
            var ring = ring
            do throws(QuireError) {
                try serve(&ring, index, device, inflight, leftOver)
            } catch where !alarm.isRaised {
                logger.error("ring \(index) stopped: \(error)")
                self.wires.signalError()
            } catch {
                // Not the guest's mistake: the session says what it is.
            }
            position.withLock { $0 = ring.nextAvailable }
        }
        thread.withLock { $0 = started }
    }

    func release() { gate.update { $0 = true } }

    func beginStop() {
        stopping.store(true, ordering: .releasing)
        release()
        stopEvent.signal()
    }

    func stop() -> UInt16 {
        beginStop()
        thread.withLock { $0 }?.join()
        thread.withLock { $0 = nil }
        return position.withLock { $0 }
    }

    private static let longNanoseconds: UInt64 = 5_000_000_000

    private var isStopping: Bool { stopping.load(ordering: .acquiring) || alarm.isRaised }

    private func serve(
        _ ring: inout SplitRing, _ index: Int, _ device: any VhostUserDevice,
        _ inflight: InflightRegion.InflightQueue?, _ leftOver: [UInt16]
    ) throws(QuireError) {
        // What was pushed before may never have been announced: the process died in between, or the call descriptor was
        // exchanged. A guest that sleeps would sleep for ever; one interrupt too many does no harm.
        wires.signalCall()
        var counter: UInt64 = 0
        // False: the ring has to stop, and the request is nobody's yet.
        func answer(_ ring: inout SplitRing, _ chain: DescriptorChain) throws(QuireError) -> Bool {
            var written: UInt32
            var began: UInt64?
            var isSaid = false
            while true {
                do throws(QuireError) {
                    written = try device.process(chain, queue: index, features: features)
                    break
                } catch {
                    guard error.code == .retry else { throw error }
                    if isStopping { return false }
                    let now = monotonicNanoseconds()
                    if !isSaid, now - (began ?? now) > Self.longNanoseconds {
                        isSaid = true
                        logger.warning("ring \(index) has been waiting for some seconds: \(error)")
                    }
                    began = began ?? now
                }
            }
            // What was read or written may not have been guest memory: then nobody answers for it. The request stays in
            // flight, and a new connection runs it again.
            if alarm.isRaised { return true }
            inflight?.willComplete(chain.head)
            ring.push(head: chain.head, written: written)
            inflight?.didComplete(chain.head, usedIndex: ring.nextUsed)
            if ring.needsNotification() { wires.signalCall() }
            return true
        }
        // Those that were taken and not answered are taken again, by whoever serves the ring next: requests are answered in
        // the order of the ring, so they are the ones behind the last that was used.
        func giveBack(_ ring: inout SplitRing, _ heads: some Sequence<UInt16>) {
            if alarm.isRaised { return }
            for head in heads { inflight?.giveBack(head) }
            ring.nextAvailable = ring.nextUsed
        }
        if isStopping { return }
        for (done, head) in leftOver.enumerated() where !alarm.isRaised {
            guard try answer(&ring, try ring.chain(head: head)) else { return giveBack(&ring, leftOver[done...]) }
        }
        while !isStopping {
            while !isStopping, let chain = try ring.pop() {
                counter += 1
                inflight?.begin(chain.head, counter: counter)
                guard try answer(&ring, chain) else { return giveBack(&ring, [chain.head]) }
            }
            ring.setNotifications(true)
            if ring.hasAvailable { continue }
            _ = waitReadable([wires.kick.descriptor.raw, stopEvent.descriptor.raw])
            wires.kick.drain()
        }
    }
}
