/* What every process that loads the fake driver shares: one file, mapped.
 *
 * The driver's real state lives in the kernel; here it lives in a file, so that the agent, its jobs, the MPS daemon and
 * the test see the same cards. Rules: all of `struct fake_state` is read and written under `mutex` (robust: a process
 * that is killed inside is recovered from by the next locker), except `change`, which waiters sleep on. Waiting is a
 * bare futex and not a condition variable: those are not safe against waiters that are killed, and tests kill waiters.
 * Pointers never go in here.
 */
#ifndef FAKE_STATE_H
#define FAKE_STATE_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "models.h"

#define FAKE_MAGIC 0x6c6d766e656b6166ULL /* "fakenvml" */
#define FAKE_LAYOUT 1u                   /* raise with every change of this file */

#define FAKE_GPUS 16u
#define FAKE_NODES 15u /* nodes of the buddy tree over 8 memory slices */
#define FAKE_CIS 8u
#define FAKE_LINKS 18u
#define FAKE_PROCESSES 1024u
#define FAKE_EVENTS 256u
#define FAKE_FAULTS 64u
#define FAKE_CALLS 256u
#define FAKE_CHECKPOINTS 128u
#define TEXT 96u

struct compute_instance {
    uint32_t present, generation;
    uint32_t enumerator;   /* CI profile */
    uint32_t start, size;  /* compute slices within the GI */
    uint32_t mig_index;    /* of GetMigDeviceHandleByIndex; kept for life, so holes stay */
    int64_t compute_mode;
    char uuid[TEXT];
};

struct gpu_instance {
    uint32_t present, generation;
    uint32_t profile; /* index in the model's table */
    uint32_t start;
    uint64_t busy; /* percent × µs since creation */
    struct compute_instance ci[FAKE_CIS];
};

struct link {
    uint32_t active, remote_kind, remote_gpu;
};

struct gpu {
    uint32_t present, model;
    uint32_t generation; /* changes when the card comes back: handles from before are stale */
    uint32_t lost;       /* fallen off the bus: calls answer GPU_IS_LOST, the count stays */
    uint32_t removed;    /* unbound from the driver: gone from the next session's list */
    char uuid[TEXT], serial[32];
    uint32_t pci_bus;
    /* Knobs: all int64_t, set and read by name (control.c). -1 where the model or the load decides.
     * `numa_node` is the host's that the card is plugged into; `memory_numa_node` is for cards whose own memory is a
     * node of the host (-1: not so). */
    int64_t minor, numa_node, memory_numa_node, pcie_switch, pcie_bridge, virtualization, host_vgpu_mode;
    int64_t compute_mode, persistence, timeslice, timeslice_supported;
    int64_t utilization, memory_utilization, power_mw, power_limit_mw, temperature_c, memory_temperature_c;
    int64_t sm_clock_mhz, clocks_event_reasons, recovery_action, supported_events;
    int64_t ecc[2][2]; /* [corrected, uncorrected][volatile, aggregate] */
    int64_t remapped_correctable, remapped_uncorrectable, remap_pending, remap_failure;
    int64_t mig_current, mig_pending;
    int64_t mig_clients;     /* clients the driver knows of beside the processes below: monitors, display */
    int64_t mig_needs_reset; /* 1: a mode switch only takes effect at reset or reboot, as in a passthrough guest */
    struct gpu_instance gi[FAKE_NODES];
    struct link links[FAKE_LINKS];
    uint64_t accounted_us; /* `energy_nj` and `busy` hold what happened up to here (monotonic) */
    uint64_t energy_nj, busy;
};

enum { PROCESS_MPS_CLIENT = 1, PROCESS_MPS_SERVER = 2, PROCESS_GRAPHICS = 4, PROCESS_UNSUSPENDABLE = 8 };

struct process {
    uint32_t present, pid;
    uint64_t start_time; /* of the process, in clock ticks since boot: tells a re-used pid */
    uint32_t gpu, gi, ci;
    uint32_t flags;
    uint64_t bytes;
    uint64_t saved_bytes; /* while checkpointed to host memory */
    uint32_t sm_pct, memory_pct;
    uint64_t busy_until_us; /* the load above ends here (monotonic); UINT64_MAX: it lasts */
};

enum { CHECKPOINT_RUNNING, CHECKPOINT_LOCKED, CHECKPOINT_DONE, CHECKPOINT_FAILED };

struct checkpoint {
    uint32_t present, pid;
    uint64_t start_time;
    uint32_t state;
    uint32_t serving;                  /* the process has a thread that carries out requests itself */
    uint32_t request, asked, answered; /* `asked` and `answered` count requests */
    uint32_t result;
};

struct event {
    uint64_t sequence, type, data;
    uint32_t gpu, gi, ci;
};

struct fault {
    uint32_t present;
    char symbol[TEXT]; /* exact name, or a prefix ending in '*' */
    int32_t gpu;       /* -1: any */
    int32_t code;      /* 0: delay only */
    int32_t skip;      /* let so many calls pass first */
    int32_t times;     /* then hit so many; -1: all */
    uint64_t delay_us;
};

struct call_count {
    char symbol[TEXT];
    uint64_t count;
};

struct fake_state {
    uint64_t magic;
    uint32_t layout, bytes;
    pthread_mutex_t mutex;
    uint32_t change; /* futex word: moves with anything that somebody may wait for */
    uint32_t generations;
    uint64_t seed, uuids_made;
    char driver_version[TEXT], nvml_version[TEXT];
    /* Knobs of the whole driver. */
    int64_t privileged, mig_config, mig_monitor; /* what the caller may do; 1 = yes */
    int64_t stable_mig_uuids, cuda_version, mps_clients_in_compute_list, minor_moves_with_mig, checkpoint_mib_per_s;
    uint32_t gpu_count;
    struct gpu gpus[FAKE_GPUS];
    struct process processes[FAKE_PROCESSES];
    struct checkpoint checkpoints[FAKE_CHECKPOINTS];
    uint64_t events_made;
    struct event events[FAKE_EVENTS];
    uint32_t fault_count, faults_cleared;
    struct fault faults[FAKE_FAULTS];
    struct call_count calls[FAKE_CALLS];
};

/* NULL, with errno set, if the file is missing or was made by another layout. */
struct fake_state *state_map(const char *path);
void state_unmap(struct fake_state *state);
/* Completes the file under another name, then links it in: nobody ever sees half of one. 0 or an errno. */
int state_create(const char *path, uint64_t seed);

void state_lock(struct fake_state *state);
void state_unlock(struct fake_state *state);
/* Wakes every waiter. Call with the lock held, after the change. */
void state_changed(struct fake_state *state);
/* Read with the lock held, then handed to `state_wait` after unlocking: no change in between is missed. */
uint32_t state_ticket(const struct fake_state *state);
/* Sleeps until something changed since `ticket` (0), `deadline_us` (ETIMEDOUT) or a signal (EINTR). */
int state_wait(struct fake_state *state, uint32_t ticket, uint64_t deadline_us);

uint64_t monotonic_us(void);
uint64_t wall_us(void);
uint32_t next_generation(struct fake_state *state);
void make_uuid(uint64_t seed, uint64_t salt, const char *prefix, char out[TEXT]);

static inline const struct gpu_model *model_of(const struct gpu *gpu) { return &fake_models[gpu->model]; }
static inline const struct gi_profile *profile_of(const struct gpu *gpu, const struct gpu_instance *gi)
{
    return &model_of(gpu)->profiles[gi->profile];
}

#endif
