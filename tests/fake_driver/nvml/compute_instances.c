/* NVML: compute instances within a GPU instance. */
#include <stdio.h>
#include <string.h>

#include "books.h"
#include "geometry.h"
#include "session.h"

/* CI profile ids are their enumerators. The media-extension revision of 1c is offered by every GI, but only made in one
 * that has the extensions: picking a CI by its slice count alone finds two that look right. */
static nvmlReturn_t find_profile(nvmlGpuInstance_t instance, unsigned enumerator, unsigned engines,
                                 struct place *place, const struct gi_profile **profile)
{
    nvmlReturn_t result = find_gi(instance, place);
    if (result != NVML_SUCCESS)
        return result;
    *profile = profile_of(place->gpu, place->gi);
    if (enumerator >= CI_PROFILE_ENUMERATORS || engines != 0)
        return NVML_ERROR_INVALID_ARGUMENT;
    return ci_slices(*profile, enumerator) > 0 ? NVML_SUCCESS : NVML_ERROR_NOT_SUPPORTED;
}

EXPORT nvmlReturn_t nvmlGpuInstanceGetComputeInstanceProfileInfo(nvmlGpuInstance_t instance, unsigned enumerator,
                                                                 unsigned engines,
                                                                 nvmlComputeInstanceProfileInfo_t *info)
{
    CALL(instance);
    struct place place;
    const struct gi_profile *profile;
    TRY(find_profile(instance, enumerator, engines, &place, &profile));
    REQUIRE(info != NULL, NVML_ERROR_INVALID_ARGUMENT);
    *info = (nvmlComputeInstanceProfileInfo_t){
        .id = enumerator,
        .sliceCount = ci_slices(profile, enumerator),
        .instanceCount = ci_most(profile, enumerator),
        .multiprocessorCount = ci_multiprocessors(model_of(place.gpu), profile, enumerator),
        .sharedCopyEngineCount = profile->copy_engines,
        .sharedDecoderCount = profile->decoders,
        .sharedEncoderCount = profile->encoders,
        .sharedJpegCount = profile->jpegs,
        .sharedOfaCount = profile->ofas,
    };
    RETURN(NVML_SUCCESS);
}

static void name_profile(const struct gi_profile *profile, unsigned enumerator, char *out, size_t length)
{
    unsigned slices = ci_slices(profile, enumerator);
    char gi[64];
    snprintf(gi, sizeof gi, "%s", profile->name);
    if (slices == profile->compute && enumerator != CI_PROFILE_REV1)
        snprintf(out, length, "MIG %s", gi);
    else
        snprintf(out, length, "MIG %uc.%s%s", slices, gi,
                 enumerator == CI_PROFILE_REV1 && strchr(gi, '+') == NULL ? "+me" : "");
}

EXPORT nvmlReturn_t nvmlGpuInstanceGetComputeInstanceProfileInfoV(nvmlGpuInstance_t instance, unsigned enumerator,
                                                                  unsigned engines,
                                                                  nvmlComputeInstanceProfileInfo_v2_t *info)
{
    CALL(instance);
    struct place place;
    const struct gi_profile *profile;
    TRY(find_profile(instance, enumerator, engines, &place, &profile));
    REQUIRE(info != NULL, NVML_ERROR_INVALID_ARGUMENT);
    unsigned version = info->version;
    bool third = version == STRUCT_VERSION(sizeof(nvmlComputeInstanceProfileInfo_v3_t), 3);
    REQUIRE(third || version == STRUCT_VERSION(sizeof *info, 2), NVML_ERROR_ARGUMENT_VERSION_MISMATCH);
    *info = (nvmlComputeInstanceProfileInfo_v2_t){
        .version = version,
        .id = enumerator,
        .sliceCount = ci_slices(profile, enumerator),
        .instanceCount = ci_most(profile, enumerator),
        .multiprocessorCount = ci_multiprocessors(model_of(place.gpu), profile, enumerator),
        .sharedCopyEngineCount = profile->copy_engines,
        .sharedDecoderCount = profile->decoders,
        .sharedEncoderCount = profile->encoders,
        .sharedJpegCount = profile->jpegs,
        .sharedOfaCount = profile->ofas,
    };
    name_profile(profile, enumerator, info->name, sizeof info->name);
    if (third)
        ((nvmlComputeInstanceProfileInfo_v3_t *)info)->capabilities = 0;
    RETURN(NVML_SUCCESS);
}

