"""A web service of avatars, with FastAPI: /avatar/NAME.png is always the same picture for the same name.

pip install '.[examples]'
uvicorn --app-dir examples avatars:app

Environment variables: GANSERVE_ADDRESS, and AVATAR_MODEL (default: cdcgan-fashion-mnist).
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
    GanserveError: 502,  # all others: the cause is the server behind this one, not the caller
}
TIMEOUT_S = 5.0  # a browser is waiting


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with AsyncClient(timeout_s=TIMEOUT_S) as client:
        app.state.client = client
        yield


app = FastAPI(title="avatars", lifespan=lifespan)


@app.exception_handler(GanserveError)
async def answer(_: Request, error: GanserveError) -> JSONResponse:
    """Answer an error of the SDK with an HTTP status."""
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
    size: Annotated[int, Query(ge=28, le=1024, description="maximum pixels a side")] = 224,
    if_none_match: Annotated[str | None, Header()] = None,
) -> Response:
    client: AsyncClient = request.app.state.client
    # sha256 instead of hash(), which differs from process to process.
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    batch = await client.generate(MODEL, seed=seed)  # without a label, the seed also decides the class
    file = io.BytesIO()
    batch.sheet(scale=max(1, size // max(batch.pixels.shape[1:3]))).save(file, "PNG")
    headers = {
        # The pixels change with the model's version only; after a day, a browser asks again.
        "ETag": f'"{hashlib.sha256(file.getvalue()).hexdigest()[:32]}"',
        "Cache-Control": "public, max-age=86400",
    }
    if if_none_match == headers["ETag"]:
        return Response(status_code=304, headers=headers)
    return Response(file.getvalue(), media_type="image/png", headers=headers)
