#define _GNU_SOURCE
#include "books.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

/* Fields 3 and 22 of /proc/PID/stat; false if it is not there. The name before them may hold spaces and brackets. */
static bool process_facts(uint32_t pid, char *status, uint64_t *start_time)
{
    char path[32], text[1024];
    snprintf(path, sizeof path, "/proc/%u/stat", pid);
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0)
        return false;
    ssize_t length = read(file, text, sizeof text - 1);
    close(file);
    if (length <= 0)
        return false;
    text[length] = 0;
    const char *rest = strrchr(text, ')');
    unsigned long long ticks = 0;
    if (rest == NULL || sscanf(rest + 1,
                               " %c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %*u %*u %*d %*d %*d %*d %*d %*d %llu",
                               status, &ticks) != 2)
        return false;
    *start_time = ticks;
    return true;
}

uint64_t process_start_time(uint32_t pid)
{
    char status;
    uint64_t start;
    return process_facts(pid, &status, &start) ? start : 0;
}

bool process_alive(uint32_t pid, uint64_t start_time)
{
    if (kill((pid_t)pid, 0) != 0 && errno == ESRCH)
        return false;
    char status;
    uint64_t start;
    if (!process_facts(pid, &status, &start))
        return false;
    return start == start_time && status != 'Z' && status != 'X';
}

void books_reap(struct fake_state *state)
{
    for (unsigned i = 0; i < FAKE_PROCESSES; i++) {
        struct process *entry = &state->processes[i];
        if (!entry->present || process_alive(entry->pid, entry->start_time))
            continue;
        books_advance(state, &state->gpus[entry->gpu]);
        entry->present = 0;
    }
    for (unsigned i = 0; i < FAKE_CHECKPOINTS; i++) {
        struct checkpoint *entry = &state->checkpoints[i];
        if (entry->present && !process_alive(entry->pid, entry->start_time))
            entry->present = 0;
    }
}

static bool counts(const struct process *entry, unsigned gpu, uint32_t gi, uint32_t ci)
{
    return entry->present && entry->gpu == gpu && (gi == NO_INSTANCE || entry->gi == gi) &&
           (ci == NO_INSTANCE || entry->ci == ci);
}

/* How many µs of the time since `from` the entry was busy. */
static uint64_t busy_since(const struct process *entry, uint64_t from, uint64_t now)
{
    uint64_t end = entry->busy_until_us < now ? entry->busy_until_us : now;
    return end > from ? end - from : 0;
}

void books_advance(struct fake_state *state, struct gpu *gpu)
{
    uint64_t now = monotonic_us(), from = gpu->accounted_us;
    unsigned number = (unsigned)(gpu - state->gpus);
    if (from == 0 || now <= from) {
        gpu->accounted_us = now;
        return;
    }
    uint64_t whole = 0;
    for (unsigned i = 0; i < FAKE_PROCESSES; i++) {
        const struct process *entry = &state->processes[i];
        if (!entry->present || entry->gpu != number || entry->sm_pct == 0)
            continue;
        uint64_t busy = busy_since(entry, from, now) * entry->sm_pct;
        whole += busy;
        if (entry->gi < FAKE_NODES)
            gpu->gi[entry->gi].busy += busy;
    }
    uint64_t elapsed = now - from;
    if (gpu->utilization >= 0)
        whole = elapsed * (uint64_t)gpu->utilization;
    if (whole > elapsed * 100)
        whole = elapsed * 100;
    const struct gpu_model *model = model_of(gpu);
    uint64_t power_mw = gpu->power_mw >= 0
                            ? (uint64_t)gpu->power_mw
                            : model->idle_mw + (model->full_mw - model->idle_mw) * (whole / elapsed) / 100;
    gpu->busy += whole;
    gpu->energy_nj += power_mw * elapsed;
    gpu->accounted_us = now;
}

uint64_t bytes_on(const struct fake_state *state, unsigned gpu, uint32_t gi, uint32_t ci)
{
    uint64_t sum = 0;
    for (unsigned i = 0; i < FAKE_PROCESSES; i++)
        if (counts(&state->processes[i], gpu, gi, ci))
            sum += state->processes[i].bytes;
    return sum;
}

