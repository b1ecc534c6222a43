"""Every setting, read from the environment once at start; the only file that reads it.

Names are `GRACO_` + the field's name in capitals; Label Studio's address and token carry the names its users know.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AliasChoices, Field, SecretStr, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

_SECRETS = ("password", "webhook_secret", "admin_password", "session_secret")


class Settings(BaseSettings):
    """What an operator may choose; a wrong value stops the start with a sentence naming the variable."""

    model_config = SettingsConfigDict(
        env_prefix="GRACO_", env_ignore_empty=True, extra="ignore", frozen=True, hide_input_in_errors=True
    )

    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 lets other machines and containers in")
    port: int = Field(9090, ge=1, le=65535, description="port to listen on")
    threads: int = Field(16, ge=4, le=256, description="requests answered at a time; a quarter is kept for /health")
    data_dir: Path = Field(Path("data"), description="where embeddings, remembered answers and Redis keep their files")

    web_processes: int = Field(
        1, ge=1, le=64, description="processes that answer requests, each with a model of its own"
    )
    shared_dir: Path | None = Field(
        None, description="folder of adapters, trainings and embeddings that several machines see; none: data_dir"
    )

    cache_dir: Path = Field(
        Path("~/.cache/graco"), description="where the encoder compiled for this machine is kept; can be made again"
    )

    label_studio_url: str | None = Field(
        None,
        validation_alias=AliasChoices("LABEL_STUDIO_URL", "label_studio_url"),
        description="Label Studio's address as this backend reaches it, with its sub-path if it has one",
    )
    label_studio_api_key_file: Path | None = Field(
        None,
        validation_alias=AliasChoices("LABEL_STUDIO_API_KEY_FILE", "label_studio_api_key_file"),
        description="file that holds the token",
    )
    label_studio_api_key: SecretStr | None = Field(
        None,
        validate_default=True,
        validation_alias=AliasChoices("LABEL_STUDIO_API_KEY", "label_studio_api_key"),
        description="a Label Studio token, legacy or personal access, to read task images",
    )

    auth: Literal["on", "off"] = Field("on", description="whether requests need a password or secret; off: none does")
    username: str = Field(
        "label-studio", pattern=r"^[!-9;-~]+$", description="user that Label Studio gives with basic auth"
    )
    password_file: Path | None = Field(None, description="file that holds the password")
    password: SecretStr | None = Field(
        None, validate_default=True, description="password that Label Studio gives with basic auth; none: one is made"
    )
    webhook_secret_file: Path | None = Field(None, description="file that holds the webhook secret")
    webhook_secret: SecretStr | None = Field(
        None, validate_default=True, description="what webhooks carry as X-Graco-Secret; none: one is made"
    )
    admin_password_file: Path | None = Field(None, description="file that holds the admin's password")
    admin_password: SecretStr | None = Field(
        None, validate_default=True, description="opens the admin page, with the user admin; none: one is made"
    )
    session_secret_file: Path | None = Field(None, description="file that holds the session secret")
    session_secret: SecretStr | None = Field(
        None, validate_default=True, description="signs the admin page's sessions; none: one is made"
    )
    proxies: int = Field(0, ge=0, le=8, description="reverse proxies in front, whose X-Forwarded- headers are believed")
    requests_per_minute: int = Field(12_000, ge=0, description="requests answered to one address in a minute; 0: all")
    request_max_tasks: int = Field(5000, ge=1, description="tasks answered in one batch prediction")
    request_time_s: float = Field(
        60, ge=1, description="longest time for the body of a request to arrive; a second more for each MB it announces"
    )

    family: Literal["light", "graco"] = Field(
        "light", description="model: light, the default, or graco: published SimpleClick and GraCo checkpoints"
    )
    weights: str | None = Field(None, description="imported base that graco serves; none: the only one there is")
    speed: Literal["exact", "fast"] = Field(
        "exact", description="how graco runs: exact, as the published code answers, or fast, in half precision"
    )
    input_size: int = Field(
        0, ge=0, le=2016, description="side in pixels of what graco looks at, such as 672; 0: that of the weights"
    )

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the network runs")
    encoder: Literal["auto", "fast", "exact"] = Field(
        "auto", description="image encoder: fast (compiled for this CPU), exact (torch fp32), auto: fast where it works"
    )
    compute_threads: int = Field(0, ge=0, description="CPU threads of one network run; 0: one per core")
    adapter: Literal["bundled", "none"] | Path = Field(
        "bundled",
        description="granularity adapter: bundled (of graco: the imported one), none (base weights alone), or a file",
    )

    embedding_memory_mb: int = Field(256, ge=8, description="encoded images kept in memory")
    embedding_disk_mb: int = Field(3072, ge=0, description="encoded images kept on disk; 0: none")
    remembered_answers: int = Field(100_000, ge=100, description="answers remembered to tell corrected from accepted")

    image_max_mb: int = Field(100, ge=1, description="largest image file accepted")
    image_max_megapixels: int = Field(100, ge=1, description="largest image accepted, before it is decoded")
    image_timeout_s: float = Field(30, gt=0, description="longest time to fetch one image, redirects included")
    image_ttl_s: float = Field(3600, ge=0, description="how long a task's image is taken to be unchanged")
    allow_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="hosts or networks images may come from although private, comma separated: nas.local,10.0.0.0/8"
    )
    request_max_mb: int = Field(250, ge=1, description="largest request body accepted; drafts travel with each click")

    propose: int = Field(1, ge=1, description="proposals offered for one click without a level or phrase")
    default_granularity: float | None = Field(
        None, ge=0, le=1, description="granularity of the answer when the annotator gave neither one nor a known phrase"
    )
    prelabel: bool = Field(False, description="answer batch predictions with whole-image proposals instead of nothing")
    prelabel_limit_s: float = Field(60, gt=0, description="time for one batch prediction; Label Studio waits 100 s")

    adapter_line: Literal["project", "shared"] = Field(
        "project", description="whose corrections make whose adapter: project, each its own; shared, one for all"
    )

    train_after: int = Field(50, ge=0, description="new corrections that make a training due; 0: never by their number")
    train_every_hours: float = Field(0, ge=0, description="hours after which new corrections make one due; 0: never")
    train_at_night: str | None = Field(
        None,
        pattern=r"^([01]?\d|2[0-3])-([01]?\d|2[0-3])$",
        description="hours, UTC, of a thorough training once a night: 22-6",
    )
    train_steps: int = Field(0, ge=0, description="steps of a training; 0: by the number of corrected masks")
    train_device: Literal["auto", "cpu"] = Field(
        "cpu", description="where trainings run: cpu, or auto: a GPU if there is one"
    )
    train_threads: int = Field(
        0,
        ge=0,
        description="CPU threads of a training; 0: half of the cores, of fewer than 8 up to 4 while nobody clicks or "
        "computes. Set it where a quota gives fewer cores than the machine has",
    )
    train_memory_mb: int = Field(4096, ge=0, description="memory a training may hold while it learns; 0: no limit")
    train_limit_minutes: float = Field(180, gt=0, description="time a training may take before it is judged")
    train_too_few: Literal["ask", "publish"] = Field(
        "ask", description="too few held-out masks to judge by: ask the admin, or publish what is worse nowhere"
    )

    reconcile_minutes: float = Field(10, ge=0, description="minutes between looks for what webhooks lost; 0: never")

    next_tasks: Literal["on", "off"] = Field(
        "on", description="score unlabelled tasks by each new version, in projects that are on uncertainty sampling"
    )

    redis_url: str | None = Field(None, description="Redis to use; none: a bundled server under the data directory")
    ledger: Literal["here", "elsewhere"] = Field(
        "here", description="where corrections are kept: here, or by another machine's worker on the same Redis"
    )
    rq_dashboard_url: str | None = Field(
        None,
        pattern=r"^(https?://\S+|/[^/\s]\S*)$",
        description="where you run rq-dashboard; the admin page links to it",
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="how much is logged")
    log_json: bool = Field(False, description="log lines as JSON instead of readable text")

    def secrets(self) -> list[str]:
        """Return all passwords and tokens that are set, so that no log shows them."""
        values = (getattr(self, name) for name in type(self).model_fields)
        return [value.get_secret_value() for value in values if isinstance(value, SecretStr)]

    @property
    def shared(self) -> Path:
        """Where adapters, trainings and embeddings are: plain files that appear by rename, which machines can share."""
        return self.shared_dir or self.data_dir

    @field_validator("data_dir", "cache_dir", "shared_dir")
    @classmethod
    def _expand_home(cls, value: Path | None) -> Path | None:
        return None if value is None else value.expanduser()

    @field_validator("ledger")
    @classmethod
    def _check_ledger(cls, value: str, info: ValidationInfo) -> str:
        if value == "elsewhere" and not (info.data.get("redis_url") and info.data.get("shared_dir")):
            raise ValueError("one elsewhere is reached through GRACO_REDIS_URL and GRACO_SHARED_DIR: set both")
        return value

    @field_validator(*_SECRETS, "label_studio_api_key", mode="before")
    @classmethod
    def _read_file(cls, value: object, info: ValidationInfo) -> object:
        path = info.data.get(f"{info.field_name}_file")
        if path is None:
            return value
        if value is not None:
            raise ValueError("it is given, and a file for it as well: unset one of them")
        if not path.is_absolute():
            raise ValueError(f"give its file {path} with the whole path: processes run in several folders")
        try:
            return path.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"its file {path} cannot be read ({type(error).__name__})") from error

    @field_validator("username")
    @classmethod
    def _check_username(cls, value: str) -> str:
        if value == "admin":
            raise ValueError("admin is the admin's own user; give Label Studio another")
        return value

    @field_validator(*_SECRETS)
    @classmethod
    def _check_secret(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not re.fullmatch(r"[!-~]{12,200}", value.get_secret_value()):
            raise ValueError("it needs 12 to 200 ASCII letters, digits and signs, without spaces")
        return value

    @field_validator("adapter")
    @classmethod
    def _find_adapter(cls, value: str | Path) -> str | Path:
        if isinstance(value, str):
            return value
        path = value.expanduser().absolute()
        if not path.is_file():
            raise ValueError(f"there is no file {path}; give the file of an adapter, or bundled, or none")
        return path

    @field_validator("propose")
    @classmethod
    def _check_propose(cls, value: int) -> int:
        from model.types import MAX_PROPOSALS  # numpy comes with it, which processes that only wait shall not hold

        if value > MAX_PROPOSALS:
            raise ValueError(f"at most {MAX_PROPOSALS} masks are offered for one click")
        return value

    @field_validator("allow_hosts", mode="before")
    @classmethod
    def _split_hosts(cls, value: object) -> object:
        return tuple(h.strip() for h in value.split(",") if h.strip()) if isinstance(value, str) else value

    @field_validator("redis_url")
    @classmethod
    def _check_redis(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("redis://", "rediss://", "unix://")):
            raise ValueError("give it with its scheme: redis://host:6379/0, rediss://... or unix:///path")
        return value

    @field_validator("label_studio_url")
    @classmethod
    def _check_url(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("http://", "https://")):
            raise ValueError("give it with its scheme, such as http://127.0.0.1:8080")
        return value.rstrip("/") if value else None
