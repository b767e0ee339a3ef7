# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch>=2.6,<3", "gymnasium>=1.3,<2", "ale-py>=0.12.1,<0.13", "numpy>=1.26,<3",
#   "tqdm>=4.66,<5"]
# ///
"""DreamerV2 in one file: learn a model of the game, then learn to play inside it.

"Mastering Atari with Discrete World Models" (Hafner, Lillicrap, Norouzi, Ba; ICLR 2021,
arXiv 2010.02193). A recurrent world model with discrete latents learns from replayed
frames to predict images, rewards and episode ends. An actor and a critic then learn
from nothing but the sequences that this model imagines.

    python dreamerv2.py --game Breakout       # train; the same command resumes the run
    python dreamerv2.py --game Catch --preset small --steps 12000   # minutes on a CPU
    python dreamerv2.py --game Catch --preset small --eval    # watch that agent play

THE LOOP, with the paper's numbers, and the part of this file that holds each line:
    read the settings                                                       Parts 1, 13
    play 50 000 decisions at random, storing every row in the replay        Parts 9, 10
    until 50M decisions (200M frames) are played:                               Part 12
        act: z ~ q(z | h, image), action ~ actor(h, z)                           Part 8
        play the action for 4 frames, store the row                         Parts 9, 10
        after every 4th decision, learn from 50 sequences of 50 rows:            Part 8
            world model: follow the sequences with the RSSM               Parts 2, 3, 4
                minimise image, reward, discount errors + β KL   [Eq. 2]         Part 5
            imagination: from all 2500 states, 15 steps by the actor             Part 6
                predict rewards, discounts, values; λ-returns    [Eq. 4]         Part 7
            critic: move v(z) towards the returns                [Eq. 5]         Part 7
            actor: make actions with return > v(z) likelier      [Eq. 6]         Part 7
            after the 1st, 101st, ... gradient step: slow critic <- critic       Part 8
        now and then evaluate, draw a dream, log metrics, save             Parts 11, 12

SHAPES. Axis 0 is time. y[t] is the paper's y_t, but actions are shifted: see TIME.
    T  steps of a replayed sequence  50      S  latent variables            32
    B  sequences in a batch          50      K  classes of each latent      32
    N  items without a time axis,            D  units of the GRU state h   600
       here T·B start states       2500      F  feature [z, h], S*K + D   1624
    H  imagined steps                15      E  embedded image            1536
    C  image channels (1 is gray)     1      A  actions                     18

TIME. One row of experience is an action and what the environment returned for it. The
action at t is the one that LED to image t, and the reward at t ARRIVED with it:
    row            0            1            2            3 (new episode)
    action         0 (none)     a0           a1           0 (none)
    image          x0           x1           x2           x0'
    reward         0            r1           r2           0
    is_first       yes          no           no           yes
    is_terminal    no           no           yes          no
So h[t] = f(h[t-1], z[t-1], action[t]), where the paper writes the same action as
a_{t-1}. Imagination follows the same rule: actions[t+1] is chosen IN state t and leads
to state t+1, and the reward predicted at state t is the one received on arriving there.

SYMBOLS, in the paper and here.
    h_t          state.h                      γ_t        discount[t]: γ, or 0 at an end
    z_t, ẑ_t     state.z                      V^λ_t      returns[t]
    (h_t, z_t)   state.feature, as [z, h]     v, slow v  critic, slow_critic
    q(z|h,x)     posterior                    ρ          reinforce_mix
    p(ẑ|h)       prior                        η          entropy_scale
    α, β         kl_balance, kl_scale         sg(x)      x.detach()

SOURCES. Defaults are the paper's but for D7, D8 and D14-D16; what it leaves open is
mostly as in the authors' code (danijar/dreamerv2 at 07d906e, version 2.2.0, unless
another is named). Each row has a flag that chooses or a test that shows the difference:
         paper              version 2.2.0          here             flag or test
    D1   4 decisions/step   16                     4                --steps-per-update
    D2   γ 0.995 in table   0.999                  0.995            --gamma
    D3   50 sequences       16, earlier 50         50               --batch-size
    D4   baseline v(z_t)    slow v(z_t)            v(z_t)           --slow-baseline
    D5   V_t - v(z_t)       V_{t+1} - v(z_t)       V_t - v(z_t)     --shifted-advantage
    D6   all 18 actions     those a game uses      all 18           --full-action-space
    D7   losses are sums    means                  means           test_losses_are_means
    D8   rows of 1 episode  rows of 1 episode      across ends    test_replay_is_uniform
    D9   place of Adam's ε  added to √v            added to √v̂      test_parity_agent
    D10  no-ops not said    1 to 30                0 to 29          --max-noops
    D11  precision not said float16                bfloat16, CUDA   --precision
    D12  slow v_0 not said  random weights         critic's copy    test_slow_critic
    D13  start's γ not said 0 if game over         0 if game over   test_true_start
    D14  discount loss x 1  x 5                    x 5              --discount-scale
    D15  84² to 64² pixels  64² at once            64² at once      test_atari_protocol
    D16  Eq. 5, 6: 1..H-1   t = 0..H-1             t = 0..H-1    test_parity_behaviour

COST at the paper's size: 22.2M parameters, 12.5M gradient steps of 2.37 TFLOP, a replay
of 8.36 GB; the paper says under 10 days on a V100. No run here was of that size.
HEALTH: image_loss sinks towards 4096·½ ln 2π = 3764, its least (11 292 in colour), kl
rises to a few nats, actor_entropy sinks slowly from ln 18 = 2.89.
"""
from __future__ import annotations

import argparse, copy, ctypes, dataclasses, errno, inspect, io, itertools, json
import math, os, re, signal, sqlite3, struct, sys, time, zlib
from contextlib import closing, nullcontext, suppress
from pathlib import Path
from typing import NamedTuple

# Idle OpenMP threads wait by spinning, which makes a gradient step up to 100 times as
# long beside another busy process. This lets them sleep. It must precede torch.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# glibc gives a large tensor's memory back to the system, and soon asks for it again.
# Keeping it saves a fifth of a CPU step at the paper's size. Without glibc: skipped.
with suppress(AttributeError, OSError, TypeError):
    ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX
    ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD

import gymnasium
import numpy as np
import torch
import torch.nn.functional as F
from gymnasium import wrappers
from gymnasium.spaces import Box, Discrete
from torch import Tensor, nn
from tqdm import tqdm

# %% Part 1 | Configuration
# What can be set. WorldModel, Agent and Parts 10, 12, 13 read a Config; everything else
# takes plain numbers, so that it can be copied.
# Predict, before a doctest tells: how many gradient steps are 50M decisions?


@dataclasses.dataclass
class Config:
    """The settings of a run. Each field is a flag, its comment is the flag's help.

    >>> (Config.steps - Config.prefill_steps) // Config.steps_per_update
    12487500
    """
    # Run
    game: str = "Breakout"  # Atari game, Catch, or any Gymnasium id with images
    preset: str = "auto"  # see PRESETS; auto: atari on CUDA, else small
    steps: int = 50_000_000  # decisions to play in all; paper: 50M = 200M frames
    logdir: str = ""  # folder of the run; empty: runs/GAME-PRESET-seedSEED
    seed: int = 0  # of weights, sampling and environments
    device: str = "auto"  # auto (CUDA, else CPU) | cuda | cuda:1 | mps | cpu
    precision: str = "auto"  # auto (bf16 if CUDA has it) | fp32 | bf16 [D11]
    # Environment
    action_repeat: int = 4  # frames per decision (Atari, Box actions); paper: 4
    sticky: float = 0.25  # chance a frame keeps the last action (Atari); paper: 0.25
    max_noops: int = 29  # most no-op frames at a reset (Atari); authors' code: 30 [D10]
    time_limit: int = 27_000  # decisions after which an episode is cut; 108 000 frames
    full_action_space: bool = True  # all 18 Atari actions; paper: yes [D6]
    # Replay and schedule
    replay_capacity: int = 2_000_000  # rows kept, oldest dropped first; paper: 2M
    prefill_steps: int = 50_000  # random decisions before training; authors' code: 50k
    steps_per_update: int = 4  # decisions per gradient step; paper: 4 [D1]
    batch_size: int = 50  # sequences, B; paper: 50 [D3]
    seq_len: int = 50  # steps of a sequence, T; paper: 50
    # World model
    num_latents: int = 32  # categorical variables of z, S; paper: 32
    num_classes: int = 32  # classes of each, K; paper: 32
    deter_size: int = 600  # units of the GRU state h, D; paper: 600
    hidden_size: int = 600  # units of the RSSM's hidden layers; paper: 600
    cnn_depth: int = 48  # first convolution's channels, then doubled; authors' code: 48
    mlp_layers: int = 4  # hidden layers of every head, actor and critic; paper: 4
    mlp_units: int = 400  # units of each of those layers; paper: 400
    kl_scale: float = 0.1  # weight β of the KL; paper: 0.1; else try 0.3, 1, 3
    kl_balance: float = 0.8  # share of the KL that trains the prior, α; paper: 0.8
    free_nats: float = 0.0  # the mean KL trains only above this; authors' code: 0
    discount_scale: float = 5.0  # weight of the discount loss; authors' code: 5 [D14]
    discount_head: bool = True  # predict episode ends; no: every discount is γ
    reward_tanh: bool = True  # learn tanh(r) instead of r; paper: yes for Atari
    model_lr: float = 2e-4  # learning rate of the world model; paper: 2e-4
    # Behaviour
    horizon: int = 15  # imagined steps, H; paper: 15
    gamma: float = 0.995  # discount γ; paper's table: 0.995 [D2]
    return_lambda: float = 0.95  # λ of the return; paper: 0.95
    reinforce_mix: float = 1.0  # ρ: 1 is Reinforce, 0 (Box: always) backpropagation
    entropy_scale: float = 1e-3  # weight of the policy's entropy, η; paper: 1e-3
    anneal_steps: int = 0  # decisions until ρ and η are at their _end; 0: fixed
    reinforce_mix_end: float = 1.0  # ρ after anneal_steps
    entropy_scale_end: float = 3e-4  # η after anneal_steps
    actor_lr: float = 4e-5  # learning rate of the actor; paper: 4e-5
    critic_lr: float = 1e-4  # learning rate of the critic; paper: 1e-4
    slow_every_updates: int = 100  # gradient steps between slow copies; paper: 100
    slow_baseline: bool = False  # take the baseline from the slow critic [D4]
    shifted_advantage: bool = False  # credit a_t with V_{t+1} instead of V_t [D5]
    # Ablations; off: the paper's gamer median, clipped record mean; all on: 1.64, 0.25
    layer_norm: bool = True  # normalise the GRU's gates; off: 1.66, 0.25
    reward_gradients: bool = True  # reward loss trains the RSSM; off: 1.68, 0.24
    discrete_latents: bool = True  # z is categorical; off, Gaussian: 1.08, 0.19
    kl_balancing: bool = True  # Algorithm 2; off, the plain KL: 0.84, 0.16
    policy_reinforce: bool = True  # Reinforce gradients; off, ρ = 0: 0.69, 0.15
    image_gradients: bool = True  # image loss trains the RSSM; off: 0.04, 0.01
    # What DreamerV3 changed; preset v3 turns all four on
    symexp_twohot: bool = False  # reward head and critic: a cross-entropy on 255 bins
    free_bits: float = 0.0  # each KL term of a state trains only above this; V3: 1
    return_scale: float = 0.0  # advantages / max(this, returns' range); 0: off; V3: 1
    unimix: float = 0.0  # share of a uniform in latents and policy; V3: 0.01
    # Optimisers
    adam_eps: float = 1e-5  # Adam's epsilon; paper: 1e-5
    grad_clip: float = 100.0  # largest global gradient norm, per optimiser; paper: 100
    weight_decay: float = 1e-6  # every weight shrinks by this share a step; paper: 1e-6
    # Logging
    log_every_steps: int = 2_500  # decisions between lines, after the first random ones
    eval_every_steps: int = 100_000  # decisions between evaluations, and between dreams
    eval_episodes: int = 1  # of an evaluation; 0: neither these nor dreams are made
    checkpoint_minutes: float = 1.0  # minutes between checkpoints; 0: every decision


