"""Starts the server, as one process or as several, and stops it without losing a call."""

import asyncio
import contextlib
import importlib
import importlib.metadata
import logging
import os
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from ganserve_server.auth.security import Security
from ganserve_server.compute.cuda import nvidia_driver
from ganserve_server.machine import cores, memory_limit, raise_open_files_limit
from ganserve_server.observe.http_endpoint import HttpEndpoint
from ganserve_server.observe.metrics import Standstills
from ganserve_server.processes.channel import WORKER_VARIABLE, SupervisorChannel
from ganserve_server.processes.heartbeat import Heart
from ganserve_server.processes.log_writer import LogWriter
from ganserve_server.processes.management import Management
from ganserve_server.processes.reports import ReportServing, report_draining
from ganserve_server.processes.supervisor import Supervisor
from ganserve_server.processes.systemd import beat, notify
from ganserve_server.repository.prober import Prober
from ganserve_server.repository.state_folder import StateFolder
from ganserve_server.settings import ServerSettings
from ganserve_server.shared.rates import SharedRates
from ganserve_server.start_errors import StartError
from ganserve_server.transport.addresses import bind, name

_log = logging.getLogger(__name__)

# The memory of a worker without a model, and the memory for each byte of a model file: 1.5 times the measured values.
_WORKER_BYTES, _BYTES_PER_FILE_BYTE = 140 << 20, 3
_NO_LIMIT = 1 << 60  # of bytes
# Open files: what a process opens itself with a few connections, and what a supervisor opens for each worker.
_LEAST_OPEN_FILES, _OPEN_FILES_OF_A_WORKER = 64, 4
_LONGEST_END_S = 5.0  # how long a worker may take to end after its drain


def run(settings: ServerSettings, log: LogWriter, state: StateFolder, prober: Prober) -> NoReturn:
    """Serve until SIGTERM or SIGINT, then drain, and end the process.

    `stopped` is the last line of the log, written after all lines of the workers. If the exit status is not 0, the log
    has the reason.
    """

    async def serve_until_stopped() -> None:
        stop, reload = asyncio.Event(), asyncio.Event()
        _handle_signals(asyncio.get_running_loop(), stop, reload, log)
        await serve(settings, stop, reload, log, state, prober)

    status, runner = 0, asyncio.Runner()
    try:
        runner.run(serve_until_stopped())
    except SystemExit as ended:  # another process has logged the reason
        status = int(ended.code or 0)
    except StartError as error:
        status, reason = 1, str(error)
        log.wait()  # so that the queue has room
        _log.error("cannot start", extra={"reason": reason})
    except Exception:
        status = 1
        log.wait()
        _log.exception("the server ended")
    if log.wait() and not status and WORKER_VARIABLE not in os.environ:
        with log.last_line():
            _log.info("stopped")
        log.wait()
    # Not by Python's way, which waits for threads: a model may load for ever, or a batch may never end.
    os._exit(status)


