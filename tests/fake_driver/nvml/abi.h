/* The part of NVML's binary interface that callers see: return codes, enumerations, structures.
 *
 * Written from the published layout, not copied from a vendor header; every size that a caller depends on is asserted,
 * so a slip fails the build and not a test. Handles are opaque to callers; here they are tagged integers (session.h).
 */
#ifndef FAKE_ABI_H
#define FAKE_ABI_H

#include <assert.h>
#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))

typedef int nvmlReturn_t;
typedef void *nvmlDevice_t;
typedef void *nvmlGpuInstance_t;
typedef void *nvmlComputeInstance_t;
typedef void *nvmlEventSet_t;
typedef void *nvmlGpmSample_t;

enum {
    NVML_SUCCESS = 0,
    NVML_ERROR_UNINITIALIZED = 1,
    NVML_ERROR_INVALID_ARGUMENT = 2,
    NVML_ERROR_NOT_SUPPORTED = 3,
    NVML_ERROR_NO_PERMISSION = 4,
    NVML_ERROR_NOT_FOUND = 6,
    NVML_ERROR_INSUFFICIENT_SIZE = 7,
    NVML_ERROR_DRIVER_NOT_LOADED = 9,
    NVML_ERROR_TIMEOUT = 10,
    NVML_ERROR_FUNCTION_NOT_FOUND = 13,
    NVML_ERROR_GPU_IS_LOST = 15,
    NVML_ERROR_RESET_REQUIRED = 16,
    NVML_ERROR_IN_USE = 19,
    NVML_ERROR_MEMORY = 20,
    NVML_ERROR_INSUFFICIENT_RESOURCES = 23,
    NVML_ERROR_ARGUMENT_VERSION_MISMATCH = 25,
    NVML_ERROR_INVALID_STATE = 29,
    NVML_ERROR_UNKNOWN = 999
};

enum { NVML_COMPUTEMODE_DEFAULT = 0, NVML_COMPUTEMODE_PROHIBITED = 2, NVML_COMPUTEMODE_EXCLUSIVE_PROCESS = 3 };
enum { NVML_INIT_FLAG_NO_GPUS = 1, NVML_INIT_FLAG_NO_ATTACH = 2 };
enum {
    NVML_TOPOLOGY_INTERNAL = 0,
    NVML_TOPOLOGY_SINGLE = 10,
    NVML_TOPOLOGY_HOSTBRIDGE = 30,
    NVML_TOPOLOGY_NODE = 40,
    NVML_TOPOLOGY_SYSTEM = 50
};
enum { NVML_LINK_GPU = 0, NVML_LINK_SWITCH = 2, NVML_LINK_UNKNOWN = 255 };
enum { NVML_P2P_STATUS_OK = 0, NVML_P2P_STATUS_NOT_SUPPORTED = 5 };

/* Bits of an event mask. */
#define EVENT_ECC_SINGLE 0x1ULL
#define EVENT_ECC_DOUBLE 0x2ULL
#define EVENT_PSTATE 0x4ULL
#define EVENT_XID 0x8ULL
#define EVENT_CLOCK 0x10ULL
#define EVENT_MIG_CONFIG 0x100ULL

/* GI and CI ids where there is none. */
#define NO_INSTANCE 0xFFFFFFFFu
/* One more than the last GI and CI profile enumerator of the newest published header. */
#define GI_PROFILE_ENUMERATORS 0x12u
#define CI_PROFILE_ENUMERATORS 0x9u
#define CI_PROFILE_REV1 0x7u

#define STRUCT_VERSION(size, number) ((unsigned)(size) | ((unsigned)(number) << 24))

typedef struct {
    char busIdLegacy[16];
    unsigned domain, bus, device, pciDeviceId, pciSubSystemId;
    char busId[32];
} nvmlPciInfo_t;

typedef struct {
    unsigned long long total, free, used;
} nvmlMemory_t;

