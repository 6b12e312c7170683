"""The command line: a model unpruned and with METEOR's three stages.

    demo [--out DIR]           a question of every family answered both ways: tokens, time, a figure
    ask IMAGE QUESTION         a question about your own picture
    eval [--samples N]         accuracy by question family, or the paper's tables
    bench [--quick]            time, memory and FLOPs at real sizes, against peers
    calibrate DIR              ranks and lambda of a model, on your pictures
    train --data FILE          projectors, then all but the encoders, on your dialogues

Wrong input: one sentence on stderr, exit code 2.
"""

import argparse
import json
import os
import sys
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from huggingface_hub.utils import logging as hub_logging
from PIL import Image

from . import __version__, budgets, vlm
from .budgets import Budget
from .model import Meteor
from .pictures import open_picture, resize_square, to_square
from .weights import CHECKPOINTS, PRESETS, hub_or_cache

EXTRAS = {"eval": ["pandas", "scipy"], "train": ["accelerate"]}
RESULTS = Path("results")  # where the whole benchmark goes


# ------------------------------------------------------------------------------------ the arguments


class Parser(argparse.ArgumentParser):
    """argparse without the usage text in front of an error."""

    def error(self, message: str):
        raise ValueError(f"{message} (see {self.prog} --help)")


def build_parser() -> Parser:
    parser = Parser(
        prog="meteor-mini",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    parser.add_argument(
        "--version", action="version", version=f"meteor-mini {__version__}, {versions}"
    )
    names = "demo | ask | eval | bench | calibrate | train"
    commands = parser.add_subparsers(dest="command", required=True, metavar=names)
    for add_command in (add_demo, add_ask, add_eval, add_bench, add_calibrate, add_train):
        add_command(commands)
    return parser


def add_model(command: Parser) -> None:
    command.add_argument(
        "--model",
        default="toy",
        metavar="NAME_OR_DIR",
        help="toy (the embedded model), smol (the same encoders before SmolLM2), small, eagle-x4, "
        "a directory from save_pretrained, or a hub id",
    )


def add_demo(commands) -> None:
    command = commands.add_parser(
        "demo", help="generated pictures, each answered unpruned and with METEOR"
    )
    command.set_defaults(run=run_demo)
    add_model(command)
    command.add_argument(
        "--out",
        type=Path,
        default=Path("demo"),
        metavar="DIR",
        help="where the figures go (./demo), and the bare pictures, in DIR/pictures",
    )


def add_ask(commands) -> None:
    command = commands.add_parser("ask", help="ask about a picture of your own")
    command.set_defaults(run=run_ask)
    add_model(command)
    command.add_argument("image", type=Path, metavar="IMAGE")
    command.add_argument("question", metavar="QUESTION", help="in quotes")
    amount = command.add_mutually_exclusive_group()
    amount.add_argument(
        "--tokens",
        type=float,
        metavar="N",
        help="wanted mean visual tokens per LLM layer; of a vision-language model lambda is then "
        "solved for this one question, which takes up to 42 prefills",
    )
    amount.add_argument(
        "--lam",
        type=float,
        metavar="X",
        help="lambda of a vision-language model, as `calibrate` prints it",
    )
    amount.add_argument("--keep-all", action="store_true", help="no pruning")
    command.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw the patches that survive each stage"
    )
    command.add_argument("--json", action="store_true", help="print JSON")


def add_eval(commands) -> None:
    command = commands.add_parser("eval", help="accuracy by question family, unpruned and METEOR")
    command.set_defaults(run=run_eval)
    add_model(command)
    command.add_argument("--samples", type=int, default=1200, metavar="N", help="questions (1200)")
    command.add_argument(
        "--table",
        metavar="NAME",
        help="a table of the paper (1, 2, 3, 6, 7, 8) or a finding (see meteor_mini/"
        "findings.py), or all of them",
    )
    command.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="with --table: put what is measured into the CSV files, figures and README.md there",
    )


def add_bench(commands) -> None:
    command = commands.add_parser(
        "bench", help="what pruning buys, at real sizes with random weights, beside its peers"
    )
    command.set_defaults(run=run_bench)
    command.add_argument(
        "--quick", action="store_true", help="the smallest sizes; nothing is written"
    )
    command.add_argument(
        "--size",
        default="small",
        metavar="NAME",
        help="small (4 x 86 M, SmolLM2-135M), large (1B Llama), large-7b",
    )
    command.add_argument("--device", default="cpu", metavar="NAME", help="cpu, or cuda")
    command.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="float32 on a CPU, else bfloat16"
    )


