/* SPDX-License-Identifier: Apache-2.0 */
/*
 * signal.c - signals and the group's lock. A handler may call whatever signal-safety(7) allows, write() to an accelerated
 * socket too, and may leave by siglongjmp(3); so none runs while its thread holds the lock, or while the thread stands in
 * the list of sleepers.
 *
 * Every handler is reached through ours, with the flags and the mask that the program gave it. When the lock is held, the
 * thread sends it to itself again and returns with all signals blocked; when the lock is free, they are unblocked, and the
 * kernel does the rest (mask, stack, context) as if they had come then. Faults of the thread itself are never kept.
 *
 * Handlers that were set by system calls of the program's own (syscall(2), a language's runtime) are not known here.
 */
#define _GNU_SOURCE
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include "preload.h"

enum { SIGNALS = 65 };

/* What the program wants of a signal. Two of each: a handler that runs meanwhile reads the one that is not written. */
static struct {
    struct sigaction act[2];
    _Atomic unsigned current;
} wanted[SIGNALS];
static _Atomic uint64_t interrupting; /* siginterrupt(3), by signal */

static const struct sigaction *action_of(int sig)
{
    return &wanted[sig].act[atomic_load_explicit(&wanted[sig].current, memory_order_acquire) & 1];
}

/* ---- A signal comes ------------------------------------------------------------------------------------------- */

/* The thread's own doing (sigaction(2), si_code): it cannot go on before it is handled. */
static bool is_fault(int sig, const siginfo_t *info)
{
    bool kind = sig == SIGSEGV || sig == SIGBUS || sig == SIGFPE || sig == SIGILL || sig == SIGTRAP || sig == SIGSYS;

    return kind && info->si_code > 0;
}

/* The kernel's part of the set in a signal's frame: what glibc has after it is not there (rt_sigframe). */
static uint64_t *mask_of(ucontext_t *at) { return (uint64_t *)&at->uc_sigmask; }

/* Everything but faults, and what the C library uses itself (32: cancellation, 33: setuid()). */
static uint64_t blocked_meanwhile(void)
{
    static const int open[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGSYS, 32, 33};
    uint64_t set = ~0ull;

    for (unsigned i = 0; i < sizeof open / sizeof *open; i++) {
        set &= ~(1ull << (open[i] - 1));
    }
    return set;
}

/* Real-time signals of one number come in order: one that is sent again would come last. The first is kept here. */
static bool keep_here(int sig, const siginfo_t *info)
{
    if (sig < SIGRTMIN || self.kept.si_signo) {
        return false;
    }
    self.kept = *info;
    return true;
}

/* The lock is held: this one, and all that follow, wait until it is free. */
static void keep(int sig, siginfo_t *info, ucontext_t *at)
{
    uint64_t before = *mask_of(at), meanwhile = blocked_meanwhile();

    real.syscall(SYS_rt_sigprocmask, SIG_BLOCK, &meanwhile, NULL, sizeof meanwhile);
    *mask_of(at) = before | meanwhile;
    if (!keep_here(sig, info) && real.syscall(SYS_rt_tgsigqueueinfo, getpid(), gettid(), sig, info) < 0) {
        raise(sig); /* RLIMIT_SIGPENDING: without its siginfo_t then, as the kernel does it */
    }
    /* Another signal may have come on top of this one: it has written here before, the mask of ours. */
    self.mask = before;
    self.pending = 1;
}

static void run(int sig, siginfo_t *info, void *at)
{
    const struct sigaction *act = action_of(sig);
    void (*handler)(int, siginfo_t *, void *) = act->sa_sigaction;
    int flags = act->sa_flags;

    if (self.sleeper) {
        unpark();
    }
    self.handled++;
    self.no_restart |= !(flags & SA_RESTART);
    if (flags & (int)SA_RESETHAND) {
        /* By us: the kernel would do it when the signal is kept, and end the program when it comes again. */
        struct sigaction none = {.sa_handler = SIG_DFL};

        real.sigaction(sig, &none, NULL);
    }
    handler(sig, info, at);
}

/* As the kernel would, but for the stack (SA_ONSTACK), and the context is that of a call of ours. */
static void run_kept(void)
{
    siginfo_t info = self.kept;
    const struct sigaction *act = action_of(info.si_signo);
    uint64_t mask = self.mask | *(const uint64_t *)&act->sa_mask;
    ucontext_t here;

    self.kept.si_signo = 0;
    if (!(act->sa_flags & SA_NODEFER)) {
        mask |= 1ull << (info.si_signo - 1);
    }
    getcontext(&here);
    real.syscall(SYS_rt_sigprocmask, SIG_SETMASK, &mask, NULL, sizeof mask);
    run(info.si_signo, &info, &here);
}

static void arrives(int sig, siginfo_t *info, void *at)
{
    int saved = errno;

    if (self.inside && !is_fault(sig, info)) {
        keep(sig, info, at);
        errno = saved;
    } else {
        run(sig, info, at);
    }
}

void signals_deliver(void)
{
    int saved = errno;
    uint64_t mask = self.mask;

    self.pending = 0;
    if (self.kept.si_signo) {
        run_kept();
    }
    real.syscall(SYS_rt_sigprocmask, SIG_SETMASK, &mask, NULL, sizeof mask);
    errno = saved;
}

