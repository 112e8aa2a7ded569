"""What the Python clients share: the requests, what the answers must be, and how a scenario is reported.

Every client program, in any language, is called as

    PROGRAM ADDRESS CA_FILE PIXELS_FILE SCENARIO…

with an empty CA_FILE for plain text, and prints a line for each scenario: `ok NAME`, or `failed NAME: what was wrong`.
Its exit status is 1 if one failed. `../check_clients.py` says what each scenario is.
"""

import asyncio
import inspect
import os
import sys
import traceback
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from google.rpc import error_details_pb2, status_pb2

from ganserve.v1 import generation_pb2 as pb

MODEL = "cdcgan-mnist"
SEED, COUNT = 1, 16  # of the images in PIXELS_FILE
IMAGE_BYTES = 28 * 28
STREAM_COUNT = 2000  # 1.5 MB: many times HTTP/2's first window
ENDLESS_COUNT = 5_000_000
LIMIT_S = 86_400.0  # deadline; a server refuses what it expects to take longer, and on a busy machine it expects much
OPEN_STREAMS = 1000
AGE_S = 5.0
QUIET_S = 12.0  # of the keepalive scenario
PATH = "/ganserve.v1.GenerationService/"
# Letters that Huffman's code does not shorten: the size on the wire is this one, too.
ACCEPTED_METADATA = "XZ" * (6 << 10)
REFUSED_METADATA = "XZ" * (10 << 10)
# RESOURCE_EXHAUSTED is from the server, from HAProxy or from a client that obeys SETTINGS. gRPC reads HTTP's 431 as
# UNKNOWN, 400 and a reset as INTERNAL. UNAVAILABLE would be wrong: clients would repeat the call.
REFUSALS = ("RESOURCE_EXHAUSTED", "UNKNOWN", "INTERNAL")

ONE = pb.GenerateImagesRequest(model=MODEL, count=1, seed=SEED)
SOME = pb.GenerateImagesRequest(model=MODEL, count=COUNT, seed=SEED)
COMPRESSIBLE = pb.GenerateImagesRequest(model=MODEL, seed=SEED, labels=[7] * 256)
STREAM = pb.StreamImagesRequest(generate=pb.GenerateImagesRequest(model=MODEL, count=STREAM_COUNT, seed=SEED))
ENDLESS = pb.StreamImagesRequest(generate=pb.GenerateImagesRequest(model=MODEL, count=ENDLESS_COUNT, seed=SEED))
EACH = pb.GenerateEachRequest(generate=ONE)
EACH_WRONG = pb.GenerateEachRequest(generate=pb.GenerateImagesRequest(model="no-such-model"))
WRONG = pb.GenerateImagesRequest(model=MODEL, count=1, truncation=3)  # from 0 to 2 are allowed


@dataclass(frozen=True)
class Target:
    """Where the server is, and what its images must be."""

    address: str
    ca_file: str  # empty: plain text
    pixels: bytes

    @property
    def ca(self) -> bytes:
        return Path(self.ca_file).read_bytes()


Scenario = Callable[[Target], Awaitable[None] | None]


class ScenarioError(Exception):
    """A scenario did not go as it must; the text says what was wrong."""


def check(right: bool, wrong: str) -> None:
    if not right:
        raise ScenarioError(wrong)


def check_one(response: pb.GenerateImagesResponse) -> None:
    check(list(response.seeds) == [SEED], f"seeds are {list(response.seeds)}")
    check(len(response.pixels) == IMAGE_BYTES, f"{len(response.pixels)} bytes of pixels")


def check_answer(answer: pb.GenerateEachResponse) -> None:
    check(not answer.HasField("error"), f"{answer.error}")
    check_one(answer.response)


def check_pixels(pixels: bytes, target: Target) -> None:
    check(pixels == target.pixels, "the pixels are not those that the SDK gets")


def check_refused(code: str, text: str | None) -> None:
    check(code in REFUSALS, f"20 KB of metadata: {code}: {text}")


def check_details(code: str, serialized: bytes) -> None:
    """See that a status is the one of WRONG."""
    check(code == "INVALID_ARGUMENT", f"the status is {code}")
    status = status_pb2.Status.FromString(serialized)
    request, info = error_details_pb2.BadRequest(), error_details_pb2.ErrorInfo()
    for detail in status.details:
        detail.Unpack(request)
        detail.Unpack(info)
    check(status.code == 3 and bool(status.message), f"google.rpc.Status is {status}")
    fields = [violation.field for violation in request.field_violations]
    check(fields == ["truncation"], f"BadRequest names {fields}")
    check((info.reason, info.domain) == ("INVALID", "ganserve"), f"ErrorInfo is {info}")


def run(*scenarios: Scenario) -> None:
    """Run the scenarios that the command line names; exit."""
    address, ca_file, pixels_file, *names = sys.argv[1:]
    target = Target(address, ca_file, Path(pixels_file).read_bytes())
    by_name = {scenario.__name__: scenario for scenario in scenarios}
    results = asyncio.run(_run([by_name[name] for name in names], target))
    os._exit(not all(results))  # even if a client still has threads


async def _run(scenarios: Iterable[Scenario], target: Target) -> list[bool]:
    return [await _run_one(scenario, target) for scenario in scenarios]


async def _run_one(scenario: Scenario, target: Target) -> bool:
    try:
        done = scenario(target)
        if inspect.isawaitable(done):
            await done
    except Exception as error:
        said = str(error) if isinstance(error, ScenarioError) else "".join(traceback.format_exception(error, limit=-2))
        print(f"failed {scenario.__name__}: {' '.join(said.split())}", flush=True)
        return False
    print(f"ok {scenario.__name__}", flush=True)
    return True
