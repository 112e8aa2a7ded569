"""The `ganserve-server` program: its flags are the fields of ServerSettings."""

import contextlib
import importlib.metadata
import inspect
import json
import logging
import os
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from ganserve_server.cli import admin as admin_commands
from ganserve_server.cli import token as token_commands
from ganserve_server.cli.problems import print_problems
from ganserve_server.processes.channel import WORKER_VARIABLE
from ganserve_server.processes.log_writer import LogWriter, log_what_python_prints
from ganserve_server.repository.prober import Prober
from ganserve_server.repository.state_folder import StateFolder
from ganserve_server.settings import (
    BUNDLED_MODELS,
    CONFIG_VARIABLE,
    ENVIRONMENT_PREFIX,
    ServerSettings,
    allowed,
    check_config,
    check_environment,
    read_config,
)
from ganserve_server.start_errors import SettingsError
from ganserve_server.transport.addresses import reachable

_log = logging.getLogger(__name__)

_HEALTH_TIMEOUT_S = 4.0


def _serve(context: typer.Context, config: str | None, **flags: Any) -> None:
    """Serve images from a repository of ONNX generators over gRPC.

    Answers GenerationService, the Open Inference Protocol, grpc.health.v1 and server reflection. A flag takes
    precedence over its environment variable, which takes precedence over the file of --config. On SIGTERM, the server
    drains and exits with status 0.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    values: dict[str, Any] = given
    try:
        if config:
            in_file = read_config(config)
            values = in_file | given
            check_config(in_file, config)
        check_environment()
        context.obj = settings = ServerSettings(**values)
    except (SettingsError, ValidationError) as error:
        problems = [str(error)] if isinstance(error, SettingsError) else _explain(error, given, config)
        if context.invoked_subcommand:
            print_problems(problems)
        else:
            log = _configure_logs(values.get("log_format", "auto"))
            for problem in problems:
                _log.error("cannot start", extra={"reason": problem})
            log.wait()
        raise typer.Exit(2) from error
    if context.invoked_subcommand:
        return
    state, prober = StateFolder(settings), Prober(settings)
    if not (state.has_passed or WORKER_VARIABLE in os.environ):
        with contextlib.suppress(OSError):  # the probe of the first file reports it
            prober.start()  # it imports its libraries at the same time as this process
    log = _configure_logs(settings.log_format)
    # Imported late, so that --help and a wrong flag do not wait for grpc and onnxruntime.
    from ganserve_server.processes import app

    app.run(settings, log, state, prober)


def _explain(error: ValidationError, given: Collection[str], config: str | None) -> list[str]:
    """Describe each wrong setting: where it is set, its value, and the rule."""
    texts = []
    for problem in error.errors():
        name = str(problem["loc"][0])
        place = f"{_flag(name)} (or {_variable(name)})" if name in given else f"{name} in {config}"
        own = problem["type"] == "value_error"
        rule = problem["msg"].removeprefix("Value error, ") if own else f"it must be {allowed(name)}"
        texts.append(f"{place} is {problem['input']!r}; {rule}")
    return texts


def _print_version(asked: bool) -> None:
    if asked:
        print(f"ganserve-server {importlib.metadata.version('ganserve')}")
        raise typer.Exit


def _doctor(
    context: typer.Context,
    provider: Annotated[
        str | None, typer.Option(help="auto, cuda, tensorrt or cpu.", show_default="the server's setting")
    ] = None,
) -> None:
    """Report what this machine has, and what a server would compute on.

    The exit status is 1 if the requested provider does not work.
    """
    from ganserve_server.cli import doctor

    settings: ServerSettings = context.obj
    if provider not in (None, "auto", "cuda", "tensorrt", "cpu"):
        raise typer.BadParameter(f"{provider!r} is not auto, cuda, tensorrt or cpu", param_hint="--provider")
    lines, as_asked = doctor.examine(settings.model_copy(update={"provider": provider or settings.provider}))
    print("\n".join(lines))
    if not as_asked:
        raise typer.Exit(1)


def _health(context: typer.Context) -> None:
    """Ask a running server, at the metrics address of these settings, whether it is ready.

    The exit status is 1 if it is not ready.
    """
    import http.client
    import urllib.error
    import urllib.request

    settings: ServerSettings = context.obj
    host, _, port = settings.metrics_address.rpartition(":")
    if not host:
        print("ganserve-server: --metrics-address is off, so there is no address to ask", file=sys.stderr)
        raise typer.Exit(2)
    try:
        with urllib.request.urlopen(f"http://{reachable(host)}:{port}/readyz", timeout=_HEALTH_TIMEOUT_S) as response:
            text = response.read().decode().strip()
    except urllib.error.HTTPError as error:
        text = error.read().decode().strip()
    except (OSError, ValueError, OverflowError, http.client.HTTPException) as error:
        text = f"no answer from {settings.metrics_address}: {getattr(error, 'reason', error)}"
    if text != "ok":
        print(f"not ready: {text}", file=sys.stderr)
        raise typer.Exit(1)
    print("ready")


def _config(
    context: typer.Context,
    check: Annotated[
        bool, typer.Option("--check", help="Check instead whether a server could start with these settings.")
    ] = False,
) -> None:
    """Print the settings that a server would use, each with its source, as TOML that --config reads.

    The output contains no secrets: keys and tokens stay in their files, and the settings contain only the file names.

    With --check, the command reads the files that the settings name, loads the models and tries the addresses, as a
    server does when it starts, but on the CPU (`doctor` checks the GPU). An address may be in use, for example by the
    running server. The command prints a line for each problem, including each model file that a server would reject.
    The exit status is 1 if there is a problem.
    """
    parent = context.parent
    assert parent is not None
    settings: ServerSettings = context.obj
    if check:
        from ganserve_server.cli.check import problems_of

        if settings.without_effect:
            print_problems([f"warning: --transport grpcio ignores {settings.without_effect}"])
        if problems := problems_of(settings):
            print_problems(problems)
            raise typer.Exit(1)
        print("ok")
        return
    file = parent.params["config"]
    in_file = read_config(file) if file else {}
    for name, value in settings.model_dump(mode="json").items():
        source = parent.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            origin = _flag(name)
        elif source is not None and source.name == "ENVIRONMENT":
            origin = _variable(name)
        else:
            origin = _toml(file)[1:-1] if name in in_file else "default"
        print(f"{name} = {_toml(value)}  # {origin}")


def _check(
    context: typer.Context,
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE",
            help="A model file, the folder of a version, or the folder of a model, which means all of its versions.",
        ),
    ],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON array of objects, one for each model file.")
    ] = False,
) -> None:
    """Check model files, without a server and without a repository; report all that is wrong with each.

    A file is checked as by a server with the same settings: --max-model-mib, --provider, --threads and the others stand
    before the word `check`. Of a file that would be served, the command also prints how the model runs.

    The exit status is 1 if a file would be rejected.
    """
    from ganserve_server.cli.check_file import lines_of, reports_on
    from ganserve_server.repository.scan import files_of

    reports = []
    for report in reports_on((each for path in files for each in files_of(path)), context.obj):
        reports.append(report)
        if not as_json:
            print("\n".join(lines_of(report)), flush=True)
    if as_json:
        print(json.dumps(reports, indent=2))
    if not all(report["served"] for report in reports):
        raise typer.Exit(1)


def _bounds(context: typer.Context) -> None:
    """Print the limits of what clients can make a server with these settings keep and do, and its worst-case memory."""
    from ganserve_server.cli.bounds import page

    settings: ServerSettings = context.obj
    if settings.transport != "own":
        print_problems(
            ["only the bounds of --transport own can be added up; docs/transport.md describes the bounds of grpcio"]
        )
        raise typer.Exit(1)
    print("\n".join(page(settings.limits, settings.batch_timeout_s)))


def _toml(value: object) -> str:
    """Write a number or a text as TOML: as JSON, apart from a character that TOML escapes."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f").encode("utf-8", "backslashreplace").decode()


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _variable(name: str) -> str:
    return (ENVIRONMENT_PREFIX + name).upper()


