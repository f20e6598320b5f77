"""LMDeploy's own endpoints: /generate in its new and its oldest form, the tokenizer, perplexity."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response as HttpResponse

from lmdeploy.async_engine import Prompt
from lmdeploy.chat_template.base import RenderOptions
from lmdeploy.errors import InvalidParameter
from lmdeploy.messages import GenerationConfig, Response
from lmdeploy.serve.connection import EventStream, while_connected
from lmdeploy.serve.errors import json_response
from lmdeploy.serve.openai.chat import message_dicts
from lmdeploy.serve.openai.protocol import (
    DetokenizeRequest,
    EncodeRequest,
    GenerateRequest,
    PerplexityRequest,
    TokenizeRequest,
)
from lmdeploy.serve.openai.sampling import generation_config, refuse_unsupported
from lmdeploy.serve.openai.scope import service_of, tenant_of
from lmdeploy.serve.service import Job, Service

DEFAULT_MAX_TOKENS = 128
_FIRST_FORM = {"temperature": 0.8, "top_p": 0.8, "top_k": 40}

router = APIRouter(tags=["LMDeploy"])


@router.post("/generate")
async def generate(body: GenerateRequest, request: Request) -> HttpResponse:
    refuse_unsupported(body, "image_data")
    service, tenant = service_of(request), tenant_of(request)
    is_first_form = body.request_output_len is not None
    job = _first_form_job(body, tenant) if is_first_form else _job(body, tenant)
    if body.stream:
        return EventStream(_parts(service, job, is_first_form), is_sse=not is_first_form)
    (response,) = await while_connected(service.collect(job), request.receive)
    return json_response(_first_form(response) if is_first_form else _generated(response))


def _job(body: GenerateRequest, tenant: str) -> Job:
    if isinstance(body.stop, bool):
        raise InvalidParameter("stop: give a text or a list of texts")
    if (body.prompt is None) == (body.input_ids is None):
        raise InvalidParameter("give either prompt or input_ids")
    if isinstance(body.prompt, list):
        raise InvalidParameter("prompt: give a text; messages go to /v1/chat/completions")
    if body.n not in (None, 1):
        raise InvalidParameter(f"n={body.n}: this endpoint gives one answer")
    config = generation_config(body, body.max_tokens or DEFAULT_MAX_TOKENS, logprobs=0 if body.return_logprob else None)
    prompt = body.prompt if body.input_ids is None else body.input_ids
    assert prompt is not None
    return Job(
        [prompt], config, do_preprocess=False, tenant=tenant, is_streaming=body.stream, session_id=body.session_id
    )


def _first_form_job(body: GenerateRequest, tenant: str) -> Job:
    """Version 0.1: the prompt is rendered; `stop`, a boolean there, was about sessions."""
    if body.prompt is None:
        raise InvalidParameter("prompt is missing")
    plain = body.model_copy(update={"stop": None if isinstance(body.stop, bool) else body.stop, "n": None})
    defaults = {name: value for name, value in _FIRST_FORM.items() if name not in body.model_fields_set}
    config = generation_config(plain, body.request_output_len, **defaults)
    prompt: Prompt = body.prompt if isinstance(body.prompt, str) else message_dicts(body.prompt)
    return Job([prompt], config, tenant=tenant, is_streaming=body.stream, session_id=body.session_id)


async def _parts(service: Service, job: Job, is_first_form: bool) -> AsyncGenerator[dict[str, Any], None]:
    async with aclosing(service.answer(job)) as responses:
        async for response in responses:
            yield _first_form(response) if is_first_form else _generated(response)


def _generated(response: Response) -> dict[str, Any]:
    """In a stream, what is new; the counts in meta_info are of the whole answer so far."""
    reason = None if response.finish_reason is None else {"type": response.finish_reason}
    meta: dict[str, Any] = {
        "prompt_tokens": response.input_token_len,
        "completion_tokens": response.generate_token_len,
        "finish_reason": reason,
        "output_token_logprobs": None,
    }
    if response.logprobs is not None:
        pairs = zip(response.token_ids, response.logprobs, strict=True)
        meta["output_token_logprobs"] = [(max(values[token], -9999.0), token) for token, values in pairs]
    return {"text": response.text, "output_ids": response.token_ids, "meta_info": meta}


def _first_form(response: Response) -> dict[str, Any]:
    return {"text": response.text, "tokens": response.generate_token_len, "finish_reason": response.finish_reason}


@router.post("/v1/encode")
async def encode(body: EncodeRequest, request: Request) -> HttpResponse:
    engine = service_of(request).engine

    def one(text: str) -> list[int]:
        if body.do_preprocess:
            return engine.encode(text)
        return engine.tokenizer.encode(text, add_bos=body.add_bos)

    if isinstance(body.input, str):
        ids = await asyncio.to_thread(one, body.input)
        return json_response({"input_ids": ids, "length": len(ids)})
    lists = await asyncio.to_thread(lambda: [one(text) for text in body.input])
    return json_response({"input_ids": lists, "length": [len(ids) for ids in lists]})


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, request: Request) -> HttpResponse:
    service = service_of(request)
    service.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise InvalidParameter("give either prompt or messages")
    engine = service.engine

    def encoded() -> list[int]:
        if body.messages is not None:
            options = RenderOptions(add_generation_prompt=body.add_generation_prompt)
            return engine.encode(message_dicts(body.messages), options=options)
        return engine.tokenizer.encode(body.prompt or "", add_special_tokens=body.add_special_tokens)

    ids = await asyncio.to_thread(encoded)
    spelled = [engine.tokenizer.id_to_token(token) for token in ids] if body.return_token_strs else None
    return json_response(
        {"count": len(ids), "max_model_len": engine.client.info.session_len, "tokens": ids, "token_strs": spelled}
    )


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, request: Request) -> HttpResponse:
    service = service_of(request)
    service.check_model(body.model)
    last = service.engine.client.info.vocab_size - 1
    if (worst := max(body.tokens, default=0)) > last:
        raise InvalidParameter(f"tokens holds token id {worst}; this model's ids are 0 to {last}")
    text = await asyncio.to_thread(service.engine.tokenizer.decode, body.tokens, body.skip_special_tokens)
    return json_response({"prompt": text})


@router.get("/tokenizer_info")
async def tokenizer_info(request: Request) -> HttpResponse:
    """What a client needs to render and cut prompts itself."""
    service = service_of(request)
    tokenizer, template = service.engine.tokenizer, service.engine.chat_template
    return json_response(
        {
            "model": service.settings.model_name,
            "max_model_len": service.engine.client.info.session_len,
            "vocab_size": tokenizer.vocab_size,
            "bos_token": tokenizer.bos_token,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token": tokenizer.eos_token,
            "eos_token_id": tokenizer.eos_token_id,
            "eos_token_ids": service.engine.end_token_ids,
            "special_tokens": tokenizer.special_tokens,
            "chat_template": tokenizer.chat_template,
            "chat_template_name": template.name,
            "stop_words": template.stop_words,
        }
    )


@router.post("/get_ppl")
async def get_ppl(body: PerplexityRequest, request: Request) -> HttpResponse:
    """The mean cross entropy of a text in nats, as `Pipeline.get_ppl` gives it."""
    service = service_of(request)
    prompt = body.input
    ids = await asyncio.to_thread(service.engine.tokenizer.encode, prompt) if isinstance(prompt, str) else prompt
    if len(ids) < 2:
        raise InvalidParameter(f"the text has {len(ids)} tokens: a perplexity needs at least 2")
    job = Job([ids], GenerationConfig(max_new_tokens=0, return_ppl=True), tenant=tenant_of(request))
    (response,) = await while_connected(service.collect(job), request.receive)
    return json_response({"ppl": response.ppl})
