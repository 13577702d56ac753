/* SPDX-License-Identifier: Apache-2.0 */
/*
 * load.c - finds and loads the DPDK plug-in. A loaded plug-in stays: DPDK can be started once in a process and leaves
 * threads, so that there is no way back from it.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "dpdk_backend/load.h"

enum { PATH_BYTES = 1024 };

static const char file_name[] = "bypass-dpdk.so";

/* From the folder of the code that is running. A package in a prefix lies in lib/pythonX/site-packages/bypass. */
static const char *const places[] = {"", "../build/", "../", "../../../bypass/"};
static const char *const prefixes[] = {"/usr/local/lib/bypass/", "/usr/lib/bypass/"};

__attribute__((format(printf, 3, 4))) static const struct dpdk_plugin *refuse(struct dpdk_error *error, int err,
                                                                              const char *format, ...)
{
    va_list args;

    va_start(args, format);
    vsnprintf(error->text, sizeof error->text, format, args);
    va_end(args);
    error->err = err;
    return NULL;
}

/* The folder that holds this code, with a slash at its end; empty when nobody knows. */
static void own_folder(char *out)
{
    Dl_info info;
    char *end;

    *out = 0;
    if (dladdr((void *)(uintptr_t)dpdk_load, &info) && info.dli_fname && strlen(info.dli_fname) < PATH_BYTES) {
        strcpy(out, info.dli_fname);
        end = strrchr(out, '/');
        end ? (void)(end[1] = 0) : (void)(*out = 0);
    }
}

static int there(char *out, const char *folder, const char *place)
{
    return snprintf(out, PATH_BYTES, "%s%s%s", folder, place, file_name) < PATH_BYTES && access(out, R_OK) == 0;
}

static int find(char *out)
{
    char folder[PATH_BYTES];
    const char *named = secure_getenv("BYPASS_DPDK");

    if (named && *named) {
        return snprintf(out, PATH_BYTES, "%s", named) < PATH_BYTES;
    }
    own_folder(folder);
    for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
        if (*folder && there(out, folder, places[i])) {
            return 1;
        }
    }
    for (size_t i = 0; i < sizeof prefixes / sizeof *prefixes; i++) {
        if (there(out, prefixes[i], "")) {
            return 1;
        }
    }
    return 0;
}

/* dlopen() says in words only what is missing: DPDK's libraries, or the file itself. */
static const struct dpdk_plugin *cannot_load(struct dpdk_error *error, const char *path)
{
    const char *why = dlerror();

    why = why ? why : "unknown error";
    if (access(path, R_OK) != 0) {
        return refuse(error, ENOENT, "the DPDK plug-in %s cannot be read: %s", path, strerror(errno));
    }
    if (strstr(why, "librte_")) {
        return refuse(error, ELIBACC, "the DPDK plug-in %s does not find DPDK's libraries (%s): apt-get install dpdk",
                      path, why);
    }
    return refuse(error, ELIBBAD, "the DPDK plug-in cannot be loaded: %s", why);
}

const struct dpdk_plugin *dpdk_load(const char *path, struct dpdk_error *error)
{
    char found[PATH_BYTES];
    const struct dpdk_plugin *table;
    void *so;

    memset(error, 0, sizeof *error);
    if (!path && !find(found)) {
        return refuse(error, ENOENT,
                      "there is no DPDK plug-in (%s): it is built when DPDK is there: apt-get install "
                      "--no-install-recommends dpdk-dev, then make build; where it is only run, dpdk is enough",
                      file_name);
    }
    path = path ? path : found;
    so = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!so) {
        return cannot_load(error, path);
    }
    table = dlsym(so, "bypass_dpdk_plugin");
    if (!table || table->abi != DPDK_PLUGIN_ABI) {
        refuse(error, ELIBBAD, "%s is the plug-in of another build (its interface is number %u, ours %d): make build",
               path, table ? table->abi : 0, DPDK_PLUGIN_ABI);
        dlclose(so);
        return NULL;
    }
    return table;
}
