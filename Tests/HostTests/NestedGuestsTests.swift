import Host
import Testing

struct NestedGuestsTests {
    private static let intel = NestedGuests(vmx: true, svm: false), amd = NestedGuests(vmx: false, svm: true)

    private func mayRun(_ host: NestedGuests, _ arguments: String, program: String = "/usr/bin/qemu-system-x86_64") -> Bool {
        host.mayRun(arguments: [program] + arguments.split(separator: " ").map(String.init))
    }

    @Test(arguments: [
        "-accel kvm -cpu host", "-enable-kvm -cpu max", "-machine q35,accel=kvm:tcg -cpu host,-svm", "-M pc,accel=kvm -cpu Broadwell,vmx=on",
        "-accel kvm -cpu Broadwell,+vmx", "-accel kvm -cpu Broadwell,vmx", "-accel kvm -cpu qemu64 -global qemu64-x86_64-cpu.vmx=on",
        "-accel kvm -cpu host,vmx=off,+vmx", "-accel tcg -accel kvm -cpu host,migratable=on",
    ])
    func aGuestThatMay(_ arguments: String) { #expect(mayRun(Self.intel, arguments)) }

    @Test(arguments: [
        "-accel tcg -cpu max", "-cpu host", "-accel kvm", "-accel kvm -cpu Broadwell", "-accel kvm -cpu host,vmx=off", "-accel kvm -cpu host,-vmx,+svm",
        "-enable-kvm -cpu Broadwell,vmx=off -no-reboot", "-accel kvm -name vmx -cpu EPYC,hv-vapic",
    ])
    func oneThatMayNot(_ arguments: String) {
        #expect(!mayRun(Self.intel, arguments))
        #expect(!mayRun(NestedGuests(vmx: false, svm: false), arguments))
    }

    @Test func onAMD() {
        #expect(mayRun(Self.amd, "-accel kvm -cpu host,vmx=off"))
        #expect(!mayRun(Self.amd, "-accel kvm -cpu host,svm=off"))
        #expect(!mayRun(Self.amd, "-accel kvm -cpu EPYC"))
        #expect(mayRun(Self.amd, "-accel kvm -cpu EPYC,svm=on"))
        // As a program that emulates nothing.
        #expect(mayRun(Self.amd, "-cpu host", program: "/usr/libexec/qemu-kvm"))
    }

    /// One that cannot be asked may run anything; of a host that lets nobody there is nothing to ask.
    @Test func aQEMUThatIsGone() {
        #expect(NestedGuests.mayRun(process: 0, host: Self.intel))
        #expect(!NestedGuests.mayRun(process: 0, host: NestedGuests(vmx: false, svm: false)))
    }
}
