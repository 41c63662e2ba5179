import Host
import Testing

private let machineMemory = ["-machine", "memory-backend=quire-ram"]
private let chardev = ["-chardev", "socket,id=quire-control,path=/run/c,reconnect=1"]
private func disk(_ place: String) -> [String] {
    ["-device", "vhost-user-blk-pci,chardev=quire-control,num-queues=1,id=quire-control-disk,\(place)"]
}
private let pcDisk = disk("bus=pci.0,addr=1f")
private func ram(_ size: Int, fd: Int = 100) -> [String] {
    ["-object", "memory-backend-file,id=quire-ram,size=\(size),mem-path=/proc/self/fd/\(fd),share=on,align=2M"] + machineMemory
}

private let environment = QEMUCommandLine.Environment(
    isOnHugetlbfs: { $0.hasPrefix("/hugepages") },
    readFile: { ["plain.cfg": "[device]\n driver = \"x\"\n", "memory.cfg": "# c\n [memory]\n size = \"1G\"\n",
                 "object.cfg": "[object \"a\"]\n  qom-type = \"memory-backend-ram\"\n"][$0] })

private func parse(_ arguments: [String], version: QEMUCommandLine.Version? = .init(7, 2)) throws -> QEMUCommandLine {
    try QEMUCommandLine(["qemu-system-x86_64"] + arguments, controlSocket: "/run/c", version: version, environment: environment)
}

/// The arguments behind the program, RAM on descriptors 100, 101, …
private func rewrite(_ arguments: String...) throws -> [String] {
    let command = try parse(arguments)
    return Array(command.arguments(ramDescriptors: command.ramFiles.indices.map { Int32(100 + $0) }).dropFirst())
}

private func refusal(_ arguments: String...) -> String? { message { try parse(arguments) } }

