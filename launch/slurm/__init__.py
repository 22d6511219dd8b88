"""Jobs under SLURM: the script (job.sbatch), what fills and submits it (script, scheduler), and what decides on a restart (after)."""
