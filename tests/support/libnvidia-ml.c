/* A small stand-in for NVIDIA's management library: two H100s, as far as the agent reads them.
 *
 * Built by a test as libnvidia-ml.so.1 and loaded by NVIDIA's own Python binding through the ordinary dlopen, so that
 * signatures, struct sizes and error paths are the binding's real ones. What it shows is set by environment variables:
 *   FAKENVML_LOST   path of a file; while it exists, card 1 is lost (also one that is written during the run)
 *   FAKENVML_MIG    index of a card whose MIG mode is on
 *   FAKENVML_MODE   compute mode of all cards (0 default, 2 prohibited, 3 exclusive process)
 *   FAKENVML_OLD    set: a driver without MemoryInfo_v2 (NOT_SUPPORTED) and without utilisation
 *   FAKENVML_LINKS  "switch", "peer" or unset: how the cards are linked
 *   FAKENVML_INIT   error code that nvmlInit returns
 *   FAKENVML_SLOW   seconds that utilisation takes to answer
 * nvmlDeviceGetPowerUsage is left out on purpose: a symbol that this "driver" does not have.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define CARDS 2
enum { OK = 0, INVALID = 2, NOT_SUPPORTED = 3, SIZE = 7, LOST = 15, VERSION = 25 };

typedef struct { char bus_id_legacy[16]; unsigned domain, bus, device, pci_device, pci_subsystem; char bus_id[32]; } pci_t;
typedef struct { uint64_t total, free_, used; } memory_t;
typedef struct { unsigned version; uint64_t total, reserved, free_, used; } memory2_t;
typedef struct { unsigned gpu, memory; } utilization_t;
typedef struct { unsigned pid; uint64_t used; unsigned gpu_instance, compute_instance; } process_t;
_Static_assert(sizeof(pci_t) == 68, "PciInfo");
_Static_assert(sizeof(memory2_t) == 40, "Memory_v2");
_Static_assert(sizeof(process_t) == 24, "ProcessInfo");

/* Handles are numbers, never dereferenced. */
typedef uintptr_t handle_t;
static int index_of(handle_t handle) { return (int)handle - 0x100; }

static int lost(handle_t handle) {
    const char *path = getenv("FAKENVML_LOST");
    return index_of(handle) == 1 && path && access(path, F_OK) == 0;
}
#define CHECK(handle) \
    do { \
        if (index_of(handle) < 0 || index_of(handle) >= CARDS) return INVALID; \
        if (lost(handle)) return LOST; \
    } while (0)

static int number(const char *name, int otherwise) {
    const char *text = getenv(name);
    return text ? atoi(text) : otherwise;
}

int nvmlInitWithFlags(unsigned flags) { (void)flags; return number("FAKENVML_INIT", OK); }
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlShutdown(void) { return OK; }
const char *nvmlErrorString(int code) { return code == LOST ? "GPU is lost" : code == 9 ? "Driver Not Loaded" : "an error"; }
int nvmlSystemGetDriverVersion(char *text, unsigned size) { snprintf(text, size, "580.95.05"); return OK; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = CARDS; return OK; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, handle_t *handle) {
    if (index >= CARDS) return INVALID;
    *handle = 0x100 + index;
    return lost(*handle) ? LOST : OK;
}
int nvmlDeviceGetUUID(handle_t handle, char *text, unsigned size) {
    CHECK(handle);
    snprintf(text, size, "GPU-00000000-0000-4000-8000-00000000000%d", index_of(handle));
    return OK;
}
int nvmlDeviceGetName(handle_t handle, char *text, unsigned size) {
    CHECK(handle);
    snprintf(text, size, "NVIDIA H100 80GB HBM3");
    return OK;
}
static void fill_pci(int index, pci_t *pci) {
    memset(pci, 0, sizeof *pci);
    pci->bus = 0xA0 + (unsigned)index;
    snprintf(pci->bus_id, sizeof pci->bus_id, "00000000:%02X:00.0", pci->bus);
}
int nvmlDeviceGetPciInfo_v3(handle_t handle, pci_t *pci) { CHECK(handle); fill_pci(index_of(handle), pci); return OK; }
int nvmlDeviceGetCudaComputeCapability(handle_t handle, int *major, int *minor) {
    CHECK(handle);
    *major = 9;
    *minor = 0;
    return OK;
}
int nvmlDeviceGetComputeMode(handle_t handle, unsigned *mode) {
    CHECK(handle);
    *mode = (unsigned)number("FAKENVML_MODE", 0);
    return OK;
}
int nvmlDeviceGetMigMode(handle_t handle, unsigned *current, unsigned *pending) {
    CHECK(handle);
    *current = *pending = index_of(handle) == number("FAKENVML_MIG", -1);
    return OK;
}
int nvmlDeviceGetMemoryInfo(handle_t handle, memory_t *memory) {
    CHECK(handle);
    *memory = (memory_t){(uint64_t)81559 << 20, (uint64_t)80000 << 20, (uint64_t)1559 << 20};
    return OK;
}
int nvmlDeviceGetMemoryInfo_v2(handle_t handle, memory2_t *memory) {
    CHECK(handle);
    if (getenv("FAKENVML_OLD")) return NOT_SUPPORTED;
    if (memory->version != 0x02000028) return VERSION;
    memory->total = (uint64_t)81559 << 20;
    memory->reserved = (uint64_t)551 << 20;
    memory->used = (uint64_t)1008 << 20;
    memory->free_ = memory->total - memory->reserved - memory->used;
    return OK;
}
int nvmlDeviceGetUtilizationRates(handle_t handle, utilization_t *rates) {
    CHECK(handle);
    sleep((unsigned)number("FAKENVML_SLOW", 0));
    if (getenv("FAKENVML_OLD")) return NOT_SUPPORTED;
    *rates = (utilization_t){37u + (unsigned)index_of(handle), 12};
    return OK;
}
int nvmlDeviceGetTemperature(handle_t handle, unsigned sensor, unsigned *celsius) {
    CHECK(handle);
    (void)sensor;
    *celsius = 41u + (unsigned)index_of(handle);
    return OK;
}
static const char *links(void) { const char *text = getenv("FAKENVML_LINKS"); return text ? text : ""; }
int nvmlDeviceGetNvLinkState(handle_t handle, unsigned link, unsigned *active) {
    CHECK(handle);
    if (link >= 18) return INVALID;
    *active = !strcmp(links(), "switch") || (!strcmp(links(), "peer") && link < 4);
    return OK;
}
int nvmlDeviceGetNvLinkRemoteDeviceType(handle_t handle, unsigned link, unsigned *type) {
    CHECK(handle);
    (void)link;
    *type = !strcmp(links(), "switch") ? 2 : 0;
    return OK;
}
int nvmlDeviceGetNvLinkRemotePciInfo_v2(handle_t handle, unsigned link, pci_t *pci) {
    CHECK(handle);
    (void)link;
    fill_pci(1 - index_of(handle), pci);
    return OK;
}
int nvmlDeviceGetComputeRunningProcesses_v3(handle_t handle, unsigned *count, process_t *processes) {
    CHECK(handle);
    if (index_of(handle) != 0) { *count = 0; return OK; }
    if (!processes || *count < 1) { *count = 1; return SIZE; }
    *count = 1;
    processes[0] = (process_t){4711, (uint64_t)512 << 20, ~0u, ~0u};
    return OK;
}
int nvmlDeviceGetMPSComputeRunningProcesses_v3(handle_t handle, unsigned *count, process_t *processes) {
    CHECK(handle);
    (void)processes;
    *count = 0;
    return OK;
}
