/* The first process of every sandbox: starts execs, takes their output, reaps, reports.
 *
 *   prism-supervisor supervise LISTEN_FD OPEN_FILES_MAX PROCESSES_MAX ID   (inside, PID 1)
 *   prism-supervisor supervise DIRECTORY OPEN_FILES_MAX PROCESSES_MAX ID   (the same; named.c)
 *   prism-supervisor launch …                                            (outside; launch.c)
 *
 * It outlives the agent. An agent that was killed finds the listening socket by its path and asks
 * again; output and exit statuses wait in files that only the agent and this process hold open.
 *
 * Who may harm it? Code in the sandbox runs as the same user, so this process is not dumpable (no
 * ptrace, no /proc/1/fd, no pidfd_getfd), and as PID 1 it gets no signal it does not ask for. Its
 * tables are static: what is bounded cannot be exhausted. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "exec.h"
#include "launch.h"
#include "named.h"

#define FDS_MAX NAMED_FDS
#define RETRY_NS 100000000

struct exec execs[EXECS_MAX];
static int epoll_fd, listen_fd, signal_fd, connection_fd = -1;
bool terminating;
/* When all is killed, by CLOCK_BOOTTIME; 0: never. The agent extends it, since this sandbox is run
 * elsewhere once its node is given up: what nobody extends has no agent that could end it. */
static uint64_t lease_ns;
rlim_t open_files_max, processes_max;

