"""Fixtures that several test files share."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

if not torch.cuda.is_available():  # Triton decides when it is first imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real models, tokenizers and feedback, where the machine has them (HALOS_SHARED_DATA names the folder)."""
    folder = Path(os.environ.get("HALOS_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no shared data on this machine (set HALOS_SHARED_DATA)")
    return folder


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tokenized data of the tests; processes that they start find it too."""
    os.environ["HALOS_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def no_run_is_named() -> Iterator[None]:
    """A test that claims a folder leaves its name to ranks that it would launch; the next test is none of them."""
    yield
    os.environ.pop("HALOS_RUN_NAME", None)


def pytest_configure() -> None:
    """Tensors here are tiny: a second thread only waits for the first."""
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


class Allocations(TorchDispatchMode):
    """What operators return within this context, those that run inside `halos_kernels`' own operators included.

    The storage of `given` tensors was there before: it does not count.
    """

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.given = {x.untyped_storage().data_ptr() for x in given}
        self.shapes: set[tuple[int, ...]] = set()
        self.largest = 0  # elements of the largest tensor, or of the storage behind one
        self.peak = 0  # bytes alive at a time
        self._alive: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "halos_kernels":
            out = self.inside(func, *args, **(kwargs or {}))
        else:
            out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self.see(x)
        return out

    def inside(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        from halos_kernels import ops

        operator = getattr(ops, func.__name__.partition(".")[0])
        with self:
            return operator._init_fn(*args, **kwargs)

    def see(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        if storage.data_ptr() in self.given or x.dtype == torch.uint8:  # bytes: the interpreter moving its arguments
            return
        self.shapes.add(tuple(x.shape))
        self.largest = max(self.largest, x.numel(), storage.nbytes() // x.element_size())
        self._alive[StorageWeakRef(storage)] = storage.nbytes()
        self._alive = {ref: size for ref, size in self._alive.items() if not ref.expired()}
        self.peak = max(self.peak, sum(self._alive.values()))


@pytest.fixture
def allocations() -> type[Allocations]:
    return Allocations


WORDS = tuple("the a cat dog bird sees hears likes small big old red quickly slowly today here".split())  # noqa: SIM905


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def sentences(n: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choice(WORDS) for _ in range(rng.randint(2, 7))) for _ in range(n)]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random GPT-2 of 30 K parameters and a byte-level tokenizer without merges (260 tokens).

    GPT-2, because every operation of it follows the dtype: Llama rounds to float32 in its norms even in float64.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-gpt2")
    names = ["<pad>", "<s>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    config = GPT2Config(
        vocab_size=len(names), n_positions=128, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
    )
    model = GPT2LMHeadModel(config)
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = rng.normal(0, 0.15, parameter.shape) + ("ln_" in name and name.endswith("weight"))
            parameter.copy_(torch.from_numpy(values))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 preference pairs of several lengths; some prompts and completions occur more than once."""
    prompts, chosen, rejected = sentences(96, 1), sentences(96, 2), sentences(96, 3)
    rows = [
        {"prompt": prompts[i - i % 7 // 6] + ":", "chosen": " " + chosen[i], "rejected": " " + rejected[i]}
        for i in range(96)
    ]
    return write_jsonl(tmp_path_factory.mktemp("data") / "pairs.jsonl", rows)


@pytest.fixture(scope="session")
def thumbs_file(pairs_file: Path) -> Path:
    """96 labelled completions."""
    rows = [json.loads(line) for line in pairs_file.read_text(encoding="utf-8").splitlines()]
    thumbs = [
        {"prompt": row["prompt"], "completion": row["chosen" if i % 3 else "rejected"], "label": bool(i % 3)}
        for i, row in enumerate(rows)
    ]
    return write_jsonl(pairs_file.with_name("thumbs.jsonl"), thumbs)
