/* libcuda.so.1: the checkpoint calls, and what a binding needs to find them and what cuda_work.c has. No kernels. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "abi.h"
#include "checkpoint.h"
#include "cuda.h"
#include "faults.h"

static struct fake_state *the_state;
static pthread_mutex_t guard = PTHREAD_MUTEX_INITIALIZER;

#define CUDA_ERROR_NOT_INITIALIZED 3
#define CUDA_ERROR_NO_DEVICE 100

typedef struct {
    unsigned timeoutMs, reserved0;
    uint64_t reserved1[7];
} CUcheckpointLockArgs;

typedef struct {
    unsigned char bytes[16];
} CUuuid;

typedef struct {
    CUuuid oldUuid, newUuid;
} CUcheckpointGpuPair;

typedef struct {
    CUcheckpointGpuPair *gpuPairs;
    unsigned gpuPairsCount;
    char reserved[64 - sizeof(CUcheckpointGpuPair *) - sizeof(unsigned)];
    uint64_t reserved1;
} CUcheckpointRestoreArgs;

static_assert(sizeof(CUcheckpointLockArgs) == 64, "CUcheckpointLockArgs");

static struct fake_state *open_beside(void)
{
    const char *told = getenv("FAKENVML_STATE");
    if (told != NULL && *told)
        return state_map(told);
    Dl_info self;
    char path[PATH_MAX];
    if (!dladdr((void *)open_beside, &self) || self.dli_fname == NULL)
        return NULL;
    const char *slash = strrchr(self.dli_fname, '/');
    if (slash == NULL)
        return NULL;
    snprintf(path, sizeof path, "%.*s/../state", (int)(slash - self.dli_fname), self.dli_fname);
    return state_map(path);
}

struct fake_state *cuda_state(void) { return the_state; }

EXPORT int cuInit(unsigned flags)
{
    (void)flags;
    pthread_mutex_lock(&guard);
    if (the_state == NULL)
        the_state = open_beside();
    struct fake_state *state = the_state;
    pthread_mutex_unlock(&guard);
    return state != NULL && state->gpu_count > 0 ? CUDA_SUCCESS : CUDA_ERROR_NO_DEVICE;
}

EXPORT int cuDriverGetVersion(int *version)
{
    if (version == NULL)
        return CUDA_ERROR_INVALID_VALUE;
    cuInit(0);
    *version = the_state != NULL ? (int)the_state->cuda_version : 13000;
    return CUDA_SUCCESS;
}

EXPORT int cuGetErrorName(int code, const char **name)
{
    switch (code) {
    case CUDA_SUCCESS: *name = "CUDA_SUCCESS"; break;
    case CUDA_ERROR_INVALID_VALUE: *name = "CUDA_ERROR_INVALID_VALUE"; break;
    case CUDA_ERROR_OUT_OF_MEMORY: *name = "CUDA_ERROR_OUT_OF_MEMORY"; break;
    case CUDA_ERROR_NOT_INITIALIZED: *name = "CUDA_ERROR_NOT_INITIALIZED"; break;
    case CUDA_ERROR_NO_DEVICE: *name = "CUDA_ERROR_NO_DEVICE"; break;
    case CUDA_ERROR_ILLEGAL_STATE: *name = "CUDA_ERROR_ILLEGAL_STATE"; break;
    case CUDA_ERROR_NOT_FOUND: *name = "CUDA_ERROR_NOT_FOUND"; break;
    case CUDA_ERROR_NOT_READY: *name = "CUDA_ERROR_NOT_READY"; break;
    case CUDA_ERROR_NOT_SUPPORTED: *name = "CUDA_ERROR_NOT_SUPPORTED"; break;
    default: *name = "CUDA_ERROR_UNKNOWN";
    }
    return CUDA_SUCCESS;
}

EXPORT int cuGetErrorString(int code, const char **text) { return cuGetErrorName(code, text); }

static int ask(const char *symbol, int pid, enum checkpoint_request request, uint64_t timeout_us,
               const struct gpu_pair *pairs, unsigned count)
{
    if (the_state == NULL)
        return CUDA_ERROR_NOT_INITIALIZED;
    return checkpoint_ask(the_state, symbol, (uint32_t)pid, request, timeout_us, pairs, count);
}

EXPORT int cuCheckpointProcessGetState(int pid, int *state)
{
    uint32_t found = 0;
    if (the_state == NULL && cuInit(0) != CUDA_SUCCESS)
        return CUDA_ERROR_NOT_INITIALIZED;
    int result = checkpoint_state(the_state, (uint32_t)pid, &found);
    if (result == CUDA_SUCCESS && state != NULL)
        *state = (int)found;
    return result;
}

EXPORT int cuCheckpointProcessGetRestoreThreadId(int pid, int *thread)
{
    uint32_t found;
    if (the_state == NULL && cuInit(0) != CUDA_SUCCESS)
        return CUDA_ERROR_NOT_INITIALIZED;
    int result = checkpoint_state(the_state, (uint32_t)pid, &found);
    if (result == CUDA_SUCCESS && thread != NULL)
        *thread = pid;
    return result;
}

EXPORT int cuCheckpointProcessLock(int pid, const CUcheckpointLockArgs *arguments)
{
    unsigned timeout_ms = arguments != NULL ? arguments->timeoutMs : 0;
    if (the_state == NULL)
        cuInit(0);
    return ask(__func__, pid, REQUEST_LOCK, timeout_ms ? timeout_ms * 1000ULL : UINT64_MAX, NULL, 0);
}

EXPORT int cuCheckpointProcessCheckpoint(int pid, const void *arguments)
{
    (void)arguments;
    return ask(__func__, pid, REQUEST_CHECKPOINT, UINT64_MAX, NULL, 0);
}

/* The caller has to have initialised CUDA itself, or the cards have to be kept alive. */
EXPORT int cuCheckpointProcessRestore(int pid, const CUcheckpointRestoreArgs *arguments)
{
    struct gpu_pair pairs[FAKE_GPUS];
    unsigned count = arguments != NULL && arguments->gpuPairs != NULL ? arguments->gpuPairsCount : 0;
    if (the_state == NULL)
        return CUDA_ERROR_NOT_INITIALIZED;
    if (count > FAKE_GPUS)
        return CUDA_ERROR_INVALID_VALUE;
    for (unsigned i = 0; i < count; i++) {
        const CUuuid *ends[2] = {&arguments->gpuPairs[i].oldUuid, &arguments->gpuPairs[i].newUuid};
        unsigned *numbers[2] = {&pairs[i].from, &pairs[i].to};
        for (unsigned end = 0; end < 2; end++) {
            char text[TEXT], *at = text + snprintf(text, sizeof text, "GPU-");
            for (unsigned byte = 0; byte < 16; byte++)
                at += snprintf(at, (size_t)(text + TEXT - at), "%s%02x",
                               byte == 4 || byte == 6 || byte == 8 || byte == 10 ? "-" : "", ends[end]->bytes[byte]);
            unsigned number = 0;
            while (number < the_state->gpu_count && strcmp(the_state->gpus[number].uuid, text) != 0)
                number++;
            if (number == the_state->gpu_count)
                return CUDA_ERROR_INVALID_VALUE;
            *numbers[end] = number;
        }
    }
    return ask(__func__, pid, REQUEST_RESTORE, UINT64_MAX, pairs, count);
}

