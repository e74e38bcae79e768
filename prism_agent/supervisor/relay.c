/* Ports of a sandbox whose loopback is its own kernel's, as gVisor's: no socket of the host reaches
 * it. So the agent listens on a socket of the shared directory, and the supervisor carries bytes
 * between that and the port:
 *
 *   NUMBER.port    the agent's socket; it removes the name
 *
 * First one byte: 0, or why the port could not be connected to, an errno. Then frames, both ways: a
 * length of 4 bytes and as many bytes; length 0 says that no more comes. A connection that ends
 * without that was broken off, and so is the one at its other end: what is not whole must not seem so.
 *
 * No process for each: one costs some twenty of the threads that gVisor's kernel may have. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "named.h"

#define RELAYS_MAX 256
#define BUFFER_BYTES (16 * 1024)

/* One end of a relay, and what was read there and has not gone on to the other end yet. */
struct side {
    int fd;
    uint32_t events; /* that it is watched for; 0: it is not */
    size_t begin, end;
    bool last; /* no more comes from there */
    char bytes[BUFFER_BYTES];
};

enum { AGENT = 0, PORT = 1 };

static struct relay {
    bool used, connecting;
    bool deaf; /* a side could not be watched: it is ended as soon as nobody looks at it */
    int family;
    uint16_t number;
    struct side sides[2];
    uint32_t frame; /* of the agent's: its length; its bytes that are still to come, once that is known */
    size_t frame_got; /* of its length's 4 bytes */
} relays[RELAYS_MAX];

static void watch_side(struct relay *relay, int which, uint32_t events)
{
    struct side *side = &relay->sides[which];
    if (side->events == events)
        return;
    /* One that is watched for nothing would still tell of its end, again and again. */
    if (side->events)
        unwatch(side->fd);
    side->events = events;
    if (events && !watch(side->fd, KEY_RELAY, (uint32_t)(relay - relays) * 2 + (uint32_t)which, events)) {
        side->events = 0;
        relay->deaf = true;
    }
}

