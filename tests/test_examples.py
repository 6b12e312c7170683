"""examples/lmms_eval_llava.py answers a task of ten pictures, with a tiny random LLaVA.

Where lmms-eval is installed it is used, and its command line runs the task, too; else a stand-in
with the few names that the example uses.
"""

import importlib.util
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import transformers as T
from PIL import Image
from tiny_models import EYES, TEXT

from meteor_mini import cli, vlm
from meteor_mini.toy.parts import build_tokenizer

EXAMPLE = Path(__file__).parents[1] / "examples" / "lmms_eval_llava.py"
HAS_LMMS_EVAL = importlib.util.find_spec("lmms_eval") is not None
N = 16  # visual tokens of a picture
GREEDY = dict(max_new_tokens=4, temperature=0, top_p=1.0, num_beams=1, do_sample=False)  # POPE's


def stand_in() -> dict[str, ModuleType]:
    """`lmms_eval.api.model.lmms`, as far as the example and these tests use it."""

    class Lmms:
        def __init__(self):
            self.task_dict = {}

        @classmethod
        def create_from_arg_string(cls, text, config):
            arguments = {}
            for pair in text.split(","):
                name, value = pair.split("=", 1)
                try:
                    arguments[name] = int(value) if value.isnumeric() else float(value)
                except ValueError:
                    arguments[name] = value
            return cls(**arguments, **config)

    modules = {name: ModuleType(name) for name in ("lmms_eval", "lmms_eval.api")}
    modules["lmms_eval.api.model"] = ModuleType("lmms_eval.api.model")
    modules["lmms_eval.api.model"].lmms = Lmms
    return modules


