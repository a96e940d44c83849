"""The tables of docs/scaling.md: formulas at the shapes of Llama 3, and what `benchmarks.scaling` measured."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

from benchmarks.peers import ROOT
from halos_pl.estimate import (
    Lora,
    Machine,
    Memory,
    Plan,
    Shapes,
    communication,
    largest_rows,
    memory,
    read_shapes,
    speed,
)
from halos_pl.models import ModelSource

DOCUMENT = ROOT / "docs" / "scaling.md"
RESULTS = ROOT / "benchmarks" / "results" / "scaling-cpu.json"
GIB = 2**30
LIMIT = 0.9 * 80 * GIB  # of an 80 GiB card, as `estimate` takes it
LENGTH = 2048
GPUS = (8, 64, 256, 1024)
_LLAMA = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 8192}
MODELS: dict[str, dict[str, Any]] = {
    "1B": {
        **_LLAMA,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "8B": {
        **_LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "70B": {
        **_LLAMA,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
}
"""Llama 3.2 1B, Llama 3 8B and 70B (Dubey et al. 2024, table 3)."""
LEAST_SHARD = {"1B": 8, "8B": 8, "70B": 64}
"""The smallest group that the weights are split over in the tables: one node, or what 70B needs."""


@cache
def shapes(name: str) -> Shapes:
    return read_shapes(ModelSource(config=dict(MODELS[name])))


def plan(gpus: int, shard: int, **changes: Any) -> Plan:
    """One row of 2048 tokens, half of them scored, KTO with z0, checkpointing, bf16 in FSDP2."""
    base = Plan(rows=1, length=LENGTH, gpus=gpus, shard=shard, strategy="fsdp", checkpointing=True)
    return replace(base, **changes)


def lines(header: str, rows: Iterator[tuple[str, ...]]) -> str:
    names = header.split(" | ")
    rule = "|".join(["---", *["---:"] * (len(names) - 1)])
    return "\n".join([f"| {header} |", f"|{rule}|", *(f"| {' | '.join(row)} |" for row in rows)])


def gib(size: float) -> str:
    return f"{size / GIB:.1f}" if size < 10 * GIB else f"{size / GIB:,.0f}"


def gb(size: float) -> str:
    return f"{size / 1e9:.1f}" if size < 1e10 else f"{size / 1e9:,.0f}"


def _parts(held: Memory) -> tuple[str, ...]:
    sizes = (held.weights, held.optimizer, held.reference, held.gradients, held.peak, held.total)
    return (*map(gib, sizes), held.peak_phase)


def models() -> str:
    def rows() -> Iterator[tuple[str, ...]]:
        for name in MODELS:
            x = shapes(name)
            layer, root = x.largest_layer.numel, x.root.numel
            yield (
                name,
                f"{x.numel:,}",
                str(len(x.layers)),
                f"{layer:,}",
                f"{root:,}",
                f"{root / layer:.1f}",
                gib(2 * root),
            )

    return lines("model | parameters | layers | of a layer | root | root / layer | root gathered, GiB", rows())


def full() -> str:
    def rows() -> Iterator[tuple[str, ...]]:
        for name in MODELS:
            for gpus in GPUS:
                for shard in sorted({min(gpus, LEAST_SHARD[name]), gpus}):
                    own = plan(gpus, shard)
                    held = memory(shapes(name), own)
                    most = largest_rows(shapes(name), own, LIMIT)
                    yield name, str(gpus), f"{gpus // shard} × {shard}", *_parts(held), str(most or "none")

    header = "model | GPUs | replicas × shards | weights | optimizer | reference | gradients | peak, gradients among it"
    header += " | total | peak at"
    return lines(f"{header} | largest micro-batch", rows())


WAYS: dict[str, dict[str, Any]] = {
    "full, reference resident": {},
    "full, reference resident in bf16": {"reference_bytes": 2},
    "full, reference offloaded": {"reference": "offloaded"},
    "full, reference cached": {"reference": "cached"},
    "LoRA, reference resident": {"lora": Lora(16)},
    "LoRA, adapters off for the reference": {"lora": Lora(16), "reference": "adapter"},
}


def ways() -> str:
    def rows() -> Iterator[tuple[str, ...]]:
        for name, gpus, shard in (("8B", 8, 8), ("70B", 64, 64)):
            for way, changes in WAYS.items():
                own = plan(gpus, shard, **changes)
                held, moved = memory(shapes(name), own), communication(shapes(name), own)
                times = speed(shapes(name), own, Machine())
                most = largest_rows(shapes(name), own, LIMIT)
                cells = (gib(held.total), str(most), gb(moved.sent), gb(moved.from_host), f"{times.flops / 1e12:,.0f}")
                yield name, str(gpus), way, *cells

    return lines("model | GPUs | way | total, GiB | largest micro-batch | sent, GB | from host, GB | TFLOP", rows())


def traffic() -> str:
    def rows() -> Iterator[tuple[str, ...]]:
        for name in MODELS:
            for gpus in GPUS:
                for shard in sorted({min(gpus, LEAST_SHARD[name]), gpus}):
                    own = plan(gpus, shard)
                    moved, times = communication(shapes(name), own), speed(shapes(name), own, Machine())
                    sent = (moved.all_gather.sent, moved.reduce_scatter.sent, moved.all_reduce.sent)
                    seconds = (times.communication, times.latency, times.compute)
                    even = LENGTH * times.communication / times.compute
                    cells = (*map(gb, sent), *(f"{x:.2f}" for x in seconds), f"{even:,.0f}")
                    yield name, str(gpus), f"{gpus // shard} × {shard}", *cells

    header = "model | GPUs | replicas × shards | all-gather, GB | reduce-scatter, GB | all-reduce, GB | links, s"
    return lines(f"{header} | of it latency, s | computation, s | tokens a GPU at which both are equal", rows())


def vocabulary() -> str:
    """Per micro-batch of 4096 scored tokens on a group of 8: what a vocabulary-parallel head would hold and send."""

    def rows() -> Iterator[tuple[str, ...]]:
        group, tokens = 8, 4096
        for name in MODELS:
            x = shapes(name)
            head = x.vocabulary * x.hidden
            now = (
                2 * head,
                2 * head,
                2 * head + 4 * head,
            )  # gathered, gradient, gradient in both forms at its reduction
            then = [size // group for size in now]
            gather = 2 * tokens * x.hidden * (group - 1)  # hidden states of the others
            sums = 3 * 2 * 4 * tokens * group * (group - 1) // group
            back = 4 * tokens * x.hidden * (group - 1)
            today = (5 * 2 + 4) * head * (group - 1) // group  # gathered in five passes, reduced once
            yield name, *map(gib, (now[0], now[2], then[0], then[2])), gb(today), gb(4 * (gather + sums) + back)

    header = "model | head gathered, GiB | its gradient at its reduction, GiB | of 8, gathered | of 8, gradient"
    return lines(f"{header} | sent today, GB | sent then, GB", rows())


def measured() -> str:
    """How far the formulas are from what was measured on the CPU."""
    found = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]

    def rows() -> Iterator[tuple[str, ...]]:
        exact = [x for x in found if x["part"] == "ranks" and x["quantity"] != "peak"]
        equal = sum(x["measured"] == x["predicted"] for x in exact)
        yield "held and sent by a rank, collectives", f"{equal} of {len(exact)} equal", "", "", ""
        for x in found:
            if x["quantity"] in ("peak", "kept"):
                name = {"autograd": "kept by autograd", "head": "the head's peak", "ranks": "a step's peak"}
                what = f"{name.get(x['part'], 'a step’s peak, no FSDP')}: {x['case']}"
                most = f"{max(x['peaks']) / x['predicted']:.3f}" if "peaks" in x else ""
                yield what, f"{x['measured']:,}", f"{x['predicted']:,}", f"{x['ratio']:.3f}", most

    return lines("what | measured, bytes | formula, bytes | measured / formula | most of three steps / formula", rows())


TABLES: dict[str, Callable[[], str]] = {
    "models": models,
    "full": full,
    "ways": ways,
    "traffic": traffic,
    "vocabulary": vocabulary,
    "measured": measured,
}


def rewritten(text: str) -> str:
    """The document with its tables made anew, each between its two markers."""
    for name, table in TABLES.items():
        pattern = rf"(<!-- table {name} -->\n).*?(<!-- end -->)"
        text, count = re.subn(pattern, lambda x, t=table: f"{x[1]}\n{t()}\n\n{x[2]}", text, flags=re.S)  # type: ignore[misc]
        if count != 1:
            raise ValueError(f"docs/scaling.md has {count} places for the table {name!r}, expected one")
    return text


def write_tables() -> None:
    DOCUMENT.write_text(rewritten(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
