"""Tests of dreamerv2.py: `python -m pytest`, and `python -m pytest -m slow` for long ones.

    numbers       equations against hand-computed numbers and slow, obvious twins
    parity        .ci/official_mini.npz: weights, inputs, outputs and gradients computed with
                  the authors' TensorFlow code (danijar/dreamerv2 07d906e, version 2.2.0).
                  PARITY_FILE=path runs another file of the same keys; -s prints the errors.

At the end, what measures: `python test_dreamerv2.py --benchmark` and `--scores FOLDER`.
"""
import argparse, ast, contextlib, copy, csv, dataclasses, doctest, functools
import importlib, inspect, io, itertools, json, math, os, re, shutil, signal, struct
import subprocess, sys, tempfile, threading, time, tokenize, types, zlib
from pathlib import Path
from unittest import mock
from xml.etree import ElementTree

if "pytest" in sys.modules:  # before torch: threads of tests would disturb each other
    os.environ["OMP_NUM_THREADS"] = "1"

import gymnasium
import numpy as np
import torch
import torch.nn.functional as F
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete, Tuple
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.benchmark import Timer
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
DEBUG = d.read_flags("""--steps 800 --time-limit 80 --replay-capacity 1000 --prefill-steps 200
    --batch-size 4 --seq-len 8 --num-latents 4 --num-classes 4 --deter-size 16 --hidden-size 16
    --cnn-depth 2 --mlp-layers 2 --mlp-units 16 --horizon 4 --slow-every-updates 10
    --log-every-steps 200 --eval-every-steps 400""".split())
SIZES = {name: DEBUG[name] for name in """num_latents num_classes deter_size hidden_size
    cnn_depth mlp_layers mlp_units horizon""".split()}
HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory, monkeypatch):
    """A test has its own current folder; what main() does at a signal ends with it."""
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))
    handlers = {number: signal.getsignal(number) for number in (2, 15)}
    yield
    [signal.signal(*handler) for handler in handlers.items()]


@pytest.fixture
def draws(monkeypatch):
    """What straight_through_sample draws, in turn; then it takes the likeliest."""
    queue = []

    def sample(logits):
        index, probs = queue.pop(0) if queue else logits.argmax(-1), logits.softmax(-1)
        assert index.shape == logits.shape[:-1]
        return F.one_hot(index.long(), logits.shape[-1]).float() + probs - probs.detach()

    monkeypatch.setattr(d, "straight_through_sample", sample)
    return queue


def watch(monkeypatch, name, owner=None):
    """Keeps named inputs and output of the last call of d.name, or of owner.name."""
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
    fifth = lambda: torch.rand(T, B, generator=g) < 0.2
    return dict(image=torch.randint(0, 256, (T, B, 1, 64, 64), generator=g).byte(),
                action=F.one_hot(torch.randint(A, (T, B), generator=g), A).float(),
                reward=torch.randn(T, B, generator=g), is_first=fifth(), is_terminal=fifth())


# ------------------------------------------------------------------------- doctests
def test_every_part_runs_alone_after_those_before_it(monkeypatch):
    """Doctests, in a notebook's __main__: none needs a later cell; then main works."""
    kernel, examples = types.ModuleType("__main__"), 0
    monkeypatch.setitem(sys.modules, "__main__", kernel)
    for cell in CELLS:
        exec(compile(cell, "cell", "exec"), vars(kernel))
        for piece in ast.walk(ast.parse(cell)):
            if isinstance(piece, (ast.FunctionDef, ast.ClassDef)):
                example = doctest.DocTestParser().get_doctest(
                    ast.get_docstring(piece) or "", dict(vars(kernel)), piece.name, None, 0)
                assert doctest.DocTestRunner().run(example).failed == 0, piece.name
                examples += len(example.examples)
    assert examples == sum(len(x.examples) for x in doctest.DocTestFinder().find(d)) > 50
    assert not list(Path().iterdir())
    assert kernel.main([*CATCH, "--logdir", "run", "--steps", "30"]) == 0
    assert lines("run")[-1]["step"] == 30


# ----------------------------------------------------------------- numbers and twins
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_samples_follow_the_softmax_and_are_one_hot(dtype):
    """Within 4.5 standard errors; drawn in bfloat16, the first of 32 would be 7 off."""
    torch.manual_seed(0)
    for logits in (torch.tensor([0.0, 1.0, -1.0, 2.0]), torch.zeros(32)):
        many = logits.to(dtype).expand(400_000, -1).requires_grad_()
        sample, p = d.straight_through_sample(many).detach(), logits.softmax(-1)
        assert sample.dtype == torch.float32 and sample.unique().tolist() == [0.0, 1.0]
        assert (sample.sum(-1) == 1).all()
        assert ((sample.mean(0) - p).abs() < 4.5 * (p * (1 - p) / 400_000).sqrt()).all()


def test_is_first_equals_a_fresh_start(draws):
    torch.manual_seed(0)
    rssm = d.RSSM(3, 5, 3, 4, 8, 9)
    old = d.State(torch.randn(6, 8), torch.rand(6, 3, 4), torch.randn(6, 3, 4))
    action, embed, yes = torch.randn(6, 3), torch.randn(6, 5), torch.ones(6).bool()
    reset = rssm.obs_step(old, action, embed, yes)
    fresh = rssm.obs_step(rssm.initial(6), torch.zeros(6, 3), embed, ~yes)
    assert all(torch.equal(a, b) for a, b in zip(reset, fresh))


def test_actor_loss_by_hand():
    """Two states, ρ = ½, η = 0.1, scale 4; every term written out, and what gets a gradient."""
    policy = d.OneHot(torch.tensor([[0.0, 0.0], [0.0, math.log(3)]]))  # ½ ½ and ¼ ¾
    log_prob = policy.log_prob(torch.tensor([[1.0, 0.0], [0.0, 1.0]])).requires_grad_()
    V = torch.tensor([2.0, 1.0]).requires_grad_()
    v = torch.tensor([1.0, 3.0]).requires_grad_()
    w = torch.tensor([1.0, 0.5])
    entropy = [math.log(2), 0.25 * math.log(4) + 0.75 * math.log(4 / 3)]
    first = 0.5 * math.log(0.5) * (2 - 1) / 4 + 0.5 * 2 + 0.1 * entropy[0]
    second = 0.5 * math.log(0.75) * (1 - 3) / 4 + 0.5 * 1 + 0.1 * entropy[1]
    loss, metrics = d.actor_loss(log_prob, policy.entropy(), V, v, w, entropy_scale=0.1,
                                 reinforce_mix=0.5, advantage_scale=4.0)
    assert loss.item() == pytest.approx(-(1 * first + 0.5 * second) / 2, rel=1e-6)
    assert metrics["actor_entropy"].item() == pytest.approx(sum(entropy) / 2, rel=1e-6)
    loss.backward()
    assert log_prob.grad.tolist() == [-1 * 0.5 * (2 - 1) / 4 / 2, -0.5 * 0.5 * (1 - 3) / 4 / 2]
    assert V.grad.tolist() == [-1 * 0.5 / 2, -0.5 * 0.5 / 2]  # by (1 - ρ)·V alone
    assert v.grad is None


@pytest.mark.parametrize("tanh", [True, False])
def test_losses_are_means(tanh, draws):
    """D7: a mean over T·B of the paper's summands, so twice the data, same loss."""
    agent, batch = tiny_agent(reward_tanh=tanh), random_batch()
    twice = {k: torch.cat([v, v], 1) for k, v in batch.items()}
    for net in agent.world_model.decoder.net, agent.world_model.reward_head:
        nn.init.zeros_(net[-1].weight)  # predicts 0: biases are zero
    once, doubled = (agent.world_model.loss(**data)[2] for data in (batch, twice))
    assert once["model_loss"].item() == pytest.approx(doubled["model_loss"].item(), rel=1e-5)
    reward = batch["reward"].tanh() if tanh else batch["reward"]
    for name, target, size in ("image", batch["image"] / 255 - 0.5, 4096), ("reward", reward, 1):
        assert once[f"{name}_loss"].item() == pytest.approx(  # of 4096 pixels, of a number
            size * (0.5 * target.square().mean().item() + HALF_LOG_2PI), rel=1e-5)


def test_a_piece_says_what_it_takes_and_names_the_shape():
    cell, x = d.LayerNormGRUCell(2, 2).double(), torch.ones(1, 2).double()
    assert cell(x, x).dtype == d.mlp(2, 1).double()(x).dtype == torch.float64
    agent, batch, found = tiny_agent(), random_batch(), []
    for convert in (torch.Tensor.numpy, torch.Tensor.clone):
        torch.manual_seed(1)
        memory = None
        for image, is_first in zip(batch["image"], batch["is_first"]):
            action, memory = agent.act(convert(image), convert(is_first), memory)
        found.append((action, *memory[0]))
    assert_close(*found, rtol=0, atol=0)
    refused, one = functools.partial(pytest.raises, AssertionError), torch.ones
    for shape in ((3, 1, 84, 84), (3, 64, 64, 1), (3, 64, 64)):
        refused(agent.act, one(shape), one(3)).match(r"not \(N, C, 64, 64\)")
    batch["is_first"] = batch["is_first"][:, :1]
    refused(agent.world_model.loss, **batch).match(r"\(T, B\) differ")
    refused(d.lambda_return, one(4, 3), one(5, 3), one(4, 1), 0.9).match("N differs")


def test_slow_critic():
    """D12 and the schedule: born equal, copied after updates 0, 3, 6, ... and else kept."""
    agent, batch = tiny_agent(slow_every_updates=3, critic_lr=1e-2), random_batch()
    copied, both = [], (agent.critic, agent.slow_critic)
    for _ in range(8):
        copied.append(all(map(torch.equal, *(critic.parameters() for critic in both))))
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
    return x.transpose(0, 1)  # (B, T, ...), as theirs -> (T, B, ...), as ours; or back


def n_major(x):
    """(H, B*T, ...) with n = b*T + t, as theirs -> n = t*B + b, as ours."""
    return x.unflatten(1, (B, T)).transpose(1, 2).flatten(1, 2)


def their_image(key):
    return get(key).movedim(-1, -3)  # channels last -> channels first


def their_state(prefix):
    return d.State(*(get(prefix + name) for name in ("deter", "stoch", "logit")))


def their_batch(prefix):
    batch = {k: get(prefix + k) for k in ("action", "reward", "is_first", "is_terminal")}
    batch["image"] = their_image(prefix + "image")
    return {k: time_first(v) for k, v in batch.items()}


def close_each(prefix, tolerance=1e-5, **ours):
    for name, value in ours.items():
        close(prefix + name, value, tolerance=tolerance)


def close_state(prefix, state):
    close_each(prefix, **dict(zip(("deter", "stoch", "logit"), state)))


# Names of weights: theirs -> ours.
RSSM_NAMES = {"img_in": "img_in", "gru/dense": "cell.linear", "gru/norm": "cell.norm",
              "img_out_0": "prior.0", "img_dist_0": "prior.2", "obs_out": "posterior.0",
              "obs_dist": "posterior.2"}
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
    module.load_state_dict(module.state_dict() | our_weights(prefix, names))
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
    at = f"lambda_return/{case}/"
    pcont = get(at + "pcont").expand_as(reward) if case == "scalar_pcont" else pcont
    value = torch.cat([value, bootstrap[None] * (case != "no_bootstrap")])
    lambda_ = float(PARITY[at + "lambda"])
    close(at + "returns", d.lambda_return(reward, value, pcont, lambda_))


def test_parity_gru():
    names = {"dense": "linear", "norm": "norm"}
    cell = with_weights(d.LayerNormGRUCell(Q, D_), "gru/w", names)
    assert cell.norm.eps == float(PARITY["gru/ln_epsilon"])
    x, h = get("gru/input").requires_grad_(), get("gru/state").requires_grad_()
    out = cell(x, h)
    close("gru/output", out)
    (out * get("gru/probe")).sum().backward()
    close_weights("gru/grad", names, {k: p.grad for k, p in cell.named_parameters()})
    close_each("gru/grad/", input=x.grad, state=h.grad)


@pytest.mark.parametrize("case", ["draw_state", "draw_nostate", "mode_state"])
def test_parity_rssm_observe(case, draws):
    rssm = with_weights(d.RSSM(A, 13, S, K, D_, Q), "rssm/w", RSSM_NAMES)
    embed, action, is_first, post = (time_first(get(f"rssm_observe/in/{k}")) for k in (
        "embed", "action", "is_first", "draw_post"))
    draws.extend(post if case.startswith("draw") else [])
    if case != "draw_nostate":  # theirs may go on from a state
        rssm.initial = lambda n: their_state("rssm_observe/in/state_")
    posterior, prior = rssm.observe(embed, action, is_first)
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
    alpha = None if alpha == 0.5 else alpha  # theirs is then the plain KL: --no-kl-balancing
    forward = case.endswith("forward")  # their flag turns KL and balance around
    ends = (prior, post, 1 - alpha) if forward else (post, prior, alpha)
    loss, kl = d.balanced_kl(*ends)
    loss = loss.clamp(min=free) if case.endswith("noavg") else loss
    loss = loss.mean().clamp(min=free)
    loss.backward()
    close_each(at, value=kl, loss=loss, grad_post=post.grad, grad_prior=prior.grad)


def test_parity_encoder_and_decoder():
    encoder = with_weights(d.ConvEncoder(1, C), "encoder/w", ENCODER_NAMES)
    embed = encoder(d.preprocess(their_image("encoder/image_uint8")))
    close("encoder/embed", embed.unflatten(1, (-1, 2, 2)).movedim(1, -1).flatten(1))
    decoder = with_weights(d.ConvDecoder(S * K + D_, 1, C), "decoder/w", DECODER_NAMES)
    mean = decoder(get("decoder/feat"))
    close("decoder/mean", mean, their_image("decoder/mean"))
    nll = d.normal_nll(mean, their_image("decoder/target"))
    close("decoder/log_prob", -nll.sum((-3, -2, -1)))


@pytest.mark.parametrize("case", ["draw", "mode"])
def test_parity_world_model_loss(case, draws):
    settings = {k: float(PARITY["wm/" + v]) for k, v in dict(gamma="discount_gamma",
                kl_scale="loss_scale/kl", discount_scale="loss_scale/discount").items()}
    model = d.Agent(d.Config(**RELEASED | settings), A).world_model
    with_weights(model, "wm/w", MODEL_NAMES)
    model.rssm.initial = lambda n: their_state("wm/state/")
    draws.extend(time_first(get("wm/draw/post")) if case == "draw" else [])
    loss, posterior, metrics = model.loss(**their_batch("wm/batch/"))
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
    with_weights(agent, "ac/w", AGENT_NAMES)
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
    for name, x in zip(("seq/feat", "seq/action", "target"), (*imagined.output, returns.output)):
        close(at + name, x, n_major(get(at + name)))
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
        close_each(f"opt/{case}/var{t}/", **module)


def test_parity_agent(draws):
    agent = d.Agent(d.Config(**RELEASED, slow_every_updates=2), A)
    with_weights(agent, "agent/w0", AGENT_NAMES)
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
        for name in metrics.keys() - {"returns", "critic_loss"}:
            close(f"{at}metric/{theirs.get(name, name)}", metrics[name], tolerance=1e-4)
        for name, weight in our_weights(f"agent/w{i}", AGENT_NAMES).items():
            error = (agent.state_dict()[name] - weight).abs().max().item()
            print(f"parity agent w{i} {name}: {error:.1e} absolute")
            assert error < 5e-7, (i, name, error)


def test_parity_act(draws):
    agent, memory = with_weights(d.Agent(d.Config(**RELEASED), A), "agent/w0", AGENT_NAMES), None
    for call in ("agent/policy0/", "agent/policy1/"):
        image, is_first = their_image(call + "obs/image"), get(call + "obs/is_first")
        for greedy, key in (True, "eval_action"), (False, "train_action"):
            draws[:] = get(call + "draw/post"), get(call + "draw/action")
            action, after = agent.act(image, is_first, memory, greedy)
            assert len(draws) == greedy  # the mode is not drawn, z is
            close(call + key, action)
        memory = after
        close_state(call + "latent_", memory[0][:2])
        close(call + "actor_logits", agent.actor(memory[0].feature))


