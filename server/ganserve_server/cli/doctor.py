"""`ganserve-server doctor`: what a machine has, and what a server would compute on."""

import importlib.metadata
import platform

import onnxruntime

from ganserve_server import machine
from ganserve_server.compute import cuda
from ganserve_server.compute.batching import batch_limits
from ganserve_server.compute.engine import Engine, ProviderUnavailable
from ganserve_server.compute.gpu import gpu_options
from ganserve_server.repository.scan import MODEL_FILE_NAME
from ganserve_server.repository.verify import load_version
from ganserve_server.settings import BUNDLED_MODELS, ServerSettings


def examine(settings: ServerSettings) -> tuple[list[str], bool]:
    """Try a bundled model; return lines to print, and whether the required provider runs."""
    provider, threads = settings.provider, settings.threads
    cores, memory = machine.cores(), machine.memory_limit()
    cuda.load_cuda_libraries()
    packages = ("ganserve", "grpcio", "protobuf", "numpy")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    versions += [f"onnxruntime {onnxruntime.__version__}", f"Python {platform.python_version()}"]
    providers = [name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers()]
    lines = [
        f"versions     {', '.join(versions)}",
        f"system       {platform.system()} {platform.release()}, {platform.machine()}",
        f"cores        {cores.machine} in the machine, {cores.affinity} by affinity, "
        f"{'no quota' if cores.quota is None else f'{cores.quota:g} by the cgroup'}: {threads or cores.usable} threads",
        f"memory       {'no limit of the cgroup' if memory is None else f'{memory >> 20} MiB by the cgroup'}",
        f"onnxruntime  was built for {', '.join(providers)}",
    ]
    of_cuda, of_tensorrt = cuda.cuda_libraries(), cuda.tensorrt_libraries()
    for name, reason in (of_tensorrt | of_cuda).items():
        only = "" if name in of_cuda else " (TensorRT)"
        lines.append(f"{'missing' if reason else 'found':<11}  {name}{only}")
    try:
        engine = _engine_of_a_bundled_model(settings)
    except ProviderUnavailable as error:
        return [*lines, f"provider     {error}"], False
    why = f": {cuda.why_no_cuda()}" if engine.on_cpu and provider != "cpu" else ""
    lines.append(f"provider     {provider} runs on {engine.provider.removesuffix('ExecutionProvider')}{why}")
    if engine.buckets:
        lines.append(f"buckets      of {', '.join(map(str, engine.buckets))} images")
    return lines, True


def _engine_of_a_bundled_model(settings: ServerSettings) -> Engine:
    """Load a bundled model as a server does, golden images included."""
    path = next(BUNDLED_MODELS.glob(f"*/1/{MODEL_FILE_NAME}"))
    return load_version(
        path.parts[-3],
        1,
        path,
        max_model_mib=512,
        provider=settings.provider,
        threads=settings.threads,
        limits=batch_limits(settings),
        gpu=gpu_options(settings),
    ).engine
