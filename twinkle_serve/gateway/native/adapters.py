"""`/adapters`: list, upload and remove."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.responses import Response

from twinkle_serve import timing
from twinkle_serve.adapters import of_memory
from twinkle_serve.data_format.adapters import AdapterFiles
from twinkle_serve.errors import AdapterError
from twinkle_serve.gateway.bodies import body_pieces, parse_json, too_large
from twinkle_serve.gateway.config import LimitArgs
from twinkle_serve.gateway.context import GatewayContext, caller_of
from twinkle_serve.gateway.documents import described
from twinkle_serve.gateway.errors import InvalidRequestError, MediaTypeError
from twinkle_serve.gateway.json_response import JSON
from twinkle_serve.gateway.keys import require_scope
from twinkle_serve.gateway.native.media import JSON_MEDIA
from twinkle_serve.gateway.native.schemas import STRING, object_of
from twinkle_serve.gateway.public import shown_message
from twinkle_serve.gateway.queries import sampler_of
from twinkle_serve.routing.api import RouterAPI

CONFIG_BYTES = 2**20
"""Largest configuration of an adapter."""

LISTED = object_of(
    adapters={"type": "object", "additionalProperties": object_of(newest=STRING, versions={"type": "array"})}
)
PARTS = object_of(
    config={"type": "string", "format": "binary", "description": "adapter_config.json, as peft writes it."},
    weights={"type": "string", "format": "binary", "description": "adapter_model.safetensors, as peft writes it."},
)


def routes(context: GatewayContext) -> APIRouter:
    router = APIRouter(tags=["native"])
    uploading = asyncio.Lock()
    """Files of one adapter at a time are in memory; those of others wait on disk."""

    @router.get(
        "/adapters", **described("Adapters and their versions", answers={JSON_MEDIA: LISTED}, query=("sampler",))
    )
    async def adapters(request: Request) -> Response:
        state = await context.samplers.named(sampler_of(request)).status()
        versions = state["adapter_versions"]
        return JSON(
            {
                "adapters": {
                    name: {"newest": label, "versions": versions[name]} for name, label in state["adapters"].items()
                }
            }
        )

    @router.put(
        "/adapters/{name}",
        **described(
            "Upload an adapter", parts=PARTS, answers={JSON_MEDIA: object_of(adapter=STRING)}, query=("sampler",)
        ),
    )
    async def add(name: str, request: Request) -> Response:
        require_scope(caller_of(request), "admin")
        client = context.samplers.named(sampler_of(request)).client
        form = await _read_form(request, context.limits)
        try:
            config, weights = _part(form, "config"), _part(form, "weights")
            if (size := config.size or 0) > CONFIG_BYTES:
                raise too_large(size, CONFIG_BYTES)
            async with uploading:
                files = AdapterFiles(config=await config.read(), weights=await weights.read())
                parse_json(files.config)  # the store's parser recurses
                label = await client.call(timing.CONTROL_TIMEOUT_S, RouterAPI.add_adapter, name, files)
        except AdapterError as error:
            raise InvalidRequestError(shown_message(str(of_memory(error)))) from None
        finally:
            await form.close()
        return JSON({"adapter": label})

    @router.delete(
        "/adapters/{name}",
        **described("Remove an adapter", answers={JSON_MEDIA: object_of(removed=STRING)}, query=("sampler",)),
    )
    async def remove(name: str, request: Request) -> Response:
        require_scope(caller_of(request), "admin")
        client = context.samplers.named(sampler_of(request)).client
        await client.call(timing.CONTROL_TIMEOUT_S, RouterAPI.remove_adapter, name)
        return JSON({"removed": name})

    return router


async def _read_form(request: Request, limits: LimitArgs) -> FormData:
    """Reads a form of files, which go to disk.

    Raises:
        MediaTypeError: the body is something else.
        InvalidRequestError: it cannot be read, or has other parts.
        HTTPError: as of `read_body`, with `limits.upload_bytes`; the time limit is that of each piece.
    """
    media = request.headers.get("content-type", "")
    if media.partition(";")[0].strip().lower() != "multipart/form-data":
        raise MediaTypeError(
            f"content-type must be multipart/form-data with the files config and weights, got {media[:200] or 'none'}."
        )
    pieces = body_pieces(request, limits, max_bytes=limits.upload_bytes)
    parser = MultiPartParser(request.headers, pieces, max_files=2, max_fields=0)
    try:
        return await parser.parse()
    except MultiPartException as error:
        raise InvalidRequestError(f"the form cannot be read: {error.message}") from None
    except (KeyError, ValueError, LookupError) as error:
        raise InvalidRequestError(f"the form cannot be read: {type(error).__name__}.") from error


def _part(form: FormData, name: str) -> UploadFile:
    parts = form.getlist(name)
    if others := sorted({key for key in form if key not in ("config", "weights")}):
        raise InvalidRequestError(
            f"the form has a part {others[0][:100]!r}. Send config and weights alone.", others[0][:100]
        )
    if len(parts) != 1 or not isinstance(parts[0], UploadFile):
        raise InvalidRequestError(f"the form must have one file {name}, got {len(parts)}.", name)
    return parts[0]
