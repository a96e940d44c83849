"""`chat`: which model a name stands for, pipes and terminals, commands, and what a mistake is told."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from halos_pl.__main__ import main
from halos_pl.chat.command import find_model
from halos_pl.chat.conversation import Chat
from halos_pl.data.templates import TEMPLATES
from halos_pl.nano.shipped import locate


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """The folder of a run, whose policy has a chat template."""
    run = tmp_path / "runs" / "mine"
    shutil.copytree(tiny_model, run / "policy")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = TEMPLATES["plain"]
    tokenizer.save_pretrained(run / "policy")
    return run


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The model answers with what it was told, in capitals; every conversation that it saw."""
    seen: list[tuple[str, ...]] = []

    def say(chat: Chat, text: str, write: Any) -> str:
        if text == "stop":
            chat.interrupted = True
            return ""
        chat.messages.append({"role": "user", "content": text})
        seen.append(tuple(x["content"] for x in chat.messages))
        write(text.upper())
        return text.upper()

    monkeypatch.setattr(Chat, "say", say)
    return seen


def talk(monkeypatch: pytest.MonkeyPatch, text: str, *argv: object) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    return main(["chat", *map(str, argv)])


# ------------------------------------------------------------------------------------------------- a real process


def test_a_pipe_gets_replies_and_nothing_else(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "halos_pl", "chat", str(folder), "--temperature", "0", "--max-new-tokens", "3"],
        input="a dog\n\n/reset\na dog\n",
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    model = AutoModelForCausalLM.from_pretrained(folder / "policy")
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    ids = tokenizer("a dog\n\n", add_special_tokens=False)["input_ids"]
    start = len(ids)
    for _ in range(3):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    reply = tokenizer.decode(ids[start:], skip_special_tokens=True)
    assert reply
    assert done.stdout == f"{reply}\n{reply}\n"
    cut = "halos_pl: the reply was cut at 3 tokens"
    assert done.stderr.splitlines() == [cut, "halos_pl: the conversation begins anew", cut]


# ------------------------------------------------------------------------------------------------- which model


def test_what_a_name_stands_for(folder: Path) -> None:
    assert find_model(str(folder)) == str(folder / "policy")
    assert find_model(str(folder / "policy")) == str(folder / "policy")
    assert find_model("owner/model") == "owner/model"
    assert find_model("nano:model") == locate("nano:model")
    (folder / "config.json").write_text("{}")
    assert find_model(str(folder)) == str(folder)


def test_options_reach_the_model(folder: Path, monkeypatch: Any, told: Any) -> None:
    made: list[Chat] = []
    start = Chat.__init__

    def spy(chat: Chat, *args: Any, **options: Any) -> None:
        start(chat, *args, **options)
        made.append(chat)

    monkeypatch.setattr(Chat, "__init__", spy)
    options = (
        "--dtype",
        "bfloat16",
        "--device",
        "cpu",
        "--top-p",
        "0.5",
        "--max-new-tokens",
        "7",
        "--system",
        "be kind",
    )
    assert talk(monkeypatch, "hi\n", folder, *options, "--seed", "11") == 0
    assert torch.initial_seed() == 11
    assert made[0].model.dtype == torch.bfloat16
    assert not made[0].model.training
    assert made[0].positions == 128
    assert (made[0].sampling.temperature, made[0].sampling.top_p, made[0].sampling.max_new_tokens) == (0.7, 0.5, 7)
    assert told == [("be kind", "hi")]
    assert talk(monkeypatch, "", folder) == 0
    assert made[1].model.dtype == torch.float32


def test_a_model_without_a_template_says_so(tiny_model: Path, monkeypatch: Any, capsys: Any, told: Any) -> None:
    assert talk(monkeypatch, "hi\n", tiny_model) == 0
    out, err = capsys.readouterr()
    assert out == "HI\n"
    assert "no chat template: the model completes each text by itself" in err


# ------------------------------------------------------------------------------------------------- commands


def test_commands(folder: Path, monkeypatch: Any, capsys: Any, told: Any) -> None:
    lines = "hi\n/system be kind\nso\n/reset\n/rest\n/usr is a folder\n/system\nwell\n/exit\nnever\n"
    assert talk(monkeypatch, lines, folder) == 0
    assert told == [
        ("hi",),
        ("be kind", "hi", "so"),
        ("be kind", "/usr is a folder"),
        ("/usr is a folder", "well"),
    ]
    out, err = capsys.readouterr()
    assert out == "HI\nSO\n/USR IS A FOLDER\nWELL\n"
    assert "no command /rest; there are /reset, /system, /exit" in err
    assert "there is no system message now" in err


