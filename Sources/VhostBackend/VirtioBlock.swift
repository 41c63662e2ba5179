import GuestMemory
import Logging
import Platform

/// A virtio block device (virtio 1.2, section 5.2) over any `BlockStorage`.
///
/// The driver is hostile: every length and sector is checked against the capacity before the storage sees it, and a
/// request that is merely wrong is answered with an error; only one that has no room for an answer stops the ring.
public final class VirtioBlock: VhostUserDevice {
    public let storage: any BlockStorage
    public let queueCount: Int
    public let lifecycle: (any DeviceLifecycle)?
    private let logger: Logger

    private static let sectorBytes: UInt64 = 512
    private static let maxSegments: UInt32 = 126
    /// 1 GiB a segment.
    private static let maxDiscardSectors: UInt32 = 1 << 21
    private static let maxDiscardSegments: UInt32 = 64

    public init(
        storage: any BlockStorage, queueCount: Int = 1, lifecycle: (any DeviceLifecycle)? = nil, logger: Logger
    ) {
        precondition(queueCount >= 1 && queueCount <= 256)
        self.storage = storage
        self.queueCount = queueCount
        self.lifecycle = lifecycle
        self.logger = logger
    }

    public var features: VirtioFeatures {
        var features: VirtioFeatures = [
            .blockSegMax, .blockSize, .blockFlush, .blockTopology, .blockDiscard, .blockWriteZeroes, .blockMultiQueue,
        ]
        if storage.isReadOnly { features.insert(.blockReadOnly) }
        return features
    }

    /// struct virtio_blk_config, 60 bytes.
    public var configuration: [UInt8] {
        var bytes: [UInt8] = []
        bytes += littleEndian(storage.byteCount / Self.sectorBytes)  // capacity
        bytes += littleEndian(UInt32(0))  // size_max: not offered
        bytes += littleEndian(Self.maxSegments)  // seg_max
        bytes += [0, 0, 0, 0]  // geometry: not offered
        bytes += littleEndian(storage.logicalBlockBytes)  // blk_size
        bytes += [0, 0]  // physical_block_exp, alignment_offset
        bytes += littleEndian(UInt16(1)) + littleEndian(UInt32(0))  // min_io_size, opt_io_size, in logical blocks
        bytes += [0, 0]  // writeback: not offered; unused
        bytes += littleEndian(UInt16(queueCount))
        bytes += littleEndian(Self.maxDiscardSectors) + littleEndian(Self.maxDiscardSegments)
        bytes += littleEndian(UInt32(UInt64(storage.logicalBlockBytes) / Self.sectorBytes))  // discard_sector_alignment
        bytes += littleEndian(Self.maxDiscardSectors) + littleEndian(Self.maxDiscardSegments)  // write zeroes
        bytes += [1, 0, 0, 0]  // write_zeroes_may_unmap, unused
        return bytes
    }

    private enum Status: UInt8 { case ok = 0, ioError = 1, unsupported = 2 }

    private enum RequestType: UInt32 {
        case read = 0
        case write = 1
        case flush = 4
        case getID = 8
        case discard = 11
        case writeZeroes = 13
    }

    public func process(_ chain: DescriptorChain, queue: Int, features: VirtioFeatures) throws(QuireError) -> UInt32 {
        let headerBytes = 16
        guard chain.readable.count >= headerBytes, chain.writable.count >= 1 else {
            throw QuireError(.guest, "a block request without a header or without room for its status")
        }
        let input = chain.readable.slice(from: headerBytes, count: chain.readable.count - headerBytes)
        let output = chain.writable.slice(from: 0, count: chain.writable.count - 1)
        let statusByte = chain.writable.slice(from: chain.writable.count - 1, count: 1)

        var written = 0
        var status = Status.ok
        do throws(QuireError) {
            let header = try chain.readable.slice(from: 0, count: headerBytes).copyOut()
            let type = RequestType(rawValue: fromLittleEndian(header[0..<4]))
            let sector: UInt64 = fromLittleEndian(header[8..<16])
            do throws(QuireError) {
                written = try perform(type, sector, input, output)
                // A driver that cannot flush (firmware, boot loaders) relies on what it wrote as soon as it is answered
                // (section 5.2.6.2).
                if type == .write || type == .writeZeroes, !features.contains(.blockFlush) { try storage.flush() }
            } catch where error.code != .retry {
                status = error.code == .unsupported ? .unsupported : .ioError
                logger.debug("block request \(type.map { "\($0)" } ?? "of an unknown type") at sector \(sector): \(error)")
            }
        } catch where error.code != .retry {
            status = .ioError
            logger.error("a block request cannot be read: \(error)")
        }
        try statusByte.copyIn([status.rawValue])
        return UInt32(clamping: written + 1)
    }

