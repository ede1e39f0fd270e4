"""The head of a pipeline: requests become sequences, and what the stages answer becomes text.

It admits as many sequences as its max batch size and the KV of the stages allow, first come, first served; one that was
taken out for want of KV goes before those. Prompts are tokenised here and tokens drawn here, so a head needs neither
torch nor weights.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import deque
from collections.abc import Sequence as SequenceOf
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from typing import Any

from chiron.engines.serve.answer import TokenLogprob
from chiron.engines.serve.exposition import Histogram, Totals, exposition
from chiron.engines.serve.http import Choice, Reply, respond_error
from chiron.engines.serve.openai import FinishReason, GenerationRequest
from chiron.engines.serve.refusals import check_queue, tokens_allowed
from chiron.engines.serve.request_error import RequestError
from chiron.engines.serve.text import TextStream
from chiron.engines.staged.architecture import Architecture
from chiron.engines.staged.pipeline import Pipeline
from chiron.engines.staged.prompts import PromptReader, letters
from chiron.engines.staged.sampling import Drawn, Sampling, draw
from chiron.engines.staged.sequence import Sequence
from chiron.engines.staged.tokenizer import ModelTokenizer
from chiron.net.server import Incoming

log = logging.getLogger("chiron.staged")

_TICK_S = 0.25
_DRAIN_LOOK_S = 0.02
LETTERS_AT_ONCE = 16 << 10
"""A longer prompt takes longer to tokenise than the loop may be held up: some ten milliseconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadSettings:
    name: str
    """The model's name in metrics."""
    model_len_max: int
    """Prompt and answer together, tokens."""
    max_num_seqs: int = 64
    queue_max: int = 256
    """Requests that may wait inside for a place; beyond, the answer is 429."""


class Generation:
    """One choice of a request, inside the pipeline or in front of it. Implements ``SequenceListener``."""

    def __init__(
        self,
        engine: HeadEngine,
        request: GenerationRequest,
        choice: Choice,
        *,
        id: int,
        prompt: list[int],
        tokens_max: int,
        sampling: Sampling,
    ) -> None:
        self.id = id
        self.request = request
        self.choice = choice
        self.prompt_tokens = len(prompt)
        self.tokens_max = tokens_max
        self.sampling = sampling
        self.text = TextStream(engine.tokenizer.vocabulary, request.stop)
        self.arrival_s = time.monotonic()
        self.last_s: float | None = None
        self.began = False
        self._engine = engine
        want = sampling.candidates(engine.architecture.vocabulary)
        self.sequence = Sequence(id=id, tokens=[*prompt, *request.resume_token_ids], want=want, listener=self)

        self.siblings: SequenceOf[Generation] = ()
        """All choices of its request."""

    @property
    def generated(self) -> list[int]:
        return self.sequence.tokens[self.prompt_tokens :]

    def token(self, logits: memoryview, ids: memoryview, mass: float) -> int | None:
        drawn = draw(self.sampling, logits, ids, mass, self.generated)
        if not 0 <= drawn.token < self._engine.architecture.vocabulary:
            raise ValueError(f"token {drawn.token} is none of this model's")
        return self._engine.drew(self, drawn)

    def preempted(self) -> None:
        self._engine.preempted(self)

    def failed(self, why: str) -> None:
        self._engine.failed(self, why)


