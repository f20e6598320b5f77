"""POST /v1/embeddings and /pooling: the model's last hidden states of a text, pooled; an embedding has length 1."""

from __future__ import annotations

import base64
import time
import uuid
from typing import Any

import torch
from fastapi import APIRouter, Request
from starlette.responses import Response as HttpResponse

from lmdeploy.errors import InvalidParameter
from lmdeploy.messages import GenerationConfig, Response
from lmdeploy.serve.connection import while_connected
from lmdeploy.serve.errors import json_response
from lmdeploy.serve.openai.completions import prompt_list
from lmdeploy.serve.openai.protocol import EmbeddingRequest
from lmdeploy.serve.openai.scope import service_of, tenant_of
from lmdeploy.serve.service import Job

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/embeddings")
async def embeddings(body: EmbeddingRequest, request: Request) -> HttpResponse:
    responses = await _hidden_states(body, request)
    data = [
        {"object": "embedding", "index": response.index, "embedding": _encoded(_scaled(_pooled(response, body)), body)}
        for response in responses
    ]
    return json_response(_list(request, data, responses))


@router.post("/pooling", tags=["LMDeploy"])
async def pooling(body: EmbeddingRequest, request: Request) -> HttpResponse:
    """The pooled states as the model computes them, of whatever length."""
    responses = await _hidden_states(body, request)
    data = [
        {"object": "pooling", "index": response.index, "data": _encoded(_pooled(response, body), body)}
        for response in responses
    ]
    head = {"id": f"pool-{uuid.uuid4().hex}", "created": int(time.time())}
    return json_response(head | _list(request, data, responses))


async def _hidden_states(body: EmbeddingRequest, request: Request) -> list[Response]:
    service = service_of(request)
    service.check_model(body.model)
    if body.dimensions is not None:
        raise InvalidParameter("dimensions is not supported: the vector has the model's hidden size")
    config = GenerationConfig(max_new_tokens=0, output_last_hidden_state="all")
    job = Job(prompt_list(body.input), config, do_preprocess=False, tenant=tenant_of(request))
    return await while_connected(service.collect(job), request.receive)


def _list(request: Request, data: list[dict[str, Any]], responses: list[Response]) -> dict[str, Any]:
    num_tokens = sum(response.input_token_len for response in responses)
    return {
        "object": "list",
        "data": data,
        "model": service_of(request).settings.model_name,
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }


def _pooled(response: Response, body: EmbeddingRequest) -> torch.Tensor:
    """[C] float32."""
    states = response.last_hidden_state
    assert states is not None
    rows = states[: response.input_token_len].float()
    return rows[-1] if body.pooling == "last" else rows.mean(dim=0)


def _scaled(vector: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(vector, dim=0)


def _encoded(vector: torch.Tensor, body: EmbeddingRequest) -> Any:
    if body.encoding_format == "base64":
        return base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode()
    return vector.tolist()
