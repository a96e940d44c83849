"""`python -m halos_pl chat DIR`: talk to an exported policy, or to any causal language model.

In a terminal the reply appears as it is made. With another stdin each line gets its reply, and nothing else goes to
stdout.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NoReturn

import torch
import transformers

from halos_pl.chat.conversation import Chat, ChatError
from halos_pl.data import DataError
from halos_pl.data.tokenizers import load_tokenizer
from halos_pl.evaluate.sample import Sampling
from halos_pl.models import ModelError, ModelSource, load_model
from halos_pl.models.load import DTYPES
from halos_pl.nano.shipped import locate

COMMANDS = {"/reset": "forget the conversation", "/system": "TEXT: replace the system message", "/exit": "leave"}


def main(argv: list[str]) -> int:
    """Run the command.

    Returns:
        0; 2 for a mistake of the user's, told on stderr in one line; 130 where Ctrl-C ended a run without a terminal.
    """
    if sys.stdin is None or sys.stdout is None:
        print("halos_pl: error: chat needs an open stdin and stdout", file=sys.stderr)
        return 2
    terminal = sys.stdin.isatty()
    try:
        options = parser().parse_args(argv)
        chat = load(options)
        if terminal:
            _notice(f"{options.folder}; {', '.join(COMMANDS)} or Ctrl-D; Ctrl-C stops a reply")
        if not chat.conversational:
            _notice("no chat template: the model completes each text by itself")
        return converse(chat, _asked() if terminal else sys.stdin, terminal=terminal)
    except (ChatError, ModelError, DataError, UnicodeDecodeError) as error:
        print(f"halos_pl: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read the replies has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        print(f"halos_pl: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def load(options: argparse.Namespace) -> Chat:
    """Model and tokenizer of the options, ready to talk.

    Raises:
        ChatError: a bad value, or no such device; a folder without a tokenizer.
        ModelError: no such folder, not a model folder, or weights that do not fit.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    device = _device(options.device)
    try:
        sampling = Sampling(options.temperature, options.top_p, options.max_new_tokens, options.seed)
        name = find_model(options.folder)
        source = ModelSource(name=name, dtype=options.dtype or _dtype(name, device))
        positions = source.max_positions  # whether there is a model is asked before whether it has a tokenizer
        tokenizer = load_tokenizer(name)
        torch.manual_seed(sampling.seed)
        model = load_model(source)
        torch.nn.Module.to(model, device)
        return Chat(
            model,
            tokenizer,
            sampling,
            positions=positions,
            system=options.system,
            notice=_notice,
        )
    except (ChatError, ModelError):
        raise
    except ValueError as error:  # of locate, load_tokenizer and CompletionTokenizer
        raise ChatError(str(error)) from error


def find_model(name: str) -> str:
    """The folder that a name stands for: of a run's folder, the policy in it; `nano:` names; any other name unchanged.

    Raises:
        ValueError: an unknown `nano:` name.
    """
    path = Path(located := locate(name)).expanduser()
    policy = path / "policy"
    return str(policy) if not (path / "config.json").exists() and (policy / "config.json").is_file() else located


def converse(chat: Chat, lines: Iterable[str], *, terminal: bool) -> int:
    """Answer each line on stdout, and follow the commands among them.

    Args:
        chat: the model.
        lines: what the user types; empty ones are passed over.
        terminal: whether someone sits there: then a line that cannot be answered earns a notice, and Ctrl-C stops a
            reply only.

    Returns:
        The exit status: 0, or 130 after Ctrl-C.

    Raises:
        ChatError, DataError: without a terminal, of the first line that cannot be answered.
    """
    for line in lines:
        text = line.rstrip("\r\n")
        command, _, rest = text.strip().partition(" ")
        if command == "/exit":
            return 0
        try:
            if command in COMMANDS:
                _follow(chat, command, rest.strip())
            elif re.fullmatch(r"/[a-z]+", text.strip()):
                _notice(f"no command {command}; there are {', '.join(COMMANDS)}")
            elif text.strip():
                chat.say(text, _write)
                _write("\n")
        except (ChatError, DataError) as error:
            if not terminal:
                raise
            _notice(str(error))
        if chat.interrupted and not terminal:
            return 130
    return 0


def _follow(chat: Chat, command: str, rest: str) -> None:
    if command == "/system":
        chat.set_system(rest)
        _notice("the system message is replaced" if rest else "there is no system message now")
    else:
        chat.reset()
        _notice("the conversation begins anew")


def _asked() -> Iterator[str]:
    """What is typed at the prompt, until Ctrl-D or Ctrl-C."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  gives input() its line editing
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            yield input("> ")
    _write("\n")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _notice(text: str) -> None:
    print(f"halos_pl: {text}", file=sys.stderr, flush=True)


def _device(name: str | None) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
        usable = device.type != "meta"
    except (RuntimeError, AssertionError, NotImplementedError):
        usable = False
    if not usable:
        raise ChatError(
            f"--device: no device {name!r} here; expected cpu, cuda, cuda:N or mps, where the machine has it"
        )
    return device


def _dtype(name: str, device: torch.device) -> str:
    """float32; on CUDA bfloat16 for weights that are stored in half precision."""
    if device.type != "cuda":
        return "float32"
    stored = getattr(ModelSource(name=name).pretrained_config, "dtype", None)
    return "bfloat16" if stored in (torch.bfloat16, torch.float16) else "float32"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ChatError(message)


def parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m halos_pl chat",
        description="Talk to a model. Lines from a pipe are answered one by one; notices go to stderr.",
        epilog="; ".join(f"{name}: {what}" for name, what in COMMANDS.items()),
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("folder", metavar="DIR", help="folder in Hugging Face format, folder of a run, hub name, or nano:model")
    add("--temperature", type=float, default=0.7, help="of the softmax; 0 takes the likeliest token (default: 0.7)")
    add("--top-p", type=float, default=1.0, help="draw from the likeliest tokens of this probability (default: 1.0)")
    add("--max-new-tokens", type=int, default=256, help="longer replies are cut there (default: 256)")
    add("--seed", type=int, default=0, help="same seed, same lines: same replies (default: 0)")
    add("--system", metavar="TEXT", help="system message before all turns")
    add("--device", help="cpu, cuda, cuda:N or mps (default: the first of cuda, mps, cpu that is there)")
    add(
        "--dtype", choices=DTYPES, help="of the weights (default: float32; on CUDA bfloat16 for half-precision weights)"
    )
    return parser
