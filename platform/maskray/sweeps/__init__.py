"""Sweeps that know MAE: points and their cost, what is on record of them, who is stopped, and the report. No Ray."""
