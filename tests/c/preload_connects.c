/* SPDX-License-Identifier: Apache-2.0 */
/*
 * preload_connects.c - many short connections, one after another, by several processes.
 *
 *     preload_connects ADDRESS PORT CONNECTIONS PROCESSES [tcp|udp]
 *
 * Each sends a word and has it answered. Prints the local ports, one a line.
 */
#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

static void must(int good, const char *what)
{
    if (!good) {
        perror(what);
        exit(1);
    }
}

static void connect_once(const struct sockaddr_in *to, int type)
{
    int c = socket(AF_INET, type, 0);
    struct sockaddr_in local;
    socklen_t len = sizeof local;
    char word[8];

    must(c >= 0, "socket");
    must(connect(c, (const struct sockaddr *)to, sizeof *to) == 0, "connect");
    must(getsockname(c, (struct sockaddr *)&local, &len) == 0, "getsockname");
    must(send(c, "bypass\n", 7, 0) == 7, "send");
    must(recv(c, word, sizeof word, 0) == 7 && memcmp(word, "bypass\n", 7) == 0, "recv");
    must(close(c) == 0, "close");
    dprintf(1, "%d\n", ntohs(local.sin_port));
}

int main(int argc, char **argv)
{
    struct sockaddr_in to = {.sin_family = AF_INET};
    int status = 0, connections, processes;

    must(argc > 4, "arguments");
    must(inet_pton(AF_INET, argv[1], &to.sin_addr) == 1, "address");
    to.sin_port = htons((uint16_t)atoi(argv[2]));
    connections = atoi(argv[3]);
    processes = atoi(argv[4]);
    connect_once(&to, argc > 5 && argv[5][0] == 'u' ? SOCK_DGRAM : SOCK_STREAM);
    for (int p = 0; p < processes; p++) {
        if (fork() == 0) {
            for (int i = 0; i < connections / processes; i++) {
                connect_once(&to, argc > 5 && argv[5][0] == 'u' ? SOCK_DGRAM : SOCK_STREAM);
            }
            return 0;
        }
    }
    for (int p = 0, one; p < processes; p++) {
        must(wait(&one) > 0, "wait");
        status |= one;
    }
    return status != 0;
}
