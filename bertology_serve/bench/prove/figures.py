"""The figures that can be measured, in their order."""

from __future__ import annotations

from bertology_serve.bench.prove import (
    accounting,
    beside_alternatives,
    cancelled,
    clients,
    cold,
    contract,
    crashes,
    drain,
    exactly_one_answer,
    fairness,
    fuzzed,
    hostile,
    isolation,
    leaks,
    overhead,
    overload,
    swaps,
)
from bertology_serve.bench.prove.figure import Figure

FIGURES = (
    Figure(1, "random faults: every call gets one answer, its own, or hears of the fault", exactly_one_answer.measure),
    Figure(2, "a mixed batch equals solo runs to 1e-5, no row swapped", isolation.measure),
    Figure(3, "hot p99 while 50 cold deltas load ≤ 1.25 × quiet p99", cold.measure),
    Figure(4, "light p99 beside a flooder ≤ alone + 1.5 × the longest batch (25 ms)", fairness.measure),
    Figure(5, "load and unload leave 0 bytes on the device, RSS < 1 KB a cycle", leaks.measure),
    Figure(6, "version swaps under load: no failure, every answer its version's", swaps.measure),
    Figure(7, "SIGTERM: not ready within 100 ms, no accepted call lost", drain.measure),
    Figure(8, "5 × overload: goodput ≥ 90 % of peak, refusals < 5 ms, always Retry-After", overload.measure),
    Figure(9, "clients that hang up while queued cost no compute", cancelled.measure),
    Figure(10, "executor killed under load: ready again < 5 s, every call its own answer", crashes.measure),
    Figure(
        11, "schemathesis over the OpenAPI document: no 5xx but 503 and 504, no undocumented answer", contract.measure
    ),
    Figure(12, "≥ 200 hostile deltas and bodies: none published, no crash, no 5xx", hostile.measure),
    Figure(13, "≤ 150 µs of CPU a call besides tokenizer and model; HTTP ≥ 85 % of the engine", overhead.measure),
    Figure(14, "client libraries of others work as they are", clients.measure),
    Figure(
        15,
        "8 tasks beside the alternatives: more texts/s than peft; ≤ ⅓ of the merged models' memory at 32 tasks",
        beside_alternatives.measure,
    ),
    Figure(
        16,
        "64 hostile connections: RSS + ≤ 20 MB, liveness p99 ≤ 100 ms, every call with a key answered",
        hostile.connections,
    ),
    Figure(17, "what follows directory and state file goes on, whatever is done to them: 0 stops", fuzzed.measure),
    Figure(18, "memory: after each of 10,000 random steps what is counted is what is resident", accounting.measure),
    Figure(19, "32 deltas answer after ≤ 7 s of CPU, ≤ 3.5 s from the second start on, in ≤ 400 MB", leaks.start),
)
