"""Open files of the process: as many as the connections need, or fewer connections, so that each can be answered."""

from __future__ import annotations

import logging
import resource
from dataclasses import replace

from labinfer.errors import LabinferError
from labinfer.service.options import ServiceOptions

_log = logging.getLogger(__name__)

RESERVED = 96
"""Files that are no connections: models, stages, logs."""


def within_descriptors(options: ServiceOptions) -> ServiceOptions:
    """``options`` with as many connections as the process may have open, whose limit is raised as far as it may be.

    Those beyond ``max_connections`` need files too, as many again, to be told so. A connection without one would be
    closed by the event loop with no answer. ``LabinferError`` where hardly any is left.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = RESERVED + 2 * options.max_connections
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return options
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    room = (most - RESERVED) // 2
    if room < 1:
        message = f"the process may have {most} open files, which leaves none for connections"
        raise LabinferError("serve.open-files", message, remedy=f"allow more: ulimit -n {wanted}")
    if room < options.max_connections:
        _log.warning("at most %d connections, since the process may have %d open files", room, most)
    return replace(options, max_connections=min(room, options.max_connections))