async def serve(
    settings: ServerSettings,
    stop: asyncio.Event,
    reload: asyncio.Event,
    log: LogWriter,
    state: StateFolder,
    prober: Prober,
) -> None:
    """Serve until `stop` is set, then drain; whenever `reload` is set, look for changes in the repository.

    Raises:
        StartError: no model can be served, an address is taken, or too few files may be open.
        SystemExit: no model can be served, and another process has logged it.
    """
    open_files = raise_open_files_limit()
    # Slow imports, above all onnxruntime, are inside functions: a supervisor does not need them, and starts the workers
    # first.
    if variable := os.environ.get(WORKER_VARIABLE):
        from ganserve_server.processes.worker import work

        channel = SupervisorChannel(variable)
        with contextlib.closing(Heart(settings.stuck_timeout_s, channel.board.set_beat, ends_process=False)):
            await work(channel, settings, stop, log)
        channel.board.set_beat(0)
        return
    started = time.perf_counter()
    sockets = bind(settings.address, "--address")
    workers = _count_workers(settings)
    least = max(_LEAST_OPEN_FILES, _LEAST_OPEN_FILES // 2 + workers * _OPEN_FILES_OF_A_WORKER)
    if open_files < least:
        raise StartError(
            f"the limit on open files is {open_files}; with --workers {workers}, the server needs at least {least}: "
            "raise the limit (ulimit -n, LimitNOFILE of systemd)"
        )
    if settings.without_effect:
        _log.warning("--transport grpcio ignores these settings", extra={"settings": settings.without_effect})
    management = Management(settings, stop, reload, state, prober)

    def report_serving(
        facts: Mapping[str, Any],
        endpoint: HttpEndpoint,
        why_not_serving: Callable[[], str],
        security: Security,
        admin_address: str | None,
    ) -> None:
        # First, so that a program that acts on the log line or on systemd's state finds the server ready.
        endpoint.why_not_ready = lambda: "draining" if stop.is_set() else why_not_serving()
        _log.info(
            "serving",
            extra={
                "address": name(sockets[0], settings.address),
                "metrics_address": endpoint.address,
                "admin_address": admin_address,
                "transport": settings.transport,
                "workers": workers,
                "tls": security.certificates is not None,
                "tokens": security.tokens is not None,
                "start_s": round(time.perf_counter() - started, 3),
                "version": importlib.metadata.version("ganserve"),
                **facts,
            },
        )
        notify("READY=1")

    try:
        with contextlib.closing(_heart(settings)) as heart:
            if workers == 1:
                # In a thread: meanwhile the lifecycle asks the probe to check the first file.
                alone = await asyncio.to_thread(importlib.import_module, "ganserve_server.processes.alone")
                await alone.serve_alone(settings, stop, management, sockets, heart, log, report_serving)
            else:
                supervisor = Supervisor(
                    workers,
                    sockets,
                    log,
                    on_worker_ended=management.lifecycle.process_ended,
                    on_withdrawn=management.lifecycle.withdraw,
                    on_unopened=management.lifecycle.unopened,
                    open_timeout_s=settings.load_timeout_s,
                    stuck_timeout_s=settings.stuck_timeout_s,
                )
                await _supervise(settings, stop, management, supervisor, heart, report_serving)
    finally:
        await management.close()


def _heart(settings: ServerSettings) -> Heart:
    """Beat in the only process, or in the supervisor."""
    return Heart(settings.stuck_timeout_s, lambda _: beat(), ends_process=True)


async def _supervise(
    settings: ServerSettings,
    stop: asyncio.Event,
    management: Management,
    supervisor: Supervisor,
    heart: Heart,
    report_serving: ReportServing,
) -> None:
    """Serve with several workers until `stop` is set, then end them."""
    with (
        contextlib.closing(supervisor),
        contextlib.closing(HttpEndpoint(settings.metrics_address, supervisor.registry)) as endpoint,
    ):
        endpoint.why_stuck = lambda: heart.why_stuck() or supervisor.why_stuck()
        supervisor.registry.register(
            Standstills(lambda: max(heart.standstill.longest_s, supervisor.longest_standstill_s))
        )
        management.lifecycle.serve_by(supervisor)
        security = Security(settings, None, SharedRates())
        security.warn_if_open(supervisor.sockets, "--address")
        management.bind(security)
        meanwhile = asyncio.to_thread(importlib.import_module, "ganserve_server.services.administration")
        starting = asyncio.gather(supervisor.start(), management.starting, meanwhile)
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait((starting, stopped), return_when=asyncio.FIRST_COMPLETED)
        stopped_early = not starting.done()
        if stopped_early or starting.exception():  # no call was served yet
            starting.cancel()
            await asyncio.gather(starting, management.close(), return_exceptions=True)
            await supervisor.kill()
        if stopped_early:
            return
        facts, _, _ = starting.result()
        if facts is None:
            raise SystemExit(1)
        admin_address = management.begin(security, supervisor.refresh)
        report_serving(facts, endpoint, supervisor.why_not_serving, security, admin_address)
        watching = asyncio.create_task(security.watch())
        await stopped
        report_draining(settings)
        watching.cancel()
        most_s = settings.drain_delay_s + settings.drain_timeout_s + _LONGEST_END_S
        await asyncio.gather(management.close(), supervisor.stop(most_s))


def _count_workers(settings: ServerSettings) -> int:
    """Decide how many processes serve."""
    if settings.workers != "auto":
        return int(settings.workers)
    if settings.provider != "cpu" and nvidia_driver():
        return 1  # each worker would keep every model on the GPU
    # On two cores, one process makes as many images of a large model as two, in less than half the memory. With more
    # cores, its event loop becomes the limit; a quarter of the cores is a guess.
    usable = cores().usable
    wanted = min(settings.threads or usable, usable) // 4
    # With little memory, fewer workers: each loads every model, and one process computes large models as fast.
    files = 0
    with contextlib.suppress(OSError):  # the loading reports files that cannot be read
        for file in settings.models.glob("*/*/*.onnx"):
            with contextlib.suppress(OSError):
                files += file.stat().st_size
    memory = min(memory_limit() or _NO_LIMIT, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    fitting = memory * 3 // 4 // (_WORKER_BYTES + _BYTES_PER_FILE_BYTE * files)
    return max(1, min(wanted, fitting))


def _handle_signals(
    loop: asyncio.AbstractEventLoop, stop: asyncio.Event, reload: asyncio.Event, log: LogWriter
) -> None:
    """Set `stop` on SIGTERM and SIGINT, and `reload` on SIGHUP. A second SIGTERM or SIGINT exits at once."""

    def begin(number: signal.Signals) -> None:
        if stop.is_set():
            _log.warning("ended by a second signal", extra={"signal": number.name})
            log.wait()
            os._exit(128 + number)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, begin, number)
    loop.add_signal_handler(signal.SIGHUP, reload.set)
