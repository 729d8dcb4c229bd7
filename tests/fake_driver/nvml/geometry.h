/* Where MIG instances may lie, and what becomes of the card when they come and go. Call with the lock held. */
#ifndef FAKE_GEOMETRY_H
#define FAKE_GEOMETRY_H

#include "abi.h"
#include "state.h"

/* The driver's GI id: the number of the node of a buddy tree over the memory slices. */
unsigned node_of(const struct gpu_model *model, unsigned start, unsigned size);
/* INVALID_ARGUMENT: never allowed there; INSUFFICIENT_RESOURCES: not now. */
nvmlReturn_t check_placement(const struct gpu *gpu, const struct gi_profile *profile, unsigned start);
/* Where the driver itself would put one: the free start that spoils the fewest other placements, then the lowest. */
nvmlReturn_t choose_start(const struct gpu *gpu, const struct gi_profile *profile, unsigned *start);
/* How many more of the profile fit. */
unsigned room_for(const struct gpu *gpu, const struct gi_profile *profile);

struct gpu_instance *place_instance(struct fake_state *state, struct gpu *gpu, const struct gi_profile *profile,
                                    unsigned start);

/* Compute slices of a CI profile; 0 if a GI of the profile does not offer it. */
unsigned ci_slices(const struct gi_profile *profile, unsigned enumerator);
unsigned ci_multiprocessors(const struct gpu_model *model, const struct gi_profile *profile, unsigned enumerator);
unsigned ci_most(const struct gi_profile *profile, unsigned enumerator);
bool ci_start_allowed(const struct gi_profile *profile, unsigned enumerator, unsigned start);
bool ci_start_free(const struct gpu_instance *gi, unsigned start, unsigned size);
struct compute_instance *place_compute(struct fake_state *state, struct gpu *gpu, struct gpu_instance *gi,
                                       unsigned enumerator, unsigned start);

/* Everything that a reset of the card wipes; a pending MIG mode takes effect. */
void reset_gpu(struct fake_state *state, struct gpu *gpu);
/* Everything that a reboot of the host wipes, by the rules of the model. */
void reboot_gpu(struct fake_state *state, struct gpu *gpu);
void set_mig_mode(struct fake_state *state, struct gpu *gpu, int64_t mode);

#endif
