"""Tests of dreamerv2.py: `python -m pytest`, and `python -m pytest -m slow` for long ones.

    numbers       equations against hand-computed numbers and slow, obvious twins
    parity        .ci/official_mini.npz: weights, inputs, outputs and gradients computed with
                  the authors' TensorFlow code (danijar/dreamerv2 07d906e, version 2.2.0).
                  PARITY_FILE=path runs another file of the same keys; -s prints the errors.
    flow          which loss moves which module
    ablations, replay, environments, running, crash safety, pictures, the file itself

At the end, what measures: `python test_dreamerv2.py --benchmark` and `--scores FOLDER`.
"""
import argparse
import ast
import collections
import contextlib
import copy
import dataclasses
import doctest
import gc
import inspect
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import tokenize
import time
import types
import zlib
from pathlib import Path
from unittest import mock
from xml.etree import ElementTree

if "pytest" in sys.modules:  # before torch: threads of tests would disturb each other
    os.environ["OMP_NUM_THREADS"] = "1"

import gymnasium
import numpy as np
import torch
import torch.nn.functional as F
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import dreamerv2 as d

try:
    import pytest
except ImportError:  # measuring needs no pytest
    pytest = mock.MagicMock()

HERE = Path(__file__).parent
SOURCE = (HERE / "dreamerv2.py").read_text(encoding="utf-8")
TREE = ast.parse(SOURCE)
PRESETS = {name: d.read_flags(flags.split()) for name, flags in d.PRESETS.items()}
DEBUG = PRESETS["debug"]
SIZES = {name: DEBUG[name] for name in """num_latents num_classes deter_size hidden_size
    cnn_depth mlp_layers mlp_units horizon""".split()}
HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory, monkeypatch):
    """Pictures and runs without a --logdir come into the current folder: not into this one."""
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))


@pytest.fixture
def draws(monkeypatch):
    """A list of class indices that straight_through_sample returns in turn. When it is empty,
    the likeliest class is returned: no noise."""
    queue = []

    def sample(logits):
        index, probs = queue.pop(0) if queue else logits.argmax(-1), logits.softmax(-1)
        assert index.shape == logits.shape[:-1]
        return F.one_hot(index.long(), logits.shape[-1]).float() + probs - probs.detach()

    monkeypatch.setattr(d, "straight_through_sample", sample)
    return queue


def watch(monkeypatch, name, owner=None):
    """Lets d.name, or owner.name, go on as before; keeps the last call's named inputs, output."""
    call, function = types.SimpleNamespace(), getattr(owner or d, name)

    def record(*args, **kwargs):
        call.inputs = inspect.signature(function).bind(*args, **kwargs).arguments
        call.output = function(*args, **kwargs)
        return call.output

    monkeypatch.setattr(owner or d, name, record)
    return call


def tiny_agent(num_actions=3, device="cpu", continuous=False, **settings):
    torch.manual_seed(0)
    return d.Agent(d.Config(**{**DEBUG, **settings}), num_actions, 1, device, continuous)


def random_batch(T=6, B=3, A=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return dict(
        image=torch.randint(0, 256, (T, B, 1, 64, 64), generator=g).byte(),
        action=F.one_hot(torch.randint(A, (T, B), generator=g), A).float(),
        reward=torch.randn(T, B, generator=g), is_first=torch.rand(T, B, generator=g) < 0.2,
        is_terminal=torch.rand(T, B, generator=g) < 0.2)


# ------------------------------------------------------------------------- doctests

@pytest.mark.parametrize("example", [
    t for t in doctest.DocTestFinder().find(d) if t.examples], ids=lambda t: t.name)
def test_doctest(example):
    assert doctest.DocTestRunner().run(example).failed == 0


# ----------------------------------------------------------------- numbers and twins

def test_samples_follow_the_softmax_and_are_one_hot():
    torch.manual_seed(0)
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0])
    sample = d.straight_through_sample(logits.expand(40_000, 4))
    assert set(sample.unique().tolist()) == {0.0, 1.0}
    assert (sample.sum(-1) == 1).all()
    assert_close(sample.mean(0), logits.softmax(-1), atol=0.01, rtol=0)


def test_is_first_equals_a_fresh_start(draws):
    torch.manual_seed(0)
    rssm = d.RSSM(3, 5, 3, 4, 8, 9)
    old = d.State(torch.randn(6, 8), torch.rand(6, 3, 4), torch.randn(6, 3, 4))
    action, embed, yes = torch.randn(6, 3), torch.randn(6, 5), torch.ones(6).bool()
    reset = rssm.obs_step(old, action, embed, yes)
    fresh = rssm.obs_step(rssm.initial(6), torch.zeros(6, 3), embed, ~yes)
    assert all(torch.equal(a, b) for a, b in zip(reset, fresh))


def test_actor_loss_by_hand():
    """Two states, ρ = ½, η = 0.1; every term written out, and what gets a gradient."""
    policy = d.OneHot(torch.tensor([[0.0, 0.0], [0.0, math.log(3)]]))  # ½ ½ and ¼ ¾
    log_prob = policy.log_prob(torch.tensor([[1.0, 0.0], [0.0, 1.0]])).requires_grad_()
    V = torch.tensor([2.0, 1.0]).requires_grad_()
    v = torch.tensor([1.0, 3.0]).requires_grad_()
    w = torch.tensor([1.0, 0.5])
    entropy = [math.log(2), 0.25 * math.log(4) + 0.75 * math.log(4 / 3)]
    first = 0.5 * math.log(0.5) * (2 - 1) + 0.5 * 2 + 0.1 * entropy[0]
    second = 0.5 * math.log(0.75) * (1 - 3) + 0.5 * 1 + 0.1 * entropy[1]
    loss, metrics = d.actor_loss(
        log_prob, policy.entropy(), V, v, w, entropy_scale=0.1, reinforce_mix=0.5)
    assert loss.item() == pytest.approx(-(1 * first + 0.5 * second) / 2, rel=1e-6)
    assert metrics["actor_entropy"].item() == pytest.approx(sum(entropy) / 2, rel=1e-6)
    loss.backward()
    assert log_prob.grad.tolist() == [-1 * 0.5 * (2 - 1) / 2, -0.5 * 0.5 * (1 - 3) / 2]
    assert V.grad.tolist() == [-1 * 0.5 / 2, -0.5 * 0.5 / 2]  # by (1 - ρ)·V alone
    assert v.grad is None


def test_losses_are_means(draws):
    """D7: a mean over T·B (or H·N) of the paper's summands, so twice the data, same loss."""
    agent, batch = tiny_agent(), random_batch()
    twice = {k: torch.cat([v, v], 1) for k, v in batch.items()}
    once, doubled = (agent.world_model.loss(**data, **agent.model_loss_args)[2]
                     for data in (batch, twice))
    assert once["model_loss"].item() == pytest.approx(doubled["model_loss"].item(), rel=1e-5)
    assert once["image_loss"].item() == pytest.approx(  # of 4096 pixels
        4096 * (0.5 * once["image_mse"].item() + HALF_LOG_2PI), rel=1e-5)
    v, V = torch.randn(3, 4).requires_grad_(), torch.randn(3, 4).requires_grad_()
    weights = torch.rand(3, 4)
    loss, _ = d.critic_loss(v, V, weights)
    loss.backward()
    assert loss.item() == pytest.approx((weights * (v - V) ** 2 / 2).sum().item() / 12)
    assert V.grad is None and v.grad is not None  # the target is a constant


def test_slow_critic():
    """D12 and the schedule: born equal, copied after updates 0, 3, 6, ... and else kept."""
    agent, batch = tiny_agent(slow_every_updates=3, critic_lr=1e-2), random_batch()
    copied = []
    for _ in range(8):
        copied.append(all(torch.equal(a, b) for a, b in zip(
            agent.critic.parameters(), agent.slow_critic.parameters())))
        agent.train_step(batch)
    assert copied == [True] + [True, False, False, True, False, False, True]
    assert any("slow_critic" in k for k in agent.state_dict())  # and it is saved


# --------------------------------------------------------------------------- parity

PARITY_FILE = os.environ.get("PARITY_FILE", HERE / ".ci" / "official_mini.npz")
PARITY = dict(np.load(PARITY_FILE)) if Path(PARITY_FILE).exists() else {}
SIZE = {k[5:]: int(v) for k, v in PARITY.items() if k[:5] == "meta/" and v.dtype.kind == "i"}
B, T, S, K, D_, Q, U, C, A, H = (SIZE.get(k, 1) for k in """batch length stoch discrete deter
    hidden units cnn_depth actions horizon""".split())
RELEASED = PRESETS["released"] | dict(num_latents=S, num_classes=K, deter_size=D_, hidden_size=Q,
                                      cnn_depth=C, mlp_layers=4, mlp_units=U, horizon=H)


def get(key):
    return torch.from_numpy(np.array(PARITY[key]))


def close(name, ours, reference=None, tolerance=1e-5):
    """Error relative to the largest reference value; by default that is PARITY[name]."""
    reference = torch.as_tensor(get(name) if reference is None else reference).double()
    ours = torch.as_tensor(ours).detach().double()
    assert ours.shape == reference.shape, (name, ours.shape, reference.shape)
    error, largest = (ours - reference).abs().max(), reference.abs().max()
    print(f"parity {name}: {error / largest:.1e}")
    assert error <= tolerance * largest, (name, float(error), float(largest))


def time_first(x):
    """(B, T, ...), as theirs -> (T, B, ...), as ours; or back."""
    return x.transpose(0, 1)


def n_major(x):
    """(H, B*T, ...) with n = b*T + t, as theirs -> n = t*B + b, as ours."""
    return x.unflatten(1, (B, T)).transpose(1, 2).flatten(1, 2)


def their_image(key):
    """Channels last -> channels first."""
    return get(key).movedim(-1, -3)


def their_state(prefix):
    return d.State(*(get(prefix + name) for name in ("deter", "stoch", "logit")))


def their_batch(prefix):
    batch = {k: get(prefix + k) for k in ("action", "reward", "is_first", "is_terminal")}
    batch["image"] = their_image(prefix + "image")
    return {k: time_first(v) for k, v in batch.items()}


def close_each(prefix, tolerance=1e-5, **ours):
    for name, value in ours.items():
        close(prefix + name, value, tolerance=tolerance)


def close_state(prefix, ours):
    close_each(prefix, **dict(zip(("deter", "stoch", "logit"), ours)))


# Names of weights: theirs -> ours.
RSSM_NAMES = {"img_in": "img_in", "gru/dense": "cell.linear", "gru/norm": "cell.norm",
              "img_out_0": "prior_in", "img_dist_0": "prior_out", "obs_out": "post_in",
              "obs_dist": "post_out"}
ENCODER_NAMES = {f"conv{i}": f"net.{2 * i}" for i in range(4)}
DECODER_NAMES = {"convin": "linear", **ENCODER_NAMES}
MLP_NAMES = {**{f"dense{i}": f"{2 * i}" for i in range(4)}, "out": "8"}
ENDS = {"kernel": "weight", "bias": "bias", "gamma": "weight", "beta": "bias"}
MODEL_NAMES = {f"{theirs}/{k}": f"{ours}.{v}" for theirs, ours, names in (
    ("encoder", "encoder", ENCODER_NAMES), ("rssm", "rssm", RSSM_NAMES),
    ("decoder", "decoder", DECODER_NAMES), ("reward", "reward_head", MLP_NAMES),
    ("discount", "discount_head", MLP_NAMES)) for k, v in names.items()}
AGENT_NAMES = {k: f"world_model.{v}" for k, v in MODEL_NAMES.items()} | {
    f"{theirs}/{k}": f"{ours}.{v}" for k, v in MLP_NAMES.items() for theirs, ours in (
        ("actor", "actor"), ("critic", "critic"), ("target_critic", "slow_critic"))}


def our_weights(prefix, names):
    """Authors' arrays below `prefix`, with our names, layouts and orders."""
    out = {}
    for key in PARITY:
        theirs, _, end = key.removeprefix(prefix + "/").rpartition("/")
        if not key.startswith(prefix + "/") or theirs not in names:
            continue
        x = get(key)
        x = x.permute(3, 2, 0, 1) if x.ndim == 4 else x.t()
        if theirs == "rssm/obs_out" and end == "kernel":
            # The embedding is an image, flattened as H, W, C; ours as C, H, W.
            h, e = x[:, :D_], x[:, D_:].unflatten(1, (2, 2, -1))
            x = torch.cat([h, e.movedim(-1, 1).flatten(1)], 1)
        out[f"{names[theirs]}.{ENDS[end]}"] = x.contiguous()
    assert out, f"nothing below {prefix}"
    return out


def with_weights(module, prefix, names):
    module.load_state_dict(our_weights(prefix, names))
    return module


def close_weights(prefix, names, ours, tolerance=1e-5):
    for name, reference in our_weights(prefix, names).items():
        close(f"{prefix} {name}", ours[name], reference, tolerance)


class Recorder:
    """Stands in for an Optimizer: keeps the loss and its gradients, moves nothing."""
    def __init__(self, module):
        self.weights = {k: p for k, p in module.named_parameters() if p.requires_grad}

    def minimize(self, loss):
        self.loss = loss.detach()
        grads = torch.autograd.grad(
            loss, list(self.weights.values()), allow_unused=True, retain_graph=True)
        self.grads = {k: g for k, g in zip(self.weights, grads) if g is not None}
        return torch.stack([g.norm() for g in self.grads.values()]).norm()


@pytest.mark.parametrize("case", "lam095 lam0 lam1 lam05 scalar_pcont no_bootstrap".split())
def test_parity_lambda_return(case):
    reward, value, pcont, bootstrap = (
        get(f"lambda_return/{k}") for k in ("reward", "value", "pcont", "bootstrap"))
    if case == "scalar_pcont":
        pcont = get("lambda_return/scalar_pcont/pcont").expand_as(reward)
    if case == "no_bootstrap":
        bootstrap = torch.zeros_like(bootstrap)
    ours = d.lambda_return(reward, torch.cat([value, bootstrap[None]]), pcont,
                           float(PARITY[f"lambda_return/{case}/lambda"]))
    close(f"lambda_return/{case}/returns", ours)


def test_parity_gru():
    names = {"dense": "linear", "norm": "norm"}
    cell = with_weights(d.LayerNormGRUCell(Q, D_), "gru/w", names)
    assert cell.norm.eps == float(PARITY["gru/ln_epsilon"])
    x, h = get("gru/input").requires_grad_(), get("gru/state").requires_grad_()
    out, recorder = cell(x, h), Recorder(cell)
    close("gru/output", out)
    recorder.minimize((out * get("gru/probe")).sum())
    close_weights("gru/grad", names, recorder.grads)
    (out * get("gru/probe")).sum().backward()
    close_each("gru/grad/", input=x.grad, state=h.grad)


@pytest.mark.parametrize("case", ["draw_state", "draw_nostate", "mode_state"])
def test_parity_rssm_observe(case, draws):
    rssm = with_weights(d.RSSM(A, 13, S, K, D_, Q), "rssm/w", RSSM_NAMES)
    embed, action, is_first, post = (time_first(get(f"rssm_observe/in/{k}")) for k in (
        "embed", "action", "is_first", "draw_post"))
    draws.extend(post if case.startswith("draw") else [])
    start = None if case == "draw_nostate" else their_state("rssm_observe/in/state_")
    posterior, prior = rssm.observe(embed, action, is_first, start)
    assert not draws
    at = f"rssm_observe/{case}/"
    close_state(at + "post_", map(time_first, posterior))
    close_each(at, prior_logit=time_first(prior), feat=time_first(posterior.feature))


@pytest.mark.parametrize("data", ["hi", "lo"])
@pytest.mark.parametrize("case", ["b08_f0", "b08_f1", "b05_f0", "b08_f1_noavg", "b08_f0_forward"])
def test_parity_kl(data, case):
    post, prior = (get(f"kl/{data}/{k}_logit").requires_grad_() for k in ("post", "prior"))
    at = f"kl/{data}/{case}/"
    alpha, free = float(PARITY[at + "balance"]), float(PARITY[at + "free"])
    if alpha == 0.5:  # a branch of its own, the plain KL: --no-kl-balancing here
        alpha = None
    if case.endswith("forward"):  # their flag turns KL and balance around
        loss, kl = d.balanced_kl(prior, post, 1 - alpha)
    else:
        loss, kl = d.balanced_kl(post, prior, alpha)
    loss = (loss.clamp(min=free).mean() if case.endswith("noavg")
            else loss.mean().clamp(min=free))
    loss.backward()
    close_each(at, value=kl, loss=loss, grad_post=post.grad, grad_prior=prior.grad)


def test_parity_encoder_and_decoder():
    encoder = with_weights(d.ConvEncoder(1, C), "encoder/w", ENCODER_NAMES)
    image = d.WorldModel.preprocess(their_image("encoder/image_uint8"))
    close("encoder/image", image, their_image("encoder/image"))
    embed = encoder(image).unflatten(1, (-1, 2, 2))
    close("encoder/embed", embed.movedim(1, -1).flatten(1))

    feature = get("decoder/feat")
    decoder = with_weights(d.ConvDecoder(S * K + D_, 1, C), "decoder/w", DECODER_NAMES)
    close("decoder/convin", decoder.linear(feature))
    mean = decoder(feature)
    close("decoder/mean", mean, their_image("decoder/mean"))
    nll = d.normal_nll(mean, their_image("decoder/target"))
    close("decoder/log_prob", -nll.sum((-3, -2, -1)))


@pytest.mark.parametrize("case", ["draw", "mode"])
def test_parity_world_model_loss(case, draws):
    model = d.Agent(d.Config(**RELEASED), A).world_model
    with_weights(model, "wm/w", MODEL_NAMES)
    model.rssm.initial = lambda n: their_state("wm/state/")  # theirs may continue a state
    draws.extend(time_first(get("wm/draw/post")) if case == "draw" else [])
    loss, posterior, metrics = model.loss(
        **their_batch("wm/batch/"), gamma=float(PARITY["wm/discount_gamma"]),
        kl_balance=0.8, kl_scale=float(PARITY["wm/loss_scale/kl"]),
        discount_scale=float(PARITY["wm/loss_scale/discount"]))
    at = f"wm/{case}/"
    close_each(at, total=loss, model_kl=metrics["kl"], prior_ent=metrics["prior_entropy"],
               post_ent=metrics["posterior_entropy"], feat=time_first(posterior.feature))
    close_each(at + "loss/", kl=metrics["kl"], image=metrics["image_loss"],
               reward=metrics["reward_loss"], discount=metrics["discount_loss"])
    close_state(at + "post_", map(time_first, posterior))
    recorder = Recorder(model)
    close(at + "grad_norm", recorder.minimize(loss), tolerance=1e-4)
    close_weights(at + "grad", MODEL_NAMES, recorder.grads, 1e-4)


def their_dream(prefix):
    """Class indices of an action, a latent, an action, ..."""
    return itertools.chain(*zip(n_major(get(prefix + "action")), n_major(get(prefix + "latent"))))


@pytest.mark.parametrize("case", """draw/reinforce_ent1e3 draw/reinforce_ent3e3
    draw/dynamics_ent1e3 draw/dynamics_ent3e3 draw/both_ent1e3 draw/both_ent3e3
    draw/pypi220_reinforce_ent1e3 mode/reinforce_ent1e3 mode/dynamics_ent1e3""".split())
def test_parity_behaviour(case, draws, monkeypatch):
    """Imagination, targets, weights, both losses and gradients, through Agent.train_step."""
    at = f"ac/{case.split('/')[0]}/"
    rho = 1.0 if "reinforce" in case else 0.0 if "dynamics" in case else 0.9
    agent = d.Agent(d.Config(**RELEASED, reinforce_mix=rho,
                             entropy_scale=1e-3 if case.endswith("ent1e3") else 3e-3), A)
    missing, unexpected = agent.load_state_dict(our_weights("ac/w", AGENT_NAMES), strict=False)
    assert not unexpected and all("encoder" in k or "decoder" in k for k in missing)
    start = d.State(*map(time_first, their_state("ac/start/")))
    agent.world_model.loss = lambda **_: (None, start, {})
    actor, critic = Recorder(agent.actor), Recorder(agent.critic)
    agent.optimizers = dict(model=types.SimpleNamespace(minimize=lambda loss: 0.0),
                            actor=actor, critic=critic)
    imagined, returns, weights = (watch(monkeypatch, name) for name in (
        "imagine", "lambda_return", "trajectory_weights"))
    if case.startswith("draw"):
        draws.extend(their_dream("ac/draw/"))
    metrics = agent.train_step(dict(is_terminal=time_first(get("ac/start/is_terminal"))))

    ours = (*imagined.output, returns.output)
    for name, value in zip(("seq/feat", "seq/action", "target"), ours):
        close(at + name, value, n_major(get(at + name)))
    weight = n_major(get(at + "seq/weight"))[:-1]  # the last one weighs nothing
    close(at + "seq/weight", weights.output, weight)
    close_each(f"ac/{case}/", 1e-4, actor_loss=actor.loss,
               actor_grad_norm=metrics["actor_grad_norm"])
    # Their critic's loss keeps the constant of Normal.
    close(at + "critic_loss", critic.loss + HALF_LOG_2PI * weight.mean())
    close_each(at + "metric/", actor_ent=metrics["actor_entropy"], critic=metrics["value"])
    close(at + "critic_grad_norm", metrics["critic_grad_norm"], tolerance=1e-4)
    close_weights(f"ac/{case}/actor_grad/actor", MLP_NAMES, actor.grads, 1e-4)
    close_weights(at + "critic_grad/critic", MLP_NAMES, critic.grads, 1e-4)


