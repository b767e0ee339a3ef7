# SPDX-License-Identifier: MIT
"""DreamerV2 in one file: learn a model of the game, then learn to play inside it.

"Mastering Atari with Discrete World Models" (Hafner, Lillicrap, Norouzi, Ba; ICLR 2021,
arXiv 2010.02193): a recurrent model with discrete latents learns from replayed frames
to predict images, rewards and ends; actor and critic learn from what it imagines.

    python dreamerv2.py --game Breakout         # no progress for 20M frames (Pong: 2M)
    python dreamerv2.py --game Catch --preset small     # minutes on a laptop CPU
    python dreamerv2.py --game Breakout --eval  # a run's command, and --eval: plays
    python -m doctest dreamerv2.py              # the examples below, executed

MAP. The algorithm is Parts 2 to 8; Agent.gradient_step is one step. Predict, then read.
    Part 1  | Configuration                 Part 7  | Returns and losses (Eq. 4-6)
    Part 2  | Gradient tricks (Alg. 1, 2)   Part 8  | Agent (Eq. 3)
    Part 3  | Networks                      Part 9  | Replay
    Part 4  | RSSM (Eq. 1)                  Part 10 | Environments
    Part 5  | World model (Eq. 2)           Part 11 | Looking
    Part 6  | Imagination                   Part 12 | Running

SHAPES. Time comes first, so x[t] is the paper's x with subscript t.
    T  steps of a replayed sequence  50      S  latent variables            32
    B  sequences in a batch          50      K  classes of each latent      32
    N  start states, T*B           2500      D  units of the GRU state h   600
    H  imagined steps                15      F  feature [z, h], S*K + D   1624
    A  actions                       18      E  embedded image            1536
    N  in act, Parts 9-12: envs       1      C  image channels (gray)        1

TIME. One row of experience is what the environment returns from one step. The action
stored at t is the one that LED to image t, and the reward at t ARRIVED with it:

    row            0            1            2            3 (new episode)
    action         0 (none)     a0           a1           0 (none)
    image          x0           x1           x2           x0'
    reward         0            r1           r2           0
    is_first       yes          no           no           yes
    is_terminal    no           no           yes          no

So h[t] = f(h[t-1], z[t-1], action[t]), where the paper writes the same action as
a_{t-1}. Imagination follows the same rule: actions[t+1] is chosen IN state t and leads
to state t+1, and the reward predicted at state t is the one received on arriving there.
One decision is 4 emulator frames: 50M decisions are the paper's 200M frames.

SYMBOLS.
    paper        here                       authors' code
    γ_t          discount[t]                discount; its target is γ·(1 - is_terminal)
    h_t          state.h                    deter
    z_t, ẑ_t     state.z                    stoch
    (h_t, z_t)   state.feature, as [z, h]   feat
    q(z|h,x)     posterior                  post
    p(ẑ|h)       prior                      prior
    α, β         kl_balance, kl_scale       kl.balance, loss_scales.kl
    v, slow v    critic, slow_critic        critic, target_critic
    V^λ_t        returns[t]                 target
    ρ            reinforce_mix              1 - actor_grad_mix (it counts the other way)
    η            entropy_scale              actor_ent
    sg(x)        x.detach()                 tf.stop_gradient

VOICES. "Paper:" what it says; "Authors' code:" what danijar/dreamerv2 does (07d906e,
version 2.2.0, unless another is named); "Here:" our own choice. The paper's table gives
the defaults; where it is silent, the authors' code does.

DEPARTURES from paper or code; the flag that switches each or the test that holds it.
    D1  One gradient step per 4 decisions. Code: 16.            --steps-per-update 16
    D2  γ = 0.995, as in the paper's table. Code: 0.999.        --gamma 0.999
    D3  50 sequences a batch. Code: 16 (50 before 2.2.0).       --batch-size 16
    D4  The baseline is v(z_t) (Eq. 6). Code: the slow v(z_t).  --slow-baseline
    D5  a_t's advantage is V_t - v(z_t). Code: V_{t+1} - v(z_t). --shifted-advantage
    D6  All 18 actions. Code: those that the game uses.         --no-full-action-space
    D7  Means where the paper writes sums, as in the code.      test_losses_are_means
    D8  A sequence starts at any row. Code: in one episode.     test_replay_is_uniform
    D9  torch's Adam epsilon. Code: TensorFlow's, larger early. test_parity_agent
    D10 0 to 29 no-ops at a reset (ale-py). Code: 1 to 30.      --noops 31: 0 to 30
    D11 bfloat16 on CUDA, else float32. Code: float16.          --precision fp32
    D12 The slow critic is born as a copy. Code: at random.     test_slow_critic
    D13 The start's discount is true, as in 2.2.0. Older: guessed. test_true_start
"""
from __future__ import annotations
import argparse
import copy
import dataclasses
import difflib
import inspect
import io
import json
import math
import os
import re
import signal
import sqlite3
import sys
import time
import zipfile
from pathlib import Path
from typing import NamedTuple

import gymnasium
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
__version__ = "0.1.0"

# %% Part 1 | Configuration
# Every number of the algorithm. Only Agent.__init__ and Part 12 read it: everything
# between takes plain numbers. In: nothing. Out: one Config.
# Predict: how many gradient steps does the paper's run of 50M decisions make?

@dataclasses.dataclass
class Config:
    """The settings of a run. Each field is a flag, its comment is the flag's help.
    >>> (Config.steps - Config.prefill_steps) // Config.steps_per_update
    12487500
    """
    # Run
    game: str = "Breakout"  # Atari game, Catch, or any Gymnasium id with images
    preset: str = "atari"  # atari (paper) released schedules continuous small debug
    steps: int = 50_000_000  # decisions to play in all; paper: 50M = 200M frames
    logdir: str = ""  # folder of the run; empty: runs/GAME-PRESET-seedSEED
    seed: int = 0  # of weights, sampling and environments
    device: str = "auto"  # auto (CUDA, else CPU) | cuda | cuda:1 | mps | cpu
    precision: str = "auto"  # auto (bf16 if CUDA has it) | fp32 | tf32 | bf16 [D11]
    cuda_graphs: bool = True  # on CUDA, replay recorded steps; no: launch every kernel
    compile: bool = False  # torch.compile of the world model's loss; slow to build
    # Environment
    num_envs: int = 1  # environments played side by side; paper: 1
    action_repeat: int = 4  # frames per decision (Atari, Box actions); paper: 4
    sticky: float = 0.25  # chance a frame keeps the last action (Atari); paper: 0.25
    noops: int = 30  # no-op frames at reset are drawn below this (Atari) [D10]
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
    hidden_size: int = 600  # units of the RSSM's one-layer heads; paper: 600
    cnn_depth: int = 48  # channels of the first convolution, then doubled; paper: 48
    mlp_layers: int = 4  # hidden layers of every head, actor and critic; paper: 4
    mlp_units: int = 400  # units of each of those layers; paper: 400
    kl_scale: float = 0.1  # weight of the KL term, β; paper: 0.1 (of 0.1 0.3 1 3)
    kl_balance: float = 0.8  # share of the KL that trains the prior, α; paper: 0.8
    free_nats: float = 0.0  # the average KL below this is not trained; authors' code: 0
    discount_scale: float = 5.0  # weight of the discount loss; authors' code: 5
    discount_head: bool = True  # predict episode ends; no: every discount is γ
    reward_tanh: bool = True  # learn tanh(r) instead of r; paper: yes for Atari
    model_lr: float = 2e-4  # learning rate of the world model; paper: 2e-4
    # Behaviour
    horizon: int = 15  # imagined steps, H; paper: 15
    gamma: float = 0.995  # discount γ; paper's table: 0.995 [D2]
    return_lambda: float = 0.95  # λ of the return; paper: 0.95
    reinforce_mix: float = 1.0  # ρ: 1 is all Reinforce, 0 (always for Box) dynamics
    entropy_scale: float = 1e-3  # weight of the policy's entropy, η; paper: 1e-3
    anneal_steps: int = 0  # decisions in which ρ and η move to their ends; 0: never
    reinforce_mix_end: float = 1.0  # ρ after anneal_steps
    entropy_scale_end: float = 3e-4  # η after anneal_steps
    actor_lr: float = 4e-5  # learning rate of the actor; paper: 4e-5
    critic_lr: float = 1e-4  # learning rate of the critic; paper: 1e-4
    slow_every_updates: int = 100  # gradient steps between slow copies; paper: 100
    slow_baseline: bool = False  # take the baseline from the slow critic [D4]
    shifted_advantage: bool = False  # credit a_t with V_{t+1} instead of V_t [D5]
    # Ablations: Table 2's gamer median and clipped record mean; full agent 1.64, 0.25
    layer_norm: bool = True  # normalise the GRU's gates; without: 1.66, 0.25
    reward_gradients: bool = True  # reward loss trains the RSSM; without: 1.68, 0.24
    discrete_latents: bool = True  # z is categorical; without (Gaussian): 1.08, 0.19
    kl_balancing: bool = True  # Algorithm 2; without, the plain KL: 0.84, 0.16
    policy_reinforce: bool = True  # Reinforce gradients; without, ρ = 0: 0.69, 0.15
    image_gradients: bool = True  # image loss trains the RSSM; without: 0.04, 0.01
    # Optimisers
    adam_eps: float = 1e-5  # Adam's epsilon; paper: 1e-5
    grad_clip: float = 100.0  # largest global gradient norm, per optimiser; paper: 100
    weight_decay: float = 1e-6  # every weight shrinks by this share a step; paper: 1e-6
    # Logging
    log_every_steps: int = 2_500  # decisions between lines of metrics.jsonl
    eval_every_steps: int = 100_000  # decisions between evaluations, and between dreams
    eval_episodes: int = 1  # episodes of an evaluation, 0: none; authors' code: 1
    eval_mode: str = "mode"  # mode | sample: what --eval takes of the policy
    checkpoint_every_steps: int = 100_000  # decisions between checkpoints
    checkpoint_minutes: float = 1.0  # the most minutes between them
    resume: str = "latest"  # latest | previous: the checkpoint to go on from

# A preset is a set of values that differ from the paper's; flags override both.
PRESETS = {
    "atari": {},
    "released": dict(  # the authors' code, version 2.2.0; D8 to D12 remain
        steps_per_update=16, batch_size=16, gamma=0.999, slow_baseline=True,
        shifted_advantage=True, full_action_space=False, noops=31),
    "schedules": dict(  # the paper's row of that name: their first version, faf9e4c
        gamma=0.999, anneal_steps=2_500_000, reinforce_mix=0.9, entropy_scale=3e-3),
    "continuous": dict(  # the authors' dmc of May 2021 (0216d33); our steps and replay
        steps=500_000, action_repeat=2, replay_capacity=500_000, prefill_steps=2_500,
        steps_per_update=5, deter_size=200, hidden_size=200, kl_scale=1.0,
        free_nats=1.0, discount_head=False, reward_tanh=False, model_lr=3e-4,
        gamma=0.99, reinforce_mix=0.0, entropy_scale=1e-4, actor_lr=8e-5,
        critic_lr=8e-5, eval_every_steps=10_000),
    "small": dict(
        steps=10_000, replay_capacity=100_000, prefill_steps=2_500, steps_per_update=2,
        batch_size=16, seq_len=8, num_latents=16, num_classes=16, deter_size=128,
        hidden_size=128, cnn_depth=8, mlp_layers=2, mlp_units=128, kl_scale=0.3,
        model_lr=6e-4, horizon=6, gamma=0.99, entropy_scale=3e-2, actor_lr=1e-3,
        critic_lr=1e-3, slow_every_updates=50, log_every_steps=500,
        eval_every_steps=5_000, eval_episodes=10, checkpoint_every_steps=2_000),
    "debug": dict(
        steps=800, time_limit=80, replay_capacity=1_000, prefill_steps=200,
        batch_size=4, seq_len=8, num_latents=4, num_classes=4, deter_size=16,
        hidden_size=16, cnn_depth=2, mlp_layers=2, mlp_units=16, horizon=4,
        slow_every_updates=10, log_every_steps=200, eval_every_steps=400,
        checkpoint_every_steps=400),
}

