"""COMCAT's customisation on tiny U-Nets with random weights; Stable Diffusion's own on the meta device."""

from __future__ import annotations

import copy
import json
import re
import string
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
    SlicedAttnProcessor,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ucc_search.diffusion import (
    LowRankAttention,
    add_adapter,
    customize,
    customize_pipeline,
    load_adapter,
    noise_loss,
)
from ucc_search.errors import DataError, ModelError

ROOT = Path(__file__).resolve().parent.parent
TEXT = 12  # channels of the conditioning
TINY = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": TEXT,
    "attention_head_dim": (2, 4),  # diffusers' name for the number of heads
    "norm_num_groups": 4,
}
STABLE_DIFFUSION_1_4 = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": 8,
    "layers_per_block": 2,
}


def tiny_unet(**changes):
    torch.manual_seed(0)
    return UNet2DConditionModel(**{**TINY, **changes}).eval()


def randomize(adapter, seed=1):
    """Weights far from zero in all four factors, so that both terms count."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in adapter.parameters():
            weight.copy_(0.3 * torch.randn(weight.shape, generator=generator, dtype=torch.float64))
    return adapter


def inputs(dtype=torch.float32, seed=2, batch=2):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, 4, 8, 8, generator=generator).to(dtype)
    return latents, torch.tensor([7, 500][:batch]), torch.randn(batch, 5, TEXT, generator=generator).to(dtype)


def run(unet, dtype=torch.float32):
    with torch.no_grad():
        return unet(*inputs(dtype)).sample


def weights_of(unet):
    return {k: v.clone() for k, v in unet.state_dict().items() if ".processor." not in k}


# Sizes


def test_stable_diffusion_has_the_published_number_of_parameters():
    with torch.device("meta"):
        unet = UNet2DConditionModel(**STABLE_DIFFUSION_1_4)
    adapter = add_adapter(unet, rank=2)
    assert len(adapter.terms) == 32  # self- and cross-attention of 16 blocks
    assert sum(p.numel() for p in adapter.parameters()) == 1_591_296
    assert {term.u_q.out_features for term in adapter.terms.values()} == {16}  # 8 heads of rank 2
    assert {term.s_k.in_features for term in adapter.terms.values()} == {320, 640, 1280, 768}


# What one attention computes


def by_hand(attn, term, x, context, mask, scale):
    """Scores and outputs from products of whole matrices, head by head, as the paper writes them."""
    heads, a = attn.heads, scale**2
    d = attn.to_q.out_features // heads

    def of_head(layer, head):
        return layer.weight.T.unflatten(1, (heads, -1))[:, head]  # [in, d or r]

    def rows_of_head(layer, head):
        return layer.weight.T.unflatten(0, (heads, -1))[head]  # [d or r, out]

    out = attn.to_out[0].bias.expand(*x.shape[:2], -1).clone()
    for head in range(heads):
        w_qk = of_head(attn.to_q, head) @ of_head(attn.to_k, head).T
        u_qk = of_head(term.u_q, head) @ of_head(term.s_k, head).T
        scores = (x @ w_qk @ context.mT + a * (x @ u_qk @ context.mT)) / d**0.5
        if mask is not None:
            scores = scores + mask
        weights = scores.softmax(dim=-1)
        w_vo = of_head(attn.to_v, head) @ rows_of_head(attn.to_out[0], head)
        u_vo = of_head(term.u_v, head) @ rows_of_head(term.s_o, head)
        out = out + weights @ context @ w_vo + a * (weights @ context @ u_vo)
    return out


@pytest.mark.parametrize("scale", [1.0, 0.8])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("cross", [None, TEXT])
def test_attention_equals_the_formula(cross, masked, scale):
    torch.manual_seed(0)
    attn = Attention(query_dim=24, cross_attention_dim=cross, heads=3, dim_head=8).double()
    term = LowRankAttention(attn, 2, init="random", dtype=torch.float64)
    attn.set_processor(term)
    term.scale = scale
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    context = torch.randn(2, 5, TEXT, dtype=torch.float64) if cross else None
    keys = 5 if cross else 7
    mask = torch.where(torch.rand(2, 1, keys) < 0.4, -1e4, 0.0).double() if masked else None
    found = attn(x, context, attention_mask=mask)
    expected = by_hand(attn, term, x, x if context is None else context, mask, scale)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_without_its_term_attention_is_that_of_diffusers():
    """The mask of padded text as the U-Net hands it on, too."""
    unet = tiny_unet().double()
    latents, times, text = inputs(torch.float64)
    keep = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    with torch.no_grad():
        before = unet(latents, times, text, encoder_attention_mask=keep).sample
        add_adapter(unet, dtype=torch.float64)
        after = unet(latents, times, text, encoder_attention_mask=keep).sample
    torch.testing.assert_close(after, before, rtol=1e-10, atol=1e-10)


# An adapter on a U-Net


def test_a_zero_start_changes_nothing_and_a_random_one_does():
    dense = run(tiny_unet())
    zero, random = tiny_unet(), tiny_unet()
    add_adapter(zero)
    add_adapter(random, init="random")
    torch.testing.assert_close(run(zero), dense, rtol=1e-4, atol=1e-5)
    assert (run(random) - dense).abs().max() > 1e-3


def test_a_random_start_is_drawn_as_linear_layers_are():
    """Published; torch's bound is the inverse root of the inputs."""
    adapter = add_adapter(tiny_unet(), rank=4, init="random")
    for weight in adapter.parameters():
        bound = weight.shape[1] ** -0.5
        assert 0.7 * bound < weight.abs().max() <= bound