uint64_t bytes_usable(const struct fake_state *state, unsigned gpu, uint32_t gi)
{
    const struct gpu *card = &state->gpus[gpu];
    if (gi == NO_INSTANCE)
        return (model_of(card)->total_mib - model_of(card)->reserved_mib) * MIB;
    return profile_of(card, &card->gi[gi])->memory_mib * MIB;
}

bool anybody_on(const struct fake_state *state, unsigned gpu, uint32_t gi, uint32_t ci)
{
    for (unsigned i = 0; i < FAKE_PROCESSES; i++)
        if (counts(&state->processes[i], gpu, gi, ci))
            return true;
    return false;
}

static unsigned sum_now(const struct fake_state *state, unsigned gpu, uint32_t gi, bool memory)
{
    uint64_t now = monotonic_us();
    unsigned sum = 0;
    for (unsigned i = 0; i < FAKE_PROCESSES; i++) {
        const struct process *entry = &state->processes[i];
        if (counts(entry, gpu, gi, NO_INSTANCE) && entry->busy_until_us > now)
            sum += memory ? entry->memory_pct : entry->sm_pct;
    }
    return sum < 100 ? sum : 100;
}

unsigned load_on(const struct fake_state *state, unsigned gpu, uint32_t gi)
{
    int64_t told = state->gpus[gpu].utilization;
    return told >= 0 && gi == NO_INSTANCE ? (unsigned)told : sum_now(state, gpu, gi, false);
}

unsigned memory_load_on(const struct fake_state *state, unsigned gpu)
{
    int64_t told = state->gpus[gpu].memory_utilization;
    return told >= 0 ? (unsigned)told : sum_now(state, gpu, NO_INSTANCE, true);
}

unsigned power_of(const struct fake_state *state, unsigned gpu)
{
    const struct gpu *card = &state->gpus[gpu];
    if (card->power_mw >= 0)
        return (unsigned)card->power_mw;
    const struct gpu_model *model = model_of(card);
    return model->idle_mw + (model->full_mw - model->idle_mw) / 100 * load_on(state, gpu, NO_INSTANCE);
}

unsigned temperature_of(const struct fake_state *state, unsigned gpu)
{
    int64_t told = state->gpus[gpu].temperature_c;
    return told >= 0 ? (unsigned)told : 30 + 45 * load_on(state, gpu, NO_INSTANCE) / 100;
}

static struct process *find_entry(struct fake_state *state, uint32_t pid, unsigned gpu, uint32_t gi, uint32_t ci)
{
    for (unsigned i = 0; i < FAKE_PROCESSES; i++) {
        struct process *entry = &state->processes[i];
        if (entry->present && entry->pid == pid && entry->gpu == gpu && entry->gi == gi && entry->ci == ci)
            return entry;
    }
    return NULL;
}

/* MPS clients share the card behind their server; anybody else needs it alone where it is exclusive. */
static nvmlReturn_t admit(const struct fake_state *state, unsigned gpu, uint32_t gi, uint32_t ci, uint32_t flags)
{
    const struct gpu *card = &state->gpus[gpu];
    int64_t mode = gi == NO_INSTANCE ? card->compute_mode : card->gi[gi].ci[ci].compute_mode;
    if (mode == NVML_COMPUTEMODE_PROHIBITED)
        return NVML_ERROR_NO_PERMISSION;
    if (mode != NVML_COMPUTEMODE_EXCLUSIVE_PROCESS)
        return NVML_SUCCESS;
    for (unsigned i = 0; i < FAKE_PROCESSES; i++) {
        const struct process *entry = &state->processes[i];
        if (!counts(entry, gpu, gi, ci) || entry->flags & PROCESS_GRAPHICS)
            continue;
        if (!(flags & PROCESS_MPS_CLIENT) || !(entry->flags & (PROCESS_MPS_CLIENT | PROCESS_MPS_SERVER)))
            return NVML_ERROR_IN_USE;
    }
    return NVML_SUCCESS;
}