# %% Part 2 | Gradient tricks (Alg. 1, 2)
# Two ideas make discrete latents trainable: a sample that carries the gradient of its
# probabilities, and a KL that pulls the prior harder than the posterior.
# In: logits (..., S, K). Out: a one-hot sample of the same shape; nats per step (...).
# Predict: if prior and posterior are equal, what are the KL and its gradient?

def straight_through_sample(logits: Tensor) -> Tensor:
    """One-hot sample that passes gradients as if it were the probabilities. [Alg. 1]
        sample = one_hot(draw(logits)),  probs = softmax(logits)
        return sample + probs - sg(probs)
    logits (..., K) -> (..., K), exactly one-hot, with the softmax's gradient: biased,
    but of little variance. Here: the draw is Gumbel's. argmax(logits + noise) has the
    distribution softmax(logits) and, unlike torch.multinomial, makes no host wait.
    >>> _ = torch.manual_seed(0)
    >>> logits = torch.tensor([0.0, math.log(3.0)], requires_grad=True)   # probs ¼, ¾
    >>> round(straight_through_sample(logits.expand(9000, 2))[:, 1].mean().item(), 2)
    0.75
    >>> straight_through_sample(logits)[1].backward()
    >>> round(logits.grad[1].item(), 4)      # d probs[1] / d logits[1] = ¾·(1 - ¾)
    0.1875
    """
    gumbel = -torch.log(-torch.log(torch.rand_like(logits)))
    index = (logits + gumbel).argmax(-1, keepdim=True)
    sample = torch.zeros_like(logits).scatter_(-1, index, 1.0)
    probs = logits.softmax(-1)
    # Without the two probs the sample is a constant: no loss would reach the encoder
    # through z. In brackets they cancel exactly, so the value stays one-hot.
    return sample + (probs - probs.detach())

def categorical_entropy(logits: Tensor) -> Tensor:
    """Entropy in nats over the last axis, (..., K) -> (...); at most ln K.
    >>> [round(S * categorical_entropy(torch.zeros(K)).item(), 2)
    ...  for S, K in ((1, 18), (32, 32))]       # the most for a policy, and for z
    [2.89, 110.9]
    """
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)

def categorical_kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(p ‖ q) in nats of S independent categoricals, (..., S, K) twice -> (...).
        KL(p ‖ q) = Σ_s Σ_k p[s, k] · (ln p[s, k] - ln q[s, k])
    It is not symmetric: p, the first argument, weighs the logs.
    >>> p = torch.tensor([[1.0, 1.0]]).log()                # one latent, ½ ½
    >>> q = torch.tensor([[3.0, 1.0]]).log()                # one latent, ¾ ¼
    >>> round(categorical_kl(p, q).item(), 4)               # ½ ln(½ / ¾) + ½ ln(½ / ¼)
    0.1438
    >>> round(categorical_kl(q, p).item(), 4)               # ¾ ln(¾ / ½) + ¼ ln(¼ / ½)
    0.1308
    """
    log_p, log_q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum((-2, -1))

def balanced_kl(posterior: Tensor, prior: Tensor, alpha: float | None,
                kl=categorical_kl):
    """KL balancing: train the prior faster than the posterior. [Alg. 2]
        loss = α KL(sg(posterior) ‖ prior) + (1 - α) KL(posterior ‖ sg(prior))
    posterior, prior: logits (..., S, K) -> (loss, kl), each (...) in nats. Both terms
    have the same value, so loss equals kl; only the gradients differ. The first teaches
    the prior to predict, the second keeps the posterior predictable. The direction is
    always KL(posterior ‖ prior). α = None is the plain KL, with its full gradient to
    both (--no-kl-balancing). Authors' code: so is α = 0.5. Here: that halves both.
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
        plain = kl(posterior, prior)
        return plain, plain.detach()
    train_prior = kl(posterior.detach(), prior)
    train_posterior = kl(posterior, prior.detach())
    # Without the balance the posterior is dragged towards a prior that has learned
    # nothing yet. Paper, Table 2: the gamer median falls from 1.64 to 0.84.
    return alpha * train_prior + (1 - alpha) * train_posterior, train_prior.detach()

def gaussian(params: Tensor) -> torch.distributions.Normal:
    """(..., 2K), means and then s -> K independent normals. Authors' code: the
    deviation is 2·σ(s / 2) + 0.1, between 0.1 and 2.1."""
    mean, s = params.chunk(2, -1)
    std = 2 * torch.sigmoid(s / 2) + 0.1
    return torch.distributions.Normal(mean, std, validate_args=False)

def gaussian_kl(p_params: Tensor, q_params: Tensor) -> Tensor:
    """KL(p ‖ q) in nats of S·K independent normals, (..., S, 2K) twice -> (...).
        Σ  ln(σ_q / σ_p) + (σ_p² + (μ_p - μ_q)²) / 2σ_q² - ½
    >>> p, q = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.1, 0.0]])     # both σ = 1.1
    >>> round(gaussian_kl(p, q).item(), 4)                       # one σ apart
    0.5
    """
    p, q = gaussian(p_params), gaussian(q_params)
    return torch.distributions.kl_divergence(p, q).sum((-2, -1))

class OneHot(torch.distributions.Categorical):
    """The policy over A discrete actions, one-hot, from the actor's logits (..., A)."""
    def __init__(self, logits: Tensor):
        super().__init__(logits=logits, validate_args=False)  # checks wait for a GPU

    @property
    def mode(self) -> Tensor:
        """The likeliest action, (..., A)."""
        return F.one_hot(self.logits.argmax(-1), self.logits.shape[-1]).float()

    def rsample(self) -> Tensor:
        """An action (..., A) that carries the gradient of the probabilities."""
        return straight_through_sample(self.logits)

    def log_prob(self, action: Tensor) -> Tensor:
        """ln of the probability of actions (..., A) -> (...)."""
        return super().log_prob(action.argmax(-1))

class TruncatedNormal:
    """The policy over A continuous actions in [-1, 1]: a normal without its tails, from
    the actor's params (..., 2A), see gaussian; a tanh keeps the mode inside.
    >>> policy = TruncatedNormal(torch.zeros(9000, 2))     # mode 0, deviation 1.1
    >>> policy.rsample().abs().max().item() <= 1, round(policy.entropy()[0].item(), 3)
    (True, 0.686)
    """
    def __init__(self, params: Tensor):
        self.normal = gaussian(params)
        self.normal.loc = self.mode = self.normal.loc.tanh()
        self.below = self.normal.cdf(-1)  # the probability that is cut off there
        self.inside = self.normal.cdf(1) - self.below  # and what is left

    def rsample(self) -> Tensor:
        """An action (..., A), from uniform noise; mode and deviation get gradients."""
        p = self.below + self.inside * torch.rand_like(self.mode)
        return self.normal.icdf(p.clamp(1e-6, 1 - 1e-6)).clamp(-1, 1)

    def log_prob(self, action: Tensor) -> Tensor:
        """ln of the density at actions (..., A) -> (...)."""
        return (self.normal.log_prob(action) - self.inside.log()).sum(-1)

    def entropy(self) -> Tensor:
        """In nats, (...); at most A·ln 2, that of uniform actions."""
        low, high = ((x - self.mode) * self.normal.log_prob(x).exp() for x in (-1, 1))
        cut = (low - high) / (2 * self.inside)
        return (self.normal.entropy() + self.inside.log() + cut).sum(-1)

# %% Part 3 | Networks
# Plain feed-forward pieces and the one recurrent cell.
# In: images (..., C, 64, 64) in [-½, ½], or features (..., F). Out: embeddings, means.
# Predict: four convolutions of kernel 4 and stride 2 on 64 pixels: how many are left?

def glorot_init(module: nn.Module) -> None:
    """Keras's initialisation, for `network.apply(glorot_init)`: uniform Glorot weights,
    zero biases. torch's own are smaller (by √3 in square layers), its biases random."""
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)

def mlp(in_size: int, out_size: int, layers: int = 4, units: int = 400):
    """(..., in_size) -> (..., out_size): hidden layers with ELU, a linear output."""
    sizes = [in_size] + [units] * layers
    hidden = [m for i, o in zip(sizes, sizes[1:])
              for m in (nn.Linear(i, o), nn.ELU(inplace=True))]
    network = nn.Sequential(*hidden, nn.Linear(sizes[-1], out_size))
    network.register_forward_hook(lambda net, x, out: out.float())  # under autocast too
    return network

class ConvEncoder(nn.Module):
    """Images (N, ..., C, 64, 64) -> embeddings (N, ..., 32·depth).
    >>> encoder = ConvEncoder(1, depth=48)
    >>> encoder(torch.zeros(7, 1, 64, 64)).shape    # 64 -> 31 -> 14 -> 6 -> 2; 2·2·384
    torch.Size([7, 1536])
    """
    def __init__(self, channels: int, depth: int = 48):
        super().__init__()
        sizes = [channels, depth, 2 * depth, 4 * depth, 8 * depth]
        self.embed_dim = 2 * 2 * sizes[-1]
        self.net = nn.Sequential(*[
            m for i, o in zip(sizes, sizes[1:])
            for m in (nn.Conv2d(i, o, kernel_size=4, stride=2), nn.ELU(inplace=True))])
        self.net.to(memory_format=torch.channels_last)  # faster on CPUs, same numbers

    def forward(self, image: Tensor) -> Tensor:
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
        self.net = nn.Sequential(
            nn.ConvTranspose2d(32 * depth, 4 * depth, 5, 2), nn.ELU(inplace=True),
            nn.ConvTranspose2d(4 * depth, 2 * depth, 5, 2), nn.ELU(inplace=True),
            nn.ConvTranspose2d(2 * depth, depth, 6, 2), nn.ELU(inplace=True),
            nn.ConvTranspose2d(depth, channels, 6, 2))
        self.net.to(memory_format=torch.channels_last)

    def forward(self, feature: Tensor) -> Tensor:
        # From a 1×1 image a transposed convolution is 25 matrix products, one for each
        # pixel. Here: done as a single one, in a quarter of the time on a CPU.
        weight, bias = self.net[0].weight.permute(0, 2, 3, 1), self.net[0].bias
        out = self.linear(feature).flatten(0, -2) @ weight.flatten(1)
        out = out.unflatten(-1, weight.shape[1:]).permute(0, 3, 1, 2)
        out = self.net[1:](out + bias[:, None, None])
        return out.reshape(*feature.shape[:-1], *out.shape[1:]).float()

