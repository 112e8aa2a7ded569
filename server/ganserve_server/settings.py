"""The server's settings: each is a flag, an environment variable and a key of a TOML file."""

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ganserve_server.spelling import nearest
from ganserve_server.start_errors import SettingsError
from ganserve_server.transport.limits import Limits

AccessLog = Literal["off", "errors", "all"]
ENVIRONMENT_PREFIX = "GANSERVE_SERVER_"
CONFIG_VARIABLE = ENVIRONMENT_PREFIX + "CONFIG"
BUNDLED_MODELS = Path(__file__).parent / "models"
_TIMEOUTS_OF_OWN = ("handshake_timeout_s", "header_timeout_s", "body_timeout_s", "write_timeout_s")
_PATHS = (
    *("models", "tls_certificate_file", "tls_key_file", "tls_client_ca_file", "tokens_file", "tensorrt_cache"),
    "state_dir",
)
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/")  # Path("s3://b") is "s3:/b"
_MOST_THREADS = 64  # or the number of cores, if that is larger
_MOST_MODEL_MIB = 2048  # protobuf reads no larger message
# Variables that Kubernetes and Docker set in every container for a service called ganserve-server, or ganserve-server-…
_OF_SERVICE_LINKS = re.compile(r"(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP)(_\w+)?)?)")