PRESETS = {  # strings of flags, which those that the user types override
    "atari": "",
    # The authors' code, version 2.2.0, but for D8, D9, D11, D12 and D10's least no-op.
    "released": "--steps-per-update 16 --batch-size 16 --gamma 0.999 --slow-baseline"
    " --shifted-advantage --no-full-action-space --max-noops 30",
    # The paper's "DreamerV2 (schedules)": the authors' first version, faf9e4c.
    "schedules": "--gamma 0.999 --anneal-steps 2500000 --reinforce-mix 0.9"
    " --entropy-scale 3e-3",
    # The authors' for DeepMind Control (0216d33), without its 100 first gradient steps.
    "continuous": "--steps 500000 --action-repeat 2 --replay-capacity 500000"
    " --prefill-steps 2500 --steps-per-update 5 --deter-size 200 --hidden-size 200"
    " --kl-scale 1 --free-nats 1 --no-discount-head --no-reward-tanh --model-lr 3e-4"
    " --gamma 0.99 --reinforce-mix 0 --entropy-scale 1e-4 --actor-lr 8e-5"
    " --critic-lr 8e-5 --eval-every-steps 10000",
    # DreamerV3's four changes. It weighs the prior's KL by 1, which is our β·α, and the
    # posterior's by 0.1, which is our β·(1 - α).
    "v3": "--symexp-twohot --no-reward-tanh --free-bits 1 --kl-scale 1.1"
    " --kl-balance 0.9090909 --return-scale 1 --unimix 0.01 --entropy-scale 3e-4",
    # For a CPU, found by trial on Catch, Boxing and Kung-Fu Master.
    "small": "--steps 100000 --no-full-action-space --replay-capacity 100000"
    " --prefill-steps 2500 --batch-size 16 --seq-len 16 --num-latents 16"
    " --num-classes 16 --deter-size 128 --hidden-size 128 --cnn-depth 8 --mlp-layers 2"
    " --mlp-units 128 --kl-scale 0.3 --model-lr 6e-4 --gamma 0.99 --anneal-steps 10000"
    " --entropy-scale 1e-1 --entropy-scale-end 3e-3 --return-scale 1 --actor-lr 4e-4"
    " --critic-lr 1e-3 --slow-every-updates 50 --log-every-steps 1000"
    " --eval-every-steps 10000 --eval-episodes 3",
}


# %% Part 2 | Gradient tricks (Alg. 1, 2)
# Two ideas make discrete latents trainable: a sample that carries the gradient of its
# probabilities, and a KL that pulls the prior harder than the posterior.
# Predict: if prior and posterior are equal, what are the KL and its gradient?


def straight_through_sample(logits: Tensor) -> Tensor:
    """One-hot sample that passes gradients as if it were the probabilities. [Alg. 1]
        sample = one_hot(draw(logits)),  probs = softmax(logits)
        return sample + probs - sg(probs)
    logits (..., K) of any float type -> (..., K) float32, exactly one-hot. Its gradient
    is biased, of low variance. The draw is a race: class k takes a random time,
    -ln(uniform) / probs[k], and is then the first with probability probs[k]. A race,
    unlike torch.multinomial, does not make the CPU wait for the GPU.
    >>> _ = torch.manual_seed(0)
    >>> logits = torch.tensor([0.0, math.log(3.0)], requires_grad=True)   # probs ¼, ¾
    >>> round(straight_through_sample(logits.expand(9000, 2))[:, 1].mean().item(), 2)
    0.75
    >>> straight_through_sample(logits)[1].backward()
    >>> round(logits.grad[1].item(), 4)      # d probs[1] / d logits[1] = ¾·(1 - ¾)
    0.1875
    """
    # In float32: a race in bfloat16 often ends in a tie, which the lowest k wins.
    probs = logits.float().softmax(-1)
    arrival = -torch.rand_like(probs).log() / probs.detach()
    first = arrival.argmin(-1, keepdim=True)
    sample = torch.zeros_like(probs).scatter_(-1, first, 1.0)
    # Without the two probs the sample is a constant: no loss would reach the encoder
    # through z. The brackets let them cancel exactly.
    return sample + (probs - probs.detach())


def categorical_entropy(logits: Tensor) -> Tensor:
    """Entropy in nats over the last axis, (..., K) -> (...); at most ln K.
    >>> round(32 * categorical_entropy(torch.zeros(32)).item(), 1)     # z's maximum
    110.9
    """
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def categorical_kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(p ‖ q) in nats of S independent categoricals, (..., S, K) twice -> (...).
        KL(p ‖ q) = Σ_s Σ_k p[s, k] · (ln p[s, k] - ln q[s, k])
    >>> p = torch.tensor([[1.0, 1.0]]).log()                # one latent, ½ ½
    >>> q = torch.tensor([[3.0, 1.0]]).log()                # one latent, ¾ ¼
    >>> round(categorical_kl(p, q).item(), 4)               # ½ ln(½ / ¾) + ½ ln(½ / ¼)
    0.1438
    >>> round(categorical_kl(q, p).item(), 4)               # ¾ ln(¾ / ½) + ¼ ln(¼ / ½)
    0.1308
    """
    log_p, log_q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum((-2, -1))


def balanced_kl(posterior, prior, alpha, divergence=categorical_kl, free_bits=0.0):
    """KL balancing: train the prior faster than the posterior. [Alg. 2]
        loss = α KL(sg(posterior) ‖ prior) + (1 - α) KL(posterior ‖ sg(prior))
    posterior, prior: logits (..., S, K) -> (loss, kl), each (...) in nats. Both terms
    have the same value, the KL. The first teaches the prior to predict, the second
    keeps the posterior predictable. With alpha = None (--no-kl-balancing) the loss is
    the plain KL, with its full gradient to both. DreamerV3's free bits make each term
    of a state max(free_bits, KL), so that a KL below that has no gradient.
    >>> post = torch.tensor([[1.0, 1.0]]).log().requires_grad_()
    >>> prior = torch.tensor([[3.0, 1.0]]).log().requires_grad_()
    >>> loss, kl = balanced_kl(post, prior, alpha=0.75)
    >>> loss.backward()
    >>> prior.grad[0, 0].item()                             # α · (¾ - ½)
    0.1875
    >>> round(post.grad[0, 0].item(), 4)                    # (1 - α) · ½ (ln(½/¾) - KL)
    -0.0687
    >>> loss, _ = balanced_kl(post, post.detach(), alpha=0.75)    # equal: KL 0 ...
    >>> loss.item(), torch.autograd.grad(loss, post)[0].tolist()    # ... and no pull
    (0.0, [[0.0, 0.0]])
    """
    if alpha is None:
        kl = divergence(posterior, prior)
        return kl.clamp(min=free_bits), kl.detach()
    kl = divergence(posterior.detach(), prior)
    train_prior = kl.clamp(min=free_bits)
    train_posterior = divergence(posterior, prior.detach()).clamp(min=free_bits)
    # Without the balance the posterior follows a prior that has learned nothing yet.
    return alpha * train_prior + (1 - alpha) * train_posterior, kl.detach()


class OneHot:
    """The policy over A discrete actions: logits (..., A) -> one-hot samples, mode."""
    def __init__(self, logits: Tensor):
        self.logits = logits

    @property
    def mode(self) -> Tensor:
        return F.one_hot(self.logits.argmax(-1), self.logits.shape[-1]).float()

    def rsample(self) -> Tensor:
        return straight_through_sample(self.logits)

    def log_prob(self, action: Tensor) -> Tensor:
        return (self.logits.log_softmax(-1) * action).sum(-1)

    def entropy(self) -> Tensor:
        return categorical_entropy(self.logits)


# The rest of this part may wait: Gaussian latents, continuous actions, DreamerV3.


def gaussian(params: Tensor) -> torch.distributions.Normal:
    """(..., 2K) -> K independent normals: K means, then K numbers s, each of which
    gives a deviation of 2·σ(s / 2) + 0.1, as in the authors' code."""
    mean, s = params.chunk(2, -1)
    return torch.distributions.Normal(mean, 2 * torch.sigmoid(s / 2) + 0.1, False)


def gaussian_kl(p_params: Tensor, q_params: Tensor) -> Tensor:
    """KL(p ‖ q) in nats of S·K independent normals, (..., S, 2K) twice -> (...)."""
    kl = torch.distributions.kl_divergence(gaussian(p_params), gaussian(q_params))
    return kl.sum((-2, -1))


class TruncatedNormal:
    """The policy over A continuous actions in [-1, 1]: a normal without its tails, from
    the actor's params (..., 2A), see gaussian; a tanh keeps the mode inside.
    >>> policy = TruncatedNormal(torch.zeros(9000, 2))     # mode 0, deviation 1.1
    >>> policy.rsample().abs().max().item() <= 1, round(policy.entropy()[0].item(), 3)
    (True, 0.686)
    """
    def __init__(self, params: Tensor):
        raw = gaussian(params)
        self.mode = raw.mean.tanh()
        self.normal = torch.distributions.Normal(self.mode, raw.stddev, False)
        self.below = self.normal.cdf(-1)  # the probability of the lower tail, cut off
        self.inside = self.normal.cdf(1) - self.below  # the probability that is left

    def rsample(self) -> Tensor:
        p = self.below + self.inside * torch.rand_like(self.mode)
        return self.normal.icdf(p.clamp(1e-6, 1 - 1e-6)).clamp(-1, 1)

    def log_prob(self, action: Tensor) -> Tensor:
        return (self.normal.log_prob(action) - self.inside.log()).sum(-1)

    def entropy(self) -> Tensor:
        low = (-1 - self.mode) * self.normal.log_prob(-1).exp()
        high = (1 - self.mode) * self.normal.log_prob(1).exp()
        cut = (low - high) / (2 * self.inside)
        return (self.normal.entropy() + self.inside.log() + cut).sum(-1)


def mix_uniform(logits: Tensor, share: float) -> Tensor:
    """DreamerV3's unimix: ln((1 - share)·softmax(logits) + share / K), (..., K) again.
    No class is ruled out, so that no KL and no ln p becomes huge.
    >>> mix_uniform(torch.tensor([0.0, 100.0]), 0.5).exp().tolist()
    [0.25, 0.75]
    """
    if not share:
        return logits
    return ((1 - share) * logits.softmax(-1) + share / logits.shape[-1]).log()


