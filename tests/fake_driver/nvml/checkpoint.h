/* CUDA checkpoint of a process by pid, as libcuda offers it: lock, checkpoint, restore, unlock.
 *
 * With the real driver a thread of the target does the work. Here too, for targets that serve (checkpoint_next): one
 * that is frozen does not answer, Lock runs into its timeout and the others wait. Other targets are changed at once.
 */
#ifndef FAKE_CHECKPOINT_H
#define FAKE_CHECKPOINT_H

#include "state.h"

enum checkpoint_request { REQUEST_LOCK = 1, REQUEST_CHECKPOINT, REQUEST_RESTORE, REQUEST_UNLOCK };

enum {
    CUDA_SUCCESS = 0,
    CUDA_ERROR_INVALID_VALUE = 1,
    CUDA_ERROR_OUT_OF_MEMORY = 2,
    CUDA_ERROR_ILLEGAL_STATE = 401,
    CUDA_ERROR_NOT_FOUND = 500,
    CUDA_ERROR_NOT_READY = 600,
    CUDA_ERROR_NOT_SUPPORTED = 801,
    CUDA_ERROR_UNKNOWN = 999
};

struct gpu_pair {
    unsigned from, to;
};

/* Takes and gives back the lock itself. `timeout_us` UINT64_MAX: none. Returns a CUDA code. */
int checkpoint_ask(struct fake_state *state, const char *symbol, uint32_t pid, enum checkpoint_request request,
                   uint64_t timeout_us, const struct gpu_pair *pairs, unsigned pair_count);
int checkpoint_state(struct fake_state *state, uint32_t pid, uint32_t *found);

/* In the target: the next request, or 0 when the time is up; then the word that the process has come to rest. */
int checkpoint_next(struct fake_state *state, uint32_t pid, uint64_t timeout_us);
/* False if the asker has given up meanwhile: the process is to go on as before. */
bool checkpoint_done(struct fake_state *state, uint32_t pid);

#endif
