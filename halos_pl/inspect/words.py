"""The report in words, the same on a terminal and on a page: sections of labelled lines."""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

Facts = dict[str, Any]
KINDS = {"labelled": "labelled completions", "pairs": "preference pairs", "demonstrations": "demonstrations"}
HEADINGS = {"min": "min", "p5": "5 %", "p50": "median", "p95": "95 %", "p99": "99 %", "max": "max"}
_PICTURES = {i: 0x2400 + i for i in range(32) if chr(i) not in "\n\t"} | {127: 0x2421}
_HIDDEN = re.compile("[\x80-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")  # acts, or makes text read otherwise


class Section(NamedTuple):
    """Lines under a title, each with its label."""

    title: str
    lines: list[tuple[str, str]]


def visible(text: str) -> str:
    """The text with control characters as pictures: nothing in it can act on a terminal. Newlines and tabs stay."""
    return _HIDDEN.sub(lambda x: f"\\u{ord(x[0]):04x}", text.translate(_PICTURES))


def number(x: int) -> str:
    return f"{x:,}"


def percent(share: float) -> str:
    """With one digit where it matters; what is not nothing, or not all, never looks so."""
    if 0 < share < 0.001:
        return "< 0.1 %"
    if 0.999 < share < 1:
        return "> 99.9 %"
    return f"{100 * share:.1f} %"


def counted(count: int, noun: str, *, plural: str | None = None) -> str:
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def span(bounds: list[float]) -> str:
    """A range in three digits, never past its ends."""
    low, high = (10.0 ** (math.floor(math.log10(x)) - 2) for x in bounds)
    return f"{math.ceil(bounds[0] / low - 1e-9) * low:.6g} to {math.floor(bounds[1] / high + 1e-9) * high:.6g}"


def title(facts: Facts) -> str:
    names = ", ".join(x["name"] for x in facts["sources"])
    return f"{names}: {number(facts['rows'])} {KINDS[facts['kind']]}"


def sections(facts: Facts) -> list[Section]:
    """Everything but warnings, lengths and examples."""
    found = [Section("rows", _rows(facts)), Section("length", _length(facts)), Section("checks", _checks(facts))]
    if listed := facts["bad_rows"]["listed"]:
        more = facts["bad_rows"]["rows"] - len(listed)
        lines = [(str(i), message) for i, message in enumerate(listed, 1)]
        found.append(Section("bad rows", lines + ([("", f"and {number(more)} more")] if more else [])))
    return found


def _rows(facts: Facts) -> list[tuple[str, str]]:
    lines = [
        ("source", f"{x['name']}: {counted(x['records'], 'record')}" + (f", {x['bad']} bad" if x["bad"] else ""))
        for x in facts["sources"]
    ]
    name = facts["objective"]["name"]
    asked = f"as {name} reads them" + (" (by the rows; another: --objective)" if facts["objective"]["inferred"] else "")
    lines.append(("read as", f"{number(facts['rows'])} {KINDS[facts['kind']]}, {asked}"))
    lines.append(("training says", facts["summary"]))
    if classes := facts["classes"]:
        up, down = (number(classes[x]) for x in ("desirable", "undesirable"))
        lines.append(("classes", f"{up} desirable ({percent(classes['share'])}), {down} undesirable"))
    if weights := facts["weights"]:
        lines += [("weights", x) for x in _weights(weights)]
    prompts = facts["prompts"]
    spread = f"{number(prompts['distinct'])} distinct"
    if prompts["max_rows"] > 1:
        largest = f"{percent(prompts['largest_share'])}, {prompts['largest_example']}"
        spread += f", {prompts['mean_rows']:,.1f} rows each, at most {number(prompts['max_rows'])} ({largest})"
    lines.append(("prompts", spread))
    tokenizer = facts["tokenizer"]
    template = "with" if tokenizer["chat_template"] else "without"
    size = f"{number(tokenizer['vocabulary'])} tokens, EOS {tokenizer['eos']}, {template} a chat template"
    return [*lines, ("tokenizer", f"{tokenizer['name']}: {size}")]


