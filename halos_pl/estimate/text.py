"""The report in words."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from halos_pl.estimate.report import GIB, Report

PARTS = {
    "gathered": "whole weights, gathered (FSDP2)",
    "activations": "activations kept for the backward",
    "working": "the layer at hand",
    "head": "the head's workspace (no logits)",
    "gradients": "gradients",
    "whole gradients": "whole gradients of earlier micro-batches",
}


def show(found: Report, console: Console) -> None:
    """Print it."""
    model, plan = found["model"], found["plan"]
    trained = "" if model["trained_parameters"] == model["parameters"] else f", {model['trained_parameters']:,} trained"
    console.print(
        f"model          {model['parameters']:,} parameters{trained}: {model['layers']} layers of up to "
        f"{model['layer_parameters']:,}, root {model['root_parameters']:,}",
        soft_wrap=True,
    )
    console.print(f"plan           {_plan(found)}", soft_wrap=True)
    console.print(_table(("memory of one GPU", "GiB"), _memory(found)))
    verdict = "fits" if found["fits"] else "does not fit"
    console.print(
        f"[bold]{verdict}[/] into {found['memory']['limit'] / GIB:.1f} GiB (what --reserve leaves of --memory); "
        f"largest --data.batch_size: {found['largest_batch_size'] or 'none'}\n",
        soft_wrap=True,
    )
    console.print(_table(("sent by one GPU in an optimizer step", "GB"), _communication(found)))
    time = found["time"]
    low, high = time["tokens_per_second"]
    per_day = f"{low:,.0f} to {high:,.0f} tokens/s of y on {plan['gpus']} GPUs (nothing overlapped, everything)"
    console.print(_table(("time of an optimizer step", "seconds"), _time(found)))
    console.print(f"bound by {time['bound']}; {per_day}", soft_wrap=True)
    machine = found["machine"]
    links = f"{machine['bandwidth']:g} GB/s in a node of {machine['gpus_per_node']}"
    told = f"assumed: {machine['flops'] / 1e12:g} TFLOP/s, of which {machine['mfu']:.0%}; {links}, "
    told += f"{machine['network']:g} GB/s a GPU between nodes, "
    told += f"{machine['latency']:g} µs a step of a ring. Formulas, and how far measurements are off: docs/scaling.md"
    console.print(told, soft_wrap=True)
    if not model["llama_like"]:
        console.print(
            "[bold]note[/]: its layers are not Llama's; activations are a guess by its widths", soft_wrap=True
        )


def _plan(found: Report) -> str:
    plan = found["plan"]
    where = {"single": "one GPU", "ddp": f"DDP on {plan['gpus']} GPUs", "fsdp": ""}[plan["strategy"]]
    if plan["strategy"] == "fsdp":
        where = f"FSDP2 on {plan['gpus']} GPUs, {plan['replicas']} × {plan['shard']} (replicas × shards)"
    batch = f"{plan['rows']} rows × {plan['length']} tokens × {plan['accumulate']} a GPU"
    lora = f", LoRA r = {plan['lora']['r']}" if plan["lora"] else ""
    checkpointing = ", checkpointing" if plan["checkpointing"] else ""
    return f"{where}; {batch}; {plan['compute']}{checkpointing}{lora}; reference {plan['reference']}"


def _memory(found: Report) -> Iterable[tuple[str, str]]:
    memory = found["memory"]
    for name in ("weights", "optimizer", "reference"):
        yield {"optimizer": "optimizer state"}.get(name, name), _gib(memory[name])
    for name, size in memory["peak"].items():
        if size:
            yield f"at its peak ({memory['peak_phase']}): {PARTS[name]}", _gib(size)
    yield "total", _gib(memory["total"])
    if memory["host"]:
        yield "in host memory, for each GPU: the reference", _gib(memory["host"])


def _communication(found: Report) -> Iterable[tuple[str, str]]:
    moved = found["communication"]
    for name, size in moved["all_gather"].items():
        yield f"all-gathers, {name}", _gb(size)
    yield "reduce-scatters of gradients", _gb(moved["reduce_scatter"])
    yield "all-reduces of gradients, over replicas", _gb(moved["all_reduce"])
    yield f"together, in {moved['collectives']:,} collectives", _gb(moved["sent"])
    if moved["from_host"]:
        yield "from host memory", _gb(moved["from_host"])


def _time(found: Report) -> Iterable[tuple[str, str]]:
    time = found["time"]
    yield f"computation, {time['flops'] / 1e12:,.3g} TFLOP", f"{time['compute']:.3g}"
    yield f"links ({time['latency']:.2g} s of it latency)", f"{time['links']:.3g}"
    if time["host"]:
        yield "host memory to GPU", f"{time['host']:.3g}"


def _table(header: tuple[str, str], rows: Iterable[tuple[str, str]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(header[0], min_width=62)
    table.add_column(header[1], justify="right", min_width=10)
    for row in rows:
        table.add_row(*row, style="bold" if row[0].startswith(("total", "together")) else None)
    return table


def _gib(size: int) -> str:
    return f"{size / GIB:,.2f}"


def _gb(size: int) -> str:
    return f"{size / 1e9:,.2f}"
