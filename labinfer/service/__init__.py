"""The service: a model behind HTTP, for every client that speaks OpenAI's API.

A thin client of the engine: requests come in, ``Engine.stream`` runs them, answers go out.

- ``server``: the process; ``protocol``: limits of a connection; ``guard``: who may come in; ``app``: the paths.
- ``endpoint``: one path; ``call``: one request and its answer; ``wire``: bytes; ``errors``: what goes wrong.
- ``schema``: the bodies of requests; ``operations``: what each path does; ``page``: what a browser shows.
- ``prompts``, ``literal_text``: messages to token ids; ``tools``: calls of tools; ``generation``: outputs of the
  engine as pieces; ``logprobs``: their forms.
- ``admission``: the queue; ``metrics``, ``watchdog``, ``logs``: operations; ``options``, ``keys``: settings.
"""
