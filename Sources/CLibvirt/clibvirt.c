/* SPDX-License-Identifier: Apache-2.0 */
#include "clibvirt.h"
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define FUNCTIONS(F) \
	F(virConnectOpen) F(virConnectClose) F(virConnectListAllDomains) F(virDomainLookupByName) F(virDomainFree) \
	F(virDomainGetName) F(virDomainGetXMLDesc) F(virDomainDefineXMLFlags) F(virDomainIsActive) F(virDomainIsPersistent) \
	F(virDomainHasManagedSaveImage) F(virDomainDetachDeviceFlags) F(virDomainSetMetadata) F(virGetLastErrorMessage) \
	F(virSetErrorFunc) F(virDomainGetUUIDString) F(virConnectIsAlive) F(virConnectDomainEventRegisterAny) \
	F(virEventRegisterDefaultImpl) F(virEventRunDefaultImpl) F(virEventAddTimeout) F(virEventRemoveTimeout)

#define POINTER(name) static __typeof__(name) *p_##name;
FUNCTIONS(POINTER)

static char reason[256];
static bool loaded;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void be_quiet(void *nothing, virErrorPtr error) { (void)nothing; (void)error; }

static void load(void)
{
	void *library = dlopen("libvirt.so.0", RTLD_NOW | RTLD_LOCAL);
	if (!library) {
		snprintf(reason, sizeof reason, "%s", dlerror());
		return;
	}
#define RESOLVE(name) \
	p_##name = (__typeof__(p_##name))dlsym(library, #name); \
	if (!p_##name) { \
		snprintf(reason, sizeof reason, "libvirt.so.0 has no " #name); \
		return; \
	}
	FUNCTIONS(RESOLVE)
	/* It would print every error by itself. */
	p_virSetErrorFunc(NULL, be_quiet);
	loaded = true;
}

bool clv_load(void)
{
	pthread_once(&once, load);
	return loaded;
}

const char *clv_error(void) { return loaded ? p_virGetLastErrorMessage() : reason; }

virConnectPtr clv_open(const char *uri) { return p_virConnectOpen(uri); }
void clv_close(virConnectPtr connection) { p_virConnectClose(connection); }
virDomainPtr clv_domain(virConnectPtr connection, const char *name) { return p_virDomainLookupByName(connection, name); }
void clv_domain_free(virDomainPtr domain) { p_virDomainFree(domain); }
char *clv_xml(virDomainPtr domain, unsigned flags) { return p_virDomainGetXMLDesc(domain, flags); }
void clv_free_text(void *text) { free(text); }
int clv_is_active(virDomainPtr domain) { return p_virDomainIsActive(domain); }
int clv_is_persistent(virDomainPtr domain) { return p_virDomainIsPersistent(domain); }
int clv_has_saved_image(virDomainPtr domain) { return p_virDomainHasManagedSaveImage(domain, 0); }

static int list(virConnectPtr connection, unsigned flags, bool uuids, char ***texts)
{
	virDomainPtr *domains = NULL;
	int count = p_virConnectListAllDomains(connection, &domains, flags);
	if (count < 0) return -1;
	*texts = calloc((size_t)count + 1, sizeof **texts);
	if (!*texts) abort();
	for (int i = 0; i < count; i++) {
		char uuid[VIR_UUID_STRING_BUFLEN] = "";
		if (uuids) p_virDomainGetUUIDString(domains[i], uuid);
		if (!((*texts)[i] = strdup(uuids ? uuid : p_virDomainGetName(domains[i])))) abort();
		p_virDomainFree(domains[i]);
	}
	free(domains);
	return count;
}

int clv_names(virConnectPtr connection, bool persistent, char ***names)
{
	return list(connection, persistent ? VIR_CONNECT_LIST_DOMAINS_PERSISTENT : 0, false, names);
}

int clv_active_uuids(virConnectPtr connection, char ***uuids)
{
	return list(connection, VIR_CONNECT_LIST_DOMAINS_ACTIVE, true, uuids);
}

/* Written by callbacks, which run in clv_await. */
static bool happened;

static int note(virConnectPtr connection, virDomainPtr domain, int event, int detail, void *nothing)
{
	(void)connection; (void)domain; (void)detail; (void)nothing;
	if (event == VIR_DOMAIN_EVENT_STOPPED || event == VIR_DOMAIN_EVENT_CRASHED || event == VIR_DOMAIN_EVENT_UNDEFINED)
		happened = true;
	return 0;
}

static void time_over(int timer, void *over) { (void)timer; *(bool *)over = true; }

int clv_use_events(void)
{
	static bool used;
	if (!used && p_virEventRegisterDefaultImpl() < 0) return -1;
	used = true;
	return 0;
}

int clv_follow(virConnectPtr connection)
{
	happened = false;
	return p_virConnectDomainEventRegisterAny(connection, NULL, VIR_DOMAIN_EVENT_ID_LIFECYCLE,
						  VIR_DOMAIN_EVENT_CALLBACK(note), NULL, NULL) < 0 ? -1 : 0;
}

int clv_await(virConnectPtr connection, int milliseconds)
{
	bool over = false;
	int timer = p_virEventAddTimeout(milliseconds, time_over, &over, NULL);
	if (timer < 0) return -1;
	while (!over && !happened && p_virConnectIsAlive(connection) == 1)
		if (p_virEventRunDefaultImpl() < 0) break;
	p_virEventRemoveTimeout(timer);
	bool seen = happened;
	happened = false;
	return p_virConnectIsAlive(connection) == 1 ? seen : -1;
}

int clv_define(virConnectPtr connection, const char *xml)
{
	virDomainPtr domain = p_virDomainDefineXMLFlags(connection, xml, 0);
	if (!domain) return -1;
	p_virDomainFree(domain);
	return 0;
}

int clv_detach(virDomainPtr domain, const char *device_xml, unsigned flags)
{
	return p_virDomainDetachDeviceFlags(domain, device_xml, flags);
}

int clv_set_metadata(virDomainPtr domain, const char *element, const char *prefix, const char *uri, unsigned flags)
{
	return p_virDomainSetMetadata(domain, VIR_DOMAIN_METADATA_ELEMENT, element, prefix, uri, flags);
}
