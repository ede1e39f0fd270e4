"""One emulated instance: the simulator's engine model, in real time, with a client at the end of each sequence.

The model decides when each step ends; whoever decoded in it gets one event then. What it says costs nothing
(``filler``), so what a client measures is the profile's timing plus that of the sockets. A client that leaves frees its
place at the end of the step under way, and its KV goes to host memory as after an eviction: the same request coming
back with the tokens it got is copied back in, one that comes to another instance is prefilled again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from chiron.core.types import Instance, InstanceKind, Request, RequestClass, Sample
from chiron.engines.model import EngineModel, StepTable
from chiron.engines.profile import Profile
from chiron.engines.saved_kv import SavedKv
from chiron.engines.serve.answer import CallPiece
from chiron.engines.serve.exposition import Totals, exposition
from chiron.engines.serve.filler import (
    LengthSettings,
    Output,
    logprobs,
    plan_output,
    prompt_logprobs,
    prompt_tokens,
    spelled,
    text_of,
    token_ids,
)
from chiron.engines.serve.http import Choice, Reply
from chiron.engines.serve.openai import GenerationRequest
from chiron.engines.serve.refusals import check_queue, tokens_allowed
from chiron.engines.serve.request_error import RequestError
from chiron.engines.serve.schemas.nodes import SchemaError
from chiron.engines.serve.sleep_mode import SleepMode, SleepTimes
from chiron.net.clock import LiveClock
from chiron.net.server import Incoming

log = logging.getLogger("chiron.emulated")

_LATE_S = 1.0
"""Behind by more than this the log says so, every so often."""
_WARN_EVERY_S = 30.0
_CLASS = RequestClass(name="any", kind="batch")


@dataclass(frozen=True, slots=True, kw_only=True)
class EmulatedSettings:
    """What an emulated instance has besides its profile."""

    lengths: LengthSettings = field(default_factory=LengthSettings)
    model_len_max: int = 131_072
    """Prompt and answer together, tokens; never more than the KV cache holds."""
    queue_max: int = 1024
    """Requests that may wait inside for a slot or for KV; beyond, the answer is 429."""
    kv_transfer_gb_per_s: float = 20.0
    """To and from host memory. 0: KV is not saved, and whatever is interrupted is prefilled again."""
    kv_saved_tokens_max: int = 4_000_000
    """Host memory for KV of interrupted requests, in tokens; the longest forgotten goes first."""


def at_speed(profile: Profile, speedup: float) -> Profile:
    """The same engine, faster (above 1) or slower."""
    times = {name: getattr(profile, name) / speedup for name in _TIMES}
    return replace(profile, **times)


_TIMES = (
    "h_ms",
    "w0_ms",
    "f_ms_per_token",
    "c_ms_per_context_token",
    "q_ms_per_token_squared",
    "step_overhead_ms",
    "request_overhead_ms",
    "admission_ms",
)


class EmulatedEngine:
    """Serves requests with a profile's timing; hears of its model's progress (``EngineEvents``)."""

    def __init__(
        self,
        *,
        clock: LiveClock,
        number: int,
        name: str,
        profile: Profile,
        times: StepTable,
        settings: EmulatedSettings,
        speedup: float = 1.0,
        sleep_times: SleepTimes | None = None,
    ) -> None:
        """``name`` is for metrics. ``profile`` and ``times`` are at their speed already; ``speedup`` is for
        copies to host memory. ``sleep_times``: it can sleep, and calls take so long."""
        self._clock = clock
        self.profile = profile
        self.settings = settings
        self.model_len_max = min(settings.model_len_max, profile.kv_capacity_tokens)
        bytes_per_s = settings.kv_transfer_gb_per_s * 1e9 * speedup
        self.model = EngineModel(
            clock=clock,
            instance=Instance(number, profile.model, _kind(profile), "mixed", 0.0),
            profile=profile,
            times=times,
            listener=self,
            kv_seconds_per_token=profile.kv_bytes_per_token / bytes_per_s if bytes_per_s > 0 else 0.0,
            step_mode=True,
            stepped=self._stepped,
        )
        self.sleep_mode: SleepMode | None = None
        if sleep_times is not None:
            self.sleep_mode = SleepMode(clock=clock, times=sleep_times, drop=self._drop)
        self.totals = Totals()
        self.late_s = 0.0
        """By how much the machine was behind at the ends of steps, added up: an emulation that it cannot keep up with
        shows here."""
        self._warned_s = -_WARN_EVERY_S
        self._name = name
        self._streams: dict[int, _Stream] = {}
        self._saved = SavedKv(settings.kv_saved_tokens_max)
        """Interrupted requests by digest."""
        self._next_id = 0

    # -- from the front ------------------------------------------------------------------------------------------

    def submit(self, request: GenerationRequest, incoming: Incoming) -> None:
        """Answer a request, now or step by step. Raises RequestError."""
        if self.sleep_mode is not None:
            self.sleep_mode.check_awake()
        prompts = request.prompts or ("",)
        lengths = [prompt_tokens(request, prompt) for prompt in prompts]
        outputs = [
            self._plan(request, prompt, length, choice)
            for prompt, length in zip(prompts, lengths, strict=True)
            for choice in range(request.n)
        ]
        first = self._next_id + 1
        done = len(request.resume_token_ids)
        reply = Reply(
            request,
            incoming,
            id=f"{outputs[0].digest:016x}-{first}",
            prompt_tokens=sum(lengths),
            offset=len(outputs[0].text(0, done)) if done else 0,
        )
        streams = []
        for index, output in enumerate(outputs):
            prompt, length = prompts[index // request.n], lengths[index // request.n]
            choice = reply.choices[index]
            if request.echo and not done:
                _echo(choice, spelled(prompt), request.logprobs)
            streams.append(_Stream(choice, request, output, length, self._clock.elapsed_s(), self.totals))
        if done >= outputs[0].tokens:
            streams[0].end()  # The resumed part was the whole answer.
            return
        self._check_queue()
        self.totals.prompt_tokens += sum(lengths)
        inners = [self._inner(stream, request) for stream in streams]
        incoming.on_close = lambda: self._cancel(inners)
        for inner in inners:
            self._start(inner)

    def _plan(self, request: GenerationRequest, prompt: str | tuple[int, ...], length: int, choice: int) -> Output:
        tokens_max = tokens_allowed(request, prompt_tokens=length, context_max=self.model_len_max)
        try:
            return plan_output(request, prompt, choice, tokens_max, self.settings.lengths)
        except SchemaError as error:
            raise RequestError(f"No value was found that fits the schema: {error}", param="response_format") from None

    def _inner(self, stream: _Stream, request: GenerationRequest) -> Request:
        """A sequence as the engine's model sees it."""
        self._next_id += 1
        id, output = self._next_id, stream.output
        inner = Request(id, self.profile.model, _CLASS, stream.arrival_s, stream.prompt, payload=output.tokens)
        inner.tokens_done = stream.generated
        self._restore(inner, request, output)
        self._streams[id] = stream
        return inner

    def _start(self, inner: Request) -> None:
        self._clock.post(lambda: self.model.start(inner))

    def set_limit(self, limit: int) -> None:
        self._clock.post(lambda: self.model.set_max_batch_size(limit))

    def set_token_budget(self, tokens: int) -> None:
        """Of steps with prefill, from the next one on; the profile's bounds it."""
        self._clock.post(lambda: self.model.set_max_num_batched_tokens(tokens))

    def sample(self) -> Sample:
        """What a scrape reads now."""
        samples: list[Sample] = []
        self._clock.post(lambda: samples.append(self.model.sample()))
        return samples[0]

    def limits(self) -> dict[str, int]:
        sample = self.sample()
        return {
            "limit": self.model.max_batch_size,
            "running": sample.running,
            "waiting": sample.waiting,
            "max_num_seqs": self.profile.max_num_seqs,
            "max_num_batched_tokens": self.model.max_num_batched_tokens,
            "kv_capacity_tokens": self.profile.kv_capacity_tokens,
            "kv_used_tokens": sample.kv_used_tokens,
        }

    def metrics_text(self) -> str:
        sample, totals, capacity = self.sample(), self.totals, self.profile.kv_capacity_tokens
        totals.steps, totals.busy_s, totals.context_tokens = sample.steps, sample.busy_s, int(sample.context_tokens)
        totals.decode_tokens, totals.prefill_tokens = sample.decode_tokens, sample.prefill_tokens
        gauges = {
            "vllm:num_requests_running": sample.running,
            "vllm:num_requests_waiting": sample.waiting,
            "vllm:kv_cache_usage_perc": sample.kv_used_tokens / capacity,
            "chiron:engine_kv_capacity_tokens": capacity,
            "chiron:engine_kv_used_tokens": sample.kv_used_tokens,
            "chiron:engine_waiting_tokens": sample.waiting_tokens,
            "chiron:engine_head_tokens": sample.head_tokens,
            "chiron:engine_max_batch_size": self.model.max_batch_size,
        }
        counters = {
            "vllm:num_preemptions_total": sample.preemptions,
            "chiron:engine_late_seconds_total": self.late_s,
        }
        config = {"block_size": 1, "num_gpu_blocks": capacity}
        return exposition(self._name, totals, gauges, config, counters)

    def _check_queue(self) -> None:
        # Places that are free but not taken yet, because a step is under way, are no queue.
        waiting = len(self._streams) - max(self.sample().running, self.model.max_batch_size)
        check_queue(waiting, self.settings.queue_max)

    def fail(self) -> None:
        """Die: every answer breaks off."""
        streams, self._streams = list(self._streams.values()), {}
        self.model.fail()
        for stream in streams:
            stream.choice.abort()

    def _drop(self) -> None:
        """Answers break off, and no KV is left, here or in host memory."""
        self.fail()
        self._saved = SavedKv(self.settings.kv_saved_tokens_max)

    # -- interrupted requests ------------------------------------------------------------------------------------

    def _cancel(self, inners: Sequence[Request]) -> None:
        def leave() -> None:
            for inner in inners:
                self.model.evict(inner)

        self._clock.post(leave)

    def _restore(self, inner: Request, request: GenerationRequest, output: Output) -> None:
        """Let a request that was interrupted here find its KV again."""
        done = request.resume_token_ids
        if not done or self._saved.generated(output.digest) < len(done):
            return
        if list(done) != output.ids(0, len(done)):
            return  # Not the tokens that this KV belongs to.
        self._saved.forget(output.digest)
        # The last token was sent, but it is the next step that will put it into the KV.
        inner.kv_saved_tokens = inner.input_tokens + len(done) - 1
        inner.kv_saved_on = self.model.instance.id
        self.totals.cached_tokens += inner.kv_saved_tokens

    # -- from the model ------------------------------------------------------------------------------------------

    def _stepped(self, ids: Iterable[int]) -> None:
        clock, streams = self._clock, self._streams
        now_s = clock.now_s
        late_s = max(0.0, clock.elapsed_s() - now_s)
        self.late_s += late_s
        if late_s > _LATE_S and now_s > self._warned_s + _WARN_EVERY_S:
            self._warned_s = now_s
            log.warning("instance %d is %.1f s behind its profile: too much load here", self.model.instance.id, late_s)
        for id in ids:
            stream = streams[id]
            if not stream.at_end:
                stream.token(now_s)

    def first_token(self, request: Request) -> None:
        self._streams[request.id].token(self._clock.now_s)

    def finished(self, request: Request) -> None:
        stream = self._streams.pop(request.id)
        if stream.at_end:  # Its last token comes after the first ones of others, as it does in the model's own order.
            stream.token(self._clock.now_s)
        # vLLM's metrics know no other end of what was not cut short.
        self.totals.finished["length" if stream.output.finish_reason == "length" else "stop"] += 1
        self.totals.e2e.add(self._clock.now_s - stream.arrival_s)

    def evicted(self, request: Request) -> None:
        stream = self._streams.pop(request.id)
        self.totals.cancelled += 1
        if request.kv_saved_tokens:
            self._saved.save(stream.output.digest, request.tokens_done, request.kv_saved_tokens)

    def refused(self, request: Request, reason: str) -> None:
        stream = self._streams.pop(request.id)
        self.totals.finished["error"] += 1
        stream.choice.fail(RequestError(f"The request is {reason}.", code="context_length_exceeded"))


