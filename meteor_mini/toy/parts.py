"""What the embedded model is made of: four small encoders, a small Llama, a word-level tokenizer.

Encoders and Llama are of the same classes as the big ones (open_clip's VisionTransformer, timm's
ConvNeXt and Eva, transformers' Pix2StructVisionModel and LlamaForCausalLM), so that every line of
the stage files runs on them as it does there. Each encoder has 12 x 12 tokens.
"""

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .world import PRINT, SHAPES

# name -> keywords of the library's class; see weights.build_encoder
ENCODERS = {
    "clip": {
        "image_size": 96,
        "patch_size": 8,
        "width": 96,
        "layers": 6,
        "heads": 6,
        "mlp_ratio": 3,
        "output_dim": 96,
    },
    "convnext": {
        "num_classes": 0,
        "depths": [1, 1, 2, 1],
        "dims": [32, 64, 96, 96],
        "kernel_sizes": 5,  # of 12 x 12 tokens; the big ones have 7
        "output_stride": 8,
        "input_size": [3, 96, 96],
        # the default, 1e-6, is for long schedules: it would delay every block
        "ls_init_value": 0.5,
    },
    "eva": {
        "img_size": 96,
        "patch_size": 8,
        "num_classes": 0,
        "embed_dim": 96,
        "depth": 6,
        "num_heads": 6,
        "mlp_ratio": 3,
        "use_rot_pos_emb": True,
        "ref_feat_shape": [12, 12],
    },
    "pix2struct": {
        "hidden_size": 96,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "d_kv": 16,
        "d_ff": 256,
        # patches of 16 x 16 pixels: it sees 192 x 192, the others 96 x 96
        "patch_embed_hidden_size": 768,
        "seq_len": 144,
        "initializer_range": 0.02,  # the default is 1e-10, which leaves its MLPs dead
    },
}
# What each encoder's projector passes on to the Llama. Stage 2 drops what several encoders share:
# if all four passed on bars, it would drop their heights too, which only EVA knows.
TOLD = {
    "clip": [(SHAPES, "what color row column")],
    "convnext": [(SHAPES, "what pattern row column")],
    "eva": [(SHAPES, "what row column"), (["bar"], "color value extreme")],
    "pix2struct": [(PRINT, "what digit place row column"), (SHAPES, "what row column")],
}
DECODER = {
    "hidden_size": 128,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 32,  # with 16, it learns to look things up much later
    "intermediate_size": 320,
    "max_position_embeddings": 2048,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
    "tie_word_embeddings": True,
    "initializer_range": 0.1,  # the default, 0.02, is for models ten times as wide
}

SPECIALS = ["<pad>", "<bos>", "<eos>", "<unk>", "<ans>"]  # <ans> ends the question
SYSTEM_TEXT = "look at the picture and answer the question with a word or a number."
# the system text, the picture, the question, <ans>
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<bos> " + SYSTEM_TEXT + " ' + m['content'] + '<ans>' }}{% endfor %}"
)


def build_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer: lower case, digits one by one, unknown words become <unk>.

    In decoded text the digits of one number are joined again.
    """
    vocabulary = {word: i for i, word in enumerate(SPECIALS + list(words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"<ans>|<eos>"), "isolated"),
            pre_tokenizers.Whitespace(),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.WordPiece(cleanup=False),  # a space in front of every word but the first
            decoders.Fuse(),
            decoders.Replace(Regex(r"(?<=\d) (?=\d)"), ""),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<ans>"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
