/* libcuda.so.1: as much of contexts, memory and work as a small program needs: memory that is counted, fills that take
 * their time, and counters in host memory that the card writes.
 *
 * One card, the first that CUDA_VISIBLE_DEVICES names. A client of MPS keeps the two limits that its environment says;
 * no server is asked. Work is done at once and by the calling thread, so nothing is queued, and nothing goes on in a
 * process that is halted. A process that is locked or checkpointed waits in its next call, as with the real driver.
 */
#define _GNU_SOURCE
#include "cuda.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "abi.h"
#include "books.h"
#include "checkpoint.h"

#define CUDA_ERROR_NOT_INITIALIZED 3
#define CUDA_ERROR_INVALID_DEVICE 101
#define MULTIPROCESSOR_COUNT 16 /* of CUdevice_attribute */
#define HOST_RANGES 8u
#define FIRST_ADDRESS 0x7f0000000000ULL
/* A fill of this many bytes and more takes a moment of the card's. */
#define LARGE (1u << 20)
#define MOMENT_US 1000u

static uint64_t next_address = FIRST_ADDRESS, bytes_held;
static struct {
    unsigned char *start;
    size_t size;
} host_ranges[HOST_RANGES];

static int visible_card(const struct fake_state *state)
{
    const char *names = getenv("CUDA_VISIBLE_DEVICES");
    if (names == NULL)
        return 0;
    size_t length = strcspn(names, ",");
    for (unsigned i = 0; i < state->gpu_count; i++)
        if (strlen(state->gpus[i].uuid) == length && strncmp(names, state->gpus[i].uuid, length) == 0)
            return (int)i;
    return *names >= '0' && *names <= '9' && (unsigned)atoi(names) < state->gpu_count ? atoi(names) : -1;
}

static bool under_mps(void)
{
    const char *pipe = getenv("CUDA_MPS_PIPE_DIRECTORY");
    return pipe != NULL && *pipe != '\0';
}

/* Of "GPU-…=4096M" or "0=4G"; 0: none. */
static uint64_t memory_limit(void)
{
    const char *told = under_mps() ? getenv("CUDA_MPS_PINNED_DEVICE_MEM_LIMIT") : NULL;
    const char *equals = told != NULL ? strrchr(told, '=') : NULL;
    char *unit = NULL;
    uint64_t value = equals != NULL ? strtoull(equals + 1, &unit, 10) : 0;
    return value * (unit != NULL && *unit == 'G' ? 1024 * MIB : MIB);
}

/* CUDA calls wait while the process is locked or off its card. */
static void wait_until_running(struct fake_state *state)
{
    uint32_t found = CHECKPOINT_RUNNING;
    while (checkpoint_state(state, (uint32_t)getpid(), &found) == CUDA_SUCCESS && found != CHECKPOINT_RUNNING)
        usleep(2000);
}

