/* NVML: who uses a card, and how much of it. */
#include "books.h"
#include "session.h"

#define SAMPLE_PERIOD_US 166667u /* the driver averages over a sixth of a second */

enum list { LIST_COMPUTE, LIST_MPS, LIST_GRAPHICS };

static bool listed(const struct process *entry, const struct place *place, enum list list)
{
    if (!entry->present || entry->gpu != place->number || entry->saved_bytes > 0)
        return false;
    if (place->gi != NULL && (entry->gi != place->gi_id || entry->ci != place->ci_id))
        return false;
    switch (list) {
    case LIST_GRAPHICS: return entry->flags & PROCESS_GRAPHICS;
    case LIST_MPS: return entry->flags & PROCESS_MPS_CLIENT;
    default:
        return !(entry->flags & PROCESS_GRAPHICS) &&
               (!(entry->flags & PROCESS_MPS_CLIENT) || the_state->mps_clients_in_compute_list);
    }
}

static nvmlReturn_t find_listed(nvmlDevice_t device, struct place *place)
{
    nvmlReturn_t result = find_device(device, place);
    if (result != NVML_SUCCESS)
        return result;
    if (place->gi == NULL && place->gpu->mig_current && !the_state->privileged && !the_state->mig_monitor)
        return NVML_ERROR_NO_PERMISSION;
    books_reap(the_state);
    return NVML_SUCCESS;
}

