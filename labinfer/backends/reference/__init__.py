"""The reference backend: every op by its own numpy reference."""

from labinfer.backends.base import Capabilities

CAPABILITIES = Capabilities(parameters="f32")
