/* Who is on the cards: processes, their memory and load, and what follows from them. Call with the lock held. */
#ifndef FAKE_BOOKS_H
#define FAKE_BOOKS_H

#include "abi.h"
#include "state.h"

#define MIB 1048576ULL

/* Forgets entries whose process is gone (also one that nobody has waited for yet: the kernel has closed its files). */
void books_reap(struct fake_state *state);
bool process_alive(uint32_t pid, uint64_t start_time);
/* 0 if there is no such process. */
uint64_t process_start_time(uint32_t pid);

/* Counts on `energy` and `busy` up to now. Before any change of load, and before any reading of them. */
void books_advance(struct fake_state *state, struct gpu *gpu);

/* NO_INSTANCE in `gi` or `ci`: any. */
uint64_t bytes_on(const struct fake_state *state, unsigned gpu, uint32_t gi, uint32_t ci);
uint64_t bytes_usable(const struct fake_state *state, unsigned gpu, uint32_t gi);
bool anybody_on(const struct fake_state *state, unsigned gpu, uint32_t gi, uint32_t ci);
/* Percent, at most 100. */
unsigned load_on(const struct fake_state *state, unsigned gpu, uint32_t gi);
unsigned memory_load_on(const struct fake_state *state, unsigned gpu);
unsigned power_of(const struct fake_state *state, unsigned gpu);
unsigned temperature_of(const struct fake_state *state, unsigned gpu);

/* A process takes memory on a card or in an instance, under the rules of compute mode, MIG mode and size. */
nvmlReturn_t books_allocate(struct fake_state *state, uint32_t pid, unsigned gpu, uint32_t gi, uint32_t ci,
                            uint64_t bytes, uint32_t flags);
nvmlReturn_t books_free(struct fake_state *state, uint32_t pid, unsigned gpu, uint32_t gi, uint32_t ci, uint64_t bytes);
/* Everything it has. */
void books_release(struct fake_state *state, uint32_t pid);
/* The load of all its entries; `lasting_us` 0: until told otherwise. */
nvmlReturn_t books_load(struct fake_state *state, uint32_t pid, unsigned sm_pct, unsigned memory_pct,
                        uint64_t lasting_us);

void post_event(struct fake_state *state, unsigned gpu, uint64_t type, uint64_t data, uint32_t gi, uint32_t ci);

#endif
