/* Output: from the pipes of execs into their ring files, as fast as a client or the disk allows. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "exec.h"

#define ALLOCATE_BYTES (128 * 1024)

static char io_buffer[READ_BYTES];

/* ── rings ────────────────────────────────────────────────────────────────────────────────── */

void write_header(struct exec *exec)
{
    exec->header.begin++;
    exec->header.end = exec->header.begin;
    exec->unwritten = pwrite(exec->ring, &exec->header, sizeof exec->header, 0) !=
                      (ssize_t)sizeof exec->header;
}

static off_t place(const struct exec *exec, uint64_t offset)
{
    return (off_t)(RING_HEADER_BYTES + offset % exec->header.capacity);
}

static bool ring_transfer(struct exec *exec, uint64_t offset, char *bytes, size_t length, bool write)
{
    while (length > 0) {
        size_t room = (size_t)(exec->header.capacity - offset % exec->header.capacity);
        size_t part = length < room ? length : room;
        ssize_t done = write ? pwrite(exec->ring, bytes, part, place(exec, offset))
                             : pread(exec->ring, bytes, part, place(exec, offset));
        if (done <= 0)
            return false;
        bytes += done;
        offset += (uint64_t)done;
        length -= (size_t)done;
    }
    return true;
}

/* Give up the oldest records, so that the ring may grow to `head`. The new tail is in the file
 * before anything is overwritten, so that a reader can tell. */
static void make_room(struct exec *exec, uint64_t head)
{
    struct ring_header *header = &exec->header;
    bool moved = false;
    while (head - header->tail > header->capacity) {
        struct record_header oldest;
        moved = true;
        if (!ring_transfer(exec, header->tail, (char *)&oldest, sizeof oldest, false) ||
            oldest.bytes > READ_BYTES || header->tail + sizeof oldest + oldest.bytes > header->head) {
            header->tail = header->head;
            break;
        }
        header->tail += sizeof oldest + oldest.bytes;
    }
    if (moved)
        write_header(exec);
}

/* Room on disk is taken before output is read, so that a full disk slows an exec and loses nothing. */
static bool allocate(struct exec *exec, uint64_t head)
{
    while (exec->allocated < head && exec->allocated < exec->header.capacity) {
        uint64_t step = exec->header.capacity - exec->allocated;
        step = step < ALLOCATE_BYTES ? step : ALLOCATE_BYTES;
        if (fallocate(exec->ring, 0, RING_HEADER_BYTES + (off_t)exec->allocated, (off_t)step) != 0 &&
            errno != EOPNOTSUPP && errno != ENOSYS)
            return false;
        exec->allocated += step;
    }
    return true;
}

/* ── output ───────────────────────────────────────────────────────────────────────────────── */

void close_pipe(struct pipe_end *pipe)
{
    /* A terminal's master has other descriptors, so closing ours would leave it in the epoll set. */
    if (pipe->watched)
        unwatch(pipe->fd);
    close_fd(&pipe->fd);
    pipe->watched = false;
    pipe->pending = 0;
}

void set_watched(struct exec *exec, int stream, bool watched)
{
    struct pipe_end *pipe = &exec->pipes[stream];
    uint32_t index = (uint32_t)(exec - execs) * 2 + (uint32_t)stream;
    if (pipe->fd < 0 || pipe->watched == watched)
        return;
    if (watched)
        pipe->watched = watch(pipe->fd, KEY_PIPE, index, EPOLLIN);
    else {
        unwatch(pipe->fd);
        pipe->watched = false;
    }
}

void check_drained(struct exec *exec)
{
    if (exec->header.state != STATE_EXITED || exec->pipes[0].pending > 0 || exec->pipes[1].pending > 0)
        return;
    exec->header.state = STATE_DRAINED;
    exec->header.drained_head = exec->header.head;
    /* What background children write from now on is kept for the logs, and holds nobody up. */
    exec->window = -1;
    exec->tell = true;
    write_header(exec);
    /* The program that the terminal was for has ended: hang up on what it left behind. */
    if (exec->terminal)
        close_pipe(&exec->pipes[0]);
}

/* Take one piece of output. False: nothing more can be taken now. */
bool take_output(struct exec *exec, int stream)
{
    struct pipe_end *pipe = &exec->pipes[stream];
    struct ring_header *header = &exec->header;
    struct record_header record = {.stream = (uint32_t)stream + 1};
    size_t room = READ_BYTES;
    if (pipe->fd < 0)
        return false;
    if (exec->window >= 0) {
        int64_t left = exec->window - (int64_t)header->head - (int64_t)sizeof record;
        room = left < (int64_t)room ? (left > 0 ? (size_t)left : 0) : room;
    }
    if (room > 0 && (room = rate_room(room)) == 0)
        exec->throttled = true;
    /* Only a retry clears it: output of one stream that fits must not leave the other unwatched. */
    if (room > 0 && !allocate(exec, header->head + sizeof record + room))
        exec->full = true;
    if (room == 0 || exec->full) {
        set_watched(exec, stream, false);
        return false;
    }
    ssize_t got = read(pipe->fd, io_buffer, room);
    if (got < 0 && (errno == EAGAIN || errno == EINTR)) {
        pipe->pending = 0;
        set_watched(exec, stream, true);
        check_drained(exec);
        return false;
    }
    if (got <= 0) {
        close_pipe(pipe);
        exec->tell |= exec->header.state == STATE_DRAINED;
        check_drained(exec);
        return false;
    }
    record.bytes = (uint32_t)got;
    record.sequence = header->sequence += (uint64_t)got;
    record.time_ns = now_ns(CLOCK_REALTIME);
    uint64_t head = header->head + sizeof record + (uint64_t)got;
    make_room(exec, head);
    if (!ring_transfer(exec, header->head, (char *)&record, sizeof record, true) ||
        !ring_transfer(exec, header->head + sizeof record, io_buffer, (size_t)got, true)) {
        /* A failing disk: readers see a gap in the sequence, and no invented bytes. */
        exec->full = true;
        return false;
    }
    header->head = head;
    rate_take((size_t)got);
    pipe->pending -= pipe->pending < got ? pipe->pending : got;
    write_header(exec);
    check_drained(exec);
    if (exec->wait_offset >= 0 && (uint64_t)exec->wait_offset < head) {
        exec->wait_offset = -1;
        exec->tell = true;
    }
    return true;
}

void resume_output(struct exec *exec)
{
    exec->full = exec->throttled = false;
    for (int stream = 0; stream < 2; stream++)
        if (exec->pipes[stream].fd >= 0 && !exec->pipes[stream].watched)
            while (take_output(exec, stream) && exec->header.state == STATE_EXITED)
                ;
    for (int stream = 0; stream < 2; stream++)
        if (exec->window < 0 || exec->window > (int64_t)(exec->header.head + sizeof(struct record_header)))
            set_watched(exec, stream, !exec->full && !exec->throttled);
}

