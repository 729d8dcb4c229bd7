/* NVML: how the cards are wired to each other. */
#include <stdio.h>
#include <string.h>

#include "session.h"

#define SWITCH_BUS 0xC0u /* first PCI bus of the NVSwitches */

static unsigned ancestor(const struct gpu *one, const struct gpu *other)
{
    if (one == other)
        return NVML_TOPOLOGY_INTERNAL;
    if (one->pcie_switch >= 0 && one->pcie_switch == other->pcie_switch)
        return NVML_TOPOLOGY_SINGLE;
    if (one->pcie_bridge >= 0 && one->pcie_bridge == other->pcie_bridge)
        return NVML_TOPOLOGY_HOSTBRIDGE;
    return one->numa_node == other->numa_node ? NVML_TOPOLOGY_NODE : NVML_TOPOLOGY_SYSTEM;
}

EXPORT nvmlReturn_t nvmlDeviceGetTopologyCommonAncestor(nvmlDevice_t one, nvmlDevice_t other, unsigned *level)
{
    CALL(one);
    struct place first, second;
    TRY(find_card(one, &first, NVML_ERROR_NOT_SUPPORTED));
    TRY(find_card(other, &second, NVML_ERROR_NOT_SUPPORTED));
    REQUIRE(level != NULL, NVML_ERROR_INVALID_ARGUMENT);
    *level = ancestor(first.gpu, second.gpu);
    RETURN(NVML_SUCCESS);
}

/* Every card at exactly this level from the given one. */
EXPORT nvmlReturn_t nvmlDeviceGetTopologyNearestGpus(nvmlDevice_t device, unsigned level, unsigned *count,
                                                     nvmlDevice_t *near)
{
    CALL(device);
    struct place place;
    TRY(find_card(device, &place, NVML_ERROR_NOT_SUPPORTED));
    REQUIRE(count != NULL, NVML_ERROR_INVALID_ARGUMENT);
    unsigned found = 0;
    for (unsigned i = 0; i < session_count(); i++) {
        if (session_gpu(i) == place.gpu || ancestor(place.gpu, session_gpu(i)) != level)
            continue;
        if (near != NULL && found < *count)
            near[found] = device_handle(session_gpu(i));
        found++;
    }
    *count = found;
    RETURN(NVML_SUCCESS);
}

/* MIG takes a card off NVLink. */
static nvmlReturn_t find_link(nvmlDevice_t device, unsigned link, struct place *place, const struct link **found)
{
    nvmlReturn_t result = find_card(device, place, NVML_ERROR_NOT_SUPPORTED);
    if (result != NVML_SUCCESS)
        return result;
    if (model_of(place->gpu)->links == 0)
        return NVML_ERROR_NOT_SUPPORTED;
    if (link >= model_of(place->gpu)->links)
        return NVML_ERROR_INVALID_ARGUMENT;
    *found = &place->gpu->links[link];
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlDeviceGetNvLinkState(nvmlDevice_t device, unsigned link, unsigned *active)
{
    CALL(device);
    struct place place;
    const struct link *found;
    TRY(find_link(device, link, &place, &found));
    REQUIRE(active != NULL, NVML_ERROR_INVALID_ARGUMENT);
    *active = found->active && !place.gpu->mig_current;
    RETURN(NVML_SUCCESS);
}

EXPORT nvmlReturn_t nvmlDeviceGetNvLinkRemoteDeviceType(nvmlDevice_t device, unsigned link, unsigned *kind)
{
    CALL(device);
    struct place place;
    const struct link *found;
    TRY(find_link(device, link, &place, &found));
    REQUIRE(kind != NULL, NVML_ERROR_INVALID_ARGUMENT);
    *kind = found->active ? found->remote_kind : NVML_LINK_UNKNOWN;
    RETURN(NVML_SUCCESS);
}

EXPORT nvmlReturn_t nvmlDeviceGetNvLinkRemotePciInfo_v2(nvmlDevice_t device, unsigned link, nvmlPciInfo_t *info)
{
    CALL(device);
    struct place place;
    const struct link *found;
    TRY(find_link(device, link, &place, &found));
    REQUIRE(info != NULL, NVML_ERROR_INVALID_ARGUMENT);
    REQUIRE(found->active, NVML_ERROR_NOT_SUPPORTED);
    memset(info, 0, sizeof *info);
    /* Behind an NVSwitch the remote end is the switch, whichever card one wants to reach. */
    bool direct = found->remote_kind == NVML_LINK_GPU;
    info->bus = direct ? the_state->gpus[found->remote_gpu].pci_bus : SWITCH_BUS + link % 4;
    snprintf(info->busIdLegacy, sizeof info->busIdLegacy, "0000:%02X:00.0", info->bus & 0xFFu);
    snprintf(info->busId, sizeof info->busId, "00000000:%02X:00.0", info->bus & 0xFFu);
    RETURN(NVML_SUCCESS);
}

EXPORT nvmlReturn_t nvmlDeviceGetP2PStatus(nvmlDevice_t one, nvmlDevice_t other, unsigned capability, unsigned *status)
{
    CALL(one);
    struct place first, second;
    TRY(find_card(one, &first, NVML_ERROR_NOT_SUPPORTED));
    TRY(find_card(other, &second, NVML_ERROR_NOT_SUPPORTED));
    REQUIRE(status != NULL && capability <= 4, NVML_ERROR_INVALID_ARGUMENT);
    bool linked = false;
    for (unsigned i = 0; i < FAKE_LINKS; i++) {
        const struct link *link = &first.gpu->links[i];
        bool reaches = link->remote_kind == NVML_LINK_SWITCH || link->remote_gpu == second.number;
        linked = linked || (link->active && reaches);
    }
    bool possible = !first.gpu->mig_current && !second.gpu->mig_current;
    *status = possible && (linked || capability != 2) ? NVML_P2P_STATUS_OK : NVML_P2P_STATUS_NOT_SUPPORTED;
    RETURN(NVML_SUCCESS);
}
