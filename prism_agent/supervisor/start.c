/* Execs are started here: the agent's spec is checked, and a process becomes the program. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "exec.h"
#include "named.h"

static char spec_buffer[SPEC_BYTES_MAX + 1];
static char *spec_strings[SPEC_STRINGS_MAX + 2];

struct exec *find_exec(uint64_t number)
{
    for (int i = 0; i < EXECS_MAX; i++)
        if (execs[i].used && execs[i].number == number)
            return &execs[i];
    return NULL;
}

void forget(struct exec *exec)
{
    close_fd(&exec->ring);
    close_input(exec);
    close_fd(&exec->stdin_write);
    close_fd(&exec->failure);
    close_fd(&exec->slave);
    close_pipe(&exec->pipes[0]);
    close_pipe(&exec->pipes[1]);
    exec->used = false;
}

/* Check a spec, and point `spec_strings` at: directory, argv…, NULL, env…, NULL. 0 or an errno. */
static int read_spec(int fd, uint32_t *argc)
{
    struct spec_header header;
    if (pread(fd, &header, sizeof header, 0) != (ssize_t)sizeof header || header.magic != PRISM_MAGIC)
        return EBADMSG;
    if (header.bytes == 0 || header.bytes > SPEC_BYTES_MAX || header.argc == 0 ||
        header.argc > SPEC_STRINGS_MAX || header.envc > SPEC_STRINGS_MAX ||
        header.argc + header.envc + 3 > SPEC_STRINGS_MAX)
        return E2BIG;
    if (pread(fd, spec_buffer, header.bytes, sizeof header) != (ssize_t)header.bytes ||
        spec_buffer[header.bytes - 1] != 0)
        return EBADMSG;
    char *next = spec_buffer, *end = spec_buffer + header.bytes;
    uint32_t slot = 0;
    for (uint32_t i = 0; i < 1 + header.argc + header.envc; i++) {
        if (next >= end)
            return EBADMSG;
        if (i == 1 + header.argc)
            spec_strings[slot++] = NULL;
        spec_strings[slot++] = next;
        next += strlen(next) + 1;
    }
    if (header.envc == 0)
        spec_strings[slot++] = NULL;
    spec_strings[slot] = NULL;
    *argc = header.argc;
    return next == end ? 0 : EBADMSG;
}

static void fail_exec(const char *what, int error)
{
    char line[512];
    int length = snprintf(line, sizeof line, "prism: %.400s: %s\n", what, strerror(error));
    if (write(STDERR_FILENO, line, (size_t)length) < 0) {
        /* Nobody reads it; the reason travels by the other pipe. */
    }
    if (write(3, &error, sizeof error) < 0)
        _exit(125);
    _exit(error == ENOENT || error == ENOTDIR ? 127 : 126);
}

static void execute(char **argv, char **env)
{
    const char *path = "/usr/local/bin:/usr/bin:/bin";
    int error = ENOENT;
    char file[PATH_MAX];
    if (argv[0][0] == 0)
        fail_exec("''", ENOENT);
    if (strchr(argv[0], '/')) {
        execve(argv[0], argv, env);
        fail_exec(argv[0], errno);
    }
    for (char **variable = env; *variable; variable++)
        if (strncmp(*variable, "PATH=", 5) == 0)
            path = *variable + 5;
    while (*path) {
        size_t length = strcspn(path, ":");
        if (length > 0 && snprintf(file, sizeof file, "%.*s/%s", (int)length, path, argv[0]) <
                              (int)sizeof file) {
            execve(file, argv, env);
            if (errno != ENOENT && errno != ENOTDIR)
                error = errno;
        }
        path += length + (path[length] == ':');
    }
    fail_exec(argv[0], error);
}

static void run_child(int input, int output, int errors, int failure, bool terminal, uint32_t argc)
{
    struct rlimit files = {open_files_max, open_files_max};
    sigset_t none;
    setsid();
    /* Away from 0 to 3 first, so that none of them is overwritten before it was used. */
    int away[4] = {fcntl(input, F_DUPFD, 900), fcntl(output, F_DUPFD, 900),
                   fcntl(errors, F_DUPFD, 900), fcntl(failure, F_DUPFD, 900)};
    for (int i = 0; i < 4; i++)
        if (away[i] < 0 || dup3(away[i], i, i == 3 ? O_CLOEXEC : 0) < 0)
            _exit(125);
    if (terminal && ioctl(STDIN_FILENO, TIOCSCTTY, 0) != 0)
        _exit(125);
    /* Not ~0u: gVisor takes it for -1. */
    if (close_range(4, INT_MAX, 0) != 0)
        _exit(125);
    signal(SIGPIPE, SIG_DFL);
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    setrlimit(RLIMIT_NOFILE, &files);
    /* Where a cgroup counts processes this is 0: the kernel counts them per user and namespace. */
    if (processes_max > 0)
        setrlimit(RLIMIT_NPROC, &(struct rlimit){processes_max, processes_max});
    umask(022);
    if (become_user() != 0)
        _exit(125);
    if (chdir(spec_strings[0]) != 0)
        fail_exec(spec_strings[0], errno);
    execute(&spec_strings[1], &spec_strings[1 + argc + 1]);
}

int set_window_size(int master, int64_t rows, int64_t columns)
{
    if (rows < 1 || rows > UINT16_MAX || columns < 1 || columns > UINT16_MAX)
        return EINVAL;
    struct winsize size = {.ws_row = (unsigned short)rows, .ws_col = (unsigned short)columns};
    return ioctl(master, TIOCSWINSZ, &size) == 0 ? 0 : errno;
}

/* Make a terminal of the sandbox's own devpts. Its other end is had from the master, and not by a
 * path; `ends` are master and slave. 0 or an errno. */
