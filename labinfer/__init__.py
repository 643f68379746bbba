"""LABInfer: a model drawn as a map, compiled to a plan, run on the devices you have."""

__version__ = "0.1.0"
