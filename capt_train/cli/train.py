"""`capt-train`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from capt_deploy.core.console import (
    PathInHome,
    SectionedCommand,
    print_json,
    say,
    section_option,
)
from capt_deploy.core.version import __version__
from capt_train.calibrators import CALIBRATORS
from capt_train.config import TrainConfig, settings
from capt_train.methods import METHODS
from capt_train.parts import GROUPS, PARTS

_SETTINGS = settings()
_HELP = {"help_option_names": ["-h", "--help"]}


class _TrainCommand(SectionedCommand):
    """A command whose help ends with methods, parts and groups."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write methods, parts and groups as lists."""
        with formatter.section("Methods"):
            formatter.write_dl([(name, method.help) for name, method in METHODS.items()])
        with formatter.section("Parts"):
            formatter.write_dl([(name, part.help) for name, part in PARTS.items()])
        with formatter.section("Groups of parts"):
            formatter.write_dl([(name, ", ".join(parts)) for name, parts in GROUPS.items()])


def _setting(section: str, name: str, **attributes: Any) -> Callable[[Any], Any]:
    """Return the option of a setting, with the type, default and help of its declaration."""
    known = _SETTINGS[name]
    several = known.type is tuple
    shown = not several and isinstance(known.default, (int, float, str))
    usual = {
        "help": f"{known.help[0].upper()}{known.help[1:]}.",
        "type": str if several else known.type,
        "multiple": several,
        "default": known.default if shown else None,
        "show_default": shown,
    }
    return section_option(section, str(known.option), _identifier(name), **{**usual, **attributes})


def _identifier(name: str) -> str:
    return name.replace(".", "__")


@click.command(cls=_TrainCommand, context_settings=_HELP)
@_setting("Data", "data")
@_setting("Data", "classes", type=click.Choice(["all", "base"]))
@_setting("Data", "shots")
@_setting("Data", "test_share")
@_setting("Data", "class_names")
@section_option("Data", "--split-from", type=PathInHome(), help="Run whose images to use again.")
@_setting("Model", "model")
@_setting("Model", "pretrained")
@_setting("Model", "device")
@_setting("Method", "method", type=click.Choice(list(METHODS)), metavar="METHOD")
@_setting("Method", "added", metavar="PARTS")
@_setting("Method", "without", metavar="PARTS")
@_setting("Method", "prompt.templates")
@_setting("Method", "distillation.teacher")
@_setting("Method", "distillation.pretrained")
@_setting("Method", "distillation.unlabelled")
@_setting("Training", "tuning.epochs")
@_setting("Training", "tuning.learning_rate")
@_setting("Training", "tuning.batch_size")
@_setting("Training", "workers")
@_setting("Training", "seed")
@section_option(
    "Training",
    "--set",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="A setting of docs/training.md, e.g. losses.moments=0.",
)
@_setting("Confusion sentences", "confusion.sentences")
@_setting("Confusion sentences", "confusion.commonality")
@_setting("Confusion sentences", "confusion.difference")
@_setting("Confusion sentences", "confusion.llm_url")
@_setting("Confusion sentences", "confusion.llm_model")
@section_option(
    "Confusion sentences",
    "--llm-dry-run",
    is_flag=True,
    help="Print what would be asked, and stop.",
)
@section_option("Output", "--out", required=True, type=PathInHome(), help="Run folder to write.")
@section_option("Output", "--resume", is_flag=True, help="Continue the interrupted run in --out.")
@section_option(
    "Output", "--json", "as_json", is_flag=True, help="Print the metrics as JSON on stdout."
)
@click.version_option(__version__, prog_name="capt")
@click.pass_context
def main(
    ctx: click.Context,
    /,
    out: Path,
    resume: bool,
    llm_dry_run: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Tune a frozen CLIP on your labelled photos; held-out ones decide what is kept.

    --data is a folder with train/, val/ and test/ of class folders, one folder of class folders, a
    CSV or JSONL with path,label[,split], or a CoOp split_zhou_*.json. PARTS are names of parts or
    groups (see the end), separated by commas.

    \b
    Example:
      capt-train --data photos --model ViT-B-16-quickgelu --pretrained openai \\
        --out mine
      capt-train --data photos --model local-dir:clip --out fast --without prompt
      capt-train --resume --out mine
    """
    given = {
        name: options[_identifier(name)]
        for name in _SETTINGS
        if ctx.get_parameter_source(_identifier(name)) == click.core.ParameterSource.COMMANDLINE
    }
    for name in ("added", "without"):
        if name in given:
            parts = ",".join(given[name]).split(",")
            given[name] = tuple(part.strip() for part in parts if part.strip())
    given |= parse_settings(options["settings"])
    split_from = options["split_from"]
    if split_from is not None and {"shots", "classes"} & given.keys():
        raise click.UsageError("--split-from brings its own --shots and --classes; leave them out")
    if split_from is not None:
        from capt_train.run.folder import read_config

        source, _ = read_config(split_from)
        given |= {"shots": source.shots, "classes": source.classes}
    config = _config(out, resume, given)
    from capt_train.parallel import processes
    from capt_train.pipeline import dry_run
    from capt_train.run.folder import CONFIG

    try:
        with processes():
            if llm_dry_run:
                click.echo(dry_run(config, out, split_from))
            else:
                _train(config, out, resume, split_from, as_json)
    except KeyboardInterrupt:
        if (out / CONFIG).exists():  # without it, nothing can be resumed
            say(f"\nto continue where it stopped: capt-train --resume --out {out}")
        raise


def _train(
    config: TrainConfig, out: Path, resume: bool, split_from: Path | None, as_json: bool
) -> None:
    """Tune, and print the metrics."""
    from capt_train.pipeline import train

    report = train(config, out, resume=resume, split_from=split_from)
    if as_json:
        print_json(report)
    from capt_deploy.evaluation.summary import confused_pairs_table, summary

    say(f"\n{summary(report)}\n\n{confused_pairs_table(report)}")
    known = CALIBRATORS.get(report["calibrator"])
    say(
        f"\ncalibrator {report['calibrator']} ({known.help if known else 'not fitted'}), "
        f"temperature {report['temperature']:.3f} (logits are divided by it)"
    )
    say(f"run written to {out}")


def _config(out: Path, resume: bool, given: dict[str, Any]) -> TrainConfig:
    """Return the settings of the command line; a resumed run supplies those that are missing."""
    if resume:
        from capt_train.run.folder import read_config

        written, _ = read_config(out)
        return written.with_settings(given)
    for name in ("data", "model"):
        if name not in given:
            raise click.UsageError(f"missing option --{name} (only --resume can do without it)")
    return TrainConfig(given["data"], given["model"]).with_settings(given)


def parse_settings(texts: tuple[str, ...]) -> dict[str, str]:
    """Split `NAME=VALUE` texts.

    Raises:
        click.UsageError: a text has no `=`.
    """
    settings = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise click.UsageError(f"--set: expected NAME=VALUE, came {text!r}")
        settings[name.strip()] = value.strip()
    return settings


if __name__ == "__main__":  # as torchrun starts it
    main()
