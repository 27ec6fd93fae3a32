"""Jobs on a SLURM cluster: what runs inside a task, what the cluster says, submission, grids, following."""
