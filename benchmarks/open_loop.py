"""Makes calls at a fixed rate, whatever their outcome, until standard input ends; prints the outcomes as JSON.

Each call is one image by the SDK's AsyncClient. Its latency counts from the time at which it should have been sent.
"""

import argparse
import asyncio
import collections
import json
import os
import sys
import time

from ganserve import AsyncClient, GanserveError


async def main(options: argparse.Namespace) -> None:
    clients = [AsyncClient(options.address, retries=options.retries) for _ in range(options.clients)]
    for client in clients:
        await client.wait_until_ready(30, model=options.model)
        await client.generate(options.model, seed=0)
    calls: set[asyncio.Task[None]] = set()
    latencies: list[float] = []
    failures: collections.Counter[str] = collections.Counter()
    versions: collections.Counter[int] = collections.Counter()
    failed_at: list[tuple[float, str]] = []

    async def call(number: int, meant: float) -> None:
        try:
            client = clients[number % len(clients)]
            batch = await client.generate(options.model, seed=number, timeout_s=options.timeout_s)
            versions[batch.version] += 1
        except GanserveError as error:
            name = f"{error.code.name if error.code else 'none'} ({error.reason})"
            failures[name] += 1
            failed_at.append((meant, name))
            print(f"call {number}: {error}", file=sys.stderr, flush=True)
        latencies.append(time.monotonic() - meant)

    ended = asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    print("calling", flush=True)
    began, number = time.monotonic(), 0
    while not ended.done():
        meant = began + number / options.rate
        if (early := meant - time.monotonic()) > 0:
            await asyncio.wait([ended], timeout=early)
            continue
        task = asyncio.create_task(call(number, meant))
        calls.add(task)
        task.add_done_callback(calls.discard)
        number += 1
    await asyncio.gather(*calls)
    for client in clients:
        await client.close()
    told = {"calls": number, "failures": failures, "worst_s": max(latencies), "versions": versions}
    print(json.dumps(told | {"failed_at": failed_at}), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    parser.add_argument("--model", default="dcgan-mnist")
    parser.add_argument("--rate", type=float, default=200, help="calls a second")
    parser.add_argument("--clients", type=int, default=1, help="which call in turn, with connections of their own")
    parser.add_argument("--timeout-s", type=float, default=30, help="of each call, with its retries")
    parser.add_argument("--retries", action=argparse.BooleanOptionalAction, default=True, help="the SDK's")
    os.environ.pop("GANSERVE_TOKEN", None)
    asyncio.run(main(parser.parse_args()))
