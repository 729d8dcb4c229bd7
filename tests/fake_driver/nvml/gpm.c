/* NVML: performance monitoring (Hopper and later), the only load figure that a MIG instance gives.
 *
 * A sample is a reading of the running total of busy time; a metric is the difference of two over the time between.
 */
#include "books.h"
#include "session.h"

#define SAMPLES 256u

static struct sample {
    bool used;
    uint32_t generation;
    unsigned gpu;
    uint32_t gi;
    uint64_t at_us, busy; /* percent × µs */
} samples[SAMPLES];

static struct sample *find_sample(nvmlGpmSample_t handle)
{
    unsigned number;
    uint32_t generation;
    if (!read_handle(handle, HANDLE_GPM_SAMPLE, &number, NULL, NULL, &generation) || number >= SAMPLES)
        return NULL;
    return samples[number].used && samples[number].generation == generation ? &samples[number] : NULL;
}

EXPORT nvmlReturn_t nvmlGpmQueryDeviceSupport(nvmlDevice_t device, nvmlGpmSupport_t *support)
{
    CALL(device);
    struct place place;
    TRY(find_card(device, &place, NVML_ERROR_NOT_SUPPORTED));
    REQUIRE(support != NULL, NVML_ERROR_INVALID_ARGUMENT);
    REQUIRE(support->version == 1, NVML_ERROR_ARGUMENT_VERSION_MISMATCH);
    support->isSupportedDevice = model_of(place.gpu)->performance_monitoring;
    RETURN(NVML_SUCCESS);
}

EXPORT nvmlReturn_t nvmlGpmSampleAlloc(nvmlGpmSample_t *sample)
{
    CALL(NULL);
    REQUIRE(sample != NULL, NVML_ERROR_INVALID_ARGUMENT);
    for (unsigned i = 0; i < SAMPLES; i++) {
        if (samples[i].used)
            continue;
        samples[i] = (struct sample){.used = true, .generation = next_generation(the_state)};
        *sample = make_handle(HANDLE_GPM_SAMPLE, i, 0, 0, samples[i].generation);
        RETURN(NVML_SUCCESS);
    }
    RETURN(NVML_ERROR_MEMORY);
}

EXPORT nvmlReturn_t nvmlGpmSampleFree(nvmlGpmSample_t handle)
{
    CALL(NULL);
    struct sample *sample = find_sample(handle);
    REQUIRE(sample != NULL, NVML_ERROR_INVALID_ARGUMENT);
    sample->used = false;
    RETURN(NVML_SUCCESS);
}

static nvmlReturn_t take(nvmlDevice_t device, uint32_t gi, nvmlGpmSample_t handle)
{
    struct place place;
    nvmlReturn_t result = find_card(device, &place, NVML_ERROR_NOT_SUPPORTED);
    if (result != NVML_SUCCESS)
        return result;
    struct sample *sample = find_sample(handle);
    if (sample == NULL)
        return NVML_ERROR_INVALID_ARGUMENT;
    if (!model_of(place.gpu)->performance_monitoring)
        return NVML_ERROR_NOT_SUPPORTED;
    if (gi != NO_INSTANCE && (gi >= FAKE_NODES || !place.gpu->gi[gi].present))
        return NVML_ERROR_NOT_FOUND;
    books_reap(the_state);
    books_advance(the_state, place.gpu);
    sample->gpu = place.number;
    sample->gi = gi;
    sample->at_us = place.gpu->accounted_us;
    sample->busy = gi == NO_INSTANCE ? place.gpu->busy : place.gpu->gi[gi].busy;
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlGpmSampleGet(nvmlDevice_t device, nvmlGpmSample_t sample)
{
    CALL(device);
    RETURN(take(device, NO_INSTANCE, sample));
}

EXPORT nvmlReturn_t nvmlGpmMigSampleGet(nvmlDevice_t device, unsigned gi, nvmlGpmSample_t sample)
{
    CALL(device);
    RETURN(take(device, gi, sample));
}

EXPORT nvmlReturn_t nvmlGpmMetricsGet(nvmlGpmMetricsGet_t *request)
{
    CALL(NULL);
    REQUIRE(request != NULL, NVML_ERROR_INVALID_ARGUMENT);
    REQUIRE(request->version == 1, NVML_ERROR_ARGUMENT_VERSION_MISMATCH);
    const struct sample *one = find_sample(request->sample1), *two = find_sample(request->sample2);
    REQUIRE(one != NULL && two != NULL && request->numMetrics <= 477, NVML_ERROR_INVALID_ARGUMENT);
    REQUIRE(one->gpu == two->gpu && one->gi == two->gi && one->at_us < two->at_us, NVML_ERROR_INVALID_ARGUMENT);
    double load = (double)(two->busy - one->busy) / (double)(two->at_us - one->at_us);
    for (unsigned i = 0; i < request->numMetrics; i++) {
        nvmlGpmMetric_t *metric = &request->metrics[i];
        bool known = metric->metricId >= 1 && metric->metricId <= 3; /* graphics, SM, SM occupancy */
        metric->nvmlReturn = known ? NVML_SUCCESS : NVML_ERROR_NOT_SUPPORTED;
        metric->value = known ? load : 0;
        metric->metricInfo = (nvmlGpmMetricInfo_t){.shortName = "load", .longName = "Load", .unit = "%"};
    }
    RETURN(NVML_SUCCESS);
}
