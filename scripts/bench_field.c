/* A Modbus/TCP field that is never the limit: bench_field PORT DEVICES LENGTH < ANSWERS
 *
 * Every device listens on a port of its own, from PORT on. Standard input holds ANSWERS_EACH answers of LENGTH bytes
 * (two of transaction id left open) for each device; every request of twelve bytes gets the next one.
 */
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

enum { ANSWERS_EACH = 256, REQUEST = 12, AT_ONCE = 64, EVENTS = 256 };

struct peer { int fd, device, listens; unsigned next; };

static void watch(int epoll, struct peer *peer) {
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = peer};
    epoll_ctl(epoll, EPOLL_CTL_ADD, peer->fd, &event);
}

static struct peer *made(int fd, int device, int listens) {
    struct peer *peer = calloc(1, sizeof *peer);
    peer->fd = fd, peer->device = device, peer->listens = listens;
    return peer;
}

static void serve(struct peer *peer, const unsigned char *answers, size_t length) {
    unsigned char in[REQUEST * AT_ONCE], out[AT_ONCE * 300];
    ssize_t got = recv(peer->fd, in, sizeof in, 0);
    if (got <= 0) {
        close(peer->fd);
        free(peer);
        return;
    }
    size_t size = 0;
    for (ssize_t at = 0; at + REQUEST <= got; at += REQUEST, size += length) {
        size_t index = (size_t)peer->device * ANSWERS_EACH + peer->next++ % ANSWERS_EACH;
        memcpy(out + size, answers + index * length, length);
        memcpy(out + size, in + at, 2);
    }
    send(peer->fd, out, size, MSG_NOSIGNAL); /* whoever does not take it has hung up */
}

int main(int argc, char **argv) {
    if (argc != 4) return 2;
    int port = atoi(argv[1]), devices = atoi(argv[2]), yes = 1;
    size_t length = (size_t)atoi(argv[3]), size = length * ANSWERS_EACH * (size_t)devices;
    unsigned char *answers = malloc(size);
    if (length > 300 || fread(answers, 1, size, stdin) != size) return 2;
    int epoll = epoll_create1(0);
    for (int device = 0; device < devices; device++) {
        int fd = socket(AF_INET, SOCK_STREAM, 0);
        struct sockaddr_in here = {.sin_family = AF_INET, .sin_port = htons((unsigned short)(port + device))};
        here.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
        if (bind(fd, (struct sockaddr *)&here, sizeof here) || listen(fd, 16)) return perror("bench_field"), 1;
        watch(epoll, made(fd, device, 1));
    }
    puts("ready");
    fflush(stdout);
    for (;;) {
        struct epoll_event events[EVENTS];
        int count = epoll_wait(epoll, events, EVENTS, -1);
        for (int i = 0; i < count; i++) {
            struct peer *peer = events[i].data.ptr;
            if (!peer->listens) {
                serve(peer, answers, length);
                continue;
            }
            int fd = accept(peer->fd, NULL, NULL);
            setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
            watch(epoll, made(fd, peer->device, 0));
        }
    }
}
