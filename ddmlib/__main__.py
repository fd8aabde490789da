"""Command line: ``python -m ddmlib list | train NAME [--budget full] | card NAME [--measure]``."""

import argparse
import json
import sys
from pathlib import Path

from ddmlib import pretrained, recipes


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m ddmlib", description="Weights of ddmlib.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="names of all weights, and what they are")
    train = commands.add_parser("train", help="train weights from scratch and write their card")
    card = commands.add_parser(
        "card", help="print a card; with --measure, measure the weights anew"
    )
    for command in (train, card):
        command.add_argument("name")
        command.add_argument("--device", help="cpu or cuda; default: cuda when there is one")
        command.add_argument("--folder", type=Path, help="where the weights lie (default: package)")
    train.add_argument(
        "--budget", default="default", choices=(*recipes.BUDGETS, *recipes.CONTINUED)
    )
    train.add_argument("--steps", type=int, help="of the optimiser (default: the budget's)")
    train.add_argument("--compile", action="store_true", help="fuse operations; needs a compiler")
    train.add_argument(
        "--checkpoint", type=Path, help="written regularly; training resumes from it"
    )
    card.add_argument("--measure", action="store_true", help="measure and print, in full")
    card.add_argument("--samples", type=int, help="generated states (default: the recipe's)")
    card.add_argument("--write", action="store_true", help="with --measure: store it in the card")
    options = parser.parse_args(arguments)
    if options.command == "card" and not options.measure:
        given = {"--samples": options.samples, "--device": options.device, "--write": options.write}
        if alone := [flag for flag, value in given.items() if value]:
            card.error(f"{' and '.join(alone)} goes with --measure")
    try:
        run(options)
    except (ValueError, RuntimeError, OSError, AssertionError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def run(options: argparse.Namespace) -> None:
    """Carry out parsed options."""
    if options.command == "list":
        for name in pretrained.names():
            print(f"{name:32} {recipes.RECIPES[name].description}")
    elif options.command == "train":

        def report(p: pretrained.training.Progress) -> None:
            rate = f"{p.samples_per_second:.0f} samples/s"
            print(f"step {p.step:6d}  loss {p.loss:.5f}  lr {p.lr:.2e}  {rate}", flush=True)

        details = pretrained.train(
            options.name,
            budget=options.budget,
            steps=options.steps,
            compiled=options.compile,
            device=options.device,
            folder=options.folder,
            checkpoint=options.checkpoint,
            report=report,
        )
        print(json.dumps(details, indent=1))
    else:
        details = pretrained.card(options.name, options.folder)
        if options.measure:
            details["metrics"] = pretrained.measure(
                options.name, options.samples, device=options.device, folder=options.folder
            )
            if options.write:
                details["metrics"]["small"] = pretrained.measure(
                    options.name,
                    recipes.RECIPES[options.name].small,
                    device=options.device,
                    folder=options.folder,
                    brief=True,
                )
                pretrained.write_card(details, options.folder)
        print(json.dumps(details, indent=1))


if __name__ == "__main__":
    sys.exit(main())