struct QEMUCommandLineMemoryTests {
    @Test func addsRAMAndControlDiskToAPlainCommand() throws {
        #expect(try rewrite("-m", "2G", "-nographic", "disk.qcow2")
            == ["-m", "2G", "-nographic", "disk.qcow2"] + ram(2 << 30) + chardev + pcDisk)
        #expect(try parse(["-m", "2G"]).ramFiles == [.init(id: "quire-ram", byteCount: 2 << 30)])
        #expect(try parse(["-m", "2G"]).ramByteCount == 2 << 30)
    }

    /// Where QEMU emulates one CPU at a time, the guest's atomic operations are none for us.
    @Test(arguments: [
        ([], true), (["-smp", "2"], false), (["-smp", "1,maxcpus=2"], false), (["-smp", "sockets=2,cores=1"], false),
        (["-accel", "tcg,thread=multi", "-smp", "2"], false), (["-accel", "tcg,thread=single", "-smp", "2"], true),
        (["-smp", "2", "-icount", "shift=0"], true), (["-enable-kvm"], false), (["-accel", "kvm"], false),
        (["-machine", "q35,accel=kvm"], false), (["-machine", "q35,accel=kvm:tcg"], true), (["-M", "accel=tcg", "-smp", "4"], false),
    ] as [([String], Bool)])
    func noticesSingleThreadedEmulation(_ arguments: [String], _ isSingle: Bool) throws {
        #expect(try parse(arguments).isSingleThreadedTCG == isSingle)
    }

    /// What QEMU 7.2 makes of the same options (`info memdev`).
    @Test(arguments: [
        ([], 134_217_728), (["-m", "512"], 536_870_912), (["-m", "2G"], 2 << 30), (["--m", "2g"], 2 << 30),
        (["-m", "1.5G"], 1_610_612_736), (["-m", "1.5k"], 8192), (["-m", "100b"], 8192), (["-m", "size=1000001b"], 1_007_616),
        (["-m", "4097k"], 4_202_496), (["-m", "0"], 134_217_728), (["-m", "size=2G,slots=4,maxmem=8G"], 2 << 30),
        (["-m", "512,slots=2,maxmem=1G"], 512 << 20), (["-m", "512", "-m", "size=1G"], 1 << 30),
        (["-m", "size=1G", "-m", "slots=2,maxmem=4G"], 1 << 30), (["-m", "slots=2,maxmem=1G", "-m", "256"], 256 << 20),
        (["-m", "512M,size=1G"], 1 << 30), (["-m", "slots=2,maxmem=1G"], 128 << 20), (["-M", "memory.size=300M"], 314_572_800),
        (["-M", "memory.size=300M", "-m", "100"], 104_857_600), (["-m", "100", "-M", "memory.size=300M"], 104_857_600),
        (["-m", "1T"], 1 << 40),
    ] as [([String], Int)])
    func readsSize(_ arguments: [String], _ bytes: Int) throws {
        let command = try parse(arguments)
        #expect(command.ramFiles == [.init(id: "quire-ram", byteCount: UInt64(bytes))])
        #expect(command.arguments(ramDescriptors: [100]).contains(ram(bytes)[1]))
    }

    @Test(arguments: ["1x", "", "0.3", "-1", "1GB", "16E"])
    func refusesSize(_ text: String) {
        #expect(refusal("-m", "size=" + text)
            == "-m \(text) is no size that QEMU takes: write a number and one of K M G T, as in -m 2G")
    }

    @Test func anOptionsArgumentIsNoOption() throws {
        #expect(try parse(["-append", "-m", "-kernel", "-daemonize", "-m", "1G"]).ramByteCount == 1 << 30)
        #expect(try parse(["-snapshot", "-m", "1G"]).ramByteCount == 1 << 30)
        #expect(try parse(["-name", "-m"]).ramByteCount == 128 << 20)
        #expect(try parse(["-m"]).ramByteCount == 128 << 20)
        #expect(try parse(["-", "-m", "1G"]).ramByteCount == 1 << 30)
    }

    @Test(arguments: ["memory-backend-ram", "memory-backend-memfd", "qom-type=memory-backend-ram"])
    func rewritesTheMachinesBackend(_ type: String) throws {
        let first = type.hasPrefix("qom") ? "qom-type=memory-backend-file" : "memory-backend-file"
        #expect(try rewrite("-object", "\(type),id=m,size=1G,host-nodes=0-1,policy=bind,dump=off,merge=off,reserve=off",
            "-machine", "q35,memory-backend=m", "-m", "1024")
            == ["-object", "\(first),id=m,size=1G,host-nodes=0-1,policy=bind,dump=off,merge=off,reserve=off,mem-path=/proc/self/fd/100,share=on",
                "-machine", "q35,memory-backend=m", "-m", "1024"] + chardev + disk("bus=pcie.0,addr=1e"))
        #expect(try parse(["-object", "\(type),id=m,size=1G", "-M", "memory-backend=m"]).ramFiles == [.init(id: "m", byteCount: 1 << 30)])
    }

    @Test func replacesAUsersFileAndDropsWhatAFileDoesNotKnow() throws {
        #expect(try rewrite("-M", "memory-backend=m",
            "-object", "memory-backend-file,id=m,mem-path=/dev/shm/a,,b,size=1M,size=64M,share=on,discard-data=on,pmem=off")[3]
            == "memory-backend-file,id=m,size=1M,size=64M,share=on,mem-path=/proc/self/fd/100")
        #expect(try rewrite("-M", "memory-backend=m", "-object", "memory-backend-memfd,id=m,size=64M,seal=on,hugetlb=off,share")[3]
            == "memory-backend-file,id=m,size=64M,share=on,mem-path=/proc/self/fd/100")
    }

    @Test func rewritesJSON() throws {
        #expect(try rewrite("-M", "memory-backend=m", "-object",
            #"{"qom-type":"memory-backend-ram","id":"m","size":1073741824,"host-nodes":[0,1],"policy":"bind","dump":false}"#)[3]
            == #"{"dump":false,"host-nodes":[0,1],"id":"m","mem-path":"/proc/self/fd/100","policy":"bind","qom-type":"memory-backend-file","share":true,"size":1073741824}"#)
        #expect(refusal("-M", "memory-backend=m", "-object", #"{"qom-type":"memory-backend-ram","id":"m","size":1073741824,"share":false}"#)
            == "the memory backend 'm' has share=off, but Quire needs guest RAM that QEMU shares with its backend: remove share=off")
        #expect(refusal("-object", "{x") == "cannot read the JSON of {x: check it with a JSON tool")
    }

    @Test func rewritesEachNUMANode() throws {
        let command = try parse(["-m", "3G", "-object", "memory-backend-ram,id=a,size=1G", "-object", "memory-backend-memfd,id=b,size=2G",
            "-numa", "node,memdev=b,cpus=0", "-numa", "node,nodeid=1,memdev=a", "-numa", "dist,src=0,dst=1,val=20"])
        #expect(command.ramFiles == [.init(id: "b", byteCount: 2 << 30), .init(id: "a", byteCount: 1 << 30)])
        let words = command.arguments(ramDescriptors: [7, 8])
        #expect(words[4] == "memory-backend-file,id=a,size=1G,mem-path=/proc/self/fd/8,share=on")
        #expect(words[6] == "memory-backend-file,id=b,size=2G,mem-path=/proc/self/fd/7,share=on")
        #expect(!words.contains("memory-backend=quire-ram"))
    }

    /// QEMU takes `mem=` only for machines up to 5.0, where it divides the one RAM, and says so itself for others.
    @Test func leavesNodesWithoutABackendToQEMU() throws {
        #expect(try rewrite("-M", "pc-i440fx-5.0", "-m", "256", "-numa", "node,mem=128M", "-numa", "node,mem=128M").suffix(8)
            == (ram(256 << 20) + chardev + pcDisk)[...])
    }

    @Test func rewritesDIMMsAndNoOtherBackends() throws {
        let command = try parse(["-m", "1G,slots=4,maxmem=8G", "-object", "memory-backend-ram,id=d,size=256M", "-device", "pc-dimm,id=x,memdev=d",
            "-object", "memory-backend-file,id=n,size=1G,mem-path=/nv,share=off,pmem=on", "-device", "nvdimm,memdev=n",
            "-object", "memory-backend-file,id=s,size=1M,mem-path=/dev/shm/i,share=on", "-device", "ivshmem-plain,memdev=s",
            "-object", "memory-backend-epc,id=e,size=64M,prealloc=on"])
        #expect(command.ramFiles == [.init(id: "d", byteCount: 256 << 20), .init(id: "quire-ram", byteCount: 1 << 30)])
        let words = command.arguments(ramDescriptors: [100, 101])
        #expect(words[4] == "memory-backend-file,id=d,size=256M,mem-path=/proc/self/fd/100,share=on")
        #expect(words.contains("memory-backend-file,id=n,size=1G,mem-path=/nv,share=off,pmem=on"))
        #expect(words.contains("memory-backend-file,id=s,size=1M,mem-path=/dev/shm/i,share=on"))
        #expect(words.contains("memory-backend-epc,id=e,size=64M,prealloc=on"))
        #expect(words.contains(ram(1 << 30, fd: 101)[1]))
        #expect(try parse(["-object", "memory-backend-ram,id=d,size=256M", "-device", #"{"driver":"pc-dimm","memdev":"d"}"#]).ramFiles.first?.id == "d")
    }

    /// What the guest has of it comes and goes, and all of it is RAM: as with a DIMM.
    @Test(arguments: ["virtio-mem-pci", "virtio-mem"])
    func rewritesVirtioMem(_ driver: String) throws {
        let device = "\(driver),id=x,memdev=v,requested-size=1G"
        let command = try parse(["-m", "1G,maxmem=8G", "-object", "memory-backend-memfd,id=v,size=4G,reserve=off", "-device", device])
        #expect(command.ramFiles == [.init(id: "v", byteCount: 4 << 30), .init(id: "quire-ram", byteCount: 1 << 30)])
        let words = command.arguments(ramDescriptors: [100, 101])
        #expect(words[4] == "memory-backend-file,id=v,size=4G,reserve=off,mem-path=/proc/self/fd/100,share=on")
        #expect(words[6] == device)
        #expect(words.contains(ram(1 << 30, fd: 101)[1]))
        let json = ["-object", "memory-backend-ram,id=v,size=4G", "-device", #"{"driver":"\#(driver)","memdev":"v"}"#]
        #expect(try parse(json).ramFiles.first?.id == "v")
    }
}

