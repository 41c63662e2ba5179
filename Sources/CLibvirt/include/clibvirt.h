/* SPDX-License-Identifier: Apache-2.0 */
/*
 * libvirt's C API, loaded when it is first used: `quire` has to start on hosts without libvirt, and `quire status` must
 * not wait for the 40 libraries that libvirt.so brings along. The types are those of its headers; functions return what
 * libvirt's do, and an error's text is in clv_error() until the next call of this thread.
 */
#ifndef CLIBVIRT_H
#define CLIBVIRT_H

#include <stdbool.h>
#include <libvirt/libvirt.h>
#include <libvirt/virterror.h>

/* False: libvirt.so.0 isn't there, and clv_error() says why. */
bool clv_load(void);
const char *clv_error(void);

/* All of these need clv_load() to have said true. */
virConnectPtr clv_open(const char *uri);
void clv_close(virConnectPtr connection);
virDomainPtr clv_domain(virConnectPtr connection, const char *name);
void clv_domain_free(virDomainPtr domain);
/* The names of all domains, or of those with a definition, each for clv_free_text, in an array for clv_free_text; -1: an error. */
int clv_names(virConnectPtr connection, bool persistent, char ***names);
/* The same: the UUIDs of those that run. */
int clv_active_uuids(virConnectPtr connection, char ***uuids);
char *clv_xml(virDomainPtr domain, unsigned flags);     /* for clv_free_text */
void clv_free_text(void *text);
int clv_define(virConnectPtr connection, const char *xml); /* 0, or -1 */
int clv_is_active(virDomainPtr domain);
int clv_is_persistent(virDomainPtr domain);
int clv_has_saved_image(virDomainPtr domain);
int clv_detach(virDomainPtr domain, const char *device_xml, unsigned flags);
/* No element: takes the one of this namespace away. */
int clv_set_metadata(virDomainPtr domain, const char *element, const char *prefix, const char *uri, unsigned flags);

/* Events, on one thread: before the connection is opened, after it, and then again and again. */
int clv_use_events(void);                                   /* 0, or -1 */
int clv_follow(virConnectPtr connection);                   /* 0, or -1 */
/* Waits until a domain has stopped or is undefined (1), at most so long (0); -1: libvirtd has gone. */
int clv_await(virConnectPtr connection, int milliseconds);

#endif
