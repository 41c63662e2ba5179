import Platform

/// What a start finds in a file, and makes of it: pools from their table, then every leaf with a page, then every content
/// that a leaf names. All else is free, whatever is written there. Everything is checked before it is used, so that a file
/// that was damaged ends in one clear line and not in a wrong page or a crash.
enum TmemRecovery {
    static func damaged(_ what: String) -> QuireError {
        QuireError(.invalid, "the store of transcendent memory is damaged: \(what)")
    }
}

extension TmemStore {
    func recover() throws(QuireError) {
        var records = [PoolRecord?](repeating: nil, count: TmemFile.poolLimit)
        var dying: [UInt16] = []
        for number in 1..<UInt16(TmemFile.poolLimit) {
            switch file.poolState(number) {
            case nil: throw TmemRecovery.damaged("the pool table has an entry that is none")
            case .free: continue
            case .dying: dying.append(number)
            case .live:
                guard let entry = file.poolEntry(number) else { throw TmemRecovery.damaged("pool \(number) has no kind or name") }
                let others = records.compactMap { $0 }
                guard !others.contains(where: { $0.attributes.name == entry.attributes.name }) else {
                    throw TmemRecovery.damaged("two pools are called \(entry.attributes.name)")
                }
                let client =
                    others.first { $0.client.name == entry.attributes.client }?.client
                    ?? ClientRecord(name: entry.attributes.client, weight: entry.weight, cap: entry.cap)
                let record = try PoolRecord(number: number, attributes: entry.attributes, client: client)
                client.pools.withLock { $0.append(record) }
                records[Int(number)] = record
                budget.note(PoolRecord.metadataBytes, isMetadata: true)
            }
        }
        var pages = [Int](repeating: 0, count: TmemFile.poolLimit)
        var fills = pages
        try leaves.recover(keeps: { number in
            guard Int(number) < records.count, let record = records[Int(number)] else { return (false, false) }
            return (true, record.isEphemeral)
        }) { (number, pool) throws(QuireError) in
            try contents.recoverName(number, pool)
            pages[Int(pool)] += 1
            if number & Contents.fillBit != 0 { fills[Int(pool)] += 1 }
        }
        try contents.recover()
        for number in dying { file.setPoolState(number, .free) }
        for record in records.compactMap({ $0 }) {
            record.pages.store(pages[Int(record.number)], ordering: .relaxed)
            record.count(.sameFilled, 0, fills[Int(record.number)])
        }
        setPools(records.compactMap { $0 })
    }
}
