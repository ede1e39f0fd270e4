"""A gateway on one screen, from the object that ``GET /chiron/status`` answers.

Lines of text, cut to the terminal's width and height: what matters most is kept longest. Interactive work, batch work
and free room differ by character too, so that nothing is lost without colours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import ceil
from typing import Any

from rich.console import Group
from rich.text import Text

from chiron.telemetry.decision_text import show_moment
from chiron.telemetry.decision_text import tell as in_words
from chiron.telemetry.format import counted, percent

Status = Mapping[str, Any]

DECISIONS_SHOWN = 8
WIDE = 96
"""Columns from which on CPU and memory are shown too."""
DECISION = ("kind", "subject", "before", "after", "reason", "numbers")
RATE_SLOTS = 5
"""Slots of history that the rate shown is the mean of."""

_INTERACTIVE, _BATCH, _FREE = ("█", "cyan"), ("▒", "magenta"), ("·", "bright_black")
_LEVELS = "▁▂▃▄▅▆▇█"
_STATES = {"ready": "green", "starting": "yellow", "draining": "bright_black"}


def render(status: Status, width: int, height: int, note: str = "") -> Group:
    """The screen; ``note`` is shown below the header, such as why the figures are old."""
    return Group(*screen(status, width, height, note))


def screen(status: Status, width: int, height: int, note: str = "") -> list[Text]:
    """At most ``height`` lines of at most ``width`` columns."""
    head = [_header(status), *([Text(note, style="bold red")] if note else []), Text("")]
    batches, decisions = _batches(status, width), _decisions(status)
    models = status["models"]
    fixed = sum(len(_model_foot(model, width)) + 2 for model in models) + max(0, len(models) - 1)
    room = height - len(head) - fixed
    shown_batches = batches[: max(2, room // 4)] if batches else []
    room -= len(shown_batches)
    told = min(len(decisions), DECISIONS_SHOWN + 2, max(4, room - sum(len(m["instances"]) for m in models)))
    room -= told
    lines = list(head)
    for number, model in enumerate(models):
        share = max(1, room // (len(models) - number))
        block = _model(model, width, share)
        room -= min(share, len(model["instances"]))
        lines += [*([Text("")] if number else []), *block]
    lines += [*shown_batches, *decisions[:2], *decisions[2:][max(0, len(decisions) - told) :]]
    for line in lines:
        line.no_wrap, line.overflow = True, "ellipsis"
        line.truncate(width, overflow="ellipsis")
    return lines[:height]


def one_line(status: Status) -> str:
    """The same in a line, for where there is no screen."""
    parts = []
    for model in status["models"]:
        instances, queue = model["instances"], model["queue"]
        ready = sum(i["state"] == "ready" for i in instances)
        interactive, batch = (sum(i[f"running_{kind}"] for i in instances) for kind in ("interactive", "batch"))
        parts.append(
            f"{model['name']}: {ready} ready of {sum(model['planned'].values())} planned, "
            f"running {interactive} interactive + {batch} batch, "
            f"waiting {queue['interactive']} + {queue['batch'] + queue['batch_held']:,}"
        )
        for cls in model["classes"]:
            if cls["kind"] == "interactive":
                p99 = _seconds(cls["last_minute"]["ttft_p99_s"])
                parts.append(f"{cls['name']} p99 TTFT {p99}, {_in_slo(cls)} in SLO")
    parts += [_cascade(cascade) for cascade in status.get("cascades", ())]
    running = (batch for batch in status["batches"] if batch["status"] == "in_progress")
    parts += [f"{batch['id']} {batch['completed'] + batch['failed']:,} of {batch['total']:,}" for batch in running]
    return f"{show_moment(status['now_s'])} " + "; ".join(parts)


def tell(decision: Mapping[str, Any]) -> str:
    """A decision in words that fit a line."""
    return in_words(*(decision[key] for key in DECISION), brief=True)


def bar(interactive: int, batch: int, cap: int, scale: int, width: int) -> Text:
    """Running work and free room up to the cap, ``scale`` requests being ``width`` columns. Any work is visible."""
    first = _columns(interactive, scale, width)
    second = max(_columns(interactive + batch, scale, width), first + (1 if batch else 0))
    end = max(_columns(cap, scale, width), second)
    text = Text()
    for (mark, style), count in ((_INTERACTIVE, first), (_BATCH, second - first), (_FREE, end - second)):
        text.append(mark * count, style=style)
    text.truncate(width)
    text.append("│" if end < width else "", style="bright_black")
    text.append(" " * (width + 1 - text.cell_len))
    return text


def sparkline(values: Sequence[float], width: int, top: float, limit: float | None = None) -> Text:
    """The newest at the right, ``top`` a full column; above ``limit`` in red. Stretches are shown by their largest."""
    text = Text()
    if width < 1 or not values:
        return text
    per = ceil(len(values) / width)
    kept = values[len(values) % per :]
    for at in range(0, len(kept), per):
        value = max(kept[at : at + per])
        level = min(len(_LEVELS) - 1, int(value / top * len(_LEVELS))) if top > 0 else 0
        over = limit is not None and value > limit
        text.append(_LEVELS[level] if value > 0 else " ", style="red" if over else "cyan")
    return text


def _cascade(cascade: Mapping[str, Any]) -> str:
    """Of its requests, those for which the second model was asked."""
    return f"cascade {cascade['name']}: {cascade['escalated_share']:.0%} of {cascade['requests']:,} escalated"


def _columns(count: int, scale: int, width: int) -> int:
    return max(1, round(count / scale * width)) if count > 0 and scale > 0 else 0


def _header(status: Status) -> Text:
    text = Text()
    text.append("Chiron", style="bold cyan")
    text.append(" · policy ")
    text.append(status["policy"], style="bold")
    if status["advise"]:
        text.append(" (advises only)", style="bold yellow")
    text.append(f" · up {show_moment(status['now_s'])} · {status['url']}")
    text.append(f" · {status['open_requests']:,} open · {counted(status['evictions'], 'eviction')}")
    if (leader := status.get("leader")) is not None:
        _tell_leader(text, leader, len(status["relays"]))
    for cascade in status.get("cascades", ()):
        text.append(f" · {_cascade(cascade)}")
    if status.get("client_errors"):
        text.append(f" · {status['client_errors']:,} client errors")
    if (status["loop_lag_s"] or 0) >= 0.05:
        text.append(f" · loop {_ms(status['loop_lag_s'])} ms late", style="red")
    if status["event_log_dropped"]:
        text.append(f" · log lacks {status['event_log_dropped']:,} lines", style="red")
    return text


def _tell_leader(text: Text, leader: Mapping[str, Any], relays: int) -> None:
    """Who decides, and for how many."""
    name = f"{leader['gateway']} leads" if leader["gateway"] else "brain"
    text.append(f" · {name}, term {leader['term']}, {relays} relays")
    if leader["settling"]:
        text.append(" · takes over, places nothing yet", style="yellow")
    if leader["relays_missing"]:
        text.append(f" · {leader['relays_missing']} relays missing", style="yellow")
    if leader["fallback_placements"] or leader["expired_requests"]:
        gave_up = f", gave up {leader['expired_requests']:,}" if leader["expired_requests"] else ""
        text.append(f" · relays alone placed {leader['fallback_placements']:,}{gave_up}")


def _model(model: Mapping[str, Any], width: int, rows: int) -> list[Text]:
    """Head, column names, at most ``rows`` lines of instances, and what belongs below them."""
    instances = sorted(model["instances"], key=lambda i: (i["state"] == "draining", i["id"]))
    shown = instances if len(instances) <= rows else instances[: max(0, rows - 1)]
    scale = max([max(i["max_batch_size"], i["running_interactive"] + i["running_batch"]) for i in instances] or [1])
    wide = width >= WIDE and any(i["cpu_share"] is not None for i in instances)
    columns = max(8, width - (66 if wide else 52))
    lines = [_model_head(model), _names(columns, wide)]
    lines += [
        _starting(i, model["cold_start_s"]) if i["state"] == "starting" else _instance(i, scale, columns, wide)
        for i in shown
    ]
    hidden = instances[len(shown) :]
    if hidden:
        running = sum(i["running_interactive"] + i["running_batch"] for i in hidden)
        lines.append(Text(f"  … and {len(hidden)} more, running {running:,} requests", style="bright_black"))
    return [*lines, *_model_foot(model, width)]


def _model_head(model: Mapping[str, Any]) -> Text:
    ready = sum(i["state"] == "ready" for i in model["instances"])
    planned = sum(model["planned"].values())
    text = Text()
    text.append(model["name"], style="bold")
    least, most = model["min_instances"], model["max_instances"]
    text.append(f"  {ready} ready, {planned} planned, {f'{least} to {most}' if least != most else most} allowed")
    advised = model["advised"]
    if advised and sum(advised.values()) != planned:
        text.append(f", {sum(advised.values())} advised", style="yellow")
    if model["ibp"] is not None:
        target = "" if model["ibp_target"] is None else f" of {model['ibp_target']:.2f}"
        text.append(f" · IBP {model['ibp']:.2f}{target}")
    if model["bbp"] is not None:
        text.append(f" · BBP {model['bbp']:g}")
    return text


def _names(columns: int, wide: bool) -> Text:
    text = Text(f"{'#':>4} {'role':<11} {'state':<8} ", style="bright_black")
    legend = Text()
    for (mark, style), name in ((_INTERACTIVE, "interactive"), (_BATCH, "batch"), (_FREE, "free")):
        legend.append(mark, style=style)
        legend.append(f" {name} ", style="bright_black")
    legend.truncate(columns + 1, pad=True)
    text.append(legend)
    text.append(f" {'run/cap':>8} {'ITL of SLO':>10} {'KV':>4}" + (f" {'CPU':>5} {'memory':>7}" if wide else ""))
    return text


def _instance(instance: Mapping[str, Any], scale: int, columns: int, wide: bool) -> Text:
    state, running = instance["state"], instance["running_interactive"] + instance["running_batch"]
    text = Text(f"{instance['id']:>4} {instance['role']:<11} ")
    text.append(f"{state:<8} ", style=_STATES.get(state, ""))
    cap = instance["max_batch_size"]
    text.append(bar(instance["running_interactive"], instance["running_batch"], cap, scale, columns))
    text.append(f" {f'{running}/{cap}':>8} ")
    itl_s, slo_s = instance["itl_s"], instance["itl_slo_s"]
    late = itl_s is not None and slo_s is not None and itl_s > slo_s
    text.append(f"{f'{_ms(itl_s)}/{_ms(slo_s)}':>10}", style="red" if late else "")
    text.append(f" {instance['kv_usage']:>4.0%}")
    if wide and instance["cpu_share"] is not None:
        text.append(f" {instance['cpu_share']:>5.2f} {_bytes(instance['rss_bytes']):>7}")
    return text


def _starting(instance: Mapping[str, Any], cold_start_s: float | None) -> Text:
    text = Text(f"{instance['id']:>4} {instance['role']:<11} ")
    text.append(f"starting for {instance['age_s']:.0f} s", style="yellow")
    if cold_start_s is not None:
        text.append(f", others took {cold_start_s:.0f} s", style="yellow")
    return text


def _model_foot(model: Mapping[str, Any], width: int) -> list[Text]:
    queue = model["queue"]
    troubles = [*_outage(model["outage"]), *_starts(model["starts"]), *_endpoints(model["endpoints"])]
    troubles += [Text(f"  {' '.join(note.split())}", style="red") for note in model.get("fleet_notes", ())]
    text = Text("  waiting ")
    text.append(f"{queue['interactive']:,} interactive", style="bold red" if queue["interactive"] else "")
    if queue["interactive"] and queue["oldest_wait_s"] is not None:
        text.append(f" (up to {queue['oldest_wait_s']:.1f} s)")
    text.append(f" · {queue['batch'] + queue['batch_held']:,} batch")
    groups = queue["groups"]
    if groups:
        due = "no deadline" if groups[0]["deadline_in_s"] is None else f"due in {_span(groups[0]['deadline_in_s'])}"
        text.append(f" in {len(groups)} group{'s' * (len(groups) > 1)}, first {due}")
    classes = sorted(model["classes"], key=lambda cls: cls["kind"] != "interactive")
    return [*troubles, text, *(line for cls in classes for line in _class(cls, width))]


def _outage(reason: str | None) -> list[Text]:
    """What clients of a model are told that nothing can serve."""
    return [Text(f"  requests are refused (503): {reason}", style="bold red")] if reason else []


def _starts(kinds: Sequence[Mapping[str, Any]]) -> list[Text]:
    """A line for each kind whose starts fail: how often, when the next try is, and what the engine said last."""
    lines = []
    for kind in kinds:
        if kind["state"] != "ok":
            what, *said = kind["reason"].splitlines() or [""]
            why = f"{what.partition('; last lines of ')[0]}: {said[-1]}" if said else what
            name = kind["kind"].rpartition("/")[2]
            tries = f"{kind['failures']} failures in a row, next start in {kind['next_start_in_s']:.0f} s"
            lines.append(Text(f"  {name} is {kind['state']}, {tries}: {why}", style="bold red"))
    return lines


def _endpoints(endpoints: Sequence[Mapping[str, Any]]) -> list[Text]:
    failed = [each for each in endpoints if each["state"] == "failed"]
    return [
        Text(f"  endpoint {each['url']} failed: {' '.join(each['reason'].split())}", style="red") for each in failed
    ]


def _class(cls: Mapping[str, Any], width: int) -> list[Text]:
    """Interactive: rate, TTFT and ITL against their SLOs. Batch: how far it is."""
    name, recent, history = f"  {cls['name'][:14]:<9}", cls["last_minute"], cls["history"]
    if cls["kind"] != "interactive":
        figures = (cls["running"], cls["waiting"], cls["finished"])
        tail = " · ".join(f"{word} {n:,}" for word, n in zip(("running", "waiting", "finished"), figures, strict=True))
        return [Text(f"{name} {tail} · {_in_slo(cls)} in SLO")]
    arrivals, ttft_s, slo_s = history["arrivals"], history["ttft_max_s"], cls["ttft_slo_s"]
    rate = sum(arrivals[-RATE_SLOTS:]) / (RATE_SLOTS * history["period_s"])
    top_s = slo_s or max(ttft_s, default=0.0)
    columns = max(0, (width - len(name) - 28) // 2)
    charts = Text(f"{name}{rate:>6.1f}/s ")
    charts.append(sparkline(arrivals, columns, max(arrivals, default=0)))
    charts.append("   TTFT of SLO " if slo_s else "   TTFT ")
    charts.append(sparkline(ttft_s, columns, top_s, slo_s))
    figures_of = Text(" " * (len(name) + 1))
    late = slo_s is not None and (recent["ttft_p99_s"] or 0) > slo_s
    figures_of.append(
        f"TTFT p99 {_seconds(recent['ttft_p99_s'])}" + (f" of {_seconds(slo_s)}" if slo_s else ""),
        style="red" if late else "",
    )
    itl_slo = f" of {_ms(cls['itl_slo_s'])}" if cls["itl_slo_s"] else ""
    figures_of.append(f" · ITL p99 {_ms(recent['itl_p99_s'])}{itl_slo} ms · {_in_slo(cls)} in SLO")
    return [charts, figures_of]


def _batches(status: Status, width: int) -> list[Text]:
    """A blank line, then a batch a line; none without batches."""
    troubles = [*_store_troubles(status.get("store", {})), *_batch_troubles(status.get("batch_runner", {}))]
    lines = [*troubles, *(_batch(batch, width) for batch in status["batches"])]
    return [Text(""), *lines] if lines else []


def _store_troubles(store: Mapping[str, Any]) -> list[Text]:
    troubles = [f"batches and files are not served: {store['unavailable']}"] if store.get("unavailable") else []
    damage = store.get("damage", ())
    if damage:
        more = f" (and {len(damage) - 1} more: damage.jsonl in the data directory)" if len(damage) > 1 else ""
        troubles.append(f"damage on the disk: {damage[0]}{more}")
    return [Text(trouble, style="red") for trouble in troubles]


def _batch_troubles(runner: Mapping[str, Any]) -> list[Text]:
    troubles = [f"batches are paused: {runner['paused']}"] if runner.get("paused") else []
    if runner.get("clock"):
        troubles.append(str(runner["clock"]))
    troubles += [f"all attempts at batch work fail for {name}" for name in runner.get("failing_models", ())]
    unserved = runner.get("unserved", {})
    troubles += [f"{count:,} batch items wait for {name}, not in the config" for name, count in unserved.items()]
    return [Text(trouble, style="red") for trouble in troubles]


def _batch(batch: Mapping[str, Any], width: int) -> Text:
    ended, total, name = batch["completed"] + batch["failed"], batch["total"], f"{batch['id'][:14]:<14} "
    tail = Text(f" {ended:,}/{total:,}")
    if batch["failed"]:
        tail.append(f" ({batch['failed']:,} failed)", style="red")
    if batch["status"] == "in_progress":
        eta_s, due_s = batch["eta_s"], batch["deadline_in_s"]
        late = eta_s is not None and eta_s > due_s
        tail.append(f" · {batch['items_per_s']:.1f}/s · ")
        tail.append(f"left {'?' if eta_s is None else _span(eta_s)} of {_span(due_s)}", style="red" if late else "")
    else:
        tail.append(f" · {batch['status']}", style="bright_black")
    columns = max(6, min(40, width - len(name) - tail.cell_len))
    full = columns * ended // total if total else 0
    text = Text(name)
    text.append("━" * full, style="magenta")
    text.append("─" * (columns - full), style="bright_black")
    return text.append(tail)


def _decisions(status: Status) -> list[Text]:
    """A blank line, a title, then the newest decisions; of batch sizes only each instance's last one."""
    last = {d["subject"]: d for d in status["decisions"] if d["kind"] == "batch_size"}
    kept = [d for d in status["decisions"] if d["kind"] != "batch_size" or last[d["subject"]] is d]
    lines = []
    for decision in kept[-DECISIONS_SHOWN:]:
        text = Text(f"{show_moment(decision['t_s']):>7}  ", style="bright_black")
        text.append(tell(decision), style="default" if decision["kind"] == "batch_size" else "bold default")
        lines.append(text)
    title = Text("decisions", style="bright_black")
    return [Text(""), title, *(lines or [Text("         none yet", style="bright_black")])]


def _in_slo(cls: Mapping[str, Any]) -> str:
    judged = cls["attained"] + cls["missed"]
    return percent(cls["attained"] / judged) if judged else "-"


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.0f}"


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"


def _span(seconds: float) -> str:
    """A time to wait for: ``m:ss``; past ones with a minus."""
    return f"-{show_moment(-seconds)}" if seconds < 0 else show_moment(seconds)


def _bytes(size: int) -> str:
    return f"{size / 2**30:.1f} GB" if size >= 2**30 else f"{size / 2**20:.0f} MB"


def plain_lines(texts: Iterable[Text]) -> str:
    """Without colours."""
    return "\n".join(text.plain.rstrip() for text in texts)