static nvmlReturn_t check_place(const struct fake_state *state, unsigned gpu, uint32_t gi, uint32_t ci)
{
    if (gpu >= state->gpu_count || state->gpus[gpu].removed)
        return NVML_ERROR_NOT_FOUND;
    const struct gpu *card = &state->gpus[gpu];
    if (card->lost)
        return NVML_ERROR_GPU_IS_LOST;
    if (gi == NO_INSTANCE)
        return card->mig_current ? NVML_ERROR_NOT_SUPPORTED : NVML_SUCCESS;
    if (gi >= FAKE_NODES || ci >= FAKE_CIS || !card->gi[gi].present || !card->gi[gi].ci[ci].present)
        return NVML_ERROR_NOT_FOUND;
    return NVML_SUCCESS;
}

nvmlReturn_t books_allocate(struct fake_state *state, uint32_t pid, unsigned gpu, uint32_t gi, uint32_t ci,
                            uint64_t bytes, uint32_t flags)
{
    uint64_t start_time = process_start_time(pid);
    if (start_time == 0)
        return NVML_ERROR_INVALID_ARGUMENT;
    books_reap(state);
    nvmlReturn_t result = check_place(state, gpu, gi, ci);
    if (result != NVML_SUCCESS)
        return result;
    struct process *entry = find_entry(state, pid, gpu, gi, ci);
    if (entry == NULL && (result = admit(state, gpu, gi, ci, flags)) != NVML_SUCCESS)
        return result;
    if (bytes_on(state, gpu, gi, NO_INSTANCE) + bytes > bytes_usable(state, gpu, gi))
        return NVML_ERROR_MEMORY;
    books_advance(state, &state->gpus[gpu]);
    for (unsigned i = 0; entry == NULL && i < FAKE_PROCESSES; i++)
        if (!state->processes[i].present) {
            entry = &state->processes[i];
            *entry = (struct process){.pid = pid, .start_time = start_time, .gpu = gpu, .gi = gi, .ci = ci};
        }
    if (entry == NULL)
        return NVML_ERROR_INSUFFICIENT_RESOURCES;
    entry->bytes += bytes;
    entry->flags |= flags;
    entry->present = 1;
    state_changed(state);
    return NVML_SUCCESS;
}

nvmlReturn_t books_free(struct fake_state *state, uint32_t pid, unsigned gpu, uint32_t gi, uint32_t ci, uint64_t bytes)
{
    struct process *entry = find_entry(state, pid, gpu, gi, ci);
    if (entry == NULL)
        return NVML_ERROR_NOT_FOUND;
    if (bytes > entry->bytes)
        return NVML_ERROR_INVALID_ARGUMENT;
    entry->bytes -= bytes;
    state_changed(state);
    return NVML_SUCCESS;
}

void books_release(struct fake_state *state, uint32_t pid)
{
    for (unsigned i = 0; i < FAKE_PROCESSES; i++) {
        struct process *entry = &state->processes[i];
        if (!entry->present || entry->pid != pid)
            continue;
        books_advance(state, &state->gpus[entry->gpu]);
        entry->present = 0;
    }
    state_changed(state);
}

nvmlReturn_t books_load(struct fake_state *state, uint32_t pid, unsigned sm_pct, unsigned memory_pct,
                        uint64_t lasting_us)
{
    nvmlReturn_t result = NVML_ERROR_NOT_FOUND;
    for (unsigned i = 0; i < FAKE_PROCESSES; i++) {
        struct process *entry = &state->processes[i];
        if (!entry->present || entry->pid != pid)
            continue;
        books_advance(state, &state->gpus[entry->gpu]);
        entry->sm_pct = sm_pct;
        entry->memory_pct = memory_pct;
        entry->busy_until_us = lasting_us ? monotonic_us() + lasting_us : UINT64_MAX;
        result = NVML_SUCCESS;
    }
    return result;
}

void post_event(struct fake_state *state, unsigned gpu, uint64_t type, uint64_t data, uint32_t gi, uint32_t ci)
{
    uint64_t sequence = state->events_made;
    state->events[sequence % FAKE_EVENTS] =
        (struct event){.sequence = sequence, .type = type, .data = data, .gpu = gpu, .gi = gi, .ci = ci};
    state->events_made = sequence + 1;
    state_changed(state);
}
