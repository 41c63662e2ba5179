# Two commands: `make demo` and `make test`. Each does everything it needs on a fresh Debian 12 with Swift: installs
# missing Debian packages, builds, prepares guest kernels in a cache outside of the clone.
#
#   make demo            a guest frees memory, the host has it back: watch it happen
#   make test            everything that CI runs
#   make soak            the same tests for longer (FACTOR=20)
#   make bench-recycle   the recycle engine and the guest module against their bars (BENCH=--quick: a shorter run)
#   make bench-dedup     merging beside the kernel's own (KSM), as root; needs 8 GiB free (BENCH=--quick: a shorter run)
#   make bench-tmem      transcendent memory beside the host's zram, as root (BENCH=--quick: a shorter run)
#   make bench-status    quire status, /metrics and idle cost with 500 VMs; a domain's start (as root; no guests needed)
#   make build           the programs, in .build/release; the agent, in build/agent
#   make guest           what test guests boot, in build/guest
#   make install         into DESTDIR/PREFIX
#   make deb             Debian packages, in build/deb; `make test-deb` tries them and the services in Debian 12
#   make doc             a site of the libraries' documentation, in build/doc
#   make clean

SWIFT ?= swift
PREFIX ?= /usr/local
DESTDIR ?=
# One build configuration for everything. The programs need no Swift where they are installed (Package.swift).
BUILD := $(SWIFT) build -c release
BIN := .build/release

# In QEMU there is no Swift runtime, so this is linked by hand. -z now: the agent's windows must not meet the dynamic linker.
AGENT := build/agent/libquire-agent.so
AGENT_CFLAGS := -O2 -g -Wall -Wextra -fPIC -fvisibility=hidden -ISources/QuireAgent/include -ISources/CQuireLayout/include \
	-ISources/CPlatform/include

.PHONY: build agent guest assets prerequisites test-prerequisites demo test tests soak bench-recycle bench-dedup bench-tmem \
	bench-status install install-files deb test-deb doc clean

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

bench-tmem: build guest
	$(BUILD) --product quire-bench
	@$(BIN)/quire-bench tmem --guests build/guest $(BENCH)

bench-status: build
	$(BUILD) --product quire-bench
	@$(BIN)/quire-bench status $(BENCH)

install: build install-files

# What is built already. For a host's own PREFIX the configuration goes to /etc, where Quire, and libvirt for its hooks, look for it.
SYSCONFDIR ?= $(if $(filter /usr /usr/local,$(PREFIX)),/etc,$(PREFIX)/etc)
PLACED = sed 's,@PREFIX@,$(PREFIX),g; s,/usr/\(bin\|lib\)/\(lib\)\?quire,$(PREFIX)/\1/\2quire,g'
SHARE := $(DESTDIR)$(PREFIX)/share
LIB := $(DESTDIR)$(PREFIX)/lib
ZSH := $(SHARE)/zsh/$(if $(filter /usr,$(PREFIX)),vendor-completions,site-functions)

install-files:
	install -d $(DESTDIR)$(PREFIX)/bin $(LIB)/quire $(SHARE)/qemu/vhost-user $(SHARE)/doc/quire/examples \
		$(LIB)/systemd/system $(LIB)/sysctl.d $(LIB)/udev/rules.d $(LIB)/sysusers.d $(LIB)/tmpfiles.d \
		$(DESTDIR)$(SYSCONFDIR)/libvirt/hooks/qemu.d $(DESTDIR)$(SYSCONFDIR)/quire $(SHARE)/man/man1 $(SHARE)/bash-completion/completions \
		$(ZSH) $(SHARE)/fish/vendor_completions.d
	install -m 755 $(BIN)/quire $(BIN)/quire-backend $(BIN)/quired $(BIN)/quire-exporter $(DESTDIR)$(PREFIX)/bin/
	install -m 755 $(AGENT) $(LIB)/quire/
	$(PLACED) qemu-config/50-quire.json > $(SHARE)/qemu/vhost-user/50-quire.json
	for unit in quired.service quire-backend@.service quire-exporter.service quire-sweep.service; do \
		$(PLACED) packaging/systemd/$$unit > $(LIB)/systemd/system/$$unit || exit 1; done
	install -m 644 packaging/sysctl.conf $(LIB)/sysctl.d/50-quire.conf
	install -m 644 packaging/udev.rules $(LIB)/udev/rules.d/60-quire.rules
	install -m 644 packaging/sysusers.conf $(LIB)/sysusers.d/quire.conf
	install -m 644 packaging/tmpfiles.conf $(LIB)/tmpfiles.d/quire.conf
	$(PLACED) qemu-config/libvirt-hook > $(DESTDIR)$(SYSCONFDIR)/libvirt/hooks/qemu.d/quire
	chmod 755 $(DESTDIR)$(SYSCONFDIR)/libvirt/hooks/qemu.d/quire
	@mkdir -p build
	$(BIN)/quire config template > build/quire.toml
	@# What somebody has written there stays.
	[ -e $(DESTDIR)$(SYSCONFDIR)/quire/quire.toml ] || install -m 644 build/quire.toml $(DESTDIR)$(SYSCONFDIR)/quire/quire.toml
	install -m 644 build/quire.toml $(SHARE)/doc/quire/examples/quire.toml
	for example in qemu-config/domain.xml packaging/apparmor-libvirt-qemu packaging/apparmor-libvirtd packaging/selinux/quire.te \
		packaging/selinux/quire.fc qemu-config/prometheus-alerts.yml qemu-config/grafana-dashboard.json; do \
		$(PLACED) $$example > $(SHARE)/doc/quire/examples/$$(basename $$example) || exit 1; done
	@# What they link to in a clone lies in examples there; sources stay in the clone.
	for page in operator run metrics merge tmem threat-model control-disk; do \
		sed 's,](\.\./\(packaging\|qemu-config\)/\([^)]*/\)\?\([^)/]*\)),](examples/\3),g; s,\[\([^]]*\)\](\.\./Sources/[^)]*),\1,g' docs/$$page.md > $(SHARE)/doc/quire/$$page.md || exit 1; done
	install -m 644 docs/openapi.json $(SHARE)/doc/quire/
	for program in quire quire-backend quired quire-exporter; do \
		scripts/manual $(BIN)/$$program > $(SHARE)/man/man1/$$program.1 && \
		$(BIN)/$$program --generate-completion-script bash > $(SHARE)/bash-completion/completions/$$program && \
		$(BIN)/$$program --generate-completion-script zsh > $(ZSH)/_$$program && \
		$(BIN)/$$program --generate-completion-script fish > $(SHARE)/fish/vendor_completions.d/$$program.fish || exit 1; done

deb: build
	@scripts/package build/deb

# Installs, uses and purges the packages in a fresh Debian 12, and boots one with the services, as root.
test-deb: test-prerequisites agent guest deb
	$(BUILD) --product disk-client
	@scripts/test-package build/deb
	@scripts/test-services build/deb

doc: build
	@scripts/documentation build/doc

clean:
	rm -rf .build build