static int cuDeviceGet(int *device, int ordinal)
{
    struct fake_state *state = cuda_state();
    if (state == NULL)
        return CUDA_ERROR_NOT_INITIALIZED;
    *device = 0;
    return ordinal == 0 && visible_card(state) >= 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

static int cuDeviceGetAttribute(int *value, int attribute, int device)
{
    struct fake_state *state = cuda_state();
    (void)device;
    if (state == NULL || attribute != MULTIPROCESSOR_COUNT)
        return CUDA_ERROR_INVALID_VALUE;
    const char *percentage = under_mps() ? getenv("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE") : NULL;
    double part = percentage != NULL ? atof(percentage) / 100 : 1;
    *value = (int)(fake_models[state->gpus[visible_card(state)].model].multiprocessors * part);
    return CUDA_SUCCESS;
}

static int cuDevicePrimaryCtxRetain(void **context, int device)
{
    (void)device;
    *context = &host_ranges;
    return CUDA_SUCCESS;
}

static int cuCtxSetCurrent(void *context)
{
    (void)context;
    return CUDA_SUCCESS;
}

static int cuMemAlloc(uint64_t *address, size_t bytes)
{
    struct fake_state *state = cuda_state();
    if (state == NULL)
        return CUDA_ERROR_NOT_INITIALIZED;
    uint64_t limit = memory_limit();
    if (limit != 0 && bytes_held + bytes > limit)
        return CUDA_ERROR_OUT_OF_MEMORY;
    state_lock(state);
    int result = books_allocate(state, (uint32_t)getpid(), (unsigned)visible_card(state), NO_INSTANCE, NO_INSTANCE,
                                bytes, under_mps() ? PROCESS_MPS_CLIENT : 0);
    state_unlock(state);
    if (result != NVML_SUCCESS)
        return CUDA_ERROR_OUT_OF_MEMORY;
    bytes_held += bytes;
    *address = next_address;
    next_address += bytes;
    return CUDA_SUCCESS;
}

static int cuMemsetD32(uint64_t address, unsigned value, size_t count)
{
    struct fake_state *state = cuda_state();
    if (state == NULL)
        return CUDA_ERROR_NOT_INITIALIZED;
    wait_until_running(state);
    for (unsigned i = 0; i < HOST_RANGES; i++) {
        uint64_t start = (uint64_t)(uintptr_t)host_ranges[i].start;
        if (start != 0 && address >= start && address + 4 * count <= start + host_ranges[i].size)
            for (size_t at = 0; at < count; at++)
                ((volatile unsigned *)(uintptr_t)address)[at] = value;
    }
    if (4 * count >= LARGE) {
        state_lock(state);
        books_load(state, (uint32_t)getpid(), 80, 60, 1000000);
        state_unlock(state);
        usleep(MOMENT_US);
    }
    return CUDA_SUCCESS;
}

static int cuMemsetD32Async(uint64_t address, unsigned value, size_t count, void *stream)
{
    (void)stream;
    return cuMemsetD32(address, value, count);
}

static int cuCtxSynchronize(void) { return CUDA_SUCCESS; }

static int cuStreamCreate(void **stream, unsigned flags)
{
    (void)flags;
    *stream = &host_ranges;
    return CUDA_SUCCESS;
}

static int cuMemHostRegister(void *start, size_t size, unsigned flags)
{
    (void)flags;
    for (unsigned i = 0; i < HOST_RANGES; i++)
        if (host_ranges[i].start == NULL) {
            host_ranges[i].start = start;
            host_ranges[i].size = size;
            return CUDA_SUCCESS;
        }
    return CUDA_ERROR_INVALID_VALUE;
}

static int cuMemHostGetDevicePointer(uint64_t *address, void *start, unsigned flags)
{
    (void)flags;
    *address = (uint64_t)(uintptr_t)start;
    return CUDA_SUCCESS;
}

void *cuda_work_function(const char *symbol)
{
    static const struct {
        const char *name;
        void *function;
    } known[] = {
        {"cuDeviceGet", (void *)cuDeviceGet},
        {"cuDeviceGetAttribute", (void *)cuDeviceGetAttribute},
        {"cuDevicePrimaryCtxRetain", (void *)cuDevicePrimaryCtxRetain},
        {"cuCtxSetCurrent", (void *)cuCtxSetCurrent},
        {"cuCtxSynchronize", (void *)cuCtxSynchronize},
        {"cuMemAlloc", (void *)cuMemAlloc},
        {"cuMemsetD32", (void *)cuMemsetD32},
        {"cuMemsetD32Async", (void *)cuMemsetD32Async},
        {"cuStreamCreate", (void *)cuStreamCreate},
        {"cuMemHostRegister", (void *)cuMemHostRegister},
        {"cuMemHostGetDevicePointer", (void *)cuMemHostGetDevicePointer},
    };
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (strcmp(symbol, known[i].name) == 0)
            return known[i].function;
    return NULL;
}
