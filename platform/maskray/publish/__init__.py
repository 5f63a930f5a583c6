"""What leaves the platform: exports, the registry, the predictor."""
