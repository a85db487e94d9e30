"""Pictures of behaviour: the paths that the optimizers take, and how SM3's vectors stand in for a matrix.

trajectories  every optimizer on two functions of two numbers
covers        second moments, exact and from vectors, step by step
"""
