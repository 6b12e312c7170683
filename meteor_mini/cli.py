"""The command line, `meteor-mini demo | ask | eval | bench | calibrate | train`: a model unpruned
and with METEOR's three stages.

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
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from huggingface_hub.utils import logging as hub_logging
from PIL import Image

from . import __version__, calibration, evaluate, glyphworld, report, vlm
from .model import CHECKPOINTS, Answer, Budget, Meteor, hub_or_cache
from .pictures import load_picture
from .presets import PRETRAINED
from .survivors import survivor_figure

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
TABLE_SAMPLES = 640  # questions a row: all tables in under an hour on 2 cores
RUNS = 3  # timed runs of each kind, after one to warm up; the median counts


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
    parser.add_argument(
        "--version",
        action="version",
        version=f"meteor-mini {__version__}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}",
    )
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="demo | ask | eval | bench | calibrate | train"
    )
    demo = commands.add_parser(
        "demo", help="generated pictures, each answered unpruned and with METEOR"
    )
    ask = commands.add_parser("ask", help="ask about a picture of your own")
    score = commands.add_parser("eval", help="accuracy by question family, unpruned and METEOR")
    bench = commands.add_parser(
        "bench", help="what pruning buys, at real sizes with random weights, beside its peers"
    )
    measure = commands.add_parser("calibrate", help="measure ranks and lambda on your pictures")
    train = commands.add_parser(
        "train", help="train a model of pretrained parts on your pictures and dialogues"
    )
    for sub in (demo, ask, score, measure, train):
        sub.add_argument(
            "--model",
            default="glyph",
            metavar="NAME_OR_DIR",
            help="glyph (the embedded model), small, eagle-x4, a directory from save_pretrained, or a hub id",
        )
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("demo"),
        metavar="DIR",
        help="where the figures go (./demo), and the bare pictures, in DIR/pictures",
    )
    ask.add_argument("image", type=Path, metavar="IMAGE")
    ask.add_argument("question", metavar="QUESTION")
    amount = ask.add_mutually_exclusive_group()
    amount.add_argument(
        "--tokens", type=number, metavar="N", help="wanted mean visual tokens per LLM layer"
    )
    amount.add_argument("--keep-all", action="store_true", help="no pruning")
    ask.add_argument(
        "--plot", type=Path, metavar="FILE", help="write a PNG: patches that survive each stage"
    )
    ask.add_argument("--json", action="store_true", help="print JSON")
    score.add_argument(
        "--samples", type=count, metavar="N", help=f"questions (1000; {TABLE_SAMPLES} with --table)"
    )
    score.add_argument(
        "--table",
        choices=[*report.TITLES, "all"],
        metavar="NAME",
        help=f"a table of the paper: {', '.join(report.TITLES)}; all: every one, into results/",
    )
    score.add_argument("--split", choices=["test", "val"], default="test")
    score.add_argument("--json", type=Path, metavar="FILE", help="write the rows as JSON")
    bench.add_argument(
        "--quick",
        action="store_true",
        help="the smallest sizes, in under 3 minutes; nothing is written",
    )
    bench.add_argument(
        "--size",
        default="small",
        metavar="NAME",
        help="small (4 x 86 M, SmolLM2-135M), large (1B Llama), large-7b",
    )
    bench.add_argument("--device", default="cpu", metavar="NAME", help="cpu, or cuda")
    bench.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="float32 on a CPU, else bfloat16"
    )
    bench.add_argument("--json", type=Path, metavar="FILE", help="write the rows as JSON")
    measure.add_argument("pictures", type=Path, metavar="DIR", help="64 pictures or more")
    measure.add_argument(
        "--question", default="Describe the picture.", help="what is typically asked"
    )
    for sub in (measure, train):
        sub.add_argument(
            "--out", type=Path, required=True, metavar="DIR", help="where the model goes"
        )
    train.add_argument("--preset", dest="model", metavar="NAME", help="the same as --model")
    train.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="FILE",
        help="JSON: LLaVA's rows, or image, question, answer; or a directory from save_to_disk of datasets",
    )
    train.add_argument("--phase", choices=["projectors", "all"], default="projectors")
    train.add_argument(
        "--resume", action="store_true", help="from the last checkpoint in DIR/checkpoints"
    )
    train.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of transformers' TrainingArguments",
    )
    return parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    """`build_parser().parse_args`, with a word of its own about quotes that were forgotten."""
    args, more = build_parser().parse_known_args(argv)
    if more and args.command == "ask" and not any(word.startswith("-") for word in more):
        raise ValueError(
            f'the question must stand in quotes, as one argument: "{args.question} {" ".join(more)}"; so must a file name '
            "with spaces"
        )
    if more:
        raise ValueError(
            f"unrecognized arguments: {' '.join(more)} (see meteor-mini {args.command} --help)"
        )
    return args


def count(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {text}")
    return int(text)


def number(text: str) -> int | float:
    return int(text) if text.lstrip("-").isdecimal() else float(text)


def check_output(path: Path, directory: bool = False) -> None:
    """Raise ValueError where a file (or directory) cannot be written, before anything is computed
    for it.
    """
    parent = path.absolute().parent
    if not parent.is_dir():
        raise ValueError(f"cannot write {path}: the directory {parent} does not exist")
    if path.exists() and path.is_dir() != directory:
        raise ValueError(f"cannot write {path}: it is {'not ' if directory else ''}a directory")
    if not os.access(path if path.exists() else parent, os.W_OK):
        raise ValueError(f"cannot write {path}: permission denied")


def load_model(name: str) -> Meteor:
    """`Meteor.from_pretrained`; what can be no model is refused before the hub is asked."""
    folder = CHECKPOINTS.get(name, Path(name))
    if name in CHECKPOINTS and not folder.is_dir():
        raise ValueError(
            f"model {name!r} is not in {folder}: `python -m meteor_mini.train` makes it"
        )
    if (
        not folder.is_dir()
        and name not in PRETRAINED
        and (folder.exists() or not HUB_ID.fullmatch(name))
    ):
        presets = ", ".join([*CHECKPOINTS, *PRETRAINED])
        raise ValueError(
            f"model {name!r} is no preset ({presets}), directory or hub id (owner/name)"
        )
    try:
        return Meteor.from_pretrained(name)
    except OSError as error:
        raise ValueError(f"model {name!r} cannot be loaded: {error}") from error


# ------------------------------------------------------------------ demo


def run_demo(args: argparse.Namespace) -> None:
    check_output(args.out, directory=True)
    model = load_model(args.model)
    budgets = {"unpruned": Budget.none(), "METEOR": model.budget}
    print(
        f"{len(model.encoders)} encoders: {', '.join(model.encoders)}\n"
        "tokens: from the encoders -> after stage 1 -> after stage 2 -> mean per LLM layer\n"
        "ms: from the picture to the first new token (prefill) and to the answer's end"
    )
    results = [
        demo_question(model, budgets, *item, args.out) for item in enumerate(glyphworld.FAMILIES)
    ]
    total = lambda name, key: sum(result[name][key] for result in results)
    right = ", ".join(f"{name} {total(name, 'right')} of {len(results)}" for name in budgets)
    print(f"\n{len(results)} figures in {args.out}; right answers: {right}")
    change = lambda key: 100 * total("METEOR", key) / total("unpruned", key) - 100
    print(f"tokens {change('tokens'):+.0f} %, prefill time {change('prefill'):+.0f} %")


def demo_question(
    model: Meteor, budgets: dict[str, Budget], index: int, family: str, out: Path
) -> dict:
    """Answer one question under each budget, print it and draw it.

    Returns: {budget name: {"tokens": mean per LLM layer, "right": bool, "prefill": ms, "answer":
        ms}}.
    """
    picture, question, truth = glyphworld.example(index, "test", family)
    images = evaluate.to_images([picture.image])
    answers = {
        name: model.answer(images, [question], budget)[0] for name, budget in budgets.items()
    }
    times = timings(model, images, question, budgets)  # the answers were the warm-up
    print(f"\n{family}: {question}  (true answer: {truth})")
    for name, answer in answers.items():
        print(
            f"  {name:8}  {said(answer):8}  tokens {token_line(answer):26}  "
            f"prefill {times[name]['prefill']:4.0f} ms, answer {times[name]['answer']:4.0f} ms"
        )
    print("\n".join("    " + line for line in survivor_lines(answers["METEOR"])), flush=True)
    (out / "pictures").mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture.image).save(out / "pictures" / f"{family}.png")
    figure(images, {"question": question, "true answer": truth}, answers).save(
        out / f"{family}.png"
    )
    return {
        name: {"tokens": answer.tokens["stage3"], "right": answer.text == truth} | times[name]
        for name, answer in answers.items()
    }


def timings(model: Meteor, images: torch.Tensor, question: str, budgets: dict[str, Budget]) -> dict:
    """Median milliseconds of RUNS runs, the budgets taking turns.

    Returns: {budget name: {"prefill": from picture to first new token, "answer": to the answer's
        end}}.
    """
    options, runs = {"prefill": {"max_new_tokens": 1}, "answer": {}}, {}
    for _ in range(RUNS):
        for what, extra in options.items():
            for name, budget in budgets.items():
                start = time.perf_counter()
                model.generate(model.encode_no_grad(images, budget), [question], budget, **extra)
                runs.setdefault((name, what), []).append(1000 * (time.perf_counter() - start))
    return {
        name: {what: statistics.median(runs[name, what]) for what in options} for name in budgets
    }


def said(answer: Answer) -> str:
    return answer.text or "(nothing)"


def short(count: float) -> str:
    return f"{count:.1f}".removesuffix(".0")


def token_line(answer: Answer) -> str:
    """576 -> 168 -> 80 -> 34.1: from the encoders, after stages 1 and 2, per LLM layer on
    average.
    """
    return " -> ".join(
        short(answer.tokens[key]) for key in ("encoders", "stage1", "stage2", "stage3")
    )


def survivor_lines(answer: Answer) -> list[str]:
    """A line a stage, as `after stage 1: clip 39, convnext 32, eva 45, pix2struct 52`."""
    when = {
        "stage1": "after stage 1",
        "stage2": "after stage 2",
        "stage3": "stage 3, in the last LLM layer",
    }
    return [
        f"{when[stage]}: " + ", ".join(f"{name} {count}" for name, count in counts.items())
        for stage, counts in answer.survivors.items()
    ]


def figure(images: torch.Tensor, texts: dict[str, str], answers: dict[str, Answer]) -> Image.Image:
    """The figure of the last of `answers`, with what all of them said and how many tokens that
    took.
    """
    heading = "{}, {} tokens per LLM layer".format
    texts = texts | {
        heading(name, short(a.tokens["stage3"])): said(a) for name, a in answers.items()
    }
    return survivor_figure(images[0], texts, list(answers.values())[-1].kept)


# ------------------------------------------------------------------ ask, eval


def run_ask(args: argparse.Namespace) -> None:
    if args.plot is not None:
        check_output(args.plot)
        if args.plot.suffix.lower() != ".png":
            raise ValueError(f"--plot writes a PNG, its name must end in .png, got {args.plot}")
        if args.plot.exists() and args.image.exists() and args.plot.samefile(args.image):
            raise ValueError(f"--plot would overwrite the picture {args.image}")
    images = load_picture(args.image)
    if is_vlm(args.model):
        return ask_vlm(args, images)
    model = load_model(args.model)
    model.tokenize([args.question])  # an unknown word is better found before the encoders run
    budget = Budget.none() if args.keep_all else model.budget
    if args.tokens is not None:
        budget = model.budget_for(args.tokens)
    answer = model.answer(images, [args.question], budget)[0]
    if args.plot is not None:
        figure(images, {"question": args.question}, {"answer": answer}).save(args.plot)
    if args.json:
        print(
            json.dumps(
                {
                    "question": args.question,
                    "answer": answer.text,
                    "tokens": answer.tokens,
                    "survivors": answer.survivors,
                }
            )
        )
    else:
        print(said(answer))
        print(
            f"  tokens {token_line(answer)} (encoders -> stage 1 -> stage 2 -> mean per LLM layer)"
        )
        print("\n".join("  " + line for line in survivor_lines(answer)))


def is_vlm(name: str) -> bool:
    """Whether transformers has a configuration of that name, of a vision-language model."""
    if name in CHECKPOINTS or name in PRETRAINED:
        return False
    try:
        with hub_or_cache(name):
            return transformers.AutoConfig.from_pretrained(name).model_type in vlm.FAMILIES
    except (OSError, ValueError, KeyError):  # `load_model` says what is wrong
        return False


def ask_vlm(args: argparse.Namespace, images: torch.Tensor) -> None:
    if args.plot is not None:
        raise ValueError("--plot draws the encoders of a Meteor model; stage 3 alone has none")
    model, processor = vlm.load_vlm(args.model)
    image = Image.fromarray((255 * images[0].permute(1, 2, 0)).round().byte().numpy())
    result = vlm.ask(model, processor, image, args.question, args.tokens, args.keep_all)
    if args.json:
        print(json.dumps({"question": args.question} | result))
    else:
        print(result["answer"] or "(nothing)")
        print(
            f"  tokens {result['visual_tokens']} -> {short(result['average_tokens'])} (visual tokens in -> mean per LLM layer)"
        )


def run_eval(args: argparse.Namespace) -> None:
    if args.json is not None:
        check_output(args.json)
    if args.table == "all":
        check_output(Path("results"), directory=True)
    if args.table is not None and args.split != "test":
        raise ValueError(
            "--split must be test beside --table, whose rows are of the held-out questions"
        )
    model = load_model(args.model)
    picture, question, _ = glyphworld.example(
        0, "val", "number"
    )  # where a stage cannot run, it says so here
    model.answer(
        evaluate.to_images([picture.image]), [question]
    )  # and not after a minute of unpruned questions
    if args.table is not None:
        names = list(report.TITLES) if args.table == "all" else [args.table]
        folder = Path("results") if args.table == "all" else None
        results = report.report(model, names, args.samples or TABLE_SAMPLES, folder)
        if args.json is not None:
            args.json.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
        return
    rows, samples = [], args.samples or 1000
    for method, budget in {"unpruned": Budget.none(), "meteor": model.budget}.items():
        result = evaluate.accuracy(model, budget, args.split, samples)
        rows.append(
            {
                "method": method,
                "average_tokens": float(result["average_tokens"]),
                "grid_cells": max(adapter.num_tokens for adapter in model.adapters),
                "accuracy": float(result["accuracy"]),
                "families": {family: float(value) for family, value in result["families"].items()},
            }
        )
    print(f"{'family':16}" + "".join(f"{row['method']:>10}" for row in rows))
    for family in rows[0]["families"]:
        print(f"{family:16}" + "".join(f"{row['families'][family]:10.1f}" for row in rows))
    for key in ("accuracy", "average_tokens"):
        print(f"{key.replace('_', ' '):16}" + "".join(f"{row[key]:10.1f}" for row in rows))
    print(
        f"{samples} questions of split {args.split}; accuracy in percent; visual tokens per LLM layer "
        f"(one encoder's grid: {rows[0]['grid_cells']})"
    )
    if args.json is not None:
        args.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


# ------------------------------------------------------------------ models of pretrained parts


def check_model_folder(path: Path) -> None:
    """Raise ValueError for a folder with something in it that is no model or training of ours."""
    if (
        path.is_dir()
        and any(path.iterdir())
        and not ((path / "model.safetensors").exists() or (path / "checkpoints").is_dir())
    ):
        raise ValueError(f"cannot write {path}: it holds something else than a model")


def run_bench(args: argparse.Namespace) -> None:
    from . import bench

    if args.json is not None:
        check_output(args.json)
    if not args.quick:
        check_output(Path("results"), directory=True)
    if (
        args.device.split(":")[0] not in ("cpu", "cuda")
        or args.device != "cpu"
        and not torch.cuda.is_available()
    ):
        raise ValueError(
            f"--device must be cpu, or cuda where torch finds a GPU, got {args.device}"
        )
    dtype, start = (
        args.dtype or ("float32" if args.device == "cpu" else "bfloat16"),
        time.perf_counter(),
    )

    def done(tables: dict) -> None:
        if args.json is not None:
            args.json.write_text(json.dumps(tables, indent=1) + "\n")
        if not args.quick:
            command = f"meteor-mini bench --size {args.size} --device {args.device} --dtype {dtype}"
            bench.write(
                tables, Path("results"), command, (time.perf_counter() - start) / 60, args.device
            )

    bench.bench(args.size, args.device, getattr(torch, dtype), args.quick, done)


def run_calibrate(args: argparse.Namespace) -> None:
    from .finetune import side_of  # the Trainer behind it takes a second to import

    check_output(args.out, directory=True)
    check_model_folder(args.out)
    files = (
        sorted(f for f in args.pictures.iterdir() if f.is_file()) if args.pictures.is_dir() else []
    )
    if not files:
        raise ValueError(f"{args.pictures} must be a directory with pictures")
    model = load_model(args.model)
    side = side_of(model)
    images = [
        F.interpolate(load_picture(f), (side, side), mode="bicubic", antialias=True).clamp(0, 1)
        for f in files
    ]
    calibration.calibrate_model(model, images, [args.question] * len(images))
    model.save_pretrained(args.out)
    print(
        f"expected ranks of {', '.join(model.encoders)} on {len(images)} pictures, at the three pruning points:"
    )
    for row in model.config["ranks"]:
        print("  " + "  ".join(f"{r:.1f}" for r in row))
    if len(images) < 64:
        print(
            f"note: ranks of {len(images)} pictures are uncertain, 64 or more are better",
            file=sys.stderr,
        )
    print(
        f"lambda measured for {', '.join(map(str, model.config['lambda_table']['K']))} tokens after stage 2: {args.out}"
    )


def run_train(args: argparse.Namespace) -> None:
    from . import finetune

    check_output(args.out, directory=True)
    check_model_folder(args.out)
    if importlib.util.find_spec("accelerate") is None:
        raise ValueError('train needs accelerate: pip install -e ".[train]"')
    try:
        options = {k: json.loads(v) for k, v in (item.partition("=")[::2] for item in args.set)}
    except json.JSONDecodeError as error:
        raise ValueError(
            "--set must be KEY=VALUE, the value a number, true, false or a text in double quotes, got "
            f"{' '.join(args.set)}"
        ) from error
    if unknown := options.keys() - {
        field.name for field in dataclasses.fields(transformers.TrainingArguments)
    }:
        raise ValueError(
            f"--set: transformers' TrainingArguments has no option {', '.join(sorted(unknown))}"
        )
    rows = finetune.read_rows(args.data)  # before a model is fetched for it
    model = load_model(args.model)
    data = finetune.Dialogues(rows, finetune.side_of(model), args.data.parent)
    finetune.finetune(model, data, args.out, args.phase, args.resume, **options)
    print(f"trained {args.phase}: {args.out}")


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, or 2 after one sentence on stderr about wrong
    input.
    """
    transformers.logging.set_verbosity_error()  # what is wrong is said once, below
    hub_logging.set_verbosity_error()
    try:
        args = parse(argv)
        {
            "demo": run_demo,
            "ask": run_ask,
            "eval": run_eval,
            "bench": run_bench,
            "calibrate": run_calibrate,
            "train": run_train,
        }[args.command](args)
    except BrokenPipeError:  # `| head`: nobody reads on, and that is no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"meteor-mini: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0
