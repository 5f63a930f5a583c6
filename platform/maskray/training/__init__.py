"""Training: one process's share of the run. No Ray, no MLflow: two seams, RunContext and Tracker, lead out."""
