import Host
import Testing

/// Times in milliseconds.
private func ms(_ value: UInt64) -> UInt64 { value * 1_000_000 }

struct BackendWatchTests {
    /// A watch that has seen a heartbeat at 1100 ms, after a start at 1000 ms.
    private func ready() -> BackendWatch {
        var watch = BackendWatch(startedAt: ms(1000))
        #expect(watch.check(now: ms(1100), heartbeat: 1, claims: []) == nil)
        #expect(watch.isReady)
        return watch
    }

    @Test func aBeatingBackendIsLeftAlone() {
        var watch = ready()
        for tick in 2..<100 as Range<UInt64> {
            #expect(watch.check(now: ms(1000 + 100 * tick), heartbeat: tick, claims: []) == nil)
        }
    }

    @Test func onlyABeatingHeartWithoutClaimsMakesTheNextLookWait() {
        var watch = BackendWatch(startedAt: ms(1000))
        #expect(!watch.isCalm)
        _ = watch.check(now: ms(1100), heartbeat: nil, claims: [])
        #expect(!watch.isCalm)
        _ = watch.check(now: ms(1200), heartbeat: 1, claims: [])
        #expect(watch.isCalm)
        _ = watch.check(now: ms(1400), heartbeat: 2, claims: [ms(1390)])
        #expect(!watch.isCalm)
        _ = watch.check(now: ms(1500), heartbeat: 3, claims: [])
        #expect(watch.isCalm)
        _ = watch.check(now: ms(1700), heartbeat: 3, claims: [])
        #expect(!watch.isCalm)
    }

    /// The claim is young: it is the heart that counts.
    @Test func withAClaimOpenStandingStillFor500MillisecondsIsTheEnd() {
        var watch = ready()
        for time in stride(from: 1200, to: 1600, by: 100) as StrideTo<UInt64> {
            #expect(watch.check(now: ms(time), heartbeat: 1, claims: [ms(1190)]) == nil)
        }
        #expect(watch.check(now: ms(1600), heartbeat: 1, claims: [ms(1190)]) == "stood still for 500 ms")
    }

    @Test func withoutAClaimItMayTakeTwoSeconds() {
        var watch = ready()
        for time in stride(from: 1200, to: 3100, by: 100) as StrideTo<UInt64> {
            #expect(watch.check(now: ms(time), heartbeat: 1, claims: []) == nil)
        }
        #expect(watch.check(now: ms(3100), heartbeat: 1, claims: []) == "stood still for 2000 ms")
    }

    /// A new backend that freezes before it could finish what a dead one had begun.
    @Test func aPredecessorsClaimMakesAStillHeartUrgent() {
        var watch = ready()
        for time in stride(from: 1200, to: 1600, by: 100) as StrideTo<UInt64> {
            #expect(watch.check(now: ms(time), heartbeat: 1, claims: [ms(900)]) == nil)
        }
        #expect(watch.check(now: ms(1600), heartbeat: 1, claims: [ms(900)]) == "stood still for 500 ms")
    }

    @Test func anOldClaimIsTheEndThoughTheHeartBeats() {
        var watch = ready()
        for tick in 2..<6 as Range<UInt64> {
            #expect(watch.check(now: ms(1000 + 100 * tick), heartbeat: tick, claims: [ms(1110), ms(1500)]) == nil)
        }
        #expect(watch.check(now: ms(1650), heartbeat: 7, claims: [ms(1110), ms(1500)]) == "held a claim for 540 ms")
    }

    @Test func aPredecessorsClaimDoesNotCount() {
        var watch = ready()
        for tick in 2..<100 as Range<UInt64> {
            #expect(watch.check(now: ms(1000 + 100 * tick), heartbeat: tick, claims: [ms(900), 0]) == nil)
        }
    }

    @Test func aLateTickOfOurOwnBeginsAgain() {
        var watch = ready()
        #expect(watch.check(now: ms(1400), heartbeat: 1, claims: [ms(1150)]) == nil)
        #expect(watch.check(now: ms(3000), heartbeat: 1, claims: [ms(1150)]) == nil)
        #expect(watch.check(now: ms(3240), heartbeat: 1, claims: [ms(1150)]) == nil)
        #expect(watch.check(now: ms(3480), heartbeat: 1, claims: [ms(1150)]) == nil)
        #expect(watch.check(now: ms(3500), heartbeat: 2, claims: [ms(1150)]) == "held a claim for 2350 ms")
        var other = ready()
        #expect(other.check(now: ms(9000), heartbeat: 1, claims: []) == nil)
        for time in stride(from: 9200, to: 11000, by: 200) as StrideTo<UInt64> {
            #expect(other.check(now: ms(time), heartbeat: 1, claims: []) == nil)
        }
        #expect(other.check(now: ms(11000), heartbeat: 1, claims: []) == "stood still for 2000 ms")
    }

    @Test func aStartMayTakeFiveSeconds() {
        var watch = BackendWatch(startedAt: ms(1000))
        for time in stride(from: 1100, to: 6000, by: 100) as StrideTo<UInt64> {
            #expect(watch.check(now: ms(time), heartbeat: time < 3000 ? nil : 0, claims: [ms(1001)]) == nil)
        }
        #expect(!watch.isReady)
        #expect(watch.check(now: ms(6000), heartbeat: 0, claims: []) == "was not ready after 5000 ms")
    }

    @Test func restartsAtOnceThenMoreAndMoreSlowly() {
        var backoff = RestartBackoff()
        let delays = (0..<9).map { _ in backoff.delay(afterLifetime: ms(10)) / 1_000_000 }
        #expect(delays == [0, 100, 200, 400, 800, 1600, 3200, 5000, 5000])
        #expect(backoff.delay(afterLifetime: ms(5000)) == 0)
        #expect(backoff.delay(afterLifetime: ms(10)) == 0)
        #expect(backoff.delay(afterLifetime: ms(10)) == ms(100))
    }
}
