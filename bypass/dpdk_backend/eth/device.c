/* SPDX-License-Identifier: Apache-2.0 */
/*
 * device.c - from devargs to a port of ethdev, and back: what the device is called, whether its driver lets go of it, the
 * members of a bonding device.
 *
 * A bonding device names its members in its own devargs, each a device of its own, with arguments in parentheses:
 *     net_bonding0,mode=1,slave=(net_af_packet0,iface=eth1),slave=0000:03:00.0
 */
#define _GNU_SOURCE
#include <ctype.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include <rte_dev.h>

#include "eth/port.h"

/* Of net_af_packet's ring: at least as many as it has by itself, and of locked memory no more than this each way. */
#define LEAST_PACKETS 512u
#define PACKET_RING_BYTES (8u << 20)

pthread_mutex_t device_lock = PTHREAD_MUTEX_INITIALIZER;

/* ---- Names ------------------------------------------------------------------------------------------------- */
/* The device's name within EAL: "net_ring0" of "vdev:net_ring0,nodeaction=...", the long form of a PCI address. */
static void device_name(const char *devargs, char *out)
{
    size_t n = strcspn(devargs, ",");
    unsigned domain = 0, bus, dev, fn;
    char end;

    for (const char *prefix = "vdev:\0pci:\0"; *prefix; prefix += strlen(prefix) + 1) {
        if (strncmp(devargs, prefix, strlen(prefix)) == 0) {
            devargs += strlen(prefix);
            n -= strlen(prefix);
            break;
        }
    }
    n = n < RTE_ETH_NAME_MAX_LEN - 1 ? n : RTE_ETH_NAME_MAX_LEN - 1;
    memcpy(out, devargs, n);
    out[n] = 0;
    if (sscanf(out, "%x:%x:%x.%x%c", &domain, &bus, &dev, &fn, &end) == 4 ||
        (domain = 0, sscanf(out, "%x:%x.%x%c", &bus, &dev, &fn, &end) == 3)) {
        snprintf(out, RTE_ETH_NAME_MAX_LEN, "%04x:%02x:%02x.%x", domain, bus, dev, fn);
    }
}

bool device_is_af_packet(const char *name) { return strncmp(name, "net_af_packet", 13) == 0; }
bool device_is_pci(const char *name) { return isxdigit((unsigned char)name[0]) && strchr(name, ':'); }

/* ---- Probing ------------------------------------------------------------------------------------------------ */

/* A PCI device has to be with a driver that lets go of it, or one that shares (NVIDIA's). */
static int check_pci(const char *name, struct dpdk_error *error)
{
    static const char *const right[] = {"vfio-pci", "uio_pci_generic", "igb_uio", "mlx4_core", "mlx5_core"};
    char link[128], target[256];
    const char *driver;
    ssize_t n;

    snprintf(link, sizeof link, "/sys/bus/pci/devices/%s", name);
    if (access(link, F_OK) != 0) {
        return complain(error, ENODEV, "there is no PCI device %s: bypass nic list shows those that are there", name);
    }
    snprintf(link, sizeof link, "/sys/bus/pci/devices/%s/driver", name);
    n = readlink(link, target, sizeof target - 1);
    target[n > 0 ? n : 0] = 0;
    driver = n > 0 ? strrchr(target, '/') + 1 : "no driver";
    for (size_t i = 0; i < sizeof right / sizeof *right; i++) {
        if (strcmp(driver, right[i]) == 0) {
            return 0;
        }
    }
    return complain(error, EBUSY, "%s is bound to %s: DPDK needs vfio-pci there: bypass nic bind %s", name, driver,
                    name);
}

/* Of EAL's name; -1: none. A PCI device may have ports named after it. */
static int port_id(const char *name)
{
    uint16_t id;

    if (rte_eth_dev_get_port_by_name(name, &id) == 0) {
        return id;
    }
    RTE_ETH_FOREACH_DEV(id)
    {
        struct rte_eth_dev_info info;

        if (rte_eth_dev_info_get(id, &info) == 0 && strcmp(rte_dev_name(info.device), name) == 0) {
            return id;
        }
    }
    return -1;
}

/* Drivers of virtual devices say -1, which is -EPERM, whatever was wrong; what they log says more. */
static int probe_error(int err, const char *why)
{
    if (err >= 0 || (err == -EPERM && !strstr(why, strerror(EPERM)))) {
        return ENODEV;
    }
    return -err;
}

/* Two ports of memif may share a listener, which serves the first already. */
static int probe_alone(const char *devargs)
{
    int err;

    guard_hold();
    err = rte_dev_probe(devargs);
    guard_release();
    return err;
}

/* The port of these devargs, or a negative errno. */
static int probe(const char *devargs, char *name, struct dpdk_error *error)
{
    int err, id;

    device_name(devargs, name);
    if (port_id(name) >= 0) {
        return -complain(error, EBUSY, "%s is open in this process already: close it first, or use another name", name);
    }
    if (device_is_pci(name) && check_pci(name, error)) {
        return -error->err;
    }
    if (device_is_memif(name) && guard_install(error, devargs)) {
        return -error->err;
    }
    if (device_is_af_packet(name)) {
        wake_remember();
    }
    log_mark();
    err = device_is_memif(name) ? probe_alone(devargs) : rte_dev_probe(devargs);
    id = port_id(name);
    if (err < 0 || id < 0) {
        const char *why = *log_why() ? log_why() : "no driver takes it";

        if (device_is_pci(name)) {
            return -complain(error, err < 0 ? -err : ENODEV,
                             "%s: %s (is DPDK started with this device allowed, and its "
                             "IOMMU group free?)",
                             name, why);
        }
        return -complain(error, probe_error(err, why), "there is no DPDK device %s: %s", devargs, why);
    }
    return id;
}

