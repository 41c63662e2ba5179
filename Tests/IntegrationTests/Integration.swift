import Testing

/// Everything that needs a guest: real kernels under real QEMU, one after the other: two of them at once would share
/// a small machine's two cores. What each suite proves stands above it.
@Suite(.serialized) enum Integration {}
