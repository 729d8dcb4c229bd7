#define _GNU_SOURCE
#include "session.h"

#include <dlfcn.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "faults.h"

#define HANDLE_TAG 0x4EULL /* top byte; no address of a user's process has it */

struct fake_state *the_state;

static pthread_mutex_t guard = PTHREAD_MUTEX_INITIALIZER;
static unsigned references;
static char mapped_path[PATH_MAX];
static unsigned card_count;
static struct {
    unsigned gpu;
    uint32_t generation;
} cards[FAKE_GPUS];

/* $FAKENVML_STATE, or `state` beside the folder that the library lies in: jobs are started with a clean environment. */
static bool find_state(char path[PATH_MAX])
{
    const char *told = getenv("FAKENVML_STATE");
    if (told != NULL && *told)
        return snprintf(path, PATH_MAX, "%s", told) < PATH_MAX;
    Dl_info self;
    if (!dladdr((void *)find_state, &self) || self.dli_fname == NULL)
        return false;
    char folder[PATH_MAX];
    snprintf(folder, sizeof folder, "%s", self.dli_fname);
    char *slash = strrchr(folder, '/');
    if (slash == NULL)
        return false;
    *slash = 0;
    return snprintf(path, PATH_MAX, "%s/../state", folder) < PATH_MAX;
}

