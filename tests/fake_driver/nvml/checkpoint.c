#include "checkpoint.h"

#include <errno.h>

#include "books.h"
#include "faults.h"

/* One entry per process that was ever asked or serves; NULL if it has nothing on any card and none is wanted. */
static struct checkpoint *find(struct fake_state *state, uint32_t pid, bool make)
{
    uint64_t start_time = process_start_time(pid);
    struct checkpoint *free = NULL;
    bool on_card = false;
    for (unsigned i = 0; i < FAKE_PROCESSES; i++)
        on_card = on_card || (state->processes[i].present && state->processes[i].pid == pid);
    for (unsigned i = 0; i < FAKE_CHECKPOINTS; i++) {
        struct checkpoint *entry = &state->checkpoints[i];
        if (entry->present && entry->pid == pid && entry->start_time == start_time)
            return entry;
        if (!entry->present && free == NULL)
            free = entry;
    }
    if (start_time == 0 || free == NULL || !(make || on_card))
        return NULL;
    *free = (struct checkpoint){.pid = pid, .start_time = start_time};
    free->present = 1;
    return free;
}

static bool suspendable(const struct fake_state *state, uint32_t pid)
{
    for (unsigned i = 0; i < FAKE_PROCESSES; i++) {
        const struct process *entry = &state->processes[i];
        if (entry->present && entry->pid == pid &&
            (entry->gi != NO_INSTANCE ||
             entry->flags & (PROCESS_MPS_CLIENT | PROCESS_MPS_SERVER | PROCESS_UNSUSPENDABLE)))
            return false;
    }
    return true;
}

static uint64_t bytes_held(const struct fake_state *state, uint32_t pid)
{
    uint64_t sum = 0;
    for (unsigned i = 0; i < FAKE_PROCESSES; i++)
        if (state->processes[i].present && state->processes[i].pid == pid)
            sum += state->processes[i].bytes + state->processes[i].saved_bytes;
    return sum;
}

static void save(struct fake_state *state, uint32_t pid)
{
    for (unsigned i = 0; i < FAKE_PROCESSES; i++) {
        struct process *entry = &state->processes[i];
        if (!entry->present || entry->pid != pid)
            continue;
        books_advance(state, &state->gpus[entry->gpu]);
        entry->saved_bytes = entry->bytes;
        entry->bytes = entry->sm_pct = entry->memory_pct = 0;
    }
}