def tensorflow_epsilon(adam, t):
    """D9: TensorFlow adds its epsilon before the bias correction."""
    adam.param_groups[0]["eps"] = adam.defaults["eps"] / math.sqrt(1 - 0.999 ** t)


@pytest.mark.parametrize("case", ["atari", "strong", "noclip"])
def test_parity_optimizer(case):
    lr, eps, clip, decay = (float(PARITY[f"opt/{case}/{k}"]) for k in ("lr", "eps", "clip", "wd"))
    module = nn.ParameterDict({k: nn.Parameter(get(f"opt/{case}/var0/{k}"))
                               for k in ("kernel", "bias", "gamma")})
    optimizer = d.Optimizer(module, lr=lr, eps=eps, clip=math.inf if clip < 0 else clip,
                            decay=decay)
    for t in range(1, 7 if case == "strong" else 4):
        loss = sum((p * get(f"opt/{case}/grad{t}/{k}")).sum() for k, p in module.items())
        tensorflow_epsilon(optimizer.adam, t)
        close(f"opt/{case}/grad_norm{t}", optimizer.minimize(loss))
        for k, p in module.items():
            close(f"opt/{case}/var{t}/{k}", p)


def parity_agent():
    agent = d.Agent(d.Config(**RELEASED, slow_every_updates=2), A)
    return with_weights(agent, "agent/w0", AGENT_NAMES)


def test_parity_agent(draws):
    agent = parity_agent()
    for i in (1, 2, 3):
        at = f"agent/step{i}/"
        if i > 1:  # theirs carries the state from batch to batch where is_first lets it
            last = their_state(f"agent/step{i - 1}/last_state/")
            agent.world_model.rssm.initial = lambda n, last=last: last
        draws.extend([*time_first(get(at + "draw/post")), *their_dream(at + "draw/")])
        for optimizer in agent.optimizers.values():
            tensorflow_epsilon(optimizer.adam, i)
        metrics = agent.train_step(their_batch(at + "batch/"))
        assert not draws
        theirs = dict(kl="model_kl", prior_entropy="prior_ent", posterior_entropy="post_ent",
                      actor_entropy="actor_ent", value="critic")
        for name in """image_loss reward_loss discount_loss model_loss actor_loss kl value
                prior_entropy posterior_entropy actor_entropy model_grad_norm actor_grad_norm
                critic_grad_norm""".split():
            close(f"{at}metric/{theirs.get(name, name)}", metrics[name], tolerance=1e-4)
        for name, weight in our_weights(f"agent/w{i}", AGENT_NAMES).items():
            error = (agent.state_dict()[name] - weight).abs().max().item()
            print(f"parity agent w{i} {name}: {error:.1e} absolute")
            assert error < 5e-7, (i, name, error)


def test_parity_act(draws):
    agent, memory = parity_agent(), None
    for call in ("agent/policy0/", "agent/policy1/"):
        image, is_first = their_image(call + "obs/image"), get(call + "obs/is_first")
        draws[:] = get(call + "draw/post"), get(call + "draw/action")
        greedy, _ = agent.act(image, is_first, memory, greedy=True)
        assert len(draws) == 1  # z is drawn, the action is not
        draws[:] = get(call + "draw/post"), get(call + "draw/action")
        action, memory = agent.act(image, is_first, memory)
        close_state(call + "latent_", (memory["h"], memory["z"]))
        logits = agent.actor(d.State(memory["h"], memory["z"], logits=None).feature)
        close_each(call, eval_action=greedy, train_action=action, actor_logits=logits)


def test_parity_initialisation():
    """The paper's 22M parameters; spread and range of every weight, as Keras draws them."""
    agent = d.Agent(d.Config(), int(PARITY["init/num_actions"]))
    size = sum(p.numel() for p in agent.parameters())
    assert size - sum(p.numel() for p in agent.slow_critic.parameters()) == 22_245_398
    found = 0
    for name, std, top in zip(*(PARITY[f"init/{k}"] for k in ("names", "std", "absmax"))):
        theirs, _, end = str(name).rpartition("/")
        theirs = next((k for k in AGENT_NAMES if theirs.endswith(k)
                       and not theirs.endswith("target_" + k)), None)
        if theirs is None:
            continue
        found += 1
        weight = agent.get_parameter(f"{AGENT_NAMES[theirs]}.{ENDS[end]}")
        if std == 0:
            assert torch.equal(weight, torch.full_like(weight, float(top))), name
        else:
            assert weight.std().item() == pytest.approx(float(std), rel=0.1), name
            assert weight.abs().max().item() == pytest.approx(float(top), rel=0.1), name
    assert found >= 60


# --------------------------------------------------------------------- gradient flow

MODULES = "encoder rssm decoder reward_head discount_head actor critic slow_critic".split()
FLOW = {"model": set(MODULES[:5]), "actor": {"actor"}, "critic": {"critic"}}


def module_of(name):
    return next(m for m in MODULES if name.startswith((m + ".", f"world_model.{m}.")))


@pytest.mark.parametrize("rho", [1.0, 0.5])
def test_gradient_flow_table(rho):
    """Which modules the graph of each loss touches, with the optimisers' own restriction
    lifted. Reinforce: those of FLOW, so nothing else is needed to keep them apart. ρ < 1:
    the actor's graph runs through the imagined future, but never into the encoder."""
    agent = tiny_agent(reinforce_mix=rho)
    agent.requires_grad_()
    agent.optimizers = {name: Recorder(agent) for name in FLOW}
    agent.train_step(random_batch())
    reached = {name: {module_of(k) for k, g in optimizer.grads.items() if g.any()}
               for name, optimizer in agent.optimizers.items()}
    future = {"rssm", "reward_head", "discount_head", "slow_critic"} if rho < 1 else set()
    assert reached == FLOW | {"actor": {"actor"} | future}


@pytest.mark.parametrize("rho", [1.0, 0.5, 0.0])
def test_each_optimizer_moves_only_its_own(rho):
    """With ρ < 1 the actor's graph runs through the world model, but moves nothing there."""
    agent, batch = tiny_agent(reinforce_mix=rho, slow_every_updates=10 ** 6), random_batch()
    agent.updates = 1  # no slow copy
    for moving in FLOW:
        before = copy.deepcopy(agent.state_dict())
        for name, optimizer in agent.optimizers.items():
            optimizer.adam.param_groups[0].update(lr=0.01 * (name == moving), weight_decay=0.0)
        agent.train_step(batch)
        moved = {module_of(k) for k, v in agent.state_dict().items()
                 if not torch.equal(v, before[k])}
        assert moved == FLOW[moving]
    assert all(p.grad is None for p in agent.slow_critic.parameters())


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("shift", [0, 1])
def test_action_baseline_and_advantage_are_those_that_the_flags_name(slow, shift, monkeypatch):
    """a_t = actions[t+1], chosen in state t, is credited with V_t, or V_{t+1} [D5], beyond
    what the critic, or the slow one [D4], expects of state t."""
    agent = tiny_agent(slow_baseline=slow, shifted_advantage=bool(shift))
    agent.updates = 1  # no slow copy
    agent.optimizers = {name: Recorder(agent) for name in FLOW}  # all weights stay
    nn.init.constant_(agent.slow_critic[-2].bias, 50.0)
    imagined, returns, weights, actor = (watch(monkeypatch, name) for name in (
        "imagine", "lambda_return", "trajectory_weights", "actor_loss"))
    metrics = agent.train_step(random_batch())
    assert_close(metrics["returns"], returns.output.mean())

    features, actions = imagined.output
    end = agent.horizon - shift
    policy = agent.policy(features[:end])
    baseline = (agent.slow_critic if slow else agent.critic)(features[:end]).squeeze(-1)
    expected = dict(
        log_prob=policy.log_prob(actions[1:end + 1]), entropy=policy.entropy(),
        returns=returns.output[shift:], baseline=baseline, weights=weights.output[:end])
    assert_close({name: actor.inputs[name] for name in expected}, expected)


def test_true_start(monkeypatch):
    """D13: after a terminal start no state counts, whatever is guessed. No weight learns."""
    agent, weights = tiny_agent(), watch(monkeypatch, "trajectory_weights")
    agent.train_step(random_batch() | dict(is_terminal=torch.ones(6, 3).bool()))
    assert (weights.output[0] == 1).all() and (weights.output[1:] == 0).all()
    assert not d.trajectory_weights(torch.ones(2, 1, requires_grad=True)).requires_grad


@pytest.mark.parametrize("settings", [
    {}, dict(free_nats=1e3), dict(free_bits=1e3), dict(free_bits=1e3, kl_balancing=False)])
def test_free_nats_and_bits_stop_the_kl_below_them(settings, draws):
    agent, batch = tiny_agent(**settings, kl_scale=1e6), random_batch()
    loss, _, metrics = agent.world_model.loss(**batch, **agent.model_loss_args)
    loss.backward()
    assert agent.world_model.rssm.prior_out.weight.grad.any() == (not settings)
    if not settings:  # a little below their mean, but above some
        agent.model_loss_args["free_nats"] = 0.999 * metrics["kl"].item()
        assert_close(agent.world_model.loss(**batch, **agent.model_loss_args)[0], loss)


# ------------------------------------------------------------ ablations and policies

@pytest.mark.parametrize("settings, continuous", [
    *(pytest.param({name: False}, False, id="no " + name) for name in """layer_norm
        reward_gradients discrete_latents kl_balancing policy_reinforce image_gradients
        discount_head reward_tanh""".split()),
    *(pytest.param(flags, name == "continuous", id=name) for name, flags in PRESETS.items())])
def test_a_step_of_every_switch_and_preset(settings, continuous):
    """Every module learns, except the one that is switched off. Not the slow critic."""
    agent, batch = tiny_agent(continuous=continuous, **settings | SIZES), random_batch()
    agent.updates = 1  # no slow copy
    before = copy.deepcopy(agent.state_dict())
    metrics = agent.train_step(batch, step=5)
    assert agent.precision == "fp32"  # what auto is on a CPU [D11]
    assert (agent.model_loss_args["kl_balance"] is None) == ("kl_balancing" in settings)
    assert all(v.isfinite() and v.dtype == torch.float32 for v in metrics.values())
    moved = {module_of(k) for k, v in agent.named_parameters()
             if not torch.allclose(v, before[k], rtol=1e-5, atol=1e-8)}  # by more than decay
    off = {"slow_critic"} if agent.discount_head else {"slow_critic", "discount_head"}
    assert moved == set(MODULES) - off
    action, _ = agent.act(batch["image"][0], batch["is_first"][0])
    assert action.shape == (3, 3) and action.abs().max() <= 1


def test_without_layer_norm_the_gates_are_the_linear_layers_outputs():
    agent = tiny_agent(layer_norm=False)
    assert not any("norm" in k for k in agent.state_dict())
    cell, x, h = agent.world_model.rssm.cell, torch.randn(2, 16), torch.randn(2, 16)
    reset, candidate, update = (cell.linear.weight @ torch.cat([x, h], 1).T).T.chunk(3, 1)
    u = (update - 1).sigmoid()
    assert_close(cell(x, h), u * (reset.sigmoid() * candidate).tanh() + (1 - u) * h)


@pytest.mark.parametrize("head, other, flag", [
    ("reward_head", "decoder", "reward_gradients"), ("decoder", "reward_head", "image_gradients")])
@pytest.mark.parametrize("on", [True, False])
def test_a_stopped_head_learns_but_teaches_the_rssm_nothing(head, other, flag, on):
    """The loss with only that head's term: KL and discount weigh nothing, and of the image's
    and the reward's term the other head is frozen at zero weights, so it sends nothing."""
    agent = tiny_agent(**{flag: on}, kl_scale=0.0, discount_scale=0.0)
    for weight in getattr(agent.world_model, other).parameters():
        nn.init.zeros_(weight)
    gradients = Recorder(agent.world_model)
    gradients.minimize(agent.world_model.loss(**random_batch(), **agent.model_loss_args)[0])
    taught = {module_of(k) for k, g in gradients.grads.items() if g.any()} - {other}
    assert taught == ({"encoder", "rssm", head} if on else {head})


@pytest.mark.parametrize("settings", [dict(policy_reinforce=False), dict(continuous=True)])
def test_reinforce_that_is_off_stays_off(settings):
    """ρ = 0, whatever --reinforce-mix is and --anneal-steps would make of it."""
    agent = tiny_agent(**settings, reinforce_mix=0.5, anneal_steps=10)
    for step, scale in ((0, 1e-3), (10, 3e-4)):
        assert tuple(agent.schedule(step)) == pytest.approx((0, scale))


@pytest.mark.parametrize("step, mix, scale", [
    (0, 0.9, 3e-3), (1_250_000, 0.95, 1.65e-3), (2_500_000, 1.0, 3e-4), (9e6, 1.0, 3e-4)])
def test_schedules_are_linear_in_decisions(step, mix, scale, monkeypatch):
    agent = tiny_agent(**PRESETS["schedules"])
    loss = watch(monkeypatch, "actor_loss")
    agent.train_step(random_batch(), step)
    assert float(loss.inputs["reinforce_mix"]) == pytest.approx(mix)
    assert float(loss.inputs["entropy_scale"]) == pytest.approx(scale)


def test_no_discount_head_means_gamma_everywhere(monkeypatch):
    agent = tiny_agent(discount_head=False, gamma=0.9)
    returns = watch(monkeypatch, "lambda_return")
    agent.train_step(random_batch())
    discount = returns.inputs["discount"]
    assert (discount == 0.9).all() and len(discount) == agent.horizon


@pytest.mark.parametrize("on", [True, False])
def test_reward_tanh_is_the_targets(on):
    agent, batch = tiny_agent(reward_tanh=on), random_batch()
    for weight in agent.world_model.reward_head.parameters():
        nn.init.zeros_(weight)  # predicts 0
    metrics = agent.world_model.loss(**batch, **agent.model_loss_args)[2]
    target = batch["reward"].tanh() if on else batch["reward"]
    assert metrics["reward_mse"].item() == pytest.approx((target ** 2).mean().item())


def test_gaussian_latents_are_their_formulas():
    torch.manual_seed(0)
    p, q = torch.randn(2, 3, 5, 8).requires_grad_(), torch.randn(2, 3, 5, 8)  # S = 5, K = 4
    (mu_p, s_p), (mu_q, s_q) = ((x[..., :4], 2 / (1 + (-x[..., 4:] / 2).exp()) + 0.1)
                                for x in (p, q))
    kl = (s_q / s_p).log() + (s_p ** 2 + (mu_p - mu_q) ** 2) / (2 * s_q ** 2) - 0.5
    assert_close(d.gaussian_kl(p, q), kl.sum((-2, -1)))
    entropy = 0.5 * (2 * math.pi * math.e * s_p ** 2).log()
    assert_close(d.gaussian_entropy(p), entropy.sum(-1))

    rssm = tiny_agent(discrete_latents=False, unimix=0.5).world_model.rssm
    assert rssm.unimix == tiny_agent(continuous=True, unimix=0.5).unimix == 0
    assert rssm.feature_size == tiny_agent().world_model.rssm.feature_size
    z = rssm.sample(p.expand(10_000, 2, 3, 5, 8))
    assert_close(z.mean(0), mu_p, atol=0.1, rtol=0)
    assert_close(z.std(0), s_p, atol=0.1, rtol=0)
    ours, = torch.autograd.grad((z ** 2).mean(0).sum(), p, retain_graph=True)
    exact, = torch.autograd.grad((mu_p ** 2 + s_p ** 2).sum(), p)
    assert_close(ours, exact, atol=0.2, rtol=0)


def test_the_gaussian_models_losses_are_gaussian():
    agent, batch = tiny_agent(discrete_latents=False), random_batch()
    model, args = agent.world_model, agent.model_loss_args | dict(kl_scale=1000.0)
    torch.manual_seed(1)
    loss, _, metrics = model.loss(**batch, **args)
    torch.manual_seed(1)
    posterior, prior = model.rssm.observe(
        model.encoder(model.preprocess(batch["image"])), batch["action"], batch["is_first"])
    posterior, entropy = posterior.logits, d.gaussian_entropy
    for name, values in dict(kl=d.gaussian_kl(posterior, prior), prior_entropy=entropy(
            prior).sum(-1), posterior_entropy=entropy(posterior).sum(-1)).items():
        assert metrics[name].item() == pytest.approx(values.mean().item(), rel=1e-5), name
    kl_part = (loss - metrics["image_loss"] - metrics["reward_loss"]
               - args["discount_scale"] * metrics["discount_loss"])
    assert kl_part.item() == pytest.approx(1000 * metrics["kl"].item(), rel=1e-3)


@pytest.mark.parametrize("mean, s", [
    (0.0, 0.0), (2.0, -3.0), (-1.0, 4.0), (0.3, -8.0), (0.5, -1.0)])
def test_truncated_normal_is_a_distribution_within_its_bounds(mean, s):
    """Against sums over a fine grid; and moments and gradients of its samples."""
    params = torch.tensor([mean, s], dtype=torch.float64).requires_grad_()
    policy, x = d.TruncatedNormal(params), torch.linspace(-1, 1, 20_001, dtype=torch.float64)
    log_p = policy.log_prob(x[:, None])
    p = log_p.exp() / 10_000  # the probability of each point of the grid
    assert policy.mode.item() == pytest.approx(math.tanh(mean))
    assert x[p.argmax()].item() == pytest.approx(policy.mode.item(), abs=1e-3)
    assert p.sum().item() == pytest.approx(1, abs=1e-3)
    assert policy.entropy().item() == pytest.approx(-(p * log_p).sum().item(), abs=2e-3)
    torch.manual_seed(0)
    sample = d.TruncatedNormal(params.expand(100_000, 2)).rsample()
    for power in (1, 2):
        moment, expected = (sample ** power).mean(), (p * x ** power).sum()
        assert moment.item() == pytest.approx(expected.item(), abs=0.01)
        ours, slopes = (torch.autograd.grad(y, params, retain_graph=True)[0]
                        for y in (moment, expected))
        assert ours.tolist() == pytest.approx(slopes.tolist(), abs=0.01)


@pytest.mark.parametrize("uniform", [torch.zeros_like, torch.ones_like])
def test_truncated_normal_never_leaves_its_bounds(uniform, monkeypatch):
    """Not by a rounding: a game may refuse 1.0000001. And even there gradients are finite."""
    params = 4 * torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0))
    params[:2] = torch.tensor([[9.0, -30.0], [-9.0, -30.0]])  # the mode is at a bound
    monkeypatch.setattr(torch, "rand_like", uniform)
    action = d.TruncatedNormal(params.requires_grad_()).rsample()
    assert action.abs().max() <= 1
    action.sum().backward()
    assert params.grad.isfinite().all()


# ------------------------------------------------- toy games, and helpers to run them

