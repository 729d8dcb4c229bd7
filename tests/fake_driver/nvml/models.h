/* Card models as data. ../geometry.py writes the tables themselves from ../geometry.toml when the library is built. */
#ifndef FAKE_MODELS_H
#define FAKE_MODELS_H

#include <stdint.h>

/* One GPU-instance profile of one model. */
struct gi_profile {
    const char *name;
    unsigned enumerator; /* what ProfileInfo is asked by */
    unsigned id;         /* what Create takes */
    unsigned compute;    /* compute slices */
    unsigned size;       /* memory slices taken */
    unsigned starts[8];
    unsigned start_count;
    unsigned most; /* at once on one card */
    unsigned media; /* 1: takes the card's one set of media extensions ("+me") */
    unsigned multiprocessors, copy_engines, decoders, encoders, jpegs, ofas;
    uint64_t memory_mib;
};

enum mig_rule {
    MIG_NEVER,     /* the card has no MIG */
    MIG_BY_RESET,  /* Ampere: switching resets the card, waits for its clients, is kept over a reboot */
    MIG_AT_ONCE    /* Hopper and later: no reset, forgotten over a reboot */
};

struct gpu_model {
    const char *name;        /* what tests write, such as "H100-80GB" */
    const char *driver_name; /* what the driver calls it */
    unsigned architecture, capability_major, capability_minor;
    uint64_t total_mib, reserved_mib; /* the driver keeps `reserved`; jobs may use the rest */
    unsigned memory_slices, compute_slices, multiprocessors, multiprocessors_per_slice;
    enum mig_rule mig;
    unsigned performance_monitoring; /* 1: GPM works */
    unsigned links;                  /* NVLinks of the card */
    unsigned pci_device_id;
    unsigned idle_mw, full_mw;
    const struct gi_profile *profiles;
    unsigned profile_count;
};

extern const struct gpu_model fake_models[];
extern const unsigned fake_model_count;

#endif
