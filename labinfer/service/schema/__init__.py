"""The bodies of requests, as pydantic models: types and ranges, what is refused by name, and what is merely said."""
