/* Outside the sandbox: enter its cgroups, become its user, and execute what isolates.
 *
 *   prism-supervisor launch UID OPEN_FILES_MAX CGROUPS [PROCS_FILE…] BINDS [SOURCE TARGET]… -- PROGRAM [ARG…]
 *
 * UID 0 keeps the user. The process is in every cgroup, and has no privilege left, before anything
 * of the sandbox runs.
 *
 * The sandbox's user may not enter the agent's data directory, and bwrap finds what it mounts by
 * path. So what it needs of there is shown below a directory of a mount namespace that only it has;
 * with the last process of the sandbox that is gone too. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sched.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "launch.h"

extern char **environ;

static int fail(const char *what)
{
    fprintf(stderr, "prism-launch: %s: %s\n", what, strerror(errno));
    return 1;
}

static int write_file(const char *path, const char *text)
{
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return -1;
    ssize_t done = write(fd, text, strlen(text));
    close(fd);
    return done < 0 ? -1 : 0;
}

static int set_limit(int resource, rlim_t value)
{
    struct rlimit limit = {value, value};
    return setrlimit(resource, &limit);
}

/* Show each source as STAGE/target. */
#define STAGE "/tmp"
#define BINDS_MAX 8

static int stage(int count, char **pairs)
{
    char path[256], source[64];
    int fds[BINDS_MAX];
    if (unshare(CLONE_NEWNS) != 0 || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) != 0)
        return fail("mount namespace");
    /* Opened in the new namespace, and before the stage may hide them. */
    for (int i = 0; i < count; i++)
        if ((fds[i] = open(pairs[2 * i], O_PATH | O_CLOEXEC)) < 0)
            return fail(pairs[2 * i]);
    if (mount("prism", STAGE, "tmpfs", MS_NOSUID | MS_NODEV, "size=64k,mode=0755") != 0)
        return fail(STAGE);
    for (int i = 0; i < count; i++) {
        struct stat status;
        snprintf(source, sizeof source, "/proc/self/fd/%d", fds[i]);
        if (snprintf(path, sizeof path, STAGE "/%s", pairs[2 * i + 1]) >= (int)sizeof path ||
            fstat(fds[i], &status) != 0)
            return fail(pairs[2 * i]);
        int made = S_ISDIR(status.st_mode) ? mkdir(path, 0755) : mknod(path, S_IFREG | 0644, 0);
        if (made != 0 || mount(source, path, NULL, MS_BIND, NULL) != 0)
            return fail(pairs[2 * i]);
    }
    return 0;
}

int launch(int argc, char **argv)
{
    if (argc < 7)
        return 2;
    uid_t uid = (uid_t)strtoul(argv[2], NULL, 10);
    rlim_t open_files = strtoull(argv[3], NULL, 10);
    int cgroups = atoi(argv[4]);
    if (cgroups < 0 || argc < 7 + cgroups)
        return 2;
    int binds = atoi(argv[5 + cgroups]), program = 6 + cgroups + 2 * binds + 1;
    if (binds < 0 || binds > BINDS_MAX || argc <= program || strcmp(argv[program - 1], "--") != 0)
        return 2;
    setsid();
    umask(022);
    for (int i = 0; i < cgroups; i++)
        if (write_file(argv[5 + i], "0") != 0)
            return fail(argv[5 + i]);
    /* When the machine runs out of memory, a sandbox goes before the agent and the control plane. */
    if (write_file("/proc/self/oom_score_adj", "500") != 0)
        return fail("oom_score_adj");
    /* The supervisor needs descriptors of its own; it gives each exec the sandbox's limit. */
    if (set_limit(RLIMIT_CORE, 0) != 0 || set_limit(RLIMIT_NOFILE, open_files) != 0)
        return fail("setrlimit");
    if (binds > 0 && stage(binds, &argv[6 + cgroups]) != 0)
        return 1;
    if (uid != 0 && (setgroups(0, NULL) != 0 || setresgid(uid, uid, uid) != 0 ||
                     setresuid(uid, uid, uid) != 0))
        return fail("setresuid");
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0)
        return fail("no_new_privs");
    execve(argv[program], &argv[program], environ);
    return fail(argv[program]);
}
