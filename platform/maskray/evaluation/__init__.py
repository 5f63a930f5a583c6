"""What a model is worth: frozen features and what can be read from them, and reconstructions to look at."""
