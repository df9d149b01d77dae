"""`capt-train`."""

from pathlib import Path
from typing import Any

import click

from capt_deploy.core.console import Command, PathInHome, print_json, say
from capt_deploy.core.version import __version__
from capt_train.config import TrainConfig
from capt_train.parts import GROUPS, METHODS, PARTS

_DEFAULT = TrainConfig(data="", model="")
_HELP = {"help_option_names": ["-h", "--help"]}


class _CommandOfParts(Command):
    """A command whose help ends with all parts and groups."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write them as lists."""
        with formatter.section("Parts"):
            formatter.write_dl([*PARTS.items()])
        with formatter.section("Groups of parts"):
            formatter.write_dl([(name, ", ".join(parts)) for name, parts in GROUPS.items()])


@click.command(cls=_CommandOfParts, context_settings=_HELP)
@click.option("--data", help="Folder, .csv, .jsonl, or split_zhou_*.json (see above).")
@click.option("--model", help="open_clip model: ViT-B-16, hf-hub:NAME, or local-dir:FOLDER.")
@click.option("--pretrained", help="open_clip tag (openai) or a checkpoint file.")
@click.option("--out", required=True, type=PathInHome(), help="Run folder to write.")
@click.option(
    "--method", type=click.Choice(list(METHODS)), default=_DEFAULT.method, show_default=True
)
@click.option("--with", "added", multiple=True, metavar="PARTS", help="Parts to add.")
@click.option("--without", multiple=True, metavar="PARTS", help="Parts to leave out.")
@click.option(
    "--classes",
    type=click.Choice(["all", "base"]),
    default="all",
    show_default=True,
    help="base: tune on the first half of the classes, the others stay new.",
)
@click.option(
    "--shots", type=int, default=_DEFAULT.shots, show_default=True, help="Images a class."
)
@click.option("--seed", type=int, default=_DEFAULT.seed, show_default=True)
@click.option("--class-names", help="JSON {label: name} or two-column CSV that renames classes.")
@click.option(
    "--template", "templates", multiple=True, help="Of the hand-written prompt, with {} in it."
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1 …")
@click.option(
    "--split-from",
    type=PathInHome(),
    help="Run whose images, --shots and --classes to use again.",
)
@click.option("--sentences", help='JSON {"a|b": {"commonality": […], "difference": […]}}.')
@click.option("--commonality", help="JSON {class: [what it shares with others, …]}.")
@click.option("--difference", help="JSON {class: [what tells it from others, …]}.")
@click.option("--llm-url", help="OpenAI-compatible endpoint to ask for sentences, ending in /v1.")
@click.option("--llm-model", help="Of that endpoint; the key is taken from $CAPT_LLM_KEY.")
@click.option("--llm-dry-run", is_flag=True, help="Print what would be asked, and stop.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="Any other setting or loss weight, e.g. epochs=100, moments=0.",
)
@click.option("--resume", is_flag=True, help="Continue the interrupted run in --out.")
@click.option("--json", "as_json", is_flag=True, help="Print the metrics as JSON on stdout.")
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
    """Tune a frozen CLIP on a few labelled images: prompts, experts, and adapters.

    DATA is a folder with train/, val/ and test/ of class folders, one folder of class folders, a
    CSV or JSONL with path,label[,split], or a CoOp split_zhou_*.json.

    PARTS are names of parts or groups (see the end), separated by commas.

    \b
    Example:
      capt-train --data photos --model ViT-B-16 --pretrained openai --out mine
      capt-train --data photos --model local-dir:clip --out text --without visual
      capt-train --resume --out mine
    """
    given = {
        name: value
        for name, value in options.items()
        if ctx.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE
    }
    for name in ("added", "without"):
        if name in given:
            parts = ",".join(given[name]).split(",")
            given[name] = tuple(part.strip() for part in parts if part.strip())
    config = _config(out, resume, given)
    from capt_train.pipeline import dry_run, train
    from capt_train.run.folder import CONFIG

    if llm_dry_run:
        asked = dry_run(config, out, options["split_from"])
        click.echo(asked.text())
        return

    try:
        report = train(config, out, resume=resume, split_from=options["split_from"])
    except KeyboardInterrupt:
        if (out / CONFIG).exists():  # else there is nothing to go on with
            say(f"\nto go on where it stopped: capt-train --resume --out {out}")
        raise
    if as_json:
        print_json(report)
    from capt_deploy.evaluation.summary import confused_pairs_table, summary

    say(f"\n{summary(report)}\n\n{confused_pairs_table(report)}")
    say(f"\ncalibrator {report['calibrator']}, temperature {report['temperature']:.3f}")
    say(f"run written to {out}")


def _config(out: Path, resume: bool, given: dict[str, Any]) -> TrainConfig:
    """Settings of the command line; a resumed run supplies those that are not given."""
    settings = parse_settings(given.pop("settings", ()))
    if given.pop("split_from", None) and {"shots", "classes"} & {*given, *settings}:
        raise click.UsageError("--split-from brings its own --shots and --classes; leave them out")
    if resume:
        from dataclasses import replace

        from capt_train.run.folder import read_config

        written, _ = read_config(out)
        return replace(written, **given).with_settings(settings)
    for name in ("data", "model"):
        if name not in given:
            raise click.UsageError(f"missing option --{name} (only --resume can do without it)")
    return TrainConfig(**given).with_settings(settings)


def parse_settings(texts: tuple[str, ...]) -> dict[str, str]:
    """Split `NAME=VALUE` texts. Raises click's UsageError where there is no `=`."""
    settings = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise click.UsageError(f"--set: expected NAME=VALUE, came {text!r}")
        settings[name.strip()] = value.strip()
    return settings
