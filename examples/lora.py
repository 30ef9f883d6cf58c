"""How sure is a fine-tuned language model? A Laplace posterior of its adapters alone (LoRA).

A small GPT-2, made from its configuration, reads digits as sequences of 16 grey values and learns
upright ones; then adapters of rank 4 (peft) learn rotated ones from 200 samples, while all else is
frozen. The posterior is over the adapters and the new head: what requires grad. Its prior is chosen
on 200 other digits.

    python examples/lora.py [--out lora.png] [--quick]     (pip install transformers peft)
"""

import argparse
import time

import matplotlib.pyplot as plt
import torch
from peft import LoraConfig, get_peft_model
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2ForSequenceClassification

import nnj


def trained(model, x, y, epochs, rate):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate)
    for _ in range(epochs):
        for i in torch.randperm(len(x)).split(50):
            optimizer.zero_grad()
            cross_entropy(model(x[i]).logits, y[i]).backward()
            optimizer.step()
    return model.eval()


def nll(p, y):
    return -p.gather(1, y[:, None]).clamp(min=1e-12).log().mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="lora.png")
    parser.add_argument("--quick", action="store_true")
    options, start, data = parser.parse_args(), time.perf_counter(), load_digits()
    torch.manual_seed(0)
    order = torch.randperm(len(data.target))
    images = nn.functional.avg_pool2d(torch.tensor(data.images), 2).round().long()[order]
    y = torch.tensor(data.target)[order]
    upright, rotated = images.flatten(1), images.rot90(1, (1, 2)).flatten(1)
    none = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 17)
    config = GPT2Config(
        vocab_size=18, n_positions=16, n_embd=32, n_layer=2, n_head=4, num_labels=10, **none, **ids
    )
    base = GPT2ForSequenceClassification(config)
    trained(base, upright[:1000], y[:1000], 10 if options.quick else 40, 3e-3)
    adapters = LoraConfig(
        r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, task_type="SEQ_CLS"
    )
    model = get_peft_model(base, adapters)
    train, held_out, test = (
        slice(0, 200),
        slice(200, 400),
        slice(1000, 1200 if options.quick else 1600),
    )
    trained(model, rotated[train], y[train], 30 if options.quick else 40, 5e-3)
    forward = {
        "forward": lambda m, batch: m(batch[0] if isinstance(batch, tuple) else batch).logits
    }
    post = nnj.laplace(
        model,
        nn.CrossEntropyLoss(),
        [(rotated[train], y[train])],
        "kfac",
        target=lambda batch: batch[1],
        **forward,
    )
    post.tune_heldout([(rotated[held_out], y[held_out])], [10.0**k for k in range(-1, 5)])
    whole = sum(p.numel() for p in model.parameters())
    print(
        f"{len(post.mean)} of {whole} parameters have a posterior, prior precision {post.prior:g}"
    )
    with torch.no_grad():
        plain = model(rotated[test]).logits.softmax(1)
    found = {
        "fine-tuned": plain,
        "Laplace of the adapters": post.predict_proba(rotated[test], batch_size=100),
    }
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    axes.plot([0, 1], [0, 1], color="0.7", lw=1)
    for (name, p), color in zip(found.items(), ("#d1495b", "#00798c"), strict=True):
        confidence, guess = p.max(1)
        right = (guess == y[test]).float()
        bins = (confidence * 10).long().clamp(max=9)
        some = [bins == b for b in bins.unique()]
        points = torch.tensor([[confidence[b].mean(), right[b].mean(), b.sum()] for b in some]).T
        error = ((points[0] - points[1]).abs() * points[2]).sum() / len(right)
        print(f"{name:24} accuracy {right.mean():.3f}, NLL {nll(p, y[test]):.3f}, ECE {error:.3f}")
        axes.plot(points[0], points[1], color=color, label=f"{name} (ECE {error:.3f})")
        axes.scatter(points[0], points[1], 150 * points[2] / len(right), color=color)
    axes.set(xlabel="confidence", ylabel="accuracy", title="Is it right as often as it says?")
    axes.legend(frameon=False)
    figure.savefig(options.out, dpi=110)
    print(f"{options.out}, {time.perf_counter() - start:.0f} seconds")


if __name__ == "__main__":
    plt.switch_backend("Agg")  # needs no screen
    main()
