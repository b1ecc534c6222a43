"""Dockerfile, compose file, Kubernetes example, scripts: linted, checked against their schemas and our code."""

import itertools
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from typer.main import get_group

from ml_backend.__main__ import ProcessName, app
from ml_backend.settings import Settings
from tests.conftest import ROOT
from tests.docker.without_engine import read_dockerfile

DOCKER = ROOT / "docker"
DOCKERFILE = read_dockerfile(DOCKER / "Dockerfile")
COMPOSE = yaml.safe_load((DOCKER / "compose.yml").read_text())
SERVICES = COMPOSE["services"]
OURS = {name: one for name, one in SERVICES.items() if one["image"].startswith("graco-label-studio")}
MANIFESTS = [
    (path.name, document)
    for path in sorted((DOCKER / "kubernetes").glob("*.yaml"))
    for document in yaml.safe_load_all(path.read_text())
]
PODS = [(name, one["spec"]["template"]["spec"]) for name, one in MANIFESTS if "template" in one.get("spec", {})]
SCRIPTS = sorted(DOCKER.glob("*.sh"))
COMMANDS = get_group(app).commands


def tool(name, *args):
    found = shutil.which(name, path=str(Path(sys.executable).parent))
    assert found, f"{name} is not in the environment: tests/requirements.txt brings it"
    done = subprocess.run([found, *map(str, args)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def variables():
    """Names that Settings reads."""
    return {
        name.upper() if name.startswith("label_studio") else f"GRACO_{name.upper()}" for name in Settings.model_fields
    }


def assert_commands(words):
    """The entry point knows the command, and the command its options."""
    name, *rest = words
    if name not in list(ProcessName):
        options = {option for parameter in COMMANDS[name].params for option in parameter.opts}
        assert {word for word in rest if word.startswith("--")} <= options
    else:
        assert not rest


def test_hadolint_finds_nothing_in_the_dockerfile():
    tool("hadolint", "--failure-threshold", "info", DOCKER / "Dockerfile")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_shellcheck_finds_nothing_in_the_scripts(path):
    tool("shellcheck", "--severity", "style", path)


def test_the_image_has_a_pinned_base_a_user_of_its_own_and_a_health_check():
    by_name = {}
    for instruction in DOCKERFILE:
        by_name.setdefault(instruction.name, []).append(instruction)
    (base,) = (one.words[0].removeprefix("DEBIAN=") for one in by_name["ARG"] if one.text.startswith("DEBIAN="))
    assert re.fullmatch(r"debian:\d+\.\d+-slim", base)
    assert all(one.words[0] == "${DEBIAN}" for one in by_name["FROM"])
    assert by_name["USER"][-1].text == "10001:10001"
    assert '"health"' in by_name["HEALTHCHECK"][0].text
    assert by_name["ENTRYPOINT"][0].words == ["/opt/graco/entrypoint.sh"]
    assert by_name["CMD"][0].words == ["web"]


def test_no_secret_can_enter_a_layer():
    given = [one.text for one in DOCKERFILE if one.name in ("ARG", "ENV", "LABEL")]
    assert not [text for text in given if re.search("password|secret|token|api_key", text, re.IGNORECASE)]
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert next(line for line in ignored if line and not line.startswith("#")) == "*"


def test_what_the_dockerfile_copies_is_there_and_reaches_the_build():
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {
        source for one in DOCKERFILE if one.name == "COPY" and "from" not in one.flags for source in one.words[:-1]
    }
    assert copied == let_in
    assert all((ROOT / source).exists() for source in copied)


def test_requirements_are_pinned_and_those_of_the_dockerfile_are_the_makefiles():
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+(\[[a-z,]+\])?==[0-9][^ ]*", line) for line in lines)
    makefile = (ROOT / "Makefile").read_text()
    runs = " ".join(one.text for one in DOCKERFILE if one.name == "RUN")
    for pin in re.findall(r"[a-z0-9-]+==[0-9.]+", runs):
        assert pin in makefile or pin.startswith("uv=="), pin


def test_nothing_of_ours_that_is_in_the_image_imports_what_was_left_out():
    lines = (DOCKER / "excluded.txt").read_text().splitlines()
    names = {line.replace("-", "_") for line in lines if line and line[0] != "#"} | {"label_studio_ml"}
    names |= {"grpc"} if "grpcio" in names else set()
    for room in ("model", "active_learning", "ml_backend"):
        for path in (ROOT / room).rglob("*.py"):
            if path.name != "backend.py":  # for those who host the model with label-studio-ml
                imported = set(re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(), re.MULTILINE))
                assert not imported & names, path


def test_the_compose_file_obeys_the_compose_specification():
    tool("check-jsonschema", "--builtin-schema", "vendor.compose-spec", DOCKER / "compose.yml")


def test_every_image_has_a_version():
    images = [one["image"] for one in SERVICES.values()]
    images += [box["image"] for _, pod in PODS for box in pod["containers"] if box["image"] != "graco-label-studio"]
    for image in images:
        tag = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", image).partition(":")[2]
        assert re.search(r"\d", tag), image
        assert "latest" not in tag


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_locked_down_limited_and_watched(name):
    one = SERVICES[name]
    assert one["cap_drop"] == ["ALL"]
    assert one["security_opt"] == ["no-new-privileges:true"]
    assert one.get("read_only") or name == "label-studio"  # which writes into its own folders
    assert one["mem_limit"]
    assert one["pids_limit"]
    assert one["logging"]["options"]["max-size"]
    assert one["healthcheck"].get("test") or name in ("trainer", "trainer-gpu", "ready-project")
    for volume in one.get("volumes", []):
        assert volume.split(":")[0] in COMPOSE["volumes"]
    for wanted in one.get("depends_on", {}).values():
        assert wanted == {"condition": "service_healthy"}


@pytest.mark.parametrize("name", OURS)
def test_the_backends_services_name_commands_settings_and_secrets_that_there_are(name):
    one = OURS[name]
    assert_commands(one["command"])
    if test := one["healthcheck"].get("test"):
        assert test[:4] == ["CMD", "python", "-m", "ml_backend"]
        assert_commands(test[4:])
    assert one["environment"].keys() <= variables()
    files = {Path(value).name for key, value in one["environment"].items() if key.endswith("_FILE")}
    assert files == set(one["secrets"])
    assert files <= COMPOSE["secrets"].keys()


@pytest.mark.parametrize("suffix", ["", "-gpu"])
def test_web_process_and_worker_of_a_profile_encode_on_the_same_device(suffix):
    web, worker = SERVICES[f"web{suffix}"], SERVICES[f"worker{suffix}"]
    assert web["environment"]["GRACO_DEVICE"] == worker["environment"]["GRACO_DEVICE"] == ("cuda" if suffix else "cpu")
    assert web.get("profiles") == worker.get("profiles") == (["gpu"] if suffix else None)
    assert web.get("deploy") == worker.get("deploy")
    assert web["image"] == worker["image"]


def test_the_profile_for_a_gpu_replaces_every_service_that_computes():
    replaced = {name.removesuffix("-gpu") for name, one in SERVICES.items() if one.get("profiles") == ["gpu"]}
    assert replaced == {"web", "worker", "trainer"}
    scales = " ".join(f"--scale {name}=0" for name in SERVICES if name in replaced)
    for text in ((DOCKER / "compose.yml").read_text(), (ROOT / "docs" / "docker.md").read_text()):
        assert re.search(rf"docker compose --profile gpu up -d (--build )?{scales}", text)


def test_label_studio_lets_a_backend_on_a_private_address_in():
    settings = SERVICES["label-studio"]["environment"]
    assert settings["LABEL_STUDIO_ML_BLOCK_LOCAL_IP"] == "false"
    assert settings["LABEL_STUDIO_SSRF_PROTECTION_ENABLED"] == "false"
    assert settings["LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN"] == "true"


def test_prometheus_asks_the_web_service_at_its_port_with_the_password_that_it_mounts():
    job = yaml.safe_load((DOCKER / "prometheus.yml").read_text())["scrape_configs"][0]
    guide = (ROOT / "docs" / "observability.md").read_text()
    for target in job["static_configs"][0]["targets"]:
        name, _, port = target.partition(":")
        assert SERVICES[name]["command"] == ["web"]
        assert SERVICES[name]["ports"][0].endswith(f":{port}")
        assert f'targets: ["{target}"]' in guide
    assert job["basic_auth"]["username"] == Settings.model_fields["username"].default
    assert job["basic_auth"]["password_file"] == SERVICES["web"]["environment"]["GRACO_PASSWORD_FILE"]


def test_a_missing_trainer_wakes_somebody_up_after_minutes_not_at_once():
    rules = yaml.safe_load((DOCKER / "prometheus-alerts.yml").read_text())["groups"][0]["rules"]
    (rule,) = (rule for rule in rules if 'graco_workers{queue="training"}' in rule["expr"])
    assert rule["expr"].endswith("< 1")
    assert re.fullmatch(r"\d+m", rule["for"])


def test_redis_keeps_an_append_only_file_and_is_reached_by_the_backend_alone():
    assert SERVICES["redis"]["command"][:3] == ["redis-server", "--appendonly", "yes"]
    assert SERVICES["redis"]["networks"] == ["backend"]
    assert "ports" not in SERVICES["redis"]
    assert COMPOSE["networks"]["backend"] == {"internal": True}
    assert "backend" not in SERVICES["label-studio"]["networks"]


def test_redis_refuses_what_is_new_before_its_memory_limit_kills_it():
    (box,) = (pod["containers"][0] for name, pod in PODS if name == "redis.yaml")
    redis = SERVICES["redis"]
    for command, limit in (
        (redis["command"], redis["mem_limit"]),
        (box["args"], box["resources"]["limits"]["memory"].replace("Mi", "m")),
    ):
        options = dict(itertools.pairwise(command))
        assert options["--maxmemory-policy"] == "noeviction"
        # The rest is for the second copy of pages written to while the file is rewritten
        assert 0 < int(options["--maxmemory"].removesuffix("mb")) <= 0.75 * int(limit.removesuffix("m"))


def test_secrets_are_made_once_and_are_those_that_compose_mounts(tmp_path):
    script = shutil.copy(DOCKER / "make_secrets.sh", tmp_path)
    subprocess.run(["sh", script], check=True, capture_output=True)
    made = {path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()}
    assert {f"./secrets/{name}" for name in made} == {one["file"] for one in COMPOSE["secrets"].values()}
    assert all(re.fullmatch("[0-9a-f]{40}", value) for value in made.values())
    assert len(set(made.values())) == len(made)
    assert stat.S_IMODE((tmp_path / "secrets").stat().st_mode) == 0o700
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "secrets").iterdir()}
    assert modes == {0o644}, "the container's user reads them, and the guide has their owner write into them"
    subprocess.run(["sh", script], check=True, capture_output=True)
    assert made == {path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()}