class _Stream:
    """One sequence on its way out, token by token."""

    __slots__ = ("_chars", "_last_s", "_logprobs", "_totals", "arrival_s", "choice", "generated", "output", "prompt")

    def __init__(
        self,
        choice: Choice,
        request: GenerationRequest,
        output: Output,
        prompt: int,
        arrival_s: float,
        totals: Totals,
    ) -> None:
        self.choice = choice
        self.output = output
        self.arrival_s = arrival_s
        self.generated = len(request.resume_token_ids)
        """Tokens from the very beginning."""
        self.prompt = prompt
        self._logprobs = request.logprobs
        self._totals = totals
        self._last_s = -1.0
        self._chars = 0
        """Characters of text before the next token; kept only where a stop string cuts the text."""
        if output.chars is not None and self.generated:
            self._chars = len(output.text(0, self.generated))

    @property
    def at_end(self) -> bool:
        """Its next token is the last one."""
        return self.generated == self.output.tokens - 1

    def token(self, now_s: float) -> None:
        """The step that just ended generated one token."""
        output, totals = self.output, self._totals
        start = self.generated
        self.generated = end = start + 1
        totals.generation_tokens += 1
        if self._last_s >= 0.0:
            totals.itl.add(now_s - self._last_s)
        else:
            totals.ttft.add(now_s - self.arrival_s)
        self._last_s = now_s
        ids = token_ids(output.digest, start, end)
        text = text_of(ids, first=start == 0) if output.plain else output.text(start, end)
        if output.chars is not None:
            before, self._chars = self._chars, self._chars + len(text)
            text = text[: max(0, output.chars - before)]
        calls: tuple[CallPiece, ...] = () if output.calls is None else output.calls[start:end]
        likely = () if self._logprobs is None or calls else logprobs(output, start, end, self._logprobs)
        if end < output.tokens:
            self.choice.step(text, ids, calls, likely)
        else:
            self.choice.finish(text, ids, output.finish_reason, end, calls, likely)

    def end(self) -> None:
        """There is nothing more to say."""
        self.choice.finish("", (), self.output.finish_reason, self.generated)


def _echo(choice: Choice, pieces: Sequence[str], top: int | None) -> None:
    choice.add("".join(pieces), logprobs=() if top is None else prompt_logprobs(pieces, top))


def _kind(profile: Profile) -> InstanceKind:
    return InstanceKind(
        name="emulated",
        gpu=profile.gpu,
        gpus=profile.tp,
        price_per_gpu_hour=profile.price_per_gpu_hour,
        kv_capacity_tokens=profile.kv_capacity_tokens,
        max_num_seqs=profile.max_num_seqs,
        max_num_batched_tokens=profile.max_num_batched_tokens,
    )