def test_scale_goes_from_the_base_model_to_the_adapter():
    unet = tiny_unet()
    dense, adapter = run(unet), randomize(add_adapter(unet))
    assert adapter.scale == 1.0
    full = run(unet)
    adapter.scale = 0.0
    torch.testing.assert_close(run(unet), dense, rtol=1e-4, atol=1e-5)
    adapter.scale = 0.8
    between = run(unet)
    assert not torch.allclose(between, full, atol=1e-3)
    assert not torch.allclose(between, dense, atol=1e-3)


def test_removing_gives_the_same_bits_back():
    unet = tiny_unet()
    unet.set_attn_processor(AttnProcessor())  # not the default: removing must not install that
    before, keys = run(unet), set(unet.state_dict())
    adapter = randomize(add_adapter(unet))
    assert len(unet.state_dict()) > len(keys)
    adapter.remove()
    assert torch.equal(run(unet), before)
    assert set(unet.state_dict()) == keys
    assert not adapter.attached
    add_adapter(unet)  # there is room for another


def test_only_transformer_blocks_are_adapted():
    """Blocks of other kinds hold attentions as well, with norms of their own."""
    unet = tiny_unet(down_block_types=("CrossAttnDownBlock2D", "AttnDownBlock2D"))
    others = {
        n: type(p) for n, p in unet.attn_processors.items() if not re.search(r"attn[12]\.processor$", n)
    }
    adapter = add_adapter(unet)
    assert others
    assert {n: type(unet.attn_processors[n]) for n in others} == others
    assert len(adapter.terms) + len(others) == len(unet.attn_processors)


def test_half_precision_beside_a_float32_adapter():
    unet = tiny_unet().to(torch.bfloat16)
    adapter = add_adapter(unet, init="random")
    assert run(unet, torch.bfloat16).dtype == torch.bfloat16
    assert unet.dtype == torch.bfloat16
    _, losses = customize(unet, *some_latents(), adapter=adapter, steps=2)
    assert all(p.dtype == torch.float32 and p.grad is not None for p in adapter.parameters())
    assert all(loss > 0 for loss in losses)


def test_the_u_net_takes_the_adapter_along():
    unet = tiny_unet()
    adapter = add_adapter(unet)
    unet.to(torch.float64)
    assert {p.dtype for p in adapter.parameters()} == {torch.float64}


# Files


def test_a_saved_adapter_gives_the_same_outputs_elsewhere(tmp_path):
    unet = tiny_unet()
    adapter = randomize(add_adapter(unet, rank=3))
    adapter.save(tmp_path / "dog.safetensors")
    fresh = tiny_unet()
    loaded = load_adapter(fresh, tmp_path / "dog.safetensors")
    assert torch.equal(run(fresh), run(unet))
    assert loaded.rank == 3
    adapter.remove()
    adapter.save(tmp_path / "again.safetensors")  # weights outlive the attachment
    again = load_file(tmp_path / "again.safetensors")
    assert all(torch.equal(v, again[k]) for k, v in loaded.state_dict().items())


