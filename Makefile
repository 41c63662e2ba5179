# Two commands: `make demo` and `make test`. Each does everything it needs on a fresh Debian 12 with Swift: installs
# missing Debian packages, builds, prepares guest kernels in a cache outside of the clone.
#
#   make demo            a guest frees memory, the host has it back: watch it happen
#   make test            everything that CI runs
#   make soak            the same tests for longer (FACTOR=20)
#   make bench-recycle   the recycle engine and the guest module against their bars (BENCH=--quick: a shorter run)
#   make bench-dedup     merging beside the kernel's own (KSM), as root; needs 8 GiB free (BENCH=--quick: a shorter run)
#   make bench-status    quire status, /metrics and idle cost with 500 VMs (no guests needed)
#   make build           the programs, in .build/release; the agent, in build/agent
#   make guest           what test guests boot, in build/guest
#   make install         into DESTDIR/PREFIX
#   make clean

SWIFT ?= swift
PREFIX ?= /usr/local
DESTDIR ?=
# One build configuration for everything.
BUILD := $(SWIFT) build -c release
BIN := .build/release

# In QEMU there is no Swift runtime, so this is linked by hand. -z now: the agent's windows must not meet the dynamic linker.
AGENT := build/agent/libquire-agent.so
AGENT_CFLAGS := -O2 -g -Wall -Wextra -fPIC -fvisibility=hidden -ISources/QuireAgent/include -ISources/CQuireLayout/include \
	-ISources/CPlatform/include

.PHONY: build agent guest assets prerequisites test-prerequisites demo test tests soak bench-recycle bench-dedup bench-status \
	install clean

build: prerequisites agent
	$(BUILD) --product quire
	$(BUILD) --product quire-backend
	$(BUILD) --product quired
	$(BUILD) --product quire-exporter
	install -m 755 $(AGENT) $(BIN)/

agent: $(AGENT)

$(AGENT): $(wildcard Sources/QuireAgent/*.[ch] Sources/QuireAgent/include/*.h Sources/CQuireLayout/include/*.h \
	Sources/CPlatform/include/pagemap_scan.h)
	@mkdir -p $(@D)
	$(CC) $(AGENT_CFLAGS) -shared -Wl,-z,now -Wl,-z,defs -o $@ $(filter %.c,$^) -lpthread -ldl

prerequisites:
	@scripts/prerequisites

# With what only tests need: a browser, among others.
test-prerequisites:
	@scripts/prerequisites --tests

assets: prerequisites
	@scripts/guest-assets

guest: assets
	@scripts/guest-build

demo: build guest
	@scripts/demo

# Guests and tests are built side by side: neither keeps two cores busy.
test: test-prerequisites
	@$(MAKE) --no-print-directory -j2 guest tests
	@scripts/test

tests: test-prerequisites agent
	$(BUILD) --build-tests
	install -m 755 $(AGENT) $(BIN)/

soak: export QUIRE_TEST_FACTOR := $(or $(FACTOR),20)
soak: test

bench-recycle: build guest
	$(BUILD) --product quire-bench
	@$(BIN)/quire-bench recycle --guests build/guest $(BENCH)

bench-dedup: build guest
	$(BUILD) --product quire-bench
	@$(BIN)/quire-bench dedup --guests build/guest $(BENCH)

bench-status: build
	$(BUILD) --product quire-bench
	@$(BIN)/quire-bench status $(BENCH)

install: build
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/share/qemu/vhost-user
	install -d $(DESTDIR)$(PREFIX)/lib/quire
	install -m 755 $(BIN)/quire $(BIN)/quire-backend $(BIN)/quired $(BIN)/quire-exporter $(DESTDIR)$(PREFIX)/bin/
	install -m 755 $(AGENT) $(DESTDIR)$(PREFIX)/lib/quire/
	sed 's,@PREFIX@,$(PREFIX),' qemu-config/50-quire.json > $(DESTDIR)$(PREFIX)/share/qemu/vhost-user/50-quire.json

clean:
	rm -rf .build build