struct QEMUCommandLineRefusalTests {
    @Test(arguments: [
        (["-mem-path", "/hugepages"], "-mem-path takes guest RAM away from Quire (and huge pages cannot be given back one by one): remove it"),
        (["-mem-prealloc"], "-mem-prealloc fills all guest RAM at once, which Quire would only have to free again: remove it"),
        (["-overcommit", "cpu-pm=on,mem-lock=on"], "-overcommit mem-lock=on locks guest RAM, so that no page can be given back: remove mem-lock=on"),
        (["-realtime", "mlock=on"], "-realtime mlock=on locks guest RAM, so that no page can be given back: remove it"),
        (["-daemonize"], "-daemonize takes QEMU away from its supervisor: remove it and run quire itself in the background"),
        (["-device", "vfio-pci,host=01:00.0"], "-device vfio-pci pins guest RAM for DMA, so that recycled pages would be lost to the device: remove it or run QEMU without quire"),
        (["-device", #"{"driver":"vfio-pci","host":"01:00.0"}"#], "-device vfio-pci pins guest RAM for DMA, so that recycled pages would be lost to the device: remove it or run QEMU without quire"),
        (["-netdev", "vhost-vdpa,id=n,vhostdev=/dev/x"], "-netdev vhost-vdpa pins guest RAM for DMA, so that recycled pages would be lost to the device: use another network or run QEMU without quire"),
        (["-M", "q35", "-M", "confidential-guest-support=sev0"], "-machine confidential-guest-support= encrypts guest RAM, so that the host cannot take pages back: remove it or run QEMU without quire"),
        (["-machine", "pc,memory-encryption=sev0"], "-machine memory-encryption= encrypts guest RAM, so that the host cannot take pages back: remove it or run QEMU without quire"),
        (["-M", "isapc"], "-machine isapc has no bus for Quire's control disk: use pc, q35 or microvm"),
        (["-M", "none"], "-machine none has no bus for Quire's control disk: use pc, q35 or microvm"),
        (["-readconfig", "memory.cfg"], "-readconfig memory.cfg has a section [memory], which quire does not read: move that to the command line"),
        (["-readconfig", "object.cfg"], "-readconfig object.cfg has 'qom-type = \"memory-backend-ram\"', which quire does not read: move that to the command line"),
        (["-object", "memory-backend-ram,id=quire-ram,size=1G"], "the id quire-ram is Quire's own: give your -object another id"),
        (["-chardev", "null,id=quire-control"], "the id quire-control is Quire's own: give your -chardev another id"),
        (["-device", "virtio-rng-pci,id=quire-control-disk"], "the id quire-control-disk is Quire's own: give your -device another id"),
        (["-M", "memory-backend=m"], "-machine memory-backend= names the memory backend 'm', but there is no -object with that id: add it or remove the name"),
        (["-numa", "node,memdev=m"], "-numa node,memdev= names the memory backend 'm', but there is no -object with that id: add it or remove the name"),
        (["-device", "virtio-mem-pci,memdev=m"], "-device virtio-mem-pci,memdev= names the memory backend 'm', but there is no -object with that id: add it or remove the name"),
        (["-device", "pc-dimm,memdev=m"], "-device pc-dimm,memdev= names the memory backend 'm', but there is no -object with that id: add it or remove the name"),
        (["-object", "memory-backend-ram,id=m,size=1G", "-numa", "node,memdev=m", "-numa", "node,memdev=m"], "the memory backend 'm' is used twice, by -numa node,memdev= and -numa node,memdev=: give each its own"),
        (["-object", "memory-backend-ram,id=m,size=1G", "-M", "memory-backend=m", "-m", "2G"], "-m 2G and the memory backend 'm' of 1G differ: give both the same size"),
        (["-object", "memory-backend-ram,id=m,size=1G", "-numa", "node,memdev=m", "-m", "2G"], "-m 2G and the sum of the NUMA nodes' memory, 1G, differ: use -m 1G"),
        (["-object", "memory-backend-ram,id=m,size=1G", "-numa", "node,memdev=m"], "QEMU's default of 128M and the sum of the NUMA nodes' memory, 1G, differ: use -m 1G"),
    ] as [([String], String)])
    func refuses(_ arguments: [String], _ expected: String) { #expect(message { try parse(arguments) } == expected) }

    @Test(arguments: [
        ("memory-backend-memfd,id=m,size=1G,hugetlb=on", "uses huge pages, which cannot be given back one by one: remove hugetlb and hugetlbsize"),
        ("memory-backend-file,id=m,size=1G,mem-path=/hugepages/x", "is on hugetlbfs (/hugepages/x), whose huge pages cannot be given back one by one: use memory-backend-memfd"),
        ("memory-backend-ram,id=m,size=1G,prealloc=on", "has prealloc=on, which fills all guest RAM at once, only for Quire to free it again: remove it"),
        ("memory-backend-ram,id=m,size=1G,prealloc=yes", "has prealloc=on, which fills all guest RAM at once, only for Quire to free it again: remove it"),
        ("memory-backend-ram,id=m,size=1G,share=off", "has share=off, but Quire needs guest RAM that QEMU shares with its backend: remove share=off"),
        ("memory-backend-ram,id=m,size=1G,noshare", "has share=off, but Quire needs guest RAM that QEMU shares with its backend: remove share=off"),
        ("memory-backend-file,id=m,size=1G,mem-path=/x,readonly=on", "has readonly=on, which is not for RAM that is given back: remove it"),
        ("memory-backend-ram,id=m", "has no size: add size="),
        ("memory-backend-ram,id=m,size=1x", "has size=1x, which is no size that QEMU takes: write a number and one of K M G T"),
        ("memory-backend-epc,id=m,size=1G", "is a memory-backend-epc, which quire cannot replace: use memory-backend-memfd"),
    ])
    func refusesBackend(_ object: String, _ why: String) {
        #expect(refusal("-object", object, "-machine", "memory-backend=m") == "the memory backend 'm' \(why)")
    }

    @Test func lets_pass() throws {
        #expect(try rewrite("-overcommit", "mem-lock=off", "-sandbox", "on", "-runas", "u", "-incoming", "defer", "-loadvm", "x",
            "-readconfig", "plain.cfg", "-readconfig", "missing.cfg", "-realtime", "mlock=off").count == 16 + 8)
    }

    @Test func refusesOtherProgramsAndNone() {
        let none = message { try QEMUCommandLine([], controlSocket: "/c", version: nil) }
        #expect(none == "no QEMU command: put it behind --, as in: quire run -- qemu-system-x86_64 -m 2G …")
        let arm = message { try QEMUCommandLine(["/usr/bin/qemu-system-aarch64"], controlSocket: "/c", version: nil) }
        #expect(arm == "qemu-system-aarch64 is not for x86-64 guests, which are all that Quire knows: use qemu-system-x86_64")
        #expect(message { try QEMUCommandLine(["/opt/kvm"], controlSocket: "/c", version: nil) } == nil)
    }
}

struct QEMUCommandLineDiskTests {
    @Test(arguments: [
        (["-M", "pc"], "bus=pci.0,addr=1f"), (["-M", "pc-i440fx-7.2"], "bus=pci.0,addr=1f"), (["-M", "q35"], "bus=pcie.0,addr=1e"),
        (["-machine", "pc", "-M", "accel=tcg,type=pc-q35-7.2"], "bus=pcie.0,addr=1e"), (["-M", "x-remote"], "addr=1f"),
        (["-M", "pc", "-device", "virtio-blk-pci,drive=d,addr=1f"], "bus=pci.0,addr=1e"),
        (["-M", "pc", "-device", "virtio-blk-pci,drive=d,addr=0x1f.1", "-nic", "user,addr=1e"], "bus=pci.0,addr=1d"),
        (["-M", "q35", "-device", #"{"driver":"virtio-rng-pci","addr":"1e"}"#], "bus=pcie.0,addr=1c"),
    ] as [([String], String)])
    func standsInTheHighestFreeSlot(_ arguments: [String], _ place: String) throws {
        #expect(try parse(arguments).arguments(ramDescriptors: [100]).suffix(2) == disk(place)[...])
    }

    @Test func standsBehindAllBridges() throws {
        #expect(try rewrite("-M", "q35", "-device", "pcie-root-port,id=p", "-device", "virtio-blk-pci,bus=p,drive=d").suffix(4)
            == (["-device", "pcie-root-port,id=quire-port,bus=pcie.0,addr=1e,chassis=250,slot=250,hotplug=off"] + disk("bus=quire-port,addr=0"))[...])
        #expect(try rewrite("-M", "pc", "-device", "pci-bridge,id=b,chassis_nr=1").suffix(4)
            == (["-device", "pci-bridge,id=quire-port,bus=pci.0,addr=1f,chassis_nr=250,shpc=off"] + disk("bus=quire-port,addr=1"))[...])
    }

