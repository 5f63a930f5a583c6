"""Sweeps: Ray Tune runs the trials, and a book of our own remembers them."""
