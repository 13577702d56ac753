/* SPDX-License-Identifier: Apache-2.0 */
/*
 * preload_threads.c - a server with a thread for each connection, and calls that block: sends back what it reads. Before
 * it answers a 'c' it computes for a while.
 *
 *   preload_threads ADDRESS PORT
 */
#include <arpa/inet.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { COMPUTES_MS = 500 };

static double now(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (double)ts.tv_sec * 1e3 + (double)ts.tv_nsec / 1e6;
}

static void compute(void)
{
    double end = now() + COMPUTES_MS;

    while (now() < end) {
        continue;
    }
}

static void *serve(void *arg)
{
    int fd = *(int *)arg;
    char byte;

    free(arg);
    while (recv(fd, &byte, 1, 0) == 1) {
        if (byte == 'c') {
            compute();
        }
        if (send(fd, &byte, 1, MSG_NOSIGNAL) != 1) {
            break;
        }
    }
    close(fd);
    return NULL;
}

int main(int argc, char **argv)
{
    struct sockaddr_in at = {.sin_family = AF_INET};
    int listener = socket(AF_INET, SOCK_STREAM, 0);

    if (argc != 3 || inet_pton(AF_INET, argv[1], &at.sin_addr) != 1) {
        return 2;
    }
    at.sin_port = htons((uint16_t)atoi(argv[2]));
    if (bind(listener, (struct sockaddr *)&at, sizeof at) < 0 || listen(listener, 8) < 0) {
        perror("listen");
        return 1;
    }
    puts("listens");
    fflush(stdout);
    for (;;) {
        int *fd = malloc(sizeof *fd);
        pthread_t thread;

        if (!fd || (*fd = accept(listener, NULL, NULL)) < 0 || pthread_create(&thread, NULL, serve, fd) != 0) {
            perror("accept");
            return 1;
        }
        pthread_detach(thread);
    }
}
