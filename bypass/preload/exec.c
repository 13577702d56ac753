/* SPDX-License-Identifier: Apache-2.0 */
/*
 * exec.c - another program takes over the process, or is started in a child (posix_spawn()). Its sockets are found again
 * by their shadows' inode numbers (adopt_sockets()), if it loads this library too: LD_PRELOAD and BYPASS_* stay as the program
 * wants them, and BYPASS_APP, which says whose relative it is, is added where it was lost in a copy of the environment
 * that is older than the first socket.
 *
 * Until the new program has joined, or for good where it never does, the process counts as foreign: what it has is what
 * /proc says that it has open (proc.c). So descriptors that are close-on-exec end with the old program, file actions of
 * posix_spawn() need no looking into, and when exec fails nothing has changed.
 *
 * system(3) and popen(3) start their shell inside the C library, where nothing of ours is called: the shell finds what it
 * has by itself, when it starts.
 */
#define _GNU_SOURCE
#include <alloca.h>
#include <dirent.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "preload.h"

enum { SETTLE_NS = 2000000, LOW_FDS = 1024 };

extern char **environ;

/* ---- The environment ------------------------------------------------------------------------------------------ */
static bool begins(const char *entry, const char *name)
{
    size_t n = strlen(name);

    return strncmp(entry, name, n) == 0 && entry[n] == '=';
}

static const char *lookup(char *const env[], const char *name)
{
    for (; env && *env; env++) {
        if (begins(*env, name)) {
            return *env;
        }
    }
    return NULL;
}

static size_t entries(char *const list[])
{
    size_t n = 0;

    while (list && list[n]) {
        n++;
    }
    return n;
}

/* What `to`, with room for three more, has to be; the others are texts that may be added. */
static char *const *extend(char *const env[], char **to, char *app, char *must, char *sets)
{
    char *const more[] = {app, must, sets};
    size_t at = entries(env);

    memcpy(to, env, at * sizeof *to);
    for (size_t i = 0; i < sizeof more / sizeof *more; i++) {
        if (more[i]) {
            to[at++] = more[i];
        }
    }
    to[at] = NULL;
    return to;
}

static const char *missing_app(char *const env[])
{
    bool ours = lookup(env, "BYPASS_SOCKET") || lookup(env, "BYPASS_LOOPBACK");

    return me.attached > 0 && ours && !lookup(env, "BYPASS_APP") ? me.app_text : NULL;
}

/* Somebody has to drive what the old program leaves, and there is nobody else: the new one joins at once. */
static bool must_join(void) { return me.attached > 0 && me.g->relatives == 1 && stack_used(); }

static int sets_file = -1; /* epoll_save() */
static char sets_text[32];

#define ENVIRONMENT(env)                                                                                               \
    ({                                                                                                                 \
        const char *app_ = missing_app(env);                                                                           \
        char *const *env_ = env;                                                                                       \
        bool must_ = must_join(), sets_ = sets_file >= 0;                                                              \
        if (app_ || must_ || sets_) {                                                                                  \
            char **to_ = alloca((entries(env_) + 4) * sizeof *to_);                                                    \
            env_ = extend(env_, to_, (char *)app_, must_ ? (char *)"BYPASS_JOIN=1" : NULL, sets_ ? sets_text : NULL);  \
        }                                                                                                              \
        env_;                                                                                                          \
    })

/* ---- The process becomes another program ------------------------------------------------------------------------- */
uint64_t fd_inode(int fd)
{
    struct stat st;

    return fstat(fd, &st) == 0 && S_ISSOCK(st.st_mode) ? st.st_ino : 0;
}

/* Lock held. What this process has can be found again by inode number. */
static void note_inodes(void)
{
    for (int fd = 0; fd < me.fd_top; fd++) {
        uint32_t i = fd_object(fd);

        if (i != GROUP_NONE && group_object(me.g, i)->ino == 0) {
            group_object(me.g, i)->ino = fd_inode(fd);
        }
    }
}

/* Whether something ends with this program if it is close-on-exec: nobody else has it. */
static bool only_holder(void)
{
    for (uint32_t i = 0; i < me.g->objects_bump; i++) {
        uint32_t refs = group_object(me.g, i)->refs;

        if (refs && me.local[i].fds && refs == group_holds(me.g, i, me.proc)) {
            return true;
        }
    }
    return false;
}

static void become_foreign(uint32_t place)
{
    me.g->procs[place].state = PROC_FOREIGN;
    me.g->procs[place].since_ns = clock_ns();
    relatives_look_before(clock_ns() + SETTLE_NS);
}

static bool announced;

/* Other threads may be killed at any moment from here on, and stand still. */
static void exec_begins(void)
{
    if (me.attached <= 0 || self.inside) {
        return;
    }
    share_write();
    enter_quietly();
    me.halted_by = &self;
    note_inodes();
    turn(); /* what was written leaves */
    sets_file = epoll_save();
    snprintf(sets_text, sizeof sets_text, "BYPASS_SETS=%d", sets_file);
    become_foreign(me.proc);
    if (only_holder()) {
        wake_joined(); /* their next look may be far away */
    }
    if (!me.forked) {
        broker_announce_exec();
    }
    announced = true;
    leave();
}

