/* For sandboxes that no descriptor can be passed into: a kernel of its own, as gVisor's, has no word
 * for the host's. What an exec needs then comes as files of a directory that host and sandbox share:
 *
 *   control        the socket, made here
 *   NUMBER.spec    what to run      NUMBER.ring    its output      NUMBER.in    a FIFO, its input
 *
 * Each is unlinked here once it is open. Such a supervisor is root in its sandbox, and the directory
 * is root's: the code of the sandbox runs as its user, so it reaches neither of them. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "named.h"

#define SANDBOX_UID 1000
#define LAST_CAPABILITY 63
#define TYPED_BYTES 4096
#define BACKLOG 4

static const char *shared;
/* What was read for a program that has no room for it now. */
static char typed[EXECS_MAX][TYPED_BYTES];

bool is_named(void)
{
    return shared != NULL;
}

/* Make the socket. It has its name only when it listens: who finds it can connect. -1: failed. */
int listen_in(const char *directory)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    char path[sizeof address.sun_path];
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (fd < 0 ||
        snprintf(address.sun_path, sizeof address.sun_path, "%s/.control", directory) >=
            (int)sizeof address.sun_path ||
        snprintf(path, sizeof path, "%s/control", directory) >= (int)sizeof path)
        return -1;
    unlink(address.sun_path);
    if (bind(fd, (struct sockaddr *)&address, sizeof address) != 0 || listen(fd, BACKLOG) != 0 ||
        rename(address.sun_path, path) != 0)
        return -1;
    shared = directory;
    return fd;
}

/* Connect to a socket that the agent has put there. -1: failed. */
int connect_named(uint64_t number)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd >= 0 && snprintf(address.sun_path, sizeof address.sun_path, "%s/%" PRIu64 ".port", shared,
                            number) < (int)sizeof address.sun_path &&
        connect(fd, (struct sockaddr *)&address, sizeof address) == 0)
        return fd;
    close_fd(&fd);
    return -1;
}

static int open_one(uint64_t number, const char *what, int flags)
{
    char path[256];
    snprintf(path, sizeof path, "%s/%" PRIu64 ".%s", shared, number, what);
    return open(path, flags | O_NOFOLLOW | O_CLOEXEC);
}

static void remove_one(uint64_t number, const char *what)
{
    char path[256];
    snprintf(path, sizeof path, "%s/%" PRIu64 ".%s", shared, number, what);
    unlink(path);
}

/* Open what an exec comes in, as descriptors would have come. 0 or an errno; opened ones are the
 * caller's in any case. */
int open_named(struct exec *exec, int fds[NAMED_FDS], bool with_input)
{
    uint64_t number = exec->number;
    int error = 0, both = -1;
    if ((fds[0] = open_one(number, "spec", O_RDONLY)) < 0 ||
        (fds[1] = open_one(number, "ring", O_RDWR)) < 0)
        error = errno;
    /* gVisor waits for the other end even where it should not: here it is both for a moment. */
    if (with_input && !error &&
        ((both = open_one(number, "in", O_RDWR | O_NONBLOCK)) < 0 ||
         (exec->input = open_one(number, "in", O_RDONLY | O_NONBLOCK)) < 0 ||
         (exec->input_hold = open_one(number, "in", O_WRONLY | O_NONBLOCK)) < 0))
        error = errno;
    close_fd(&both);
    /* What reads a FIFO of the host can neither be killed nor told not to wait: programs get a pipe. */
    if (with_input && !error && !exec->terminal) {
        act_as_user(true);
        if (pipe2(&fds[2], O_CLOEXEC) != 0 || fcntl(fds[3], F_SETFL, O_NONBLOCK) != 0)
            error = errno;
        act_as_user(false);
    }
    remove_one(number, "spec");
    remove_one(number, "ring");
    remove_one(number, "in");
    return error;
}

/* ── the user ─────────────────────────────────────────────────────────────────────────────── */

/* Pipes and terminals are the user's whose process made them, and programs open theirs anew by
 * /dev/stderr or /dev/tty. */
void act_as_user(bool user)
{
    if (shared && seteuid(user ? SANDBOX_UID : 0) != 0) {
        /* They are root's then, and work by their descriptors. */
    }
}

/* Become, for good, what the code of the sandbox runs as. 0: done. */
int become_user(void)
{
    if (!shared)
        return 0;
    for (int capability = 0; capability <= LAST_CAPABILITY; capability++)
        if (prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) != 0 && errno != EINVAL)
            return -1;
    if (setgroups(0, NULL) != 0 || setresgid(SANDBOX_UID, SANDBOX_UID, SANDBOX_UID) != 0 ||
        setresuid(SANDBOX_UID, SANDBOX_UID, SANDBOX_UID) != 0)
        return -1;
    return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
}

/* ── input ────────────────────────────────────────────────────────────────────────────────── */

void close_input(struct exec *exec)
{
    if (exec->input >= 0)
        unwatch(exec->input);
    if (exec->input_waits)
        unwatch(exec->stdin_write);
    close_fd(&exec->input);
    close_fd(&exec->input_hold);
    exec->input_waits = false;
}

static void end_input(struct exec *exec)
{
    close_input(exec);
    close_fd(&exec->stdin_write);
}

void watch_input(struct exec *exec)
{
    if (exec->input >= 0 && !watch(exec->input, KEY_INPUT, (uint32_t)(exec - execs), EPOLLIN))
        end_input(exec);
}

/* Wait for room where it goes, or for more to come. */
static void wait_for_room(struct exec *exec, bool waits)
{
    uint32_t index = (uint32_t)(exec - execs);
    if (exec->input_waits == waits)
        return;
    unwatch(waits ? exec->input : exec->stdin_write);
    exec->input_waits = waits;
    if (!watch(waits ? exec->stdin_write : exec->input, KEY_INPUT, index, waits ? EPOLLOUT : EPOLLIN))
        end_input(exec);
}

/* Hand to the program what has come, as fast as it takes it. One read for each time that there is
 * something to read: gVisor waits for more even where it should not. */
void take_input(struct exec *exec)
{
    char *bytes = typed[exec - execs];
    if (exec->input < 0 || exec->stdin_write < 0)
        return;
    if (!exec->input_waits) {
        ssize_t got = read(exec->input, bytes, TYPED_BYTES);
        if (got < 0 && (errno == EAGAIN || errno == EINTR))
            return;
        if (got <= 0) {
            end_input(exec);
            return;
        }
        exec->typed_begin = 0;
        exec->typed_end = (uint32_t)got;
    }
    while (exec->typed_begin < exec->typed_end) {
        ssize_t done = write(exec->stdin_write, bytes + exec->typed_begin,
                             exec->typed_end - exec->typed_begin);
        if (done < 0 && errno == EINTR)
            continue;
        if (done < 0 && errno == EAGAIN) {
            wait_for_room(exec, true);
            return;
        }
        if (done <= 0) {
            end_input(exec);
            return;
        }
        exec->typed_begin += (uint32_t)done;
    }
    wait_for_room(exec, false);
}
