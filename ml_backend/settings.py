"""Every setting, read from the environment once at start; the only file that reads it.

Names are `GRACO_` + the field's name in capitals; Label Studio's address and token carry the names its users know.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AliasChoices, Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict


class Settings(BaseSettings):
    """What an operator may choose; a wrong value stops the start with a sentence naming the variable."""

    model_config = SettingsConfigDict(env_prefix="GRACO_", env_ignore_empty=True, extra="ignore", frozen=True)

    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 lets other machines and containers in")
    port: int = Field(9090, ge=1, le=65535, description="port to listen on")
    threads: int = Field(16, ge=4, le=256, description="requests answered at a time; a quarter is kept for /health")
    data_dir: Path = Field(Path("data"), description="where embeddings, remembered answers and Redis keep their files")

    cache_dir: Path = Field(
        Path("~/.cache/graco"), description="where the encoder compiled for this machine is kept; can be made again"
    )

    label_studio_url: str | None = Field(
        None,
        validation_alias=AliasChoices("LABEL_STUDIO_URL", "label_studio_url"),
        description="Label Studio's address as this backend reaches it, with its sub-path if it has one",
    )
    label_studio_api_key: SecretStr | None = Field(
        None,
        validation_alias=AliasChoices("LABEL_STUDIO_API_KEY", "label_studio_api_key"),
        description="a Label Studio token, legacy or personal access, to read task images",
    )

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the network runs")
    encoder: Literal["auto", "fast", "exact"] = Field(
        "auto", description="image encoder: fast (compiled for this CPU), exact (torch fp32), auto: fast where it works"
    )
    compute_threads: int = Field(0, ge=0, description="CPU threads of one network run; 0: one per core")
    adapter: Literal["bundled", "none"] | Path = Field(
        "bundled", description="granularity adapter: bundled, none (base weights alone), or the file of your own"
    )

    embedding_memory_mb: int = Field(256, ge=8, description="encoded images kept in memory")
    embedding_disk_mb: int = Field(2048, ge=0, description="encoded images kept on disk; 0: none")
    remembered_answers: int = Field(100_000, ge=100, description="answers remembered to tell corrected from accepted")

    image_max_mb: int = Field(100, ge=1, description="largest image file accepted")
    image_max_megapixels: int = Field(100, ge=1, description="largest image accepted, before it is decoded")
    image_timeout_s: float = Field(30, gt=0, description="longest time to fetch one image, redirects included")
    image_ttl_s: float = Field(3600, ge=0, description="how long a task's image is taken to be unchanged")
    allow_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="hosts or networks images may come from although private, comma separated: nas.local,10.0.0.0/8"
    )
    request_max_mb: int = Field(250, ge=1, description="largest request body accepted; drafts travel with each click")

    propose: int = Field(1, ge=1, le=10, description="proposals offered for one click without a level or phrase")
    default_granularity: float | None = Field(None, ge=0, le=1, description="granularity when the annotator gave none")
    prelabel: bool = Field(False, description="answer batch predictions with whole-image proposals instead of nothing")
    prelabel_limit_s: float = Field(60, gt=0, description="time for one batch prediction; Label Studio waits 100 s")

    adapter_line: Literal["project", "shared"] = Field(
        "project", description="whose corrections make whose adapter: project, each its own; shared, one for all"
    )

    train_after: int = Field(50, ge=0, description="new corrections that make a training due; 0: never by their number")
    train_every_hours: float = Field(0, ge=0, description="hours after which new corrections make one due; 0: never")
    train_at_night: str | None = Field(
        None, pattern=r"^([01]?\d|2[0-3])-([01]?\d|2[0-3])$", description="hours, UTC, to train in once a night: 22-6"
    )
    train_steps: int = Field(0, ge=0, description="steps of a training; 0: by the number of corrected masks")
    train_device: Literal["auto", "cpu"] = Field(
        "cpu", description="where trainings run: cpu, or auto: a GPU if there is one"
    )
    train_threads: int = Field(0, ge=0, description="CPU threads of a training; 0: half of the cores")
    train_memory_mb: int = Field(4096, ge=0, description="memory a training may take; 0: no limit")
    train_limit_minutes: float = Field(60, gt=0, description="time a training may take before it is judged")
    train_too_few: Literal["ask", "publish"] = Field(
        "ask", description="too few held-out masks to judge by: ask the admin, or publish what loses nowhere else"
    )

    reconcile_minutes: float = Field(10, ge=0, description="minutes between looks for what webhooks lost; 0: never")

    redis_url: str | None = Field(None, description="Redis to use; none: a bundled server under the data directory")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="how much is logged")
    log_json: bool = Field(False, description="log lines as JSON instead of readable text")

    @field_validator("data_dir", "cache_dir")
    @classmethod
    def _expand_home(cls, value: Path) -> Path:
        return value.expanduser()

    @field_validator("adapter")
    @classmethod
    def _find_adapter(cls, value: str | Path) -> str | Path:
        if isinstance(value, str):
            return value
        path = value.expanduser().absolute()
        if not path.is_file():
            raise ValueError(f"there is no file {path}; give the file of an adapter, or bundled, or none")
        return path

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