void device_close(uint16_t id, struct rte_device *device)
{
    rte_eth_dev_stop(id);
    link_stopped(id);
    rte_eth_dev_close(id);
    rte_dev_remove(device);
}

void device_unplug(uint16_t id)
{
    struct rte_eth_dev_info info;

    if (rte_eth_dev_info_get(id, &info) == 0) {
        device_close(id, info.device);
    }
}

static void argument_unless_given(char *devargs, size_t size, const char *name, uint32_t value)
{
    size_t at = strlen(devargs);

    if (!strstr(devargs, name)) {
        snprintf(devargs + at, size - at, ",%s%u", name, value);
    }
}

/* What a policy says of rings and frames, for a driver that is told by its device's arguments: the kernel drops what comes
 * to a full ring of its own 512 frames while nobody looks, and cuts off without a word what is longer than 2,048 bytes. */
static void packet_ring(const struct dpdk_config *c, char *devargs, size_t size)
{
    char name[RTE_ETH_NAME_MAX_LEN];
    uint32_t frames;

    device_name(devargs, name);
    if (!device_is_af_packet(name)) {
        return;
    }
    if (c->frame_size > 2048) {
        argument_unless_given(devargs, size, "framesz=", c->frame_size);
        argument_unless_given(devargs, size, "blocksz=", c->frame_size * 2);
    }
    frames = RTE_MIN(RTE_MAX(c->ring_size & ~1u, LEAST_PACKETS), PACKET_RING_BYTES / c->frame_size);
    argument_unless_given(devargs, size, "framecnt=", frames);
}

static int add_member(struct dpdk_port *d, const char *devargs, struct dpdk_error *error)
{
    struct member *m = &d->member[d->member_count];
    int id;

    if (d->member_count == DPDK_MAX_MEMBERS) {
        return complain(error, EINVAL, "%s: more than %d members", d->name, DPDK_MAX_MEMBERS);
    }
    snprintf(m->devargs, sizeof m->devargs, "%s", devargs);
    packet_ring(&d->cfg, m->devargs, sizeof m->devargs);
    id = probe(m->devargs, m->name, error);
    if (id < 0) {
        return -id;
    }
    m->port_id = (uint16_t)id;
    m->link_up = true;
    d->member_count++;
    return 0;
}

int device_again(struct member *m)
{
    struct dpdk_error error;
    int id;

    if (pthread_mutex_trylock(&device_lock) != 0) {
        return -EBUSY;
    }
    id = probe(m->devargs, m->name, &error);
    pthread_mutex_unlock(&device_lock);
    return id;
}

/* Up to the next comma that is not within parentheses. */
static size_t argument(const char *s)
{
    int depth = 0;
    size_t n = 0;

    for (; s[n] && (s[n] != ',' || depth > 0); n++) {
        depth += (s[n] == '(') - (s[n] == ')');
    }
    return n;
}

/* Probes a bonding device's members, and writes its devargs with their names. 0, or a positive errno. */
static int members_first(struct dpdk_port *d, char *out, size_t size, struct dpdk_error *error)
{
    size_t at = 0;

    for (const char *s = d->cfg.device; *s;) {
        size_t n = argument(s);
        char one[sizeof d->cfg.device];
        int err;

        snprintf(one, sizeof one, "%.*s", (int)n, s);
        if (strncmp(one, "slave=", 6) == 0) {
            char *from = one + 6;

            from[strlen(from)] = 0;
            if (*from == '(' && from[strlen(from) - 1] == ')') {
                from[strlen(from) - 1] = 0;
                from++;
            }
            err = add_member(d, from, error);
            if (err) {
                return err;
            }
            snprintf(one, sizeof one, "slave=%s", d->member[d->member_count - 1].name);
        }
        at += (size_t)snprintf(out + at, size - at, "%s%s", at ? "," : "", one);
        s += n + (s[n] == ',');
    }
    if (d->member_count == 0) {
        return complain(error, EINVAL, "%s has no members: add slave=DEVICE to it, once for each", d->name);
    }
    return 0;
}

int device_find(struct dpdk_port *d, struct dpdk_error *error)
{
    char devargs[sizeof d->cfg.device + 64];
    int id;

    device_name(d->cfg.device, d->name);
    snprintf(devargs, sizeof devargs, "%s", d->cfg.device);
    d->guarded = strstr(devargs, "net_memif") != NULL;
    if (strncmp(d->name, "net_bonding", 11) == 0 && port_id(d->name) < 0 &&
        members_first(d, devargs, sizeof devargs, error)) {
        return error->err;
    }
    packet_ring(&d->cfg, devargs, sizeof devargs);
    id = probe(devargs, d->name, error);
    if (id < 0) {
        return -id;
    }
    d->id = (uint16_t)id;
    d->started = true; /* from here on there is something to undo */
    rte_eth_dev_info_get(d->id, &d->info);
    d->device = d->info.device;
    return 0;
}
