#include "faults.h"

#include <string.h>

void count_call(struct fake_state *state, const char *symbol)
{
    uint32_t hash = 2166136261u;
    for (const char *c = symbol; *c; c++)
        hash = (hash ^ (unsigned char)*c) * 16777619u;
    for (unsigned probe = 0; probe < FAKE_CALLS; probe++) {
        struct call_count *entry = &state->calls[(hash + probe) % FAKE_CALLS];
        if (entry->symbol[0] == 0)
            strncpy(entry->symbol, symbol, TEXT - 1);
        if (strcmp(entry->symbol, symbol) == 0) {
            entry->count++;
            return;
        }
    }
}

static bool names(const char *pattern, const char *symbol)
{
    size_t length = strlen(pattern);
    if (length > 0 && pattern[length - 1] == '*')
        return strncmp(pattern, symbol, length - 1) == 0;
    return strcmp(pattern, symbol) == 0;
}

static void sleep_unlocked(struct fake_state *state, uint64_t delay_us)
{
    uint64_t deadline = monotonic_us() + delay_us;
    uint32_t cleared = state->faults_cleared;
    while (state->faults_cleared == cleared && monotonic_us() < deadline) {
        uint32_t ticket = state_ticket(state);
        state_unlock(state);
        state_wait(state, ticket, deadline);
        state_lock(state);
    }
}

int take_fault(struct fake_state *state, const char *symbol, int gpu)
{
    if (state->fault_count == 0)
        return 0;
    for (unsigned i = 0; i < FAKE_FAULTS; i++) {
        struct fault *fault = &state->faults[i];
        if (!fault->present || !names(fault->symbol, symbol) || (fault->gpu >= 0 && fault->gpu != gpu))
            continue;
        if (fault->skip > 0) {
            fault->skip--;
            continue;
        }
        int code = fault->code;
        uint64_t delay_us = fault->delay_us;
        if (fault->times > 0 && --fault->times == 0) {
            fault->present = 0;
            state->fault_count--;
        }
        if (delay_us > 0)
            sleep_unlocked(state, delay_us);
        return code;
    }
    return 0;
}