def add_calibrate(commands) -> None:
    command = commands.add_parser(
        "calibrate", help="measure ranks and lambda, or a vision-language model's lambda"
    )
    command.set_defaults(run=run_calibrate)
    add_model(command)
    command.add_argument(
        "pictures",
        type=Path,
        metavar="DIR",
        help="typical pictures: 64 or more for ranks, a few for lambda alone",
    )
    command.add_argument(
        "--question", default="Describe the picture.", help="what is typically asked"
    )
    command.add_argument(
        "--tokens",
        type=float,
        metavar="N",
        help="of a vision-language model: wanted mean visual tokens per LLM layer (the paper's "
        "share)",
    )
    command.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="where the model goes with what was measured; needed for a Meteor",
    )


def add_train(commands) -> None:
    command = commands.add_parser(
        "train", help="train a model of pretrained parts on your pictures and dialogues"
    )
    command.set_defaults(run=run_train)
    add_model(command)
    command.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="where the model goes"
    )
    command.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="FILE",
        help="JSON: LLaVA's rows, or image, question, answer",
    )
    command.add_argument("--phase", choices=["projectors", "all"], default="projectors")
    command.add_argument(
        "--resume", action="store_true", help="from the last checkpoint in DIR/checkpoints"
    )
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of transformers' TrainingArguments",
    )


# ------------------------------------------------------------------------------------- demo and ask


def run_demo(args: Namespace) -> None:
    from . import demo

    demo.demo(Meteor.from_pretrained(args.model), args.out)


def run_ask(args: Namespace) -> None:
    if args.plot is not None and args.plot.exists() and args.plot.samefile(args.image):
        raise ValueError(f"--plot would overwrite the picture {args.image}")
    picture = open_picture(args.image)
    if is_vlm(args.model):
        return ask_vlm(args, picture)
    if args.lam is not None:
        raise ValueError("--lam is for a vision-language model; a Meteor is calibrated: --tokens")
    model = Meteor.from_pretrained(args.model)
    from . import demo  # it brings the toy's pictures, which no other model needs

    images, budget = to_square(picture), model.budget
    if args.keep_all:
        budget = Budget.keep_all()
    if args.tokens is not None:
        budget = budgets.budget_for(model, args.tokens)
    answer = model.answer(images, [args.question], budget)[0]
    if args.plot is not None:
        figure = demo.draw_answers(images, {"question": args.question}, {"answer": answer})
        figure.savefig(args.plot)
    if args.json:
        result = {"question": args.question, "answer": answer.text}
        print(json.dumps(result | {"tokens": answer.tokens, "survivors": answer.survivors}))
        return
    print(answer.text or "(nothing)")
    line = demo.token_line(answer)
    print(f"  tokens {line} (encoders -> stage 1 -> stage 2 -> mean per LLM layer)")
    for line in demo.survivor_lines(answer):
        print(f"  {line}")


def is_vlm(name: str) -> bool:
    """Whether transformers has a configuration of that name, of a vision-language model."""
    if name in CHECKPOINTS or name in PRESETS:
        return False
    try:
        with hub_or_cache(name):
            return transformers.AutoConfig.from_pretrained(name).model_type in vlm.MODEL_TYPES
    except (OSError, ValueError, KeyError):  # `Meteor.from_pretrained` says what is wrong
        return False


def ask_vlm(args: Namespace, picture: Image.Image) -> None:
    if args.plot is not None:
        raise ValueError("--plot draws the encoders of a Meteor; stage 3 alone has none")
    model, processor = vlm.load_vlm(args.model)
    lam = float("inf") if args.keep_all else args.lam
    if args.tokens is not None:
        prompt = vlm.prepare(model, processor, picture, args.question)
        lam = vlm.calibrate_lambda(model, [prompt], args.tokens)
    result = vlm.ask(model, processor, picture, args.question, lam)
    if args.json:
        print(json.dumps({"question": args.question} | result))
        return
    print(result["answer"] or "(nothing)")
    average = result["average_tokens"]
    print(
        f"  tokens {result['visual_tokens']} -> {average:.1f} (visual tokens -> mean per LLM layer)"
    )


# ----------------------------------------------------------------------------------- eval and bench


def run_eval(args: Namespace) -> None:
    require_extra("eval")
    from . import findings, tables

    if args.out is not None and args.table is None:
        raise ValueError("--out must come with --table: without it nothing is written")
    if args.out is not None and args.model != "smol":
        raise ValueError("--out must come with --model smol, of which its page tells")
    if args.samples < 1:
        raise ValueError(f"--samples must be 1 or more, got {args.samples}")
    model = Meteor.from_pretrained(args.model)
    names = [*tables.TABLES, *findings.FINDINGS]
    if args.table is None:
        print_accuracy(model, args.samples)
    elif args.table == "all":
        tables.report(model, names, args.samples, args.out)
    elif args.table in names:
        tables.report(model, [args.table], args.samples, args.out)
    else:
        raise ValueError(f"--table must be one of {', '.join(names)} or all, got {args.table}")