EXPORT int cuCheckpointProcessUnlock(int pid, const void *arguments)
{
    (void)arguments;
    return ask(__func__, pid, REQUEST_UNLOCK, UINT64_MAX, NULL, 0);
}

/* Bindings look every function up through this one. */
EXPORT int cuGetProcAddress_v2(const char *symbol, void **found, int version, uint64_t flags, int *status)
{
    static const struct {
        const char *name;
        void *function;
    } known[] = {
        {"cuInit", (void *)cuInit},
        {"cuDriverGetVersion", (void *)cuDriverGetVersion},
        {"cuGetErrorName", (void *)cuGetErrorName},
        {"cuGetErrorString", (void *)cuGetErrorString},
        {"cuCheckpointProcessGetState", (void *)cuCheckpointProcessGetState},
        {"cuCheckpointProcessGetRestoreThreadId", (void *)cuCheckpointProcessGetRestoreThreadId},
        {"cuCheckpointProcessLock", (void *)cuCheckpointProcessLock},
        {"cuCheckpointProcessCheckpoint", (void *)cuCheckpointProcessCheckpoint},
        {"cuCheckpointProcessRestore", (void *)cuCheckpointProcessRestore},
        {"cuCheckpointProcessUnlock", (void *)cuCheckpointProcessUnlock},
        {"cuGetProcAddress", (void *)cuGetProcAddress_v2},
    };
    (void)version;
    (void)flags;
    *found = NULL;
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (strcmp(symbol, known[i].name) == 0)
            *found = known[i].function;
    if (*found == NULL)
        *found = cuda_work_function(symbol);
    if (status != NULL)
        *status = *found != NULL ? 0 : 1;
    return *found != NULL ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

EXPORT int cuGetProcAddress(const char *symbol, void **found, int version, uint64_t flags)
{
    return cuGetProcAddress_v2(symbol, found, version, flags, NULL);
}
