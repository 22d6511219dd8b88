"""Jobs under SLURM: the script (job.sbatch), what submits it (script, scheduler) and what decides whether it comes back (after)."""
