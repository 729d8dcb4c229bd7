/* What the parts of libcuda.so.1 share. */
#ifndef FAKE_CUDA_H
#define FAKE_CUDA_H

#include "state.h"

/* NULL before cuInit. */
struct fake_state *cuda_state(void);
/* The calls that do work, for cuGetProcAddress; NULL: there is no such one. */
void *cuda_work_function(const char *symbol);

#endif