class Counting(gymnasium.Env):
    """The image shows how many actions were taken, and which the last one was. Episodes of
    4 steps; every other one is truncated instead of terminated."""
    observation_space = Box(0, 255, (64, 64), np.uint8)
    action_space = Discrete(5)
    episode = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.last, self.episode = 0, 0, self.episode + 1
        return self.see(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.t, self.last = self.t + 1, int(action)
        end, odd = self.t == 4, self.episode % 2 == 1
        return self.see(), float(10 * self.t), end and odd, end and not odd, {}

    def see(self):
        return np.full((64, 64), 10 * self.t + self.last, np.uint8)


class Colours(gymnasium.Env):
    """96×128 RGB: left half red, right half blue. Those not yet closed are in `open`."""
    observation_space = Box(0, 255, (96, 128, 3), np.uint8)
    action_space = Discrete(2)
    image = np.zeros((96, 128, 3), np.uint8)
    image[:, :64, 0], image[:, 64:, 2] = 200, 100
    open, made = set(), 0

    def __init__(self):
        Colours.open.add(self)
        Colours.made += 1

    def reset(self, *, seed=None, options=None):
        return self.image, {}

    def step(self, action):
        return self.image, 1.0, False, False, {}

    def close(self):
        Colours.open.discard(self)


class Levers(Colours):
    """Two levers; the image shows what they were set to, the reward is the first."""
    action_space = Box(np.float32([0, -10]), np.float32([4, 30]))
    observation_space = Box(0, 255, (64, 64), np.uint8)
    image = np.full((64, 64), 99, np.uint8)
    played = []

    def step(self, action):
        self.played.append(action.tolist())
        return np.full((64, 64), 50 * action[0], np.uint8), float(action[0]), False, False, {}


class Dot(Colours):
    """A dot to move to the ring in the middle, by up to a fifth of the picture a step in
    both directions; the reward is minus the distance. Ten steps; at random about -4.1."""
    observation_space = Box(0, 255, (64, 64, 1), np.uint8)
    action_space = Box(-0.2, 0.2, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        gymnasium.Env.reset(self, seed=seed)
        self.dot, self.count = self.np_random.uniform(0, 1, 2), 0
        return self.draw(), {}

    def step(self, action):
        self.dot, self.count = np.clip(self.dot + action, 0, 1), self.count + 1
        distance = float(np.linalg.norm(self.dot - 0.5))
        return self.draw(), -distance, False, self.count == 10, {}

    def draw(self):
        y, x = np.mgrid[:64, :64] / 63
        far, ring = np.hypot(x - self.dot[0], y - self.dot[1]), np.hypot(x - 0.5, y - 0.5)
        image = np.where(far < 0.12, 255, np.where(abs(ring - 0.2) < 0.03, 100, 0))
        return image.astype(np.uint8)[..., None]


for Game in (Counting, Colours, Levers, Dot):
    gymnasium.register(f"tests/{Game.__name__}-v0", Game)


for name, size in dict(Tenth=0.1, One=1.0, Hundred=100.0).items():  # of Catch's rewards
    gymnasium.register(f"Catch{name}-v0", lambda size=size: (
        gymnasium.wrappers.TransformReward(d.Catch(), lambda reward: size * reward)))


@contextlib.contextmanager
def toy_game(**attributes):
    """The id of a game like Colours, but for these attributes; all made have to be closed."""
    gymnasium.register("tests/Toy-v0", type("Toy", (Colours,), attributes))
    Colours.open.clear()
    Colours.made = 0
    try:
        yield "tests/Toy-v0"
    finally:
        del gymnasium.registry["tests/Toy-v0"]
    assert not Colours.open


QUICK = ("--preset", "debug", "--prefill-steps", 20, "--checkpoint-minutes", 1000)
CATCH = ("--game", "Catch", *QUICK)


def run(*flags, stops=False):
    """main() in this process: its status, and 1 where it breaks off. A run catches the
    signals that are meant for pytest: one that the test did not ask for ends pytest, too."""
    try:
        status = d.main(list(map(str, flags)))
    except SystemExit as stop:
        if not isinstance(stop.code, str):
            raise
        print(stop.code, file=sys.stderr)
        return 1
    if status in (130, 143) and not stops:
        pytest.exit("a signal came", returncode=status)
    return status


def lines(logdir):
    """The rows of metrics.jsonl, in which no step may come twice, whatever happened."""
    rows = [json.loads(x) for x in (Path(logdir) / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == sorted({row["step"] for row in rows})
    return rows


def contents(folder):
    return {p: p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def counters(logdir, name="checkpoint.pt"):
    return torch.load(Path(logdir) / name, weights_only=True)["counters"]


# ----------------------------------------------------------- what DreamerV3 changed

@pytest.mark.parametrize("y", [
    -6e8, -4.851651954e8, -1e4, -1.0, -0.01, 0.0, 1e-3, 0.08, 3.7, 250.0, 123456.0, 1e9])
def test_two_hot_is_its_slow_twin_and_its_mean_gives_the_number_back(y):
    bins = [math.copysign(math.expm1(abs(x)), x) for x in np.linspace(-20, 20, 255)]
    inside = min(max(y, bins[0]), bins[-1])
    i = next(i for i in range(254) if bins[i] <= inside <= bins[i + 1])
    upper = (inside - bins[i]) / (bins[i + 1] - bins[i])
    out = torch.randn(255, generator=torch.Generator().manual_seed(0))
    log_p = out.double().log_softmax(0)
    loss = -(1 - upper) * log_p[i].item() - upper * log_p[i + 1].item()
    found = d.twohot_nll(out.expand(2, 3, 255), torch.full((2, 3), y))
    assert found.shape == (2, 3) and found[1, 2].item() == pytest.approx(loss, rel=2e-3)
    certain = torch.full((255,), -100.0)
    certain[i], certain[i + 1] = math.log(1 - upper + 1e-9), math.log(upper + 1e-9)
    assert d.head_mean(certain).item() == pytest.approx(inside, rel=1e-3, abs=1e-2)
    assert d.symexp(d.symlog(torch.tensor(y))).item() == pytest.approx(y, rel=1e-4, abs=1e-6)


def test_free_bits_take_the_gradient_of_each_term_below_them():
    """The loss is α·max(1, KL) + (1 - α)·max(1, KL); metrics show the KL as it is."""
    post = torch.tensor([[[0.0, 0.0]], [[9.0, 0.0]]], requires_grad=True)  # KL 0.14, 1.36
    prior = torch.tensor([3.0, 1.0]).log().flip(0).expand(2, 1, 2).clone().requires_grad_()
    loss, kl = d.balanced_kl(post, prior, 0.8, free_bits=1.0)
    assert loss.tolist() == pytest.approx([1.0, kl[1].item()]) and kl[0] < 0.2 and kl[1] > 1
    loss.sum().backward()
    for logits in (post, prior):
        assert not logits.grad[0].any() and logits.grad[1].any()


@pytest.mark.parametrize("raw, scale", [(100.0, 0.99 * 100 + 0.01), (0.0, 1.0)])
def test_the_return_scale_is_a_running_range_and_a_constant(raw, scale, monkeypatch):
    agent = tiny_agent(return_scale=1.0, reinforce_mix=0.5)
    agent.spread.fill_(raw)
    ranges = iter([torch.tensor(1.0)])
    monkeypatch.setattr(d, "returns_range", lambda returns: (
        next(ranges) if not returns.requires_grad else pytest.fail("a path for gradients")))
    actor = watch(monkeypatch, "actor_loss")
    agent.train_step(random_batch())
    assert actor.inputs["return_scale"].item() == pytest.approx(scale)
    assert "spread" in agent.state_dict() and "spread" not in tiny_agent().state_dict()
    x = np.random.default_rng(0).normal(size=(15, 40)).astype(np.float32)
    monkeypatch.undo()
    assert d.returns_range(torch.from_numpy(x)).item() == pytest.approx(
        np.percentile(x, 95) - np.percentile(x, 5), rel=1e-5)


def test_v3_starts_at_zero_and_rules_nothing_out(monkeypatch):
    agent, critic = tiny_agent(**PRESETS["v3"] | SIZES), watch(monkeypatch, "critic_loss")
    feature = torch.randn(5, agent.world_model.rssm.feature_size)
    assert not agent.world_model.predict_reward(feature).any()
    assert not d.head_mean(agent.critic(feature)).any()
    agent.actor[-2].weight.data *= 1e3
    probs = agent.policy(feature).logits.softmax(-1)
    assert probs.min().item() == pytest.approx(0.01 / 3, rel=1e-3)
    agent.world_model.rssm.prior_out.weight.data *= 1e4
    logits = agent.world_model.rssm.prior_logits(torch.randn(5, SIZES["deter_size"]))
    assert logits.exp().min().item() == pytest.approx(0.01 / 4, rel=1e-3)
    assert agent.train_step(random_batch())["reward_loss"].item() == pytest.approx(math.log(255))
    assert critic.inputs["bins"].shape[-1] == 255
    kl = agent.model_loss_args
    assert kl["kl_scale"] * kl["kl_balance"] == pytest.approx(1, rel=1e-6)
    assert kl["kl_scale"] * (1 - kl["kl_balance"]) == pytest.approx(0.1, rel=1e-6)


# ---------------------------------------------------------------------------- replay

TINY = dict(image_shape=(1, 2, 2), action_dim=1)  # old numpy would drop an axis of 1


def counting_replay(folder, capacity, rows, num_envs=1, first=0, **kwargs):
    """Row t of environment e holds t everywhere, plus 1000·e in the reward."""
    replay = d.Replay(folder, capacity, num_envs=num_envs, **TINY | kwargs)
    for t in range(first, first + rows):
        replay.add(np.full((num_envs, 1, 2, 2), t % 256), np.full((num_envs, 1), t),
                   t + 1000.0 * np.arange(num_envs), np.full(num_envs, t % 5 == 0),
                   np.full(num_envs, t % 5 == 4))
    return replay


@pytest.mark.parametrize("rows", [7, 12, 13, 20, 37])
def test_replay_sequences_are_whole_at_every_fill(tmp_path, rows):
    """Twin: a list of what was added. Every sample is a run of the newest `capacity` rows."""
    replay = counting_replay(tmp_path, 24, rows, num_envs=2)
    alive = list(range(max(0, rows - 12), rows))
    allowed = {tuple(t + 1000.0 * e for t in alive[i:i + 5])
               for e in (0, 1) for i in range(len(alive) - 4)}
    batch = replay.sample(500, 5)
    assert set(map(tuple, batch["reward"].T.tolist())) == allowed
    assert (batch["reward"] % 1000 == batch["action"][..., 0]).all()
    assert (batch["reward"] % 1000 == batch["image"][..., 0, 0, 0]).all()
    assert ((batch["action"][..., 0] % 5 == 4) == batch["is_terminal"]).all()
    assert batch["is_first"][0].all()
    assert ((batch["action"][1:, ..., 0] % 5 == 0) == batch["is_first"][1:]).all()
    assert len(replay) == 2 * len(alive)


def test_replay_is_uniform(tmp_path):
    """D8: every start is equally likely, ends of episodes included."""
    replay = counting_replay(tmp_path, 50, 70)
    starts = np.concatenate([replay.sample(500, 11)["reward"][0].numpy() for _ in range(40)])
    counts = np.bincount(starts.astype(int) - 20)
    assert len(counts) == 40 and abs(counts - 500).max() < 5 * math.sqrt(500)


def test_replay_goes_on_where_it_was_and_another_layout_is_refused(tmp_path):
    counting_replay(tmp_path, 10, 13)
    before = contents(tmp_path)
    for other in dict(capacity=9), dict(image_shape=(3, 2, 2)), dict(action_dim=3), dict(
            num_envs=2):
        with pytest.raises(d.UsageError, match="holds other rows"):
            d.Replay(tmp_path, **dict(capacity=10) | TINY | other)
    assert contents(tmp_path) == before
    replay = counting_replay(tmp_path, 10, 1, first=13)
    rewards = replay.sample(300, 10)["reward"]
    assert set(map(tuple, rewards.T.tolist())) == {tuple(range(4, 14))}
    pytest.raises(d.UsageError, replay.sample, 1, 11)


@pytest.mark.parametrize("fields", range(6))
def test_a_row_torn_by_a_kill_is_never_sampled(fields, tmp_path):
    """Killed after so many of its five fields, in a full ring: the others are whole."""
    killed = types.SimpleNamespace(__array__=mock.Mock(side_effect=KeyboardInterrupt))
    with contextlib.suppress(KeyboardInterrupt):
        counting_replay(tmp_path, 6, 15).add(*[77] * fields, *[killed] * (5 - fields))
    again = d.Replay(tmp_path, 6, **TINY)
    batch = again.sample(300, 2)
    alive = {9, 10, 11, 12, 13, 14} if fields < 5 else {10, 11, 12, 13, 14, 77}
    assert set(batch["reward"].unique().tolist()) == alive and len(again) == 6
    assert (batch["reward"] == batch["action"][..., 0]).all()
    assert (batch["reward"] == batch["image"][..., 0, 0, 0]).all()


# ---------------------------------------------------------------------- environments

def play_rows(envs, actions):
    """Each action is of all environments, or one of each."""
    one_hot, n = np.eye(envs.num_actions), envs.num_envs
    return [envs.reset(), *(envs.step(one_hot[np.broadcast_to(a, n)]) for a in actions)]


def test_rows_are_aligned_on_a_counting_environment(tmp_path):
    """Reward and action of a row are those that led to its image. A reset's row has none,
    though this library were to return a reward with it."""
    envs = d.make_envs("tests/Counting-v0", num_envs=2)
    replay = d.Replay(tmp_path, 200, num_envs=2, image_shape=(1, 64, 64), action_dim=5)
    step = envs.vector_env.step
    envs.vector_env.step = lambda action: [
        x + 7 if i == 1 else x for i, x in enumerate(step(action))]
    rows = play_rows(envs, [(i % 5, (i + 1) % 5) for i in range(22)])
    for row in rows:
        replay.add(*row)
    assert envs.frames_per_step == 1
    assert rows[1].image[:, 0, 0, 0].tolist() == [10, 11]  # the first actions arrive
    assert [bool(r.is_first[0]) for r in rows] == [i % 5 == 0 for i in range(23)]
    assert [bool(r.is_terminal[0]) for r in rows] == [i % 10 == 4 for i in range(23)]
    batch = replay.sample(64, 9)
    seen, action = batch["image"][..., 0, 0, 0].long(), batch["action"]
    first = seen == 0
    assert torch.equal(first[1:], batch["is_first"][1:])
    assert (action[first] == 0).all() and (batch["reward"][first] == 0).all()
    assert (action[~first].sum(-1) == 1).all()
    assert torch.equal(action[~first].argmax(-1), seen[~first] % 10)
    assert torch.equal(batch["reward"][~first].long(), seen[~first] // 10 * 10 + 7)


def test_playing_remembers_and_keeps_the_score():
    """The agent acts 1, and counts in its memory how often it was asked."""
    echo = types.SimpleNamespace(device=torch.device("cpu"), counts=[], act=lambda memory, **_: (
        echo.counts.append((memory or 0) + 1), (torch.eye(5)[[1]], echo.counts[-1]))[1])
    assert d.evaluate(echo, d.make_envs("tests/Counting-v0"), 3).tolist() == [[100.0, 4]] * 3
    assert echo.counts == [*range(1, 3 * 4 + 3)]  # and the two resets between


def test_atari_protocol(monkeypatch):
    """Whatever the defaults of the library are: what it is given, and what it has itself."""
    from ale_py import vector_env

    defaults = inspect.signature(vector_env.AtariVectorEnv).parameters
    made = watch(monkeypatch, "AtariVectorEnv", vector_env)
    envs = d.make_game(d.Config(), 1, d.TRAIN)
    used = {k: made.inputs.get(k, v.default) for k, v in defaults.items()}
    expected = dict(
        repeat_action_probability=0.25, full_action_space=True, frameskip=4, maxpool=True,
        max_num_frames_per_episode=108_000, noop_max=30, img_height=64, img_width=64, stack_num=1,
        grayscale=True, reward_clipping=False, episodic_life=False, life_loss_info=False,
        use_fire_reset=False, continuous=False)
    assert {k: used[k] for k in expected} == expected
    assert (envs.num_actions, envs.channels, envs.frames_per_step) == (18, 1, 4)
    assert envs.reset().image.shape == (1, 1, 64, 64)
    with pytest.raises(AssertionError, match="actions must be"):  # it would hang on these
        envs.step(np.eye(19)[[18]])
    envs = d.make_envs("Breakout", action_repeat=3, sticky=0.5, max_noops=0, time_limit=10,
                       full_action_space=False)
    assert envs.num_actions == 4 and made.inputs.items() >= dict(frameskip=3, noop_max=1,
        repeat_action_probability=0.5, max_num_frames_per_episode=30).items()


def test_atari_end_of_game_is_terminal_and_a_time_limit_is_not():
    actions = np.random.default_rng(0).integers(18, size=400)
    for time_limit in (27_000, 5):
        rows = play_rows(d.make_envs("Breakout", seed=1, time_limit=time_limit), actions)
        firsts = [i for i, r in enumerate(rows) if r.is_first[0]]
        ends = [i + 1 for i, r in enumerate(rows) if r.is_terminal[0]]
        assert ends == firsts[1:] != [] if time_limit > 5 else (
            ends == [] and firsts == [*range(0, 401, 6)])


def test_only_spellings_of_atari_games_are_merged():
    for name in "Breakout-v0 breakout BreakoutDeterministic-v4 ALE/Breakout-v5 break_out".split():
        assert d.parse_config(["--game", name])[0].logdir == "runs/breakout-small-seed0"
        assert d.make_envs(name).num_actions == 18
    names = ["mod:Ver-v0", "mod:Ver-v5", "mod:Pong-v0", "my/Pong-v5", "Pong-v1", "CartPole-v1"]
    assert [d.canonical_name(name) for name in names] == names
    assert d.parse_config(["--game", "my/Pong-v5"])[0].logdir == "runs/my_Pong-v5-small-seed0"
    assert len({d.parse_config(["--game", name])[0].logdir for name in names}) == len(names)


@pytest.mark.parametrize("kind", [np.uint8, np.float32, np.float64])
@pytest.mark.parametrize("shape", [
    (3, 70, 3), (96, 128, 3), (64, 64, 1), (50, 70, 4), (3, 50, 70), (1, 64, 64), (50, 70)])
def test_images_of_every_layout(shape, kind):
    """The first channel is 200 in the left half, the last channel 50 more everywhere."""
    image, game = np.zeros(shape, np.uint8), Colours()
    channels = image[None] if len(shape) == 2 else (
        image.transpose(2, 0, 1) if shape[2] <= 4 else image)  # a view
    channels[0, :, :channels.shape[2] // 2] = 200
    channels[-1] += 50
    game.image = image if kind is np.uint8 else (image / 255).astype(kind)
    game.observation_space = Box(0, 255 if kind is np.uint8 else 1, shape, kind)
    env = d.plain_game(game, 1, 10)
    seen, _ = env.reset()
    assert env.observation_space.contains(seen) and seen.shape == (len(channels), 64, 64)
    expected = np.zeros_like(seen)
    expected[0, :, :32] = 200
    expected[-1] += 50
    assert np.array_equal(seen, expected)
    assert (d.to_image(np.tile(np.uint8([[255, 0], [0, 0]]), (64, 64))) == 64).all()  # 63.75


@pytest.mark.parametrize("images, actions, named", [
    (Dict(image=Discrete(2)), None, "object of shape ()"), (Box(-1, 1, (64, 64)), None, "float32"),
    (Box(0, 255, (64, 64), np.float32), None, "float32 of shape (1, 64, 64)"),
    (Box(0, 1, (7,)), None, "(7,)"), (Box(0, 9, (64, 64, 3), np.int64), None, "int64"),
    (Box(0, 255, (64, 64, 5), np.uint8), None, "(64, 64, 5)"),
    (None, MultiDiscrete([2, 2]), "MultiDiscrete"), (None, Box(-1, 1, (2, 2)), "(2, 2)"),
    (None, Box(-np.inf, np.inf, (2,)), "inf"), (None, Box(0, 9, (2,), np.int32), "int32")])
def test_games_that_cannot_be_played_say_why(images, actions, named):
    spaces = dict(observation_space=images, action_space=actions).items()
    with toy_game(**{k: v for k, v in spaces if v}) as game:
        with pytest.raises(d.UsageError, match=f"--game {game}: .* must be .*, not ") as error:
            d.make_envs(game)
        assert Colours.made == 1 and named in str(error.value).split(", not ")[1]


def test_boxes_of_actions_are_scaled_and_repeated():
    envs = d.make_envs("tests/Levers-v0", num_envs=2, action_repeat=3, time_limit=2)
    assert (envs.continuous, envs.num_actions, envs.frames_per_step) == (True, 2, 3)
    envs.reset()
    Levers.played.clear()
    row = envs.step(np.array([[-1.0, 1.0], [0.5, 0.0]]))
    assert Levers.played == [[0, 30]] * 3 + [[3, 10]] * 3
    assert row.reward.tolist() == [0, 9] and row.image[1, 0, 0, 0] == 150
    assert row.action.tolist() == [[-1, 1], [0.5, 0]] and row.action.dtype == np.float32
    envs.step(np.zeros((2, 2)))
    assert envs.done.all() and not envs.step(np.ones((2, 2))).action.any()  # the reset


def test_a_rescaled_action_never_leaves_its_box():
    """Rounding may do that: in float32, -0.7 + 1 * (0.1 - -0.7) is more than 0.1."""
    game, played = Levers(), []
    game.action_space = Box(np.float32([-1.2, -0.7]), np.float32([2.5, 0.1]))
    game.step = lambda action: (played.append(action), (game.image, 0.0, False, False, {}))[1]
    env = d.plain_game(game, 1, 10**6)
    env.reset()
    for x in [-1, np.nextafter(-1, 0), np.nextafter(1, 0), 1, *np.linspace(-1, 1, 999)]:
        env.step(np.full(2, x, np.float32))
    assert all(game.action_space.contains(action) for action in played)
    assert np.min(played, 0) == pytest.approx(game.action_space.low)
    assert np.max(played, 0) == pytest.approx(game.action_space.high)


def test_catch_is_won_by_following_the_ball_and_lost_by_fleeing_it():
    env, balls = d.Catch(), set()
    for seed, side in itertools.product(range(40), (1, -1)):
        env.reset(seed=seed)
        balls.add(env.ball)
        for _ in range(7):
            _, reward, *_ = env.step(1 + side * (np.sign(env.ball - env.paddle) or side < 0))
        assert reward == side and env.paddle in range(8)
    assert balls == set(range(8))


def test_discrete_actions_may_start_at_one():
    gymnasium.register("tests/Offset-v0", type("Offset", (Counting,), dict(
        action_space=Discrete(3, start=1))))
    rows = play_rows(d.make_envs("tests/Offset-v0"), [0, 2])
    assert [r.image[0, 0, 0, 0] for r in rows] == [0, 11, 23] and rows[2].action[0, 2] == 1


@pytest.mark.parametrize("reward", [
    np.ones(1), np.ones((1, 1)), np.array(1.0), np.array([[1]]), np.float32(1), 1, True])
def test_rewards_of_any_shape_and_type(reward):
    with toy_game(step=lambda *_: (Colours.image, reward, False, False, {})) as game:
        envs = d.make_envs(game, num_envs=2)
        assert play_rows(envs, [0])[1].reward.tolist() == [1.0, 1.0]
        envs.close()
    envs.vector_env.close = mock.Mock(side_effect=BrokenPipeError)
    envs.close()


@pytest.mark.parametrize("result, said", [
    ((Colours.image, math.nan), "not finite"), ((Colours.image, np.array([-np.inf])), "finite"),
    ((Colours.image, np.ones(2)), "ValueError: "), ((Colours.image, "?"), "Error: "),
    ((Colours.image, 1e39), "finite"), ((Colours.image * 1.0, 1), "ValueError: images must be")])
def test_a_step_that_makes_no_sense_ends_in_one_line(result, said, tmp_path, capsys):
    with toy_game(step=lambda *_: (*result, False, False, {})) as game:
        assert run("--game", game, *QUICK, "--logdir", tmp_path, "--steps", 10) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"dreamerv2.py: --game {game}: ") and said in last
    assert np.isfinite(np.load(tmp_path / "replay" / "rows.npy")["reward"]).all()


@pytest.mark.parametrize("name, show", [
    (name, []) for name in ("new_agent", "Replay", "training_loop", "choose", "evaluate")
] + [("evaluate", ["--eval"]), ("draw_play", ["--eval"]), ("choose", ["--dream"])])
def test_games_are_closed_when_an_exception_passes(name, show, tmp_path, monkeypatch):
    """Nor is one left open by the same command when none does."""
    with toy_game() as game:
        flags = ("--game", game, *QUICK, "--logdir", tmp_path, "--num-envs", 2, "--steps")
        assert run(*flags, 24) == run(*flags, 24, *show) == 0 and not Colours.open
        made = Colours.made
        monkeypatch.setattr(d, name, mock.Mock(side_effect=ZeroDivisionError))
        with pytest.raises(ZeroDivisionError):
            run(*flags, 28, *show)
        assert Colours.made > made


def test_a_game_of_which_one_can_exist_is_trained_and_not_evaluated(tmp_path, capsys):
    def alone(self):
        if Colours.open:
            raise RuntimeError("the port is taken")
        Colours.__init__(self)

    with toy_game(__init__=alone) as game:
        flags = ("--game", game, *QUICK, "--logdir", tmp_path, "--steps")
        assert run(*flags, 30) == 1 and counters(tmp_path)["step"] == 30
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith(f"dreamerv2.py: --game {game}: ")
        assert "the port is taken" in last and "--eval-episodes 0" in last
        assert run(*flags, 40, "--eval-episodes", 0) == run(*flags, 40, "--eval") == 0


# --------------------------------------------------------------------------- running

def test_main_job(tmp_path):
    """On the real emulator. In a log file the progress bar is a few lines."""
    flags = ["--game", "Breakout", *QUICK, "--prefill-steps", 100, "--steps", 200,
             "--log-every-steps", 100, "--eval-every-steps", 150, "--logdir", "run"]
    with open(tmp_path / "log", "wb") as log:
        out = subprocess.run([sys.executable, HERE / "dreamerv2.py", *map(str, flags)],
                             stdout=subprocess.PIPE, stderr=log, text=True, cwd=tmp_path)
    shown, rows = (tmp_path / "log").read_text(), lines(tmp_path / "run")
    assert out.returncode == 0 and "200/200" in shown, shown
    assert shown.count("\n") <= 6 and shown.count("\r") <= 3 and len(shown) < 500
    assert "breakout: 18 actions, 4 frame(s) a decision;" in out.stdout and "fp32 on" in out.stdout
    assert all(math.isfinite(v) for row in rows for v in row.values())
    last = rows[-1]
    assert (last["step"], last["frames"], last["updates"]) == (200, 800, 25)
    assert last.keys() >= set("""step frames updates wall_time_s image_mse reward_loss kl
        discount_loss prior_entropy posterior_entropy actor_entropy actor_loss critic_loss value
        returns model_grad_norm actor_grad_norm critic_grad_norm episode_return episode_length
        updates_per_s frames_per_s eval_return eval_length""".split())
    written = int(np.load(tmp_path / "run" / "replay" / "written.npy")[0])
    assert written - 1 - last["step"] in (last["episodes"] - 1, last["episodes"])  # resets
    found = {p.name for p in (tmp_path / "run").iterdir() if "tfevents" not in p.name}
    assert found == {"config.json", "metrics.jsonl", "checkpoint.pt", "previous.pt", "lock",
                     "replay", "dream.png"}


def test_run_resumes_without_a_burst(tmp_path, capsys, monkeypatch):
    """And metrics.jsonl goes on from the checkpoint's line, before which nothing is cut."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "updates": 0}\n')
    flags = (*CATCH, "--logdir", tmp_path, "--steps")
    assert run(*flags, 40) == 0
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 45, "upda')  # torn by a kill
    assert run(*flags, 60) == 0
    assert "40 decisions made in" in capsys.readouterr().out
    assert [(r["step"], r["updates"]) for r in lines(tmp_path)] == [(1, 0), (40, 5), (60, 10)]
    for steps in (60, 50):
        assert run(*flags, steps) == 0 and "decisions are made" in capsys.readouterr().out
    assert len(lines(tmp_path)) == 3
    monkeypatch.setattr(d, "evaluate", lambda *_: np.array([[1.0, 5], [2, 6], [6, 7]]))
    assert run("--logdir", tmp_path, "--eval", "--game", "catch") == 0  # any spelling
    assert ("episodes: 3, mean score 3.00, median 2.00, standard deviation 2.16,"
            " mean length 6.0 decisions\n") in capsys.readouterr().out


@pytest.mark.parametrize("steps, bright", [(10, (8, 5)), (24, (8, 5)), (10, (200, 100))])
def test_a_run_says_what_it_cannot_learn_from(bright, steps, tmp_path, capsys):
    image = np.select([Colours.image == 200, Colours.image == 100], bright).astype(np.uint8)
    with toy_game(image=image) as game:
        assert run("--game", game, *QUICK, "--logdir", tmp_path, "--steps", steps) == 0
    out = capsys.readouterr().out
    assert ("warning: the first images are dim, brightest 8 of 255" in out) == (bright[0] == 8)
    assert ("nothing was learned yet: --prefill-steps is 20" in out) == (steps < 24)


def test_a_game_whose_actions_changed_is_one_line(tmp_path, capsys, box=Box(-1, 1, (2,))):
    for space, extra in (Discrete(2), ("--steps", 24)), (box, ("--eval",)), (box, ("--steps", 30)):
        with toy_game(action_space=space) as game:
            assert run("--game", game, *QUICK, "--logdir", tmp_path, *extra) == 2 * (space is box)
        said = "checkpoint.pt is of other actions or images" in capsys.readouterr().err
        assert said == (space is box)
    assert json.loads((tmp_path / "config.json").read_text())["steps"] == 24


@pytest.fixture
def in_step(monkeypatch):
    """in_step(count, function): Catch calls function in its count-th step from here on."""
    def hook(count, function):
        real, left = d.Catch.step, itertools.count(count, -1)
        monkeypatch.setattr(d.Catch, "step", lambda self, action: (
            next(left) == 1 and function(), real(self, action))[1])
    return hook


@pytest.mark.parametrize("number, step, saved", [
    (signal.SIGINT, 33, 33), (signal.SIGTERM, 33, 33), (signal.SIGTERM, 44, 40)])
def test_ctrl_c_and_sigterm_lose_nothing(number, step, saved, tmp_path, in_step, capsys):
    """In training, and in the evaluation after decision 40, which is ended."""
    flags, before = (*CATCH, "--logdir", tmp_path), signal.getsignal(number)
    in_step(step, lambda: signal.raise_signal(number))
    assert run(*flags, "--steps", 10**6, "--eval-every-steps", 40, stops=True) == 128 + number
    assert "on from here" in capsys.readouterr().out and signal.getsignal(number) is before
    found, line = counters(tmp_path), lines(tmp_path)[-1]
    assert found["step"] == line["step"] == saved and ("eval_return" in line) == (step > 40)
    assert found["updates"] == line["updates"] == (saved - 20) // 4
    assert run(*flags, "--steps", 48) == 0 and lines(tmp_path)[-1]["updates"] == 7


def test_the_last_evaluation_is_logged_and_no_signal_undoes_it(tmp_path, in_step):
    """Although no gradient step came since the line before. The run is then complete."""
    in_step(35, lambda: signal.raise_signal(signal.SIGTERM))
    assert run(*CATCH, "--logdir", tmp_path, "--log-every-steps", 32, "--steps", 34) == 0
    assert [(x["step"], "eval_return" in x, "kl" in x) for x in lines(tmp_path)] == [
        (32, False, True), (34, True, False)]


HANG = mock.Mock(side_effect=lambda: (  # and the second signal ends it
    signal.raise_signal(signal.SIGTERM), signal.raise_signal(signal.SIGINT), pytest.fail()))
FALL = mock.Mock(side_effect=RuntimeError("it fell\nover"))


@pytest.mark.parametrize("end, step, status, saved, said", [
    (HANG, 33, 130, 32, "goes on from its last checkpoint"),
    (HANG, 44, 130, 39, "goes on from its last checkpoint"),  # and evaluates again
    (FALL, 33, 1, 32, "--game Catch: RuntimeError: it fell over; "),
    (FALL, 44, 1, 40, "--eval-episodes 0 trains without evaluations")])
def test_a_game_that_hangs_or_raises_does_not_take_the_replay_with_it(
        end, step, status, saved, said, tmp_path, in_step, capsys):
    """In training, and in the evaluation after decision 40. The same command goes on."""
    in_step(step, end)
    flags = (*CATCH, "--logdir", tmp_path, "--eval-every-steps", 40, "--steps", 48)
    assert run(*flags, "--checkpoint-minutes", 0, stops=True) == status
    shown = capsys.readouterr()
    assert said in shown.out + shown.err and "Traceback" not in shown.err
    assert status == 130 or shown.err.endswith(f"the checkpoint in {tmp_path} is good\n")
    assert counters(tmp_path)["step"] == saved
    assert run(*flags) == 0 and lines(tmp_path)[-1]["step"] == 48


def test_a_game_of_the_current_folder_is_found(monkeypatch):
    monkeypatch.setattr(sys, "path", [x for x in sys.path if x not in ("", os.getcwd())])
    monkeypatch.delitem(sys.modules, "apart", raising=False)
    Path("apart.py").write_text("import gymnasium, dreamerv2\n"
                                "gymnasium.register('Apart-v0', dreamerv2.Catch)\n")
    assert run("--game", "apart:Apart-v0", *QUICK, "--steps", 10, "--logdir", "run") == 0
    del gymnasium.registry["Apart-v0"]


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_help_and_paths_on_any_console(encoding, tmp_path, monkeypatch):
    """Help shows every default. Consoles that know no Greek show "?"."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", streams[0]), patch.setattr(sys, "stderr", streams[1])
        with pytest.raises(SystemExit) as stop:
            run("-h")
        assert run(*CATCH, "--steps", 10, "--logdir", tmp_path / "β") == 0
        assert run(*CATCH, "--gamma", 0.5, "--logdir", tmp_path / "β") == 2
    assert [stream.flush() for stream in streams] and stop.value.code == 0
    out, err = (stream.buffer.getvalue().decode(encoding) for stream in streams)
    beta = "β" if encoding == "utf-8" else "?"
    assert f"weight {beta} of" in out and "10 decisions" in out and f"{beta}\n" in err
    assert out.count("(default:") == len(dataclasses.fields(d.Config))


@pytest.mark.parametrize("idle", [(), ("--sticky", 0.1)])
def test_a_tilde_is_the_home_folder_and_idle_flags_are_named(idle, tmp_path, monkeypatch, capsys):
    """In a thread, where there are no signals; notebooks and supervisors do that."""
    monkeypatch.setenv("HOME", str(tmp_path)), monkeypatch.setenv("USERPROFILE", str(tmp_path))
    thread = threading.Thread(target=run, args=(*CATCH, "--steps", 10, "--logdir=~/x", *idle))
    thread.start(), thread.join()
    assert counters(tmp_path / "x")["step"] == 10 and not Path("~").exists()
    assert ("--sticky affect Atari only" in capsys.readouterr().out) == bool(idle)


def test_a_file_that_somebody_reads_is_renamed_a_little_later(monkeypatch):
    """On Windows that is no permission. But it is not tried for ever."""
    replace, sleep = mock.Mock(side_effect=[PermissionError, None]), mock.Mock()
    monkeypatch.setattr(os, "replace", replace), monkeypatch.setattr(time, "sleep", sleep)
    d.rename("old", "new")
    assert replace.call_args_list == [mock.call("old", "new")] * 2 and sleep.call_count == 1
    replace.side_effect = PermissionError
    pytest.raises(PermissionError, d.rename, "old", "new")


def test_same_seed_same_numbers_and_evaluations_do_not_change_them(tmp_path):
    for name, episodes, every in ("a", 2, 24), ("b", 2, 24), ("c", 0, 1000):
        assert run("--game", "Breakout", *QUICK, "--logdir", tmp_path / name, "--steps", 48,
                   "--log-every-steps", 8, "--eval-every-steps", every, "--time-limit", 15,
                   "--eval-episodes", episodes) == 0
    assert 12 == len({d.make_game(d.Config(game="Catch", seed=seed), 1, purpose, steps).seed
                      for seed in (0, 1) for purpose in range(3) for steps in (0, 9)})
    x, y = (d.new_agent(d.Config(**DEBUG, seed=seed), d.make_envs("Catch")) for seed in (0, 1))
    assert not torch.equal(x.actor[0].weight, y.actor[0].weight)
    a, b, c = ([{k: v for k, v in row.items() if not k.endswith("_s")}  # no times
                for row in lines(tmp_path / name)] for name in "abc")
    assert a == b != c and len(a) == 4
    assert [{k: v for k, v in row.items() if "eval" not in k} for row in a] == c


def test_a_resumed_run_plays_other_episodes_than_those_undone(short_run, monkeypatch):
    """From one checkpoint twice, with rows of a first try in the replay: other seeds."""
    seeds, real = [], d.Envs.reset
    monkeypatch.setattr(d.Envs, "reset", lambda self: (seeds.append(self.seed), real(self))[1])
    act = watch(monkeypatch, "act", d.Agent)
    checkpoint = (short_run / "checkpoint.pt").read_bytes()
    for _ in range(2):
        (short_run / "checkpoint.pt").write_bytes(checkpoint)
        assert run(*CATCH, "--logdir", short_run, "--steps", 44, "--eval-episodes", 0) == 0
    assert len(set(seeds)) == len(seeds) == 2 and act.inputs["memory"] and not act.inputs["greedy"]


def test_a_run_with_continuous_actions(tmp_path, capsys):
    """ρ is 0 by itself and printed; random play fills the box; it resumes."""
    flags = ("--game", "tests/Levers-v0", *QUICK, "--prefill-steps", 100, "--logdir", tmp_path)
    Levers.played.clear()
    assert run(*flags, "--steps", 120, "--action-repeat", 2) == 0
    assert "rho 0\n" in capsys.readouterr().out and lines(tmp_path)[-1]["frames"] == 240
    first = np.array(Levers.played[:200])
    assert np.abs([first.min(0) - [0, -10], first.max(0) - [4, 30]]).max() < 1.5
    assert run(*flags, "--steps", 124) == 0  # its settings are the folder's
    assert lines(tmp_path)[-1]["frames"] == 248 and run("--logdir", tmp_path, "--eval") == 0


@pytest.mark.slow
@pytest.mark.parametrize("before, after, flags", [
    (-3, -1.3, "--game tests/Dot-v0 --action-repeat 1 --no-reward-tanh --no-discount-head"
     " --entropy-scale 1e-3 --steps 8000"),
    (-0.5, 0.0, "--game Catch --no-discrete-latents --entropy-scale 3e-2 --steps 20000")])
def test_continuous_actions_and_gaussian_latents_learn(before, after, flags, tmp_path):
    """To move a dot: -4.1 at random, -0.2 going straight there. Catch: -0.75 at random."""
    flags += (" --steps-per-update 2 --seq-len 8 --horizon 6 --actor-lr 1e-3 --anneal-steps 0"
              " --return-scale 0")
    assert run("--preset", "small", *flags.split(), "--logdir", tmp_path) == 0
    scores = [row["episode_return"] for row in lines(tmp_path)]
    assert scores[0] < before and np.mean(scores[-2:]) > after


FLAGS = dict(
    game="freeway", preset="debug", steps=60, seed=7, device="cpu", precision="bf16",
    cuda_graphs=False, num_envs=2, action_repeat=3, sticky=0.5, max_noops=5, time_limit=40,
    full_action_space=False, replay_capacity=900, prefill_steps=30, steps_per_update=8,
    batch_size=3, seq_len=7, num_latents=5, num_classes=3, deter_size=9, hidden_size=11,
    cnn_depth=3, mlp_layers=1, mlp_units=13, kl_scale=0.3, kl_balance=0.5, free_nats=1.0,
    discount_scale=2.0, discount_head=False, reward_tanh=False, model_lr=1e-3, horizon=3,
    gamma=0.9, return_lambda=0.5, reinforce_mix=0.5, entropy_scale=0.01, anneal_steps=200,
    reinforce_mix_end=0.7, entropy_scale_end=1e-4, actor_lr=1e-3, critic_lr=1e-3,
    slow_every_updates=3, slow_baseline=True, shifted_advantage=True, layer_norm=False,
    reward_gradients=False, discrete_latents=False, kl_balancing=False, policy_reinforce=False,
    image_gradients=False, symexp_twohot=True, free_bits=0.5, return_scale=1.0, unimix=0.05,
    adam_eps=1e-4, grad_clip=1.0, weight_decay=1e-4, log_every_steps=20, eval_every_steps=50,
    eval_episodes=2, checkpoint_minutes=0.0)


def as_flags(settings):
    for name, value in settings.items():
        no = "--no-" if value is False else "--"
        yield from [no + d.flag(name)[2:]] + [str(value)] * (not isinstance(value, bool))


def test_every_flag_runs(tmp_path, monkeypatch, capsys):
    """All flags at once, none at its default: config.json holds them, and they arrive."""
    assert all(FLAGS[k] != v for k, v in vars(d.Config()).items() if k != "logdir")
    calls = [watch(monkeypatch, name, owner) for owner, name in (
        (d.Optimizer, "__init__"), (d.Replay, "sample"), (d, "make_envs"), (d, "evaluate"))]
    assert run("--logdir", tmp_path, *as_flags(FLAGS)) == 0
    written = json.loads((tmp_path / "config.json").read_text())
    assert written == FLAGS | {"logdir": str(tmp_path)}
    last = lines(tmp_path)[-1]
    assert last["updates"] == (last["step"] - 30) // 8 and last["frames"] == 3 * last["step"]
    got = {k: v for call in calls for k, v in call.inputs.items()}
    meant = FLAGS | dict(lr=1e-3, eps=1e-4, clip=1.0, decay=1e-4, episodes=2, num_envs=1)
    same = {k for k in got if k in meant and k != "seed"}
    assert len(same) == 14 and {k: got[k] for k in same} == {k: meant[k] for k in same}
    assert [last["eval_return"], last["eval_length"]] == calls[-1].output.mean(0).tolist()
    assert "affect" not in capsys.readouterr().out  # these are Atari's


@pytest.mark.parametrize("name", d.PRESETS)
def test_flags_go_over_those_of_every_preset(name):
    config, _ = d.parse_config(["--preset", name, "--gamma", "0.5", "--game", "Catch"])
    assert config == d.Config(**PRESETS[name] | dict(
        gamma=0.5, game="Catch", preset=name, logdir=f"runs/Catch-{name}-seed0"))


@pytest.mark.parametrize("device, preset, other", [
    ("cpu", "small", "atari"), ("cuda", "atari", "small")])
def test_the_preset_suits_the_device(device, preset, other, monkeypatch, capsys):
    monkeypatch.setattr(d, "pick_device", lambda name: torch.device(device))
    config, _ = d.parse_config(["--game", "Catch"])
    assert (config.preset, config.logdir) == (preset, f"runs/Catch-{preset}-seed0")
    assert f"--preset {other}" in capsys.readouterr().out


BAD = """--step 9|--steps|--steps 0|--steps 1.5|--steps many|--seed -1|--batch-size -1|Pong
--horizon 0|--horizon 1 --shifted-advantage|--layer-norm=no|--no-such-flag|--gamma 1.01
--gamma nan|--steps-per-update 0|--model-lr 0|--sticky 2|--num-envs 0|--seq-len 0
--replay-capacity 0|--replay-capacity 10000000000000|--device cuda:99|--device toaster
--precision tf32|--anneal-steps -1|--reinforce-mix-end 1.5|--entropy-scale-end -1|--kl-balance 1.2
--checkpoint-minutes -1|--checkpoint-minutes inf|--num-classes 1|--time-limit 0|--game=
--time-limit 1000000000|--eval-episodes -1|--max-noops -1|--action-repeat -4|--free-nats -1
--grad-clip -1|--game combat|--game joust|--game maze_craze|--game warlords|--game tests:
--replay-capacity 3|--adam-eps 0|--unimix 2|--return-lambda 2|--reinforce-mix 2|--weight-decay 2"""
BAD = [(flags, flags.split()[0].split("=")[0]) for flags in re.split(r"[|\n]", BAD)] + [
    ("--game Brekout", "`Breakout`"), ("--eval", "train first"), ("--dream", "train first"),
    ("--game CartPole-v1", "images"), ("--game NoSuch-v0", "module:id"),
    ("--game no_module:Game-v0", "no_module"), ("--game :X-v0", "Empty module name"),
    ("--preset smal", "'small'"), ("--seq-len 500", "--prefill-steps"),
    ("--num-envs 3", "--prefill-steps"),
    ("--eval --dream", "not allowed"), (f"--logdir {sys.executable}", sys.executable)]  # a file


@pytest.mark.parametrize("flags, named", BAD, ids=[flags for flags, _ in BAD])
def test_bad_input_is_one_line_and_status_2(flags, named, tmp_path, capsys):
    assert run(*CATCH, "--logdir", tmp_path / "run", *flags.split()) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("dreamerv2.py: ") and named in err
    assert not (tmp_path / "run").exists()  # nothing on disk is touched


def test_a_game_that_cannot_be_made_is_one_line_of_its_own_words(tmp_path, capsys, monkeypatch):
    """One that raises; on Atari a ROM that is missing, and one that is damaged."""
    monkeypatch.setenv("ALE_ROMS_DIR", str(tmp_path))
    (tmp_path / "pong.bin").write_bytes(b"x")
    broken = mock.Mock(side_effect=[x("no tape") for x in (KeyError, OSError, SystemExit)])
    with toy_game(__init__=broken) as toy:
        for game, said in [(toy, "KeyError: 'no tape'"), (toy, "OSError: no tape"),
                           (toy, "SystemExit: no tape"),
                           ("breakout", "breakout.bin"), ("pong", "pong.bin")]:
            assert run("--game", game, *QUICK, "--logdir", tmp_path / "run") == 2
            err = capsys.readouterr().err
            assert err.count("\n") == 1 and f"--game {game}: " in err and said in err
    half = dict(action_space=MultiDiscrete([2]), close=lambda x: Colours.open.remove(x) or x.window)
    with toy_game(**half) as toy, pytest.raises(d.UsageError, match=f"{toy}: AttributeError"):
        d.make_envs(toy)
    monkeypatch.setitem(sys.modules, "ale_py.roms", None)  # cannot be imported
    assert run("--game", "pong", "--logdir", tmp_path / "run") == 2
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------- crash safety

@pytest.fixture(scope="session")
def first_run(tmp_path_factory):
    """A run of 40 decisions, whose checkpoint before is of the 30th."""
    logdir = tmp_path_factory.mktemp("first") / "run"
    assert run(*CATCH, "--steps", 30, "--logdir", logdir) == 0
    before = (logdir / "checkpoint.pt").read_bytes()
    assert run(*CATCH, "--steps", 40, "--logdir", logdir) == 0
    (logdir / "previous.pt").write_bytes(before)
    return logdir


@pytest.fixture
def short_run(first_run, tmp_path):
    return Path(shutil.copytree(first_run, tmp_path / "run"))


def test_a_checkpoint_restores_everything(tmp_path):
    a, b = (tiny_agent(slow_every_updates=2, return_scale=1.0) for _ in range(2))
    batch = random_batch()
    rows, again = (counting_replay(tmp_path / x, 40, 50, seed=i) for i, x in enumerate("ab"))
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    config = d.Config(logdir=str(tmp_path))
    assert d.read_checkpoint(tmp_path) is None
    [a.train_step(batch) for _ in range(3)], rows.sample(4, 3)
    d.save_checkpoint(config, a, rows, dict(step=7, episodes=2, updates=3))
    expected = [a.train_step(batch) for _ in range(3)], rows.sample(9, 3)
    saved = d.read_checkpoint(tmp_path)
    assert saved["counters"] == dict(step=7, episodes=2, updates=3) and saved["log_bytes"] == 3
    d.resume(b, again, saved)
    found = [b.train_step(batch) for _ in range(3)], again.sample(9, 3)
    assert_close(found, expected, rtol=0, atol=0)
    assert saved["config"] == vars(config) and a.updates == b.updates == 6


WITNESS = """
import os, sys, zlib
sys.path.insert(0, sys.argv[1])
import dreamerv2 as d
log, add = open(sys.argv[2], "a", buffering=1), d.Replay.add
def witnessed(replay, image, *rest):
    row = [zlib.crc32(image), rest[0].argmax(), *(int(x[0]) for x in rest[1:])]
    print(os.getpid(), replay.written[0], *row, file=log)
    add(replay, image, *rest)
d.Replay.add = witnessed
sys.exit(d.main(sys.argv[3:]))
"""


def check_replay(logdir, log):
    """Every row that can be sampled is what was last written under its number, and no number
    is left out, nor taken twice, but by the row that a kill stopped. All that was logged."""
    rows, (written,) = (np.load(logdir / "replay" / f"{x}.npy") for x in ("rows", "written"))
    table = [[*map(int, line.split())] for line in log.read_text().splitlines()]
    last = {number: row for _, number, *row in table}
    assert written <= len(last)
    for number in range(max(0, written - rows.shape[1] + 1), written):
        image, action, *rest = rows[0, number % rows.shape[1]]
        assert [zlib.crc32(image), action.argmax(), *map(int, rest)] == last[number], number
    for (process, number, *_), (process_after, after, *_) in itertools.pairwise(table):
        assert after == number + 1 or process != process_after and after == number
    return table


@pytest.mark.parametrize("kills", [3, pytest.param(25, marks=pytest.mark.slow)])
def test_killed_at_random_moments(kills, tmp_path):
    """kill -9 on the real emulator; the ring is full and wraps. All rows are whole then, the
    next process goes on, at most two decisions back, and metrics.jsonl repeats no line."""
    rng, log, logdir, steps = np.random.default_rng(), tmp_path / "log", tmp_path / "run", 0
    command = [sys.executable, "-c", WITNESS, HERE, log, "--game", "Breakout", *map(str, QUICK),
               "--checkpoint-minutes", "0", "--replay-capacity", "50", "--log-every-steps",
               "10", "--eval-every-steps", "100000", "--logdir", logdir, "--steps"]
    for _ in range(kills):
        job = subprocess.Popen(command + ["20000"], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
        while not (log.exists() and f"{job.pid} " in log.read_text()):
            assert job.poll() is None
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 1))
        job.kill()
        assert job.wait() == -signal.SIGKILL
        played = sum(row[0] == job.pid and not row[5] for row in check_replay(logdir, log))
        before, steps = steps, d.read_checkpoint(logdir)["counters"]["step"]
        assert before + played - 2 <= steps <= before + played
    done = subprocess.run(command + [str(steps + 60)], capture_output=True)
    assert done.returncode == 0, done.stderr
    check_replay(logdir, log)
    assert all(r["updates"] == (r["step"] - 20) // 4 for r in lines(logdir))


@contextlib.contextmanager
def dies(monkeypatch, stage):
    """As killed before the disk is touched, or a game evaluated, the `stage`th time."""
    left, Killed = itertools.count(stage, -1), type("Killed", (BaseException,), {})

    def before(function):
        def counted(*args, **kwargs):
            if next(left) <= 0:
                raise Killed
            return function(*args, **kwargs)
        return counted

    with monkeypatch.context() as patch, pytest.raises(Killed):
        for place, name in ((os, "replace"), (os, "fsync"), (np, "save"), (torch, "save"),
                            (os, "posix_fallocate"), (d, "evaluate")):
            patch.setattr(place, name, before(getattr(place, name)))
        yield


@pytest.mark.parametrize("begun, stage", [
    *((False, stage) for stage in range(11)), *((True, stage) for stage in range(6))])
def test_killed_at_any_moment_of_a_start(begun, stage, tmp_path, first_run, monkeypatch):
    """The same command then begins or goes on; no checkpoint is lost before a later is there."""
    logdir = tmp_path / "run"
    if begun:
        shutil.copytree(first_run, logdir)
        (logdir / "checkpoint.pt").write_bytes(b"")
    flags = (*CATCH, "--logdir", logdir, "--steps", 34)
    monkeypatch.setattr(d, "to_png", lambda frames: b"")  # which takes half of the time
    with dies(monkeypatch, stage):
        run(*flags)
    assert not begun or d.read_checkpoint(logdir)["counters"]["step"] >= 30
    assert run(*flags) == 0
    assert d.read_checkpoint(logdir)["counters"]["step"] == lines(logdir)[-1]["step"] == 34
    assert "eval_return" in lines(logdir)[-1]


DAMAGE = dict(
    truncated=lambda data: data[:len(data) // 2], emptied=lambda data: b"",
    flipped=lambda data: data[:len(data) // 2] + bytes([data[len(data) // 2] ^ 16])
    + data[len(data) // 2 + 1:])  # a bit of a weight, which only the checksum shows


@pytest.mark.parametrize("damage", [*DAMAGE, None])
def test_a_damaged_checkpoint_is_named_and_the_one_before_goes_on(damage, short_run, capsys):
    """None: there is no checkpoint, a kill came between the two renames."""
    path = short_run / "checkpoint.pt"
    path.write_bytes(DAMAGE[damage](path.read_bytes())) if damage else path.unlink()
    bad = contents(short_run)
    capsys.readouterr()
    assert run("--logdir", short_run, "--eval") == 0
    out = capsys.readouterr().out
    assert (f"{path} is damaged" in out) == bool(damage) and contents(short_run) == bad
    assert f"30 decisions made in {short_run}" in out
    assert run(*CATCH, "--logdir", short_run, "--steps", 45) == 0
    assert lines(short_run)[-1]["step"] == counters(short_run)["step"] == 45
    with mock.patch.object(torch, "load", side_effect=PermissionError("not now")):
        assert run("--logdir", short_run, "--eval") == 2 and "not now" in capsys.readouterr().err


@pytest.mark.parametrize("names, damage, said", [
    (["replay/rows.npy"], DAMAGE["truncated"], "or is damaged"),
    (["replay/written.npy"], None, "or is damaged"),
    (["checkpoint.pt", "previous.pt"], None, "its checkpoint is missing"),
    (["checkpoint.pt", "previous.pt"], DAMAGE["flipped"], "no checkpoint in"),
    (["lock"], lambda data: b"long enough to be no database" * 40, "is not a database")])
def test_what_cannot_be_read_is_one_line_and_left_as_it_is(names, damage, said, short_run, capsys):
    for path in (short_run / name for name in names):
        path.write_bytes(damage(path.read_bytes())) if damage else path.unlink()
    bad = contents(short_run)
    assert run(*CATCH, "--logdir", short_run, "--steps", 50) == 2 and contents(short_run) == bad
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and said in err and str(short_run) in err


def test_changed_settings_are_refused_by_name_or_said(short_run, capsys):
    base, before = (*CATCH, "--logdir", short_run), contents(short_run)
    for flags, said in [("--gamma 0.9 --horizon 3 --steps 50", "--gamma 0.9 (was 0.995),"
                         " --horizon 3 (was 4): choose another --logdir"),
                        ("--game Breakout", "--game breakout (was Catch)"),
                        ("--preset small", "--preset small (was debug)")]:
        assert run(*base, *flags.split()) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and said in err and "--steps" not in err
    assert contents(short_run) == before
    (short_run / "config.json").unlink(), (short_run / "metrics.jsonl").unlink()  # for people
    assert run("--logdir", short_run, "--steps", 44, "--eval-episodes", 2, "--log-every-steps",
               50, "--precision", "fp32", "--no-cuda-graphs", "--device", "cpu") == 0
    assert "--steps 44 (was 40), --eval-episodes 2 (was 1), --log-ev" in capsys.readouterr().out
    written = json.loads((short_run / "config.json").read_text())
    assert written["steps"] == lines(short_run)[-1]["step"] == 44
    torch.save(dict(config=dict(steps=1)), short_run / "checkpoint.pt")
    assert run(*base, "--steps", 50) == 2 and "another version" in capsys.readouterr().err
    torch.save(d.Config(), short_run / "checkpoint.pt")  # which code could come with
    assert run(*base, "--eval") == 0 and "is damaged: Unpickling" in capsys.readouterr().out


def test_a_full_disk(tmp_path, capsys):
    """EFBIG, as ENOSPC. No room for the replay: status 2, nothing left behind. For the
    checkpoint, once it holds Adam's moments: status 1, the one before is whole."""
    resource, logdir = pytest.importorskip("resource"), tmp_path / "run"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def run_below(size, *flags):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            return run(*flags)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert run_below(1_000_000, *CATCH, "--logdir", logdir) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "replay cannot be made" in err and "[Errno 27]" in err
    assert {p.name for p in logdir.rglob("*")} <= {"lock", "replay", "written.npy"}
    flags = (*CATCH, "--replay-capacity", 50, "--hidden-size", 1000, "--logdir", logdir)
    assert run(*flags, "--steps", 10) == 0
    size = (logdir / "checkpoint.pt").stat().st_size
    assert run_below(int(1.2 * size), *flags, "--steps", 30) == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err and "[Errno 27]" in err
    assert err.endswith(f"the checkpoint in {logdir} is good\n")
    assert counters(logdir)["step"] == 10 and not (logdir / "checkpoint.new").exists()
    assert run(*flags, "--steps", 30) == 0 and lines(logdir)[-1]["step"] == 30


def test_a_second_process_is_refused_and_sigterm_frees_the_folder(tmp_path, capsys):
    flags = (*CATCH, "--checkpoint-minutes", 0, "--logdir", tmp_path, "--steps", 20_000)
    job = subprocess.Popen([sys.executable, HERE / "dreamerv2.py", *map(str, flags)], text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    while not (tmp_path / "previous.pt").exists():
        assert job.poll() is None
        time.sleep(0.02)
    assert run(*flags) == 2 and re.fullmatch(".* in use.* locked\n", capsys.readouterr().err)
    assert run("--logdir", tmp_path, "--eval") == 0  # to look is free
    job.terminate()
    assert "the same command goes on" in job.communicate()[0] and job.returncode == 143
    assert run(*flags[:-1], counters(tmp_path)["step"] + 10) == 0


@pytest.mark.parametrize("name, module", [
    ("critic_loss", "critic"), ("reward_loss", "world_model.reward_head"),
    ("image_loss", "world_model.decoder")])
def test_a_number_that_is_not_finite_stops_the_run(name, module, short_run, capsys, monkeypatch):
    """The term, the update, the last good checkpoint, which stays as it is: status 1."""
    real = d.Agent.train_step

    def poisoned(agent, batch, step):
        assert step == 20 + 4 * (agent.updates + 1)  # the decisions, by which a run anneals
        if agent.updates == 7:
            next(agent.get_submodule(module).parameters()).data.fill_(math.nan)
        return real(agent, batch, step)

    flags = (*CATCH, "--logdir", short_run, "--steps", 80)
    with monkeypatch.context() as patch:
        patch.setattr(d.Agent, "train_step", poisoned)
        assert run(*flags) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.match(f"dreamerv2.py: not finite: .*\\b{name}\\b", said)
    assert said.endswith(f"; the checkpoint in {short_run} is good")
    assert counters(short_run)["step"] == 40  # not poisoned by a save at the end
    assert run(*flags) == 0


@pytest.mark.parametrize("minutes, expected", [(1000, [0, 100]), (0, [*range(101)]), (1, None)])
def test_checkpoints_come_by_the_clock(minutes, expected, tmp_path, monkeypatch):
    """By one that goes on by a second when it is read, some times a decision."""
    saves, real = [], d.save_checkpoint
    monkeypatch.setattr(d.time, "monotonic", itertools.count().__next__)
    monkeypatch.setattr(d, "save_checkpoint", lambda config, agent, replay, counters: (
        saves.append(counters["step"]), real(config, agent, replay, counters)))
    assert run(*CATCH, "--logdir", tmp_path, "--prefill-steps", 200, "--steps", 100,
               "--checkpoint-minutes", minutes) == 0
    assert counters(tmp_path, "previous.pt")["step"] == saves[-2]
    between = np.diff(saves)[:-1]  # the last one is at the end
    assert sorted(set(saves)) == expected or minutes == 1 and len(between) and (
        10 <= between.min() <= between.max() <= 60)


# ---------------------------------------------------------------- speed and arithmetic

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
COMPARED = "image_loss reward_loss discount_loss kl model_loss actor_entropy critic_loss".split()
counted = pytest.mark.skipif(torch.__version__ < "2.13", reason="older torch counts otherwise")


@pytest.fixture
def meta_agent(monkeypatch):
    """Makes an agent on the device "meta", whose tensors have a shape and no numbers, and a
    batch for it. The device knows neither autocast nor fused Adam."""
    adam = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW",
                        lambda *args, **kw: adam(*args, **kw | dict(fused=False)))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())

    def make(config, num_actions, continuous=False):
        size = config.seq_len, config.batch_size
        batch = {k: torch.empty(*size, *v.shape[2:], dtype=v.dtype, device="meta")
                 for k, v in random_batch(1, 1, num_actions).items()}
        return d.Agent(config, num_actions, 1, "meta", continuous), batch
    return make


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("settings", [
    {}, dict(reinforce_mix=0.5), dict(discrete_latents=False), dict(
        symexp_twohot=True, free_bits=1.0, return_scale=1.0, unimix=0.01)])
def test_a_step_and_a_decision_stay_on_their_device_and_read_nothing_back(
        settings, continuous, meta_agent):
    (agent, batch), memory = meta_agent(d.Config(**DEBUG, **settings), 3, continuous), None
    for greedy in (False, True):
        action, memory = agent.act(batch["image"][0], batch["is_first"][0], memory, greedy)
    metrics = agent.train_step(batch)
    assert {x.device.type for x in (action, *memory.values(), *metrics.values())} == {"meta"}


class Launches(TorchDispatchMode):
    """Counts operations by name, but for views and tensors not yet filled: on a GPU each
    launches a kernel or more."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.name()
        if op.namespace == "aten" and not (op.is_view or "view" in name or "empty" in name):
            self.counts[name.removeprefix("aten::")] += 1
        return op(*args, **(kwargs or {}))


@counted
@pytest.mark.parametrize("precision, rho, most", [
    ("fp32", 1.0, 4688), ("fp32", 0.9, 5734), ("bf16", 1.0, 4994), ("bf16", 0.9, 6145)])
def test_operations_of_a_gradient_step(precision, rho, most):
    """With the paper's T, H and layers; other sizes do not matter. A change that exceeds the
    bound makes a step slower where Python launches the kernels. -s prints what they are."""
    agent = tiny_agent(18, mlp_layers=4, horizon=15, precision=precision, reinforce_mix=rho)
    batch = random_batch(T=50, B=2, A=18)
    agent.update_networks(batch, dynamics=rho < 1)  # in the first, Adam makes its state
    Launches.counts = collections.Counter()
    with Launches():
        agent.update_networks(batch, dynamics=rho < 1)
    total = sum(Launches.counts.values())
    print(f"\n{precision}, rho {rho}: {total} operations", Launches.counts.most_common())
    assert total <= most


def hand_count(c, num_actions):
    """Multiply-adds of one gradient step, times two: forward once; backward twice more
    where both the weights' and the input's gradient are needed."""
    N, H, W, depth = c.seq_len * c.batch_size, c.horizon, c.mlp_units, c.cnn_depth
    S, D, U, E = c.num_latents * c.num_classes, c.deter_size, c.hidden_size, 32 * depth

    def mlp(out):
        return (S + D) * W + (c.mlp_layers - 1) * W * W + W * out

    first = 31 * 31 * 16 * depth  # the image needs no gradient
    encoder = (14 * 14 * 16 * 2 + 6 * 6 * 16 * 8 + 2 * 2 * 16 * 32) * depth ** 2
    decoder = (S + D) * E + E * 25 * 4 * depth + 32 * 32 * 36 * depth + (
        5 * 5 * 25 * 8 + 13 * 13 * 36 * 2) * depth ** 2
    inputs, cell, head = num_actions * U, (U + D) * 3 * D, D * U + U * S  # prior, posterior
    model = N * (2 * first + 2 * inputs + 3 * (
        encoder + decoder + S * U + cell + 2 * head + E * U + 2 * mlp(1)))
    dream = N * (H * (S * U + inputs + cell + head + mlp(num_actions)) + 3 * H * mlp(1))
    behaviour = N * H * (3 * (mlp(num_actions) + mlp(1)) - 2 * (S + D) * W)
    return 2 * (model + dream + behaviour)


@pytest.mark.parametrize("preset, tera", [("atari", 2.375), ("small", 0.01037)])
def test_arithmetic_of_a_step_is_the_hand_count(preset, tera, meta_agent):
    """torch's own counter against the hand: nothing is computed twice or for nothing."""
    config = d.Config(**PRESETS[preset])
    agent, batch = meta_agent(config, 18)
    with FlopCounterMode(display=False) as counter:
        agent.train_step(batch)
    assert counter.get_total_flops() == pytest.approx(hand_count(config, 18), rel=1e-3)
    assert hand_count(config, 18) == pytest.approx(1e12 * tera, rel=2e-3)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux tells")
def test_memory_does_not_grow():
    """Were each update to keep what it computed, 150 of them would hold 50 MB."""
    agent, batch, sums, sizes = tiny_agent(), random_batch(T=6, B=4), 0, []
    for i in range(200):
        metrics = agent.train_step(batch)
        sums = sums + torch.stack(list(metrics.values()))  # as Metrics.add does
        if i in (49, 199):
            gc.collect()
            sizes.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096)
    assert sizes[1] - sizes[0] < 8e6


def test_cuda_graph_copies_in_copies_out_and_keeps_options_and_shapes_apart(monkeypatch):
    """torch.cuda faked on the CPU: a graph that is replayed adds once more, and writes into
    what came out when it was recorded."""
    calls, pools = [], []

    def add(inputs, *, by):
        calls.append((by, len(inputs["x"])))
        add.last = by, inputs["x"], inputs["x"] + by
        return dict(y=add.last[2])

    class Graph:
        def replay(self):
            self.y.copy_(self.x + self.by)

    @contextlib.contextmanager
    def record(graph, pool, stream):
        pools.append(pool)
        yield
        graph.by, graph.x, graph.y = add.last

    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch, "cuda", types.SimpleNamespace(
        Stream=lambda: stream, current_stream=lambda: stream, CUDAGraph=Graph, graph=record,
        graph_pool_handle=lambda: "pool", stream=contextlib.nullcontext))
    graph, results = d.CudaGraph(add), []
    for i in range(8):
        x = torch.full((2,), float(i))
        results.append(graph(dict(x=x), by=10)["y"])
        x.fill_(-1)  # the caller may reuse its tensor at once
    assert [r.tolist() for r in results] == [[10.0 + i] * 2 for i in range(8)]
    assert calls == [(10, 2)] * 4  # three plainly, one recorded, then only replayed
    for i in range(6):
        assert graph(dict(x=torch.ones(3)), by=10)["y"].tolist() == [11.0] * 3
        assert graph(dict(x=torch.ones(2)), by=20)["y"].tolist() == [21.0] * 2
    assert calls[4:] == [(10, 3), (20, 2)] * 4 and pools == ["pool"] * 3  # of three graphs


def one_step(device, precision, batch, num_actions=3, **settings):
    agent = tiny_agent(num_actions, device, precision=precision, cuda_graphs=False, **settings)
    torch.manual_seed(1)
    metrics = agent.train_step(d.upload(batch, agent.device))
    return {k: float(v) for k, v in metrics.items()}, agent


def test_bf16_agrees_with_fp32(monkeypatch):
    """Losses within 2e-2, float32 everywhere outside the layers, and every gradient there. No
    optimiser steps inside an autocast: its copies of the weights would outlive the step."""
    real = d.Optimizer.minimize
    monkeypatch.setattr(d.Optimizer, "minimize", lambda *args: (
        outside.append(not torch.is_autocast_enabled("cpu")), real(*args))[1])
    batch, outside = random_batch(T=8, B=8), []
    small = {k: PRESETS["small"][k] for k in SIZES if not k.startswith(("mlp", "horizon"))}
    exact, _ = one_step("cpu", "fp32", batch, **small)
    rounded, agent = one_step("cpu", "bf16", batch, **small)
    for name in (*COMPARED, "model_grad_norm"):
        print(name, rounded[name], exact[name])
        assert rounded[name] == pytest.approx(exact[name], rel=2e-2, abs=2e-3), name
    assert rounded["reward_mse"] != exact["reward_mse"]  # it did something
    assert outside == [True] * 6
    for name, weight in agent.named_parameters():
        if not name.startswith("slow"):
            assert weight.dtype == weight.grad.dtype == torch.float32, name
            assert weight.grad.any() or "bias" in name, name
    seen, model = set(), agent.world_model
    model.rssm.cell.norm.register_forward_pre_hook(lambda _, x: seen.add(x[0].dtype))
    model.decoder.register_forward_hook(lambda _, x, y: seen.add(y.dtype))
    agent.train_step(batch)
    action, memory = agent.act(batch["image"][0], batch["is_first"][0])
    assert seen | {x.dtype for x in (action, *memory.values())} == {torch.float32}


def test_float32_is_float32_on_cuda(monkeypatch):
    """torch's own default there is TF32 for convolutions."""
    fake = types.SimpleNamespace(device=torch.device("cuda:0"))
    monkeypatch.setattr(torch, "zeros", lambda *_, device: fake)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    assert d.pick_device("cuda") == fake.device
    assert not (torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32)


@on_gpu
@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-4), ("bf16", 2e-2)])
def test_gpu_agrees_with_cpu(precision, tolerance, monkeypatch):
    """One gradient step of the paper's size: same batch, weights and noise."""
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.rand(x.shape).to(x.device))
    d.pick_device("cuda")
    batch, paper = random_batch(T=10, B=4, A=18), {k: getattr(d.Config, k) for k in SIZES}
    ours, _ = one_step("cuda", precision, batch, 18, **paper)
    exact, _ = one_step("cpu", "fp32", batch, 18, **paper)
    for name in COMPARED:
        assert ours[name] == pytest.approx(exact[name], rel=tolerance, abs=1e-4), name


@on_gpu
def test_graph_replay_equals_eager():
    """Same weights, batches and seed: the same numbers, from the graphs of ρ < 1 and of ρ = 1,
    with greedy decisions and a dream between the steps. Noise is new each time."""
    found, settings = [], dict(reinforce_mix=0.5, anneal_steps=6, precision="fp32")
    for graphs in (False, True):
        agent = tiny_agent(device="cuda", cuda_graphs=graphs, **settings)
        torch.manual_seed(1)
        for i in range(12):
            batch = d.upload(random_batch(seed=i), agent.device)
            metrics = agent.train_step(batch, step=i)
            agent.act(batch["image"][0], batch["is_first"][0], greedy=True)
            d.open_loop(agent, batch, context=2)
        found.append({k: float(v) for k, v in metrics.items()})
    assert found[1] == pytest.approx(found[0], rel=1e-3, abs=1e-5)
    noise, memory = set(), None
    for _ in range(30):
        action, memory = agent.act(batch["image"][0], batch["is_first"][0], memory)
        noise.add(str(memory["z"].argmax(-1).tolist()))
    assert len(noise) > 5


@pytest.mark.parametrize("device, order", [
    ("mps", torch.contiguous_format), ("cpu", torch.channels_last)])
def test_weights_lie_channels_last_but_on_apples_gpus(device, order, monkeypatch):
    monkeypatch.setattr(d.Agent, "to", mock.Mock(side_effect=StopIteration))
    pytest.raises(StopIteration, d.Agent, d.Config(**DEBUG), 3, 1, device)
    assert d.Agent.to.call_args == mock.call(torch.device(device), memory_format=order)


@pytest.mark.parametrize("error, too_large", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), ()),
    (MemoryError("Unable to allocate 7.28 TiB for an array"), ()),
    (None, ("--deter-size", 10**8))])  # 120 PB
