/* NVML: GPU instances: profiles, placements, creation and destruction. */
#include <stdio.h>

#include "books.h"
#include "geometry.h"
#include "session.h"

static nvmlReturn_t find_capable(nvmlDevice_t device, struct place *place, bool switched_on)
{
    nvmlReturn_t result = find_card(device, place, NVML_ERROR_INVALID_ARGUMENT);
    if (result != NVML_SUCCESS)
        return result;
    if (model_of(place->gpu)->mig == MIG_NEVER || (switched_on && !place->gpu->mig_current))
        return NVML_ERROR_NOT_SUPPORTED;
    return NVML_SUCCESS;
}

/* Enumerators beyond the newest header are invalid; those that the card lacks are not supported. */
static nvmlReturn_t profile_by_enumerator(const struct place *place, unsigned enumerator,
                                          const struct gi_profile **found)
{
    const struct gpu_model *model = model_of(place->gpu);
    for (unsigned i = 0; i < model->profile_count; i++)
        if (model->profiles[i].enumerator == enumerator) {
            *found = &model->profiles[i];
            return NVML_SUCCESS;
        }
    return enumerator < GI_PROFILE_ENUMERATORS ? NVML_ERROR_NOT_SUPPORTED : NVML_ERROR_INVALID_ARGUMENT;
}

static nvmlReturn_t profile_by_id(const struct place *place, unsigned id, const struct gi_profile **found)
{
    const struct gpu_model *model = model_of(place->gpu);
    for (unsigned i = 0; i < model->profile_count; i++)
        if (model->profiles[i].id == id) {
            *found = &model->profiles[i];
            return NVML_SUCCESS;
        }
    return NVML_ERROR_INVALID_ARGUMENT;
}

EXPORT nvmlReturn_t nvmlDeviceGetGpuInstanceProfileInfo(nvmlDevice_t device, unsigned enumerator,
                                                        nvmlGpuInstanceProfileInfo_t *info)
{
    CALL(device);
    struct place place;
    const struct gi_profile *profile;
    TRY(find_capable(device, &place, false));
    REQUIRE(info != NULL, NVML_ERROR_INVALID_ARGUMENT);
    TRY(profile_by_enumerator(&place, enumerator, &profile));
    *info = (nvmlGpuInstanceProfileInfo_t){.id = profile->id,
                                           .sliceCount = profile->compute,
                                           .instanceCount = profile->most,
                                           .multiprocessorCount = profile->multiprocessors,
                                           .copyEngineCount = profile->copy_engines,
                                           .decoderCount = profile->decoders,
                                           .encoderCount = profile->encoders,
                                           .jpegCount = profile->jpegs,
                                           .ofaCount = profile->ofas,
                                           .memorySizeMB = profile->memory_mib};
    RETURN(NVML_SUCCESS);
}