uint64_t now_ns(clockid_t clock)
{
    struct timespec now;
    clock_gettime(clock, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

void close_fd(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

bool watch(int fd, uint32_t key, uint32_t index, uint32_t events)
{
    struct epoll_event event = {.events = events, .data.u64 = (uint64_t)key << 32 | index};
    return epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event) == 0;
}

void unwatch(int fd)
{
    epoll_ctl(epoll_fd, EPOLL_CTL_DEL, fd, NULL);
}

/* ── to the agent ─────────────────────────────────────────────────────────────────────────── */

static void drop_connection(void)
{
    close_fd(&connection_fd);
    for (int i = 0; i < EXECS_MAX; i++)
        execs[i].wait_offset = -1;
}

static bool send_message(struct message message, int fd)
{
    union {
        char bytes[CMSG_SPACE(sizeof(int))];
        struct cmsghdr align;
    } control;
    struct iovec vector = {&message, sizeof message};
    struct msghdr header = {.msg_iov = &vector, .msg_iovlen = 1};
    if (connection_fd < 0)
        return false;
    if (fd >= 0) {
        memset(&control, 0, sizeof control);
        header.msg_control = &control;
        header.msg_controllen = sizeof control.bytes;
        struct cmsghdr *rights = CMSG_FIRSTHDR(&header);
        rights->cmsg_level = SOL_SOCKET;
        rights->cmsg_type = SCM_RIGHTS;
        rights->cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(rights), &fd, sizeof fd);
    }
    message.magic = PRISM_MAGIC;
    return sendmsg(connection_fd, &header, MSG_DONTWAIT | MSG_NOSIGNAL) == (ssize_t)sizeof message;
}

/* An answer that cannot be sent ends the connection: an agent that does not read is not well, and
 * asks for everything anew when it comes back. */
static void answer(uint32_t kind, uint64_t exec, int64_t a, int64_t b, int fd)
{
    if (!send_message((struct message){0, kind, exec, a, b}, fd))
        drop_connection();
}

/* UPDATEs are levels, not edges: one that does not fit now is sent later with newer numbers. */
static void send_updates(void)
{
    bool blocked = false;
    for (int i = 0; i < EXECS_MAX && connection_fd >= 0 && !blocked; i++) {
        struct exec *exec = &execs[i];
        if (!exec->used || !exec->tell)
            continue;
        int64_t open = (exec->pipes[0].fd >= 0) + (exec->pipes[1].fd >= 0);
        struct message update = {0, EVENT_UPDATE, exec->number, (int64_t)exec->header.head,
                                 exec->header.state | open << 8};
        exec->tell = !send_message(update, -1);
        if (exec->tell && errno != EAGAIN)
            drop_connection();
        blocked = exec->tell;
    }
    if (connection_fd >= 0) {
        struct epoll_event event = {.events = EPOLLIN | (blocked ? EPOLLOUT : 0),
                                    .data.u64 = (uint64_t)KEY_CONNECTION << 32};
        epoll_ctl(epoll_fd, EPOLL_CTL_MOD, connection_fd, &event);
    }
}

/* ── ends ─────────────────────────────────────────────────────────────────────────────────── */

/* The session of a process, from /proc/PID/stat; -1 if it is gone. */
static pid_t session_of(const char *pid)
{
    char path[64], text[512];
    snprintf(path, sizeof path, "/proc/%.20s/stat", pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -1;
    ssize_t length = read(fd, text, sizeof text - 1);
    close(fd);
    if (length <= 0)
        return -1;
    text[length] = 0;
    /* The name in parentheses may hold anything: what counts comes after the last one. */
    char *rest = strrchr(text, ')');
    int session = -1;
    if (!rest || sscanf(rest + 1, " %*c %*d %*d %d", &session) != 1)
        return -1;
    return session;
}

/* Signal each process of an exec's session once; a SIGKILL goes on until no new one appears. */
static void signal_exec(struct exec *exec, int signal)
{
    if (exec->pid <= 0)
        return;
    if (signal == SIGKILL)
        exec->header.killed = 1;
    /* By its number: one that was started just now may not have its session yet. */
    kill(exec->pid, signal);
    for (int round = 0; round < (signal == SIGKILL ? 3 : 1); round++) {
        DIR *directory = opendir("/proc");
        if (!directory) {
            kill(-exec->pid, signal);
            return;
        }
        struct dirent *entry;
        while ((entry = readdir(directory)))
            if (entry->d_name[0] >= '1' && entry->d_name[0] <= '9' &&
                (pid_t)atoi(entry->d_name) != exec->pid && session_of(entry->d_name) == exec->pid)
                kill((pid_t)atoi(entry->d_name), signal);
        closedir(directory);
    }
}

static void record_exit(struct exec *exec, int status)
{
    struct ring_header *header = &exec->header;
    int error = 0;
    exec->pid = 0;
    exec->deadline_ns = 0;
    header->exit_ns = now_ns(CLOCK_REALTIME);
    header->signal = WIFSIGNALED(status) ? WTERMSIG(status) : 0;
    header->exit_code = header->signal ? 128 + header->signal : WEXITSTATUS(status);
    if (read(exec->failure, &error, sizeof error) == (ssize_t)sizeof error) {
        header->error = error;
        header->reason = error == ENOENT || error == ENOTDIR ? REASON_NOT_FOUND : REASON_NOT_EXECUTABLE;
    }
    close_fd(&exec->failure);
    close_input(exec);
    close_fd(&exec->stdin_write);
    close_fd(&exec->slave);
    for (int stream = 0; stream < 2; stream++) {
        int pending = 0;
        if (exec->terminal) {
            /* What it wrote may not have come through yet: only reading it all tells. */
            exec->pipes[stream].pending = exec->pipes[stream].fd >= 0 ? INT64_MAX : 0;
            continue;
        }
        if (exec->pipes[stream].fd >= 0 && ioctl(exec->pipes[stream].fd, FIONREAD, &pending) == 0)
            exec->pipes[stream].pending = pending;
    }
    header->state = STATE_EXITED;
    for (int stream = 0; stream < 2; stream++)
        while (exec->pipes[stream].pending > 0 && take_output(exec, stream))
            ;
    check_drained(exec);
    exec->tell = true;
    write_header(exec);
}

static void reap(void)
{
    struct signalfd_siginfo info;
    while (read(signal_fd, &info, sizeof info) > 0)
        ;
    for (;;) {
        int status;
        pid_t pid = waitpid(-1, &status, WNOHANG);
        if (pid < 0 && errno == ECHILD && terminating) {
            send_updates();
            exit(0);
        }
        if (pid <= 0)
            return;
        for (int i = 0; i < EXECS_MAX; i++)
            if (execs[i].used && execs[i].pid == pid)
                record_exit(&execs[i], status);
    }
}

/* ── from the agent ───────────────────────────────────────────────────────────────────────── */

static void say_hello(void)
{
    int64_t count = 0;
    for (int i = 0; i < EXECS_MAX; i++) {
        execs[i].tell = execs[i].used;
        count += execs[i].used;
    }
    answer(EVENT_HELLO, 0, PRISM_VERSION, count, -1);
}

static int handle_for_exec(const struct message *request, struct exec *exec)
{
    switch (request->kind) {
    case REQUEST_SIGNAL:
        if (request->a < 1 || request->a > 64)
            return EINVAL;
        if (exec->pid <= 0)
            return ESRCH;
        signal_exec(exec, (int)request->a);
        return 0;
    case REQUEST_CLOSE_STDIN:
        /* What was typed and not yet read comes first. */
        close_fd(exec->input >= 0 ? &exec->input_hold : &exec->stdin_write);
        return 0;
    case REQUEST_STDIN:
        answer(EVENT_STDIN, exec->number, exec->stdin_write < 0 ? EPIPE : 0, 0, exec->stdin_write);
        return 0;
    case REQUEST_RESIZE:
        if (!exec->terminal)
            return ENOTTY;
        /* The kernel sends SIGWINCH; gVisor's does not. One that has ended has nobody to tell. */
        if (exec->pid > 0 && is_named()) {
            int error = set_window_size(exec->pipes[0].fd, request->a, request->b);
            signal_exec(exec, SIGWINCH);
            return error;
        }
        return exec->pid > 0 ? set_window_size(exec->pipes[0].fd, request->a, request->b) : 0;
    case REQUEST_WINDOW:
        if (exec->header.state != STATE_DRAINED)
            exec->window = request->a < 0 ? -1 : request->a;
        resume_output(exec);
        return 0;
    case REQUEST_WAIT:
        exec->wait_offset = request->a < 0 ? 0 : request->a;
        if (exec->header.head > (uint64_t)exec->wait_offset) {
            exec->wait_offset = -1;
            exec->tell = true;
        }
        return 0;
    case REQUEST_FORGET:
        if (exec->pid > 0)
            return EBUSY;
        forget(exec);
        return 0;
    default:
        return EBADMSG;
    }
}

static void handle(const struct message *request, int *fds, int fd_count)
{
    int error = 0;
    if (request->kind == REQUEST_HELLO) {
        say_hello();
    } else if (request->kind == REQUEST_TERMINATE) {
        terminating = true;
        /* What was held back would be lost with this process. */
        set_rate(0);
        kill(-1, SIGTERM);
        kill(-1, SIGCONT);
        reap();
    } else if (request->kind == REQUEST_LIMITS) {
        if (request->a < 0 || request->b < 0 || request->b > OUTPUT_BYTES_PER_S_MAX)
            error = EINVAL;
        else {
            open_files_max = request->a > 0 ? (rlim_t)request->a : open_files_max;
            set_rate((uint64_t)request->b);
        }
    } else if (request->kind == REQUEST_LEASE) {
        if (request->a < 0 || request->a > LEASE_NS_MAX)
            error = EINVAL;
        else
            lease_ns = request->a > 0 ? now_ns(CLOCK_BOOTTIME) + (uint64_t)request->a : 0;
    } else if (request->kind == REQUEST_EXEC) {
        error = start_exec(request, fds, fd_count);
    } else if (request->kind == REQUEST_RELAY) {
        error = start_relay(request);
    } else {
        struct exec *exec = find_exec(request->exec);
        error = exec ? handle_for_exec(request, exec) : ENOENT;
    }
    if (error)
        answer(EVENT_ERROR, request->exec, error, request->kind, -1);
}

/* Read one request. False: there is none now, or the connection is gone. */
static bool receive(void)
{
    union {
        char bytes[CMSG_SPACE(FDS_MAX * sizeof(int))];
        struct cmsghdr align;
    } control;
    struct message request;
    struct iovec vector = {&request, sizeof request};
    struct msghdr header = {.msg_iov = &vector, .msg_iovlen = 1, .msg_control = &control,
                            .msg_controllen = sizeof control.bytes};
    int fds[FDS_MAX] = {-1, -1, -1, -1}, fd_count = 0;
    ssize_t length = recvmsg(connection_fd, &header, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (length < 0 && (errno == EAGAIN || errno == EINTR))
        return false;
    if (length <= 0) {
        drop_connection();
        return false;
    }
    for (struct cmsghdr *part = CMSG_FIRSTHDR(&header); part; part = CMSG_NXTHDR(&header, part))
        if (part->cmsg_level == SOL_SOCKET && part->cmsg_type == SCM_RIGHTS) {
            fd_count = (int)((part->cmsg_len - CMSG_LEN(0)) / sizeof(int));
            memcpy(fds, CMSG_DATA(part), (size_t)fd_count * sizeof(int));
        }
    if (length != (ssize_t)sizeof request || request.magic != PRISM_MAGIC ||
        header.msg_flags & (MSG_TRUNC | MSG_CTRUNC))
        answer(EVENT_ERROR, 0, EBADMSG, 0, -1);
    else
        handle(&request, fds, fd_count);
    for (int i = 0; i < FDS_MAX; i++)
        close_fd(&fds[i]);
    return connection_fd >= 0;
}

/* The newest connection is the agent; an older one is of an agent that was killed. */
static void accept_connection(void)
{
    int fd = accept4(listen_fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd < 0)
        return;
    drop_connection();
    connection_fd = fd;
    if (!watch(fd, KEY_CONNECTION, 0, EPOLLIN))
        drop_connection();
}

static uint64_t lease_left_ns(void)
{
    uint64_t now = now_ns(CLOCK_BOOTTIME);
    if (!lease_ns)
        return UINT64_MAX;
    return lease_ns > now ? lease_ns - now : 0;
}

/* Perform what is due, and return milliseconds until the next thing is, or -1. */
static int run_timers(void)
{
    uint64_t now = now_ns(CLOCK_MONOTONIC), next = UINT64_MAX;
    /* Another is the first each time, so that none of those that share a rate takes it all. */
    static unsigned first;
    first++;
    for (unsigned i = 0; i < EXECS_MAX; i++) {
        struct exec *exec = &execs[(first + i) % EXECS_MAX];
        if (!exec->used)
            continue;
        if (exec->deadline_ns && exec->deadline_ns <= now) {
            exec->deadline_ns = 0;
            exec->header.reason = REASON_TIMEOUT;
            signal_exec(exec, SIGKILL);
        }
        if (exec->full || (exec->throttled && rate_wait_ns() == 0))
            resume_output(exec);
        if (exec->unwritten) {
            /* An end that no file tells of would keep its clients waiting for ever. */
            write_header(exec);
            exec->tell |= !exec->unwritten;
        }
        if (exec->deadline_ns && exec->deadline_ns < next)
            next = exec->deadline_ns;
        if ((exec->full || exec->unwritten) && now + RETRY_NS < next)
            next = now + RETRY_NS;
        if (exec->throttled && now + rate_wait_ns() < next)
            next = now + rate_wait_ns();
    }
    uint64_t wait_ns = next == UINT64_MAX ? UINT64_MAX : next - now, left_ns = lease_left_ns();
    if (left_ns < wait_ns)
        wait_ns = left_ns;
    if (wait_ns == UINT64_MAX)
        return -1;
    if (wait_ns == 0)
        return 0;
    return (int)(wait_ns / 1000000 < 60000 ? wait_ns / 1000000 + 1 : 60000);
}

static void serve(void)
{
    for (;;) {
        struct epoll_event events[64];
        int timeout = run_timers();
        send_updates();
        bool over = lease_left_ns() == 0;
        int count = epoll_wait(epoll_fd, events, 64, timeout);
        for (int i = 0; i < count; i++) {
            uint32_t key = (uint32_t)(events[i].data.u64 >> 32), index = (uint32_t)events[i].data.u64;
            if (key == KEY_LISTEN)
                accept_connection();
            else if (key == KEY_SIGNAL)
                reap();
            else if (key == KEY_PIPE && execs[index / 2].used)
                take_output(&execs[index / 2], (int)(index % 2));
            else if (key == KEY_INPUT && execs[index].used)
                take_input(&execs[index]);
            else if (key == KEY_RELAY)
                carry(index, events[i].events);
            else if (key == KEY_CONNECTION && connection_fd >= 0)
                for (int left = 64; left > 0 && receive(); left--)
                    ;
        }
        /* What was frozen looks first at what it was told meanwhile. PID 1 takes all with it. */
        if (over && count >= 0 && lease_left_ns() == 0)
            exit(0);
    }
}

static int supervise(int argc, char **argv)
{
    sigset_t child;
    /* Elsewhere than in a PID namespace of its own, TERMINATE would signal the whole machine. */
    if (argc != 6 || getpid() != 1)
        return 2;
    listen_fd = argv[2][0] == '/' ? listen_in(argv[2]) : atoi(argv[2]);
    open_files_max = (rlim_t)atoll(argv[3]);
    processes_max = (rlim_t)atoll(argv[4]);
    if (prctl(PR_SET_DUMPABLE, 0) != 0)
        return 3;
    /* Only this one: PID 1 is sent nothing that it does not ask for, but what it blocks would be
     * queued, and the code of the sandbox could fill the queue that the kernel gives to its user. */
    sigemptyset(&child);
    sigaddset(&child, SIGCHLD);
    sigprocmask(SIG_SETMASK, &child, NULL);
    signal(SIGPIPE, SIG_IGN);
    signal_fd = signalfd(-1, &child, SFD_CLOEXEC | SFD_NONBLOCK);
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (signal_fd < 0 || epoll_fd < 0 || fcntl(listen_fd, F_SETFD, FD_CLOEXEC) != 0 ||
        fcntl(listen_fd, F_SETFL, O_NONBLOCK) != 0)
        return 4;
    for (int fd = 3; fd < 256; fd++)
        if (fd != listen_fd && fd != signal_fd && fd != epoll_fd)
            close(fd);
    if (!watch(listen_fd, KEY_LISTEN, 0, EPOLLIN) || !watch(signal_fd, KEY_SIGNAL, 0, EPOLLIN))
        return 5;
    serve();
    return 0;
}

int main(int argc, char **argv)
{
    if (argc > 1 && strcmp(argv[1], "supervise") == 0)
        return supervise(argc, argv);
    if (argc > 1 && (strcmp(argv[1], "launch") == 0 || strcmp(argv[1], "launch-in") == 0))
        return launch(argc, argv);
    if (argc > 1 && strcmp(argv[1], "namespace") == 0)
        return hold_namespace(argc, argv);
    if (argc > 1 && strcmp(argv[1], "socket") == 0)
        return make_socket(argc, argv);
    fprintf(stderr, "prism-supervisor is started by prism-agent\n");
    return 2;
}
