import Platform
import Testing

@Suite struct HostReserveTests {
    /// The kernel is asked seldom as long as there is much, each time when there is little; and what is to be left is left, to the byte.
    @Test func asksAsOftenAsItMatters() {
        struct Host {
            var left: UInt64 = 1 << 30
            var looks = 0
        }
        let host = Monitor(Host())
        let reserve = HostReserve {
            host.update { host -> UInt64? in
                host.looks += 1
                return host.left
            }
        }
        func lacking(_ needed: UInt64 = 256 << 20) -> UInt64 { reserve.lackingBytes(taking: 65536, needed: { needed }) }
        var taken = 0
        while taken < 20_000, lacking() == 0 {
            host.update { $0.left -= 65536 }
            taken += 1
        }
        #expect(taken == (1024 - 256) * 16 && host.read { $0.left } == 256 << 20)
        #expect(host.read { $0.looks } < 1000)
        // More of it, or another need: not what was known before.
        host.update { $0.left += 65536 }
        reserve.forgetLack()
        #expect(lacking() == 0)
        reserve.forget()
        #expect(lacking(1 << 30) > 0)
        reserve.forget()
        #expect(lacking(0) == 0)
    }
}
