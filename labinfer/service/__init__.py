"""The service: a model behind HTTP, for every client that speaks OpenAI's API.

A thin client of the engine: requests come in, ``Engine.stream`` runs them, answers go out.

- ``server``: the process; ``protocol``: limits of a connection; ``guard``: who may come in; ``app``: the table of
  paths.
- ``call``: one request and its answer; ``wire``: bytes; ``errors``: what goes wrong, as a client sees it.
- ``schema``: the bodies of requests; ``operations``: what each path does.
- ``generation``: the engine's outputs as pieces; ``prompts``: messages to token ids; ``admission``: the queue.
"""
