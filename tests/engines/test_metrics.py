"""Prometheus text of real engines, versions old and new, and text that is broken."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiron.engines.metrics import parse_metrics, read_row
from chiron.engines.rows import ENGINES
from chiron.engines.serve.exposition import Totals, exposition

VLLM = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="a {b}, \\"c\\" d"} 7.0
vllm:num_requests_running{engine="1",model_name="m"} 5.0
vllm:num_requests_waiting{engine="0"} 2.0
vllm:num_requests_waiting_by_reason{reason="capacity"} 99.0
vllm:kv_cache_usage_perc{engine="0"} 0.25
vllm:kv_cache_usage_perc{engine="1"} 0.75
vllm:cache_config_info{block_size="16",cache_dtype="auto",enable_prefix_caching="True",num_gpu_blocks="1000"} 1.0
vllm:generation_tokens_total{engine="0"} 1.5e+06
vllm:num_preemptions_total{engine="0"} 3 1719400000000
vllm:inter_token_latency_seconds_bucket{le="0.01"} 4.0
vllm:inter_token_latency_seconds_bucket{le="+Inf"} 10.0
vllm:inter_token_latency_seconds_sum{engine="0"} 0.5
vllm:inter_token_latency_seconds_count{engine="0"} 10.0
vllm:iteration_tokens_total_sum 900
vllm:iteration_tokens_total_count 60
"""


def test_vllm_sums_load_over_cores_and_takes_the_fullest_cache() -> None:
    read = read_row(ENGINES["vllm"], VLLM)
    assert read["running"] == 12
    assert read["waiting"] == 2
    assert read["kv_usage"] == 0.75
    assert (read["kv_blocks"], read["block_size"], read["kv_capacity_tokens"]) == (1000, 16, 16_000)
    assert (read["generation_tokens"], read["preemptions"], read["steps"]) == (1_500_000, 3, 60)
    assert (read["itl_sum_s"], read["itl_count"]) == (0.5, 10)
    assert "prompt_tokens" not in read, "what is not there is missing, not 0"


def test_old_names_are_read_where_new_ones_are_missing_and_new_ones_win() -> None:
    old = "vllm:gpu_cache_usage_perc 0.4\nvllm:time_per_output_token_seconds_sum 3\n"
    assert read_row(ENGINES["vllm"], old) == {"kv_usage": 0.4, "itl_sum_s": 3}
    assert read_row(ENGINES["vllm"], old + "vllm:kv_cache_usage_perc 0.5\n")["kv_usage"] == 0.5


def test_buckets_are_left_out_and_sums_and_counts_kept() -> None:
    parsed = parse_metrics(VLLM)
    assert parsed["vllm:inter_token_latency_seconds_sum"] == 0.5
    assert parsed["vllm:inter_token_latency_seconds_count"] == 10
    assert not [name for name in parsed if name.endswith("_bucket")]


def test_sglang_priorities_are_parts_of_the_total() -> None:
    text = """\
sglang:num_running_reqs{model_name="m",priority=""} 6.0
sglang:num_running_reqs{model_name="m",priority="0"} 4.0
sglang:num_running_reqs{model_name="m",priority="10"} 2.0
sglang:num_queue_reqs{model_name="m"} 1.0
sglang:token_usage{model_name="m"} 0.28
sglang:max_total_num_tokens{model_name="m"} 471258.0
sglang:num_retracted_reqs{model_name="m"} 1.0
sglang:num_retracted_requests_total{model_name="m"} 9.0
sglang:time_per_output_token_seconds_sum{model_name="m"} 8.5
sglang:time_per_output_token_seconds_count{model_name="m"} 100.0
"""
    read = read_row(ENGINES["sglang"], text)
    assert (read["running"], read["waiting"], read["kv_usage"]) == (6, 1, 0.28)
    assert (read["kv_capacity_tokens"], read["preemptions"], read["itl_sum_s"]) == (471_258, 9, 8.5)


def test_tgi_and_llamacpp() -> None:
    tgi = """\
tgi_batch_current_size 4
tgi_queue_size 3
tgi_request_generated_tokens_sum 600
tgi_batch_inference_count{method="prefill"} 10
tgi_batch_inference_count{method="decode"} 90
tgi_request_mean_time_per_token_duration_sum 1.5
tgi_request_mean_time_per_token_duration_count 30
"""
    read = read_row(ENGINES["tgi"], tgi)
    assert (read["running"], read["waiting"], read["generation_tokens"], read["steps"]) == (4, 3, 600, 100)
    llama = "llamacpp:requests_processing 2\nllamacpp:tokens_predicted_total 50\nllamacpp:n_decode_total 20\n"
    assert read_row(ENGINES["llamacpp"], llama) == {
        "running": 2,
        "generation_tokens": 50,
        "itl_count": 50,
        "steps": 20,
    }


@pytest.mark.parametrize(
    "line",
    [
        "a NaN",
        "a +Inf",
        "a",
        "a twelve",
        'a{b="c} 1',
        "1a 2",
        "{} 3",
        "\x00\x01",
        "<html>503</html>",
    ],
)
def test_a_broken_line_costs_only_itself(line: str) -> None:
    assert parse_metrics(f"first 1\n{line}\nlast 2\n") == {"first": 1, "last": 2}


def test_windows_line_ends_spaces_and_timestamps() -> None:
    assert parse_metrics('a 1\r\nb{c="d"}  2 1700000000\r\ne\t3\r\n') == {"a": 1, "b": 2, "e": 3}


@given(st.text(max_size=300))
def test_no_text_breaks_the_parser(text: str) -> None:
    for row in ENGINES.values():
        read_row(row, text)


def test_the_name_of_a_model_reaches_dashboards_as_it_is() -> None:
    text = exposition('modèle "7b"', Totals(), {"gauge": 1}, {})
    assert 'gauge{model_name="modèle \\"7b\\""} 1' in text.splitlines()
    assert parse_metrics(text)["gauge"] == 1
