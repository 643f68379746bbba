"""The models that one process serves."""

from __future__ import annotations

from labinfer.errors import UsageError
from labinfer.runtime.engine import Engine
from labinfer.service.errors import ApiError
from labinfer.service.service import Service


class Services:
    """Models by the names that clients ask for; a request without a name is for the first.

    They have the same options. Each has its own engine, queue and measurements; on a device that several use, their
    steps take turns.
    """

    def __init__(self, *services: Service) -> None:
        self.all, self.options = services, services[0].options
        names = [name for each in services for name in each.names]
        self.by_name = {name: each for each in services for name in each.names}
        if len(self.by_name) < len(names):
            raise UsageError(
                "serve.names", "two of the models that are served have the same name",
                remedy="name them: --served-model-name, once for each model in their order",
            )  # fmt: skip

    def of(self, name: str | None) -> Service:
        """The service of a model; ``ApiError`` for a name that is not served."""
        if name is None:
            return self.all[0]
        if name not in self.by_name:
            served = " and ".join(f"'{each}'" for each in self.by_name)
            message = f"the model '{name[:100]}' is not served here: {served} can be asked for"
            raise ApiError(404, message, param="model", code="model_not_found")
        return self.by_name[name]

    @property
    def engines(self) -> list[Engine]:
        """Those of all models."""
        return [engine for each in self.all for engine in each.engines]

    @property
    def active(self) -> int:
        """Answers that are being made or waited for."""
        return sum(each.admission.active for each in self.all)

    @property
    def draining(self) -> bool:
        """Whether nothing more is taken on."""
        return any(each.admission.draining for each in self.all)

    def drain(self) -> None:
        """Take on nothing more."""
        for each in self.all:
            each.admission.draining = True
