/* Outside the sandbox: enter its cgroups, become its user, and execute what isolates.
 *
 *   prism-supervisor launch UID OPEN_FILES_MAX CGROUPS [PROCS_FILE…] BINDS [SOURCE TARGET]… -- PROGRAM [ARG…]
 *   prism-supervisor launch-in NAMESPACE DESCRIPTORS UID …
 *   prism-supervisor namespace MOUNT_POINT…
 *
 * UID 0 keeps the user. NAMESPACE is a descriptor of the mount namespace to copy; -1, or without, this
 * process's own is. DESCRIPTORS are all that PROGRAM has beyond the first three, as 4,7,9: any other
 * that it would inherit is closed. The process is in every cgroup, and has no privilege left, before anything of the sandbox
 * runs.
 *
 * The sandbox's user may not enter the agent's data directory, and bwrap finds what it mounts by
 * path. So what it needs of there is shown below a directory of a mount namespace that only it has;
 * with the last process of the sandbox that is gone too.
 *
 * That namespace is a copy, and the host's own has a mount for each sandbox's files: copying those
 * would make each start slower than the one before. So there is one without them, to copy from: the
 * third form makes it, and holds it until its input ends. */
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

static int stage(int namespace, int count, char **pairs)
{
    char path[256];
    int fds[BINDS_MAX];
    struct stat status[BINDS_MAX];
    /* Taken before they may be hidden, or be of a namespace that is not ours any more. */
    for (int i = 0; i < count; i++)
        if ((fds[i] = open_tree(AT_FDCWD, pairs[2 * i], OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC)) < 0 ||
            fstat(fds[i], &status[i]) != 0)
            return fail(pairs[2 * i]);
    if (namespace >= 0 && (setns(namespace, CLONE_NEWNS) != 0 || close(namespace) != 0))
        return fail("mount namespace to copy");
    if (unshare(CLONE_NEWNS) != 0 || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) != 0)
        return fail("mount namespace");
    if (mount("prism", STAGE, "tmpfs", MS_NOSUID | MS_NODEV, "size=64k,mode=0755") != 0)
        return fail(STAGE);
    for (int i = 0; i < count; i++) {
        if (snprintf(path, sizeof path, STAGE "/%s", pairs[2 * i + 1]) >= (int)sizeof path)
            return fail(pairs[2 * i]);
        int made = S_ISDIR(status[i].st_mode) ? mkdir(path, 0755) : mknod(path, S_IFREG | 0644, 0);
        if (made != 0 || move_mount(fds[i], "", AT_FDCWD, path, MOVE_MOUNT_F_EMPTY_PATH) != 0 ||
            mount(NULL, path, NULL, MS_PRIVATE, NULL) != 0)
            return fail(pairs[2 * i]);
        close(fds[i]);
    }
    return 0;
}

/* Make the mount namespace that launches copy: the host's without these mounts. Says so by a byte. */
int hold_namespace(int argc, char **argv)
{
    char byte = 0;
    if (unshare(CLONE_NEWNS) != 0 || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) != 0)
        return fail("mount namespace");
    for (int i = 2; i < argc; i++)
        if (umount2(argv[i], MNT_DETACH | UMOUNT_NOFOLLOW) != 0 && errno != EINVAL && errno != ENOENT)
            return fail(argv[i]);
    if (write(STDOUT_FILENO, &byte, 1) != 1)
        return 1;
    return read(STDIN_FILENO, &byte, 1) == 0 ? 0 : 1;
}

/* Close all but the first three and those in a list, which is in ascending order. */
static int keep_only(char *list)
{
    unsigned next = 3;
    for (char *part = strtok(list, ","); part; part = strtok(NULL, ",")) {
        unsigned kept = (unsigned)strtoul(part, NULL, 10);
        if (kept < next || (kept > next && close_range(next, kept - 1, 0) != 0))
            return -1;
        next = kept + 1;
    }
    return close_range(next, ~0u, 0);
}

int launch(int argc, char **argv)
{
    int namespace = -1;
    char *kept = NULL;
    if (strcmp(argv[1], "launch-in") == 0) {
        if (argc < 4)
            return 2;
        namespace = atoi(argv[2]);
        kept = argv[3];
        argc -= 2;
        argv += 2;
    }
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
    if (chdir("/") != 0)
        return fail("/");
    for (int i = 0; i < cgroups; i++)
        if (write_file(argv[5 + i], "0") != 0)
            return fail(argv[5 + i]);
    /* When the machine runs out of memory, a sandbox goes before the agent and the control plane. */
    if (write_file("/proc/self/oom_score_adj", "500") != 0)
        return fail("oom_score_adj");
    /* The supervisor needs descriptors of its own; it gives each exec the sandbox's limit. */
    if (set_limit(RLIMIT_CORE, 0) != 0 || set_limit(RLIMIT_NOFILE, open_files) != 0)
        return fail("setrlimit");
    if (binds > 0 && stage(namespace, binds, &argv[6 + cgroups]) != 0)
        return 1;
    if (kept && keep_only(kept) != 0)
        return fail("descriptors");
    if (uid != 0 && (setgroups(0, NULL) != 0 || setresgid(uid, uid, uid) != 0 ||
                     setresuid(uid, uid, uid) != 0))
        return fail("setresuid");
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0)
        return fail("no_new_privs");
    execve(argv[program], &argv[program], environ);
    return fail(argv[program]);
}
