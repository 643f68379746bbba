"""Measures what ops, steps and links cost on the devices of this machine, and keeps it for the compiler."""
