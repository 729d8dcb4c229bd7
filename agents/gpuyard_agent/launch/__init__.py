"""Processes of replicas: started, watched, halted and stopped so that they outlive the agent.

`base.Launcher` is the interface. `choose.choose` gives the one that fits the host: `systemd.SystemdLauncher` (transient
services, where systemd is PID 1 and we are root) or `client.SupervisorLauncher` (the supervisor process of the node,
`python -m gpuyard_agent.launch.supervisor`). `turn_taking.TurnTakingLauncher` wraps either, so that replicas on
time-sliced cards take turns. `limits` says what of all this the host can enforce, `accounts.AccountPolicy` which
Unix account a tenant's user runs as.
"""