def test_the_file_says_what_it_is_for(tmp_path):
    unet = tiny_unet()
    unet.register_to_config(_name_or_path="someone/tiny")
    adapter = add_adapter(unet)
    adapter.save(tmp_path / "dog.safetensors")
    with safe_open(tmp_path / "dog.safetensors", framework="pt") as file:
        metadata = file.metadata()
        names = set(file.keys())
    assert (metadata["rank"], metadata["base"]) == ("2", "someone/tiny")
    assert len(names) == 4 * len(adapter.terms)
    floats = 4 * sum(p.numel() for p in adapter.parameters())
    assert (tmp_path / "dog.safetensors").stat().st_size < floats + 20_000


def test_an_adapter_loads_in_the_precision_of_the_u_net(tmp_path):
    add_adapter(tiny_unet()).save(tmp_path / "dog.safetensors")
    loaded = load_adapter(tiny_unet().to(torch.bfloat16), tmp_path / "dog.safetensors")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}


# Merging


def merged(approximate, *, rank=2, scale=0.8, change=randomize, **changes):
    """Outputs with the adapter and after merging it, the merged U-Net, and what was lost."""
    unet = tiny_unet(**changes).double()
    adapter = change(add_adapter(unet, rank, dtype=torch.float64))
    adapter.scale = scale
    with_adapter = run(unet, torch.float64)
    lost = adapter.merge(approximate=approximate)
    assert not adapter.attached
    return with_adapter, run(unet, torch.float64), unet, lost


@pytest.mark.parametrize("processor", [AttnProcessor(), AttnProcessor2_0(), SlicedAttnProcessor(1)])
def test_exact_merging_changes_nothing_with_any_processor_of_diffusers(processor):
    before, after, unet, lost = merged(approximate=False)
    torch.testing.assert_close(after, before, rtol=1e-10, atol=1e-10)
    unet.set_attn_processor(processor)
    torch.testing.assert_close(run(unet, torch.float64), before, rtol=1e-10, atol=1e-10)
    assert all(share == (0.0, 0.0) for share in lost.values())
    attentions = [unet.get_submodule(name) for name in lost]
    assert all(
        a.inner_dim == a.to_q.out_features == a.heads * 10 for a in attentions
    )  # 8 channels and 2 ranks
    assert not any(".processor." in k for k in unet.state_dict())


def test_approximate_merging_keeps_shapes_and_loads_as_the_base_model(tmp_path):
    before, after, unet, lost = merged(approximate=True)
    unet.save_pretrained(tmp_path)
    fresh = UNet2DConditionModel.from_pretrained(tmp_path, torch_dtype=torch.float64, low_cpu_mem_usage=False)
    assert torch.equal(run(fresh, torch.float64), after)
    dense = run(tiny_unet().double(), torch.float64)
    # Nearer to the adapter than the base model is, though not equal.
    assert 0 < (after - before).norm() < 0.9 * (dense - before).norm()
    assert all(0 < share < 1 for of_attention in lost.values() for share in of_attention)


def products(attn):
    """W^Q W^Kᵀ and W^V W^O of every head, [H, in, in or out]."""
    q, k, v = (layer.weight.unflatten(0, (attn.heads, -1)) for layer in (attn.to_q, attn.to_k, attn.to_v))
    o = attn.to_out[0].weight.T.unflatten(0, (attn.heads, -1))
    return (q.mT @ k).detach(), (v.mT @ o).detach()


def test_the_reported_loss_is_that_of_the_weights():
    """And the truncation is the best there is: it equals that of the products themselves."""
    _, _, exact_unet, _ = merged(approximate=False)
    _, _, unet, lost = merged(approximate=True)
    base = tiny_unet().double()
    for name, share in lost.items():
        attn, wide, dense = (u.get_submodule(name) for u in (unet, exact_unet, base))
        d = dense.to_q.out_features // dense.heads
        for i, (near, full, old) in enumerate(
            zip(products(attn), products(wide), products(dense), strict=True)
        ):
            if i == 0:  # the exact merge rescales queries for the new width
                full = full * (d / (d + 2)) ** 0.5
            tail = torch.linalg.svdvals(full)[:, d:].norm()
            assert float((near - full).norm()) == pytest.approx(float(tail), rel=1e-6)
            assert share[i] == pytest.approx(float(tail / (full - old).norm()), rel=1e-6)


