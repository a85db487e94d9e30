"""Schedules as Triton, for GPUs."""