class ServerSettings(BaseModel):
    """All settings of the server. Unknown keys and wrong values are errors."""

    # In a file, `workers = 2` is as valid as `workers = "2"`.
    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)

    models: Annotated[Path, Field(description="Model repository: MODELS/NAME/VERSION/model.onnx.")] = BUNDLED_MODELS
    versions: Annotated[
        str,
        Field(
            description="Which versions of a model to serve: all, latest, or a number N for the N newest.",
        ),
    ] = "all"
    reload: Annotated[
        Literal["watch", "off"],
        Field(
            description="When to load new versions and unload removed ones: watch (when files change) or off "
            "(on SIGHUP)."
        ),
    ] = "watch"
    reload_interval_s: Annotated[
        float,
        Field(
            ge=0.1,
            le=86_400,
            description="Time between looks at the repository with --reload watch, besides those at changes that the "
            "kernel reports.",
        ),
    ] = 30.0
    address: Annotated[str, Field(description="Address for gRPC, HOST:PORT; port 0 selects a free port.")] = (
        "127.0.0.1:50051"
    )
    transport: Annotated[
        Literal["own", "grpcio"],
        Field(
            description="HTTP/2 implementation: own, or grpcio, which needs several times as much CPU for each "
            "call and ignores the handshake, header, body and write timeouts."
        ),
    ] = "own"
    metrics_address: Annotated[
        str, Field(description="Address for Prometheus, HOST:PORT; port 0 selects a free port; 'off' for none.")
    ] = "127.0.0.1:9464"
    admin_address: Annotated[
        str,
        Field(description="Address for AdministrationService (load, unload, reload), HOST:PORT; 'off' for none."),
    ] = "off"
    tls_certificate_file: Annotated[
        str,
        Field(
            description="Certificate chain (PEM). Turns TLS on for calls. The server reads it again when it changes."
        ),
    ] = ""
    tls_key_file: Annotated[str, Field(description="Key of the certificate (PEM, not encrypted).")] = ""
    tls_client_ca_file: Annotated[
        str,
        Field(
            description="Certificate authorities (PEM) for mutual TLS: callers must have a certificate that "
            "one of them signed."
        ),
    ] = ""
    tokens_file: Annotated[
        str,
        Field(
            description="File of the tokens that callers must send, as `ganserve-server token` writes it; "
            "without it, anyone may call."
        ),
    ] = ""
    reflection: Annotated[
        Literal["on", "off"],
        Field(description="Whether callers may list the services and their messages (server reflection)."),
    ] = "on"
    workers: Annotated[
        str,
        Field(
            description="Number of processes that answer calls, or auto: a quarter of the cores, but only one "
            "on a GPU or if memory is short.",
        ),
    ] = "auto"
    provider: Annotated[
        Literal["auto", "cuda", "tensorrt", "cpu"],
        Field(
            description="Where to compute: auto (CUDA if it works, otherwise the CPU), cuda or tensorrt (no "
            "fallback to the CPU), or cpu."
        ),
    ] = "auto"
    gpu_device: Annotated[int, Field(ge=0, le=1023, description="CUDA's number of the GPU to use.")] = 0
    gpu_mem_limit_mib: Annotated[
        int, Field(ge=0, le=1 << 24, description="Memory that one model version may take on the GPU; 0: no limit.")
    ] = 0
    tensorrt_cache: Annotated[
        str,
        Field(
            description="Folder where TensorRT keeps the engines it builds; without one it builds them at every start."
        ),
    ] = ""
    threads: Annotated[
        int, Field(ge=0, description="Threads that a model computes with on the CPU; 0: one for each core.")
    ] = 0
    max_batch_size: Annotated[
        int, Field(ge=1, le=4096, description="Maximum number of images that an engine makes at once.")
    ] = 64
    batch_memory_mib: Annotated[
        int,
        Field(
            ge=1,
            le=1 << 24,
            description="Memory that the images which one core makes at once may take; a single image may take more.",
        ),
    ] = 256
    batch_timeout_s: Annotated[
        float,
        Field(
            ge=0.1,
            le=86_400,
            description="Time of one batch; a version whose batch takes longer is taken out of service. An image may "
            "take half of it on an idle core.",
        ),
    ] = 6.0
    max_queue_images: Annotated[
        int,
        Field(
            ge=1,
            description="Maximum number of images that wait for one model in each worker; the server refuses "
            "further requests.",
        ),
    ] = 4096
    max_images_per_request: Annotated[
        int, Field(ge=1, description="Maximum number of images in one GenerateImages call.")
    ] = 1024
    max_images_per_stream: Annotated[
        int, Field(ge=1, description="Maximum number of images in one StreamImages call.")
    ] = 10_000_000
    max_connections: Annotated[
        int,
        Field(
            ge=1,
            description="Maximum number of connections in each worker; a new connection beyond it replaces an "
            "idle one or is closed.",
        ),
    ] = 2000
    max_calls_per_connection: Annotated[
        int,
        Field(
            ge=1,
            le=1_000_000,
            description="Maximum number of calls at a time on one connection; the client lets further calls wait.",
        ),
    ] = 1000
    max_connection_age_s: Annotated[
        float,
        Field(
            ge=0,
            le=31_536_000,
            description="Age (varied by up to 10 %) at which a connection accepts no more calls and ends; 0: never.",
        ),
    ] = 0.0
    handshake_timeout_s: Annotated[
        float, Field(ge=0.1, le=3600, description="Time for a new connection's TLS and HTTP/2 handshakes.")
    ] = 10.0
    header_timeout_s: Annotated[
        float, Field(ge=0.1, le=3600, description="Time for the rest of a request's headers.")
    ] = 10.0
    body_timeout_s: Annotated[
        float,
        Field(
            ge=0,
            le=86_400,
            description="Time for each message to arrive, the first one from the call's headers on; 0: no limit.",
        ),
    ] = 60.0
    write_timeout_s: Annotated[
        float,
        Field(ge=0, le=86_400, description="Time in which a client must read a part of an answer; 0: no limit."),
    ] = 300.0
    idle_timeout_s: Annotated[
        float,
        Field(ge=0, le=31_536_000, description="Time without a call after which a connection ends; 0: no limit."),
    ] = 1800.0
    max_model_mib: Annotated[
        int,
        Field(
            ge=1, le=_MOST_MODEL_MIB, description="Maximum size of a model file; the server does not load a larger one."
        ),
    ] = 512
    load_timeout_s: Annotated[
        float,
        Field(
            ge=1,
            le=86_400,
            description="Time in which a model file must be checked, and then opened; a file that takes longer is "
            "rejected.",
        ),
    ] = 60.0
    state_dir: Annotated[
        str,
        Field(
            description="Folder that records which model files passed the checks, and which ones ended a process; "
            "without it, ganserve in the user's folder of states ($XDG_STATE_HOME).",
        ),
    ] = ""
    drain_delay_s: Annotated[
        float,
        Field(
            ge=0,
            le=3600,
            description="Time after SIGTERM in which the server reports NOT_SERVING but still accepts calls.",
        ),
    ] = 0.0
    drain_timeout_s: Annotated[
        float, Field(ge=0, le=3600, description="Time after the drain delay in which running calls can finish.")
    ] = 30.0
    stuck_timeout_s: Annotated[
        float,
        Field(
            ge=2,
            le=3600,
            description="Time for which an event loop may stand still; then the worker is replaced, or the only "
            "process ends with status 3.",
        ),
    ] = 5.0
    log_format: Annotated[
        Literal["auto", "json", "console"],
        Field(description="json (one line for each event), console, or auto: console on a terminal, otherwise json."),
    ] = "auto"
    access_log: Annotated[
        AccessLog,
        Field(
            description="Which calls to log: off, errors (without calls that the caller cancelled; at most 100 "
            "of a kind per second and worker) or all."
        ),
    ] = "errors"

    @property
    def limits(self) -> Limits:
        """The limits of the transport that are settings."""
        return Limits(
            max_connections=self.max_connections,
            max_streams=self.max_calls_per_connection,
            handshake_timeout_s=self.handshake_timeout_s,
            header_timeout_s=self.header_timeout_s,
            body_timeout_s=self.body_timeout_s,
            write_timeout_s=self.write_timeout_s,
            idle_timeout_s=self.idle_timeout_s,
            max_connection_age_s=self.max_connection_age_s,
        )

    @property
    def without_effect(self) -> str:
        """Name the settings that differ from their defaults and that the transport does not have; empty: none."""
        changed = [name for name in _TIMEOUTS_OF_OWN if getattr(self, name) != type(self).model_fields[name].default]
        return ", ".join(changed) if self.transport == "grpcio" else ""

    @property
    def most_versions(self) -> int | None:
        """How many versions of a model to serve: the N newest valid ones; None: all."""
        return {"all": None, "latest": 1}[self.versions] if self.versions.isalpha() else int(self.versions)

    @field_validator("versions")
    @classmethod
    def _all_latest_or_a_number(cls, versions: str) -> str:
        if not re.fullmatch("all|latest|[1-9][0-9]{0,8}", versions):
            raise ValueError("it must be all, latest, or a whole number from 1 to 999999999")
        return versions

    @field_validator("workers")
    @classmethod
    def _auto_or_a_number(cls, workers: str) -> str:
        if not re.fullmatch("auto|[1-9][0-9]{0,2}", workers):
            raise ValueError("it must be auto, or a whole number from 1 to 999")
        return workers

    @field_validator("threads")
    @classmethod
    def _bounded(cls, threads: int) -> int:
        """Reject more threads than the machine could run: while a model is loaded, there are twice as many."""
        machine = os.cpu_count() or 1
        if threads > (most := max(_MOST_THREADS, machine)):
            raise ValueError(
                f"this machine has {machine} cores, so a server may have at most {most} threads; 0 means one for each "
                "core"
            )
        return threads

    @field_validator(*_PATHS)
    @classmethod
    def _absolute(cls, path: str | Path) -> str | Path:
        """Make paths absolute, so that they name the same file wherever the value is used."""
        if "\0" in str(path):
            raise ValueError("a path cannot contain a NUL character")
        if url := _URL.match(str(path)):
            raise ValueError(
                f"it must be a path on this machine, not a {url[1]}:// URL: mount the store, or copy the files first"
            )
        absolute = Path(path).absolute()
        return absolute if isinstance(path, Path) else path and str(absolute)


