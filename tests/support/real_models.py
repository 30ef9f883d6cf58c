"""Models that no one here wrote, tiny and with random weights, of four packages."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

N, CLASSES, WORDS, LENGTH = 3, 3, 7, 4


def images(channels: int = 3, size: int = 32) -> dict[str, Any]:
    return {"pixel_values": torch.randn(N, channels, size, size, dtype=torch.float64)}


def words(padding: int = -1) -> dict[str, Any]:
    """Tokens; the second sentence is shorter than the others, and padded at the end (-1) or at the
    beginning (0).
    """
    mask = torch.ones(N, LENGTH, dtype=torch.long)
    mask[1, padding] = 0
    return {"input_ids": torch.randint(1, WORDS, (N, LENGTH)), "attention_mask": mask}


def of_rows(logits: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """One class for each sample."""
    return logits, torch.arange(len(logits)) % logits.shape[-1]


def of_next_words(logits: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The loss of a language model, over N * (LENGTH - 1) rows, without those that are masked."""
    ids = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    return logits[:, :-1].reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1)


def of_pixels(logits: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """A class for each pixel."""
    return logits, torch.arange(logits[:, 0].numel()).reshape(logits[:, 0].shape) % logits.shape[1]


def of_noise(sample: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The noise that a denoiser is to find."""
    return sample, torch.linspace(-1, 1, sample.numel(), dtype=sample.dtype).reshape(sample.shape)


@dataclass(frozen=True)
class Real:
    """One row.

    Args:
        package: where it comes from.
        make: the model, with random weights.
        inputs: keyword arguments of its forward.
        loss: from its output and its inputs to (output, target) of a loss.
        criterion: the loss.
        output: the field of what the model returns; "" if it returns a tensor.
        train: in training mode, with dropout; batch norm stays in eval mode.
    """

    package: str
    make: Callable[..., nn.Module]
    inputs: Callable[[], dict[str, Any]] = images
    loss: Callable[[Tensor, dict[str, Any]], tuple[Tensor, Tensor]] = of_rows
    criterion: Callable[[], nn.Module] = nn.CrossEntropyLoss
    output: str = "logits"
    train: bool = False


REAL: dict[str, Real] = {}


def variant(
    name: str,
    base: str,
    inputs: Callable[[], dict[str, Any]] | None = None,
    train: bool = False,
    **changes: Any,
) -> None:
    """A model of the table with other options."""
    real = REAL[base]
    make = functools.partial(real.make, **changes)
    REAL[name] = dataclasses.replace(real, make=make, train=train, inputs=inputs or real.inputs)


def hugging(name: str, model: str, config: str, *args: Any, **options: Any) -> None:
    """A model of transformers: its class, that of its configuration, and the configuration."""

    def make(**changes: Any) -> nn.Module:
        import transformers

        given = options | changes
        made: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**given))
        assert given.get("attn_implementation") in (None, made.config._attn_implementation)
        return made

    REAL[name] = Real("transformers", make, *args)


def classifier(name: str, kind: str, **options: Any) -> None:
    size = options.get("image_size", 32)
    hugging(
        name,
        f"{kind}ForImageClassification",
        f"{kind}Config",
        lambda: images(size=size),
        num_labels=CLASSES,
        **options,
    )


SMALL = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 10,
    "vocab_size": WORDS,
}
PATCHES = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 10,
    "image_size": 8,
    "patch_size": 4,
}

classifier(
    "resnet", "ResNet", embedding_size=4, hidden_sizes=[4, 6], depths=[1, 2], layer_type="basic"
)
classifier(
    "resnet bottleneck",
    "ResNet",
    embedding_size=4,
    hidden_sizes=[4, 8],
    depths=[1, 2],
    layer_type="bottleneck",
)
classifier(
    "mobilenet v2",
    "MobileNetV2",
    depth_multiplier=0.1,
    min_depth=2,
    depth_divisible_by=2,
    expand_ratio=2,
    image_size=32,
)
classifier(
    "convnext",
    "ConvNext",
    num_stages=2,
    hidden_sizes=[4, 6],
    depths=[1, 1],
    patch_size=4,
    layer_scale_init_value=0.5,
)
classifier("vit", "ViT", attn_implementation="sdpa", **PATCHES)
classifier(
    "swin",
    "Swin",
    attn_implementation="sdpa",
    image_size=16,
    patch_size=2,
    embed_dim=4,
    depths=[2, 2],
    num_heads=[1, 2],
    window_size=2,
)
hugging(
    "segformer",
    "SegformerForSemanticSegmentation",
    "SegformerConfig",
    images,
    of_pixels,
    num_labels=CLASSES,
    attn_implementation="sdpa",
    num_encoder_blocks=2,
    depths=[1, 1],
    sr_ratios=[2, 1],
    hidden_sizes=[4, 6],
    patch_sizes=[7, 3],
    strides=[4, 2],
    num_attention_heads=[1, 2],
    mlp_ratios=[2, 2],
    decoder_hidden_size=4,
)
hugging(
    "bert",
    "BertForSequenceClassification",
    "BertConfig",
    words,
    num_labels=CLASSES,
    max_position_embeddings=8,
    attn_implementation="sdpa",
    **SMALL,
)
hugging(
    "gpt2",
    "GPT2LMHeadModel",
    "GPT2Config",
    words,
    of_next_words,
    n_embd=8,
    n_layer=2,
    n_head=2,
    n_positions=8,
    vocab_size=WORDS,
    attn_implementation="sdpa",
)
hugging(
    "llama",
    "LlamaForCausalLM",
    "LlamaConfig",
    words,
    of_next_words,
    num_key_value_heads=1,
    tie_word_embeddings=True,
    attn_implementation="sdpa",
    **SMALL,
)
for base in ("vit", "swin", "segformer", "bert", "gpt2", "llama"):
    variant(f"{base}, eager", base, attn_implementation="eager")
for base in ("gpt2", "llama"):
    variant(f"{base}, padded at the beginning", base, lambda: words(0))
    variant(
        f"{base}, padded at the beginning, eager",
        base,
        lambda: words(0),
        attn_implementation="eager",
    )
variant("gpt2, two tables", "gpt2", tie_word_embeddings=False)
variant("llama, two tables", "llama", tie_word_embeddings=False)

DROPOUT = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
for attention in ("sdpa", "eager"):
    variant(
        f"vit, {attention}, dropout", "vit", train=True, attn_implementation=attention, **DROPOUT
    )
    variant(
        f"bert, {attention}, dropout", "bert", train=True, attn_implementation=attention, **DROPOUT
    )
    variant(f"gpt2, {attention}, dropout", "gpt2", train=True, attn_implementation=attention)
    variant(
        f"llama, {attention}, dropout",
        "llama",
        train=True,
        attn_implementation=attention,
        attention_dropout=0.2,
    )
variant("swin, dropped paths", "swin", train=True, drop_path_rate=0.5, **DROPOUT)
variant("segformer, dropped paths", "segformer", train=True, drop_path_rate=0.5, **DROPOUT)
variant("convnext, dropped paths", "convnext", train=True, drop_path_rate=0.5)


def unet(**changes: Any) -> nn.Module:
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(4, 8),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=2,
        attention_head_dim=4,
        **changes,
    )


def conditional_unet(**changes: Any) -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=4,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(4, 8),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=2,
        attention_head_dim=2,
        cross_attention_dim=6,
        **changes,
    )


def noisy(size: int) -> dict[str, Any]:
    return {
        "sample": torch.randn(N, 1, size, size, dtype=torch.float64),
        "timestep": torch.tensor([1, 20, 300]),
    }


def guided() -> dict[str, Any]:
    return noisy(4) | {"encoder_hidden_states": torch.randn(N, 2, 6, dtype=torch.float64)}


REAL["unet"] = Real("diffusers", unet, lambda: noisy(8), of_noise, nn.MSELoss, "sample")
REAL["conditional unet"] = Real(
    "diffusers", conditional_unet, guided, of_noise, nn.MSELoss, "sample"
)
variant("unet, dropout", "unet", train=True, dropout=0.2)
variant("conditional unet, dropout", "conditional unet", train=True, dropout=0.2)


def by_hand(**changes: Any) -> nn.Module:
    """Attention from matrix products and a softmax."""
    from diffusers.models.attention_processor import AttnProcessor

    model = REAL["conditional unet"].make(**changes)
    model.set_attn_processor(AttnProcessor())
    return model


REAL["conditional unet, eager"] = dataclasses.replace(REAL["conditional unet"], make=by_hand)


def adapted(name: str, base: str, kind: str = "SEQ_CLS", **options: Any) -> None:
    """LoRA adapters in a model of the table: they alone require grad."""

    def make(**changes: Any) -> nn.Module:
        import peft

        return peft.get_peft_model(
            REAL[base].make(),
            peft.LoraConfig(task_type=kind, r=2, lora_alpha=3, **options | changes),
        )

    REAL[name] = dataclasses.replace(REAL[base], package="peft", make=make)


adapted("lora in bert", "bert", target_modules=["query", "value"])
adapted(
    "lora in gpt2", "gpt2", "CAUSAL_LM", target_modules=["c_attn", "c_proj"], fan_in_fan_out=True
)
adapted(
    "dora in llama", "llama", "CAUSAL_LM", target_modules=["q_proj", "down_proj"], use_dora=True
)
for base in ("lora in bert", "lora in gpt2", "dora in llama"):
    variant(f"{base}, dropout", base, train=True, lora_dropout=0.2)


def of_timm(**changes: Any) -> nn.Module:
    import timm

    return timm.create_model("resnet10t", pretrained=False, num_classes=CLASSES, **changes)


REAL["timm"] = Real("timm", of_timm, lambda: {"x": images()["pixel_values"]}, output="")
