"""The command line: a model unpruned and with METEOR's three stages.

    demo [--out DIR]           a question of every family answered both ways: tokens, time, a figure
    ask IMAGE QUESTION         a question about your own picture
    eval [--samples N]         accuracy by question family on the held-out split
    bench [--quick]            time, memory and FLOPs at real sizes, against peers
    calibrate DIR              ranks and lambda of a model of pretrained parts, on your pictures
    train --data FILE          its projectors, then all of it but the encoders, on your dialogues

Wrong input: one sentence on stderr, exit code 2, nothing written.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import re
import sys
import time
from argparse import Namespace
from pathlib import Path

import torch
import transformers
from huggingface_hub.utils import logging as hub_logging
from PIL import Image

from . import __version__, budgets, vlm
from .budgets import Budget
from .toy import evaluate
from .lab import demo, report
from .model import Meteor
from .pictures import load_picture, resize_square
from .weights import CHECKPOINTS, PRESETS, hub_or_cache

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
TABLE_SAMPLES = 1200  # questions a row
RESULTS = Path("results")  # where all tables and the whole benchmark go


# ------------------------------------------------------------------------------------ the arguments


class Parser(argparse.ArgumentParser):
    """argparse without the usage text in front of an error."""

    def error(self, message: str):
        raise ValueError(f"{message} (see {self.prog} --help)")


def build_parser() -> Parser:
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    parser = Parser(
        prog="meteor-mini",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--version", action="version", version=f"meteor-mini {__version__}, {versions}"
    )
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="demo | ask | eval | bench | calibrate | train"
    )
    add_demo(commands)
    add_ask(commands)
    add_eval(commands)
    add_bench(commands)
    add_calibrate(commands)
    add_train(commands)
    return parser


def add_model(command: Parser) -> None:
    command.add_argument(
        "--model",
        default="toy",
        metavar="NAME_OR_DIR",
        help="toy (the embedded model), small, eagle-x4, a directory from save_pretrained, "
        "or a hub id",
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
    command.add_argument("question", metavar="QUESTION")
    amount = command.add_mutually_exclusive_group()
    amount.add_argument(
        "--tokens", type=number, metavar="N", help="wanted mean visual tokens per LLM layer"
    )
    amount.add_argument(
        "--lam",
        type=float,
        metavar="X",
        help="lambda of a vision-language model, as an earlier answer printed it: finding it for "
        "one question takes longer than no pruning",
    )
    amount.add_argument("--keep-all", action="store_true", help="no pruning")
    command.add_argument(
        "--plot", type=Path, metavar="FILE", help="write a PNG: patches that survive each stage"
    )
    command.add_argument("--json", action="store_true", help="print JSON")


def add_eval(commands) -> None:
    command = commands.add_parser("eval", help="accuracy by question family, unpruned and METEOR")
    command.set_defaults(run=run_eval)
    add_model(command)
    command.add_argument(
        "--samples",
        type=count,
        metavar="N",
        help=f"questions (1000; {TABLE_SAMPLES} with --table)",
    )
    names = ", ".join(report.TITLES)
    command.add_argument(
        "--table",
        choices=[*report.TITLES, "all"],
        metavar="NAME",
        help=f"a table of the paper: {names}; all: every one, into results/",
    )
    command.add_argument("--split", choices=["test", "val"], default="test")
    add_json(command)


def add_bench(commands) -> None:
    command = commands.add_parser(
        "bench", help="what pruning buys, at real sizes with random weights, beside its peers"
    )
    command.set_defaults(run=run_bench)
    command.add_argument(
        "--quick",
        action="store_true",
        help="the smallest sizes, in under 3 minutes; nothing is written",
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
    add_json(command)


def add_calibrate(commands) -> None:
    command = commands.add_parser("calibrate", help="measure ranks and lambda on your pictures")
    command.set_defaults(run=run_calibrate)
    add_model(command)
    command.add_argument("pictures", type=Path, metavar="DIR", help="64 pictures or more")
    command.add_argument(
        "--question", default="Describe the picture.", help="what is typically asked"
    )
    add_out(command)


def add_train(commands) -> None:
    command = commands.add_parser(
        "train", help="train a model of pretrained parts on your pictures and dialogues"
    )
    command.set_defaults(run=run_train)
    add_model(command)
    add_out(command)
    command.add_argument("--preset", dest="model", metavar="NAME", help="the same as --model")
    command.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="FILE",
        help="JSON: LLaVA's rows, or image, question, answer; or a directory from save_to_disk "
        "of datasets",
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


def add_out(command: Parser) -> None:
    command.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="where the model goes"
    )


def add_json(command: Parser) -> None:
    command.add_argument("--json", type=Path, metavar="FILE", help="write the rows as JSON")


def parse(argv: list[str] | None) -> Namespace:
    """`build_parser().parse_args`, with a word of its own about quotes that were forgotten."""
    args, more = build_parser().parse_known_args(argv)
    if not more:
        return args
    forgot_quotes = args.command == "ask" and not any(word.startswith("-") for word in more)
    if forgot_quotes:
        question = " ".join([args.question, *more])
        raise ValueError(
            f'the question must stand in quotes, as one argument: "{question}"; so must a file '
            "name with spaces"
        )
    raise ValueError(
        f"unrecognized arguments: {' '.join(more)} (see meteor-mini {args.command} --help)"
    )


def count(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {text}")
    return int(text)


def number(text: str) -> int | float:
    return int(text) if text.lstrip("-").isdecimal() else float(text)


# --------------------------------------------------------------- what can be checked before working


def check_output(path: Path, directory: bool = False) -> None:
    """ValueError where a file (or directory) cannot be written, before work is done for it."""
    parent = path.absolute().parent
    if not parent.is_dir():
        raise ValueError(f"cannot write {path}: the directory {parent} does not exist")
    if directory and path.exists() and not path.is_dir():
        raise ValueError(f"cannot write {path}: it is not a directory")
    if not directory and path.is_dir():
        raise ValueError(f"cannot write {path}: it is a directory")
    if not os.access(path if path.exists() else parent, os.W_OK):
        raise ValueError(f"cannot write {path}: permission denied")


def check_model_folder(path: Path) -> None:
    """ValueError for a folder with something in it that is no model or training of ours."""
    check_output(path, directory=True)
    if not path.is_dir() or not any(path.iterdir()):
        return
    if not (path / "model.safetensors").exists() and not (path / "checkpoints").is_dir():
        raise ValueError(f"cannot write {path}: it holds something else than a model")


def load_model(name: str) -> Meteor:
    """`Meteor.from_pretrained`; what can be no model is refused before the hub is asked."""
    folder = CHECKPOINTS.get(name, Path(name))
    if name in CHECKPOINTS and not folder.is_dir():
        raise ValueError(
            f"model {name!r} is not in {folder}: `python -m meteor_mini.toy.train` makes it"
        )
    known = folder.is_dir() or name in PRESETS
    if not known and (folder.exists() or not HUB_ID.fullmatch(name)):
        presets = ", ".join([*CHECKPOINTS, *PRESETS])
        raise ValueError(
            f"model {name!r} is no preset ({presets}), directory or hub id (owner/name)"
        )
    try:
        return Meteor.from_pretrained(name)
    except OSError as error:
        raise ValueError(f"model {name!r} cannot be loaded: {error}") from error


# ------------------------------------------------------------------------------------- demo and ask


def run_demo(args: Namespace) -> None:
    check_output(args.out, directory=True)
    demo.demo(load_model(args.model), args.out)


def run_ask(args: Namespace) -> None:
    if args.plot is not None:
        check_plot(args.plot, args.image)
    images = load_picture(args.image)
    if is_vlm(args.model):
        return ask_vlm(args, images)
    if args.lam is not None:
        raise ValueError("--lam is for a vision-language model; a Meteor is calibrated: --tokens")
    model = load_model(args.model)
    model.tokenize([args.question])  # an unknown word is better found before the encoders run
    budget = model.budget
    if args.keep_all:
        budget = Budget.none()
    if args.tokens is not None:
        budget = budgets.budget_for(model, args.tokens)
    answer = model.answer(images, [args.question], budget)[0]
    if args.plot is not None:
        demo.figure(images, {"question": args.question}, {"answer": answer}).save(args.plot)
    if args.json:
        result = {"question": args.question, "answer": answer.text}
        print(json.dumps(result | {"tokens": answer.tokens, "survivors": answer.survivors}))
        return
    print(demo.said(answer))
    line = demo.token_line(answer)
    print(f"  tokens {line} (encoders -> stage 1 -> stage 2 -> mean per LLM layer)")
    print("\n".join("  " + line for line in demo.survivor_lines(answer)))


def check_plot(plot: Path, image: Path) -> None:
    check_output(plot)
    if plot.suffix.lower() != ".png":
        raise ValueError(f"--plot writes a PNG, its name must end in .png, got {plot}")
    if plot.exists() and image.exists() and plot.samefile(image):
        raise ValueError(f"--plot would overwrite the picture {image}")


def is_vlm(name: str) -> bool:
    """Whether transformers has a configuration of that name, of a vision-language model."""
    if name in CHECKPOINTS or name in PRESETS:
        return False
    try:
        with hub_or_cache(name):
            return transformers.AutoConfig.from_pretrained(name).model_type in vlm.FAMILIES
    except (OSError, ValueError, KeyError):  # `load_model` says what is wrong
        return False


def ask_vlm(args: Namespace, images: torch.Tensor) -> None:
    if args.plot is not None:
        raise ValueError("--plot draws the encoders of a Meteor model; stage 3 alone has none")
    model, processor = vlm.load_vlm(args.model)
    image = Image.fromarray((255 * images[0].permute(1, 2, 0)).round().byte().numpy())
    keep_all, lam = args.keep_all, args.lam
    result = vlm.ask(model, processor, image, args.question, args.tokens, keep_all, lam)
    if args.json:
        print(json.dumps({"question": args.question} | result))
        return
    print(result["answer"] or "(nothing)")
    average = demo.short(result["average_tokens"])
    lam = "" if result["lam"] is None else f"; --lam {result['lam']:.4g} asks again faster"
    print(
        f"  tokens {result['visual_tokens']} -> {average} (visual tokens in -> mean per LLM layer)"
        f"{lam}"
    )


# ----------------------------------------------------------------------------------- eval and bench


def run_eval(args: Namespace) -> None:
    if args.json is not None:
        check_output(args.json)
    if args.table == "all":
        check_output(RESULTS, directory=True)
    if args.table is not None and args.split != "test":
        raise ValueError(
            "--split must be test beside --table, whose rows are of the held-out questions"
        )
    model = load_model(args.model)
    # Where a stage cannot run, it says so here, and not after a minute of unpruned questions.
    example = evaluate.make_example(0, "val", "number")
    model.answer(*evaluate.images_and_questions([example]))
    if args.table is None:
        results = {"rows": measure_accuracy(model, args.split, args.samples or 1000)}
    else:
        names, folder = [args.table], None
        if args.table == "all":
            names, folder = list(report.TITLES), RESULTS
        results = report.report(model, names, args.samples or TABLE_SAMPLES, folder)
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")


def measure_accuracy(model: Meteor, split: str, samples: int) -> list[dict]:
    """Accuracy by family, unpruned and with METEOR, as printed rows."""
    cells = max(view.num_tokens for view in model.views.values())
    rows = []
    for method, budget in {"unpruned": Budget.none(), "meteor": model.budget}.items():
        result = evaluate.accuracy(model, budget, split, samples)
        rows.append(
            {
                "method": method,
                "average_tokens": float(result["average_tokens"]),
                "grid_cells": cells,
                "accuracy": float(result["accuracy"]),
                "families": {name: float(value) for name, value in result["families"].items()},
            }
        )
    print(f"{'family':16}" + "".join(f"{row['method']:>10}" for row in rows))
    for family in rows[0]["families"]:
        print(f"{family:16}" + "".join(f"{row['families'][family]:10.1f}" for row in rows))
    for key in ("accuracy", "average_tokens"):
        print(f"{key.replace('_', ' '):16}" + "".join(f"{row[key]:10.1f}" for row in rows))
    print(
        f"{samples} questions of split {split}; accuracy in percent; visual tokens per LLM layer "
        f"(one encoder's grid: {cells})"
    )
    return rows


def run_bench(args: Namespace) -> None:
    from .lab import bench

    if args.json is not None:
        check_output(args.json)
    if not args.quick:
        check_output(RESULTS, directory=True)
    on_cpu = args.device == "cpu"
    on_gpu = args.device.split(":")[0] == "cuda" and torch.cuda.is_available()
    if not on_cpu and not on_gpu:
        raise ValueError(
            f"--device must be cpu, or cuda where torch finds a GPU, got {args.device}"
        )
    dtype = args.dtype or ("float32" if on_cpu else "bfloat16")
    start = time.perf_counter()

    def done(tables: dict) -> None:
        if args.json is not None:
            args.json.write_text(json.dumps(tables, indent=1) + "\n")
        if not args.quick:
            options = f"--size {args.size} --device {args.device} --dtype {dtype}"
            minutes = (time.perf_counter() - start) / 60
            bench.write(tables, RESULTS, f"meteor-mini bench {options}", minutes, args.device)

    bench.bench(args.size, args.device, getattr(torch, dtype), args.quick, done)


# ----------------------------------------------------------------------- models of pretrained parts


def run_calibrate(args: Namespace) -> None:
    from .finetune import side_of  # the Trainer behind it takes a second to import

    check_model_folder(args.out)
    files = []
    if args.pictures.is_dir():
        files = sorted(file for file in args.pictures.iterdir() if file.is_file())
    if not files:
        raise ValueError(f"{args.pictures} must be a directory with pictures")
    model = load_model(args.model)
    side = side_of(model)
    images = [resize_square(load_picture(file), side) for file in files]
    budgets.calibrate(model, images, [args.question] * len(images))
    model.save_pretrained(args.out)
    names = ", ".join(model.encoders)
    print(f"expected ranks of {names} on {len(images)} pictures, at the pruning points:")
    for row in model.config["ranks"]:
        print("  " + "  ".join(f"{rank:.1f}" for rank in row))
    if len(images) < 64:
        note = f"note: ranks of {len(images)} pictures are uncertain, 64 or more are better"
        print(note, file=sys.stderr)
    Ks = ", ".join(map(str, model.config["lambda_table"]["K"]))
    print(f"lambda measured for {Ks} tokens after stage 2: {args.out}")


def run_train(args: Namespace) -> None:
    from . import finetune

    check_model_folder(args.out)
    if importlib.util.find_spec("accelerate") is None:
        raise ValueError('train needs accelerate: pip install -e ".[train]"')
    options = training_options(args.set)
    rows = finetune.read_rows(args.data)  # before a model is fetched for it
    model = load_model(args.model)
    data = finetune.Dialogues(rows, finetune.side_of(model), args.data.parent)
    finetune.finetune(model, data, args.out, args.phase, args.resume, **options)
    print(f"trained {args.phase}: {args.out}")


def training_options(settings: list[str]) -> dict:
    """["bf16=true", ...] -> {"bf16": True, ...}, of transformers' TrainingArguments."""
    options = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        try:
            options[key] = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(
                "--set must be KEY=VALUE, the value a number, true, false or a text in double "
                f"quotes, got {setting}"
            ) from error
    known = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    unknown = sorted(options.keys() - known)
    if unknown:
        raise ValueError(
            f"--set: transformers' TrainingArguments has no option {', '.join(unknown)}"
        )
    return options


def main(argv: list[str] | None = None) -> int:
    """Run a command. Returns 0, or 2 after one sentence on stderr about wrong input."""
    transformers.logging.set_verbosity_error()  # what is wrong is said once, below
    hub_logging.set_verbosity_error()
    try:
        args = parse(argv)
        args.run(args)
    except BrokenPipeError:  # `| head`: nobody reads on, and that is no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"meteor-mini: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