/* How many more of the profile fit, and the lowest start for one. */
static unsigned room_in(const struct place *place, const struct gi_profile *profile, unsigned enumerator,
                        unsigned *first)
{
    unsigned slices = ci_slices(profile, enumerator), room = 0, same = 0;
    for (unsigned i = 0; i < FAKE_CIS; i++)
        same += place->gi->ci[i].present && place->gi->ci[i].enumerator == enumerator;
    for (unsigned start = profile->compute; start-- > 0;)
        if (ci_start_allowed(profile, enumerator, start) && ci_start_free(place->gi, start, slices)) {
            room++;
            *first = start;
        }
    unsigned most = ci_most(profile, enumerator) - same;
    return room < most ? room : most;
}

EXPORT nvmlReturn_t nvmlGpuInstanceGetComputeInstanceRemainingCapacity(nvmlGpuInstance_t instance, unsigned id,
                                                                       unsigned *count)
{
    CALL(instance);
    struct place place;
    const struct gi_profile *profile;
    unsigned first;
    TRY(find_profile(instance, id, 0, &place, &profile));
    TRY(need_mig_config());
    REQUIRE(count != NULL, NVML_ERROR_INVALID_ARGUMENT);
    *count = room_in(&place, profile, id, &first);
    RETURN(NVML_SUCCESS);
}

EXPORT nvmlReturn_t nvmlGpuInstanceGetComputeInstancePossiblePlacements(nvmlGpuInstance_t instance, unsigned id,
                                                                        nvmlPlacement_t *placements, unsigned *count)
{
    CALL(instance);
    struct place place;
    const struct gi_profile *profile;
    TRY(find_profile(instance, id, 0, &place, &profile));
    TRY(need_mig_config());
    REQUIRE(count != NULL, NVML_ERROR_INVALID_ARGUMENT);
    unsigned room = placements != NULL ? *count : 0, found = 0;
    for (unsigned start = 0; start < profile->compute; start++) {
        if (!ci_start_allowed(profile, id, start))
            continue;
        if (found < room)
            placements[found] = (nvmlPlacement_t){.start = start, .size = ci_slices(profile, id)};
        found++;
    }
    *count = found;
    RETURN(placements != NULL && found > room ? NVML_ERROR_INSUFFICIENT_SIZE : NVML_SUCCESS);
}

