/* NVML: memory, load, power, temperature, clocks, ECC. */
#include <string.h>

#include "books.h"
#include "session.h"

/* In MIG mode, figures of the whole card and everybody's processes are not for every caller. */
static nvmlReturn_t need_monitor(const struct place *place)
{
    if (place->gi != NULL || !place->gpu->mig_current || the_state->privileged || the_state->mig_monitor)
        return NVML_SUCCESS;
    return NVML_ERROR_NO_PERMISSION;
}

static nvmlMemory_v2_t memory_of(const struct place *place)
{
    books_reap(the_state);
    nvmlMemory_v2_t memory = {.used = bytes_on(the_state, place->number, place->gi_id, NO_INSTANCE)};
    if (place->gi == NULL)
        memory.reserved = model_of(place->gpu)->reserved_mib * MIB;
    memory.total = bytes_usable(the_state, place->number, place->gi_id) + memory.reserved;
    memory.free = memory.total - memory.reserved - memory.used;
    return memory;
}

EXPORT nvmlReturn_t nvmlDeviceGetMemoryInfo(nvmlDevice_t device, nvmlMemory_t *memory)
{
    CALL(device);
    struct place place;
    TRY(find_device(device, &place));
    REQUIRE(memory != NULL, NVML_ERROR_INVALID_ARGUMENT);
    TRY(need_monitor(&place));
    nvmlMemory_v2_t now = memory_of(&place);
    /* The first version counts what the driver reserves as used. */
    *memory = (nvmlMemory_t){.total = now.total, .free = now.free, .used = now.used + now.reserved};
    RETURN(NVML_SUCCESS);
}

EXPORT nvmlReturn_t nvmlDeviceGetMemoryInfo_v2(nvmlDevice_t device, nvmlMemory_v2_t *memory)
{
    CALL(device);
    struct place place;
    TRY(find_device(device, &place));
    REQUIRE(memory != NULL, NVML_ERROR_INVALID_ARGUMENT);
    REQUIRE(memory->version == STRUCT_VERSION(sizeof *memory, 2), NVML_ERROR_ARGUMENT_VERSION_MISMATCH);
    TRY(need_monitor(&place));
    unsigned version = memory->version;
    *memory = memory_of(&place);
    memory->version = version;
    RETURN(NVML_SUCCESS);
}

EXPORT nvmlReturn_t nvmlDeviceGetBAR1MemoryInfo(nvmlDevice_t device, nvmlBAR1Memory_t *memory)
{
    CALL(device);
    struct place place;
    TRY(find_device(device, &place));
    REQUIRE(memory != NULL, NVML_ERROR_INVALID_ARGUMENT);
    unsigned long long total = 131072 * MIB;
    *memory = (nvmlBAR1Memory_t){.bar1Total = total, .bar1Free = total - MIB, .bar1Used = MIB};
    RETURN(NVML_SUCCESS);
}

EXPORT nvmlReturn_t nvmlDeviceGetUtilizationRates(nvmlDevice_t device, nvmlUtilization_t *utilization)
{
    CALL(device);
    struct place place;
    TRY(find_device(device, &place));
    REQUIRE(utilization != NULL, NVML_ERROR_INVALID_ARGUMENT);
    REQUIRE(!place.gpu->mig_current, NVML_ERROR_NOT_SUPPORTED);
    books_reap(the_state);
    utilization->gpu = load_on(the_state, place.number, NO_INSTANCE);
    utilization->memory = memory_load_on(the_state, place.number);
    RETURN(NVML_SUCCESS);
}