static int open_terminal(int ends[2], int64_t rows, int64_t columns)
{
    int locked = 0, number;
    char path[32];
    if ((ends[0] = open("/dev/ptmx", O_RDWR | O_NOCTTY | O_NONBLOCK | O_CLOEXEC)) < 0 ||
        ioctl(ends[0], TIOCSPTLCK, &locked) != 0)
        return errno;
    ends[1] = ioctl(ends[0], TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (ends[1] < 0 && is_named() && ioctl(ends[0], TIOCGPTN, &number) == 0) {
        /* gVisor has no such call; nobody but its kernel can have put anything else there. */
        snprintf(path, sizeof path, "/dev/pts/%d", number);
        ends[1] = open(path, O_RDWR | O_NOCTTY | O_CLOEXEC);
    }
    if (ends[1] < 0)
        return errno;
    return set_window_size(ends[0], rows, columns);
}

/* Fork the exec's process. Takes no descriptor of the agent's; 0 or an errno. */
static int start_process(struct exec *exec, int input, int64_t flags, uint32_t argc)
{
    int pipes[3][2] = {{-1, -1}, {-1, -1}, {-1, -1}};
    int error = 0, null = -1;
    act_as_user(true);
    if (exec->terminal)
        error = open_terminal(pipes[0], flags >> 16 & UINT16_MAX, flags >> 32 & UINT16_MAX);
    for (int i = exec->terminal ? 2 : 0; i < 3 && !error; i++) {
        if (i == 2)
            act_as_user(false);
        if (pipe2(pipes[i], O_CLOEXEC) != 0)
            error = errno;
    }
    act_as_user(false);
    if (!error && exec->terminal)
        input = pipes[0][1];
    if (!error && input < 0 && (null = open("/dev/null", O_RDONLY | O_CLOEXEC)) < 0)
        error = errno;
    if (!error) {
        exec->header.state = STATE_RUNNING;
        exec->header.start_ns = now_ns(CLOCK_REALTIME);
        /* On file before it runs: what is still NEW was never started. */
        write_header(exec);
        exec->pid = fork();
        if (exec->pid == 0)
            run_child(input < 0 ? null : input, pipes[0][1], pipes[exec->terminal ? 0 : 1][1],
                      pipes[2][1], exec->terminal, argc);
        if (exec->pid < 0) {
            error = errno;
            exec->pid = 0;
            exec->header.state = STATE_NEW;
            write_header(exec);
        }
    }
    if (exec->terminal && !error) {
        exec->slave = pipes[0][1];
        pipes[0][1] = -1;
    }
    for (int i = 0; i < 3; i++) {
        close_fd(&pipes[i][1]);
        if (error)
            close_fd(&pipes[i][0]);
        else if (pipes[i][0] >= 0)
            fcntl(pipes[i][0], F_SETFL, O_NONBLOCK);
    }
    close_fd(&null);
    exec->pipes[0].fd = pipes[0][0];
    exec->pipes[1].fd = pipes[1][0];
    exec->failure = pipes[2][0];
    return error;
}

int start_exec(const struct message *request, int *fds, int fd_count)
{
    bool with_stdin = request->b & EXEC_STDIN, terminal = request->b & EXEC_TERMINAL;
    uint32_t argc = 0;
    struct exec *exec = NULL;
    if (terminating)
        return ESHUTDOWN;
    if (fd_count != (is_named() ? 0 : with_stdin && !terminal ? 4 : 2) || request->a < 0)
        return EBADMSG;
    if (find_exec(request->exec))
        return EEXIST;
    for (int i = 0; i < EXECS_MAX && !exec; i++)
        exec = execs[i].used ? NULL : &execs[i];
    if (!exec)
        return ENOBUFS;
    *exec = (struct exec){.number = request->exec, .terminal = terminal, .ring = -1,
                          .stdin_write = -1, .slave = -1, .failure = -1, .input = -1,
                          .input_hold = -1,
                          .pipes = {{.fd = -1}, {.fd = -1}}, .wait_offset = 0};
    struct stat status;
    int error = is_named() ? open_named(exec, fds, with_stdin) : 0;
    if (!error && (fstat(fds[1], &status) != 0 || !S_ISREG(status.st_mode) ||
                   status.st_size < RING_HEADER_BYTES + RING_BYTES_MIN ||
                   status.st_size > RING_HEADER_BYTES + (off_t)RING_BYTES_MAX))
        error = EBADMSG;
    if (!error)
        error = read_spec(fds[0], &argc);
    if (error) {
        close_input(exec);
        return error;
    }
    exec->header.magic = PRISM_MAGIC;
    exec->header.capacity = (uint64_t)status.st_size - RING_HEADER_BYTES;
    exec->window = request->b & EXEC_OVERWRITE ? -1 : (int64_t)exec->header.capacity;
    exec->ring = fds[1];
    fds[1] = -1;
    error = start_process(exec, with_stdin && !terminal ? fds[2] : -1, request->b, argc);
    if (error) {
        forget(exec);
        return error;
    }
    if (with_stdin && terminal) {
        /* Without one its input stays open and says nothing; the program runs already. */
        exec->stdin_write = fcntl(exec->pipes[0].fd, F_DUPFD_CLOEXEC, 0);
    } else if (with_stdin) {
        exec->stdin_write = fds[3];
        fds[3] = -1;
    }
    if (request->a > 0)
        exec->deadline_ns = now_ns(CLOCK_MONOTONIC) + (uint64_t)request->a;
    exec->header.pid = exec->pid;
    exec->used = true;
    exec->tell = true;
    set_watched(exec, 0, true);
    set_watched(exec, 1, true);
    watch_input(exec);
    return 0;
}

