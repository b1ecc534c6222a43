"""Read by gunicorn (`supervisor.web_command`): its lines look like ours; a dead process is left out of sums."""

from __future__ import annotations

import logging
from typing import Any

from gunicorn.glogging import Logger
from prometheus_client import values
from prometheus_client.multiprocess import mark_process_dead

from ml_backend import logs
from ml_backend.settings import Settings


class logger_class(Logger):  # type: ignore[misc]
    """Gunicorn's own lines through the handler of all the others; gunicorn looks for this name."""

    def setup(self, cfg: Any) -> None:
        """Take level and form from our settings."""
        super().setup(cfg)
        settings = Settings()
        logs.hide(settings.secrets())
        logs.configure(settings.log_level, as_json=settings.log_json)
        self.error_log.handlers.clear()
        self.error_log.propagate = True
        self.error_log.setLevel(max(logging.WARNING, logging.getLogger().level))


def child_exit(server: Any, worker: Any) -> None:
    """Have gauges of a process that is no more left out of sums."""
    if values.ValueClass is not values.MutexValue:  # several processes count together
        mark_process_dead(worker.pid)  # type: ignore[no-untyped-call]
