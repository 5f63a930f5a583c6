"""A sweep's life, but for its trials."""
