/* What the agent and the supervisor say to each other; prism_agent/supervisor/protocol.py mirrors it.
 *
 * Both ends run on one machine, so integers have its byte order. One message is one packet of a
 * SOCK_SEQPACKET socket. Output does not travel over the socket: the supervisor writes it into the
 * exec's ring file, which the agent reads; messages only say that there is more. */
#ifndef PRISM_PROTOCOL_H
#define PRISM_PROTOCOL_H

#include <stdint.h>

#define PRISM_MAGIC 0x314d5350u /* "PSM1" */
#define PRISM_VERSION 6

/* Execs that run at once, or have run and are not yet forgotten by the agent. */
#define EXECS_MAX 640
#define SPEC_BYTES_MAX (512 * 1024)
#define SPEC_STRINGS_MAX 2048
#define RING_HEADER_BYTES 4096
/* More than one record of READ_BYTES, or a record would overwrite its own beginning. */
#define RING_BYTES_MIN (128 * 1024)
#define RING_BYTES_MAX (1024 * 1024 * 1024)
#define READ_BYTES (64 * 1024)
#define OUTPUT_BYTES_PER_S_MAX (1ll << 34)
#define LEASE_NS_MAX 86400000000000ll
#define RELAY_BYTES_MAX (64 * 1024)

enum request_kind {
    REQUEST_HELLO = 1,       /* → HELLO, and an UPDATE for each exec known */
    REQUEST_EXEC = 2,        /* number, timeout_ns, flags; fds: spec, ring[, stdin read, stdin write],
                                or none where they come by name (named.c, since version 3) */
    REQUEST_SIGNAL = 3,      /* exec, signal */
    REQUEST_CLOSE_STDIN = 4, /* exec */
    REQUEST_STDIN = 5,       /* exec → STDIN with a descriptor, if it is still open */
    REQUEST_WINDOW = 6,      /* exec, offset up to which it may write; -1: overwrite what is old */
    REQUEST_WAIT = 7,        /* exec, offset: UPDATE once there is output beyond it */
    REQUEST_FORGET = 8,      /* exec, which has ended */
    REQUEST_TERMINATE = 9,   /* SIGTERM to all; the supervisor ends with the last of them */
    REQUEST_RESIZE = 10,     /* exec with a terminal, rows, columns; since version 2 */
    REQUEST_LIMITS = 11,     /* open files of what is run from now on, 0: as it was; bytes a second of
                                all output, 0: no bound; since version 4 */
    REQUEST_LEASE = 12,      /* nanoseconds from now until all is killed, unless another comes before;
                                0: never; since version 5 */
    REQUEST_RELAY = 13,      /* number of the agent's socket, port (relay.c, where execs come by name);
                                since version 6 */
};

#define EXEC_STDIN 1
#define EXEC_OVERWRITE 2
/* A terminal instead of pipes, of the rows from bit 16 and the columns from bit 32 of the flags; its
 * input takes no descriptors. Since version 2. */
#define EXEC_TERMINAL 4

enum event_kind {
    EVENT_HELLO = 1,  /* a: version, b: execs */
    EVENT_UPDATE = 2, /* exec; a: head; b: state, and from bit 8 the number of open pipes */
    EVENT_STDIN = 3,  /* exec; with a descriptor, or a: errno */
    EVENT_ERROR = 4,  /* exec; a: errno */
};

/* Requests and events alike. */
struct message {
    uint32_t magic;
    uint32_t kind;
    uint64_t exec;
    int64_t a;
    int64_t b;
};

/* Begins the file that an exec's program, arguments and environment come in. The strings follow,
 * each ended by NUL: directory, argv, env. */
struct spec_header {
    uint32_t magic;
    uint32_t argc;
    uint32_t envc;
    uint32_t bytes; /* of the strings */
};

enum exec_state { STATE_NEW = 0, STATE_RUNNING = 1, STATE_EXITED = 2, STATE_DRAINED = 3 };
enum exec_reason { REASON_NONE = 0, REASON_NOT_FOUND = 1, REASON_NOT_EXECUTABLE = 2, REASON_TIMEOUT = 3 };

/* Begins a ring file. Offsets are logical: they only grow, and the byte at offset x lies at
 * RING_HEADER_BYTES + x % capacity. Whole records lie in [tail, head). */
struct ring_header {
    uint64_t begin; /* equals `end` unless the header was being written */
    uint32_t magic;
    uint32_t state;
    uint64_t capacity;
    uint64_t head;
    uint64_t tail;
    uint64_t sequence;    /* bytes of output so far */
    uint64_t drained_head; /* head when all that was written before the exit had been taken */
    uint64_t start_ns;    /* wall clock */
    uint64_t exit_ns;
    int32_t exit_code;
    int32_t signal;
    int32_t reason;
    int32_t error;  /* errno of a program that could not be executed */
    int32_t killed; /* SIGKILL was sent on request, so it was not the kernel's */
    int32_t pid;    /* inside the sandbox */
    uint64_t end;
};

struct record_header {
    uint32_t bytes;
    uint32_t stream; /* 1 stdout, 2 stderr */
    uint64_t sequence; /* up to and with this record */
    uint64_t time_ns;
};

#endif
