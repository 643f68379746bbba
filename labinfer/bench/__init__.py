"""Measuring a model on its devices: speed, memory, the machine's own limits, and other engines beside it."""
