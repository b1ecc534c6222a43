"""The model class under label-studio-ml 1.0.9's own server, and the signatures that 2.x calls."""

import inspect
import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.ml_backend.conftest import TOKEN, ask, click, recorded

label_studio_ml = pytest.importorskip("label_studio_ml.model", reason="label-studio-ml 1.0.9 is installed by `make`")

from ml_backend.backend import make_backend  # noqa: E402  (imports label-studio-ml)


@pytest.fixture(scope="module")
def backend(service):
    return make_backend(service)


@pytest.fixture
def hosted(backend, tmp_path, monkeypatch):
    """Their server with our class, through their own manager."""
    from label_studio_ml.api import init_app
    from label_studio_ml.model import LabelStudioMLManager

    monkeypatch.setattr(LabelStudioMLManager, "_current_model", {})
    return init_app(model_class=backend, model_dir=str(tmp_path / "models")).test_client()


def test_it_is_a_real_subclass_with_the_signatures_of_2x(backend):
    assert issubclass(backend, label_studio_ml.LabelStudioMLBase)
    predict = inspect.signature(backend.predict)
    assert list(predict.parameters) == ["self", "tasks", "context", "kwargs"]
    assert predict.parameters["context"].default is None
    assert predict.parameters["kwargs"].kind is inspect.Parameter.VAR_KEYWORD
    assert list(inspect.signature(backend.fit).parameters) == ["self", "event", "data", "kwargs"]


def test_predict_answers_as_our_own_server_does(backend, client):
    body = ask(click(31, 40, level="0.5"))
    model = backend(label_config=body["label_config"])
    own = client.post("/predict", json=body).json["results"]
    context = body["params"]["context"]
    assert json.loads(json.dumps(model.predict(body["tasks"], context=context, login=None, password=None))) == own
    assert json.loads(json.dumps(model.predict(body["tasks"], context, project="3.1795250578"))) == own


def test_without_a_usable_configuration_each_task_gets_an_empty_result_with_the_reason(backend, caplog):
    tasks = ask()["tasks"] * 2
    for model in (backend(), backend(label_config="<View/>")):
        results = model.predict(tasks, context={"result": click(31, 40)})
        assert [result["result"] for result in results] == [[], []]
        assert all(len(result["reason"]) > 15 for result in results)
    assert "2 tasks are answered with nothing" in caplog.text


def test_fit_keeps_events_as_our_own_webhook_does(backend, service):
    kept = service.inbox.counts().get("undone", 0)
    assert backend().fit("ANNOTATION_CREATED", recorded("40")) == {"status": "ok"}
    assert service.inbox.counts()["undone"] == kept + 1
    job = backend().fit("START_TRAINING", {"project": {"id": 3}}, job_id="1")["job"]
    assert job.startswith("train-project-3-")


def test_2x_is_told_our_version_when_it_builds_the_class(backend, service):
    told = {}
    model = backend()
    model.set = lambda key, value: told.update({key: value})
    model.setup()
    assert told == {"model_version": service.version(None)}


def test_setup_and_predict_work_under_the_server_of_1_0_9(hosted, service):
    body = recorded("32")
    assert hosted.get("/health").json["status"] == "UP"
    answer = hosted.post("/setup", json=recorded("02") | {"schema": body["label_config"]})
    assert answer.status_code == 200, answer.text
    results = hosted.post("/predict", json=body).json["results"]
    assert results[0]["result"][0]["type"] == "brushlabels"
    assert results[0]["model_version"] == service.version(None)
    assert hosted.post("/predict", json=recorded("50")).json["results"] == [
        {"result": [], "score": 0.0, "model_version": service.version(None)}
    ] * len(recorded("50")["tasks"])


def test_an_event_under_the_server_of_1_0_9_reaches_fit_in_its_process_of_its_own(tmp_path, label_studio):
    (tmp_path / "hosted.py").write_text(
        "from ml_backend.backend import make_backend\n"
        "from ml_backend.service import Service\n"
        "from ml_backend.settings import Settings\n"
        "GraCo = make_backend(Service(Settings()))\n"
    )
    (tmp_path / "serve.py").write_text(
        "import json, multiprocessing, sys\n"
        "if __name__ == '__main__':\n"
        "    from hosted import GraCo\n"
        "    from label_studio_ml.api import init_app\n"
        "    client = init_app(model_class=GraCo, model_dir=sys.argv[1]).test_client()\n"
        "    answer = client.post('/webhook', json=json.load(open(sys.argv[2]))['body'])\n"
        "    print(answer.status_code, answer.json['job_id'])\n"
        "    for process in multiprocessing.active_children():\n"
        "        process.join(120)\n"
    )
    models = tmp_path / "models"
    event = ROOT / "tests" / "golden" / "label_studio" / "40_webhook_annotation_created_accepted_suggestion.json"
    environment = {
        **os.environ,
        **{"PYTHONPATH": f"{tmp_path}:{ROOT}", "GRACO_DATA_DIR": str(tmp_path / "data")},
        **{"LABEL_STUDIO_URL": label_studio.url, "LABEL_STUDIO_API_KEY": TOKEN},
    }
    done = subprocess.run(
        [sys.executable, str(tmp_path / "serve.py"), str(models), str(event)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    status, job = done.stdout.split()
    assert status == "201", done.stderr
    assert json.loads((models / job / "job_result.json").read_text()) == {"status": "ok"}, done.stderr


def test_events_that_1_0_9_would_not_hand_over_are_passed_over(backend):
    assert backend().process_event("LABEL_LINK_CREATED", {}, "1", {}) is None
