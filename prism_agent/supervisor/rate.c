/* How fast the output of a sandbox may come, all its execs together: a bucket that fills at a rate. */
#include "exec.h"

/* Less at a time would be many wake-ups; a slow rate waits at most about a twentieth of a second. */
#define PIECE_BYTES_MAX (16 * 1024)
#define PIECE_BYTES_MIN 64
#define NS_PER_S 1000000000u

static uint64_t rate, filled_bytes, filled_ns; /* bytes a second, 0: no bound; content, and when */

static uint64_t capacity(void)
{
    return rate / 10 > READ_BYTES ? rate / 10 : READ_BYTES;
}

static uint64_t piece(void)
{
    uint64_t bytes = rate / 20;
    return bytes < PIECE_BYTES_MIN ? PIECE_BYTES_MIN : bytes < PIECE_BYTES_MAX ? bytes : PIECE_BYTES_MAX;
}

static void fill(void)
{
    uint64_t now = now_ns(CLOCK_MONOTONIC), passed = now - filled_ns;
    /* So long that the bucket is full: and the product below would not fit. */
    uint64_t bytes = passed > 100ull * NS_PER_S ? capacity() : passed / 1000 * rate / 1000000;
    if (bytes == 0)
        return;
    filled_bytes = filled_bytes + bytes < capacity() ? filled_bytes + bytes : capacity();
    filled_ns = now;
}

void set_rate(uint64_t bytes_per_s)
{
    if (bytes_per_s == rate)
        return;
    rate = bytes_per_s;
    filled_ns = now_ns(CLOCK_MONOTONIC);
    filled_bytes = capacity();
}

/* How much of `asked` may be taken now; 0: wait. */
size_t rate_room(size_t asked)
{
    if (rate == 0)
        return asked;
    fill();
    if (filled_bytes < piece())
        return 0;
    return asked < filled_bytes ? asked : (size_t)filled_bytes;
}

void rate_take(size_t bytes)
{
    filled_bytes -= filled_bytes < bytes ? filled_bytes : bytes;
}

/* Time until there is room again; 0: there is. */
uint64_t rate_wait_ns(void)
{
    if (rate_room(1) > 0)
        return 0;
    return (piece() - filled_bytes) * NS_PER_S / rate + 1;
}
