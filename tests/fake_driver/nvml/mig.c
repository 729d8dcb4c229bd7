/* NVML: MIG mode, and MIG devices as callers walk them. */
#include "books.h"
#include "geometry.h"
#include "session.h"

EXPORT nvmlReturn_t nvmlDeviceGetMigMode(nvmlDevice_t device, unsigned *current, unsigned *pending)
{
    CALL(device);
    struct place place;
    TRY(find_card(device, &place, NVML_ERROR_INVALID_ARGUMENT));
    REQUIRE(model_of(place.gpu)->mig != MIG_NEVER, NVML_ERROR_NOT_SUPPORTED);
    REQUIRE(current != NULL && pending != NULL, NVML_ERROR_INVALID_ARGUMENT);
    *current = (unsigned)place.gpu->mig_current;
    *pending = (unsigned)place.gpu->mig_pending;
    RETURN(NVML_SUCCESS);
}

/* The outcome has two halves: what the call returns, and `activation`, which says whether the mode took effect.
 *
 * Ampere resets the card, so nobody may use it; else the mode stays pending. Hopper and later switch at once.
 */
EXPORT nvmlReturn_t nvmlDeviceSetMigMode(nvmlDevice_t device, unsigned mode, nvmlReturn_t *activation)
{
    CALL(device);
    struct place place;
    TRY(find_card(device, &place, NVML_ERROR_INVALID_ARGUMENT));
    REQUIRE(mode <= 1 && activation != NULL, NVML_ERROR_INVALID_ARGUMENT);
    struct gpu *gpu = place.gpu;
    REQUIRE(model_of(gpu)->mig != MIG_NEVER, NVML_ERROR_NOT_SUPPORTED);
    TRY(need_root());
    books_reap(the_state);
    *activation = NVML_SUCCESS;
    for (unsigned i = 0; i < FAKE_NODES && mode == 0; i++)
        REQUIRE(!gpu->gi[i].present, NVML_ERROR_IN_USE);
    gpu->mig_pending = mode;
    if (gpu->mig_current == mode)
        RETURN(NVML_SUCCESS);
    bool busy = anybody_on(the_state, place.number, NO_INSTANCE, NO_INSTANCE);
    if (gpu->mig_needs_reset) {
        *activation = NVML_ERROR_RESET_REQUIRED;
    } else if (busy || (model_of(gpu)->mig == MIG_BY_RESET && gpu->mig_clients > 0)) {
        *activation = NVML_ERROR_IN_USE;
        if (model_of(gpu)->mig == MIG_AT_ONCE)
            gpu->mig_pending = gpu->mig_current;
    } else if (model_of(gpu)->mig == MIG_BY_RESET) {
        reset_gpu(the_state, gpu);
    } else {
        set_mig_mode(the_state, gpu, mode);
    }
    RETURN(NVML_SUCCESS);
}

EXPORT nvmlReturn_t nvmlDeviceGetMaxMigDeviceCount(nvmlDevice_t device, unsigned *count)
{
    CALL(device);
    struct place place;
    TRY(find_card(device, &place, NVML_ERROR_INVALID_ARGUMENT));
    REQUIRE(count != NULL, NVML_ERROR_INVALID_ARGUMENT);
    *count = place.gpu->mig_current ? model_of(place.gpu)->compute_slices : 0;
    RETURN(NVML_SUCCESS);
}

EXPORT nvmlReturn_t nvmlDeviceGetMigDeviceHandleByIndex(nvmlDevice_t device, unsigned index, nvmlDevice_t *mig)
{
    CALL(device);
    struct place place;
    TRY(find_card(device, &place, NVML_ERROR_INVALID_ARGUMENT));
    REQUIRE(mig != NULL && index < model_of(place.gpu)->compute_slices, NVML_ERROR_INVALID_ARGUMENT);
    REQUIRE(place.gpu->mig_current, NVML_ERROR_NOT_SUPPORTED);
    for (unsigned i = 0; i < FAKE_NODES * FAKE_CIS; i++) {
        const struct gpu_instance *gi = &place.gpu->gi[i / FAKE_CIS];
        const struct compute_instance *ci = &gi->ci[i % FAKE_CIS];
        if (!gi->present || !ci->present || ci->mig_index != index)
            continue;
        *mig = mig_handle(place.gpu, gi, ci);
        RETURN(NVML_SUCCESS);
    }
    RETURN(NVML_ERROR_NOT_FOUND);
}

EXPORT nvmlReturn_t nvmlDeviceIsMigDeviceHandle(nvmlDevice_t device, unsigned *is_mig)
{
    CALL(device);
    struct place place;
    TRY(find_device(device, &place));
    REQUIRE(is_mig != NULL, NVML_ERROR_INVALID_ARGUMENT);
    *is_mig = place.gi != NULL;
    RETURN(NVML_SUCCESS);
}

static nvmlReturn_t find_mig(nvmlDevice_t device, struct place *place)
{
    nvmlReturn_t result = find_device(device, place);
    return result == NVML_SUCCESS && place->gi == NULL ? NVML_ERROR_INVALID_ARGUMENT : result;
}

EXPORT nvmlReturn_t nvmlDeviceGetDeviceHandleFromMigDeviceHandle(nvmlDevice_t mig, nvmlDevice_t *device)
{
    CALL(mig);
    struct place place;
    TRY(find_mig(mig, &place));
    REQUIRE(device != NULL, NVML_ERROR_INVALID_ARGUMENT);
    *device = device_handle(place.gpu);
    RETURN(NVML_SUCCESS);
}

EXPORT nvmlReturn_t nvmlDeviceGetGpuInstanceId(nvmlDevice_t device, unsigned *id)
{
    CALL(device);
    struct place place;
    TRY(find_mig(device, &place));
    REQUIRE(id != NULL, NVML_ERROR_INVALID_ARGUMENT);
    *id = place.gi_id;
    RETURN(NVML_SUCCESS);
}

EXPORT nvmlReturn_t nvmlDeviceGetComputeInstanceId(nvmlDevice_t device, unsigned *id)
{
    CALL(device);
    struct place place;
    TRY(find_mig(device, &place));
    REQUIRE(id != NULL, NVML_ERROR_INVALID_ARGUMENT);
    *id = place.ci_id;
    RETURN(NVML_SUCCESS);
}

EXPORT nvmlReturn_t nvmlDeviceGetAttributes_v2(nvmlDevice_t device, nvmlDeviceAttributes_t *attributes)
{
    CALL(device);
    struct place place;
    TRY(find_mig(device, &place));
    REQUIRE(attributes != NULL, NVML_ERROR_INVALID_ARGUMENT);
    const struct gi_profile *profile = profile_of(place.gpu, place.gi);
    *attributes = (nvmlDeviceAttributes_t){
        .multiprocessorCount = ci_multiprocessors(model_of(place.gpu), profile, place.ci->enumerator),
        .sharedCopyEngineCount = profile->copy_engines,
        .sharedDecoderCount = profile->decoders,
        .sharedEncoderCount = profile->encoders,
        .sharedJpegCount = profile->jpegs,
        .sharedOfaCount = profile->ofas,
        .gpuInstanceSliceCount = profile->compute,
        .computeInstanceSliceCount = place.ci->size,
        .memorySizeMB = profile->memory_mib,
    };
    RETURN(NVML_SUCCESS);
}
