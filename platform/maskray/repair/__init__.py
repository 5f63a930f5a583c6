"""`maskray repair`: what is wrong in a run's folder, why, and what is done about it.

A launch mends what its own kill can leave. This is for the rest: folders that were deleted, copied or damaged by hand
or by a disk, records that contradict them, and what a launch that nobody gives again has left open. No checkpoint that
was finished is ever deleted here.
"""
