/* Execs, and what the parts of the supervisor share of them. */
#ifndef PRISM_EXEC_H
#define PRISM_EXEC_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/resource.h>
#include <sys/types.h>
#include <time.h>

#include "protocol.h"

struct pipe_end {
    int fd;          /* -1: closed */
    bool watched;    /* in the epoll set */
    int64_t pending; /* bytes that were in it when the process ended */
};

struct exec {
    bool used;
    bool terminal; /* the first of the pipes is the master of its terminal, and there is no other */
    uint64_t number;
    pid_t pid; /* 0 once it has ended; also the number of its session */
    int ring;
    int stdin_write;
    int slave;   /* of its terminal: while it is open, reading the master does not end */
    int failure; /* read end: what kept the program from being executed */
    int input;        /* where it comes by name: what is read goes to stdin_write */
    int input_hold;   /* its other end, so that it does not end with the agent */
    bool input_waits; /* stdin_write is full: its room is watched, and not the input */
    uint32_t typed_begin, typed_end;
    struct pipe_end pipes[2];
    struct ring_header header;
    uint64_t allocated;  /* bytes of the ring that surely have room on disk */
    int64_t window;      /* may write up to here; -1: may overwrite */
    int64_t wait_offset; /* tell when there is output beyond it; -1: nobody asks */
    bool tell;           /* an UPDATE is due */
    bool full;           /* the disk was full: try again soon */
    bool throttled;      /* its output came too fast: go on when there is room */
    bool unwritten;      /* the header is newer than what the file holds: try again soon */
    uint64_t deadline_ns; /* monotonic; 0: none */
};

/* What an event of epoll is about: the upper half of its data. */
enum { KEY_LISTEN = 1, KEY_CONNECTION, KEY_SIGNAL, KEY_PIPE, KEY_INPUT, KEY_RELAY };

extern struct exec execs[EXECS_MAX];
extern rlim_t open_files_max, processes_max;
extern bool terminating;

/* supervisor.c */
uint64_t now_ns(clockid_t clock);
void close_fd(int *fd);
bool watch(int fd, uint32_t key, uint32_t index, uint32_t events);
void unwatch(int fd);

/* rate.c */
void set_rate(uint64_t bytes_per_s);
size_t rate_room(size_t asked);
void rate_take(size_t bytes);
uint64_t rate_wait_ns(void);

/* output.c */
void write_header(struct exec *exec);
void set_watched(struct exec *exec, int stream, bool watched);
bool take_output(struct exec *exec, int stream);
void resume_output(struct exec *exec);
void check_drained(struct exec *exec);
void close_pipe(struct pipe_end *pipe);

/* start.c */
int set_window_size(int master, int64_t rows, int64_t columns);
struct exec *find_exec(uint64_t number);
void forget(struct exec *exec);
int start_exec(const struct message *request, int *fds, int fd_count);

#endif
