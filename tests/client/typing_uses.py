"""Right and wrong uses of the SDK's arguments. Type checkers must accept the first and reject the second.

`make lint` checks this file with mypy, and .ci/run with pyright, both strictly: an unused "type: ignore" is an error.
"""

import io
from pathlib import Path

import numpy as np

from ganserve import AsyncClient, Client, ImageBatch


def right(client: Client, batch: ImageBatch) -> None:
    client.generate("digits", count=np.int64(3), seed=np.uint32(7), version=np.int8(1))
    client.generate("digits", label=np.array([1, 2]), truncation=np.float32(0.7))
    client.generate("digits", label=np.array(["Bag", "Coat"]), input_seeds={"noise": np.uint32(1)})
    client.generate("digits", label=["Bag", "Coat"], attributes={"smiling": 1, "age": [0.5, 1.0]})
    client.generate("digits", label=(1, 2), attributes={"age": np.linspace(0, 1, 2)}, latents=[[0.0] * 64] * 2)
    client.generate("digits", label=np.int64(1), latents=np.zeros((1, 64)))
    client.generate_each("digits", np.arange(3, dtype=np.uint32), label=iter([1, 2, 3]))
    client.generate_each("digits", {3, 1}, label="Bag")
    client.stream("digits", count=np.int32(10))
    client.interpolate("digits", np.uint32(1), 2, np.int16(8))
    client.contact_sheet("digits", columns=np.int64(2), scale=np.int64(3), label=[7, 8])
    for source in ("a.png", Path("a.png"), b"", io.BytesIO(), batch, batch[0], batch.provenance):
        client.reproduce(source)
    batch.sheet(np.int64(2), row_names=("a", "b")).save("a.png")
    batch.gif("a.gif", frame_ms=np.int64(40), scale=np.int8(2))


async def right_async(client: AsyncClient) -> None:
    await client.generate("digits", count=np.int64(3), label=np.array([1, 2, 3]))


def wrong(client: Client, batch: ImageBatch) -> None:
    client.generate("digits", count=1.5)  # type: ignore[arg-type]
    client.generate("digits", seed="7")  # type: ignore[arg-type]
    client.generate("digits", label=1.5)  # type: ignore[arg-type]
    client.generate("digits", truncation="much")  # type: ignore[arg-type]
    client.generate("digits", attributes={"age": "old"})  # type: ignore[dict-item]
    client.generate_each("digits", 7)  # type: ignore[arg-type]
    client.contact_sheet("digits", columns="2")  # type: ignore[arg-type]
    client.reproduce(7)  # type: ignore[arg-type]
    batch.sheet(columns=1.5)  # type: ignore[arg-type]