def test_parity_initialisation():
    """The paper's 22M parameters; spread and range of every weight, as Keras draws them."""
    agent = d.Agent(d.Config(), int(PARITY["init/num_actions"]))
    size = sum(p.numel() for p in agent.parameters())
    assert size - sum(p.numel() for p in agent.slow_critic.parameters()) == 22_245_398
    found = 0
    for name, std, top in zip(*(PARITY[f"init/{k}"] for k in ("names", "std", "absmax"))):
        theirs, _, end = str(name).rpartition("/")
        theirs = max((k for k in AGENT_NAMES if theirs.endswith(k)), key=len, default="")
        if not theirs:
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
    """Each loss's graph touches these modules; an optimizer would move only its own."""
    agent = tiny_agent(reinforce_mix=rho)
    agent.requires_grad_()
    agent.optimizers = {name: Recorder(agent) for name in FLOW}
    agent.train_step(random_batch())
    reached = {name: {module_of(k) for k, g in optimizer.grads.items() if g.any()}
               for name, optimizer in agent.optimizers.items()}
    future = {"rssm", "reward_head", "discount_head", "slow_critic"} if rho < 1 else set()
    assert reached == FLOW | {"actor": {"actor"} | future}


def step_and_see(agent, batch, **tolerance):
    """The modules whose weights one gradient step changes, and its metrics."""
    agent.updates = 1  # no slow copy
    before = copy.deepcopy(agent.state_dict())
    metrics = agent.train_step(batch)
    return {module_of(k) for k, v in agent.named_parameters()
            if not torch.allclose(v, before[k], **tolerance)}, metrics


@pytest.mark.parametrize("rho", [1.0, 0.5, 0.0])
def test_each_optimizer_moves_only_its_own(rho):
    """And, at last, not what is frozen, a part or all: it neither learns nor decays."""
    agent, batch = tiny_agent(reinforce_mix=rho), random_batch()
    for moving in (*FLOW, "all"):
        for name, optimizer in agent.optimizers.items():
            optimizer.adam.param_groups[0].update(
                lr=0.01 if moving in (name, "all") else 0.0, weight_decay=0.1)
        agent.world_model.encoder.requires_grad_(moving != "all")
        expected = FLOW.get(moving, set(MODULES) - {"encoder", "slow_critic"})
        assert step_and_see(agent, batch, rtol=0, atol=0)[0] == expected
    assert all(p.grad is None for p in agent.slow_critic.parameters())
    for frozen in agent.world_model, agent.critic:
        frozen.requires_grad_(False)
    assert step_and_see(agent, batch, rtol=0, atol=0)[0] == {"actor"}


@pytest.mark.parametrize("slow, shift", [*itertools.product([False, True], [0, 1])])
def test_action_baseline_and_advantage_are_those_that_the_flags_name(slow, shift, monkeypatch):
    """a_t = actions[t+1] is credited with V_t, or V_{t+1} [D5], beyond v_t [D4]."""
    agent = tiny_agent(slow_baseline=slow, shifted_advantage=bool(shift), return_lambda=0.7)
    agent.updates = 1  # no slow copy
    agent.optimizers = {name: Recorder(agent) for name in FLOW}  # all weights stay
    nn.init.constant_(agent.slow_critic[-1].bias, 50.0)
    imagined, returns, weights, actor = (watch(monkeypatch, name) for name in (
        "imagine", "lambda_return", "trajectory_weights", "actor_loss"))
    metrics = agent.train_step(random_batch())
    assert_close(metrics["returns"], returns.output.mean())
    assert returns.inputs["lambda_"] == 0.7
    features, actions = imagined.output
    end = agent.config.horizon - shift
    policy = agent.policy(features[:end])
    baseline = (agent.slow_critic if slow else agent.critic)(features[:end]).squeeze(-1)
    expected = dict(log_prob=policy.log_prob(actions[1:end + 1]), entropy=policy.entropy(),
                    returns=returns.output[shift:], baseline=baseline, weights=weights.output[:end])
    assert_close({name: actor.inputs[name] for name in expected}, expected)


@pytest.mark.parametrize("head, expected", [(True, [1.0, 0, 0, 0]), (False, [1, 0.5, 0.25, 0.125])])
def test_true_start(head, expected, monkeypatch):
    """D13: after a terminal start no state counts. Without a discount head γ is everywhere."""
    agent = tiny_agent(discount_head=head, gamma=0.5)
    weights = watch(monkeypatch, "trajectory_weights")
    agent.train_step(random_batch() | dict(is_terminal=torch.ones(6, 3).bool()))
    assert_close(weights.output, torch.tensor(expected)[:, None].expand(4, 18))
    assert not d.trajectory_weights(torch.ones(2, 1, requires_grad=True)).requires_grad


@pytest.mark.parametrize("settings", [
    {}, dict(free_nats=1e3), dict(free_bits=1e3), dict(free_bits=1e3, kl_balancing=False)])
def test_free_nats_and_bits_stop_the_kl_below_them(settings, draws):
    agent, batch = tiny_agent(**settings, kl_scale=1e6), random_batch()
    loss, _, metrics = agent.world_model.loss(**batch)
    loss.backward()
    assert agent.world_model.rssm.prior[-1].weight.grad.any() == (not settings)
    if not settings:  # a little below their mean, but above some
        agent.config.free_nats = 0.999 * metrics["kl"].item()
        assert_close(agent.world_model.loss(**batch)[0], loss)


# ------------------------------------------------------------ ablations and policies
@pytest.mark.parametrize("name", [*PRESETS, *"""layer_norm reward_gradients discrete_latents
    kl_balancing policy_reinforce image_gradients discount_head reward_tanh""".split()])
def test_a_step_of_every_switch_and_preset(name, monkeypatch):
    """Every module learns, except the one that is switched off. Not the slow critic."""
    settings, batch = PRESETS.get(name, {name: False}) | SIZES, random_batch()
    agent = tiny_agent(continuous=name == "continuous", **settings)
    kl = watch(monkeypatch, "balanced_kl")
    moved, metrics = step_and_see(agent, batch, rtol=1e-5)  # which is more than decay
    assert agent.precision == "fp32"  # what auto is on a CPU [D11]
    assert (kl.inputs["alpha"] is None) == (name == "kl_balancing")
    assert all(v.isfinite() and v.dtype == torch.float32 and not v.requires_grad
               for v in metrics.values())
    off = set() if agent.config.discount_head else {"discount_head"}
    assert moved == set(MODULES) - {"slow_critic"} - off
    action, (state, _) = agent.act(batch["image"][0], batch["is_first"][0])
    assert action.shape == (3, 3) and action.abs().max() <= 1 and not state.h.requires_grad


def test_without_layer_norm_the_gates_are_the_linear_layers_outputs():
    agent = tiny_agent(layer_norm=False)
    assert not any("norm" in k for k in agent.state_dict())
    cell, x, h = agent.world_model.rssm.cell, torch.randn(2, 16), torch.randn(2, 16)
    reset, candidate, update = (cell.linear.weight @ torch.cat([x, h], 1).T).T.chunk(3, 1)
    u = (update - 1).sigmoid()
    assert_close(cell(x, h), u * (reset.sigmoid() * candidate).tanh() + (1 - u) * h)


@pytest.mark.parametrize("head, other, flag", [
    ("reward_head", "decoder", "reward_gradients"), ("decoder", "reward_head", "image_gradients")])
@pytest.mark.parametrize("on, discrete", [*itertools.product([True, False], repeat=2)])
def test_a_stopped_head_learns_but_teaches_the_rssm_nothing(head, other, flag, on, discrete):
    """Only that head's term is left: both scales and the other head's weights are 0."""
    agent = tiny_agent(**{flag: on}, discrete_latents=discrete, kl_scale=0.0, discount_scale=0.0)
    for weight in getattr(agent.world_model, other).parameters():
        nn.init.zeros_(weight)
    gradients = Recorder(agent.world_model)
    gradients.minimize(agent.world_model.loss(**random_batch())[0])
    taught = {module_of(k) for k, g in gradients.grads.items() if g.any()} - {other}
    assert taught == ({"encoder", "rssm", head} if on else {head})


@pytest.mark.parametrize("off", [{}, dict(policy_reinforce=False), dict(continuous=True)])
@pytest.mark.parametrize("step, rho, eta", [
    (0, 0.9, 3e-3), (1.25e6, 0.95, 1.65e-3), (2.5e6, 1.0, 3e-4), (9e6, 1.0, 3e-4)])
def test_schedules_are_linear_and_reinforce_stays_off(step, rho, eta, off, monkeypatch):
    loss, settings = watch(monkeypatch, "actor_loss"), PRESETS["schedules"] | off
    tiny_agent(**settings).train_step(random_batch(), step)
    found = loss.inputs["reinforce_mix"], loss.inputs["entropy_scale"]
    assert found == pytest.approx((0.0 if off else rho, eta))


def test_gaussian_latents_are_their_formulas():
    torch.manual_seed(0)
    p, q = torch.randn(2, 3, 5, 8).requires_grad_(), torch.randn(2, 3, 5, 8)  # S = 5, K = 4
    (mu_p, s_p), (mu_q, s_q) = ((x[..., :4], 2 / (1 + (-x[..., 4:] / 2).exp()) + 0.1)
                                for x in (p, q))
    kl = (s_q / s_p).log() + (s_p ** 2 + (mu_p - mu_q) ** 2) / (2 * s_q ** 2) - 0.5
    assert_close(d.gaussian_kl(p, q), kl.sum((-2, -1)))
    z = d.gaussian(p.expand(10_000, 2, 3, 5, 8)).rsample()
    assert_close(z.mean(0), mu_p, atol=0.1, rtol=0)
    assert_close(z.std(0), s_p, atol=0.1, rtol=0)
    ours, = torch.autograd.grad((z ** 2).mean(0).sum(), p, retain_graph=True)
    exact, = torch.autograd.grad((mu_p ** 2 + s_p ** 2).sum(), p)
    assert_close(ours, exact, atol=0.2, rtol=0)


def test_the_gaussian_models_losses_are_gaussian(monkeypatch):
    agent = tiny_agent(discrete_latents=False, kl_scale=1000.0)
    call = watch(monkeypatch, "balanced_kl")
    loss, state, metrics = agent.world_model.loss(**random_batch())
    assert state.z.shape == (6, 3, 4, 4) and (state.z % 1).all()  # none is one-hot
    posterior, prior = call.inputs["posterior"], call.inputs["prior"]
    nats = dict(kl=d.gaussian_kl(posterior, prior))
    for name, params in dict(prior_entropy=prior, posterior_entropy=posterior).items():
        nats[name] = d.gaussian(params).entropy().sum((-2, -1))
    assert_close({k: metrics[k] for k in nats}, {k: v.mean() for k, v in nats.items()})
    kl_part = (loss - metrics["image_loss"] - metrics["reward_loss"]
               - agent.config.discount_scale * metrics["discount_loss"])
    assert kl_part.item() == pytest.approx(1000 * metrics["kl"].item(), rel=1e-3)


@pytest.mark.parametrize("mean, s", [(0, 0), (2, -3), (-1, 4), (0.3, -8), (0.5, -1)])
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


# ----------------------------------------------------------- what DreamerV3 changed
@pytest.mark.parametrize("y", [
    -6e8, -4.851651954e8, -1e4, -1.0, -0.01, 0.0, 1e-3, 0.08, 3.7, 250.0, 123456.0, 1e9])
