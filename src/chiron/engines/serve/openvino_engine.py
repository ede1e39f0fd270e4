"""Continuous batching over OpenVINO GenAI, one step at a time on the event loop.

A step holds the interpreter's lock, so a thread of its own would only starve the loop. Instead the loop runs a step,
delivers its tokens, and takes its turn with the sockets before the next. Who joins the batch between two steps is
decided here: that is the max batch size, which can be changed at any time. Lowering it interrupts nobody.

A client that leaves frees its place at the next step. Its KV stays in the pipeline's prefix cache as long as there is
room, so the same request coming back with the tokens it got (``resume_token_ids``) goes on almost at once.
In the middle of its prefill it keeps the place until that is over (``openvino_batch`` says why).

When KV runs short the youngest sequences go back to the queue and go on from their tokens later.

With a profile, a step takes at least as long as the profile says for its batch, context and prefill: the process then
sleeps for most of each step, and a small machine can host several instances that do not slow one another.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from chiron.engines.model import StepTable
from chiron.engines.serve.answer import TokenLogprob
from chiron.engines.serve.call_text import CallText
from chiron.engines.serve.exposition import Histogram, Totals, exposition
from chiron.engines.serve.http import Reply
from chiron.engines.serve.openai import FinishReason, GenerationRequest
from chiron.engines.serve.openvino_batch import Batch
from chiron.engines.serve.openvino_model import BLOCK_TOKENS, Model
from chiron.engines.serve.openvino_sequence import Sequence
from chiron.engines.serve.refusals import check_queue, tokens_allowed
from chiron.engines.serve.request_error import RequestError
from chiron.engines.serve.schemas.grammar import Bounds, call_grammar, json_grammar
from chiron.engines.serve.schemas.nodes import SchemaError
from chiron.engines.serve.text import TextStream
from chiron.net.server import Incoming

log = logging.getLogger("chiron.openvino")

now_s = time.monotonic
"""The loop's clock, read at once: uvloop's own is as old as the loop's turn, and a step lies in between."""

_SEEDS_APART = 1_000_003
"""Between choices for the same prompt."""
_LATE_S = 0.02
"""A paced step that starts this much late at most counts from when it was due, so that coarse timers and a busy machine
do not add up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """What an embedded engine allows."""

    name: str
    """The model's name in metrics."""
    model_len_max: int
    """Prompt and answer together, tokens."""
    queue_max: int = 256
    """Requests that may wait inside for a place; beyond, the answer is 429."""
    bounds: Bounds = field(default_factory=Bounds)
    """Ends of JSON that a schema leaves open, for a model that would never come to one."""
    tells_tools: bool = True
    """Whether prompts hold the tools that a request offers."""


