/*
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * The client side of the MMIO benchmark: speaks the vfio-user protocol itself,
 * so that the same code measures every server.
 *
 *     bench_mmio_client SOCKET [ROUND_TRIPS [OFFSET]]
 *
 * Reads four bytes at OFFSET of BAR 0 ROUND_TRIPS times, one after the other,
 * and prints one line of JSON: nanoseconds a round trip (median, mean and
 * 99th percentile), after a tenth as many reads to warm up.
 * Waits up to 10 s for the server's socket. Exit status: 0, or 1 with a message.
 *
 * Build: cc -O2 -o bench_mmio_client bench_mmio_client.c
 */
#include <err.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum command { VERSION = 1, REGION_READ = 9 };
enum { FLAG_REPLY = 1, FLAG_ERROR = 1 << 5 };

struct header {
    uint16_t message_id;
    uint16_t command;
    uint32_t size; /* of the whole message */
    uint32_t flags;
    uint32_t error;
};

struct region_access {
    uint64_t offset;
    uint32_t region;
    uint32_t count;
};

struct read_request {
    struct header header;
    struct region_access access;
};

struct read_reply {
    struct header header;
    struct region_access access;
    uint32_t value;
} __attribute__((packed));

static int
connect_to(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int attempt;

    if (strlen(path) >= sizeof(address.sun_path)) {
        errx(1, "socket path too long: %s", path);
    }
    strcpy(address.sun_path, path);
    for (attempt = 0; attempt < 1000; attempt++) {
        int fd = socket(AF_UNIX, SOCK_STREAM, 0);

        if (fd < 0) {
            err(1, "socket");
        }
        if (connect(fd, (struct sockaddr *)&address, sizeof(address)) == 0) {
            return fd;
        }
        close(fd);
        usleep(10000);
    }
    err(1, "%s", path);
}

static void
exchange(int fd, const void *request, size_t request_size, void *reply, size_t reply_size)
{
    const struct header *header = reply;

    if (send(fd, request, request_size, 0) != (ssize_t)request_size) {
        err(1, "send");
    }
    if (recv(fd, reply, reply_size, MSG_WAITALL) != (ssize_t)reply_size) {
        errx(1, "the server closed the connection");
    }
    if (!(header->flags & FLAG_REPLY) || (header->flags & FLAG_ERROR)) {
        errx(1, "command %u failed: %s", header->command, strerror((int)header->error));
    }
}

static void
negotiate(int fd)
{
    static const char capabilities[] =
        "{\"capabilities\":{\"max_msg_fds\":8,\"max_data_xfer_size\":1048576}}";
    char request[sizeof(struct header) + 4 + sizeof(capabilities)];
    struct header *header = (struct header *)request;
    struct header reply;
    char rest[1024];

    memset(request, 0, sizeof(request)); /* major and minor: 0.0 */
    header->message_id = 1;
    header->command = VERSION;
    header->size = sizeof(request);
    memcpy(request + sizeof(*header) + 4, capabilities, sizeof(capabilities));
    exchange(fd, request, sizeof(request), &reply, sizeof(reply));
    if (reply.size < sizeof(reply) || reply.size - sizeof(reply) > sizeof(rest) ||
        recv(fd, rest, reply.size - sizeof(reply), MSG_WAITALL) < 0) {
        errx(1, "version: malformed reply");
    }
}

static int64_t
now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static int
ascending(const void *a, const void *b)
{
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;

    return (x > y) - (x < y);
}

int
main(int argc, char **argv)
{
    struct read_request request = {
        .header = {.command = REGION_READ, .size = sizeof(request)},
        .access = {.region = 0, .count = sizeof(uint32_t)},
    };
    long round_trips = argc > 2 ? atol(argv[2]) : 20000;
    struct read_reply reply;
    int64_t *times, begin;
    long i;
    int fd;

    if (argc < 2 || round_trips < 100) {
        errx(1, "usage: %s SOCKET [ROUND_TRIPS (at least 100) [OFFSET]]", argv[0]);
    }
    request.access.offset = argc > 3 ? strtoul(argv[3], NULL, 0) : 0;
    times = calloc((size_t)round_trips, sizeof(*times));
    if (times == NULL) {
        err(1, "calloc");
    }
    fd = connect_to(argv[1]);
    negotiate(fd);
    for (i = 0; i < round_trips / 10; i++) {
        exchange(fd, &request, sizeof(request), &reply, sizeof(reply));
    }
    begin = now();
    for (i = 0; i < round_trips; i++) {
        int64_t start = now();

        request.header.message_id++;
        exchange(fd, &request, sizeof(request), &reply, sizeof(reply));
        times[i] = now() - start;
    }
    begin = now() - begin;
    qsort(times, (size_t)round_trips, sizeof(*times), ascending);
    printf("{\"round_trips\": %ld, \"median_ns\": %lld, \"mean_ns\": %lld, \"p99_ns\": %lld}\n",
           round_trips, (long long)times[round_trips / 2], (long long)(begin / round_trips),
           (long long)times[round_trips * 99 / 100]);
    free(times);
    close(fd);
    return 0;
}
