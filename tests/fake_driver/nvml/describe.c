/* The whole state as JSON, for tests and people. */
#define _GNU_SOURCE
#include <stdarg.h>
#include <stdio.h>

#include "abi.h"
#include "books.h"

struct writer {
    char *at;
    size_t left, needed;
};

__attribute__((format(printf, 2, 3))) static void put(struct writer *out, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(out->at, out->left, format, arguments);
    va_end(arguments);
    out->needed += (size_t)length;
    size_t used = (size_t)length < out->left ? (size_t)length : out->left;
    out->at += used;
    out->left -= used;
}

static void put_instances(struct writer *out, const struct gpu *gpu)
{
    const char *comma = "";
    put(out, "\"instances\":[");
    for (unsigned i = 0; i < FAKE_NODES; i++) {
        const struct gpu_instance *gi = &gpu->gi[i];
        if (!gi->present)
            continue;
        const struct gi_profile *profile = profile_of(gpu, gi);
        put(out, "%s{\"id\":%u,\"profile\":\"%s\",\"start\":%u,\"size\":%u,\"memory_mib\":%llu,\"compute\":[", comma, i,
            profile->name, gi->start, profile->size, (unsigned long long)profile->memory_mib);
        const char *inner = "";
        for (unsigned j = 0; j < FAKE_CIS; j++) {
            const struct compute_instance *ci = &gi->ci[j];
            if (!ci->present)
                continue;
            put(out, "%s{\"id\":%u,\"uuid\":\"%s\",\"start\":%u,\"size\":%u,", inner, j, ci->uuid, ci->start, ci->size);
            put(out, "\"mig_index\":%u,\"compute_mode\":%lld}", ci->mig_index, (long long)ci->compute_mode);
            inner = ",";
        }
        put(out, "]}");
        comma = ",";
    }
    put(out, "]");
}

static void put_card(struct writer *out, const struct fake_state *state, unsigned number)
{
    const struct gpu *gpu = &state->gpus[number];
    uint64_t used = bytes_on(state, number, NO_INSTANCE, NO_INSTANCE);
    uint64_t usable = bytes_usable(state, number, NO_INSTANCE);
    put(out, "%s{\"index\":%u,\"uuid\":\"%s\",\"model\":\"%s\",\"compute_slices\":%u,", number ? "," : "", number,
        gpu->uuid, model_of(gpu)->name, model_of(gpu)->compute_slices);
    put(out, "\"pci_bus_id\":\"00000000:%02X:00.0\",\"lost\":%s,\"removed\":%s,", gpu->pci_bus,
        gpu->lost ? "true" : "false", gpu->removed ? "true" : "false");
    put(out, "\"compute_mode\":%lld,\"timeslice\":%lld,\"mig\":[%lld,%lld],\"used_mib\":%llu,\"free_mib\":%llu,",
        (long long)gpu->compute_mode, (long long)gpu->timeslice, (long long)gpu->mig_current,
        (long long)gpu->mig_pending, (unsigned long long)(used / MIB), (unsigned long long)((usable - used) / MIB));
    put_instances(out, gpu);
    put(out, "}");
}

static long long or_none(uint32_t id) { return id == NO_INSTANCE ? -1 : (long long)id; }

/* How many bytes it takes, without the closing zero; what does not fit is left out. */
EXPORT uint64_t fakenvml_describe(struct fake_state *state, char *buffer, uint64_t size)
{
    struct writer out = {.at = buffer, .left = size};
    state_lock(state);
    books_reap(state);
    put(&out, "{\"gpus\":[");
    for (unsigned i = 0; i < state->gpu_count; i++)
        put_card(&out, state, i);
    put(&out, "],\"processes\":[");
    const char *comma = "";
    for (unsigned i = 0; i < FAKE_PROCESSES; i++) {
        const struct process *entry = &state->processes[i];
        if (!entry->present)
            continue;
        put(&out, "%s{\"pid\":%u,\"gpu\":%u,\"gi\":%lld,\"ci\":%lld,", comma, entry->pid, entry->gpu,
            or_none(entry->gi), or_none(entry->ci));
        put(&out, "\"mib\":%llu,\"saved_mib\":%llu,\"sm_pct\":%u,", (unsigned long long)(entry->bytes / MIB),
            (unsigned long long)(entry->saved_bytes / MIB), entry->busy_until_us > monotonic_us() ? entry->sm_pct : 0);
        put(&out, "\"mps\":\"%s\"}", entry->flags & PROCESS_MPS_SERVER   ? "server"
                                     : entry->flags & PROCESS_MPS_CLIENT ? "client"
                                                                         : "");
        comma = ",";
    }
    put(&out, "]}");
    state_unlock(state);
    return out.needed;
}
