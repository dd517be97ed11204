// What a handover costs that does nothing but move descriptors and bytes between two processes.
//
// Owns:        the messages of a handover, as many as localmig's protocol has, with as many descriptors and bytes.
// Never sees:  localmig.
// Read next:   bare_handover.py, the same in Python; bare.py, which runs both.
//
//     bare_handover ROUNDS DESCRIPTORS SETUP_BYTES SWITCHOVER_BYTES A_MESSAGE asleep|awake
//
//     source                                 destination
//     HELLO, a pidfd            ───────▶
//                               ◀───────     HELLO, a pidfd
//     SETUP, all descriptors    ───────▶
//                               ◀───────     SETUP_ACK
//     SWITCHOVER                ───────▶                          downtime begins
//                               ◀───────     READY
//     COMMIT                    ───────▶                          downtime ends
//                               ◀───────     DONE, with that moment
//
// A_MESSAGE: descriptors that travel with one message. Whoever waits sleeps in the kernel, or stays awake and looks
// again. Both processes live through all rounds: nothing is cold, so it is the least such a handover can cost. The
// output is a line a round: nanoseconds of the whole, and of the downtime in it.

#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum {
    HELLO_BYTES = 300,          // an object or two
    ROW_BYTES = 16,             // a frame's header
    A_MESSAGE_MAX = 253,        // the kernel's SCM_MAX_FD
    DESCRIPTORS_MAX = 100000,
    SPARE = 64,                 // descriptors a process has besides
};

static bool awake;
static uint8_t *bytes;          // what is sent and where it is received
static int received[DESCRIPTORS_MAX + SPARE];
static int received_count;

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static int64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

static bool again(void)
{
    // Too many descriptors in flight: the other process takes some off.
    if (errno == ETOOMANYREFS || errno == EAGAIN) {
        sched_yield();
        return true;
    }
    return errno == EINTR;
}

static void send_piece(int sock, const void *data, size_t size, const int *fds, int count)
{
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(A_MESSAGE_MAX * sizeof(int))];
    } control;
    while (size > 0) {
        struct iovec piece = {(void *)data, size};
        struct msghdr message = {.msg_iov = &piece, .msg_iovlen = 1};
        if (count > 0) {
            message.msg_control = &control;
            message.msg_controllen = CMSG_SPACE((size_t)count * sizeof(int));
            control.header.cmsg_level = SOL_SOCKET;
            control.header.cmsg_type = SCM_RIGHTS;
            control.header.cmsg_len = CMSG_LEN((size_t)count * sizeof(int));
            memcpy(CMSG_DATA(&control.header), fds, (size_t)count * sizeof(int));
        }
        ssize_t sent = sendmsg(sock, &message, MSG_NOSIGNAL);
        if (sent < 0) {
            if (again())
                continue;
            die("sendmsg");
        }
        data = (const char *)data + sent;
        size -= (size_t)sent;
        count = 0;
    }
}

// Sends `size` bytes, `count` descriptors at even distances in them.
static void send_all(int sock, size_t size, const int *fds, int count, int a_message)
{
    size_t at = 0;
    for (int i = 0; i < count; i += a_message) {
        int now = count - i < a_message ? count - i : a_message;
        size_t end = size * (size_t)(i + now) / (size_t)count;
        if (end > at + 1)
            send_piece(sock, bytes, end - at - 1, NULL, 0);
        send_piece(sock, bytes, 1, fds + i, now);
        at = end > at ? end : at + 1;
    }
    if (size > at)
        send_piece(sock, bytes, size - at, NULL, 0);
}

static void receive_all(int sock, size_t size)
{
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(A_MESSAGE_MAX * sizeof(int))];
    } control;
    while (size > 0) {
        struct iovec piece = {bytes, size};
        struct msghdr message = {
            .msg_iov = &piece, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
        ssize_t got = recvmsg(sock, &message, MSG_CMSG_CLOEXEC | (awake ? MSG_DONTWAIT : 0));
        if (got < 0) {
            if (again())
                continue;
            die("recvmsg");
        }
        if (got == 0 || message.msg_flags & MSG_CTRUNC)
            die("channel lost");
        for (struct cmsghdr *c = CMSG_FIRSTHDR(&message); c != NULL; c = CMSG_NXTHDR(&message, c)) {
            int count = (int)((c->cmsg_len - CMSG_LEN(0)) / sizeof(int));
            memcpy(received + received_count, CMSG_DATA(c), (size_t)count * sizeof(int));
            received_count += count;
        }
        size -= (size_t)got;
    }
}

