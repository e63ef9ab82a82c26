"""The command line. Stages are named here as strings and imported only when called."""

import importlib

import click

from ctrkit import __version__
from ctrkit.errors import nearest

# Command → (module, one line of help). The module's `command` is the click command.
# The help lines stand here so that `ctrkit --help` imports nothing heavy; a test holds them equal to the commands' own.
COMMANDS: dict[str, tuple[str, str]] = {
    "simulate": ("ctrkit.stages.simulate", "Write the demo shop: raw logs and pictures with known answers."),
    "check": ("ctrkit.stages.check", "Say what is wrong with the inputs, and what each stage will need."),
    "convert": ("ctrkit.stages.convert", "Turn raw impression and click logs into samples and vocabularies."),
    "select-clicks": ("ctrkit.stages.select_clicks", "Pick each user's typical clicks before each day."),
    "tune-backbone": ("ctrkit.stages.tune_backbone", "Fine-tune a backbone on pictures labelled by category."),
    "extract-images": ("ctrkit.stages.extract_images", "Turn pictures into vectors with a fixed network."),
    "import-features": ("ctrkit.stages.import_features", "Take picture vectors that were made elsewhere."),
    "group": ("ctrkit.stages.group", "Store common features once per user and day."),
    "train": ("ctrkit.stages.train", "Train DICM, DIN, base or LR."),
    "predict": ("ctrkit.stages.predict", "Score the impressions of a split with a trained model."),
    "export": ("ctrkit.stages.export", "Write a trained model as programs that serve it."),
    "score": ("ctrkit.stages.score", "Answer requests, JSON lines, with an exported model."),
    "serve": ("ctrkit.stages.serve", "Answer requests for scores over HTTP."),
    "eval": ("ctrkit.stages.eval", "Compute GAUC and its kin from predictions, ours or anyone's."),
    "compare": ("ctrkit.stages.compare", "Lay the metrics of several runs side by side."),
    "report": ("ctrkit.stages.report", "Write one HTML file of tables, figures and pictures."),
    "explain": (
        "ctrkit.stages.explain",
        "Take one prediction apart: what it is without each of its inputs.",
    ),
    "tables": ("ctrkit.stages.tables", "Put variants beside the papers' tables and figures."),
    "daily": ("ctrkit.stages.daily", "Put days, each trained from the day before, into one table."),
    "tune": ("ctrkit.stages.tune", "Search a recipe's settings for the best validation GAUC."),
    "replay": ("ctrkit.stages.replay", "Simulate the A/B test of two or more models in the demo world."),
    "run": ("ctrkit.stages.run", "Run a recipe from raw data to report, through Make."),
    "inspect": ("ctrkit.stages.inspect", "Show what is in any file or folder that ctrkit wrote."),
    "rules": ("ctrkit.stages.rules", "Write the Make rules of a recipe (used by the Makefile)."),
}


class LazyGroup(click.Group):
    """A click group whose commands are imported on use, so that `--help` stays fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(COMMANDS[cmd_name][0]).command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            raise click.UsageError(f"there is no command {args[0]!r}{nearest(args[0], COMMANDS)}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Stages, in the order of the flow"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ctrkit")
def main() -> None:
    """CTR models that look at the pictures: raw logs in, a trained DICM or DIN and an exact GAUC out.

    \b
    ctrkit run demo                      the simulated shop, from raw logs to report
    ctrkit eval --gauc predictions.csv   GAUC of any predictions
    ctrkit COMMAND --help                what a stage reads and writes
    """
