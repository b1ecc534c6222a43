"""From the tasks of a /predict request to its results: read, find the image, ask the model, write, remember.

One item per task comes back whatever happens. A task we cannot serve gets an empty result with the reason, which is
also logged: Label Studio shows an annotator nothing of errors.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

from ml_backend import logs, metrics
from ml_backend.answers import Answer
from ml_backend.images import ImageInfo, TaskImage, check_size
from ml_backend.jobs import encode_later
from ml_backend.label_config import LabelConfig, OutputKind, OutputTag, Usual
from ml_backend.label_studio import (
    Ask,
    Json,
    answer,
    choose_output,
    empty_answer,
    pack_shape,
    read_ask,
    read_batch,
    shape_digest,
    shape_values,
    write_regions,
)
from ml_backend.service import Service, timed
from ml_backend.serving import Serving
from model.segmenter import Segmenter
from model.text import names_part
from model.types import MAX_PROPOSALS, Granularity, Prediction, Prompt, Refusal

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Shaped:
    """A proposal as the shapes of one kind of region, ready to be labelled and sent."""

    values: list[Json]
    digests: list[str]  # of each value
    packed: list[bytes]  # each value, to be remembered
    score: float
    granularity: Granularity | None
    adapter: str | None  # that made it; None: base weights


def predict_tasks(
    service: Service, config: LabelConfig, tasks: Sequence[Json], context: Json | None, *, project: str | None
) -> list[Json]:
    """Return one result per task: the answer to an annotator's clicks, or with no context a batch prediction.

    Args:
        service: the model and its caches.
        config: the project's labelling configuration.
        tasks: as Label Studio sends them; only id, data and, with a per-task number, drafts are read.
        context: what the annotator drew; None: a batch.
        project: whose version answers; remembered with the answers.
    """
    request = _Request(service, project)
    if context is None:
        return _batch(request, config, tasks)
    return [_served(request, task, partial(_interactive, request, config, task, context)) for task in tasks]


class _Request:
    """Who asks, and what answers: asked for once, when there is something to answer."""

    def __init__(self, service: Service, project: str | None) -> None:
        self.service = service
        self.project = project
        self._serving: Serving | None = None

    @property
    def serving(self) -> Serving:
        """What answers all of this request, waiting while it is loaded."""
        if self._serving is None:
            self._serving = self.service.serving(self.project)
        return self._serving

    @property
    def model_version(self) -> str:
        """The name of what answers, or would."""
        return self.service.version(self.project) if self._serving is None else self._serving.model_version


def _served(request: _Request, task: Json, make: Callable[[], Json]) -> Json:
    """Return what `make` gives, or an empty result with the reason: what one task lacks, the others shall not miss."""
    try:
        return make()
    except Refusal as refusal:
        metrics.PREDICTIONS.labels("refused").inc()
        metrics.REFUSALS.labels(metrics.cause_of(refusal)).inc()
        log.warning("task %s is answered with nothing: %s", task.get("id"), refusal)
        return empty_answer(request.model_version, str(refusal))
    except Exception:
        metrics.PREDICTIONS.labels("failed").inc()
        log.exception("task %s is answered with nothing, by an error of our own", task.get("id"))
        reason = f"internal error {logs.request_id.get()}; the log has the details under this id"
        return empty_answer(request.model_version, reason)


def _interactive(request: _Request, config: LabelConfig, task: Json, context: Json) -> Json:
    start = time.perf_counter()
    service = request.service
    ask = read_ask(config, task, context)
    if ask is None:  # the editor asks so by itself after each submit
        metrics.PREDICTIONS.labels("nothing_asked").inc()
        return empty_answer(request.model_version)
    output = choose_output(config, ask.to_name, ask.class_label)
    image = TaskImage(ask.task_id, ask.uri)
    info = service.identify(image)
    check_size(info, ask.width, ask.height)
    segmenter = request.serving.segmenter
    understood = segmenter.understood(ask.prompt)
    usual = service.settings.default_granularity if ask.usual is None else ask.usual
    prompt = _with_level(understood, ask, usual)
    proposals = MAX_PROPOSALS if ask.all_levels or ask.usual == "all" else service.settings.propose
    shaped = _shaped(service, segmenter, image, info, prompt, output.kind, proposals)
    given = prompt.granularity in (None, understood.granularity)
    regions = _write(request, config, ask, output, info, shaped, phrase=prompt.phrase, given=given)
    if not regions:
        raise Refusal("the model finds nothing at these clicks; click inside the object, or draw a box around it")
    service.foresee(segmenter, info, prompt)
    metrics.PREDICTIONS.labels("answered").inc()
    log.info(
        "task %s: %d clicks, level %s, phrase %s, %d regions by %s (%s) in %.0f ms",
        *(
            ask.task_id,
            len(prompt.clicks),
            "all" if ask.all_levels else ask.level,
            prompt.phrase if prompt.phrase is None or segmenter.phrases_are_names else "as typed",  # not for a log
            len({item["id"] for item in regions}),
        ),
        *(shaped[0].adapter or segmenter.version, request.model_version, (time.perf_counter() - start) * 1000),
    )
    answered = answer(regions, max(one.score for one in shaped), request.model_version)
    return answered | _phrase_note(ask, segmenter, prompt)


def _with_level(understood: Prompt, ask: Ask, usual: Usual | None) -> Prompt:
    """Return the prompt at the level to answer at: none where all are asked for, else the one given, else the usual."""
    if ask.all_levels:
        return replace(understood, granularity=None)
    if usual is None or usual == "all" or understood.granularity is not None or understood.phrase is not None:
        return understood
    return replace(understood, granularity=Granularity.from_value(usual))


def _phrase_note(ask: Ask, segmenter: Segmenter, understood: Prompt) -> Json:
    """Return why the phrase had no effect, for the answer, and tell the log; what was typed is in neither."""
    if not ask.phrase:
        return {}
    as_part = segmenter.adapter is not None and names_part(ask.phrase)
    outcome = "known" if understood.phrase is not None else "part" if as_part else "unknown"
    metrics.PHRASES.labels(outcome).inc()
    if outcome != "unknown":
        return {}
    why = "is no name that the model knows" if segmenter.adapter else "needs an adapter (see GRACO_ADAPTER)"
    reason = f"the phrase {why}, so the answer is as if there were none"
    log.warning("task %s: %s", ask.task_id, reason)
    return {"reason": reason}


def _shaped(
    service: Service,
    segmenter: Segmenter,
    image: TaskImage,
    info: ImageInfo,
    prompt: Prompt,
    kind: OutputKind,
    proposals: int,
) -> tuple[Shaped, ...]:
    def make() -> tuple[Shaped, ...]:
        return _shape(service.answer(segmenter, image, info, prompt, proposals=proposals), kind)

    return service.once((info.id, segmenter.adapter, prompt, kind, proposals), make, _weigh)


def _shape(prediction: Prediction, kind: OutputKind) -> tuple[Shaped, ...]:
    with timed("shape"):
        shaped = []
        for proposal in prediction.proposals:
            values = shape_values(kind, proposal.mask)
            digests = [shape_digest(value) for value in values]
            packed = [pack_shape(value) for value in values]
            shaped.append(Shaped(values, digests, packed, proposal.score, proposal.granularity, prediction.adapter))
        return tuple(shaped)


def _weigh(shaped: tuple[Shaped, ...]) -> int:
    """Return roughly the bytes that kept shapes take: a list's entry is a pointer, a point two numbers and a list."""
    values = [value for one in shaped for value in one.values]
    return (
        500
        + sum(len(packed) for one in shaped for packed in one.packed)
        + sum(
            8 * len(value.get("rle", ())) + len(value.get("imageDataURL", "")) + 120 * len(value.get("points", ()))
            for value in values
        )
    )