def test_two_hot_is_its_slow_twin_and_its_mean_gives_the_number_back(y):
    bins = [math.copysign(math.expm1(abs(x)), x) for x in np.linspace(-20, 20, 255)]
    inside = min(max(y, bins[0]), bins[-1])
    i = next(i for i in range(254) if bins[i] <= inside <= bins[i + 1])
    upper = (inside - bins[i]) / (bins[i + 1] - bins[i])
    out = torch.randn(255, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert d.head_mean(out) == d.head_mean(out.float())  # as a head is in bf16
    log_p = out.double().log_softmax(0)
    loss = -(1 - upper) * log_p[i].item() - upper * log_p[i + 1].item()
    found = d.twohot_nll(out.expand(2, 3, 255), torch.full((2, 3), y))
    assert found.shape == (2, 3) and found[1, 2].item() == pytest.approx(loss, rel=2e-3)
    certain = torch.full((255,), -100.0)
    certain[i], certain[i + 1] = math.log(1 - upper + 1e-9), math.log(upper + 1e-9)
    assert d.head_mean(certain).item() == pytest.approx(inside, rel=1e-3, abs=1e-2)


def test_free_bits_take_the_gradient_of_each_term_below_them():
    """The loss is α·max(1, KL) + (1 - α)·max(1, KL); metrics show the KL as it is."""
    post = torch.tensor([[[0.0, 0.0]], [[9.0, 0.0]]], requires_grad=True)  # KL 0.14, 1.36
    prior = torch.tensor([3.0, 1.0]).log().flip(0).expand(2, 1, 2).clone().requires_grad_()
    loss, kl = d.balanced_kl(post, prior, 0.8, free_bits=1.0)
    assert loss.tolist() == pytest.approx([1.0, kl[1].item()]) and kl[0] < 0.2 and kl[1] > 1
    loss.sum().backward()
    for logits in (post, prior):
        assert not logits.grad[0].any() and logits.grad[1].any()


@pytest.mark.parametrize("before", [0.0, 100.0])
def test_the_return_scale_is_a_running_range_and_a_constant(before, monkeypatch):
    agent, actor = tiny_agent(return_scale=1.0), watch(monkeypatch, "actor_loss")
    agent.spread.fill_(before)
    returns = torch.randn(15, 40, generator=torch.Generator().manual_seed(0))
    scale = agent.advantage_scale(returns.clone().requires_grad_())
    low, high = np.percentile(returns, (5, 95))
    spread = 0.99 * before + 0.01 * (high - low)
    assert agent.state_dict()["spread"].item() == pytest.approx(spread)  # it is saved
    assert scale.item() == pytest.approx(max(1.0, spread)) and not scale.requires_grad
    agent.train_step(random_batch())
    assert actor.inputs["advantage_scale"].item() == max(1.0, agent.spread.item())
    assert agent.spread.item() != spread and tiny_agent().advantage_scale(returns) == 1


def test_v3_starts_at_zero_and_rules_no_class_out(monkeypatch):
    agent, critic = tiny_agent(**PRESETS["v3"] | SIZES), watch(monkeypatch, "critic_loss")
    model, feature = agent.world_model, torch.randn(5, 32)
    assert not d.head_mean(model.reward_head(feature)).any()
    assert not d.head_mean(agent.critic(feature)).any()
    agent.actor[-1].weight.data *= 1e3
    probs = agent.policy(feature).logits.softmax(-1)
    assert probs.min().item() == pytest.approx(0.01 / 3, rel=1e-3)
    model.rssm.prior[-1].weight.data *= 1e4
    state = d.State(torch.randn(5, 16), torch.randn(5, 4, 4))
    logits = model.rssm.img_step(state, torch.zeros(5, 3)).logits
    assert logits.exp().min().item() == pytest.approx(0.01 / 4, rel=1e-3)
    metrics = agent.train_step(random_batch())
    losses = metrics["reward_loss"], metrics["critic_loss"] / critic.inputs["weights"].mean()
    assert list(map(float, losses)) == pytest.approx([math.log(255)] * 2)
    scale, balance = agent.config.kl_scale, agent.config.kl_balance
    assert (scale * balance, scale * (1 - balance)) == pytest.approx((1, 0.1), rel=1e-6)
    agents = (tiny_agent(continuous=True, discrete_latents=False, unimix=share)
              for share in (0.0, 0.5))  # without classes, nothing is mixed
    assert_close(*(agent.train_step(random_batch()) for agent in agents))


# ---------------------------------------------------------------- speed and arithmetic
COMPARED = "image_loss reward_loss discount_loss kl model_loss actor_entropy critic_loss".split()


def meta_agent(monkeypatch, config, num_actions, continuous=False):
    """An agent and a batch on the device "meta", whose tensors have no numbers."""
    adam = torch.optim.AdamW  # this device knows neither fused Adam nor autocast
    monkeypatch.setattr(torch.optim, "AdamW", lambda *x, fused, **kw: adam(*x, **kw))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    batch = {k: v.to("meta").expand(config.seq_len, config.batch_size, *v.shape[2:])
             for k, v in random_batch(1, 1, num_actions).items()}
    return d.Agent(config, num_actions, 1, "meta", continuous), batch


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("settings", [
    {}, dict(reinforce_mix=0.5), dict(discrete_latents=False), PRESETS["v3"]])
def test_a_step_and_a_decision_read_nothing_back(settings, continuous, monkeypatch):
    config, memory = d.Config(**DEBUG, **settings), None
    agent, batch = meta_agent(monkeypatch, config, 3, continuous)
    for greedy in (False, True):
        action, memory = agent.act(batch["image"][0], batch["is_first"][0], memory, greedy)
    metrics = agent.train_step(batch)
    assert {x.device.type for x in (action, memory[1], *memory[0], *metrics.values())} == {"meta"}


class Launches(TorchDispatchMode):
    """Counts what would launch kernels on a GPU: no views and no unfilled tensors."""
    count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        free = op.is_view or "view" in op.name() or "empty" in op.name()
        self.count += op.namespace == "aten" and not free
        return op(*args, **(kwargs or {}))


@pytest.mark.skipif(torch.__version__ < "2.13", reason="older torch counts otherwise")
@pytest.mark.parametrize("precision, rho, most", [
    ("fp32", 1.0, 4819), ("fp32", 0.9, 5807), ("bf16", 1.0, 5143), ("bf16", 0.9, 6253)])
def test_operations_of_a_gradient_step(precision, rho, most):
    """With the paper's T, H and layers; more take longer where Python launches them."""
    settings = dict(mlp_layers=4, horizon=15, precision=precision, reinforce_mix=rho)
    agent, batch = tiny_agent(18, **settings), random_batch(T=50, B=2, A=18)
    agent.train_step(batch)  # Adam makes its state and the slow critic is copied
    with Launches() as launches:
        agent.train_step(batch)
    assert launches.count <= most


def hand_count(c, num_actions):
    """Twice the multiply-adds: forward, back to the weights, and back to the inputs."""
    N, H, W, depth = c.seq_len * c.batch_size, c.horizon, c.mlp_units, c.cnn_depth
    S, D, U, E = c.num_latents * c.num_classes, c.deter_size, c.hidden_size, 32 * depth
    mlp = lambda out: (S + D) * W + (c.mlp_layers - 1) * W * W + W * out
    first = 31 * 31 * 16 * depth  # the image needs no gradient
    encoder = (14 * 14 * 16 * 2 + 6 * 6 * 16 * 8 + 2 * 2 * 16 * 32) * depth ** 2
    decoder = (S + D) * E + E * 25 * 4 * depth + 30 * 30 * 36 * depth + (
        5 * 5 * 25 * 8 + 13 * 13 * 36 * 2) * depth ** 2
    inputs, cell, head = num_actions * U, (U + D) * 3 * D, D * U + U * S  # prior, posterior
    model = N * (2 * first + 2 * inputs + 3 * (
        encoder + decoder + S * U + cell + 2 * head + E * U + 2 * mlp(1)))
    dream = N * (H * (S * U + inputs + cell + head + mlp(num_actions)) + 3 * H * mlp(1))
    behaviour = N * H * (3 * (mlp(num_actions) + mlp(1)) - 2 * (S + D) * W)
    return 2 * (model + dream + behaviour)


@pytest.mark.parametrize("preset, tera", [("atari", 2.3716), ("small", 0.010312)])
def test_arithmetic_of_a_step_is_the_hand_count(preset, tera, monkeypatch):
    """torch's own counter against the hand: nothing is computed twice or for nothing."""
    config = d.Config(**PRESETS[preset])
    agent, batch = meta_agent(monkeypatch, config, 18)
    with FlopCounterMode(display=False) as counter:
        agent.train_step(batch)
    assert counter.get_total_flops() == pytest.approx(hand_count(config, 18), rel=1e-3)
    assert hand_count(config, 18) == pytest.approx(1e12 * tera, rel=1e-4)


def one_step(device, precision, batch, num_actions=3, **settings):
    agent = tiny_agent(num_actions, device, precision=precision, **settings)
    torch.manual_seed(1)
    metrics = agent.train_step({name: x.to(device) for name, x in batch.items()})
    return {k: float(v) for k, v in metrics.items()}, agent


def test_bf16_agrees_with_fp32(monkeypatch):
    """Losses within 2e-2, float32 outside the layers, no optimizer in an autocast."""
    real = d.Optimizer.minimize
    monkeypatch.setattr(d.Optimizer, "minimize", lambda *args: (
        outside.append(not torch.is_autocast_enabled("cpu")), real(*args))[1])
    batch, outside = random_batch(T=8, B=8), []
    small = {k: PRESETS["small"][k] for k in SIZES if not k.startswith(("mlp", "horizon"))}
    exact, _ = one_step("cpu", "fp32", batch, **small)
    rounded, agent = one_step("cpu", "bf16", batch, **small)
    for name in (*COMPARED, "model_grad_norm"):
        assert rounded[name] == pytest.approx(exact[name], rel=2e-2, abs=2e-3), name
    assert outside == [True] * 6
    for name, weight in agent.named_parameters():
        if not name.startswith("slow"):
            assert weight.dtype == weight.grad.dtype == torch.float32, name
            assert weight.grad.any() or "bias" in name, name
    seen, layers, model = set(), set(), agent.world_model
    model.rssm.cell.norm.register_forward_pre_hook(lambda _, x: seen.add(x[0].dtype))
    for module in (model.encoder, model.decoder, model.reward_head, model.discount_head,
                   agent.actor, agent.critic, agent.slow_critic):
        module.register_forward_hook(lambda _, x, y: layers.add(y.dtype))
    for name in "normal_nll balanced_kl lambda_return critic_loss actor_loss".split():
        def see(*args, loss=getattr(d, name), **kwargs):
            seen.update(x.dtype for x in (*args, *kwargs.values()) if torch.is_tensor(x))
            return loss(*args, **kwargs)
        monkeypatch.setattr(d, name, see)
    agent.train_step(batch)
    action, memory = agent.act(batch["image"][0], batch["is_first"][0])
    assert seen | {x.dtype for x in (action, memory[1], *memory[0])} == {torch.float32}
    assert layers == {torch.bfloat16}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-4), ("bf16", 2e-2)])
def test_gpu_agrees_with_cpu(precision, tolerance, monkeypatch):
    """One gradient step of the paper's size: same batch, weights and noise."""
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.rand(x.shape).to(x.device))
    batch, paper = random_batch(T=10, B=4, A=18), {k: getattr(d.Config, k) for k in SIZES}
    ours, _ = one_step("cuda", precision, batch, 18, **paper)
    exact, _ = one_step("cpu", "fp32", batch, 18, **paper)
    for name in COMPARED:
        assert ours[name] == pytest.approx(exact[name], rel=tolerance, abs=1e-4), name