static nvmlReturn_t fill_v2(const struct gi_profile *profile, nvmlGpuInstanceProfileInfo_v2_t *info)
{
    unsigned version = info->version;
    if (version != STRUCT_VERSION(sizeof *info, 2) && version != STRUCT_VERSION(sizeof *info, 3))
        return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    *info = (nvmlGpuInstanceProfileInfo_v2_t){.version = version,
                                              .id = profile->id,
                                              .sliceCount = profile->compute,
                                              .instanceCount = profile->most,
                                              .multiprocessorCount = profile->multiprocessors,
                                              .copyEngineCount = profile->copy_engines,
                                              .decoderCount = profile->decoders,
                                              .encoderCount = profile->encoders,
                                              .jpegCount = profile->jpegs,
                                              .ofaCount = profile->ofas,
                                              .memorySizeMB = profile->memory_mib};
    snprintf(info->name, sizeof info->name, "MIG %s", profile->name);
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlDeviceGetGpuInstanceProfileInfoV(nvmlDevice_t device, unsigned enumerator,
                                                         nvmlGpuInstanceProfileInfo_v2_t *info)
{
    CALL(device);
    struct place place;
    const struct gi_profile *profile;
    TRY(find_capable(device, &place, false));
    REQUIRE(info != NULL, NVML_ERROR_INVALID_ARGUMENT);
    TRY(profile_by_enumerator(&place, enumerator, &profile));
    RETURN(fill_v2(profile, info));
}

EXPORT nvmlReturn_t nvmlDeviceGetGpuInstanceProfileInfoByIdV(nvmlDevice_t device, unsigned id,
                                                             nvmlGpuInstanceProfileInfo_v2_t *info)
{
    CALL(device);
    struct place place;
    const struct gi_profile *profile;
    TRY(find_capable(device, &place, false));
    REQUIRE(info != NULL, NVML_ERROR_INVALID_ARGUMENT);
    TRY(profile_by_id(&place, id, &profile));
    RETURN(fill_v2(profile, info));
}

EXPORT nvmlReturn_t nvmlDeviceGetGpuInstancePossiblePlacements_v2(nvmlDevice_t device, unsigned id,
                                                                  nvmlPlacement_t *placements, unsigned *count)
{
    CALL(device);
    struct place place;
    const struct gi_profile *profile;
    TRY(find_capable(device, &place, false));
    TRY(need_mig_config());
    REQUIRE(count != NULL, NVML_ERROR_INVALID_ARGUMENT);
    TRY(profile_by_id(&place, id, &profile));
    unsigned room = *count;
    *count = profile->start_count;
    if (placements == NULL)
        RETURN(NVML_SUCCESS);
    REQUIRE(room >= profile->start_count, NVML_ERROR_INSUFFICIENT_SIZE);
    for (unsigned i = 0; i < profile->start_count; i++)
        placements[i] = (nvmlPlacement_t){.start = profile->starts[i], .size = profile->size};
    RETURN(NVML_SUCCESS);
}

EXPORT nvmlReturn_t nvmlDeviceGetGpuInstanceRemainingCapacity(nvmlDevice_t device, unsigned id, unsigned *count)
{
    CALL(device);
    struct place place;
    const struct gi_profile *profile;
    TRY(find_capable(device, &place, true));
    TRY(need_mig_config());
    REQUIRE(count != NULL, NVML_ERROR_INVALID_ARGUMENT);
    TRY(profile_by_id(&place, id, &profile));
    *count = room_for(place.gpu, profile);
    RETURN(NVML_SUCCESS);
}

EXPORT nvmlReturn_t nvmlDeviceCreateGpuInstance(nvmlDevice_t device, unsigned id, nvmlGpuInstance_t *instance)
{
    CALL(device);
    struct place place;
    const struct gi_profile *profile;
    unsigned start = 0;
    TRY(find_capable(device, &place, true));
    TRY(need_mig_config());
    REQUIRE(instance != NULL, NVML_ERROR_INVALID_ARGUMENT);
    TRY(profile_by_id(&place, id, &profile));
    TRY(choose_start(place.gpu, profile, &start));
    *instance = gi_handle(place.gpu, place_instance(the_state, place.gpu, profile, start));
    RETURN(NVML_SUCCESS);
}

EXPORT nvmlReturn_t nvmlDeviceCreateGpuInstanceWithPlacement(nvmlDevice_t device, unsigned id,
                                                             const nvmlPlacement_t *placement,
                                                             nvmlGpuInstance_t *instance)
{
    CALL(device);
    struct place place;
    const struct gi_profile *profile;
    TRY(find_capable(device, &place, true));
    TRY(need_mig_config());
    REQUIRE(instance != NULL && placement != NULL, NVML_ERROR_INVALID_ARGUMENT);
    TRY(profile_by_id(&place, id, &profile));
    REQUIRE(placement->size == profile->size, NVML_ERROR_INVALID_ARGUMENT);
    TRY(check_placement(place.gpu, profile, placement->start));
    *instance = gi_handle(place.gpu, place_instance(the_state, place.gpu, profile, placement->start));
    RETURN(NVML_SUCCESS);
}

EXPORT nvmlReturn_t nvmlGpuInstanceDestroy(nvmlGpuInstance_t instance)
{
    CALL(instance);
    struct place place;
    TRY(find_gi(instance, &place));
    TRY(need_mig_config());
    books_reap(the_state);
    for (unsigned i = 0; i < FAKE_CIS; i++)
        REQUIRE(!place.gi->ci[i].present, NVML_ERROR_IN_USE);
    REQUIRE(!anybody_on(the_state, place.number, place.gi_id, NO_INSTANCE), NVML_ERROR_IN_USE);
    place.gi->present = 0;
    post_event(the_state, place.number, EVENT_MIG_CONFIG, 0, NO_INSTANCE, NO_INSTANCE);
    RETURN(NVML_SUCCESS);
}

/* The array is the caller's, as large as ProfileInfo's instanceCount; `count` is only ever an answer. */
EXPORT nvmlReturn_t nvmlDeviceGetGpuInstances(nvmlDevice_t device, unsigned id, nvmlGpuInstance_t *instances,
                                              unsigned *count)
{
    CALL(device);
    struct place place;
    const struct gi_profile *profile;
    TRY(find_capable(device, &place, true));
    TRY(need_mig_config());
    REQUIRE(instances != NULL && count != NULL, NVML_ERROR_INVALID_ARGUMENT);
    TRY(profile_by_id(&place, id, &profile));
    *count = 0;
    for (unsigned i = 0; i < FAKE_NODES; i++)
        if (place.gpu->gi[i].present && profile_of(place.gpu, &place.gpu->gi[i]) == profile)
            instances[(*count)++] = gi_handle(place.gpu, &place.gpu->gi[i]);
    RETURN(NVML_SUCCESS);
}

EXPORT nvmlReturn_t nvmlDeviceGetGpuInstanceById(nvmlDevice_t device, unsigned id, nvmlGpuInstance_t *instance)
{
    CALL(device);
    struct place place;
    TRY(find_capable(device, &place, true));
    TRY(need_mig_config());
    REQUIRE(instance != NULL, NVML_ERROR_INVALID_ARGUMENT);
    REQUIRE(id < FAKE_NODES && place.gpu->gi[id].present, NVML_ERROR_NOT_FOUND);
    *instance = gi_handle(place.gpu, &place.gpu->gi[id]);
    RETURN(NVML_SUCCESS);
}

EXPORT nvmlReturn_t nvmlGpuInstanceGetInfo(nvmlGpuInstance_t instance, nvmlGpuInstanceInfo_t *info)
{
    CALL(instance);
    struct place place;
    TRY(find_gi(instance, &place));
    REQUIRE(info != NULL, NVML_ERROR_INVALID_ARGUMENT);
    const struct gi_profile *profile = profile_of(place.gpu, place.gi);
    *info = (nvmlGpuInstanceInfo_t){.device = device_handle(place.gpu),
                                    .id = place.gi_id,
                                    .profileId = profile->id,
                                    .placement = {.start = place.gi->start, .size = profile->size}};
    RETURN(NVML_SUCCESS);
}