typedef struct {
    unsigned version;
    unsigned long long total, reserved, free, used;
} nvmlMemory_v2_t;

typedef struct {
    unsigned long long bar1Total, bar1Free, bar1Used;
} nvmlBAR1Memory_t;

typedef struct {
    unsigned gpu, memory;
} nvmlUtilization_t;

typedef struct {
    unsigned pid;
    unsigned long long usedGpuMemory;
    unsigned gpuInstanceId, computeInstanceId;
} nvmlProcessInfo_t;

typedef struct {
    unsigned pid;
    unsigned long long usedGpuMemory;
    unsigned gpuInstanceId, computeInstanceId;
    unsigned long long usedGpuCcProtectedMemory;
} nvmlProcessDetail_v1_t;

typedef struct {
    unsigned version, mode, numProcArrayEntries;
    nvmlProcessDetail_v1_t *procArray;
} nvmlProcessDetailList_v1_t;

typedef struct {
    unsigned pid;
    unsigned long long timeStamp;
    unsigned smUtil, memUtil, encUtil, decUtil;
} nvmlProcessUtilizationSample_t;

typedef struct {
    unsigned long long timeStamp;
    unsigned pid, smUtil, memUtil, encUtil, decUtil, jpgUtil, ofaUtil;
} nvmlProcessUtilizationInfo_v1_t;

typedef struct {
    unsigned version, processSamplesCount;
    unsigned long long lastSeenTimeStamp;
    nvmlProcessUtilizationInfo_v1_t *procUtilArray;
} nvmlProcessesUtilizationInfo_v1_t;

typedef struct {
    nvmlDevice_t device;
    unsigned long long eventType, eventData;
    unsigned gpuInstanceId, computeInstanceId;
} nvmlEventData_t;

typedef union {
    double dVal;
    int siVal;
    unsigned uiVal;
    unsigned long ulVal;
    unsigned long long ullVal;
    long long sllVal;
} nvmlValue_t;

enum { NVML_VALUE_UNSIGNED_INT = 1, NVML_VALUE_UNSIGNED_LONG_LONG = 3 };

typedef struct {
    unsigned fieldId, scopeId;
    long long timestamp, latencyUsec;
    unsigned valueType;
    nvmlReturn_t nvmlReturn;
    nvmlValue_t value;
} nvmlFieldValue_t;

typedef struct {
    unsigned version, sensorType;
    int temperature;
} nvmlTemperature_v1_t;

typedef struct {
    unsigned start, size;
} nvmlPlacement_t;

typedef struct {
    unsigned id, isP2pSupported, sliceCount, instanceCount, multiprocessorCount, copyEngineCount, decoderCount,
        encoderCount, jpegCount, ofaCount;
    unsigned long long memorySizeMB;
} nvmlGpuInstanceProfileInfo_t;

/* Version 3 has the same size; there the capabilities take the place of isP2pSupported and sliceCount stays. */
typedef struct {
    unsigned version, id, isP2pSupported, sliceCount, instanceCount, multiprocessorCount, copyEngineCount, decoderCount,
        encoderCount, jpegCount, ofaCount;
    unsigned long long memorySizeMB;
    char name[96];
} nvmlGpuInstanceProfileInfo_v2_t;

typedef struct {
    nvmlDevice_t device;
    unsigned id, profileId;
    nvmlPlacement_t placement;
} nvmlGpuInstanceInfo_t;

typedef struct {
    unsigned id, sliceCount, instanceCount, multiprocessorCount, sharedCopyEngineCount, sharedDecoderCount,
        sharedEncoderCount, sharedJpegCount, sharedOfaCount;
} nvmlComputeInstanceProfileInfo_t;

typedef struct {
    unsigned version, id, sliceCount, instanceCount, multiprocessorCount, sharedCopyEngineCount, sharedDecoderCount,
        sharedEncoderCount, sharedJpegCount, sharedOfaCount;
    char name[96];
} nvmlComputeInstanceProfileInfo_v2_t;

