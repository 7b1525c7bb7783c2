/*
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * The C side of the MMIO benchmark: the smallest server that libvfio-user
 * allows, one PCI function whose BAR 0 is 4 KiB of registers in memory.
 *
 *     bench_mmio_server SOCKET [poll]
 *
 * By default the library blocks in recvmsg(), which is the least that a server
 * can do for a request. With "poll" it is built as an event loop is: poll(),
 * then non-blocking runs until nothing is left. It serves one client, then
 * exits. Exit status: 0, or 1 with a message.
 *
 * Build: cc -O2 -I<include>/vfio-user ... -L<lib> -lvfio-user
 */
#include <err.h>
#include <errno.h>
#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <libvfio-user.h>

#define BAR_SIZE 0x1000

static char registers[BAR_SIZE];

/* The library has checked that offset and count lie in the region. */
static ssize_t
access_bar0(vfu_ctx_t *ctx, char *buf, size_t count, loff_t offset, bool is_write)
{
    (void)ctx;
    if (is_write) {
        memcpy(registers + offset, buf, count);
    } else {
        memcpy(buf, registers + offset, count);
    }
    return (ssize_t)count;
}

/* One client of a blocking context: the call returns when the client is gone. */
static void
serve_blocking(vfu_ctx_t *ctx)
{
    while (vfu_run_ctx(ctx) >= 0) {
    }
}

/* The same as an event loop does it. */
static void
serve_polling(vfu_ctx_t *ctx)
{
    for (;;) {
        struct pollfd waiting = {.fd = vfu_get_poll_fd(ctx), .events = POLLIN};
        int handled;

        if (poll(&waiting, 1, -1) < 0 && errno != EINTR) {
            err(1, "poll");
        }
        while ((handled = vfu_run_ctx(ctx)) > 0) {
        }
        if (handled < 0) {
            return;
        }
    }
}

int
main(int argc, char **argv)
{
    bool polling = argc == 3 && strcmp(argv[2], "poll") == 0;
    int flags = polling ? LIBVFIO_USER_FLAG_ATTACH_NB : 0;
    vfu_ctx_t *ctx;

    if (argc != 2 && !polling) {
        errx(1, "usage: %s SOCKET [poll]", argv[0]);
    }
    ctx = vfu_create_ctx(VFU_TRANS_SOCK, argv[1], flags, NULL, VFU_DEV_TYPE_PCI);
    if (ctx == NULL) {
        err(1, "%s", argv[1]);
    }
    if (vfu_pci_init(ctx, VFU_PCI_TYPE_EXPRESS, PCI_HEADER_TYPE_NORMAL, 0) < 0) {
        err(1, "vfu_pci_init");
    }
    vfu_pci_set_id(ctx, 0x1b36, 0x0001, 0, 0);
    if (vfu_setup_region(ctx, VFU_PCI_DEV_BAR0_REGION_IDX, BAR_SIZE, access_bar0,
                         VFU_REGION_FLAG_RW | VFU_REGION_FLAG_MEM, NULL, 0, -1, 0) < 0) {
        err(1, "vfu_setup_region");
    }
    if (vfu_realize_ctx(ctx) < 0) {
        err(1, "vfu_realize_ctx");
    }
    while (vfu_attach_ctx(ctx) < 0) {
        struct pollfd waiting = {.fd = vfu_get_poll_fd(ctx), .events = POLLIN};

        if (errno != EAGAIN && errno != EWOULDBLOCK) {
            err(1, "vfu_attach_ctx");
        }
        poll(&waiting, 1, -1);
    }
    if (polling) {
        serve_polling(ctx);
    } else {
        serve_blocking(ctx);
    }
    vfu_destroy_ctx(ctx);
    return 0;
}
