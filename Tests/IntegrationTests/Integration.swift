import Testing

/// Everything that needs a guest: real kernels under real QEMU, one after the other in each of the two streams that
/// scripts/test runs. What each suite proves stands above it.
@Suite(.serialized) enum Integration {}
