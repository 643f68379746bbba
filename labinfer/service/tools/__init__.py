"""Calls of tools: what a model is told of them, and the calls in what it writes.

- ``formats``: the forms in which models write calls, told by the marks in their chat templates; ``reader``: finds them.
- ``choice``: ``tool_choice``: whether calls are read from a text, or are all that can be written.
"""
