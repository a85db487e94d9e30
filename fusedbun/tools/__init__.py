"""The commands: each above all else, and none above another but `cli`."""
