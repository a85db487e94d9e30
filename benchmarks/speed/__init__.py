"""Speed: the time of a step beside the machine's limit and the other packages. See `fusedbun.tools.bench`."""