/* ---- sigaction(2) --------------------------------------------------------------------------------------------- */
static bool wrapping(void)
{
    static _Atomic int yes; /* 0: not looked yet */

    if (!yes) {
        yes = preload_wanted() ? 1 : -1;
    }
    return yes > 0;
}

static bool plain(const struct sigaction *act) { return act->sa_handler == SIG_DFL || act->sa_handler == SIG_IGN; }

/* What the kernel told is ours: the program's instead. */
static void unwrap(struct sigaction *old, const struct sigaction *before)
{
    if ((old->sa_flags & SA_SIGINFO) && old->sa_sigaction == arrives) {
        old->sa_sigaction = before->sa_sigaction;
        old->sa_flags = before->sa_flags;
    }
}

static int set_action(int sig, const struct sigaction *act, struct sigaction *old)
{
    struct sigaction ours, before;
    sigset_t all, mask;
    unsigned next;
    int r;

    real_load();
    if (sig <= 0 || sig >= SIGNALS || !wrapping()) {
        return real.sigaction(sig, act, old);
    }
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &mask); /* of this thread: none may see half of it */
    before = *action_of(sig);
    if (act && !plain(act)) {
        ours = *act;
        ours.sa_sigaction = arrives;
        ours.sa_flags = (act->sa_flags & ~(int)SA_RESETHAND) | SA_SIGINFO;
        next = atomic_load(&wanted[sig].current) + 1;
        wanted[sig].act[next & 1] = *act;
        atomic_store_explicit(&wanted[sig].current, next, memory_order_release);
        r = real.sigaction(sig, &ours, old);
        if (r < 0) {
            atomic_store_explicit(&wanted[sig].current, next - 1, memory_order_release);
        }
    } else {
        r = real.sigaction(sig, act, old);
    }
    if (r == 0 && old) {
        unwrap(old, &before);
    }
    pthread_sigmask(SIG_SETMASK, &mask, NULL);
    return r;
}

EXPORT int sigaction(int sig, const struct sigaction *act, struct sigaction *old) { return set_action(sig, act, old); }
EXPORT int __sigaction(int sig, const struct sigaction *act, struct sigaction *old)
{
    return set_action(sig, act, old);
}

/* ---- The older ways, each in terms of it ------------------------------------------------------------------------ */
static sighandler_t set_handler(int sig, sighandler_t handler, int flags, bool masked)
{
    struct sigaction act = {.sa_handler = handler, .sa_flags = flags}, old;

    if (handler == SIG_ERR) {
        errno = EINVAL;
        return SIG_ERR;
    }
    if (masked && sig > 0 && sig < SIGNALS) {
        sigaddset(&act.sa_mask, sig);
    }
    return set_action(sig, &act, &old) < 0 ? SIG_ERR : old.sa_handler;
}

/* signal(2): BSD's, with restarts unless siginterrupt(3) said otherwise. */
EXPORT sighandler_t signal(int sig, sighandler_t handler)
{
    bool stops = sig > 0 && sig < SIGNALS && (interrupting >> (sig - 1) & 1);

    return set_handler(sig, handler, stops ? 0 : SA_RESTART, true);
}
EXPORT sighandler_t bsd_signal(int sig, sighandler_t handler) { return signal(sig, handler); }
EXPORT sighandler_t ssignal(int sig, sighandler_t handler) { return signal(sig, handler); }

EXPORT sighandler_t sysv_signal(int sig, sighandler_t handler)
{
    return set_handler(sig, handler, (int)SA_RESETHAND | SA_NODEFER, false);
}
EXPORT sighandler_t __sysv_signal(int sig, sighandler_t handler) { return sysv_signal(sig, handler); }

EXPORT int siginterrupt(int sig, int flag)
{
    struct sigaction act;

    if (set_action(sig, NULL, &act) < 0) {
        return -1;
    }
    if (flag) {
        interrupting |= 1ull << (sig - 1);
        act.sa_flags &= ~SA_RESTART;
    } else {
        interrupting &= ~(1ull << (sig - 1));
        act.sa_flags |= SA_RESTART;
    }
    return set_action(sig, &act, NULL);
}

/* sigset(3): SIG_HOLD blocks; anything else is set and unblocked. */
EXPORT sighandler_t sigset(int sig, sighandler_t handler)
{
    sighandler_t before;
    struct sigaction act;
    sigset_t one, old;

    sigemptyset(&one);
    if (sigaddset(&one, sig) < 0) {
        return SIG_ERR;
    }
    if (handler == SIG_HOLD) {
        if (pthread_sigmask(SIG_BLOCK, &one, &old) != 0 || set_action(sig, NULL, &act) < 0) {
            return SIG_ERR;
        }
        before = act.sa_handler;
    } else {
        before = set_handler(sig, handler, 0, false);
        if (before == SIG_ERR || pthread_sigmask(SIG_UNBLOCK, &one, &old) != 0) {
            return SIG_ERR;
        }
    }
    return sigismember(&old, sig) == 1 ? SIG_HOLD : before;
}
