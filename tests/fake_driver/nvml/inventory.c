/* NVML: what cards there are and what they are called. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <strings.h>
#include <unistd.h>

#include "books.h"
#include "session.h"

EXPORT nvmlReturn_t nvmlSystemGetDriverVersion(char *version, unsigned length)
{
    CALL(NULL);
    RETURN(give_text(version, length, the_state->driver_version));
}

EXPORT nvmlReturn_t nvmlSystemGetNVMLVersion(char *version, unsigned length)
{
    CALL(NULL);
    RETURN(give_text(version, length, the_state->nvml_version));
}

EXPORT nvmlReturn_t nvmlSystemGetCudaDriverVersion(int *version)
{
    CALL(NULL);
    REQUIRE(version != NULL, NVML_ERROR_INVALID_ARGUMENT);
    *version = (int)the_state->cuda_version;
    RETURN(NVML_SUCCESS);
}

EXPORT nvmlReturn_t nvmlSystemGetCudaDriverVersion_v2(int *version)
{
    CALL(NULL);
    REQUIRE(version != NULL, NVML_ERROR_INVALID_ARGUMENT);
    *version = (int)the_state->cuda_version;
    RETURN(NVML_SUCCESS);
}

EXPORT nvmlReturn_t nvmlSystemGetProcessName(unsigned pid, char *name, unsigned length)
{
    CALL(NULL);
    REQUIRE(name != NULL && length > 0, NVML_ERROR_INVALID_ARGUMENT);
    char path[32];
    snprintf(path, sizeof path, "/proc/%u/cmdline", pid);
    int file = open(path, O_RDONLY | O_CLOEXEC);
    REQUIRE(file >= 0, NVML_ERROR_NOT_FOUND);
    ssize_t got = read(file, name, length - 1);
    close(file);
    name[got > 0 ? got : 0] = 0;
    RETURN(NVML_SUCCESS);
}

EXPORT nvmlReturn_t nvmlDeviceGetCount_v2(unsigned *count)
{
    CALL(NULL);
    REQUIRE(count != NULL, NVML_ERROR_INVALID_ARGUMENT);
    *count = session_count();
    RETURN(NVML_SUCCESS);
}

/* A card that came back since Init is another one to this session: it stays lost until Shutdown and Init. */
static nvmlReturn_t give_card(struct gpu *gpu, nvmlDevice_t *device)
{
    struct place place;
    nvmlReturn_t result = find_device(device_handle(gpu), &place);
    if (result != NVML_SUCCESS)
        return gpu->removed ? NVML_ERROR_NOT_FOUND : NVML_ERROR_GPU_IS_LOST;
    *device = device_handle(gpu);
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlDeviceGetHandleByIndex_v2(unsigned index, nvmlDevice_t *device)
{
    CALL(NULL);
    REQUIRE(device != NULL && index < session_count(), NVML_ERROR_INVALID_ARGUMENT);
    RETURN(give_card(session_gpu(index), device));
}

EXPORT nvmlReturn_t nvmlDeviceGetHandleByUUID(const char *uuid, nvmlDevice_t *device)
{
    CALL(NULL);
    REQUIRE(uuid != NULL && device != NULL, NVML_ERROR_INVALID_ARGUMENT);
    for (unsigned i = 0; i < session_count(); i++) {
        struct gpu *gpu = session_gpu(i);
        if (strcmp(gpu->uuid, uuid) == 0)
            RETURN(give_card(gpu, device));
        for (unsigned j = 0; j < FAKE_NODES * FAKE_CIS; j++) {
            struct gpu_instance *gi = &gpu->gi[j / FAKE_CIS];
            struct compute_instance *ci = &gi->ci[j % FAKE_CIS];
            if (!gi->present || !ci->present || strcmp(ci->uuid, uuid) != 0)
                continue;
            TRY(give_card(gpu, device));
            *device = mig_handle(gpu, gi, ci);
            RETURN(NVML_SUCCESS);
        }
    }
    RETURN(NVML_ERROR_NOT_FOUND);
}

static void pci_name(const struct gpu *gpu, const char *format, char *out, size_t length)
{
    snprintf(out, length, format, 0u, gpu->pci_bus, 0u);
}

EXPORT nvmlReturn_t nvmlDeviceGetHandleByPciBusId_v2(const char *bus_id, nvmlDevice_t *device)
{
    CALL(NULL);
    REQUIRE(bus_id != NULL && device != NULL, NVML_ERROR_INVALID_ARGUMENT);
    for (unsigned i = 0; i < session_count(); i++) {
        char longer[32], shorter[32];
        pci_name(session_gpu(i), "%08X:%02X:%02X.0", longer, sizeof longer);
        pci_name(session_gpu(i), "%04X:%02X:%02X.0", shorter, sizeof shorter);
        if (strcasecmp(bus_id, longer) == 0 || strcasecmp(bus_id, shorter) == 0)
            RETURN(give_card(session_gpu(i), device));
    }
    RETURN(NVML_ERROR_NOT_FOUND);
}

EXPORT nvmlReturn_t nvmlDeviceGetHandleBySerial(const char *serial, nvmlDevice_t *device)
{
    CALL(NULL);
    REQUIRE(serial != NULL && device != NULL, NVML_ERROR_INVALID_ARGUMENT);
    for (unsigned i = 0; i < session_count(); i++)
        if (strcmp(session_gpu(i)->serial, serial) == 0)
            RETURN(give_card(session_gpu(i), device));
    RETURN(NVML_ERROR_NOT_FOUND);
}

/* "MIG 1g.10gb", and "MIG 1c.3g.40gb" where the CI does not span its GI. */
static void mig_name(const struct place *place, char *out, size_t length)
{
    const struct gi_profile *profile = profile_of(place->gpu, place->gi);
    const char *card = model_of(place->gpu)->driver_name;
    if (place->ci->size == profile->compute)
        snprintf(out, length, "%s MIG %s", card, profile->name);
    else
        snprintf(out, length, "%s MIG %uc.%s", card, place->ci->size, profile->name);
}

EXPORT nvmlReturn_t nvmlDeviceGetName(nvmlDevice_t device, char *name, unsigned length)
{
    CALL(device);
    struct place place;
    TRY(find_device(device, &place));
    char text[2 * TEXT];
    if (place.gi != NULL)
        mig_name(&place, text, sizeof text);
    else
        snprintf(text, sizeof text, "%s", model_of(place.gpu)->driver_name);
    RETURN(give_text(name, length, text));
}

EXPORT nvmlReturn_t nvmlDeviceGetUUID(nvmlDevice_t device, char *uuid, unsigned length)
{
    CALL(device);
    struct place place;
    TRY(find_device(device, &place));
    RETURN(give_text(uuid, length, place.ci != NULL ? place.ci->uuid : place.gpu->uuid));
}

EXPORT nvmlReturn_t nvmlDeviceGetSerial(nvmlDevice_t device, char *serial, unsigned length)
{
    CALL(device);
    struct place place;
    TRY(find_card(device, &place, NVML_ERROR_NOT_SUPPORTED));
    RETURN(give_text(serial, length, place.gpu->serial));
}

EXPORT nvmlReturn_t nvmlDeviceGetVbiosVersion(nvmlDevice_t device, char *version, unsigned length)
{
    CALL(device);
    struct place place;
    TRY(find_card(device, &place, NVML_ERROR_NOT_SUPPORTED));
    RETURN(give_text(version, length, "96.00.99.00.01"));
}

EXPORT nvmlReturn_t nvmlDeviceGetMinorNumber(nvmlDevice_t device, unsigned *minor)
{
    CALL(device);
    struct place place;
    TRY(find_card(device, &place, NVML_ERROR_NOT_SUPPORTED));
    REQUIRE(minor != NULL, NVML_ERROR_INVALID_ARGUMENT);
    *minor = (unsigned)place.gpu->minor;
    RETURN(NVML_SUCCESS);
}

EXPORT nvmlReturn_t nvmlDeviceGetIndex(nvmlDevice_t device, unsigned *index)
{
    CALL(device);
    struct place place;
    TRY(find_device(device, &place));
    REQUIRE(index != NULL, NVML_ERROR_INVALID_ARGUMENT);
    *index = place.ci != NULL ? place.ci->mig_index : (unsigned)session_index(place.gpu);
    RETURN(NVML_SUCCESS);
}

EXPORT nvmlReturn_t nvmlDeviceGetPciInfo_v3(nvmlDevice_t device, nvmlPciInfo_t *info)
{
    CALL(device);
    struct place place;
    TRY(find_device(device, &place));
    REQUIRE(info != NULL, NVML_ERROR_INVALID_ARGUMENT);
    memset(info, 0, sizeof *info);
    info->bus = place.gpu->pci_bus;
    info->pciDeviceId = model_of(place.gpu)->pci_device_id;
    pci_name(place.gpu, "%04X:%02X:%02X.0", info->busIdLegacy, sizeof info->busIdLegacy);
    pci_name(place.gpu, "%08X:%02X:%02X.0", info->busId, sizeof info->busId);
    RETURN(NVML_SUCCESS);
}

EXPORT nvmlReturn_t nvmlDeviceGetCudaComputeCapability(nvmlDevice_t device, int *major, int *minor)
{
    CALL(device);
    struct place place;
    TRY(find_device(device, &place));
    REQUIRE(major != NULL && minor != NULL, NVML_ERROR_INVALID_ARGUMENT);
    *major = (int)model_of(place.gpu)->capability_major;
    *minor = (int)model_of(place.gpu)->capability_minor;
    RETURN(NVML_SUCCESS);
}

EXPORT nvmlReturn_t nvmlDeviceGetArchitecture(nvmlDevice_t device, unsigned *architecture)
{
    CALL(device);
    struct place place;
    TRY(find_device(device, &place));
    REQUIRE(architecture != NULL, NVML_ERROR_INVALID_ARGUMENT);
    *architecture = model_of(place.gpu)->architecture;
    RETURN(NVML_SUCCESS);
}

EXPORT nvmlReturn_t nvmlDeviceGetNumaNodeId(nvmlDevice_t device, unsigned *node)
{
    CALL(device);
    struct place place;
    TRY(find_card(device, &place, NVML_ERROR_NOT_SUPPORTED));
    REQUIRE(node != NULL, NVML_ERROR_INVALID_ARGUMENT);
    /* Not the node that the card is plugged into: the one that its memory is, on hosts where it is one. */
    REQUIRE(place.gpu->memory_numa_node >= 0, NVML_ERROR_NOT_SUPPORTED);
    *node = (unsigned)place.gpu->memory_numa_node;
    RETURN(NVML_SUCCESS);
}

EXPORT nvmlReturn_t nvmlDeviceGetMemoryAffinity(nvmlDevice_t device, unsigned words, unsigned long *nodes,
                                                unsigned scope)
{
    CALL(device);
    struct place place;
    TRY(find_card(device, &place, NVML_ERROR_NOT_SUPPORTED));
    REQUIRE(words > 0 && nodes != NULL && scope <= 1, NVML_ERROR_INVALID_ARGUMENT);
    REQUIRE(place.gpu->numa_node >= 0, NVML_ERROR_NOT_SUPPORTED);
    memset(nodes, 0, words * sizeof *nodes);
    nodes[0] = 1ul << place.gpu->numa_node;
    RETURN(NVML_SUCCESS);
}

EXPORT nvmlReturn_t nvmlDeviceGetVirtualizationMode(nvmlDevice_t device, unsigned *mode)
{
    CALL(device);
    struct place place;
    TRY(find_device(device, &place));
    REQUIRE(mode != NULL, NVML_ERROR_INVALID_ARGUMENT);
    *mode = (unsigned)place.gpu->virtualization;
    RETURN(NVML_SUCCESS);
}

EXPORT nvmlReturn_t nvmlDeviceGetHostVgpuMode(nvmlDevice_t device, unsigned *mode)
{
    CALL(device);
    struct place place;
    TRY(find_card(device, &place, NVML_ERROR_NOT_SUPPORTED));
    REQUIRE(mode != NULL, NVML_ERROR_INVALID_ARGUMENT);
    REQUIRE(place.gpu->host_vgpu_mode >= 0, NVML_ERROR_NOT_SUPPORTED);
    *mode = (unsigned)place.gpu->host_vgpu_mode;
    RETURN(NVML_SUCCESS);
}

EXPORT nvmlReturn_t nvmlDeviceGetComputeMode(nvmlDevice_t device, unsigned *mode)
{
    CALL(device);
    struct place place;
    TRY(find_device(device, &place));
    REQUIRE(mode != NULL, NVML_ERROR_INVALID_ARGUMENT);
    *mode = (unsigned)(place.ci != NULL ? place.ci->compute_mode : place.gpu->compute_mode);
    RETURN(NVML_SUCCESS);
}

EXPORT nvmlReturn_t nvmlDeviceSetComputeMode(nvmlDevice_t device, unsigned mode)
{
    CALL(device);
    struct place place;
    TRY(find_device(device, &place));
    TRY(need_root());
    REQUIRE(mode == NVML_COMPUTEMODE_DEFAULT || mode == NVML_COMPUTEMODE_PROHIBITED ||
                mode == NVML_COMPUTEMODE_EXCLUSIVE_PROCESS,
            NVML_ERROR_INVALID_ARGUMENT);
    if (place.ci != NULL)
        place.ci->compute_mode = mode;
    else
        place.gpu->compute_mode = mode;
    RETURN(NVML_SUCCESS);
}

EXPORT nvmlReturn_t nvmlDeviceGetPersistenceMode(nvmlDevice_t device, unsigned *mode)
{
    CALL(device);
    struct place place;
    TRY(find_card(device, &place, NVML_ERROR_NOT_SUPPORTED));
    REQUIRE(mode != NULL, NVML_ERROR_INVALID_ARGUMENT);
    *mode = (unsigned)place.gpu->persistence;
    RETURN(NVML_SUCCESS);
}

EXPORT nvmlReturn_t nvmlDeviceSetPersistenceMode(nvmlDevice_t device, unsigned mode)
{
    CALL(device);
    struct place place;
    TRY(find_card(device, &place, NVML_ERROR_NOT_SUPPORTED));
    TRY(need_root());
    REQUIRE(mode <= 1, NVML_ERROR_INVALID_ARGUMENT);
    place.gpu->persistence = mode;
    RETURN(NVML_SUCCESS);
}

/* Takes a card out of the driver's hands, as before giving it to a virtual machine. */
EXPORT nvmlReturn_t nvmlDeviceRemoveGpu(nvmlPciInfo_t *info)
{
    CALL(NULL);
    TRY(need_root());
    REQUIRE(info != NULL, NVML_ERROR_INVALID_ARGUMENT);
    for (unsigned i = 0; i < session_count(); i++) {
        struct gpu *gpu = session_gpu(i);
        if (gpu->pci_bus != info->bus || gpu->removed)
            continue;
        books_reap(the_state);
        REQUIRE(!anybody_on(the_state, (unsigned)(gpu - the_state->gpus), NO_INSTANCE, NO_INSTANCE),
                NVML_ERROR_IN_USE);
        gpu->removed = 1;
        state_changed(the_state);
        RETURN(NVML_SUCCESS);
    }
    RETURN(NVML_ERROR_NOT_FOUND);
}
