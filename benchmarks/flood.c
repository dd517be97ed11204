// A flood that proves what was lost: numbered frames through NICs, from the guest's side to the TAP's and back.
//
// Owns:        the frames, their numbers, the pace, the counts.
// Never sees:  daemons, rings: it has the two outer ends of each NIC.
// Read next:   flood.py, which runs it.
//
//     flood RATE SIZE IFNAME:FD...
//
// RATE    frames a second each way, all NICs together; 0: as fast as one thread can, which lets go of its processor
//         where a queue is full.
// SIZE    bytes of a frame, 60 to 1514.
// IFNAME  a TAP in this network namespace: the host's end, by a packet socket.
// FD      the guest's end: an inherited, non-blocking socket that keeps messages whole, a vnet header before each frame.
//         -1: somebody else counts what comes out there, and only the way down is flooded.
//
// A line on stdin is answered by a line of counts so far; with "up" or "down" on it only that way is flooded from then
// on. The end of stdin ends the flood: what is on its way is awaited, and the last line of counts follows.

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_packet.h>
#include <net/if.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

enum {
    FRAME_SIZE_MIN = 60,        // Ethernet's shortest, without its checksum
    FRAME_SIZE_MAX = 1514,      // at MTU 1500
    HEADER_SIZE = 12,           // virtio-net's, all zero: no checksum, no segmentation
    ETHERTYPE = 0x88B5,         // "local experimental" (IEEE 802): nobody else's frames
    NICS_MAX = 1024,
    BATCH = 64,                 // frames one system call moves
    BURST_MAX = 256,            // frames sent at once after a pause; what was due beyond is never sent, so not lost
    TICK_NS = 200 * 1000,       // between two looks at the clock
    FULL_NS = 50 * 1000,        // until a full queue is tried again: it holds a thousand frames, so it is not empty then
    BUFFER_BYTES = 4 << 20,     // of each packet socket: a starved flood shall not be the one that loses
    GRACE_MS = 1000,            // how long nothing may arrive until the rest counts as lost
};

enum { UP, DOWN, WAYS };        // guest to TAP, TAP to guest

static const char *const WAY_NAMES[WAYS] = {"up", "down"};

struct way {
    int from, to;               // where frames go in, and where they come out
    uint64_t next_sent, next_seen;
};

struct nic {
    struct way ways[WAYS];
};

struct counts {
    uint64_t sent;              // taken by the kernel, or refused by it for lack of room
    uint64_t refused;           // those refused
    uint64_t received;
    uint64_t late;              // received after a later one, or twice
    int64_t last_ns;            // when the last one was received
    int64_t silence_ns;         // longest time between two since the last report
};

static struct nic nics[NICS_MAX];
static int nic_count;
static struct counts counts[WAYS];
static bool flooded[WAYS] = {true, true};
static size_t frame_size;
static uint8_t frames[BATCH][HEADER_SIZE + FRAME_SIZE_MAX];
static uint8_t arrived[BATCH][HEADER_SIZE + FRAME_SIZE_MAX];

static void die(const char *what)
{
    fprintf(stderr, "flood: %s: %s\n", what, strerror(errno));
    exit(1);
}

static int64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

// The vnet header stands before frames on the guest's side only.
static size_t head_of(int way, bool sending)
{
    return (way == UP) == sending ? HEADER_SIZE : 0;
}

static int open_tap(const char *name)
{
    int fd = socket(AF_PACKET, SOCK_RAW | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0)
        die("packet socket");
    int size = BUFFER_BYTES, on = 1;
    if (setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof size))
        setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &size, sizeof size);
    setsockopt(fd, SOL_PACKET, PACKET_QDISC_BYPASS, &on, sizeof on);
    struct sockaddr_ll address = {
        .sll_family = AF_PACKET, .sll_protocol = htons(ETHERTYPE), .sll_ifindex = (int)if_nametoindex(name)};
    if (address.sll_ifindex == 0 || bind(fd, (struct sockaddr *)&address, sizeof address))
        die(name);
    return fd;
}

