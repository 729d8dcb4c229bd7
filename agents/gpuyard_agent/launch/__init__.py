"""Processes of replicas: started, watched and stopped so that they outlive the agent.

`base.Launcher` is the interface; `client.SupervisorLauncher(socket_path, state_dir)` carries it out through the
supervisor process of the node (`python -m gpuyard_agent.launch.supervisor`), starting one where none listens.
`accounts.AccountPolicy(run_as)` says which Unix account a tenant's user runs as.
"""