typedef struct {
    nvmlComputeInstanceProfileInfo_v2_t v2;
    unsigned capabilities;
} nvmlComputeInstanceProfileInfo_v3_t;

typedef struct {
    nvmlDevice_t device;
    nvmlGpuInstance_t gpuInstance;
    unsigned id, profileId;
    nvmlPlacement_t placement;
} nvmlComputeInstanceInfo_t;

typedef struct {
    unsigned multiprocessorCount, sharedCopyEngineCount, sharedDecoderCount, sharedEncoderCount, sharedJpegCount,
        sharedOfaCount, gpuInstanceSliceCount, computeInstanceSliceCount;
    unsigned long long memorySizeMB;
} nvmlDeviceAttributes_t;

typedef struct {
    const char *shortName, *longName, *unit;
} nvmlGpmMetricInfo_t;

typedef struct {
    unsigned metricId;
    nvmlReturn_t nvmlReturn;
    double value;
    nvmlGpmMetricInfo_t metricInfo;
} nvmlGpmMetric_t;

/* `metrics` only ever grew: 210 in the 13.0 header, 477 in 13.3. Callers say in numMetrics how many they filled in. */
typedef struct {
    unsigned version, numMetrics;
    nvmlGpmSample_t sample1, sample2;
    nvmlGpmMetric_t metrics[210];
} nvmlGpmMetricsGet_t;

typedef struct {
    unsigned version, isSupportedDevice;
} nvmlGpmSupport_t;

static_assert(sizeof(nvmlPciInfo_t) == 68, "PciInfo");
static_assert(sizeof(nvmlMemory_t) == 24, "Memory");
static_assert(sizeof(nvmlMemory_v2_t) == 40, "Memory_v2");
static_assert(sizeof(nvmlBAR1Memory_t) == 24, "BAR1Memory");
static_assert(sizeof(nvmlUtilization_t) == 8, "Utilization");
static_assert(sizeof(nvmlProcessInfo_t) == 24, "ProcessInfo");
static_assert(sizeof(nvmlProcessDetail_v1_t) == 32, "ProcessDetail_v1");
static_assert(sizeof(nvmlProcessDetailList_v1_t) == 24, "ProcessDetailList_v1");
static_assert(sizeof(nvmlProcessUtilizationSample_t) == 32, "ProcessUtilizationSample");
static_assert(sizeof(nvmlProcessesUtilizationInfo_v1_t) == 24, "ProcessesUtilizationInfo_v1");
static_assert(sizeof(nvmlEventData_t) == 32, "EventData");
static_assert(sizeof(nvmlFieldValue_t) == 40, "FieldValue");
static_assert(sizeof(nvmlTemperature_v1_t) == 12, "Temperature_v1");
static_assert(sizeof(nvmlPlacement_t) == 8, "Placement");
static_assert(sizeof(nvmlGpuInstanceProfileInfo_t) == 48, "GpuInstanceProfileInfo");
static_assert(sizeof(nvmlGpuInstanceProfileInfo_v2_t) == 152, "GpuInstanceProfileInfo_v2");
static_assert(sizeof(nvmlGpuInstanceInfo_t) == 24, "GpuInstanceInfo");
static_assert(sizeof(nvmlComputeInstanceProfileInfo_t) == 36, "ComputeInstanceProfileInfo");
static_assert(sizeof(nvmlComputeInstanceProfileInfo_v2_t) == 136, "ComputeInstanceProfileInfo_v2");
static_assert(sizeof(nvmlComputeInstanceProfileInfo_v3_t) == 140, "ComputeInstanceProfileInfo_v3");
static_assert(sizeof(nvmlComputeInstanceInfo_t) == 32, "ComputeInstanceInfo");
static_assert(sizeof(nvmlDeviceAttributes_t) == 40, "DeviceAttributes");
static_assert(sizeof(nvmlGpmMetricsGet_t) == 8424, "GpmMetricsGet");

#endif
