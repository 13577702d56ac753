/* SPDX-License-Identifier: Apache-2.0 */
/*
 * hook.c - a function of ours in place of one that a shared library calls in another: the slots by which the library calls
 * it (its global offset table) are written anew. Only that library is changed, and only in this process.
 *
 * Read first: the ELF gABI, "Dynamic Linking"; ld.so(8); dl_iterate_phdr(3).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <link.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "eth/port.h"

struct library {
    const char *name; /* a part of its path */
    ElfW(Addr) base, relro, relro_end;
    const ElfW(Dyn) * dynamic;
};

static int find_library(struct dl_phdr_info *info, size_t size, void *out)
{
    struct library *l = out;

    (void)size;
    if (!info->dlpi_name || !strstr(info->dlpi_name, l->name)) {
        return 0;
    }
    l->base = info->dlpi_addr;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const ElfW(Phdr) *p = &info->dlpi_phdr[i];

        if (p->p_type == PT_DYNAMIC) {
            l->dynamic = (const void *)(l->base + p->p_vaddr);
        } else if (p->p_type == PT_GNU_RELRO) {
            l->relro = l->base + p->p_vaddr;
            l->relro_end = l->relro + p->p_memsz;
        }
    }
    return 1;
}

static ElfW(Xword) value_of(const struct library *l, ElfW(Sxword) tag)
{
    for (const ElfW(Dyn) *d = l->dynamic; d->d_tag != DT_NULL; d++) {
        if (d->d_tag == tag) {
            return d->d_un.d_val;
        }
    }
    return 0;
}

/* The loader has added the base to these, but not on every machine. */
static const void *table_of(const struct library *l, ElfW(Sxword) tag)
{
    ElfW(Addr) at = value_of(l, tag);

    return (const void *)(at && at < l->base ? at + l->base : at);
}

/* The loader has made the slots read-only behind itself, up to the last whole page. */
static int write_slot(const struct library *l, void **slot, void *value)
{
    ElfW(Addr) page = (ElfW(Addr))sysconf(_SC_PAGESIZE), at = (ElfW(Addr))slot & ~(page - 1);
    bool sealed = (ElfW(Addr))slot >= l->relro && (ElfW(Addr))slot < (l->relro_end & ~(page - 1));

    if (sealed && mprotect((void *)at, page, PROT_READ | PROT_WRITE) < 0) {
        return -errno;
    }
    __atomic_store_n(slot, value, __ATOMIC_RELEASE);
    return sealed && mprotect((void *)at, page, PROT_READ) < 0 ? -errno : 0;
}

/* Slots of that name among n relocations, written if `write`. Their number; or -errno. */
static int slots(const struct library *l, const ElfW(Rela) * r, size_t n, const struct hook *hook, bool write)
{
    const ElfW(Sym) *symbols = table_of(l, DT_SYMTAB);
    const char *names = table_of(l, DT_STRTAB);
    int found = 0;

    for (size_t i = 0; i < n; i++) {
        size_t symbol = sizeof(void *) == 8 ? r[i].r_info >> 32 : r[i].r_info >> 8;
        int err;

        if (symbol == 0 || strcmp(names + symbols[symbol].st_name, hook->name) != 0) {
            continue;
        }
        err = write ? write_slot(l, (void **)(l->base + r[i].r_offset), hook->with) : 0;
        if (err < 0) {
            return err;
        }
        found++;
    }
    return found;
}

static int all_slots(const struct library *l, const struct hook *hook, bool write)
{
    size_t size = sizeof(ElfW(Rela));
    int lazy = slots(l, table_of(l, DT_JMPREL), value_of(l, DT_PLTRELSZ) / size, hook, write);
    int eager = slots(l, table_of(l, DT_RELA), value_of(l, DT_RELASZ) / size, hook, write);

    return lazy < 0 || eager < 0 ? (lazy < 0 ? lazy : eager) : lazy + eager;
}

int hook_calls(const char *name, const struct hook *hooks, size_t n)
{
    struct library l = {.name = name};

    if (!dl_iterate_phdr(find_library, &l) || !l.dynamic) {
        return -ENOENT;
    }
    if (value_of(&l, DT_PLTREL) != DT_RELA) {
        return -ENOTSUP; /* 32-bit machines have another kind of relocations */
    }
    for (size_t i = 0; i < n; i++) { /* all of them, or none: a half of them would be worse */
        if (all_slots(&l, &hooks[i], false) == 0) {
            return -ENOSYS;
        }
    }
    for (size_t i = 0; i < n; i++) {
        int err = all_slots(&l, &hooks[i], true);

        if (err < 0) {
            return err;
        }
    }
    return 0;
}
