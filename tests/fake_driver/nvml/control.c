/* The other side of the fake driver: what tests, fake jobs and the fake MPS daemon call. Not part of NVML.
 *
 * Every function takes the state it is about, so that one test can run several nodes. Return values are NVML codes
 * unless said otherwise. Knobs are set by name; their meaning is at the fields in state.h.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "abi.h"
#include "books.h"
#include "checkpoint.h"
#include "faults.h"
#include "geometry.h"

struct knob {
    const char *name;
    size_t offset;
};
#define CARD(name) {#name, offsetof(struct gpu, name)}
#define WHOLE(name) {#name, offsetof(struct fake_state, name)}

static const struct knob card_knobs[] = {
    CARD(minor), CARD(numa_node), CARD(memory_numa_node), CARD(pcie_switch), CARD(pcie_bridge),
    CARD(virtualization), CARD(host_vgpu_mode),
    CARD(compute_mode), CARD(persistence), CARD(timeslice), CARD(timeslice_supported), CARD(utilization),
    CARD(memory_utilization), CARD(power_mw), CARD(power_limit_mw), CARD(temperature_c), CARD(memory_temperature_c),
    CARD(sm_clock_mhz), CARD(clocks_event_reasons), CARD(recovery_action), CARD(supported_events),
    CARD(remapped_correctable), CARD(remapped_uncorrectable), CARD(remap_pending), CARD(remap_failure),
    CARD(mig_current), CARD(mig_pending), CARD(mig_clients), CARD(mig_needs_reset),
    {"ecc_corrected_volatile", offsetof(struct gpu, ecc[0][0])},
    {"ecc_corrected_aggregate", offsetof(struct gpu, ecc[0][1])},
    {"ecc_uncorrected_volatile", offsetof(struct gpu, ecc[1][0])},
    {"ecc_uncorrected_aggregate", offsetof(struct gpu, ecc[1][1])},
};
static const struct knob whole_knobs[] = {
    WHOLE(privileged), WHOLE(mig_config), WHOLE(mig_monitor), WHOLE(stable_mig_uuids), WHOLE(cuda_version),
    WHOLE(mps_clients_in_compute_list), WHOLE(minor_moves_with_mig), WHOLE(checkpoint_mib_per_s),
};

static int64_t *find_knob(struct fake_state *state, int gpu, const char *name)
{
    const struct knob *knobs = gpu < 0 ? whole_knobs : card_knobs;
    size_t count = gpu < 0 ? sizeof whole_knobs / sizeof *whole_knobs : sizeof card_knobs / sizeof *card_knobs;
    if (gpu >= (int)state->gpu_count)
        return NULL;
    char *base = gpu < 0 ? (char *)state : (char *)&state->gpus[gpu];
    for (size_t i = 0; i < count; i++)
        if (strcmp(knobs[i].name, name) == 0)
            return (int64_t *)(base + knobs[i].offset);
    return NULL;
}

/* An errno. */
EXPORT int fakenvml_create(const char *path, uint64_t seed) { return state_create(path, seed); }

/* NULL with errno set. */
EXPORT struct fake_state *fakenvml_open(const char *path) { return state_map(path); }

EXPORT void fakenvml_close(struct fake_state *state) { state_unmap(state); }

static void fill_card(struct fake_state *state, struct gpu *gpu, unsigned model)
{
    unsigned number = (unsigned)(gpu - state->gpus);
    *gpu = (struct gpu){.model = model, .generation = next_generation(state)};
    make_uuid(state->seed, number + 1, "GPU", gpu->uuid);
    snprintf(gpu->serial, sizeof gpu->serial, "165%010llu",
             (unsigned long long)((state->seed * 31 + number) % 10000000000ULL));
    gpu->pci_bus = 0x07u + number * 0x0bu;
    gpu->minor = number;
    gpu->pcie_switch = gpu->pcie_bridge = number / 2;
    gpu->memory_numa_node = gpu->host_vgpu_mode = gpu->utilization = gpu->memory_utilization = -1;
    gpu->power_mw = gpu->power_limit_mw = gpu->temperature_c = -1;
    gpu->memory_temperature_c = 40;
    gpu->sm_clock_mhz = 1755;
    gpu->timeslice_supported = 1;
    gpu->supported_events =
        EVENT_ECC_SINGLE | EVENT_ECC_DOUBLE | EVENT_PSTATE | EVENT_XID | EVENT_CLOCK | EVENT_MIG_CONFIG;
    gpu->accounted_us = monotonic_us();
    gpu->present = 1;
}

/* Cards are added in the order of their index. NUMA node 0 until told otherwise. */
EXPORT int fakenvml_add_gpu(struct fake_state *state, const char *model)
{
    for (unsigned i = 0; i < fake_model_count; i++) {
        if (strcmp(fake_models[i].name, model) != 0)
            continue;
        state_lock(state);
        bool room = state->gpu_count < FAKE_GPUS;
        if (room) {
            fill_card(state, &state->gpus[state->gpu_count], i);
            state->gpu_count++;
        }
        state_unlock(state);
        return room ? NVML_SUCCESS : NVML_ERROR_INSUFFICIENT_RESOURCES;
    }
    return NVML_ERROR_NOT_FOUND;
}

