"""maskray: masked autoencoders on Ray. Imports nothing: each room is imported by who needs it."""