class LayerNormGRUCell(nn.Module):
    """The authors' GRU: one linear, one layer norm over all three gates together.
        reset, cand, update = split(LayerNorm(W [x, h] + b))
        c  = tanh(σ(reset) · cand)
        u  = σ(update - 1)
        h' = u · c + (1 - u) · h
    x (..., input), h (..., D) -> h' (..., D). Beside the norm, three things differ from
    torch's GRUCell: the reset gate scales all of the candidate, input part too; the
    bias of -1 makes it slow to forget at first (u = σ(-1) = 0.27); u weighs the NEW
    candidate. The norm is the model's only one; ε is Keras's 1e-3. Without it
    (--no-layer-norm) the gamer mean falls from 11.33 to 5.95, the median does not.
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
        gates = self.norm(self.linear(torch.cat([x, h], -1)).float())
        reset, candidate, update = gates.chunk(3, -1)
        candidate = torch.tanh(torch.sigmoid(reset) * candidate)
        # Without the -1 half of h is overwritten at every step from the start.
        update = torch.sigmoid(update - 1)
        return update * candidate + (1 - update) * h

# %% Part 4 | RSSM (Eq. 1)
# The recurrent state-space model: what the agent believes about the world.
#
#     h[t] = f(h[t-1], z[t-1], action[t])        recurrent model, deterministic
#     z[t] ~ q(z | h[t], x[t])                   posterior: it has seen the image
#     ẑ[t] ~ p(ẑ | h[t])                         prior: it has to guess
#
#      z[t-1] ──┐                 ┌── x[t] (embedded)
#   action[t] ──┴─► GRU ─► h[t] ──┴─► posterior ─► z[t] ──► next step
#      h[t-1] ──────┘        └──────► prior, trained towards the posterior
#
# In: embeddings (T, B, E), actions (T, B, A), is_first (T, B). Out: states (T, B, ...).
# Predict: with S = 3 variables of K = 4 classes and D = 8, how long is a feature?

class State(NamedTuple):
    """What the model believes at one moment; leading axes are (T, B) or (N,)."""
    h: Tensor  # (..., D) the deterministic, recurrent part
    z: Tensor  # (..., S, K) the stochastic part, S one-hot vectors
    logits: Tensor  # (..., S, K) of the distribution that z was drawn from

    @property
    def feature(self) -> Tensor:
        """[z, h] (..., S·K + D): what every head, the actor and the critic see."""
        return torch.cat([self.z.flatten(-2), self.h], -1)

class RSSM(nn.Module):
    """Recurrent state-space model with categorical latents. [Eq. 1]
    `img_step` goes on without an image (imagination), `obs_step` with one (acting), and
    `observe` through a whole sequence (training): the fast twin of obs_step in a loop.
    >>> rssm = RSSM(action_dim=2, embed_dim=12, num_latents=3, num_classes=4,
    ...             deter_size=8, hidden_size=7)
    >>> posterior, prior_logits = rssm.observe(
    ...     torch.zeros(5, 6, 12), torch.zeros(5, 6, 2), torch.zeros(5, 6).bool())
    >>> posterior.h.shape, posterior.z.shape, prior_logits.shape
    (torch.Size([5, 6, 8]), torch.Size([5, 6, 3, 4]), torch.Size([5, 6, 3, 4]))
    >>> rssm.features(posterior).shape                                   # 3·4 + 8
    torch.Size([5, 6, 20])
    """
    features = staticmethod(State.feature.fget)  # features(state) is state.feature
    params_per_class = 1  # its logit

    def __init__(self, action_dim: int, embed_dim: int, num_latents: int = 32,
                 num_classes: int = 32, deter_size: int = 600, hidden_size: int = 600,
                 layer_norm: bool = True):
        super().__init__()
        self.latent_shape = (num_latents, num_classes)
        self.deter_size, self.action_dim = deter_size, action_dim
        latent_size = num_latents * num_classes
        self.feature_size = latent_size + deter_size
        self.img_in = nn.Linear(latent_size + action_dim, hidden_size)
        self.cell = LayerNormGRUCell(hidden_size, deter_size, layer_norm)
        self.prior_in = nn.Linear(deter_size, hidden_size)
        self.prior_out = nn.Linear(hidden_size, self.params_per_class * latent_size)
        self.post_in = nn.Linear(deter_size + embed_dim, hidden_size)
        self.post_out = nn.Linear(hidden_size, self.params_per_class * latent_size)

    def initial(self, n: int) -> State:
        """n fresh states: zeros, not learned."""
        h = self.img_in.weight.new_zeros(n, self.deter_size)
        z = h.new_zeros(n, *self.latent_shape)
        return State(h, z, z.repeat(1, 1, self.params_per_class))

    def sample(self, logits: Tensor) -> Tensor:
        """z, (..., S, K), of its distribution."""
        return straight_through_sample(logits)

    def recurrent(self, state: State, action: Tensor) -> Tensor:
        """h[t] = f(h[t-1], z[t-1], action[t]), (N, D)."""
        x = F.elu(self.img_in(torch.cat([state.z.flatten(-2), action], -1)))
        return self.cell(x, state.h)

    def prior_logits(self, h: Tensor) -> Tensor:
        """Logits of p(ẑ[t] | h[t]), (..., D) -> (..., S, K)."""
        logits = self.prior_out(F.elu(self.prior_in(h))).float()
        return logits.unflatten(-1, (self.latent_shape[0], -1))

    def img_step(self, state: State, action: Tensor) -> State:
        """One step without an image: z comes from the prior. action (N, A)."""
        h = self.recurrent(state, action)
        logits = self.prior_logits(h)
        return State(h, self.sample(logits), logits)

    def obs_step(self, state: State, action: Tensor, embed: Tensor,
                 is_first: Tensor) -> State:
        """One step with an image: z comes from the posterior. state of t-1; action
        (N, A) that led here; embed (N, E) and is_first (N,) of t. Where is_first, state
        and action are zeroed: the step is a fresh start."""
        # Without this mask a new episode would go on with the old one's memory.
        keep = (~is_first).to(embed.dtype)[:, None]
        fresh = State(state.h * keep, state.z * keep[:, None], state.logits)
        h = self.recurrent(fresh, action * keep)
        logits = self.post_out(F.elu(self.post_in(torch.cat([h, embed], -1))))
        logits = logits.float().unflatten(-1, (self.latent_shape[0], -1))
        return State(h, self.sample(logits), logits)

    def observe(self, embeds: Tensor, actions: Tensor, is_first: Tensor,
                state: State | None = None) -> tuple[State, Tensor]:
        """A whole sequence with images.
        embeds (T, B, E), actions (T, B, A), is_first (T, B) bool -> posterior states
        and prior logits over (T, B). `state` precedes step 0; None starts from zeros.
        obs_step, T times, with all that does not depend on the step before done outside
        the loop. A linear layer of a concatenation is a sum, W [h, e] = W_h h + W_e e:
        embeddings and actions take one product for all T, and so does the prior.
        """
        assert embeds.shape[:2] == actions.shape[:2] == is_first.shape, \
            "embeds, actions and is_first must agree on (T, B)"
        keep = (~is_first).to(embeds.dtype).unsqueeze(-1)  # 0 where an episode starts
        z_weight, action_weight = self.img_in.weight.split(
            [math.prod(self.latent_shape), self.action_dim], 1)
        h_weight, embed_weight = self.post_in.weight.split(
            [self.deter_size, embeds.shape[-1]], 1)
        from_action = F.linear(actions * keep, action_weight, self.img_in.bias)
        from_embed = F.linear(embeds, embed_weight, self.post_in.bias)

        h, z, _ = self.initial(embeds.shape[1]) if state is None else state
        z, steps = z.flatten(-2), []
        for t in range(len(embeds)):
            x = F.elu(F.linear(z * keep[t], z_weight) + from_action[t])
            h = self.cell(x, h * keep[t])
            logits = self.post_out(F.elu(F.linear(h, h_weight) + from_embed[t]))
            logits = logits.float().unflatten(-1, (self.latent_shape[0], -1))
            z = self.sample(logits).flatten(-2)
            steps.append((h, z, logits))
        h, z, logits = (torch.stack(x) for x in zip(*steps))
        posterior = State(h, z.unflatten(-1, self.latent_shape), logits)
        return posterior, self.prior_logits(h)

class GaussianRSSM(RSSM):
    """The ablation --no-discrete-latents: z (..., S, K) is so many normal numbers.
    Here: S·K, to keep F. Authors' code: S. State.logits, (..., S, 2K), see gaussian."""
    params_per_class = 2  # see gaussian
    sample = staticmethod(lambda logits: gaussian(logits).rsample())

# %% Part 5 | World model (Eq. 2)
# All that is learned from real experience: the RSSM, an encoder that feeds it, and
# three heads that predict image, reward and discount from its states.
# In: a batch of rows (T, B, ...). Out: a loss, and states where imagination starts.
# Predict: a decoder outputs the exact image. What is its negative log-likelihood?

def normal_nll(mean: Tensor, target: Tensor) -> Tensor:
    """-ln Normal(target; mean, 1) of each element: half the squared error, plus 0.919.
    The constant trains nothing, but with it a perfect image has a loss of 3764:
    >>> image = torch.zeros(1, 64, 64)
    >>> round(normal_nll(image, image).sum().item())
    3764
    """
    return 0.5 * (target - mean) ** 2 + 0.5 * math.log(2 * math.pi)