// Sends up to `count` frames into one NIC; how many are done with, 0: there is no room now.
static int send_frames(struct nic *nic, int way, int count)
{
    struct way *w = &nic->ways[way];
    size_t head = head_of(way, true);
    struct iovec pieces[BATCH];
    struct mmsghdr messages[BATCH] = {0};
    for (int i = 0; i < count; i++) {
        uint64_t number = w->next_sent + (uint64_t)i;
        memcpy(frames[i] + HEADER_SIZE + 14, &number, sizeof number);
        pieces[i] = (struct iovec){frames[i] + HEADER_SIZE - head, frame_size + head};
        messages[i].msg_hdr.msg_iov = &pieces[i];
        messages[i].msg_hdr.msg_iovlen = 1;
    }
    int sent = sendmmsg(w->from, messages, (unsigned)count, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent < 0) {
        if (way == UP && (errno == EAGAIN || errno == EPIPE))
            return 0;           // a guest whose ring is full waits
        if (errno != ENOBUFS && errno != EAGAIN && errno != ENETDOWN && errno != ENXIO)
            die("send");
        counts[way].refused++;  // a host whose queue is full drops
        sent = 1;
    }
    w->next_sent += (uint64_t)sent;
    counts[way].sent += (uint64_t)sent;
    return sent;
}

static void receive_frames(struct nic *nic, int way)
{
    struct way *w = &nic->ways[way];
    struct counts *c = &counts[way];
    size_t head = head_of(way, false);
    struct iovec pieces[BATCH];
    struct mmsghdr messages[BATCH] = {0};
    for (int i = 0; i < BATCH; i++) {
        pieces[i] = (struct iovec){arrived[i], sizeof arrived[i]};
        messages[i].msg_hdr.msg_iov = &pieces[i];
        messages[i].msg_hdr.msg_iovlen = 1;
    }
    int count = recvmmsg(w->to, messages, BATCH, MSG_DONTWAIT, NULL);
    if (count < 0) {
        if (errno == EAGAIN || errno == ENETDOWN)
            return;
        die("receive");
    }
    int64_t now = now_ns();
    for (int i = 0; i < count; i++) {
        uint64_t number;
        if (messages[i].msg_len < head + 14 + sizeof number)
            continue;
        if (arrived[i][head + 12] != ETHERTYPE >> 8 || arrived[i][head + 13] != (ETHERTYPE & 0xFF))
            continue;
        memcpy(&number, arrived[i] + head + 14, sizeof number);
        c->received++;
        if (number < w->next_seen)
            c->late++;
        else
            w->next_seen = number + 1;
        if (c->last_ns && now - c->last_ns > c->silence_ns)
            c->silence_ns = now - c->last_ns;
        c->last_ns = now;
    }
}

static void report(void)
{
    printf("{");
    for (int way = 0; way < WAYS; way++) {
        struct counts *c = &counts[way];
        printf("%s\"%s\": {\"sent\": %lu, \"refused\": %lu, \"received\": %lu, \"late\": %lu, \"silence_ns\": %ld}",
               way ? ", " : "", WAY_NAMES[way], c->sent, c->refused, c->received, c->late, c->silence_ns);
        c->silence_ns = 0;
    }
    printf("}\n");
    fflush(stdout);
}

// Whether the flood goes on; false at the end of stdin.
static bool obey(void)
{
    char line[64];
    ssize_t size = read(0, line, sizeof line - 1);
    if (size <= 0)
        return false;
    line[size] = 0;
    if (strncmp(line, "up", 2) == 0 || strncmp(line, "down", 4) == 0)
        for (int way = 0; way < WAYS; way++)
            flooded[way] = strncmp(line, WAY_NAMES[way], strlen(WAY_NAMES[way])) == 0;
    report();
    return true;
}

// Sends what is due each way, a NIC after the other.
static void send_due(uint64_t due[WAYS])
{
    static int turn[WAYS];
    for (int way = 0; way < WAYS; way++) {
        int blocked = 0;
        while (due[way] > 0 && blocked < nic_count) {
            // With many NICs one frame each; with one NIC as many as a call takes.
            uint64_t share = due[way] / (uint64_t)nic_count + 1;
            int count = (int)(share < due[way] ? share : due[way]);
            int sent = send_frames(&nics[turn[way]], way, count < BATCH ? count : BATCH);
            turn[way] = (turn[way] + 1) % nic_count;
            blocked = sent ? 0 : blocked + 1;
            due[way] -= (uint64_t)sent;
        }
    }
}

