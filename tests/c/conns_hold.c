/* SPDX-License-Identifier: Apache-2.0 */
/* conns_hold.c - opens sockets in places and states of all kinds, says so, and waits for the end of its input: what
 * tests/test_conns.py looks at with `bypass conns`. */
#include "posix.h"

int main(void)
{
    struct sockaddr_in any = loopback(0), nobody;
    int fds[2], us[2], l = listener(5), c, holder, u, k, x;
    char end;

    tcp_pair(fds);
    send_all(fds[0], "hello", 5);
    set_option(l, IPPROTO_TCP, TCP_DEFER_ACCEPT, 3);
    client_of(l); /* waits to be accepted */
    c = client_of(l);
    MUST(close(c)); /* ... and this one's client has left */
    udp_pair(us);
    EQ(send(us[0], "datagram", 8, 0), 8);
    k = (int)MUST(socket(AF_INET, SOCK_DGRAM, 0));
    set_option(k, IPPROTO_IP, IP_PKTINFO, 1);
    MUST(bind(k, (struct sockaddr *)&any, sizeof(any)));
    u = (int)MUST(socket(AF_INET, SOCK_STREAM, 0));
    MUST(dup(u));
    x = (int)MUST(socket(AF_INET, SOCK_STREAM, 0));
    nobody = refusing(&holder);
    FAILS(ECONNREFUSED, connect(x, (struct sockaddr *)&nobody, sizeof(nobody)));
    printf("listener %d pair %d %d udp %d %d pktinfo %d undecided %d refused %d\n", l, fds[0], fds[1], us[0], us[1], k,
           u, x);
    fflush(stdout);
    (void)posix_main;
    return (int)MUST(read(0, &end, 1));
}
