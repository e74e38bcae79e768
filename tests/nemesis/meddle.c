/* Preloaded into a control node: makes its disk slow and its wall clock wrong, as a file says.
 *
 * The file PRISM_MEDDLE is mapped and holds `struct control`; the nemesis writes the first two fields
 * and reads the others, which prove that a fault has bitten. Nothing else of the node is changed.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

struct control {
    int64_t sync_delay_us;
    int64_t clock_offset_s;
    int64_t delayed_syncs;
    int64_t shifted_reads;
};

static struct control nothing;
static struct control *control = &nothing;

__attribute__((constructor)) static void map_control(void)
{
    const char *path = getenv("PRISM_MEDDLE");
    int descriptor = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    if (descriptor < 0)
        return;
    void *map = mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
    close(descriptor);
    if (map != MAP_FAILED)
        control = map;
}

static void delay(void)
{
    int64_t left_us = __atomic_load_n(&control->sync_delay_us, __ATOMIC_RELAXED);
    if (left_us <= 0)
        return;
    __atomic_fetch_add(&control->delayed_syncs, 1, __ATOMIC_RELAXED);
    /* In steps, so that a disk that is healed meanwhile answers at once. */
    while (left_us > 0 && __atomic_load_n(&control->sync_delay_us, __ATOMIC_RELAXED) > 0) {
        usleep(10000);
        left_us -= 10000;
    }
}

int fdatasync(int descriptor)
{
    static int (*real)(int);
    if (!real)
        *(void **)&real = dlsym(RTLD_NEXT, "fdatasync");
    delay();
    return real(descriptor);
}

int fsync(int descriptor)
{
    static int (*real)(int);
    if (!real)
        *(void **)&real = dlsym(RTLD_NEXT, "fsync");
    delay();
    return real(descriptor);
}

int msync(void *address, size_t length, int flags)
{
    static int (*real)(void *, size_t, int);
    if (!real)
        *(void **)&real = dlsym(RTLD_NEXT, "msync");
    delay();
    return real(address, length, flags);
}

static int64_t offset(void)
{
    int64_t offset_s = __atomic_load_n(&control->clock_offset_s, __ATOMIC_RELAXED);
    if (offset_s)
        __atomic_fetch_add(&control->shifted_reads, 1, __ATOMIC_RELAXED);
    return offset_s;
}

int clock_gettime(clockid_t clock, struct timespec *now)
{
    static int (*real)(clockid_t, struct timespec *);
    if (!real)
        *(void **)&real = dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(clock, now);
    if (result == 0 && clock == CLOCK_REALTIME)
        now->tv_sec += offset();
    return result;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone)
{
    static int (*real)(struct timeval *restrict, void *restrict);
    if (!real)
        *(void **)&real = dlsym(RTLD_NEXT, "gettimeofday");
    int result = real(now, zone);
    if (result == 0)
        now->tv_sec += offset();
    return result;
}

time_t time(time_t *now)
{
    static time_t (*real)(time_t *);
    if (!real)
        *(void **)&real = dlsym(RTLD_NEXT, "time");
    time_t result = real(NULL) + offset();
    if (now)
        *now = result;
    return result;
}