/* Which card an entry comes back on. Where pairs are given they must name every card that is held. */
static int destination(const struct fake_state *state, const struct process *entry, const struct gpu_pair *pairs,
                       unsigned count, unsigned *to)
{
    *to = entry->gpu;
    for (unsigned i = 0; i < count; i++)
        if (pairs[i].from == entry->gpu) {
            *to = pairs[i].to;
            return state->gpus[*to].model == state->gpus[entry->gpu].model ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
        }
    return count == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

static int load_back(struct fake_state *state, uint32_t pid, const struct gpu_pair *pairs, unsigned count)
{
    for (unsigned pass = 0; pass < 2; pass++)
        for (unsigned i = 0; i < FAKE_PROCESSES; i++) {
            struct process *entry = &state->processes[i];
            unsigned to;
            if (!entry->present || entry->pid != pid)
                continue;
            int result = destination(state, entry, pairs, count, &to);
            if (result != CUDA_SUCCESS)
                return result;
            uint64_t bytes = entry->saved_bytes, used = bytes_on(state, to, NO_INSTANCE, NO_INSTANCE);
            if (pass == 0 && used + bytes > bytes_usable(state, to, NO_INSTANCE))
                return CUDA_ERROR_OUT_OF_MEMORY;
            if (pass == 1) {
                entry->gpu = to;
                entry->bytes = bytes;
                entry->saved_bytes = 0;
            }
        }
    return CUDA_SUCCESS;
}

static const uint32_t needed[] = {0, CHECKPOINT_RUNNING, CHECKPOINT_LOCKED, CHECKPOINT_DONE, CHECKPOINT_LOCKED};

/* Waits until the target answers, dies, or the time is up. The lock is released meanwhile. */
static int await_target(struct fake_state *state, uint32_t pid, uint64_t start_time, enum checkpoint_request request,
                        uint64_t timeout_us)
{
    uint64_t deadline = timeout_us == UINT64_MAX ? UINT64_MAX : monotonic_us() + timeout_us;
    struct checkpoint *entry = find(state, pid, false);
    entry->request = request;
    uint32_t number = ++entry->asked;
    state_changed(state);
    for (;;) {
        entry = find(state, pid, false);
        if (entry == NULL || !process_alive(pid, start_time))
            return CUDA_ERROR_UNKNOWN;
        if (entry->answered == number)
            return CUDA_SUCCESS;
        if (monotonic_us() >= deadline) {
            entry->request = 0;
            return CUDA_ERROR_NOT_READY;
        }
        /* A target that dies wakes nobody: look again now and then. */
        uint64_t look_again = monotonic_us() + 50000u;
        uint32_t ticket = state_ticket(state);
        state_unlock(state);
        state_wait(state, ticket, look_again < deadline ? look_again : deadline);
        state_lock(state);
    }
}

static void copy_takes_time(struct fake_state *state, uint64_t bytes)
{
    if (state->checkpoint_mib_per_s <= 0)
        return;
    uint64_t until = monotonic_us() + bytes / MIB * 1000000u / (uint64_t)state->checkpoint_mib_per_s;
    while (monotonic_us() < until) {
        uint32_t ticket = state_ticket(state);
        state_unlock(state);
        state_wait(state, ticket, until);
        state_lock(state);
    }
}

static int ask_locked(struct fake_state *state, const char *symbol, uint32_t pid, enum checkpoint_request request,
                      uint64_t timeout_us, const struct gpu_pair *pairs, unsigned pair_count)
{
    count_call(state, symbol);
    int ordered = take_fault(state, symbol, -1);
    books_reap(state);
    struct checkpoint *entry = find(state, pid, false);
    if (entry == NULL)
        return CUDA_ERROR_INVALID_VALUE;
    if (ordered != 0) {
        /* A copy that broke off leaves the process in no usable state; a lock that was refused changes nothing. */
        if (request == REQUEST_CHECKPOINT || request == REQUEST_RESTORE)
            entry->state = CHECKPOINT_FAILED;
        return ordered;
    }
    if (entry->state != needed[request])
        return CUDA_ERROR_ILLEGAL_STATE;
    if (!suspendable(state, pid))
        return CUDA_ERROR_NOT_SUPPORTED;
    if (entry->serving) {
        int result = await_target(state, pid, entry->start_time, request, timeout_us);
        if (result != CUDA_SUCCESS)
            return result;
    }
    if (request == REQUEST_CHECKPOINT || request == REQUEST_RESTORE)
        copy_takes_time(state, bytes_held(state, pid));
    entry = find(state, pid, false);
    if (entry == NULL)
        return CUDA_ERROR_UNKNOWN;
    int result = CUDA_SUCCESS;
    if (request == REQUEST_CHECKPOINT)
        save(state, pid);
    if (request == REQUEST_RESTORE)
        result = load_back(state, pid, pairs, pair_count);
    if (result == CUDA_SUCCESS)
        entry->state = request == REQUEST_CHECKPOINT ? CHECKPOINT_DONE
                       : request == REQUEST_UNLOCK   ? CHECKPOINT_RUNNING
                                                     : CHECKPOINT_LOCKED;
    state_changed(state);
    return result;
}

int checkpoint_ask(struct fake_state *state, const char *symbol, uint32_t pid, enum checkpoint_request request,
                   uint64_t timeout_us, const struct gpu_pair *pairs, unsigned pair_count)
{
    state_lock(state);
    int result = ask_locked(state, symbol, pid, request, timeout_us, pairs, pair_count);
    state_unlock(state);
    return result;
}

int checkpoint_state(struct fake_state *state, uint32_t pid, uint32_t *found)
{
    state_lock(state);
    books_reap(state);
    struct checkpoint *entry = find(state, pid, false);
    if (entry != NULL)
        *found = entry->state;
    state_unlock(state);
    return entry != NULL ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

int checkpoint_next(struct fake_state *state, uint32_t pid, uint64_t timeout_us)
{
    uint64_t deadline = monotonic_us() + timeout_us;
    int request = 0;
    state_lock(state);
    for (;;) {
        struct checkpoint *entry = find(state, pid, true);
        if (entry == NULL)
            break;
        entry->serving = 1;
        if (entry->request != 0 && entry->answered != entry->asked) {
            request = (int)entry->request;
            break;
        }
        uint32_t ticket = state_ticket(state);
        state_unlock(state);
        int woken = state_wait(state, ticket, deadline);
        state_lock(state);
        if (woken == ETIMEDOUT)
            break;
    }
    state_unlock(state);
    return request;
}

bool checkpoint_done(struct fake_state *state, uint32_t pid)
{
    state_lock(state);
    struct checkpoint *entry = find(state, pid, true);
    bool wanted = entry != NULL && entry->request != 0;
    if (wanted) {
        entry->request = 0;
        entry->answered = entry->asked;
        state_changed(state);
    }
    state_unlock(state);
    return wanted;
}