@pytest.mark.parametrize(("name", "document"), MANIFESTS, ids=[f"{n}-{d['kind']}" for n, d in MANIFESTS])
def test_kubernetes_manifests_obey_their_schema(name, document):
    if document["kind"] != "Kustomization":
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
    else:
        assert {path.name for path in (DOCKER / "kubernetes").glob("*.yaml")} == {name, *document["resources"]}


@pytest.mark.parametrize(("name", "pod"), PODS, ids=[f"{n}-{p['containers'][0]['name']}" for n, p in PODS])
def test_kubernetes_pods_are_locked_down_limited_and_name_what_there_is(name, pod):
    (box,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert box["securityContext"] == {
        **{"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True},
        "capabilities": {"drop": ["ALL"]},
    }
    assert box["resources"]["limits"]["memory"]
    if box["image"] == "graco-label-studio":
        assert pod["enableServiceLinks"] is False, "variables of services are none of our settings"
        assert_commands(box["args"])
        assert {one["name"] for one in box["env"]} <= variables()
        assert {one["mountPath"] for one in box["volumeMounts"]} == {"/data", "/shared", "/tmp", "/run/secrets/graco"}


def test_kubernetes_settings_are_settings_and_web_pods_are_probed_alive_and_able_to_answer():
    config = next(one["data"] for _, one in MANIFESTS if one["kind"] == "ConfigMap")
    assert config.keys() <= variables()
    mounted = {Path(value).name for key, value in config.items() if key.endswith("_FILE")}
    assert mounted == {name for one in OURS.values() for name in one["secrets"]}
    own = [one["name"] for _, pod in PODS for box in pod["containers"] for one in box.get("env", [])]
    assert "GRACO_DEVICE" not in own, "web pods and worker share the device of shared.yaml"
    (web,) = (pod["containers"][0] for name, pod in PODS if name == "web.yaml")
    assert web["livenessProbe"]["httpGet"]["path"] == "/health"
    assert web["readinessProbe"]["httpGet"]["path"] == "/health?ready=model"


def test_in_kubernetes_corrections_are_looked_at_in_the_pod_that_keeps_them():
    settings = {
        one["metadata"]["name"]: {item["name"] for item in one["spec"]["template"]["spec"]["containers"][0]["env"]}
        for name, one in MANIFESTS
        if name in ("web.yaml", "training.yaml") and one["kind"] in ("Deployment", "StatefulSet")
    }
    for text in ((ROOT / "docs" / "docker.md").read_text(), (ROOT / "ml_backend" / "command_line.py").read_text()):
        (name,) = re.findall(r"exec deploy/(\S+) -- python -m ml_backend corrections list", text)
        assert "GRACO_LEDGER" not in settings[name]
    assert "GRACO_LEDGER" in settings["graco-web"]


def test_the_guide_names_every_file_and_what_was_not_run():
    text = (ROOT / "docs" / "docker.md").read_text()
    for path in [*SCRIPTS, DOCKER / "compose.yml", *(DOCKER / "kubernetes").glob("*.yaml")]:
        assert path.name in text or path.parent.name in text, path
    for name in re.findall(r"`((?:GRACO|LABEL_STUDIO)_[A-Z_]+)", text):
        assert name in variables() or name in (DOCKER / "compose.yml").read_text(), name
    assert "Not run:" in text
