"""Every setting is read under its name, and a wrong one says so."""

from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from ml_backend.settings import Settings

SECRET_FILE = Path(__file__).resolve().with_name("secret_of_a_file.txt")
READ = {
    "GRACO_HOST": ("host", "0.0.0.0", "0.0.0.0"),
    "GRACO_PORT": ("port", "8080", 8080),
    "GRACO_THREADS": ("threads", "5", 5),
    "GRACO_CACHE_DIR": ("cache_dir", "/var/cache/graco", Path("/var/cache/graco")),
    "GRACO_DATA_DIR": ("data_dir", "/var/graco", Path("/var/graco")),
    "GRACO_WEB_PROCESSES": ("web_processes", "2", 2),
    "GRACO_SHARED_DIR": ("shared_dir", "/mnt/graco", Path("/mnt/graco")),
    "GRACO_LEDGER": ("ledger", "here", "here"),
    "LABEL_STUDIO_URL": ("label_studio_url", "https://ls.example/labels/", "https://ls.example/labels"),
    "LABEL_STUDIO_API_KEY": ("label_studio_api_key", "secret", "secret"),
    "LABEL_STUDIO_API_KEY_FILE": ("label_studio_api_key_file", str(SECRET_FILE), SECRET_FILE),
    "GRACO_AUTH": ("auth", "off", "off"),
    "GRACO_USERNAME": ("username", "ann", "ann"),
    "GRACO_PASSWORD": ("password", "password-of-ls", "password-of-ls"),
    "GRACO_PASSWORD_FILE": ("password_file", str(SECRET_FILE), SECRET_FILE),
    "GRACO_WEBHOOK_SECRET": ("webhook_secret", "secret-of-hooks", "secret-of-hooks"),
    "GRACO_WEBHOOK_SECRET_FILE": ("webhook_secret_file", str(SECRET_FILE), SECRET_FILE),
    "GRACO_ADMIN_PASSWORD": ("admin_password", "password-of-admin", "password-of-admin"),
    "GRACO_ADMIN_PASSWORD_FILE": ("admin_password_file", str(SECRET_FILE), SECRET_FILE),
    "GRACO_SESSION_SECRET": ("session_secret", "secret-of-sessions", "secret-of-sessions"),
    "GRACO_SESSION_SECRET_FILE": ("session_secret_file", str(SECRET_FILE), SECRET_FILE),
    "GRACO_PROXIES": ("proxies", "1", 1),
    "GRACO_REQUESTS_PER_MINUTE": ("requests_per_minute", "0", 0),
    "GRACO_REQUEST_MAX_TASKS": ("request_max_tasks", "9", 9),
    "GRACO_REQUEST_TIME_S": ("request_time_s", "5", 5.0),
    "GRACO_FAMILY": ("family", "graco", "graco"),
    "GRACO_WEIGHTS": ("weights", "sbd-vit-base", "sbd-vit-base"),
    "GRACO_SPEED": ("speed", "fast", "fast"),
    "GRACO_INPUT_SIZE": ("input_size", "672", 672),
    "GRACO_RQ_DASHBOARD_URL": ("rq_dashboard_url", "http://127.0.0.1:9181", "http://127.0.0.1:9181"),
    "GRACO_DEVICE": ("device", "cpu", "cpu"),
    "GRACO_ENCODER": ("encoder", "exact", "exact"),
    "GRACO_COMPUTE_THREADS": ("compute_threads", "2", 2),
    "GRACO_EMBEDDING_MEMORY_MB": ("embedding_memory_mb", "64", 64),
    "GRACO_EMBEDDING_DISK_MB": ("embedding_disk_mb", "0", 0),
    "GRACO_REMEMBERED_ANSWERS": ("remembered_answers", "500", 500),
    "GRACO_IMAGE_MAX_MB": ("image_max_mb", "7", 7),
    "GRACO_IMAGE_MAX_MEGAPIXELS": ("image_max_megapixels", "9", 9),
    "GRACO_IMAGE_TIMEOUT_S": ("image_timeout_s", "2.5", 2.5),
    "GRACO_IMAGE_TTL_S": ("image_ttl_s", "0", 0.0),
    "GRACO_ALLOW_HOSTS": ("allow_hosts", " nas.local, 10.0.0.0/8,", ("nas.local", "10.0.0.0/8")),
    "GRACO_REQUEST_MAX_MB": ("request_max_mb", "9", 9),
    "GRACO_ADAPTER": ("adapter", __file__, Path(__file__)),
    "GRACO_ADAPTER_LINE": ("adapter_line", "shared", "shared"),
    "GRACO_PROPOSE": ("propose", "12", 12),
    "GRACO_DEFAULT_GRANULARITY": ("default_granularity", "0.4", 0.4),
    "GRACO_PRELABEL": ("prelabel", "1", True),
    "GRACO_PRELABEL_LIMIT_S": ("prelabel_limit_s", "9", 9.0),
    "GRACO_RECONCILE_MINUTES": ("reconcile_minutes", "0", 0.0),
    "GRACO_NEXT_TASKS": ("next_tasks", "off", "off"),
    "GRACO_TRAIN_AFTER": ("train_after", "0", 0),
    "GRACO_TRAIN_EVERY_HOURS": ("train_every_hours", "1.5", 1.5),
    "GRACO_TRAIN_AT_NIGHT": ("train_at_night", "22-6", "22-6"),
    "GRACO_TRAIN_STEPS": ("train_steps", "9", 9),
    "GRACO_TRAIN_DEVICE": ("train_device", "auto", "auto"),
    "GRACO_TRAIN_THREADS": ("train_threads", "1", 1),
    "GRACO_TRAIN_MEMORY_MB": ("train_memory_mb", "0", 0),
    "GRACO_TRAIN_LIMIT_MINUTES": ("train_limit_minutes", "5", 5.0),
    "GRACO_TRAIN_TOO_FEW": ("train_too_few", "publish", "publish"),
    "GRACO_REDIS_URL": ("redis_url", "redis://r:6379/1", "redis://r:6379/1"),
    "GRACO_LOG_LEVEL": ("log_level", "DEBUG", "DEBUG"),
    "GRACO_LOG_JSON": ("log_json", "true", True),
}