static nvmlReturn_t attach(unsigned flags)
{
    char path[PATH_MAX];
    if (!find_state(path))
        return NVML_ERROR_DRIVER_NOT_LOADED;
    /* A process may go from one driver to another between sessions. The old mapping stays: threads may be in it. */
    if (the_state == NULL || strcmp(path, mapped_path) != 0) {
        struct fake_state *state = state_map(path);
        if (state == NULL)
            return NVML_ERROR_DRIVER_NOT_LOADED;
        snprintf(mapped_path, sizeof mapped_path, "%s", path);
        the_state = state;
    }
    state_lock(the_state);
    count_call(the_state, "nvmlInit");
    int code = take_fault(the_state, "nvmlInit", -1);
    card_count = 0;
    for (unsigned i = 0; i < the_state->gpu_count; i++)
        if (the_state->gpus[i].present && !the_state->gpus[i].removed) {
            cards[card_count].gpu = i;
            cards[card_count++].generation = the_state->gpus[i].generation;
        }
    bool none = card_count == 0;
    state_unlock(the_state);
    if (code != 0)
        return code;
    return none && !(flags & NVML_INIT_FLAG_NO_GPUS) ? NVML_ERROR_DRIVER_NOT_LOADED : NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlInitWithFlags(unsigned flags)
{
    pthread_mutex_lock(&guard);
    nvmlReturn_t result = references > 0 ? NVML_SUCCESS : attach(flags);
    if (result == NVML_SUCCESS)
        __atomic_add_fetch(&references, 1, __ATOMIC_SEQ_CST);
    pthread_mutex_unlock(&guard);
    return result;
}

EXPORT nvmlReturn_t nvmlInit_v2(void) { return nvmlInitWithFlags(0); }

EXPORT nvmlReturn_t nvmlShutdown(void)
{
    pthread_mutex_lock(&guard);
    nvmlReturn_t result = references > 0 ? NVML_SUCCESS : NVML_ERROR_UNINITIALIZED;
    if (references > 0)
        __atomic_sub_fetch(&references, 1, __ATOMIC_SEQ_CST);
    pthread_mutex_unlock(&guard);
    return result;
}

EXPORT const char *nvmlErrorString(nvmlReturn_t result)
{
    switch (result) {
    case NVML_SUCCESS: return "Success";
    case NVML_ERROR_UNINITIALIZED: return "Uninitialized";
    case NVML_ERROR_INVALID_ARGUMENT: return "Invalid Argument";
    case NVML_ERROR_NOT_SUPPORTED: return "Not Supported";
    case NVML_ERROR_NO_PERMISSION: return "Insufficient Permissions";
    case NVML_ERROR_NOT_FOUND: return "Not Found";
    case NVML_ERROR_INSUFFICIENT_SIZE: return "Insufficient Size";
    case NVML_ERROR_DRIVER_NOT_LOADED: return "Driver Not Loaded";
    case NVML_ERROR_TIMEOUT: return "Timeout";
    case NVML_ERROR_FUNCTION_NOT_FOUND: return "Function Not Found";
    case NVML_ERROR_GPU_IS_LOST: return "GPU is lost";
    case NVML_ERROR_RESET_REQUIRED: return "GPU requires reset";
    case NVML_ERROR_IN_USE: return "In use by another client";
    case NVML_ERROR_MEMORY: return "Insufficient Memory";
    case NVML_ERROR_INSUFFICIENT_RESOURCES: return "Insufficient Resources";
    case NVML_ERROR_ARGUMENT_VERSION_MISMATCH: return "Argument version mismatch";
    case NVML_ERROR_INVALID_STATE: return "Invalid State";
    default: return "Unknown Error";
    }
}

void *make_handle(enum handle_kind kind, unsigned gpu, unsigned gi, unsigned ci, uint32_t generation)
{
    uint64_t value = HANDLE_TAG << 56 | (uint64_t)kind << 52 | (uint64_t)(gpu & 0xFFFu) << 40 |
                     (uint64_t)(gi & 0xFFu) << 32 | (uint64_t)(ci & 0xFFu) << 24 | (generation & 0xFFFFFFu);
    return (void *)(uintptr_t)value;
}

bool read_handle(const void *handle, enum handle_kind kind, unsigned *gpu, unsigned *gi, unsigned *ci,
                 uint32_t *generation)
{
    uint64_t value = (uint64_t)(uintptr_t)handle;
    if (value >> 56 != HANDLE_TAG || (kind != 0 && (value >> 52 & 0xFu) != kind))
        return false;
    if (gpu != NULL)
        *gpu = (unsigned)(value >> 40) & 0xFFFu;
    if (gi != NULL)
        *gi = (unsigned)(value >> 32) & 0xFFu;
    if (ci != NULL)
        *ci = (unsigned)(value >> 24) & 0xFFu;
    if (generation != NULL)
        *generation = (uint32_t)value & 0xFFFFFFu;
    return true;
}

static unsigned number_of(const struct gpu *gpu) { return (unsigned)(gpu - the_state->gpus); }

void *device_handle(const struct gpu *gpu) { return make_handle(HANDLE_DEVICE, number_of(gpu), 0, 0, gpu->generation); }

void *mig_handle(const struct gpu *gpu, const struct gpu_instance *gi, const struct compute_instance *ci)
{
    return make_handle(HANDLE_MIG_DEVICE, number_of(gpu), (unsigned)(gi - gpu->gi), (unsigned)(ci - gi->ci),
                       ci->generation);
}

void *gi_handle(const struct gpu *gpu, const struct gpu_instance *gi)
{
    return make_handle(HANDLE_GI, number_of(gpu), (unsigned)(gi - gpu->gi), 0, gi->generation);
}

void *ci_handle(const struct gpu *gpu, const struct gpu_instance *gi, const struct compute_instance *ci)
{
    return make_handle(HANDLE_CI, number_of(gpu), (unsigned)(gi - gpu->gi), (unsigned)(ci - gi->ci), ci->generation);
}

nvmlReturn_t call_enter(const char *symbol, const void *handle)
{
    if (__atomic_load_n(&references, __ATOMIC_SEQ_CST) == 0)
        return NVML_ERROR_UNINITIALIZED;
    unsigned gpu;
    int about = handle != NULL && read_handle(handle, 0, &gpu, NULL, NULL, NULL) ? (int)gpu : -1;
    state_lock(the_state);
    count_call(the_state, symbol);
    int code = take_fault(the_state, symbol, about);
    if (code != 0)
        state_unlock(the_state);
    return code;
}

nvmlReturn_t call_leave(nvmlReturn_t result)
{
    state_unlock(the_state);
    return result;
}

/* The card that a handle names, if this session knows it and it is as it was. */
static nvmlReturn_t find_number(unsigned number, struct place *place)
{
    *place = (struct place){.number = number, .gi_id = NO_INSTANCE, .ci_id = NO_INSTANCE};
    for (unsigned i = 0; i < card_count; i++) {
        if (cards[i].gpu != number)
            continue;
        place->gpu = &the_state->gpus[number];
        if (place->gpu->removed || cards[i].generation != place->gpu->generation)
            return NVML_ERROR_INVALID_ARGUMENT;
        return place->gpu->lost ? NVML_ERROR_GPU_IS_LOST : NVML_SUCCESS;
    }
    return NVML_ERROR_INVALID_ARGUMENT;
}

static nvmlReturn_t find_instance(struct place *place, unsigned gi, unsigned ci, bool compute, uint32_t generation)
{
    if (gi >= FAKE_NODES || !place->gpu->gi[gi].present)
        return NVML_ERROR_INVALID_ARGUMENT;
    place->gi = &place->gpu->gi[gi];
    place->gi_id = gi;
    if (!compute)
        return place->gi->generation == generation ? NVML_SUCCESS : NVML_ERROR_INVALID_ARGUMENT;
    if (ci >= FAKE_CIS || !place->gi->ci[ci].present || place->gi->ci[ci].generation != generation)
        return NVML_ERROR_INVALID_ARGUMENT;
    place->ci = &place->gi->ci[ci];
    place->ci_id = ci;
    return NVML_SUCCESS;
}

nvmlReturn_t find_device(nvmlDevice_t device, struct place *place)
{
    unsigned gpu, gi, ci;
    uint32_t generation;
    if (read_handle(device, HANDLE_DEVICE, &gpu, NULL, NULL, &generation)) {
        nvmlReturn_t result = find_number(gpu, place);
        if (result == NVML_SUCCESS && place->gpu->generation != generation)
            return NVML_ERROR_INVALID_ARGUMENT;
        return result;
    }
    if (!read_handle(device, HANDLE_MIG_DEVICE, &gpu, &gi, &ci, &generation))
        return NVML_ERROR_INVALID_ARGUMENT;
    nvmlReturn_t result = find_number(gpu, place);
    return result == NVML_SUCCESS ? find_instance(place, gi, ci, true, generation) : result;
}

nvmlReturn_t find_card(nvmlDevice_t device, struct place *place, nvmlReturn_t otherwise)
{
    nvmlReturn_t result = find_device(device, place);
    return result == NVML_SUCCESS && place->gi != NULL ? otherwise : result;
}

nvmlReturn_t find_gi(nvmlGpuInstance_t instance, struct place *place)
{
    unsigned gpu, gi;
    uint32_t generation;
    if (!read_handle(instance, HANDLE_GI, &gpu, &gi, NULL, &generation))
        return NVML_ERROR_INVALID_ARGUMENT;
    nvmlReturn_t result = find_number(gpu, place);
    return result == NVML_SUCCESS ? find_instance(place, gi, 0, false, generation) : result;
}

nvmlReturn_t find_ci(nvmlComputeInstance_t instance, struct place *place)
{
    unsigned gpu, gi, ci;
    uint32_t generation;
    if (!read_handle(instance, HANDLE_CI, &gpu, &gi, &ci, &generation))
        return NVML_ERROR_INVALID_ARGUMENT;
    nvmlReturn_t result = find_number(gpu, place);
    return result == NVML_SUCCESS ? find_instance(place, gi, ci, true, generation) : result;
}

unsigned session_count(void) { return card_count; }
struct gpu *session_gpu(unsigned index) { return index < card_count ? &the_state->gpus[cards[index].gpu] : NULL; }

int session_index(const struct gpu *gpu)
{
    for (unsigned i = 0; i < card_count; i++)
        if (cards[i].gpu == number_of(gpu))
            return (int)i;
    return -1;
}

nvmlReturn_t need_root(void) { return the_state->privileged ? NVML_SUCCESS : NVML_ERROR_NO_PERMISSION; }

nvmlReturn_t need_mig_config(void)
{
    return the_state->privileged || the_state->mig_config ? NVML_SUCCESS : NVML_ERROR_NO_PERMISSION;
}

nvmlReturn_t give_text(char *out, unsigned length, const char *text)
{
    if (out == NULL)
        return NVML_ERROR_INVALID_ARGUMENT;
    if (strlen(text) >= length)
        return NVML_ERROR_INSUFFICIENT_SIZE;
    strcpy(out, text);
    return NVML_SUCCESS;
}