def _write(
    request: _Request,
    config: LabelConfig,
    ask: Ask,
    output: OutputTag,
    info: ImageInfo,
    shaped: Sequence[Shaped],
    *,
    phrase: str | None = None,
    given: bool = True,
) -> list[Json]:
    """Return the regions of all proposals, and remember each one, and which are parts of one proposal.

    A level that the annotator did not give is neither written nor remembered: it says nothing of what was meant.
    """
    prompt = json.dumps(asdict(ask.prompt))
    regions: list[Json] = []
    answers: list[Answer] = []
    for index, one in enumerate(shaped):
        level = one.granularity if given else None
        written = write_regions(
            ask,
            config,
            output,
            one.values,
            model_version=request.model_version,
            score=one.score,
            granularity=level,
            index=index,
        )
        regions += written
        ids = list(dict.fromkeys(region["id"] for region in written))  # in order, one for each value
        granularity = ask.level if level is None else level.value
        answers += [
            Answer(
                region_id=region_id,
                project=request.project,
                task_id=ask.task_id,
                image_id=info.id,
                digest=digest,
                prompt=prompt,
                granularity=granularity,
                model_version=request.model_version,
                phrase=phrase,
                adapter=one.adapter,
                shape=shape,
                parts=None if len(ids) == 1 else " ".join(ids) if region_id == ids[0] else ids[0],
            )
            for region_id, digest, shape in zip(ids, one.digests, one.packed, strict=True)
        ]
    with timed("remember"):
        request.service.answers.remember(answers)
        request.service.hand_over.tell(answers)
    return regions


def _batch(request: _Request, config: LabelConfig, tasks: Sequence[Json]) -> list[Json]:
    """Return whole-image proposals where the operator wants them; else have the images encoded and return nothing."""
    service = request.service
    if not service.settings.prelabel:
        images = [image for task in tasks for image in _images(config, task)]
        if len(tasks) == 1:  # a task was opened: its first click is near
            for image in images:
                service.warm(image)
        elif images:
            encode_later(service, images)
        return [empty_answer(request.model_version) for _ in tasks]
    deadline_s = time.monotonic() + service.settings.prelabel_limit_s
    return [_served(request, task, partial(_prelabel, request, config, task, deadline_s)) for task in tasks]


def _images(config: LabelConfig, task: Json) -> list[TaskImage]:
    try:
        return [TaskImage(ask.task_id, ask.uri) for ask in read_batch(config, task)]
    except Refusal as refusal:
        log.warning("task %s: %s", task.get("id"), refusal)
        return []


def _prelabel(request: _Request, config: LabelConfig, task: Json, deadline_s: float) -> Json:
    regions: list[Json] = []
    scores: list[float] = []
    for batch in read_batch(config, task):
        if time.monotonic() > deadline_s:
            raise Refusal("no time is left for this task; retrieve predictions for fewer tasks at once")
        output = choose_output(config, batch.to_name, None)
        image, segmenter = TaskImage(batch.task_id, batch.uri), request.serving.segmenter
        proposals, info = request.service.propose(segmenter, image, deadline_s=deadline_s)
        shaped = _shape(Prediction(proposals=proposals), output.kind)
        scores += [one.score for one in shaped]
        regions += _write(request, config, batch.sized(info.width, info.height), output, info, shaped)
    metrics.PREDICTIONS.labels("answered").inc()
    return answer(regions, sum(scores) / len(scores) if scores else 0.0, request.model_version)
