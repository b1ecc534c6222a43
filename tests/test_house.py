"""The house: imports go one way, only settings read the environment, docs name every command and setting."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ml_backend.settings import Settings
from tests.conftest import ROOT

ROOMS = {"model": set(), "active_learning": {"model"}, "ml_backend": {"model", "active_learning"}}
MODEL_MAY_IMPORT = {"numpy", "torch", "timm", "peft", "PIL", "cv2", "openvino", "safetensors"} | {  # docs/adr/0004
    *("scipy", "pycocotools", "tokenizers", "typer", "rich", "matplotlib"),  # docs/adr/0008
    "open_clip",  # docs/adr/0013
}
LEARNING_MAY_IMPORT = {"numpy", "torch", "PIL", "cv2", "safetensors", "accelerate", "typer", "rich"}
FILES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add((node.module or "").split(".")[0])
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_room_imports_upwards(path):
    room = path.relative_to(ROOT).parts[0]
    assert imports_of(path) & ROOMS.keys() <= ROOMS[room] | {room}


@pytest.mark.parametrize("path", [p for p in FILES if "model" in p.relative_to(ROOT).parts[0:1]], ids=lambda p: p.name)
def test_the_model_room_imports_nothing_of_the_outside_world(path):
    assert imports_of(path) - sys.stdlib_module_names - {"model"} <= MODEL_MAY_IMPORT


@pytest.mark.parametrize("path", sorted((ROOT / "active_learning").rglob("*.py")), ids=lambda p: p.name)
def test_the_learning_room_imports_nothing_of_the_outside_world(path):
    assert imports_of(path) - sys.stdlib_module_names - {"model", "active_learning"} <= LEARNING_MAY_IMPORT


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_settings_and_the_supervisor_see_the_environment(path):
    if path.name not in ("settings.py", "supervisor.py", "simulate.py"):  # these two hand it on to their children
        assert not re.search(r"\benviron\b|getenv", path.read_text())


def test_commands_that_need_no_model_do_not_load_torch():
    code = "import sys, ml_backend.settings, ml_backend.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_what_only_starts_and_watches_processes_does_not_load_numpy():
    code = "import sys, ml_backend.settings, ml_backend.supervisor; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_what_serves_clicks_loads_no_library_of_the_commands():
    code = (
        "import sys, ml_backend.app, ml_backend.service, model.light.segmenter, model.graco.segmenter;"
        "found = {'peft', 'scipy', 'pycocotools', 'matplotlib', 'accelerate', 'tensorboard', 'open_clip'};"
        "sys.exit(bool(found & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_every_setting_is_documented():
    text = (ROOT / "docs" / "settings.md").read_text()
    for name, field in Settings.model_fields.items():
        variable = name.upper() if name.startswith("label_studio") else f"GRACO_{name.upper()}"
        assert f"`{variable}`" in text, f"docs/settings.md does not name {variable}"
        assert field.description


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_every_command_has_help_and_is_in_the_readme(room):
    from typer.main import get_group

    app = importlib.import_module(f"{room}.__main__").app
    readme = (ROOT / "README.md").read_text()
    for name, command in get_group(app).commands.items():
        assert command.help, name
        assert f"python -m {room} {name}" in readme, name


def test_no_file_names_a_package_registry():
    listed = subprocess.run(
        ["git", "-c", "safe.directory=*", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    hosts = re.compile(
        "|".join(("py" + r"pi\.org", "python" + r"hosted\.org", "registry" + r"\.npmjs", "deb" + r"\.debian"))
    )
    for name in listed:
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml", ".txt", ".yml", ".sh", "") and path.is_file():
            assert not hosts.search(path.read_text(errors="replace")), name