    @Test func standsOnTheLastTransportOfMicroVM() throws {
        #expect(try rewrite("-M", "microvm").suffix(2)
            == ["-device", "vhost-user-blk,chardev=quire-control,num-queues=1,id=quire-control-disk,bus=virtio-mmio-bus.0"])
        #expect(try rewrite("-M", "microvm", "-device", "virtio-rng-device,bus=virtio-mmio-bus.0").suffix(1)
            == ["vhost-user-blk,chardev=quire-control,num-queues=1,id=quire-control-disk,bus=virtio-mmio-bus.1"])
        let all = ["-M", "microvm"] + (0..<8).flatMap { ["-device", "virtio-rng-device,bus=virtio-mmio-bus.\($0)"] }
        #expect(message { try parse(all) }
            == "there is no virtio-mmio bus left for Quire's disks: leave one of virtio-mmio-bus.0 to .7 free")
    }

    /// The swap disk is a second function of the control disk's slot: right behind it, and in nobody's way.
    @Test func swapDiskStandsBehindTheControlDisk() throws {
        func rewrite(_ arguments: [String]) throws -> [String] {
            try QEMUCommandLine(
                ["qemu"] + arguments, controlSocket: "/run/c", disks: [.init(id: "quire-swap", socket: "/run/s", queueCount: 2)], version: .init(10, 0),
                environment: environment
            ).arguments(ramDescriptors: [100])
        }
        func pair(_ place: String) -> [String] {
            [
                "-chardev", "socket,id=quire-swap,path=/run/s,reconnect-ms=100",
                "-device", "vhost-user-blk-pci,chardev=quire-control,num-queues=1,id=quire-control-disk,\(place).0,multifunction=on",
                "-device", "vhost-user-blk-pci,chardev=quire-swap,num-queues=2,id=quire-swap-disk,\(place).1",
            ]
        }
        #expect(try rewrite(["-m", "1G"]).suffix(6) == pair("bus=pci.0,addr=1f")[...])
        #expect(try rewrite(["-M", "q35"]).suffix(6) == pair("bus=pcie.0,addr=1e")[...])
        #expect(try rewrite(["-M", "q35", "-device", "pcie-root-port,id=p"]).suffix(4) == pair("bus=quire-port,addr=0").suffix(4))
        #expect(try rewrite(["-M", "microvm"]).suffix(4) == [
            "-device", "vhost-user-blk,chardev=quire-control,num-queues=1,id=quire-control-disk,bus=virtio-mmio-bus.1",
            "-device", "vhost-user-blk,chardev=quire-swap,num-queues=2,id=quire-swap-disk,bus=virtio-mmio-bus.0",
        ])
        let eight = (0..<8).map { QEMUCommandLine.Disk(id: QEMUCommandLine.sharedID($0), socket: "/run/\($0)") }
        #expect(
            message { try QEMUCommandLine(["qemu"], controlSocket: "/c", disks: eight, version: nil) }
                == "there is room for 7 disks of Quire's: give fewer --shared-disk")
        #expect(
            try QEMUCommandLine(["qemu"], controlSocket: "/c", disks: Array(eight[..<7]), version: nil).arguments(ramDescriptors: [1]).last
                == "vhost-user-blk-pci,chardev=quire-shared-6,num-queues=1,id=quire-shared-6-disk,bus=pci.0,addr=1f.7")
        #expect(refusal("-device", "virtio-rng-pci,id=quire-swap-disk") == "the id quire-swap-disk is Quire's own: give your -device another id")
        #expect(refusal("-chardev", "null,id=quire-swap") == "the id quire-swap is Quire's own: give your -chardev another id")
        for (arguments, brings) in [([], false), (["-incoming", "defer"], true), (["-loadvm", "s"], true), (["-name", "-incoming"], false)]
            as [([String], Bool)]
        {
            #expect(try parse(arguments).bringsMemory == brings, "\(arguments)")
        }
    }

    @Test func saysWhenNoSlotIsLeft() {
        let full = [0x1f, 0x1e, 0x1d, 0x1c, 0x1b].flatMap { ["-device", "virtio-rng-pci,addr=\(String($0, radix: 16))"] }
        #expect(message { try parse(full) } == "there is no PCI slot left for Quire's control disk: leave one of 1f 1e 1d 1c 1b free")
    }

    @Test func reconnectsAsFastAsTheVersionCan() throws {
        for (version, option) in [(nil, "reconnect=1"), (.init(9, 1), "reconnect=1"), (.init(9, 2), "reconnect-ms=100"), (.init(10, 0), "reconnect-ms=100")]
            as [(QEMUCommandLine.Version?, String)]
        {
            #expect(try parse([], version: version).arguments(ramDescriptors: [1]).contains("socket,id=quire-control,path=/run/c,\(option)"))
        }
        let comma = try QEMUCommandLine(["qemu"], controlSocket: "/a,b", version: nil)
        #expect(comma.arguments(ramDescriptors: [1]).contains("socket,id=quire-control,path=/a,,b,reconnect=1"))
    }

    @Test func readsVersionsAndNames() {
        #expect(QEMUCommandLine.Version(versionOutput: "QEMU emulator version 7.2.22 (Debian 1:7.2)\nCopyright") == .init(7, 2))
        #expect(QEMUCommandLine.Version(versionOutput: "QEMU emulator version 10.0.2\n") == .init(10, 0))
        #expect(QEMUCommandLine.Version(versionOutput: "no QEMU") == nil)
        #expect(QEMUCommandLine.vmName(["q", "-name", "web,process=x"]) == "web")
        #expect(QEMUCommandLine.vmName(["q", "-name", "guest=a b/c,,d,debug-threads=on"]) == "a-b-c-d")
        #expect(QEMUCommandLine.vmName(["q", "-name", ".hidden"]) == "-hidden")
        #expect(QEMUCommandLine.vmName(["q", "-append", "-name", "x"]) == nil)
    }
}
