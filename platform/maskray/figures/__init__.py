"""Arrays in, PNG out. No window, no pyplot, no state: a figure is made, rendered and dropped."""