static void end_relay(struct relay *relay, bool broken)
{
    struct linger reset = {.l_onoff = 1, .l_linger = 0};
    /* Closing resets. */
    if (broken && relay->sides[PORT].fd >= 0)
        setsockopt(relay->sides[PORT].fd, SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
    for (int which = 0; which < 2; which++) {
        watch_side(relay, which, 0);
        close_fd(&relay->sides[which].fd);
    }
    relay->used = false;
}

/* One that cannot be watched would hang for ever. */
static void end_if_deaf(struct relay *relay)
{
    unsigned char status = ENOMEM;
    if (!relay->used || !relay->deaf)
        return;
    if (relay->connecting && write(relay->sides[AGENT].fd, &status, 1) != 1) {
        /* It has given up. */
    }
    end_relay(relay, true);
}

/* ── connecting ───────────────────────────────────────────────────────────────────────────── */

static int connect_port(struct relay *relay)
{
    struct sockaddr_in four = {.sin_family = AF_INET, .sin_port = htons(relay->number),
                               .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct sockaddr_in6 six = {.sin6_family = AF_INET6, .sin6_port = htons(relay->number),
                               .sin6_addr = IN6ADDR_LOOPBACK_INIT};
    bool is_four = relay->family == AF_INET;
    int fd = socket(relay->family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    relay->sides[PORT].fd = fd;
    if (fd < 0)
        return errno;
    return connect(fd, is_four ? (struct sockaddr *)&four : (struct sockaddr *)&six,
                   is_four ? sizeof four : sizeof six) == 0 ? 0 : errno;
}

static void look_on(struct relay *relay);

/* What became of a connection to the port; EINPROGRESS: nothing yet. */
static void take_connected(struct relay *relay, int error)
{
    int yes = 1;
    if (error == ECONNREFUSED && relay->family == AF_INET) {
        /* A program that listens on "localhost" may have taken either. */
        watch_side(relay, PORT, 0);
        close_fd(&relay->sides[PORT].fd);
        relay->family = AF_INET6;
        error = connect_port(relay);
        error = error == 0 || error == EINPROGRESS ? error : ECONNREFUSED;
    }
    if (error == EINPROGRESS) {
        watch_side(relay, PORT, EPOLLOUT);
        watch_side(relay, AGENT, EPOLLIN);
        return;
    }
    unsigned char status = (unsigned char)error;
    relay->connecting = false;
    if (write(relay->sides[AGENT].fd, &status, 1) != 1 || error) {
        end_relay(relay, false);
        return;
    }
    setsockopt(relay->sides[PORT].fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    look_on(relay);
}

static void go_on_connecting(struct relay *relay, int which)
{
    struct sockaddr_storage peer;
    socklen_t length = sizeof peer;
    int fd = relay->sides[PORT].fd, error = 0;
    char byte;
    if (which == AGENT) {
        /* It says nothing before it was answered: it has given up. */
        if (recv(relay->sides[AGENT].fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT) >= 0 || errno != EAGAIN)
            end_relay(relay, true);
        return;
    }
    socklen_t size = sizeof error;
    if (getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size) != 0)
        error = errno;
    if (!error && getpeername(fd, (struct sockaddr *)&peer, &length) != 0)
        return;
    take_connected(relay, error);
}

/* ── carrying ─────────────────────────────────────────────────────────────────────────────── */

/* Write what one side has waiting to the other. False: that is broken off. */
static bool pass_on(struct side *from, const struct side *to)
{
    while (from->begin < from->end) {
        ssize_t done = write(to->fd, from->bytes + from->begin, from->end - from->begin);
        if (done < 0 && errno == EINTR)
            continue;
        if (done < 0 && errno == EAGAIN)
            return true;
        if (done <= 0)
            return false;
        from->begin += (size_t)done;
    }
    from->begin = from->end = 0;
    return true;
}

/* Read from the port, and make a frame of it. */
static bool read_port(struct side *port)
{
    uint32_t length;
    ssize_t got = read(port->fd, port->bytes + sizeof length, sizeof port->bytes - sizeof length);
    if (got < 0)
        return errno == EAGAIN || errno == EINTR;
    length = (uint32_t)got;
    memcpy(port->bytes, &length, sizeof length);
    port->end = sizeof length + length;
    port->last = length == 0;
    return true;
}

/* Read from the agent: the length of a frame, or bytes of it. */
static bool read_agent(struct relay *relay, struct side *agent)
{
    bool in_length = relay->frame_got < sizeof relay->frame;
    char *to = in_length ? (char *)&relay->frame + relay->frame_got : agent->bytes;
    size_t room = in_length                              ? sizeof relay->frame - relay->frame_got
                  : relay->frame < sizeof agent->bytes ? relay->frame
                                                         : sizeof agent->bytes;
    ssize_t got = read(agent->fd, to, room);
    if (got < 0)
        return errno == EAGAIN || errno == EINTR;
    /* It ends before it says so, or goes on after it. */
    if (got == 0 || agent->last)
        return false;
    if (!in_length) {
        agent->end = (size_t)got;
        relay->frame -= (uint32_t)got;
        relay->frame_got = relay->frame > 0 ? sizeof relay->frame : 0;
        return true;
    }
    relay->frame_got += (size_t)got;
    if (relay->frame_got < sizeof relay->frame)
        return true;
    if (relay->frame == 0) {
        agent->last = true;
        relay->frame_got = 0;
        shutdown(relay->sides[PORT].fd, SHUT_WR);
    }
    return relay->frame <= RELAY_BYTES_MAX;
}

/* Wait for what each side can do next, or end it if there is nothing more. */
static void look_on(struct relay *relay)
{
    struct side *agent = &relay->sides[AGENT], *port = &relay->sides[PORT];
    bool in_waits = agent->begin < agent->end, out_waits = port->begin < port->end;
    /* The agent goes in good order only after it was told all: then what it said last still counts. */
    bool told_all = port->last && !out_waits;
    if (agent->last && port->last && !in_waits && !out_waits) {
        end_relay(relay, false);
        return;
    }
    watch_side(relay, AGENT, (!in_waits ? EPOLLIN : told_all ? 0 : EPOLLRDHUP) | (out_waits ? EPOLLOUT : 0));
    watch_side(relay, PORT, (out_waits || port->last ? 0 : EPOLLIN) | (in_waits ? EPOLLOUT : 0));
}

/* One side can be read from or written to, or is gone: `index` is the relay's, twice, and which. */
void carry(uint32_t index, uint32_t events)
{
    struct relay *relay = &relays[index / 2];
    struct side *agent = &relay->sides[AGENT], *port = &relay->sides[PORT];
    if (!relay->used)
        return;
    if (relay->connecting) {
        go_on_connecting(relay, (int)(index % 2));
        end_if_deaf(relay);
        return;
    }
    bool whole = pass_on(agent, port) && pass_on(port, agent);
    bool told_all = port->last && port->begin == port->end;
    if (index % 2 == AGENT && events & (EPOLLRDHUP | EPOLLHUP) && agent->begin < agent->end && !told_all)
        whole = false;
    if (whole && index % 2 == AGENT && agent->begin == agent->end)
        whole = read_agent(relay, agent) && pass_on(agent, port);
    if (whole && index % 2 == PORT && port->begin == port->end && !port->last)
        whole = read_port(port) && pass_on(port, agent);
    if (whole)
        look_on(relay);
    else
        end_relay(relay, true);
    end_if_deaf(relay);
}

/* Begin to carry a connection to a port. 0 or an errno. */
int start_relay(const struct message *request)
{
    struct relay *relay = NULL;
    if (!is_named())
        return EOPNOTSUPP;
    if (terminating)
        return ESHUTDOWN;
    if (request->a < 1 || request->a > UINT16_MAX)
        return EINVAL;
    for (int i = 0; i < RELAYS_MAX && !relay; i++)
        relay = relays[i].used ? NULL : &relays[i];
    if (!relay)
        return ENOBUFS;
    int fd = connect_named(request->exec);
    if (fd < 0)
        return ECONNREFUSED;
    relay->used = relay->connecting = true;
    relay->deaf = false;
    relay->family = AF_INET;
    relay->number = (uint16_t)request->a;
    relay->frame = 0;
    relay->frame_got = 0;
    for (int which = 0; which < 2; which++) {
        struct side *side = &relay->sides[which];
        side->fd = which == AGENT ? fd : -1;
        side->events = 0;
        side->begin = side->end = 0;
        side->last = false;
    }
    fcntl(fd, F_SETFL, O_NONBLOCK);
    take_connected(relay, connect_port(relay));
    end_if_deaf(relay);
    return 0;
}
