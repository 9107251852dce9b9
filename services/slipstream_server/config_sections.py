"""What there is to set: the sections of the configuration, each setting with its default, its meaning and its range.

Declarations only: ``config`` fills them in and checks them against each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from slipstream_server.config_sources import setting

_MIB = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class CommonConfig:
    """What all services share."""

    data_dir: Path = setting(Path("~/.local/share/slipstream").expanduser(), "where everything that must survive lies")
    log_level: str = setting(
        "INFO", "least severe record that is logged", choices=("DEBUG", "INFO", "WARNING", "ERROR")
    )
    log_format: str = setting("auto", "auto: text at a terminal, else json", choices=("auto", "json", "text"))
    host: str = setting("127.0.0.1", "address to listen on")
    base_port: int = setting(
        50051, "port of inference; chat, training and adapters follow it; 0: any free ports", minimum=0, maximum=60_000
    )
    tls_cert: Path | None = setting(None, "PEM file with the server's certificate chain")
    tls_key: Path | None = setting(None, "PEM file with the certificate's key")
    tls_client_ca: Path | None = setting(None, "PEM file; clients must show a certificate signed by it")
    token_file: Path | None = setting(None, "file of bearer tokens, `TOKEN [NAME]` a line")
    insecure_listen: bool = setting(False, "allow listening beyond loopback without TLS and tokens")
    drain_grace_s: float = setting(30.0, "how long running calls may go on after SIGTERM", minimum=0, maximum=86_400)
    write_timeout_s: float = setting(30.0, "a stream not read for so long is ended", minimum=0.1, maximum=3_600)
    max_message_bytes: int = setting(16 * _MIB, "largest request message accepted", minimum=1024, maximum=1024 * _MIB)
    max_transport_message_bytes: int = setting(
        64 * _MIB, "largest message that is read at all", minimum=1024, maximum=2047 * _MIB
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceConfig:
    """What every service has; the port of a service follows from the common base where it is not set."""

    port: int | None = setting(None, "port; unset: by common.base_port", minimum=0, maximum=65_535)
    metrics_port: int | None = setting(None, "Prometheus port; unset: port + 1000", minimum=0, maximum=65_535)
    health_port: int | None = setting(None, "plaintext health-only port; unset: port + 2000", minimum=0, maximum=65_535)


@dataclass(frozen=True, slots=True, kw_only=True)
class InferenceConfig(ServiceConfig):
    """The inference front and its workers."""

    models: tuple[str, ...] = setting((), "models to load at start, and to keep loaded: SOURCE or NAME=SOURCE")
    database_url: str | None = setting(None, "SQLAlchemy URL of the list of models; unset: SQLite in data_dir")
    default_model: str | None = setting(None, "model of requests that name none; unset: the first of models")
    task_models: tuple[str, ...] = setting((), "models of task requests that name none: TASK=MODEL")
    model_roots: tuple[Path, ...] = setting((), "folders below which clients may name model folders")
    tokenizer: str | None = setting(None, "tokenizer source; unset: the model's own")
    device: str = setting("auto", "auto, cpu, cuda or cuda:N")
    device_map: str | None = setting(None, "transformers' device_map, as `auto` to spread over GPUs")
    dtype: str = setting("auto", "dtype of the weights", choices=("auto", "float32", "bfloat16", "float16"))
    quantization: str = setting(
        "none", "quantization at load, by bitsandbytes", choices=("none", "int8", "nf4", "fp4", "8bit", "4bit")
    )
    attention: str = setting(
        "auto",
        "attention implementation",
        choices=("auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"),
    )
    batching: str = setting(
        "auto",
        "how generation is batched; auto: continuous where the model can; null: no model runs, for measuring the rest",
        choices=("auto", "continuous", "padded", "null"),
    )
    max_batch_size: int | None = setting(
        None, "most sequences in one batch; unset: 64 where it is continuous, else 16", minimum=1, maximum=4_096
    )
    max_batch_tokens: int | None = setting(
        None,
        "tokens that a batch holds, padding included; unset: 32,768 where it is continuous, else 16,384",
        minimum=1,
        maximum=1 << 24,
    )
    max_step_tokens: int | None = setting(
        None,
        "most tokens in a step of a continuous batch or of tasks; unset: 256 and 1,024 on a CPU, else 2,048 and 16,384",
        minimum=1,
        maximum=1 << 20,
    )
    max_draft_tokens: int = setting(
        0, "tokens guessed from the text and verified in one step (prompt lookup); 0: none", minimum=0, maximum=64
    )
    prefix_caching: bool = setting(True, "keep keys and values of prompts for others that begin alike")
    max_queue_delay_ms: float = setting(5.0, "longest wait for a batch to fill", minimum=0, maximum=60_000)
    max_queued_requests: int = setting(1_024, "requests that may wait per model", minimum=1, maximum=1_000_000)
    max_queued_tokens: int = setting(1 << 20, "prompt tokens that may wait per model", minimum=1, maximum=1 << 32)
    memory_fraction: float = setting(0.9, "share of the device's memory that serving may use", minimum=0.01, maximum=1)
    memory_budget_bytes: int | None = setting(
        None, "memory that all models may hold together on each device; unset: memory_fraction of it", minimum=1 << 20
    )
    threads: int | None = setting(
        None, "CPU threads of a worker; unset: one for each core it may use", minimum=1, maximum=1_024
    )
    adapter_slots: int = setting(
        8, "adapters held on a model's device at once; 0: models are served without", minimum=0, maximum=1_024
    )
    max_adapter_rank: int = setting(64, "largest rank of an adapter that is served", minimum=1, maximum=1_024)
    adapters_address: str | None = setting(None, "HOST:PORT of the adapters service; unset: by common.base_port")
    adapters_tls_ca: Path | None = setting(None, "PEM file; speak TLS to adapters and trust this authority")
    adapters_token_file: Path | None = setting(None, "its first token is shown to adapters; unset: common.token_file")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatConfig(ServiceConfig):
    """The chat service."""

    database_url: str | None = setting(None, "SQLAlchemy URL; unset: SQLite in data_dir")
    inference_address: str | None = setting(None, "HOST:PORT of the inference service; unset: by common.base_port")
    inference_tls_ca: Path | None = setting(None, "PEM file; speak TLS to inference and trust this authority")
    inference_token_file: Path | None = setting(None, "its first token is shown to inference; unset: common.token_file")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig(ServiceConfig):
    """The training service."""

    database_url: str | None = setting(None, "SQLAlchemy URL; unset: SQLite in data_dir")
    max_running_jobs: int = setting(1, "jobs that may run at once", minimum=1, maximum=1_024)
    max_waiting_jobs: int = setting(1_000, "jobs that may wait", minimum=1, maximum=100_000)
    max_dataset_bytes: int = setting(1 << 30, "largest dataset accepted", minimum=1024, maximum=1 << 40)
    artifacts_url: str | None = setting(None, "fsspec URL of the store of datasets; unset: a folder in data_dir")
    keep_job_files_days: float = setting(
        30.0, "how long the checkpoints of jobs that ended are kept", minimum=0, maximum=36_500
    )
    import_roots: tuple[Path, ...] = setting((), "folders below which clients may name datasets and models")
    adapters_address: str | None = setting(None, "HOST:PORT of the adapters service; unset: by common.base_port")
    adapters_tls_ca: Path | None = setting(None, "PEM file; speak TLS to adapters and trust this authority")
    adapters_token_file: Path | None = setting(None, "its first token is shown to adapters; unset: common.token_file")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptersConfig(ServiceConfig):
    """The adapter registry."""

    database_url: str | None = setting(None, "SQLAlchemy URL; unset: SQLite in data_dir")
    artifacts_url: str | None = setting(None, "fsspec URL of the artifact store; unset: a folder in data_dir")
    import_roots: tuple[Path, ...] = setting((), "folders below which clients may name adapters")
    acknowledge_timeout_s: float = setting(
        5.0, "how long an alias change waits for the live resolvers", minimum=0, maximum=300
    )