def test_out_of_memory_is_one_line(error, too_large, tmp_path, monkeypatch, capsys):
    if error:
        monkeypatch.setattr(d.Agent, "train_step", mock.Mock(side_effect=error))
    assert run(*CATCH, "--logdir", tmp_path, "--steps", 24, *too_large) == 1
    assert capsys.readouterr().err.endswith("dreamerv2.py: out of memory: lower --batch-size\n")
    assert too_large or counters(tmp_path)["step"] == 0


@on_gpu
def test_a_gpu_waits_for_nothing_and_needs_no_more_memory():
    """Neither a step nor a decision reads anything back, but where a graph is recorded."""
    agent, memory, reserved = tiny_agent(device="cuda"), None, set()
    batch = d.upload(random_batch(), agent.device)
    for i in range(200):
        torch.cuda.set_sync_debug_mode("default" if i == 3 else "error")
        agent.train_step(batch)
        action, memory = agent.act(batch["image"][0], batch["is_first"][0], memory)
        torch.cuda.set_sync_debug_mode("default")
        if i > 10:
            reserved.add(torch.cuda.memory_reserved())
    assert len(reserved) == 1


@counted
@pytest.mark.skipif(not torch.version.cuda, reason="needs a CUDA build, but no device")
def test_tensors_of_a_forward_pass_are_on_the_gpu_in_float32(monkeypatch):
    """Fake tensors go through world model, imagination, actor and critic in bfloat16."""
    monkeypatch.setattr(torch.optim, "AdamW", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    config = d.Config(**DEBUG, precision="bf16", cuda_graphs=False)
    with FakeTensorMode(allow_non_fake_inputs=True), monkeypatch.context() as patch:
        patch.setattr(d.Agent, "to", lambda *_, **__: None)  # fake weights cannot move
        patch.setattr(d.Optimizer, "minimize", lambda self, loss: seen.append(loss) or loss)
        with torch.device("cuda"):
            agent, seen = d.Agent(config, 3, 1, "cuda"), []
        agent.world_model.rssm.prior_in.register_forward_hook(lambda _, x, y: rounded.add(y.dtype))
        rounded, batch = set(), d.upload(random_batch(), torch.device("cuda"))
        seen += agent.update_networks(batch, dynamics=False).values()
        seen += agent.decide({k: batch[k][0] for k in ("image", "is_first", "action")} | dict(
            h=torch.zeros(3, 16, device="cuda"), z=torch.zeros(3, 4, 4, device="cuda")),
            greedy=False).values()
    assert {(x.device.type, x.dtype) for x in seen} == {("cuda", torch.float32)}
    assert rounded == {torch.bfloat16}


# -------------------------------------------------------------------------- pictures

def read_png(path):
    """An independent decoder: frames (T, H, W, C), and the milliseconds of each."""
    file, frames, order, times, promised = io.BytesIO(Path(path).read_bytes()), [], [], set(), 1
    assert file.read(8) == bytes([137, 80, 78, 71, 13, 10, 26, 10])
    while head := file.read(8):
        size, name = struct.unpack(">I4s", head)
        body, check = file.read(size), file.read(4)
        assert int.from_bytes(check, "big") == zlib.crc32(name + body)
        if name == b"IHDR":
            width, height, *kind = struct.unpack(">IIBBBBB", body)
            channels = {0: 1, 2: 3}[kind[1]]
            assert kind == [8, kind[1], 0, 0, 0]
        elif name == b"acTL":
            promised = int.from_bytes(body[:4], "big")
        if name in (b"fcTL", b"fdAT"):
            order.append(int.from_bytes(body[:4], "big"))
        if name == b"fcTL":
            *place, time, unit = struct.unpack(">IIIIHH", body[4:24])
            times.add(1000 * time // unit)
            assert place == [width, height, 0, 0]
        if name in (b"IDAT", b"fdAT"):
            raw = zlib.decompress(body[4:] if name == b"fdAT" else body)
            raw = np.frombuffer(raw, np.uint8).reshape(height, 1 + width * channels)
            frame = raw[:, 1:].copy()
            for i in range(1, height):  # filter 2 adds the line above, 0 nothing
                frame[i] += {0: 0, 2: frame[i - 1]}[raw[i, 0]]
            frames.append(frame.reshape(height, width, channels))
    assert name == b"IEND" and order == list(range(len(order))) and promised == len(frames)
    return np.stack(frames), times


@pytest.mark.parametrize("shape", [
    (1, 5, 7, 1), (1, 4, 3, 3), (4, 6, 300, 1), (3, 2, 401, 3), (2, 3, 1000, 1)])
def test_pictures_are_pngs(shape):
    frames = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    Path("a.png").write_bytes(d.to_png(frames, 40))
    again, milliseconds = read_png("a.png")
    scale = max(1, 800 // shape[2])
    assert (again == frames.repeat(scale, 1).repeat(scale, 2)).all()
    assert milliseconds == {40}


def test_a_dream_sees_its_context_and_no_image_after_it():
    agent, batch = tiny_agent(), random_batch(T=12, B=3)
    agent.world_model.rssm.post_out.weight.data *= 30  # sees small changes
    agent.world_model.decoder.net[-1].weight.data *= 30  # would leave [-½, ½]
    batch["is_first"] = torch.isin(torch.arange(12), torch.tensor([3, 9]))[:, None].expand(12, 3)

    def dream(seed=1, changed=slice(0)):
        image = batch["image"].clone()
        image[changed] = 255 - image[changed]
        torch.manual_seed(seed)
        return d.open_loop(agent, batch | dict(image=image), context=5)

    truth, model, error = dream()
    assert model.shape == (12, 3, 1, 64, 64) and model.abs().max() <= 0.5
    assert_close(truth, agent.world_model.preprocess(batch["image"]))
    assert_close(error, (model - truth) / 2)
    truth_later, model_later, _ = dream(changed=slice(5, None))
    assert not torch.equal(truth, truth_later) and torch.equal(model, model_later)
    assert not torch.equal(model[6:], dream(seed=2)[1][6:])
    for at, start in (2, 3), (4, 9):  # an image is remembered until an episode starts
        same = (dream(changed=slice(at, at + 1))[1] == model).flatten(1).all(1)
        assert same.tolist() == [not at <= t < start for t in range(12)]
    colours = torch.tensor([-9.0, -1 / 6, 9.0, 0.0])[:, None, None].expand(4, 64, 64)
    assert d.to_pixels(colours[:2]).shape == (64, 64, 1)
    colours = d.to_pixels(colours)
    assert colours[0, 0].tolist() == [0, 79, 255]  # of 4 channels, 3
    assert (colours[63] == 128).all() and (colours[:, 63] == 128).all()


def test_pictures_show_what_was_played(monkeypatch):
    """Of eight sequences the four in which something moves; a state beside its own image."""
    image, seen = Colours.image, watch(monkeypatch, "open_loop")
    act = watch(monkeypatch, "act", d.Agent)
    images = itertools.chain([image] * 201, itertools.cycle([0 * image, image]))
    with toy_game(step=lambda *_: (next(images), 0.0, False, False, {})) as game:
        envs = d.make_envs(game)
        film = d.draw_dream(d.Agent(d.Config(**DEBUG), 2, 3), envs, sequences=8)
        envs.close()
    batch = seen.inputs["batch"]
    assert batch["image"].int().diff(dim=0).flatten(2).any(-1).sum(0).min() > 40
    assert batch["is_first"][0].all() and seen.inputs["context"] == 5 and act.inputs["memory"]
    assert [(frame[:2] == 255).all() for frame in film] == [True] * 5 + [False] * 45
    model = types.SimpleNamespace(  # h is an image's mean, which the decoder shows
        preprocess=d.WorldModel.preprocess,
        decoder=lambda feature: feature[:, 1, None, None, None].expand(-1, 1, 64, 64))
    agent = types.SimpleNamespace(device="cpu", world_model=model, act=lambda image, **_: (
        torch.eye(5)[[1]], dict(h=model.preprocess(image).mean((2, 3)), z=torch.zeros(1, 1, 1))))
    film = d.draw_play(agent, d.make_envs("tests/Counting-v0"))
    assert (film[:, :63, :63] == film[:, :63, 64:127]).all()


@pytest.mark.parametrize("game, channels", [("Pong", 1), ("tests/Colours-v0", 3)])
def test_eval_and_dream_draw_and_leave_the_run_as_it_is(game, channels, capsys, monkeypatch):
    flags, taken, do = ("--logdir", "runs/one"), [], d.Agent.act
    assert run(*flags, *QUICK, "--game", game, "--steps", 40, "--time-limit", 40) == 0
    shutil.rmtree("runs/one/replay")  # none is needed
    before = contents("runs")
    monkeypatch.setattr(d.Agent, "act", lambda *a, **k: (taken.append(k["greedy"]), do(*a, **k))[1])
    assert run(*flags, "--dream") == 0 and set(taken) == {False}
    taken.clear()
    assert run(*flags, "--eval", "--eval-episodes", 3) == 0 and set(taken) == {True}
    assert contents("runs") == before
    assert sorted(os.listdir()) == ["runs", "runs-one-dream.png", "runs-one-eval.png"]
    film, milliseconds = read_png("runs-one-dream.png")
    assert film.shape == (50, 3 * 3 * 64, 3 * 4 * 64, channels) and milliseconds == {100}
    seen, _ = read_png("runs-one-eval.png")
    assert seen.shape == (200, 6 * 64, 6 * 2 * 64, channels)
    if channels == 3:  # left half red, right half blue, in the truth of both
        for picture, scale in ((film, 3), (seen, 6)):
            assert (picture[-1, 9, [9, 40 * scale]] == [[207, 0, 0], [0, 0, 95]]).all()
    assert re.search(r"episodes: 3, mean score -?[\d.]+, median .*, mean length 40.0 decisions",
                     capsys.readouterr().out)
    monkeypatch.chdir("runs/one")
    assert run("--logdir", ".", "--dream") == 0 and Path("run-dream.png").exists()


def test_a_run_shows_itself_while_it_trains(tmp_path, monkeypatch):
    boards = [mock.Mock(), mock.Mock()]
    Writer = mock.Mock(side_effect=boards)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard",
                        types.SimpleNamespace(SummaryWriter=Writer))
    flags = (*CATCH, "--logdir", tmp_path)
    assert run(*flags, "--steps", 100, "--log-every-steps", 20, "--eval-every-steps", 60) == 0
    earlier = (tmp_path / "dream.png").read_bytes()
    assert run(*flags, "--steps", 140) == 0  # a dream at 120, and at the end
    assert Writer.call_args_list == [mock.call(str(tmp_path), purge_step=step)
                                     for step in (1, 101)]
    shown = {call.args for board in boards for call in board.add_scalar.call_args_list}
    assert shown == {(name, value, row["step"]) for row in lines(tmp_path)
                     for name, value in row.items() if value is not None}
    assert all(board.mock_calls[-1] == mock.call.flush() for board in boards)
    assert (tmp_path / "dream.png").read_bytes() != earlier
    times = [row["wall_time_s"] for row in lines(tmp_path)]
    assert times == sorted(times) and {row["episode_length"] for row in lines(tmp_path)} == {7}


def test_a_line_is_of_its_period_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(d.time, "time", itertools.count(0, 2).__next__)  # two seconds each
    metrics = d.Metrics(tmp_path, step=0, updates=0, frames=0)
    for x in (1, 4):
        metrics.add(dict(kl=torch.tensor(x)))
        metrics.episodes.append((x, 7))
        line = metrics.write(step=x, updates=x, frames=x)
        assert [line[k] for k in ("kl", "episode_return", "episode_length")] == [x, x, 7]
        assert line["frames_per_s"] == line["updates_per_s"] == {1: 0.5, 4: 1.5}[x]


@pytest.mark.parametrize("module", [
    None, types.SimpleNamespace(), types.SimpleNamespace(SummaryWriter=lambda *a, **k: 1 / 0)],
    ids=["none", "not whole", "raises"])
def test_without_tensorboard_a_run_trains_and_draws(module, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    assert run(*CATCH, "--logdir", tmp_path, "--steps", 24) == 0
    film, milliseconds = read_png(tmp_path / "dream.png")
    assert film.shape == (50, 9 * 64, 12 * 64, 1) and milliseconds == {100}
    assert not list(tmp_path.glob("*tfevents*"))


def test_a_real_tensorboard_reads_it(first_run):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(first_run)).Reload()
    assert [x.step for x in events.Scalars("kl")] == [row["step"] for row in lines(first_run)]


# -------------------------------------------------------------------------- learning

def test_overfits_one_batch(tmp_path):
    torch.manual_seed(0)
    envs, rng = d.make_envs("Breakout", seed=0), np.random.default_rng(0)
    replay = d.Replay(tmp_path, 40, action_dim=18)
    for row in play_rows(envs, [1, *rng.integers(18, size=39)]):
        replay.add(*row)
    agent = d.Agent(d.Config(**PRESETS["small"]), 18)
    batch, errors = replay.sample(4, 5), []
    for _ in range(200):
        loss, _, metrics = agent.world_model.loss(**batch, **agent.model_loss_args)
        agent.optimizers["model"].minimize(loss)
        errors.append(float(metrics["image_mse"]))
    assert errors[0] > 0.05 and errors[-1] < 2e-3


@pytest.mark.slow
def test_learns_catch(tmp_path):
    """To a bar that luck cannot reach: random play has -0.75, +-0.06 over 140 episodes."""
    assert run("--game", "Catch", "--preset", "small", "--steps", 9000, "--logdir", tmp_path,
               "--eval-episodes", 0) == 0
    returns = [row["episode_return"] for row in lines(tmp_path)]
    assert returns[0] < -0.5 and np.mean(returns[-2:]) > 0


# --------------------------------------------------------------------- the file itself

LIMIT, CODE, LONGEST, WIDTH = 2176, 1211, 45, 88  # lines, of code, of a function; columns
README = HERE / "README.md"
OPTIONS = {d.flag(field.name) for field in dataclasses.fields(d.Config)}


def test_the_file_is_small():
    """A line of code holds a token that is neither a comment nor part of a docstring."""
    code, functions = set(), {}
    for token in tokenize.generate_tokens(io.StringIO(SOURCE).readline):
        if token.type != tokenize.COMMENT and token.string.strip():
            code |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(TREE):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            if ast.get_docstring(node):
                code -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
            if isinstance(node, ast.FunctionDef):
                functions[node.name, node.lineno] = range(node.lineno, node.end_lineno + 1)
    longest = max(len(code.intersection(lines)) for lines in functions.values())
    rows = SOURCE.splitlines()
    print(f"{len(rows)} lines, {len(code)} of code, {longest} in a function")
    assert len(rows) <= LIMIT and len(code) <= CODE and longest <= LONGEST
    assert [row for row in rows if len(row) > WIDTH] == []


def test_pieces_have_docstrings_five_packages_are_imported_and_few_read_the_config():
    readers, shown = set(), SOURCE[:SOURCE.index("# %% Part 11")].count("\n")
    for node in ast.walk(TREE):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [getattr(node, "module", "")] + [x.name for x in node.names]
            assert modules[not modules[0]].split(".")[0] in {
                "torch", "gymnasium", "ale_py", "numpy", "tqdm", *sys.stdlib_module_names}
        for piece in node.body if isinstance(node, (ast.Module, ast.ClassDef)) else ():
            if isinstance(piece, (ast.FunctionDef, ast.ClassDef)):
                unsaid = piece.name.startswith("_") or piece.name == "forward"
                assert unsaid or ast.get_docstring(piece), piece.name
                names = {x.id for x in ast.walk(piece) if isinstance(x, ast.Name)}
                if node is TREE and piece.lineno < shown and names & {"config", "Config"}:
                    readers.add(piece.name)
    assert readers == {"Agent"}  # and Parts 11 and 12


def test_uv_run_installs_what_the_requirements_name():
    """The header of PEP 723 and requirements.txt, but for pytest."""
    required = re.findall(r"^([^ #\n]+)", (HERE / "requirements.txt").read_text(), re.M)
    header = re.search(r"# dependencies = (\[.*?\])\n# ///\n", SOURCE, re.S)[1].replace("#", "")
    assert ast.literal_eval(header) == [x for x in required if not x.startswith("pytest")]


def test_map_parts_and_tags_agree():
    parts = re.split(r"^# %% ", SOURCE, flags=re.M)[1:]
    titles = [re.match(r"(Part \d+) \| (.+)", part).groups() for part in parts]
    mapped = re.findall(r"(Part \d+) +\| (.+?)(?:  |$)", d.__doc__, re.M)
    assert titles == mapped and [x for x, _ in titles] == [f"Part {i}" for i in range(1, 13)]
    for part, (_, title) in zip(parts, titles):
        for word in ("In: ", "Out: ", "Predict: "):
            assert re.search(rf"^#.* {word}", part, re.M), title
        promised = set()
        for kind, numbers in re.findall(r"(Eq|Alg)\. ([\d, -]+)\)", title):
            low, *high = map(int, re.findall(r"\d+", numbers))
            promised |= {f"[{kind}. {i}]" for i in range(low, (high or [low])[-1] + 1)}
        here = set(re.findall(r"\[(?:Eq|Alg)\. \d+\]", part))
        # A gradient step points at the losses that it calls.
        assert promised <= here if "Agent" in title else here == promised, title


def test_defaults_are_the_numbers_of_their_comments():
    """Which say what the paper, its table, or the authors' code has; but for D10."""
    found = re.findall(
        r"^    (\w+): \w+ = .*  #.*(?:paper|table|code): (\d[\d.e-]*)([kM]?)", SOURCE, re.M)
    for name, number, unit in found:
        number = float(number) * dict(k=1e3, M=1e6).get(unit, 1) - (name == "max_noops")
        assert getattr(d.Config, name) == number, name
    assert len(found) > 30


def test_departures_name_a_flag_or_a_test_that_exists():
    held = dict(re.findall(r"^    (D\d+) .* (\S+)$", d.__doc__, re.M))
    assert list(held) == [f"D{i}" for i in range(1, 17)]
    assert all(by in (globals() if by.startswith("test_") else OPTIONS) for by in held.values())
    assert set(re.findall(r"\[(D\d+)\]", SOURCE)) <= held.keys()
    for row in re.findall("^    (D[123] .*)$", d.__doc__, re.M):  # those with numbers
        *_, theirs, ours, name = re.split(" {2,}", row)
        assert PRESETS["released"][name[2:].replace("-", "_")] == float(theirs.split(",")[0])
        assert getattr(d.Config, name[2:].replace("-", "_")) == float(ours)


def test_flags_are_the_fields_of_config_in_every_text(capsys):
    with pytest.raises(SystemExit):
        d.read_flags(["--help"])
    shown = set(re.findall(r"^  (?:-h, )?(--[a-z-]+)", capsys.readouterr().out, re.M))
    assert shown == OPTIONS | {"--help", "--eval", "--dream"}
    others = """--benchmark --scores --index-url --array --gpus --time --mem
        --cpus-per-task""".split()  # of the tests, pip, Slurm
    for text in (SOURCE, README.read_text(encoding="utf-8")):
        named = re.findall(r"(?<![\w-])--(?:no-(?=[a-z]))?([a-z][a-z-]*[a-z])", text)
        assert {f"--{name}" for name in named} <= shown.union(others)


def test_pieces_come_out_with_the_neighbours_that_the_readme_names():
    """A row of its table: pieces, and neighbours, which bring their own; other pieces have none.
    A piece, those and the file's imports run alone, its doctest too, and need nothing else."""
    table = re.search(r"^## Copy.*?(?=^## )", README.read_text(encoding="utf-8"), re.S | re.M)[0]
    defined = {x.name: x for x in TREE.body if isinstance(x, (ast.FunctionDef, ast.ClassDef))}
    parts = re.search("# %% Part 2.*(?=# %% Part 8)", SOURCE, re.S)[0]
    needs = {name: [] for name in defined if re.search(rf"^(def|class) {name}\b", parts, re.M)}
    needs |= dict(Optimizer=[], to_png=[])
    for row in re.findall(r"^`.*\|.*", table, re.M):
        pieces, neighbours = (re.findall(r"`(\w+)`", cell) for cell in row.split("|"))
        needs |= {piece: neighbours for piece in pieces}
    assert needs.pop("WorldModel") == [] and len(needs) > 30
    for name, neighbours in needs.items():
        used = {x.id for x in ast.walk(defined[name]) if isinstance(x, ast.Name)}
        assert used & defined.keys() <= {name, *neighbours}, name
        taken, space = [name], {"__name__": "copied"}
        for piece in taken:
            taken += [x for x in needs.get(piece, []) if x not in taken]
        code = [x for x in TREE.body if isinstance(x, (ast.Import, ast.ImportFrom))
                or getattr(x, "name", "") in taken]
        exec(compile(ast.Module(code, []), "copied", "exec"), space)
        for example in doctest.DocTestFinder().find(space[name], name, False, space):
            assert doctest.DocTestRunner().run(example).failed == 0, name


def test_every_part_runs_alone_after_those_before_it(monkeypatch):
    """Cell by cell, as editors run it: each defines its names, and its examples need no later
    one. Nothing but names comes of it."""
    module, examples, finder = types.ModuleType("cells"), 0, doctest.DocTestFinder()
    monkeypatch.setitem(sys.modules, "cells", module)
    for cell in re.split(r"^(?=# %% Part)", SOURCE, flags=re.M):
        before = set(vars(module))
        exec(compile(cell, "cell", "exec"), vars(module))
        for name in vars(module).keys() - before:
            piece = getattr(module, name)
            if getattr(piece, "__module__", "") == "cells":
                for example in finder.find(piece, name, module):
                    assert doctest.DocTestRunner().run(example).failed == 0
                    examples += len(example.examples)
    assert examples == sum(len(x.examples) for x in finder.find(d))
    assert not list(Path().iterdir())


# Code without which it would still run, and learn badly or the wrong thing. Beside each the
# file says what breaks; what is left when it is gone; the tests that must fail then.
CRUCIAL = [
    ("", "", "samples_follow or parity_kl"),  # nothing is gone, and these pass
    ("+ (probs - probs.detach())", "", "stopped_head"),
    ("alpha * train_prior + (1 - alpha) * train_posterior", "train_prior", "parity_kl"),
    ("torch.sigmoid(update - 1)", "torch.sigmoid(update)", "parity_gru"),
    ("first = is_first[:, None]", "first = is_first[:, None] & False", "is_first_equals"),
    ("features[-1].detach()", "features[-1]", "parity_behaviour"),
    ("(returns - baseline).detach()", "returns - baseline", "actor_loss_by_hand"),
    ("self.slow_critic.load_state_dict(self.critic.state_dict())", "pass", "slow_critic"),
    ("x.detach().flatten(0, 1) for x", "x.flatten(0, 1) for x", "flow_table"),
    ("torch.cat([true_discount[None], discount])",
     "self.world_model.predict_discount(features[:-1])", "true_start"),
    ("gamma * (1 - is_terminal.float())", "1 - is_terminal.float()", "parity_world_model"),
    ("reward.tanh() if reward_tanh else reward", "reward", "reward_tanh"),
    ('batch["is_first"][0] = True\n        return', "return", "replay_sequences"),
    ("(~is_first).astype(np.float32)", "np.ones(len(is_first), np.float32)", "rows_are_aligned"),
]


@pytest.mark.parametrize("part, rest, tests", CRUCIAL, ids=[x[0][:30] for x in CRUCIAL])
def test_a_crucial_line_is_explained_and_missed(part, rest, tests, tmp_path, monkeypatch):
    """Mutation tests: without it, one of the tests that are named fails. pytest runs within
    pytest, and finds this module as it is, but with another d."""
    if part:
        above, _ = SOURCE.split(part)  # it is there once
        assert re.search("ithout|tames|cuts|IS the disc", "".join(above.splitlines(True)[-11:]))
    changed = types.ModuleType("dreamerv2")
    exec(SOURCE.replace(part, rest) if part else SOURCE, vars(changed))
    monkeypatch.setitem(globals(), "d", changed)
    off = "cacheprovider faulthandler logging threadexception unraisableexception".split()
    status = pytest.main([__file__, "-qxs", "-k", tests, f"--basetemp={tmp_path / 'inner'}",
                          *(f"-pno:{plugin}" for plugin in off)])
    assert status == (pytest.ExitCode.TESTS_FAILED if part else pytest.ExitCode.OK)


def by_hand(folder, *command):
    """python with these arguments, in a folder where pytest cannot be imported."""
    (folder / "no").mkdir(exist_ok=True)
    (folder / "no" / "pytest.py").write_text("raise ImportError")
    path = dict(PYTHONPATH=str(folder / "no"), PYTHONDONTWRITEBYTECODE="1")
    return subprocess.run([sys.executable, *command], cwd=folder, env=os.environ | path,
                          capture_output=True, text=True)


def test_dreamerv2_runs_alone_and_importing_it_does_nothing(tmp_path):
    """In a folder that holds nothing else: it trains with a picture, plays and dreams."""
    assert "test_dreamerv2" not in SOURCE
    shutil.copy(HERE / "dreamerv2.py", tmp_path)
    out = by_hand(tmp_path, "-c", """if True:
        import os, dreamerv2
        print(sorted(os.listdir()))
        flags = "--game Catch --preset debug --logdir run --steps 210".split()
        for extra in [], ["--eval"], ["--dream"]:
            assert dreamerv2.main(flags + extra) == 0""")
    assert out.returncode == 0 and out.stdout.startswith("['dreamerv2.py', 'no']\n"), out.stderr
    assert {p.name for p in tmp_path.rglob("*.png")} == {
        "dream.png", "run-eval.png", "run-dream.png"}


def test_readme_snippets_run_and_its_tables_are_complete(capsys):
    readme = README.read_text(encoding="utf-8")
    folder = re.search(r'"--logdir", "(.*?)"', readme)[1]
    assert run("--game", "Catch", "--preset", "debug", "--logdir", folder, "--steps", 220) == 0
    snippets = re.findall(r"```python\n(.*?)```", readme, re.S)
    assert len(snippets) == 2
    for code in snippets:
        exec(code, {})
    assert re.search(r"\[\[-?1\.0, 7\.0\]\]\n$", capsys.readouterr().out)
    assert [name for name in d.PRESETS if f"`{name}`" not in readme] == []
    exec(re.search(r'games=.*python -c "(.*?)"', readme)[1], {})
    assert capsys.readouterr().out.split() == list(PUBLISHED)


def test_readme_is_short_and_what_it_names_exists():
    """Every command's flags are known; every file is there, pictures animated and small."""
    readme = README.read_text(encoding="utf-8")
    assert len(readme.split()) <= 1700 and max(map(len, readme.splitlines())) <= 120
    files = re.findall(r'(?:\]\(|src=")([^)"]+)', readme)
    files = [HERE / name for name in files if not name.startswith(("http", "../../actions"))]
    assert all(path.exists() for path in files) and len(files) >= 4
    for path in HERE.glob(".github/*.png"):
        assert path in files and path.stat().st_size < 700_000 and len(read_png(path)[0]) >= 50
    commands = re.findall(r"python dreamerv2\.py((?: [^#|`&\n\\]+|\\\n)*)", readme)
    assert len(commands) >= 6
    for flags in commands:
        d.read_flags(re.sub(r"\$\w+", "0", flags).split())  # the cluster script's


def test_the_trained_agents_are_shown_and_not_trained(capsys):
    """From any folder, without writing into theirs; a few MB each, without Adam's state."""
    folders = [path.parent for path in HERE.glob(".pretrained/*/checkpoint.pt")]
    before = contents(HERE / ".pretrained")
    for folder in folders:
        assert f".pretrained/{folder.name}" in README.read_text(encoding="utf-8")
        assert (folder / "checkpoint.pt").stat().st_size < 4e6
        assert run("--logdir", folder, "--dream") == 0
        assert run("--logdir", folder, "--steps", 10**6) == 2
        assert "its replay is missing" in capsys.readouterr().err
    assert contents(HERE / ".pretrained") == before and len(before) == 2 * len(folders) > 0


# -------------------------------------------------------------------------- measuring

def test_benchmark(capsys):
    flags = "--benchmark --preset debug --game Catch --num-envs 3 --precision bf16".split()
    assert command_line(flags) == 0
    out = capsys.readouterr().out
    assert "bf16 on cpu, no CUDA graphs" in out
    numbers = dict(re.findall(r"^([\w /,%-]+?) {2,}([\d.e+-]+)$", out, re.M))
    assert len(numbers) >= 13 and all(float(v) > 0 for v in numbers.values())
    ms, gflop, peak, share = (float(numbers[k]) for k in (
        "gradient step, ms", "that step, GFLOP", "fastest product, GFLOP/s", "share of that, %"))
    assert share == pytest.approx(100 * gflop / (ms / 1e3) / peak, rel=0.01)
    assert gflop == pytest.approx(hand_count(d.Config(**DEBUG), 3) / 1e9, rel=0.02)
    assert not list(Path().iterdir())  # nothing is left behind


def of(agent):
    return {game: row[agent] for game, row in PUBLISHED.items()}


@pytest.mark.parametrize("agent, printed", [  # the paper's Table 1
    ("IQN", (1.29, 8.85, 0.21, 0.21)), ("Rainbow", (1.47, 9.12, 0.17, 0.17)),
    ("C51", (1.09, 7.70, 0.15, 0.15)), ("DQN", (0.65, 2.84, 0.12, 0.12))])
def test_the_papers_table_1_from_the_published_scores(agent, printed, monkeypatch):
    """To the printed digit, but for the gamer mean: in the authors' file James Bond's gamer is
    only 22 points above random play (7 and 29), and makes up to a quarter of it. With the 29
    and 302.8 that other papers give, the mean is met to 0.02, and the rest stays."""
    ours = list(summarize_scores(of(agent)).values())
    other = PUBLISHED["jamesbond"] | dict(random=29, gamer=302.8)
    monkeypatch.setitem(PUBLISHED, "jamesbond", other)
    others = list(summarize_scores(of(agent)).values())
    assert ours[1] > printed[1] + 0.4 and others[1] == pytest.approx(printed[1], abs=0.02)
    for found in (ours, others):
        assert [round(found[i], 2) for i in (0, 2, 3)] == [printed[i] for i in (0, 2, 3)]


def test_scores_by_hand():
    assert len(PUBLISHED) == 55 and PUBLISHED.keys() <= set(d.atari_roms().values())
    assert {len(row) for row in PUBLISHED.values()} == {9}
    ours = list(summarize_scores(of("DreamerV2")).values())  # its files hold other seeds than
    assert [ours[0], *ours[2:]] == pytest.approx([2.15, 0.44, 0.28], rel=0.05)  # the paper
    assert normalized_score("UpNDown", 533.4, "gamer") == 0
    assert normalized_score("up_n_down", 82840.0, "record") == 1
    assert normalized_score("ALE/Boxing-v5", 6.1, "gamer") == pytest.approx(0.5)
    assert normalized_score("skiing", -17098.1 + 1382.61, "record") == pytest.approx(0.1)
    with pytest.raises(KeyError):
        normalized_score("Catch", 1.0, "gamer")
    two = summarize_scores({"Boxing": 24.1, "Pong": -20.7})  # gamer 2 and 0
    assert list(two.values()) == pytest.approx([1, 1, 24 / 99.9 / 2, 24 / 99.9 / 2])


def a_run(folder, game, returns, seed=0, preset="atari"):
    """A run's folder whose last million frames have the second of two returns."""
    folder.mkdir(parents=True)
    config = dict(game=game, seed=seed, steps=1_000_000, preset=preset)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(dict(
        step=step, frames=4 * step, episode_return=score)) + "\n" for step, score in zip(
            (500_000, 900_000, 950_000, 1_000_000), (*returns, None, returns[1]))))


