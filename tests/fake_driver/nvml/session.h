/* One process's use of the library: reference count, the list of cards as it was at Init, and handles.
 *
 * A handle is a number and never an address: tag, kind, card, GI, CI, and the generation of what it names. It is valid
 * in every process, and one whose object has gone is refused with INVALID_ARGUMENT instead of being followed.
 * Every exported call begins with CALL, which takes the lock, and ends with RETURN or TRY, which give it back.
 */
#ifndef FAKE_SESSION_H
#define FAKE_SESSION_H

#include "abi.h"
#include "state.h"

enum handle_kind { HANDLE_DEVICE = 1, HANDLE_GI, HANDLE_CI, HANDLE_MIG_DEVICE, HANDLE_EVENT_SET, HANDLE_GPM_SAMPLE };

/* A card, or a MIG device on it. */
struct place {
    struct gpu *gpu;
    unsigned number;             /* of the card in the state */
    struct gpu_instance *gi;     /* NULL: the whole card */
    struct compute_instance *ci; /* with `gi` */
    uint32_t gi_id, ci_id;       /* NO_INSTANCE for the whole card */
};

/* The state of this process's session; NULL before the first Init. */
extern struct fake_state *the_state;

nvmlReturn_t call_enter(const char *symbol, const void *handle);
nvmlReturn_t call_leave(nvmlReturn_t result);

#define CALL(handle)                                          \
    do {                                                      \
        nvmlReturn_t entered_ = call_enter(__func__, handle); \
        if (entered_ != NVML_SUCCESS)                         \
            return entered_;                                  \
    } while (0)
#define RETURN(result) return call_leave(result)
#define TRY(expression)                        \
    do {                                       \
        nvmlReturn_t tried_ = (expression);    \
        if (tried_ != NVML_SUCCESS)            \
            return call_leave(tried_);         \
    } while (0)
#define REQUIRE(condition, otherwise)      \
    do {                                   \
        if (!(condition))                  \
            return call_leave(otherwise);  \
    } while (0)

void *make_handle(enum handle_kind kind, unsigned gpu, unsigned gi, unsigned ci, uint32_t generation);
void *device_handle(const struct gpu *gpu);
void *mig_handle(const struct gpu *gpu, const struct gpu_instance *gi, const struct compute_instance *ci);
void *gi_handle(const struct gpu *gpu, const struct gpu_instance *gi);
void *ci_handle(const struct gpu *gpu, const struct gpu_instance *gi, const struct compute_instance *ci);
/* False if it is no handle of that kind. Any out argument may be NULL. */
bool read_handle(const void *handle, enum handle_kind kind, unsigned *gpu, unsigned *gi, unsigned *ci,
                 uint32_t *generation);

/* A card or a MIG device. GPU_IS_LOST for a card that has fallen off the bus. */
nvmlReturn_t find_device(nvmlDevice_t device, struct place *place);
/* A card alone; a MIG device is answered with `otherwise`. */
nvmlReturn_t find_card(nvmlDevice_t device, struct place *place, nvmlReturn_t otherwise);
nvmlReturn_t find_gi(nvmlGpuInstance_t instance, struct place *place);
nvmlReturn_t find_ci(nvmlComputeInstance_t instance, struct place *place);

/* Cards of this session, in its order; `gpu` of the state. */
unsigned session_count(void);
struct gpu *session_gpu(unsigned index);
int session_index(const struct gpu *gpu);

/* Privileges of the caller, as the test has set them. */
nvmlReturn_t need_root(void);
nvmlReturn_t need_mig_config(void);

nvmlReturn_t give_text(char *out, unsigned length, const char *text);

#endif