def _parameters() -> list[inspect.Parameter]:
    """Return a flag for each setting, so that name, type, help and default are written only once."""
    context = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    config = inspect.Parameter(
        "config",
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[
            str | None, typer.Option("--config", help="TOML file with these settings.", envvar=CONFIG_VARIABLE)
        ],
    )
    version = inspect.Parameter(
        "version",
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[
            bool | None,
            typer.Option(
                "--version",
                help="Print the program's version.",
                callback=_print_version,
                is_eager=True,
                expose_value=False,
            ),
        ],
    )
    parameters = [context, config, version]
    for name, field in ServerSettings.model_fields.items():
        # Texts, which ServerSettings checks: an error reads the same for a flag, a variable and a file.
        kind = "<int>" if field.annotation is int else "<float>" if field.annotation is float else None
        help_ = typer.Option(
            _flag(name),
            metavar=kind,
            help=field.description,
            envvar=_variable(name),
            show_default=_default(field.default),
        )
        option = Annotated[str | None, help_]
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=option))
    return parameters


def _default(value: object) -> str:
    return "the bundled models" if value == BUNDLED_MODELS else str(value)


def _configure_logs(log_format: str) -> LogWriter:
    """Send all log records, also of libraries, to standard error: as JSON lines, or coloured on a terminal."""
    import structlog  # takes as long as typer and pydantic together, so the probe starts first

    console = log_format == "console" or (log_format != "json" and sys.stderr.isatty())
    shared: list[Any] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    last: list[Any] = (
        [structlog.dev.ConsoleRenderer()]
        if console
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(default=str)]
    )
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared, processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last]
    )
    log = LogWriter()
    log.setFormatter(formatter)
    logging.basicConfig(level=logging.INFO, handlers=[log], force=True)
    logging.getLogger("watchfiles").setLevel(logging.WARNING)
    log_what_python_prints()
    return log


_serve.__signature__ = inspect.Signature(_parameters())  # type: ignore[attr-defined]


def main() -> None:
    """Run the program."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.callback(invoke_without_command=True, help=_help(_serve))(_serve)
    commands: dict[str, Callable[..., None]] = {
        "config": _config,
        "check": _check,
        "bounds": _bounds,
        "health": _health,
        "doctor": _doctor,
    }
    for name, command in commands.items():
        app.command(name, help=_help(command))(command)
    token = typer.Typer(help="Add, list and withdraw the tokens of a tokens file.", no_args_is_help=True)
    for name, command in token_commands.COMMANDS.items():
        token.command(name, help=_help(command))(command)
    app.add_typer(token, name="token")
    admin = typer.Typer(no_args_is_help=True)
    admin.callback(help=_help(admin_commands.admin))(admin_commands.admin)
    for name, command in admin_commands.COMMANDS.items():
        admin.command(name, help=_help(command))(command)
    app.add_typer(admin, name="admin")
    app()


def _help(command: Callable[..., None]) -> str:
    """Return a docstring with each paragraph on one line, so that it is wrapped at the terminal's width."""
    return "\n\n".join(" ".join(part.split()) for part in inspect.cleandoc(command.__doc__ or "").split("\n\n"))