EXPORT int fakenvml_link(struct fake_state *state, unsigned gpu, unsigned link, unsigned active, unsigned kind,
                         unsigned remote)
{
    if (gpu >= state->gpu_count || link >= FAKE_LINKS || remote >= FAKE_GPUS)
        return NVML_ERROR_INVALID_ARGUMENT;
    state_lock(state);
    state->gpus[gpu].links[link] = (struct link){.active = active, .remote_kind = kind, .remote_gpu = remote};
    state_unlock(state);
    return NVML_SUCCESS;
}

/* `gpu` -1: a knob of the whole driver. NOT_FOUND: no such knob or card. */
EXPORT int fakenvml_set(struct fake_state *state, int gpu, const char *name, int64_t value)
{
    state_lock(state);
    int64_t *knob = find_knob(state, gpu, name);
    if (knob != NULL) {
        if (gpu >= 0)
            books_advance(state, &state->gpus[gpu]);
        *knob = value;
        state_changed(state);
    }
    state_unlock(state);
    return knob != NULL ? NVML_SUCCESS : NVML_ERROR_NOT_FOUND;
}

EXPORT int fakenvml_get(struct fake_state *state, int gpu, const char *name, int64_t *value)
{
    state_lock(state);
    int64_t *knob = find_knob(state, gpu, name);
    if (knob != NULL)
        *value = *knob;
    state_unlock(state);
    return knob != NULL ? NVML_SUCCESS : NVML_ERROR_NOT_FOUND;
}

EXPORT int fakenvml_set_driver_version(struct fake_state *state, const char *driver, const char *nvml)
{
    state_lock(state);
    snprintf(state->driver_version, TEXT, "%s", driver);
    snprintf(state->nvml_version, TEXT, "%s", nvml);
    state_unlock(state);
    return NVML_SUCCESS;
}

/* Where a UUID is, as CUDA_VISIBLE_DEVICES takes it: a card's may be cut short as long as one card begins so. */
EXPORT int fakenvml_find(struct fake_state *state, const char *uuid, uint32_t *gpu, uint32_t *gi, uint32_t *ci)
{
    unsigned found = 0;
    state_lock(state);
    for (unsigned i = 0; i < state->gpu_count; i++) {
        const struct gpu *card = &state->gpus[i];
        if (card->removed)
            continue;
        if (strncmp(card->uuid, uuid, strlen(uuid)) == 0 && strlen(uuid) > 4) {
            *gpu = i;
            *gi = *ci = NO_INSTANCE;
            found++;
        }
        for (unsigned j = 0; j < FAKE_NODES * FAKE_CIS; j++) {
            const struct gpu_instance *instance = &card->gi[j / FAKE_CIS];
            if (!instance->present || !instance->ci[j % FAKE_CIS].present ||
                strcmp(instance->ci[j % FAKE_CIS].uuid, uuid) != 0)
                continue;
            *gpu = i;
            *gi = j / FAKE_CIS;
            *ci = j % FAKE_CIS;
            found++;
        }
    }
    state_unlock(state);
    return found == 1 ? NVML_SUCCESS : NVML_ERROR_NOT_FOUND;
}

EXPORT int fakenvml_alloc(struct fake_state *state, uint32_t pid, uint32_t gpu, uint32_t gi, uint32_t ci,
                          uint64_t bytes, uint32_t flags)
{
    state_lock(state);
    int result = books_allocate(state, pid, gpu, gi, ci, bytes, flags);
    state_unlock(state);
    return result;
}

EXPORT int fakenvml_free(struct fake_state *state, uint32_t pid, uint32_t gpu, uint32_t gi, uint32_t ci, uint64_t bytes)
{
    state_lock(state);
    int result = books_free(state, pid, gpu, gi, ci, bytes);
    state_unlock(state);
    return result;
}

EXPORT int fakenvml_release(struct fake_state *state, uint32_t pid)
{
    state_lock(state);
    books_release(state, pid);
    state_unlock(state);
    return NVML_SUCCESS;
}

EXPORT int fakenvml_load(struct fake_state *state, uint32_t pid, uint32_t sm_pct, uint32_t memory_pct,
                         uint64_t lasting_us)
{
    state_lock(state);
    int result = books_load(state, pid, sm_pct, memory_pct, lasting_us);
    state_unlock(state);
    return result;
}

EXPORT int fakenvml_event(struct fake_state *state, uint32_t gpu, uint64_t type, uint64_t data, uint32_t gi,
                          uint32_t ci)
{
    if (gpu >= state->gpu_count)
        return NVML_ERROR_INVALID_ARGUMENT;
    state_lock(state);
    post_event(state, gpu, type, data, gi, ci);
    state_unlock(state);
    return NVML_SUCCESS;
}