@pytest.mark.parametrize("device", ["mps", "cpu"])
def test_weights_lie_channels_last_but_on_apples_gpus_and_float32_is_float32(device, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # torch's own default
    monkeypatch.setattr(d.Agent, "to", mock.Mock())
    d.Agent(d.Config(**DEBUG), 3, 1, device)
    orders = [call.kwargs.get("memory_format") for call in d.Agent.to.call_args_list]
    assert (torch.channels_last in orders) == (device == "cpu")
    assert not (torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32)


# ------------------------------------------------- toy games, and helpers to run them
class Counting(gymnasium.Env):
    """Shows how many actions were taken, and the last. 4 steps, then an end or a time limit."""
    observation_space, action_space, episode = Box(0, 255, (64, 64), np.uint8), Discrete(5), 0

    def reset(self, *, seed=None, options=None):
        self.t, self.last, self.episode = 0, 0, self.episode + 1
        return self.see(), {}

    def see(self):
        return np.full((64, 64), 10 * self.t + self.last, np.uint8)

    def step(self, action):
        assert self.action_space.contains(action)
        self.t, self.last = self.t + 1, int(action)
        end, odd = self.t == 4, self.episode % 2 == 1
        return self.see(), float(10 * self.t), end and odd, end and not odd, {}


class Colours(gymnasium.Env):
    """96×128 RGB: left half red, right half blue. Those not yet closed are in `open`."""
    observation_space, action_space = Box(0, 255, (96, 128, 3), np.uint8), Discrete(2)
    image, open = np.zeros((96, 128, 3), np.uint8), set()
    image[:, :64, 0], image[:, 64:, 2] = 200, 100

    def __init__(self):
        self.open.add(self)

    def reset(self, *, seed=None, options=None):
        return self.image, {}

    def step(self, action):
        return self.image, 1.0, False, False, {}

    def close(self):
        self.open.discard(self)


class Levers(Colours):
    """Two levers; the image shows what they were set to, the reward is the first."""
    action_space, played = Box(np.float32([0, -10]), np.float32([4, 30])), []
    observation_space, image = Box(0, 255, (64, 64), np.uint8), np.full((64, 64), 99, np.uint8)

    def step(self, action):
        self.played.append(action.tolist())
        return np.full((64, 64), 50 * action[0], np.uint8), float(action[0]), False, False, {}


for Game in (Counting, Colours, Levers):
    gymnasium.register(f"tests/{Game.__name__}-v0", Game)


@contextlib.contextmanager
def toy_game(**attributes):
    """The id of a game like Colours, but for these attributes; all made have to be closed."""
    Colours.open.clear()
    with mock.patch.dict(gymnasium.registry):
        gymnasium.register("tests/Toy-v0", type("Toy", (Colours,), attributes))
        yield "tests/Toy-v0"
    assert not Colours.open


def make(game, **settings):
    return d.make_envs(d.Config(game=game, **settings))


def as_flags(settings):
    for name, value in settings.items():
        yield ("--no-" if value is False else "--") + name.replace("_", "-")
        yield from [str(value)] * (not isinstance(value, bool))


QUICK = ("--preset", "atari", *as_flags(DEBUG | dict(
    prefill_steps=20, checkpoint_minutes=1000, replay_capacity=200)))
CATCH = ("--game", "Catch", *QUICK)
UNSEEN = ("--eval-episodes", 0)
inspect.getsource = functools.cache(inspect.getsource)  # else a fifth of all the tests' time


@pytest.fixture
def undreamt(monkeypatch):
    """Dreams take half of a short run's time."""
    monkeypatch.setattr(d, "draw_film", lambda *_: np.zeros((1, 1, 1, 1), np.uint8))


def run(*flags, main=None):
    """main() in this process: its status, or argparse's."""
    try:
        return (main or d.main)([*map(str, flags)])
    except SystemExit as stop:
        return stop.code


def lines(logdir):
    """The rows of metrics.jsonl, in which no step may come twice, whatever happened."""
    rows = [json.loads(x) for x in (Path(logdir) / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == sorted({row["step"] for row in rows})
    return rows


def contents(folder):
    return {p: p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def counters(logdir):
    return torch.load(Path(logdir) / "checkpoint.pt", weights_only=True)["counters"]


def settings(logdir):
    return json.loads((Path(logdir) / "config.json").read_text())


# ------------------------------------------------------------------- alignment of rows
def play_rows(envs, actions, seed=0):
    return [envs.reset(seed), *(envs.step(np.eye(envs.num_actions)[a]) for a in actions)]


def test_rows_are_aligned_on_a_counting_environment(tmp_path):
    """A reset's row has no reward, though this library were to return one with it."""
    envs = make("tests/Counting-v0")
    step = envs.vector_env.step
    envs.vector_env.step = lambda action: [
        x + 7 if i == 1 else x for i, x in enumerate(step(action))]
    rows = play_rows(envs, [(i + 1) % 5 for i in range(22)])
    replay = d.Replay(tmp_path / "replay.npy", 200, rows[0])
    [replay.add(row) for row in rows]
    assert rows[1].image[0, 0, 0] == 11 and rows[1].action.dtype == np.float32
    assert [r.is_first for r in rows] == [i % 5 == 0 for i in range(23)]
    assert [r.is_terminal for r in rows] == [i % 10 == 4 for i in range(23)]
    batch = replay.sample(64, 9)
    seen, action = batch["image"][..., 0, 0, 0].long(), batch["action"]
    first = seen == 0
    assert torch.equal(first[1:], batch["is_first"][1:])
    assert (action[first] == 0).all() and (batch["reward"][first] == 0).all()
    assert (action[~first].sum(-1) == 1).all()
    assert torch.equal(action[~first].argmax(-1), seen[~first] % 10)
    assert torch.equal(batch["reward"][~first].long(), seen[~first] // 10 * 10 + 7)


def test_playing_remembers_and_keeps_the_score(monkeypatch):
    def act(image, is_first, memory, greedy):
        asked.append(((memory or 0) + 1, image[0, 0, 0, 0], is_first[0], greedy))
        return torch.eye(5)[[1]], asked[-1][0]

    agent = types.SimpleNamespace(act=act)
    asked, reset = [], watch(monkeypatch, "reset", d.Envs)
    assert d.evaluate(agent, make("tests/Counting-v0"), 3, seed=5).tolist() == [[100.0, 4]] * 3
    assert reset.inputs["seed"] == 5 and asked == [
        (i + 1, [0, 11, 21, 31, 41][i % 5], i % 5 == 0, True) for i in range(3 * 5 - 1)]


# ---------------------------------------------------------------------------- replay
def counting_row(t, writer=0):
    """Row t holds t everywhere, and its writer."""
    return d.Row(np.full((1, 2, 2), t, np.uint8), np.float32([t, writer]), np.float32(t),
                 np.bool_(t % 5 == 0), np.bool_(t % 5 == 4))


def fill(replay, rows, writer=0):
    for _ in range(rows):
        replay.add(counting_row(replay.count + 1, writer))


def check_samples(replay, seq_len, numbers, writer):
    """All runs of these rows are drawn, and nothing else; each row is one in all its fields."""
    batch = replay.sample(400, seq_len)
    assert {*map(tuple, batch["reward"].T.tolist())} == {
        tuple(numbers[i:i + seq_len]) for i in range(len(numbers) - seq_len + 1)}
    t, action = batch["reward"], batch["action"]
    assert (t == action[..., 0]).all() and (t[..., None] == batch["image"].flatten(2)).all()
    assert batch["is_first"][0].all() and ((t[1:] % 5 == 0) == batch["is_first"][1:]).all()
    assert ((t % 5 == 4) == batch["is_terminal"]).all()
    assert all(w == writer(t) for t, w in action.flatten(0, 1).tolist())


def test_replay_is_uniform(tmp_path):
    """D8: every start is equally likely, ends of episodes included. Its seed says which."""
    path, row = tmp_path / "replay.npy", counting_row(0)
    fill(d.Replay(path, 50, row), 70)
    a, b, c = (d.Replay(path, 50, row, 70, seed).sample(20_000, 11)["reward"] for seed in (1, 1, 2))
    counts = np.bincount(a[0].int() - 21)
    assert len(counts) == 40 and abs(counts - 500).max() < 5 * math.sqrt(500)
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize("torn", [False, True])
def test_replay_sequences_are_whole_also_after_a_kill(torn, tmp_path):
    """Rows came after the checkpoint, one was torn. All that are whole are kept."""
    def kill(*_):
        raise KeyboardInterrupt

    length, killed = 5, type("", (), dict(__array__=kill, __float__=kill, __bool__=kill))()
    for counted, later in itertools.product((2, 5, 6, 13), range(3 * length + 1)):
        path, total = tmp_path / f"{counted}-{later}.npy", counted + later
        replay = d.Replay(path, length, counting_row(0))
        fill(replay, total, writer=1)
        if torn:
            with contextlib.suppress(KeyboardInterrupt):
                replay.add(d.Row(*[77] * (total % 5), *[killed] * (5 - total % 5)))
            assert replay.rows["number"][total % length] == 0
            replay.rows["reward"][total % length] = 77
        kept = [*range(max(0, total - length + torn) + 1, total + 1)]
        too_old = functools.partial(d.Replay, path, length, counting_row(0))
        pytest.raises(d.UsageError, too_old, total + 1).match("older than the checkpoint")
        again = d.Replay(path, length, counting_row(0), counted)
        for new in range(length + 2):  # rows of the next process
            numbers = (kept + [*range(total + 1, total + new + 1)])[-length:]
            for seq_len in (1, 2, 3):
                if len(numbers) >= seq_len:
                    check_samples(again, seq_len, numbers, lambda t: 1 + (t > total))
                else:
                    pytest.raises(AssertionError, again.sample, 1, seq_len)
            fill(again, 1, writer=2)


# ---------------------------------------------------------------------- environments
def test_atari_protocol(monkeypatch):
    from ale_py import vector_env
    defaults = inspect.signature(vector_env.AtariVectorEnv).parameters
    made = watch(monkeypatch, "AtariVectorEnv", vector_env)
    envs = d.make_envs(d.Config())
    assert {k: made.inputs.get(k, v.default) for k, v in defaults.items()}.items() >= dict(
        repeat_action_probability=0.25, full_action_space=True, noop_max=30, num_envs=1,
        frameskip=4, max_num_frames_per_episode=108_000, img_height=64, img_width=64,
        stack_num=1, maxpool=True, grayscale=True, reward_clipping=False, episodic_life=False,
        life_loss_info=False, use_fire_reset=False, continuous=False).items()
    assert envs.reset(0).image.shape == (1, 64, 64)
    assert (envs.num_actions, envs.frames_per_step) == (18, 4)
    pytest.raises(AssertionError, envs.step, np.eye(19)[18]).match(r"not \(A,\)")
    envs = make("Breakout", action_repeat=3, sticky=0.5, max_noops=0, time_limit=10,
                full_action_space=False)
    assert envs.num_actions == 4 and made.inputs.items() >= dict(frameskip=3, noop_max=1,
        repeat_action_probability=0.5, max_num_frames_per_episode=30).items()


def test_what_the_user_registered_is_not_replaced_by_an_atari_game(monkeypatch):
    """Nor when ale_py is imported later. Nor is its folder."""
    import ale_py  # noqa: F401  Else its games would be gone with the patched registry.
    monkeypatch.delitem(sys.modules, "ale_py")
    names = ["Breakout-v0", "Breakout", "Breakout-v0", "Othello-v0"]
    with mock.patch.dict(gymnasium.registry):
        for name in {*names} - {"Breakout"}:
            gymnasium.registry.pop(name, None)
            gymnasium.register(name, d.Catch)
        assert [make(name).num_actions for name in names] == [3, 18, 3, 3]
    names = ["Pong", "ALE/Pong-v5", "mod:Pong-v5", "my/Pong-v5", "Pong-v1", "Catch"]
    folders = [d.choose_settings(dict(game=name)).logdir for name in names]
    assert d.choose_settings(dict(logdir="auto")).logdir == "auto"
    assert folders[0] == folders[1] and len({*folders}) == 5 and "my_Pong-v5" in folders[3]


@pytest.mark.parametrize("shape", [
    (56, 56), (63, 63), (10, 10, 1), (64, 64), (40, 9, 3), (96, 128, 3), (50, 70, 4), (210, 160)])
def test_images_of_every_size(shape):
    """Twin: up to 64 pixels each is repeated; above, each is the mean of those it covers."""
    def weights(n):
        i, j = np.arange(64)[:, None], np.arange(n)
        covered = j == (2 * i + 1) * n // 128 if n <= 64 else (
            j > i * n / 64 - 1) & (j < (i + 1) * n / 64)
        return covered / covered.sum(1, keepdims=True)

    image = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    expected = np.einsum("ih,jw,hwc->cij", *map(weights, shape[:2]), np.atleast_3d(image))
    assert abs(d.to_image(image) - expected).max() < 0.501
    assert (d.to_image(image[::-1]) == d.to_image(image[::-1].copy())).all()
    board = (np.indices(shape[:2]).sum(0) % 2 * 255).astype(np.uint8)
    assert d.to_image(board).std() > 127 or max(shape) > 64


@pytest.mark.parametrize("role", ["observation_space", "action_space"])
@pytest.mark.parametrize("space", [
    Dict(image=Colours.observation_space, mission=Discrete(2)), MultiDiscrete([2, 2]),
    Tuple([Colours.observation_space]), Box(0, 9, (9, 9, 5), np.uint8),
    Box(0, 9, (7,), np.uint8), Box(0, 9, (64, 64, 3), np.int64), Box(-1, 1, (64, 64)),
    Box(0, 9, (2,), np.int32), Box(-np.inf, np.inf, (2,)), Box(-1, 1, (2, 2))])
def test_games_that_cannot_be_played_say_why(role, space, capsys):
    with toy_game(**{role: space}) as game:
        assert run("--game", game, "--logdir", "run") == 2 and not Path("run").exists()
        Colours.open.clear()
    err = capsys.readouterr().err.splitlines()[-1]
    assert re.match(f"dreamerv2.py: --game {game}: .*wrapper", err) and str(space) in err


def test_rewards_may_be_arrays_but_not_nan():
    rewards = [np.ones(1), np.ones((1, 1)), np.array(1.0), np.array([[1]]), np.float32(1), True]
    given = iter(rewards + [math.nan])
    with toy_game(step=lambda *_: (Colours.image, next(given), False, False, {})) as game:
        envs = make(game)
        assert all(row.reward == 1 for row in play_rows(envs, [0] * len(rewards))[1:])
        pytest.raises(AssertionError, envs.step, np.eye(2)[0]).match("not finite")
        envs.close()


def test_actions_are_scaled_to_their_box_and_repeated_or_counted_from_its_start():
    """Rounding may leave the box: in float32, -0.7 + 1 * (0.1 - -0.7) is more than 0.1."""
    envs = make("tests/Levers-v0", action_repeat=3, time_limit=2)
    assert (envs.continuous, envs.num_actions, envs.frames_per_step) == (True, 2, 3)
    envs.reset(0)
    Levers.played.clear()
    first, row = envs.step(np.array([-1.0, 1.0])), envs.step(torch.tensor([[0.5, 0.0]]))
    assert Levers.played == [[0, 30]] * 3 + [[3, 10]] * 3
    assert (first.reward, row.reward, row.image[0, 0, 0]) == (0, 9, 150)
    assert row.action.tolist() == [0.5, 0] and row.action.dtype == np.float32
    assert envs.ended == [[9.0, 2.0]] and not envs.step(np.ones(2)).action.any()  # the reset
    with mock.patch.object(Counting, "action_space", Discrete(3, start=1)):
        env = d.plain_game(Counting())
        assert env.reset()[0].max() == 0 and [env.step(a)[0].max() for a in (0, 2)] == [11, 23]
    for dtype in np.float32, np.float64, np.float16:
        game, played = Levers(), []
        box = game.action_space = Box(dtype([-1.2, -0.7]), dtype([2.5, 0.1]), dtype=dtype)
        game.step = lambda action: (played.append(action), (game.image, 0.0, False, False, {}))[1]
        env = d.plain_game(game)
        for x in [-1, np.nextafter(-1, 0), np.nextafter(1, 0), 1, *np.linspace(-1, 1, 999)]:
            env.step(np.full(2, x, np.float32))
        assert all(map(box.contains, played)) and np.min(played, 0) == pytest.approx(box.low)
        assert np.max(played, 0) == pytest.approx(box.high)


@pytest.mark.parametrize("command", [
    "lock", "Replay", "load_agent", "save_checkpoint", "evaluate --eval", "draw_film --dream"])
def test_games_are_closed_when_an_exception_passes(command, tmp_path, monkeypatch, undreamt):
    seen, (name, *show) = [], command.split()
    with toy_game() as game, monkeypatch.context() as patch:
        flags = ("--game", game, *QUICK, "--time-limit", 9, "--logdir", tmp_path)
        assert run(*flags, "--steps", 22) == 0 and not Colours.open
        patch.setattr(d, name, lambda *_, **__: seen.extend(Colours.open) or 1 / 0)
        pytest.raises(ZeroDivisionError, run, *flags, "--steps", 24, *show)
    assert len(seen) == (1 if show else 2)


def test_a_game_of_which_one_can_exist_fails_at_once(tmp_path, capsys):
    def alone(self):
        assert not Colours.open, "the port is taken"
        Colours.__init__(self)

    with toy_game(__init__=alone) as game:
        flags = ("--game", game, *QUICK, "--time-limit", 9, "--logdir", tmp_path / "run")
        pytest.raises(AssertionError, run, *flags).match("the port is taken")
        assert not (tmp_path / "run").exists() and not Colours.open
        assert "--eval-episodes 0" in capsys.readouterr().out
        assert run(*flags, "--steps", 24, *UNSEEN) == run(*flags[-2:], "--eval") == 0


# -------------------------------------------------------------------------- pictures
def read_png(path):
    """An independent decoder: frames (T, H, W, C), and the milliseconds of each."""
    data, at, frames, order, times, promised = Path(path).read_bytes(), 8, [], [], set(), 1
    assert data[:8] == bytes([137, 80, 78, 71, 13, 10, 26, 10]) and b"IEND" == data[-8:-4]
    while at < len(data):
        size, name = struct.unpack_from(">I4s", data, at)
        body, at = data[at + 8:at + 8 + size], at + 12 + size
        assert data[at - 4:at] == zlib.crc32(name + body).to_bytes(4, "big")
        if name == b"IHDR":
            width, height, *kind = struct.unpack(">IIBBBBB", body)
            channels = {(8, 0, 0, 0, 0): 1, (8, 2, 0, 0, 0): 3}[tuple(kind)]
        elif name == b"acTL":
            promised = int.from_bytes(body[:4], "big")
        elif name == b"fcTL":
            number, *place, time, unit = struct.unpack(">5I2H", body[:24])
            assert place == [width, height, 0, 0]
            order.append(number), times.add(1000 * time // unit)
        elif name == b"fdAT":
            order.append(int.from_bytes(body[:4], "big"))
        if name in (b"IDAT", b"fdAT"):
            raw = zlib.decompress(body[4:] if name == b"fdAT" else body)
            raw = np.frombuffer(raw, np.uint8).reshape(height, 1 + width * channels)
            assert {*raw[:, 0]} <= {0} or {*raw[:, 0]} == {2}  # filter 2 adds the line above
            frame = raw[:, 1:].cumsum(0, dtype=np.uint8) if raw[0, 0] else raw[:, 1:]
            frames.append(frame.reshape(height, width, channels))
    assert order == list(range(len(order))) and promised == len(frames)
    return np.stack(frames), times


def test_a_dream_sees_its_context_and_no_image_after_it(monkeypatch):
    agent, batch = tiny_agent(), random_batch(T=50, B=4)
    agent.world_model.rssm.posterior[-1].weight.data *= 30  # sees small changes
    batch["is_first"] = torch.isin(torch.arange(50), torch.tensor([3, 9]))[:, None].expand(50, 4)

    def dream(name="image", changed=slice(0), seed=1):
        fields = batch | {name: batch[name].clone()}
        fields[name][changed] = fields[name].max() - fields[name][changed]
        rows = [d.Row(*(x[t, b].numpy() for x in fields.values()))
                for b in range(4) for t in range(50)]
        monkeypatch.setattr(d, "play", lambda *_, **__: itertools.cycle(rows))
        torch.manual_seed(seed)
        film = d.draw_film(agent, None, 0)
        assert [(frame[:2] == 255).all() for frame in film] == [True] * 5 + [False] * 45
        tiles = film.reshape(50, 4, 65, 3, 65)[:, :, 2:64, :, :64]
        return tiles.astype(int).transpose(3, 0, 1, 2, 4)  # (3, T, B, 62, 64)

    truth, model, error = dream()
    assert (truth == batch["image"][:, :, 0, 2:].numpy()).all() and model.std() > 1
    assert abs(error - 127.5 - (model - truth) / 2).max() <= 1
    later, same, _ = dream(changed=slice(5, None))
    assert (later != truth).any() and (same == model).all()
    assert (dream(seed=2)[1][6:] != model[6:]).any() and (dream("action", 7)[1] != model).any()
    assert (dream("action", 0)[1] == model).all()  # it was chosen in a state that is not known
    for at, start in (2, 3), (4, 9):  # an image is remembered until an episode starts
        same = (dream(changed=at)[1] == model).all((1, 2, 3))
        assert same.tolist() == [not at <= t < start for t in range(50)]


def test_pictures_show_colours_or_the_newest_of_stacked_frames(monkeypatch):
    """In one sequence whose images are all seen, as --eval draws it."""
    for channels, shown in (1, [0]), (2, [85]), (3, [0, 85, 255]), (4, [128]):
        image = np.uint8([0, 85, 255, 128])[:channels, None, None].repeat(64, 1).repeat(64, 2)
        row = d.Row(image, np.zeros(3, np.float32), np.float32(0), np.False_, np.False_)
        monkeypatch.setattr(d, "play", lambda *_: itertools.repeat(row))
        agent = d.Agent(d.Config(**DEBUG), 3, channels)
        agent.world_model.decoder.net[-1].bias.data.fill_(9)  # white, and more
        film = d.draw_film(agent, None, 0, seen=200, length=200, count=1)
        assert film.shape == (200, 65, 3 * 65, len(shown)) and (film[:, :2] == 255).all()
        assert (film[:, 2:64, :64] == np.uint8(shown)).all() and film[:, 2:64, 65:129].min() == 255


@pytest.mark.parametrize("game, channels", [("Pong", 1), ("tests/Colours-v0", 3)])
def test_eval_and_dream_draw_and_leave_the_run_as_it_is(game, channels, capsys, monkeypatch):
    """Also a folder from another machine, of whose long name the end counts; no flag is needed."""
    folder, name = Path("runs", "书" * 79 + "1"), "书" * 39 + "1"
    assert run("--logdir", "there", *QUICK, "--game", game, "--steps", 24, "--time-limit", 40,
               "--device", "cpu", "--precision", "bf16", *UNSEEN) == 0
    assert vars(d.Config()).keys() - settings("there").keys() == {"logdir", "device", "precision"}
    os.mkdir("runs"), os.remove("there/replay.npy"), os.rename("there", folder)
    before, act = contents("runs"), watch(monkeypatch, "act", d.Agent)
    assert run("--logdir", folder, "--dream") == 0 and act.inputs["greedy"] is False
    monkeypatch.chdir(folder), capsys.readouterr()
    assert run("--logdir", ".", "--eval", "--eval-episodes", 3) == 0
    assert act.inputs["greedy"] is True  # in draw_film; evaluate is greedy, too
    assert re.search(r"fp32 on(.|\n)*: 3, mean score -?[\d.]+, .*, 40 decisions each\n",
                     capsys.readouterr().out)
    (seen, _), (film, times) = read_png(f"{name}-eval.png"), read_png(f"../../{name}-dream.png")
    os.remove(f"{name}-eval.png"), monkeypatch.chdir("../..")
    assert contents("runs") == before and times == {100} and (seen[:, :8] == 255).all()
    for film, at, scale in (film, (50, 4 * 65, 3 * 65), 4), (seen, (200, 65, 3 * 65), 4):
        assert film.shape == (at[0], scale * at[1], scale * at[2], channels)
        if channels == 3:  # left half red, right half blue, in the truth of both
            assert (film[-1, 9, [9, 40 * scale]] == [[200, 0, 0], [0, 0, 100]]).all()


# --------------------------------------------------------------------------- running
def test_alone_in_a_folder_it_trains_logs_draws_plays_and_dreams(tmp_path):
    """In a process of its own, whose output is no terminal. Importing it does nothing."""
    flags = [*QUICK, *"""--prefill-steps 100 --steps 200 --log-every-steps 50
        --eval-every-steps 140 --logdir run""".split()]
    shutil.copy(HERE / "dreamerv2.py", tmp_path)
    out = subprocess.run([sys.executable, "-Bc", f"""if True:
        import os, dreamerv2
        print(os.listdir())
        for extra in [], ["--eval"], ["--dream"]:
            assert dreamerv2.main({flags} + extra) == 0"""],
        capture_output=True, text=True, cwd=tmp_path)
    assert out.returncode == 0 and "/200" not in out.stderr and "\r" not in out.stderr, out.stderr
    assert re.match(r"\['dreamerv2.py'\]\n(.|\n)*Breakout: 18 actions.*fp32 on", out.stdout)
    assert re.findall(r"^(\d+)/200 ", out.stdout, re.M) == ["140", "150", "200"]
    rows = lines(tmp_path / "run")
    assert [row["step"] for row in rows if row["kl"]] == [140, 150, 200] and all(
        math.isfinite(v) for row in rows for v in row.values() if v is not None)
    assert rows[2].items() >= dict(frames=800, updates=25).items() and rows[2].keys() >= set(
        """step wall_time_s updates_per_s image_loss reward_loss discount_loss kl prior_entropy
        posterior_entropy actor_entropy actor_loss critic_loss model_grad_norm actor_grad_norm value
        critic_grad_norm returns episode_return episode_length eval_return eval_length""".split())
    assert {x.name for x in contents(tmp_path)} == {
        "dreamerv2.py", "run-eval.png", "run-dream.png", "config.json", "metrics.jsonl",
        "checkpoint.pt", "lock", "replay.npy", "dream.png"}
    assert read_png(tmp_path / "run" / "dream.png")[0].shape == (50, 16 * 65, 12 * 65, 1)


def test_run_resumes_without_a_burst_and_by_a_clock_that_only_goes_on(tmp_path, monkeypatch):
    """A line is of its period: step n has a kl of n, decision n a reward of n."""
    real, number = d.Agent.train_step, itertools.count(1)
    monkeypatch.setattr(d.time, "time", itertools.count(1e9, -3600).__next__)
    monkeypatch.setattr(d.Agent, "train_step", lambda agent, batch, step: real(
        agent, batch, step) | dict(kl=torch.tensor(float(agent.updates))))
    with toy_game(step=lambda *_: (Colours.image, float(next(number)), True, False, {})) as game:
        flags = ("--game", game, *QUICK, "--logdir", tmp_path, *UNSEEN, "--log-every-steps", 20)
        assert run(*flags, "--steps", 60) == 0
        with open(tmp_path / "metrics.jsonl", "a") as file:
            file.write('{"step": 65, "upda')  # torn by a kill
        assert run(*flags, "--steps", 80) == 0
        rows, before = lines(tmp_path), (tmp_path / "checkpoint.pt").read_bytes()
        assert run(*flags, "--steps", 80) == run(*flags, "--steps", 50) == 0
    assert lines(tmp_path) == rows and (tmp_path / "checkpoint.pt").read_bytes() == before
    assert [[row[k] for k in ("step", "updates", "kl", "episode_return")] for row in rows] == [
        [40, 5, 3.0, 20.5], [60, 10, 8.0, 50.5], [80, 15, 13.0, 70.5]]
    assert 0 < rows[0]["wall_time_s"] < rows[1]["wall_time_s"] < rows[2]["wall_time_s"] < 3600
    assert rows[1]["updates_per_s"] == pytest.approx(
        5 / (rows[1]["wall_time_s"] - rows[0]["wall_time_s"]))


@pytest.fixture
def in_step(monkeypatch, undreamt):
    """in_step(count, function): Catch calls function in its count-th step from here on."""
    def hook(count, function):
        real, left = d.Catch.step, itertools.count(count, -1)
        monkeypatch.setattr(d.Catch, "step", lambda self, action: (
            next(left) == 1 and function(), real(self, action))[1])
    return hook


@pytest.mark.parametrize("number, step, saved", [
    (signal.SIGINT, 33, 33), (signal.SIGTERM, 33, 33), (signal.SIGTERM, 44, 40)])
def test_ctrl_c_and_sigterm_lose_nothing(number, step, saved, tmp_path, in_step, capsys):
    flags, load = (*CATCH, "--logdir", tmp_path, "--steps"), d.load_agent
    with mock.patch.object(d, "load_agent", lambda *x: signal.raise_signal(number) or load(*x)):
        assert run(*flags, 48) == 128 + number  # in a start
    in_step(step, lambda: signal.raise_signal(number))  # 44: in the evaluation after decision 40
    assert run(*flags, 10**6, "--eval-every-steps", 40) == 128 + number
    assert "the same command goes on" in capsys.readouterr().out
    found, line = counters(tmp_path), lines(tmp_path)[-1]
    assert found["step"] == line["step"] == saved and ("eval_return" in line) == (step > 40)
    assert found["updates"] == line["updates"] == (saved - 20) // 4
    in_step(49 - saved, lambda: signal.raise_signal(number))  # in the last one
    assert run(*flags, 48, "--log-every-steps", 47) == 0  # the run is complete
    assert [("eval_return" in x, x["updates"]) for x in lines(tmp_path)[-2:]] == [
        (False, 6), (True, 7)]


@pytest.mark.parametrize("step, saved", [(33, 32), (44, 39)])
def test_a_game_that_hangs_or_raises_does_not_take_the_run_with_it(step, saved, tmp_path, in_step):
    for end, seen in [(mock.Mock(side_effect=ValueError("it fell\nover")), ValueError),
                      (lambda: [signal.raise_signal(x) for x in (15, 15)], KeyboardInterrupt)]:
        flags = (*CATCH, "--eval-every-steps", 40, "--logdir", tmp_path / seen.__name__)
        in_step(step, end)
        pytest.raises(seen, run, *flags, "--checkpoint-minutes", 0)
        assert counters(flags[-1])["step"] == saved
        assert run(*flags, "--steps", 42) == 0 and lines(flags[-1])[-1]["step"] == 42


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_help_and_paths_on_any_console(encoding, tmp_path, monkeypatch):
    """Those that know no Greek show "?". ~ is the home folder; a module lies in this one."""
    monkeypatch.setenv("HOME", str(tmp_path)), monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.setattr(sys, "path", [x for x in sys.path if x not in ("", os.getcwd())])
    Path("apart.py").write_text("import gymnasium, dreamerv2\n"
                                "gymnasium.register('X-v0', dreamerv2.Catch)")
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    with monkeypatch.context() as patch, mock.patch.dict(sys.modules):
        patch.setattr(sys, "stdout", streams[0]), patch.setattr(sys, "stderr", streams[1])
        flags = ("--game", "apart:X-v0", *QUICK, "--steps", 10, "--logdir=~/β")
        assert [run("-h"), run(*flags), run(*flags, "--gamma", 0.5)] == [0, 0, 2]
    assert [stream.flush() for stream in streams] and counters(tmp_path / "β")["step"] == 10
    out, err = (stream.buffer.getvalue().decode(encoding) for stream in streams)
    beta = "β" if encoding == "utf-8" else "?"
    assert f"weight {beta} of" in out and "10 decisions" in out and f"/{beta}/config.json" in err
    assert out.count("(default:") == len(dataclasses.fields(d.Config))


def test_standard_error_may_be_none_an_odd_object_or_a_terminal_of_0x0(tmp_path):
    shown, (main, terminal) = [], os.openpty()
    reader = threading.Thread(target=lambda: [
        shown.append(data) for data in iter(lambda: os.read(main, 1), b"\4")])
    reader.start()
    odd = types.SimpleNamespace(write=lambda text: None, flush=lambda: None)
    for stream in None, odd, os.fdopen(terminal, "w"):
        with contextlib.redirect_stderr(stream):
            assert run("--steps", 0) == 2 and run(
                *CATCH, "--prefill-steps", 300, "--steps", 301, *UNSEEN,
                "--logdir", tmp_path / type(stream).__name__) == 0
    stream.write("\4\n"), stream.close(), reader.join()
    assert re.fullmatch(rb"(?s).*must be.*100%\|.* 301/301 .*", b"".join(shown))


def test_every_flag_runs(tmp_path, monkeypatch):
    flags = {k: not v if isinstance(v, bool) else v / 2 or 0.5 for k, v in vars(d.Config()).items()
             if isinstance(v, (bool, float))} | dict(
        game="Freeway", preset="v3", steps=60, seed=7, device="cpu", precision="bf16",
        action_repeat=3, max_noops=5, time_limit=40, replay_capacity=900, prefill_steps=30,
        steps_per_update=8, batch_size=3, seq_len=7, num_latents=5, num_classes=3, deter_size=9,
        hidden_size=11, cnn_depth=3, mlp_layers=1, mlp_units=13, horizon=3, anneal_steps=200,
        slow_every_updates=3, log_every_steps=20, eval_every_steps=50, eval_episodes=2)
    assert all(flags[k] != v for k, v in vars(d.Config()).items() if k != "logdir")
    calls = [watch(monkeypatch, name, owner) for owner, name in ((d.Optimizer, "__init__"), (
        d.Replay, "__init__"), (d.Replay, "sample"), (d, "load_agent"), (d, "evaluate"))]
    assert run("--logdir", tmp_path, *as_flags(flags)) == 0
    assert settings(tmp_path).items() == flags.items() - {("device", "cpu"), ("precision", "bf16")}
    got, last = {k: v for call in calls for k, v in call.inputs.items()}, lines(tmp_path)[-1]
    assert last["updates"] == (last["step"] - 30) // 8 and last["frames"] == 3 * last["step"]
    assert [last["eval_return"], last["eval_length"]] == calls[-1].output.mean(0).tolist()
    assert calls[3].inputs["config"] == d.Config(**flags, logdir=str(tmp_path))
    assert got.items() >= dict(lr=5e-5, eps=5e-6,
        clip=50.0, decay=5e-7, capacity=900, batch_size=3, seq_len=7, episodes=2).items()


BAD = """--step 9|--steps|--steps 0|--steps 1.5|--steps many|--seed -1|--batch-size -1|Pong
--horizon 0|--layer-norm=no|--no-such-flag|--gamma nan|--gamma -0.1|--seed 18446744073709551616
--seq-len 0|--steps-per-update 0|--replay-capacity 0|--device cuda:99|--device toaster
--precision tf32|--anneal-steps -1|--entropy-scale-end -1|--kl-balance inf|--checkpoint-minutes -1
--checkpoint-minutes inf|--num-classes 0|--time-limit 0|--game=|--eval-episodes -1|--max-noops -1
--action-repeat -4|--free-nats -1|--grad-clip -1|--game Combat|--game tests:"""
BAD = [(flags, re.sub("^--|=.*", "", flags.split()[0])) for flags in re.split(r"[|\n]", BAD)] + [
    ("--game Brekout", "`Breakout`"), ("--eval", "train first"), ("--dream", "train first"),
    ("--game CartPole-v1", "images"), ("--game NoSuch-v0", "module:id"),
    ("--game no_module:Game-v0", "no_module"), ("--preset smal", "'small'"),
    ("--seq-len 500", "prefill-steps"), ("--replay-capacity 3", "replay-capacity"),
    ("--eval --dream", "not allowed"),
    (f"--logdir {sys.executable}", sys.executable), ("--logdir " + 300 * "x", "xxx")]


@pytest.mark.parametrize("flags, named", BAD, ids=[flags[:40] for flags, _ in BAD])
def test_bad_input_is_one_line_and_status_2(flags, named, tmp_path, capsys):
    assert run(*CATCH, "--logdir", tmp_path / "run", *flags.split()) == 2
    err = capsys.readouterr().err
    assert re.fullmatch("dreamerv2.py: .*\n", err) and named in err + err.replace("_", "-")
    assert not (tmp_path / "run").exists()  # nothing on disk is touched


# ---------------------------------------------------------------------- crash safety
@pytest.fixture
def short_run(tmp_path, tmp_path_factory):
    first = tmp_path_factory.getbasetemp() / "first"
    first.exists() or run(*CATCH, "--steps", 40, "--logdir", first)
    return Path(shutil.copytree(first, tmp_path / "run"))


WITNESS = """
import os, sys, zlib, dreamerv2 as d
log, add = open(sys.argv[1], "a", buffering=1), d.Replay.add
def witnessed(replay, row):
    said = zlib.crc32(row.image), row.action.argmax(), *map(int, row[2:])
    print(os.getpid(), replay.count + 1, *said, file=log)
    add(replay, row)
d.Replay.add = witnessed
sys.exit(d.main(sys.argv[2:]))
"""


@pytest.mark.parametrize("kills", [3, pytest.param(25, marks=pytest.mark.slow)])
def test_killed_at_random_moments(kills, tmp_path):
    """On the real emulator; the ring wraps. The next process goes on, one decision back at most.
    Each whole row is what was last written under its number, and no number is left out."""
    rng, log, logdir, steps = np.random.default_rng(), tmp_path / "log", tmp_path / "run", 0
    command = [sys.executable, "-c", WITNESS, log, *QUICK, "--checkpoint-minutes", "0",
               "--replay-capacity", "50", "--log-every-steps", "10", "--eval-episodes", "0",
               "--logdir", logdir, "--steps"]
    for killed in [True] * kills + [False]:
        job = subprocess.Popen(command + ["20000" if killed else str(steps + 60)],
                               cwd=HERE, stdout=subprocess.DEVNULL)
        while killed and not (log.exists() and f"{job.pid} " in log.read_text()):
            assert job.poll() is None
            time.sleep(0.02)
        if killed:
            time.sleep(rng.uniform(0, 1))
            job.kill()
        assert job.wait() == (-signal.SIGKILL if killed else 0)
        n = counters(logdir) if (logdir / "checkpoint.pt").exists() else dict(rows=0, step=0)
        table = [[*map(int, line.split())] for line in log.read_text().splitlines()]
        played = sum(row[0] == job.pid and not row[5] for row in table)
        before, steps = steps, n["step"]
        assert before + played - 1 <= steps <= before + played
        rows, last = np.load(logdir / "replay.npy", "r"), {row[1]: row[2:] for row in table}
        for number, image, action, *rest in rows[rows["number"] > 0]:
            assert [zlib.crc32(image), action.argmax(), *map(int, rest)] == last[number], number
        newest = max(rows["number"])
        assert n["rows"] <= newest <= len(last) == max(last) <= newest + 1
        assert min(newest, len(rows) - 1) <= (rows["number"] > newest - len(rows)).sum()
    assert all(r["updates"] == (r["step"] - 20) // 4 for r in lines(logdir))


@pytest.mark.parametrize("begun", [False, True])
def test_killed_at_any_moment_of_a_start(begun, tmp_path, short_run, monkeypatch):
    """Before the disk is touched for the first time, the second, ..., until all goes well."""
    before = lambda function: lambda *args, **kwargs: (touch(), function(*args, **kwargs))[1]
    stage, status = 0, None
    while status != 0:
        stage, logdir = stage + 1, tmp_path / str(stage)
        touch = mock.Mock(side_effect=[None] * stage + [KeyboardInterrupt] * 99)
        begun and shutil.copytree(short_run, logdir)
        flags = (*CATCH, "--logdir", logdir, *UNSEEN, "--steps", 41 if begun else 1)
        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(d, "open", before(open), raising=False)
            for place, name in [(os, "replace"), (os, "posix_fallocate"), (os, "fsync"),
                                (np, "load"), (d.Replay, "add"), (d, "write_file")]:
                patch.setattr(place, name, before(getattr(place, name)))
            status = run(*flags)
        assert not begun or counters(logdir)["step"] >= 40
        assert run(*flags) == 0, f"killed at access {stage}"
        assert counters(logdir)["step"] == flags[-1]
    assert stage > 10


@pytest.mark.parametrize("name, damage, said", [
    *(("replay.npy", damage, "replay.npy") for damage in ("half", "gone", b"")),
    *((name, damage, "is damaged") for name in ("checkpoint.pt", "config.json")
      for damage in ("half", b"", b"[]")), ("checkpoint.pt", "gone", "is missing|train first"),
    ("config.json", "gone", "No such file"),
    *(("config.json", change, said) for change, said in [
        (dict(horizon="x"), "is damaged"), (dict(layer_norm="no"), "is damaged"),
        (dict(gamma=-0.995), "gamma -0.995"), (dict(seq_len=99), "seq_len 99"),
        (dict(mlp_units=9), "checkpoint.pt"), (dict(cuda_graphs=True), "old")]),
    ("lock", b"long enough to be no database" * 40, "is not a database")])
def test_what_cannot_be_read_is_one_line_and_left_as_it_is(name, damage, said, short_run, capsys):
    path, data = short_run / name, (short_run / name).read_bytes()
    if isinstance(damage, dict):
        damage = json.dumps(settings(short_run) | damage).encode()
    path.write_bytes(data[:len(data) // 2] if isinstance(damage, str) else damage)
    damage != "gone" or path.unlink()
    bad = contents(short_run)
    for flags in [["--steps", 50], ["--eval"]][:1 + (name in ("checkpoint.pt", "config.json"))]:
        capsys.readouterr()
        assert run("--logdir", short_run, *flags) == 2 and contents(short_run) == bad
        assert re.fullmatch(f"dreamerv2.py: .*({said}).*\n", capsys.readouterr().err)


def test_settings_are_changed_by_some_flags_and_by_hand(short_run, capsys, monkeypatch):
    before, path = contents(short_run), short_run / "config.json"
    for flags, name in [("--gamma 0.9 --steps 50", "gamma"), ("--game Breakout", "game"),
                        ("--preset v3", "preset")]:
        assert run("--logdir", short_run, *flags.split()) == 2 and contents(short_run) == before
        assert re.fullmatch(f".*config.json has another {name};.*\n", capsys.readouterr().err)
    (short_run / "metrics.jsonl").unlink()  # it is for people
    assert run("--logdir", short_run, "--steps", 44, *UNSEEN, "--log-every-steps", 50,
               "--precision", "fp32", "--device", "cpu") == 0
    found = settings(short_run)
    assert found["steps"] == lines(short_run)[-1]["step"] == 44 and found["eval_episodes"] == 0
    drawn, made = watch(monkeypatch, "sample", d.Replay), watch(monkeypatch, "load_agent")
    edit = found | dict(batch_size=3, seq_len=5, model_lr=7e-4, gamma=0.5, steps=48)
    path.write_text(json.dumps(edit))
    assert run("--logdir", short_run) == 0 and counters(short_run)["step"] == 48
    assert drawn.inputs.items() >= dict(batch_size=3, seq_len=5).items()
    assert made.output[0].optimizers["model"].adam.param_groups[0]["lr"] == 7e-4
    assert settings(short_run) == edit and made.output[0].config.gamma == 0.5
    path.write_text(json.dumps(edit | dict(replay_capacity=99)))  # the replay has 200
    assert run("--logdir", short_run) == 2 and "other rows" in capsys.readouterr().err


def test_settings_may_be_numpy_numbers(tmp_path):
    config = d.choose_settings(d.read_flags([*CATCH, "--logdir", str(tmp_path), "--steps", "24"]))
    numbers = dict(model_lr=np.float64(1e-4), actor_lr=np.float32(0.5), batch_size=np.int64(3),
                   slow_baseline=np.bool_(True), reward_tanh=np.bool_(False), free_nats=1,
                   eval_episodes=np.int32(0))
    assert d.train(d.choose_settings(vars(config) | numbers)) == 0
    assert settings(tmp_path).items() >= numbers.items()
    assert run("--logdir", tmp_path, "--steps", 28) == 0 and counters(tmp_path)["step"] == 28


def test_a_full_disk(tmp_path, short_run, capsys, monkeypatch):
    """For a replay, and for a checkpoint. What was there is whole."""
    resource, new = pytest.importorskip("resource"), tmp_path / "new"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (short_run / "checkpoint.pt").stat().st_size
    full = mock.Mock(side_effect=[None, OSError(28, "No space left on device")])
    for logdir, limit in (new, 10**5), (short_run, size // 2), (short_run, soft):
        with monkeypatch.context() as patch:
            limit != soft or patch.setattr(os, "fsync", full)  # the first is config.json's
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            status = run(*CATCH, "--logdir", logdir, "--steps", 50)
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert status == 2 and re.fullmatch(r".*\[Errno 2[78]\].*\n", capsys.readouterr().err)
        assert counters(short_run)["step"] == 40
    for logdir in (new, short_run):
        assert run(*CATCH, "--logdir", logdir, "--steps", 50, *UNSEEN) == 0
        assert counters(logdir)["step"] == lines(logdir)[-1]["step"] == 50


def test_a_second_process_is_refused_and_sigterm_frees_the_folder(tmp_path, capsys, undreamt):
    flags = (*CATCH, "--checkpoint-minutes", 0, "--logdir", tmp_path, "--steps", 20_000)
    script = ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, HERE / "dreamerv2.py"]
    job = subprocess.Popen([*script, *map(str, flags)], text=True, stdout=subprocess.PIPE)
    while not (tmp_path / "checkpoint.pt").exists():
        assert job.poll() is None
        time.sleep(0.02)
    assert run(*flags) == 2 and run("--logdir", tmp_path, "--dream") == 0
    with mock.patch.object(os, "access", lambda path, mode: mode != os.W_OK):
        pytest.raises(d.UsageError, d.lock, tmp_path / "b").match("it cannot be written")
    assert re.fullmatch(f"dreamerv2.py: {tmp_path} is in use, .* no locks: .* locked\n",
                        capsys.readouterr().err)
    job.terminate()
    assert "the same command goes on" in job.communicate()[0] and job.returncode == 143
    assert run(*flags[:-1], counters(tmp_path)["step"] + 10) == 0


@pytest.mark.parametrize("name, module, log, minutes", [
    ("critic_loss", "critic", 4, 1000), ("image_loss", "world_model.decoder", 1000, 0)])
def test_what_is_not_finite_ends_the_run(name, module, log, minutes, short_run, capsys):
    real, path = d.Agent.train_step, short_run / "checkpoint.pt"

    def poisoned(agent, batch, step):
        assert step == 20 + 4 * (agent.updates + 1)  # the decisions, by which a run anneals
        if agent.updates == 7:
            next(agent.get_submodule(module).parameters()).data.fill_(math.nan)
        return real(agent, batch, step)

    flags = (*CATCH, "--logdir", short_run, *UNSEEN, "--steps", 60, "--log-every-steps", log)
    with mock.patch.object(d.Agent, "train_step", poisoned):
        assert run(*flags, "--checkpoint-minutes", minutes) == 2
    assert re.fullmatch(f"dreamerv2.py: not finite: .*'{name}': nan.*{path}.*\n",
                        capsys.readouterr().err)
    assert counters(short_run)["step"] == (41 if minutes else 51)
    assert all(x.isfinite().all() for x in torch.load(path, weights_only=True)["agent"].values())
    assert run(*flags) == 0 and lines(short_run)[-1]["step"] == 60


@pytest.mark.parametrize("minutes, log, expected", [
    (1000, 2, [1, 80]), (0, 1000, [*range(1, 81)]), (1, 1000, None)])
def test_checkpoints_come_by_the_clock(minutes, log, expected, tmp_path, monkeypatch):
    """And not with the lines. By one that goes on by a second when it is read."""
    saves, real = set(), d.save_checkpoint
    monkeypatch.setattr(d.time, "monotonic", itertools.count().__next__)
    monkeypatch.setattr(d, "save_checkpoint", lambda path, agent, **counters: (
        saves.add(counters["step"]), real(path, agent, **counters)))
    assert run(*CATCH, "--logdir", tmp_path, "--steps", 80, "--log-every-steps", log, *UNSEEN,
               "--checkpoint-minutes", minutes) == 0
    assert sorted(saves) == expected or minutes == 1 and (
        3 <= len(saves) and max(np.diff(sorted(saves))) <= 60)
    assert counters(tmp_path)["step"] == 80 and len(lines(tmp_path)) == (15 if log == 2 else 1)


# -------------------------------------------------------------------------- learning
@pytest.mark.slow
@pytest.mark.parametrize("before, after, flags", [
    (-0.5, 0.0, "--game Catch --steps 9000"),
    (-0.5, 0.0, "--game Catch --no-discrete-latents --entropy-scale 3e-2 --steps 20000"),
    (26, 27, "--game tests/Levers-v0 --action-repeat 1 --time-limit 10 --no-reward-tanh"
     " --entropy-scale 1e-3 --steps 6000")])
def test_learns(before, after, flags, tmp_path):
    """Catch: at random -0.75, +-0.06 over 140 episodes. Levers: at random 20, at most 40."""
    if "entropy" in flags:
        flags += (" --steps-per-update 2 --seq-len 8 --horizon 6 --actor-lr 1e-3 --anneal-steps 0"
                  " --return-scale 0")
    assert run("--preset", "small", *flags.split(), "--logdir", tmp_path, *UNSEEN) == 0
    returns = [row["episode_return"] for row in lines(tmp_path)]
    assert returns[0] < before and np.mean(returns[-2:]) > after


def test_a_run_with_continuous_actions(tmp_path, capsys):
    """ρ is 0 by itself and printed; random play fills the box; it resumes."""
    flags = ("--game", "tests/Levers-v0", *QUICK, "--prefill-steps", 100, *UNSEEN)
    Levers.played.clear()
    assert run(*flags, "--steps", 120, "--action-repeat", 2, "--logdir", tmp_path) == 0
    assert "rho 0\n" in capsys.readouterr().out and lines(tmp_path)[-1]["frames"] == 240
    first = np.array(Levers.played[:200])
    assert np.abs([first.min(0) - [0, -10], first.max(0) - [4, 30]]).max() < 1.5
    assert run("--logdir", tmp_path, "--steps", 124) == 0  # its settings are the folder's
    assert lines(tmp_path)[-1]["frames"] == 248


def test_catch_is_won_by_following_the_ball_and_lost_by_fleeing_it():
    env, balls = d.Catch(), set()
    for seed, side in itertools.product(range(40), (1, -1)):
        env.reset(seed=seed)
        balls.add(env.ball)
        for _ in range(7):
            _, reward, *_ = env.step(1 + side * (np.sign(env.ball - env.paddle) or side < 0))
        assert reward == side and env.paddle in range(8)
    assert balls == set(range(8))


def test_atari_end_of_game_is_terminal_and_a_time_limit_is_not():
    actions = np.random.default_rng(0).integers(18, size=400)
    for time_limit in (27_000, 5):
        rows = play_rows(make("Breakout", time_limit=time_limit), actions, seed=1)
        firsts = [i for i, r in enumerate(rows) if r.is_first]
        ends = [i + 1 for i, r in enumerate(rows) if r.is_terminal]
        assert ends == firsts[1:] != [] if time_limit > 5 else (
            ends == [] and firsts == [*range(0, 401, 6)])


def test_a_preset_suits_the_device_and_flags_go_over_it(monkeypatch, capsys):
    for name in d.PRESETS:
        flags = f"--preset {name} --gamma 0.5 --game Catch".split()
        assert d.choose_settings(d.read_flags(flags)) == d.Config(**PRESETS[name] | dict(
            gamma=0.5, game="Catch", preset=name, logdir=f"runs/Catch-{name}-seed0",
            device="cuda" if torch.cuda.is_available() else "cpu"))
    monkeypatch.setattr(torch, "zeros", lambda *_, device: types.SimpleNamespace(
        device=torch.device(device)))
    for device, preset in ("cpu", "small"), ("cuda", "atari"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cuda")
        config = d.choose_settings(dict(game="Catch", preset="auto"))
        assert (config.preset, config.device) == (preset, device)
        assert config.logdir == f"runs/Catch-{preset}-seed0"
        assert f"preset {preset}: for {device}; --preset" in capsys.readouterr().out


@pytest.mark.parametrize("shape", [(1, 5, 7, 1), (1, 4, 3, 3), (3, 2, 401, 3), (2, 3, 1000, 1)])
def test_pictures_are_pngs(shape):
    frames = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    Path("a.png").write_bytes(d.to_png(frames, 40))
    again, milliseconds = read_png("a.png")
    scale = max(1, 800 // shape[2])
    assert (again == frames.repeat(scale, 1).repeat(scale, 2)).all() and milliseconds == {40}


def test_a_checkpoint_restores_weights_moments_and_the_range_of_returns(tmp_path):
    config, batch, found = d.Config(**DEBUG | dict(slow_every_updates=2, return_scale=1.0,
        game="Catch", device="cpu", logdir=str(tmp_path))), random_batch(), []
    a, _ = d.load_agent(config, make("Catch"))
    [a.train_step(batch) for _ in range(3)]
    d.save_checkpoint(tmp_path / "checkpoint.pt", a, step=7, updates=3, rows=9)
    b, n = d.load_agent(config, make("Catch"))
    for agent in (a, b):
        torch.manual_seed(0)
        found.append([agent.train_step(batch) for _ in range(3)])
    assert_close(*found, rtol=0, atol=0)
    assert n == dict(step=7, updates=3, rows=9)


def test_same_seed_same_numbers_another_seed_others(tmp_path, monkeypatch, undreamt):
    """Each evaluation plays other episodes; so does a resumed run."""
    seeds, runs, reset, load = [], [], d.Envs.reset, d.load_agent
    monkeypatch.setattr(d.Envs, "reset", lambda self, seed: (
        seeds.append(seed), reset(self, seed))[1])
    monkeypatch.setattr(d, "load_agent", lambda *args: (made := load(*args), runs.append(
        [made[0].critic[0].weight.sum().item()]))[0])
    for name, seed in ("a", 0), ("b", 0), ("c", 1):
        assert run(*QUICK, "--logdir", tmp_path / name, "--steps", 32, "--log-every-steps", 8,
                   "--eval-every-steps", 24, "--time-limit", 15, "--seed", seed) == 0
        runs[-1] += [row["image_loss"] for row in lines(tmp_path / name)]
    assert runs[0] == runs[1] and not {*runs[0]} & {*runs[2]} and len(runs[0]) == 3
    assert seeds[:3] == seeds[3:6] and len({*seeds[:3]}) == 3 and seeds[6] != seeds[0]
    act = watch(monkeypatch, "act", d.Agent)
    assert run("--logdir", tmp_path / "a", "--steps", 36, *UNSEEN) == 0
    assert seeds[9] not in seeds[:3] and act.inputs["memory"] and not act.inputs.get("greedy")


# --------------------------------------------------------------------- the file itself
README = HERE / "README.md"
OPTIONS = {"--" + name.replace("_", "-") for name in vars(d.Config())}
CELLS = re.split(r"^(?=# %% Part)", SOURCE, flags=re.M)


def test_the_file_is_small():
    """A line of code holds a token that is neither a comment nor part of a docstring."""
    code, rows = set(), SOURCE.splitlines()
    span = lambda node: range(node.lineno, node.end_lineno + 1)
    for token in tokenize.generate_tokens(io.StringIO(SOURCE).readline):
        if token.type != tokenize.COMMENT and token.string.strip():
            code |= {*range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(TREE):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            code -= {*span(node.body[0])} if ast.get_docstring(node) else set()
    assert len(rows) <= 1650 and len(code) <= 880 and max(map(len, rows)) <= 88
    for node in ast.walk(TREE):
        if isinstance(node, ast.FunctionDef):
            most = 45 + 20 * (node.name == "train")
            assert len(code.intersection(span(node))) <= most, node.name


def test_five_packages_are_imported_and_required():
    """By the header of PEP 723, which `uv run` reads, and by requirements.txt."""
    required = re.findall(r"^([^ #\n]+)", (HERE / "requirements.txt").read_text(), re.M)
    header = re.search(r"# dependencies = (\[.*?\])\n# ///\n", SOURCE, re.S)[1].replace("#", "")
    assert ast.literal_eval(header) == [x for x in required if not x.startswith("pytest")]
    used = {(getattr(x, "module", 0) or name.name).split(".")[0] for x in ast.walk(TREE)
            if isinstance(x, (ast.Import, ast.ImportFrom)) for name in x.names}
    assert used - sys.stdlib_module_names == {"torch", "gymnasium", "ale_py", "numpy", "tqdm"}


def test_pieces_have_docstrings_and_few_read_the_config():
    """But for methods whose meaning torch or Gymnasium fixes: forward, rsample, reset."""
    own = {"RSSM", "WorldModel", "Optimizer", "Agent", "Replay", "Envs"}
    for node in [TREE] + [x for x in TREE.body if getattr(x, "name", "") in own]:
        for piece in node.body:
            if isinstance(piece, (ast.FunctionDef, ast.ClassDef)):
                assert piece.name == "__init__" or ast.get_docstring(piece), piece.name
    pieces = [x for x in ast.parse("".join(CELLS[:10])).body if hasattr(x, "name")]  # Parts 0-9
    assert {piece.name for piece in pieces for x in ast.walk(piece) if isinstance(x, ast.Name)
            and x.id in ("config", "Config")} == {"WorldModel", "Agent"}


def test_map_parts_and_tags_agree():
    """The docstring is Part 0, and its loop the map: at the end of its lines stand all parts."""
    titles = [re.match(r"# %% (Part \d+) \| (.+)", cell).groups() for cell in CELLS[1:]]
    assert [x for x, _ in titles] == [f"Part {i}" for i in range(1, 14)]
    loop = re.search(r"^THE LOOP.*\n(?:\S.*\n)*((?: .*\n)+)", d.__doc__, re.M)[1]
    mapped = set()
    for row in loop.splitlines():
        numbers = list(map(int, re.findall(r"\d+", row[row.find("  Part") % len(row):])))
        mapped |= set(numbers)
        for equation in map(int, re.findall(r"\[Eq\. (\d+)\]", row)):
            assert f"[Eq. {equation}]" in CELLS[numbers[0]], row
    assert mapped == set(range(1, 14))
    for part, (_, title) in zip(CELLS[1:], titles):
        assert "\n# Predict" in part, title
        assert ">>> " in part, title  # which answers what is to be predicted
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
    held = dict(re.findall(r"^ +(D\d+) .* (\S+)$", d.__doc__, re.M))
    assert list(held) == [f"D{i}" for i in range(1, 17)]
    assert all(by in (globals() if by.startswith("test_") else OPTIONS) for by in held.values())
    assert set(re.findall(r"\[(D\d+)\]", SOURCE)) <= held.keys()
    for row in re.findall("^ +(D[123] .*)$", d.__doc__, re.M):  # those with numbers
        *_, theirs, ours, name = re.split(" {2,}", row)
        assert PRESETS["released"][name[2:].replace("-", "_")] == float(theirs.split(",")[0])
        assert getattr(d.Config, name[2:].replace("-", "_")) == float(ours)


def test_flags_are_the_fields_of_config_in_every_text():
    others = "help eval dream benchmark scores index-url array gpus time mem cpus-per-task".split()
    for text in (SOURCE, README.read_text(encoding="utf-8")):
        named = re.findall(r"(?<![\w-])--(?:no-(?=[a-z]))?([a-z][a-z-]*[a-z])", text)
        assert {f"--{name}" for name in set(named).difference(others)} <= OPTIONS


def test_help_of_a_config_with_a_field_of_ones_own(monkeypatch, capsys):
    Path("changed.py").write_text(SOURCE.replace("    # Run\n", "    mine: int = 3\n"), "utf-8")
    monkeypatch.syspath_prepend(Path.cwd())
    module = importlib.import_module("changed")
    pytest.raises(SystemExit, module.read_flags, ["--help"]).match("^0$")
    shown = re.findall(r"^  (?:-h, )?(--[a-z-]+)", capsys.readouterr().out, re.M)
    assert set(shown) == OPTIONS | {"--mine", "--help", "--eval", "--dream"}
    assert module.read_flags(["--seed", "4", "--unimix=0.5"]) == dict(seed=4, unimix=0.5)


def test_pieces_come_out_with_the_neighbours_that_the_readme_names():
    """A piece runs with these and the file's imports alone, and so does its doctest."""
    table = re.search(r"^## Copy.*?(?=^## )", README.read_text(encoding="utf-8"), re.S | re.M)[0]
    defined = {x.name: x for x in TREE.body if isinstance(x, (ast.FunctionDef, ast.ClassDef))}
    parts = re.search("# %% Part 2.*(?=# %% Part 8)", SOURCE, re.S)[0]
    needs = {name: [] for name in defined if re.search(rf"^(def|class) {name}\b", parts, re.M)}
    needs |= dict(Optimizer=[], to_png=[])
    for row in re.findall(r"^`.*\|.*", table, re.M):
        pieces, neighbours = (re.findall(r"`(\w+)`", cell) for cell in row.split("|"))
        needs |= {piece: neighbours for piece in pieces}
    assert needs.pop("WorldModel") == [] and len(needs) > 25 and "Replay" in needs
    assert {name for name, neighbours in needs.items() if len(neighbours) > 2} <= {"RSSM"}
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


# Code without which it would still run, and learn badly or the wrong thing. Beside each the
# file says what breaks; what is left when it is gone; the tests that must fail then.
CRUCIAL = [
    ("", "", "samples_follow or parity_kl"),  # nothing is gone, and these pass
    ("+ (probs - probs.detach())", "", "stopped_head"),
    ("alpha * train_prior + (1 - alpha) * train_posterior", "train_prior", "parity_kl"),
    ("torch.sigmoid(update - 1)", "torch.sigmoid(update)", "parity_gru"),
    ("first = is_first[:, None]", "first = is_first[:, None] & False", "is_first_equals"),
    ("features[-1].detach()", "features[-1]", "parity_behaviour"),
    ("(returns - baseline).detach()", "(returns - baseline)", "actor_loss_by_hand"),
    ("self.slow_critic.load_state_dict(self.critic.state_dict())", "pass", "slow_critic"),
    ("x.detach().flatten(0, 1) for x", "x.flatten(0, 1) for x", "flow_table"),
    ('c.gamma * (1 - batch["is_terminal"].reshape(1, -1).float())',
     "head_mean(model.discount_head(features[:1])).sigmoid()", "true_start"),
    ("c.gamma * (1 - is_terminal.float())", "1 - is_terminal.float()", "parity_world_model"),
    ("reward.tanh() if c.reward_tanh else reward", "reward", "losses_are_means"),
    ('batch["is_first"][0] = True\n        return', "return", "replay_sequences"),
    ("np.float32(not is_first)", "np.float32(1)", "rows_are_aligned"),
]


@pytest.mark.parametrize("part, rest, tests", CRUCIAL, ids=[x[0][:30] for x in CRUCIAL])
def test_a_crucial_line_is_explained_and_missed(part, rest, tests, tmp_path, monkeypatch):
    """Mutation tests: pytest runs within pytest, on this module with another d."""
    if part:
        above, _ = SOURCE.split(part)  # it is there once
        assert re.search("ithout|tames|cuts|would", "".join(above.splitlines(True)[-11:]))
    changed = types.ModuleType("dreamerv2")
    exec(SOURCE.replace(part, rest) if part else SOURCE, vars(changed))
    monkeypatch.setitem(globals(), "d", changed)
    off = "cacheprovider faulthandler logging threadexception unraisableexception".split()
    status = pytest.main([__file__, "-qxs", "-k", tests, f"--basetemp={tmp_path / 'inner'}",
                          *(f"-pno:{plugin}" for plugin in off)])
    assert status == (pytest.ExitCode.TESTS_FAILED if part else pytest.ExitCode.OK)


def test_readme_is_short_and_what_it_names_exists(capsys):
    """Flags, files, pictures exist; snippets run, the last with an agent of Catch."""
    readme = README.read_text(encoding="utf-8")
    assert len(readme.split()) <= 1700 and max(map(len, readme.splitlines())) <= 120
    files = re.findall(r'(?:\]\(|src=")([^)"]+)', readme)
    files = [HERE / name for name in files if not name.startswith(("http", "../../actions"))]
    assert all(path.exists() for path in files) and len(files) >= 4
    for path in HERE.glob(".github/*.png"):
        assert path in files and path.stat().st_size < 1.6e6 and len(read_png(path)[0]) >= 50
    commands = re.findall(r"python dreamerv2\.py((?: [^#|`&\n\\]+|\\\n)*)", readme)
    assert len(commands) >= 6
    for flags in commands:
        logdir = d.read_flags(flags.split()).get("logdir", "")
        assert "/" not in logdir or (HERE / logdir / "checkpoint.pt").exists()
    assert [name for name in d.PRESETS if f"`{name}`" not in readme] == []
    *others, last = re.findall(r"```python\n(.*?)```", readme, re.S)
    folder = re.search(r'"(\.pretrained/\w+)"', last)[1]
    assert run(*CATCH, "--logdir", folder, "--steps", 30) == 0 and others
    for code in (*others, last):
        exec(code, {})
    assert re.search(r"\[\[-?1\.0, 7\.0\]\]\n$", capsys.readouterr().out)


def test_results_are_those_of_the_file_of_runs():
    """README's scores, which are means of episodes where these were kept, and its summaries."""
    readme = README.read_text(encoding="utf-8").replace(",", "")
    runs = [*csv.DictReader((HERE / ".github" / "atari100k.csv").read_text().splitlines())]
    for run in runs:
        if played := [float(x) for x in run["scores"].split()]:
            assert [np.mean(played), np.std(played)] == pytest.approx(
                [float(run["score"]), float(run["deviation"])], abs=0.051)
    rows = re.findall(r"^(\w+)\|([\d.-]+)(±[\d.]+)((?:\|[\d.-]+){6})$", readme, re.M)
    assert {game: score + spread for game, score, spread, _ in rows} == {  # a game's first run
        x["game"]: f"{x['score']}±{x['deviation']}" for x in runs[::-1]}
    ours, random, human, *others = np.array([(x + y).split("|") for _, x, _, y in rows], float).T
    assert [PUBLISHED[game]["1M"] for game, *_ in rows] == others[-1].tolist()
    scores, cut = (np.array([ours, *others]) - random) / (human - random), len(rows) // 4
    for name, values in {"mean": scores, "mean without six": scores[:, 6:], "median": np.median(
            scores, 1, keepdims=True), "interquartile mean": np.sort(scores)[:, cut:-cut]}.items():
        assert "\n{}|{:.2f}|||{:.2f}|{:.2f}|{:.2f}|{:.2f}\n".format(name, *values.mean(1)) in readme


def test_the_trained_agents_are_shown_and_not_trained(capsys, tmp_path):
    """From any folder, without writing into theirs. A replay to train on is not there."""
    folders = [path.parent for path in HERE.glob(".pretrained/*/checkpoint.pt")]
    before = contents(HERE / ".pretrained")
    for folder in folders:
        assert f".pretrained/{folder.name}" in README.read_text(encoding="utf-8")
        assert (folder / "checkpoint.pt").stat().st_size < 4e6
        assert run("--logdir", folder, "--dream") == 0
        shutil.copytree(folder, tmp_path / folder.name)
        assert run("--logdir", tmp_path / folder.name, "--steps", 10**6) == 2
        assert re.fullmatch("dreamerv2.py: .*replay.npy.*\n", capsys.readouterr().err)
    assert contents(HERE / ".pretrained") == before and len(before) == 2 * len(folders) > 0


# -------------------------------------------------------------------------- measuring
def test_benchmark_needs_two_files_and_not_pytest(tmp_path):
    files = ["dreamerv2.py", "test_dreamerv2.py"]
    [shutil.copy(HERE / name, tmp_path) for name in files]
    (tmp_path / "pytest.py").write_text("raise ImportError")
    out = subprocess.run([sys.executable, "-B", files[1], "--benchmark", *CATCH,
                          "--precision", "bf16", "--prefill-steps", "200"],
                         cwd=tmp_path, capture_output=True, text=True)
    assert out.returncode == 0 and "bf16 on cpu" in out.stdout, out.stderr
    numbers = dict(re.findall(r"^([\w /,%-]+?) {2,}([\d.e+-]+)$", out.stdout, re.M))
    assert len(numbers) >= 7 and all(float(v) > 0 for v in numbers.values())
    ms, gflop, peak, share = (float(numbers[k]) for k in (
        "gradient step, ms", "that step, GFLOP", "fastest product, GFLOP/s", "share of that, %"))
    assert share == pytest.approx(100 * gflop / (ms / 1e3) / peak, rel=0.01)
    assert gflop == pytest.approx(hand_count(d.Config(**DEBUG), 3) / 1e9, rel=0.02)
    assert {x.name for x in contents(tmp_path)} == {*files, "pytest.py"}


def of(agent, games=None):
    return {game: PUBLISHED[game][agent] for game in games or PUBLISHED}


@pytest.mark.parametrize("agent, printed", [  # the paper's Table 1
    ("IQN", (1.29, 8.85, 0.21, 0.21)), ("Rainbow", (1.47, 9.12, 0.17, 0.17)),
    ("C51", (1.09, 7.70, 0.15, 0.15)), ("DQN", (0.65, 2.84, 0.12, 0.12))])
def test_the_papers_table_1_from_the_published_scores(agent, printed):
    """To the printed digit; the gamer mean with other papers' James Bond, to 0.02."""
    ours = list(summarize_scores(of(agent)).values())
    with mock.patch.dict(PUBLISHED["Jamesbond"], random=29, gamer=302.8):
        others = list(summarize_scores(of(agent)).values())
    assert ours[1] > printed[1] + 0.4 and others[1] == pytest.approx(printed[1], abs=0.02)
    assert [round(ours[i], 2) for i in (0, 2, 3)] == [printed[i] for i in (0, 2, 3)]


def test_scores_by_hand():
    import ale_py  # noqa: F401  It registers its games.
    assert len(PUBLISHED) == 55 and {len(row) for row in PUBLISHED.values()} == {9}
    assert all(f"ALE/{game}-v5" in gymnasium.registry for game in PUBLISHED)
    ours = list(summarize_scores(of("DreamerV2")).values())  # its files hold other seeds than
    assert [ours[0], *ours[2:]] == pytest.approx([2.15, 0.44, 0.28], rel=0.05)  # the paper
    assert [*map(normalized_score, 2 * ["UpNDown"], (533.4, 82840), ("gamer", "record"))] == [0, 1]
    assert normalized_score("Boxing", 6.1, "gamer") == pytest.approx(0.5)
    pytest.raises(KeyError, normalized_score, "Catch", 1.0, "gamer")  # none of the 55
    assert normalized_score("Skiing", 1382.61 - 17098.1, "record") == pytest.approx(0.1)
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


def test_scores_of_runs(tmp_path, capsys):
    a_run(tmp_path / "a" / "0", "Boxing", (50.0, 12.1))
    a_run(tmp_path / "a" / "1", "Boxing", (50.0, 36.1), seed=1)
    a_run(tmp_path / "b", "Pong", (0.0, 14.6))
    a_run(tmp_path / "c", "Catch", (0.0, 1.0))
    before = contents(tmp_path)
    assert command_line(["--scores", str(tmp_path)]) == 0
    boxing, *others = ElementTree.parse("curves.svg").findall("{*}g")
    points = [x.attrib["points"] for x in boxing.findall("{*}polyline")]
    # The highest score is 50, the lowest that of random play; 140 pixels lie between.
    assert points[0].split()[::2] == ["150.0,40.0", "292.0,146.3"] and len(points) == 2
    assert [x.text for x in boxing.findall("{*}text")] == [
        "Boxing", "0.1 to 50; 4,000,000 frames", "random 0.1", "authors at 1M 38", "human 12.1"]
    assert [len(panel.findall("{*}text")) for panel in others] == [5, 2]  # Pong, Catch
    assert contents(tmp_path) == before
    out, err = capsys.readouterr()
    assert "2 of the paper's 55 games, presets: atari\n" in out and not err
    table = [x.split() for x in out.splitlines()]
    assert [" ".join(row[:6]) for row in table[2:5]] == [
        "Boxing 1 4,000,000 36.1 3.00 0.36", "Pong 0 4,000,000 14.6 1.00 0.85",
        "Catch 0 4,000,000 1.0 - -"]
    assert " ".join(table[1]) == ("Boxing 0 4,000,000 12.1 1.00 0.12 86.14 97.91 98.56"
                                  f" 81.4 77.99 atari, {tmp_path / 'a' / '0'}")
    ours = summarize_scores(dict(Boxing=(36.1 + 12.1) / 2, Pong=14.6))
    dqn = summarize_scores(of("DQN", ["Boxing", "Pong"]))
    for row, summary in (table[-6], ours), (table[-1], dqn):
        assert row[-4:] == [f"{x:.2f}" for x in summary.values()]


@pytest.mark.parametrize("text, why", [
    ("{}", "KeyError('steps')"), ("{", "JSONDecodeError"), ("", "0 of 1,000,000"),
    ("[1]\n", "TypeError"), ('{"step": 9}\n', "KeyError"), ('{"step": 3, "fra', "JSONDecode"),
    ('{"step": 9, "frames": 36, "episode_return": 1}', "9 of 1,000,000"),
    ('{"step": 1000000, "frames": 10, "episode_return": null}', "no episode")])
def test_runs_without_a_score_are_left_out_with_the_reason(text, why, tmp_path, capsys):
    for folder, preset in (("a", "atari"), ("b", "atari"), ("c", "small")):
        a_run(tmp_path / folder, "Pong", (1.0, 2.0), preset=preset)
    name = "config.json" if text in ("{}", "{") else "metrics.jsonl"
    (tmp_path / "a" / name).write_text(text)
    assert command_line(["--scores", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and why in err and "is left out" in err
    assert "1 of the paper's 55 games, presets: atari, small\n" in out


@pytest.mark.parametrize("flags, why", [
    ("--scores nowhere", "nowhere: no run"), ("--scores=.", ".: no run"), ("", "required"),
    ("--scores . --steps 9", "--steps 9: only"), ("--benchmark --scores .", "not allowed"),
    ("--benchmark --preset smal", "choice: 'smal'"), ("--benchmark --dream", "not look"),
    ("--benchmark --horizon 0", "horizon 0"), ("--benchmark --game Nix", "--game Nix")])
def test_what_cannot_be_measured_is_one_line_and_status_2(flags, why, capsys):
    assert run(*flags.split(), main=command_line) == 2
    err = capsys.readouterr().err
    assert re.match(r"(test_)?dreamerv2\.py: ", err) and err.count("\n") == 1 and why in err


# No tests from here on, but what `python test_dreamerv2.py` runs, and the published scores.

def seconds(function):
    """The median time of a call, once warm, with all threads."""
    threads = torch.get_num_threads()
    return Timer("f()", globals=dict(f=function), num_threads=threads).blocked_autorange().median


def benchmark(config, envs):
    """Prints a gradient step's speed, and that of a short run in the empty logdir."""
    row, size = envs.reset(config.seed), (config.seq_len, config.batch_size)
    device = torch.device(config.device)
    agent = d.Agent(config, envs.num_actions, envs.channels, device, envs.continuous)
    batch = {k: torch.as_tensor(v).expand(*size, *v.shape).contiguous().to(device)
             for k, v in row._asdict().items()}
    with FlopCounterMode(display=False) as counter:
        agent.train_step(batch)
    flops, step = counter.get_total_flops(), seconds(lambda: agent.train_step(batch))
    every = (2 + int(0.5 / step)) * config.steps_per_update
    start = -(-size[0] // every) * every
    with contextlib.redirect_stdout(io.StringIO()):
        d.train(dataclasses.replace(config, prefill_steps=start, steps=start + 3 * every,
            log_every_steps=every, eval_episodes=0, replay_capacity=2 * start + 3 * every))
    before, loop, _ = map(json.loads, Path(config.logdir, "metrics.jsonl").open())
    a = torch.randn(2 * [8192 if device.type == "cuda" else 2048], device=device)
    a = a.bfloat16() if agent.precision == "bf16" else a
    peak = 2 * len(a) ** 3 / seconds(lambda: a @ a)
    numbers = {
        "gradient step, ms": 1e3 * step, "that step, GFLOP": flops / 1e9,
        "fastest product, GFLOP/s": peak / 1e9, "share of that, %": 100 * flops / step / peak,
        "in the loop, gradient steps/s": loop["updates_per_s"],
        "in the loop, decisions/s": every / (loop["wall_time_s"] - before["wall_time_s"])}
    if device.type == "cuda":
        numbers["peak memory, GB"] = torch.cuda.max_memory_allocated(device) / 1e9
    elif Path("/proc/self/status").exists():  # on a CPU, only Linux tells
        status = Path("/proc/self/status").read_text()
        numbers["peak memory, GB"] = 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1e9
    print(f"{config.game}, preset {config.preset}, {agent.precision} on {device}", *(
        f"{name:30}{number:12.4g}" for name, number in numbers.items()), sep="\n")


def finished_run(path):
    """A metrics.jsonl -> config, frames, score, [(frames, return), ...]; an error says why not."""
    config = json.loads(path.with_name("config.json").read_text("utf-8"))
    rows = [json.loads(x) for x in path.read_text("utf-8").splitlines()]
    done = [(int(x["step"]), int(x["frames"]), x["episode_return"]) for x in rows]
    step, frames, _ = done[-1] if done else (0, 0, None)
    if step < config["steps"]:
        raise ValueError(f"not finished: {step:,} of {config['steps']:,} decisions")
    curve = [(at, score) for _, at, score in done if score is not None]
    late = [score for at, score in curve if at > frames - min(1e6, frames / 10)]
    if not late:
        raise ValueError("no episode ended in its last part")
    return config, frames, float(np.mean(late)), curve


def scores(folder):
    """Prints a folder's finished runs beside the published scores, and draws curves.
    A run's score is its mean return over its last million frames, or its last tenth."""
    curves, shape, games = {}, "{:20}{:>6}{:>13}{:>11}{:>8}{:>8}" + len(AGENTS) * "{:>11}", {}
    found = sorted(Path(folder).rglob("metrics.jsonl"))
    if not found:
        raise d.UsageError(f"--scores {folder}: no run, which is no metrics.jsonl, below it")
    print(shape.format("game", "seed", "frames", "score", "gamer", "record", *AGENTS),
          "preset, folder", sep="  ")
    for path in found:
        try:
            config, frames, score, curve = finished_run(path)
        except (OSError, ValueError, LookupError, TypeError) as error:
            print(f"{path} is left out: {error!r}", file=sys.stderr)
            continue
        cells, game = ["-"] * (2 + len(AGENTS)), config["game"]
        curves.setdefault(game, []).append(curve)
        if game in PUBLISHED:
            games.setdefault(game, []).append((score, config.get("preset")))
            cells = [f"{normalized_score(game, score, x):.2f}" for x in ("gamer", "record")]
            cells += [f"{PUBLISHED[game][agent]:.6g}" for agent in AGENTS]
        print(shape.format(game, str(config.get("seed")), f"{frames:,}", f"{score:.1f}",
                           *cells), f"{config.get('preset')}, {path.parent}", sep="  ")
    if curves:
        Path("curves.svg").write_text(draw_curves(curves), encoding="utf-8")
        print("\ncurves.svg: their returns against frames, a panel a game")
    presets = {str(preset) for runs in games.values() for _, preset in runs}
    print(f"\n{len(games)} of the paper's 55 games, presets: {', '.join(sorted(presets))}")
    if games:
        ours = {game: np.mean([score for score, _ in runs]) for game, runs in games.items()}
        print(" " * 12 + "".join(f"{name:>21}" for name in summarize_scores(ours)))
        for name in ("these runs", *AGENTS):
            summary = summarize_scores(of(name, games) if name in AGENTS else ours)
            print(f"{name:12}" + "".join(f"{x:21.2f}" for x in summary.values()))


def draw_curves(games):
    """{game: [[(frames, return), ...] of a run, ...]} -> an SVG picture of them."""
    text = '<text x="{:.0f}" y="{:.0f}" font-size="{}" fill="{}">{}</text>'.format
    panels, known = [], {"random": "random", "authors at 1M": "1M", "human": "gamer"}
    for i, (game, runs) in enumerate(games.items()):
        marks = {name: PUBLISHED[game][key] for name, key in known.items() if game in PUBLISHED}
        last = max(at for run in runs for at, _ in run)
        part = lambda point: math.ceil(20 * point[0] / last)
        lines = [[np.mean(list(x), 0) for _, x in itertools.groupby(run, part)] for run in runs]
        every = [score for line in lines for _, score in line] + list(marks.values())
        low, high = min(every), max(every) + 1e-9
        height = lambda score: 180 - 140 * (score - low) / (high - low)
        shapes = [text(8, 22, 20, "black", game), text(
            8, 198, 15, "gray", f"{low:,.6g} to {high:,.6g}; {last:,} frames")]
        for left, (name, score) in zip((8, 90, 210), marks.items()):
            y = height(score)
            shapes += [f'<path d="M8 {y:.0f}H292" stroke="gray" stroke-dasharray="4"/>',
                       text(left, y - 3, 12, "gray", f"{name} {score:g}")]
        for line, colour in zip(lines, itertools.cycle(("#06c", "#c50", "#093"))):
            at = " ".join(f"{8 + 284 * x / last:.1f},{height(y):.1f}" for x, y in line)
            shapes.append(f'<polyline points="{at}" stroke="{colour}" stroke-width="2"/>')
        corner = f"translate({300 * (i % 5)} {210 * (i // 5)})"
        panels.append(f'<g transform="{corner}" fill="none">{"".join(shapes)}</g>')
    view = f"0 0 {300 * min(5, len(games))} {210 * math.ceil(len(games) / 5)}"
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{view}" font-family="sans-serif">'
            f'<rect width="100%" height="100%" fill="white"/>{"".join(panels)}</svg>\n')


def normalized_score(game: str, score: float, reference: str) -> float:
    """A raw score on the way from random play, 0, to a reference, 1: "gamer" (a human)
    or "record" (the human world record). KeyError for a game that is none of the 55."""
    row = PUBLISHED[game]
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
    game random gamer record 1M DreamerV2 IQN Rainbow C51 DQN; Alien 228.8 7127.7 251916 388 4175.09
    4961.42 3456.95 2474.88 2484.49; Amidar 5.8 1719.5 104159 28.4 2236.1 2393.43 2529.09 1363.18
    1207.74; Assault 222.4 742 8647 459.8 22236.8 4884.78 3228.82 1800.12 1525.24; Asterix 210
    8503.3 1000000 340 94893 10374.4 18366.6 13453.4 2711.41; Asteroids 719.1 47388.7 10506650 538
    30843.4 1584.51 1483.54 1079.58 698.37; Atlantis 12850 29028.1 10604840 12860 954492 890214
    802548 824994 853640; BankHeist 14.2 753.1 82058 129 1059.53 1052.27 1074.97 757.65 601.79;
    BattleZone 2360 37187.5 801000 4200 41242.8 40953.4 40060.6 25501.8 17784.8; BeamRider 363.9
    16926.5 999999 528 17917.5 7130.45 6290.48 5331.59 5852.42; Berzerk 123.7 2630.4 1057940 290
    757.54 648.4 833.41 516.69 487.48; Bowling 23.1 160.7 300 21 48.22 39.44 42.86 32.1 30.12;
    Boxing 0.1 12.1 100 38 86.14 97.91 98.56 81.4 77.99; Breakout 1.7 30.5 864 1.5 334.59 79.48
    120.07 202.39 96.23; Centipede 2090.9 12017 1301709 2367.4 11168.8 3727.64 6509.87 7594.53
    2583.03; ChopperCommand 811 7387.8 999999 640 3017.6 9281.96 12337.5 5718.16 2690.61;
    CrazyClimber 10780.5 35829.4 219900 26130 152419 132738 145389 136041 104569; DemonAttack 152.1
    1971 1556345 179 67348.4 15350.4 17071.3 7098 6361.58; DoubleDunk -18.6 -16.4 22 -6.8 17.55
    21.12 22.12 1.28 -6.54; Enduro 0 860.5 9500 55.3 1708.33 2202.98 2200.16 1283.8 628.91;
    FishingDerby -91.7 -38.7 71 -95.8 55.26 45.33 41.8 10.4 0.58; Freeway 0 29.6 38 11 31.58 33.67
    33.69 33.68 26.27; Frostbite 65.2 4334.7 454830 163 13884.9 7811.57 8207.72 4284.99 367.07;
    Gopher 257.6 2412.5 355040 794 91645.3 12107.6 10641.1 7172.88 5479.9; Gravitar 173 3351.4
    162850 130 4100.62 1346.62 1271.8 686 330.07; Hero 1027 30826.4 1000000 2082 21840 36058.4
    46675.2 33753.2 17325.4; IceHockey -11.2 0.9 36 -12.1 25.03 -5.11 -0.18 -4.36 -5.84; Jamesbond 7
    29 45550 75 37095 3165.7 1097.12 725.56 573.31; Kangaroo 52 3035 1424600 180 13507.9 12602.3
    12748.3 7687.54 11486; Krull 1598 2665.5 104100 3929.9 41673.5 8844.17 4065.97 6770.45 6097.63;
    KungFuMaster 258.5 22736.3 1000000 9770 57541.2 31653.4 26475.1 24811.6 23435.4;
    MontezumaRevenge 0 4753.3 1219200 0 85.84 500 500 1044.67 0; MsPacman 307.3 6951.6 290090 644
    5376.49 5217.99 3861.01 3693.53 3402.4; NameThisGame 2292.3 8049 25220 2700 15221.6 6638.61
    9025.75 12594.2 7278.65; Phoenix 761.4 7242.6 4014440 659 40595.6 5102.03 8545.35 5849.25
    4996.58; Pitfall -229.4 6463.7 114000 -134.3 -0.12 -13.16 -19.76 -18.39 -73.81; Pong -20.7 14.6
    21 -19 18.39 20.13 20.18 19.34 16.61; PrivateEye 24.9 69571.3 101800 50 1819.32 4180.76 21333.6
    4207.11 -16.04; Qbert 163.9 13455 2400000 336.36 70512.1 16729.9 17382.9 9761.91 10117.5;
    Riverraid 1338.5 17118 1000000 2049 16895.3 15183.4 20755.9 13514.3 11638.9; RoadRunner 11.5
    7845 2038100 3810 209972 58965.9 54662.1 48213.5 36925.5; Robotank 2.2 11.9 76 4.2 73.37 65.72
    65.52 60.53 59.77; Seaquest 68.4 42054.7 999999 348 6988.67 17039.2 9903.38 31025.8 1600.66;
    Skiing -17098.1 -4336.9 -3272 -27285.4 -9667.75 -11161.9 -28707.6 -22231.1 -15824.6; Solaris
    1236.3 12326.7 111420 458 1367.14 1684.4 1582.69 1961.66 1436.4; SpaceInvaders 148 1668.7 621535
    230.5 2358.43 4530.03 4130.88 3983.6 1794.24; StarGunner 664 10250 77400 740 10844.5 80002.6
    57908.7 34805 42165.2; Tennis -23.8 -8.3 21 -10.9 14.34 22.54 -0.22 21.7 -1.5; TimePilot 3568
    5229.2 65300 2810 36981.2 11666.2 12050.5 8117.05 3654.37; Tutankham 11.4 167.6 5384 79 264.49
    251.41 239.07 240.72 103.84; UpNDown 533.4 11693.2 82840 4176 648711 59943.9 34887.8 8279.26
    8488.31; Venture 0 1187.5 38900 0 0 1312.84 1528.87 1339.41 39.13; VideoPinball 16256.9 17667.9
    89218328 8933.3 35452.1 415833 466895 405173 63406.1; WizardOfWor 563.5 4756.5 395300 560
    14712.2 5670.54 7878.62 3229.23 2065.8; YarsRevenge 3092.9 54576.9 15000105 5718.2 152364 84144
    45542 11746.6 23909.4; Zaxxon 32.5 9173.3 83700 110 46625.6 11022.9 14603 6502.33 4538.57
    """.split(";"))
PUBLISHED = {game: dict(zip(COLUMNS, map(float, row))) for game, *row in ROWS}
AGENTS = COLUMNS[4:]


def command_line(argv=None):
    """python test_dreamerv2.py: measures, and returns the exit status."""
    parser = argparse.ArgumentParser(
        "test_dreamerv2.py", usage=argparse.SUPPRESS, allow_abbrev=False,
        description="Measures dreamerv2.py. `python -m pytest` runs the tests.")
    one = parser.add_mutually_exclusive_group(required=True)
    one.add_argument("--benchmark", action="store_true", help="its speed, with its flags")
    one.add_argument("--scores", metavar="FOLDER", help="its runs beside the published scores")
    sys.path.append(os.getcwd())  # where your_module:YourGame-v0 may lie
    given, flags = parser.parse_known_args(argv)
    if given.scores is not None and flags or {"--eval", "--dream"}.intersection(flags):
        parser.error(f"{' '.join(flags)}: only --benchmark takes flags, and it does not look")
    try:
        if given.benchmark:
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                config = d.choose_settings(d.read_flags(flags) | dict(logdir=folder))
                with contextlib.closing(d.make_envs(config)) as envs:
                    benchmark(config, envs)
        else:
            scores(given.scores)
    except (d.UsageError, OSError) as problem:
        print("test_dreamerv2.py:", *str(problem).split(), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(command_line())
