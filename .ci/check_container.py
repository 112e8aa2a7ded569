"""Check a server in a container from outside.

python .ci/check_container.py make ADDRESS    pictures of every model, and their digests
python .ci/check_container.py drain ADDRESS   calls from 8 callers until health says NOT_SERVING, of which none may fail
python .ci/check_container.py load ADDRESS S  the same for so many seconds
"""

import asyncio
import hashlib
import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ganserve import AsyncClient, Client, GanserveError

CALLERS = 8


def make(address: str) -> None:
    with Client(address) as client:
        client.wait_until_ready(30)
        for model in client.models():
            pixels = client.generate(model.name, count=16, seed=1).pixels
            print(f"  {model.name} version {model.version}: {hashlib.sha256(pixels.tobytes()).hexdigest()[:12]}")


async def drain(address: str, seconds: float | None) -> None:
    """Do as a load balancer does: send calls until health says that no more are wanted; or for so many seconds."""
    async with AsyncClient(address, retries=False) as client:
        await client.wait_until_ready(30)
        (name, *_) = [model.name for model in await client.models()]
        draining = asyncio.Event()

        async def call() -> int:
            calls = 0
            while not draining.is_set():
                await client.generate(name, count=16, seed=calls)
                calls += 1
            return calls

        async def watch() -> None:
            if seconds is not None:
                await asyncio.sleep(seconds)
                draining.set()
                return
            async with grpc.aio.insecure_channel(address) as channel:
                async for health in health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest()):
                    if health.status == health_pb2.HealthCheckResponse.NOT_SERVING:
                        break
            draining.set()

        try:
            *calls, _ = await asyncio.gather(*(call() for _ in range(CALLERS)), watch())
        except GanserveError as error:
            sys.exit(f"a call failed: {error}")
        print(
            f"  {sum(calls):,} calls of 16 images {f'in {seconds:g} s' if seconds else 'until NOT_SERVING'}, 0 failed"
        )


if __name__ == "__main__":
    task, address, *seconds = sys.argv[1:]
    if task == "make":
        make(address)
    else:
        asyncio.run(drain(address, float(seconds[0]) if task == "load" else None))