def test_a_term_within_the_ranks_of_the_head_merges_without_loss():
    """As where text has fewer channels than a head: what is approximate in general is exact there."""
    narrow = {"cross_attention_dim": 6, "block_out_channels": (32, 32), "attention_head_dim": (2, 4)}

    def cross_only(adapter):
        randomize(adapter)
        with torch.no_grad():
            for name, term in adapter.terms.items():
                if name.endswith("attn1"):
                    nn.init.zeros_(term.s_k.weight)
                    nn.init.zeros_(term.s_o.weight)
        return adapter

    unet = tiny_unet(**narrow).double()
    adapter = cross_only(add_adapter(unet, dtype=torch.float64))
    latents, times, text = inputs(torch.float64)
    with torch.no_grad():
        before = unet(latents, times, text[..., :6]).sample
        lost = adapter.merge(approximate=True)
        after = unet(latents, times, text[..., :6]).sample
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)
    assert max(max(share) for share in lost.values()) < 1e-9


class Wrapped(nn.Linear):
    """As LoRA and quantised layers are: called like a linear layer, whose weight is not the whole truth."""


def test_merging_into_what_is_not_a_plain_linear_layer_is_refused():
    unet = tiny_unet()
    adapter = randomize(add_adapter(unet))
    last = unet.get_submodule(list(adapter.terms)[-1])
    last.to_v = Wrapped(last.to_v.in_features, last.to_v.out_features, bias=False)
    before = weights_of(unet)
    with pytest.raises(ModelError, match=r"attn2\.to_v is a \w+\.Wrapped, .*unload LoRA weights"):
        adapter.merge()
    assert all(torch.equal(v, before[k]) for k, v in weights_of(unet).items())  # none was merged
    assert adapter.attached
    last.to_v = nn.Linear(last.to_v.in_features, last.to_v.out_features)
    with pytest.raises(ModelError, match=r"attn2\.to_v has a bias"):
        adapter.merge()


def test_an_adapter_no_longer_in_use_is_refused():
    unet = tiny_unet()
    adapter = add_adapter(unet)
    unet.get_submodule(next(iter(adapter.terms))).set_processor(AttnProcessor2_0())
    for act in (adapter.remove, adapter.merge):
        with pytest.raises(ModelError, match=r"cannot \w+ an adapter that is not in use"):
            act()


# Training


def some_latents(count=4):
    generator = torch.Generator().manual_seed(3)
    # One pattern with small variations: what a concept is to a U-Net.
    pattern = torch.randn(1, 4, 8, 8, generator=generator)
    latents = pattern + 0.1 * torch.randn(count, 4, 8, 8, generator=generator)
    return latents, torch.randn(5, TEXT, generator=generator), DDPMScheduler(num_train_timesteps=100)


@pytest.mark.parametrize("init", ["zero", "random"])
def test_the_loss_falls_and_nothing_else_moves(init):
    unet, (latents, text, scheduler) = tiny_unet(), some_latents()
    before, question = weights_of(unet), (latents.repeat(16, 1, 1, 1), text.expand(64, -1, -1), scheduler)

    def held():
        with torch.no_grad():
            return float(noise_loss(unet, *question, generator=torch.Generator().manual_seed(9)))

    start, flags = held(), {n: p.requires_grad for n, p in unet.named_parameters()}
    seen = []
    adapter, losses = customize(
        unet,
        latents,
        text,
        scheduler,
        init=init,
        steps=40,
        batch_size=4,
        lr=1e-2,
        generator=torch.Generator().manual_seed(0),
        on_step=lambda step, loss: seen.append((step, loss)),
    )
    assert held() < 0.97 * start
    assert seen == list(enumerate(losses, start=1))
    after = weights_of(unet)
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert all(p.grad is None for n, p in unet.named_parameters() if ".processor." not in n)
    assert flags.items() <= {n: p.requires_grad for n, p in unet.named_parameters()}.items()
    assert adapter.attached
    assert adapter.scale == 1.0


def test_every_factor_is_trained():
    adapter, _ = customize(tiny_unet(), *some_latents(), steps=2)
    assert all(bool(p.any()) and p.grad is not None for p in adapter.parameters())


def test_the_same_generator_trains_the_same_adapter():
    runs = []
    for _ in range(2):
        unet = tiny_unet()  # seeds torch, which draws the start
        adapter, _ = customize(unet, *some_latents(), steps=3, generator=torch.Generator().manual_seed(5))
        runs.append(adapter.state_dict())
    assert all(torch.equal(v, runs[1][k]) for k, v in runs[0].items())