class WorldModel(nn.Module):
    """Encoder, RSSM, image, reward and discount heads, and their loss. [Eq. 2]"""
    def __init__(self, action_dim: int, channels: int = 1, *, cnn_depth: int = 48,
                 mlp_layers: int = 4, mlp_units: int = 400, discrete: bool = True,
                 **rssm_sizes: int):
        super().__init__()
        rssm, self.kl, self.entropy = (
            (RSSM, categorical_kl, categorical_entropy) if discrete else
            (GaussianRSSM, gaussian_kl, lambda logits: gaussian(logits).entropy()))
        self.encoder = ConvEncoder(channels, cnn_depth)
        self.rssm = rssm(action_dim, self.encoder.embed_dim, **rssm_sizes)
        size = self.rssm.feature_size
        self.decoder = ConvDecoder(size, channels, cnn_depth)
        self.reward_head = mlp(size, 1, mlp_layers, mlp_units)
        self.discount_head = mlp(size, 1, mlp_layers, mlp_units)

    @staticmethod
    def preprocess(image: Tensor) -> Tensor:
        """uint8 pixels -> float32 in [-½, ½], what encoder and decoder speak."""
        return image.float() / 255 - 0.5

    def predict_reward(self, feature: Tensor) -> Tensor:
        """Mean reward on arriving in a state, (..., F) -> (...), as it was learned."""
        return self.reward_head(feature).squeeze(-1)

    def predict_discount(self, feature: Tensor) -> Tensor:
        """Discount of a state, (..., F) -> (...): γ if play goes on, 0 if it ends. γ is
        inside already, by the head's training: nothing multiplies by it again."""
        return self.discount_head(feature).squeeze(-1).sigmoid()

    def loss(self, image: Tensor, action: Tensor, reward: Tensor, is_first: Tensor,
             is_terminal: Tensor, *, gamma: float, kl_scale: float,
             kl_balance: float | None, discount_scale: float, free_nats: float = 0.0,
             reward_tanh: bool = True, image_gradients: bool = True,
             reward_gradients: bool = True):
        """The world-model loss of one batch. [Eq. 2]
            E_q Σ_t [ -ln p(x[t] | h[t], z[t]) - ln p(r[t] | h[t], z[t])
                      -ln p(γ[t] | h[t], z[t]) + β KL(q(z | h[t], x[t]) ‖ p(z | h[t])) ]
        image (T, B, C, 64, 64) uint8, action (T, B, A), reward, is_first, is_terminal
        (T, B) -> loss (scalar), posterior State over (T, B), metrics. Summed over
        pixels and latents, averaged over T and B [D7]. The image has 4096 terms against
        one, and outweighs the rest. Authors' code: the discount's term counts 5 times.
        """
        target = self.preprocess(image)
        posterior, prior = self.rssm.observe(self.encoder(target), action, is_first)
        feature = self.rssm.features(posterior)
        # Two ablations: the head learns as before, from states that it cannot change.
        mean = self.decoder(feature if image_gradients else feature.detach())
        assert mean.shape == image.shape, "the decoder must return the encoder's shape"
        image_loss = normal_nll(mean, target).sum((-3, -2, -1)).mean()
        # The tanh tames games that score by the thousand. It lives here and nowhere
        # else: replay keeps raw rewards, and scores are reported raw.
        reward_target = reward.tanh() if reward_tanh else reward
        reward_mean = self.predict_reward(
            feature if reward_gradients else feature.detach())
        reward_loss = normal_nll(reward_mean, reward_target).mean()
        # A soft target, γ or 0, not 1 or 0: the head's mean then IS the discount, and a
        # truncated episode (not terminal) keeps its γ. Rounded, γ would become 1.
        discount_target = gamma * (1 - is_terminal.float())
        discount_loss = F.binary_cross_entropy_with_logits(
            self.discount_head(feature).squeeze(-1), discount_target)
        kl_loss, kl = balanced_kl(posterior.logits, prior, kl_balance, self.kl)
        kl_loss = kl_loss.mean().clamp(min=free_nats)
        loss = (image_loss + reward_loss + discount_scale * discount_loss
                + kl_scale * kl_loss)
        with torch.no_grad():
            metrics = dict(
                image_loss=image_loss, reward_loss=reward_loss,
                discount_loss=discount_loss, kl=kl.mean(), model_loss=loss,
                image_mse=F.mse_loss(mean, target),
                reward_mse=F.mse_loss(reward_mean, reward_target),
                prior_entropy=self.entropy(prior).flatten(2).sum(2).mean(),
                posterior_entropy=self.entropy(
                    posterior.logits).flatten(2).sum(2).mean())
        return loss, posterior, {k: v.detach() for k, v in metrics.items()}

# %% Part 6 | Imagination
# The actor plays in its head, from each of the N = T·B posterior states of the batch.
# In: N start states. Out: H + 1 features and the actions that led to them; no images.
# Predict: which action is actions[0]?

def imagine(img_step, actor, start: State, horizon: int) -> tuple[Tensor, Tensor]:
    """Roll the world model forward with the actor's sampled actions (paper, Fig. 3).
        z[0] ──────► z[1] ──────► z[2] ── ... ──► z[H]       features[t] = [z[t], h[t]]
            actions[1]   actions[2]                          actions[t] led to state t
    img_step: (State, action) -> State, as RSSM.img_step; actor: features -> a policy
    with rsample(), as OneHot; start: State over (N,). -> features (H+1, N, F), actions
    (H+1, N, A). Nothing chose actions[0]: it is zero. Gradients of later states can
    reach the actor through its samples; Reinforce calls this under torch.no_grad().
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
        # Without the detach, gradients would also run through what the actor sees.
        action = actor(features[-1].detach()).rsample()
        state = img_step(state, action)
        features.append(state.feature)
        actions.append(action)
    return torch.stack(features), torch.stack([torch.zeros_like(actions[0])] + actions)

# %% Part 7 | Returns and losses (Eq. 4-6)
# What the imagined sequences are worth, and how the actor and the critic learn from it.
#
#     state        z[0]      z[1]      z[2]   ...   z[H-1]      z[H]
#     reward       r[0]      r[1]      r[2]         r[H-1]      (unused)
#     discount     γ[0]      γ[1]      γ[2]         γ[H-1]      (unused)
#     action            a0        a1        ...            a_{H-1}   a_t: actions[t+1]
#     returns      V[0]      V[1]      V[2]         V[H-1]      V[H] = v(z[H])
#
# r[t] is received on ARRIVING in z[t], so V[t] and v(z[t]) both contain it, and it
# cancels in the advantage V[t] - v(z[t]): a_t is praised or blamed for what follows it.
# The paper numbers its states 1 .. H; here they are 0 .. H; both losses end at H - 1.
# In: (H, N) tensors, values (H+1, N). Out: returns (H, N), and scalars to minimise.
# Predict: rewards 1, 2, values 8, 4, 2, discounts ½: the returns with λ = ½?

def lambda_return(reward: Tensor, value: Tensor, discount: Tensor,
                  lambda_: float) -> Tensor:
    """λ-returns: a weighted mean of all n-step returns. [Eq. 4]
        V[t] = r[t] + γ[t] · ((1 - λ) · v(z[t+1]) + λ · V[t+1]),    V[H] = v(z[H])
    value (H+1, N); reward and discount (H, N), or (H+1, N) whose last entry is not used
    -> returns (H, N), for t = 0 .. H-1. It bootstraps from the NEXT state's value: with
    v(z[t]) in its place the critic would be trained towards itself.
    >>> r, v = torch.tensor([1.0, 2.0]), torch.tensor([8.0, 4.0, 2.0])
    >>> g = torch.tensor([0.5, 0.5])
    >>> lambda_return(r, v, g, 0.5).tolist()        # 1 + ½·(½·4 + ½·3),  2 + ½·2
    [2.75, 3.0]
    >>> lambda_return(r, v, g, 0.0).tolist()        # one step:   r[t] + γ v[t+1]
    [3.0, 3.0]
    >>> lambda_return(r, v, g, 1.0).tolist()        # all H steps:  1 + ½·3
    [2.5, 3.0]
    """
    returns, target = [], value[-1]
    for t in reversed(range(len(value) - 1)):
        future = (1 - lambda_) * value[t + 1] + lambda_ * target
        target = reward[t] + discount[t] * future
        returns.append(target)
    return torch.stack(returns[::-1])

def trajectory_weights(discount: Tensor) -> Tensor:
    """How much each imagined state counts: the chance to be there, discounted.
        w[t] = Π_{i < t} γ[i],    w[0] = 1
    discount (H, N) -> weights (H, N). States after a predicted end of the episode
    have a weight near zero: the model knows nothing of them. The first weight is 1,
    whatever γ[0] is: we ARE in the start state.
    >>> trajectory_weights(torch.tensor([0.5, 0.5, 0.0, 0.5])).tolist()
    [1.0, 0.5, 0.25, 0.0]
    """
    return torch.cat([torch.ones_like(discount[:1]), discount[:-1]]).cumprod(0)

def critic_loss(value: Tensor, returns: Tensor, weights: Tensor):
    """Squared error towards the returns. [Eq. 5]
        mean over t, n of  w[t] · ½ (v(z[t]) - sg(V[t]))²
    value, returns, weights (H, N), t = 0 .. H-1 -> loss (scalar), metrics. [D7]
    >>> v, V = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0])
    >>> w = torch.tensor([1.0, 0.5])
    >>> critic_loss(v, V, w)[0].item()              # (1·½·4 + ½·½·16) / 2
    3.0
    """
    loss = (weights * 0.5 * (value - returns.detach()) ** 2).mean()
    return loss, dict(critic_loss=loss.detach(), value=value.detach().mean(),
                      returns=returns.detach().mean())

def actor_loss(log_prob: Tensor, entropy: Tensor, returns: Tensor, baseline: Tensor,
               weights: Tensor, *, entropy_scale: float, reinforce_mix: float = 1.0):
    """Reinforce, dynamics backpropagation and entropy. [Eq. 6]
        mean over t, n of  w[t] · ( - ρ · ln p(a_t | z[t]) · sg(V[t] - v(z[t]))
                                    - (1 - ρ) · V[t]
                                    - η · entropy(p(· | z[t])) )
    log_prob (H, N): ln p of a_t, the action CHOSEN in state t; entropy (H, N) of the
    policy there; returns, baseline, weights (H, N) -> loss (scalar), metrics. For ρ < 1
    the returns must carry the actor's gradient. Subtracting v(z[t]), which knows
    nothing of a_t, keeps the expected gradient and removes most of its variance.
    >>> logits = torch.zeros(1, 2).requires_grad_()              # two equal actions
    >>> log_prob, ent = logits.log_softmax(-1)[:, 0], torch.zeros(1)  # chose the first
    >>> V, v, w = torch.tensor([3.0]), torch.tensor([1.0]), torch.ones(1)
    >>> loss, _ = actor_loss(log_prob, ent, V, v, w, entropy_scale=0.0)
    >>> round(loss.item(), 4)                                    # ln 2 · (3 - 1)
    1.3863
    >>> loss.backward(); logits.grad.tolist()    # descent: good gets likelier
    [[-1.0, 1.0]]
    """
    # A number, not a path: with ρ < 1 the returns carry a gradient, and without the
    # detach Reinforce would send it on, times ln p.
    advantage = (returns - baseline).detach()
    objective = (reinforce_mix * log_prob * advantage
                 + (1 - reinforce_mix) * returns
                 + entropy_scale * entropy)
    loss = -(weights * objective).mean()
    return loss, dict(actor_loss=loss.detach(), actor_entropy=entropy.detach().mean())

# %% Part 8 | Agent (Eq. 3)
# The actor a_t ~ p(a_t | z_t) and the critic v(z_t) ≈ E Σ_{τ≥t} γ^{τ-t} r_τ [Eq. 3], on
# the full model state [z, h], and one gradient step of everything, on one screen.
# In: a batch of rows (T, B, ...). Out: weights that moved, and metrics.
# Predict: Adam's first step moves all weights by nearly the same amount. How far?

class Optimizer:
    """Adam with global-norm clipping and decoupled decay, for the weights it is given.
    Authors' code: clip the gradient, then w <- (1 - decay)·w, NOT times the learning
    rate, then Adam. AdamW decays by lr·weight_decay, hence the division.
    >>> layer = nn.Linear(1, 1)
    >>> _ = nn.init.ones_(layer.weight)
    >>> opt = Optimizer(layer, lr=0.5, eps=0.0, clip=100.0, decay=0.25)
    >>> round(opt.step(3 * layer(torch.ones(1)).sum()).item(), 4)   # 3√2
    4.2426
    >>> round(layer.weight.item(), 4)           # ¾·1, then Adam's first step, lr
    0.25
    """
    def __init__(self, module, *, lr: float, eps: float, clip: float, decay: float):
        self.weights, self.clip = list(module.parameters()), clip
        self.adam = torch.optim.AdamW(
            self.weights, lr, eps=eps, weight_decay=decay / lr, fused=True,
            capturable=self.weights[0].is_cuda)  # its step count in the CUDA graph too

    def step(self, loss: Tensor) -> Tensor:
        """Minimise `loss` by one step; returns the gradient's norm before clipping."""
        self.adam.zero_grad()
        # inputs= is what keeps the three learners apart: whatever else the loss's graph
        # touches, gradients arrive at this optimiser's own weights and nowhere else.
        loss.backward(inputs=self.weights)
        norm = nn.utils.clip_grad_norm_(self.weights, self.clip)
        self.adam.step()
        return norm

