/* Faults and delays that a test has ordered for a symbol, and how often each symbol was called. */
#ifndef FAKE_FAULTS_H
#define FAKE_FAULTS_H

#include "state.h"

void count_call(struct fake_state *state, const char *symbol);
/* The code ordered for this call (0: none), after its delay. Call with the lock held; it is released meanwhile.
 * A delay ends early when the test clears faults: that is how a call that hangs is let go. */
int take_fault(struct fake_state *state, const char *symbol, int gpu);

#endif
