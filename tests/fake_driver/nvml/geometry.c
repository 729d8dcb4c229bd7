#include "geometry.h"

#include <string.h>

#include "books.h"

unsigned node_of(const struct gpu_model *model, unsigned start, unsigned size)
{
    return model->memory_slices / size - 1 + start / size;
}

static unsigned bits(unsigned start, unsigned size) { return ((1u << size) - 1u) << start; }

static unsigned taken(const struct gpu *gpu)
{
    unsigned mask = 0;
    for (unsigned i = 0; i < FAKE_NODES; i++)
        if (gpu->gi[i].present)
            mask |= bits(gpu->gi[i].start, profile_of(gpu, &gpu->gi[i])->size);
    return mask;
}

static bool too_many(const struct gpu *gpu, const struct gi_profile *profile)
{
    unsigned same = 0, media = 0;
    for (unsigned i = 0; i < FAKE_NODES; i++) {
        if (!gpu->gi[i].present)
            continue;
        same += profile_of(gpu, &gpu->gi[i]) == profile;
        media += profile_of(gpu, &gpu->gi[i])->media;
    }
    return same >= profile->most || (profile->media && media > 0);
}

static bool may_start(const struct gi_profile *profile, unsigned start)
{
    for (unsigned i = 0; i < profile->start_count; i++)
        if (profile->starts[i] == start)
            return true;
    return false;
}

nvmlReturn_t check_placement(const struct gpu *gpu, const struct gi_profile *profile, unsigned start)
{
    if (!may_start(profile, start))
        return NVML_ERROR_INVALID_ARGUMENT;
    if (too_many(gpu, profile) || taken(gpu) & bits(start, profile->size))
        return NVML_ERROR_INSUFFICIENT_RESOURCES;
    return NVML_SUCCESS;
}

/* How many placements, of any profile, are possible now and no longer with `extra` slices taken. */
static unsigned spoiled(const struct gpu *gpu, unsigned extra)
{
    const struct gpu_model *model = model_of(gpu);
    unsigned now = taken(gpu), count = 0;
    for (unsigned i = 0; i < model->profile_count; i++)
        for (unsigned j = 0; j < model->profiles[i].start_count; j++) {
            unsigned mask = bits(model->profiles[i].starts[j], model->profiles[i].size);
            count += (mask & now) == 0 && (mask & extra) != 0;
        }
    return count;
}

nvmlReturn_t choose_start(const struct gpu *gpu, const struct gi_profile *profile, unsigned *start)
{
    unsigned least = ~0u;
    if (too_many(gpu, profile))
        return NVML_ERROR_INSUFFICIENT_RESOURCES;
    for (unsigned i = 0; i < profile->start_count; i++) {
        unsigned mask = bits(profile->starts[i], profile->size);
        if (taken(gpu) & mask)
            continue;
        unsigned cost = spoiled(gpu, mask);
        if (cost < least) {
            least = cost;
            *start = profile->starts[i];
        }
    }
    return least == ~0u ? NVML_ERROR_INSUFFICIENT_RESOURCES : NVML_SUCCESS;
}

unsigned room_for(const struct gpu *gpu, const struct gi_profile *profile)
{
    if (too_many(gpu, profile))
        return 0;
    unsigned free = 0, same = 0;
    for (unsigned i = 0; i < profile->start_count; i++)
        free += (taken(gpu) & bits(profile->starts[i], profile->size)) == 0;
    for (unsigned i = 0; i < FAKE_NODES; i++)
        same += gpu->gi[i].present && profile_of(gpu, &gpu->gi[i]) == profile;
    return free < profile->most - same ? free : profile->most - same;
}

struct gpu_instance *place_instance(struct fake_state *state, struct gpu *gpu, const struct gi_profile *profile,
                                    unsigned start)
{
    struct gpu_instance *gi = &gpu->gi[node_of(model_of(gpu), start, profile->size)];
    *gi = (struct gpu_instance){.generation = next_generation(state),
                                .profile = (uint32_t)(profile - model_of(gpu)->profiles),
                                .start = start};
    gi->present = 1;
    post_event(state, (unsigned)(gpu - state->gpus), EVENT_MIG_CONFIG, 0, NO_INSTANCE, NO_INSTANCE);
    return gi;
}

/* Which widths a GI offers is a list of the driver's, not a rule: a 4-slice GI has no 3c, a 7-slice one no 5c or 6c. */
unsigned ci_slices(const struct gi_profile *profile, unsigned enumerator)
{
    static const unsigned slices[CI_PROFILE_ENUMERATORS] = {1, 2, 3, 4, 7, 8, 6, 1, 7};
    if (enumerator >= CI_PROFILE_ENUMERATORS)
        return 0;
    if (enumerator == 0 || enumerator == CI_PROFILE_REV1)
        return 1;
    if (enumerator > 4 || slices[enumerator] > profile->compute)
        return 0;
    if (slices[enumerator] == profile->compute)
        return slices[enumerator];
    if (slices[enumerator] == 3 && profile->compute == 4)
        return 0;
    return slices[enumerator];
}

