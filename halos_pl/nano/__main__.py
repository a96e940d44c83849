"""`python -m halos_pl.nano --out DIR`: makes what ships anew: tokenizer, model and feedback.

The model is trained by the configuration that ships, `fit --config sft.yaml`; feedback is sampled from it and labelled
by `granted`. With `--model` the feedback alone is made, from that model. On the machine that made what ships, the bytes
are the same again; elsewhere the rounding of other processors may give another model, and now and then another word.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from halos_pl.data.records import Message, Origin
from halos_pl.data.tokenization import CompletionTokenizer
from halos_pl.data.tokenizers import load_tokenizer
from halos_pl.evaluate.sample import Sampling, sample
from halos_pl.models import ModelSource, load_model
from halos_pl.nano.shipped import ASSETS, PLACES
from halos_pl.nano.wishes import corpus, granted, prompts

SPECIAL = ("<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|good|>", "<|bad|>")
"""The last two are for models conditioned on their label (CSFT)."""
CHAT = (
    "{% for message in messages %}{{ '<|' + message.role + '|>' + message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
HELD_OUT, TRAINING, PAIRS, TRIES = 400, 3200, 2000, 12


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m halos_pl.nano", description="Make what ships anew.")
    parser.add_argument("--out", type=Path, required=True, help=f"folder to write; what ships lies in {ASSETS.name}/")
    parser.add_argument("--model", help="make the feedback only, sampled from this folder")
    options = parser.parse_args(argv)
    try:
        if options.model is None:
            options.model = str(make_model(options.out / PLACES["model"]))
        made = feedback(options.model, TRAINING, HELD_OUT, PAIRS)
        options.out.mkdir(parents=True, exist_ok=True)
        for name, rows in made.items():
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (options.out / PLACES[name]).write_bytes(text.encode())
            print(f"{name}: {len(rows)} rows")
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        print(f"halos_pl.nano: error: {error}", file=sys.stderr)
        return 1
    return 0


def make_tokenizer(folder: Path) -> None:
    """A byte-level BPE whose merges end where every word of the corpus is one token; any text can be encoded."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2048, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(_texts(corpus(seed=0, count=8000)), trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=SPECIAL[0],
        bos_token=SPECIAL[1],
        eos_token=SPECIAL[2],
        additional_special_tokens=list(SPECIAL[3:]),
    )
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)


def make_model(folder: Path) -> Path:
    """Tokenizer and model, pretrained by the configuration that ships."""
    with tempfile.TemporaryDirectory() as scratch:
        make_tokenizer(Path(scratch, "tokenizer"))
        command = [sys.executable, "-m", "halos_pl", "fit", "--config", "sft.yaml", "--runs", scratch, "--name", "nano"]
        subprocess.run([*command, "--model.tokenizer", str(Path(scratch, "tokenizer"))], check=True)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(Path(scratch, "nano", "policy"), folder)
    return folder


def feedback(model: str, training: int, held_out: int, pairs: int) -> dict[str, list[dict[str, Any]]]:
    """Prompts, thumbs and pairs by the names of `PLACES`.

    Thumbs are one sample a prompt with its label, as a log of users would have it. Pairs are two samples of a prompt,
    the first that grants the wish and the first that does not, where `TRIES` samples hold both.

    Args:
        model: folder that is sampled from, in float32.
        training: number of training prompts.
        held_out: number of other prompts, for evaluation.
        pairs: prompts of each group that are sampled for pairs, at most.
    """
    speaker = _Speaker(model)
    asked = prompts(seed=0, count=held_out + training)
    groups = {"-held-out": asked[:held_out], "": asked[held_out:]}
    made: dict[str, list[dict[str, Any]]] = {"prompts": groups["-held-out"]}
    for suffix, rows in groups.items():
        thumbs = zip(rows, speaker.say(rows, seed=0), strict=True)
        made["thumbs" + suffix] = [
            {"prompt": row["prompt"], "completion": [_reply(text)], "label": granted(row, text)} for row, text in thumbs
        ]
        compared = rows[:pairs]
        tries = [speaker.say(compared, seed) for seed in range(1, TRIES + 1)]
        made["pairs" + suffix] = []
        for row, *texts in zip(compared, *tries, strict=True):
            good = [_reply(text) for text in texts if granted(row, text)]
            bad = [_reply(text) for text in texts if not granted(row, text)]
            if good and bad:
                made["pairs" + suffix].append({"prompt": row["prompt"], "chosen": good[:1], "rejected": bad[:1]})
    return made


class _Speaker:
    """Samples answers of a model as text."""

    def __init__(self, folder: str) -> None:
        self.model = load_model(ModelSource(folder))
        self.encoder = CompletionTokenizer(load_tokenizer(folder))

    def say(self, rows: Sequence[dict[str, Any]], seed: int) -> list[str]:
        ids = [self.encoder.encode_prompt(row["prompt"], origin=Origin("prompts", i)) for i, row in enumerate(rows)]
        how = Sampling(max_new_tokens=64, seed=seed, batch_size=400)
        tokenizer = self.encoder.tokenizer
        drawn = sample(
            self.model, ids, how, eos_token_id=self.encoder.eos_token_id, pad_token_id=tokenizer.pad_token_id
        )
        return [str(tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in drawn]


def _reply(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _texts(rows: Iterable[dict[str, Any]]) -> Iterable[str]:
    for row in rows:
        yield from (message["content"] for message in row["messages"]) if "messages" in row else (row["completion"],)


if __name__ == "__main__":
    sys.exit(main())
