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
	F(virSetErrorFunc)

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

int clv_names(virConnectPtr connection, char ***names)
{
	virDomainPtr *domains = NULL;
	int count = p_virConnectListAllDomains(connection, &domains, 0);
	if (count < 0) return -1;
	*names = calloc((size_t)count + 1, sizeof **names);
	if (!*names) abort();
	for (int i = 0; i < count; i++) {
		if (!((*names)[i] = strdup(p_virDomainGetName(domains[i])))) abort();
		p_virDomainFree(domains[i]);
	}
	free(domains);
	return count;
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

int clv_forget_metadata(virDomainPtr domain, const char *uri, unsigned flags)
{
	return p_virDomainSetMetadata(domain, VIR_DOMAIN_METADATA_ELEMENT, NULL, NULL, uri, flags);
}