static nvmlReturn_t create(struct place *place, const struct gi_profile *profile, unsigned enumerator, unsigned start,
                           nvmlComputeInstance_t *instance)
{
    if (enumerator == CI_PROFILE_REV1 && profile->ofas == 0)
        return NVML_ERROR_NOT_SUPPORTED;
    if (!ci_start_allowed(profile, enumerator, start))
        return NVML_ERROR_INVALID_ARGUMENT;
    if (!ci_start_free(place->gi, start, ci_slices(profile, enumerator)))
        return NVML_ERROR_INSUFFICIENT_RESOURCES;
    const struct compute_instance *ci = place_compute(the_state, place->gpu, place->gi, enumerator, start);
    if (ci == NULL)
        return NVML_ERROR_INSUFFICIENT_RESOURCES;
    *instance = ci_handle(place->gpu, place->gi, ci);
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlGpuInstanceCreateComputeInstance(nvmlGpuInstance_t gi, unsigned id,
                                                         nvmlComputeInstance_t *instance)
{
    CALL(gi);
    struct place place;
    const struct gi_profile *profile;
    unsigned start = 0;
    TRY(find_profile(gi, id, 0, &place, &profile));
    TRY(need_mig_config());
    REQUIRE(instance != NULL, NVML_ERROR_INVALID_ARGUMENT);
    REQUIRE(room_in(&place, profile, id, &start) > 0, NVML_ERROR_INSUFFICIENT_RESOURCES);
    RETURN(create(&place, profile, id, start, instance));
}

EXPORT nvmlReturn_t nvmlGpuInstanceCreateComputeInstanceWithPlacement(nvmlGpuInstance_t gi, unsigned id,
                                                                      const nvmlPlacement_t *placement,
                                                                      nvmlComputeInstance_t *instance)
{
    CALL(gi);
    struct place place;
    const struct gi_profile *profile;
    TRY(find_profile(gi, id, 0, &place, &profile));
    TRY(need_mig_config());
    REQUIRE(instance != NULL && placement != NULL, NVML_ERROR_INVALID_ARGUMENT);
    REQUIRE(placement->size == ci_slices(profile, id), NVML_ERROR_INVALID_ARGUMENT);
    RETURN(create(&place, profile, id, placement->start, instance));
}

EXPORT nvmlReturn_t nvmlComputeInstanceDestroy(nvmlComputeInstance_t instance)
{
    CALL(instance);
    struct place place;
    TRY(find_ci(instance, &place));
    TRY(need_mig_config());
    books_reap(the_state);
    REQUIRE(!anybody_on(the_state, place.number, place.gi_id, place.ci_id), NVML_ERROR_IN_USE);
    place.ci->present = 0;
    post_event(the_state, place.number, EVENT_MIG_CONFIG, 0, NO_INSTANCE, NO_INSTANCE);
    RETURN(NVML_SUCCESS);
}

EXPORT nvmlReturn_t nvmlGpuInstanceGetComputeInstances(nvmlGpuInstance_t gi, unsigned id,
                                                       nvmlComputeInstance_t *instances, unsigned *count)
{
    CALL(gi);
    struct place place;
    const struct gi_profile *profile;
    TRY(find_profile(gi, id, 0, &place, &profile));
    TRY(need_mig_config());
    REQUIRE(instances != NULL && count != NULL, NVML_ERROR_INVALID_ARGUMENT);
    *count = 0;
    for (unsigned i = 0; i < FAKE_CIS; i++)
        if (place.gi->ci[i].present && place.gi->ci[i].enumerator == id)
            instances[(*count)++] = ci_handle(place.gpu, place.gi, &place.gi->ci[i]);
    RETURN(NVML_SUCCESS);
}

EXPORT nvmlReturn_t nvmlGpuInstanceGetComputeInstanceById(nvmlGpuInstance_t gi, unsigned id,
                                                          nvmlComputeInstance_t *instance)
{
    CALL(gi);
    struct place place;
    TRY(find_gi(gi, &place));
    TRY(need_mig_config());
    REQUIRE(instance != NULL, NVML_ERROR_INVALID_ARGUMENT);
    REQUIRE(id < FAKE_CIS && place.gi->ci[id].present, NVML_ERROR_NOT_FOUND);
    *instance = ci_handle(place.gpu, place.gi, &place.gi->ci[id]);
    RETURN(NVML_SUCCESS);
}

EXPORT nvmlReturn_t nvmlComputeInstanceGetInfo_v2(nvmlComputeInstance_t instance, nvmlComputeInstanceInfo_t *info)
{
    CALL(instance);
    struct place place;
    TRY(find_ci(instance, &place));
    REQUIRE(info != NULL, NVML_ERROR_INVALID_ARGUMENT);
    /* `device` is the MIG device's handle, not the card's. */
    *info = (nvmlComputeInstanceInfo_t){.device = mig_handle(place.gpu, place.gi, place.ci),
                                        .gpuInstance = gi_handle(place.gpu, place.gi),
                                        .id = place.ci_id,
                                        .profileId = place.ci->enumerator,
                                        .placement = {.start = place.ci->start, .size = place.ci->size}};
    RETURN(NVML_SUCCESS);
}
