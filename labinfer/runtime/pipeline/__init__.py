"""The pipeline: stages on devices of one host, each in a thread or a process, with several steps in flight."""
