"""`python -m halos_pl doctor`: versions, devices, what is fast here and what is not, and a remedy for what is wrong."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from halos_pl.doctor.packages import Package, packages, requirements

Report = dict[str, Any]
"""What was gathered; `processor` and what follows it are absent where torch cannot be imported."""
MARKS = {"ok": "[green]✓[/]", "note": "[cyan]·[/]", "warning": "[yellow]![/]", "wrong": "[red]✗[/]"}


@dataclass(frozen=True)
class Verdict:
    """A judgement in one line. `remedy` is what to do about it, given wherever something is wrong."""

    mark: Literal["ok", "note", "warning", "wrong"]
    text: str
    remedy: str | None = None


def gather() -> Report:
    """Everything that the command tells, as values that JSON can hold."""
    found = packages(*requirements())
    report: Report = {"packages": [asdict(x) | {"ok": x.ok} for x in found]}
    try:
        from halos_pl.doctor import machine
    except (ImportError, OSError) as error:
        report["import_error"] = " ".join(str(error).split())
    else:
        report |= {
            "processor": machine.processor(),
            "memory": machine.memory(),
            "accelerators": machine.accelerators(),
            "triton": machine.triton(),
            "measured": machine.measure(),
        }
    verdicts = [*judge_packages(found), *judge_machine(report)]
    return report | {"verdicts": [asdict(x) for x in verdicts], "ok": all(x.mark != "wrong" for x in verdicts)}


def judge_packages(found: Iterable[Package]) -> Iterator[Verdict]:
    wrong = [x for x in found if not x.ok]
    for x in wrong:
        has = "is not installed" if x.version is None else f"{x.version} does not meet {x.wanted}"
        yield Verdict("wrong", f"{x.name} {has}", x.remedy)
    if not wrong:
        yield Verdict("ok", "every package meets what halos-pl asks for")


def judge_machine(report: Report) -> Iterator[Verdict]:
    if "import_error" in report:
        yield Verdict(
            "wrong", f"torch cannot be imported: {report['import_error']}", "pip install --force-reinstall torch"
        )
        return
    yield from _judge_threads(report["processor"], report["measured"]["threads"])
    yield from _judge_devices(report["accelerators"], report["memory"])
    for device, speeds in report["measured"]["products"].items():
        yield _judge_precision(device, speeds)
    yield from _judge_triton(report["triton"])


def _judge_threads(processor: Report, speeds: dict[str, dict[str, float]]) -> Iterator[Verdict]:
    threads, cores = processor["threads"], processor["usable_cores"]
    fitting = max(map(int, speeds))
    if threads > max(1, cores):
        text = f"{threads} threads on {cores:g} usable cores, which can make small models many times slower"
        yield Verdict("warning", text, f"export OMP_NUM_THREADS={fitting}")
    if fitting == 1:
        return
    one, every = speeds["1"], speeds[str(fitting)]
    small, large = (every[size] / one[size] for size in ("small", "large"))
    text = f"{fitting} threads against one: small products {_times(small)}, large ones {_times(large)}"
    if small < 0.7 and threads > 1:
        wide = f" for small models, {fitting} for large ones" if large > 1.2 else ""
        yield Verdict("warning", text, f"export OMP_NUM_THREADS=1{wide}")
    elif large > 1.3 and threads == 1:
        yield Verdict("note", f"{text}; one is in use: for large models export OMP_NUM_THREADS={fitting}")
    else:
        yield Verdict("ok", f"{text}; in use: {threads}")


def _judge_devices(accelerators: Report, memory: Report) -> Iterator[Verdict]:
    if not accelerators["cuda"] and accelerators["nvidia_driver"]:
        text, remedy = "torch sees no device", "see what `nvidia-smi` says, and CUDA_VISIBLE_DEVICES"
        if accelerators["built_for"] == "cpu":
            text, remedy = "this torch is built for the CPU", "https://pytorch.org/get-started/locally has a CUDA build"
        yield Verdict("warning", f"there is an NVIDIA driver, but {text}", remedy)
    elif not accelerators["cuda"] and not accelerators["mps"]:
        yield Verdict("note", "no GPU: everything runs on the CPU, which is enough for small models")
    for device in accelerators["cuda"]:
        if not device["bfloat16"]:
            yield Verdict("warning", f"{device['name']} has no bfloat16", "--trainer.precision 32-true")
    if memory["available_mib"] is not None and memory["available_mib"] < 1024:
        text = f"only {memory['available_mib']} MiB of memory are available"
        yield Verdict("warning", text, "end other programs, or use a smaller --data.batch_size")


def _judge_precision(device: str, speeds: dict[str, float | None]) -> Verdict:
    single, half = speeds["float32"], speeds["bfloat16"]
    if single is None or half is None:
        text = "bfloat16 products fail" if half is None else "float32 products fail"
        return Verdict("warning", f"{device}: {text}", "--model.dtype float32 --trainer.precision 32-true")
    ratio = half / single
    text = f"{device}: bfloat16 products against float32: {_times(ratio)}"
    if ratio < 0.9:
        return Verdict("warning", text, "leave --model.dtype float32 and --trainer.precision 32-true")
    if ratio > 1.5:
        return Verdict(
            "ok", f"{text}; a large model gains by --trainer.precision bf16-mixed with --model.dtype float32"
        )
    return Verdict("ok", f"{text}; leave --model.dtype float32 and --trainer.precision 32-true")


def _judge_triton(state: Report) -> Iterator[Verdict]:
    if state["interpret"]:
        text = "TRITON_INTERPRET is set: Triton kernels that are asked for run in the interpreter, far slower"
        yield Verdict("warning", text, "unset TRITON_INTERPRET")
    if state["refusal"]:
        yield Verdict("wrong", f"every run would fail: {state['refusal']}", "unset HALOS_IMPL")
    elif state["impl"]:
        yield Verdict("note", f"HALOS_IMPL={state['impl']} chooses what computes log-probabilities")
    elif state["obstacle"]:
        yield Verdict("note", f"halos_kernels runs PyTorch operators over vocabulary chunks: {state['obstacle']}")


def _times(ratio: float) -> str:
    """How a speed compares with another."""
    if ratio >= 1:
        return f"{ratio:.3g}× as fast"
    return f"{1 / ratio:,.1f}× slower" if ratio < 0.95 else "as fast"


def render(report: Report, console: Console) -> None:
    """Show a report on one screen."""
    table = Table.grid(padding=(0, 3))
    cells = [_package(x) for x in report["packages"] if x["extra"] is None]
    for i in range(0, len(cells), 2):
        table.add_row(*cells[i : i + 2])
    console.print(table)
    for x in report["packages"]:
        if x["extra"] is not None:
            console.print(_package(x))
    if "processor" in report:
        console.print()
        console.print(_facts(report))
    console.print()
    for x in report["verdicts"]:
        remedy = f" → [bold]{escape(x['remedy'])}[/]" if x["remedy"] else ""
        console.print(f"{MARKS[x['mark']]} {escape(x['text'])}{remedy}")


def _package(x: Report) -> str:
    if x["version"] is None and x["extra"] is not None:
        remedy = escape(f"(pip install 'halos-pl[{x['extra']}]')")
        return f"{MARKS['note']} {x['name']} [dim]not installed {remedy}[/]"
    wanted = f" [dim]({escape(x['wanted'])})[/]" if x["wanted"] else ""
    return f"{MARKS['ok' if x['ok'] else 'wrong']} {x['name']} {x['version'] or 'not installed'}{wanted}"


def _facts(report: Report) -> Table:
    table = Table.grid(padding=(0, 2))
    cpu, memory, measured = report["processor"], report["memory"], report["measured"]
    total, free = (_gib(memory[key]) for key in ("total_mib", "available_mib"))
    cores = f"{cpu['usable_cores']:g} of {cpu['cores']} cores usable, torch uses {cpu['threads']} threads"
    table.add_row("CPU", escape(f"{cpu['model']}, {cores}"))
    table.add_row("memory", f"{total}, {free} available")
    for i, x in enumerate(report["accelerators"]["cuda"]):
        half = "bfloat16" if x["bfloat16"] else "no bfloat16"
        table.add_row(
            f"cuda:{i}", f"{x['name']}, {_gib(x['memory_mib'])}, compute capability {x['capability']}, {half}"
        )
    if report["accelerators"]["mps"]:
        table.add_row("mps", "there")
    state = report["triton"]
    where = f"compiles for {state['target']}" if state["target"] else f"no GPU driver ({state['problem']})"
    table.add_row("Triton", escape(f"{state['version'] or 'cannot be imported'}, {where}"))
    for device, speeds in measured["products"].items():
        each = ", ".join(f"{kind} {_number(speed)}" for kind, speed in speeds.items())
        table.add_row("products", f"{device}: {each} GFLOP/s")
    by_count = [
        f"{n}: small {_number(x['small'])}, large {_number(x['large'])}" for n, x in measured["threads"].items()
    ]
    table.add_row("threads", "; ".join(by_count) + " GFLOP/s")
    for device, x in measured["linear_logp"].items():
        if x is None:
            table.add_row("linear_logp", f"{device}: fails")
            continue
        table.add_row("linear_logp", f"{device}: {x['tokens_per_second']:,.0f} tokens/s, forward and backward")
        shape = f"{x['tokens']:,} tokens × vocabulary of {x['vocabulary']:,}"
        table.add_row(
            "", f"never held: {shape} = {x['logits_not_held_mib']} MiB of logits; {x['chunk_mib']} MiB at a time"
        )
    return table


def _gib(mib: int | None) -> str:
    return "unknown" if mib is None else f"{mib / 1024:.1f} GiB"


def _number(speed: float | None) -> str:
    return "fails" if speed is None else f"{speed:,.3g}"


def main(argv: list[str], console: Console | None = None) -> int:
    """Run the command.

    Returns:
        0; 1 where a package is too old or missing, or torch cannot be imported; 2 for an option that is not there.
    """
    parser = argparse.ArgumentParser(
        prog="python -m halos_pl doctor",
        description="Versions, devices, and what is fast here, with a remedy for what is wrong. Takes some seconds.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    options, unknown = parser.parse_known_args(argv)
    if unknown:
        print(f"halos_pl: error: unrecognized arguments: {' '.join(unknown)}", file=sys.stderr)
        return 2
    report = gather()
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        render(report, console or Console(highlight=False))
    return 0 if report["ok"] else 1