def print_accuracy(model: Meteor, samples: int) -> None:
    """Accuracy by family, unpruned and with METEOR."""
    import pandas

    from .evaluate import accuracy

    columns = {}
    for name, budget in {"unpruned": Budget.keep_all(), "METEOR": model.budget}.items():
        result = accuracy(model, budget, "test", samples)
        columns[name] = result["families"] | {
            "all": result["accuracy"],
            "visual tokens per LLM layer": result["average_tokens"],
        }
    print(f"right answers to {samples} questions of the test split, in percent")
    print(pandas.DataFrame(columns).to_string(float_format="{:.1f}".format))


def run_bench(args: Namespace) -> None:
    require_extra("eval")
    on_cpu = args.device == "cpu"
    if not on_cpu and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: torch finds no GPU here")
    from . import bench

    dtype = args.dtype or ("float32" if on_cpu else "bfloat16")
    folder = None if args.quick else RESULTS
    bench.run(args.size, args.device, getattr(torch, dtype), args.quick, folder)


# ------------------------------------------------------------------------- calibrate and train


def run_calibrate(args: Namespace) -> None:
    files = sorted(args.pictures.iterdir()) if args.pictures.is_dir() else []
    files = [file for file in files if file.is_file()]
    if not files:
        raise ValueError(f"{args.pictures} must be a directory with pictures")
    pictures = [open_picture(file) for file in files]
    if is_vlm(args.model):
        return calibrate_vlm(args, pictures)
    if args.out is None:
        raise ValueError("--out must name a directory for the calibrated model")
    model = Meteor.from_pretrained(args.model)
    images = [resize_square(to_square(picture), model.side) for picture in pictures]
    budgets.calibrate(model, images, [args.question] * len(images))
    model.save_pretrained(args.out)
    print(
        f"expected ranks of {', '.join(model.encoders)} on {len(images)} pictures, at each point:"
    )
    for row in model.config["ranks"]:
        print("  " + "  ".join(f"{rank:.1f}" for rank in row))
    Ks = ", ".join(map(str, model.config["lambda_table"]["K"]))
    print(f"lambda measured for {Ks} tokens after stage 2: {args.out}")


def calibrate_vlm(args: Namespace, pictures: list[Image.Image]) -> None:
    model, processor = vlm.load_vlm(args.model)
    prompts = [vlm.prepare(model, processor, x, args.question) for x in pictures]
    counts = [int(vlm.find_visual(model, prompt).sum()) for prompt in prompts]
    mean_count = sum(counts) / len(counts)
    tokens = vlm.SHARE * mean_count if args.tokens is None else args.tokens
    lam = vlm.calibrate_lambda(model, prompts, tokens)
    printed = f"{lam:.4g}"
    kept = vlm.measure_tokens(model, prompts, float(printed))
    print(f"--lam {printed} keeps {kept:.1f} of {mean_count:.1f} visual tokens per LLM layer")
    if args.out is not None:
        model.save_pretrained(args.out)
        processor.save_pretrained(args.out)


def run_train(args: Namespace) -> None:
    require_extra("train")
    from . import finetune

    options = parse_settings(args.set)
    rows = finetune.read_rows(args.data)  # before a model is fetched for it
    model = Meteor.from_pretrained(args.model)
    data = finetune.Dialogues(rows, model.side, args.data.parent)
    finetune.finetune(model, data, args.out, args.phase, args.resume, **options)
    print(f"trained {args.phase}: {args.out}")


def parse_settings(settings: list[str]) -> dict:
    """["bf16=true", "lr_scheduler_type=linear"] -> {"bf16": True, "lr_scheduler_type": "linear"}"""
    options = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"--set must be NAME=VALUE, got {setting}")
        try:
            options[key] = json.loads(value)
        except json.JSONDecodeError:
            options[key] = value
    return options


def require_extra(extra: str) -> None:
    """Raises ValueError where the packages of an extra of pyproject.toml are missing."""
    if any(find_spec(package) is None for package in EXTRAS[extra]):
        packages = ", ".join(EXTRAS[extra])
        raise ValueError(f'this command needs {packages}: pip install -e ".[{extra}]"')


def main(argv: list[str] | None = None) -> int:
    """Run a command. Returns 0, or 2 after one sentence on stderr about wrong input."""
    transformers.logging.set_verbosity_error()  # errors are printed once, below
    hub_logging.set_verbosity_error()
    try:
        args = build_parser().parse_args(argv)
        args.run(args)
    except BrokenPipeError:  # `| head` closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, TypeError, OSError) as error:
        print(f"meteor-mini: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
