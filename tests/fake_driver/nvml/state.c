#define _GNU_SOURCE
#include "state.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static uint64_t clock_us(clockid_t clock)
{
    struct timespec now;
    clock_gettime(clock, &now);
    return (uint64_t)now.tv_sec * 1000000u + (uint64_t)now.tv_nsec / 1000u;
}

uint64_t monotonic_us(void) { return clock_us(CLOCK_MONOTONIC); }
uint64_t wall_us(void) { return clock_us(CLOCK_REALTIME); }

struct fake_state *state_map(const char *path)
{
    int file = open(path, O_RDWR | O_CLOEXEC);
    if (file < 0)
        return NULL;
    struct stat facts;
    void *memory = MAP_FAILED;
    if (fstat(file, &facts) == 0 && facts.st_size == (off_t)sizeof(struct fake_state))
        memory = mmap(NULL, sizeof(struct fake_state), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    else
        errno = EPROTO;
    int problem = errno;
    close(file);
    errno = problem;
    if (memory == MAP_FAILED)
        return NULL;
    struct fake_state *state = memory;
    if (state->magic != FAKE_MAGIC || state->layout != FAKE_LAYOUT || state->bytes != sizeof *state) {
        munmap(memory, sizeof *state);
        errno = EPROTO;
        return NULL;
    }
    return state;
}

void state_unmap(struct fake_state *state) { munmap(state, sizeof *state); }

static void fill(struct fake_state *state, uint64_t seed)
{
    pthread_mutexattr_t kind;
    pthread_mutexattr_init(&kind);
    pthread_mutexattr_setpshared(&kind, PTHREAD_PROCESS_SHARED);
    pthread_mutexattr_setrobust(&kind, PTHREAD_MUTEX_ROBUST);
    pthread_mutex_init(&state->mutex, &kind);
    pthread_mutexattr_destroy(&kind);
    state->seed = seed;
    state->privileged = state->mig_config = state->mig_monitor = 1;
    state->cuda_version = 13000;
    snprintf(state->driver_version, TEXT, "580.95.05");
    snprintf(state->nvml_version, TEXT, "13.580.95.05");
    state->layout = FAKE_LAYOUT;
    state->bytes = sizeof *state;
    state->magic = FAKE_MAGIC;
}

int state_create(const char *path, uint64_t seed)
{
    char draft[PATH_MAX];
    if (snprintf(draft, sizeof draft, "%s.%d", path, getpid()) >= (int)sizeof draft)
        return ENAMETOOLONG;
    int file = open(draft, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (file < 0)
        return errno;
    /* Jobs of other users share it, whatever the umask. */
    fchmod(file, 0666);
    void *memory = MAP_FAILED;
    if (ftruncate(file, sizeof(struct fake_state)) == 0)
        memory = mmap(NULL, sizeof(struct fake_state), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    int problem = memory == MAP_FAILED ? errno : 0;
    close(file);
    if (problem == 0) {
        fill(memory, seed);
        munmap(memory, sizeof(struct fake_state));
        /* link, not rename: two creators of one path must not both succeed. */
        if (link(draft, path) != 0)
            problem = errno;
    }
    unlink(draft);
    return problem;
}

void state_lock(struct fake_state *state)
{
    int result = pthread_mutex_lock(&state->mutex);
    if (result == EOWNERDEAD)
        /* Its holder was killed. Writers mark an entry present last: the worst is a change that did not happen. */
        pthread_mutex_consistent(&state->mutex);
    else if (result != 0)
        abort();
}

void state_unlock(struct fake_state *state) { pthread_mutex_unlock(&state->mutex); }

void state_changed(struct fake_state *state)
{
    __atomic_add_fetch(&state->change, 1, __ATOMIC_SEQ_CST);
    syscall(SYS_futex, &state->change, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

uint32_t state_ticket(const struct fake_state *state) { return __atomic_load_n(&state->change, __ATOMIC_SEQ_CST); }

int state_wait(struct fake_state *state, uint32_t ticket, uint64_t deadline_us)
{
    uint64_t now = monotonic_us();
    if (now >= deadline_us)
        return ETIMEDOUT;
    uint64_t left = deadline_us - now;
    struct timespec limit = {.tv_sec = (time_t)(left / 1000000u), .tv_nsec = (long)(left % 1000000u) * 1000};
    /* Without an end in sight: a signed overflow of seconds would be refused. */
    if (left / 1000000u > INT_MAX)
        limit.tv_sec = INT_MAX;
    if (syscall(SYS_futex, &state->change, FUTEX_WAIT, ticket, &limit, NULL, 0) == 0)
        return 0;
    return errno == EAGAIN ? 0 : errno;
}

uint32_t next_generation(struct fake_state *state)
{
    /* 24 bits, as many as a handle carries; 0 is never given out. */
    state->generations = (state->generations + 1) & 0xFFFFFFu;
    if (state->generations == 0)
        state->generations = 1;
    return state->generations;
}

static uint64_t scramble(uint64_t value)
{
    value += 0x9e3779b97f4a7c15ULL;
    value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9ULL;
    value = (value ^ (value >> 27)) * 0x94d049bb133111ebULL;
    return value ^ (value >> 31);
}

void make_uuid(uint64_t seed, uint64_t salt, const char *prefix, char out[TEXT])
{
    uint64_t high = scramble(seed ^ scramble(salt)), low = scramble(high ^ salt);
    snprintf(out, TEXT, "%s-%08x-%04x-5%03x-%04x-%012llx", prefix, (unsigned)(high >> 32),
             (unsigned)(high >> 16) & 0xFFFFu, (unsigned)high & 0xFFFu, 0x8000u | ((unsigned)(low >> 48) & 0x3FFFu),
             (unsigned long long)(low & 0xFFFFFFFFFFFFULL));
}
