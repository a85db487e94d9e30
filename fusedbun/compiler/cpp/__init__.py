"""Schedules as C++, compiled and run on a CPU."""