def _weights(weights: Facts) -> list[str]:
    """The advised range, and whether the weights in use and equal ones lie in it."""
    up, down = weights["desirable_weight"], weights["undesirable_weight"]
    half = "equal halves (stratified): " if weights["stratified"] else ""
    lines = [
        f"{half}λ_D n_D : λ_U n_U within 1 to 4/3 (KTO paper) takes desirable_weight {span(up)} with "
        f"undesirable_weight 1, or undesirable_weight {span(down)} with desirable_weight 1"
    ]
    used, equal = weights["in_use"], weights["equal"]
    place = {True: "inside", False: "outside"}
    if used["desirable"] != used["undesirable"] and used["ratio"] is not None:
        in_use = f"{used['desirable']:g} : {used['undesirable']:g}"
        lines.append(f"in use, {in_use}, gives {used['ratio']:.3g}: {place[used['inside']]}")
    return [*lines, f"1 : 1 gives {equal['ratio']:.3g}: {place[equal['inside']]}"]


def _length(facts: Facts) -> list[tuple[str, str]]:
    cut = facts["truncation"]
    limit = f"max_length {number(cut['max_length'])}" + (" (the model's positions)" if cut["limited_by_model"] else "")
    told = f"none of {number(facts['completions'])}"
    if cut["rows"]:
        share = f"{number(cut['rows'])} of {number(facts['completions'])} ({percent(cut['share'])})"
        told = f"{share}: {counted(cut['prompts'], 'prompt')} cut on the left, "
        told += f"{counted(cut['completions'], 'completion')} at the end"
    lines = [("truncated", f"{told}, at {limit}")]
    fits = f"max_length {number(cut['cuts_nothing'])} cuts nothing, {number(cut['cuts_one_percent'])} at most 1 %"
    lines.append(("would fit", fits))
    x = facts["padding"]
    kinds = f"{percent(x['shuffle'])} shuffled, {percent(x['group_by_length'])} with group_by_length"
    lines.append(("padding", f"{kinds} (batch_size {x['batch_size']}, rows in one group)"))
    lines.append(("an epoch", f"{number(facts['tokens'])} tokens of prompts and completions, as they are cut"))
    return lines + ([("by class", _by_class(facts))] if facts["length_by_class"] else [])


def _by_class(facts: Facts) -> str:
    x = facts["length_by_class"]
    medians = f"medians {number(x['median_desirable'])} and {number(x['median_undesirable'])} tokens"
    clear = "more than chance explains" if x["errors"] >= 3 else "no more than chance may explain"
    if facts["kind"] == "pairs":
        share = f"the chosen one is longer in {percent(x['chosen_longer'])} of pairs, shorter in "
        return f"{share}{percent(x['chosen_shorter'])}, {medians}; {clear}"
    share = f"a desirable completion is longer than an undesirable one with probability {x['longer']:.2f}"
    return f"{share}, {medians}; {clear}"


def _checks(facts: Facts) -> list[tuple[str, str]]:
    pairs = facts["kind"] == "pairs"
    lines = [
        ("duplicates", _found(facts["duplicates"])),
        ("contradictions", _found(facts["contradictions"], " and ")),
        ("one token + EOS", _found(facts["one_token_completions"])),
        ("prompt repeated", _found(facts["repeated_prompts"])),
        ("special tokens", _found(facts["special_tokens_in_plain_prompts"])),
    ]
    if pairs:
        lines.insert(2, ("chosen=rejected", _found(facts["undecided_pairs"])))
    return lines


def _found(facts: Facts, sign: str = " = ") -> str:
    if not facts["rows"]:
        return "none"
    shown = [x if isinstance(x, str) else sign.join(x) for x in facts["examples"]]
    more = ", …" if facts["rows"] > len(shown) else ""
    return f"{number(facts['rows'])}: {', '.join(shown)}{more}"