@pytest.mark.parametrize("separator", [" ", "="])
def test_scores_of_runs(separator, tmp_path, capsys):
    a_run(tmp_path / "a" / "0", "Boxing", (50.0, 12.1))
    a_run(tmp_path / "a" / "1", "ALE/Boxing-v5", (50.0, 36.1), seed=1)
    a_run(tmp_path / "b", "pong", (0.0, 14.6))
    a_run(tmp_path / "c", "Catch", (0.0, 1.0))
    before = contents(tmp_path)
    assert command_line(f"--scores{separator}{tmp_path}".split()) == 0
    picture = ElementTree.fromstring(Path("curves.svg").read_text(encoding="utf-8"))
    boxing, pong, catch = picture.findall("{*}g")
    lines = [x.attrib["points"] for x in boxing.findall("{*}polyline")]
    # The highest score is 50, the lowest that of random play; 140 pixels lie between them.
    assert lines[0].split()[::2] == ["150.0,40.0", "292.0,146.3"] and len(lines) == 2
    assert [x.text for x in boxing.findall("{*}text")] == [
        "boxing", "0 to 4,000,000 frames; 0.1 to 50.0 points", "random 0.1", "human 12.1",
        "authors at 1M 38"]
    assert [len(panel.findall("{*}text")) for panel in (pong, catch)] == [5, 2]
    assert contents(tmp_path) == before
    out, err = capsys.readouterr()
    table = [x.split() for x in out.splitlines()]
    assert table[1] == [*"Boxing 0 4,000,000 12.1 1.00 0.12 86.14 97.91 98.56 81.4 77.99"
                        " atari,".split(), str(tmp_path / "a" / "0")]
    assert table[2][:6] == "ALE/Boxing-v5 1 4,000,000 36.1 3.00 0.36".split()
    assert table[3][:6] == "pong 0 4,000,000 14.6 1.00 0.85".split()
    assert table[4][:-2] == ["Catch", "0", "4,000,000", "1.0", *"-" * 7]
    assert "2 of the paper's 55 games\n" in out and not err
    ours = (36.1 + 12.1) / 2 - 0.1
    assert [float(x) for x in table[-6][-4:]] == pytest.approx(
        [(ours / 12 + 1) / 2] * 2 + [(ours / 99.9 + 35.3 / 41.7) / 2] * 2, abs=0.006)
    dqn = summarize_scores({game: PUBLISHED[game]["DQN"] for game in ("boxing", "pong")})
    assert [float(x) for x in table[-1][-4:]] == pytest.approx(list(dqn.values()), abs=0.006)