unsigned ci_multiprocessors(const struct gpu_model *model, const struct gi_profile *profile, unsigned enumerator)
{
    unsigned slices = ci_slices(profile, enumerator);
    return slices == profile->compute ? profile->multiprocessors : slices * model->multiprocessors_per_slice;
}

unsigned ci_most(const struct gi_profile *profile, unsigned enumerator)
{
    unsigned slices = ci_slices(profile, enumerator);
    if (slices == 0)
        return 0;
    return enumerator == CI_PROFILE_REV1 ? 1 : profile->compute / slices;
}

bool ci_start_allowed(const struct gi_profile *profile, unsigned enumerator, unsigned start)
{
    unsigned slices = ci_slices(profile, enumerator), stride = slices == 3 ? 4 : slices;
    return slices > 0 && start % stride == 0 && start + slices <= profile->compute;
}

bool ci_start_free(const struct gpu_instance *gi, unsigned start, unsigned size)
{
    for (unsigned i = 0; i < FAKE_CIS; i++) {
        const struct compute_instance *ci = &gi->ci[i];
        if (ci->present && start < ci->start + ci->size && ci->start < start + size)
            return false;
    }
    return true;
}

static uint32_t free_mig_index(const struct gpu *gpu)
{
    for (uint32_t index = 0;; index++) {
        bool used = false;
        for (unsigned i = 0; i < FAKE_NODES * FAKE_CIS && !used; i++) {
            const struct gpu_instance *gi = &gpu->gi[i / FAKE_CIS];
            used = gi->present && gi->ci[i % FAKE_CIS].present && gi->ci[i % FAKE_CIS].mig_index == index;
        }
        if (!used)
            return index;
    }
}

struct compute_instance *place_compute(struct fake_state *state, struct gpu *gpu, struct gpu_instance *gi,
                                       unsigned enumerator, unsigned start)
{
    const struct gi_profile *profile = profile_of(gpu, gi);
    for (unsigned i = 0; i < FAKE_CIS; i++) {
        struct compute_instance *ci = &gi->ci[i];
        if (ci->present)
            continue;
        *ci = (struct compute_instance){.generation = next_generation(state),
                                        .enumerator = enumerator,
                                        .start = start,
                                        .size = ci_slices(profile, enumerator),
                                        .mig_index = free_mig_index(gpu)};
        /* Fresh with every creation, unless the test wants the other behaviour that is reported. */
        uint64_t salt = (uint64_t)(gpu - state->gpus) << 48 | (uint64_t)(gi - gpu->gi) << 40 | (uint64_t)i << 32;
        if (!state->stable_mig_uuids)
            salt |= ++state->uuids_made;
        make_uuid(state->seed, salt | 1ULL << 63, "MIG", ci->uuid);
        ci->present = 1;
        post_event(state, (unsigned)(gpu - state->gpus), EVENT_MIG_CONFIG, 0, NO_INSTANCE, NO_INSTANCE);
        return ci;
    }
    return NULL;
}

static void forget_users(struct fake_state *state, const struct gpu *gpu)
{
    for (unsigned i = 0; i < FAKE_PROCESSES; i++)
        if (state->processes[i].present && state->processes[i].gpu == (unsigned)(gpu - state->gpus))
            state->processes[i].present = 0;
    memset(state->gpus[gpu - state->gpus].gi, 0, sizeof gpu->gi);
}

void set_mig_mode(struct fake_state *state, struct gpu *gpu, int64_t mode)
{
    bool changed = gpu->mig_current != mode;
    gpu->mig_current = gpu->mig_pending = mode;
    if (!changed)
        return;
    if (state->minor_moves_with_mig)
        gpu->minor += mode ? FAKE_GPUS : -(int64_t)FAKE_GPUS;
    post_event(state, (unsigned)(gpu - state->gpus), EVENT_MIG_CONFIG, 0, NO_INSTANCE, NO_INSTANCE);
}

void reset_gpu(struct fake_state *state, struct gpu *gpu)
{
    books_advance(state, gpu);
    forget_users(state, gpu);
    set_mig_mode(state, gpu, gpu->mig_pending);
    gpu->ecc[0][0] = gpu->ecc[1][0] = 0;
    gpu->remap_pending = gpu->recovery_action = 0;
    gpu->lost = 0;
    state_changed(state);
}

void reboot_gpu(struct fake_state *state, struct gpu *gpu)
{
    if (model_of(gpu)->mig != MIG_BY_RESET)
        gpu->mig_pending = 0;
    gpu->removed = 0;
    reset_gpu(state, gpu);
    gpu->compute_mode = gpu->persistence = gpu->timeslice = 0;
    gpu->energy_nj = gpu->busy = 0;
    gpu->generation = next_generation(state);
}
