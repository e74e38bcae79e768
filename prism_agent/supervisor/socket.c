/* Outside the sandbox: make a TCP socket in its network namespace, and hand it to the agent.
 *
 *   prism-supervisor socket NETWORK_NAMESPACE CONNECTION FAMILY
 *
 * For agents without root. The namespace belongs to a user namespace that the agent's user owns;
 * that must be entered first, which only a process of one thread may do. */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/nsfs.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

#include "launch.h"

static int fail(const char *what)
{
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    return 1;
}

static int hand_over(int connection, int descriptor)
{
    union {
        char bytes[CMSG_SPACE(sizeof(int))];
        struct cmsghdr aligned;
    } control = {{0}};
    struct iovec data = {.iov_base = "s", .iov_len = 1};
    struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1,
                             .msg_control = control.bytes, .msg_controllen = sizeof control.bytes};
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(header), &descriptor, sizeof(int));
    return sendmsg(connection, &message, MSG_NOSIGNAL) == 1 ? 0 : -1;
}

int make_socket(int argc, char **argv)
{
    if (argc != 5)
        return 2;
    int network = atoi(argv[2]), connection = atoi(argv[3]), family = atoi(argv[4]);
    int user = ioctl(network, NS_GET_USERNS);
    if (user < 0)
        return fail("find the user namespace");
    if (setns(user, CLONE_NEWUSER) != 0)
        return fail("enter the user namespace");
    if (setns(network, CLONE_NEWNET) != 0)
        return fail("enter the network namespace");
    int made = socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (made < 0)
        return fail("make a socket");
    if (hand_over(connection, made) != 0)
        return fail("hand over a socket");
    return 0;
}
