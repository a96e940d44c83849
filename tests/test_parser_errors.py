"""What the real parser says of a mistake, in the user's words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from jsonargparse import ArgumentParser

from halos_pl import cli, losses
from halos_pl.parser_errors import explain


class Built(cli.HalosCLI):
    """The command line up to its parser: nothing is parsed or run."""

    def parse_arguments(self, parser: Any, args: Any) -> None:
        raise StopIteration


@pytest.fixture(scope="module")
def command_line() -> cli.HalosCLI:
    built = Built.__new__(Built)
    with pytest.raises(StopIteration):
        built.__init__()  # type: ignore[misc]
    return built


def explained(command_line: cli.HalosCLI, argv: list[str]) -> str:
    with pytest.raises(cli.UsageError) as error:
        command_line.parser.parse_args(["fit", *argv])
    return explain(str(error.value), command_line._subcommand_parsers["fit"], cli._CLASSES)


DTYPES = "it takes float32, bfloat16, float64"
OBJECTIVES = f"it takes {', '.join(x.__name__ for x in losses.OBJECTIVES)}"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--model.polcy x", "unknown key --model.polcy; did you mean 'model.policy'?"),
        ("--modle.policy=x", "unknown key --modle.policy; did you mean 'model.policy'?"),
        ("--data.batchsize 4", "unknown key --data.batchsize; did you mean 'data.batch_size'?"),
        ("--trainer.max_step 3", "unknown key --trainer.max_step; did you mean 'trainer.max_steps'?"),
        ("--zzz 3", "unknown key 'zzz'"),
        ("--data.batch_size four", "--data.batch_size: got 'four', expected int"),
        ("--model.dropout maybe", "--model.dropout: got 'maybe', expected bool"),
        ("--model.warmup x", "--model.warmup: got 'x', expected int or float"),
        ("--trainer.callbacks Foo", "--trainer.callbacks: got 'Foo', expected list or null"),
        ("--model.dtype fp16", f"--model.dtype: got 'fp16'; {DTYPES}"),
        ("--model.dtype float16", f"--model.dtype: got 'float16'; did you mean 'bfloat16'?; {DTYPES}"),
        (
            "--model.schedule cosin",
            "--model.schedule: got 'cosin'; did you mean 'cosine'?; it takes constant, linear, cosine",
        ),
        ("--model.objective KTOO", f"--model.objective: no class 'KTOO' there; did you mean 'KTO'?; {OBJECTIVES}"),
        ("--model.objective PPPP", f"--model.objective: no class 'PPPP' there; {OBJECTIVES}"),
        (
            "--model.objective KTO --model.objective.betta 0.3",
            "unknown key 'betta'; did you mean --model.objective.beta?",
        ),
        (
            "--model.optimizer AdamW --model.optimizer.lrr 1",
            "unknown key 'lrr'; did you mean --model.optimizer.lr?",
        ),
        ("--name", "argument --name: expected one argument"),
    ],
)
def test_command_line(argv: str, message: str, command_line: cli.HalosCLI) -> None:
    assert explained(command_line, argv.split()) == message


@pytest.mark.parametrize("key", ["model.objective.beta", "model.optimizer.lr"])
def test_a_parameter_of_a_class_is_named_whole(key: str, command_line: cli.HalosCLI) -> None:
    assert explained(command_line, [f"--{key}", "fast"]).startswith(f"--{key}: got 'fast'")


def test_a_parameter_of_another_class_is_not_suggested(command_line: cli.HalosCLI) -> None:
    argv = ["--model.objective", "DPO", "--model.objective.desirable_weight", "2"]
    assert explained(command_line, argv) == (
        "key 'desirable_weight' is a parameter of KTO, APOZero, BCO, not of the class that is chosen"
    )


def test_a_class_that_is_not_there_lists_the_others(command_line: cli.HalosCLI) -> None:
    message = explained(command_line, ["--model.optimizer", "AdamX"])
    assert message.startswith("--model.optimizer: no class 'AdamX' there; did you mean 'Adam'?; it takes ")
    assert {"AdamW", "SGD", "RMSprop"} <= set(message.partition("it takes ")[2].split(", "))


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("model: {polcy: x}", "unknown key --model.polcy; did you mean 'model.policy'?"),
        ("modle: {policy: x}", "unknown key --modle.policy; did you mean 'model.policy'?"),
        ("data: {batch_size: four}", "--data.batch_size: got 'four', expected int"),
        ("model: {dtype: fp16}", f"--model.dtype: got 'fp16'; {DTYPES}"),
        (
            "model: {objective: {class_path: KTOO}}",
            f"--model.objective: no class 'KTOO' there; did you mean 'KTO'?; {OBJECTIVES}",
        ),
        (
            "model: {objective: {class_path: KTO, init_args: {betta: 1}}}",
            "unknown key 'betta'; did you mean --model.objective.beta?",
        ),
    ],
)
def test_config_file(yaml: str, message: str, command_line: cli.HalosCLI, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml)
    assert explained(command_line, ["--config", str(tmp_path / "run.yaml")]) == message


@pytest.mark.parametrize("name", ["nowhere.Thing", "halos_pl.losses.Thing"])
def test_a_class_of_ones_own_that_is_not_there_is_named(name: str, command_line: cli.HalosCLI) -> None:
    told = explained(command_line, ["--model.objective", name])
    assert told.startswith(f"--model.objective: {name!r}: ")
    assert ("No module named 'nowhere'" if "nowhere" in name else "Thing") in told
    assert "a class of your own is FILE.NAME" in told


def test_a_humanline_that_is_no_list(command_line: cli.HalosCLI) -> None:
    told = explained(command_line, ["--model.objective", "DPO", "--model.objective.humanline", "true"])
    assert "a list such as '[-1.0, 1.5]'" in told


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("  what nobody foresaw \n", "what nobody foresaw"),
        ("Parser key \"config\": File does not exist:\n  'x'", "--config: File does not exist: 'x'"),
        ('Key "a.b": broken', "--a.b: broken"),
    ],
)
def test_other_messages_pass_through_on_one_line(said: str, message: str) -> None:
    assert explain(said, ArgumentParser(), {}) == message


def test_the_user_sees_the_explanation_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["fit", "--model.polcy", "x"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["halos_pl", *argv])
        assert cli.run(argv) == 2
    out = capsys.readouterr()
    assert out.err == "halos_pl: error: unknown key --model.polcy; did you mean 'model.policy'?\n"
    assert out.out == ""