static nvmlReturn_t media_load(nvmlDevice_t device, unsigned *load, unsigned *period_us)
{
    struct place place;
    nvmlReturn_t result = find_device(device, &place);
    if (result != NVML_SUCCESS || place.gpu->mig_current)
        return result != NVML_SUCCESS ? result : NVML_ERROR_NOT_SUPPORTED;
    if (load == NULL || period_us == NULL)
        return NVML_ERROR_INVALID_ARGUMENT;
    *load = 0;
    *period_us = 167000;
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlDeviceGetEncoderUtilization(nvmlDevice_t device, unsigned *load, unsigned *period_us)
{
    CALL(device);
    RETURN(media_load(device, load, period_us));
}

EXPORT nvmlReturn_t nvmlDeviceGetDecoderUtilization(nvmlDevice_t device, unsigned *load, unsigned *period_us)
{
    CALL(device);
    RETURN(media_load(device, load, period_us));
}

EXPORT nvmlReturn_t nvmlDeviceGetPowerUsage(nvmlDevice_t device, unsigned *milliwatts)
{
    CALL(device);
    struct place place;
    TRY(find_card(device, &place, NVML_ERROR_NOT_SUPPORTED));
    REQUIRE(milliwatts != NULL, NVML_ERROR_INVALID_ARGUMENT);
    books_reap(the_state);
    *milliwatts = power_of(the_state, place.number);
    RETURN(NVML_SUCCESS);
}

static unsigned power_limit(const struct gpu *gpu)
{
    return gpu->power_limit_mw >= 0 ? (unsigned)gpu->power_limit_mw : model_of(gpu)->full_mw;
}

EXPORT nvmlReturn_t nvmlDeviceGetEnforcedPowerLimit(nvmlDevice_t device, unsigned *milliwatts)
{
    CALL(device);
    struct place place;
    TRY(find_card(device, &place, NVML_ERROR_NOT_SUPPORTED));
    REQUIRE(milliwatts != NULL, NVML_ERROR_INVALID_ARGUMENT);
    *milliwatts = power_limit(place.gpu);
    RETURN(NVML_SUCCESS);
}

EXPORT nvmlReturn_t nvmlDeviceGetPowerManagementLimit(nvmlDevice_t device, unsigned *milliwatts)
{
    CALL(device);
    struct place place;
    TRY(find_card(device, &place, NVML_ERROR_NOT_SUPPORTED));
    REQUIRE(milliwatts != NULL, NVML_ERROR_INVALID_ARGUMENT);
    *milliwatts = power_limit(place.gpu);
    RETURN(NVML_SUCCESS);
}

EXPORT nvmlReturn_t nvmlDeviceGetTotalEnergyConsumption(nvmlDevice_t device, unsigned long long *millijoules)
{
    CALL(device);
    struct place place;
    TRY(find_card(device, &place, NVML_ERROR_NOT_SUPPORTED));
    REQUIRE(millijoules != NULL, NVML_ERROR_INVALID_ARGUMENT);
    REQUIRE(model_of(place.gpu)->architecture >= 5, NVML_ERROR_NOT_SUPPORTED);
    books_reap(the_state);
    books_advance(the_state, place.gpu);
    *millijoules = place.gpu->energy_nj / 1000000u;
    RETURN(NVML_SUCCESS);
}

EXPORT nvmlReturn_t nvmlDeviceGetTemperature(nvmlDevice_t device, unsigned sensor, unsigned *celsius)
{
    CALL(device);
    struct place place;
    TRY(find_card(device, &place, NVML_ERROR_NOT_SUPPORTED));
    REQUIRE(celsius != NULL && sensor == 0, NVML_ERROR_INVALID_ARGUMENT);
    books_reap(the_state);
    *celsius = temperature_of(the_state, place.number);
    RETURN(NVML_SUCCESS);
}

EXPORT nvmlReturn_t nvmlDeviceGetTemperatureV(nvmlDevice_t device, nvmlTemperature_v1_t *temperature)
{
    CALL(device);
    struct place place;
    TRY(find_card(device, &place, NVML_ERROR_NOT_SUPPORTED));
    REQUIRE(temperature != NULL, NVML_ERROR_INVALID_ARGUMENT);
    REQUIRE(temperature->version == STRUCT_VERSION(sizeof *temperature, 1), NVML_ERROR_ARGUMENT_VERSION_MISMATCH);
    REQUIRE(temperature->sensorType == 0, NVML_ERROR_INVALID_ARGUMENT);
    books_reap(the_state);
    temperature->temperature = (int)temperature_of(the_state, place.number);
    RETURN(NVML_SUCCESS);
}

EXPORT nvmlReturn_t nvmlDeviceGetClockInfo(nvmlDevice_t device, unsigned kind, unsigned *mhz)
{
    CALL(device);
    struct place place;
    TRY(find_card(device, &place, NVML_ERROR_NOT_SUPPORTED));
    REQUIRE(mhz != NULL && kind <= 3, NVML_ERROR_INVALID_ARGUMENT);
    *mhz = kind == 2 ? 2619 : (unsigned)place.gpu->sm_clock_mhz;
    RETURN(NVML_SUCCESS);
}

EXPORT nvmlReturn_t nvmlDeviceGetMaxClockInfo(nvmlDevice_t device, unsigned kind, unsigned *mhz)
{
    CALL(device);
    struct place place;
    TRY(find_card(device, &place, NVML_ERROR_NOT_SUPPORTED));
    REQUIRE(mhz != NULL && kind <= 3, NVML_ERROR_INVALID_ARGUMENT);
    *mhz = kind == 2 ? 2619 : 1980;
    RETURN(NVML_SUCCESS);
}

EXPORT nvmlReturn_t nvmlDeviceGetCurrentClocksEventReasons(nvmlDevice_t device, unsigned long long *reasons)
{
    CALL(device);
    struct place place;
    TRY(find_card(device, &place, NVML_ERROR_NOT_SUPPORTED));
    REQUIRE(reasons != NULL, NVML_ERROR_INVALID_ARGUMENT);
    books_reap(the_state);
    *reasons = (unsigned long long)place.gpu->clocks_event_reasons;
    if (*reasons == 0 && load_on(the_state, place.number, NO_INSTANCE) == 0)
        *reasons = 1;
    RETURN(NVML_SUCCESS);
}

EXPORT nvmlReturn_t nvmlDeviceGetPerformanceState(nvmlDevice_t device, unsigned *pstate)
{
    CALL(device);
    struct place place;
    TRY(find_card(device, &place, NVML_ERROR_NOT_SUPPORTED));
    REQUIRE(pstate != NULL, NVML_ERROR_INVALID_ARGUMENT);
    *pstate = 0;
    RETURN(NVML_SUCCESS);
}

EXPORT nvmlReturn_t nvmlDeviceGetEccMode(nvmlDevice_t device, unsigned *current, unsigned *pending)
{
    CALL(device);
    struct place place;
    TRY(find_card(device, &place, NVML_ERROR_NOT_SUPPORTED));
    REQUIRE(current != NULL && pending != NULL, NVML_ERROR_INVALID_ARGUMENT);
    *current = *pending = 1;
    RETURN(NVML_SUCCESS);
}

EXPORT nvmlReturn_t nvmlDeviceGetTotalEccErrors(nvmlDevice_t device, unsigned kind, unsigned counter,
                                                unsigned long long *count)
{
    CALL(device);
    struct place place;
    TRY(find_device(device, &place));
    REQUIRE(count != NULL && kind <= 1 && counter <= 1, NVML_ERROR_INVALID_ARGUMENT);
    /* A MIG device only counts uncorrectable errors since the driver was loaded. */
    REQUIRE(place.gi == NULL || (kind == 1 && counter == 0), NVML_ERROR_NOT_SUPPORTED);
    *count = (unsigned long long)place.gpu->ecc[kind][counter];
    RETURN(NVML_SUCCESS);
}

EXPORT nvmlReturn_t nvmlDeviceGetMemoryErrorCounter(nvmlDevice_t device, unsigned kind, unsigned counter,
                                                    unsigned location, unsigned long long *count)
{
    CALL(device);
    struct place place;
    TRY(find_device(device, &place));
    REQUIRE(count != NULL && kind <= 1 && counter <= 1 && location <= 8, NVML_ERROR_INVALID_ARGUMENT);
    REQUIRE(place.gi == NULL || (kind == 1 && counter == 0), NVML_ERROR_NOT_SUPPORTED);
    /* All of the fake's errors happen in device memory. */
    *count = location == 2 ? (unsigned long long)place.gpu->ecc[kind][counter] : 0;
    RETURN(NVML_SUCCESS);
}

EXPORT nvmlReturn_t nvmlDeviceGetRemappedRows(nvmlDevice_t device, unsigned *correctable, unsigned *uncorrectable,
                                              unsigned *pending, unsigned *failure)
{
    CALL(device);
    struct place place;
    TRY(find_card(device, &place, NVML_ERROR_NOT_SUPPORTED));
    REQUIRE(correctable && uncorrectable && pending && failure, NVML_ERROR_INVALID_ARGUMENT);
    REQUIRE(model_of(place.gpu)->architecture >= 7, NVML_ERROR_NOT_SUPPORTED);
    *correctable = (unsigned)place.gpu->remapped_correctable;
    *uncorrectable = (unsigned)place.gpu->remapped_uncorrectable;
    *pending = (unsigned)place.gpu->remap_pending;
    *failure = (unsigned)place.gpu->remap_failure;
    RETURN(NVML_SUCCESS);
}

static bool field_number(const struct place *place, unsigned field, unsigned scope, unsigned long long *value)
{
    const struct gpu *gpu = place->gpu;
    switch (field) {
    case 1: case 2: *value = 1; return true;                                  /* ECC mode, current and pending */
    case 3: *value = (unsigned long long)gpu->ecc[0][0]; return true;         /* ECC totals */
    case 4: *value = (unsigned long long)gpu->ecc[1][0]; return true;
    case 5: *value = (unsigned long long)gpu->ecc[0][1]; return true;
    case 6: *value = (unsigned long long)gpu->ecc[1][1]; return true;
    case 82: *value = (unsigned long long)gpu->memory_temperature_c; return gpu->memory_temperature_c >= 0;
    case 83: *value = gpu->energy_nj / 1000000u; return true;
    case 91: *value = model_of(gpu)->links; return true;
    case 138: case 139: case 140: case 141:                                   /* NVLink data and raw, KiB */
        *value = 0;
        return scope < FAKE_LINKS ? gpu->links[scope].active != 0 : model_of(gpu)->links > 0;
    case 184: *value = model_of(gpu)->mig == MIG_AT_ONCE; return true;        /* MIG without reset */
    case 185: case 186: *value = power_of(the_state, place->number); return true;
    case 190: *value = power_limit(gpu); return true;
    case 199: *value = 1; return true;                                        /* MIG mode query needs no attach */
    case 230: *value = (unsigned long long)gpu->recovery_action; return true;
    default: return false;
    }
}

EXPORT nvmlReturn_t nvmlDeviceGetFieldValues(nvmlDevice_t device, int count, nvmlFieldValue_t *values)
{
    CALL(device);
    struct place place;
    TRY(find_card(device, &place, NVML_ERROR_NOT_SUPPORTED));
    REQUIRE(count > 0 && values != NULL, NVML_ERROR_INVALID_ARGUMENT);
    books_reap(the_state);
    books_advance(the_state, place.gpu);
    for (int i = 0; i < count; i++) {
        unsigned long long value = 0;
        bool known = field_number(&place, values[i].fieldId, values[i].scopeId, &value);
        unsigned field = values[i].fieldId;
        bool wide = (field >= 3 && field <= 6) || field == 83 || (field >= 138 && field <= 141);
        values[i].timestamp = (long long)wall_us();
        values[i].latencyUsec = 0;
        values[i].valueType = wide ? NVML_VALUE_UNSIGNED_LONG_LONG : NVML_VALUE_UNSIGNED_INT;
        values[i].nvmlReturn = known ? NVML_SUCCESS : NVML_ERROR_NOT_SUPPORTED;
        values[i].value.ullVal = value;
    }
    RETURN(NVML_SUCCESS);
}
