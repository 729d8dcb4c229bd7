/* NVML: event sets. A set belongs to one process; the events come from the shared ring, so any process can raise them.
 *
 * Each set keeps its own reading position and each card the number of the first event after its registration: every set
 * sees each event once, and none from before it asked.
 */
#include <errno.h>
#include <string.h>

#include "books.h"
#include "session.h"

#define SETS 64u

static struct event_set {
    bool used;
    uint32_t generation;
    uint64_t next; /* event to look at next */
    struct {
        uint64_t mask; /* 0: not registered */
        uint64_t from;
    } cards[FAKE_GPUS];
} sets[SETS];

static struct event_set *find_set(nvmlEventSet_t handle)
{
    unsigned number;
    uint32_t generation;
    if (!read_handle(handle, HANDLE_EVENT_SET, &number, NULL, NULL, &generation) || number >= SETS)
        return NULL;
    return sets[number].used && sets[number].generation == generation ? &sets[number] : NULL;
}

EXPORT nvmlReturn_t nvmlEventSetCreate(nvmlEventSet_t *set)
{
    CALL(NULL);
    REQUIRE(set != NULL, NVML_ERROR_INVALID_ARGUMENT);
    for (unsigned i = 0; i < SETS; i++) {
        if (sets[i].used)
            continue;
        sets[i] = (struct event_set){.used = true, .generation = next_generation(the_state)};
        sets[i].next = the_state->events_made;
        *set = make_handle(HANDLE_EVENT_SET, i, 0, 0, sets[i].generation);
        RETURN(NVML_SUCCESS);
    }
    RETURN(NVML_ERROR_MEMORY);
}

EXPORT nvmlReturn_t nvmlEventSetFree(nvmlEventSet_t handle)
{
    CALL(NULL);
    struct event_set *set = find_set(handle);
    REQUIRE(set != NULL, NVML_ERROR_INVALID_ARGUMENT);
    set->used = false;
    /* Whoever waits on it is let go. */
    state_changed(the_state);
    RETURN(NVML_SUCCESS);
}

EXPORT nvmlReturn_t nvmlDeviceGetSupportedEventTypes(nvmlDevice_t device, unsigned long long *types)
{
    CALL(device);
    struct place place;
    TRY(find_card(device, &place, NVML_ERROR_NOT_SUPPORTED));
    REQUIRE(types != NULL, NVML_ERROR_INVALID_ARGUMENT);
    *types = (unsigned long long)place.gpu->supported_events;
    RETURN(NVML_SUCCESS);
}

EXPORT nvmlReturn_t nvmlDeviceRegisterEvents(nvmlDevice_t device, unsigned long long types, nvmlEventSet_t handle)
{
    CALL(device);
    struct place place;
    TRY(find_card(device, &place, NVML_ERROR_NOT_SUPPORTED));
    struct event_set *set = find_set(handle);
    REQUIRE(set != NULL, NVML_ERROR_INVALID_ARGUMENT);
    REQUIRE((types & ~(unsigned long long)place.gpu->supported_events) == 0, NVML_ERROR_NOT_SUPPORTED);
    REQUIRE(!place.gpu->mig_current || the_state->privileged || the_state->mig_monitor, NVML_ERROR_NO_PERMISSION);
    set->cards[place.number].mask |= types;
    set->cards[place.number].from = the_state->events_made;
    RETURN(NVML_SUCCESS);
}

/* The next event that the set asked for, or NULL. */
static const struct event *next_event(struct event_set *set)
{
    uint64_t made = the_state->events_made;
    /* A reader that fell behind by more than the ring holds has lost the oldest. */
    if (made > FAKE_EVENTS && set->next < made - FAKE_EVENTS)
        set->next = made - FAKE_EVENTS;
    while (set->next < made) {
        const struct event *event = &the_state->events[set->next++ % FAKE_EVENTS];
        if (set->cards[event->gpu].mask & event->type && event->sequence >= set->cards[event->gpu].from)
            return event;
    }
    return NULL;
}

static bool any_lost(const struct event_set *set)
{
    for (unsigned i = 0; i < FAKE_GPUS; i++)
        if (set->cards[i].mask && the_state->gpus[i].lost)
            return true;
    return false;
}

EXPORT nvmlReturn_t nvmlEventSetWait_v2(nvmlEventSet_t handle, nvmlEventData_t *data, unsigned timeout_ms)
{
    CALL(NULL);
    REQUIRE(data != NULL, NVML_ERROR_INVALID_ARGUMENT);
    uint64_t deadline = monotonic_us() + (uint64_t)timeout_ms * 1000u;
    for (;;) {
        struct event_set *set = find_set(handle);
        REQUIRE(set != NULL, NVML_ERROR_INVALID_ARGUMENT);
        const struct event *event = next_event(set);
        if (event != NULL) {
            *data = (nvmlEventData_t){.device = device_handle(&the_state->gpus[event->gpu]),
                                      .eventType = event->type,
                                      .eventData = event->data,
                                      .gpuInstanceId = event->gi,
                                      .computeInstanceId = event->ci};
            RETURN(NVML_SUCCESS);
        }
        REQUIRE(!any_lost(set), NVML_ERROR_GPU_IS_LOST);
        uint32_t ticket = state_ticket(the_state);
        state_unlock(the_state);
        /* A signal ends the wait early, as with the real library: callers must take TIMEOUT at any time. */
        int woken = state_wait(the_state, ticket, deadline);
        if (woken == ETIMEDOUT || woken == EINTR)
            return NVML_ERROR_TIMEOUT;
        state_lock(the_state);
    }
}
