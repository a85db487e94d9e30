"""`fusedbun train`."""
