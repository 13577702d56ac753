/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fuzz_replay - main() for a harness where there is no libFuzzer: runs the inputs of the files that it is given, and says
 * how many. With FUZZ_WRONG (tests) the stack is made to lie to the harness, which has to notice.
 */
#include "fuzz.h"

size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t max)
{
    (void)data;
    (void)max;
    return size;
}

#ifdef FUZZ_WRONG /* linked with --wrap */
int64_t __real_bypass_recv(struct bypass_stack *s, bypass_sock sock, void *buf, size_t n, int flags);
int64_t __wrap_bypass_recv(struct bypass_stack *s, bypass_sock sock, void *buf, size_t n, int flags);
int64_t __wrap_bypass_recv(struct bypass_stack *s, bypass_sock sock, void *buf, size_t n, int flags)
{
    int64_t got = __real_bypass_recv(s, sock, buf, n, flags);
    if (FUZZ_WRONG == 1 && got > 100)
        ((uint8_t *)buf)[got - 1] ^= 1;
    return got;
}

int64_t __real_bypass_recvfrom(struct bypass_stack *s, bypass_sock sock, void *buf, size_t n, int flags,
                               struct bypass_endpoint *from);
int64_t __wrap_bypass_recvfrom(struct bypass_stack *s, bypass_sock sock, void *buf, size_t n, int flags,
                               struct bypass_endpoint *from);
int64_t __wrap_bypass_recvfrom(struct bypass_stack *s, bypass_sock sock, void *buf, size_t n, int flags,
                               struct bypass_endpoint *from)
{
    int64_t got = __real_bypass_recvfrom(s, sock, buf, n, flags, from);
    return FUZZ_WRONG == 1 && got > 100 ? got - 1 : got;
}

int64_t __real_bypass_send(struct bypass_stack *s, bypass_sock sock, const void *buf, size_t n, int flags);
int64_t __wrap_bypass_send(struct bypass_stack *s, bypass_sock sock, const void *buf, size_t n, int flags);
int64_t __wrap_bypass_send(struct bypass_stack *s, bypass_sock sock, const void *buf, size_t n, int flags)
{
    if (FUZZ_WRONG == 2 && n > 1000)
        return __real_bypass_send(s, sock, (const uint8_t *)buf + 1, n - 1, flags);
    return __real_bypass_send(s, sock, buf, n, flags);
}

void __real_bypass_destroy(struct bypass_stack *s);
void __wrap_bypass_destroy(struct bypass_stack *s);
void __wrap_bypass_destroy(struct bypass_stack *s)
{
    if (FUZZ_WRONG != 3)
        __real_bypass_destroy(s);
}
#endif

int main(int argc, char **argv)
{
    static uint8_t data[1 << 20];
    for (int i = 1; i < argc; i++) {
        FILE *f = fopen(argv[i], "rb");
        if (f == NULL) {
            perror(argv[i]);
            return 2;
        }
        size_t n = fread(data, 1, sizeof data, f);
        (void)fclose(f);
        fprintf(stderr, "%s\n", argv[i]); /* the last one is the one that failed */
        (void)LLVMFuzzerTestOneInput(data, n);
    }
    printf("%d inputs\n", argc - 1);
    return 0;
}
