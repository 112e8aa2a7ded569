"""A web service of avatars: /avatar/NAME.png is always the same picture for a name. FastAPI in front, ganserve behind.

pip install '.[examples]'
uvicorn --app-dir examples avatars:app

Settings: GANSERVE_ADDRESS, and AVATAR_MODEL (cdcgan-fashion-mnist).
"""

import hashlib
import io
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import FastAPI, Header, Query, Request, Response
from fastapi.responses import JSONResponse

from ganserve import (
    AsyncClient,
    DeadlineExceededError,
    GanserveError,
    InvalidRequestError,
    OverloadedError,
    UnavailableError,
)

MODEL = os.environ.get("AVATAR_MODEL", "cdcgan-fashion-mnist")
STATUS_OF_ERROR: dict[type[GanserveError], int] = {
    InvalidRequestError: 400,
    OverloadedError: 503,
    UnavailableError: 503,
    DeadlineExceededError: 504,
    GanserveError: 502,  # all others: what is wrong is behind us, not with the caller
}
TIMEOUT_S = 5.0  # a browser waits for it


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with AsyncClient(timeout_s=TIMEOUT_S) as client:
        app.state.client = client
        yield


app = FastAPI(title="avatars", lifespan=lifespan)


@app.exception_handler(GanserveError)
async def answer(_: Request, error: GanserveError) -> JSONResponse:
    """Tell an error of the SDK as HTTP does."""
    status = next(STATUS_OF_ERROR[kind] for kind in type(error).__mro__ if kind in STATUS_OF_ERROR)
    headers = {}
    if status == 503:
        headers["Retry-After"] = str(max(1, round(getattr(error, "retry_after_s", None) or 1)))
    body = {"error": type(error).__name__, "detail": str(error), "request_id": error.request_id}
    return JSONResponse(body, status, headers)


@app.get("/avatar/{name}.png")
async def avatar(
    request: Request,
    name: str,
    size: Annotated[int, Query(ge=28, le=1024, description="pixels a side, at most")] = 224,
    if_none_match: Annotated[str | None, Header()] = None,
) -> Response:
    client: AsyncClient = request.app.state.client
    # sha256 and not hash(): Python's differs from process to process.
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    batch = await client.generate(MODEL, seed=seed)  # without a label, the seed decides the class too
    file = io.BytesIO()
    batch.sheet(scale=max(1, size // max(batch.pixels.shape[1:3]))).save(file, "PNG")
    headers = {
        # The pixels change with the model's version only; a day later a browser asks whether they did.
        "ETag": f'"{hashlib.sha256(file.getvalue()).hexdigest()[:32]}"',
        "Cache-Control": "public, max-age=86400",
    }
    if if_none_match == headers["ETag"]:
        return Response(status_code=304, headers=headers)
    return Response(file.getvalue(), media_type="image/png", headers=headers)