enum change { CHANGE_LOSE, CHANGE_RESTORE, CHANGE_REMOVE, CHANGE_ADD, CHANGE_RESET, CHANGE_REBOOT };

/* `gpu` -1: all of them. */
EXPORT int fakenvml_change(struct fake_state *state, int gpu, int change)
{
    if (gpu >= (int)state->gpu_count)
        return NVML_ERROR_INVALID_ARGUMENT;
    state_lock(state);
    for (unsigned i = 0; i < state->gpu_count; i++) {
        struct gpu *card = &state->gpus[i];
        if (gpu >= 0 && gpu != (int)i)
            continue;
        switch (change) {
        case CHANGE_LOSE: card->lost = 1; break;
        case CHANGE_RESTORE:
        case CHANGE_RESET:
            reset_gpu(state, card);
            card->generation = next_generation(state);
            break;
        case CHANGE_REMOVE: card->removed = 1; break;
        case CHANGE_ADD:
            card->removed = 0;
            card->generation = next_generation(state);
            break;
        default: reboot_gpu(state, card);
        }
    }
    if (change == CHANGE_REBOOT)
        memset(state->checkpoints, 0, sizeof state->checkpoints);
    state_changed(state);
    state_unlock(state);
    return NVML_SUCCESS;
}

EXPORT int fakenvml_inject(struct fake_state *state, const char *symbol, int gpu, int code, uint64_t delay_us, int skip,
                           int times)
{
    int result = NVML_ERROR_INSUFFICIENT_RESOURCES;
    state_lock(state);
    for (unsigned i = 0; i < FAKE_FAULTS && result != NVML_SUCCESS; i++) {
        struct fault *fault = &state->faults[i];
        if (fault->present)
            continue;
        *fault = (struct fault){.gpu = gpu, .code = code, .delay_us = delay_us, .skip = skip, .times = times};
        snprintf(fault->symbol, TEXT, "%s", symbol);
        fault->present = 1;
        state->fault_count++;
        result = NVML_SUCCESS;
    }
    state_unlock(state);
    return result;
}

/* NULL: all. Lets go whoever sleeps in a delay. */
EXPORT int fakenvml_clear_faults(struct fake_state *state, const char *symbol)
{
    state_lock(state);
    for (unsigned i = 0; i < FAKE_FAULTS; i++) {
        struct fault *fault = &state->faults[i];
        if (!fault->present || (symbol != NULL && strcmp(symbol, fault->symbol) != 0))
            continue;
        fault->present = 0;
        state->fault_count--;
    }
    state->faults_cleared++;
    state_changed(state);
    state_unlock(state);
    return NVML_SUCCESS;
}

/* For stand-ins outside this library: counts the call, sleeps its delay, returns its code (0: none). */
EXPORT int fakenvml_take_fault(struct fake_state *state, const char *symbol)
{
    state_lock(state);
    count_call(state, symbol);
    int code = take_fault(state, symbol, -1);
    state_unlock(state);
    return code;
}

EXPORT uint64_t fakenvml_calls(struct fake_state *state, const char *symbol)
{
    uint64_t count = 0;
    state_lock(state);
    for (unsigned i = 0; i < FAKE_CALLS; i++)
        if (strcmp(state->calls[i].symbol, symbol) == 0)
            count = state->calls[i].count;
    state_unlock(state);
    return count;
}

/* CUDA codes. `timeout_us` UINT64_MAX: none. */
EXPORT int fakenvml_checkpoint(struct fake_state *state, uint32_t pid, int request, uint64_t timeout_us)
{
    static const char *const symbols[] = {"", "cuCheckpointProcessLock", "cuCheckpointProcessCheckpoint",
                                          "cuCheckpointProcessRestore", "cuCheckpointProcessUnlock"};
    if (request < REQUEST_LOCK || request > REQUEST_UNLOCK)
        return CUDA_ERROR_INVALID_VALUE;
    return checkpoint_ask(state, symbols[request], pid, (enum checkpoint_request)request, timeout_us, NULL, 0);
}

EXPORT int fakenvml_checkpoint_state(struct fake_state *state, uint32_t pid, uint32_t *found)
{
    return checkpoint_state(state, pid, found);
}

EXPORT int fakenvml_checkpoint_next(struct fake_state *state, uint64_t timeout_us)
{
    return checkpoint_next(state, (uint32_t)getpid(), timeout_us);
}

EXPORT int fakenvml_checkpoint_done(struct fake_state *state) { return checkpoint_done(state, (uint32_t)getpid()); }

/* Dies with the lock held, at once: for the test that the next one recovers. */
EXPORT void fakenvml_die_holding_the_lock(struct fake_state *state)
{
    state_lock(state);
    abort();
}
