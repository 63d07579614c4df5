"""The fault matrix: scenarios against real processes, shared by tests and `liverank bench faults`."""
