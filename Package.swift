// swift-tools-version: 6.2
import PackageDescription

// One set of settings for every Swift target: language mode 6 (the tools version's default) and strict memory safety,
// so that each use of an unsafe construct is marked where it stands.
let settings: [SwiftSetting] = [.strictMemorySafety(), .enableUpcomingFeature("ExistentialAny")]

// The Swift runtime goes into the programs that are installed, as hosts have no toolchain. Only their link differs: everything
// is compiled once, for them and for the tests, whose bundle needs the shared runtime and so must not depend on these targets
// (`--build-tests` builds them all the same). The libraries are what the static Foundation is made of.
let runtimeInside: [LinkerSetting] = [
    .unsafeFlags(["-static-stdlib"]), .linkedLibrary("CoreFoundation"), .linkedLibrary("_FoundationICU"),
    .linkedLibrary("_FoundationCShims"), .linkedLibrary("_FoundationCollections"),
]

// Dependencies point one way: executables -> Host -> Engines and VhostBackend -> GuestMemory -> Platform.
// Engines and VhostBackend do not know each other; they meet on GuestMemory.
let package = Package(
    name: "quire",
    products: [
        .library(name: "VhostBackend", targets: ["VhostBackend"]),
        .library(name: "Engines", targets: ["Engines"]),
        .executable(name: "quire", targets: ["quire"]),
        .executable(name: "quire-backend", targets: ["quire-backend"]),
        .executable(name: "quired", targets: ["quired"]),
        .executable(name: "quire-exporter", targets: ["quire-exporter"]),
        .executable(name: "quire-bench", targets: ["quire-bench"]),
    ],
    dependencies: [
        .package(url: "https://github.com/apple/swift-argument-parser", from: "1.8.2"),
        .package(url: "https://github.com/apple/swift-log", from: "1.16.2"),
        .package(url: "https://github.com/apple/swift-nio", from: "2.101.2"),
        .package(url: "https://github.com/LebJe/TOMLKit", from: "0.6.0"),
    ],
    targets: [
        .target(name: "CQuireLayout"),
        .target(name: "CPlatform"),
        // The agent in QEMU. Nothing links it but the tests' stand-in for QEMU: its interposers take effect in whatever has
        // them. libquire-agent.so is linked by the Makefile, without the Swift runtime.
        .target(name: "QuireAgent", dependencies: ["CQuireLayout", "CPlatform"], linkerSettings: [.linkedLibrary("dl")]),
        .executableTarget(name: "agent-standin", dependencies: ["QuireAgent"], path: "Tests/StandIn"),
        .executableTarget(
            name: "agent-backend",
            dependencies: [
                "Engines", "GuestMemory", "Host", "Platform", .product(name: "Logging", package: "swift-log"),
            ],
            path: "Tests/AgentBackend", swiftSettings: settings),
        .executableTarget(
            name: "tmem-putter", dependencies: ["CPlatform", "Engines", "Platform", "TestSupport"], path: "Tests/TmemPutter"),
        .executableTarget(
            name: "disk-client", dependencies: ["Platform", "StoreProtocol"], path: "Tests/DiskClient", swiftSettings: settings,
            linkerSettings: runtimeInside),
        .target(name: "Platform", dependencies: ["CPlatform"], swiftSettings: settings),
        // The configuration file, for the programs: nothing that touches a guest's pages parses it.
        .target(
            name: "Configuration", dependencies: ["Platform", .product(name: "TOMLKit", package: "TOMLKit")], swiftSettings: settings),
        .target(name: "GuestMemory", dependencies: ["Platform"], swiftSettings: settings),
        .target(
            name: "VhostBackend",
            dependencies: ["Platform", "GuestMemory", .product(name: "Logging", package: "swift-log")],
            swiftSettings: settings),
        // The bytes of pages by their hashes: what the dedup engine and the page store both speak of.
        .target(name: "CHash", linkerSettings: [.linkedLibrary("xxhash")]),
        .target(name: "PageContent", dependencies: ["CQuireLayout", "CHash", "Platform"], swiftSettings: settings),
        .target(name: "CCompress", linkerSettings: [.linkedLibrary("lz4"), .linkedLibrary("zstd")]),
        .target(
            name: "Engines", dependencies: ["CCompress", "CQuireLayout", "Platform", "GuestMemory", "PageContent"],
            swiftSettings: settings),
        .target(
            name: "Host",
            dependencies: [
                "CPlatform", "CQuireLayout", "Platform", "GuestMemory", "VhostBackend", "PageContent", "Engines", "StoreProtocol",
                .product(name: "Logging", package: "swift-log"),
            ],
            swiftSettings: settings),
        // The page store, in three: what both sides speak, the store itself without a socket, and the program.
        .target(
            name: "CIndex",
            linkerSettings: [.linkedLibrary("urcu-bp"), .linkedLibrary("numa")]),
        .target(
            name: "StoreProtocol", dependencies: ["CQuireLayout", "PageContent", "Platform"], swiftSettings: settings),
        .target(
            name: "PageStore",
            dependencies: [
                "CQuireLayout", "CIndex", "CPlatform", "Engines", "PageContent", "Platform", "StoreProtocol",
                .product(name: "Logging", package: "swift-log"),
            ],
            swiftSettings: settings),
        .executableTarget(
            name: "quired",
            dependencies: ["Configuration", "Engines", "PageStore", "Host", "StoreProtocol", .product(name: "ArgumentParser", package: "swift-argument-parser")],
            swiftSettings: settings, linkerSettings: runtimeInside),
        .executableTarget(
            name: "quire-backend",
            dependencies: [
                "Host", .product(name: "ArgumentParser", package: "swift-argument-parser"),
            ],
            swiftSettings: settings, linkerSettings: runtimeInside),
        // Domains of libvirt. The shim loads libvirt.so when it is first used.
        .target(name: "CLibvirt", linkerSettings: [.linkedLibrary("dl")]),
        .target(name: "Libvirt", dependencies: ["CLibvirt", "Host", "Platform"], swiftSettings: settings),
        .executableTarget(
            name: "quire",
            dependencies: [
                "Configuration", "Host", "Libvirt", "Metrics", "StoreProtocol", .product(name: "ArgumentParser", package: "swift-argument-parser"),
            ],
            swiftSettings: settings, linkerSettings: runtimeInside),
        // What the running VMs say, for programs and people; and the program that serves it.
        .target(
            name: "Metrics", dependencies: ["CPlatform", "Host", "Platform", "StoreProtocol"],
            resources: [
                .embedInCode("Web/index.html"), .embedInCode("Web/page.css"), .embedInCode("Web/page.js"),
                .embedInCode("Web/openapi.json"),
            ],
            swiftSettings: settings),
        .executableTarget(
            name: "quire-exporter",
            dependencies: [
                "Configuration", "Host", "Metrics", "Platform", .product(name: "ArgumentParser", package: "swift-argument-parser"),
                .product(name: "NIOCore", package: "swift-nio"), .product(name: "NIOHTTP1", package: "swift-nio"),
                .product(name: "NIOPosix", package: "swift-nio"),
            ],
            swiftSettings: settings, linkerSettings: runtimeInside),
        // Benchmarks: what they have in common, and the program. Nothing depends on them.
        .target(name: "CBench"),
        .target(name: "Bench", dependencies: ["Platform"], swiftSettings: settings),
        .executableTarget(
            name: "quire-bench",
            dependencies: [
                "Bench", "CBench", "CQuireLayout", "Platform", "GuestMemory", "Engines", "Host", "PageContent", "PageStore", "StoreProtocol",
                "TestSupport",
                .product(name: "Logging", package: "swift-log"),
                .product(name: "ArgumentParser", package: "swift-argument-parser"),
            ],
            swiftSettings: settings),
        // What test targets have in common, and a benchmark.
        .target(
            name: "TestSupport", dependencies: ["CQuireLayout", "Host", "Platform", "StoreProtocol"], path: "Tests/Support", swiftSettings: settings),
        .testTarget(name: "BenchTests", dependencies: ["Bench"], swiftSettings: settings),
        .testTarget(
            name: "ConfigurationTests", dependencies: ["Configuration", "Host", "Platform", "TestSupport"],
            swiftSettings: settings),
        .testTarget(
            name: "HostTests",
            dependencies: [
                "Host", "Platform", "CQuireLayout", "GuestMemory", "Engines", "StoreProtocol", "VhostBackend", "TestSupport",
                .product(name: "Logging", package: "swift-log"),
            ],
            swiftSettings: settings),
        .testTarget(
            name: "VhostBackendTests",
            dependencies: [
                "CPlatform", "Platform", "GuestMemory", "VhostBackend", "TestSupport",
                .product(name: "Logging", package: "swift-log"), .product(name: "InMemoryLogging", package: "swift-log"),
            ],
            swiftSettings: settings),
        .testTarget(
            name: "EnginesTests",
            dependencies: ["CPlatform", "CQuireLayout", "Platform", "GuestMemory", "PageContent", "Engines", "TestSupport"],
            swiftSettings: settings),
        // The stand-in must be built, but not linked: a dependency would do both.
        .testTarget(
            name: "AgentTests",
            dependencies: [
                "CPlatform", "CQuireLayout", "Platform", "GuestMemory", "Engines", "Host", "TestSupport",
                .product(name: "Logging", package: "swift-log"),
            ]),
        .testTarget(
            name: "PageStoreTests",
            dependencies: [
                "CPlatform", "CQuireLayout", "Platform", "Engines", "Host", "PageContent", "StoreProtocol", "PageStore",
                "TestSupport",
                .product(name: "Logging", package: "swift-log"),
            ],
            swiftSettings: settings),
        .testTarget(
            name: "LibvirtTests", dependencies: ["Host", "Libvirt", "Platform", "TestSupport"], swiftSettings: settings),
        // A real browser, Prometheus' own checker, and a terminal in tmux.
        .testTarget(
            name: "MetricsTests",
            dependencies: ["Host", "Metrics", "Platform", "StoreProtocol", "TestSupport"],
            exclude: ["openapi-check", "alerts-test.yml"], swiftSettings: settings),
        // Real guests: what `make guest` prepares has to be there.
        .testTarget(
            name: "IntegrationTests",
            dependencies: [
                "Host", "Platform", "CPlatform", "CQuireLayout", "Libvirt", "StoreProtocol", "TestSupport",
            ],
            swiftSettings: settings),
    ]
)