/* It has failed: everything is as before. */
static int exec_failed(void)
{
    int saved = errno;

    if (announced && me.attached > 0) {
        enter_quietly();
        me.g->procs[me.proc].state = me.forked ? PROC_FORKED : PROC_JOINED;
        for (uint32_t i = 0; i < me.g->objects_bump; i++) {
            if (group_object(me.g, i)->refs) {
                group_set_hold(me.g, i, me.proc, me.local[i].fds);
            }
        }
        me.halted_by = NULL;
        announced = false;
        fd_unhide(sets_file);
        sets_file = -1;
        leave();
    }
    errno = saved;
    return -1;
}

EXPORT int execve(const char *path, char *const argv[], char *const env[])
{
    real_load();
    exec_begins();
    real.execve(path, argv, ENVIRONMENT(env));
    return exec_failed();
}

EXPORT int execv(const char *path, char *const argv[]) { return execve(path, argv, environ); }

EXPORT int execvpe(const char *file, char *const argv[], char *const env[])
{
    real_load();
    exec_begins();
    real.execvpe(file, argv, ENVIRONMENT(env));
    return exec_failed();
}

EXPORT int execvp(const char *file, char *const argv[]) { return execvpe(file, argv, environ); }

EXPORT int fexecve(int fd, char *const argv[], char *const env[])
{
    real_load();
    exec_begins();
    real.fexecve(fd, argv, ENVIRONMENT(env));
    return exec_failed();
}

EXPORT int execveat(int dir, const char *path, char *const argv[], char *const env[], int flags)
{
    real_load();
    exec_begins();
    real.execveat(dir, path, argv, ENVIRONMENT(env), flags);
    return exec_failed();
}

/* The arguments of execl() and its kin, as a list. */
#define LIST(first, last)                                                                                              \
    ({                                                                                                                 \
        va_list args_;                                                                                                 \
        size_t n_ = 1;                                                                                                 \
        char **list_;                                                                                                  \
        va_start(args_, last);                                                                                         \
        while (va_arg(args_, char *)) {                                                                                \
            n_++;                                                                                                      \
        }                                                                                                              \
        va_end(args_);                                                                                                 \
        list_ = alloca((n_ + 1) * sizeof *list_);                                                                      \
        list_[0] = (char *)(first);                                                                                    \
        va_start(args_, last);                                                                                         \
        for (size_t i_ = 1; i_ <= n_; i_++) {                                                                          \
            list_[i_] = va_arg(args_, char *);                                                                         \
        }                                                                                                              \
        list_;                                                                                                         \
    })

EXPORT int execl(const char *path, const char *arg, ...) { return execve(path, LIST(arg, arg), environ); }

EXPORT int execlp(const char *file, const char *arg, ...) { return execvpe(file, LIST(arg, arg), environ); }

EXPORT int execle(const char *path, const char *arg, ...)
{
    char **argv = LIST(arg, arg), **env;
    va_list args;

    va_start(args, arg);
    for (size_t i = entries(argv); i > 0; i--) {
        (void)va_arg(args, char *); /* the rest of the arguments, and their end */
    }
    env = va_arg(args, char **);
    va_end(args);
    return execve(path, argv, env);
}

/* ---- A program in a child, started by the C library ------------------------------------------------------------------ */

/* A place for the child, with all that this process has, before there is a child. GROUP_NONE: nothing to keep. */
static uint32_t spawn_begins(void)
{
    uint32_t place;

    if (me.attached <= 0 || self.inside) {
        return GROUP_NONE;
    }
    enter_quietly();
    note_inodes();
    place = group_join(me.g, -1);
    if (place != GROUP_NONE) {
        me.g->procs[place].state = PROC_FORKED;
        me.g->procs[place].since_ns = clock_ns();
        group_copy(me.g, me.proc, place);
    }
    leave();
    return place;
}

/* The child runs its program already: it has what /proc says. */
static int spawn_ends(uint32_t place, int err, pid_t pid)
{
    if (place != GROUP_NONE) {
        enter_quietly();
        if (err) {
            relative_gone(place);
        } else {
            me.g->procs[place].pid = pid;
            become_foreign(place);
            relative_watch(pid);
            relative_look(place);
        }
        leave();
    }
    return err;
}

typedef int spawn_call(pid_t *, const char *, const posix_spawn_file_actions_t *, const posix_spawnattr_t *,
                       char *const[], char *const[]);

static int spawn(spawn_call *call, pid_t *pid, const char *file, const posix_spawn_file_actions_t *actions,
                 const posix_spawnattr_t *attr, char *const argv[], char *const env[])
{
    uint32_t place = spawn_begins();
    pid_t child = 0;
    int err = call(&child, file, actions, attr, argv, ENVIRONMENT(env));

    if (err == 0 && pid) {
        *pid = child;
    }
    return spawn_ends(place, err, child);
}

