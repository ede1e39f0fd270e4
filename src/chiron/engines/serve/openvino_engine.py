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
from dataclasses import dataclass
from itertools import count
from typing import Any

from chiron.engines.model import StepTimes
from chiron.engines.serve.exposition import Histogram, Totals, exposition
from chiron.engines.serve.front import Reply
from chiron.engines.serve.openai import FinishReason, GenerationRequest, RequestError
from chiron.engines.serve.openvino_batch import Batch
from chiron.engines.serve.openvino_model import BLOCK_TOKENS, Model
from chiron.engines.serve.openvino_sequence import Sequence
from chiron.engines.serve.refusals import check_queue, tokens_allowed
from chiron.engines.serve.text import TextStream
from chiron.net.server import Incoming

log = logging.getLogger("chiron.openvino")

now_s = time.monotonic
"""The loop's clock, read at once: uvloop's own is as old as the loop's turn, and a step lies in between."""

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


class OpenVinoEngine:
    """The step loop, and the requests in it. ``failed`` is called with the error when a step cannot be run."""

    def __init__(
        self,
        model: Model,
        settings: EngineSettings,
        *,
        loop: asyncio.AbstractEventLoop,
        failed: Callable[[Exception], None],
        pace: StepTimes | None = None,
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
        prompt = self._prompt(request)
        tokens_max = tokens_allowed(request, prompt_tokens=len(prompt), context_max=self.settings.model_len_max)
        self._check_tokens("resume_token_ids", request.resume_token_ids)
        id = next(self._ids)
        sequence = Sequence(
            id=id,
            request=request,
            reply=Reply(request, incoming, id=f"{self._salt}{id:x}"),
            prompt=prompt,
            tokens_max=tokens_max,
            text=TextStream(self.model.vocabulary, request.stop),
            config=self._config(request, tokens_max, len(request.resume_token_ids)),
            arrival_s=now_s(),
        )
        reason = self._resume(sequence)
        if reason is not None:
            sequence.finish([], reason)
            return
        # Places that are free but not taken yet, because a step is under way, are no queue.
        waiting = len(self._waiting) - max(0, self.limit - self._batch.size)
        check_queue(waiting, self.settings.queue_max)
        incoming.on_close = lambda: self._cancel(sequence)
        self.totals.prompt_tokens += len(prompt)
        self._waiting.append(sequence)
        self._wake()

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

    def _prompt(self, request: GenerationRequest) -> list[int]:
        where = "messages" if request.chat else "prompt"
        if not isinstance(request.prompt, str):
            self._check_tokens(where, request.prompt)
            return list(request.prompt)
        if request.chat and not self.model.chat_template:
            raise RequestError("This model has no chat template; use /v1/completions.", param=where)
        try:
            # A chat template writes the begin token itself.
            text = self.model.chat(request.messages) if request.chat else request.prompt
            prompt = self.model.encode(text, special=not request.chat)
        except RuntimeError as error:
            log.warning("a prompt of %d characters cannot be tokenised: %s", len(request.prompt), error)
            raise RequestError(
                f"{where} cannot be turned into tokens by this model's tokenizer.", param=where
            ) from None
        if not prompt:
            raise RequestError(f"{where} is empty; it must hold at least one token.", param=where)
        return prompt

    def _check_tokens(self, field: str, token_ids: tuple[int, ...]) -> None:
        largest, allowed = max(token_ids, default=0), len(self.model.vocabulary) - 1
        if largest > allowed:
            raise RequestError(f"{field} holds token {largest}; this model's are 0 to {allowed}.", param=field)

    def _config(self, request: GenerationRequest, tokens_max: int, done: int) -> Any:
        """For the tokens that are left after ``done``."""
        seed = int.from_bytes(os.urandom(4)) if request.seed is None else request.seed
        sampled = request.temperature > 0 and request.top_p > 0
        fields: dict[str, Any] = {
            "max_new_tokens": max(1, tokens_max - done),
            "ignore_eos": request.ignore_eos,
            "do_sample": sampled,
            "frequency_penalty": request.frequency_penalty,
            "presence_penalty": request.presence_penalty,
        }
        if sampled:
            # A resumed answer must not repeat the draws it began with.
            fields |= {
                "temperature": request.temperature,
                "top_p": request.top_p,
                "rng_seed": (seed + done) % (1 << 64),
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

    def _cancel(self, sequence: Sequence) -> None:
        """The client has left."""
        if sequence in self._batch.running:
            self._batch.cancel(sequence)
        elif sequence in self._waiting:
            self._waiting.remove(sequence)
        else:
            return
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
                self._due_s = 0.0  # Time without work is nobody's lateness.
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
            sequence.config = self._config(sequence.request, sequence.tokens_max, len(sequence.generated))
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
        ended: FinishReason | None = None
        handle = sequence.handle
        while handle.can_read():
            for output in handle.read().values():
                new += output.generated_ids
                ended = _REASONS.get(output.finish_reason.name)
        if not new:
            if handle.get_status().name not in ("RUNNING", "FINISHED"):
                self._batch.leave(sequence)
                self.totals.finished["error"] += 1
                sequence.reply.fail(_no_room())
            return
        self._count(sequence, len(new), ended_s)
        sequence.generated += new
        text = sequence.text.feed(new)
        if sequence.text.stopped:
            ended = "stop"
        if ended is None:
            sequence.reply.step(text, new)
            return
        self._batch.leave(sequence)
        self.totals.finished[ended] += 1
        self.totals.e2e.add(ended_s - sequence.arrival_s)
        sequence.finish(new, ended, text)

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
        """A step cannot be run: nobody here gets an answer any more."""
        log.exception("a step failed")
        trouble = RequestError("The engine failed.", status=500, type="server_error", code="engine_failed")
        for sequence in [*self._batch.running, *self._waiting]:
            sequence.reply.fail(trouble)
        self._batch.clear()
        self._waiting.clear()
        self._failed(error)


_REASONS: dict[str, FinishReason] = {"STOP": "stop", "LENGTH": "length"}
"""The pipeline's finish reasons, in OpenAI's words."""


def _no_room() -> RequestError:
    return RequestError(
        "The request does not fit into the engine's KV cache.", status=503, type="server_error", code="kv_cache_full"
    )