@pytest.mark.parametrize("text, why", [
    ("{}", "config.json"), ("{", "config.json"), ("", "0 of 1,000,000"), ("[1]\n", "damaged line"),
    ('{"step": 9}\n', "damaged line"), ('{"step": 3, "fra', "damaged line"),
    ('{"step": 9, "frames": 36, "episode_return": 1}', "9 of 1,000,000"),
    ('{"step": 1000000, "frames": 10, "episode_return": null}', "no episode")])
def test_runs_without_a_score_are_left_out_with_the_reason(text, why, tmp_path, capsys):
    for folder, preset in (("a", "atari"), ("b", "atari"), ("c", "small")):
        a_run(tmp_path / folder, "Pong", (1.0, 2.0), preset=preset)
    (tmp_path / "a" / (why if why == "config.json" else "metrics.jsonl")).write_text(text)
    assert command_line(["--scores", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and why in err and "is left out" in err
    assert "1 of the paper's 55 games; the summaries mix the presets atari, small" in out


@pytest.mark.parametrize("flags, why", [
    ("--scores file", "no folder"), ("--scores=.", "no run"), ("", "required"),
    ("--scores . --steps 9", "knows no --steps 9"), ("--benchmark --scores .", "not allowed"),
    ("--benchmark --preset smal", "choice: 'smal'"), ("--benchmark --dream", "nor dreams"),
    ("--benchmark --horizon 0", "--horizon 0"), ("--benchmark --game Nix", "--game Nix")])
def test_what_cannot_be_measured_is_one_line_and_status_2(flags, why, capsys):
    Path("file").write_text("")
    assert command_line(flags.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith("test_dreamerv2.py: ") and err.count("\n") == 1 and why in err


@pytest.mark.parametrize("flags, found", [
    ("--scores .", "1 of the paper's 55 games"),
    ("--benchmark --preset debug --game Catch", "fp32 on c")])
def test_measuring_needs_these_two_files_and_not_pytest(flags, found, tmp_path):
    for name in ("dreamerv2.py", "test_dreamerv2.py"):
        shutil.copy(HERE / name, tmp_path)
    a_run(tmp_path / "a", "Pong", (1.0, 2.0))
    before = contents(tmp_path).keys()
    out = by_hand(tmp_path, "test_dreamerv2.py", *flags.split())
    assert out.returncode == 0 and found in out.stdout, out.stderr
    assert {x.name for x in contents(tmp_path).keys() - before} <= {"pytest.py", "curves.svg"}


# No tests from here on, but what `python test_dreamerv2.py` runs, and the published scores.

def seconds(function, device, repeats):
    """The median time of a call, once warm: the fourth call records a CUDA graph."""
    times, warm_up = [], 4 if device.type == "cuda" else 1
    for _ in range(warm_up + repeats):
        function()
        torch.get_device_module(device).synchronize()
        times.append(time.perf_counter())
    return float(np.median(np.diff(times)[warm_up - 1:]))


def benchmark(config):
    """Prints what takes how long, in a column; where CUDA graphs are used, beside a column
    without them. What is played and saved lies in config.logdir, an empty folder."""
    device, columns = d.pick_device(config.device), []
    for graphs in sorted({False, config.cuda_graphs and device.type == "cuda"}):
        way = dataclasses.replace(config, cuda_graphs=graphs)
        with contextlib.closing(d.make_game(config, config.num_envs, d.TRAIN)) as envs:
            columns.append(measure(way, envs, device))
    print(f"{config.game}, preset {config.preset}, {columns[-1].pop('how')}")
    for name in columns[-1]:
        print(f"{name:30}" + "".join(f"{column[name]:12.4g}" for column in columns))


def measure(config, envs, device):
    """A gradient step beside the device's fastest matrix product, its parts, launched one by
    one, and a short run -> {what: number}, and a text, how it was done."""
    on_gpu, T, B = device.type == "cuda", config.seq_len, config.batch_size
    batch = d.upload({k: np.broadcast_to(v[0], (T, B, *v.shape[1:])).copy()
                      for k, v in envs.reset()._asdict().items()}, device)
    with contextlib.redirect_stdout(None):
        agent = d.new_agent(dataclasses.replace(config, cuda_graphs=False), envs)
        with FlopCounterMode(display=False) as counter:
            agent.train_step(batch)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        agent = d.new_agent(config, envs)
        repeats = min(100, 2 + int(0.5 / seconds(lambda: agent.train_step(batch), device, 1)))
        step = seconds(lambda: agent.train_step(batch), device, repeats)
        # Of three log periods the first counts the random play in, and the last one a dream.
        every, folder = repeats * config.steps_per_update, tempfile.mkdtemp(dir=config.logdir)
        start = -(-T * config.num_envs // every) * every
        rows = 2 * start + 3 * every
        if d.train(dataclasses.replace(
                config, logdir=folder, prefill_steps=start, steps=start + 3 * every,
                log_every_steps=every, eval_episodes=0, replay_capacity=rows)):
            raise KeyboardInterrupt
    loop = json.loads(Path(folder, "metrics.jsonl").read_text().splitlines()[1])
    replay = d.Replay(Path(folder, "replay"), rows, num_envs=envs.num_envs,
                      image_shape=(envs.channels, 64, 64), action_dim=envs.num_actions)
    a = torch.randn(2 * [8192 if on_gpu else 2048], device=device)
    a = a.bfloat16() if agent.precision == "bf16" else a
    peak = 2 * len(a) ** 3 / seconds(lambda: a @ a, device, 3)
    model, seen = agent.world_model, [batch[k][0, :1] for k in ("image", "is_first")]
    still, memory = np.eye(envs.num_actions)[[0] * envs.num_envs], agent.act(*seen)[1]
    loss = agent.autocast()(lambda: model.loss(**batch, **agent.model_loss_args)[0])
    dream = agent.autocast()(torch.no_grad()(lambda: d.imagine(
        model.rssm.img_step, agent.policy, model.rssm.initial(T * B), agent.horizon)))
    parts = {"world model forward": loss, "with backward": lambda: loss().backward(),
        "imagination": dream, "sampling": lambda: d.upload(replay.sample(B, T), device),
        "optimisers": lambda: [o.adam.step() for o in agent.optimizers.values()],
        "acting": lambda: agent.act(*seen, memory), "environment": lambda: envs.step(still)}
    flops, graphs = counter.get_total_flops(), isinstance(agent.decide, d.CudaGraph)
    column = {"how": f"{agent.precision} on {device}, {'' if graphs else 'no '}CUDA graphs",
              "gradient step, ms": 1e3 * step}
    column |= {f"{k}, ms": 1e3 * seconds(v, device, repeats) for k, v in parts.items()}
    column |= {"that step, GFLOP": flops / 1e9, "fastest product, GFLOP/s": peak / 1e9,
               "share of that, %": 100 * flops / step / peak,
               "in the loop, gradient steps/s": loop["updates_per_s"],
               "in the loop, decisions/s": loop["frames_per_s"] / envs.frames_per_step}
    if on_gpu:
        column["peak memory, GB"] = torch.cuda.max_memory_allocated(device) / 1e9
    elif Path("/proc/self/status").exists():  # on a CPU, only Linux tells
        status = Path("/proc/self/status").read_text()
        column["peak memory, GB"] = 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1e9
    return column


def finished_run(path):
    """A metrics.jsonl -> config, frames, score, [(frames, return), ...] of its lines;
    ValueError says why it has none."""
    try:
        config = json.loads(path.with_name("config.json").read_text("utf-8"))
        game, steps = config["game"], int(config["steps"])
    except (OSError, ValueError, LookupError, TypeError):
        raise ValueError("its config.json is missing or damaged") from None
    try:
        rows = [json.loads(x) for x in path.read_text("utf-8").splitlines()]
        done = [(int(x["step"]), int(x["frames"]), x["episode_return"]) for x in rows]
    except (ValueError, LookupError, TypeError):
        raise ValueError("it has a damaged line") from None
    step, frames, _ = done[-1] if done else (0, 0, None)
    if step < steps:
        raise ValueError(f"not finished: {step:,} of {steps:,} decisions")
    curve = [(at, score) for _, at, score in done if score is not None]
    late = [score for at, score in curve if at > frames - min(1e6, frames / 10)]
    if not late:
        raise ValueError("no episode ended in its last part")
    return config | dict(game=str(game)), frames, float(np.mean(late)), curve


def scores(folder):
    """Prints the finished runs below a folder beside the published scores, and draws their
    curves. A run's score is its mean training return over its last million frames, or its last
    tenth if that is less. Summaries are over the games played, each the mean of its runs."""
    curves, shape, games = {}, "{:20}{:>6}{:>13}{:>11}{:>8}{:>8}" + len(AGENTS) * "{:>11}", {}
    found = sorted(Path(folder).rglob("metrics.jsonl"))
    if not found:
        what = "no run (no metrics.jsonl) below it" if Path(folder).is_dir() else "no folder"
        raise d.UsageError(f"--scores {folder}: {what}")
    print(shape.format("game", "seed", "frames", "score", "gamer", "record", *AGENTS),
          "preset, folder", sep="  ")
    for path in found:
        try:
            config, frames, score, curve = finished_run(path)
        except (ValueError, OSError) as error:
            print(f"{path} is left out: {error}", file=sys.stderr)
            continue
        cells, game = ["-"] * (2 + len(AGENTS)), d.canonical_name(config["game"])
        curves.setdefault(game, []).append(curve)
        if game in PUBLISHED:
            games.setdefault(game, []).append((score, config.get("preset")))
            cells = [f"{normalized_score(game, score, x):.2f}" for x in ("gamer", "record")]
            cells += [f"{PUBLISHED[game][agent]:.6g}" for agent in AGENTS]
        print(shape.format(config["game"], str(config.get("seed")), f"{frames:,}",
                           f"{score:.1f}", *cells),
              f"{config.get('preset')}, {path.parent}", sep="  ")
    if curves:
        Path("curves.svg").write_text(draw_curves(curves), encoding="utf-8")
        print("\ncurves.svg: their returns against frames, a panel a game")
    presets = {preset for runs in games.values() for _, preset in runs}
    print(f"\n{len(games)} of the paper's 55 games" + (
        f"; the summaries mix the presets {', '.join(sorted(map(str, presets)))}"
        if len(presets) > 1 else ""))
    if games:
        ours = {game: np.mean([score for score, _ in runs]) for game, runs in games.items()}
        table = {"these runs": summarize_scores(ours)}
        for agent in AGENTS:
            table[agent] = summarize_scores({game: PUBLISHED[game][agent] for game in games})
        print(" " * 12 + "".join(f"{name:>21}" for name in table["DQN"]))
        for name, of in table.items():
            print(f"{name:12}" + "".join(f"{value:21.2f}" for value in of.values()))


def draw_curves(games):
    """{game: [[(frames, return), ...] of a run, ...]} -> an SVG picture. A line is a run, the
    mean of its returns in each twentieth of it; dashed lines are published scores."""
    text = '<text x="{:.0f}" y="{:.0f}" font-size="{}" fill="{}">{}</text>'.format
    panels = []
    for i, (game, runs) in enumerate(games.items()):
        marks = {name: PUBLISHED[game][key] for name, key in (
            ("random", "random"), ("human", "gamer"), ("authors at 1M", "1M"))
            } if game in PUBLISHED else {}
        lines, last = [], max(at for run in runs for at, _ in run)
        for run in runs:
            part = [math.ceil(20 * at / last) for at, _ in run]
            lines.append([np.mean([point for point, k in zip(run, part) if k == j], 0)
                          for j in sorted(set(part))])
        every = [score for line in lines for _, score in line] + list(marks.values())
        low, high = min(every), max(every) + 1e-9
        height = lambda score: 180 - 140 * (score - low) / (high - low)
        shapes = [text(8, 18, 14, "black", game.replace("_", " ")), text(
            8, 196, 11, "gray", f"0 to {last:,} frames; {low:,.1f} to {high:,.1f} points")]
        for name, score in marks.items():
            y = height(score)
            shapes += [f'<path d="M8 {y:.0f}H292" stroke="gray" stroke-dasharray="4"/>',
                       text(10, y - 3, 10, "gray", f"{name} {score:g}")]
        for line, colour in zip(lines, itertools.cycle(("#06c", "#c50", "#093"))):
            at = " ".join(f"{8 + 284 * x / last:.1f},{height(y):.1f}" for x, y in line)
            shapes.append(f'<polyline points="{at}" stroke="{colour}" stroke-width="2"/>')
        corner = f"translate({300 * (i % 3)} {200 * (i // 3)})"
        panels.append(f'<g transform="{corner}" fill="none">{"".join(shapes)}</g>')
    size = f'width="{300 * min(3, len(games))}" height="{200 * math.ceil(len(games) / 3)}"'
    return (f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif">'
            f'<rect width="100%" height="100%" fill="white"/>{"".join(panels)}</svg>\n')


def normalized_score(game: str, score: float, reference: str) -> float:
    """A raw score on the way from random play, 0, to a reference, 1: "gamer" (a human)
    or "record" (the human world record). KeyError for a game that is none of the 55."""
    row = PUBLISHED[d.canonical_name(game)]
    return (score - row["random"]) / (row[reference] - row["random"])


def summarize_scores(scores: dict[str, float]) -> dict[str, float]:
    """The paper's four summaries of {game: raw score}. It recommends the last: one game
    (James Bond) makes most of a gamer mean, and a median is deaf to half of the games."""
    gamer, record = (np.array([normalized_score(*pair, reference) for pair in scores.items()])
                     for reference in ("gamer", "record"))
    return {"gamer median": float(np.median(gamer)), "gamer mean": float(gamer.mean()),
            "record mean": float(record.mean()),
            "clipped record mean": float(record.clip(max=1).mean())}


# The paper's 55 games: raw scores of random play, a human gamer, the human record, the authors'
# seeds at 1M frames (median); then, after 200M frames with sticky actions, as published:
# DreamerV2 by its authors (mean of the seeds in their files), the others with Dopamine.
(_, *COLUMNS), *ROWS = map(str.split, """
    game random gamer record 1M DreamerV2 IQN Rainbow C51 DQN; alien 228.8 7127.7 251916 388
    4175.09 4961.42 3456.95 2474.88 2484.49; amidar 5.8 1719.5 104159 28.4 2236.1 2393.43 2529.09
    1363.18 1207.74; assault 222.4 742 8647 459.8 22236.8 4884.78 3228.82 1800.12 1525.24; asterix
    210 8503.3 1000000 340 94893 10374.4 18366.6 13453.4 2711.41; asteroids 719.1 47388.7 10506650
    538 30843.4 1584.51 1483.54 1079.58 698.37; atlantis 12850 29028.1 10604840 12860 954492 890214
    802548 824994 853640; bank_heist 14.2 753.1 82058 129 1059.53 1052.27 1074.97 757.65 601.79;
    battle_zone 2360 37187.5 801000 4200 41242.8 40953.4 40060.6 25501.8 17784.8; beam_rider 363.9
    16926.5 999999 528 17917.5 7130.45 6290.48 5331.59 5852.42; berzerk 123.7 2630.4 1057940 290
    757.54 648.4 833.41 516.69 487.48; bowling 23.1 160.7 300 21 48.22 39.44 42.86 32.1 30.12;
    boxing 0.1 12.1 100 38 86.14 97.91 98.56 81.4 77.99; breakout 1.7 30.5 864 1.5 334.59 79.48
    120.07 202.39 96.23; centipede 2090.9 12017 1301709 2367.4 11168.8 3727.64 6509.87 7594.53
    2583.03; chopper_command 811 7387.8 999999 640 3017.6 9281.96 12337.5 5718.16 2690.61;
    crazy_climber 10780.5 35829.4 219900 26130 152419 132738 145389 136041 104569; demon_attack
    152.1 1971 1556345 179 67348.4 15350.4 17071.3 7098 6361.58; double_dunk -18.6 -16.4 22 -6.8
    17.55 21.12 22.12 1.28 -6.54; enduro 0 860.5 9500 55.3 1708.33 2202.98 2200.16 1283.8 628.91;
    fishing_derby -91.7 -38.7 71 -95.8 55.26 45.33 41.8 10.4 0.58; freeway 0 29.6 38 11 31.58 33.67
    33.69 33.68 26.27; frostbite 65.2 4334.7 454830 163 13884.9 7811.57 8207.72 4284.99 367.07;
    gopher 257.6 2412.5 355040 794 91645.3 12107.6 10641.1 7172.88 5479.9; gravitar 173 3351.4
    162850 130 4100.62 1346.62 1271.8 686 330.07; hero 1027 30826.4 1000000 2082 21840 36058.4
    46675.2 33753.2 17325.4; ice_hockey -11.2 0.9 36 -12.1 25.03 -5.11 -0.18 -4.36 -5.84; jamesbond
    7 29 45550 75 37095 3165.7 1097.12 725.56 573.31; kangaroo 52 3035 1424600 180 13507.9 12602.3
    12748.3 7687.54 11486; krull 1598 2665.5 104100 3929.9 41673.5 8844.17 4065.97 6770.45 6097.63;
    kung_fu_master 258.5 22736.3 1000000 9770 57541.2 31653.4 26475.1 24811.6 23435.4;
    montezuma_revenge 0 4753.3 1219200 0 85.84 500 500 1044.67 0; ms_pacman 307.3 6951.6 290090 644
    5376.49 5217.99 3861.01 3693.53 3402.4; name_this_game 2292.3 8049 25220 2700 15221.6 6638.61
    9025.75 12594.2 7278.65; phoenix 761.4 7242.6 4014440 659 40595.6 5102.03 8545.35 5849.25
    4996.58; pitfall -229.4 6463.7 114000 -134.3 -0.12 -13.16 -19.76 -18.39 -73.81; pong -20.7 14.6
    21 -19 18.39 20.13 20.18 19.34 16.61; private_eye 24.9 69571.3 101800 50 1819.32 4180.76
    21333.6 4207.11 -16.04; qbert 163.9 13455 2400000 336.36 70512.1 16729.9 17382.9 9761.91
    10117.5; riverraid 1338.5 17118 1000000 2049 16895.3 15183.4 20755.9 13514.3 11638.9;
    road_runner 11.5 7845 2038100 3810 209972 58965.9 54662.1 48213.5 36925.5; robotank 2.2 11.9 76
    4.2 73.37 65.72 65.52 60.53 59.77; seaquest 68.4 42054.7 999999 348 6988.67 17039.2 9903.38
    31025.8 1600.66; skiing -17098.1 -4336.9 -3272 -27285.4 -9667.75 -11161.9 -28707.6 -22231.1
    -15824.6; solaris 1236.3 12326.7 111420 458 1367.14 1684.4 1582.69 1961.66 1436.4;
    space_invaders 148 1668.7 621535 230.5 2358.43 4530.03 4130.88 3983.6 1794.24; star_gunner 664
    10250 77400 740 10844.5 80002.6 57908.7 34805 42165.2; tennis -23.8 -8.3 21 -10.9 14.34 22.54
    -0.22 21.7 -1.5; time_pilot 3568 5229.2 65300 2810 36981.2 11666.2 12050.5 8117.05 3654.37;
    tutankham 11.4 167.6 5384 79 264.49 251.41 239.07 240.72 103.84; up_n_down 533.4 11693.2 82840
    4176 648711 59943.9 34887.8 8279.26 8488.31; venture 0 1187.5 38900 0 0 1312.84 1528.87 1339.41
    39.13; video_pinball 16256.9 17667.9 89218328 8933.3 35452.1 415833 466895 405173 63406.1;
    wizard_of_wor 563.5 4756.5 395300 560 14712.2 5670.54 7878.62 3229.23 2065.8; yars_revenge
    3092.9 54576.9 15000105 5718.2 152364 84144 45542 11746.6 23909.4; zaxxon 32.5 9173.3 83700 110
    46625.6 11022.9 14603 6502.33 4538.57
    """.split(";"))
PUBLISHED = {game: dict(zip(COLUMNS, map(float, row))) for game, *row in ROWS}
AGENTS = COLUMNS[4:]


def command_line(argv=None):
    """python test_dreamerv2.py: measures, and returns the exit status."""
    def error(message):  # one line, like every other complaint
        raise d.UsageError(message)

    parser = argparse.ArgumentParser(
        prog="test_dreamerv2.py", allow_abbrev=False,
        description="Measures dreamerv2.py. `python -m pytest` runs the tests.")
    parser.error = error
    one = parser.add_mutually_exclusive_group(required=True)
    one.add_argument("--benchmark", action="store_true",
                     help="measure speed; flags of dreamerv2.py may follow")
    one.add_argument("--scores", metavar="FOLDER",
                     help="the finished runs below a folder beside the published scores")
    sys.path.append(os.getcwd())  # where your_module:YourGame-v0 may lie
    try:
        given, flags = parser.parse_known_args(argv)
        if given.scores is not None:
            if flags:
                error(f"--scores FOLDER knows no {' '.join(flags)}")
            scores(given.scores)
        elif "show" in d.read_flags(flags):
            error("--benchmark neither plays nor dreams")
        else:
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                benchmark(d.parse_config([*flags, "--logdir", folder])[0])
    except (d.UsageError, OSError, ImportError) as problem:
        print("test_dreamerv2.py:", *str(problem).split(), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(command_line())