def test_the_recipe_is_the_published_one(monkeypatch):
    rates, seen, clipped = [], {}, []
    step, clip = torch.optim.AdamW.step, nn.utils.clip_grad_norm_

    def watched_step(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        seen.update({k: self.defaults[k] for k in ("betas", "weight_decay")})
        return step(self, *args, **kwargs)

    def watched_clip(parameters, max_norm):
        clipped.append(max_norm)
        return clip(parameters, max_norm)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched_step)
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", watched_clip)
    customize(tiny_unet(), *some_latents(), steps=1, weight_decay=0.5, max_grad_norm=3.0)
    assert (seen["weight_decay"], clipped) == (0.5, [3.0])
    rates.clear(), clipped.clear()
    customize(tiny_unet(), *some_latents(), steps=4)
    assert rates == pytest.approx([2.5e-3, 2.5e-3 * 0.75, 2.5e-3 * 0.5, 2.5e-3 * 0.25])
    assert seen == {"betas": (0.9, 0.999), "weight_decay": 1e-2}
    assert clipped == [1.0] * 4


def test_every_latent_comes_with_its_own_conditioning_before_any_comes_again(monkeypatch):
    drawn = []

    def watched(unet, latents, conditioning, scheduler, *, generator):
        drawn.append([int(latents[i].unique()) for i in range(len(latents))])
        assert [int(c.unique()) for c in conditioning] == drawn[-1]
        return noise_loss(unet, latents, conditioning, scheduler, generator=generator)

    monkeypatch.setattr("ucc_search.diffusion.training.noise_loss", watched)
    latents = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 4, 8, 8)
    texts = torch.arange(5.0).view(5, 1, 1).expand(5, 3, TEXT)
    customize(tiny_unet(), latents, texts, DDPMScheduler(), steps=5, batch_size=2)
    flat = [i for batch in drawn for i in batch]
    assert sorted(flat[:5]) == sorted(flat[5:]) == list(range(5))
    assert flat[:5] != flat[5:]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_loss_is_that_of_what_the_scheduler_says(kind):
    unet = tiny_unet()
    latents, _, text = inputs()
    scheduler = DDPMScheduler(prediction_type=kind)
    with torch.no_grad():
        found = noise_loss(unet, latents, text, scheduler, generator=torch.Generator().manual_seed(0))
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(latents.shape, generator=generator)
        times = torch.randint(1000, (2,), generator=generator)
        signal = scheduler.alphas_cumprod[times].sqrt()[:, None, None, None]
        blur = (1 - scheduler.alphas_cumprod[times]).sqrt()[:, None, None, None]
        target = noise if kind == "epsilon" else signal * noise - blur * latents
        predicted = unet(signal * latents + blur * noise, times, text).sample
    assert float(found) == pytest.approx(float((predicted - target).square().mean()), rel=1e-5)


def test_a_failed_training_leaves_the_u_net_as_it_was():
    unet = tiny_unet()
    latents, text, scheduler = some_latents()
    with pytest.raises(ModelError, match=r"step 1: the loss is nan; lower lr"):
        customize(unet, latents * float("nan"), text, scheduler, steps=2)
    assert not any(isinstance(m, LowRankAttention) for m in unet.modules())
    assert all(p.requires_grad for p in unet.parameters())


# A whole pipeline, with random weights


def tiny_pipeline(folder):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    letters = [*string.ascii_lowercase, "*"]
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    vocabulary.write_text(json.dumps({w: i for i, w in enumerate(words)}), encoding="utf-8")
    merges.write_text("#version: 0.2\n", encoding="utf-8")
    tokenizer = CLIPTokenizer(str(vocabulary), str(merges), model_max_length=16)
    text = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=TEXT,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=tiny_unet(),
        scheduler=DDPMScheduler(num_train_timesteps=100),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def test_a_pipeline_is_customised_and_draws(tmp_path):
    pytest.importorskip("transformers")
    from PIL import Image

    pipe = tiny_pipeline(tmp_path)
    parts = {"vae": pipe.vae, "text": pipe.text_encoder}
    before = {name: weights_of(m) for name, m in parts.items()}
    images = [Image.new("L", (24, 40), color=shade) for shade in (10, 200)]  # neither RGB nor square
    adapter, losses = customize_pipeline(
        pipe, images, "a photo of V* dog", resolution=16, steps=3, rank=1, generator=torch.manual_seed(0)
    )
    assert len(losses) == 3
    assert all(torch.equal(v, before[n][k]) for n, m in parts.items() for k, v in weights_of(m).items())
    assert all(p.grad is None for m in parts.values() for p in m.parameters())
    pipe.set_progress_bar_config(disable=True)
    drawn = []
    for adapter.scale in (0.0, 0.8):
        drawn.append(
            pipe(
                "a photo of V* dog",
                num_inference_steps=2,
                output_type="np",
                generator=torch.manual_seed(1),
            ).images
        )
    assert drawn[0].shape == (1, 16, 16, 3)
    assert abs(drawn[0] - drawn[1]).max() > 1e-5