class HeadEngine:
    """Implements ``ServedEngine``. Used on the loop's thread."""

    def __init__(
        self,
        architecture: Architecture,
        tokenizer: ModelTokenizer,
        pipeline: Pipeline,
        settings: HeadSettings,
    ) -> None:
        self.architecture = architecture
        self.tokenizer = tokenizer
        self.pipeline = pipeline
        self.settings = settings
        self.limit = settings.max_num_seqs
        self.totals = Totals()
        self.queue_times = Histogram()
        self.preemptions = 0
        self.draining = False
        """It is to end: what it has is answered, and nothing new taken."""
        self._prompts = PromptReader(tokenizer, vocabulary=architecture.vocabulary, len_max=settings.model_len_max)
        self._eos = frozenset((*architecture.eos_ids, *tokenizer.eos_ids))
        self._tokeniser = ThreadPoolExecutor(1, thread_name_prefix="tokeniser")
        self._tokenising: set[asyncio.Task[None]] = set()
        self._waiting: deque[Generation] = deque()
        self._running: dict[int, Generation] = {}
        self._ids = count(1)
        self._salt = os.urandom(6).hex()
        self._rounds = 0.0
        self._busy_since_s: float | None = None
        self._ticking: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._ticking = asyncio.get_running_loop().create_task(self._tick())

    async def drain(self, grace_s: float) -> None:
        """Until nothing runs or waits, but no longer than that."""
        self.draining = True
        try:
            async with asyncio.timeout(grace_s):
                while self._running or self._waiting or self._tokenising:
                    await asyncio.sleep(_DRAIN_LOOK_S)
        except TimeoutError:
            log.warning("%d requests are cut off after %g s", len(self._running) + len(self._waiting), grace_s)

    async def close(self) -> None:
        if self._ticking is not None:
            self._ticking.cancel()
            await asyncio.gather(self._ticking, return_exceptions=True)
        for task in self._tokenising:
            task.cancel()
        await asyncio.gather(*self._tokenising, return_exceptions=True)
        self._tokeniser.shutdown(wait=False, cancel_futures=True)
        await asyncio.gather(*(r.close() for replicas in self.pipeline.replicas for r in replicas))

    # -- from the front ------------------------------------------------------------------------------------------

    def unready(self) -> str:
        """Why it should get no requests; empty: it may."""
        return self.pipeline.unready()

    def submit(self, request: GenerationRequest, incoming: Incoming) -> None:
        if self.draining:
            raise stopping()
        _refuse(request)
        if why := self.pipeline.broken():
            raise broken(why)
        self._check_queue()
        if letters(request) <= LETTERS_AT_ONCE:
            self._accept(request, incoming, *self._prompts.read(request))
            return
        task = asyncio.get_running_loop().create_task(self._accept_later(request, incoming))
        self._tokenising.add(task)
        task.add_done_callback(self._tokenising.discard)

    async def _accept_later(self, request: GenerationRequest, incoming: Incoming) -> None:
        """A long prompt is tokenised in a thread: what runs goes on meanwhile."""
        try:
            prompts, echoes = await asyncio.get_running_loop().run_in_executor(
                self._tokeniser, self._prompts.read, request
            )
            if not incoming.closed:
                self._accept(request, incoming, prompts, echoes)
        except RequestError as error:
            if not incoming.closed:
                respond_error(incoming, error)
        except Exception:
            log.exception("a request could not be tokenised or taken in")
            if not incoming.closed and not incoming.started:
                respond_error(incoming, _engine_failed())

    def _accept(
        self, request: GenerationRequest, incoming: Incoming, prompts: list[list[int]], echoes: list[str]
    ) -> None:
        allowed = [
            tokens_allowed(request, prompt_tokens=len(prompt), context_max=self.settings.model_len_max)
            for prompt in prompts
        ]
        self._prompts.check_tokens("resume_token_ids", request.resume_token_ids)
        generations = self._generations(request, incoming, prompts, allowed, echoes)
        if self._ended_before(generations[0]):
            return
        incoming.on_close = lambda: self._cancel(generations)
        self.totals.prompt_tokens += sum(map(len, prompts))
        self._waiting.extend(generations)
        self.admit()

    def _check_queue(self) -> None:
        waiting = len(self._waiting) + len(self._tokenising)
        check_queue(waiting - max(0, self.limit - len(self._running)), self.settings.queue_max)

    def set_limit(self, limit: int) -> None:
        """The max batch size from now on. Lowering it interrupts nobody."""
        self.limit = min(limit, self.settings.max_num_seqs)
        self.admit()

    def set_token_budget(self, tokens: int) -> None:
        """Of prompts' chunks, from the next step on; what it was started with bounds it."""
        self.pipeline.set_token_budget(tokens)

    def limits(self) -> dict[str, int]:
        return {
            "limit": self.limit,
            "running": len(self._running),
            "waiting": len(self._waiting),
            "max_num_seqs": self.settings.max_num_seqs,
            "max_num_batched_tokens": self.pipeline.token_budget,
            "kv_capacity_tokens": self._kv()[0],
            "kv_used_tokens": self._kv()[1],
        }

    def metrics_text(self) -> str:
        self._count_busy()
        capacity, used = self._kv()
        waiting = [len(each.sequence.tokens) for each in self._waiting]
        gauges = {
            "vllm:num_requests_running": len(self._running),
            "vllm:num_requests_waiting": len(self._waiting),
            "vllm:kv_cache_usage_perc": min(1.0, used / capacity) if capacity else 0.0,
            "chiron:engine_kv_capacity_tokens": capacity,
            "chiron:engine_kv_used_tokens": used,
            "chiron:engine_waiting_tokens": sum(waiting),
            "chiron:engine_head_tokens": waiting[0] if waiting else 0,
            "chiron:engine_max_batch_size": self.limit,
        }
        counters = {
            "vllm:num_preemptions_total": self.preemptions,
            "chiron:engine_replica_losses_total": self.pipeline.losses,
            "chiron:engine_replayed_tokens_total": self.pipeline.replayed_tokens,
            "chiron:engine_handed_over_tokens_total": self.pipeline.handed_over_tokens,
        }
        histograms = {"vllm:request_queue_time_seconds": self.queue_times}
        return exposition(self.settings.name, self.totals, gauges, {}, counters, histograms) + self._stage_metrics()

    def stages(self) -> dict[str, Any]:
        """The pipeline as it is now."""
        return {
            "running": len(self._running),
            "waiting": len(self._waiting),
            "context_tokens": sum(len(each.sequence.tokens) for each in self._running.values()),
            "losses": self.pipeline.losses,
            "replayed_tokens": self.pipeline.replayed_tokens,
            "handed_over_tokens": self.pipeline.handed_over_tokens,
            "stages": [
                {
                    "layers": str(stage),
                    "ready": sum(1 for replica in replicas if replica.up and not replica.draining),
                    "draining": sum(1 for replica in replicas if replica.draining),
                    "busy_s": sums.busy_s,
                    "passes": sums.calls,
                    "tokens": sums.tokens,
                    "waiting": sum(replica.waiting for replica in replicas),
                    "kv_used_tokens": max(
                        (r.kv_capacity_tokens - r.kv_free_tokens for r in replicas if r.up), default=0
                    ),
                    "replicas": [
                        {
                            "address": replica.address,
                            "state": "draining" if replica.draining else "ready" if replica.up else "down",
                            "trouble": replica.trouble,
                            "sequences": len(replica.sequences),
                            "waiting": replica.waiting,
                            "kv_capacity_tokens": replica.kv_capacity_tokens,
                            "kv_free_tokens": replica.kv_free_tokens,
                            "step_s": replica.figures.step_s,
                            "hop_s": replica.figures.hop_s,
                            "queue_s": replica.figures.waited_s,
                            "busy_s": replica.figures.busy_s,
                            "calls": replica.figures.calls,
                        }
                        for replica in replicas
                    ],
                }
                for stage, replicas, sums in zip(
                    self.pipeline.stages, self.pipeline.replicas, self.pipeline.sums, strict=True
                )
            ],
        }

    # -- requests ------------------------------------------------------------------------------------------------

    def _generations(
        self,
        request: GenerationRequest,
        incoming: Incoming,
        prompts: list[list[int]],
        allowed: list[int],
        echoes: list[str],
    ) -> list[Generation]:
        first = next(self._ids)
        reply = Reply(request, incoming, id=f"{self._salt}{first:x}", prompt_tokens=sum(map(len, prompts)), offset=0)
        seed = int.from_bytes(os.urandom(4)) if request.seed is None else request.seed % (1 << 63)
        found = []
        for choice in reply.choices:
            which, number = divmod(choice.index, request.n)
            if echoes:
                choice.add(echoes[which])
            sampling = Sampling(
                temperature=request.temperature,
                top_p=request.top_p,
                top_k=request.top_k,
                frequency_penalty=request.frequency_penalty,
                presence_penalty=request.presence_penalty,
                seed=seed,
                number=number,
                logprobs=request.logprobs,
            )
            found.append(
                Generation(
                    self,
                    request,
                    choice,
                    id=next(self._ids),
                    prompt=prompts[which],
                    tokens_max=allowed[which],
                    sampling=sampling,
                )
            )
        for generation in found:
            generation.siblings = found
        return found

    def _ended_before(self, generation: Generation) -> bool:
        """A request that is resumed, whose answer was complete."""
        done = generation.request.resume_token_ids
        if not done:
            return False
        generation.text.feed(done)
        stopped = generation.text.stopped or (done[-1] in self._eos and not generation.request.ignore_eos)
        if not stopped and len(done) < generation.tokens_max:
            return False
        generation.choice.finish(generation.text.flush(), (), "stop" if stopped else "length", len(done))
        return True

    def _cancel(self, generations: list[Generation]) -> None:
        """The rest of an answer is no longer needed."""
        self._drop(generations)
        self.admit()

    def _drop(self, generations: SequenceOf[Generation]) -> None:
        for generation in generations:
            if self._running.pop(generation.id, None) is not None:
                self.pipeline.remove(generation.sequence)
            elif generation in self._waiting:
                self._waiting.remove(generation)
            else:
                continue
            self.totals.cancelled += 1

    # -- the pipeline --------------------------------------------------------------------------------------------

    def admit(self) -> None:
        """As many as there is room for."""
        while self._waiting and len(self._running) < self.limit:
            generation = self._waiting[0]
            if not self.pipeline.add(generation.sequence):
                self._fail_if_too_long(generation)
                break
            self._waiting.popleft()
            self._count_busy()
            self._running[generation.id] = generation
            if not generation.began:
                generation.began = True
                self.queue_times.add(time.monotonic() - generation.arrival_s)
        self.pipeline.pump()

    def _fail_if_too_long(self, generation: Generation) -> None:
        """One that finds no room although nobody else is there never will."""
        if not self._running and self._never_fits(generation):
            self._waiting.popleft()
            self._fail(generation, _no_room())

    def _never_fits(self, generation: Generation) -> bool:
        stages = [[r for r in replicas if r.up] for replicas in self.pipeline.replicas]
        if not all(stages):
            return False
        most = min(max(r.kv_capacity_tokens for r in replicas) for replicas in stages)
        return len(generation.sequence.tokens) + 1 > most

    def drew(self, generation: Generation, drawn: Drawn) -> int | None:
        now_s = time.monotonic()
        token, request = drawn.token, generation.request
        done = len(generation.sequence.tokens) - generation.prompt_tokens + 1
        self._count(generation, now_s)
        ended: FinishReason | None = None
        if token in self._eos and not request.ignore_eos:
            ended = "stop"
        elif done >= generation.tokens_max:
            ended = "length"
        text = generation.text.feed((token,))
        if generation.text.stopped:
            ended = "stop"
        logprobs = self._logprobs(drawn) if request.logprobs is not None else ()
        if ended is None:
            generation.choice.step(text, (token,), logprobs=logprobs)
            return token
        self._running.pop(generation.id, None)
        self.totals.finished[ended] += 1
        self.totals.e2e.add(now_s - generation.arrival_s)
        generation.choice.finish(text + generation.text.flush(), (token,), ended, done, logprobs=logprobs)
        asyncio.get_running_loop().call_soon(self.admit)
        return None

    def preempted(self, generation: Generation) -> None:
        self.preemptions += 1
        self._running.pop(generation.id, None)
        if self._never_fits(generation):
            self._fail(generation, _no_room())
            return
        # Even if it is alone here, other heads may have filled the stage.
        self._waiting.appendleft(generation)

    def failed(self, generation: Generation, why: str) -> None:
        self._running.pop(generation.id, None)
        self._fail(generation, broken(why))

    def _fail(self, generation: Generation, error: RequestError) -> None:
        self.totals.finished["error"] += 1
        generation.choice.fail(error)
        # The answer is over, so nobody needs its other choices.
        self._drop(generation.siblings)
        asyncio.get_running_loop().call_soon(self.admit)

    def _logprobs(self, drawn: Drawn) -> list[TokenLogprob]:
        table = self.tokenizer.vocabulary
        top = tuple((table[id] if id < len(table) else b"", logprob) for id, logprob in drawn.top)
        return [TokenLogprob(table[drawn.token] if drawn.token < len(table) else b"", drawn.logprob, top)]

    def _count(self, generation: Generation, now_s: float) -> None:
        totals = self.totals
        totals.generation_tokens += 1
        if generation.last_s is None:
            totals.ttft.add(now_s - generation.arrival_s)
            totals.prefill_tokens += len(generation.sequence.tokens)
        else:
            totals.decode_tokens += 1
            totals.context_tokens += len(generation.sequence.tokens)
            totals.itl.add(now_s - generation.last_s)
            # A step of the whole pipeline is a round, in which each running sequence gets a token.
            self._rounds += 1 / max(1, len(self._running))
            totals.steps = int(self._rounds)
        generation.last_s = now_s

    def _count_busy(self) -> None:
        now_s = time.monotonic()
        if self._busy_since_s is not None:
            self.totals.busy_s += now_s - self._busy_since_s
        self._busy_since_s = now_s if self._running else None

    def _kv(self) -> tuple[int, int]:
        """Of the stage that has least, capacity and what is used, tokens."""
        stages = [
            (sum(r.kv_capacity_tokens for r in rs if r.up), sum(r.kv_free_tokens for r in rs if r.up))
            for rs in self.pipeline.replicas
        ]
        capacity, free = min(stages)
        return capacity, capacity - free

    def _stage_metrics(self) -> str:
        lines = []
        figures = ("sequences", "waiting", "kv_free_tokens", "step_s", "hop_s", "queue_s", "busy_s", "calls")
        said = self.stages()["stages"]
        for figure in figures:
            unit = figure.replace("_s", "_seconds") if figure.endswith("_s") else figure
            lines.append(f"# TYPE chiron_head_stage_{unit} gauge")
            for stage in said:
                for replica in stage["replicas"]:
                    labels = f'layers="{stage["layers"]}",replica="{replica["address"]}"'
                    lines.append(f"chiron_head_stage_{unit}{{{labels}}} {replica[figure]}")
        return "\n".join(lines) + "\n"

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            self._count_busy()
            await asyncio.gather(*(replica.close() for replica in self.pipeline.left()))
            self._look()

    def _look(self) -> None:
        self.pipeline.look()
        if why := self.pipeline.broken():
            while self._waiting:
                self._fail(self._waiting.popleft(), broken(why))
        self.admit()


def _refuse(request: GenerationRequest) -> None:
    """What this engine lacks."""
    for field, asked in (
        ("response_format", request.json is not None),
        ("tool_choice", request.tools.mode == "required"),
        ("logprobs", request.echo and request.logprobs is not None),
    ):
        if asked:
            raise RequestError(
                f"{field}: this engine does not implement it.", param=field, code="unsupported_parameter"
            )


def broken(why: str) -> RequestError:
    return RequestError(f"The pipeline is broken: {why}.", status=503, type="server_error", code="stages")


def stopping() -> RequestError:
    return RequestError("The head is stopping.", status=503, type="server_error", code="stopping")


def _engine_failed() -> RequestError:
    return RequestError("The engine failed.", status=500, type="server_error", code="engine_failed")


def _no_room() -> RequestError:
    return RequestError(
        "The request does not fit into the engine's KV cache.", status=503, type="server_error", code="kv_cache_full"
    )