static void watch(int epoll, int fd, uint64_t what)
{
    struct epoll_event event = {.events = EPOLLIN, .data.u64 = what};
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event))
        die("epoll");
}

static bool all_arrived(void)
{
    return counts[UP].received >= counts[UP].sent && counts[DOWN].received >= counts[DOWN].sent;
}

int main(int argc, char **argv)
{
    if (argc < 4 || argc - 3 > NICS_MAX) {
        fprintf(stderr, "usage: flood RATE SIZE IFNAME:FD...\n");
        return 2;
    }
    uint64_t rate = strtoull(argv[1], NULL, 10);
    frame_size = strtoul(argv[2], NULL, 10);
    if (frame_size < FRAME_SIZE_MIN || frame_size > FRAME_SIZE_MAX) {
        fprintf(stderr, "flood: SIZE %zu is not between %d and %d\n", frame_size, FRAME_SIZE_MIN, FRAME_SIZE_MAX);
        return 2;
    }
    int epoll = epoll_create1(EPOLL_CLOEXEC);
    int timer = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    const uint64_t STDIN = ~0ULL, TIMER = ~1ULL;
    if (epoll < 0 || timer < 0)
        die("epoll");
    watch(epoll, 0, STDIN);
    watch(epoll, timer, TIMER);
    for (int i = 3; i < argc; i++) {
        char *colon = strchr(argv[i], ':');
        if (colon == NULL)
            die(argv[i]);
        *colon = 0;
        int tap = open_tap(argv[i]), guest = atoi(colon + 1);
        struct nic *nic = &nics[nic_count];
        nic->ways[UP] = (struct way){.from = guest, .to = tap};
        nic->ways[DOWN] = (struct way){.from = tap, .to = guest};
        watch(epoll, tap, (uint64_t)nic_count * WAYS + UP);
        if (guest < 0)
            flooded[UP] = false;
        else
            watch(epoll, guest, (uint64_t)nic_count * WAYS + DOWN);
        nic_count++;
    }
    for (int i = 0; i < BATCH; i++) {
        memset(frames[i] + HEADER_SIZE, 0xFF, 6);
        memcpy(frames[i] + HEADER_SIZE + 6, "\x52\x54\x00\x00\x00\x01\x88\xB5", 8);
    }
    struct itimerspec tick = {.it_interval.tv_nsec = TICK_NS, .it_value.tv_nsec = TICK_NS};
    timerfd_settime(timer, 0, &tick, NULL);
    report();

    int64_t begun = now_ns();
    uint64_t asked = 0;         // frames a way that the pace has asked for
    bool flooding = true;
    int64_t quiet_since = 0;
    while (flooding || (!all_arrived() && now_ns() - quiet_since < GRACE_MS * 1000000LL)) {
        struct epoll_event events[BATCH];
        int count = epoll_wait(epoll, events, BATCH, flooding && rate == 0 ? 0 : GRACE_MS / 10);
        uint64_t before = counts[UP].received + counts[DOWN].received;
        for (int i = 0; i < count; i++) {
            uint64_t what = events[i].data.u64, ticks;
            if (what == STDIN) {
                if (flooding && !obey()) {
                    flooding = false;
                    quiet_since = now_ns();
                    epoll_ctl(epoll, EPOLL_CTL_DEL, 0, NULL);
                }
            } else if (what == TIMER) {
                if (read(timer, &ticks, sizeof ticks) < 0 && errno != EAGAIN)
                    die("timer");
            } else {
                receive_frames(&nics[what / WAYS], (int)(what % WAYS));
            }
        }
        if (!flooding && counts[UP].received + counts[DOWN].received > before)
            quiet_since = now_ns();
        if (!flooding)
            continue;
        uint64_t due = BATCH;
        if (rate > 0) {
            uint64_t goal = (uint64_t)((double)(now_ns() - begun) * (double)rate / 1e9);
            due = goal - asked < BURST_MAX ? goal - asked : BURST_MAX;
            asked = goal;
        }
        uint64_t refused = counts[DOWN].refused;
        uint64_t dues[WAYS] = {flooded[UP] ? due : 0, flooded[DOWN] ? due : 0};
        send_due(dues);
        if (rate == 0 && counts[DOWN].refused > refused)
            nanosleep(&(struct timespec){.tv_nsec = FULL_NS}, NULL);
    }
    report();
    return 0;
}
