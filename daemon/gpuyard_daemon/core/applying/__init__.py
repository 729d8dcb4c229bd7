"""What each kind of fact changes in the state. Called by `Cluster.apply_fact`, and by nobody else."""
