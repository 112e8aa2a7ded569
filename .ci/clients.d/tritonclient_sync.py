"""Triton's client, by the Open Inference Protocol."""

import queue
import time
from typing import Any

import numpy as np
import scenarios as given
import tritonclient.grpc as triton
from scenarios import Target, check
from tritonclient.utils import InferenceServerException


def connect(target: Target, keepalive: triton.KeepAliveOptions | None = None) -> triton.InferenceServerClient:
    return triton.InferenceServerClient(
        target.address,
        ssl=bool(target.ca_file),
        root_certificates=target.ca_file or None,
        keepalive_options=keepalive,
        channel_args=None if keepalive else [("grpc.use_local_subchannel_pool", 1)],  # it takes only one of the two
    )


def seeds(count: int = 1) -> list[triton.InferInput]:
    values = np.arange(given.SEED, given.SEED + count, dtype=np.uint32)
    tensor = triton.InferInput("seed", [count], "UINT32")
    tensor.set_data_from_numpy(values)
    return [tensor]


def one(client: triton.InferenceServerClient, **options: Any) -> None:
    result = client.infer(given.MODEL, seeds(), client_timeout=given.LIMIT_S, **options)
    check(result.as_numpy("image").shape == (1, 28, 28, 1), f"the shape is {result.as_numpy('image').shape}")


def unary(target: Target) -> None:
    with connect(target) as client:
        one(client)


def pixels(target: Target) -> None:
    with connect(target) as client:
        result = client.infer(given.MODEL, seeds(given.COUNT), client_timeout=given.LIMIT_S)
    given.check_pixels(result.as_numpy("image").tobytes(), target)


def stream(target: Target) -> None:
    answers: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
    with connect(target) as client:
        client.start_stream(lambda result, error: answers.put((result, error)), stream_timeout=given.LIMIT_S)
        for _ in range(3):
            client.async_stream_infer(given.MODEL, seeds(given.COUNT))
        for _ in range(3):
            result, error = answers.get(timeout=given.LIMIT_S)
            check(error is None, f"{error}")
            given.check_pixels(result.as_numpy("image").tobytes(), target)
        client.stop_stream()


def deadline(target: Target) -> None:
    with connect(target) as client:
        one(client)
        try:
            client.infer(given.MODEL, seeds(1024), client_timeout=0.001)
        except InferenceServerException as error:
            # The server may be first, and says at once that 1,024 images take longer.
            codes = ("StatusCode.DEADLINE_EXCEEDED", "StatusCode.RESOURCE_EXHAUSTED")
            check(error.status() in codes, f"the status is {error.status()}")
        else:
            raise given.ScenarioError("it was answered")
        one(client)


def gzip(target: Target) -> None:
    with connect(target) as client:
        result = client.infer(given.MODEL, seeds(256), compression_algorithm="gzip", client_timeout=given.LIMIT_S)
    check(len(result.as_numpy("image")) == 256, "the count is another")


def metadata(target: Target) -> None:
    with connect(target) as client:
        one(client, headers={"x-large": given.ACCEPTED_METADATA})


def oversized(target: Target) -> None:
    with connect(target) as client:
        for _ in range(3):
            try:
                one(client, headers={"x-large": given.REFUSED_METADATA})
            except InferenceServerException as error:
                given.check_refused(error.status().removeprefix("StatusCode."), error.message())
            else:
                raise given.ScenarioError("20 KB of metadata are accepted")
            one(client)


def keepalive(target: Target) -> None:
    options = triton.KeepAliveOptions(1000, 30000, keepalive_permit_without_calls=True, http2_max_pings_without_data=0)
    with connect(target, options) as client:
        one(client)
        time.sleep(given.QUIET_S)
        one(client)


def age(target: Target) -> None:
    with connect(target) as client:
        end = time.monotonic() + given.AGE_S
        while time.monotonic() < end:
            one(client)


given.run(unary, pixels, stream, deadline, gzip, metadata, oversized, keepalive, age)
