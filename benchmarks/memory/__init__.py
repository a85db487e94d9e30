"""Memory: the peak of real training steps, measured from outside the process that makes them. See `__main__`."""
