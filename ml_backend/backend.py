"""The model class for those who host it with label-studio-ml: the same core behind that framework's methods.

Our own server does not use it (docs/adr/0002-label-studio-ml.md). The framework may build the class anew for each
request, so it holds nothing; the service does. Works with label-studio-ml 1.0.9 and 2.x.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import msgspec
from label_studio_ml.model import LabelStudioMLBase

from ml_backend.connections import note_told
from ml_backend.label_config import read_config
from ml_backend.label_studio import empty_answer
from ml_backend.predictions import predict_tasks
from ml_backend.service import Service
from ml_backend.webhooks import EventBody, handle_event
from model.types import Refusal

log = logging.getLogger(__name__)


def make_backend(service: Service, name: str = "GraCo") -> type[LabelStudioMLBase]:
    """Return the class that label-studio-ml hosts, answering from `service`.

    Args:
        service: what answers.
        name: what the caller's module calls the class. 1.0.9 runs each event in a new process, which imports that
            module and takes the class from it under this name.
    """

    class GraCoBackend(LabelStudioMLBase):  # type: ignore[misc]
        """GraCo over one service shared by all its instances."""

        TRAIN_EVENTS = (  # 1.0.9 hands over only these
            "ANNOTATION_CREATED",
            "ANNOTATION_UPDATED",
            "ANNOTATIONS_CREATED",
            "ANNOTATIONS_DELETED",
            "PROJECT_UPDATED",
            "START_TRAINING",
            "TASKS_CREATED",
        )

        def setup(self) -> None:
            """Tell 2.x our version; it calls this whenever it builds the class."""
            project = getattr(self, "project_id", None)
            version = service.version(project)
            if project is not None:
                note_told(service.settings, project, version)
            self.set("model_version", version)

        def predict(
            self, tasks: list[dict[str, Any]], context: dict[str, Any] | None = None, **kwargs: Any
        ) -> list[dict[str, Any]]:
            """Return one result per task, empty ones while the labelling configuration is missing or of no use.

            See `ml_backend.predictions.predict_tasks`.
            """
            project = kwargs.get("project")
            try:
                if not self.label_config:
                    raise Refusal("no labelling configuration: connect the backend in the project's settings first")
                config = read_config(self.label_config)
            except Refusal as refusal:  # raised on, the framework would send a traceback
                log.warning("%d tasks are answered with nothing: %s", len(tasks), refusal)
                return [empty_answer(service.version(project), str(refusal)) for _ in tasks]
            return predict_tasks(service, config, tasks, context, project=None if project is None else str(project))

        def fit(self, event: str, data: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
            """Act on one of Label Studio's events; see `ml_backend.webhooks.handle_event`."""
            body = msgspec.json.encode({**data, "action": event})
            return handle_event(service, msgspec.json.decode(body, type=EventBody), body)

        def process_event(
            self, event: str, data: dict[str, Any], job_id: str, additional_params: dict[str, Any]
        ) -> dict[str, Any] | None:
            """Call `fit` as 2.x does, where 1.0.9 would put an empty list of tasks before the event."""
            return self.fit(event, data, job_id=job_id, **additional_params) if event in self.TRAIN_EVENTS else None

    GraCoBackend.__name__ = GraCoBackend.__qualname__ = name
    GraCoBackend.__module__ = sys._getframe(1).f_globals.get("__name__", __name__)
    return GraCoBackend
