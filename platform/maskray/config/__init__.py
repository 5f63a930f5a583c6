"""Settings: what a run, an ingest and their parts may be told. No torch, no environment, no files but the YAML."""