class CudaGraph:
    """Plays a function back on the GPU as one recording: from Python its many small
    kernels start slower than the GPU runs them. Noise is always new. function: dict of
    tensors -> dict of tensors, without a wait for a value. For each set of options and
    shapes three calls run plainly, the next records and plays; in, out are copies."""
    def __init__(self, function):
        self.function, self.stream = function, torch.cuda.Stream()
        self.calls, self.graphs = {}, {}

    def __call__(self, inputs: dict[str, Tensor], **options) -> dict[str, Tensor]:
        key = (*options.items(), *((k, v.shape) for k, v in inputs.items()))
        self.calls[key] = self.calls.get(key, 0) + 1
        if self.calls[key] <= 3:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                outputs = self.function(inputs, **options)
            torch.cuda.current_stream().wait_stream(self.stream)
            return outputs
        if key not in self.graphs:
            fixed = {name: value.clone() for name, value in inputs.items()}
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self.stream):
                self.graphs[key] = graph, fixed, self.function(fixed, **options)
        graph, fixed, outputs = self.graphs[key]
        for name, value in inputs.items():
            fixed[name].copy_(value)
        graph.replay()
        return {name: value.clone() for name, value in outputs.items()}

class Agent(nn.Module):
    """World model, actor, critic, slow critic, and their three optimisers."""
    def __init__(self, config: Config, num_actions: int, channels: int = 1,
                 device: torch.device | str = "cpu", continuous: bool = False):
        super().__init__()
        c, self.num_actions, self.updates = config, num_actions, 0
        self.device = torch.device(device)
        on_gpu = self.device.type == "cuda"
        auto = "bf16" if on_gpu and torch.cuda.is_bf16_supported(False) else "fp32"
        self.precision = auto if c.precision == "auto" else c.precision
        sizes = {name: getattr(c, name) for name in (
            "num_latents", "num_classes", "deter_size", "hidden_size", "cnn_depth",
            "mlp_layers", "mlp_units", "layer_norm")}
        self.world_model = WorldModel(
            num_actions, channels, discrete=c.discrete_latents, **sizes)
        size = self.world_model.rssm.feature_size
        self.distribution = TruncatedNormal if continuous else OneHot
        outputs = num_actions * (2 if continuous else 1)
        self.actor = mlp(size, outputs, c.mlp_layers, c.mlp_units)
        self.critic = mlp(size, 1, c.mlp_layers, c.mlp_units)
        self.apply(glorot_init)
        self.slow_critic = copy.deepcopy(self.critic)
        self.to(self.device)
        self.model_loss_args = dict(
            gamma=c.gamma, kl_scale=c.kl_scale, free_nats=c.free_nats,
            kl_balance=c.kl_balance if c.kl_balancing else None,
            discount_scale=c.discount_scale * c.discount_head,  # 0: it stays untrained
            reward_tanh=c.reward_tanh, reward_gradients=c.reward_gradients,
            image_gradients=c.image_gradients)
        # Paper: continuous actions learn by dynamics alone; so does the ablation.
        mix = (c.reinforce_mix, c.reinforce_mix_end)
        mix = (0, 0) if continuous or not c.policy_reinforce else mix
        self.schedule = np.array([mix, (c.entropy_scale, c.entropy_scale_end)])
        self.anneal_steps = c.anneal_steps or math.inf
        self.reinforce_mix, self.entropy_scale = torch.zeros(2, device=self.device)
        self.discount_head = c.discount_head
        self.horizon, self.gamma, self.lambda_ = c.horizon, c.gamma, c.return_lambda
        self.slow_every_updates, self.slow_baseline, self.shift = (
            c.slow_every_updates, c.slow_baseline, int(c.shifted_advantage))
        shared = dict(eps=c.adam_eps, clip=c.grad_clip, decay=c.weight_decay)
        self.optimizers = dict(
            model=Optimizer(self.world_model, lr=c.model_lr, **shared),
            actor=Optimizer(self.actor, lr=c.actor_lr, **shared),
            critic=Optimizer(self.critic, lr=c.critic_lr, **shared))
        if c.compile:  # it unrolls the scan of T steps: minutes to build
            self.world_model.loss = torch.compile(self.world_model.loss)
        if c.cuda_graphs and on_gpu:
            self.gradient_step = CudaGraph(self.gradient_step)
            self.decide = CudaGraph(self.decide)

    def autocast(self):
        """bf16: layers multiply in bfloat16; weights, h, logits, losses stay float32.
        Each weight is cast once per `with`, the copy reused: inside one, no optimiser
        may step (stale copy), and no layer run both with and without gradients."""
        return torch.autocast(self.device.type, torch.bfloat16,
                              enabled=self.precision == "bf16")

    def policy(self, feature: Tensor):
        """p(a_t | z_t) of states (..., F), with rsample, mode, log_prob, entropy."""
        return self.distribution(self.actor(feature))

    @torch.no_grad()
    def act(self, image: Tensor, is_first: Tensor, memory=None, greedy: bool = False):
        """One decision for N environments: image (N, C, 64, 64) uint8, is_first (N,)
        bool and the memory of the call before (None at first) -> action (N, A), memory.
        greedy takes the actor's mode, to evaluate; z is sampled all the same."""
        if memory is None:
            memory = self.world_model.rssm.initial(len(image))._asdict()
            memory["action"] = memory["h"].new_zeros(len(image), self.num_actions)
        inputs = memory | dict(image=image, is_first=is_first)
        memory = self.decide(inputs, greedy=greedy)
        return memory["action"], memory

    def decide(self, inputs: dict[str, Tensor], *, greedy: bool) -> dict[str, Tensor]:
        """act, from tensors to tensors, so that a CUDA graph can hold it."""
        model, last = self.world_model, State(*(inputs[k] for k in State._fields))
        with self.autocast():
            embed = model.encoder(model.preprocess(inputs["image"]))
            state = model.rssm.obs_step(
                last, inputs["action"], embed, inputs["is_first"])
            policy = self.policy(state.feature)
        action = policy.mode if greedy else policy.rsample()
        return state._asdict() | dict(action=action)

    def train_step(self, batch: dict[str, Tensor], step: int = 0) -> dict[str, Tensor]:
        """One update: the rows of Replay.sample (T, B, ...) -> metrics, scalars on the
        device. `step`, decisions so far, anneals ρ and η. After the 1st, 101st, 201st
        update ... (slow_every_updates) the slow critic becomes a copy: without it, the
        critic would chase its own latest guess."""
        done = min(1.0, step / self.anneal_steps)
        mix, scale = self.schedule @ (1 - done, done)
        # In place: a CUDA graph reads the two where they are.
        self.reinforce_mix.fill_(mix), self.entropy_scale.fill_(scale)
        metrics = self.gradient_step(batch, dynamics=bool(mix < 1))  # a graph on a GPU
        if self.updates % self.slow_every_updates == 0:
            self.slow_critic.load_state_dict(self.critic.state_dict())  # in place
        self.updates += 1
        return metrics

    def gradient_step(self, batch: dict[str, Tensor], *, dynamics: bool):
        """One gradient step of world model, actor and critic: the whole algorithm."""
        # 1. World model: learn to predict what happened. [Eq. 2]
        with self.autocast():
            loss, posterior, metrics = self.world_model.loss(
                **batch, **self.model_loss_args)
        metrics["model_grad_norm"] = self.optimizers["model"].step(loss)

        # 2. Imagine H steps from every posterior state, with the model just updated.
        #    The detach cuts behaviour off the encoder; only ρ < 1 needs gradients here.
        start = State(*(x.detach().flatten(0, 1) for x in posterior))  # (T, B) -> (N,)
        with self.autocast(), torch.set_grad_enabled(dynamics):
            features, actions = imagine(  # (H+1, N, F), (H+1, N, A)
                self.world_model.rssm.img_step, self.policy, start, self.horizon)
            reward = self.world_model.predict_reward(features[:-1])  # r[0]: see Part 7
            discount = self.world_model.predict_discount(features[1:-1])
            # The start state is a real one, so whether it was terminal is known [D13].
            # Without this a dead state's return would count a dream of life after it.
            true_discount = self.gamma * (1 - batch["is_terminal"].flatten().float())
            discount = torch.cat([true_discount[None], discount])
            if not self.discount_head:  # then even after an end
                discount = torch.full_like(discount, self.gamma)
            slow_value = self.slow_critic(features).squeeze(-1)
            returns = lambda_return(reward, slow_value, discount, self.lambda_)
            weights = trajectory_weights(discount.detach())

        # 3. Critic: predict the returns. [Eq. 5]  State H only bootstraps.
        states, end = features[:-1].detach(), self.horizon - self.shift  # [D5]
        with self.autocast():  # the policy runs again, for the gradient of ln p
            value, policy = self.critic(states).squeeze(-1), self.policy(states[:end])
        loss_of_critic, critic_metrics = critic_loss(value, returns, weights)

        # 4. Actor: make good returns likelier. [Eq. 6]  actions[t+1] was chosen in
        #    state t; in ln p it is a constant, though with ρ < 1 it carries a gradient.
        #    shift = 1 (--shifted-advantage) credits it with V[t+1] [D5].
        baseline = slow_value[:-1] if self.slow_baseline else value
        loss_of_actor, actor_metrics = actor_loss(
            policy.log_prob(actions[1:end + 1].detach()), policy.entropy(),
            returns[self.shift:], baseline[:end], weights[:end],
            entropy_scale=self.entropy_scale, reinforce_mix=self.reinforce_mix)
        metrics |= critic_metrics | actor_metrics
        metrics["actor_grad_norm"] = self.optimizers["actor"].step(loss_of_actor)
        metrics["critic_grad_norm"] = self.optimizers["critic"].step(loss_of_critic)
        return metrics

# %% Part 9 | Replay
# What happened, kept on disk. The learner is hungrier than the game is fast: a batch of
# 2500 rows for every 4 new ones, so each row is used some 600 times.
# In: one row of N environments at a time. Out: batches of sequences (T, B, ...).
# Predict: five rows are stored, the ring holds four: which sequences of 3 are there?

class UsageError(Exception):
    """Something the user can mend: Part 12 prints one line and exits with status 2."""

