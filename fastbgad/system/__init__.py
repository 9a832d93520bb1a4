"""Files, checkpoints, the machine, its devices and the processes that share a run."""
