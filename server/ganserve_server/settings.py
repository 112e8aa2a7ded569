"""The server's settings: each is a flag and an environment variable."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

AccessLog = Literal["off", "errors", "all"]
ENVIRONMENT_PREFIX = "GANSERVE_SERVER_"
BUNDLED_MODELS = Path(__file__).parent / "models"


class ServerSettings(BaseSettings):
    """Flags go before environment variables, these before the defaults. Unknown values are errors."""

    model_config = SettingsConfigDict(env_prefix=ENVIRONMENT_PREFIX, frozen=True, env_ignore_empty=True)

    models: Annotated[Path, Field(description="Model repository: MODELS/NAME/VERSION/model.onnx.")] = BUNDLED_MODELS
    versions: Annotated[
        str,
        Field(
            pattern="^(all|latest|[1-9][0-9]{0,8})$",
            description="Which versions of a model to serve: all, latest, or so many of the newest.",
        ),
    ] = "all"
    reload: Annotated[
        Literal["watch", "off"],
        Field(description="When to load new versions and drop removed ones: watch (as it happens) or off (on SIGHUP)."),
    ] = "watch"
    address: Annotated[str, Field(description="Where to answer gRPC, HOST:PORT; port 0 takes a free one.")] = (
        "127.0.0.1:50051"
    )
    metrics_address: Annotated[
        str, Field(description="Where to answer Prometheus, HOST:PORT; port 0 takes a free one; 'off' for none.")
    ] = "127.0.0.1:9464"
    admin_address: Annotated[
        str,
        Field(description="Where to answer AdministrationService (load, unload, reload), HOST:PORT; 'off' for none."),
    ] = "off"
    workers: Annotated[
        str,
        Field(
            pattern="^(auto|[1-9][0-9]{0,2})$",
            description="Processes that answer calls: so many, or auto (a quarter of the cores; one on a GPU).",
        ),
    ] = "auto"
    provider: Annotated[
        Literal["auto", "cuda", "tensorrt", "cpu"],
        Field(
            description="Where to compute: auto (CUDA if it works, else the CPU), cuda or tensorrt (only that), cpu."
        ),
    ] = "auto"
    gpu_device: Annotated[int, Field(ge=0, le=1023, description="Which GPU, by CUDA's number.")] = 0
    gpu_mem_limit_mib: Annotated[
        int, Field(ge=0, description="Memory that one model version may take on the GPU; 0: no limit.")
    ] = 0
    tensorrt_cache: Annotated[
        str,
        Field(
            description="Folder where TensorRT keeps the engines it builds; without one it builds them at every start."
        ),
    ] = ""
    threads: Annotated[
        int, Field(ge=0, le=1024, description="Threads a model computes with on the CPU; 0: one a core.")
    ] = 0
    max_batch_size: Annotated[int, Field(ge=1, le=4096, description="Images an engine makes at once, at most.")] = 64
    max_queue_images: Annotated[
        int, Field(ge=1, description="Images that may wait for one model; a request beyond is refused.")
    ] = 4096
    max_images_per_request: Annotated[int, Field(ge=1, description="Images in one GenerateImages call.")] = 1024
    max_images_per_stream: Annotated[int, Field(ge=1, description="Images in one StreamImages call.")] = 10_000_000
    max_connections: Annotated[int, Field(ge=1, description="Connections at a time; one more is closed at once.")] = (
        10_000
    )
    max_calls_per_connection: Annotated[
        int, Field(ge=1, le=1_000_000, description="Calls at a time on one connection; a client keeps more waiting.")
    ] = 1000
    max_model_mib: Annotated[int, Field(ge=1, description="Size of a model file; a larger one is not loaded.")] = 512
    drain_delay_s: Annotated[
        float,
        Field(ge=0, le=3600, description="After SIGTERM: report NOT_SERVING and serve on this long, then refuse."),
    ] = 0.0
    drain_timeout_s: Annotated[
        float, Field(ge=0, le=3600, description="After that: how long running calls may take to finish.")
    ] = 30.0
    log_format: Annotated[
        Literal["auto", "json", "console"],
        Field(description="json (a line an event), console, or auto: console on a terminal, else json."),
    ] = "auto"
    access_log: Annotated[
        AccessLog,
        Field(description="Which calls to log: off, errors (not those whose caller left) or all."),
    ] = "errors"