class Row(NamedTuple):
    """One moment of N environments, aligned as the header's TIME says: action, reward
    CAME WITH the image; on an episode's first row both are zero. is_terminal means that
    the game ended; one cut by a time limit ends without it, it still had a future."""
    image: np.ndarray  # (N, C, 64, 64) uint8
    action: np.ndarray  # (N, A) float32, one-hot or in [-1, 1]
    reward: np.ndarray  # (N,) float32, raw
    is_first: np.ndarray  # (N,) bool
    is_terminal: np.ndarray  # (N,) bool

class Replay:
    """A ring of rows for each environment, in a memory-mapped .npy file.
    `capacity` counts rows over all environments. The oldest row is overwritten first,
    one by one (FIFO), not episode by episode. Opening a directory that holds a replay
    of the same layout goes on with it; another layout raises UsageError.
    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> replay = Replay(folder.name, capacity=4, image_shape=(1, 1, 1), action_dim=2)
    >>> for t in range(5):
    ...     replay.add(np.zeros((1, 1, 1, 1)), np.zeros((1, 2)), [t], [False], [False])
    >>> rewards = replay.sample(batch_size=100, seq_len=3)["reward"]         # (T, B)
    >>> sorted(set(map(tuple, rewards.T.tolist())))     # row 0 is gone, none wraps
    [(1.0, 2.0, 3.0), (2.0, 3.0, 4.0)]
    """
    def __init__(self, directory, capacity: int, *, num_envs: int = 1,
                 image_shape=(1, 64, 64), action_dim: int = 18, seed: int = 0):
        dtype = np.dtype([
            ("image", np.uint8, image_shape), ("action", np.float32, (action_dim,)),
            ("reward", np.float32), ("is_first", bool), ("is_terminal", bool)])
        self.num_envs, self.length = num_envs, capacity // num_envs
        # A spare slot: the row being written, which a kill may tear, is never sampled.
        self.slots = self.length + 1
        shape = (num_envs, self.slots)
        self.random = np.random.default_rng(seed)
        rows, written = Path(directory, "rows.npy"), Path(directory, "written.npy")
        if not (rows.exists() or written.exists() and any(written.read_bytes()[128:])):
            rows.parent.mkdir(parents=True, exist_ok=True)
            new = rows.with_suffix(".new")
            try:
                np.lib.format.open_memmap(new, "w+", dtype, shape)
                if hasattr(os, "posix_fallocate"):  # a full disk shows now
                    with open(new, "r+b") as file:
                        os.posix_fallocate(file.fileno(), 0, new.stat().st_size)
                np.save(written, np.zeros(2, np.int64))  # 128 bytes head, count, twin
                os.replace(new, rows)  # last: what is called rows.npy is whole
            except OSError as error:
                new.unlink(missing_ok=True)  # a full disk must not stay full
                raise UsageError(f"{rows} of {capacity:,} rows: {error}") from None
        try:
            for mode in ("r", "r+"):  # "r" fails on a cut file, "r+" would pad it
                self.rows, self.written = (np.load(x, mode) for x in (rows, written))
            first, second = self.written.tolist()  # equal, unless killed between
            if (self.rows.dtype, self.rows.shape) != (dtype, shape) or (
                    first - second not in (0, 1)):
                raise ValueError
        except Exception as error:  # numpy raises many kinds
            raise UsageError(f"{rows.parent} has another layout or is damaged, choose"
                             f" another --logdir ({error!r:.60})") from None

    def __len__(self) -> int:
        """Rows that can be sampled, over all environments."""
        return min(int(self.written[0]), self.length) * self.num_envs

    def add(self, image, action, reward, is_first, is_terminal) -> None:
        """Store one row of every environment; the arguments are the fields of Row."""
        slot = int(self.written[0]) % self.slots
        for k, v in zip(Row._fields, (image, action, reward, is_first, is_terminal)):
            self.rows[k][:, slot] = v
        self.written[:] = self.written[0] + 1  # last: a row exists once it is whole

    def sample(self, batch_size: int, seq_len: int) -> dict[str, Tensor]:
        """Uniformly drawn sequences: a dict of Row's fields, time-major (T, B, ...).
        Starts are counted from the oldest row to the newest and only then turned into
        slots: a sequence may cross episodes [D8], never the write head."""
        written = int(self.written[0])
        oldest = max(0, written - self.length)
        if written - oldest < seq_len:
            raise UsageError(f"{written - oldest} rows stored, {seq_len} in a sequence")
        start = self.random.integers(oldest, written - seq_len + 1, batch_size)
        env = self.random.integers(self.num_envs, size=batch_size)
        slots = (start + np.arange(seq_len)[:, None]) % self.slots  # (T, B)
        batch = {name: torch.from_numpy(np.asarray(self.rows[name])[env, slots])
                 for name in Row._fields}
        # The state before row 0 is unknown, so row 0 passes for an episode's first row.
        # Without this line its action would act on a state it was not chosen in.
        batch["is_first"][0] = True
        return batch

# %% Part 10 | Environments
# All that can be played, as rows: ale-py's C++ emulators, any Gymnasium game with
# images, and Catch, the example of your own. In: actions (N, A). Out: rows.
# Predict: with which step of Catch does the ball land?

class Catch(gymnasium.Env):
    """A ball falls through an 8×8 board, a paddle catches it: learned in minutes.
    The example for your own, too: any gymnasium.Env with uint8 images (H, W), (H, W, 1)
    or (H, W, 3), registered under an id: `--game your_module:YourGame-v0` plays it.
    Actions: left, stay, right. Reward when the ball lands: +1 caught, -1 missed.
    >>> env = Catch()
    >>> _ = env.reset(seed=0)
    >>> [env.step(1)[2] for _ in range(7)]    # it lands with the 7th step
    [False, False, False, False, False, False, True]
    """
    observation_space = gymnasium.spaces.Box(0, 255, (64, 64, 1), np.uint8)
    action_space = gymnasium.spaces.Discrete(3)

    def reset(self, *, seed=None, options=None):
        """A new ball in a random column; the paddle starts in the middle."""
        super().reset(seed=seed)
        self.ball, self.row, self.paddle = int(self.np_random.integers(8)), 0, 4
        return self.draw(), {}

    def step(self, action):
        """Move the paddle, let the ball fall by one cell."""
        self.paddle = min(max(self.paddle + int(action) - 1, 0), 7)
        self.row += 1
        landed = self.row == 7
        reward = (1.0 if self.ball == self.paddle else -1.0) if landed else 0.0
        return self.draw(), reward, landed, False, {}

    def draw(self):
        """The board as an image: 8×8 pixels a cell."""
        board = np.zeros((8, 8, 1), np.uint8)
        board[self.row, self.ball] = board[7, self.paddle] = 255
        return board.repeat(8, axis=0).repeat(8, axis=1)

class Envs:
    """N copies of a game as rows, from any gymnasium vector environment that resets in
    the step AFTER an episode's end (NEXT_STEP, the default): that step takes no action
    and returns the next first image, a row with is_first that is no decision. Actions
    are one-hot, or, where the game takes a box of numbers, scaled to [-1, 1]."""
    def __init__(self, vector_env, seed: int, frames_per_step: int = 1):
        actions, images = vector_env.single_action_space, vector_env.observation_space
        self.continuous = isinstance(actions, gymnasium.spaces.Box)
        if self.continuous and len(actions.shape) == 1 and actions.is_bounded() and (
                actions.dtype.kind == "f" and (actions.low < actions.high).all()):
            vector_env = gymnasium.wrappers.vector.RescaleAction(
                vector_env, np.float32(-1), np.float32(1))
            self.num_actions = actions.shape[0]
        elif isinstance(actions, gymnasium.spaces.Discrete) and actions.start == 0:
            self.num_actions = int(actions.n)
        else:
            raise UsageError("--game needs Discrete actions from 0, or a bounded Box of"
                             f" fractions with one axis; this game has {actions}")
        ok = images.dtype == np.uint8 and len(images.shape) in (3, 4)
        self.channels = to_images(np.zeros(images.shape)).shape[1] if ok else 0
        if self.channels not in (1, 3):
            raise UsageError("--game needs uint8 images (H, W), (H, W, 1) or (H, W, 3);"
                             f" this game has {vector_env.single_observation_space}")
        self.vector_env, self.num_envs = vector_env, vector_env.num_envs
        self.seed, self.frames_per_step = seed, frames_per_step

    def reset(self) -> Row:
        """The first row of N new episodes, from self.seed."""
        images = to_images(self.vector_env.reset(seed=self.seed)[0])
        self.vector_env.action_space.seed(self.seed)
        self.totals = np.zeros((self.num_envs, 2))  # score and decisions so far
        action = np.zeros((self.num_envs, self.num_actions), np.float32)
        self.done = np.zeros(self.num_envs, bool)
        return Row(images, action, action[:, 0], ~self.done, self.done)

    def step(self, action: np.ndarray) -> Row:
        """Play actions (N, A). Then self.done: whose episode ended with this row;
        self.ended: the (raw score, decisions) of those episodes."""
        self.send(action)
        return self.receive()

    def send(self, action: np.ndarray) -> None:
        """The first half of step: ale-py's emulators start; others play in receive."""
        self.action = np.asarray(action, np.float32)
        self.chosen = self.action if self.continuous else self.action.argmax(-1)
        legal = self.action.shape == (self.num_envs, self.num_actions) and (
            np.abs(self.action) <= 1 if self.continuous
            else self.action == np.eye(self.num_actions)[self.chosen])
        # The emulator must not see a bad action: ale-py hangs on one, deaf to Ctrl-C.
        if not np.all(legal):
            raise ValueError("actions must be (N, A), one-hot or within [-1, 1]")
        if hasattr(self.vector_env, "send"):
            self.vector_env.send(self.chosen)

    def receive(self) -> Row:
        """The second half of step: the row that the sent actions led to."""
        observation, reward, terminated, truncated, _ = (
            self.vector_env.recv() if hasattr(self.vector_env, "send")
            else self.vector_env.step(self.chosen))
        assert np.isfinite(reward).all(), "a reward of the game is not finite"
        is_first, self.done = self.done, terminated | truncated
        # Without `played`, a first row would claim that the ignored action led to it.
        played = (~is_first).astype(np.float32)
        row = Row(to_images(observation), self.action * played[:, None],
                  reward.astype(np.float32) * played, is_first, terminated)
        self.totals += np.stack([row.reward, played], -1)
        self.ended = self.totals[self.done].tolist()
        self.totals[self.done] = 0
        return row

def to_images(observation: np.ndarray) -> np.ndarray:
    """(N, H, W), (N, H, W, C) or (N, C, H, W) -> (N, C, 64, 64) uint8, by area."""
    if observation.ndim == 3:
        observation = observation[:, None]
    if observation.shape[1] not in (1, 3):
        observation = np.moveaxis(observation, -1, 1)
    if observation.shape[2:] == (64, 64):
        return observation
    images = torch.from_numpy(np.ascontiguousarray(observation)).float()
    return F.interpolate(images, (64, 64), mode="area").round().byte().numpy()