def test_ctrl_c_ends_a_pipe(folder: Path, monkeypatch: Any, told: Any) -> None:
    assert talk(monkeypatch, "hi\nstop\nmore\n", folder) == 130
    assert told == [("hi",)]


@pytest.mark.parametrize("leave", [EOFError, KeyboardInterrupt])
def test_a_terminal(
    leave: type[BaseException], tiny_model: Path, monkeypatch: Any, capsys: Any, told: list[tuple[str, ...]]
) -> None:
    """Ctrl-C in a reply and a line that cannot be answered do not end it; Ctrl-D and Ctrl-C at the prompt do."""
    typed = iter(["hi", "stop", "/system be kind", "more"])

    def ask(prompt: str) -> str:
        print(prompt, end="")
        for line in typed:
            return line
        raise leave

    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr(sys, "stdin", Terminal())
    assert main(["chat", str(tiny_model)]) == 0
    out, err = capsys.readouterr()
    assert out == "> HI\n> \n> > MORE\n> \n"
    assert [x[-1] for x in told] == ["hi", "more"]
    assert "Ctrl-D" in err
    assert "a system message needs a chat template" in err


# ------------------------------------------------------------------------------------------------- mistakes


def break_nothing(folder: Path) -> None:
    pass


def without_tokenizer(folder: Path) -> None:
    for path in folder.glob("policy/tokenizer*"):
        path.unlink()


def without_weights(folder: Path) -> None:
    (folder / "policy" / "model.safetensors").unlink()


def without_policy(folder: Path) -> None:
    shutil.rmtree(folder / "policy")
    (folder / "csv").mkdir()


def of_a_strange_type(folder: Path) -> None:
    (folder / "policy" / "config.json").write_text(json.dumps({"model_type": "strange"}))


@pytest.mark.parametrize(
    ("spoil", "argv", "message"),
    [
        (break_nothing, ["nowhere/at/all"], "no model folder 'nowhere/at/all'"),
        (without_policy, [], "is not a model folder: it has no config.json (it holds csv)"),
        (without_tokenizer, [], "no tokenizer"),
        (without_weights, [], "cannot be loaded as a causal language model"),
        (of_a_strange_type, [], "its config.json cannot be read"),
        (break_nothing, ["nano:modl"], "did you mean nano:model?"),
        (break_nothing, ["--temperature", "-1"], "temperature must be at least 0, got -1.0"),
        (break_nothing, ["--temperature", "hot"], "argument --temperature: invalid float value: 'hot'"),
        (break_nothing, ["--top-p", "2"], "top_p must be in (0, 1], got 2.0"),
        (break_nothing, ["--max-new-tokens", "0"], "max_new_tokens and batch_size must be at least 1, got 0"),
        (break_nothing, ["--seed", "-3"], "seed must be at least 0 and below 2**63, got -3"),
        (break_nothing, ["--device", "abacus"], "--device: no device 'abacus' here"),
        (break_nothing, ["--device", "meta"], "--device: no device 'meta' here"),
        (break_nothing, ["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (break_nothing, ["--temp", "1"], "unrecognized arguments: --temp 1"),
        (break_nothing, ["--temperature", "0"], "chat:1: prompt: a null byte at character 1"),
    ],
)
def test_mistakes_are_told_in_one_line(
    spoil: Any, argv: list[str], message: str, folder: Path, monkeypatch: Any, capsys: Any
) -> None:
    spoil(folder)
    own = argv and not argv[0].startswith("--")
    assert talk(monkeypatch, "a\0b\n", *([] if own else [folder]), *argv) == 2
    out, err = capsys.readouterr()
    assert not out
    mistakes = [line for line in err.splitlines() if line.startswith("halos_pl: error: ")]
    assert len(mistakes) == 1
    assert message in mistakes[0]
    assert "--model.tokenizer" not in err, "an option of other commands"
    assert "Traceback" not in err


def test_the_folder_is_required(monkeypatch: Any, capsys: Any) -> None:
    assert talk(monkeypatch, "") == 2
    assert capsys.readouterr().err == "halos_pl: error: the following arguments are required: DIR\n"


def test_help(capsys: Any) -> None:
    with pytest.raises(SystemExit) as end:
        main(["chat", "--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert all(x in out for x in ("--temperature", "--top-p", "--max-new-tokens", "/reset", "/system", "/exit"))