static void close_received(void)
{
    while (received_count > 0)
        close(received[--received_count]);
}

struct sizes {
    int rounds, descriptors, a_message;
    size_t setup, switchover;
};

static void be_destination(int sock, const struct sizes *sizes)
{
    int self = (int)syscall(SYS_pidfd_open, getpid(), 0);
    for (int round = 0; round < sizes->rounds; round++) {
        receive_all(sock, HELLO_BYTES);
        send_all(sock, HELLO_BYTES, &self, 1, 1);
        receive_all(sock, sizes->setup);
        if (received_count != sizes->descriptors + 1)
            die("descriptors lost");
        send_all(sock, ROW_BYTES, NULL, 0, 1);
        receive_all(sock, sizes->switchover);
        send_all(sock, ROW_BYTES, NULL, 0, 1);
        receive_all(sock, ROW_BYTES);
        int64_t ended = now_ns();
        send_piece(sock, &ended, sizeof ended, NULL, 0);
        close_received();
        send_all(sock, 1, NULL, 0, 1); // ready for the next round
    }
}

static void be_source(int sock, const struct sizes *sizes, const int *fds)
{
    int self = (int)syscall(SYS_pidfd_open, getpid(), 0);
    for (int round = 0; round < sizes->rounds; round++) {
        int64_t begun = now_ns();
        send_all(sock, HELLO_BYTES, &self, 1, 1);
        receive_all(sock, HELLO_BYTES);
        send_all(sock, sizes->setup, fds, sizes->descriptors, sizes->a_message);
        receive_all(sock, ROW_BYTES);
        int64_t stopped = now_ns(), started;
        send_all(sock, sizes->switchover, NULL, 0, 1);
        receive_all(sock, ROW_BYTES);
        send_all(sock, ROW_BYTES, NULL, 0, 1);
        receive_all(sock, sizeof started);
        int64_t ended = now_ns();
        memcpy(&started, bytes, sizeof started);
        close_received();
        receive_all(sock, 1);
        printf("%ld %ld\n", ended - begun, started - stopped);
    }
}

// Of every kind a NIC has: a socket, a file in memory, eventfds.
static int open_one(int number)
{
    int pair[2];
    switch (number % 12) {
    case 0:
        if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair))
            return -1;
        close(pair[1]);
        return pair[0];
    case 1:
        return memfd_create("bare", MFD_CLOEXEC);
    default:
        return eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    }
}

int main(int argc, char **argv)
{
    if (argc != 7) {
        fprintf(stderr, "usage: bare_handover ROUNDS DESCRIPTORS SETUP_BYTES SWITCHOVER_BYTES A_MESSAGE asleep|awake\n");
        return 2;
    }
    struct sizes sizes = {.rounds = atoi(argv[1]), .descriptors = atoi(argv[2]), .setup = strtoul(argv[3], NULL, 10),
                          .switchover = strtoul(argv[4], NULL, 10), .a_message = atoi(argv[5])};
    awake = strcmp(argv[6], "awake") == 0;
    if (sizes.descriptors < 0 || sizes.descriptors > DESCRIPTORS_MAX || sizes.a_message < 1 ||
        sizes.a_message > A_MESSAGE_MAX || sizes.setup < (size_t)sizes.descriptors + ROW_BYTES) {
        fprintf(stderr, "bare_handover: sizes out of range\n");
        return 2;
    }
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    size_t most = sizes.setup > sizes.switchover ? sizes.setup : sizes.switchover;
    bytes = calloc(1, most + HELLO_BYTES);
    int *fds = calloc((size_t)sizes.descriptors + 1, sizeof *fds), pair[2];
    for (int i = 0; i < sizes.descriptors; i++)
        if ((fds[i] = open_one(i)) < 0)
            die("descriptors");
    if (bytes == NULL || socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair))
        die("socketpair");
    pid_t destination = fork();
    if (destination < 0)
        die("fork");
    if (destination == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        for (int i = 0; i < sizes.descriptors; i++)
            close(fds[i]);
        close(pair[0]);
        be_destination(pair[1], &sizes);
        _exit(0);
    }
    close(pair[1]);
    be_source(pair[0], &sizes, fds);
    int status;
    waitpid(destination, &status, 0);
    return status == 0 ? 0 : 1;
}
