"""Carry out docker/Dockerfile without a Docker engine: each stage is a tree of debootstrap's, each RUN runs in it.

    python -m tests.docker.without_engine build FOLDER [--build-arg NAME=VALUE] [--put FILE:PATH] [--env NAME=VALUE]
    python -m tests.docker.without_engine measure FOLDER

Needs root, debootstrap and the package indexes. `build` leaves the image's files in FOLDER/image and its configuration
in FOLDER/image.json. `measure` reports their size, starts the web process in them as the image's user on a
read-only root, and reports the time to its first answer. `--put` and `--env` stand in for what a place
without PyTorch's own wheels lacks; docs/docker.md says what was used.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests

from tests.conftest import ROOT
from tests.ml_backend.conftest import ask, click, picture

PASSWORD = "of-this-run-alone"

_SLIM = (  # as Debian's slim images leave out
    "path-exclude /usr/share/doc/*\npath-include /usr/share/doc/*/copyright\npath-exclude /usr/share/man/*\n"
    "path-exclude /usr/share/info/*\npath-exclude /usr/share/locale/*\npath-exclude /usr/share/lintian/*\n"
)


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction of a Dockerfile."""

    name: str
    text: str

    @property
    def flags(self) -> dict[str, str]:
        """What stands before the arguments: --from=build."""
        words = self.text.split()
        return dict(word[2:].split("=", 1) for word in words if word.startswith("--") and "=" in word)

    @property
    def words(self) -> list[str]:
        """The arguments, of a JSON list too."""
        if self.text.startswith("["):
            return list(json.loads(self.text))
        return [word for word in shlex.split(self.text) if not word.startswith("--")]


def read_dockerfile(path: Path) -> list[Instruction]:
    """Return the instructions, continued lines joined."""
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [Instruction(*line.strip().split(None, 1)) for line in joined]