def test_a_pipeline_encodes_as_the_one_of_diffusers(tmp_path):
    """The latents are scaled, the scheduler is the pipeline's noise levels, the text its encoder's states."""
    pytest.importorskip("transformers")
    from PIL import Image

    pipe, seen = tiny_pipeline(tmp_path), {}
    pipe.unet.register_forward_pre_hook(
        lambda module, args: seen.update(zip(("noisy", "times", "text"), args, strict=True))
    )
    with torch.no_grad():
        pipe.vae.quant_conv.weight.zero_()
        # Latents of one, without spread.
        pipe.vae.quant_conv.bias.copy_(torch.tensor([1.0] * 4 + [-30.0] * 4))
    pipe.scheduler = DDPMScheduler(num_train_timesteps=1, beta_start=1e-8)  # hardly any noise
    pipe.vae.encoder.register_forward_pre_hook(lambda module, args: seen.update(pixels=args[0]))
    image = Image.new("L", (64, 32))  # twice as wide as high: black, white, white, black
    image.paste(255, (16, 0, 48, 32))
    customize_pipeline(pipe, [image], "dog", resolution=16, steps=1)
    assert (seen["pixels"][..., 1:-1] > 0.95).all()  # the centre, unstretched; its rim is interpolated
    torch.testing.assert_close(
        seen["noisy"], torch.full((1, 4, 8, 8), pipe.vae.config.scaling_factor), atol=1e-2, rtol=0
    )
    expected, _ = pipe.encode_prompt("dog", "cpu", 1, False)
    torch.testing.assert_close(seen["text"], expected)


# Refusals


def other_processor():
    unet = tiny_unet()
    for attn in unet.modules():
        if isinstance(attn, Attention) and attn.is_cross_attention:
            attn.set_processor(IPAdapterAttnProcessor2_0(attn.query_dim, TEXT))
    return unet


def adapted():
    unet = tiny_unet()
    add_adapter(unet)
    return unet


def normed():
    unet = tiny_unet()
    unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.norm_q = nn.LayerNorm(8)
    return unet


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: UNet2DModel(**TINY_UNCONDITIONAL), "UNet2DModel has no transformer blocks"),
        (lambda: nn.Linear(2, 2), "Linear has no transformer blocks"),
        (other_processor, "attn2 has the processor IPAdapterAttnProcessor2_0.*set_default_attn_processor"),
        (adapted, r"already has an adapter; remove\(\) or merge\(\)"),
        (normed, "attn2 has norm_q, which adapters do not support"),
    ],
)
def test_what_cannot_be_adapted_is_refused(make, said):
    with pytest.raises(ModelError, match=said):
        add_adapter(make())


TINY_UNCONDITIONAL = {
    "block_out_channels": (8,),
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "norm_num_groups": 4,
}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 0}, "rank is 0, expected a whole number of at least 1"),
        ({"rank": 2.0}, "rank is 2.0"),
        ({"init": "zeros"}, "init is 'zeros', expected one of zero, random; did you mean 'zero'"),
    ],
)
def test_bad_options_are_refused(options, said):
    with pytest.raises(ModelError, match=said):
        add_adapter(tiny_unet(), **options)


