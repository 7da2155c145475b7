from __future__ import annotations

from bertology_serve.serving.observability.metrics import ANSWERED, REFUSED, Metrics
from tests.serving.batching.test_queue import queue
from tests.serving.batching.test_scheduler import work


def test_items_tokens_and_latency_by_delta():
    metrics = Metrics()
    works = [work(3, "a"), work(4, "a"), work(5, "b")]
    for one in works:
        one.arrived = 10.0
    metrics.finished(works, ANSWERED, now=10.5)
    metrics.finished([work(9, "a")], REFUSED, now=11.0)
    text = metrics.render().decode()
    assert 'bertology_items_total{delta="a",outcome="answered"} 2.0' in text
    assert 'bertology_items_total{delta="a",outcome="refused"} 1.0' in text
    assert 'bertology_tokens_total{delta="a"} 7.0' in text
    assert 'bertology_item_seconds_sum{delta="b"} 0.5' in text


def test_a_batch_and_the_queue():
    metrics, made = Metrics(), queue()
    metrics.watch(made)
    made.put([work(2), work(3)])
    metrics.batch([work(3, "a"), work(4, "b"), work(5, "b")], 0.02)
    text = metrics.render().decode()
    for line in (
        "bertology_batch_tokens_sum 12.0",
        "bertology_batch_items_sum 3.0",
        "bertology_batch_deltas_sum 2.0",
        "bertology_batch_seconds_sum 0.02",
        "bertology_queue_items 2.0",
        "bertology_queue_tokens 5.0",
    ):
        assert line in text


def test_two_servers_do_not_share_their_numbers():
    one, other = Metrics(), Metrics()
    one.call(200)
    assert 'bertology_calls_total{status="200"} 1.0' in one.render().decode()
    assert "bertology_calls_total{" not in other.render().decode()


def test_only_so_many_deltas_are_named():
    metrics = Metrics(most_deltas=2)
    for name in ("a", "b", "c", "d", "a"):
        metrics.finished([work(1, name)], ANSWERED, now=0.0)
    text = metrics.render().decode()
    assert 'bertology_items_total{delta="a",outcome="answered"} 2.0' in text
    assert 'bertology_items_total{delta="other",outcome="answered"} 2.0' in text
    assert 'delta="c"' not in text


def test_what_endpoint_pickers_read():
    metrics, made = Metrics(), queue()
    metrics.affinity(lambda: ["b", "a"], made.waiting, 7)
    metrics.watch(made)
    made.put([work(2, "c"), work(2, "c")])
    line = next(line for line in metrics.render().decode().splitlines() if line.startswith("vllm:lora_requests_info{"))
    assert 'max_lora="7",running_lora_adapters="a,b",waiting_lora_adapters="c"' in line
    assert float(line.split()[-1]) > 1e9
    assert "vllm:num_requests_waiting 2.0" in metrics.render().decode()
    assert f"vllm:kv_cache_usage_perc {4 / made.max_tokens}" in metrics.render().decode()
    made.take()
    assert "vllm:kv_cache_usage_perc 0.0" in metrics.render().decode()
    assert "vllm:num_requests_running 2.0" in metrics.render().decode()
    assert "vllm:num_requests_waiting 0.0" in metrics.render().decode()
    made.close()
    made.take()
    assert "vllm:num_requests_running 0.0" in metrics.render().decode()
