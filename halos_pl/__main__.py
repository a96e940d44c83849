"""`python -m halos_pl`: answers help and version at once, and loads the heavy parts only for a real command."""

from __future__ import annotations

import difflib
import sys
from io import TextIOWrapper

from halos_pl import __version__

COMMANDS = ("fit", "validate", "test", "predict", "export", "data", "chat", "objectives", "estimate", "plot", "doctor")
HELP = f"""\
halos-pl {__version__}: align language models with human-aware losses.

usage: python -m halos_pl COMMAND [--config FILE ...] [--KEY VALUE ...]

commands:
  fit        train a policy and export it to runs/NAME/policy
  validate   the held-out metrics of a policy
  test       the same on the test rows
  predict    score every test row and write runs/NAME/predictions.jsonl
  export     write the policy of a checkpoint as a folder: export runs/NAME
  data       what a training would see of some rows: data inspect
  chat       talk to a model: chat DIR
  objectives every loss that ships, what it needs and what it costs
  estimate   memory, communication and time of a step on GPUs, by formulas: estimate --gpus 8 ...
  plot       draw a figure of the KTO report: plot value-functions
  doctor     what is installed, which devices there are, and what is fast here

examples:
  python -m halos_pl fit --config kto.yaml
  python -m halos_pl fit --config recipes/kto.yaml --model.policy MODEL --data.train feedback.jsonl
  python -m halos_pl fit --config recipes/dpo.yaml --model.policy MODEL --data.train pairs.jsonl
  python -m halos_pl fit --config kto.yaml --print_config
  python -m halos_pl data inspect --data.train feedback.jsonl --html report.html
  python -m halos_pl chat runs/kto
  python -m halos_pl plot value-functions --out figure-4.pdf
  python -m halos_pl doctor

The first one needs nothing but this package: it aligns the small model that ships, on the feedback that ships.
`python -m halos_pl COMMAND --help` lists every key. A bare config name that is not a file here is looked up among the
configurations that ship with the package; several --config are merged, later ones and the command line win.
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status (2 for a mistake of the caller's)."""
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without ✓ gets a ?, not an error
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if argv[0] in ("--version", "-V"):
        print(f"halos-pl {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        near = difflib.get_close_matches(argv[0], COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"commands: {', '.join(COMMANDS)}"
        print(f"halos_pl: error: unknown command {argv[0]!r}; {hint}", file=sys.stderr)
        return 2
    if argv[0] == "data":
        from halos_pl.inspect.command import main as data

        return data(argv[1:])
    if argv[0] == "export":
        from halos_pl.export_command import main as export

        return export(argv[1:])
    if argv[0] == "chat":
        from halos_pl.chat.command import main as chat

        return chat(argv[1:])
    if argv[0] == "objectives":
        from halos_pl.objectives import main as objectives

        return objectives(argv[1:])
    if argv[0] == "estimate":
        from halos_pl.estimate.command import main as estimate

        return estimate(argv[1:])
    if argv[0] == "plot":
        from halos_pl.plots.command import main as plot

        return plot(argv[1:])
    if argv[0] == "doctor":
        from halos_pl.doctor.report import main as doctor

        return doctor(argv[1:])
    from halos_pl.cli import run

    return run(argv)


if __name__ == "__main__":
    sys.exit(main())