EXPORT int posix_spawn(pid_t *pid, const char *path, const posix_spawn_file_actions_t *actions,
                       const posix_spawnattr_t *attr, char *const argv[], char *const env[])
{
    real_load();
    return spawn(real.posix_spawn, pid, path, actions, attr, argv, env);
}

EXPORT int posix_spawnp(pid_t *pid, const char *file, const posix_spawn_file_actions_t *actions,
                        const posix_spawnattr_t *attr, char *const argv[], char *const env[])
{
    real_load();
    return spawn(real.posix_spawnp, pid, file, actions, attr, argv, env);
}

static void shell_starts(void)
{
    if (me.attached > 0 && !self.inside) {
        enter_quietly();
        note_inodes();
        leave();
    }
}

EXPORT int system(const char *command)
{
    real_load();
    shell_starts();
    return real.system(command);
}

EXPORT FILE *popen(const char *command, const char *type)
{
    real_load();
    shell_starts();
    return real.popen(command, type);
}

/* ---- In the new program ------------------------------------------------------------------------------------------------ */
static int number(const char *text)
{
    char *end;
    long n = strtol(text, &end, 10);

    return *text && !*end && n >= 0 && n < FD_MAX ? (int)n : -1;
}

/* Without /proc (chroot(2)): where descriptors usually are. */
static bool any_low_socket(bool (*what)(int fd))
{
    for (int fd = 0; fd < LOW_FDS; fd++) {
        if (!fd_hidden(fd) && fd_inode(fd) && what(fd)) {
            return true;
        }
    }
    return false;
}

/* Calls `what` for each open descriptor that is a socket, until it is true. */
static bool any_socket(bool (*what)(int fd))
{
    DIR *d = opendir("/proc/self/fd");
    struct dirent *e;
    bool found = false;

    while (d && !found && (e = readdir(d))) {
        int fd = number(e->d_name);

        found = fd >= 0 && fd != dirfd(d) && !fd_hidden(fd) && fd_inode(fd) && what(fd);
    }
    if (d) {
        closedir(d);
    }
    return d ? found : any_low_socket(what);
}

static bool take_over(int fd)
{
    uint32_t i = fd_object(fd) == GROUP_NONE ? group_find_ino(me.g, fd_inode(fd)) : GROUP_NONE;

    if (i != GROUP_NONE) {
        fd_set_object(fd, i);
    }
    return false;
}

/* Of the program that was here before: what became ready for it meanwhile has not been told. */
static void take_place(uint32_t place)
{
    for (uint32_t object, mask; (object = group_take(me.g, place, &mask)) != GROUP_NONE;) {
        epoll_ready(object, poll_bits(mask));
    }
    relative_gone(place);
}

void adopt_sockets(void)
{
    any_socket(take_over);
    if (sets_file >= 0) {
        epoll_restore(sets_file);
    }
    for (uint32_t i = 0; i < me.g->procs_top; i++) {
        if (i != me.proc && me.g->procs[i].pid == me.pid && me.g->procs[i].state == PROC_FOREIGN) {
            take_place(i);
        }
    }
}

bool is_internet(int fd)
{
    int domain = 0;
    socklen_t len = sizeof domain;

    return real.getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &len) == 0 && (domain == AF_INET || domain == AF_INET6);
}

static int option(int fd, int name)
{
    int value = 0;
    socklen_t len = sizeof value;

    return real.getsockopt(fd, SOL_SOCKET, name, &value, &len) < 0 ? -1 : value;
}

bool note_inherited_fd(int fd)
{
    int protocol, type;

    if (fd_object(fd) != GROUP_NONE || fd_hidden(fd) || !is_internet(fd)) {
        return false;
    }
    protocol = option(fd, SO_PROTOCOL);
    type = protocol == IPPROTO_TCP ? BYPASS_STREAM : protocol == IPPROTO_UDP ? BYPASS_DGRAM : 0;
    object_of_kernel(fd, option(fd, SO_DOMAIN), type, WHY_INHERITED, NULL);
    return true;
}

static bool inherited(int fd)
{
    note_inherited_fd(fd);
    return false;
}

void note_inherited(void) { any_socket(inherited); }

/* The file with its sets, if it was handed one. */
static int sets_given(void)
{
    const char *text = getenv("BYPASS_SETS");
    int fd = text ? number(text) : -1;
    char path[32], target[32] = "";

    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    return fd >= 0 && readlink(path, target, sizeof target - 1) > 0 && strncmp(target, "/memfd:bypass-sets", 18) == 0
               ? fd
               : -1;
}

void exec_arrived(void)
{
    bool must = getenv("BYPASS_JOIN") != NULL;

    sets_file = sets_given();
    unsetenv("BYPASS_SETS");
    unsetenv("BYPASS_JOIN");
    me.relative = getenv("BYPASS_APP") && preload_wanted();
    if (me.relative && (must || any_socket(is_internet))) {
        attach();
        for (int fd = 0; fd < 3; fd++) {
            stream_standard(fd);
        }
    }
    if (sets_file >= 0) {
        real.close(sets_file);
        sets_file = -1;
    }
}
