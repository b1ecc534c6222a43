"""The commands, as an operator types them."""

import pytest
from typer.testing import CliRunner

import ml_backend.supervisor
from ml_backend.__main__ import app
from ml_backend.label_config import make_config
from model.types import Refusal
from tests.ml_backend.conftest import TOKEN


def run(*words):
    return CliRunner().invoke(app, list(words))


@pytest.mark.parametrize("command", ["run", "worker", "doctor"])
@pytest.mark.parametrize(
    ("variable", "wrong"),
    [
        ("GRACO_PORT", "ninety"),
        ("GRACO_DEFAULT_GRANULARITY", "7"),
        ("GRACO_ADAPTER", "/no/such.safetensors"),
        ("LABEL_STUDIO_URL", "ls.example"),
    ],
)
def test_a_wrong_setting_ends_the_command_with_a_line_naming_it(monkeypatch, command, variable, wrong):
    monkeypatch.setenv(variable, wrong)
    done = run(command)
    assert done.exit_code == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{variable}: ")
    assert (wrong in line) == (not variable.endswith("_URL")), "an address may hold a password"


def test_each_wrong_setting_gets_its_line_and_the_token_is_in_none(monkeypatch):
    monkeypatch.setenv("GRACO_PORT", "x")
    monkeypatch.setenv("GRACO_THREADS", "y")
    monkeypatch.setenv("LABEL_STUDIO_API_KEY", TOKEN)
    done = run("run")
    assert [line.partition(":")[0] for line in done.stderr.splitlines()] == ["GRACO_PORT", "GRACO_THREADS"]
    assert TOKEN not in done.output


@pytest.mark.parametrize(
    "words",
    [
        *(("corrections", "list"), ("corrections", "counts"), ("corrections", "show", "1", "--project", "3")),
        *(("corrections", "export", "{}/out"), ("corrections", "forget", "--project", "3", "--yes"), ("reconcile",)),
    ],
    ids=" ".join,
)
def test_what_needs_the_ledger_makes_none_where_it_is_elsewhere_and_says_where_to_run(monkeypatch, tmp_path, words):
    monkeypatch.setattr("ml_backend.logs.configure", lambda *args, **kwargs: None)
    for name, value in {
        **{"DATA_DIR": tmp_path / "data", "SHARED_DIR": tmp_path / "shared", "LEDGER": "elsewhere"},
        "REDIS_URL": "redis://127.0.0.1:1",
    }.items():
        monkeypatch.setenv(f"GRACO_{name}", str(value))
    done = run(*(word.format(tmp_path) for word in words))
    assert done.exit_code == 2
    assert "run this there, beside the worker" in done.stderr
    assert not list(tmp_path.rglob("*.sqlite"))


def test_run_ends_with_the_supervisors_status(monkeypatch):
    monkeypatch.setattr(ml_backend.supervisor, "run", lambda settings: 3)
    monkeypatch.setattr("ml_backend.logs.configure", lambda *args, **kwargs: None)
    assert run("run").exit_code == 3


def test_prepare_loads_what_will_be_served_and_fails_with_a_sentence_where_that_does_not_load(monkeypatch, tmp_path):
    asked = []

    def load(*args, **kwargs):
        asked.append(kwargs)
        raise Refusal("adapter mine.safetensors cannot be read")

    monkeypatch.setattr("ml_backend.families.load_segmenter", load)
    monkeypatch.setattr("ml_backend.logs.configure", lambda *args, **kwargs: None)
    (mine := tmp_path / "mine.safetensors").write_bytes(b"")
    monkeypatch.setenv("GRACO_ADAPTER", str(mine))
    done = run("prepare")
    assert (done.exit_code, asked[0]["adapter"]) == (1, mine)
    assert "cannot be read" in done.stderr


def test_no_command_prints_help():
    assert "label-config" in run().output


def test_label_config_prints_a_configuration_that_its_check_finds_nothing_wrong_with(tmp_path):
    printed = run("label-config", "Car", "Wheel", "--output", "polygon")
    assert (printed.exit_code, printed.output.strip()) == (0, make_config(["Car", "Wheel"], output="polygon").strip())
    file = tmp_path / "config.xml"
    file.write_text(printed.output)
    checked = run("label-config", "--check", str(file))
    assert checked.exit_code == 0
    assert "nothing to mend" in checked.output


@pytest.mark.parametrize("text", ["<View>", "<View><Image name='i' value='$i'/></View>", "\x00", ""])
def test_checking_a_bad_configuration_fails_with_a_sentence(tmp_path, text):
    file = tmp_path / "config.xml"
    file.write_text(text)
    checked = run("label-config", "--check", str(file))
    assert checked.exit_code == 1
    assert "error" in checked.output
    assert checked.exception is None or isinstance(checked.exception, SystemExit)


def test_checking_a_file_that_is_not_there_fails_with_a_sentence(tmp_path):
    checked = run("label-config", "--check", str(tmp_path / "no.xml"))
    assert checked.exit_code == 1
    assert "no.xml" in checked.output.replace("\n", "")


def test_naming_neither_classes_nor_a_file_says_so():
    done = run("label-config")
    assert done.exit_code == 2
    assert "name at least one class" in " ".join(done.output.split())


def test_a_class_given_twice_is_a_sentence_and_no_traceback():
    done = run("label-config", "Car", "Car")
    assert done.exit_code != 0
    assert isinstance(done.exception, SystemExit)


def test_a_label_with_brackets_is_shown_as_it_is_when_a_configuration_is_checked(tmp_path):
    file = tmp_path / "config.xml"
    file.write_text(make_config(["[/red]", "[bold]"]).replace('smartOnly="true"', ""))
    shown = CliRunner().invoke(app, ["label-config", "--check", str(file)])
    assert shown.exception is None or isinstance(shown.exception, SystemExit)