@pytest.fixture(scope="module")
def example():
    with pytest.MonkeyPatch.context() as patch:
        if not HAS_LMMS_EVAL:
            for name, module in stand_in().items():
                patch.setitem(sys.modules, name, module)
        spec = importlib.util.spec_from_file_location("lmms_eval_llava", EXAMPLE)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """A directory with a tiny random LLaVA that has a word for each of its tokens."""
    words = "user : assistant what is this a red green blue circle square line of in on".split()
    tokenizer = build_tokenizer(words)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    torch.manual_seed(0)
    config = T.LlavaConfig(
        text_config=T.LlamaConfig(
            **TEXT | dict(vocab_size=len(tokenizer), initializer_range=0.25, eos_token_id=None)
        ),
        vision_config=T.CLIPVisionConfig(**EYES | dict(num_hidden_layers=4), image_size=32),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    path = tmp_path_factory.mktemp("llava")
    model = T.LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = None  # a random model stops anywhere
    model.generation_config.pad_token_id = 0
    model.save_pretrained(path)
    template = (
        "{% for m in messages %}user : {% for c in m['content'] %}"
        "{{ '<image> ' if c['type'] == 'image' else c['text'] }}"
        "{% endfor %}{% endfor %} assistant :"
    )
    sight = T.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    T.LlavaProcessor(
        image_processor=sight,
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
        image_token="<image>",
    ).save_pretrained(path)
    return path


def ten_pictures() -> list[dict]:
    noise = np.random.default_rng(0).integers(0, 256, (10, 4, 4, 3), dtype=np.uint8)
    questions = ["what is this", "what is in this circle", "a line of red on blue"]
    return [
        {
            "image": Image.fromarray(pixels).resize((40, 32), Image.Resampling.NEAREST),
            "question": questions[i % 3],
        }
        for i, pixels in enumerate(noise)
    ]


DOCS = ten_pictures()
FEW = range(4)  # of them, where a few answers suffice


def picture_of(doc: dict) -> list[Image.Image]:
    return [doc["image"]]


def run(example, llava, args: str, options=GREEDY, order=range(10)):
    """Answers to the task, and how many visual tokens a layer had, on average."""
    model = example.PrunedLlava.create_from_arg_string(
        f"pretrained={llava},{args}", {"batch_size": "1", "device": "cpu"}
    )
    model.task_dict["ten"] = {"test": DOCS}
    requests = [
        SimpleNamespace(args=(DOCS[i]["question"], dict(options), picture_of, i, "ten", "test"))
        for i in order
    ]
    return model.generate_until(requests), model.average_tokens["ten"]


@pytest.fixture(scope="module")
def plain(llava):
    """What the library answers by itself to prompts that are written out here."""
    model = T.AutoModelForImageTextToText.from_pretrained(llava).eval()
    processor = T.AutoProcessor.from_pretrained(llava)
    answers = []
    for doc in DOCS:
        text = f"user : <image> {doc['question']} assistant :"
        inputs = processor(images=[doc["image"]], text=[text], return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        answer = ids[:, inputs["input_ids"].shape[1] :]
        words = processor.batch_decode(answer, skip_special_tokens=True)
        answers.append(words[0].strip())
    assert len(set(answers)) >= 8 and all(answers)  # they depend on the picture
    return answers


@pytest.mark.parametrize(
    "args",
    [
        "method=none",
        "method=meteor,lam=inf",
        "method=none,stage1=16",
        f"method=fastv,tokens={N}",
        f"method=pyramid_drop,tokens={N}",
        f"method=random,tokens={N}",
    ],
)
def test_with_all_tokens_kept_the_answers_are_the_librarys(example, llava, plain, args):
    answers, average = run(example, llava, args, order=FEW)
    assert answers == plain[:4] and average == N


def test_a_finite_lambda_keeps_fewer_tokens_and_a_smaller_one_fewer_still(example, llava, plain):
    some, average = run(example, llava, "method=meteor,lam=2", order=FEW)
    few, least = run(example, llava, "method=meteor,lam=0", order=FEW)
    assert least < average < N
    assert least == (1 * N + 7 * 1) / 8  # one token from layer 1 of 8 on
    assert few != plain[:4] and len(some) == 4


def test_without_lam_the_one_that_calibrate_noted_is_used(example, llava, tmp_path):
    model, processor = vlm.load_vlm(str(llava))
    prompts = [vlm.prepare(model, processor, doc["image"], doc["question"]) for doc in DOCS[:4]]
    vlm.calibrate_lambda(model, prompts, tokens=8)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    _, average = run(example, tmp_path, "method=meteor", order=FEW)
    assert average == pytest.approx(8, abs=0.5)


@pytest.mark.parametrize("method", ["fastv", "pyramid_drop", "random"])
def test_the_other_methods_keep_as_many_tokens_as_asked_for(example, llava, method):
    _, average = run(example, llava, f"method={method},tokens=8", order=FEW)
    assert average == pytest.approx(8, abs=0.5)


def test_random_follows_its_seed(example, llava):
    first, again, other = (
        run(example, llava, f"method=random,tokens=5,seed={seed}", order=FEW)[0]
        for seed in (1, 1, 2)
    )
    assert first == again != other


def test_random_draws_anew_for_each_question(example, llava):
    same_question = [0] * 5
    answers, _ = run(example, llava, "method=random,tokens=5", order=same_question)
    assert len(set(answers)) > 1


@pytest.mark.parametrize("method", ["none", "meteor"])
def test_stage_1_leaves_as_many_tokens_of_a_picture_as_asked_for(example, llava, plain, method):
    answers, average = run(example, llava, f"method={method},lam=inf,stage1=6", order=FEW)
    assert average == 6 and answers != plain[:4]


def test_answers_come_in_the_order_of_the_requests(example, llava, plain):
    answers, _ = run(example, llava, "method=none", order=[7, 2, 9])
    assert answers == [plain[7], plain[2], plain[9]]


def test_an_answer_ends_before_the_tasks_stop_words_and_the_options_are_left_alone(
    example, llava, plain
):
    word = plain[0].split()[1]
    options = GREEDY | {"until": [word]}
    answers, _ = run(example, llava, "method=none", options)
    assert answers == [answer.split(word)[0].strip() for answer in plain]
    assert answers != plain and options["until"] == [word]


@pytest.mark.parametrize(
    "args, message",
    [
        ("method=magic", "method must be one of none, meteor, .*, got 'magic'"),
        ("method=meteor", "method=meteor needs lam=LAM, which `meteor-mini calibrate` prints"),
        ("method=fastv", "method=fastv needs tokens=N"),
        ("method=fastv,tokens=1", "average 1 is out of reach with 16 tokens before layer 2"),
        ("method=none,stage1=17", "total must be 1, .* to all of .16., got 17"),
    ],
)
def test_wrong_arguments_are_refused_in_one_sentence(example, llava, args, message):
    with pytest.raises(ValueError, match=message) as error:
        run(example, llava, args)
    assert "\n" not in str(error.value)


def test_batches_and_prompts_of_several_pictures_are_refused(example, llava):
    with pytest.raises(ValueError, match="batch_size must be 1, got 2"):
        example.PrunedLlava(str(llava), "none", batch_size=2)
    model = example.PrunedLlava(str(llava), "none", device="cpu")
    model.task_dict["ten"] = {"test": DOCS}
    two = SimpleNamespace(args=("what", {}, lambda doc: 2 * picture_of(doc), 0, "ten", "test"))
    with pytest.raises(ValueError, match="prompts must have one picture, got 2 in ten"):
        model.generate_until([two])


def test_the_docstrings_commands_name_what_there_is(example):
    commands = example.__doc__.replace("\\\n", " ").splitlines()
    (calibrate,) = [line for line in commands if "meteor-mini" in line and line[0] == " "]
    asked = cli.build_parser().parse_args(shlex.split(calibrate)[1:])
    (evaluate,) = [line for line in commands if "--model_args" in line]
    assert f"pretrained={asked.model}," in evaluate and EXAMPLE.name in evaluate
    names = re.findall(r"(\w+)=", evaluate)
    assert names == ["pretrained", "method", "lam"]
    assert set(names) <= set(inspect.signature(example.PrunedLlava).parameters)


TASK = """
task: ten_pictures
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function ten.picture_of
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 4, do_sample: false, temperature: 0}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""


@pytest.mark.slow
@pytest.mark.skipif(not HAS_LMMS_EVAL, reason="lmms-eval is not installed")
def test_lmms_evals_command_line_runs_a_local_task(llava, plain, tmp_path):
    """The true answers are those of the model alone, so that unpruned all are right."""
    from datasets import Dataset

    docs = [doc | {"answer": answer} for doc, answer in zip(DOCS, plain)]
    Dataset.from_list(docs).to_parquet(tmp_path / "ten.parquet")
    (tmp_path / "ten.py").write_text("def picture_of(doc):\n    return [doc['image']]\n")
    (tmp_path / "ten.yaml").write_text(TASK.format(data=tmp_path / "ten.parquet"))

    def table(args: str) -> str:
        command = [sys.executable, EXAMPLE, "--model", "pruned_llava", "--tasks", "ten_pictures"]
        command += ["--model_args", f"pretrained={llava},{args}", "--device", "cpu"]
        command += ["--batch_size", "1", "--include_path", tmp_path]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        return done.stdout + done.stderr

    right = r"exact_match\s*\|.*\|\s*1(\.0*)?\s*\|"
    unpruned, pruned = table("method=none"), table("method=meteor,lam=0")
    assert "16.0 visual tokens" in unpruned and re.search(right, unpruned), unpruned
    assert "2.9 visual tokens" in pruned and not re.search(right, pruned), pruned