    /// Returns the bytes stored in `output`.
    private func perform(
        _ type: RequestType?, _ sector: UInt64, _ input: GuestBuffer, _ output: GuestBuffer
    ) throws(QuireError) -> Int {
        switch type {
        case .read:
            try storage.read(at: try offset(sector, count: UInt64(output.count)), into: output)
            return output.count
        case .write:
            try checkWritable()
            try storage.write(at: try offset(sector, count: UInt64(input.count)), from: input)
        case .flush:
            try storage.flush()
        case .getID:
            guard output.count >= 20 else { throw QuireError(.invalid, "no room for the serial number") }
            try output.copyIn(Array(paddedText(storage.serial, capacity: 21)[..<20]))
            return 20
        case .discard, .writeZeroes:
            try checkWritable()
            let segmentBytes = 16
            guard input.count > 0, input.count % segmentBytes == 0,
                input.count / segmentBytes <= Int(Self.maxDiscardSegments)
            else { throw QuireError(.invalid, "\(input.count) bytes of ranges") }
            let bytes = try input.copyOut()
            // All ranges are checked before the first is acted on: a bad request changes nothing.
            var ranges: [(offset: UInt64, count: UInt64, mayUnmap: Bool)] = []
            for start in stride(from: 0, to: bytes.count, by: segmentBytes) {
                let sectors: UInt32 = fromLittleEndian(bytes[start + 8..<start + 12])
                let flags: UInt32 = fromLittleEndian(bytes[start + 12..<start + 16])
                guard sectors <= Self.maxDiscardSectors else { throw QuireError(.invalid, "a range of \(sectors) sectors") }
                let count = UInt64(sectors) * Self.sectorBytes
                let offset = try offset(fromLittleEndian(bytes[start..<start + 8]), count: count)
                guard flags & ~1 == 0, type == .writeZeroes || flags == 0 else {
                    throw QuireError(.unsupported, "flags \(flags) of a range")
                }
                ranges.append((offset, count, flags & 1 != 0))
            }
            for range in ranges where range.count > 0 {
                if type == .discard {
                    try storage.discard(at: range.offset, count: range.count)
                } else {
                    try storage.writeZeroes(at: range.offset, count: range.count, mayUnmap: range.mayUnmap)
                }
            }
        case nil:
            throw QuireError(.unsupported, "unknown request")
        }
        return 0
    }

    private func checkWritable() throws(QuireError) {
        guard !storage.isReadOnly else { throw QuireError(.invalid, "the disk is read-only") }
    }

    /// Byte offset of a sector, if `count` bytes from there are inside the disk and in whole logical blocks.
    private func offset(_ sector: UInt64, count: UInt64) throws(QuireError) -> UInt64 {
        let (offset, overflow) = sector.multipliedReportingOverflow(by: Self.sectorBytes)
        guard !overflow, offset <= storage.byteCount, count <= storage.byteCount - offset else {
            throw QuireError(.invalid, "\(count) bytes at sector \(sector) are beyond the end of the disk")
        }
        let block = UInt64(storage.logicalBlockBytes)
        guard offset % block == 0, count % block == 0 else {
            throw QuireError(.invalid, "\(count) bytes at sector \(sector) are not whole blocks of \(block)")
        }
        return offset
    }
}