@dataclass(slots=True)
class Stage:
    """A tree of files, and how a process in it is started."""

    tree: Path
    arguments: dict[str, str] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=lambda: {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin"})
    folder: str = "/"
    user: str = "0:0"
    config: dict[str, Any] = field(default_factory=dict)

    def run(self, command: str, extra: dict[str, str]) -> None:
        """Carry out a RUN in a mount namespace of its own."""
        env = [f"{name}={value}" for name, value in (self.arguments | self.env | extra).items()]
        inside = ["chroot", f"--userspec={self.user}", str(self.tree), "/usr/bin/env", "-i", *env]
        script = f"mount -t proc proc {self.tree}/proc && mount --rbind /sys {self.tree}/sys && exec " + shlex.join(
            [*inside, "/bin/sh", "-c", f"cd {self.folder} && {command}"]
        )
        subprocess.run(["unshare", "--mount", "--pid", "--fork", "sh", "-c", script], check=True)

    def copy(self, source: Path, target: str, mode: str | None) -> None:
        """Carry out a COPY of one path."""
        to = self.tree / target.lstrip("/")
        if target.endswith("/"):
            to = to / source.name
        to.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            skip = shutil.ignore_patterns("__pycache__") if source.is_relative_to(ROOT) else None
            shutil.copytree(source, to, symlinks=True, dirs_exist_ok=True, ignore=skip)
        else:
            shutil.copy2(source, to)
        if source.is_relative_to(ROOT):
            subprocess.run(["chown", "-R", "0:0", str(to)], check=True)
            subprocess.run(["chmod", "-R", "u=rwX,go=rX", str(to)], check=True)
        if mode:
            to.chmod(int(mode, 8))


def make_base(folder: Path) -> Path:
    """Return a tree like that of Debian's slim images, made once."""
    base = folder / "base"
    if not base.exists():
        draft = folder / "base.draft"
        shutil.rmtree(draft, ignore_errors=True)
        subprocess.run(["debootstrap", "--variant=minbase", "bookworm", str(draft)], check=True, stdout=sys.stderr)
        (draft / "etc/dpkg/dpkg.cfg.d/docker").write_text(_SLIM)
        (draft / "etc/apt/apt.conf.d/docker-clean").write_text(
            'DPkg::Post-Invoke { "rm -f /var/cache/apt/archives/*.deb /var/cache/apt/*.bin || true"; };\n'
        )
        script = (
            "find /usr/share/doc -type f ! -name copyright -delete; rm -rf /usr/share/man/* /usr/share/info/* "
            "/usr/share/locale/* /usr/share/lintian /var/lib/apt/lists/* /var/cache/apt/* /var/log/*.log"
        )
        subprocess.run(["chroot", str(draft), "/bin/sh", "-c", script], check=True)
        draft.rename(base)
    return base


def build(folder: Path, given: dict[str, str], put: list[tuple[Path, str]], extra: dict[str, str]) -> None:
    """Carry out the whole Dockerfile; the last stage becomes FOLDER/image."""
    folder.mkdir(parents=True, exist_ok=True)
    base = make_base(folder)
    stages: dict[str, Stage] = {}
    stage = Stage(Path("/nonexistent"))
    for number, instruction in enumerate(read_dockerfile(ROOT / "docker" / "Dockerfile")):
        name, words = instruction.name, instruction.words if instruction.name != "RUN" else []
        start = time.monotonic()
        if name == "FROM":
            called = words[-1] if len(words) == 3 else "image"
            stage = stages[called] = Stage(folder / called)
            shutil.rmtree(stage.tree, ignore_errors=True)
            subprocess.run(["cp", "-a", str(base), str(stage.tree)], check=True)
            shutil.copy("/etc/resolv.conf", stage.tree / "etc/resolv.conf")
            for source, target in put:
                stage.copy(source, target, None)
            subprocess.run(["chroot", str(stage.tree), "/sbin/ldconfig"], check=True)
        elif name == "ARG" and stages:
            variable, _, default = words[0].partition("=")
            if variable in given or "=" in words[0]:
                stage.arguments[variable] = given.get(variable, default)
        elif name == "ENV":
            stage.env |= dict(word.split("=", 1) for word in words)
        elif name == "RUN":
            stage.run(instruction.text, extra)
        elif name == "COPY":
            source_stage = instruction.flags.get("from")
            for source in words[:-1]:
                origin = stages[source_stage].tree / source.lstrip("/") if source_stage else ROOT / source
                stage.copy(origin, words[-1], instruction.flags.get("chmod"))
        elif name == "WORKDIR":
            stage.folder = words[0]
        elif name == "USER":
            stage.user = words[0]
        else:
            stage.config[name.lower()] = words
        print(f"{number:3d} {time.monotonic() - start:6.1f} s {name} {instruction.text[:90]}", flush=True)
    for place in (
        stage.tree / "tmp"
    ).iterdir():  # what was put there for the build; in an engine's build it stays outside
        subprocess.run(["rm", "-rf", str(place)], check=True)
    (folder / "image.json").write_text(
        json.dumps({"env": stage.env, "folder": stage.folder, "user": stage.user} | stage.config, indent=1)
    )


def start(folder: Path, data: Path, command: list[str], env: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start a process in the image: its user, its environment, a read-only root, /tmp in memory, /data as given."""
    tree, config = folder / "image", json.loads((folder / "image.json").read_text())
    variables = [f"{name}={value}" for name, value in (config["env"] | env).items()]
    uid, gid = config["user"].split(":")
    os.chown(data, int(uid), int(gid))
    script = (
        f"mount --bind {tree} {tree} && mount -t proc proc {tree}/proc && mount --rbind /sys {tree}/sys && "
        f"mount -t tmpfs tmpfs {tree}/tmp && chmod 1777 {tree}/tmp && mount --bind {data} {tree}/data && "
        f"mount -o remount,bind,ro {tree} && cd {tree} && exec "
    )
    wanted = [*config["entrypoint"], *command]
    inside = ["chroot", "--userspec", f"{uid}:{gid}", str(tree), "/usr/bin/env", "-i", *variables]
    script += shlex.join([*inside, "/bin/sh", "-c", f'cd {config["folder"]} && exec "$@"', "sh", *wanted])
    return subprocess.Popen(["unshare", "--mount", "sh", "-c", script])


def size_of(folder: Path) -> int:
    """Return the bytes of all files of the image, hard links once."""
    seen, total = set(), 0
    for parent, _, names in os.walk(folder / "image"):
        for name in names:
            status = os.lstat(os.path.join(parent, name))
            if (status.st_dev, status.st_ino) not in seen:
                seen.add((status.st_dev, status.st_ino))
                total += status.st_size
    return total


def first_click(url: str) -> int:
    """Click on a photo that travels with the request, and return how many regions are answered."""
    photo = "data:image/png;base64," + base64.b64encode(picture(640, 480)).decode()
    answer = requests.post(
        f"{url}/predict",
        json=ask(click(31, 40, size=(640, 480)), image=photo),
        auth=("label-studio", PASSWORD),
        timeout=60,
    )
    answer.raise_for_status()
    (result,) = answer.json()["results"]
    assert result["result"], result
    return len(result["result"])


def measure(folder: Path, port: int = 19790, rounds: int = 3) -> dict[str, Any]:
    """Return the image's bytes, and the seconds from the start of the web process to its first answered click."""
    found: dict[str, Any] = {"bytes": size_of(folder), "cold_start_s": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as data:
            began = time.monotonic()
            process = start(
                folder,
                Path(data),
                ["web"],
                {"GRACO_PORT": str(port), "GRACO_HOST": "127.0.0.1", "GRACO_PASSWORD": PASSWORD},
            )
            try:
                while True:
                    try:
                        requests.get(f"http://127.0.0.1:{port}/health", timeout=1).raise_for_status()
                        break
                    except requests.RequestException:
                        if process.poll() is not None or time.monotonic() - began > 120:
                            raise SystemExit("the web process did not start") from None
                        time.sleep(0.05)
                listening = time.monotonic() - began
                regions = first_click(f"http://127.0.0.1:{port}")
                found["cold_start_s"].append(round(time.monotonic() - began, 2))
                print(
                    f"listening after {listening:.2f} s, {regions} region answered after {found['cold_start_s'][-1]} s"
                )
            finally:
                process.send_signal(signal.SIGTERM)
                process.wait(30)
    return found


def main() -> None:
    """Carry out what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["build", "measure"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="of every RUN")
    parser.add_argument("--put", action="append", default=[], metavar="FILE:PATH", help="copied into every stage first")
    chosen = parser.parse_args()
    folder = chosen.folder.resolve()
    if chosen.action == "build":
        given, extra = (dict(item.split("=", 1) for item in items) for items in (chosen.build_arg, chosen.env))
        put = [(Path(source).resolve(), target) for source, target in (item.rsplit(":", 1) for item in chosen.put)]
        build(folder, given, put, extra)
    print(json.dumps(measure(folder)) if chosen.action == "measure" else json.dumps({"bytes": size_of(folder)}))


if __name__ == "__main__":
    main()
