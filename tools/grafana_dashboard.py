"""Write the Grafana dashboard that ships: ``src/chiron/data/deploy/grafana-dashboard.json``.

Every panel is a line of ``ROWS``; the JSON is what Grafana's import wants, with the data source as a variable.

    python tools/grafana_dashboard.py
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TARGET = Path(__file__).parent.parent / "src" / "chiron" / "data" / "deploy" / "grafana-dashboard.json"
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
MODEL = 'model=~"$model"'
RATE = "[$__rate_interval]"
COLUMNS = 24
HEIGHT = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    title: str
    about: str
    queries: tuple[tuple[str, str], ...]
    """PromQL, and the legend of its series."""
    unit: str = "short"
    width: int = 8
    kind: str = "timeseries"
    stacked: bool = False


def summed(metric: str, *labels: str) -> str:
    return f"sum by ({', '.join(labels)}) ({metric}{{{MODEL}}})"


def rate(metric: str, *labels: str) -> str:
    return f"sum by ({', '.join(labels)}) (rate({metric}{{{MODEL}}}{RATE}))"


def quantile(share: float, metric: str) -> str:
    buckets = f"sum by (le, model, class) (rate({metric}_bucket{{{MODEL}}}{RATE}))"
    return f"histogram_quantile({share:g}, {buckets})"


def latency(metric: str, *shares: float) -> tuple[tuple[str, str], ...]:
    return tuple((quantile(share, metric), f"{{{{class}}}} p{100 * share:g}") for share in shares)


MET = rate("chiron_slo_attained_total", "model", "class", "slo")
MISSED = rate("chiron_slo_missed_total", "model", "class", "slo")

ROWS: tuple[tuple[str, tuple[Panel, ...]], ...] = (
    (
        "SLOs",
        (
            Panel(
                title="SLO attainment",
                about="Share of ended requests that met each SLO of their class: TTFT, mean ITL, or deadline.",
                queries=((f"{MET} / ({MET} + {MISSED})", "{{model}} {{class}} {{slo}}"),),
                unit="percentunit",
            ),
            Panel(
                title="Time to first token",
                about="From arrival at the gateway, queueing included.",
                queries=latency("chiron_time_to_first_token_seconds", 0.5, 0.99),
                unit="s",
            ),
            Panel(
                title="Inter-token latency",
                about="One observation per finished request: the mean over its tokens.",
                queries=latency("chiron_inter_token_latency_seconds", 0.5, 0.99),
                unit="s",
            ),
        ),
    ),
    (
        "Traffic",
        (
            Panel(
                title="Requests per second",
                about="Requests that ended, by outcome. shed: queue full or timed out; rejected: a client error.",
                queries=(
                    (rate("chiron_requests_total", "model", "class", "outcome"), "{{model}} {{class}} {{outcome}}"),
                ),
                unit="reqps",
                stacked=True,
            ),
            Panel(
                title="In flight and queued",
                about="Requests running on instances, and requests waiting in the gateway.",
                queries=(
                    (summed("chiron_num_requests_running", "model", "class"), "{{model}} {{class}} running"),
                    (summed("chiron_num_requests_waiting", "model", "class"), "{{model}} {{class}} queued"),
                ),
            ),
            Panel(
                title="Output tokens per second",
                about="Counted when a request ends.",
                queries=((rate("chiron_generation_tokens_total", "model", "class"), "{{model}} {{class}}"),),
                stacked=True,
            ),
        ),
    ),
    (
        "Fleet",
        (
            Panel(
                title="Instances",
                about="By role and state, and how many the plan asks for.",
                queries=(
                    (summed("chiron_instances", "model", "role", "state") + " > 0", "{{model}} {{role}} {{state}}"),
                    (summed("chiron_instances_planned", "model"), "{{model}} planned"),
                ),
            ),
            Panel(
                title="Backpressure",
                about="IBP: busy share of the interactive fleet, with its target. BBP: batch request groups that would "
                "miss their deadline.",
                queries=(
                    (summed("chiron_ibp", "model"), "{{model}} IBP"),
                    (summed("chiron_ibp_target", "model"), "{{model}} IBP target"),
                    (summed("chiron_bbp", "model"), "{{model}} BBP"),
                ),
            ),
            Panel(
                title="GPUs in use, and cost per hour",
                about="GPUs billed, from the creation of an instance until it is gone; cost by price_per_gpu_hour.",
                queries=(
                    (rate("chiron_gpu_seconds_total", "model", "gpu"), "{{model}} {{gpu}} GPUs"),
                    (f"3600 * {rate('chiron_gpu_cost_total', 'model', 'gpu')}", "{{model}} {{gpu}} cost per hour"),
                ),
            ),
            Panel(
                title="Decisions",
                about="Decisions by kind and reason, in the last minute. `chiron explain` has the numbers behind each.",
                queries=(("sum by (kind, reason) (increase(chiron_decisions_total[1m])) > 0", "{{kind}}: {{reason}}"),),
                stacked=True,
                width=12,
            ),
            Panel(
                title="Instances that fail",
                about="Failures of instances in five minutes; 1 while starts keep failing; 1 while a model has no "
                "instance and none can come.",
                queries=(
                    (f"sum by (kind) (increase(chiron_instance_failures_total{{{MODEL}}}[5m]))", "{{kind}} failures"),
                    (summed("chiron_crash_looping", "kind"), "{{kind}} crash loop"),
                    (summed("chiron_model_outage", "model"), "{{model}} outage"),
                ),
                width=12,
            ),
        ),
    ),
    (
        "Instances",
        (
            Panel(
                title="Running requests and max batch size",
                about="Requests on each instance, and the most that it may run at once now.",
                queries=(
                    (summed("chiron_instance_requests_running", "model", "instance_id"), "{{model}}#{{instance_id}}"),
                    (summed("chiron_max_batch_size", "model", "instance_id"), "{{model}}#{{instance_id}} max"),
                ),
                width=12,
            ),
            Panel(
                title="KV cache",
                about="Share in use at the last scrape.",
                queries=((summed("chiron_kv_cache_usage_perc", "model", "instance_id"), "{{model}}#{{instance_id}}"),),
                unit="percentunit",
                width=12,
            ),
        ),
    ),
    (
        "Batch",
        (
            Panel(
                title="Items of open batches",
                about="Files submitted to /v1/batches.",
                queries=((summed("chiron_batch_items", "model", "state"), "{{model}} {{state}}"),),
                stacked=True,
            ),
            Panel(
                title="Open batches",
                about="By status.",
                queries=((summed("chiron_batches", "model", "status"), "{{model}} {{status}}"),),
                stacked=True,
            ),
            Panel(
                title="Evictions and retries per second",
                about="Evictions: batch work that made room for interactive requests and resumes later. Retries: "
                "requests sent again after an engine failed.",
                queries=(
                    (rate("chiron_evictions_total", "model"), "{{model}} evictions"),
                    (rate("chiron_retries_total", "model"), "{{model}} retries"),
                ),
            ),
        ),
    ),
    (
        "Gateway",
        (
            Panel(
                title="HTTP responses per second",
                about="By status code.",
                queries=((f"sum by (code) (rate(chiron_http_responses_total{RATE}))", "{{code}}"),),
                stacked=True,
            ),
            Panel(
                title="Tokens per second by API key",
                about="Prompt and output tokens of ended requests, batch items included.",
                queries=(
                    (
                        f"sum by (key) (rate(chiron_key_prompt_tokens_total{RATE}) "
                        f"+ rate(chiron_key_generation_tokens_total{RATE}))",
                        "{{key}}",
                    ),
                ),
            ),
            Panel(
                title="The process",
                about="CPU cores in use, the event loop's worst delay in ten seconds, lines that the event log lacks.",
                queries=(
                    (f'rate(process_cpu_seconds_total{{job="$job"}}{RATE})', "CPU cores"),
                    ("chiron_event_loop_lag_seconds", "event loop lag (s)"),
                    ("chiron_event_log_dropped_lines_total", "event log lines dropped"),
                ),
            ),
        ),
    ),
)


def panel_json(panel: Panel, *, number: int, x: int, y: int) -> dict[str, Any]:
    custom = {"fillOpacity": 20 if panel.stacked else 0, "stacking": {"mode": "normal" if panel.stacked else "none"}}
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.about,
        "datasource": SOURCE,
        "gridPos": {"h": HEIGHT, "w": panel.width, "x": x, "y": y},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0, "custom": custom}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + index), "datasource": SOURCE, "expr": query, "legendFormat": legend}
            for index, (query, legend) in enumerate(panel.queries)
        ],
    }


def panels_json() -> list[dict[str, Any]]:
    """Rows from top to bottom, panels from left to right."""
    placed: list[dict[str, Any]] = []
    y = 0
    for title, panels in ROWS:
        row = {"id": len(placed) + 1, "type": "row", "title": title, "collapsed": False, "panels": []}
        placed.append({**row, "gridPos": {"h": 1, "w": COLUMNS, "x": 0, "y": y}})
        x, y = 0, y + 1
        for panel in panels:
            if x + panel.width > COLUMNS:
                x, y = 0, y + HEIGHT
            placed.append(panel_json(panel, number=len(placed) + 1, x=x, y=y))
            x += panel.width
        y += HEIGHT
    return placed


def variable(name: str, label: str, query: str, *, several: bool) -> dict[str, Any]:
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": query, "refId": name},
        "definition": query,
        "refresh": 2,
        "sort": 1,
        "multi": several,
        "includeAll": several,
        "current": {"text": "All", "value": "$__all"} if several else {},
    }


def dashboard() -> dict[str, Any]:
    return {
        "uid": "chiron",
        "title": "Chiron",
        "description": "SLO attainment, traffic, fleet, batch work and the gateway itself.",
        "tags": ["llm", "chiron"],
        "schemaVersion": 38,
        "version": 1,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"},
                variable("job", "Job", "label_values(chiron_build_info, job)", several=False),
                variable("model", "Model", "label_values(chiron_model_ready, model)", several=True),
            ]
        },
        "panels": panels_json(),
    }


def text() -> str:
    return json.dumps(dashboard(), indent=1) + "\n"


if __name__ == "__main__":
    TARGET.write_text(text(), encoding="utf-8")
    print(TARGET)