def read_config(file: str) -> dict[str, Any]:
    """Read a TOML file; its paths are relative to the file's folder.

    Raises:
        SettingsError: it cannot be read.
    """
    try:
        content = tomllib.loads(Path(file).read_text("utf-8"))
    except OSError as error:
        raise SettingsError(f"{file} (--config) cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"{file} (--config) is not TOML: {error}") from error
    here = Path(file).absolute().parent
    return {
        key: str(here / value)
        if key in _PATHS and value and isinstance(value, str) and not _URL.match(value)
        else value
        for key, value in content.items()
    }


def check_config(content: Mapping[str, Any], file: str) -> None:
    """Check that a configuration file has only known settings.

    Raises:
        SettingsError: it has an unknown setting, or a value of a wrong type.
    """
    for key, value in content.items():
        if key not in ServerSettings.model_fields:
            hint = "; settings must not be in a table" if isinstance(value, dict) else nearest(key, _names())
            raise SettingsError(f"{file} has the key {key!r}, which is not a setting{hint}")
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            kind = {dict: "a table", list: "an array", bool: "a boolean"}.get(type(value), "a date or a time")
            raise SettingsError(f'{file}: {key} is {kind}; it must be a number or a text in quotes, such as "off"')


def check_environment(environment: Mapping[str, str] = os.environ) -> None:
    """Check that the environment has no unknown variables with this program's prefix.

    Raises:
        SettingsError: it has an unknown variable.
    """
    known = [(ENVIRONMENT_PREFIX + name).upper() for name in _names()] + [CONFIG_VARIABLE]
    unknown = sorted(name for name in environment if name.startswith(ENVIRONMENT_PREFIX) and name not in known)
    services = {name.removesuffix("SERVICE_HOST") for name in unknown if name.endswith("_SERVICE_HOST")}
    for name in unknown:
        if not any(_OF_SERVICE_LINKS.fullmatch(name.removeprefix(of)) for of in (ENVIRONMENT_PREFIX, *services)):
            raise SettingsError(f"{name} is not a setting{nearest(name, known)}")


def allowed(name: str) -> str:
    """Describe the values of a setting that is a number or one of a few words."""
    field = ServerSettings.model_fields[name]
    if get_origin(field.annotation) is Literal:
        *others, last = get_args(field.annotation)
        return f"{', '.join(others)} or {last}"
    kind = "a whole number" if field.annotation is int else "a number"
    kind += " of seconds" if name.endswith("_s") else " of MiB" if name.endswith("_mib") else ""
    bounds = {
        bound: value
        for part in field.metadata
        for bound in ("ge", "le")
        if (value := getattr(part, bound, None)) is not None
    }
    return f"{kind} from {bounds['ge']} to {bounds['le']}" if "le" in bounds else f"{kind}, {bounds['ge']} or more"


def _names() -> list[str]:
    return list(ServerSettings.model_fields)