def plain_name(game: str) -> str:
    """UpNDown, up_n_down, ALE/UpNDown-v5, UpNDownNoFrameskip-v4: all are upndown."""
    name = game.lower().removeprefix("ale/")
    name = re.sub(r"(noframeskip|deterministic)?-v[045]$", "", name)
    return re.sub(r"[^a-z0-9]", "", name)

def make_envs(game: str, num_envs: int = 1, seed: int = 0, *, action_repeat: int = 4,
              sticky: float = 0.25, noops: int = 30, time_limit: int = 27_000,
              full_action_space: bool = True) -> Envs:
    """N environments of a game, by any of its names; UsageError names the nearest ones.
    Actions are repeated on Atari and where they are continuous, as in the paper.
    >>> make_envs("Catch", num_envs=2).reset().image.shape
    (2, 1, 64, 64)
    """
    from ale_py.roms import get_all_rom_ids  # the algorithm above needs no emulator
    from ale_py.vector_env import AtariVectorEnv
    # The four left out are for two players, and would end the process.
    roms = {plain_name(rom): rom for rom in get_all_rom_ids()
            if rom not in ("combat", "joust", "maze_craze", "warlords")}
    if plain_name(game) in roms:
        # The maximum of the last two frames (consoles drew some sprites in every other
        # one), gray, resized by area. No frame stack: memory is the RSSM's job.
        return Envs(AtariVectorEnv(
            roms[plain_name(game)], num_envs, img_height=64, img_width=64,
            grayscale=True, stack_num=1, frameskip=action_repeat, maxpool=True,
            noop_max=noops, repeat_action_probability=sticky,
            full_action_space=full_action_space,
            max_num_frames_per_episode=time_limit * action_repeat,
            reward_clipping=False, use_fire_reset=False, episodic_life=False,
            life_loss_info=False, continuous=False, continuous_action_threshold=0.5,
            autoreset_mode="NextStep", batch_size=0, num_threads=0,
            thread_affinity_offset=-1), seed, action_repeat)

    def make_one():
        env = Catch() if plain_name(game) == "catch" else gymnasium.make(game)
        if isinstance(env.action_space, gymnasium.spaces.Box):
            env = gymnasium.wrappers.RepeatAction(env, action_repeat)
        return gymnasium.wrappers.TimeLimit(env, time_limit)
    try:
        envs = Envs(gymnasium.vector.SyncVectorEnv([make_one] * num_envs), seed)
    except (gymnasium.error.Error, ImportError) as error:
        known = dict.fromkeys(["catch", *roms, *map(plain_name, gymnasium.registry)])
        near = ", ".join(difflib.get_close_matches(plain_name(game), known)) or "none"
        raise UsageError(f"--game {game}: {error} (near: {near})") from None
    envs.frames_per_step = action_repeat if envs.continuous else 1
    return envs

# %% Part 11 | Looking
# In: scalars of every gradient step, scores of every episode. Out: metrics.jsonl.
# Predict: two gradient steps, an entropy of 1, then of 4: what does the line say?

class Metrics:
    """Means over a log period, one JSON object a line; the first line's rates count the
    prefill in. `counters` are running totals, with at least updates and frames.
    >>> metrics = Metrics(Path(os.devnull), updates=0, frames=0)
    >>> for entropy in 1.0, 4.0: metrics.add(dict(actor_entropy=torch.tensor(entropy)))
    >>> metrics.write(updates=2, frames=32)["actor_entropy"]
    2.5
    """
    def __init__(self, path: Path, **counters):
        self.path, self.before = path, counters | {"time": time.time()}
        self.sums, self.count, self.episodes = 0, 0, []

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Sum on the device, unread: `check` is the one wait of a gradient step."""
        self.sums = self.sums + torch.stack([v.float() for v in metrics.values()])
        self.names, self.count = list(metrics), self.count + 1

    def check(self, update: int) -> None:
        """FloatingPointError names the first that is not finite; waits for a GPU."""
        if not (finite := self.sums.isfinite()).all():
            name = self.names[finite.int().argmin()]
            raise FloatingPointError(f"{name} is not finite in update {update}")

    def write(self, **counters) -> dict:
        """Append totals, and rates and means since the last line (null: no episode)."""
        now = counters | {"time": time.time()}
        seconds = max(now["time"] - self.before["time"], 1e-9)
        means = np.mean(self.episodes, 0).tolist() if self.episodes else (None, None)
        rates = {f"{k}_per_s": (now[k] - self.before[k]) / seconds
                 for k in ("updates", "frames")}
        line = counters | rates | dict(zip(("episode_return", "episode_length"), means))
        line |= dict(zip(self.names, (self.sums / self.count).tolist()))
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.before, self.sums, self.count, self.episodes = now, 0, 0, []
        return line

def __getattr__(name: str):
    """Called for names that this file lacks: these five are in test_dreamerv2.py."""
    if name not in "COMMANDS Watch scores normalized_score summarize_scores".split():
        raise AttributeError(name)
    sys.modules.setdefault("dreamerv2", sys.modules[__name__])  # that file imports this
    import test_dreamerv2
    return getattr(test_dreamerv2, name)

# %% Part 12 | Running
# Playing, training, evaluating, saving. In: flags. Out: a run's folder, exit status.
# Predict: which flag sets Config.kl_balance?

NOISE = dict(cpu=torch, cuda=torch.cuda, mps=torch.mps)  # each device's generator

def upload(arrays: dict, device: torch.device) -> dict[str, Tensor]:
    """To the device; to a GPU from pinned memory, so that the host need not wait."""
    pin = device.type == "cuda"
    tensors = {name: torch.as_tensor(value) for name, value in arrays.items()}
    return {name: (value.pin_memory() if pin else value).to(device, non_blocking=pin)
            for name, value in tensors.items()}

def choose(agent: Agent | None, envs: Envs, row: Row, memory, greedy: bool = False):
    """What to do after a row, at random if agent is None: actions (N, A), memory."""
    if agent is None:
        action = envs.vector_env.action_space.sample()
        return action if envs.continuous else np.eye(envs.num_actions)[action], None
    seen = upload(dict(image=row.image, is_first=row.is_first), agent.device)
    action, memory = agent.act(**seen, memory=memory, greedy=greedy)
    return action.cpu().numpy(), memory  # the one wait of a decision for a GPU

def evaluate(agent: Agent, envs: Envs, episodes: int, greedy=True) -> np.ndarray:
    """Raw score and decisions (episodes, 2) of whole episodes; greedy: see act."""
    row, memory, ended = envs.reset(), None, []
    while len(ended) < episodes:
        action, memory = choose(agent, envs, row, memory, greedy)
        row = envs.step(action)
        ended += envs.ended
    return np.array(ended[:episodes])

def write_whole(path: Path, data, keep: Path | None = None) -> None:
    """Write beside, rename over: always a whole file. keep: the old one's new name."""
    beside = path.with_name("new.tmp")
    with open(beside, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())  # should the power fail
    if keep and path.exists():
        os.replace(path, keep)
    os.replace(beside, path)

def save_checkpoint(config, agent: Agent, replay: Replay, counters, keep="previous.pt"):
    """Weights, Adam, counters, noise; the rows are on disk. `keep`: see write_whole."""
    folder, device, data = Path(config.logdir), agent.device.type, io.BytesIO()
    log_bytes = (folder / "metrics.jsonl").stat().st_size
    torch.save(dict(
        format=1, version=__version__, config=vars(config), agent=agent.state_dict(),
        counters=counters | dict(updates=agent.updates, log_bytes=log_bytes),
        adam={k: o.adam.state_dict()["state"] for k, o in agent.optimizers.items()},
        noise={device: NOISE[device].get_rng_state()},
        sampling=replay.random.bit_generator.state), data)
    write_whole(folder / "checkpoint.pt", data.getbuffer(), folder / keep)

def load_checkpoint(config: Config, agent: Agent) -> dict | None:
    """Restore agent and noise in place; the whole checkpoint, or None without one."""
    print(f"{config.game}, preset {config.preset}, {agent.precision} on {agent.device},"
          f" rho {agent.schedule[0, 0]:g}, graphs: {type(agent.decide) is CudaGraph}")
    path = Path(config.logdir, "checkpoint.pt")
    if config.resume == "previous" or not path.exists():  # killed between two renames
        path = path.with_name("previous.pt")
    if not path.exists():
        return None
    try:
        if damaged := zipfile.ZipFile(path).testzip():  # torch does not look
            raise ValueError(f"{damaged} is damaged")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["format"] != 1:
            raise ValueError(f"format {saved['format']}, this file reads 1")
        agent.load_state_dict(saved["agent"])
        for name, optimizer in agent.optimizers.items():
            new = optimizer.adam.state_dict()  # its settings fit this device
            optimizer.adam.load_state_dict(new | dict(state=saved["adam"][name]))
        agent.updates = saved["counters"]["updates"]
        for device in {agent.device.type} & set(saved["noise"]):  # not another's
            NOISE[device].set_rng_state(saved["noise"][device])
    except Exception as error:  # torch raises many kinds, all mean the same
        raise UsageError(f"{path} is no usable checkpoint ({error!r:.60}); --resume"
                         " previous or latest takes the other") from None
    print(f"{path} of {time.ctime(path.stat().st_mtime)}:", "{steps:,} decisions,"
          " {updates:,} updates, {episodes:,} episodes".format(**saved["counters"]))
    return saved

def pick_device(config: Config) -> torch.device:
    """The device of --device, set up for --precision; UsageError names those here."""
    cuda = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    here = ["cpu", *cuda] + ["mps"] * torch.backends.mps.is_available()
    name = dict(auto=[*cuda, "cpu"][0], cuda="cuda:0").get(config.device, config.device)
    if name not in here:
        raise UsageError(f"--device {config.device}: this host has {', '.join(here)}")
    if config.precision not in ["auto", "fp32", "bf16"] + ["tf32"] * (name in cuda):
        raise UsageError(f"--precision {config.precision}: fp32, bf16, or tf32 on CUDA")
    if name in cuda:
        torch.cuda.set_device(name)  # where graphs are recorded
        torch.backends.cudnn.allow_tf32 = config.precision == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = config.precision == "tf32"
    return torch.device(name)

def make_game(config: Config, num_envs: int, *key: int) -> Envs:
    """The game, seeded by key: decisions, and 0 train 1 evaluate 2 play 3 dream."""
    seed = int(np.random.default_rng((config.seed, *key)).integers(2 ** 30))
    rules = ("action_repeat", "sticky", "noops", "time_limit", "full_action_space")
    return make_envs(config.game, num_envs, seed,
                     **{rule: getattr(config, rule) for rule in rules})

def new_agent(config: Config) -> Agent:
    """An agent for the config's game and device."""
    device, envs = pick_device(config), make_game(config, 1)
    torch.manual_seed(config.seed)
    return Agent(config, envs.num_actions, envs.channels, device, envs.continuous)

