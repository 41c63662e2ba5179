import Platform

/// Polls until `condition` holds; generous, because the machine is shared with anybody.
public func eventually(milliseconds: UInt64 = 60_000, _ condition: () throws -> Bool) rethrows -> Bool {
    let deadline = monotonicNanoseconds() + milliseconds * 1_000_000
    while monotonicNanoseconds() < deadline {
        if try condition() { return true }
        ProcessCalls.sleep(milliseconds: 5)
    }
    return try condition()
}

/// The folder of the programs that were built with this test, with a slash at its end: the test bundle lies in it.
public let products: String = {
    for word in CommandLine.arguments {
        if let end = word.firstRange(of: "quirePackageTests.xctest") { return String(word[..<end.lowerBound]) }
    }
    let own = Files.target(ofLink: "/proc/self/exe") ?? ""
    return own[..<(own.lastIndex(of: "/") ?? own.endIndex)] + "/"
}()

/// The code of the error that `body` throws; nil: none.
public func errorCode(_ body: () throws -> Void) -> QuireError.Code? {
    do {
        try body()
        return nil
    } catch { return (error as? QuireError)?.code }
}
