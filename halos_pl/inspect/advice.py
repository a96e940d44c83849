"""What of the facts deserves a warning, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from halos_pl.inspect.facts import BAD_SHOWN, Facts
from halos_pl.inspect.words import counted, number, percent, span

SHORTER, LONGER = 0.35, 0.75  # probability that a desirable completion is longer
SURE = 3.0  # standard errors


@dataclass(frozen=True)
class Advice:
    """A judgement of one sentence, and what to do; a `note` may well be as it should be."""

    level: Literal["warning", "note"]
    kind: str
    text: str
    remedy: str


def advise(facts: Facts) -> list[dict[str, Any]]:
    """Warnings first, then notes."""
    found = [x for judge in _JUDGES for x in judge(facts)]
    return [asdict(x) for x in sorted(found, key=lambda x: x.level == "note")]


def _bad(facts: Facts) -> Iterator[Advice]:
    if bad := facts["bad_rows"]["rows"]:
        those = "it is" if bad == 1 else "they are" if bad <= BAD_SHOWN else f"the first {BAD_SHOWN} are"
        text = f"{counted(bad, 'row')} cannot be used; {those} listed below"
        yield Advice("warning", "bad_rows", text, "correct them, or train without them: --data.on_bad_row skip")


def _one_class(facts: Facts) -> Iterator[Advice]:
    classes = facts["classes"]
    if classes and not (classes["desirable"] and classes["undesirable"]):
        side = "desirable" if classes["desirable"] else "undesirable"
        text = f"all {number(facts['rows'])} rows are {side}: the loss can only push one way"
        remedy = "give rows of the other class too" + (", or imitate these: --objective SFT" if side[0] == "d" else "")
        yield Advice("warning", "one_class", text, remedy)


def _weights(facts: Facts) -> Iterator[Advice]:
    weights = facts["weights"]
    if weights is None or weights["in_use"]["inside"]:
        return
    used, ratio = weights["in_use"], weights["in_use"]["ratio"]
    told = f"λ_D n_D / (λ_U n_U) is {ratio:.3g}" if ratio is not None else "undesirable rows have no weight"
    text = f"{told} with desirable_weight {used['desirable']:g} and undesirable_weight {used['undesirable']:g}"
    up, down = weights["desirable_weight"], weights["undesirable_weight"]
    remedy = (
        f"--model.objective.desirable_weight {span(up)}"
        if up[1] >= 1
        else (f"--model.objective.undesirable_weight {span(down)}")
    )
    yield Advice(
        "warning", "weights", f"{text}; the KTO paper advises 1 to 4/3", f"{remedy} (with 1 for the other class)"
    )


def _truncation(facts: Facts) -> Iterator[Advice]:
    cut = facts["truncation"]
    if not cut["rows"]:
        return
    many = cut["share"] > 0.05 or cut["completions"] > 0.01 * facts["completions"]
    what = counted(cut["rows"], "prompt with its completion", plural="prompts with their completions")
    lost = [
        f"{counted(cut[part], part[:-1])} {'loses its' if cut[part] == 1 else 'lose their'} {end}"
        for part, end in (("prompts", "beginning"), ("completions", "end with EOS"))
        if cut[part]
    ]
    longer = f"({percent(cut['share'])}) {'is' if cut['rows'] == 1 else 'are'} longer than max_length"
    text = f"{what} {longer} {number(cut['max_length'])}: {', '.join(lost)}"
    model = " with a model of more positions" if cut["limited_by_model"] else ""
    sizes = f"{cut['cuts_nothing']} cuts nothing, {cut['cuts_one_percent']} at most 1 %"
    remedy = f"--data.max_length{model}: {sizes}; or leave long rows out"
    yield Advice("warning" if many else "note", "truncation", text, remedy)


def _contradictions(facts: Facts) -> Iterator[Advice]:
    if found := facts["contradictions"]["rows"]:
        pairs = facts["kind"] == "pairs"
        if pairs:
            what = counted(found, "pair of completions", plural="pairs of completions")
            text = f"{what} of one prompt {'is' if found == 1 else 'are'} preferred both ways"
        else:
            what = counted(found, "completion")
            text = f"{what} of one prompt {'is' if found == 1 else 'are'} both desirable and undesirable"
        yield Advice("warning", "contradictions", text, "decide: keep one of the two labels, or neither row")


def _undecided(facts: Facts) -> Iterator[Advice]:
    if found := facts["undecided_pairs"]["rows"]:
        text = f"{counted(found, 'pair')} prefer a completion to itself"
        yield Advice("warning", "undecided_pairs", text, "leave these rows out: they teach nothing")


def _duplicates(facts: Facts) -> Iterator[Advice]:
    if found := facts["duplicates"]["rows"]:
        share = found / facts["rows"]
        text = (
            f"{counted(found, 'row')} ({percent(share)}) {'says' if found == 1 else 'say'} again what an earlier one "
        )
        remedy = "leave them out, unless the same feedback came several times and is to weigh more"
        yield Advice("warning" if share > 0.01 else "note", "duplicates", f"{text}says", remedy)


def _short(facts: Facts) -> Iterator[Advice]:
    found, of = facts["one_token_completions"]["rows"], facts["completions"]
    if found:
        text = f"{counted(found, 'completion')} of one token besides EOS"
        remedy = "look at the examples: an answer of one word is fine, a lost text is not"
        yield Advice("note" if found > of / 2 else "warning", "one_token_completions", text, remedy)


def _special(facts: Facts) -> Iterator[Advice]:
    if found := facts["special_tokens_in_plain_prompts"]["rows"]:
        text = f"{counted(found, 'plain prompt')} {'has' if found == 1 else 'have'} special tokens inside"
        remedy = "fine for a template that is rendered already; else somebody wrote them, and they act as the "
        remedy += "template's: give `prompt` as a list of messages, in which they are refused"
        yield Advice("warning", "special_tokens", text, remedy)


def _template(facts: Facts) -> Iterator[Advice]:
    plain, found = facts["plain_prompts"], facts["special_tokens_in_plain_prompts"]["rows"]
    if facts["tokenizer"]["chat_template"] and not facts["tokenizer"]["stand_in"] and plain > found:
        text = f"{counted(plain, 'prompt')} {'is a' if plain == 1 else 'are'} plain text{'s' * (plain != 1)}, though "
        text += "the tokenizer has a chat template: the model reads them without roles"
        remedy = 'for a chat model give messages: "prompt": [{"role": "user", "content": ...}], and so "completion"'
        yield Advice("note", "plain_prompts", text, remedy)


def _lengths(facts: Facts) -> Iterator[Advice]:
    x = facts["length_by_class"]
    if x is None or x["errors"] < SURE:
        return
    good, bad = ("chosen", "rejected") if facts["kind"] == "pairs" else ("desirable", "undesirable")
    shown = f"(medians: {number(x['median_desirable'])} and {number(x['median_undesirable'])} tokens)"
    if x["longer"] < SHORTER:
        text = f"{good} completions are markedly shorter than {bad} ones {shown}; in most feedback they are longer"
        remedy = "length proves nothing, but read some examples: are the labels inverted? If not, expect short answers"
        yield Advice("warning", "shorter", text, remedy)
    if x["longer"] > LONGER:
        text = f"length alone tells {good} completions from {bad} ones in {percent(x['longer'])} of couples {shown}"
        remedy = "the policy may learn to be long: balance the lengths, or try a length-normalised loss (SimPO, IPO)"
        yield Advice("warning", "longer", text, remedy)


def _repeated(facts: Facts) -> Iterator[Advice]:
    found = facts["repeated_prompts"]["rows"]
    if (share := found / facts["completions"]) > 0.01:
        begin = "begins" if found == 1 else "begin"
        text = f"{counted(found, 'completion')} ({percent(share)}) {begin} with words of the prompt"
        remedy = "if `completion` holds the whole conversation, take the prompt out: it would be learned as an answer"
        yield Advice("warning" if share > 0.1 else "note", "repeated_prompts", text, remedy)


def _prompts(facts: Facts) -> Iterator[Advice]:
    prompts = facts["prompts"]
    if facts["kind"] != "labelled" or not facts["mismatched"] or facts["rows"] == 1:
        return
    if prompts["distinct"] == 1:
        text = "all rows have one and the same prompt: KTO finds no y′ to estimate its reference point on"
        remedy = "--model.objective.reference_point false, or rows of several prompts"
        yield Advice("warning", "one_prompt", text, remedy)
    elif prompts["largest_share"] > 0.5:
        text = f"one prompt has {percent(prompts['largest_share'])} of the rows ({prompts['largest_example']}): rows "
        text += "have to share their y′, of which KTO's reference point is made"
        yield Advice("note", "one_prompt", text, "is an empty or constant prompt standing where the real one should?")


def _tokenizer(facts: Facts) -> Iterator[Advice]:
    if facts["tokenizer"]["stand_in"]:
        text = f"lengths are counted with the small tokenizer that ships ({facts['tokenizer']['name']}), whose tokens "
        text += "are shorter than those of most models"
        yield Advice("note", "tokenizer", text, "name your model's: --data.tokenizer FOLDER_OR_HUB_NAME")


def _padding(facts: Facts) -> Iterator[Advice]:
    x = facts["padding"]
    if x["shuffle"] > 0.25 and x["shuffle"] - x["group_by_length"] > 0.1:
        text = f"{percent(x['shuffle'])} of a micro-batch of {x['batch_size']} is padding"
        yield Advice("note", "padding", text, f"--data.group_by_length true: {percent(x['group_by_length'])}")


_JUDGES: tuple[Callable[[Facts], Iterator[Advice]], ...] = (
    _bad, _one_class, _contradictions, _undecided, _weights, _lengths, _prompts, _truncation, _short, _special,
    _duplicates, _repeated, _template, _padding, _tokenizer,
)  # fmt: skip