static nvmlReturn_t list_processes(nvmlDevice_t device, unsigned *count, nvmlProcessInfo_t *out, enum list list)
{
    struct place place;
    nvmlReturn_t result = find_listed(device, &place);
    if (result != NVML_SUCCESS)
        return result;
    if (count == NULL)
        return NVML_ERROR_INVALID_ARGUMENT;
    unsigned room = out != NULL ? *count : 0, found = 0;
    for (unsigned i = 0; i < FAKE_PROCESSES; i++) {
        const struct process *entry = &the_state->processes[i];
        if (!listed(entry, &place, list))
            continue;
        if (found < room)
            out[found] = (nvmlProcessInfo_t){.pid = entry->pid,
                                             .usedGpuMemory = entry->bytes,
                                             .gpuInstanceId = entry->gi,
                                             .computeInstanceId = entry->ci};
        found++;
    }
    *count = found;
    return found > room ? NVML_ERROR_INSUFFICIENT_SIZE : NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlDeviceGetComputeRunningProcesses_v3(nvmlDevice_t device, unsigned *count,
                                                            nvmlProcessInfo_t *out)
{
    CALL(device);
    RETURN(list_processes(device, count, out, LIST_COMPUTE));
}

EXPORT nvmlReturn_t nvmlDeviceGetMPSComputeRunningProcesses_v3(nvmlDevice_t device, unsigned *count,
                                                               nvmlProcessInfo_t *out)
{
    CALL(device);
    RETURN(list_processes(device, count, out, LIST_MPS));
}

EXPORT nvmlReturn_t nvmlDeviceGetGraphicsRunningProcesses_v3(nvmlDevice_t device, unsigned *count,
                                                             nvmlProcessInfo_t *out)
{
    CALL(device);
    RETURN(list_processes(device, count, out, LIST_GRAPHICS));
}

EXPORT nvmlReturn_t nvmlDeviceGetRunningProcessDetailList(nvmlDevice_t device, nvmlProcessDetailList_v1_t *out)
{
    CALL(device);
    struct place place;
    TRY(find_listed(device, &place));
    REQUIRE(model_of(place.gpu)->architecture >= 9, NVML_ERROR_NOT_SUPPORTED);
    REQUIRE(out != NULL && out->mode <= 2, NVML_ERROR_INVALID_ARGUMENT);
    REQUIRE(out->version == STRUCT_VERSION(sizeof *out, 1), NVML_ERROR_ARGUMENT_VERSION_MISMATCH);
    static const enum list lists[] = {LIST_COMPUTE, LIST_GRAPHICS, LIST_MPS};
    unsigned room = out->procArray != NULL ? out->numProcArrayEntries : 0, found = 0;
    for (unsigned i = 0; i < FAKE_PROCESSES; i++) {
        const struct process *entry = &the_state->processes[i];
        if (!listed(entry, &place, lists[out->mode]))
            continue;
        if (found < room)
            out->procArray[found] = (nvmlProcessDetail_v1_t){.pid = entry->pid,
                                                             .usedGpuMemory = entry->bytes,
                                                             .gpuInstanceId = entry->gi,
                                                             .computeInstanceId = entry->ci};
        found++;
    }
    out->numProcArrayEntries = found;
    RETURN(found > room ? NVML_ERROR_INSUFFICIENT_SIZE : NVML_SUCCESS);
}

/* Load of MPS clients is booked on their server: it is the one with a context of its own on the card. */
static unsigned load_of(const struct process *entry, bool memory)
{
    uint64_t now = monotonic_us();
    if (!(entry->flags & PROCESS_MPS_SERVER))
        return entry->busy_until_us > now ? (memory ? entry->memory_pct : entry->sm_pct) : 0;
    unsigned sum = 0;
    for (unsigned i = 0; i < FAKE_PROCESSES; i++) {
        const struct process *client = &the_state->processes[i];
        if (client->present && client->flags & PROCESS_MPS_CLIENT && client->gpu == entry->gpu &&
            client->busy_until_us > now)
            sum += memory ? client->memory_pct : client->sm_pct;
    }
    return sum < 100 ? sum : 100;
}

static bool sampled(const struct process *entry, const struct place *place)
{
    return entry->present && entry->gpu == place->number && !(entry->flags & PROCESS_MPS_CLIENT) &&
           load_of(entry, false) > 0;
}

/* The newest sample that the driver has finished. */
static unsigned long long sample_time(void) { return wall_us() / SAMPLE_PERIOD_US * SAMPLE_PERIOD_US; }

EXPORT nvmlReturn_t nvmlDeviceGetProcessUtilization(nvmlDevice_t device, nvmlProcessUtilizationSample_t *out,
                                                    unsigned *count, unsigned long long last_seen)
{
    CALL(device);
    struct place place;
    TRY(find_listed(device, &place));
    REQUIRE(count != NULL, NVML_ERROR_INVALID_ARGUMENT);
    REQUIRE(!place.gpu->mig_current, NVML_ERROR_NOT_SUPPORTED);
    unsigned room = out != NULL ? *count : 0, found = 0;
    unsigned long long time = sample_time();
    for (unsigned i = 0; i < FAKE_PROCESSES && time > last_seen; i++) {
        const struct process *entry = &the_state->processes[i];
        if (!sampled(entry, &place))
            continue;
        if (found < room)
            out[found] = (nvmlProcessUtilizationSample_t){.pid = entry->pid,
                                                          .timeStamp = time,
                                                          .smUtil = load_of(entry, false),
                                                          .memUtil = load_of(entry, true)};
        found++;
    }
    *count = found;
    REQUIRE(found > 0, NVML_ERROR_NOT_FOUND);
    RETURN(found > room ? NVML_ERROR_INSUFFICIENT_SIZE : NVML_SUCCESS);
}

EXPORT nvmlReturn_t nvmlDeviceGetProcessesUtilizationInfo(nvmlDevice_t device, nvmlProcessesUtilizationInfo_v1_t *out)
{
    CALL(device);
    struct place place;
    TRY(find_listed(device, &place));
    REQUIRE(out != NULL, NVML_ERROR_INVALID_ARGUMENT);
    REQUIRE(out->version == STRUCT_VERSION(sizeof *out, 1), NVML_ERROR_ARGUMENT_VERSION_MISMATCH);
    REQUIRE(!place.gpu->mig_current, NVML_ERROR_NOT_SUPPORTED);
    unsigned room = out->procUtilArray != NULL ? out->processSamplesCount : 0, found = 0;
    unsigned long long time = sample_time();
    for (unsigned i = 0; i < FAKE_PROCESSES && time > out->lastSeenTimeStamp; i++) {
        const struct process *entry = &the_state->processes[i];
        if (!sampled(entry, &place))
            continue;
        if (found < room)
            out->procUtilArray[found] = (nvmlProcessUtilizationInfo_v1_t){.timeStamp = time,
                                                                          .pid = entry->pid,
                                                                          .smUtil = load_of(entry, false),
                                                                          .memUtil = load_of(entry, true)};
        found++;
    }
    out->processSamplesCount = found;
    REQUIRE(found > 0, NVML_ERROR_NOT_FOUND);
    RETURN(found > room ? NVML_ERROR_INSUFFICIENT_SIZE : NVML_SUCCESS);
}
