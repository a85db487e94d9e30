"""Quality: how good the networks are that each optimizer trains, on real data. See `__main__`."""