def train(config: Config) -> None:
    """Train; one process a folder: the system frees its lock, however it ends."""
    if pick_device(config).type == "cpu" and config.preset not in ("small", "debug"):
        five = {k: torch.from_numpy(v).expand(config.seq_len, *v.shape)
                for k, v in make_game(config, 5).reset()._asdict().items()}
        agent, begin = new_agent(config), time.time()
        agent.train_step(five)  # a trial of 5 sequences
        cost = (time.time() - begin) * config.batch_size / 5
        print(f"No CUDA device used: {cost:.1f} s a gradient step; see --preset small")
    agent, folder = new_agent(config), Path(config.logdir)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with sqlite3.connect(folder / "lock", timeout=0) as lock:
            lock.execute("BEGIN EXCLUSIVE")
            go_on(config, agent)
    except sqlite3.Error as error:
        raise UsageError(f"{folder} is in use, or not writable: {error}") from None

def go_on(config: Config, agent: Agent) -> None:
    """Begin, or go on from a checkpoint; games and batch in hand are taken anew."""
    folder, saved = Path(config.logdir), load_checkpoint(config, agent)
    counters = saved["counters"] if saved else dict(steps=0, episodes=0, time=0)
    if counters["steps"] >= config.steps + config.num_envs:  # --steps was lowered
        raise UsageError(f"--steps {config.steps}: the run has {counters['steps']}")
    if counters["steps"] >= config.steps:
        return print("nothing left to do: a larger --steps goes on")
    envs = make_game(config, config.num_envs, counters["steps"], 0)
    replay = Replay(folder / "replay", config.replay_capacity, num_envs=config.num_envs,
                    image_shape=(envs.channels, 64, 64), action_dim=envs.num_actions,
                    seed=envs.seed)
    if len(replay) and not saved or counters["steps"] and not len(replay):
        raise UsageError(f"{folder}: replay and checkpoint.pt do not belong together")
    envs.seed += int(replay.written[0])  # after a kill: not the same episodes again
    print(f"replay: {replay.rows.nbytes / 1e9:.2f} GB on disk for"
          f" {config.replay_capacity:,} rows, {len(replay):,} filled")
    config.resume = "latest"  # it was for this once
    write_whole(folder / "config.json", json.dumps(vars(config), indent=1).encode())
    with open(folder / "metrics.jsonl", "ab") as file:  # later lines come again
        file.truncate(min(file.tell(), counters.get("log_bytes", file.tell())))
    if saved:  # what is saved below is the same once more: previous.pt stays
        replay.random.bit_generator.state = saved["sampling"]
    save_checkpoint(config, agent, replay, counters, keep="checkpoint.pt")
    try:
        learn(config, agent, envs, replay, counters)
    except (OSError, FloatingPointError) as error:
        sys.exit(f"\ndreamerv2.py: {error}; {folder / 'checkpoint.pt'} is good")
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

def learn(config, agent: Agent, envs: Envs, replay: Replay, counters: dict) -> None:
    """The loop: every decision makes a row, every few decisions a gradient step. Ctrl-C
    or SIGTERM ends it after the step in hand, with a checkpoint; a second, at once."""
    frames, start = envs.frames_per_step, time.time() - counters["time"]
    metrics = Metrics(Path(config.logdir, "metrics.jsonl"), updates=agent.updates,
                      frames=counters["steps"] * frames)
    memory, batch, scores, stop, ending, last = None, None, {}, [], False, time.time()
    replay.add(*(row := envs.reset()))
    try:
        watch = __getattr__("Watch")(config, counters["steps"])
    except ImportError as error:  # this file alone
        watch = None
        print(f"no pictures of dreams, no TensorBoard: {error}")
    bar = tqdm(total=config.steps, initial=counters["steps"], unit="step", miniters=1)

    def draw() -> dict[str, Tensor]:
        return upload(replay.sample(config.batch_size, config.seq_len), agent.device)

    def due(every: int) -> bool:  # all is due at the end
        return steps // every > before // every or steps >= config.steps
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda n, frame: (
            signal.default_int_handler(n, frame) if stop else stop.append(n)))
    while not ending:
        before = counters["steps"]
        prefilling = before < config.prefill_steps
        bar.set_description("random play" if prefilling else "training", refresh=False)
        action, memory = choose(None if prefilling else agent, envs, row, memory)
        envs.send(action)
        steps = before + int((~envs.done).sum())  # a reset is no decision
        # While the emulators play, learn. Decisions so far say how many gradient steps
        # there should be; a checkpoint holds both counts, so a resumed run owes none.
        # The next batch is drawn meanwhile: it lacks the rows added before its use.
        owed = (steps - config.prefill_steps) // config.steps_per_update - agent.updates
        for _ in range(owed):
            metrics.add(agent.train_step(batch or draw(), steps))
            batch = draw()
            metrics.check(agent.updates)
        replay.add(*(row := envs.receive()))
        metrics.episodes += envs.ended
        counters.update(steps=steps, episodes=counters["episodes"] + len(envs.ended),
                        time=time.time() - start)
        bar.update(steps - before)
        if due(config.eval_every_steps) and agent.updates and config.eval_episodes:
            ends = evaluate(agent, make_game(config, 1, steps, 1), config.eval_episodes)
            scores = dict(zip(("eval_return", "eval_length"), ends.mean(0).tolist()))
        ending = bool(stop) or steps >= config.steps
        if metrics.count and (ending or due(config.log_every_steps)):
            line = metrics.write(
                step=steps, frames=steps * frames, updates=agent.updates,
                episodes=counters["episodes"], wall_time_s=counters["time"], **scores)
            if watch:
                watch(line, agent, replay)
            scores = {}
            bar.set_postfix({k: line[k] for k in (
                "frames", "episode_return", "updates_per_s")})
        late = time.time() - last > 60 * config.checkpoint_minutes
        if ending or late or due(config.checkpoint_every_steps):
            save_checkpoint(config, agent, replay, counters)
            last = time.time()
    bar.close()
    if stop:
        raise KeyboardInterrupt(*stop)

def flag(name: str) -> str:
    """The flag of a field of Config.
    >>> flag("kl_balance")
    '--kl-balance'
    """
    return "--" + name.replace("_", "-")

def build_parser() -> argparse.ArgumentParser:
    """One flag for each field of Config; its help is the comment beside the field."""
    def error(message):  # one line, like every other complaint
        raise UsageError(message)
    parser = argparse.ArgumentParser(
        prog="dreamerv2.py", allow_abbrev=False,
        description="DreamerV2. Trains, or goes on with the run that its folder holds.")
    parser.error = error
    add, group = parser.add_mutually_exclusive_group().add_argument, parser
    for name, what in dict(eval="play with the agent", dream="draw what it predicts",
                           benchmark="measure speed").items():
        add("--" + name, dest="command", action="store_const", help=what,
            const=lambda config, name=name: __getattr__("COMMANDS")[name](config))
    add("--scores", dest="command", metavar="FOLDER", help="scores of finished runs",
        type=lambda folder: lambda config: __getattr__("scores")(folder))
    choices = dict(preset=PRESETS, resume=["latest", "previous"],
                   eval_mode=["mode", "sample"])
    for line in inspect.getsource(Config).splitlines():
        if title := re.fullmatch(r"    # (.+)", line):
            group = parser.add_argument_group(title[1])
        elif field := re.fullmatch(r"    (\w+): (\w+) = (.+?)  # (.+)", line):
            kind = {"int": dict(type=int, metavar="N"), "str": dict(metavar="NAME"),
                    "float": dict(type=float, metavar="X"),
                    "bool": dict(action=argparse.BooleanOptionalAction)}[field[2]]
            new = group.add_argument(flag(field[1]), default=argparse.SUPPRESS, **kind,
                                     help=f"{field[4]} (default: {field[3]})")
            new.choices = choices.get(field[1])
    return parser

def check(config: Config) -> None:
    """UsageError names the first flag whose value is out of range."""
    rows = config.num_envs * config.seq_len  # a sequence for each environment
    share, size, count = (0, 1), (0, 1e9), (0, 10 ** 12)
    limits = dict(  # ends included; others: whole numbers from 1, fractions from 1e-12
        seed=(0, 2 ** 30), noops=(1, 200), num_envs=(1, 1024), num_classes=(2, 10 ** 6),
        horizon=(1 + config.shifted_advantage, 10 ** 6), weight_decay=(0, 0.1),
        prefill_steps=(rows, 10 ** 12), replay_capacity=(rows, 10 ** 9),
        time_limit=(1, 10 ** 6), action_repeat=(1, 100), anneal_steps=count,
        eval_episodes=count, sticky=share, gamma=share, return_lambda=share,
        kl_balance=share, reinforce_mix=share, reinforce_mix_end=share, kl_scale=size,
        free_nats=size, discount_scale=size, entropy_scale=size, entropy_scale_end=size)
    for name, value in vars(config).items():
        usual = {int: (1, 10 ** 12), float: (1e-12, 1e12)}.get(type(value))
        low, high = limits.get(name, usual or (value, value))  # text, yes, no: any
        why = " (--num-envs times --seq-len)" * (low == rows > 2)
        if not low <= value <= high:
            raise UsageError(f"{flag(name)} {value}: must be from {low}{why} to {high}")

# What may change between two commands on one folder: how a run is made, not which.
FREE = """logdir device precision cuda_graphs compile resume eval_mode eval_every_steps
steps eval_episodes log_every_steps checkpoint_every_steps checkpoint_minutes""".split()

def parse_config(argv: list[str]):
    """Command line -> checked Config and what to do with it. Flags go over the settings
    of the run in the folder or, in a new one, of the preset; nothing is written."""
    given = vars(build_parser().parse_args(argv))
    command = given.pop("command") or train
    if "--benchmark" in argv and not torch.cuda.is_available():
        given.setdefault("preset", "small")
    config = Config(**(PRESETS[given.get("preset", "atari")] | given))
    config.logdir = config.logdir or (
        f"runs/{plain_name(config.game)}-{config.preset}-seed{config.seed}")
    path = Path(config.logdir, "config.json")
    if config.resume == "previous" and not path.with_name("previous.pt").exists():
        raise UsageError(f"--resume previous: no previous.pt in {config.logdir}")
    if any(path.parent.glob("*.pt")) and not {"--benchmark", "--scores"} & set(argv):
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            if plain_name(config.game) == plain_name(before["game"]):
                given.pop("game", None)  # another spelling is no other game
            config = Config(**(before | given | {"logdir": config.logdir}))
        except (OSError, ValueError, TypeError, KeyError):
            raise UsageError(f"{path} is unusable; choose another --logdir") from None
        new = {k: f"{flag(k)} {given[k]} (was {before.get(k)})" for k in given
               if given[k] != before.get(k)}
        if refused := ", ".join(new[k] for k in new if k not in FREE):
            raise UsageError(f"{refused}: choose another --logdir than {config.logdir}")
        print(f"the settings of {config.logdir}", *new.values(), sep=", ")
    check(config)
    return config, command

def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    try:
        config, command = parse_config(sys.argv[1:] if argv is None else argv)
        command(config)
    except (UsageError, OSError, ImportError) as error:  # OSError: disk or folder
        print("dreamerv2.py:", *str(error).split(), file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print("\nstopped; the same command goes on from the last checkpoint")
        return 128 + (stop.args or (signal.SIGINT,))[0]
    return 0

if __name__ == "__main__":
    sys.exit(main())
