/* SPDX-License-Identifier: Apache-2.0 */
/*
 * share.c - how many sockets are on the stack: for all relatives together in the group, and for this process, which adds
 * a line of JSON to the file that BYPASS_TRACE_SHARE names when it ends or becomes another program. A process that opened
 * no Internet socket adds none.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "preload.h"

static struct counts { /* sockets of this process that ended up there, ever */
    uint64_t tcp_stack, tcp_kernel, udp_stack, udp_kernel;
    uint64_t reasons[WHY_COUNT];
    bool told;
} mine;

void count_stack(int type)
{
    if (type == BYPASS_STREAM) {
        me.g->tcp_stack++;
        mine.tcp_stack++;
    } else {
        me.g->udp_stack++;
        mine.udp_stack++;
    }
}

void count_kernel(int type, int reason)
{
    mine.reasons[reason]++;
    if (type == BYPASS_STREAM) {
        me.g->tcp_kernel++;
        mine.tcp_kernel++;
    } else if (type == BYPASS_DGRAM) {
        me.g->udp_kernel++;
        mine.udp_kernel++;
    }
}

void count_child(void) { mine = (struct counts){0}; }

/* ---- The line -------------------------------------------------------------------------------------------------------- */
enum { LINE = 2048 };

struct line {
    char text[LINE];
    int len;
};

__attribute__((format(printf, 2, 3))) static void add(struct line *l, const char *format, ...)
{
    va_list args;
    int room = LINE - l->len, n;

    va_start(args, format);
    n = vsnprintf(l->text + l->len, (size_t)room, format, args);
    va_end(args);
    l->len += n < room ? n : room - 1;
}

/* A JSON string (RFC 8259 7). */
static void add_string(struct line *l, const char *s)
{
    add(l, "\"");
    for (; *s; s++) {
        unsigned char c = (unsigned char)*s;

        c == '"' || c == '\\' ? add(l, "\\%c", c) : c<' ' || c> '~' ? add(l, "\\u%04x", c) : add(l, "%c", c);
    }
    add(l, "\"");
}

static void compose(struct line *l)
{
    const char *sep = "";

    add(l, "{\"pid\": %d, \"program\": ", (int)getpid());
    add_string(l, program_invocation_short_name);
    add(l, ", \"tcp_stack\": %lu, \"tcp_kernel\": %lu, \"udp_stack\": %lu, \"udp_kernel\": %lu", mine.tcp_stack,
        mine.tcp_kernel, mine.udp_stack, mine.udp_kernel);
    if (me.refused[0]) {
        add(l, ", \"refused\": ");
        add_string(l, me.refused);
    }
    add(l, ", \"reasons\": {");
    for (int i = 0; i < WHY_COUNT; i++) {
        if (mine.reasons[i]) {
            add(l, "%s", sep);
            add_string(l, group_reason(i));
            add(l, ": %lu", mine.reasons[i]);
            sep = ", ";
        }
    }
    add(l, "}}\n");
}

static char path[4096];

/* Programs may clear their environment (nginx does). */
__attribute__((constructor)) static void note_path(void)
{
    const char *set = getenv("BYPASS_TRACE_SHARE");

    if (set && strlen(set) < sizeof path) {
        strcpy(path, set);
    }
}

static bool nothing_new(void) { return mine.tcp_stack + mine.tcp_kernel + mine.udp_stack + mine.udp_kernel == 0; }

void share_write(void)
{
    struct line l = {.len = 0};
    int fd, saved = errno;

    if (!path[0] || (mine.told && nothing_new()) || me.attached == 0 || (me.attached < 0 && !me.refused[0])) {
        return;
    }
    compose(&l);
    fd = open(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0666);
    /* One write: lines of processes that end together do not mix (write(2), O_APPEND). */
    if (fd < 0 || real.write(fd, l.text, (size_t)l.len) != l.len) {
        dprintf(2, "bypass: BYPASS_TRACE_SHARE %s: %s\n", path, strerror(errno));
    }
    if (fd >= 0) {
        real.close(fd);
    }
    count_child();
    mine.told = true;
    errno = saved;
}

__attribute__((destructor)) static void at_exit(void) { share_write(); }