class OpenVinoEngine:
    """The step loop, and the requests in it. ``failed`` is called with the error when a step cannot be run."""

    def __init__(
        self,
        model: Model,
        settings: EngineSettings,
        *,
        loop: asyncio.AbstractEventLoop,
        failed: Callable[[Exception], None],
        pace: StepTable | None = None,
    ) -> None:
        self.model = model
        self.settings = settings
        self.limit = model.settings.max_num_seqs
        """Max batch size."""
        self.totals = Totals()
        self.queue_times = Histogram()
        """From arrival to the first time in the pipeline."""
        self.preemptions = 0
        """Sequences that went back to the queue for want of KV."""
        self._loop = loop
        self._failed = failed
        self._pace = pace
        self._batch = Batch(model)
        self._waiting: deque[Sequence] = deque()
        self._stepping = False
        self._due_s = 0.0
        """When the last paced step was to end, by the loop's clock."""
        self._ids = count(1)
        self._salt = os.urandom(6).hex()

    # -- from the front ------------------------------------------------------------------------------------------

    def submit(self, request: GenerationRequest, incoming: Incoming) -> None:
        _refuse(request)
        prompts = self._prompts(request)
        allowed = [
            tokens_allowed(request, prompt_tokens=len(prompt), context_max=self.settings.model_len_max)
            for prompt in prompts
        ]
        self._check_tokens("resume_token_ids", request.resume_token_ids)
        grammar = self._grammar(request)
        sequences = self._sequences(request, incoming, prompts, allowed, grammar)
        reason = self._resume(sequences[0])
        if reason is not None:
            sequences[0].finish([], reason)
            return
        # Places that are free but not taken yet, because a step is under way, are no queue.
        waiting = len(self._waiting) - max(0, self.limit - self._batch.size)
        check_queue(waiting, self.settings.queue_max)
        incoming.on_close = lambda: self._cancel(sequences)
        self.totals.prompt_tokens += sum(map(len, prompts))
        self._waiting.extend(sequences)
        self._wake()

    def _sequences(
        self,
        request: GenerationRequest,
        incoming: Incoming,
        prompts: list[list[int]],
        allowed: list[int],
        grammar: str | None,
    ) -> list[Sequence]:
        first = next(self._ids)
        done = len(request.resume_token_ids)
        reply = Reply(
            request,
            incoming,
            id=f"{self._salt}{first:x}",
            prompt_tokens=sum(map(len, prompts)),
            offset=len(self._text(request.resume_token_ids)) if done and request.logprobs is not None else 0,
        )
        echoes: list[str] = []
        if request.echo and not done:  # Once for all choices of a prompt.
            echoes = [given if isinstance(given, str) else self._text(given) for given in request.prompts]
        sequences: list[Sequence] = []
        for choice in reply.choices:
            which, number = divmod(choice.index, request.n)
            id = next(self._ids) if sequences else first
            if echoes:
                choice.add(echoes[which])
            names = [tool.name for tool in request.tools.allowed] if request.tools.mode == "required" else []
            sequences.append(
                Sequence(
                    id=id,
                    request=request,
                    number=number,
                    choice=choice,
                    prompt=prompts[which],
                    tokens_max=allowed[which],
                    text=TextStream(self.model.vocabulary, request.stop),
                    config=self._config(request, number, allowed[which], done, grammar),
                    constrained=grammar is not None,
                    call=CallText(names, id=f"call_{self._salt}{id:x}") if names else None,
                    arrival_s=now_s(),
                )
            )
        for sequence in sequences:
            sequence.siblings = sequences
        return sequences

    def set_limit(self, limit: int) -> None:
        """The max batch size from the next step on; the engine's ``max_num_seqs`` bounds it."""
        self.limit = min(limit, self.model.settings.max_num_seqs)
        self._wake()

    def limits(self) -> dict[str, int]:
        return {
            "limit": self.limit,
            "running": self._batch.size,
            "waiting": len(self._waiting),
            "max_num_seqs": self.model.settings.max_num_seqs,
            "kv_capacity_tokens": self.model.kv_capacity_tokens,
            "kv_used_tokens": self._batch.kv_used_tokens,
        }

    def metrics_text(self) -> str:
        capacity, used = self.model.kv_capacity_tokens, self._batch.kv_used_tokens
        waiting = [len(sequence.prompt) + len(sequence.generated) for sequence in self._waiting]
        gauges = {
            "vllm:num_requests_running": self._batch.size,
            "vllm:num_requests_waiting": len(self._waiting),
            "vllm:kv_cache_usage_perc": min(1.0, used / capacity),
            "chiron:engine_kv_capacity_tokens": capacity,
            "chiron:engine_kv_used_tokens": used,
            "chiron:engine_waiting_tokens": sum(waiting),
            "chiron:engine_head_tokens": waiting[0] if waiting else 0,
            "chiron:engine_max_batch_size": self.limit,
        }
        config = {"num_gpu_blocks": self.model.kv_blocks, "block_size": BLOCK_TOKENS}
        counters = {"vllm:num_preemptions_total": self.preemptions}
        histograms = {"vllm:request_queue_time_seconds": self.queue_times}
        return exposition(self.settings.name, self.totals, gauges, config, counters, histograms)

    # -- requests ------------------------------------------------------------------------------------------------

    def _prompts(self, request: GenerationRequest) -> list[list[int]]:
        if not request.chat:
            return [self._prompt(prompt) for prompt in request.prompts]
        if not self.model.chat_template:
            raise RequestError("This model has no chat template; use /v1/completions.", param="messages")
        told = self.settings.tells_tools and request.tools.mode != "none"
        tools = request.tools.offered if told else ()
        try:
            text = self.model.chat(request.messages, tools)
        except RuntimeError as error:
            log.warning("%d messages do not go through the model's chat template: %s", len(request.messages), error)
            raise RequestError("messages do not fit this model's chat template.", param="messages") from None
        return [self._encoded(text, "messages")]

    def _prompt(self, prompt: str | tuple[int, ...]) -> list[int]:
        if isinstance(prompt, str):
            return self._encoded(prompt, "prompt")
        self._check_tokens("prompt", prompt)
        return list(prompt)

    def _encoded(self, text: str, where: str) -> list[int]:
        try:
            # A chat template writes the begin token itself.
            prompt = self.model.encode(text, special=where == "prompt")
        except RuntimeError as error:
            log.warning("a prompt of %d characters cannot be tokenised: %s", len(text), error)
            raise RequestError(
                f"{where} cannot be turned into tokens by this model's tokenizer.", param=where
            ) from None
        if not prompt:
            raise RequestError(f"{where} is empty; it must hold at least one token.", param=where)
        return prompt

    def _text(self, token_ids: tuple[int, ...]) -> str:
        stream = TextStream(self.model.vocabulary)
        return stream.feed(token_ids) + stream.flush()

    def _grammar(self, request: GenerationRequest) -> str | None:
        """What holds the answer to JSON, or to a call of a tool; None: it is free."""
        tools, param = request.tools, "response_format"
        try:
            if tools.mode == "required":
                param = "tools"
                return call_grammar([(tool.name, tool.arguments) for tool in tools.allowed], self.settings.bounds)
            return None if request.json is None else json_grammar(request.json, self.settings.bounds)
        except SchemaError as error:
            raise RequestError(f"A schema in {param}: {error}", param=param) from None

    def _check_tokens(self, field: str, token_ids: tuple[int, ...]) -> None:
        largest, allowed = max(token_ids, default=0), len(self.model.vocabulary) - 1
        if largest > allowed:
            raise RequestError(f"{field} holds token {largest}; this model's are 0 to {allowed}.", param=field)

    def _config(
        self, request: GenerationRequest, number: int, tokens_max: int, done: int, grammar: str | None = None
    ) -> Any:
        """For the tokens that are left after ``done``, of the choice ``number`` for a prompt."""
        seed = int.from_bytes(os.urandom(4)) if request.seed is None else request.seed
        sampled = request.temperature > 0 and request.top_p > 0
        fields: dict[str, Any] = {
            "max_new_tokens": max(1, tokens_max - done),
            "ignore_eos": request.ignore_eos and grammar is None,
            "do_sample": sampled,
            "frequency_penalty": request.frequency_penalty,
            "presence_penalty": request.presence_penalty,
        }
        if request.logprobs is not None:
            fields["logprobs"] = 1
        if grammar is not None:
            fields["structured_output_config"] = self.model.grammar(grammar)
        if sampled:
            # A resumed answer must not repeat the draws it began with.
            fields |= {
                "temperature": request.temperature,
                "top_p": request.top_p,
                "rng_seed": (seed + done + number * _SEEDS_APART) % (1 << 64),
            }
        try:
            return self.model.config(**fields)
        except RuntimeError as error:
            raise RequestError(f"The engine does not take these sampling settings: {error}.") from None

    def _resume(self, sequence: Sequence) -> FinishReason | None:
        """Bring a sequence to where it was interrupted; the reason if it had ended there."""
        done = sequence.request.resume_token_ids
        if not done:
            return None
        sequence.text.feed(done)
        if sequence.text.stopped or (done[-1] == self.model.eos_id and not sequence.request.ignore_eos):
            return "stop"
        return "length" if len(done) >= sequence.tokens_max else None

    def _cancel(self, sequences: list[Sequence]) -> None:
        """The rest of an answer is no longer needed."""
        for sequence in sequences:
            if sequence in self._batch.running:
                self._batch.cancel(sequence)
            elif sequence in self._waiting:
                self._waiting.remove(sequence)
            else:
                continue
            self.totals.cancelled += 1

    # -- steps ---------------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        if not self._stepping:
            self._stepping = True
            self._loop.call_soon(self._step)

    def _step(self) -> None:
        try:
            self._make_room()
            self._admit()
            # Sequences that were cancelled are let go by one more step, even if nobody else is left.
            if not self._batch.running and not self.model.pipeline.has_non_finished_requests():
                self._stepping = False
                self._due_s = 0.0  # Time without work is not lateness.
                return
            started_s = now_s()
            if self._pace is not None and started_s - self._due_s < _LATE_S:
                started_s = self._due_s
            self.model.pipeline.step()
            self._batch.stepped()
            least_s = self._account()
        except Exception as error:
            self._fail(error)
            return
        if self._pace is None:
            self._deliver(started_s)
            return
        self._due_s = max(started_s + least_s, now_s())
        self._loop.call_at(self._due_s, self._deliver, started_s)

    def _admit(self) -> None:
        while self._waiting and self._batch.size < self.limit and self._batch.has_room(self._waiting[0]):
            sequence = self._waiting.popleft()
            if sequence.handle is None:
                self.queue_times.add(now_s() - sequence.arrival_s)
            self.totals.cached_tokens += self._batch.enter(sequence)

    def _make_room(self) -> None:
        while (sequence := self._batch.give_back()) is not None:
            sequence.config = self._config(
                sequence.request, sequence.number, sequence.tokens_max, len(sequence.generated)
            )
            self._waiting.appendleft(sequence)
            self.preemptions += 1

    def _account(self) -> float:
        """Count what the step did: decodes first, the rest of its token budget for prefills in order of arrival.

        Returns the least time that it may take, seconds; 0 without a profile.
        """
        inside = self._batch.inside
        decoding = [sequence for sequence in inside if sequence.prefill_left == 0]
        contexts = sum(sequence.context for sequence in decoding)
        budget, attention = self.model.settings.max_num_batched_tokens - len(decoding), 0
        prefilled = 0
        for sequence in inside:
            chunk = min(sequence.prefill_left, max(0, budget))
            if chunk:
                offset = sequence.context - sequence.prefill_left
                attention += (offset + chunk) ** 2 - offset**2
                sequence.prefill_left -= chunk
                budget -= chunk
                prefilled += chunk
        self.totals.prefill_tokens += prefilled
        pace = self._pace
        if pace is None or not inside:
            return 0.0
        tokens = min(prefilled + len(decoding), len(pace.base) - 1)
        return pace.base[tokens] + pace.c * contexts + pace.q * attention

    def _deliver(self, started_s: float) -> None:
        """Hand out what the step generated, let the loop serve its sockets, and go on."""
        ended_s = now_s() if self._pace is None else self._due_s
        self.totals.steps += 1
        self.totals.busy_s += ended_s - started_s
        try:
            self._batch.let_leave()
            for sequence in self._batch.running.copy():
                self._read(sequence, ended_s)
        except Exception as error:
            self._fail(error)
            return
        self._loop.call_soon(self._step)

    def _read(self, sequence: Sequence, ended_s: float) -> None:
        new: list[int] = []
        likely: list[float] = []
        ended: FinishReason | None = None
        handle = sequence.handle
        while handle.can_read():
            for output in handle.read().values():
                new += output.generated_ids
                likely += output.generated_log_probs
                ended = _REASONS.get(output.finish_reason.name)
        if not new:
            if handle.get_status().name not in ("RUNNING", "FINISHED"):
                self._batch.leave(sequence)
                self.totals.finished["error"] += 1
                sequence.choice.fail(_no_room())
                self._cancel(sequence.siblings)
            return
        self._count(sequence, len(new), ended_s)
        sequence.generated += new
        text = sequence.text.feed(new)
        if sequence.text.stopped:
            ended = "stop"
        logprobs = self._logprobs(new, likely) if sequence.request.logprobs is not None else ()
        if ended is None:
            sequence.step(new, text, logprobs)
            return
        self._batch.leave(sequence)
        self.totals.finished[ended] += 1
        self.totals.e2e.add(ended_s - sequence.arrival_s)
        sequence.finish(new, ended, text, logprobs)

    def _logprobs(self, token_ids: list[int], logprobs: list[float]) -> list[TokenLogprob]:
        table = self.model.vocabulary
        pairs = zip(token_ids, logprobs, strict=False)
        return [TokenLogprob(table[id] if id < len(table) else b"", logprob) for id, logprob in pairs]

    def _count(self, sequence: Sequence, tokens: int, ended_s: float) -> None:
        totals = self.totals
        totals.generation_tokens += tokens
        sequence.prefill_left = 0
        if sequence.last_s is None:
            totals.ttft.add(ended_s - sequence.arrival_s)
        else:
            totals.decode_tokens += tokens
            totals.context_tokens += sequence.context
            totals.itl.add(ended_s - sequence.last_s)
        sequence.last_s = ended_s

    def _fail(self, error: Exception) -> None:
        """A step cannot be run: all requests here fail."""
        log.exception("a step failed")
        trouble = RequestError("The engine failed.", status=500, type="server_error", code="engine_failed")
        for sequence in [*self._batch.running, *self._waiting]:
            sequence.choice.fail(trouble)
        self._batch.clear()
        self._waiting.clear()
        self._failed(error)


def _refuse(request: GenerationRequest) -> None:
    """What this engine lacks."""
    if request.logprobs:
        field = "top_logprobs" if request.chat else "logprobs"
        raise RequestError(
            f"{field} is {request.logprobs}; it must be 0: this engine knows log probabilities only of the tokens that "
            "it generates.",
            param=field,
            code="unsupported_parameter",
        )
    if request.echo and request.logprobs is not None:
        raise RequestError(
            "logprobs with echo is not implemented by this engine: it does not know them of prompts.",
            param="logprobs",
            code="unsupported_parameter",
        )
    if request.resume_token_ids and (request.json is not None or request.tools.mode == "required"):
        raise RequestError(
            "resume_token_ids must be absent with response_format or tools: this engine holds to a schema only from an "
            "answer's beginning on.",
            param="resume_token_ids",
        )


_REASONS: dict[str, FinishReason] = {"STOP": "stop", "LENGTH": "length"}
"""The pipeline's finish reasons, in OpenAI's words."""


def _no_room() -> RequestError:
    return RequestError(
        "The request does not fit into the engine's KV cache.", status=503, type="server_error", code="kv_cache_full"
    )