def test_no_setting_is_missing_below():
    assert {field for field, _, _ in READ.values()} == set(Settings.model_fields)


@pytest.mark.parametrize("variable", READ)
def test_a_setting_is_read_under_its_name(monkeypatch, variable):
    field, text, value = READ[variable]
    monkeypatch.setenv(variable, text)
    got = getattr(Settings(), field)
    assert (got.get_secret_value() if isinstance(got, SecretStr) else got) == value
    if variable.endswith("_FILE"):
        secret = getattr(Settings(), field.removesuffix("_file"))
        assert secret.get_secret_value() == SECRET_FILE.read_text().strip()


@pytest.mark.parametrize("variable", READ)
def test_an_empty_variable_is_one_that_is_not_set(monkeypatch, variable):
    field = READ[variable][0]
    default = getattr(Settings(), field)
    monkeypatch.setenv(variable, "")
    assert getattr(Settings(), field) == default


@pytest.mark.parametrize(
    ("variable", "wrong"),
    [
        ("GRACO_PORT", "0"),
        ("GRACO_PORT", "http"),
        ("GRACO_THREADS", "1"),
        ("GRACO_DEVICE", "tpu"),
        ("GRACO_PROPOSE", "13"),
        ("GRACO_ADAPTER", "/no/such.safetensors"),
        ("GRACO_DEFAULT_GRANULARITY", "1.5"),
        ("GRACO_EMBEDDING_MEMORY_MB", "1"),
        ("GRACO_IMAGE_TIMEOUT_S", "0"),
        ("GRACO_LOG_LEVEL", "LOUD"),
        ("LABEL_STUDIO_URL", "ls.example"),
    ],
)
def test_a_wrong_value_is_refused(monkeypatch, variable, wrong):
    monkeypatch.setenv(variable, wrong)
    with pytest.raises(ValidationError):
        Settings()


def test_the_token_never_shows(monkeypatch):
    monkeypatch.setenv("LABEL_STUDIO_API_KEY", "canary-token")
    assert "canary-token" not in repr(Settings()) + str(Settings())


def test_a_redis_address_of_another_scheme_is_refused_and_its_password_not_shown(monkeypatch):
    monkeypatch.setenv("GRACO_REDIS_URL", "foo://user:canary@x")
    with pytest.raises(ValidationError, match="with its scheme"):
        Settings()
