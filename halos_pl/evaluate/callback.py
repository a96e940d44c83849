"""A look at what the policy says, at every validation: sampled, verified, compared with the reference."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch.distributed.fsdp import FSDPModule

from halos_pl.batch import Sequences
from halos_pl.data import AlignmentData, DataError
from halos_pl.data.collate import sequences
from halos_pl.data.tokenization import CompletionTokenizer
from halos_pl.data.truncation import Tokens
from halos_pl.evaluate.interval import clopper_pearson
from halos_pl.evaluate.prompts import Prompt, load_prompts, load_text
from halos_pl.evaluate.sample import Sampling, sample
from halos_pl.evaluate.verifier import Verifier, find_verifier, verdict
from halos_pl.models import ModelError
from halos_pl.module import AlignmentModule


@dataclass(frozen=True)
class Said:
    """A sampled completion and what is known of it."""

    prompt: int
    completion: str
    verified: bool | None  # None without a verifier
    logratio: float | None  # policy − reference, nats; None without a reference
    tokens: int  # EOS included
    ended: bool  # with EOS, before max_new_tokens


class Evaluation(L.Callback):
    """Samples a completion for each of some prompts at every validation, and logs what SAMPLED of `metrics` says.

    Args:
        prompts: Source of prompts: a file of rows with `prompt` (or `messages`), such as your held-out feedback.
            Default: nothing is sampled.
        split: Take the prompts whose `split` field has this value.
        verifier: Function (row, completion) -> bool that says whether a completion is right, or its import path, such
            as halos_pl.nano.granted; a file checks.py in the working folder is the module checks.
        text: Source of texts whose loss shows what is forgotten, read as SFT reads them.
        limit: Take the first so many prompts (and texts).
        temperature: Of the softmax; 0 takes the likeliest token every time.
        top_p: Draw from the likeliest tokens that together have this probability.
        max_new_tokens: Longer completions are cut there.
        seed: Of the noise, which belongs to prompt and place: batch size and ranks change nothing.
        batch_size: Prompts at a time.
        shown: How many completions to print before and after.
    """

    def __init__(
        self,
        prompts: str | None = None,
        split: str | None = None,
        verifier: str | Verifier | None = None,
        text: str | None = None,
        limit: int | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_new_tokens: int = 128,
        seed: int = 0,
        batch_size: int = 64,
        shown: int = 5,
    ) -> None:
        if prompts is None and (verifier or split):
            raise ValueError("evaluation.verifier and evaluation.split have no use without evaluation.prompts")
        if limit is not None and limit < 1:
            raise ValueError(f"evaluation.limit must be at least 1, got {limit}")
        if shown < 0:
            raise ValueError(f"evaluation.shown must be at least 0, got {shown}")
        self.how = Sampling(temperature, top_p, max_new_tokens, seed, batch_size)
        self.source, self.split = prompts, split
        self.verifier = find_verifier(verifier) if isinstance(verifier, str) else verifier
        self.text_source, self.limit, self.shown = text, limit, shown
        self.prompts: list[Prompt] = []
        self.text: list[tuple[Tokens, Tokens]] = []
        self.folder: Path | None = None
        self.before, self.after = list[Said](), list[Said]()
        self._read_with: CompletionTokenizer | None = None

    @property
    def active(self) -> bool:
        return self.source is not None or self.text_source is not None

    def read(self, data: AlignmentData) -> None:
        """Read prompts and text, as soon as the data module has its tokenizer.

        Raises:
            DataError: rows that cannot be used, or no held-out rows: without them nothing is validated.
        """
        if not self.active or data.encoder is None or data.encoder is self._read_with:
            return
        if not data.sources["validation"]:
            raise DataError("evaluation runs at every validation, which needs held-out rows: --data.validation FILE")
        encoder = self._read_with = data.encoder
        if self.source is not None:
            with _named("prompts"):
                self.prompts = load_prompts(
                    self.source, encoder, split=self.split, limit=self.limit, on_bad_row=data.on_bad_row
                )
            longest = max(len(prompt.tokens) for prompt in self.prompts)
            if longest + max(2, self.how.max_new_tokens) > encoder.max_length:  # a cut prompt leaves one
                raise DataError(
                    f"evaluation: the longest prompt has {longest} tokens or more, which with max_new_tokens "
                    f"{self.how.max_new_tokens} is more than max_length {encoder.max_length}: lower "
                    "--evaluation.max_new_tokens, or raise --data.max_length as far as the model goes"
                )
        if self.text_source is not None:
            with _named("text"):
                self.text = load_text(self.text_source, data.preparation, limit=self.limit)

    # ------------------------------------------------------------------------------------------ hooks

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        data = getattr(trainer, "datamodule", None)
        if not self.active or stage not in ("fit", "validate"):
            return
        if not isinstance(data, AlignmentData) or not isinstance(pl_module, AlignmentModule):
            raise TypeError("Evaluation goes with AlignmentModule and AlignmentData")
        self.before = []
        self.read(data)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.active:
            return
        assert isinstance(pl_module, AlignmentModule)
        rank, world, error = trainer.global_rank, trainer.world_size, None
        together = world > 1 and isinstance(pl_module.policy, FSDPModule)
        said, nll = list[Said](), (0.0, 0)
        try:
            said = self._say(pl_module, *_dealt(len(self.prompts), rank, world, together), together)
            nll = self._text_nll(pl_module, *_dealt(len(self.text), rank, world, together))
        except (DataError, ModelError) as found:
            error = found
        gathered: list[Any] = [(said, nll, error)] * world
        if world > 1:
            torch.distributed.all_gather_object(gathered, (said, nll, error))
        for wrong in filter(None, (part[2] for part in gathered)):  # of one rank, and so of all
            raise wrong
        said = sorted((x for part, *_ in gathered for x in part), key=lambda x: x.prompt)
        values = summary(said)
        if self.text:
            total, count = map(sum, zip(*(part for _, part, _ in gathered), strict=True))
            values["text/nll"] = total / count
        pl_module.log_dict({f"val/{name}": value for name, value in values.items()})
        self.after = said
        if trainer.sanity_checking and not self.before:  # a run that goes on has them from its checkpoint
            self.before = said
        if self.folder is not None and trainer.is_global_zero and said:
            self._write(self.folder / f"step={trainer.global_step}.jsonl", said)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "validate" and trainer.is_global_zero and (table := self.table()) is not None:
            Console(highlight=False).print(table)

    def state_dict(self) -> dict[str, Any]:
        return {"before": [asdict(x) for x in self.before], "of": self._fingerprint()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["of"] == self._fingerprint():
            self.before = [Said(**x) for x in state_dict["before"]]

    def _fingerprint(self) -> str:
        """Of the prompts and of all that a sample depends on: samples of others do not stand beside these."""
        how = replace(self.how, batch_size=1)
        tokens = b"".join(prompt.tokens.tobytes() + b"|" for prompt in self.prompts)
        return blake2b(repr(how).encode() + tokens, digest_size=16).hexdigest()

    def table(self) -> Table | None:
        """The first completions, with those from before training beside them; None where nothing was sampled."""
        if not self.after or not self.shown:
            return None
        table = Table(title="samples", title_justify="left", show_lines=True)
        stages = {"before": self.before, "after": self.after} if self.before else {"completion": self.after}
        table.add_column("prompt", ratio=2)
        for name in stages:
            table.add_column(name, ratio=3)
        for said in list(zip(*stages.values(), strict=True))[: self.shown]:
            table.add_row(Text(self.prompts[said[0].prompt].last_turn), *map(_marked, said))
        return table

    # ------------------------------------------------------------------------------------------ what it measures

    def _say(self, module: AlignmentModule, rows: Sequence[int], counted: int, together: bool) -> list[Said]:
        """Completions of some prompts by the policy, verified, and scored against the reference: the counted ones."""
        if not rows:
            return []
        encoder, policy = self._read_with, module.policy
        assert encoder is not None
        assert policy is not None
        pad = encoder.tokenizer.pad_token_id
        prompts = [self.prompts[i] for i in rows]
        drawn = sample(
            policy.lm,
            [prompt.tokens for prompt in prompts],
            self.how,
            eos_token_id=encoder.eos_token_id,
            pad_token_id=pad,
            rows=rows,
            generate=policy.generate,
            together=together,
        )
        texts = encoder.tokenizer.batch_decode([tokens.tolist() for tokens in drawn], skip_special_tokens=True)
        ratios: list[float | None] = [None] * len(rows)
        if module.reference is not None:
            pairs = [(prompt.tokens, tokens) for prompt, tokens in zip(prompts, drawn, strict=True)]
            ratios = [x for part in self._rows(pairs, module) for x in module.score(part).logratio.tolist()]
        return [
            Said(
                prompt=i,
                completion=text,
                verified=None if self.verifier is None else verdict(self.verifier, prompt, text),
                logratio=ratio,
                tokens=len(tokens),
                ended=bool(tokens[-1] == encoder.eos_token_id),
            )
            for i, prompt, text, ratio, tokens in [*zip(rows, prompts, texts, ratios, drawn, strict=True)][:counted]
        ]

    def _text_nll(self, module: AlignmentModule, rows: Sequence[int], counted: int) -> tuple[float, int]:
        """Σ −log π and the number of tokens, of the counted texts."""
        assert module.policy is not None
        total, count = 0.0, 0
        with torch.no_grad():
            for part in self._rows([self.text[i] for i in rows], module):
                upto = int(part.cu_seqlens[min(counted, part.num_rows)])
                total -= float(module.policy(part).logp[:upto].double().sum())
                count, counted = count + upto, max(0, counted - part.num_rows)
        return total, count

    def _rows(self, pairs: Sequence[tuple[Tokens, Tokens]], module: AlignmentModule) -> Iterator[Sequences]:
        assert self._read_with is not None
        pad, size = self._read_with.tokenizer.pad_token_id, self.how.batch_size
        parts = (pairs[i : i + size] for i in range(0, len(pairs), size))
        vocabulary = module.data_needs.vocab_size
        return (sequences(part, pad_id=pad, vocab_size=vocabulary).to(module.device) for part in parts)

    def _write(self, path: Path, said: Sequence[Said]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(".partial")
        with aside.open("w", encoding="utf-8") as file:
            for x in said:
                known = {key: value for key, value in asdict(x).items() if key != "prompt" and value is not None}
                file.write(json.dumps({"prompt": self.prompts[x.prompt].text} | known, ensure_ascii=False) + "\n")
        aside.replace(path)


@contextmanager
def _named(key: str) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        raise DataError(f"evaluation.{key}: {error}") from error


def _dealt(count: int, rank: int, world: int, equally: bool) -> tuple[list[int], int]:
    """Rows of a rank, and how many of them count: where ranks must do equally much, some do one more for nothing."""
    mine = [*range(rank, count, world)]
    extra = -(-count // world) - len(mine) if equally else 0
    return mine + extra * [rank % max(1, count)], len(mine)


def _marked(said: Said) -> Text:
    """The completion with its verdict; nothing in it is markup."""
    text = Text(said.completion.replace("\x1b", "␛"))
    if said.verified is not None:
        text.append(" ✓" if said.verified else " ✗", style="green" if said.verified else "red")
    return text


def summary(said: Sequence[Said]) -> dict[str, float]:
    """Means over completions, by the names of `metrics.SAMPLED`."""
    values, n, tokens = dict[str, float](), len(said), sum(x.tokens for x in said)
    if not said:
        return values
    if said[0].verified is not None:
        right = sum(bool(x.verified) for x in said)
        low, high = clopper_pearson(right, n)
        values |= {"samples/verified": right / n, "samples/verified_low": low, "samples/verified_high": high}
    if said[0].logratio is not None:
        kl = sum(x.logratio or 0.0 for x in said)
        values |= {"samples/kl": kl / n, "samples/kl_token": kl / tokens}
    return values | {
        "samples/distinct": len({x.completion for x in said}) / n,
        "samples/ended": sum(x.ended for x in said) / n,
        "samples/tokens": tokens / n,
    }