def test_files_that_do_not_fit_are_refused(tmp_path):
    unet, path = tiny_unet(), tmp_path / "dog.safetensors"
    with pytest.raises(ModelError, match="not readable"):
        load_adapter(unet, path)
    path.write_bytes(b"x" * 100)
    with pytest.raises(ModelError, match="not readable as safetensors"):
        load_adapter(unet, path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ModelError, match="not an adapter of ucc_search"):
        load_adapter(unet, path)
    add_adapter(tiny_unet(cross_attention_dim=TEXT + 1)).save(path)
    with pytest.raises(ModelError, match="whose attentions are not those of this"):
        load_adapter(unet, path)
    adapter = add_adapter(tiny_unet())
    adapter.save(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    weights = {k: v.detach().contiguous() for k, v in adapter.state_dict().items()}
    for changes, said in (({"rank": "3"}, "not those of rank 3"), ({"adapter_format": "9"}, "format 9")):
        save_file(weights, path, metadata={**metadata, **changes})
        with pytest.raises(ModelError, match=said):
            load_adapter(unet, path)
    assert not any(isinstance(m, LowRankAttention) for m in unet.modules())


def test_bad_training_inputs_are_refused():
    unet, (latents, text, scheduler) = tiny_unet(), some_latents()
    wrong = [
        ((latents[:, :3], text, scheduler), {}, DataError, r"latents are \[4, 3, 8, 8\], expected \[N, 4"),
        ((latents[:0], text, scheduler), {}, DataError, "with N of at least 1"),
        ((latents, text[:, :5], scheduler), {}, DataError, r"conditioning is \[1, 5, 5\], expected"),
        ((latents, text.expand(3, -1, -1), scheduler), {}, DataError, r"conditioning is \[3, 5, 12\]"),
        (
            (latents, text, DDPMScheduler(prediction_type="sample")),
            {},
            ModelError,
            "prediction_type is 'sample'",
        ),
        ((latents, text, scheduler), {"steps": 0}, DataError, "steps is 0, expected at least 1"),
        ((latents, text, scheduler), {"adapter": add_adapter(tiny_unet())}, ModelError, "not in use in this"),
    ]
    for args, options, kind, said in wrong:
        with pytest.raises(kind, match=said):
            customize(unet, *args, **{"steps": 1, **options})
        assert not any(isinstance(m, LowRankAttention) for m in unet.modules())
    adapter = add_adapter(unet, dtype=torch.bfloat16)
    with pytest.raises(ModelError, match=r"in torch.bfloat16, whose steps are too coarse"):
        customize(unet, latents, text, scheduler, adapter=adapter)
    adapter.scale = 0.8
    with pytest.raises(ModelError, match=r"scale is 0.8, expected 1 while training"):
        customize(unet, latents, text, scheduler, adapter=adapter)


def test_added_conditions_are_refused_by_training_alone():
    unet = tiny_unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=TEXT + 24,
        transformer_layers_per_block=2,
        use_linear_projection=True,
    )
    with pytest.raises(ModelError, match="addition_embed_type is 'text_time', as in Stable Diffusion XL"):
        customize(unet, *some_latents(), steps=1)
    dense, added = copy.deepcopy(unet), {"text_embeds": torch.ones(2, TEXT), "time_ids": torch.ones(2, 6)}
    add_adapter(unet)
    with torch.no_grad():
        outputs = [u(*inputs(), added_cond_kwargs=added).sample for u in (unet, dense)]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


def test_other_pipelines_are_refused():
    with pytest.raises(ModelError, match="has no vae, unet, encode_prompt, image_processor"):
        customize_pipeline(nn.Linear(2, 2), [], "dog")


# The extra


def test_importing_the_package_does_not_import_diffusers():
    code = "import sys, ucc_search; sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_without_diffusers_the_extra_is_named():
    code = "import sys; sys.modules['diffusers'] = None; import ucc_search.diffusion"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert found.stderr.strip().endswith(
        "ImportError: ucc_search.diffusion needs diffusers: pip install 'ucc-search[diffusion]'"
    )


def test_diffusers_has_one_door():
    users = {
        p.relative_to(ROOT / "ucc_search").parts[0]
        for p in (ROOT / "ucc_search").rglob("*.py")
        if re.search(r"^\s*(import|from) diffusers", p.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert users == {"diffusion"}


def test_the_snippets_of_the_guide_run(tmp_path, monkeypatch):
    """All but the one that needs Stable Diffusion's weights; its imports must exist all the same."""
    guide = (ROOT / "docs" / "diffusion.md").read_text(encoding="utf-8")
    pretrained, tiny = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(tiny, names)  # the guide's own code
    assert len(names["losses"]) == 10
    assert names["adapter"].rank == 4
    compile(pretrained, "docs/diffusion.md", "exec")
    pytest.importorskip("transformers")
    exec("\n".join(re.findall(r"^(?:import|from) .*", pretrained, re.MULTILINE)), names)