def symexp_bins(count: int, device=None) -> Tensor:
    """The numbers that DreamerV3's reward head and critic choose from: symexp(x) =
    sign(x)·(e^|x| - 1) at `count` equally spaced x from -20 to 20.
    >>> [round(x) for x in symexp_bins(5).tolist()]                # at -20 -10 0 10 20
    [-485165184, -22025, 0, 22025, 485165184]
    """
    x = torch.linspace(-20, 20, count, device=device)
    return x.sign() * x.abs().expm1()


def head_mean(out: Tensor) -> Tensor:
    """The number that a head predicts, (...). An output (..., 1) is that number. An
    output (..., K) holds logits over the symexp_bins; the number is their mean:
        Σ_k p[k]·bins[k] = ½ Σ_k (p[k] - p[K-1-k])·bins[k]
    Since bins[K-1-k] = -bins[k], the second form is exactly 0 for equal p.
    >>> head_mean(torch.zeros(255)).item()
    0.0
    """
    if out.shape[-1] == 1:
        return out.squeeze(-1).float()
    probs = out.float().softmax(-1)
    bins = symexp_bins(out.shape[-1], out.device)
    return 0.5 * ((probs - probs.flip(-1)) * bins).sum(-1)


def twohot_nll(out: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of a head with bins, out (..., K), target y (...) -> (...).
        - Σ_k twohot(y)[k] · ln softmax(out)[k]
    twohot(y) splits a weight of 1 linearly between the two bins around y. The gradient
    does not grow with y, as that of a squared error does, so rewards need no tanh.
    >>> out = torch.tensor([0.1, 0.2, 0.7]).log()           # at symexp_bins(3)
    >>> y = symexp_bins(3)[2] / 4                           # ¾ at 0, ¼ at the last
    >>> round(twohot_nll(out, y).item(), 3)                 # -(¾ ln 0.2 + ¼ ln 0.7)
    1.296
    """
    bins = symexp_bins(out.shape[-1], out.device)
    # passed[k] goes from 0 to 1 while y goes from bin k to bin k + 1.
    passed = ((target[..., None] - bins[:-1]) / bins.diff()).clamp(0, 1)
    twohot = F.pad(passed, (1, 0), value=1.0) - F.pad(passed, (0, 1))
    return -(twohot * out.float().log_softmax(-1)).sum(-1)


# %% Part 3 | Networks
# Plain feed-forward pieces and the one recurrent cell.
# Predict: four convolutions of kernel 4 and stride 2 on 64 pixels: how many are left?


def glorot_init(module: nn.Module) -> None:
    """Keras's uniform Glorot weights and zero biases: `network.apply(glorot_init)`."""
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


def mlp(in_size: int, out_size: int, layers: int = 4, units: int = 400):
    """(..., in_size) -> (..., out_size): hidden layers with ELU, a linear output."""
    network, size = [], in_size
    for _ in range(layers):
        network += [nn.Linear(size, units), nn.ELU()]
        size = units
    return nn.Sequential(*network, nn.Linear(size, out_size))


class ConvEncoder(nn.Module):
    """Images (N, ..., C, 64, 64) -> embeddings (N, ..., 32·depth).
    >>> encoder = ConvEncoder(1, depth=48)
    >>> encoder(torch.zeros(7, 1, 64, 64)).shape    # 64 -> 31 -> 14 -> 6 -> 2; 2·2·384
    torch.Size([7, 1536])
    """
    def __init__(self, channels: int, depth: int = 48):
        super().__init__()
        layers = []
        for size in (depth, 2 * depth, 4 * depth, 8 * depth):
            layers += [nn.Conv2d(channels, size, 4, stride=2), nn.ELU(inplace=True)]
            channels = size
        self.embed_dim = 2 * 2 * channels
        self.net = nn.Sequential(*layers)

    def forward(self, image: Tensor) -> Tensor:
        assert image.dim() > 3 and image.shape[-2:] == (64, 64), "not (N, C, 64, 64)"
        out = self.net(image.flatten(0, -4))
        return out.reshape(*image.shape[:-3], self.embed_dim)


class ConvDecoder(nn.Module):
    """Features (N, ..., F) -> mean images (N, ..., C, 64, 64).
    The linear layer makes a 1×1 image, without activation; the others grow it.
    >>> decoder = ConvDecoder(1624, 1, depth=48)
    >>> decoder(torch.zeros(7, 1624)).shape                 # 1 -> 5 -> 13 -> 30 -> 64
    torch.Size([7, 1, 64, 64])
    """
    def __init__(self, feature_size: int, channels: int, depth: int = 48):
        super().__init__()
        self.linear = nn.Linear(feature_size, 32 * depth)
        size, layers = 32 * depth, []
        for out, kernel in (4 * depth, 5), (2 * depth, 5), (depth, 6), (channels, 6):
            layers += [nn.ConvTranspose2d(size, out, kernel, 2), nn.ELU(inplace=True)]
            size = out
        self.net = nn.Sequential(*layers[:-1])

    def forward(self, feature: Tensor) -> Tensor:
        # On a 1×1 image the first transposed convolution is a matrix product with its
        # 5·5 kernel. Written as one, it takes at most a third of the time.
        first = self.net[0]  # its weight is (32·depth, 4·depth, 5, 5)
        out = self.linear(feature).flatten(0, -2) @ first.weight.flatten(1)
        out = out.unflatten(-1, first.weight.shape[1:]) + first.bias[:, None, None]
        out = self.net[1:](out)
        return out.reshape(*feature.shape[:-1], *out.shape[1:])


class LayerNormGRUCell(nn.Module):
    """The authors' GRU: one linear, one layer norm over all three gates together.
        reset, cand, update = split(LayerNorm(W [x, h] + b))
        c  = tanh(σ(reset) · cand)
        u  = σ(update - 1)
        h' = u · c + (1 - u) · h
    x (..., input), h (..., D) -> h' (..., D). It is the only norm. torch's GRUCell
    has none: there `reset` gates only h's part of the candidate, nothing is subtracted
    from `update`, and u weighs the OLD state.
    >>> cell = LayerNormGRUCell(2, 1)
    >>> for p in cell.parameters(): _ = nn.init.zeros_(p)   # all gates zero
    >>> round(cell(torch.zeros(1, 2), torch.ones(1, 1)).item(), 4)      # 1 - σ(-1)
    0.7311
    """
    def __init__(self, input_size: int, hidden_size: int, layer_norm: bool = True):
        super().__init__()
        size = 3 * hidden_size
        self.linear = nn.Linear(input_size + hidden_size, size)
        self.norm = nn.LayerNorm(size, eps=1e-3) if layer_norm else nn.Identity()

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        # Autocast computes in bfloat16, where h would lose small changes.
        gates = self.norm(self.linear(torch.cat([x, h], -1)).to(h.dtype))
        reset, candidate, update = gates.chunk(3, -1)
        candidate = torch.tanh(torch.sigmoid(reset) * candidate)
        # The -1 keeps most of h at first; without it each step would overwrite half.
        update = torch.sigmoid(update - 1)
        return torch.lerp(h, candidate, update)  # u · c + (1 - u) · h


# %% Part 4 | RSSM (Eq. 1)
# The recurrent state-space model: what the agent believes about the world.
#     h[t] = f(h[t-1], z[t-1], action[t])        recurrent model, deterministic
#     z[t] ~ q(z | h[t], x[t])                   posterior: it has seen the image
#     ẑ[t] ~ p(ẑ | h[t])                         prior: it has to guess
#
#      z[t-1] ──┐                 ┌── x[t] (embedded)
#   action[t] ──┴─► GRU ─► h[t] ──┴─► posterior ─► z[t] ──► next step
#      h[t-1] ──────┘        └──────► prior, trained towards the posterior
# Predict: with S = 3 variables of K = 4 classes and D = 8, how long is a feature?


class State(NamedTuple):
    """What the model believes at one moment; leading axes are (T, B) or (N,)."""
    h: Tensor  # (..., D) the deterministic, recurrent part
    z: Tensor  # (..., S, K) the stochastic part, S one-hot vectors
    logits: Tensor | None = None  # (..., S, K) of the distribution z was drawn from

    @property
    def feature(self) -> Tensor:
        """[z, h] (..., S·K + D): what every head, the actor and the critic see."""
        return torch.cat([self.z.flatten(-2), self.h], -1)


class RSSM(nn.Module):
    """Recurrent state-space model with categorical latents. [Eq. 1]
    `img_step` goes on without an image (imagination), `obs_step` with one (acting), and
    `observe` through a whole sequence (training). Weights are float32. With
    discrete=False (--no-discrete-latents) z is S·K Gaussians (the authors have S), and
    what is called logits are their params (..., S, 2K), see `gaussian`.
    >>> rssm = RSSM(action_dim=2, embed_dim=12, num_latents=3, num_classes=4,
    ...             deter_size=8, hidden_size=7)
    >>> posterior, prior_logits = rssm.observe(
    ...     torch.zeros(5, 6, 12), torch.zeros(5, 6, 2), torch.zeros(5, 6).bool())
    >>> posterior.h.shape, posterior.z.shape, prior_logits.shape
    (torch.Size([5, 6, 8]), torch.Size([5, 6, 3, 4]), torch.Size([5, 6, 3, 4]))
    >>> posterior.feature.shape                                          # 3·4 + 8
    torch.Size([5, 6, 20])
    """
    def __init__(self, action_dim, embed_dim, num_latents=32, num_classes=32,
                 deter_size=600, hidden_size=600, layer_norm=True, unimix=0.0,
                 discrete=True):
        super().__init__()
        self.latent_shape, self.deter_size = (num_latents, num_classes), deter_size
        self.unimix, self.discrete = unimix, discrete
        latent_size = num_latents * num_classes
        out_size = latent_size * (1 if discrete else 2)
        self.feature_size = latent_size + deter_size
        self.img_in = nn.Linear(latent_size + action_dim, hidden_size)
        self.cell = LayerNormGRUCell(hidden_size, deter_size, layer_norm)
        self.prior = mlp(deter_size, out_size, 1, hidden_size)
        self.posterior = mlp(deter_size + embed_dim, out_size, 1, hidden_size)

    def initial(self, n: int) -> State:
        """Initial states of n sequences: zeros, which are not learned."""
        h = self.img_in.weight.new_zeros(n, self.deter_size)
        return State(h, h.new_zeros(n, *self.latent_shape))

    def recurrent(self, state: State, action: Tensor) -> Tensor:
        """h[t] = f(h[t-1], z[t-1], action[t]), (N, D)."""
        x = F.elu(self.img_in(torch.cat([state.z.flatten(-2), action], -1)))
        return self.cell(x, state.h)

    def to_logits(self, out: Tensor) -> Tensor:
        """Output of prior or posterior, (..., S·K) -> logits (..., S, K), float32."""
        logits = out.float().unflatten(-1, (self.latent_shape[0], -1))
        return mix_uniform(logits, self.unimix) if self.discrete else logits

    def draw(self, h: Tensor, out: Tensor) -> State:
        """The state whose z is a sample of what prior or posterior put out."""
        logits, discrete = self.to_logits(out), self.discrete
        z = straight_through_sample(logits) if discrete else gaussian(logits).rsample()
        return State(h, z, logits)

    def img_step(self, state: State, action: Tensor) -> State:
        """One step without an image: z comes from the prior. action (N, A)."""
        h = self.recurrent(state, action)
        return self.draw(h, self.prior(h))

    def restart(self, state: State, action: Tensor, is_first: Tensor):
        """State and action, zeroed where is_first: the next step is a fresh start."""
        # Without this mask a new episode would go on with the old one's memory.
        first = is_first[:, None]
        h, action = state.h.masked_fill(first, 0), action.masked_fill(first, 0)
        return State(h, state.z.masked_fill(first[..., None], 0)), action

    def obs_step(self, state: State, action, embed, is_first) -> State:
        """One step with an image: z comes from the posterior. state of t-1; action
        (N, A) that led here; embed (N, E) and is_first (N,) of t."""
        h = self.recurrent(*self.restart(state, action, is_first))
        return self.draw(h, self.posterior(torch.cat([h, embed], -1)))

    def observe(self, embeds, actions, is_first) -> tuple[State, Tensor]:
        """A whole sequence with images, from zeros: obs_step, T times.
        embeds (T, B, E), actions (T, B, A), is_first (T, B) bool -> posterior states
        and prior logits over (T, B)."""
        assert embeds.shape[:2] == actions.shape[:2] == is_first.shape, "(T, B) differ"
        state, states = self.initial(embeds.shape[1]), []
        # float32: for products as small as these, bfloat16 costs more than it saves.
        with torch.autocast(embeds.device.type, enabled=False):
            for embed, action, first in zip(embeds.float(), actions, is_first):
                state = self.obs_step(state, action, embed, first)
                states.append(state)
        posterior = State(*(torch.stack(x) for x in zip(*states)))
        # A prior depends on its h[t] alone, so all T are computed in one call.
        return posterior, self.to_logits(self.prior(posterior.h))


# %% Part 5 | World model (Eq. 2)
# What learns from real experience: encoder, RSSM, and image, reward, discount heads.
# Predict: a decoder outputs the exact image. What is its negative log-likelihood?


def normal_nll(mean: Tensor, target: Tensor) -> Tensor:
    """-ln Normal(target; mean, 1) of each element: half the squared error, plus 0.919.
    The constant trains nothing, but sets the loss of a perfect image, gray or colour:
    >>> gray, colour = torch.zeros(1, 64, 64), torch.zeros(3, 64, 64)
    >>> [round(normal_nll(x, x).sum().item()) for x in (gray, colour)]
    [3764, 11292]
    """
    return 0.5 * (target - mean) ** 2 + 0.5 * math.log(2 * math.pi)


def preprocess(image: Tensor) -> Tensor:
    """uint8 pixels -> float32 in [-½, ½], what encoder and decoder speak."""
    return image.float() / 255 - 0.5


class WorldModel(nn.Module):
    """Encoder, RSSM, image, reward and discount heads, and their loss. [Eq. 2]"""
    def __init__(self, config: Config, num_actions: int, channels: int = 1):
        super().__init__()
        self.config = c = config
        self.encoder = ConvEncoder(channels, c.cnn_depth)
        self.rssm = RSSM(
            num_actions, self.encoder.embed_dim, c.num_latents, c.num_classes,
            c.deter_size, c.hidden_size, c.layer_norm, c.unimix, c.discrete_latents)
        size, widths = self.rssm.feature_size, (c.mlp_layers, c.mlp_units)
        self.decoder = ConvDecoder(size, channels, c.cnn_depth)
        self.reward_head = mlp(size, 255 if c.symexp_twohot else 1, *widths)
        self.discount_head = mlp(size, 1, *widths)

    def loss(self, image, action, reward, is_first, is_terminal):
        """The world-model loss of one batch. [Eq. 2]
            E_q Σ_t [ -ln p(x[t] | h[t], z[t]) - ln p(r[t] | h[t], z[t])
                      -ln p(γ[t] | h[t], z[t]) + β KL(q(z | h[t], x[t]) ‖ p(z | h[t])) ]
        image (T, B, C, 64, 64) uint8, action (T, B, A), reward, is_first, is_terminal
        (T, B) -> loss (scalar), posterior State over (T, B), metrics. Terms are sums
        over pixels and latents, means over T and B [D7]; discount_scale weighs the
        discount's [D14]. So the image's 4096 terms outweigh the reward's one.
        """
        c, target = self.config, preprocess(image)
        posterior, prior = self.rssm.observe(self.encoder(target), action, is_first)
        feature = posterior.feature

        # In two ablations a head trains as before, but sends the RSSM no gradient.
        seen = feature if c.image_gradients else feature.detach()
        image_nll = normal_nll(self.decoder(seen).float(), target)  # (T, B, C, 64, 64)
        image_loss = image_nll.sum((-3, -2, -1)).mean()

        # The tanh tames games that score by the thousand. It lives here and nowhere
        # else: replay keeps raw rewards, and scores are reported raw.
        reward_target = reward.tanh() if c.reward_tanh else reward
        seen = feature if c.reward_gradients else feature.detach()
        out = self.reward_head(seen)
        reward_loss = normal_nll(head_mean(out), reward_target).mean()
        if c.symexp_twohot:
            reward_loss = twohot_nll(out, reward_target).mean()

        # The target is γ or 0, so that the head's mean is the discount itself. With a
        # target of 1 imagined returns would not be discounted. An episode that is cut
        # by a time limit is not terminal and keeps its γ.
        discount_target = c.gamma * (1 - is_terminal.float())
        logit = self.discount_head(feature).squeeze(-1).float()
        discount_loss = F.binary_cross_entropy_with_logits(logit, discount_target)

        alpha = c.kl_balance if c.kl_balancing else None
        divergence, entropy = categorical_kl, categorical_entropy
        if not c.discrete_latents:
            divergence, entropy = gaussian_kl, lambda x: gaussian(x).entropy().sum(-1)
        kl_loss, kl = balanced_kl(
            posterior.logits, prior, alpha, divergence, c.free_bits)
        kl_loss = kl_loss.mean().clamp(min=c.free_nats)
        loss = image_loss + reward_loss + c.kl_scale * kl_loss
        if c.discount_head:
            loss = loss + c.discount_scale * discount_loss
        metrics = dict(
            model_loss=loss, image_loss=image_loss, reward_loss=reward_loss,
            discount_loss=discount_loss, kl=kl.mean(),
            prior_entropy=entropy(prior).sum(-1).mean(),
            posterior_entropy=entropy(posterior.logits).sum(-1).mean())
        return loss, posterior, {k: v.detach() for k, v in metrics.items()}


# %% Part 6 | Imagination
# The actor acts in the world model, from each of the N = T·B states of the batch.
# Predict: which action is actions[0]?


def imagine(img_step, actor, start: State, horizon: int) -> tuple[Tensor, Tensor]:
    """Roll the world model forward with the actor's sampled actions (paper, Fig. 3).
        z[0] ──────► z[1] ──────► z[2] ── ... ──► z[H]       features[t] = [z[t], h[t]]
            actions[1]   actions[2]                          actions[t] led to state t
    img_step(state, action) returns the next State, as RSSM.img_step; actor(features) a
    policy with rsample(), as OneHot; start is a State over (N,). Returns features (H+1,
    N, F) and actions (H+1, N, A). Nothing chose actions[0]: it is zero.
    >>> def clock(state, action):                             # a world that only counts
    ...     return State(state.h + 1, state.z, state.logits)
    >>> start = State(torch.zeros(2, 1), torch.zeros(2, 1, 1), torch.zeros(2, 1, 1))
    >>> actor = lambda feature: OneHot(torch.zeros(2, 3))
    >>> features, actions = imagine(clock, actor, start, horizon=3)
    >>> features[:, 0, 1].tolist()                # feature = [z, h], and h is the clock
    [0.0, 1.0, 2.0, 3.0]
    >>> actions.sum(-1)[:, 0].tolist()            # nothing, then one-hot actions
    [0.0, 1.0, 1.0, 1.0]
    """
    state, features, actions = start, [start.feature], []
    for _ in range(horizon):
        # With ρ < 1 a return's gradient reaches each action, and the actor's weights,
        # through the dynamics. As in the authors' code, it stops at the actor's input.
        # Without the detach actions would also be judged by how they change later
        # choices, through still more biased (straight-through) samples.
        action = actor(features[-1].detach()).rsample()
        state = img_step(state, action)
        features.append(state.feature)
        actions.append(action)
    return torch.stack(features), torch.stack([torch.zeros_like(actions[0])] + actions)


def open_loop(rssm, embeds: Tensor, actions: Tensor, is_first: Tensor) -> Tensor:
    """Features (T, B, F) of T rows: the model sees only the first images, embeds
    (n, B, E), but all actions (T, B, A) and is_first (T, B)."""
    seen = len(embeds)
    states, _ = rssm.observe(embeds, actions[:seen], is_first[:seen])
    state, features = State(*(x[-1] for x in states)), [*states.feature]
    for action, first in zip(actions[seen:], is_first[seen:]):
        state = rssm.img_step(*rssm.restart(state, action, first))
        features.append(state.feature)
    return torch.stack(features)


# %% Part 7 | Returns and losses (Eq. 4-6)
# What the imagined sequences are worth, and how the actor and the critic learn from it.
#     state        z[0]      z[1]      z[2]   ...   z[H-1]      z[H]
#     reward       r[0]      r[1]      r[2]         r[H-1]      (unused)
#     discount     γ[0]      γ[1]      γ[2]         γ[H-1]      (unused)
#     action            a0        a1        ...            a_{H-1}   a_t: actions[t+1]
#     returns      V[0]      V[1]      V[2]         V[H-1]      V[H] = v(z[H])
#
# r[t] is received on ARRIVING in z[t], so the return V[t] contains it. The critic's
# v(z[t]) predicts V[t] and contains it, too. So r[t] cancels in the advantage V[t] -
# v(z[t]), as far as the critic has learned: a_t is credited with what follows it.
# The losses count states 0 to H-1 [D16], with weights w[t] that Eq. 5 and 6 leave out.
# Predict: rewards 1, 2, values 8, 4, 2, discounts ½: the returns with λ = ½?


def lambda_return(reward, value, discount, lambda_: float) -> Tensor:
    """λ-returns: a weighted mean of all n-step returns. [Eq. 4]
        V[t] = r[t] + γ[t] · ((1 - λ) · v(z[t+1]) + λ · V[t+1]),    V[H] = v(z[H])
    value (H+1, N); reward and discount (H, N), or (H+1, N) whose last entry is not used
    -> returns (H, N). γ[t] is 0 if arriving in z[t] ended the game. v: slow critic.
    With v(z[t]) in place of v(z[t+1]) the critic would learn the return of staying.
    >>> r, v = torch.tensor([1.0, 2.0]), torch.tensor([8.0, 4.0, 2.0])
    >>> g = torch.tensor([0.5, 0.5])
    >>> lambda_return(r, v, g, 0.5).tolist()        # 1 + ½·(½·4 + ½·3),  2 + ½·2
    [2.75, 3.0]
    >>> lambda_return(r, v, g, 0.0).tolist()        # one step:   r[t] + γ v[t+1]
    [3.0, 3.0]
    >>> lambda_return(r, v, g, 1.0).tolist()        # all H steps:  1 + ½·3
    [2.5, 3.0]
    """
    assert value.shape[1:] == reward.shape[1:] == discount.shape[1:], "N differs"
    returns, target = [], value[-1]
    for t in reversed(range(len(value) - 1)):
        future = (1 - lambda_) * value[t + 1] + lambda_ * target
        target = reward[t] + discount[t] * future
        returns.append(target)
    return torch.stack(returns[::-1])


def trajectory_weights(discount: Tensor) -> Tensor:
    """How much each imagined state counts: the chance to be there, discounted.
        w[t] = Π_{i < t} γ[i],    w[0] = 1
    discount (H, N) -> weights (H, N). They are detached: otherwise the actor could
    lower its loss by changing how much a state counts, in place of what it is worth.
    After a predicted end they are near zero: what is imagined there means nothing.
    >>> trajectory_weights(torch.tensor([0.5, 0.5, 0.0, 0.5])).tolist()
    [1.0, 0.5, 0.25, 0.0]
    """
    return torch.cat([torch.ones_like(discount[:1]), discount[:-1]]).cumprod(0).detach()


def critic_loss(value: Tensor, returns: Tensor, weights: Tensor, bin_logits=None):
    """Squared error towards the returns. [Eq. 5]
        mean over t, n of  w[t] · ½ (v(z[t]) - sg(V[t]))²
    value, returns, weights (H, N), t = 0 .. H-1 -> loss (scalar), metrics. [D7] Given
    bin_logits (H, N, K), of which value is the mean, it is DreamerV3's twohot_nll.
    >>> v, V = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0])
    >>> w = torch.tensor([1.0, 0.5])
    >>> critic_loss(v, V, w)[0].item()              # (1·½·4 + ½·½·16) / 2
    3.0
    """
    target = returns.detach()
    error = 0.5 * (value - target) ** 2
    if bin_logits is not None:
        error = twohot_nll(bin_logits, target)
    loss = (weights * error).mean()
    means = dict(value=value.detach().mean(), returns=target.mean())
    return loss, dict(critic_loss=loss.detach()) | means


def actor_loss(log_prob, entropy, returns, baseline, weights, *, entropy_scale,
               reinforce_mix=1.0, advantage_scale=1.0):
    """Reinforce, dynamics backpropagation and entropy. [Eq. 6]
        mean over t, n of  w[t] · ( - ρ · ln p(a_t | z[t]) · sg(V[t] - v(z[t]))
                                    - (1 - ρ) · V[t]
                                    - η · entropy(p(· | z[t])) )
    log_prob (H, N): ln p of a_t, the action CHOSEN in state t: imagine's actions[t+1],
    detached; entropy (H, N) of the policy there; returns, baseline, weights (H, N) ->
    loss (scalar), metrics. For ρ < 1, returns carry the actor's gradient. Subtracting
    v(z[t]), which knows nothing of a_t, keeps the mean gradient, at far less variance.
    advantage_scale is DreamerV3's, see Agent.
    >>> logits = torch.zeros(1, 2).requires_grad_()              # two equal actions
    >>> log_prob, ent = logits.log_softmax(-1)[:, 0], torch.zeros(1)  # chose the first
    >>> V, v, w = torch.tensor([3.0]), torch.tensor([1.0]), torch.ones(1)
    >>> loss, _ = actor_loss(log_prob, ent, V, v, w, entropy_scale=0.0)
    >>> round(loss.item(), 4)                                    # ln 2 · (3 - 1)
    1.3863
    >>> loss.backward(); logits.grad.tolist()    # descent: good gets likelier
    [[-1.0, 1.0]]
    """
    # The advantage only weighs ln p. With ρ < 1 the returns carry a gradient, which
    # without the detach would also flow through this product.
    advantage = (returns - baseline).detach() / advantage_scale
    objective = (reinforce_mix * log_prob * advantage + (1 - reinforce_mix) * returns
                 + entropy_scale * entropy)
    loss = -(weights * objective).mean()
    return loss, dict(actor_loss=loss.detach(), actor_entropy=entropy.detach().mean())


# %% Part 8 | Agent (Eq. 3)
# The actor a_t ~ p(a_t | z_t) and the critic v(z_t) ≈ E Σ_{τ≥t} γ^{τ-t} r_τ [Eq. 3].
# One gradient step of everything, on one screen.
# Predict: Adam's first step moves all weights by nearly the same amount. How far?


class Optimizer:
    """Adam with clipping by global norm and decoupled decay, for a module's weights.
    Authors' code: clip the gradient, w <- (1 - decay)·w, then Adam. torch's AdamW would
    shrink w by lr·decay: here decay is divided by lr first.
    >>> layer = nn.Linear(1, 1)
    >>> _ = nn.init.ones_(layer.weight)
    >>> opt = Optimizer(layer, lr=0.5, eps=0.0, clip=100.0, decay=0.25)
    >>> round(opt.minimize(3 * layer(torch.ones(1)).sum()).item(), 4)   # 3√2
    4.2426
    >>> round(layer.weight.item(), 4)           # ¾·1, then Adam's first step, lr
    0.25
    """
    def __init__(self, module, *, lr: float, eps: float, clip: float, decay: float):
        self.weights, self.clip = list(module.parameters()), clip
        # fused is one GPU kernel, and autograd does not notice that it changes weights:
        # a loss that is differentiated after its weights moved gets wrong gradients.
        self.adam = torch.optim.AdamW(
            self.weights, lr, eps=eps, weight_decay=decay / max(lr, 1e-12), fused=True)

    def minimize(self, loss: Tensor) -> Tensor:
        """Minimise `loss` by one step; returns the gradient's norm before clipping."""
        self.adam.zero_grad()
        # A loss's graph reaches other networks, too. inputs= limits the gradients to
        # this optimiser's weights, so each of the three learners moves only its own.
        moving = [w for w in self.weights if w.requires_grad]
        if moving:  # not all are frozen
            loss.backward(inputs=moving)
        norm = nn.utils.clip_grad_norm_(self.weights, self.clip)
        self.adam.step()
        return norm


class Agent(nn.Module):
    """World model, actor, critic, slow critic, and their three optimisers."""
    def __init__(self, config: Config, num_actions: int, channels: int = 1,
                 device: torch.device | str = "cpu", continuous: bool = False):
        super().__init__()
        self.config = c = config
        self.num_actions, self.updates = num_actions, 0
        self.device, self.precision = torch.device(device), c.precision
        torch.backends.cudnn.allow_tf32 = False  # float32 is float32
        if c.precision == "auto":
            fast = self.device.type == "cuda" and torch.cuda.is_bf16_supported(False)
            self.precision = "bf16" if fast else "fp32"
        self.world_model = WorldModel(c, num_actions, channels)
        size, widths = self.world_model.rssm.feature_size, (c.mlp_layers, c.mlp_units)
        self.distribution = TruncatedNormal if continuous else OneHot
        self.actor = mlp(size, num_actions * (2 if continuous else 1), *widths)
        self.critic = mlp(size, 255 if c.symexp_twohot else 1, *widths)
        self.apply(glorot_init)
        if c.symexp_twohot:  # DreamerV3: both predict 0 at first
            nn.init.zeros_(self.critic[-1].weight)
            nn.init.zeros_(self.world_model.reward_head[-1].weight)
        self.slow_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.register_buffer("spread", torch.zeros(()))  # see advantage_scale

        self.to(self.device)
        if self.device.type != "mps":  # it misreads channels last: pytorch issue 192212
            self.to(memory_format=torch.channels_last)  # faster convolutions
        shared = dict(eps=c.adam_eps, clip=c.grad_clip, decay=c.weight_decay)
        self.optimizers = dict(
            model=Optimizer(self.world_model, lr=c.model_lr, **shared),
            actor=Optimizer(self.actor, lr=c.actor_lr, **shared),
            critic=Optimizer(self.critic, lr=c.critic_lr, **shared))

    def autocast(self):
        """In bf16, layers multiply in bfloat16, but for observe's steps; all else is
        float32. Until its `with` ends, autocast keeps a bfloat16 copy of each weight.
        An optimiser's step makes it stale, and one made under no_grad never passes a
        gradient to its weight. Hence the several `with` blocks of train_step."""
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def policy(self, feature: Tensor):
        """p(a_t | z_t) of states (..., F), with rsample, mode, log_prob, entropy."""
        out = self.actor(feature).float()
        if self.distribution is OneHot:
            out = mix_uniform(out, self.config.unimix)
        return self.distribution(out)

    @torch.no_grad()
    def act(self, image, is_first, memory=None, greedy: bool = False):
        """One decision for N environments: image (N, C, 64, 64) uint8 and is_first (N,)
        bool, arrays or tensors, and the memory of the call before (None at first) ->
        action (N, A), memory, which is the State and that action. greedy takes the
        policy's mode, for evaluation; z is sampled all the same."""
        model = self.world_model
        image = torch.as_tensor(image, device=self.device)
        is_first = torch.as_tensor(is_first, device=self.device)
        state, action = memory or (
            model.rssm.initial(len(image)),
            torch.zeros(len(image), self.num_actions, device=self.device))
        with self.autocast():
            embed = model.encoder(preprocess(image))
            state = model.rssm.obs_step(state, action, embed, is_first)
            policy = self.policy(state.feature)
        action = policy.mode if greedy else policy.rsample()
        return action, (state, action)

    def schedule(self, step: int) -> tuple[float, float]:
        """ρ and η after so many decisions: each moves in a straight line to its end."""
        c = self.config
        done = min(1.0, step / c.anneal_steps) if c.anneal_steps else 0.0
        rho = c.reinforce_mix + done * (c.reinforce_mix_end - c.reinforce_mix)
        eta = c.entropy_scale + done * (c.entropy_scale_end - c.entropy_scale)
        # Paper: continuous actions, and all in the ablation, learn by dynamics alone.
        by_reinforce = c.policy_reinforce and self.distribution is OneHot
        return rho if by_reinforce else 0.0, eta

    def advantage_scale(self, returns: Tensor) -> Tensor | float:
        """The divisor of advantages: 1, or in DreamerV3 max(return_scale, spread). The
        spread is a running mean of the returns' range, 5th to 95th percentile. So one
        η fits large returns, too; small ones, maybe noise, are not scaled up."""
        if not self.config.return_scale:
            return 1.0
        returns = returns.detach()
        self.spread.lerp_(returns.quantile(0.95) - returns.quantile(0.05), 0.01)
        return self.spread.clamp(min=self.config.return_scale)

    def train_step(self, batch: dict[str, Tensor], step: int = 0) -> dict[str, Tensor]:
        """One gradient step, the whole algorithm: the rows of Replay.sample (T, B, ...)
        -> metrics, scalars on the device. `step`, decisions so far, anneals ρ and η."""
        c, model, (rho, eta) = self.config, self.world_model, self.schedule(step)

        # 1. World model: learn to predict what happened. [Eq. 2]
        with self.autocast():
            loss, posterior, metrics = model.loss(**batch)
        metrics["model_grad_norm"] = self.optimizers["model"].minimize(loss)

        # 2. Imagine H steps from every posterior state, with the model just updated.
        #    The detach cuts the imagined graph, built only if ρ < 1, at real states.
        start = State(*(x.detach().flatten(0, 1) for x in posterior))  # (T, B) -> (N,)
        with self.autocast(), torch.set_grad_enabled(rho < 1):
            features, actions = imagine(  # (H+1, N, F), (H+1, N, A)
                model.rssm.img_step, self.policy, start, c.horizon)
            reward = head_mean(model.reward_head(features[:-1]))
            # Start states are real, so it is known which of them ended a game [D13].
            # Without this a wrong head would let rewards after the end count.
            discount = torch.cat([
                c.gamma * (1 - batch["is_terminal"].reshape(1, -1).float()),
                head_mean(model.discount_head(features[1:-1])).sigmoid()])
            if not c.discount_head:  # every discount is γ, even after an end
                discount = torch.full_like(discount, c.gamma)
            slow_value = head_mean(self.slow_critic(features))
            returns = lambda_return(reward, slow_value, discount, c.return_lambda)
            weights = trajectory_weights(discount)

        # 3. Critic: predict the returns. [Eq. 5]  State H only bootstraps.
        shift = int(c.shifted_advantage)  # [D5]
        states, end = features[:-1].detach(), c.horizon - shift
        with self.autocast():  # the policy runs again, for the gradient of ln p
            out, policy = self.critic(states), self.policy(states[:end])
        value, bin_logits = head_mean(out), out if c.symexp_twohot else None
        loss_of_critic, of_critic = critic_loss(value, returns, weights, bin_logits)

        # 4. Actor: make good returns likelier. [Eq. 6]  actions[t+1] was chosen in
        #    state t. It is detached, so that ln p moves the policy and not the action
        #    (which for ρ < 1 has a gradient). Shifted, a_t gets V[t+1], not V[t] [D5].
        baseline = slow_value[:-1] if c.slow_baseline else value
        loss_of_actor, of_actor = actor_loss(
            policy.log_prob(actions[1:end + 1].detach()), policy.entropy(),
            returns[shift:], baseline[:end], weights[:end], entropy_scale=eta,
            reinforce_mix=rho, advantage_scale=self.advantage_scale(returns))
        metrics |= of_critic | of_actor
        metrics["actor_grad_norm"] = self.optimizers["actor"].minimize(loss_of_actor)
        metrics["critic_grad_norm"] = self.optimizers["critic"].minimize(loss_of_critic)

        # 5. After the 1st, 101st, ... step the slow critic becomes a copy. If targets
        #    moved with every step, the critic's errors would feed themselves.
        if self.updates % c.slow_every_updates == 0:
            self.slow_critic.load_state_dict(self.critic.state_dict())
        self.updates += 1
        return metrics


# %% Part 9 | Replay
# The last 2M rows that were played, on disk. The learner reads 2500 rows for every four
# that are played, so over a run each row is used some 600 times.
# In: one row at a time. Out: batches of sequences (T, B, ...).
# Predict: seven rows are stored, the ring holds four: which sequences of 3 are there?


class UsageError(Exception):
    """Something that the user can mend: the program ends with this one line."""


class Row(NamedTuple):
    """One moment: the action LED to the image, and the reward came with it; on an
    episode's first row both are zero. is_terminal says that the game ended. It is False
    where a time limit cut the episode: there γ is kept."""
    image: np.ndarray  # (C, 64, 64) uint8
    action: np.ndarray  # (A,) float32, one-hot or in [-1, 1]
    reward: np.float32  # raw
    is_first: np.bool_
    is_terminal: np.bool_


class Replay:
    """A ring of rows, in a memory-mapped .npy file. `row` is any row of the game and
    gives the layout. UsageError: the file is damaged or of another layout. With count 0
    a new one replaces it. Workers of a DataLoader need seeds of their own, or all draw
    the same batches.
    >>> import tempfile
    >>> folder, zero = tempfile.TemporaryDirectory(), np.zeros(1)
    >>> row = Row(zero, zero, np.float32(0), np.False_, np.False_)
    >>> replay = Replay(Path(folder.name, "replay.npy"), capacity=4, row=row)
    >>> for t in range(1, 8): replay.add(row._replace(reward=t))
    >>> rewards = replay.sample(batch_size=100, seq_len=3)["reward"]         # (T, B)
    >>> sorted(set(map(tuple, rewards.T.tolist())))   # of rows 1 to 7 four are left
    [(4.0, 5.0, 6.0), (5.0, 6.0, 7.0)]

    A checkpoint keeps the `count` of rows. A process that is killed later has written
    newer rows over the oldest, perhaps half of the last. So a row stores its number,
    and 0 while it is written. Here the checkpoint counts 7; then 8, 9, half of 10 came:
        slot     0    1    2    3
        number   9    0    7    8
    The next start uses every whole row: 8 and 9, which continue 7, and of rows 1 to 7
    those whose slot still holds their number, here 7.
    """
    def __init__(self, path: Path, capacity: int, row: Row, count: int = 0, seed=0):
        dtype = np.dtype([("number", np.int64)] + [
            (name, x.dtype, x.shape) for name, x in zip(Row._fields, row)])
        self.count, self.capacity = count, capacity
        self.random = np.random.default_rng(seed)
        if not count:
            np.lib.format.open_memmap(path, "w+", dtype, (capacity,))
            if hasattr(os, "posix_fallocate"):  # or a full disk kills by SIGBUS later
                with open(path, "r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        try:
            np.load(path, "r")  # refuses a file that was cut; "r+" would fill it up
            self.rows = np.asarray(np.load(path, "r+"))  # without memmap's overhead
            if (self.rows.dtype, len(self.rows)) != (dtype, capacity):
                raise ValueError("it holds other rows")
        except (FileNotFoundError, EOFError, ValueError) as error:
            raise UsageError(f"{path}: {error}; choose another --logdir") from None
        # After a whole round the torn row may cover count + 1: then count + 2 tells.
        while max(self.found(self.count + 1), self.found(self.count + 2)) > self.count:
            self.count += 1
        if self.count and self.found(self.count) != self.count:
            raise UsageError(f"{path} is older than the checkpoint: try another logdir")
        self.oldest = max(1, self.count - capacity + 1)
        while self.oldest <= self.count and self.found(self.oldest) != self.oldest:
            self.oldest += 1

    def found(self, number: int) -> int:
        """The number that is in this row's slot; 0 if that row is torn."""
        return int(self.rows["number"][(number - 1) % self.capacity])

    def add(self, row: Row) -> None:
        """Store one row, over the oldest if the ring is full."""
        slot = self.count % self.capacity
        self.rows["number"][slot] = 0  # until it is whole, it is no row
        self.rows[slot] = (0, *row)
        self.count += 1
        self.rows["number"][slot] = self.count
        self.oldest = max(self.oldest, self.count - self.capacity + 1)

    def sample(self, batch_size, seq_len, device="cpu") -> dict[str, Tensor]:
        """Uniformly drawn sequences: a dict of Row's fields, time-major (T, B, ...).
        Starts are drawn as row numbers, and only then turned into slots. So a sequence
        may go on from the ring's last slot to its first, and into the next episode
        [D8], but never from the newest row to the oldest."""
        assert self.count - self.oldest + 1 >= seq_len, "fewer rows than seq_len"
        start = self.random.integers(self.oldest, self.count - seq_len + 2, batch_size)
        slots = (start - 1 + np.arange(seq_len)[:, None]) % self.capacity  # (T, B)
        batch = {name: torch.from_numpy(self.rows[name][slots]).to(device)
                 for name in Row._fields}
        # The state before a sequence is unknown, so it begins like an episode. Without
        # this line its first action would act on a state it was not chosen in.
        batch["is_first"][0] = True
        return batch


# %% Part 10 | Environments
# All that can be played, as rows: ale-py's C++ emulators, any Gymnasium game with
# images, and Catch, an example to copy. In: an action (A,). Out: a row.
# Predict: with which step of Catch does the ball land?


class Catch(gymnasium.Env):
    """A ball falls through an 8×8 board, a paddle catches it: learned in minutes.
    It is an example to copy: `--game your_module:YourGame-v0` plays a gymnasium.Env
    with images that your module registers under that id. Actions: left, stay, right.
    Reward when the ball lands: +1 if it is caught, -1 if not.
    >>> env = Catch()
    >>> _ = env.reset(seed=0)
    >>> [env.step(1)[2] for _ in range(7)]    # it lands with the 7th step
    [False, False, False, False, False, False, True]
    """
    observation_space = Box(0, 255, (64, 64, 1), np.uint8)
    action_space = Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.ball, self.row, self.paddle = int(self.np_random.integers(8)), 0, 4
        return self.board(), {}

    def step(self, action):
        self.paddle = min(max(self.paddle + int(action) - 1, 0), 7)
        self.row += 1
        landed = self.row == 7
        reward = (1.0 if self.ball == self.paddle else -1.0) if landed else 0.0
        return self.board(), reward, landed, False, {}

    def board(self):
        cells = np.zeros((8, 8, 1), np.uint8)
        cells[self.row, self.ball] = cells[7, self.paddle] = 255
        return cells.repeat(8, axis=0).repeat(8, axis=1)


def to_image(image: np.ndarray) -> np.ndarray:
    """(H, W) or (H, W, C) uint8 -> (C, 64, 64) uint8. Sides of less than 64 pixels grow
    by repeating whole pixels, which keeps them sharp; longer ones are averaged."""
    assert image.dtype == np.uint8, f"the game promised uint8 and sent {image.dtype}"
    pixels = torch.from_numpy(np.atleast_3d(image).transpose(2, 0, 1).copy())[None]
    larger = [max(64, size) for size in image.shape[:2]]
    pixels = F.interpolate(pixels.float(), larger, mode="nearest-exact")
    return F.interpolate(pixels, (64, 64), mode="area")[0].round().byte().numpy()


def plain_game(env: gymnasium.Env) -> gymnasium.Env:
    """The game with images (C, 64, 64), and with actions that count from 0 or lie in
    [-1, 1]; UsageError names what does not fit, such as a Dict."""
    images, actions = env.observation_space, env.action_space
    shape = images.shape if isinstance(images, Box) else ()
    channels = shape[2] if len(shape) == 3 else 1
    if images.dtype != np.uint8 or len(shape) not in (2, 3) or channels > 4:
        raise UsageError(f"a wrapper must make uint8 images (H, W[, 1-4]) of {images}")
    if isinstance(actions, Discrete):
        space, adapt = Discrete(int(actions.n)), lambda action: action + actions.start
    elif isinstance(actions, Box) and actions.is_bounded() and (
            len(actions.shape) == 1 and actions.dtype.kind == "f"):
        space, (low, high) = Box(-1, 1, actions.shape), (actions.low, actions.high)
        # Clipped, because rounding may leave the box by the last digit.
        adapt = lambda action: (low + (action + 1) / 2 * (high - low)).clip(low, high)
    else:
        need = "Discrete, or a bounded Box (A,) of floats,"
        raise UsageError(f"a wrapper must make {need} of its actions, {actions}")
    env = wrappers.TransformAction(env, lambda a: adapt(a).astype(actions.dtype), space)
    env = wrappers.TransformReward(env, lambda r: np.asarray(r).item())  # or an array
    space = Box(0, 255, (channels, 64, 64), np.uint8)
    return wrappers.TransformObservation(env, to_image, space)


class Envs:
    """A game as rows, from a gymnasium vector environment of one copy, which resets in
    the step AFTER an episode's end (NEXT_STEP, the default). That step ignores the
    action and returns the next episode's first image: a row with is_first, which is no
    decision. `ended` lists [raw score, decisions] of an episode that this row ended."""
    def __init__(self, vector_env, action_repeat: int):
        self.vector_env, self.frames_per_step = vector_env, action_repeat
        self.close = vector_env.close  # for contextlib.closing
        actions = vector_env.single_action_space
        self.continuous = isinstance(actions, Box)
        self.num_actions = int(actions.shape[0] if self.continuous else actions.n)
        self.channels = vector_env.single_observation_space.shape[0]

    def reset(self, seed: int) -> Row:
        """The first row of a new episode."""
        images, _ = self.vector_env.reset(seed=seed)
        self.vector_env.action_space.seed(seed)
        self.done, self.total, self.ended = np.False_, np.zeros(2), []
        action = np.zeros(self.num_actions, np.float32)
        return Row(images[0], action, np.float32(0), np.True_, np.False_)

    def random_action(self) -> np.ndarray:
        """A uniform action (A,)."""
        action = self.vector_env.action_space.sample()[0]
        return action if self.continuous else np.eye(self.num_actions)[action]

    def step(self, action: np.ndarray | Tensor) -> Row:
        """Play an action (A,) or, as it comes from act, (1, A); one-hot or in [-1, 1].
        Returns the row that it led to."""
        action = torch.as_tensor(action).float().cpu().numpy().ravel()  # waits for GPUs
        # ale-py hangs for ever on an action out of range; argmax of A is within.
        assert action.shape == (self.num_actions,), "not (A,) or (1, A)"
        chosen = action if self.continuous else action.argmax()
        images, reward, terminated, truncated, _ = self.vector_env.step(chosen[None])
        is_first, self.done = self.done, (terminated | truncated)[0]
        # Without `played`, a first row would claim that the ignored action led to it.
        played = np.float32(not is_first)
        action, reward = action * played, np.float32(reward[0]) * played
        assert np.isfinite(reward), "the game sent a reward that is not finite"
        self.total += (reward, played)  # score and decisions of the episode so far
        self.ended = [self.total.tolist()] if self.done else []
        self.total *= not self.done
        return Row(images[0], action, reward, is_first, terminated[0])


def make_envs(config: Config) -> Envs:
    """The game config.game: a registered id (the user's own, or module:id) or an Atari
    game; UsageError says what is wrong with the name. Actions are repeated on Atari and
    where they are continuous, as in the paper."""
    c, own_games = config, dict(gymnasium.registry)
    try:
        if c.game == "Catch" or c.game in own_games or re.search("[:/]|-v", c.game):
            env = plain_game(Catch() if c.game == "Catch" else gymnasium.make(c.game))
            repeat = c.action_repeat if isinstance(env.action_space, Box) else 1
            env = wrappers.TimeLimit(wrappers.RepeatAction(env, repeat), c.time_limit)
            return Envs(gymnasium.vector.SyncVectorEnv([lambda: env]), repeat)
        import ale_py  # noqa: F401  registers its games, some over the user's
        gymnasium.registry.update(own_games)  # puts the user's back
        # Gray, resized by area, the maximum of the last two frames, because consoles
        # drew some sprites in every other one. No frame stack: the RSSM remembers.
        env = gymnasium.make_vec(
            f"ALE/{c.game}-v5", 1, vectorization_mode="vector_entry_point",
            img_height=64, img_width=64, stack_num=1, frameskip=c.action_repeat,
            noop_max=c.max_noops + 1,  # it draws 0 to noop_max - 1
            repeat_action_probability=c.sticky, full_action_space=c.full_action_space,
            max_num_frames_per_episode=c.time_limit * c.action_repeat,
            reward_clipping=False, use_fire_reset=False)
        return Envs(env, c.action_repeat)
    except (UsageError, gymnasium.error.Error, ModuleNotFoundError) as error:
        raise UsageError(f"--game {c.game}: {error} (or Catch, module:id)") from error


# %% Part 11 | Playing and looking
# What a trained agent does, as scores and as pictures. One generator plays; evaluation
# and films take from it. In: an agent, a game. Out: scores, frames, PNGs.
# Predict: how wide is a picture of frames that are 300 pixels wide?


def play(agent: Agent, envs: Envs, seed: int, greedy: bool):
    """Plays without end and yields each row."""
    row, memory = envs.reset(seed), None
    while True:
        yield row
        action, memory = agent.act(row.image[None], row.is_first[None], memory, greedy)
        row = envs.step(action)


def evaluate(agent: Agent, envs: Envs, episodes: int, seed: int) -> np.ndarray:
    """Raw score and decisions (episodes, 2) of whole episodes, by the actor's mode."""
    playing, ended = play(agent, envs, seed, greedy=True), []
    while len(ended) < episodes:
        next(playing)
        ended += envs.ended
    return np.array(ended)


@torch.no_grad()
def draw_film(agent: Agent, envs: Envs, seed, seen=5, length=50, count=4, greedy=False):
    """`count` sequences of `length` rows as frames (length, H, W, 1 or 3), played after
    the first 200 rows. Each is a strip of three pictures: what happened; what the model
    says, which is given the first `seen` images (while a white line shows), then only
    actions; half the difference, gray where it is 0. Of stacked images: the newest."""
    model, played = agent.world_model, play(agent, envs, seed, greedy)
    rows = itertools.islice(played, 200, 200 + count * length)
    batch = (torch.from_numpy(np.stack(x)).to(agent.device) for x in zip(*rows))
    row = Row(*(x.unflatten(0, (count, length)).transpose(0, 1) for x in batch))
    row.is_first[0] = True
    truth = preprocess(row.image)  # (T, B, C, 64, 64)
    features = open_loop(
        model.rssm, model.encoder(truth[:seen]), row.action, row.is_first)
    guess = model.decoder(features).clamp(-0.5, 0.5)
    tiles = [F.pad(x, (0, 1, 0, 1)) for x in (truth, guess, (guess - truth) / 2)]
    film = torch.cat(torch.cat(tiles, dim=-1).unbind(1), dim=-2)
    film[:seen, :, :2] = 0.5
    film = film if film.shape[1] == 3 else film[:, -1:]
    return (255 * (film.movedim(1, -1) + 0.5)).round().byte().cpu().numpy()


def to_png(frames: np.ndarray, milliseconds: int = 100) -> bytes:
    """Frames (T, H, W, 1 or 3) uint8 -> an animated PNG (w3.org/TR/png-3). Pixels are
    enlarged to whole squares, as far as the width stays within 800.
    >>> struct.unpack(">II", to_png(np.zeros((2, 40, 300, 1), np.uint8))[16:24])
    (600, 80)
    """

    def chunk(name: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", crc)

    scale = max(1, 800 // frames.shape[2])
    frames = frames.repeat(scale, 1).repeat(scale, 2)
    count, height, width, channels = frames.shape
    sizes = (width, height, 8, channels - 1, 0, 0, 0)  # 8 bits of gray (0) or RGB (2)
    chunks = [b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", struct.pack(">IIBBBBB", *sizes)),
              chunk(b"acTL", struct.pack(">II", count, 0))]
    for i, frame in enumerate(frames):
        lines = np.insert(frame.reshape(height, -1), 0, 0, axis=1)  # 0: no filter
        data = zlib.compress(lines.tobytes())
        timing = (max(0, 2 * i - 1), width, height, 0, 0, milliseconds, 1000, 0, 0)
        chunks.append(chunk(b"fcTL", struct.pack(">IIIIIHHBB", *timing)))
        number = struct.pack(">I", 2 * i) if i else b""  # fcTL, fdAT share one count
        chunks.append(chunk(b"fdAT" if i else b"IDAT", number + data))
    return b"".join(chunks) + chunk(b"IEND", b"")


# %% Part 12 | Training
# `train` is the whole run. In its folder lie, also after a kill, config.json, the
# settings; checkpoint.pt, made every minute; replay.npy, whose rows after the
# checkpoint are known by their numbers; metrics.jsonl, from which the next start cuts
# later lines; dream.png, lock. In: a Config. Out: that folder, and an exit status.
# Predict: a second process is started in the same folder: what happens?


def write_file(path: Path, data: bytes) -> None:
    """The new file is whole and on the disk before it takes the old one's name."""
    new = path.with_name(f"{path.name}.new")
    with open(new, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def save_checkpoint(path: Path, agent: Agent, **counters) -> None:
    """config.json: settings but NOT_STORED, one a line. checkpoint.pt: weights, Adam's
    state and counters. The next start seeds random numbers anew."""
    stored = {k: v for k, v in vars(agent.config).items() if k not in NOT_STORED}
    text = json.dumps(stored, indent=1, default=lambda x: x.item())  # numpy's
    write_file(path.with_name("config.json"), text.encode())
    adam = {k: o.adam.state_dict()["state"] for k, o in agent.optimizers.items()}
    data = io.BytesIO()  # torch.save itself hides a full disk in a RuntimeError
    torch.save(dict(agent=agent.state_dict(), adam=adam, counters=counters), data)
    write_file(path, data.getbuffer())


def load_agent(config: Config, envs: Envs) -> tuple[Agent, dict]:
    """An agent for these environments, with a config of choose_settings, and counters:
    those of a checkpoint (UsageError if it is damaged), or new ones. Prints choices."""
    c, path = config, Path(config.logdir, "checkpoint.pt")
    torch.manual_seed(c.seed)
    agent = Agent(c, envs.num_actions, envs.channels, c.device, envs.continuous)
    print(f"{c.game}: {envs.num_actions} actions of {envs.frames_per_step} frames;"
          f" {agent.precision} on {c.device}, rho {agent.schedule(0)[0]:g}")
    n = dict(step=0, frames=0, updates=0, wall_time_s=0.0, rows=0, log_bytes=0)
    log = path.with_name("metrics.jsonl")
    if path.exists():
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            agent.load_state_dict(saved["agent"])
        except Exception as error:  # of many kinds: torch reads zip files and pickles
            raise UsageError(f"{path} is damaged or of another game: {error!r:.50}")
        for name, state in saved["adam"].items():
            adam = agent.optimizers[name].adam  # of config.json's learning rate
            adam.load_state_dict(adam.state_dict() | dict(state=state))
        n, agent.updates = saved["counters"], saved["counters"]["updates"]
        torch.manual_seed(c.seed + n["rows"])
    elif log.exists() and log.stat().st_size:
        raise UsageError(f"{path} is missing: choose another --logdir")
    return agent, n


def lock(folder: Path) -> sqlite3.Connection:
    """One process a folder. SQLite's file locks vanish with their process on every
    system, however it dies, so an open transaction is the lock.
    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> held = lock(Path(folder.name))
    >>> try: lock(Path(folder.name))
    ... except UsageError: print("the second is told to go elsewhere")
    the second is told to go elsewhere
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(folder / "lock", timeout=0)
        connection.execute("BEGIN EXCLUSIVE")
        if not os.access(folder, os.W_OK):  # which SQLite alone would not mind
            raise OSError("it cannot be written")
        return connection
    except (OSError, sqlite3.Error) as error:
        raise UsageError(f"{folder} is in use, read-only or knows no locks: {error}")


def train(config: Config, signals=()) -> int:
    """Begin the run of config.logdir, or go on with it, until its steps are made or
    a handler has put a signal into the list `signals`; returns the exit status."""
    c, folder = config, Path(config.logdir)
    log, path = folder / "metrics.jsonl", folder / "checkpoint.pt"
    print("opening one game to learn, one to evaluate (none with --eval-episodes 0)")
    with (closing(make_envs(c)) as envs,
          closing(make_envs(c)) if c.eval_episodes else nullcontext() as judge,
          closing(lock(folder))):
        agent, n = load_agent(c, envs)
        seed = (c.seed + n["rows"]) % 2**30  # after a kill, other episodes are played
        row, memory = envs.reset(seed), None
        replay = Replay(folder / "replay.npy", c.replay_capacity, row, n["rows"], seed)
        replay.add(row)
        with open(log, "a") as file:
            file.truncate(min(file.tell(), n["log_bytes"]))
        began, saved_at = time.monotonic() - n["wall_time_s"], -math.inf
        last, period, ended, ending = n, [], [], n["step"] >= c.steps or bool(signals)
        bar = tqdm(total=c.steps, initial=n["step"], unit="step", disable=None,
                   file=sys.stderr or io.StringIO(), ncols=79, nrows=20)  # not 0x0
        say = print if bar.disable else bar.write
        while not ending:
            # Act: at random in the prefill, then as the actor says.
            before = n["step"]
            if before < c.prefill_steps:
                action = envs.random_action()
            else:
                action, memory = agent.act(row.image[None], row.is_first[None], memory)

            # Step and store. The row of a reset is no decision.
            row = envs.step(action)
            replay.add(row)
            ended += envs.ended
            step = before + int(not row.is_first)
            done = step >= c.steps
            bar.update(step - before)

            # Learn as often as the decisions so far ask for.
            owed = (step - c.prefill_steps) // c.steps_per_update
            for _ in range(owed - agent.updates):
                batch = replay.sample(c.batch_size, c.seq_len, agent.device)
                metrics = agent.train_step(batch, step)
                period.append(torch.stack(list(metrics.values())))

            # Look: evaluate, and draw a dream.
            scores, every = {}, c.eval_every_steps
            if judge and agent.updates and (done or step // every > before // every):
                mean = evaluate(agent, judge, c.eval_episodes, step).mean(0).tolist()
                scores = dict(zip(("eval_return", "eval_length"), mean))
                write_file(folder / "dream.png", to_png(draw_film(agent, judge, step)))

            # Log: totals, and means since the line before. Numbers are read only for a
            # line or a checkpoint, because the CPU then has to wait for a GPU.
            n = dict(step=step, frames=step * envs.frames_per_step, rows=replay.count,
                     updates=agent.updates, wall_time_s=time.monotonic() - began)
            ending, every, means = done or bool(signals), c.log_every_steps, {}
            write = ending or scores or step // every > before // every
            save = ending or time.monotonic() >= saved_at + 60 * c.checkpoint_minutes
            if period and (write or save):
                means = dict(zip(metrics, torch.stack(period).mean(0).tolist()))
                if not all(map(math.isfinite, means.values())):
                    raise UsageError(f"not finite: {means}; {path} is still finite")
            if scores or (period and write):
                score, length = np.mean(ended, 0).tolist() if ended else (None, None)
                new, seconds = (n[k] - last[k] for k in ("updates", "wall_time_s"))
                means |= dict(episode_return=score, episode_length=length) | scores
                line = n | dict(updates_per_s=new / max(seconds, 1e-9)) | means
                with open(log, "a") as file:
                    file.write(json.dumps(line) + "\n")
                say(f"{step:,}/{c.steps:,} decisions, score {score}")
                last, period, ended = n, [], []

            # Save.
            if save:
                replay.rows.base.flush()  # or a power cut takes newer rows than these
                save_checkpoint(path, agent, **n, log_bytes=log.stat().st_size)
                saved_at = time.monotonic()
        say(f"{n['step']:,} decisions, {agent.updates:,} gradient steps: {folder}")
    return 0 if n["step"] >= c.steps else 128 + signals[0]


# %% Part 13 | Command line
# A new run takes its settings from its preset and from what the user types; a resumed
# run from its config.json; from that, only MAY_CHANGE and NOT_STORED may differ.
# In: flags. Out: an exit status.
# Predict: --gamma 0.9 --no-layer-norm: what does the program take from that?

MAY_CHANGE = "steps log_every_steps eval_every_steps eval_episodes checkpoint_minutes"
MAY_BE_0 = ("seed", "max_noops", "anneal_steps", "eval_episodes")
NOT_STORED = ("logdir", "device", "precision")  # so that a run can move elsewhere


def read_flags(argv: list[str] | None) -> dict:
    """What was typed. There is one flag for each field of Config; its help is the
    comment beside it, as far as Python can see the source (in a notebook it cannot).
    >>> read_flags("--gamma 0.9 --no-layer-norm".split())
    {'gamma': 0.9, 'layer_norm': False}
    """
    parser = argparse.ArgumentParser(
        "dreamerv2.py", usage=argparse.SUPPRESS, allow_abbrev=False,
        argument_default=argparse.SUPPRESS, description="Defaults are preset atari's.")
    show = parser.add_mutually_exclusive_group()
    show.add_argument("--eval", action="store_true", help="watch it play")
    show.add_argument("--dream", action="store_true", help="draw what it predicts")
    source = inspect.getsource(Config) if "__file__" in globals() else ""
    comments = dict(re.findall(r"\n    (\w+): .*?  # (.*)", source))
    choices = dict(preset=["auto", *PRESETS], precision=["auto", "fp32", "bf16"])
    for name, default in vars(Config()).items():
        help = f"{comments.get(name, '')} (default: {default})".replace("%", "%%")
        kind = dict(type=type(default), choices=choices.get(name))
        if isinstance(default, bool):
            kind = dict(action=argparse.BooleanOptionalAction)
        parser.add_argument("--" + name.replace("_", "-"), help=help, **kind)
    return vars(parser.parse_args(argv))


def choose_settings(typed: dict) -> Config:
    """The settings of a new or of a resumed run; says where they are from. No number is
    negative, counts are at least 1, and a sequence fits into the first random rows."""
    typed = {k: v for k, v in typed.items() if v != "auto" or k in ("game", "logdir")}
    typed.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.zeros((), device=typed["device"]).device.type
    except (RuntimeError, AssertionError) as error:  # this machine does not have it
        raise UsageError(f"--device: {str(error).splitlines()[0]}") from None
    preset = typed.get("preset", "atari" if device == "cuda" else "small")
    why = "as asked" if "preset" in typed else (
        f"for {device}; --preset atari is for CUDA, small for CPUs (Catch: minutes)")
    c = Config(**dict(preset=preset) | read_flags(PRESETS[preset].split()) | typed)
    c.game = re.sub(r"^ALE/(\w+)-v5$", r"\1", c.game)  # a second name of Atari games
    name = re.sub(r"[^\w.-]", "_", c.game)
    c.logdir = os.path.expanduser(c.logdir or f"runs/{name}-{preset}-seed{c.seed}")
    path = Path(c.logdir, "config.json")
    if os.path.exists(path) or os.path.exists(path.with_name("checkpoint.pt")):
        why, stored = f"the settings of {path}", {}
        try:
            for name, value in json.loads(path.read_text()).items():
                stored[name] = type(getattr(Config, name))(value)
                if stored[name] != value:
                    raise ValueError(f"{name} {value!r}")
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UsageError(f"{path} is damaged or old: {error}") from None
        for name in (typed.keys() & stored.keys()) - set(MAY_CHANGE.split()):
            if stored[name] != getattr(c, name):
                raise UsageError(f"{path} has another {name}; choose another --logdir")
        c = Config(**vars(c) | {k: stored[k] for k in stored.keys() - typed.keys()})
    print(f"preset {c.preset}: {why}")
    for name, value in vars(c).items():  # nan and inf fail, too
        least = 0 if isinstance(value, (float, np.floating)) or name in MAY_BE_0 else 1
        if not isinstance(value, (str, bool, np.bool_)) and not least <= value < 9e18:
            raise UsageError(f"{name} {value}: must be in [{least}, 9e18)")
    if c.seq_len > min(c.prefill_steps, c.replay_capacity):
        raise UsageError(f"seq_len {c.seq_len} > prefill_steps or replay_capacity")
    return c


def show(config: Config, what: str) -> int:
    """dream: what the model predicts. eval: scores of whole episodes, and 200 steps of
    play. Pictures come into the current folder; the run's folder is only read."""
    folder = Path(config.logdir)
    if not os.path.exists(folder / "checkpoint.pt"):
        raise UsageError(f"no checkpoint in {folder}: train first, or fix --logdir")
    with closing(make_envs(config)) as envs:
        agent, n = load_agent(config, envs)
        seed = n["step"] + 1  # not the episodes of the run's own evaluation
        if what == "eval":
            score, length = evaluate(agent, envs, max(1, config.eval_episodes), seed).T
            print(f"episodes: {len(score)}, mean score {score.mean():.2f}, standard"
                  f" deviation {score.std():.2f}, {length.mean():.0f} decisions each")
        whole = dict(seen=200, length=200, count=1, greedy=True)
        frames = draw_film(agent, envs, seed, **whole if what == "eval" else {})
    path = Path(f"{folder.resolve().name[-40:]}-{what}.png")
    write_file(path, to_png(frames))
    print(f"{path}: an animation of {len(frames)} frames")
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status. Ctrl-C or SIGTERM ends a run after
    the decision in hand; the same once more ends it at once."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # for consoles that know no Greek letters
            stream.reconfigure(errors="replace", line_buffering=True)
    sys.path.append(os.getcwd())  # where your_module:YourGame-v0 may lie
    signals = []

    def stop(number, frame):
        print("stopping after this decision (again: at once); the same command goes on")
        signals.append(int(number))
        signal.signal(number, signal.default_int_handler)

    typed = read_flags(argv)
    what = [name for name in ("eval", "dream") if typed.pop(name, False)]
    try:
        config = choose_settings(typed)
        if what:
            return show(config, *what)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)
        return train(config, signals)
    except (UsageError, OSError) as error:
        full = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)  # disk, file limit, quota
        if isinstance(error, OSError) and error.errno not in full:
            raise  # perhaps from the user's game: its traceback names the line
        print("dreamerv2.py:", *str(error).split(), file=sys.stderr)
        return 2


if __name__ == "__main__" and "__file__" in globals():  # a notebook's cell has no file
    sys.exit(main())
